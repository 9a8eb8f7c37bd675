"""The model card: every figure comes from a file, what is missing is named, no path and no report is published.

One run and its two evaluations are made once, for all tests.
"""

import copy
import json
import re
import shutil
import subprocess
import sys
from html import unescape

import pytest
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results
from markdown_it import MarkdownIt
from otdrg.cli import main as otdrg
from otdrg.evaluation.evaluate import ROWS
from otdrg.files_otdrg import write_json
from otdrg.findings_otdrg import FINDING_DISPLAY_NAMES, FINDINGS
from otdrg.hub_card.card import TERMS, build_card
from otdrg.hub_card.run_files import read_run
from otdrg.metrics import Metric, MetricResult, Score, register
from otdrg.metrics.fluency import NLG_NAMES
from otdrg.metrics.registry import METRICS as REGISTRY
from otdrg.metrics.tables import markdown_table
from otdrg.train_hf import main as train

METRICS = ["bleu_1", "bleu_4", "rouge_l", "cider"]
FEW = ["--metrics", *METRICS, "--bootstrap", "20", "--floor", "1", "--num-beams", "1", "--max-new-tokens", "10"]
RECIPE = {
    "cpu_threads": 1,
    "studies": {
        "source": "phantom",
        "options": {"train": 16, "validation": 12, "test": 0, "image_size": 112, "views": ["frontal"]},
    },
    "model": {
        "vocab_size": 400,
        "overrides": {"text_config": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}},
    },
    "stages": ["predictor", "report"],
    "predictor": {"max_steps": 2, "per_device_train_batch_size": 4},
    "report": {
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "text": "full",
        "generation": {"num_beams": 2, "max_new_tokens": 10},
        "max_eval_samples": 2,
        "evaluation": {"split": "validation", "limit": 4, "metrics": METRICS},
    },
}
F1 = [f"{average}_f1_{labels}" for average in ("example", "micro", "macro") for labels in ("14", "5", "13")]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run, evaluated by its report stage, by the command and, under the other protocol, by the command again."""
    folder = tmp_path_factory.mktemp("a secret place")
    (folder / "tiny.yaml").write_text(yaml.safe_dump({"output_dir": str(folder / "run"), **RECIPE}), encoding="utf-8")
    assert train([str(folder / "tiny.yaml")]) == 0
    run = folder / "run"
    assert otdrg(["evaluate", str(run), *FEW]) == 0
    # The reports are the same, and kept.
    shutil.copytree(run / "evaluation-validation", folder / "truncated")
    truncated = ["--protocol", "r2gengpt", "--tokenizer", str(run / "model"), "--reference-tokens", "6"]
    assert otdrg(["evaluate", str(run), *FEW, *truncated, "--output", str(folder / "truncated")]) == 0
    return folder


@pytest.fixture
def copied(made, tmp_path):
    """A copy of the run's files, to be changed; the weights are not among them."""
    run = tmp_path / "run"
    run.mkdir()
    for name in ("recipe.yaml", "run.json", "results.json"):
        shutil.copy(made / "run" / name, run / name)
    (run / "model").mkdir()
    shutil.copy(made / "run/model/config.json", run / "model")
    (run / "evaluation-validation").mkdir()
    shutil.copy(made / "run/evaluation-validation/evaluation.json", run / "evaluation-validation")
    return run


def change(path, edit):
    content = json.loads(path.read_text(encoding="utf-8"))
    edit(content)
    path.write_text(json.dumps(content), encoding="utf-8")


def evaluation_of(folder):
    return json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))


def tables(markdown):
    """The tables that GitHub's Markdown makes of a text, as rows of cells."""
    html = MarkdownIt("commonmark", {"html": True}).enable("table").render(markdown)
    found = []
    for table in re.findall(r"<table>.*?</table>", html, re.DOTALL):
        rows = re.findall(r"<tr>(.*?)</tr>", table, re.DOTALL)
        found.append(
            [
                [unescape(re.sub("<.*?>", "", cell)) for cell in re.findall(r"<t[hd].*?>(.*?)</t[hd]>", row, re.DOTALL)]
                for row in rows
            ]
        )
    return found


