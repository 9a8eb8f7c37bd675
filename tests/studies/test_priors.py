"""Prior studies: found by sources, described by tables, kept by datasets."""

import json
import math
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict
from otdrg.labelers.as_typed import labeler_of
from otdrg.labelers.labelling import label_dataset
from otdrg.studies import load_studies, open_source, prepare_studies
from otdrg.studies.build import BuildOptions, build_share, merge_shares
from otdrg.studies.fingerprint import differing_splits, fingerprint
from otdrg.studies.loading import with_column
from otdrg.studies.phantom import make_follow_up, make_phantom
from otdrg.studies.schema import ADDED_LATER
from otdrg.studies.shards import Share
from otdrg.training.data import build_studies
from otdrg.training.recipe import LabelsRecipe, StudiesRecipe
from PIL import Image
from published_trees import CheXpertPlusDownload, ReXGradientDownload

PRIORS = BuildOptions(priors=True, parquet_only=True)
PHANTOMS = {"train": 6, "validation": 2, "test": 0, "image_size": 64, "prior_share": 0.5}


def rows_of(folder, split="train"):
    return {row["id"]: row for row in load_studies("prepared", folder=folder)[split]}


def days_of(rows):
    return {study: row["prior_days"] for study, row in rows.items()}


def test_prepare_prior_without_its_image_keeps_its_report_and_is_listed(tmp_path):
    download = ReXGradientDownload(tmp_path)
    for number in (1, 2, 3):
        download.study(number, patient="GRDNPATIENT1", Findings=f"Findings {number}.")
    download.study(4, patient="GRDNPATIENT1", StudyDate=20140303)
    download.study(5, patient="GRDNPATIENT1", StudyDate=None)
    options = download.write()
    source = open_source("rexgradient", **options)
    source.published_differences()
    next((download.root / "deid_png").rglob("GRDNACCESSION1/**/*.png")).unlink()
    for part in download.root.glob("deid_png.part*"):
        part.unlink()
    report = prepare_studies("rexgradient", tmp_path / "studies", build=PRIORS, **options)
    rows = {study.split("ACCESSION")[1][0]: row for study, row in rows_of(tmp_path / "studies").items()}
    # Study 1 lost its image, and is the prior of study 2 by its report only. Studies of one day are no priors of each
    # other, and one without a date has none.
    assert {number: row["prior_report"] for number, row in rows.items()} == {
        "2": "Findings 1.",
        "3": "Findings 2.",
        "4": "Findings 2.",
        "5": "",
    }
    assert [len(rows[number]["prior_images"]) for number in "2345"] == [0, 1, 1, 0]
    assert (report.counts["train"].priors, report.counts["train"].unusable_priors) == (3, 0)
    skipped = [json.loads(line) for line in (tmp_path / "studies" / "skipped.jsonl").read_text().splitlines()]
    fault = next(line for line in skipped if line["kind"] == "unusable prior")
    assert fault["kept"] and "GRDNACCESSION2" in fault["id"] and "the prior's missing image: " in fault["reason"]


def test_prepare_priors_of_shares_are_those_of_one_process(tmp_path):
    download = ReXGradientDownload(tmp_path)
    for number in range(1, 7):
        download.study(number, patient=f"GRDNPATIENT{number % 2}")
    options = BuildOptions(priors=True, studies_per_shard=2, parquet_only=True, limit=4)
    source = open_source("rexgradient", **download.write())
    for index in (2, 1):
        build_share(source, tmp_path / "shares", Share(index, 2), options)
    merge_shares(source, tmp_path / "shares", options)
    report = prepare_studies("rexgradient", tmp_path / "whole", build=options, **download.write())
    assert report.counts["train"].priors == 2 and report.counts["train"].studies == 4
    assert "2 of them have a prior study" in (tmp_path / "whole" / "README.md").read_text()
    assert [path.read_bytes() for path in sorted((tmp_path / "shares").rglob("*.parquet"))] == [
        path.read_bytes() for path in sorted((tmp_path / "whole").rglob("*.parquet"))
    ]


