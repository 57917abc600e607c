"""Learning from a stream block by block: the normalisation of its inputs, and instances that cannot be learned from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from edgetrain.cli.config import Config
from edgetrain.cli.normalizing import STANDS_OUT, normalization_of, sizes_of, standing_out
from edgetrain.cli.output import count
from edgetrain.cli.progress import Display
from edgetrain.data.streaming import InstanceSource
from edgetrain.errors import NumericalError
from edgetrain.fitting import block_size

if TYPE_CHECKING:
    from edgetrain.learner import Learner


def size_of_blocks(config: Config, learner: Learner) -> int:
    """Return how many instances of a stream are looked at together."""
    return config.stream.block or block_size(learner)


@dataclass
class BlockLearner:
    """Learns from the blocks of a stream.

    Attributes:
        learner, config, source, display: of the run.
        log: takes an event of the run and its details.
        failed_at: position where the run failed before it was resumed; -1 if it did not.
        size: instances of a full block.
        unpredicted: names the first instance that could not be predicted, if there is one: the run is to fail.
    """

    learner: Learner
    config: Config
    source: InstanceSource
    display: Display
    log: Callable[..., None]
    failed_at: int
    unpredicted: NumericalError | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.size = size_of_blocks(self.config, self.learner)
        self._latest = 0, np.zeros(0, np.float32)  # the position of the latest block, and its images

    def learn(self, x: NDArray[np.float32], y: NDArray[np.int64]) -> None:
        """Learn from a block.

        Raises:
            NumericalError: a step was not finite, or an instance of a source that can be read again is ``unpredicted``.
        """
        learner = self.learner
        bad = self._unpredictable(x, self._normalize(x))
        self._latest = learner.stream.position, x
        try:
            if not bad:
                self._observe(x, y)
        except NumericalError as error:
            if learner.stream.latest is not None or not error.samples or not _can_predict(learner):
                raise
            bad = error.samples
        if bad:
            self._learn_without(x, y, bad)
        self.display.instances(learner.stream.position, self.source.count, learner.history.running)

    def suspect(self) -> str:
        """Return which instance of the latest block stands out, if one does: it may be wrong."""
        position, x = self._latest
        sizes = sizes_of(x)
        if sizes.max() < STANDS_OUT * np.median(sizes):
            return ""
        where = "" if self.source.count is None else f"; if it is wrong, correct it in {self.config.data.source}"
        return (
            f". The largest number of the latest block, {sizes.max():.3g}, is in instance "
            f"{position + sizes.argmax():,} of {self.source.name} (counted from 0){where}"
        )

    def _learn_without(self, x: NDArray[np.float32], y: NDArray[np.int64], bad: tuple[int, ...]) -> None:
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
            self.unpredicted = self.unpredicted or error
            good = np.delete(np.arange(len(y)), bad)
            if len(good):
                self.learn(x[good], y[good])
            return
        if first:
            self.learn(x[:first], y[:first])
        if position != self.failed_at:
            self.unpredicted = error
            raise error
        gone = next((place for place, sample in enumerate(bad) if place != sample), len(bad))
        self.learner.history.running.add(stream.leave_out(gone, self.config.stream.predict), 0.0, judged=0)
        self.log("left out", first=position, number=gone)
        self.display.say(f"{error}; left out: {count(gone, 'instance')} from {position:,} on")
        if gone < len(y):
            self.learn(x[gone:], y[gone:])

    def _normalize(self, x: NDArray[np.float32]) -> NDArray[np.intp]:
        """Give a network without input normalisation that of the first block; a stream cannot be looked at twice.

        Where that has but a few instances, as of a slow pipe, it is that of all that have come before the first step.

        Returns:
            Which instances of the block stand out so much that they were left out of it.
        """
        learner, nothing = self.learner, np.zeros(0, np.intp)
        if not self.config.data.normalize or learner.graph.normalization is not None or learner.step_count:
            return nothing
        come = learner.stream.behind_waiting(x.reshape(len(x), *learner.graph.input_shape))
        if len(come) < min(self.size, learner.batch_size):
            return nothing
        strange = standing_out(come)
        learner.graph.normalization = normalization_of(come[~strange])
        if strange.any():
            largest = f"{np.abs(come[strange]).max():.3g}"
            self.log("normalized without", number=int(strange.sum()), largest=largest)
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
