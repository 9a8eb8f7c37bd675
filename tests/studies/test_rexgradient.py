import logging
import os
import pickle
import threading
from datetime import date

import pyarrow as pa
import pytest
from otdrg.runtime.output_lock import OutputLock
from otdrg.studies import load_studies, open_source, prepare_studies
from otdrg.studies import rexgradient as module
from otdrg.studies.build import BuildOptions, build_share, merge_shares
from otdrg.studies.publish import push_studies
from otdrg.studies.shards import Share
from otdrg.studies.source import Skipped
from published_trees import REXGRADIENT_SPLITS, ReXGradientDownload, png


@pytest.fixture
def download(tmp_path):
    return ReXGradientDownload(tmp_path)


@pytest.fixture
def three(download):
    """One study in each split, the first with two views."""
    download.study(1, views=("LATERAL", "POSTERO_ANTERIOR"))
    download.study(2, "valid", views=(None,))
    download.study(3, "test", views=("AP",))
    return download


def test_rexgradient_parts_are_unpacked_and_studies_read(three):
    source = open_source("rexgradient", **three.write())
    entries = list(source.entries())
    assert [(entry.patient_id, entry.split, entry.location.time) for entry in entries] == [
        ("GRDNPATIENT1", "train", date(2014, 3, 1)),
        ("GRDNPATIENT2", "validation", date(2014, 3, 2)),
        ("GRDNPATIENT3", "test", date(2014, 3, 3)),
    ]
    assert entries[0].id == "pGRDNPATIENT1_aGRDNACCESSION1_s1.2.1"
    studies = [pickle.loads(pickle.dumps(source)).read(entry) for entry in entries]
    assert [list(study.views) for study in studies] == [["frontal", "lateral"], ["unknown"], ["frontal"]]
    first = studies[0]
    assert (first.findings, first.impression) == ("The lungs of 1 are clear.", "No acute finding.")
    assert (first.indication, first.comparison) == ("Cough.", "None.")
    assert "Non-Commercial" in first.licence
    assert [os.path.basename(path) for path in first.images] == ["1.4.1.png", "1.4.0.png"]
    # The images of the metadata only, and no joined archive.
    assert three.unpacked() == three.images
    assert {path.name for path in three.root.iterdir()} == {
        "metadata",
        "deid_png",
        *(f"deid_png.part0{number}" for number in range(4)),
    }


@pytest.mark.parametrize("kept", ["images", "parts"])
def test_rexgradient_images_or_parts_are_enough(three, kept):
    options = three.write()
    list(open_source("rexgradient", **options).entries())
    if kept == "images":
        for number in range(4):
            three.part(number).unlink()
    else:
        assert not (three.root / "deid_png" / "unlisted.png").exists()
        os.rename(three.root / "deid_png", three.root / "elsewhere")
    assert len(load_studies("rexgradient", **options)["train"][0]["images"]) == 2


def test_rexgradient_plain_tar_is_unpacked(three):
    packed = pa.CompressedInputStream(pa.BufferReader(three.archive()), "zstd").read()
    list(open_source("rexgradient", **three.write(packed=packed, parts=3)).entries())
    assert three.unpacked() == three.images


def test_rexgradient_unpacked_parts_are_not_read_again(three, monkeypatch):
    images = three.root.parent / "images"
    options = three.write(images=str(images))
    missing = next(iter(three.images))
    three.images.pop(missing)
    three.write()
    assert load_studies("rexgradient", **options)["test"]["id"]
    monkeypatch.setattr(module, "unpack_images", None)
    entries = list(open_source("rexgradient", **options).entries())
    assert len(entries) == 3 and not (images / missing).exists()


def test_rexgradient_images_of_metadata_added_later_are_unpacked(three):
    options = three.write()
    train = three.root / "metadata" / "train_metadata_view_position.json"
    train.rename(three.root / "later.json")
    assert list(load_studies("rexgradient", **options)) == ["validation", "test"]
    (three.root / "later.json").rename(train)
    assert list(load_studies("rexgradient", **options)) == ["train", "validation", "test"]
    assert three.unpacked() == three.images


def test_rexgradient_deleted_image_is_unpacked_again(three):
    options = three.write()
    list(open_source("rexgradient", **options).entries())
    next((three.root / "deid_png").rglob("*.png")).unlink()
    list(open_source("rexgradient", **options).entries())
    assert three.unpacked() == three.images


