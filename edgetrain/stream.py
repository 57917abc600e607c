"""Instances one at a time or a few: the filter looks, kept ones collect, full micro-batches are trained on.

``Learner.observe`` and, when there is an instance filter, ``Learner.fit`` both work through ``InstanceStream``. Between
calls it holds less than one micro-batch, and what the filter has put aside to learn from, however long the stream
runs; within a call, and after one in which a step failed, also what is kept, or put aside, of the call's instances.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgetrain.accounting import StepResult, left_out
from edgetrain.arrays import Checked
from edgetrain.errors import CheckpointError, NumericalError
from edgetrain.filters import Choice, Judge, Lesson, Selector
from edgetrain.filters.base import Floats, Images, instance_bytes
from edgetrain.history import Totals
from edgetrain.kernels.registry import KernelKey, working_clock
from edgetrain.losses import sample_losses
from edgetrain.tensors import State, Tensors, put_under, taken_from

if TYPE_CHECKING:
    from edgetrain.learner import Learner

# Modes of ``observe``; their figures are never mixed.
MODES = ("train", "predict")
# Weight of the past in the fading accuracy (Gama, Sebastiao, Rodrigues, "On evaluating stream learning algorithms",
# Machine Learning 90, 2013, section 3.2): the last thousand instances or so count.
_FADING = 0.999
_FILTER = "filter/"  # begins the names of the state's tensors that are of the filter


@dataclass
class _Done:
    """What a call has done so far; counted when it ends, also by an error."""

    start: float
    choice: Choice
    losses: Floats | None = None
    hits: NDArray[np.bool_] | None = None
    steps: list[StepResult] = field(default_factory=list)
    lessons: list[Lesson] = field(default_factory=list)


class InstanceStream:
    """What stands between arriving instances and training steps.

    A call that fails leaves consistent books. When a prediction or the filter fails, nothing has happened: position
    and totals are as before, and the same instances may come again. When a training step fails, all instances of the
    call have been observed, and position and totals tell what was done; those of the failed step are dropped, for
    with the same parameters it would fail again, and the others wait, as far as they are no more than a micro-batch or
    what this call has kept: where every step fails, the oldest are dropped, too. So ``instances_kept`` less
    ``instances_trained`` less ``waiting`` is the number of dropped ones, and who goes on at ``position`` repeats none.

    Users call ``Learner.observe`` and ``Learner.flush``, which hold the learner's lock.

    Attributes:
        position: instances observed so far; where a resumed stream goes on.
        totals: sums by mode: ``"train"`` (a skipped instance costs the filter alone) and ``"predict"`` (every instance
            is predicted first, and costs the forward pass too).
        latest: what the latest ``observe`` or ``offer`` did, also one that failed; ``None`` when that was nothing.

    Raises:
        UsageError: the filter does not suit the learner's network.
    """

    def __init__(self, learner: Learner) -> None:
        # Weak, for the learner holds this: a cycle would keep a dropped learner's memory until the next collection.
        self._learner: Learner = weakref.proxy(learner)
        self._selector: Selector | None = None
        chosen = learner.instance_filter
        if chosen is not None:
            chosen.check_network(learner.graph)
            self._selector = chosen.selector(self._learner, _judge(self._learner))
        self._x: Images = np.zeros((0, *learner.graph.input_shape), np.float32)
        self._y: NDArray[Any] = np.zeros(0, np.int64)
        self._faded = np.zeros(2)  # sums of hits and of instances, both fading
        self._mode = MODES[0]  # of the latest observed instances
        self._has_classes = learner.loss != "mse"  # else there are no hits
        self.position = 0
        self.totals = {mode: Totals() for mode in MODES}
        self.latest: StepResult | None = None

    @property
    def waiting(self) -> int:
        """Kept instances that wait for their micro-batch to fill."""
        return len(self._y)

    def behind_waiting(self, x: Images) -> Images:
        """Return images ``(N, *input_shape)`` behind those that wait: the next steps take them, if the filter does."""
        return np.concatenate([self._x, x]) if self.waiting else x

    @property
    def accuracy(self) -> float:
        """Accuracy of predictions made before learning, over all predicted instances; NaN without any or for "mse"."""
        total = self.totals["predict"]
        return total.accuracy if total.judged and self._has_classes else float("nan")

    @property
    def recent_accuracy(self) -> float:
        """The same with a fading memory of about a thousand instances; NaN without any."""
        return float(self._faded[0] / self._faded[1]) if self._faded[1] else float("nan")

    @property
    def seen(self) -> int:
        """Instances that the filter has decided about, here or in ``fit``; 0 without a filter."""
        return self._selector.seen if self._selector else 0

    @property
    def facts(self) -> dict[str, float]:
        """Numbers that tell how the filter is doing."""
        return self._selector.facts if self._selector else {}

    @property
    def memory(self) -> dict[str, int]:
        """Bytes by purpose that filtering needs between calls beside the network's plan, for ``MemoryPlan``."""
        if self._selector is None:
            return {}
        return {"waiting instances": self._learner.batch_size * instance_bytes(self._learner), **self._selector.memory}

    def observe(self, x: Images, y: NDArray[Any], predict: bool) -> StepResult:
        """Take instances of a stream and count them in ``position`` and ``totals``.

        Args:
            x: float32 ``(N, *input_shape)``.
            y: labels ``(N,)``, or targets ``(N, *output_shape)``.
            predict: predict all of them first.
        """
        return self._take_in(x, y, predict, observed=True)

    def offer(self, x: Images, y: NDArray[Any]) -> StepResult:
        """Take instances of a data set, which has a history of its own; arguments as for ``observe``."""
        return self._take_in(x, y, False, observed=False)

    def flush(self, observed: bool = False) -> StepResult | None:
        """Train on the instances that wait, the last batch smaller than usual; ``None`` when none do.

        Args:
            observed: count it in ``totals``, in the mode of the latest ``observe``.
        """
        if not self.waiting:
            return None
        done = _Done(working_clock(), Choice(np.zeros(0, bool), 0))
        try:
            _raise(self._train_waiting(done, least=1))
        finally:
            result = self._result(done)
            if observed:
                judged = result.instances_trained if self._mode == "train" else 0
                self.totals[self._mode].add(result, result.seconds, judged)
        return result

    def leave_out(self, count: int, predict: bool) -> StepResult:
        """Pass over the next instances of a stream, which cannot be predicted: they count as seen, and as nothing else.

        Args:
            count: of these instances.
            predict: whether the stream predicts first.
        """
        result = left_out(count)
        self.position += count
        self.totals[MODES[predict]].add(result, 0.0, judged=0)
        return result

    def kernels(self) -> list[KernelKey]:
        """Return the kernels of the filter's own network."""
        return self._selector.kernels() if self._selector else []

    def state(self) -> State:
        """Return (tensors, plain data) for ``restore``; both empty when nothing came by."""
        if not (self.position or self.waiting or (self._selector and self._selector.seen)):
            return {}, {}
        tensors: Tensors = {"faded": self._faded.copy()}
        if self.waiting:
            tensors |= {"x": self._x.copy(), "y": self._y.copy()}
        totals = {mode: asdict(total) for mode, total in self.totals.items()}
        meta: dict[str, Any] = {"position": self.position, "mode": self._mode, "totals": totals}
        if self._selector is not None:
            own, meta["filter"] = self._selector.state()
            tensors |= put_under(_FILTER, own)
        return tensors, meta

    def restore(self, tensors: Mapping[str, NDArray[Any]], meta: Mapping[str, Any]) -> None:
        """Take the state that ``state`` returned.

        Raises:
            CheckpointError: it is of a stream with another filter, or with one where here is none.
        """
        if (self._selector is None) == ("filter" in meta):
            theirs, ours = ("one", "none") if self._selector is None else ("none", "one")
            raise CheckpointError(f"the state belongs to another instance filter: {theirs}, this learner has {ours}")
        self.position, self._faded = int(meta["position"]), np.array(tensors["faded"])
        self._mode = meta.get("mode", MODES[0])
        self.totals = {mode: Totals(**meta["totals"][mode]) for mode in MODES}
        if "x" in tensors:
            self._x, self._y = np.array(tensors["x"]), np.array(tensors["y"])
        if self._selector is not None and "filter" in meta:
            self._selector.restore(taken_from(_FILTER, tensors), meta["filter"])

    def _take_in(self, x: Images, y: NDArray[Any], predict: bool, observed: bool) -> StepResult:
        """Let the filter choose, collect what it keeps, and train on every micro-batch that is full."""
        start, self.latest = working_clock(), None
        losses, hits = self._predicted(x, y) if predict else (None, None)
        # The averaged parameters predict; the filter chooses for those that are trained.
        choice = self._choose(x, y, None if self._learner.averages else losses)
        done = _Done(start, choice, losses, hits)
        self._collect(x, y, choice.keep)  # what breaks into that leaves all as it was
        self.position += len(y) if observed else 0  # now: they wait, or are trained on, whatever breaks in
        try:
            interrupt = self._train_waiting(done, least=self._learner.batch_size, whole=not observed)
            self._catch_up(done)
            _raise(interrupt)
        except NumericalError:
            with suppress(NumericalError):  # what was put aside must not pile up where every step fails
                self._catch_up(done)
            raise
        finally:
            self.latest = result = self._result(done)
            if observed:
                self._count(result, done)
        return result

    def _catch_up(self, done: _Done) -> None:
        if self._selector is not None:
            done.lessons.append(self._selector.catch_up())

    def _count(self, result: StepResult, done: _Done) -> None:
        """Count observed instances in the totals."""
        count, hits = result.instances_seen, done.hits
        self._mode = "train" if hits is None else "predict"
        if hits is not None and self._has_classes:
            self._faded = self._faded * _FADING**count + (float(hits.sum()), count)
        self.totals[self._mode].add(result, result.seconds, result.instances_trained if hits is None else count)

    def _result(self, done: _Done) -> StepResult:
        """Return what a call did."""
        learner, steps, choice = self._learner, done.steps, done.choice
        count, kept, dense = len(choice.keep), int(choice.keep.sum()), learner.plans.dense_macs
        forward = executed = 0
        if done.losses is not None:
            forward, executed = count * learner.graph.macs(), count * learner.plans.forward_macs
        selection = choice.macs + sum(lesson.macs for lesson in done.lessons)
        saved = (count - kept) * dense - selection
        trained = _sum(steps, "instances_trained")
        if done.losses is not None and done.hits is not None:
            loss, correct = float(done.losses.mean()), int(done.hits.sum())
        else:
            loss = sum(s.loss * s.instances_trained for s in steps) / trained if trained else float("nan")
            correct = _sum(steps, "correct")
        return StepResult(
            loss, correct, count, trained,
            macs_dense=(count - kept) * dense + _sum(steps, "macs_dense") + forward,
            macs_done=selection + _sum(steps, "macs_done") + executed,
            seconds=working_clock() - done.start,
            instances_kept=kept,
            instances_uncertain=sum(lesson.uncertain for lesson in done.lessons),
            macs_selection=selection,
            saved_filter=saved,
            saved_weights=_sum(steps, "saved_weights") + forward - executed,
            **{name: _sum(steps, name) for name in ("saved_error_maps", "saved_activations")},
        )  # fmt: skip

    def _predicted(self, x: Images, y: NDArray[Any]) -> tuple[Floats, NDArray[np.bool_]]:
        """Predict, and return the losses and which predictions were right."""
        logits = self._learner.logits(_checked(self._learner, x))
        hits = logits.argmax(1) == y if self._has_classes else np.zeros(len(y), bool)
        return _losses_of(self._learner, logits, y), hits

    def _choose(self, x: Images, y: NDArray[Any], losses: Floats | None) -> Choice:
        if self._selector is None:
            return Choice(np.ones(len(y), bool), 0)
        return self._selector.choose(x, y, losses)

    def _collect(self, x: Images, y: NDArray[Any], keep: NDArray[np.bool_]) -> None:
        """Put the instances to keep behind those that wait, in one copy.

        Of 256 images (LeNet-5) a third is kept in 39 us so; in 57 when it was copied before it was put there.
        """
        waiting, places = self.waiting, np.flatnonzero(keep)
        if not len(places):
            return
        if not waiting and len(places) == len(y) >= self._learner.batch_size:
            self._x, self._y = x, y  # no copy: steps read them in this call, and what they leave is copied
            return
        images = np.empty((waiting + len(places), *x.shape[1:]), np.float32)
        images[:waiting] = self._x
        np.take(x, places, axis=0, out=images[waiting:], mode="clip")  # "raise", the default, takes a copy of its own
        self._x, self._y = images, np.concatenate([self._y, y[places]]) if waiting else y[places]

    def _train_waiting(self, done: _Done, least: int, whole: bool = False) -> BaseException | None:
        """Train on micro-batches as long as at least so many instances wait; those of a step that fails are gone.

        Returns:
            The interrupt (Ctrl-C, or what else a signal's handler raises, ``SystemExit`` for one) that struck a step
            which was taken, to be raised when the filter has learned from it, too. With ``whole`` the other
            micro-batches come first: so a ``fit`` that is called again has done the same.
        """
        x, y, last, interrupt = self._x, self._y, 0, None
        try:
            while len(y) - last >= least and (whole or interrupt is None):
                end, before = min(last + self._learner.batch_size, len(y)), self._learner.step_count
                began, known = working_clock(), len(done.steps)
                try:
                    done.steps.append(self._learner.partial_fit(_checked(self._learner, x[last:end]), y[last:end]))
                except BaseException as struck:
                    if self._learner.step_count == before:
                        if isinstance(struck, Exception):
                            last = max(end, len(y) - max(self._learner.batch_size, int(done.choice.keep.sum())))
                        raise  # after an interrupt that left no step they wait
                    interrupt = struck
                    done.steps[known:] = [_step_result(self._learner, end - last, working_clock() - began)]
                first, last = last, end
                if self._selector is not None:
                    losses = _step_losses(self._learner, last - first)
                    done.lessons.append(self._selector.learn(x[first:last], y[first:last], losses))
        finally:
            if len(y) >= least:
                # A copy of the rest: a view would keep every batch it was ever a part of alive, and be the caller's.
                self._x, self._y = x[last:].copy(), y[last:].copy()
        return interrupt


