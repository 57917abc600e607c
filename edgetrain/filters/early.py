"""The early instance filter: a tiny network that predicts, before the main network runs, whose loss will be high.

Wu et al., "Enabling On-Device CNN Training by Self-Supervised Instance Filtering and Error Map Pruning", 2020,
section III. What differs from the paper, and why (docs/streams.md has what it reaches):

- The label is ``loss / (loss + threshold)`` instead of ``loss > threshold``: 1/2 at the threshold, and it still tells
  a high loss from a very high one. ``labels="hard"`` is the paper's, with its weights for the rarer class.
- An instance is kept with a probability that rises with its score, instead of above a fixed score of 0.3: the known
  kind of instance keeps its place in the training batches, and the kept share is the one that was asked for.
- Rejected instances are labelled by a draw whose probability is proportional to the entropy of the prediction, and
  weighted by its inverse, instead of all above an entropy: the filter learns from an unbiased sample of the stream,
  at a cost that does not depend on how sure it is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from edgetrain.arrays import Checked
from edgetrain.errors import NumericalError, UsageError
from edgetrain.filters.base import (
    Choice,
    Floats,
    Images,
    InstanceFilter,
    Judge,
    Labels,
    Lesson,
    Selector,
    instance_bytes,
)
from edgetrain.graph import Graph, Shape
from edgetrain.kernels.registry import KernelKey
from edgetrain.optim import SGD
from edgetrain.tensors import State, put_under, taken_from

# Share of the main network's forward operations that the filter may take.
_LARGEST_SHARE = 0.05
# Sides of the pooled image and widths of the hidden layer, tried in this order until the filter is small enough.
_SIZES = ((8, 16), (8, 8), (4, 16), (4, 8), (4, 4), (2, 4), (2, 2), (1, 2), (1, 1))
# Samples that a training step of the filter waits for: most of what it takes is the same for fewer. With 64, and half
# the learning rate, LeNet-5's stream took 0.44 of the time of training on everything instead of 0.42; at a rate of 0.28
# it learned 69.6 % of the rotated condition of docs/streams.md and 56.9 of the dark one, now 68.9 and 57.3 (10 seeds).
_LESSON = 128
# Samples put aside that are learned from at once, without a step of the main network to wait for: it would be long
# in coming where next to nothing is kept. No step of the filter takes more.
_FULL = 256
_QUEUE = ("x", "y", "weight", "loss")
_NETWORK = "network/"  # begins the names of the state's tensors that are of the tiny network
_UNKNOWN = -1.0
# How fast the threshold of the loss follows: two batches of 32 move it by 10 % at most.
_THRESHOLD_GAIN = 0.1 / 64
# The smallest score, and a floor under the entropy: nothing becomes impossible.
_LEAST = 0.01


@dataclass(frozen=True)
class EarlyInstanceFilter(InstanceFilter):
    """Keep the instances for which a tiny network predicts a high loss of the main network.

    The tiny network averages the image down to a few cells per side and has one hidden layer. Its size is the
    largest of a few that takes at most 5 % of the main network's forward operations, unless ``cells`` and ``hidden``
    say otherwise. Its whole cost is counted: predictions, training, and forward passes of the main network for labels.

    Attributes:
        rate, start: as ``InstanceFilter``; while everything passes the filter learns already.
        uncertain: share of the rejected instances that get a forward pass of the main network for a label.
        power: instances are kept with a probability proportional to this power of the score; above 100 exactly
            those above a threshold are kept. More finds more of a new condition and forgets more of the old ones.
        labels: "soft" or "hard", see the head of this file.
        lr: learning rate of the tiny network (SGD, momentum 0.9).
        cells, hidden: cells per side of the pooled image, width of the hidden layer; ``None`` derives them.

    Raises:
        UsageError: a number out of range.

    Example:
        >>> EarlyInstanceFilter(rate=0.25).uncertain
        0.05
    """

    start: int = 1024
    uncertain: float = 0.05
    power: float = 1.0
    labels: str = "soft"
    lr: float = 0.2
    cells: int | None = None
    hidden: int | None = None

    name: ClassVar[str] = "eif"

    def __post_init__(self) -> None:
        super().__post_init__()
        limits = self.limits
        limits.number("uncertain", lambda u: 0 <= u <= 1, "0 to 1: a share of the rejected instances", share=True)
        limits.number("power", lambda power: power > 0, "a number above 0")
        limits.require("labels", self.labels in ("soft", "hard"), "'soft' or 'hard'")
        limits.number("lr", lambda lr: 0 < lr < 10, "a number above 0 and below 10")
        for key in ("cells", "hidden"):
            value = getattr(self, key)
            whole = isinstance(value, int) and 1 <= value <= 1024
            limits.require(key, value is None or whole, "a whole number from 1 to 1024, or None")

    def check_network(self, graph: Graph) -> None:
        """Refuse a network with several inputs, or one that is too small for a filter of 5 % of its operations.

        Raises:
            UsageError: it is one of them.
        """
        super().check_network(graph)
        self.network(graph.input_shape, graph.macs())

    def selector(self, learner: Any, judge: Judge) -> Selector:
        """Return what decides for one learner, with a network of its own.

        Raises:
            UsageError: the main network is too small for a filter of 5 % of its operations.
        """
        return _Early(self, learner, judge)

    def network(self, input_shape: Shape, main_macs: int, seed: int = 0) -> Graph:
        """Return the tiny network.

        Args:
            input_shape: of the main network, without the batch.
            main_macs: multiply-accumulates of the main network's forward pass, per sample.
            seed: of the initial weights.

        Raises:
            UsageError: the main network is too small for a filter of 5 % of its operations.
        """
        sizes = [(self.cells or cells, self.hidden or hidden) for cells, hidden in _SIZES]
        for cells, hidden in sizes:
            graph = _tiny_network(input_shape, cells, hidden, seed)
            if (self.cells and self.hidden) or graph.macs() <= _LARGEST_SHARE * main_macs:
                return graph
        raise UsageError(
            f"EarlyInstanceFilter: the network's forward pass takes only {main_macs} multiply-accumulates, the "
            f"smallest filter {graph.macs()}, more than 5 % of them; give cells and hidden to use it all the same"
        )


class _Early(Selector):
    settings: EarlyInstanceFilter

    def __init__(self, settings: EarlyInstanceFilter, learner: Any, judge: Judge) -> None:
        super().__init__(settings, learner.seed)
        self._main, self._judge = learner, judge
        graph = settings.network(learner.graph.input_shape, judge.macs, learner.seed)
        # A learner like the main one; the class comes with it, for this file cannot import it. It runs on the threads
        # of the main one (``_inputs``), which are awake then: with threads of its own 256 predictions took 31 to 59 us
        # and a training step 21 to 94, so 23 and 13. Its memory is a part of the main learner's plan (``memory``), so
        # the budget is checked there.
        self._learner = learner.__class__(
            graph, learner.profile, batch_size=_FULL, seed=learner.seed, threads=learner.threads, loss="mse",
            memory_budget=0, optimizer=SGD(lr=settings.lr, momentum=0.9, clip_norm=1.0),
        )  # fmt: skip
        # Whoever uses it holds the main learner's lock; a lock of its own would be taken out of order by a fork.
        self._learner._lock = learner._lock
        self._macs = graph.macs()
        self._threshold, self._entropy = math.nan, 0.5
        self._queue = _Queue(_FULL + learner.batch_size)

    def decide(self, x: Images, y: Labels, losses: Floats | None) -> Choice:
        """Predict, keep by chance, and put some of the rejected aside for labels."""
        scores = np.maximum(self._scores(x), _LEAST)
        keep = self.rng.random(len(y)) < self.share.probabilities(scores, self.settings.power)
        self.share.count(keep)
        if self.settings.uncertain:
            known = np.full(len(y), _UNKNOWN) if losses is None else losses
            self._put_aside((x, y, known), scores, ~keep)
        return Choice(keep, len(y) * self._macs)

    def learn(self, x: Images, y: Labels, losses: Floats) -> Lesson:
        """Add samples that were trained on to those put aside, and learn when they are enough."""
        self._queue.add(x, y, np.ones(len(x)), losses)
        return self._lessons() if self._queue.count >= _LESSON else Lesson()

    def catch_up(self) -> Lesson:
        """Learn from those put aside when they are many."""
        return self._lessons() if self._queue.count >= _FULL else Lesson()

    @property
    def memory(self) -> dict[str, int]:
        """Bytes of the tiny network's largest step, and of the queue between calls.

        ``decide`` puts aside as many as it rejects at most, before ``catch_up`` learns from them: in one call with
        thousands of instances the queue is longer.
        """
        queue = self._queue.usual * (instance_bytes(self._main) + 16)  # with weight and loss
        return {"filter network": self._learner.memory_plan(_FULL).peak_bytes, "filter queue": queue}

    def _lessons(self) -> Lesson:
        """Learn from all that waits, in steps of about the same size."""
        columns = self._queue.take()
        count, steps = len(columns[0]), -(-len(columns[0]) // _FULL)
        bounds = [step * count // steps for step in range(steps + 1)]
        done = [self._lesson(*(c[first:last] for c in columns)) for first, last in pairwise(bounds)]
        return Lesson(sum(lesson.uncertain for lesson in done), sum(lesson.macs for lesson in done))

    def _lesson(self, x: Images, y: Labels, weights: Floats, losses: Floats) -> Lesson:
        """Take one training step; losses that are not known yet come from the main network."""
        unknown = losses == _UNKNOWN
        uncertain = int(unknown.sum())
        if uncertain:
            try:
                losses[unknown] = self._judge.losses(x[unknown], y[unknown])
            except NumericalError as error:
                return self._without(np.flatnonzero(unknown)[list(error.samples)], error, (x, y, weights, losses))
        self._follow(losses, weights)
        if self.settings.labels == "soft":
            target = losses / (losses + self._threshold)
        else:
            target = (losses > self._threshold).astype(np.float64)
            rate = self.settings.rate  # at 1 no loss is expected to be low, but some are
            weights = weights / np.where(target > 0, rate, max(1 - rate, _LEAST))
        step = self._train(x, target, weights / weights.mean())
        return Lesson(uncertain, uncertain * self._judge.executed() + step.macs_done)

    def _without(self, bad: NDArray[np.intp], error: NumericalError, columns: tuple[NDArray[Any], ...]) -> Lesson:
        """Take the step without samples that the main network cannot predict: they came in earlier calls.

        Raises:
            NumericalError: it can predict none, as its parameters are to blame.
        """
        if not len(bad):
            raise error
        rest = [np.delete(column, bad, axis=0) for column in columns]
        lesson = self._lesson(*rest) if len(rest[0]) else Lesson()
        return Lesson(lesson.uncertain + len(bad), lesson.macs + len(bad) * self._judge.executed())

    def kernels(self) -> list[KernelKey]:
        """Return the kernels of the tiny network."""
        kernels: list[KernelKey] = self._learner.kernels()
        return kernels

    @property
    def facts(self) -> dict[str, float]:
        """The threshold of the loss, and the filter's share of the main network's forward operations."""
        return {"threshold": self._threshold, "filter_share": self._macs / self._judge.macs}

    def state(self) -> State:
        """Return (tensors, plain data) for ``restore``: also of the tiny network."""
        tensors, meta = super().state()
        own, own_meta = self._learner.state()
        tensors |= put_under(_NETWORK, own)
        if self._queue.count:
            columns = zip(_QUEUE, self._queue.columns(), strict=True)
            tensors |= {f"queue/{name}": column.copy() for name, column in columns}
        threshold = None if math.isnan(self._threshold) else self._threshold
        return tensors, meta | {"network": own_meta, "threshold": threshold, "entropy": self._entropy}

    def restore(self, tensors: Mapping[str, NDArray[Any]], meta: Mapping[str, Any]) -> None:
        """Take the state that ``state`` returned."""
        super().restore(tensors, meta)
        self._learner.restore(taken_from(_NETWORK, tensors), meta["network"])
        self._threshold = math.nan if meta["threshold"] is None else float(meta["threshold"])
        self._entropy = float(meta["entropy"])
        if "queue/x" in tensors:
            self._queue.add(*(tensors[f"queue/{name}"] for name in _QUEUE))

    def _inputs(self, x: Images, root_weights: NDArray[Any]) -> Checked:
        own, main = self._learner, self._main
        own.graph.normalization = main.graph.normalization  # ``fit`` may have set it by now
        if own.plans.team is not main.plans.team:  # at first, and when the main learner has got another
            own.plans.use_team(main.plans.team)
        return Checked(input=x, root_weight=root_weights.astype(np.float32)[:, None])

    def _scores(self, x: Images) -> Floats:
        scores: Floats = self._learner.logits(self._inputs(x, np.ones(len(x))))[:, 0].astype(np.float64)
        return scores

    def _train(self, x: Images, target: Floats, weights: Floats) -> Any:
        # Weighted squared error without a kernel of its own: output and target times the root of the weight.
        roots = np.sqrt(weights)
        return self._learner.partial_fit(self._inputs(x, roots), (roots * target).astype(np.float32)[:, None])

    def _put_aside(self, samples: tuple[Images, Labels, Floats], scores: Floats, rejected: NDArray[np.bool_]) -> None:
        places = np.flatnonzero(rejected)
        if not len(places):
            return
        chosen = np.minimum(scores[places], 1 - _LEAST)  # and at least ``_LEAST``
        entropy = _LEAST - chosen * np.log(chosen) - (1 - chosen) * np.log(1 - chosen)
        follows = 1 - 0.99 ** max(1.0, len(places) / _FULL)  # a call with thousands counts as several
        self._entropy += follows * (float(entropy.sum()) / len(places) - self._entropy)
        entropy *= self.settings.uncertain / self._entropy
        drawn = np.flatnonzero(self.rng.random(len(places)) < entropy)
        if len(drawn):
            x, y, losses = samples
            places = places[drawn]
            self._queue.add(x[places], y[places], 1 / np.minimum(1.0, entropy[drawn]), losses[places])

    def _follow(self, losses: Floats, weights: Floats) -> None:
        """Move the threshold so that the wanted share of all instances, kept or not, has a higher loss."""
        if math.isnan(self._threshold):
            self._threshold = max(float(np.quantile(losses, 1 - self.settings.rate)), 1e-6)
        high = float((weights * (losses > self._threshold)).sum() / weights.sum())
        factor = math.exp(_THRESHOLD_GAIN * len(losses) * (high - self.settings.rate))
        self._threshold = max(self._threshold * factor, 1e-6)


class _Queue:
    """What waits to be learned from: samples, labels, weights, losses (``_UNKNOWN``: rejected and not judged yet).

    One copy into memory that stays: a list of arrays that are put together later copied everything twice, and each of
    them kept the block alive that it was a part of.

    Args:
        usual: samples there is always room for; more take memory until they are taken.
    """

    def __init__(self, usual: int) -> None:
        self.usual, self.count = usual, 0
        self._rows: list[NDArray[Any]] = []

    def add(self, *columns: NDArray[Any]) -> None:
        """Put samples behind those that wait."""
        first, last = self.count, self.count + len(columns[0])
        if not self._rows or last > len(self._rows[0]):
            older = self.columns() if first else columns
            self._rows = [np.empty((max(last, self.usual), *column.shape[1:]), column.dtype) for column in columns]
            for row, column in zip(self._rows, older, strict=True):
                row[:first] = column[:first]
        for row, column in zip(self._rows, columns, strict=True):
            row[first:last] = column
        self.count = last

    def columns(self) -> tuple[NDArray[Any], ...]:
        """Return views of all that waits."""
        return tuple(row[: self.count] for row in self._rows)

    def take(self) -> tuple[NDArray[Any], ...]:
        """Return all that waits and forget it; good until more is added."""
        taken, self.count = self.columns(), 0
        if len(taken[0]) > self.usual:
            self._rows = []
        return taken


def _tiny_network(input_shape: Shape, cells: int, hidden: int, seed: int) -> Graph:
    """Average down to ``cells`` per side, one hidden layer, one probability times ``root_weight``."""
    graph = Graph("filter", input_shape=input_shape)
    space = input_shape[1:]
    x = graph.inputs[0]
    if space:
        sizes = [max(1, size // cells) for size in space]
        x = graph.add("Flatten", [graph.add("AveragePool", [x], kernel_shape=sizes, strides=sizes)], axis=1)
    rng = np.random.default_rng(seed)
    (features,) = graph.values[x].shape
    for name, width in (("hidden", hidden), ("score", 1)):
        bound = math.sqrt(1 / features)
        weight = graph.parameter(f"{name}.weight", rng.uniform(-bound, bound, (width, features)))
        x = graph.add("Gemm", [x, weight, graph.parameter(f"{name}.bias", np.zeros(width))], name=name, transB=1)
        x, features = graph.add("Relu" if name == "hidden" else "Sigmoid", [x]), width
    root = graph.add_input("root_weight", (1,))
    graph.set_outputs([graph.add("Mul", [x, root])])
    return graph