def half(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    ("number", "damage", "message"),
    [
        (1, half, r"deid_png\.part01 has [\d,]+ bytes and deid_png\.part00 [\d,]+: it is half downloaded, download it"),
        (3, half, r"deid_png\.part03 ends before the archive: it is half downloaded, or the part after it is missing"),
        (3, os.unlink, r"deid_png\.part02 ends before the archive: it is half downloaded, or the part after it"),
        (2, os.unlink, r"deid_png\.part02 is missing, and deid_png\.part03 exists: download it"),
        (0, os.unlink, r"deid_png\.part00 is missing, and deid_png\.part01 exists: download it"),
        (2, lambda path: path.write_bytes(b""), r"deid_png\.part02 is empty: download it again"),
    ],
)
def test_rexgradient_half_downloaded_part_is_named_and_nothing_lost(download, number, damage, message):
    for study in range(12):
        download.study(study)
    options = download.write()
    whole = download.part(number).read_bytes()
    damage(download.part(number))
    with pytest.raises(ValueError, match=message) as caught:
        prepare_studies("rexgradient", download.root.parent / "out", **options)
    assert "\n" not in str(caught.value)
    assert not list(download.root.parent.glob("out*"))
    before = {path: path.stat().st_mtime_ns for path in (download.root / "deid_png").rglob("*.png")}
    for name, data in download.unpacked().items():
        assert download.images[name] == data
    download.part(number).write_bytes(whole)
    assert prepare_studies("rexgradient", download.root.parent / "out", **options).counts["train"].images == 12
    assert all(path.stat().st_mtime_ns == changed for path, changed in before.items())


def test_rexgradient_images_before_the_half_part_are_kept(download):
    for study in range(40):
        download.study(study, images=[png(study, (128, 128))])
    options = download.write()
    half(download.part(3))
    with pytest.raises(ValueError, match=r"part03 ends before .*; what was unpacked before is kept"):
        list(open_source("rexgradient", **options).entries())
    kept = download.unpacked()
    assert 20 < len(kept) < 40 and all(download.images[name] == data for name, data in kept.items())


def test_rexgradient_damaged_image_in_the_parts_is_skipped_and_counted(three, caplog):
    name = f"{'/'.join(next(iter(three.images)).split('/')[:-1])}/1.4.0.png"
    data = bytearray(three.images[name])
    data[60] ^= 1
    three.images[name] = bytes(data)
    report = prepare_studies("rexgradient", three.root.parent / "out", **three.write())
    assert report.counts["train"].missing_images == 1 and report.counts["test"].studies == 1
    assert "1 images are damaged in the parts and were not unpacked: GRDNPATIENT1/" in caplog.text


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"ImagePath": None}, "ImagePath is None: expected a list of paths"),
        ({"ImagePath": []}, "expected a list of paths"),
        ({"ImagePath": ["../deid_png/../../secret.png"]}, "leaves the folder of images"),
        ({"ImagePath": ["/etc/passwd"]}, "leaves the folder of images"),
        ({"Findings": 3}, "Findings is of type int: expected a text or null"),
    ],
)
def test_rexgradient_damaged_record_is_skipped(three, fields, reason):
    three.study(4, **fields)
    three.records["train"]["nothing"] = None
    entries = list(open_source("rexgradient", **three.write()).entries())
    damaged = [entry for entry in entries if isinstance(entry, Skipped)]
    assert len(entries) == 5 and [entry.split for entry in damaged] == ["train", "train"]
    assert reason in damaged[0].reason and "train_metadata_view_position.json, p" in damaged[0].reason
    assert damaged[1].id == "nothing" and "expected an object" in damaged[1].reason


def test_rexgradient_fields_that_lack_are_unknown(download):
    download.study(1, StudyDate=None, ImageViewPosition=None, Indication=None, Comparison=float("nan"), PatientID=None)
    (entry,) = open_source("rexgradient", **download.write()).entries()
    assert entry.patient_id == "GRDNPATIENT1" and entry.location.time is None
    assert entry.location.views == ("unknown",) and entry.location.texts[2:] == ("", "")


def test_rexgradient_section_that_lacks_is_counted(three, tmp_path):
    three.study(4, Findings=None)
    options = three.write()
    assert prepare_studies("rexgradient", tmp_path / "f", **options).counts["train"].empty_reports == 1
    build = BuildOptions(sections="impression")
    assert prepare_studies("rexgradient", tmp_path / "i", build=build, **options).counts["train"].studies == 2


