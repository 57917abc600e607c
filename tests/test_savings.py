"""What a run saved against dense training: an estimate that fails no run, and the line that says what is known."""

from __future__ import annotations

import time

import numpy as np
import pytest

import edgetrain as et
from edgetrain.cli.savings import itself, random_batches, savings_of, savings_text, time_dense
from edgetrain.graph import Normalization
from edgetrain.history import Totals
from tests import test_filters


def learner(**options) -> et.Learner:
    """Return a learner that has taken enough steps to be compared, as far as it knows."""
    made = test_filters.learner(**options)
    made.step_count = 20
    return made


@pytest.mark.parametrize("optimizer", [
    et.SGD(lr=1e6, momentum=0.9, nesterov=True, weight_decay=5e-4),
    et.AdamW(lr=1e6, weight_decay=0.1, schedule=et.Schedule("cosine", total_steps=5)),
], ids=["sgd", "adamw"])  # fmt: skip
def test_dense_steps_are_timed_at_any_learning_rate(optimizer):
    made = learner(optimizer=optimizer)
    dense = time_dense(made, 1000, lambda: random_batches(made))
    assert dense["how"] == "estimated from the median of 10 dense steps"
    assert dense["seconds"] > 0


def test_the_time_of_dense_steps_that_are_not_finite_is_unknown():
    made = learner()
    made.graph.normalization = Normalization(np.zeros(1, np.float32), np.full(1, 1e-30, np.float32))
    dense = time_dense(made, 1000, lambda: random_batches(made))
    account = savings_of(Totals(instances_seen=1000).counts(), 2.0, 3.0, dense)
    assert account["dense"]["seconds"] is account["time_saved"] is None
    assert savings_text(account).endswith(
        "training time 2.0 s (whole run 3.0 s); what dense training takes is unknown (dense steps with random weights "
        "were not finite)"
    )


def test_very_few_steps_are_not_compared():
    made = learner()
    made.step_count = 19
    assert time_dense(made, 1000, batches_of(made)) == {
        "seconds": None, "how": "too few steps to compare: 19 steps, a comparison takes 20"
    }  # fmt: skip


# ---- the estimate does what the run did, within its memory


def batches_of(made: et.Learner):
    return lambda: random_batches(made)


def test_the_estimate_of_a_run_that_predicts_first_predicts_first(monkeypatch):
    made, predicted = learner(), []
    real = et.Learner.logits
    monkeypatch.setattr(et.Learner, "logits", lambda self, x: predicted.append(len(x)) or real(self, x))
    time_dense(made, 1000, batches_of(made))
    assert predicted == []
    time_dense(made, 1000, batches_of(made), predict=True)
    assert predicted == [16] * 20


def test_few_batches_are_used_again():
    made, given = learner(), []
    x, y = next(iter(random_batches(made)))
    dense = time_dense(made, 1600, lambda: given.append(1) or [(x, y), (x[:8], y[:8])])
    assert len(given) == 10
    assert dense["seconds"] > 0
    assert "the data are gone" in time_dense(made, 1600, list)["how"]


def test_one_slow_step_does_not_change_the_estimate(monkeypatch):
    made, steps = learner(), []
    real = et.Learner.partial_fit

    def step(self, x, y):
        steps.append(1)
        if len(steps) == 15:
            time.sleep(0.5)
        return real(self, x, y)

    monkeypatch.setattr(et.Learner, "partial_fit", step)
    dense = time_dense(made, 16, batches_of(made))
    assert len(steps) == 20
    assert dense["seconds"] < 0.05  # the mean of ten would be above


def test_the_estimate_stays_within_what_the_run_leaves_of_its_memory_budget(monkeypatch):
    need = learner().memory_plan().peak_bytes
    roomy = learner(memory_budget=3 * need)
    assert time_dense(roomy, 1000, batches_of(roomy))["seconds"] > 0
    for budget in (need, round(1.5 * need)):
        tight = learner(memory_budget=budget)
        dense = time_dense(tight, 1000, batches_of(tight))
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
