"""The image-to-text pipeline, over every kind of input."""

import copy
import sys
import warnings

import datasets
import numpy as np
import pytest
import torch
from otdrg import FINDING_STATES, FINDINGS, ReportGenerationPipeline
from otdrg.bank_otdrg import ReportBank, pool_views, probe_features
from otdrg.consensus_otdrg import ConsensusDecoder, ConsensusSettings, store_settings
from otdrg.labelers import UnreadReportsWarning, load_labeler
from PIL import Image
from transformers import GenerationConfig, pipeline

FEW = {"max_new_tokens": 5, "min_new_tokens": 5}


@pytest.fixture(scope="module")
def pipe(model, processor):
    return ReportGenerationPipeline(model=model, processor=processor)


@pytest.fixture
def paths(views, tmp_path):
    for number, view in enumerate(views):
        Image.fromarray(view).save(tmp_path / f"{number}.png")
    return [str(tmp_path / f"{number}.png") for number in range(len(views))]


@pytest.fixture
def singles(pipe, paths):
    """Reports of three ragged studies, one by one."""
    return [pipe([study], **FEW)[0] for study in (paths[:3], paths[3:4], paths[4:6])]


def same(found, expected):
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert len(one) == len(other)
        for record, wanted in zip(one, other, strict=True):
            assert record["generated_text"] == wanted["generated_text"]
            for name in FINDINGS:
                assert record["findings"][name]["state"] == wanted["findings"][name]["state"]
                assert record["findings"][name]["probability"] == pytest.approx(
                    wanted["findings"][name]["probability"], abs=1e-4
                )


def test_pipeline_one_study_gives_report_and_findings(pipe, model, processor, paths):
    records = pipe(paths[0], **FEW)
    assert len(records) == 1
    assert set(records[0]) == {"generated_text", "complete", "findings"}
    inputs = processor(images=[paths[0]])
    sequences = model.generate(**inputs, **FEW)[:, inputs["input_ids"].shape[1] :]
    assert records[0]["generated_text"] == processor.decode(sequences[0], skip_special_tokens=True).strip()
    logits = model(**inputs).finding_logits
    states = model.predict_states(logits)[0].tolist()
    assert list(records[0]["findings"]) == list(FINDINGS)
    for row, name in enumerate(FINDINGS):
        found = records[0]["findings"][name]
        assert found["state"] == FINDING_STATES[states[row]]
        probability = model.finding_probabilities(logits)[0, row, states[row]].item()
        assert found["probability"] == pytest.approx(probability, abs=1e-5)


def test_pipeline_every_form_of_a_view_gives_the_same(pipe, paths, views):
    expected = pipe(paths[0], **FEW)
    for form in (Image.open(paths[0]), views[0], torch.from_numpy(views[0])):
        same([pipe(form, **FEW)], [expected])


def test_pipeline_list_is_studies_and_inner_list_is_one(pipe, paths):
    two = pipe(paths[:2], **FEW)
    same(two, [pipe(paths[0], **FEW), pipe(paths[1], **FEW)])
    one = pipe([paths[:2]], **FEW)
    assert len(one) == 1
    assert one[0][0]["findings"] != two[0][0]["findings"]
    same(pipe(tuple(paths[:2]), **FEW), two)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 8])
def test_pipeline_ragged_batch_equals_single_studies(pipe, paths, singles, batch_size):
    studies = [paths[:3], paths[3], paths[4:6]]
    same(pipe(studies, batch_size=batch_size, **FEW), singles)


@pytest.mark.parametrize("batch_size", [1, 2])
def test_pipeline_generators_and_mappings_are_read(pipe, paths, singles, batch_size):
    studies = [paths[:3], paths[3:4], paths[4:6]]
    same(list(pipe((study for study in studies), batch_size=batch_size, **FEW)), singles)
    mappings = [{"images": study} for study in studies]
    same(pipe(mappings, batch_size=batch_size, **FEW), singles)
    same([pipe({"image": paths[3]}, **FEW)], singles[1:2])


