"""The configuration's fields, presets and errors, and the label space."""

import json

import pytest
from otdrg import (
    FINDING_DISPLAY_NAMES,
    FINDING_STATES,
    FINDINGS,
    OTDRGConfig,
    OTDRGForReportGeneration,
    finding_key,
    finding_state_id,
    parse_findings,
)
from transformers import CONFIG_MAPPING, AutoConfig, LlamaConfig, ViTConfig

PRESETS = ["tiny", "small", "paper"]


# --- the label space -------------------------------------------------------------------------------------------------


def test_findings_are_chexberts_in_its_order():
    assert [FINDING_DISPLAY_NAMES[name] for name in FINDINGS] == [
        "Enlarged Cardiomediastinum",
        "Cardiomegaly",
        "Lung Opacity",
        "Lung Lesion",
        "Edema",
        "Consolidation",
        "Pneumonia",
        "Atelectasis",
        "Pneumothorax",
        "Pleural Effusion",
        "Pleural Other",
        "Fracture",
        "Support Devices",
        "No Finding",
    ]
    assert FINDING_STATES == ("unmentioned", "positive", "negative", "unclear")


@pytest.mark.parametrize("name", ["pleural_effusion", "Pleural Effusion", " pleural  EFFUSION ", "Pleural_effusion"])
def test_finding_key_ignores_case_spaces_and_underscores(name):
    assert finding_key(name) == "pleural_effusion"


@pytest.mark.parametrize(
    ("state", "expected"),
    [("positive", 1), ("Unclear", 3), ("uncertain", 3), ("not mentioned", 0), ("not_mentioned", 0), (2, 2), (0, 0)],
)
def test_finding_state_id_takes_name_alias_and_id(state, expected):
    assert finding_state_id(state) == expected


def test_finding_key_unknown_finding_lists_all():
    with pytest.raises(ValueError, match=r"unknown finding 'Oedema': expected one of enlarged_.*, no_finding") as error:
        finding_key("Oedema")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("state", ["present", 4, -1, True, 1.0, None])
def test_finding_state_id_unknown_state_lists_all(state):
    expected = (
        rf"unknown finding state {state!r}: expected one of unmentioned, positive, negative, unclear \(or 0 to 3\)"
    )
    with pytest.raises(ValueError, match=expected):
        finding_state_id(state)


def test_parse_findings_by_name():
    assert parse_findings({"Edema": "positive", "no_finding": 0, "lung lesion": "uncertain"}) == {4: 1, 13: 0, 3: 3}


@pytest.mark.parametrize(
    ("findings", "message"),
    [
        ({"edema": "yes"}, "unknown finding state 'yes'"),
        ({"heart": "positive"}, "unknown finding 'heart'"),
        ({"No Finding": "negative"}, "'negative' is not possible for no_finding: expected positive or unmentioned"),
        ({"no_finding": 3}, "'unclear' is not possible for no_finding: expected positive or unmentioned"),
    ],
)
def test_parse_findings_impossible_state_is_named(findings, message):
    with pytest.raises(ValueError, match=message):
        parse_findings(findings)


# --- presets and JSON ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRESETS)
def test_from_preset_survives_json(name, tmp_path):
    config = OTDRGConfig.from_preset(name, prompt="Describe it.", finding_thresholds=[0.25] * 14)
    config.save_pretrained(tmp_path)
    reloaded = OTDRGConfig.from_pretrained(tmp_path)
    assert json.loads(reloaded.to_json_string()) == json.loads(config.to_json_string())
    assert type(reloaded.vision_config) is type(config.vision_config)
    assert type(reloaded.text_config) is type(config.text_config)
    assert type(AutoConfig.from_pretrained(tmp_path)) is OTDRGConfig
    # and once more, from the dictionary
    assert json.loads(OTDRGConfig(**config.to_dict()).to_json_string()) == json.loads(config.to_json_string())


def test_config_bound_to_a_tokenizer_survives_json(tiny_config, tmp_path):
    tiny_config.save_pretrained(tmp_path)
    reloaded = OTDRGConfig.from_pretrained(tmp_path)
    for field in ("image_token_id", "finding_token_id", "finding_text_token_id", "prompt_token_ids"):
        assert getattr(reloaded, field) == getattr(tiny_config, field)
    assert reloaded.finding_text_token_ids == tiny_config.finding_text_token_ids
    assert reloaded.text_config.vocab_size == tiny_config.text_config.vocab_size


