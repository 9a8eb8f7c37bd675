"""The labeler `llm`: a frozen LLM reads the finding states from a report's sentences (DLE; paper, section 3.2.1)."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ..findings_otdrg import FINDINGS, POSITIVE, UNCLEAR, UNMENTIONED
from ..runtime.journal import Journal
from . import check_reports, warn_of_reports
from .llm_prompt import ASKED, PROMPT, load_prompt, strongest
from .sentences import split_sentences

#: Receives a sentence and the state ids of [`Prompt.parse`], None if no answer was valid.
Keep = Callable[[str, "list[int] | None"], None]

#: Positions in the states of [`Prompt.parse`] that rule out "No Finding"; the last is that of other findings.
_BARRING = [position for position, name in enumerate((*ASKED, None)) if name != "support_devices"]


class AskedLLM(Protocol):
    """An LLM in this process or on a server."""

    def ask(self, sentences: list[str], keep: Keep) -> None:
        """Ask for the states of different sentences; `keep` is called for each as soon as it is answered."""


class LLMLabeler:
    """Reads finding states with a frozen instruction-tuned LLM.

    The LLM is asked in its chat template for a JSON object of the findings that a sentence mentions. Each different
    sentence is asked about once. An answer without JSON, or with another state, is invalid, and the LLM is asked again,
    with sampling. A finding of several sentences is positive if it is in one of them, else unclear if it is in one of
    them. "No Finding" is positive if no other finding, support devices left out, is positive or unclear (CheXpert's
    rule); findings that are not among the 14 count too.

    Args:
        model: Hub id, folder or GGUF file of the LLM; with `endpoint`, its name on the server.
        endpoint: URL of a server with OpenAI's API, such as http://localhost:8000/v1. The environment variable
            `OPENAI_API_KEY` holds its key, if it needs one. By default the LLM is loaded into this process.
        concurrency: requests to the endpoint at a time.
        timeout: seconds to wait for an answer of the endpoint.
        batch_size: sentences in a batch. Only without `endpoint`.
        retries: how often the LLM is asked again after an invalid answer.
        max_new_tokens: longest answer; more for an LLM that thinks first.
        cache: file that stores the states of each sentence by endpoint, model and prompt, so that an interrupted
            labelling can continue and no sentence is read twice. By default `otdrg/llm_states.jsonl` in `HF_HOME`.
        prompt: prompt file; by default that of the package.
        dtype: type of the LLM's weights. Only without `endpoint`.
        device: by default accelerate's choice, see [`inference_device`]. Only without `endpoint`.
        progress: show a progress bar.
        quantization: "4bit" or "8bit", of the linear layers, by bitsandbytes. Only without `endpoint`.

    Raises:
        ImportError: `endpoint` without the package `openai`, or `quantization` without bitsandbytes.
        OSError: the LLM cannot be loaded.
        ValueError: an option is out of range, or the LLM has no chat template or too short a context.
    """

    name = "llm"

    def __init__(
        self,
        model: str,
        endpoint: str | None = None,
        concurrency: int = 64,
        timeout: float = 600,
        batch_size: int = 8,
        retries: int = 2,
        max_new_tokens: int = 150,
        cache: str | os.PathLike | None = None,
        prompt: str | os.PathLike = PROMPT,
        dtype: str = "bfloat16",
        device: str | None = None,
        progress: bool = False,
        quantization: str | None = None,
    ):
        self.prompt = load_prompt(prompt)
        for option, value, least in (
            ("concurrency", concurrency, 1),
            ("timeout", timeout, 0.1),
            ("batch_size", batch_size, 1),
            ("retries", retries, 0),
            ("max_new_tokens", max_new_tokens, 1),
        ):
            if not isinstance(value, (int, float) if option == "timeout" else int) or not least <= value < 1e9:
                raise ValueError(f"{option}={value!r}: expected a number of at least {least}")
        self.progress = progress
        settings = [str(model), _changed(model), self.prompt.chat(""), dtype]
        settings += [] if quantization is None else [quantization]
        settings += [] if endpoint is None else [endpoint]
        self._cache = _Cache(cache or _default_cache(), settings)
        self._llm: AskedLLM
        if endpoint is not None:
            from .llm_endpoint import Endpoint

            #: Reports in a call of `label` that keeps the LLM busy.
            self.batch_size = 4 * concurrency
            self._llm = Endpoint(endpoint, str(model), self.prompt, concurrency, timeout, retries, max_new_tokens)
        else:
            from .llm_local import LocalLLM

            self.batch_size = batch_size
            self._llm = LocalLLM(
                str(model), self.prompt, batch_size, retries, max_new_tokens, dtype, device, quantization
            )

    def label(self, reports: Sequence[str]) -> np.ndarray:
        """(N, 14) int64 state ids of N reports.

        Reports without text, and those with a sentence without a valid answer, have all findings unmentioned, including
        "No Finding". Warnings count and list these reports.

        Raises:
            ConnectionError: the endpoint does not answer, or refuses to; the answers so far are in the cache.
            TypeError, ValueError: as [`check_reports`].
        """
        check_reports(reports)
        read = [_sentences(report) for report in reports]
        found = self._answers({sentence for sentences in read for sentence in sentences})
        rows = np.full((len(read), len(FINDINGS)), UNMENTIONED, dtype=np.int64)
        empty, invalid = [], []
        for place, sentences in enumerate(read):
            states = [answer for sentence in sentences if (answer := found[sentence]) is not None]
            if not sentences:
                empty.append(place)
            elif len(states) < len(sentences):
                invalid.append(place)
            else:
                rows[place] = _with_no_finding([strongest(given) for given in zip(*states, strict=True)])
        warn_of_reports(empty, len(read), "hold no text: all findings unmentioned")
        warn_of_reports(
            invalid, len(read), "hold a sentence that got no valid answer: all findings of the report unmentioned"
        )
        return rows

    def _answers(self, sentences: set[str]) -> dict[str, list[int] | None]:
        """States of each sentence, from the cache or the LLM; None without a valid answer."""
        from tqdm.auto import tqdm

        found = {sentence: self._cache.get(sentence) for sentence in sentences}
        # Sorted by length, so that batches need little padding; then by text, so that two runs have the same batches.
        unknown = sorted((text for text, states in found.items() if states is None), key=lambda text: (len(text), text))
        if not unknown:
            return found
        # The bar begins at the number of sentences from the cache.
        bar = tqdm(
            total=len(found),
            initial=len(found) - len(unknown),
            desc=self.name,
            unit="sentence",
            disable=not self.progress,
        )
        with bar:

            def keep(sentence: str, states: list[int] | None) -> None:
                found[sentence] = states
                if states is not None:
                    self._cache.put(sentence, states)
                bar.update()

            try:
                self._llm.ask(unknown, keep)
            except ConnectionError as error:
                answered = sum(found[sentence] is not None for sentence in unknown)
                raise ConnectionError(
                    f"{error}; {answered:,} of {len(unknown):,} sentences are answered and kept in {self._cache.path}, "
                    "and will not be asked again"
                ) from error
        return found


def _sentences(report: str) -> list[str]:
    """The sentences of a report, each with a capital letter and a full stop."""
    # Lone surrogates can be neither encoded nor sent.
    parts = (" ".join(part.split()) for part in split_sentences(report.encode("utf-8", "replace").decode()))
    return [f"{part[0].upper()}{part[1:]}." for part in parts if any(map(str.isalnum, part))]


def _with_no_finding(states: Sequence[int]) -> list[int]:
    """The 14 states of a report from those of [`Prompt.parse`], with No Finding by CheXpert's rule."""
    abnormal = any(states[position] in (POSITIVE, UNCLEAR) for position in _BARRING)
    return [*states[: len(ASKED)], UNMENTIONED if abnormal else POSITIVE]


