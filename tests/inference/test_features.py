"""Features of frozen encoders: encoded once, found again, and the same as those of the images."""

import copy
import inspect
import logging
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from otdrg import OTDRGConfig
from otdrg.inference import features
from otdrg.inference.collation import FindingCollator, PromptCollator
from otdrg.inference.digests import encoder_digest
from otdrg.inference.features import cache_features, encoder_is_frozen
from otdrg.inference.generation import generate_reports
from otdrg.modeling_otdrg import OTDRGForReportGeneration
from otdrg.processing_otdrg import OTDRGProcessor
from otdrg.studies import load_studies, prepare_studies
from otdrg.studies.loading import undecoded, with_column
from otdrg.studies.streaming import StreamedStudies
from otdrg.training.collation import ReportCollator
from otdrg.training.model import set_trained_parts
from PIL import Image

PHANTOMS = {"train": 0, "validation": 5, "test": 0, "image_size": 64, "views": ["frontal", "lateral"]}
GENERATION = {"num_beams": 1, "max_new_tokens": 12}
DINOV2 = {"model_type": "dinov2", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 14}


@pytest.fixture(scope="module")
def studies():
    """Five studies of two views, ten views in all."""
    return load_studies("phantom", **PHANTOMS)["validation"]


@pytest.fixture
def encoded(monkeypatch):
    """How many views have been encoded, in each call."""
    counts = []
    encode = OTDRGForReportGeneration.encode_views

    def counting(self, pixel_values, *arguments, **options):
        counts.append(len(pixel_values))
        return encode(self, pixel_values, *arguments, **options)

    monkeypatch.setattr(OTDRGForReportGeneration, "encode_views", counting)
    return counts


def alone(model, processor, view):
    """Features (image_tokens, D) of one view, encoded by itself."""
    with torch.no_grad():
        return model.encode_views(processor(images=[[view]])["pixel_values"])[0, 0]


def rows_equal(one, other):
    assert len(one) == len(other)
    return all(torch.equal(one[i]["view_features"], other[i]["view_features"]) for i in range(len(one)))


def on_files(studies, paths):
    """The studies with the views at these paths."""
    return with_column(studies, "images", [[{"bytes": None, "path": path} for path in views] for views in paths])


# --- the same as from images -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_cache_features_rows_are_the_studies(build_model, studies, tmp_path, dtype):
    model, processor = build_model()
    model.vision_tower.to(dtype)
    cached = cache_features(model, processor, studies, tmp_path, batch_size=1)
    assert len(cached) == len(studies)
    for position, study in enumerate(studies):
        row = cached[position]
        expected = torch.stack([alone(model, processor, view) for view in study["images"]])
        assert row["view_features"].dtype == dtype and torch.equal(row["view_features"], expected)
        assert {name: row[name] for name in ("id", "report", "indication", "finding_states")} == {
            name: study[name] for name in ("id", "report", "indication", "finding_states")
        }
    assert cached["report"] == list(studies["report"])
    chosen = cached.select(range(3, 0, -2))
    assert chosen["id"] == [studies[3]["id"], studies[1]["id"]]
    assert torch.equal(chosen[1]["view_features"], cached[1]["view_features"])


@pytest.mark.parametrize("training", [True, False])
def test_collators_cached_features_equal_images(build_model, studies, tmp_path, training):
    model, processor = build_model()
    cached = cache_features(model, processor, studies, tmp_path, batch_size=4)
    rows, others = list(studies), [cached[position] for position in range(len(cached))]
    # Studies of one and of two views in a batch.
    rows[1]["images"], others[1]["view_features"] = rows[1]["images"][:1], others[1]["view_features"][:1]
    for collator in (
        ReportCollator(processor, training, 20, supervise_predictor=True, indication=True),
        FindingCollator(processor),
        PromptCollator(processor, indication=True),
    ):
        batch, other = collator(rows), collator(others)
        assert batch.keys() - {"pixel_values"} == other.keys() - {"view_features"}
        assert all(torch.equal(batch[name], other[name]) for name in batch.keys() - {"pixel_values"})
        with torch.no_grad():
            assert torch.allclose(
                model.encode_views(batch["pixel_values"], batch["view_mask"]), other["view_features"], atol=1e-5
            )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_generate_reports_cached_features_equal_images(build_model, studies, tmp_path, dtype, encoded):
    model, processor = build_model()
    model.to(dtype)
    cached = cache_features(model, processor, studies, tmp_path, batch_size=4)
    encoded.clear()
    for indication in (False, True):
        options = {"batch_size": 2, "generation": GENERATION, "indication": indication}
        written = generate_reports(model, processor, cached, **options)
        assert not encoded, "an encoder ran"
        expected = generate_reports(model, processor, studies, **options)
        assert written.reports == expected.reports and any(written.reports)
        assert (written.finding_states == expected.finding_states).all()
        encoded.clear()


