"""Checks a TOML table against a dataclass, and the numbers of a record, with messages a user can act on.

A field's annotation says its type, and ``Annotated[int, Within(1, 8)]`` its range; a field without
default is required. Nested dataclasses are nested tables.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

from edgetrain.errors import ProfileError, UsageError

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


def take_numbers(record: Any, name: str) -> None:
    """Turn NumPy's numbers in a frozen dataclass into Python's, so that texts and checkpoints tell them apart no more.

    Args:
        record: whose fields are numbers, flags, tuples of numbers, and others, which stay.
        name: of the record, for messages.

    Raises:
        UsageError: a field that is a number is given True or False.

    >>> from dataclasses import dataclass
    >>> import numpy as np
    >>> @dataclass(frozen=True)
    ... class Fan:
    ...     speed_rpm: int
    ...     share: float
    >>> fan = Fan(np.int64(1200), np.float32(0.9))
    >>> take_numbers(fan, "fan")
    >>> fan
    Fan(speed_rpm=1200, share=0.9)
    """
    for key, kinds in _kinds(record.__class__).items():
        value = getattr(record, key)
        plain = tuple(map(_plain, value)) if isinstance(value, tuple) else _plain(value)
        if isinstance(plain, bool) and bool not in kinds and (int in kinds or float in kinds):
            raise UsageError(f"{name}: {key}={value!r}, expected a number")
        object.__setattr__(record, key, plain)


@functools.cache
def _kinds(record: Any) -> dict[str, tuple[Any, ...]]:
    """Return the types that the fields of a dataclass may have, by name."""
    hints = get_type_hints(record)
    return {item.name: get_args(hints[item.name]) or (hints[item.name],) for item in fields(record)}


def _plain(value: Any) -> Any:
    """Return a NumPy number as a Python number; a float32 of 0.9 is 0.9, as it is printed. Others stay."""
    if getattr(value, "shape", None) != ():
        return value
    kind = value.dtype.kind
    if kind == "f":
        return float(str(value))
    return bool(value) if kind == "b" else int(value) if kind in "iu" else value


def percent_hint(key: str, value: Any) -> str:
    """Return what follows the message that a share is too large: the share that percent stand for.

    >>> percent_hint("rate", 30.0), percent_hint("rate", 0.3)
    ('; 30 % is rate=0.3', '')
    """
    return f"; {value:g} % is {key}={value / 100:g}" if isinstance(value, int | float) and 1 < value < 100 else ""


def nearest(word: str, words: Collection[str]) -> str:
    """Return the one of ``words`` that is spelled most like ``word``; ``words`` is not empty."""
    import difflib

    return difflib.get_close_matches(word, words, n=1, cutoff=0.0)[0]
