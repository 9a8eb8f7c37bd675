"""`otdrg push` to a Hub on this machine, and loading from it in a process without our package.

The Hub and these processes, whose start takes most of the time, are started once for all tests.
"""

import base64
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import otdrg as package
import pytest
import torch
from otdrg import OTDRGConfig, OTDRGForReportGeneration, OTDRGProcessor, ReportGenerationPipeline
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

FEW = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
SHIPPED = {
    f"{name}_otdrg.py" for name in ("findings", "configuration", "weights", "modeling", "processing", "pipeline")
}

# A process that runs one request a line, so that it is started only once.
LOADER = """
hide("otdrg")
import base64
import importlib.util
import io
import json
import torch
from huggingface_hub import snapshot_download
from PIL import Image
from transformers import AutoModel, AutoProcessor, logging, pipeline

logging.set_verbosity_error()
few, image = json.loads(sys.argv[1]), sys.argv[2]

def generate(model, **where):
    network = AutoModel.from_pretrained(model, trust_remote_code=True, **where)
    processor = AutoProcessor.from_pretrained(model, trust_remote_code=True, **where)
    inputs = processor(images=[[image, image], image])
    return {"ids": network.generate(**inputs, **few).tolist(), "module": type(network).__module__.partition(".")[0]}

def everything(model):
    found = generate(model)
    pipe = pipeline("image-to-text", model=model, trust_remote_code=True)
    found["written"] = pipe([[image, image], image], batch_size=2, **few)
    built_in = pipeline("image-text-to-text", model=model, trust_remote_code=True)
    message = {"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "Describe."}]}
    found["chat"] = built_in(text=[message], generate_kwargs=few, return_full_text=False)[0]["generated_text"]
    return found

def endpoint(model, requests):
    # As an Inference Endpoint does: the handler in the folder of the model.
    folder = snapshot_download(model)
    spec = importlib.util.spec_from_file_location("handler", folder + "/handler.py")
    handler = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(handler)
    handler, found = handler.EndpointHandler(folder), []
    for data in requests:
        if "image" in data:
            data = {**data, "inputs": Image.open(io.BytesIO(base64.b64decode(data.pop("image"))))}
        try:
            found.append(handler(data))
        except ValueError as error:
            found.append(str(error))
    return {"found": found}

def model_only(model, **where):
    network = AutoModel.from_pretrained(model, trust_remote_code=True, **where)
    return {"bias": network.image_projector.linear.bias.double().sum().item()}

def push_on(model, folder):
    network = AutoModel.from_pretrained(model, trust_remote_code=True)
    network.push_to_hub("org/pushed-on")
    network.save_pretrained(folder, push_to_hub=True, repo_id="org/saved-on", private=True)
    return {}

for line in sys.stdin:
    asked = json.loads(line)
    try:
        found = globals()[asked.pop("do")](**asked)
    except Exception as error:
        found = {"error": [kind.__name__ for kind in type(error).__mro__], "message": str(error)}
    print("=>", json.dumps(found), flush=True)
"""

# A process that runs commands; starting one for each would be most of the time.
COMMANDS = """
import contextlib, gc, io, json, sys
gc.disable()
from otdrg.cli import main

for line in sys.stdin:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = main(json.loads(line)["arguments"])
        except SystemExit as exit:
            status = exit.code
    print("=>", json.dumps({"returncode": status, "stdout": out.getvalue(), "stderr": err.getvalue()}), flush=True)
"""


