"""Find the columns of a dataset that hold the fields of a study, and rename them to these fields."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from datasets import ClassLabel, Dataset, Features, Image, LargeList, List, Value

from ..findings_otdrg import FINDING_STATES, FINDINGS, finding_state_id
from .columns import match_columns
from .source import TEXTS, VIEWS, SkipStudy
from .views import view_named

#: Fields of a study and the names of their columns, the preferred one first.
_FIELDS: dict[str, tuple[str, ...]] = {
    "id": ("id",),
    "patient_id": ("patient_id",),
    "images": ("images", "image"),
    "views": ("views", "view"),
    "findings": ("findings", "report", "text"),
    **{text: (text,) for text in TEXTS[1:]},
    "finding_states": ("finding_states",),
    "licence": ("licence", "license"),
    **{name: (name,) for name in ("prior_images", "prior_report", "prior_days", "prior_patient_id")},
}


#: Fields that are text, not numbers.
_TEXT_FIELDS = (*TEXTS, "licence", "prior_report")


@dataclass
class HubSplit:
    """A split of a dataset with the columns of a study.

    Args:
        rows: columns named as the fields of a study, in Arrow format, so that nothing is decoded.
        names: `{field: its column in the original dataset}`.
        image_paths: whether the column of images holds paths.
        view_names: class names of the column of views; None if it holds text.
        state_ids: state id of each value in the column of states.
    """

    rows: Dataset
    names: dict[str, str]
    image_paths: bool = False
    view_names: Sequence[str] | None = None
    state_ids: Sequence[int] = ()

    def views(self, stored: Any, images: int, place: str) -> list[str]:
        """The view of each image; "unknown" if the row has none, or one that is neither frontal nor lateral.

        Raises:
            SkipStudy: the number of views differs from the number of images.
        """
        if stored is None:
            return ["unknown"] * images
        stored = stored if isinstance(stored, list) else [stored]
        if len(stored) != images:
            reason = f"{len(stored)} views, expected {images}, one for each image"
            raise SkipStudy("malformed", f"{place}, column {self.names['views']!r}: {reason}")
        return [self._view(view) for view in stored]

    def _view(self, stored: str | int | None) -> str:
        if isinstance(stored, int):
            known = self.view_names is not None and 0 <= stored < len(self.view_names)
            stored = self.view_names[stored] if known else None
        return view_named(stored or "")

    def states(self, stored: list[int] | None, place: str) -> list[int] | None:
        """State ids of the 14 findings.

        Raises:
            SkipStudy: not 14 values, or a value that is not a state.
        """
        if stored is None:
            return None
        place = f"{place}, column {self.names['finding_states']!r}"
        if len(stored) != len(FINDINGS):
            raise SkipStudy("malformed", f"{place}: {len(stored)} states, expected {len(FINDINGS)}")
        for state in stored:
            if state is None or not 0 <= state < len(self.state_ids):
                raise SkipStudy("malformed", f"{place}: state {state}, expected 0 to {len(self.state_ids) - 1}")
        return [self.state_ids[state] for state in stored]


def study_columns(dataset: Dataset, pairs: Sequence[str], place: str) -> HubSplit:
    """Select and rename the columns of a dataset that hold the fields of a study; `place` names it in errors.

    Raises:
        ValueError: as [`match_columns`], or a column has the wrong type.
    """
    features = dataset.features
    names = match_columns(list(features), _FIELDS, pairs, place, image="images")
    types = _check_types(features, names, place)
    columns = list(names.values())
    if repeated := next((column for column in columns if columns.count(column) > 1), None):
        raise ValueError(f"option 'column' names the column {repeated!r} for two fields: expected one of them")
    renamed = {column: field for field, column in names.items() if column != field}
    rows = dataset.select_columns(columns).rename_columns(renamed).with_format("arrow")
    return HubSplit(rows, names, **types)


def _check_types(features: Features, names: dict[str, str], place: str) -> dict[str, Any]:
    """Check the types of the columns, and return the arguments of `HubSplit` that depend on them."""
    types: dict[str, Any] = {}
    for field, column in names.items():
        feature = features[column]
        nested = isinstance(feature, (List, LargeList))
        item = feature.feature if nested else feature
        expected = None
        if field in ("images", "prior_images"):
            if field == "images":
                types["image_paths"] = _is(item, "string")
            if not (isinstance(item, Image) or _is(item, "string") or _is(item, "binary")):
                expected = "images, paths, or lists of them"
        elif field == "views":
            types["view_names"] = item.names if isinstance(item, ClassLabel) else None
            if not (isinstance(item, ClassLabel) or _is(item, "string")):
                expected = f"names of views ({', '.join(VIEWS)})"
        elif field == "finding_states":
            types["state_ids"] = _state_ids(item) if nested else []
            if not types["state_ids"]:
                expected = "lists of 14 states, or --column finding_states= to leave them out"
        elif field == "prior_days":
            if nested or not (_is(item, "int") or _is(item, "float")):
                expected = "whole numbers of days"
        elif field == "prior_patient_id" and _is(item, "float") and not nested:
            pass  # whole numbers, of which some are missing
        elif nested or not (_is(item, "string") or (field not in _TEXT_FIELDS and _is(item, "int"))):
            expected = "text"
        if expected is not None:
            raise ValueError(f"{place}, column {column!r} for {field} holds {feature}: expected {expected}")
    return types


def _is(feature: Any, kind: str) -> bool:
    return isinstance(feature, Value) and kind in feature.dtype


def _state_ids(item: Any) -> list[int]:
    """The state id of each value; [] if the values are not states."""
    if not isinstance(item, ClassLabel):
        return list(range(len(FINDING_STATES))) if _is(item, "int") else []
    try:
        return [finding_state_id(name) for name in item.names]
    except ValueError:
        return []
