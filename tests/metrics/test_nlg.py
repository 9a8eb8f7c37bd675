"""NLG scores against pycocoevalcap called directly, and what reports can hold."""

import json
import os
import random
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import otdrg
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from otdrg.metrics import NLG_METRICS, nlg_scores
from otdrg.metrics.retrieval import nearest_neighbours
from otdrg.studies.cleaning import clean_report
from PIL import Image
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.meteor.meteor import Meteor
from pycocoevalcap.rouge.rouge import Rouge

ROOT = Path(otdrg.__file__).parent
NO_JAVA = tuple(name for name in NLG_METRICS if name != "meteor")
REFERENCES = [
    "the heart is normal in size . the lungs are clear .",
    "there is a small left pleural effusion . no pneumothorax .",
    "low lung volumes with mild basilar atelectasis .",
]
PREDICTIONS = ["the heart is normal . the lungs are clear .", "", "mild atelectasis at both bases ."]
needs_java = pytest.mark.skipif(shutil.which("java") is None, reason="no java on the PATH")

WORDS = ["the", "heart", "lungs", "are", "clear", "normal", "no", "effusion", "."]
words = st.lists(st.sampled_from(WORDS), max_size=12).map(" ".join)


@pytest.fixture
def started(monkeypatch):
    """Processes that were started."""
    processes = []
    popen = subprocess.Popen

    def start(*args, **kwargs):
        processes.append(popen(*args, **kwargs))
        return processes[-1]

    monkeypatch.setattr(subprocess, "Popen", start)
    return processes


@pytest.fixture
def java(monkeypatch, tmp_path, started):
    """The Java of METEOR, which starts with the first score: another path than that of the Java of other tests."""
    (tmp_path / "java").symlink_to(shutil.which("java"))
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    return lambda: next(process for process in started if "java" in process.args)


class Directly(Meteor):
    """pycocoevalcap's METEOR on a Java that runs already, because each takes 12 seconds of CPU time to start."""

    def __init__(self, process):
        self.meteor_p, self.lock = process, threading.Lock()

    def __del__(self):
        """Leaves Java to the scorer that started it."""


def meteor_directly(true, written, process):
    return Directly(process).compute_score(*({i: [text] for i, text in enumerate(texts)} for texts in (true, written)))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(words, words), min_size=1, max_size=6).filter(lambda p: any(r.strip() for _, r in p)))
def test_nlg_scores_equal_pycocoevalcap(pairs):
    written, true = ({i: [pair[side]] for i, pair in enumerate(pairs)} for side in (0, 1))
    scores = nlg_scores([w for w, _ in pairs], [t for _, t in pairs], metrics=NO_JAVA)
    bleu, by_study = Bleu(4).compute_score(true, written, verbose=0)
    for order in range(4):
        assert scores[f"bleu_{order + 1}"] == pytest.approx(bleu[order], abs=1e-12)
        assert scores["per_study"][f"bleu_{order + 1}"] == pytest.approx(by_study[order], abs=1e-12)
    for name, scorer in (("rouge_l", Rouge()), ("cider", Cider())):
        value, by_study = scorer.compute_score(true, written)
        assert scores[name] == pytest.approx(value, abs=1e-12)
        assert scores["per_study"][name] == pytest.approx(list(by_study), abs=1e-12)


@needs_java
def test_meteor_of_odd_reports_equals_pycocoevalcap(java):
    odd = ['say "normal"', "two\nlines\r\nand\ttabs", "a ||| b", "|||", "lungs \U0001fac1 clear", " . ", "\u2028 x"]
    written = PREDICTIONS + odd
    true = REFERENCES + ["the lungs ||| are clear .\nno effusion"] * len(odd)
    plain = [[" ".join(text.replace("|||", " ").split()) for text in texts] for texts in (true, written)]
    scores = nlg_scores(written, true, metrics=["meteor"])
    value, by_study = meteor_directly(*plain, java())
    assert scores["meteor"] == pytest.approx(value, abs=1e-12)
    assert scores["per_study"]["meteor"] == pytest.approx(by_study, abs=1e-12)


