"""What transformers expects of any processor: structured arguments, padding, truncation, kinds of tensors."""

import json

import numpy as np
import pytest
import torch
from otdrg import OTDRGProcessor
from transformers import AutoTokenizer

LONG = ["a long history of cough, fever and pain in the chest", None]


@pytest.mark.parametrize(
    "arguments",
    [
        {"do_rescale": True, "rescale_factor": -1.0},
        {"images_kwargs": {"do_rescale": True, "rescale_factor": -1.0}},
        {"images_kwargs": {"rescale_factor": -1.0}, "text_kwargs": {"padding": True}, "return_tensors": "pt"},
    ],
    ids=["flat", "nested", "both"],
)
def test_processor_image_arguments_reach_the_image_processor(processor, views, arguments):
    changed = processor(images=[views[:2], views[2]], **arguments)["pixel_values"]
    expected = processor.image_processor(
        [np.repeat(view[None], 3, 0) for view in views[:3]], return_tensors="pt", rescale_factor=-1.0
    )["pixel_values"]
    plain = processor(images=[views[:2], views[2]])["pixel_values"]
    assert changed[0, 0].mean() < 0 < plain[0, 0].mean() + 3
    torch.testing.assert_close(changed[0, :2], expected[:2], atol=0.02, rtol=0.02)
    torch.testing.assert_close(changed[1, 0], expected[2], atol=0.02, rtol=0.02)
    assert (changed[1, 1] == 0).all()


def test_processor_images_of_another_size_keep_it(processor, views):
    sized = processor(images=views[:2], images_kwargs={"size": {"height": 28, "width": 42}})["pixel_values"]
    assert sized.shape == (2, 1, 3, 28, 42)


@pytest.mark.parametrize(
    "arguments",
    [
        {"padding": "max_length", "max_length": 150},
        {"text_kwargs": {"padding": "max_length", "max_length": 150}},
        {"common_kwargs": {"return_tensors": "pt"}, "text_kwargs": {"padding": "max_length", "max_length": 150}},
    ],
    ids=["flat", "nested", "common"],
)
def test_processor_padding_to_a_length(processor, views, reports, arguments):
    prompts = processor(images=views[:2], **arguments)
    assert prompts["input_ids"].shape == prompts["attention_mask"].shape == (2, 150)
    assert not prompts["attention_mask"][:, 0].any() and prompts["attention_mask"][:, -1].all()
    training = processor(images=views[:2], report=reports[:2], **arguments)
    assert training["labels"].shape == (2, 150)
    assert training["attention_mask"][:, 0].all() and not training["attention_mask"][:, -1].any()
    assert (training["labels"][:, -1] == -100).all()


def test_processor_padding_of_the_tokenizer_is_the_default(processor, views, tmp_path):
    processor.save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, max_length=150, padding="max_length")
    padded = OTDRGProcessor(processor.image_processor, tokenizer, processor.chat_template, image_tokens=4)
    assert padded(images=views[0])["input_ids"].shape == (1, 150)
    assert padded(images=views[0], padding=True)["input_ids"].shape == processor(images=views[0])["input_ids"].shape


@pytest.mark.parametrize("padding", [True, "longest"])
def test_processor_padding_to_the_longest_ignores_max_length(processor, views, padding):
    inputs = processor(images=views[:2], indication=LONG, padding=padding, max_length=400)
    assert inputs["attention_mask"].all(dim=1).tolist() == [True, False]
    multiple = processor(images=views[:2], indication=LONG, pad_to_multiple_of=16)["input_ids"]
    assert multiple.shape[1] % 16 == 0 and multiple.shape[1] - inputs["input_ids"].shape[1] < 16


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("nested", [False, True])
def test_processor_padding_side_is_the_callers(processor, views, reports, side, nested):
    arguments = {"text_kwargs": {"padding_side": side}} if nested else {"padding_side": side}
    for more in ({}, {"report": [reports[0], "Clear."]}):
        mask = processor(images=views[:2], indication=LONG, **more, **arguments)["attention_mask"][1]
        assert mask.tolist() == sorted(mask.tolist(), reverse=side == "right")
        assert not mask.all()


