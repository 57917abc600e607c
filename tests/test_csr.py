"""Products with sparse weights against their readable twins with zeros in place: every shape, any topology."""

from __future__ import annotations

import numpy as np
import pytest

from edgetrain import reference
from edgetrain.learner import Learner
from edgetrain.ops import get_op
from edgetrain.ops.conv import ProductOp
from edgetrain.sparse_index import SparseIndex
from tests.engine import assert_all_close, assert_close, learner, poison, wide_host
from tests.op_cases import Case, combinations, convolutions, dense

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
        monkeypatch.setattr("edgetrain.lowering_sparse.DENSEST", 1.0)
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
