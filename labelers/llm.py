"""The labeler `llm`: a frozen causal LLM reads the states out of a report (DLE; paper, section 3.2.1)."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from ..files_otdrg import read_text
from ..findings_otdrg import FINDING_STATES, FINDINGS, POSITIVE, UNCLEAR, UNMENTIONED
from . import UnreadReportsWarning
from .llm_prompt import ASKED, PROMPT, load_prompt

if TYPE_CHECKING:
    import torch

_STATES = range(len(FINDING_STATES))
_BARRING = [position for position, name in enumerate(ASKED) if name != "support_devices"]


class LLMLabeler:
    """States of the 14 findings by a frozen causal LLM.

    In the mode "score" each of 13 findings is a question whose four answers are weighed: the state is that of the
    answer with the highest log-likelihood, so that every answer is valid. What all reports share, instruction and
    examples, is read once, the report once a report, and its questions and answers together in one row. In the mode
    "json" the LLM writes a JSON object, which is checked, asked for again where it is not valid, and counted where it
    never was. No Finding is positive where nothing else but support devices is positive or unclear (CheXpert's rule).

    Args:
        model: Hub id, folder or GGUF file of the LLM.
        mode: "score" or "json" (for instruction models).
        few_shot: examples in the prompt, at most those of its file.
        calibrate: subtract the answers' log-likelihoods for an empty report (contextual calibration; Zhao et al., ICML
            2021). For the mode "score".
        batch_size: reports at once.
        max_report_tokens: longer reports are cut at their end; so are those that the LLM's context cannot hold.
        retries: how often an answer that is not valid JSON is asked for again, by sampling.
        cache: file in which the states of each report are kept, a line a report; an interrupted labelling goes on from
            there, and reports that come again are not read again.
        prompt: a prompt file; the package's own by default.
        dtype: type of the LLM's weights.
        device: where to run; by default the first accelerator, or else the CPU.
        progress: whether to draw a progress bar.

    Raises:
        OSError: the LLM cannot be loaded.
        ValueError: an option is out of its range, the tokenizer cannot tell the answers, or the context is too short.
    """

    name = "llm"

    def __init__(
        self,
        model: str,
        mode: Literal["score", "json"] = "score",
        few_shot: int = 3,
        calibrate: bool = False,
        batch_size: int = 4,
        max_report_tokens: int = 400,
        retries: int = 2,
        cache: str | os.PathLike | None = None,
        prompt: str | os.PathLike = PROMPT,
        dtype: str = "bfloat16",
        device: str | None = None,
        progress: bool = False,
    ):
        self.prompt = load_prompt(prompt)
        _check_options(mode, few_shot, len(self.prompt.examples), calibrate, batch_size, max_report_tokens, retries)
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        from ..weights_otdrg import load_backbone

        if not isinstance(getattr(torch, dtype, None), torch.dtype):
            raise ValueError(f"dtype={dtype!r}: expected float32, bfloat16 or float16")
        self.tokenizer = load_backbone("text", AutoTokenizer, str(model))
        self.model = load_backbone("text", AutoModelForCausalLM, str(model), dtype=getattr(torch, dtype)).eval()
        self.model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.mode, self.few_shot, self.calibrate = mode, few_shot, calibrate
        self.batch_size, self.retries, self.progress = batch_size, retries, progress
        limit = getattr(self.model.config, "max_position_embeddings", None) or 2**31
        head = self.prompt.head(few_shot)
        if mode == "score":
            self._packed = self._pack_questions()
            self._head = self.tokenizer.encode(head)
            room = limit - len(self._head) - int(self._packed.offsets.max()) - 1
            self._past = self._read(self._head)
        else:
            # Twice the tokens of the object with the longest words, for other white space.
            longest = json.dumps(dict.fromkeys(self.prompt.names, max(self.prompt.answers, key=len)))
            self._answer_tokens = 2 * len(self._tokens(longest))
            room = limit - len(self._tokens(self.prompt.json_request("", few_shot))) - self._answer_tokens - 64
        self.max_report_tokens = min(max_report_tokens, room)
        if self.max_report_tokens < 1:
            raise ValueError(f"model {model} reads {limit} tokens, which the prompt fills: expected fewer few_shot")
        settings = [
            str(model),
            mode,
            few_shot,
            calibrate,
            self.max_report_tokens,
            dtype,
            head,
            self.prompt.json,
            retries,
        ]
        self._cache = _Cache(cache, settings)
        self._empty_scores = self._scores([""])[0] if calibrate else None

    def label(self, reports: Sequence[str]) -> np.ndarray:
        """(N, 14) int64 state ids of N reports.

        Reports without text, and in the mode "json" those whose answers were never valid, have every finding
        unmentioned, No Finding too; warnings count and list them, and the reports that were cut.

        Raises:
            TypeError: `reports` is a single string.
            ValueError: a report is not a string; the message gives its position.
        """
        from tqdm.auto import tqdm

        if isinstance(reports, str):
            raise TypeError("reports is a single string: expected a list of reports")
        for position, report in enumerate(reports):
            if not isinstance(report, str):
                raise ValueError(f"report {position} is {type(report).__name__}: expected a string ('' when absent)")
        texts = [" ".join(report.split()) for report in reports]
        states = np.full((len(texts), len(FINDINGS)), UNMENTIONED, dtype=np.int64)
        wanted: dict[str, list[int]] = {}
        for position, text in enumerate(texts):
            wanted.setdefault(text, []).append(position)
        empty = wanted.pop("", [])
        found = {text: self._cache.get(text) for text in wanted}
        # By length, so that a batch is hardly padded.
        unknown = sorted((text for text, row in found.items() if row is None), key=len)
        long, invalid = [], []
        for start in tqdm(range(0, len(unknown), self.batch_size), desc=self.name, disable=not self.progress):
            batch = unknown[start : start + self.batch_size]
            cut = [self._cut(text) for text in batch]
            long += [text for text, shorter in zip(batch, cut, strict=True) if shorter != text]
            for text, row in zip(batch, self._label(cut), strict=True):
                found[text] = row
                if row is None:
                    invalid.append(text)
                else:
                    self._cache.put(text, row)
        for text, positions in wanted.items():
            if found[text] is not None:
                states[positions] = _with_no_finding(found[text])
        _warn(empty, len(texts), "hold no text: all findings unmentioned", UnreadReportsWarning)
        answered = [position for text in invalid for position in wanted[text]]
        _warn(answered, len(texts), "got no valid answer: all findings unmentioned", UnreadReportsWarning)
        cut = [position for text in long for position in wanted[text]]
        _warn(cut, len(texts), f"are longer than {self.max_report_tokens} tokens and were cut", UserWarning)
        return states

    def _label(self, texts: list[str]) -> list[list[int] | None]:
        """Ids of the 13 states of each report."""
        if self.mode == "json":
            return self._answers(texts)
        scores = self._scores(texts)
        if self._empty_scores is not None:
            scores = scores - self._empty_scores
        return scores.argmax(-1).tolist()

    def _tokens(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def _cut(self, text: str) -> str:
        tokens = self._tokens(text)
        if len(tokens) <= self.max_report_tokens:
            return text
        return self.tokenizer.decode(tokens[: self.max_report_tokens], skip_special_tokens=True)

    # --- scoring -----------------------------------------------------------------------------------------------------

    def _pack_questions(self) -> _Packed:
        """All questions and answers in one row, in which each sees only its own beginning."""
        import torch

        tokens: list[int] = []
        offsets: list[int] = []
        paths: list[list[int]] = []
        picks: list[tuple[int, int, int, int]] = []

        def put(token: int, path: list[int]) -> list[int]:
            path = [*path, len(tokens)]
            tokens.append(token)
            offsets.append(len(path) - 1)
            paths.append(path)
            return path

        for finding in range(len(ASKED)):
            question, answers = self._tokenized(finding)
            asked: list[int] = []
            for token in question:
                asked = put(token, asked)
            for state, answer in enumerate(answers):
                path = asked
                for place, token in enumerate(answer):
                    # A token's likelihood is read where the one before it stands; behind the last nothing is read.
                    picks.append((finding, state, path[-1], token))
                    if place + 1 < len(answer):
                        path = put(token, path)
        sees = torch.zeros(len(tokens), len(tokens), dtype=torch.bool)
        for place, path in enumerate(paths):
            sees[place, path] = True
        return _Packed(torch.tensor(tokens), torch.tensor(offsets), sees, torch.tensor(picks))

    def _tokenized(self, finding: int) -> tuple[list[int], list[list[int]]]:
        """Tokens of a question, and of its four answers behind it.

        Raises:
            ValueError: the tokenizer does not keep them apart.
        """
        question = self._tokens(self.prompt.question(finding))
        answers = []
        for state in _STATES:
            whole = self._tokens(self.prompt.question(finding) + self.prompt.answer(state))
            unknown = self.tokenizer.unk_token_id is not None and self.tokenizer.unk_token_id in whole
            if unknown or not question or len(whole) <= len(question) or whole[: len(question)] != question:
                raise ValueError(
                    f"the tokenizer of the LLM cannot score the answer {self.prompt.answers[state]!r} to "
                    f"{self.prompt.question(finding)!r}: expected it to be tokens of their own behind the question"
                )
            answers.append(whole[len(question) :])
        if len(set(map(tuple, answers))) < len(answers):
            raise ValueError("the tokenizer of the LLM writes two answers alike: expected four different ones")
        return question, answers

    def _read(self, tokens: list[int]) -> Any:
        """The cache behind the tokens that all reports share; of all layers whole, so that masks say what is seen."""
        import torch
        from transformers import DynamicCache

        from ..modeling_otdrg import CACHE

        inputs = torch.tensor([tokens], device=self.model.device)
        with torch.inference_mode():
            return self.model(input_ids=inputs, use_cache=True, logits_to_keep=1, **{CACHE: DynamicCache()})[CACHE]

    def _masks(self, seen: torch.Tensor, queries: torch.Tensor, keys: torch.Tensor) -> Any:
        """The additive masks (B, 1, Q, K) of what is seen; of layers with a sliding window, what lies within it."""
        import torch

        def additive(allowed: torch.Tensor) -> torch.Tensor:
            mask = torch.zeros(allowed.shape, dtype=self.model.dtype)
            return mask.masked_fill_(~allowed, torch.finfo(self.model.dtype).min)[:, None].to(self.model.device)

        config = self.model.config
        kinds, window = set(getattr(config, "layer_types", None) or ()), getattr(config, "sliding_window", None)
        if "sliding_attention" not in kinds and (kinds or not window):
            return additive(seen)
        near = seen & (queries[:, :, None] - keys[:, None, :] < window)
        if kinds <= {"sliding_attention"}:
            return additive(near)
        return {"full_attention": additive(seen), "sliding_attention": additive(near)}

    def _scores(self, texts: list[str]) -> np.ndarray:
        """(B, 13, 4) log-likelihoods of the answers."""
        import torch

        from ..modeling_otdrg import CACHE

        device, head, packed = self.model.device, len(self._head), self._packed
        reports = [self._tokens(self.prompt.report(text)) for text in texts]
        longest = max(map(len, reports))
        tokens = torch.zeros(len(reports), longest, dtype=torch.long)
        real = torch.zeros(len(reports), head + longest, dtype=torch.bool)
        for row, report in enumerate(reports):
            tokens[row, : len(report)] = torch.tensor(report)
            real[row, : head + len(report)] = True
        past = copy.deepcopy(self._past)
        past.batch_repeat_interleave(len(reports))
        before = torch.arange(head + longest).expand(len(reports), -1)
        reading = before[:, head:]
        # Behind a shorter report of the batch the questions follow its padding, which they do not see.
        asking = real.sum(1, keepdim=True) + packed.offsets
        own = packed.sees.expand(len(reports), -1, -1)
        seen = torch.cat([real[:, None].expand(-1, len(packed.tokens), -1), own], 2)
        with torch.inference_mode():
            past = self.model(
                input_ids=tokens.to(device),
                attention_mask=self._masks(reading[:, :, None] >= before[:, None, :], reading, before),
                position_ids=reading.to(device),
                **{CACHE: past},
                use_cache=True,
                logits_to_keep=1,
            )[CACHE]
            logits = self.model(
                input_ids=packed.tokens.expand(len(reports), -1).to(device),
                attention_mask=self._masks(seen, asking, torch.cat([before, asking], 1)),
                position_ids=asking.to(device),
                **{CACHE: past},
                use_cache=True,
            ).logits
            likelihoods = torch.log_softmax(logits.float(), -1).cpu()
        findings, states, places, chosen = packed.picks.T
        scores = torch.zeros(len(reports), len(ASKED) * len(FINDING_STATES))
        scores.index_add_(1, findings * len(FINDING_STATES) + states, likelihoods[:, places, chosen])
        return scores.view(len(reports), len(ASKED), len(FINDING_STATES)).numpy()

    # --- JSON --------------------------------------------------------------------------------------------------------

    def _answers(self, texts: list[str]) -> list[list[int] | None]:
        """Ids of the 13 states of each report, None where no answer was valid."""
        answers: list[list[int] | None] = [None] * len(texts)
        for attempt in range(self.retries + 1):
            open_places = [place for place, answer in enumerate(answers) if answer is None]
            if not open_places:
                break
            written = self._write([texts[place] for place in open_places], attempt)
            for place, text in zip(open_places, written, strict=True):
                answers[place] = self.prompt.parse_json(text)
        return answers

    def _write(self, texts: list[str], attempt: int) -> list[str]:
        """What the LLM writes for each report: its likeliest answer at first, then samples that are always the same."""
        import torch

        requests = [self.prompt.json_request(text, self.few_shot) for text in texts]
        if self.tokenizer.chat_template:
            requests = [
                self.tokenizer.apply_chat_template(
                    [{"role": "user", "content": request}], tokenize=False, add_generation_prompt=True
                )
                for request in requests
            ]
        rows = [self._tokens(request) for request in requests]
        longest = max(map(len, rows))
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.tokenizer.eos_token_id
        inputs = torch.tensor([[pad] * (longest - len(row)) + row for row in rows], device=self.model.device)
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=self.model.device)
        sampling: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        if attempt:
            sampling = {"do_sample": True, "temperature": 0.7, "top_p": 0.95, "top_k": None}
        with torch.inference_mode(), torch.random.fork_rng():
            torch.manual_seed(attempt)
            written = self.model.generate(
                input_ids=inputs, attention_mask=mask, max_new_tokens=self._answer_tokens, pad_token_id=pad, **sampling
            )
        return self.tokenizer.batch_decode(written[:, longest:], skip_special_tokens=True)


class _Packed(NamedTuple):
    """The questions and answers behind every report.

    Args:
        tokens: (T,) all of them in one row; answers without their last token, behind which nothing is read.
        offsets: (T,) place of each behind the report.
        sees: (T, T) which of the row a token sees, itself included.
        picks: (P, 4) finding, state, place in the row, and the answer's token whose likelihood is read there.
    """

    tokens: torch.Tensor
    offsets: torch.Tensor
    sees: torch.Tensor
    picks: torch.Tensor


def _check_options(mode, few_shot, examples, calibrate, batch_size, max_report_tokens, retries) -> None:
    if mode not in ("score", "json"):
        raise ValueError(f"mode={mode!r}: expected score or json")
    if calibrate and mode != "score":
        raise ValueError("calibrate=True: expected the mode score, only its answers are weighed")
    for option, value, least, most in (
        ("few_shot", few_shot, 0, examples),
        ("batch_size", batch_size, 1, None),
        ("max_report_tokens", max_report_tokens, 1, None),
        ("retries", retries, 0, None),
    ):
        if not isinstance(value, int) or value < least or (most is not None and value > most):
            raise ValueError(f"{option}={value!r}: expected a whole number from {least}{f' to {most}' if most else ''}")


def _with_no_finding(states: Sequence[int]) -> list[int]:
    """The 14 states of 13, No Finding by CheXpert's rule."""
    abnormal = any(states[position] in (POSITIVE, UNCLEAR) for position in _BARRING)
    return [*states, UNMENTIONED if abnormal else POSITIVE]


