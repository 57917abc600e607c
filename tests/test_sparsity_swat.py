"""SWAT: its choice of weights, its variants, pruned activations; and the report of layers."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

import edgetrain as et
from edgetrain.errors import CheckpointError, NumericalError, UsageError
from edgetrain.graph import Graph
from edgetrain.kernels.codes import DENSITY, RECORD
from edgetrain.layer_report import layer_report
from edgetrain.sparsity.layers import entries
from edgetrain.sparsity.policy import largest
from edgetrain.sparsity.swat import momentum_densities
from tests.sparse_networks import CLASSES, SHAPE, assert_equal, batch, learner, network, patterns, train

# ---- SWAT ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["unstructured", "erk"])
def test_swat_keeps_the_largest_weights_of_a_dense_master(variant):
    made = learner(et.SWAT(weights=0.8, activations=0.0, variant=variant, refresh=4))
    seen = []
    for step in range(9):
        masters = {name: made._parameters.view(name).copy() for name in made.topology.indices}
        train(made, 1, step)
        seen.append(patterns(made))
        if step % 4 == 0:
            for name, mask in seen[-1].items():
                np.testing.assert_array_equal(mask, largest(np.abs(masters[name]), int(mask.sum())))
        else:
            assert_equal(seen[-1], seen[-2])
    assert any((seen[8][name] != seen[0][name]).any() for name in seen[0])


def test_swat_moves_weights_that_do_not_exist():
    made = learner(et.SWAT(weights=0.8, activations=0.0, fade=1), optimizer=et.SGD(lr=0.1))
    name = "b.weight"
    before = made._parameters.view(name).copy()
    grads = made.gradients(*batch(8))[name]
    made.partial_fit(*batch(8))
    outside = ~made.topology.indices[name].mask()
    assert np.count_nonzero(grads[outside])
    np.testing.assert_allclose(made._parameters.view(name)[outside], (before - 0.1 * grads)[outside], atol=1e-6)


@pytest.mark.parametrize(("refresh", "factor"), [(10, 0.5**0.1), (3, 0.5**0.03)])
def test_weights_outside_the_pattern_fade_when_others_are_chosen(refresh, factor):
    policy = et.SWAT(weights=0.8, activations=0.0, refresh=refresh, fade=0.5)
    made, name = learner(policy, optimizer=et.SGD(lr=0.0)), "b.weight"
    first = made._parameters.view(name).copy()
    outside = ~made.topology.indices[name].mask()
    for step in range(2 * refresh + 1):
        train(made, 1, step)
        choices = step // refresh + 1
        expected = np.where(outside, first * factor**choices, first)
        np.testing.assert_allclose(made._parameters.view(name), expected, rtol=1e-5)
    np.testing.assert_array_equal(outside, ~made.topology.indices[name].mask())


def test_nothing_fades_where_all_weights_exist():
    made = learner(et.SWAT(weights=0.0, activations=0.5, fade=0.0), optimizer=et.SGD(lr=0.0))
    before = made.parameters()
    train(made, 3)
    assert_equal({n: a for n, a in made.parameters().items() if n in made.graph.trainable},
                 {n: a for n, a in before.items() if n in made.graph.trainable})  # fmt: skip


@pytest.mark.parametrize("rescale", [True, False])
def test_the_largest_initial_weights_get_the_norm_of_all(rescale):
    original = network().arrays["b.weight"]
    made = learner(et.SWAT(weights=0.8, activations=0.0, rescale=rescale))
    kept, master = made.parameters()["b.weight"], made._parameters.view("b.weight")
    factor = np.linalg.norm(original) / np.linalg.norm(np.where(kept, original, 0)) if rescale else 1.0
    np.testing.assert_allclose(master, factor * original, rtol=1e-6)
    np.testing.assert_array_equal(kept[kept != 0], master[kept != 0])


def test_structured_swat_keeps_whole_kernels():
    made = learner(et.SWAT(weights=0.6, activations=0.0, variant="structured"))
    array = network().arrays["b.weight"]
    mask = made.topology.indices["b.weight"].mask().reshape(12, 8, 9)
    assert (mask.all(2) == mask.any(2)).all()
    norms = np.abs(array).reshape(12, 8, 9).sum(2)
    np.testing.assert_array_equal(mask.all(2), largest(norms, entries(96, 0.4)))


def test_momentum_shares_out_all_weights():
    made = learner(et.SWAT(weights=0.8, activations=0.0, variant="momentum", refresh=2))
    train(made, 5)
    densities, layers = momentum_densities(made.topology, 0.2), made.topology.layers
    total = sum(layer.size for layer in layers)
    assert sum(densities[layer.weight] * layer.size for layer in layers) == pytest.approx(0.2 * total)
    assert max(densities.values()) <= 0.99
    means = {}
    for layer in layers:
        moment = made._parameters.view(layer.weight, "velocity")
        means[layer.weight] = np.abs(moment[made.topology.indices[layer.weight].mask()]).mean()
        assert made.topology.mean_momentum(layer) == pytest.approx(means[layer.weight], rel=1e-6)
    counts = {layer.weight: densities[layer.weight] * layer.size for layer in layers}
    free = [name for name in counts if densities[name] < 0.99]
    assert sorted(free, key=counts.get) == sorted(free, key=means.get)


def test_momentum_shares_out_activations_by_their_own_share():
    made = learner(et.SWAT(weights=0.8, activations=0.6, variant="momentum", refresh=2))
    train(made, 2)
    wanted = momentum_densities(made.topology, 0.4)
    train(made, 1, 2)
    found = made._parameters.buffers["records"].reshape(-1, RECORD)[:, DENSITY]
    assert len(made.topology.records) > 1
    for name, number in made.topology.records.items():
        assert found[number] == pytest.approx(wanted[name], rel=1e-6)
    assert len({wanted[name] for name in made.topology.records}) > 1


def test_momentum_needs_sparse_weights_to_go_by():
    with pytest.raises(UsageError, match=r"variant=momentum with weights=0.*expected weights above 0"):
        et.SWAT(weights=0.0, activations=0.5, variant="momentum")
    et.SWAT(weights=0.0, activations=0.0, variant="momentum")


def test_products_leave_their_lists_when_layers_get_more_weights():
    """Which kernels a step has is found out whenever a pattern changes, for every size of a batch."""
    made = learner(et.SWAT(weights=0.95, activations=0.0, variant="momentum"), optimizer=et.SGD(lr=0.0, momentum=0.9))
    made.partial_fit(*batch(8))  # chooses weights anew, as every tenth step
    seen = set()
    for share in (0.05, 0.1, 0.15, 0.3, 0.9, 0.05):
        for count in (8, 64):
            if made.step_count % 10 == 0:
                made.partial_fit(*batch(8))
            for layer in made.topology.layers:
                made.topology.set(layer, np.arange(round(share * layer.size)))
            made.partial_fit(*batch(count))
            kernels = [row.kernel for row in made.plans.latest.plan.rows]
            assert kernels == [row.kernel for row in made.plans.plan(True, count).rows]
            seen.add((count, [kernel[0] for kernel in kernels].count("multiply_csr")))
    assert len(seen) > 4


def test_a_state_with_another_pattern_brings_its_kernels():
    """Restored into a learner that has taken steps, with batches of different sizes in turns."""
    policy, optimizer = et.SWAT(weights=0.95, activations=0.0, variant="momentum"), et.SGD(lr=0.05, momentum=0.9)
    made, other = (learner(policy, optimizer=optimizer) for _ in range(2))
    for each, share in ((made, 0.05), (other, 0.9)):
        each.partial_fit(*batch(8))
        for layer in each.topology.layers:
            each.topology.set(layer, np.arange(round(share * layer.size)))
        for count in (8, 64, 8):
            each.partial_fit(*batch(count))
    made.restore(*other.state())
    fresh = learner(policy, optimizer=optimizer)
    fresh.restore(*other.state())
    for count in (8, 64, 8):
        for each in (made, other, fresh):
            each.partial_fit(*batch(count))
        rows = [[row.kernel for row in each.plans.latest.plan.rows] for each in (made, other, fresh)]
        assert rows[0] == rows[1] == rows[2]
        assert rows[0] == [row.kernel for row in fresh.plans.plan(True, count).rows]
    assert_equal(made.parameters(), other.parameters())


def test_the_momentum_variant_needs_momentum():
    with pytest.raises(UsageError, match="needs an optimizer with momentum"):
        learner(et.SWAT(variant="momentum"), optimizer=et.SGD(lr=0.1))


# ---- pruned activations ----------------------------------------------------------------------------------------------

ACTIVATIONS = {
    "unstructured": et.SWAT(weights=0.8, activations=0.7, refresh=3, group="lanes"),
    "erk": et.SWAT(weights=0.8, activations=0.7, variant="erk", refresh=3, group="lanes"),
    "momentum": et.SWAT(weights=0.8, activations=0.7, variant="momentum", refresh=3, group="lanes"),
    "activations-only": et.SWAT(weights=0.0, activations=0.7, refresh=3, group="lanes"),
}
EVERY_ACTIVATIONS = pytest.mark.parametrize("policy", ACTIVATIONS.values(), ids=ACTIVATIONS.keys())


@EVERY_ACTIVATIONS
def test_pruned_activations_change_weight_gradients_of_convolutions_only(policy):
    made, plain, (x, y) = learner(policy), learner(replace(policy, activations=0.0)), batch(8)
    got, wanted = made.gradients(x, y), plain.gradients(x, y)
    pruned = set(made.topology.records)
    assert pruned >= {"b.weight"}
    for name in wanted:
        assert (np.abs(got[name] - wanted[name]).max() > 0) == (name in pruned), name
    np.testing.assert_array_equal(made.logits(x), plain.logits(x))


@EVERY_ACTIVATIONS
def test_saved_activations_are_counted(policy):
    made = learner(policy)
    step = made.partial_fit(*batch(8))
    assert 0 < step.saved_activations == step.macs_dense - step.macs_done - step.saved_weights
    for number in made.topology.records.values():
        kept, total = made.topology.tally(number)
        assert 0 < kept < total


@EVERY_ACTIVATIONS
def test_thresholds_are_part_of_a_checkpoint(policy, tmp_path):
    made = learner(policy)
    train(made, 5)
    made.save(tmp_path / "c.safetensors")
    loaded = et.Learner.load(tmp_path / "c.safetensors")
    assert train(loaded, 6, 5) == train(made, 6, 5)
    assert_equal(loaded.parameters(), made.parameters())


@EVERY_ACTIVATIONS
def test_a_used_learner_takes_a_fresh_state_whole(policy):
    fresh, used = learner(policy), learner(policy)
    state = fresh.state()
    used.observe(*batch(3))  # three instances wait, and are forgotten
    train(used, 5)
    used.restore(*state)
    assert used.stream.waiting == 0
    assert train(used, 6) == train(fresh, 6)
    assert_equal(used.parameters(), fresh.parameters())


def test_a_state_that_does_not_fit_changes_nothing():
    made, other = learner(et.SWAT(weights=0.8)), learner(et.SWAT(weights=0.8), optimizer=et.Adam(lr=0.01))
    train(other, 2)
    before, pattern = made.parameters(), patterns(made)
    with pytest.raises(CheckpointError, match="another network or optimizer"):
        made.restore(*other.state())
    assert_equal(made.parameters(), before)
    assert_equal(patterns(made), pattern)


def test_activations_are_pruned_number_by_number(tmp_path):
    policy = et.SWAT(weights=0.5, activations=0.7, refresh=3, group="element", linear=True)
    made, plain, (x, y) = learner(policy), learner(replace(policy, activations=0.0)), batch(8)
    got, wanted = made.gradients(x, y), plain.gradients(x, y)
    assert {name for name in wanted if np.abs(got[name] - wanted[name]).max() > 0} == set(made.topology.records)
    assert {"b.weight", "grouped.weight", "c.weight", "d.weight"} <= set(made.topology.records)
    train(made, 5)
    made.save(tmp_path / "c.safetensors")
    assert train(et.Learner.load(tmp_path / "c.safetensors"), 4, 5) == train(made, 4, 5)
    assert not {"c.weight", "d.weight"} & set(learner(replace(policy, linear=False)).topology.records)
    with pytest.raises(UsageError, match="linear=true with group=lanes"):
        et.SWAT(group="lanes", linear=True)
    with pytest.raises(UsageError, match="group='vectors', expected one of element, lanes"):
        et.SWAT(group="vectors")


def test_a_state_from_before_a_setting_came_is_taken():
    policy = et.SWAT(weights=0.8)
    made, other = learner(policy), learner(policy)
    train(made, 3)
    tensors, meta = made.state()
    meta["topology"]["policy"] = meta["topology"]["policy"].replace("dense_last=false,", "")
    other.restore(tensors, meta)
    assert train(other, 3, 3) == train(made, 3, 3)


def test_a_broken_pattern_of_one_layer_leaves_all_layers_alone():
    made = learner(et.SWAT(weights=0.8))
    tensors, meta = made.state()
    before, name = patterns(made), next(key for key in reversed(tensors) if key.endswith("/columns"))
    with pytest.raises(CheckpointError, match="another network"):
        made.restore({**tensors, name: tensors[name] + 10_000}, meta)
    assert_equal(patterns(made), before)


def test_asking_for_gradients_leaves_thresholds_alone():
    one, other = (learner(ACTIVATIONS["erk"]) for _ in range(2))
    train(one, 2)
    train(other, 2)
    one.gradients(*batch(8, seed=50))
    assert train(one, 3, 2) == train(other, 3, 2)


# ---- the report ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "policy", [et.RigL(weights=0.8, refresh=3, total_steps=40), ACTIVATIONS["erk"]], ids=["rigl", "swat"]
)
def test_the_report_tells_what_every_layer_did_and_changes_nothing(policy):
    made, twin = learner(policy), learner(policy)
    train(made, 2)
    train(twin, 2)
    report = layer_report(made)
    assert [layer.name for layer in report] == [n for n in network().arrays if n.endswith("weight")]
    step = made.partial_fit(*batch(8, 2))
    assert sum(layer.macs_dense for layer in report) == step.macs_dense
    for layer in report:
        index = made.topology.indices.get(layer.name)
        assert layer.density == (1 if index is None else index.density)
        assert layer.seconds > 0
        skips = "lists of weights" in layer.kernels or layer.name in made.topology.records
        assert (layer.macs_done < layer.macs_dense) == skips
    assert twin.partial_fit(*batch(8, 2)).loss == step.loss


@pytest.mark.parametrize("refresh", [1, 3, 100])
def test_the_report_is_about_the_topology_of_the_last_step(refresh):
    """Whatever the next steps would choose: plans, densities and operations belong together."""
    made = learner(et.SWAT(weights=0.6, activations=0.6, variant="momentum", refresh=refresh))
    steps = [made.partial_fit(*batch(8, number)) for number in range(7)]
    before, changes = made.parameters(), made.topology.changes
    report = layer_report(made)
    assert sum(layer.macs_done for layer in report) == pytest.approx(steps[-1].macs_done, rel=1e-3)
    assert [layer.name for layer in report] == [n for n in network().arrays if n.endswith("weight")]
    assert made.topology.changes == changes
    assert all(np.array_equal(before[name], array) for name, array in made.parameters().items())


@pytest.mark.parametrize(
    ("group", "pruning", "word"),
    [
        ("element", None, "lists of activations"),
        ("lanes", et.ErrorMapPruning(keep=0.5), "lists of activations"),
        (None, et.GradientPruning(rate=0.8, group="lanes"), "lists of errors"),
    ],
)
def test_the_report_counts_what_all_methods_skip(group, pruning, word):
    """And of error maps the dense products, not those of the kept channels, are the whole."""
    policy = et.SWAT(weights=0.5, activations=0.8, group=group) if group else et.RigL(weights=0.5)
    made = learner(policy, error_pruning=pruning)
    for step in range(8):  # gradients are pruned after the first five
        made.partial_fit(*batch(32, step))
    state = made.state()
    rng = np.random.default_rng(0)  # what layer_report trains on
    x = rng.random((made.batch_size, *SHAPE), np.float32)
    y = rng.integers(0, CLASSES, made.batch_size)
    with made.topology.held():
        step = [made.partial_fit(x, y) for _ in range(7)][-1]
    made.restore(*state)
    report = layer_report(made)
    assert sum(layer.macs_dense for layer in report) == step.macs_dense
    assert sum(layer.macs_done for layer in report) == pytest.approx(step.macs_done, rel=1e-3)
    assert any(word in layer.kernels for layer in report)


@pytest.mark.parametrize(("group", "linear"), [("element", False), ("element", True), ("lanes", False)])
@pytest.mark.parametrize("shape", [(6, 2, 3, 3), (4, 2, 2, 3), (2, 2, 2, 1)])
def test_gradients_are_pytorchs_with_masked_weights_and_masked_saved_activations(group, linear, shape):
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(3)
    graph = Graph("small", input_shape=SHAPE)
    x = graph.add("Conv", ["input", graph.parameter("conv.weight", rng.normal(size=shape))], pads=[1] * 4)
    dense = graph.parameter("fc.weight", rng.normal(size=(CLASSES, graph.values[x].size)))
    graph.set_outputs([graph.add("Gemm", [graph.add("Flatten", [graph.add("Relu", [x])]), dense], transB=1)])
    policy = et.SWAT(weights=0.7, activations=0.8, dense_first=False, group=group, linear=linear)
    made = learner(policy, graph=graph)
    images, labels = batch(24)
    got, weights = made.gradients(images, labels), made.parameters()
    conv, fc = (torch.tensor(weights[f"{name}.weight"], dtype=torch.float64) for name in ("conv", "fc"))
    out = torch.nn.functional.conv2d(torch.tensor(images, dtype=torch.float64), conv, padding=1).requires_grad_()
    hidden = out.relu().flatten(1)
    logits = hidden @ fc.T
    error, error_fc = torch.autograd.grad(
        torch.nn.functional.cross_entropy(logits, torch.tensor(labels)), [out, logits]
    )
    kept = {name: made.topology.tally(record)[0] for name, record in made.topology.records.items()}
    hidden = hidden.detach().numpy()
    if group == "lanes":
        saved = _largest_vectors(images, made.plans.lanes, kept["conv.weight"])
    else:
        saved = np.where(largest(np.abs(images), kept["conv.weight"]), images, 0)
    assert ("fc.weight" in kept) == linear
    if linear:
        hidden = np.where(largest(np.abs(hidden).astype(np.float32), kept["fc.weight"]), hidden, 0)
    saved = torch.tensor(saved, dtype=torch.float64)
    wanted_conv = torch.nn.grad.conv2d_weight(saved, conv.shape, error, padding=1).numpy()
    for name, right in (("conv.weight", wanted_conv), ("fc.weight", error_fc.numpy().T @ hidden)):
        assert np.abs(got[name] - right).max() <= 1e-4 * np.abs(right).max(), name
    assert np.count_nonzero(got["conv.weight"][~patterns(made)["conv.weight"]]), "weights that do not exist learn too"


def _largest_vectors(images: np.ndarray, lanes: int, kept: int) -> np.ndarray:
    """Return images with zeros but for ``kept`` pixels of ``lanes`` samples each, those with the largest norm."""
    blocks = images.reshape(-1, lanes, *images.shape[1:])
    norms = np.square(blocks).sum(1)
    mask = largest(norms.astype(np.float32), kept)
    return np.where(mask[:, None], blocks, 0).reshape(images.shape)


# ---- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("graph", [lambda: et.models.resnet((1, 12, 12), depth=8), et.models.lenet5],
                         ids=["resnet8", "lenet5"])  # fmt: skip
@pytest.mark.parametrize("group", ["element", "lanes"])
def test_bits_of_relus_change_no_bit_of_training(graph, group, monkeypatch):
    def trained() -> tuple[et.Learner, dict[str, np.ndarray]]:
        made = et.Learner(graph(), batch_size=8, threads=1, seed=1, sparsity=et.SWAT(0.8, activations=0.8, group=group))
        rng = np.random.default_rng(0)
        for _ in range(4):
            made.partial_fit(rng.random((8, *made.graph.input_shape), np.float32), rng.integers(0, 10, 8))
        return made, made.parameters()

    made, parameters = trained()
    used = {node.op_type for node in made.plans.training.graph.nodes}
    assert used >= ({"ResidualNormalizationMaskGrad"} if len(parameters) > 20 else {"ReluMaskGrad"})
    for name in ("keep_masks", "keep_residual_masks"):
        monkeypatch.setattr(f"edgetrain.sparsity.swat.{name}", lambda train, forward_count: 0)
    plain, expected = trained()
    assert plain.memory_plan().peak_bytes > made.memory_plan().peak_bytes
    assert_equal(parameters, expected)


@pytest.mark.parametrize("count", [3, 8])
def test_error_maps_are_chosen_by_their_sums_where_relus_are_bits(count, monkeypatch):
    def trained() -> tuple[set[str], dict[str, np.ndarray]]:
        policies = {"sparsity": et.SWAT(0.8, activations=0.3), "error_pruning": et.ErrorMapPruning(keep=0.5)}
        made = et.Learner(et.models.resnet((1, 12, 12), depth=8), batch_size=count, threads=1, seed=1, **policies)
        rng = np.random.default_rng(0)
        for _ in range(3):
            made.partial_fit(rng.random((count, 1, 12, 12), np.float32), rng.integers(0, 10, count))
        return {node.op_type for node in made.plans.training.graph.nodes}, made.parameters()

    used, parameters = trained()
    assert "PrunedResidualNormalizationMaskGrad" in used and "KeptChannels" not in used
    monkeypatch.setattr("edgetrain.sparsity.swat.keep_residual_masks", lambda train, forward_count: 0)
    plain, expected = trained()
    assert "PrunedResidualNormalizationGrad" in plain and "PrunedResidualNormalizationMaskGrad" not in plain
    assert_equal(parameters, expected)


def test_choices_are_close_together_at_first():
    """A weight that waits a hundred steps outside the pattern is far from what the others have learned meanwhile."""
    made = et.Learner(et.models.lenet5(), batch_size=8, threads=1, sparsity=et.SWAT(0.9, activations=0.0))
    rng, changed = np.random.default_rng(0), []
    for step in range(421):
        before = made.topology.changes
        made.partial_fit(rng.random((8, 1, 28, 28), np.float32), rng.integers(0, 10, 8))
        if made.topology.changes > before:
            changed.append(step)
    assert set(changed) <= {*range(0, 400, 10), 400, 420}
    assert len(changed) > 15  # not all, as random labels leave little to learn
    policy = et.SWAT(refresh=100)
    chosen = [step for step in range(4000) if step % policy._period(step) == 0]
    gaps = np.diff(chosen)
    assert (gaps[:40] == 10).all() and (np.diff(gaps) >= 0).all() and gaps[-1] == 100
    assert [policy._period(step) for step in (0, 399, 400, 800, 1599, 1600, 3200)] == [10, 10, 20, 40, 40, 80, 100]
    assert {step % 3 for step in range(500) if step % et.SWAT(refresh=3)._period(step) == 0} == {0}


def test_lists_instead_of_maps_save_memory():
    dense, sparse = (
        et.Learner(et.models.resnet((3, 32, 32), depth=20), batch_size=32, threads=1, sparsity=policy).memory_plan()
        for policy in (None, et.SWAT(0.9, activations=0.9))
    )
    assert sparse.peak_bytes < 0.85 * dense.peak_bytes


def test_thresholds_of_all_layers_are_remembered_in_one_row():
    made = et.Learner(et.models.resnet(), batch_size=4, sparsity=et.SWAT(weights=0.5, activations=0.5))
    rows = made.training_plan().rows
    assert sum(row.kernel[0] == "element_threshold" for row in rows) > 1
    assert [row.stage for row in rows if row.kernel[0] == "remember_thresholds"] == ["update"]


@pytest.mark.parametrize("size", [2, 8, 40])
def test_the_copy_with_zeros_is_written_once_a_step_and_gives_the_gradients_of_a_network_with_zeros(size):
    """It lies where the weights' gradient will be: nothing that is written there may come before the input gradient."""
    sparse, dense = (et.Learner(et.models.lenet5(), batch_size=size, **kw)
                     for kw in ({"sparsity": et.SWAT(weights=0.5, activations=0)}, {}))  # fmt: skip
    dense.load_parameters(sparse.parameters())
    rows = sparse.training_plan().rows
    copies = [row.arguments[1] for row in rows if row.kernel[0] == "mask_bits"]
    assert copies
    assert len(set(copies)) == len(copies)
    assert {copy.buffer for copy in copies} == {"gradients"}
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(size, 1, 28, 28)).astype(np.float32), np.arange(size) % 10
    for _ in range(2):  # gradients lie there after the first pass
        found, wanted = sparse.gradients(x, y), dense.gradients(x, y)
        for name in wanted:
            np.testing.assert_allclose(found[name], wanted[name], rtol=1e-4, atol=1e-6, err_msg=name)


