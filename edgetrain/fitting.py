"""The fit loop: epochs of training steps, their history, and going on exactly where a fit stopped.

Nothing here prints or touches signals: a caller watches through callbacks and stops through
``should_stop``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from numpy.typing import ArrayLike

from edgetrain.accounting import StepResult, left_out
from edgetrain.arguments import integer_of
from edgetrain.arrays import array_of
from edgetrain.data import Augmentation, Dataset, batch_count, batches
from edgetrain.data.batches import Batch
from edgetrain.data.convert import ImageLayout
from edgetrain.data.targets import TargetSet
from edgetrain.errors import DataError, NumericalError, UsageError
from edgetrain.graph import Graph, Normalization, Shape
from edgetrain.history import EpochRecord, History, Totals

if TYPE_CHECKING:
    from edgetrain.learner import Learner

Data: TypeAlias = Dataset | tuple[ArrayLike, ArrayLike]
Samples: TypeAlias = Dataset | TargetSet

# Images converted to float32 at a time while evaluating, in batches: bounds the memory whatever the data set.
_EVALUATED_BATCHES = 8


@dataclass(frozen=True)
class StepEvent:
    """What ``on_step`` is told: epoch and batch count from 1, ``total`` sums up the epoch so far."""

    epoch: int
    batch: int
    batches: int
    lr: float
    step: StepResult
    total: Totals


@dataclass(frozen=True)
class Callbacks:
    """Who watches a fit; see ``fit_loop``."""

    on_step: Callable[[StepEvent], None] | None = None
    on_epoch: Callable[[EpochRecord], None] | None = None
    should_stop: Callable[[], bool] | None = None

    def __post_init__(self) -> None:
        for name, given in vars(self).items():
            if given is not None and not callable(given):
                raise UsageError(f"{name}={given!r}, expected a function")


def fit_loop(
    learner: Learner,
    data: Data,
    epochs: int,
    *,
    validation: Data | None = None,
    augmentation: Augmentation | str | None = None,
    shuffle: bool = True,
    normalize: bool = True,
    on_step: Callable[[StepEvent], None] | None = None,
    on_epoch: Callable[[EpochRecord], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> History:
    """Train for a number of epochs, or finish a fit that was stopped or loaded from a checkpoint.

    A fit that stopped early continues at the very batch where it stood, and ``epochs`` counts from where that fit
    began: the same call again gives the parameters that it would have given without the stop, bit for bit. So it does
    after Ctrl-C in the middle of a step, which is finished first; the history lacks that step. After a finished fit,
    another call trains ``epochs`` more, with schedules (of learning rates, of changes of sparse weights) that began
    with the first step of all and end with the last one of this fit.

    Args:
        learner: is changed in place.
        data: a Dataset, or (x, y): x as ``Dataset.from_arrays`` takes it or features (N, F), y integers (N,), or
            numbers (N, *output_shape) for a learner with the loss ``"mse"``.
        epochs: at least 1.
        validation: evaluated after every epoch.
        augmentation: random changes of training images, or their description such as "flip,crop:4".
        shuffle: a new order in every epoch, from the learner's seed and the number of the epoch.
        normalize: give a model without input normalisation the mean and deviation of the training set's channels;
            only before its first step. Trained weights see other inputs then than those they were trained with:
            ``normalize=False`` leaves inputs as they are.
        on_step: called after every step, with the learner's position already past it; with an instance filter after
            every block of instances, and after the step on those that wait at the end of an epoch.
        on_epoch: called after every epoch.
        should_stop: asked between steps; true ends the fit early, ready to go on.

    Returns:
        The learner's history, of this and all earlier fits.

    Raises:
        UsageError: a bad number of epochs, or fewer than a continued fit has done; a network with several inputs; an
            augmentation or a callback that is none.
        DataError: the data do not fit the network.
        MemoryBudgetError: a training step does not fit into the budget.
        NumericalError: a loss or gradient was not finite; the learner keeps the state before that step. With an
            instance filter the instances of that step are dropped; another fit goes on behind their block.
    """
    graph = learner.graph
    if len(graph.inputs) > 1:
        names = ", ".join(graph.inputs)
        raise UsageError(f"fit takes networks with one input, '{graph.name}' has {names}; use partial_fit")
    training = as_samples(data, "training data", graph, learner.loss)
    held_out = None if validation is None else as_samples(validation, "validation data", graph, learner.loss)
    for samples in (training, held_out):
        if samples is not None:
            check_fits(graph, samples)
    callbacks = Callbacks(on_step, on_epoch, should_stop)
    loop = _Loop(learner, training, held_out, _parsed(augmentation), shuffle, callbacks)
    _last_epoch(learner, epochs)  # what is refused, is so before anything changes, and before the compiler runs
    learner.prepare()
    last_epoch = _begin(learner, training, epochs, normalize)
    while learner.position.epoch < last_epoch:
        if not loop.epoch():
            return learner.history
    learner.history.finished = True
    return learner.history


def as_samples(data: Data, name: str, graph: Graph, loss: str) -> Samples:
    """Return a Dataset as it is, or make a set of a pair (x, y) in the shapes that the graph takes.

    The classes of a pair are the graph's outputs, whichever labels occur.

    Raises:
        DataError: the arrays do not fit the network and its loss, or ``data`` is not a pair.
    """
    if isinstance(data, Dataset):
        if loss == "mse":
            raise DataError(
                f"data set '{data.name}' has class labels, but the loss 'mse' needs targets; give a pair (x, y) with "
                f"numbers y of shape (N, {', '.join(map(str, graph.output_shape))})"
            )
        return data
    if not isinstance(data, Sequence) or len(data) != 2:
        raise DataError(f"{name} is of type {type(data).__name__}, expected a Dataset or a pair (x, y)")
    x, y = data
    if len(graph.input_shape) == 1:
        x = _as_maps(x, name)
    layout: ImageLayout = "signal" if _three_sizes(graph.input_shape)[1] == 1 else "image"
    if loss == "mse":
        return TargetSet.from_arrays(x, y, graph.output_shape, name, layout)
    names = tuple(map(str, range(graph.num_classes)))
    return Dataset.from_arrays(x, y, names, name, layout=layout, allow_missing_classes=True)


def _as_maps(x: ArrayLike, name: str) -> ArrayLike:
    """Return features (N, F) as signals (N, F, 1): maps of one pixel."""
    features = array_of(x, f"{name}: features are")
    if features.ndim != 2:
        raise DataError(f"{name}: features have shape {features.shape}, expected (N, F)")
    return features[:, :, None]


def evaluate_dataset(learner: Learner, dataset: Samples) -> dict[str, float]:
    """Return mean loss and accuracy (NaN for targets) over a whole data set, converted piece by piece.

    Raises:
        DataError: the data do not fit the network.
        NumericalError: the network's outputs are not finite.
    """
    check_fits(learner.graph, dataset)
    size = learner.batch_size * _EVALUATED_BATCHES
    loss = correct = 0.0
    for first in range(0, len(dataset), size):
        x, y = _as_taken(dataset.take(np.arange(first, min(first + size, len(dataset)))), learner.graph)
        metrics = learner.evaluate(x, y)
        loss += metrics["loss"] * len(y)
        correct += float(np.rint(metrics["accuracy"] * len(y)))
    return {"loss": loss / len(dataset), "accuracy": correct / len(dataset)}


def _as_taken(batch: Batch, graph: Graph) -> Batch:
    """Return a batch in the graph's input shape: a signal with or without its row, features without pixels."""
    x, y = batch
    return np.ascontiguousarray(x).reshape(len(x), *graph.input_shape), y


