"""The learner's contract: shapes and types, what is refused at the door, state, and agreement with PyTorch."""

from __future__ import annotations

import copy
import math
import re
from dataclasses import FrozenInstanceError, fields, replace
from pathlib import Path

import numpy as np
import pytest

import edgetrain as et
from edgetrain.arrays import batch_of
from edgetrain.devices import load_profile
from edgetrain.errors import (
    CheckpointError,
    DataError,
    EdgetrainError,
    GraphError,
    MemoryBudgetError,
    ModelError,
    NumericalError,
    UsageError,
)
from edgetrain.graph import Graph
from edgetrain.plans import MemoryPlan

CLASSES = 3
SHAPE = (2, 6, 6)
PROFILE = load_profile("generic-x86_64")
COUNTS = pytest.mark.parametrize("count", [1, 3, 8, 9, 25])


def _norm(graph: Graph, name: str, channels: int) -> list[str]:
    ones, zeros = np.ones(channels), np.zeros(channels)
    return [graph.parameter(f"{name}.weight", ones), graph.parameter(f"{name}.bias", zeros),
            graph.parameter(f"{name}.running_mean", zeros, trainable=False),
            graph.parameter(f"{name}.running_var", ones, trainable=False)]  # fmt: skip


def classifier(dropout: float = 0.0, seed: int = 0) -> Graph:
    """Convolution, normalisation, rectifier, pooling, perhaps dropout, dense."""
    rng = np.random.default_rng(seed)
    graph = Graph("small", input_shape=SHAPE)
    weight = graph.parameter("conv.weight", rng.normal(0, 0.3, (4, 2, 3, 3)))
    x = graph.add("Conv", ["input", weight], name="conv", kernel_shape=[3, 3], pads=[1] * 4)
    x = graph.add("Relu", [graph.add("BatchNormalization", [x, *_norm(graph, "norm", 4)], name="norm")])
    x = graph.add("Flatten", [graph.add("MaxPool", [x], kernel_shape=[2, 2], strides=[2, 2])])
    if dropout:
        x = graph.add("Dropout", [x], ratio=dropout)
    weight = graph.parameter("fc.weight", rng.normal(0, 0.2, (CLASSES, 36)))
    dense = [weight, graph.parameter("fc.bias", np.zeros(CLASSES))]
    graph.set_outputs([graph.add("Gemm", [x, *dense], name="fc", transB=1)])
    return graph


def regression() -> Graph:
    rng = np.random.default_rng(1)
    graph = Graph("regression", input_shape=(5,))
    hidden = [graph.parameter("hidden.weight", rng.normal(size=(8, 5))), graph.parameter("hidden.bias", np.zeros(8))]
    out = [graph.parameter("out.weight", rng.normal(size=(2, 8))), graph.parameter("out.bias", np.zeros(2))]
    x = graph.add("Tanh", [graph.add("Gemm", ["input", *hidden], transB=1)])
    graph.set_outputs([graph.add("Gemm", [x, *out], transB=1)])
    return graph


def learner(graph: Graph | None = None, **options) -> et.Learner:
    options = {"batch_size": 8, "threads": 1, "optimizer": et.SGD(lr=0.1, momentum=0.9)} | options
    return et.Learner(graph or classifier(), PROFILE, **options)


