"""Gradients from lists of what comes to a max pool: the same as without, for convolutions and pools of every kind."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import edgetrain as et
from edgetrain import plans, pooled_errors, reference
from edgetrain.choice import planning_for, simd_lanes
from edgetrain.devices import load_profile
from edgetrain.graph import Graph
from edgetrain.ops.conv import Conv
from edgetrain.ops.pooling import MaxPool
from edgetrain.policies import parse_policy
from edgetrain.pooled_errors import pays
from tests.engine import assert_all_close, learner, poison, wide_host
from tests.op_cases import Net

Array = NDArray[Any]
TOLERANCE = 1e-5
POOLED = {"PooledErrors", "PooledInputGrad", "PooledWeightGrad"}
HALVES = {"kernel_shape": [2, 2], "strides": [2, 2]}
# Input shape; weights and attributes of the convolution; attributes of the pool.
LAYERS: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict[str, Any], dict[str, Any]]] = {
    "lenet5": ((6, 14, 14), (16, 6, 5, 5), {}, HALVES),
    "padded": ((3, 8, 8), (5, 3, 3, 3), {"pads": [1, 1, 1, 1]}, HALVES),
    "asymmetric": ((4, 9, 7), (5, 4, 3, 3), {"pads": [2, 0, 1, 1]}, HALVES),
    "odd maps": ((2, 9, 9), (3, 2, 3, 3), {"pads": [1, 1, 1, 1]}, HALVES),
    "strided": ((3, 13, 13), (7, 3, 3, 3), {"strides": [2, 2], "pads": [1, 1, 1, 1]}, HALVES),
    "stride above kernel": ((3, 12, 12), (4, 3, 2, 2), {"strides": [3, 3]}, HALVES),
    "dilated": ((3, 12, 12), (4, 3, 3, 3), {"dilations": [2, 1], "pads": [2, 1, 2, 1]}, HALVES),
    "one by one": ((9, 6, 6), (4, 9, 1, 1), {}, HALVES),
    "many channels": ((37, 6, 6), (18, 37, 3, 3), {"pads": [1, 1, 1, 1]}, HALVES),
    "large kernel": ((2, 16, 16), (3, 2, 7, 7), {"pads": [3, 3, 3, 3]}, HALVES),
    "one dimension": ((3, 40), (5, 3, 31), {"pads": [15, 15]}, {"kernel_shape": [2], "strides": [2]}),
    "overlapping windows": ((3, 9, 9), (4, 3, 3, 3), {}, {"kernel_shape": [3, 3], "strides": [2, 2]}),
    "gaps between windows": ((3, 9, 9), (4, 3, 3, 3), {}, {"kernel_shape": [2, 2], "strides": [3, 3]}),
    "one window": ((3, 4, 4), (4, 3, 3, 3), {"pads": [1, 1, 1, 1]}, {"kernel_shape": [4, 4]}),
}  # fmt: skip


pytestmark = pytest.mark.usefixtures(wide_host.__name__)


@pytest.fixture(autouse=True)
def _always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take lists wherever they are possible."""
    monkeypatch.setattr(pooled_errors, "pays", lambda *arguments: True)



def network(layer: str, activation: str | None = "Relu") -> Graph:
    """A convolution whose input gradient is wanted, and one of the layers before a pool."""
    shape, weight, conv, pool = LAYERS[layer]
    net = Net(shape)
    kernel = (1,) * (len(shape) - 1)
    x = net.conv(net.graph.inputs[0], shape[0], shape[0], *kernel)
    x = net.MaxPool(net.conv(x, *weight, **conv), **pool)
    if activation:
        x = getattr(net, activation)(x)
    x = net.Flatten(x)
    net.graph.set_outputs([net.Gemm(x, net.parameter(4, *net.shape(x), spread=0.02), transB=1)])
    return net.graph


def batch(graph: Graph, count: int) -> tuple[Array, Array]:
    rng = np.random.default_rng(count)
    x = rng.normal(size=(count, *graph.input_shape)).astype(np.float32)
    return x, rng.integers(0, graph.output_shape[0], count)


