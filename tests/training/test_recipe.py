import dataclasses
import re
import typing
from pathlib import Path

import pytest
import yaml
from otdrg.train_hf import main
from otdrg.training.recipe import StudiesRecipe, load_recipe
from otdrg.training.stages import stage_of
from transformers import TrainingArguments

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))
MINIMAL = {"output_dir": "runs/x", "studies": {"source": "phantom"}}


@pytest.fixture
def write(tmp_path):
    def write(text_or_values):
        path = tmp_path / "recipe.yaml"
        text = text_or_values if isinstance(text_or_values, str) else yaml.safe_dump(text_or_values)
        path.write_text(text, encoding="utf-8")
        return path

    return write


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_load_recipe_shipped_recipes_load(path, monkeypatch):
    for name in re.findall(r"\$\{(\w+)", path.read_text(encoding="utf-8")):
        monkeypatch.setenv(name, "/somewhere")
    load_recipe(path)


def test_load_recipe_overrides_replace_the_file(write):
    path = write({**MINIMAL, "report": {"num_train_epochs": 3, "generation": {"num_beams": 2}}})
    recipe = load_recipe(
        path,
        [
            "report.max_steps=20",
            "report.generation.max_new_tokens=7",
            "stages=[report]",
            "model.overrides.text_config.hidden_size=64",
            "studies.options={train: 3}",
            "predictor.learning_rate=1e-3",
            "report.save_strategy=steps",
        ],
    )
    assert (recipe.report.num_train_epochs, recipe.report.max_steps) == (3.0, 20)
    assert recipe.report.generation == {"num_beams": 2, "max_new_tokens": 7}
    assert recipe.stages == ["report"]
    assert recipe.model.overrides == {"text_config": {"hidden_size": 64}}
    assert recipe.studies.options == {"train": 3}
    assert recipe.predictor.learning_rate == 1e-3
    assert recipe.report.save_strategy == "steps"
    assert recipe.predictor.per_device_train_batch_size == 8


def test_load_recipe_default_stages_leave_out_ircp(write):
    assert load_recipe(write(MINIMAL)).stages == ["predictor", "report"]
    assert load_recipe(write(MINIMAL), ["stages=[ircp,predictor]"]).stages == ["ircp", "predictor"]


def test_load_recipe_other_source_drops_the_options_of_the_file(write, monkeypatch):
    monkeypatch.delenv("OTDRG_TEST_FOLDER", raising=False)
    studies = {"source": "r2gen", "options": {"images": "${OTDRG_TEST_FOLDER}/images"}, "cleaning": "r2gen_mimic"}
    path, folder = write({**MINIMAL, "studies": studies}), "studies.options.folder=mimic_cxr"
    for overrides in (["studies.source=prepared", folder], [folder, "studies.source=prepared"]):
        recipe = load_recipe(path, overrides).studies
        assert (recipe.source, recipe.options, recipe.cleaning) == ("prepared", {"folder": "mimic_cxr"}, "r2gen_mimic")
    monkeypatch.setenv("OTDRG_TEST_FOLDER", "/somewhere")
    kept = load_recipe(path, ["studies.source=r2gen", "studies.options.annotation=a.json"]).studies
    assert kept.options == {"images": "/somewhere/images", "annotation": "a.json"}


@pytest.mark.parametrize("name", ["iu_xray_paper", "mimic_cxr_paper"])
def test_load_recipe_paper_recipe_takes_a_prepared_dataset(name, monkeypatch):
    monkeypatch.delenv(f"OTDRG_{name.removesuffix('_paper').upper()}", raising=False)
    path = RECIPES[0].with_name(f"{name}.yaml")
    recipe = load_recipe(path, ["studies.source=prepared", "studies.options.folder=studies"])
    assert recipe.studies.options == {"folder": "studies"}


def test_recipe_to_yaml_reads_back_as_itself(write):
    recipe = load_recipe(write(MINIMAL), ["model.overrides.ot_epsilon=1e-2", "report.max_steps=5"])
    assert load_recipe(write(recipe.to_yaml())) == recipe
    assert recipe.model.overrides["ot_epsilon"] == 0.01


