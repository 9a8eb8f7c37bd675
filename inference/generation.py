"""Generate the reports of studies in batches, in all processes, and optionally record them as they are finished."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from ..consensus_otdrg import Candidate, ConsensusDecoder
from ..findings_otdrg import CONDITIONING_STATES, FINDINGS
from ..modeling_otdrg import OTDRGForReportGeneration, OTDRGStudy
from ..processing_otdrg import OTDRGProcessor
from ..runtime.journal import Journal
from ..runtime.processes import is_sharded, open_methods, process_share
from .collation import PromptCollator
from .features import CachedStudies


class ReportJournal:
    """A [`Journal`] of reports, so that an interrupted generation can be continued.

    All its reports must come from the same model, studies and decoding; the caller checks this with [`WorkSettings`].

    Args:
        path: the `.jsonl` file; it need not exist.

    Raises:
        ValueError: a line is no report.
    """

    def __init__(self, path: str | os.PathLike):
        self._journal = Journal(path)
        self.path = self._journal.path
        self._reports: dict[str, tuple[str, list[int], dict[str, Any]]] = {}
        for number, row in enumerate(self._journal.rows, 1):
            try:
                states = [CONDITIONING_STATES.index(row[name]) for name in FINDINGS]
                chosen = {name: row[name] for name in _CHOSEN if name in row}
                self._reports[row["id"]] = row["report"], states, chosen
            except (ValueError, KeyError, TypeError):
                raise ValueError(
                    f"{self.path}, line {number}: no report with its id and 14 states; delete the file to begin anew"
                ) from None

    def __contains__(self, study: str) -> bool:
        return study in self._reports

    def __getitem__(self, study: str) -> tuple[str, list[int], dict[str, Any]]:
        """A study's report, the ids of the 14 states that conditioned it, and what consensus decoding adds."""
        return self._reports[study]

    def add(self, rows: Sequence[tuple[str, str, list[int], dict[str, Any]]]) -> None:
        """Add lines of a study's id, report, states, and what consensus decoding adds."""
        self._journal.add(
            {
                "id": study,
                "report": report,
                **chosen,
                **dict(zip(FINDINGS, (CONDITIONING_STATES[state] for state in states), strict=True)),
            }
            for study, report, states, chosen in rows
        )
        self._reports |= {study: (report, states, chosen) for study, report, states, chosen in rows}


#: What consensus decoding adds to a report: whether it stands word for word in the bank, and the best of the samples.
_CHOSEN = ("retrieved", "sampled")


@dataclass
class GeneratedReports:
    """Generated reports of N studies.

    Args:
        reports: N texts.
        finding_states: (N, 14), the states that conditioned each report: predicted unless given.
        sampled: with consensus decoding, N texts, the best of the model's own samples; else None.
    """

    reports: list[str]
    finding_states: np.ndarray
    sampled: list[str] | None = None