def test_a_budget_that_holds_the_first_plan_holds_those_of_moved_weights_too():
    """Momentum fills small layers, whose lists and dense kernels need different memory."""
    rng, graph, x, channels = np.random.default_rng(0), Graph("convolutions", input_shape=(16, 16, 16)), "input", 16
    for number, outputs in enumerate((32, 64, 128)):
        weight = graph.parameter(f"w{number}", rng.normal(0, 0.02, (outputs, channels, 3, 3)))
        x = graph.add("Relu", [graph.add("Conv", [x, weight], pads=[1] * 4, strides=[2, 2])])
        channels = outputs
    weight = graph.parameter("fc", rng.normal(0, 0.02, (10, 512)))
    graph.set_outputs([graph.add("Gemm", [graph.add("Flatten", [x]), weight], transB=1)])
    policy = et.SWAT(weights=0.5, activations=0, variant="momentum")
    sizes = set()
    made = et.Learner(
        graph, batch_size=32, threads=1, memory_budget=0, sparsity=policy, optimizer=et.SGD(lr=0.01, momentum=0.9)
    )
    promised = made.memory_plan().peak_bytes
    for _ in range(25):
        made.partial_fit(rng.random((32, 16, 16, 16), np.float32), rng.integers(0, 10, 32))
        sizes.add(made.plans.memory(made.plans.latest.plan).peak_bytes)
    assert len(sizes) > 1
    assert max(sizes) <= promised


