"""Compute what MIMIC-CXR with the recipe `mimic_cxr_paper.yaml` takes on H100 GPUs: FLOPs, bytes, hours and cost.

    python benchmarks/scale.py > benchmarks/scale.md
    python benchmarks/scale.py --mfu 0.3 0.3 --gpu-hour 2.5

Long, because every assumption of the page stands here beside its source.

Nothing here was measured on a GPU. Parameters are counted on the model itself, built on the device `meta`; every other
number is in `ASSUMPTIONS`, with its kind and source. `tests/test_scale.py` compares the formulas with what
`torch.utils.flop_counter` counts in small models.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from otdrg.studies.r2gen import MIMIC_COUNTS
from otdrg.training.model import preset_config
from otdrg.training.recipe import load_recipe
from torch.utils.flop_counter import FlopCounterMode

sys.path.append(str(Path(__file__).parent))

from memory import GIB, build_weightless, cache_bytes

RECIPE = Path(__file__).parents[1] / "recipes" / "mimic_cxr_paper.yaml"
GPUS = (1, 8, 64)
#: The stages of [`build_stages`] that the recipe runs; the others are alternatives and additions.
RECIPE_STAGES = 6


# --- assumptions -----------------------------------------------------------------------------------------------------


class Assumption(NamedTuple):
    """A number that is not computed here; `low` and `high` differ if it is a range."""

    what: str
    low: float
    high: float
    unit: str
    kind: str
    source: str


def one(what: str, value: float, unit: str, kind: str, source: str) -> Assumption:
    """An [`Assumption`] that is not a range."""
    return Assumption(what, value, value, unit, kind, source)


_LENGTHS = "lengths of the IU X-Ray training reports (Llama-2 tokenizer), times 53.00 / 37.56, R2Gen's average lengths"
ASSUMPTIONS: dict[str, Assumption] = {
    "peak": one("H100 SXM, dense bfloat16", 989.4e12, "FLOP/s", "published", "data sheet: 1,979 TFLOP/s with sparsity"),
    "memory": one("H100 SXM, memory bandwidth", 3.35e12, "B/s", "published", "data sheet"),
    "nvlink": one("NVLink, per GPU and direction", 450e9, "B/s", "published", "data sheet: 900 GB/s both ways"),
    "network": one("network, per GPU and direction", 50e9, "B/s", "assumed", "one 400 Gbit/s adapter for each GPU"),
    "node": one("GPUs of one machine", 8, "", "assumed", "HGX H100"),
    "cores": one("CPU cores per GPU for reading images", 12, "", "assumed", "two CPUs of 48 to 56 cores for 8 GPUs"),
    "mfu": Assumption(
        "share of the peak that is reached",
        0.15,
        0.40,
        "",
        "assumed",
        "from small batches in plain PyTorch to tuned pre-training",
    ),
    "bandwidth_share": Assumption(
        "share of a bandwidth that is reached", 0.6, 0.8, "", "assumed", "of memory, NVLink and network alike"
    ),
    "decoding_step": Assumption(
        "a step of `generate` in transformers, 7B", 0.02, 0.04, "s", "assumed", "bound by kernel launches"
    ),
    "in_flight": one("sequences that an engine decodes together", 256, "", "assumed", "vLLM's usual default"),
    "gpu_hour": one("price of a GPU hour", 3.0, "USD", "assumed", "`--gpu-hour`"),
    "input_price": one("price of a million input tokens", 0.15, "USD", "assumed", "an endpoint with a small LLM"),
    "output_price": one("price of a million output tokens", 0.6, "USD", "assumed", "an endpoint with a small LLM"),
    "read_512": one(
        "reading a JPEG of 512 × 615 pixels", 4.6e-3, "core s", "measured", "one Xeon core, `--images FOLDER`"
    ),
    "read_full": one(
        "reading a JPEG of 2,544 × 3,056 pixels", 88e-3, "core s", "measured", "the same; smooth, because enlarged"
    ),
    "prompt_tokens": one(
        "prompt with image, labels and label text", 145, "tokens", "measured", "49 + 14 + 45 and, on IU X-Ray, 37"
    ),
    "padded_prompt_tokens": one("the same, longest of 12", 160, "tokens", "measured", "IU X-Ray"),
    "study_tokens": one("prompt and training report, cut at 100", 222, "tokens", "assumed", _LENGTHS),
    "padded_tokens": one("the same, longest of 6", 251, "tokens", "assumed", _LENGTHS),
    "head_tokens": one("positions with logits, longest of 6", 122, "tokens", "assumed", _LENGTHS),
    "generated_tokens": one("generated report, up to 120", 95, "tokens", "assumed", "as long as the test reports"),
    "full_report_tokens": one("whole training report", 84, "tokens", "assumed", _LENGTHS),
    # The labeler now asks about each sentence, for the findings that it mentions.
    "label_prompt_tokens": one(
        "request of an earlier labeler `llm`, which asked about whole reports, 3 examples",
        696,
        "tokens",
        "measured",
        "Llama-2 tokenizer",
    ),
    "label_answer_tokens": one("its answer", 143, "tokens", "measured", "Llama-2 tokenizer, all unmentioned"),
    "images_per_report": one("images that share a report", 1.66, "", "published", "377,110 images of 227,835 studies"),
}


# --- FLOPs of a study ------------------------------------------------------------------------------------------------


class Flops(NamedTuple):
    """FLOPs of a forward and of a backward pass; a multiplication and an addition count as two."""

    forward: float
    backward: float

    @property
    def total(self) -> float:
        return self.forward + self.backward


def llama_flops(config: Any, tokens: int, head_tokens: int, lora: dict[str, Any] | None = None) -> Flops:
    """FLOPs of one sequence in a frozen LLaMA with LoRA, whose input embeddings need a gradient.

    A frozen linear layer passes the gradient on to its input and computes none for its weights: its backward pass costs
    one forward pass, not two. Attention and LoRA have two factors that need gradients and cost two.

    Args:
        config: a `LlamaConfig`.
        tokens: length of the sequence.
        head_tokens: positions whose logits are computed.
        lora: fields `r` and `target_modules` of LoRA, whose modules are among q, k, v and o.
    """
    hidden, layers = config.hidden_size, config.num_hidden_layers
    keys = config.num_key_value_heads * (hidden // config.num_attention_heads)
    widths = {"q_proj": hidden, "k_proj": keys, "v_proj": keys, "o_proj": hidden}
    frozen = layers * 2 * tokens * hidden * (sum(widths.values()) + 3 * config.intermediate_size)
    frozen += 2 * head_tokens * hidden * config.vocab_size
    # The products with keys and with values; PyTorch computes the whole square, masked or not.
    doubled = layers * 4 * tokens**2 * hidden
    for module in lora["target_modules"] if lora else ():
        doubled += layers * 2 * tokens * lora["r"] * (hidden + widths[module])
    return Flops(frozen + doubled, frozen + 2 * doubled)


def counted_flops(module: torch.nn.Module, *inputs: torch.Tensor) -> int:
    """FLOPs of a forward pass, counted; inputs and weights may be on the device `meta`."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(*inputs)
    return counter.get_total_flops()


