"""What transformers expects of any model that sees and writes: outputs, lengths, caches, ways of decoding."""

import inspect
import re

import pytest
import torch
from otdrg import FINDINGS, OTDRGConfig, OTDRGForReportGeneration, modeling_otdrg, sinkhorn
from otdrg.generation_otdrg import CACHE
from torch.nn import functional as F
from transformers import Dinov2Config, DynamicCache, LlamaConfig, Trainer, TrainingArguments
from transformers.generation import GenerateBeamDecoderOnlyOutput, GenerateDecoderOnlyOutput
from transformers.modeling_outputs import BaseModelOutputWithPooling

IMAGE, FINDING, FINDING_TEXT = 3, 4, 5
BATCH, LENGTH, LAYERS, HEADS, SIZE, VOCABULARY, NEW = 3, 26, 2, 4, 32, 99, 4
GREEDY = {"do_sample": False, "max_new_tokens": NEW, "min_new_tokens": NEW, "return_dict_in_generate": True}


def make_config(**fields):
    vision = Dinov2Config(
        hidden_size=SIZE, num_hidden_layers=LAYERS, num_attention_heads=HEADS, image_size=28, patch_size=14
    )
    text = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=SIZE,
        intermediate_size=37,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=2,
        initializer_range=0.2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    fields = {"ot_contrastive_weight": 0.1, **fields}
    return OTDRGConfig(
        vision,
        text,
        image_size=28,
        image_tokens=4,
        image_token_id=IMAGE,
        finding_token_id=FINDING,
        finding_text_token_id=FINDING_TEXT,
        finding_text_token_ids=[[[6 + finding, 20 + state] for state in range(4)] for finding in range(len(FINDINGS))],
        **fields,
    )


def make_model(attention="sdpa", **fields):
    config = make_config(**fields)
    config._attn_implementation = attention
    torch.manual_seed(0)
    return OTDRGForReportGeneration(config).eval()


@pytest.fixture(scope="module")
def model():
    """Shared: do not change it."""
    return make_model()


@pytest.fixture(scope="module")
def eager():
    """The same with attention that gives its weights. Shared: do not change it."""
    return make_model("eager")


