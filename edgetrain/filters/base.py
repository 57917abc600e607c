"""What all instance filters share: the record a user writes, the decision, and keeping the wanted share."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from edgetrain.errors import CheckpointError, NumericalError, UsageError
from edgetrain.graph import Graph
from edgetrain.kernels.registry import KernelKey
from edgetrain.random_streams import FILTER, generator
from edgetrain.settings import Limits, take_numbers
from edgetrain.tensors import State

Floats = NDArray[np.float64]
Images = NDArray[np.float32]
Labels = NDArray[Any]

# Scores that the wanted share is taken over: long enough for 1 % of them to mean something, short enough to follow a
# network that learns.
_RECENT = 512
# What was kept too much or too little is made up for within about so many instances, or within the next block if that
# is larger.
_MAKE_UP = 128
# Above it a power of the scores is taken as infinite: powers of small scores underflow.
_LARGEST_POWER = 100.0


@dataclass(frozen=True)
class Judge:
    """The main network as a filter sees it.

    Attributes:
        losses: float64 ``(N,)`` of samples (x, y) from a forward pass in inference mode.
        macs: multiply-accumulates of that forward pass with dense weights, per sample.
        executed: returns those that it executes now; fewer where weights are sparse.
    """

    losses: Callable[[Images, Labels], Floats]
    macs: int
    executed: Callable[[], int]


@dataclass(frozen=True)
class Choice:
    """What a filter decided about samples ``(N, ...)``.

    Attributes:
        keep: bool ``(N,)``.
        macs: multiply-accumulates that the decision took.
    """

    keep: NDArray[np.bool_]
    macs: int


@dataclass(frozen=True)
class Lesson:
    """What a filter spent on learning: rejected samples judged by the main network, and multiply-accumulates."""

    uncertain: int = 0
    macs: int = 0


def instance_bytes(learner: Any) -> int:
    """Return the bytes that an instance and its label, or its targets, take while they wait."""
    label = 4 * math.prod(learner.graph.output_shape) if learner.loss == "mse" else 8
    return int(4 * math.prod(learner.graph.input_shape) + label)


@dataclass(frozen=True)
class InstanceFilter:
    """What a user writes.

    Attributes:
        rate: share of the instances to keep, above 0, at most 1.
        start: so many first instances all pass, however many come at a time.

    Raises:
        UsageError: a number out of range.
    """

    rate: float = 0.3
    start: int = 0

    name: ClassVar[str]

    def __post_init__(self) -> None:
        take_numbers(self, type(self).__name__)
        share = "above 0, at most 1: the share of instances to keep"
        self.limits.number("rate", lambda rate: 0 < rate <= 1, share, share=True)
        self.limits.number("start", lambda start: start >= 0 and start % 1 == 0, "a whole number of at least 0")

    @property
    def limits(self) -> Limits:
        """What checks a setting."""
        return Limits(self, type(self).__name__)

    def kept_of(self, count: int) -> int:
        """Return how many of the first ``count`` instances pass, as far as can be said beforehand."""
        first = min(count, self.start)
        return first + round(self.rate * (count - first))

    def check_network(self, graph: Graph) -> None:
        """Refuse a network that the filter does not suit.

        Raises:
            UsageError: it has several inputs, or is one for whose learner ``selector`` raises this.
        """
        if len(graph.inputs) > 1:
            names = ", ".join(graph.inputs)
            raise UsageError(
                f"{type(self).__name__}: the network '{graph.name}' has the inputs {names}, filters look at one; train "
                "it with partial_fit, without a filter"
            )

    def selector(self, learner: Any, judge: Judge) -> Selector:
        """Return what decides for one learner; called when the learner is made.

        Raises:
            UsageError: the filter does not suit the learner's network.
        """
        raise NotImplementedError


class Selector(ABC):
    """Decides which instances to keep; holds the filter's state.

    Args:
        settings: the filter's record.
        seed: of random decisions.
    """

    def __init__(self, settings: InstanceFilter, seed: int) -> None:
        self.settings = settings
        self.share = KeptShare(settings.rate)
        self.rng = generator(seed, FILTER)
        self.seen = 0

    def choose(self, x: Images, y: Labels, losses: Floats | None) -> Choice:
        """Decide about samples.

        Args:
            x: float32 ``(N, *input_shape)``.
            y: labels ``(N,)``.
            losses: float64 ``(N,)`` of the main network where a forward pass was made anyway, else ``None``.

        Raises:
            NumericalError: samples that a network cannot predict; nothing is decided then.
        """
        passing = min(len(y), max(0, self.settings.start - self.seen))
        keep, macs = np.ones(len(y), bool), 0
        if passing < len(y):
            try:
                rest = self.decide(x[passing:], y[passing:], None if losses is None else losses[passing:])
            except NumericalError as error:
                error.samples = tuple(passing + sample for sample in error.samples)
                raise
            keep[passing:], macs = rest.keep, rest.macs
        self.seen += len(y)  # last: samples that ``decide`` failed for have not been decided about
        return Choice(keep, macs)

    @abstractmethod
    def decide(self, x: Images, y: Labels, losses: Floats | None) -> Choice:
        """Decide about samples after the start; arguments as for ``choose``."""

    def learn(self, x: Images, y: Labels, losses: Floats) -> Lesson:
        """Learn from samples (x, y) that were trained on, with their losses float64 ``(N,)`` before the step."""
        return Lesson()

    def kernels(self) -> list[KernelKey]:
        """Return the kernels of the filter's own network, if it has one."""
        return []

    def catch_up(self) -> Lesson:
        """Learn from what was put aside if that has become too much to wait for a step of the main network."""
        return Lesson()

    @property
    def memory(self) -> dict[str, int]:
        """Bytes by purpose that the filter needs between calls beside the main network, for ``MemoryPlan``."""
        return {}

    @property
    def facts(self) -> dict[str, float]:
        """Numbers that tell how the filter is doing, for reports."""
        return {}

    def state(self) -> State:
        """Return (tensors, plain data) for ``restore``."""
        meta = {"seen": self.seen, "rng": self.rng.bit_generator.state, "surplus": self.share.surplus}
        meta["of"] = type(self.settings).__name__
        return {"recent": self.share.recent.copy()}, meta

    def restore(self, tensors: Mapping[str, NDArray[Any]], meta: Mapping[str, Any]) -> None:
        """Take the state that ``state`` returned.

        Raises:
            CheckpointError: it is of another filter, whose scores mean something else.
        """
        own = type(self.settings).__name__
        stored = meta.get("of", own)  # older checkpoints do not tell
        if stored != own:
            raise CheckpointError(f"the state belongs to another instance filter, {stored}; this learner has {own}")
        self.seen, self.share.surplus = int(meta["seen"]), float(meta["surplus"])
        self.rng.bit_generator.state = meta["rng"]
        self.share.recent = np.array(tensors["recent"], np.float64)


