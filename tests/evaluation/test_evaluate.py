import csv
import json

import numpy as np
import pytest
import torch
from datasets import Dataset
from otdrg.bank_otdrg import ReportBank
from otdrg.consensus_otdrg import ConsensusDecoder, ConsensusSettings
from otdrg.evaluation.evaluate import evaluate_model
from otdrg.evaluation.report import format_table, write_predictions
from otdrg.findings_otdrg import FINDINGS
from otdrg.inference.collation import FindingCollator, PromptCollator
from otdrg.inference.features import cache_features
from otdrg.inference.generation import derangement, generate_reports
from otdrg.inference.retrieval import build_bank, pooled_features, retrieve_reports
from otdrg.labelers import load_labeler
from otdrg.metrics import nlg_scores
from otdrg.metrics.efficacy import F1_SCORES
from otdrg.modeling_otdrg import OTDRGForReportGeneration
from otdrg.processing_otdrg import OTDRGProcessor
from otdrg.studies import load_studies
from otdrg.training.collation import ReportCollator
from otdrg.utility_otdrg import ReportUtility
from sklearn.neighbors import NearestNeighbors

GENERATION = {"num_beams": 1, "max_new_tokens": 10}


@pytest.fixture(scope="module")
def processor(trained_run):
    return OTDRGProcessor.from_pretrained(trained_run / "model")


@pytest.fixture(scope="module")
def model(trained_run, processor):
    model = OTDRGForReportGeneration.from_pretrained(trained_run / "model")
    model.generation_config.suppress_tokens = processor.tokenizer.all_special_ids
    return model


@pytest.fixture(scope="module")
def studies():
    return load_studies("phantom", train=0, validation=6, test=0, image_size=112, views=["frontal"])["validation"]


def altered(studies):
    """The same images with other reports and other true states."""

    def alter(study):
        states = [(state + 1) % 4 for state in study["finding_states"]]
        return {**study, "report": "something else altogether .", "findings": "x", "finding_states": states}

    return studies.map(alter, load_from_cache_file=False)


def test_generate_reports_do_not_depend_on_the_truth(model, processor, studies):
    before, after = (generate_reports(model, processor, rows, 4, GENERATION) for rows in (studies, altered(studies)))
    assert before.reports == after.reports
    assert (before.finding_states == after.finding_states).all()


def test_evaluation_batches_do_not_depend_on_the_truth(processor, studies):
    rows, others = list(studies), list(altered(studies))
    for key, value in PromptCollator(processor)(rows).items():
        assert torch.equal(value, PromptCollator(processor)(others)[key])
    batch, other = (ReportCollator(processor, training=False)(some) for some in (rows, others))
    assert "finding_states" not in batch and "finding_labels" not in batch
    assert torch.equal(batch["pixel_values"], other["pixel_values"])
    # The true states alone: teacher forcing does read the report.
    only_states = [{**row, "finding_states": other["finding_states"]} for row, other in zip(rows, others, strict=True)]
    for key, value in ReportCollator(processor, training=False)(only_states).items():
        assert torch.equal(value, batch[key])


def test_training_batches_hold_the_truth(processor, studies):
    rows = list(studies)
    truth = torch.tensor([row["finding_states"] for row in rows])
    batch = ReportCollator(processor, training=True, max_report_tokens=5)(rows)
    assert torch.equal(batch["finding_states"], truth) and "finding_labels" not in batch
    assert (batch["labels"] != -100).sum(dim=1).max() <= 6, "five tokens and the end of text"
    batch = ReportCollator(processor, training=True, supervise_predictor=True)(rows)
    assert torch.equal(batch["finding_labels"], truth)
    assert torch.equal(FindingCollator(processor)(rows)["finding_labels"], truth)


def test_generate_reports_with_given_states_differ(model, processor, studies):
    rows = len(studies)
    states = [np.full((rows, len(FINDINGS)), state) for state in (1, 2)]
    for given in states:
        given[:, FINDINGS.index("no_finding")] = 0
    positive, negative = (generate_reports(model, processor, studies, 4, GENERATION, given) for given in states)
    assert (positive.finding_states == states[0]).all() and (negative.finding_states == states[1]).all()
    assert positive.reports != negative.reports
    predicted = generate_reports(model, processor, studies, 4, GENERATION)
    as_predicted = generate_reports(model, processor, studies, 4, GENERATION, np.full((rows, len(FINDINGS)), -1))
    assert as_predicted.reports == predicted.reports
    with pytest.raises(ValueError, match=r"finding_states has shape \(1, 14\): expected \(6, 14\)"):
        generate_reports(model, processor, studies, 4, GENERATION, states[0][:1])


