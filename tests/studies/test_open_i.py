import io
import json
import os
import pickle
import tarfile
from collections import Counter
from pathlib import Path

import pytest
from otdrg.studies import load_studies
from otdrg.studies.iu_xray_split import IU_XRAY_COUNTS, r2gen_split, r2gen_split_ids
from otdrg.studies.open_i import OpenISource
from otdrg.studies.source import Skipped, StudyEntry
from PIL import Image

LICENCE = (
    "<licenseType>open-access</licenseType>"
    "<licenseURL>http://creativecommons.org/licenses/by-nc-nd/4.0/</licenseURL><ccLicense>byncnd</ccLicense>"
)

# Of R2Gen's split: CXR1 and CXR5 are in train, CXR4 is in validation, CXR2 in none of the lists (test), CXR3 left out.
IMAGES = {
    1: ["CXR1_1_IM-0001-3001", "CXR1_1_IM-0001-4001", "CXR1_1_IM-0001-4002"],
    2: ["CXR2_IM-0652-1001", "CXR2_IM-0652-2001"],
    3: ["CXR3_IM-1384-1001", "CXR3_IM-1384-2001"],
    4: ["CXR4_IM-2050-1001", "CXR4_IM-2050-2001"],
    57: ["CXR57_IM-2170-1001-0001", "CXR57_IM-2170-1001-0002"],
}


def xml(number, images=(), licence=LICENCE, **sections):
    sections = {"findings": f"Findings of {number}.", **sections}
    texts = "".join(f'<AbstractText Label="{name.upper()}">{text}</AbstractText>' for name, text in sections.items())
    parents = "".join(f'<parentImage id="{image}"><caption>Chest</caption></parentImage>' for image in images)
    return (
        f'<?xml version="1.0" encoding="utf-8"?>\n<eCitation><uId id="CXR{number}"/>{licence}'
        f"<MedlineCitation><Article><Abstract>{texts}</Abstract></Article></MedlineCitation>{parents}</eCitation>"
    )


def write_images(folder, layout, studies=IMAGES):
    folder.mkdir(exist_ok=True)
    for names in studies.values():
        for place, name in enumerate(names):
            if layout == "official":
                path = folder / f"{name}.png"
            elif layout == "kaggle":
                path = folder / f"{name.removeprefix('CXR').replace('1_1_', '1_', 1)}.dcm.png"
            else:
                path = folder / name.rpartition("-")[0] / f"{place}{layout}"
            path.parent.mkdir(exist_ok=True)
            Image.linear_gradient("L").resize((16, 16)).save(path)


