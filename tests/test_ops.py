"""Every operator: compiled kernels, readable twins and PyTorch agree on outputs and gradients, case by case."""

from __future__ import annotations

import numpy as np
import pytest

from edgetrain import reference
from edgetrain.autodiff import TARGET, training_graph
from edgetrain.graph import Graph, Node
from edgetrain.learner import Learner
from edgetrain.lowering import Lowering
from edgetrain.lowering_channels import fits
from edgetrain.ops import get_op, known_ops
from edgetrain.plan import Ref
from tests.engine import (
    assert_all_close,
    assert_close,
    assert_padding_is_zero,
    assert_same,
    channel_learner,
    learner,
    poison,
    wide_host,
)
from tests.op_cases import CASES, Case

TOLERANCE = 1e-5  # float32 against float64, relative to the largest entry; no case has a looser one
EXACT = 1e-6  # float64 against a difference quotient

pytestmark = pytest.mark.usefixtures(wide_host.__name__)

every_case = pytest.mark.parametrize("case", CASES, ids=[case.id for case in CASES])


def runs() -> list[pytest.param]:
    """Case, lanes, samples: one sample, partial vectors, full vectors, one more; wide vectors where asked."""
    sizes = [(case, 4, count) for case in CASES for count in (1, 3, 4, 5)]
    sizes += [(case, lanes, lanes + 3) for case in CASES if case.wide for lanes in (8, 16)]
    return [pytest.param(*size, id=f"{size[0].id}-L{size[1]}-N{size[2]}") for size in sizes if size[2] >= size[0].least]


def channel_runs() -> list[pytest.param]:
    """Case and samples, for the cases that can be lowered with channels in the lanes."""
    chosen = [case for case in CASES if fits(training_graph(case.graph(), case.loss).graph.nodes)]
    sizes = [(case, count) for case in chosen for count in (1, 3) if count >= case.least]
    return [pytest.param(case, count, id=f"{case.id}-N{count}") for case, count in sizes]


@pytest.mark.parametrize(("case", "count"), channel_runs())
def test_channels_in_the_lanes_agree_with_the_twins(case, count):
    x, y = case.batch(count)
    graph = case.graph()
    made = channel_learner(graph, threads=2, loss=case.loss, label_smoothing=case.label_smoothing)
    assert_close(made.logits(x), reference.evaluate(graph, x), TOLERANCE, "output")
    loss, wanted = reference.gradients(graph, x, y, case.loss, case.label_smoothing)
    assert_all_close(made.gradients(x, y), wanted, TOLERANCE)
    poison(made)
    assert_all_close(made.gradients(x, y), wanted, TOLERANCE)
    assert_padding_is_zero(made)
    assert made.partial_fit(x, y).loss == pytest.approx(loss, rel=TOLERANCE)
    alone = channel_learner(graph, loss=case.loss, label_smoothing=case.label_smoothing)
    alone.partial_fit(x, y)
    assert_same(alone.parameters(), made.parameters())


def test_most_cases_can_have_channels_in_the_lanes():
    assert len(channel_runs()) > 100


def make(case: Case, lanes: int = 4, threads: int = 1) -> Learner:
    return learner(case.graph(), lanes, threads, loss=case.loss, label_smoothing=case.label_smoothing)


@pytest.mark.parametrize(("case", "lanes", "count"), runs())
def test_kernels_agree_with_their_twins(case, lanes, count):
    x, y = case.batch(count)
    made, graph = make(case, lanes), case.graph()
    assert_close(made.logits(x), reference.evaluate(graph, x), TOLERANCE, "output")
    loss, wanted = reference.gradients(graph, x, y, case.loss, case.label_smoothing)
    assert_all_close(made.gradients(x, y), wanted, TOLERANCE)
    assert made.partial_fit(x, y).loss == pytest.approx(loss, rel=TOLERANCE)


@every_case
def test_twins_gradients_agree_with_difference_quotients(case):
    x, y = case.batch(3)
    graph, rng = case.graph(), np.random.default_rng(1)
    _, grads = reference.gradients(graph, x, y, case.loss, case.label_smoothing)
    # All parameters move at once, each by a random direction as large as its own gradient allows to see.
    moves = {name: rng.normal(size=grad.shape) for name, grad in grads.items()}
    for name in moves:
        step = 1e-6
        ends = [_moved_loss(case, graph, name, sign * step * moves[name], x, y) for sign in (1, -1)]
        slope = (ends[0] - ends[1]) / (2 * step)
        size = np.abs(grads[name]).max() * np.abs(moves[name]).sum()
        assert abs(slope - (grads[name] * moves[name]).sum()) <= EXACT * size + 1e-9, name


