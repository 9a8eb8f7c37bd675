"""The question that the labeler `llm` asks about a sentence, and its possible answers (paper, section 3.2.1)."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..findings_otdrg import (
    FINDING_DISPLAY_NAMES,
    FINDING_STATES,
    FINDINGS,
    NEGATIVE,
    POSITIVE,
    UNCLEAR,
    UNMENTIONED,
    finding_key,
    finding_state_id,
)
from ..runtime.yaml_files import read_yaml

PROMPT = Path(__file__).parent / "prompts" / "llm.yaml"

#: Findings in the prompt; No Finding follows from them.
ASKED: tuple[str, ...] = FINDINGS[:-1]
_STRENGTH = (UNMENTIONED, NEGATIVE, UNCLEAR, POSITIVE)


@dataclass(frozen=True)
class Prompt:
    """The content of a prompt file.

    Args:
        instruction: text before the findings.
        answers: word for each state, by its id.
        findings: description of each of the 13 findings.
        examples: sentences and the words for the findings they mention, in the order in which they mention them. Names
            that are not among the 13 findings keep the LLM from taking other findings for one of them.
    """

    instruction: str
    answers: tuple[str, ...]
    findings: tuple[str, ...]
    examples: tuple[tuple[str, dict[str, str]], ...]

    def chat(self, sentence: str) -> list[dict[str, str]]:
        """The messages that ask for the states of a sentence: the instruction and the examples come first.

        There is no system message, which the chat templates of some LLMs refuse.
        """
        lines = [f"- {FINDING_DISPLAY_NAMES[name]}: {text}" for name, text in zip(ASKED, self.findings, strict=True)]
        messages = []
        for example, answer in self.examples:
            messages += [_message("user", f"Sentence: {example}"), _message("assistant", json.dumps(answer))]
        messages.append(_message("user", f"Sentence: {sentence}"))
        messages[0]["content"] = "\n".join([self.instruction, *lines, "", messages[0]["content"]])
        return messages

    def schema(self) -> dict[str, Any]:
        """The JSON schema of an answer.

        It does not limit the names: a finding that the LLM has no name for would be written as one of the 13.
        """
        words = [word for state, word in enumerate(self.answers) if state != UNMENTIONED]
        return {"type": "object", "additionalProperties": {"enum": words}}

    def parse(self, text: str) -> list[int] | None:
        """Ids of the 13 states in an answer, and the first state of a finding that was not asked for.

        "No Finding" is ignored, because it follows from the other findings. Text around the first JSON object, and a
        thinking LLM's text before `</think>`, are skipped. None if there is no object, or it has a word that was not
        asked for.
        """
        text = text.rpartition("</think>")[2]
        try:
            given, _ = json.JSONDecoder().raw_decode(text[text.index("{") :])
            states = [(_key(name), self.answers.index(word.strip().lower())) for name, word in given.items()]
        except (ValueError, AttributeError, RecursionError):
            return None
        return [strongest(state for key, state in states if key == name) for name in (*ASKED, None)]


def strongest(states: Iterable[int]) -> int:
    """Of several states of a finding, the one that counts in CheXpert's labels; unmentioned without any."""
    return max(states, key=_STRENGTH.index, default=UNMENTIONED)


def _key(name: str) -> str | None:
    """A finding's key, None of a name that is none of the 14."""
    try:
        return finding_key(name)
    except ValueError:
        return None


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def load_prompt(path: str | Path = PROMPT) -> Prompt:
    """Read a prompt file.

    Raises:
        ValueError: the file cannot be read, or a key, finding or state in it is wrong; the message names it.
    """
    try:
        content = read_yaml(path)
        words = {finding_state_id(state): str(word).lower() for state, word in content["answers"].items()}
        findings = {name: str(text) for name, text in content["findings"].items()}
        examples = tuple((str(sentence), dict(answer)) for sentence, answer in content["examples"].items())
        if wrong := sorted(set(findings) ^ set(ASKED)):
            raise ValueError(f"finding {wrong[0]!r}: expected the findings {', '.join(ASKED)}")
        if len(set(words.values())) != len(FINDING_STATES):
            raise ValueError("answers: expected four different words")
        if wrong := [word for _, answer in examples for word in answer.values() if word not in words.values()]:
            raise ValueError(f"answer {wrong[0]!r} of an example: expected one of {', '.join(words.values())}")
        return Prompt(
            instruction=str(content["instruction"]),
            answers=tuple(words[state] for state in range(len(FINDING_STATES))),
            findings=tuple(findings[name] for name in ASKED),
            examples=examples,
        )
    except OSError as error:
        raise ValueError(f"prompt {path}: cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"prompt {path}: {' '.join(str(error).split())}, expected the keys of {PROMPT.name}") from None
