"""`otdrg embed`: image features before and after alignment (paper, Figure 1b), and how far findings are apart."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from sklearn.manifold import TSNE
from sklearn.metrics import silhouette_samples
from sklearn.metrics.pairwise import cosine_distances
from threadpoolctl import threadpool_limits

from ..files_otdrg import write_json
from ..findings_otdrg import FINDINGS, POSITIVE
from ..inference.features import encode_batches
from ..metrics.significance import resample_weights
from ..metrics.tables import markdown_table, shown_bounds
from ..modeling_otdrg import OTDRGForReportGeneration
from ..processing_otdrg import OTDRGProcessor
from ..runtime.csv_files import write_csv
from ..runtime.shared_work import fixed_blocks, share_work
from .embedding_figure import draw_embedding

#: Findings of fewer studies are left out.
MINIMUM_STUDIES = 5
_SPACES = ("before", "after")


@dataclass
class SingleFindings:
    """Studies with one finding each: `positions`, `findings`, and by reason how many others were left out."""

    positions: list[int]
    findings: list[str]
    left_out: dict[str, int]


@dataclass
class AlignedFeatures:
    """Features of S studies, the means over each study's image tokens.

    Args:
        before: (S, D) output of the vision encoder, X of eq. 1.
        after: (S, hidden_size) projected into the LLM's embedding space, f_p(X) of eq. 4.
        labels: for each finding the feature (hidden_size,) of its state positive in that space, f_p(Y) of eq. 5; empty
            if the model has no FIOT.
    """

    before: np.ndarray
    after: np.ndarray
    labels: dict[str, np.ndarray]


def single_findings(states: Sequence[Sequence[int] | None], limit: int) -> SingleFindings:
    """The first studies with exactly one positive among the 14 findings, including No Finding.

    Args:
        states: (14,) state ids of each study, None where they are not known.
        limit: most studies.

    Raises:
        ValueError: fewer than two findings have `MINIMUM_STUDIES` such studies.
    """
    positive = [None if row is None else np.flatnonzero(np.asarray(row) == POSITIVE) for row in states]
    single = [place for place, row in enumerate(positive) if row is not None and len(row) == 1]
    names = {place: FINDINGS[int(positive[place][0])] for place in single[:limit]}
    counts = Counter(names.values())
    kept = [place for place, name in names.items() if counts[name] >= MINIMUM_STUDIES]
    groups = {names[place] for place in kept}
    if len(groups) < 2:
        raise ValueError(
            f"{len(groups)} findings are the only positive one in at least {MINIMUM_STUDIES} of {len(states)} studies: "
            "expected at least 2"
        )
    return SingleFindings(
        positions=kept,
        findings=[names[place] for place in kept],
        left_out={
            "states not known": sum(row is None for row in positive),
            "none or several positive": sum(row is not None and len(row) != 1 for row in positive),
            "beyond the limit": len(single) - len(names),
            f"findings of fewer than {MINIMUM_STUDIES} studies": len(names) - len(kept),
        },
    )


@torch.no_grad()
def aligned_features(
    model: OTDRGForReportGeneration,
    processor: OTDRGProcessor,
    studies: Dataset,
    batch_size: int,
    journal: Path | None = None,
) -> AlignedFeatures:
    """Features of studies, in their order, before and after the projection.

    Every process of a distributed run must call this function; each encodes a share, and all get the whole.

    Args:
        model, processor: as published.
        studies: rows with `images`.
        batch_size: studies a batch.
        journal: `.jsonl` file of features that are finished, of the same model and studies.
    """
    ids, images = list(studies["id"]), studies.select_columns(["id", "images"])

    def encode(blocks: Sequence[Sequence[int]]) -> Iterator[list[dict[str, Any]]]:
        for block in blocks:
            batches = encode_batches(model, processor, images.select(block), len(block), reader="report")
            ((_, view_features, view_mask),) = batches
            before = _pooled(*model.fuse_views(view_features, view_mask)).tolist()
            after = _pooled(*model.project_views(view_features, view_mask)).tolist()
            named = (ids[place] for place in block)
            yield [{"id": id, "before": b, "after": a} for id, b, a in zip(named, before, after, strict=True)]

    rows = share_work(ids, fixed_blocks(len(ids), batch_size), encode, journal, progress="features")
    before, after = (np.array([rows[id][space] for id in ids], dtype=np.float32) for space in _SPACES)
    labels = {}
    if model.config.fiot:
        positive = torch.full((1, len(FINDINGS)), POSITIVE, device=model.device)
        labels = dict(zip(FINDINGS, model.get_label_features(positive)[0].float().cpu().numpy(), strict=True))
    return AlignedFeatures(before, after, labels)


def _pooled(tokens: torch.Tensor, mask: torch.Tensor) -> np.ndarray:
    weights = mask[:, :, None] / mask.sum(dim=1)[:, None, None]
    return (tokens.float() * weights).sum(dim=1).cpu().numpy()


def separation(
    before: np.ndarray,
    after: np.ndarray,
    findings: Sequence[str],
    resamples: int = 1000,
    permutations: int = 200,
    seed: int = 0,
) -> dict[str, Any]:
    """How far findings are apart in both spaces: silhouettes by cosine distance (Rousseeuw, 1987).

    Args:
        before, after: (S, D) and (S, E) features of the same studies.
        findings: S names.
        resamples: of the bootstrap over studies for the intervals. It draws the studies' silhouettes, which are not
            recomputed, because a study drawn twice would be its own nearest neighbour.
        permutations: of the findings over the studies, for the chance level.
        seed: of both.

    Returns:
        For `before` and `after` the `silhouette`, from -1 to 1 and 0 where findings overlap, its 95 % interval (`low`,
        `high`), under `chance` the mean and the 2.5 % and 97.5 % quantiles over permutations, under `findings` the
        means of each finding's studies, and under `studies` each study's; `difference`, after minus before, with its
        interval.
    """
    groups = np.asarray(findings)
    rng = np.random.default_rng(seed)
    shuffled = [rng.permutation(groups) for _ in range(permutations)]
    drawn = np.concatenate(list(resample_weights(len(groups), resamples, seed))) / len(groups)
    result: dict[str, Any] = {}
    for name, features in (("before", before), ("after", after)):
        distances = cosine_distances(features.astype(np.float64))
        values = silhouette_samples(distances, groups, metric="precomputed")
        chance = [silhouette_samples(distances, others, metric="precomputed").mean() for others in shuffled]
        result[name] = {
            "silhouette": float(values.mean()),
            **_interval(drawn @ values),
            "chance": {"silhouette": float(np.mean(chance)), **_interval(chance)},
            "findings": {name: float(values[groups == name].mean()) for name in FINDINGS if name in findings},
            "studies": values.tolist(),
        }
    difference = np.subtract(result["after"]["studies"], result["before"]["studies"])
    result["difference"] = {"silhouette": float(difference.mean()), **_interval(drawn @ difference)}
    return result


def _interval(values: Sequence[float]) -> dict[str, float]:
    low, high = np.quantile(values, [0.025, 0.975])
    return {"low": float(low), "high": float(high)}


def embed(features: np.ndarray, seed: int) -> np.ndarray:
    """(S, D) features in the plane, (S, 2), by t-SNE on cosine distances; the same for the same seed."""
    perplexity = min(30.0, (len(features) - 1) / 3)
    # On one thread, because sums over several have no fixed order, and a thousand small steps are slower on them.
    with threadpool_limits(1):
        return TSNE(metric="cosine", init="pca", perplexity=perplexity, random_state=seed).fit_transform(features)


def write_embedding(
    paths: Mapping[str, Path],
    settings: Mapping[str, Any],
    chosen: SingleFindings,
    ids: Sequence[str],
    features: AlignedFeatures,
) -> str:
    """Write the picture (`.png`), the figures (`.json`), and one row per study (`.csv`).

    Args:
        paths: by suffix.
        settings: how it was made, for the JSON; `seed` and `resamples` among it.
        chosen: the studies, S of them.
        ids: their ids.
        features: of [`aligned_features`].

    Returns:
        The figures as Markdown.
    """
    seed, findings = settings["seed"], chosen.findings
    scores = separation(features.before, features.after, findings, settings["resamples"], seed=seed)
    labels = {name: feature for name, feature in features.labels.items() if name in findings}
    after = embed(np.concatenate([features.after, *(feature[None] for feature in labels.values())]), seed)
    stars = dict(zip(labels, after[len(ids) :], strict=True))
    places = {"before": embed(features.before, seed), "after": after[: len(ids)]}
    draw_embedding(places["before"], places["after"], stars, findings, scores, paths[".png"])
    numbers = np.column_stack([values for space in _SPACES for values in (places[space], scores[space].pop("studies"))])
    rows = (
        [study, finding, *(f"{number:.6f}" for number in row)]
        for study, finding, row in zip(ids, findings, numbers, strict=True)
    )
    header = ["id", "finding", *(f"{space} {column}" for space in _SPACES for column in ("x", "y", "silhouette"))]
    write_csv(paths[".csv"], header, rows)
    result = {
        **settings,
        "studies": len(ids),
        "by_finding": {name: findings.count(name) for name in FINDINGS if name in findings},
        "left_out": chosen.left_out,
        "distance": "cosine",
        **scores,
    }
    write_json(paths[".json"], result)
    return _format_embedding(result)


def _format_embedding(result: Mapping[str, Any]) -> str:
    left_out = ", ".join(f"{count} {reason}" for reason, count in result["left_out"].items() if count)
    facts = (
        f"{result['studies']} studies of {result['split']} with exactly one positive finding, "
        f"{len(result['by_finding'])} findings" + (f"; left out: {left_out}" if left_out else "")
    )
    rows = []
    for space in _SPACES:
        found = result[space]
        intervals = shown_bounds(found), shown_bounds(found["chance"])
        rows.append([f"{space} alignment", f"{found['silhouette']:.3f}", *intervals])
    difference = result["difference"]
    rows.append(["difference", f"{difference['silhouette']:+.3f}", shown_bounds(difference), ""])
    table = markdown_table(["image features", "silhouette, cosine", "95 % interval", "findings permuted"], rows)
    verdict = "The difference of the silhouettes may be chance."
    if difference["low"] > 0 or difference["high"] < 0:
        verdict = f"Findings are {'farther apart' if difference['low'] > 0 else 'closer together'} after alignment."
    return f"{facts}\n\n{table}\n\n{verdict}"


__all__ = [
    "MINIMUM_STUDIES",
    "AlignedFeatures",
    "SingleFindings",
    "aligned_features",
    "embed",
    "separation",
    "single_findings",
    "write_embedding",
]
