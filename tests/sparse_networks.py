"""What the tests of sparse training share: a network of all kinds of products, its batches, learners."""

from __future__ import annotations

import numpy as np

import edgetrain as et
from edgetrain.devices import load_profile
from edgetrain.graph import Graph
from edgetrain.sparsity import SparsityPolicy

PROFILE = load_profile("generic-x86_64")
SHAPE, CLASSES = (2, 8, 8), 4


def network(seed: int = 0) -> Graph:
    """Strided, grouped, depthwise and plain convolutions with normalisation, and dense layers of both orientations."""
    rng = np.random.default_rng(seed)
    graph = Graph("sparse", input_shape=SHAPE)

    def weight(name: str, *shape: int) -> str:
        return graph.parameter(name, rng.normal(0, 0.3, shape))

    x = graph.add("Conv", ["input", weight("a.weight", 8, 2, 3, 3)], pads=[1] * 4)
    norm = [graph.parameter(f"n.{part}", np.full(8, value), trainable)
            for part, value, trainable in (("scale", 1, True), ("bias", 0, True), ("mean", 0, False),
                                           ("var", 1, False))]  # fmt: skip
    x = graph.add("Relu", [graph.add("BatchNormalization", [x, *norm])])
    x = graph.add("Conv", [x, weight("b.weight", 12, 8, 3, 3), graph.parameter("b.bias", rng.normal(size=12))],
                  pads=[1] * 4, strides=[2, 2])  # fmt: skip
    x = graph.add("Relu", [x])
    x = graph.add("Conv", [x, weight("depthwise.weight", 12, 1, 3, 3)], pads=[1] * 4, group=12)
    x = graph.add("Conv", [x, weight("grouped.weight", 8, 6, 3, 3)], group=2)
    x = graph.add("Flatten", [graph.add("Relu", [x])])
    x = graph.add("Relu", [graph.add("MatMul", [x, weight("c.weight", 32, 16)])])
    dense = [weight("d.weight", CLASSES, 16), graph.parameter("d.bias", np.zeros(CLASSES))]
    graph.set_outputs([graph.add("Gemm", [x, *dense], transB=1)])
    return graph


def batch(count: int = 9, seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(count, *SHAPE)).astype(np.float32), rng.integers(0, CLASSES, count)


def learner(policy: SparsityPolicy | None, threads: int = 1, **settings) -> et.Learner:
    optimizer = settings.pop("optimizer", et.SGD(lr=0.05, momentum=0.9, weight_decay=1e-3))
    graph = settings.pop("graph", None) or network()
    return et.Learner(graph, PROFILE, batch_size=8, threads=threads, optimizer=optimizer, sparsity=policy, **settings)


def train(made: et.Learner, steps: int, start: int = 0) -> list[float]:
    return [made.partial_fit(*batch(8, seed)).loss for seed in range(start, start + steps)]


def patterns(made: et.Learner) -> dict[str, np.ndarray]:
    return {name: index.mask() for name, index in made.topology.indices.items()}


def replace_arrays(graph: Graph, arrays: dict[str, np.ndarray]) -> Graph:
    graph.arrays = dict(arrays)
    return graph


def assert_equal(got, wanted):
    assert got.keys() == wanted.keys()
    for name in wanted:
        np.testing.assert_array_equal(got[name], wanted[name], err_msg=name)
