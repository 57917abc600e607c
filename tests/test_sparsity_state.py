"""What a sparse learner is after parameters were loaded, and after a checkpoint; graphs that were in a learner."""

from __future__ import annotations

import numpy as np
import pytest

import edgetrain as et
from tests.sparse_networks import PROFILE, assert_equal, batch, learner, train

# ---- parameters that bring other densities, then a checkpoint --------------------------------------------------------


def saved_and_loaded(made: et.Learner, path) -> et.Learner:
    made.save(path / "c.safetensors")
    return et.Learner.load(path / "c.safetensors")


@pytest.mark.parametrize("variant", ["unstructured", "erk", "momentum", "structured"])
def test_room_for_weights_outlives_loaded_parameters_and_a_checkpoint(variant, tmp_path):
    made = learner(et.SWAT(weights=0.7, activations=0.0, variant=variant, dense_first=False, refresh=2))
    other = "uniform" if variant == "erk" else "erk"
    made.load_parameters(learner(et.StaticSparse(weights=0.7, distribution=other)).parameters())
    loaded = saved_and_loaded(made, tmp_path)
    room = {name: index.capacity for name, index in made.topology.indices.items()}
    assert {name: index.capacity for name, index in loaded.topology.indices.items()} == room
    assert loaded.topology.densities == made.topology.densities
    assert train(loaded, 5) == train(made, 5)
    assert_equal(loaded.parameters(), made.parameters())


def test_what_depends_on_the_room_for_weights_stays_after_a_checkpoint(tmp_path):
    """Layers whose errors are pruned, and whether lanes hold channels, are decided by capacities."""
    graph = et.models.resnet((3, 16, 16), depth=8)
    given = et.Learner(graph, PROFILE, threads=1, sparsity=et.StaticSparse(weights=0.7)).parameters()
    policy = et.SWAT(weights=0.7, activations=0.0, dense_first=False)
    pruned = et.Learner(graph, PROFILE, batch_size=8, threads=1, sparsity=policy,
                        error_pruning=et.GradientPruning(rate=0.85, group="lanes"))  # fmt: skip
    pruned.load_parameters(given)
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(8, 3, 16, 16)).astype(np.float32), rng.integers(0, 10, 8)
    pruned.partial_fit(x, y)
    loaded = saved_and_loaded(pruned, tmp_path)
    assert loaded.plans.training.records == pruned.plans.training.records
    assert loaded.partial_fit(x, y).loss == pruned.partial_fit(x, y).loss
    assert_equal(loaded.parameters(), pruned.parameters())
