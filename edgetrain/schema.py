"""Checks a TOML table against a dataclass, with messages a user can act on.

A field's annotation says its type, and ``Annotated[int, Within(1, 8)]`` its range; a field without
default is required. Nested dataclasses are nested tables.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

from edgetrain.errors import ProfileError

Record = TypeVar("Record")


class Within(NamedTuple):
    """Closed range of a number; NaN is outside every range."""

    low: float
    high: float


class OneOf(NamedTuple):
    """The allowed values of a key."""

    choices: tuple[Any, ...]


def build(record: type[Record], table: Any, path: Path, prefix: str = "") -> Record:
    """Make a ``record`` from a TOML table, and its nested records.

    Args:
        record: a dataclass; its annotations are the schema.
        table: the parsed table.
        path: the file, for messages.
        prefix: dotted name of the table in the file, with a dot at its end.

    Raises:
        ProfileError: an unknown key (the nearest known one is named), a missing key, a wrong type, a value
            out of range; the message names file, key, value and what was expected.

    >>> from dataclasses import dataclass
    >>> @dataclass
    ... class Fan:
    ...     speed_rpm: Annotated[int, Within(0, 5000)]
    >>> build(Fan, {"speed_rpm": 1200}, Path("fan.toml"))
    Fan(speed_rpm=1200)
    """
    if not isinstance(table, dict):
        raise ProfileError(f"{path}: key {prefix[:-1]!r} is {table!r}, expected a table")
    hints = get_type_hints(record, include_extras=True)
    for key in table:
        if key not in hints:
            closest = prefix + nearest(key, hints)
            raise ProfileError(f"{path}: unknown key {prefix + key!r}; did you mean {closest!r}?")
    for item in fields(record):  # type: ignore[arg-type]  # every caller passes a dataclass
        if item.name not in table and item.default is MISSING:
            raise ProfileError(f"{path}: key {prefix + item.name!r} is missing")
    return record(**{key: _convert(table[key], hints[key], path, prefix + key) for key in table})


_KINDS: dict[Any, tuple[str, Any]] = {
    bool: ("true or false", lambda v: isinstance(v, bool)),
    int: ("a whole number", lambda v: isinstance(v, int) and not isinstance(v, bool)),
    float: ("a number", lambda v: isinstance(v, (int, float)) and not isinstance(v, bool)),
    str: ("a text", lambda v: isinstance(v, str)),
    tuple[str, ...]: (
        "a list of texts",
        lambda v: isinstance(v, list) and all(isinstance(x, str) for x in v),
    ),
    Mapping[str, str]: (
        "a table of texts that say something, dotted keys in quotes",
        lambda v: isinstance(v, dict) and all(_says_something(x) for x in v.values()),
    ),
}


def _says_something(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _convert(value: Any, hint: Any, path: Path, key: str) -> Any:
    if get_origin(hint) in (Union, UnionType):
        hint = next(choice for choice in get_args(hint) if choice is not type(None))
    if is_dataclass(hint):
        return build(hint, value, path, key + ".")  # type: ignore[arg-type]  # a class, not an instance
    kind, *limits = get_args(hint) if get_origin(hint) is Annotated else (hint,)
    expected, fits = _KINDS[kind]
    ok = fits(value)
    for limit in limits:
        if isinstance(limit, OneOf):
            ok = ok and value in limit.choices
            expected = "one of " + ", ".join(map(repr, limit.choices))
        else:
            ok = ok and limit.low <= value <= limit.high
            expected = f"{expected} from {limit.low:g} to {limit.high:g}"
    if not ok and kind == Mapping[str, str] and isinstance(value, dict):  # name the entry of the table
        part, value = next((part, one) for part, one in value.items() if not _says_something(one))
        key, expected = f"{key}.{part}", "a text that says something; a dotted key goes in quotes"
    if not ok:
        raise ProfileError(f"{path}: key {key!r} is {value!r}, expected {expected}")
    return tuple(value) if isinstance(value, list) else float(value) if kind is float else value


def nearest(word: str, words: Collection[str]) -> str:
    """Return the one of ``words`` that is spelled most like ``word``; ``words`` is not empty."""
    import difflib

    return difflib.get_close_matches(word, words, n=1, cutoff=0.0)[0]
