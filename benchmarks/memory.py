"""Compute the memory of the report stage: what a preset needs on a GPU, and how many GPUs it needs.

    python benchmarks/memory.py
    python benchmarks/memory.py --preset small --batch-size 8 --tokens 200

Weights, gradients and optimizer states are counted on the model itself, built on the device `meta`. Activations are
what a LLaMA layer keeps for the backward pass under bfloat16 autocast, with scaled-dot-product attention.
`tests/test_memory.py` compares both with runs of small models.
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
#: Share of a GPU's memory that is left for CUDA, memory fragmentation and communication buffers; an assumption.
RESERVED = 0.1

#: Name: how the LLM is trained, bits of its frozen weights, whether the weights are partitioned among processes.
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
        frozen: frozen weights.
        trained: trained weights, in float32.
        gradients: gradients of the trained weights.
        optimizer: the two moments of AdamW.
        copies: bfloat16 copies of the trained weights, made by autocast for each step.
        activations: what is kept for the backward pass, and the logits.
        largest: the largest layer or embedding of the LLM, in the type in which it is gathered.
    """

    frozen: int
    trained: int
    gradients: int
    optimizer: int
    copies: int
    activations: int
    largest: int

    def total(self, processes: int = 1, shared: bool = False) -> float:
        """Bytes for each process; if weights are partitioned (`shared`), two layers are gathered at a time."""
        states = self.frozen + self.trained + self.gradients + self.optimizer
        if not shared:
            return states + self.copies + self.activations
        return states / processes + 2 * self.largest + self.activations


def build_weightless(config: OTDRGConfig, text: str) -> OTDRGForReportGeneration:
    """The model of the report stage on the device `meta`; only the LLM is trained, as `text` says."""
    if config.finding_text_token_ids is None:
        config.finding_text_token_ids = [[[0]] * len(FINDING_STATES)] * len(FINDINGS)
    lora, config.lora = config.lora, None
    with torch.device("meta"):
        model = OTDRGForReportGeneration(config)
        if text == "lora":
            config.lora = lora
            model.add_lora()
    cast_backbones(model, "bfloat16")
    # `from_pretrained` also loads the masks of Swin's windows, which are not saved, in the type of the weights.
    model.vision_tower.to(torch.bfloat16)
    set_trained_parts(model, vision="frozen", text=text, predictor="frozen", joining=True)
    return model


def packed_bytes(linear: nn.Linear, bits: int) -> int:
    """Bytes of a weight in bitsandbytes: NF4 with double quantisation (blocks of 64, then 256), or rows of int8."""
    count = linear.weight.numel()
    if bits == 8:
        return count + 4 * linear.out_features
    blocks = -(-count // 64)
    tables = 4 * (16 + 256)
    return -(-count // 2) + blocks + 4 * -(-blocks // 256) + tables


def activation_bytes(
    config, batch_size: int, tokens: int, report_tokens: int, lora_rank: int | None = None, checkpointing: bool = False
) -> int:
    """Bytes that a LLaMA keeps for the backward pass of a batch.

    Args:
        config: a `LlamaConfig` with as many key-value heads as heads.
        batch_size: number of studies.
        tokens: tokens per study, prompt and report together.
        report_tokens: tokens per study whose logits are needed.
        lora_rank: rank of LoRA on `q_proj` and `v_proj` of a frozen LLM; None if the whole LLM is trained.
        checkpointing: whether only the input of each layer is kept, and the activations of one layer at a time.
    """
    hidden, inner, heads = config.hidden_size, config.intermediate_size, config.num_attention_heads
    # Bytes per token. A frozen linear layer keeps nothing for its weights, and the hidden states are then bfloat16.
    if lora_rank is not None:
        layer, stream = 28 * hidden + 6 * inner + 4 * lora_rank, 2
    else:
        layer, stream = 34 * hidden + 8 * inner, 4
    # The normaliser of each head, those of the two norms, and a row of the attention mask.
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
    """Memory of the report stage on one process.

    Args:
        config: configuration of a model whose LLM is a LLaMA.
        text: "lora" or "full", as in a recipe.
        bits: bits of the frozen linear layers of the LLM: 16, 8 or 4.
        batch_size, tokens, report_tokens, checkpointing: see [`activation_bytes`].
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
    # The logits exist in bfloat16 and in float32, and their gradient in float32.
    activations += batch_size * report_tokens * llm.vocab_size * (2 + 4 + 4)
    parts = [*model.language_model.model.layers[:1], model.get_input_embeddings()]
    largest = max(sum(weight.numel() * 2 for weight in part.parameters()) for part in parts)
    return Memory(frozen, trained, trained, 2 * trained, trained // 2, activations, largest)


def gpus_needed(needed: Memory, shared: bool, gib: int, most: int = 64) -> int | None:
    """The smallest sufficient number of GPUs with `gib` GiB each; None if no number is enough."""
    room = gib * GIB * (1 - RESERVED)
    if not shared:
        return 1 if needed.total() <= room else None
    return next((count for count in range(1, most + 1) if needed.total(count, shared=True) <= room), None)


def cache_bytes(config, sequences: int, tokens: int) -> int:
    """Bytes of keys and values during generation, in bfloat16."""
    heads = config.num_key_value_heads * (config.hidden_size // config.num_attention_heads)
    return sequences * tokens * config.num_hidden_layers * 2 * heads * 2


def format_table(preset: str, batch_size: int, tokens: int, report_tokens: int) -> str:
    """A Markdown table in GiB, one row for each way to train, with and without checkpointing."""
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
    parser.add_argument("--preset", default="paper", help="preset whose LLM is a LLaMA (default: paper)")
    parser.add_argument("--batch-size", type=int, default=8, help="studies on each GPU")
    parser.add_argument("--tokens", type=int, default=200, help="tokens per study, prompt and report together")
    parser.add_argument("--report-tokens", type=int, default=61, help="tokens of the report")
    options = parser.parse_args()
    print(format_table(options.preset, options.batch_size, options.tokens, options.report_tokens))
    cached = cache_bytes(OTDRGConfig.from_preset(options.preset).text_config, 3 * 12, options.tokens + 40)
    print(f"\nGeneration, 3 beams of 12 studies: keys and values {cached / GIB:.1f} GiB")


if __name__ == "__main__":
    main()
