"""Training on studies that are streamed from a built dataset."""

import io
import json
import shutil

import datasets
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from otdrg.studies import load_studies, prepare_studies
from otdrg.studies.build import BuildOptions
from otdrg.studies.streaming import StreamedStudies
from otdrg.train_hf import main
from otdrg.training.data import build_studies
from otdrg.training.recipe import LabelsRecipe, StudiesRecipe, load_recipe

PHANTOMS = {"train": 16, "validation": 5, "test": 0, "image_size": 112, "views": ["frontal"]}


@pytest.fixture(scope="module", params=[False, True], ids=["arrow", "parquet only"])
def prepared(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("studies") / "built"
    prepare_studies("phantom", folder, build=BuildOptions(studies_per_shard=6, parquet_only=request.param), **PHANTOMS)
    return folder


def recipe_of(folder, **fields):
    return StudiesRecipe(source="prepared", options={"folder": str(folder)}, **fields)


def test_streamed_studies_equal_those_in_memory(prepared):
    fields = {"cleaning": "r2gen_iu", "limit": {"train": 9}}
    streamed = build_studies(recipe_of(prepared, streaming=True, **fields), LabelsRecipe(labeler="rules"))
    table = build_studies(recipe_of(prepared, **fields), LabelsRecipe(labeler="rules"))
    assert list(streamed) == list(table) == ["train", "validation"]
    assert len(streamed["train"]) == len(table["train"]) == 9
    for column in ("id", "report", "indication", "finding_states", "tags"):
        assert list(streamed["train"][column]) == list(table["train"][column])
    rows = {row["id"]: row for row in streamed["train"]}
    assert len(rows) == 9
    for expected in table["train"]:
        row = rows[expected["id"]]
        assert row["images"][0]["bytes"] == expected["images"][0]["bytes"]
        assert {n: v for n, v in row.items() if n != "images"} == {n: v for n, v in expected.items() if n != "images"}


@pytest.fixture(autouse=True)
def no_wait(monkeypatch):
    """Without the five seconds that datasets waits at the end of each shuffled pass for its threads."""
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0.1, raising=False)


def test_streamed_order_depends_on_seed_and_epoch(prepared):
    def order(seed, epoch):
        studies = StreamedStudies(prepared, "train", seed=seed, buffer=4)
        studies.set_epoch(epoch)
        return [row["id"] for row in studies]

    assert order(1, 0) == order(1, 0)
    assert len({tuple(order(seed, epoch)) for seed, epoch in ((1, 0), (1, 1), (2, 0))}) == 3
    assert sorted(order(1, 1)) == sorted(load_studies("prepared", folder=prepared)["train"]["id"])


@pytest.mark.parametrize("prepared", [True], ids=["parquet only"], indirect=True)
def test_recipe_streaming_trains_all_stages(prepared, tiny_recipe, tmp_path):
    recipe = yaml.safe_load(tiny_recipe.read_text(encoding="utf-8"))
    recipe["studies"] = {"source": "prepared", "options": {"folder": str(prepared)}, "streaming": True}
    recipe["output_dir"] = str(tmp_path / "run")
    recipe["stages"] = ["ircp", "predictor", "report"]
    recipe["ircp"] = {"num_train_epochs": 1, "per_device_train_batch_size": 4, "probe_studies": 10}
    # By epochs, which a stream of unknown length could not have; and with and without features kept.
    recipe["predictor"].update(max_steps=-1, num_train_epochs=2, dataloader_num_workers=1)
    recipe["report"].update(max_steps=-1, num_train_epochs=1, cache_features=False)
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    assert main([str(path)]) == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text(encoding="utf-8"))
    assert [results[stage]["steps"] for stage in recipe["stages"]] == [4, 8, 4]
    assert results["ircp"]["after"]["probe"]["train_studies"] == 10
    assert (tmp_path / "run" / "model" / "config.json").is_file()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"source": "phantom", "streaming": True}, r"studies\.source='phantom': expected prepared, to be streamed"),
        ({"source": "prepared", "streaming": True}, r"studies\.options=\{\}: expected folder, and no other"),
        (
            {"source": "prepared", "sections": "impression"},
            r"studies\.sections='impression': expected findings for source",
        ),
        ({"source": "prepared", "shuffle_buffer": 0}, r"studies\.shuffle_buffer=0: expected a number of at least 1"),
    ],
)
def test_recipe_wrong_streaming_options_are_named(tmp_path, fields, message):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({"output_dir": "x", "studies": fields}), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        load_recipe(path)


@pytest.mark.parametrize("streaming", ["true", "false"])
@pytest.mark.parametrize("what", ["small", "broken"])
def test_training_unusable_view_names_the_study(prepared, tiny_recipe, tmp_path, capsys, streaming, what):
    """As of a dataset that another tool made; the vision encoder is trained, so no features are cached."""
    folder = shutil.copytree(prepared, tmp_path / "built")
    buffer = io.BytesIO()
    PIL.Image.new("L", (8, 8)).save(buffer, "PNG")
    damaged = buffer.getvalue() if what == "small" else b"\x89PNG broken"
    file = sorted((folder / "data").glob("train-*"))[0]
    table = pq.read_table(file)
    images = table.column("images").to_pylist()
    images[2][0]["bytes"] = damaged
    place = table.schema.get_field_index("images")
    table = table.set_column(place, table.schema.field("images"), pa.array(images, table.schema.field("images").type))
    pq.write_table(table, file)
    shutil.rmtree(folder / "train", ignore_errors=True)
    (folder / "dataset_dict.json").unlink(missing_ok=True)
    overrides = [f"studies={{source: prepared, options: {{folder: {folder}}}, streaming: {streaming}}}"]
    overrides += ["predictor.vision=full", "predictor.max_steps=8", f"output_dir={tmp_path / 'run'}"]
    recipe = yaml.safe_load(tiny_recipe.read_text(encoding="utf-8"))
    del recipe["studies"]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    assert main([str(tmp_path / "recipe.yaml"), *overrides]) == 1
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("train_hf.py: error: ")]
    assert len(error) == 1 and f"study '{table['id'][2].as_py()}', view 0: " in error[0]