class KeptShare:
    """Turns scores into probabilities of being kept whose mean is the wanted share.

    The scale comes from the most recent scores, since scores drift while networks learn; what was kept too much or
    too little so far is made up for, so the share of a long stream converges to the wanted one.
    """

    def __init__(self, rate: float) -> None:
        self.rate, self.surplus = rate, 0.0
        self.recent = np.zeros(0)

    def probabilities(self, scores: Floats, power: float) -> Floats:
        """Return the probability of keeping each instance, ``min(1, c * score ** power)``.

        Args:
            scores: float64 ``(N,)``, at least 0; larger is kept rather.
            power: above 100, where powers of small scores underflow, as infinity: exactly those above a threshold are
                kept; equal ones that are the threshold share what is left.
        """
        if power > _LARGEST_POWER:
            self.remember(scores)
            return self._from_threshold(scores)
        weights = scores**power
        self.remember(weights)
        return np.minimum(1.0, _scale_for(self.recent, self.level(len(scores))) * weights)

    def quantiles(self, scores: Floats) -> Floats:
        """Return the share of the recent scores that are at most as large; of equal ones the middle of their ranks.

        Without ties every score's own rank counts. With them it must not: if all are equal, as in a picture that
        stands still, all would be the largest.
        """
        ordered = np.sort(self.recent)
        lower, upper = np.searchsorted(ordered, scores, "left"), np.searchsorted(ordered, scores, "right")
        ranks = np.where(upper - lower > 1, (lower + 1 + upper) / 2, upper)
        return ranks / len(ordered)

    def _from_threshold(self, scores: Floats) -> Floats:
        level, count = self.level(len(scores)), len(self.recent)
        threshold = np.quantile(self.recent, 1 - level)
        kept = (scores >= threshold).astype(np.float64)
        equal = np.count_nonzero(self.recent == threshold)
        if equal > 1:
            left = level * count - np.count_nonzero(self.recent > threshold)
            kept[scores == threshold] = min(1.0, max(0.0, left / equal))
        return kept

    def remember(self, scores: Floats) -> None:
        """Add scores to the recent ones; all of a larger block are: its last need not be like its first."""
        self.recent = np.concatenate([self.recent, scores])[-max(_RECENT, len(scores)) :]

    def level(self, count: int) -> float:
        """Return the share to keep of the next ``count``, which are decided about together.

        A block longer than ``_MAKE_UP`` makes up for the whole surplus and no more; otherwise blocks would in turn keep
        nearly nothing and nearly everything.
        """
        return min(1.0, max(0.1 * self.rate, self.rate - self.surplus / max(_MAKE_UP, count)))

    def count(self, keep: NDArray[np.bool_]) -> None:
        """Remember how many were kept too much or too little, ``_MAKE_UP`` or a block's length at most."""
        surplus, most = self.surplus + float(keep.sum()) - self.rate * len(keep), float(max(_MAKE_UP, len(keep)))
        self.surplus = max(-most, min(most, surplus))


def _scale_for(values: Floats, level: float) -> float:
    """Return c with ``mean(min(1, c * values)) == level``, or one that makes all positive values 1 if none is enough.

    The mean is concave in c, so Newton's method comes from below and ends after a few turns: 4 us for 1,024 values
    where sorting them took 13, of some 270 for a block of LeNet-5's stream.
    """
    wanted = level * len(values)
    scale, better = 0.0, wanted / max(float(values.sum()), 1e-300)
    while better > scale * (1 + 1e-12):
        scale = better
        inside = values[values * scale < 1.0]
        rest, left = float(inside.sum()), wanted - (len(values) - len(inside))
        better = left / rest if rest > 0 else scale
    return scale
