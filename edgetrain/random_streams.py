"""Random numbers of one seed for several purposes, none of which draws another's.

Kernels have counters instead (``kernels.random``): the ``stream`` of a node is numbered in ``autodiff`` (Dropout) and
``pruning``.
"""

from __future__ import annotations

import numpy as np

# Checkpoints and published figures rely on these numbers: give a new purpose the next one.
ORDER, AUGMENTATION, FILTER, GROWTH = range(4)


def generator(seed: int, purpose: int, *numbers: int) -> np.random.Generator:
    """Return the random numbers of a purpose.

    Args:
        seed: at least 0.
        purpose: one of the constants of this file.
        numbers: of the epoch, the batch, or what else has random numbers of its own, at least 0 each.

    Example:
        >>> first, other = generator(0, ORDER, 3), generator(0, ORDER, 3, 0)
        >>> first.bytes(8) == other.bytes(8)
        False
    """
    # A spawn key, not a list of entropy words: NumPy pads those with zeros, so (1, 2) would equal (1, 2, 0).
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(purpose, *numbers)))
