"""The saved folder on its own: `otdrg` not importable, an empty cache, another working directory."""

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from otdrg.bank_otdrg import ReportBank, probe_features
from otdrg.pipeline_otdrg import ReportGenerationPipeline
from PIL import Image
from transformers import ProcessorMixin

LORA = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "target_modules": ["q_proj", "v_proj"]}
FEW = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}

EVERY_DOOR = """
hide("otdrg", "scipy", "pycocoevalcap")
import json, os
import torch
from transformers import (
    AutoConfig, AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoProcessor, pipeline, logging
)

logging.set_verbosity_error()
folder, second, own, image, few = *sys.argv[1:5], json.loads(sys.argv[5])
trust = {"trust_remote_code": True}

def doors(folder):
    found = {}
    config = AutoConfig.from_pretrained(folder, **trust)
    model = AutoModel.from_pretrained(folder, **trust)
    other = AutoModelForImageTextToText.from_pretrained(folder, **trust)
    processor = AutoProcessor.from_pretrained(folder, **trust)
    found["types"] = [type(x).__name__ for x in (config, model, other, processor)]
    found["modules"] = [type(x).__module__.partition(".")[0] for x in (config, model, other, processor)]
    inputs = processor(images=[[image, image], image])
    found["logits"] = model(**inputs).logits.double().sum().item()
    found["ids"] = model.generate(**inputs, **few).tolist()
    found["same"] = found["ids"] == other.generate(**inputs, **few).tolist()
    multimodal = AutoModelForMultimodalLM.from_pretrained(folder, **trust)
    found["multimodal"] = found["ids"] == multimodal.generate(**inputs, **few).tolist()

    pipe = pipeline("image-to-text", model=folder, **trust)
    found["image-to-text"] = pipe([[image, image], image], batch_size=2, **few)
    try:
        pipe(image, return_contradictions=True, **few)
        found["no package"] = "not refused"
    except ImportError as error:
        found["no package"] = str(error)
    asked = {"bank": os.path.join(os.path.dirname(image), "bank"), "max_new_tokens": 8}
    found["consensus"] = pipe(image, candidates=4, return_candidates=9, **asked)[0]
    try:
        pipe(image, consensus={"agreement_weight": 0.1}, **asked)
        found["no agreement"] = "not refused"
    except ImportError as error:
        found["no agreement"] = str(error)
    found["shape"] = list(pipe(image, return_heatmaps=True, **few)[0]["heatmaps"]["edema"].shape)

    built_in = pipeline("image-text-to-text", model=folder, **trust)
    message = {"role": "user", "content": [
        {"type": "image", "image": image}, {"type": "text", "text": "Describe it."}
    ]}
    chat = built_in(text=[message], generate_kwargs=few, return_full_text=False)
    found["chat"] = chat[0]["generated_text"]
    chats = built_in(text=[[message], [message]], generate_kwargs=few, return_full_text=False)
    found["chats"] = [answer[0]["generated_text"] for answer in chats]
    texts = built_in(images=image, text="<image> Describe it.", generate_kwargs=few, return_full_text=False)
    found["texts"] = texts[0]["generated_text"]
    try:
        built_in(text="Describe it.", generate_kwargs=few)
        found["no image"] = "not refused"
    except ValueError as error:
        found["no image"] = str(error)
    return found, model, processor

def own_encoder(folder):
    model = AutoModel.from_pretrained(folder, **trust)
    output = model(**AutoProcessor.from_pretrained(folder, **trust)(images=[image]))
    return {
        "finding_logits": output.finding_logits.flatten().tolist(),
        "logits": output.logits.double().sum().item(),
        "written": pipeline("image-to-text", model=folder, **trust)(image, **few)[0]["generated_text"],
    }

first, model, processor = doors(folder)
model.save_pretrained(second)
processor.save_pretrained(second)
again, _, _ = doors(second)
print(json.dumps([first, again, own_encoder(own)]))
"""

WITHOUT_PEFT = """
hide("otdrg", "peft")
import json
from transformers import AutoModel, pipeline, logging

logging.set_verbosity_error()
merged, adapted, image, few = sys.argv[1], sys.argv[2], sys.argv[3], json.loads(sys.argv[4])
pipe = pipeline("image-to-text", model=merged, trust_remote_code=True)
found = {"written": pipe(image, **few)[0]["generated_text"]}
try:
    AutoModel.from_pretrained(adapted, trust_remote_code=True)
    found["adapted"] = "loaded"
except ImportError as error:
    found["adapted"] = str(error)
print(json.dumps(found))
"""

