"""Weight gradients with sums for each group of blocks of samples: right, and the same for any number of threads."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

import edgetrain as et
from edgetrain import lowering_products, lowering_winograd, reference
from edgetrain.graph import Graph
from edgetrain.kernels.registry import argument_names
from tests.engine import assert_all_close, assert_same, learner, poison, wide_host
from tests.op_cases import Net

pytestmark = pytest.mark.usefixtures(wide_host.__name__)

SHAPE = (4, 8, 8)
LANES = 4


def network() -> Graph:
    """Two 3x3 convolutions that may suit Winograd's kernels, one of stride 2, and 1x1 in two groups."""
    net = Net(SHAPE)
    x = net.Relu(net.conv("input", 32, 4, 3, 3, pads=[1] * 4))
    x = net.Relu(net.conv(x, 32, 32, 3, 3, pads=[1] * 4))
    x = net.Relu(net.conv(x, 10, 32, 3, 3, strides=[2, 2], pads=[0, 1, 1, 0]))
    x = net.Relu(net.conv(x, 6, 5, 1, 1, group=2))
    net.graph.set_outputs([net.Gemm(net.Flatten(x), net.parameter(96, 4, spread=0.1), net.parameter(4))])
    return net.graph


@pytest.fixture(params=["all", "rows", "direct"])
def with_parts(request, monkeypatch):
    """Let gradients have groups however small the maps; with all kernels, in "rows" of tiles, or without Winograd's."""
    asked = lowering_products.ProductLowering.parts_of_batch
    monkeypatch.setattr(lowering_products, "_PART_BYTES", 1)
    monkeypatch.setattr(lowering_products.ProductLowering, "parts_of_batch", lambda low, block, _: asked(low, block, 0))
    if request.param == "rows":
        monkeypatch.setattr(lowering_winograd, "_GROUPS_BYTES", 1)
    if request.param == "direct":
        monkeypatch.setattr(lowering_winograd, "suits", lambda *_: False)


