"""Consensus decoding: of many candidate reports, write the one that agrees most with likely reports and the states.

Long, because the settings, the samples and the choice stand together: a published model takes this file along.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from .bank_otdrg import ReportBank, pool_views
from .findings_otdrg import NOT_GIVEN, POSITIVE
from .guidance_otdrg import without_positives
from .utility_otdrg import UTILITY, ReportUtility, disagreements

#: Reads the states (N, 14) of N reports.
Label = Callable[[list[str]], np.ndarray]

#: Which of the states condition a group of samples.
STATES = ("all", "positive", "others")

#: lambda, where findings can be read in candidates.
AGREEMENT_WEIGHT = 0.08

#: Maximum length of a report in tokens if neither the caller nor the model's generation config sets one.
MAX_NEW_TOKENS = 256
_LENGTHS = ("max_new_tokens", "max_length")


# --- settings --------------------------------------------------------------------------------------------------------


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_number(value: Any, least: float = float("-inf")) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and least <= value < float("inf")


@dataclass(frozen=True)
class SampleGroup:
    """A group of samples of [`ConsensusSettings.plan`].

    Args:
        states: which states condition them: "all", only the "positive" ones, or the "others", without the positive
            ones.
        guidance_scale: as in `generate`.
        temperature, top_p: of nucleus sampling.
    """

    states: str = "all"
    guidance_scale: float = 1.0
    temperature: float = 0.9
    top_p: float = 0.95

    def __post_init__(self):
        for name, is_right, expected in (
            ("states", self.states in STATES, f"one of {', '.join(STATES)}"),
            ("guidance_scale", _is_number(self.guidance_scale, 1), "a number of at least 1"),
            ("temperature", _is_number(self.temperature) and self.temperature > 0, "a number above 0"),
            ("top_p", _is_number(self.top_p) and 0 < self.top_p <= 1, "a number above 0, up to 1"),
        ):
            if not is_right:
                raise ValueError(f"consensus: plan: {name}={getattr(self, name)!r}, expected {expected}")


#: The default groups of samples, of equal size.
SAMPLE_PLAN: tuple[SampleGroup, ...] = (
    SampleGroup("all", guidance_scale=2.0),
    SampleGroup("positive", guidance_scale=2.5),
    SampleGroup("positive"),
    SampleGroup("others"),
)


@dataclass(frozen=True)
class ConsensusSettings:
    """Settings of consensus decoding; `generation_config.consensus` of a model holds those that differ.

    Args:
        candidates: samples per study, divided equally among the groups of the plan; 0 with a bank chooses among its
            reports only.
        retrieved: with a bank, whether its reports are candidates as well.
        agreement_weight: lambda, subtracted for each finding that is positive either in the candidate or in the
            conditioning states, unless it is not given; None for [`AGREEMENT_WEIGHT`] where the package `otdrg` is
            installed, and 0 elsewhere.
        utility: weights of the scores, see [`UTILITY`].
        plan: groups of samples; a model that does not use finding states (`dle=False`) has one group, and its
            candidates are compared with the predicted states.
        seed: of the samples. Every study is sampled with the same random numbers, so that its report does not depend
            on the other studies.
    """

    candidates: int = 32
    retrieved: bool = True
    agreement_weight: float | None = None
    utility: Mapping[str, float] = field(default_factory=lambda: dict(UTILITY))
    plan: tuple[SampleGroup, ...] = SAMPLE_PLAN
    seed: int = 0

    #: Most candidates.
    most: ClassVar[int] = 4096

    def __post_init__(self):
        if isinstance(self.plan, (list, tuple)):
            # A group can be of the same class in another copy of this file.
            named = [asdict(it) if is_dataclass(it) and not isinstance(it, type) else it for it in self.plan]
            made = [_made(SampleGroup, it, "plan: ") if isinstance(it, Mapping) else it for it in named]
            object.__setattr__(self, "plan", tuple(made))
        plan, utility = self.plan, self.utility
        for name, is_right, expected in (
            (
                "candidates",
                _is_count(self.candidates) and self.candidates <= self.most,
                f"a number from 0 to {self.most}",
            ),
            ("retrieved", isinstance(self.retrieved, bool), "true or false"),
            ("agreement_weight", self.agreement_weight is None or _is_number(self.agreement_weight, 0), "0 or more"),
            (
                "utility",
                isinstance(utility, Mapping)
                and utility.keys() <= UTILITY.keys()
                and all(_is_number(weight, 0) for weight in utility.values())
                and any(utility.values()),
                f"weights of {', '.join(UTILITY)}, one of them above 0",
            ),
            (
                "plan",
                isinstance(plan, tuple) and plan and all(isinstance(group, SampleGroup) for group in plan),
                "a list of groups of samples",
            ),
            ("seed", _is_count(self.seed), "0 or more"),
        ):
            if not is_right:
                raise ValueError(f"consensus: {name}={getattr(self, name)!r}, expected {expected}")

    @classmethod
    def of(cls, *settings: Mapping[str, Any] | None) -> ConsensusSettings:
        """The settings of mappings; later ones replace earlier ones.

        Raises:
            ValueError: an unknown name or an impossible value.
        """
        merged: dict[str, Any] = {}
        for some in settings:
            if some is not None and not isinstance(some, Mapping):
                raise ValueError(f"consensus={some!r}: expected settings by name")
            merged |= some or {}
        return _made(cls, merged, "")

    @property
    def sequences(self) -> int:
        """Sequences of a study that are generated at a time: those of the largest group, and as many for guidance."""
        size = -(-self.candidates // len(self.plan))
        return max(size, 1) * (2 if any(group.guidance_scale > 1 for group in self.plan) else 1)

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON holds them."""
        return asdict(self)


