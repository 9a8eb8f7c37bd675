import os
import pickle

import pytest
from otdrg.studies.csv_table import CSVSource
from otdrg.studies.source import Skipped, StudyEntry


@pytest.fixture
def table(tmp_path):
    """Writes a table (text, or bytes) and returns the source that reads it."""

    def write(content, name="reports.csv", **options):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return CSVSource(table=str(path), **options)

    return write


def kept(source):
    return [entry for entry in source.entries() if isinstance(entry, StudyEntry)]


def skipped(source):
    return [entry for entry in source.entries() if isinstance(entry, Skipped)]


def read_all(source):
    return {entry.id: source.read(entry) for entry in kept(source)}


def test_csv_two_columns_are_enough(table, tmp_path):
    source = table("image,report\nx/a.png,The heart is normal.\nb.jpg,Small effusion.\n", licence="CC0")
    first, second = kept(source)
    assert (first.id, first.patient_id, second.id) == ("x/a", "x/a", "b")
    study = source.read(first)
    assert study.images == [str(tmp_path / "x" / "a.png")]
    assert (study.views, study.findings, study.impression, study.licence) == (
        ["unknown"],
        "The heart is normal.",
        "",
        "CC0",
    )
    assert source.read(second).findings == "Small effusion."
    assert list(source.entries()) == list(source.entries())


def test_csv_columns_are_found_in_any_case(table, tmp_path):
    images = tmp_path / "radiographs"
    images.mkdir()
    source = table(
        "Study ID,Patient_ID,IMAGE,View,findings,Impression,INDICATION,comparison,Split,Edema\n"
        "s1,p1,1.png,PA,Clear lungs.,No disease.,Cough.,None.,Train,1\n"
        "s1,p1,2.png,LATERAL,,,,,TRAIN,1\n"
        "s2,p2,3.png,,Edema.,,,,valid,1\n"
        "s3,p3,4.png,unknown,Rib fracture.,,,,test,0\n",
        images=str(images),
    )
    assert [(entry.id, entry.patient_id, entry.split) for entry in kept(source)] == [
        ("s1", "p1", "train"),
        ("s2", "p2", "validation"),
        ("s3", "p3", "test"),
    ]
    study = source.read(kept(source)[0])
    assert study.images == [str(images / "1.png"), str(images / "2.png")]
    assert study.views == ["frontal", "lateral"]
    assert (study.findings, study.impression, study.indication, study.comparison) == (
        "Clear lungs.",
        "No disease.",
        "Cough.",
        "None.",
    )


def test_csv_rows_of_a_study_may_be_apart(table):
    source = table("id,image,report\n7,a.png,One.\n8,b.png,Two.\n7,c.png,One.\n7,d.png,\n")
    studies = read_all(source)
    assert list(studies) == ["7", "8"]
    assert [os.path.basename(path) for path in studies["7"].images] == ["a.png", "c.png", "d.png"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("reports.tsv", b"image\treport\na.png\tClear, as before; no change.\n"),
        ("reports.csv", b'image;report\na.png;"Clear, as before; no change."\n'),
        ("reports.csv", b'\xef\xbb\xbfimage,report\r\na.png,"Clear, as before; no change."\r\n\r\n,\r\n'),
        ("reports.csv", b'image,report\na.png,"Clear, as before; no change."'),
    ],
)
def test_csv_separators_and_line_ends_are_read(table, name, content):
    assert read_all(table(content, name))["a"].findings == "Clear, as before; no change."


def test_csv_long_and_multiline_reports_are_read(table):
    long = "No change. " * 40_000
    source = table(
        f'image,report\na.png,"Lungs: clear.\n\nHeart: ""normal"".\r\nBones: intact."\nb.png,{long}\nc.png,End.\n'
    )
    studies = read_all(source)
    assert studies["a"].findings == 'Lungs: clear.\n\nHeart: "normal".\r\nBones: intact.'
    assert studies["b"].findings == long.strip()
    assert studies["c"].findings == "End."


def test_csv_encoding_option_decodes_the_table(table):
    text = "image,report\na.png,Zustand nach Röntgen\n"
    assert read_all(table(text.encode("cp1252"), encoding="cp1252"))["a"].findings == "Zustand nach Röntgen"
    assert read_all(table(text.encode("utf-8-sig"), encoding="utf-8-sig"))["a"].findings == "Zustand nach Röntgen"