def test_prepare_chexpert_plus_order_is_used_only_on_request(tmp_path):
    download = CheXpertPlusDownload(tmp_path)
    for study in (1, 2):
        download.image(patient=1, study=study, patient_report_date_order=3 - study)
    options = download.write()
    with pytest.raises(ValueError, match=r"has no dates.*leave --priors out, or accept it with --order-as-time"):
        prepare_studies("chexpert-plus", tmp_path / "studies", build=PRIORS, **options)
    prepare_studies("chexpert-plus", tmp_path / "studies", build=PRIORS, order_as_time=True, **options)
    rows = rows_of(tmp_path / "studies")
    assert {study: len(row["prior_images"]) for study, row in rows.items()} == {
        "patient00001_study1": 1,
        "patient00001_study2": 0,
    }
    assert set(days_of(rows).values()) == {None}


def test_prepare_priors_of_source_without_times_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"source 'phantom' does not say when studies were made.*leave --priors out"):
        prepare_studies("phantom", tmp_path / "studies", build=PRIORS, train=1, validation=0, test=0)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def table(tmp_path, views):
    for number in range(3):
        Image.fromarray(views[number]).save(tmp_path / f"{number}.png")

    def write(*rows):
        header = "image,study_id,patient_id,split,report,prior_image,prior_report,prior_days,prior_patient_id"
        path = tmp_path / "table.csv"
        path.write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
        return str(path)

    return write


def test_csv_prior_columns_are_read(tmp_path, table):
    path = table(
        "0.png,s1,p1,train,Clear lungs.,1.png,Effusion.,30,p1",
        "1.png,s1,p1,train,,2.png,,,",
        "2.png,s2,p1,train,Clear lungs.,,,,",
    )
    prepare_studies("csv", tmp_path / "studies", build=BuildOptions(parquet_only=True), table=path)
    rows = rows_of(tmp_path / "studies")
    first = rows["s1"]
    assert (len(first["prior_images"]), first["prior_report"], first["prior_days"]) == (2, "Effusion.", 30)
    assert (rows["s2"]["prior_images"], rows["s2"]["prior_report"], rows["s2"]["prior_days"]) == ([], "", None)


@pytest.mark.parametrize(
    ("cells", "reason"),
    [
        ("1.png,Effusion.,-3,p1", "the prior is 3 days later than its study: expected an earlier one"),
        ("1.png,Effusion.,3,p2", "the prior is of patient p2: expected p1, the patient of the study"),
        ("../1.png,,3,p1", "prior_image '../1.png' leaves the folder of images"),
        ("1.png,,soon,p1", "prior_days is 'soon': expected a whole number of days"),
        ("absent.png,,3,p1", "the prior's missing image: "),
    ],
)
def test_csv_unusable_prior_is_left_out_counted_and_its_study_kept(tmp_path, table, cells, reason):
    path = table(f"0.png,s1,p1,train,Clear lungs.,{cells}")
    report = prepare_studies("csv", tmp_path / "studies", build=BuildOptions(parquet_only=True), table=path)
    row = rows_of(tmp_path / "studies")["s1"]
    assert (row["prior_images"], row["prior_report"], row["prior_days"]) == ([], "", None)
    counts = report.counts["train"]
    assert (counts.studies, counts.skipped, counts.priors, counts.unusable_priors) == (1, 0, 0, 1)
    (fault,) = map(json.loads, (tmp_path / "studies" / "skipped.jsonl").read_text().splitlines())
    assert fault["kept"] and fault["kind"] == "unusable prior" and reason in fault["reason"]
    assert "\n" not in fault["reason"]


@pytest.mark.parametrize(("patient", "prior_patient"), [("13", "13.0"), ("13.0", "13"), ("13", "nan")])
def test_csv_prior_numbers_of_pandas_are_read(tmp_path, table, patient, prior_patient):
    path = table(
        f"0.png,s1,{patient},train,Clear lungs.,1.png,Effusion.,30.0,{prior_patient}",
        f"2.png,s2,{patient},train,Clear lungs.,nan,nan,nan,nan",
    )
    prepare_studies("csv", tmp_path / "studies", build=BuildOptions(parquet_only=True), table=path)
    assert days_of(rows_of(tmp_path / "studies")) == {"s1": 30, "s2": None}


