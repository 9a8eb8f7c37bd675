"""R2Gen's cleaners, bit for bit: the expected strings were written by R2Gen's own functions."""

import pytest
from otdrg.studies.cleaning import clean_report

SAME_IN_BOTH = [
    ("", " ."),
    (".", " ."),
    ("Heart size is normal. Lungs are clear.", "heart size is normal . lungs are clear ."),
    ("Heart... normal.... Lungs..... clear", "heart . normal . lungs . clear ."),
    ("1. Normal heart. 2. Clear lungs. 3. No effusion.", "normal heart . clear lungs . no effusion ."),
    ("Findings 2. Effusion 3. None", "findings . effusion . none ."),
    ("Fracture of T11. Stable. 6. Other.", "fracture of t1stable . 6 . other ."),
    (
        'A 0.5 cm nodule. (XXXX) left-sided [port] <seen> @ 5:30 = "fine"/ok\'s \\ done',
        "a 05 cm nodule . xxxx left-sided port seen  530  fineoks  done .",
    ),
    ("( Cardiomegaly ). - No edema.", " cardiomegaly  . - no edema ."),
    ("No edema.  . No effusion", "no edema .  . no effusion ."),
    ("Not. .. 2. 3. end", "not .  . end ."),
    ("LUNGS clear.No effusion", "lungs clearno effusion ."),
]


@pytest.mark.parametrize("style", ["r2gen_iu", "r2gen_mimic"])
@pytest.mark.parametrize(("text", "cleaned"), SAME_IN_BOTH)
def test_clean_report_both_styles_match_r2gen(text, cleaned, style):
    assert clean_report(text, style) == cleaned


@pytest.mark.parametrize(
    ("text", "iu", "mimic"),
    [
        (
            "Line one\nline two.\n\nLine three. ________ mL",
            "line one\nline two\n\nline three .  ml .",
            "line one line two . line three .  ml .",
        ),
        # Six halvings of a run of 100 spaces leave two of them.
        ("Wide" + " " * 100 + "gap", "wide" + " " * 100 + "gap .", "wide  gap ."),
        # Only MIMIC's cleaner makes a space of a line break, and so finds the number after it.
        ("Normal heart.\n2. Clear lungs.", "normal heart\n2 . clear lungs .", "normal heart . clear lungs ."),
    ],
)
def test_clean_report_styles_differ_as_in_r2gen(text, iu, mimic):
    assert clean_report(text, "r2gen_iu") == iu
    assert clean_report(text, "r2gen_mimic") == mimic


def test_clean_report_none_keeps_the_text():
    assert clean_report(" As IT is..\n", "none") == " As IT is..\n"


def test_clean_report_unknown_style_names_the_known_ones():
    with pytest.raises(
        ValueError, match=r"unknown cleaning style 'r2gen': expected one of r2gen_iu, r2gen_mimic, none"
    ):
        clean_report("text", "r2gen")
