"""State guidance: the scores are those of both prompts read anew, with caches, beams and samples."""

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from otdrg import FINDINGS
from otdrg.findings_otdrg import NOT_GIVEN
from otdrg.guidance_otdrg import PLAUSIBLE, drop_states, without_positives
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

NO_FINDING = FINDINGS.index("no_finding")


@pytest.fixture
def guided(processor, views):
    """Three studies with ragged views: two positive findings, none, and one beside denials."""
    states = torch.zeros(3, 14, dtype=torch.long)
    states[0, [1, 4, 6, 9, 11]] = 1
    states[1, NO_FINDING] = 1
    states[2, 8], states[2, [0, 9]] = 1, 2
    return processor(
        images=[views[:3], views[3], views[4:6]], indication=["a cough and fever", None, "pain"], finding_states=states
    )


class Recomputed(LogitsProcessor):
    """Guidance without a cache: the whole sequence is read anew, for both sets of states, at each step."""

    def __init__(self, model, inputs, scale):
        self.model, self.inputs, self.scale = model, inputs, scale

    def __call__(self, input_ids, scores):
        repeats = len(scores) // len(self.inputs["input_ids"])
        inputs = {name: value.repeat_interleave(repeats, dim=0) for name, value in self.inputs.items()}
        if not hasattr(self, "read"):
            self.read = input_ids.shape[1]
        new = input_ids[:, self.read :]
        inputs["input_ids"] = torch.cat((inputs["input_ids"], new), dim=1)
        inputs["attention_mask"] = torch.cat((inputs["attention_mask"], torch.ones_like(new)), dim=1)
        states = inputs["finding_states"]
        both = []
        for conditioning in (states, without_positives(states)):
            expanded = self.model.expand_finding_text(**{**inputs, "finding_states": conditioning})
            positions = (expanded["attention_mask"].cumsum(dim=1) - 1).clamp(min=0)
            both.append(self.model(**expanded, position_ids=positions).logits[:, -1].log_softmax(dim=-1))
        mixed = both[0] + (self.scale - 1) * (both[0] - both[1])
        limit = both[0].amax(dim=-1, keepdim=True) + torch.tensor(PLAUSIBLE).log()
        changed = (states != without_positives(states)).any(dim=1, keepdim=True)
        mixed = mixed.masked_fill(both[0] < limit, -torch.inf).log_softmax(dim=-1)
        return torch.where(changed, mixed, scores)


@pytest.mark.parametrize("beams", [1, 3])
def test_guidance_with_caches_equals_both_prompts_read_anew(model, guided, beams):
    arguments = {"do_sample": False, "num_beams": beams, "max_new_tokens": 8, "eos_token_id": -1}
    found = model.generate(**guided, **arguments, guidance_scale=40.0)
    processors = LogitsProcessorList([Recomputed(model, dict(guided), 40.0)])
    assert torch.equal(found, model.generate(**guided, **arguments, logits_processor=processors))
    plain = model.generate(**guided, **arguments)
    assert not torch.equal(found[[0, 2]], plain[[0, 2]])
    assert torch.equal(found[1], plain[1])  # no positive finding


def test_guidance_scale_of_one_changes_nothing(model, guided):
    arguments = {"do_sample": False, "max_new_tokens": 8}
    assert torch.equal(model.generate(**guided, **arguments), model.generate(**guided, **arguments, guidance_scale=1))


def test_guidance_samples_only_plausible_tokens(model, guided):
    torch.manual_seed(0)
    first = guided["input_ids"].shape[1]
    sampled = model.generate(
        **guided, do_sample=True, top_k=0, max_new_tokens=1, num_return_sequences=50, guidance_scale=2.0
    )
    states = guided["finding_states"]
    likely = model(**model.expand_finding_text(**guided)).logits[:, -1].softmax(dim=-1)
    for study in range(3):
        if (states[study] != without_positives(states[study : study + 1])[0]).any():
            tokens = sampled[50 * study : 50 * (study + 1), first]
            assert (likely[study, tokens] >= PLAUSIBLE * likely[study].max() * 0.999).all()


