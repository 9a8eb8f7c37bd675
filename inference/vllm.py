"""Reports written by vLLM: prompt embeddings are computed here and sent to a server that runs the LLM.

Long, because the server's start, its requests and its faults stand together.
"""

from __future__ import annotations

import base64
import io
import json
import logging
import os
import socket
import subprocess
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import torch

from ..consensus_otdrg import ConsensusDecoder, ConsensusSettings
from ..files_otdrg import follow_umask
from ..modeling_otdrg import OTDRGForReportGeneration
from ..processing_otdrg import OTDRGProcessor
from ..runtime.interruptions import EngineError
from ..runtime.vllm_server import Server, serve_arguments, vllm_server
from .digests import language_model_digest
from .loading import bytes_a_token, device_memory

logger = logging.getLogger(__name__)

Item, Found = TypeVar("Item"), TypeVar("Found")

#: Batches that wait for the server while the next one is encoded.
BATCHES_AHEAD = 8

#: Most tokens of reports whose keys and values a server of one's own holds, at a time and of one report.
CACHED_TOKENS, LONGEST_PROMPT = 65_536, 8192

#: Seconds that an answer, or the start of a server, may take.
LONGEST_ANSWER, LONGEST_START = 1800.0, 3600.0

#: The bias of a token that is not to be written, the lowest that vLLM takes.
_NEVER = -100.0

#: Fields of a generation config that requests follow, or that change nothing.
_FOLLOWED = {
    *("bos_token_id", "eos_token_id", "pad_token_id", "max_new_tokens", "num_beams", "bad_words_ids", "consensus"),
    *("guidance_scale", "use_cache", "output_attentions", "output_hidden_states", "transformers_version"),
}


