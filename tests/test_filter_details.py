"""Filters in fits and streams: whose state, losses and places are whose, and what is counted."""

from __future__ import annotations

import time

import numpy as np
import pytest

import edgetrain as et
import edgetrain.onnx_io
from edgetrain.errors import NumericalError
from edgetrain.fitting import block_size
from edgetrain.graph import Normalization
from edgetrain.policies import agrees, parse_policy
from tests.test_filters import FILTERS, instances, learner


def test_recent_accuracy_is_in_checkpoints(tmp_path):
    some, (x, y, _) = learner(), instances(60)
    some.observe(x[:40], y[:40], predict=True)
    some.save(tmp_path / "a.safetensors")
    again = et.Learner.load(tmp_path / "a.safetensors")
    assert again.stream.recent_accuracy == some.stream.recent_accuracy
    for one in (some, again):
        one.observe(x[40:], y[40:], predict=True)
    assert again.stream.recent_accuracy == some.stream.recent_accuracy


@pytest.mark.parametrize("name", FILTERS)
def test_a_filter_goes_on_behind_an_epoch_as_it_was(name, tmp_path):
    """At the end of an epoch nothing waits, and the checkpoint has the filter all the same."""
    x, y, _ = instances(300)
    through, first = (learner(FILTERS[name]) for _ in range(2))
    for some, epochs in ((through, 1), (through, 1), (first, 1)):
        some.fit((x, y), epochs=epochs)
    first.save(tmp_path / "a.safetensors")
    again = et.Learner.load(tmp_path / "a.safetensors")
    again.fit((x, y), epochs=1)
    assert again.history.column("instances_kept") == through.history.column("instances_kept")
    for key, array in through.parameters().items():
        assert array.tobytes() == again.parameters()[key].tobytes()


def test_what_waits_is_a_copy():
    own, shared, (x, y, _) = learner(), learner(), instances(60)
    buffer, labels = np.empty((20, *x.shape[1:]), np.float32), np.empty(20, np.int64)
    for start in range(0, 60, 20):  # more than a micro-batch at a time: the rest must be a copy
        buffer[:], labels[:] = x[start : start + 20], y[start : start + 20]
        shared.observe(buffer, labels)
        buffer[:], labels[:] = 7, 0
        own.observe(x[start : start + 20], y[start : start + 20])
    for name, array in own.parameters().items():
        assert array.tobytes() == shared.parameters()[name].tobytes()


def test_losses_of_predictions_have_smoothed_labels():
    """Losses that a filter judges by are those that steps have, smoothed labels included."""
    some, (x, y, _) = learner(label_smoothing=0.2), instances(16)
    predicted = learner(label_smoothing=0.2).observe(x, y, predict=True).loss
    assert predicted == pytest.approx(some.partial_fit(x, y).loss, rel=1e-5)


def test_seconds_of_a_call_hold_all_of_it(monkeypatch):
    """The time of a call has that of the filter and of predictions in it, not of steps alone."""
    some, (x, y, _) = learner("random:rate=0.5"), instances(40)
    choose = some.stream._selector.choose
    monkeypatch.setattr(some.stream._selector, "choose", lambda *given: time.sleep(0.2) or choose(*given))
    assert some.observe(x, y).seconds >= 0.2
    assert some.stream.totals["train"].seconds >= 0.2


def test_known_losses_stay_with_their_instances():
    """Losses that are known belong to their instances, though the first ones of the call pass."""
    some = learner(et.EarlyInstanceFilter(rate=0.3, start=10, uncertain=1.0))
    x = np.ones((40, *some.graph.input_shape), np.float32) * np.arange(40, dtype=np.float32)[:, None, None, None] / 40
    some.stream._selector.choose(x, np.zeros(40, np.int64), np.arange(40.0))
    images, _, _, losses = some.stream._selector._queue.columns()
    assert len(losses) and np.array_equal((images[:, 0, 0, 0] * 40).round(), losses)


def test_a_filter_sees_normalised_images():
    """The filter sees the images that its network sees."""
    some, (x, y, _) = learner(et.EarlyInstanceFilter(rate=0.3, start=0)), instances(16)
    some.graph.normalization = Normalization(np.full(1, 5, np.float32), np.full(1, 2, np.float32))
    some.observe(x, y)
    assert some.stream._selector._learner.graph.normalization is some.graph.normalization


def test_samples_are_told_by_their_place_in_the_call(monkeypatch):
    """Samples that cannot be predicted are told by their place in the call, though the first ones pass undecided."""
    some, (x, y, _) = learner(et.RandomFilter(rate=0.3, start=10)), instances(16)

    def decide(*_):
        error = NumericalError("not finite")
        error.samples = (0, 3)
        raise error

    monkeypatch.setattr(some.stream._selector, "decide", decide)
    with pytest.raises(NumericalError) as raised:
        some.observe(x, y)
    assert raised.value.samples == (10, 13)
    assert some.stream.position == 0


def test_blocks_of_candidates_are_rounded():

    assert [block_size(learner(f"random:rate={rate}", batch_size=16)) for rate in (0.35, 0.3, 1)] == [46, 53, 16]


def test_schedules_count_the_smaller_steps_of_epochs():
    """Every epoch ends with a smaller step for the rest, which the schedule has to count."""
    some = learner("random:rate=0.5", optimizer=et.SGD(lr=0.1, schedule=et.Schedule("cosine")))
    x, y, _ = instances(40)
    some.fit((x, y), epochs=30, normalize=False)
    assert some.step_count == pytest.approx(some.optimizer.schedule.total_steps, rel=0.15)


def test_policies_agree_in_name_and_all_settings():
    policy = parse_policy("filter", "random:rate=0.5,start=7")
    assert not agrees("filter", "selective:rate=0.5", policy)
    assert not agrees("filter", "random:rate=0.5,start=0", policy)
    assert not agrees("filter", "none", policy)
