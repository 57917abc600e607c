"""What every sparsity policy decides, and what they share."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from numpy.typing import NDArray

from edgetrain.densities import DISTRIBUTIONS
from edgetrain.graph import Graph
from edgetrain.optim import Optimizer
from edgetrain.settings import Limits, take_numbers
from edgetrain.sparse_index import Positions
from edgetrain.sparsity.layers import SparseLayer, entries, shapes_of, sparse_layers

if TYPE_CHECKING:
    from edgetrain.autodiff import TrainingGraph
    from edgetrain.sparsity.topology import Topology

Floats = NDArray[np.float32]
Mask = NDArray[np.bool_]
# Returns the scores of weights from a first position of the flat ONNX array to a last one, float32.
Scores = Callable[[int, int], Floats]
# Most weights that are looked at together where looking at all of a layer would take a dense copy; of a smaller one a
# quarter, but no fewer than the other number: each round costs some 20 us.
_BLOCK, _FEWEST = 1 << 16, 1 << 12
# What writing another topology takes for a weight that exists, places and what is moved to them: 48 bytes were measured
# in convolutions, 57 in MatMul (test_the_plan_tells_what_a_change_takes).
INDEX_BYTES = 58
# Returns the gradient of all of a sparse layer's weights by the weights' name, in ONNX shape.
Gradients = Callable[[str], Floats]


@dataclass(frozen=True)
class SparsityPolicy:
    """Decides which weights exist. Sparsity is a share of zeros.

    Attributes:
        weights: share of zeros among the weights of all sparse layers.

    Raises:
        UsageError: a value out of range.
    """

    weights: float = 0.9

    name: ClassVar[str]
    # Whether weights, gradients and moments are stored for the weights that exist only.
    compact: ClassVar[bool] = True

    def __post_init__(self) -> None:
        take_numbers(self, self.name)
        self._check_zeros("weights")

    @property
    def limits(self) -> Limits:
        """What checks a setting."""
        return Limits(self, self.name)

    def _check_zeros(self, key: str) -> None:
        self.limits.number(key, lambda share: 0 <= share < 1, "a share of zeros from 0 to below 1", share=True)

    def change_bytes(self, size: int, count: int) -> int:
        """Return about how much memory a change of a layer's topology takes between steps, 0 where there is none.

        Args:
            size: of the layer's weights.
            count: of those that may exist.
        """
        return 0

    def layers(self, graph: Graph) -> list[SparseLayer]:
        """Return the layers that this policy makes sparse."""
        return sparse_layers(graph, *self.dense_ends)

    @property
    def dense_ends(self) -> tuple[bool, bool]:
        """Whether the first and the last layer stay dense."""
        return False, False

    @property
    def skips_nothing(self) -> bool:
        """Whether the settings ask for dense training."""
        return self.weights == 0

    def densities(self, layers: Sequence[SparseLayer]) -> dict[str, float]:
        """Return the share of weights that every layer keeps, by weight."""
        raise NotImplementedError

    def densities_for(self, layers: Sequence[SparseLayer], arrays: Mapping[str, Floats]) -> dict[str, float]:
        """Return the share of weights that every layer keeps of given arrays, by weight.

        Weights that are sparse enough in all, but not layer by layer, were shared out by another rule or by momentum:
        their layers go on with the densities that they have.
        """
        densities = self.densities(layers)
        counts = {layer.weight: int(np.count_nonzero(arrays[layer.weight])) for layer in layers}
        fits = all(counts[layer.weight] <= entries(layer.size, densities[layer.weight]) for layer in layers)
        # Every layer's number is rounded up.
        most = (1 - self.weights) * sum(layer.size for layer in layers) + len(layers)
        if fits or sum(counts.values()) > most:
            return densities
        return {layer.weight: max(1, counts[layer.weight]) / layer.size for layer in layers}

    def capacity(self, layer: SparseLayer, density: float) -> int:
        """Return the most weights that a layer will ever have."""
        return entries(layer.size, density)

    def initial(
        self, layer: SparseLayer, array: Floats, density: float, rng: np.random.Generator, trained: bool
    ) -> tuple[Mask, float]:
        """Return which weights exist when a layer is given values, and the factor that they are multiplied with.

        Args:
            layer: the layer.
            array: its values in ONNX shape.
            density: share of weights to keep.
            rng: of random patterns.
            trained: whether the values come from training, or a file, and not from a builder.
        """
        raise NotImplementedError

    def beginning(self, trained: bool) -> str:
        """Return what ``initial`` does, as text."""
        raise NotImplementedError

    def check(self, optimizer: Optimizer) -> None:
        """Refuse an optimizer that the policy cannot work with.

        Raises:
            UsageError: it lacks what the policy reads.
        """

    def rewrite(self, train: TrainingGraph, layers: Sequence[SparseLayer], lanes: int) -> dict[str, int]:
        """Change the training graph of a network with these layers; return the records that this made, by weight.

        ``lanes``: samples in a vector; 0: lanes hold channels, and there are no kernels for lists of activations.
        """
        return {}

    @property
    def needs_lists(self) -> bool:
        """Whether ``rewrite`` can do nothing else than make lists."""
        return False

    def prunes_activations(self, layers: Sequence[SparseLayer]) -> bool:
        """Whether ``rewrite`` changes the training graph of a network with these layers."""
        return False

    # --- during training; steps count from 0 ---

    @property
    def wants_gradients(self) -> bool:
        """Whether some steps need the gradients of weights that do not exist."""
        return False

    def wants_gradients_at(self, step: int, total_steps: int | None) -> bool:
        """Whether ``after_step`` of this step needs them."""
        return False

    def changes_before(self, step: int) -> bool:
        """Whether there is a change before a step."""
        return False

    def changes_after(self, step: int, total_steps: int | None) -> bool:
        """Whether there is a change after a step."""
        return False

    def before_step(self, topology: Topology, step: int) -> None:
        """Change the topology before a step of which ``changes_before`` is true."""

    def after_step(self, topology: Topology, step: int, gradients: Gradients) -> None:
        """Change the topology after a step of which ``changes_after`` is true."""


@dataclass(frozen=True)
class CompactPolicy(SparsityPolicy):
    """What policies share whose weights, gradients and moments exist for non-zeros only.

    Attributes:
        distribution: of densities over layers: ``"erk"`` (Erdos-Renyi-kernel) or ``"uniform"``.
        initial_pattern: ``"random"`` (weights are then scaled by the root of all over those left, as fewer add up), or
            ``"magnitude"``: the largest stay as they are; ``None``: magnitude for trained weights (of an .onnx file,
            of ``load_parameters``, of a graph that a learner trained: ``Graph.trained``), random for those of a
            builder. A layer that already has as many zeros as asked for keeps its pattern in all cases; weights that
            are sparse enough in all, but not layer by layer, do when the learner is made, with their densities.
            ``load_parameters`` cannot do that: a learner's layers have room for the densities that it was made with.
        dense_first: whether the first layer stays dense; ``None``: with uniform densities, as in RigL's experiments.
        dense_last: whether the last layer stays dense.
    """

    distribution: str = "erk"
    initial_pattern: str | None = None
    dense_first: bool | None = None
    dense_last: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.limits.one_of("distribution", DISTRIBUTIONS)
        if self.initial_pattern is not None:
            self.limits.one_of("initial_pattern", ("random", "magnitude"))
        self.limits.flag("dense_first", optional=True)
        self.limits.flag("dense_last")

    @property
    def dense_ends(self) -> tuple[bool, bool]:
        """Whether the first and the last layer stay dense."""
        return self.distribution == "uniform" if self.dense_first is None else self.dense_first, self.dense_last

    def densities(self, layers: Sequence[SparseLayer]) -> dict[str, float]:
        """Return the densities of the distribution."""
        return DISTRIBUTIONS[self.distribution](shapes_of(layers), 1 - self.weights)

    def initial(
        self, layer: SparseLayer, array: Floats, density: float, rng: np.random.Generator, trained: bool
    ) -> tuple[Mask, float]:
        """Return a random pattern or that of the largest weights, or the given one where there is one."""
        count = entries(layer.size, density)
        if self._pattern(trained) == "magnitude" or 0 < np.count_nonzero(array) <= count:
            scores = rng.random(layer.shape, np.float32)  # zeros that may become weights, when there are too many
            scores -= 2
            return largest(np.abs(array, out=scores, where=array != 0), count), 1.0
        mask = np.zeros(layer.size, bool)
        mask[rng.choice(layer.size, count, replace=False, shuffle=False)] = True
        # By how many there are: of 18 weights one is left at density 0.0001, which must not become 100 times as large.
        return mask.reshape(layer.shape), math.sqrt(layer.size / count)

    def beginning(self, trained: bool) -> str:
        """Return which pattern ``initial`` chooses, as text."""
        if self._pattern(trained) == "magnitude":
            return "begins with the largest of the given weights (initial_pattern=random draws a pattern)"
        return "begins with a random pattern, its weights scaled (initial_pattern=magnitude keeps the largest)"

    def _pattern(self, trained: bool) -> str:
        return self.initial_pattern or ("magnitude" if trained else "random")


def largest(scores: Floats, count: int) -> Mask:
    """Return where the ``count`` largest scores stand; of equal ones the first.

    Example:
        >>> largest(np.array([1.0, 3.0, 1.0, 2.0], np.float32), 3).tolist()
        [True, True, False, True]
    """
    if count <= 0:
        return np.zeros(scores.shape, bool)
    flat = scores.reshape(-1)
    # A partition instead of a sort: 0.5 ms instead of 4 ms for 48,000 weights (fc1 of LeNet-5).
    threshold = np.partition(flat, flat.size - count)[flat.size - count]
    mask: Mask = flat > threshold
    mask[np.flatnonzero(flat == threshold)[: count - np.count_nonzero(mask)]] = True
    return mask.reshape(scores.shape)


def block_of(size: int, count: int) -> int:
    """Return how many of ``size`` scores are looked at together where ``count`` are wanted."""
    return min(size, max(count, min(_BLOCK, size // 4 + 1), _FEWEST))


def largest_missing(scores: Scores, size: int, count: int, taken: Positions) -> Positions:
    """Return where the ``count`` largest of ``size`` scores stand, besides those taken; of equal ones the first.

    Scores are looked at in blocks, so memory is proportional to ``count``, not to ``size``.

    Args:
        scores: of all, at least 0; asked once for every block, for an array of its own.
        size, count: numbers of scores, and of those wanted; with those taken at most ``size``.
        taken: ascending positions that are not to be chosen.

    Returns:
        Ascending positions int64 ``(count,)``.

    Example:
        >>> scores = np.array([1.0, 3.0, 1.0, 2.0], np.float32)
        >>> largest_missing(lambda first, last: scores[first:last], 4, 2, np.array([1])).tolist()
        [0, 3]
    """
    found, best = np.zeros(0, np.int64), np.zeros(0, np.float32)
    block = block_of(size, count)
    for first in range(0, size if count else 0, block):
        last = min(size, first + block)
        part = scores(first, last)
        part[taken[slice(*np.searchsorted(taken, (first, last)))] - first] = -1
        # Of those equal to the least there are, none: it would come later.
        new = np.flatnonzero(part > best.min() if len(best) == count else part != -1)
        found, best = np.concatenate([found, first + new]), np.concatenate([best, part[new]])
        chosen = largest(best, min(count, len(best)))
        found, best = found[chosen], best[chosen]
    return found


def random_missing(rng: np.random.Generator, size: int, count: int, taken: Positions) -> Positions:
    """Return ``count`` of the positions 0 to ``size`` besides those taken, drawn at random.

    Ranks among the free ones are drawn, instead of a number for every position, of which the largest count: for all
    layers of LeNet-5 with a tenth of their weights that takes 0.09 ms instead of 0.43.

    Args:
        rng: what draws.
        size, count: numbers of positions, and of those wanted; with those taken at most ``size``.
        taken: ascending.

    Returns:
        Ascending positions int64 ``(count,)``.

    Example:
        >>> random_missing(np.random.default_rng(0), 4, 2, np.array([0, 2])).tolist()
        [1, 3]
    """
    ranks = np.sort(rng.choice(size - len(taken), count, replace=False, shuffle=False))
    return ranks + np.searchsorted(taken - np.arange(len(taken)), ranks, side="right")


def random_missing_bytes(size: int, count: int) -> int:
    """Return about what memory ``random_missing`` takes beside its result: NumPy shuffles all ranks to draw many."""
    return 8 * size if 20 * count > size else 0
