"""The llm labeler on tiny random LLMs in this process: what it asks, and what it makes of answers and of bad input."""

import json

import numpy as np
import pytest
from otdrg.cli import main
from otdrg.findings_otdrg import FINDING_DISPLAY_NAMES, FINDING_STATES, FINDINGS
from otdrg.labelers import UnreadReportsWarning, load_labeler
from otdrg.labelers.llm import LLMLabeler
from otdrg.labelers.llm_prompt import ASKED, PROMPT, load_prompt
from transformers import (
    AutoTokenizer,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

REPORTS = [
    "The heart is large.",
    "No effusion, but a port and an old fracture of a rib.",
    "Clear lungs.",
    "Normal heart and mediastinum.",
    "Opacity at the left base.",
]


@pytest.fixture(scope="module")
def llm(write_llm, tmp_path_factory):
    """Folder of an LLM whose answers are valid."""
    return write_llm(tmp_path_factory.mktemp("llm"))


@pytest.fixture
def load(tmp_path):
    """Loads the labeler with a cache of the test's own, for answers of one token."""

    def load(model, **options):
        fixed = {"dtype": "float32", "max_new_tokens": 1, "cache": tmp_path / "states.jsonl"}
        return load_labeler("llm", model=model, **{**fixed, **options})

    return load


def named(states):
    return [{n: FINDING_STATES[s] for n, s in zip(FINDINGS, row, strict=True) if s} for row in states]


def answers_to_whole_texts(folder, model):
    """What the LLM writes after each whole chat, read at once."""
    tokenizer, llm = AutoTokenizer.from_pretrained(folder), model.from_pretrained(folder)
    answers = []
    for report in REPORTS:
        chat = load_prompt().chat(report)
        inputs = tokenizer.apply_chat_template(chat, return_tensors="pt", return_dict=True, add_generation_prompt=True)
        written = llm.generate(**inputs, max_new_tokens=1, do_sample=False)
        answers.append(tokenizer.decode(written[0, inputs["input_ids"].shape[1] :]))
    return [load_prompt().parse(answer)[:13] for answer in answers]


def test_llm_shared_prefix_and_batches_equal_the_whole_text(llm, load, tmp_path):
    expected = answers_to_whole_texts(llm, LlamaForCausalLM)
    assert len(set(map(tuple, expected))) > 1
    for batch_size in (1, 2, 8):
        labeler = load(llm, batch_size=batch_size, cache=tmp_path / f"{batch_size}.jsonl")
        states = labeler.label(REPORTS)
        assert states.shape == (len(REPORTS), 14) and states.dtype == np.int64
        assert states[:, :13].tolist() == expected


@pytest.mark.parametrize("kinds", [["sliding_attention", "full_attention"], ["sliding_attention"] * 2])
def test_llm_sliding_window_equals_the_whole_text(write_llm, load, tmp_path, kinds):
    fields = {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 64, "layer_types": kinds, "seed": 11}
    folder = write_llm(tmp_path / "llm", model=Gemma3ForCausalLM, config=Gemma3TextConfig, **fields)
    expected = answers_to_whole_texts(folder, Gemma3ForCausalLM)
    assert len(set(map(tuple, expected))) > 1
    assert load(folder, batch_size=1).label(REPORTS)[:, :13].tolist() == expected


def test_llm_cache_is_continued(llm, load, tmp_path):
    cache = tmp_path / "states.jsonl"
    expected = load(llm).label(REPORTS[:3]).tolist()
    assert len(cache.read_text().splitlines()) == 3
    with cache.open("a") as file:
        file.write('{"report": "of an earlier version", "states": []}\n{"sentence": "torn')
    labeler = load(llm)
    assert labeler.label([*REPORTS[:4], REPORTS[0]]).tolist()[:3] == expected
    assert len(cache.read_text().splitlines()) == 5
    # Another prompt has states of its own.
    prompt = tmp_path / "prompt.yaml"
    prompt.write_text(PROMPT.read_text(encoding="utf-8").replace("chest radiograph", "radiograph"), encoding="utf-8")
    load(llm, prompt=prompt).label(REPORTS[:3])
    assert len(cache.read_text().splitlines()) == 5 + 3


def test_llm_cache_of_changed_weights_is_not_used(write_llm, load, tmp_path):
    write_llm(tmp_path / "llm")
    load(tmp_path / "llm").label(REPORTS)
    write_llm(tmp_path / "llm")
    load(tmp_path / "llm").label(REPORTS)
    assert len((tmp_path / "states.jsonl").read_text().splitlines()) == 2 * len(REPORTS)


def test_llm_invalid_answers_are_asked_again_and_counted(write_llm, load, tmp_path):
    folder = write_llm(tmp_path / "llm", "some")
    skipped = []
    for retries in (0, 1, 30):
        with pytest.warns() as caught:
            load(folder, retries=retries, cache=tmp_path / f"{retries}.jsonl").label([*REPORTS, ""])
        messages = [str(warning.message) for warning in caught if warning.category is UnreadReportsWarning]
        skipped.append(next((int(text.split()[0]) for text in messages if "got no valid answer" in text), 0))
    assert skipped[0] > skipped[-1]


def test_llm_nonsense_is_counted(write_llm, load, tmp_path):
    labeler = load(write_llm(tmp_path / "llm", "none"), retries=1, max_new_tokens=4)
    with pytest.warns(UnreadReportsWarning, match=r"2 of 2 reports \(positions 0, 1\) hold a sentence that got"):
        assert not labeler.label(REPORTS[:2]).any()
    assert not (tmp_path / "states.jsonl").exists()


def test_llm_wrong_reports_are_named(llm, load):
    labeler = load(llm)
    with pytest.raises(ValueError, match="report 1 is NoneType: expected a string"):
        labeler.label(["Clear.", None])
    with pytest.raises(TypeError, match="reports is a single string"):
        labeler.label("Clear.")
    with pytest.warns(UnreadReportsWarning, match=r"1 of 2 reports \(positions 0\) hold no text"):
        states = labeler.label([" \n", REPORTS[0]])
    assert not states[0].any() and states[1].any()
    assert labeler.label(["no effusion " * 5_000, "Herz vergrößert, 心脏\x00\ud800"]).any(1).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size=0: expected a number of at least 1"),
        ({"retries": "two"}, "retries='two': expected a number of at least 0"),
        ({"dtype": "float17"}, "dtype='float17': expected float32"),
        ({"model": "nowhere/llm"}, "text backbone 'nowhere/llm' could not be loaded"),
        ({"prompt": "nowhere.yaml"}, "prompt nowhere.yaml: cannot be read"),
        ({"max_new_tokens": 4096}, "reads 4096 tokens, which the prompt and the answer fill"),
    ],
)
def test_llm_wrong_options_are_named(llm, load, options, message, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises((ValueError, OSError), match=message) as caught:
        load(**{"model": llm, **options})
    assert "\n" not in str(caught.value)


def test_llm_without_chat_template_is_refused(llm, load, tmp_path):
    tokenizer = PreTrainedTokenizerFast.from_pretrained(llm)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path / "llm")
    LlamaForCausalLM.from_pretrained(llm).save_pretrained(tmp_path / "llm")
    with pytest.raises(ValueError, match="has no chat template: expected an instruction-tuned LLM"):
        load(str(tmp_path / "llm"))