def batch(count: int = 8, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng((seed, count))
    return rng.standard_normal((count, *SHAPE), np.float32), rng.integers(0, CLASSES, count)


def content(of: et.Learner) -> dict[str, bytes]:
    tensors, meta = of.state()
    return {name: array.tobytes() for name, array in tensors.items()} | {"meta": repr(meta).encode()}


# ---- shapes and types ------------------------------------------------------------------------------------------------


@COUNTS
def test_a_step_reports_what_it_did(count):
    step = learner().partial_fit(*batch(count))
    assert [field.name for field in fields(step)] == [
        "loss", "correct", "instances_seen", "instances_trained", "macs_dense", "macs_done", "seconds",
        "instances_kept", "instances_uncertain", "macs_selection", "saved_filter", "saved_error_maps", "saved_weights",
        "saved_activations",
    ]  # fmt: skip
    assert [type(value) for value in vars(step).values()] == [float, int, int, int, int, int, float, *[int] * 7]
    assert (step.instances_seen, step.instances_trained, step.instances_kept) == (count, count, count)
    assert 0 <= step.correct <= count
    assert step.macs_dense == step.macs_done > count * classifier().macs()
    assert step.seconds > 0


def test_a_step_result_is_frozen():
    with pytest.raises(FrozenInstanceError):
        learner().partial_fit(*batch()).loss = 0.0


@COUNTS
def test_predictions_have_the_shapes_and_types_of_the_contract(count):
    some, (x, y) = learner(), batch(count)
    labels, chances, logits = some.predict(x), some.predict_proba(x), some.logits(x)
    assert (labels.shape, labels.dtype) == ((count,), np.int64)
    assert (chances.shape, chances.dtype) == ((count, CLASSES), np.float32)
    assert (logits.shape, logits.dtype) == ((count, CLASSES), np.float32)
    assert [type(value) for value in some.evaluate(x, y).values()] == [float, float]
    assert type(some.score(x, y)) is float


def test_predictions_agree_with_each_other():
    some, (x, y) = learner(), batch(25)
    some.partial_fit(x, y)
    chances = some.predict_proba(x)
    np.testing.assert_allclose(chances.sum(1), 1, rtol=1e-6)
    np.testing.assert_array_equal(some.predict(x), chances.argmax(1))
    found = some.evaluate(x, y)
    assert found["accuracy"] == some.score(x, y) == np.mean(some.predict(x) == y)
    assert found["loss"] == pytest.approx(-np.log(chances[np.arange(25), y]).mean(), rel=1e-5)


def test_probabilities_of_huge_logits_are_finite():
    some = learner()
    some.load_parameters({name: 1e4 * array for name, array in some.parameters().items() if name == "fc.weight"})
    assert np.isfinite(some.predict_proba(batch()[0])).all()


PREDICTING = pytest.mark.parametrize("method", ["logits", "predict", "predict_proba", "evaluate", "score"])


@PREDICTING
def test_predictions_of_a_weight_that_is_not_a_number_are_refused(method):
    some, (x, y) = learner(), batch()
    some.graph.arrays["fc.bias"][1] = np.nan
    with pytest.raises(NumericalError, match=r"outputs of 'small' .*\(sample 0\): 'fc.bias' holds NaN .*; load an"):
        getattr(some, method)(*((x, y) if method in ("evaluate", "score") else (x,)))


@PREDICTING
def test_predictions_of_inputs_that_overflow_are_refused(method):
    some, (x, y) = learner(), batch()
    x[3] = 3e38
    with pytest.raises(NumericalError, match=r"\(sample 3\): numbers on the way are beyond float32; scale the inputs"):
        getattr(some, method)(*((x, y) if method in ("evaluate", "score") else (x,)))


def test_the_loss_of_a_step_is_the_one_before_the_update():
    some, (x, y) = learner(), batch()
    first = some.partial_fit(x, y).loss
    second = some.partial_fit(x, y).loss
    assert first == learner().partial_fit(x, y).loss
    assert second < first


def test_parameters_are_copies_in_onnx_layout():
    some, graph = learner(), classifier()
    found = some.parameters()
    assert {n: (a.shape, a.dtype.name) for n, a in found.items()} == {
        n: (a.shape, "float32") for n, a in graph.arrays.items()
    }
    np.testing.assert_array_equal(found["conv.weight"], graph.arrays["conv.weight"])
    found["conv.weight"][:] = 7
    np.testing.assert_array_equal(some.parameters()["conv.weight"], graph.arrays["conv.weight"])


def test_gradients_are_those_of_the_trainable_parameters():
    some = learner()
    grads = some.gradients(*batch())
    arrays = classifier().arrays
    assert {name: grad.shape for name, grad in grads.items()} == {
        name: arrays[name].shape for name in arrays if "running" not in name
    }
    assert all(grad.dtype == np.float32 and np.abs(grad).max() > 0 for grad in grads.values())


def test_gradients_change_neither_averages_nor_optimizer_nor_count():
    some, twin = learner(), learner()
    some.partial_fit(*batch())
    twin.partial_fit(*batch())
    some.gradients(*batch(5, seed=1))
    assert content(some) == content(twin)
    assert some.partial_fit(*batch(seed=2)).loss == twin.partial_fit(*batch(seed=2)).loss


def test_gradients_of_a_learner_that_never_trained_change_nothing():
    some = learner()
    some.gradients(*batch())
    assert content(some) == content(learner())


def test_the_users_graph_is_not_changed():
    graph = classifier()
    before = {name: array.copy() for name, array in graph.arrays.items()}
    learner(graph).partial_fit(*batch())
    np.testing.assert_equal(graph.arrays, before)


def test_the_users_data_is_not_changed():
    x, y = batch(9)
    copies = x.copy(), y.copy()
    some = learner()
    some.partial_fit(x, y)
    some.evaluate(x, y)
    np.testing.assert_array_equal(x, copies[0])
    np.testing.assert_array_equal(y, copies[1])


def test_the_same_seed_gives_the_same_bits():
    losses = [learner(classifier(dropout=0.5), seed=seed).partial_fit(*batch()).loss for seed in (3, 3, 4)]
    assert losses[0] == losses[1] != losses[2]


def test_inputs_go_by_name_too():
    some, (x, _) = learner(), batch()
    np.testing.assert_array_equal(some.logits({"input": x}), some.logits(x))


def test_a_signal_may_have_a_row_or_none():
    some = learner(et.models.cnn1d(input_shape=(3, 64), num_classes=4))
    x = np.random.default_rng(0).standard_normal((5, 3, 64), np.float32)
    np.testing.assert_array_equal(some.logits(x[:, :, None]), some.logits(x))


SAME_SAMPLES = {
    "signal with a row": ((3, 8), (3, 1, 8)),
    "map of one row without it": ((3, 1, 8), (3, 8)),
    "image of one channel without it": ((1, 5, 8), (5, 8)),
}


@pytest.mark.parametrize(("shape", "given"), SAME_SAMPLES.values(), ids=SAME_SAMPLES)
def test_the_other_shape_of_the_same_samples(shape, given):
    x = np.arange(2 * math.prod(shape), dtype=np.float32).reshape(2, *shape)
    np.testing.assert_array_equal(batch_of(x.reshape(2, *given), shape), x)


OTHER_SAMPLES = {
    "rows and columns of a signal in turn": ((6, 8), (8, 1, 6)),
    "a signal in one column": ((6, 8), (48, 1)),
    "a signal in one row": ((6, 8), (1, 1, 48)),
    "an image in one row": ((1, 4, 8), (1, 1, 32)),
    "channels of a map of one row in turn": ((6, 1, 8), (8, 6)),
    "features as an image": ((6,), (6, 1, 1)),
}


@pytest.mark.parametrize(("shape", "given"), OTHER_SAMPLES.values(), ids=OTHER_SAMPLES)
def test_samples_of_the_right_size_and_another_shape_are_refused(shape, given):
    with pytest.raises(DataError, match=rf"x: shape {re.escape(str((2, *given)))} given, the network expects \(Nx"):
        batch_of(np.zeros((2, *given), np.float32), shape)


def test_channels_last_are_refused_with_a_remedy():
    with pytest.raises(DataError, match=r"channels come first: x.transpose\(0, 3, 1, 2\)"):
        learner().predict(batch()[0].transpose(0, 2, 3, 1))


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int64])
@pytest.mark.parametrize("method", ["partial_fit", "observe", "fit"])
def test_integers_are_pixels_in_every_method(method, dtype):
    pixels, y = np.random.default_rng(0).integers(0, 256, (8, *SHAPE)).astype(dtype), batch()[1]
    made = learner(), learner()
    numbers = pixels.astype(np.float32) / np.float32(255)
    for some, x in zip(made, (pixels, numbers), strict=True):
        some.fit((x, y), 1, normalize=False) if method == "fit" else getattr(some, method)(x, y)
        assert some.step_count == 1
    np.testing.assert_equal(made[0].parameters(), made[1].parameters())
    np.testing.assert_equal(made[0].gradients(pixels, y), made[0].gradients(numbers, y))
    assert made[0].evaluate(pixels, y) == made[0].evaluate(numbers, y)