def test_rexgradient_published_counts_are_compared(three, tmp_path, monkeypatch):
    warnings = prepare_studies("rexgradient", tmp_path / "a", **three.write()).warnings
    assert warnings == [
        "train: 1 studies, 2 images, 1 patients listed; "
        "140,000 studies, 238,968 images, 95,716 patients in the published collection",
        "validation: 1 studies, 1 images, 1 patients listed; "
        "10,000 studies, 17,007 images, 6,964 patients in the published collection",
        "test: 1 studies, 1 images, 1 patients listed; "
        "10,000 studies, 17,029 images, 6,807 patients in the published collection",
    ]
    # The 160,000 studies, 273,004 images and 109,487 patients of the paper.
    totals = [sum(counts[unit] for counts in module.PUBLISHED.values()) for unit in ("studies", "images", "patients")]
    assert totals == [160_000, 273_004, 109_487]
    one = {"studies": 1, "images": 1, "patients": 1}
    monkeypatch.setattr(module, "PUBLISHED", {"train": {**one, "images": 2}, "validation": one, "test": one})
    assert prepare_studies("rexgradient", tmp_path / "b", **three.write()).warnings == []
    limited = prepare_studies("rexgradient", tmp_path / "c", build=BuildOptions(limit=1), **three.write())
    assert limited.warnings == []


def test_rexgradient_licence_is_not_published(three, tmp_path):
    prepare_studies("rexgradient", tmp_path / "out", **three.write())
    with pytest.raises(ValueError, match="Data Access and Use Agreement, which forbids publishing: remove --public"):
        push_studies(tmp_path / "out", "org/rexgradient", public=True)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": {"Findi', "train_metadata_view_position.json is not valid JSON"),
        (b"[]", "holds a list: expected a JSON object"),
        (b"{}", "no study in .*train_metadata_view_position.json"),
    ],
)
def test_rexgradient_damaged_metadata_is_one_line(three, content, message):
    options = three.write()
    for split in REXGRADIENT_SPLITS:
        path = three.root / "metadata" / f"{split}_metadata_view_position.json"
        path.write_bytes(content) if split == "train" else path.unlink()
    with pytest.raises(ValueError, match=message) as caught:
        list(open_source("rexgradient", **options).entries())
    assert "\n" not in str(caught.value)


def test_rexgradient_wrong_folders_are_named(three, tmp_path):
    three.write()
    with pytest.raises(ValueError, match=r"nowhere does not exist: option 'root' names the download"):
        open_source("rexgradient", root=str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match=r"has no metadata/train_metadata_view_position\.json"):
        open_source("rexgradient", root=str(tmp_path))
    for number in range(4):
        three.part(number).unlink()
    with pytest.raises(ValueError, match=r"deid_png does not exist, and .* has no deid_png\.part00 to unpack"):
        open_source("rexgradient", root=str(three.root))


def test_rexgradient_shares_give_the_dataset_of_one_process(download, tmp_path):
    for study in range(9):
        download.study(study, REXGRADIENT_SPLITS[study % 3])
    options = BuildOptions(studies_per_shard=1, parquet_only=True)
    source = open_source("rexgradient", **download.write())
    for index in (2, 1):
        build_share(source, tmp_path / "shares", Share(index, 2), options)
    merged = merge_shares(source, tmp_path / "shares", options)
    whole = prepare_studies("rexgradient", tmp_path / "whole", build=options, **download.write())
    assert merged.warnings == whole.warnings and len(merged.warnings) == 3
    assert [path.read_bytes() for path in sorted((tmp_path / "shares").rglob("*.parquet"))] == [
        path.read_bytes() for path in sorted((tmp_path / "whole").rglob("*.parquet"))
    ]


def test_rexgradient_waits_for_the_process_that_unpacks(three, caplog):
    source = open_source("rexgradient", **three.write())
    caplog.set_level(logging.WARNING)
    with OutputLock(three.root / "deid_png"):
        waiting = threading.Thread(target=lambda: list(source.entries()))
        waiting.start()
        while "deid_png: waiting for it" not in caplog.text:
            waiting.join(0.05)
        assert waiting.is_alive() and not (three.root / "deid_png").exists()
    waiting.join(20)
    assert three.unpacked() == three.images