def test_generate_reports_ignores_true_states_and_reports(model, processor, studies, tmp_path):
    cached = cache_features(model, processor, studies, tmp_path, batch_size=4)
    altered = with_column(cached, "report", ["something else altogether ."] * len(cached))
    altered = with_column(altered, "finding_states", [[3] * 13 + [1]] * len(cached))
    before, after = (generate_reports(model, processor, rows, 4, GENERATION) for rows in (cached, altered))
    assert before.reports == after.reports and (before.finding_states == after.finding_states).all()


# --- once ------------------------------------------------------------------------------------------------------------


def test_cache_features_encodes_nothing_twice(model, processor, studies, tmp_path, encoded, caplog):
    with caplog.at_level(logging.INFO):
        first = cache_features(model, processor, studies, tmp_path, batch_size=4)
        assert encoded == [4, 4, 2]
        second = cache_features(model, processor, studies, tmp_path, batch_size=4)
    assert encoded == [4, 4, 2]
    assert "features of 5 studies: 0 views found in" in caplog.text and ", 10 to be encoded" in caplog.text
    assert "features of 5 studies: 10 views found in" in caplog.text and ", 0 to be encoded" in caplog.text
    assert rows_equal(first, second)


def test_cache_features_identifies_views_by_their_bytes(model, processor, studies, tmp_path, encoded):
    """Neither by its path nor by its study: as a file, embedded, and in another study it is the same."""
    folder = tmp_path / "images"
    folder.mkdir()
    files = studies.select_columns("images").with_format("arrow")[:]["images"].to_pylist()
    paths = []
    for number, study in enumerate(files):
        paths.append([str(folder / f"{number}_{view}.png") for view in range(len(study))])
        for path, view in zip(paths[-1], study, strict=True):
            Path(path).write_bytes(view["bytes"])
    embedded = cache_features(model, processor, studies, tmp_path / "features", batch_size=4)
    assert sum(encoded) == 10
    others = with_column(on_files(studies, paths), "id", [f"x{number}" for number in range(5)])
    on_disk = cache_features(model, processor, others.select([4, 3, 2, 1, 0, 0]), tmp_path / "features", batch_size=4)
    assert sum(encoded) == 10
    assert rows_equal(on_disk, embedded.select([4, 3, 2, 1, 0, 0]))
    # One file changes.
    view = np.array(studies[2]["images"][0])
    view[0, 0] ^= 1
    Image.fromarray(view).save(paths[2][0])
    cache_features(model, processor, others, tmp_path / "features", batch_size=4)
    # Its batch is encoded again as a whole, so that features do not depend on what was found.
    assert sum(encoded) == 10 + 4


def test_cache_features_other_encoder_transform_or_type_encodes_again(build_model, studies, tmp_path, encoded):
    model, processor = build_model()

    def count(model, processor):
        encoded.clear()
        cache_features(model, processor, studies, tmp_path, batch_size=10)
        return sum(encoded)

    assert (count(model, processor), count(model, processor)) == (10, 0)
    with torch.no_grad():
        next(model.finding_predictor.parameters()).add_(1)
    assert count(model, processor) == 0, "what is behind the encoder does not matter"
    other = copy.deepcopy(processor)
    other.image_processor.image_mean = [0.5, 0.5, 0.5]
    assert count(model, other) == 10
    assert count(*build_model(image_tokens=1)) == 10
    assert count(*build_model(predictor_grid=4)) == 10
    any_size, _ = build_model(vision_config=DINOV2 | {"image_size": 56})
    assert count(any_size, processor) == 10
    other = copy.deepcopy(processor)
    other.image_processor.size = {"height": 112, "width": 112}
    assert (count(any_size, other), count(any_size, processor)) == (10, 0)
    with torch.no_grad():
        list(model.vision_tower.parameters())[-1].view(-1)[0].add_(1e-6)
    assert count(model, processor) == 10
    assert count(model.to(torch.bfloat16), processor) == 10
    assert count(model, processor) == 0


def test_encoder_digest_is_that_of_caches_older_than_predictor_grid(build_model):
    model, processor = build_model()
    digest = encoder_digest(model, processor)
    assert "predictor_grid" not in model.config.vision_fields()
    model.config.predictor_grid = 4
    assert encoder_digest(model, processor) != digest


def test_encoder_digest_new_configuration_field_changes_it_unless_declared(build_model):
    model, processor = build_model()
    before = encoder_digest(model, processor)
    declared = OTDRGConfig._NOT_IN_VIEW_FEATURES & inspect.signature(OTDRGConfig.__init__).parameters.keys()
    for name in declared - {"text_config", "label_encoder_config"}:
        setattr(model.config, name, "another")
    assert encoder_digest(model, processor) == before
    model.config.vision_pooling = "max"  # no such field exists yet
    assert encoder_digest(model, processor) != before