@pytest.mark.parametrize("batch_size", [1, 2])
def test_pipeline_datasets_are_read(pipe, paths, singles, batch_size):
    features = datasets.Features(
        {
            "id": datasets.Value("string"),
            "images": datasets.List(datasets.Image()),
            "indication": datasets.Value("string"),
        }
    )
    rows = {"id": ["a", "b", "c"], "images": [paths[:3], paths[3:4], paths[4:6]], "indication": ["", "", ""]}
    dataset = datasets.Dataset.from_dict(rows, features=features)
    same(list(pipe(dataset, batch_size=batch_size, **FEW)), singles)
    same(list(pipe(dataset.to_iterable_dataset(), batch_size=batch_size, **FEW)), singles)


def test_pipeline_within_map_of_a_dataset_equals_the_pipeline_of_the_dataset(pipe, paths):
    rows = {"images": [paths[:3], paths[3:4]], "indication": ["cough", None]}
    features = datasets.Features(
        {"images": datasets.List(datasets.Image()), "indication": datasets.Value("string")},
    )
    dataset = datasets.Dataset.from_dict(rows, features=features)
    mapped = dataset.map(
        lambda row: {"report": pipe(row, **FEW)[0]["generated_text"]}, load_from_cache_file=False, new_fingerprint="0"
    )
    assert mapped["report"] == [records[0]["generated_text"] for records in pipe(dataset, **FEW)]


def test_pipeline_indication_reaches_the_prompt(pipe, model, processor, paths):
    inputs = processor(images=[paths[0]], indication="cough")
    sequences = model.generate(**inputs, **FEW)[:, inputs["input_ids"].shape[1] :]
    expected = processor.decode(sequences[0], skip_special_tokens=True).strip()
    assert pipe(paths[0], indication="cough", **FEW)[0]["generated_text"] == expected
    assert pipe({"image": paths[0], "indication": "cough"}, **FEW)[0]["generated_text"] == expected
    batch = pipe([{"image": paths[0], "indication": "cough"}, paths[0]], batch_size=2, **FEW)
    assert [records[0]["generated_text"] for records in batch] == [expected, pipe(paths[0], **FEW)[0]["generated_text"]]


@pytest.mark.parametrize("batch_size", [1, 2])
def test_pipeline_several_sequences_lengthen_the_inner_list(pipe, paths, batch_size):
    found = pipe([paths[:2], paths[2], paths[3]], batch_size=batch_size, num_beams=3, num_return_sequences=3, **FEW)
    assert [len(records) for records in found] == [3, 3, 3]
    for records in found:
        assert all(record["findings"] == records[0]["findings"] for record in records)
    best = pipe([paths[:2], paths[2], paths[3]], num_beams=3, **FEW)
    assert [records[0]["generated_text"] for records in found] == [records[0]["generated_text"] for records in best]
    assert len(pipe(paths[0], num_return_sequences=2, do_sample=True, **FEW)) == 2


def test_pipeline_report_that_is_cut_off_is_not_complete(build_model, paths):
    model, processor = build_model()
    pipe = ReportGenerationPipeline(model=model, processor=processor)
    (record,) = pipe(paths[0], max_new_tokens=6)
    written = processor.tokenizer(record["generated_text"], add_special_tokens=False)["input_ids"]
    # Whatever is written first ends the report of one study now, and not that of another.
    pipe.model.generation_config.eos_token_id = [model.config.text_config.eos_token_id, written[0]]
    (first,), (second,) = pipe(paths[:2], batch_size=2, max_new_tokens=6)
    assert first["complete"]
    (cut,) = pipe(paths[0], max_new_tokens=6, min_new_tokens=6)
    assert not cut["complete"]
    assert isinstance(second["complete"], bool)


