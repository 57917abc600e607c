"""The cross-check with PyTorch: passes for the built-in models, and fails when it should."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from edgetrain import models, torch_network
from edgetrain.errors import UnsupportedError, UsageError
from edgetrain.graph import Graph, Normalization
from edgetrain.learner import Learner
from edgetrain.optim import SGD, Adam, AdamW, Schedule
from edgetrain.torch_network import TorchNetwork
from edgetrain.verify import VerifyReport, VerifyRow, _scales, verify

torch.set_num_threads(1)

SMALL = {
    "lenet5": lambda: models.lenet5((1, 14, 14)),
    "resnet8": lambda: models.resnet((3, 8, 8), depth=8),
    "mobilenet_v1": lambda: models.mobilenet_v1((3, 40, 40), width=0.25),
    "ds_cnn": lambda: models.ds_cnn((1, 16, 6)),
    "cnn1d": lambda: models.cnn1d((6, 32)),
}


def tiny() -> Graph:
    return models.cnn1d((2, 12), 3)


def tiny_with(op_type: str, **attributes) -> Graph:
    rng = np.random.default_rng(0)
    graph = Graph("tiny", input_shape=(2, 6, 6))
    x = graph.add(
        "Conv", ["input", graph.parameter("conv.weight", rng.normal(0, 0.5, (4, 2, 3, 3)))], pads=[1, 1, 1, 1]
    )
    x = graph.add("Flatten", [graph.add(op_type, [x], **attributes)])
    size = graph.values[x].size
    graph.set_outputs([graph.add("Gemm", [x, graph.parameter("fc.weight", rng.normal(0, 0.2, (3, size)))], transB=1)])
    return graph


@pytest.mark.parametrize("name", SMALL)
def test_built_in_models_pass(name):
    report = verify(SMALL[name](), threads=1)
    assert report.passed, report.table()
    assert {row.quantity.split()[0] for row in report.rows} == {"output", "loss", "gradient", "after"}


def test_every_gradient_and_every_array_is_compared():
    graph = tiny()
    rows = {row.quantity for row in verify(graph, steps=2, threads=1).rows}
    assert {f"gradient {name}" for name in graph.trainable} <= rows
    assert {f"after 2 steps {name}" for name in graph.arrays} <= rows


OPTIMIZERS = [
    SGD(lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-3),
    SGD(lr=0.05, weight_decay=0.1, decay_bias_and_norm=False),
    SGD(lr=0.05, momentum=0.9, clip_norm=0.5, averaging=0.9),
    SGD(lr=0.05, schedule=Schedule("cosine", total_steps=20)),
    Adam(lr=1e-3, weight_decay=1e-2),
    AdamW(lr=1e-3, weight_decay=0.1),
]


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=["nesterov", "no-decay", "clip", "cosine", "adam", "adamw"])
def test_optimizers_pass(optimizer):
    report = verify(tiny(), optimizer=optimizer, steps=10, threads=1)
    assert report.passed, report.table()


def test_an_optimizer_by_name_is_refused():
    with pytest.raises(UsageError, match="optimizer='sgd'"):
        verify(tiny(), optimizer="sgd", steps=1, threads=1)


def test_mean_squared_error_and_normalization_pass():
    graph = tiny()
    graph.normalization = Normalization(np.array([3.0, -1.0], np.float32), np.array([2.0, 0.5], np.float32))
    report = verify(graph, loss="mse", steps=5, threads=1)
    assert report.passed, report.table()


def test_dropout_is_taken_as_off_and_the_report_says_so():
    report = verify(tiny_with("Dropout", ratio=0.5), steps=3, threads=1)
    assert report.passed, report.table()
    assert "dropout" in report.table()


ACTIVATIONS = ["LeakyRelu", "Elu", "Sigmoid", "Tanh", "HardSigmoid", "HardSwish", "Identity"]


@pytest.mark.parametrize("op_type", ACTIVATIONS)
def test_activations_pass(op_type):
    report = verify(tiny_with(op_type), steps=5, threads=1)
    assert report.passed, report.table()


@pytest.mark.parametrize(("op_type", "attributes", "bias"), [
    ("Clip", {"min": 0.0, "max": 6.0}, 0.0), ("HardSigmoid", {"alpha": 0.25, "beta": 0.5}, 2.0),
])  # fmt: skip
def test_numbers_exactly_at_a_bound_pass(op_type, attributes, bias):
    """Behind a Relu many are: there is no gradient, as of PyTorch's hardtanh and hardsigmoid."""
    rng, graph = np.random.default_rng(0), Graph("bound", input_shape=(2, 6, 6))
    first = graph.parameter("first", rng.normal(size=(1, 2, 3, 3)))
    second = [graph.parameter("second", rng.normal(size=(4, 1, 1, 1))), graph.parameter("bias", np.full(4, bias))]
    x = graph.add("Conv", [graph.add("Relu", [graph.add("Conv", ["input", first])]), *second])
    x = graph.add("Flatten", [graph.add(op_type, [x], **attributes)])
    graph.set_outputs([graph.add("Gemm", [x, graph.parameter("last", rng.normal(size=(3, 64)))], transB=1)])
    report = verify(graph, steps=2, threads=1)
    assert report.passed, report.table()


