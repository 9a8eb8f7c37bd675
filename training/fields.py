"""Fields of a recipe: strict types, bounds of numbers, and names that were renamed."""

from __future__ import annotations

import difflib
import inspect
import json
import math
import textwrap
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from enum import Enum
from functools import cache
from typing import Any, ClassVar, Literal

#: Largest integer of a field without a bound of its own: steps, studies and tokens are counted in 32 bits.
LARGEST = 2**31 - 1

#: Bounds of a number: some of `least`, `above`, `most` and `below`.
Bounds = Mapping[str, float]
POSITIVE: Bounds = {"above": 0}
NOT_NEGATIVE: Bounds = {"least": 0}
COUNT: Bounds = {"least": 1}


def option(default: Any, help: str):
    """A dataclass field with a default and a help text."""
    if isinstance(default, (list, dict)):
        return field(default_factory=default.copy, metadata={"help": help})
    return field(default=default, metadata={"help": help})


def need(condition: bool, name: str, value: Any, expected: str) -> None:
    """Raise a `ValueError` that names the field and its value unless `condition` holds."""
    if not condition:
        raise ValueError(f"{name}={value!r}: expected {expected}")


@dataclass
class Section:
    """A section of a recipe.

    Attributes:
        place: name of the section in errors.
        bounds: bounds of its numbers, by field.
        renamed: what replaces a field that no longer exists, by its old name.
    """

    place: ClassVar[str] = ""
    bounds: ClassVar[dict[str, Bounds]] = {}
    renamed: ClassVar[dict[str, str]] = {}

    def __post_init__(self):
        check_bounds(self)

    def expect(self, condition: bool, name: str, expected: str) -> None:
        """Raise a `ValueError` that names a field and its value unless `condition` holds."""
        need(condition, qualified(self.place, name), getattr(self, name), expected)


def check_bounds(section: Any) -> None:
    """Check that every number of a section is finite and within its bounds.

    Raises:
        ValueError: names the field, the value and the bounds.
    """
    for item in fields(section):
        value = getattr(section, item.name)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            bounds = section.bounds.get(item.name, {})
            need(_is_within(value, bounds), qualified(section.place, item.name), value, _expected_number(value, bounds))


def qualified(place: str, name: str) -> str:
    """A field's name with that of its section."""
    return f"{place}.{name}" if place else name


def _is_within(value: float, bounds: Bounds) -> bool:
    return (
        (isinstance(value, int) or math.isfinite(value))
        and value >= bounds.get("least", -math.inf)
        and value > bounds.get("above", -math.inf)
        and value <= bounds.get("most", LARGEST if isinstance(value, int) else math.inf)
        and value < bounds.get("below", math.inf)
    )


def _expected_number(value: float, bounds: Bounds) -> str:
    if "most" not in bounds and isinstance(value, int) and value > LARGEST:
        bounds = {**bounds, "most": LARGEST}
    words = {"least": "of at least", "above": "above", "most": "of at most", "below": "below"}
    parts = [f"{words[name]} {bounds[name]}" for name in words if name in bounds]
    return "a number " + " and ".join(parts) if parts else "a finite number"


def build(cls: type, values: Any, where: tuple[str, ...] = ()) -> Any:
    """An instance of a section's dataclass; arguments and errors as of [`typed`]."""
    return cls(**typed(cls, values, where))


_type_hints = cache(typing.get_type_hints)


def typed(cls: type, values: Any, where: tuple[str, ...] = ()) -> dict[str, Any]:
    """The fields of a section from a mapping, with strict types.

    Args:
        cls: the dataclass.
        values: as YAML has them; missing fields keep their defaults.
        where: names of the sections around it.

    Raises:
        ValueError: an unknown key (with the nearest known one), a missing one, or a value of another type.
    """
    place = ".".join(where)
    known = {item.name: item for item in fields(cls) if item.init}
    need(isinstance(values, dict), place, values, f"a section with keys such as {', '.join(list(known)[:8])}")
    for key in values:
        if key not in known:
            raise unknown_key(str(key), place, known, cls.renamed)
    for name, item in known.items():
        if name not in values and item.default is MISSING and item.default_factory is MISSING:
            raise ValueError(f"{'.'.join((*where, name))} is missing: {item.metadata['help']}")
    hints = _type_hints(cls)
    return {name: convert(value, hints[name], (*where, name)) for name, value in values.items()}


