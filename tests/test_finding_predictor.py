"""The label predictor: heads, blocks of the encoder, poolings, tags and indications."""

import numpy as np
import pytest
import torch
from otdrg import FINDINGS, OTDRGConfig, OTDRGForReportGeneration, OTDRGProcessor
from otdrg.inference.collation import FindingCollator
from otdrg.inference.digests import encoder_digest
from otdrg.pipeline_otdrg import ReportGenerationPipeline
from otdrg.predictor_otdrg import OTDRGFindingPredictor
from otdrg.training.model import set_trained_parts
from otdrg.vision_otdrg import encode_pixels, encoder_blocks
from torch.nn import functional as F

SIZE = 6
DINOV2 = {
    "model_type": "dinov2",
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 56,
    "patch_size": 14,
}
TIMM_VIT = {
    "model_type": "timm_wrapper",
    "architecture": "vit_tiny_patch16_224",
    "model_args": {"depth": 3, "embed_dim": 32, "num_heads": 2, "img_size": 56, "patch_size": 14},
}


def predictor_of(**fields):
    torch.manual_seed(0)
    predictor = OTDRGFindingPredictor(OTDRGConfig(**fields), SIZE).eval()
    with torch.no_grad():
        for parameter in predictor.parameters():
            parameter.normal_()
    return predictor


