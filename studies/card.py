"""The card of a built dataset: what `load_dataset` and the Hub read, and what people do."""

from __future__ import annotations

import yaml

from .r2gen import IU_XRAY_LICENCE, MIMIC_LICENCE
from .source import SPLITS, StudySource
from .summary import SplitCounts, format_counts

#: The Hub's names of licences.
HUB_LICENCES = {"CC BY-NC-ND 4.0": "cc-by-nc-nd-4.0", "Apache-2.0": "apache-2.0"}

#: Published collections by the source that reads them.
_COLLECTIONS = {"phantom": "phantom radiographs", "open-i": "IU X-Ray", "mimic-cxr": "MIMIC-CXR"}
#: Those in R2Gen's layout, by the licence that the source gives their studies.
_R2GEN_COLLECTIONS = {IU_XRAY_LICENCE: "IU X-Ray", MIMIC_LICENCE: "MIMIC-CXR"}
#: What is no published collection, in words.
_OTHERS = {
    "r2gen": "a collection in R2Gen's layout",
    "csv": "a table of images and reports",
    "dicom": "folders of DICOM files with reports",
    "hub": "a dataset in the form of the Hub's",
}


def collection_name(source: str, licence: str) -> str:
    """The published collection that studies are of, or in words what they are, by what their rows say.

    Args:
        source, licence: columns of the studies.
    """
    known = _R2GEN_COLLECTIONS.get(licence) if source == "r2gen" else _COLLECTIONS.get(source)
    return known or _OTHERS.get(source, f"studies of source {source}")


def dataset_card(source: StudySource, counts: dict[str | None, SplitCounts], sections: str, licences: list[str]) -> str:
    """A Markdown card with the metadata that tells `load_dataset` which files are which split.

    Args:
        source: of the studies.
        counts: by split.
        sections: what the reports are made of.
        licences: of the studies kept.
    """
    splits = [split for split in SPLITS if split in counts and counts[split].studies]
    known = [HUB_LICENCES.get(licence, "other") for licence in licences]
    metadata = {
        "license": known[0] if len(known) == 1 else "other",
        "task_categories": ["image-to-text"],
        "tags": ["radiology", "chest-radiograph", "medical"],
        "configs": [
            {
                "config_name": "default",
                "data_files": [{"split": split, "path": f"data/{split}-*.parquet"} for split in splits],
            }
        ],
    }
    return f"""---
{yaml.safe_dump(metadata, sort_keys=False).strip()}
---

# Chest radiograph studies: {source.name}

Studies with views, report sections and the states of 14 findings, built by `otdrg prepare {source.name}`. `report` is
made of: {sections}. Licence of the studies: {", ".join(licence or "not stated" for licence in licences)}.

{format_counts({split: counts[split] for split in splits})}
"""


__all__ = ["HUB_LICENCES", "collection_name", "dataset_card"]
