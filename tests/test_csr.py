"""Products with sparse weights against their readable twins with zeros in place: every shape, any topology."""

from __future__ import annotations

import numpy as np
import pytest

from edgetrain import reference
from edgetrain.autodiff import LABELS, TARGET, training_graph
from edgetrain.choice import simd_lanes
from edgetrain.combining import combine_gradients
from edgetrain.executor import Team
from edgetrain.graph import Graph
from edgetrain.kernels.registry import argument_names
from edgetrain.learner import Learner
from edgetrain.lowering_sparse import Grid
from edgetrain.ops import get_op
from edgetrain.ops.conv import ProductOp
from edgetrain.sparse_index import SparseIndex
from edgetrain.sparsity import RigL, StaticSparse
from tests.engine import PROFILE, assert_all_close, assert_close, assert_same, learner, poison, wide_host
from tests.op_cases import Case, Net, combinations, convolutions, dense

TOLERANCE = 1e-5  # float32 against float64, relative to the largest entry, as in test_ops

pytestmark = pytest.mark.usefixtures(wide_host.__name__)


def products(case: Case) -> dict[str, SparseIndex]:
    """Return an empty index for the weights of every product that reads a parameter of its own."""
    graph = case.graph()
    readers = {}
    for node in graph.nodes:
        op = get_op(node.op_type)
        if isinstance(op, ProductOp) and node.input(1).name in graph.arrays:
            readers.setdefault(node.input(1).name, []).append((node, op.product(node)))
    single = {name: users[0] for name, users in readers.items() if len(users) == 1}
    return {
        name: SparseIndex(
            node.input(1).shape, inputs_first=node.op_type != "Conv" and not node.get("transB", 0), groups=g.groups
        )
        for name, (node, g) in single.items()
    }


CASES = [case for case in (*convolutions(), *dense(), *combinations()) if products(case)]


class Sparse:
    """A learner whose weights are lists of non-zeros, in the dense arrays' memory; and the same network with zeros."""

    def __init__(self, case: Case, monkeypatch: pytest.MonkeyPatch, lanes: int = 4, threads: int = 1) -> None:
        self.case, self.indexes = case, products(case)
        monkeypatch.setattr("edgetrain.lowering_sparse._DIRECT_SHARES", (1e9,) * 7)
        monkeypatch.setattr("edgetrain.lowering_sparse._WINOGRAD_SHARE", np.inf)
        self.learner: Learner = learner(case.graph(), lanes, threads, loss=case.loss)
        self.learner._parameters.sparse.update(self.indexes)
        self.dense = case.graph()

    def thin_out(self, seed: int, density: float) -> None:
        """Take a random topology; an output channel without weights and one with all of them are always there."""
        rng = np.random.default_rng(seed)
        for name, index in self.indexes.items():
            mask = rng.random((index.rows, index.row_size)) < density
            mask[rng.integers(index.rows)] = False
            mask[rng.integers(index.rows)] = True
            self.take(name, mask.T if index.inputs_first else mask.reshape(index.shape))

    def take(self, name: str, mask: np.ndarray) -> None:
        """Take a topology for one weight, with the values of the original network."""
        index, original = self.indexes[name], self.case.graph().arrays[name]
        index.set(mask)
        self.learner._parameters.patterns += 1
        self.dense.arrays[name] = np.where(mask, original, 0).astype(np.float32)
        flat = self.learner._parameters.view(name)
        flat[:] = np.nan  # what is behind the entries is never read
        flat[: index.count] = index.values_of(original)

    def gradients(self, x: np.ndarray, y: np.ndarray) -> dict[str, np.ndarray]:
        """Return all gradients, those of sparse weights with zeros in place."""
        found = self.learner.gradients(x, y)
        for name, index in self.indexes.items():
            flat = self.learner._parameters.view(name, "gradients")
            assert not flat[index.count :].any(), "gradients behind the last entry"
        return found

    def check(self, count: int) -> None:
        """Compare output and gradients with the twins'."""
        x, y = self.case.batch(count)
        assert_close(self.learner.logits(x), reference.evaluate(self.dense, x), TOLERANCE, "output")
        _, wanted = reference.gradients(self.dense, x, y, self.case.loss)
        for name, index in self.indexes.items():
            wanted[name] = np.where(index.mask(), wanted[name], 0)
        assert_all_close(self.gradients(x, y), wanted, TOLERANCE)
        poison(self.learner)
        assert_all_close(self.gradients(x, y), wanted, TOLERANCE)


