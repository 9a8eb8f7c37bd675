"""Dropout of LoRA layers on a CPU."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from otdrg.training.dropout import FastDropout, use_fast_dropout
from peft import LoraConfig, inject_adapter_in_model
from torch import nn


@given(p=st.floats(0.05, 0.95), seed=st.integers(0, 1000))
def test_fast_dropout_keeps_the_share_and_the_mean(p, seed):
    torch.manual_seed(seed)
    kept = FastDropout(p).train()(torch.ones(20_000))
    share = (kept != 0).float().mean().item()
    assert abs(share - (1 - p)) < 0.02
    values = kept[kept != 0]
    assert torch.allclose(values, torch.full_like(values, 1 / (1 - p)), rtol=1e-3 if p < 0.95 else 1e-2)


def test_fast_dropout_drops_neighbours_independently():
    torch.manual_seed(0)
    dropped = (FastDropout(0.5).train()(torch.ones(40_000)) == 0).float().view(-1, 4)
    correlation = torch.corrcoef(dropped.T) - torch.eye(4)
    assert correlation.abs().max() < 0.05
    # Each of the four numbers drawn together is dropped as often.
    assert (dropped.mean(dim=0) - 0.5).abs().max() < 0.02


def test_fast_dropout_gradient_is_that_of_the_kept_values():
    torch.manual_seed(0)
    x = torch.randn(3, 7, requires_grad=True)
    y = FastDropout(0.3).train()(x)
    y.sum().backward()
    assert torch.allclose(x.grad * x, y)
    assert 0 < (y == 0).sum() < y.numel()


def test_fast_dropout_repeats_with_its_seed():
    drop, x = FastDropout(0.3).train(), torch.ones(99)
    drawn = []
    for _ in range(2):
        torch.manual_seed(5)
        drawn.append(drop(x))
    assert torch.equal(*drawn)


@pytest.mark.parametrize("p", [0.0, 1.0])
def test_fast_dropout_at_its_limits_is_that_of_torch(p):
    x = torch.randn(50)
    assert torch.equal(FastDropout(p).train()(x), nn.functional.dropout(x, p))


def test_fast_dropout_in_evaluation_changes_nothing():
    x = torch.randn(50)
    assert FastDropout(0.4).eval()(x) is x


def test_fast_dropout_under_autocast_rounds_once():
    torch.manual_seed(0)
    x = torch.randn(400)
    with torch.autocast("cpu", torch.bfloat16):
        y = FastDropout(0.1).train()(x.bfloat16().float())
    expected = (x.bfloat16().float() * (2**16 / (2**16 - round(0.1 * 2**16)))).bfloat16()
    assert y.dtype == torch.bfloat16
    assert torch.equal(y[y != 0], expected[y != 0])


def test_use_fast_dropout_replaces_the_dropout_of_lora_layers_only():
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.1))
    inject_adapter_in_model(LoraConfig(target_modules=["0"], lora_dropout=0.2), model)
    use_fast_dropout(model)
    assert [type(part).__name__ for part in model.modules() if isinstance(part, nn.Dropout)] == [
        "FastDropout",
        "Dropout",
    ]
    assert next(part for part in model.modules() if isinstance(part, FastDropout)).p == 0.2
