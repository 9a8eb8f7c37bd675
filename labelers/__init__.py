"""Labelers: the states of the 14 findings, read from reports (DLE; paper, section 3.2.1). Imported when first used.

A labeler is an object with `.name` (str) and `.label(reports: list[str])`, batch in, batch out: an (N, 14) int64 array
of state ids (`FINDING_STATES`), columns in the order of `FINDINGS`. A new one is a module here and a line in
`_LABELERS`. States that someone else's tool wrote to a CSV are joined by study id instead: `join_states`.
"""

from importlib import import_module

from ..lazy import lazy_names

#: name: (module, class)
_LABELERS = {
    "rules": ("rules", "RulesLabeler"),
}
_HOMES = {"join_states": "csv_states", "read_states": "csv_states", "load_vocabulary": "rules"}

__all__ = ["LABELERS", "load_labeler", *_HOMES]

#: Names that `load_labeler` knows.
LABELERS = tuple(_LABELERS)


def load_labeler(name: str, **options):
    """The labeler of that name, made with its options (see the class in the labeler's module).

    Raises:
        ValueError: no labeler has that name, or an option is not one of its own.
    """
    if name not in _LABELERS:
        hint = " (states in a CSV are joined by study id: join_states)" if name == "csv" else ""
        raise ValueError(f"unknown labeler {name!r}: expected one of {', '.join(LABELERS)}{hint}")
    module, cls = _LABELERS[name]
    return getattr(import_module(f".{module}", __name__), cls)(**options)


__getattr__, __dir__ = lazy_names(__name__, _HOMES)
