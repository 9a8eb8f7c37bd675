"""Fingerprints of studies differ where the studies do."""

import shutil

from otdrg.studies import prepare_studies
from otdrg.studies.build import BuildOptions
from otdrg.studies.fingerprint import differing_splits, fingerprint
from otdrg.training.data import build_studies
from otdrg.training.recipe import LabelsRecipe, StudiesRecipe
from PIL import Image

PHANTOMS = {"train": 9, "validation": 3, "test": 0, "image_size": 112, "views": ["frontal", "lateral"]}


def built(**options):
    return build_studies(StudiesRecipe(source="phantom", options={**PHANTOMS, **options}), LabelsRecipe())


def test_fingerprint_other_studies_differ():
    studies = built()
    there = fingerprint(studies)
    assert there == fingerprint(built()) and {split: row["studies"] for split, row in there.items()} == {
        "train": 9,
        "validation": 3,
    }
    # Other reports (text), other views of the same reports, another order.
    assert differing_splits(there, fingerprint({**studies, "train": studies["train"].select(range(8))})) == ["train"]
    assert differing_splits(there, fingerprint(built(image_size=96))) == ["train", "validation"]
    assert fingerprint(built(image_size=96))["train"]["text"] == there["train"]["text"]
    moved = {**studies, "validation": studies["validation"].select([2, 1, 0])}
    assert differing_splits(there, fingerprint(moved)) == ["validation"]
    relabelled = StudiesRecipe(source="phantom", options=PHANTOMS)
    states = fingerprint(build_studies(relabelled, LabelsRecipe(labeler="rules")))
    assert states["train"]["views"] == there["train"]["views"]
    assert differing_splits(there, {"train": there["train"]}) == ["validation"]


def test_fingerprint_moved_studies_are_equal(tmp_path):
    """Built ones, in memory and streamed, here and moved; with some studies left out between others."""
    build = BuildOptions(studies_per_shard=4)
    prepare_studies("phantom", tmp_path / "built", build=build, **PHANTOMS)

    def prints(folder, streaming, limit=None):
        recipe = StudiesRecipe(
            source="prepared", options={"folder": str(folder)}, streaming=streaming, limit=limit or {}
        )
        return fingerprint(build_studies(recipe, LabelsRecipe()))

    mapped, streamed = (prints(tmp_path / "built", streaming) for streaming in (False, True))
    shutil.copytree(tmp_path / "built", tmp_path / "moved")
    assert mapped == prints(tmp_path / "moved", False) and streamed == prints(tmp_path / "moved", True)
    assert differing_splits(mapped, streamed) == []
    assert "views" in mapped["train"] and "shards" in streamed["train"]
    assert differing_splits(streamed, prints(tmp_path / "built", True, {"train": 5})) == ["train"]
    assert fingerprint(built())["train"]["text"] == mapped["train"]["text"]


def test_fingerprint_changed_file_size_differs(tmp_path, views):
    paths = []
    for number, view in enumerate(views[:4]):
        paths.append(tmp_path / f"{number}.png")
        Image.fromarray(view).save(paths[-1])
    lines = [f"{n},{path.name},The lungs are clear.,train\n" for n, path in enumerate(paths)]
    (tmp_path / "reports.csv").write_text("id,image,findings,split\n" + "".join(lines), encoding="utf-8")
    options = {"table": str(tmp_path / "reports.csv"), "images": str(tmp_path)}

    def prints():
        return fingerprint(build_studies(StudiesRecipe(source="csv", options=options), LabelsRecipe(labeler="rules")))

    before = prints()
    assert before == prints()
    Image.fromarray(views[5][:50]).save(paths[2])
    assert differing_splits(before, prints()) == ["train"]