class VLLM:
    """A vLLM server that writes a model's reports in place of `model.generate`, see [`map`].

    Without a `url`, the LLM is written to a temporary folder and served by `vllm serve` as soon as a report is needed;
    the server ends with this context.

    Args:
        model, processor: the model's LoRA adapters are merged when the server is needed.
        url: of a running server.
        longest_answer: seconds until an answer is missed.
    """

    name = "vllm"

    def __init__(
        self,
        model: OTDRGForReportGeneration,
        processor: OTDRGProcessor,
        url: str | None = None,
        longest_answer: float = LONGEST_ANSWER,
    ):
        self.model, self.processor, self.longest_answer = model, processor, longest_answer
        self._url, self._served = None if url is None else url.rstrip("/"), ""
        self._longest: int | None = model.config.text_positions
        self._server: Server | None = None
        self._held = ExitStack()
        self._turn = threading.Lock()
        self._waiting: set[HTTPConnection] = set()
        self._is_stopped = False

    def __enter__(self) -> VLLM:
        return self

    def __exit__(self, *_) -> None:
        self._stop()
        self._held.close()

    # --- many batches ------------------------------------------------------------------------------------------------

    def map(self, work: Callable[[Item], Found], items: Iterable[Item]) -> Iterator[Found]:
        """What `work` finds for each item, in order, as `map` does; while some items wait for reports, others begin.

        Meanwhile `model.generate` is [`generate`]. One item at a time is worked on, unless the others wait in it.
        """

        def in_turn(item: Item) -> Found:
            with self._turn:
                return work(item)

        begun: deque = deque()
        pool = ThreadPoolExecutor(BATCHES_AHEAD + 1, "vllm")
        self.model.generate, self._is_stopped = self.generate, False
        try:
            for item in items:
                self.connect()
                begun.append(pool.submit(in_turn, item))
                if len(begun) > BATCHES_AHEAD:
                    yield begun.popleft().result()
            while begun:
                yield begun.popleft().result()
        finally:
            self._stop()
            pool.shutdown(cancel_futures=True)
            del self.model.generate

    def _stop(self) -> None:
        """Wake the threads that wait for the server; they end, and no request is sent any more."""
        self._is_stopped = True
        for connection in tuple(self._waiting):
            with suppress(OSError, AttributeError):
                # Closing it would not wake them.
                connection.sock.shutdown(socket.SHUT_RDWR)

    @contextmanager
    def _others_turn(self) -> Iterator[None]:
        """Hand the model over to other items of [`map`], if it is used there."""
        held = self._turn.locked()
        if held:
            self._turn.release()
        try:
            yield
        finally:
            if held:
                self._turn.acquire()

    # --- reports -----------------------------------------------------------------------------------------------------

    def generate(
        self,
        *,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        view_features: torch.Tensor,
        view_mask: torch.Tensor,
        finding_states: torch.Tensor | None = None,
        prior_view_features: torch.Tensor | None = None,
        prior_view_mask: torch.Tensor | None = None,
        max_new_tokens: int,
        num_return_sequences: int = 1,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        bad_words_ids: list[list[int]] | None = None,
        num_beams: int = 1,
        guidance_scale: float = 1.0,
        return_dict_in_generate: bool = False,
    ) -> torch.Tensor:
        """Write reports, greedily or by sampling; other arguments are those of the model's `generate`.

        Args:
            num_return_sequences: samples of each study.
            temperature: 0 for greedy search.
            seed: of the samples of each study; the sample number is added to it.

        Returns:
            (B * num_return_sequences, L + new tokens), the prompts as given and the reports, padded.

        Raises:
            ValueError: beams or guidance, or a prompt that does not fit into the LLM's or the server's positions.
            EngineError: the server failed.
        """
        if num_beams > 1 or guidance_scale != 1 or return_dict_in_generate:
            raise ValueError(
                f"num_beams={num_beams}, guidance_scale={guidance_scale}, return_dict_in_generate="
                f"{return_dict_in_generate}: expected 1, 1 and False, vLLM has neither"
            )
        self.connect()
        embeddings, mask = self.model.get_prompt_embeddings(
            input_ids,
            attention_mask,
            view_features=view_features,
            view_mask=view_mask,
            finding_states=finding_states,
            prior_view_features=prior_view_features,
            prior_view_mask=prior_view_mask,
        )
        longest = int(mask.sum(dim=1).max())
        if self._longest is not None and longest + max_new_tokens > self._longest:
            raise ValueError(
                f"a prompt of {longest} tokens and {max_new_tokens} new ones: expected at most {self._longest} "
                "together, the positions of the served LLM: shorten the indication or max_new_tokens"
            )
        request = {
            "model": self._served,
            "prompt_embeds": [_encoded(row[kept.bool()]) for row, kept in zip(embeddings, mask, strict=True)],
            "n": num_return_sequences,
            **{"max_tokens": max_new_tokens, "seed": seed, "temperature": temperature, "top_p": top_p},
            # Not those of the server's defaults.
            **{"top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0},
            **self._suppressed(bad_words_ids),
            **{"ignore_eos": True, "stop_token_ids": self._ends()},
            "return_token_ids": True,
        }
        with self._others_turn():
            answer = self._ask("/v1/completions", request)
        written = self._written(answer, len(embeddings) * num_return_sequences)
        prompts = input_ids.repeat_interleave(num_return_sequences, dim=0)
        return torch.cat((prompts, written.to(prompts)), dim=1)

    def _ends(self) -> list[int]:
        ends = self.model.generation_config.eos_token_id
        return [ends] if isinstance(ends, int) else list(ends or ())

    def _suppressed(self, bad_words_ids: list[list[int]] | None) -> dict[str, Any]:
        """Tokens and words that are never written: placeholders, and those of the generation config."""
        words = bad_words_ids or self.model.generation_config.bad_words_ids or []
        tokens = [ids[0] for ids in words if len(ids) == 1]
        longer = [self.processor.tokenizer.decode(ids) for ids in words if len(ids) > 1]
        never = [*self.model.config.placeholder_token_ids, *tokens]
        return {"logit_bias": {str(token): _NEVER for token in never}, "bad_words": longer}

    def _written(self, answer: Mapping[str, Any], count: int) -> torch.Tensor:
        """The new tokens of `count` reports, padded."""
        try:
            choices = sorted(answer["choices"], key=lambda choice: choice["index"])
            reports = [[int(token) for token in choice["token_ids"]] for choice in choices]
            ended = [choice["finish_reason"] == "stop" for choice in choices]
        except (KeyError, TypeError, ValueError):
            raise EngineError(f"{self._url} does not answer as vLLM 0.32 does: no token_ids") from None
        if len(reports) != count:
            raise EngineError(f"{self._url} wrote {len(reports)} reports: expected {count}")
        ends, pad = self._ends(), self.model.generation_config.pad_token_id
        for tokens, end in zip(reports, ended, strict=True):
            if end and ends and not set(ends) & set(tokens):
                tokens.append(ends[0])
        rows = [torch.tensor(tokens, dtype=torch.long) for tokens in reports]
        pad = pad if pad is not None else next(iter(ends), 0)
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad)

    # --- the server --------------------------------------------------------------------------------------------------

    def connect(self) -> None:
        """Start the server, or find the running one, unless that was done; and check which LLM it has.

        Raises:
            EngineError: it does not start, is not there, or serves another LLM.
        """
        if self._served:
            return
        self.model.merge_lora()
        name = served_name(self.model)
        if self._url is None:
            self._start(name)
        served = {row["id"]: row.get("max_model_len") for row in self._ask("/v1/models").get("data", ())}
        if name not in served:
            raise EngineError(
                f"{self._url} serves {', '.join(served) or 'no model'}: expected {name}, this model's LLM in "
                f"{_name(self.model.dtype)}; otdrg push --merge writes it and prints the command that serves it"
            )
        limits = [limit for limit in (self._longest, served[name]) if limit is not None]
        self._served, self._longest = name, min(limits, default=None)

    def _start(self, name: str) -> None:
        """Start a server of its own, and wait until it answers."""
        folder = Path(self._held.enter_context(tempfile.TemporaryDirectory(prefix="otdrg-vllm-")))
        save_language_model(self.model, self.processor, folder / "language_model")
        arguments = [*serve_arguments(folder / "language_model", name), *self._limits()]
        arguments += ["--dtype", _name(self.model.dtype)]
        if self.model.device.type == "cpu":
            # Compilation takes minutes and a compiler, and gains little here.
            arguments.append("--enforce-eager")
        self._server = self._held.enter_context(vllm_server(arguments, folder / "vllm.log"))
        self._url, end = self._server.url, time.monotonic() + LONGEST_START
        while time.monotonic() < end:
            if (failure := self._server.failure()) is not None:
                raise EngineError(failure)
            with suppress(OSError, HTTPException):
                if self._send("GET", "/health", None)[0] == 200:
                    return
            time.sleep(0.2)
        raise EngineError(f"vllm serve did not answer within {LONGEST_START:,.0f} seconds")

    def _limits(self) -> list[str]:
        """Arguments for a server beside the model, instead of one that takes nearly the whole memory."""
        a_token, there = bytes_a_token(self.model), device_memory(self.model.device)
        tokens = CACHED_TOKENS if there is None else min(CACHED_TOKENS, there // 4 // a_token)
        positions = self.model.config.text_positions or tokens
        return [
            *("--kv-cache-memory-bytes", str(tokens * a_token)),
            *("--max-model-len", str(min(positions, tokens, LONGEST_PROMPT))),
            # With the size of the cache, this is only the share that must be free.
            *("--gpu-memory-utilization", "0.1"),
        ]

    def _ask(self, path: str, request: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The server's answer.

        Raises:
            EngineError: there is none, or it is an error.
        """
        try:
            status, body = self._send(*(("GET", path, None) if request is None else ("POST", path, request)))
            answer = json.loads(body) if status < 400 else None
        except TimeoutError:
            fault = f"did not answer within {self.longest_answer:,.0f} seconds"
        except (OSError, HTTPException) as error:
            fault = f"cannot be reached ({' '.join(str(error).split()) or type(error).__name__})"
        except ValueError:
            fault = "does not answer as vLLM does: no JSON"
        else:
            if isinstance(answer, dict):
                return answer
            fault = f"answered {status}: {_reason(body)}"
        if self._server is not None and not self._is_stopped:
            with suppress(subprocess.TimeoutExpired):
                self._server.process.wait(1)
            fault = self._server.failure() or f"{self._url} {fault}"
            raise EngineError(fault)
        raise EngineError("stopped" if self._is_stopped else f"{self._url} {fault}")

    def _send(self, method: str, path: str, request: Mapping[str, Any] | None) -> tuple[int, bytes]:
        place = urlsplit(self._url)
        kind = HTTPSConnection if place.scheme == "https" else HTTPConnection
        connection = kind(place.netloc.rpartition("@")[2], timeout=self.longest_answer)
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get("VLLM_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        self._waiting.add(connection)
        try:
            connection.connect()
            if self._is_stopped:  # checked when there is a socket: `_stop` may have come before it
                raise ConnectionAbortedError
            connection.request(method, place.path + path, request and json.dumps(request), headers)
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            self._waiting.discard(connection)
            connection.close()

    # --- decoding ----------------------------------------------------------------------------------------------------

    def decoding(self, arguments: Mapping[str, Any], decoder: ConsensusDecoder | None) -> dict[str, Any]:
        """Arguments of [`generate`], given those of the model's.

        Args:
            arguments: from `loading.decoding`.
            decoder: consensus decoding, beside which single reports are found greedily.

        Raises:
            ValueError: beams, guidance, or another setting of the generation config that vLLM or this class has not.
        """
        config = self.model.generation_config
        found = dict(arguments) if decoder is None else {**arguments, "num_beams": 1}
        if found["num_beams"] > 1:
            raise ValueError(
                f"--engine vllm: this model finds reports with {found['num_beams']} beams, which vLLM has not: "
                "expected --num-beams 1, or another engine"
            )
        if found.pop("guidance_scale", 1.0) != 1:
            raise ValueError(
                f"--engine vllm: guidance_scale={config.guidance_scale:g} in this model's generation_config.json, "
                "which vLLM has not: expected --guidance-scale 1, or another engine"
            )
        ignored = _FOLLOWED if config.do_sample else {*_FOLLOWED, "temperature", "top_k", "top_p"}
        for name, value in config.to_diff_dict().items():
            if name not in ignored and not name.startswith("_"):
                raise ValueError(
                    f"--engine vllm: {name}={value!r} in this model's generation_config.json is not followed: expected "
                    "a model without it, or another engine"
                )
        return found

    def decoder(self, decoder: ConsensusDecoder | None) -> ConsensusDecoder | None:
        """Consensus decoding by this server; its samples are not guided."""
        if decoder is None:
            return None
        if any(group.guidance_scale != 1 for group in decoder.settings.plan) and decoder.settings.candidates:
            logger.warning("vLLM has no state guidance: candidates are sampled with guidance_scale 1")
        return _ServedDecoder(decoder)


class _ServedDecoder(ConsensusDecoder):
    """Consensus decoding of a model whose `generate` is that of [`VLLM`]."""

    def __init__(self, decoder: ConsensusDecoder):
        plan = tuple(replace(group, guidance_scale=1.0) for group in decoder.settings.plan)
        super().__init__(replace(decoder.settings, plan=plan), decoder.bank, decoder.label)

    def draw(self, model, inputs, generation, group, number, size, steps):
        # A sample's number is added to the seed: all samples of a study have their own.
        seed = (self.settings.seed * len(self.settings.plan) + number) * ConsensusSettings.most
        return model.generate(
            **inputs,
            max_new_tokens=steps,
            num_return_sequences=size,
            temperature=group.temperature,
            top_p=group.top_p,
            seed=seed,
            bad_words_ids=generation.get("bad_words_ids"),
        )


def asked_engine(model: OTDRGForReportGeneration, processor: OTDRGProcessor, options: Mapping[str, Any]) -> VLLM | None:
    """The engine that the options of a command ask for, `engine` and `engine_url`; None for the model itself."""
    if options.get("engine") != VLLM.name:
        return None
    return VLLM(model, processor, options.get("engine_url"))


def served_name(model: OTDRGForReportGeneration) -> str:
    """The name under which a model's LLM, with LoRA merged, is served: it holds a digest of the weights."""
    return f"otdrg-{language_model_digest(model)[:16]}"


def save_language_model(model: OTDRGForReportGeneration, processor: OTDRGProcessor, folder: Path) -> None:
    """Write a model's LLM, with LoRA merged, and its tokenizer as a plain causal LM, for engines that serve LLMs."""
    llm = model.language_model
    llm.generation_config.update(eos_token_id=model.generation_config.eos_token_id)
    # Placeholders mark features in the prompt and must not be generated.
    llm.generation_config.update(suppress_tokens=model.config.placeholder_token_ids)
    llm.save_pretrained(folder)
    for file in folder.glob("*.safetensors"):
        follow_umask(file)
    processor.tokenizer.save_pretrained(folder)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _encoded(embeddings: torch.Tensor) -> str:
    """Embeddings (L, hidden_size) as vLLM reads them: a file of `torch.save` in base64."""
    file = io.BytesIO()
    torch.save(embeddings.detach().cpu().clone(), file)
    return base64.b64encode(file.getvalue()).decode()


def _reason(body: bytes) -> str:
    """The message of an error, shortened."""
    try:
        found = json.loads(body)
        found = found.get("error", found)
        text = str(found.get("message", found) if isinstance(found, dict) else found)
    except (ValueError, AttributeError):
        text = body.decode(errors="replace")
    return " ".join(text.split())[:300] or "no reason"


__all__ = ["BATCHES_AHEAD", "VLLM", "asked_engine", "save_language_model", "served_name"]
