"""Recognise lines that are not part of a report's text: its end, codes, authors, patient and order."""

from __future__ import annotations

import re

_DEGREE = r"(?:M\.?D|D\.?O|MBBS|MBChB|Ph\.?D|FRCR|FRCPC|FACR|RRA|RPA|R\.?T)\b\.?"
_PERSON = (
    r"(?:(?:ATTENDING|STAFF|INTERPRETING|READING|REPORTING|SIGNING|VERIFYING|DICTATING|TEACHING|FACULTY|CONSULTING"
    r"|PRIMARY|SECONDARY|RESIDENT|DIAGNOSTIC) )*"
    r"(?:ATTENDING|STAFF|RADIOLOGISTS?|PHYSICIANS?|PHYS|RESIDENTS?|FELLOWS?|PROVIDER|DOCTOR|AUTHOR|VERIFIER"
    r"|TRANSCRIPTIONIST|TRANSCRIBER|TYPIST|TECHNOLOGIST|RADIOGRAPHER)(?: ?(?:E-?SIG|M\.?D\.?|NAME))?"
)
_DONE = (
    r"(?:DICTATED|TRANSCRIBED|SIGNED|CO-?SIGNED|E-?SIGNED|VERIFIED|PRE-?VERIFIED|APPROVED|INTERPRETED|REPORTED"
    r"|REVIEWED|READ|AUTHORED|AUTHENTICATED|FINALI[SZ]ED|PREPARED|SUPERVISED|RELEASED|TYPED|EDITED|ATTESTED)"
)
_I = r"I(?:,[^,]{,80},)?"
_CODE = (
    r"(?:DIAGNOSTIC|DIAGNOSIS|DIAGNOSES|DX|ACR|CPT|ICD(?:-?\d+)?(?:-CM)?|BILLING|RESULTS?|ALERT|CRITICAL|FINDINGS?"
    r"|PROCEDURE|REPORT|SIGNIFICANCE|URGENCY|ACTION|PATHOLOGY)"
)

