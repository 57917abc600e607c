"""Data sets: reading, checking, augmenting and batching.

Needs NumPy and the standard library; Pillow only for folders of images.
"""

from __future__ import annotations

from edgetrain.data.augment import Augmentation
from edgetrain.data.batches import batch_count, batches
from edgetrain.data.cifar import load_cifar
from edgetrain.data.dataset import Dataset
from edgetrain.data.embedded import load_embedded
from edgetrain.data.folder import load_folder
from edgetrain.data.idx import load_idx
from edgetrain.data.npz import load_npz
from edgetrain.data.readers import available_splits, load_dataset

__all__ = [
    "Augmentation",
    "Dataset",
    "available_splits",
    "batch_count",
    "batches",
    "load_cifar",
    "load_dataset",
    "load_embedded",
    "load_folder",
    "load_idx",
    "load_npz",
]
