"""``fit --stream`` and resuming it: a run folder, and instances in order, once."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from edgetrain._version import __version__
from edgetrain.checkpoint import save_checkpoint
from edgetrain.cli.advice import how_to_go_on, resuming, starting_anew
from edgetrain.cli.config import Config, MethodSettings
from edgetrain.cli.estimate import Work, random_batches, time_dense
from edgetrain.cli.normalizing import STANDS_OUT, normalization_of, standing_out
from edgetrain.cli.output import count, emit
from edgetrain.cli.progress import CompileNotice, Display, resident_mib
from edgetrain.cli.savings import account_of, account_text, itself, layers_of, savings_of
from edgetrain.cli.sessions import (
    begin,
    going_on,
    heed_stop,
    new_learner,
    save_at_last,
    taken_up,
    tell_surprises,
    train_baseline,
    until_stopped,
)
from edgetrain.cli.signals import StopOnSignal
from edgetrain.cli.stream_lines import last_line, stream_line
from edgetrain.cli.stream_sources import stream_graph, stream_source, test_data
from edgetrain.data import Dataset
from edgetrain.data.batches import Batch
from edgetrain.data.streaming import InstanceSource
from edgetrain.devices import DeviceProfile, load_profile
from edgetrain.errors import DataError, EdgetrainError, InterruptedRunError, NumericalError, UsageError
from edgetrain.fitting import block_size, check_fits, evaluate_dataset, last_lr
from edgetrain.history import EpochRecord, Totals
from edgetrain.hostinfo import host_facts
from edgetrain.policies import NONE
from edgetrain.runs import Run, create_run

if TYPE_CHECKING:
    from edgetrain.graph import Graph
    from edgetrain.learner import Learner

# Rows in memory, about a kilobyte each; a checkpoint writes them sooner unless windows are small.
_MOST_UNWRITTEN = 1000
_BY_NAME = ("files are taken in the order of their names: give new ones names behind it, or start a new run with: "
            "edgetrain fit --stream")  # fmt: skip


def fit_stream(
    flags: Mapping[str, Any], config: Config, profile: DeviceProfile, display: Display, began: float
) -> None:
    """Learn from a stream in a new run folder; ``began``: when the command did, of ``time.monotonic``."""
    learner, source = _new_learner(config, profile, display)
    if (test := test_data(config, learner.graph)) is not None:
        check_fits(learner.graph, test)  # now, not behind the whole stream
        del test
    with StopOnSignal(display) as stop:
        run = create_run(flags["out"], "fit")
        save_checkpoint(learner, run.last)
        data = {"name": source.name, "count": source.count}
        run.write_environment({"edgetrain": __version__, "host": host_facts(), "data": data})
        begin(run, config, comparison="wanted" if flags["baseline"] else "")
        _introduce(display, run, learner, config, source)
        tell_surprises(display, profile, learner, config)
        session = StreamSession(run, learner, config, display, stop, source, began, judges=flags["baseline"])
        session.finish()
        session.tell(flags["json"], _baseline(session, profile) if flags["baseline"] else None)


def _introduce(display: Display, run: Run, learner: Learner, config: Config, source: InstanceSource) -> None:
    skips = ", ".join(text for text in asdict(config.methods).values() if text != NONE)
    display.say(
        f"{run.path}: {config.model.name} ({learner.graph.parameter_count:,} parameters) learns from the stream "
        f"{source.name}, micro-batches of {learner.batch_size}, {skips or 'nothing is skipped'}"
    )


def resume_stream(run: Run, config: Config, display: Display, as_json: bool, began: float) -> None:
    """Go on in a run folder: a file or a folder where the stream was left, standard input with what comes now.

    Args:
        run: its folder, locked.
        config: of the run, perhaps with another number of threads.
        display: told what happens.
        as_json: print the last lines for machines.
        began: when the command did, of ``time.monotonic``.

    Raises:
        UsageError: nothing of the stream is left, and its last files are written.
        CheckpointError: the last checkpoint is missing or damaged.
        DataError, NumericalError, MemoryBudgetError, InterruptedRunError: as ``StreamSession.train``; DataError also
            where the source is not what it was.
    """
    session = _taken_up(run, config, display, StopOnSignal(display), began)
    learner, source = session.learner, session.source
    if session.is_over and run.is_done():
        raise UsageError(f"{run.path}: all {source.count:,} instances of the stream are done, nothing is left")
    run.log("resumed", instances=learner.stream.position)
    display.say(f"resuming {run.path} after {learner.stream.position:,} instances")
    with session.stop:
        session.finish()
        wanted = run.comparison() == "wanted"
        session.tell(as_json, _baseline(session, load_profile(config.device.profile)) if wanted else None)


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
    session = StreamSession(run, learner, config, display, stop, source, began, judges=run.comparison() != "")
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


def _baseline(session: StreamSession, profile: DeviceProfile) -> dict[str, Any]:
    """Learn from the same stream densely, or go on with that; return times and accuracy, and draw both runs."""
    display, stop, source = session.display, session.stop, session.source

    def begin_anew(run: Run, config: Config, began: float) -> StreamSession:
        learner, _ = _new_learner(config, profile, display, source)
        return StreamSession(run, learner, config, display, stop, source, began, judges=True)

    return train_baseline(session, lambda run, config, began: _taken_up(run, config, display, stop, began), begin_anew)


@dataclass
class StreamSession:
    """One process' part of a streaming run.

    Attributes:
        began: when this part began, of ``time.monotonic``.
        failed_at: position where the run failed before it was resumed; -1 if it did not.
        judges: whether some rows tell the accuracy on the test data: for comparing with the dense twin.
        rows: rows of metrics.csv so far; those since the last checkpoint are kept in memory.
    """

    run: Run
    learner: Learner
    config: Config
    display: Display
    stop: StopOnSignal
    source: InstanceSource
    began: float
    judges: bool = False
    failed_at: int = -1
    rows: int = 0
    _unwritten: list[EpochRecord] = field(default_factory=list)
    _saved_at: float = field(default_factory=time.monotonic)
    _judged: tuple[int, dict[str, float]] = field(default_factory=lambda: (-1, {}))  # steps done, and what was found

    def __post_init__(self) -> None:
        self._first_step, self._saved_position = self.learner.step_count, self.learner.stream.position
        self._unpredicted: NumericalError | None = None
        self._block = 0, np.zeros(0, np.float32)  # position of the latest, and its images

    @property
    def is_over(self) -> bool:
        """Whether all instances of the source were seen; false where nobody knows how many there are."""
        return self.source.count is not None and self.learner.stream.position >= self.source.count

    def finish(self) -> None:
        """Learn from what is left, if anything is, and write the last files.

        Raises:
            InterruptedRunError: a signal asked to stop; what ``train`` raises, too.
        """
        if self.is_over:
            self._end()  # the run may have been stopped between the last block and its row
        else:
            self.train()
        self.conclude()
        heed_stop(self)

    def train(self) -> None:
        """Learn until the stream ends.

        Raises:
            InterruptedRunError: a signal asked to stop; the state is saved.
            DataError, NumericalError, MemoryBudgetError: an instance is bad or a step failed; the state is
                saved.
        """
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
            self._end()

    def test_metrics(self) -> dict[str, float]:
        """Return loss and accuracy on the test data of the source, as things stand; empty when it has none."""
        if self._judged[0] != self.learner.step_count:
            test = self._test
            self._judged = self.learner.step_count, {} if test is None else evaluate_dataset(self.learner, test)
        return self._judged[1]

    def result(self, baseline: Mapping[str, Any] | None) -> dict[str, Any]:
        """Return what the run gave; ``baseline``: time and accuracy of the same stream, dense."""
        learner, metrics, whole = self.learner, self.test_metrics(), self.run.whole_seconds()
        # A copy, and the stream only afterwards: the estimate observes, too, and then puts the learner's state back.
        total = replace(learner.stream.totals["predict" if self.config.stream.predict else "train"])
        counts = total.counts() | {"instances_waiting": learner.stream.waiting}
        account = savings_of(counts, total.seconds, whole, baseline or self._dense(total))
        stream = learner.stream
        return layers_of(learner) | {
            "run": str(self.run.path), "model": self.config.model.name, "data": self.config.data.source,
            "profile": self.config.device.profile, "timed_on": "this machine",
            "instances": stream.position, "instances_waiting": stream.waiting,
            "mode": "predict and train" if self.config.stream.predict else "train only",
            "running_accuracy": stream.accuracy, "recent_accuracy": stream.recent_accuracy,
            "loss": metrics.get("loss"), "accuracy": metrics.get("accuracy"), "seconds": total.seconds,
            "whole_seconds": whole, "steps": learner.step_count, "batch_size": learner.batch_size,
            "images_per_second": total.images_per_second, "memory_mib": resident_mib(), "savings": account,
            "filter": stream.facts,
            "files": {"model": str(self.run.model), "last": str(self.run.last), "best": str(self.run.best)},
        }  # fmt: skip

    def conclude(self) -> None:
        """Write the last checkpoint and the ONNX file: the run is then finished, whatever becomes of its account.

        Raises:
            InterruptedRunError: a signal came before the test data were looked at.
            CheckpointError, UsageError: a file cannot be written.
            DataError: the test data were damaged since the stream began; all of it is learned, and the files are there.
        """
        with self.stop.unbroken():
            self._save()
            save_checkpoint(self.learner, self.run.best)
            self.learner.export_onnx(self.run.model)
        if self.stop.requested():  # what follows looks at all test data
            with suppress(UsageError):
                self._log("interrupted")
            heed_stop(self)
        try:
            self._log("finished", accuracy=self.test_metrics().get("accuracy"))
        except DataError as error:  # of test data that were whole when the stream began
            self._log("finished", accuracy=None, error=str(error))
            raise DataError(f"{error}; all of the stream is learned, the model is {self.run.model}") from error

    def tell(self, as_json: bool, baseline: Mapping[str, Any] | None = None) -> None:
        """Print the last lines, with what was saved; ``baseline``: time and accuracy of the same stream, dense."""
        result = self.result(baseline)
        self.run.log("account", **account_of(result))
        self.display.close()
        emit(result, f"{account_text(result)}\n{last_line(result)}", as_json)

    def _dense(self, total: Totals) -> dict[str, Any]:
        """Estimate how long the same stream takes densely; a run that skips nothing is that dense run."""
        if self.config.methods == MethodSettings():
            return itself(total.seconds)
        # Those that wait cost nothing yet, so dense training must not be charged for them.
        done = total.instances_seen - self.learner.stream.waiting
        work = Work(total.seconds, total.macs_done, done, self._block_size(), self.config.stream.predict)
        return time_dense(self.learner, work, self._batches_again)

    def _batches_again(self, size: int) -> Iterable[Batch]:
        """Return batches of the stream from its beginning, random ones where it cannot be read twice."""
        if self.source.count is None:
            return until_stopped(self, random_batches(self.learner, size))
        return until_stopped(self, self.source.blocks(size, 0, self.stop.requested))

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
        if not self._is_due():
            return
        self._saved_at = time.monotonic()
        if position != self._saved_position:  # a pipe may give nothing for hours
            with going_on(self.display):
                self._save()
                self._log("saved")

    def _is_due(self) -> bool:
        return time.monotonic() - self._saved_at > 60 * self.config.training.save_every_minutes

    def _row(self) -> None:
        """Make a row about the instances since the last one; it is written with the next checkpoint."""
        learner, total = self.learner, self.learner.history.running
        metrics = self.test_metrics() if self.judges and self._is_tenth(total.instances_seen) else {}
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

    def _end(self) -> None:
        # What waits for its micro-batch stays in the checkpoint: the source may have grown when the run is resumed.
        if self.learner.history.running.instances_seen:
            self._row()

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
        save_checkpoint(self.learner, self.run.last)
        self._saved_at, self._saved_position = time.monotonic(), self.learner.stream.position

    def _log(self, event: str, **details: Any) -> None:
        whole, position = time.monotonic() - self.began, self.learner.stream.position
        last = {"last": name} if (name := self.source.last_name(position)) else {}
        self.run.log(event, instances=position, whole_seconds=whole, **last, **details)

    def _fail(self, error: EdgetrainError) -> NoReturn:
        step, position = self._is_step(error), self.learner.stream.position
        # A step that was not finite drops its instances. Where it is the first one of this process, the checkpoint
        # stays as it was: else every vain attempt to go on would cost some more. What a pipe gave is gone anyway.
        vain = step and self.source.count is not None and self.learner.step_count == self._first_step
        if not vain:
            save_at_last(self._save, str(error), self.run)
        with suppress(UsageError):  # the message tells it in any case
            self._log("failed", error=str(error))
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

    def _interrupt(self) -> None:
        save_at_last(self._save, "stopped by a signal", self.run)
        with suppress(UsageError):
            self._log("interrupted")
        raise InterruptedRunError(
            f"stopped after {self.learner.stream.position:,} instances; the state is saved in {self.run.last}, go on "
            f"with: {resuming(self.run)}"
        )

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
