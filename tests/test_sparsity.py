"""Sparse training: what every policy must do, what each decides, and the arithmetic of the sparse network."""

from __future__ import annotations

import json
import math
import tracemalloc
from dataclasses import replace

import numpy as np
import onnx
import pytest

import edgetrain as et
from edgetrain import reference
from edgetrain.catalog import build_model
from edgetrain.checkpoint import read_checkpoint
from edgetrain.densities import erdos_renyi_kernel, uniform
from edgetrain.errors import CheckpointError, MemoryBudgetError, UsageError
from edgetrain.graph import Graph
from edgetrain.policies import describe_policy, parse_policy, policy_names
from edgetrain.sparsity import SparseLayer, sparse_layers
from edgetrain.sparsity.layers import entries, shapes_of
from edgetrain.sparsity.policy import largest, largest_missing, random_missing
from edgetrain.torch_network import TorchNetwork
from tests.engine import set_lanes
from tests.op_cases import Net
from tests.sparse_networks import (
    CLASSES,
    PROFILE,
    assert_equal,
    batch,
    learner,
    network,
    patterns,
    replace_arrays,
    train,
)

POLICIES = {
    "static": et.StaticSparse(weights=0.8),
    "static-uniform": et.StaticSparse(weights=0.9, distribution="uniform"),
    "rigl": et.RigL(weights=0.8, refresh=3, total_steps=40),
    "rigl-uniform": et.RigL(weights=0.9, distribution="uniform", refresh=2, total_steps=40),
    "set": et.SET(weights=0.8, refresh=3, total_steps=40),
    "set-dense-ends": et.SET(weights=0.9, refresh=3, total_steps=40, dense_first=True, dense_last=True),
    "swat-unstructured": et.SWAT(weights=0.8, activations=0.0, refresh=3),
    "swat-erk": et.SWAT(weights=0.8, activations=0.0, variant="erk", refresh=3),
    "swat-momentum": et.SWAT(weights=0.8, activations=0.0, variant="momentum", refresh=3),
    "swat-structured": et.SWAT(weights=0.8, activations=0.0, variant="structured", refresh=3),
}
EVERY = pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES.keys())
COMPACT = {name: policy for name, policy in POLICIES.items() if policy.compact}
EVERY_COMPACT = pytest.mark.parametrize("policy", COMPACT.values(), ids=COMPACT.keys())


# ---- what every policy must do ---------------------------------------------------------------------------------------


def test_every_policy_is_in_the_contract_suite():
    assert {policy.name for policy in POLICIES.values()} == set(policy_names("sparsity"))


@EVERY
def test_density_is_exact_at_every_step(policy):
    made = learner(policy)
    for step in range(12):
        train(made, 1, step)
        for layer in made.topology.layers:
            index = made.topology.indices[layer.weight]
            if policy.name == "swat" and policy.variant == "structured" and layer.taps > 1:
                kernels = layer.size // layer.taps
                assert index.count == entries(kernels, made.topology.densities[layer.weight]) * layer.taps
            else:
                assert index.count == entries(layer.size, made.topology.densities[layer.weight])
            array = made.parameters()[layer.weight]
            assert not array[~index.mask()].any()


@EVERY
def test_the_depthwise_layer_stays_dense(policy):
    assert "depthwise.weight" not in learner(policy).topology.indices


@EVERY
def test_gradients_are_those_of_the_network_with_zeros(policy):
    made, (x, y) = learner(policy), batch()
    train(made, 4)
    wanted = TorchNetwork(replace_arrays(network(), made.parameters())).gradients(x, y)
    got = made.gradients(x, y)
    for name, mask in patterns(made).items():
        if policy.compact:
            wanted[name] = np.where(mask, wanted[name], 0)
    assert got.keys() == wanted.keys()
    for name in wanted:
        assert np.abs(got[name] - wanted[name]).max() <= 1e-4 * np.abs(wanted[name]).max(), name


@EVERY
def test_predictions_are_those_of_the_network_with_zeros(policy):
    made, (x, _) = learner(policy), batch()
    train(made, 4)
    wanted = reference.evaluate(replace_arrays(network(), made.parameters()), x)
    np.testing.assert_allclose(made.logits(x), wanted, atol=1e-4 * np.abs(wanted).max())


@EVERY
def test_gradients_change_nothing(policy):
    made = learner(policy)
    before, found = made.parameters(), patterns(made)
    made.gradients(*batch())
    assert_equal(made.parameters(), before)
    assert_equal(patterns(made), found)


@EVERY
def test_results_depend_on_the_seed_and_not_on_threads(policy):
    one, two, other = learner(policy), learner(policy, threads=2), learner(policy, seed=1)
    losses = train(one, 8)
    assert train(two, 8) == losses
    assert_equal(two.parameters(), one.parameters())
    if policy.compact:  # SWAT draws nothing
        assert train(other, 8) != losses


@EVERY
def test_a_checkpoint_goes_on_exactly(policy, tmp_path):
    made = learner(policy)
    train(made, 5)
    made.save(tmp_path / "c.safetensors")
    loaded = et.Learner.load(tmp_path / "c.safetensors")
    assert loaded.sparsity == policy
    assert_equal(patterns(loaded), patterns(made))
    assert_equal(loaded.parameters(), made.parameters())
    assert train(loaded, 7, 5) == train(made, 7, 5)
    assert_equal(loaded.parameters(), made.parameters())


