"""`prepare_studies`: what is built, what is left out and why, and what an interruption leaves."""

import errno
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass

import numpy as np
import psutil
import pytest
from datasets import load_dataset, load_from_disk
from otdrg.cli import main
from otdrg.studies import load_studies, prepare_studies
from otdrg.studies.build import BuildOptions, build_studies_dataset
from otdrg.studies.loading import load_in_memory, load_prepared, prepared_column, stream_prepared
from otdrg.studies.schema import STUDY_FEATURES
from otdrg.studies.source import Skipped, SkipStudy, Study, StudyEntry, StudySource
from PIL import Image

PHANTOMS = {"train": 7, "validation": 2, "test": 3, "image_size": 32}


@dataclass(init=False)
class ListedSource(StudySource):
    """A source of the test's own entries; an entry's location is its `Study`, or what `read` raises."""

    name = "listed"

    def __init__(self, listed):
        self.listed = listed

    def entries(self):
        return iter(self.listed)

    def read(self, entry):
        if isinstance(entry.location, Exception):
            raise entry.location
        return entry.location


@pytest.fixture
def picture(tmp_path):
    def make(name="view.png", size=(40, 30), **options):
        path = tmp_path / name
        noise = np.random.default_rng(0).integers(0, 256, size[::-1], dtype=np.uint8)
        Image.fromarray(noise).save(path, **options)
        return str(path)

    return make


def listed_study(name, *images, split="train", patient=None, **fields):
    fields = {"findings": f"Report of {name}.", **fields}
    return StudyEntry(name, patient or name, split, Study(list(images), ["frontal"] * len(images), **fields))


def skipped_of(folder):
    return [json.loads(line) for line in (folder / "skipped.jsonl").read_text(encoding="utf-8").splitlines()]


def without_images(rows):
    return [{name: value for name, value in row.items() if name != "images"} for row in rows]


@pytest.mark.parametrize("num_proc", [1, 2])
def test_build_dataset_loads_with_both_loaders_of_datasets(tmp_path, num_proc):
    build = BuildOptions(studies_per_shard=3, num_proc=num_proc)
    report = prepare_studies("phantom", tmp_path / "built", build=build, **PHANTOMS)
    expected = load_studies("phantom", **PHANTOMS)
    from_disk = load_from_disk(tmp_path / "built")
    loaded = load_dataset(str(tmp_path / "built"), cache_dir=str(tmp_path / "cache"))
    for built in (from_disk, loaded):
        assert list(built) == ["train", "validation", "test"]
        for split, rows in expected.items():
            assert built[split].features == STUDY_FEATURES
            assert without_images(built[split]) == without_images(rows)
            for got, wanted in zip(built[split], rows, strict=True):
                assert [np.array(i).tolist() for i in got["images"]] == [np.array(i).tolist() for i in wanted["images"]]
    assert {split: counts.studies for split, counts in report.counts.items()} == {
        "train": 7,
        "validation": 2,
        "test": 3,
    }
    assert len(list((tmp_path / "built" / "data").glob("train-*-of-00003.parquet"))) == 3
    assert not (tmp_path / "built.partial").exists()
    assert len({from_disk[split]._fingerprint for split in from_disk}) == 3


def test_build_parquet_only_writes_no_arrow_and_loads(tmp_path):
    prepare_studies("phantom", tmp_path / "built", build=BuildOptions(parquet_only=True), **PHANTOMS)
    assert not list((tmp_path / "built").rglob("*.arrow"))
    rows = load_prepared(tmp_path / "built")["validation"]
    assert rows["id"] == load_studies("phantom", **PHANTOMS)["validation"]["id"]


def test_build_image_file_deleted_later_dataset_is_complete(tmp_path, picture):
    path = picture()
    with open(path, "rb") as file:
        data = file.read()
    build_studies_dataset(ListedSource([listed_study("a", path)]), tmp_path / "built")
    os.unlink(path)
    (tmp_path / "built").rename(tmp_path / "moved")
    (row,) = load_from_disk(tmp_path / "moved")["train"]
    assert row["images"][0].size == (40, 30)
    stored = load_from_disk(tmp_path / "moved")["train"].data.column("images")[0].as_py()
    assert stored == [{"bytes": data, "path": None}]


