"""Winograd's kernels: when they are chosen, that their errors stay small, that parts and chunks change nothing."""

from __future__ import annotations

import numpy as np
import pytest

import edgetrain.lowering_winograd as winograd
from edgetrain import reference
from edgetrain.choice import Target, simd_lanes, winograd_cuts, winograd_tile
from edgetrain.graph import Graph
from edgetrain.kernels.registry import argument_names
from tests.engine import assert_all_close, assert_same, learner, poison, wide_host

pytestmark = pytest.mark.usefixtures(wide_host.__name__)


def network(channels: int, size: int, kernel: int = 3, **attributes: object) -> Graph:
    rng, attributes = np.random.default_rng(channels + size), {"pads": [kernel // 2] * 4} | attributes
    graph = Graph("case", (channels, size, size))
    x = "input"
    for number in range(2):  # the first needs no input gradient
        shape = (channels, channels // int(attributes.get("group", 1)), kernel, kernel)
        weight = graph.parameter(f"weight{number}", rng.normal(0, (channels * kernel**2) ** -0.5, shape))
        x = graph.add("Conv", [x, weight], **attributes)
    graph.set_outputs([x])
    return graph


def kernels(graph: Graph, batch: int = 4, **settings: object) -> set[str]:
    made = learner(graph, 4, loss="mse", **settings)
    return {row.kernel[0] for row in made.training_plan(batch).rows}


def batch(graph: Graph, count: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(7)
    x = rng.normal(size=(count, *graph.input_shape)).astype(np.float32)
    return x, rng.normal(size=(count, *graph.output_shape)).astype(np.float32)


SAME = [1] * 4
ALL = {"winograd", "winograd_weights", "winograd_transform", "winograd_weight_gradient"}


def test_all_three_products_of_a_large_layer_are_winograds():
    assert kernels(network(16, 8)) >= ALL


@pytest.mark.parametrize(
    ("channels", "size", "kernel", "attributes"),
    [(4, 8, 3, {}), (16, 9, 3, {}), (16, 8, 5, {}), (16, 8, 1, {}), (16, 8, 3, {"group": 16}),
     (16, 16, 3, {"strides": [2, 2]}), (16, 8, 3, {"dilations": [2, 2]})],
)  # fmt: skip
def test_other_layers_are_direct(channels, size, kernel, attributes):
    graph = network(channels, size, kernel, **attributes)
    assert not ALL & kernels(graph)


# Largest error relative to the largest number: 1e-5 for 128 channels was measured (kernels/winograd.py), twenty times
# less than what the contract allows a gradient.
@pytest.mark.parametrize(
    ("channels", "size", "pads"),
    [(16, 16, SAME), (64, 8, SAME), (128, 4, SAME), (16, 8, [2, 0, 0, 2]), (20, 8, SAME),  # no whole vectors of inputs
     (16, 8, [2] * 4), (16, 12, [0] * 4)],  # maps of 10x10 become 12x12, and 8x8
)  # fmt: skip
def test_errors_stay_small(channels, size, pads):
    graph = network(channels, size, pads=pads)
    x, y = batch(graph, 6)
    made = learner(graph, 4, loss="mse")
    _, wanted = reference.gradients(graph, x, y, "mse")
    for name, gradient in made.gradients(x, y).items():
        assert np.abs(gradient - wanted[name]).max() <= 1.5e-5 * np.abs(wanted[name]).max(), name


@pytest.mark.parametrize(
    "rows", [0, 3, 4, 8, 10**6], ids=["row-by-row", "rows-and-rest", "block", "blocks-and-rest", "batch"]
)
def test_gradients_of_any_parts_agree(monkeypatch, rows):
    graph = network(16, 16)
    x, y = batch(graph, 11)  # three blocks of four rows of tiles
    part_bytes = rows * 36 * 4 * 4 * 4 * (16 + 16)
    usual = learner(graph, 4, loss="mse").gradients(x, y)
    monkeypatch.setattr(winograd, "_PART_BYTES", part_bytes)
    for name, gradient in learner(graph, 4, loss="mse").gradients(x, y).items():
        np.testing.assert_allclose(gradient, usual[name], rtol=0, atol=1e-5 * np.abs(usual[name]).max())


def test_either_operands_tiles_may_overlap(monkeypatch):
    graph = network(16, 8)  # the first layer's output gradient has no border: no input gradient is wanted there
    x, y = batch(graph, 6)
    usual = learner(graph, 4, loss="mse").gradients(x, y)
    monkeypatch.setattr(winograd, "_can_flip", lambda *_: False)
    other = learner(graph, 4, loss="mse").gradients(x, y)
    assert np.array_equal(other["weight0"], usual["weight0"])
    assert not np.array_equal(other["weight1"], usual["weight1"])
    np.testing.assert_allclose(other["weight1"], usual["weight1"], rtol=0, atol=1e-5 * np.abs(usual["weight1"]).max())


def test_error_maps_whose_memory_has_a_border_later_have_none_yet():
    """The gradient of a sum is that of its second branch as it is; in its place comes a normalisation's, bordered."""
    rng, graph = np.random.default_rng(0), Graph("case", (16, 8, 8))

    def conv(x: str, name: str, kernel: int) -> str:
        weight = graph.parameter(name, rng.normal(0, 0.1, (16, 16, kernel, kernel)))
        return graph.add("Conv", [x, weight], pads=[kernel // 2] * 4)

    numbers = [graph.parameter(name, rng.random(16) + 0.5, name in ("scale", "bias"))
               for name in ("scale", "bias", "mean", "variance")]  # fmt: skip
    branch = graph.add("Relu", [graph.add("BatchNormalization", [conv(conv("input", "a", 1), "b", 3), *numbers])])
    graph.set_outputs([conv(graph.add("Add", [branch, conv("input", "c", 3)]), "d", 1)])
    x, y = batch(graph, 16)
    made = learner(graph, 4, loss="mse")
    made.gradients(x, y)
    poison(made)
    assert_all_close(made.gradients(x, y), reference.gradients(graph, x, y, "mse")[1], 1e-5)


def test_without_a_bias_there_is_a_zero_for_each_of_an_odd_number_of_channels():
    graph = Graph("odd", (20, 4, 12))
    graph.set_outputs([graph.add("Conv", ["input", graph.parameter("w", np.ones((9, 20, 3, 3)))], pads=SAME)])
    plan = learner(graph, 4, loss="mse").plans.plan(False, 4)
    (row,) = [row for row in plan.rows if row.kernel[0] == "winograd"]
    zeros = plan.fixed[row.arguments[argument_names("winograd").index("bias")].buffer]
    assert zeros.nbytes >= 9 * 4


@pytest.mark.parametrize("threads", [2, 3, 5])
@pytest.mark.parametrize(
    ("channels", "size", "samples"),
    [(12, 12, 10), (32, 4, 3)],  # nine tiles a map: chunks of one; a single tile: threads share the output channels
)
def test_results_do_not_depend_on_threads(threads, channels, size, samples):
    graph = network(channels, size)
    x, y = batch(graph, samples)
    alone, together = (learner(graph, 4, number, loss="mse") for number in (1, threads))
    assert_same(together.gradients(x, y), alone.gradients(x, y))
    assert_same({"output": together.logits(x)}, {"output": alone.logits(x)})


@pytest.mark.parametrize(
    ("tiles", "blocks", "threads", "chunk"),
    [(64, 2, 2, 4), (4, 2, 2, 4), (4, 1, 2, 2), (4, 1, 4, 1), (9, 2, 2, 1), (6, 4, 2, 2), (6, 3, 2, 1), (64, 1, 1, 4)],
)
def test_chunks_let_all_threads_finish_together(tiles, blocks, threads, chunk):
    assert winograd_tile(tiles, blocks, threads, lanes=simd_lanes())[0] == chunk


@pytest.mark.parametrize(
    ("chunks", "tiles", "threads", "cuts"),
    [(1, 4, 1, 1), (1, 4, 2, 2), (1, 1, 2, 1), (3, 4, 2, 2), (2, 4, 2, 1), (6, 8, 4, 2), (1, 3, 4, 3), (9, 4, 2, 1)],
)
def test_threads_share_the_outputs_of_few_chunks(chunks, tiles, threads, cuts):
    assert winograd_cuts(chunks, tiles, threads) == cuts


def test_a_single_chunk_has_a_job_for_every_thread():
    rows = learner(network(32, 4), 4, 2, loss="mse").training_plan(4).rows
    assert {row.jobs for row in rows if row.kernel[0] == "winograd"} == {2}


@pytest.mark.parametrize(
    ("tiles", "lanes", "chunk", "wide"),
    [(64, 4, 16, 16), (64, 8, 8, 16), (4, 4, 4, 16), (4, 8, 4, 16), (9, 4, 1, 4), (6, 4, 2, 8), (6, 16, 2, 16)],
)
def test_neighbouring_tiles_fill_the_widest_vector(tiles, lanes, chunk, wide, monkeypatch):
    monkeypatch.setattr("edgetrain.choice._host", lambda: Target(lanes=16, registers=32))
    assert winograd_tile(tiles, 4, 2, lanes)[:2] == (chunk, wide)