def test_from_preset_has_the_named_backbones():
    tiny, small, paper = (OTDRGConfig.from_preset(name) for name in PRESETS)
    assert (tiny.vision_config.model_type, tiny.text_config.model_type) == ("timm_wrapper", "llama")
    assert small.vision_config.model_type == "dinov2"
    assert paper.vision_config.architecture == "swin_base_patch4_window7_224"
    assert (paper.text_config.hidden_size, paper.text_config.num_hidden_layers) == (4096, 32)
    assert (paper.image_tokens, paper.image_size, paper.ot_epsilon, paper.ot_weight) == (49, 224, 0.1, 0.1)
    assert (paper.ot_cost_normalization, paper.ot_labels, paper.ot_max_iterations) == ("none", "all", 100)
    assert (paper.focal_gamma, paper.lora["r"], paper.lora["target_modules"]) == (2.0, 16, ["q_proj", "v_proj"])


def test_from_preset_copies_are_independent():
    OTDRGConfig.from_preset("small").lora["r"] = 3
    assert OTDRGConfig.from_preset("small").lora["r"] == 16


def test_from_preset_overrides_are_merged():
    config = OTDRGConfig.from_preset("tiny", image_tokens=16, text_config={"hidden_size": 64})
    assert config.image_tokens == 16
    assert config.text_config.hidden_size == 64
    assert config.text_config.num_hidden_layers == OTDRGConfig.from_preset("tiny").text_config.num_hidden_layers
    other = OTDRGConfig.from_preset("tiny", vision_config={"model_type": "vit", "hidden_size": 48})
    assert isinstance(other.vision_config, ViTConfig)
    assert other.vision_config.hidden_size == 48
    assert OTDRGConfig.from_preset("tiny", text_config=LlamaConfig(hidden_size=96)).text_config.hidden_size == 96


def test_from_preset_leaves_overrides_unchanged():
    overrides = {"vision_config": {"model_args": {"img_size": 56}}}
    OTDRGConfig.from_preset("tiny", **overrides)
    assert overrides == {"vision_config": {"model_args": {"img_size": 56}}}


def test_from_preset_unknown_preset_or_field_is_named():
    with pytest.raises(ValueError, match="unknown preset 'large': expected one of tiny, small, paper"):
        OTDRGConfig.from_preset("large")
    with pytest.raises(ValueError, match="unknown OTDRGConfig field 'ot_epsilom'"):
        OTDRGConfig.from_preset("tiny", ot_epsilom=0.1)


# --- wrong values ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("view_fusion", "max", "one of 'mean', 'concat'"),
        ("label_encoder", "bert", "one of 'embeddings', 'text_encoder', 'table'"),
        ("label_encoder", "text_encoder", "another encoder, or a label_encoder_config beside it"),
        ("finding_text", True, "one of 'mentioned', 'all', 'none'"),
        ("finding_tokens", "image", "one of 'labels', 'transported'"),
        ("ot_cost_normalization", "l2", "one of 'none', 'unit'"),
        ("ot_labels", "positive", "one of 'all', 'mentioned'"),
        ("ot_gradient", "implicit", "one of 'envelope', 'unroll'"),
        ("focal_reduction", "sum", "one of 'finding', 'study'"),
        ("dle", "yes", "true or false"),
        ("fiot", 1, "true or false"),
        ("image_size", 0, "a positive integer"),
        ("image_size", 224.0, "a positive integer"),
        ("image_tokens", 50, "a square number, such as 49"),
        ("image_tokens", -4, "a positive integer"),
        ("ot_max_iterations", 0, "a positive integer"),
        ("ot_max_iterations", True, "a positive integer"),
        ("ot_epsilon", 0, "a number above 0"),
        ("ot_epsilon", "0.1", "a number above 0"),
        ("ot_epsilon", float("nan"), "a number above 0"),
        ("ot_contrastive_temperature", -0.1, "a number above 0"),
        ("ot_tolerance", -1e-6, "a number of at least 0"),
        ("ot_weight", -0.1, "a number of at least 0"),
        ("ot_weight", None, "a number of at least 0"),
        ("focal_gamma", -2, "a number of at least 0"),
        ("predictor_dropout", 1.0, "0 <= p < 1"),
        ("predicted_state_ratio", 1.5, "a number from 0 to 1"),
        ("finding_thresholds", [0.5] * 13, "14 numbers from 0 to 1"),
        ("finding_thresholds", [0.5] * 13 + [1.5], "14 numbers from 0 to 1"),
        ("lora", ["q_proj"], "the fields of peft.LoraConfig"),
        ("image_token_id", 512, "a token id from 0 to 511"),
        ("finding_token_id", -1, "a token id from 0 to 511"),
        ("finding_text_token_id", 600, "the LLM's vocab_size is 512"),
        ("finding_text_token_ids", [[[1]] * 4] * 13, "14 x 4 lists of token ids, none empty"),
        ("finding_text_token_ids", [[[1], [2], [3], []]] * 14, "14 x 4 lists of token ids, none empty"),
        ("finding_text_token_ids", [[[1], [2], [3], [512]]] * 14, "token ids from 0 to 511"),
        ("prompt_token_ids", [1, 2, 512], "token ids from 0 to 511"),
    ],
)
def test_config_wrong_value_names_field_value_and_what_is_allowed(field, value, allowed):
    with pytest.raises(ValueError) as error:
        OTDRGConfig.from_preset("tiny", **{field: value})
    message = str(error.value)
    assert message.startswith(f"OTDRGConfig.{field}={value!r}: expected ")
    assert allowed in message
    assert "\n" not in message