# --- the prompt ------------------------------------------------------------------------------------------------------


def test_llm_prompt_examples_are_answers_of_their_own_schema():
    prompt = load_prompt()
    chat = prompt.chat("Clear lungs.")
    assert [message["role"] for message in chat] == ["user", "assistant"] * len(prompt.examples) + ["user"]
    assert prompt.instruction in chat[0]["content"] and chat[-1]["content"] == "Sentence: Clear lungs."
    words = ["unmentioned", *prompt.schema()["additionalProperties"]["enum"]]
    assert words == ["unmentioned", "present", "absent", "uncertain"]
    named = set()
    for message in chat[1::2]:
        answer = json.loads(message["content"])
        expected = [words.index(answer.get(FINDING_DISPLAY_NAMES[name], "unmentioned")) for name in ASKED]
        assert prompt.parse(message["content"])[:13] == expected
        named |= set(answer)
    # Each finding has an example, and so have findings that are not asked for.
    assert named > {FINDING_DISPLAY_NAMES[name] for name in ASKED}


def test_llm_sentences_are_asked_once_and_the_strongest_state_counts(llm, load, tmp_path):
    sentences = ["Small effusion.", "No effusion.", "Heart is large."]
    alone = dict(zip(sentences, load(llm).label(sentences)[:, :13].tolist(), strict=True))
    assert len({tuple(states) for states in alone.values()}) > 1
    lines = tmp_path / "states.jsonl"
    assert len(lines.read_text().splitlines()) == 3
    strength = {0: 0, 2: 1, 3: 2, 1: 3}
    reports = ["No effusion.\n\nSMALL  effusion!", "1. Heart is large\n2. Small effusion"]
    reports.append("No effusion. Heart is large.")
    parts = [sentences[1::-1], sentences[::2], sentences[1:]]
    expected = [
        [max(given, key=strength.get) for given in zip(*(alone[part] for part in own), strict=True)] for own in parts
    ]
    assert load(llm).label(reports)[:, :13].tolist() == expected
    assert len(lines.read_text().splitlines()) == 3


