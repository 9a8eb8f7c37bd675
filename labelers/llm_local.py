"""An LLM in this process, for the labeler `llm`."""

from __future__ import annotations

import copy
from itertools import takewhile
from typing import TYPE_CHECKING, Any

from .llm_prompt import Prompt

if TYPE_CHECKING:
    from .llm import Keep


class LocalLLM:
    """Asks an LLM in this process, in batches; the arguments are those of [`LLMLabeler`].

    The instruction and the examples, which all questions share, are encoded once.
    """

    def __init__(
        self,
        model: str,
        prompt: Prompt,
        batch_size: int,
        retries: int,
        max_new_tokens: int,
        dtype: str,
        device: str | None,
        quantization: str | None,
    ):
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        from ..runtime.devices import inference_device
        from ..weights_otdrg import load_backbone, quantization_of

        if not isinstance(getattr(torch, dtype, None), torch.dtype):
            raise ValueError(f"dtype={dtype!r}: expected float32, bfloat16 or float16")
        self.prompt, self.batch_size, self.retries = prompt, batch_size, retries
        self.max_new_tokens = max_new_tokens
        self.tokenizer = load_backbone("text", AutoTokenizer, model)
        if not self.tokenizer.chat_template:
            raise ValueError(f"model {model} has no chat template: expected an instruction-tuned LLM")
        place, packed = inference_device(device), quantization_of(quantization)
        # Packed weights cannot be moved afterwards.
        mapped = {} if packed is None else {"device_map": {"": place}}
        self.model = load_backbone("text", AutoModelForCausalLM, model, getattr(torch, dtype), packed, **mapped).eval()
        if packed is None:
            self.model.to(place)
        limit = getattr(self.model.config, "max_position_embeddings", None) or 2**31
        self._room = limit - len(self._chat("")) - max_new_tokens
        if self._room < 1:
            raise ValueError(f"model {model} reads {limit} tokens, which the prompt and the answer fill")
        # Up to the first token that depends on the sentence.
        pairs = list(zip(self._chat("A b"), self._chat("The c"), strict=False))
        self._head = [token for token, _ in takewhile(lambda pair: pair[0] == pair[1], pairs)]
        self._head_cache = self._read(self._head)

    def ask(self, sentences: list[str], keep: Keep) -> None:
        """As [`AskedLLM.ask`]; sentences that do not fit into the context of the LLM are truncated."""
        for start in range(0, len(sentences), self.batch_size):
            waiting = sentences[start : start + self.batch_size]
            for attempt in range(self.retries + 1):
                written = self._write([self._chat(self._cut(sentence)) for sentence in waiting], attempt)
                answered = {sentence: self.prompt.parse(text) for sentence, text in zip(waiting, written, strict=True)}
                for sentence, states in answered.items():
                    if states is not None or attempt == self.retries:
                        keep(sentence, states)
                waiting = [sentence for sentence, states in answered.items() if states is None]
                if not waiting:
                    break

    def _tokens(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def _chat(self, sentence: str) -> list[int]:
        return self._tokens(
            self.tokenizer.apply_chat_template(self.prompt.chat(sentence), tokenize=False, add_generation_prompt=True)
        )

    def _cut(self, sentence: str) -> str:
        tokens = self._tokens(sentence)
        if len(tokens) <= self._room:
            return sentence
        return self.tokenizer.decode(tokens[: self._room], skip_special_tokens=True)

    def _read(self, tokens: list[int]) -> Any:
        """The key-value cache of these tokens."""
        import torch
        from transformers import DynamicCache

        from ..generation_otdrg import CACHE

        cache = DynamicCache(config=self.model.config)
        inputs = torch.tensor([tokens], device=self.model.device)
        with torch.inference_mode():
            return self.model(input_ids=inputs, use_cache=True, logits_to_keep=1, **{CACHE: cache})[CACHE]

    def _write(self, rows: list[list[int]], attempt: int) -> list[str]:
        """What the LLM writes after each row of tokens: greedy in the first attempt, then sampled with a fixed seed."""
        import torch

        from ..generation_otdrg import CACHE

        head, longest = len(self._head), max(map(len, rows))
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.tokenizer.eos_token_id
        shared: dict[str, Any] = {}
        if all(row[:head] == self._head for row in rows):
            shared[CACHE] = copy.deepcopy(self._head_cache)
            shared[CACHE].batch_repeat_interleave(len(rows))
        else:
            head = 0  # the tokenizer merges the beginning of a sentence with what precedes it
        # Padded after the shared tokens, which are not encoded again.
        gaps = [longest - len(row) for row in rows]
        inputs = [row[:head] + [pad] * gap + row[head:] for row, gap in zip(rows, gaps, strict=True)]
        mask = [[1] * head + [0] * gap + [1] * (len(row) - head) for row, gap in zip(rows, gaps, strict=True)]
        sampling: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        if attempt:
            sampling = {"do_sample": True, "temperature": 0.7, "top_p": 0.95, "top_k": None}
        with torch.inference_mode(), torch.random.fork_rng():
            torch.manual_seed(attempt)
            written = self.model.generate(
                input_ids=torch.tensor(inputs, device=self.model.device),
                attention_mask=torch.tensor(mask, device=self.model.device),
                max_new_tokens=self.max_new_tokens,
                pad_token_id=pad,
                # A penalty in the LLM's own configuration would forbid a second "absent".
                repetition_penalty=1.0,
                **shared,
                **sampling,
            )
        return self.tokenizer.batch_decode(written[:, longest:], skip_special_tokens=True)
