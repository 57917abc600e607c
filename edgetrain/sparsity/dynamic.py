"""Dynamic sparse training: weights are dropped and grown while the number of weights stays the same.

Sources: Evci, Gale, Menick, Castro, Elsen, "Rigging the Lottery: Making All Tickets Winners", ICML 2020, section 3
(RigL, and the shared schedule); Mocanu et al., "Scalable training of artificial neural networks with adaptive sparse
connectivity inspired by network science", Nature Communications 9, 2018 (SET).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from edgetrain.random_streams import GROWTH, generator
from edgetrain.sparsity.policy import (
    INDEX_BYTES,
    CompactPolicy,
    Gradients,
    block_of,
    largest,
    largest_missing,
    random_missing,
    random_missing_bytes,
)

if TYPE_CHECKING:
    from edgetrain.sparse_index import Positions
    from edgetrain.sparsity.layers import SparseLayer
    from edgetrain.sparsity.topology import Topology

# Returns where so many weights of a layer grow, besides those kept: positions in the flat ONNX array, int64 (count,).
Growth = Callable[["SparseLayer", int, "Positions"], "Positions"]
# RigL's experiments on ImageNet train for 32,000 steps; it serves where nobody says how long training is.
DEFAULT_TOTAL_STEPS = 32_000


@dataclass(frozen=True)
class DynamicPolicy(CompactPolicy):
    """Drop and grow on RigL's schedule.

    Every ``refresh`` steps, until the share ``until`` of training is done, each layer drops the smallest weights in
    absolute value and grows as many; the share of weights that changes falls as ``fraction / 2 * (1 + cos(pi * t /
    T_end))``. A new weight is 0 and so are its moments; one that is dropped and grown at once keeps both.

    Unlike the reference code, which leaves out the optimizer's step when the topology changes, every step is taken.

    Attributes:
        refresh: steps between changes.
        fraction: share of the weights that changes replace at the very beginning of training.
        until: share of training after which the topology stays.
        total_steps: length of training in steps, from the first step of all. ``None``: up to the end of the latest
            ``fit``; 32,000 where there was none, as ``partial_fit`` and ``observe`` know no end.
    """

    refresh: int = 100
    fraction: float = 0.3
    until: float = 0.75
    total_steps: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.limits.count("refresh")
        for key in ("fraction", "until"):
            self.limits.number(key, lambda share: 0 <= share <= 1, "a share from 0 to 1", share=True)
        if self.total_steps is not None:
            self.limits.count("total_steps")

    def replaced(self, step: int, total_steps: int | None) -> float:
        """Return the share of weights that the change after step ``step`` (from 0) replaces; 0 when there is none."""
        end = self.until * (self.total_steps or total_steps or DEFAULT_TOTAL_STEPS)
        done = step + 1
        if done % self.refresh or done >= end:
            return 0.0
        return self.fraction / 2 * (1 + math.cos(math.pi * done / end))

    def change_bytes(self, size: int, count: int) -> int:
        """Return about how much memory a change takes: for the choice, or for the index and what is moved with it.

        A weight that exists or is looked at takes up to 30 bytes of the choice (29 measured, as for ``INDEX_BYTES``).
        """
        return max(INDEX_BYTES * count, 30 * (count + block_of(size, int(self.fraction * count))))

    def changes_after(self, step: int, total_steps: int | None) -> bool:
        """Every ``refresh`` steps, until the last change."""
        return self.replaced(step, total_steps) > 0

    def after_step(self, topology: Topology, step: int, gradients: Gradients) -> None:
        """Drop and grow in every layer."""
        share = self.replaced(step, topology.total_steps)
        grown = self.growth(topology.seed, step, gradients)
        for layer in topology.layers:
            topology.set(layer, _replaced(topology, layer, share, grown))

    def growth(self, seed: int, step: int, gradients: Gradients) -> Growth:
        """Return what tells where weights grow after step ``step``; it is asked for every layer in order."""
        raise NotImplementedError


def _replaced(topology: Topology, layer: SparseLayer, share: float, grown: Growth) -> Positions:
    """Return where a layer's weights stand after the smallest ``share`` were dropped and others have grown."""
    present, weights = topology.existing(layer)
    kept = present[largest(np.abs(weights), len(present) - int(share * len(present)))]
    return np.sort(np.concatenate([kept, grown(layer, len(present) - len(kept), kept)]))


@dataclass(frozen=True)
class RigL(DynamicPolicy):
    """RigL: grow where the gradient is largest.

    The gradients of weights that do not exist are computed at changes only, into memory that activations have left.

    Example:
        >>> policy = RigL(weights=0.9)
        >>> policy.replaced(98, 10_000), round(policy.replaced(99, 10_000), 4), policy.replaced(7499, 10_000)
        (0.0, 0.2999, 0.0)
    """

    name: ClassVar[str] = "rigl"

    @property
    def wants_gradients(self) -> bool:
        """Some steps need the gradients of weights that do not exist."""
        return True

    def wants_gradients_at(self, step: int, total_steps: int | None) -> bool:
        """Those after which the topology changes."""
        return self.changes_after(step, total_steps)

    def growth(self, seed: int, step: int, gradients: Gradients) -> Growth:
        """Where the gradients' absolute values are largest."""

        def grown(layer: SparseLayer, count: int, kept: Positions) -> Positions:
            flat = gradients(layer.weight).reshape(-1)
            return largest_missing(lambda first, last: np.abs(flat[first:last]), layer.size, count, kept)

        return grown


@dataclass(frozen=True)
class SET(DynamicPolicy):
    """Sparse evolutionary training: grow at random, on RigL's schedule.

    Example:
        >>> SET(weights=0.9, refresh=1500).refresh
        1500
    """

    name: ClassVar[str] = "set"

    def change_bytes(self, size: int, count: int) -> int:
        """Return about how much memory a change takes, as for any dynamic policy: nothing is looked at."""
        return max(INDEX_BYTES * count, random_missing_bytes(size, int(self.fraction * count)) + 22 * count)

    def growth(self, seed: int, step: int, gradients: Gradients) -> Growth:
        """At random: drawn for one layer after another, anew for every step."""
        rng = generator(seed, GROWTH, step)
        return lambda layer, count, kept: random_missing(rng, layer.size, count, kept)