def test_integer_targets_are_no_pixels():
    some, (x, y) = learner(regression(), loss="mse"), targets(8)
    whole = y.round().astype(np.int64)
    assert some.evaluate(x, whole)["loss"] == some.evaluate(x, whole.astype(np.float32))["loss"]


# ---- what is refused at the door -------------------------------------------------------------------------------------

X, Y = batch()
BAD_BATCHES = {
    "other map size": (X[..., :5], Y, r"x: shape \(8, 2, 6, 5\) given, the network expects \(Nx2x6x6\)"),
    "no batch dimension": (X[0], Y[:1], r"x: shape \(2, 6, 6\) given, .*; add the batch dimension: x\[None\]"),
    "no sample": (X[:0], Y[:0], "x: no sample given, expected at least one"),
    "integers that are no pixels": (200 * X.round().astype(int), Y, r"x has dtype int64 with values -\d+ to \d+, exp"),
    "lists of different lengths": ([[1.0], [2.0, 3.0]], Y[:2], "x is not one rectangular array"),
    "lists of labels in lists": (X[:2], [[0], [1, 2]], "y is not one rectangular array"),
    "truth values": (X > 0, Y, "x: dtype bool given, expected float32"),
    "text": (X.astype(str), Y, "x: dtype <U32 given, expected float32"),
    "complex": (X.astype(complex), Y, "x: dtype complex128 given, expected float32"),
    "objects": (X.astype(object), Y, "x: dtype object given"),
    "not a number": (np.where(X > 2, np.nan, X), Y, "x: contains NaN or infinite numbers"),
    "infinite": (np.where(X > 2, np.inf, X), Y, "x: contains NaN or infinite numbers"),
    "too large for float32": (X.astype(float) * 1e300, Y, "x: contains NaN or infinite numbers"),
    "infinities that cancel": (np.where(X > 1, np.inf, np.where(X < -1, -np.inf, X)), Y, "x: contains NaN or infinite"),
    "fewer labels": (X, Y[:5], r"y: shape \(5,\) given, expected \(8,\): one label per sample"),
    "labels in a column": (X, Y[:, None], r"y: shape \(8, 1\) given, expected \(8,\)"),
    "one label": (X, Y[0], r"y: shape \(\) given, expected \(8,\)"),
    "one-hot labels": (X, np.eye(CLASSES)[Y], "y: dtype float64 given, expected integer class labels"),
    "fractional labels": (X, Y + 0.5, "y: dtype float64 given, expected integer class labels"),
    "label too large": (X, Y + 3, "y: label [345] given, expected 0 to 2: the network has 3 outputs"),
    "negative label": (X, Y - 4, "y: label -[234] given, expected 0 to 2"),
    "unknown input": ({"image": X}, Y, r"inputs \['image'\] given, the network 'small' expects \['input'\]"),
}
BATCHES = pytest.mark.parametrize(("x", "y", "message"), BAD_BATCHES.values(), ids=BAD_BATCHES)