def test_load_recipe_environment_variables_are_expanded(write, monkeypatch):
    path = write({**MINIMAL, "model": {"vision": "${OTDRG_TEST_VISION}/v", "text": "${OTDRG_TEST_TEXT:-org/llm}"}})
    monkeypatch.delenv("OTDRG_TEST_VISION", raising=False)
    monkeypatch.delenv("OTDRG_TEST_TEXT", raising=False)
    with pytest.raises(ValueError, match=r"model\.vision=.*OTDRG_TEST_VISION is not set"):
        load_recipe(path)
    monkeypatch.setenv("OTDRG_TEST_VISION", "/backbones")
    recipe = load_recipe(path)
    assert (recipe.model.vision, recipe.model.text) == ("/backbones/v", "org/llm")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["report.learning_rat=1"], r"unknown key 'learning_rat' in report: did you mean 'learning_rate'\?"),
        (["reprot.max_steps=1"], r"unknown key 'reprot' at the top: did you mean 'report'\?"),
        (["sections.report.max_steps=1"], r"unknown key 'sections' at the top"),
        (["report.generation.num_beam=1"], r"unknown key 'num_beam' in report\.generation: did you mean 'num_beams'"),
        (
            ["report.generation.max_new_tokens=0"],
            r"report\.generation\.max_new_tokens=0: expected a number of at least 1",
        ),
        (["report.generation.temperature=0.5"], r"report\.generation=.*temperature"),
        (["report.generation.early_stopping=maybe"], r"report\.generation=.*early_stopping"),
        (["report.num_train_epochs=many"], r"report\.num_train_epochs='many': expected a number"),
        (["report.learning_rate=-1"], r"report\.learning_rate=-1: expected a number above 0"),
        (["report.max_steps=0"], r"report\.max_steps=0: expected a positive integer, or -1"),
        (["report.per_device_train_batch_size=2.5"], r"report\.per_device_train_batch_size=2\.5: expected an integer"),
        (["report.per_device_train_batch_size=true"], r"per_device_train_batch_size=True: expected an integer"),
        (["report.per_device_train_batch_size=0"], r"per_device_train_batch_size=0: expected a number of at least 1"),
        (["report.bf16=1"], r"report\.bf16=1: expected true or false"),
        (["report.lr_scheduler_type=cosin"], r"report\.lr_scheduler_type='cosin': expected one of linear, cosine, "),
        (["report.optim=adam"], r"report\.optim='adam': expected one of adamw_torch, "),
        (["report.text=lorra"], r"report\.text='lorra': expected one of frozen, lora, full"),
        (["predictor.logit_adjustment=-1"], r"predictor\.logit_adjustment=-1: expected a number of at least 0"),
        (["predictor.vision_learning_rate=1e-4"], r"vision_learning_rate=0\.0001: expected null while"),
        (["predictor.train_sampling_strategy=group_by_length"], r"train_sampling_strategy='group_by_length': expected"),
        (["report.push_to_hub=true"], r"report\.hub_model_id=None: expected a repository"),
        (["report.output_dir=x"], r"report\.output_dir is set by the run: use the run's own output_dir"),
        (
            ["report.save_only_model=true"],
            r"report\.save_only_model is set by the run: a checkpoint without its optimizer",
        ),
        (["report.average_tokens_across_devices=false"], r"average_tokens_across_devices is set by the run: the loss"),
        (["report.hub_token=x"], r"report\.hub_token is set by the run: use the environment variable HF_TOKEN"),
        (["stages=report"], r"stages='report': expected a list of strings"),
        (["stages=[pretraining]"], r"stages='pretraining': expected one of ircp, predictor, report"),
        (["stages=[report, predictor]"], r"in this order: ircp, predictor, report"),
        (["report=3"], r"report=3: expected a section"),
        (["report.max_steps"], r"expected section\.field=value"),
        (["report.max_steps=[1"], r"is not valid YAML"),
        (["studies.limit={dev: 3}"], r"studies\.limit='dev': expected train, validation or test"),
    ],
)
def test_load_recipe_wrong_override_is_named_in_one_line(write, overrides, message, capsys):
    path = write(MINIMAL)
    with pytest.raises(ValueError, match=message):
        load_recipe(path, overrides)
    assert main([str(path), *overrides]) == 1
    error = capsys.readouterr().err
    assert error.startswith("train_hf.py: error: ") and error.count("\n") == 1


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("epochs: 3", "num_train_epochs"),
        ("batch_size: 8", "per_device_train_batch_size"),
        ("eval_batch_size: 8", "per_device_eval_batch_size"),
        ("gradient_accumulation: 2", "gradient_accumulation_steps"),
        ("schedule: constant", "lr_scheduler_type"),
        ("warmup_ratio: 0.1", "warmup_steps"),
        ("workers: 2", "dataloader_num_workers"),
        ("compile: true", "torch_compile"),
        ("group_by_length: true", "train_sampling_strategy: group_by_length"),
        ("selection: {patience: 2}", "early_stopping_patience"),
    ],
)
def test_load_recipe_old_name_names_the_new_one(write, old, new):
    with pytest.raises(ValueError, match=rf"report\.{old.partition(':')[0]} no longer exists: use .*{new}"):
        load_recipe(write({**MINIMAL, "report": yaml.safe_load(f"{{{old}}}")}))