POOLS = [
    {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]},
    {"kernel_shape": [3, 2], "strides": [2, 2], "pads": [0, 1, 1, 0], "ceil_mode": 1},
    {"kernel_shape": [2, 2], "strides": [2, 2], "auto_pad": "SAME_UPPER"},
]


@pytest.mark.parametrize("attributes", POOLS, ids=["padded", "ceil", "same"])
@pytest.mark.parametrize("op_type", ["MaxPool", "AveragePool"])
def test_pools_pass(op_type, attributes):
    report = verify(tiny_with(op_type, **attributes), steps=5, threads=1)
    assert report.passed, report.table()


def test_the_graph_is_not_changed():
    graph = tiny()
    before = graph.copy()
    verify(graph, steps=2, threads=1)
    assert all(np.array_equal(before.arrays[name], graph.arrays[name]) for name in graph.arrays)


def spoil(monkeypatch, method: str, change) -> None:
    original = getattr(Learner, method)
    monkeypatch.setattr(Learner, method, lambda self, *arguments: change(original(self, *arguments)))


def scaled(name: str, factor: float):
    def change(arrays):
        arrays[name] *= np.float32(factor)
        return arrays

    return change


@pytest.mark.parametrize("name", sorted(tiny().trainable))
def test_a_wrong_gradient_is_found(monkeypatch, name):
    spoil(monkeypatch, "gradients", scaled(name, 1.0003))
    report = verify(tiny(), steps=1, threads=1)
    assert not report.passed
    assert [row.quantity for row in report.rows if not row.ok] == [f"gradient {name}"]
    assert "DISAGREES" in report.table()


@pytest.mark.parametrize("name", ["conv1.weight", "bn2.running_mean", "bn2.running_var", "fc.bias"])
def test_a_wrong_parameter_is_found(monkeypatch, name):
    class Wrong(Learner):
        def parameters(self):
            return scaled(name, 1.003)(super().parameters())

        def load_parameters(self, source):
            return super().load_parameters({**source, name: source[name] / np.float32(1.003)})

    monkeypatch.setattr("edgetrain.learner.Learner", Wrong)
    report = verify(tiny(), steps=3, threads=1)
    assert [row.quantity for row in report.rows if not row.ok] == [f"after 3 steps {name}"]


def test_a_wrong_optimizer_is_found(monkeypatch):
    class Faster(Learner):
        def __init__(self, *arguments, optimizer, **options):
            super().__init__(*arguments, optimizer=SGD(lr=optimizer.lr * 1.05, momentum=0.9), **options)

    monkeypatch.setattr("edgetrain.learner.Learner", Faster)
    assert not verify(tiny(), threads=1).passed


def test_a_wrong_optimizer_is_found_in_a_sensitive_network(monkeypatch):
    class Faster(Learner):
        def __init__(self, *arguments, optimizer, **options):
            super().__init__(*arguments, optimizer=SGD(lr=optimizer.lr * 1.05, momentum=0.9), **options)

    monkeypatch.setattr("edgetrain.learner.Learner", Faster)
    monkeypatch.setattr("edgetrain.verify._sensitivity", lambda *_: math.inf)
    report = verify(tiny(), threads=1)
    assert not report.passed
    assert "sensitive" in report.table()


