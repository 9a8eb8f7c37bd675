"""`otdrg embed`: which studies are taken, silhouettes against scikit-learn's, and the command on a trained run."""

import csv
import json
import shutil

import numpy as np
import pytest
import sklearn.metrics as sklearn_metrics
import yaml
from otdrg.cli import main
from otdrg.evaluation.embedding import MINIMUM_STUDIES, embed, separation, single_findings
from otdrg.findings_otdrg import FINDINGS
from otdrg.inference.loading import load_pipeline
from PIL import Image
from scipy.spatial.distance import cosine


def states(**positive):
    return [1 if positive.get(name) else 2 for name in FINDINGS]


def clusters(spread, rng, each=20):
    """Features of two findings on two axes, and their names."""
    features = np.repeat(np.eye(6)[:2], each, axis=0) + spread * rng.normal(size=(2 * each, 6))
    return features, ["edema"] * each + ["fracture"] * each


def test_single_findings_keeps_studies_with_one_and_counts_the_others():
    both, edema, normal, rare = states(edema=1, fracture=1), states(edema=1), states(no_finding=1), states(fracture=1)
    rows = [None, both, *[edema, normal] * MINIMUM_STUDIES, rare, states(), *[edema] * 3]
    chosen = single_findings(rows, limit=2 * MINIMUM_STUDIES + 2)
    assert chosen.positions == [*range(2, 2 + 2 * MINIMUM_STUDIES), 2 * MINIMUM_STUDIES + 4]
    assert chosen.findings == ["edema", "no_finding"] * MINIMUM_STUDIES + ["edema"]
    assert list(chosen.left_out.values()) == [1, 2, 2, 1]
    assert len(chosen.positions) + sum(chosen.left_out.values()) == len(rows)
    with pytest.raises(ValueError, match="1 findings are the only positive one in at least 5 of 6 studies"):
        single_findings([edema] * 5 + [both], limit=100)


def test_separation_equals_scikit_learn_within_its_interval():
    rng = np.random.default_rng(0)
    before, findings = clusters(0.8, rng)
    after, _ = clusters(0.2, rng)
    scores = separation(before, after, findings, resamples=500, permutations=50)
    for space, features in (("before", before), ("after", after)):
        expected = sklearn_metrics.silhouette_score(features, findings, metric="cosine")
        assert scores[space]["silhouette"] == pytest.approx(expected, abs=1e-9)
        assert scores[space]["low"] < expected < scores[space]["high"]
        assert len(scores[space]["studies"]) == 40
        assert np.mean(list(scores[space]["findings"].values())) == pytest.approx(expected, abs=1e-9)
    difference = scores["difference"]
    assert difference["silhouette"] == pytest.approx(scores["after"]["silhouette"] - scores["before"]["silhouette"])
    assert difference["low"] > 0
    assert scores["after"]["chance"]["high"] < 0.2 < scores["after"]["low"]
    again = separation(before, after, findings, resamples=500, permutations=50)
    assert again == scores


def test_separation_of_scaled_features_has_no_difference():
    features, findings = clusters(0.5, np.random.default_rng(2))
    difference = separation(features, 3 * features, findings, resamples=50, permutations=2)["difference"]
    assert difference["low"] == pytest.approx(0, abs=1e-12) and difference["high"] == pytest.approx(0, abs=1e-12)


def test_embed_keeps_clusters_and_is_seeded():
    features, findings = clusters(0.1, np.random.default_rng(3))
    places = embed(features, seed=1)
    assert places.shape == (40, 2) and np.array_equal(places, embed(features, seed=1))
    assert sklearn_metrics.silhouette_score(places, findings) > 0.5


# --- the command -----------------------------------------------------------------------------------------------------