def test_recipe_features_folder_is_in_the_run_or_shared(write, tmp_path):
    path = write(MINIMAL)
    assert load_recipe(path).features_folder == Path("runs/x/features")
    assert load_recipe(path, [f"feature_cache={tmp_path}"]).features_folder == tmp_path
    with pytest.raises(ValueError, match=r"feature_cache=.*recipe\.yaml': expected a folder, and this is a file"):
        load_recipe(path, [f"feature_cache={path}"])


def test_report_stage_trained_encoder_needs_a_trained_or_own_predictor(write):
    overrides = ["model.overrides.predictor_encoder=own", "report.vision=full"]
    recipe = load_recipe(write(MINIMAL), overrides)
    assert recipe.report.predictor == "frozen"
    stage_of("report").check(recipe)
    shared = load_recipe(write(MINIMAL), ["report.vision=lora"])
    with pytest.raises(ValueError, match=r"report\.predictor='frozen': expected full where report\.vision is lora"):
        stage_of("report").check(shared)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("studies: {source: phantom}", "output_dir is missing"),
        ("output_dir: x", "studies is missing"),
        ("- a", "is not a mapping"),
        ("a: [", "is not valid YAML, line 1"),
        ("seed: 1\nseed: 2", "'seed' is repeated"),
    ],
)
def test_load_recipe_broken_file_is_named(write, text, message):
    with pytest.raises(ValueError, match=message):
        load_recipe(write(text))


def test_load_recipe_missing_file_is_one_line(tmp_path, capsys):
    assert main([str(tmp_path / "none.yaml")]) == 1
    assert capsys.readouterr().err.endswith("none.yaml does not exist\n")


def sections(recipe):
    """The sections of a recipe, by their place."""
    for item in dataclasses.fields(recipe):
        value = getattr(recipe, item.name)
        if dataclasses.is_dataclass(value):
            yield item.name, value
    yield from recipe.sections.items()
    yield "report.evaluation", recipe.report.evaluation


@pytest.fixture
def minimal(write):
    return load_recipe(write(MINIMAL))


def own_fields(minimal):
    """Fields of our own, and transformers' fields with bounds or another default of ours: place, field, type."""
    for place, section in sections(minimal):
        hints = typing.get_type_hints(type(section))
        inherited = (
            {item.name for item in dataclasses.fields(TrainingArguments)} if place in minimal.sections else set()
        )
        for item in dataclasses.fields(section):
            if item.name not in inherited or item.name in section.bounds or item.name in section.written():
                yield place, item, hints[item.name]