@pytest.fixture(scope="module")
def hub(make_hub_server):
    """A Hub shared by the tests of this module; each uses its own repositories."""
    server = make_hub_server(token="hf_not_to_be_seen")
    yield server
    server.stop()


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """The loaders' caches."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def image(tmp_path_factory, view):
    path = tmp_path_factory.mktemp("views") / "view.png"
    Image.fromarray(view(0)).save(path)
    return str(path)


@pytest.fixture(scope="module")
def converse(hub, tmp_path_factory):
    """Starts a process that answers lines of JSON, and gives a function that asks it."""

    @contextmanager
    def start(script, home, *arguments, **variables):
        folder = tmp_path_factory.mktemp("process")
        (folder / "script.py").write_text(script)
        environment = hub.environment(home, **variables)
        with (folder / "stderr").open("w") as stderr:
            command = [sys.executable, "script.py", *arguments]
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": stderr, "text": True}
            with subprocess.Popen(command, cwd=folder, env=environment, **pipes) as process:

                def ask(**asked):
                    process.stdin.write(json.dumps(asked) + "\n")
                    process.stdin.flush()
                    for line in process.stdout:
                        if line.startswith("=>"):
                            return json.loads(line[2:])
                    raise AssertionError((folder / "stderr").read_text()[-4000:])

                yield ask
                process.stdin.close()

    return start


@pytest.fixture(scope="module")
def start_loader(converse, home, hide, image):
    return lambda **variables: converse(hide + LOADER, home, json.dumps(FEW), image, **variables)


@pytest.fixture(scope="module")
def load(start_loader):
    """Loads from the Hub in a process without our package and, at first, without a cache."""
    with start_loader() as ask:
        yield lambda do, model, **where: ask(do=do, model=model, **where)


@pytest.fixture(scope="module")
def otdrg(converse, tmp_path_factory):
    """Runs commands one after another in one process, and returns what they printed."""
    # The package that is tested, whichever is installed.
    found_in = os.pathsep.join([str(Path(package.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    with converse(COMMANDS, tmp_path_factory.mktemp("pusher"), PYTHONPATH=found_in) as ask:
        yield lambda *arguments: SimpleNamespace(**ask(arguments=[str(argument) for argument in arguments]))


@pytest.fixture(scope="module")
def push(otdrg):
    return lambda *arguments: otdrg("push", *arguments)


@pytest.fixture(scope="module")
def trained(build_backbones, build_on_backbones, tmp_path_factory):
    """A model with adapters, its processor and the run's folder that holds both of its forms. Do not change them."""
    root = tmp_path_factory.mktemp("trained")
    backbones = build_backbones(root / "backbones")
    model, processor = build_on_backbones(backbones)
    for form in ("adapter", "full"):
        folder = root / "run" / {"adapter": "adapter", "full": "model"}[form]
        if form == "full":
            whole = OTDRGForReportGeneration.from_pretrained(root / "run" / "adapter")
            whole.config.vision_backbone = whole.config.text_backbone = None
            whole.merge_lora()
            whole.save_pretrained(folder)
        else:
            model.save_pretrained(folder, weights="adapter")
        processor.save_pretrained(folder)
    return whole.eval(), processor, root


@pytest.fixture(scope="module")
def pushed(push, trained):
    done = push(trained[2] / "run", "org/otdrg", "--private", "--merge")
    assert done.returncode == 0, done.stderr
    return done


def expected_ids(trained, image):
    model, processor, *_ = trained
    return model.generate(**processor(images=[[image, image], image]), **FEW).tolist()


def test_push_uploads_model_code_card_and_licence(hub, pushed, trained):
    repo = hub.repos["models", "org/otdrg"]
    assert repo.private and f"pushed: {hub.url}/org/otdrg\n" in pushed.stdout
    assert "vllm serve language_model --served-model-name otdrg-" in pushed.stdout.splitlines()[-1]
    names = set(repo.files)
    assert names >= SHIPPED | {"README.md", "LICENSE", "metrics.json", "config.json", "generation_config.json"}
    assert names >= {"model.safetensors", "processor_config.json", "tokenizer.json", "chat_template.jinja"}
    assert names >= {"handler.py", "requirements.txt"}
    assert all(not name.endswith((".bin", ".pt", ".pth", ".pkl", ".ckpt", ".h5")) for name in names)
    assert "adapter_config.json" not in names
    everything = pushed.stdout + pushed.stderr + "".join(map(str, repo.files.values()))
    assert hub.token not in everything
    assert not [name for name, content in repo.files.items() if str(trained[2]).encode() in content]
    for name, content in repo.files.items():
        size = re.search(rf"([\d,]+)  {re.escape(name)}\n", pushed.stdout)
        assert size and int(size[1].replace(",", "")) == len(content), name
    card = repo.files["README.md"].decode()
    assert card.startswith("---\n") and "No measured result" in card and "org/otdrg" in card


