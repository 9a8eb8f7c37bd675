"""Priors of datasets and lists: in batches, in the feature cache, in generated reports and evaluations."""

import json

import pytest
import torch
from otdrg.cli import main
from otdrg.evaluation.evaluate import evaluate_model
from otdrg.inference.collation import PromptCollator
from otdrg.inference.features import cache_features
from otdrg.inference.generation import derangement, generate_reports
from otdrg.studies import load_studies, prepare_studies
from otdrg.studies.build import BuildOptions
from otdrg.studies.loading import undecoded, with_column
from otdrg.studies.streaming import StreamedStudies
from otdrg.training.collation import ReportCollator

PHANTOMS = {"train": 6, "validation": 0, "test": 0, "image_size": 64, "prior_share": 0.5}
GENERATION = {"num_beams": 1, "max_new_tokens": 8}


@pytest.fixture(scope="module")
def built(build_model):
    return build_model(seed=4, priors="both")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("priors") / "studies"
    prepare_studies("phantom", folder, build=BuildOptions(parquet_only=True, studies_per_shard=3), **PHANTOMS)
    return folder


@pytest.fixture(scope="module")
def studies(folder):
    """Six studies, of which some have a prior."""
    rows = undecoded(load_studies("prepared", folder=folder)["train"])
    assert 0 < sum(map(len, rows["prior_images"])) < 6
    return rows


@pytest.mark.parametrize("training", [True, False])
def test_collators_cached_priors_equal_images(built, studies, tmp_path, training):
    model, processor = built
    cached = cache_features(model, processor, studies, tmp_path, batch_size=4)
    assert cached.has_priors and cached.select_columns(["id", "view_features"]).column_names == ["view_features", "id"]
    rows, others = list(studies), [cached[place] for place in range(len(cached))]
    for collator in (ReportCollator(processor, training, 20), PromptCollator(processor)):
        batch, other = collator(rows), collator(others)
        pixels, features = ({f"{name}{kind}" for name in ("", "prior_")} for kind in ("pixel_values", "view_features"))
        assert batch.keys() - pixels == other.keys() - features and pixels <= batch.keys() and features <= other.keys()
        assert all(torch.equal(batch[name], other[name]) for name in batch.keys() - pixels)
        with torch.no_grad():
            outputs = [model(**model.expand_finding_text(**inputs)).logits for inputs in (batch, other)]
        torch.testing.assert_close(*outputs, rtol=1e-3, atol=1e-4)
        assert any("Prior report: " in text for text in processor.batch_decode(batch["input_ids"]))
    # Of studies without a prior, nothing about priors is in a batch.
    without = [row for row in rows if not row["prior_images"]]
    assert not any("prior" in name for name in PromptCollator(processor)(without))


def test_collators_model_without_priors_reads_none(build_model, studies):
    _, processor = build_model()
    batch = PromptCollator(processor)(list(studies))
    assert not any("prior" in name for name in batch)
    texts = processor.batch_decode(batch["input_ids"])
    assert not any("Prior report" in text for text in texts)


def test_cache_features_streamed_priors_are_those_of_the_table(built, studies, folder, tmp_path):
    model, processor = built
    tables = [
        cache_features(model, processor, rows, tmp_path / name, batch_size=4)
        for name, rows in (("mapped", studies), ("streamed", StreamedStudies(folder, "train")))
    ]
    mapped, streamed = ({row["id"]: row for row in map(table.__getitem__, range(6))} for table in tables)
    assert mapped.keys() == streamed.keys()
    for study, row in mapped.items():
        prior, other = row["prior_view_features"], streamed[study]["prior_view_features"]
        assert (prior is None) == (other is None) and row["prior_report"] == streamed[study]["prior_report"]
        if prior is not None:
            torch.testing.assert_close(prior, other, rtol=1e-4, atol=1e-5)


def test_evaluate_model_without_its_priors_is_a_row(built, studies, tmp_path):
    model, processor = built
    cached = cache_features(model, processor, studies, tmp_path, batch_size=4)
    alone = studies.remove_columns(["prior_images", "prior_report"])
    expected = [generate_reports(model, processor, rows, 4, GENERATION).reports for rows in (studies, alone)]
    assert expected[0] != expected[1]
    for rows in (studies, cached):
        found = evaluate_model(model, processor, rows, None, 4, GENERATION, ["no_prior"], metrics=["bleu_4"]).rows
        assert [found[name].reports for name in ("model", "no_prior")] == expected
    # Without a prior in any study there is nothing to leave out.
    found = evaluate_model(model, processor, alone, None, 4, GENERATION, ["no_prior"], metrics=["bleu_4"]).rows
    assert list(found) == ["model"]


def test_evaluate_model_shuffles_images_and_not_prior_reports(built, studies, tmp_path):
    model, processor = built
    arguments = (None, 4, GENERATION, ["shuffled"])
    order = derangement(len(studies), seed=0).tolist()
    moved = studies.select(order)
    for column in ("prior_report", "prior_days"):
        moved = with_column(moved, column, studies[column])
    expected = generate_reports(model, processor, moved, 4, GENERATION).reports
    assert expected != generate_reports(model, processor, studies.select(order), 4, GENERATION).reports
    for rows in (studies, cache_features(model, processor, studies, tmp_path, batch_size=4)):
        found = evaluate_model(model, processor, rows, *arguments, metrics=["bleu_4"]).rows
        assert found["shuffled"].reports == expected


@pytest.fixture(scope="module")
def model_folder(built, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    for part in built:
        part.save_pretrained(folder)
    return folder


def test_generate_list_and_dataset_with_priors_are_read(model_folder, run_folder, folder, studies, tmp_path, capsys):
    few = ["--num-beams", "1", "--max-new-tokens", "8"]

    def generate(model, source, *more):
        status = main(["generate", str(model), "--studies", str(source), *few, *map(str, more)])
        return status, capsys.readouterr()

    lines = []
    for row in studies:
        files = {}
        for name in ("images", "prior_images"):
            files[name] = [str(tmp_path / f"{row['id']}-{name}-{place}.png") for place in range(len(row[name]))]
            for path, image in zip(files[name], row[name], strict=True):
                with open(path, "wb") as file:
                    file.write(image["bytes"])
        prior = {"prior_images": files["prior_images"], "prior_report": row["prior_report"]}
        lines.append({"id": row["id"], "images": files["images"], **(prior if row["prior_images"] else {})})
    listed = tmp_path / "list.jsonl"
    listed.write_text("".join(json.dumps(line) + "\n" for line in lines))
    reports = []
    for source in (listed, folder):
        status, shown = generate(model_folder, source, "--json")
        assert status == 0, shown.err
        records = [json.loads(line) for line in shown.out.splitlines() if line.startswith("{")]
        reports.append({record["id"]: record["report"] for record in records})
    assert reports[0] == reports[1] and len(set(reports[0].values())) > 1
    # A model that reads no priors ignores those of a dataset, but not those that a list gives it.
    assert generate(run_folder, folder)[0] == 0
    status, shown = generate(run_folder, listed)
    assert status == 1 and "prior_images were given: expected none" in shown.err
    output = tmp_path / "reports.jsonl"
    assert generate(model_folder, listed, "--output", output)[0] == 0
    other = tmp_path / "other.jsonl"
    other.write_text("".join(json.dumps({**line, "prior_report": "New."}) + "\n" for line in lines))
    status, shown = generate(model_folder, other, "--output", output, "--resume")
    assert status != 0 and "with other images, indication, findings or prior" in shown.err
