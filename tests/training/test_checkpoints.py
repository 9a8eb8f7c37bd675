"""Which checkpoints are whole, told from real ones that were cut off in every way."""

import json
import shutil

import pytest
from otdrg.training.checkpoints import is_whole, last_checkpoint, remove_partial_checkpoints


@pytest.fixture
def stage(trained_run, tmp_path):
    """The report stage's folder with its checkpoints of steps 2 and 4."""
    return shutil.copytree(trained_run / "report", tmp_path / "report")


def cut(path, share):
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])


def test_the_newest_whole_checkpoint_is_taken(stage, tmp_path):
    assert last_checkpoint(stage).name == "checkpoint-4"
    # By number, not by name.
    shutil.copytree(stage / "checkpoint-4", stage / "checkpoint-10")
    state = stage / "checkpoint-10" / "trainer_state.json"
    state.write_text(json.dumps({**json.loads(state.read_text()), "global_step": 10}))
    assert last_checkpoint(stage).name == "checkpoint-10"
    assert last_checkpoint(tmp_path / "nowhere") is None


@pytest.mark.parametrize("share", [0, 0.5, 0.999])
@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_file_that_was_cut_off_is_noticed(stage, name, share):
    cut(stage / "checkpoint-4" / name, share)
    assert last_checkpoint(stage).name == "checkpoint-2"


@pytest.mark.parametrize("share", [0, 0.5, 0.99])
def test_a_state_that_was_cut_off_is_noticed(stage, share):
    cut(stage / "checkpoint-4" / "trainer_state.json", share)
    assert last_checkpoint(stage).name == "checkpoint-2"


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_file_that_was_deleted_is_noticed(stage, name):
    # As rotation, killed, leaves a checkpoint.
    (stage / "checkpoint-4" / name).unlink()
    assert not is_whole(stage / "checkpoint-4")


def test_a_shard_that_is_missing_is_noticed(stage):
    checkpoint = stage / "checkpoint-4"
    (checkpoint / "model.safetensors").rename(checkpoint / "model-00001-of-00002.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    assert not is_whole(checkpoint)
    shutil.copy(checkpoint / "model-00001-of-00002.safetensors", checkpoint / "model-00002-of-00002.safetensors")
    assert is_whole(checkpoint)


def test_only_partial_checkpoints_are_removed(stage):
    cut(stage / "checkpoint-4" / "optimizer.pt", 0.5)
    (stage / "checkpoint-of-mine").mkdir()
    remove_partial_checkpoints(stage)
    assert {path.name for path in stage.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-of-mine"}