@pytest.mark.parametrize("field", ["lora", "vision_lora"])
@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"rank": 8}, r"={'rank': 8}: got an unexpected keyword argument 'rank', expected peft.LoraConfig's fields"),
        ({"r": 0}, ".r=0: expected an integer from 1 to 4,096"),
        ({"target_modules": "a.*", "layers_to_transform": 1}, "`layers_to_transform` cannot be used"),
        ({"modules_to_save": ["lm_head"]}, r".modules_to_save=\['lm_head'\]: expected null, only LoRA is supported"),
    ],
)
def test_config_wrong_lora_field_is_named(field, lora, message):
    with pytest.raises(ValueError, match=rf"^OTDRGConfig.{field}.*{message}"):
        OTDRGConfig.from_preset("tiny", **{field: lora})


def test_config_fiot_without_dle_is_refused():
    with pytest.raises(ValueError, match=r"OTDRGConfig.fiot=True: expected false when dle is false"):
        OTDRGConfig.from_preset("tiny", dle=False)
    assert not OTDRGConfig.from_preset("tiny", dle=False, fiot=False).dle
    with pytest.raises(
        ValueError, match=r"OTDRGConfig.finding_tokens='transported': expected labels when fiot is false"
    ):
        OTDRGConfig.from_preset("tiny", fiot=False, finding_tokens="transported")


@pytest.mark.parametrize("part", ["vision_config", "text_config", "label_encoder_config"])
def test_config_unknown_model_type_is_named(part):
    with pytest.raises(ValueError, match=rf"OTDRGConfig.{part}.model_type='nope': expected a model type"):
        OTDRGConfig.from_preset("tiny", **{part: {"model_type": "nope"}})


def test_config_from_pretrained_ids_beyond_the_vocabulary_are_refused(tiny_config, tmp_path):
    tiny_config.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "image_token_id": 100_000}))
    with pytest.raises(ValueError, match=r"OTDRGConfig.image_token_id=100000: expected a token id from 0 to \d+"):
        OTDRGConfig.from_pretrained(tmp_path)


def test_model_without_label_text_ids_is_refused(build_config):
    with pytest.raises(ValueError, match=r"finding_text_token_ids=None: .* make the processor first"):
        OTDRGForReportGeneration(build_config())


# --- tokens ----------------------------------------------------------------------------------------------------------


def test_bind_tokenizer_records_placeholders_and_label_texts(tiny_config, processor):
    tokenizer = processor.tokenizer
    ids = [tiny_config.image_token_id, tiny_config.finding_token_id, tiny_config.finding_text_token_id]
    assert tokenizer.convert_ids_to_tokens(ids) == ["<image>", "<finding>", "<finding_text>"]
    assert len(tokenizer) <= tiny_config.text_config.vocab_size
    table = tiny_config.finding_text_token_ids
    assert tokenizer.decode(table[9][1]).strip() == "pleural effusion: positive;"
    assert tokenizer.decode(table[13][0]).strip() == "no finding: unmentioned;"
    assert len({tuple(ids) for row in table for ids in row}) == 56
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert getattr(tiny_config.text_config, name) == getattr(tokenizer, name)


def test_bind_tokenizer_twice_changes_nothing(build_model):
    model, processor = build_model()
    before, size = model.config.to_json_string(), len(processor.tokenizer)
    model.config.bind_tokenizer(processor.tokenizer)
    assert model.config.to_json_string() == before
    assert len(processor.tokenizer) == size


@pytest.mark.parametrize("form", [dict, CONFIG_MAPPING["gemma3"].from_dict], ids=["fields", "configuration"])
def test_configuration_of_an_llm_for_images_is_refused(form):
    with pytest.raises(
        ValueError, match=r"text_config.model_type='gemma3': expected a text-only LLM, such as gemma3_t"
    ):
        OTDRGConfig(text_config=form({"model_type": "gemma3"}))
    assert OTDRGConfig(text_config={"model_type": "gemma3_text"}).text_config.model_type == "gemma3_text"


def test_parse_findings_one_finding_twice_is_refused():
    with pytest.raises(ValueError, match="finding pleural_effusion is given twice, the second time as 'pleural effusi"):
        parse_findings({"Pleural Effusion": "positive", "edema": 1, "pleural effusion": "positive"})