@EVERY_COMPACT
def test_a_checkpoint_holds_no_dense_weights(policy, tmp_path):
    made = learner(policy)
    train(made, 1)
    made.save(tmp_path / "sparse")
    tensors, _ = read_checkpoint(tmp_path / "sparse")
    for name, index in made.topology.indices.items():
        sizes = {key: array.size for key, array in tensors.items() if key.endswith(f"/{name}")}
        assert set(sizes) == {f"state/weights/{name}", f"state/velocity/{name}"}
        assert set(sizes.values()) == {index.count}


@EVERY
def test_a_state_of_another_policy_is_refused(policy, tmp_path):
    made = learner(policy)
    train(made, 1)
    with pytest.raises(CheckpointError, match="another"):
        learner(None).restore(*made.state())
    with pytest.raises(CheckpointError, match="another"):
        learner(replace(policy, weights=0.5)).restore(*made.state())


@EVERY
def test_an_exported_file_has_zeros_and_tells_densities(policy, tmp_path):
    made, (x, _) = learner(policy), batch()
    train(made, 4)
    made.export_onnx(tmp_path / "m.onnx")
    told = {prop.key: prop.value for prop in onnx.load(tmp_path / "m.onnx").metadata_props}
    assert parse_policy("sparsity", told["edgetrain.sparsity"]) == policy
    graph = et.load_onnx(tmp_path / "m.onnx")
    densities = json.loads(told["edgetrain.densities"])
    assert densities.keys() == made.topology.indices.keys()
    for name, density in densities.items():
        assert np.count_nonzero(graph.arrays[name]) / graph.arrays[name].size == density
        assert not graph.arrays[name][~made.topology.indices[name].mask()].any()
    np.testing.assert_array_equal(learner(None, graph=graph).logits(x).argmax(1), made.predict(x))


@EVERY
def test_an_exported_file_goes_on_sparse(policy, tmp_path):
    made = learner(policy)
    train(made, 4)
    made.export_onnx(tmp_path / "m.onnx")
    again = learner(policy, graph=et.load_onnx(tmp_path / "m.onnx"))
    assert_equal(again.parameters(), made.parameters())
    train(again, 3)


@EVERY
def test_a_file_that_is_sparse_enough_keeps_its_densities_whatever_the_policy(policy, tmp_path):
    source = learner(et.SWAT(weights=0.95, activations=0.0, variant="momentum", refresh=3))
    train(source, 5)
    source.export_onnx(tmp_path / "m.onnx")
    again = learner(policy, graph=et.load_onnx(tmp_path / "m.onnx"))
    pruned = again.topology.indices.keys() if policy != POLICIES["swat-structured"] else {"c.weight", "d.weight"}
    for name in pruned:
        np.testing.assert_array_equal(again.parameters()[name], source.parameters()[name], err_msg=name)
    train(again, 2)
    again.save(tmp_path / "c.safetensors")
    loaded = et.Learner.load(tmp_path / "c.safetensors")
    assert train(loaded, 4, 2) == train(again, 4, 2)
    assert_equal(loaded.parameters(), again.parameters())


@pytest.mark.parametrize("averaging", [0.0, 0.9])
def test_weights_that_have_just_grown_count_as_the_zeros_they_are_and_are_drawn_anew(averaging, tmp_path):
    policy = et.RigL(weights=0.8, distribution="uniform", dense_first=False, refresh=5)
    made = learner(policy, optimizer=et.SGD(lr=0.05, momentum=0.9, averaging=averaging))
    train(made, 5)  # the topology changes behind the fifth step
    made.export_onnx(tmp_path / "m.onnx")
    told = {prop.key: prop.value for prop in onnx.load(tmp_path / "m.onnx").metadata_props}
    graph = et.load_onnx(tmp_path / "m.onnx")
    again = learner(policy, graph=graph)
    assert_equal(again.parameters(), made.parameters())
    for name, density in json.loads(told["edgetrain.densities"]).items():
        exist = made.topology.indices[name]
        assert np.count_nonzero(graph.arrays[name]) / graph.arrays[name].size == density < exist.density
        assert again.topology.indices[name].count == exist.count


def test_a_file_that_told_the_weights_that_exist_goes_on(tmp_path):
    made = learner(POLICIES["rigl"])
    train(made, 4)
    made.export_onnx(tmp_path / "m.onnx")
    model = onnx.load(tmp_path / "m.onnx")
    entry = next(prop for prop in model.metadata_props if prop.key == "edgetrain.densities")
    entry.value = json.dumps({name: index.density for name, index in made.topology.indices.items()})
    onnx.save(model, tmp_path / "old.onnx")
    again = learner(POLICIES["rigl"], graph=et.load_onnx(tmp_path / "old.onnx"))
    assert_equal(again.parameters(), made.parameters())
    train(again, 3)


