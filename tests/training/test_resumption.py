"""Which checkpoints are complete, and which changes of a recipe matter to a stage."""

import json
import shutil

import pytest
from otdrg.training.recipe import load_recipe
from otdrg.training.resumption import (
    format_changes,
    is_whole,
    last_checkpoint,
    recipe_changes,
    remove_partial_checkpoints,
    stage_changes,
)

# --- checkpoints -----------------------------------------------------------------------------------------------------


@pytest.fixture
def stage(trained_run, tmp_path):
    """The report stage's folder with its checkpoints of steps 2 and 4."""
    return shutil.copytree(trained_run / "report", tmp_path / "report")


def cut(path, share):
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])


def test_last_checkpoint_is_the_newest_complete_one(stage, tmp_path):
    assert last_checkpoint(stage).name == "checkpoint-4"
    # By number, not by name.
    shutil.copytree(stage / "checkpoint-4", stage / "checkpoint-10")
    state = stage / "checkpoint-10" / "trainer_state.json"
    state.write_text(json.dumps({**json.loads(state.read_text()), "global_step": 10}))
    assert last_checkpoint(stage).name == "checkpoint-10"
    assert last_checkpoint(tmp_path / "nowhere") is None


@pytest.mark.parametrize("share", [0, 0.5, 0.999])
@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_last_checkpoint_truncated_file_is_noticed(stage, name, share):
    cut(stage / "checkpoint-4" / name, share)
    assert last_checkpoint(stage).name == "checkpoint-2"


@pytest.mark.parametrize("share", [0, 0.5, 0.99])
def test_last_checkpoint_truncated_state_is_noticed(stage, share):
    cut(stage / "checkpoint-4" / "trainer_state.json", share)
    assert last_checkpoint(stage).name == "checkpoint-2"


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_is_whole_missing_file_is_noticed(stage, name):
    # As rotation, killed, leaves a checkpoint.
    (stage / "checkpoint-4" / name).unlink()
    assert not is_whole(stage / "checkpoint-4")