def batch(count: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(count)
    return rng.normal(size=(count, *SHAPE)).astype(np.float32), rng.integers(0, 4, count)


def weight_gradients(made: et.Learner, count: int) -> list[tuple[str, int, int]]:
    """Return kernel, channels of the last tile if it is not full, and parts of all gather-correlates."""
    rows = [row for row in made.plans.plan(True, count).rows if row.kernel[0].startswith("correlate")]
    known = [dict(zip(argument_names(row.kernel[0]), row.arguments, strict=True)) for row in rows]
    return [(row.kernel[0], row.kernel[1][4], names["parts"]) for row, names in zip(rows, known, strict=True)]


@pytest.mark.parametrize(("blocks", "parts"), [(1, 1), (2, 2), (3, 3), (4, 4), (5, 1), (6, 3), (8, 4)])
def test_gradients_are_right(with_parts, blocks, parts):
    """Also of a batch whose last block is not full."""
    graph, count = network(), LANES * blocks - 1
    made = learner(graph, LANES)
    assert {found for _, _, found in weight_gradients(made, count)} == {parts}
    x, y = batch(count)
    made.gradients(x, y)
    poison(made)
    _, wanted = reference.gradients(graph, x, y)
    assert_all_close(made.gradients(x, y), wanted, 2e-5)


@pytest.mark.parametrize("sparsity", [None, "static:weights=0.3", "static:weights=0.9"])
@pytest.mark.parametrize("policy", [None, "channels:keep=0.7", "channels:keep=0.5,importance=random"])
def test_results_do_not_depend_on_threads(with_parts, policy, sparsity):
    alone, together = (
        learner(network(), LANES, threads, error_pruning=policy, sparsity=sparsity) for threads in (1, 3)
    )
    for count in (LANES * 4, LANES * 6 - 1):
        assert alone.partial_fit(*batch(count)).loss == together.partial_fit(*batch(count)).loss
    assert_same(alone.parameters(), together.parameters())


@pytest.mark.parametrize("sparsity", [None, "static:weights=0.3"])
def test_channels_that_are_not_kept_have_no_gradient(with_parts, monkeypatch, sparsity):
    """And the others the one that they have without parts."""
    x, y = batch(LANES * 4)
    made = learner(network(), LANES, error_pruning="channels:keep=0.5", sparsity=sparsity)
    made.gradients(x, y)
    poison(made)
    got = made.gradients(x, y)
    monkeypatch.setattr(lowering_products, "_MOST_PARTS", 1)
    wanted = learner(network(), LANES, error_pruning="channels:keep=0.5", sparsity=sparsity).gradients(x, y)
    assert_all_close(got, wanted, 2e-5)
    whole = [array for array in got.values() if array.ndim == 4 and array.shape[1] != 5]  # groups keep all channels
    assert [int((np.abs(array).max((1, 2, 3)) == 0).sum()) for array in whole] == [len(array) // 2 for array in whole]


def test_channels_left_over_have_a_tile_of_their_size(with_parts):
    """Of 32 channels 22 are kept and of 10 seven: a last tile of two and one of three."""
    found = weight_gradients(learner(network(), LANES, error_pruning="channels:keep=0.7"), LANES * 4)
    assert {(kernel, few) for kernel, few, _ in found if kernel == "correlate_listed"} >= {("correlate_listed", 3)}
    assert {few for _, few, parts in found if parts == 4} == {2, 3}


@pytest.mark.parametrize(
    ("block", "sums", "parts"),
    [(1 << 19, 1 << 16, 4), ((1 << 19) - 1, 0, 1), (1 << 20, 1 << 17, 4), ((1 << 20) - 1, 1 << 17, 1)],
    ids=["large", "small", "large-beside-sums", "small-beside-sums"],
)
def test_large_blocks_with_small_sums_have_parts(block, sums, parts):
    assert lowering_products.ProductLowering.parts_of_batch(SimpleNamespace(blocks=8), block, sums) == parts


@pytest.mark.parametrize(("outputs", "transposed", "count", "halved"), [
    (6, True, 9, True), (6, True, 16, True), (6, True, 4, False), (7, True, 9, False), (6, False, 9, True),
])  # fmt: skip
@pytest.mark.parametrize("threads", [1, 2])
def test_input_gradients_of_fully_connected_layers_are_sums_of_halves(
    outputs, transposed, count, halved, threads, monkeypatch
):
    """Of each half of the outputs, so that a thread reads the weights that it updates."""
    monkeypatch.setattr(lowering_products, "_HALVED_BYTES", 4 * 64 * outputs)
    net = Net(SHAPE)
    x = net.Flatten(net.Relu(net.conv("input", 4, 4, 3, 3, strides=[2, 2], pads=[0, 1, 1, 0])))
    weight = net.parameter(outputs, 64, spread=0.1) if transposed else net.parameter(64, outputs, spread=0.1)
    x = net.Relu(net.Gemm(x, weight, net.parameter(outputs), transB=int(transposed)))
    net.graph.set_outputs([net.Gemm(x, net.parameter(4, outputs), transB=1)])
    x, y = batch(count)
    made = learner(net.graph, LANES, threads=threads)
    rows = made.plans.plan(True, count).rows
    assert [row.kernel[0] for row in rows].count("sum_parts") == halved
    made.gradients(x, y)
    poison(made)
    assert_all_close(made.gradients(x, y), reference.gradients(net.graph, x, y)[1], 1e-5)


def test_gradients_with_a_border_are_no_sums_of_halves(monkeypatch):
    """A border must stay zero: the padded convolution before reads it."""
    monkeypatch.setattr(lowering_products, "_HALVED_BYTES", 4 * 8 * 16)
    net = Net((4, 1, 1))
    x = net.conv(net.conv("input", 8, 4, 1, 1), 8, 8, 3, 3, pads=[1] * 4)
    net.graph.set_outputs([net.Flatten(net.conv(net.Relu(x), 16, 8, 1, 1))])
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(9, 4, 1, 1)).astype(np.float32), np.arange(9) % 4
    made = learner(net.graph, LANES)
    made.gradients(x, y)
    poison(made)
    assert_all_close(made.gradients(x, y), reference.gradients(net.graph, x, y)[1], 1e-5)


@pytest.mark.parametrize("kernel", [1, 3, 5])
def test_gradients_of_convolutions_of_one_pixel_are_right(kernel, monkeypatch):
    """Of larger kernels the other numbers lie outside."""
    monkeypatch.setattr(lowering_products, "_HALVED_BYTES", 1)
    net = Net((4, 1, 1))
    x = net.conv(net.conv("input", 8, 4, 1, 1), 8, 8, kernel, kernel, pads=[kernel // 2] * 4)
    net.graph.set_outputs([net.Flatten(x)])
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(9, 4, 1, 1)).astype(np.float32), np.arange(9) % 8
    made = learner(net.graph, LANES)
    assert_all_close(made.gradients(x, y), reference.gradients(net.graph, x, y)[1], 1e-5)