def test_a_file_that_goes_on_without_a_policy_tells_true_densities(tmp_path):
    source = learner(POLICIES["rigl"])
    train(source, 2)
    source.export_onnx(tmp_path / "m.onnx")
    dense = learner(None, graph=et.load_onnx(tmp_path / "m.onnx"))
    for steps in (0, 3):
        train(dense, steps)
        dense.export_onnx(tmp_path / "again.onnx")
        told = {prop.key: prop.value for prop in onnx.load(tmp_path / "again.onnx").metadata_props}
        assert "edgetrain.sparsity" not in told
        densities = json.loads(told.get("edgetrain.densities", "{}"))
        shares = {name: np.count_nonzero(a) / a.size for name, a in dense.parameters().items() if "weight" in name}
        assert densities == {name: share for name, share in shares.items() if share < 1}
        assert (len(densities) == len(source.topology.indices)) == (steps == 0)


@EVERY
def test_trained_weights_keep_their_largest_and_their_size(policy, tmp_path):
    source = learner(None)
    train(source, 3)
    source.export_onnx(tmp_path / "m.onnx")
    wanted = source.parameters()
    taken = learner(policy)
    taken.load_parameters(tmp_path / "m.onnx")
    for made in (learner(policy, graph=et.load_onnx(tmp_path / "m.onnx")), learner(policy, graph=source.graph), taken):
        for name, mask in patterns(made).items():
            np.testing.assert_array_equal(made.parameters()[name], np.where(mask, wanted[name], 0), err_msg=name)
            if policy.name != "swat" or policy.variant != "structured":
                np.testing.assert_array_equal(mask, largest(np.abs(wanted[name]), int(mask.sum())))
        assert "given weights" in made.topology.beginning
    assert "scaled" in learner(policy).topology.beginning


@pytest.mark.parametrize("policy", [
    et.RigL(0.8, initial_pattern="random"), et.SWAT(0.8, activations=0.0, rescale=True),
], ids=["rigl", "swat"])  # fmt: skip
def test_a_policy_may_say_how_trained_weights_begin(policy, tmp_path):
    source = learner(None)
    source.export_onnx(tmp_path / "m.onnx")
    taken, name = learner(policy), "b.weight"
    taken.load_parameters(tmp_path / "m.onnx")
    for made in (learner(policy, graph=et.load_onnx(tmp_path / "m.onnx")), taken):
        kept = made.parameters()[name]
        factors = kept[kept != 0] / source.parameters()[name][kept != 0]
        assert factors.min() > 1.05
        assert factors.max() == pytest.approx(factors.min(), rel=1e-5)


@EVERY
def test_loaded_parameters_bring_their_pattern(policy):
    made = learner(policy)
    given = network(seed=5).arrays
    made.load_parameters(given)
    for name, mask in patterns(made).items():
        np.testing.assert_array_equal(made.parameters()[name], np.where(mask, given[name], 0))
        kept, dropped = np.abs(given[name][mask]), np.abs(given[name][~mask])
        if policy.name != "swat" or policy.variant != "structured":
            assert kept.min() >= dropped.max()


@EVERY
def test_momentum_stays_with_its_weights_when_parameters_are_loaded(policy):
    made = learner(policy)
    train(made, 5)
    before, old = {name: made._parameters.dense(name, "velocity") for name in patterns(made)}, patterns(made)
    made.load_parameters(network(seed=5).arrays)
    for name, mask in patterns(made).items():
        stays = old[name] & mask if policy.compact else True
        wanted = np.where(stays, before[name], 0)
        assert np.count_nonzero(wanted)
        np.testing.assert_array_equal(made._parameters.dense(name, "velocity"), wanted, err_msg=name)


@EVERY
def test_the_text_of_a_policy_gives_it_back(policy):
    assert parse_policy("sparsity", describe_policy("sparsity", policy)) == policy


@EVERY
def test_operations_are_counted(policy):
    made = learner(policy)
    step = made.partial_fit(*batch(8))
    assert step.macs_dense == learner(None).partial_fit(*batch(8)).macs_dense
    assert step.macs_dense - step.macs_done == step.saved_weights > 0


@EVERY
def test_other_optimizers(policy):
    made = learner(policy, optimizer=et.AdamW(lr=0.01))
    train(made, 6)
    for name, mask in patterns(made).items():
        assert not made.parameters()[name][~mask].any()


@EVERY
def test_any_number_of_samples(policy):
    made = learner(policy)
    for count in (1, 8, 21):
        made.partial_fit(*batch(count))
        assert made.logits(batch(count)[0]).shape == (count, CLASSES)


# ---- density 1 -------------------------------------------------------------------------------------------------------


WITHOUT_ZEROS = pytest.mark.parametrize("policy", [
    et.StaticSparse(weights=0.0), et.RigL(weights=0.0, refresh=2, total_steps=20), et.SET(weights=0.0),
    *(et.SWAT(weights=0.0, activations=0.0, variant=v) for v in ("unstructured", "erk", "momentum", "structured")),
], ids=lambda policy: f"{policy.name}-{getattr(policy, 'variant', '')}")  # fmt: skip


@WITHOUT_ZEROS
def test_without_zeros_training_is_dense_training_bit_for_bit(policy):
    sparse, dense = learner(policy), learner(None)
    assert train(sparse, 6) == train(dense, 6)
    assert_equal(sparse.parameters(), dense.parameters())
    assert sparse.memory_plan() == dense.memory_plan()