@pytest.fixture
def collection(tmp_path):
    """Writes reports and images; returns the source's options."""

    def write(reports=None, layout="official", packed=True, studies=IMAGES):
        reports = {f"{number}.xml": xml(number, images) for number, images in studies.items()} | (reports or {})
        write_images(tmp_path / "images", layout, studies)
        folder = tmp_path / "reports" / "ecgen-radiology"
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in reports.items():
            (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        if packed:
            with tarfile.open(tmp_path / "reports.tgz", "w:gz") as archive:
                archive.add(folder, "ecgen-radiology")
        return {
            "reports": str(tmp_path / "reports.tgz") if packed else str(folder),
            "images": str(tmp_path / "images"),
        }

    return write


def kept(source):
    return [entry for entry in source.entries() if isinstance(entry, StudyEntry)]


def skipped(source):
    return [entry for entry in source.entries() if isinstance(entry, Skipped)]


def test_open_i_r2gen_split_is_reproduced(collection):
    source = OpenISource(**collection())
    assert [entry[:3] for entry in kept(source)] == [
        ("CXR1_1_IM-0001", "CXR1", "train"),
        ("CXR2_IM-0652", "CXR2", "test"),
        ("CXR4_IM-2050", "CXR4", "validation"),
        ("CXR57_IM-2170-1001", "CXR57", "train"),
    ]
    (left_out,) = skipped(source)
    assert (left_out.id, left_out.split, left_out.kind) == ("CXR3_IM-1384", None, "outside the split")
    assert source.official_counts == {"train": 2069, "validation": 296, "test": 590}
    assert source.official_unit == "studies"


def test_open_i_sections_and_licence_are_read(collection):
    text = xml(5, ["CXR5_IM-2117-1001"], findings="  A &lt; B.\n Kept as it is. ", impression="", indication="Cough")
    terms = "<MeSH><major>Spine/degenerative</major><major>Granuloma</major><automatic>spine</automatic></MeSH>"
    text = text.replace("</eCitation>", f"{terms}</eCitation>")
    source = OpenISource(**collection({"5.xml": text}))
    study = source.read(kept(source)[3])
    assert (study.findings, study.impression) == ("  A < B.\n Kept as it is. ", "")
    assert (study.indication, study.comparison, study.licence) == ("Cough", "", "CC BY-NC-ND 4.0")
    assert study.tags == ("Spine/degenerative", "Granuloma")


@pytest.mark.parametrize(
    ("stated", "licence"),
    [
        ("<licenseURL>https://creativecommons.org/licenses/by/3.0/</licenseURL>", "CC BY 3.0"),
        ("<ccLicense>byncnd</ccLicense>", "CC BY-NC-ND 4.0"),
        ("<licenseType>open-access</licenseType>", "open-access"),
        ("", ""),
    ],
)
def test_open_i_licence_is_the_stated_one(collection, stated, licence):
    source = OpenISource(**collection({"1.xml": xml(1, IMAGES[1], licence=stated)}))
    assert source.read(kept(source)[0]).licence == licence


@pytest.mark.parametrize(
    ("layout", "names"),
    [
        ("official", ["CXR1_1_IM-0001-3001.png", "CXR1_1_IM-0001-4001.png"]),
        ("kaggle", ["1_IM-0001-3001.dcm.png", "1_IM-0001-4001.dcm.png"]),
        (".png", ["CXR1_1_IM-0001/0.png", "CXR1_1_IM-0001/1.png"]),
        (".jpg", ["CXR1_1_IM-0001/0.jpg", "CXR1_1_IM-0001/1.jpg"]),
    ],
)
def test_open_i_image_layouts_are_found(collection, layout, names):
    options = collection(layout=layout)
    source = OpenISource(**options)
    assert source.read(kept(source)[0]).images == [f"{options['images']}/{name}" for name in names]
    assert all(os.path.isfile(path) for entry in kept(source) for path in source.read(entry).images)


@pytest.mark.parametrize(
    ("layout", "name"),
    [
        ("official", "CXR2_IM-0652-2001.png"),
        ("kaggle", "2_IM-0652-2001.dcm.png"),
        (".png", "CXR2_IM-0652/1.png"),
        (".jpg", "CXR2_IM-0652/1.jpg"),
    ],
)
def test_open_i_missing_image_has_the_expected_name(collection, layout, name):
    options = collection(layout=layout)
    os.remove(f"{options['images']}/{name}")
    source = OpenISource(**options)
    assert source.read(kept(source)[1]).images[1] == f"{options['images']}/{name}"


def test_open_i_archive_and_folder_list_the_same(collection, tmp_path):
    options = collection()
    archived = list(OpenISource(**options).entries())
    for folder in ("reports", "reports/ecgen-radiology"):
        assert list(OpenISource(**options | {"reports": str(tmp_path / folder)}).entries()) == archived
    assert len(archived) == len(IMAGES)


def test_open_i_archive_links_are_not_followed(collection, tmp_path):
    options = collection()
    with tarfile.open(options["reports"], "w:gz") as archive:
        for name, text in {"../../2.xml": xml(2, IMAGES[2]), "/a/._4.xml": "junk", "README.txt": "Read me."}.items():
            member = tarfile.TarInfo(name)
            member.size = len(text)
            archive.addfile(member, io.BytesIO(text.encode()))
        link = tarfile.TarInfo("1.xml")
        link.type, link.linkname = tarfile.SYMTYPE, str(tmp_path / "reports" / "ecgen-radiology" / "1.xml")
        archive.addfile(link)
    before = sorted(tmp_path.rglob("*"))
    assert [entry.id for entry in OpenISource(**options).entries()] == ["CXR2_IM-0652"]
    assert sorted(tmp_path.rglob("*")) == before


def test_open_i_seeded_split_has_all_studies(collection):
    studies = {number: [f"CXR{number}_IM-{number:04}-{view}001" for view in (1, 2, 3)] for number in range(10, 40)}
    options = collection(studies=studies)
    source = OpenISource(**options, split="seeded", split_shares=[0.6, 0.2, 0.2])
    assert Counter(entry.split for entry in kept(source)) == {"train": 18, "validation": 6, "test": 6}
    assert {len(source.read(entry).images) for entry in kept(source)} == {3}
    assert not skipped(source)
    assert (source.official_counts, source.official_ids("train")) == (None, None)
    again = OpenISource(**options, split="seeded", split_shares=[0.6, 0.2, 0.2], seed=1)
    assert [entry.split for entry in kept(again)] != [entry.split for entry in kept(source)]


@pytest.mark.parametrize(("most", "counts"), [(None, [2, 2, 2, 2]), (1, [1, 1, 1, 1]), (9, [3, 2, 2, 2])])
def test_open_i_views_per_study_limits_views(collection, most, counts):
    source = OpenISource(**collection(), views_per_study=most)
    assert [len(source.read(entry).images) for entry in kept(source)] == counts


def test_open_i_projections_give_views(collection, tmp_path):
    path = tmp_path / "indiana_projections.csv"
    path.write_text(
        "uid,filename,projection\n1,1_IM-0001-3001.dcm.png,Lateral\n1,1_IM-0001-4001.dcm.png,Frontal\n"
        "2,2_IM-0652-1001.dcm.png,Frontal\n4,4_IM-2050-1001.dcm.png,\n"
    )
    options = collection()
    source = OpenISource(**options, projections=str(path))
    assert [source.read(entry).views for entry in kept(source)] == [
        ("lateral", "frontal"),
        ("frontal", "unknown"),
        ("unknown", "unknown"),
        ("unknown", "unknown"),
    ]
    assert OpenISource(**options).read(kept(OpenISource(**options))[0]).views == ("unknown", "unknown")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"uid,file\n", r"no column 'filename': expected filename, projection"),
        (b"", r"no column 'filename'"),
        (b"uid,filename,projection\n1,a,Oblique\n", r"line 2: projection is 'Oblique', expected Frontal or Lateral"),
        (b"uid,filename,projection\n1,\xff,Frontal\n", r"is not UTF-8"),
        (b"uid,filename,projection\n1,a.png,Frontal\n", r"names no image of the collection"),
    ],
)
def test_open_i_wrong_projections_are_named(collection, tmp_path, content, message):
    (tmp_path / "p.csv").write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        list(OpenISource(**collection(), projections=str(tmp_path / "p.csv")).entries())
    assert "p.csv" in str(caught.value)


