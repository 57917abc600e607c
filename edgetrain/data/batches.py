"""Batches of one epoch, reproducible from (seed, epoch) and resumable at any batch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import SupportsIndex, TypeAlias

import numpy as np
from numpy.typing import NDArray

from edgetrain.data.augment import Augmentation
from edgetrain.data.checks import whole_number
from edgetrain.data.dataset import Dataset
from edgetrain.data.targets import TargetSet
from edgetrain.errors import UsageError
from edgetrain.random_streams import AUGMENTATION, ORDER, generator

Batch: TypeAlias = tuple[NDArray[np.float32], NDArray[np.int64] | NDArray[np.float32]]


def batch_count(n: SupportsIndex, batch_size: SupportsIndex) -> int:
    """Return the number of batches in ``n`` images, the last partial one included.

    Raises:
        UsageError: ``n`` negative or ``batch_size`` below 1.

    Example:
        >>> batch_count(100, 32)
        4
    """
    return -(-whole_number(n, "n", 0) // whole_number(batch_size, "batch_size", 1))


def batches(
    dataset: Dataset | TargetSet,
    batch_size: SupportsIndex,
    *,
    seed: SupportsIndex,
    epoch: SupportsIndex,
    shuffle: bool = True,
    augmentation: Augmentation | None = None,
    start: SupportsIndex = 0,
) -> Iterator[Batch]:
    """Return an iterator over the batches of one epoch, the last partial batch included.

    The order depends on (seed, epoch) alone and the augmentation of batch k on (seed, epoch, k) alone, so
    ``start=k`` goes on exactly where an interrupted epoch stopped.

    Args:
        dataset: where the images come from.
        batch_size: images per batch, >= 1.
        seed: whole number >= 0.
        epoch: whole number >= 0.
        shuffle: a new random order every epoch; False keeps the order of the data set.
        augmentation: applied to each batch after scaling.
        start: first batch to return, 0 to ``batch_count``; ``batch_count`` itself gives none.

    Returns:
        An iterator of (x, y) as from ``take``: float32 (n, C, H, W) or (n, C, W), and int64 (n,), or float32 targets.

    Raises:
        UsageError: an argument is out of range; raised by this call, not by the first ``next``.

    Example:
        >>> data = Dataset.from_arrays(np.zeros((5, 1, 2, 2), np.uint8), [0, 1, 0, 1, 0])
        >>> [len(y) for _, y in batches(data, 2, seed=0, epoch=0)]
        [2, 2, 1]
    """
    size = whole_number(batch_size, "batch_size", 1)
    root, turn = whole_number(seed, "seed", 0), whole_number(epoch, "epoch", 0)
    first, count = whole_number(start, "start", 0), batch_count(len(dataset), size)
    if first > count:
        raise UsageError(f"start is {first}, expected at most {count}, the number of batches in an epoch")
    order = generator(root, ORDER, turn).permutation(len(dataset)) if shuffle else np.arange(len(dataset))

    def generate() -> Iterator[Batch]:
        for index in range(first, count):
            x, y = dataset.take(order[index * size : (index + 1) * size])
            if augmentation is not None:
                x = augmentation(x, generator(root, AUGMENTATION, turn, index))
            yield x, y

    return generate()
