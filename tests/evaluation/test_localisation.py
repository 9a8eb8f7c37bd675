"""`otdrg localise`: a trained model's plans over phantoms, judged on the phantoms' masks."""

import csv
import json

import numpy as np
import pytest
import torch
from otdrg.cli import main
from otdrg.evaluation.localisation import judge_phantoms
from otdrg.findings_otdrg import FINDINGS
from otdrg.inference.heatmaps import upsample_lift
from otdrg.inference.loading import load_pipeline
from otdrg.metrics import pointing_game, soft_iou
from otdrg.studies.phantom import SPLIT_STARTS, PhantomSource, make_phantom


def localise(run, output, *arguments):
    return main(["localise", str(run), "--output", str(output), "--resamples", "100", *arguments])


@pytest.fixture(scope="module")
def judged(trained_run, tmp_path_factory):
    """Folder of the results on 40 phantoms."""
    folder = tmp_path_factory.mktemp("localisation")
    assert localise(trained_run, folder, "--studies", "40") == 0
    return folder


def test_localise_writes_table_figures_and_one_row_per_map(judged):
    result = json.loads((judged / "localisation.json").read_text(encoding="utf-8"))
    assert (result["split"], result["studies"], result["states"]) == ("test", 40, "true")
    assert (result["image_size"], result["views"], result["image_grid"]) == (112, ["frontal"], 3)
    with (judged / "localisation.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == sum(counts["judged"] for counts in result["counts"].values()) > 20
    for name, scores in result["findings"].items():
        mine = [row for row in rows if row["finding"] == name]
        assert scores["studies"] == len(mine)
        for measure in ("pointing", "soft_iou"):
            assert scores[measure]["value"] == pytest.approx(np.mean([float(row[measure]) for row in mine]), abs=1e-6)
    shown = (judged / "localisation.md").read_text(encoding="utf-8")
    assert all(sentence in shown for sentence in result["verdicts"])
    assert "| Cardiomegaly |" in shown and "40 phantoms of the split test" in shown


def test_localise_judges_the_pipelines_heatmap(judged, trained_run):
    with (judged / "localisation.csv").open(encoding="utf-8") as file:
        row = next(csv.DictReader(file))
    phantom = make_phantom(0, int(row["id"].split("-")[2]), 112, ["frontal"])
    assert int(row["id"].split("-")[2]) >= SPLIT_STARTS["test"] and row["state"] == "positive"
    states = {name: int(state) for name, state in zip(FINDINGS, phantom.states, strict=True)}
    pipe = load_pipeline(str(trained_run))
    (record,) = pipe(phantom.images[0], findings=states, return_heatmaps=True, max_new_tokens=1)
    heat = upsample_lift(record["heatmaps"][row["finding"]][0], (112, 112))[None]
    mask = phantom.masks[row["finding"]][0][None]
    assert float(row["uniform"]) == pytest.approx(mask.mean(), abs=1e-6)
    assert float(row["pointing"]) == pytest.approx(pointing_game(heat, mask).item(), abs=1e-5)
    assert float(row["soft_iou"]) == pytest.approx(soft_iou(heat, mask).item(), abs=1e-5)


def test_localise_predicted_makes_plans_for_predicted_states(trained_run, tmp_path):
    arguments = ("--studies", "6", "--seed", "3", "--findings", "Cardiomegaly", "pleural_effusion", "edema")
    assert localise(trained_run, tmp_path / "true", *arguments) == 0
    assert (
        localise(trained_run, tmp_path / "predicted", *arguments, "--predicted", "--views", "frontal", "lateral") == 0
    )
    true, predicted = (
        json.loads((tmp_path / name / "localisation.json").read_text(encoding="utf-8"))
        for name in ("true", "predicted")
    )
    assert set(true["counts"]) == set(predicted["counts"]) == {"cardiomegaly", "pleural_effusion", "edema"}
    assert predicted["states"] == "predicted" and predicted["views"] == ["frontal", "lateral"] and true["seed"] == 3
    positives = [sum(counts["positive"] for counts in result["counts"].values()) for result in (true, predicted)]
    assert positives[0] == positives[1] > 0
    assert sum(counts["given_positive"] for counts in true["counts"].values()) == positives[0]
    for counts in predicted["counts"].values():
        assert counts["judged"] + counts["unseen"] + counts["covering"] == 2 * counts["positive"]


class PeakAtMask(torch.nn.Module):
    """Of a model, what `judge_phantoms` uses: its plan for a finding is highest where `truth` says."""

    device = torch.device("cpu")
    has_heatmaps = True

    def __init__(self, config, lifts):
        super().__init__()
        self.config, self.lifts = config, lifts

    def encode_views(self, pixel_values, view_mask, reader):
        return pixel_values

    def transport_lift(self, view_features, view_mask, states):
        taken, self.lifts = self.lifts[: len(states)], self.lifts[len(states) :]
        return torch.from_numpy(taken)


def test_judge_phantoms_plan_on_the_mask_beats_chance(trained_run):
    pipe = load_pipeline(str(trained_run))
    source = PhantomSource(image_size=112)
    first = SPLIT_STARTS["test"]
    lifts = np.full((60, 1, 14, 56, 56), 0.1, dtype=np.float32)
    for place in range(60):
        for finding, (mask,) in make_phantom(0, first + place, 112, ["frontal"]).masks.items():
            lifts[place, 0, FINDINGS.index(finding)] += mask.reshape(56, 2, 56, 2).mean(axis=(1, 3))
    lifts[:, :, FINDINGS.index("edema")] = 0.0
    judged = judge_phantoms(PeakAtMask(pipe.model.config, lifts), pipe.processor, source, first, 60)
    assert judged.ids[0] == f"phantom-0-{first}" and len(judged.ids) == 60
    assert judged.counts["edema"].without_mass == judged.counts["edema"].judged > 0
    others = [one for one in judged.maps if one.finding != "edema" and one.pointing_others == one.pointing_others]
    assert np.mean([one.pointing for one in others]) > 0.95
    assert np.mean([one.soft_iou for one in others]) > np.mean([one.soft_iou_others for one in others]) + 0.1
    assert all(one.pointing == one.soft_iou == 0 for one in judged.maps if one.finding == "edema")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--studies", "0"], "--studies is 0: expected 1 or more"),
        (["--findings", "rickets"], "unknown finding 'rickets'"),
        (["--findings", "no_finding"], "--findings no_finding: it has no place in an image"),
        (["--views", "oblique"], "option 'views' is ['oblique']: expected one or more of frontal, lateral"),
        (["--seed", "-1"], "option 'seed' is -1"),
    ],
)
def test_localise_wrong_input_is_one_line(trained_run, tmp_path, capsys, arguments, message):
    assert localise(trained_run, tmp_path / "out", *arguments) == 1
    shown = capsys.readouterr().err.strip()
    assert shown.startswith("otdrg localise: error: ") and message in shown and "\n" not in shown


def test_localise_without_overwrite_keeps_results(judged, trained_run, capsys):
    assert localise(trained_run, judged) == 1
    assert "localisation.md exists: --overwrite replaces it" in capsys.readouterr().err


def test_localise_model_without_plan_is_refused(model, processor, build_model, tmp_path, capsys):
    plain, _ = build_model(fiot=False)
    plain.save_pretrained(tmp_path / "plain")
    processor.save_pretrained(tmp_path / "plain")
    assert localise(tmp_path / "plain", tmp_path / "out", "--studies", "2") == 1
    assert "OTDRGConfig.fiot=False: this model has no transport plan" in capsys.readouterr().err