@pytest.mark.parametrize(
    ("text", "states"),
    [
        ('{"Gout": "uncertain", "Edema": "absent", "No Finding": "absent"}', {"edema": 2, None: 3}),
        ('Here it is: {"Edema": "absent"} {"Edema": "present"}', {"edema": 2}),
        ('```json\n{"pleural_effusion": " Present ", "EDEMA": "unmentioned"}\n```', {"pleural_effusion": 1}),
        ('<think>{"Edema": "present"}</think>{"Edema": "uncertain", "No Finding": "absent"}', {"edema": 3}),
        ("{}", {}),
    ],
)
def test_llm_valid_answers_are_parsed(text, states):
    assert load_prompt().parse(text) == [states.get(name, 0) for name in (*ASKED, None)]


@pytest.mark.parametrize(
    "text",
    ["", "none", "[]", '{"Edema": "absent"', '{"Edema": "yes"}', '{"Edema": 1}', "{" * 100_000],
)
def test_llm_invalid_answers_are_refused(text):
    assert load_prompt().parse(text) is None


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('cardiomegaly: "heart', 'big_heart: "heart', "finding 'big_heart': expected the findings"),
        ("Atelectasis: uncertain", "Atelectasis: maybe", "answer 'maybe' of an example: expected one of"),
        ('  fracture: "fracture"\n', "", "finding 'fracture': expected the findings"),
        ("positive: present", "sure: present", "unknown finding state 'sure'"),
        ("positive: present", "positive: absent", "four different words"),
        ("instruction:", "text:", "'instruction'"),
    ],
)
def test_llm_wrong_prompt_file_is_named(tmp_path, old, new, message):
    path = tmp_path / "prompt.yaml"
    path.write_text(PROMPT.read_text(encoding="utf-8").replace(old, new), encoding="utf-8")
    with pytest.raises(ValueError, match=rf"prompt .*prompt\.yaml: .*{message}.*expected the keys of llm\.yaml"):
        load_prompt(path)


# --- several processes -----------------------------------------------------------------------------------------------


def test_label_by_an_llm_in_two_processes_writes_the_same_table(llm, launch, tmp_path, capsys):
    reports = [f"{REPORTS[number % 3]} {'Stable. ' * number}" for number in range(12)]
    lines = [json.dumps({"id": f"s{number}", "report": report}) for number, report in enumerate([*reports, *reports])]
    (tmp_path / "reports.jsonl").write_text("\n".join(lines))
    command = ["label", "--reports", str(tmp_path / "reports.jsonl"), "--labeler", "llm", "--option", f"model={llm}"]
    command += ["--option", "max_new_tokens=1", "--option", "batch_size=4", "--dtype", "float32"]

    def to(name):
        (tmp_path / name).mkdir()
        cache = f"cache={tmp_path / name}.jsonl"
        return [*command, "--option", cache, "--output", str(tmp_path / name / "states.csv")]

    assert main(to("one")) == 0
    shown = capsys.readouterr().out
    printed = launch(["-m", "otdrg", *to("two")], OMP_NUM_THREADS="1")
    assert printed == [shown.replace("/one/", "/two/"), ""]
    assert (tmp_path / "two" / "states.csv").read_bytes() == (tmp_path / "one" / "states.csv").read_bytes()
    assert [path.name for path in (tmp_path / "two").iterdir()] == ["states.csv"]


def test_label_by_an_llm_continues_from_its_journal(llm, tmp_path, monkeypatch, capsys):
    built = tmp_path / "built"
    command = f"prepare phantom --train 6 --validation 2 --test 0 --image-size 32 --output {built}"
    assert main(command.split()) == 0
    command = ["label", str(built), "--labeler", "llm", "--option", f"model={llm}", "--option", "batch_size=1"]
    command += [
        "--option",
        "max_new_tokens=1",
        "--option",
        f"cache={tmp_path / 'states.jsonl'}",
        "--relabel",
        "--output",
    ]
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


def test_prompt_no_finding_is_no_abnormality():
    assert load_prompt().parse('{"No Finding": "present"}') == [0] * 14
    assert load_prompt().parse('{"no finding": "present", "edema": "absent"}')[FINDINGS.index("edema")] == 2