def run_embed(model, output, *arguments):
    return main(["embed", str(model), *map(str, arguments), "--output", str(output), "--resamples", "50"])


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory):
    """A prepared dataset of 140 test studies."""
    folder = tmp_path_factory.mktemp("prepared") / "phantoms"
    sizes = ["--train", "1", "--validation", "0", "--test", "140", "--image-size", "112"]
    assert main(["prepare", "phantom", *sizes, "--output", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def embedded(trained_run, phantoms, tmp_path_factory):
    """Folder of what the command leaves of them."""
    folder = tmp_path_factory.mktemp("embedding")
    assert run_embed(trained_run, folder, phantoms) == 0
    return folder


def test_embed_writes_picture_figures_and_one_row_per_study(embedded, phantoms):
    result = json.loads((embedded / "embedding.json").read_text(encoding="utf-8"))
    assert sum(result["by_finding"].values()) == result["studies"] == 140 - sum(result["left_out"].values())
    with (embedded / "embedding.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == result["studies"]
    for space in ("before", "after"):
        values = [float(row[f"{space} silhouette"]) for row in rows]
        assert np.mean(values) == pytest.approx(result[space]["silhouette"], abs=1e-6)
        assert result[space]["low"] <= result[space]["silhouette"] <= result[space]["high"]
    with Image.open(embedded / "embedding.png") as picture:
        assert picture.width > picture.height > 500


def test_embed_uses_the_models_features(embedded, trained_run, phantoms):
    from otdrg.studies.loading import load_prepared

    with (embedded / "embedding.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    studies = load_prepared(phantoms)["test"]
    place = {study: position for position, study in enumerate(studies["id"])}
    pipe = load_pipeline(str(trained_run))
    before, after = [], []
    for row in rows:
        inputs = pipe.processor.encode_images([studies[place[row["id"]]]["images"]])
        features = pipe.model.encode_views(inputs["pixel_values"])
        before.append(features[0, 0].mean(dim=0).detach().numpy())
        after.append(pipe.model.image_projector(features[0, 0]).mean(dim=0).detach().numpy())
    findings = [row["finding"] for row in rows]
    for space, features in (("before", before), ("after", after)):
        distances = np.array([[cosine(one, other) for other in features] for one in features], dtype=float)
        np.fill_diagonal(distances, 0)
        expected = sklearn_metrics.silhouette_samples(distances, findings, metric="precomputed")
        np.testing.assert_allclose([float(row[f"{space} silhouette"]) for row in rows], expected, atol=1e-3)


def test_embed_without_dataset_uses_the_recipes_studies(trained_run, tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    shutil.copytree(trained_run / "model", run / "model")
    recipe = yaml.safe_load((trained_run / "recipe.yaml").read_text(encoding="utf-8"))
    recipe["studies"]["options"] |= {"train": 100}
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    assert run_embed(run, tmp_path / "out", "--split", "train", "--limit", "48") == 0
    shown = capsys.readouterr().out
    assert "studies of train with exactly one positive finding" in shown and "| before alignment |" in shown
    assert json.loads((tmp_path / "out" / "embedding.json").read_text(encoding="utf-8"))["studies"] < 48


def test_embed_wrong_input_is_one_line(trained_run, phantoms, embedded, model, processor, tmp_path, capsys):
    model.save_pretrained(tmp_path / "bare")
    processor.save_pretrained(tmp_path / "bare")
    for arguments, message in (
        ((trained_run, tmp_path / "out", "--limit", "0"), "--limit is 0: expected 1 or more"),
        ((trained_run, tmp_path / "out", "--split", "test"), "recipe.yaml has train, validation"),
        ((trained_run, tmp_path / "out", phantoms, "--split", "validation"), "--split validation: "),
        ((trained_run, tmp_path / "out", tmp_path / "none"), "not a prepared dataset"),
        ((trained_run, tmp_path / "out", phantoms, "--split", "train"), "0 findings are the only positive one"),
        ((tmp_path / "bare", tmp_path / "out"), "has no recipe.yaml: expected DATASET"),
        ((trained_run, embedded, phantoms), "embedding.png exists: --overwrite replaces it"),
    ):
        assert run_embed(*arguments) == 1
        shown = capsys.readouterr().err.strip().splitlines()[-1]
        assert shown.startswith("otdrg embed: error: ") and message in shown


def test_embed_without_matplotlib_names_the_extra(trained_run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert run_embed(trained_run, tmp_path) == 1
    assert 'the picture needs matplotlib: pip install "otdrg[figures]"' in capsys.readouterr().err
