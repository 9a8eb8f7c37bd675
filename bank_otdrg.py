"""The report bank: training reports, weighted for a study by its images and its indication."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from .files_otdrg import follow_umask, read_json, write_json
from .utility_otdrg import UTILITY, ReportUtility

_ARRAYS, _TEXTS = "bank.safetensors", "bank.json"
#: A view that identifies the encoder of a bank, and the largest relative difference of its features.
_PROBE, _TOLERANCE = np.tile(np.arange(64, dtype=np.uint8) * 4, (64, 1)), 0.05
#: Indications count half as much as images. Words and pairs in fewer indications are ignored.
_INDICATION_WEIGHT, _LEAST_INDICATIONS = 0.5, 3


class IndicationFeatures:
    """TF-IDF features of indications: words, numbers and punctuation marks, and pairs of neighbours.

    Case and punctuation are kept: they show the style of the writer, which the wording of the report follows.

    Args:
        indications: of the training studies, by which terms and their inverse document frequencies are determined.
    """

    def __init__(self, indications: Sequence[str]):
        counts = Counter(term for indication in indications for term in _terms(indication))
        known = sorted(term for term, count in counts.items() if count >= _LEAST_INDICATIONS)
        self._columns = {term: column for column, term in enumerate(known)}
        self._rarity = np.array([math.log((1 + len(indications)) / (1 + counts[term])) + 1 for term in known])

    def __call__(self, indications: Sequence[str]) -> np.ndarray:
        """(N, T) of N indications, each of length 1; 0 for one without a known term."""
        features = np.zeros((len(indications), len(self._columns)))
        for row, indication in enumerate(indications):
            columns = [self._columns[term] for term in _terms(indication) if term in self._columns]
            features[row, columns] = self._rarity[columns]
        return features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)


def _terms(indication: str) -> set[str]:
    words = re.findall(r"[^\W_]+|[^\w\s]", indication)
    return {*words, *map(" ".join, pairwise(words))}


class ReportBank:
    """Training reports with the pooled image features and the indications of their studies.

    The weight of a training study for a study with features x is that of kernel ridge regression with a linear kernel
    on standardised image features and centred [`IndicationFeatures`]: the regression's prediction of any quantity at x
    is the weighted sum of its values in training. Weights add up to 1 and may be negative. A study without an
    indication counts as one with the mean of all.

    A bank holds training reports and indications word for word: it is kept outside the published model, under the
    data's licence.

    Args:
        reports: N reports, one per training study, cleaned as the model writes them.
        features: (N, D) pooled image features ([`pool_views`]).
        ridge: strength of the regularisation.
        licences: of the studies.
        probe: (D,) features of a fixed view, by which [`check`] finds out whether a model has the bank's encoder.
        indications: N indications, None or blank where there is none; by default there are none.

    Attributes:
        reports: R distinct reports.
        counts: (R,) how many training studies have each.

    Raises:
        ValueError: the arrays do not fit together, hold no number, or are empty.
    """

    def __init__(
        self,
        reports: Sequence[str],
        features: np.ndarray,
        ridge: float = 3.0,
        licences: Sequence[str] = (),
        probe: np.ndarray | None = None,
        indications: Sequence[str | None] | None = None,
    ):
        features = np.asarray(features, np.float32)
        if not len(reports) or features.ndim != 2 or len(features) != len(reports):
            raise ValueError(
                f"report bank: {len(reports)} reports, features of shape {features.shape}: expected at least one "
                "report, and one row of features per report"
            )
        if not np.isfinite(features).all():
            raise ValueError("report bank: features hold NaN or infinity, expected numbers")
        if indications is not None and len(indications) != len(reports):
            raise ValueError(f"report bank: {len(indications)} indications of {len(reports)} reports: expected as many")
        if not isinstance(ridge, (int, float)) or not 0 < ridge < math.inf:
            raise ValueError(f"report bank: ridge={ridge!r}, expected a number above 0")
        self.ridge, self.licences, self.probe = ridge, tuple(licences), probe
        self._features, self._study_reports = features, list(reports)
        self._indications = _without_blanks(indications, len(reports))
        self._rows = {report: row for row, report in enumerate(dict.fromkeys(reports))}
        self.reports = list(self._rows)
        self._report = np.array([self._rows[report] for report in reports])
        self.counts = np.bincount(self._report)
        # By the weights of the utility.
        self._utilities: dict[tuple, ReportUtility] = {}
        self._own_utilities: dict[tuple, np.ndarray] = {}

    def __len__(self) -> int:
        return len(self.reports)

    def __contains__(self, report: str) -> bool:
        return report in self._rows

    @cached_property
    def _scaling(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean and scale (D,) of the image features, the latter times the root of D."""
        mean, scale = self._features.mean(axis=0), self._features.std(axis=0) + 1e-3
        return mean, scale * math.sqrt(len(mean))

    @cached_property
    def _indication_features(self) -> tuple[IndicationFeatures, np.ndarray]:
        """The features of indications, and their mean (T,)."""
        given = [text for text in self._indications if text]
        extract = IndicationFeatures(given)
        return extract, extract(given).sum(axis=0) / max(len(given), 1)

    @cached_property
    def _solution(self) -> np.ndarray:
        """The solution (D + T, N) of the regression."""
        inputs = self._inputs(self._features, self._indications)
        return np.linalg.solve(inputs.T @ inputs + self.ridge * np.eye(inputs.shape[1]), inputs.T)

    def _inputs(self, features: np.ndarray, indications: Sequence[str]) -> np.ndarray:
        """The regression's inputs (M, D + T) of M studies."""
        (mean, scale), (extract, usual) = self._scaling, self._indication_features
        given = np.array([[bool(text)] for text in indications])
        texts = _INDICATION_WEIGHT * (extract(indications) - usual) * given
        return np.hstack(((np.asarray(features, np.float64) - mean) / scale, texts))

    def weights(self, features: np.ndarray, indications: Sequence[str | None] | None = None) -> np.ndarray:
        """Weights (M, R) of the distinct reports for M studies with pooled features (M, D), and indications if given.

        Raises:
            ValueError: the features have another size than the bank's.
        """
        if np.ndim(features) != 2 or np.shape(features)[1] != self._features.shape[1]:
            raise ValueError(
                f"image features have shape {np.shape(features)}: expected (studies, {self._features.shape[1]}) as in "
                "the report bank; make the bank with this model (otdrg bank)"
            )
        texts = _without_blanks(indications, len(features))
        by_study = self._inputs(features, texts) @ self._solution
        # The inputs are centred: this is the regression's intercept.
        by_study += (1.0 - by_study.sum(axis=1, keepdims=True)) / by_study.shape[1]
        weights = np.zeros((len(features), len(self)))
        np.add.at(weights.T, self._report, by_study.T)
        return weights

    def utility(self, weights: Mapping[str, float] = UTILITY) -> ReportUtility:
        """The utility against the bank's reports; made once for each `weights`."""
        key = tuple(sorted(weights.items()))
        if key not in self._utilities:
            self._utilities[key] = ReportUtility(self.reports, self.counts, weights)
        return self._utilities[key]

    def own_utilities(self, weights: Mapping[str, float] = UTILITY) -> np.ndarray:
        """The utility (R, R) of each of the bank's reports if another one is the true report; computed once."""
        key = tuple(sorted(weights.items()))
        if key not in self._own_utilities:
            self._own_utilities[key] = self.utility(weights)(self.reports).astype(np.float32)
        return self._own_utilities[key]

    def digest(self) -> str:
        """A digest of all that weights and utilities depend on."""
        content = json.dumps([self.ridge, self._study_reports, self._indications]).encode() + self._features.tobytes()
        return hashlib.blake2b(content, digest_size=16).hexdigest()

    def check(self, model, processor) -> None:
        """Check that the bank's features are those of a model's encoder; a bank without `probe` passes.

        Raises:
            ValueError: they are not.
        """
        found = probe_features(model, processor)
        if self.probe is None or (
            found.shape == self.probe.shape
            and np.linalg.norm(found - self.probe) <= _TOLERANCE * np.linalg.norm(self.probe)
        ):
            return
        raise ValueError(
            "the report bank was made with another image encoder: expected the features of this model, make the bank "
            "with it (otdrg bank)"
        )

    def save(self, folder: str | os.PathLike) -> None:
        """Write the bank to a folder, which is made if it is missing; there is no bank in it until all is written."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        arrays = {"features": self._features}
        if self.probe is not None:
            arrays["probe"] = np.asarray(self.probe, np.float32)
        # Texts of another bank would be read with these features.
        (folder / _TEXTS).unlink(missing_ok=True)
        save_file(arrays, folder / _ARRAYS)
        follow_umask(folder / _ARRAYS)
        write_json(
            folder / _TEXTS,
            {
                "ridge": self.ridge,
                "licences": list(self.licences),
                "reports": self._study_reports,
                "indications": self._indications,
            },
        )

    @classmethod
    def load(cls, folder: str | os.PathLike) -> ReportBank:
        """Read a bank that [`save`] wrote.

        Raises:
            ValueError: the folder holds no bank, or a damaged one.
        """
        folder = Path(folder)
        for name in (_ARRAYS, _TEXTS):
            if not (folder / name).is_file():
                raise ValueError(f"{folder} has no {name}: expected the folder of a report bank (otdrg bank)")
        try:
            arrays, texts = load_file(folder / _ARRAYS), read_json(folder / _TEXTS)
            reports, indications = texts["reports"], texts.get("indications")
            if not all(isinstance(text, str) for text in (*reports, *(indications or ()))):
                raise TypeError("reports or indications are not text")
            return cls(reports, arrays["features"], texts["ridge"], texts["licences"], arrays.get("probe"), indications)
        except (SafetensorError, KeyError, TypeError, OSError) as error:
            raise ValueError(f"{folder} is not a report bank, or is damaged: {error}") from None


def pool_views(view_features: torch.Tensor, view_mask: torch.Tensor) -> torch.Tensor:
    """Mean (B, D) of view features (B, V, N, D) over image tokens and existing views; features are 0 elsewhere."""
    return view_features.float().mean(dim=2).sum(dim=1) / view_mask.sum(dim=1, keepdim=True)


@torch.no_grad()
def probe_features(model, processor) -> np.ndarray:
    """Pooled features (D,) of a fixed view, which identify a model's encoder."""
    inputs = processor.encode_images([_PROBE])
    pixels, mask = inputs["pixel_values"].to(model.device), inputs["view_mask"].to(model.device)
    return pool_views(model.encode_views(pixels, mask), mask)[0].cpu().numpy()


def _without_blanks(indications: Sequence[str | None] | None, studies: int) -> list[str]:
    """The studies' indications, "" where there is none or a blank one."""
    return [text if text and text.strip() else "" for text in indications or [None] * studies]


__all__ = ["IndicationFeatures", "ReportBank", "pool_views", "probe_features"]
