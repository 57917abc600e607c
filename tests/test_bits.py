"""Sparse weights by a bit each: kernels against their twins, and fully connected layers of few samples in training."""

from __future__ import annotations

import numpy as np
import pytest

import edgetrain as et
from edgetrain import reference
from edgetrain.arrays import aligned
from edgetrain.choice import simd_lanes
from edgetrain.graph import Graph
from edgetrain.learner import Learner
from edgetrain.sparse_index import SparseIndex
from tests.engine import assert_all_close, assert_close, assert_same, channel_learner, learner, poison, wide_host
from tests.op_cases import Net
from tests.test_pruning import run_kernel

TOLERANCE = 1e-5
pytestmark = pytest.mark.usefixtures(wide_host.__name__)
by_vectors = pytest.mark.skipif(simd_lanes() < 16, reason="these kernels are for AVX-512")


def random_index(rows: int, row_size: int, density: float, seed: int = 0) -> SparseIndex:
    """Return an index with an empty row, a full one, and room for more entries."""
    mask = np.random.default_rng(seed).random((rows, row_size)) < density
    mask[0], mask[-1] = False, True
    index = SparseIndex((rows, row_size), capacity=rows * row_size)
    index.set(mask)
    index.keep_bits()
    return index


@by_vectors
@pytest.mark.parametrize(("rows", "row_size"), [(2, 1), (5, 15), (4, 16), (7, 17), (6, 25), (3, 96), (9, 400)])
def test_rows_are_written_out_and_gathered(rows, row_size):
    index, rng = random_index(rows, row_size, 0.4), np.random.default_rng(1)
    values, dense = aligned(index.capacity + 16), aligned(rows * row_size + 16)  # vectors are read whole
    values[:], dense[:] = rng.normal(size=values.size), 7
    stored = {"starts": index.starts, "bits": index.bits, "row_words": index.row_words, "dense_row": 4 * row_size}
    run_kernel("expand_bits", 16, rows, values=values, dense=dense, row_size=row_size, **stored)
    np.testing.assert_array_equal(dense[: index.size].reshape(index.shape), index.dense(values))
    assert (dense[index.size :] == 7).all()
    dense[: index.size] = rng.normal(size=index.size)
    values[:] = 7
    run_kernel("gather_bits", 16, rows, values=values, dense=dense, **stored)
    np.testing.assert_array_equal(values[: index.count], index.values_of(dense[: index.size].reshape(index.shape)))
    assert (values[index.count :] == 7).all()


@pytest.mark.parametrize("row_size", [1, 3, 15, 16, 17, 500])
@pytest.mark.parametrize("inputs_first", [False, True])
def test_a_dense_array_is_copied_without_weights_that_do_not_exist(row_size, inputs_first):
    index = SparseIndex((7, row_size), compact=False, inputs_first=inputs_first)
    index.set(np.random.default_rng(row_size).random((7, row_size)) < 0.4)
    values, dense = aligned(index.size), aligned(index.size + 16)
    values[:], dense[:] = np.random.default_rng(1).normal(size=index.size), 7
    values[~index.mask().reshape(-1)] = np.nan
    run_kernel("mask_bits", 16, 7, values=values, dense=dense, row_size=row_size, bits=index.bits,
               row_words=index.row_words)  # fmt: skip
    np.testing.assert_array_equal(dense[: index.size], np.where(index.mask().reshape(-1), values, 0))
    assert (dense[index.size :] == 7).all()


@pytest.mark.parametrize("block", [1, 100, 1 << 20])
@pytest.mark.parametrize(("compact", "inputs_first"), [(True, False), (False, False), (False, True)])
def test_bits_follow_the_topology_at_the_same_address(compact, inputs_first, block, monkeypatch):
    monkeypatch.setattr("edgetrain.sparse_index._BLOCK", block)
    index = SparseIndex((5, 40), compact=compact, inputs_first=inputs_first)
    index.keep_bits()
    address = index.bits.ctypes.data
    for seed, density in ((2, 0.5), (3, 0.1), (4, 0.0), (5, 1.0)):
        index.set(mask := np.random.default_rng(seed).random((5, 40)) < density)
        padded = np.pad(mask, ((0, 0), (0, 8)))
        wanted = np.packbits(padded, axis=1, bitorder="little").view(np.uint16).ravel()
        np.testing.assert_array_equal(index.bits, wanted)
    assert index.bits.ctypes.data == address


