"""Finding states of a dataset on disk."""

import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
from datasets import load_dataset, load_from_disk
from otdrg.findings_otdrg import FINDING_STATES, FINDINGS
from otdrg.labelers.labelling import label_dataset
from otdrg.labelers.shared import label_together
from otdrg.studies.schema import STUDY_FEATURES
from otdrg.studies.shards import WorkFolder, row_batches, write_shard

SETTINGS = {"labeler": "count"}
IMAGE = 2**16


@pytest.fixture
def built(tmp_path):
    return build(tmp_path / "built")


def build(folder, arrow=True, images=1):
    """Two splits, three shards of two studies, the second of each with states; bytes stand in for images."""
    random = np.random.default_rng(0)
    (folder / "data").mkdir(parents=True)
    names = ["train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001"]
    lists = ("images", "views", "prior_images")
    empty = {name: [] if name in lists else "" for name in STUDY_FEATURES} | {"prior_days": None}
    for number, name in enumerate(names):
        rows = []
        for place, states in enumerate((None, [3] * 13 + [0])):
            study = f"s{2 * number + place}"
            views = [{"bytes": random.bytes(IMAGE), "path": None} for _ in range(images)]
            rows.append({**empty, "id": study, "report": f"of {study}", "images": views, "finding_states": states})
        write_shard(folder / "data" / f"{name}.parquet", row_batches(rows))
    if arrow:
        files = {split: str(folder / "data" / f"{split}-*.parquet") for split in ("train", "test")}
        load_dataset("parquet", data_files=files, cache_dir=str(folder / "cache")).save_to_disk(folder)
        shutil.rmtree(folder / "cache")
    (folder / "summary.json").write_text('{"licences": ["mine"]}')
    (folder / "README.md").write_text("card")
    return folder


class Reader:
    """Every finding positive; what it was asked for is kept, and it gives up at one of the studies."""

    def __init__(self, gives_up_at=None):
        self.seen, self.gives_up_at = [], gives_up_at

    def __call__(self, ids, reports):
        assert reports == [f"of {study}" for study in ids]
        if self.gives_up_at in ids:
            raise ValueError("gave up")
        self.seen += ids
        return [[1] * 14 for _ in ids]


def states_of(folder):
    tables = [pq.read_table(file).to_pydict() for file in sorted((folder / "data").glob("*.parquet"))]
    return dict(pair for table in tables for pair in zip(table["id"], table["finding_states"], strict=True))