@pytest.mark.parametrize("count", [1, 4, 9])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_sparse_products_agree_with_their_twins(case, count, monkeypatch):
    sparse = Sparse(case, monkeypatch)
    sparse.thin_out(count, 0.3)
    sparse.check(count)


@pytest.mark.parametrize("lanes", [8, 16])
@pytest.mark.parametrize("case", [case for case in CASES if case.wide], ids=lambda case: case.id)
def test_wide_vectors(case, lanes, monkeypatch):
    sparse = Sparse(case, monkeypatch, lanes)
    sparse.thin_out(lanes, 0.3)
    sparse.check(lanes + 3)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_lists_cut_into_many_parts(case, monkeypatch):
    monkeypatch.setattr("edgetrain.lowering_sparse._NEAR", 1)
    monkeypatch.setattr("edgetrain.lowering_sparse._ENTRIES_PER_PART", 0.01)
    sparse = Sparse(case, monkeypatch)
    sparse.thin_out(0, 0.4)
    sparse.check(5)


@pytest.mark.parametrize("threads", [2, 3])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_results_do_not_depend_on_threads(case, threads, monkeypatch):
    x, y = case.batch(9)
    alone, together = Sparse(case, monkeypatch), Sparse(case, monkeypatch, threads=threads)
    for sparse in (alone, together):
        sparse.thin_out(1, 0.3)
    assert_same(together.gradients(x, y), alone.gradients(x, y))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_another_topology_needs_no_other_plan(case, monkeypatch):
    x, y = case.batch(5)
    sparse = Sparse(case, monkeypatch)
    sparse.thin_out(1, 0.6)
    sparse.gradients(x, y)
    before = sparse.learner.plans.executor(True, 5)
    sparse.thin_out(2, 0.2)  # fewer entries: gradients of those before must not stay behind
    sparse.check(5)
    assert sparse.learner.plans.executor(True, 5) is before
    fresh = Sparse(case, monkeypatch)
    fresh.thin_out(2, 0.2)
    assert_same(fresh.gradients(x, y), sparse.gradients(x, y))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_no_weight_at_all(case, monkeypatch):
    sparse = Sparse(case, monkeypatch)
    for name, index in sparse.indexes.items():
        sparse.take(name, np.zeros(index.shape, bool))
    sparse.check(5)


def test_lists_are_made_when_the_topology_has_changed_and_not_before():
    case = Case("lists", (16, 8, 8), lambda net, x: net.conv(net.Relu(net.conv(x, 16, 16, 3, 3)), 16, 16, 3, 3))
    made = learner(case.graph(), 4, loss=case.loss, sparsity=RigL(weights=0.9, dense_first=False, refresh=3))
    x, y = case.batch(4)
    made.partial_fit(x, y)
    plan = made.training_plan()
    assert {row.kernel[0] for row in plan.list_rows} == {"expand_csr"}
    assert "expand_csr" not in {row.kernel[0] for row in plan.rows}
    lists = {name: array for name, array in plan.fixed.items() if name.startswith("list:")}
    first = {name: array.copy() for name, array in lists.items()}
    for array in lists.values():
        array[:] = 0
    made.partial_fit(x, y)
    assert not any(array.any() for array in lists.values())
    made.logits(x)  # another plan for as many samples has the same lists, and had not made them
    own = [name for name in made.plans.executor(False, 4).plan.fixed if name.startswith("list:")]
    assert own
    assert_same({name: lists[name] for name in own}, {name: first[name] for name in own})
    while made.topology.changes == 0:
        made.partial_fit(x, y)
    made.partial_fit(x, y)
    assert all(array.any() and not np.array_equal(array, first[name]) for name, array in lists.items()
               if array.size > 32)  # not the bounds, which may stay  # fmt: skip