def few_samples(policy, batch_size=1):
    """A learner for so few samples that lanes hold channels, on a wide machine."""
    graph = et.models.resnet((2, 8, 8), num_classes=CLASSES, depth=8)
    return et.Learner(graph, PROFILE, batch_size=batch_size, threads=1, sparsity=policy)


@WITHOUT_ZEROS
def test_without_zeros_a_single_sample_is_trained_as_densely(policy, monkeypatch):
    set_lanes(monkeypatch, 16)
    made = few_samples(policy), few_samples(None)
    assert [m.plans.by_channel for m in made] == [True, True]
    losses = [[m.partial_fit(*batch(1, seed)).loss for seed in range(5)] for m in made]
    assert losses[0] == losses[1]
    assert_equal(made[0].parameters(), made[1].parameters())


@pytest.mark.parametrize(
    ("policy", "batch_size", "by_channel"),
    [
        (et.StaticSparse(0.9), 1, True), (et.StaticSparse(0.5, distribution="uniform"), 4, True),
        (et.StaticSparse(0.9), 4, False), (et.StaticSparse(0.99), 2, False), (et.SWAT(0.9, activations=0.9), 1, True),
        (et.SWAT(0.5, activations=0.5, linear=True), 4, True), (et.SWAT(0.9, activations=0.9), 4, False),
        (et.SWAT(0.5, activations=0.5, variant="momentum"), 2, True),
        (et.SWAT(0.9, activations=0.9, group="lanes"), 1, False),
    ],
)  # fmt: skip
def test_a_few_samples_are_computed_as_is_faster(policy, batch_size, by_channel, monkeypatch):
    set_lanes(monkeypatch, 16)
    made = few_samples(policy, batch_size)
    assert made.plans.by_channel == by_channel
    other = few_samples(policy, batch_size)
    other.plans.__dict__["by_channel"] = False
    x, y = batch(batch_size)
    got, wanted = made.gradients(x, y), other.gradients(x, y)
    for name, array in wanted.items():
        np.testing.assert_allclose(got[name], array, atol=1e-4 * np.abs(array).max(), err_msg=name)
    assert made.topology.records == other.topology.records  # as in checkpoints of other machines


@pytest.mark.parametrize(("width", "weights", "batch_size", "by_channel"), [
    (64, 0.9, 4, True), (64, 0.99, 2, True), (0, 0.9, 4, False), (0, 0.7, 3, False), (0, 0.7, 1, True),
])  # fmt: skip
def test_fully_connected_layers_do_not_speak_for_lists(width, weights, batch_size, by_channel, monkeypatch):
    """Few samples read them by bits, faster than by lists (``width``: of four such layers, 0 for LeNet-5)."""
    set_lanes(monkeypatch, 16)
    monkeypatch.setattr("edgetrain.lowering_sparse.simd_lanes", lambda: 16)
    graph = et.models.lenet5()
    if width:
        net, h = Net((width,)), "input"
        for outputs in (width, width, width, CLASSES):
            h = net.Gemm(h, net.parameter(outputs, width), transB=1)
        net.graph.set_outputs([h])
        graph = net.graph
    policy = et.StaticSparse(weights, distribution="uniform")
    made = et.Learner(graph, PROFILE, batch_size=batch_size, threads=1, sparsity=policy)
    assert made.plans.by_channel == by_channel


@pytest.mark.parametrize("count", [1, 3])
def test_activations_are_pruned_alike_where_lanes_hold_channels(count, monkeypatch):
    """Behind the last of 7 or 20 channels lanes hold one half, the sigmoid of 0: that is no activation."""
    set_lanes(monkeypatch, 16)
    net = Net((3, 6, 6))
    h = net.Sigmoid(net.conv("input", 7, 3, 3, 3, bias=False))
    h = net.Sigmoid(net.conv(h, 20, 7, 3, 3, pads=[1, 0, 0, 1], bias=False))
    h = net.Sigmoid(net.conv(h, 6, 20, 2, 2))
    net.graph.set_outputs([net.Gemm(net.Flatten(h), net.parameter(CLASSES, 6 * 4, spread=0.1), transB=1)])
    rng = np.random.default_rng(count)
    x, y = rng.normal(size=(count, 3, 6, 6)).astype(np.float32), rng.integers(0, CLASSES, count)
    policy = et.SWAT(0.4, activations=0.3, linear=True, dense_first=False)  # one half is among the kept
    made = [et.Learner(net.graph, PROFILE, batch_size=count, threads=1, sparsity=policy) for _ in range(2)]
    made[1].plans.__dict__["by_channel"] = False
    assert made[0].plans.by_channel
    got, wanted = (each.gradients(x, y) for each in made)
    for name, array in wanted.items():
        np.testing.assert_allclose(got[name], array, atol=1e-5 * np.abs(array).max(), err_msg=name)
    tallies = [each._parameters.buffers["tally"] for each in made]
    np.testing.assert_array_equal(*tallies)


