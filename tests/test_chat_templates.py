"""Chat templates of others end with a line within seconds and without gigabytes of memory."""

import resource
import subprocess
import sys
import time

import pytest
from otdrg import OTDRGProcessor
from otdrg.chat_templates_otdrg import check_chat_template


@pytest.fixture
def saved(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "takes more than 3 s"),
        ("{{ 'a' * 10**10 }}", "needs more than 512 MB"),
        ("{{ 'a' | center(10**10) }}", "needs more than 512 MB"),
        ("{{ 'a' * 10**7 }}", "writes 10,000,000 characters"),
        (
            "{% set ns = namespace(x='aa') %}{% for i in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
            "needs more than 512 MB",
        ),
    ],
    ids=["endless", "large", "a filter", "long", "doubling"],
)
def test_default_prompt_endless_template_is_refused(saved, template, message):
    (saved / "chat_template.jinja").write_text(template)
    processor = OTDRGProcessor.from_pretrained(saved)
    began = time.monotonic()
    for _ in range(2):
        with pytest.raises(ValueError, match=f"the chat template {message}"):
            processor.default_prompt()
        if message != "takes more than 3 s":
            continue
        break
    assert time.monotonic() - began < 10
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss < 4 * 2**20


def test_default_prompt_range_beyond_the_sandboxes_is_refused(saved):
    (saved / "chat_template.jinja").write_text("{% for i in range(10**9) %}{% endfor %}")
    with pytest.raises(OverflowError, match="Range too big"):
        OTDRGProcessor.from_pretrained(saved).default_prompt()


def test_from_config_endless_template_of_a_backbone_is_refused(plain_tokenizer, build_config):
    import copy

    tokenizer = copy.deepcopy(plain_tokenizer)
    tokenizer.chat_template = "{{ 'a' * 10**10 }}"
    with pytest.raises(ValueError, match="the chat template needs more than 512 MB"):
        OTDRGProcessor.from_config(build_config(), tokenizer)


def test_check_chat_template_right_one_is_tried_once():
    calls = []

    def render(messages, chat_template, tokenize):
        calls.append(chat_template)
        return "text"

    check_chat_template("{# of this test #}", render)
    check_chat_template("{# of this test #}", render)
    assert calls == []  # it was in another process


@pytest.mark.parametrize(
    "before",
    [
        "resource.setrlimit(resource.RLIMIT_NOFILE, (4096, 4096)); files = [open(os.devnull) for _ in range(1100)]",
        "signal.signal(signal.SIGCHLD, signal.SIG_IGN)",
    ],
    ids=["many open files", "SIGCHLD ignored"],
)
def test_check_chat_template_in_other_processes_finds_the_fault(before):
    code = f"""
import os, resource, signal
from otdrg.chat_templates_otdrg import check_chat_template
{before}
check_chat_template("right", lambda *_, **__: "text")
try:
    check_chat_template("long", lambda *_, **__: "a" * 10**7)
except ValueError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.startswith("the chat template writes 10,000,000 characters"), done.stderr
