"""Source `dicom`: folders of DICOM files with their reports as text files."""

from __future__ import annotations

import os
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any, NamedTuple

from .chest import NOT_CHEST, chest_fault, header_value
from .report_sections import parse_sections, text_without_trailer
from .source import (
    TEXTS,
    VIEWS,
    ListedSource,
    Skipped,
    SkipStudy,
    Study,
    StudyEntry,
    needed_folder,
    option,
    seeded_split,
)
from .views import view_named

#: Elements of a header that are read. The first three are only used to group the files.
_TAGS = [
    "StudyInstanceUID",
    "PatientID",
    "InstanceNumber",
    "SOPClassUID",
    "BurnedInAnnotation",
    "Modality",
    "BodyPartExamined",
    "ViewPosition",
    "ViewCodeSequence",
    "SeriesDescription",
]

_DIRECTORY = "1.2.840.10008.1.3.10"  # a DICOMDIR
#: Objects without an image: presentation states, raw data, structured reports, PDF and similar ones.
_NO_IMAGES = tuple(f"1.2.840.10008.5.1.4.1.1.{branch}" for branch in ("11.", "66", "88.", "104."))


@dataclass
class DICOMSource(ListedSource):
    """Studies from DICOM files in a folder, at any depth; a file is recognised by its suffix (.dcm, .dicom) or content.

    Files with the same StudyInstanceUID are a study, frontal views first. Its report is the first that exists of: the
    text file with the name of one of its files (`a.dcm`, `a.txt`); the only text file in its folder; the text file with
    the name of its folder beside it (`s1/`, `s1.txt`); a `report.txt` in a folder above. All but the first require that
    the folder holds no other study. A text with headers is split into sections; one without is the findings.

    Only the view is copied from a header. Patients are `patient-1`, `patient-2`, ... in the order of the files (if
    PatientID is blank, each study is a patient). **A study's id is the path of its folder or of its first file: rename
    files and folders whose names identify patients.** A study is skipped if BurnedInAnnotation is YES, because its
    pixels may identify the patient, and if Modality or BodyPartExamined is not that of a chest radiograph. Reports are
    not changed.
    """

    name = "dicom"
    example = "--folder archive --output studies"
    collection = "folders of DICOM files with reports"

    folder: str = option("Folder of the DICOM files.", metavar="FOLDER")
    reports: str | None = option(
        "Folder of the reports, with the same structure. Default: the reports are beside the files.",
        None,
        metavar="FOLDER",
    )
    split_shares: list[float] = option(
        "Shares of the patients in train, validation and test.", [0.8, 0.1, 0.1], metavar="SHARE"
    )
    seed: int = option("Seed of the split.", 0)
    licence: str = option("Licence of the studies.", "", metavar="NAME")
    encoding: str = option("Encoding of the reports.", "utf-8", metavar="NAME")
    burned_in: bool = option("Keep images with text burned into the pixels, which may identify the patient.", False)

    def __post_init__(self):
        self.folder = str(needed_folder(self.folder, "folder", "the folder of DICOM files"))
        reports = self.folder if self.reports is None else self.reports
        self.reports = str(needed_folder(reports, "reports", "the folder of reports"))
        seeded_split((), self.seed, self.split_shares)
        try:
            "".encode(self.encoding)
        except LookupError:
            raise ValueError(f"option 'encoding' is {self.encoding!r}: expected a text encoding, as utf-8") from None
        if find_spec("pydicom") is None:
            raise ImportError("the source 'dicom' needs pydicom: pip install 'otdrg[dicom]'")

    def read(self, entry: StudyEntry) -> Study:
        reports, files = entry.location
        texts = {self._text(report) for report in reports}
        if len(texts) > 1:
            reason = f"{' and '.join(reports)} differ: expected one report a study in {self.reports}"
            raise SkipStudy("malformed", reason)
        text = texts.pop()
        sections = parse_sections(text)
        if not any(getattr(sections, name) for name in TEXTS):
            # One or two words are a title in a text with headers, but a report ("Normal.") in a text without.
            text = text_without_trailer(text)
            sections = sections._replace(findings="" if ":" in text else text)
        return Study(
            images=[os.path.join(self.folder, name) for name, _ in files],
            views=[view for _, view in files],
            **{name: getattr(sections, name) for name in TEXTS},
            licence=self.licence,
        )

    def _text(self, report: str) -> str:
        path = os.path.join(self.reports, report)
        try:
            with open(path, encoding="utf-8-sig" if self.encoding == "utf-8" else self.encoding) as file:
                return file.read().strip()
        except UnicodeDecodeError as error:
            reason = (
                f"{path} is not {self.encoding} text (byte {error.start}): set option 'encoding' to that of the reports"
            )
            raise SkipStudy("malformed", reason) from None
        except OSError as error:
            raise SkipStudy("empty report", f"{path} cannot be read ({error.strerror})") from None

    def _list(self) -> list[StudyEntry | Skipped]:
        studies, skipped = self._studies()
        if not studies and not skipped:
            raise ValueError(f"{self.folder} holds no DICOM file: option 'folder' names a folder of .dcm files")
        texts = _texts(self.reports)
        # Number of studies in each folder and below. The name and the report of a folder belong to its only study.
        # Unreadable files count, because the report may be theirs.
        groups = [[one.name for one in study.files] for study in studies] + [[one.id] for one in skipped]
        held = Counter(folder for names in groups for folder in {up for name in names for up in _above(name)})
        dealt = seeded_split((study.patient_id for study in studies), self.seed, self.split_shares)
        listing: list[StudyEntry | Skipped] = list(skipped)
        for study in studies:
            files = [one.name for one in study.files]
            common = os.path.dirname(files[0]) if len(files) == 1 else os.path.commonpath(files)
            alone = [folder for folder in (common, *_above(common)) if held[folder] == 1]
            study_id = common if alone and common else os.path.splitext(files[0])[0]
            study_id, split = study_id.replace(os.sep, "/"), dealt[study.patient_id]
            fault = study.fault(self.burned_in)
            found = _reports(files, alone, texts)
            if not fault and not found:
                places = [f"{os.path.splitext(files[0])[0]}.txt", *(os.path.join(up, "report.txt") for up in alone[:1])]
                fault = "empty report", f"no report in {self.reports}: expected {' or '.join(places)}"
            if fault:
                listing.append(Skipped(study_id, split, *fault))
            else:
                views = sorted(study.images, key=lambda one: (VIEWS.index(one.view), one.number, one.name))
                location = tuple(found), tuple((one.name, one.view) for one in views)
                listing.append(StudyEntry(study_id, study.patient_id, split, location))
        return listing

    def _studies(self) -> tuple[list[_DICOMStudy], list[Skipped]]:
        """The studies in the order of their first files, and the files that cannot be used."""
        studies: dict[Any, _DICOMStudy] = {}
        patients: dict[Any, str] = {}
        skipped = []
        for name in _files(self.folder):
            path = os.path.join(self.folder, name)
            try:
                header = _header(path)
            except OSError as error:
                skipped.append(_no_study(name, "unreadable image", f"{path} cannot be read ({error.strerror})"))
                continue
            if header is None and name.lower().endswith((".dcm", ".dicom")):
                skipped.append(
                    _no_study(name, "malformed", f"{path} is not a DICOM file: expected one, because of its suffix")
                )
            if header is None or header.get("SOPClassUID") == _DIRECTORY:
                continue
            # A file without a UID is a study, and a study without a PatientID is a patient.
            uid = str(header.get("StudyInstanceUID") or "").strip() or (name,)
            if uid not in studies:
                patient = str(header.get("PatientID") or "").strip() or (uid,)
                studies[uid] = _DICOMStudy(patients.setdefault(patient, f"patient-{len(patients) + 1}"))
            studies[uid].files.append(_file(name, header))
        return list(studies.values()), skipped


