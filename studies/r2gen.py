"""Source `r2gen`: the `annotation.json` and image folder in which R2Gen published IU X-Ray and MIMIC-CXR."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from ..files_otdrg import read_json
from ..findings_otdrg import FINDINGS, finding_state_id
from ..runtime.interruptions import fault_of_study
from .chexpert_states import without_denied_no_finding
from .iu_xray_split import IU_XRAY_COUNTS, r2gen_split_ids
from .placeholders import shown_value
from .source import SPLITS, ListedSource, Skipped, Study, StudyEntry, needed_file, needed_folder, option, path_inside

_SPLITS = {"train": "train", "val": "validation", "test": "test"}
#: Findings of PromptMRG's own that follow CheXbert's 14 in its labels of MIMIC-CXR.
_MORE_LABELS = 4
_IU_XRAY_ID = re.compile(r"CXR\d+(?=_)")

#: R2Gen's annotation of MIMIC-CXR has an entry for each image.
MIMIC_COUNTS: dict[str, int] = {"train": 270_790, "validation": 2_130, "test": 3_858}
MIMIC_LICENCE = "PhysioNet Credentialed Health Data License 1.5.0"
IU_XRAY_LICENCE = "CC BY-NC-ND 4.0"


@dataclass
class R2GenSource(ListedSource):
    """Studies of an R2Gen annotation, `{"train": [{"id", "report", "image_path": [...]}, ...], "val", "test"}`.

    R2Gen's reports are the FINDINGS section. Views are "unknown", because the annotation does not have them.
    Indications and tags come from a file of their own.

    Other works publish annotations in this form with more fields, which are ignored. PromptMRG's have `labels`: the
    states of CheXbert's 14 findings (in MIMIC-CXR's file followed by 4 of its own), 0 unmentioned, 1 positive, 2
    negative, 3 uncertain, in the order of `FINDINGS`. Its file of IU X-Ray is a list without splits.
    """

    name = "r2gen"
    example = "--annotation annotation.json --images images --output iu_xray"
    collection = "a collection in R2Gen's layout"

    annotation: str = option("R2Gen's JSON file.", metavar="FILE")
    images: str = option("Folder to which each image_path is relative.", metavar="FOLDER")

    details: str | None = option(
        "JSON Lines with `id`, `indication` and a list of tags, for the studies that it names.", None, metavar="FILE"
    )
    tags: str | None = option("Field of these lines with the tags, such as mesh_major.", None, metavar="FIELD")
    labels: str | None = option(
        "Field of the annotation with the finding states, as PromptMRG's labels: 0 unmentioned, 1 positive, "
        "2 negative, 3 unclear.",
        None,
        metavar="FIELD",
    )
    split: Literal["train", "validation", "test"] = option(
        "Split of an annotation that is a list of studies, without splits.", "test"
    )

    def __post_init__(self):
        if self.details is not None:
            self.details = str(needed_file(self.details, "details", "JSON Lines with ids and indications"))
        if self.tags is not None and self.details is None:
            raise ValueError(f"option 'tags' is {self.tags!r}: expected option 'details' beside it")
        if self.split not in SPLITS:
            raise ValueError(f"option 'split' is {self.split!r}: expected one of {', '.join(SPLITS)}")
        self.annotation = str(needed_file(self.annotation, "annotation", "R2Gen's JSON file"))
        self.images = str(needed_folder(self.images, "images", "the folder of R2Gen's images"))
        self._collection: str | None = None

    def report_sections(self) -> tuple[str, ...]:
        return ("findings",)

    def read(self, entry: StudyEntry) -> Study:
        report, images, licence, states, details = entry.location
        views = ["unknown"] * len(images)
        return Study(images, views, findings=report, finding_states=states, licence=licence, **details)

    @property
    def official_counts(self) -> dict[str, int] | None:
        return {"iu_xray": IU_XRAY_COUNTS, "mimic_cxr": MIMIC_COUNTS}.get(self._which())

    @property
    def official_unit(self) -> str:
        return "images" if self._which() == "mimic_cxr" else "studies"

    def official_ids(self, split: str) -> Iterable[str] | None:
        return r2gen_split_ids().get(split) if self._which() == "iu_xray" else None

    @classmethod
    def collection_of(cls, licence: str) -> str:
        return {IU_XRAY_LICENCE: "IU X-Ray", MIMIC_LICENCE: "MIMIC-CXR"}.get(licence, cls.collection)

    def _which(self) -> str:
        """The annotated collection, recognised by its first study: "iu_xray", "mimic_cxr" or ""."""
        if self._collection is None:
            self.entries()
        return self._collection or ""

    def _list(self) -> list[StudyEntry | Skipped]:
        annotated, has_splits = _read_annotation(self.annotation, self.split)
        first = next((study for studies in annotated.values() for study in studies), {})
        first = first if isinstance(first, dict) else {}
        is_iu_xray = _IU_XRAY_ID.match(str(first.get("id", "")))
        # The published counts are those of R2Gen's splits.
        kind = "mimic_cxr" if "subject_id" in first else "iu_xray" if is_iu_xray else ""
        self._collection = kind if has_splits else ""
        listed = [
            _entry(study, _SPLITS[name], self.images, self.labels, f"{self.annotation}, {name}[{position}]")
            for name, studies in annotated.items()
            for position, study in enumerate(studies)
        ]
        details = {} if self.details is None else _read_details(self.details, self.tags)
        if details and details.keys().isdisjoint(entry.id for entry in listed):
            raise ValueError(f"option 'details' is {self.details!r}, which names none of the studies by its field id")
        return [
            entry._replace(location=(*entry.location, details.get(entry.id, {})))
            if isinstance(entry, StudyEntry)
            else entry
            for entry in listed
        ]


def _read_annotation(path: str, split: str) -> tuple[dict[str, list], bool]:
    """The studies by R2Gen's name of their split, and whether the annotation has splits; else they are in `split`."""
    try:
        content = read_json(path, kind=object, limit=2**32)
    except ValueError as error:
        raise ValueError(f"annotation {error}") from None
    if isinstance(content, list) and content:
        name = next(name for name, ours in _SPLITS.items() if ours == split)
        return {name: content}, False
    if not isinstance(content, dict) or any(not isinstance(entries, list) for entries in content.values()):
        raise ValueError(f"annotation {path} is not in R2Gen's form: expected lists under {', '.join(_SPLITS)}")
    unknown = [name for name in content if name not in _SPLITS]
    if unknown:
        raise ValueError(f"annotation {path} has an unknown split {unknown[0]!r}: expected {', '.join(_SPLITS)}")
    return {name: content[name] for name in _SPLITS if name in content}, True