def test_csv_column_option_maps_names(table):
    source = table(
        "id,file name,text,report\n1,a.png,The findings.,Something else.\n", column=["report=text", "image=File Name"]
    )
    assert read_all(source)["1"].findings == "The findings."
    assert (
        read_all(table("image,findings,report\na.png,,Whole.\n", column=["findings=report"]))["a"].findings == "Whole."
    )


def test_csv_findings_are_preferred_to_report(table):
    study = read_all(table("image,report,findings,impression\na.png,All of it.,Clear.,Normal.\n"))["a"]
    assert (study.findings, study.impression) == ("Clear.", "Normal.")


def test_csv_impression_alone_is_a_report(table):
    study = read_all(table("image,impression\na.png,Normal.\n"))["a"]
    assert (study.findings, study.impression) == ("", "Normal.")


def test_csv_without_split_assigns_patients(table):
    rows = "".join(f"s{i},p{i // 3},{i}.png,Report {i}.\n" for i in range(90))
    content = f"study_id,patient_id,image,report\n{rows}"
    entries = kept(table(content))
    splits = {}
    for entry in entries:
        splits.setdefault(entry.patient_id, set()).add(entry.split)
    assert all(len(of_patient) == 1 for of_patient in splits.values())
    counts = [sum(of_patient == {split} for of_patient in splits.values()) for split in ("train", "validation", "test")]
    assert counts == [24, 3, 3]
    assert kept(table(content)) == entries
    assert kept(table(content, seed=1)) != entries
    assert {entry.split for entry in kept(table(content, split_shares=[1, 0, 0]))} == {"train"}


def test_csv_pickled_source_reads_in_another_folder(table, tmp_path, monkeypatch):
    table("image,report\na.png,Clear.\n")
    monkeypatch.chdir(tmp_path)
    source = CSVSource(table="reports.csv")
    entry, copy = kept(source)[0], pickle.loads(pickle.dumps(source))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert copy.read(pickle.loads(pickle.dumps(entry))).findings == "Clear."


@pytest.mark.parametrize(
    ("header", "row", "name", "reason"),
    [
        ("image,report", "b.png", "line 3", "line 3: 1 cells, expected 2"),
        ("image,report", "b.png,Clear, no change.", "line 3", "line 3: 3 cells, expected 2"),
        ("id,image,report", "7,b.png,Clear, no change.", "7", "line 3: 4 cells, expected 3"),
        ("image,report", "../b.png,Clear.", "line 3", "image '../b.png' leaves the folder"),
        ("image,report", "x/../../b.png,Clear.", "line 3", "leaves the folder"),
        ("image,report", r"..\b.png,Clear.", "line 3", "leaves the folder"),
        ("image,report", "/etc/b.png,Clear.", "line 3", "leaves the folder"),
        ("image,report", r"C:\x\b.png,Clear.", "line 3", "leaves the folder"),
        ("image,report", ",Clear.", "line 3", "image is blank"),
        ("id,image,report", " ,b.png,Clear.", "line 3", "study_id is blank"),
        ("image,report,split", "b.png,Clear.,", "line 3", "split is '': expected one of train, val"),
        ("image,report,split", "b.png,Clear.,holdout", "line 3", "split is 'holdout'"),
        ("image,report", b"b.png,R\xf6ntgen", "line 3", "findings is not utf-8 text: set option 'encoding'"),
        ("image,report", b"b\xff.png,Clear.", "line 3", "image is not utf-8 text"),
        ("image,report", b"b.png,Cl\0ear.", "line 3", ""),
        ("image,report", 'b.png,"Clear." again', "line 3", "not CSV"),
        ("image,report", 'b.png,"Clear.', "line 3", "a quote that opens in the first line may not be closed"),
        ("image,report", 'b.png,"Clear,\nno",change\n', "line 3", "lines 3 to 4: 3 cells"),
        ("image,report", "b.png," + "x" * 2_000_000, "line 3", "not CSV (field larger than field limit"),
    ],
)
def test_csv_faulty_row_is_named_and_others_are_kept(table, header, row, name, reason):
    row = row.encode() if isinstance(row, str) else row
    cells = {"id": "1", "image": "a.png", "report": "First.", "view": "PA", "split": "test"}
    first = ",".join(cells[column] for column in header.split(","))
    last = first.replace("1,", "2,").replace("a.png", "c.png").replace("First", "Last")
    source = table(b"\n".join([header.encode(), first.encode(), row, last.encode()]))
    (fault,) = skipped(source)
    assert (fault.id, fault.kind) == (name, "malformed")
    assert fault.reason.startswith(f"{source.table}, line")
    assert reason in fault.reason and "\n" not in fault.reason
    assert [study.findings for study in read_all(source).values()] == ["First.", "Last."]
    fault.reason.encode()