def test_what_is_missing_or_not_a_number_disagrees(monkeypatch):
    spoil(monkeypatch, "gradients", lambda arrays: {"fc.bias": arrays["fc.bias"], "fc.weight": arrays["fc.weight"].T})
    failed = {row.quantity: row.error for row in verify(tiny(), steps=1, threads=1).rows if not row.ok}
    assert math.isinf(failed["gradient fc.weight"])
    assert math.isnan(failed["gradient conv1.weight"])
    assert "gradient fc.bias" not in failed


def test_a_gradient_that_is_zero_is_compared_with_its_layer():
    graph = Graph("tiny", input_shape=(2, 4))
    names = [graph.parameter("conv.weight", np.ones((3, 2, 1))), graph.parameter("conv.bias", np.ones(3))]
    graph.add("Conv", ["input", *names])
    expected = {"conv.weight": np.array([0.0, -4.0]), "conv.bias": np.array([1e-17])}
    assert _scales(expected, graph) == {"conv.weight": 4.0, "conv.bias": 4.0}


def test_report_tells_the_worst_and_the_verdict():
    rows = (VerifyRow("gradient a", 1e-6, 1e-4, True), VerifyRow("gradient b", 2e-3, 1e-4, False))
    report = VerifyReport("tiny", rows, 20, 8, 0, 1e-3)
    assert report.worst("gradient") == 2e-3
    assert "tiny: 1 of 2 quantities DISAGREE" in report.table()
    with pytest.raises(UsageError, match="'loss'"):
        report.worst("loss")


def test_without_pytorch_the_remedy_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    with pytest.raises(UsageError, match=r"pip install edgetrain\[verify\]"):
        TorchNetwork(tiny())


def test_an_operator_without_counterpart_is_named(monkeypatch):
    monkeypatch.delitem(torch_network._TABLE, "Relu")
    with pytest.raises(UnsupportedError, match="cannot rebuild Relu"):
        TorchNetwork(tiny())


@pytest.mark.parametrize("arguments", [{"steps": 0}, {"batch_size": 0}, {"loss": "hinge"}], ids=str)
def test_bad_arguments_are_named(arguments):
    with pytest.raises(UsageError, match=str(next(iter(arguments.values())))):
        verify(tiny(), **arguments)


def of_two_inputs() -> Graph:
    graph = Graph("pair")
    for name in ("left", "right"):
        graph.add_input(name, (3,))
    weight = graph.parameter("w", np.ones((2, 3), np.float32))
    graph.set_outputs([graph.add("Gemm", [graph.add("Add", ["left", "right"]), weight], transB=1)])
    return graph


def of_spatial_output() -> Graph:
    graph = Graph("map", input_shape=(2, 6, 6))
    weight = graph.parameter("w", np.random.default_rng(0).normal(0, 0.3, (3, 2, 3, 3)))
    graph.set_outputs([graph.add("Conv", ["input", weight])])
    return graph


def without_parameters() -> Graph:
    graph = Graph("plain", input_shape=(3,))
    graph.set_outputs([graph.add("Relu", ["input"])])
    return graph


@pytest.mark.parametrize(
    ("graph", "batch_size", "error", "message"),
    [
        (of_two_inputs, 8, UnsupportedError, "'pair' has the inputs left, right, expected one"),
        (of_spatial_output, 8, UnsupportedError, r"'map' has an output of shape \(3, 4, 4\), expected \(classes,\)"),
        (without_parameters, 8, UnsupportedError, "'plain' has no trainable parameter"),
        (lambda: models.mobilenet_v1((3, 32, 32), width=0.25), 1, UsageError,
         r"batch_size is 1.*\(128, 1, 1\).*a batch size of at least 2"),
    ],
    ids=["two_inputs", "spatial_output", "no_parameters", "one_value_per_channel"],
)  # fmt: skip
def test_what_cannot_be_compared_is_refused(graph, batch_size, error, message):
    with pytest.raises(error, match=message):
        verify(graph(), steps=1, batch_size=batch_size, threads=1)


def test_a_spatial_output_passes_with_mse():
    assert verify(of_spatial_output(), steps=2, loss="mse", threads=1).passed