@pytest.fixture(scope="module")
def shared() -> et.Learner:
    return learner()


@BATCHES
def test_a_bad_batch_is_refused_and_changes_nothing(shared, x, y, message):
    before = content(shared)
    with pytest.raises(DataError, match=message):
        shared.partial_fit(x, y)
    assert content(shared) == before


@pytest.mark.parametrize("samples", [3, 900])
@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
def test_one_number_that_is_not_finite_is_found_wherever_it_stands(samples, number):
    for place in ((0, 0, 0), (samples // 2, 4, 3), (samples - 1, 5, 7)):
        x = np.zeros((samples, 1, 6, 8), np.float32)
        x[place[0], 0, *place[1:]] = number
        with pytest.raises(DataError, match="x: contains NaN or infinite numbers"):
            batch_of(x, (1, 6, 8))
    biggest = np.full((samples, 1, 6, 8), np.finfo(np.float32).max, np.float32)
    assert batch_of(biggest, (1, 6, 8)) is biggest


@BATCHES
@pytest.mark.parametrize("method", ["gradients", "evaluate", "score"])
def test_every_method_refuses_a_bad_batch(shared, method, x, y, message):
    with pytest.raises(DataError, match=message):
        getattr(shared, method)(x, y)


BAD_INPUTS = {key: (row[0], row[2]) for key, row in BAD_BATCHES.items() if row[2].startswith(("x", "inputs"))}


@pytest.mark.parametrize(("x", "message"), BAD_INPUTS.values(), ids=BAD_INPUTS)
@pytest.mark.parametrize("method", ["predict", "predict_proba", "logits"])
def test_every_prediction_refuses_bad_inputs(shared, method, x, message):
    with pytest.raises(DataError, match=message):
        getattr(shared, method)(x)


BAD_SETTINGS = {
    "batch size of zero": ({"batch_size": 0}, UsageError, "batch_size=0, expected an integer of at least 1"),
    "batch size as text": ({"batch_size": "8"}, UsageError, "batch_size='8', expected"),
    "no thread": ({"threads": 0}, UsageError, "threads=0, expected an integer from 1 to"),
    "half a thread": ({"threads": 0.5}, UsageError, "threads=0.5, expected an integer from 1 to"),
    "unknown loss": ({"loss": "hinge"}, UsageError, "loss='hinge'.* expected 'cross_entropy' or 'mse'"),
    "smoothing of one": ({"label_smoothing": 1.0}, UsageError, "label_smoothing=1.0"),
    "negative smoothing": ({"label_smoothing": -0.1}, UsageError, "label_smoothing=-0.1"),
    "budget in words": ({"memory_budget": "much"}, UsageError, "memory 'much': expected a number and a unit"),
    "budget below nothing": ({"memory_budget": -1}, UsageError, "memory -1: expected a whole number of bytes"),
    "budget as a fraction": ({"memory_budget": 64e6}, UsageError, r"memory 64000000\.0: expected a whole number"),
    "seed as text": ({"seed": "abc"}, UsageError, "seed='abc', expected an integer of at least 0"),
    "negative seed": ({"seed": -1}, UsageError, "seed=-1, expected an integer of at least 0"),
    "seed beyond int64": ({"seed": 2**63}, UsageError, f"seed={2**63}, expected an integer from 0 to {2**63 - 1}"),
    "smoothing as text": ({"label_smoothing": "0.1"}, UsageError, "label_smoothing='0.1', expected a number"),
    "a truth as batch size": ({"batch_size": True}, UsageError, "batch_size=True, expected an integer"),
    "graph by name": ({"graph": "lenet5"}, UsageError, r"graph='lenet5', expected a Graph; make one with"),
    "class of a policy": ({"sparsity": et.RigL}, UsageError, r"sparsity=<class .*, or None; make one: RigL\(\)"),
    "policy of another kind": (
        {"instance_filter": et.RigL()}, UsageError, r"instance filter=RigL\(.*expected one of EarlyInstanceFilter, "
    ),
    "text of another kind": ({"error_pruning": "rigl"}, UsageError, "error pruning 'rigl': unknown name 'rigl'"),
    "optimizer by name": ({"optimizer": "sgd"}, UsageError, "optimizer='sgd', expected an optimizer such as"),
}


@pytest.mark.parametrize(("settings", "error", "message"), BAD_SETTINGS.values(), ids=BAD_SETTINGS)
def test_bad_settings_are_refused(settings, error, message):
    with pytest.raises(error, match=message):
        learner(**settings)


def test_policies_may_be_given_as_text():
    some = learner(sparsity="rigl:weights=0.5", error_pruning="channels", instance_filter="random:rate=0.5")
    assert (some.sparsity, some.error_pruning) == (et.RigL(weights=0.5), et.ErrorMapPruning())
    assert some.instance_filter == et.RandomFilter(rate=0.5)
    assert some.observe(*batch()).instances_seen == 8
    assert learner(sparsity="none").sparsity is None


def test_integers_of_numpy_are_integers():
    some = learner(batch_size=np.int64(8), seed=np.uint8(3), threads=np.int32(1), memory_budget=np.int64(1 << 26))
    settings = some.batch_size, some.seed, some.threads, some.memory_budget
    assert settings == (8, 3, 1, 1 << 26)
    assert {type(value) for value in settings} == {int}


def test_a_budget_of_nothing_is_no_limit():
    learner(memory_budget=0).partial_fit(*batch(200))


def test_no_profile_is_refused():
    with pytest.raises(UsageError, match="profile=None, expected 'host', the name of a board, a path or a"):
        et.Learner(classifier(), None)


def test_an_unknown_profile_is_refused():
    with pytest.raises(EdgetrainError, match="no-such-board"):
        et.Learner(classifier(), "no-such-board")


def test_a_graph_without_parameters_cannot_train_but_predicts():
    graph = Graph("fixed", input_shape=(CLASSES,))
    graph.set_outputs([graph.add("Relu", ["input"])])
    fixed = learner(graph)
    assert fixed.predict(np.eye(CLASSES, dtype=np.float32)).tolist() == [0, 1, 2]
    with pytest.raises(GraphError, match="no trainable parameter"):
        fixed.partial_fit(np.eye(CLASSES, dtype=np.float32), np.arange(CLASSES))


def test_another_kind_of_optimizer_is_refused_halfway():
    some = learner()
    with pytest.raises(UsageError, match="cannot go from sgd to adam"):
        some.optimizer = et.Adam()
    some.optimizer = et.SGD(lr=0.001, momentum=0.5)
    assert some.optimizer.lr == 0.001
    with pytest.raises(UsageError, match="their state differs"):
        some.optimizer = et.SGD(lr=0.001)  # without its velocity


# ---- memory budget ---------------------------------------------------------------------------------------------------


def test_a_step_over_the_budget_names_its_parts_and_the_remedy():
    tight = learner(et.models.resnet(depth=8), memory_budget="1.5MiB")
    with pytest.raises(MemoryBudgetError) as caught:
        tight.partial_fit(np.zeros((8, 3, 32, 32), np.float32), np.zeros(8, int))
    message = str(caught.value)
    names = ("weights", "gradients", "optimizer", "activations", "workspace", "tables")
    parts = ", ".join(rf"{name} \d+\.\d" for name in names)
    assert re.match(rf"a step of 8 samples needs [1-9]\.\d{{3}} MiB \({parts}\), the budget is 1\.500 MiB; ", message)
    assert message.endswith("use a smaller batch size or network, or a larger budget")
    assert tight.step_count == 0


def test_only_the_batch_that_is_too_large_is_refused():
    peak = learner().memory_plan().peak_bytes
    fits = learner(memory_budget=peak)
    fits.partial_fit(*batch())
    with pytest.raises(MemoryBudgetError):
        fits.partial_fit(*batch(80))
    fits.partial_fit(*batch())
    assert fits.step_count == 2


def test_the_plan_adds_up():
    plan = learner().memory_plan()
    assert isinstance(plan, MemoryPlan)
    assert list(plan.parts) == ["weights", "gradients", "optimizer", "activations", "workspace", "tables"]
    assert plan.peak_bytes == sum(plan.parts.values())
    assert all(size >= 0 for size in plan.parts.values())


def test_a_larger_batch_needs_more_activations_only():
    some = learner()
    small, large = some.memory_plan(8).parts, some.memory_plan(64).parts
    assert large["activations"] > 6 * small["activations"]
    assert {k: small[k] for k in ("weights", "gradients", "optimizer")} == {
        k: large[k] for k in ("weights", "gradients", "optimizer")
    }


# ---- loading parameters ----------------------------------------------------------------------------------------------


def test_parameters_load_from_a_dict():
    some, other = learner(), learner(classifier(seed=1))
    report = some.load_parameters(other.parameters())
    assert set(report.by_name) == set(other.parameters())
    np.testing.assert_equal(some.parameters(), other.parameters())
    np.testing.assert_array_equal(some.logits(batch()[0]), other.logits(batch()[0]))


def test_some_parameters_may_be_loaded_and_the_report_says_which():
    some = learner()
    report = some.load_parameters({"fc.bias": [1.0, 2.0, 3.0]})
    assert report.by_name == ("fc.bias",)
    assert "conv.weight" in report.missing
    assert some.parameters()["fc.bias"].tolist() == [1, 2, 3]
    np.testing.assert_array_equal(some.parameters()["conv.weight"], classifier().arrays["conv.weight"])


def test_parameters_that_do_not_fit_are_refused():
    with pytest.raises(ModelError, match="no weights match the graph 'small'"):
        learner().load_parameters({"fc.weight": np.zeros((7, 7))})


@pytest.mark.parametrize(
    "arrays", [{"foo": np.full(4, 9.0)}, {"fc.bias": [1.0, np.nan, 3.0]}], ids=["unknown name", "not a number"]
)
def test_parameters_that_are_refused_change_nothing(arrays):
    some = learner()
    before = content(some)
    with pytest.raises(ModelError):
        some.load_parameters(arrays)
    assert content(some) == before


def test_another_last_layer_leaves_the_rest_to_be_loaded():
    some, other = learner(), learner(classifier(seed=1)).parameters()
    report = some.load_parameters(other | {"fc.weight": np.zeros((7, 36)), "fc.bias": np.zeros(7)})
    assert report.missing == report.unused == ("fc.weight", "fc.bias")
    np.testing.assert_array_equal(some.parameters()["conv.weight"], other["conv.weight"])


def test_parameters_load_from_an_onnx_file(tmp_path):
    other = learner(classifier(seed=1))
    other.partial_fit(*batch())
    other.export_onnx(tmp_path / "model.onnx")
    some = learner()
    some.load_parameters(tmp_path / "model.onnx")
    np.testing.assert_array_equal(some.logits(batch()[0]), other.logits(batch()[0]))


# ---- saving and going on ---------------------------------------------------------------------------------------------

OPTIMIZERS = {
    "sgd": et.SGD(lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-3),
    "sgd without momentum": et.SGD(lr=0.1),
    "adam": et.Adam(lr=0.01),
    "adamw": et.AdamW(lr=0.01, clip_norm=1.0),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_a_saved_learner_goes_on_bit_for_bit(optimizer, tmp_path):
    through = learner(classifier(dropout=0.3), optimizer=optimizer, seed=4)
    for seed in range(3):
        through.partial_fit(*batch(seed=seed))
    through.save(tmp_path / "half.safetensors")
    resumed = et.Learner.load(tmp_path / "half.safetensors")
    assert content(resumed) == content(through)
    for seed in range(3, 6):
        assert resumed.partial_fit(*batch(seed=seed)).loss == through.partial_fit(*batch(seed=seed)).loss
    assert content(resumed) == content(through)


@pytest.mark.parametrize("place", [".", "/", "folder"])
def test_a_learner_is_saved_as_a_file(place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    with pytest.raises(CheckpointError, match=r"is a folder, expected a file name such as learner\.safetensors"):
        learner().save(place)
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


@pytest.mark.parametrize(
    ("place", "remedy"), [(".", "free space"), ("no/such/model.onnx", "make its folder"), ("folder", "free space")]
)
def test_a_model_that_cannot_be_written_is_one_message(place, remedy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    with pytest.raises(UsageError, match=rf"cannot be written \(.*\); {remedy} or choose another place"):
        learner().export_onnx(place)
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_restoring_an_untrained_state_forgets_the_momentum():
    some, fresh = learner(), learner()
    start = some.state()
    some.partial_fit(*batch())
    some.restore(*start)
    assert content(some) == content(fresh)
    some.partial_fit(*batch(seed=1))
    fresh.partial_fit(*batch(seed=1))
    assert content(some) == content(fresh)


def _state(**changes) -> tuple[dict, dict]:
    trained = learner()
    trained.partial_fit(*batch())
    tensors, meta = trained.state()
    return {name: array for name, array in (tensors | changes).items() if array is not None}, meta


BAD_STATES = {
    "array missing": ({"weights/fc.bias": None}, r"\['weights/fc.bias'\] missing, unknown"),
    "moment missing": ({"velocity/fc.bias": None}, r"\['velocity/fc.bias'\]"),
    "unknown array": ({"weights/fc2.bias": np.zeros(3)}, r"\['weights/fc2.bias'\]"),
    "shape that would broadcast": ({"weights/fc.bias": np.zeros(1)}, r"\['weights/fc.bias'\] .* of another shape"),
    "other shape": ({"velocity/fc.bias": np.zeros(4)}, r"\['velocity/fc.bias'\] .* of another shape"),
    "other optimizer": ({"first_moment/fc.bias": np.zeros(3)}, r"\['first_moment/fc.bias'\]"),
}


@pytest.mark.parametrize(("changes", "message"), BAD_STATES.values(), ids=BAD_STATES)
def test_a_state_of_another_network_is_refused_whole(changes, message):
    some = learner()
    before = content(some)
    with pytest.raises(CheckpointError, match=f"belongs to another network or optimizer: {message}"):
        some.restore(*_state(**changes))
    assert content(some) == before


def test_settings_survive_saving(tmp_path):
    some = learner(seed=9, loss="mse", memory_budget="99MiB", graph=regression())
    some.save(tmp_path / "a.safetensors")
    again = et.Learner.load(tmp_path / "a.safetensors")
    kept = ("batch_size", "seed", "threads", "memory_budget", "optimizer", "loss", "label_smoothing", "step_count")
    assert {k: getattr(again, k) for k in kept} == {k: getattr(some, k) for k in kept}


# ---- losses ----------------------------------------------------------------------------------------------------------

torch = pytest.importorskip("torch", reason="PyTorch is the judge of the rest")


def targets(count: int = 8) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(count)
    return rng.standard_normal((count, 5), np.float32), rng.standard_normal((count, 2), np.float32)


def _torch_regression() -> torch.nn.Sequential:
    arrays = {name: torch.tensor(array, dtype=torch.float64) for name, array in regression().arrays.items()}
    model = torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2)).double()
    model.load_state_dict({f"{layer}.{part}": arrays[f"{name}.{part}"] for layer, name in ((0, "hidden"), (2, "out"))
                           for part in ("weight", "bias")})  # fmt: skip
    return model


@pytest.mark.parametrize("count", [1, 7, 8, 19])
def test_mean_squared_error_is_that_of_pytorch(count):
    some, model = learner(regression(), loss="mse", optimizer=et.SGD(lr=0.1)), _torch_regression()
    x, y = targets(count)
    loss = torch.nn.functional.mse_loss(model(torch.tensor(x).double()), torch.tensor(y).double())
    loss.backward()
    grads = some.gradients(x, y)
    np.testing.assert_allclose(grads["hidden.weight"], model[0].weight.grad.numpy(), atol=1e-5)
    np.testing.assert_allclose(grads["out.bias"], model[2].bias.grad.numpy(), atol=1e-5)
    assert some.evaluate(x, y)["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert some.partial_fit(x, y).loss == pytest.approx(loss.item(), rel=1e-5)


def test_regression_learns_and_has_no_accuracy():
    some = learner(regression(), loss="mse")
    x, y = targets(8)
    losses = [some.partial_fit(x, y).loss for _ in range(30)]
    assert losses[-1] < 0.2 * losses[0]
    assert math.isnan(some.score(x, y))


BAD_TARGETS = {
    "fewer targets": (targets()[1][:5], "different numbers of samples: {'x': 8, 'y': 5}"),
    "one target for all": (targets()[1][:1], "different numbers of samples: {'x': 8, 'y': 1}"),
    "class labels": (np.arange(8), r"y: shape \(8,\) given, the network expects \(Nx2\)"),
    "not a number": (np.full((8, 2), np.nan), "y: contains NaN"),
}


@pytest.mark.parametrize(("y", "message"), BAD_TARGETS.values(), ids=BAD_TARGETS)
@pytest.mark.parametrize("method", ["partial_fit", "gradients", "evaluate"])
def test_bad_targets_are_refused(method, y, message):
    with pytest.raises(DataError, match=message):
        getattr(learner(regression(), loss="mse"), method)(targets()[0], y)


def test_a_network_of_two_outputs_is_not_trained_on_its_first():
    graph = Graph("heads", input_shape=(5,))
    heads = [graph.add("Gemm", ["input", graph.parameter(name, np.ones((5, 4)))]) for name in "ab"]
    graph.set_outputs(heads)
    with pytest.raises(GraphError, match=r"'heads' has the outputs .*, expected one.*that one alone"):
        learner(graph).partial_fit(targets()[0], np.zeros(len(targets()[0]), int))


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.9])
@pytest.mark.parametrize("count", [1, 8, 13])
def test_label_smoothing_is_that_of_pytorch(smoothing, count):
    graph = Graph("linear", input_shape=(5,))
    weight = np.random.default_rng(3).normal(size=(4, 5)).astype(np.float32)
    graph.set_outputs([graph.add("Gemm", ["input", graph.parameter("w", weight)], transB=1)])
    x, y = targets(count)[0], np.arange(count) % 4
    w = torch.tensor(weight, dtype=torch.float64, requires_grad=True)
    loss = torch.nn.functional.cross_entropy(torch.tensor(x).double() @ w.T, torch.tensor(y), label_smoothing=smoothing)
    loss.backward()
    some = learner(graph, label_smoothing=smoothing)
    np.testing.assert_allclose(some.gradients(x, y)["w"], w.grad.numpy(), atol=2e-6)
    assert some.partial_fit(x, y).loss == pytest.approx(loss.item(), rel=1e-5, abs=1e-6)


# ---- agreement with PyTorch ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 8, 11])
def test_running_averages_are_those_of_pytorch(count):
    some = learner(optimizer=et.SGD(lr=0.0))
    norm, weight = torch.nn.BatchNorm2d(4).double(), torch.tensor(classifier().arrays["conv.weight"]).double()
    for seed in range(3):
        x, y = batch(count, seed)
        some.partial_fit(x, y)
        norm(torch.nn.functional.conv2d(torch.tensor(x).double(), weight, padding=1))
    found = some.parameters()
    np.testing.assert_allclose(found["norm.running_mean"], norm.running_mean.numpy(), atol=1e-6)
    np.testing.assert_allclose(found["norm.running_var"], norm.running_var.numpy(), rtol=1e-5)


def test_a_single_value_per_channel_keeps_averages_finite():
    graph = Graph("points", input_shape=(4, 1, 1))
    x = graph.add("Flatten", [graph.add("BatchNormalization", ["input", *_norm(graph, "norm", 4)])])
    graph.set_outputs([graph.add("Gemm", [x, graph.parameter("w", np.ones((3, 4)))], transB=1)])
    some = learner(graph)
    some.partial_fit(np.ones((1, 4, 1, 1), np.float32), np.array([1]))
    assert all(np.isfinite(array).all() for array in some.parameters().values())


def test_dropout_changes_nothing_in_inference():
    x, _ = batch(20)
    np.testing.assert_array_equal(learner(classifier(dropout=0.9)).logits(x), learner(classifier()).logits(x))


MODELS = {
    "lenet5": lambda: et.models.lenet5((1, 28, 28)),
    "resnet8": lambda: et.models.resnet((3, 8, 8), depth=8),
}


@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
def test_twenty_steps_are_those_of_pytorch_in_float64(build):
    from edgetrain.verify import verify

    report = verify(build(), steps=20, batch_size=8, threads=2)
    assert report.passed, report.table()


def test_profiles_fill_in_what_is_not_given():
    some = et.Learner(classifier(), replace(PROFILE))
    assert some.batch_size == PROFILE.batch_size
    assert some.memory_budget == PROFILE.memory_budget_mib * 2**20
    assert some.threads <= PROFILE.threads


def test_the_new_head_of_the_readme_is_all_that_is_trained(tmp_path, monkeypatch):
    text = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    (block,) = [code for code in re.findall(r"```python\n(.*?)```", text, re.S) if "trainable.clear" in code]
    monkeypatch.chdir(tmp_path)
    et.Learner(et.models.lenet5(), PROFILE).export_onnx("model.onnx")
    loaded, rng = et.load_onnx("model.onnx"), np.random.default_rng(0)
    known = {"et": et, "x": rng.random((40, 1, 28, 28), np.float32), "y": rng.integers(0, 2, 40)}
    exec(block, known)  # what the README has
    learner, after = known["learner"], known["learner"].parameters()
    assert {name for name, array in after.items() if not np.array_equal(array, known["graph"].arrays[name])} == {
        "head.weight", "head.bias"}  # fmt: skip
    assert all(np.array_equal(after[name], array) for name, array in loaded.arrays.items() if name in after)
    learner.save("head.safetensors")
    assert et.Learner.load("head.safetensors").graph.trainable == {"head.weight", "head.bias"}
    learner.export_onnx("head.onnx")
    exported = et.load_onnx("head.onnx")
    assert (exported.class_names, exported.output_shape) == (("cat", "dog"), (2,))
    assert (len(exported.nodes), exported.trainable) == (len(loaded.nodes), set(exported.arrays))
    np.testing.assert_array_equal(et.Learner(exported, PROFILE).predict(known["x"]), learner.predict(known["x"]))
    assert exported.arrays.keys() == loaded.arrays.keys() - {"fc3.weight", "fc3.bias"} | {"head.weight", "head.bias"}


@pytest.mark.parametrize("change", [
    lambda names: names.add("conv1.weight"), lambda names: names.discard("conv1.weight"), lambda names: names.clear(),
    lambda names: names.update({"conv1.weight"}), lambda names: names.__ior__({"conv1.weight"}),
])  # fmt: skip
def test_what_a_learner_trains_is_settled_when_it_is_made(change):
    graph = et.models.lenet5()
    learner = et.Learner(graph, threads=1)
    with pytest.raises(UsageError, match=r"settled when the learner was made.*make another learner"):
        change(learner.graph.trainable)
    change(graph.trainable)  # that of another graph
    thawed = learner.graph.copy()
    change(thawed.trainable)
    assert learner.graph.trainable == et.models.lenet5().trainable


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
def test_a_learner_that_is_copied_names_what_does_it(copied):
    with pytest.raises(TypeError, match=r"a Learner cannot be copied or pickled; save it, .*Learner\.save"):
        copied(et.Learner(et.models.lenet5(), threads=1))