def test_build_faulty_studies_are_counted_and_listed(tmp_path, picture):
    good, broken = picture(), tmp_path / "broken.png"
    with open(good, "rb") as file:
        broken.write_bytes(file.read()[:200])
    source = ListedSource(
        [
            listed_study("good", good),
            listed_study("good", good),
            listed_study("silent", good, findings="  "),
            listed_study("absent", good, str(tmp_path / "absent.png")),
            listed_study("broken", str(broken)),
            listed_study("text", __file__),
            listed_study("blind"),
            listed_study("shared", good, patient="p"),
            listed_study("held out", good, patient="p", split="test"),
            StudyEntry("odd", "odd", "validation", SkipStudy("malformed", "line 3 of it")),
            Skipped("elsewhere", None, "outside the split", "nobody's"),
        ]
    )
    report = build_studies_dataset(source, tmp_path / "built")
    built = load_from_disk(tmp_path / "built")
    assert {split: rows["id"] for split, rows in built.items()} == {"train": ["good"], "test": ["held out"]}
    kinds = {(fault["id"], fault["split"]): fault["kind"] for fault in skipped_of(tmp_path / "built")}
    assert kinds == {
        ("good", "train"): "duplicate id",
        ("silent", "train"): "empty report",
        ("absent", "train"): "missing image",
        ("broken", "train"): "unreadable image",
        ("text", "train"): "unreadable image",
        ("blind", "train"): "missing image",
        ("shared", "train"): "patient in two splits",
        ("odd", "validation"): "malformed",
        ("elsewhere", None): "outside the split",
    }
    reasons = {fault["id"]: fault["reason"] for fault in skipped_of(tmp_path / "built")}
    assert str(tmp_path / "absent.png") in reasons["absent"] and "in test too" in reasons["shared"]
    train = report.counts["train"]
    assert (train.studies, train.images, train.skipped) == (1, 1, 7)
    assert (train.empty_reports, train.missing_images, train.unreadable_images) == (1, 2, 2)
    assert "| total | 2 | 2 | 2 | 0 | 0 | 9 | 1 | 2 | 2 |" in str(report)


def test_build_strict_stops_at_first_fault_without_output(tmp_path, picture):
    source = ListedSource([listed_study("a", picture()), listed_study("b", str(tmp_path / "absent.png"))])
    with pytest.raises(ValueError, match=r"study b, train: missing image: .*absent\.png does not exist"):
        build_studies_dataset(source, tmp_path / "built", BuildOptions(strict=True))
    assert not (tmp_path / "built").exists()
    with pytest.raises(ValueError, match=r"built is unfinished: continue with otdrg prepare --resume"):
        load_prepared(tmp_path / "built")


def test_build_incomplete_study_is_kept_with_the_option_only(tmp_path, picture):
    source = ListedSource([listed_study("a", str(tmp_path / "absent.png"), picture())])
    with pytest.raises(ValueError, match="no study is left: all 1 were skipped"):
        build_studies_dataset(source, tmp_path / "one")
    report = build_studies_dataset(source, tmp_path / "two", BuildOptions(keep_incomplete=True))
    (row,) = load_from_disk(tmp_path / "two")["train"]
    assert len(row["images"]) == len(row["views"]) == 1
    assert report.counts["train"].missing_images == 1 and report.counts["train"].skipped == 0
    assert [fault["kept"] for fault in skipped_of(tmp_path / "two")] == [True]


