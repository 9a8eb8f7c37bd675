"""How a report is written: `generate`, and its arguments."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from transformers import DynamicCache, GenerationMixin, LogitsProcessor, LogitsProcessorList
from transformers.utils import logging

from .configuration_otdrg import OTDRGConfig
from .guidance_otdrg import StateGuidanceLogitsProcessor, without_positives
from .outputs_otdrg import CACHE
from .prompt_otdrg import OTDRGPromptMixin, check_batch, default_prompt, given_priors

logger = logging.get_logger(__name__)

NO_IMAGE = "no image: pixel_values is missing, and a report is never written from nothing"
#: New tokens if nobody says how many, as in transformers.
_NEW_TOKENS = 20


class _SuppressPlaceholders(LogitsProcessor):
    """Keeps placeholders out of reports; transformers' own class would replace that of a caller's `suppress_tokens`."""

    def __init__(self, token_ids: list[int]):
        self.token_ids = token_ids

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores.index_fill(1, torch.tensor(self.token_ids, device=scores.device), -torch.inf)


class OTDRGGenerationMixin(OTDRGPromptMixin, GenerationMixin):
    """Generation of [`OTDRGForReportGeneration`]."""

    config: OTDRGConfig

    @torch.no_grad()
    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config=None,
        *,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        view_mask: torch.Tensor | None = None,
        view_features: torch.Tensor | None = None,
        finding_states: torch.Tensor | None = None,
        indication_ids: torch.Tensor | None = None,
        prior_pixel_values: torch.Tensor | None = None,
        prior_view_mask: torch.Tensor | None = None,
        prior_view_features: torch.Tensor | None = None,
        guidance_scale: float | None = None,
        **kwargs,
    ):
        """Write reports; all other arguments are those of `GenerationMixin.generate`.

        The views are encoded, the states predicted and the label text written out once, before decoding.

        Args:
            inputs or input_ids, attention_mask (`torch.Tensor` of shape `(B, L)`, *optional*):
                The processor's prompts, padded on the left; the default prompt without them.
            inputs_embeds (`torch.Tensor` of shape `(B, L, hidden_size)`, *optional*):
                Embeddings of the prompts, such as those of [`get_prompt_embeddings`]. Without views they are used
                unchanged.
            pixel_values, view_mask, view_features, finding_states, indication_ids, prior_pixel_values, prior_view_mask,
                prior_view_features: as in [`forward`]; given states steer the report.
                With a key-value cache of the prompt they are not needed.
            guidance_scale (`float`, *optional*):
                Above 1, reports state more of the positive findings that they are conditioned on
                ([`StateGuidanceLogitsProcessor`]); decoding takes about twice as long. By default that of the
                generation config, else 1.

        Returns:
            `torch.Tensor` of shape `(B * num_return_sequences, L + new tokens)`: prompts, as given, and reports. From
            `inputs_embeds` alone, reports. In a dictionary of outputs, hidden states, attentions and the cache have the
            length of the prompt with its label text.

        Raises:
            ValueError: no image, states for a model that does not use them, impossible states, placeholders that do not
                match, arguments of different numbers of studies, guidance that is impossible, a `prefill_chunk_size`
                below the features of a study, or a prompt and new tokens beyond the LLM's positions.
        """
        guidance_scale = self._guidance_scale(generation_config, guidance_scale, kwargs)
        processors = list(kwargs.get("logits_processor") or ())
        given = inputs if input_ids is None else input_ids
        prompt: dict[str, Any] = {
            "input_ids": given,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "inputs_embeds": inputs_embeds,
        }
        has_views = pixel_values is not None or view_features is not None
        cache = kwargs.get("cache", kwargs.get("past_key_values"))
        if has_views or needs_views(inputs_embeds, finding_states, cache):
            unread = prompt
            views = pixel_values, view_mask, view_features
            priors = given_priors(prior_pixel_values, prior_view_mask, prior_view_features)
            prompt = self._read_prompt(unread, *views, finding_states, indication_ids, **priors)
            self._check_length(prompt, generation_config, kwargs)
            if guidance_scale != 1:
                processors.insert(0, self._state_guidance(unread, prompt, guidance_scale))
            if given is None and inputs_embeds is None:
                given = default_prompt(self.config, prompt["view_mask"], prompt.get("prior_view_mask"))["input_ids"]
            self._check_chunks(prompt, self._setting("prefill_chunk_size", generation_config, kwargs))
            repeats = self._sequences_per_prompt(generation_config, kwargs)
            if repeats > 1 and cache is None and prompt.get("input_ids") is not None:
                prompt = self._read_prompt_once(prompt, repeats)
        elif guidance_scale != 1:
            raise ValueError(f"guidance_scale={guidance_scale}: expected 1 where a prompt is given without views")
        else:
            check_batch(
                input_ids=given,
                indication_ids=indication_ids,
                attention_mask=attention_mask,
                inputs_embeds=inputs_embeds,
            )
            self._check_length(prompt, generation_config, kwargs)
        no_placeholders = _SuppressPlaceholders(self.config.placeholder_token_ids)
        kwargs["logits_processor"] = LogitsProcessorList([*processors, no_placeholders])
        prompt = {name: value for name, value in prompt.items() if value is not None}
        # transformers' own guidance is for text; in a config, since an argument beside a config is deprecated.
        if generation_config is None:
            kwargs["guidance_scale"] = 1.0
        else:
            generation_config = copy.deepcopy(generation_config)
            generation_config.guidance_scale = 1.0
        output = super().generate(generation_config=generation_config, **prompt, **kwargs)
        if given is None:
            return output
        # Callers cut the prompt off by its length, which for them is the length without the label text.
        sequences = output if isinstance(output, torch.Tensor) else output.sequences
        repeated = given.repeat_interleave(len(sequences) // len(given), dim=0).to(sequences.device)
        sequences = torch.cat((repeated, sequences[:, prompt["input_ids"].shape[1] :]), dim=1)
        if isinstance(output, torch.Tensor):
            return sequences
        output.sequences = sequences
        return output

    def _setting(self, name: str, generation_config, arguments: dict[str, Any]) -> Any:
        """An argument of `generate`, from a generation config where it is not given; None if it is nowhere."""
        configs = (generation_config, self.generation_config)
        given = [arguments.get(name), *(getattr(config, name, None) for config in configs)]
        return next((value for value in given if value is not None), None)

    def _check_length(self, prompt: dict[str, Any], generation_config, arguments: dict[str, Any]) -> None:
        """Raise a `ValueError` unless prompt and new tokens fit into the LLM's positions."""
        positions = self.config.text_positions
        tokens = prompt["inputs_embeds"] if prompt.get("input_ids") is None else prompt["input_ids"]
        if positions is None or tokens is None:
            return
        mask, length = prompt["attention_mask"], tokens.shape[1]
        longest = length if mask is None else int(mask.sum(dim=1).max())
        new = self._setting("max_new_tokens", generation_config, arguments)
        if new is None:
            most = self._setting("max_length", generation_config, arguments)
            new = _NEW_TOKENS if most is None else max(most - length, 0)
        if longest + new > positions:
            raise ValueError(
                f"a prompt of {longest} tokens and {new} new ones: expected at most {positions} together, the "
                "positions of the LLM: shorten the indication or max_new_tokens"
            )

    def _sequences_per_prompt(self, generation_config, arguments: dict[str, Any]) -> int:
        """How many beams or samples start from each prompt; 1 also where they cannot share what is read of it."""

        def setting(name: str) -> Any:
            return self._setting(name, generation_config, arguments)

        # Other caches, and outputs that hold what each beam reads of the prompt.
        others = ["cache_implementation", "prefill_chunk_size", "output_attentions", "output_hidden_states"]
        others += ["assistant_model", "custom_generate"]
        if CACHE != "cache" or setting("use_cache") is False or any(setting(name) for name in others):
            return 1
        return max(setting("num_beams") or 1, setting("num_return_sequences") or 1)

    def _check_chunks(self, prompt: dict[str, Any], size: int | None) -> None:
        """Refuse a `prefill_chunk_size` with which the features of a study would not be read at once."""
        if size is None or prompt.get("input_ids") is None:
            return
        placeholders = torch.tensor(self.config.placeholder_token_ids, device=prompt["input_ids"].device)
        is_read = torch.isin(prompt["input_ids"], placeholders).any(dim=0)
        least = int((is_read * torch.arange(1, len(is_read) + 1, device=is_read.device)).max())
        if size < least:
            raise ValueError(f"prefill_chunk_size={size}: expected at least {least}, the features are read at once")

    def _read_prompt_once(self, prompt: dict[str, Any], repeats: int) -> dict[str, Any]:
        """The prompts with a cache of all but their last token, which `repeats` sequences each share.

        transformers repeats the prompts before it reads them, and would read each as often.
        """
        embeds, mask, positions = self._embed(prompt), prompt["attention_mask"], prompt.get("position_ids")
        if positions is None:
            # Those that transformers gives to prompts padded on the left.
            positions = (mask.long().cumsum(dim=1) - 1).masked_fill(mask == 0, 0)
        read = {"inputs_embeds": embeds[:, :-1], "attention_mask": mask[:, :-1], "position_ids": positions[:, :-1]}
        cache = self(**read, use_cache=True, logits_to_keep=1, return_dict=True)[CACHE]
        if type(cache) is not DynamicCache:
            return prompt
        cache.batch_repeat_interleave(repeats)
        # What the cache holds already.
        views = ("view_features", "view_mask", "prior_view_features", "prior_view_mask")
        prompt = {name: value for name, value in prompt.items() if name not in (*views, "finding_states")}
        return {**prompt, "inputs_embeds": embeds, CACHE: cache}

    def _guidance_scale(self, generation_config, guidance_scale: float | None, arguments: dict[str, Any]) -> float:
        """The scale that was asked for, by argument or by a generation config.

        Raises:
            ValueError: it is below 1 or infinite, the model does not use finding states, or decoding is assisted.
        """
        if guidance_scale is None:
            guidance_scale = self._setting("guidance_scale", generation_config, {})
        if guidance_scale is None:
            return 1.0
        if not 1 <= guidance_scale < float("inf"):
            raise ValueError(f"guidance_scale={guidance_scale}: expected a number of at least 1")
        if guidance_scale != 1 and not self.config.dle:
            raise ValueError(
                f"guidance_scale={guidance_scale}: expected 1, this model does not use finding states (dle=False)"
            )
        for name in ("assistant_model", "prompt_lookup_num_tokens"):
            if guidance_scale != 1 and self._setting(name, generation_config, arguments) is not None:
                raise ValueError(f"guidance_scale={guidance_scale}: expected 1 with {name}")
        return guidance_scale

    def _state_guidance(self, unread: dict, prompt: dict[str, Any], guidance_scale: float):
        """The logits processor that reads `unread`, the prompt before its label text, without positive states."""
        if not self.config.finding_state_dropout:
            logger.warning_once(
                f"guidance_scale={guidance_scale}: this model was trained with finding_state_dropout=0, so that the "
                "prompt without positive findings is new to it; check what guidance does to its reports"
            )
        states = without_positives(prompt["finding_states"])
        guided = (states != prompt["finding_states"]).any(dim=1)
        priors = given_priors(None, prompt.get("prior_view_mask"), prompt.get("prior_view_features"))
        second = self._read_prompt(unread, None, prompt["view_mask"], prompt["view_features"], states, **priors)
        return StateGuidanceLogitsProcessor(self.forward, second, guided, guidance_scale, CACHE)

    def prepare_inputs_for_generation(
        self,
        input_ids,
        attention_mask=None,
        inputs_embeds=None,
        view_features=None,
        view_mask=None,
        finding_states=None,
        prior_view_features=None,
        prior_view_mask=None,
        is_first_iteration=False,
        **kwargs,
    ):
        model_inputs = super().prepare_inputs_for_generation(
            input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )
        # Once the prompt is in the cache, the study is too.
        if view_features is not None and not _is_filled(kwargs.get(CACHE)):
            model_inputs |= {
                "view_features": view_features,
                "view_mask": view_mask,
                "finding_states": finding_states,
                "prior_view_features": prior_view_features,
                "prior_view_mask": prior_view_mask,
                "report_only": True,
            }
        return model_inputs


# --- arguments -------------------------------------------------------------------------------------------------------


def given_cache(cache, past_key_values):
    """The LLM's cache, given under its name or its former one."""
    if past_key_values is not None and CACHE == "cache":
        warnings.warn("`past_key_values` is deprecated: use `cache`", FutureWarning, stacklevel=2)
    return past_key_values if cache is None else cache


def needs_views(inputs_embeds, finding_states, cache) -> bool:
    """Whether a report cannot be written without views: embeddings or a cache can hold them already."""
    return not _is_filled(cache) and (inputs_embeds is None or finding_states is not None)


def _is_filled(cache) -> bool:
    """Whether a key-value cache holds tokens."""
    return cache is not None and bool(cache.get_seq_length() > 0)


__all__ = ["NO_IMAGE", "OTDRGGenerationMixin", "given_cache", "needs_views"]