def test_lists_go_with_the_last_plan_that_reads_them():
    case = Case("lists", (16, 8, 8), lambda net, x: net.conv(x, 16, 16, 3, 3))
    made = learner(case.graph(), 4, loss=case.loss, sparsity=StaticSparse(weights=0.9, dense_first=False))
    kept = made.plans.plan(True, 4)
    assert kept.list_bytes == sum(array.nbytes for array in made._parameters.lists.values()) > 0
    assert made.plans.memory(kept).parts["sparse index"] == kept.list_bytes + sum(
        index.nbytes for index in made._parameters.sparse.values()
    )
    del kept
    assert not made._parameters.lists


def test_lists_that_an_interrupt_left_unmade_are_made_before_the_next_step(monkeypatch):
    case = Case("lists", (16, 8, 8), lambda net, x: net.conv(x, 16, 16, 3, 3))
    policy = StaticSparse(weights=0.9, dense_first=False)
    some, other = (learner(case.graph(), 4, loss=case.loss, sparsity=policy) for _ in range(2))
    x, y = case.batch(4)

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as struck:
        struck.setattr(Team, "run", interrupted)
        with pytest.raises(KeyboardInterrupt):
            some.gradients(x, y)
    assert_same(some.gradients(x, y), other.gradients(x, y))