def check_fits(graph: Graph, dataset: Samples) -> None:
    """Refuse data that the network cannot take.

    Raises:
        DataError: another input shape, more classes than outputs, or the same classes in another order.
    """
    expected = graph.input_shape
    if dataset.input_shape != _three_sizes(expected):
        raise DataError(
            f"data set '{dataset.name}' has images of shape {dataset.images.shape[1:]}, but the network "
            f"'{graph.name}' expects {expected}; build the network for this shape or resize the images"
        )
    if isinstance(dataset, Dataset) and dataset.num_classes > graph.num_classes:
        raise DataError(
            f"data set '{dataset.name}' has {dataset.num_classes} classes, but the network '{graph.name}' "
            f"has {graph.num_classes} outputs; build the network with num_classes={dataset.num_classes}"
        )
    names = dataset.class_names if isinstance(dataset, Dataset) else graph.class_names
    numbers = tuple(map(str, range(len(names))))  # are no names: of a pair (x, y) they are the network's outputs
    if names not in (graph.class_names, numbers) and set(names) == set(graph.class_names):
        raise DataError(
            f"data set '{dataset.name}' has the classes {', '.join(names)}, the network '{graph.name}' the same as "
            f"{', '.join(graph.class_names)}: labels would mean others; number them in the network's order, or set "
            "graph.class_names"
        )