@pytest.mark.parametrize("vision_config", [{}, DINOV2 | {"image_size": 56}], ids=["swin", "dinov2"])
def test_encoder_digest_saved_model_has_the_same(build_config, reports, tmp_path, vision_config):
    config = build_config(**({"vision_config": vision_config} if vision_config else {}))
    processor = OTDRGProcessor.from_texts(reports, config=config, vocab_size=400)
    model = OTDRGForReportGeneration(config)
    before = encoder_digest(model, processor)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    model, processor = (kind.from_pretrained(tmp_path) for kind in (OTDRGForReportGeneration, OTDRGProcessor))
    assert encoder_digest(model, processor) == before


def test_cache_features_streamed_studies_become_a_table(model, processor, studies, tmp_path, encoded):
    options = PHANTOMS | {"train": 5, "validation": 0}
    prepare_studies("phantom", tmp_path / "built", **options)
    streamed = StreamedStudies(tmp_path / "built", "train").select([3, 0, 2])
    cached = cache_features(model, processor, streamed, tmp_path / "features", batch_size=4)
    assert sum(encoded) == 6
    table = load_studies("phantom", **options)["train"].select([3, 0, 2])
    expected = cache_features(model, processor, table, tmp_path / "features", batch_size=4)
    assert sum(encoded) == 6
    assert rows_equal(cached, expected)
    for name in ("id", "report", "indication", "finding_states"):
        assert cached[name] == expected[name]


def test_encoder_is_frozen_follows_the_trained_parts(build_model):
    model, _ = build_model()
    set_trained_parts(model, vision="frozen", text="full", predictor="full", joining=True)
    assert encoder_is_frozen(model)
    set_trained_parts(model, vision="full", text="frozen", predictor="frozen", joining=False)
    assert not encoder_is_frozen(model)


# --- on disk ---------------------------------------------------------------------------------------------------------


