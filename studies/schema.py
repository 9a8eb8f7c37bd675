"""The schema of studies from every source."""

from datasets import ClassLabel, Features, Image, List, Value

from ..findings_otdrg import FINDING_STATES
from .source import VIEWS

#: Column that training adds when it cleans reports: the original `report`, which labelers read.
UNCLEANED = "uncleaned_report"

#: Columns that datasets of earlier versions lack.
ADDED_LATER: tuple[str, ...] = ("tags", "prior_images", "prior_report", "prior_days")

#: Columns of a study: views in order, sections of the report ("" if absent), `report` (the text a model learns to
#: write), the states of the 14 findings in the order of `FINDINGS` (None if not labelled), and further labels such as
#: MeSH terms (None if unknown), of which "A/b" is a kind of "A". `prior_images`, `prior_report` and `prior_days` are
#: the views and the report of an earlier study of the patient, and how many days before it was made: [], "" and None
#: without one, or if unknown.
STUDY_FEATURES = Features(
    {
        "id": Value("string"),
        "patient_id": Value("string"),
        "images": List(Image()),
        "views": List(ClassLabel(names=list(VIEWS))),
        "findings": Value("string"),
        "impression": Value("string"),
        "indication": Value("string"),
        "comparison": Value("string"),
        "report": Value("string"),
        "finding_states": List(ClassLabel(names=list(FINDING_STATES))),
        "tags": List(Value("string")),
        "prior_images": List(Image()),
        "prior_report": Value("string"),
        "prior_days": Value("int32"),
        "source": Value("string"),
        "licence": Value("string"),
    }
)