def _raise(interrupt: BaseException | None) -> None:
    if interrupt is not None:
        raise interrupt


def _judge(learner: Learner) -> Judge:
    return Judge(
        lambda x, y: _losses_of(learner, learner.logits(_checked(learner, x), averaged=False), y), learner.graph.macs(),
        lambda: learner.plans.forward_macs,
    )  # fmt: skip


def _checked(learner: Learner, x: Images) -> Checked:
    return Checked({learner.graph.inputs[0]: x})


def _losses_of(learner: Learner, logits: NDArray[np.float32], y: NDArray[Any]) -> Floats:
    return sample_losses(logits, y, learner.loss, learner.label_smoothing)


def _step_result(learner: Learner, count: int, seconds: float) -> StepResult:
    """Return what the last training step did, where an interrupt came instead of its result."""
    executor = learner.plans.latest
    assert executor is not None
    return learner.plans.result(count, executor.plan, seconds)


def _step_losses(learner: Learner, count: int) -> Floats:
    """Return the losses of the samples of the last training step, as it computed them before the update."""
    executor = learner.plans.latest
    assert executor is not None
    losses = executor.value(executor.plan.graph.values[learner.plans.training.losses], count)
    return losses.reshape(-1).astype(np.float64)


def _sum(steps: Sequence[StepResult], name: str) -> int:
    return sum(int(getattr(step, name)) for step in steps)