#: Beginnings of lines that end a report.
_SIGNED_OFF = (
    # END OF IMPRESSION:
    r"END (?:OF )?(?:THE )?(?:IMPRESSIONS?|REPORT|FINDINGS|CONCLUSION|DICTATION|EXAM|EXAMINATION|STUDY|DOCUMENT"
    r"|NARRATIVE|TRANSCRIPTION|TEXT)\b(?! OF)",
    # SUMMARY 2: ABNORMAL; SUMMARY: 4-POSSIBLE SIGNIFICANT FINDINGS
    r"SUMMARY(?: CODE)?\s*#?\s*\d+\s*(?:[:.=–-]|$)",
    r"SUMMARY(?: CODE)?\s*[:=-]\s*\d+\s*(?:[-–:.,=]|$)",
    r"SUMMARY CODE\b",
    # Primary Diagnostic Code: 1
    rf"(?:(?:PRIMARY|SECONDARY|ADDITIONAL|FINAL) )?{_CODE}[ -]CODES?(?:\(S\))?(?: ?\d+)?\s*[:#=–-]",
    r"(?:CPT|ICD(?:-?(?:9|10))?(?:-CM)?)\s*:",
    r"CODES?\s*[:#]",
    r"CODES? \d+\b",
    # Electronically signed by; Dictated and signed by; Reviewed by: ; Read by Jane Doe, MD
    r"(?:\w+ ){,4}ELECTRONIC(?:ALLY)? (?:SIGNED|SIGNATURE|AUTHENTICATED|APPROVED|VERIFIED|REVIEWED|FINALI[SZ]ED)",
    r"DIGITALLY SIGNED",
    r"(?:DICTATED|TRANSCRIBED|SIGNED|CO-?SIGNED|E-?SIGNED|AUTHENTICATED|FINALI[SZ]ED)"
    r"(?: (?:AND|&|OR|/) \w+)? (?:BY|ON|AT)\b",
    rf"{_DONE}(?:(?:,| AND| &| OR|/| ELECTRONICALLY){{1,2}} ?{_DONE}){{,3}}(?: (?:BY|ON|DATE|DATE/TIME|AT))?\s*:",
    rf"{_DONE}(?:(?: AND| &|/) ?{_DONE}){{,3}} BY (?:DR\b|[^.]{{,60}}\b{_DEGREE}|[\w'-]+, [A-Z])",
    r"(?:DATE|TIME|DATE/TIME|DATE AND TIME)(?: OF)? (?:DICTATED|TRANSCRIBED|SIGNED|REPORTED|VERIFIED|APPROVED"
    r"|DICTATION|TRANSCRIPTION|SIGNATURE)\b",
    r"(?:DICTATION|TRANSCRIPTION|SIGNATURE|VERIFIER E-?SIG)\b[^.:]{,30}:",
    r"/E?S/",
    r"BY\s*:",
    rf"{_PERSON}\s*:",
    # I have personally reviewed the images; As the attending radiologist; This report was dictated by
    r"ATTENDING (?:RADIOLOGIST |PHYSICIAN )?(?:STATEMENT|ATTESTATION)\b",
    rf"{_I} (?:\w+ ){{,2}}(?:PERSONALLY|INDEPENDENTLY) (?:\w+ ){{,2}}"
    r"(?:REVIEWED|VIEWED|EXAMINED|INTERPRETED|SUPERVISED)",
    rf"{_I} (?:HAVE |HAD )?(?:REVIEWED|VIEWED|EXAMINED|INTERPRETED) (?:AND \w+ )?(?:THE|THESE|THIS|ALL)\s"
    r"(?:IMAGES?|FILMS?|RADIOGRAPHS?|STUDY|STUDIES|EXAM|EXAMINATION|REPORT|RESIDENT|ABOVE|DICTATED|PRELIMINARY)\b",
    rf"{_I} (?:AGREE|ATTEST|CERTIFY|CONCUR)\b",
    r"I WAS (?:PRESENT|PERSONALLY)\b",
    r"AS (?:THE|AN) (?:ATTENDING|TEACHING)\b",
    r"(?:THIS|THE)(?: ABOVE)? (?:REPORT|DOCUMENT|DICTATION|NOTE) (?:WAS|HAS BEEN|IS) (?:\w+LY )?"
    r"(?:SIGNED|DICTATED|TRANSCRIBED|GENERATED|CREATED|REVIEWED|INTERPRETED|APPROVED|VERIFIED|AUTHENTICATED"
    r"|FINALI[SZ]ED|PREPARED|READ|ANONYMI[SZ]ED|DE-?IDENTIFIED|EDITED)",
    r"(?:THIS|THE|THESE) (?:STUDY|EXAM|EXAMINATION|IMAGES?) (?:WAS|WERE|HAS BEEN|HAVE BEEN) (?:\w+LY )?(?:\w+ AND )?"
    r"(?:REVIEWED|INTERPRETED|READ|DICTATED|VIEWED) BY\b",
    r"(?:STANFORD )?PHYSICIAN[ -]TO[ -]PHYSICIAN\b",
)
#: Beginnings of lines about patient and order, which are at the beginning of a report as well.
_METADATA = (
    r"(?:ACCESSION|ACC)(?: ?(?:NUMBER|NO|NUM|ID|#))?\.?\s*[:#]",
    r"ACCESSION\b[^.]{,20}\d{3}",
    r"(?:MRN|DOB|MEDICAL RECORD(?: (?:NUMBER|NO|#))?|DATE OF BIRTH|PATIENT(?:'S)? (?:NAME|ID)|NAME"
    r"|JOB(?: (?:NUMBER|ID|#))?|DOCUMENT (?:ID|NUMBER)|WORKSTATION(?: ID)?|REPORT (?:STATUS|ID|NUMBER)"
    r"|ORDER(?: (?:NUMBER|ID|#))|CASE(?: (?:NUMBER|NO|#))?|EXAM (?:ID|NUMBER)|COP(?:Y|IES) TO)\s*[:#]",
    r"(?:ORDERING|REFERRING|REQUESTING|REQ|ATTENDING) (?:PHYSICIAN|PHYS|PROVIDER|DOCTOR|CLINICIAN|MD)\s*:",
)
#: Whole lines of a signature block.
_SIGNATURE = (
    # Jane Doe, MD; J. Doe MD, Radiologist
    rf"(?:(?i:DR\.?) )?[A-Z][\w.'’-]*(?:,? [A-Z][\w.'’-]*){{,4}},? {_DEGREE}(?:[ ,;(/-].*)?",
    r"(?i:DR\.?) [A-Z][\w'’-]*[a-z](?: [A-Z][\w.'’-]*){,3}",
    # 01/02/2003 10:30 AM
    r"\d{1,4}[/.-]\d{1,2}[/.-]\d{2,4}(?:[ ,T-]{1,3}\d{1,2}:\d{2}.{,12})?",
    r"(?i:CC)\s*:.*",
    r"(?i:DD|DT|TD|TT|D|T|R)\s*:\s*\d{1,2}[/-].*",
    # Attending Radiologist; Signed Jane Doe; Electronically
    rf"(?i:{_PERSON})",
    r"(?i:ELECTRONICALLY|SIGNED|DICTATED|TRANSCRIBED|VERIFIED|APPROVED|AUTHENTICATED)(?:,? [A-Z][\w.'’-]*){,5}",
)


def _any_of(patterns: tuple[str, ...], flags: int = 0) -> re.Pattern[str]:
    return re.compile("|".join(patterns), flags)


_SIGNED_OFF_PATTERN = _any_of(_SIGNED_OFF, re.IGNORECASE)
_METADATA_PATTERN = _any_of(_METADATA, re.IGNORECASE)
_SIGNATURE_PATTERN = _any_of(_SIGNATURE)
_DECORATION = "*#-=~<>[( •"


def is_trailer(line: str, after_break: bool = False) -> bool:
    """Whether a line ends the report, or names its authors, codes, patient or order.

    Args:
        line: a line, or the rest of one.
        after_break: whether a sentence or paragraph ends before it; otherwise it must begin with a capital.
    """
    line = line.lstrip(_DECORATION)
    if not (after_break or line[:1].isupper() or line.startswith("/")):
        return False
    return _SIGNED_OFF_PATTERN.match(line) is not None or is_metadata(line)


def is_metadata(line: str) -> bool:
    """Whether a line is about the patient or the order; such lines are at the beginning of a report as well."""
    return _METADATA_PATTERN.match(line.lstrip(_DECORATION)) is not None


def is_signature_line(line: str) -> bool:
    """Whether a line is a name with a degree, a date or a list of copies; a line of wrapped text may look the same."""
    return _SIGNATURE_PATTERN.fullmatch(line.lstrip(_DECORATION)) is not None