def test_hub_prior_numbers_of_pandas_are_read(tmp_path, views):
    rows = {
        "id": ["s1", "s2", "s3", "s4"],
        "patient_id": [13] * 4,
        "image": [Image.fromarray(views[0])] * 4,
        "report": ["Clear lungs."] * 4,
        "prior_report": ["Effusion."] * 4,
        "prior_days": [30.0, math.nan, None, 0.5],
        "prior_patient_id": [13.0, math.nan, None, 13.0],
    }
    DatasetDict({"train": Dataset.from_dict(rows)}).save_to_disk(tmp_path / "table")
    options = {"dataset": str(tmp_path / "table"), "split_map": ["train=train"]}
    prepare_studies("hub", tmp_path / "studies", build=BuildOptions(parquet_only=True), **options)
    assert days_of(rows_of(tmp_path / "studies")) == {"s1": 30, "s2": None, "s3": None, "s4": None}
    (fault,) = map(json.loads, (tmp_path / "studies" / "skipped.jsonl").read_text().splitlines())
    assert fault["id"] == "s4" and "column 'prior_days': 0.5: expected a whole number of days" in fault["reason"]


def test_hub_prior_columns_are_read_again(tmp_path):
    prepare_studies("phantom", tmp_path / "phantoms", build=BuildOptions(parquet_only=True), **PHANTOMS)
    prepare_studies("hub", tmp_path / "again", dataset=str(tmp_path / "phantoms"))
    first, again = rows_of(tmp_path / "phantoms"), rows_of(tmp_path / "again")
    assert first.keys() == again.keys() and 0 < sum(bool(row["prior_images"]) for row in first.values()) < 6
    for study, row in first.items():
        theirs = again[study]
        assert [np.asarray(image).tolist() for image in row["prior_images"]] == [
            np.asarray(image).tolist() for image in theirs["prior_images"]
        ]
        assert [row[name] for name in ("prior_report", "prior_days")] == [
            theirs[name] for name in ("prior_report", "prior_days")
        ]


def without_priors(folder):
    """Rewrite the files of a prepared dataset as an earlier version would have written them."""
    for path in (folder / "data").glob("*.parquet"):
        table = pq.read_table(path).drop_columns(list(ADDED_LATER))
        info = json.loads(table.schema.metadata[b"huggingface"])
        info["info"]["features"] = {
            name: feature for name, feature in info["info"]["features"].items() if name not in ADDED_LATER
        }
        pq.write_table(table.replace_schema_metadata({b"huggingface": json.dumps(info)}), path)


def test_prepared_dataset_of_earlier_version_loads_and_is_labelled(tmp_path):
    options = {**PHANTOMS, "prior_share": 0.0}
    prepare_studies("phantom", tmp_path / "now", build=BuildOptions(parquet_only=True), **options)
    shutil.copytree(tmp_path / "now", tmp_path / "before")
    without_priors(tmp_path / "before")
    recipes = [
        StudiesRecipe(source="prepared", options={"folder": str(tmp_path / name)}, streaming=streaming)
        for name in ("now", "before")
        for streaming in (False, True)
    ]
    mapped, _, old, streamed = (build_studies(recipe, LabelsRecipe()) for recipe in recipes)
    assert "prior_images" in mapped["train"].column_names and "prior_images" not in old["train"].column_names
    # Equal studies have equal fingerprints, whether the columns are absent or empty.
    assert fingerprint(mapped) == fingerprint(old)
    assert {row["id"] for row in streamed["train"]} == set(old["train"]["id"])
    label_dataset(tmp_path / "before", lambda ids, reports: [[0] * 14] * len(ids), {}, output=tmp_path / "labelled")
    labelled = rows_of(tmp_path / "labelled")
    assert len(labelled) == 6 and all(row["prior_images"] == [] for row in labelled.values())


