"""`otdrg evaluate`: a published model on a dataset, with reports that are saved as they are generated."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset

from ..inference.features import cache_features
from ..inference.loading import asked_decoder, decoding, described_consensus, load_published, model_settings
from ..inference.vllm import asked_engine
from ..metrics.protocols import check_one_section, truncate_to_tokens
from ..runtime.journal import WorkSettings
from ..runtime.shared_work import by_main_process
from ..sections_otdrg import has_sections
from ..studies.cleaning import clean_report, clean_sections
from ..studies.fingerprint import fingerprint
from ..studies.streaming import StreamedStudies
from .evaluate import CONTROLS, evaluate_model
from .faithfulness import measure_faithfulness
from .report import write_evaluation

#: The folder of the reports in that of an evaluation.
REPORTS = "reports"


@dataclass(frozen=True)
class EvaluationOptions:
    """How reports are generated and scored.

    Args:
        num_beams, max_new_tokens, guidance_scale: decoding; None for the model's.
        candidates, bank, retrieved, agreement_weight: consensus decoding, as of [`consensus_decoder`].
        batch_size: studies in a batch.
        indication: whether prompts have the studies' indications; None: whether the label predictor reads them.
        metrics: as of [`evaluate_model`].
        labeler, labeler_options: reads the states of reports.
        floor: of faithfulness, see [`measure_faithfulness`].
        bootstrap: number of resamples.
        seed: of shuffling, flips and resamples.
        device, dtype, quantization: as of [`load_published`].
        engine, engine_url: as of [`asked_engine`].
    """

    num_beams: int | None
    max_new_tokens: int | None
    guidance_scale: float | None
    candidates: int | None
    bank: str | Path | None
    retrieved: int | None
    agreement_weight: float | None
    batch_size: int
    indication: bool | None
    metrics: list[str] | None
    labeler: str
    labeler_options: Mapping[str, Any]
    floor: int
    bootstrap: int
    seed: int
    device: str | None = None
    dtype: str | None = None
    quantization: str | None = None
    engine: str | None = None
    engine_url: str | None = None


def evaluate_published(
    model_name: str,
    rows: Dataset,
    training: Dataset | StreamedStudies,
    output: Path,
    facts: Mapping[str, Any],
    cache: Path,
    options: EvaluationOptions,
    clean_generated: bool = False,
    tokenizer: str | None = None,
    reference_tokens: int | None = None,
    overwrite: bool = False,
) -> str:
    """Generate the reports that `output` does not hold yet, score them, and write tables and figures.

    Every process of a distributed run must call this function; all but the main one end before the scores.

    Args:
        model_name: folder of a run or a model, or a Hub id.
        rows: the studies, cleaned.
        training: the studies that baselines come from, cleaned likewise.
        output: folder that is written to.
        facts: what the JSON says of the studies, `split`, `cleaning`, `warnings` and `counts` among it.
        cache: folder of the views' features.
        options: how reports are generated and scored.
        clean_generated: clean generated reports too, for a model trained on reports that were cleaned otherwise.
        tokenizer, reference_tokens: protocol `r2gengpt`, in which true reports are cut to so many tokens.
        overwrite: generate all reports again.

    Returns:
        The content of evaluation.md.

    Raises:
        ValueError: `output` holds reports of other settings, or no study can be read.
    """
    texts = list(rows["report"])
    sectioned = has_sections(texts)
    if reference_tokens is not None:
        check_one_section(sectioned)
        texts = truncate_to_tokens(texts, tokenizer, reference_tokens)
    references = dict(zip(rows["id"], texts, strict=True))
    model, processor = load_published(model_name, options.device, options.dtype, options.quantization)
    batch_size = min(options.batch_size, len(rows))
    decoder = asked_decoder(model, processor, vars(options))
    asked = options.num_beams, options.max_new_tokens, batch_size, options.guidance_scale
    engine = asked_engine(model, processor, vars(options))
    decoded_by = decoding(model, *asked, decoder if engine is None else None)
    if engine is not None:
        decoded_by, decoder = engine.decoding(decoded_by, decoder), engine.decoder(decoder)
    indication = options.indication
    if indication is None:
        indication = model.config.indication_reader != "report"

    def begin() -> dict[str, Any]:
        settings = {
            **model_settings(model, processor),
            "studies": fingerprint({facts["split"]: rows}),
            **decoded_by,
            **described_consensus(decoder),
            **({} if engine is None else {"engine": engine.name}),
            "indication": indication,
            "seed": options.seed,
        }
        _open_folder(output, settings, overwrite)
        return settings

    settings = by_main_process(begin)
    left_out: dict[str, str] = {}
    features = [cache_features(model, processor, studies, cache, batch_size, left_out) for studies in (rows, training)]
    rows, training = features
    if not len(rows):
        raise ValueError(f"no study is left: {next(iter(left_out.values()))}")
    for reason in left_out.values():
        print(f"left out: {reason}", file=sys.stderr)
    clean = clean_sections if sectioned or model.config.report_sections else clean_report
    with engine or nullcontext():
        evaluation = evaluate_model(
            model,
            processor,
            rows,
            training,
            batch_size=batch_size,
            generation=decoded_by,
            controls=(*CONTROLS, "flipped"),
            labeler=options.labeler,
            metrics=options.metrics,
            seed=options.seed,
            indication=indication,
            labeler_options=options.labeler_options,
            references=[references[study] for study in rows["id"]],
            clean=(lambda text: " ".join(clean(text, facts["cleaning"]).split())) if clean_generated else None,
            journals=output / REPORTS,
            consensus=decoder,
            collections=facts["data"][facts["split"]]["collections"],
            scored_alone=True,
            engine=engine,
        )
    described = {
        "model": model_name,
        **facts,
        "warnings": [*facts["warnings"], *(f"left out: {reason}" for reason in left_out.values())],
        "generated_reports_cleaned": clean_generated,
        **_described_scoring(options, tokenizer, reference_tokens),
        "generation": settings,
    }
    faithfulness = measure_faithfulness(evaluation, training["finding_states"], options.floor)
    return write_evaluation(output, described, evaluation, faithfulness)


def _described_scoring(
    options: EvaluationOptions, tokenizer: str | None, reference_tokens: int | None
) -> dict[str, Any]:
    """How reports are scored, for evaluation.json."""
    return {
        "protocol": "full" if reference_tokens is None else "r2gengpt",
        "tokenizer": tokenizer,
        "reference_tokens": reference_tokens,
        "labeler_options": dict(options.labeler_options),
        "bootstrap": {"resamples": options.bootstrap, "confidence": 0.95, "seed": options.seed},
    }


def _open_folder(output: Path, settings: dict[str, Any], overwrite: bool) -> None:
    """Make the folder, or check that the reports in it have the same settings."""
    path = output / "settings.json"
    if overwrite:
        shutil.rmtree(output / REPORTS, ignore_errors=True)
        path.unlink(missing_ok=True)
    WorkSettings(output, settings, ("model", "studies")).keep(path)


__all__ = ["REPORTS", "EvaluationOptions", "evaluate_published"]
