"""What training has given so far: one record per epoch, and the sums of the running one.

Plain numbers that survive JSON exactly.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from edgetrain.accounting import StepResult
from edgetrain.errors import UsageError


@dataclass(frozen=True)
class Position:
    """Where ``fit`` stands: epochs done, batches done in the present epoch."""

    epoch: int = 0
    batch: int = 0


@dataclass(frozen=True, kw_only=True)
class EpochRecord:
    """What one epoch gave.

    Attributes:
        epoch: number of the epoch, from 1.
        steps: optimizer steps done since the learner was new.
        loss, accuracy: means over the training instances of the epoch, as they were trained on; with the loss
            ``"mse"`` there is no accuracy: it is NaN.
        validation_loss, validation_accuracy: after the epoch; ``None`` without validation data.
        lr: learning rate of the last step.
        seconds: training time: inside the steps, or inside ``observe``; reading and preparing data, validation and
            checkpoints are left out.
        images_per_second: instances seen per second of training time.
        instances_seen, instances_trained: the second is smaller when a filter skipped some.
        macs_dense, macs_done: multiply-accumulates a dense epoch needs, and those really executed.
        instances_kept, instances_uncertain, macs_selection: what the instance filter did, as in ``StepResult``.
        saved_filter, saved_error_maps, saved_weights, saved_activations: multiply-accumulates saved by each method.
    """

    epoch: int
    steps: int
    loss: float
    accuracy: float
    validation_loss: float | None
    validation_accuracy: float | None
    lr: float
    seconds: float
    images_per_second: float
    instances_seen: int
    instances_trained: int
    macs_dense: int
    macs_done: int
    instances_kept: int = 0
    instances_uncertain: int = 0
    macs_selection: int = 0
    saved_filter: int = 0
    saved_error_maps: int = 0
    saved_weights: int = 0
    saved_activations: int = 0


@dataclass
class Totals:
    """Sums over steps: of the running epoch, or of a stream.

    ``judged`` counts the instances that ``loss`` and ``correct`` are about: those trained on, or those predicted.
    """

    loss: float = 0.0
    correct: int = 0
    judged: int = 0
    seconds: float = 0.0
    instances_seen: int = 0
    instances_trained: int = 0
    instances_kept: int = 0
    instances_uncertain: int = 0
    macs_dense: int = 0
    macs_done: int = 0
    macs_selection: int = 0
    saved_filter: int = 0
    saved_error_maps: int = 0
    saved_weights: int = 0
    saved_activations: int = 0

    def add(self, step: StepResult, seconds: float, judged: int | None = None) -> None:
        """Count one step that took ``seconds``; it judged those trained on by default."""
        number = step.instances_trained if judged is None else judged
        if number:
            self.loss += float(step.loss) * number
            self.correct += int(step.correct)
            self.judged += number
        self.seconds += seconds
        for name in COUNTED:
            setattr(self, name, getattr(self, name) + int(getattr(step, name)))

    def counts(self) -> dict[str, int]:
        """Return the sums that ``EpochRecord`` has too, by name."""
        return {name: getattr(self, name) for name in COUNTED}

    @property
    def mean_loss(self) -> float:
        """Mean loss per judged instance so far."""
        return self.loss / max(self.judged, 1)

    @property
    def accuracy(self) -> float:
        """Share of judged instances predicted right so far."""
        return self.correct / max(self.judged, 1)

    @property
    def images_per_second(self) -> float:
        """Instances seen per second so far."""
        return self.instances_seen / self.seconds if self.seconds > 0 else 0.0


# What sums, steps and records of epochs all count: integers, under the same names.
COUNTED = tuple(item.name for item in fields(Totals) if item.name not in ("loss", "correct", "judged", "seconds"))


@dataclass
class History:
    """The epochs that a learner has gone through, and where its present fit stands.

    Attributes:
        epochs: one record per finished epoch.
        running: sums of the unfinished epoch.
        first_epoch: epoch at which the present (or last) fit began.
        first_step, first_seen: steps taken and instances that the filter had seen by then; ``None`` in checkpoints of
            older versions, whose schedules counted the epochs of all fits as long as those of the latest one.
        finished: whether that fit reached its last epoch.
        sets_schedule: whether the fit chose the schedule's number of steps.
        schedule_steps: the number that it chose, ``None`` in checkpoints of older versions: another one is the user's.

    Example:
        >>> History().column("loss")
        []
    """

    epochs: list[EpochRecord] = field(default_factory=list)
    running: Totals = field(default_factory=Totals)
    first_epoch: int = 0
    first_step: int | None = None
    first_seen: int | None = None
    finished: bool = True
    sets_schedule: bool = False
    schedule_steps: int | None = None

    def __len__(self) -> int:
        """Return the number of finished epochs."""
        return len(self.epochs)

    def column(self, name: str) -> list[Any]:
        """Return one field of every epoch, oldest first.

        Raises:
            UsageError: there is no such field.
        """
        known = [item.name for item in fields(EpochRecord)]
        if name not in known:
            raise UsageError(f"history has no column '{name}'; there are: {', '.join(known)}")
        return [getattr(record, name) for record in self.epochs]

    def best(self) -> EpochRecord | None:
        """Return the first epoch with the highest validation accuracy (training accuracy without validation).

        Where there is no accuracy (``"mse"``) it is the first epoch with the lowest loss.
        """
        return max(self.epochs, key=_quality, default=None)

    def to_dict(self) -> dict[str, Any]:
        """Return plain dicts, lists and numbers; ``from_dict`` turns them back exactly."""
        return asdict(self)

    @classmethod
    def from_dict(cls, table: Mapping[str, Any]) -> History:
        """Return the history that ``to_dict`` described.

        Raises:
            TypeError: a key is unknown or missing.
        """
        epochs = [EpochRecord(**record) for record in table["epochs"]]
        return cls(**{**table, "epochs": epochs, "running": Totals(**table["running"])})


def _quality(record: EpochRecord) -> float:
    accuracy = record.accuracy if record.validation_accuracy is None else record.validation_accuracy
    if not math.isnan(accuracy):
        return accuracy
    return -(record.loss if record.validation_loss is None else record.validation_loss)
