"""Sections of reports whose layouts are those of real ones; every text is made up."""

import time

import pytest
from otdrg.studies.report_sections import ReportSections, parse_sections, text_without_trailer

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


def test_parse_sections_complete_report_is_split():
    assert parse_sections(WHOLE) == ReportSections(
        findings="The lungs are clear. 3:45 is a time and opens nothing. There are the following: two wires. "
        "The heart is large.",
        impression="1. Large heart. 2. Two wires.",
        indication="___ year old woman with a cough // is there pneumonia?",
        comparison="___ at 3:45 p.m.",
        findings_labelled=True,
    )


@pytest.mark.parametrize("end", ["\r\n", "\r", "\n\n", "\t\n\t", "  \n "])
def test_parse_sections_line_ends_and_spaces_are_ignored(end):
    assert parse_sections("\ufeff" + WHOLE.replace("\n", end)) == parse_sections(WHOLE)


@pytest.mark.parametrize("text", ["", " \r\n\t\n", "FINAL REPORT", "___", "_" * 80, "CHEST, TWO VIEWS: ___"])
def test_parse_sections_empty_report_is_empty(text):
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
def test_parse_sections_names_are_recognised(section, headers, gap):
    for header in headers.split("|"):
        header = header.strip()
        if ":" not in header and "\n" not in gap:
            continue
        sections = parse_sections(f" DATE: ___.\n\n {header}{gap}Some words here.\n\n NOTIFICATION: Left out.")
        assert getattr(sections, section) == "Some words here.", header
        rest = set(sections[:4]) - {"Some words here."}
        assert rest == {""}, header


@pytest.mark.parametrize("header", ["FINDINGS AND IMPRESSION:", "FINDINGS/IMPRESSION:", "Impression and findings:"])
def test_parse_sections_joint_section_is_the_findings(header):
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
def test_parse_sections_names_of_views_begin_findings(header):
    sections = parse_sections(f"FINAL REPORT\n HISTORY: Fall.\n\n {header}  Clear.\n Dry.\n\n IMPRESSION:  Well.\n")
    assert sections == ReportSections("Clear. Dry.", "Well.", "Fall.", "", True)


def test_parse_sections_title_is_not_the_findings():
    title = " CHEST, TWO VIEWS: ___ AT 3:45 P.M.\n\n HISTORY:  Fall.\n\n"
    assert parse_sections(f"{title} IMPRESSION:  Well.") == ReportSections("", "Well.", "Fall.")
    assert parse_sections(f"{title} FINDINGS:  Clear.").findings == "Clear."
    assert parse_sections(" EXAMINATION:\n CHEST RADIOGRAPH\n\n COMPARISON:\n\n CHEST FILM ___\n").comparison == (
        "CHEST FILM ___"
    )


def test_parse_sections_labels_in_findings_are_text():
    text = (
        "FINDINGS:\n\nPORTABLE CHEST: Dim.\nLUNGS: Clear.\nA NOTE: Rotated.\nHeart: Large.\n\nIMPRESSION: LINES: None."
    )
    sections = parse_sections(text)
    assert sections.findings == "PORTABLE CHEST: Dim. LUNGS: Clear. A NOTE: Rotated. Heart: Large."
    assert sections.impression == "LINES: None."


def test_parse_sections_labels_of_organs_begin_findings():
    sections = parse_sections("COMPARISON: None.\n\nLungs: Clear.\nHeart: Large.\n\nIMPRESSION: Large heart.")
    assert sections == ReportSections("Lungs: Clear. Heart: Large.", "Large heart.", "", "None.", True)


def test_parse_sections_unknown_label_ends_a_section():
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
def test_parse_sections_unlabelled_findings_are_found(text, expected):
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
def test_parse_sections_preliminary_reads_are_removed(text):
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
def test_parse_sections_unlabelled_findings_beside_removed_parts(text):
    report = " HISTORY: Fall.\n\n Clear dry lungs.\n"
    assert parse_sections(text.replace("{report}", report)) == ReportSections("Clear dry lungs.", "", "Fall.")


def test_parse_sections_repeated_sections_are_joined():
    text = "FINDINGS: One.\nIMPRESSION: Two.\nFINAL REPORT\nFINDINGS: Three.\nIMPRESSION: Four.\n"
    assert parse_sections(text) == ReportSections("One. Three.", "Two. Four.", "", "", True)


