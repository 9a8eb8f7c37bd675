"""Prior studies in the processor, the model, generation and the pipeline."""

import numpy as np
import pytest
import torch
from otdrg import OTDRGForReportGeneration, OTDRGProcessor
from otdrg.inference.loading import load_published
from otdrg.pipeline_otdrg import ReportGenerationPipeline


@pytest.fixture(scope="module")
def built(build_model):
    """A model and processor that read priors, in evaluation mode."""
    return {fusion: build_model(priors="both", max_prior_tokens=4, view_fusion=fusion) for fusion in ("mean", "concat")}


def logits_of(model, inputs, rows=slice(None)):
    with torch.no_grad():
        batch = {name: value[rows] for name, value in inputs.items()}
        output = model(**model.expand_finding_text(**batch))
    return output.logits


def last(logits):
    """The logits of the next token, of prompts padded on the left."""
    return logits[:, -1]


@pytest.mark.parametrize("fusion", ["mean", "concat"])
def test_model_absent_prior_changes_nothing(built, views, fusion):
    model, processor = built[fusion]
    studies, plain = [[views[0], views[1]], [views[2]]], {}
    plain = processor(images=studies)
    absent = processor(images=studies, prior_images=[None, []], prior_report=[None, ""])
    assert absent.keys() == plain.keys() and "prior_pixel_values" not in absent
    assert all(torch.equal(absent[name], plain[name]) for name in plain)
    given = processor(images=studies, prior_images=[None, [views[3], views[4]]])
    assert given["prior_view_mask"].tolist() == [[False, False], [True, True]]
    # The study without a prior, beside one that has one, in a batch of its own, and by a mask that is empty.
    alone = last(logits_of(model, processor(images=studies[:1])))
    torch.testing.assert_close(last(logits_of(model, plain))[:1], alone, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(last(logits_of(model, given))[:1], alone, rtol=1e-4, atol=1e-5)
    empty = {**plain, "prior_pixel_values": given["prior_pixel_values"], "prior_view_mask": torch.zeros(2, 2).bool()}
    assert torch.equal(logits_of(model, empty), logits_of(model, plain))
    # With a prior, the report's logits change and the predictor's do not.
    assert (last(logits_of(model, given))[1] - last(logits_of(model, plain))[1]).abs().max() > 1e-4
    with torch.no_grad():
        outputs = [model(**model.expand_finding_text(**inputs)) for inputs in (plain, given)]
    for name in ("finding_logits", "transport_plan"):
        torch.testing.assert_close(outputs[1][name], outputs[0][name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("fusion", ["mean", "concat"])
def test_model_prior_views_have_their_own_marked_tokens(built, views, fusion):
    model, processor = built[fusion]
    inputs = processor(images=[[views[0], views[1]]], prior_images=[[views[2], views[3]]])
    tokens = int((inputs["input_ids"] == processor.image_token_id).sum())
    assert tokens == processor.image_tokens * {"mean": 2, "concat": 4}[fusion]
    # The prior is no current view: the same pixels at the other place give another report, and so does the mark.
    swapped = processor(images=[[views[2], views[3]]], prior_images=[[views[0], views[1]]])
    logits = last(logits_of(model, inputs))
    assert (logits - last(logits_of(model, swapped))).abs().max() > 1e-4
    weight = model.prior_embedding.weight.detach().clone()
    with torch.no_grad():
        model.prior_embedding.weight.zero_()
        unmarked = last(logits_of(model, inputs))
        model.prior_embedding.weight.copy_(weight)
    assert (logits - unmarked).abs().max() > 1e-4


def test_model_without_priors_has_no_new_weights_and_refuses_priors(model, processor, views, built):
    assert not any("prior" in name for name in model.state_dict())
    assert "prior_embedding.weight" in built["mean"][0].state_dict()
    given = built["mean"][1].encode_priors([[views[0]]])
    with pytest.raises(ValueError, match=r"prior views were given: expected none.*OTDRGConfig\.priors='none'"):
        model(**model.expand_finding_text(**processor(images=[views[0]])), **given)
    with pytest.raises(ValueError, match=r"prior_images were given: expected none.*OTDRGProcessor\.priors='none'"):
        processor(images=[views[0]], prior_images=[views[1]])
    with pytest.raises(ValueError, match=r"prior_report was given: expected none.*OTDRGProcessor\.priors='none'"):
        processor(images=[views[0]], prior_report="Clear lungs.")


def test_processor_prior_report_is_cut_and_stands_before_the_indication(built, views):
    processor = built["mean"][1]
    inputs = processor(images=[views[0]], prior_report="No pneumothorax.\nThe heart is large.", indication="Cough")
    text = processor.tokenizer.decode(inputs["input_ids"][0])
    ids = processor.tokenizer.encode("No pneumothorax. The heart is large.", add_special_tokens=False)
    assert len(ids) > 4
    kept = processor.tokenizer.decode(ids[:4])
    assert f"Prior report: {kept}\nIndication: Cough\n" in text
    with pytest.raises(ValueError, match="prior_images has 2 entries for 1 studies: expected one each"):
        processor(images=[views[0]], prior_images=[views[1], views[2]])
    with pytest.raises(ValueError, match="text and prior_report were both given"):
        processor(images=[views[0]], text="Describe.", prior_report="Clear lungs.")
    with pytest.raises(ValueError, match="prior_report holds '<image>'"):
        processor(images=[views[0]], prior_report="<image>")


@pytest.mark.parametrize("fusion", ["mean", "concat"])
def test_generate_with_priors_is_the_same_by_every_way(built, views, fusion):
    """In a batch and alone, from pixels, from features and from embeddings, with beams, and without a prompt."""
    model, processor = built[fusion]
    studies, priors = [[views[0], views[1]], [views[2]]], [None, [views[3], views[4]]]
    inputs = processor(images=studies, prior_images=priors)
    arguments = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}

    def written(inputs, **more):
        sequences = model.generate(**inputs, **arguments, **more)
        return sequences[:, inputs["input_ids"].shape[1] :] if "input_ids" in inputs else sequences

    expected = written(inputs)
    for row in range(2):
        alone = processor(images=studies[row : row + 1], prior_images=priors[row : row + 1])
        assert torch.equal(written(alone), expected[row : row + 1])
    study = model.read_study(**{name: value for name, value in inputs.items() if name not in _PROMPT})
    prompt = {name: inputs[name] for name in _PROMPT}
    encoded = {**prompt, **study.encoded_views, "finding_states": study.finding_states}
    assert torch.equal(written(encoded), expected)
    assert torch.equal(written(inputs, use_cache=False), expected)
    assert torch.equal(written(inputs, num_beams=2), written(encoded, num_beams=2))
    # The default prompt of the model is that of the processor.
    without = {name: value for name, value in inputs.items() if name not in _PROMPT}
    assert torch.equal(model.generate(**without, **arguments)[:, -6:], expected)
    embeddings, mask = model.get_prompt_embeddings(**inputs)
    assert torch.equal(written({"inputs_embeds": embeddings, "attention_mask": mask}), expected)
    guided = written(inputs, guidance_scale=1.5)
    assert guided.shape == expected.shape


_PROMPT = ("input_ids", "attention_mask")


def test_saved_model_with_priors_reloads_equal(built, views, tmp_path):
    model, processor = built["mean"]
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded, its = load_published(tmp_path)
    assert isinstance(loaded, OTDRGForReportGeneration) and isinstance(its, OTDRGProcessor)
    assert (its.priors, its.max_prior_tokens, loaded.config.priors) == ("both", 4, "both")
    inputs = its(images=[views[0]], prior_images=[views[1]], prior_report=["Effusion."])
    torch.testing.assert_close(logits_of(loaded, inputs), logits_of(model, inputs))


def test_pipeline_study_with_prior_is_read(built, views):
    model, processor = built["mean"]
    pipe = ReportGenerationPipeline(model=model, processor=processor, tokenizer=processor.tokenizer)
    arguments = {"max_new_tokens": 5, "min_new_tokens": 5}
    studies = [
        {"images": [views[0]], "prior_images": [views[1], views[2]], "prior_report": "Clear lungs."},
        {"images": [views[0]]},
        {"images": [views[0]], "prior_images": [], "prior_report": ""},
        {"images": [views[3]], "prior_images": views[4]},
    ]
    batched = [record["generated_text"] for (record,) in pipe(studies, batch_size=4, **arguments)]
    assert batched == [pipe(study, **arguments)[0]["generated_text"] for study in studies]
    assert batched[1] == batched[2]
    inputs = processor(images=[views[0]], prior_images=[[views[1], views[2]]], prior_report=["Clear lungs."])
    sequences = model.generate(**inputs, **arguments)[:, inputs["input_ids"].shape[1] :]
    assert batched[0] == processor.batch_decode(sequences, skip_special_tokens=True)[0].strip()


def test_model_all_weights_get_gradients_without_a_prior_in_the_batch(built, views):
    model, processor = built["mean"]
    inputs = processor(images=[views[0]], report=["Clear lungs."], finding_states=np.zeros((1, 14), int))
    model.train()
    try:
        model(**model.expand_finding_text(**inputs)).loss.backward()
        gradient = model.prior_embedding.weight.grad
        assert gradient is not None and not gradient.any()
        given = processor(
            images=[views[0]] * 2,
            prior_images=[None, views[1]],
            report=["Clear lungs."] * 2,
            finding_states=np.zeros((2, 14), int),
        )
        model.zero_grad()
        model(**model.expand_finding_text(**given)).loss.backward()
        assert model.prior_embedding.weight.grad.abs().sum() > 0
        assert all(weight.grad.isfinite().all() for weight in model.parameters() if weight.grad is not None)
    finally:
        model.zero_grad()
        model.eval()


def test_model_learns_what_only_the_prior_tells(build_model, views):
    """Two studies with the same views and other priors: their reports are learned, and follow the priors."""
    model, processor = build_model(seed=1, priors="images")
    reports = ["The effusion is new.", "The effusion is unchanged."]
    priors = [[views[1]], [views[2]]]
    states = np.zeros((2, 14), int)
    batch = processor(images=[views[0]] * 2, prior_images=priors, report=reports, finding_states=states)
    batch = model.expand_finding_text(**batch)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    mark = model.prior_embedding.weight.detach().clone()
    model.train()
    for _ in range(150):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    model.eval()
    assert not torch.equal(model.prior_embedding.weight, mark)

    def written(prior_images):
        inputs = processor(images=[views[0]] * 2, prior_images=prior_images, finding_states=states)
        sequences = model.generate(**inputs, max_new_tokens=30)[:, inputs["input_ids"].shape[1] :]
        return processor.batch_decode(sequences, skip_special_tokens=True)

    assert written(priors) == reports
    assert written(priors[::-1]) == reports[::-1]
    without = written(None)
    assert without[0] == without[1]


def test_model_priors_without_masks_and_without_the_head_are_the_same(build_model, views):
    """As TRL's trainers call it: views of zeros do not exist, and the head is applied apart."""
    model, processor = build_model(priors="images")
    given = {"images": [[views[0]], [views[1]]], "prior_images": [None, [views[2]]]}
    inputs = processor(**given)
    processor.return_view_mask = False
    unmasked = processor(**given)
    assert inputs.keys() - unmasked.keys() == {"view_mask", "prior_view_mask"}
    logits = logits_of(model, inputs)
    torch.testing.assert_close(logits_of(model, unmasked), logits)
    with torch.no_grad():
        states = model.encode_prompt(**inputs).last_hidden_state
        torch.testing.assert_close(model.get_output_embeddings()(states)[:, -1], logits[:, -1], rtol=1e-4, atol=1e-5)
