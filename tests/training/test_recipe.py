import dataclasses
import re
import typing
from pathlib import Path

import pytest
import yaml
from otdrg.train_hf import main
from otdrg.training.recipe import Recipe, load_recipe

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
def test_shipped_recipes_load(path, monkeypatch):
    for name in re.findall(r"\$\{(\w+)", path.read_text(encoding="utf-8")):
        monkeypatch.setenv(name, "/somewhere")
    load_recipe(path)


def test_overrides_win_over_the_file_and_defaults_fill_the_rest(write):
    path = write({**MINIMAL, "report": {"epochs": 3, "generation": {"num_beams": 2}}})
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
    assert (recipe.report.epochs, recipe.report.max_steps) == (3.0, 20)
    assert (recipe.report.generation.num_beams, recipe.report.generation.max_new_tokens) == (2, 7)
    assert recipe.stages == ["report"]
    assert recipe.model.overrides == {"text_config": {"hidden_size": 64}}
    assert recipe.studies.options == {"train": 3}
    assert recipe.predictor.learning_rate == 1e-3
    assert recipe.report.save_strategy == "steps"
    assert recipe.predictor.batch_size == 8


def test_pre_training_is_asked_for(write):
    assert load_recipe(write(MINIMAL)).stages == ["predictor", "report"]
    assert load_recipe(write(MINIMAL), ["stages=[ircp,predictor]"]).stages == ["ircp", "predictor"]


def test_a_resolved_recipe_reads_back_as_itself(write):
    recipe = load_recipe(write(MINIMAL), ["model.overrides.ot_epsilon=1e-2", "report.max_steps=5"])
    assert load_recipe(write(recipe.to_yaml())) == recipe
    assert recipe.model.overrides["ot_epsilon"] == 0.01


def test_environment_variables(write, monkeypatch):
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
        (["report.epoch=1"], r"unknown key 'epoch' in report: did you mean 'epochs'\?"),
        (["reprot.epochs=1"], r"unknown key 'reprot' at the top: did you mean 'report'\?"),
        (["report.generation.num_beam=1"], r"unknown key 'num_beam' in report\.generation: did you mean 'num_beams'"),
        (["report.epochs=many"], r"report\.epochs='many': expected a number"),
        (["report.batch_size=2.5"], r"report\.batch_size=2\.5: expected an integer"),
        (["report.bf16=1"], r"report\.bf16=1: expected true or false"),
        (["report.batch_size=true"], r"report\.batch_size=True: expected an integer"),
        (["report.batch_size=0"], r"report\.batch_size=0: expected a positive integer"),
        (["report.text=lorra"], r"report\.text='lorra': expected one of frozen, lora, full"),
        (["report.vision=full"], r"report\.predictor='frozen': expected full where report\.vision is full"),
        (["report.vision=lora"], r"report\.predictor='frozen': expected full where report\.vision is lora"),
        (["predictor.vision=lorra"], r"predictor\.vision='lorra': expected one of frozen, lora, full"),
        (["predictor.logit_adjustment=-1"], r"predictor\.logit_adjustment=-1\.0: expected a number of at least 0"),
        (["predictor.vision_learning_rate=1e-4"], r"vision_learning_rate=0\.0001: expected null while"),
        (["stages=report"], r"stages='report': expected a list of strings"),
        (["stages=[pretraining]"], r"stages='pretraining': expected one of ircp, predictor, report"),
        (["stages=[report, predictor]"], r"in this order: ircp, predictor, report"),
        (["report=3"], r"report=3: expected a section"),
        (["report.max_steps"], r"expected section\.field=value"),
        (["report.max_steps=[1"], r"is not valid YAML"),
        (["studies.limit={dev: 3}"], r"studies\.limit='dev': expected train, validation or test"),
    ],
)
def test_mistakes_are_named_in_one_line(write, overrides, message, capsys):
    path = write(MINIMAL)
    with pytest.raises(ValueError, match=message):
        load_recipe(path, overrides)
    assert main([str(path), *overrides]) == 1
    error = capsys.readouterr().err
    assert error.startswith("train_hf.py: error: ") and error.count("\n") == 1


def test_features_lie_in_the_run_or_where_runs_share_them(write, tmp_path):
    path = write(MINIMAL)
    assert load_recipe(path).features_folder == Path("runs/x/features")
    assert load_recipe(path, [f"feature_cache={tmp_path}"]).features_folder == tmp_path
    with pytest.raises(ValueError, match=r"feature_cache=.*recipe\.yaml': expected a folder, and this is a file"):
        load_recipe(path, [f"feature_cache={path}"])