PACKAGE_OBJECTS = """
import json, sys
from dataclasses import asdict
from transformers import pipeline, logging
from otdrg.bank_otdrg import ReportBank
from otdrg.consensus_otdrg import ConsensusDecoder, ConsensusSettings, SampleGroup

logging.set_verbosity_error()
folder, stored, image = sys.argv[1:4]
pipe = pipeline("image-to-text", model=folder, trust_remote_code=True)
assert type(pipe).__module__.startswith("transformers_modules")
bank, plan = ReportBank.load(stored), [SampleGroup("all"), SampleGroup("others")]
settings = {"agreement_weight": 0.0}
more = {"return_candidates": 9, "max_new_tokens": 8}
print(json.dumps([
    pipe(image, candidates=4, bank=stored, consensus={**settings, "plan": list(map(asdict, plan))}, **more),
    pipe(image, candidates=4, bank=bank, consensus={**settings, "plan": plan}, **more),
    pipe(image, consensus=ConsensusDecoder(ConsensusSettings(candidates=4, plan=plan, **settings), bank), **more),
]))
"""

TRAINING = """
hide("otdrg")
import json, os, signal
import torch
from transformers import AutoModel, AutoProcessor, Trainer, TrainerCallback, TrainingArguments, logging, set_seed

logging.set_verbosity_error()
folder, out, images, killed_at = sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), int(sys.argv[4])

def collate(rows):
    reports, states = [row["report"] for row in rows], [row["states"] for row in rows]
    return processor(images=[row["images"] for row in rows], report=reports, finding_states=states)

class Kill(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step == killed_at:
            os.kill(os.getpid(), signal.SIGKILL)

processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
rows = [
    {"images": [image], "report": f"The lungs are clear {n}.", "states": [n % 4] * 13 + [n % 2]}
    for n, image in enumerate(images)
]

def train(name, resume, callbacks):
    set_seed(0)
    model = AutoModel.from_pretrained(folder, trust_remote_code=True)
    trained = ("lora_", "image_projector", "label_projector")
    for weight_name, weight in model.named_parameters():
        weight.requires_grad_(any(part in weight_name for part in trained))
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    arguments = TrainingArguments(
        os.path.join(out, name), max_steps=5, per_device_train_batch_size=2, learning_rate=0.01, logging_steps=1,
        save_strategy="steps", save_steps=2, use_cpu=True, report_to="none", remove_unused_columns=False,
        disable_tqdm=True,
    )
    def collate_expanded(rows):
        return model.expand_finding_text(**collate(rows))

    trainer = Trainer(model, arguments, data_collator=collate_expanded, train_dataset=rows, callbacks=callbacks)
    trainer.train(resume_from_checkpoint=resume)
    changed = {name for name, weight in model.named_parameters() if not torch.equal(weight, before[name])}
    assert changed == {name for name in before if any(part in name for part in trained)}, changed
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]

if killed_at >= 0:
    with open(os.path.join(out, "unbroken.json"), "w") as file:
        json.dump(train("unbroken", None, []), file)
    train("killed", None, [Kill()])
print(json.dumps(train("killed", True, [])))
"""


@pytest.fixture
def image(views, tmp_path):
    Image.fromarray(views[0]).save(tmp_path / "view.png")
    return str(tmp_path / "view.png")


