"""Where every buffer of a plan lies: pure functions from lifetimes to offsets in one arena."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from edgetrain.arrays import ALIGNMENT


@dataclass(frozen=True)
class Lifetime:
    """A buffer's size and the first and last step at which it must keep its content, both included."""

    name: str
    nbytes: int
    first: int
    last: int

    def overlaps(self, other: Lifetime) -> bool:
        """Whether both must exist at the same step."""
        return self.first <= other.last and other.first <= self.last


def padded(nbytes: int) -> int:
    """Round a size up to the alignment."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def place(buffers: Sequence[Lifetime]) -> tuple[list[int], int]:
    """Return the byte offset of every buffer and the size of the arena.

    Greedy by size: the largest buffer first, each into the smallest gap between
    buffers alive at the same time that fits, else on top (Pisarchyk and Lee 2020,
    "Efficient memory management for deep neural net inference", section 4.3).

    Example:
        >>> place([Lifetime("a", 64, 0, 1), Lifetime("b", 64, 1, 2), Lifetime("c", 64, 2, 3)])
        ([0, 64, 0], 128)
    """
    offsets = [0] * len(buffers)
    placed: list[int] = []
    for index in sorted(range(len(buffers)), key=lambda i: (-buffers[i].nbytes, buffers[i].first, i)):
        taken = sorted(
            (offsets[i], offsets[i] + padded(buffers[i].nbytes)) for i in placed if buffers[i].overlaps(buffers[index])
        )
        offsets[index] = _best_gap(taken, padded(buffers[index].nbytes))
        placed.append(index)
    return offsets, max((offsets[i] + padded(buffers[i].nbytes) for i in range(len(buffers))), default=0)


def _best_gap(taken: Sequence[tuple[int, int]], size: int) -> int:
    """Return the start of the smallest gap of at least ``size`` bytes, or the end of everything."""
    best, end = None, 0
    for start, stop in taken:
        gap = start - end
        if gap >= size and (best is None or gap < best[0]):
            best = (gap, end)
        end = max(end, stop)
    return end if best is None else best[1]
