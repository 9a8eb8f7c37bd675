"""Recipes that are wrong in what only other modules know: refused before anything is loaded or trained."""

import pytest
from otdrg.train_hf import main
from otdrg.training import run
from otdrg.training.recipe import load_recipe
from otdrg.training.run import check_recipe
from otdrg.training.trainer import StageTrainer

WRONG = [
    ("studies.source=nope", "studies.source='nope': unknown source"),
    ("studies.options.train=.5", "studies.options.train=0.5: expected an integer"),
    ("studies.options.train=-1", "studies.options: "),
    ("studies.options.trian=3", "studies.options: unknown option 'trian'"),
    ("studies={source: prepared, options: null}", "expected the option folder"),
    ("labels.labeler=nope", "labels.labeler='nope': unknown labeler"),
    ("labels={labeler: rules, options: {nope: 1}}", "labels.labeler='rules': unknown option 'nope'"),
    ("labels.labeler=llm", "labels.labeler='llm': labeler 'llm' needs the option 'model'"),
    ("labels.options={nope: 1}", "labels.options={'nope': 1}: expected none without labels.labeler"),
    ("model.preset=nope", "unknown preset 'nope'"),
    ("model.vision=only", "model.text is missing beside model.vision: expected an LLM, or scratch"),
    ("model.label_text_encoder=bert", "model.label_text_encoder is given, but no pretrained LLM"),
    ("model.overrides.nope=1", "unknown OTDRGConfig field 'nope'"),
    ("model.overrides.ot_epsilon=0", "OTDRGConfig.ot_epsilon=0: expected a number above 0"),
    ("model.overrides.ot_epsilon=.nan", "model.overrides.ot_epsilon=nan: expected a finite number"),
    ("model.overrides.text_config.hidden_size=many", "hidden_size"),
    ("model.overrides.text_config.num_attention_heads=5", "is not a multiple of the number of attention heads"),
    ("model.overrides.lora.r=0", "expected an integer from 1 to 4,096"),
    ("model.overrides.lora.lora_dropout=1.5", "model.overrides.lora.lora_dropout=1.5: expected"),
    ("model.overrides.lora.lora_alpha=-1", "model.overrides.lora.lora_alpha=-1: expected a number above 0"),
    ("model.overrides.lora.target_modules=[]", "model.overrides.lora.target_modules=[]: expected names of modules"),
    ("model.overrides.lora=null", "report.text=lora, but the preset tiny has no LoRA"),
    ("report.candidates=1", "report.candidates=1: expected"),
    ("report.bank=true", "report.candidates=None: expected a number, beside report.consensus or report.bank"),
    ("report={candidates: 4, consensus: {candidates: 8}}", "report.consensus.candidates=8: expected report.candidates"),
    ("report={candidates: 4, consensus: {beams: 2}}", "report.consensus: unknown setting 'beams'"),
    ("report.evaluation.metrics=[nope]", "report.evaluation.metrics='nope': expected some of bleu, bleu_1"),
    ("report.evaluation.metrics=[cider, cider]", "expected each once"),
    ("report.evaluation.labeler=nope", "report.evaluation.labeler='nope': unknown labeler"),
    ("report.evaluation.labeler=llm", "report.evaluation.labeler='llm': labeler 'llm' needs the option 'model'"),
    ("report.metric_for_best_model=bleu4", "report.metric_for_best_model='bleu4': unknown score 'bleu4', did you mean"),
    (
        "report.metric_for_best_model=bleu_4 + loss",
        "a better model has a higher term of bleu_4 and a lower one of loss",
    ),
    (
        "model.overrides.report_sections=[findings,impression]",
        "model.overrides.report_sections=['findings', 'impression']: expected null",
    ),
    ("predictor.metric_for_best_model=bleu_4", "predictor.metric_for_best_model='bleu_4': unknown score 'bleu_4'"),
    ("report.metric_for_best_model=bleu_4 / 2", "expected a weighted sum of scores"),
    ("report.metric_for_best_model=1e999 * bleu_4", "expected a weighted sum of scores"),
    ("report.vision=full", "report.predictor='frozen': expected full where report.vision is full"),
    ("report={fp16: true, bf16: true}", "report: At most one of fp16 and bf16"),
    ("report.deepspeed=zero.json", "DeepSpeed was asked for"),
    ("report.generation.max_new_tokens=1000000000", "max_new_tokens=1000000000: expected at most 1015, the LLM's"),
    ("report.max_report_tokens=1000000", "report.max_report_tokens=1000000: expected at most 1015, "),
    ("report_to=[nope]", "report_to='nope': expected some of"),
]


@pytest.mark.parametrize(("override", "message"), WRONG, ids=[override for override, _ in WRONG])
def test_check_recipe_wrong_value_is_one_line_before_studies_are_read(
    tiny_recipe, tmp_path, monkeypatch, capsys, override, message
):
    monkeypatch.setattr(run, "build_studies", None)
    status = main([str(tiny_recipe), override, f"output_dir={tmp_path / 'run'}"])
    error = capsys.readouterr().err
    assert status == 1 and error.startswith("train_hf.py: error: ") and error.count("\n") == 1
    assert message in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("stages", ["[predictor]", "[report]", "[ircp,predictor,report]"])
def test_check_recipe_stages_that_are_not_run_are_checked_too(tiny_recipe, stages):
    recipe = load_recipe(tiny_recipe, [f"stages={stages}", "report.evaluation.metrics=[nope]"])
    with pytest.raises(ValueError, match=r"report\.evaluation\.metrics='nope'"):
        check_recipe(recipe)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["report.evaluation.split=test"],
            "report.evaluation.split='test': expected one of the splits there are, train, validation",
        ),
        (
            ["studies.options.validation=0", "predictor.thresholds=validation"],
            "predictor.thresholds='validation': expected",
        ),
        (["model.overrides.lora.target_modules=[nope]"], "Target modules are not in the backbone, expected some of "),
        (["model.overrides.vision_config.architecture=nope"], "model.overrides: no model can be made of them"),
        (["model.overrides.vision_config.model_args.img_size=-5"], "model.overrides"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_run_recipe_unfit_data_or_model_is_refused_before_training(
    tiny_recipe, tmp_path, monkeypatch, capsys, overrides, message
):
    monkeypatch.setattr(StageTrainer, "train", None)
    status = main([str(tiny_recipe), *overrides, f"output_dir={tmp_path / 'run'}"])
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("train_hf.py")]
    assert status == 1 and len(error) == 1 and message in error[0]