def content_of(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_label_counts_by_split_and_finding(built):
    report = label_dataset(built, Reader(), SETTINGS)
    assert report.studies["train"] == {"studies": 4, "labelled": 2, "kept": 2, "unknown": 0}
    assert report.studies["test"] == {"studies": 2, "labelled": 1, "kept": 1, "unknown": 0}
    assert report.states["edema"] == dict(zip(FINDING_STATES, (0, 3, 0, 3), strict=True))
    assert report.states["no_finding"] == dict(zip(FINDING_STATES, (3, 3, 0, 0), strict=True))
    assert list(report.states) == list(FINDINGS)
    assert "| test | 2 | 1 | 1 | 0 |" in str(report)


def test_label_studies_without_states_are_listed(built):
    def read(ids, reports):
        return [None if study == "s0" else [0] * 14 for study in ids]

    report = label_dataset(built, read, SETTINGS)
    assert report.studies["train"] == {"studies": 4, "labelled": 1, "kept": 2, "unknown": 1}
    assert report.unlabelled == ["s0", "s2", "s4"]
    assert (built / "unlabelled.txt").read_text() == "s0\ns2\ns4\n"
    assert states_of(built)["s0"] is None
    label_dataset(built, Reader(), SETTINGS, relabel=True)
    assert not (built / "unlabelled.txt").exists()


@pytest.mark.parametrize("arrow", [True, False])
def test_label_other_columns_are_unchanged(tmp_path, arrow):
    built = build(tmp_path / "built", arrow=arrow)
    old = {file.name: pq.read_table(file) for file in (built / "data").iterdir()}
    label_dataset(built, Reader(), SETTINGS)
    for name, table in old.items():
        new = pq.read_table(built / "data" / name)
        assert new.drop_columns("finding_states").equals(table.drop_columns("finding_states"))
        assert new.schema == table.schema
    assert (built / "dataset_dict.json").exists() is arrow
    if arrow:
        loaded = load_from_disk(built)
        loaded = {row["id"]: row["finding_states"] for rows in loaded.values() for row in rows.remove_columns("images")}
        assert loaded == states_of(built)


def test_label_row_groups_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr("otdrg.studies.shards._BATCH_BYTES", IMAGE)
    built = build(tmp_path / "built")
    file = built / "data" / "test-00000-of-00001.parquet"
    assert pq.read_metadata(file).num_row_groups == 2
    label_dataset(built, Reader(), SETTINGS)
    assert pq.read_metadata(file).num_row_groups == 2
    assert states_of(built)["s4"] == [1] * 14 and states_of(built)["s5"] == [3] * 13 + [0]


def test_label_other_files_are_kept(built):
    (built / "notes" / "deep").mkdir(parents=True)
    (built / "notes" / "deep" / "a.txt").write_text("mine")
    (built / "link").symlink_to("notes")
    label_dataset(built, Reader(), SETTINGS)
    assert (built / "notes" / "deep" / "a.txt").read_text() == "mine"
    assert (built / "link").is_symlink()
    assert (built / "README.md").read_text() == "card"


def test_label_link_labels_its_target(built, tmp_path):
    (tmp_path / "link").symlink_to(built)
    label_dataset(tmp_path / "link", Reader(), SETTINGS)
    assert (tmp_path / "link").is_symlink()
    assert None not in states_of(built).values()
    assert {path.name for path in tmp_path.iterdir()} == {"link", "built"}


def test_label_resumed_labels_the_rest(built):
    before = content_of(built)
    with pytest.raises(ValueError, match="gave up"):
        label_dataset(built, Reader(gives_up_at="s2"), SETTINGS)
    assert content_of(built) == before
    rest = Reader()
    report = label_dataset(built, rest, SETTINGS, resume=True)
    assert rest.seen == ["s2", "s4"]
    assert report.studies["train"]["labelled"] == 2
    assert None not in states_of(built).values()


@pytest.mark.parametrize("last", ["_write_arrow", "_put_in_place"])
def test_label_interrupted_at_its_end_continues(built, tmp_path, monkeypatch, last):
    def killed(*_):
        raise KeyboardInterrupt

    before = content_of(built)
    with monkeypatch.context() as patch:
        patch.setattr(WorkFolder, last, killed)
        with pytest.raises(KeyboardInterrupt):
            label_dataset(built, Reader(), SETTINGS)
    assert content_of(built) == before
    rest = Reader()
    report = label_dataset(built, rest, SETTINGS, resume=True)
    assert report.studies["train"] == {"studies": 4, "labelled": 2, "kept": 2, "unknown": 0}
    assert not rest.seen
    assert {path.name for path in tmp_path.iterdir()} == {"built"}
    assert content_of(built).keys() == before.keys()
    assert list(states_of(built)) == ["s4", "s5", "s0", "s1", "s2", "s3"]
    assert None not in states_of(built).values()


def test_label_interrupted_overwrite_continues_as_the_message_says(built, tmp_path):
    labelled = tmp_path / "labelled"
    label_dataset(built, Reader(), {"labeler": "other"}, output=labelled)

    def interrupted(ids, reports):
        if "s2" in ids:
            raise KeyboardInterrupt
        return Reader()(ids, reports)

    with pytest.raises(KeyboardInterrupt, match="; --resume --overwrite continues"):
        label_dataset(built, interrupted, SETTINGS, output=labelled, overwrite=True)
    rest = Reader()
    label_dataset(built, rest, SETTINGS, output=labelled, resume=True, overwrite=True)
    assert rest.seen == ["s2", "s4"]


def test_label_complete_is_not_changed_by_resume(built, tmp_path):
    labelled = tmp_path / "labelled"
    for output in (labelled, None):
        report = label_dataset(built, lambda ids, _: [None] * len(ids), SETTINGS, output=output)
        reader = Reader()
        again = label_dataset(built, reader, SETTINGS, output=output, resume=True)
        assert again == report and not reader.seen
    with pytest.raises(ValueError, match="labelled exists: --overwrite replaces it"):
        label_dataset(built, Reader(), {"labeler": "other"}, output=labelled, resume=True)


def test_label_changed_shard_is_labelled_again(built):
    with pytest.raises(ValueError, match="gave up"):
        label_dataset(built, Reader(gives_up_at="s4"), SETTINGS)
    file = built / "data" / "train-00000-of-00002.parquet"
    table = pq.read_table(file)
    file.unlink()
    pq.write_table(table.slice(0, 1), file)
    rest = Reader()
    label_dataset(built, rest, SETTINGS, resume=True)
    assert rest.seen == ["s0", "s4"]
    assert list(states_of(built)) == ["s4", "s5", "s0", "s2", "s3"]


def test_label_existing_output_is_replaced_with_overwrite(built, tmp_path):
    labelled = tmp_path / "labelled"
    labelled.mkdir()
    label_dataset(built, Reader(), SETTINGS, output=labelled)
    with pytest.raises(ValueError, match="labelled exists: --overwrite replaces it"):
        label_dataset(built, Reader(), SETTINGS, output=labelled)
    label_dataset(built, lambda ids, _: [[2] * 13 + [0]] * len(ids), SETTINGS, output=labelled, overwrite=True)
    assert states_of(labelled)["s0"] == [2] * 13 + [0]
    assert states_of(built)["s0"] is None


def _without(built, column):
    for file in (built / "data").iterdir():
        pq.write_table(pq.read_table(file).drop_columns(column), file)


@pytest.mark.parametrize(
    ("spoil", "output", "message"),
    [
        (lambda built: shutil.rmtree(built / "data"), None, r"built is not a prepared dataset: .*otdrg prepare hub"),
        (lambda built: (built / "summary.json").unlink(), None, "built is not a prepared dataset"),
        (lambda built: (built / "summary.json").write_text("{"), None, r"summary\.json is not valid JSON"),
        (lambda built: _without(built, "finding_states"), None, r"00\d\.parquet: no column 'finding_states'"),
        (lambda built: (built / "shards").mkdir(), None, "shards has the name of a file of the labelling"),
        (lambda built: None, "built/labelled", "labelled is inside the dataset"),
        (lambda built: (built.parent / "mine").write_text("mine"), "mine", "mine exists and is no dataset"),
        (lambda built: (built.parent / "built.partial").mkdir(), None, r"built\.partial exists and is not an"),
    ],
)
def test_label_faults_are_named_before_reading(built, tmp_path, spoil, output, message):
    spoil(built)
    before = content_of(tmp_path)
    reader = Reader()
    with pytest.raises(ValueError, match=message) as caught:
        label_dataset(built, reader, SETTINGS, output=output and tmp_path / output)
    assert "\n" not in str(caught.value)
    assert content_of(tmp_path) == before and not reader.seen


def test_label_together_gives_labelers_the_reports_as_they_are():
    """Line breaks end sentences; a labeler that asks an LLM about each sentence must see them."""

    class Recording:
        name, batch_size = "recording", 2

        def label(self, reports):
            seen.extend(reports)
            return np.ones((len(reports), 14), int)

    seen = []
    reports = ["No pleural effusion\nHeart enlarged", "Clear  lungs.", "No pleural effusion\nHeart enlarged"]
    assert label_together(Recording(), reports).shape == (3, 14)
    assert sorted(seen) == sorted(set(reports))