def test_fingerprint_other_priors_differ(tmp_path):
    def built(**options):
        recipe = StudiesRecipe(source="phantom", options={**PHANTOMS, **options})
        return build_studies(recipe, LabelsRecipe())

    with_priors = built(prior_share=1.0)
    there = fingerprint(with_priors)
    assert there == fingerprint(built(prior_share=1.0)) and "priors" in there["train"]
    train = with_priors["train"]
    emptied = with_column(train, "prior_images", [[]] * len(train))
    assert differing_splits(there, fingerprint({**with_priors, "train": emptied})) == ["train"]
    absent = train.remove_columns(["prior_images", "prior_report", "prior_days"])
    assert differing_splits(there, fingerprint({**with_priors, "train": absent})) == ["train"]


def test_phantom_prior_differs_in_one_finding_and_the_report_says_so():
    seen = set()
    for index in range(40):
        made = make_follow_up(3, index, 64, ["frontal"], ["pleural_effusion", "cardiomegaly"])
        now, before = made.phantom.states.copy(), made.prior.states.copy()
        place = {"pleural_effusion": 9, "cardiomegaly": 1}[made.finding]
        present = {"new": (1, 2), "unchanged": (1, 1), "resolved": (2, 1)}[made.change]
        assert (now[place], before[place]) == present
        # "No finding" follows from the others.
        others = [finding for finding in range(13) if finding != place]
        assert (now[others] == before[others]).all()
        words = {"new": "is new.", "unchanged": "is unchanged.", "resolved": "has resolved."}[made.change]
        assert made.phantom.report.endswith(words) and not made.prior.report.endswith(words)
        assert made.phantom.impression.endswith(words)
        assert made.finding.split("_")[-1] in made.phantom.indication
        assert made.days > 0 and made.phantom.details == made.prior.details
        # Another exposure of the same patient: also equal findings have other pixels.
        assert not np.array_equal(*(np.asarray(study.images[0]) for study in (made.phantom, made.prior)))
        seen.add((made.finding, made.change))
    assert len(seen) == 6


def test_phantom_prior_report_has_the_sections_of_the_report(tmp_path):
    options = {"train": 3, "validation": 0, "test": 0, "image_size": 32, "prior_share": 1.0}
    priors = [make_follow_up(0, index, 32, ["frontal"]).prior for index in range(3)]
    for sections, reports in (
        ("findings", [prior.findings for prior in priors]),
        ("impression", [prior.impression for prior in priors]),
        ("findings+impression", [f"Findings: {prior.findings} Impression: {prior.impression}" for prior in priors]),
    ):
        build = BuildOptions(sections=sections, parquet_only=True)
        prepare_studies("phantom", tmp_path / sections, build=build, **options)
        assert [row["prior_report"] for row in rows_of(tmp_path / sections).values()] == reports


def test_csv_prior_without_any_image_is_counted_once(tmp_path, table):
    path = table("0.png,s1,p1,train,Clear lungs.,gone.png,,,", "1.png,s1,p1,train,,absent.png,,,")
    report = prepare_studies("csv", tmp_path / "studies", build=BuildOptions(parquet_only=True), table=path)
    counts = report.counts["train"]
    assert (counts.studies, counts.priors, counts.unusable_priors, report.skipped) == (1, 0, 1, 2)


def test_phantom_source_without_priors_is_as_before():
    rows = load_studies("phantom", **{**PHANTOMS, "prior_share": 0.0})["train"]
    assert rows[0]["report"] == make_phantom(0, 0, 64, ["frontal"]).report
    assert rows["prior_images"][:] == [[]] * 6 and rows["comparison"][:] == [""] * 6
    for options, message in (
        ({"prior_share": 1.5}, "option 'prior_share' is 1.5: expected a share from 0 to 1"),
        ({"prior_findings": ["no_finding"]}, "option 'prior_findings' is .*expected one or more of"),
    ):
        with pytest.raises(ValueError, match=message):
            open_source("phantom", **{**PHANTOMS, **options})


def test_labeler_rules_reads_the_change_of_phantoms():
    made = [make_follow_up(5, index, 32, ["frontal"]).phantom for index in range(30)]
    read = labeler_of("rules", {}).label([study.report for study in made])
    wrong = [study.report for study, row in zip(made, read, strict=True) if list(row) != list(study.states)]
    assert wrong == []
