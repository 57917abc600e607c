"""Whether lanes hold samples or channels of small batches: which is faster was measured, see ``edgetrain/lanes.py``."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import edgetrain as et
from edgetrain import lanes
from edgetrain.catalog import build_model
from edgetrain.learner import Learner
from edgetrain.ops import get_op
from tests.engine import PROFILE, assert_all_close, set_lanes
from tests.op_cases import Net


@pytest.fixture(params=[4, 8, 16])
def simd(request, monkeypatch):
    set_lanes(monkeypatch, request.param)
    return request.param


# The batches for which the rule takes channels, with vectors of 4, 8 and 16 lanes: docs/lanes.md has what was measured.
# Where samples fill a vector (4 of 8 lanes, 8 of 16) they may be faster, and not for a few more.
CHANNELS = {
    "cnn1d": {4: [1, 2, 3], 8: [1, 2, 3, 5, 6], 16: [1, 2, 3, 5, 6, 9, 10, 11, 12, 13]},
    "ds_cnn": {4: [1, 2, 3], 8: [1, 2, 3, 4, 5, 6], 16: [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13]},
    "mobilenet_v1_0.25": {4: [1, 2, 3], 8: [1, 2, 3, 5, 6], 16: [1, 2, 3, 4, 5, 6, 7, 9, 10, 11, 12]},
    "lenet5": {4: [1], 8: [1, 2], 16: [1, 2]},
    "resnet20": {4: [1], 8: [1, 2], 16: [1, 2]},
}


GRAPHS = {model: build_model(model) for model in CHANNELS}


@pytest.mark.parametrize("model", CHANNELS)
def test_lanes_hold_channels_of_small_batches(model, simd):
    assert [count for count in range(1, 33) if lanes.channels_pay(GRAPHS[model], count)] == CHANNELS[model][simd]


def test_the_rule_takes_what_was_measured_to_be_faster(monkeypatch):
    files = list((Path(__file__).parents[1] / "benchmarks" / "results").glob("*/lanes.json"))
    assert files
    for file in files:
        for key, cell in json.loads(file.read_text())["cells"].items():
            width, model, batch = key.split("/")
            if model in CHANNELS:
                set_lanes(monkeypatch, int(width))
                chosen, other = ("channels", "samples")[:: 1 if lanes.channels_pay(GRAPHS[model], int(batch)) else -1]
                assert cell[chosen] < 1.1 * cell[other], key


def test_channels_that_are_moved_one_by_one_are_for_few_samples_only(simd):
    net = Net((16, 5, 5))
    h = net.Concat(net.conv("input", 16, 16, 1, 1), net.conv("input", 16, 16, 1, 1))
    net.graph.set_outputs([net.Gemm(net.Flatten(h), net.parameter(2, 800), transB=1)])
    most = max(1, simd // 8)
    assert [count for count in range(1, 17) if lanes.channels_pay(net.graph, count)] == [*range(1, most + 1)]


@pytest.mark.parametrize(
    ("group", "pads", "skips"), [(1, [0] * 4, True), (8, [0] * 4, False), (1, [1, 0, 0, 0], False)]
)
def test_zeros_behind_max_pools_speak_for_samples(group, pads, skips, simd):
    net = Net((8, 9, 9))
    h = net.Relu(net.conv("input", 8, 8 // group, 2, 2, group=group))
    net.graph.set_outputs([net.MaxPool(h, kernel_shape=[2, 2], strides=[2, 2], pads=pads)])
    conv = net.graph.nodes[0]
    vectors = lanes._sample_vectors(net.graph, conv, get_op("Conv").product(conv), 4)
    assert (vectors == lanes._SKIPPING * (4 * simd) ** 0.5) == skips


@pytest.mark.parametrize(
    ("stride", "vectors"), [(1, 0.25), (2, 0.25 * lanes._STRIDED), (4, 0.25 * lanes._STRIDED), (5, 1.0)]
)
def test_pixels_far_from_each_other_fill_no_vectors_of_samples(stride, vectors, monkeypatch):
    set_lanes(monkeypatch, 16)
    net = Net((4, 1, 8 * stride))
    net.graph.set_outputs([net.conv("input", 4, 4, 1, 1, strides=[1, stride])])
    (conv,) = net.graph.nodes
    found = lanes._sample_vectors(net.graph, conv, get_op("Conv").product(conv), 4)
    assert found == pytest.approx(lanes._DIRECT * 16 * vectors)


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
    set_lanes(monkeypatch, 16)
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


def test_plans_of_all_numbers_of_samples_are_kept():
    made = Learner(build_model("cnn1d"), PROFILE, batch_size=12, threads=1)
    made.plans.__dict__["by_channel"] = True  # a cached property
    executors = [{made.plans.executor(False, count, False) for count in range(1, 14)} for _ in range(2)]
    assert len(executors[0]) == 13
    assert executors[0] == executors[1]
