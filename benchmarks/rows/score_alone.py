"""Scores by pycocoevalcap and nothing else: `score_alone.py references.jsonl predictions.jsonl`."""

import json
import sys
from pathlib import Path

from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.meteor.meteor import Meteor
from pycocoevalcap.rouge.rouge import Rouge

true, written = (
    {place: [json.loads(line)["report"]] for place, line in enumerate(Path(path).read_text("utf-8").splitlines())}
    for path in sys.argv[1:]
)
for scorer in (Bleu(4), Meteor(), Rouge(), Cider()):
    print(type(scorer).__name__, scorer.compute_score(true, written)[0])