def test_pushed_model_loads_without_the_package(pushed, load, trained, image):
    found = load("everything", "org/otdrg")
    assert found["module"] == "transformers_modules", found
    ids = expected_ids(trained, image)
    assert found["ids"] == ids
    start = trained[1](images=[[image, image], image])["input_ids"].shape[1]
    reports = trained[1].batch_decode([row[start:] for row in ids], skip_special_tokens=True)
    assert [record["generated_text"] for (record,) in found["written"]] == [report.strip() for report in reports]
    assert len(found["written"][0][0]["findings"]) == 14 and isinstance(found["chat"], str)


def test_pushed_handler_gives_the_pipelines_records(pushed, load, trained, image):
    coded = base64.b64encode(Path(image).read_bytes()).decode()
    few = {"max_new_tokens": 8, "num_beams": 1}
    steered = {"findings": {"edema": "positive"}, **few}
    one, two, edema, *wrong = [
        [{"inputs": coded}, {"inputs": f"data:image/png;base64,{coded}"}, {"image": coded}],
        [{"inputs": [coded] * 2}, {"inputs": {"images": [coded] * 2, "indication": None}}],
        [{"inputs": coded, "parameters": steered}],
        [{"inputs": base64.b64encode(b"The lungs are clear.").decode()}],
        [{"inputs": "radiograph.png"}],
        [{"inputs": coded, "parameters": {"findings": {"edema": "present"}}}],
        [{"inputs": coded, "parameters": {"return_heatmaps": True}}],
        [{"inputs": coded, "parameters": ["max_new_tokens"]}],
        [{"inputs": coded, "parameters": {"indication": "\ud800"}}],
    ]
    requests = [{"parameters": few, **request} for asked in (one, two, edema, *wrong) for request in asked]
    found = load("endpoint", "org/otdrg", requests=requests)["found"]
    pipe = ReportGenerationPipeline(model=trained[0], processor=trained[1])
    expected = [pipe(image, **few)] * 3 + [pipe([[image, image]], **few)[0]] * 2 + [pipe(image, **steered)]
    for records, same in zip(found, expected, strict=False):
        assert [record["generated_text"] for record in records] == [record["generated_text"] for record in same]
        states = [[finding["state"] for finding in given[0]["findings"].values()] for given in (records, same)]
        assert states[0] == states[1]
    for message, line in zip(
        (
            *("data URL: not an image, expected PNG", "data URL: the data URL is not base64", "present"),
            *("return_heatmaps", "parameters is a list: expected an object", "half of a pair of surrogates"),
        ),
        found[6:],
        strict=True,
    ):
        assert isinstance(line, str) and message in line and "\n" not in line


def test_pushed_tiny_preset_loads_without_the_package(push, load, reports, image, tmp_path):
    """Its encoder is timm's, and its weights are all its own."""
    config = OTDRGConfig.from_preset("tiny")
    processor = OTDRGProcessor.from_texts(reports, config=config, vocab_size=400)
    torch.manual_seed(0)
    model = OTDRGForReportGeneration(config).eval()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    done = push(tmp_path, "org/tiny")
    assert done.returncode == 0, done.stderr
    found = load("everything", "org/tiny")
    assert found.get("ids") == expected_ids((model, processor), image), found