@pytest.mark.parametrize(
    ("sections", "reports"),
    [
        ("findings", ["F.", "F."]),
        ("impression", ["I.", "I."]),
        ("findings+impression", ["Findings: F. Impression: I.", "Impression: I.", "Findings: F."]),
    ],
)
def test_build_sections_option_selects_the_report(tmp_path, picture, sections, reports):
    view = picture()
    source = ListedSource(
        [
            listed_study("both", view, findings="F.", impression="I."),
            listed_study("impression", view, findings="", impression="I."),
            listed_study("findings", view, findings="F.", impression=""),
        ]
    )
    report = build_studies_dataset(source, tmp_path / "built", BuildOptions(sections=sections))
    rows = load_from_disk(tmp_path / "built")["train"]
    assert rows["report"] == reports
    assert set(rows["impression"]) <= {"I.", ""}
    both = sections == "findings+impression"
    assert ("without findings | without impression |" in str(report)) == both
    assert (report.counts["train"].without_findings, report.counts["train"].without_impression) == (both, both)


def test_load_in_memory_says_how_many_studies_lack_a_section(picture, caplog):
    view = picture()
    listed = [listed_study("a", view, impression="I."), *(listed_study(name, view) for name in "bc")]
    load_in_memory(ListedSource(listed), "findings+impression")
    assert "2 of 3 studies have no impression: their report lacks it" in caplog.text


def test_sections_that_a_source_never_has_are_refused(tmp_path, picture):
    (tmp_path / "annotation.json").write_text('{"train": [], "val": [], "test": []}', encoding="utf-8")
    table = tmp_path / "reports.csv"
    table.write_text(f"image,impression\n{picture()},Normal.\n", encoding="utf-8")
    for source, options, sections, message in (
        (
            "r2gen",
            {"annotation": str(tmp_path / "annotation.json"), "images": str(tmp_path)},
            "findings+impression",
            "source 'r2gen' has no impression here: expected findings",
        ),
        ("csv", {"table": str(table)}, "findings", "source 'csv' has no findings here: expected impression"),
    ):
        with pytest.raises(ValueError, match=message):
            load_studies(source, sections=sections, **options)
        with pytest.raises(ValueError, match=message):
            prepare_studies(source, tmp_path / "built", build=BuildOptions(sections=sections), **options)
    assert not list(tmp_path.glob("built*"))


def test_build_begun_without_headings_is_not_resumed(tmp_path, picture):
    source, options = ListedSource([listed_study("a", picture())]), BuildOptions(sections="findings+impression")
    build_studies_dataset(source, tmp_path / "built", options)
    summary = json.loads((tmp_path / "built/summary.json").read_text(encoding="utf-8"))
    del summary["settings"]["headings"]  # as an older version made it
    (tmp_path / "built/summary.json").write_text(json.dumps(summary), encoding="utf-8")
    with pytest.raises(ValueError, match=r"other settings \(headings=None, now \['Findings:', 'Impression:'\]\)"):
        build_studies_dataset(source, tmp_path / "built", options, resume=True)


def test_build_shorter_side_scales_large_images_only(tmp_path, picture):
    small, large, jpeg = picture("small.png"), picture("large.png", (300, 200)), picture("large.jpg", (300, 200))
    source = ListedSource([listed_study("a", small, large, jpeg)])
    build_studies_dataset(source, tmp_path / "built", BuildOptions(shorter_side=100))
    (row,) = load_from_disk(tmp_path / "built")["train"]
    assert [(image.size, image.format) for image in row["images"]] == [
        ((40, 30), "PNG"),
        ((150, 100), "PNG"),
        ((150, 100), "JPEG"),
    ]


def test_build_limit_applies_to_each_split(tmp_path):
    report = prepare_studies("phantom", tmp_path / "built", build=BuildOptions(limit=2), **PHANTOMS)
    assert {split: counts.studies for split, counts in report.counts.items()} == {
        "train": 2,
        "validation": 2,
        "test": 2,
    }


