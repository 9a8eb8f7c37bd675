"""Source `open-i`: the Indiana University chest X-ray collection (IU X-Ray) as Open-i publishes it, XML and images."""

from __future__ import annotations

import os
import re
import tarfile
import xml.etree.ElementTree as ElementTree
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal, NamedTuple

from .iu_xray_split import IU_XRAY_COUNTS, r2gen_split, r2gen_split_ids
from .open_i_images import ImageNames, kaggle_name, read_projections
from .source import (
    TEXTS,
    ListedSource,
    Skipped,
    Study,
    StudyEntry,
    needed_file,
    needed_folder,
    option,
    seeded_split,
)

#: Images of a study in R2Gen's annotation: the first ones in its report.
R2GEN_VIEWS = 2

#: A report has about 5 kB; larger files are rejected.
_MOST_BYTES = 1_000_000
_WHAT_REPORTS = "Open-i's NLMCXR_reports.tgz or the folder of its XML files"


class _Report(NamedTuple):
    """Content of a report's XML; `images` are names without extension."""

    number: str
    images: tuple[str, ...]
    sections: tuple[str, ...]
    licence: str
    tags: tuple[str, ...]

    @property
    def study_id(self) -> str:
        """R2Gen's: the first image's name without its last part ("CXR2384_IM-0942-1001" → "CXR2384_IM-0942")."""
        return self.images[0].rpartition("-")[0] if self.images else self.number


@dataclass
class OpenISource(ListedSource):
    """The Indiana University collection: its XML reports, and its images under any of their common names.

    A study's tags are its MeSH terms, such as "Pulmonary Atelectasis/right".

    The images are Open-i's PNG files (`CXR1_1_IM-0001-3001.png`), Kaggle's (`1_IM-0001-3001.dcm.png`), or R2Gen's
    folders (`CXR1_1_IM-0001/0.png`, where 0 is the position of the image in the report's list). The reports do not say
    which view is frontal; Kaggle's `indiana_projections.csv` does.

    With R2Gen's split, the ids of train, validation and the 1,000 studies that R2Gen left out are known, and all other
    studies are the test split.
    """

    name = "open-i"
    example = "--reports NLMCXR_reports.tgz --images NLMCXR_png --output iu_xray"
    collection = "IU X-Ray"

    reports: str = option("NLMCXR_reports.tgz, or the folder it unpacks to.", metavar="FILE")
    images: str = option("Folder of the images.", metavar="FOLDER")
    projections: str | None = option(
        "Kaggle's indiana_projections.csv, which has the view of each image.", None, metavar="FILE"
    )
    split: Literal["r2gen", "seeded"] = option("R2Gen's split, or a random split of all studies.", "r2gen")
    seed: int = option("Seed of the random split.", 0)
    split_shares: list[float] = option(
        "Shares of the patients in train, validation and test in the random split.", [0.8, 0.1, 0.1], metavar="SHARE"
    )
    views_per_study: int | None = option(
        "Most images of a study, from its first. Default: 2 with R2Gen's split, all with the random one.",
        None,
        metavar="N",
    )

    def __post_init__(self):
        if os.path.isdir(self.reports):
            self.reports = os.path.abspath(self.reports)
        else:
            self.reports = os.path.abspath(needed_file(self.reports, "reports", _WHAT_REPORTS))
        self.images = str(needed_folder(self.images, "images", "the folder of the collection's images"))
        if self.split not in ("r2gen", "seeded"):
            raise ValueError(f"option 'split' is {self.split!r}: expected r2gen or seeded")
        if self.views_per_study is not None and (not isinstance(self.views_per_study, int) or self.views_per_study < 1):
            raise ValueError(
                f"option 'views_per_study' is {self.views_per_study!r}: expected a whole number of 1 or more"
            )
        if self.split == "seeded":
            seeded_split([], self.seed, self.split_shares)  # checks the shares before anything is read
        if self.projections is not None:
            what = "Kaggle's indiana_projections.csv"
            self.projections = os.path.abspath(needed_file(self.projections, "projections", what))

    @property
    def official_counts(self) -> dict[str, int] | None:
        return dict(IU_XRAY_COUNTS) if self.split == "r2gen" else None

    def official_ids(self, split: str) -> Iterable[str] | None:
        return r2gen_split_ids().get(split) if self.split == "r2gen" else None

    def read(self, entry: StudyEntry) -> Study:
        images, views, sections, licence, tags = entry.location
        texts = dict(zip(TEXTS, sections, strict=True))
        images = [os.path.join(self.images, image) for image in images]
        return Study(images=images, views=views, licence=licence, tags=tags, **texts)

    def _list(self) -> list[StudyEntry | Skipped]:
        reports = sorted(_read_reports(self.reports), key=_order)
        if not reports:
            raise ValueError(f"{self.reports} holds no XML file: option 'reports' names {_WHAT_REPORTS}")
        layout = ImageNames(self.images)
        projections = {} if self.projections is None else read_projections(self.projections)
        if self.split == "r2gen":
            split_of = r2gen_split
        else:
            split_of = seeded_split(
                [report.number for report in reports if isinstance(report, _Report) and report.images],
                self.seed,
                self.split_shares,
            ).get
        most = self.views_per_study or (R2GEN_VIEWS if self.split == "r2gen" else None)
        listed: list[StudyEntry | Skipped] = []
        for report in reports:
            if isinstance(report, Skipped):
                listed.append(report._replace(split=split_of(report.id)))
                continue
            split = split_of(report.number)
            if split is None and self.split == "r2gen":
                reason = f"{report.number} is not in R2Gen's split of the collection"
                listed.append(Skipped(report.study_id, None, "outside the split", reason))
            elif not report.images:
                listed.append(Skipped(report.study_id, split, "missing image", f"{report.number} lists no image"))
            else:
                names = report.images[:most]
                images = tuple(layout.find(report.study_id, name, place) for place, name in enumerate(names))
                views = tuple(projections.get(kaggle_name(name), "unknown") for name in names)
                location = (images, views, report.sections, report.licence, report.tags)
                listed.append(StudyEntry(report.study_id, report.number, split, location))
        if not layout.found and any(isinstance(item, StudyEntry) for item in listed):
            raise ValueError(
                f"{self.images} holds no image of the collection: expected CXR1_1_IM-0001-3001.png, "
                "1_IM-0001-3001.dcm.png or CXR1_1_IM-0001/0.png (option 'images')"
            )
        names = (name for report in reports if isinstance(report, _Report) for name in report.images)
        if projections and not any(kaggle_name(name) in projections for name in names):
            raise ValueError(
                f"{self.projections} names no image of the collection: expected names as 1_IM-0001-3001.dcm.png"
            )
        return listed


