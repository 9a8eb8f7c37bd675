"""The chexbert labeler on a small random checkpoint in the public one's form."""

import json
import os
import random
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from otdrg.findings_otdrg import FINDING_DISPLAY_NAMES, FINDINGS
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
#: The findings of CheXbert's heads, one after another, as its constants.py has them.
CONDITIONS = ["Enlarged Cardiomediastinum", "Cardiomegaly", "Lung Opacity", "Lung Lesion", "Edema", "Consolidation"]
CONDITIONS += ["Pneumonia", "Atelectasis", "Pneumothorax", "Pleural Effusion", "Pleural Other", "Fracture"]
CONDITIONS += ["Support Devices", "No Finding"]
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
    assert "module.bert.pooler.dense.weight" in named
    named["module.bert.embeddings.position_ids"] = torch.arange(24)[None]
    for position, head in enumerate(heads):
        named |= {f"module.linear_heads.{position}.{name}": value for name, value in head.state_dict().items()}
    return named


@pytest.fixture
def save(tmp_path):
    def save(weights, legacy=False):
        """As CheXbert's training does it; `legacy` is the form of its torch, before 1.6."""
        parameter = torch.nn.Parameter(torch.ones(2))
        optimizer = torch.optim.Adam([parameter])
        parameter.sum().backward()
        optimizer.step()
        content = {"epoch": 3, "model_state_dict": weights, "optimizer_state_dict": optimizer.state_dict()}
        path = tmp_path / "chexbert.pth"
        torch.save(content, path, _use_new_zipfile_serialization=not legacy)
        return path

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
        states = {name: int(head(first).argmax()) for name, head in zip(CONDITIONS, heads, strict=True)}
    return [states[FINDING_DISPLAY_NAMES[finding]] for finding in FINDINGS]


def test_chexbert_heads_are_matched_by_name():
    from otdrg.labelers import chexbert

    assert list(FINDING_DISPLAY_NAMES.values()) == CONDITIONS
    assert dict(zip(CONDITIONS, chexbert.HEAD_SIZES, strict=True)) == {**dict.fromkeys(CONDITIONS, 4), "No Finding": 2}


@pytest.mark.parametrize("batch_size", [1, 2, 32])
def test_chexbert_states_equal_those_of_the_network(labeler, bert, tokenizer, batch_size):
    states = labeler(batch_size=batch_size).label(REPORTS)
    assert states.shape == (len(REPORTS), 14) and states.dtype == np.int64
    assert states.tolist() == [expected_states(bert, tokenizer, report) for report in REPORTS]
    assert len({tuple(row) for row in states.tolist()}) > 1
    assert set(states[:, FINDINGS.index("no_finding")]) <= {0, 1}


def test_chexbert_white_space_is_ignored(labeler):
    spaced = ["\n The   heart\r\n\tis large. "]
    assert np.array_equal(labeler().label(spaced), labeler().label(REPORTS[:1]))


def test_chexbert_legacy_checkpoint_is_read(save, weights, tokenizer, bert):
    path = save(weights, legacy=True)
    old = load_labeler("chexbert", checkpoint=path, tokenizer=tokenizer, attention_heads=4)
    assert old.label(REPORTS[:1]).tolist() == [expected_states(bert, tokenizer, REPORTS[0])]


def test_chexbert_prefix_is_optional(save, weights, tokenizer, labeler):
    path = save({name.removeprefix("module."): value for name, value in weights.items()})
    bare = load_labeler("chexbert", checkpoint=path, tokenizer=tokenizer, attention_heads=4)
    assert np.array_equal(bare.label(REPORTS), labeler().label(REPORTS))


def test_chexbert_loading_keeps_the_random_state(labeler):
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    labeler()
    assert torch.rand(1) == expected


def test_chexbert_empty_list_gives_no_rows(labeler):
    assert labeler().label([]).shape == (0, 14)