def test_build_unpublished_counts_warn_and_list_the_ids(tmp_path, picture):
    source = ListedSource(
        [
            listed_study("a", picture()),
            listed_study("b", str(tmp_path / "no.png")),
            listed_study("v", picture(), split="validation"),
        ]
    )
    source.official_counts = {"train": 3, "validation": 1, "test": 4}
    source.official_ids = {"train": ["a", "b", "c"], "validation": ["v"]}.get
    report = build_studies_dataset(source, tmp_path / "built")
    assert report.warnings == [
        "train: 1 studies, 3 in the published split; left out: b; not in the source: c",
        "test: 0 studies, 4 in the published split; the source has no such split",
    ]
    assert report.warnings == json.loads((tmp_path / "built" / "summary.json").read_text())["warnings"]
    limited = build_studies_dataset(source, tmp_path / "limited", BuildOptions(limit=1))
    assert limited.warnings == []


@pytest.mark.parametrize("option", [{"limit": 0}, {"num_proc": -1}, {"studies_per_shard": "2"}, {"shorter_side": 4}])
def test_build_options_out_of_range_are_named(option):
    (name,) = option
    with pytest.raises(ValueError, match=f"{name}=.*: expected a whole number"):
        BuildOptions(**option)
    with pytest.raises(ValueError, match="sections='summary': expected one of findings"):
        BuildOptions(sections="summary")


def test_build_existing_folder_is_not_overwritten(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="mine exists and is no dataset of studies"):
            prepare_studies("phantom", tmp_path / "mine", overwrite=overwrite, **PHANTOMS)
    prepare_studies("phantom", tmp_path / "built", **PHANTOMS)
    with pytest.raises(ValueError, match="built exists: --overwrite replaces it"):
        prepare_studies("phantom", tmp_path / "built", **PHANTOMS)
    prepare_studies("phantom", tmp_path / "built", overwrite=True, **{**PHANTOMS, "train": 1})
    assert len(load_from_disk(tmp_path / "built")["train"]) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["built", "mine"]


def test_build_killed_leaves_no_dataset_and_resumes(tmp_path):
    output, options = tmp_path / "built", {**PHANTOMS, "train": 200, "image_size": 96}
    command = [sys.executable, "-m", "otdrg.cli", "prepare", "phantom", "--output", str(output)]
    command += ["--train", "200", "--validation", "2", "--test", "3", "--image-size", "96", "--studies-per-shard", "10"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    shards = tmp_path / "built.partial" / "shards"
    deadline = time.monotonic() + 60
    while len(list(shards.glob("*.json"))) < 3:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not output.exists()
    build = BuildOptions(studies_per_shard=10)
    with pytest.raises(ValueError, match=r"unfinished dataset: --resume continues it, --overwrite deletes it"):
        prepare_studies("phantom", output, build=build, **options)
    with pytest.raises(ValueError, match=r"was made with other settings \(source\.seed=0, now 1\)"):
        prepare_studies("phantom", output, build=build, resume=True, seed=1, **options)
    report = prepare_studies("phantom", output, build=build, resume=True, **options)
    assert report.counts["train"].studies == options["train"]
    built, whole = load_from_disk(output), load_studies("phantom", **options)
    for split, rows in whole.items():
        assert without_images(built[split]) == without_images(rows)


def test_build_resumed_keeps_finished_shards(tmp_path, picture):
    good = [listed_study(f"s{i}", picture(f"{i}.png")) for i in range(4)]
    bad = StudyEntry("bad", "bad", "train", SkipStudy("malformed", "?"))
    options = BuildOptions(studies_per_shard=2, strict=True)
    with pytest.raises(ValueError, match="study bad, train: malformed"):
        build_studies_dataset(ListedSource([*good, bad]), tmp_path / "built", options)
    for i in (0, 1):
        os.unlink(tmp_path / f"{i}.png")
    build_studies_dataset(ListedSource(good), tmp_path / "built", options, resume=True)
    assert load_from_disk(tmp_path / "built")["train"]["id"] == ["s0", "s1", "s2", "s3"]


def test_build_interrupted_overwrite_continues_as_the_message_says(tmp_path, picture):
    output, options = tmp_path / "built", BuildOptions(studies_per_shard=1)
    build_studies_dataset(ListedSource([listed_study("old", picture())]), output, options)
    new = [listed_study(name, picture(f"{name}.png")) for name in "ab"]

    class Interrupted(ListedSource):
        def read(self, entry):
            if entry.id == "b":
                raise KeyboardInterrupt
            return super().read(entry)

    with pytest.raises(KeyboardInterrupt, match=r"1 studies in 1 complete shards .*; --resume --overwrite continues"):
        build_studies_dataset(Interrupted(new), output, options, overwrite=True)
    with pytest.raises(ValueError, match="built exists: --overwrite replaces it"):
        build_studies_dataset(ListedSource(new), output, options, resume=True)
    os.unlink(tmp_path / "a.png")
    build_studies_dataset(ListedSource(new), output, options, resume=True, overwrite=True)
    assert load_from_disk(output)["train"]["id"] == ["a", "b"]


@pytest.mark.parametrize(("module", "step", "name"), [(shutil, "rmtree", "shards"), (os, "replace", "summary.json")])
def test_build_interrupted_at_its_end_keeps_the_shards(tmp_path, picture, monkeypatch, module, step, name):
    source = ListedSource([listed_study("a", picture())])
    real = getattr(module, step)

    def stopped(*paths, **options):
        if os.path.basename(paths[-1]) == name:
            raise KeyboardInterrupt
        return real(*paths, **options)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt, match="1 studies in 1 complete shards"):
        patch.setattr(module, step, stopped)
        build_studies_dataset(source, tmp_path / "built")
    os.unlink(tmp_path / "view.png")
    build_studies_dataset(source, tmp_path / "built", resume=True)
    assert load_from_disk(tmp_path / "built")["train"]["id"] == ["a"]
    assert not list(tmp_path.glob("built.partial")) and not (tmp_path / "built" / "shards").exists()