@pytest.fixture
def inputs():
    """Prompts without label text: image tokens, label tokens and words, as after `expand_finding_text`."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(30, VOCABULARY, (BATCH, LENGTH), generator=generator)
    ids[:, 1:5], ids[:, 5:19] = IMAGE, FINDING
    pixels = torch.randn(BATCH, 1, 3, 28, 28, generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


@pytest.fixture
def prompts(inputs):
    """Prompts with the place of the label text, of ragged lengths and padded on the left."""
    inputs["input_ids"][:, 19] = FINDING_TEXT
    inputs["input_ids"][1, 20:] = inputs["input_ids"][1, 20:].flip(0)
    inputs["input_ids"][0] = torch.cat((torch.zeros(2, dtype=torch.long), inputs["input_ids"][0, :-2]))
    inputs["attention_mask"][0, :2] = 0
    return inputs


def assert_same(one, other):
    """Two dictionaries of generate hold the same tokens and scores."""
    assert torch.equal(one.sequences, other.sequences)
    assert len(one.scores) == len(other.scores)
    for left, right in zip(one.scores, other.scores, strict=True):
        torch.testing.assert_close(left, right, atol=1e-4, rtol=1e-4)


# --- forward ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by_config", [False, True])
def test_forward_outputs_of_the_llm_have_the_length_of_the_prompt(inputs, by_config):
    model = make_model("eager")
    wanted = {"output_hidden_states": True, "output_attentions": True}
    if by_config:
        model.config.output_hidden_states = model.config.output_attentions = True
        wanted = {}
    with torch.no_grad():
        output = model(**inputs, **wanted)
    assert [state.shape for state in output.hidden_states] == [(BATCH, LENGTH, SIZE)] * (LAYERS + 1)
    assert [weights.shape for weights in output.attentions] == [(BATCH, HEADS, LENGTH, LENGTH)] * LAYERS
    assert make_model()(**inputs).hidden_states is None


@pytest.mark.parametrize("place", ["left in place", "written out"])
def test_forward_logits_and_cache_keep_the_length_they_are_given(model, prompts, place):
    given = model.expand_finding_text(**prompts) if place == "written out" else prompts
    with torch.no_grad():
        output = model(**given, use_cache=True)
    length = given["input_ids"].shape[1]
    assert output.logits.shape == (BATCH, length, VOCABULARY)
    assert output[CACHE].get_seq_length() == length
    assert (length == LENGTH) == (place == "left in place")


def test_forward_with_a_placeholder_of_the_label_text_warns(model, prompts, caplog):
    from transformers.utils import logging

    logging.get_logger("transformers").propagate = True
    try:
        type(logging.get_logger("x")).warning_once.cache_clear()
        with torch.no_grad(), caplog.at_level("WARNING"):
            model(**model.expand_finding_text(**prompts))
            assert not caplog.messages
            model(**prompts)
    finally:
        logging.get_logger("transformers").propagate = False
    assert any("call model(**model.expand_finding_text(**inputs))" in message for message in caplog.messages)


def test_forward_without_labels_has_logits_first_and_no_loss(model, inputs):
    with torch.no_grad():
        output, labelled = model(**inputs), model(**inputs, labels=inputs["input_ids"])
    assert torch.equal(output[0], output.logits)
    for name in ("loss", "report_loss", "ot_loss", "plan_entropy", "label_spread"):
        assert getattr(output, name) is None and labelled[name].isfinite(), name
    assert torch.equal(output.transport_plan, labelled.transport_plan)
    assert torch.equal(labelled[0], labelled.loss)


@pytest.mark.parametrize("labels", [False, True])
def test_forward_as_a_tuple_holds_what_the_dictionary_holds(eager, inputs, labels):
    more = {"labels": inputs["input_ids"]} if labels else {}
    more |= {"output_hidden_states": True, "output_attentions": True}
    with torch.no_grad():
        as_tuple, as_dictionary = eager(**inputs, **more, return_dict=False), eager(**inputs, **more)
    assert isinstance(as_tuple, tuple) and len(as_tuple) == len(as_dictionary)
    for one, other in zip(as_tuple, as_dictionary.to_tuple(), strict=True):
        if isinstance(one, torch.Tensor):
            assert torch.equal(one, other)


@pytest.mark.skipif(CACHE != "cache", reason="transformers before 5.24 calls the cache past_key_values")
def test_forward_past_key_values_is_a_deprecated_name_of_cache(model, inputs):
    with torch.no_grad():
        new = model(**inputs, use_cache=True, cache=DynamicCache(config=model.config.text_config))
        with pytest.warns(FutureWarning, match="`past_key_values` is deprecated"):
            old = model(**inputs, use_cache=True, past_key_values=DynamicCache(config=model.config.text_config))
    assert torch.equal(old.logits, new.logits)
    assert old.cache.get_seq_length() == new.cache.get_seq_length() == LENGTH


@pytest.mark.parametrize("fields", [{}, {"fiot": False}, {"dle": False, "fiot": False}])
def test_forward_of_embeddings_is_that_of_their_ids(inputs, fields):
    model = make_model(**fields)
    if fields:
        inputs["input_ids"][:, 5:19] = 40
    with torch.no_grad():
        expected = model(**inputs)
        embeddings = model.get_input_embeddings()(inputs.pop("input_ids"))
        found = model(**inputs, inputs_embeds=embeddings)
    assert torch.equal(found.logits, expected.logits)


def test_forward_of_embeddings_with_features_in_place_reads_them_as_they_are(model, inputs):
    with torch.no_grad():
        expected = model(**inputs)
        embeddings, mask = model.get_prompt_embeddings(**inputs)
        torch.testing.assert_close(model(inputs_embeds=embeddings, attention_mask=mask).logits, expected.logits)
        pixels = inputs["pixel_values"]
        again = model(inputs_embeds=embeddings, attention_mask=mask, pixel_values=pixels)
    torch.testing.assert_close(again.logits, expected.logits)


def test_forward_of_a_left_padded_prompt_is_that_of_the_prompt(model, inputs):
    def positions(mask):
        return (mask.cumsum(dim=-1) - 1).masked_fill(mask == 0, 1)

    padded = {
        **inputs,
        "input_ids": F.pad(inputs["input_ids"], (32, 0), value=0),
        "attention_mask": F.pad(inputs["attention_mask"], (32, 0), value=0),
    }
    with torch.no_grad():
        plain = model(**inputs, position_ids=positions(inputs["attention_mask"])).logits[:, -1]
        shifted = model(**padded, position_ids=positions(padded["attention_mask"])).logits[:, -1]
    torch.testing.assert_close(shifted, plain, atol=1e-5, rtol=1e-5)


def test_forward_gradients_reach_hidden_states_and_attentions(eager, inputs):
    output = eager(**inputs, output_hidden_states=True, output_attentions=True)
    kept = [output.hidden_states[0], output.attentions[0]]
    for value in kept:
        value.retain_grad()
    output[0].flatten()[0].backward()
    assert all(value.grad is not None for value in kept)
    eager.zero_grad()


@pytest.mark.parametrize("training", [False, True])
def test_forward_shift_labels_are_the_labels_one_place_earlier(inputs, training):
    model = make_model().train(training)
    labels = inputs["input_ids"].clone()
    labels[:, :20] = -100
    with torch.no_grad():
        by_labels = model(**inputs, labels=labels)
        by_targets = model(**inputs, shift_labels=F.pad(labels[:, 1:], (0, 1), value=-100))
        other = model(**inputs, labels=labels, shift_labels=torch.full_like(labels, 7))
    assert torch.equal(by_labels.loss, by_targets.loss)
    assert not torch.allclose(other.loss, by_labels.loss)


@pytest.mark.parametrize("fields", [{}, {"fiot": False}, {"finding_text": "none"}, {"finding_tokens": "transported"}])
@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_base_model_gives_the_states_that_the_head_turns_into_logits(prompts, side, fields):
    model = make_model(**fields)
    if fields == {"fiot": False}:
        prompts["input_ids"][prompts["input_ids"] == FINDING] = 40
    prompts["input_ids"][0] = prompts["input_ids"][0].roll(-2)  # not padded
    prompts["attention_mask"][0] = 1
    if fields == {"finding_text": "none"}:
        prompts["input_ids"][:, 19] = 41
    states = torch.randint(0, 4, (BATCH, 14), generator=torch.Generator().manual_seed(1))
    states[:, -1], states[2] = 0, 0  # the last study has no label text
    amount = {"left": (3, 0), "right": (0, 3), "both": (2, 5)}[side]
    rows = [
        F.pad(torch.stack([prompts["input_ids"][row], prompts["attention_mask"][row]]), amount) for row in (0, 1, 2)
    ]
    rows[1] = rows[1][:, amount[0] :] if side == "left" else rows[1]
    length = max(row.shape[1] for row in rows)
    rows = [F.pad(row, (length - row.shape[1], 0)) for row in rows]
    ids, mask = torch.stack(rows).unbind(dim=1)
    inputs = {"pixel_values": prompts["pixel_values"], "finding_states": states}
    with torch.no_grad():
        found = model.base_model(input_ids=ids, attention_mask=mask, **inputs).last_hidden_state
        assert found.shape == (BATCH, ids.shape[1], SIZE)
        for row in range(BATCH):
            alone = ids[row, mask[row].bool()][None]
            one = {name: value[row : row + 1] for name, value in inputs.items()}
            written = model.expand_finding_text(input_ids=alone, **one)
            logits = model(**written).logits[0]
            place, size = int((alone[0] == FINDING_TEXT).int().argmax()), logits.shape[0] - alone.shape[1]
            # One state for each token; the place of the label text is where the text ends.
            kept = [*range(place), *range(place + size, len(logits))] if FINDING_TEXT in alone else range(len(logits))
            expected = model.get_output_embeddings()(found[row, mask[row].bool()])
            torch.testing.assert_close(expected, logits[list(kept)], atol=1e-4, rtol=1e-4)


def test_base_model_passes_gradients_and_is_otherwise_the_llm(model, prompts):
    model.base_model(**prompts).last_hidden_state.sum().backward()
    for part in (model.vision_tower, model.image_projector, model.label_projector, model.language_model.model):
        assert any(weight.grad is not None and weight.grad.any() for weight in part.parameters())
    assert all(weight.grad is None for weight in model.finding_predictor.parameters())
    model.zero_grad()
    assert model.base_model.get_decoder() is model.language_model.get_decoder() and model.get_decoder() is not None
    with pytest.raises(ValueError, match="no image: pixel_values is missing"):
        model.base_model(input_ids=prompts["input_ids"])


def test_views_of_zeros_are_missing_where_there_is_no_mask(model):
    pixels, mask = torch.randn(2, 3, 3, 28, 28), torch.tensor([[True, True, False], [True, False, False]])
    pixels[~mask] = 0
    with torch.no_grad():
        with_mask, without = model.read_study(pixels, mask), model.read_study(pixels)
    assert torch.equal(without.view_mask, mask)
    assert torch.equal(without.view_features, with_mask.view_features)
    assert torch.equal(without.finding_logits, with_mask.finding_logits)
    pixels[1] = 0
    with pytest.raises(ValueError, match="a study has no image"):
        model.read_study(pixels)


def test_forward_starts_with_the_main_input():
    names = list(inspect.signature(OTDRGForReportGeneration.forward).parameters)
    assert names[1] == OTDRGForReportGeneration.main_input_name == "input_ids"


# --- image features --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("view_fusion", ["mean", "concat"])
def test_get_image_features_gives_features_of_each_study(view_fusion):
    model = make_model("eager", view_fusion=view_fusion)
    pixels, mask = torch.randn(2, 3, 3, 28, 28), torch.tensor([[True, True, False], [True, False, False]])
    with torch.no_grad():
        output = model.get_image_features(pixel_values=pixels, view_mask=mask)
        features = model.encode_views(pixels, mask)
    assert isinstance(output, BaseModelOutputWithPooling)
    assert torch.equal(output.last_hidden_state, features) and features.shape == (2, 3, 4, SIZE)
    views = [2, 1] if view_fusion == "concat" else [1, 1]
    assert [tokens.shape for tokens in output.pooler_output] == [(4 * count, SIZE) for count in views]
    assert output.hidden_states is None
    with torch.no_grad():
        more = model.get_image_features(pixels, mask, output_hidden_states=True, output_attentions=True)
        as_tuple = model.get_image_features(pixels, mask, return_dict=False)
    assert [state.shape[0] for state in more.hidden_states] == [3] * (LAYERS + 1)
    assert [weights.shape[:2] for weights in more.attentions] == [(3, HEADS)] * LAYERS
    assert torch.equal(more.last_hidden_state, features)
    assert isinstance(as_tuple, tuple) and torch.equal(as_tuple[0], features)


def test_forward_returns_the_image_outputs(model, inputs):
    with torch.no_grad():
        output = model(**inputs).image_outputs
        expected = model.get_image_features(inputs["pixel_values"])
    assert torch.equal(output.last_hidden_state, expected.last_hidden_state)
    assert torch.equal(torch.stack(output.pooler_output), torch.stack(expected.pooler_output))


# --- the label text, before forward ----------------------------------------------------------------------------------


@pytest.mark.parametrize("finding_text", ["mentioned", "all"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_expand_finding_text_moves_positions_labels_and_embeddings_with_the_tokens(inputs, finding_text, side):
    model = make_model(finding_text=finding_text)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    ids[:, 19] = FINDING_TEXT
    if side == "left":
        mask[0, :1] = 0
    else:
        mask[0, -3:] = 0
    states = torch.randint(0, 4, (BATCH, 14), generator=torch.Generator().manual_seed(1))
    states[:, -1], states[2] = 0, 0
    arguments = {
        "input_ids": ids,
        "attention_mask": mask,
        "position_ids": (mask.cumsum(dim=-1) - 1).clamp(min=0),
        "inputs_embeds": model.get_input_embeddings()(ids).detach(),
        "finding_states": states,
    }
    if side == "right":
        arguments["labels"] = torch.where(torch.arange(LENGTH) > 21, ids, -100).masked_fill(mask == 0, -100)
    expanded = model.expand_finding_text(**arguments)
    new_ids, new_mask = expanded["input_ids"], expanded["attention_mask"].bool()
    table = model.config.finding_text_token_ids
    for row in range(BATCH):
        named = range(14) if finding_text == "all" else states[row].nonzero().flatten().tolist()
        text = [token for finding in named for token in table[finding][states[row, finding]]]
        given = ids[row][mask[row].bool()].tolist()
        at = given.index(FINDING_TEXT)
        assert new_ids[row][new_mask[row]].tolist() == given[:at] + text + given[at + 1 :]
        assert expanded["position_ids"][row][new_mask[row]].tolist() == list(range(int(new_mask[row].sum())))
        assert new_mask[row].tolist() == sorted(new_mask[row].tolist(), reverse=side == "right")
    embeddings = model.get_input_embeddings()(new_ids)
    assert torch.equal(expanded["inputs_embeds"][new_mask], embeddings[new_mask])
    if side == "right":
        learned = expanded["labels"] != -100
        assert learned.sum() == (arguments["labels"] != -100).sum()
        assert torch.equal(new_ids[learned], expanded["labels"][learned])


def test_expand_finding_text_predicts_what_is_not_given_and_keeps_what_is(model, prompts):
    with torch.no_grad():
        logits = model(pixel_values=prompts["pixel_values"]).finding_logits
        expanded = model.expand_finding_text(**prompts)
        assert torch.equal(expanded["finding_states"], model.condition_states(logits))
        assert "pixel_values" not in expanded and "labels" not in expanded
        given = torch.full((BATCH, 14), -1)
        given[0, 4] = 1
        partly = model.expand_finding_text(**prompts, finding_states=given)["finding_states"]
        assert torch.equal(partly, model.condition_states(logits, given))
    # Where gradients are needed, forward encodes the views itself.
    assert "pixel_values" in model.expand_finding_text(**prompts, finding_states=given)


# --- generate --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize(
    ("arguments", "rows"),
    [
        ({}, 1),
        ({"do_sample": True, "num_return_sequences": 2}, 2),
        ({"num_beams": 2, "num_return_sequences": 2}, 2),
        ({"num_beams": 2, "do_sample": True}, 2),
    ],
    ids=["greedy", "sample", "beam", "beam sample"],
)
def test_generate_outputs_have_the_lengths_of_the_prompt(eager, inputs, use_cache, arguments, rows):
    wanted = {f"output_{name}": True for name in ("scores", "logits", "hidden_states", "attentions")}
    output = eager.generate(**inputs, **{**GREEDY, **arguments}, **wanted, use_cache=use_cache)
    kind = GenerateBeamDecoderOnlyOutput if "num_beams" in arguments else GenerateDecoderOnlyOutput
    assert isinstance(output, kind)
    assert output.sequences.shape == (BATCH * arguments.get("num_return_sequences", 1), LENGTH + NEW)
    assert len(output.scores) == len(output.logits) == len(output.hidden_states) == len(output.attentions) == NEW
    for step, (states, weights) in enumerate(zip(output.hidden_states, output.attentions, strict=True)):
        keys = LENGTH + step
        queries = keys if step == 0 or not use_cache else 1
        assert [state.shape for state in states] == [(BATCH * rows, queries, SIZE)] * (LAYERS + 1)
        assert [layer.shape for layer in weights] == [(BATCH * rows, HEADS, queries, keys)] * LAYERS
    if use_cache:
        assert output[CACHE if CACHE in output else "past_key_values"].get_seq_length() == LENGTH + NEW - 1


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("place", ["none", "left in place"])
def test_generate_from_embeddings_is_that_from_their_ids(model, inputs, beams, place):
    if place == "left in place":
        inputs["input_ids"][:, 19] = FINDING_TEXT
    arguments = {**GREEDY, "num_beams": beams, "output_scores": True}
    expected = model.generate(**inputs, **arguments)
    ids = inputs.pop("input_ids")
    embeddings = model.get_input_embeddings()(ids)
    assert_same(model.generate(input_ids=ids, inputs_embeds=embeddings, **inputs, **arguments), expected)
    alone = model.generate(inputs_embeds=embeddings, **inputs, **arguments)
    expected.sequences = expected.sequences[:, LENGTH:]
    assert_same(alone, expected)
    # What an engine reads that knows nothing of images.
    placed, mask = model.get_prompt_embeddings(ids, **inputs)
    assert_same(model.generate(inputs_embeds=placed, attention_mask=mask, **arguments), expected)


def test_generate_from_other_embeddings_gives_other_scores(model, inputs):
    ids = inputs["input_ids"]
    embeddings = model.get_input_embeddings()(ids)
    arguments = {**GREEDY, "output_scores": True}
    plain = model.generate(ids, inputs_embeds=embeddings, **arguments)
    other = model.generate(input_ids=ids, inputs_embeds=torch.rand_like(embeddings), **arguments)
    assert plain.sequences.shape == other.sequences.shape == (BATCH, LENGTH + NEW)
    assert not any(torch.allclose(one, two) for one, two in zip(plain.scores, other.scores, strict=True))


def test_forward_and_generate_states_without_views_are_refused(model, inputs):
    embeddings = model.get_input_embeddings()(inputs["input_ids"])
    for call in (model, model.generate):
        with pytest.raises(ValueError, match="no image: pixel_values is missing"):
            call(inputs_embeds=embeddings, finding_states=torch.zeros(BATCH, 14, dtype=torch.long))


@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")
@pytest.mark.parametrize("name", sorted({CACHE, "past_key_values"}))
def test_generate_continues_from_a_cache(model, inputs, name):
    arguments = {**GREEDY, "output_scores": True, "eos_token_id": -1, "pad_token_id": 0}
    whole = model.generate(**inputs, **arguments)
    first = model.generate(**inputs, **{**arguments, "max_new_tokens": NEW - 1, "min_new_tokens": 0})
    mask = F.pad(inputs["attention_mask"], (0, NEW - 1), value=1)
    last = model.generate(
        input_ids=first.sequences,
        attention_mask=mask,
        **{name: first.past_key_values},
        **{**arguments, "max_new_tokens": 1, "min_new_tokens": 0},
    )
    last.scores = first.scores + last.scores
    assert_same(last, whole)


@pytest.mark.parametrize("place", ["none", "left in place"])
@pytest.mark.parametrize("way", ["assistant", "prompt lookup", "static cache", "chunked prefill", "all logits"])
def test_generate_writes_the_same_in_another_way(inputs, way, place):
    model = make_model()
    model.generation_config.num_assistant_tokens = 2
    if place == "left in place":
        inputs["input_ids"][:, 19] = FINDING_TEXT
    if way == "chunked prefill":
        # Short label texts of equal length: all placeholders are in the first chunk.
        inputs["finding_states"] = torch.zeros(BATCH, 14, dtype=torch.long)
        inputs["finding_states"][:, 1] = 1
    # Some ways take one study at a time.
    one = {key: value[:1] for key, value in inputs.items()} if way in ("assistant", "prompt lookup") else inputs
    arguments = {**GREEDY, "output_scores": True, "eos_token_id": -1}
    more = {
        "assistant": {"assistant_model": model},
        "prompt lookup": {"prompt_lookup_num_tokens": 2},
        "static cache": {"cache_implementation": "static"},
        "chunked prefill": {"prefill_chunk_size": 24},
        "all logits": {"logits_to_keep": 0},
    }[way]
    del arguments["min_new_tokens"]
    assert_same(model.generate(**one, **arguments, **more), model.generate(**one, **arguments))


def test_generate_chunks_smaller_than_the_features_are_refused(model, prompts):
    with pytest.raises(ValueError, match=r"prefill_chunk_size=1: expected at least \d+, ") as refused:
        model.generate(**prompts, **GREEDY, prefill_chunk_size=1)
    least = int(re.search(r"least (\d+)", str(refused.value))[1])
    with pytest.raises(ValueError, match=f"expected at least {least}"):
        model.generate(**prompts, **GREEDY, prefill_chunk_size=least - 1)
    arguments = {**GREEDY, "output_scores": True}
    assert_same(
        model.generate(**prompts, **arguments, prefill_chunk_size=least), model.generate(**prompts, **arguments)
    )


def test_generate_takes_padding_of_given_prompts_for_padding(model, prompts):
    without = {name: value for name, value in prompts.items() if name != "attention_mask"}
    arguments = {**GREEDY, "output_scores": True}
    assert_same(model.generate(**without, **arguments), model.generate(**prompts, **arguments))


def test_expand_finding_text_refuses_shifted_labels(model, prompts):
    with pytest.raises(ValueError, match=r"shift_labels were given: expected labels"):
        model.expand_finding_text(**prompts, shift_labels=prompts["input_ids"])


@pytest.mark.parametrize(
    "fields",
    [
        {"predictor_pooling": "mean", "label_encoder": "table"},
        {"predictor_pooling": "attention"},
        {"predictor_pooling": "transport", "predictor_heads": 2},
    ],
)
def test_parts_that_are_offloaded_give_the_same(prompts, fields, tmp_path):
    """With `device_map`, parts without room in memory are read from disk, each when its `forward` is called."""
    model = make_model(**fields)
    expected = model.generate(**prompts, **GREEDY, output_scores=True)
    model.save_pretrained(tmp_path / "model")
    leaves = {name for name, module in model.named_modules() if not list(module.children())}
    kept = ("vision_tower", "language_model")
    disk = {name: "disk" for name in leaves if not name.startswith(kept) and model.get_submodule(name)._parameters}
    parts = {name: "cpu" for name, _ in model.named_children()}
    for devices in (dict.fromkeys(kept, "cpu") | disk, {**parts, "language_model": "disk"}):
        loaded = OTDRGForReportGeneration.from_pretrained(
            tmp_path / "model", device_map=devices, offload_folder=tmp_path / "offload"
        )
        assert_same(loaded.generate(**prompts, **GREEDY, output_scores=True), expected)


def test_stock_trainer_measures_the_loss(prompts, tmp_path):
    inputs = {name: list(value) for name, value in prompts.items()}
    rows = [{name: value[row] for name, value in inputs.items()} for row in range(BATCH)]
    rows = [{**row, "labels": row["input_ids"]} for row in rows]
    arguments = TrainingArguments(tmp_path, label_names=["labels"], report_to=[], use_cpu=True)
    trainer = Trainer(make_model(ot_contrastive_weight=0.0), arguments, eval_dataset=rows)
    assert trainer.evaluate()["eval_loss"] > 0


def test_generate_with_positions_moves_them_after_the_label_text(model, prompts):
    mask = prompts["attention_mask"]
    positions = (mask.cumsum(dim=-1) - 1).clamp(min=0)
    arguments = {**GREEDY, "output_scores": True}
    assert_same(model.generate(**prompts, position_ids=positions, **arguments), model.generate(**prompts, **arguments))


def test_generate_forwards_arguments_of_the_model(model, inputs):
    prepared = model.prepare_inputs_for_generation(inputs["input_ids"], output_attentions=True, custom=42)
    assert prepared["output_attentions"] is True and prepared["custom"] == 42
    assert "view_features" not in prepared


# --- what is computed ------------------------------------------------------------------------------------------------


def test_forward_without_labels_computes_no_loss(monkeypatch, inputs):
    model, calls = make_model(), []
    monkeypatch.setattr(modeling_otdrg, "sinkhorn", lambda *a, **k: calls.append(len(a[0])) or sinkhorn(*a, **k))
    predictions = []
    hook = model.finding_predictor.register_forward_hook(lambda *_: predictions.append(1))
    model.generate(**inputs, **GREEDY, num_beams=3)
    assert not calls and len(predictions) == 1
    hook.remove()
    with torch.no_grad():
        model(**inputs)
        assert calls == [BATCH]  # the plan, which is in the output
        model(**inputs, labels=inputs["input_ids"])
    assert calls[1:] == [BATCH, BATCH**2]  # the plan, and that of each image with each study's labels


# --- what does not fit -----------------------------------------------------------------------------------------------

STATES = torch.zeros(BATCH, 14, dtype=torch.long)


@pytest.mark.parametrize("call", ["forward", "generate", "get_prompt_embeddings", "expand_finding_text"])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input_ids": 1, "attention_mask": 1}, "pixel_values has 3 rows: expected 1, as many rows as input_ids"),
        ({"attention_mask": 2}, "attention_mask has 2 rows: expected 3, as many rows as input_ids"),
        ({"pixel_values": 1}, "pixel_values has 1 rows: expected 3, as many rows as input_ids"),
        ({"view_mask": torch.ones(2, 1, dtype=torch.bool)}, "view_mask has 2 rows: expected 3"),
        ({"pixel_values": None, "view_features": torch.zeros(4, 1, 4, SIZE)}, "view_features has 4 rows: expected 3"),
        ({"finding_states": STATES[:2]}, r"finding_states has shape \(2, 14\): expected \(3, 14\)"),
        ({"finding_states": STATES[:, :13]}, r"finding_states has shape \(3, 13\): expected \(3, 14\)"),
        (
            {"finding_states": STATES - 2},
            r"finding_states has \[-2\]: expected ids 0 to 3, 4 for not given, or -1 to pred",
        ),
        ({"finding_states": STATES + 5}, r"finding_states has \[5\]: expected ids 0 to 3"),
        ({"finding_states": STATES + 0.5}, r"finding_states has \[0.5\]: expected ids 0 to 3"),
        (
            {"finding_states": STATES + 2},
            r"finding_states has no_finding negative \(2\): expected unmentioned \(0\) or",
        ),
        ({"finding_states": STATES + 3}, r"finding_states has no_finding unclear \(3\)"),
    ],
)
def test_model_inputs_of_different_studies_or_impossible_states_are_refused(model, inputs, call, changes, message):
    for name, change in changes.items():
        inputs[name] = inputs[name][:change] if isinstance(change, int) else change
    inputs = {name: value for name, value in inputs.items() if value is not None}
    method = model if call == "forward" else getattr(model, call)
    with pytest.raises(ValueError, match=message) as error:
        method(**inputs)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (STATES[:2], r"finding_labels has shape \(2, 14\): expected \(3, 14\)"),
        (STATES - 1, r"finding_labels has \[-1\]: expected ids 0 to 3, or -100 to leave out"),
        (STATES + 4, r"finding_labels has \[4\]"),
    ],
)
def test_forward_impossible_finding_labels_are_refused(model, inputs, labels, message):
    with pytest.raises(ValueError, match=message):
        model(**inputs, finding_labels=labels)
    with pytest.raises(ValueError, match=message):
        model(pixel_values=inputs["pixel_values"], finding_labels=labels)
    assert model(**inputs, finding_labels=torch.full((BATCH, 14), -100)).predictor_loss == 0
