"""The one schema that every source of studies yields."""

from datasets import ClassLabel, Features, Image, List, Value

from ..findings_otdrg import FINDING_STATES
from .source import VIEWS

#: Column that training adds where it cleans reports: `report` as it was, from which labelers read states.
UNCLEANED = "uncleaned_report"

#: A study: its views in order, the sections of its report ("" when absent), `report` (the text a model learns to write)
#: and the states of the 14 findings in the order of `FINDINGS`, None where nobody has labelled them.
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
        "source": Value("string"),
        "licence": Value("string"),
    }
)
