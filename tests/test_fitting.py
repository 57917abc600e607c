"""The fit loop: what it counts, where it stops, and that going on equals never having stopped."""

from __future__ import annotations

import inspect
import json
from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np
import pytest

import edgetrain as et
from edgetrain.accounting import StepResult
from edgetrain.data import Dataset, batches
from edgetrain.errors import DataError, UsageError
from edgetrain.fitting import as_samples, evaluate_dataset, fit_loop
from edgetrain.history import History


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


class FakeGraph(SimpleNamespace):
    name_classes, num_classes = et.Graph.name_classes, et.Graph.num_classes


class FakeLearner:
    """Softmax regression in float64: the least that can be trained."""

    loss = "cross_entropy"

    def __init__(self, batch_size=4, seed=0, optimizer=None):
        self.graph = FakeGraph(
            name="fake", inputs=["input"], input_shape=(1, 2, 2), output_shape=(3,), normalization=None, class_names=()
        )
        self.batch_size, self.seed, self.optimizer = batch_size, seed, optimizer or FakeOptimizer()
        self.position, self.history, self.step_count = FakePosition(), History(), 0
        self.topology = SimpleNamespace(total_steps=None)
        self.instance_filter, self.stream = None, SimpleNamespace(flush=lambda: None, seen=0, waiting=0)
        self.weights = np.zeros((3, 4))
        self.batches = []

    def prepare(self):
        pass

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


def test_another_fit_ends_its_schedule_with_its_own_last_step():
    """Whatever trained before, and on how much: the rate of a schedule that is over is 0."""
    learner = FakeLearner(optimizer=FakeOptimizer(schedule=FakeSchedule()))
    fit_loop(learner, dataset(40), 2)
    assert learner.optimizer.schedule.total_steps == learner.topology.total_steps == 20
    learner.step_count += 7  # by partial_fit
    stopped = fit_loop(learner, dataset(8), 3, should_stop=lambda: learner.step_count == 29)
    assert learner.optimizer.schedule.total_steps == learner.topology.total_steps == 27 + 6
    learner.history = type(stopped).from_dict(stopped.to_dict())
    fit_loop(learner, dataset(8), 3, should_stop=lambda: learner.step_count == 30)
    assert learner.optimizer.schedule.total_steps == learner.topology.total_steps == 33
    learner.step_count += 5  # between a stop and what goes on
    fit_loop(learner, dataset(8), 3)
    assert learner.step_count == learner.optimizer.schedule.total_steps == learner.topology.total_steps == 38


def test_a_schedule_of_given_length_between_two_fits_keeps_it():
    learner = FakeLearner(optimizer=FakeOptimizer(schedule=FakeSchedule()))
    fit_loop(learner, dataset(8), 1)
    learner.optimizer = FakeOptimizer(schedule=FakeSchedule(500))
    fit_loop(learner, dataset(8), 1)
    assert learner.optimizer.schedule.total_steps == 500


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


def test_the_learner_names_all_options_and_takes_integers_of_any_type():
    ours, theirs = (inspect.signature(made).parameters for made in (et.Learner.fit, fit_loop))
    names = list(theirs)[1:]
    assert list(ours)[1:] == names
    assert [ours[n].default for n in names if n != "epochs"] == [theirs[n].default for n in names if n != "epochs"]
    learner = FakeLearner()
    fit_loop(learner, dataset(), np.int64(2))
    assert learner.position == FakePosition(2, 0)


@pytest.mark.parametrize(("labels", "names"), [([0, 1, 2], ("0", "1", "2")), ([0, 1, 1], ())])
def test_only_as_many_names_as_a_network_has_outputs_are_its_classes(labels, names):
    graph = et.Graph("line", input_shape=(1, 2, 2))
    flat = graph.add("Flatten", ["input"])
    graph.set_outputs([graph.add("Gemm", [flat, graph.parameter("w", np.ones((3, 4)))], transB=1)])
    learner = et.Learner(graph, batch_size=3, threads=1)
    learner.fit(Dataset.from_arrays(np.zeros((3, 1, 2, 2), np.uint8), labels), epochs=1)
    assert learner.graph.class_names == names


@pytest.mark.parametrize("epochs", [0, -1, 1.5, True, None], ids=repr)
def test_bad_number_of_epochs(epochs):
    with pytest.raises(UsageError, match=r"epochs=.*, expected an integer of at least 1"):
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
        as_samples(np.zeros(3), "training data", FakeLearner().graph, "mse")


