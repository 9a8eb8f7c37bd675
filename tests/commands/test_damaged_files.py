"""Damaged files of models, runs, datasets and recipes: each command ends with one line that names the file."""

import json
import shutil

import pytest
from otdrg.cli import main
from otdrg.studies import prepare_studies
from otdrg.train_hf import main as train
from PIL import Image

DAMAGES = {
    "empty": lambda data: b"",
    "truncated": lambda data: data[: len(data) // 2],
    "binary": lambda data: bytes(range(256)),
    "not UTF-8": lambda data: data[:1] + b"\xff" + data[1:],
    "NUL": lambda data: data[:1] + b"\0" + data[1:],
    "null": lambda data: b"null",
    "a list": lambda data: b"[1, 2]",
    "a string": lambda data: b'"text"',
    "a number": lambda data: b"1",
    "deep": lambda data: b"[" * 100_000,
    "deep and closed": lambda data: b'{"a":' * 400 + b"1" + b"}" * 400,
}
YAML_DAMAGES = {
    **DAMAGES,
    "billion laughs": lambda data: (
        b"a0: &a0 [x, x]\n"
        + b"".join(
            b"a%d: &a%d [%s]\n" % (level, level, b", ".join([b"*a%d" % (level - 1)] * 10)) for level in range(1, 30)
        )
    ),
    "an alias within itself": lambda data: b"a: &a [*a]\n",
    "tabs": lambda data: b"a:\n\tb: 1\n",
    "a key twice": lambda data: data + b"\n" + data,
    "a date that is none": lambda data: b"a: 2001-99-99\n",
    "an object": lambda data: b"a: !!python/object/apply:os.system [true]\n",
    "large": lambda data: b"a: " + b"x" * 3_000_000,
}
#: The others are tried by `make test-slow`.
QUICK = ("null", "billion laughs")


def kinds(damages, quick=QUICK):
    return [how if how in quick else pytest.param(how, marks=pytest.mark.slow) for how in damages]


MODEL_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "processor_config.json",
    "chat_template.jinja",
)
RUN_FILES = ("run.json", "results.json")


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory):
    """A folder of `otdrg prepare`."""
    folder = tmp_path_factory.mktemp("phantoms") / "built"
    prepare_studies("phantom", folder, train=4, validation=4, test=150, image_size=112, views=["frontal"])
    return folder


@pytest.fixture(scope="module")
def image(tmp_path_factory, view):
    path = tmp_path_factory.mktemp("views") / "view.png"
    Image.fromarray(view(0)).save(path)
    return path


@pytest.fixture
def run(trained_run, tmp_path):
    """A copy of a run without its checkpoints."""
    return shutil.copytree(trained_run, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoint-*", "predictor"))


@pytest.fixture
def dataset(phantoms, tmp_path):
    return shutil.copytree(phantoms, tmp_path / "dataset")


def commands(run, phantoms, image):
    """Each command that reads a model, ready to be run."""
    return {
        "generate": ["generate", run, "--study", image, "--max-new-tokens", "4"],
        "evaluate": ["evaluate", run, phantoms, "--split", "validation", "--limit", "2"],
        "localise": ["localise", run, "--output", run / "localised", "--studies", "2"],
        "embed": ["embed", run, phantoms, "--output", run / "embedded"],
        "push": ["push", run, "org/name", "--dry-run"],
        "demo": ["demo", run, "--port", "59999"],
    }


def ends_with_a_line(capsys, arguments, path, program=main):
    """Whether a command ends with status 1 and one line that names a file."""
    capsys.readouterr()
    assert program([str(argument) for argument in arguments]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert str(path) in lines[0] and "error: " in lines[0], lines[0]
    assert len(lines[0]) < 2000
    return True


def damage(path, how):
    path.write_bytes(how(path.read_bytes()))


@pytest.mark.parametrize("how", kinds(DAMAGES))
@pytest.mark.parametrize("name", MODEL_FILES)
def test_generate_damaged_model_file_is_named(run, phantoms, image, capsys, name, how):
    damage(run / "model" / name, DAMAGES[how])
    assert ends_with_a_line(capsys, commands(run, phantoms, image)["generate"], run / "model" / name)


@pytest.mark.parametrize(
    ("command", "name"),
    [
        pytest.param(command, name, marks=() if number == place % 5 else pytest.mark.slow)
        for number, command in enumerate(["evaluate", "localise", "embed", "push", "demo"])
        for place, name in enumerate(MODEL_FILES)
    ],
)
def test_command_damaged_model_file_is_named(run, phantoms, image, capsys, name, command):
    damage(run / "model" / name, DAMAGES["truncated"])
    assert ends_with_a_line(capsys, commands(run, phantoms, image)[command], run / "model" / name)


@pytest.mark.parametrize("how", kinds(DAMAGES))
@pytest.mark.parametrize("name", RUN_FILES)
def test_push_damaged_run_file_is_named(run, capsys, name, how):
    damage(run / name, DAMAGES[how])
    assert ends_with_a_line(capsys, ["push", run, "org/name", "--dry-run"], run / name)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("run.json", {"sittings": None}),
        ("run.json", {"sittings": [None]}),
        ("run.json", {"sittings": [{"studies": 5, "data": {"train": {"positives": 1}}}]}),
        ("results.json", {"report": None}),
        ("results.json", {"report": {"evaluation": {"rows": 5}}}),
        ("results.json", {"report": {"evaluation": 5}}),
    ],
)
def test_push_wrong_content_of_run_file_is_named(run, capsys, name, content):
    (run / name).write_text(json.dumps(content))
    assert ends_with_a_line(capsys, ["push", run, "org/name", "--dry-run"], run / name)


