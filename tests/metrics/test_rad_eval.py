"""Scores by RadEval: without it, without its weights, and, where it is installed, against RadEval called directly."""

import csv
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import otdrg
import pytest
from otdrg.cli import main
from otdrg.metrics import (
    RADEVAL_METRICS,
    MetricResult,
    StudyStatistics,
    bootstrap_intervals,
    compare_systems,
    nlg_scores,
    score_reports,
)

REFERENCES = [
    "The heart is large . Small left pleural effusion .",
    "The lungs are clear . No pneumothorax .",
    "No edema seen .",
    "Normal heart . Clear lungs .",
]
PREDICTIONS = [
    "The heart is large . The lungs are clear .",
    "The lungs are clear . No pneumothorax .",
    "Small right effusion .",
    "Large heart . No edema seen .",
]
needs_radeval = pytest.mark.skipif(importlib.util.find_spec("radeval") is None, reason="radeval is not installed")


@pytest.fixture
def files(tmp_path):
    paths = {name: tmp_path / f"{name}.csv" for name in ("predictions", "references", "against")}
    for path, reports in zip(paths.values(), (PREDICTIONS, REFERENCES, REFERENCES[::-1]), strict=True):
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([("id", "report"), *enumerate(reports)])
    return {**paths, "output": tmp_path / "out.json"}


def typed(files, *metrics):
    return [
        "score",
        *(word for name, path in files.items() for word in (f"--{name}", str(path))),
        "--metrics",
        *metrics,
    ]


def test_score_without_radeval_computes_the_rest(files, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "radeval", None)
    assert main(typed(files, "rouge_l", "radgraph")) == 0
    result = json.loads(files["output"].read_text())
    assert result["nlg"]["rouge_l"] == nlg_scores(PREDICTIONS, REFERENCES, ["rouge_l"])["rouge_l"]
    assert result["radeval"] == dict.fromkeys(RADEVAL_METRICS["radgraph"].scores)
    assert 'pip install "otdrg[radeval]"' in result["notes"]["radgraph"]
    assert "| RadGraph-F1, simple | – | – |" in capsys.readouterr().out
    files["output"] = files["output"].with_name("alone.json")
    assert main(typed(files, "radgraph", "ratescore")) != 0
    error = capsys.readouterr().err.strip()
    assert "radgraph: RadEval is not installed" in error and "ratescore: RadEval is not" in error and "\n" not in error


def test_score_reports_unknown_metric_is_named():
    with pytest.raises(ValueError, match=r"unknown metrics \['radgraf'\]: expected some of bleu, .* radgraph, "):
        score_reports(PREDICTIONS, REFERENCES, metrics=["radgraf"])


def test_radeval_only_means_have_intervals():
    rng = np.random.default_rng(0)
    made_up = [{"ratescore": rng.random(40).tolist(), "radcliq_v1": rng.random(40).tolist()} for _ in range(2)]
    systems = []
    for each in made_up:
        results = {
            "ratescore": MetricResult.from_means({"ratescore": each["ratescore"]}),
            "radcliq": MetricResult({"radcliq_v1": 1.0}, {"radcliq_v1": each["radcliq_v1"]}),
        }
        systems.append(StudyStatistics(results, {name: list(result.scores) for name, result in results.items()}))
    means = [np.mean(each["ratescore"]) for each in made_up]
    intervals = bootstrap_intervals(systems[0], resamples=4000)
    assert list(intervals) == ["ratescore"]
    spread = 1.96 * np.std(made_up[0]["ratescore"]) / np.sqrt(40)
    assert intervals["ratescore"] == pytest.approx((means[0], means[0] - spread, means[0] + spread), abs=0.01)
    compared = compare_systems(*systems, resamples=100)["ratescore"]
    assert compared[:3] == pytest.approx((means[0], means[1], means[0] - means[1]))


def environment(folder):
    return {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(folder / "hub"),
        "XDG_CACHE_HOME": str(folder / "cache"),
        "NLTK_DATA": str(folder / "nltk"),
        "PYTHONPATH": str(Path(otdrg.__file__).parent.parent),
    }