def parameters(modules: Iterable[torch.nn.Module], trained: bool = False) -> int:
    """Number of parameters, or of those that are trained."""
    weights = (weight for module in modules for weight in module.parameters())
    return sum(weight.numel() for weight in weights if weight.requires_grad or not trained)


# --- time ------------------------------------------------------------------------------------------------------------


class Range(NamedTuple):
    """A result under the favourable and the unfavourable end of all assumptions."""

    best: float
    worst: float

    def __str__(self) -> str:
        best, worst = (f"{end:.2g}" if end < 10 else f"{end:,.0f}" for end in self)
        return best if best == worst else f"{best} to {worst}"

    def times(self, factor: float) -> Range:
        return Range(self.best * factor, self.worst * factor)

    def duration(self) -> str:
        """A range of seconds as text, in the unit that fits its end."""
        factor, unit = next(
            pair for pair in ((3600, "h"), (60, "min"), (1, "s")) if self.worst >= pair[0] or pair[0] == 1
        )
        return f"{self.times(1 / factor)} {unit}"


def bandwidth(values: dict[str, Assumption], gpus: int) -> float:
    """Bytes per second and direction between GPUs, the slower of NVLink and network."""
    return values["nvlink" if gpus <= values["node"].low else "network"].low


def ddp_bytes(trained: int, gpus: int) -> float:
    """Bytes that each GPU sends per step to add up the float32 gradients of DDP (ring all-reduce)."""
    return 2 * (gpus - 1) / gpus * 4 * trained


