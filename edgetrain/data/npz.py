"""NumPy .npz files with images and labels. Never unpickles anything."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from edgetrain.data.checks import missing_split, naming
from edgetrain.data.convert import class_names_for, images_from, labels_from
from edgetrain.data.dataset import Dataset
from edgetrain.errors import DataError

try:
    from lzma import LZMAError
except ImportError:  # a Python built without it: zipfile refuses such members then
    LZMAError = zipfile.BadZipFile  # type: ignore[misc,assignment]  # only caught

# What zipfile and NumPy raise at damaged, encrypted and foreign archives; KeyError: a member without ".npy".
DAMAGED = (
    OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error, LZMAError, NotImplementedError, RuntimeError,
    KeyError,
)  # fmt: skip
_KEYS_BY_SPLIT = {"train": (("x", "y"), ("x_train", "y_train")), "test": (("x_test", "y_test"),)}


def load_npz(path: str | Path, split: str = "train", *, allow_missing_classes: bool = False) -> Dataset:
    """Read arrays ``x``, ``y`` (or ``x_train``, ``y_train``), or for the test split ``x_test``, ``y_test``.

    Shapes and dtypes are those of ``Dataset.from_arrays``. An optional array ``class_names`` of strings names
    the classes; without it both splits together say how many there are. A test split may lack classes.

    Args:
        path: a file as written by ``numpy.savez`` or ``numpy.savez_compressed``.
        split: "train" or "test".
        allow_missing_classes: accept classes without an example in the training split, too.

    Raises:
        DataError: the file is missing or damaged, lacks the split, or its arrays are bad.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     np.savez(folder + "/digits.npz", x=np.zeros((2, 8, 8), np.uint8), y=[0, 1])
        ...     load_npz(folder + "/digits.npz").input_shape
        (1, 8, 8)
    """
    path = Path(path)
    keys = split_keys(path)
    if split not in keys:
        raise missing_split(path, split, tuple(keys))
    x_key, y_key = keys[split]
    label_keys = {label_key for _, label_key in keys.values()}
    with opened(path) as file:
        arrays = read_npz(path, file, {x_key, "class_names"} | label_keys)
    with naming(path):
        images = images_from(arrays[x_key])
        labels = {key: labels_from(arrays[key]) for key in label_keys}
        names = stored_class_names(arrays.get("class_names"), np.concatenate(list(labels.values())))
        return Dataset(images, labels[y_key], names, path.stem, allow_missing_classes or split == "test")


def npz_splits(path: Path) -> tuple[str, ...]:
    """Return the splits that a file holds.

    Raises:
        DataError: the file is missing, damaged, or holds no split at all.
    """
    return tuple(split_keys(path))


def read_npz(path: Path, file: BinaryIO, wanted: set[str]) -> dict[str, NDArray[Any]]:
    """Return the ``wanted`` arrays that an open .npz holds, by name.

    Args:
        path: names the file in errors.
        file: the open file, or its content in memory.
        wanted: names to read; absent ones are left out.

    Raises:
        DataError: damaged, or an array of Python objects.
    """
    with _archive(path, file) as archive:
        return {key: archive[key] for key in archive.files if key in wanted}


@contextmanager
def _archive(path: Path, file: BinaryIO) -> Iterator[np.lib.npyio.NpzFile]:
    try:
        archive = np.load(file, allow_pickle=False)
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise ValueError("a single array, as numpy.save writes it")
        with archive:
            yield archive
    except DAMAGED as error:
        raise DataError(
            f"{path}: cannot be read ({error}), expected a whole .npz file without pickled objects;"
            " write it again with numpy.savez"
        ) from error


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """Open a file for reading.

    Raises:
        DataError: it is missing or cannot be read.
    """
    # Opened here: numpy.load, given a path, leaves the file open when the archive is damaged.
    try:
        file = path.open("rb")
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; check the path") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); expected a readable file") from error
    with file:
        yield file


def split_keys(path: Path) -> dict[str, tuple[str, str]]:
    """Return the names of the images' and the labels' array by split.

    Raises:
        DataError: the file is missing, damaged, or holds no split at all.
    """
    with opened(path) as file, _archive(path, file) as archive:
        present = set(archive.files)
    found = {}
    for split, choices in _KEYS_BY_SPLIT.items():
        pair = next((pair for pair in choices if present.issuperset(pair)), None)
        if pair:
            found[split] = pair
    if not found:
        raise DataError(f"{path}: holds {sorted(present)}, expected arrays 'x' and 'y'; rename them")
    return found


def stored_class_names(stored: NDArray[Any] | None, labels: NDArray[np.int64]) -> tuple[str, ...]:
    """Return the class names of a file, or numbers up to the largest label.

    Raises:
        DataError: the stored names are not one string per class.
    """
    if stored is None:
        return class_names_for(labels)
    if stored.ndim != 1 or stored.dtype.kind != "U":
        raise DataError(
            f"class_names have dtype {stored.dtype} and shape {stored.shape}, expected strings (num_classes,)"
        )
    return tuple(str(name) for name in stored)
