"""Generate the reports of studies in batches, in all processes, and optionally record them as they are finished."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch.utils.data import DataLoader

from ..consensus_otdrg import Candidate, ConsensusDecoder
from ..findings_otdrg import CONDITIONING_STATES, FINDINGS
from ..modeling_otdrg import OTDRGForReportGeneration, OTDRGStudy
from ..processing_otdrg import OTDRGProcessor
from ..runtime.processes import is_sharded, open_methods
from ..runtime.shared_work import fixed_blocks, share_work
from .collation import PromptCollator, prior_names
from .features import CachedStudies
from .vllm import VLLM


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
    journal: Path | None = None,
    consensus: ConsensusDecoder | None = None,
    engine: VLLM | None = None,
) -> GeneratedReports:
    """Generate reports for studies, in their order, from the images and, if requested, the indications only.

    Every process of a distributed run must call this function; each generates a share, and all get all reports.

    Args:
        model, processor: the model's type is left as it is.
        studies: rows with `images`, or those of [`cache_features`], which give the same reports.
        batch_size: studies per batch.
        generation: arguments of `generate`.
        finding_states: (N, 14) states that condition the reports, -1 for those to predict; by default all are.
        indication: whether the prompt contains the studies' `indication`.
        journal: `.jsonl` file of finished reports of these studies and settings, which the caller checks by
            [`WorkSettings`]. They are not generated again; the others are added as they are finished.
        consensus: chooses each report among candidates; without it, `generate` writes one.
        engine: writes the reports in place of the model; it is open.

    Raises:
        ValueError: `finding_states` does not fit the studies, or the journal is damaged.
    """
    if finding_states is not None and np.shape(finding_states) != (len(studies), len(FINDINGS)):
        raise ValueError(
            f"finding_states has shape {np.shape(finding_states)}: expected {(len(studies), len(FINDINGS))}"
        )
    views = "view_features" if "view_features" in studies.column_names else "images"
    names = ["id", views, *(["indication"] if indication else []), *prior_names(processor, studies.column_names)]
    inputs = studies.select_columns(names)
    waits = {"synced_gpus": True} if is_sharded(model) else {}
    ids = list(studies["id"])

    def write(blocks: Sequence[Sequence[int]]) -> Iterator[list[dict[str, Any]]]:
        loader = DataLoader(inputs, batch_sampler=blocks, collate_fn=PromptCollator(processor, indication))
        yield from (map if engine is None else engine.map)(write_batch, zip(blocks, loader, strict=True))

    def write_batch(block: tuple[Sequence[int], dict[str, torch.Tensor]]) -> list[dict[str, Any]]:
        positions, batch = block
        batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
        prompt = {name: batch.pop(name) for name in ("input_ids", "attention_mask")}
        given = None
        if finding_states is not None:
            given = torch.as_tensor(np.asarray(finding_states)[positions], device=model.device)
        with torch.no_grad():
            study = model.read_study(**batch, finding_states=given)
            indications = [studies["indication"][position] for position in positions] if indication else None
            arguments = {**waits, **(generation or {})}
            texts, chosen = _write(model, processor, prompt, study, arguments, consensus, indications)
        reports = [" ".join(text.split()) for text in texts]
        named = [ids[position] for position in positions]
        return list(map(_row, named, reports, study.finding_states.tolist(), chosen))

    open_methods(model, "read_study", "generate")
    model.eval()
    # Commands show their progress; training has its own progress bar.
    rows = share_work(
        ids,
        fixed_blocks(len(ids), batch_size),
        write,
        journal,
        check=_states_of,
        even=is_sharded(model),
        progress=journal and journal.stem,
    )
    written = [rows[study] for study in ids]
    return GeneratedReports(
        reports=[row["report"] for row in written],
        finding_states=np.array(list(map(_states_of, written)), dtype=np.int64).reshape(len(ids), len(FINDINGS)),
        sampled=[row.get("sampled", row["report"]) for row in written] if consensus is not None else None,
    )


def _row(study: str, report: str, states: list[int], chosen: dict[str, Any]) -> dict[str, Any]:
    """A study's line in a journal: its report, the states that conditioned it, and what consensus decoding adds."""
    named = dict(zip(FINDINGS, (CONDITIONING_STATES[state] for state in states), strict=True))
    return {"id": study, "report": report, **chosen, **named}


def _states_of(row: dict[str, Any]) -> list[int]:
    """The ids of the 14 states of a line; a `KeyError` or `ValueError` for a line without a report and its states."""
    row["report"]
    return [CONDITIONING_STATES.index(row[name]) for name in FINDINGS]


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
        **study.encoded_views,
        # A model without DLE predicts finding states but does not use them.
        finding_states=study.finding_states if model.config.dle else None,
        **generation,
    )
    texts = processor.batch_decode(ids[:, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    return texts, [{} for _ in texts]


def _chosen(ranked: list[Candidate]) -> dict[str, Any]:
    """What a journal holds of a report chosen among candidates.

    `retrieved`, whether it stands word for word in the bank, and `sampled`, the best of the samples if it is another.
    """
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


__all__ = ["GeneratedReports", "derangement", "generate_reports"]