class _File(NamedTuple):
    """A DICOM file of a study: its path in the folder, and values from its header."""

    name: str
    view: str
    number: int
    has_image: bool
    burned_in: bool
    other: str | None


@dataclass
class _DICOMStudy:
    patient_id: str
    files: list[_File] = field(default_factory=list)

    @property
    def images(self) -> list[_File]:
        return [one for one in self.files if one.has_image]

    def fault(self, burned_in: bool) -> tuple[str, str] | None:
        if not self.images:
            return "unreadable image", f"{self.files[0].name}: no file of the study has pixels"
        others = [one for one in self.images if one.other]
        if len(others) == len(self.images):
            return NOT_CHEST, f"{others[0].name}: {others[0].other}; the same holds for all images of the study"
        named = next((one.name for one in self.images if one.burned_in), None)
        if named and not burned_in:
            return (
                "malformed",
                f"{named}: BurnedInAnnotation is YES, the pixels may identify the patient (option 'burned_in')",
            )
        return None


def _no_study(name: str, kind: str, reason: str) -> Skipped:
    return Skipped(os.path.splitext(name)[0].replace(os.sep, "/"), None, kind, reason)


def _files(folder: str) -> Iterator[str]:
    """Relative paths of the files below a folder, sorted, without hidden ones."""
    for root, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if not name.startswith("."):
                yield os.path.relpath(os.path.join(root, name), folder)