def consensus_settings(
    generation_config, candidates: int | None = None, bank=None, settings: Mapping[str, Any] | None = None
) -> ConsensusSettings | None:
    """The settings that a call asks for; None for one report by `generate`.

    Args:
        generation_config: of the model; its `consensus` holds settings as well.
        candidates: samples per study; 1, from wherever it is set, is `generate`.
        bank: not None if there is a report bank.
        settings: others, by name.

    Raises:
        ValueError: an unknown name or an impossible value.
    """
    stored = getattr(generation_config, "consensus", None)
    if candidates is None and bank is None and not settings and not stored:
        return None
    found = ConsensusSettings.of(stored, settings, {} if candidates is None else {"candidates": candidates})
    return None if found.candidates == 1 else found


def _made(kind, values: Any, place: str):
    names = [each.name for each in fields(kind)]
    for name in values:
        if name not in names:
            raise ValueError(f"consensus: {place}unknown setting {name!r}, expected one of {', '.join(names)}")
    return kind(**values)


def store_settings(model, settings: Mapping[str, Any]) -> None:
    """Make settings a model's defaults: its generation config holds them, and is saved with them.

    Raises:
        ValueError: an unknown name or an impossible value.
    """
    ConsensusSettings.of(settings)
    fields = {**model.generation_config.to_dict(), "consensus": dict(settings)}
    # transformers drops other fields from a generation config that it made from a model's configuration.
    fields.pop("_from_model_config", None)
    model.generation_config = GenerationConfig(**fields)


# --- decoding --------------------------------------------------------------------------------------------------------


class Candidate(NamedTuple):
    """A candidate report.

    Args:
        report: its text.
        score: expected utility minus disagreement.
        sampled: whether the model wrote it.
        retrieved: whether it stands word for word in the bank; None without a bank.
        complete: whether it ended by itself.
    """

    report: str
    score: float
    sampled: bool
    retrieved: bool | None
    complete: bool = True


