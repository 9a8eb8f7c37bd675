"""The schema of studies from every source."""

from datasets import ClassLabel, Features, Image, List, Value

from ..findings_otdrg import FINDING_STATES
from .source import VIEWS

#: Column that training adds when it cleans reports: the original `report`, which labelers read.
UNCLEANED = "uncleaned_report"

#: Columns of a study: views in order, sections of the report ("" if absent), `report` (the text a model learns to
#: write), the states of the 14 findings in the order of `FINDINGS` (None if not labelled), and further labels such as
#: MeSH terms (None if unknown), of which "A/b" is a kind of "A".
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
        "source": Value("string"),
        "licence": Value("string"),
    }
)
