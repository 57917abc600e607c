"""Seconds of a batch with every method, measured so that neither the machine's moods nor a wrong guess decide.

Used by ``method_accuracy.py``. A machine that is shared, or virtual, is slower for seconds or minutes at a time, and a
learner of short steps that decided for the wrong number of threads stays with that for hundreds of steps. So every
setting's turn lies between two short measurements of dense training and counts as a ratio to them, only if both were
quick; in every turn learners decide about threads anew, and of a few repeats the fastest counts.
"""

from __future__ import annotations

import statistics
import time

import numpy as np

import edgetrain as et
from edgetrain.fitting import block_size

# Batches before a turn, or as many as fit into some seconds: decisions about threads are made after 200 short steps
# (``executor.Pace``).
SETTLE_BATCHES, SETTLE_SECONDS = 220, 0.1
REPEATS = 3
# Batches of a repeat; with a filter more, as how many steps fall into one varies.
BATCHES, FILTERED_BATCHES = 10, 80
# A turn counts where dense training, before and after it, took at most so many times what it takes in its fastest.
CALM = 1.25
# What a filter may take of dense training's time, as a multiple of its operations where that is more than all of it. On
# AMD LeNet-5's selective-50 took 1.31 in four runs: a batch of 0.2 ms is predicted and trained in separate calls.
OVERHEAD = 1.35


class Feed:
    """Offers instances to a learner as ``fit`` does, round and round.

    Args:
        learner: is trained.
        x, y: float32 ``(N, *input_shape)`` and labels ``(N,)``, many more than a batch.

    Attributes:
        macs, batches: multiply-accumulates executed so far, and batches offered.
    """

    def __init__(self, learner: et.Learner, x: np.ndarray, y: np.ndarray) -> None:
        self.learner, self._x, self._y = learner, x, y
        self._size, self._place = block_size(learner), 0
        self.macs, self.batches = 0, 0.0

    def settle(self) -> None:
        """Decide about threads anew, before a turn."""
        self.learner.threads = self.learner.threads
        start, before = time.perf_counter(), self.batches
        while self.batches - before < SETTLE_BATCHES and time.perf_counter() - start < SETTLE_SECONDS:
            self._offer()

    def fastest(self) -> float:
        """Return the seconds per multiply-accumulate of the fastest repeat: filters keep more of some batches."""
        return min(self._repeat() for _ in range(REPEATS))

    def _repeat(self) -> float:
        count = BATCHES if self.learner.instance_filter is None else FILTERED_BATCHES
        start, batches, macs = time.perf_counter(), self.batches, self.macs
        while self.batches - batches < count:
            self._offer()
        return (time.perf_counter() - start) / max(1, self.macs - macs)

    def _offer(self) -> None:
        if self._place + self._size > len(self._y):
            self._place = 0
        part = slice(self._place, self._place + self._size)
        self._place, x, y = part.stop, self._x[part], self._y[part]
        filtered = self.learner.instance_filter is not None
        step = self.learner.observe(x, y) if filtered else self.learner.partial_fit(x, y)
        self.macs, self.batches = self.macs + step.macs_done, self.batches + len(y) / self.learner.batch_size


def seconds_per_batch(feeds: dict[str, Feed], rounds: int) -> dict[str, float]:
    """Return the seconds that a batch of offered instances takes in every setting; the first one is dense training.

    Raises:
        SystemExit: the machine is not quiet.
    """
    dense, *others = feeds
    for feed in feeds.values():  # compiles
        feed.settle()
    turns: dict[str, list[tuple[float, float, float]]] = {name: [] for name in others}
    for _ in range(rounds):
        feeds[dense].settle()
        after = feeds[dense].fastest()
        for name in others:
            before = after
            feeds[name].settle()
            own = feeds[name].fastest()
            after = feeds[dense].fastest()
            turns[name].append((before, own, after))
    best = min(min(before, after) for found in turns.values() for before, _, after in found)
    calm = {name: [turn for turn in found if max(turn[0], turn[2]) <= CALM * best] for name, found in turns.items()}
    least = min(map(len, calm.values()))
    print(f"{least} of {rounds} turns count at least")
    if least < max(2, rounds // 4):
        raise SystemExit("too few: the machine is not quiet; nothing is stored, run this again")
    usual = statistics.median(turn[0] for found in calm.values() for turn in found)
    table = {dense: usual * _macs(feeds[dense])}
    for name in others:
        ratio = statistics.median(2 * own / (before + after) for before, own, after in calm[name])
        table[name] = usual * ratio * _macs(feeds[name])
    return table


def contradictions(seconds: dict[str, float], operations: dict[str, float], filters: list[str]) -> list[str]:
    """Return the settings whose times cannot be: filters that take longer than the dense training they leave out.

    Args:
        seconds: of a batch by setting, the first one dense.
        operations: share of dense training's, by setting.
        filters: the settings that are a filter and nothing else.
    """
    dense = next(iter(seconds.values()))
    return [name for name in filters if name in seconds
            and seconds[name] > dense * max(1.0, OVERHEAD * operations.get(name, 0.0))]  # fmt: skip


def _macs(feed: Feed) -> float:
    return feed.macs / feed.batches