def test_chexbert_folder_of_the_checkpoint_is_accepted(save, weights, tokenizer):
    folder = save(weights).parent
    by_folder = load_labeler("chexbert", checkpoint=str(folder), tokenizer=str(tokenizer), attention_heads=4)
    assert by_folder.label(REPORTS[:1]).shape == (1, 14)


@pytest.mark.parametrize("unread", ["", " \n", "\x00\x07", "\u200b", "心脏 увеличено", "[SEP]"])
def test_chexbert_unreadable_reports_are_unmentioned_and_counted(labeler, unread):
    with pytest.warns(UnreadReportsWarning, match=r"2 of 3 reports \(positions 0, 2\) hold no word BERT knows"):
        states = labeler().label([unread, REPORTS[0], unread])
    assert not states[[0, 2]].any() and states[1].any()


def test_chexbert_long_reports_are_truncated_and_counted(labeler, bert, tokenizer):
    with pytest.warns(UserWarning, match=r"1 of 1 reports \(positions 0\) are longer than 24 tokens and were cut"):
        states = labeler().label(["heart " * 10_000])
    assert states.tolist() == [expected_states(bert, tokenizer, "heart " * 22)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.array_equal(labeler().label(["heart " * 22]), states)


@pytest.mark.parametrize("report", [None, 3, b"text"])
def test_chexbert_wrong_types_are_named(labeler, report):
    with pytest.raises(ValueError, match=f"report 1 is {type(report).__name__}: expected a string"):
        labeler().label(["Clear.", report])
    with pytest.raises(TypeError, match="reports is a single string"):
        labeler().label("Clear.")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size=0: expected a whole number, at least 1"),
        ({"batch_size": "many"}, "batch_size='many': expected a whole number"),
        ({"batch_size": True}, "batch_size=True: expected a whole number"),
        ({"attention_heads": 0}, "attention_heads=0: expected a whole number"),
        ({"attention_heads": 3}, r"attention_heads=3: expected a divisor of the hidden size of .*chexbert\.pth, 32"),
        ({"device": "toaster"}, "device='toaster': not available"),
        ({"device": "cuda:99"}, "device='cuda:99': not available"),
        ({"checkpoint": 3}, "checkpoint=3: expected a Hub id or a path"),
        ({"checkpoint": ""}, "checkpoint='': expected a Hub id or a path"),
        ({"tokenizer": None}, "tokenizer=None: expected a Hub id or a path"),
    ],
)
def test_chexbert_wrong_options_are_named(save, weights, tokenizer, options, message):
    options = {"checkpoint": save(weights), "tokenizer": tokenizer, **options}
    with pytest.raises(ValueError, match=message) as caught:
        load_labeler("chexbert", **options)
    assert "\n" not in str(caught.value)


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("legacy", [False, True])
def test_chexbert_code_in_a_checkpoint_is_not_run(save, weights, tokenizer, tmp_path, legacy):
    trap = tmp_path / "trap"
    path = save({**weights, "module.bert.extra": Malicious(str(trap))}, legacy)
    with pytest.raises(ValueError, match=r"chexbert\.pth holds more than weights, or is damaged: it was not loaded"):
        load_labeler("chexbert", checkpoint=path, tokenizer=tokenizer)
    assert not trap.exists()
    torch.load(path, weights_only=False)
    assert trap.exists()  # It would have been.


