"""Which column of a dataset holds which field of a study, and what its values mean."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .source import VIEWS, SkipStudy
from .views import view_named

if TYPE_CHECKING:
    from datasets import Features

#: Fields of a study and the names by which their columns are found, the first that is there.
_FIELDS: dict[str, tuple[str, ...]] = {
    "id": ("id",),
    "patient_id": ("patient_id",),
    "images": ("images", "image"),
    "views": ("views", "view"),
    "findings": ("findings", "report", "text"),
    "impression": ("impression",),
    "indication": ("indication",),
    "comparison": ("comparison",),
    "finding_states": ("finding_states",),
    "licence": ("licence", "license"),
}
_TEXTS = ("findings", "impression", "indication", "comparison", "licence")


@dataclass
class HubColumns:
    """The columns in use.

    Args:
        names: `{field: column}`.
        image_paths: the images' column holds paths, not images.
        view_names: classes of the views' column, None where it holds text.
        state_ids: state id of each value of the states' column.
    """

    names: dict[str, str]
    image_paths: bool = False
    view_names: Sequence[str] | None = None
    state_ids: Sequence[int] = ()

    def views(self, stored: Any, images: int, place: str) -> list[str]:
        """A view for each image: "unknown" where the row has none, or one that is neither frontal nor lateral.

        Raises:
            SkipStudy: not as many as images.
        """
        if stored is None:
            return ["unknown"] * images
        stored = stored if isinstance(stored, list) else [stored]
        if len(stored) != images:
            column = self.names["views"]
            raise SkipStudy(
                "malformed", f"{place}, column {column!r}: {len(stored)} views, expected {images}, one an image"
            )
        return [self._view(view) for view in stored]

    def _view(self, stored: str | int | None) -> str:
        if isinstance(stored, int):
            known = self.view_names is not None and 0 <= stored < len(self.view_names)
            stored = self.view_names[stored] if known else None
        return view_named(stored or "")

    def states(self, stored: list[int] | None, place: str) -> list[int] | None:
        """State ids of the 14 findings.

        Raises:
            SkipStudy: not 14, or a value that is no state.
        """
        from ..findings_otdrg import FINDINGS

        if stored is None:
            return None
        place = f"{place}, column {self.names['finding_states']!r}"
        if len(stored) != len(FINDINGS):
            raise SkipStudy("malformed", f"{place}: {len(stored)} states, expected {len(FINDINGS)}")
        for state in stored:
            if state is None or not 0 <= state < len(self.state_ids):
                raise SkipStudy("malformed", f"{place}: state {state}, expected 0 to {len(self.state_ids) - 1}")
        return [self.state_ids[state] for state in stored]


def parse_pairs(name: str, pairs: Sequence[str]) -> list[tuple[str, str]]:
    """Values "a=b" of an option as pairs.

    Raises:
        ValueError: a value of another form, or the same column or split twice.
    """
    parsed = []
    for pair in pairs:
        left, sign, right = pair.partition("=")
        if not sign or not left.strip():
            wanted = "FIELD=COLUMN" if name == "column" else "SPLIT=NAME"
            raise ValueError(f"option {name!r} has {pair!r}: expected {wanted}")
        parsed.append((left.strip(), right.strip()))
    sides = [left for left, _ in parsed] if name == "column" else [right for _, right in parsed]
    for side in sides:
        if sides.count(side) > 1:
            raise ValueError(f"option {name!r} names {side!r} twice: expected once")
    return parsed


def find_columns(features: Features, pairs: Sequence[tuple[str, str]], place: str) -> HubColumns:
    """The columns of a dataset.

    Args:
        features: of the dataset.
        pairs: (field, column) as the user gave them; an empty column leaves the field out. "report" is the findings.
        place: the dataset, for errors.

    Raises:
        ValueError: an unknown field, a column that is missing or of a kind that cannot be the field, no images, no
            report.
    """
    listed = f"columns: {', '.join(features)}"
    given: dict[str, str] = {}
    for field, column in pairs:
        target = "findings" if field == "report" else field
        if target not in _FIELDS:
            raise ValueError(f"option 'column' names a field {field!r}: expected one of {', '.join(_FIELDS)}, report")
        if target in given:
            raise ValueError("option 'column' names both report and findings, which are one: expected one of them")
        if column and column not in features:
            raise ValueError(f"{place} has no column {column!r}, which option 'column' names for {field}; {listed}")
        given[target] = column
    names = {}
    for field, defaults in _FIELDS.items():
        free = (name for name in defaults if name in features and name not in given.values())
        column = given[field] if field in given else next(free, "")
        if column:
            names[field] = column
    if "images" not in names:
        raise ValueError(f"{place} has no column of images, expected --column images=COLUMN; {listed}")
    if "findings" not in names and "impression" not in names:
        raise ValueError(f"{place} has no column of reports, expected --column report=COLUMN; {listed}")
    return _check_kinds(features, names, place)


def _check_kinds(features: Features, names: dict[str, str], place: str) -> HubColumns:
    from datasets import ClassLabel, Image

    columns = HubColumns(names)
    for field, column in names.items():
        item = _item(features[column])
        nested = item is not features[column]

        def wrong(expected: str, column: str = column, field: str = field) -> ValueError:
            kind = str(features[column])
            return ValueError(f"{place}, column {column!r} for {field} holds {kind}: expected {expected}")

        if field == "images":
            columns.image_paths = _is(item, "string")
            if not (isinstance(item, Image) or columns.image_paths or _is(item, "binary")):
                raise wrong("images, paths, or lists of them")
        elif field == "views":
            columns.view_names = item.names if isinstance(item, ClassLabel) else None
            if not (isinstance(item, ClassLabel) or _is(item, "string")):
                raise wrong(f"names of views ({', '.join(VIEWS)})")
        elif field == "finding_states":
            columns.state_ids = _state_ids(item) if nested else ()
            if not columns.state_ids:
                raise wrong("lists of 14 states, or --column finding_states= to leave them out")
        elif nested or not (_is(item, "string") or (field not in _TEXTS and _is(item, "int"))):
            raise wrong("text")
    return columns


def _item(feature: Any) -> Any:
    """What a list holds, or the feature itself."""
    from datasets import LargeList, List

    return feature.feature if isinstance(feature, (List, LargeList)) else feature


def _is(feature: Any, kind: str) -> bool:
    from datasets import Value

    return isinstance(feature, Value) and kind in feature.dtype


def _state_ids(item: Any) -> list[int]:
    """State id of each value; none where the values are no states."""
    from datasets import ClassLabel

    from ..findings_otdrg import FINDING_STATES, finding_state_id

    if not isinstance(item, ClassLabel):
        return list(range(len(FINDING_STATES))) if _is(item, "int") else []
    try:
        return [finding_state_id(name) for name in item.names]
    except ValueError:
        return []


__all__ = ["HubColumns", "find_columns", "parse_pairs"]
