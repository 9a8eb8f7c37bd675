"""Labelers: the states of the 14 findings, read from reports (DLE; paper, section 3.2.1). Imported when first used.

A labeler is an object with `.name` (str) and `.label(reports: list[str])`, batch in, batch out: an (N, 14) int64 array
of state ids (`FINDING_STATES`), columns in the order of `FINDINGS`. A new one is a module here and a line in
`_LABELERS`. States that someone else's tool wrote to a CSV are joined by study id instead: `join_states`.
"""

import inspect
from importlib import import_module

from ..runtime.lazy import lazy_names

#: name: (module, class)
_LABELERS = {
    "rules": ("rules", "RulesLabeler"),
    "llm": ("llm", "LLMLabeler"),
    "chexbert": ("chexbert", "CheXbertLabeler"),
}
_HOMES = {
    "format_agreement": "agreement",
    "measure_agreement": "agreement",
    "join_states": "csv_states",
    "read_states": "csv_states",
    "write_states": "csv_states",
    "load_vocabulary": "phrases",
}

__all__ = ["LABELERS", "UnreadReportsWarning", "labeler_class", "load_labeler", *_HOMES]


class UnreadReportsWarning(UserWarning):
    """Reports of which a labeler can read nothing have every finding unmentioned; this says how many, and which."""


#: Names that `load_labeler` knows.
LABELERS = tuple(_LABELERS)


def labeler_class(name: str, **options):
    """The class of the labeler of that name, once its options are checked without making it.

    Raises:
        ValueError: no labeler has that name, an option is not one of its own, or one that is true or false is neither.
    """
    if name not in _LABELERS:
        hint = " (states in a CSV are joined by study id: join_states)" if name == "csv" else ""
        raise ValueError(f"unknown labeler {name!r}: expected one of {', '.join(LABELERS)}{hint}")
    module, cls = _LABELERS[name]
    labeler = getattr(import_module(f".{module}", __name__), cls)
    allowed = inspect.signature(labeler).parameters
    for option in options:
        if option not in allowed:
            raise ValueError(f"unknown option {option!r} of labeler {name!r}: expected one of {', '.join(allowed)}")
        # "maybe" would count as true.
        if isinstance(allowed[option].default, bool) and not isinstance(options[option], bool):
            raise ValueError(f"option {option!r} of labeler {name!r} is {options[option]!r}: expected true or false")
    missing = [option for option, it in allowed.items() if it.default is it.empty and option not in options]
    if missing:
        raise ValueError(f"labeler {name!r} needs the option {missing[0]!r} (its options: {', '.join(allowed)})")
    return labeler


def load_labeler(name: str, **options):
    """The labeler of that name, made with its options (see the class in the labeler's module).

    Raises:
        ValueError: as of [`labeler_class`], or a value is not one that the labeler takes.
    """
    return labeler_class(name, **options)(**options)


__getattr__, __dir__ = lazy_names(__name__, _HOMES)