def named(found, corner):
    """The tables that have this in their first cell, each as a mapping of rows by name."""
    return [
        {row[0]: dict(zip(table[0][1:], row[1:], strict=True)) for row in table[1:]}
        for table in found
        if table[0][0] == corner
    ]


def words(card):
    """The text of a card on one line."""
    return " ".join(card.text.split())


def shown(value):
    return "–" if value is None else f"{value:.3f}"


# --- figures ---------------------------------------------------------------------------------------------------------


def test_card_tables_hold_the_figures_of_the_files(made):
    card, result = build_card(made / "run", "org/tiny"), evaluation_of(made / "run/evaluation-validation")
    found, rows = tables(card.text), result["rows"]
    scores_table = named(found, "score")[0]
    assert list(scores_table) == ["model", "model, 95 % interval", *list(rows)[1:]]
    for name, scores in rows.items():
        expected = {NLG_NAMES[metric]: shown(scores.get(metric)) for metric in METRICS}
        assert scores_table[name] == {**expected, "in training": shown(scores.get("in_training"))}
    for metric in METRICS:
        bounds = result["intervals"]["model"][metric]
        assert scores_table["model, 95 % interval"][NLG_NAMES[metric]] == f"{bounds['low']:.3f} to {bounds['high']:.3f}"
    for table, policy in zip(named(found, "F1")[:2], ("uncertain_negative", "uncertain_positive"), strict=True):
        for name, scores in rows.items():
            assert list(table[name].values()) == [shown(scores[f"{score}_{policy}"]) for score in F1]
    averages = named(found, "clinical efficacy")[0]
    assert len(averages) == 18
    row = averages["micro, 13 findings, uncertain as positive"]
    for measure in ("precision", "recall", "F1"):
        assert row[measure] == shown(rows["model"][f"micro_{measure.lower()}_13_uncertain_positive"])
    differences = named(found, "model minus")[0]
    for name, scores in result["differences"].items():
        cider = scores["cider"]
        text = f"{cider['difference']:+.3f} [{cider['low']:+.3f}, {cider['high']:+.3f}]"
        assert differences[name]["CIDEr"] == text
    steering = next(table for table in found if "contradicted" in table[0])
    steering = {row[0]: dict(zip(steering[0][1:], row[1:], strict=True)) for row in steering[1:]}
    for condition, row in zip(result["faithfulness"]["conditions"].values(), steering.values(), strict=True):
        assert (row["macro"], row["micro"]) == (shown(condition["model"]["macro"]), shown(condition["model"]["micro"]))
        assert row["constant, macro"] == shown(condition["constant"]["macro"])
        for count in ("contradicted", "omitted", "added"):
            assert row[count] == str(condition["model"][count])


def test_card_findings_have_counts_and_predictor_auc(made):
    card, result = build_card(made / "run", "org/tiny"), evaluation_of(made / "run/evaluation-validation")
    areas = json.loads((made / "run/results.json").read_text(encoding="utf-8"))["predictor"]["validation"]["findings"]
    table = named(tables(card.text), "finding")[0]
    assert list(table) == [FINDING_DISPLAY_NAMES[name] for name in FINDINGS]
    for name, found in result["rows"]["model"]["per_finding"]["uncertain_negative"].items():
        row = table[FINDING_DISPLAY_NAMES[name]]
        assert [row["true"], row["written"], row["both"]] == [
            str(found[count]) for count in ("support", "predicted", "true_positives")
        ]
        assert row["recall"] == shown(found["recall"] if found["support"] else None)
        assert row["precision"] == shown(found["precision"] if found["predicted"] else None)
        enough = areas[name]["positives"] >= 9
        assert row["predictor's AUC on validation"] == shown(areas[name]["auc"] if enough else None)