def refused(path, override):
    try:
        load_recipe(path, [override])
    except ValueError as error:
        assert "\n" not in str(error)
        return str(error)
    return None


def test_recipe_every_own_field_has_a_help_text(minimal):
    for place, item, _ in own_fields(minimal):
        assert item.metadata.get("help"), f"{place}.{item.name}"


def test_recipe_every_field_of_training_arguments_is_a_field_of_a_stage(write, minimal):
    names = {item.name for item in dataclasses.fields(TrainingArguments) if item.init}
    assert names <= {item.name for item in dataclasses.fields(minimal.report)}
    given = {"optim": "sgd", "lr_scheduler_type": "linear", "lr_scheduler_kwargs": {"a": 1}, "adam_beta2": 0.9}
    recipe = load_recipe(write({**MINIMAL, "report": given}))
    assert {name: getattr(recipe.report, name) for name in given} == given
    assert given.items() <= yaml.safe_load(recipe.to_yaml())["report"].items()


def test_recipe_number_out_of_bounds_is_refused(write, minimal):
    path = write(MINIMAL)
    for place, item, kind in own_fields(minimal):
        if {int, float} & {*typing.get_args(kind), kind} and typing.get_origin(kind) not in (list, dict):
            for value in (".inf", ".nan", "1" + "0" * 400, "-7"):
                error = refused(path, f"{place}.{item.name}={value}")
                assert error and re.search(rf"{item.name}=.*: expected ", error), (place, item.name, value)


def test_recipe_value_of_another_type_is_refused(write, minimal):
    path = write(MINIMAL)
    for place, item, kind in own_fields(minimal):
        allowed = {*typing.get_args(kind), kind}
        is_mapping = dict in allowed or any(typing.get_origin(one) is dict for one in allowed)
        wrong = ["2020-01-01", "[[1]]"]
        wrong += [] if is_mapping or dataclasses.is_dataclass(kind) else ["{a: [b]}"]
        wrong += ["'1'", "true"] if {int, float} & allowed else []
        for value in wrong:
            error = refused(path, f"{place}.{item.name}={value}")
            assert error and item.name in error, (place, item.name, value)


@pytest.mark.parametrize("value", [".nan", "[1, .inf]", "{b: -.inf}", "2020-01-01", "{1: 2}"])
def test_recipe_mapping_with_what_json_cannot_hold_is_refused(write, value):
    for name in ("studies.options", "labels.options", "model.overrides", "report.generation"):
        assert name in refused(write(MINIMAL), f"{name}.train={value}")


def test_stage_arguments_prepare_gives_complete_training_arguments(write, tmp_path):
    overrides = ["report.warmup_steps=0.1", "report.seed=3", "report.per_device_train_batch_size=2", "report_to=[]"]
    section = load_recipe(write(MINIMAL), overrides).report
    args = section.prepare(tmp_path / "run" / "report", 42, [], evaluates=True, label_names=["labels"])
    assert isinstance(args, TrainingArguments) and args.output_dir == str(tmp_path / "run" / "report")
    assert (args.seed, args.per_device_eval_batch_size, args.run_name) == (3, 2, "run-report")
    assert args.get_warmup_steps(100) == 10 and args.eval_strategy == "epoch"
    assert args.load_best_model_at_end and args.metric_for_best_model == "selection" and args.greater_is_better
    assert section.output_dir is None
    loss = load_recipe(write(MINIMAL), ["report.metric_for_best_model=eval_loss"]).report
    args = loss.prepare(tmp_path / "run" / "report", 42, [], evaluates=True)
    assert args.metric_for_best_model == "loss" and not args.greater_is_better and args.seed == 42
    assert not loss.prepare(tmp_path / "run", 42, [], evaluates=False).load_best_model_at_end