def test_of_equal_activations_that_no_list_could_hold_a_copy_has_as_many(monkeypatch):
    """Of 16 channels 14 are one half everywhere, the sigmoid of nothing: more than the fifth that is to be kept.

    Which of them are the first depends on what lies in the lanes, so gradients are not equal.
    """
    set_lanes(monkeypatch, 16)
    net = Net((3, 8, 8))
    h = net.Sigmoid(net.conv("input", 16, 3, 3, 3, pads=[1] * 4, bias=False))
    net.graph.arrays["p0"][2:] = 0
    h = net.Relu(net.conv(h, 8, 16, 3, 3, pads=[1] * 4))
    net.graph.set_outputs([net.Gemm(net.Flatten(h), net.parameter(CLASSES, 512, spread=0.1), transB=1)])
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 3, 8, 8)).astype(np.float32), rng.integers(0, CLASSES, 2)
    policy = et.SWAT(0.0, activations=0.8, dense_first=False)
    made = [et.Learner(net.graph, PROFILE, batch_size=2, threads=1, sparsity=policy) for _ in range(2)]
    for each, by_channel in zip(made, (True, False), strict=True):
        each.plans.__dict__["by_channel"] = by_channel
    for each in made:
        assert all(array.any() for array in each.gradients(x, y).values())
    first, second = (each._parameters.buffers["tally"].tolist() for each in made)
    assert first == second
    assert second[:2] == [math.ceil(0.2 * 2 * 16 * 64), 2 * 16 * 64]


# ---- memory ----------------------------------------------------------------------------------------------------------


@EVERY_COMPACT
def test_only_weights_that_exist_are_stored(policy):
    made = learner(policy)
    train(made, 3)
    for name, index in made.topology.indices.items():
        for buffer in ("weights", "gradients", "velocity"):
            assert made._parameters.view(name, buffer).shape == (index.count,)
        assert made.graph.arrays[name].strides == (0,) * len(index.shape), "the graph holds a dense copy"
        assert made.graph.arrays[name].shape == index.shape


def test_the_memory_plan_shows_what_is_stored():
    graph = et.models.resnet((1, 12, 12), depth=8)
    policies = {"dense": None, "static": et.StaticSparse(0.9), "rigl": et.RigL(0.9), "swat": et.SWAT(0.9)}
    plans = {
        name: et.Learner(graph, PROFILE, batch_size=8, threads=1, sparsity=policy).memory_plan().parts
        for name, policy in policies.items()
    }
    for part in ("weights", "gradients", "optimizer"):
        assert plans["static"][part] == plans["rigl"][part] < 0.12 * plans["dense"][part]
        assert plans["swat"][part] == plans["dense"][part]
    assert plans["static"]["sparse index"] > 0
    assert "sparse index" not in plans["dense"]
    assert plans["rigl"]["activations"] >= plans["static"]["activations"]


def test_the_budget_covers_steps_that_change_the_topology():
    graph = et.models.lenet5()
    usual = et.Learner(graph, PROFILE, batch_size=1, threads=1, sparsity=et.StaticSparse(0.9)).memory_plan(1).peak_bytes
    whole = et.Learner(graph, PROFILE, batch_size=1, threads=1, sparsity=et.RigL(0.9)).memory_plan(1).peak_bytes
    assert usual < whole
    tight = et.Learner(
        graph, PROFILE, batch_size=1, threads=1, sparsity=et.RigL(0.9), memory_budget=(usual + whole) // 2
    )
    with pytest.raises(et.errors.MemoryBudgetError):
        tight.partial_fit(np.zeros((1, 1, 28, 28)), [0])


DYNAMIC = {"rigl": et.RigL(0.99, refresh=2, total_steps=100), "set": et.SET(0.99, refresh=2, total_steps=100)}


@pytest.mark.parametrize("policy", DYNAMIC.values(), ids=DYNAMIC.keys())
def test_changes_and_checkpoints_take_memory_for_weights_that_exist_only(policy, tmp_path):
    graph, rng, width = Graph("wide", input_shape=(16,)), np.random.default_rng(0), 2000
    x = "input"
    for name, shape in (("a", (width, 16)), ("b", (width, width)), ("c", (CLASSES, width))):
        x = graph.add("Gemm", [x, graph.parameter(name, rng.normal(0, 0.03, shape))], transB=1)
    graph.set_outputs([x])
    made = learner(policy, graph=graph)
    x, y = rng.random((8, 16), np.float32), rng.integers(0, CLASSES, 8)
    for _ in range(3):  # the first change: RigL's plan gets its memory
        made.partial_fit(x, y)
    tracemalloc.start()
    peaks = {}
    for name, act in (("change", lambda: made.partial_fit(x, y)), ("save", lambda: made.save(tmp_path / "c")),
                      ("load", lambda: et.Learner.load(tmp_path / "c"))):  # fmt: skip
        before = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        act()
        peaks[name] = (tracemalloc.get_traced_memory()[1] - before) / (4 * width * width)
    tracemalloc.stop()
    assert made.topology.changes == 2
    assert max(peaks.values()) < 0.19, peaks
    assert peaks["change"] < 0.15, peaks


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("policy", [
    "swat:weights=0.9", "swat:weights=0.5", "swat:weights=0.9,variant=structured", "set:weights=0.99",
    "set:weights=0.5,distribution=uniform", "rigl:weights=0.9,distribution=uniform",
])  # fmt: skip
def test_the_plan_tells_what_a_change_takes(policy, transposed):
    graph, rng, width, x = Graph("wide", input_shape=(16,)), np.random.default_rng(0), 600, "input"
    for name, shape in (("a", (width, 16)), ("b", (width, width)), ("c", (CLASSES, width))):
        weight = rng.normal(0, 0.03, shape)
        given = [x, graph.parameter(name, weight.T if transposed else weight)]
        x = graph.add("MatMul", given) if transposed else graph.add("Gemm", given, transB=1)
    graph.set_outputs([x])
    made = learner(f"{policy},refresh=1", graph=graph)
    x, y = rng.random((8, 16), np.float32), rng.integers(0, CLASSES, 8)
    for _ in range(3):
        made.partial_fit(x, y)
    told, peak = made.memory_plan().parts["topology change"], 0
    tracemalloc.start()
    for _ in range(2):
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        made.partial_fit(x, y)
        peak = max(peak, tracemalloc.get_traced_memory()[1] - before)
    tracemalloc.stop()
    assert 0.6 * told < peak < 1.02 * told


