"""MNIST's IDX files, plain or gzip.

Layout: a big-endian 32-bit magic number (0x08 for unsigned bytes, then the number of dimensions), one 32-bit
size per dimension, then the values. Source: http://yann.lecun.com/exdb/mnist/, "File formats".
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgetrain.data.checks import naming, read_bytes
from edgetrain.data.convert import class_names_for
from edgetrain.data.dataset import Dataset
from edgetrain.errors import DataError

_MAGIC_BY_KIND = {"images": 0x00000803, "labels": 0x00000801}
_GZIP_START = b"\x1f\x8b"
_PREFIXES_BY_SPLIT = {"train": ("train",), "test": ("t10k", "test")}


def load_idx(
    images_path: str | Path,
    labels_path: str | Path,
    *,
    class_names: Sequence[str] | None = None,
    name: str | None = None,
    allow_missing_classes: bool = False,
) -> Dataset:
    """Read a pair of IDX files of unsigned bytes, plain or gzip.

    Args:
        images_path: file of shape (N, H, W).
        labels_path: file of shape (N,).
        class_names: one per class; default "0", "1", ... up to the largest label.
        name: default: the name of the images file.
        allow_missing_classes: accept classes without an example.

    Returns:
        A Dataset with uint8 images of shape (N, 1, H, W).

    Raises:
        DataError: a file is missing, damaged, of the wrong kind, or the two do not fit together.
    """
    images, labels = _read(Path(images_path), "images"), read_idx_labels(Path(labels_path))
    if len(images) != len(labels):
        raise DataError(
            f"{labels_path}: {len(labels)} labels for the {len(images)} images of {images_path};"
            " expected the two files of one split"
        )
    with naming(Path(labels_path)):
        names = class_names_for(labels) if class_names is None else tuple(class_names)
        return Dataset(images[:, None], labels, names, name or Path(images_path).name, allow_missing_classes)


def read_idx_labels(path: Path) -> NDArray[np.int64]:
    """Return the labels of an IDX file, int64 of shape (N,).

    Raises:
        DataError: the file is missing, damaged or of the wrong kind.
    """
    return _read(path, "labels").astype(np.int64)


def idx_pairs(folder: Path) -> dict[str, tuple[Path, Path]]:
    """Return the (images, labels) files of every split found in a folder, under MNIST's usual names."""
    pairs: dict[str, tuple[Path, Path]] = {}
    for split, prefixes in _PREFIXES_BY_SPLIT.items():
        for prefix in prefixes:
            images, labels = _find(folder, f"{prefix}-images", 3), _find(folder, f"{prefix}-labels", 1)
            if images and labels:
                pairs.setdefault(split, (images, labels))
    return pairs


def load_idx_folder(folder: Path, split: str, allow_missing_classes: bool = False) -> Dataset:
    """Read one of the splits in ``idx_pairs(folder)``; the training labels define the classes.

    Args:
        folder: of the files.
        split: "train" or "test".
        allow_missing_classes: accept classes without an example in the training split, too; all labels define them.

    Raises:
        DataError: a file is bad.
    """
    pairs = idx_pairs(folder)
    names = None
    if allow_missing_classes:
        names = class_names_for(np.concatenate([read_idx_labels(labels) for _, labels in pairs.values()]))
    elif split != "train" and "train" in pairs:
        names = class_names_for(read_idx_labels(pairs["train"][1]))
    lenient = allow_missing_classes or split != "train"
    return load_idx(*pairs[split], class_names=names, name=folder.name, allow_missing_classes=lenient)


def _find(folder: Path, stem: str, dimensions: int) -> Path | None:
    # Both spellings are in circulation: the original hyphen, and the full stop some unpackers make of it.
    names = [f"{stem}{mark}idx{dimensions}-ubyte{end}" for mark in "-." for end in ("", ".gz")]
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _read(path: Path, kind: str) -> NDArray[np.uint8]:
    content = _unpacked(path)
    magic, expected = int.from_bytes(content[:4], "big"), _MAGIC_BY_KIND[kind]
    if magic != expected:
        swapped = magic in _MAGIC_BY_KIND.values()
        remedy = "images and labels are swapped" if swapped else "only unsigned-byte IDX is read"
        raise DataError(f"{path}: starts with 0x{magic:08x}, expected 0x{expected:08x} for {kind}; {remedy}")
    dimensions = magic & 0xFF
    shape = tuple(int.from_bytes(content[4 + 4 * i : 8 + 4 * i], "big") for i in range(dimensions))
    header = 4 + 4 * dimensions
    size = header + int(np.prod(shape, dtype=object))
    if len(content) != size:
        raise DataError(f"{path}: {len(content)} bytes, expected {size} for shape {shape}; damaged, copy it again")
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


def _unpacked(path: Path) -> bytes:
    content = read_bytes(path)
    if not content.startswith(_GZIP_START):
        return content
    try:
        return gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: damaged gzip file ({error}), expected a whole one; copy again") from error