def test_pushed_revision_stays_unchanged(hub, push, pushed, load, trained, tmp_path):
    first = hub.repos["models", "org/otdrg"].at("main").id
    other = OTDRGForReportGeneration.from_pretrained(trained[2] / "run" / "model")
    with torch.no_grad():
        other.image_projector.linear.bias.add_(1)
    other.save_pretrained(tmp_path)
    trained[1].save_pretrained(tmp_path)
    done = push(tmp_path, "org/otdrg", "--revision", "second")
    assert done.returncode == 0 and done.stdout.endswith("/org/otdrg/tree/second\n"), done.stderr
    assert hub.repos["models", "org/otdrg"].at("main").id == first
    before, after, pinned = (load("model_only", "org/otdrg", revision=it) for it in ("main", "second", first))
    assert after["bias"] == pytest.approx(before["bias"] + 64, abs=1e-3)
    assert pinned == before
    assert {name for name in hub.repos["models", "org/otdrg"].at("second").tree if "/" in name} == set()


def test_push_to_hub_of_transformers_stores_sha256(hub, pushed, load, tmp_path):
    assert load("push_on", "org/otdrg", folder=str(tmp_path / "saved")) == {}
    for name in ("org/pushed-on", "org/saved-on"):
        files = hub.repos["models", name].files
        sums = json.loads(files["config.json"])["weights_sha256"]
        assert sums == {"model.safetensors": hashlib.sha256(files["model.safetensors"]).hexdigest()}
        assert files.keys() >= SHIPPED
    assert hub.repos["models", "org/saved-on"].private


def test_pushed_model_loads_offline_from_the_cache(pushed, hub, load, start_loader, trained, image):
    load("model_only", "org/otdrg")
    before = len(hub.requests)
    with start_loader(HF_HUB_OFFLINE="1") as load_offline:
        found = load_offline(do="everything", model="org/otdrg")
    assert found.get("ids") == expected_ids(trained, image), found
    assert len(hub.requests) == before


def test_push_merge_llm_writes_the_models_reports(pushed, hub, trained, image, tmp_path):
    """A plain causal LM, given the prompt's embeddings, writes what the model writes."""
    model, processor, _ = trained
    for name, content in hub.repos["models", "org/otdrg"].files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    llm = AutoModelForCausalLM.from_pretrained(tmp_path / "language_model")
    inputs = processor(images=[[image, image], image])
    embeddings, mask = model.get_prompt_embeddings(**inputs)
    with pytest.raises(ValueError, match=r"finding_states has shape \(1, 14\): expected \(2, 14\)"):
        model.get_prompt_embeddings(**inputs, finding_states=torch.zeros(1, 14, dtype=torch.long))
    written = llm.generate(inputs_embeds=embeddings, attention_mask=mask, **FEW)
    assert written.tolist() == [row[inputs["input_ids"].shape[1] :] for row in expected_ids(trained, image)]
    joining = load_file(tmp_path / "projector.safetensors")
    own = model.state_dict()
    assert {"image_projector.linear.weight", "label_projector.linear.weight"} <= joining.keys()
    assert all(torch.equal(own[name], weight) for name, weight in joining.items())


# --- adapters --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def backbones_on_hub(hub, trained):
    for part in ("vision", "text"):
        folder = trained[2] / "backbones" / part
        hub.add_repo("models", f"base/{part}", {path.name: path.read_bytes() for path in folder.iterdir()})
    return "--vision-backbone", "base/vision", "--text-backbone", "base/text"


def test_pushed_adapter_loads_backbones_by_commit(hub, push, load, backbones_on_hub, trained, image, tmp_path):
    done = push(trained[2] / "run", "org/adapter", "--adapter", *backbones_on_hub)
    assert done.returncode == 0, done.stderr
    repo = hub.repos["models", "org/adapter"]
    weights = repo.files["model.safetensors"]
    assert len(weights) < 0.7 * len((trained[2] / "run" / "model" / "model.safetensors").read_bytes())
    assert "base_model_relation: adapter" in repo.files["README.md"].decode()
    found = load("everything", "org/adapter")
    assert found.get("ids") == expected_ids(trained, image), found
    # The backbones' main branch moves on; the adapter was made for what was there.
    base = hub.repos["models", "base/text"]
    first = base.at("main")
    weights = first.tree["model.safetensors"]
    changed = type(weights)(weights.content[:-1] + bytes([weights.content[-1] ^ 1]), lfs=True)
    base.objects[changed.sha256] = changed.content
    base.commit("main", {**first.tree, "model.safetensors": changed}, "other weights")
    again = load("generate", "org/adapter", cache_dir=str(tmp_path / "cache"))
    # Pushed once more, from where it knows its commits.
    (tmp_path / "adapter").mkdir()
    for name, content in repo.files.items():
        (tmp_path / "adapter" / name).write_bytes(content)
    more = push(tmp_path / "adapter", "org/adapter-again", "--adapter")
    base.commit("main", first.tree, "the first weights again")
    assert again.get("ids") == found["ids"], again
    assert more.returncode == 0, more.stderr
    for name in ("org/adapter", "org/adapter-again"):
        config = json.loads(hub.repos["models", name].files["config.json"])
        assert config["backbone_revisions"]["text"] == first.id


