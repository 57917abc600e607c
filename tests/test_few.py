"""Fully connected layers of few samples, where lanes hold samples that fill a part of the widest vector."""

from __future__ import annotations

import numpy as np
import pytest

import edgetrain as et
from edgetrain import lowering_core, lowering_few, reference
from edgetrain.arrays import READ_BEHIND, aligned
from edgetrain.choice import Sizes, candidates, simd_lanes
from edgetrain.graph import Graph
from edgetrain.kernels.codes import CHANNELS
from edgetrain.learner import Learner
from tests.engine import assert_all_close, assert_close, learner, poison, wide_host
from tests.op_cases import Net
from tests.test_pruning import run_kernel

TOLERANCE = 1e-5
APART = {"turn_samples", "join_samples"}
pytestmark = pytest.mark.usefixtures(wide_host.__name__)
by_bits = pytest.mark.skipif(simd_lanes() < 16, reason="these kernels are for AVX-512")
needs_wide = pytest.mark.skipif(simd_lanes() < 8, reason="no batch fills a part of vectors of 4")


def connected(inputs: int, outputs: int, kind: str, classes: int = 5) -> Graph:
    """Return a network with a fully connected layer of that size between two others."""
    net = Net((3, 6, 6))
    x = net.Flatten(net.MaxPool(net.conv("input", 4, 3, 3, 3, pads=(1, 1, 1, 1)), kernel_shape=(2, 2), strides=(2, 2)))
    x = net.Relu(net.Gemm(x, net.parameter(inputs, 36, spread=0.2), net.parameter(inputs), transB=1))
    spread = inputs**-0.5
    if kind == "MatMul":
        x = net.MatMul(x, net.parameter(inputs, outputs, spread=spread))
    elif kind == "inputs first":
        x = net.Gemm(x, net.parameter(inputs, outputs, spread=spread), net.parameter(outputs))
    else:
        x = net.Gemm(x, net.parameter(outputs, inputs, spread=spread), net.parameter(outputs), transB=1)
    last = net.parameter(classes, outputs, spread=outputs**-0.5)
    net.graph.set_outputs([net.Gemm(net.Tanh(x), last, net.parameter(classes), transB=1)])
    return net.graph


def kernels(made: Learner, training: bool, count: int) -> list[str]:
    return [row.kernel[0] for row in made.plans.plan(training, count).rows]


def data(count: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(count)
    return rng.normal(size=(count, 3, 6, 6)).astype(np.float32), rng.integers(0, 5, count)


@needs_wide
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("kind", ["MatMul", "inputs first", "outputs first"])
@pytest.mark.parametrize(("inputs", "outputs"), [(96, 100), (80, 33), (37, 64), (37, 33), (2, 17), (1, 1), (16, 1)])
@pytest.mark.parametrize("lanes", [4, 8])
@pytest.mark.parametrize("width", [8, 16])
def test_layers_of_any_size_agree_with_the_twin(width, lanes, inputs, outputs, kind, threads, monkeypatch):
    if width > simd_lanes() or lanes >= width:
        pytest.skip("no part of a vector")
    for module in (lowering_core, lowering_few):
        monkeypatch.setattr(module, "simd_lanes", lambda: width)
    monkeypatch.setattr(lowering_few, "_APART", 1)
    graph = connected(inputs, outputs, kind)
    made = learner(graph, lanes, threads)
    assert set(kernels(made, True, lanes)) >= APART
    for count in (lanes, 1, lanes - 1):
        x, y = data(count)
        wanted = reference.gradients(connected(inputs, outputs, kind), x, y)[1]
        for _ in range(2):
            assert_close(made.logits(x), reference.evaluate(graph, x), TOLERANCE, "output")
            poison(made)
            assert_all_close(made.gradients(x, y), wanted, TOLERANCE)


@needs_wide
def test_small_layers_and_whole_vectors_stay_as_they_are():
    made = learner(connected(64, 64, "outputs first"), 4)
    assert not {"join_samples"} & set(kernels(made, True, 4))
    whole = learner(connected(96, 100, "outputs first"), 16)
    assert not {"join_samples"} & set(kernels(whole, True, 16))
    large = learner(connected(96, 100, "outputs first"), 4)
    assert kernels(large, False, 4).count("join_samples") == 1
    assert kernels(large, True, 4).count("join_samples") == 2


@by_bits
@pytest.mark.parametrize("lanes", [4, 8])
@pytest.mark.parametrize(("inputs", "outputs"), [(96, 100), (85, 99), (30, 290)])
@pytest.mark.parametrize("policy", [et.SWAT(0.5, activations=0.0, dense_first=False),
                                    et.StaticSparse(0.5, distribution="uniform")], ids=["swat", "static"])  # fmt: skip
def test_sparse_weights_are_read_by_bits(policy, inputs, outputs, lanes):
    graph = connected(inputs, outputs, "outputs first")
    made = learner(graph, lanes, 2, sparsity=policy)
    compact = isinstance(policy, et.StaticSparse)
    found = kernels(made, True, lanes)
    wanted = [0, 0, 1] if compact else [1, 1, 0]
    assert [found.count(name) for name in ("multiply_bits", "multiply_bits_back", "correlate_bits")] == wanted
    zeros = connected(inputs, outputs, "outputs first")
    for name, index in made.topology.indices.items():
        view = made._parameters.view(name)
        zeros.arrays[name] = index.dense(view) if compact else np.where(index.mask(), view, 0)
    for count in (lanes, 1, lanes - 1):
        x, y = data(count)
        gradients = reference.gradients(zeros, x, y)[1]
        if compact:
            gradients |= {name: index.values_of(gradients[name]) for name, index in made.topology.indices.items()}
        poison(made)
        assert_close(made.logits(x), reference.evaluate(zeros, x), TOLERANCE, "output")
        poison(made)
        made.gradients(x, y)
        for name, want in gradients.items():
            index = made.topology.indices.get(name)
            view = made._parameters.view(name, "gradients")
            got = view[: index.count] if index is not None and compact else view
            assert_close(got, want, TOLERANCE, name)


def test_samples_go_apart_and_come_together():
    rng = np.random.default_rng(0)
    x, apart, y, bias = aligned(5 * 8), aligned(8 * 5), aligned(5 * 8), aligned(5)
    x[:], bias[:], columns = rng.normal(size=40), rng.normal(size=5), np.arange(0, 160, 32)
    run_kernel("turn_samples", 8, 3, x=x, y=apart, columns=columns, count=5, chunk=2, x_block=0)
    np.testing.assert_array_equal(apart.reshape(8, 5), x.reshape(5, 8).T)
    run_kernel("join_samples", 8, 3, x=apart, y=y, bias=bias, count=5, chunk=2, x_sample=20, y_channel=32)
    np.testing.assert_array_equal(y.reshape(5, 8), x.reshape(5, 8) + bias[:, None])


@pytest.mark.parametrize("lanes", [4, 8, 16])
@pytest.mark.parametrize("pixels", [1, 4, 8, 64])
def test_no_tile_reads_further_behind_a_row_than_there_is_memory(lanes, pixels):
    for channels in range(1, 1500, 7):
        for tile, _ in candidates(Sizes("multiply", CHANNELS, lanes, channels, pixels, 100)):
            assert 4 * (-(-channels // tile) * tile - channels) <= READ_BEHIND