def describe_fields(cls: type, place: str, base: type = Section, without: tuple[str, ...] = ()) -> list[str]:
    """Lines of text with the fields of a section's dataclass, their defaults and their help; its own sections last.

    Args:
        cls: the dataclass.
        place: name of the section, "" for the top of a recipe.
        base: the class from which `cls` inherits the fields that are left out.
        without: further fields that are left out.
    """
    classes, hints = cls.__mro__[: cls.__mro__.index(base)], _type_hints(cls)
    names = {name for each in classes for name in inspect.get_annotations(each)}.difference(without)
    lines, below = ["", f"{place or 'top level'}:"], []
    for item in fields(cls):
        name, kind = qualified(place, item.name), hints[item.name]
        if item.name not in names:
            continue
        if isinstance(kind, type) and issubclass(kind, Section):
            below += describe_fields(kind, name)
            continue
        default = item.default if item.default_factory is MISSING else item.default_factory()
        shown = default if isinstance(default, str) else None if default is MISSING else json.dumps(default)
        choices = f" ({_describe(kind)})" if _choices(kind) else ""
        lines.append(f"  {name}{' is required' if shown is None else f': {shown}'}{choices}")
        lines += textwrap.wrap(item.metadata["help"], 110, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return lines + below


def unknown_key(key: str, place: str, known: typing.Collection[str], renamed: Mapping[str, str]) -> ValueError:
    """The error of a key that a section does not have: it names what replaces the key, or the nearest known key."""
    if key in renamed:
        return ValueError(f"{qualified(place, key)} no longer exists: use {renamed[key]}")
    nearest = difflib.get_close_matches(key, known, n=1, cutoff=0)[0]
    return ValueError(f"unknown key {key!r} {f'in {place}' if place else 'at the top'}: did you mean {nearest!r}?")


_KINDS = {str: "a string", int: "an integer", float: "a number", bool: "true or false"}


def convert(value: Any, kind: Any, where: tuple[str, ...]) -> Any:
    """A value as a field of this type holds it.

    Args:
        value: as YAML has it.
        kind: the field's type.
        where: the names of its sections and its own.

    Raises:
        ValueError: it is of another type; the message names the field and the value.
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    name = ".".join(where)
    if is_dataclass(kind) and issubclass(kind, Section):
        return build(kind, {} if value is None else value, where)
    if origin in (typing.Union, types.UnionType):
        return _convert_union(value, kind, where)
    choices = _choices(kind)
    if choices is not None:
        # YAML reads the bare word `no` as false.
        value = "no" if value is False and "no" in choices else value
        need(any(value == choice and type(value) is type(choice) for choice in choices), name, value, _describe(kind))
        return value
    if kind is dict or origin is dict:
        value = {} if value is None else value
        is_mapping = isinstance(value, dict) and all(isinstance(key, str) for key in value)
        need(is_mapping, name, value, _describe(kind))
        return {key: convert(item, arguments[1] if arguments else Any, (*where, key)) for key, item in value.items()}
    if kind is list or origin is list:
        need(isinstance(value, list), name, value, _describe(kind))
        return [convert(item, arguments[0] if arguments else Any, where) for item in value]
    if kind is Any:
        return _plain(value, where)
    allowed = (int, float) if kind is float else kind
    need(isinstance(value, allowed) and isinstance(value, bool) == (kind is bool), name, value, _describe(kind))
    return value


def _convert_union(value: Any, kind: Any, where: tuple[str, ...]) -> Any:
    kinds = _alternatives(kind)
    if value is None and type(None) in kinds:
        return None
    for alternative in kinds:
        if alternative is not type(None):
            try:
                return convert(value, alternative, where)
            except ValueError:
                continue
    raise ValueError(f"{'.'.join(where)}={value!r}: expected {_describe(kind)}")


def _alternatives(kind: Any) -> list[Any]:
    """The types of a union; a string beside an enumeration is one of its values."""
    kinds = list(typing.get_args(kind))
    return [item for item in kinds if item is not str] if any(map(_is_enum, kinds)) else kinds


def _is_enum(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Enum)


def _choices(kind: Any) -> list[Any] | None:
    if _is_enum(kind):
        return [item.value for item in kind]
    return list(typing.get_args(kind)) if typing.get_origin(kind) is Literal else None


def _describe(kind: Any) -> str:
    origin, choices = typing.get_origin(kind), _choices(kind)
    if choices is not None:
        return "one of " + ", ".join(map(str, choices))
    if origin in (typing.Union, types.UnionType):
        return " or ".join("null" if item is type(None) else _describe(item) for item in _alternatives(kind))
    if origin is list:
        return f"a list of {_describe(typing.get_args(kind)[0]).removeprefix('a ')}s, such as [a, b]"
    return _KINDS.get(kind, "a mapping")


def _plain(value: Any, where: tuple[str, ...]) -> Any:
    """A value of a mapping whose fields other libraries declare: what JSON can hold, with finite numbers."""
    name = ".".join(where)
    if isinstance(value, dict):
        need(all(isinstance(key, str) for key in value), name, value, "a mapping whose keys are strings")
        return {key: _plain(item, (*where, key)) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item, where) for item in value]
    need(not isinstance(value, float) or math.isfinite(value), name, value, "a finite number")
    is_plain = value is None or isinstance(value, (str, int, float))
    need(is_plain, name, value, "a string, a number, true, false, a list or a mapping")
    return value


__all__ = [
    "COUNT",
    "LARGEST",
    "NOT_NEGATIVE",
    "POSITIVE",
    "Bounds",
    "Section",
    "build",
    "check_bounds",
    "convert",
    "describe_fields",
    "need",
    "option",
    "qualified",
    "typed",
    "unknown_key",
]