def test_processor_no_padding_gives_ragged_lists(processor, views):
    ragged = processor(images=views[:2], indication=LONG, padding=False, return_tensors=None)
    lengths = [len(row) for row in ragged["input_ids"]]
    assert lengths[0] > lengths[1] and lengths == [sum(row) for row in ragged["attention_mask"]]
    message = (
        rf"input_ids has rows of {lengths[1]} to {lengths[0]} tokens: expected padding=True with return_tensors='pt'"
    )
    with pytest.raises(ValueError, match=message):
        processor(images=views[:2], indication=LONG, padding=False)
    assert processor(images=views[:2], padding=False)["input_ids"].shape[0] == 2


def test_processor_truncation_cuts_reports_and_never_a_study(processor, views, reports):
    whole = processor(images=views[:2], report=[reports[0], reports[3]])
    length = whole["input_ids"].shape[1] - 5
    cut = processor(images=views[:2], report=[reports[0], reports[3]], truncation=True, max_length=length)
    assert cut["input_ids"].shape == cut["labels"].shape == (2, length)
    assert torch.equal(cut["input_ids"][0], whole["input_ids"][0, :length])
    assert torch.equal(cut["labels"][0], whole["labels"][0, :length])
    with pytest.raises(ValueError, match=r"max_length=12 cuts 7 <finding> off a prompt: expected the study to fit"):
        processor(images=views[0], truncation=True, max_length=12)
    for arguments in ({"truncation": True}, {"padding": "max_length"}):
        with pytest.raises(ValueError, match="max_length=None: expected a number of tokens"):
            processor(images=views[0], **arguments)


@pytest.mark.parametrize(("kind", "expected"), [("pt", torch.Tensor), ("np", np.ndarray), (None, list)])
def test_processor_return_tensors_is_the_type_of_every_value(processor, views, reports, kind, expected):
    arguments = {"images": views[:2], "report": reports[:2], "finding_states": {"edema": "positive"}}
    inputs, tensors = processor(**arguments, return_tensors=kind), processor(**arguments)
    assert inputs.keys() == tensors.keys()
    for name, value in inputs.items():
        assert isinstance(value, expected), name
        assert isinstance(tensors[name], torch.Tensor), name
        found = torch.stack(value) if name == "pixel_values" and kind is None else torch.as_tensor(np.asarray(value))
        assert torch.equal(found.to(tensors[name].dtype), tensors[name]), name
    nested = processor(**arguments, text_kwargs={"return_tensors": kind})
    assert all(isinstance(value, expected) for value in nested.values())


@pytest.mark.parametrize(
    "arguments",
    [
        {"images_kwargs": {"do_rescale": True}, "do_rescale": False},
        {"text_kwargs": {"padding": "do_not_pad"}, "padding": "max_length"},
    ],
)
def test_processor_arguments_given_twice_are_refused(processor, views, arguments):
    with pytest.raises(ValueError, match="passed two times"):
        processor(images=views[0], **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"findings": {"edema": 1}}, "unknown argument 'findings'"),
        ({"return_offsets_mapping": True}, "unknown argument 'return_offsets_mapping'"),
        ({"text_kwargs": {"stride": 3}}, "unknown argument 'stride'"),
        ({"videos_kwargs": {"fps": 1}}, "unknown argument 'videos_kwargs'"),
        ({"padding_side": "top"}, "padding_side='top': expected 'left' or 'right'"),
        ({"audio": [0.0]}, "videos and audio were given"),
    ],
)
def test_processor_arguments_without_effect_are_refused(processor, views, arguments, message):
    with pytest.raises(ValueError, match=message):
        processor(images=views[0], **arguments)
    processor(images=views[0], videos=None, audio=None, return_offsets_mapping=False, add_special_tokens=True)


def test_processor_model_input_names_are_those_of_a_call(processor, views):
    assert set(processor(images=views[0]).keys()) == set(processor.model_input_names)


def test_processor_loaded_equals_the_saved_one(processor, tmp_path):
    processor.save_pretrained(tmp_path / "one")
    one = OTDRGProcessor.from_pretrained(tmp_path / "one")
    one.save_pretrained(tmp_path / "two")
    assert OTDRGProcessor.from_pretrained(tmp_path / "two").to_dict() == one.to_dict()
    saved = json.loads((tmp_path / "two" / "processor_config.json").read_text(encoding="utf-8"))
    assert saved["auto_map"] == {"AutoProcessor": "processing_otdrg.OTDRGProcessor"}
