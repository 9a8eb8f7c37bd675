"""A built dataset on the Hub."""

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

#: What of a dataset's folder is uploaded. `skipped.jsonl` and `summary.json` name files of the machine it was built on.
_UPLOADED = ["README.md", "data/*.parquet"]

#: What of the dataset that is there is deleted unless it is uploaded anew: shards that stay are read, too.
_REPLACED = ["data/*.parquet"]

#: Words of licences that do not allow a changed collection to be given to others (no derivatives, PhysioNet's).
_NOT_PUBLIC = {"nd", "noderivatives", "noderivs", "physionet", "credentialed"}


def push_studies(folder: str | os.PathLike, repo_id: str, public: bool = False) -> str:
    """Upload a built dataset: its card and Parquet files, as the Hub's `load_dataset` reads them.

    Args:
        folder: the dataset.
        repo_id: "org/name"; it is made where it is not there. Shards that are there are replaced.
        public: whether anyone may see it.

    Returns:
        The dataset's address.

    Raises:
        ValueError: the folder is not a built dataset, it is to be public against its licence, the name is none, or
            the dataset that is there is public and should be private or the reverse.
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
                f"{'leave out --public' if public else '--public agrees'}, or push to another name"
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
    """Errors of the Hub's client as an `OSError` of one line, `what` did not succeed and why.

    Args:
        what: begins the line.
        remedy: ends it.
    """
    from huggingface_hub.errors import HTTPError

    try:
        yield
    except (OSError, HTTPError, RuntimeError) as error:
        # Neither a broken connection nor a file that was not taken is an OSError of the client; the latter hides why.
        reason = f"{error} {error.__cause__}" if isinstance(error, RuntimeError) and error.__cause__ else error
        raise OSError(f"{what}: {reason}{f'; {remedy}' if remedy else ''}") from error


def make_repo(hub: HfApi, repo_id: str, repo_type: str, private: bool | None, **more) -> tuple[str, bool]:
    """Make a repository where it is not there; one that was there is as it was.

    Args:
        hub: the client.
        repo_id: "org/name".
        repo_type: "model", "dataset" or "space".
        private: whether only its owners may see a new one; None leaves it to what its owner has set.
        more: arguments of `create_repo`.

    Returns:
        Its id with its owner, which may have been left out, and whether it is private.
    """
    repo_id = hub.create_repo(repo_id, repo_type=repo_type, private=private, exist_ok=True, **more).repo_id
    return repo_id, hub.repo_info(repo_id, repo_type=repo_type).private


def _check_public(folder: Path, licences: list[str]) -> None:
    for licence in licences:
        if not licence.strip():
            raise ValueError(f"{folder} holds studies whose licence is not stated: leave out --public")
        if _NOT_PUBLIC & set(re.findall("[a-z]+", licence.lower())):
            raise ValueError(f"{folder} holds studies under {licence}, which forbids publishing: leave out --public")


def _licences(folder: Path) -> list[str]:
    """The licences of a built dataset's studies."""
    try:
        return read_json(folder / SUMMARY, parse=lambda summary: [str(licence) for licence in summary["licences"]])
    except (FileNotFoundError, NotADirectoryError, ValueError) as error:
        raise ValueError(
            f"{folder} is not a built dataset ({error}): expected a folder written by otdrg prepare"
        ) from None


__all__ = ["hub_errors", "make_repo", "push_studies"]
