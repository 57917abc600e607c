"""What a run saved against dense training: an estimate that fails no run, and the line that says what is known."""

from __future__ import annotations

import numpy as np
import pytest

import edgetrain as et
from edgetrain.cli.savings import savings_of, savings_text, time_dense
from edgetrain.graph import Normalization
from edgetrain.history import Totals
from tests.test_filters import learner


@pytest.mark.parametrize("optimizer", [
    et.SGD(lr=1e6, momentum=0.9, nesterov=True, weight_decay=5e-4),
    et.AdamW(lr=1e6, weight_decay=0.1, schedule=et.Schedule("cosine", total_steps=5)),
], ids=["sgd", "adamw"])  # fmt: skip
def test_dense_steps_are_timed_at_any_learning_rate(optimizer):
    dense = time_dense(learner(optimizer=optimizer), 1000)
    assert dense["how"] == "estimated from 10 dense steps"
    assert dense["seconds"] > 0


def test_the_time_of_dense_steps_that_are_not_finite_is_unknown():
    made = learner()
    made.graph.normalization = Normalization(np.zeros(1, np.float32), np.full(1, 1e-30, np.float32))
    account = savings_of(Totals(instances_seen=1000).counts(), 2.0, time_dense(made, 1000))
    assert account["dense"]["seconds"] is account["time_saved"] is None
    assert savings_text(account).endswith(
        "training took 2.0 s; what dense training takes is unknown (dense steps with random weights were not finite)"
    )
