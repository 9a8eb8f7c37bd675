"""The formulas of benchmarks/scale.py, against what PyTorch counts, and the page that it writes."""

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def scale():
    spec = spec_from_file_location("benchmark_of_scale", FOLDER / "scale.py")
    sys.modules[spec.name] = module_from_spec(spec)
    spec.loader.exec_module(sys.modules[spec.name])
    return sys.modules[spec.name]


@pytest.fixture(scope="module")
def paper(scale):
    """Counts the preset `paper`, built without weights: 7 seconds, so the tests with it are slow ones."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OTDRG_MIMIC_CXR", "mimic_cxr")
        return scale.build_scale(scale.ASSUMPTIONS)


@pytest.mark.parametrize("key_heads", [1, 4])
@pytest.mark.parametrize("lora", [None, {"r": 4, "target_modules": ["q_proj", "v_proj"]}])
def test_llama_flops_equal_the_counted_ones(scale, lora, key_heads):
    from peft import LoraConfig, inject_adapter_in_model

    tokens, head_tokens = 24, 9
    config = LlamaConfig(
        vocab_size=200,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=key_heads,
        attn_implementation="eager",  # whose products are counted on every device
    )
    model = LlamaForCausalLM(config).requires_grad_(False)
    if lora is not None:
        inject_adapter_in_model(LoraConfig(**lora), model)
    inputs = torch.randn(1, tokens, config.hidden_size, requires_grad=True)
    with FlopCounterMode(display=False) as forward:
        logits = model(inputs_embeds=inputs, logits_to_keep=head_tokens, use_cache=False).logits
    with FlopCounterMode(display=False) as backward:
        logits.sum().backward()
    expected = scale.llama_flops(config, tokens, head_tokens, lora)
    assert forward.get_total_flops() == expected.forward
    assert backward.get_total_flops() == expected.backward


@pytest.mark.slow
def test_parameters_are_those_of_the_published_backbones(paper):
    assert paper.counts["language_model"] - paper.counts["lora"] == 6_738_415_616
    assert paper.counts["lora"] == 32 * 2 * 16 * (4096 + 4096)
    assert paper.counts["vision_tower"] == 86_743_224
    assert paper.vision == pytest.approx(2 * 15.4e9, rel=0.01)


@pytest.mark.slow
def test_backward_pass_through_frozen_weights_costs_one_forward_pass(paper):
    step = paper.report_step()
    assert step.backward == pytest.approx(step.forward, rel=0.02)


def test_more_gpus_divide_the_time_of_reading_and_computing(scale):
    stage = scale.Stage("", items=8 * 6400, tokens=0, flops=1e12, images=8 * 6400)
    one, eight = (stage.seconds(scale.ASSUMPTIONS, gpus, 12, "read_full") for gpus in (1, 8))
    assert one.best == pytest.approx(8 * eight.best) and one.worst >= one.best


def test_exchanged_bytes_of_two_gpus(scale):
    assert scale.ddp_bytes(10, gpus=1) == 0 and scale.ddp_bytes(10, gpus=2) == 40
    assert scale.fsdp_bytes(100, 10, gpus=2) == 120


@pytest.mark.slow
def test_page_is_what_the_script_prints(scale, paper):
    page = (FOLDER / "scale.md").read_text(encoding="utf-8")
    assert page == scale.format_page(paper), "run python benchmarks/scale.py > benchmarks/scale.md"
