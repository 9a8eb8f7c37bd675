"""Collections in the shape in which they are published, up to a trained model that writes reports."""

import io
import json

import pytest
import yaml
from otdrg.cli import main
from otdrg.findings_otdrg import FINDING_DISPLAY_NAMES
from otdrg.studies import load_studies
from otdrg.studies.loading import load_prepared
from otdrg.train_hf import main as train_hf
from published_trees import REXGRADIENT_SPLITS, CheXpertPlusDownload, ReXGradientDownload

#: CheXpert's value of each state id.
VALUES = (None, 1.0, 0.0, -1.0)


@pytest.fixture(scope="module")
def phantoms():
    """Split, image file and row of phantom studies."""
    found = []
    for split, rows in load_studies("phantom", train=8, validation=3, test=2, image_size=112).items():
        for row in rows:
            file = io.BytesIO()
            row["images"][0].save(file, "PNG")
            found.append((split, file.getvalue(), row))
    return found


def rexgradient(folder, phantoms):
    download = ReXGradientDownload(folder)
    names = dict(zip(("train", "validation", "test"), REXGRADIENT_SPLITS, strict=True))
    for number, (split, image, row) in enumerate(phantoms):
        texts = {"Findings": row["findings"], "Impression": row["impression"]}
        download.study(number, names[split], images=[image], **texts)
    return download.write()


def chexpert_plus(folder, phantoms):
    download = CheXpertPlusDownload(folder)
    for number, (split, image, row) in enumerate(phantoms):
        values = [VALUES[state] for state in row["finding_states"]]
        download.image(
            number,
            split="train" if split == "train" else "valid",
            data=image,
            labels=dict(zip(FINDING_DISPLAY_NAMES.values(), values, strict=True)),
            section_findings=row["findings"],
            section_impression=row["impression"],
        )
    return download.write()


def promptmrg(folder, phantoms):
    (folder / "images").mkdir()
    annotation = {"train": [], "val": [], "test": []}
    for number, (split, image, row) in enumerate(phantoms):
        (folder / "images" / f"{number}.png").write_bytes(image)
        annotation["val" if split == "validation" else split].append(
            {
                "id": f"{number}",
                "report": row["findings"],
                "image_path": [f"{number}.png"],
                "labels": [*row["finding_states"], 0, 0, 1, 0],
                "clip_indices": [3, 1, 2],
            }
        )
    (folder / "annotation.json").write_text(json.dumps(annotation), encoding="utf-8")
    return {"annotation": str(folder / "annotation.json"), "images": str(folder / "images"), "labels": "labels"}


@pytest.mark.parametrize(
    ("source", "write", "sections", "counts"),
    [
        ("rexgradient", rexgradient, "findings+impression", [8, 3, 2]),
        ("chexpert-plus", chexpert_plus, "findings", [8, 5]),
        ("r2gen", promptmrg, "findings", [8, 3, 2]),
    ],
)
def test_published_tree_trains_a_model_that_writes_reports(
    source, write, sections, counts, phantoms, tiny_recipe, tmp_path, capsys
):
    options = [f"--{name}={value}" for name, value in write(tmp_path, phantoms).items()]
    studies, run = tmp_path / "studies", tmp_path / "run"
    assert main(["prepare", source, *options, "--sections", sections, "--output", str(studies)]) == 0
    assert [len(rows) for rows in load_prepared(studies).values()] == counts
    recipe = yaml.safe_load(tiny_recipe.read_text(encoding="utf-8"))
    recipe |= {"output_dir": str(run), "studies": {"source": "prepared", "options": {"folder": str(studies)}}}
    if source == "rexgradient":  # the others have labels
        recipe["labels"] = {"labeler": "rules"}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    assert train_hf([str(path)]) == 0
    capsys.readouterr()
    assert main(["generate", str(run), "--studies", str(studies), "--split", "validation", "--json"]) == 0
    written = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(written) == counts[1] and all(study["report"] for study in written)
