"""Normalisations by blocks of samples, for threads that keep to their blocks: when, and that no bit changes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

import edgetrain as et
from edgetrain import choice
from edgetrain.graph import Graph
from edgetrain.kernels.codes import KEPT, PARTS, REST, WHOLE
from tests.engine import PROFILE
from tests.op_cases import Net

NORMALISATIONS = ("batch_norm", "batch_norm_gradient", "residual_norm_gradient")
SHAPE = (3, 8, 8)


def network() -> Graph:
    """Normalisations whose output is computed again, with an addend, with one that is a sum itself, and last of all."""
    net = Net(SHAPE)
    x = net.Relu(net.norm(net.conv("input", 8, 3, 3, 3, pads=[1] * 4)))
    for _ in range(2):
        y = net.Relu(net.norm(net.conv(x, 8, 8, 3, 3, pads=[1] * 4)))
        x = net.Relu(net.Add(net.norm(net.conv(y, 8, 8, 3, 3, pads=[1] * 4)), x))
    net.graph.set_outputs([net.Gemm(net.Flatten(x), net.parameter(512, 4, spread=0.1), net.parameter(4))])
    return net.graph


def learner(threads: int, sparsity: et.SparsityPolicy | None, **settings) -> et.Learner:
    size = settings.pop("batch_size", 4 * choice.simd_lanes())
    optimizer = et.SGD(lr=0.05, momentum=0.9)
    return et.Learner(network(), PROFILE, batch_size=size, threads=threads, optimizer=optimizer, sparsity=sparsity,
                      **settings)  # fmt: skip


def stages(made: et.Learner) -> set[int]:
    return {row.kernel[1][-1] for row in made.training_plan().rows if row.kernel[0] in NORMALISATIONS}


@pytest.fixture
def cache(monkeypatch):
    """Let a core have so many KiB of second-level cache."""

    def set_to(kib: int) -> None:
        host = replace(choice.target(), l2_kib=kib)
        monkeypatch.setattr(choice, "_host", lambda: host)

    return set_to


@pytest.mark.parametrize("pruning", [None, "channels:keep=0.5", "channels:keep=0.5,importance=random"])
@pytest.mark.parametrize("policy", [None, et.StaticSparse(weights=0.8)], ids=["dense", "static"])
@pytest.mark.parametrize("threads", [2, 3, 4])
def test_blocks_change_no_bit(cache, threads, policy, pruning):
    cache(4096)
    alone, together = (learner(t, policy, error_pruning=pruning) for t in (1, threads))
    assert stages(alone).isdisjoint({PARTS, REST})
    assert stages(together) == {PARTS, REST} | ({KEPT} if pruning else set())
    rng, full = np.random.default_rng(1), 4 * choice.simd_lanes()
    for count in (full, full - 3, full):  # the last block of the second is not full
        x, y = rng.normal(3, 2, (count, *SHAPE)).astype(np.float32), rng.integers(0, 4, count)
        assert alone.partial_fit(x, y).loss == together.partial_fit(x, y).loss
    for (name, a), (other, b) in zip(alone.state()[0].items(), together.state()[0].items(), strict=True):
        assert name == other
        np.testing.assert_array_equal(a, b, err_msg=name)


@pytest.mark.parametrize(
    ("kib", "threads", "sparsity", "blocks", "wanted"),
    [
        (4096, 2, et.StaticSparse(weights=0.8), 4, {PARTS, REST}),
        (4096, 1, et.StaticSparse(weights=0.8), 4, {WHOLE}),
        (4096, 4, et.StaticSparse(weights=0.8), 2, {WHOLE}),  # a block for two threads
        (4096, 2, None, 4, {PARTS, REST}),
        (0, 2, et.StaticSparse(weights=0.8), 4, {WHOLE}),
    ],
    ids=["keeps-to-blocks", "one-thread", "few-blocks", "dense", "unknown-cache"],
)
def test_when_threads_keep_to_their_blocks(cache, kib, threads, sparsity, blocks, wanted):
    cache(kib)
    assert stages(learner(threads, sparsity, batch_size=blocks * choice.simd_lanes())) == wanted


def test_what_a_thread_reads_twice_must_fit_half_its_cache(cache):
    policy = et.StaticSparse(weights=0.8)
    share = 2 * 8 * 64 * 4 * choice.simd_lanes() // 1024  # KiB of two blocks of eight maps of 64 pixels
    cache(2 * share)
    assert stages(learner(2, policy)) == {PARTS, REST}
    cache(2 * share - 1)
    assert stages(learner(2, policy)) == {WHOLE}


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("addends", [False, True])
def test_lanes_without_a_sample_stay_finite_where_samples_are_alike(count, addends):
    """A variance of 0 in every layer: what such lanes hold must not grow by 316 a layer."""
    net = Net((4, 1, 1))
    x = net.Relu(net.norm(net.conv("input", 6, 4, 1, 1)))
    for _ in range(16):
        y = net.norm(net.conv(x, 6, 6, 1, 1))
        x = net.Relu(net.Add(y, x) if addends else y)
    net.graph.set_outputs([net.Gemm(net.Flatten(x), net.parameter(6, 3, spread=0.1))])
    x = np.broadcast_to(np.float32([1, -2, 0.5, 3]).reshape(1, 4, 1, 1), (count, 4, 1, 1))
    losses = []
    for size in (count, 4 * choice.simd_lanes()):
        made = et.Learner(net.graph, PROFILE, batch_size=size, threads=1, optimizer=et.SGD(lr=0.01))
        losses.append([made.partial_fit(x, np.ones(count, int)).loss for _ in range(3)])
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)
