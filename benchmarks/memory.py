"""Memory of the report stage by arithmetic: what a preset's model needs on a GPU, and how many GPUs that takes.

    python benchmarks/memory.py
    python benchmarks/memory.py --preset small --batch-size 8 --tokens 200

Weights, gradients and optimizer are counted on the model itself, built without memory (on the device `meta`).
Activations are what a LLaMA layer keeps for the backward pass under bfloat16 autocast, token by token, with
scaled-dot-product attention; `tests/test_memory.py` holds both against runs of small models.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import torch
from otdrg import OTDRGConfig, OTDRGForReportGeneration
from otdrg.findings_otdrg import FINDING_STATES, FINDINGS
from otdrg.training.model import cast_backbones, set_trained_parts
from torch import nn

GIB = 2**30
#: Of a GPU's memory, what CUDA, the allocator's gaps and buffers of communication are given; not measured.
RESERVED = 0.1

#: Name: how the LLM is trained, bits of its frozen weights, whether processes share the weights out.
WAYS: dict[str, tuple[str, int, bool]] = {
    "LoRA, bfloat16, DDP": ("lora", 16, False),
    "LoRA, 8-bit, DDP": ("lora", 8, False),
    "LoRA, 4-bit, DDP": ("lora", 4, False),
    "LoRA, bfloat16, ZeRO-3 or FSDP2": ("lora", 16, True),
    "full, DDP": ("full", 16, False),
    "full, ZeRO-3 or FSDP2": ("full", 16, True),
}


@dataclass
class Memory:
    """Bytes that one process needs.

    Args:
        frozen: weights that are not trained.
        trained: weights that are, in float32.
        gradients: of those.
        optimizer: AdamW's two moments of those.
        copies: bfloat16 copies that autocast makes of them for a step.
        activations: what is kept for the backward pass, and the head's logits.
        largest: the LLM's largest layer or embedding, whole, in the type it is gathered in.
    """

    frozen: int
    trained: int
    gradients: int
    optimizer: int
    copies: int
    activations: int
    largest: int

    def total(self, processes: int = 1, shared: bool = False) -> float:
        """On each of `processes`; where they share weights out, a layer and the next are whole at a time."""
        states = self.frozen + self.trained + self.gradients + self.optimizer
        if not shared:
            return states + self.copies + self.activations
        return states / processes + 2 * self.largest + self.activations


def build_weightless(config: OTDRGConfig, text: str) -> OTDRGForReportGeneration:
    """The model as the report stage trains it, on the device `meta`: encoder and predictor frozen, `text` as there."""
    if config.finding_text_token_ids is None:
        config.finding_text_token_ids = [[[0]] * len(FINDING_STATES)] * len(FINDINGS)
    lora, config.lora = config.lora, None
    with torch.device("meta"):
        model = OTDRGForReportGeneration(config)
        if text == "lora":
            config.lora = lora
            model.add_lora()
    cast_backbones(model, "bfloat16")
    set_trained_parts(model, vision="frozen", text=text, predictor="frozen", joining=True)
    return model


def packed_bytes(linear: nn.Linear, bits: int) -> int:
    """A frozen weight by bitsandbytes: NF4 quantised twice, in blocks of 64 and of 256 of those; or rows of int8."""
    count = linear.weight.numel()
    if bits == 8:
        return count + 4 * linear.out_features
    blocks = -(-count // 64)
    tables = 4 * (16 + 256)
    return -(-count // 2) + blocks + 4 * -(-blocks // 256) + tables


def activation_bytes(
    config, batch_size: int, tokens: int, report_tokens: int, lora_rank: int | None = None, checkpointing: bool = False
) -> int:
    """What a LLaMA keeps for the backward pass of a batch.

    Args:
        config: a `LlamaConfig` with as many key-value heads as heads.
        batch_size: studies.
        tokens: of each, prompt and report.
        report_tokens: of them, those whose logits are needed.
        lora_rank: of adapters on `q_proj` and `v_proj` in an LLM that is frozen but for them; None trains all of it.
        checkpointing: keep the input of each layer only, and of one layer at a time what it makes of it.
    """
    hidden, inner, heads = config.hidden_size, config.intermediate_size, config.num_attention_heads
    # Bytes a token. A frozen linear layer keeps nothing of its own; what it works on is bfloat16 where it is frozen.
    if lora_rank is not None:
        layer, stream = 28 * hidden + 6 * inner + 4 * lora_rank, 2
    else:
        layer, stream = 34 * hidden + 8 * inner, 4
    # Each head's normaliser, the two norms', and a row of the attention mask.
    layer += 4 * heads + 8 + 2 * tokens
    outside = 2 * stream * hidden + (0 if checkpointing else stream * hidden // 2)
    layers = config.num_hidden_layers
    kept = layers * stream * hidden + layer if checkpointing else layers * layer
    return batch_size * (tokens * (kept + outside) + report_tokens * config.vocab_size * 4)


def memory(
    config: OTDRGConfig,
    text: str,
    bits: int = 16,
    batch_size: int = 8,
    tokens: int = 200,
    report_tokens: int = 61,
    checkpointing: bool = False,
) -> Memory:
    """Of the report stage on one process, whole.

    Args:
        config: of a model whose LLM is a LLaMA.
        text: "lora" or "full", as the recipe has it.
        bits: of the LLM's frozen linear layers: 16, 8 or 4.
        batch_size, tokens, report_tokens, checkpointing: as [`activation_bytes`] takes them.
    """
    model = build_weightless(config, text)
    weights = list(model.parameters())
    trained = sum(4 * weight.numel() for weight in weights if weight.requires_grad)
    frozen = sum(weight.numel() * weight.element_size() for weight in weights if not weight.requires_grad)
    if bits < 16:
        for name, module in model.language_model.named_modules():
            if isinstance(module, nn.Linear) and "lora_" not in name and name != "lm_head":
                frozen += packed_bytes(module, bits) - module.weight.numel() * module.weight.element_size()
    llm = config.text_config
    rank = config.lora["r"] if text == "lora" else None
    activations = activation_bytes(llm, batch_size, tokens, report_tokens, rank, checkpointing)
    # On their way the logits are there in bfloat16 and float32, and so is their gradient.
    activations += batch_size * report_tokens * llm.vocab_size * (2 + 4 + 4)
    parts = [*model.language_model.model.layers[:1], model.get_input_embeddings()]
    largest = max(sum(weight.numel() * 2 for weight in part.parameters()) for part in parts)
    return Memory(frozen, trained, trained, 2 * trained, trained // 2, activations, largest)


def gpus_needed(needed: Memory, shared: bool, gib: int, most: int = 64) -> int | None:
    """The fewest GPUs of `gib` GiB on each of which it fits; None where no number of them does."""
    room = gib * GIB * (1 - RESERVED)
    if not shared:
        return 1 if needed.total() <= room else None
    return next((count for count in range(1, most + 1) if needed.total(count, shared=True) <= room), None)


def cache_bytes(config, sequences: int, tokens: int) -> int:
    """Keys and values of generation in bfloat16."""
    heads = config.num_key_value_heads * (config.hidden_size // config.num_attention_heads)
    return sequences * tokens * config.num_hidden_layers * 2 * heads * 2


def format_table(preset: str, batch_size: int, tokens: int, report_tokens: int) -> str:
    """All ways as a Markdown table, in GiB, checkpointing off and on."""
    lines = [
        "| report stage | frozen | trained | gradients, optimizer | checkpointing | activations | on one GPU "
        "| GPUs of 24 GB | of 80 GB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, (text, bits, shared) in WAYS.items():
        for checkpointing in (False, True):
            config = OTDRGConfig.from_preset(preset)
            needed = memory(config, text, bits, batch_size, tokens, report_tokens, checkpointing)
            sizes = [needed.frozen, needed.trained + (0 if shared else needed.copies)]
            sizes += [needed.gradients + needed.optimizer]
            cells = [f"{size / GIB:.1f}" for size in sizes]
            cells += ["yes" if checkpointing else "no", f"{needed.activations / GIB:.1f}"]
            cells += [f"{needed.total(1, shared) / GIB:.1f}"]
            cells += [str(gpus_needed(needed, shared, gib) or "–") for gib in (24, 80)]
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="paper", help="a preset whose LLM is a LLaMA")
    parser.add_argument("--batch-size", type=int, default=8, help="studies on each GPU")
    parser.add_argument("--tokens", type=int, default=200, help="of a study, prompt and report")
    parser.add_argument("--report-tokens", type=int, default=61, help="of them, the report's")
    options = parser.parse_args()
    print(format_table(options.preset, options.batch_size, options.tokens, options.report_tokens))
    cached = cache_bytes(OTDRGConfig.from_preset(options.preset).text_config, 3 * 12, options.tokens + 40)
    print(f"\nGeneration, 3 beams of 12 studies: keys and values {cached / GIB:.1f} GiB")


if __name__ == "__main__":
    main()