def test_pipeline_save_pretrained_writes_model_and_processor(pipe, paths, tmp_path):
    pipe.save_pretrained(tmp_path)
    again = pipeline("image-to-text", model=str(tmp_path), trust_remote_code=True)
    assert again(paths[0], **FEW) == pipe(paths[0], **FEW)


@pytest.mark.parametrize("batch_size", [1, 2])
def test_pipeline_findings_steer_the_report(pipe, model, processor, paths, batch_size):
    findings = {"Edema": "positive", "pleural effusion": "uncertain"}
    plain, steered = (pipe(paths[:2], batch_size=batch_size, **more, **FEW) for more in ({}, {"findings": findings}))
    for before, after in zip(plain, steered, strict=True):
        for name in FINDINGS:
            # Edema is a finding.
            given = {"edema": "positive", "pleural_effusion": "unclear", "no_finding": "unmentioned"}
            expected = given.get(name, before[0]["findings"][name]["state"])
            assert after[0]["findings"][name]["state"] == expected
    inputs = processor(images=[paths[0]], finding_states=findings)
    sequences = model.generate(**inputs, **FEW)[:, inputs["input_ids"].shape[1] :]
    assert steered[0][0]["generated_text"] == processor.decode(sequences[0], skip_special_tokens=True).strip()


@pytest.mark.parametrize("batch_size", [1, 2])
@pytest.mark.parametrize("view_fusion", ["mean", "concat"])
def test_pipeline_heatmaps_are_the_plan(build_model, paths, batch_size, view_fusion):
    model, processor = build_model(view_fusion=view_fusion)
    pipe = ReportGenerationPipeline(model=model, processor=processor)
    found = pipe([paths[:3], paths[3]], batch_size=batch_size, return_heatmaps=True, **FEW)
    for records, views in zip(found, (3, 1), strict=True):
        heatmaps = records[0]["heatmaps"]
        assert list(heatmaps) == list(FINDINGS)
        for name in FINDINGS:
            assert isinstance(heatmaps[name], np.ndarray)
            assert heatmaps[name].shape == (views, 2, 2)
            assert (heatmaps[name] >= 0).all()
            assert heatmaps[name].mean() == pytest.approx(1, abs=1e-3)
        assert np.ptp([heatmaps[name] for name in FINDINGS]) > 0
        shared = all((heatmaps[name] == heatmaps[name][0]).all() for name in FINDINGS)
        assert shared == (view_fusion == "mean" or views == 1)
    alone = pipe(paths[3], return_heatmaps=True, **FEW)[0]["heatmaps"]
    np.testing.assert_allclose(alone["edema"], found[1][0]["heatmaps"]["edema"], atol=1e-4)
    assert "heatmaps" not in pipe(paths[3], **FEW)[0]


@pytest.mark.parametrize("view_fusion", ["mean", "concat"])
def test_pipeline_heatmaps_of_unmentioned_findings_have_no_mass(build_model, paths, view_fusion):
    model, processor = build_model(ot_labels="mentioned", view_fusion=view_fusion)
    pipe = ReportGenerationPipeline(model=model, processor=processor)
    states = {name: "unmentioned" for name in FINDINGS} | {"edema": "negative", "fracture": "positive"}
    heatmaps = pipe([paths[:2]], findings=states, return_heatmaps=True, **FEW)[0][0]["heatmaps"]
    for name in FINDINGS:
        if states[name] == "unmentioned":
            assert not heatmaps[name].any()
        else:
            assert heatmaps[name].mean() == pytest.approx(1, abs=1e-3)


def test_pipeline_heatmaps_without_fiot_are_refused(build_model, paths):
    model, processor = build_model(fiot=False)
    pipe = ReportGenerationPipeline(model=model, processor=processor)
    with pytest.raises(ValueError, match=r"return_heatmaps=True, but OTDRGConfig.fiot=False"):
        pipe(paths[0], return_heatmaps=True, **FEW)
    assert set(pipe(paths[0], **FEW)[0]) == {"generated_text", "complete", "findings"}