@pytest.mark.parametrize(("options", "at_once", "later"), [
    ({}, False, True), ({"inputs_first": True}, False, False), ({"compact": False}, True, True),
    ({"compact": False, "inputs_first": True}, True, True),
], ids=str)  # fmt: skip
def test_bits_are_kept_at_once_or_when_asked_for(options, at_once, later):
    index = SparseIndex((10, 40), **options)
    assert (index.bits is not None) == at_once
    index.keep_bits()
    assert (index.bits is not None) == later
    assert index.nbytes == sum(array.nbytes for array in vars(index).values() if isinstance(array, np.ndarray))


@by_vectors
@pytest.mark.parametrize(("density", "batch_size", "kept"), [(0.1, 32, True), (0.04, 32, False), (0.04, 1, True)])
def test_plans_ask_for_bits_where_they_are_of_use(density, batch_size, kept, monkeypatch):
    monkeypatch.setattr("edgetrain.plans.channels_pay", lambda graph, batch_size, *_: batch_size == 1)
    policy = et.StaticSparse(weights=1 - density, distribution="uniform")
    made = et.Learner(network(), batch_size=batch_size, threads=1, sparsity=policy)
    made.training_plan()
    largest = max(made.topology.indices.values(), key=lambda index: index.size)
    assert (largest.bits is not None) == kept


def network() -> Graph:
    """Fully connected layers of odd sizes behind a convolution, with and without biases, and one of both orientations.

    A convolution of the only pixel is one, too; not where its kernel is larger than that.
    """
    net = Net((3, 9, 9))
    h = net.Flatten(net.Relu(net.conv("input", 7, 3, 3, 3)))  # 343 inputs, more than one job
    h = net.Relu(net.Gemm(h, net.parameter(41, 343, spread=0.1), net.parameter(41), transB=1))
    h = net.Relu(net.MatMul(h, net.parameter(41, 20, spread=0.3)))
    h = net.conv(net.Reshape(h, shape=[20, 1, 1]), 18, 20, 1, 1)
    h = net.Relu(net.conv(net.Relu(h), 18, 1, 1, 1, group=18))
    h = net.Relu(net.conv(h, 18, 18, 3, 3, pads=[1] * 4, strides=[2, 2]))
    h = net.Relu(net.Gemm(net.Flatten(h), net.parameter(6, 18, spread=0.3), transB=1))
    net.graph.set_outputs([net.Gemm(h, net.parameter(5, 6, spread=0.5), transB=1)])
    return net.graph


class Case:
    """A learner with sparse weights in compact storage, and the same network with zeros."""

    def __init__(self, made: Learner, dense: Graph) -> None:
        self.made, self.dense, self.original = made, dense, dict(dense.arrays)

    def take(self, seed: int, density: float) -> None:
        """Take a random topology with an empty and a full row in every layer."""
        for name, index in self.made._parameters.sparse.items():
            mask = np.random.default_rng(seed).random((index.rows, index.row_size)) < density
            mask[seed % index.rows], mask[-1 - seed % index.rows] = True, False
            mask = mask.T if index.inputs_first else mask.reshape(index.shape)
            index.set(mask)
            self.made._parameters.patterns += 1
            values = self.made._parameters.view(name)
            values[:] = np.nan
            values[: index.count] = index.values_of(self.original[name])
            self.dense.arrays[name] = np.where(mask, self.original[name], 0).astype(np.float32)

    def check(self, count: int) -> None:
        """Compare outputs and gradients with the twins', twice: the second time with memory full of NaN."""
        rng = np.random.default_rng(count)
        x, y = rng.normal(size=(count, 3, 9, 9)).astype(np.float32), rng.integers(0, 5, count)
        wanted = reference.gradients(self.dense, x, y)[1]
        for name, index in self.made._parameters.sparse.items():
            wanted[name] = index.values_of(wanted[name])
        for _ in range(2):
            assert_close(self.made.logits(x), reference.evaluate(self.dense, x), TOLERANCE, "output")
            found = self.made.gradients(x, y)
            for name, index in self.made._parameters.sparse.items():
                found[name] = self.made._parameters.view(name, "gradients")[: index.count]
            assert_all_close(found, wanted, TOLERANCE)
            poison(self.made)