def _warn(positions: list[int], reports: int, what: str, category: type[Warning]) -> None:
    if positions:
        listed = ", ".join(map(str, sorted(positions)[:5])) + (", …" if len(positions) > 5 else "")
        warnings.warn(f"{len(positions)} of {reports} reports (positions {listed}) {what}", category, stacklevel=3)


class _Cache:
    """States by report, in memory and, if there is a file, on disk as well: a line of JSON a report.

    Lines of other settings are left alone, and so is a last line that was cut off.
    """

    def __init__(self, path: str | os.PathLike | None, settings: list[Any]):
        self._path = None if path is None else Path(path)
        self._settings = json.dumps(settings)
        self._states: dict[str, list[int]] = {}
        if self._path is not None and self._path.is_file():
            content = read_text(self._path, "the JSON lines of a cache", limit=2**34)
            for line in content.splitlines():
                try:
                    record = json.loads(line)
                    self._states[record["report"]] = record["states"]
                except (ValueError, KeyError, TypeError, RecursionError):
                    continue
            if content and not content.endswith("\n"):
                with self._path.open("a", encoding="utf-8") as file:
                    file.write("\n")

    def _key(self, text: str) -> str:
        return hashlib.sha256(f"{self._settings}\n{text}".encode("utf-8", "surrogatepass")).hexdigest()

    def get(self, text: str) -> list[int] | None:
        return self._states.get(self._key(text))

    def put(self, text: str, states: list[int]) -> None:
        key = self._key(text)
        self._states[key] = states
        if self._path is not None:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"report": key, "states": states}) + "\n")


__all__ = ["LLMLabeler"]
