"""Subnormal numbers: zero in every compiled thread, alive in the application's; decayed weights cost no time."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import numpy as np
import pytest

import edgetrain as et
from edgetrain.arrays import aligned
from edgetrain.errors import NumericalError
from edgetrain.executor import Team
from edgetrain.kernels import registry
from edgetrain.kernels.codes import AFFINE

DECAYED = np.float32(1e-40)
PLANES, VECTORS, LANES = 16, 4, 4


class Scale:
    """A program of one row, ``y = factor * x`` over planes; every thread takes some of the planes."""

    def __init__(self, factor: float, planes: int = PLANES) -> None:
        size = planes * VECTORS * LANES
        self.x, self.y = aligned(size, np.float32), aligned(size, np.float32)
        key = ("unary", (LANES, AFFINE))
        names = registry.argument_names("unary")
        bytes_ = 4 * VECTORS * LANES
        given = {"x": self.x.ctypes.data, "y": self.y.ctypes.data, "rows": 1, "vectors": VECTORS, "x_plane": bytes_,
                 "y_plane": bytes_, "f_a": int(np.array(factor, np.float32).view(np.uint32))}  # fmt: skip
        self._arguments = aligned(len(names), np.int64)
        self._arguments[:] = [given.get(name, 0) for name in names]
        self._program = aligned(4, np.int64)
        self._program[:] = registry.compile_kernels([key])[key], self._arguments.ctypes.data, planes, 0

    def run(self, team: Team, value: float) -> np.ndarray:
        """Return the result for an input that is the same everywhere; NaN where nobody wrote."""
        self.x[:], self.y[:] = np.float32(value), np.nan
        assert team.run(self._program.ctypes.data, 1)
        return self.y.copy()


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_every_thread_reads_subnormal_numbers_as_zero(threads):
    assert not Scale(1e30).run(Team(threads), DECAYED).any()


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_every_thread_writes_zero_for_subnormal_results(threads):
    assert not Scale(1e-20).run(Team(threads), 1e-20).any()


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_every_thread_keeps_the_smallest_normal_numbers(threads):
    smallest = np.finfo(np.float32).tiny
    assert (Scale(1.0).run(Team(threads), smallest) == smallest).all()


def test_threads_flush_again_in_every_program():
    scale, team = Scale(1e30), Team(4)
    for _ in range(3):
        assert not scale.run(team, DECAYED).any()
        assert (scale.run(team, 1.0) == np.float32(1e30)).all()


# ---- the application's floating-point state ----


@pytest.fixture(scope="module")
def state() -> tuple[Callable[[], int], Callable[[int], None], int]:
    """Return how to read and to write this thread's control register, and the bits that flush."""
    from numba import njit

    from edgetrain.kernels import simd

    read, write = simd.float_state, simd.set_float_state
    get = njit(lambda: read())
    put = njit(lambda value: write(value))
    bits_of = simd.flush_bits
    bits = njit(lambda: bits_of())()
    if not bits:
        pytest.skip("this processor's control register is not known")
    return get, put, bits


@pytest.mark.parametrize("threads", [1, 4])
def test_the_application_gets_its_state_back_bit_for_bit(state, threads):
    get, put, bits = state
    before = get()
    assert not before & bits
    # Rounding towards zero (x86: bits 13 and 14; Arm: 22 and 23) stands for whatever an application may have set.
    rounding = 3 << (13 if bits == 0x8040 else 22)
    try:
        for wanted in (before, before | bits, before | rounding):
            put(wanted)
            Scale(1e-20).run(Team(threads), 1e-20)
            assert get() == wanted
    finally:
        put(before)


def test_a_step_that_is_stopped_gives_the_state_back_too(state):
    get, _, _ = state
    learner = et.Learner(et.models.resnet((3, 8, 8), depth=8), batch_size=8, threads=2)
    before = get()
    with pytest.raises(NumericalError):
        learner.partial_fit(np.full((8, 3, 8, 8), 1e38, np.float32), np.zeros(8, np.int64))
    assert get() == before
    assert np.array([DECAYED]) * np.float32(0.5) > 0


# ---- decayed weights ----


def decayed(learner: et.Learner) -> et.Learner:
    """Set all weights of products to a subnormal number, as weight decay does in the long run."""
    arrays = learner.parameters()
    learner.load_parameters({name: np.full_like(array, DECAYED) for name, array in arrays.items() if array.ndim > 1})
    return learner


@pytest.mark.parametrize("build", [et.models.lenet5, et.models.ds_cnn], ids=["lenet5", "ds_cnn"])
def test_a_step_on_decayed_weights_is_a_step_on_zeros(build):
    """Outputs, gradients and the update take a decayed weight as zero: nothing of it is left afterwards."""
    learners = [et.Learner(build(), batch_size=8, threads=2, optimizer=et.SGD(lr=0.1)) for _ in range(2)]
    decayed(learners[0])
    arrays = learners[1].parameters()
    learners[1].load_parameters({name: np.zeros_like(array) for name, array in arrays.items() if array.ndim > 1})
    rng = np.random.default_rng(0)
    x = rng.standard_normal((8, *learners[0].graph.input_shape)).astype(np.float32)
    y = rng.integers(0, 10, 8)
    np.testing.assert_array_equal(learners[0].logits(x), learners[1].logits(x))
    assert learners[0].partial_fit(x, y).loss == learners[1].partial_fit(x, y).loss
    for name, array in learners[0].parameters().items():
        np.testing.assert_array_equal(array, learners[1].parameters()[name], name)


def test_a_step_on_decayed_weights_takes_no_longer():
    """Timed because the bar is far away: without flushing an Intel processor needs 40 times as long.

    AMD's Zen 4 needs hardly longer, so there only the tests above notice. Turns alternate, so that a busy machine
    slows both sides; benchmarks/performance.py measures it exactly (docs/performance.md).
    """
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((16, 1, 28, 28)).astype(np.float32), rng.integers(0, 10, 16)
    plain, faint = (
        et.Learner(et.models.lenet5(), batch_size=16, threads=1, optimizer=et.SGD(lr=0.0)) for _ in range(2)
    )
    decayed(faint)
    seconds: dict[et.Learner, list[float]] = {plain: [], faint: []}
    for turn in range(40):
        decayed(faint)  # every update writes zeros in their place
        for learner, spent in seconds.items():
            start = time.perf_counter()
            learner.partial_fit(x, y)
            if turn:  # the first step makes the plan
                spent.append(time.perf_counter() - start)
    assert statistics.median(seconds[faint]) < 3 * statistics.median(seconds[plain])
