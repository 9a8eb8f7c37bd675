"""The llm labeler on tiny random LLMs: what it computes, and what it makes of bad input."""

import json

import numpy as np
import pytest
import torch
from otdrg.cli import main
from otdrg.findings_otdrg import FINDING_STATES, FINDINGS
from otdrg.labelers import UnreadReportsWarning, load_labeler
from otdrg.labelers.llm import LLMLabeler
from otdrg.labelers.llm_prompt import ASKED, PROMPT, load_prompt
from tokenizers import ByteLevelBPETokenizer
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

REPORTS = ["The heart is large.", "No effusion. There is a port and an old fracture of a rib.", "Clear lungs."]


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    """Folder of a random LLaMA that reads 4,096 tokens."""
    folder = tmp_path_factory.mktemp("llm")
    tokens = ByteLevelBPETokenizer()
    tokens.train_from_iterator([load_prompt().head(3), *REPORTS], vocab_size=500, special_tokens=["<s>", "</s>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokens._tokenizer, bos_token="<s>", eos_token="</s>")
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=500, max_position_embeddings=4096, initializer_range=0.3, **sizes)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def labeler(llm):
    return load_labeler("llm", model=str(llm), dtype="float32")


def score(labeler, report, finding, state):
    """The log-likelihood of an answer in the whole text, read at once."""
    prompt = labeler.prompt
    before = labeler._head + labeler._tokens(prompt.report(report)) + labeler._tokens(prompt.question(finding))
    answer = labeler._tokens(prompt.question(finding) + prompt.answer(state))
    answer = answer[len(labeler._tokens(prompt.question(finding))) :]
    with torch.no_grad():
        logits = labeler.model(torch.tensor([before + answer])).logits[0]
    steps = torch.log_softmax(logits.float(), -1)[len(before) - 1 : -1]
    return sum(float(step[token]) for step, token in zip(steps, answer, strict=True))


def test_llm_shared_prefix_equals_the_whole_text(labeler):
    expected = np.array(
        [[[score(labeler, report, f, s) for s in range(4)] for f in range(13)] for report in REPORTS[:2]]
    )
    found = labeler._scores(REPORTS[:2])
    np.testing.assert_allclose(found, expected, atol=1e-4)
    states = labeler.label(REPORTS[:2])
    assert states.shape == (2, 14) and states.dtype == np.int64
    assert states[:, :13].tolist() == expected.argmax(-1).tolist()


@pytest.mark.parametrize("kinds", [["sliding_attention", "full_attention"], ["sliding_attention"] * 2])
def test_llm_sliding_window_equals_the_whole_text(llm, tmp_path, kinds):
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=500,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=40,
        layer_types=kinds,
        max_position_embeddings=4096,
        initializer_range=0.3,
    )
    Gemma3ForCausalLM(config).save_pretrained(tmp_path)
    PreTrainedTokenizerFast.from_pretrained(llm).save_pretrained(tmp_path)
    labeler = load_labeler("llm", model=str(tmp_path), dtype="float32")
    asked = [(report, finding, state) for report in range(2) for finding in (0, 12) for state in (0, 3)]
    found = labeler._scores(REPORTS[:2])
    for report, finding, state in asked:
        expected = score(labeler, REPORTS[report], finding, state)
        assert found[report, finding, state] == pytest.approx(expected, abs=1e-3)


def test_llm_batch_equals_single_reports(llm, labeler):
    alone = [labeler.label([report])[0].tolist() for report in REPORTS]
    for batch_size in (1, 2, 8):
        batched = load_labeler("llm", model=str(llm), dtype="float32", batch_size=batch_size)
        assert batched.label(REPORTS).tolist() == alone
        assert batched.label(REPORTS[::-1]).tolist() == alone[::-1]


def test_llm_calibration_subtracts_the_empty_report(llm, labeler):
    calibrated = load_labeler("llm", model=str(llm), dtype="float32", calibrate=True)
    expected = (labeler._scores(REPORTS) - labeler._scores([""])).argmax(-1)
    assert calibrated.label(REPORTS)[:, :13].tolist() == expected.tolist()
    assert not np.array_equal(expected, labeler._scores(REPORTS).argmax(-1))


def test_llm_no_finding_follows_the_rule(labeler, monkeypatch):
    device, cardiomegaly = ASKED.index("support_devices"), ASKED.index("cardiomegaly")
    answers = {"a": {}, "b": {device: 1, cardiomegaly: 2}, "c": {cardiomegaly: 3}, "d": {cardiomegaly: 1}}

    def scores(texts):
        rows = np.zeros((len(texts), 13, 4))
        for row, text in enumerate(texts):
            for finding, state in answers[text].items():
                rows[row, finding, state] = 1
        return rows

    monkeypatch.setattr(labeler, "_scores", scores)
    assert labeler.label(list(answers))[:, FINDINGS.index("no_finding")].tolist() == [1, 1, 0, 0]


