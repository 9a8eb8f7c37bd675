"""The labeler `llm`: a frozen causal LLM reads the finding states from a report (DLE; paper, section 3.2.1)."""

from __future__ import annotations

import copy
import hashlib
import json
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from ..findings_otdrg import FINDING_STATES, FINDINGS, POSITIVE, UNCLEAR, UNMENTIONED
from ..runtime.journal import Journal
from . import ReportsWarning, check_reports, warn_of_reports
from .llm_prompt import ASKED, PROMPT, load_prompt

if TYPE_CHECKING:
    import torch

_STATES = range(len(FINDING_STATES))
_BARRING = [position for position, name in enumerate(ASKED) if name != "support_devices"]


class LLMLabeler:
    """Reads finding states with a frozen causal LLM.

    In mode "score" each of 13 findings is a question with four possible answers; the state is that of the answer with
    the highest log-likelihood. The instruction and the examples are encoded once, each report once, and all its
    questions and answers together in one sequence. In mode "json" the LLM writes a JSON object, which is validated,
    and sampled again if invalid. "No Finding" is positive if nothing but support devices is positive or unclear
    (CheXpert's rule).

    Args:
        model: Hub id, folder or GGUF file of the LLM.
        mode: "score" or "json" (for instruction models).
        few_shot: number of examples in the prompt.
        calibrate: subtract the log-likelihoods of the answers for an empty report (contextual calibration; Zhao et
            al., ICML 2021). Only for mode "score".
        batch_size: reports in a batch.
        max_report_tokens: longer reports are truncated; so are those that do not fit into the context of the LLM.
        retries: how often an invalid JSON answer is sampled again.
        cache: file that stores the states of each report, so that an interrupted labelling can continue and repeated
            reports are read once.
        prompt: prompt file; by default that of the package.
        dtype: type of the LLM's weights.
        device: by default accelerate's choice, see [`inference_device`].
        progress: show a progress bar.
        quantization: "4bit" or "8bit", of the linear layers, by bitsandbytes.

    Raises:
        ImportError: `quantization` without bitsandbytes.
        OSError: the LLM cannot be loaded.
        ValueError: an option is out of range, the tokenizer does not separate the answers, or the context is too short.
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
        quantization: str | None = None,
    ):
        self.prompt = load_prompt(prompt)
        _check_options(mode, few_shot, len(self.prompt.examples), calibrate, batch_size, max_report_tokens, retries)
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        from ..runtime.devices import inference_device
        from ..weights_otdrg import load_backbone, quantization_of

        if not isinstance(getattr(torch, dtype, None), torch.dtype):
            raise ValueError(f"dtype={dtype!r}: expected float32, bfloat16 or float16")
        self.tokenizer = load_backbone("text", AutoTokenizer, str(model))
        place, packed = inference_device(device), quantization_of(quantization)
        # Packed weights cannot be moved afterwards.
        mapped = {} if packed is None else {"device_map": {"": place}}
        self.model = load_backbone("text", AutoModelForCausalLM, str(model), getattr(torch, dtype), packed, **mapped)
        self.model.eval()
        if packed is None:
            self.model.to(place)
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
            # Twice the tokens of the longest object, for other white space.
            longest = json.dumps(dict.fromkeys(self.prompt.names, max(self.prompt.answers, key=len)))
            self._answer_tokens = 2 * len(self._tokens(longest))
            room = limit - len(self._tokens(self.prompt.json_request("", few_shot))) - self._answer_tokens - 64
        self.max_report_tokens = min(max_report_tokens, room)
        if self.max_report_tokens < 1:
            raise ValueError(f"model {model} reads {limit} tokens, which the prompt fills: use a smaller few_shot")
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
            *([] if quantization is None else [quantization]),
        ]
        self._cache = _Cache(cache, settings)
        self._empty_scores = self._scores([""])[0] if calibrate else None

    def label(self, reports: Sequence[str]) -> np.ndarray:
        """(N, 14) int64 state ids of N reports.

        Reports without text, and in mode "json" those without a valid answer, have all findings unmentioned, including
        "No Finding". Warnings count and list these reports, and those that were truncated.

        Raises:
            TypeError, ValueError: as [`check_reports`].
        """
        from tqdm.auto import tqdm

        check_reports(reports)
        texts = [" ".join(report.split()) for report in reports]
        states = np.full((len(texts), len(FINDINGS)), UNMENTIONED, dtype=np.int64)
        wanted: dict[str, list[int]] = {}
        for position, text in enumerate(texts):
            wanted.setdefault(text, []).append(position)
        empty = wanted.pop("", [])
        found = {text: self._cache.get(text) for text in wanted}
        # Sorted by length, so that batches need little padding.
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
        warn_of_reports(empty, len(texts), "hold no text: all findings unmentioned")
        answered = [position for text in invalid for position in wanted[text]]
        warn_of_reports(answered, len(texts), "got no valid answer: all findings unmentioned")
        cut = [position for text in long for position in wanted[text]]
        warn_of_reports(
            cut, len(texts), f"are longer than {self.max_report_tokens} tokens and were cut", ReportsWarning
        )
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
        """All questions and answers in one sequence, in which each attends only to its own prefix."""
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
                    # The likelihood of a token is read at the token before it; the last token is not an input.
                    picks.append((finding, state, path[-1], token))
                    if place + 1 < len(answer):
                        path = put(token, path)
        sees = torch.zeros(len(tokens), len(tokens), dtype=torch.bool)
        for place, path in enumerate(paths):
            sees[place, path] = True
        return _Packed(torch.tensor(tokens), torch.tensor(offsets), sees, torch.tensor(picks))

    def _tokenized(self, finding: int) -> tuple[list[int], list[list[int]]]:
        """Tokens of a question and of its four answers; a `ValueError` if the tokenizer does not separate them."""
        question = self._tokens(self.prompt.question(finding))
        answers = []
        for state in _STATES:
            whole = self._tokens(self.prompt.question(finding) + self.prompt.answer(state))
            unknown = self.tokenizer.unk_token_id is not None and self.tokenizer.unk_token_id in whole
            if unknown or not question or len(whole) <= len(question) or whole[: len(question)] != question:
                raise ValueError(
                    f"the tokenizer of the LLM cannot score the answer {self.prompt.answers[state]!r} to "
                    f"{self.prompt.question(finding)!r}: expected separate tokens after the question"
                )
            answers.append(whole[len(question) :])
        if len(set(map(tuple, answers))) < len(answers):
            raise ValueError("the tokenizer of the LLM encodes two answers alike: expected four different ones")
        return question, answers

    def _read(self, tokens: list[int]) -> Any:
        """The key-value cache of the tokens that all reports share, complete for all layers."""
        import torch
        from transformers import DynamicCache

        from ..modeling_otdrg import CACHE

        inputs = torch.tensor([tokens], device=self.model.device)
        with torch.inference_mode():
            return self.model(input_ids=inputs, use_cache=True, logits_to_keep=1, **{CACHE: DynamicCache()})[CACHE]

    def _masks(self, seen: torch.Tensor, queries: torch.Tensor, keys: torch.Tensor) -> Any:
        """The additive attention masks (B, 1, Q, K), limited to the window for layers with sliding attention."""
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
        # In shorter reports the questions follow the padding, which is masked.
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
        """The LLM's text for each report: greedy in the first attempt, then sampled with a fixed seed."""
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
    """The questions and answers that follow each report.

    Args:
        tokens: (T,) all of them in one sequence; answers without their last token.
        offsets: (T,) position of each after the report.
        sees: (T, T) which tokens of the sequence a token attends to, including itself.
        picks: (P, 4) finding, state, place in the sequence, and the token whose likelihood is read there.
    """

    tokens: torch.Tensor
    offsets: torch.Tensor
    sees: torch.Tensor
    picks: torch.Tensor