WORD = "module.bert.embeddings.word_embeddings.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("module.linear_heads.13.weight"), r'Missing key\(s\).* "linear_heads\.13\.weight"\.'),
        (
            lambda w: w.update({"module.linear_heads.1.weight": torch.zeros(2, 32)}),
            r"size mismatch for linear_heads\.1\.weight: .*\[2, 32\]\) from checkpoint, .*\[4, 32\]\)\.$",
        ),
        (
            lambda w: w.update({"module.linear_heads.0.weight": torch.zeros(4, 64)}),
            r"size mismatch for linear_heads\.0\.weight: .*\[4, 64\]\) from checkpoint, .*\[4, 32\]\)\.$",
        ),
        (
            lambda w: [w.pop(name) for name in list(w) if "layer.1.attention" in name],
            r'Missing key\(s\).* "bert\.encoder\.layer\.1\.attention\.self\.query\.weight", ',
        ),
        (
            lambda w: w.update({"module.bert.encoder.layer.x.new": torch.zeros(1), "module.cnn": torch.zeros(1)}),
            r'Unexpected key\(s\).* "cnn"',
        ),
        (
            lambda w: w.update({"module.linear_heads.14.weight": torch.zeros(4, 32)}),
            r'Unexpected key\(s\).* "linear_heads\.14',
        ),
        (lambda w: w.pop(WORD), r"bert\.embeddings\.word_embeddings\.weight is missing"),
        (lambda w: w.update({WORD: torch.zeros(5)}), r"word_embeddings\.weight has 1 axes, expected 2"),
        (lambda w: w.update({3: torch.zeros(5)}), "expected weights under 'model_state_dict'"),
        (lambda w: w.clear(), r"word_embeddings\.weight is missing"),
    ],
)
def test_chexbert_other_checkpoints_are_refused(save, weights, tokenizer, change, message):
    change(weights)
    with pytest.raises(ValueError, match=rf"chexbert\.pth is not CheXbert's: .*{message}") as caught:
        load_labeler("chexbert", checkpoint=save(weights), tokenizer=tokenizer, attention_heads=4)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1j])
def test_chexbert_non_finite_weights_are_refused(save, weights, tokenizer, value):
    """The first class, blank, is the largest of scores that are no numbers."""
    weights["module.linear_heads.0.bias"] = torch.full((4,), value)
    with pytest.raises(ValueError, match=r"chexbert\.pth is damaged: linear_heads\.0\.bias have values that are not"):
        load_labeler("chexbert", checkpoint=save(weights), tokenizer=tokenizer)


@pytest.mark.parametrize("legacy", [False, True])
def test_chexbert_damaged_file_is_a_one_line_error(save, weights, tokenizer, legacy):
    path = save(weights, legacy)
    content, dice = path.read_bytes(), random.Random(0)
    for _ in range(60):
        damaged = bytearray(content[: dice.randrange(len(content))])
        for _ in range(dice.choice([0, 3])):
            damaged[dice.randrange(min(len(damaged), 2000))] = dice.randrange(256)
        path.write_bytes(damaged)
        with warnings.catch_warnings(), pytest.raises(ValueError, match=r"^checkpoint .*chexbert\.pth") as caught:
            warnings.simplefilter("error")
            load_labeler("chexbert", checkpoint=path, tokenizer=tokenizer)
        assert "\n" not in str(caught.value)


def test_chexbert_other_file_is_refused(tmp_path, tokenizer):
    path = tmp_path / "chexbert.pth"
    for content in (b"", b"not a checkpoint", b"PK\x03\x04 damaged"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"chexbert\.pth (is damaged or unreadable|holds more than weights)"):
            load_labeler("chexbert", checkpoint=path, tokenizer=tokenizer)
    torch.save([1, 2], path)
    with pytest.raises(ValueError, match="expected weights under 'model_state_dict'"):
        load_labeler("chexbert", checkpoint=path, tokenizer=tokenizer)


@pytest.mark.parametrize("checkpoint", ["nowhere/chexbert.pth", "/nowhere/chexbert.pth", "org/absent"])
def test_chexbert_missing_checkpoint_names_the_fix(checkpoint, tokenizer, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match=r"get it with hf download StanfordAIMI/RRG_scorers chexbert\.pth") as caught:
        load_labeler("chexbert", checkpoint=checkpoint, tokenizer=tokenizer)
    assert "\n" not in str(caught.value)