def _moved_loss(case: Case, graph: Graph, name: str, move: np.ndarray, x: np.ndarray, y: np.ndarray) -> float:
    """Return the loss in float64 with one parameter moved."""
    moved = graph.copy()
    moved.arrays = {n: array.astype(np.float64) for n, array in graph.arrays.items()}
    moved.arrays[name] += move
    return reference.gradients(moved, x, y, case.loss, case.label_smoothing)[0]


@every_case
def test_agrees_with_torch(case):
    torch = pytest.importorskip("torch")
    from edgetrain.torch_network import TorchNetwork

    x, y = case.batch(5)
    made, graph = make(case), case.graph()
    # The judge knows no dropout, its masks being random; with a ratio of 0 it is nothing.
    graph.nodes = [Node("Identity", n.name, n.inputs, n.outputs) if n.op_type == "Dropout" else n for n in graph.nodes]
    judge = TorchNetwork(graph, case.loss)
    assert_close(made.logits(x), judge.output(x), TOLERANCE, "output")
    judge.training = True
    out = judge.forward(x)
    if case.loss == "mse":
        loss = torch.nn.functional.mse_loss(out, torch.tensor(y, dtype=torch.float64))
    else:
        loss = torch.nn.functional.cross_entropy(out, torch.tensor(y), label_smoothing=case.label_smoothing)
    loss.backward()
    wanted = {name: judge.tensors[name].grad.numpy() for name in made.graph.trainable}
    assert_all_close({name: made.gradients(x, y)[name] for name in wanted}, wanted, TOLERANCE)


@every_case
def test_a_step_writes_all_it_reads(case):
    x, y = case.batch(5)
    clean, dirty = make(case), make(case)
    wanted, output = clean.gradients(x, y), clean.logits(x)
    dirty.gradients(x, y)
    poison(dirty)
    assert_same(dirty.gradients(x, y), wanted)
    poison(dirty)
    assert_same({"output": dirty.logits(x)}, {"output": output})
    poison(dirty)
    dirty.partial_fit(x, y)
    clean.partial_fit(x, y)
    assert_same(dirty.parameters(), clean.parameters())
    assert dirty._parameters.buffers["result"].tobytes() == clean._parameters.buffers["result"].tobytes()


@pytest.mark.parametrize("threads", [2, 3])
@every_case
def test_results_do_not_depend_on_threads(case, threads):
    x, y = case.batch(9)
    alone, together = make(case), make(case, threads=threads)
    wanted = alone.gradients(x, y)
    assert_same(together.gradients(x, y), wanted)
    assert_same(together.gradients(x, y), wanted)
    assert_same({"output": together.logits(x)}, {"output": alone.logits(x)})


@every_case
def test_lanes_without_a_sample_do_not_matter(case, monkeypatch):
    x, y = case.batch(8)
    wanted = make(case).gradients(x[:5], y[:5])
    emit = Lowering.emit

    def emit_crowded(low, kernel, sizes, jobs, **arguments):
        if kernel == "pack_input":  # fill the three lanes behind the last sample, too
            low.plan.fixed["everyone"] = np.full(1, low.plan.capacity)
            arguments["state"] = Ref("everyone")
        emit(low, kernel, sizes, jobs, **arguments)

    monkeypatch.setattr(Lowering, "emit", emit_crowded)
    crowded, full = make(case), {"source:input": x, f"source:{TARGET}": y}
    executor, sources, _ = crowded._take_batch(x[:5], y[:5])
    executor.run({name: full[name] for name in sources}, until="backward")
    assert_same({name: crowded._parameters.view(name, "gradients").copy() for name in wanted}, wanted)


def _operators(graph: Graph, training: bool, loss: str) -> set[str]:
    return {node.op_type for node in (training_graph(graph, loss).graph if training else graph).nodes}


def test_the_table_covers_every_operator():
    graphs = [(case.graph(), case.loss) for case in CASES]
    used = set().union(*(_operators(graph, training, loss) for graph, loss in graphs for training in (False, True)))
    # What policies insert is tested in test_pruning.py, what comes before max pools in test_pooled_errors.py, both
    # gradients at once in test_csr.py.
    inserted = {f"edgetrain.ops.{name}" for name in ("pruning", "gradient_pruning", "pooled_gradient", "product_grads")}
    every = {*known_ops(), *known_ops(training_only=True)}
    every.remove("ResidualNormalizationMaskGrad")  # SWAT makes it: tested in test_rewrites.py, test_sparsity_swat.py
    assert used == {name for name in every if type(get_op(name)).__module__ not in inserted}
