"""How a study enters the LLM's prompt: the places of its features, and the text of its finding states."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from .configuration_otdrg import OTDRGConfig
from .findings_otdrg import FINDINGS, NOT_GIVEN, UNMENTIONED, check_finding_states
from .guidance_otdrg import drop_states
from .outputs_otdrg import OTDRGStudy


class OTDRGPromptMixin:
    """Prompts of [`OTDRGForReportGeneration`], which has the attributes that are only declared here."""

    config: OTDRGConfig
    training: bool
    language_model: PreTrainedModel
    get_input_embeddings: Callable[[], Any]
    read_study: Callable[..., OTDRGStudy]
    project_views: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    project_priors: Callable[..., tuple[torch.Tensor, torch.Tensor] | None]
    _label_features: Callable[[torch.Tensor], torch.Tensor | None]
    _place_study: Callable[..., tuple[torch.Tensor, Any]]
    _select_reader: Callable[..., str]

    def expand_finding_text(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        label_weights: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        view_mask: torch.Tensor | None = None,
        view_features: torch.Tensor | None = None,
        finding_states: torch.Tensor | None = None,
        indication_ids: torch.Tensor | None = None,
        **kwargs,
    ) -> dict[str, Any]:
        """Replace the placeholder of the label text by the text of the states that condition the LLM.

        [`forward`] keeps the length of its inputs, so call this first, as `generate` and our Trainer do; in a training
        loop of your own: `model(**model.expand_finding_text(**batch))`. The label predictor runs only where states are
        not given. While training on `labels`, the given states of a share of the studies,
        `config.predicted_state_ratio`, are replaced by predicted ones, and a finding becomes not given with the
        probability `config.finding_state_dropout`.

        Args:
            input_ids, attention_mask (`torch.Tensor` of shape `(B, L)`): the processor's, padded on either side.
            labels, label_weights, position_ids (`torch.Tensor` of shape `(B, L)`, *optional*): moved with their tokens.
            inputs_embeds (`torch.Tensor` of shape `(B, L, hidden_size)`, *optional*): embeddings of `input_ids`.
            pixel_values, view_mask, view_features, finding_states, indication_ids: as in [`forward`].
            kwargs: returned unchanged, such as the views of prior studies.

        Returns:
            The inputs of [`forward`]: of length L', padded on the side they were, with `finding_states` complete and,
            where views had to be encoded and no gradient is needed, `view_features` in place of `pixel_values`.

        Raises:
            ValueError: no image, impossible states, or arguments of different numbers of studies.
        """
        if kwargs.get("shift_labels") is not None:
            raise ValueError("shift_labels were given: expected labels, which are moved with their tokens")
        prompt = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "labels": labels,
            "label_weights": label_weights,
            "inputs_embeds": inputs_embeds,
        }
        views = {"pixel_values": pixel_values, "view_mask": view_mask, "view_features": view_features}
        check_batch(**prompt, **views, finding_states=finding_states, indication_ids=indication_ids)
        prompt["position_ids"] = position_ids  # may be the same for all studies
        trains_report = labels is not None and self.training
        if finding_states is not None and trains_report and self.config.predicted_state_ratio:
            drawn = torch.rand(len(finding_states), 1, device=finding_states.device) < self.config.predicted_state_ratio
            finding_states = finding_states.masked_fill(drawn, -1)
        if finding_states is None or bool((finding_states < 0).any()):
            trains = torch.is_grad_enabled()  # then forward encodes the views itself
            with torch.no_grad():
                reader = "predictor" if trains else "both"
                study = self.read_study(
                    **views, finding_states=finding_states, reader=reader, indication_ids=indication_ids
                )
            finding_states = study.finding_states
            if not trains:
                views = {"view_mask": study.view_mask, "view_features": study.view_features}
        else:
            check_finding_states(finding_states, len(finding_states))
        if trains_report and self.config.finding_state_dropout:
            finding_states = drop_states(finding_states, self.config.finding_state_dropout)
        tokens = inputs_embeds if input_ids is None else input_ids
        if tokens is not None:
            if attention_mask is None:
                attention_mask = prompt["attention_mask"] = torch.ones(tokens.shape[:2], dtype=torch.long).to(
                    tokens.device
                )
            places = self.get_placeholder_mask(self.config.finding_text_token_id, input_ids, inputs_embeds)
            if attention_mask.shape != places.shape:
                raise ValueError(
                    f"attention_mask has shape {tuple(attention_mask.shape)}: expected {tuple(places.shape)}"
                )
            if places.any():
                embeddings = self.get_input_embeddings()
                prompt = insert_finding_text(self.config, prompt, places, finding_states, embeddings)
        given = {**prompt, **views, "finding_states": finding_states, "indication_ids": indication_ids, **kwargs}
        return {name: value for name, value in given.items() if value is not None}

    def _read_prompt(
        self, prompt: dict, pixel_values, view_mask, view_features, finding_states, indication_ids=None, **priors
    ) -> dict[str, Any]:
        """The features and states of the studies, and `prompt`, or the default one, with its label text."""
        check_batch(
            **{name: value for name, value in prompt.items() if name != "position_ids"},
            pixel_values=pixel_values,
            view_mask=view_mask,
            view_features=view_features,
            finding_states=finding_states,
            **priors,
        )
        if finding_states is not None and not self.config.dle:
            raise ValueError(
                "finding_states were given, but OTDRGConfig.dle=False: this model does not use finding states"
            )
        study = self.read_study(
            pixel_values, view_mask, view_features, finding_states, indication_ids=indication_ids, **priors
        )
        ids, text = prompt.get("input_ids"), self.config.text_config
        if ids is None and prompt.get("inputs_embeds") is None:
            prompt = {**prompt, **default_prompt(self.config, study.view_mask, study.prior_view_mask)}
        elif ids is not None and prompt.get("attention_mask") is None and text.pad_token_id is not None:
            ends = text.eos_token_id if isinstance(text.eos_token_id, list) else [text.eos_token_id]
            if text.pad_token_id not in ends:
                # As transformers does, which would see a mask of ones.
                prompt = {**prompt, "attention_mask": (ids != text.pad_token_id).long()}
        return self.expand_finding_text(**prompt, **study.encoded_views, finding_states=study.finding_states)

    @torch.no_grad()
    def get_prompt_embeddings(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        view_mask: torch.Tensor | None = None,
        finding_states: torch.Tensor | None = None,
        view_features: torch.Tensor | None = None,
        indication_ids: torch.Tensor | None = None,
        prior_pixel_values: torch.Tensor | None = None,
        prior_view_mask: torch.Tensor | None = None,
        prior_view_features: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The LLM's input embeddings for studies, for an inference engine that serves the LLM alone.

        Args:
            input_ids, attention_mask (`torch.Tensor` of shape `(B, L)`, *optional*):
                The processor's prompts, padded on the left; the default prompt without them.
            pixel_values, view_mask, view_features, finding_states, indication_ids, prior_pixel_values, prior_view_mask,
                prior_view_features: as in [`forward`]; given states steer the report.

        Returns:
            Embeddings (B, L', hidden_size) of the prompt with image tokens, label tokens and label text, and their mask
            (B, L').

        Raises:
            ValueError: as in [`generate`].
        """
        prompt = {"input_ids": input_ids, "attention_mask": attention_mask}
        views = pixel_values, view_mask, view_features
        priors = given_priors(prior_pixel_values, prior_view_mask, prior_view_features)
        inputs = self._read_prompt(prompt, *views, finding_states, indication_ids, **priors)
        return self._embed(inputs), inputs["attention_mask"]

    def _embed(self, inputs: dict[str, Any]) -> torch.Tensor:
        """The LLM's input embeddings (B, L', hidden_size) of prompts whose label text is written out."""
        image_features, image_mask = self.project_views(inputs["view_features"], inputs["view_mask"])
        priors = self.project_priors(inputs.get("prior_view_features"), inputs.get("prior_view_mask"))
        ids, states = inputs["input_ids"], inputs["finding_states"]
        embeddings, labels = self.get_input_embeddings()(ids), self._label_features(states)
        return self._place_study(ids, embeddings, image_features, image_mask, labels, states, priors)[0]

    def encode_prompt(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        view_mask: torch.Tensor | None = None,
        view_features: torch.Tensor | None = None,
        finding_states: torch.Tensor | None = None,
        indication_ids: torch.Tensor | None = None,
        prior_pixel_values: torch.Tensor | None = None,
        prior_view_mask: torch.Tensor | None = None,
        prior_view_features: torch.Tensor | None = None,
        **kwargs,
    ) -> BaseModelOutput:
        """The last hidden states of prompts and reports, without the LLM's head.

        The label text is written out where `input_ids` has its place, and its states are left out again.

        Args:
            input_ids, attention_mask (`torch.Tensor` of shape `(B, L)`): as in [`forward`], padded on either side.
            pixel_values, view_mask, view_features, finding_states, indication_ids, prior_pixel_values, prior_view_mask,
                prior_view_features: as in [`forward`].
            kwargs: the LLM's.

        Returns:
            `last_hidden_state` (B, L, hidden_size), from which the head computes the logits of the next tokens.

        Raises:
            ValueError: as in [`forward`].
        """
        reader = self._select_reader(True, finding_states, None, report_only=True)
        priors = given_priors(prior_pixel_values, prior_view_mask, prior_view_features)
        study = self.read_study(
            pixel_values, view_mask, view_features, finding_states, reader, False, indication_ids, **priors
        )
        # Weights are moved with their tokens, and are 0 in the label text and in padding: here they are places, from 1.
        places = torch.arange(1, input_ids.shape[1] + 1, device=input_ids.device).expand_as(input_ids)
        inputs = self.expand_finding_text(
            input_ids=input_ids,
            attention_mask=attention_mask,
            label_weights=places,
            **study.encoded_views,
            finding_states=study.finding_states,
        )
        mask = inputs["attention_mask"]
        states = self.language_model.base_model(
            inputs_embeds=self._embed(inputs),
            attention_mask=mask,
            position_ids=(mask.cumsum(dim=1) - 1).clamp(min=0),
            **{**kwargs, "use_cache": False, "return_dict": True},
        ).last_hidden_state
        if states.shape[1] != input_ids.shape[1] or (inputs["label_weights"] != places).any():
            states = states.gather(
                1, _moved_to(places, inputs["label_weights"])[:, :, None].expand(-1, -1, states.shape[-1])
            )
        return BaseModelOutput(last_hidden_state=states)

    # -- the places of features ------------------------------------------------------------------------------------

    def get_placeholder_mask(
        self, token_id: int | None, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Positions (B, L) of a placeholder in `input_ids` or, if given, in `inputs_embeds` (B, L, hidden_size)."""
        if inputs_embeds is None:
            return torch.eq(torch.as_tensor(input_ids), -1 if token_id is None else token_id)
        if token_id is None:
            return torch.zeros(inputs_embeds.shape[:2], dtype=torch.bool, device=inputs_embeds.device)
        placeholder = self.get_input_embeddings()(torch.tensor(token_id, device=inputs_embeds.device))
        return (inputs_embeds == placeholder).all(dim=-1)

    def _place_features(self, what, input_ids, inputs_embeds, features, mask) -> torch.Tensor:
        """`inputs_embeds` with the unmasked `features` (B, M, D) in the places of the `what` token, in order."""
        token_id = self.config.image_token_id if what == "image" else self.config.finding_token_id
        placeholders = self.get_placeholder_mask(token_id, input_ids, None if input_ids is not None else inputs_embeds)
        tokens, expected = placeholders.sum(dim=1), mask.sum(dim=1)
        if input_ids is None and not tokens.any():
            return inputs_embeds  # the caller has put features in place
        wrong = (tokens != expected).nonzero().flatten()
        if len(wrong):
            row = int(wrong[0])
            raise ValueError(
                f"{what} tokens and {what} features do not match in row {row}: tokens: {int(tokens[row])}, "
                f"features: {int(expected[row])}"
            )
        return inputs_embeds.masked_scatter(placeholders[:, :, None], features[mask].to(inputs_embeds.dtype))


class OTDRGBackbone:
    """The model without the LLM's head, which transformers calls a model's `base_model`.

    Called, it is [`encode_prompt`]; otherwise it is the LLM. TRL's trainers compute log-probabilities with it.
    """

    def __init__(self, model: OTDRGPromptMixin):
        self._model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model.language_model, name)

    def __call__(self, *args, **kwargs) -> BaseModelOutput:
        return self._model.encode_prompt(*args, **kwargs)


def _moved_to(places: torch.Tensor, moved: torch.Tensor) -> torch.Tensor:
    """Where each token (B, L) is in prompts with label text, from `moved` (B, L'), the place of each token from 1 or 0.

    The place of the label text is where the text ends.
    """
    positions = torch.arange(moved.shape[1], device=moved.device).expand_as(moved)
    # The first column takes all that is no token of the prompt, the last one is behind the prompt.
    found = torch.full((len(places), places.shape[1] + 2), -1, device=moved.device).scatter(1, moved, positions)
    here, following = found[:, 1:-1], found[:, 2:]
    return torch.where(here < 0, following - 1, here).clamp(min=0)


# --- prompts as token ids ---------------------------------------------------------------------------------------------


def given_priors(
    pixel_values: torch.Tensor | None, view_mask: torch.Tensor | None, view_features: torch.Tensor | None
) -> dict[str, torch.Tensor]:
    """The views of prior studies that were given, as arguments of [`forward`]."""
    given = {
        "prior_pixel_values": pixel_values,
        "prior_view_mask": view_mask,
        "prior_view_features": view_features,
    }
    return {name: value for name, value in given.items() if value is not None}


def default_prompt(
    config: OTDRGConfig, view_mask: torch.Tensor, prior_view_mask: torch.Tensor | None = None
) -> dict[str, torch.Tensor]:
    """`input_ids` and `attention_mask` (B, L) of the default prompt, padded on the left, for views (B, V) and (B, V').

    Raises:
        ValueError: the configuration has no default prompt.
    """
    ids = config.prompt_token_ids
    if ids is None:
        raise ValueError("input_ids is missing, and OTDRGConfig.prompt_token_ids=None: pass the processor's output")
    first = ids.index(config.image_token_id)
    rows = []
    priors = [0] * len(view_mask) if prior_view_mask is None else prior_view_mask.sum(dim=1).tolist()
    for views, prior_views in zip(view_mask.sum(dim=1).tolist(), priors, strict=True):
        repeats = views - 1 + prior_views if config.view_fusion == "concat" else min(prior_views, 1)
        more = [config.image_token_id] * (repeats * config.image_tokens)
        rows.append(torch.tensor(ids[:first] + more + ids[first:], device=view_mask.device))
    masks = [torch.ones_like(row) for row in rows]
    pad = config.text_config.pad_token_id or 0
    return {
        "input_ids": pad_sequence(rows, batch_first=True, padding_value=pad, padding_side="left"),
        "attention_mask": pad_sequence(masks, batch_first=True, padding_side="left"),
    }


def insert_finding_text(
    config: OTDRGConfig,
    inputs: dict[str, Any],
    places: torch.Tensor,
    finding_states: torch.Tensor,
    word_embeddings: nn.Module,
) -> dict[str, Any]:
    """Prompts in which each placeholder of the label text is replaced by the text of the study's states.

    Args:
        config: with the token ids of the texts.
        inputs: `input_ids`, `attention_mask`, `labels`, `label_weights`, `position_ids` (B, L) and `inputs_embeds`
            (B, L, hidden_size); `attention_mask` is required, the others may be None.
        places (`torch.Tensor` of shape `(B, L)`): true where a placeholder stands.
        finding_states (`torch.Tensor` of shape `(B, 14)`): state ids.
        word_embeddings: of the LLM, for the text's rows of `inputs_embeds`.

    Returns:
        The same inputs of length L', padded on the side they were.
    """
    mask, labels, embeds = inputs["attention_mask"].bool(), inputs["labels"], inputs["inputs_embeds"]
    weights = inputs.get("label_weights")
    rows: dict[str, list[torch.Tensor]] = defaultdict(list)
    for row, states in enumerate(finding_states.tolist()):
        # The 0 at the end is never written: it keeps the indices below valid where the text is empty.
        text = torch.tensor([*_finding_text(config, states), 0], device=mask.device)
        # How many tokens each position becomes; for each new position, the one it comes from and the token written.
        counts = torch.where(places[row], len(text) - 1, 1).masked_fill(~mask[row], 0)
        source = torch.arange(len(counts), device=mask.device).repeat_interleave(counts)
        new = torch.arange(len(source), device=mask.device)
        is_text, token = places[row, source], text[new - (counts.cumsum(dim=0) - counts)[source]]
        rows["attention_mask"].append(torch.ones_like(source))
        if inputs["input_ids"] is not None:
            rows["input_ids"].append(torch.where(is_text, token, inputs["input_ids"][row, source]))
        if labels is not None:
            rows["labels"].append(labels[row, source].masked_fill(is_text, -100))
        if weights is not None:
            rows["label_weights"].append(weights[row, source].masked_fill(is_text, 0))
        if inputs["position_ids"] is not None:
            moved = new - (mask[row].cumsum(dim=0) - 1)[source]
            rows["position_ids"].append(inputs["position_ids"].expand(mask.shape)[row, source] + moved)
        if embeds is not None:
            written = word_embeddings(token).to(embeds.dtype)
            rows["inputs_embeds"].append(torch.where(is_text[:, None], written, embeds[row, source]))
    is_left = not bool(mask[:, 0].all()) or (bool(mask[:, -1].all()) and labels is None)
    pads = {"input_ids": config.text_config.pad_token_id or 0, "labels": -100}
    expanded = {
        name: pad_sequence(values, True, pads.get(name, 0), "left" if is_left else "right")
        for name, values in rows.items()
    }
    expanded["attention_mask"] = expanded["attention_mask"].to(inputs["attention_mask"].dtype)
    return {**inputs, **expanded}


def _finding_text(config: OTDRGConfig, states: list[int]) -> list[int]:
    """Token ids of the label text that `config.finding_text` asks for."""
    return [
        token
        for finding, state in enumerate(states)
        if state != NOT_GIVEN and (config.finding_text == "all" or state != UNMENTIONED)
        for token in config.finding_text_token_ids[finding][state]
    ]


def check_batch(**inputs: torch.Tensor | None) -> None:
    """Check that all tensors have the same number of studies.

    Raises:
        ValueError: they do not.
    """
    batched = {name: value for name, value in inputs.items() if isinstance(value, torch.Tensor) and value.ndim > 0}
    if not batched:
        return
    first, reference = next(iter(batched.items()))
    for name, value in batched.items():
        if len(value) != len(reference):
            found, expected = f"{len(value)} rows", f"{len(reference)}"
            if name.startswith("finding_"):
                found, expected = f"shape {tuple(value.shape)}", f"{(len(reference), len(FINDINGS))}"
            raise ValueError(f"{name} has {found}: expected {expected}, as many rows as {first}")


__all__ = ["OTDRGBackbone", "OTDRGPromptMixin", "check_batch", "default_prompt", "given_priors"]