def sparse_case(make) -> Case:
    """Return a case in which all products with more than one weight of a row are sparse."""
    made = make(network())
    for node in made.graph.nodes:
        if node.op_type in ("Conv", "Gemm", "MatMul"):
            weight = node.input(1)
            inputs_first = node.op_type != "Conv" and not node.get("transB", 0)
            made._parameters.sparse[weight.name] = SparseIndex(
                weight.shape, inputs_first=inputs_first, groups=int(node.get("group", 1))
            )
    return Case(made, network())


@by_vectors
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
def test_few_samples_meet_weights_as_they_are_stored(count, threads):
    case = sparse_case(lambda graph: channel_learner(graph, threads))
    for seed, density in ((1, 0.5), (2, 0.2), (3, 0.9)):
        case.take(seed, density)
        case.check(count)
    kernels = [row.kernel[0] for row in case.made.plans.plan(True, count).rows]
    by_bits = [kernels.count(name) for name in ("multiply_bits", "multiply_bits_back", "correlate_bits")]
    # Two Gemms and a convolution of the only pixel; not MatMul (inputs first), what is depthwise, larger than the pixel
    # or has fewer inputs than a vector.
    assert by_bits == ([3, 3, 3] if count <= 4 else [0, 0, 0])


@by_vectors
@pytest.mark.parametrize("count", [4, 9, 16])
def test_more_samples_meet_weights_that_are_written_out(count, monkeypatch):
    monkeypatch.setattr("edgetrain.lowering_sparse._DIRECT_SHARES", (0.0,) * 7)
    case = sparse_case(lambda graph: learner(graph, 16))
    for seed, density in ((1, 0.5), (2, 0.2)):
        case.take(seed, density)
        case.check(count)
    assert {"expand_bits", "gather_bits", "expand_sparse"} <= {row.kernel[0] for row in case.made.training_plan().rows}


@by_vectors
def test_gradients_of_all_weights_are_wanted_now_and_then():
    """RigL grows by the gradients of weights that do not exist: then the weight gradient is a dense one."""
    made = channel_learner(network(), sparsity=et.RigL(weights=0.5, refresh=3, distribution="uniform"))
    x, y = np.random.default_rng(0).normal(size=(1, 3, 9, 9)).astype(np.float32), np.array([1])
    before = {name: index.mask() for name, index in made.topology.indices.items()}
    for _ in range(4):
        made.partial_fit(x, y)
    assert any((index.mask() != before[name]).any() for name, index in made.topology.indices.items())
    usual, whole = ({row.kernel[0] for row in made.plans.plan(True, 1, kind).rows} for kind in (False, True))
    assert "correlate_bits" in usual and "correlate_bits" not in whole and "multiply_bits" in whole


@by_vectors
def test_a_learner_of_density_one_half_trains_as_the_network_with_zeros():
    graph = network()
    sparse = channel_learner(graph, sparsity=et.StaticSparse(weights=0.5, distribution="uniform"),
                             optimizer=et.SGD(lr=0.05, momentum=0.9))  # fmt: skip
    masks = {name: index.mask() for name, index in sparse.topology.indices.items()}
    zeros = network()
    for name, index in sparse.topology.indices.items():
        zeros.arrays[name] = index.dense(sparse._parameters.view(name))
    dense = channel_learner(zeros, optimizer=et.SGD(lr=0.05, momentum=0.9))
    rng = np.random.default_rng(5)
    for _ in range(5):
        x, y = rng.normal(size=(1, 3, 9, 9)).astype(np.float32), rng.integers(0, 5, 1)
        losses = [made.partial_fit(x, y).loss for made in (sparse, dense)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)
        for name, mask in masks.items():
            dense._parameters.view(name)[...] *= mask


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("policy", [et.SWAT(0.5, activations=0.0, dense_first=False),
                                    et.StaticSparse(0.5, distribution="uniform")], ids=["swat", "static"])  # fmt: skip
