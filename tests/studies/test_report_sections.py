"""Sections of reports whose layouts are those of real ones; every text is made up."""

import time

import pytest
from otdrg.studies.report_sections import ReportSections, parse_sections

WHOLE = """                                 FINAL REPORT
 EXAMINATION:  CHEST (PA AND LAT)

 INDICATION:  ___ year old woman with a cough  // is there
 pneumonia?

 TECHNIQUE:  Chest PA and lateral

 COMPARISON:  ___ at 3:45 p.m.

 FINDINGS:

 The lungs  are clear.
 3:45 is a time and opens nothing.  There are the following: two wires.

 The heart is large.

 IMPRESSION:

 1.  Large heart.
 2.  Two wires.

 RECOMMENDATION(S):  Another film.

 NOTIFICATION:  Told to Dr. ___ at 4:10.
"""


def test_a_whole_report():
    assert parse_sections(WHOLE) == ReportSections(
        findings="The lungs are clear. 3:45 is a time and opens nothing. There are the following: two wires. "
        "The heart is large.",
        impression="1. Large heart. 2. Two wires.",
        indication="___ year old woman with a cough // is there pneumonia?",
        comparison="___ at 3:45 p.m.",
        findings_labelled=True,
    )


@pytest.mark.parametrize("end", ["\r\n", "\r", "\n\n", "\t\n\t", "  \n "])
def test_line_ends_and_white_space_do_not_matter(end):
    assert parse_sections("\ufeff" + WHOLE.replace("\n", end)) == parse_sections(WHOLE)


@pytest.mark.parametrize("text", ["", " \r\n\t\n", "FINAL REPORT", "___", "_" * 80, "CHEST, TWO VIEWS: ___"])
def test_a_report_that_says_nothing(text):
    assert parse_sections(text) == ReportSections()


@pytest.mark.parametrize(
    ("section", "headers"),
    [
        ("findings", "FINDINGS: | FINDING: | Findings: | findings: | CHEST FINDINGS: | FINDINGS | Findings | FINDNGS:"),
        ("impression", "IMPRESSION: | Impression: | IMPRESSIONS : | CONCLUSION: | SUMMARY: | IMPRESSION | IMPRESSON:"),
        (
            "indication",
            "INDICATION: | INDICATIONS: | HISTORY: | CLINICAL HISTORY: | CLINICAL INFORMATION | REASON FOR EXAM: "
            "| REASON FOR THIS EXAMINATION: | CLINICAL INFORMATION & QUESTION: | INDICATION/HISTORY: | Clinical data:",
        ),
        ("comparison", "COMPARISON: | COMPARISONS: | COMPARISON(S): | Comparison: | PRIOR STUDY: | COMPARISON FILMS:"),
    ],
)
@pytest.mark.parametrize("gap", [" ", "\n", "\n \n  "])
def test_names_of_sections(section, headers, gap):
    for header in headers.split("|"):
        header = header.strip()
        if ":" not in header and "\n" not in gap:
            continue
        sections = parse_sections(f" DATE: ___.\n\n {header}{gap}Some words here.\n\n NOTIFICATION: Left out.")
        assert getattr(sections, section) == "Some words here.", header
        rest = set(sections[:4]) - {"Some words here."}
        assert rest == {""}, header


@pytest.mark.parametrize("header", ["FINDINGS AND IMPRESSION:", "FINDINGS/IMPRESSION:", "Impression and findings:"])
def test_findings_and_impression_in_one_stand_once(header):
    sections = parse_sections(f"COMPARISON: None.\n\n{header} Clear lungs.\n")
    assert (sections.findings, sections.impression) == ("Clear lungs.", "")


@pytest.mark.parametrize(
    "header",
    [
        "PA AND LATERAL VIEWS OF THE CHEST:",
        "CHEST, TWO VIEWS:",
        "AP PORTABLE CHEST:",
        "AP CHEST, 3:45 A.M., ___:",
        "CHEST (PORTABLE AP) AT 05:30 HOURS:",
        "Frontal and lateral views of the chest:",
        "SEMI-UPRIGHT X-RAY OF THE CHEST:",
        "CHEST:",
    ],
)
def test_views_in_place_of_the_findings(header):
    sections = parse_sections(f"FINAL REPORT\n HISTORY: Fall.\n\n {header}  Clear.\n Dry.\n\n IMPRESSION:  Well.\n")
    assert sections == ReportSections("Clear. Dry.", "Well.", "Fall.", "", True)


def test_a_title_of_views_is_not_the_findings():
    title = " CHEST, TWO VIEWS: ___ AT 3:45 P.M.\n\n HISTORY:  Fall.\n\n"
    assert parse_sections(f"{title} IMPRESSION:  Well.") == ReportSections("", "Well.", "Fall.")
    assert parse_sections(f"{title} FINDINGS:  Clear.").findings == "Clear."
    assert parse_sections(" EXAMINATION:\n CHEST RADIOGRAPH\n\n COMPARISON:\n\n CHEST FILM ___\n").comparison == (
        "CHEST FILM ___"
    )


def test_labels_within_the_findings_are_their_text():
    text = (
        "FINDINGS:\n\nPORTABLE CHEST: Dim.\nLUNGS: Clear.\nA NOTE: Rotated.\nHeart: Large.\n\nIMPRESSION: LINES: None."
    )
    sections = parse_sections(text)
    assert sections.findings == "PORTABLE CHEST: Dim. LUNGS: Clear. A NOTE: Rotated. Heart: Large."
    assert sections.impression == "LINES: None."


