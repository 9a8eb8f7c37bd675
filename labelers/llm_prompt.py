"""The prompt of the labeler `llm`, and its possible answers (paper, section 3.2.1)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from ..findings_otdrg import FINDING_DISPLAY_NAMES, FINDING_STATES, FINDINGS, UNMENTIONED, finding_state_id
from ..runtime.yaml_files import read_yaml

PROMPT = Path(__file__).parent / "prompts" / "llm.yaml"

#: Findings in the prompt; No Finding follows from them.
ASKED: tuple[str, ...] = FINDINGS[:-1]


@dataclass
class Prompt:
    """The content of a prompt file.

    Args:
        instruction: text before the examples.
        answers: word for each state, by its id.
        names: name of each of the 13 findings.
        examples: reports and the ids of their 13 states.
        json: request for JSON.
    """

    instruction: str
    answers: tuple[str, ...]
    names: tuple[str, ...]
    examples: tuple[tuple[str, tuple[int, ...]], ...]
    json: str

    def head(self, few_shot: int) -> str:
        """The text before each report: the instruction and the first `few_shot` examples."""
        shots = [
            f"{self.report(report)}{''.join(self.question(i) + self.answer(states[i]) + chr(10) for i in range(13))}"
            for report, states in self.examples[:few_shot]
        ]
        return "\n".join([f"{self.instruction}\n", *shots]) + "\n"

    def report(self, text: str) -> str:
        """A report, and the beginning of the list of its findings."""
        return f"Report: {' '.join(text.split())}\nFindings:\n"

    def question(self, finding: int) -> str:
        """The line of a finding up to its answer."""
        return f"{self.names[finding]}:"

    def answer(self, state: int) -> str:
        """The answer for a state."""
        return f" {self.answers[state]}"

    def json_request(self, text: str, few_shot: int) -> str:
        """The complete request in mode "json"."""
        parts = [f"{self.instruction}\n"]
        for report, states in (*self.examples[:few_shot], (text, None)):
            parts.append(f"Report: {' '.join(report.split())}")
            if states is not None:
                named = dict(zip(self.names, (self.answers[state] for state in states), strict=True))
                parts.append(f"{json.dumps(named)}\n")
        return "\n".join([*parts, "", self.json])

    def parse_json(self, text: str) -> list[int] | None:
        """Ids of the 13 states in a JSON answer; None if it is invalid or has other findings."""
        start, end = text.find("{"), text.find("}")
        try:
            given = json.loads(text[start : end + 1]) if start >= 0 else None
        except ValueError:
            return None
        if not isinstance(given, dict):
            return None
        given = {str(name).strip().lower(): str(word).strip().lower() for name, word in given.items()}
        if set(given) != set(self.names) or not set(given.values()) <= set(self.answers):
            return None
        return [self.answers.index(given[name]) for name in self.names]


def load_prompt(path: str | Path = PROMPT) -> Prompt:
    """Read a prompt file.

    Raises:
        ValueError: the file cannot be read, or a key, finding or state in it is wrong; the message names it.
    """
    try:
        content = read_yaml(path)
        states = {finding_state_id(state): str(word) for state, word in content["answers"].items()}
        names = {**FINDING_DISPLAY_NAMES, **content["findings"]}
        unknown = [name for name in names if name not in FINDINGS]
        examples = [(example["report"], example["states"]) for example in content["examples"]]
        unknown += [name for _, stated in examples for name in stated if name not in ASKED]
        if unknown or len(set(states.values())) != len(FINDING_STATES):
            wrong = f"finding {unknown[0]!r}" if unknown else "answers"
            raise ValueError(f"{wrong}: expected findings of {', '.join(ASKED)} and four different answers")
        return Prompt(
            instruction=content["instruction"],
            answers=tuple(states[state] for state in range(len(FINDING_STATES))),
            names=tuple(names[name].lower() for name in ASKED),
            examples=tuple(
                (report, tuple(finding_state_id(stated.get(name, UNMENTIONED)) for name in ASKED))
                for report, stated in examples
            ),
            json=content["json"],
        )
    except OSError as error:
        raise ValueError(f"prompt {path}: cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"prompt {path}: {' '.join(str(error).split())}, expected the keys of {PROMPT.name}") from None
