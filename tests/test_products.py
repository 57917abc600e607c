"""How products become kernel calls: outer products, terms that are left out, vectors that neighbouring pixels fill."""

from __future__ import annotations

import numpy as np
import pytest

from edgetrain import lowering_products
from edgetrain.choice import Target
from edgetrain.graph import Graph
from edgetrain.kernels.codes import CHANNELS
from edgetrain.kernels.registry import argument_names
from edgetrain.learner import Learner
from edgetrain.lowering_core import overlapping, steps_of, widened
from edgetrain.plan import Ref, Row
from tests.engine import PROFILE, assert_all_close, wide_host
from tests.engine import learner as samples_learner

MULTIPLY, CORRELATE = "multiply", "correlate"


def network(kernel: int, pad: int, size: int = 10, transposed: bool = True) -> Graph:
    """Two convolutions, of which the second has an input gradient, and a fully connected layer."""
    rng = np.random.default_rng(0)
    graph = Graph("products", input_shape=(2, size, size))
    x = graph.add("Conv", ["input", graph.parameter("a", rng.normal(size=(4, 2, 3, 3)))], pads=[1] * 4)
    weight = graph.parameter("b", 0.3 * rng.normal(size=(8, 4, kernel, kernel)))
    x = graph.add("Flatten", [graph.add("Conv", [x, weight], pads=[pad] * 4)])
    shape = (8, graph.values[x].size) if transposed else (graph.values[x].size, 8)
    dense = graph.parameter("c", 0.1 * rng.normal(size=shape))
    graph.set_outputs([graph.add("Gemm", [x, dense], transB=int(transposed))])
    return graph


def made(graph: Graph, count: int) -> Learner:
    return Learner(graph, PROFILE, batch_size=count, threads=1)


def rows_of(learner: Learner, count: int, op_type: str) -> list[Row]:
    plan = learner.plans.plan(True, count)
    return [row for row in plan.rows if plan.graph.nodes[row.node].op_type == op_type and row.stage == "backward"]


