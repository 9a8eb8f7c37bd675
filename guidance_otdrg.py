"""State guidance: decode with more weight on the positive finding states (classifier-free guidance on the states)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from transformers import LogitsProcessor

from .findings_otdrg import FINDINGS, NO_FINDING, NOT_GIVEN, POSITIVE

#: Share of the most likely token's probability below which a token is not made likelier by guidance.
PLAUSIBLE = 0.02


def without_positives(finding_states: torch.Tensor) -> torch.Tensor:
    """States (B, 14) with positive findings as not given, and "no finding" too where there was one.

    "No finding" implies that no finding is positive, so it must not be given where that is to be unknown.
    """
    findings = torch.arange(len(FINDINGS), device=finding_states.device) != NO_FINDING
    positive = (finding_states == POSITIVE) & findings
    states = finding_states.masked_fill(positive, NOT_GIVEN)
    states[positive.any(dim=1), NO_FINDING] = NOT_GIVEN
    return states


def drop_states(finding_states: torch.Tensor, ratio: float) -> torch.Tensor:
    """States (B, 14) of which each finding is, with probability `ratio`, not given.

    "No finding" is not given in half of the studies in which another finding is not: it implies whether that one is
    positive, and the prompts of [`without_positives`] do not have it.
    """
    dropped = torch.rand(finding_states.shape, device=finding_states.device) < ratio
    drops_finding = dropped[:, :NO_FINDING].any(dim=1) | dropped[:, NO_FINDING + 1 :].any(dim=1)
    dropped[:, NO_FINDING] = drops_finding & (torch.rand(len(dropped), device=dropped.device) < 0.5)
    return finding_states.masked_fill(dropped, NOT_GIVEN)


class StateGuidanceLogitsProcessor(LogitsProcessor):
    """Move the scores of the next token away from those of the same prompt without positive findings.

    s = log p + (guidance_scale - 1) (log p - log p'), where p' is conditioned on [`without_positives`]: the formula of
    transformers' `guidance_scale` and of Ho and Salimans (2022), "Classifier-Free Diffusion Guidance". Tokens with less
    than [`PLAUSIBLE`] times the probability of the most likely one are excluded, because their ratio p / p' is noise.

    The second prompt has a key-value cache of its own. Studies without a positive finding are decoded as without
    guidance, and cost nothing more.

    Args:
        forward: the model's forward pass.
        prompt: its arguments for the second prompt: `input_ids` or `inputs_embeds` and `attention_mask`, padded on the
            left, views and states.
        guided (`torch.Tensor` of shape `(B,)`): true where a study has a positive finding; the others are not read.
        guidance_scale: 1 changes nothing.
        cache_name: of the key-value cache, as argument and output of `forward`.
    """

    def __init__(
        self,
        forward: Callable[..., Any],
        prompt: dict[str, torch.Tensor],
        guided: torch.Tensor,
        guidance_scale: float,
        cache_name: str,
    ):
        self.forward, self.prompt, self.guided = forward, prompt, guided
        self.guidance_scale, self.cache_name = guidance_scale, cache_name
        self.cache: Any = None
        self.rows = self.mask = self.written = torch.empty(0)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if not self.guided.any():
            return scores
        if self.cache is None:
            logits = self._read_prompt(len(scores) // len(self.guided))
        else:
            logits = self._read_token(input_ids[self.rows])
        self.written = input_ids[self.rows]
        conditional = scores[self.rows].float().log_softmax(dim=-1)
        unconditional = logits[:, -1].float().log_softmax(dim=-1).to(scores.device)
        implausible = conditional < conditional.amax(dim=-1, keepdim=True) + math.log(PLAUSIBLE)
        guided = conditional + (self.guidance_scale - 1) * (conditional - unconditional)
        scores = scores.clone()
        scores[self.rows] = guided.masked_fill(implausible, -torch.inf).log_softmax(dim=-1).to(scores.dtype)
        return scores

    def _read_prompt(self, repeats: int) -> torch.Tensor:
        """Read the second prompt, once per beam or returned sequence."""
        self.rows = self.guided.repeat_interleave(repeats).nonzero().flatten()
        prompt = {name: value[self.guided].repeat_interleave(repeats, dim=0) for name, value in self.prompt.items()}
        self.mask = prompt["attention_mask"]
        positions = (self.mask.cumsum(dim=1) - 1).clamp(min=0)
        return self._run(**prompt, position_ids=positions, report_only=True)

    def _read_token(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Read the last token of each sequence, after the cache has followed the beams."""
        before = (input_ids[:, None, :-1] == self.written[None]).all(dim=-1)
        # Only beams of the same study share a prompt.
        study = self.rows // (len(self.rows) // int(self.guided.sum()))
        source = (before & (study[:, None] == study[None])).int().argmax(dim=1)
        if not torch.equal(source, torch.arange(len(source), device=source.device)):
            self.cache.reorder_cache(source)
            self.mask = self.mask[source]
        self.mask = torch.cat((self.mask, self.mask.new_ones(len(self.mask), 1)), dim=1)
        positions = (self.mask.sum(dim=1, keepdim=True) - 1).clamp(min=0)
        cache = {self.cache_name: self.cache}
        return self._run(input_ids=input_ids[:, -1:], attention_mask=self.mask, position_ids=positions, **cache)

    def _run(self, **inputs) -> torch.Tensor:
        outputs = self.forward(**inputs, use_cache=True, logits_to_keep=1, return_dict=True)
        self.cache = outputs[self.cache_name]
        return outputs["logits"]


__all__ = ["PLAUSIBLE", "StateGuidanceLogitsProcessor", "drop_states", "without_positives"]