def generate_reports(
    model: OTDRGForReportGeneration,
    processor: OTDRGProcessor,
    studies: Dataset | CachedStudies,
    batch_size: int = 8,
    generation: dict[str, Any] | None = None,
    finding_states: np.ndarray | None = None,
    indication: bool = False,
    journal: ReportJournal | None = None,
    consensus: ConsensusDecoder | None = None,
) -> GeneratedReports:
    """Generate reports for studies, in their order, from the images and, if requested, the indications only.

    Every process of a distributed run must call this function; each generates its share, and all get all reports.

    Args:
        model, processor: the model's type is left as it is.
        studies: rows with `images`, or those of [`cache_features`], which give the same reports.
        batch_size: studies per batch.
        generation: arguments of `generate`.
        finding_states: (N, 14) states that condition the reports, -1 for those to predict; by default all are.
        indication: whether the prompt contains the studies' `indication`.
        journal: with finished reports of these studies and settings, which are not generated again; the others are
            added as they are finished.
        consensus: chooses each report among candidates; without it, `generate` writes one.

    Raises:
        ValueError: `finding_states` does not fit the studies, or there is a journal and several processes.
    """
    if finding_states is not None and np.shape(finding_states) != (len(studies), len(FINDINGS)):
        raise ValueError(
            f"finding_states has shape {np.shape(finding_states)}: expected {(len(studies), len(FINDINGS))}"
        )
    state = PartialState()
    if journal is not None and state.num_processes > 1:
        raise ValueError(f"{journal.path} cannot be written by {state.num_processes} processes: expected one")
    mine, written = process_share(len(studies)), []
    if journal is not None:
        written = [(place, *journal[study]) for place, study in enumerate(studies["id"]) if study in journal]
        mine = sorted(set(mine).difference(place for place, *_ in written))
    waits = {"synced_gpus": True} if is_sharded(model) else {}
    views = "view_features" if "view_features" in studies.column_names else "images"
    loader = DataLoader(
        studies.select_columns(["id", views, "indication"] if indication else ["id", views]).select(mine),
        batch_size=batch_size,
        collate_fn=PromptCollator(processor, indication),
    )
    open_methods(model, "read_study", "generate")
    model.eval()
    waiting = iter(mine)
    # Commands show their progress; training has its own progress bar.
    for batch in tqdm(loader, desc=journal and journal.path.stem, unit="batch", disable=None if journal else True):
        batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
        prompt = {name: batch.pop(name) for name in ("input_ids", "attention_mask")}
        positions = list(islice(waiting, len(prompt["input_ids"])))
        given = None
        if finding_states is not None:
            given = torch.as_tensor(np.asarray(finding_states)[positions], device=model.device)
        with torch.no_grad():
            study = model.read_study(**batch, finding_states=given)
            indications = [studies["indication"][position] for position in positions] if indication else None
            arguments = {**waits, **(generation or {})}
            texts, chosen = _write(model, processor, prompt, study, arguments, consensus, indications)
        reports = [" ".join(text.split()) for text in texts]
        rows = list(zip(positions, reports, study.finding_states.tolist(), chosen, strict=True))
        written += rows
        if journal is not None:
            journal.add([(studies["id"][position], *row) for position, *row in rows])
    written = gather_object(written) if state.num_processes > 1 else written
    # Shares of processes may overlap.
    written = sorted({row[0]: row for row in written}.values())
    return GeneratedReports(
        reports=[text for _, text, *_ in written],
        finding_states=np.array([row[2] for row in written], dtype=np.int64).reshape(len(studies), len(FINDINGS)),
        sampled=[row[3].get("sampled", row[1]) for row in written] if consensus is not None else None,
    )


def _write(
    model: OTDRGForReportGeneration,
    processor: OTDRGProcessor,
    prompt: dict[str, torch.Tensor],
    study: OTDRGStudy,
    generation: dict[str, Any],
    consensus: ConsensusDecoder | None,
    indications: list[str | None] | None,
) -> tuple[list[str], list[dict[str, Any]]]:
    """The reports of a batch, and what consensus decoding adds to each."""
    if consensus is not None:
        ranked = consensus.decode(model, processor, prompt, study, generation, indications)
        return [candidates[0].report for candidates in ranked], [_chosen(candidates) for candidates in ranked]
    ids = model.generate(
        **prompt,
        view_features=study.view_features,
        view_mask=study.view_mask,
        # A model without DLE predicts finding states but does not use them.
        finding_states=study.finding_states if model.config.dle else None,
        **generation,
    )
    texts = processor.batch_decode(ids[:, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    return texts, [{} for _ in texts]


def _chosen(ranked: list[Candidate]) -> dict[str, Any]:
    """What a journal holds of a report chosen among candidates."""
    best, sampled = ranked[0], next((one.report for one in ranked if one.sampled), None)
    found: dict[str, Any] = {} if best.retrieved is None else {"retrieved": best.retrieved}
    return found if sampled in (None, best.report) else {**found, "sampled": sampled}


def derangement(count: int, seed: int) -> np.ndarray:
    """A random permutation (count,) that moves every element.

    Raises:
        ValueError: fewer than two elements.
    """
    if count < 2:
        raise ValueError(f"images of {count} study cannot be shuffled: expected at least 2 studies")
    # Sattolo's algorithm: one cycle through all.
    order, rng = np.arange(count), np.random.default_rng(seed)
    for position in range(count - 1, 0, -1):
        other = rng.integers(position)
        order[position], order[other] = order[other], order[position]
    return order


__all__ = ["GeneratedReports", "ReportJournal", "derangement", "generate_reports"]