def _order(report: _Report | Skipped) -> tuple[int, str]:
    """Sort key by number, so that an archive and the unpacked folder give the same listing."""
    name = report.id if isinstance(report, Skipped) else report.number
    number = re.fullmatch(r"CXR(\d+)", name)
    return (int(number[1]) if number else 0, name)


def _read_reports(path: str) -> Iterator[_Report | Skipped]:
    if os.path.isdir(path):
        folder = Path(path)
        files = list(folder.glob("*.xml")) or list(folder.glob("ecgen-radiology/*.xml"))
        for file in files:
            if _is_report(file.name):
                large = file.stat().st_size > _MOST_BYTES
                yield _parse(None if large else file.read_bytes(), str(file))
        return
    try:
        # One pass without unpacking to disk, so that names and links of members cannot point elsewhere.
        with tarfile.open(path, "r|*") as archive:
            for member in archive:
                if member.isreg() and _is_report(PurePosixPath(member.name).name):
                    data = None if member.size > _MOST_BYTES else archive.extractfile(member).read()
                    yield _parse(data, f"{path}, {member.name}")
    except (tarfile.TarError, zlib.error, EOFError, OSError) as error:
        raise ValueError(
            f"{path} is not a whole tar archive ({error}): option 'reports' names {_WHAT_REPORTS}"
        ) from None


def _is_report(name: str) -> bool:
    # Archives made on macOS contain "._1.xml" beside "1.xml".
    return name.endswith(".xml") and not name.startswith(".")


class _Tree(ElementTree.TreeBuilder):
    def doctype(self, name: str, pubid: str | None, system: str | None) -> None:
        # A DOCTYPE can declare entities of unbounded size; the reports of the collection have none.
        raise ValueError("it has a DOCTYPE, which no report of the collection has")


def _parse(data: bytes | None, place: str) -> _Report | Skipped:
    stem = re.split(r"[/\\]", place)[-1].removesuffix(".xml")
    name = f"CXR{stem}" if stem.isdecimal() else stem

    def malformed(reason: str) -> Skipped:
        return Skipped(name, None, "malformed", f"{place}: {reason}")

    if data is None:
        return malformed(f"more than {_MOST_BYTES:,} bytes, expected a report of about 5,000")
    try:
        root = ElementTree.fromstring(data, ElementTree.XMLParser(target=_Tree()))
    except ElementTree.ParseError as error:
        return malformed(f"not valid XML: {error}")
    except (ValueError, LookupError) as error:  # a DOCTYPE, or an unknown encoding
        return malformed(str(error))
    uid = root.find("uId")
    number = "" if uid is None else uid.get("id", "")
    if not re.fullmatch(r"CXR[0-9]+", number):
        return malformed(f"uId is {number!r}, expected CXR and a number")
    images = tuple(image.get("id", "") for image in root.iter("parentImage"))
    for image in images:
        if not re.fullmatch(number + r"_[A-Za-z0-9_]+(-[A-Za-z0-9]+)+", image):
            return malformed(f"parentImage is {image!r}, expected a name as {number}_IM-0001-1001")
    texts: dict[str, list[str]] = {name: [] for name in TEXTS}
    for element in root.iter("AbstractText"):
        label = element.get("Label", "").lower()
        if label in texts:
            texts[label].append("".join(element.itertext()))
    sections = tuple(" ".join(text for text in texts[label] if text) for label in TEXTS)
    tags = tuple((element.text or "").strip() for element in root.iterfind(".//MeSH/major"))
    return _Report(number, images, sections, _licence(root), tags)


def _licence(root: ElementTree.Element) -> str:
    """Short name of the licence in the report: "CC BY-NC-ND 4.0"."""
    url = root.findtext("licenseURL", "").strip()
    creative_commons = re.search(r"creativecommons\.org/licenses/([a-z-]+)/([0-9.]+)", url)
    if creative_commons:
        return f"CC {creative_commons[1].upper()} {creative_commons[2]}"
    if root.findtext("ccLicense", "").strip() == "byncnd":
        return "CC BY-NC-ND 4.0"
    return url or root.findtext("licenseType", "").strip()