def test_is_whole_missing_shard_is_noticed(stage):
    checkpoint = stage / "checkpoint-4"
    (checkpoint / "model.safetensors").rename(checkpoint / "model-00001-of-00002.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    assert not is_whole(checkpoint)
    shutil.copy(checkpoint / "model-00001-of-00002.safetensors", checkpoint / "model-00002-of-00002.safetensors")
    assert is_whole(checkpoint)


def test_remove_partial_checkpoints_keeps_complete_ones(stage):
    cut(stage / "checkpoint-4" / "optimizer.pt", 0.5)
    (stage / "checkpoint-of-mine").mkdir()
    remove_partial_checkpoints(stage)
    assert {path.name for path in stage.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-of-mine"}


# --- recipes compared ------------------------------------------------------------------------------------------------


@pytest.fixture
def changes(tiny_recipe):
    """Names of the changes that matter to a stage, and of those that do not, when a recipe is overridden."""

    def compare(stage, finished, *overrides, before=(), processes=(1, 1)):
        then, now = load_recipe(tiny_recipe, list(before)).to_dict(), load_recipe(tiny_recipe, list(overrides))
        return tuple(set(part) for part in stage_changes(then, now, stage, finished, processes))

    return compare


@pytest.mark.parametrize("finished", [True, False])
def test_stage_changes_what_a_stage_learns_from_matters(changes, finished):
    for override, stages in (
        ("seed=7", {"ircp", "predictor", "report"}),
        ("model.preset=small", {"ircp", "predictor", "report"}),
        ("model.dtype=bfloat16", {"ircp", "predictor", "report"}),
        ("model.overrides.image_tokens=4", {"ircp", "predictor", "report"}),
        ("model.overrides.vision_config.model_args.window_size=4", {"ircp", "predictor", "report"}),
        ("model.overrides.focal_gamma=1", {"predictor", "report"}),
        ("model.overrides.fiot=false", {"report"}),
        ("model.overrides.lora.r=4", {"report"}),
        ("predictor.learning_rate=1", {"predictor"}),
        ("predictor.vision=full", {"predictor"}),
        ("report.generation.num_beams=2", {"report"}),
        ("report.bf16=true", {"report"}),
    ):
        name = override.partition("=")[0]
        for stage in ("ircp", "predictor", "report"):
            assert changes(stage, finished, override)[0] == ({name} if stage in stages else set()), (override, stage)


def test_stage_changes_logging_and_longer_training_are_harmless(changes):
    watching = [
        "report.logging_steps=5",
        "report.save_total_limit=3",
        "report.dataloader_num_workers=1",
        "report.per_device_eval_batch_size=2",
    ]
    names = {override.partition("=")[0] for override in watching}
    assert changes("report", False, *watching, "cpu_threads=2", "output_dir=elsewhere") == (set(), names)
    assert changes("report", True, *watching) == (set(), names)
    for override, longer in (
        ("report.max_steps=5", True),
        ("report.max_steps=3", False),
        ("report.max_steps=-1", False),
    ):
        matters, does_not = changes("report", False, override)
        assert (does_not if longer else matters) == {"report.max_steps"} and not (matters if longer else does_not)
        assert changes("report", True, override)[0] == {"report.max_steps"}
    by_epochs = ["report.max_steps=-1"]
    assert changes("report", False, *by_epochs, "report.num_train_epochs=3", before=by_epochs)[0] == set()
    assert changes("report", False, *by_epochs, "report.num_train_epochs=0.5", before=by_epochs)[0] == {
        "report.num_train_epochs"
    }
    assert changes("predictor", False, "predictor.thresholds=rule")[0] == set()
    assert changes("predictor", True, "predictor.thresholds=rule")[0] == {"predictor.thresholds"}


def test_stage_changes_same_batch_over_processes_is_harmless(changes):
    halved, accumulated = "report.per_device_train_batch_size=2", "report.gradient_accumulation_steps=2"
    assert changes("report", False, halved)[0] == {"report.per_device_train_batch_size"}
    assert changes("report", False, halved, accumulated)[0] == set()
    assert changes("report", False, halved, processes=(1, 2))[0] == set()
    assert changes("report", False, processes=(1, 2))[0] == {"the number of processes"}
    assert changes("report", True, processes=(1, 2))[0] == set()
    # Contrastive pre-training sees other negatives in another batch.
    batch = ["ircp.per_device_train_batch_size=4", "ircp.gradient_accumulation_steps=2"]
    assert changes("ircp", False, *batch)[0] == {"ircp.per_device_train_batch_size", "ircp.gradient_accumulation_steps"}
    assert changes("ircp", False, "ircp.per_device_train_batch_size=4", processes=(1, 2))[0] == set()


def test_format_changes_is_one_line(tiny_recipe):
    then, now = load_recipe(tiny_recipe).to_dict(), load_recipe(tiny_recipe, ["seed=7", "model.overrides.fiot=false"])
    changes, _ = stage_changes(then, now, "report", False, (1, 1))
    assert format_changes(changes) == "model.overrides.fiot=unset then, False now; seed=42 then, 7 now"


def test_recipe_changes_fields_of_another_version_count_as_their_defaults(tiny_recipe):
    """Another version of transformers or of this package has other fields, or writes other ones."""
    before = load_recipe(tiny_recipe).to_dict()
    del before["report"]["ot_epsilon_annealing"], before["report"]["logging_first_step"]
    before["report"]["adam_beta1"] = 0.9
    assert recipe_changes(before, load_recipe(tiny_recipe)) == {}
    now = load_recipe(tiny_recipe, ["report.adam_beta1=0.8", "report.logging_first_step=true"])
    assert recipe_changes(before, now) == {"report.adam_beta1": (0.9, 0.8)}