class ConsensusDecoder:
    """Samples candidates and ranks them by expected utility and agreement with the conditioning states.

    score(c) = sum_i w_i(x) u(c, r_i) - lambda d(c), with the utility u of [`ReportUtility`] and d(c) the number of
    findings that are positive in exactly one of c and the conditioning states. The r_i are the reports of the bank,
    weighted by the study's images and indication, or without a bank the samples themselves, equally weighted.

    Args:
        settings: see [`ConsensusSettings`].
        bank: training reports.
        label: reads the states of reports; needed if `settings.agreement_weight` is above 0.

    Raises:
        ValueError: no candidates, or agreement without `label`.
    """

    def __init__(self, settings: ConsensusSettings, bank: ReportBank | None = None, label: Label | None = None):
        if not settings.candidates and (bank is None or not settings.retrieved):
            raise ValueError("candidates=0: expected 1 or more, or a report bank whose reports are candidates")
        if settings.agreement_weight and label is None:
            raise ValueError(f"consensus: agreement_weight={settings.agreement_weight}, expected 0 without a labeler")
        self.settings, self.bank, self.label = settings, bank, label

    @torch.no_grad()
    def decode(
        self,
        model,
        processor,
        prompt: Mapping[str, torch.Tensor],
        study,
        generation: Mapping[str, Any],
        indications: Sequence[str | None] | None = None,
    ) -> list[list[Candidate]]:
        """The candidates of each of B studies, the best first.

        Args:
            model, processor: as published.
            prompt: `input_ids` and `attention_mask` (B, L) of the processor.
            study: [`OTDRGStudy`] of the B studies.
            generation: other arguments of `generate`, such as `max_new_tokens`, but for `generation_config`; those of
                the search are replaced.
            indications: of the studies, for the bank's weights.
        """
        samples = self.sample(model, processor, prompt, study, generation)
        states = study.finding_states.cpu().numpy()
        weights = None
        if self.bank is not None:
            features = pool_views(study.view_features, study.view_mask).cpu().numpy()
            weights = self.bank.weights(features, indications)
        suppressed = generation.get("bad_words_ids") or model.generation_config.bad_words_ids or []
        words = frozenset(processor.tokenizer.decode(ids).strip() for ids in suppressed)
        return [
            self.rank(texts, states[row], None if weights is None else weights[row], words)
            for row, texts in enumerate(samples)
        ]

    def rank(
        self,
        samples: Sequence[tuple[str, bool]],
        states: np.ndarray,
        weights: np.ndarray | None = None,
        suppressed: frozenset[str] = frozenset(),
    ) -> list[Candidate]:
        """Candidates of one study, the best first; of equal ones the first.

        Args:
            samples: reports of the model, as often as they were sampled, and whether they are complete.
            states: (14,) state ids that conditioned them.
            weights: (R,) of the bank's reports for this study; None without a bank.
            suppressed: words; reports of the bank with one are no candidates.
        """
        complete = dict(samples)
        texts, settings = list(complete), self.settings
        scores: dict[str, float] = {}
        if texts:
            if self.bank is None:
                counts = np.array([sum(text == other for other, _ in samples) for text in texts], float)
                expected = ReportUtility(texts, counts, settings.utility)(texts) @ (counts / counts.sum())
            else:
                expected = self.bank.utility(settings.utility)(texts) @ weights
            scores |= zip(texts, self._scores(expected, self._states(texts), states).tolist(), strict=True)
        if self.bank is not None and settings.retrieved:
            expected = self.bank.own_utilities(settings.utility) @ weights
            found = self._scores(expected, self._bank_states, states).tolist()
            scores = {
                **scores,
                **{
                    text: score
                    for text, score in zip(self.bank.reports, found, strict=True)
                    if text not in scores and suppressed.isdisjoint(text.split())
                },
            }
        if not scores:
            raise ValueError("consensus: no candidate is left: every report of the bank has a suppressed word")
        ranked = [
            Candidate(
                text,
                score,
                text in complete,
                None if self.bank is None else text in self.bank,
                complete.get(text, True),
            )
            for text, score in scores.items()
        ]
        return sorted(ranked, key=lambda candidate: -candidate.score)

    def _scores(self, utility: np.ndarray, stated: np.ndarray | None, states: np.ndarray) -> np.ndarray:
        return utility if stated is None else utility - self._agreement_weight * disagreements(stated, states)

    @property
    def _agreement_weight(self) -> float:
        given = self.settings.agreement_weight
        if given is None:
            return AGREEMENT_WEIGHT if self.label is not None else 0.0
        return given

    def _states(self, reports: list[str]) -> np.ndarray | None:
        """State ids (N, 14) read in reports; None if they do not count."""
        return None if not self._agreement_weight or self.label is None else self.label(reports)

    @cached_property
    def _bank_states(self) -> np.ndarray | None:
        return None if self.bank is None else self._states(self.bank.reports)

    def sample(self, model, processor, prompt, study, generation) -> list[list[tuple[str, bool]]]:
        """For each study its samples, and whether each is complete."""
        batch = len(study.finding_states)
        plan = self.settings.plan if model.config.dle else (SampleGroup(),)
        sizes = [len(part) for part in np.array_split(np.arange(self.settings.candidates), len(plan))]
        samples: list[list[tuple[str, bool]]] = [[] for _ in range(batch)]
        config = model.generation_config
        generation = with_length(generation, config)
        lengths = [given.get(name) for name in _LENGTHS for given in (generation, vars(config))]
        steps = next(length for length in lengths if length is not None)
        for number, (group, size) in enumerate(zip(plan, sizes, strict=True)):
            if not size:
                continue
            inputs = {**prompt, **study.encoded_views}
            if model.config.dle:
                inputs["finding_states"] = given_states(study.finding_states, group.states)
            sequences = self.draw(model, inputs, generation, group, number, size, steps)
            written = sequences[:, prompt["input_ids"].shape[1] :]
            ended = is_complete(written, generation.get("eos_token_id", config.eos_token_id))
            texts = processor.batch_decode(written, skip_special_tokens=True)
            for place, (text, end) in enumerate(zip(texts, ended, strict=True)):
                samples[place // size].append((" ".join(text.split()), end))
        return samples

    def draw(
        self,
        model,
        inputs: Mapping[str, torch.Tensor],
        generation: Mapping[str, Any],
        group: SampleGroup,
        number: int,
        size: int,
        steps: int,
    ) -> torch.Tensor:
        """Samples of a group for each of B studies, (B * size, L + new tokens).

        Args:
            model: as published.
            inputs: prompt, views and states of the B studies.
            generation: other arguments of `generate`.
            group, number: the group, and its place in the plan.
            size: samples per study.
            steps: most new tokens.
        """
        batch = len(inputs["input_ids"])
        uniforms = np.random.default_rng([self.settings.seed, number]).random((size, steps))
        sampling = _NucleusSampling(
            torch.from_numpy(uniforms).repeat(batch, 1), group, model.config.placeholder_token_ids
        )
        return model.generate(
            **{name: value.repeat_interleave(size, dim=0) for name, value in inputs.items()},
            **{
                **generation,
                **{"do_sample": False, "num_beams": 1, "num_return_sequences": 1, "return_dict_in_generate": False},
                "logits_processor": LogitsProcessorList([*(generation.get("logits_processor") or ()), sampling]),
                "guidance_scale": group.guidance_scale,
            },
        )


def given_states(finding_states: torch.Tensor, kind: str) -> torch.Tensor:
    """States (B, 14) of which only those of a kind of [`STATES`] condition the samples; others are not given."""
    if kind == "all":
        return finding_states
    if kind == "others":
        return without_positives(finding_states)
    return finding_states.masked_fill(finding_states != POSITIVE, NOT_GIVEN)


def with_length(arguments: Mapping[str, Any], config) -> dict[str, Any]:
    """Arguments of `generate`, with [`MAX_NEW_TOKENS`] if neither they nor the generation config set a length."""
    if any(given.get(name) is not None for name in _LENGTHS for given in (arguments, vars(config))):
        return dict(arguments)
    return {**arguments, "max_new_tokens": MAX_NEW_TOKENS}


def is_complete(written: torch.Tensor, end: int | list[int] | None) -> list[bool]:
    """For each sequence of new tokens, whether it contains an end-of-text token; all do if there is no such token."""
    if end is None:
        return [True] * len(written)
    return torch.isin(written, torch.tensor(end, device=written.device)).any(dim=1).tolist()


class _NucleusSampling(LogitsProcessor):
    """Samples by given uniform random numbers, so that each row has its own and batches do not matter.

    All tokens but the sampled one are excluded, so that greedy search takes it.

    Args:
        uniforms: (rows, steps) in [0, 1).
        group: temperature and top-p.
        excluded: token ids that are never sampled.
    """

    def __init__(self, uniforms: torch.Tensor, group: SampleGroup, excluded: Sequence[int]):
        self.uniforms, self.group, self.excluded = uniforms, group, list(excluded)
        self.step = 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        uniform = self.uniforms[:, self.step, None].to(scores.device, torch.float32)
        self.step += 1
        scores = scores.float().index_fill(1, torch.tensor(self.excluded, device=scores.device), -torch.inf)
        probabilities, tokens = (
            (scores / self.group.temperature).softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
        )
        before = probabilities.cumsum(dim=-1) - probabilities
        mass = probabilities.where(before < self.group.top_p, 0.0).cumsum(dim=-1)
        place = (mass < uniform * mass[:, -1:]).sum(dim=-1, keepdim=True)
        return torch.full_like(scores, -torch.inf).scatter(1, tokens.gather(1, place), 0.0)


__all__ = [
    "AGREEMENT_WEIGHT",
    "SAMPLE_PLAN",
    "Candidate",
    "ConsensusDecoder",
    "ConsensusSettings",
    "SampleGroup",
    "consensus_settings",
    "given_states",
    "is_complete",
    "store_settings",
    "with_length",
]
