"""The embedded data set: a class-balanced subset of Fashion-MNIST, 10,000 training and 2,000 test images.

Made by ``benchmarks/make_embedded_dataset.py``, which see for the selection.
Source: Xiao, Rasul, Vollgraf, "Fashion-MNIST" (2017), https://arxiv.org/abs/1708.07747; MIT licence.
"""

from __future__ import annotations

import hashlib
import json
from importlib import resources
from io import BytesIO
from pathlib import Path
from typing import Any

from edgetrain.data.checks import missing_split
from edgetrain.data.dataset import Dataset
from edgetrain.data.npz import read_npz
from edgetrain.errors import DataError

EMBEDDED_NAMES = ("embedded", "fashion-mnist-subset")
EMBEDDED_SPLITS = ("train", "test")
_FOLDER = "fashion_mnist_subset"
_REMEDY = "expected the file as shipped; install edgetrain again"


def load_embedded(split: str = "train") -> Dataset:
    """Return one split of the embedded Fashion-MNIST subset, its checksum verified.

    Args:
        split: "train", 10,000 images, or "test", 2,000; every class equally often.

    Returns:
        A Dataset with uint8 images of shape (N, 1, 28, 28) and ten classes.

    Raises:
        DataError: unknown split, or a shipped file is missing or damaged.

    Example:
        >>> len(load_embedded("test"))
        2000
    """
    if split not in EMBEDDED_SPLITS:
        raise missing_split(Path(EMBEDDED_NAMES[0]), split, EMBEDDED_SPLITS)
    about, path = _about(), Path(_FOLDER, f"{split}.npz")
    content = _shipped(path.name)
    digest = hashlib.sha256(content).hexdigest()
    if digest != about["sha256"][path.name]:
        raise DataError(f"{path}: sha256 is {digest}, expected {about['sha256'][path.name]}; {_REMEDY}")
    arrays = read_npz(path, BytesIO(content), {"x", "y"})
    return Dataset.from_arrays(arrays["x"], arrays["y"], about["class_names"], EMBEDDED_NAMES[1])


def _shipped(name: str) -> bytes:
    try:
        return resources.files("edgetrain.data").joinpath(_FOLDER, name).read_bytes()
    except OSError as error:
        raise DataError(f"{_FOLDER}/{name}: missing or unreadable ({error.strerror}), {_REMEDY}") from error


def _about() -> dict[str, Any]:
    try:
        about: dict[str, Any] = json.loads(_shipped("about.json"))
    except ValueError as error:
        raise DataError(f"{_FOLDER}/about.json: damaged ({error}), {_REMEDY}") from error
    return about