def test_card_sentences_agree_with_the_intervals(copied):
    def edit(result):
        for name, (low, high) in {"cider": (0.1, 0.3), "bleu_4": (-0.3, -0.1), "rouge_l": (-0.1, 0.1)}.items():
            result["rows"]["model"][name] = 0.25
            result["rows"]["best constant report"][name] = 0.25 - (low + high) / 2
            difference = {"difference": (low + high) / 2, "low": low, "high": high, "p": 0.5}
            result["differences"]["best constant report"][name] = difference
        kept = ("cider", "bleu_4", "rouge_l")
        result["rows"]["best constant report"] = {name: result["rows"]["best constant report"][name] for name in kept}

    change(copied / "evaluation-validation/evaluation.json", edit)
    text = words(build_card(copied, "org/tiny"))
    assert (
        "**Best constant report**: the model is below it in BLEU-4 (0.250 against 0.450; -0.200, -0.300 to -0.100); "
        "not distinguishable from it in ROUGE-L (0.250 against 0.250; +0.000, -0.100 to +0.100); above it in CIDEr "
        "(0.250 against 0.050; +0.200, +0.100 to +0.300)."
    ) in text
    assert (
        "The model is above the best constant report (one text for every study) in CIDEr, but not in BLEU-4 and "
        "ROUGE-L: there, a text written without any image scores as well or better."
    ) in text


def test_card_model_below_baselines_says_so_first(copied):
    def edit(result):
        for name in ("best constant report", "images shuffled across studies"):
            for difference in result["differences"][name].values():
                difference.update(difference=-0.2, low=-0.3, high=-0.1)

    change(copied / "evaluation-validation/evaluation.json", edit)
    first = words(build_card(copied, "org/tiny")).partition("## How it works")[0]
    assert re.search(r"\*\*The model is not above the best constant report \(.*\) in any of BLEU-4, ", first)
    assert "does not show that the model uses the image" in first


def test_card_defines_every_row_of_its_score_tables(copied):
    def add(result):
        result["rows"] |= {name: result["rows"]["model"] for name in ROWS.values() if name not in result["rows"]}

    path = copied / "evaluation-validation/evaluation.json"
    few = words(build_card(copied, "org/tiny"))
    assert "*Best constant report*: " in few and "*Without priors*: " not in few and "*Paper (" not in few
    for indication, weights in ((False, "image features."), (True, "image features and the indications.")):
        change(path, lambda result, given=indication: (add(result), result["generation"].update(indication=given)))
        card = build_card(copied, "org/tiny")
        rows = {row.removesuffix(", 95 % interval") for table in named(tables(card.text), "score") for row in table}
        assert rows == set(ROWS.values())
        defined = words(card).partition("**Rows.** ")[2].partition("**Columns.**")[0]
        for row in rows:
            assert f"*{row[0].upper()}{row[1:]}*: " in defined, row
        assert f"against training reports, weighted by the {weights}" in defined


def test_card_scores_with_a_bank_say_that_the_calls_decode_otherwise(copied):
    assert "report bank" not in words(build_card(copied, "org/tiny")).partition("## Intended use")[0]

    def use_bank(result):
        consensus = {"candidates": 32, "retrieved": True}
        result["generation"] |= {"consensus": consensus, "bank": {"reports": 7, "digest": "0"}, "indication": True}
        result["rows"][ROWS["single"]] = result["rows"]["model"]

    change(copied / "evaluation-validation/evaluation.json", use_bank)
    use = words(build_card(copied, "org/tiny")).partition("## Use ")[2].partition("## Intended use")[0]
    # The report stage's own table is by beams.
    assert "Some of the model's scores in [Results](#results) belong to another decoding than these calls: " in use
    assert "against a bank of 7 reports (without it, greedy search), up to 10 tokens, with the studies' ind" in use
    assert 'pipe({"images": ["frontal.png", "lateral.png"], "indication": "cough"})' in use
    assert 'of the row "model, without consensus decoding", if it is given the indications.' in use