@pytest.fixture
def run(hide, tmp_path):
    """Runs a script in a folder of its own with an empty cache; the JSON it prints last, None if it is killed."""

    def run(script, *arguments, killed=False):
        elsewhere, cache = tmp_path / "elsewhere", tmp_path / "cache"
        elsewhere.mkdir(exist_ok=True), cache.mkdir(exist_ok=True)
        (elsewhere / "script.py").write_text(hide + script)
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "PYTHON"))}
        environment |= {"HF_HOME": str(cache), "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(
            [sys.executable, "script.py", *map(str, arguments), json.dumps(FEW)],
            cwd=elsewhere,
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == (-signal.SIGKILL if killed else 0), done.stderr[-4000:]
        return None if killed else json.loads(done.stdout.splitlines()[-1])

    return run


def lora_model(build_model, **fields):
    model, processor = build_model(lora=LORA, **fields)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model, processor


@pytest.fixture
def own_encoder(build_model, image, tmp_path):
    """Folder of a model whose predictor has its own encoder, with adapters; and what it computes for the image."""
    vision_lora = {**LORA, "target_modules": ["qkv"]}
    model, processor = lora_model(build_model, predictor_encoder="own", vision_lora=vision_lora)
    model.save_pretrained(tmp_path / "own")
    processor.save_pretrained(tmp_path / "own")
    inputs = processor(images=[image])
    with torch.no_grad():
        output = model(**inputs)
    written = model.generate(**inputs, **FEW)[0, inputs["input_ids"].shape[1] :]
    return tmp_path / "own", output, processor.decode(written, skip_special_tokens=True).strip()


def test_saved_folder_opens_by_every_door_and_again_after_saving(build_model, image, own_encoder, run, tmp_path):
    model, processor = lora_model(build_model)
    first, second = tmp_path / "first", tmp_path / "second"
    model.save_pretrained(first)
    processor.save_pretrained(first)
    inputs = processor(images=[[image, image], image])
    with torch.no_grad():
        logits = model(**inputs).logits.double().sum().item()
    ids = model.generate(**inputs, **FEW)

    features = np.random.default_rng(0).normal(size=(2, 32))
    bank = ReportBank(["The lungs are clear.", "Edema."], features, probe=probe_features(model, processor))
    bank.save(tmp_path / "bank")
    pipe = ReportGenerationPipeline(model=model, processor=processor)
    asked = {"bank": bank, "candidates": 4, "return_candidates": 9, "max_new_tokens": 8}
    chosen = pipe(image, consensus={"agreement_weight": 0.0}, **asked)[0]

    folder, output, written = own_encoder
    once, again, own = run(EVERY_DOOR, first, second, folder, image)
    assert own["finding_logits"] == pytest.approx(output.finding_logits.flatten().tolist(), abs=1e-5)
    assert own["logits"] == pytest.approx(output.logits.double().sum().item(), abs=1e-3)
    assert own["written"] == written
    assert once["types"] == ["OTDRGConfig", *["OTDRGForReportGeneration"] * 2, "OTDRGProcessor"]
    assert set(once["modules"]) == {"transformers_modules"}
    assert once["logits"] == pytest.approx(logits, abs=1e-3)
    assert once["ids"] == ids.tolist()
    assert once["same"] and once["multimodal"]
    reports = processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert [records[0]["generated_text"] for records in once["image-to-text"]] == [text.strip() for text in reports]
    assert once["shape"] == [1, 2, 2]
    assert once["no package"] == (
        "return_contradictions=True reads reports with the package otdrg, which is not installed: "
        "pip install a clone of its repository"
    )
    assert once["consensus"]["generated_text"] == chosen["generated_text"]
    assert [one["report"] for one in once["consensus"]["candidates"]] == [one["report"] for one in chosen["candidates"]]
    assert once["no agreement"].startswith("consensus: agreement_weight above 0 reads reports with the package otdrg")

    def answer(text):
        asked = processor(images=[image], text=text)
        written = model.generate(**asked, **FEW)[0, asked["input_ids"].shape[1] :]
        return processor.decode(written, skip_special_tokens=True)

    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Describe it."}]}]
    templated = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    assert once["chat"] == answer(templated)
    assert once["chats"] == [once["chat"]] * 2
    assert once["texts"] == answer("<image> Describe it.")
    assert "no image" in once["no image"]

    assert again == once
    names = {path.name for path in first.iterdir()}
    assert {path.name for path in second.iterdir()} == names
    assert "processor_config.json" in names
    for name in names:
        if name.endswith(".py"):
            assert (first / name).read_bytes() == (second / name).read_bytes(), name


def test_pipeline_of_published_code_takes_objects_of_the_package(build_model, image, run, tmp_path):
    model, processor = build_model()
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    features = np.random.default_rng(0).normal(size=(2, 32))
    bank = ReportBank(["The lungs are clear.", "Edema."], features, probe=probe_features(model, processor))
    bank.save(tmp_path / "bank")
    by_name, *by_objects = run(PACKAGE_OBJECTS, tmp_path / "model", tmp_path / "bank", image)
    assert by_objects == [by_name] * 2 and len(by_name[0]["candidates"]) > 2


def test_merged_model_loads_without_peft(build_model, image, run, tmp_path):
    model, processor = lora_model(build_model)
    adapted, merged = tmp_path / "adapted", tmp_path / "merged"
    model.save_pretrained(adapted)
    processor.save_pretrained(adapted)
    inputs = processor(images=[image])
    before = model.generate(**inputs, **FEW)
    model.merge_lora()
    model.save_pretrained(merged)
    processor.save_pretrained(merged)
    assert torch.equal(model.generate(**inputs, **FEW), before)
    found = run(WITHOUT_PEFT, merged, adapted, image)
    report = processor.decode(before[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert found["written"] == report.strip()
    assert found["adapted"] == "OTDRGConfig.lora is set: LoRA needs peft (pip install peft)"


@pytest.mark.slow
def test_stock_trainer_killed_resumes_to_the_same_losses(build_model, views, run, tmp_path):
    model, processor = build_model(
        lora={**LORA, "lora_dropout": 0.1}, text_config={"hidden_size": 32, "attention_dropout": 0.1}
    )
    folder, images = tmp_path / "model", []
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    for number, view in enumerate(views):
        images.append(str(tmp_path / f"{number}.png"))
        Image.fromarray(view).save(images[-1])
    run(TRAINING, folder, tmp_path, json.dumps(images), 3, killed=True)
    assert (tmp_path / "killed" / "checkpoint-2").is_dir() and not (tmp_path / "killed" / "checkpoint-4").exists()
    resumed = run(TRAINING, folder, tmp_path, json.dumps(images), -1)
    unbroken = json.loads((tmp_path / "unbroken.json").read_text())
    assert resumed == pytest.approx(unbroken, abs=1e-5) and len(resumed) == 5


def test_processor_is_a_processor_mixin(processor):
    assert isinstance(processor, ProcessorMixin)