def _check_options(mode, few_shot, examples, calibrate, batch_size, max_report_tokens, retries) -> None:
    if mode not in ("score", "json"):
        raise ValueError(f"mode={mode!r}: expected score or json")
    if calibrate and mode != "score":
        raise ValueError("calibrate=True: expected mode='score'")
    for option, value, least, most in (
        ("few_shot", few_shot, 0, examples),
        ("batch_size", batch_size, 1, None),
        ("max_report_tokens", max_report_tokens, 1, None),
        ("retries", retries, 0, None),
    ):
        if not isinstance(value, int) or value < least or (most is not None and value > most):
            raise ValueError(f"{option}={value!r}: expected a whole number from {least}{f' to {most}' if most else ''}")


def _with_no_finding(states: Sequence[int]) -> list[int]:
    """The 14 states from 13, with No Finding by CheXpert's rule."""
    abnormal = any(states[position] in (POSITIVE, UNCLEAR) for position in _BARRING)
    return [*states, UNMENTIONED if abnormal else POSITIVE]


class _Cache:
    """States by report, in memory and, if there is a file, on disk; rows of other settings are kept."""

    def __init__(self, path: str | os.PathLike | None, settings: list[Any]):
        self._settings = json.dumps(settings)
        self._journal = None if path is None else Journal(path)
        rows = [] if self._journal is None else self._journal.rows
        self._states: dict[str, list[int]] = {row["report"]: row["states"] for row in rows}

    def _key(self, text: str) -> str:
        return hashlib.sha256(f"{self._settings}\n{text}".encode("utf-8", "surrogatepass")).hexdigest()

    def get(self, text: str) -> list[int] | None:
        return self._states.get(self._key(text))

    def put(self, text: str, states: list[int]) -> None:
        row = {"report": self._key(text), "states": states}
        self._states[row["report"]] = states
        if self._journal is not None:
            self._journal.add([row])