@pytest.mark.parametrize("how", kinds(YAML_DAMAGES))
def test_damaged_recipe_is_named(tiny_recipe, run, phantoms, tmp_path, image, capsys, how):
    recipe = shutil.copy(tiny_recipe, tmp_path / "recipe.yaml")
    damage(recipe, YAML_DAMAGES[how])
    shutil.copy(recipe, run / "recipe.yaml")
    assert ends_with_a_line(capsys, [recipe, f"output_dir={tmp_path / 'out'}"], recipe, train)
    assert ends_with_a_line(capsys, ["ablate", recipe, "--output", tmp_path / "out"], recipe)
    for command in ("evaluate", "localise", "push"):
        arguments = commands(run, phantoms, image)[command]
        arguments = [argument for argument in arguments if argument != phantoms]
        assert ends_with_a_line(capsys, arguments, run / "recipe.yaml"), command
    listed = ["generate", run, "--studies", phantoms, "--split", "test"]
    assert ends_with_a_line(capsys, listed, run / "recipe.yaml")


@pytest.mark.parametrize("how", kinds(DAMAGES))
@pytest.mark.parametrize("name", ["test/state.json", "test/dataset_info.json", "dataset_dict.json", "summary.json"])
def test_damaged_dataset_file_is_named(run, dataset, capsys, name, how):
    damage(dataset / name, DAMAGES[how])
    if name == "summary.json":
        assert ends_with_a_line(capsys, ["label", dataset, "--relabel", "--overwrite"], dataset / name)
        return
    assert ends_with_a_line(capsys, ["generate", run, "--studies", dataset, "--split", "test"], dataset / name)
    assert ends_with_a_line(capsys, ["embed", run, dataset, "--output", run / "embedded"], dataset / name)


@pytest.mark.parametrize("how", kinds(["truncated", "null", "binary", "deep"]))
@pytest.mark.parametrize("name", ["run.json", "results.json", "report/started.json", "predictor/finished.json"])
def test_training_damaged_run_file_is_named(tiny_recipe, trained_run, tmp_path, capsys, name, how):
    run = shutil.copytree(trained_run, tmp_path / "run")
    (run / "report" / "finished.json").unlink()
    damage(run / name, DAMAGES[how])
    assert ends_with_a_line(capsys, [tiny_recipe, f"output_dir={run}", "--resume"], run / name, train)


@pytest.mark.parametrize("name", kinds(MODEL_FILES, ["tokenizer.json"]))
def test_training_damaged_stage_is_named(tiny_recipe, trained_run, tmp_path, capsys, name):
    run = shutil.copytree(trained_run, tmp_path / "run")
    shutil.rmtree(run / "report")
    damage(run / "predictor" / name, DAMAGES["truncated"])
    arguments = [tiny_recipe, f"output_dir={run}", "stages=[report]"]
    assert ends_with_a_line(capsys, arguments, run / "predictor" / name, train)


@pytest.mark.parametrize("how", kinds(DAMAGES))
def test_training_damaged_checkpoint_is_not_resumed_from(tiny_recipe, trained_run, tmp_path, capsys, how):
    run = shutil.copytree(trained_run, tmp_path / "run")
    (run / "report" / "finished.json").unlink()
    for checkpoint in run.glob("report/checkpoint-*"):
        damage(checkpoint / "trainer_state.json", DAMAGES[how])
    from otdrg.training.resumption import last_checkpoint

    assert last_checkpoint(run / "report") is None


@pytest.mark.parametrize("how", kinds(YAML_DAMAGES))
@pytest.mark.parametrize("name", ["findings.yaml", "cues.yaml"])
def test_damaged_vocabulary_is_named(tmp_path, capsys, name, how):
    from otdrg.labelers.phrases import VOCABULARY

    folder = shutil.copytree(VOCABULARY, tmp_path / "vocabulary")
    damage(folder / name, YAML_DAMAGES[how])
    (tmp_path / "reports.csv").write_text("id,report\na,clear lungs\n")
    option = ["--option", f"vocabulary={folder}"]
    label = ["label", "--reports", tmp_path / "reports.csv", "--output", tmp_path / "states.csv", *option]
    assert ends_with_a_line(capsys, label, folder / name)
    score = ["score", "--predictions", tmp_path / "reports.csv", "--references", tmp_path / "reports.csv", *option]
    assert ends_with_a_line(capsys, [*score, "--output", tmp_path / "scores.json"], folder / name)