def test_chexbert_folder_named_as_owner_does_not_hide_the_hub(tokenizer, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org").mkdir()
    with pytest.raises(ValueError, match=r"org/absent: no such folder, and chexbert\.pth cannot be downloaded"):
        load_labeler("chexbert", checkpoint="org/absent", tokenizer=tokenizer)


@pytest.fixture
def write_vocabulary(tmp_path):
    def write(*words):
        folder = tmp_path / "vocabulary"
        folder.mkdir()
        (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]))
        return folder

    return write


def test_chexbert_vocabulary_alone_is_accepted(labeler, save, weights, write_vocabulary):
    bare = load_labeler("chexbert", checkpoint=save(weights), tokenizer=write_vocabulary(*WORDS), attention_heads=4)
    assert np.array_equal(bare.label(REPORTS), labeler().label(REPORTS))


@pytest.mark.parametrize("words", [WORDS[:-1], [*WORDS, "more"]])
def test_chexbert_other_vocabulary_is_refused(save, weights, write_vocabulary, words):
    """BERT's cased vocabulary has fewer tokens than the uncased one; nothing else differs."""
    with pytest.raises(ValueError, match=rf"has {5 + len(words)} tokens, .* has 21: expected its own"):
        load_labeler("chexbert", checkpoint=save(weights), tokenizer=write_vocabulary(*words), attention_heads=4)


def test_chexbert_other_tokenizer_is_refused(save, weights, tmp_path):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"word{place}": place for place in range(21)}, unk_token="word0"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"other does not put a text between \[CLS\] and \[SEP\]"):
        load_labeler("chexbert", checkpoint=save(weights), tokenizer=tmp_path / "other", attention_heads=4)


@pytest.mark.parametrize("content", [None, "{damaged"])
def test_chexbert_unloadable_tokenizer_names_the_fix(save, weights, tmp_path, content):
    folder = tmp_path / "nowhere"
    if content is not None:
        folder.mkdir()
        for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
            (folder / name).write_text(content)
    with pytest.raises(ValueError, match=r"tokenizer .*nowhere: cannot be loaded .*hf download bert-base-un") as caught:
        load_labeler("chexbert", checkpoint=save(weights), tokenizer=folder, attention_heads=4)
    assert "\n" not in str(caught.value)


def test_chexbert_checkpoint_is_downloaded_from_the_hub(hub_server, save, weights, tokenizer, bert, tmp_path):
    for name in ("StanfordAIMI/RRG_scorers", "org/scorers"):
        hub_server.add_repo("models", name, {"chexbert.pth": save(weights).read_bytes()})
    hub_server.add_repo("models", "org/empty", {"README.md": b"# Nothing\n"})
    hub_server.add_repo("models", "org/gated", {"chexbert.pth": b""}).gated = True
    code = (
        "import gc, json\n"
        "gc.disable()\n"
        "from otdrg.labelers import load_labeler\n"
        "def label(**checkpoint):\n"
        f"    options = {{'tokenizer': {str(tokenizer)!r}, 'attention_heads': 4}}\n"
        "    try:\n"
        f"        return load_labeler('chexbert', **checkpoint, **options).label({REPORTS!r}).tolist()\n"
        "    except ValueError as error:\n"
        "        return str(error)\n"
        "names = ('scorers', 'empty', 'gated', 'absent')\n"
        "print(json.dumps([label(), *(label(checkpoint=f'org/{name}') for name in names)]))\n"
    )
    environment = hub_server.environment(tmp_path / "home")
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    default, states, *errors = json.loads(done.stdout)
    assert default == states == [expected_states(bert, tokenizer, report) for report in REPORTS]
    for error, name, reason in zip(errors, ("empty", "gated", "absent"), ("404", "restricted", "404"), strict=True):
        assert error.startswith(f"checkpoint org/{name}: ") and reason in error and "\n" not in error
        assert error.endswith("and set option checkpoint to its path")
