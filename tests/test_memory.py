"""The arithmetic of benchmarks/memory.py, against what small models are seen to hold."""

import sys
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import torch
from otdrg.training.model import cast_backbones, set_trained_parts
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

LORA = {"r": 4, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"]}


@pytest.fixture(scope="module")
def memory():
    path = Path(__file__).parents[1] / "benchmarks" / "memory.py"
    spec = spec_from_file_location("benchmark_of_memory", path)
    sys.modules[spec.name] = module_from_spec(spec)
    spec.loader.exec_module(sys.modules[spec.name])
    return sys.modules[spec.name]


@pytest.mark.parametrize("text", ["lora", "full"])
def test_weights_gradients_and_optimizer_to_the_byte(memory, build_model, views, text):
    model, processor = build_model()
    if text == "lora":
        model.config.lora = LORA
        model.add_lora()
    cast_backbones(model, "bfloat16")
    set_trained_parts(model, vision="frozen", text=text, predictor="frozen", joining=True)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    batch = processor(images=views[:2], report=["Clear lungs."] * 2, finding_states=[[1] * 13 + [0]] * 2)
    with torch.autocast("cpu", torch.bfloat16):
        model.train()(**batch).loss.backward()
    optimizer.step()

    def held(tensors):
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    needed = memory.memory(model.config, text)
    assert needed.frozen == held(weight for weight in model.parameters() if not weight.requires_grad)
    assert needed.trained == held(trained)
    # A LoRA matrix behind one that is still 0 has a gradient too.
    assert needed.gradients == held(weight.grad for weight in trained)
    moments = [state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    assert needed.optimizer == held(moments)


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
@pytest.mark.parametrize("bits", [4, 8])
def test_packed_weights_to_the_byte(memory, bits, tmp_path):
    from otdrg.training.model import quantization_config

    config = LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=192, num_hidden_layers=1)
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    packed = LlamaForCausalLM.from_pretrained(tmp_path, quantization_config=quantization_config(f"{bits}bit"))
    state = packed.model.layers[0].state_dict()
    held = sum(
        value.numel() * value.element_size()
        for name, value in state.items()
        if "layernorm" not in name and not name.endswith(("bitsandbytes__nf4", "weight_format"))
    )
    linears = [module for module in LlamaForCausalLM(config).model.modules() if isinstance(module, torch.nn.Linear)]
    assert sum(memory.packed_bytes(linear, bits) for linear in linears) == held


def kept_for_backward(model, batch_size, tokens, report_tokens):
    """Bytes that autograd keeps of a batch beside the model's own weights, each storage once."""
    own = {weight.untyped_storage().data_ptr() for weight in [*model.parameters(), *model.buffers()]}
    kept = {}

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    embeddings = torch.randn(batch_size, tokens, model.config.hidden_size)
    embeddings = embeddings.to(model.get_input_embeddings().weight.dtype).requires_grad_()
    mask = torch.ones(batch_size, tokens, dtype=torch.long)
    mask[0, -3:] = 0
    targets = torch.randint(0, model.config.vocab_size, (batch_size * report_tokens,))
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16),
    ):
        logits = model(inputs_embeds=embeddings, attention_mask=mask, logits_to_keep=report_tokens).logits
        F.cross_entropy(logits.float().flatten(0, 1), targets)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("rank", [8, None])
@pytest.mark.parametrize(
    ("hidden", "inner", "layers", "heads", "vocabulary", "shape"),
    [(64, 160, 2, 2, 512, (2, 48, 12)), (96, 256, 4, 4, 2000, (3, 40, 10)), (128, 352, 3, 8, 1000, (4, 64, 20))],
)
def test_activations_to_two_percent(memory, hidden, inner, layers, heads, vocabulary, shape, rank, checkpointing):
    from peft import LoraConfig, inject_adapter_in_model

    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
    )
    model = LlamaForCausalLM(config)
    if rank is not None:
        model.to(torch.bfloat16).requires_grad_(False)
        lora = LoraConfig(r=rank, lora_dropout=0.1, target_modules=["q_proj", "v_proj"])
        inject_adapter_in_model(lora, model)
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.data = weight.data.float()
    # Autocast's bfloat16 copies of trained weights are counted as copies, not here.
    linears = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    linears = [model.lm_head] if checkpointing else linears
    copies = sum(2 * module.weight.numel() for module in linears if module.weight.requires_grad)
    if checkpointing:
        model.gradient_checkpointing_enable()
    kept = kept_for_backward(model.train(), *shape)
    expected = memory.activation_bytes(config, *shape, lora_rank=rank, checkpointing=checkpointing)
    if checkpointing:
        # One layer at a time is kept in the backward pass, which is not run here.
        one, two = (
            memory.activation_bytes(
                LlamaConfig(**{**config.to_dict(), "num_hidden_layers": count}), *shape, lora_rank=rank
            )
            for count in (1, 2)
        )
        expected -= two - one
    assert kept == pytest.approx(expected + copies, rel=0.02)


def test_gpus_are_counted_from_what_a_process_needs(memory):
    needed = memory.Memory(0, 60 * memory.GIB, 20 * memory.GIB, 40 * memory.GIB, 30 * memory.GIB, 3 * memory.GIB, 0)
    assert needed.total() == 153 * memory.GIB and needed.total(4, shared=True) == 33 * memory.GIB
    assert memory.gpus_needed(needed, shared=False, gib=80) is None
    assert memory.gpus_needed(needed, shared=True, gib=80) == 2
    assert memory.gpus_needed(needed, shared=True, gib=24) == 7
    assert memory.gpus_needed(needed, shared=True, gib=3) is None
