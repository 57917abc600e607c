"""Instances one at a time or a few: the filter looks, kept ones collect, full micro-batches are trained on.

``Learner.observe`` and, when there is an instance filter, ``Learner.fit`` both work through ``InstanceStream``. It
holds at most one micro-batch, and what the filter keeps, however long the stream runs.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgetrain.accounting import StepResult
from edgetrain.arrays import Checked
from edgetrain.filters import Choice, InstanceFilter, Judge, Lesson, Selector
from edgetrain.history import Totals
from edgetrain.kernels.registry import working_clock
from edgetrain.losses import sample_losses

if TYPE_CHECKING:
    from edgetrain.learner import Learner

Images = NDArray[np.float32]
Floats = NDArray[np.float64]
# Modes of ``observe``; their figures are never mixed.
MODES = ("train", "predict")
# Weight of the past in the fading accuracy (Gama, Sebastiao, Rodrigues, "On evaluating stream learning algorithms",
# Machine Learning 90, 2013, section 3.2): the last thousand instances or so count.
_FADING = 0.999


class InstanceStream:
    """What stands between arriving instances and training steps.

    Attributes:
        position: instances observed so far; where a resumed stream goes on.
        totals: sums by mode: ``"train"`` (a skipped instance costs the filter alone) and ``"predict"`` (every instance
            is predicted first, and costs the forward pass too).
    """

    def __init__(self, learner: Learner, instance_filter: InstanceFilter | None) -> None:
        # Weak, for the learner holds this: a cycle would keep a dropped learner's memory until the next collection.
        self._learner: Learner = weakref.proxy(learner)
        self._filter = instance_filter
        self._selector: Selector | None = None
        self._x: Images = np.zeros((0, *learner.graph.input_shape), np.float32)
        self._y: NDArray[Any] = np.zeros(0, np.int64)
        self._faded = np.zeros(2)  # sums of hits and of instances, both fading
        self.position = 0
        self.totals = {mode: Totals() for mode in MODES}

    @property
    def waiting(self) -> int:
        """Kept instances that wait for their micro-batch to fill."""
        return len(self._y)

    @property
    def accuracy(self) -> float:
        """Accuracy of predictions made before learning, over all predicted instances; NaN without any."""
        total = self.totals["predict"]
        return total.accuracy if total.judged else float("nan")

    @property
    def recent_accuracy(self) -> float:
        """The same with a fading memory of about a thousand instances; NaN without any."""
        return float(self._faded[0] / self._faded[1]) if self._faded[1] else float("nan")

    @property
    def facts(self) -> dict[str, float]:
        """Numbers that tell how the filter is doing."""
        return self._selector.facts if self._selector else {}

    def observe(self, x: Images, y: NDArray[Any], predict: bool) -> StepResult:
        """Take instances of a stream and count them; arguments as for ``offer``."""
        # Counted first: who goes on after a step that was not finite must not learn from the same instances again.
        self.position += len(y)
        result = self.offer(x, y, predict)
        judged = len(y) if predict else result.instances_trained
        self.totals["predict" if predict else "train"].add(result, result.seconds, judged)
        return result

    def offer(self, x: Images, y: NDArray[Any], predict: bool = False) -> StepResult:
        """Let the filter choose, collect what it keeps, and train on every micro-batch that is full.

        Args:
            x: float32 ``(N, *input_shape)``.
            y: labels ``(N,)``, or targets ``(N, *output_shape)``.
            predict: predict all of them first.
        """
        start, learner, count = working_clock(), self._learner, len(y)
        losses, hits = self._predicted(x, y) if predict else (None, None)
        choice = self._choose(x, y, losses)
        done = self._collect(x, y, choice.keep)
        steps, lessons = [step for step, _ in done], [lesson for _, lesson in done]
        kept, dense = int(choice.keep.sum()), learner.plans.dense_macs
        forward = count * learner.graph.macs() if predict else 0
        executed = count * learner.plans.forward_macs if predict else 0
        selection = choice.macs + sum(lesson.macs for lesson in lessons)
        saved = (count - kept) * dense - selection
        trained = _sum(steps, "instances_trained")
        if losses is not None and hits is not None:
            loss, correct = float(losses.mean()), int(hits.sum())
        else:
            loss = sum(s.loss * s.instances_trained for s in steps) / trained if trained else float("nan")
            correct = _sum(steps, "correct")
        return StepResult(
            loss, correct, count, trained,
            macs_dense=(count - kept) * dense + _sum(steps, "macs_dense") + forward,
            macs_done=selection + _sum(steps, "macs_done") + executed,
            seconds=working_clock() - start,
            instances_kept=kept,
            instances_uncertain=sum(lesson.uncertain for lesson in lessons),
            macs_selection=selection,
            saved_filter=saved,
            saved_weights=_sum(steps, "saved_weights") + forward - executed,
            **{name: _sum(steps, name) for name in ("saved_error_maps", "saved_activations")},
        )  # fmt: skip

    def flush(self) -> StepResult | None:
        """Train on the instances that wait, a smaller batch than usual; ``None`` when none do."""
        if not self.waiting:
            return None
        start = working_clock()
        step, lesson = self._train(*self._take(self.waiting))
        return replace(
            step, instances_seen=0, instances_kept=0, instances_uncertain=lesson.uncertain, macs_selection=lesson.macs,
            macs_done=step.macs_done + lesson.macs, saved_filter=-lesson.macs, seconds=working_clock() - start,
        )  # fmt: skip

    def kernels(self) -> list[tuple[str, tuple[int, ...]]]:
        """Return the kernels of the filter's own network, which is made for that."""
        return self._ready(self._filter).kernels() if self._filter else []

    def state(self) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
        """Return (tensors, plain data) for ``restore``; both empty when nothing came by."""
        if not (self.position or self.waiting or self._selector):
            return {}, {}
        tensors: dict[str, NDArray[Any]] = {"faded": self._faded.copy()}
        if self.waiting:
            tensors |= {"x": self._x.copy(), "y": self._y.copy()}
        meta: dict[str, Any] = {"position": self.position, "totals": {m: asdict(t) for m, t in self.totals.items()}}
        if self._selector is not None:
            own, meta["filter"] = self._selector.state()
            tensors |= {f"filter/{name}": array for name, array in own.items()}
        return tensors, meta

    def restore(self, tensors: Mapping[str, NDArray[Any]], meta: Mapping[str, Any]) -> None:
        """Take the state that ``state`` returned."""
        self.position, self._faded = int(meta["position"]), np.array(tensors["faded"])
        self.totals = {mode: Totals(**meta["totals"][mode]) for mode in MODES}
        if "x" in tensors:
            self._x, self._y = np.array(tensors["x"]), np.array(tensors["y"])
        if self._filter is not None and "filter" in meta:
            own = {name[7:]: array for name, array in tensors.items() if name.startswith("filter/")}
            self._ready(self._filter).restore(own, meta["filter"])

    def _predicted(self, x: Images, y: NDArray[Any]) -> tuple[Floats, NDArray[np.bool_]]:
        """Predict, and return the losses and which predictions were right."""
        logits = self._learner.logits(self._checked(x))
        hits = np.zeros(len(y), bool) if self._learner.loss == "mse" else logits.argmax(1) == y
        self._faded = self._faded * _FADING ** len(y) + (float(hits.sum()), len(y))
        return _losses_of(self._learner, logits, y), hits

    def _checked(self, x: Images) -> Checked:
        return Checked({self._learner.graph.inputs[0]: x})

    def _ready(self, instance_filter: InstanceFilter) -> Selector:
        """Make the selector when it is first needed: its network takes memory."""
        if self._selector is None:
            learner = self._learner
            judge = Judge(lambda x, y: _losses_of(learner, learner.logits(self._checked(x)), y), learner.graph.macs(),
                          lambda: learner.plans.forward_macs)  # fmt: skip
            self._selector = instance_filter.selector(learner, judge)
        return self._selector

    def _choose(self, x: Images, y: NDArray[Any], losses: Floats | None) -> Choice:
        if self._filter is None:
            return Choice(np.ones(len(y), bool), 0)
        return self._ready(self._filter).choose(x, y, losses)

    def _collect(self, x: Images, y: NDArray[Any], keep: NDArray[np.bool_]) -> list[tuple[StepResult, Lesson]]:
        """Put the kept behind those that wait, and train while there is a full micro-batch."""
        self._x = np.concatenate([self._x, x[keep]]) if self.waiting else x[keep]
        self._y = np.concatenate([self._y, y[keep]]) if self.waiting else y[keep]
        done = []
        while self.waiting >= self._learner.batch_size:
            done.append(self._train(*self._take(self._learner.batch_size)))
        return done

    def _take(self, size: int) -> tuple[Images, NDArray[Any]]:
        x, y = self._x[:size], self._y[:size]
        # A copy of the rest: a view would keep every batch it was ever a part of alive.
        self._x, self._y = self._x[size:].copy(), self._y[size:].copy()
        return x, y

    def _train(self, x: Images, y: NDArray[Any]) -> tuple[StepResult, Lesson]:
        step = self._learner.partial_fit(self._checked(x), y)
        lesson = self._selector.learn(x, y, _step_losses(self._learner, len(y))) if self._selector else Lesson()
        return step, lesson


def _losses_of(learner: Learner, logits: NDArray[np.float32], y: NDArray[Any]) -> Floats:
    return sample_losses(logits, y, learner.loss, learner.label_smoothing)


def _step_losses(learner: Learner, count: int) -> Floats:
    """Return the losses of the samples of the last training step, as it computed them before the update."""
    executor = learner.plans.executor(True, count)
    losses = executor.value(executor.plan.graph.values[learner.plans.training.losses], count)
    return losses.reshape(-1).astype(np.float64)


def _sum(steps: Sequence[StepResult], name: str) -> int:
    return sum(int(getattr(step, name)) for step in steps)