def test_parse_sections_headers_within_a_line_are_found():
    text = "CLINICAL HISTORY: Fall. COMPARISON: ___ FINDINGS: Clear. See FINDINGS: none.  IMPRESSION: Well."
    assert parse_sections(text) == ReportSections("Clear. See FINDINGS: none.", "Well.", "Fall.", "___", True)


@pytest.mark.parametrize(
    "line", ["History.", "findings: two and three", "4:30 there was none", "ratio 3:1 of it", "Known Comparison"]
)
def test_parse_sections_wrapped_lines_are_not_headers(line):
    assert parse_sections(f"FINDINGS: It is as in the\n{line}\nIMPRESSION: Well.").findings == f"It is as in the {line}"


def test_parse_sections_placeholders_are_kept():
    assert parse_sections("FINDINGS: Dr. ___ saw\n___\n___: it.").findings == "Dr. ___ saw ___ ___: it."


CLEAR = ReportSections("Lungs clear.", "Normal chest.", "", "", True)


@pytest.mark.parametrize(
    "text",
    [
        "**FINDINGS:**\nLungs clear.\n\n**IMPRESSION:**\nNormal chest.",
        "**Findings**: Lungs clear.\n**Impression**: **Normal** chest.",
        "__FINDINGS:__ Lungs clear.\n__IMPRESSION__: Normal chest.",
        "*FINDINGS:* Lungs clear.\n*IMPRESSION:* Normal chest.",
        "## Findings\nLungs clear.\n\n## Impression\nNormal chest.",
        "<p><b>FINDINGS:</b> Lungs clear.<br/></p><p><strong>IMPRESSION:</strong><br>Normal&nbsp;chest.</p>",
        "Findings: Lungs clear. Impression: Normal chest.",
        "findings: Lungs clear. impression: Normal chest.",
        "Findings: Lungs clear.  Impresion - Normal chest.",
        "FINDINGS: Lungs clear. / IMPRESSION: Normal chest.",
        "1. FINDINGS: Lungs clear.\n2. IMPRESSION: Normal chest.",
        "Findings: Lungs clear. 2. Impression: Normal chest.",
        "• FINDINGS: Lungs clear.\n• IMPRESSION: Normal chest.",
        "A) Findings: Lungs clear.\nB) Impression: Normal chest.",
        "FINDINGS - Lungs clear.\nIMPRESSION -- Normal chest.",
        "FINDINGS –\nLungs clear.\nIMPRESSION –\nNormal chest.",
        "FINDINGS Lungs clear.\n\nIMPRESSION Normal chest.",
        "FINDINGS (AP):\nLungs clear.\nIMPRESSION (final): Normal chest.",
        "Finidngs: Lungs clear.\nIMPERSSION: Normal chest.",
        "FNDINGS\nLungs clear.\nIMPPRESION\nNormal chest.",
    ],
)
def test_parse_sections_decorated_headers_are_headers(text):
    assert parse_sections(text) == CLEAR


@pytest.mark.parametrize(
    "line",
    [
        *(
            "END OF IMPRESSION:",
            "***END OF REPORT***",
            "End of dictation",
            "SUMMARY 2: ABNORMAL",
            "SUMMARY: 2-ABNORMAL",
        ),
        *("Primary Diagnostic Code: 1", "Secondary Diagnostic Codes: MINOR", "ACR Code: 6.1", "Code 2", "ICD-10: R05"),
        *("By: Doe, Jane", "by: jane doe", "Electronically signed by: Jane Doe", "Final report electronically signed"),
        *(
            "Dictated by Jane Doe on 1/2/2003",
            "DICTATED AND SIGNED BY: DOE",
            "Reviewed by Jane Doe, MD",
            "Signed Jane Doe",
        ),
        *("Transcribed: 01/02/2003", "Read by: JD", "/ES/ JANE DOE", "Attending: Doe, Jane", "Attending Radiologist"),
        *("Primary Interpreting Staff:", "Interpreting Radiologist: Doe", "Resident: J. Doe", "Transcriptionist: jd"),
        *("I have personally reviewed the images and agree.", "I, Jane Doe, have reviewed the images and concur."),
        *(
            "As the attending radiologist I agree.",
            "This report was dictated by Jane Doe.",
            "I attest that I was there.",
        ),
        *("ACCESSION NUMBER: 7061954", "Accession 7061954", "MRN: 123", "Workstation ID: A1", "cc: Dr. Roe"),
        *("Jane Doe, MD", "JANE DOE, M.D.", "Dr. Jane Doe", "- J. Doe MD, Radiologist", "01/02/2003 10:30 AM"),
        *("d: 01/02/2003 t: 01/02/2003", "This report has been anonymized.", "[Electronically signed by Jane Doe]"),
    ],
)
@pytest.mark.parametrize("before", ["\n", "\n\n"])
def test_parse_sections_trailer_is_removed(line, before):
    report = f"FINDINGS: Lungs clear.{before}IMPRESSION: Normal chest.{before}{line}\nDoe\n\nLater words.\nLUNGS: Wet."
    assert parse_sections(report) == CLEAR
    assert parse_sections(f"{report}\nSUMMARY: Wet.\nFINDINGS: Dry.").findings == "Lungs clear. Dry."


