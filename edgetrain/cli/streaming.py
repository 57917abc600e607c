"""``fit --stream`` and resuming it: a run folder, and instances in order, once."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from edgetrain.cli.advice import how_to_go_on, resuming, starting_anew
from edgetrain.cli.config import Config
from edgetrain.cli.estimate import Work, random_batches
from edgetrain.cli.normalizing import STANDS_OUT, normalization_of, standing_out
from edgetrain.cli.output import count
from edgetrain.cli.progress import CompileNotice, Display, resident_mib
from edgetrain.cli.savings import layers_of
from edgetrain.cli.sessions import Session, going_on, new_learner, taken_up
from edgetrain.cli.signals import StopOnSignal
from edgetrain.cli.stream_lines import last_line, stream_line
from edgetrain.cli.stream_sources import stream_graph, stream_source, test_data
from edgetrain.data import Dataset
from edgetrain.data.batches import Batch
from edgetrain.data.streaming import InstanceSource
from edgetrain.devices import DeviceProfile
from edgetrain.errors import DataError, EdgetrainError, NumericalError, UsageError
from edgetrain.fitting import block_size, check_fits, evaluate_dataset, last_lr
from edgetrain.history import EpochRecord, Totals
from edgetrain.policies import NONE
from edgetrain.runs import Run

if TYPE_CHECKING:
    from edgetrain.graph import Graph
    from edgetrain.learner import Learner

# Rows in memory, about a kilobyte each; a checkpoint writes them sooner unless windows are small.
_MOST_UNWRITTEN = 1000
_BY_NAME = ("files are taken in the order of their names: give new ones names behind it, or start a new run with: "
            "edgetrain fit --stream")  # fmt: skip


def prepare_stream(
    config: Config, profile: DeviceProfile, display: Display
) -> tuple[Learner, dict[str, Any], Callable[..., Session]]:
    """Return what a new run on a stream begins with, before there is a run folder.

    Returns:
        The learner, what the run remembers about its data, and what makes a session of ``Session``'s arguments.

    Raises:
        UsageError, DataError, ModelError, MemoryBudgetError: model, source and settings do not fit together.
    """
    learner, source = _new_learner(config, profile, display)
    if (test := test_data(config, learner.graph)) is not None:
        check_fits(learner.graph, test)  # now, not behind the whole stream
    return learner, {"name": source.name, "count": source.count}, functools.partial(StreamSession, source=source)


def resume_stream(run: Run, config: Config, display: Display, began: float) -> StreamSession:
    """Return a session that goes on: a file or a folder where the stream was left, standard input with what comes now.

    Args:
        run: its folder, locked.
        config: of the run, perhaps with another number of threads.
        display: told what happens.
        began: when the command did, of ``time.monotonic``.

    Raises:
        UsageError: nothing of the stream is left, and its last files are written.
        CheckpointError: the last checkpoint is missing or damaged.
        DataError: the source is not what it was.
    """
    session = _taken_up(run, config, display, StopOnSignal(display), began)
    if session.is_over and run.is_done():
        raise UsageError(f"{run.path}: all {session.source.count:,} instances of the stream are done, nothing is left")
    run.log("resumed", instances=session.learner.stream.position)
    display.say(f"resuming {run.path} {session.where()}")
    return session


def _taken_up(run: Run, config: Config, display: Display, stop: StopOnSignal, began: float) -> StreamSession:
    """Return a session that goes on where the last checkpoint of a run stands.

    Raises:
        CheckpointError: it is missing or damaged.
        DataError: the source is bad, shorter than it was, or has other instances before that place.
    """
    learner = taken_up(run, config, display)
    source, position = stream_source(config, learner.graph), learner.stream.position
    if source.count is not None and position > source.count:
        raise DataError(
            f"stream '{source.name}' has {count(source.count, 'instance')}, but {position:,} were learned from; bring "
            "the old data back, or start a new run with: edgetrain fit --stream"
        )
    found = source.last_name(position)
    names = [event["last"] for event in run.read_events() if event.get("instances") == position and "last" in event]
    if names and names[-1] != found:
        raise DataError(f"stream '{source.name}': instance {position:,} was {names[-1]}, is now {found}; {_BY_NAME}")
    session = StreamSession(run, learner, config, display, stop, began, source)
    if run.status() == "failed":
        session.failed_at = position
    session.rows = run.keep_metrics(position - learner.history.running.instances_seen)
    return session


def _new_learner(
    config: Config, profile: DeviceProfile, display: Display, source: InstanceSource | None = None
) -> tuple[Learner, InstanceSource]:
    """Return the learner of a new run and its instances.

    ``source``: the instances, if they are open already.

    Raises:
        UsageError, DataError, ModelError, MemoryBudgetError: model, source and settings do not fit together.
    """

    def network() -> Graph:
        nonlocal source
        graph = stream_graph(config)
        source = stream_source(config, graph) if source is None else source
        graph.name_classes(source.class_names)
        return graph

    learner = new_learner(config, profile, display, network)
    assert source is not None
    if learner.sparsity is not None:
        display.say(f"sparsity {config.methods.sparsity}: {learner.topology.beginning}")
    return learner, source


@dataclass
class StreamSession(Session):
    """One process' part of a streaming run.

    Attributes:
        source: the instances.
        failed_at: position where the run failed before it was resumed; -1 if it did not.
        rows: rows of metrics.csv so far; those since the last checkpoint are kept in memory.
    """

    source: InstanceSource
    failed_at: int = field(default=-1, init=False)
    rows: int = field(default=0, init=False)
    _unwritten: list[EpochRecord] = field(default_factory=list, init=False)
    _judged: tuple[int, dict[str, float]] = field(default=(-1, {}), init=False)  # steps done, and what was found
    _unpredicted: NumericalError | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._saved_position = self.learner.stream.position
        self._block = 0, np.zeros(0, np.float32)  # position of the latest, and its images

    @property
    def is_over(self) -> bool:
        """Whether all instances of the source were seen; false where nobody knows how many there are."""
        return self.source.count is not None and self.learner.stream.position >= self.source.count

    def introduce(self) -> None:
        """Say what a new run is going to do."""
        config, learner = self.config, self.learner
        skips = ", ".join(text for text in asdict(config.methods).values() if text != NONE)
        self.display.say(
            f"{self.run.path}: {config.model.name} ({learner.graph.parameter_count:,} parameters) learns from the "
            f"stream {self.source.name}, micro-batches of {learner.batch_size}, {skips or 'nothing is skipped'}"
        )

    def train(self) -> None:
        """Learn until the stream ends; raises what ``Session.train`` does."""
        if not self.is_over:
            self._learn_all()
        # What waits for its micro-batch stays in the checkpoint: the source may have grown when the run is resumed.
        if self.learner.history.running.instances_seen:  # also if it was stopped between the last block and its row
            self._row()

    def _learn_all(self) -> None:
        learner, stop = self.learner, self.stop
        size = self._block_size()
        self.display.begin(self.config.training.epochs, "test")
        with CompileNotice(self.display.compiling):
            try:
                for x, y in self.source.blocks(size, learner.stream.position, self._should_stop, self._is_due):
                    before = learner.stream.position
                    if len(y):
                        self._learn(x, y, size)
                    self._after(learner.stream.position - before)
                    # A live source ends by itself, after the instances that it has taken: nobody could give them again.
                    if self.source.count is not None and stop.requested():
                        break
                if self._unpredicted is not None:
                    raise self._unpredicted
            except EdgetrainError as error:
                self._fail(error)
            except Exception as error:  # foreseen by nobody, so what was learned is kept if that can be
                with suppress(Exception):
                    self._save()
                    self._log("failed", error=repr(error))
                raise
        if stop.requested():
            self._interrupt()
        if not learner.stream.position:
            self._log("failed", error="no instance")
            raise DataError(
                f"{self.source.name}: ended without an instance, expected at least one; nothing was learned; when "
                f"there are some, go on with: edgetrain resume {self.run.path}"
            )

    def test_metrics(self) -> dict[str, float]:
        """Return loss and accuracy on the test data of the source, as things stand; empty when it has none."""
        if self._judged[0] != self.learner.step_count:
            test = self._test
            self._judged = self.learner.step_count, {} if test is None else evaluate_dataset(self.learner, test)
        return self._judged[1]

    def result(self, baseline: Mapping[str, Any] | None) -> dict[str, Any]:
        """Return what the run gave; ``baseline``: time and accuracy of the same stream, dense."""
        learner, metrics = self.learner, self.test_metrics()
        # A copy, and the stream only afterwards: the estimate observes, too, and then puts the learner's state back.
        total = replace(learner.stream.totals["predict" if self.config.stream.predict else "train"])
        # Those that wait cost nothing yet, so dense training must not be charged for them.
        done = total.instances_seen - learner.stream.waiting
        work = Work(total.seconds, total.macs_done, done, self._block_size(), self.config.stream.predict)
        account = self._savings(total.counts(), work, baseline)
        stream = learner.stream
        return layers_of(learner) | {
            **self._described(), "instances": stream.position, "instances_waiting": stream.waiting,
            "mode": "predict and train" if self.config.stream.predict else "train only",
            "running_accuracy": stream.accuracy, "recent_accuracy": stream.recent_accuracy,
            "loss": metrics.get("loss"), "accuracy": metrics.get("accuracy"), "seconds": total.seconds,
            "whole_seconds": account["whole_seconds"], "steps": learner.step_count, "batch_size": learner.batch_size,
            "images_per_second": total.images_per_second, "memory_mib": resident_mib(), "savings": account,
            "filter": stream.facts, "files": self._files(),
        }  # fmt: skip

    def conclude(self) -> None:
        """Write the last files, and look at the test data.

        Raises:
            InterruptedRunError: a signal came before the test data were looked at.
            CheckpointError, UsageError: a file cannot be written.
            DataError: the test data were damaged since the stream began; all of it is learned, and the files are there.
        """
        with self.stop.unbroken():
            self._save()
            self._save_best()
            self.learner.export_onnx(self.run.model)
        if self.stop.requested():  # what follows looks at all test data
            with suppress(UsageError):
                self._log("interrupted")
            self.heed_stop()
        try:
            self._log("finished", accuracy=self.test_metrics().get("accuracy"))
        except DataError as error:  # of test data that were whole when the stream began
            self._log("finished", accuracy=None, error=str(error))
            raise DataError(f"{error}; all of the stream is learned, the model is {self.run.model}") from error

    def last_line(self, result: Mapping[str, Any]) -> str:
        """Return the last line for people, of the result."""
        return last_line(result)

    def new_twin(self, run: Run, config: Config, began: float, profile: DeviceProfile) -> StreamSession:
        """Return a session on the same stream before its first step."""
        learner, _ = _new_learner(config, profile, self.display, self.source)
        return replace(self, run=run, learner=learner, config=config, began=began)

    def begun_twin(self, run: Run, config: Config, began: float) -> StreamSession:
        """Return a session on the same stream that goes on at the last checkpoint of a run."""
        return _taken_up(run, config, self.display, self.stop, began)

    def where(self) -> str:
        """Return how many instances were learned from."""
        return f"after {self.learner.stream.position:,} instances"

    def _batches_again(self, size: int) -> Iterable[Batch]:
        """Return batches of the stream from its beginning, random ones where it cannot be read twice."""
        if self.source.count is None:
            return random_batches(self.learner, size)
        return self.source.blocks(size, 0, self.stop.requested)

    def _block_size(self) -> int:
        return self.config.stream.block or block_size(self.learner)

    def _should_stop(self) -> bool:
        return self._unpredicted is not None or self.stop.requested()

    def _learn(self, x: NDArray[np.float32], y: NDArray[np.int64], size: int) -> None:
        """Learn from a block; ``size``: instances of a full one."""
        learner = self.learner
        bad = self._unpredictable(x, self._normalize(x, size))
        self._block = learner.stream.position, x
        try:
            if not bad:
                self._observe(x, y)
        except NumericalError as error:
            if learner.stream.latest is not None or not error.samples or not _can_predict(learner):
                raise
            bad = error.samples
        if bad:
            self._learn_without(x, y, bad, size)
        self.display.instances(learner.stream.position, self.source.count, learner.history.running)

    def _learn_without(
        self, x: NDArray[np.float32], y: NDArray[np.int64], bad: tuple[int, ...], size: int
    ) -> None:
        """Learn from a block of which some instances cannot be predicted.

        Of a live source, all others are learned from, and those that have been read along; then the run fails. Of
        another one, it fails at the first; where it failed before, and goes on there, those that begin it are left out.

        Raises:
            NumericalError: names the first one.
        """
        first, stream = bad[0], self.learner.stream
        position = stream.position + first
        error = NumericalError(
            f"instance {position:,} of {self.source.name} (counted from 0) cannot be predicted: its largest number is "
            f"{np.abs(x[first]).max():.3g}, and numbers on the way are beyond float32"
        )
        if self.source.count is None:
            self._unpredicted = self._unpredicted or error
            good = np.delete(np.arange(len(y)), bad)
            if len(good):
                self._learn(x[good], y[good], size)
            return
        if first:
            self._learn(x[:first], y[:first], size)
        if position != self.failed_at:
            self._unpredicted = error
            raise error
        gone = next((place for place, sample in enumerate(bad) if place != sample), len(bad))
        self.learner.history.running.add(stream.leave_out(gone, self.config.stream.predict), 0.0, judged=0)
        self._log("left out", first=position, number=gone)
        self.display.say(f"{error}; left out: {count(gone, 'instance')} from {position:,} on")
        if gone < len(y):
            self._learn(x[gone:], y[gone:], size)

    def _normalize(self, x: NDArray[np.float32], size: int) -> NDArray[np.intp]:
        """Give a network without input normalisation that of the first block; a stream cannot be looked at twice.

        Where that has but a few instances, as of a slow pipe, it is that of all that have come before the first step.

        Returns:
            Which instances of the block stand out so much that they were left out of it.
        """
        learner, nothing = self.learner, np.zeros(0, np.intp)
        if not self.config.data.normalize or learner.graph.normalization is not None or learner.step_count:
            return nothing
        come = learner.stream.behind_waiting(x.reshape(len(x), *learner.graph.input_shape))
        if len(come) < min(size, learner.batch_size):
            return nothing
        strange = standing_out(come)
        learner.graph.normalization = normalization_of(come[~strange])
        if strange.any():
            largest = f"{np.abs(come[strange]).max():.3g}"
            self._log("normalized without", number=int(strange.sum()), largest=largest)
            self.display.say(
                f"the normalisation leaves out {strange.sum():,} of the first {count(len(come), 'instance')}: numbers "
                f"up to {largest} are more than {STANDS_OUT} times the largest of a usual one"
            )
        return np.flatnonzero(strange[len(come) - len(x) :])

    def _unpredictable(self, x: NDArray[np.float32], strange: NDArray[np.intp]) -> tuple[int, ...]:
        """Return which of the strange instances of a live source are beyond what the network can compute with.

        Nobody can give the others of their batch again, which a step with them would drop; of other sources it fails.
        """
        if self.source.count is not None or not len(strange):
            return ()
        try:
            self.learner.logits(x[strange].reshape(len(strange), *self.learner.graph.input_shape))
        except NumericalError as error:
            if _can_predict(self.learner):
                return tuple(int(strange[sample]) for sample in error.samples)
        return ()

    def _observe(self, x: NDArray[np.float32], y: NDArray[np.int64]) -> None:
        """Hand instances to the learner, and count what it did, also where it failed."""
        predict, running = self.config.stream.predict, self.learner.history.running
        try:
            self.learner.observe(x, y, predict=predict)
        finally:
            result = self.learner.stream.latest
            if result is not None:
                running.add(result, result.seconds, result.instances_seen if predict else result.instances_trained)

    def _after(self, count: int) -> None:
        position, window = self.learner.stream.position, self.config.stream.window
        if position // window > (position - count) // window:
            self._row()
        self._save_if_due(position != self._saved_position)  # a pipe may give nothing for hours

    def _row(self) -> None:
        """Make a row about the instances since the last one; it is written with the next checkpoint."""
        learner, total = self.learner, self.learner.history.running
        metrics = self.test_metrics() if self._judges and self._is_tenth(total.instances_seen) else {}
        learner.history.running, self.rows = Totals(), self.rows + 1
        record = EpochRecord(
            epoch=self.rows, steps=learner.step_count, loss=total.mean_loss if total.judged else math.nan,
            accuracy=total.accuracy if total.judged else math.nan,
            validation_loss=metrics.get("loss"), validation_accuracy=metrics.get("accuracy"),
            lr=last_lr(learner), seconds=total.seconds,
            images_per_second=total.images_per_second, **total.counts(),
        )  # fmt: skip
        self._unwritten.append(record)
        if len(self._unwritten) % _MOST_UNWRITTEN == 0:
            with going_on(self.display):
                self._write_rows()
        self.display.say(stream_line(learner.stream, self.source.count, record, self.config.stream.predict))

    def _is_tenth(self, count: int) -> bool:
        """Tell whether the last ``count`` instances of the stream went past a tenth of it, or end it."""
        position, length = self.learner.stream.position, self.source.count
        return length is not None and 10 * position // length > 10 * (position - count) // length

    def _write_rows(self) -> None:
        self.run.add_metrics(*self._unwritten)
        self._unwritten.clear()

    def _save(self) -> None:
        # The rows come first: those that the checkpoint does not know are taken back on resuming.
        self._write_rows()
        super()._save()
        self._saved_position = self.learner.stream.position

    def _log(self, event: str, **details: Any) -> None:
        position = self.learner.stream.position
        last = {"last": name} if (name := self.source.last_name(position)) else {}
        self.run.log(event, instances=position, whole_seconds=self._whole_seconds(), **last, **details)

    def _fail(self, error: EdgetrainError) -> NoReturn:
        step, position = self._is_step(error), self.learner.stream.position
        # A step that was not finite drops its instances. Where it is the first one of this process, the checkpoint
        # stays as it was: else every vain attempt to go on would cost some more. What a pipe gave is gone anyway.
        vain = step and self.source.count is not None and self.learner.step_count == self._first_step
        self._note_failure(error, save=not vain)
        if step and self.learner.stream.latest is None:  # the network predicts nothing any more
            raise NumericalError(how_to_go_on(error, self.run, self.config)) from error
        if vain:
            raise NumericalError(f"{how_to_go_on(error, self.run, self.config)}{self._suspect()}") from error
        if step:
            done = f"its batch, of instances before {position:,}, is left out, and the state behind it"
            advice = f"{self._suspect()}. If that fails too: {starting_anew(self.run, self.config)}"
        else:
            done, advice = f"the state after {position:,} instances", self._remedy(error)
        raise type(error)(
            f"{error}; {done} is saved in {self.run.last}, go on with: {resuming(self.run)}{advice}"
        ) from error

    def _is_step(self, error: EdgetrainError) -> bool:
        return isinstance(error, NumericalError) and error is not self._unpredicted

    def _suspect(self) -> str:
        """Return which instance of the latest block stands out, if one does: it may be wrong."""
        position, x = self._block
        sizes = np.abs(x.reshape(len(x), -1)).max(1)
        if sizes.max() < STANDS_OUT * np.median(sizes):
            return ""
        where = "" if self.source.count is None else f"; if it is wrong, correct it in {self.config.data.source}"
        return (
            f". The largest number of the latest block, {sizes.max():.3g}, is in instance "
            f"{position + sizes.argmax():,} of {self.source.name} (counted from 0){where}"
        )

    def _remedy(self, error: EdgetrainError) -> str:
        """Return what to do about a bad instance before going on; of a pipe it is gone, so nothing."""
        if self.source.count is None or not isinstance(error, DataError | NumericalError):
            return ""
        mended = f" (correct it in {self.config.data.source} first"
        return f"{mended})" if isinstance(error, DataError) else f"{mended}, else it is left out)"

    @functools.cached_property
    def _judges(self) -> bool:
        """Whether some rows tell the accuracy on the test data: for comparing a run with its dense twin."""
        return self.run.comparison() != ""

    @functools.cached_property
    def _test(self) -> Dataset | None:
        return test_data(self.config, self.learner.graph)


def _can_predict(learner: Learner) -> bool:
    """Tell whether the network predicts a usual image: if not, no instance is to blame."""
    shape, usual = learner.graph.input_shape, learner.graph.normalization
    x = np.random.default_rng(0).standard_normal((1, *shape), np.float32)
    if usual is not None:
        x = x * usual.std.reshape(-1, *[1] * len(shape[1:])) + usual.mean.reshape(-1, *[1] * len(shape[1:]))
    try:
        learner.logits(x)
    except NumericalError:
        return False
    return True