@dataclass(frozen=True)
class _Loop:
    learner: Learner
    dataset: Samples
    held_out: Samples | None
    augmentation: Augmentation | None
    shuffle: bool
    callbacks: Callbacks

    def epoch(self) -> bool:
        """Do what is left of the present epoch; return False if asked to stop before its end."""
        if not self._steps():
            return False
        learner = self.learner
        metrics = {} if self.held_out is None else evaluate_dataset(learner, self.held_out)
        record = _record(learner, metrics)
        learner.history.epochs.append(record)
        learner.history.running = Totals()
        learner.position = replace(learner.position, epoch=learner.position.epoch + 1, batch=0)
        if self.callbacks.on_epoch is not None:
            self.callbacks.on_epoch(record)
        return True

    def _steps(self) -> bool:
        learner = self.learner
        stop = self.callbacks.should_stop or (lambda: False)
        if stop():
            return False
        for batch in self._batches():
            step = self._take(batch)
            if self.callbacks.on_step is not None:
                self.callbacks.on_step(self._event(step))
            if stop():
                return False
        rest = learner.stream.flush()
        if rest is not None:
            self._count(rest)
            if self.callbacks.on_step is not None:
                self.callbacks.on_step(self._event(rest))
        return True

    def _take(self, batch: Batch) -> StepResult:
        """Train on a batch; with an instance filter on what is kept of it: it is then a block of candidates.

        A block whose step fails has been seen, as ``InstanceStream`` explains: who goes on does not repeat it.
        """
        learner = self.learner
        if learner.instance_filter is None:
            before = learner.step_count
            try:
                step = learner.partial_fit(*batch)
                self._count(step)
                return step
            finally:  # an interrupt in the middle of a step is raised behind it
                if learner.step_count > before:
                    self._move_on()
        try:
            return learner.stream.offer(*batch)
        except NumericalError:
            if learner.stream.latest is None:  # the filter's own network cannot judge one of them: none is kept
                self._count(left_out(len(batch[1])))
                self._move_on()
            raise
        finally:
            if learner.stream.latest is not None:
                self._count(learner.stream.latest)
                self._move_on()

    def _count(self, step: StepResult) -> None:
        self.learner.history.running.add(step, step.seconds)

    def _move_on(self) -> None:
        self.learner.position = replace(self.learner.position, batch=self.learner.position.batch + 1)

    def _batches(self) -> Iterator[Batch]:
        return training_batches(
            self.learner, self.dataset, block_size(self.learner), shuffle=self.shuffle, augmentation=self.augmentation,
            start=self.learner.position.batch,
        )  # fmt: skip

    def _event(self, step: StepResult) -> StepEvent:
        learner, position = self.learner, self.learner.position
        count = batch_count(len(self.dataset), block_size(learner))
        return StepEvent(position.epoch + 1, position.batch, count, last_lr(learner), step, learner.history.running)


def training_batches(
    learner: Learner, dataset: Samples, size: int, *, shuffle: bool = True, augmentation: Augmentation | None = None,
    start: int = 0,
) -> Iterator[Batch]:  # fmt: skip
    """Yield the batches (x ``(N, *input_shape)``, y) of the learner's present epoch, prepared as ``fit`` does.

    Args:
        learner: tells seed, epoch and input shape.
        dataset: what is trained on.
        size: N, smaller for the last one.
        shuffle, augmentation: as for ``fit_loop``.
        start: batches that are left out at the beginning.
    """
    made = batches(
        dataset, size, seed=learner.seed, epoch=learner.position.epoch, shuffle=shuffle, augmentation=augmentation,
        start=start,
    )  # fmt: skip
    return (_as_taken(batch, learner.graph) for batch in made)


