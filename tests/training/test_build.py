import csv
import logging

import pytest
from datasets import DatasetDict
from otdrg.configuration_otdrg import OTDRGConfig
from otdrg.findings_otdrg import FINDING_DISPLAY_NAMES
from otdrg.labelers import load_labeler
from otdrg.studies import load_studies
from otdrg.studies.loading import uncleaned_reports
from otdrg.training import build
from otdrg.training.build import build_model, build_studies, lora_fields, set_trained_parts
from otdrg.training.recipe import LabelsRecipe, ModelRecipe, PredictorRecipe, Recipe, ReportRecipe, StudiesRecipe

OPTIONS = {"train": 5, "validation": 3, "test": 0, "image_size": 32, "views": ["frontal"]}


@pytest.fixture
def phantoms():
    return load_studies("phantom", **OPTIONS)


def studies_recipe(**fields):
    return StudiesRecipe(source="phantom", options=OPTIONS, **fields)


def write_csv(path, states):
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["id", *reversed(FINDING_DISPLAY_NAMES.values())])
        written = {0: "", 1: "1", 2: "0", 3: "-1"}
        writer.writerows([[study, *(written[state] for state in reversed(row))] for study, row in states.items()])


def test_states_are_the_studies_own_without_labels(phantoms):
    built = build_studies(studies_recipe(), LabelsRecipe())
    assert built["train"]["finding_states"] == phantoms["train"]["finding_states"]


def test_a_csv_wins_over_the_labeler_and_the_labeler_over_the_studies(phantoms, tmp_path):
    ids = phantoms["train"]["id"]
    named = {ids[1]: [3] * 12 + [2, 1], ids[3]: [0] * 13 + [1]}
    write_csv(tmp_path / "states.csv", named)
    built = build_studies(studies_recipe(), LabelsRecipe(csv=str(tmp_path / "states.csv"), labeler="rules"))
    rules = load_labeler("rules")
    for split in ("train", "validation"):
        read = rules.label(phantoms[split]["report"])
        for study, states, by_rules in zip(built[split]["id"], built[split]["finding_states"], read, strict=True):
            assert states == named.get(study, by_rules.tolist())


@pytest.mark.parametrize("cleaning", ["r2gen_iu", "none"])
def test_build_studies_keeps_reports_as_they_were_before_cleaning(phantoms, monkeypatch, cleaning):
    reports = [f"Scarring/atelectasis {number}." for number in range(5)]
    train = phantoms["train"].remove_columns("report").add_column("report", reports)
    monkeypatch.setattr(build, "load_studies", lambda source, **options: DatasetDict({"train": train}))
    rows = build_studies(studies_recipe(cleaning=cleaning), LabelsRecipe(labeler="rules"))["train"]
    assert uncleaned_reports(rows) == reports
    assert rows["report"][0] == ("scarringatelectasis 0 ." if cleaning == "r2gen_iu" else reports[0])
    assert rows["finding_states"] == load_labeler("rules").label(reports).tolist()


def test_build_studies_placeholder_report_is_skipped(phantoms, monkeypatch, caplog):
    train = phantoms["train"].remove_columns("report").add_column("report", ["nan", "None", ".", "N/A", "Edema."])
    monkeypatch.setattr(build, "load_studies", lambda source, **options: DatasetDict({"train": train}))
    with caplog.at_level(logging.WARNING):
        assert len(build_studies(studies_recipe(), LabelsRecipe())["train"]) == 1
    assert "train: 4 of 5 studies skipped: their report is empty" in caplog.text


def test_a_csv_of_other_studies_is_refused(tmp_path):
    write_csv(tmp_path / "states.csv", {"someone": [0] * 14})
    with pytest.raises(ValueError, match=r"labels\.csv=.* names none of the studies"):
        build_studies(studies_recipe(), LabelsRecipe(csv=str(tmp_path / "states.csv")))


