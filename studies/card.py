"""The card of a prepared dataset, from which `load_dataset` and the Hub read its splits and licence."""

from __future__ import annotations

from huggingface_hub import DatasetCardData

from . import SOURCES, source_class
from .source import SPLITS, StudySource
from .summary import SplitCounts, format_counts

#: The Hub's names of licences.
HUB_LICENCES = {"CC BY-NC-ND 4.0": "cc-by-nc-nd-4.0", "Apache-2.0": "apache-2.0"}


def collection_name(source: str, licence: str) -> str:
    """The collection of studies with these values in `source` and `licence`: a published one or a description."""
    return source_class(source).collection_of(licence) if source in SOURCES else f"studies of source {source}"


def dataset_card(source: StudySource, counts: dict[str | None, SplitCounts], sections: str, licences: list[str]) -> str:
    """The Markdown card of a dataset; `sections` is what the reports consist of."""
    splits = [split for split in SPLITS if split in counts and counts[split].studies]
    known = [HUB_LICENCES.get(licence, "other") for licence in licences]
    files = [{"split": split, "path": f"data/{split}-*.parquet"} for split in splits]
    metadata = DatasetCardData(
        license=known[0] if len(known) == 1 else "other",
        task_categories=["image-to-text"],
        tags=["radiology", "chest-radiograph", "medical"],
        configs=[{"config_name": "default", "data_files": files}],
    )
    form = f"{sections}, each below its heading" if "+" in sections else sections
    priors = sum(counts[split].priors for split in splits)
    with_priors = f"\n{priors:,} of them have a prior study of the patient, in the columns `prior_*`." if priors else ""
    stated = ", ".join(licence or "not stated" for licence in licences)
    return f"""---
{metadata.to_yaml()}
---

# Chest radiograph studies: {source.name}

Studies with views, report sections and the states of 14 findings, built by `otdrg prepare {source.name}`. `report`
consists of: {form}. Licence of the studies: {stated}.{with_priors}

{format_counts({split: counts[split] for split in splits})}
"""