@needs_java
@pytest.mark.slow
def test_meteor_of_ten_thousand_odd_reports_starts_one_process(started):
    rng = random.Random(0)
    odd = [
        '"',
        "'",
        "\n",
        "\r\n",
        "\t",
        "|||",
        " ||| ",
        "\U0001fac1",
        "\ud83d",
        "\x00",
        "\x85",
        "\u2028",
        "EVAL",
        "%s",
        "",
    ]
    odd += ["SCORE ||| a ||| b", "\N{COMBINING ACUTE ACCENT}", "\u202e"]

    def written():
        return rng.choice([" ", ""]).join(rng.choices(WORDS + odd, k=rng.choice([0, 1, 10, 60])))

    predictions, references = ([written() for _ in range(10_000)] for _ in range(2))
    predictions[7], references[7] = "clear " * 300, "the lungs are clear " * 100
    scores = nlg_scores(predictions, references)
    assert all(len(scores["per_study"][name]) == 10_000 for name in NLG_METRICS)
    assert len(started) <= 1
    # answers belong to their reports: others before them do not change them
    few = nlg_scores(predictions[:9900:-1], references[:9900:-1], metrics=["meteor"])
    assert few["per_study"]["meteor"] == scores["per_study"]["meteor"][:9900:-1]


@pytest.mark.skipif("OTDRG_IU_XRAY" not in os.environ, reason="OTDRG_IU_XRAY does not name the IU X-Ray folder")
@pytest.mark.slow
def test_nlg_scores_on_iu_validation_equal_pycocoevalcap(java):
    folder = Path(os.environ["OTDRG_IU_XRAY"])
    annotation = json.loads((folder / "annotation.json").read_text(encoding="utf-8"))
    true, train = (
        [clean_report(study["report"], "r2gen_iu") for study in annotation[split]] for split in ("val", "train")
    )

    def small(split):
        """(N, 256) each study's first view at 16 x 16 pixels."""
        pixels = []
        for study in annotation[split]:
            view = Image.open(folder / "images" / study["image_path"][0])
            view.draft("L", (32, 32))  # reads an eighth of the resolution, in a fraction of the time
            pixels.append(np.asarray(view.convert("L").resize((16, 16)), dtype=float).ravel())
        return np.array(pixels)

    queries, keys = small("val"), small("train")
    nearest = nearest_neighbours(queries - keys.mean(axis=0), keys - keys.mean(axis=0), 1)[:, 0]
    written = [train[place] for place in nearest]
    assert len(set(nearest.tolist())) > len(true) // 2  # they are retrieved, and not the same few for all
    scores = nlg_scores(written, true)
    by_id = [{i: [text] for i, text in enumerate(texts)} for texts in (true, written)]
    expected = dict(zip(NLG_METRICS[:4], zip(*Bleu(4).compute_score(*by_id, verbose=0), strict=True), strict=True))
    expected |= {"rouge_l": Rouge().compute_score(*by_id), "cider": Cider().compute_score(*by_id)}
    if scores["meteor"] is not None:
        expected["meteor"] = meteor_directly(true, written, java())
    for name, (value, by_study) in expected.items():
        assert scores[name] == pytest.approx(value, abs=1e-9)
        assert scores["per_study"][name] == pytest.approx(list(by_study), abs=1e-9)


@needs_java
@pytest.mark.slow  # another Java, which takes 10 seconds of CPU time to start
def test_meteor_starts_java_once_and_ends_it_with_the_process():
    code = """
import subprocess
popen, started = subprocess.Popen, []
subprocess.Popen = lambda *args, **kwargs: started.append(popen(*args, **kwargs)) or started[-1]
from otdrg.metrics import nlg_scores
for _ in range(3):
    nlg_scores(["the lungs are clear ."], ["no effusion ."], ["meteor"])
print(*[process.pid for process in started if "java" in process.args])
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stderr == ""
    (java,) = ran.stdout.split()
    with pytest.raises(ProcessLookupError):
        os.kill(int(java), 0)


#: Answers in METEOR's protocol: the counts and the score of a report are its number of words.
WORD_COUNTER = f"""#!{sys.executable}
import sys
for line in sys.stdin:
    command, *fields = line.split("|||")
    if command == "SCORE ":
        print(*[len(fields[-1].split())] * 23, flush=True)
    else:
        scores = [int(field.split()[0]) for field in fields]
        print(*scores, sum(scores), sep="\\n", flush=True)
