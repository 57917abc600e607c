"""Fusions and what the backward pass keeps change no gradient: random networks against their plain training graphs.

The twins run the rewritten training graph too, so only a graph that was not rewritten can judge.
"""

from __future__ import annotations

import numpy as np
import pytest

from edgetrain import autodiff, keeping, reference
from edgetrain.autodiff import training_graph
from edgetrain.graph import Graph, Node
from tests.op_cases import Net

NETWORKS = 120
WANTED = {"BatchNormalizationGradAgain", "BatchNormalizationAgain", "ResidualNormalizationGrad", "ReluMask",
          "MaxPoolTraining"}  # fmt: skip
STEPS = ("norm", "norm", "Relu", "Relu", "Clip", "Add", "Add", "conv", "conv", "pool", "Tanh", "HardSwish")


def random_network(seed: int) -> Graph:
    """Chain and join normalisations, activations, pools and convolutions; some arrays are frozen."""
    rng, net = np.random.default_rng(seed), Net((3, 6, 6))
    frozen = rng.random() < 0.3
    values = ["input"]

    def trained() -> bool:
        return not frozen or rng.random() < 0.5

    def step(kind: str, x: str) -> str:
        if kind == "norm":
            learned = [net.positive(3, trainable=trained()), net.parameter(3, trainable=trained())]
            running = [net.parameter(3, trainable=False), net.positive(3, trainable=False)]
            return net.BatchNormalization(x, *learned, *running)
        if kind == "conv":
            return net.Conv(x, net.parameter(3, 3, 3, 3, spread=0.3, trainable=trained()), pads=[1] * 4)
        if kind == "pool":
            return net.MaxPool(x, kernel_shape=[2, 2], pads=[0, 0, 1, 1])
        if kind == "Add":
            return net.Add(x, values[rng.integers(len(values))])
        return getattr(net, kind)(x, **({"min": -0.4, "max": 0.6} if kind == "Clip" else {}))

    for _ in range(rng.integers(4, 14)):
        values.append(step(str(rng.choice(STEPS)), values[rng.integers(max(0, len(values) - 4), len(values))]))
    read = {value.name for node in net.graph.nodes for value in node.inputs if value is not None}
    total, *others = [name for name in values if name not in read and name != "input"]
    for other in others:
        total = net.Add(total, other)
    net.graph.set_outputs([net.Gemm(net.Flatten(total), net.parameter(4, 108, spread=0.1), transB=1)])
    return net.graph


@pytest.fixture
def plain(monkeypatch):
    """Return a function after which training graphs are not rewritten."""

    def alone(graph: Graph) -> list[autodiff._Fusion]:
        return [autodiff._Fusion((node,), None) for node in graph.nodes if node.op_type == "BatchNormalization"]

    def in_order(graph: Graph, fused: list[Node]) -> list[Node]:
        return list(graph.nodes)

    def begin() -> None:
        monkeypatch.setattr(autodiff, "_fusions", alone)
        monkeypatch.setattr(autodiff, "_pool_first", in_order)
        monkeypatch.setattr(autodiff, "keep_less", lambda train, forward_count: ({}, 0))

    return begin


def test_rewrites_change_no_gradient(plain):
    graphs = [graph for seed in range(NETWORKS) if (graph := random_network(seed)).trainable]
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(4, 3, 6, 6)), rng.integers(0, 4, 4)
    got = [reference.gradients(graph, x, y) for graph in graphs]
    used = {node.op_type for graph in graphs for node in training_graph(graph).graph.nodes}
    assert used >= WANTED
    plain()
    assert not WANTED - {"MaxPoolTraining"} & {n.op_type for g in graphs for n in training_graph(g).graph.nodes}
    for number, graph in enumerate(graphs):
        loss, wanted = reference.gradients(graph, x, y)
        assert got[number][0] == pytest.approx(loss, rel=1e-12)
        for name, grad in wanted.items():
            np.testing.assert_allclose(got[number][1][name], grad, rtol=1e-7, atol=1e-9 * max(1.0, np.abs(grad).max()))


@pytest.mark.parametrize("joined", [1, 2])
def test_bits_of_relus_behind_sums_change_no_gradient(monkeypatch, plain, joined):
    net = Net((3, 6, 6))
    first = net.conv("input", 3, 3, 1, 1)
    h = net.Relu(net.Add(net.norm(net.conv(first, 3, 3, 1, 1)), first))
    window = {"kernel_shape": [2, 2], "strides": [2, 2]}
    parts = [net.AveragePool(h, **window), net.MaxPool(h, **window)]
    total = parts[0] if joined == 1 else net.Add(*parts)
    net.graph.set_outputs([net.Gemm(net.Flatten(total), net.parameter(4, 27, spread=0.1), transB=1)])

    def keep_less(train: Graph, forward_count: int) -> tuple[dict, int]:
        again, added = keeping.keep_less(train, forward_count)
        return again, added + keeping.keep_residual_masks(train, forward_count + added)

    monkeypatch.setattr(autodiff, "keep_less", keep_less)
    (grad,) = [n for n in training_graph(net.graph).graph.nodes if n.op_type == "ResidualNormalizationMaskGrad"]
    assert (grad.optional(6) is not None) == (joined == 2)
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(4, 3, 6, 6)), rng.integers(0, 4, 4)
    got = reference.gradients(net.graph, x, y)[1]
    plain()
    for name, wanted in reference.gradients(net.graph, x, y)[1].items():
        np.testing.assert_allclose(got[name], wanted, rtol=1e-7, atol=1e-9 * max(1.0, np.abs(wanted).max()))


def test_pools_before_all_trained_arrays_keep_no_positions():
    net = Net((3, 6, 6))
    h = net.MaxPool(net.Conv("input", net.parameter(3, 3, 3, 3, trainable=False)), kernel_shape=[2, 2])
    net.graph.set_outputs([net.Flatten(net.conv(h, 2, 3, 1, 1))])
    assert "MaxPoolTraining" not in {node.op_type for node in training_graph(net.graph).graph.nodes}


def test_what_is_computed_again_for_nobody_is_forgotten():
    net = Net((3, 6, 6))
    net.graph.set_outputs([net.Flatten(net.conv(net.HardSwish(net.norm(net.conv("input", 3, 3, 1, 1))), 2, 3, 1, 1))])
    train = training_graph(net.graph)
    weight = next(n for n in train.graph.nodes if n.op_type == "ProductWeightGrad" and n.x.name in train.again)
    train.graph.nodes.remove(weight)
    keeping.forget_again(train.graph, train.again, weight.x)
    made = {value.name for node in train.graph.nodes for value in node.outputs}
    assert weight.x.name not in made