def test_push_adapter_backbone_in_another_format_is_refused(push, trained, tmp_path):
    folder = shutil.copytree(trained[2] / "run" / "adapter", tmp_path / "adapter")
    config = json.loads((folder / "config.json").read_text())
    config["backbone_sha256"]["text"] = {"llm.gguf": "0"}
    (folder / "config.json").write_text(json.dumps(config))
    arguments = (folder, "org/x", "--adapter", "--dry-run", "--vision-backbone", "base/vision", "--text-backbone")
    done = push(*arguments, "base/text")
    assert done.returncode == 1 and done.stderr.endswith(
        "an adapter of the text backbone as llm.gguf, not of base/text: expected --text-backbone ORG/NAME/llm.gguf\n"
    )
    done = push(*arguments, "base/text/llm.gguf")
    assert done.returncode == 0, done.stderr


def test_push_adapter_uploads_only_the_models_files(hub, push, backbones_on_hub, trained, tmp_path):
    """An adapter's folder may hold other files, such as the reports that `otdrg evaluate` writes there."""
    folder = shutil.copytree(trained[2] / "run" / "adapter", tmp_path / "adapter")
    (folder / "notes").mkdir()
    for name in ("notes/predictions.csv", "training_args.bin", "adapter_config.json"):
        (folder / name).write_text("of a patient")
    done = push(folder, "org/bare", "--adapter", *backbones_on_hub)
    assert done.returncode == 0, done.stderr
    files = hub.repos["models", "org/bare"].files
    written = {path.name for path in (trained[2] / "run" / "adapter").iterdir()}
    described = {"README.md", "LICENSE", "metrics.json", "handler.py", "requirements.txt"}
    assert files.keys() == written | SHIPPED | described
    assert not [name for name, content in files.items() if b"of a patient" in content]
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (folder / "model.safetensors").write_bytes(weights)
    done = push(folder, "org/damaged", "--adapter", *backbones_on_hub)
    assert done.returncode == 1 and "model.safetensors is damaged" in done.stderr.splitlines()[-1]
    assert ("models", "org/damaged") not in hub.repos


def test_push_adapter_as_full_model_names_no_folder(push, trained, tmp_path):
    done = push(trained[2] / "run" / "adapter", "org/whole", "--dry-run", "--output", tmp_path / "kept")
    assert done.returncode == 0, done.stderr
    config = json.loads((tmp_path / "kept" / "config.json").read_text())
    assert not [name for name in ("vision_backbone", "text_backbone", "backbone_sha256", "lora") if config.get(name)]
    named = [path for path in (tmp_path / "kept").iterdir() if str(trained[2]).encode() in path.read_bytes()]
    assert not named


