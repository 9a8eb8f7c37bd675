"""Studies: radiographs and reports from every source, in one schema.

To add a source, write a module with a [`source.StudySource`] and add one line to `SOURCES`. The module is imported when
the source is first used.
"""

from __future__ import annotations

import os
from dataclasses import MISSING, fields
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import DatasetDict

    from .build import BuildOptions, BuildReport
    from .source import StudySource

#: `{name: (module, class, what it reads)}`. A module with a leading dot is in this package.
SOURCES: dict[str, tuple[str, str, str]] = {
    "phantom": (".phantom", "PhantomSource", "procedural chest radiographs whose findings are known exactly"),
    "r2gen": (".r2gen", "R2GenSource", "R2Gen's annotation.json and images, for IU X-Ray or MIMIC-CXR"),
    "open-i": (".open_i", "OpenISource", "the Indiana University collection as Open-i publishes it"),
    "mimic-cxr": (".mimic_cxr", "MimicCXRSource", "the reports of MIMIC-CXR and the images of MIMIC-CXR-JPG"),
    "rexgradient": (".rexgradient", "ReXGradientSource", "ReXGradient-160K, also from the parts of its archive"),
    "chexpert-plus": (".chexpert_plus", "CheXpertPlusSource", "CheXpert Plus, its table and PNG images"),
    "csv": (".csv_table", "CSVSource", "a table of images and reports"),
    "dicom": (".dicom", "DICOMSource", "folders of DICOM files with their reports as text files"),
    "hub": (".hub", "HubSource", "a dataset on the Hub or on disk, with its columns mapped"),
}

#: The source of studies written by `otdrg prepare`; its only option is `folder`.
PREPARED = "prepared"


def source_class(source: str) -> type[StudySource]:
    """The class of a registered source.

    Raises:
        ValueError: no source has this name.
    """
    if source not in SOURCES:
        raise ValueError(f"unknown source of studies {source!r}: expected one of {', '.join(sorted(SOURCES))}")
    module, name, _ = SOURCES[source]
    return getattr(import_module(module, __name__), name)


def open_source(source: str, **options: Any) -> StudySource:
    """Create a source of `SOURCES`; `options` are the fields of its class.

    Raises:
        ValueError: an unknown source, an unknown or missing option, or a value the source refuses.
    """
    cls = source_class(source)
    allowed = {option.name: option for option in fields(cls)}
    for name in options:
        if name not in allowed:
            raise ValueError(f"unknown option {name!r} of source {source!r}: expected one of {', '.join(allowed)}")
    for name, option in allowed.items():
        required = option.default is MISSING and option.default_factory is MISSING
        if required and name not in options:
            raise ValueError(f"source {source!r} needs the option {name!r} (its options: {', '.join(allowed)})")
    return cls(**options)


def load_studies(source: str, *, sections: str = "findings", priors: bool = False, **options: Any) -> DatasetDict:
    """Load the studies of a source as splits train, validation and test; empty splits are left out.

    Image files are not copied: they are read when a row is. Images that are not files are held in memory. Skipped
    studies are logged in one warning. For a collection larger than memory, use [`prepare_studies`].

    Args:
        source: a registered source, or "prepared" for a folder written by [`prepare_studies`].
        sections: what `report` consists of: "findings", "impression", or "findings+impression", both below
            headings as far as a study has them. Not for "prepared", whose reports are already written.
        priors: whether the nearest earlier study of the patient is added to each study. Not for "prepared".
        options: options of the source.

    Returns:
        A `DatasetDict` with the features `otdrg.studies.schema.STUDY_FEATURES`.

    Raises:
        ValueError: an unknown source, an unknown or missing option, a value the source refuses, or no study left.
    """
    loading = import_module(".loading", __name__)
    if source == PREPARED:
        if set(options) != {"folder"}:
            raise ValueError(f"source {PREPARED!r} has one option, 'folder', which is required: {list(options)} given")
        return loading.load_prepared(options["folder"])
    return loading.load_in_memory(open_source(source, **options), sections, priors)


def prepare_studies(
    source: str,
    output: str | os.PathLike,
    *,
    build: BuildOptions | None = None,
    resume: bool = False,
    overwrite: bool = False,
    **options: Any,
) -> BuildReport:
    """Write the studies of a source to a folder, as `otdrg prepare` does; `options` are those of the source.

    See [`build.build_studies_dataset`] for the other arguments.
    """
    build_studies_dataset = import_module(".build", __name__).build_studies_dataset
    return build_studies_dataset(open_source(source, **options), output, build, resume=resume, overwrite=overwrite)


__all__ = ["PREPARED", "SOURCES", "load_studies", "open_source", "prepare_studies", "source_class"]