def operators(made: et.Learner) -> set[str]:
    return {node.op_type for node in made.plans.training.graph.nodes}


@pytest.mark.parametrize(("lanes", "count"), [(4, 1), (4, 7), (8, 8), (16, 5), (16, 33)])
@pytest.mark.parametrize("layer", LAYERS)
def test_gradients_are_those_of_the_readable_twin(layer, lanes, count):
    graph = network(layer)
    x, y = batch(graph, count)
    made = learner(graph, lanes)
    assert_all_close(made.gradients(x, y), reference.gradients(graph, x, y)[1], TOLERANCE)
    assert operators(made) >= POOLED
    assert "MaxPoolGrad" not in operators(made)


@pytest.mark.parametrize("activation", [None, "LeakyRelu", "Tanh"])
def test_no_window_needs_to_be_without_a_gradient(activation):
    graph = network("padded", activation)
    x, y = batch(graph, 9)
    assert_all_close(learner(graph, 8).gradients(x, y), reference.gradients(graph, x, y)[1], TOLERANCE)


def test_a_batch_without_any_gradient():
    """A Relu that stops everything leaves empty lists."""
    graph = network("padded")
    bias = next(name for name, array in graph.arrays.items() if array.shape == (5,))
    graph.arrays[bias] = np.full(5, -100, np.float32)
    got = learner(graph).gradients(*batch(graph, 6))
    assert all(not got[name].any() for name in list(graph.arrays)[:4])


def test_a_frozen_layer_before_leaves_the_weight_gradient_alone():
    graph = network("padded")
    graph.trainable -= set(list(graph.arrays)[:2])
    x, y = batch(graph, 7)
    made = learner(graph)
    assert_all_close(made.gradients(x, y), reference.gradients(graph, x, y)[1], TOLERANCE)
    assert "PooledWeightGrad" in operators(made)
    assert "PooledInputGrad" not in operators(made)


def test_results_do_not_depend_on_threads():
    graph = network("many channels")
    one, two = (learner(graph, 8, threads) for threads in (1, 2))
    for made in (one, two):
        for seed in range(3):
            made.partial_fit(*batch(graph, 24 - seed))
    for name, array in one.parameters().items():
        assert array.tobytes() == two.parameters()[name].tobytes(), name


def test_a_gradient_that_is_not_finite_is_noticed():
    """What comes to the pool overflows here while the loss is finite; what is no number is not taken for a zero."""
    graph = network("padded", None)
    last = list(graph.arrays)[-1]
    graph.arrays[last] = np.full(graph.arrays[last].shape, 3e38, np.float32)
    graph.arrays[last][::2] *= -1
    x, y = batch(graph, 4)
    got = learner(graph).gradients(np.zeros_like(x), y)
    assert not np.isfinite(got[next(iter(graph.arrays))]).all()


@pytest.mark.parametrize("policy", ["channels:keep=0.5", "gradients:rate=0.9", "gradients:rate=0.7,group=lanes"])
def test_together_with_pruned_error_maps(policy):
    graph = network("padded")
    made = learner(graph, 16, error_pruning=parse_policy("error_pruning", policy))
    steps = [made.partial_fit(*batch(graph, 16)) for _ in range(7)]
    assert all(np.isfinite(step.loss) for step in steps)
    assert "PooledErrors" in operators(made)
    if policy == "gradients:rate=0.9":  # which prunes from the sixth step on; exact zeros are not called saved
        assert [step.saved_error_maps for step in steps[:5]] == [0] * 5
        assert steps[6].saved_error_maps > 0.1 * steps[6].macs_dense