@pytest.fixture
def tokens():
    """Features (2, 2, 4, 6) of two studies, of which the second has one view, and their mask."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, 2, 4, SIZE, generator=generator), torch.tensor([[True, True], [True, False]])


@pytest.fixture(scope="module")
def reading(build_model):
    """A model that reads indications in its predictor alone. Shared: do not change it."""
    return build_model(indication_reader="predictor", predictor_heads=2)


@pytest.mark.parametrize("pooling", ["attention", "mean", "transport"])
def test_finding_predictor_heads_average_the_probabilities_of_single_ones(tokens, pooling):
    several = predictor_of(predictor_heads=3, predictor_pooling=pooling)
    probabilities = []
    for head in range(3):
        single = predictor_of(predictor_pooling=pooling)
        weights = {}
        for name, weight in several.state_dict().items():
            per_head = name.startswith(("queries", "classifier"))
            weights[name] = weight.chunk(3)[head] if per_head else weight
        single.load_state_dict(weights)
        probabilities.append(single(*tokens).finding_logits.softmax(dim=-1))
    expected = torch.stack(probabilities).mean(dim=0)
    assert torch.allclose(several(*tokens).finding_logits.exp(), expected, atol=1e-5)


def test_finding_predictor_old_weights_give_the_old_logits(tokens):
    predictor = predictor_of()
    features, mask = predictor.norm(tokens[0]).flatten(1, 2), tokens[1].repeat_interleave(4, dim=1)
    classifier = predictor.classifier.weight.reshape(14, 4, 2 * SIZE)
    for study in range(2):
        there = features[study, mask[study]]
        for finding in range(14):
            attention = (there @ predictor.key.weight.T + predictor.key.bias) @ predictor.queries.weight[finding]
            pooled = torch.cat(((attention / SIZE**0.5).softmax(dim=0) @ there, there.mean(dim=0)))
            logits = classifier[finding] @ pooled + predictor.classifier.bias.reshape(14, 4)[finding]
            assert torch.allclose(predictor(*tokens).finding_logits[study, finding], logits, atol=1e-4)


def test_finding_predictor_queries_start_large_and_words_at_zero(build_config):
    config = build_config(indication_reader="both")
    OTDRGProcessor.from_texts(["the lungs are clear"], config=config, vocab_size=300)
    predictor = OTDRGForReportGeneration(config).finding_predictor
    assert predictor.queries.weight.std() > 0.8 and not predictor.words.weight.any()


@pytest.mark.parametrize("pooling", ["attention", "mean", "transport"])
def test_token_weights_sum_to_one_and_skip_absent_views(tokens, pooling):
    weights = predictor_of(predictor_heads=2, predictor_pooling=pooling).token_weights(*tokens)
    assert weights.shape == (2, len(FINDINGS), 8)
    assert torch.allclose(weights.sum(dim=-1), torch.ones(2, len(FINDINGS)), atol=1e-5)
    assert (weights[1, :, 4:] == 0).all()


def test_transport_pooling_gives_each_token_its_share_of_the_mass(tokens):
    predictor = predictor_of(predictor_pooling="transport", predictor_iterations=500, predictor_epsilon=0.2)
    weights = predictor.token_weights(*tokens)
    # Both marginals are uniform, so that no token is preferred by all findings together.
    assert torch.allclose(weights.mean(dim=1)[0], torch.full((8,), 1 / 8), atol=1e-3)
    assert torch.allclose(weights.mean(dim=1)[1, :4], torch.full((4,), 1 / 4), atol=1e-3)


def test_transport_pooling_gradient_reaches_the_anchors(tokens):
    predictor = predictor_of(predictor_pooling="transport")
    predictor(*tokens).finding_logits.square().sum().backward()
    assert predictor.queries.weight.grad.abs().sum() > 0 and predictor.key.weight.grad.abs().sum() > 0


def test_transport_pooling_heatmaps_are_the_predictors_plan(build_model, views):
    model, processor = build_model(predictor_pooling="transport", dle=False, fiot=False)
    pipe = ReportGenerationPipeline(model=model, processor=processor)
    record = pipe([views[:2]], return_heatmaps=True, max_new_tokens=2)[0][0]
    with torch.no_grad():
        inputs = processor(images=[views[:2]])
        features = model.encode_views(inputs["pixel_values"], inputs["view_mask"])
        weights = model.finding_predictor.token_weights(features, inputs["view_mask"])
    expected = weights[0].reshape(14, 2, 2, 2) * 8
    for finding, name in enumerate(FINDINGS):
        assert np.allclose(record["heatmaps"][name], expected[finding], atol=1e-5)


def test_mean_pooling_standardises_by_the_training_studies():
    predictor = predictor_of(predictor_pooling="mean")
    features = 3 + 0.1 * torch.randn(64, 1, 4, SIZE, generator=torch.Generator().manual_seed(2))
    mask = torch.ones(64, 1, dtype=torch.bool)
    predictor.train()(features, mask)
    mean = predictor.norm(features).mean(dim=2)[:, 0]
    assert torch.allclose(predictor.standardize.running_mean, 0.1 * mean.mean(dim=0), atol=1e-5)
    # A batch of one study has no statistics: it is read as in evaluation, and changes none.
    before = predictor.standardize.running_var.clone()
    alone = predictor(features[:1], mask[:1]).finding_logits
    assert torch.equal(predictor.standardize.running_var, before)
    assert torch.allclose(alone, predictor.eval()(features[:1], mask[:1]).finding_logits, atol=1e-6)


def test_mean_pooling_dropout_is_drawn_for_each_head_and_shared_by_findings(tokens):
    predictor = predictor_of(predictor_pooling="mean", predictor_heads=2, predictor_dropout=0.5).train()
    with torch.no_grad():
        predictor.classifier.weight[:] = predictor.classifier.weight[:4].repeat(2 * len(FINDINGS), 1)
        predictor.classifier.bias.zero_()
    heads = predictor(*tokens).head_logits
    assert torch.allclose(heads, heads[:, :, :1].expand_as(heads), atol=1e-5)
    assert not torch.allclose(heads[:, 0], heads[:, 1])


# --- blocks of the encoder -------------------------------------------------------------------------------------------


def test_predictor_layers_are_the_encoders_hidden_states(build_model, views):
    model, processor = build_model(vision_config=DINOV2, predictor_layers=[1, 2])
    inputs = processor(images=[views[:2]])
    with torch.no_grad():
        features = model.encode_views(inputs["pixel_values"], inputs["view_mask"])
        report = model.encode_views(inputs["pixel_values"], inputs["view_mask"], reader="report")
        output = model.vision_tower(inputs["pixel_values"][0], output_hidden_states=True)
    assert features.shape == (1, 2, 4, 3 * 32) and torch.allclose(features[..., :32], report, atol=1e-6)
    for place, layer in enumerate((1, 2), start=1):
        grid = output.hidden_states[layer][:, 1:].reshape(2, 2, 2, 2, 2, 32).mean(dim=(2, 4)).reshape(2, 4, 32)
        expected = F.layer_norm(grid, (32,))
        assert torch.allclose(features[0, ..., place * 32 : (place + 1) * 32], expected, atol=1e-4)


@pytest.mark.parametrize(("encoder", "layers", "size"), [({}, [1], 16 + 32), ({"vision_config": DINOV2}, [2], 64)])
@pytest.mark.parametrize("own", [False, True])
def test_predictor_layers_leave_the_report_as_it_is(build_model, views, encoder, layers, size, own):
    fields = {**encoder, "predictor_encoder": "own" if own else "shared"}
    plain, processor = build_model(**fields)
    model, _ = build_model(**fields, predictor_layers=layers)
    kept = {name: weight for name, weight in plain.state_dict().items() if not name.startswith("finding_predictor.")}
    model.load_state_dict(kept, strict=False)
    inputs = processor(images=[views[0]], finding_states=torch.ones(1, 14, dtype=torch.long))
    inputs = model.expand_finding_text(**inputs)
    with torch.no_grad():
        assert torch.allclose(model(**inputs).logits, plain(**inputs).logits, atol=1e-4)
    assert model.finding_predictor.feature_size == size
    assert encoder_digest(model, processor) != encoder_digest(plain, processor)


def test_predictor_layers_the_encoder_does_not_have_are_an_error(build_model):
    with pytest.raises(ValueError, match=r"predictor_layers=\[4\]: expected blocks from 1 to 3"):
        build_model(vision_config=DINOV2, predictor_layers=[4])
    swin = {"model_type": "swin", "image_size": 56, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4]}
    with pytest.raises(ValueError, match=r"predictor_layers=\[1\]: expected null, this encoder's blocks cannot be"):
        build_model(vision_config=swin, predictor_layers=[1])


def test_patch_dropout_image_tokens_are_means_of_the_patches_that_are_left(build_model, views):
    model, processor = build_model(vision_config=DINOV2, predictor_layers=[1])
    tower, pixels = model.vision_tower, processor(images=[views[:2]])["pixel_values"][0]
    with torch.no_grad():
        torch.manual_seed(0)
        features, output = encode_pixels(tower, pixels, model.config, for_predictor=True, patch_dropout=0.25)
        torch.manual_seed(0)
        patches = (pixels.shape[-1] // 14) ** 2
        order = torch.rand(2, patches).argsort(dim=1)[:, : 3 * patches // 4]
        embedded = tower.embeddings(pixels)
        read = torch.stack([torch.cat((view[:1], view[1:][kept])) for view, kept in zip(embedded, order, strict=True)])
        expected = tower.layernorm(tower.encoder(read).last_hidden_state)[:, 1:]
    assert features.shape == (2, 4, 64) and output.last_hidden_state.shape[1] == 1 + 3 * patches // 4
    side = round(patches**0.5)
    for view in range(2):
        cells = order[view] // side // (side // 2) * 2 + order[view] % side // (side // 2)
        for cell in range(4):
            assert (cells == cell).any()
            assert torch.allclose(features[view, cell, :32], expected[view][cells == cell].mean(dim=0), atol=1e-5)


def test_patch_dropout_cell_without_patches_is_the_mean_of_the_others(build_model, views):
    model, processor = build_model(vision_config=DINOV2)
    pixels = processor(images=[views[:1]])["pixel_values"][0]
    with torch.no_grad():
        features, output = encode_pixels(model.vision_tower, pixels, model.config, patch_dropout=0.99)
    assert torch.allclose(features[0], output.last_hidden_state[0, 1].expand(4, -1), atol=1e-5)


def test_patch_dropout_is_for_training_only(build_model, views):
    model, processor = build_model(vision_config=DINOV2, predictor_encoder="own")
    inputs = processor(images=[views[:2]])
    inputs = {name: inputs[name] for name in ("pixel_values", "view_mask")}
    with torch.no_grad():
        before = model.encode_views(**inputs)
        model.patch_dropout = 0.75
        assert torch.equal(model.encode_views(**inputs), before)
        model.finding_vision_tower.train()
        dropped = model.encode_views(**inputs)
        model.finding_vision_tower.eval()
        assert torch.equal(model.encode_views(**inputs), before)
    assert torch.equal(dropped[..., :32], before[..., :32]) and not torch.allclose(dropped[..., 32:], before[..., 32:])


@pytest.mark.parametrize(
    ("encoder", "after"),
    [(DINOV2, ("encoder.layer.2.", "layernorm.")), (TIMM_VIT, ("timm_model.blocks.2.", "timm_model.norm."))],
)
def test_vision_layers_train_the_last_blocks_and_what_follows(build_model, encoder, after):
    model, _ = build_model(vision_config=encoder)
    frozen = set_trained_parts(model, vision="full", text="frozen", predictor="frozen", joining=False, vision_layers=1)
    tower = model.vision_tower
    assert {name for name, weight in tower.named_parameters() if weight.requires_grad} == {
        name for name, _ in tower.named_parameters() if name.startswith(after)
    }
    model.train()
    for part in frozen:
        part.eval()
    blocks = encoder_blocks(tower)
    assert [block.training for block in blocks] == [False, False, True] and tower.training


# --- supervision -----------------------------------------------------------------------------------------------------


def test_predictor_loss_supervises_every_head_and_the_tags(build_model, views):
    model, processor = build_model(predictor_heads=2)
    model.set_tags(["Spine", "Spine/degenerative", "Granuloma"])
    model.tag_weight = 2.0
    rows = [
        {"id": "a", "images": [views[0]], "finding_states": [0] * 14, "tags": ["Spine/degenerative/mild"]},
        {"id": "b", "images": [views[1]], "finding_states": [1] * 14, "tags": None},
    ]
    batch = FindingCollator(processor, model.config.predictor_tags)(rows)
    assert batch["tag_labels"].tolist() == [[1, 1, 0], [-100, -100, -100]]
    loss = model.train()(**batch).predictor_loss
    without = model(**{name: value for name, value in batch.items() if name != "tag_labels"}).predictor_loss
    prediction = model.read_study(batch["pixel_values"], batch["view_mask"], supervised=True).prediction
    targets = torch.tensor([1.0, 1.0, 0.0]).expand(2, 3)
    entropy = F.binary_cross_entropy_with_logits(prediction.tag_logits[0], targets)
    assert torch.allclose(loss, without + 2 * entropy, atol=1e-5)
    loss.backward()
    for name, parameter in model.finding_predictor.named_parameters():
        gradient = parameter.grad if "norm" in name or "key" in name else parameter.grad.unflatten(0, (2, -1))
        assert (gradient.flatten(1).abs().sum(dim=1) > 0).all() if gradient.ndim > 1 else True, name
    model.set_tags(None)
    assert model.config.predictor_tags is None
    assert not any("tag" in name for name, _ in model.named_parameters())


# --- indications -----------------------------------------------------------------------------------------------------


def test_indication_absent_changes_nothing(reading, views):
    model, processor = reading
    with torch.no_grad():
        model.finding_predictor.words.weight.normal_()
        alone = model(**processor(images=[views[0], views[1]])).finding_logits
        both = model(**processor(images=[views[0], views[1]], indication=["chest pain", None])).finding_logits
    assert not torch.allclose(both[0], alone[0]) and torch.allclose(both[1], alone[1], atol=1e-6)


def test_indication_words_are_hashed_alike_whatever_their_case_and_order(reading):
    _, processor = reading
    ids = processor.encode_indications(["Chest PAIN, 50", "chest pain.", "cough", ""])["indication_ids"]
    assert ids.shape == (4, 3) and torch.equal(ids[0], ids[1])
    assert (ids >= 0).sum(dim=1).tolist() == [3, 3, 1, 0]
    assert processor.encode_indications([None, ""]) == {}


@pytest.mark.parametrize(
    ("reader", "in_prompt", "hashed"), [("report", True, False), ("predictor", False, True), ("both", True, True)]
)
def test_indication_reader_says_who_reads_it(processor, views, reader, in_prompt, hashed):
    fields = {name: getattr(processor, name) for name in ("image_tokens", "view_fusion", "dle", "fiot", "finding_text")}
    own = OTDRGProcessor(
        processor.image_processor,
        processor.tokenizer,
        chat_template=processor.chat_template,
        indication_reader=reader,
        **fields,
    )
    inputs = own(images=[views[0]], indication="cough")
    assert ("cough" in own.decode(inputs["input_ids"][0])) == in_prompt
    assert ("indication_ids" in inputs) == hashed


def test_indication_reaches_the_states_of_generate_and_pipeline(reading, views):
    model, processor = reading
    with torch.no_grad():
        model.finding_predictor.words.weight.zero_()
        ids = processor.encode_indications(["cough"])["indication_ids"][0]
        model.finding_predictor.words.weight[ids] += torch.eye(4)[3].repeat(14) * 100
    pipe = ReportGenerationPipeline(model=model, processor=processor)
    findings = pipe(views[0], indication="cough", max_new_tokens=2)[0]["findings"]
    assert all(finding["state"] == "unclear" for name, finding in findings.items() if name != "no_finding")
    steered = model.generate(**processor(images=[views[0]], indication="cough"), max_new_tokens=4)
    states = torch.full((1, 14), 3)
    states[0, -1] = model.read_study(
        **{name: processor(images=[views[0]])[name] for name in ("pixel_values", "view_mask")}, indication_ids=ids[None]
    ).finding_states[0, -1]
    assert torch.equal(steered, model.generate(**processor(images=[views[0]], finding_states=states), max_new_tokens=4))


# --- calibration ------------------------------------------------------------------------------------------------------


def test_finding_calibration_scales_the_log_odds_and_keeps_the_other_states_proportions(build_model):
    pairs = [[0.5 + finding / 10, finding / 10 - 1] for finding in range(14)]
    model, _ = build_model(finding_calibration=pairs)
    plain, _ = build_model()
    logits = 3 * torch.randn(50, 14, 4, generator=torch.Generator().manual_seed(3))
    before, after = plain.finding_probabilities(logits).double(), model.finding_probabilities(logits).double()
    slope, intercept = torch.tensor(pairs, dtype=torch.double).unbind(dim=-1)
    expected = torch.sigmoid(slope * torch.logit(before[..., 1]) + intercept)
    assert torch.allclose(after[..., 1], expected, atol=1e-5)
    others = before * (1 - expected)[..., None] / (1 - before[..., 1])[..., None]
    assert torch.allclose(after[..., [0, 2, 3]], others[..., [0, 2, 3]], atol=1e-5)
    assert (after[:, -1, 2:] == 0).all()
    assert torch.equal(model.predict_states(logits), model.finding_probabilities(logits).argmax(dim=-1))


def test_finding_calibration_leaves_logits_and_features_as_they_are(build_model, views):
    model, processor = build_model(finding_calibration=[[2.0, 5.0]] * 14)
    plain, _ = build_model()
    plain.load_state_dict(model.state_dict())
    inputs = processor(images=[views[0]])
    with torch.no_grad():
        assert torch.equal(model(**inputs).finding_logits, plain(**inputs).finding_logits)
    assert encoder_digest(model, processor) == encoder_digest(plain, processor)


# --- a grid of its own -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fusion", ["mean", "concat"])
@pytest.mark.parametrize("own", [False, True])
def test_predictor_grid_leaves_the_report_as_it_is(build_model, views, own, fusion):
    fields = {"vision_config": DINOV2, "predictor_encoder": "own" if own else "shared", "view_fusion": fusion}
    plain, processor = build_model(**fields)
    model, _ = build_model(**fields, predictor_grid=4)
    model.load_state_dict(plain.state_dict())
    inputs = processor(images=[views[:2], views[2]], finding_states=torch.ones(2, 14, dtype=torch.long))
    inputs = model.expand_finding_text(**inputs)
    with torch.no_grad():
        output, expected = model(**inputs), plain(**inputs)
        encoded, coarse = (
            one.get_image_features(inputs["pixel_values"], inputs["view_mask"]) for one in (model, plain)
        )
    assert torch.allclose(output.logits, expected.logits, atol=1e-4)
    assert torch.allclose(output.transport_plan, expected.transport_plan, atol=1e-5)
    assert torch.allclose(encoded.last_hidden_state, coarse.last_hidden_state, atol=1e-5)
    assert torch.allclose(output.image_outputs.last_hidden_state, coarse.last_hidden_state, atol=1e-5)
    for mine, theirs in zip(encoded.pooler_output, coarse.pooler_output, strict=True):
        assert torch.allclose(mine, theirs, atol=1e-4)
    written, other = (one.generate(**inputs, max_new_tokens=4) for one in (model, plain))
    assert torch.equal(written, other)


@pytest.mark.parametrize("pooling", ["attention", "transport"])
def test_predictor_grid_the_predictor_reads_the_encoders_finer_grid(build_model, views, pooling):
    model, processor = build_model(vision_config=DINOV2, predictor_grid=4, predictor_pooling=pooling)
    inputs = processor(images=[views[:2]])
    with torch.no_grad():
        features = model.encode_views(inputs["pixel_values"], inputs["view_mask"])
        tokens = model.vision_tower(inputs["pixel_values"][0]).last_hidden_state[:, 1:]
        assert torch.allclose(features[0], tokens, atol=1e-5), "row by row, as the encoder's own tokens"
        logits = model.finding_predictor(features, inputs["view_mask"]).finding_logits
        assert torch.allclose(model(**inputs).finding_logits, logits, atol=1e-4)
        lift = model.predictor_lift(features, inputs["view_mask"])
        weights = model.finding_predictor.token_weights(features, inputs["view_mask"])
    assert lift.shape == (1, 2, 14, 4, 4)
    assert torch.allclose(lift[0, 1, 3, 2, 1], 32 * weights[0, 3, 16 + 2 * 4 + 1], atol=1e-5)
    pipe = ReportGenerationPipeline(model=model, processor=processor)
    heatmap = pipe([views[:2]], return_heatmaps=True, max_new_tokens=2)[0][0]["heatmaps"]["edema"]
    assert heatmap.shape == ((2, 4, 4) if pooling == "transport" else (2, 2, 2))


def test_predictor_grid_may_be_that_of_an_earlier_block(build_model, views):
    plain, processor = build_model(image_tokens=49)
    model, _ = build_model(image_tokens=49, predictor_grid=14, predictor_layers=[1])
    kept = {name: weight for name, weight in plain.state_dict().items() if not name.startswith("finding_predictor.")}
    model.load_state_dict(kept, strict=False)
    inputs = processor(images=[views[0]], finding_states=torch.ones(1, 14, dtype=torch.long))
    pixels, mask = inputs["pixel_values"], inputs["view_mask"]
    with torch.no_grad():
        features, report = model.encode_views(pixels, mask), model.encode_views(pixels, mask, reader="report")
        last = plain.encode_views(pixels, mask).reshape(7, 7, 32)
        block = model.vision_tower(pixels[0], output_hidden_states=True).hidden_states[0]
    # Each cell of the last, coarser grid stands four times.
    assert torch.allclose(features[..., :32].reshape(7, 2, 7, 2, 32), last[:, None, :, None], atol=1e-5)
    assert torch.equal(features[..., :32], report)
    assert torch.allclose(features[0, 0, :, 32:], F.layer_norm(block.flatten(2)[0].T, (16,)), atol=1e-4)
    inputs = model.expand_finding_text(**inputs)
    with torch.no_grad():
        assert torch.allclose(model(**inputs).logits, plain(**inputs).logits, atol=1e-4)


@pytest.mark.parametrize(
    ("fields", "grid", "finest"),
    [({"vision_config": DINOV2}, 8, 4), ({}, 14, 7), ({"predictor_layers": [1]}, 28, 14)],
)
def test_predictor_grid_finer_than_all_that_is_read_is_an_error(build_model, views, fields, grid, finest):
    model, processor = build_model(predictor_grid=grid, **fields)
    inputs = processor(images=[views[0]])
    with pytest.raises(ValueError, match=rf"predictor_grid={grid}: expected at most {finest}, .* of 56 x 56 pixels"):
        model.encode_views(inputs["pixel_values"], inputs["view_mask"])


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pooling", ["mean", "transport"])
def test_finding_predictor_options_survive_saving(build_model, views, tmp_path, pooling):
    fields = {"predictor_heads": 2, "predictor_layers": [1], "predictor_pooling": pooling, "predictor_grid": 4}
    model, processor = build_model(vision_config=DINOV2, indication_reader="both", **fields)
    inputs = processor(images=[views[:2]], indication="cough")
    for buffer in model.finding_predictor.buffers():
        if buffer.is_floating_point():
            buffer.uniform_(0.5, 1.5)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded = OTDRGForReportGeneration.from_pretrained(tmp_path).eval()
    again = OTDRGProcessor.from_pretrained(tmp_path)(images=[views[:2]], indication="cough")
    assert torch.equal(again["indication_ids"], inputs["indication_ids"])
    with torch.no_grad():
        inputs, again = (model.expand_finding_text(**batch) for batch in (inputs, again))
        torch.testing.assert_close(loaded(**again).finding_logits, model(**inputs).finding_logits)


def test_set_tags_keeps_the_type_of_the_weights(build_model):
    model, _ = build_model(predictor_pooling="mean")
    model.to(torch.bfloat16).set_tags(["a", "b"])
    predictor = model.finding_predictor
    features = torch.randn(2, 1, 4, predictor.feature_size, dtype=torch.bfloat16)
    assert predictor(features, torch.ones(2, 1, dtype=torch.bool)).tag_logits.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("predictor_heads", 0),
        ("predictor_layers", [0]),
        ("predictor_layers", [2, 2]),
        ("predictor_grid", 0),
        ("predictor_grid", 10),
        ("predictor_pooling", "max"),
        ("predictor_epsilon", 0),
        ("predictor_tags", []),
        ("indication_reader", "none"),
        ("finding_calibration", [[1.0, 0.0]] * 13),
        ("finding_calibration", [[1.0]] * 14),
        ("finding_calibration", [[1.0, float("nan")]] * 14),
    ],
)
def test_finding_predictor_impossible_option_is_an_error(field, value):
    with pytest.raises(ValueError, match=rf"OTDRGConfig\.{field}="):
        OTDRGConfig(**{field: value})