def _read_details(path: str, tags: str | None) -> dict[str, dict[str, Any]]:
    """Indication and tags by study id.

    Raises:
        ValueError: a line is not an object with an id, or has an indication or tags of another type.
    """
    details = {}
    with open(path, encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            place = f"details {path}, line {number}"
            try:
                fields = json.loads(line)
                study, indication = fields["id"], fields.get("indication") or ""
                terms = None if tags is None else fields[tags]
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                wanted = "id" if tags is None else f"id and {tags}"
                raise ValueError(f"{place} ({fault_of_study(error)}): expected an object with {wanted}") from None
            if study is None:  # a study without images has no id
                continue
            is_list = isinstance(terms, list) and all(isinstance(term, str) for term in terms)
            if not isinstance(study, str) or not isinstance(indication, str) or not (terms is None or is_list):
                raise ValueError(f"{place}: expected id and indication as strings, and tags as a list of strings")
            details[study] = {"indication": indication, "tags": terms}
    return details


def _entry(study: Any, split: str, root: str, labels: str | None, place: str) -> StudyEntry | Skipped:
    name = str(study["id"]) if isinstance(study, dict) and isinstance(study.get("id"), (str, int)) else place

    def malformed(reason: str) -> Skipped:
        return Skipped(name, split, "malformed", f"{place} {reason}")

    if not isinstance(study, dict):
        return malformed("is not a study: expected an object with id, report and image_path")
    for field, kind, wanted in (("id", (str, int), "a string"), ("report", str, "a string")):
        if not isinstance(study.get(field), kind):
            return malformed(f"has {field} {shown_value(study.get(field))}: expected {wanted}")
    paths = study.get("image_path")
    if not isinstance(paths, list) or not paths or any(not isinstance(path, str) for path in paths):
        return malformed(f"has image_path {_shown_paths(paths)}: expected a list of file names")
    images = [path_inside(root, path) for path in paths]
    if None in images:
        path = paths[images.index(None)]
        return malformed(
            f"has image_path {shown_value(path)}, which leaves the image folder: expected a path inside it"
        )
    try:
        states = None if labels is None else _states(study.get(labels))
    except ValueError as error:
        return malformed(f"has {labels} {error}")
    in_iu_xray = _IU_XRAY_ID.match(name)
    if "subject_id" in study:
        patient_id, licence = str(study["subject_id"]), MIMIC_LICENCE
    elif in_iu_xray:  # one study for each patient: the number after CXR is the patient's
        patient_id, licence = in_iu_xray.group(), IU_XRAY_LICENCE
    else:
        patient_id, licence = name, ""
    return StudyEntry(name, patient_id, split, (study["report"], images, licence, states))


def _states(values: Any) -> list[int]:
    """The states of the 14 findings in a list that begins with them.

    Raises:
        ValueError: another value.
    """
    count = len(FINDINGS)
    if not isinstance(values, list) or len(values) not in (count, count + _MORE_LABELS):
        found = f"of {len(values)} values" if isinstance(values, list) else shown_value(values)
        raise ValueError(f"{found}: expected a list of {count} or {count + _MORE_LABELS} states")
    try:
        return without_denied_no_finding([finding_state_id(value) for value in values[:count]])
    except ValueError as error:
        raise ValueError(f"with a wrong state ({error})") from None


def _shown_paths(paths: Any) -> str:
    return f"[{', '.join(map(shown_value, paths))}]" if isinstance(paths, list) else shown_value(paths)