def fsdp_bytes(weights: int, trained: int, gpus: int) -> float:
    """Bytes that each GPU receives per step of FSDP2: weights for both passes, and gradients to reduce."""
    return (gpus - 1) / gpus * (2 * weights + 4 * trained)


@dataclass
class Stage:
    """Work of a stage.

    Args:
        name: as in the table.
        items: studies (one image each) or reports, all epochs together.
        tokens: tokens of the LLM per item, without padding.
        flops: FLOPs per item.
        images: images that are read, all epochs together.
        trained: parameters whose gradients are exchanged; 0 without training.
        batch_size: items of a step on each GPU.
        decoding: for generation, seconds on one GPU that are spent in decoding steps.
    """

    name: str
    items: int
    tokens: float
    flops: float
    images: int = 0
    trained: int = 0
    batch_size: int = 1
    decoding: Range = Range(0, 0)

    def seconds(self, values: dict[str, Assumption], gpus: int, workers: float, reading: str) -> Range:
        """Seconds on a number of GPUs.

        Computing and reading overlap where there are workers; the exchange of gradients is counted in full.

        Args:
            workers: cores that read images for each GPU; 0 reads them between the steps.
            reading: the assumption with the core seconds per image.
        """
        read = self.images * values[reading].low / (gpus * max(workers, 1))
        steps = -(-self.items // (gpus * self.batch_size))
        exchanged = steps * ddp_bytes(self.trained, gpus) / bandwidth(values, gpus)
        found = []
        for end, decoding in zip(("high", "low"), self.decoding, strict=True):
            share, width = (getattr(values[name], end) for name in ("mfu", "bandwidth_share"))
            compute = (self.items * self.flops / (values["peak"].low * share) + decoding) / gpus
            found.append((max(compute, read) if workers else compute + read) + exchanged / width)
        return Range(*found)


def batched_steps(values: dict[str, Assumption], studies: int, batch_size: int, max_tokens: int) -> Range:
    """Seconds of decoding by `generate`: every batch takes as many steps as its longest report, nearly always all."""
    steps = -(-studies // batch_size) * max_tokens
    return Range(values["decoding_step"].low, values["decoding_step"].high).times(steps)


def engine_steps(
    values: dict[str, Assumption], config: Any, sequences: float, tokens: tuple[float, float], weights: int
) -> Range:
    """Seconds of decoding by an engine with continuous batching, which reads weights and cache once per step.

    Args:
        config: the LLM's.
        sequences: all sequences, beams included.
        tokens: of a prompt and of what is generated.
        weights: bytes of the LLM.
    """
    prompt, generated = tokens
    together = int(min(values["in_flight"].low, sequences))
    steps = sequences * generated / together
    read = weights + cache_bytes(config, together, int(prompt + generated / 2))
    share = values["bandwidth_share"]
    return Range(1 / share.high, 1 / share.low).times(steps * read / values["memory"].low)


# --- the recipe ------------------------------------------------------------------------------------------------------


@dataclass
class Scale:
    """All that the tables need: the recipe, its configuration, and what is counted on the model."""

    values: dict[str, Assumption]
    recipe: Any
    config: Any
    counts: dict[str, int]
    weight_bytes: int
    vision: int
    feature_size: int

    @property
    def lora(self) -> dict[str, Any]:
        return self.config.lora

    def report_step(self) -> Flops:
        """FLOPs per study of a training step of the report stage, padding and projections included."""
        tokens, head = (int(self.values[name].low) for name in ("padded_tokens", "head_tokens"))
        llm = llama_flops(self.config.text_config, tokens, head, self.lora)
        projected = 2 * self.config.image_tokens * self.counts["image_projector"]
        # The label table, 14 x 4 rows, is projected once per step.
        projected += 2 * 56 * self.counts["label_projector"] / self.recipe.report.per_device_train_batch_size
        return Flops(llm.forward + projected, llm.backward + projected)


def build_scale(values: dict[str, Assumption]) -> Scale:
    """Read the recipe and count the model."""
    os.environ.setdefault("OTDRG_MIMIC_CXR", "mimic_cxr")  # the recipe names it; nothing is read from there
    recipe = load_recipe(RECIPE)
    model = build_weightless(preset_config(recipe.model), "lora").eval()
    size = model.config.image_size
    pixels = torch.empty(1, 3, size, size, device="meta", dtype=torch.bfloat16)
    vision = counted_flops(model.vision_tower, pixels)
    counts = {name: parameters([part]) for name, part in model.named_children()}
    counts["trained"] = parameters([model], trained=True)
    counts["lora"] = parameters([model.language_model], trained=True)
    weights = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    return Scale(values, recipe, model.config, counts, weights, vision, model.image_projector.linear.in_features)


def build_stages(scale: Scale) -> list[Stage]:
    """The stages of the recipe, then generation and labels beside it."""
    values, recipe, vision = scale.values, scale.recipe, scale.vision
    train, validation, test = (MIMIC_COUNTS[split] for split in ("train", "validation", "test"))
    report, llm = recipe.report, scale.config.text_config
    prompt, padded, generated = (
        values[name].low for name in ("prompt_tokens", "padded_prompt_tokens", "generated_tokens")
    )
    batch, beams, longest = report.eval_batch(), report.generation["num_beams"], report.generation["max_new_tokens"]
    epochs = {name: int(recipe.sections[name].num_train_epochs) for name in recipe.stages}

    def writing(beams: int) -> float:
        """FLOPs of a study that is generated."""
        return vision + llama_flops(llm, int(padded), 1).forward + beams * generated * decoded_flops(llm)

    def generating(name: str, studies: int, beams: int) -> Stage:
        steps = batched_steps(values, studies, batch, longest)
        return Stage(name, studies, prompt + beams * generated, writing(beams), studies, decoding=steps)

    ircp, predictor = recipe.ircp, recipe.predictor
    passes = 1 if predictor.cache_features else epochs["predictor"]
    engine = engine_steps(values, llm, beams * test, (prompt, generated), 2 * scale.counts["language_model"])
    return [
        Stage(
            "`ircp`",
            epochs["ircp"] * train,
            0,
            3 * vision,
            epochs["ircp"] * train,
            scale.counts["vision_tower"],
            ircp.per_device_train_batch_size,
        ),
        Stage(
            "`predictor`",
            epochs["predictor"] * train,
            0,
            vision * passes / epochs["predictor"],
            passes * train,
            scale.counts["finding_predictor"],
            predictor.per_device_train_batch_size,
        ),
        Stage("`report`: features, once", train, 0, vision, train),
        Stage(
            "`report`: training",
            epochs["report"] * train,
            values["study_tokens"].low,
            scale.report_step().total,
            0,
            scale.counts["trained"],
            report.per_device_train_batch_size,
        ),
        generating(f"`report`: {epochs['report']} validations, greedy", epochs["report"] * validation, 1),
        generating(f"table of controls: test set 3 times, {beams} beams", 3 * test, beams),
        generating(f"test set once, {beams} beams, `generate`", test, beams),
        Stage(
            f"test set once, {beams} beams, engine",
            test,
            prompt + beams * generated,
            writing(beams),
            test,
            decoding=engine,
        ),
        label_stage(scale),
    ]


def decoded_flops(config: Any) -> float:
    """FLOPs of one token that is decoded."""
    return llama_flops(config, 1, 1).forward


def label_stage(scale: Scale) -> Stage:
    """Labels of all distinct reports by the recipe's own LLM in an engine that keeps the common prompt.

    Of an earlier labeler `llm`, which asked about whole reports; today's asks about each different sentence.
    """
    values, llm = scale.values, scale.config.text_config
    reports = round(sum(MIMIC_COUNTS.values()) / values["images_per_report"].low)
    read, answer = values["full_report_tokens"].low, values["label_answer_tokens"].low
    prompt = values["label_prompt_tokens"].low
    steps = engine_steps(values, llm, reports, (prompt + read, answer), 2 * scale.counts["language_model"])
    flops = llama_flops(llm, int(read), 1).forward + answer * decoded_flops(llm)
    name = "labels by the same LLM, engine, whole reports"
    return Stage(name, reports, prompt + read + answer, flops, decoding=steps)


# --- the page --------------------------------------------------------------------------------------------------------


def assumption_table(values: dict[str, Assumption]) -> str:
    lines = ["| quantity | value | kind | source |", "|---|---|---|---|"]
    for item in values.values():
        ends = [f"{end / 1e12:,.4g} T" if end >= 1e12 else f"{end / 1e9:,.4g} G" if end >= 1e9 else f"{end:.4g}"
                for end in dict.fromkeys((item.low, item.high))]  # fmt: skip
        lines.append(f"| {item.what} | {' to '.join(ends)} {item.unit} | {item.kind} | {item.source} |")
    return "\n".join(lines)


def model_table(scale: Scale) -> str:
    """Parameters, and FLOPs of a study."""
    step, values = scale.report_step(), scale.values
    rows = {
        "parameters of Swin-B": f"{scale.counts['vision_tower']:,}",
        "parameters of Llama-2-7b, with LoRA": f"{scale.counts['language_model']:,}",
        "trained in `report`: LoRA and projections": f"{scale.counts['trained']:,} ({scale.counts['lora']:,} of LoRA)",
        "tokens of a study, with padding": f"{values['study_tokens'].low:g}, {values['padded_tokens'].low:g}",
        "tokens of an epoch, without padding": f"{values['study_tokens'].low * MIMIC_COUNTS['train'] / 1e6:,.1f} M",
        "Swin-B forward": f"{scale.vision / 1e9:.1f} GFLOP",
        "LLM forward (with projections)": f"{step.forward / 1e12:.2f} TFLOP",
        "LLM backward through frozen weights": f"{step.backward / 1e12:.2f} TFLOP",
        "the same if all weights were trained": f"{2 * step.forward / 1e12:.2f} TFLOP",
        "features of all training images": f"{feature_bytes(scale) / 1e9:.1f} GB",
    }
    return "\n".join(["| per study | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])


def feature_bytes(scale: Scale) -> int:
    """Bytes of the cached features of the training images, in bfloat16."""
    return MIMIC_COUNTS["train"] * scale.config.image_tokens * scale.feature_size * 2


def stage_table(scale: Scale, stages: list[Stage]) -> str:
    """Time and cost of the stages, with enough workers and images of 512 pixels."""
    values = scale.values
    heads = " | ".join([*(f"time, {gpus}" for gpus in GPUS), *(f"USD, {gpus}" for gpus in GPUS)])
    lines = [f"| stage | items | tokens per item | PFLOP | {heads} |", "|---|" + "---|" * (3 + 2 * len(GPUS))]
    total = {gpus: Range(0, 0) for gpus in GPUS}
    for number, stage in enumerate(stages):
        if number == RECIPE_STAGES:
            lines.append(f"| **the recipe, sum of the rows above** | | | | {time_cells(values, total)} |")
        seconds = {gpus: stage.seconds(values, gpus, values["cores"].low, "read_512") for gpus in GPUS}
        total = {gpus: Range(*map(sum, zip(total[gpus], seconds[gpus], strict=True))) for gpus in GPUS}
        tokens = f"{stage.tokens:g}" if stage.tokens else "–"
        cells = [stage.name, f"{stage.items:,}", tokens, f"{stage.items * stage.flops / 1e15:,.0f}"]
        lines.append(f"| {' | '.join(cells)} | {time_cells(values, seconds)} |")
    return "\n".join(lines)


def time_cells(values: dict[str, Assumption], seconds: dict[int, Range]) -> str:
    price = values["gpu_hour"].low / 3600
    costs = (str(seconds[gpus].times(gpus * price)) for gpus in GPUS)
    return " | ".join([*(seconds[gpus].duration() for gpus in GPUS), *costs])


def reading_table(scale: Scale, stages: list[Stage]) -> str:
    """Time of the stages that read all images, by size of the images and number of workers."""
    values = scale.values
    heads = " | ".join(f"time, {gpus}" for gpus in GPUS)
    lines = [f"| stage | images | workers per GPU | {heads} |", "|---|---|---|" + "---|" * len(GPUS)]
    for stage in stages[:3]:
        for size in ("512", "full"):
            for workers in (0, int(values["cores"].low)):
                times = (stage.seconds(values, gpus, workers, f"read_{size}").duration() for gpus in GPUS)
                lines.append(f"| {stage.name} | {size} | {workers} | {' | '.join(times)} |")
    return "\n".join(lines)


def exchange_table(scale: Scale) -> str:
    """Milliseconds of a step of the report stage: computing, and what DDP and FSDP2 exchange."""
    values, batch = scale.values, scale.recipe.report.per_device_train_batch_size
    trained, flops = scale.counts["trained"], batch * scale.report_step().total
    mfu, share = values["mfu"], values["bandwidth_share"]
    compute = Range(1 / mfu.high, 1 / mfu.low).times(1e3 * flops / values["peak"].low)
    lines = ["| GPUs | computing, ms | DDP, MB | DDP, ms | FSDP2, MB | FSDP2, ms |", "|---|---|---|---|---|---|"]
    for gpus in GPUS[1:]:
        cells = [str(compute)]
        for size in (ddp_bytes(trained, gpus), fsdp_bytes(scale.weight_bytes, trained, gpus)):
            time = Range(1 / share.high, 1 / share.low).times(1e3 * size / bandwidth(values, gpus))
            cells += [f"{size / 1e6:,.0f}", str(time)]
        lines.append(f"| {gpus} | {' | '.join(cells)} |")
    return "\n".join(lines)


def endpoint_cost(scale: Scale) -> tuple[float, float, float]:
    """Million input tokens, million output tokens and USD of labels from an endpoint."""
    values = scale.values
    reports = sum(MIMIC_COUNTS.values()) / values["images_per_report"].low / 1e6
    given = reports * (values["label_prompt_tokens"].low + values["full_report_tokens"].low)
    answered = reports * values["label_answer_tokens"].low
    return given, answered, given * values["input_price"].low + answered * values["output_price"].low


def check_table(scale: Scale) -> str:
    """Figures of this page beside published ones."""
    llama = 6 * 6.74e9 * 2.0e12 / (184_320 * 3600 * 312e12)
    tokens = int(scale.values["padded_tokens"].low)
    rule = llama_flops(scale.config.text_config, tokens, tokens).forward
    rule /= 2 * (scale.counts["language_model"] - scale.counts["lora"]) * tokens
    rows = [
        ("share of the peak, Llama-2-7b pre-training", f"{llama:.2f}", "6 · 6.74e9 · 2.0e12 in 184,320 hours of A100"),
        ("share of the peak, tuned", f"{scale.values['mfu'].high:.2f}", "Llama 3 405B on H100: .38 to .43"),
        ("Swin-B, 224 pixels", f"{scale.vision / 2e9:.1f} GMAC", "15.4 GMAC (timm, the paper of Swin)"),
        ("Llama-2-7b", f"{(scale.counts['language_model'] - scale.counts['lora']) / 1e9:.2f} G", "6.74 G parameters"),
        ("forward pass, in 2 · parameters · tokens", f"{rule:.2f}", "1, with embeddings and attention left out"),
        ("cached features", f"{feature_bytes(scale) / 1e9:.0f} GB", "27 GB in the recipe's comment"),
    ]
    return "\n".join(["| quantity | here | published |", "|---|---|---|", *(f"| {' | '.join(row)} |" for row in rows)])


def format_page(scale: Scale) -> str:
    """The whole page."""
    stages = build_stages(scale)
    given, answered, usd = endpoint_cost(scale)
    return PAGE.format(
        assumptions=assumption_table(scale.values),
        model=model_table(scale),
        stages=stage_table(scale, stages),
        reading=reading_table(scale, stages),
        exchange=exchange_table(scale),
        checks=check_table(scale),
        given=given,
        answered=answered,
        usd=usd,
        batch=scale.recipe.report.per_device_train_batch_size,
        memory=scale.weight_bytes / GIB,
    )


PAGE = """\
# MIMIC-CXR on 1, 8 and 64 H100 GPUs, on paper

Computed by `python benchmarks/scale.py > benchmarks/scale.md` from `recipes/mimic_cxr_paper.yaml` (Swin-B and
Llama-2-7b). **Nothing on this page was measured on a GPU.** No utilisation of a GPU has been measured with this
repository, so the share of the peak is an assumption, and times are ranges. `benchmarks/gpu_check.sh` prints the share
that a training step reaches on your card; `--mfu 0.3 0.3` puts it in place of the range.

## Assumptions

*Measured* numbers come from the CPU and the tokenizer only, *published* ones are quoted, *assumed* ones are neither.

{assumptions}

R2Gen's annotation has one entry for each image, so a study has one image here: 270,790 for training, 2,130 for
validation and 3,858 for test. R2Gen's average lengths count punctuation as words.

## A study

Counted on the model, on the device `meta`, or computed from its configuration.

{model}

The backward pass through frozen weights costs one forward pass, because only the gradient of the input is computed. It
runs through all layers, because the projections in front of the LLM are trained.

## Stages

Batches per GPU as in the recipe, {batch} studies in the report stage, so more GPUs mean fewer and larger steps; the
learning rate would have to change. Images of 512 pixels, and as many workers as cores. The exchange of gradients (DDP)
does not overlap with computing. A range goes from the favourable to the unfavourable end of all assumptions.

{stages}

- Not counted: start-up, loading weights, checkpoints, idle GPUs at the end of an epoch, the linear probes of `ircp`,
  the validation losses, optimal transport and the label predictor itself (all small), metrics, and failures.
- The rows below the sum are alternatives and additions. An engine (vLLM or another one with continuous batching) has
  not been tried. Its beams are counted as sequences that share nothing. On 8 GPUs and more, a GPU has fewer sequences
  than it could decode together, so the true times of the test set are longer.
- Labels from an endpoint that is paid by the token: {given:.0f} million tokens of requests and {answered:.0f} million
  of answers, {usd:.0f} USD. Reports that repeat are read once. Both figures for labels are of an earlier labeler
  `llm`, which asked about whole reports; today's asks about each different sentence and was not computed.

## Reading images

The recipe leaves `dataloader_num_workers` at 0, so images are read between the steps, and one thread of each process
fills the cache of features. Both wait for the CPU most of the time. Set `ircp.dataloader_num_workers` and
`predictor.dataloader_num_workers`, and use images of 512 pixels. `predictor.cache_features: true` would read the images
once in place of five times. The features with workers are what the code could reach, not what it does.

{reading}

## Bytes between GPUs

Per step of the report stage and per GPU. Eight GPUs are connected by NVLink, 64 by the network.

{exchange}

DDP exchanges the gradients of LoRA and of the projections only. FSDP2 gathers all {memory:.1f} GiB of weights twice in
each step, which takes longer than computing as soon as the network is involved. The model fits on one GPU of 80 GB
(`benchmarks/memory.py`), so DDP is the better choice for LoRA.

## Plausibility

{checks}
"""


def measure_reading(folder: str, count: int = 16) -> str:
    """CPU milliseconds of reading a JPEG of 512 and of 2,544 pixels width, enlarged from images in a folder."""
    import io
    import time

    from otdrg.processing_otdrg import read_view
    from PIL import Image
    from transformers import ViTImageProcessor

    processor = ViTImageProcessor(size={"height": 224, "width": 224})
    lines = []
    for size in ((512, 615), (2544, 3056)):
        files = []
        for path in sorted(Path(folder).rglob("*.jpg"))[:count]:
            file = io.BytesIO()
            Image.open(path).convert("L").resize(size, Image.Resampling.BICUBIC).save(file, "JPEG", quality=95)
            files.append(file.getvalue())
        start = time.process_time()
        for content in files:
            processor(read_view(content, 2**26, "image"), return_tensors="pt")
        milliseconds = 1e3 * (time.process_time() - start) / len(files)
        lines.append(f"{size[0]} x {size[1]}: {milliseconds:.1f} ms")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mfu", type=float, nargs=2, metavar=("LOW", "HIGH"), help="share of the peak that is reached")
    parser.add_argument("--gpu-hour", type=float, metavar="USD", help="price of a GPU hour")
    parser.add_argument("--images", metavar="FOLDER", help="measure the reading of JPEG files instead")
    options = parser.parse_args()
    if options.images is not None:
        torch.set_num_threads(1)
        print(measure_reading(options.images))
        return
    values = dict(ASSUMPTIONS)
    if options.mfu is not None:
        values["mfu"] = values["mfu"]._replace(low=options.mfu[0], high=options.mfu[1], source="`--mfu`")
    if options.gpu_hour is not None:
        values["gpu_hour"] = values["gpu_hour"]._replace(low=options.gpu_hour, high=options.gpu_hour)
    print(format_page(build_scale(values)), end="")


if __name__ == "__main__":
    main()
