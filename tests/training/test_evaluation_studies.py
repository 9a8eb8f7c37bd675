"""Which studies a model is evaluated on, and whether their counts are the published ones."""

import json

import pytest
from otdrg.labelers import write_states
from otdrg.studies.iu_xray_split import r2gen_split_ids
from otdrg.training.data import build_studies, check_counts, evaluation_studies
from otdrg.training.recipe import LabelsRecipe, StudiesRecipe, find_run, load_recipe
from PIL import Image


@pytest.fixture(scope="module")
def iu_xray(tmp_path_factory):
    """The recipe's section of an R2Gen annotation of two training studies and one of validation, out of thousands."""
    folder = tmp_path_factory.mktemp("iu_xray")
    Image.linear_gradient("L").save(folder / "view.png")
    ids = r2gen_split_ids()
    study = {"report": "The heart is normal. The lungs are clear.", "image_path": ["view.png", "view.png"]}
    annotation = {
        "train": [{"id": name, **study} for name in ids["train"][:2]],
        "val": [{"id": ids["validation"][0], **study}, {"id": ids["validation"][1], **study, "report": " "}],
    }
    (folder / "annotation.json").write_text(json.dumps(annotation), encoding="utf-8")
    options = {"annotation": str(folder / "annotation.json"), "images": str(folder)}
    return StudiesRecipe(source="r2gen", options=options, cleaning="r2gen_iu")


def test_check_counts_differs_from_published_warns(iu_xray):
    splits = build_studies(iu_xray, LabelsRecipe(labeler="rules"), splits=("train", "validation"))
    counts, warnings = check_counts(iu_xray, splits)
    assert counts["train"] == {"studies": 2, "images": 4, "published": 2069, "unit": "studies"}
    assert counts["validation"] == {"studies": 1, "images": 2, "published": 296, "unit": "studies"}
    assert [line.partition(";")[0] for line in warnings] == [
        "train: 2 studies, 2,069 in the published split",
        "validation: 1 studies, 296 in the published split",
    ]
    assert f"left out: {r2gen_split_ids()['validation'][1]}; not in the source: " in warnings[1]


def test_check_counts_limited_split_is_not_compared(iu_xray):
    limited = StudiesRecipe(**{**vars(iu_xray), "limit": {"train": 1}})
    splits = build_studies(limited, LabelsRecipe(labeler="rules"), splits=("train", "validation"))
    _, warnings = check_counts(limited, splits)
    assert [line.partition(":")[0] for line in warnings] == ["validation", "train"]
    assert warnings[1] == "train: the first 1 studies only, as studies.limit says"


def test_evaluation_studies_csv_of_training_states_is_enough(iu_xray, tmp_path):
    train = r2gen_split_ids()["train"][0]
    write_states(tmp_path / "states.csv", [(train, [0] * 14)])
    labels = LabelsRecipe(csv=str(tmp_path / "states.csv"), labeler="rules")
    assert list(build_studies(iu_xray, labels, splits=("validation",))) == ["validation"]
    write_states(tmp_path / "states.csv", [("other", [0] * 14)])
    with pytest.raises(ValueError, match="names none of the studies"):
        build_studies(iu_xray, labels, splits=("validation",))


def test_evaluation_studies_same_dataset_by_another_path_is_recognised(iu_xray, tmp_path, monkeypatch):
    path = tmp_path / "run" / "recipe.yaml"
    path.parent.mkdir()
    path.write_text(
        json.dumps({"output_dir": "x", "studies": vars(iu_xray), "labels": {"labeler": "rules"}}), encoding="utf-8"
    )
    own = load_recipe(path)
    (tmp_path / "run" / "model").mkdir()
    assert find_run(tmp_path / "run") == find_run(tmp_path / "run" / "model") == tmp_path / "run"
    assert find_run(tmp_path) is None and find_run("org/otdrg") is None
    other = tmp_path / "other.yaml"
    moved = {**vars(iu_xray), "options": {**iu_xray.options, "images": "linked"}, "cleaning": "none"}
    other.write_text(
        json.dumps({"output_dir": "x", "studies": moved, "labels": {"labeler": "rules"}}), encoding="utf-8"
    )
    (tmp_path / "linked").symlink_to(iu_xray.options["images"])
    monkeypatch.chdir(tmp_path)
    found = evaluation_studies(str(other), "validation", own)
    assert found.zero_shot is False and found.training_from == "split train of the dataset"
    assert found.cleaning == "none" and found.rows["report"] == ["The heart is normal. The lungs are clear."]
    assert found.rows["finding_states"][0] is not None and len(found.training) == 2


def test_evaluation_studies_missing_training_names_the_option(iu_xray, tmp_path):
    path = tmp_path / "recipe.yaml"
    gone = {**vars(iu_xray), "options": {"annotation": "gone.json", "images": "gone"}}
    path.write_text(json.dumps({"output_dir": "x", "studies": gone}), encoding="utf-8")
    own = load_recipe(path)
    other = tmp_path / "other.yaml"
    other.write_text(
        json.dumps({"output_dir": "x", "studies": vars(iu_xray), "labels": {"labeler": "rules"}}), encoding="utf-8"
    )
    with pytest.raises(ValueError, match=r"was trained on cannot be read \(.*gone.json.*\): expected --train-from"):
        evaluation_studies(str(other), "validation", own)
    found = evaluation_studies(str(other), "validation", own, train_from=str(other))
    assert found.zero_shot is True and found.training_from == f"split train of {other}"