def test_a_topology_that_stays_takes_nothing_to_change():
    assert "topology change" not in learner(et.StaticSparse(0.9)).memory_plan().parts


@pytest.mark.parametrize("block", [1, 7, 1000])
def test_choosing_in_blocks_is_choosing_at_once(block, monkeypatch):
    monkeypatch.setattr("edgetrain.sparsity.policy._BLOCK", block)
    monkeypatch.setattr("edgetrain.sparsity.policy._FEWEST", 1)
    rng = np.random.default_rng(3)
    for count in (0, 1, 5, 40):
        scores = rng.integers(0, 9, 100).astype(np.float32)  # many are equal
        taken = np.sort(rng.choice(100, 60, replace=False))
        free = np.setdiff1d(np.arange(100), taken)
        wanted = free[largest(scores[free], count)]
        got = largest_missing(lambda first, last, scores=scores: scores[first:last].copy(), 100, count, taken)
        np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize(("size", "taken", "count"), [(6, 2, 2), (6, 5, 1), (6, 0, 6), (6, 6, 0), (6, 3, 0)])
def test_every_free_place_is_as_likely_to_be_drawn(size, taken, count):
    rng, drawn, times = np.random.default_rng(0), np.zeros(size), 3000
    present = np.sort(rng.choice(size, taken, replace=False))
    for _ in range(times):
        found = random_missing(rng, size, count, present)
        assert len(found) == count
        assert (np.diff(found) > 0).all()
        drawn[found] += 1
    wanted = np.full(size, count / max(1, size - taken))
    wanted[present] = 0
    np.testing.assert_allclose(drawn / times, wanted, atol=0.04)


# ---- densities -------------------------------------------------------------------------------------------------------

GRAPHS = {"lenet5": et.models.lenet5, "resnet8": lambda: et.models.resnet(depth=8), "resnet20": et.models.resnet}


@pytest.mark.parametrize("sparsity", [0.5, 0.8, 0.9, 0.99, 0.9999])
@pytest.mark.parametrize("graph", GRAPHS.values(), ids=GRAPHS.keys())
def test_erdos_renyi_kernel_densities_sum_to_the_target(graph, sparsity):
    layers = sparse_layers(graph())
    densities = erdos_renyi_kernel(shapes_of(layers), 1 - sparsity)
    total = sum(layer.size for layer in layers)
    assert sum(densities[layer.weight] * layer.size for layer in layers) == pytest.approx((1 - sparsity) * total)
    assert all(0 < density <= 1 for density in densities.values())
    raw = {layer.weight: sum(layer.shape) / layer.size for layer in layers}
    factors = [densities[name] / raw[name] for name in raw if densities[name] < 1]
    assert max(factors) == pytest.approx(min(factors))
    assert all(raw[name] * factors[0] >= 1 for name in raw if densities[name] == 1)


def test_a_layer_that_would_be_denser_than_dense_is_dense():
    layers = [SparseLayer(n, n, s, False, 1, 0) for n, s in (("small", (2, 1, 3, 3)), ("large", (64, 64, 3, 3)))]
    densities = erdos_renyi_kernel(shapes_of(layers), 0.5)
    assert densities["small"] == 1
    assert densities["large"] == pytest.approx((0.5 * (18 + 36864) - 18) / 36864)


def test_layers_without_zeros_have_density_one_exactly():
    rng = np.random.default_rng(0)
    for _ in range(200):
        kinds = [tuple(map(int, rng.integers(1, 200, rng.integers(2, 4)))) for _ in range(rng.integers(1, 6))]
        shapes = {str(number): (*kind[:2], *kind[2:] * 2) for number, kind in enumerate(kinds)}
        assert set(erdos_renyi_kernel(shapes, 1.0).values()) == {1.0}, shapes


def test_uniform_densities():
    layers = sparse_layers(et.models.lenet5())
    assert set(uniform(shapes_of(layers), 0.1).values()) == {0.1}


RULES = {
    "rigl": (et.RigL(), {"a", "b", "grouped", "c", "d"}),
    "rigl-uniform": (et.RigL(distribution="uniform"), {"b", "grouped", "c", "d"}),
    "rigl-ends": (et.RigL(dense_first=True, dense_last=True), {"b", "grouped", "c"}),
    "swat-u": (et.SWAT(), {"b", "grouped", "c", "d"}),
    "swat-erk": (et.SWAT(variant="erk"), {"a", "b", "grouped", "c", "d"}),
    "swat-m": (et.SWAT(variant="momentum"), {"a", "b", "grouped", "c", "d"}),
    "swat-structured": (et.SWAT(variant="structured"), {"b", "grouped", "c", "d"}),
    "swat-last": (et.SWAT(dense_last=True), {"b", "grouped", "c"}),
}


