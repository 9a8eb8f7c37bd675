"""The chexbert labeler on a small random checkpoint in the public one's form."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from otdrg.findings_otdrg import FINDINGS
from otdrg.labelers import UnreadReportsWarning, load_labeler
from transformers import BertConfig, BertModel, BertTokenizerFast

WORDS = [
    "the",
    "heart",
    "is",
    "large",
    "clear",
    "lungs",
    "no",
    "effusion",
    "edema",
    "seen",
    "today",
    "again",
    "and",
    "not",
    ",",
    ".",
]
REPORTS = ["The heart is large.", "Clear lungs, no effusion seen today and again.", "No edema", "not", "the the the"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def bert():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40}
    config = BertConfig(vocab_size=5 + len(WORDS), max_position_embeddings=24, initializer_range=0.5, **sizes)
    heads = [torch.nn.Linear(32, 4) for _ in range(13)] + [torch.nn.Linear(32, 2)]
    return BertModel(config).eval(), heads


@pytest.fixture
def weights(bert):
    """Weights by the names they have in the public checkpoint."""
    encoder, heads = bert
    named = {f"module.bert.{name}": value for name, value in encoder.state_dict().items()}
    named["module.bert.embeddings.position_ids"] = torch.arange(24)[None]
    for position, head in enumerate(heads):
        named |= {f"module.linear_heads.{position}.{name}": value for name, value in head.state_dict().items()}
    return named


@pytest.fixture
def save(tmp_path):
    def save(weights, name="chexbert.pth"):
        torch.save({"epoch": 3, "model_state_dict": weights}, tmp_path / name)
        return tmp_path / name

    return save


@pytest.fixture
def labeler(save, weights, tokenizer):
    def make(**options):
        options = {"attention_heads": 4, **options}
        return load_labeler("chexbert", checkpoint=save(weights), tokenizer=tokenizer, **options)

    return make


def expected_states(bert, tokenizer, report):
    encoder, heads = bert
    inputs = BertTokenizerFast.from_pretrained(tokenizer)(report, return_tensors="pt")
    with torch.no_grad():
        first = encoder(**inputs).last_hidden_state[:, 0]
        return [int(head(first).argmax()) for head in heads]


@pytest.mark.parametrize("batch_size", [1, 2, 32])
def test_states_are_those_of_the_network(labeler, bert, tokenizer, batch_size):
    states = labeler(batch_size=batch_size).label(REPORTS)
    assert states.shape == (len(REPORTS), 14) and states.dtype == np.int64
    assert states.tolist() == [expected_states(bert, tokenizer, report) for report in REPORTS]
    assert len({tuple(row) for row in states.tolist()}) > 1
    assert set(states[:, FINDINGS.index("no_finding")]) <= {0, 1}


def test_white_space_is_of_no_matter(labeler):
    spaced = ["\n The   heart\r\n\tis large. "]
    assert np.array_equal(labeler().label(spaced), labeler().label(REPORTS[:1]))


def test_a_folder_may_be_given(save, weights, tokenizer):
    folder = save(weights).parent
    by_folder = load_labeler("chexbert", checkpoint=str(folder), tokenizer=str(tokenizer), attention_heads=4)
    assert by_folder.label(REPORTS[:1]).shape == (1, 14)


def test_empty_reports_are_unmentioned_and_counted(labeler):
    with pytest.warns(UnreadReportsWarning, match=r"2 of 3 reports \(positions 0, 2\) hold no text"):
        states = labeler().label(["", REPORTS[0], " \n"])
    assert not states[[0, 2]].any() and states[1].any()


def test_long_reports_are_cut_at_their_end_and_counted(labeler, bert, tokenizer):
    with pytest.warns(UserWarning, match=r"1 of 1 reports \(positions 0\) are longer than 24 tokens and were cut"):
        states = labeler().label(["heart " * 10_000])
    assert states.tolist() == [expected_states(bert, tokenizer, "heart " * 22)]


@pytest.mark.parametrize("report", [None, 3, b"text"])
def test_what_is_no_string_is_named(labeler, report):
    with pytest.raises(ValueError, match=f"report 1 is {type(report).__name__}: expected a string"):
        labeler().label(["Clear.", report])
    with pytest.raises(TypeError, match="reports is a single string"):
        labeler().label("Clear.")


def test_other_languages_and_control_characters_are_read_as_unknown_words(labeler):
    assert labeler().label(["Herz vergrößert", "\x00\x07 心脏"]).shape == (2, 14)


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_code_in_a_checkpoint_is_not_run(save, weights, tokenizer, tmp_path):
    trap = tmp_path / "trap"
    path = save({**weights, "module.bert.extra": Malicious(str(trap))})
    with pytest.raises(ValueError, match=r"chexbert\.pth holds more than weights, or is none: it was not loaded"):
        load_labeler("chexbert", checkpoint=path, tokenizer=tokenizer)
    assert not trap.exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("module.linear_heads.13.weight"), r"linear_heads\.13\.weight \(no_finding\) is missing"),
        (
            lambda w: w.update({"module.linear_heads.1.weight": torch.zeros(2, 32)}),
            r"linear_heads\.1\.weight \(cardiomegaly\) has shape \(2, 32\), expected 4 classes",
        ),
        (
            lambda w: w.pop("module.bert.encoder.layer.1.output.dense.bias"),
            r"output\.dense\.bias is missing or unknown",
        ),
        (lambda w: w.update({"module.bert.encoder.new": torch.zeros(1)}), r"bert\.encoder\.new is missing or unknown"),
        (lambda w: w.update({"module.cnn.weight": torch.zeros(1)}), r"cnn\.weight is not as expected"),
        (lambda w: w.pop("module.bert.embeddings.word_embeddings.weight"), r"word_embeddings\.weight is missing"),
        (lambda w: w.clear(), r"linear_heads\.0\.weight"),
    ],
)
def test_other_checkpoints_are_refused(save, weights, tokenizer, change, message):
    change(weights)
    with pytest.raises(ValueError, match=rf"chexbert\.pth is not CheXbert's: .*{message}") as caught:
        load_labeler("chexbert", checkpoint=save(weights), tokenizer=tokenizer, attention_heads=4)
    assert "\n" not in str(caught.value)


def test_files_that_are_no_checkpoint(tmp_path, tokenizer):
    path = tmp_path / "chexbert.pth"
    for content in (b"", b"not a checkpoint", b"PK\x03\x04 damaged"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"chexbert\.pth (is damaged or is none|holds more than weights)"):
            load_labeler("chexbert", checkpoint=path, tokenizer=tokenizer)
    torch.save([1, 2], path)
    with pytest.raises(ValueError, match="expected weights under 'model_state_dict'"):
        load_labeler("chexbert", checkpoint=path, tokenizer=tokenizer)


@pytest.mark.parametrize("checkpoint", ["nowhere/chexbert.pth", "/nowhere/chexbert.pth", "org/absent"])
def test_a_checkpoint_that_is_not_there_says_how_to_get_it(checkpoint, tokenizer, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match=r"hf download StanfordAIMI/RRG_scorers chexbert\.pth gets the file") as caught:
        load_labeler("chexbert", checkpoint=checkpoint, tokenizer=tokenizer)
    assert "\n" not in str(caught.value)


def test_a_tokenizer_that_does_not_fit(save, weights, tmp_path, tokenizer):
    with pytest.raises(ValueError, match=r"tokenizer .*nowhere: cannot be loaded"):
        load_labeler("chexbert", checkpoint=save(weights), tokenizer=str(tmp_path / "nowhere"), attention_heads=4)
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *map(str, range(99))]))
    BertTokenizerFast(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"has 104 tokens, .* knows 21: expected its own"):
        load_labeler("chexbert", checkpoint=save(weights), tokenizer=str(tmp_path), attention_heads=4)


def test_the_checkpoint_comes_from_the_hub(hub_server, save, weights, tokenizer, bert, tmp_path):
    files = {"chexbert.pth": save(weights).read_bytes()}
    hub_server.add_repo("models", "org/scorers", files)
    code = (
        "from otdrg.labelers import load_labeler\n"
        f"options = {{'tokenizer': {str(tokenizer)!r}, 'attention_heads': 4}}\n"
        "labeler = load_labeler('chexbert', checkpoint='org/scorers', **options)\n"
        f"print(labeler.label([{REPORTS[0]!r}]).tolist())\n"
    )
    environment = hub_server.environment(tmp_path / "home")
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str([expected_states(bert, tokenizer, REPORTS[0])])