@pytest.mark.parametrize(
    "trailer", ["By: Doe, Jane", "Electronically signed by Jane Doe", "END OF IMPRESSION", "Primary Diagnostic Code: 1"]
)
def test_parse_sections_trailer_within_a_line_is_removed(trailer):
    assert parse_sections(f"Findings: Lungs clear. Impression: Normal chest. {trailer} and more") == CLEAR


@pytest.mark.parametrize(
    "text",
    [
        "Findings are consistent with edema.",
        "Findings consistent with\nFindings suggest edema.",
        "There is an impression of the tube on the esophagus.\nImpression on the trachea.",
        "In summary: none. Summary of the above: none.",
        "Attending physician was notified. Reported by phone to the team. Read with care.",
        "Comparison is made to the prior. In comparison - unchanged.",
        "Compression: none. By exclusion: mass. Code status unknown.",
        "1. Edema. 2. Dr. Smith was notified. 3. Lines: ok.",
        "As seen by the team on\n01/02/2003. It was told to\nDr. ___",
        "I suspect pneumonia. I discussed this with the team.",
        "Less than <5 mm & more than > 3 mm, 2*3*4, a__b, see __ and ___.",
        "The clinical Impression: edema",
    ],
)
def test_parse_sections_ordinary_sentences_are_not_cut(text):
    for place in ("findings", "impression"):
        texts = {"findings": "Lungs clear.", "impression": "Normal chest.", place: text}
        sections = parse_sections(f"FINDINGS:\n{texts['findings']}\n\nIMPRESSION:\n{texts['impression']}\n")
        assert (sections.findings, sections.impression) == tuple(" ".join(it.split()) for it in texts.values())


def test_parse_sections_of_vista_layout():
    text = """CHEST 2 VIEWS PA&LAT
Req Phys: DOE,JANE                    Pat Loc: CLINIC
    Clinical History:
      Smoker.

    Report Status: Verified                   Date Reported: JAN 1,2003
    Verifier E-Sig:/ES/JANE DOE

    Report:
      The heart is normal in size.

    Impression:
      No active disease.

    Primary Diagnostic Code: NORMAL

Primary Interpreting Staff:
  JANE DOE, MD, Radiologist (Verifier)
/JD
"""
    assert parse_sections(text) == ReportSections(
        "The heart is normal in size.", "No active disease.", "Smoker.", "", True
    )


def test_parse_sections_signature_without_headers_is_removed():
    text = "Lungs are clear. Heart normal.\n\nElectronically signed by Jane Doe, MD\n\nJane Doe"
    assert parse_sections(text) == ReportSections("Lungs are clear. Heart normal.")
    assert parse_sections(f"Accession Number: 55\n\n{text}").findings == "Lungs are clear. Heart normal."
    assert text_without_trailer("Normal.\nSigned by: Jane Doe") == "Normal."


def test_parse_sections_names_at_the_beginning_are_removed():
    text = "Patient Name: Doe, Jane\nHISTORY: Fall.\nAttending: Roe, John\nMRN: 1\nFINDINGS: Clear.\nIMPRESSION: Well."
    assert parse_sections(text) == ReportSections("Clear.", "Well.", "Fall.", "", True)


@pytest.mark.parametrize(
    "junk",
    [
        " ",
        "_",
        "\t",
        "A: ",
        "FINDINGS: ",
        "CLINICAL HISTORY AND ",
        ". ",
        ". A",
        "A. ",
        "1. A. ",
        "Dictated by X\n",
        "MRN: 1\n\n",
        "Dictated ",
        "I, a ",
        "**a",
        "<b ",
        "\n",
        "* \n",
    ],
)
def test_parse_sections_time_is_proportional_to_length(junk):
    start = time.perf_counter()
    parse_sections(junk * (100_000 // len(junk)) + "x")
    assert time.perf_counter() - start < 2