def test_card_missed_and_invented_findings_are_counted(made):
    found = evaluation_of(made / "run/evaluation-validation")["rows"]["model"]["per_finding"]["uncertain_negative"]
    text = build_card(made / "run", "org/tiny").text
    counted = [row for name, row in found.items() if name != "no_finding"]
    there, written, both = (sum(row[count] for row in counted) for count in ("support", "predicted", "true_positives"))
    assert there > both
    assert f"Of {there} positive findings in true reports, generated reports state {both}; of {written} pos" in text
    silent = [FINDING_DISPLAY_NAMES[name] for name, row in found.items() if row["support"] and not row["predicted"]]
    limit = next(line for line in text.splitlines() if "Never written as positive" in line)
    assert silent and all(name in limit for name in silent)


# --- metadata --------------------------------------------------------------------------------------------------------


def test_card_model_index_holds_exact_values(made):
    card, result = build_card(made / "run", "org/tiny"), evaluation_of(made / "run/evaluation-validation")
    own = json.loads((made / "run/results.json").read_text(encoding="utf-8"))
    commanded = [found for found in card.data.eval_results if "greedy" in found.dataset_config]
    by_name = {found.metric_name.partition(" (")[0]: found.metric_value for found in commanded}
    scores = result["rows"]["model"]
    assert {by_name[NLG_NAMES[metric]] for metric in METRICS} == {scores[metric] for metric in METRICS}
    f1 = sorted(found.metric_value for found in commanded if found.metric_type == "f1")
    policies = ("uncertain_negative", "uncertain_positive")
    assert f1 == sorted(scores[f"{score}_{policy}"] for score in F1 for policy in policies)
    (area,) = [found for found in card.data.eval_results if found.metric_type == "roc_auc"]
    validation = own["predictor"]["validation"]
    assert area.metric_value == (validation["macro_auc_interval"] or {"auc": validation["macro_auc"]})["auc"]
    for found in commanded:
        assert (found.dataset_split, found.task_type) == ("validation", "image-to-text")
        assert "12 studies" in found.dataset_name and "phantom radiographs" in found.dataset_name
        assert "protocol full, cleaning none, labeler rules" in found.dataset_config
        assert "protocol full" in found.metric_name
        assert found.metric_type != "f1" or re.search("labeler rules.*protocol full", found.metric_name)


def test_card_saved_and_loaded_is_equal(made, tmp_path):
    card = build_card(made / "run", "org/tiny")
    card.save(tmp_path / "README.md")
    read = ModelCard.load(tmp_path / "README.md")
    assert read.data.to_dict() == card.data.to_dict() and read.text.strip() == card.text.strip()
    index = eval_results_to_model_index("tiny", card.data.eval_results)
    assert model_index_to_eval_results(index) == ("tiny", card.data.eval_results)
    metadata = card.data.to_dict()
    assert metadata["language"] == "en" and metadata["library_name"] == "transformers"
    assert metadata["pipeline_tag"] == "image-to-text" and metadata["license"] == "apache-2.0"
    assert "base_model" not in metadata and "datasets" not in metadata


def test_card_hub_validation_passes(made, hub_server, tmp_path):
    build_card(made / "run", "org/tiny").save(tmp_path / "README.md")
    code = "import sys; from huggingface_hub import ModelCard; ModelCard.load(sys.argv[1]).validate()"
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "README.md")],
        env=hub_server.environment(tmp_path / "home"),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr


