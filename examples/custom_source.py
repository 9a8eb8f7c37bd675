"""Add a source of studies: a folder with one image and one text file for each study.

python examples/custom_source.py images --output text_studies
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from otdrg.studies import SOURCES, prepare_studies
from otdrg.studies.source import SkipStudy, Study, StudyEntry, StudySource, option, seeded_split


@dataclass
class TextFileSource(StudySource):
    """Each study is a pair of files, `NAME.png` and `NAME.txt`. Each field of this class is an option."""

    name = "text-files"

    folder: str = option("Folder of images and text files.", metavar="FOLDER")
    licence: str = option("Licence of the studies.", "")

    def entries(self) -> Iterator[StudyEntry]:
        """List the studies; fast, because no file is opened."""
        names = sorted(path.stem for path in Path(self.folder).glob("*.png"))
        splits = seeded_split(names)
        for name in names:
            yield StudyEntry(id=name, patient_id=name, split=splits[name], location=name)

    def read(self, entry: StudyEntry) -> Study:
        """Read one study. A study that cannot be used is skipped, counted and listed."""
        image, text = (Path(self.folder) / f"{entry.location}.{suffix}" for suffix in ("png", "txt"))
        if not text.is_file():
            raise SkipStudy("empty report", f"{text} does not exist")
        return Study(images=[str(image)], views=["frontal"], findings=text.read_text(), licence=self.licence)


# In the package, this is a line of `SOURCES` in studies/__init__.py.
SOURCES["text-files"] = (__name__, "TextFileSource", "images with text files")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", help="folder of images and text files")
    parser.add_argument("--output", default="studies", help="folder for the dataset (default: studies)")
    options = parser.parse_args()
    report = prepare_studies("text-files", options.output, folder=options.folder)
    print(report)


if __name__ == "__main__":
    main()