def test_generate_reports_with_partly_given_states_conditions_as_the_model_does(model, processor, studies):
    given = np.full((len(studies), len(FINDINGS)), -1)
    given[:4, FINDINGS.index("edema")] = 1
    batch = processor(images=[row["images"] for row in studies])
    with torch.no_grad():
        logits = model(pixel_values=batch["pixel_values"], view_mask=batch["view_mask"]).finding_logits
    healthy = torch.zeros_like(logits)
    healthy[..., 0], healthy[:, FINDINGS.index("no_finding"), 1] = 5.0, 9.0
    hook = model.finding_predictor.register_forward_hook(
        lambda *_: _[2]._replace(finding_logits=healthy[: len(_[2].finding_logits)])
    )
    try:
        written = generate_reports(model, processor, studies, 4, GENERATION, given)
    finally:
        hook.remove()
    assert (written.finding_states == model.condition_states(healthy, torch.from_numpy(given)).numpy()).all()
    # Beside a positive finding that is given, No Finding is not predicted.
    assert written.finding_states[:, FINDINGS.index("no_finding")].tolist() == [0] * 4 + [1] * (len(studies) - 4)


@pytest.mark.parametrize("collator", ["prompt", "report"])
def test_collators_with_indication_put_it_into_the_prompt(processor, studies, collator):
    def batch(rows, indication):
        if collator == "prompt":
            return PromptCollator(processor, indication)(rows)
        return ReportCollator(processor, training=False, indication=indication)(rows)

    rows = [{**row, "indication": text} for row, text in zip(studies, ("Cough.", "", " ", None), strict=False)]
    given, without = (batch(rows, indication)["input_ids"] for indication in (True, False))
    texts, plain = (processor.batch_decode(ids, skip_special_tokens=False) for ids in (given, without))
    assert ["Indication: Cough." in text for text in texts] == [True, False, False, False]
    assert not any("Indication" in text for text in plain)
    alike = [{**row, "indication": None} for row in rows]
    assert torch.equal(batch(alike, True)["input_ids"], without)


def test_evaluate_model_with_indications_shuffles_images_and_leaves_indications_out(model, processor, studies):
    texts = [f"Case {number}. Shortness of breath, fever and cough." for number in range(len(studies))]
    studies = studies.remove_columns("indication").add_column("indication", texts)
    arguments = (None, 4, GENERATION, ["shuffled", "no_indication"])
    rows = evaluate_model(model, processor, studies, *arguments, metrics=["bleu_4"], indication=True).rows
    assert rows["model"].reports == generate_reports(model, processor, studies, 4, GENERATION, indication=True).reports
    unread = generate_reports(model, processor, studies, 4, GENERATION).reports
    assert rows["no_indication"].reports == unread != rows["model"].reports
    order = derangement(len(studies), seed=0).tolist()
    images = studies.select(order).remove_columns("indication").add_column("indication", texts)
    assert (
        rows["shuffled"].reports == generate_reports(model, processor, images, 4, GENERATION, indication=True).reports
    )


def test_evaluation_in_training_ignores_line_breaks(model, processor, studies, tmp_path):
    written = generate_reports(model, processor, studies, 4, GENERATION).reports
    training = studies.remove_columns("report").add_column("report", [text.replace(" ", " \n ") for text in written])
    found = evaluate_model(model, processor, studies, training, 4, GENERATION, (), metrics=["bleu_4"])
    assert found.scores()["rows"]["model"]["in_training"] == 1
    write_predictions(found, tmp_path / "predictions.csv")
    with (tmp_path / "predictions.csv").open(encoding="utf-8") as file:
        assert {row["in training"] for row in csv.DictReader(file)} == {"yes"}


def test_generate_reports_in_batches_equal_single_studies(model, processor, studies):
    batched, single = (generate_reports(model, processor, studies, size, GENERATION) for size in (4, 1))
    assert batched.reports == single.reports


def test_derangement_moves_every_image():
    for count in (2, 3, 50):
        order = derangement(count, seed=1)
        assert sorted(order) == list(range(count))
        assert (order != np.arange(count)).all()
    assert (derangement(50, 1) == derangement(50, 1)).all() and (derangement(50, 1) != derangement(50, 2)).any()
    with pytest.raises(ValueError, match="at least 2 studies"):
        derangement(1, seed=0)


