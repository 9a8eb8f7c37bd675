"""Upload a prepared dataset to the Hub."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ..files_otdrg import read_json
from .shards import SUMMARY

if TYPE_CHECKING:
    from huggingface_hub import HfApi

#: Uploaded files. `skipped.jsonl` and `summary.json` contain paths of this machine.
_UPLOADED = ["README.md", "data/*.parquet"]

#: Files of an earlier upload that are deleted: `load_dataset` would read its shards as well.
_REPLACED = ["data/*.parquet"]

#: Words of licences that forbid publishing a changed collection (no derivatives, PhysioNet's, use agreements that each
#: user signs).
_NOT_PUBLIC = {"nd", "noderivatives", "noderivs", "physionet", "credentialed", "agreement"}


def push_studies(folder: str | os.PathLike, repo_id: str, public: bool = False) -> str:
    """Upload the card and the Parquet files of a prepared dataset, so that `load_dataset(repo_id)` reads them.

    The repository is created if needed, existing shards are replaced. Returns the URL of the dataset.

    Raises:
        ValueError: the folder is not a prepared dataset, its licence forbids publishing, `repo_id` is invalid, or the
            existing repository is public and should be private or the reverse.
        OSError: the Hub refuses, or cannot be reached.
    """
    from huggingface_hub import HfApi

    folder = Path(folder)
    licences = _licences(folder)
    if public:
        _check_public(folder, licences)
    hub = HfApi()
    with hub_errors(f"{repo_id} was not pushed to {hub.endpoint}"):
        repo_id, is_private = make_repo(hub, repo_id, "dataset", private=not public)
        if is_private is public:
            raise ValueError(
                f"{repo_id} is {'private' if public else 'public'}: "
                f"{'remove' if public else 'add'} --public, or push to another name"
            )
        hub.upload_folder(
            repo_id=repo_id,
            repo_type="dataset",
            folder_path=folder,
            allow_patterns=_UPLOADED,
            delete_patterns=_REPLACED,
        )
    return f"{hub.endpoint}/datasets/{repo_id}"


@contextmanager
def hub_errors(what: str, remedy: str | None = None) -> Iterator[None]:
    """Convert errors of the Hub's client to an `OSError` of one line: `WHAT: REASON; REMEDY`."""
    from huggingface_hub.errors import HTTPError

    try:
        yield
    except (OSError, HTTPError, RuntimeError) as error:
        # The reason for a refused file is in the cause of the client's RuntimeError.
        reason = f"{error} {error.__cause__}" if isinstance(error, RuntimeError) and error.__cause__ else error
        raise OSError(f"{what}: {reason}{f'; {remedy}' if remedy else ''}") from error


def make_repo(hub: HfApi, repo_id: str, repo_type: str, private: bool | None, **more) -> tuple[str, bool]:
    """Create a repository if it does not exist; an existing one is not changed.

    `private=None` uses the owner's default; `more` are arguments of `create_repo`.

    Returns:
        The id with its owner, which `repo_id` may omit, and whether the repository is private.
    """
    repo_id = hub.create_repo(repo_id, repo_type=repo_type, private=private, exist_ok=True, **more).repo_id
    return repo_id, hub.repo_info(repo_id, repo_type=repo_type).private


def _check_public(folder: Path, licences: list[str]) -> None:
    for licence in licences:
        if not licence.strip():
            raise ValueError(f"{folder} holds studies whose licence is not stated: remove --public")
        if _NOT_PUBLIC & set(re.findall("[a-z]+", licence.lower())):
            raise ValueError(f"{folder} holds studies under {licence}, which forbids publishing: remove --public")


def _licences(folder: Path) -> list[str]:
    try:
        return read_json(folder / SUMMARY, parse=lambda summary: [str(licence) for licence in summary["licences"]])
    except (FileNotFoundError, NotADirectoryError, ValueError) as error:
        raise ValueError(
            f"{folder} is not a prepared dataset ({error}): expected a folder written by otdrg prepare"
        ) from None