def test_labels_of_a_pair_may_be_any_that_the_network_has():
    learner, x, few = FakeLearner(), np.zeros((6, 1, 2, 2), np.float32), np.zeros(6, np.int64)
    history = fit_loop(learner, (x, few), 1, validation=(x, np.arange(6) % 3))
    assert history.epochs[0].validation_accuracy == pytest.approx(1 / 3)
    assert learner.graph.class_names == ("0", "1", "2")
    with pytest.raises(DataError, match=r"validation data.*label 3 of image 3 is out of range, expected 0 to 2"):
        fit_loop(learner, (x, few), 1, validation=(x, np.arange(6)))


# ---- with a network --------------------------------------------------------------------------------------------------


def linear(outputs: int = 3, shape: tuple[int, ...] = (5,), **options) -> et.Learner:
    """Return a learner of one layer."""
    graph, rng = et.Graph("linear", input_shape=shape), np.random.default_rng(0)
    x = graph.inputs[0] if len(shape) == 1 else graph.add("Flatten", [graph.inputs[0]])
    weight = graph.parameter("w", rng.normal(0, 0.1, (outputs, int(np.prod(shape)))))
    graph.set_outputs([graph.add("Gemm", [x, weight, graph.parameter("b", np.zeros(outputs))], transB=1)])
    return et.Learner(graph, batch_size=8, threads=1, **({"optimizer": et.SGD(lr=0.1, momentum=0.5)} | options))


def regression_data(count: int = 30, shape: tuple[int, ...] = (5,)) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(count)
    x = rng.normal(size=(count, *shape)).astype(np.float32)
    return x, (x.reshape(count, -1) @ rng.normal(size=(int(np.prod(shape)), 3))).astype(np.float32)


@pytest.mark.parametrize("shape", [(5,), (2, 3), (1, 2, 3)])
def test_targets_are_learned_and_have_no_accuracy(shape):
    learner, validation = linear(shape=shape, loss="mse"), regression_data(11, shape)
    history = learner.fit(regression_data(30, shape), 12, validation=validation)
    assert history.epochs[-1].loss < 0.2 * history.epochs[0].loss
    assert all(np.isnan(r.accuracy) and np.isnan(r.validation_accuracy) for r in history.epochs)
    assert history.epochs[-1].validation_loss == pytest.approx(learner.evaluate(*validation)["loss"])
    assert history.best().validation_loss == min(history.column("validation_loss"))
    assert learner.graph.class_names == ()


def test_targets_go_through_the_batches_that_labels_would():
    (x, y), learner, twin = regression_data(), linear(loss="mse"), linear(loss="mse")
    learner.fit((x, y), 1, normalize=False)
    rows = np.arange(len(x), dtype=np.float32)[:, None, None, None]
    order = Dataset.from_arrays(rows, np.zeros(len(x), int))
    for numbers, _ in batches(order, 8, seed=0, epoch=0):
        chosen = numbers.reshape(-1).astype(int)
        twin.partial_fit(x[chosen], y[chosen])
    np.testing.assert_equal(learner.parameters(), twin.parameters())


def test_a_fit_on_targets_goes_on_exactly_from_a_checkpoint(tmp_path):
    data, through, half = regression_data(), linear(loss="mse"), linear(loss="mse")
    through.fit(data, 3)
    half.fit(data, 3, should_stop=lambda: half.step_count >= 6)
    half.save(tmp_path / "half.safetensors")
    resumed = et.Learner.load(tmp_path / "half.safetensors")
    resumed.fit(data, 3)
    np.testing.assert_equal(resumed.parameters(), through.parameters())
    assert resumed.history.column("loss") == through.history.column("loss")


def test_targets_with_an_instance_filter():
    learner = linear(loss="mse", instance_filter=et.SelectiveBackprop(rate=0.5))
    assert learner.fit(regression_data(80), 3).epochs[-1].instances_trained < 80


BAD_TARGETS = {
    "labels": (np.arange(30), r"training data': y: shape \(30,\) given, the network expects \(Nx3\)"),
    "too few": (np.zeros((29, 3)), r"different numbers of samples: \{'x': 30, 'y': 29\}"),
    "not a number": (np.full((30, 3), np.nan), "y: contains NaN"),
}


@pytest.mark.parametrize(("y", "message"), BAD_TARGETS.values(), ids=BAD_TARGETS)
def test_bad_targets_are_refused(y, message):
    with pytest.raises(DataError, match=message):
        linear(loss="mse").fit((regression_data()[0], y), 1)


def test_a_data_set_of_labels_has_no_targets():
    with pytest.raises(DataError, match=r"'arrays' has class labels.* numbers y of shape \(N, 3\)"):
        linear(shape=(1, 2, 2), loss="mse").fit(dataset(), 1)