@pytest.mark.parametrize("importance", ["error", "error_and_weights"])
def test_lists_of_kept_channels_are_the_pruned_products(importance, monkeypatch):
    graph, policy = network("padded"), et.ErrorMapPruning(keep=0.5, importance=importance)
    x, y = batch(graph, 16)
    listed, direct = learner(graph, 16, error_pruning=policy), learner(graph, 16, error_pruning=policy)
    got, step = listed.gradients(x, y), listed.partial_fit(x, y)
    monkeypatch.setattr(plans, "list_pooled_errors", lambda *arguments: None)
    wanted = direct.gradients(x, y)
    assert {"KeptChannels", "PooledErrors", "PrunedBiasGrad"} <= operators(listed)
    assert "PrunedWeightGrad" in operators(direct)
    assert_all_close(got, wanted, TOLERANCE)
    weight = next(name for name, array in graph.arrays.items() if array.shape == (5, 3, 3, 3))
    assert sum(not channel.any() for channel in got[weight]) == 3
    assert step.macs_done == direct.partial_fit(x, y).macs_done < step.macs_dense


def swat_network(layer: str, norm: bool) -> Graph:
    """A layer before a pool, and before it one whose output may be computed again in the backward pass."""
    shape, weight, conv, pool = LAYERS[layer]
    net = Net(shape)
    x = net.conv(net.graph.inputs[0], shape[0], shape[0], 1, 1, bias=not norm)
    x = net.conv(net.Relu(net.norm(x) if norm else x), *weight, **conv)
    x = net.Flatten(net.Relu(net.MaxPool(x, **pool)))
    net.graph.set_outputs([net.Gemm(x, net.parameter(4, *net.shape(x), spread=0.02), transB=1)])
    return net.graph


@pytest.mark.parametrize(("lanes", "count"), [(4, 9), (16, 16)])
@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
@pytest.mark.parametrize(("layer", "variant", "zeros", "stored"), [
    ("lenet5", "unstructured", 0.5, False), ("lenet5", "unstructured", 0.9, True), ("lenet5", "momentum", 0.9, False),
    ("lenet5", "erk", 0.9, True), ("asymmetric", "unstructured", 0.9, True),
])  # fmt: skip
def test_swat_has_the_same_gradients_from_lists_of_exact_zeros(
    layer, variant, zeros, stored, norm, lanes, count, monkeypatch
):
    """Also the momentum variant, which moves weights between layers: they may come to run on lists of their weights."""
    graph, policy = swat_network(layer, norm), et.SWAT(zeros, activations=zeros, variant=variant, group="element")
    x, y = batch(graph, count)
    made, direct = learner(graph, lanes, sparsity=policy), learner(graph, lanes, sparsity=policy)
    got, step = made.gradients(x, y), made.partial_fit(x, y)
    merged = norm and variant == "unstructured"  # into the normalisation that is computed again
    masked = "BatchNormalizationGradAgain" if merged else "MaskActivation"
    assert {"ExpandActivation" if stored else masked, *POOLED} <= operators(made)
    assert (made.memory_plan().notes.get("activations") == "pruned ones as lists") == stored
    monkeypatch.setattr(plans, "list_pooled_errors", lambda *arguments: None)
    wanted = direct.gradients(x, y)
    assert not POOLED & operators(direct)
    assert_all_close(got, wanted, TOLERANCE)
    other = direct.partial_fit(x, y)
    assert (step.saved_activations < other.saved_activations) == stored, "what is written out again is no saving"
    assert step.saved_weights <= other.saved_weights
    assert step.macs_dense == other.macs_dense
    poison(made)
    assert_all_close(made.gradients(x, y), made.gradients(x, y), 0)


@pytest.mark.parametrize("variant", ["unstructured", "momentum"])
def test_records_of_activations_are_in_one_order_for_all_batch_sizes(variant, monkeypatch):
    """A state goes from one to the other, and which error maps become lists depends on the batch size."""
    policy = et.SWAT(0.9, activations=0.9, dense_first=False, variant=variant, group="element")
    made = [et.Learner(swat_network("lenet5", True), batch_size=size, sparsity=policy) for size in (1, 4, 32, 32)]
    assert [operators(each) >= POOLED for each in made[:3]][2]
    monkeypatch.setattr(plans, "list_pooled_errors", lambda *arguments: None)
    assert not POOLED & operators(made[3])
    first, *others = [each.topology.records for each in made]
    assert len(first) > 1
    assert all(each == first for each in others)