def test_what_a_full_layer_cannot_take_goes_to_the_others_until_they_are_full():
    sizes, means = {"a": 100, "b": 100, "c": 1000}, {"a": 100.0, "b": 30.0, "c": 10.0}
    layers = [SimpleNamespace(weight=name, size=size) for name, size in sizes.items()]
    topology = SimpleNamespace(layers=layers, mean_momentum=lambda layer: means[layer.weight])
    assert momentum_densities(topology, 0.3) == pytest.approx({"a": 0.99, "b": 0.99, "c": (360 - 2 * 99) / 1000})


# ---- steps that are tried again --------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["unstructured", "momentum"])
def test_a_checkpoint_behind_a_refused_step_does_not_choose_again(variant, tmp_path):
    made = learner(et.SWAT(weights=0.8, variant=variant, refresh=3, fade=0.5))
    train(made, 12)
    x, y = batch(8, 12)
    with pytest.raises(NumericalError):  # at step 12, before which weights are chosen
        made.partial_fit(x * np.float32(5e37), y)
    made.save(tmp_path / "c.safetensors")
    again = et.Learner.load(tmp_path / "c.safetensors")
    assert train(made, 5, 12) == train(again, 5, 12)
    assert_equal(again.parameters(), made.parameters())


def test_a_refused_step_changes_nothing_of_what_is_computed():
    """Which products run on lists goes by the weights that were chosen before the step, at the first try too."""
    policy = et.SWAT(weights=0.8, activations=0.8, variant="momentum", refresh=3)
    one, two = learner(policy), learner(policy)
    for step in range(40):
        x, y = batch(8, step)
        with pytest.raises(NumericalError):
            two.partial_fit(x * np.float32(5e37), y)
        results = [made.partial_fit(x, y) for made in (one, two)]
        assert results[0].macs_done == results[1].macs_done
        assert results[0].loss == results[1].loss
    assert_equal(one.parameters(), two.parameters())


def test_shares_that_momentum_sets_hold_from_the_next_step_on():
    made = learner(et.SWAT(weights=0.8, activations=0.8, variant="momentum", group="element"))
    train(made, 12)
    records = made._parameters.buffers["records"].reshape(-1, RECORD)
    wanted = {name: float(records[number, DENSITY]) for name, number in made.topology.records.items()}
    assert len(set(wanted.values())) > 1
    for name, number in made.topology.records.items():
        kept, total = made.topology.tally(number)
        assert kept / total <= wanted[name] + 0.1, name
