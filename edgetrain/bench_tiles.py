"""Which tiles are faster than the rules' on this machine: timed inside whole training steps, taking turns.

A training step is lowered once per candidate, every product with its next tile; the steps take turns, and what the
rows of a product take is compared with the rule's in the same round. The best candidate of every product meets the
rule again in more rounds, and replaces it only if it wins clearly in both medians: a cold or lucky run is not enough.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

import numpy as np

from edgetrain.calibration import Finding
from edgetrain.choice import Sizes, Tile, candidates, rule, trial
from edgetrain.devices import DeviceProfile
from edgetrain.graph import Graph
from edgetrain.learner import Learner
from edgetrain.optim import SGD

Tiles = Mapping[Sizes, Tile]
Say = Callable[[str], None]

# A median over rounds is trusted to a few percent on a machine that others use; a gain below is not worth a kernel.
_CLEAR_GAIN = 1.05
_SHORTEST_SECONDS = 2e-6  # products below this are noise and cost nothing
# Rounds of the two comparisons: at least, at most, and the seconds that decide in between.
_FIRST_ROUNDS, _LAST_ROUNDS, _ROUND_SECONDS = (5, 25), (15, 51), 2.0


def find_tiles(
    graph: Graph, profile: DeviceProfile, batch_size: int, *, threads: int | None = None,
    known: Mapping[str, Finding] | None = None, say: Say = lambda text: None,
) -> dict[str, Finding]:  # fmt: skip
    """Time the candidates for every product of a training step.

    Args:
        graph: the network.
        profile: of this machine.
        batch_size: samples of the step.
        threads: of the step; the profile's by default.
        known: findings, by label; their products are not measured again.
        say: is told what happens.

    Returns:
        A finding per product by ``choice.Sizes.label``; the rule's tile unless another one won clearly.
    """
    steps = _Steps(graph, profile, batch_size, threads)
    usual = steps.add({})
    products = [sizes for sizes in steps.products(usual) if sizes.label not in (known or {})]
    if not products:
        return {}
    tried = {sizes: candidates(sizes) for sizes in products}
    most = max(map(len, tried.values()))
    say(f"{count(len(products), 'product')}, up to {count(most, 'tile')} each")
    for number in range(1, most):
        steps.add({sizes: tiles[number] for sizes, tiles in tried.items() if number < len(tiles)})
    first, _ = steps.compare(*_FIRST_ROUNDS)
    best = {sizes: _best([gains.get(sizes, 0.0) for gains in first[: len(tiles)]]) for sizes, tiles in tried.items()}
    winners = {sizes: tried[sizes][number] for sizes, number in best.items() if number}
    say(f"{count(len(winners), 'candidate')} to compare with the rule again")
    steps.keep_first()
    steps.add(winners)
    (_, again), rounds = steps.compare(*_LAST_ROUNDS)
    return {sizes.label: _finding(sizes, winners.get(sizes), again.get(sizes, 0.0), rounds) for sizes in products}


def _best(gains: list[float]) -> int:
    """Return the number of the best candidate, 0 (the rule) if none is clearly better."""
    best = max(range(len(gains)), key=gains.__getitem__)
    return best if gains[best] >= _CLEAR_GAIN else 0


def _finding(sizes: Sizes, winner: Tile | None, gain: float, rounds: int) -> Finding:
    if winner is None or gain < _CLEAR_GAIN:
        return Finding(rule(sizes), rule(sizes), 1.0, rounds)
    return Finding(rule(sizes), winner, round(gain, 3), rounds)


def count(number: int, thing: str) -> str:
    """Return a number of things in words."""
    return f"{number} {thing}{'s' * (number != 1)}"


class _Steps:
    """Training steps of one network that differ in their tiles alone; they share one arena and one team of threads."""

    def __init__(self, graph: Graph, profile: DeviceProfile, batch_size: int, threads: int | None) -> None:
        self._graph, self._profile, self._batch_size, self._threads = graph, profile, batch_size, threads
        rng = np.random.default_rng(0)
        self._x = rng.standard_normal((batch_size, *graph.input_shape)).astype(np.float32)
        self._y = rng.integers(0, graph.num_classes, batch_size)
        self._learners: list[Learner] = []

    def add(self, tiles: Tiles) -> Learner:
        """Lower another step, with these tiles in place of the rule's."""
        # With a learning rate of 0 all steps compute the same numbers for ever.
        learner = Learner(self._graph, self._profile, batch_size=self._batch_size, threads=self._threads,
                          memory_budget=0, optimizer=SGD(lr=0.0, momentum=0.9))  # fmt: skip
        if self._learners:
            learner.plans.arena, learner.plans.team = self._learners[0].plans.arena, self._learners[0].plans.team
        with trial(tiles.get):
            learner.training_plan()
        self._learners.append(learner)
        return learner

    def keep_first(self) -> None:
        """Forget all steps but the first."""
        del self._learners[1:]

    def products(self, learner: Learner) -> list[Sizes]:
        """Return the different products of a step."""
        rows = learner.training_plan().rows
        return list(dict.fromkeys(row.choice.sizes for row in rows if row.choice is not None))

    def compare(self, fewest: int, most: int) -> tuple[list[dict[Sizes, float]], int]:
        """Run all steps in turn; return per step the gain over the first by product, medians, and the rounds taken.

        A product that is too short to be timed is left out.
        """
        warm = sum(sum(self._time(learner).values()) for learner in self._learners)
        rounds = min(most, max(fewest, round(_ROUND_SECONDS / max(warm, 1e-9))))
        gains: list[Any] = [defaultdict(list) for _ in self._learners]
        for _ in range(rounds):
            times = [self._time(learner) for learner in self._learners]
            for found, spent in zip(gains, times, strict=True):
                for sizes, seconds in spent.items():
                    if min(seconds, times[0][sizes]) >= _SHORTEST_SECONDS:
                        found[sizes].append(times[0][sizes] / seconds)
        whole = [{s: median(ratios) for s, ratios in found.items() if 2 * len(ratios) > rounds} for found in gains]
        return whole, rounds

    def _time(self, learner: Learner) -> dict[Sizes, float]:
        """Take one step; return the seconds of every product, packing of weights included."""
        seconds = learner.time_rows(self._x, self._y)
        spent: dict[Sizes, float] = defaultdict(float)
        for row, taken in zip(learner.training_plan().rows, seconds[:-1] - seconds[-1], strict=True):
            if row.choice is not None:
                spent[row.choice.sizes] += float(taken)
        return spent