BOMB = '<!DOCTYPE lol [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;&a;">]>'


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("<eCitation><uId", "not valid XML: "),
        ("", "not valid XML: "),
        (xml(4, IMAGES[4], findings="&undefined;"), "not valid XML: undefined entity"),
        (xml(4, IMAGES[4], findings="caf\xe9").encode("latin-1"), "not valid XML: "),
        (xml(4, IMAGES[4]).replace("utf-8", "no-such"), "unknown encoding"),
        (xml(4, IMAGES[4], findings="&b;").replace("<eCitation>", BOMB + "<eCitation>"), "it has a DOCTYPE"),
        (
            xml(4, IMAGES[4], findings="&x;").replace(
                "<eCitation>", '<!DOCTYPE e [<!ENTITY x SYSTEM "file:///etc/passwd">]><eCitation>'
            ),
            "it has a DOCTYPE",
        ),
        (xml("", IMAGES[4]), "uId is 'CXR', expected CXR and a number"),
        ("<eCitation/>", "uId is '', expected CXR and a number"),
        (xml(4, ["../../secret"]), "parentImage is '../../secret', expected a name as CXR4_IM-0001-1001"),
        (xml(4, ["CXR5_IM-2117-1001"]), "parentImage is 'CXR5_IM-2117-1001'"),
        (xml(4, IMAGES[4], findings="x" * 2_000_000), "more than 1,000,000 bytes"),
    ],
)
@pytest.mark.parametrize("packed", [True, False])
def test_open_i_malformed_report_is_skipped(collection, text, reason, packed):
    source = OpenISource(**collection({"4.xml": text}, packed=packed))
    (fault,) = (item for item in skipped(source) if item.kind == "malformed")
    assert (fault.id, fault.split) == ("CXR4", "validation")
    assert reason in fault.reason and "4.xml" in fault.reason and "\n" not in fault.reason
    assert len(kept(source)) == 3


def test_open_i_report_without_images_is_skipped(collection):
    source = OpenISource(**collection({"2.xml": xml(2)}))
    assert skipped(source)[0] == Skipped("CXR2", "test", "missing image", "CXR2 lists no image")


def test_open_i_pickled_source_reads(collection):
    source = OpenISource(**collection())
    entries = kept(source)
    os.remove(source.reports)
    pickled = pickle.dumps(source)
    assert len(pickled) < 2000
    assert pickle.loads(pickled).read(entries[0]) == source.read(entries[0])


def test_open_i_dataset_is_loaded(collection, caplog):
    options = collection(layout=".jpg")
    os.remove(f"{options['images']}/CXR4_IM-2050/1.jpg")
    studies = load_studies("open-i", **options)
    assert {split: rows["id"] for split, rows in studies.items()} == {
        "train": ["CXR1_1_IM-0001", "CXR57_IM-2170-1001"],
        "test": ["CXR2_IM-0652"],
    }
    assert [image.size for image in studies["train"][0]["images"]] == [(16, 16), (16, 16)]
    assert studies["test"][0]["report"] == "Findings of 2."
    assert "CXR4_IM-2050 (missing image: " in caplog.text and "CXR3_IM-1384 (outside the split: " in caplog.text


