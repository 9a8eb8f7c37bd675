"""Training batches: the order of studies, and collators that make batches of them with their targets.

Most sentences of reports deny findings, and a language model learns these first: without weights it writes few of the
positive findings that it is given. So abnormal studies can be drawn more often, and abnormal sentences weigh more.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Sampler
from transformers.trainer_pt_utils import get_length_grouped_indices

from ..inference.collation import collate_priors, collate_views, indications_of
from ..labelers.abnormal import Spans, is_abnormal
from ..processing_otdrg import OTDRGProcessor

# --- the order of studies --------------------------------------------------------------------------------------------


def study_weights(states: Sequence[Sequence[int]], weight: float) -> list[float] | None:
    """How often each study is drawn: `weight` times as often if it is abnormal; None if all are drawn alike."""
    return None if weight == 1 else np.where(is_abnormal(states), weight, 1.0).tolist()


class StudySampler(Sampler):
    """An order of the training studies that depends on the seed and the epoch only.

    With lengths, batches are of similar length, and they are shuffled: transformers' own order runs from long to short
    over 50 batches, and so does the loss.

    Args:
        studies: number of studies; each epoch has as many draws.
        seed: of the order; the same on all processes.
        batch_size: of a step, to group by length.
        lengths: of each study's report.
        weights: how often each study is drawn, in relation to the others; by default once an epoch. In every epoch a
            study is drawn its expected number of times, rounded up or down.
    """

    def __init__(
        self,
        studies: int,
        seed: int,
        batch_size: int,
        lengths: Sequence[int] | None = None,
        weights: Sequence[float] | None = None,
    ):
        self.studies, self.seed, self.batch_size = studies, seed, batch_size
        self.lengths, self.weights = lengths, weights
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.studies

    def __iter__(self):
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        drawn = list(range(self.studies)) if self.weights is None else self._draw(generator)
        if self.lengths is None:
            return iter([drawn[place] for place in torch.randperm(len(drawn), generator=generator).tolist()])
        lengths = [self.lengths[study] for study in drawn]
        places = get_length_grouped_indices(lengths, self.batch_size, generator=generator)
        # The longest batch stays first, so that memory runs out at once if at all; an incomplete one stays last.
        whole = len(places) // self.batch_size
        batches = [places[start : start + self.batch_size] for start in range(0, len(places), self.batch_size)]
        order = [0, *(torch.randperm(whole - 1, generator=generator) + 1).tolist()] if whole else []
        shuffled = [place for batch in order for place in batches[batch]]
        return iter([drawn[place] for place in shuffled + places[whole * self.batch_size :]])

    def _draw(self, generator: torch.Generator) -> list[int]:
        """Studies in proportion to their weights: systematic sampling from a random order."""
        order = torch.randperm(self.studies, generator=generator)
        shares = torch.tensor(self.weights, dtype=torch.float64)[order].cumsum(dim=0)
        points = torch.arange(self.studies, dtype=torch.float64) + torch.rand((), generator=generator).double()
        found = torch.searchsorted(shares, points * (shares[-1] / self.studies), right=True)
        return order[found.clamp(max=self.studies - 1)].tolist()


# --- collators -------------------------------------------------------------------------------------------------------


class ReportCollator:
    """Batches for the report stage, of rows as [`collate_views`] takes them.

    Training batches have the reports as targets and the true states, which condition the LLM. Evaluation batches have
    no true states, so the model conditions on the states it predicts. The label text is written out later, by the
    model's `expand_finding_text`.

    Args:
        processor: the model's.
        training: whether batches are for training.
        max_report_tokens: longer reports are cut to this many tokens.
        supervise_predictor: whether training batches also have the true states as `finding_labels`.
        indication: whether prompts have the studies' indications.
        sentence_weight: weight of the tokens of abnormal sentences in training batches.
        abnormal: where these are, by report; as of [`abnormal_sentences`].
    """

    def __init__(
        self,
        processor: OTDRGProcessor,
        training: bool,
        max_report_tokens: int | None = None,
        supervise_predictor: bool = False,
        indication: bool = False,
        sentence_weight: float = 1.0,
        abnormal: dict[str, Spans] | None = None,
    ):
        self.processor = processor
        self.training = training
        self.sentence_weight = sentence_weight
        self.abnormal = abnormal or {}
        self.max_report_tokens = max_report_tokens
        self.supervise_predictor = supervise_predictor
        self.indication = indication

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        views = collate_views(self.processor, rows)
        priors, asked = collate_priors(self.processor, rows)
        text = self.processor.encode_text(
            views["view_mask"].sum(dim=1).tolist(),
            report=[row["report"] for row in rows],
            indication=indications_of(rows) if self.indication else None,
            max_report_tokens=self.max_report_tokens,
            finding_states=[row["finding_states"] for row in rows] if self.training else None,
            **asked,
        )
        if self.training and self.supervise_predictor:
            text["finding_labels"] = text["finding_states"].clone()
        if self.training and self.sentence_weight != 1:
            text["label_weights"] = self._label_weights([row["report"] for row in rows], text["labels"])
        return text | views | priors

    def _label_weights(self, reports: list[str], labels: torch.Tensor) -> torch.Tensor:
        """Weights (B, L) of the tokens in `labels`; the end of text has weight 1."""
        encoded = self.processor.tokenizer(reports, add_special_tokens=False, return_offsets_mapping=True)
        weights = torch.ones(labels.shape)
        for row, report in enumerate(reports):
            spans = self.abnormal.get(report)
            if spans:
                found = [
                    self.sentence_weight if any(begin < end and stop > start for start, end in spans) else 1.0
                    for begin, stop in encoded["offset_mapping"][row]
                ]
                places = (labels[row] != -100).nonzero().flatten()[:-1]
                weights[row, places] = torch.tensor(found[: len(places)])
        return weights


class ContrastiveCollator:
    """Batches for contrastive pre-training: views, and keys that identify studies and reports.

    `study_keys` (B,) identify studies on every process. If reports are read, `report_ids` and `report_mask` (B, L) are
    their tokens, and `report_keys` (B,) are equal for reports with the same wording.

    Args:
        processor: the model's.
        max_report_tokens: tokens of a report that are kept; None leaves the reports out.
    """

    def __init__(self, processor: OTDRGProcessor, max_report_tokens: int | None = None):
        self.processor = processor
        self.max_report_tokens = max_report_tokens

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = {**collate_views(self.processor, rows), "study_keys": torch.tensor([_key(row["id"]) for row in rows])}
        if self.max_report_tokens is None:
            return batch
        reports = [row["report"] for row in rows]
        ids = self.processor.tokenizer(reports, add_special_tokens=False)["input_ids"]
        tokens = [torch.tensor(row[: self.max_report_tokens], dtype=torch.long) for row in ids]
        pad = torch.nn.utils.rnn.pad_sequence
        return {
            **batch,
            "report_ids": pad(tokens, batch_first=True),
            "report_mask": pad([torch.ones(len(row), dtype=torch.bool) for row in tokens], batch_first=True),
            "report_keys": torch.tensor([_key(" ".join(report.split())) for report in reports]),
        }


def _key(text: str) -> int:
    """A hash of the text from 0 to 2^63 - 1 that is the same on every process, unlike Python's."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


__all__ = ["ContrastiveCollator", "ReportCollator", "StudySampler", "study_weights"]