def test_labels_of_organs_in_place_of_the_findings():
    sections = parse_sections("COMPARISON: None.\n\nLungs: Clear.\nHeart: Large.\n\nIMPRESSION: Large heart.")
    assert sections == ReportSections("Lungs: Clear. Heart: Large.", "Large heart.", "", "None.", True)


def test_a_foreign_label_ends_what_is_before_the_findings():
    assert parse_sections("HISTORY: Fall.\nORDERING PHYSICIAN: Dr. ___\nFINDINGS: Clear.").indication == "Fall."


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The lungs are clear.\r\n\tThe heart is large.", ReportSections("The lungs are clear. The heart is large.")),
        ("FINAL REPORT\n PORTABLE CHEST, ___\n\n Unchanged wires.", ReportSections("Unchanged wires.")),
        (
            "HISTORY: Fall.\n\nCOMPARISON: ___.\n\nAs before, clear.\n\nA large heart.",
            ReportSections("As before, clear. A large heart.", "", "Fall.", "___."),
        ),
        (
            "TECHNIQUE: AP.\n\nCOMPARISON:\n\n___.\n\nClear dry lungs.\n\nIMPRESSION:\n\nWell.\n\nLater words here.",
            ReportSections("Clear dry lungs.", "Well. Later words here.", "", "___."),
        ),
        # A second line of what is compared with is no finding.
        (
            "COMPARISON: ___.\n\nChest CT ___.\n\nIMPRESSION: Well.",
            ReportSections("", "Well.", "", "___. Chest CT ___."),
        ),
        (
            "COMPARISON: ___.\nThe same paragraph.\n\nIMPRESSION: Well.",
            ReportSections("", "Well.", "", "___. The same paragraph."),
        ),
        (
            "HISTORY: Fall.\n\nClear dry lungs.\n\nNOTIFICATION: Told at 3:45.",
            ReportSections("Clear dry lungs.", "", "Fall."),
        ),
    ],
)
def test_findings_under_no_header(text, expected):
    assert parse_sections(text) == expected
    assert not parse_sections(text).findings_labelled


RULE = "_" * 78


@pytest.mark.parametrize(
    "text",
    [
        " WET READ: ABC 9:38 PM\n  Wet lungs.\n  FINDINGS: Wet.\n\n WET READ VERSION #1 ___ 8:00 PM\n  Wetter.\n"
        f" {RULE}\n        FINAL REPORT\n{{report}}",
        f"PROVISIONAL FINDINGS IMPRESSION (PFI): ABC 3:45 PM\n Wet.\n{RULE}\n{{report}}\n\n     PFI REPORT\n Wet.\n",
        " ADDENDUM  Also wires.\n\n IMPRESSION: Wires.\n FINAL REPORT\n{report}",
        f"FINAL REPORT\n ADDENDUM:\n\n Also wires.\n {RULE}\n{{report}}",
        "FINAL REPORT\n Addendum:  Also wires.\n\n{report}",
        "{report}\n\n              ADDENDUM\n Also wires.\n\n FINDINGS: Wires.\n IMPRESSION: Wires.\n",
        "{report}\n ***ADDENDUM #1 ___***\n Also wires.\n",
        "{report}\n INTERIM REPORT\n Wet.",
    ],
)
def test_preliminary_reads_and_addenda_are_left_out(text):
    report = " HISTORY: Fall.\n\n FINDINGS: Clear.\n\n IMPRESSION: Well.\n"
    assert parse_sections(text.replace("{report}", report)) == ReportSections("Clear.", "Well.", "Fall.", "", True)


@pytest.mark.parametrize(
    "text",
    [
        f"WET READ: Wet lungs.\n{RULE}\n{{report}}",
        "WET READ: Wet lungs.\n FINDINGS: Wet.\n FINAL REPORT\n{report}",
        "{report}\n ADDENDUM\n Also wires.",
    ],
)
def test_unlabelled_findings_beside_what_is_left_out(text):
    report = " HISTORY: Fall.\n\n Clear dry lungs.\n"
    assert parse_sections(text.replace("{report}", report)) == ReportSections("Clear dry lungs.", "", "Fall.")


def test_repeated_sections_are_joined():
    text = "FINDINGS: One.\nIMPRESSION: Two.\nFINAL REPORT\nFINDINGS: Three.\nIMPRESSION: Four.\n"
    assert parse_sections(text) == ReportSections("One. Three.", "Two. Four.", "", "", True)


def test_headers_in_one_line():
    text = "CLINICAL HISTORY: Fall. COMPARISON: ___ FINDINGS: Clear. See FINDINGS: none.  IMPRESSION: Well."
    assert parse_sections(text) == ReportSections("Clear. See FINDINGS: none.", "Well.", "Fall.", "___", True)


@pytest.mark.parametrize(
    "line", ["History.", "findings: two and three", "4:30 there was none", "ratio 3:1 of it", "Known Comparison"]
)
def test_wrapped_lines_are_not_headers(line):
    assert parse_sections(f"FINDINGS: It is as in the\n{line}\nIMPRESSION: Well.").findings == f"It is as in the {line}"


def test_placeholders_stay():
    assert parse_sections("FINDINGS: Dr. ___ saw\n___\n___: it.").findings == "Dr. ___ saw ___ ___: it."


@pytest.mark.parametrize("junk", [" ", "_", "\t", "A: ", "FINDINGS: ", "CLINICAL HISTORY AND ", ". ", "\n", "* \n"])
def test_long_texts_take_time_in_proportion(junk):
    start = time.perf_counter()
    parse_sections(junk * (100_000 // len(junk)) + "x")
    assert time.perf_counter() - start < 2
