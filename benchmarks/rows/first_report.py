"""From starting Python to the first report of a pipeline, against a pipeline of transformers' own classes."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from measure import Line, Row, measured_in_turns, ratios, spent
from otdrg import OTDRGConfig, OTDRGProcessor
from otdrg.studies.phantom import sample_states, write_report
from otdrg.training.model import build_model
from otdrg.training.recipe import load_recipe
from PIL import Image
from transformers import AutoTokenizer, CLIPImageProcessor, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

TITLE = "First report"
ABOUT = (
    "A new Python process that makes a pipeline of a local folder and writes one report of 40 tokens by greedy "
    "search: ours (`image-to-text`, `trust_remote_code=True`) against transformers' own LLaVA "
    "(`image-text-to-text`) with random weights, a LLaMA of the size of our language model and, for the "
    "checkpoint, the same vision encoder. LLaVA cannot take the quick start's encoder, which is timm's: it has a "
    "ViT of two layers in its place. *Local* is `load_pipeline` of the package."
)
NOTES = (
    "Most of the difference is transformers' own check of the imports of remote code, which parses all our files for "
    "each of the six classes it loads. Then come the comparison of shapes with a model that is built without memory "
    "and the SHA-256 of the weights; peft is no longer imported where there is no LoRA.",
)
_ROOT = Path(__file__).parents[2]
_REPORT = "do_sample=False, num_beams=1, max_new_tokens=40, min_new_tokens=40"
_OURS = f"""\
from transformers import pipeline
pipe = pipeline("image-to-text", model={{model!r}}, trust_remote_code=True)
print(pipe({{image!r}}, candidates=1, {_REPORT.removeprefix("do_sample=False, num_beams=1, ")}))
"""
_LOCAL = f"""\
from otdrg.inference.loading import load_pipeline
pipe = load_pipeline({{model!r}})
print(pipe({{image!r}}, candidates=1, {_REPORT.removeprefix("do_sample=False, num_beams=1, ")}))
"""
_THEIRS = f"""\
from transformers import pipeline
pipe = pipeline("image-text-to-text", model={{model!r}})
print(pipe(images={{image!r}}, text="<image>", generate_kwargs=dict({_REPORT})))
"""


def measure(rounds: int, folder: Path) -> Row:
    lines = []
    with tempfile.TemporaryDirectory() as place:
        image = Path(place, "view.png")
        noise = np.random.default_rng(0).integers(0, 256, (300, 300), dtype=np.uint8)
        Image.fromarray(noise).save(image)
        for name, make in (("quick start", quick_start), ("checkpoint", checkpoint)):
            ours, theirs = make(Path(place))
            scripts = {"ours": (_OURS, ours), "local": (_LOCAL, ours), "theirs": (_THEIRS, theirs)}
            commands = {
                kind: [sys.executable, "-c", script.format(model=str(model), image=str(image))]
                for kind, (script, model) in scripts.items()
            }
            found = measured_in_turns(
                {kind: lambda c=command: spent(c).cpu for kind, command in commands.items()}, rounds, 1
            )
            lines.append(Line(name, "CPU time, ours / LLaVA", ratios(found["ours"], found["theirs"]), "≤ 1.05"))
            lines.append(Line(name, "CPU time, local / LLaVA", ratios(found["local"], found["theirs"])))
            lines.append(Line(name, "CPU seconds, ours", found["ours"]))
    return Row(lines, list(NOTES))


def quick_start(place: Path) -> tuple[Path, Path]:
    """Folders of a new model of the quick start, and of a LLaVA of its size."""
    stream = np.random.default_rng(0)
    reports = [write_report(sample_states(stream), stream) for _ in range(300)]
    recipe = load_recipe(_ROOT / "recipes" / "phantom_tiny.yaml")
    torch.manual_seed(0)
    model, processor = build_model(recipe.model, reports)
    model.generation_config.num_beams = 1
    model.save_pretrained(place / "tiny")
    processor.save_pretrained(place / "tiny")
    vision = {"model_type": "clip_vision_model", "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
    vision |= {"num_attention_heads": 4, "image_size": 112, "patch_size": 16}
    return place / "tiny", llava(place / "tiny", place / "tiny_llava", vision, model.config.text_config.to_dict())


def checkpoint(place: Path) -> tuple[Path, Path]:
    """The published checkpoint's folder, and that of a LLaVA with its encoder and a language model of its size."""
    folder = _ROOT / "checkpoints" / "otdrg-iu-xray"
    config = OTDRGConfig.from_pretrained(folder)
    gpt2 = config.text_config
    text = {
        "model_type": "llama",
        "vocab_size": gpt2.vocab_size,
        "hidden_size": gpt2.n_embd,
        "num_hidden_layers": gpt2.n_layer,
    }
    text |= {"num_attention_heads": gpt2.n_head, "intermediate_size": 4 * gpt2.n_embd, "tie_word_embeddings": True}
    return folder, llava(folder, place / "llava", config.vision_config.to_dict(), text)


def llava(model: Path, folder: Path, vision: dict, text: dict) -> Path:
    """Save a LLaVA of these configurations, with the tokenizer of one of our models."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    side = OTDRGProcessor.from_pretrained(model).image_processor.size["height"]
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=(side // vision["patch_size"]) ** 2,
        vision_feature_layer=-1,
    )
    torch.manual_seed(0)
    LlavaForConditionalGeneration(config).to(torch.bfloat16).save_pretrained(folder)
    size = {"height": side, "width": side}
    images = CLIPImageProcessor(size=size, crop_size=size)
    LlavaProcessor(
        images,
        tokenizer,
        patch_size=vision["patch_size"],
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=1,
    ).save_pretrained(folder)
    return folder