@pytest.fixture(scope="module")
def training():
    return load_studies("phantom", train=10, validation=0, test=0, image_size=112, views=["frontal"])["train"]


@pytest.fixture(scope="module")
def evaluation(model, processor, studies, training):
    return evaluate_model(
        model, processor, studies, training, 4, GENERATION, metrics=["bleu_1", "bleu_4", "rouge_l", "cider"]
    )


def scores_of_training(lines):
    """The last column of the two rows of retrieval."""
    rows = [line.strip("| ").split(" | ") for line in lines[4:6]]
    return {row[0]: row[-1] for row in rows}


def test_format_table_has_model_and_controls(evaluation, studies, training, tmp_path):
    lines = format_table(evaluation).splitlines()
    assert lines[0] == "|  | BLEU-4 | ROUGE-L | CIDEr | macro-F1 (13) | in training |"
    assert [line.split(" | ")[0].strip("| ") for line in lines[2:8]] == [
        "model",
        "images shuffled across studies",
        "nearest neighbour",
        "retrieval by expected utility",
        "best constant report",
        "true states given",
    ]
    assert lines[9].startswith("6 studies; ") and lines[9].endswith("by the labeler rules")
    assert lines[10:] == evaluation.notes
    assert scores_of_training(lines) == {"nearest neighbour": "1.000", "retrieval by expected utility": "1.000"}
    order = derangement(6, seed=0)
    assert evaluation.rows["shuffled"].reports == [evaluation.rows["model"].reports[other] for other in order]
    scores = evaluation.scores()
    assert scores["rows"]["model"]["micro_f1_14_uncertain_positive"] >= 0 and scores["labeler"] == "rules"

    write_predictions(evaluation, tmp_path / "predictions.csv")
    with (tmp_path / "predictions.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["id"] for row in rows] == studies["id"]
    assert [row["report"] for row in rows] == evaluation.rows["model"].reports
    assert {"reference", "bleu_4", "predicted edema", "report, true states given"} <= rows[0].keys()


def test_evaluation_reads_states_of_true_reports_before_cleaning(model, processor, studies, training, tmp_path):
    def cleaned(rows, report, uncleaned):
        rows = rows.remove_columns("report").add_column("report", [report] * len(rows))
        return rows.add_column("uncleaned_report", [uncleaned] * len(rows))

    texts = ("scarringatelectasis .", "Scarring/atelectasis.")
    rows, training = cleaned(studies, *texts), cleaned(training, *texts)
    assert cache_features(model, processor, rows, tmp_path, 4)["uncleaned_report"] == [texts[1]] * len(rows)
    controls = ["constant"]
    evaluation = evaluate_model(
        model, processor, rows, training, 4, GENERATION, controls, metrics=["bleu_1", "rouge_l"]
    )
    read = load_labeler("rules").label([texts[1]])[0]
    assert read[FINDINGS.index("atelectasis")] != 0 and (evaluation.true_states == read).all()
    assert evaluation.references == [texts[0]] * len(rows)
    # A constant is read as it is written: cleaned.
    column = "macro_f1_13_uncertain_positive"
    assert evaluation.constants[column].scores[column] == 0
    write_predictions(evaluation, tmp_path / "predictions.csv")
    with (tmp_path / "predictions.csv").open(encoding="utf-8", newline="") as file:
        row = next(csv.DictReader(file))
    assert (row["reference"], row["uncleaned reference"]) == texts and "uncleaned report" not in row


def test_evaluation_reads_states_of_generated_reports_before_cleaning(model, processor, studies, tmp_path):
    arguments = (None, 4, GENERATION, [])
    evaluation = evaluate_model(model, processor, studies, *arguments, metrics=["bleu_1"], clean=lambda report: "x .")
    row = evaluation.rows["model"]
    plain = evaluate_model(model, processor, studies, *arguments, metrics=["bleu_1"]).rows["model"]
    assert row.reports == ["x ."] * len(studies) and row.uncleaned == plain.reports
    assert (row.report_states == plain.report_states).all()


def test_evaluation_has_one_constant_per_score(evaluation, training):
    assert evaluation.constants.keys() == {"bleu_1", "bleu_4", "rouge_l", "cider", *F1_SCORES}
    assert evaluation.constants["bleu_4"].reports[0] in training["report"]
    constants = evaluation.scores()["rows"]["best constant report"]
    for column, row in evaluation.constants.items():
        assert len(set(row.reports)) == 1 and constants[column] == row.scores[column]


def test_evaluation_retrieves_by_the_models_features(model, processor, studies, training, evaluation, tmp_path):
    def alone(study):
        with torch.no_grad():
            features = model.encode_views(processor(images=[study["images"]])["pixel_values"])
        return features[0].mean(dim=(0, 1)).numpy()

    queries, keys = (np.stack([alone(study) for study in rows]) for rows in (studies, training))
    assert np.allclose(pooled_features(model, processor, training, 4), keys, atol=1e-5)
    neighbours = NearestNeighbors(n_neighbors=10, metric="cosine").fit(keys).kneighbors(queries, return_distance=False)
    reports = training["report"]
    assert evaluation.rows["nearest"].reports == [reports[row[0]] for row in neighbours]
    bank = ReportBank(reports, keys)
    expected = bank.weights(queries) @ ReportUtility(bank.reports, bank.counts)(bank.reports).T
    assert evaluation.rows["expected"].reports == [bank.reports[place] for place in expected.argmax(axis=1)]
    cached = [cache_features(model, processor, rows, tmp_path, 4) for rows in (studies, training)]
    features = [pooled_features(model, processor, rows, 4) for rows in cached]
    found = retrieve_reports(*features, *cached)
    assert found.nearest == evaluation.rows["nearest"].reports and found.expected == evaluation.rows["expected"].reports


def test_retrieval_with_indications_weighs_reports_by_them(model, processor, studies, training):
    asked, known = (
        rows.remove_columns("indication").add_column("indication", [f"Case {row % 2}." for row in range(len(rows))])
        for rows in (studies, training)
    )
    queries, keys = (pooled_features(model, processor, rows, 4) for rows in (asked, known))
    found = retrieve_reports(queries, keys, asked, known, indication=True)
    bank = ReportBank(known["report"], keys, indications=known["indication"])
    expected = bank.weights(queries, asked["indication"]) @ bank.own_utilities().T
    assert found.expected == [bank.reports[place] for place in expected.argmax(axis=1)]
    kept = build_bank(model, processor, known, [], 4)
    assert np.allclose(kept.weights(queries, asked["indication"]), bank.weights(queries, asked["indication"]))
    assert not np.allclose(bank.weights(queries, asked["indication"]), bank.weights(queries))


def test_pooled_features_are_means_over_present_views(model, processor):
    options = {"train": 0, "validation": 3, "test": 0, "image_size": 112, "views": ["frontal", "lateral"]}
    two = load_studies("phantom", **options)["validation"]
    rows = [{**row, "images": row["images"][: 1 + place % 2]} for place, row in enumerate(two)]
    ragged = Dataset.from_list(rows, features=two.features)
    pooled = pooled_features(model, processor, ragged, batch_size=3)
    for row, features in zip(rows, pooled, strict=True):
        with torch.no_grad():
            encoded = model.encode_views(processor(images=[row["images"]])["pixel_values"])[0]
        assert features == pytest.approx(encoded.mean(dim=(0, 1)).numpy(), abs=1e-5)


def test_evaluate_model_without_training_refuses_baselines(model, processor, studies):
    with pytest.raises(ValueError, match="controls retrieval, constant: expected training studies"):
        evaluate_model(model, processor, studies)


def test_generate_reports_keep_those_in_the_journal(model, processor, studies, tmp_path):
    whole = generate_reports(model, processor, studies, 4, GENERATION)
    path = tmp_path / "deep" / "model.jsonl"
    kept = generate_reports(model, processor, studies, 4, GENERATION, journal=path)
    assert kept.reports == whole.reports
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    assert len(lines) == 6
    other = {**json.loads(lines[2]), "report": "kept as it is"}
    # As a process that was killed leaves it: not all studies, and a line cut off.
    path.write_text(json.dumps(other) + "\n" + lines[0] + lines[4][:30], encoding="utf-8")
    again = generate_reports(model, processor, studies, 4, GENERATION, journal=path)
    assert again.reports == [*whole.reports[:2], "kept as it is", *whole.reports[3:]]
    assert (again.finding_states == whole.finding_states).all()
    assert [json.loads(line)["id"] for line in path.read_text(encoding="utf-8").splitlines()] == studies["id"]
    path.write_text('{"id": "a"}\n')
    with pytest.raises(ValueError, match=r"model.jsonl, line 1: not a row of this work"):
        generate_reports(model, processor, studies, 4, GENERATION, journal=path)


@pytest.fixture(scope="module")
def consensus(model, processor, training):
    bank = build_bank(model, processor, training, ["CC0"], 4)
    return ConsensusDecoder(ConsensusSettings(candidates=4), bank, load_labeler("rules").label)


def test_evaluation_by_consensus_has_rows_without_it(model, processor, studies, training, consensus):
    arguments = (studies, training, 4, GENERATION, ["shuffled"])
    evaluation = evaluate_model(
        model, processor, *arguments, metrics=["bleu_1"], consensus=consensus, collections=["IU X-Ray"]
    )
    rows, reports = evaluation.scores()["rows"], {name: row.reports for name, row in evaluation.rows.items()}
    names = ["model", "model, without retrieved candidates", "model, without consensus decoding"]
    names += ["images shuffled across studies", "paper (OTDRG, its Table 2, test split)"]
    assert list(rows) == names and rows[names[-1]]["rouge_l"] == 0.377
    chosen = generate_reports(model, processor, studies, 4, GENERATION, consensus=consensus)
    assert (chosen.reports, chosen.sampled) == (reports["model"], reports["sampled"])
    assert generate_reports(model, processor, studies, 4, GENERATION).reports == reports["single"]
    # A model that has learned nothing writes no training report: all chosen ones are retrieved.
    assert rows["model"]["in_training"] == 1 and set(reports["model"]) <= set(training["report"])
    assert rows[names[1]]["in_training"] == rows[names[2]]["in_training"] == 0


def test_generate_reports_by_consensus_continue_from_the_journal(model, processor, studies, consensus, tmp_path):
    whole = generate_reports(model, processor, studies, 4, GENERATION, consensus=consensus)
    path = tmp_path / "model.jsonl"
    arguments = {"generation": GENERATION, "consensus": consensus}
    generate_reports(model, processor, studies, 4, journal=path, **arguments)
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    assert [json.loads(line)["retrieved"] for line in lines] == [True] * 6
    path.write_text(lines[2] + lines[0] + lines[4][:30], encoding="utf-8")
    again = generate_reports(model, processor, studies, 1, journal=path, **arguments)
    assert (again.reports, again.sampled) == (whole.reports, whole.sampled)
    assert path.read_text(encoding="utf-8").splitlines(keepends=True) == lines


def test_evaluate_model_of_one_section_on_reports_of_two_counts_all_as_findings(model, processor):
    options = {"train": 0, "validation": 6, "test": 0, "image_size": 112, "views": ["frontal"]}
    studies = load_studies("phantom", sections="findings+impression", **options)["validation"]
    # In place of what an untrained model writes.
    written = {"clean": lambda report: "There is no consolidation.", "metrics": ["bleu_1", "rouge_l"]}
    found = evaluate_model(model, processor, studies, None, 4, GENERATION, [], **written)
    note = "6 of 6 generated reports have no headings or misplaced ones: all of their text counts as findings"
    assert note in found.notes and list(found.sections) == ["findings", "impression"]
    findings, impression = found.sections.values()
    assert findings.references == list(studies["findings"]) and impression.references == list(studies["impression"])
    reports = found.rows["model"].reports
    assert findings.rows["model"].reports == reports and impression.rows["model"].reports == [""] * 6
    apart = nlg_scores(reports, list(studies["findings"]), ["bleu_1", "rouge_l"])
    assert findings.rows["model"].scores["rouge_l"] == apart["rouge_l"] > 0
    assert impression.rows["model"].scores["rouge_l"] == 0
    joined = [f"{row['findings']} {row['impression']}" for row in studies]
    assert found.rows["model"].scores["bleu_1"] == nlg_scores(reports, joined, ["bleu_1"])["bleu_1"]


def test_evaluate_model_with_training_reports_without_sections_has_no_constant_of_a_section(model, processor):
    options = {"image_size": 112, "views": ["frontal"]}
    studies = load_studies("phantom", train=0, validation=4, test=0, sections="findings+impression", **options)
    training = load_studies("phantom", train=4, validation=0, test=0, **options)["train"]
    found = evaluate_model(
        model, processor, studies["validation"], training, 4, GENERATION, ["constant"], metrics=["bleu_1"]
    )
    findings, impression = found.sections.values()
    assert "bleu_1" in findings.constants and not impression.constants
    assert "no training report has the section impression, so there is no best constant report" in impression.notes
    assert "no training report has the section impression" in format_table(found)