def test_card_two_protocols_are_kept_apart(made):
    evaluations = [made / "run/evaluation-validation", made / "truncated/evaluation.json"]
    card = build_card(made / "run", "org/tiny", evaluations)
    headings = re.findall(r"^### (.*split.*)$", card.text, re.MULTILINE)
    alike = "phantom radiographs, split validation: protocol full, cleaning none, labeler rules"
    assert headings[0] == f"{alike}, greedy search, up to 10 tokens, 12 studies"
    assert headings[1].startswith(
        "phantom radiographs, split validation: protocol r2gengpt (true reports cut to 6 tokens of model), cleaning"
    )
    assert headings[2] == f"{alike}, 2 beams, up to 10 tokens, 4 studies" and len(headings) == 3
    groups = eval_results_to_model_index("tiny", card.data.eval_results)[0]["results"]
    bleu = {
        group["dataset"]["config"]: next(one["value"] for one in group["metrics"] if one["type"] == "bleu")
        for group in groups
        if group["task"]["type"] == "image-to-text"
    }
    assert len(bleu) == 3
    for folder in evaluations:
        result = evaluation_of(folder if folder.is_dir() else folder.parent)
        (config,) = [name for name in bleu if f"protocol {result['protocol']}" in name and "greedy" in name]
        assert bleu[config] == result["rows"]["model"]["bleu_1"]
    scores_table = named(tables(card.text), "score")
    assert len(scores_table) == 3


def test_card_other_dataset_is_named_without_predictor_auc(copied):
    def edit(result):
        described = {**result["data"]["validation"], "collections": ["IU X-Ray"]}
        result.update(dataset="/data/of/others/iu_xray", zero_shot=True, split="test", data={"test": described})

    change(copied / "evaluation-validation/evaluation.json", edit)
    card = build_card(copied, "org/tiny")
    assert "### IU X-Ray (`iu_xray`), split test: protocol full" in card.text
    assert "zero-shot: the model was trained on another dataset" in card.text
    assert "Not evaluated on another dataset" not in card.text and "/data/of" not in str(card)
    foreign, own = named(tables(card.text), "finding")
    assert not any("AUC" in column for column in foreign["Edema"])
    assert any("AUC" in column for column in own["Edema"])
    places = {(found.dataset_type, found.dataset_split) for found in card.data.eval_results}
    assert places == {("iu-x-ray-iu-xray", "test"), ("phantom-radiographs", "validation")}


# --- what is not there -----------------------------------------------------------------------------------------------