def test_llm_cache_is_continued(llm, tmp_path, monkeypatch):
    cache = tmp_path / "states.jsonl"
    first = load_labeler("llm", model=str(llm), dtype="float32", cache=cache)
    expected = first.label(REPORTS).tolist()
    assert len(cache.read_text().splitlines()) == 3
    with cache.open("a") as file:
        file.write('{"report": "torn')
    second = load_labeler("llm", model=str(llm), dtype="float32", cache=cache)
    read = []
    monkeypatch.setattr(second, "_label", lambda texts: read.extend(texts) or [[2] * 13] * len(texts))
    assert second.label([*REPORTS, "Another report.", REPORTS[0]]).tolist() == [*expected, [2] * 13 + [1], expected[0]]
    assert read == ["Another report."]
    # Other settings have states of their own.
    third = load_labeler("llm", model=str(llm), dtype="float32", cache=cache, few_shot=1)
    monkeypatch.setattr(third, "_label", lambda texts: [[2] * 13] * len(texts))
    assert third.label(REPORTS).tolist() == [[2] * 13 + [1]] * 3
    lines = cache.read_text().splitlines()
    assert all(line.endswith("}") for line in lines)
    assert len(lines) == 3 + 1 + 3


def answer_of(prompt, **states):
    ids = {**dict.fromkeys(ASKED, 0), **states}
    return json.dumps({prompt.names[ASKED.index(name)]: prompt.answers[state] for name, state in ids.items()})


def test_llm_json_answers_are_validated_and_retried(llm, monkeypatch):
    labeler = load_labeler("llm", model=str(llm), mode="json", retries=1, dtype="float32")
    prompt = labeler.prompt
    valid, other = answer_of(prompt, cardiomegaly=1), answer_of(prompt, edema=2)
    written = {
        ("good", 0): f"Here it is: {valid} and more.",
        ("late", 0): valid.replace("present", "yes"),
        ("late", 1): other,
        ("never", 0): "{not json}",
        ("never", 1): json.dumps({"enlarged heart": "present"}),
    }
    monkeypatch.setattr(labeler, "_write", lambda texts, attempt: [written[text, attempt] for text in texts])
    with pytest.warns(UnreadReportsWarning, match=r"1 of 3 reports \(positions 2\) got no valid answer"):
        states = labeler.label(["good", "late", "never"])
    named = [{n: FINDING_STATES[s] for n, s in zip(FINDINGS, row, strict=True) if s} for row in states]
    assert named == [{"cardiomegaly": "positive"}, {"edema": "negative", "no_finding": "positive"}, {}]


def test_llm_invalid_json_is_counted(llm):
    labeler = load_labeler("llm", model=str(llm), mode="json", retries=1, dtype="float32")
    labeler._answer_tokens = 8
    with pytest.warns(UnreadReportsWarning, match="2 of 2 reports"):
        assert not labeler.label(REPORTS[:2]).any()


def test_llm_wrong_reports_are_named(labeler):
    with pytest.raises(ValueError, match="report 1 is NoneType: expected a string"):
        labeler.label(["Clear.", None])
    with pytest.raises(TypeError, match="reports is a single string"):
        labeler.label("Clear.")
    with pytest.warns(UnreadReportsWarning, match=r"1 of 2 reports \(positions 0\) hold no text"):
        states = labeler.label([" \n", REPORTS[0]])
    assert not states[0].any()
    with pytest.warns(UserWarning, match=r"1 of 1 reports \(positions 0\) are longer than 400 tokens and were cut"):
        assert labeler.label(["no effusion " * 5_000]).shape == (1, 14)
    assert labeler.label(["Herz vergrößert, 心脏\x00\x07"]).shape == (1, 14)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "guess"}, "mode='guess': expected score or json"),
        ({"few_shot": 9}, "few_shot=9: expected a whole number from 0 to 3"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"dtype": "float17"}, "dtype='float17': expected float32"),
        ({"calibrate": True, "mode": "json"}, "calibrate=True: expected mode='score'"),
        ({"model": "nowhere/llm"}, "text backbone 'nowhere/llm' could not be loaded"),
        ({"prompt": "nowhere.yaml"}, "prompt nowhere.yaml: cannot be read"),
    ],
)
def test_llm_wrong_options_are_named(llm, options, message, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises((ValueError, OSError), match=message) as caught:
        load_labeler("llm", **{"model": str(llm), **options})
    assert "\n" not in str(caught.value)


def test_llm_short_context_is_refused(llm, tmp_path):
    model = LlamaForCausalLM.from_pretrained(llm)
    model.config.max_position_embeddings = 100
    model.save_pretrained(tmp_path)
    PreTrainedTokenizerFast.from_pretrained(llm).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"reads 100 tokens, which the prompt fills: use a smaller few_shot"):
        load_labeler("llm", model=str(tmp_path))