def test_the_reports_encoder_may_be_trained_beside_a_predictor_with_its_own(write):
    overrides = ["model.overrides.predictor_encoder=own", "report.vision=full"]
    assert load_recipe(write(MINIMAL), overrides).report.predictor == "frozen"


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
def test_broken_files_are_named(write, text, message):
    with pytest.raises(ValueError, match=message):
        load_recipe(write(text))


def test_a_missing_file_is_one_line(tmp_path, capsys):
    assert main([str(tmp_path / "none.yaml")]) == 1
    assert capsys.readouterr().err.endswith("none.yaml does not exist\n")


def test_every_field_says_what_it_is():
    def check(cls):
        for item in dataclasses.fields(cls):
            assert item.metadata.get("help"), f"{cls.__name__}.{item.name}"
            if dataclasses.is_dataclass(item.default_factory):
                check(item.default_factory)

    check(Recipe)


# --- every field -----------------------------------------------------------------------------------------------------


def leaves(cls=Recipe, place=()):
    """Names and types of all fields that are no section."""
    hints = typing.get_type_hints(cls)
    for item in dataclasses.fields(cls):
        if dataclasses.is_dataclass(hints[item.name]):
            yield from leaves(hints[item.name], (*place, item.name))
        else:
            yield ".".join((*place, item.name)), hints[item.name]


FIELDS = dict(leaves())
NUMBERS = [
    name
    for name, kind in FIELDS.items()
    if typing.get_origin(kind) not in (list, dict) and {int, float} & set(typing.get_args(kind) or (kind,))
]
#: Fields in which a number below 0 has a meaning, which their help says.
NEGATIVE = {
    **dict.fromkeys((f"{stage}.max_steps" for stage in ("ircp", "predictor", "report")), "-1 leaves that to epochs"),
    "report.generation.length_penalty": "below 0 it favours short reports",
}


def help_of(name):
    cls = Recipe
    *sections, last = name.split(".")
    for section in sections:
        cls = typing.get_type_hints(cls)[section]
    return next(item.metadata["help"] for item in dataclasses.fields(cls) if item.name == last)


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", [".inf", "-.inf", ".nan", "1" + "0" * 400, "-1" + "0" * 400])
def test_recipe_number_that_is_not_finite_is_refused(write, name, value):
    with pytest.raises(ValueError, match=re.escape(name) + "=.*: expected "):
        load_recipe(write(MINIMAL), [f"{name}={value}"])


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", ["-1", "-7", "-0.5"])
def test_recipe_number_below_0_is_refused_or_documented(write, name, value):
    try:
        load_recipe(write(MINIMAL), [f"{name}={value}"])
    except ValueError as error:
        assert re.search(re.escape(name) + "=.*: expected ", str(error)) and "\n" not in str(error)
    else:
        assert NEGATIVE[name] in help_of(name)
        assert name.startswith("report.generation") or value == "-1"


@pytest.mark.parametrize(("name", "kind"), FIELDS.items(), ids=list(FIELDS))
def test_recipe_value_of_another_type_is_refused(write, name, kind):
    allowed = {*typing.get_args(kind), kind}
    wrong = ["[[1]]", "2020-01-01"]
    wrong += [] if typing.get_origin(kind) is dict else ["{a: [b]}"]
    wrong += [] if str in allowed else ["text"]
    wrong += [] if bool in allowed else ["true"]
    wrong += ["'1'"] if {int, float} & allowed else []
    for value in wrong:
        with pytest.raises(ValueError) as refused:
            load_recipe(write(MINIMAL), [f"{name}={value}"])
        assert name.rpartition(".")[2] in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize("name", [name for name, kind in FIELDS.items() if typing.get_origin(kind) is dict])
@pytest.mark.parametrize("value", [".nan", "[1, .inf]", "{b: -.inf}", "2020-01-01", "{1: 2}"])
def test_recipe_mapping_holds_what_json_can(write, name, value):
    with pytest.raises(ValueError, match=re.escape(name)):
        load_recipe(write(MINIMAL), [f"{name}.train={value}"])


@pytest.mark.parametrize("name", ["output_dir", "feature_cache"])
@pytest.mark.parametrize("value", ['""', '" "', '"a\\0b"'])
def test_recipe_folder_without_a_name_is_refused(write, name, value):
    with pytest.raises(ValueError, match=f"{name}=.*: expected the path of a folder"):
        load_recipe(write(MINIMAL), [f"{name}={value}"])


def test_recipe_byte_order_mark_is_dropped(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(yaml.safe_dump(MINIMAL).encode("utf-8-sig"))
    assert load_recipe(path).output_dir == "runs/x"


def test_help_shows_an_example(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    assert "accelerate launch train_hf.py recipes/phantom_tiny.yaml" in capsys.readouterr().out