def test_empty_reports_are_skipped_and_counted_and_the_rest_cleaned(phantoms, monkeypatch, caplog):
    reports = ["", "Heart is normal. No effusion.", "  ", "Clear lungs.", "Edema."]
    train = phantoms["train"].remove_columns("report").add_column("report", reports)
    monkeypatch.setattr(build, "load_studies", lambda source, **options: DatasetDict({"train": train}))
    with caplog.at_level(logging.WARNING):
        built = build_studies(studies_recipe(cleaning="r2gen_iu", limit={"train": 2}), LabelsRecipe())
    assert built["train"]["report"] == ["heart is normal . no effusion .", "clear lungs ."]
    assert "train: 2 of 5 studies skipped: their report is empty" in caplog.text


def test_training_studies_need_states(phantoms, monkeypatch):
    feature = phantoms["train"].features["finding_states"]
    states = [None, *phantoms["train"]["finding_states"][1:]]
    train = phantoms["train"].remove_columns("finding_states").add_column("finding_states", states, feature=feature)
    monkeypatch.setattr(build, "load_studies", lambda source, **options: DatasetDict({"train": train}))
    with pytest.raises(ValueError, match=r"1 of 5 training studies have no finding states: set labels\.labeler"):
        build_studies(studies_recipe(), LabelsRecipe())


def test_parts_are_trained_as_the_recipe_says():
    lora = {"r": 2, "target_modules": ["q_proj"]}
    model, processor = build_model(ModelRecipe(overrides={"lora": lora}), ["the lungs are clear ."])
    assert model.config.lora is None and model.config.image_token_id == processor.image_token_id

    def trained():
        return {name.split(".")[0] for name, weight in model.named_parameters() if weight.requires_grad}

    frozen = set_trained_parts(model, vision="frozen", text="frozen", predictor="full", joining=False)
    assert trained() == {"finding_predictor"}
    assert model.vision_tower in frozen and model.language_model in frozen
    set_trained_parts(model, vision="full", text="full", predictor="full", joining=True)
    assert trained() == {"vision_tower", "language_model", "finding_predictor", "image_projector", "label_projector"}
    model.config.lora = lora
    model.add_lora()
    build.cast_backbones(model, "bfloat16")
    set_trained_parts(model, vision="frozen", text="lora", predictor="frozen", joining=True)
    for name, weight in model.named_parameters():
        assert weight.requires_grad == ("lora_" in name or name.startswith(("image_projector", "label_projector")))
        is_backbone = name.startswith(("vision_tower", "language_model")) and "lora_" not in name
        assert str(weight.dtype) == ("torch.bfloat16" if is_backbone else "torch.float32"), name


def recipe_of(stage=None, overrides=None, **fields):
    sections = {} if stage is None else {stage: {"predictor": PredictorRecipe, "report": ReportRecipe}[stage](**fields)}
    return Recipe(output_dir="run", studies=studies_recipe(), model=ModelRecipe(overrides=overrides or {}), **sections)


def test_lora_needs_its_fields():
    assert OTDRGConfig.from_preset("tiny").lora is None
    with pytest.raises(ValueError, match=r"report\.text=lora, but the preset tiny has no LoRA of the LLM: set model\."):
        lora_fields(recipe_of(), "report")
    message = r"predictor\.vision=lora, but .* set model\.overrides\.vision_lora to r.* or predictor\.vision to full"
    with pytest.raises(ValueError, match=message):
        lora_fields(recipe_of("predictor", vision="lora"), "predictor")


def test_a_stage_has_the_adapters_it_trains():
    lora = {field: {"r": 2, "target_modules": [name]} for field, name in (("lora", "q_proj"), ("vision_lora", "qkv"))}
    assert lora_fields(recipe_of("predictor", lora, vision="lora"), "predictor") == {"vision_lora": lora["vision_lora"]}
    assert lora_fields(recipe_of("report", lora), "report") == {"lora": lora["lora"]}
    assert lora_fields(recipe_of("report", lora, vision="lora", predictor="full"), "report") == lora
    assert lora_fields(recipe_of("report", lora, text="frozen"), "report") == {}