def run(folder, *arguments):
    """What a new Python says, which reads the folders' names from its environment before it imports anything."""
    done = subprocess.run(
        [sys.executable, *map(str, arguments)], env=environment(folder), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    run(folder, Path(__file__).with_name("radeval_weights.py"))
    return folder


_BOTH = """
import json, sys
from otdrg.metrics import METRICS
predictions, references, metrics = json.loads(sys.argv[1])
results = [METRICS[name].compute(predictions, references) for name in metrics]
ours = {score: value for result in results for score, value in result.scores.items()}
ours["per_study"] = {score: values for result in results for score, values in result.per_study.items()}
ours["notes"] = {name: note for result in results for name, note in result.notes.items()}
from radeval import RadEval
directly = {}
for name in metrics:
    try:
        evaluator = RadEval(metrics=[name], show_progress=False)
    except Exception:
        continue
    texts = {"refs": references, "hyps": [text.strip() for text in predictions]}
    whole = evaluator(**texts)
    evaluator.per_sample = True
    directly[name] = [{key: float(value) for key, value in whole.items()}, evaluator(**texts)]
print("\\n" + json.dumps([ours, directly]))
"""


def both(folder, predictions, references, metrics):
    """Our scores and RadEval's own, aggregates and studies' values by metric, of those it can compute here."""
    printed = run(folder, "-c", _BOTH, json.dumps([predictions, references, metrics]))
    return json.loads(printed.splitlines()[-1])


@pytest.mark.slow
@needs_radeval
def test_radeval_scores_equal_radeval_called_directly(weights):
    ours, directly = both(weights, PREDICTIONS, REFERENCES, list(RADEVAL_METRICS))
    # RaTEScore's spaCy may not fit the NumPy that is installed; stanza's models are downloaded by stanza itself.
    assert set(directly) >= set(RADEVAL_METRICS) - {"ratescore", "temporal"}
    assert set(ours["notes"]) == {*set(RADEVAL_METRICS) - set(directly), "crimson"}
    # Random weights write nothing that GREEN and CRIMSON can read: GREEN is 0, and CRIMSON has no value.
    assert ours["green"] == directly.pop("green")[0]["green"] == 0 and ours["per_study"]["green"] == [0] * 4
    assert ours["crimson"] is None and np.isnan(directly.pop("crimson")[1]["crimson"]).all()
    assert ours["notes"]["crimson"] == "no value for 4 of 4 reports; the mean is of the others"
    for name, (whole, by_study) in directly.items():
        assert list(whole) == list(by_study)
        assert set(whole) == set(RADEVAL_METRICS[name].scores)
        for score, value in whole.items():
            assert ours[score] == pytest.approx(value, abs=5.1e-5)
            assert ours["per_study"][score] == pytest.approx(by_study[score], abs=1e-6)
            assert len(set(by_study[score])) > 1
            if name not in ("radcliq", "srrbert"):
                assert ours[score] == pytest.approx(np.mean(by_study[score]), abs=1e-6)
    assert ours["radcliq_v1"] == pytest.approx(1 / np.mean(ours["per_study"]["radcliq_v1"]), abs=1e-4)


@pytest.mark.slow
@needs_radeval
def test_radeval_blank_reports_score_zero_or_are_refused(weights):
    blank = [*PREDICTIONS[:2], " \n", PREDICTIONS[3]]
    ours, directly = both(weights, blank, REFERENCES, ["radgraph", "ratescore"])
    assert ours["per_study"]["radgraph_simple"] == pytest.approx(directly["radgraph"][1]["radgraph_simple"], abs=1e-6)
    assert ours["per_study"]["radgraph_simple"][2] == 0 < ours["per_study"]["radgraph_simple"][3]
    assert ours["ratescore"] is None and "ratescore" not in ours["per_study"]
    if "ratescore" in directly:
        assert "3 values for 4 reports" in ours["notes"]["ratescore"]


@pytest.mark.slow
@needs_radeval
def test_score_with_radeval_writes_and_prints_its_scores(weights, files):
    code = "import sys; from otdrg.cli import main; sys.exit(main(sys.argv[1:]))"
    printed = run(weights, "-c", code, *typed(files, "rouge_l", "radgraph", "radcliq"), "--bootstrap", "100")
    result = json.loads(files["output"].read_text())
    table = list(csv.DictReader(files["output"].with_suffix(".csv").open()))
    assert set(result["radeval"]) == {*RADEVAL_METRICS["radgraph"].scores, "radcliq_v1"}
    for score, value in result["radeval"].items():
        studies = [float(row[score]) for row in table]
        assert (1 / value if score == "radcliq_v1" else value) == pytest.approx(np.mean(studies), abs=1e-3)
        assert (score in result["intervals"]) == (score in result["comparison"]) == (score != "radcliq_v1")
        assert f"{score}, against" in table[0]
    assert "lower ones are better" in result["notes"]["radcliq"]
    assert printed.startswith("4 studies") and printed.count("RadGraph-F1, complete") == 2


@needs_radeval
def test_radeval_without_weights_names_them(tmp_path):
    ours, directly = both(tmp_path, PREDICTIONS, REFERENCES, ["radgraph", "srrbert"])
    assert directly == {} and ours["radgraph_simple"] is ours["srrbert_weighted_f1"] is None
    for name, weights in (("radgraph", "StanfordAIMI/RRG_scorers"), ("srrbert", "StanfordAIMI/SRR-BERT")):
        assert ours["notes"][name].startswith("RadEval could not compute it: ")
        assert weights in ours["notes"][name] and "\n" not in ours["notes"][name]


def test_score_reports_without_radeval_has_clinical_efficacy(monkeypatch):
    monkeypatch.setitem(sys.modules, "radeval", None)
    found = score_reports(PREDICTIONS, REFERENCES, [[0] * 14] * 4, [[0] * 14] * 4, ["srrbert"])
    assert found.section("nlg") == {} and set(found.section("radeval").values()) == {None} and "srrbert" in found.notes
    assert found.scores["micro_f1_14_uncertain_negative"] == 0
