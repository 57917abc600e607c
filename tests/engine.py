"""What the tests of the engine share: learners with a chosen number of lanes, and the comparison of arrays."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import edgetrain.lanes
import edgetrain.plans
from edgetrain.devices import load_profile
from edgetrain.graph import Graph
from edgetrain.learner import Learner

Array = NDArray[Any]
# Modules of kernels that only policies of the backward pass use.
PRUNING_KERNELS = ("element_lists", "error_lists", "pruned", "stochastic", "vector_lists")
PROFILE = load_profile("generic-x86_64")  # read once: a learner is made in every test


def set_lanes(monkeypatch: pytest.MonkeyPatch, lanes: int) -> None:
    """Decide what vectors hold as on a machine with so many lanes."""
    for module in (edgetrain.lanes, edgetrain.plans):
        monkeypatch.setattr(module, "simd_lanes", lambda: lanes)


@pytest.fixture
def wide_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let lanes depend on the batch size alone: 4, 8 or 16 samples, also on a machine with narrower registers."""
    set_lanes(monkeypatch, 16)
    monkeypatch.setattr(edgetrain.plans, "channels_pay", lambda *_: False)


def learner(graph: Graph, lanes: int = 4, threads: int = 1, **settings: Any) -> Learner:
    """Return a learner whose vectors hold ``lanes`` samples; needs the fixture ``wide_host``."""
    made = Learner(graph, PROFILE, batch_size=lanes, threads=threads, **settings)
    assert made.plans.lanes == lanes
    return made


def channel_learner(graph: Graph, threads: int = 1, **settings: Any) -> Learner:
    """Return a learner whose lanes hold channels, as for the smallest batches; needs the fixture ``wide_host``."""
    made = Learner(graph, PROFILE, batch_size=1, threads=threads, **settings)
    made.plans.__dict__["by_channel"] = True  # a cached property
    assert made.plans.lanes == edgetrain.plans.simd_lanes()
    return made


def poison(trained: Learner) -> None:
    """Fill everything that a step must write before it reads with NaN."""
    trained.plans.arena.memory[:] = 0xFF
    for name in trained.graph.trainable:
        trained._parameters.view(name, "gradients")[...] = np.nan


def assert_padding_is_zero(trained: Learner) -> None:
    """Check that nothing stands between the arrays of gradients: the norm of clipping is that of the whole buffer."""
    parameters = trained._parameters
    flat = parameters.buffers["gradients"].astype(np.float64)
    arrays = [parameters.view(name, "gradients").astype(np.float64) for name in trained.graph.trainable]
    assert np.isfinite(flat).all()
    assert (flat**2).sum() == pytest.approx(sum((array**2).sum() for array in arrays), rel=1e-6)


def assert_close(got: Array, wanted: Array, tolerance: float, what: str = "") -> None:
    """Compare relative to the largest entry."""
    wanted = np.asarray(wanted)
    assert got.shape == wanted.shape, what
    error, size = np.abs(got - wanted).max(), np.abs(wanted).max()
    assert error <= tolerance * max(size, 1e-30), f"{what}: error {error:.2e} of {size:.2e}"


def assert_all_close(got: Mapping[str, Array], wanted: Mapping[str, Array], tolerance: float) -> None:
    """Compare arrays by name, each relative to its largest entry."""
    assert got.keys() == wanted.keys()
    for name in wanted:
        assert_close(got[name], wanted[name], tolerance, name)


def assert_same(got: Mapping[str, Array], wanted: Mapping[str, Array]) -> None:
    """Compare arrays by name, bit for bit."""
    assert got.keys() == wanted.keys()
    different = [name for name in wanted if got[name].tobytes() != wanted[name].tobytes()]
    assert not different
