"""Whether lanes hold samples or channels of small batches: which is faster was measured, see ``edgetrain/lanes.py``."""

from __future__ import annotations

import numpy as np
import pytest

import edgetrain as et
from edgetrain import lanes
from edgetrain.catalog import build_model
from edgetrain.learner import Learner
from tests.engine import PROFILE, assert_all_close
from tests.op_cases import Net


@pytest.fixture(params=[4, 8, 16])
def simd(request, monkeypatch):
    for module in ("lanes", "plans"):
        monkeypatch.setattr(f"edgetrain.{module}.simd_lanes", lambda: request.param)
    return request.param


# Of every network the batches up to which channels in the lanes are faster, with vectors of 4, 8 and 16 lanes; where
# samples fill a vector again (4 of 8 lanes, 8 of 16), they may be faster in between.
MEASURED = {
    "ds_cnn": {4: [1, 2, 3], 8: [1, 2, 3, 4, 5, 6], 16: [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13]},
    "mobilenet_v1_0.25": {4: [1, 2, 3], 8: [1, 2, 3, 4, 5, 6], 16: [1, 2, 3, 4, 5, 6, 7, 9, 10, 11, 12]},
    "lenet5": {4: [1], 8: [1, 2], 16: [1, 2, 3]},
    "resnet20": {4: [1], 8: [1, 2], 16: [1, 2, 3]},
}


@pytest.mark.parametrize("model", MEASURED)
def test_lanes_hold_channels_where_that_was_measured_to_be_faster(model, simd):
    graph = build_model(model)
    assert [count for count in range(1, 33) if lanes.channels_pay(graph, count)] == MEASURED[model][simd]


def test_a_batch_that_fills_a_vector_has_samples_in_the_lanes(simd):
    net = Net((3,))
    net.graph.set_outputs([net.Gemm("input", net.parameter(2, 3), transB=1)])
    assert lanes.channels_pay(net.graph, 1)
    assert not any(lanes.channels_pay(net.graph, count) for count in (simd, simd + 1, 64))
    assert [lanes.sample_lanes(count) for count in (1, 4, 5, 64)] == [4, 4, min(8, simd), simd]


def test_networks_without_products_have_channels_in_the_lanes_too(simd):
    net = Net((3,))
    net.graph.set_outputs([net.Relu("input")])
    assert lanes.channels_pay(net.graph, 1)


@pytest.mark.parametrize(
    ("model", "count", "settings", "by_channel"),
    [
        ("cnn1d", 6, {}, True),
        ("cnn1d", 6, {"sparsity": et.StaticSparse(0.5)}, True),  # too dense for lists
        ("cnn1d", 6, {"sparsity": et.StaticSparse(0.9)}, False),
        ("cnn1d", 6, {"sparsity": et.SWAT(0.5, 0.5)}, True),
        ("cnn1d", 6, {"sparsity": et.SWAT(0.9, 0.9)}, False),
        ("cnn1d", 6, {"sparsity": et.SWAT(0.5, 0.5, group="lanes")}, False),
        ("cnn1d", 6, {"error_pruning": et.ErrorMapPruning(keep=0.5)}, False),
        ("cnn1d", 6, {"error_pruning": et.GradientPruning(rate=0.5)}, False),
        ("ds_cnn", 4, {"sparsity": et.StaticSparse(0.9)}, True),
        ("ds_cnn", 8, {"sparsity": et.StaticSparse(0.5)}, True),
        ("ds_cnn", 8, {"sparsity": et.StaticSparse(0.9)}, False),
    ],
    ids=str,
)  # fmt: skip
def test_what_skips_work_has_samples_in_the_lanes(model, count, settings, by_channel, monkeypatch):
    for module in ("lanes", "plans"):
        monkeypatch.setattr(f"edgetrain.{module}.simd_lanes", lambda: 16)
    made = Learner(build_model(model), PROFILE, batch_size=count, threads=1, **settings)
    assert made.plans.by_channel == by_channel


@pytest.mark.parametrize("count", [2, 3, 5, 7, 11, 13])
@pytest.mark.parametrize("sparsity", [None, et.StaticSparse(0.5)], ids=str)
def test_both_compute_the_same(sparsity, count):
    rng, found = np.random.default_rng(0), []
    graph = build_model("cnn1d")
    x, y = rng.normal(size=(count, *graph.input_shape)).astype(np.float32), rng.integers(0, 6, count)
    for by_channel in (True, False):
        made = Learner(graph, PROFILE, batch_size=count, threads=1, sparsity=sparsity)
        made.plans.__dict__["by_channel"] = by_channel  # a cached property
        found.append(made.gradients(x, y) | {"logits": made.logits(x)})
    assert_all_close(found[0], found[1], 1e-4)