def test_card_model_without_results_says_so(made, tmp_path):
    shutil.copytree(made / "run/model", tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors"))
    card = build_card(tmp_path / "bare", "org/bare")
    assert "**No measured result.**" in card.text and "there is no measured result for this model" in card.text
    assert "model-index" not in card.data.to_dict() and card.data.license == "other"
    assert tables(card.text) == []
    for said in ("The training data are not recorded", "How it was trained is not recorded", "its origin not recorded"):
        assert said in card.text


def test_card_of_a_published_folder_states_what_its_metrics_say(made, tmp_path):
    published = tmp_path / "published"
    shutil.copytree(made / "run/model", published, ignore=shutil.ignore_patterns("*.safetensors"))
    whole = read_run(made / "run", [made / "truncated"])
    write_json(published / "metrics.json", whole.metrics())
    assert read_run(published).metrics() == whole.metrics()
    again, first = build_card(published, "org/tiny"), build_card(made / "run", "org/tiny", [made / "truncated"])
    assert again.text == first.text and again.data.to_dict() == first.data.to_dict()
    # A new evaluation replaces the stated one of the same studies.
    newer = read_run(published, [made / "truncated"])
    assert len(newer.evaluations) == len(whole.evaluations)


def test_card_says_what_the_model_reads_and_whether_transport_aligned_it(copied):
    def card(**fields):
        change(copied / "model/config.json", lambda config: config.update(fields))
        return words(build_card(copied, "org/tiny"))

    text = card(ot_weight=0.1, priors="none")
    assert "by entropic optimal transport (epsilon" in text and "does not see earlier studies" in text
    text = card(ot_weight=0.0, priors="both")
    assert "by entropic optimal transport" not in text and "no loss of optimal transport aligns them" in text
    assert "does not see earlier studies" not in text and "reads the images and report of one earlier study" in text


def test_card_files_of_earlier_versions_names_what_is_missing(copied):
    def strip(content):
        for sitting in content["sittings"]:
            for name in ("data", "hub_dataset", "processor", "cores"):
                del sitting[name]

    change(copied / "run.json", strip)
    change(copied / "evaluation-validation/evaluation.json", lambda result: result.pop("data"))
    text = build_card(copied, "org/tiny").text
    for said in ("Views: not recorded", "processor not recorded", "How often each finding occurs in training"):
        assert said in text


def test_card_run_without_evaluation_has_stage_figures_only(copied):
    shutil.rmtree(copied / "evaluation-validation")
    change(copied / "results.json", lambda results: results["report"].pop("evaluation"))
    card = build_card(copied, "org/tiny")
    assert "**No measured result.**" in card.text and "Label predictor: macro AUC" in card.text
    assert {found.metric_type for found in card.data.eval_results or []} <= {"roc_auc"}
    assert not named(tables(card.text), "score")


def test_card_llm_from_scratch_on_a_pretrained_encoder_says_so(copied):
    change(copied / "model" / "config.json", lambda config: config.update(vision_backbone="facebook/dinov2-small"))
    recipe = yaml.safe_load((copied / "recipe.yaml").read_text(encoding="utf-8"))
    recipe["model"] |= {"text": "scratch", "overrides": {**recipe["model"]["overrides"], "indication_reader": "both"}}
    (copied / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    card = build_card(copied, "org/tiny")
    assert card.data.base_model == ["facebook/dinov2-small"]
    assert "The LLM (`llama`, from scratch) reads image tokens" in words(card)
    assert "`, initialised from `facebook/dinov2-small`) turns each view" in words(card)


def test_card_report_stage_evaluation_has_no_intervals(copied):
    shutil.rmtree(copied / "evaluation-validation")
    result = json.loads((copied / "results.json").read_text(encoding="utf-8"))["report"]["evaluation"]
    text = build_card(copied, "org/tiny").text
    assert "no intervals were computed" in text and "judged by scores without intervals" in text
    table = named(tables(text), "score")[0]
    assert "model, 95 % interval" not in table
    assert table["model"]["BLEU-1"] == shown(result["rows"]["model"]["bleu_1"])


# --- data, licence, training -----------------------------------------------------------------------------------------


def test_card_data_and_training_match_the_files(made):
    text = build_card(made / "run", "org/tiny").text
    (sitting,) = json.loads((made / "run/run.json").read_text(encoding="utf-8"))["sittings"]
    for said in (
        "Dataset: phantom radiographs (source `phantom`",
        "Licence of the studies: Apache-2.0",
        "Studies: train 16, validation 12",
        "Views: 16 frontal; training studies by number of views: 16 with 1",
        f"torch {sitting['versions']['torch']}",
        f"Commit: {sitting['commit']['id'][:12]}" if sitting["commit"] else "Commit: not recorded",
        "Trained on 16 studies of **phantoms**",
    ):
        assert said in text
    rare = sitting["data"]["train"]["positives"]
    assert f"{FINDING_DISPLAY_NAMES['fracture']} ({rare['fracture']})" in text
    recipe = yaml.safe_load(re.search(r"```yaml\n(.*?)```", text, re.DOTALL)[1])
    assert recipe["report"]["max_steps"] == 2 and recipe["output_dir"] == "run"
    stages = named(tables(text), "stage")[0]
    assert [row["steps"] for row in stages.values()] == ["2", "2"]


@pytest.mark.parametrize(
    ("licence", "collection"),
    [("CC BY-NC-ND 4.0", "IU X-Ray"), ("PhysioNet Credentialed Health Data License 1.5.0", "MIMIC-CXR")],
)
def test_card_licence_follows_the_training_data(copied, licence, collection):
    def edit(content):
        described = content["sittings"][-1]["data"]
        for split in described.values():
            split.update(licences=[licence], collections=[collection])

    change(copied / "run.json", edit)
    card = build_card(copied, "org/tiny")
    assert (card.data.license, card.data.license_name) == ("other", TERMS)
    assert card.data.license_link.endswith("/org/tiny#licence") and "\n## Licence\n" in card.text
    assert f"the training data ({collection}: {licence})" in card.text
    stated = build_card(copied, "org/tiny", license="cc-by-nc-4.0")
    assert stated.data.license == "cc-by-nc-4.0" and licence in stated.text


@pytest.mark.parametrize(("form", "relation"), [("full", "finetune"), ("adapter", "adapter")])
def test_card_base_models_have_their_relation(copied, form, relation):
    bases = ["facebook/dinov2-small", "HuggingFaceTB/SmolLM2-135M-Instruct"]
    named_by = dict(zip(("vision_backbone", "text_backbone"), bases, strict=True))
    change(copied / "model/config.json", lambda config: config.update(named_by))
    card = build_card(copied, "org/tiny", form=form)
    assert card.data.base_model == bases and card.data.base_model_relation == relation
    assert card.data.license == "other" and all(f"`{name}`" in card.text for name in bases)
    assert ("trained tensors only" in card.text) == (form == "adapter")
    libraries = {"full": "torch, Pillow and timm", "adapter": "torch, Pillow, timm and peft"}[form]
    assert f"transformers 5.24 or later with {libraries}, and nothing else" in words(card)
    given = build_card(copied, "org/tiny", form=form, base_models=["org/base"])
    assert given.data.base_model == ["org/base"]


def test_card_hub_dataset_has_its_id(copied):
    change(copied / "run.json", lambda content: content["sittings"][-1].update(hub_dataset="org/radiographs"))
    card = build_card(copied, "org/tiny")
    assert card.data.datasets == ["org/radiographs"]
    assert {found.dataset_type for found in card.data.eval_results} == {"org/radiographs"}


# --- what must not get out -------------------------------------------------------------------------------------------


def test_published_files_contain_no_path_and_no_report(made):
    folder = str(made)
    evaluations = [made / "run/evaluation-validation", made / "truncated"]
    published = json.dumps(read_run(made / "run", evaluations).metrics(), ensure_ascii=False)
    card = str(build_card(made / "run", "org/tiny", evaluations))
    reports = set(evaluation_of(evaluations[0])["constants"].values())
    reports.add(evaluation_of(evaluations[0])["faithfulness"]["constant"])
    for text in (published, card):
        for leak in (folder, "a secret place", sys.executable, str(made.parent), *reports):
            assert leak not in text
    kept = json.loads(published)
    assert kept["evaluations"][0]["rows"] == evaluation_of(evaluations[0])["rows"]
    assert kept["evaluations"][0]["faithfulness"]["conditions"]["predicted"]["constant"]["floor"] == 1
    assert kept["results"]["predictor"]["validation"]["macro_ece"] is not None


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("/home/me/data/annotation.json", "annotation.json"),
        ("/home/me/my data/annotation.json", "annotation.json"),
        ("output_dir=/home/me/my runs/iu", "output_dir=iu"),
        ("~/runs/iu", "iu"),
        ("C:\\Users\\me\\iu", "iu"),
        ("no space left (/home/me/runs/iu, /scratch/x)", "no space left (iu, x)"),
        ("file:///home/me/iu", "iu"),
        ("https://huggingface.co/org/name", "https://huggingface.co/org/name"),
        ("org/name", "org/name"),
        ("0.5 * bleu_4 / cider", "0.5 * bleu_4 / cider"),
        ("runs/iu", "runs/iu"),
    ],
)
def test_published_paths_become_names(copied, written, read):
    change(copied / "run.json", lambda content: content["sittings"][-1].update(outcome=written, command=[written]))
    (sitting,) = read_run(copied).metrics()["sittings"]
    assert (sitting["outcome"], sitting["command"]) == (read, [read])


