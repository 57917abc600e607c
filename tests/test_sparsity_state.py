"""What a sparse learner is after parameters were loaded, and after a checkpoint; graphs that were in a learner."""

from __future__ import annotations

import os
import signal

import numpy as np
import pytest

import edgetrain as et
from edgetrain import checkpoint
from edgetrain.checkpoint import read_checkpoint, write_file
from edgetrain.errors import UsageError
from edgetrain.layer_report import layer_report
from tests.sparse_networks import PROFILE, assert_equal, batch, learner, network, train

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


def test_a_checkpoint_from_before_room_was_kept_has_that_of_its_weights(tmp_path):
    made = learner(et.StaticSparse(weights=0.7, distribution="erk"))
    made.load_parameters(learner(et.StaticSparse(weights=0.7, distribution="uniform")).parameters())
    made.save(tmp_path / "new.safetensors")
    tensors, table = read_checkpoint(tmp_path / "new.safetensors")
    del table["state"]["topology"]["capacities"]
    write_file(tmp_path / "old.safetensors", *checkpoint._encode(tensors, table))
    loaded = et.Learner.load(tmp_path / "old.safetensors")
    assert train(loaded, 2) == train(made, 2)
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


def test_loaded_parameters_tell_which_layers_have_no_room_for_all():
    uniform, erk = (learner(et.StaticSparse(0.8, distribution=d, dense_first=False)) for d in ("uniform", "erk"))
    room = {name: index.capacity for name, index in erk.topology.indices.items()}
    given = uniform.parameters()
    report = erk.load_parameters(given)
    fewer = {name for name, most in room.items() if np.count_nonzero(given[name]) > most}
    assert fewer
    assert set(report.thinned) == fewer
    assert "sparse, without some of the weights given" in str(report)
    report = erk.load_parameters(erk.parameters())
    assert not report.thinned
    assert "sparse" not in str(report)


# ---- the graph of a sparse learner -----------------------------------------------------------------------------------


@pytest.mark.parametrize("again", [None, et.RigL(0.8), et.SWAT(0.8)], ids=["dense", "rigl", "swat"])
def test_a_graph_whose_weights_are_in_a_sparse_learner_is_refused(again, tmp_path):
    made = learner(et.StaticSparse(0.8))
    for source in (made, saved_and_loaded(made, tmp_path)):
        with pytest.raises(UsageError, match=r"'a.weight'.*are in a sparse learner; its export_onnx or parameters\(\)"):
            learner(again, graph=source.graph)
        graph = source.graph.copy()
        graph.arrays |= source.parameters()
        x = batch()[0]
        if again is None:
            np.testing.assert_allclose(learner(again, graph=graph).logits(x), source.logits(x), rtol=1e-4, atol=1e-5)
        else:
            assert learner(again, graph=graph).logits(x).any()


def test_the_graph_of_a_learner_with_a_dense_master_has_its_weights(tmp_path):
    made = learner(et.SWAT(0.8))
    for source in (made, saved_and_loaded(made, tmp_path)):
        taken = learner(None, graph=source.graph).parameters()
        assert_equal(taken, {name: source._parameters.view(name) for name in taken})


# ---- what is said about the beginning --------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", [et.RigL(0.8), et.SWAT(0.8, activations=0.0)], ids=["rigl", "swat"])
@pytest.mark.parametrize("trained", [False, True])
def test_a_checkpoint_keeps_what_the_weights_began_with(policy, trained, tmp_path):
    graph = network()
    graph.trained = trained
    made = learner(policy, graph=graph)
    for steps in (0, 2):
        train(made, steps)
        loaded = saved_and_loaded(made, tmp_path)
        assert loaded.topology.beginning == made.topology.beginning == policy.beginning(trained)
        assert loaded.graph.trained == made.graph.trained == (trained or steps > 0)
    made.load_parameters(network(seed=5).arrays)
    assert saved_and_loaded(made, tmp_path).topology.beginning == policy.beginning(trained=True)


@pytest.mark.parametrize("trained", [False, True])
def test_weights_of_a_file_are_trained_ones_after_a_checkpoint_too(trained, tmp_path):
    graph = network()
    graph.trained = trained
    made = learner(None, graph=graph)
    loaded = saved_and_loaded(made, tmp_path)
    assert loaded.graph.trained == trained
    taken = [learner(et.RigL(0.8), graph=source.graph) for source in (made, loaded)]
    assert taken[0].topology.beginning == taken[1].topology.beginning == et.RigL(0.8).beginning(trained)
    assert_equal(taken[1].parameters(), taken[0].parameters())


@pytest.mark.parametrize("policy", [et.RigL(weights=0.9, refresh=2), et.SWAT(weights=0.9, activations=0.0, refresh=2)],
                         ids=lambda policy: policy.name)  # fmt: skip
def test_a_learner_goes_back_to_a_state_of_its_own(policy):
    """What was made of the pattern that it has now is of no use then."""
    made = learner(policy)
    train(made, 3)
    state = made.state()
    losses = train(made, 8, 3)
    made.restore(*state)
    assert train(made, 8, 3) == losses


def test_behind_a_report_the_topology_changes_again():
    made = learner(et.RigL(weights=0.9, refresh=1))
    layer_report(made)
    assert made.topology.changes == 0
    train(made, 2)
    assert made.topology.changes == 2


def test_the_length_of_training_outlives_a_checkpoint(tmp_path):
    """Without it the topology would go on changing beyond ``until``."""
    made = learner(et.RigL(weights=0.9, refresh=1, until=0.5))
    made.fit(batch(32), epochs=4)
    loaded = saved_and_loaded(made, tmp_path)
    changes = loaded.topology.changes
    assert changes > 0
    train(loaded, 2)
    assert loaded.topology.changes == changes


# ---- interrupts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", [et.RigL(weights=0.7, refresh=2), et.SET(weights=0.7, refresh=2),
                                    et.SWAT(weights=0.7, activations=0.0, refresh=2, fade=0.9)])  # fmt: skip
def test_a_change_that_an_interrupt_strikes_is_made_whole_and_once(policy, monkeypatch):
    usual, struck, interrupts = learner(policy), learner(policy), []
    change = type(policy).after_step if policy.compact else type(policy).before_step

    def interrupted(self, topology, *arguments):
        if topology is struck.topology:
            os.kill(os.getpid(), signal.SIGINT)
        change(self, topology, *arguments)

    monkeypatch.setattr(type(policy), change.__name__, interrupted)
    x, y = batch()
    while struck.step_count < 6:
        try:
            struck.partial_fit(x, y)
        except KeyboardInterrupt:
            interrupts.append(struck.step_count)
    for _ in range(6):
        usual.partial_fit(x, y)
    assert len(interrupts) >= struck.topology.changes == usual.topology.changes >= 2
    assert_equal(struck.parameters(), usual.parameters())
