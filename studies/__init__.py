"""Studies: every source of radiographs and reports, in one schema.

A source is a module of this package with a function `load(**options) -> datasets.DatasetDict`, and one line in the
registry below; it is imported when it is first asked for.
"""

from __future__ import annotations

import inspect
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import DatasetDict

_SOURCES = {
    "phantom": "phantom",
    "r2gen": "r2gen",
}


def load_studies(source: str, **options: Any) -> DatasetDict:
    """The studies of a source, as splits train, validation and test (empty ones left out).

    Args:
        source: a registered source, "phantom" or "r2gen".
        options: those of the source's `load` function.

    Returns:
        A `DatasetDict` whose rows follow `otdrg.studies.schema.STUDY_FEATURES`.

    Raises:
        ValueError: an unknown source, an unknown or missing option, or a fault in what the options name.
    """
    if source not in _SOURCES:
        raise ValueError(f"unknown source of studies {source!r}: expected one of {', '.join(sorted(_SOURCES))}")
    load = import_module(f".{_SOURCES[source]}", __name__).load
    allowed = inspect.signature(load).parameters
    for name in options:
        if name not in allowed:
            raise ValueError(f"unknown option {name!r} of source {source!r}: expected one of {', '.join(allowed)}")
    missing = [name for name, option in allowed.items() if option.default is option.empty and name not in options]
    if missing:
        raise ValueError(f"source {source!r} needs the option {missing[0]!r} (its options: {', '.join(allowed)})")
    return load(**options)


__all__ = ["load_studies"]