def _begin(learner: Learner, dataset: Samples, epochs: int, normalize: bool) -> int:
    """Start a new fit or take up an unfinished one; return the number of epochs to reach."""
    last_epoch, history = _last_epoch(learner, epochs), learner.history
    if history.finished:
        history.first_epoch, history.finished = learner.position.epoch, False
        history.first_step, history.first_seen = learner.step_count, learner.stream.seen
    learner.topology.total_steps = _last_step(learner, len(dataset), last_epoch)
    _set_schedule(learner, learner.topology.total_steps)
    if normalize and learner.step_count == 0 and learner.graph.normalization is None:
        learner.graph.normalization = Normalization(*dataset.statistics())
    if isinstance(dataset, Dataset):
        learner.graph.name_classes(dataset.class_names)
    return last_epoch


def _last_epoch(learner: Learner, epochs: int) -> int:
    """Return the number of epochs to reach."""
    epochs, position, history = integer_of("epochs", epochs, 1), learner.position, learner.history
    first = position.epoch if history.finished else history.first_epoch
    if first + epochs < position.epoch or (first + epochs == position.epoch and position.batch):
        done = position.epoch - first
        raise UsageError(f"epochs is {epochs}, but {done} are done already; ask for more, or load an older checkpoint")
    return first + epochs


def block_size(learner: Learner) -> int:
    """Return how many instances are looked at together: as many as leave one training batch, if there is a filter."""
    chosen = learner.instance_filter
    return learner.batch_size if chosen is None else round(learner.batch_size / chosen.rate)


def _last_step(learner: Learner, instances: int, last_epoch: int) -> int:
    """Return the number of steps that will have been taken at the end of a fit, all others before it included.

    With a filter it is what was to be expected when the fit began, so that one that goes on has the same.
    """
    history, position = learner.history, learner.position
    if learner.instance_filter is None:
        left = (last_epoch - position.epoch) * batch_count(instances, learner.batch_size) - position.batch
        left += int(learner.stream.waiting > 0)  # those that ``observe`` left, at the end of the first epoch
        return max(1, learner.step_count + left)
    first, seen, epochs = history.first_step or 0, history.first_seen or 0, last_epoch - history.first_epoch
    if history.first_step is None:
        epochs = last_epoch
    kept = learner.instance_filter.kept_of(seen + instances * epochs) - learner.instance_filter.kept_of(seen)
    # The last, partial batch of an epoch is a step too.
    return first + max(1, round(kept / learner.batch_size + epochs / 2))


def _set_schedule(learner: Learner, total_steps: int) -> None:
    schedule, history = learner.optimizer.schedule, learner.history
    if schedule is None:
        return
    chosen = history.sets_schedule and history.schedule_steps in (None, schedule.total_steps)
    history.sets_schedule = chosen or schedule.total_steps is None
    if history.sets_schedule:
        history.schedule_steps = total_steps
        open_ended = replace(learner.optimizer, schedule=replace(schedule, total_steps=None))
        learner.optimizer = open_ended.with_total_steps(total_steps)


def _three_sizes(shape: Shape) -> Shape:
    """Return (C, H, W) of images, with height 1 for signals (C, W), one pixel for features (C,)."""
    return (shape[0], *[1] * (3 - len(shape)), *shape[1:])


def _record(learner: Learner, metrics: Mapping[str, float]) -> EpochRecord:
    total = learner.history.running
    return EpochRecord(
        epoch=learner.position.epoch + 1,
        steps=learner.step_count,
        loss=total.mean_loss,
        accuracy=math.nan if learner.loss == "mse" else total.accuracy,
        validation_loss=metrics.get("loss"),
        validation_accuracy=metrics.get("accuracy"),
        lr=last_lr(learner),
        seconds=total.seconds,
        images_per_second=total.images_per_second,
        **total.counts(),
    )


def last_lr(learner: Learner) -> float:
    """Return the learning rate of the latest step, or of the first one before it."""
    return float(learner.optimizer.lr_at(max(learner.step_count - 1, 0)))


def _parsed(augmentation: Augmentation | str | None) -> Augmentation | None:
    chosen = Augmentation.parse(augmentation) if isinstance(augmentation, str) else augmentation
    if chosen is not None and not callable(chosen):
        raise UsageError(f"augmentation={chosen!r}, expected an Augmentation, or text such as 'flip,crop:4'")
    return None if chosen == Augmentation() else chosen