@pytest.mark.parametrize("how", kinds(YAML_DAMAGES))
def test_damaged_prompt_is_named(tmp_path, capsys, how):
    from otdrg.labelers.llm_prompt import PROMPT

    prompt = shutil.copy(PROMPT, tmp_path / "prompt.yaml")
    damage(prompt, YAML_DAMAGES[how])
    (tmp_path / "reports.csv").write_text("id,report\na,clear lungs\n")
    options = ["--labeler", "llm", "--option", "model=none", "--option", f"prompt={prompt}"]
    label = ["label", "--reports", tmp_path / "reports.csv", "--output", tmp_path / "states.csv", *options]
    assert ends_with_a_line(capsys, label, prompt)


@pytest.mark.parametrize("how", kinds(DAMAGES))
def test_damaged_annotation_is_named(tmp_path, capsys, how):
    path = tmp_path / "annotation.json"
    path.write_text('{"train": [{"id": "a", "report": "clear", "image_path": ["a.png"]}]}')
    damage(path, DAMAGES[how])
    arguments = ["prepare", "r2gen", "--annotation", path, "--images", tmp_path, "--output", tmp_path / "out"]
    assert ends_with_a_line(capsys, arguments, path)


@pytest.mark.parametrize("how", kinds(DAMAGES))
def test_damaged_settings_of_reports_are_named(run, image, tmp_path, capsys, how):
    output = tmp_path / "reports.jsonl"
    arguments = ["generate", run, "--study", image, "--max-new-tokens", "4", "--num-beams", "1", "--output", output]
    assert main([str(argument) for argument in arguments]) == 0
    damage(tmp_path / "reports.settings.json", DAMAGES[how])
    assert ends_with_a_line(capsys, [*arguments, "--resume"], tmp_path / "reports.settings.json")


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        pytest.param("config.json", ("text_config", "num_hidden_layers"), 900, marks=pytest.mark.slow),
        ("config.json", ("text_config", "num_hidden_layers"), 10**9),
        ("config.json", ("text_config", "hidden_size"), 10**9),
        ("config.json", ("text_config", "hidden_size"), "wide"),
        ("config.json", ("vision_config", "architecture"), "none"),
        ("config.json", ("vision_config", "model_args", "img_size"), 10**6),
        ("config.json", ("image_tokens",), 10**9),
        ("config.json", ("finding_text_token_ids",), [[[1]] * 4] * 10**4),
        ("processor_config.json", ("image_tokens",), 10**9),
        ("processor_config.json", ("image_tokens",), 16),
        ("processor_config.json", ("image_processor", "size"), {"height": 10**9, "width": 10**9}),
        ("processor_config.json", ("image_processor", "image_std"), [0, 0, 0]),
        ("processor_config.json", ("image_processor",), 5),
        ("tokenizer.json", ("model",), {}),
        ("tokenizer_config.json", ("eos_token",), 5),
        ("generation_config.json", ("max_new_tokens",), "many"),
        ("generation_config.json", ("max_new_tokens",), 10**12),
        ("generation_config.json", ("num_beams",), 10**9),
        ("generation_config.json", ("eos_token_id",), [None]),
    ],
)
def test_generate_wrong_content_of_model_file_is_named(run, image, capsys, name, field, value):
    content = json.loads((run / "model" / name).read_text())
    section = content
    for key in field[:-1]:
        section = section[key]
    section[field[-1]] = value
    (run / "model" / name).write_text(json.dumps(content))
    assert ends_with_a_line(capsys, ["generate", run, "--study", image], run / "model" / name)


@pytest.mark.parametrize(
    "template", ["{% for i in range(10**9) %}{% endfor %}", "{{ 'a' * 10**10 }}", "no image", "{{"]
)
def test_generate_wrong_template_is_named(run, image, capsys, template):
    (run / "model" / "chat_template.jinja").write_text(template)
    assert ends_with_a_line(capsys, ["generate", run, "--study", image], run / "model" / "chat_template.jinja")


def test_commands_control_characters_are_escaped(run, tmp_path, capsys):
    name = "\x1b[31mred\x07\u202e.png"
    view = tmp_path / name
    Image.new("L", (64, 64)).save(view)
    (tmp_path / "list.jsonl").write_text(json.dumps({"id": "\x1b]0;title\x07", "images": str(view)}))
    (tmp_path / "reports.csv").write_text("id,report\n\x1b[31ma,\n", encoding="utf-8")
    shown = []
    for arguments in (
        ["generate", run, "--study", tmp_path / "\x1b[2Jnone.png"],
        ["generate", run, "--studies", tmp_path / "list.jsonl", "--max-new-tokens", "2"],
        ["generate", run, "--studies", tmp_path / "list.jsonl", "--max-new-tokens", "2", "--json"],
        ["label", "--reports", tmp_path / "reports.csv", "--output", tmp_path / "\x1bstates.csv"],
        ["score", "--predictions", tmp_path / "\x1bnone.csv", "--output", tmp_path / "scores.json"],
    ):
        main([str(argument) for argument in arguments])
        shown += capsys.readouterr()
    assert not any(character in text for text in shown for character in "\x1b\x07\u202e"), shown
    assert "u001b" in "".join(shown)