@pytest.mark.parametrize(
    ("first", "second", "reason"),
    [
        ("s,p,1.png,Clear.,train", "s,p,2.png,Clear.,test", "lines 2 and 3: split 'train' and 'test' in the study s"),
        ("s,p,1.png,Clear.,train", "s,q,2.png,Clear.,train", "lines 2 and 3: patient 'p' and 'q' in the study s"),
        ("s,p,1.png,Clear.,train", "s,p,../2.png,Clear.,train", "line 3: image '../2.png' leaves"),
        ("s,p,../1.png,Clear.,train", "s,p,2.png,Clear.,train", "line 2: image '../1.png' leaves"),
    ],
)
def test_csv_faulty_row_skips_its_study(table, first, second, reason):
    source = table(f"study_id,patient_id,image,report,split\n{first}\n{second}\nt,q,3.png,Clear.,test\n")
    assert [entry.id for entry in kept(source)] == ["t"]
    (fault,) = skipped(source)
    assert fault.id == "s" and reason in fault.reason


def test_csv_different_texts_skip_the_study(table):
    from otdrg.studies.source import SkipStudy

    source = table("id,image,report\n1,a.png,Clear.\n1,b.png,\n1,c.png,Effusion.\n2,d.png,Clear.\n")
    first, second = kept(source)
    with pytest.raises(SkipStudy, match="line 4: findings differs from line 2") as skip:
        source.read(first)
    assert skip.value.kind == "malformed"
    assert source.read(second).findings == "Clear."


def test_csv_unclosed_quote_affects_one_study(table):
    source = table('image,report\na.png,"Clear.\nb.png,"Normal."\nc.png,"Effusion."\nd.png,"Open.\ne.png,End.\n')
    assert list(read_all(source)) == ["b", "c", "e"]
    assert [fault.id for fault in skipped(source)] == ["line 2", "line 5"]


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        ("", {}, "is empty: expected a header"),
        ("image,report\n\n", {}, "has no row below its header"),
        ("file,report\na.png,x\n", {}, "has no column 'image'; its columns: file, report; .* image=NAME"),
        ("image,text\na.png,x\n", {}, "has no column 'report'; its columns: image, text"),
        ("image,Image ,report\na.png,x\n", {}, "has 2 columns 'image'"),
        ("image,report\na,b\n", {"column": ["heart=report"]}, "names a field 'heart': expected one of image, "),
        ("image,report\na,b\n", {"column": ["report"]}, "'report': expected FIELD=COLUMN"),
        (
            "image,report\na,b\n",
            {"column": ["report=text"]},
            "has no column 'text', which option 'column' names for report; its columns: image, report",
        ),
        ("image,report\na,b\n", {"column": ["view=image", "view=report"]}, "the field 'view' twice"),
        ("image,report\na,b\n", {"split_shares": [0.5, 0.1, 0.1]}, "expected three shares"),
        ("image,report\na,b\n", {"encoding": "utf-9"}, "option 'encoding' is 'utf-9'"),
        (
            "image,report\na,b\n",
            {"encoding": "utf-16"},
            "option 'encoding' is 'utf-16': expected one that contains ASCII",
        ),
        ("image,report\na,b\n", {"images": "nowhere"}, "nowhere does not exist: option 'images'"),
        ("image,report\na,b\n".encode("utf-16"), {}, "is UTF-16 text: expected a CSV, saved as UTF-8"),
        (b"PK\x03\x04 and so on", {}, "is an Excel workbook"),
        (b"image,report\ra.png,Clear.\r", {}, "ends its lines with CR alone"),
        ('"image,report\na.png,Clear.\n', {}, "header: not CSV"),
    ],
)
def test_csv_unusable_table_is_a_one_line_error(table, content, options, message):
    with pytest.raises(ValueError, match=message) as error:
        list(table(content, **options).entries())
    assert "\n" not in str(error.value)


def test_csv_missing_table_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="does not exist: option 'table'"):
        CSVSource(table=str(tmp_path / "reports.csv"))
    with pytest.raises(ValueError, match="is a folder: option 'table'"):
        CSVSource(table=str(tmp_path))
