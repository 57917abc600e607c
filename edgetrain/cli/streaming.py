"""``fit --stream`` and resuming it: a run folder, and instances in order, once."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, NoReturn

from edgetrain.cli.advice import how_to_go_on, resuming, starting_anew
from edgetrain.cli.config import Config
from edgetrain.cli.estimate import Work, random_batches
from edgetrain.cli.output import count
from edgetrain.cli.progress import CompileNotice, Display, resident_mib
from edgetrain.cli.savings import layers_of
from edgetrain.cli.sessions import Session, going_on, new_learner, taken_up
from edgetrain.cli.signals import StopOnSignal
from edgetrain.cli.stream_blocks import BlockLearner, size_of_blocks
from edgetrain.cli.stream_lines import last_line, stream_line
from edgetrain.cli.stream_sources import stream_graph, stream_source, test_data
from edgetrain.data import Dataset
from edgetrain.data.batches import Batch
from edgetrain.data.streaming import InstanceSource
from edgetrain.devices import DeviceProfile
from edgetrain.errors import DataError, EdgetrainError, NumericalError, UsageError
from edgetrain.fitting import check_fits, evaluate_dataset, last_lr
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

    def __post_init__(self) -> None:
        super().__post_init__()
        self._saved_position = self.learner.stream.position

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
        blocks = BlockLearner(learner, self.config, self.source, self.display, self._log, self.failed_at)

        def should_stop() -> bool:
            return blocks.unpredicted is not None or stop.requested()

        self.display.begin(self.config.training.epochs, "test")
        with CompileNotice(self.display.compiling):
            try:
                for x, y in self.source.blocks(blocks.size, learner.stream.position, should_stop, self._is_due):
                    before = learner.stream.position
                    if len(y):
                        blocks.learn(x, y)
                    self._after(learner.stream.position - before)
                    # A live source ends by itself, after the instances that it has taken: nobody could give them again.
                    if self.source.count is not None and stop.requested():
                        break
                if blocks.unpredicted is not None:
                    raise blocks.unpredicted
            except EdgetrainError as error:
                self._fail(error, blocks)
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
        learner, predicts, metrics = self.learner, self.config.stream.predict, self.test_metrics()
        # A copy, and the stream only afterwards: the estimate observes, too, and then puts the learner's state back.
        total = replace(learner.stream.totals["predict" if predicts else "train"])
        # Those that wait cost nothing yet, so dense training must not be charged for them.
        done = total.instances_seen - learner.stream.waiting
        work = Work(total.seconds, total.macs_done, done, size_of_blocks(self.config, learner), predicts)
        account = self._savings(total.counts(), work, baseline)
        stream = learner.stream
        return layers_of(learner) | {
            **self._described(), "instances": stream.position, "instances_waiting": stream.waiting,
            "mode": "predict and train" if predicts else "train only",
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

    def begun_twin(self, run: Run, config: Config, began: float) -> StreamSession:
        """Return a session on the same stream that goes on at the last checkpoint of a run."""
        return _taken_up(run, config, self.display, self.stop, began)

    def where(self) -> str:
        """Return how many instances were learned from."""
        return f"after {self.learner.stream.position:,} instances"

    def _new_learner(self, config: Config, profile: DeviceProfile) -> Learner:
        return _new_learner(config, profile, self.display, self.source)[0]

    def _batches_again(self, size: int) -> Iterable[Batch]:
        """Return batches of the stream from its beginning, random ones where it cannot be read twice."""
        if self.source.count is None:
            return random_batches(self.learner, size)
        return self.source.blocks(size, 0, self.stop.requested)

    def _after(self, number: int) -> None:
        position, window = self.learner.stream.position, self.config.stream.window
        if position // window > (position - number) // window:
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

    def _is_tenth(self, number: int) -> bool:
        """Tell whether the last ``number`` instances of the stream went past a tenth of it, or end it."""
        position, length = self.learner.stream.position, self.source.count
        return length is not None and 10 * position // length > 10 * (position - number) // length

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

    def _fail(self, error: EdgetrainError, blocks: BlockLearner) -> NoReturn:
        position = self.learner.stream.position
        step = isinstance(error, NumericalError) and error is not blocks.unpredicted
        # A step that was not finite drops its instances. Where it is the first one of this process, the checkpoint
        # stays as it was: else every vain attempt to go on would cost some more. What a pipe gave is gone anyway.
        vain = step and self.source.count is not None and self.learner.step_count == self._first_step
        self._note_failure(error, save=not vain)
        if step and self.learner.stream.latest is None:  # the network predicts nothing any more
            raise NumericalError(how_to_go_on(error, self.run, self.config)) from error
        if vain:
            raise NumericalError(f"{how_to_go_on(error, self.run, self.config)}{blocks.suspect()}") from error
        if step:
            done = f"its batch, of instances before {position:,}, is left out, and the state behind it"
            advice = f"{blocks.suspect()}. If that fails too: {starting_anew(self.run, self.config)}"
        else:
            done, advice = f"the state after {position:,} instances", self._remedy(error)
        raise type(error)(
            f"{error}; {done} is saved in {self.run.last}, go on with: {resuming(self.run)}{advice}"
        ) from error

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