def test_cache_features_killed_loses_at_most_a_shard(model, processor, studies, tmp_path, encoded, monkeypatch):
    monkeypatch.setattr(features, "SHARD_VIEWS", 4)
    counting = OTDRGForReportGeneration.encode_views

    def killed(self, pixel_values, *arguments):
        if len(encoded) == 3:
            raise KeyboardInterrupt
        return counting(self, pixel_values, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(OTDRGForReportGeneration, "encode_views", killed)
        with pytest.raises(KeyboardInterrupt):
            cache_features(model, processor, studies, tmp_path, batch_size=2)
    (shard,) = tmp_path.glob("*/*")
    # As a run leaves it that is killed while it writes.
    shard.with_name("0123.99.tmp").write_bytes(shard.read_bytes()[:1000])
    encoded.clear()
    resumed = cache_features(model, processor, studies, tmp_path, batch_size=2)
    assert encoded == [2, 2, 2]
    assert rows_equal(resumed, cache_features(model, processor, studies, tmp_path / "whole", batch_size=2))


@pytest.mark.parametrize("kept", [0, 5, 200, -1], ids=["empty", "header", "digests", "last byte"])
def test_cache_features_damaged_file_is_named(model, processor, studies, tmp_path, encoded, kept):
    cache_features(model, processor, studies, tmp_path, batch_size=10)
    (shard,) = tmp_path.glob("*/*.safetensors")
    shard.write_bytes(shard.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"\.safetensors is damaged \(.*\): delete this file") as error:
        cache_features(model, processor, studies, tmp_path, batch_size=10)
    assert str(shard) in str(error.value) and "\n" not in str(error.value)
    shard.unlink()
    cache_features(model, processor, studies, tmp_path, batch_size=10)
    assert encoded == [10, 10]


def test_cache_features_unreadable_view_is_named(model, processor, studies, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG broken")
    study = studies.select([0])
    broken = on_files(study, [[str(tmp_path / "broken.png")]])
    with pytest.raises(ValueError, match=f"study '{studies[0]['id']}', view 0: not an image"):
        cache_features(model, processor, broken, tmp_path, batch_size=4)
    with pytest.raises(ValueError, match=f"study '{studies[0]['id']}' has no view"):
        cache_features(model, processor, on_files(study, [[]]), tmp_path, batch_size=4)
    gone = on_files(study, [[str(tmp_path / "gone.png")]])
    with pytest.raises(ValueError, match=rf"study '{studies[0]['id']}': .*gone\.png: cannot be read \(No such file"):
        cache_features(model, processor, gone, tmp_path, batch_size=4)
    Image.new("L", (8, 8)).save(tmp_path / "small.png")
    small = on_files(study, [[str(tmp_path / "small.png")]])
    with pytest.raises(ValueError, match=f"study '{studies[0]['id']}', view 0: 8x8"):
        cache_features(model, processor, small, tmp_path, batch_size=4)


def test_cache_features_left_out_collects_unreadable_studies(model, processor, studies, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG broken")
    Image.new("L", (8, 8)).save(tmp_path / "small.png")
    studies[0]["images"][0].save(tmp_path / "0.png")
    views = [["0.png"], ["broken.png"], ["small.png"], ["gone.png"], []]
    rows = on_files(studies, [[str(tmp_path / name) for name in names] for names in views])
    left_out = {}
    cached = cache_features(model, processor, rows, tmp_path / "cache", batch_size=6, left_out=left_out)
    ids = studies["id"]
    assert cached["id"] == [ids[0]] and len(cached) == 1
    assert set(left_out) == set(ids[1:])
    assert all(reason.startswith(f"study '{study}'") for study, reason in left_out.items())
    again = {}
    cache_features(model, processor, rows, tmp_path / "cache", batch_size=6, left_out=again)
    assert again == left_out


@pytest.mark.parametrize("content", [b"\x89PNG broken", None, "small"], ids=["damaged", "gone", "8x8"])
def test_collate_views_unreadable_view_names_the_study(processor, studies, tmp_path, content):
    path = tmp_path / "broken.png"
    if content == "small":
        Image.new("L", (8, 8)).save(path)
    elif content is not None:
        path.write_bytes(content)
    broken = undecoded(on_files(studies.select([0]), [[str(path)]]))
    with pytest.raises(ValueError, match=rf"^study '{studies[0]['id']}', view 0, .*broken\.png: ") as error:
        PromptCollator(processor)([broken[0]])
    assert "\n" not in str(error.value)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only Linux lists what is mapped")
def test_cached_studies_features_are_memory_mapped(model, processor, studies, tmp_path):
    cached = cache_features(model, processor, studies, tmp_path, batch_size=10)
    (shard,) = tmp_path.glob("*/*.safetensors")
    cached[0]
    assert str(shard) in Path("/proc/self/maps").read_text(encoding="utf-8")


def test_cached_studies_pickled_hold_no_features(model, processor, studies, tmp_path):
    cached = cache_features(model, processor, studies, tmp_path, batch_size=10).select_columns(["id"])
    cached[0]
    (shard,) = tmp_path.glob("*/*.safetensors")
    pickled = pickle.dumps(cached)
    assert len(pickled) < shard.stat().st_size / 2
    assert rows_equal(pickle.loads(pickled), cached)
    loader = torch.utils.data.DataLoader(cached, batch_size=None, num_workers=2)
    assert rows_equal(list(loader), cached)


# --- several processes -----------------------------------------------------------------------------------------------

TWO = """
import sys
from accelerate import PartialState
from otdrg.modeling_otdrg import OTDRGForReportGeneration
from otdrg.processing_otdrg import OTDRGProcessor
from otdrg.studies import load_studies
from otdrg.inference.features import cache_features
from otdrg.studies.streaming import StreamedStudies
state = PartialState(cpu=True)
assert state.num_processes == 2
saved, built, folder = sys.argv[1:]
model, processor = (kind.from_pretrained(saved) for kind in (OTDRGForReportGeneration, OTDRGProcessor))
encode, encoded = model.encode_views, []
model.encode_views = lambda pixels, *more: encoded.append(len(pixels)) or encode(pixels, *more)
table = load_studies("prepared", folder=built)["train"]
for studies in (table, StreamedStudies(built, "train"), table.select([2, 2, 0])):
    cached = cache_features(model, processor, studies, folder, batch_size=1)
    print(cached["id"] == list(studies["id"]), sum(len(cached[i]["view_features"]) for i in range(len(cached))))
print("encoded", sum(encoded))
"""


@pytest.mark.slow
def test_cache_features_two_processes_share_the_work(model, processor, tmp_path, launch):
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    prepare_studies("phantom", tmp_path / "built", **PHANTOMS | {"train": 5, "validation": 0})
    arguments = [str(tmp_path / name) for name in ("model", "built", "features")]
    printed = launch(["-c", TWO, *arguments])
    assert [out.splitlines()[:3] for out in printed] == [["True 10", "True 10", "True 6"]] * 2
    assert sorted(out.splitlines()[3] for out in printed) == ["encoded 5", "encoded 5"]
    table = load_studies("prepared", folder=tmp_path / "built")["train"]
    together, single = (
        cache_features(model, processor, table, tmp_path / name, batch_size=1) for name in ("features", "single")
    )
    assert rows_equal(together, single)
    assert len(list((tmp_path / "features").glob("*/*"))) == 2