def test_guidance_scale_of_the_generation_config_is_used(model, guided):
    arguments = {"do_sample": False, "max_new_tokens": 8}
    expected = model.generate(**guided, **arguments, guidance_scale=3.0)
    model.generation_config.guidance_scale = 3.0
    try:
        assert torch.equal(model.generate(**guided, **arguments), expected)
    finally:
        model.generation_config.guidance_scale = None


def test_guidance_predicts_the_states_where_they_are_not_given(model, guided):
    inputs = {name: value for name, value in guided.items() if name != "finding_states"}
    states = model.predict_states(model(**inputs).finding_logits)
    arguments = {"do_sample": False, "max_new_tokens": 8, "guidance_scale": 3.0}
    expected = model.generate(**inputs, finding_states=states, **arguments)
    assert torch.equal(model.generate(**inputs, **arguments), expected)


@pytest.mark.parametrize("scale", [0.5, float("inf"), float("nan")])
def test_guidance_scale_that_is_impossible_is_refused(model, guided, scale):
    with pytest.raises(ValueError, match=r"guidance_scale=.*: expected a number of at least 1"):
        model.generate(**guided, guidance_scale=scale)


def test_guidance_without_finding_states_is_refused(build_model, views):
    model, processor = build_model(dle=False, fiot=False)
    with pytest.raises(ValueError, match=r"guidance_scale=2: expected 1, .*dle=False"):
        model.generate(**processor(images=views[:1]), guidance_scale=2)


def test_guidance_of_a_prompt_without_views_is_refused(model, guided):
    embeddings, mask = model.get_prompt_embeddings(**guided)
    with pytest.raises(ValueError, match=r"guidance_scale=2: expected 1 where a prompt is given without views"):
        model.generate(inputs_embeds=embeddings, attention_mask=mask, guidance_scale=2)


def test_guidance_of_assisted_decoding_is_refused(model, guided):
    with pytest.raises(ValueError, match=r"guidance_scale=2: expected 1 with prompt_lookup_num_tokens"):
        model.generate(**guided, guidance_scale=2, prompt_lookup_num_tokens=2)
    with pytest.raises(ValueError, match=r"guidance_scale=2: expected 1 with assistant_model"):
        model.generate(**guided, guidance_scale=2, assistant_model=model)


def test_generate_with_a_config_warns_of_no_argument_that_was_not_given(model, guided, caplog):
    transformers.logging.enable_propagation()
    config = GenerationConfig(max_new_tokens=2, guidance_scale=1.5)
    model.generate(**guided, generation_config=config)
    assert "deprecated" not in caplog.text
    assert config.guidance_scale == 1.5


def test_without_positives_keeps_denials_and_gives_no_positive_and_no_normal():
    states = torch.tensor([[1, 2, 0, 3, *[0] * 9, 0], [0, 2, 0, 3, *[0] * 9, 0], [*[0] * 13, 1]])
    expected = torch.tensor([[NOT_GIVEN, 2, 0, 3, *[0] * 9, NOT_GIVEN], [0, 2, 0, 3, *[0] * 9, 0], [*[0] * 13, 1]])
    assert torch.equal(without_positives(states), expected)


@given(ratio=st.floats(0, 0.9), seed=st.integers(0, 1000))
@settings(max_examples=20)
def test_drop_states_drops_the_ratio_and_no_finding_only_beside_another(ratio, seed):
    torch.manual_seed(seed)
    states = torch.randint(0, 4, (2000, 14))
    found = drop_states(states, ratio)
    dropped = found == NOT_GIVEN
    assert torch.equal(found[~dropped], states[~dropped])
    assert dropped[:, :NO_FINDING].float().mean().item() == pytest.approx(ratio, abs=0.02)
    beside = dropped[:, :NO_FINDING].any(dim=1)
    assert not dropped[~beside, NO_FINDING].any()
    if beside.sum() > 500:
        assert dropped[beside, NO_FINDING].float().mean().item() == pytest.approx(0.5, abs=0.1)