def test_push_adapter_of_backbone_not_on_the_hub_is_refused(
    hub, push, backbones_on_hub, build_backbones, tmp_path, trained
):
    done = push(trained[2] / "run", "org/lost", "--adapter")
    assert done.returncode == 1 and re.fullmatch(
        r"otdrg push: error: .*adapter is an adapter of the vision backbone .*vision, which is not on the Hub: "
        r"--vision-backbone ORG/NAME names a repository with the same weights\n",
        done.stderr.splitlines(keepends=True)[-1],
    )
    build_backbones(tmp_path, seed=5)
    files = {path.name: path.read_bytes() for path in (tmp_path / "text").iterdir()}
    hub.add_repo("models", "base/other", files)
    done = push(trained[2] / "run", "org/lost", "--adapter", *backbones_on_hub[:3], "base/other")
    assert (
        done.returncode == 1 and "base/other does not hold the text backbone that this is an adapter of" in done.stderr
    )
    done = push(trained[2] / "run", "org/lost", "--adapter", *backbones_on_hub[:3], "base/nothing")
    assert done.returncode == 1 and "the text backbone base/nothing was not found on http" in done.stderr
    assert "Traceback" not in done.stderr and ("models", "org/lost") not in hub.repos


# --- what goes wrong -------------------------------------------------------------------------------------------------


