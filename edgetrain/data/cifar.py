"""The binary version of CIFAR-10 and CIFAR-100, and of anything in the same record layout.

One record per image: the label (CIFAR-100: a coarse, then a fine one), then 3 x 32 x 32 bytes, red, green and
blue.
Source: https://www.cs.toronto.edu/~kriz/cifar.html, "Binary version".
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgetrain.data.checks import missing_split, naming, read_bytes
from edgetrain.data.dataset import Dataset
from edgetrain.errors import DataError

_SHAPE = (3, 32, 32)
_PIXELS = 3 * 32 * 32


@dataclass(frozen=True)
class _Version:
    label_bytes: int
    num_classes: int
    names_file: str
    patterns: dict[str, str]


_CIFAR10 = _Version(1, 10, "batches.meta.txt", {"train": "data_batch_*.bin", "test": "test_batch.bin"})
_CIFAR100 = _Version(2, 100, "fine_label_names.txt", {"train": "train.bin", "test": "test.bin"})


def load_cifar(path: str | Path, train: bool = True, *, allow_missing_classes: bool = False) -> Dataset:
    """Read CIFAR-10 or CIFAR-100 in the binary version.

    Args:
        path: a folder with ``data_batch_*.bin`` and ``test_batch.bin`` (CIFAR-10) or ``train.bin`` and
            ``test.bin`` (CIFAR-100), or one such file. Class names come from ``batches.meta.txt`` or
            ``fine_label_names.txt`` beside the data, and are "0", "1", ... without it.
        train: the training split; False: the test split. Without meaning for one file.
        allow_missing_classes: accept classes without an example in the training split, too.

    Returns:
        A Dataset with uint8 images of shape (N, 3, 32, 32); CIFAR-100 with the fine labels. Classes without
        an example are accepted in the test split and in a single file.

    Raises:
        DataError: a file is missing, truncated, or holds a label beyond the classes.
    """
    path = Path(path)
    if path.is_file():
        version = _CIFAR100 if path.name in _CIFAR100.patterns.values() else _CIFAR10
        return _load([path], version, path.parent, path.name, allow_missing_classes=True)
    split = "train" if train else "test"
    for version in (_CIFAR10, _CIFAR100):
        files = _files(path, version, split)
        if files:
            return _load(files, version, path, path.name, allow_missing_classes=allow_missing_classes or not train)
    raise missing_split(path, split, cifar_splits(path))


def cifar_splits(folder: Path) -> tuple[str, ...]:
    """Return the splits that a folder holds as CIFAR files."""
    return tuple(
        split for split in ("train", "test") if any(_files(folder, version, split) for version in (_CIFAR10, _CIFAR100))
    )


def _files(folder: Path, version: _Version, split: str) -> list[Path]:
    return sorted(file for file in folder.glob(version.patterns[split]) if file.is_file())


def _load(files: list[Path], version: _Version, folder: Path, name: str, *, allow_missing_classes: bool) -> Dataset:
    names = _class_names(folder / version.names_file, version)
    parts = [_records(file, version, len(names)) for file in files]
    images = np.concatenate([records[:, version.label_bytes :] for records in parts]).reshape(-1, *_SHAPE)
    labels = np.concatenate([records[:, version.label_bytes - 1] for records in parts]).astype(np.int64)
    with naming(folder):
        return Dataset(images, labels, names, name, allow_missing_classes)


def _records(file: Path, version: _Version, num_classes: int) -> NDArray[np.uint8]:
    size, record = file.stat().st_size, version.label_bytes + _PIXELS
    if size == 0 or size % record:
        raise DataError(
            f"{file}: {size} bytes, expected a multiple of {record}, the size of a CIFAR record;"
            " truncated, or not the binary version"
        )
    records = _mapped(file).reshape(-1, record)
    labels = records[:, version.label_bytes - 1]
    if labels.max() >= num_classes:
        raise DataError(f"{file}: label {labels.max()}, expected 0 to {num_classes - 1}; damaged or other format")
    return records


def _mapped(file: Path) -> NDArray[np.uint8]:
    # Mapped, not read: 150 MB of CIFAR would otherwise be in memory twice while the images are put together.
    try:
        return np.memmap(file, np.uint8, mode="r")
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror}), expected a readable file") from error


def _class_names(file: Path, version: _Version) -> tuple[str, ...]:
    if not file.is_file():
        return tuple(str(label) for label in range(version.num_classes))
    try:
        lines = read_bytes(file).decode("utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: not UTF-8 ({error.reason}), expected one class name per line") from error
    return tuple(line.strip() for line in lines if line.strip())