def test_stage_arguments_prepare_sets_the_direction_of_the_metric(write, tmp_path):
    def prepared(*overrides):
        section = load_recipe(write(MINIMAL), [f"predictor.{override}" for override in overrides]).predictor
        return section.prepare(tmp_path / "run" / "predictor", 42, [], evaluates=True)

    lowest = prepared("load_best_model_at_end=true", "metric_for_best_model=macro_ece")
    assert lowest.greater_is_better is False
    assert prepared("metric_for_best_model=macro_auc", "save_strategy=best").metric_for_best_model == "macro_auc"
    assert prepared("metric_for_best_model=macro_auc").metric_for_best_model is None
    for schedule in ("reduce_lr_on_plateau", "greedy"):
        args = prepared("metric_for_best_model=macro_auc", f"lr_scheduler_type={schedule}")
        assert args.metric_for_best_model == "macro_auc" and args.lr_scheduler_kwargs == {"mode": "max"}
        assert not prepared(f"lr_scheduler_type={schedule}").lr_scheduler_kwargs


def test_stage_arguments_prepare_meteor_without_java_is_refused(write, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    section = load_recipe(write(MINIMAL), ["report.metric_for_best_model=meteor"]).report
    with pytest.raises(ValueError, match=r"metric_for_best_model='meteor': METEOR .* install a Java runtime"):
        section.prepare(tmp_path / "run" / "report", 42, [], evaluates=True)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("report.dataloader_prefetch_factor=2", "report: --dataloader_prefetch_factor can only be set when"),
        ("report.accelerator_config=nowhere.json", "report: .*nowhere.json"),
        ("report.fp16=true", "report: At most one of fp16 and bf16"),
    ],
)
def test_stage_arguments_prepare_what_transformers_refuses_names_the_stage(write, tmp_path, override, message):
    section = load_recipe(write(MINIMAL), [override, "report.bf16=true"]).report
    with pytest.raises(ValueError, match=message) as refusal:
        section.prepare(tmp_path, 42, [], evaluates=True)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("name", ["output_dir", "feature_cache"])
@pytest.mark.parametrize("value", ['""', '" "', '"a\\0b"'])
def test_recipe_folder_without_a_name_is_refused(write, name, value):
    with pytest.raises(ValueError, match=f"{name}=.*: expected the path of a folder"):
        load_recipe(write(MINIMAL), [f"{name}={value}"])


def test_recipe_byte_order_mark_is_dropped(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(yaml.safe_dump(MINIMAL).encode("utf-8-sig"))
    assert load_recipe(path).output_dir == "runs/x"


def test_train_hf_help_shows_an_example(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    assert "accelerate launch train_hf.py recipes/phantom_tiny.yaml" in capsys.readouterr().out


def test_train_hf_fields_lists_every_field_that_a_section_declares(minimal, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--fields"])
    shown = capsys.readouterr().out
    assert ended.value.code == 0 and "every field of transformers' TrainingArguments" in " ".join(shown.split())
    assert "  output_dir is required\n" in shown and "  report.max_report_tokens: 120\n      Tokens of a" in shown
    assert "  ircp.noise: normalized (one of normalized, raw)\n" in shown
    listed = set(re.findall(r"^  ([\w.]+)(?: is required|: )", shown, re.MULTILINE))
    of_transformers = {item.name for item in dataclasses.fields(TrainingArguments)}
    for place, section in sections(minimal):
        for item in dataclasses.fields(section):
            name, is_stage = f"{place}.{item.name}", place in minimal.sections
            if name != "report.evaluation" and not (is_stage and item.name in of_transformers):
                assert {name, f"STAGE.{item.name}"} & listed, name
    tops = {item.name for item in dataclasses.fields(minimal)} - {"studies", "labels", "model", "sections"}
    assert tops <= listed and max(map(len, shown.splitlines())) <= 120


def test_hub_dataset_folder_is_none(tmp_path):
    def named(source, **options):
        return StudiesRecipe(source=source, options=options).hub_dataset

    assert named("hub", dataset="org/radiographs") == "org/radiographs"
    assert named("hub", dataset=str(tmp_path)) is None
    assert named("phantom", train=3) is None
