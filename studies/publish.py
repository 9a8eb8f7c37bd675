"""A built dataset on the Hub."""

from __future__ import annotations

import json
import os
from pathlib import Path

from .build import SUMMARY
from .r2gen import IU_XRAY_LICENCE, MIMIC_LICENCE

#: What of a dataset's folder is uploaded. `skipped.jsonl` and `summary.json` name files of the machine it was built on.
_UPLOADED = ["README.md", "data/*.parquet"]

#: Licences that do not allow a changed collection to be given to others.
_NOT_PUBLIC = (IU_XRAY_LICENCE, MIMIC_LICENCE)


def push_studies(folder: str | os.PathLike, repo_id: str, public: bool = False) -> str:
    """Upload a built dataset: its card and Parquet files, as the Hub's `load_dataset` reads them.

    Args:
        folder: the dataset.
        repo_id: "org/name"; it is made where it is not there.
        public: whether anyone may see it.

    Returns:
        The dataset's address.

    Raises:
        ValueError: the folder is not a built dataset, or it is to be public against its licence.
        OSError: the Hub refuses, or cannot be reached; the client's own error.
    """
    from huggingface_hub import HfApi

    folder = Path(folder)
    try:
        licences = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))["licences"]
    except FileNotFoundError:
        raise ValueError(f"{folder} is not a built dataset: expected a folder written by otdrg prepare") from None
    forbidding = [licence for licence in licences if licence in _NOT_PUBLIC]
    if public and forbidding:
        raise ValueError(f"{folder} holds studies under {forbidding[0]}, which forbids publishing: leave out --public")
    hub = HfApi()
    hub.create_repo(repo_id, repo_type="dataset", private=not public, exist_ok=True)
    hub.upload_folder(repo_id=repo_id, repo_type="dataset", folder_path=folder, allow_patterns=_UPLOADED)
    return f"{hub.endpoint}/datasets/{repo_id}"


__all__ = ["push_studies"]
