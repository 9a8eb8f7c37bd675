"""The card of a built dataset: what `load_dataset` and the Hub read, and what people do."""

from __future__ import annotations

import yaml

from .source import SPLITS, StudySource
from .summary import SplitCounts, format_counts

#: The Hub's names of licences.
_HUB_LICENCES = {"CC BY-NC-ND 4.0": "cc-by-nc-nd-4.0", "Apache-2.0": "apache-2.0"}


def dataset_card(source: StudySource, counts: dict[str | None, SplitCounts], sections: str, licences: list[str]) -> str:
    """A Markdown card with the metadata that tells `load_dataset` which files are which split.

    Args:
        source: of the studies.
        counts: by split.
        sections: what the reports are made of.
        licences: of the studies kept.
    """
    splits = [split for split in SPLITS if split in counts and counts[split].studies]
    known = [_HUB_LICENCES.get(licence, "other") for licence in licences]
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


__all__ = ["dataset_card"]