def test_card_warnings_keep_counts_without_study_ids(copied):
    warning = "train: 2,068 studies, 2,069 in the published split; not in the source: CXR2084_IM-0715-1001"
    change(copied / "evaluation-validation/evaluation.json", lambda result: result.update(warnings=[warning]))
    text = build_card(copied, "org/tiny").text
    assert "- train: 2,068 studies, 2,069 in the published split\n" in text and "CXR2084" not in text


# --- form ------------------------------------------------------------------------------------------------------------


def test_card_special_characters_keep_tables_intact(copied):
    def edit(result):
        result["rows"] = {name.replace("nearest", "a|b\n<i>"): scores for name, scores in result["rows"].items()}
        result["notes"] = ["a | b", "x|y"]
        result["labeler_options"] = {"sep": "|"}

    before = tables(build_card(copied, "org/tiny").text)
    change(copied / "evaluation-validation/evaluation.json", edit)
    after = tables(build_card(copied, "org/tiny").text)
    assert [[len(row) for row in table] for table in before] == [[len(row) for row in table] for table in after]
    assert any(row[0].startswith("a|b") for table in after for row in table)


def test_markdown_table_cells_are_read_back_unchanged():
    cells = [["a|b", "", "`x|y`"], ["two\nlines", "1 \\ 2", "–"]]
    ((header, *rows),) = tables(markdown_table(["one", "two", "three"], cells))
    assert header == ["one", "two", "three"]
    assert rows == [["a|b", "", "x|y"], ["two lines", "1 \\ 2", "–"]]


