"""Read untrusted YAML: repeated keys and excessive nesting or aliases are errors."""

from __future__ import annotations

import os
import re
from typing import Any

import yaml

from ..files_otdrg import MAXIMUM_DEPTH, read_text

_MAXIMUM_BYTES = 2**18
#: Most values of a document with expanded aliases.
_MAXIMUM_VALUES = 1_000_000

# libyaml is ten times as fast, but its errors are less precise, and some builds of PyYAML do not have it.
_BaseLoader = getattr(yaml, "CBaseLoader", yaml.BaseLoader)


class _UniqueKeys:
    """A loader that refuses repeated keys."""

    def construct_mapping(self, node, deep=False):
        if isinstance(node, yaml.MappingNode):
            seen = set()
            for key, _ in node.value:
                if not isinstance(key, yaml.ScalarNode):
                    raise yaml.constructor.ConstructorError(None, None, "expected scalars as keys", key.start_mark)
                if key.tag == "tag:yaml.org,2002:merge":
                    continue
                value = self.construct_object(key)
                if value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {value!r} is repeated", node.start_mark
                    )
                seen.add(value)
        return super().construct_mapping(node, deep)


class _Typed(_UniqueKeys, yaml.SafeLoader):
    """YAML 1.1, but 1e-4 (without a point) is a number."""


class _AsText(_UniqueKeys, _BaseLoader):
    """Each scalar is a string: in YAML 1.1 yes and no are booleans."""


_Typed.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9][0-9_]*(?:\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def read_yaml(path: str | os.PathLike, as_text: bool = False) -> Any:
    """Read a YAML file; with `as_text` each scalar is a string.

    Raises:
        ValueError: not YAML in UTF-8, or too large: its bytes, its nesting, or its expanded aliases.
        OSError: the file cannot be read.
    """
    return parse_yaml(read_text(path, "a YAML text file", _MAXIMUM_BYTES), str(path), as_text)


def parse_yaml(text: str, what: str, as_text: bool = False) -> Any:
    """Parse YAML text as [`read_yaml`] does; `what` names it in errors."""
    try:
        fault = _fault_of_size(text)
        content = yaml.load(text, Loader=_AsText if as_text else _Typed)
        if fault is not None:
            raise fault
        return content
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = getattr(error, "problem", None) or getattr(error, "reason", None) or str(error).splitlines()[0]
        raise ValueError(f"{what} is not valid YAML{where}: {problem}") from None
    except (ValueError, TypeError, OverflowError, RecursionError) as error:
        # For example a date with month 13.
        raise ValueError(f"{what} is not valid YAML: {' '.join(str(error).split())}") from None


def _fault_of_size(text: str) -> yaml.YAMLError | None:
    """Check the size; returns an error of the fast parser, because the other parser's message is more precise."""
    try:
        _check_size(text)
    except yaml.YAMLError as error:
        if "nesting" in str(error):
            raise ValueError(f"nested more than {MAXIMUM_DEPTH} levels deep") from None
        return error
    return None


def _check_size(text: str) -> None:
    sizes: dict[str, int] = {}
    levels: list[tuple[str | None, int]] = []
    count = 0
    for event in yaml.parse(text, Loader=_BaseLoader):
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in sizes:
                raise ValueError(f"the alias *{event.anchor} is undefined or contains itself")
            count += sizes[event.anchor]
        elif isinstance(event, (yaml.SequenceStartEvent, yaml.MappingStartEvent)):
            levels.append((event.anchor, count))
            sizes.pop(event.anchor, None)
            count += 1
        elif isinstance(event, (yaml.SequenceEndEvent, yaml.MappingEndEvent)):
            anchor, before = levels.pop()
            if anchor is not None:
                sizes[anchor] = count - before
        elif isinstance(event, yaml.ScalarEvent):
            count += 1
            if event.anchor is not None:
                sizes[event.anchor] = 1
        if len(levels) > MAXIMUM_DEPTH:
            raise ValueError(f"nested more than {MAXIMUM_DEPTH} levels deep")
        if count > _MAXIMUM_VALUES:
            raise ValueError(f"more than {_MAXIMUM_VALUES:,} values with expanded aliases")
