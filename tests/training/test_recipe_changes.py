"""What of a changed recipe matters to a stage."""

from dataclasses import asdict

import pytest
from otdrg.training.recipe import load_recipe
from otdrg.training.recipe_changes import format_changes, stage_changes


@pytest.fixture
def changes(tiny_recipe):
    """Names of the changes that matter to a stage, and of those that do not, when a recipe is overridden."""

    def compare(stage, finished, *overrides, before=(), processes=(1, 1)):
        then, now = asdict(load_recipe(tiny_recipe, list(before))), load_recipe(tiny_recipe, list(overrides))
        return tuple(set(part) for part in stage_changes(then, now, stage, finished, processes))

    return compare


@pytest.mark.parametrize("finished", [True, False])
def test_what_a_stage_learns_from_matters(changes, finished):
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


def test_an_unfinished_stage_may_be_watched_differently_and_made_longer(changes):
    watching = ["report.logging_steps=5", "report.save_total_limit=3", "report.workers=1", "report.eval_batch_size=2"]
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
    assert changes("report", False, *by_epochs, "report.epochs=3", before=by_epochs)[0] == set()
    assert changes("report", False, *by_epochs, "report.epochs=0.5", before=by_epochs)[0] == {"report.epochs"}
    assert changes("predictor", False, "predictor.fit_thresholds=true")[0] == set()
    assert changes("predictor", True, "predictor.fit_thresholds=true")[0] == {"predictor.fit_thresholds"}


def test_a_step_may_be_spread_over_processes_if_as_many_studies_make_it(changes):
    halved, accumulated = "report.batch_size=2", "report.gradient_accumulation=2"
    assert changes("report", False, halved)[0] == {"report.batch_size"}
    assert changes("report", False, halved, accumulated)[0] == set()
    assert changes("report", False, halved, processes=(1, 2))[0] == set()
    assert changes("report", False, processes=(1, 2))[0] == {"the number of processes"}
    assert changes("report", True, processes=(1, 2))[0] == set()
    # Contrastive pre-training sees other negatives in another batch.
    batch = ["ircp.batch_size=4", "ircp.gradient_accumulation=2"]
    assert changes("ircp", False, *batch)[0] == {"ircp.batch_size", "ircp.gradient_accumulation"}
    assert changes("ircp", False, "ircp.batch_size=4", processes=(1, 2))[0] == set()


def test_changes_in_a_line(tiny_recipe):
    then, now = asdict(load_recipe(tiny_recipe)), load_recipe(tiny_recipe, ["seed=7", "model.overrides.fiot=false"])
    told, _ = stage_changes(then, now, "report", False, (1, 1))
    assert format_changes(told) == "model.overrides.fiot=unset then, False now; seed=42 then, 7 now"