def gradients(learner: Learner, count: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    x = rng.normal(size=(count, *learner.graph.input_shape)).astype(np.float32)
    return learner.gradients(x, rng.integers(0, 8, count))


@pytest.mark.parametrize("transposed", [True, False])
def test_gradients_of_layers_of_one_pixel_are_outer_products(transposed):
    learner = made(network(3, 1, transposed=transposed), 8)
    rows = rows_of(learner, 8, "ProductWeightGrad")
    outer = {row.node for row in rows if row.kernel[0] == "turn_samples"}
    assert len(outer) == 1
    assert [row.kernel[1][-1] for row in rows if row.kernel[0] == "multiply" and row.node in outer] == [CHANNELS]


@pytest.mark.parametrize(("kernel", "pad", "left_out"), [(5, 0, True), (5, 4, False), (3, 1, False), (1, 0, False)])
def test_terms_outside_are_left_out_where_they_are_many(kernel, pad, left_out):
    learner = made(network(kernel, pad), 8)
    place = argument_names("multiply").index("ranges")
    found = [row.arguments[place] for row in rows_of(learner, 8, "ProductInputGrad") if row.kernel[0] == "multiply"]
    assert any(isinstance(argument, Ref) for argument in found) == left_out


@pytest.mark.parametrize("kernel", [3, 5])
@pytest.mark.parametrize("count", [1, 5, 8, 40])
def test_leaving_terms_out_changes_nothing(kernel, count, monkeypatch):
    graph = network(kernel, 0)
    with_ranges = gradients(made(graph, count), count)
    monkeypatch.setattr("edgetrain.lowering_products._WORTHWHILE", 0.0)
    assert_all_close(gradients(made(graph, count), count), with_ranges, 1e-6)


@pytest.mark.parametrize(("lanes", "registers"), [(4, 32), (8, 16), (16, 32)])
@pytest.mark.parametrize("count", [4, 8])
def test_wider_vectors_change_nothing(lanes, registers, count, monkeypatch):
    graph = network(3, 1, size=8)
    usual = gradients(made(graph, count), count)
    monkeypatch.setattr("edgetrain.choice._host", lambda: Target(lanes, registers))
    assert_all_close(gradients(made(graph, count), count), usual, 1e-5)


@pytest.mark.parametrize(
    ("lanes", "widest", "together"), [(4, 16, 4), (8, 16, 2), (16, 16, 1), (16, 8, 1), (4, 4, 1), (8, 12, 1)]
)
def test_neighbours_fill_the_widest_vector(lanes, widest, together):
    pixels = [(4 * lanes * p, 4 * lanes * p + 256) for p in range(8)]
    assert widened(pixels, lanes, widest) == (pixels[::together], lanes * together)


def test_pixels_that_are_no_neighbours_stay_apart():
    strided = [(32 * p, 16 * p) for p in range(8)]
    assert widened(strided, 4, 16) == (strided, 4)
    odd = [(16 * p, 16 * p) for p in range(7)]
    assert widened(odd, 4, 16) == (odd, 4)


@pytest.mark.parametrize(
    ("columns", "lanes", "starts", "wide"),
    [(10, 4, (0, 4, 6), 16), (8, 4, (0, 4), 16), (5, 8, (0, 2, 3), 16), (3, 4, (0, 1), 8), (1, 4, (0,), 4)],
)
def test_vectors_of_results_overlap_where_a_row_does_not_fill_them(columns, lanes, starts, wide):
    rows = [[(4 * lanes * c + 4096 * r, 4 * lanes * c + 2048 * r) for c in range(columns)] for r in range(3)]
    found, lanes_found = overlapping([pixel for row in rows for pixel in row], lanes, 16)
    assert (found, lanes_found) == ([columns * r + start for r in range(3) for start in starts], wide)
    strided = [(32 * p, 16 * p) for p in range(8)]
    assert overlapping(strided, 4, 16) == (list(range(8)), 4)
    assert overlapping(strided, 4, 16, steps_of(strided, 4)) == ([0, 4], 16)
    assert overlapping([], 4, 16) == ([], 4)


def test_a_stride_in_one_operand_leaves_vectors_whole():
    strided = [(32 * p + 1024 * (p // 4), 16 * p) for p in range(8)]
    assert steps_of(strided, 4) == (32, 16)
    assert widened(strided, 4, 16, (32, 16)) == (strided[::4], 16)
    assert widened(strided, 4, 32, (32, 16)) == (strided[::4], 16)  # the next row is elsewhere
    assert steps_of([(64 * p, 16 * p) for p in range(8)], 4) == (64, 16)
    for pixels in ([(32 * p, 32 * p) for p in range(8)], [(80 * p, 16 * p) for p in range(8)], [(0, 0)]):
        assert steps_of(pixels, 4) == (16, 16)


@pytest.mark.usefixtures(wide_host.__name__)
@pytest.mark.parametrize(("lanes", "runs"), [(4, 4), (8, 2), (16, 1)])
def test_strided_convolutions_fill_the_widest_vectors_in_small_batches(lanes, runs, monkeypatch):
    monkeypatch.setattr("edgetrain.choice._host", lambda: Target(16, 32))
    graph = Graph("strided", (3, 16, 16))
    x = graph.add("Conv", ["input", graph.parameter("a", np.ones((5, 3, 3, 3)))], strides=[2, 2], pads=[1] * 4)
    graph.set_outputs([graph.add("Conv", [x, graph.parameter("b", np.ones((4, 5, 2, 2)))], strides=[2, 2])])
    rows = samples_learner(graph, lanes, loss="mse").training_plan(lanes).rows
    multiply, correlate = ([row.kernel[1] for row in rows if row.kernel[0] == name] for name in (MULTIPLY, CORRELATE))
    assert {(key[0], *key[4:]) for key in multiply} == ({(16, runs, 1), (16, 1, runs)} if runs > 1 else {(16,)})
    assert {(key[0], *key[5:]) for key in correlate} == ({(16, runs)} if runs > 1 else {(16,)})


@pytest.mark.parametrize(("stride", "pixels"), [(1, 256), (2, 64)])
def test_a_sum_of_a_weight_gradient_goes_over_as_many_pixels_of_the_input(stride, pixels):
    graph = Graph("strided", (3, 64, 64))
    weight = graph.parameter("a", np.ones((5, 3, 3, 3)))
    graph.set_outputs([graph.add("Conv", ["input", weight], strides=[stride] * 2, pads=[1] * 4)])
    rows = Learner(graph, PROFILE, batch_size=32, threads=1, loss="mse").training_plan(32).rows
    place = argument_names("correlate").index("pixel_chunk")
    assert [row.arguments[place] for row in rows if row.kernel[0] == CORRELATE] == [pixels]


@pytest.mark.parametrize(
    ("sources", "lanes", "columns", "runs"),
    [
        (range(0, 128, 4), 16, 16, [0, 64]),
        (range(0, 108, 4), 16, 16, [0, 44]),  # 27 weights: two runs that overlap
        ([16, 12, 8, 4, 0], 8, 5, [0]),  # turned, as for an input gradient
        ([72, 76, 80, 0, 4, 8], 16, 3, [0, 72]),
        ([72, 76, 80, 0, 4, 8], 4, 0, []),  # parts of short vectors
        ([0, 4, 8, 12, 20, 24], 16, 0, []),  # stretches of different length
        (range(0, 640, 64), 16, 0, []),
        ([], 16, 0, []),
    ],
)
def test_weights_that_lie_side_by_side_are_runs(sources, lanes, columns, runs):
    assert lowering_products._runs(list(sources), lanes) == (columns, runs)


def convolution(channels: int, kernel: tuple[int, ...], group: int, strides: int) -> Graph:
    """Three convolutions, the second with ``group`` groups."""
    rng = np.random.default_rng(0)
    graph, ones = Graph("packed", input_shape=(2, *[9] * len(kernel))), [1] * len(kernel)
    x = graph.add("Conv", ["input", graph.parameter("a", rng.normal(size=(channels, 2, *ones)))])
    weight = graph.parameter("b", rng.normal(size=(channels, channels // group, *kernel)))
    x = graph.add("Conv", [x, weight], group=group, strides=[strides] * len(kernel), pads=[1] * 2 * len(kernel))
    x = graph.add("Conv", [x, graph.parameter("c", rng.normal(size=(8, channels, *ones)))])
    graph.set_outputs([graph.add("Flatten", [graph.add("GlobalAveragePool", [x])])])
    return graph


@pytest.mark.parametrize("count", [1, 8])
@pytest.mark.parametrize("lanes", [4, 8, 16])
@pytest.mark.parametrize(
    ("channels", "kernel", "group", "strides"),
    [(32, (3, 3), 1, 1), (32, (1, 1), 1, 1), (32, (5,), 1, 1), (32, (3, 3), 1, 2), (24, (3, 3), 1, 1),
     (7, (3, 3), 1, 1), (32, (3, 3), 2, 1), (32, (3, 3), 32, 1)],
)  # fmt: skip
def test_weights_packed_by_vectors_are_those_packed_by_number(
    channels, kernel, group, strides, lanes, count, monkeypatch
):
    graph = convolution(channels, kernel, group, strides)
    monkeypatch.setattr(lowering_products, "simd_lanes", lambda: lanes)
    learner = made(graph, count)
    kernels = {row.kernel for row in learner.plans.plan(True, count).rows if row.kernel[0] == "pack_runs"}
    x = np.random.default_rng(1).normal(size=(count, *graph.input_shape)).astype(np.float32)
    found, output = learner.gradients(x, np.arange(count) % 8), learner.logits(x)
    monkeypatch.setattr(lowering_products, "_lanes_to_turn", lambda width: 0)
    other = made(graph, count)
    assert "pack_runs" not in {row.kernel[0] for row in other.plans.plan(True, count).rows}
    assert all(kernel[1][0] <= lanes for kernel in kernels)
    assert kernels or count > 1  # where lanes hold channels, tiles are whole vectors of them
    np.testing.assert_array_equal(output, other.logits(x))
    for name, wanted in other.gradients(x, np.arange(count) % 8).items():
        np.testing.assert_array_equal(found[name], wanted, err_msg=name)


@pytest.mark.parametrize("count", [1, 3, 4, 8, 32])
def test_products_of_convolutions_are_cut_for_four_threads(count, monkeypatch):
    """Results do not depend on it: each job computes its own pixels, whole."""
    graph = network(5, 0, size=12)
    rows = [row for row in made(graph, count).plans.plan(True, count).rows if row.kernel[0] == "multiply"]
    names = argument_names("multiply")
    pixels = [row.arguments[names.index("pixel_count")] for row in rows]
    assert all(row.jobs >= 4 for row, several in zip(rows, pixels, strict=True) if int(several) >= 32)
    x = np.random.default_rng(1).normal(size=(count, *graph.input_shape)).astype(np.float32)
    found = made(graph, count).gradients(x, np.arange(count) % 8)
    monkeypatch.setattr(lowering_products, "FEWEST_JOBS", 1)
    uncut = [row for row in made(graph, count).plans.plan(True, count).rows if row.kernel[0] == "multiply"]
    assert count > 8 or sum(row.jobs for row in uncut) < sum(row.jobs for row in rows)
    for name, wanted in made(graph, count).gradients(x, np.arange(count) % 8).items():
        np.testing.assert_array_equal(found[name], wanted, err_msg=name)
