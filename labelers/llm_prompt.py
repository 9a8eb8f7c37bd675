"""The question that the labeler `llm` asks about a report, and its possible answers (paper, section 3.2.1)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..findings_otdrg import (
    FINDING_DISPLAY_NAMES,
    FINDING_STATES,
    FINDINGS,
    UNMENTIONED,
    finding_key,
    finding_state_id,
)
from ..runtime.yaml_files import read_yaml

PROMPT = Path(__file__).parent / "prompts" / "llm.yaml"

#: Findings in the prompt; No Finding follows from them.
ASKED: tuple[str, ...] = FINDINGS[:-1]


@dataclass(frozen=True)
class Prompt:
    """The content of a prompt file.

    Args:
        instruction: text before the findings.
        answers: word for each state, by its id.
        findings: description of each of the 13 findings.
        examples: reports and the state ids of the findings they mention, in the order in which they mention them.
    """

    instruction: str
    answers: tuple[str, ...]
    findings: tuple[str, ...]
    examples: tuple[tuple[str, dict[str, int]], ...]

    def chat(self, report: str) -> list[dict[str, str]]:
        """The messages that ask for the states of a report: the instruction and the examples come first.

        There is no system message, which the chat templates of some LLMs refuse.
        """
        lines = [f"- {FINDING_DISPLAY_NAMES[name]}: {text}" for name, text in zip(ASKED, self.findings, strict=True)]
        messages = []
        for example, states in self.examples:
            messages += [_message("user", f"Report: {example}"), _message("assistant", self.answer(states))]
        messages.append(_message("user", f"Report: {report}"))
        messages[0]["content"] = "\n".join([self.instruction, *lines, "", messages[0]["content"]])
        return messages

    def answer(self, states: dict[str, int]) -> str:
        """The JSON object of the findings that a report mentions."""
        return json.dumps({FINDING_DISPLAY_NAMES[name]: self.answers[state] for name, state in states.items()})

    def schema(self) -> dict[str, Any]:
        """The JSON schema of an answer.

        Not `properties`: servers then let the LLM write them in that order only, and a finding that it has passed over
        cannot be written any more.
        """
        words = [word for state, word in enumerate(self.answers) if state != UNMENTIONED]
        names = [FINDING_DISPLAY_NAMES[name] for name in ASKED]
        return {"type": "object", "propertyNames": {"enum": names}, "additionalProperties": {"enum": words}}

    def parse(self, text: str) -> list[int] | None:
        """Ids of the 13 states in an answer.

        Text around the first JSON object, and a thinking LLM's text before `</think>`, are skipped. None if there is no
        object, or it has a finding or a word that was not asked for.
        """
        text = text.rpartition("</think>")[2]
        try:
            given, _ = json.JSONDecoder().raw_decode(text[text.index("{") :])
            states = {finding_key(name): self.answers.index(word.strip().lower()) for name, word in given.items()}
        except (ValueError, AttributeError, RecursionError):
            return None
        return [states.get(name, UNMENTIONED) for name in ASKED]


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
        examples = [(str(example["report"]), example["states"]) for example in content["examples"]]
        named = [set(findings), *(set(states) for _, states in examples)]
        if wrong := sorted(set().union(*named) - set(ASKED)) or sorted(set(ASKED) - set(findings)):
            raise ValueError(f"finding {wrong[0]!r}: expected the findings {', '.join(ASKED)}")
        if len(set(words.values())) != len(FINDING_STATES):
            raise ValueError("answers: expected four different words")
        return Prompt(
            instruction=str(content["instruction"]),
            answers=tuple(words[state] for state in range(len(FINDING_STATES))),
            findings=tuple(findings[name] for name in ASKED),
            examples=tuple(
                (report, {name: finding_state_id(state) for name, state in states.items()})
                for report, states in examples
            ),
        )
    except OSError as error:
        raise ValueError(f"prompt {path}: cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"prompt {path}: {' '.join(str(error).split())}, expected the keys of {PROMPT.name}") from None