@pytest.mark.parametrize(("policy", "wanted"), RULES.values(), ids=RULES.keys())
def test_first_and_last_layers(policy, wanted):
    assert {layer.weight.removesuffix(".weight") for layer in policy.layers(network())} == wanted


def test_weights_that_two_layers_share_stay_dense():
    graph = Graph("shared", input_shape=(4,))
    weight = graph.parameter("w", np.ones((4, 4)))
    x = graph.add("MatMul", [graph.add("MatMul", ["input", weight]), weight])
    graph.set_outputs([x])
    assert sparse_layers(graph) == []


def test_a_policy_that_finds_no_layer_is_refused():
    graph, rng = Graph("odd", input_shape=(2, 6, 6)), np.random.default_rng(0)
    x = graph.add("Conv", ["input", graph.parameter("thin", rng.normal(size=(2, 1, 3, 3)))], group=2)
    x, twice = graph.add("Flatten", [x]), graph.parameter("twice", rng.normal(size=(32, 32)))
    x = graph.add("MatMul", [graph.add("MatMul", [x, twice]), twice])
    x = graph.add("MatMul", [x, graph.parameter("fixed", rng.normal(size=(32, 8)), False)])
    graph.set_outputs([graph.add("MatMul", [x, graph.parameter("last", rng.normal(size=(8, CLASSES)))])])
    reasons = ("thin: depthwise; twice: several layers share its weights; fixed: its weights are not trained; "
               r"last: the last layer stays dense \(dense_last\)")  # fmt: skip
    with pytest.raises(UsageError, match=f"rigl: no layer of 'odd' can be sparse .{reasons}.; expected one at least"):
        learner(et.RigL(0.9, dense_last=True), graph=graph)
    with pytest.raises(UsageError, match="swat: no layer"):
        learner(et.SWAT(0.0, activations=0.5, dense_last=True), graph=graph)
    for policy in (et.RigL(0.9), et.RigL(0.0, dense_last=True), et.SWAT(0.0, activations=0.0, dense_last=True)):
        learner(policy, graph=graph)


def test_a_network_of_one_layer_tells_that_the_first_stays_dense():
    graph = Graph("one", input_shape=(8,))
    graph.set_outputs([graph.add("MatMul", ["input", graph.parameter("w", np.ones((8, CLASSES)))])])
    with pytest.raises(UsageError, match=r"w: the first layer stays dense \(dense_first\)"):
        learner(et.SWAT(0.9), graph=graph)


# ---- initial patterns ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.8, 0.9999])
def test_random_patterns_are_scaled_and_trained_ones_are_not(share):
    """By the weights that are left: one at least of every layer."""
    original = network().arrays
    random = learner(et.StaticSparse(share))
    trained = learner(et.StaticSparse(share, initial_pattern="magnitude"))
    for name, mask in patterns(random).items():
        scale = math.sqrt(mask.size / mask.sum())
        np.testing.assert_allclose(random.parameters()[name], np.where(mask, original[name] * scale, 0), rtol=1e-6)
    for name, mask in patterns(trained).items():
        np.testing.assert_array_equal(trained.parameters()[name], np.where(mask, original[name], 0))
        np.testing.assert_array_equal(mask, largest(np.abs(original[name]), int(mask.sum())))


def test_the_largest_are_chosen_and_of_equal_ones_the_first():
    scores = np.array([[1.0, 3.0, 1.0], [2.0, 1.0, 0.0]], np.float32)
    assert largest(scores, 3).tolist() == [[True, True, False], [True, False, False]]
    assert largest(scores, 0).sum() == 0
    assert largest(scores, 6).all()


# ---- RigL and SET ----------------------------------------------------------------------------------------------------


def test_rigl_drops_the_smallest_and_grows_where_the_gradient_is_largest():
    policy = et.RigL(weights=0.8, refresh=3, total_steps=40)
    made = learner(policy)
    train(made, 2)
    before, old = made.parameters(), patterns(made)
    _, gradients = reference.gradients(replace_arrays(network(), before), *batch(8, 2))
    train(made, 1, 2)
    after, new = made.parameters(), patterns(made)
    share = policy.fraction / 2 * (1 + math.cos(math.pi * 3 / 30))
    for name in old:
        count = int(old[name].sum())
        moved = int(share * count)
        grown, dropped = new[name] & ~old[name], old[name] & ~new[name]
        assert new[name].sum() == count
        assert 0 < grown.sum() == dropped.sum() <= moved
        assert not after[name][grown].any(), "new weights are 0"
        assert not made._parameters.dense(name, "velocity")[grown].any(), "and so is their momentum"
        scores = np.abs(gradients[name])
        assert scores[grown].min() >= scores[~old[name] & ~new[name]].max(initial=0) * (1 - 1e-4)
        assert (old[name] & new[name]).sum() >= count - moved, "the largest stay"