def test_card_markdown_is_well_formed(made):
    text = build_card(made / "run", "org/tiny").text
    assert text.count("<details>") == text.count("</details>") == 4
    assert "\n\n\n" not in text and "{{" not in text and "None" not in re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    lines = text.splitlines()
    for place, line in enumerate(lines):
        if line.startswith("|") and not lines[place - 1].startswith("|"):
            assert lines[place - 1] == "", line


# --- errors ----------------------------------------------------------------------------------------------------------


def test_card_wrong_input_is_one_clear_error(copied, tmp_path):
    good = copied / "evaluation-validation"
    with pytest.raises(ValueError, match="form is 'merged': expected one of full, adapter"):
        build_card(copied, "org/tiny", form="merged")
    with pytest.raises(ValueError, match=r"no config\.json here or in its folder 'model'"):
        build_card(tmp_path, "org/tiny")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    with pytest.raises(ValueError, match=r"config\.json: model_type is 'llama', expected 'otdrg'"):
        build_card(tmp_path, "org/tiny")
    with pytest.raises(OSError, match=r"evaluation .*nowhere does not exist"):
        build_card(copied, "org/tiny", [tmp_path / "nowhere"])
    (tmp_path / "evaluation.json").write_text('{"split": "test"}', encoding="utf-8")
    with pytest.raises(ValueError, match="was not written by otdrg evaluate: studies is missing"):
        build_card(copied, "org/tiny", [tmp_path])
    (tmp_path / "evaluation.json").write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match=r"evaluation\.json is not valid JSON"):
        build_card(copied, "org/tiny", [tmp_path])
    shutil.copy(good / "evaluation.json", tmp_path)
    with pytest.raises(ValueError, match="same dataset, split, protocol, decoding and labeler, expected one"):
        build_card(copied, "org/tiny", [good, tmp_path])
    assert build_card(copied, "org/tiny", [good, good / "evaluation.json"]).data.eval_results
    with pytest.raises(ValueError, match="belongs to another model than run"):
        build_card(copied, "org/tiny", model_digest="0" * 32)
    digest = copy.copy(evaluation_of(good)["generation"]["model"])
    assert build_card(copied, "org/tiny", model_digest=digest).data.eval_results


def test_build_card_shows_a_registered_metric(copied):
    def add(evaluation):
        for row in evaluation["rows"].values():
            row["mean_words"] = 7.25

    change(copied / "evaluation-validation/evaluation.json", add)
    score = Score("mean words", main=True)
    register(Metric("words", {"mean_words": score}, lambda *_: MetricResult.from_means({"mean_words": [7.25]})))
    try:
        card = build_card(copied, "org/tiny")
    finally:
        del REGISTRY["words"]
    assert "| score | BLEU-1 | BLEU-4 | ROUGE-L | CIDEr | mean words |" in card.text
    assert {result.metric_type: result.metric_value for result in card.data.eval_results}["mean_words"] == 7.25