def test_features_are_fitted_with_a_mean_for_each(tmp_path):
    rng = np.random.default_rng(0)
    y = np.arange(60) % 3
    x = (100 * rng.normal(size=(60, 5)) + [0, 1000, 0, 0, 0] + 400 * np.eye(5)[y]).astype(np.float32)
    learner = linear()
    history = learner.fit((x, y), 10, validation=(x, y))
    assert history.epochs[-1].validation_accuracy == learner.score(x, y) > 0.9
    np.testing.assert_allclose(learner.graph.normalization.mean, x.mean(0), rtol=1e-5)
    learner.export_onnx(tmp_path / "features.onnx")
    again = et.Learner(et.load_onnx(tmp_path / "features.onnx"), batch_size=8, threads=1)
    np.testing.assert_allclose(again.logits(x), learner.logits(x), rtol=1e-4, atol=1e-5)
    with pytest.raises(DataError, match=r"training data: features have shape \(60, 5, 1\), expected \(N, F\)"):
        learner.fit((x[:, :, None], y), 1)


@pytest.mark.parametrize("turns", [("observe", "fit"), ("fit", "observe")], ids="-".join)
def test_signals_with_a_row_meet_signals_without(turns):
    x, y = np.random.default_rng(0).random((44, 2, 1, 20), np.float32), np.arange(44) % 3
    learner = linear(shape=(2, 20), instance_filter=et.RandomFilter(rate=0.6, start=22))
    for turn in turns:
        if turn == "fit":
            learner.fit((x, y), 1, should_stop=lambda: learner.position.batch == 1)
        else:
            learner.observe(x[:11], y[:11])
        assert learner.stream.waiting or turn == turns[-1]  # all of the first block pass, more than one batch


# ---- what a refused fit leaves, and what callbacks hear ----


def small(**options) -> tuple[et.Learner, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    made = et.Learner(et.models.lenet5(), batch_size=8, threads=1, **options)
    return made, rng.random((60, 1, 28, 28), np.float32), rng.integers(0, 10, 60)


@pytest.mark.parametrize(("options", "settings"), [
    ({}, {"augmentation": "flp"}), ({}, {"augmentation": 3}), ({}, {"on_step": 3}), ({}, {"should_stop": True}),
    ({}, {"epochs": 0}), ({"memory_budget": 300_000}, {}),
    ({}, {"validation": (np.zeros((4, 1, 28, 27), np.float32), np.zeros(4, int))}),
])  # fmt: skip
def test_a_refused_fit_changes_nothing(options, settings):
    made, x, y = small(**options)
    with pytest.raises((UsageError, DataError, et.errors.MemoryBudgetError)):
        made.fit((x, y), **{"epochs": 1} | settings)
    assert made.graph.normalization is None
    assert made.topology.total_steps is None
    assert made.history.finished
    assert made.step_count == 0


@pytest.mark.parametrize("chosen", [None, "eif:rate=0.4,start=8", "selective:rate=0.4"])
def test_callbacks_hear_of_all_steps_of_an_epoch(chosen):
    made, x, y = small(instance_filter=chosen)
    for _ in range(2):
        heard: list[StepResult] = []
        made.fit((x, y), 1, on_step=lambda event, heard=heard: heard.append(event.step))
        record = made.history.epochs[-1]
        for name in ("instances_seen", "instances_kept", "instances_trained", "instances_uncertain", "macs_done"):
            assert sum(getattr(step, name) for step in heard) == getattr(record, name), name


@pytest.mark.parametrize("chosen", ["eif:rate=0.4,start=0", "selective:rate=0.4"])
def test_with_a_filter_another_fit_goes_on_behind_a_bad_image(chosen):
    made, x, y = small(instance_filter=chosen)
    x[30] = 3e38
    failures = 0
    for _ in range(4):
        try:
            made.fit((x, y), 1, normalize=False)
            break
        except et.errors.NumericalError:
            failures += 1
    assert failures == 1
    assert made.history.epochs[-1].instances_seen == 60


def test_the_same_classes_in_another_order_are_refused():
    made, x, y = small()
    names = tuple("abcdefghij")
    made.fit(Dataset.from_arrays(x, y % 10, names, allow_missing_classes=True), 1)
    with pytest.raises(DataError, match="labels would mean others"):
        made.fit(Dataset.from_arrays(x, y % 10, names[::-1], allow_missing_classes=True), 1)
    made.graph.class_names = tuple("9876543210")  # numbers of data without names are outputs, whatever they are called
    made.fit((x, y), 1)
    made.graph.class_names = names
    others = tuple("klmnopqrst")  # of another task, on purpose: they are taken, and the names stay
    made.fit(Dataset.from_arrays(x, y % 10, others, allow_missing_classes=True), 1)
    assert made.graph.class_names == names
