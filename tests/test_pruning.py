"""Pruned backward passes: channels of error maps, gradients by chance, saved activations."""

from __future__ import annotations

import ctypes
import math
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import edgetrain as et
from edgetrain import lowering_elements, reference
from edgetrain.arrays import aligned
from edgetrain.autodiff import LABELS, TrainingGraph, training_graph
from edgetrain.densities import erdos_renyi_kernel
from edgetrain.errors import NumericalError, UsageError
from edgetrain.graph import Graph, Node
from edgetrain.kernels.codes import MEAN_COUNT, MEANS, RECORD
from edgetrain.kernels.registry import argument_names, compile_kernels, load_factories
from edgetrain.learner import Learner
from edgetrain.ops import get_op
from edgetrain.pruning import (
    ErrorMapPruning,
    ErrorPruning,
    GradientPruning,
    error_maps,
)
from edgetrain.saved_activations import compress_activations, mask_activations
from tests.engine import (
    PROFILE,
    PRUNING_KERNELS,
    assert_all_close,
    assert_close,
    assert_same,
    channel_learner,
    learner,
    poison,
    set_lanes,
    wide_host,
)
from tests.op_cases import Net

Array = NDArray[Any]
TOLERANCE = 1e-5
SAME = [1, 1, 1, 1]

pytestmark = pytest.mark.usefixtures(wide_host.__name__)


def network(norm: bool = False, shape: tuple[int, int, int] = (3, 8, 8)) -> Graph:
    """Convolutions of stride 1 and 2, 1x1, depthwise, on a residual branch, with pools and with or without norms."""
    net = Net(shape)
    x = net.conv("input", 8, shape[0], 3, 3, pads=SAME, bias=not norm)
    x = net.Relu(net.norm(x) if norm else x)
    y = net.conv(x, 12, 8, 3, 3, pads=SAME, strides=[2, 2], bias=not norm)
    y = net.Relu(net.norm(y) if norm else y)
    y = net.conv(y, 12, 1, 3, 3, pads=SAME, group=12)
    z = net.conv(x, 12, 8, 1, 1, strides=[2, 2])
    x = net.MaxPool(net.Relu(net.Add(y, z)), kernel_shape=[2, 2], strides=[2, 2])
    net.graph.set_outputs([net.Gemm(net.Flatten(x), net.parameter(5, net.shape(x)[0] * 4, spread=0.1), transB=1)])
    return net.graph


def batch(count: int, shape: tuple[int, int, int] = (3, 8, 8)) -> tuple[Array, Array]:
    rng = np.random.default_rng(count)
    return rng.normal(size=(count, *shape)).astype(np.float32), rng.integers(5, size=count)


def conv_weights(graph: Graph) -> list[str]:
    """Names of the weights of convolutions of one group."""
    return [n.input(1).name for n in graph.nodes if n.op_type == "Conv" and n.get("group", 1) == 1]


def masked_gradients(
    graph: Graph, x: Array, y: Array, mask_error: Any = None, mask_input: Any = None
) -> dict[str, Array]:
    """Return the gradients of a dense training graph whose convolutions' operands are masked as they are read."""
    train = training_graph(graph)
    ours = set(conv_weights(graph))
    convs = [n for n in graph.nodes if n.op_type == "Conv" and n.get("group", 1) == 1]
    biases = {n.input(2).name for n in convs if n.optional(2)}
    values = reference._start(graph, x, np.float64) | {LABELS: y}
    by_error = {e.value.name: values[e.conv.input(1).name] for e in error_maps(train)}
    normalising = [n for n in train.graph.nodes if "NormalizationGrad" in n.op_type]
    normalised = {n.outputs[n.op_type.startswith("Residual")].name for n in normalising}
    for node in train.graph.nodes:
        inputs = [values[v.name] for v in node.inputs if v is not None]
        like = node.get("like")
        if mask_error is not None:
            if node.op_type == "ProductInputGrad" and node.input(1).name in ours:
                inputs[0] = mask_error(inputs[0], values[node.input(1).name], node.x.name in normalised)
            elif node.op_type == "ProductWeightGrad" and like.name in ours:
                inputs[1] = mask_error(inputs[1], values[like.name], node.input(1).name in normalised)
            elif node.op_type == "SumTo" and like.name in biases:
                inputs[0] = mask_error(inputs[0], by_error[node.x.name], node.x.name in normalised)
        if mask_input is not None and node.op_type == "ProductWeightGrad" and like.name in ours:
            inputs[0] = mask_input(inputs[0])
        values.update(zip((v.name for v in node.outputs), get_op(node.op_type).reference(node, *inputs), strict=True))
    return {name: values[grad] for name, grad in train.gradients.items()}


# ---- channels of error maps ------------------------------------------------------------------------------------------


def keep_largest(keep: float, weigh: bool) -> Any:
    def mask(grad: Array, weights: Array, normalised: bool) -> Array:
        norms = np.linalg.norm(np.moveaxis(grad, 1, 0).reshape(grad.shape[1], -1), 2 if normalised else 1, axis=1)
        scores = 2 * norms / norms.sum()
        if weigh:
            scores = scores + np.abs(weights).sum((1, 2, 3)) / np.abs(weights).sum()
        kept = np.argsort(-scores)[: max(1, round(keep * len(scores)))]
        out = np.zeros_like(grad)
        out[:, kept] = grad[:, kept]
        return out

    return mask


@pytest.mark.parametrize("count", [1, 4, 6])
@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
@pytest.mark.parametrize("keep", [0.5, 0.1])
def test_both_products_equal_the_masked_dense_ones(norm, count, keep):
    if norm and count == 1:
        count = 2
    (x, y), graph = batch(count), network(norm)
    made = learner(graph, error_pruning=ErrorMapPruning(keep=keep))
    assert_all_close(made.gradients(x, y), masked_gradients(graph, x, y, keep_largest(keep, False)), TOLERANCE)


@pytest.mark.parametrize("threads", [1, 2])
def test_channels_are_chosen_by_their_norm_where_the_variance_is_as_small_as_epsilon(threads):
    """The gradient follows the output, so most of it goes; 1 + epsilon / variance tells how much stays."""
    shares, epsilon = np.array([0.1, 0.6]), 1e-3  # of var / (var + epsilon)
    graph = Graph("norm", input_shape=(2, 4, 4))
    weight = np.diag(np.sqrt(epsilon * shares / (1 - shares))).reshape(2, 2, 1, 1)
    zeros, ones = np.zeros(2, np.float32), np.ones(2, np.float32)
    names = [graph.parameter(name, value) for name, value in (("w", weight), ("scale", ones), ("bias", zeros))]
    running = [graph.parameter(name, value, trainable=False) for name, value in (("mean", zeros), ("variance", ones))]
    convolved = graph.add("Conv", ["input", names[0]])
    graph.set_outputs([graph.add("BatchNormalization", [convolved, *names[1:], *running], epsilon=epsilon)])
    x = np.random.default_rng(0).normal(size=(64, 2, 4, 4)).astype(np.float32)
    pruned, dense = (
        learner(graph, loss="mse", threads=threads, error_pruning=policy).gradients(x, np.zeros_like(x))["w"]
        for policy in (ErrorMapPruning(keep=0.5), None)
    )
    # In float64 the norms are as sqrt(r) (1 - r)^1.5 of the shares r: the first channel has the larger one.
    norms = np.sqrt(shares) * (1 - shares) ** 1.5
    assert norms[0] > 1.3 * norms[1]
    assert_close(pruned[0], dense[0], TOLERANCE)
    assert not pruned[1].any()


def residual_network() -> Graph:
    """Normalised branches added to what they start from, with Relus in between and behind, and a Clip."""
    net = Net((3, 8, 8))
    x = net.Relu(net.norm(net.conv("input", 8, 3, 3, 3, pads=SAME, bias=False)))
    for last in ({}, {"min": 0.0, "max": 0.8}):
        y = net.Relu(net.norm(net.conv(x, 8, 8, 3, 3, pads=SAME, bias=False)))
        y = net.Add(net.norm(net.conv(y, 8, 8, 3, 3, pads=SAME, bias=False)), x)
        x = net.Clip(y, **last) if last else net.Relu(y)
    x = net.Flatten(net.GlobalAveragePool(net.conv(x, 12, 8, 3, 3, strides=[2, 2])))
    net.graph.set_outputs([net.Gemm(x, net.parameter(5, 12), transB=1)])
    return net.graph


