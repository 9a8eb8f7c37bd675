"""Writing reports: caches, batches, beams, steering, and what is refused."""

import pytest
import torch
from otdrg import FINDINGS

EDEMA = FINDINGS.index("edema")
TEN = {"max_new_tokens": 10, "min_new_tokens": 10}
GREEDY = {"do_sample": False, **TEN}


@pytest.fixture
def prompts(processor, views):
    """Three studies with ragged views and prompts."""
    return processor(
        images=[views[:3], views[3], views[4:6]], indication=["a cough and fever since Monday", None, "pain"]
    )


@pytest.fixture
def calls(model):
    """How often the vision encoder ran."""
    counts = []
    hook = model.vision_tower.register_forward_hook(lambda *_: counts.append(1))
    yield counts
    hook.remove()


def placeholders(model):
    return [model.config.image_token_id, model.config.finding_token_id, model.config.finding_text_token_id]


@pytest.mark.parametrize("beams", [1, 3])
def test_generate_cached_equals_uncached(model, prompts, beams):
    cached = model.generate(**prompts, **GREEDY, num_beams=beams)
    uncached = model.generate(**prompts, **GREEDY, num_beams=beams, use_cache=False)
    assert torch.equal(cached, uncached)


@pytest.mark.parametrize(
    "arguments",
    [{"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}, {"do_sample": True, "num_return_sequences": 3}],
)
def test_generate_reads_a_prompt_once_for_all_its_sequences(model, prompts, arguments, monkeypatch):
    rows = []
    hook = model.language_model.register_forward_pre_hook(
        lambda _, args, kwargs: rows.append(tuple(kwargs["inputs_embeds"].shape[:2])), with_kwargs=True
    )
    torch.manual_seed(0)
    once = model.generate(**prompts, **{**GREEDY, **arguments})
    hook.remove()
    repeats = max(arguments.get("num_beams", 1), arguments.get("num_return_sequences", 1))
    assert rows[0][0] == 3 and rows[0][1] > 10
    assert set(rows[1:]) == {(3 * repeats, 1)}
    monkeypatch.setattr(type(model), "_sequences_per_prompt", lambda *_: 1)
    torch.manual_seed(0)
    assert torch.equal(once, model.generate(**prompts, **{**GREEDY, **arguments}))


def test_generate_outputs_of_beams_hold_what_each_reads_of_the_prompt(model, prompts):
    output = model.generate(**prompts, **GREEDY, num_beams=2, output_hidden_states=True, return_dict_in_generate=True)
    assert len(output.hidden_states[0][0]) == 6 and output.hidden_states[0][0].shape[1] > 10


def test_generate_greedy_equals_repeated_forward(model, prompts):
    """Greedy decoding, step by step, with the whole sequence run anew each time."""
    states = model.predict_states(model(**prompts).finding_logits)
    ids, mask = prompts["input_ids"], prompts["attention_mask"]
    for _ in range(4):
        inputs = {**prompts, "input_ids": ids, "attention_mask": mask, "finding_states": states}
        logits = model(**model.expand_finding_text(**inputs)).logits[:, -1]
        logits[:, placeholders(model)] = -torch.inf
        following = logits.argmax(dim=-1, keepdim=True)
        ids, mask = torch.cat((ids, following), dim=1), torch.cat((mask, torch.ones_like(following)), dim=1)
    assert torch.equal(model.generate(**prompts, do_sample=False, max_new_tokens=4, eos_token_id=-1), ids)


def test_generate_transported_finding_tokens_equal_repeated_forward(build_model, prompts):
    model, _ = build_model(finding_tokens="transported")
    test_generate_greedy_equals_repeated_forward(model, prompts)
    test_generate_cached_equals_uncached(model, prompts, beams=2)


@pytest.mark.parametrize("view_fusion", ["mean", "concat"])
@pytest.mark.parametrize("beams", [1, 3])
def test_generate_batch_equals_single_studies(build_model, views, view_fusion, beams):
    model, processor = build_model(view_fusion=view_fusion)
    studies, indications = [views[:3], views[3:4], views[4:6]], ["a cough and fever since Monday", None, "pain"]
    states = torch.full((3, 14), -1)
    states[0, :6], states[1] = 1, 0
    batch_inputs = processor(images=studies, indication=indications, finding_states=states)
    batch = model.generate(**batch_inputs, **GREEDY, num_beams=beams, output_scores=True, return_dict_in_generate=True)
    for row in range(3):
        inputs = processor(images=[studies[row]], indication=[indications[row]], finding_states=states[row : row + 1])
        alone = model.generate(**inputs, **GREEDY, num_beams=beams, output_scores=True, return_dict_in_generate=True)
        assert torch.equal(batch.sequences[row, -10:], alone.sequences[0, -10:])
        first = slice(row * beams, row * beams + 1)
        assert torch.allclose(batch.scores[0][first], alone.scores[0][:1], atol=1e-4)


def test_generate_sequences_begin_with_the_given_prompts(model, prompts):
    length = prompts["input_ids"].shape[1]
    for arguments, each in (
        ({}, 1),
        ({"num_beams": 3}, 1),
        ({"num_beams": 3, "num_return_sequences": 2}, 2),
        ({"do_sample": True, "num_return_sequences": 4}, 4),
    ):
        sequences = model.generate(**prompts, **TEN, **arguments)
        assert sequences.shape == (3 * each, length + 10)
        assert torch.equal(sequences[:, :length], prompts["input_ids"].repeat_interleave(each, dim=0))
    output = model.generate(**prompts, **TEN, return_dict_in_generate=True, output_scores=True)
    assert torch.equal(output.sequences, model.generate(**prompts, **TEN))
    assert len(output.scores) == 10
    assert torch.equal(model.generate(prompts.pop("input_ids"), **prompts, **TEN), output.sequences)


def test_generate_beams_are_ordered_and_differ(model, prompts):
    output = model.generate(
        **prompts, **TEN, num_beams=3, num_return_sequences=3, return_dict_in_generate=True, output_scores=True
    )
    scores = output.sequences_scores.reshape(3, 3)
    assert torch.equal(scores, scores.sort(dim=1, descending=True).values)
    for row in output.sequences.reshape(3, 3, -1):
        assert len({tuple(sequence.tolist()) for sequence in row}) == 3
    best = model.generate(**prompts, **TEN, num_beams=3)
    assert torch.equal(output.sequences[::3], best)


def test_generate_sampling_follows_the_seed(model, prompts):
    def sample(seed):
        torch.manual_seed(seed)
        return model.generate(**prompts, **TEN, do_sample=True, num_return_sequences=2)

    assert torch.equal(sample(1), sample(1))
    assert not torch.equal(sample(1), sample(2))
    first = sample(1).reshape(3, 2, -1)
    assert not torch.equal(first[:, 0], first[:, 1])


@pytest.mark.parametrize(
    "arguments",
    [{}, {"use_cache": False}, {"num_beams": 3}, {"num_return_sequences": 2, "do_sample": True}],
    ids=["greedy", "uncached", "beams", "samples"],
)
def test_generate_encodes_views_once(model, prompts, calls, arguments):
    model.generate(**prompts, **TEN, **arguments)
    assert len(calls) == 1
    features = model.encode_views(prompts["pixel_values"], prompts["view_mask"])
    del prompts["pixel_values"]
    assert model.generate(**prompts, view_features=features, **TEN).shape[0] in (3, 6)
    assert len(calls) == 2


@pytest.mark.parametrize("use_cache", [True, False])
def test_generate_predicts_states_once_before_decoding(model, prompts, use_cache):
    predicted = model(**prompts).finding_logits
    states = model.predict_states(predicted)
    scored = {**GREEDY, "return_dict_in_generate": True, "output_logits": True}
    expected = model.generate(**prompts, finding_states=states, **scored)
    seen = []

    def change_its_mind(module, inputs, output):
        seen.append(1)
        other = predicted.flip(0).roll(1, dims=-1)
        return output._replace(finding_logits=predicted if len(seen) == 1 else other)

    hook = model.finding_predictor.register_forward_hook(change_its_mind)
    try:
        found = model.generate(**prompts, **scored, use_cache=use_cache)
        assert torch.equal(found.sequences, expected.sequences)
        assert torch.allclose(torch.stack(found.logits), torch.stack(expected.logits), atol=1e-4)
    finally:
        hook.remove()


@pytest.mark.parametrize("view_fusion", ["mean", "concat"])
def test_generate_without_prompt_uses_the_default(build_model, views, view_fusion):
    model, processor = build_model(view_fusion=view_fusion)
    inputs = processor(images=[views[:3], views[3], views[4:6]])
    with_prompt = model.generate(**inputs, **GREEDY)
    del inputs["input_ids"], inputs["attention_mask"]
    without = model.generate(**inputs, **GREEDY)
    assert torch.equal(with_prompt, without)


def test_generate_without_an_image_is_refused(model, processor, prompts, calls):
    ids = processor.tokenizer("Describe the heart.", return_tensors="pt")["input_ids"]
    with pytest.raises(ValueError, match="no image: pixel_values is missing, and a report is never written from noth"):
        model.generate(input_ids=ids)
    with pytest.raises(ValueError, match="no image"):
        model.generate()
    with pytest.raises(ValueError, match="image tokens and image features do not match in row 0: tokens: 0, feat"):
        model.generate(input_ids=ids, pixel_values=prompts["pixel_values"][:1], max_new_tokens=2)


def test_generate_wrong_arguments_are_named(model, build_model, prompts, views):
    with pytest.raises(ValueError, match=r"finding_states has shape \(2, 14\): expected \(3, 14\)"):
        model.generate(**prompts, finding_states=torch.zeros(2, 14, dtype=torch.long))
    with pytest.raises(ValueError, match="findings"):
        model.generate(**prompts, findings={"edema": "positive"})
    blind, processor = build_model(dle=False, fiot=False)
    inputs = processor(images=views[:1])
    with pytest.raises(ValueError, match=r"finding_states were given, but OTDRGConfig.dle=False"):
        blind.generate(**inputs, finding_states=torch.zeros(1, 14, dtype=torch.long))


@pytest.mark.parametrize("arguments", [{}, {"use_cache": False}, {"num_beams": 3}, {"suppress_tokens": [7]}])
def test_generate_never_writes_placeholders(build_model, prompts, arguments):
    """A new embedding row can be as likely as a word; written, it would be taken for a place of a feature."""
    model, _ = build_model()

    def prefer_placeholders(module, inputs, output):
        output[..., placeholders(model)] += 1e3
        output[..., 7] += 100
        return output

    model.get_output_embeddings().register_forward_hook(prefer_placeholders)
    written = model.generate(**prompts, **GREEDY, **arguments)[:, prompts["input_ids"].shape[1] :]
    assert not torch.isin(written, torch.tensor(placeholders(model))).any()
    assert (written == 7).any() == ("suppress_tokens" not in arguments)


class Collector:
    def __init__(self):
        self.pieces, self.ended = [], False

    def put(self, value):
        self.pieces.append(value.reshape(-1).tolist())

    def end(self):
        self.ended = True


def test_generate_streamer_receives_every_token(model, processor, views):
    inputs, streamer = processor(images=[views[:2]]), Collector()
    sequence = model.generate(**inputs, **GREEDY, streamer=streamer)[0]
    assert streamer.ended
    assert [token for piece in streamer.pieces[1:] for token in piece] == sequence[
        inputs["input_ids"].shape[1] :
    ].tolist()
    assert len(streamer.pieces) == 11


def test_generate_bfloat16_has_the_right_length(build_model, processor, views):
    model, _ = build_model()
    inputs = processor(images=[views[:2], views[2]])
    assert model.to(torch.bfloat16).generate(**inputs, **TEN).shape == (2, inputs["input_ids"].shape[1] + 10)


# --- a model that has learned to listen ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(build_model, views, reports):
    """A model that learned to write the report of its states and nothing of its images; states and reports by id."""
    model, processor = build_model()
    states = torch.zeros(2, 14, dtype=torch.long)
    states[1, EDEMA] = 1
    expected = {0: reports[0], 1: reports[1]}
    inputs = processor(
        images=[[views[0]], views[1:3], [views[0]], views[1:3]],
        report=[expected[0], expected[0], expected[1], expected[1]],
        finding_states=states[[0, 0, 1, 1]],
    )
    inputs = model.expand_finding_text(**inputs)
    torch.manual_seed(0)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(100):
        optimizer.zero_grad()
        output = model(**inputs)
        output.loss.backward()
        optimizer.step()
        if output.report_loss < 0.05:
            break
    return model.eval(), processor, states, expected


def written(model, processor, **inputs):
    prompts = processor(**inputs)
    sequences = model.generate(**prompts, max_new_tokens=80, do_sample=False)
    return processor.batch_decode(sequences[:, prompts["input_ids"].shape[1] :], skip_special_tokens=True)


def test_generate_given_states_change_the_report(trained, views):
    model, processor, states, expected = trained
    for image in ([views[0]], views[1:3]):
        for row in (0, 1):
            assert written(model, processor, images=[image], finding_states=states[row : row + 1]) == [expected[row]]
    by_name = [{"edema": "unmentioned"}, {"edema": "positive"}]
    calm = {name: "unmentioned" for name in FINDINGS}
    both = written(model, processor, images=views[:2], finding_states=[{**calm, **names} for names in by_name])
    assert both == [expected[0], expected[1]]


def test_generate_report_ends_with_the_end_of_text(trained, views):
    model, processor, states, _ = trained
    prompts = processor(images=views[:2], finding_states=states)
    sequences = model.generate(**prompts, max_new_tokens=200, do_sample=False)
    assert sequences.shape[1] < prompts["input_ids"].shape[1] + 200
    eos = processor.tokenizer.eos_token_id
    assert (sequences[:, prompts["input_ids"].shape[1] :] == eos).sum(dim=1).tolist() == [1, 1]


def test_generate_predicted_states_decide_the_report(trained, views):
    """What the predictor says, and only that, decides where the caller says nothing."""
    model, processor, states, expected = trained
    for row in (0, 1):
        logits = torch.nn.functional.one_hot(states[row : row + 1], 4) * 9.0
        hook = model.finding_predictor.register_forward_hook(
            lambda *_, logits=logits: _[2]._replace(finding_logits=logits)
        )
        try:
            assert written(model, processor, images=[views[0]]) == [expected[row]]
        finally:
            hook.remove()


def test_generate_beyond_the_positions_of_the_llm_is_refused(build_model, views, reports):
    model, processor = build_model(text_config={"model_type": "gpt2", "n_embd": 32, "n_head": 2, "n_positions": 256})
    prompts = processor(images=views[:2], indication=[None, "cough " * 10], finding_states=[{"edema": "positive"}] * 2)
    longest = int(model.get_prompt_embeddings(**prompts)[1].sum(dim=1).max())
    rest = 256 - longest
    message = f"a prompt of {longest} tokens and {rest + 1} new ones: expected at most 256 together, the positions of"
    for arguments in ({"max_new_tokens": rest + 1}, {"max_length": 257}, {"max_new_tokens": rest + 1, "num_beams": 2}):
        with pytest.raises(ValueError, match=message):
            model.generate(**prompts, **arguments)
    filled = model.generate(**prompts, max_new_tokens=rest, min_new_tokens=rest)
    assert filled.shape[1] == prompts["input_ids"].shape[1] + rest
    with pytest.raises(ValueError, match=r"a prompt of \d+ tokens and 20 new ones"):
        model.generate(**processor(images=views[:1], indication=["cough " * 60]))
    rows = processor(images=views[:1], report=[" ".join(reports * 3)])
    with pytest.raises(ValueError, match=r"a prompt and its report of \d+ tokens: expected at most 256, the pos"):
        model(**model.expand_finding_text(**rows))