def test_build_without_settings_file_is_not_resumed(tmp_path):
    (tmp_path / "built.partial").mkdir()
    with pytest.raises(ValueError, match=r"build\.json is missing or damaged: --overwrite instead of --resume starts"):
        prepare_studies("phantom", tmp_path / "built", resume=True, **PHANTOMS)
    prepare_studies("phantom", tmp_path / "built", overwrite=True, **PHANTOMS)


def test_build_complete_is_not_changed_by_resume(tmp_path):
    first = prepare_studies("phantom", tmp_path / "built", **PHANTOMS)
    made = (tmp_path / "built" / "summary.json").stat().st_mtime_ns
    again = prepare_studies("phantom", tmp_path / "built", resume=True, **PHANTOMS)
    assert str(again) == str(first)
    assert (tmp_path / "built" / "summary.json").stat().st_mtime_ns == made
    with pytest.raises(ValueError, match=r"was made with other settings \(source\.train=7, now 8\)"):
        prepare_studies("phantom", tmp_path / "built", resume=True, **{**PHANTOMS, "train": 8})


def test_build_made_before_an_option_existed_is_resumed(tmp_path):
    prepare_studies("phantom", tmp_path / "built", **PHANTOMS)
    path = tmp_path / "built" / "summary.json"
    summary = json.loads(path.read_text(encoding="utf-8"))
    for name in ("source.prior_share", "source.prior_findings", "priors"):
        del summary["settings"][name]
    path.write_text(json.dumps(summary), encoding="utf-8")
    assert prepare_studies("phantom", tmp_path / "built", resume=True, **PHANTOMS).counts["train"].studies == 7
    with pytest.raises(ValueError, match=r"other settings \(source\.prior_share=0\.0, now 1\.0\)"):
        prepare_studies("phantom", tmp_path / "built", resume=True, prior_share=1.0, **PHANTOMS)


def test_build_source_without_studies_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="source 'listed' holds no studies"):
        build_studies_dataset(ListedSource([]), tmp_path / "built")