def _header(path: str) -> Any | None:
    """The elements `_TAGS` of a DICOM file; None if it is not a DICOM file."""
    import pydicom

    named = path.lower().endswith((".dcm", ".dicom"))
    with open(path, "rb") as file:
        if not named and file.read(132)[128:] != b"DICM":
            return None
        file.seek(0)
        try:
            # Warnings quote the values of elements. `force`, because old archives omit the preamble.
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                header = pydicom.dcmread(file, stop_before_pixels=True, specific_tags=_TAGS, force=True)
                known = {tag: header_value(header, tag) for tag in _TAGS if tag in header}
        except OSError:
            raise
        except Exception:  # pydicom raises any exception for a damaged file
            return None
    is_dicom = str(known.get("SOPClassUID", header.file_meta.get("MediaStorageSOPClassUID", ""))).startswith("1.2.840.")
    return known if is_dicom else None


def _file(name: str, header: dict[str, Any]) -> _File:
    has_image = not str(header.get("SOPClassUID", "")).startswith(_NO_IMAGES)
    number = str(header.get("InstanceNumber") or "")
    burned_in = str(header.get("BurnedInAnnotation") or "").strip().upper() == "YES"
    place = int(number) if number.isdecimal() else 0
    return _File(name, _view(header), place, has_image, burned_in, chest_fault(header))


def _view(header: dict[str, Any]) -> str:
    """The view from ViewPosition, ViewCodeSequence or SeriesDescription."""
    position = str(header.get("ViewPosition") or "").strip()
    if position:
        return view_named(position)
    codes = " ".join(str(code.get("CodeMeaning", "")) for code in header.get("ViewCodeSequence") or ())
    coded = view_named(codes)
    return coded if coded != "unknown" else view_named(str(header.get("SeriesDescription") or ""))


def _above(name: str) -> list[str]:
    """The folders above a file or folder, the nearest first; the last one is ""."""
    folders = []
    while name:
        name = os.path.dirname(name)
        folders.append(name)
    return folders


def _texts(folder: str) -> dict[str, dict[str, str]]:
    """Text files below a folder: `{folder: {name without suffix: path}}`."""
    texts: dict[str, dict[str, str]] = defaultdict(dict)
    for name in _files(folder):
        stem, suffix = os.path.splitext(name)
        if suffix.lower() == ".txt":
            texts[os.path.dirname(name)][os.path.basename(stem)] = name
    return dict(texts)


def _reports(files: Iterable[str], alone: list[str], texts: dict[str, dict[str, str]]) -> list[str]:
    """The reports of a study; `alone` are the folders around its files that hold no other study, innermost first."""
    stems = (os.path.splitext(name)[0] for name in files)
    named = [texts.get(os.path.dirname(stem), {}).get(os.path.basename(stem)) for stem in stems]
    if any(named):
        return [name for name in dict.fromkeys(named) if name]
    for folder in alone:
        inside = texts.get(folder, {})
        beside = texts.get(os.path.dirname(folder), {}).get(os.path.basename(folder)) if folder else None
        # In the folders above, another text may belong to a study whose images are missing.
        candidates = list(inside.values()) if folder == alone[0] else [inside["report"]] if "report" in inside else []
        if candidates or beside:
            return candidates or [beside]
    return []