def test_open_i_relative_paths_read_from_elsewhere(collection, tmp_path, monkeypatch):
    collection()
    monkeypatch.chdir(tmp_path)
    source = OpenISource(reports="reports.tgz", images="images")
    monkeypatch.chdir("/")
    assert all(os.path.isfile(path) for entry in kept(source) for path in source.read(entry).images)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reports": "nowhere.tgz"}, r"nowhere\.tgz does not exist: option 'reports'"),
        ({"images": "nowhere"}, r"nowhere does not exist: option 'images'"),
        ({"projections": "nowhere.csv"}, r"nowhere\.csv does not exist: option 'projections'"),
        ({"split": "official"}, r"option 'split' is 'official': expected r2gen or seeded"),
        ({"views_per_study": 0}, r"option 'views_per_study' is 0: expected a whole number of 1 or more"),
        ({"split": "seeded", "split_shares": [1.0]}, r"split_shares"),
    ],
)
def test_open_i_wrong_options_are_named(collection, options, message):
    with pytest.raises(ValueError, match=message):
        OpenISource(**collection() | options)


def test_open_i_other_reports_file_is_an_error(collection, tmp_path):
    options = collection()
    whole = Path(options["reports"]).read_bytes()
    for content in (b"no archive", whole[: len(whole) // 2], b""):
        (tmp_path / "bad.tgz").write_bytes(content)
        with pytest.raises(ValueError, match=r"bad\.tgz is not a whole tar archive .*option 'reports'"):
            list(OpenISource(**options | {"reports": str(tmp_path / "bad.tgz")}).entries())
    with pytest.raises(ValueError, match="holds no XML file"):
        list(OpenISource(**options | {"reports": options["images"]}).entries())


def test_open_i_other_image_folder_is_an_error(collection, tmp_path):
    (tmp_path / "others").mkdir()
    (tmp_path / "others" / "photo.png").touch()
    with pytest.raises(ValueError, match=r"others holds no image of the collection: expected CXR1_1_IM-0001-3001\.png"):
        list(OpenISource(**collection() | {"images": str(tmp_path / "others")}).entries())


def test_open_i_official_ids_are_those_of_r2gen():
    ids = r2gen_split_ids()
    assert {split: len(set(listed)) for split, listed in ids.items()} == {"train": 2069, "validation": 296}
    assert "CXR2384_IM-0942" in ids["train"]
    assert all(r2gen_split(study) == split for split, listed in ids.items() for study in listed)
    every = Counter(r2gen_split(f"CXR{number}") for number in range(1, 4000))
    # The collection has 3,955 of these numbers; the 44 it has not would be of the test split.
    assert every == {"train": 2069, "validation": 296, None: 1000, "test": IU_XRAY_COUNTS["test"] + 44}
    assert [r2gen_split(study) for study in ("CXR4000_IM-0001-1", "s1", "", "CXR", "CXR0")] == [None] * 5


@pytest.mark.skipif("OTDRG_IU_XRAY" not in os.environ, reason="OTDRG_IU_XRAY does not name the IU X-Ray folder")
def test_open_i_iu_xray_agrees_with_r2gen():
    folder = Path(os.environ["OTDRG_IU_XRAY"])
    images = str(folder / "images")
    source = OpenISource(reports=str(folder / "NLMCXR_reports_without_test.tgz"), images=images)
    annotation = json.loads((folder / "annotation.json").read_text(encoding="utf-8"))
    studies = {entry.id: (entry.split, source.read(entry)) for entry in kept(source)}
    assert Counter(item.kind for item in skipped(source)) == {"outside the split": 1000}
    whole = {name for name, (_, study) in studies.items() if all(os.path.isfile(path) for path in study.images)}
    assert studies.keys() - whole == {"CXR2084_IM-0715-1001", "CXR3809_IM-1919"}
    assert Counter(studies[name][0] for name in whole) == {"train": 2068, "validation": 295}
    assert sum(len(studies[name][1].images) for name in whole) == 4726
    for listed, split in (("train", "train"), ("val", "validation")):
        for study in annotation[listed]:
            found, read = studies[study["id"]]
            assert (found, read.findings) == (split, study["report"])
            assert read.images == [os.path.join(images, path) for path in study["image_path"]]
    for split, ids in r2gen_split_ids().items():
        assert {name for name, (found, _) in studies.items() if found == split} == set(ids)