def test_an_interrupt_while_lists_are_made_takes_no_step(monkeypatch):
    case = Case("lists", (16, 8, 8), lambda net, x: net.conv(x, 16, 16, 3, 3))
    made = learner(case.graph(), 4, loss=case.loss, sparsity=StaticSparse(weights=0.9, dense_first=False))
    before, lead = made.parameters(), Team._lead

    def interrupted(*arguments):
        lead(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as struck:
        struck.setattr(Team, "_lead", interrupted)
        with pytest.raises(KeyboardInterrupt):
            made.partial_fit(*case.batch(4))
    assert made.step_count == 0
    assert_same(made.parameters(), before)


def test_steps_that_are_timed_are_those_with_the_lists_of_their_topology():
    case = Case("lists", (16, 8, 8), lambda net, x: net.conv(x, 16, 16, 3, 3))
    policy = RigL(weights=0.9, dense_first=False, refresh=1)
    timed, other = (learner(case.graph(), 4, loss=case.loss, sparsity=policy) for _ in range(2))
    x, y = case.batch(4)
    for _ in range(3):
        timed.time_rows(x, y)
        other.partial_fit(x, y)
    assert timed.topology.changes == 3
    assert_same(timed.parameters(), other.parameters())


@pytest.mark.parametrize("compact", [True, False], ids=["compact", "master"])
def test_density_one_is_dense_bit_for_bit(compact):
    def build(net: Net, x: str) -> str:
        y = net.Relu(net.conv(x, 16, 8, 3, 3, pads=[1] * 4))  # on Winograd's kernels
        y = net.Relu(net.conv(y, 12, 16, 3, 3, strides=[2, 2], pads=[1] * 4))
        return net.Gemm(net.Flatten(y), net.parameter(192, 10))

    case = Case("density-one", (8, 8, 8), build)
    x, y = case.batch(9)
    plain, sparse = learner(case.graph(), 8, loss=case.loss), learner(case.graph(), 8, loss=case.loss)
    for name, compacted in products(case).items():
        index = SparseIndex(compacted.shape, inputs_first=compacted.inputs_first, compact=compact)
        index.set(np.ones(index.shape, bool))
        sparse._parameters.view(name).reshape(-1)[:] = index.values_of(plain.graph.arrays[name]) if compact else 0
        if not compact:
            sparse._parameters.view(name)[...] = plain.graph.arrays[name]
        sparse._parameters.sparse[name] = index
    assert_same({"output": sparse.logits(x)}, {"output": plain.logits(x)})
    assert_same(sparse.gradients(x, y), plain.gradients(x, y))
    assert "winograd" in [kernel for kernel, _ in sparse.plans.executor(True, 9).plan.kernels]


@pytest.mark.parametrize(("density", "kernels"), [
    (0.2, {"multiply_csr", "gradients_csr"}),
    (0.35, {"winograd", "winograd_weight_gradient"}),
    (0.9, {"winograd", "winograd_weight_gradient"}),
])  # fmt: skip
@pytest.mark.parametrize("compact", [True, False], ids=["compact", "master"])
def test_density_chooses_between_lists_and_dense_kernels(density, kernels, compact):
    case = Case("choice", (16, 8, 8), lambda net, x: net.conv(x, 16, 16, 3, 3, pads=[1] * 4))
    made = learner(case.graph(), 4, loss=case.loss)
    name, index = next(iter(products(case).items()))
    index = SparseIndex(index.shape, capacity=int(density * index.size) if compact else None, compact=compact)
    index.set(np.arange(index.size).reshape(index.shape) < density * index.size - 1)
    made._parameters.sparse[name] = index
    used = {kernel for kernel, _ in made.plans.plan(True, 4).kernels}
    wanted = kernels if compact else {*(kernels - {"gradients_csr"}), "winograd_weight_gradient"}
    assert wanted <= used
    assert not used & ({"multiply_csr", "correlate_csr", "gradients_csr", "winograd"} - wanted)


def _blocks(net: Net, x: str) -> str:
    """Return a network in which both gradients of a product come from one pass: its input as it is, or normalised."""
    stem = net.Relu(net.norm(net.conv(x, 8, 3, 3, 3, bias=False, pads=[1] * 4)))
    y = net.Clip(net.norm(net.conv(stem, 6, 8, 3, 3, bias=False, pads=[0, 1, 2, 1])), min=0.0, max=1.5)
    y = net.norm(net.conv(y, 8, 3, 3, 3, bias=False, group=2, pads=[2] * 4, dilations=[2, 2]))
    y = net.Relu(net.Add(y, stem))
    y = net.Relu(net.norm(net.conv(y, 8, 8, 1, 1, bias=False)))
    return net.Gemm(net.Flatten(net.conv(y, 5, 8, 1, 3, strides=[2, 1])), net.parameter(4 * 5 * 5, 10))


BLOCKS = Case("blocks", (3, 7, 7), _blocks, loss="cross_entropy")


@pytest.mark.parametrize(("lanes", "count"), [(4, 1), (4, 9), (8, 8), (16, 20)])
@pytest.mark.parametrize("cut", [False, True], ids=["whole", "parts"])
def test_both_gradients_in_one_pass_agree_with_their_twins(lanes, count, cut, monkeypatch):
    if cut:
        monkeypatch.setattr("edgetrain.lowering_sparse._NEAR", 1)
        monkeypatch.setattr("edgetrain.lowering_sparse._ENTRIES_PER_PART", 0.01)
    sparse = Sparse(BLOCKS, monkeypatch, lanes)
    sparse.thin_out(count, 0.3)
    sparse.check(count)
    nodes = sparse.learner.training_plan().graph.nodes
    combined = [node for node in nodes if node.op_type == "ProductGrads"]
    assert [len(node.inputs) for node in combined] == [4, 8, 8, 4], "two inputs are normalised again on the way"
    assert sum(node.op_type == "ProductInputGrad" for node in nodes) == 2, "of 28 pixels for 20 outputs; of vectors"
    assert not any(node.op_type == "BatchNormalizationAgain" for node in nodes)


@pytest.mark.parametrize("size", [(8, 8), (9, 12), (7, 9)])
@pytest.mark.parametrize(("kernel", "pads", "strides"), [
    ((3, 3), [1, 1, 1, 1], [2, 2]), ((1, 1), [0, 0, 0, 0], [2, 2]), ((2, 3), [0, 2, 1, 0], [1, 2]),
    ((3, 3), [1, 1, 1, 1], [3, 1]), ((2, 2), [0, 0, 0, 0], [3, 2]),
], ids=str)  # fmt: skip
def test_both_gradients_in_one_pass_per_phase_of_a_stride(kernel, pads, strides, size, monkeypatch):
    def build(net: Net, x: str) -> str:
        y = net.Relu(net.norm(net.conv(x, 4, 3, 3, 3, bias=False, pads=[1] * 4)))
        return net.conv(y, 6, 2, *kernel, group=2, pads=pads, strides=strides)

    monkeypatch.setattr("edgetrain.combining._FEWEST_PIXELS", 1)
    monkeypatch.setattr("edgetrain.combining._MOST_PIXELS", 3)
    sparse = Sparse(Case("stride", (3, *size), build), monkeypatch)
    for seed, density in ((1, 0.4), (2, 0.2)):
        sparse.thin_out(seed, density)
        sparse.check(9)
    nodes = sparse.learner.training_plan().graph.nodes
    assert [len(node.inputs) for node in nodes if node.op_type == "ProductGrads"] == [8, 4]


def test_weights_that_meet_no_phase_keep_two_passes(monkeypatch):
    case = Case("narrow", (3, 2, 20), lambda net, x: net.conv(x, 4, 3, 3, 3, pads=[1] * 4, strides=[3, 1]))
    sparse = Sparse(case, monkeypatch)
    sparse.thin_out(1, 0.5)
    sparse.check(5)
    monkeypatch.setattr("edgetrain.combining._MOST_PIXELS", 10)
    assert "ProductGrads" not in [node.op_type for node in sparse.learner.training_plan().graph.nodes]


def test_an_input_that_is_computed_again_later_keeps_two_passes(monkeypatch):
    def build(net: Net, x: str) -> str:
        y = net.norm(net.Relu(net.norm(net.conv(x, 4, 3, 3, 3, bias=False, pads=[1] * 4))))
        return net.conv(y, 4, 4, 3, 3, pads=[1] * 4)

    sparse = Sparse(Case("normalised-twice", (3, 6, 6), build), monkeypatch)
    sparse.thin_out(1, 0.4)
    sparse.check(5)
    nodes = sparse.learner.training_plan().graph.nodes
    assert [len(node.inputs) for node in nodes if node.op_type == "ProductGrads"] == [4]


@pytest.mark.parametrize("case", [BLOCKS, *CASES], ids=lambda case: case.id)
def test_one_pass_is_the_same_gradients_on_paper(case, monkeypatch):
    """Every input is made before the node that stands for both gradients, and its twin agrees with theirs."""
    monkeypatch.setattr("edgetrain.lowering_sparse._WINOGRAD_SHARE", np.inf)
    monkeypatch.setattr("edgetrain.combining._MOST_PIXELS", 10)
    train = training_graph(case.graph(), case.loss)
    nodes = list(train.graph.nodes)
    made = combine_gradients(train, products(case), 1, simd_lanes())
    assert train.graph.nodes == nodes
    x, y = case.batch(3)

    def values(graph: Graph) -> dict[str, np.ndarray]:
        start = reference._start(graph, x, np.float64)
        return reference.run_nodes(graph, start | {LABELS: y, TARGET: np.asarray(y, np.float64)})

    apart, together = values(train.graph), values(made.graph)
    for name in train.gradients.values():
        np.testing.assert_allclose(together[name], apart[name], rtol=1e-9, atol=1e-12)


def test_a_normalised_map_that_two_products_need_is_computed_again_once(monkeypatch):
    def build(net: Net, x: str) -> str:
        y = net.Relu(net.norm(net.conv(x, 4, 3, 1, 1, bias=False)))
        return net.Add(net.conv(y, 3, 4, 3, 3, pads=[1] * 4), net.conv(y, 3, 4, 1, 1))

    sparse = Sparse(Case("two-readers", (3, 6, 6), build), monkeypatch)
    sparse.thin_out(1, 0.4)
    sparse.check(5)
    nodes = sparse.learner.training_plan().graph.nodes
    assert [len(node.inputs) for node in nodes if node.op_type == "ProductGrads"] == [4, 4], "the other has it"
    assert sum("Again" in node.op_type for node in nodes) == 1


def _with_sums(net: Net, x: str) -> str:
    """Return a network with sums of gradients: by a node, in a normalisation's gradient, and of a reshaped map."""
    stem = net.conv(x, 6, 3, 3, 3, pads=[1] * 4)
    y = net.Add(net.conv(net.Relu(stem), 6, 6, 3, 3, pads=[1] * 4), stem)
    first = net.Relu(net.norm(net.conv(y, 6, 6, 3, 3, bias=False, pads=[1] * 4)))
    second = net.Relu(net.Add(net.norm(net.conv(first, 6, 6, 3, 3, bias=False, pads=[1] * 4)), first))
    third = net.conv(second, 6, 6, 3, 3, bias=False, pads=[1] * 4)
    y = net.conv(net.Relu(net.Add(net.norm(third), second)), 6, 6, 3, 3, pads=[1] * 4)
    last = net.Flatten(net.conv(y, 3, 6, 3, 3, strides=[2, 2], pads=[1] * 4))
    return net.Add(net.Gemm(last, net.parameter(27, 4)), net.Gemm(net.Flatten(y), net.parameter(216, 4)))


@pytest.mark.parametrize("cut", [False, True], ids=["whole", "parts"])
@pytest.mark.parametrize(("lanes", "count"), [(4, 1), (8, 9), (16, 20)])
def test_one_pass_adds_to_a_gradient_that_is_there_already(lanes, count, cut, monkeypatch):
    if cut:
        monkeypatch.setattr("edgetrain.lowering_sparse._NEAR", 1)
        monkeypatch.setattr("edgetrain.lowering_sparse._ENTRIES_PER_PART", 0.01)
    monkeypatch.setattr("edgetrain.combining._MOST_PIXELS", 5)
    monkeypatch.setattr("edgetrain.combining._FEWEST_PIXELS", 1)
    sparse = Sparse(Case("sums", (3, 6, 6), _with_sums), monkeypatch, lanes)
    sparse.thin_out(count, 0.3)
    sparse.check(count)
    plan = sparse.learner.training_plan()
    sums = [node for node in plan.graph.nodes if node.op_type == "ProductGrads" and node.optional(3) is not None]
    in_place = [plan.buffer(node.y.name) == plan.buffer(node.input(3).name) for node in sums]
    assert in_place == [False, True, True], "a reshaped map has no border; a normalisation's sum, a node's"


def test_one_pass_does_not_add_to_the_error_map_that_it_reads(monkeypatch):
    """Both are reshapes of one gradient, so they would be one memory."""

    def build(net: Net, x: str) -> str:
        stem = net.Relu(net.conv(x, 8, 3, 3, 3, pads=[1] * 4))
        y = net.Add(net.Flatten(net.conv(stem, 8, 8, 1, 1, bias=False)), net.Flatten(stem))
        return net.Gemm(net.Relu(y), net.parameter(8 * 36, 4, spread=0.1))

    sparse = Sparse(Case("reshapes", (3, 6, 6), build), monkeypatch)
    sparse.thin_out(1, 0.4)
    sparse.check(9)
    nodes = sparse.learner.training_plan().graph.nodes
    assert next(node.optional(3) is not None for node in nodes if node.op_type == "ProductGrads")


def test_of_two_products_that_read_a_map_the_later_one_adds_to_its_gradient(monkeypatch):
    """What the earlier one would add to does not exist yet."""

    def build(net: Net, x: str) -> str:
        y = net.Relu(net.conv(x, 4, 3, 3, 3, pads=[1] * 4))
        return net.Add(net.conv(y, 3, 4, 3, 3, pads=[1] * 4), net.conv(y, 3, 4, 1, 1))

    sparse = Sparse(Case("two-readers", (3, 6, 6), build), monkeypatch)
    sparse.thin_out(1, 0.4)
    sparse.check(5)
    nodes = [node for node in sparse.learner.training_plan().graph.nodes if node.op_type == "ProductGrads"]
    assert [node.optional(3) is not None for node in nodes] == [False, True, False]


def test_one_pass_changes_no_bit_of_an_input_gradient(monkeypatch):
    """But for the order of sums where it adds to what is there."""
    monkeypatch.setattr("edgetrain.combining._add_up", lambda *_: None)
    x, y = BLOCKS.batch(9)
    sparse = Sparse(BLOCKS, monkeypatch)
    sparse.thin_out(1, 0.3)
    together = sparse.gradients(x, y)
    plan = sparse.learner.training_plan()
    monkeypatch.setattr("edgetrain.plans.combine_gradients", lambda train, *_: train)
    apart = Sparse(BLOCKS, monkeypatch)
    apart.thin_out(1, 0.3)
    wanted = apart.gradients(x, y)
    listed = {name for node in plan.graph.nodes if node.op_type == "ProductGrads" for name in [node.input(2).name]}
    for name, gradient in wanted.items():
        if name in listed:
            assert_close(together[name], gradient, 1e-6, name)
        else:
            np.testing.assert_array_equal(together[name], gradient)
    assert len(listed) == 4
    other = apart.learner.training_plan()
    assert sum(macs for macs, _ in plan.sparse_products) == sum(macs for macs, _ in other.sparse_products)


def test_gradients_of_weights_that_do_not_exist_are_computed_apart():
    made = learner(BLOCKS.graph(), 4, loss=BLOCKS.loss, sparsity=RigL(weights=0.9, distribution="uniform"))
    some, whole = (made.plans.plan(True, 4, whole) for whole in (False, True))
    assert "gradients_csr" in [kernel for kernel, _ in some.kernels]
    assert "gradients_csr" not in [kernel for kernel, _ in whole.kernels]
    assert "ProductGrads" not in [node.op_type for node in made.plans.training.graph.nodes]


def test_no_two_jobs_store_the_same_pixels_of_a_list_in_parts():
    """A tile is stored once per part; another thread that stored the same pixels meanwhile would be added to."""
    net = Net((32, 17, 17))
    net.graph.set_outputs([net.conv("input", 32, 32, 3, 3, pads=[1, 1, 1, 1])])
    made = learner(net.graph, 16, loss="mse", sparsity=StaticSparse(weights=0.7))
    rows = [row for row in made.training_plan().rows if row.kernel[0] == "multiply_csr"]
    assert rows
    for row in rows:
        found = dict(zip(argument_names("multiply_csr"), row.arguments, strict=True))
        assert found["parts"] > 1
        table = made.training_plan().fixed[found["tiles"].buffer].reshape(-1, 2)
        size, columns, step = found["tile_chunk"] * row.kernel[1][1], row.kernel[1][2], found["y_step"]
        chunks = [table[first : first + size, 1] for first in range(0, len(table), size)]
        stored = [{int(run) + i * step for run in chunk for i in range(columns)} for chunk in chunks]
        assert len(stored) > 1
        assert sum(map(len, stored)) == len(set().union(*stored)) == 17 * 17


@pytest.mark.parametrize(("vectors", "density", "listed"), [
    (2, 0.05, True), (2, 0.3, False), (8, 0.3, True), (8, 0.6, False),
])  # fmt: skip
def test_fully_connected_layers_have_lists_by_how_many_vectors_of_samples_there_are(vectors, density, listed):
    """An entry costs as much for two vectors as for eight."""
    net = Net((64, 1, 1))
    net.graph.set_outputs([net.Gemm(net.Flatten("input"), net.parameter(64, 64), transB=1)])
    policy = StaticSparse(weights=1 - density, distribution="uniform", dense_first=False)
    made = Learner(net.graph, PROFILE, batch_size=vectors * simd_lanes(), loss="mse", sparsity=policy)
    assert ("multiply_csr" in [row.kernel[0] for row in made.training_plan().rows]) == listed


def test_a_tile_of_a_small_map_has_the_pixels_of_several_blocks():
    """Of a fully connected layer a block has one pixel: an entry would be read for one multiply-accumulate."""
    net = Net((64, 1, 1))
    net.graph.set_outputs([net.Gemm(net.Flatten("input"), net.parameter(64, 64), transB=1)])
    policy = StaticSparse(weights=0.95, distribution="uniform", dense_first=False)
    made = Learner(net.graph, PROFILE, batch_size=4 * simd_lanes(), loss="mse", sparsity=policy)
    sizes = {row.kernel[1] for row in made.training_plan().rows if row.kernel[0] in ("multiply_csr", "correlate_csr")}
    assert {runs * columns for _, runs, columns, *_ in sizes} == {4}


@pytest.mark.parametrize(("channels", "chunks"), [(16, 8), (128, 1)])
def test_few_sums_of_many_weights_are_kept_apart(channels, chunks):
    """Each chunk of pixels has a vector of sums for every weight; many would not stay in the cache."""
    net = Net((channels, 16, 16))
    net.graph.set_outputs([net.conv("input", channels, channels, 3, 3, pads=[1] * 4)])
    made = learner(net.graph, 16, loss="mse", sparsity=StaticSparse(weights=0.9, dense_first=False))
    (row,) = [row for row in made.training_plan().rows if row.kernel[0] == "correlate_csr"]
    assert row.arguments[argument_names("correlate_csr").index("tile_chunks")] == chunks


# ---- vectors that neighbouring pixels fill


@pytest.mark.parametrize(
    ("columns", "lanes", "widest", "together"),
    [(8, 4, 16, 4), (6, 4, 16, 2), (7, 4, 16, 1), (8, 8, 16, 2), (8, 16, 16, 1), (8, 4, 4, 1)],
)
def test_neighbours_of_a_row_fill_vectors(columns, lanes, widest, together):
    step = 4 * lanes
    grid = Grid([(0, 0), (640, 512)], columns, (step, step), 1, lanes)
    wanted = Grid(grid.rows, columns // together, (step * together, step * together), 1, lanes * together)
    assert grid.widened(widest) == wanted
    strided = Grid(grid.rows, columns, (2 * step, step), 1, lanes)
    assert strided.widened(widest) == strided


@pytest.mark.skipif(simd_lanes() < 16, reason="narrower vectors, half filled, are of a batch with lanes of channels")
@pytest.mark.parametrize(("samples", "stride", "listed"), [(16, 2, True), (8, 2, False), (8, 1, True)])
def test_strides_leave_vectors_half_filled_and_lists_do_not_pay(samples, stride, listed):
    net = Net((16, 16, 16))
    net.graph.set_outputs([net.conv("input", 32, 16, 5, 5, pads=[2] * 4, strides=[stride, stride])])
    policy = StaticSparse(weights=0.6, distribution="uniform", dense_first=False)
    made = Learner(net.graph, PROFILE, batch_size=samples, loss="mse", sparsity=policy)
    assert made.plans.lanes == samples
    assert ("multiply_csr" in [row.kernel[0] for row in made.training_plan().rows]) == listed


@pytest.mark.skipif(simd_lanes() < 8, reason="no batch fills a part of vectors of 4")
def test_small_batches_have_lists_of_whole_vectors(monkeypatch):
    sparse = Sparse(next(case for case in convolutions() if case.id.endswith("3x3-same")), monkeypatch)
    kernels = [row.kernel for row in sparse.learner.plans.plan(True, 4).rows if row.kernel[0].endswith("_csr")]
    widths = {sizes[0] for name, sizes in kernels if name in ("multiply_csr", "correlate_csr", "sum_csr")}
    assert max(widths) > 4
