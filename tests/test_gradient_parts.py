"""Weight gradients with sums for each group of blocks of samples: right, and the same for any number of threads."""

from __future__ import annotations

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
    """Two 3x3 convolutions, of which the second suits Winograd's kernels, one of stride 2, and 1x1 in two groups."""
    net = Net(SHAPE)
    x = net.Relu(net.conv("input", 32, 4, 3, 3, pads=[1] * 4))
    x = net.Relu(net.conv(x, 32, 32, 3, 3, pads=[1] * 4))
    x = net.Relu(net.conv(x, 10, 32, 3, 3, strides=[2, 2], pads=[0, 1, 1, 0]))
    x = net.Relu(net.conv(x, 6, 5, 1, 1, group=2))
    net.graph.set_outputs([net.Gemm(net.Flatten(x), net.parameter(96, 4, spread=0.1), net.parameter(4))])
    return net.graph


@pytest.fixture(params=["all", "direct"])
def with_parts(request, monkeypatch):
    """Let gradients have groups however small the maps; with all kernels, or without Winograd's."""
    asked = lowering_products.ProductLowering.parts_of_batch
    monkeypatch.setattr(lowering_products, "_PART_BYTES", 1)
    monkeypatch.setattr(lowering_products.ProductLowering, "parts_of_batch", lambda low, block, _: asked(low, block, 0))
    if request.param == "direct":
        monkeypatch.setattr(lowering_winograd, "suits", lambda *_: False)


def batch(count: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(count)
    return rng.normal(size=(count, *SHAPE)).astype(np.float32), rng.integers(0, 4, count)


def parts_of(made: et.Learner, count: int) -> set[int]:
    rows = made.plans.plan(True, count).rows
    names = [row for row in rows if row.kernel[0] in ("correlate", "correlate_listed")]
    return {dict(zip(argument_names(row.kernel[0]), row.arguments, strict=True))["parts"] for row in names}


@pytest.mark.parametrize(("blocks", "parts"), [(1, 1), (2, 2), (3, 3), (4, 4), (5, 1), (6, 3), (8, 4)])
def test_gradients_are_right(with_parts, blocks, parts):
    """Also of a batch whose last block is not full."""
    graph, count = network(), LANES * blocks - 1
    made = learner(graph, LANES)
    assert max(parts_of(made, count)) == parts
    x, y = batch(count)
    made.gradients(x, y)
    poison(made)
    _, wanted = reference.gradients(graph, x, y)
    assert_all_close(made.gradients(x, y), wanted, 2e-5)


@pytest.mark.parametrize("policy", [None, "channels:keep=0.7", "channels:keep=0.5,importance=random"])
def test_results_do_not_depend_on_threads(with_parts, policy):
    alone, together = (learner(network(), LANES, threads, error_pruning=policy) for threads in (1, 3))
    for count in (LANES * 4, LANES * 6 - 1):
        assert alone.partial_fit(*batch(count)).loss == together.partial_fit(*batch(count)).loss
    assert_same(alone.parameters(), together.parameters())


def test_channels_that_are_not_kept_have_no_gradient(with_parts, monkeypatch):
    """And the others the one that they have without parts."""
    x, y = batch(LANES * 4)
    made = learner(network(), LANES, error_pruning="channels:keep=0.5")
    made.gradients(x, y)
    poison(made)
    got = made.gradients(x, y)
    monkeypatch.setattr(lowering_products, "_MOST_PARTS", 1)
    wanted = learner(network(), LANES, error_pruning="channels:keep=0.5").gradients(x, y)
    assert_all_close(got, wanted, 2e-5)
    whole = [array for array in got.values() if array.ndim == 4 and array.shape[1] != 5]  # groups keep all channels
    assert [int((np.abs(array).max((1, 2, 3)) == 0).sum()) for array in whole] == [len(array) // 2 for array in whole]