def test_prepared_column_and_stream_read_the_studies(tmp_path):
    prepare_studies("phantom", tmp_path / "built", build=BuildOptions(studies_per_shard=3), **PHANTOMS)
    assert prepared_column(tmp_path / "built", "train", "id") == load_studies("phantom", **PHANTOMS)["train"]["id"]
    stream = stream_prepared(tmp_path / "built", "train")
    assert stream.num_shards == 3 and next(iter(stream))["images"][0].size == (32, 32)
    with pytest.raises(ValueError, match="has no split 'dev': it has train, validation, test"):
        stream_prepared(tmp_path / "built", "dev")
    with pytest.raises(ValueError, match="is not a prepared dataset; expected a folder written by otdrg prepare"):
        load_studies("prepared", folder=tmp_path)


def test_load_in_memory_skipped_studies_are_one_warning(picture, tmp_path, caplog, monkeypatch):
    from otdrg.studies.loading import load_in_memory

    source = ListedSource([listed_study("a", picture()), listed_study("b", str(tmp_path / "absent.png"))])
    with caplog.at_level(logging.WARNING):
        studies = load_in_memory(source)
    assert studies["train"]["id"] == ["a"]
    assert "listed: 1 studies left out: b (missing image:" in caplog.text


# --- studies that are damaged ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [
        KeyError("Rows"),
        TypeError("int() argument must be a string"),
        AttributeError("'NoneType' object has no attribute 'x'"),
        RecursionError("maximum recursion depth exceeded"),
        MemoryError(),
        OSError("truncated"),
        UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"),
        NotImplementedError("VR 'OV'"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_prepare_unreadable_study_is_skipped_and_named(tmp_path, picture, error):
    listed = [listed_study("a", picture()), StudyEntry("bad", "bad", "train", error), listed_study("c", picture())]
    report = build_studies_dataset(ListedSource(listed), tmp_path / "built")
    assert report.counts["train"].studies == 2 and report.skipped == 1
    (fault,) = skipped_of(tmp_path / "built")
    assert (fault["id"], fault["kind"], fault["kept"]) == ("bad", "malformed", False)
    assert fault["reason"].startswith(type(error).__name__) and "\n" not in fault["reason"]


def test_prepare_reason_does_not_quote_the_report(tmp_path, picture):
    error = ValueError("invalid literal for int() with base 10: 'John Doe, 12.03.1950, has pneumonia'")
    listed = [listed_study("a", picture()), StudyEntry("bad", "bad", "train", error)]
    build_studies_dataset(ListedSource(listed), tmp_path / "built")
    text = (tmp_path / "built" / "skipped.jsonl").read_text(encoding="utf-8")
    assert "invalid literal" in text and "Doe" not in text


@pytest.mark.parametrize(
    "broken",
    [
        {"name": "sur\udcffrogate"},
        {"name": "nul\0"},
        {"name": "  "},
        {"name": "x", "findings": "lungs \udcff clear"},
        {"name": "x", "patient": "p\ud800"},
        {"name": "x", "finding_states": [1, 2, "three"]},
        {"name": "x", "findings": 3},
        {"name": "x", "indication": ["cough"]},
        {"name": "x", "view": "view\0.png"},
        {"name": "x", "view": "v" * 5000 + ".png"},
        {"name": "x", "view": "view\udcff.png"},
        {"name": "x", "view": None},
    ],
    ids=str,
)
def test_prepare_unwritable_study_is_skipped_and_named(tmp_path, picture, broken):
    view = broken.pop("view", picture("b.png"))
    listed = [listed_study("a", picture()), listed_study(broken.pop("name"), view, **broken)]
    report = build_studies_dataset(ListedSource(listed), tmp_path / "built")
    assert report.counts["train"].studies == 1 and report.skipped == 1
    assert load_from_disk(tmp_path / "built")["train"]["id"] == ["a"]
    (fault,) = skipped_of(tmp_path / "built")
    assert fault["reason"] and "\n" not in fault["reason"]


def test_prepare_id_of_any_length_is_kept(tmp_path, picture):
    name = "\u00e9/" * 3000
    build_studies_dataset(ListedSource([listed_study(name, picture())]), tmp_path / "built")
    assert load_from_disk(tmp_path / "built")["train"]["id"] == [name]


def test_prepare_full_disk_stops_and_keeps_the_build(tmp_path, picture):
    error = OSError(errno.ENOSPC, "No space left on device")
    listed = [listed_study("a", picture()), StudyEntry("b", "b", "train", error)]
    with pytest.raises(OSError, match="No space left"):
        build_studies_dataset(ListedSource(listed), tmp_path / "built", BuildOptions(studies_per_shard=1))
    listed[1] = StudyEntry("b", "b", "train", listed_study("b", picture()).location)
    build_studies_dataset(ListedSource(listed), tmp_path / "built", BuildOptions(studies_per_shard=1), resume=True)
    assert load_from_disk(tmp_path / "built")["train"]["id"] == ["a", "b"]


# --- processes -------------------------------------------------------------------------------------------------------

SLOW = """
import sys, time
from dataclasses import dataclass
import numpy as np
from PIL import Image
from otdrg.cli import main
from otdrg.studies import phantom

real = phantom.PhantomSource.read

def slow(self, entry):
    time.sleep(0.2)
    return real(self, entry)

phantom.PhantomSource.read = slow
if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture
def slow_prepare(tmp_path):
    """Starts `otdrg prepare` with a source that takes its time, and waits until it has built a shard."""
    script = tmp_path / "slow.py"
    script.write_text(SLOW, encoding="utf-8")
    started = []

    def start(output, *arguments):
        command = [sys.executable, str(script), "prepare", "phantom", "--train", "60", "--validation", "0"]
        command += ["--test", "0", "--image-size", "32", "--studies-per-shard", "2", "--output", str(output)]
        # A test run in the background ignores SIGINT, and its children would, too.
        process = subprocess.Popen(
            [*command, *arguments],
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
        started.append(process)
        shards, deadline = output.with_name(f"{output.name}.partial") / "shards", time.monotonic() + 60
        while not list(shards.glob("*.json")) and time.monotonic() < deadline:
            time.sleep(0.05)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


@pytest.mark.parametrize(("how", "status", "num_proc"), [(signal.SIGTERM, 143, "1"), (signal.SIGINT, 130, "2")])
def test_prepare_running_refuses_a_second_process_and_says_what_is_kept_on_a_signal(
    slow_prepare, tmp_path, capsys, how, status, num_proc
):
    output = tmp_path / "built"
    process = slow_prepare(output, "--num-proc", num_proc)
    for more in ([], ["--overwrite"], ["--resume"]):
        assert main(["prepare", "phantom", "--train", "3", "--output", str(output), *more]) == 1
        error = capsys.readouterr().err
        assert f"{output} is being written by process {process.pid} on " in error and error.count("\n") == 1
    assert process.poll() is None
    process.send_signal(how)
    _, error = process.communicate(timeout=60)
    assert process.returncode == status and "Traceback" not in error
    name = "terminated (SIGTERM)" if how == signal.SIGTERM else "interrupted"
    last = error.strip().splitlines()[-1]
    assert f"otdrg prepare: {name}; " in last
    assert last.endswith(f"complete shards are kept in {tmp_path / 'built.partial'}; --resume continues")


def test_prepare_killed_leaves_no_child_process(slow_prepare, tmp_path):
    process = slow_prepare(tmp_path / "built", "--num-proc", "2")
    children = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    _, alive = psutil.wait_procs(children, timeout=60)
    assert children and not alive
    build = BuildOptions(studies_per_shard=2)
    options = {"train": 60, "validation": 0, "test": 0, "image_size": 32}
    report = prepare_studies("phantom", tmp_path / "built", build=build, resume=True, **options)
    assert report.counts["train"].studies == options["train"]
