"""The attention that is chosen by device and type."""

import pytest
import torch
from otdrg.inference.attention import RECOMPUTED, use_fastest_attention
from torch import nn
from transformers import Dinov2Config, Dinov2Model, LlamaConfig, LlamaForCausalLM

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


def llama(implementation):
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=50, intermediate_size=64, num_key_value_heads=2, **SIZES)
    model = LlamaForCausalLM(config).eval()
    model.set_attn_implementation(implementation)
    return model


def test_recomputed_attention_equals_eager_with_padding_and_grouped_heads():
    ids = torch.randint(0, 50, (3, 11), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    found = []
    for kind in ("eager", RECOMPUTED):
        model = llama(kind)
        loss = model(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss
        loss.backward()
        found.append([loss, *(weight.grad for weight in model.parameters())])
    for one, other in zip(*found, strict=True):
        assert torch.allclose(one, other, atol=1e-6)


def test_recomputed_attention_generates_as_eager():
    ids = torch.randint(0, 50, (3, 6), generator=torch.Generator().manual_seed(1))
    arguments = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "num_beams": 2, "do_sample": False}
    assert torch.equal(llama("eager").generate(ids, **arguments), llama(RECOMPUTED).generate(ids, **arguments))


def test_recomputed_attention_of_an_encoder_equals_sdpa():
    torch.manual_seed(0)
    model = Dinov2Model(Dinov2Config(image_size=28, patch_size=14, **SIZES)).eval()
    pixels = torch.randn(2, 3, 28, 28)
    found = []
    for kind in ("sdpa", RECOMPUTED):
        model.set_attn_implementation(kind)
        found.append(model(pixels).last_hidden_state)
    assert torch.allclose(*found, atol=1e-5)


def test_recomputed_attention_keeps_no_weights_for_the_backward_pass():
    kept = {}
    for kind in ("eager", RECOMPUTED):
        model, sizes = llama(kind), []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor, s=sizes: s.append(tensor.numel()) or tensor, lambda x: x
        ):
            model(torch.zeros(1, 200, dtype=torch.long), use_cache=False).logits.sum()
        kept[kind] = max(sizes)
    assert kept["eager"] >= 4 * 200 * 200 > kept[RECOMPUTED]


@pytest.mark.parametrize(("dtype", "chosen"), [(torch.bfloat16, RECOMPUTED), (torch.float32, "sdpa"), (None, "sdpa")])
def test_use_fastest_attention_on_a_cpu_depends_on_the_type(build_model, dtype, chosen):
    model, _ = build_model()
    model.language_model.set_attn_implementation("sdpa")
    use_fastest_attention(nn.ModuleList([model]), dtype)
    assert model.language_model.config._attn_implementation == chosen


def test_use_fastest_attention_keeps_an_implementation_that_was_asked_for(build_model):
    model, _ = build_model()
    model.language_model.set_attn_implementation("eager")
    use_fastest_attention(nn.ModuleList([model]), torch.bfloat16)
    assert model.language_model.config._attn_implementation == "eager"
