"""What a run saved against dense training: an estimate that fails no run, and the line that says what is known."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest

import edgetrain as et
from edgetrain.accounting import StepResult
from edgetrain.cli import estimate
from edgetrain.cli.estimate import Work, random_batches, time_dense
from edgetrain.cli.savings import itself, savings_of, savings_text
from edgetrain.fitting import block_size
from edgetrain.graph import Normalization
from edgetrain.history import Totals
from tests import test_filters


def learner(**options) -> et.Learner:
    """Return a learner that has taken enough steps to be compared, as far as it knows."""
    made = test_filters.learner(**options)
    made.step_count = 20
    return made


def worked(made: et.Learner, seconds: float = 1.0, instances: int = 1000, **others) -> Work:
    """Return a run of so many instances, all trained on."""
    return Work(seconds, instances * made.plans.dense_macs, instances, block_size(made), **others)


def batches_of(made: et.Learner):
    return lambda size: random_batches(made, size)


@pytest.fixture
def quick(monkeypatch):
    """Leave out the steps that only warm up."""
    monkeypatch.setattr(estimate, "_WARM_STEPS", 1)


@pytest.mark.parametrize("optimizer", [
    et.SGD(lr=1e6, momentum=0.9, nesterov=True, weight_decay=5e-4),
    et.AdamW(lr=1e6, weight_decay=0.1, schedule=et.Schedule("cosine", total_steps=5)),
], ids=["sgd", "adamw"])  # fmt: skip
def test_dense_steps_are_timed_at_any_learning_rate(optimizer):
    made = learner(optimizer=optimizer)
    dense = time_dense(made, worked(made), batches_of(made))
    assert dense["how"] == "estimated from 200 dense steps, side by side with the run's own"
    assert dense["seconds"] > 0


def test_the_time_of_dense_steps_that_are_not_finite_is_unknown(quick):
    made = learner()
    made.graph.normalization = Normalization(np.zeros(1, np.float32), np.full(1, 1e-30, np.float32))
    dense = time_dense(made, worked(made), batches_of(made))
    account = savings_of(Totals(instances_seen=1000).counts(), 2.0, 3.0, dense)
    assert account["dense"]["seconds"] is account["time_saved"] is None
    assert savings_text(account).endswith(
        "training time 2.0 s (whole run 3.0 s); what dense training takes is unknown (a step of the comparison, with "
        "random dense weights, was not finite)"
    )


def test_very_few_steps_are_not_compared():
    made = learner()
    made.step_count = 19
    assert time_dense(made, worked(made), batches_of(made)) == {
        "seconds": None, "how": "too few steps to compare: 19 steps, a comparison takes 20"
    }  # fmt: skip


# ---- the estimate does what the run did, side by side with it, within its memory


METHODS = {
    "error pruning": {"error_pruning": "channels:keep=0.7"},
    "rigl": {"sparsity": "rigl:weights=0.8,refresh=3"},
    "swat": {"sparsity": "swat:weights=0.8", "optimizer": et.AdamW(averaging=0.9)},
    "filter": {"instance_filter": "eif:rate=0.5"},
}


@pytest.mark.parametrize("predicts", [None, True], ids=["epochs", "stream"])
@pytest.mark.parametrize("options", METHODS.values(), ids=METHODS)
def test_the_estimate_leaves_the_run_as_it_is(quick, options, predicts):
    made = learner(**options)
    for x, y in itertools.islice(random_batches(made, 16), 5):
        made.observe(x, y)
    tensors, meta = made.state()
    optimizer, weights = made.optimizer, made.parameters()
    assert time_dense(made, worked(made, predicts=predicts), batches_of(made))["seconds"] > 0
    after, meta_after = made.state()
    assert meta_after == meta
    assert made.optimizer is optimizer
    assert made.stream.position == 80
    assert tensors.keys() == after.keys()
    for name, array in {**tensors, **weights}.items():
        np.testing.assert_array_equal({**after, **made.parameters()}[name], array)


def test_the_learner_is_put_back_where_the_estimate_is_interrupted(quick):
    made = learner()
    made.partial_fit(*next(random_batches(made, 16)))
    _, meta = made.state()

    def interrupted(size):
        yield from itertools.islice(random_batches(made, size), 7)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        time_dense(made, worked(made), interrupted)
    assert made.state()[1] == meta
    assert made.optimizer.lr == 0.05


def test_the_estimate_of_a_run_that_predicts_first_predicts_first(quick, monkeypatch):
    made, predicted = learner(), []
    real = et.Learner.logits
    monkeypatch.setattr(et.Learner, "logits", lambda self, x: predicted.append(self is made) or real(self, x))
    for predicts in (None, False):
        time_dense(made, worked(made, predicts=predicts), batches_of(made))
    assert predicted == []
    time_dense(made, worked(made, predicts=True), batches_of(made))
    assert predicted.count(True) == 250
    assert predicted.count(False) == 251


def test_few_batches_are_used_again(quick):
    made, given = learner(), []
    x, y = next(iter(random_batches(made, 16)))
    dense = time_dense(made, worked(made), lambda size: given.append(size) or [(x, y), (x[:8], y[:8])])
    assert given == 251 * [16]
    assert dense["seconds"] > 0
    assert "the data are gone" in time_dense(made, worked(made), lambda _: [])["how"]


class Clock:
    """A clock that goes on by what steps are said to take.

    Args:
        monkeypatch: of the test.
        seconds: of a step, of the learner, its result, and the number of the step.
    """

    def __init__(self, monkeypatch, seconds) -> None:
        self.now, self._steps, real = 0.0, itertools.count(), et.Learner.partial_fit

        def step(made, x, y):
            result = real(made, x, y)
            self.now += seconds(made, result, next(self._steps))
            return result

        monkeypatch.setattr(et.Learner, "partial_fit", step)
        monkeypatch.setattr(estimate, "time", self)

    def thread_time(self) -> float:
        return self.now

    perf_counter = thread_time


@pytest.mark.parametrize("load", [1.0, 3.0], ids=["idle", "busy"])
def test_the_estimate_does_not_depend_on_what_else_the_machine_does_at_the_end(quick, monkeypatch, load):
    made = learner()
    Clock(monkeypatch, lambda who, *_: load * (0.001 if who is made else 0.003))
    assert time_dense(made, worked(made, 7.0), batches_of(made))["seconds"] == pytest.approx(21.0)


def test_slow_steps_do_not_change_the_estimate(quick, monkeypatch):
    made = learner()
    Clock(monkeypatch, lambda who, _, step: 0.1 if step % 37 == 5 else 0.001 if who is made else 0.003)
    assert time_dense(made, worked(made, 7.0), batches_of(made))["seconds"] == pytest.approx(21.0)


def test_the_time_of_topology_changes_is_not_stretched(quick, monkeypatch):
    made = learner(sparsity="rigl:weights=0.8")
    made.topology.seconds = 2.0
    Clock(monkeypatch, lambda who, *_: 0.001 if who is made else 0.003)
    step = made.partial_fit(*next(random_batches(made, 16)))
    dense = time_dense(made, replace(worked(made, 9.0), macs=1000 * step.macs_done // 16), batches_of(made))
    assert dense["seconds"] == pytest.approx(21.0, rel=1e-3)


def test_a_filter_that_let_more_pass_at_its_start_is_estimated_by_operations(quick, monkeypatch):
    made = learner(instance_filter="random:rate=0.5,start=1000")
    Clock(monkeypatch, lambda _, result, __: 1e-9 * result.macs_done)
    made.stream.offer(*next(random_batches(made, 1000)))  # the next ones are filtered
    # 1,000 instances passed, half of another 1,000: all on a machine as fast, or half as fast, as it is now.
    macs = 1500 * made.plans.dense_macs
    for slowness in (1.0, 2.0):
        dense = time_dense(made, Work(slowness * 1e-9 * macs, macs, 2000, block_size(made)), batches_of(made))
        assert dense["seconds"] == pytest.approx(slowness * 2000e-9 * made.plans.dense_macs)


def test_a_filter_that_lets_nothing_pass_tells_no_time(quick, monkeypatch):
    made = learner(instance_filter="random:rate=0.5")
    monkeypatch.setattr(type(made.stream), "offer", lambda *_: StepResult(math.nan, 0, 32, 0, 0, 0, 1e-6))
    dense = time_dense(made, worked(made), batches_of(made))
    assert dense == {"seconds": None, "how": "the filter let nothing pass beside the dense steps"}


@pytest.mark.parametrize(("seconds", "steps"), [(0.011, 76), (0.06, 15), (0.15, 4), (9.0, 3)])
def test_the_estimate_of_long_steps_takes_fewer(quick, monkeypatch, seconds, steps):
    made = learner()
    clock = Clock(monkeypatch, lambda *_: seconds)
    dense = time_dense(made, worked(made), batches_of(made))
    assert dense["how"].startswith(f"estimated from {steps} dense steps")
    assert clock.now < 3 or seconds == 9


def test_the_estimate_stays_within_what_the_run_leaves_of_its_memory_budget(quick):
    need = learner().memory_plan().peak_bytes
    roomy = learner(memory_budget=3 * need)
    assert time_dense(roomy, worked(roomy), batches_of(roomy))["seconds"] > 0
    for budget in (need, round(1.5 * need)):
        tight = learner(memory_budget=budget)
        dense = time_dense(tight, worked(tight), batches_of(tight))
        assert dense["seconds"] is None
        assert "does not fit into the memory budget; --baseline measures it" in dense["how"]


def test_a_dense_run_is_not_compared_with_an_estimate_of_itself():
    counts = Totals(instances_seen=10, macs_dense=10**9, macs_done=9 * 10**8).counts()
    assert savings_text(savings_of(counts, 2.0, 3.0, itself(2.0))) == (
        "operations done 90.0 % (0.900 GMAC, 10.0 % were exact zeros), training time 2.0 s (whole run 3.0 s); no "
        "method was used: this is the dense run"
    )


@pytest.mark.parametrize(("waiting", "why"), [
    ({"instances_waiting": 16}, "but wait for a full batch"),
    ({"instances_waiting": 6}, "but 6 of them wait for a full batch, and the step of the others failed"),
    ({"instances_waiting": 0}, "but their step failed"),
    ({}, "but wait for a full batch, or their step failed"),  # as older runs logged it
], ids=["wait", "some", "failed", "unknown"])  # fmt: skip
def test_the_account_says_why_kept_instances_were_not_trained_on(waiting, why):
    counts = Totals(instances_seen=100, instances_kept=90, instances_trained=74, macs_dense=10**9).counts() | waiting
    text = savings_text(savings_of(counts, 2.0, 3.0, {"seconds": None, "how": "not at all"}))
    assert f"\noperations of training are those of 84 instances: 16 were kept, {why}\n" in text


@pytest.mark.parametrize(("seconds", "outcome"), [(8.0, "20.0 % of the time saved"), (12.0, "20.0 % more time")])
def test_the_account_says_whether_time_was_saved_or_lost(seconds, outcome):
    counts = Totals(instances_seen=100, instances_kept=100, instances_trained=100, macs_dense=10**9).counts()
    text = savings_text(savings_of(counts, seconds, None, {"seconds": 10.0, "how": "measured"}))
    assert text.endswith(f"; dense 10.0 s (measured): {outcome}")
