"""Findings that are not given to the LLM, images it does not read in training, and weighted tokens."""

import numpy as np
import pytest
import torch
from otdrg import FINDINGS, ReportGenerationPipeline
from otdrg.findings_otdrg import NEGATIVE, NOT_GIVEN, POSITIVE, parse_findings
from otdrg.metrics.faithfulness import contradictions
from torch.nn import functional as F

EDEMA, FRACTURE, NO_FINDING = map(FINDINGS.index, ("edema", "fracture", "no_finding"))


@pytest.fixture
def study(processor, views, reports):
    inputs = processor(images=[views[:2], views[2]], report=reports[:2])
    inputs["finding_states"] = torch.zeros(2, 14, dtype=torch.long)
    inputs["finding_states"][:, EDEMA] = POSITIVE
    inputs["finding_states"][:, FRACTURE] = NEGATIVE
    return dict(inputs)


def test_not_given_finding_has_no_text_no_mass_and_a_token_of_zeros(build_model, study):
    model, processor = build_model(ot_labels="all", finding_text="all")
    states = study["finding_states"].clone()
    states[:, EDEMA] = states[:, NO_FINDING] = NOT_GIVEN
    expanded = model.expand_finding_text(**{**study, "finding_states": states})
    text = processor.decode(expanded["input_ids"][0])
    assert "fracture: negative" in text and "edema" not in text and "no finding" not in text
    features = model.get_label_features(states)
    assert (features[:, [EDEMA, NO_FINDING]] == 0).all() and (features[:, FRACTURE] != 0).any()
    plan = model(**expanded).transport_plan
    assert (plan[..., [EDEMA, NO_FINDING]] == 0).all()
    assert torch.allclose(plan.sum(dim=1)[:, FRACTURE], torch.full((2,), 1 / 12), atol=1e-3)


def test_all_findings_not_given_writes_a_report(model, study):
    inputs = {name: value for name, value in study.items() if name != "labels"}
    inputs["finding_states"] = torch.full((2, 14), NOT_GIVEN)
    output = model(**model.expand_finding_text(**study) | {"finding_states": inputs["finding_states"]})
    assert output.loss.isfinite() and output.ot_loss == 0
    assert model.generate(**inputs, max_new_tokens=4).shape[0] == 2


def test_not_given_by_name_reaches_the_pipeline(model, processor, views):
    assert parse_findings({"Edema": "Not_Given", "no finding": 4}) == {EDEMA: NOT_GIVEN, NO_FINDING: NOT_GIVEN}
    with pytest.raises(ValueError, match="expected one of unmentioned, positive, negative, unclear, not_given"):
        parse_findings({"edema": "absent"})
    pipe = ReportGenerationPipeline(model=model, processor=processor)
    record = pipe(views[0], findings={"edema": "not given"}, max_new_tokens=4, return_contradictions=True)[0]
    assert record["findings"]["edema"] == {"state": "not_given", "probability": None}
    assert "edema" not in [one["finding"] for one in record["contradictions"]]


def test_not_given_findings_are_no_contradictions():
    given, said = np.full((1, 14), NOT_GIVEN), np.ones((1, 14), int)
    assert list(contradictions(given, said)) == []


def test_finding_state_dropout_is_for_training_reports_only(build_model, study):
    model, _ = build_model(finding_state_dropout=0.5)

    def states(**changes):
        return model.expand_finding_text(**{**study, **changes})["finding_states"]

    assert torch.equal(states(), study["finding_states"])
    model.train()
    assert (states() == NOT_GIVEN).any()
    assert torch.equal(states(labels=None), study["finding_states"])


def test_image_dropout_hides_the_image_from_the_llm_and_not_from_the_transport(build_model, study):
    model, _ = build_model(image_dropout=1 - 1e-9)
    other = {**study, "pixel_values": study["pixel_values"].flip(0).clone(), "view_mask": study["view_mask"]}
    other["pixel_values"][1, 1] = 0
    other["pixel_values"] = 1 - study["pixel_values"]

    def losses(inputs):
        output = model(**model.expand_finding_text(**inputs))
        return output.report_loss.item(), output.ot_loss.item()

    (report, transport), (changed_report, changed_transport) = losses(study), losses(other)
    assert report != pytest.approx(changed_report, abs=1e-6)
    model.train()
    model.vision_tower.eval()
    (report, hidden_transport), (changed_report, _) = losses(study), losses(other)
    assert report == pytest.approx(changed_report, abs=1e-6)
    assert hidden_transport == pytest.approx(transport, abs=1e-5) and transport != pytest.approx(changed_transport)


@pytest.mark.parametrize("training", [False, True])
def test_report_loss_with_label_weights_is_the_weighted_mean(build_model, study, training):
    model, _ = build_model()
    torch.manual_seed(0)
    weights = torch.rand(study["labels"].shape) * 3
    inputs = model.expand_finding_text(**study, label_weights=weights)
    with torch.no_grad():
        logits = model(**inputs).logits.log_softmax(dim=-1)
        found = model.train(training)(**inputs).report_loss.item()
    total = weight = 0.0
    # The weights stay with their tokens although the label text moves these.
    for row in range(2):
        tokens = study["labels"][row][study["labels"][row] != -100]
        own = weights[row][study["labels"][row] != -100]
        places = (inputs["labels"][row] != -100).nonzero().flatten() - 1
        total -= float((own * logits[row, places].gather(1, tokens[:, None])[:, 0]).sum())
        weight += float(own.sum())
    assert found == pytest.approx(total / weight, abs=1e-4)


def test_label_weights_without_labels_are_refused(model, study):
    inputs = model.expand_finding_text(**study)
    del inputs["labels"]
    with pytest.raises(ValueError, match="label_weights were given: expected labels beside them"):
        model(**inputs, label_weights=torch.ones_like(F.pad(inputs["input_ids"], (0, 0)), dtype=torch.float))
