"""The fit loop: what it counts, where it stops, and that going on equals never having stopped."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np
import pytest

from edgetrain.accounting import StepResult
from edgetrain.data import Dataset
from edgetrain.errors import DataError, UsageError
from edgetrain.fitting import as_dataset, evaluate_dataset, fit_loop
from edgetrain.history import EpochRecord, History, Totals


@dataclass(frozen=True)
class FakeSchedule:
    total_steps: int | None = None


@dataclass(frozen=True)
class FakeOptimizer:
    lr: float = 0.1
    schedule: FakeSchedule | None = None

    def lr_at(self, step: int) -> float:
        total = self.schedule.total_steps if self.schedule else None
        return self.lr if total is None else self.lr * (1 - step / total)

    def with_total_steps(self, total: int) -> FakeOptimizer:
        return self if self.schedule.total_steps else replace(self, schedule=FakeSchedule(total))


@dataclass(frozen=True)
class FakePosition:
    epoch: int = 0
    batch: int = 0


class FakeLearner:
    """Softmax regression in float64: the least that can be trained."""

    def __init__(self, batch_size=4, seed=0, optimizer=None):
        self.graph = SimpleNamespace(
            name="fake", input_shape=(1, 2, 2), output_shape=(3,), normalization=None, class_names=()
        )
        self.batch_size, self.seed, self.optimizer = batch_size, seed, optimizer or FakeOptimizer()
        self.position, self.history, self.step_count = FakePosition(), History(), 0
        self.topology = SimpleNamespace(total_steps=None)
        self.instance_filter, self.stream = None, SimpleNamespace(flush=lambda: None)
        self.weights = np.zeros((3, 4))
        self.batches = []

    def partial_fit(self, x, y):
        probabilities = self._probabilities(x)
        loss = -np.log(probabilities[np.arange(len(y)), y]).mean()
        correct = int((probabilities.argmax(1) == y).sum())
        error = probabilities - np.eye(3)[y]
        self.weights -= self.optimizer.lr_at(self.step_count) * error.T @ x.reshape(len(x), -1) / len(y)
        self.step_count += 1
        self.batches.append(len(y))
        return StepResult(loss, correct, len(y), len(y), macs_dense=12, macs_done=6, seconds=0.0)

    def evaluate(self, x, y):
        probabilities = self._probabilities(x)
        return {
            "loss": float(-np.log(probabilities[np.arange(len(y)), y]).mean()),
            "accuracy": float((probabilities.argmax(1) == y).mean()),
        }

    def _probabilities(self, x):
        scores = x.reshape(len(x), -1) @ self.weights.T
        powers = np.exp(scores - scores.max(1, keepdims=True))
        return powers / powers.sum(1, keepdims=True)


def dataset(count=14, seed=0) -> Dataset:
    rng = np.random.default_rng(seed)
    y = np.arange(count) % 3
    x = rng.integers(0, 200, (count, 1, 2, 2)).astype(np.uint8)
    x[np.arange(count), 0, y // 2, y % 2] = 255
    return Dataset.from_arrays(x, y, ["a", "b", "c"])


def exact(history: History) -> list[dict]:
    """Everything but the times."""
    return [
        {key: value for key, value in vars(record).items() if key not in ("seconds", "images_per_second")}
        for record in history.epochs
    ]


def test_epochs_steps_and_partial_batches_are_counted():
    learner = FakeLearner()
    history = fit_loop(learner, dataset(), epochs=2, validation=dataset(6, 1))
    assert learner.batches == [4, 4, 4, 2] * 2
    assert (learner.position, learner.step_count) == (FakePosition(2, 0), 8)
    assert history is learner.history
    assert history.column("epoch") == [1, 2]
    assert history.column("steps") == [4, 8]
    assert history.column("instances_seen") == [14, 14]
    assert history.column("macs_done") == [24, 24]
    assert history.finished
    assert history.column("loss")[1] < history.column("loss")[0]


def test_epoch_loss_is_the_mean_over_instances_not_over_batches():
    learner = FakeLearner(optimizer=FakeOptimizer(lr=0.0))
    learner.weights = np.arange(12.0).reshape(3, 4)
    data = dataset()
    record = fit_loop(learner, data, epochs=1).epochs[0]
    whole = learner.evaluate(*data.take(np.arange(14)))
    assert record.loss == pytest.approx(whole["loss"], rel=1e-12)
    assert record.accuracy == whole["accuracy"]


def test_no_validation_gives_none():
    record = fit_loop(FakeLearner(), dataset(), epochs=1).epochs[0]
    assert (record.validation_loss, record.validation_accuracy) == (None, None)


@pytest.mark.parametrize("stop_after", [0, 1, 3, 4, 5, 7], ids=lambda n: f"after_{n}_steps")
def test_stopping_and_going_on_equals_one_go(stop_after):
    optimizer = FakeOptimizer(schedule=FakeSchedule())
    options = {"validation": dataset(6, 1), "augmentation": "shift:1"}
    through = FakeLearner(optimizer=optimizer)
    expected = fit_loop(through, dataset(), epochs=2, **options)
    parts = FakeLearner(optimizer=optimizer)
    stopped = fit_loop(parts, dataset(), epochs=2, should_stop=lambda: parts.step_count >= stop_after, **options)
    assert not stopped.finished
    assert parts.step_count == stop_after
    parts.history = History.from_dict(json.loads(json.dumps(stopped.to_dict())))
    again = fit_loop(parts, dataset(), epochs=2, **options)
    assert exact(again) == exact(expected)
    assert np.array_equal(parts.weights, through.weights)


def test_fit_after_a_finished_fit_trains_more():
    learner = FakeLearner()
    fit_loop(learner, dataset(), epochs=2)
    history = fit_loop(learner, dataset(), epochs=1)
    assert history.column("epoch") == [1, 2, 3]
    assert learner.position == FakePosition(3, 0)


def test_continued_fit_refuses_fewer_epochs_than_done():
    learner = FakeLearner()
    fit_loop(learner, dataset(), epochs=3, should_stop=lambda: learner.step_count >= 9)
    with pytest.raises(UsageError, match="epochs is 1, but 2 are done already; ask for more"):
        fit_loop(learner, dataset(), epochs=1)


def test_schedule_without_length_gets_that_of_the_fit():
    learner = FakeLearner(optimizer=FakeOptimizer(schedule=FakeSchedule()))
    history = fit_loop(learner, dataset(), epochs=2)
    assert learner.optimizer.schedule.total_steps == 8
    assert history.column("lr") == pytest.approx([0.1 * 5 / 8, 0.1 * 1 / 8])


def test_schedule_with_a_length_keeps_it():
    learner = FakeLearner(optimizer=FakeOptimizer(schedule=FakeSchedule(100)))
    fit_loop(learner, dataset(), epochs=2)
    assert learner.optimizer.schedule.total_steps == 100


def test_schedule_follows_when_a_continued_fit_gets_more_epochs():
    learner = FakeLearner(optimizer=FakeOptimizer(schedule=FakeSchedule()))
    fit_loop(learner, dataset(), epochs=2, should_stop=lambda: learner.step_count >= 3)
    fit_loop(learner, dataset(), epochs=5)
    assert learner.optimizer.schedule.total_steps == 20


def test_normalization_is_set_once_from_the_training_data():
    learner, data = FakeLearner(), dataset()
    fit_loop(learner, data, epochs=1)
    mean, std = data.statistics()
    assert np.array_equal(learner.graph.normalization.mean, mean)
    assert np.array_equal(learner.graph.normalization.std, std)
    fit_loop(learner, dataset(9, 5), epochs=1)
    assert np.array_equal(learner.graph.normalization.mean, mean)
    assert learner.graph.class_names == ("a", "b", "c")


def test_normalization_can_be_left_alone():
    learner = FakeLearner()
    fit_loop(learner, dataset(), epochs=1, normalize=False)
    assert learner.graph.normalization is None


def test_callbacks_see_every_step_and_epoch_with_the_position_past_it():
    learner, steps, epochs = FakeLearner(), [], []
    fit_loop(
        learner, dataset(), epochs=2, on_epoch=lambda record: epochs.append((record.epoch, learner.position)),
        on_step=lambda event: steps.append((event.epoch, event.batch, event.batches, learner.position.batch)),
    )  # fmt: skip
    assert steps == [(epoch, batch, 4, batch) for epoch in (1, 2) for batch in (1, 2, 3, 4)]
    assert epochs == [(1, FakePosition(1, 0)), (2, FakePosition(2, 0))]


def test_pair_of_arrays_equals_a_dataset():
    data = dataset()
    first, second = FakeLearner(), FakeLearner()
    fit_loop(first, data, epochs=1)
    fit_loop(second, (data.images, data.labels), epochs=1)
    assert np.array_equal(first.weights, second.weights)


def test_same_seed_same_result_other_seed_other_result():
    learners = [FakeLearner(seed=seed) for seed in (0, 0, 1)]
    for learner in learners:
        fit_loop(learner, dataset(), epochs=1)
    assert np.array_equal(learners[0].weights, learners[1].weights)
    assert not np.array_equal(learners[0].weights, learners[2].weights)


def test_evaluation_in_pieces_equals_the_whole():
    learner, data = FakeLearner(batch_size=1), dataset(30)
    learner.weights = np.arange(12.0).reshape(3, 4)
    whole = learner.evaluate(*data.take(np.arange(30)))
    assert evaluate_dataset(learner, data) == pytest.approx(whole)


@pytest.mark.parametrize("epochs", [0, -1, 1.5, True, None], ids=repr)
def test_bad_number_of_epochs(epochs):
    with pytest.raises(UsageError, match=r"epochs is .*, expected a whole number of at least 1"):
        fit_loop(FakeLearner(), dataset(), epochs)


def test_data_of_another_shape_or_with_more_classes():
    big = Dataset.from_arrays(np.zeros((2, 1, 3, 3), np.uint8), [0, 1])
    with pytest.raises(DataError, match=r"images of shape \(1, 3, 3\), but the network 'fake' expects \(1, 2, 2\)"):
        fit_loop(FakeLearner(), big, 1)
    many = Dataset.from_arrays(np.zeros((4, 1, 2, 2), np.uint8), [0, 1, 2, 3])
    with pytest.raises(DataError, match="has 4 classes, but the network 'fake' has 3 outputs"):
        fit_loop(FakeLearner(), many, 1)


def test_data_that_is_not_a_pair():
    with pytest.raises(DataError, match=r"training data is of type ndarray, expected a Dataset or a pair \(x, y\)"):
        as_dataset(np.zeros(3), "training data", FakeLearner().graph)


def test_history_survives_json_and_names_unknown_columns():
    learner = FakeLearner()
    history = fit_loop(learner, dataset(), epochs=2, validation=dataset(6, 1))
    assert History.from_dict(json.loads(json.dumps(history.to_dict()))) == history
    with pytest.raises(UsageError, match="history has no column 'los'; there are: epoch, steps, loss"):
        history.column("los")


def test_best_epoch_is_the_first_of_equals():
    values = dict.fromkeys(EpochRecord.__dataclass_fields__, 0)
    rows = [EpochRecord(**(values | {"epoch": n, "validation_accuracy": a})) for n, a in ((1, 0.5), (2, 0.7), (3, 0.7))]
    assert History(epochs=rows).best().epoch == 2
    assert History().best() is None


def test_totals_of_nothing_are_zero():
    assert (Totals().mean_loss, Totals().accuracy, Totals().images_per_second) == (0.0, 0.0, 0.0)