def test_swat_keeps_lists_of_vectors_and_of_weights_beside_them():
    made = learner(network("lenet5"), 16, sparsity=et.SWAT(0.9, activations=0.9, group="lanes"))
    assert "CompressedWeightGrad" in operators(made)
    assert not POOLED & operators(made)


def test_sparse_weights_keep_their_own_kernels():
    made = learner(network("lenet5"), 16, sparsity=et.StaticSparse(weights=0.9))
    made.partial_fit(*batch(made.graph, 16))
    assert not POOLED & operators(made)


@pytest.mark.parametrize("policy", [
    et.StaticSparse(weights=0.5, distribution="uniform"), et.RigL(weights=0.5, distribution="uniform", refresh=1),
])  # fmt: skip
def test_sparse_weights_that_run_on_dense_kernels_have_lists_of_exact_zeros(policy):
    made = learner(network("lenet5"), 16, sparsity=policy)
    x, y = batch(made.graph, 16)
    made.partial_fit(x, y)
    assert operators(made) >= POOLED
    got, twin = made.gradients(x, y), made.graph.copy()
    twin.arrays |= made.parameters()
    wanted = learner(twin, 16).gradients(x, y)
    for layer in made.topology.layers:
        wanted[layer.weight] = wanted[layer.weight] * made.topology.indices[layer.weight].mask()
    assert_all_close(got, wanted, TOLERANCE)


def test_operations_are_those_of_the_dense_products(monkeypatch):
    """As with Winograd's kernels: the same gradients are found in less time, and nothing is called saved."""
    graph = network("lenet5")
    with_lists = learner(graph, 16).partial_fit(*batch(graph, 16))
    monkeypatch.setattr(plans, "list_pooled_errors", lambda *arguments: None)
    without = learner(graph, 16).partial_fit(*batch(graph, 16))
    assert with_lists.macs_done == with_lists.macs_dense == without.macs_done


@pytest.mark.parametrize("profile", ["raspberrypi4", "generic-x86_64"])
def test_lists_pay_for_the_second_convolution_of_lenet5_only(profile):
    graph = et.models.lenet5()
    convs = [node for node in graph.nodes if node.op_type == "Conv"]
    pools = [node for node in graph.nodes if node.op_type == "MaxPool"]
    with planning_for(load_profile(profile)):
        decided = [
            pays(Conv().product(conv), MaxPool().pool(pool, conv.y), number > 0, simd_lanes(), 0.5)
            for number, (conv, pool) in enumerate(zip(convs, pools, strict=True))
        ]  # ``pays`` as imported above, not the fixture's
    assert decided == [False, True]


def test_a_checkpoint_of_pruned_vectors_does_not_depend_on_which_error_maps_became_lists(tmp_path, monkeypatch):
    graph, policy = network("padded"), et.GradientPruning(rate=0.7, group="lanes")
    made = learner(graph, 16, error_pruning=policy)
    for _ in range(7):
        made.partial_fit(*batch(graph, 16))
    made.save(tmp_path / "a.safetensors")
    monkeypatch.setattr(plans, "list_pooled_errors", lambda *arguments: None)
    loaded = et.Learner.load(tmp_path / "a.safetensors")
    assert np.isfinite(loaded.partial_fit(*batch(graph, 16)).loss)
    assert not POOLED & operators(loaded)


def test_sums_are_as_exact_as_those_of_dense_kernels():
    """Strip after strip in one long chain lost a digit at batch 32 and two at 1024."""
    net = Net((4, 32, 32))
    x = net.Flatten(net.Relu(net.MaxPool(net.conv("input", 8, 4, 3, 3, pads=[1] * 4), **HALVES)))
    net.graph.set_outputs([net.Gemm(x, net.parameter(4, *net.shape(x), spread=0.02), transB=1)])
    x, y = batch(net.graph, 64)
    wanted = reference.gradients(net.graph, x, y)[1]
    assert_all_close(learner(net.graph, 16).gradients(x, y), wanted, 1e-6)
