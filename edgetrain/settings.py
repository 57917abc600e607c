"""The settings of methods and optimizers, frozen dataclasses that users write: their numbers and their limits."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection
from dataclasses import fields
from typing import Any, get_args, get_type_hints

from edgetrain.errors import UsageError


class Limits:
    """Refuses settings of a record that are out of range, all with a message of the same form.

    Args:
        record: whose attributes are the settings.
        name: of the record, for messages.

    Example:
        >>> from types import SimpleNamespace
        >>> limits = Limits(SimpleNamespace(rate=30.0), "fan")
        >>> limits.number("rate", lambda rate: 0 < rate <= 1, "a number above 0 and at most 1", share=True)
        Traceback (most recent call last):
        edgetrain.errors.UsageError: fan: rate=30.0, expected a number above 0 and at most 1; 30 % is rate=0.3
    """

    def __init__(self, record: Any, name: str) -> None:
        self._record, self._name = record, name

    def require(self, key: str, holds: bool, expected: str, *, share: bool = False) -> None:
        """Refuse a setting that is not as expected.

        Args:
            key: of the setting.
            holds: whether it is as expected.
            expected: ends the message.
            share: whether a number above 1 was perhaps meant as percent.

        Raises:
            UsageError: ``holds`` is false.
        """
        if not holds:
            value = getattr(self._record, key)
            hint = _percent_hint(key, value) if share else ""
            raise UsageError(f"{self._name}: {key}={value!r}, expected {expected}{hint}")

    def number(self, key: str, holds: Callable[[float], bool], expected: str, *, share: bool = False) -> None:
        """Refuse what is no number, or one for which ``holds`` is false; the rest is as for ``require``.

        Raises:
            UsageError: it is refused.
        """
        value = getattr(self._record, key)
        self.require(key, isinstance(value, int | float) and holds(value), expected, share=share)

    def count(self, key: str) -> None:
        """Refuse what is no whole number of at least 1.

        Raises:
            UsageError: it is refused.
        """
        value = getattr(self._record, key)
        self.require(key, isinstance(value, int) and value >= 1, "a whole number of at least 1")

    def one_of(self, key: str, choices: Collection[str]) -> None:
        """Refuse what is not among ``choices``.

        Raises:
            UsageError: it is refused.
        """
        self.require(key, getattr(self._record, key) in choices, f"one of {', '.join(choices)}")

    def flag(self, key: str, *, optional: bool = False) -> None:
        """Refuse what is not true or false, nor, where it is ``optional``, ``None``.

        Raises:
            UsageError: it is refused.
        """
        value = getattr(self._record, key)
        holds = isinstance(value, bool) or (optional and value is None)
        self.require(key, holds, "True, False or None" if optional else "True or False")


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


def _percent_hint(key: str, value: Any) -> str:
    """Return what follows the message that a share is too large: the share that percent stand for.

    >>> _percent_hint("rate", 30.0), _percent_hint("rate", 0.3)
    ('; 30 % is rate=0.3', '')
    """
    return f"; {value:g} % is {key}={value / 100:g}" if isinstance(value, int | float) and 1 < value < 100 else ""
