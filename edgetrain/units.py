"""Sizes of memory as people write them."""

from __future__ import annotations

import operator
from typing import SupportsIndex

from edgetrain.errors import UsageError

# Bytes of a mebibyte.
MIB = 1 << 20
_UNITS = {"b": 1, "kb": 1000, "mb": 1000**2, "gb": 1000**3, "kib": 1 << 10, "mib": MIB, "gib": 1 << 30}


def parse_bytes(size: SupportsIndex | str) -> int:
    """Return the number of bytes that a text such as "64MiB" says; a whole number is bytes already.

    Raises:
        UsageError: no number or no unit, a fraction, or less than nothing.

    Example:
        >>> parse_bytes("64MiB"), parse_bytes(1024)
        (67108864, 1024)
    """
    if not isinstance(size, str):
        return _whole(size)
    number = size.strip().rstrip("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ ")
    unit = size.strip()[len(number) :].strip().lower()
    try:
        amount = float(number) * _UNITS[unit]
    except (ValueError, KeyError):
        amount = -1.0
    if not 1 <= amount < 1 << 60:
        raise UsageError(f"memory '{size}': expected a number and a unit, such as 64MiB, 512MB or 1GiB")
    return int(amount)


def _whole(size: SupportsIndex) -> int:
    try:
        number = -1 if isinstance(size, bool) else operator.index(size)
    except TypeError:
        number = -1
    if number < 0:
        raise UsageError(f"memory {size!r}: expected a whole number of bytes, at least 0, or a text such as '64MiB'")
    return number