CHOOSING = {
    "PrunedBatchNormalizationGrad", "PrunedBatchNormalizationGradAgain", "PrunedResidualNormalizationGrad",
}  # fmt: skip


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("count", [2, 6, 20])
def test_gradients_of_normalisations_choose_channels_by_their_sums(count, threads):
    """Nobody looks at the error maps for that, but at that of the convolution without a normalisation."""
    (x, y), graph = batch(count), residual_network()
    made = learner(graph, error_pruning=ErrorMapPruning(keep=0.5), threads=threads)
    plan = made.training_plan()
    assert {node.op_type for node in plan.graph.nodes} >= CHOOSING
    assert [row.kernel[0] for row in plan.rows].count("channel_scores") == 1
    made.gradients(x, y)
    poison(made)  # nobody reads the errors of the channels that were left out
    assert_all_close(made.gradients(x, y), masked_gradients(graph, x, y, keep_largest(0.5, False)), 3 * TOLERANCE)


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("count", [2, 20])
def test_what_is_added_to_a_normalisation_has_a_choice_of_its_own(count, kernel, swapped):
    """A shortcut with a convolution and without a normalisation: one node makes the error maps of both branches."""
    net, pads = Net((3, 8, 8)), [kernel // 2] * 4
    x = net.Relu(net.conv("input", 8, 3, 3, 3, pads=SAME))
    a = net.norm(net.conv(x, 8, 8, 3, 3, pads=SAME, bias=False))
    b = net.conv(x, 8, 8, kernel, kernel, pads=pads)
    x = net.Flatten(net.GlobalAveragePool(net.Relu(net.Add(b, a) if swapped else net.Add(a, b))))
    net.graph.set_outputs([net.Gemm(x, net.parameter(5, 8), transB=1)])
    (x, y), graph = batch(count), net.graph
    made = learner(graph, error_pruning=ErrorMapPruning(keep=0.6))
    made.gradients(x, y)
    poison(made)
    assert_all_close(made.gradients(x, y), masked_gradients(graph, x, y, keep_largest(0.6, False)), 3 * TOLERANCE)


@pytest.mark.parametrize("importance", ["random", "error_and_weights"])
def test_normalised_error_maps_may_be_chosen_otherwise(importance):
    """With a share of all channels but one: who is left out has no gradient, all others that of the masked network."""
    (x, y), graph = batch(6), residual_network()
    made = learner(graph, error_pruning=ErrorMapPruning(keep=0.88, importance=importance))
    found = made.gradients(x, y)
    kept = {name: np.flatnonzero(np.abs(found[name]).sum((1, 2, 3))) for name in conv_weights(graph)}
    assert {len(channels) for channels in kept.values()} == {7, 11}
    names = {id(array): name for name, array in graph.arrays.items()}

    def mask(grad: Array, weights: Array, normalised: bool) -> Array:
        (name,) = [n for n in names.values() if graph.arrays[n].shape == weights.shape
                   and np.array_equal(graph.arrays[n], weights.astype(np.float32))]  # fmt: skip
        out = np.zeros_like(grad)
        out[:, kept[name]] = grad[:, kept[name]]
        return out

    assert_all_close(found, masked_gradients(graph, x, y, mask), 3 * TOLERANCE)


def test_gradients_do_not_depend_on_what_the_step_before_kept():
    """Its channels get their input gradients along with the sums, those that are new get them after the choice."""
    graph, (x, y) = residual_network(), batch(20)
    made, fresh = (learner(graph, error_pruning=ErrorMapPruning(keep=0.5)) for _ in range(2))
    parameters = made.parameters()
    made.load_parameters({name: array[::-1] if array.ndim == 1 else array for name, array in parameters.items()})
    before = made.gradients(x, y)
    made.load_parameters(parameters)
    after = made.gradients(x, y)
    kept = [{n: np.abs(found[n]).sum((1, 2, 3)) > 0 for n in conv_weights(graph)} for found in (before, after)]
    assert sum((kept[0][name] & ~kept[1][name]).any() for name in kept[0]) > 2
    assert sum((kept[0][name] & kept[1][name]).any() for name in kept[0]) > 2
    assert_same(after, fresh.gradients(x, y))


def test_weights_may_count_in_the_importance():
    (x, y), graph = batch(5), network()
    made = learner(graph, error_pruning=ErrorMapPruning(keep=0.5, importance="error_and_weights"))
    assert_all_close(made.gradients(x, y), masked_gradients(graph, x, y, keep_largest(0.5, True)), TOLERANCE)


@pytest.mark.parametrize("keep", [0.7, 0.3])
def test_winograd_products_take_listed_channels(keep):
    graph, (x, y) = Graph("wide", (16, 8, 8)), batch(5, (16, 8, 8))
    net = Net((16, 8, 8))
    h = net.Relu(net.conv("input", 16, 16, 3, 3, pads=SAME))
    h = net.GlobalAveragePool(net.conv(h, 24, 16, 3, 3, pads=SAME))
    net.graph.set_outputs([net.Gemm(net.Flatten(h), net.parameter(5, 24), transB=1)])
    graph = net.graph
    made = learner(graph, error_pruning=ErrorMapPruning(keep=keep))
    used = {row.kernel[0] for row in made.training_plan().rows}
    assert {"winograd", "winograd_weight_gradient", "zero_unlisted"} <= used
    assert_all_close(made.gradients(x, y), masked_gradients(graph, x, y, keep_largest(keep, False)), 3e-5)


@pytest.mark.parametrize("count", [1, 5, 20])
@pytest.mark.parametrize(
    "policy",
    [et.StaticSparse(0.8, distribution="uniform"), et.SWAT(weights=0.8, activations=0.0),
     et.RigL(0.8, distribution="uniform", dense_first=False)],
    ids=lambda policy: policy.name,
)  # fmt: skip
def test_of_lists_of_weights_the_kept_channels_are_read(policy, count):
    """And less is executed than with either method alone."""
    (x, y), graph = batch(count), network()
    pruning = ErrorMapPruning(keep=0.5)
    made = learner(graph, error_pruning=pruning, sparsity=policy)
    used = {row.kernel[0] for row in made.training_plan().rows}
    assert used >= {"channel_flags", "multiply_csr"}
    assert ("sum_csr_listed" in used) == policy.compact
    with_zeros = network()
    with_zeros.arrays = made.parameters()
    wanted = masked_gradients(with_zeros, x, y, keep_largest(0.5, False))
    if policy.compact:
        wanted = {name: array * made.topology.indices[name].mask() if name in made.topology.indices else array
                  for name, array in wanted.items()}  # fmt: skip
    assert_all_close(made.gradients(x, y), wanted, TOLERANCE)
    others = learner(graph, error_pruning=pruning), learner(graph, sparsity=policy)
    done = [each.partial_fit(x, y).macs_done for each in (made, *others)]
    assert done[0] < min(done[1:])


@pytest.mark.parametrize("policy", [et.RigL(0.8, distribution="uniform"), et.SWAT(0.8, activations=0.0)],
                         ids=lambda policy: policy.name)  # fmt: skip
def test_weights_that_do_not_exist_count_as_zeros_in_the_importance(policy):
    (x, y), graph = batch(6), network()
    made = learner(graph, error_pruning=ErrorMapPruning(keep=0.5, importance="error_and_weights"), sparsity=policy)
    with_zeros = network()
    with_zeros.arrays = made.parameters()
    wanted = masked_gradients(with_zeros, x, y, keep_largest(0.5, True))
    if policy.compact:
        wanted = {name: array * made.topology.indices[name].mask() if name in made.topology.indices else array
                  for name, array in wanted.items()}  # fmt: skip
    assert_all_close(made.gradients(x, y), wanted, TOLERANCE)


def test_gradients_of_sparser_weights_are_left_alone():
    graph = network()
    policies = {share: et.StaticSparse(share, distribution="uniform") for share in (0.7, 0.95)}
    pruning = GradientPruning(rate=0.9, group="lanes")
    plans = {s: learner(graph, error_pruning=pruning, sparsity=p).training_plan() for s, p in policies.items()}
    lists = {share: [n.op_type for n in plan.graph.nodes].count("ErrorLists") for share, plan in plans.items()}
    assert lists[0.95] < lists[0.7]


def test_the_share_of_kept_channels_may_go_by_layer():
    made = learner(network(), error_pruning=ErrorMapPruning(keep=0.5, distribution="erk"))
    nodes = made.training_plan().graph.nodes
    choices = {n.input(1).name: n.y.size / n.input(1).shape[0] for n in nodes if n.op_type == "KeptChannels"}
    shapes = {name: made.graph.arrays[name].shape for name in conv_weights(made.graph)}
    wanted = erdos_renyi_kernel(shapes, 0.5)
    assert len(set(wanted.values())) == len(wanted), "no two layers alike"
    for name, share in wanted.items():
        assert choices.get(name, 1.0) == pytest.approx(share, abs=0.5 / shapes[name][0])


class Everything(ErrorMapPruning):
    """Lists all channels."""

    def _count(self, conv: Node, keep: Any) -> int:
        return conv.input(1).shape[0]


def test_all_channels_listed_are_the_dense_products_bit_for_bit():
    (x, y), graph = batch(5), network()
    dense, listed = learner(graph).gradients(x, y), learner(graph, error_pruning=Everything()).gradients(x, y)
    weights = [name for name in dense if dense[name].ndim > 1]
    assert_same({n: listed[n] for n in weights}, {n: dense[n] for n in weights})
    assert_all_close(listed, dense, 1e-6)


def test_keeping_all_changes_nothing():
    train = training_graph(network())
    before = list(train.graph.nodes)
    ErrorMapPruning(keep=1).skip(train)
    assert train.graph.nodes == before


def test_dropped_channels_have_a_gradient_of_exactly_zero_and_random_ones_change():
    (x, y), graph = batch(4), network()
    made = learner(graph, error_pruning=ErrorMapPruning(keep=0.5, importance="random"), optimizer=et.SGD(lr=0.0))
    patterns = set()
    for _ in range(6):
        made.partial_fit(x, y)
        grads = made.gradients(x, y)
        rows = [np.abs(grads[name]).sum((1, 2, 3)) == 0 for name in conv_weights(graph)]
        assert all(row.sum() >= row.size // 2 for row in rows)  # of a kept channel a Relu may have left nothing
        patterns.add(b"".join(row.tobytes() for row in rows))
    assert len(patterns) > 3


def test_operations_are_counted():
    (x, y), graph = batch(4), network()
    step = learner(graph, error_pruning=ErrorMapPruning(keep=0.5)).partial_fit(x, y)
    train = training_graph(graph)
    ours = set(conv_weights(graph))
    backward = [n for n in train.graph.nodes if n.op_type in ("ProductInputGrad", "ProductWeightGrad")]
    halved = [n for n in backward if ours & {n.get("like").name, *(v.name for v in n.inputs)}]
    assert step.saved_error_maps == 4 * sum(get_op(n.op_type).macs(n) for n in halved) // 2
    assert step.macs_dense - step.macs_done == step.saved_error_maps


# ---- gradients by chance ---------------------------------------------------------------------------------------------


def run_kernel(name: str, sizes: int | tuple[int, ...], jobs: int, **given: Any) -> None:
    """Run a compiled kernel on arrays and numbers; ``sizes``: the lanes, or all that is known when it is compiled."""
    arguments = []
    for argument in argument_names(name):
        value = given[argument]
        if isinstance(value, np.ndarray):
            value = value.ctypes.data
        arguments.append(int(np.float32(value).view(np.uint32)) if argument.startswith("f_") else int(value))
    table = np.array(arguments, np.int64)
    key = (name, (sizes,) if isinstance(sizes, int) else sizes)
    address = compile_kernels([key])[key]
    ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 3)(address)(table.ctypes.data, 0, jobs)


def pruned(kernel: str, grad: Array, factor: float, step: int = 0, stream: int = 0) -> Array:
    """Prune gradients float32 ``(planes, pixels, lanes)`` whose mean size is known to be 1."""
    planes, pixels, lanes = grad.shape
    record, y, state = aligned(RECORD), aligned(grad.size).reshape(grad.shape), aligned(8, np.int64)
    record[MEANS : MEANS + 5], record[MEAN_COUNT], state[:3] = 1, 5, (lanes, step, 0)
    magnitudes, counts = aligned(planes, np.float64), aligned(2 * planes, np.int64)
    strides = {f"{v}_{part}": 4 * lanes * pixels for v in ("grad", "y") for part in ("block", "channel", "row")}
    run_kernel(kernel, lanes, planes, grad=grad, y=y, magnitudes=magnitudes, counts=counts, record=record, state=state,
               stream=stream, channels=planes, rows=1, columns=pixels, f_factor=factor, **strides)  # fmt: skip
    sizes = np.abs(grad) if kernel == "prune_elements" else np.sqrt((grad**2).sum(2))
    assert magnitudes.sum() == pytest.approx(sizes.sum(), rel=1e-5)
    return y


def normal(planes: int, pixels: int, lanes: int) -> Array:
    array = aligned(planes * pixels * lanes).reshape(planes, pixels, lanes)
    array[...] = np.random.default_rng(0).normal(size=array.shape)
    return array


# Density of the published rule for normally distributed gradients: (1 - p) + 2 (1 - exp(-t^2 / 2)) / (t sqrt(2 pi)).
@pytest.mark.parametrize(("rate", "density"), [(0.5, 0.741), (0.8, 0.549), (0.9, 0.460), (0.99, 0.309)])
def test_density_of_pruned_elements(rate, density):
    grad = normal(64, 64, 8)
    grad /= np.abs(grad).mean()
    assert (pruned("prune_elements", grad, GradientPruning(rate=rate).factor) != 0).mean() == pytest.approx(
        density, abs=0.01
    )


@pytest.mark.parametrize("kernel", ["prune_elements", "prune_vectors"])
def test_every_layer_draws_numbers_of_its_own(kernel):
    grad = normal(4, 64, 4)
    same, other = (pruned(kernel, grad, 2.0 if kernel == "prune_elements" else 4.0, stream=n).copy() for n in (1, 2))
    again = pruned(kernel, grad, 2.0 if kernel == "prune_elements" else 4.0, stream=1)
    assert (again == same).all()
    assert 0.2 < ((same != 0) != (other != 0)).mean() < 0.6


@pytest.mark.parametrize("kernel", ["prune_elements", "prune_vectors"])
def test_pruning_keeps_the_expectation(kernel):
    grad, rounds = normal(4, 64, 4), 3000
    factor = 2.0 if kernel == "prune_elements" else 4.0
    mean = np.mean([pruned(kernel, grad, factor, step).astype(np.float64) for step in range(rounds)], 0)
    sizes = np.abs(grad) if kernel == "prune_elements" else np.sqrt((grad**2).sum(2, keepdims=True))
    # With probability size / limit a number becomes limit / size times as large, else 0.
    deviation = np.abs(grad) * np.sqrt(np.maximum(factor / sizes - 1, 0))
    assert (deviation > 0).mean() > 0.9
    away = np.abs(mean - grad) / np.maximum(deviation / rounds**0.5, 1e-6)
    assert away.max() < 5.5  # of 1024 normal numbers the largest is about 3.3


def test_pruned_vectors_stay_or_go_as_a_whole():
    grad = normal(16, 64, 4)
    grad /= np.sqrt((grad**2).sum(2)).mean()
    out = pruned("prune_vectors", grad, GradientPruning(rate=0.75, group="lanes").factor)
    kept = (out != 0).any(2)
    assert ((out != 0).all(2) == kept).all()
    assert kept.mean() == pytest.approx(0.25, abs=0.03)
    ratio = out[kept] / grad[kept]
    assert np.ptp(ratio, 1).max() < 1e-4


@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
@pytest.mark.parametrize("count", [1, 3, 4, 9])
def test_products_from_lists_equal_the_dense_ones(norm, count):
    count += norm and count == 1
    (x, y), graph = batch(count), network(norm)
    made = learner(graph, error_pruning=GradientPruning(rate=0.9, group="lanes"))  # the first five steps keep all
    assert {"multiply_lists", "correlate_lists"} <= {row.kernel[0] for row in made.training_plan().rows}
    assert_all_close(made.gradients(x, y), reference.gradients(graph, x, y)[1], TOLERANCE)


def pooled_network(pool: dict[str, list[int]], conv: dict[str, list[int]]) -> Graph:
    net = Net((1, 14, 13))
    h = net.MaxPool(net.Relu(net.conv("input", 5, 1, 3, 3, **conv)), **pool)
    weight = net.parameter(5, int(np.prod(net.shape(h))), spread=0.2)
    net.graph.set_outputs([net.Gemm(net.Flatten(h), weight, transB=1)])
    return net.graph


@pytest.mark.parametrize("lanes", [4, 8, 16])
@pytest.mark.parametrize(("count", "pool", "conv", "without_map"), [
    (6, {"kernel_shape": [2, 2], "strides": [2, 2]}, {}, True),
    (9, {"kernel_shape": [3, 2], "strides": [4, 3]}, {"pads": SAME, "strides": [1, 2]}, True),
    (1, {"kernel_shape": [2, 2], "strides": [2, 2]}, {"pads": [0, 2, 1, 0], "dilations": [2, 1]}, True),
    (7, {"kernel_shape": [3, 3], "strides": [2, 2]}, {}, False),
    (7, {"kernel_shape": [2, 2], "strides": [2, 2], "pads": [1, 0, 0, 1]}, {}, False),
    (7, {"kernel_shape": [2, 2], "strides": [2, 2], "dilations": [2, 2]}, {}, False),
], ids=str)  # fmt: skip
def test_lists_behind_a_pool_are_those_of_the_map_not_written(count, pool, conv, without_map, lanes, monkeypatch):
    (x, y), graph = batch(count, (1, 14, 13)), pooled_network(pool, conv)
    policy, optimizer = "gradients:rate=0.6,group=lanes", et.SGD(lr=0.0, momentum=0.0)
    made = learner(graph, lanes, error_pruning=policy, optimizer=optimizer)
    used = {row.kernel[0] for row in made.training_plan().rows}
    assert ("list_pool_vectors" in used, "max_pool_gradient" in used) == (without_map, not without_map)
    assert_all_close(made.gradients(x, y), reference.gradients(graph, x, y)[1], TOLERANCE)
    with monkeypatch.context() as patch:
        patch.setattr("edgetrain.pruning._pool_behind", lambda graph, error_map: None)
        twin = learner(graph, lanes, error_pruning=policy, optimizer=optimizer)
        assert "list_pixels" in {row.kernel[0] for row in twin.training_plan().rows}
    steps = [[each.partial_fit(x, y) for _ in range(8)][-1] for each in (made, twin)]
    assert steps[0].macs_done == steps[1].macs_done < steps[0].macs_dense
    assert_all_close(made.gradients(x, y), twin.gradients(x, y), TOLERANCE)


@pytest.mark.parametrize("importance", ["error", "error_and_weights", "random"])
@pytest.mark.parametrize(("count", "pool", "chosen_from_pool"), [
    (6, {"kernel_shape": [2, 2], "strides": [2, 2]}, True),
    (20, {"kernel_shape": [3, 2], "strides": [4, 3]}, True),
    (1, {"kernel_shape": [1, 2], "strides": [2, 2]}, True),
    (7, {"kernel_shape": [3, 3], "strides": [2, 2]}, False),
    (7, {"kernel_shape": [3, 2], "strides": [2, 2]}, False),
    (7, {"kernel_shape": [2, 3], "strides": [2, 2]}, False),
    (7, {"kernel_shape": [2, 2], "strides": [2, 2], "pads": [1, 0, 0, 1]}, False),
    (7, {"kernel_shape": [2, 2], "strides": [2, 2], "dilations": [2, 2]}, False),
], ids=str)  # fmt: skip
def test_channels_are_chosen_from_what_comes_to_a_pool(count, pool, chosen_from_pool, importance):
    """Where it has the norms of the error map, which is then made of the kept channels alone."""
    (x, y), graph = batch(count, (1, 14, 13)), pooled_network(pool, {"pads": SAME})
    made = learner(graph, error_pruning=ErrorMapPruning(keep=0.6, importance=importance))
    nodes = made.training_plan(count).graph.nodes
    choice = next(node for node in nodes if node.op_type == "KeptChannels")
    assert ("PrunedMaxPoolGrad" in {node.op_type for node in nodes}) == chosen_from_pool
    assert (choice.x.shape[1:] == next(n for n in nodes if n.op_type == "Conv").y.shape[1:]) != chosen_from_pool
    made.gradients(x, y)
    poison(made)  # nobody reads the errors of the channels that were left out
    found = made.gradients(x, y)
    (name,) = conv_weights(graph)
    kept = np.flatnonzero(np.abs(found[name]).sum((1, 2, 3)))
    assert len(kept) == 3

    def drawn(grad: Array, weights: Array, normalised: bool) -> Array:
        return grad * np.isin(np.arange(5), kept)[:, None, None]

    mask = drawn if importance == "random" else keep_largest(0.6, importance == "error_and_weights")
    assert_all_close(found, masked_gradients(graph, x, y, mask), TOLERANCE)


@pytest.mark.parametrize("first", [
    {"kernel_shape": [2, 2], "strides": [2, 2]}, {"kernel_shape": [3, 2], "strides": [2, 2]},
    {"kernel_shape": [2, 3], "strides": [2, 2]},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("count", [1, 9])
def test_every_pool_has_a_choice_of_its_own(count, first):
    """Also where windows of one overlap along one axis."""
    net = Net((3, 16, 16))
    x = net.MaxPool(net.Relu(net.conv("input", 8, 3, 3, 3, pads=SAME)), **first)
    x = net.Relu(net.conv(x, 10, 8, 3, 3, pads=SAME))
    x = net.MaxPool(net.Relu(net.conv(x, 12, 10, 3, 3, pads=SAME)), kernel_shape=[3, 3], strides=[3, 3])
    weight = net.parameter(5, int(np.prod(net.shape(x))), spread=0.1)
    net.graph.set_outputs([net.Gemm(net.Flatten(x), weight, transB=1)])
    (x, y), graph = batch(count, (3, 16, 16)), net.graph
    made = learner(graph, error_pruning=ErrorMapPruning(keep=0.6))
    made.gradients(x, y)
    poison(made)
    assert_all_close(made.gradients(x, y), masked_gradients(graph, x, y, keep_largest(0.6, False)), 3 * TOLERANCE)


def test_an_error_map_of_two_convolutions_behind_a_pool_is_written():
    net = Net((2, 12, 12))
    both = net.Add(net.conv("input", 6, 2, 3, 3), net.conv("input", 6, 2, 3, 3))
    h = net.MaxPool(net.Relu(both), kernel_shape=[2, 2], strides=[2, 2])
    net.graph.set_outputs([net.Gemm(net.Flatten(h), net.parameter(5, 150, spread=0.2), transB=1)])
    (x, y), made = batch(6, (2, 12, 12)), learner(net.graph, error_pruning="gradients:rate=0.6,group=lanes")
    assert "list_pool_vectors" not in {row.kernel[0] for row in made.training_plan().rows}
    assert_all_close(made.gradients(x, y), reference.gradients(net.graph, x, y)[1], TOLERANCE)


@pytest.mark.parametrize("pooled", [False, True])
def test_lists_have_the_places_of_what_the_weight_gradient_reads(pooled):
    """A copy of the input without the smaller half of it needs no border where the input has one."""

    def branch(size: int, **options: Any) -> str:
        h = net.Relu(net.conv("input", 6, 2, size, size, **options))
        return net.MaxPool(h, kernel_shape=[2, 2], strides=[2, 2]) if pooled else h

    net = Net((2, 12, 12))
    h = net.Add(branch(1), branch(3, pads=SAME))
    h = net.Relu(net.conv(h, 6, 6, 3, 3))
    weight = net.parameter(5, int(np.prod(net.shape(h))), spread=0.2)
    net.graph.set_outputs([net.Gemm(net.Flatten(h), weight, transB=1)])
    (x, y), sparsity = batch(20, (2, 12, 12)), et.SWAT(0.0, activations=0.5, dense_first=False)
    made = [learner(net.graph, 16, sparsity=sparsity, error_pruning=policy)
            for policy in (None, "gradients:rate=0.6,group=lanes")]  # fmt: skip
    plan = made[1].training_plan()
    borders = {name: layout.border for name, layout in plan.layouts.items() if name.endswith("masked")}
    assert plan.layouts["input"].border != (0, 0, 0, 0) and (0, 0, 0, 0) in borders.values()
    assert ("list_pool_vectors" in {row.kernel[0] for row in plan.rows}) == pooled
    assert_all_close(*(each.gradients(x, y) for each in made), TOLERANCE)


def test_a_number_that_is_not_finite_is_listed_behind_a_pool():
    """So that the step's check meets it in the gradients of the weights."""
    grad, positions, values = aligned(2 * 4), aligned(4, np.uint32), aligned(2 * 4 * 4)
    grad[5], positions[:] = np.nan, 0b0100  # of the second window the second pixel, in every sample
    segments, pairs = aligned(2, np.int64), aligned(2 * 2 * 8, np.int64)
    run_kernel("list_pool_vectors", (4, 4, 2), 1, positions=positions, grad_out=grad, segments=segments, pairs=pairs,
               values=values, corners=np.array([0, 100]), taps=np.array([0, 16, 32, 48]), channels=1, capacity=8,
               out_rows=1, out_columns=2, positions_block=0, positions_channel=0, grad_block=0, grad_channel=0,
               grad_row=0, x_block=0)  # fmt: skip
    assert segments.tolist() == [0, 1] and pairs[:2].tolist() == [116, 0]
    np.testing.assert_array_equal(values[:4], [0, np.nan, 0, 0])


@pytest.mark.parametrize("group", ["element", "lanes"])
def test_pruning_starts_after_five_steps_and_is_unbiased_through_the_network(group):
    (x, y), graph, rounds = batch(4), network(), 400
    made = learner(graph, error_pruning=GradientPruning(rate=0.7, group=group), optimizer=et.SGD(lr=0.0, momentum=0.0))
    wanted = reference.gradients(graph, x, y)[1]
    for _ in range(5):
        assert_all_close(made.gradients(x, y), wanted, TOLERANCE)
        made.partial_fit(x, y)
    name = conv_weights(graph)[0]
    draws = np.empty((rounds, wanted[name].size))
    for row in draws:
        row[:] = made.gradients(x, y)[name].ravel()
        made.step_count += 1  # other random numbers
    mean, deviation = draws.mean(0), draws.std(0)
    assert deviation.max() > 0.05 * np.abs(wanted[name]).max()
    assert (np.abs(mean - wanted[name].ravel()) < 5.5 * deviation / rounds**0.5 + 1e-6).all()


@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
def test_skipped_vectors_are_counted_when_pruning_has_begun(norm):
    (x, y), graph = batch(4), network(norm)
    made = learner(graph, error_pruning=GradientPruning(rate=0.9, group="lanes"))
    steps = [made.partial_fit(x, y) for _ in range(8)]
    # A Relu leaves vectors of zeros from the start: the lists skip them, and nobody gets the credit.
    assert [s.saved_error_maps for s in steps[:5]] == [0] * 5
    assert all(s.saved_error_maps > 0 for s in steps[5:])
    assert all(s.macs_dense - s.macs_done == s.saved_error_maps for s in steps)


def tallies(made: Learner) -> list[list[tuple[int, int]]]:
    """What the latest step counted: of gradients that are pruned, and of lists of error maps, as these are computed."""
    nodes = made.plans.training.graph.nodes
    return [[made.topology.tally(n.get("record")) for n in nodes if n.op_type == kind]
            for kind in ("PrunedGradient", "ErrorLists")]  # fmt: skip


def test_vectors_that_are_zero_only_by_pruning_are_counted_one_by_one():
    (x, y), made = batch(16), learner(residual_network(), error_pruning="gradients:rate=0.6,group=lanes")
    for _ in range(7):
        made.partial_fit(x, y)
    nodes = made.plans.training.graph.nodes
    records = {n.y: n.get("record") for n in nodes if n.op_type == "PrunedGradient"}
    # Behind normalisations the error maps themselves are pruned.
    themselves = [n for n in nodes if n.op_type == "ErrorLists" and n.x in records]
    for node in themselves:
        (kept, before), (done, total) = (made.topology.tally(r) for r in (records[node.x], node.get("record")))
        assert 0 < kept < before
        assert total - done == before - kept
    assert len(themselves) == 5


@pytest.mark.parametrize("behind", ["conv", "pool", "flatten"])
def test_vectors_that_a_relu_makes_zero_are_no_saving(behind):
    """Of the channels of the first convolution a half is dead and a half linear."""
    (x, y), net = batch(24, (4, 8, 8)), Net((4, 8, 8))
    h = net.Relu(net.conv("input", 16, 4, 3, 3, pads=SAME))
    if behind == "pool":
        h = net.AveragePool(h, kernel_shape=[2, 2], strides=[2, 2])
    elif behind == "conv":
        h = net.Relu(net.conv(h, 8, 16, 3, 3, pads=SAME))
    weight = net.parameter(5, int(np.prod(net.shape(h))), spread=0.1)
    net.graph.set_outputs([net.Gemm(net.Flatten(h), weight, transB=1)])
    bias = next(node.input(2).name for node in net.graph.nodes if node.op_type == "Conv")
    net.graph.arrays[bias][:] = np.where(np.arange(16) % 2, 100, -100)
    made = learner(net.graph, error_pruning="gradients:rate=0.75,group=lanes", optimizer=et.SGD(lr=0.0, momentum=0.0))
    for _ in range(7):
        made.partial_fit(x, y)
    pruned_maps, lists = tallies(made)
    (kept, before), (done, total) = pruned_maps[-1], lists[-1]  # the first layer's come last
    assert kept / before < 0.4
    assert 1 - done / total == pytest.approx((1 - kept / before) / 2, abs=0.04)  # some channels keep more than others


def test_the_gradient_of_the_loss_itself_has_no_lists():
    net = Net((4, 8, 8))
    h = net.Relu(net.conv("input", 8, 4, 3, 3, pads=SAME))
    net.graph.set_outputs([net.Flatten(net.conv(h, 5, 8, 8, 8))])
    (x, y), made = batch(8, (4, 8, 8)), learner(net.graph, error_pruning="gradients:rate=0.75,group=lanes")
    steps = [made.partial_fit(x, y) for _ in range(7)]
    assert [steps[4].saved_error_maps, steps[6].saved_error_maps > 0] == [0, True]
    assert [len(counted) for counted in tallies(made)] == [1, 1]
    assert len(made._parameters.buffers["records"]) == 3 * RECORD  # as in checkpoints of before


@pytest.mark.parametrize("policy", [None, ErrorMapPruning(keep=0.5)], ids=str)
def test_convolutions_that_share_weights_stay_dense(policy):
    net = Net((4, 12, 12))
    weight, x = net.parameter(4, 4, 3, 3, spread=0.2), net.conv("input", 4, 4, 3, 3, pads=SAME)
    for stride in (1, 2):  # as many weights for maps of another size
        x = net.MaxPool(net.Relu(net.Conv(x, weight, pads=SAME, strides=[stride, stride])), kernel_shape=[2, 2])
    net.graph.set_outputs([net.Flatten(x)])
    x, y = np.random.default_rng(0).normal(size=(5, 4, 12, 12)).astype(np.float32), np.arange(5)
    made = learner(net.graph, error_pruning=policy)
    found, wanted = made.gradients(x, y), reference.gradients(net.graph, x, y)[1]
    assert_close(found[weight], wanted[weight], TOLERANCE)
    (own,) = found.keys() - {weight} - {name for name in found if found[name].ndim < 4}
    assert np.allclose(found[own], wanted[own], atol=1e-6) == (policy is None)


def unprunable() -> Graph:
    """A depthwise convolution and one of few channels, fully connected layers, and a frozen convolution before all."""
    net = Net((4, 8, 8))
    x = net.conv("input", 4, 4, 3, 3, pads=SAME, bias=False)
    net.graph.trainable.clear()
    x = net.Relu(net.conv(x, 4, 1, 3, 3, pads=SAME, group=4, bias=False))
    net.graph.set_outputs([net.Gemm(net.Flatten(x), net.parameter(5, 256, spread=0.1), transB=1)])
    return net.graph


@pytest.mark.parametrize("policy", ["channels:keep=0.5", "channels:keep=0.5,distribution=erk", "gradients:rate=0.9",
                                    "gradients:rate=0.9,group=lanes"])  # fmt: skip
def test_a_policy_without_a_layer_is_refused_with_a_reason_for_each(policy):
    graph = unprunable()
    frozen, grouped, full = graph.arrays
    with pytest.raises(UsageError) as refused:
        learner(graph, error_pruning=policy)
    reasons = (f"({frozen}: neither it nor a layer before it is trained; {grouped}: a convolution with groups; "
               f"{full}: fully connected)")  # fmt: skip
    for part in (f"no error map of '{graph.name}' can be pruned", reasons, "or leave error pruning out"):
        assert part in str(refused.value)
    graph.trainable.add(frozen)
    x, y = batch(6, (4, 8, 8))
    pruned = learner(graph, error_pruning=policy)
    steps = [pruned.partial_fit(x, y) for _ in range(8)]
    assert steps[-1].saved_error_maps > 0 or "element" in str(pruned.error_pruning)


@pytest.mark.parametrize(("policy", "reason"), [
    ("channels:keep=0.9", "keep=0.9 keeps all of its 4 channels"),
    ("gradients", "its error map is the gradient of the loss itself"),
])  # fmt: skip
def test_a_policy_that_leaves_every_layer_whole_is_refused(policy, reason):
    net = Net((4, 8, 8))
    net.graph.set_outputs([net.Flatten(net.conv("input", 4, 4, 8, 8, bias=False))])
    with pytest.raises(UsageError, match=reason):
        learner(net.graph, error_pruning=policy)


def test_a_policy_that_asks_for_nothing_or_leaves_all_to_sparse_weights_is_taken():
    learner(unprunable(), error_pruning=ErrorMapPruning(keep=1))
    lanes = GradientPruning(rate=0.5, group="lanes")
    learner(network(), error_pruning=lanes, sparsity=et.RigL(weights=0.9, distribution="uniform", dense_first=False))


POLICIES = [
    ErrorMapPruning(keep=0.5),
    ErrorMapPruning(keep=0.5, importance="random"),
    GradientPruning(rate=0.8),
    GradientPruning(rate=0.7, group="lanes"),
]


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_results_do_not_depend_on_threads(policy):
    (x, y), graph = batch(9), network(norm=True)
    one, two = (learner(graph, threads=threads, error_pruning=policy) for threads in (1, 2))
    for made in (one, two):
        for _ in range(8):
            made.partial_fit(x, y)
    assert_same(one.parameters(), two.parameters())


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_a_checkpoint_continues_exactly(policy, tmp_path):
    (x, y), made = batch(4), learner(network(), error_pruning=policy)
    for _ in range(7):
        made.partial_fit(x, y)
    made.save(tmp_path / "a.safetensors")
    again = Learner.load(tmp_path / "a.safetensors")
    assert again.error_pruning == policy
    for _ in range(3):
        made.partial_fit(x, y)
        again.partial_fit(x, y)
    assert_same(again.parameters(), made.parameters())


@pytest.mark.parametrize("bad", [{"keep": 0}, {"keep": 1.5}, {"keep": "x"}, {"importance": "size"}])
def test_bad_settings_of_error_map_pruning(bad):
    with pytest.raises(UsageError, match=r"ErrorMapPruning: \w+=.*expected"):
        ErrorMapPruning(**bad)


@pytest.mark.parametrize("bad", [{"rate": 0}, {"rate": 1}, {"group": "block"}])
def test_bad_settings_of_gradient_pruning(bad):
    with pytest.raises(UsageError, match=r"GradientPruning: \w+=.*expected"):
        GradientPruning(**bad)


# ---- saved activations -----------------------------------------------------------------------------------------------


class Compressed(ErrorPruning):
    """Weight gradients of all convolutions from their largest activations."""

    def __init__(self, density: float, **settings: Any) -> None:
        self.density, self.settings = density, settings

    def __str__(self) -> str:
        return f"{type(self).__name__}({self.density})"

    def rewrite(self, train: TrainingGraph) -> None:
        names = conv_weights(train.graph)
        self.records = compress_activations(train, dict.fromkeys(names, self.density), **self.settings)


def keep_vectors(density: float) -> Any:
    def mask(x: Array) -> Array:
        norms = (x**2).sum(0)
        limit = np.sort(norms, axis=None)[-max(1, int(np.ceil(density * norms.size)))]
        return np.where((norms >= limit) & (norms > 0), x, 0)

    return mask


@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
@pytest.mark.parametrize("density", [1.0, 0.4, 0.1])
@pytest.mark.parametrize("count", [3, 4])
def test_weight_gradient_from_pruned_activations(norm, density, count):
    (x, y), graph = batch(count), network(norm)
    made = learner(graph, error_pruning=Compressed(density))
    assert_all_close(made.gradients(x, y), masked_gradients(graph, x, y, mask_input=keep_vectors(density)), TOLERANCE)


@pytest.mark.parametrize("group", ["lanes", "element"])
def test_thresholds_hold_until_there_is_no_room(group):
    (x, y), graph, policy = batch(8), network(), Compressed(0.2, refresh=1000, group=group)
    made = learner(graph, error_pruning=policy, optimizer=et.SGD(lr=0.0))
    tally, records = (made.plans.training, made._parameters.buffers)[1], made._parameters.buffers["records"]
    shares, limits = [], []
    for scale in (1.0, 1.0, 0.7, 3.0):
        made.partial_fit(scale * x, y)
        counts = tally["tally"].reshape(-1, 2)
        shares.append(counts[:, 0] / counts[:, 1])
        limits.append(records.reshape(-1, RECORD)[:, 1].copy())
    assert np.allclose(shares[0], 0.2, atol=0.01)
    assert (limits[0] == limits[1]).all() and (limits[1] == limits[2]).all()  # too few: the old threshold holds
    assert (shares[2] < shares[0]).all()
    assert (limits[3] > limits[2]).all() and (shares[3] <= 0.25).all()  # too many: found anew


@pytest.mark.parametrize("group", ["lanes", "element"])
def test_thresholds_are_found_anew_after_so_many_steps(group):
    (x, y), graph, policy = batch(8), network(), Compressed(0.2, refresh=3, group=group)
    made, shares = learner(graph, error_pruning=policy, optimizer=et.SGD(lr=0.0)), []
    for scale in (1.0, 0.7, 0.7, 0.7, 0.5):
        made.partial_fit(scale * x, y)
        counts = made._parameters.buffers["tally"].reshape(-1, 2)
        shares.append(counts[:, 0] / counts[:, 1])
    assert (shares[1] < shares[0]).all()
    assert (shares[2] == shares[1]).all()
    assert np.allclose(shares[3], shares[0], atol=0.01)  # the fourth step is the third after the first
    assert (shares[4] < shares[3]).all()


def test_gradients_leave_the_records_alone():
    (x, y), graph = batch(4), network()
    made = learner(graph, error_pruning=Compressed(0.3))
    made.gradients(x, y)
    assert not made._parameters.buffers["records"].reshape(-1, RECORD)[:, 1:].any()


@pytest.mark.parametrize(("group", "kernel"), [("lanes", "correlate_lists"), ("element", "correlate_elements")])
def test_lists_replace_activations_that_nothing_else_reads(group, kernel):
    net = Net((4, 16, 16))
    h = net.AveragePool(net.conv("input", 16, 4, 3, 3, pads=SAME), kernel_shape=[2, 2], strides=[2, 2])
    h = net.Flatten(net.GlobalAveragePool(net.conv(h, 8, 16, 3, 3, pads=SAME)))
    net.graph.set_outputs([net.Gemm(h, net.parameter(5, 8), transB=1)])
    (x, y), graph = batch(4, (4, 16, 16)), net.graph
    dense, listed = learner(graph), learner(graph, error_pruning=Compressed(0.1, group=group))
    assert_close(listed.logits(x), dense.logits(x), TOLERANCE)
    assert kernel in {row.kernel[0] for row in listed.training_plan().rows}
    kept = [sum(_kept_until_backward(made).values()) for made in (dense, listed)]
    assert kept[1] < 0.35 * kept[0]  # 0.1 of the vectors, a quarter more room, 16 bytes of offsets for 16 of numbers
    assert listed.partial_fit(x, y).saved_activations > 0


def _kept_until_backward(made: Learner) -> dict[str, int]:
    """Bytes of everything in the arena that the end of the forward pass must hold."""
    plan, forward = made.training_plan(), made.plans.training.forward_count
    return {n: plan.sizes[n] for n, (first, last) in plan.lifetimes.items() if first < forward <= last}


class Masked(Compressed):
    """Weight gradients from the largest numbers."""

    def rewrite(self, train: TrainingGraph) -> None:
        mask_activations(train, dict.fromkeys(conv_weights(train.graph), self.density))


class Refreshed(Masked):
    """The same with new thresholds in every other step, and error maps pruned or not."""

    def rewrite(self, train: TrainingGraph) -> None:
        mask_activations(train, dict.fromkeys(conv_weights(train.graph), self.density), 2, self.settings["merge"])

    def skip(self, train: TrainingGraph) -> None:
        if self.settings["keep"]:
            ErrorMapPruning(self.settings["keep"]).skip(train)


def keep_elements(density: float) -> Any:
    def mask(x: Array) -> Array:
        sizes = np.abs(x)
        return np.where(sizes >= np.sort(sizes, axis=None)[-int(np.ceil(density * sizes.size))], x, 0)

    return mask


@pytest.mark.parametrize("count", [3, 8])
@pytest.mark.parametrize("policy", [Masked(1.0), Masked(0.3), Compressed(0.3, group="element")], ids=str)
@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
def test_weight_gradient_from_the_largest_numbers(norm, policy, count):
    (x, y), graph = batch(count), network(norm)
    made = learner(graph, error_pruning=policy)
    wanted = masked_gradients(graph, x, y, mask_input=keep_elements(policy.density))
    assert_all_close(made.gradients(x, y), wanted, TOLERANCE)


@pytest.mark.parametrize("count", [3, 8, 21])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("keep", [None, 0.5], ids=["whole errors", "half of the channels"])
def test_normalisations_computed_again_write_their_largest_numbers_alone(keep, threads, count, monkeypatch):
    """As copies do that are made behind them, in steps that choose thresholds (here every other) and in all others."""
    set_lanes(monkeypatch, 8)
    net, made, (x, y) = Net((3, 8, 8)), list[tuple[Any, ...]](), batch(count)
    h = net.Relu(net.norm(net.conv("input", 8, 3, 3, 3, pads=SAME)))
    h = net.Clip(net.norm(net.conv(h, 8, 8, 3, 3, pads=SAME)), min=-1.0, max=1.5)
    h = net.Relu(net.norm(net.conv(h, 12, 8, 3, 3, pads=[0, 1, 2, 0], strides=[2, 1])))
    net.graph.set_outputs([net.Gemm(net.Flatten(h), net.parameter(5, math.prod(net.shape(h)), spread=0.1), transB=1)])
    for merge in (True, False):
        policy = Refreshed(0.3, merge=merge, keep=keep)
        one = Learner(net.graph, PROFILE, batch_size=max(8, count), threads=threads, error_pruning=policy)
        assert one.plans.lanes == 8  # so 21 samples are three blocks
        losses = [one.partial_fit(x + np.float32(0.01 * n), y).loss for n in range(5)]
        weights = [one.graph.arrays[name].tobytes() for name in sorted(one.graph.trainable)]
        made.append((losses, one._parameters.buffers["tally"].tolist(), weights, one))
    merged, apart = ({row.kernel[0] for row in m[-1].training_plan().rows} for m in made)
    assert "drop_elements" in merged
    assert "drop_elements" not in apart
    operators = {node.op_type for node in made[0][-1].plans.training.graph.nodes}
    assert ("PrunedBatchNormalizationGradAgain" in operators) == (keep is not None)
    assert made[0][:-1] == made[1][:-1]


def test_lists_of_weights_read_the_largest_numbers_alone_too():
    """Kernels for both gradients make a normalised input themselves, and would make all of it."""
    x, y = np.random.default_rng(0).normal(size=(16, 3, 16, 16)).astype(np.float32), np.arange(16) % 10
    losses = []
    for merge in (True, False):
        policy = Refreshed(0.3, merge=merge, keep=None)
        made = Learner(et.models.resnet((3, 16, 16), depth=8), PROFILE, batch_size=16, threads=1, error_pruning=policy,
                       sparsity=et.RigL(weights=0.9, refresh=1000))  # fmt: skip
        losses.append([made.partial_fit(x, y).loss for _ in range(4)])
        assert "ProductGrads" in {node.op_type for node in made.plans._combined.graph.nodes}
    assert losses[0] == losses[1]


@pytest.mark.parametrize(("kept", "samples", "listed"), [
    (0.2, 16, True), (0.3, 16, False), (0.3, 8, False), (0.3, 4, True),
])  # fmt: skip
def test_few_samples_list_more_of_their_numbers(kept, samples, listed, monkeypatch):
    """A state goes to other batch sizes: records are the same."""
    set_lanes(monkeypatch, 16)
    graph, policy = et.models.resnet((3, 16, 16), depth=8), et.SWAT(weights=0.0, activations=1 - kept)
    made = Learner(graph, PROFILE, batch_size=samples, sparsity=policy)
    kernels = {row.kernel[0] for row in made.training_plan().rows}
    assert made.plans.lanes == samples
    assert ("correlate_elements" in kernels) == listed
    assert ("drop_elements" in kernels) != listed  # zeros in the copies that normalisations write
    assert list(made.topology.records) == [layer.weight for layer in made.topology.candidates[-2::-1]]


GEOMETRIES = {
    "3x3": (5, 9, (3, 3), {"pads": SAME}),
    "stride above kernel": (3, 4, (2, 2), {"strides": [3, 4]}),
    "asymmetric padding": (2, 18, (3, 2), {"pads": [0, 2, 1, 0], "strides": [2, 1]}),
    "dilation": (3, 17, (3, 3), {"dilations": [2, 3], "pads": [1, 3, 2, 0]}),
    "many terms and channels": (2, 70, (5, 6), {"pads": [2, 2, 2, 3]}),
    "1x1, stride 2": (7, 3, (1, 1), {"strides": [2, 2]}),
    "positions in the padding alone": (2, 3, (4, 1), {"pads": [3, 0, 3, 0], "strides": [4, 1]}),
}


@pytest.mark.parametrize("lanes", [4, 8, 16])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_lists_of_numbers_of_any_geometry(geometry, lanes, monkeypatch):
    channels, outputs, kernel, attributes = GEOMETRIES[geometry]
    monkeypatch.setattr(lowering_elements, "_STRIP_BYTES", 20_000)  # several strips
    net = Net((channels, 9, 12))
    net.graph.set_outputs([net.Flatten(net.conv("input", outputs, channels, *kernel, **attributes))])
    rng, count = np.random.default_rng(0), lanes + 3
    x = rng.normal(size=(count, channels, 9, 12)).astype(np.float32)
    y = rng.integers(0, net.graph.output_shape[0], count)
    made = learner(net.graph, lanes, error_pruning=Compressed(0.2, group="element"))
    assert "correlate_elements" in {row.kernel[0] for row in made.training_plan().rows}
    wanted = masked_gradients(net.graph, x, y, mask_input=keep_elements(0.2))
    assert_all_close(made.gradients(x, y), wanted, TOLERANCE)
    kept, numbers = made._parameters.buffers["tally"][:2]
    assert (kept, numbers) == (np.ceil(0.2 * x.size), x.size)


def first_of_equals(count: int, order: tuple[int, ...]) -> Any:
    def mask(x: Array) -> Array:
        """Keep what is larger than 1, and the first ones in this order of the axes."""
        turned = x.transpose(order)
        ones = np.cumsum(turned == 1, axis=None).reshape(turned.shape)
        kept = np.where((turned > 1) | (ones <= count - (x > 1).sum()), turned, 0)
        return kept.transpose(np.argsort(order))

    return mask


@pytest.mark.parametrize("rows", [1, 0])
@pytest.mark.parametrize(("policy", "made", "order"), [
    (Compressed(0.2, group="element"), learner, (1, 2, 3, 0)),
    (Compressed(0.2, group="element", lanes=0), learner, (1, 2, 3, 0)),
    (Compressed(0.2, group="element", lanes=0), channel_learner, (0, 2, 3, 1)),
])  # fmt: skip
def test_of_equal_numbers_that_do_not_fit_the_first_are_kept(policy, made, order, rows):
    """Without larger ones nothing would be learned. Which are the first depends on what lies in the lanes."""
    net = Net((2, 6, 6))
    net.graph.set_outputs([net.Flatten(net.conv("input", 3, 2, 3, 3))])
    x, y = np.ones((4, 2, 6, 6), np.float32), np.arange(4)
    x[:, 0, :rows] = 2.0
    wanted = masked_gradients(net.graph, x, y, mask_input=first_of_equals(math.ceil(0.2 * x.size), order))
    given = made(net.graph, error_pruning=policy)
    for _ in range(2):  # the second time, a threshold is remembered
        assert_all_close(given.gradients(x, y), wanted, TOLERANCE)
        assert given._parameters.buffers["tally"][:2].tolist() == [math.ceil(0.2 * x.size), x.size]


@pytest.mark.parametrize("rows", [1, 0])
def test_of_equal_vectors_that_do_not_fit_the_first_are_kept(rows):
    net = Net((2, 6, 6))
    net.graph.set_outputs([net.Flatten(net.conv("input", 3, 2, 3, 3))])
    x, y = np.ones((4, 2, 6, 6), np.float32), np.arange(4)
    x[:, 0, :rows] = 2.0
    mask = first_of_equals(math.ceil(0.2 * x[0].size) * 4, (1, 2, 3, 0))
    made = learner(net.graph, error_pruning=Compressed(0.2))
    assert_all_close(made.gradients(x, y), masked_gradients(net.graph, x, y, mask_input=mask), TOLERANCE)
    assert made._parameters.buffers["tally"][:2].tolist() == [math.ceil(0.2 * x[0].size), x[0].size]


def test_lists_are_made_of_normalised_maps_instead_of_computing_them_again():
    net = Net((3, 8, 8))
    h = net.Relu(net.norm(net.conv("input", 16, 3, 3, 3, pads=SAME)))
    h = net.GlobalAveragePool(net.conv(h, 8, 16, 3, 3, pads=SAME))
    net.graph.set_outputs([net.Flatten(h)])
    dense, listed = (learner(net.graph, error_pruning=p) for p in (None, Compressed(0.2, group="element")))
    for made, count in ((dense, 1), (listed, 0)):
        values = [value.name for node in made.training_plan().graph.nodes for value in node.outputs]
        assert sum(name.startswith("edgetrain.again.") for name in values) == count


def test_fewer_numbers_than_wanted_are_all_kept_and_no_zero():
    net = Net((2, 16, 16))
    h = net.Relu(net.conv("input", 8, 2, 3, 3, pads=SAME))
    net.graph.set_outputs([net.Flatten(net.conv(h, 2, 8, 3, 3, pads=SAME))])
    x, y = np.zeros((20, 2, 16, 16), np.float32), np.zeros(20, int)
    x[:, :, 5:8, 5:8] = np.random.default_rng(0).normal(size=(20, 2, 3, 3))
    for group in ("element", "lanes"):
        policy = Compressed(0.3, group=group)
        made = learner(net.graph, 16, error_pruning=policy)
        dense = {name: grad for name, grad in learner(net.graph, 16).gradients(x, y).items() if name.startswith("p0")}
        assert_all_close({name: made.gradients(x, y)[name] for name in dense}, dense, TOLERANCE)
        kept = made._parameters.buffers["tally"][2 * policy.records["p0"]]
        assert kept == ((x != 0).sum() if group == "element" else 2 * 2 * 9)
    assert not made.gradients(np.zeros_like(x), y)["p0"].any()  # nothing at all is kept


def test_numbers_that_are_not_finite_end_with_a_message():
    net = Net((2, 16, 16))
    h = net.Relu(net.conv("input", 8, 2, 3, 3, pads=SAME))
    net.graph.set_outputs([net.Flatten(net.conv(h, 2, 8, 3, 3, pads=SAME))])
    net.graph.arrays["p0"] = np.full((8, 2, 3, 3), 1e38, np.float32)
    x, y = np.full((20, 2, 16, 16), 100.0, np.float32), np.zeros(20, int)
    with pytest.raises(NumericalError):
        learner(net.graph, 16, error_pruning=Compressed(0.2, group="element")).partial_fit(x, y)


@pytest.mark.parametrize("outputs", [48, 400])
def test_a_tile_of_channels_stays_inside_the_turned_maps(outputs):
    net = Net((3, 6, 6))
    net.graph.set_outputs([net.Flatten(net.conv("input", outputs, 3, 1, 1))])
    plan = learner(net.graph, 16, error_pruning=Compressed(0.2, group="element")).training_plan()
    correlation = next(row for row in plan.rows if row.kernel[0] == "correlate_elements")
    turned = next(row for row in plan.rows if row.kernel[0] == "turn_maps")
    arguments = dict(zip(argument_names("turn_maps"), turned.arguments, strict=True))
    lanes, vectors, _ = correlation.kernel[1]
    parts = dict(zip(argument_names("correlate_elements"), correlation.arguments, strict=True))["channel_parts"]
    last = plan.capacity * arguments["y_sample"] - arguments["y_pixel"] + 4 * lanes * vectors * parts
    assert plan.sizes[arguments["y"].buffer] >= last


@pytest.mark.parametrize(("density", "shape"), [(0.5, (3, 8, 8)), (0.1, (3, 3, 5))])
def test_lists_of_numbers_are_made_where_they_pay(density, shape):
    net = Net(shape)
    net.graph.set_outputs([net.Flatten(net.conv("input", 8, 3, 3, 3))])
    made = learner(net.graph, error_pruning=Compressed(density, group="element"))
    assert "correlate_elements" not in {row.kernel[0] for row in made.training_plan().rows}


def test_every_kernel_of_pruning_is_used():
    modules = [f"edgetrain.kernels.{name}" for name in PRUNING_KERNELS]
    ours = {name for name, (made, _) in load_factories().items() if made.__module__ in modules}
    policies = [*POLICIES, Compressed(0.5), Masked(0.5), Compressed(0.2, group="element")]
    made = [learner(network(), error_pruning=policy) for policy in policies]
    pooled = pooled_network({"kernel_shape": [2, 2], "strides": [2, 2]}, {})
    made.append(learner(pooled, error_pruning=GradientPruning(group="lanes")))
    made.append(learner(et.models.lenet5(), 16, sparsity=et.SWAT(0.9, activations=0.9)))
    made.append(learner(et.models.resnet(depth=8), 16, sparsity=et.SWAT(0.5, activations=0.5)))
    plans = [each.plans.plan(True, 9) for each in made]  # more than one block
    assert ours <= {row.kernel[0] for plan in plans for row in plan.rows}


# ---- vectors of a batch that is not full, norms without end, weights from elsewhere ----------------------------------


def test_samples_of_a_vector_that_is_not_full_keep_their_share(monkeypatch):
    set_lanes(monkeypatch, 8)
    net = Net((2, 16, 16))
    net.graph.set_outputs([net.Flatten(net.conv("input", 3, 2, 3, 3))])
    x = np.random.default_rng(0).normal(size=(9, 2, 16, 16)).astype(np.float32)
    target = np.random.default_rng(1).normal(size=(9, *net.graph.output_shape)).astype(np.float32)
    made = Learner(net.graph, PROFILE, batch_size=9, loss="mse", error_pruning=Compressed(0.3))
    assert made.plans.lanes == 8
    made.partial_fit(x, target)
    kept, total = made._parameters.buffers["tally"][:2]
    assert 0.29 < kept / total < 0.31
    (name,) = conv_weights(net.graph)
    dark = x.copy()
    dark[8] = 0
    both = made, Learner(net.graph, PROFILE, batch_size=9, loss="mse")
    pruned, dense = (np.abs(m.gradients(x, target)[name] - m.gradients(dark, target)[name]).sum() for m in both)
    assert pruned > 0.3 * dense


@pytest.mark.parametrize("group", ["lanes", "element"])
def test_norms_without_end_do_not_write_beyond_the_lists(group):
    net = Net((3, 8, 8))
    net.graph.set_outputs([net.Flatten(net.Sigmoid(net.conv("input", 4, 3, 3, 3)))])
    made = learner(net.graph, 8, loss="mse", error_pruning=Compressed(0.1, group=group))
    x = np.full((8, 3, 8, 8), 1e20, np.float32)
    try:
        made.partial_fit(x, np.zeros((8, *net.graph.output_shape), np.float32))
    except et.errors.NumericalError:
        return
    kept, total = made._parameters.buffers["tally"][:2]
    assert kept <= math.ceil(0.125 * total)


@pytest.mark.parametrize("group", ["lanes", "element"])
def test_thresholds_are_of_the_weights_that_are_there(group):
    policy = et.SWAT(weights=0.0, activations=0.8, group=group)
    made = Learner(et.models.lenet5(), PROFILE, batch_size=16, threads=1, sparsity=policy)
    x, y = np.random.default_rng(0).random((16, 1, 28, 28), np.float32), np.arange(16) % 10
    made.partial_fit(x, y)
    weights = made.parameters()
    made.load_parameters(weights | {"conv1.weight": 0.02 * weights["conv1.weight"]})
    made.partial_fit(x, y)
    kept, total = made.topology.tally(0)
    assert kept / total > 0.15