"""


def test_meteor_after_an_interruption_starts_anew(monkeypatch, tmp_path, started):
    (tmp_path / "java").write_text(WORD_COUNTER)
    (tmp_path / "java").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    expected = nlg_scores(PREDICTIONS, REFERENCES, metrics=["meteor"])
    assert expected["per_study"]["meteor"] == [len(text.split()) for text in PREDICTIONS]
    started.clear()

    def interrupt(scorer, *texts):
        scorer.meteor_p.stdin.write(b"SCORE ||| no effusion ||| effusion\n")
        scorer.meteor_p.stdin.flush()
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Meteor, "_stat", interrupt)
        with pytest.raises(KeyboardInterrupt):
            nlg_scores(PREDICTIONS, REFERENCES, metrics=["meteor"])
    for _ in range(2):
        assert nlg_scores(PREDICTIONS, REFERENCES, metrics=["meteor"]) == expected
    assert len(started) == 1


def test_meteor_with_dying_java_reports_its_error(monkeypatch, tmp_path):
    java = tmp_path / "java"
    java.write_text("#!/bin/sh\necho 'no JVM in here' >&2\nexit 3\n")
    java.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    with pytest.raises(ChildProcessError, match=r"METEOR's Java process failed.*: no JVM in here"):
        nlg_scores(PREDICTIONS, REFERENCES, metrics=["meteor"])


def test_nlg_scores_without_java_have_no_meteor(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    scores = nlg_scores(PREDICTIONS, REFERENCES)
    assert scores["meteor"] is None
    assert "install a Java runtime" in scores["notes"]["meteor"]
    assert scores["cider"] > 0


def test_nlg_scores_print_nothing(capsys):
    nlg_scores(PREDICTIONS, REFERENCES, metrics=NO_JAVA)
    assert capsys.readouterr() == ("", "")


def test_nlg_scores_of_chosen_metrics_have_no_others():
    scores = nlg_scores(PREDICTIONS, REFERENCES, metrics=["bleu", "cider"])
    assert set(scores) == {"bleu_1", "bleu_2", "bleu_3", "bleu_4", "cider", "per_study", "notes"}


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((["a"], ["a", "b"]), ValueError, "'predictions': 1, 'references': 2"),
        ((["a", None], ["a", "b"]), TypeError, r"predictions\[1\] is NoneType"),
        ((["a"], [["a"]]), TypeError, r"references\[0\] is list"),
        ((["a"], [" "]), ValueError, "none of 1 holds a word"),
        (([], []), ValueError, "none of 0 holds a word"),
        ((["a"], ["a"], ["bleu_5"]), ValueError, r"unknown metrics \['bleu_5'\]"),
        ((["a"], ["a"], "cider"), ValueError, "expected a list"),
    ],
)
def test_nlg_scores_name_faults(arguments, error, message):
    with pytest.raises(error, match=message):
        nlg_scores(*arguments)


def test_evaluate_loads_both_modules_offline(monkeypatch, tmp_path):
    import evaluate

    monkeypatch.setattr(evaluate.config, "HF_EVALUATE_OFFLINE", True)
    monkeypatch.setattr(evaluate.config, "HF_MODULES_CACHE", tmp_path / "modules")
    monkeypatch.setattr("sys.path", [*sys.path])
    nlg, clinical = (
        evaluate.load(str(ROOT / "metrics" / name), cache_dir=str(tmp_path / "cache"))
        for name in ("nlg", "clinical_efficacy")
    )
    texts = {"predictions": ["the lungs are clear", ""], "references": ["the lungs are clear .", "no effusion"]}
    scores = nlg.compute(**texts, metrics=["bleu_1", "rouge_l"])
    assert scores["bleu_1"] > 0 and len(scores["per_study"]["rouge_l"]) == 2, scores
    states = [[1] + [0] * 13, [2] * 13 + [1]]
    scores = clinical.compute(predictions=states, references=states)
    assert scores["micro_f1_14_uncertain_negative"] == 1, scores
    assert nlg.description and nlg.inputs_description