def test_push_dry_run_sends_no_request(hub, push, trained, tmp_path):
    before = len(hub.requests)
    arguments = ("--dry-run", "--output", tmp_path / "kept", "--space", "org/dry-demo", "--dtype", "bfloat16")
    done = push(trained[2] / "run", "org/dry", *arguments)
    assert done.returncode == 0 and done.stdout.endswith("nothing was pushed (--dry-run)\n"), done.stderr
    assert len(hub.requests) == before and ("models", "org/dry") not in hub.repos
    assert {path.name for path in (tmp_path / "kept").iterdir()} >= SHIPPED | {"README.md", "model.safetensors"}
    assert "  app.py\n" in done.stdout and "  otdrg/modeling_otdrg.py\n" in done.stdout
    weights = load_file(tmp_path / "kept" / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
    assert OTDRGForReportGeneration.from_pretrained(tmp_path / "kept").dtype == torch.bfloat16


def test_push_space_follows_the_model(hub, push, trained):
    done = push(trained[2] / "run" / "model", "org/shown", "--private", "--space", "org/shown-demo")
    assert (
        done.returncode == 0
        and "/spaces/org/shown-demo\nto read org/shown, the Space needs a secret HF_TOKEN" in done.stdout
    ), done.stderr
    assert hub.repos["spaces", "org/shown-demo"].private
    files = hub.repos["spaces", "org/shown-demo"].files
    assert {"app.py", "requirements.txt", "README.md", "otdrg/modeling_otdrg.py"} <= set(files)
    assert b"org/shown" in files["app.py"]


def test_push_interrupted_upload_is_continued(hub, push, trained):
    # The client itself tries a request a few times.
    hub.disturb("PUT", "/storage/models/org/broken/", times=50, status=500, Retry_After="0")
    done = push(trained[2] / "run", "org/broken", "--merge")
    hub.calm()
    assert done.returncode == 1 and "org/broken was not pushed to http" in done.stderr.splitlines()[-1]
    assert done.stderr.endswith("push it again to continue with the missing files\n")
    assert "Traceback" not in done.stderr and set(hub.repos["models", "org/broken"].files) <= {".gitattributes"}
    # One of the large files arrives, then the line breaks again.
    hub.disturb("PUT", "/storage/models/org/broken/", times=1)
    hub.disturb("PUT", "/storage/models/org/broken/", times=50, status=500, Retry_After="0")
    push(trained[2] / "run", "org/broken", "--merge")
    hub.calm()
    arrived = len(hub.repos["models", "org/broken"].objects)
    before = len(hub.requests)
    done = push(trained[2] / "run", "org/broken", "--merge")
    assert done.returncode == 0, done.stderr
    sent = [it for it in hub.requests[before:] if it.method == "PUT" and it.status == 200]
    assert arrived >= 1 and len(sent) + arrived == len(hub.repos["models", "org/broken"].objects)


def test_push_wrong_input_is_one_line(hub, push, trained, tmp_path):
    hub.add_repo("models", "org/public")
    for arguments, message in (
        ((trained[2] / "run", "org/public", "--private"), "org/public is public: leave out --private"),
        ((tmp_path / "nothing", "org/x"), "nothing is not a folder: expected the folder of a run or a model"),
        ((tmp_path, "org/x"), "no config.json here or in its folder 'model', expected a trained run or a model"),
        ((trained[2] / "run", "not a name"), "not a name"),
        ((trained[2] / "run", "x"), "x has no owner: expected ORG/NAME"),
        ((trained[2] / "run", "org/x", "--space", "org/y", "--revision", "v2"), "--space shows the branch main"),
        ((trained[2] / "run", "org/x", "--adapter", "--dtype", "bfloat16"), "--dtype with --adapter"),
        ((trained[2] / "run" / "model", "org/x", "--adapter"), "no adapter here or in its folder 'adapter'"),
    ):
        done = push(*arguments)
        assert done.returncode == 1 and message in done.stderr.splitlines()[-1], done.stderr
        assert done.stderr.splitlines()[-1].startswith("otdrg push: error: ") and "Traceback" not in done.stderr
    assert ("models", "org/x") not in hub.repos


def fresh(load, tmp_path, model="org/otdrg", **where):
    return load("model_only", model, cache_dir=str(tmp_path / "cache"), **where)


@pytest.mark.parametrize(
    ("disturbance", "message"),
    [
        (("GET", "^/storage/", {"status": 500, "times": 50, "Retry_After": "0"}), "500"),
        (("GET", "^/storage/", {"content": b"short"}), "Consistency check failed"),
    ],
    ids=["500", "size"],
)
def test_pushed_model_download_error_reaches_the_user(hub, pushed, load, tmp_path, disturbance, message):
    method, pattern, how = disturbance
    hub.disturb(method, pattern, **how)
    found = fresh(load, tmp_path)
    hub.calm()
    assert "OSError" in found["error"] and message in found["message"], found
    assert "bias" in fresh(load, tmp_path)


def test_pushed_model_interrupted_download_is_continued(hub, pushed, load, tmp_path):
    hub.disturb("GET", "^/storage/", cut=1000)
    assert "bias" in fresh(load, tmp_path)


def test_pushed_model_damaged_weights_are_refused(hub, pushed, load, tmp_path):
    """The client compares only sizes; `config.json` stores the SHA-256."""
    weights = bytearray(hub.repos["models", "org/otdrg"].files["model.safetensors"])
    weights[-1] ^= 1
    hub.disturb("GET", "^/storage/", content=bytes(weights))
    found = fresh(load, tmp_path)
    hub.calm()
    assert "OSError" in found["error"], found
    message = re.search(r"model\.safetensors is damaged, .* delete (\S+) and load it anew", found["message"])
    assert "damaged" in fresh(load, tmp_path)["message"]
    Path(message[1]).unlink()
    assert "bias" in fresh(load, tmp_path)


def test_pushed_model_missing_or_gated_is_named(hub, pushed, load, tmp_path):
    gated = hub.add_repo("models", "org/gated", {"config.json": b"{}"})
    gated.gated = True
    whole = hub.repos["models", "org/otdrg"].files
    for name in ("config.json", "model.safetensors"):
        hub.add_repo("models", f"org/without-{name}", {path: it for path, it in whole.items() if path != name})
    for model, where, message in (
        ("org/otdrg", {"revision": "never"}, "never"),
        ("org/nowhere", {}, "org/nowhere"),
        ("org/gated", {}, "gated"),
        ("org/without-config.json", {}, "config.json"),
        ("org/without-model.safetensors", {}, "model.safetensors"),
    ):
        found = fresh(load, tmp_path, model, **where)
        assert {"OSError", "ValueError"} & set(found["error"]) and message in found["message"], found


def test_generate_hub_error_states_the_answer(hub, pushed, image, otdrg):
    """transformers reports "could not connect" although the Hub answered."""
    hub.disturb("HEAD", "/org/otdrg/resolve/", times=50, status=500, Retry_After="0")
    done = otdrg("generate", "org/otdrg", "--study", image)
    hub.calm()
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 1 and last.startswith("otdrg generate: error: org/otdrg: "), done.stderr
    assert last.endswith("(the Hub answered 500)") and "Traceback" not in done.stderr