def test_llm_ambiguous_tokenizer_is_refused(llm, tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({"<unk>": 0, "the": 1, ":": 2, "edema": 3}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    LlamaForCausalLM.from_pretrained(llm).save_pretrained(tmp_path)
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="tokenizer of the LLM cannot score the answer 'unmentioned' to"):
        load_labeler("llm", model=str(tmp_path))


@pytest.mark.parametrize(
    ("old", "new"),
    [("cardiomegaly: positive", "big_heart: positive"), ("positive: present", "sure: present"), ("json:", "xml:")],
)
def test_llm_wrong_prompt_file_is_named(tmp_path, old, new):
    path = tmp_path / "prompt.yaml"
    path.write_text(PROMPT.read_text(encoding="utf-8").replace(old, new), encoding="utf-8")
    with pytest.raises(ValueError, match=r"prompt .*prompt\.yaml: .*expected the keys of llm\.yaml"):
        load_prompt(path)


# --- several processes -----------------------------------------------------------------------------------------------


def test_label_by_an_llm_in_two_processes_writes_the_same_table(llm, launch, tmp_path, capsys):
    reports = [f"{REPORTS[number % 3]} {'Stable. ' * number}" for number in range(12)]
    lines = [json.dumps({"id": f"s{number}", "report": report}) for number, report in enumerate([*reports, *reports])]
    (tmp_path / "reports.jsonl").write_text("\n".join(lines))
    command = ["label", "--reports", str(tmp_path / "reports.jsonl"), "--labeler", "llm", "--option", f"model={llm}"]
    command += ["--option", "max_report_tokens=20", "--dtype", "float32", "--output"]
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    with pytest.warns(UserWarning, match=r"of 12 reports .* are longer than 20 tokens"):
        assert main([*command, str(tmp_path / "one" / "states.csv")]) == 0
    shown = capsys.readouterr().out
    printed = launch(["-m", "otdrg", *command, tmp_path / "two" / "states.csv"], OMP_NUM_THREADS="1")
    assert printed == [shown.replace("/one/", "/two/"), ""]
    assert (tmp_path / "two" / "states.csv").read_bytes() == (tmp_path / "one" / "states.csv").read_bytes()
    assert [path.name for path in (tmp_path / "two").iterdir()] == ["states.csv"]


def test_label_by_an_llm_continues_from_its_journal(llm, tmp_path, monkeypatch, capsys):
    built = tmp_path / "built"
    command = f"prepare phantom --train 6 --validation 2 --test 0 --image-size 32 --output {built}"
    assert main(command.split()) == 0
    command = ["label", str(built), "--labeler", "llm", "--option", f"model={llm}", "--option", "batch_size=1"]
    command += ["--relabel", "--output"]
    assert main([*command, str(tmp_path / "whole")]) == 0
    whole, read = LLMLabeler.label, []

    def stopped(self, reports):
        read.extend(reports)
        if len(read) == 3:
            raise KeyboardInterrupt
        return whole(self, reports)

    with monkeypatch.context() as patch:
        patch.setattr(LLMLabeler, "label", stopped)
        assert main([*command, str(tmp_path / "again")]) == 130
    monkeypatch.setattr(LLMLabeler, "label", lambda self, reports: read.extend(reports) or whole(self, reports))
    done = read[:2]
    read.clear()
    assert main([*command, str(tmp_path / "again"), "--resume"]) == 0
    assert read and not set(read) & set(done)
    for path in (tmp_path / "whole" / "data").iterdir():
        assert (tmp_path / "again" / "data" / path.name).read_bytes() == path.read_bytes()


def test_label_device_of_a_labeler_without_one_is_one_line(tmp_path, capsys):
    (tmp_path / "reports.jsonl").write_text('{"id": "a", "report": "Clear lungs."}')
    command = ["label", "--reports", str(tmp_path / "reports.jsonl"), "--output", str(tmp_path / "states.csv")]
    for arguments, message in (
        (["--device", "cpu"], "--device: labeler rules does not have it, expected none"),
        (
            ["--labeler", "chexbert", "--dtype", "float32"],
            "--dtype: labeler chexbert does not have it, expected device",
        ),
        (["--resume"], "--resume cannot be used with --reports and --labeler rules"),
    ):
        assert main([*command, *arguments]) == 1
        assert message in capsys.readouterr().err
