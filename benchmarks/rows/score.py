"""`otdrg score` against pycocoevalcap alone."""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

from measure import Line, NotAvailable, Row, measured_in_turns, spent

from commands import arguments_of

TITLE = "otdrg score"
ABOUT = (
    "600 reports of phantoms, whole commands: `otdrg score` (BLEU, METEOR, ROUGE-L, CIDEr, clinical efficacy by "
    "the labeler `rules`, intervals of 1,000 resamples, JSON and CSV) against a script that computes BLEU, "
    "METEOR, ROUGE-L and CIDEr with pycocoevalcap and nothing else."
)
NOTES: tuple[str, ...] = ()
ALONE = Path(__file__).with_name("score_alone.py")


def measure(rounds: int, folder: Path) -> Row:
    if shutil.which("java") is None:
        raise NotAvailable("METEOR needs java")
    with tempfile.TemporaryDirectory() as place:
        arguments = arguments_of("score", 600, Path(place))
        ours = [sys.executable, "-m", "otdrg", "score", *arguments, "--overwrite"]
        theirs = [sys.executable, str(ALONE), *(f"{place}/{name}.jsonl" for name in ("references", "predictions"))]
        found = measured_in_turns({"ours": lambda: spent(ours), "theirs": lambda: spent(theirs)}, rounds, warm_up=1)
    pairs = list(zip(found["ours"], found["theirs"], strict=True))
    lines = [Line("600 reports", "CPU time, ours / alone", [one.cpu / other.cpu for one, other in pairs], "≤ 1.15")]
    lines.append(
        Line("600 reports", "elapsed, ours / alone", [one.wall / other.wall for one, other in pairs], "≤ 1.15")
    )
    return Row(lines, list(NOTES))