def test_pipeline_without_dle_still_predicts_findings(build_model, paths):
    model, processor = build_model(dle=False, fiot=False)
    pipe = ReportGenerationPipeline(model=model, processor=processor)
    assert set(pipe(paths[0], **FEW)[0]["findings"]) == set(FINDINGS)
    for more in ({"findings": {"edema": "positive"}}, {"return_contradictions": True}):
        with pytest.raises(ValueError, match=r"OTDRGConfig.dle=False: this model does not use finding states"):
            pipe(paths[0], **more, **FEW)


def test_pipeline_contradictions_compare_with_the_conditioning_states(pipe, paths, reports, monkeypatch):
    """The model writes what real reports say: its own words are no English."""
    monkeypatch.setattr(pipe.processor, "batch_decode", lambda sequences, **_: reports[: len(sequences)])
    steered = {name: "unmentioned" for name in FINDINGS} | {"pneumothorax": "negative", "edema": "positive"}
    more = {"findings": steered, "return_contradictions": True, **FEW}
    (first, second) = pipe(paths[0], num_return_sequences=2, num_beams=2, **more)
    # The first report: normal heart, clear lungs, no effusion, no pneumothorax.
    assert {"finding": "edema", "given": "positive", "said": "unmentioned", "kind": "omitted"} in first[
        "contradictions"
    ]
    added = [one["finding"] for one in first["contradictions"] if one["kind"] == "added"]
    assert "pleural_effusion" in added and "pneumothorax" not in added
    # The second: an enlarged heart and effusions, no word of a pneumothorax.
    assert second["contradictions"] == disagreements(second, reports[1])
    assert [one["finding"] for one in second["contradictions"] if one["kind"] == "omitted"] == ["edema", "pneumothorax"]
    contrary = pipe(paths[0], return_contradictions=True, findings={"pleural effusion": "positive"}, **FEW)[0]
    assert {"finding": "pleural_effusion", "given": "positive", "said": "negative", "kind": "contradicted"} in contrary[
        "contradictions"
    ]


@pytest.mark.parametrize("batch_size", [1, 2])
def test_pipeline_contradictions_are_of_each_report(pipe, paths, batch_size):
    more = {"num_return_sequences": 2, "num_beams": 2, "batch_size": batch_size, **FEW}
    found = pipe([paths[:2], paths[2], paths[3]], return_contradictions=True, **more)
    for records in found:
        for record in records:
            assert record["contradictions"] == disagreements(record, record["generated_text"])
    assert "contradictions" not in pipe(paths[0], return_contradictions=False, **FEW)[0]


def test_pipeline_contradictions_without_the_package_are_refused(pipe, paths, monkeypatch):
    """A folder named otdrg beside a script is imported as a package, of which nothing can be."""
    monkeypatch.setitem(sys.modules, "otdrg.metrics.faithfulness", None)
    with pytest.raises(ImportError, match="with the package otdrg, which is not installed: pip install a clone"):
        pipe(paths[0], return_contradictions=True, **FEW)


