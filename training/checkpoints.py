"""Checkpoints of a stage: which are whole. Trainer writes them in place, so a run that was cut off leaves a part."""

from __future__ import annotations

import logging
import os
import shutil
import zipfile
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ..files_otdrg import read_json

logger = logging.getLogger(__name__)


def last_checkpoint(folder: str | os.PathLike) -> Path | None:
    """The newest whole checkpoint in a stage's folder; None where there is none."""
    return next((path for path in reversed(_checkpoints(folder)) if is_whole(path)), None)


def remove_partial_checkpoints(folder: str | os.PathLike) -> None:
    """Delete checkpoints that are not whole.

    Trainer counts them among the `save_total_limit` that are kept, and would delete whole ones for them.
    """
    for path in _checkpoints(folder):
        if not is_whole(path):
            logger.info("removing %s, which was not written to its end", path)
            shutil.rmtree(path)


def is_whole(checkpoint: Path) -> bool:
    """Whether a checkpoint was written to its end and nothing is missing of it now.

    Its state, which Trainer writes last, is read; every other file has to have the end that its format gives it, as far
    as can be told without reading the weights; and what resuming reads has to be there (Trainer passes over an
    optimizer or a random state that is missing). DeepSpeed and FSDP keep weights and optimizer in folders of their own.
    """
    try:
        state = read_json(checkpoint / TRAINER_STATE_NAME)
        if state["global_step"] != _step(checkpoint):
            return False
        paths = list(checkpoint.iterdir())
        names = {path.name for path in paths}
        for path in paths:
            if path.suffix == ".safetensors":
                # Compares the file's length with what its header says.
                with safe_open(path, framework="pt"):
                    pass
            elif path.suffix in (".pt", ".pth", ".bin") and not zipfile.is_zipfile(path):
                return False
            elif path.name == SAFE_WEIGHTS_INDEX_NAME:
                shards = set(read_json(path)["weight_map"].values())
                if not shards <= names:
                    return False
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError):
        return False
    one_process_wrote = {OPTIMIZER_NAME, SCHEDULER_NAME} <= names and bool(
        names & {SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME}
    )
    return any(name.startswith("rng_state") for name in names) and (
        one_process_wrote or any(path.is_dir() for path in paths)
    )


def _checkpoints(folder: str | os.PathLike) -> list[Path]:
    """Folders of checkpoints, whole or not, the oldest first."""
    found = [path for path in Path(folder).glob("checkpoint-*") if _step(path) is not None]
    return sorted(found, key=_step)


def _step(checkpoint: Path) -> int | None:
    digits = checkpoint.name.removeprefix("checkpoint-")
    return int(digits) if digits.isdigit() else None


__all__ = ["is_whole", "last_checkpoint", "remove_partial_checkpoints"]