def test_few_samples_train_as_where_lanes_hold_samples(policy, count):
    made = channel_learner(network(), 2, sparsity=policy), learner(network(), sparsity=policy)
    rng = np.random.default_rng(count)
    x, y = rng.normal(size=(count, 3, 9, 9)).astype(np.float32), rng.integers(0, 5, count)
    kernels = {row.kernel[0] for row in made[0].plans.plan(True, count).rows}
    assert ("multiply_bits_back" in kernels) == (simd_lanes() == 16)
    assert_all_close(*(each.gradients(x, y) for each in made), TOLERANCE)


# ---- weights that are written out once for both passes


def layers(sizes: list[int], names: str) -> Graph:
    """Fully connected layers whose weights have these names."""
    rng, graph = np.random.default_rng(0), Graph("layers", input_shape=(sizes[0],))
    h = "input"
    for name, inputs, outputs in zip(names, sizes, sizes[1:], strict=False):
        weight = graph.parameter(name, rng.normal(size=(outputs, inputs)) / inputs**0.5)
        h = graph.add("Relu", [graph.add("Gemm", [h, weight], transB=1)])
    graph.set_outputs([h])
    return graph


def half(graph: Graph, count: int) -> et.Learner:
    return et.Learner(graph, batch_size=count, threads=1, sparsity=et.StaticSparse(0.5, distribution="uniform"))


def written(learner: et.Learner, count: int) -> int:
    """Return how often weights are written out in a step."""
    return sum(row.kernel[0] in ("expand_bits", "expand_sparse") for row in learner.plans.plan(True, count).rows)


@pytest.mark.parametrize("count", [5, 8, 32])
def test_weights_written_once_give_what_those_written_twice_give(count, monkeypatch):
    rng, found = np.random.default_rng(1), []
    x, y = rng.normal(size=(count, 60)).astype(np.float32), rng.integers(0, 10, count)
    for most, times in ((1 << 19, 2), (0, 4)):  # the first layer is dense
        monkeypatch.setattr("edgetrain.lowering_products._MOST_COPIED", most)
        made = half(layers([60, 50, 40, 10], "abc"), count)
        made.gradients(x, y)
        poison(made)
        assert written(made, count) == times
        found.append(made.gradients(x, y) | {"logits": made.logits(x)})
    assert_same(*found)


@pytest.mark.parametrize("count", [5, 8, 32])
def test_names_of_weights_that_are_numbers_are_no_names_of_memory(count):
    rng, found = np.random.default_rng(1), []
    x, y = rng.normal(size=(count, 60)).astype(np.float32), rng.integers(0, 10, count)
    for names in ("abc", "012", "135", "420"):
        made = half(layers([60, 50, 40, 10], names), count)
        gradients = made.gradients(x, y)
        found.append({str(i): gradients[name] for i, name in enumerate(names)} | {"logits": made.logits(x)})
        assert_same(found[-1], found[0])


def test_copies_for_both_passes_take_no_more_than_a_little_memory():
    made = half(layers([256] * 12 + [10], "abcdefghijkl"), 32)
    sizes = made.training_plan().arena_bytes
    few = half(layers([256] * 4 + [10], "abcd"), 32).training_plan().arena_bytes
    assert written(made, 32) == 2 * 11 - 2  # kept: one of ten layers of 256 KiB, and the last; the first one is dense
    assert sizes - few < 8 * 5 * 256 * 32 * 4 + (1 << 19)
