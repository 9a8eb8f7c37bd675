import subprocess
import sys

import pytest
from otdrg.studies import load_studies
from otdrg.studies.schema import STUDY_FEATURES


def test_unknown_source_names_the_known_ones():
    with pytest.raises(
        ValueError,
        match="unknown source of studies 'iu': expected one of csv, dicom, hub, mimic-cxr, open-i, phantom, r2gen",
    ):
        load_studies("iu")


def test_unknown_option_names_the_allowed_ones():
    with pytest.raises(
        ValueError, match="unknown option 'folder' of source 'r2gen': expected one of annotation, images"
    ):
        load_studies("r2gen", folder="x")


def test_missing_option_is_named():
    with pytest.raises(ValueError, match="source 'r2gen' needs the option 'images'"):
        load_studies("r2gen", annotation="annotation.json")


def test_every_source_yields_the_schema():
    studies = load_studies("phantom", train=1, validation=0, test=0, image_size=32)
    assert studies["train"].features == STUDY_FEATURES


def test_sources_are_imported_when_asked_for():
    code = "import sys, otdrg.studies; print([m for m in ('datasets', 'torch') if m in sys.modules])"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "[]"


@pytest.mark.parametrize("options", [{}, {"folder": "x", "limit": 3}, {"path": "x"}])
def test_the_prepared_source_has_one_option(options):
    with pytest.raises(ValueError, match="source 'prepared' has one option, 'folder'"):
        load_studies("prepared", **options)