def _default_cache() -> Path:
    from huggingface_hub.constants import HF_HOME

    return Path(HF_HOME) / "otdrg" / "llm_states.jsonl"


def _changed(model: str | os.PathLike) -> int | None:
    """When a local model was last changed, so that answers of its former weights are not used."""
    path = Path(model)
    files = [file for file in path.iterdir() if file.is_file()] if path.is_dir() else [path]
    return max((file.stat().st_mtime_ns for file in files if file.is_file()), default=None)


class _Cache:
    """States by sentence, in memory and on disk; rows of other settings are kept."""

    def __init__(self, path: str | os.PathLike, settings: list[Any]):
        self.path = Path(path)
        self._settings = json.dumps(settings)
        self._journal = Journal(path)
        self._states: dict[str, list[int]] = {
            row["sentence"]: row["states"]
            for row in self._journal.rows
            if "sentence" in row  # earlier versions asked about whole reports
        }

    def _key(self, text: str) -> str:
        return hashlib.sha256(f"{self._settings}\n{text}".encode()).hexdigest()

    def get(self, text: str) -> list[int] | None:
        return self._states.get(self._key(text))

    def put(self, text: str, states: list[int]) -> None:
        row = {"sentence": self._key(text), "states": states}
        self._states[row["sentence"]] = states
        self._journal.add([row])
