"""Studies: every source of radiographs and reports, in one schema.

A source is a module of this package with a [`source.StudySource`], and one line in the registry below; it is imported
when it is first asked for.
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

#: Source, its module and class, and what it reads.
SOURCES: dict[str, tuple[str, str, str]] = {
    "phantom": ("phantom", "PhantomSource", "procedural chest radiographs, whose findings are known exactly"),
    "r2gen": ("r2gen", "R2GenSource", "R2Gen's annotation.json and images, of IU X-Ray or MIMIC-CXR"),
    "open-i": ("open_i", "OpenISource", "the Indiana University collection as Open-i publishes it"),
    "mimic-cxr": ("mimic_cxr", "MimicCXRSource", "the tree of MIMIC-CXR's reports and MIMIC-CXR-JPG's images"),
    "csv": ("csv_table", "CSVSource", "your own table of images and reports"),
    "dicom": ("dicom", "DICOMSource", "folders of DICOM files with their reports beside them"),
    "hub": ("hub", "HubSource", "a dataset on the Hub or on disk, its columns mapped"),
}

#: The source of studies that `otdrg prepare` has written; its option is `folder`.
PREPARED = "prepared"


def source_class(source: str) -> type[StudySource]:
    """The class of a registered source.

    Raises:
        ValueError: there is none of this name.
    """
    if source not in SOURCES:
        raise ValueError(f"unknown source of studies {source!r}: expected one of {', '.join(sorted(SOURCES))}")
    module, name, _ = SOURCES[source]
    return getattr(import_module(f".{module}", __name__), name)


def open_source(source: str, **options: Any) -> StudySource:
    """A source with its options.

    Args:
        source: one of `SOURCES`.
        options: fields of the source's class.

    Raises:
        ValueError: an unknown source, an unknown or missing option, or a fault in what the options name.
    """
    cls = source_class(source)
    allowed = {option.name: option for option in fields(cls)}
    for name in options:
        if name not in allowed:
            raise ValueError(f"unknown option {name!r} of source {source!r}: expected one of {', '.join(allowed)}")
    for name, option in allowed.items():
        needed = option.default is MISSING and option.default_factory is MISSING
        if needed and name not in options:
            raise ValueError(f"source {source!r} needs the option {name!r} (its options: {', '.join(allowed)})")
    return cls(**options)


def load_studies(source: str, *, sections: str = "findings", **options: Any) -> DatasetDict:
    """The studies of a source, in splits train, validation and test (empty ones left out), images not copied.

    Image files stay where they are and are read when a row is; what is not an image file is held in memory. Studies
    that have to be left out are logged as one warning. For a collection that does not fit into memory see
    [`prepare_studies`].

    Args:
        source: a registered source, or "prepared" for a folder that [`prepare_studies`] has written.
        sections: what `report` is made of: "findings", "impression" or "findings+impression". Not for "prepared",
            whose reports are made.
        options: the source's own.

    Returns:
        A `DatasetDict` whose rows follow `otdrg.studies.schema.STUDY_FEATURES`.

    Raises:
        ValueError: an unknown source, an unknown or missing option, a fault in what the options name, or no study left.
    """
    loading = import_module(".loading", __name__)
    if source == PREPARED:
        if set(options) != {"folder"}:
            raise ValueError(f"source {PREPARED!r} has one option, 'folder', which it needs: {list(options)} given")
        return loading.load_prepared(options["folder"])
    return loading.load_in_memory(open_source(source, **options), sections)


def prepare_studies(
    source: str,
    output: str | os.PathLike,
    *,
    build: BuildOptions | None = None,
    resume: bool = False,
    overwrite: bool = False,
    **options: Any,
) -> BuildReport:
    """Build the studies of a source into a folder: what `otdrg prepare` does. See [`build.build_studies_dataset`].

    Args:
        source: one of `SOURCES`.
        output: the folder to be made.
        build: how it is built.
        resume, overwrite: what becomes of an interrupted build.
        options: the source's own.
    """
    build_studies_dataset = import_module(".build", __name__).build_studies_dataset
    return build_studies_dataset(open_source(source, **options), output, build, resume=resume, overwrite=overwrite)


__all__ = ["PREPARED", "SOURCES", "load_studies", "open_source", "prepare_studies", "source_class"]
