"""Checks shared by the data readers: whole numbers, file access, errors that name the file."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import SupportsIndex

from edgetrain.errors import DataError, UsageError


def whole_number(value: SupportsIndex, what: str, minimum: int) -> int:
    """Return ``value`` as an int; ``what`` names it in the error.

    Raises:
        UsageError: not an integer, or below ``minimum``.
    """
    try:
        number = operator.index(value)
    except TypeError:
        raise UsageError(f"{what} is {value!r}, expected a whole number of at least {minimum}") from None
    if isinstance(value, bool) or number < minimum:
        raise UsageError(f"{what} is {value!r}, expected a whole number of at least {minimum}")
    return number


@contextmanager
def naming(place: Path | str) -> Iterator[None]:
    """Prefix the message of a DataError raised inside with the file, or the part of it, that it comes from.

    Raises:
        DataError: one was raised inside.
    """
    try:
        yield
    except DataError as error:
        raise DataError(f"{place}: {error}") from error


def read_bytes(path: Path) -> bytes:
    """Return the content of a file.

    Raises:
        DataError: the file is missing, is a folder, or cannot be read.
    """
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; check the path") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); expected a readable file") from error


def paths_in(folder: Path) -> list[Path]:
    """Return the paths of everything in a folder, sorted.

    Raises:
        DataError: the folder cannot be listed.
    """
    try:
        return sorted(folder.iterdir())
    except OSError as error:
        raise DataError(f"{folder}: cannot be listed ({error.strerror}), expected a readable folder") from error


def missing_split(path: Path, split: str, present: tuple[str, ...]) -> DataError:
    """Return the error for a split that a source does not have."""
    listed = ", ".join(repr(name) for name in present) or "none"
    return DataError(f"{path}: no split {split!r}; splits found here: {listed}")
