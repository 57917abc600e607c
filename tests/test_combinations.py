"""Methods together: sparse weights with pruned error maps, and with filters."""

from __future__ import annotations

import numpy as np
import pytest

import edgetrain as et
from edgetrain.pruning import ErrorPruning

BATCH = 6
PRUNINGS = {
    "channels": et.ErrorMapPruning(keep=0.5),
    "element": et.GradientPruning(rate=0.9, group="element"),
    "lanes": et.GradientPruning(rate=0.75, group="lanes"),
}
# Compact storage (lists of non-zeros, too dense for lists) and a dense master.
SPARSITIES = {
    "static": et.StaticSparse(weights=0.9),
    "static-dense-kernels": et.StaticSparse(weights=0.3),
    "rigl": et.RigL(weights=0.8),
    "swat": et.SWAT(weights=0.8, activations=0.5),
}
GRAPHS = {"lenet5": lambda: et.models.lenet5(), "resnet8": lambda: et.models.resnet(input_shape=(3, 16, 16), depth=8)}


def learner(graph: str, pruning: ErrorPruning | None, sparsity: str | None, threads: int = 1) -> et.Learner:
    chosen = None if sparsity is None else SPARSITIES[sparsity]
    return et.Learner(
        GRAPHS[graph](), batch_size=BATCH, threads=threads, memory_budget=0, sparsity=chosen, error_pruning=pruning,
        optimizer=et.SGD(lr=0.01, momentum=0.9),
    )  # fmt: skip


def batch(made: et.Learner, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(BATCH, *made.graph.input_shape)).astype(np.float32)
    return x, rng.integers(0, 10, BATCH)


@pytest.mark.parametrize("sparsity", SPARSITIES)
@pytest.mark.parametrize("pruning", PRUNINGS)
@pytest.mark.parametrize("graph", GRAPHS)
def test_all_methods_train_together(graph, pruning, sparsity):
    alone, together = (learner(graph, PRUNINGS[pruning], sparsity, threads) for threads in (1, 2))
    for seed in range(3):
        x, y = batch(alone, seed)
        step = alone.partial_fit(x, y)
        assert np.isfinite(step.loss)
        assert step.macs_done <= step.macs_dense
        together.partial_fit(x, y)
    for name, array in alone.parameters().items():
        assert np.isfinite(array).all(), name
        assert array.tobytes() == together.parameters()[name].tobytes(), name


@pytest.mark.parametrize("pruned", ["element", "lanes"])
@pytest.mark.parametrize("group", ["element", "lanes"])
def test_pruned_activations_meet_pruned_gradients_at_the_same_places(group, pruned):
    """The error map behind a Flatten has no border, its pruned copy has one; in the first steps nothing is pruned."""
    rng, graph = np.random.default_rng(0), et.Graph("n", input_shape=(4, 8, 8))

    def weight(name, *shape):
        return graph.parameter(name, rng.normal(0, 0.3, shape))

    x = graph.add("Conv", ["input", weight("a", 6, 4, 3, 3)], pads=[1] * 4)
    x = graph.add("Conv", [x, weight("b", 8, 6, 3, 3)], pads=[1] * 4)
    statistics = [graph.parameter(name, np.full(8, value), name in ("scale", "bias"))
                  for name, value in (("scale", 1), ("bias", 0), ("mean", 0), ("var", 1))]  # fmt: skip
    x = graph.add("Relu", [graph.add("BatchNormalization", [x, *statistics])])
    graph.set_outputs([graph.add("Gemm", [graph.add("Flatten", [x]), weight("c", 5, 512)], transB=1)])
    x, y = rng.normal(size=(16, 4, 8, 8)).astype(np.float32), np.arange(16) % 5
    whole, given = (
        et.Learner(graph, batch_size=16, threads=1, memory_budget=0, error_pruning=pruning,
                   sparsity=et.SWAT(weights=0.5, activations=0.9, group=group)).gradients(x, y)
        for pruning in (None, et.GradientPruning(rate=0.9, group=pruned))
    )  # fmt: skip
    for name, array in whole.items():
        np.testing.assert_allclose(given[name], array, rtol=1e-4, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("sparsity", ["static", "static-dense-kernels"])
def test_weights_that_do_not_exist_stay_zero(sparsity):
    made = learner("resnet8", PRUNINGS["channels"], sparsity)
    before = {name: array != 0 for name, array in made.parameters().items() if array.ndim > 1}
    for seed in range(3):
        made.partial_fit(*batch(made, seed))
    after = made.parameters()
    assert any(not mask.all() for mask in before.values())
    assert all(not after[name][~mask].any() for name, mask in before.items())


@pytest.mark.parametrize("method", [et.RandomFilter(rate=0.5), et.SelectiveBackprop(rate=0.5)], ids=["random", "loss"])
def test_a_filter_before_sparse_pruned_training(method):
    made = et.Learner(
        GRAPHS["lenet5"](), batch_size=BATCH, threads=1, memory_budget=0, sparsity=SPARSITIES["rigl"],
        error_pruning=PRUNINGS["channels"], instance_filter=method,
    )  # fmt: skip
    x, _ = batch(made)
    many = np.concatenate([x] * 10), np.arange(60) % 10
    record = made.fit(many, epochs=1).epochs[-1]
    assert record.macs_done < record.macs_dense


@pytest.mark.parametrize("weights", [0.0, 0.8])
def test_pruned_activations_train_with_batches_of_one(weights):
    made = et.Learner(GRAPHS["lenet5"](), batch_size=1, threads=1, sparsity=et.SWAT(weights=weights, activations=0.5))
    x, y = batch(made)
    assert np.isfinite(made.partial_fit(x[:1], y[:1]).loss)


def test_a_filter_counts_what_skipped_instances_would_have_cost_densely():
    made = et.Learner(
        GRAPHS["lenet5"](), batch_size=BATCH, threads=1, error_pruning=PRUNINGS["channels"],
        instance_filter=et.RandomFilter(rate=0.5),
    )  # fmt: skip
    x, y = batch(made)
    step = made.observe(np.concatenate([x] * 10), np.tile(y, 10))
    waiting = step.instances_kept - step.instances_trained
    assert step.macs_dense == (step.instances_seen - waiting) * made.plans.dense_macs
    assert step.macs_done < step.macs_dense / 2 + made.plans.dense_macs * BATCH