@pytest.mark.parametrize("kind", [et.RigL, et.SET])
def test_what_is_dropped_is_smaller_than_all_that_stays(kind, monkeypatch):
    """With scores by which nothing that existed grows again; it would keep its value, as in RigL's own code."""
    made = learner(kind(weights=0.8, refresh=3, total_steps=40), optimizer=et.SGD(lr=0.0))
    train(made, 2)
    before, old = made.parameters(), patterns(made)

    def grown(layer: SparseLayer, count: int, kept: np.ndarray) -> np.ndarray:
        scores = (~old[layer.weight]).ravel().astype(np.float64)
        return largest_missing(lambda first, last: scores[first:last].copy(), layer.size, count, kept)

    monkeypatch.setattr(kind, "growth", lambda *_: grown)
    train(made, 1, 2)
    roomy = {name: new for name, new in patterns(made).items() if new.mean() < 0.5}
    assert len(roomy) > 1
    for name, new in roomy.items():
        sizes, dropped = np.abs(before[name]), old[name] & ~new
        assert (before[name][old[name]] < 0).any()
        assert sizes[dropped].max() <= sizes[old[name] & new].min()


@pytest.mark.parametrize("policy", [et.RigL(refresh=10), et.SET(refresh=10)], ids=["rigl", "set"])
def test_the_schedule_of_changes(policy):
    shares = [policy.replaced(step, 1000) for step in range(1000)]
    changing = [step for step, share in enumerate(shares) if share]
    assert changing == list(range(9, 749, 10))
    assert shares[9] == pytest.approx(0.3 * (1 + math.cos(math.pi * 10 / 750)) / 2)
    assert policy.replaced(9, None) == pytest.approx(0.3, abs=1e-4), "32,000 steps when nobody tells"


def test_fit_tells_how_long_training_is():
    made = learner(et.RigL(0.8, refresh=2))
    x, y = batch(40)
    made.fit((x, y), epochs=4, normalize=False)
    assert made.topology.total_steps == 20
    assert made.topology.changes == 6  # after steps 2, 4, ... 12; the last, after 14, is of less than one weight


def test_set_needs_no_gradients_of_weights_that_do_not_exist():
    made = learner(et.SET(0.8, refresh=2, total_steps=40))
    train(made, 4)
    assert made.topology.changes == 2
    assert not made.topology.wants_gradients
    assert not any(name.startswith("whole") for name in made.training_plan().offsets)


def test_static_patterns_stay():
    made = learner(et.StaticSparse(0.8))
    before = patterns(made)
    train(made, 10)
    assert_equal(patterns(made), before)
    assert made.topology.changes == 0


# ---- what is refused -------------------------------------------------------------------------------------------------

WRONG = {
    "weights-1": (lambda: et.RigL(weights=1.0), "rigl: weights=1.0, expected a share of zeros"),
    "weights-negative": (lambda: et.SWAT(weights=-0.1), "swat: weights=-0.1, expected"),
    "fade": (lambda: et.SWAT(fade=1.5), "swat: fade=1.5, expected a number from 0 to 1"),
    "fade-text": (lambda: et.SWAT(fade="0.5"), "swat: fade='0.5', expected a number"),
    "fade-no-number": (lambda: et.SWAT(fade=True), "swat: fade=True, expected a number"),
    "activations": (lambda: et.SWAT(activations=2), "swat: activations=2, expected"),
    "variant": (lambda: et.SWAT(variant="x"), "variant='x', expected one of unstructured, erk, momentum, structured"),
    "distribution": (lambda: et.SET(distribution="x"), "distribution='x', expected one of uniform, erk"),
    "pattern": (lambda: et.StaticSparse(initial_pattern="x"), "expected one of random, magnitude"),
    "refresh": (lambda: et.RigL(refresh=0), "refresh=0, expected a whole number of at least 1"),
    "fraction": (lambda: et.RigL(fraction=1.5), "fraction=1.5, expected a share from 0 to 1"),
    "total": (lambda: et.SET(total_steps=0), "total_steps=0, expected a whole number"),
}


@pytest.mark.parametrize(("make", "message"), WRONG.values(), ids=WRONG.keys())
def test_values_out_of_range(make, message):
    with pytest.raises(UsageError, match=message):
        make()


@pytest.mark.parametrize("batch_size", [4, 8, 16])
def test_the_larger_of_the_two_steps_is_planned_for(batch_size):
    """With small networks it is the usual step, not the one that keeps gradients of weights that do not exist."""
    made = et.Learner(build_model("cnn1d"), batch_size=batch_size, threads=1, sparsity=et.RigL(weights=0.8))
    plans = made.plans
    peaks = [plans.memory(plans.plan(True, batch_size, whole)).peak_bytes for whole in (False, True)]
    assert made.memory_plan().peak_bytes == max(peaks) > min(peaks)
    assert peaks[0] > peaks[1]
    tight = et.Learner(build_model("cnn1d"), batch_size=batch_size, threads=1, sparsity=et.RigL(weights=0.8),
                       memory_budget=sum(peaks) // 2)  # fmt: skip
    x, y = np.zeros((batch_size, *made.graph.input_shape), np.float32), np.zeros(batch_size, np.int64)
    with pytest.raises(MemoryBudgetError):
        tight.partial_fit(x, y)