def disagreements(record, report):
    """What a record's report, read by the labeler, says otherwise than its states."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnreadReportsWarning)
        said = [FINDING_STATES[state] for state in load_labeler("rules").label([report])[0]]
    kinds = {(True, False): "added", (False, True): "omitted", (False, False): "contradicted"}
    return [
        {
            "finding": name,
            "given": finding["state"],
            "said": state,
            "kind": kinds[finding["state"] == "unmentioned", state == "unmentioned"],
        }
        for (name, finding), state in zip(record["findings"].items(), said, strict=True)
        if name != "no_finding" and finding["state"] != state
    ]


@pytest.mark.parametrize(
    ("inputs", "arguments", "message"),
    [
        ([], {}, "no image: the list of studies is empty"),
        ([[]], {}, "no image: a study has no view"),
        ({"images": []}, {}, "no image: a study has no view"),
        ({"picture": "a.png"}, {}, "a study has 'picture': expected 'images' or 'image'"),
        ("nowhere.png", {}, r"nowhere.png: cannot be read \(No such file"),
        (np.full((32, 32), np.nan), {}, "the array holds NaN"),
        (
            np.eye(32),
            {"max_tokens": 5},
            "unknown pipeline argument 'max_tokens': expected findings, indication",
        ),
        ([np.eye(32)], {"indication": ["cough"]}, r"indication is a list: expected .* of one study; several stud"),
        ({"images": np.eye(32), "indication": np.nan}, {}, r"indication is a float: expected .* \[{'images': ..., 'in"),
        ({"images": np.eye(32), "prior_report": ["Normal."]}, {}, "prior_report is a list: expected the text of one"),
        (np.eye(32), {"findings": {"oedema": "positive"}}, "unknown finding 'oedema'"),
        (np.eye(32), {"findings": {"edema": "yes"}}, "unknown finding state 'yes'"),
        (np.eye(32), {"findings": {"no finding": "negative"}}, "not possible for no_finding"),
    ],
)
def test_pipeline_wrong_arguments_are_named(pipe, inputs, arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        pipe(inputs, **arguments, **FEW)
    assert "\n" not in str(error.value)


def test_pipeline_generate_kwargs_are_passed_on(pipe, paths):
    assert pipe(paths[0], generate_kwargs=dict(FEW)) == pipe(paths[0], **FEW)


@pytest.mark.parametrize("name", ["max_tokens", "negative_prompt_ids", "timeout"])
def test_pipeline_unknown_generate_kwargs_are_named(pipe, paths, name):
    for arguments in ({name: 5}, {"generate_kwargs": {name: 5}}):
        with pytest.raises(ValueError, match=f"unknown pipeline argument '{name}': expected findings"):
            pipe(paths[0], **arguments)


def test_pipeline_takes_the_arguments_of_generate(pipe, model, processor, paths):
    end = model.generation_config.eos_token_id
    word = processor.tokenizer.encode("heart", add_special_tokens=False)[0]
    (record,) = pipe(paths[0], prefix_allowed_tokens_fn=lambda *_: [word], max_new_tokens=3)
    assert record["generated_text"] == processor.decode([word] * 3).strip() and not record["complete"]
    (record,) = pipe(paths[0], prefix_allowed_tokens_fn=lambda *_: [end], max_new_tokens=3)
    assert (record["generated_text"], record["complete"]) == ("", True)
    (record,) = pipe(paths[0], stop_strings=["a"], tokenizer=processor.tokenizer, max_new_tokens=60)
    assert record["generated_text"].find("a") in (-1, len(record["generated_text"]) - 1)


@pytest.mark.parametrize("has_consensus", [False, True])
@pytest.mark.parametrize(
    "fields",
    [
        {"max_new_tokens": 5},
        {"max_length": 140},
        {"num_beams": 2, "max_new_tokens": 6},
        {"num_beams": 3, "num_return_sequences": 3, "max_new_tokens": 6},
        {"max_new_tokens": 6, "eos_token_id": [2, 40, 41, 42, 43, 44]},
        {"max_new_tokens": 6, "bad_words_ids": [[13]], "min_new_tokens": 6},
    ],
    ids=lambda fields: "-".join(fields),
)
def test_pipeline_generation_config_equals_keyword_arguments(build_model, paths, fields, has_consensus):
    model, processor = build_model()
    if has_consensus:
        store_settings(model, {"candidates": 3})
    pipe = ReportGenerationPipeline(model=model, processor=processor)
    expected = pipe(paths[:2], **fields)
    assert pipe(paths[:2], generation_config=GenerationConfig(**fields)) == expected
    config = copy.deepcopy(model.generation_config)
    config.update(**fields)
    assert pipe(paths[:2], generation_config=config) == expected
    if "max_new_tokens" in fields and "eos_token_id" not in fields:
        assert not any(record["complete"] for records in expected for record in records)


def test_pipeline_copy_of_a_generation_config_with_consensus_changes_what_differs(build_model, paths):
    model, processor = build_model()
    store_settings(model, {"candidates": 3})
    model.generation_config.update(num_beams=1, max_new_tokens=6)
    pipe = ReportGenerationPipeline(model=model, processor=processor)
    config = copy.deepcopy(model.generation_config)
    assert pipe(paths[0], generation_config=config) == pipe(paths[0]) == pipe(paths[0], candidates=3)
    config.consensus = {"candidates": 5, "seed": 3}
    assert pipe(paths[0], generation_config=config) == pipe(paths[0], candidates=5, consensus={"seed": 3})


@pytest.mark.parametrize("consensus", [None, {"candidates": 2}])
def test_pipeline_length_of_the_models_generation_config_is_the_default(build_model, paths, consensus, monkeypatch):
    model, processor = build_model()
    pipe = ReportGenerationPipeline(model=model, processor=processor)
    model.generation_config.eos_token_id = None
    sequences, decode = [], processor.batch_decode
    monkeypatch.setattr(processor, "batch_decode", lambda ids, **more: sequences.append(ids) or decode(ids, **more))

    def length(**arguments):
        sequences.clear()
        pipe(paths[0], consensus=consensus, **arguments)
        return max(written.shape[1] for written in sequences)

    if consensus is None:
        assert length(generation_config=GenerationConfig(num_beams=2)) == 256
    model.generation_config.max_length = 160  # with the prompt and its label text, 128 tokens here
    assert length() == 32 if consensus is None else length() < 100
    model.generation_config.update(max_length=None, max_new_tokens=7)
    assert length() == 7


@pytest.fixture(scope="module")
def bank(model, processor):
    features = np.random.default_rng(0).normal(size=(4, 32))
    return ReportBank(["The lungs are clear.", "Edema.", "No pneumothorax.", "Edema."], features)


def test_pipeline_consensus_is_that_of_the_decoder(pipe, model, processor, paths, bank, tmp_path):
    bank.save(tmp_path / "bank")
    asked = {"candidates": 4, "bank": str(tmp_path / "bank"), "return_candidates": 3, "max_new_tokens": 8}
    (record,) = pipe(paths[0], **asked)
    label = load_labeler("rules").label
    decoder = ConsensusDecoder(ConsensusSettings(candidates=4), bank, label)
    inputs = processor(images=[paths[0]])
    study = model.read_study(inputs["pixel_values"], inputs["view_mask"])
    prompt = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    (ranked,) = decoder.decode(model, processor, prompt, study, {"max_new_tokens": 8})
    assert [one["report"] for one in record["candidates"]] == [one.report for one in ranked[:3]]
    assert [one["score"] for one in record["candidates"]] == pytest.approx([one.score for one in ranked[:3]], abs=1e-5)
    assert record["generated_text"] == ranked[0].report and record["retrieved"] == ranked[0].retrieved
    two = pipe([paths[1:3], paths[0]], batch_size=2, **asked)
    assert two[1][0]["generated_text"] == record["generated_text"]
    config = copy.deepcopy(model.generation_config)
    config.max_new_tokens = asked.pop("max_new_tokens")
    assert pipe(paths[0], generation_config=config, **asked)[0] == record


def test_pipeline_indication_decides_between_studies_that_look_alike(pipe, model, processor, paths):
    inputs = processor(images=[paths[0]])
    with torch.no_grad():
        features = pool_views(model.encode_views(inputs["pixel_values"], inputs["view_mask"]), inputs["view_mask"])
    reports, indications = ["The lungs are clear.", "Pleural effusion."], ["Cough.", "chest pain"]
    bank = ReportBank(reports * 4, features.numpy().repeat(8, axis=0), indications=indications * 4)
    asked = {"candidates": 0, "bank": bank, "consensus": {"agreement_weight": 0.0}}
    written = [pipe(paths[0], indication=text, **asked)[0]["generated_text"] for text in indications]
    assert written == reports


def test_pipeline_consensus_of_the_generation_config_is_the_default(build_model, paths, tmp_path):
    model, processor = build_model()
    store_settings(model, {"candidates": 3})
    model.save_pretrained(tmp_path)
    model = type(model).from_pretrained(tmp_path)
    pipe = ReportGenerationPipeline(model=model, processor=processor)
    few = {"max_new_tokens": 6, "min_new_tokens": 6}
    chosen = pipe(paths[0], **few)[0]
    assert chosen["generated_text"] == pipe(paths[0], candidates=3, **few)[0]["generated_text"]
    plain = pipe(paths[0], candidates=1, **few)[0]["generated_text"]
    assert plain == pipe(paths[0], num_beams=1, **few)[0]["generated_text"] != chosen["generated_text"]
    assert "retrieved" not in chosen and "candidates" not in chosen
    assert plain == pipe(paths[0], consensus={"candidates": 1}, **few)[0]["generated_text"]
    store_settings(model, {"candidates": 1})
    assert plain == pipe(paths[0], **few)[0]["generated_text"]


def test_pipeline_consensus_of_a_model_without_finding_states_samples_from_the_image(build_model, paths):
    model, processor = build_model(dle=False, fiot=False)
    pipe = ReportGenerationPipeline(model=model, processor=processor)
    (record,) = pipe(paths[0], candidates=3, return_candidates=3, max_new_tokens=6)
    assert record["candidates"] and all(one["sampled"] for one in record["candidates"])
    with pytest.raises(ValueError, match="this model does not use finding states"):
        pipe(paths[0], candidates=3, findings={"edema": "positive"})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"candidates": 4, "num_beams": 2}, "num_beams was given beside candidates or a bank"),
        ({"candidates": 0}, "candidates=0: expected 1 or more, or a report bank"),
        ({"candidates": 2, "return_candidates": -1}, "return_candidates=-1: expected a number of candidates"),
        ({"return_candidates": 2}, "return_candidates=2: expected candidates or a bank beside it"),
        ({"candidates": 4, "consensus": {"weight": 2}}, "consensus: unknown setting 'weight'"),
        ({"bank": "nowhere"}, "nowhere has no bank.safetensors"),
        ({"candidates": 4, "min_p": 0.1}, "min_p was given beside candidates or a bank"),
    ],
)
def test_pipeline_consensus_arguments_that_are_wrong_are_one_line(pipe, paths, arguments, message):
    with pytest.raises(ValueError) as error:
        pipe(paths[0], **arguments)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "beside",
    [{"candidates": 1}, {"bank": "nowhere"}, {"num_beams": 2}, {"generation_config": GenerationConfig(do_sample=True)}],
    ids=["candidates", "bank", "num_beams", "do_sample"],
)
def test_pipeline_arguments_beside_a_decoder_are_refused(pipe, paths, beside, request):
    decoder = ConsensusDecoder(ConsensusSettings(candidates=2))
    name = request.node.callspec.id
    with pytest.raises(ValueError, match=f"{name} was given beside a ConsensusDecoder"):
        pipe(paths[0], consensus=decoder, **beside)


def test_pipeline_decoder_with_a_bank_of_another_encoder_is_refused(pipe, model, processor, build_model, paths):
    for seed in (5, 0):
        probe = probe_features(build_model(seed=seed)[0], processor)
        bank = ReportBank(["Edema.", "Clear."], np.random.default_rng(0).normal(size=(2, len(probe))), probe=probe)
        decoder = ConsensusDecoder(ConsensusSettings(candidates=2), bank)
        if seed == 5:
            with pytest.raises(ValueError, match="made with another image encoder"):
                pipe(paths[0], consensus=decoder, **FEW)
    (record,) = pipe(paths[0], consensus=decoder, **FEW)
    asked = {"candidates": 2, "bank": bank, "consensus": {"agreement_weight": 0.0}}
    assert record == pipe(paths[0], **asked, **FEW)[0]
