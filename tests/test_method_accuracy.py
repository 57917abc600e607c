"""The benchmark of methods' accuracy: times that cannot be are refused, documents say what was measured, and where."""

from __future__ import annotations

import importlib
import itertools
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from edgetrain.data import Dataset

ROOT = Path(__file__).parents[1]
MACHINE = {"cpu": "A Processor", "architecture": "x86_64", "simd": "avx2", "cores": 2, "ram_mib": 1}


@pytest.fixture
def bench(monkeypatch, tmp_path):
    """Return the module, with results and documents in a folder of their own, and few settings."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    for name in ("machines", "method_times", "method_accuracy"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    module = importlib.import_module("method_accuracy")
    monkeypatch.setattr(module, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(module, "DOCUMENTS", tmp_path)
    module.RESULTS.mkdir()
    learning = {name: module.LEARNING[name] for name in ("random-50", "eif-50-error-maps-70")}
    monkeypatch.setattr(module, "LEARNING", learning)
    monkeypatch.setattr(module, "METHODS", {"sparse": module.SPARSE, "learning": learning})
    return module


def images(count: int = 400) -> Dataset:
    rng = np.random.default_rng(0)
    return Dataset.from_arrays(rng.integers(0, 256, (count, 28, 28), np.uint8), np.arange(count) % 10,
                               tuple(map(str, range(10))), "noise", layout="image")  # fmt: skip


# ---- times


class Feed:
    """Stands in for a learner: seconds per operation, of which the machine makes more now and then."""

    macs, batches = 2000, 2.0

    def __init__(self, seconds: float, slowness) -> None:
        self.seconds, self.slowness, self.settled = seconds, slowness, 0

    def settle(self) -> None:
        self.settled += 1

    def fastest(self) -> float:
        return self.seconds * next(self.slowness)


def test_times_are_ratios_to_dense_training_beside_them(bench):
    times = sys.modules["method_times"]
    # Dense, a, dense, b, dense in every round; of the first two rounds parts are slow.
    slowness = itertools.chain([1, 9, 9, 9, 1, 1, 1, 1, 5, 1], itertools.repeat(1))
    feeds = {name: Feed(seconds, slowness) for name, seconds in {"dense": 4e-9, "a": 2e-9, "b": 8e-9}.items()}
    found = times.seconds_per_batch(feeds, 6)
    assert found == pytest.approx({"dense": 4e-6, "a": 2e-6, "b": 8e-6})
    assert {feed.settled for feed in feeds.values()} == {7}


def test_a_slow_phase_of_both_is_none_of_the_ratio(bench):
    times = sys.modules["method_times"]
    slowness = (1 + 0.2 * (number // 9 % 2) for number in itertools.count())
    feeds = {name: Feed(seconds, slowness) for name, seconds in {"dense": 4e-9, "a": 2e-9}.items()}
    found = times.seconds_per_batch(feeds, 20)
    assert found["a"] / found["dense"] == pytest.approx(0.5)


def test_a_machine_that_is_not_quiet_gives_no_times(bench):
    times = sys.modules["method_times"]
    slowness = itertools.cycle([1, 1, 2, 2, 1])
    feeds = {name: Feed(1e-9, slowness) for name in ("dense", "a", "b")}
    with pytest.raises(SystemExit, match="too few: the machine is not quiet"):
        times.seconds_per_batch(feeds, 8)


@pytest.mark.parametrize(("seconds", "operations", "wrong"), [
    (0.9, 0.5, []), (1.01, 0.5, ["random"]), (1.05, 0.868, []), (1.2, 0.868, ["random"]),
])  # fmt: skip
def test_a_filter_takes_no_longer_than_what_it_leaves_out_a_part_of(bench, seconds, operations, wrong):
    times = sys.modules["method_times"]
    table = {"dense-1": 1.0, "random": seconds, "other": 9.0}
    assert times.contradictions(table, {"random": operations, "other": 0.1}, ["random", "not measured"]) == wrong


def test_measured_times_tell_the_machine_and_impossible_ones_are_not_stored(bench, monkeypatch):
    times = sys.modules["method_times"]
    monkeypatch.setattr(bench, "SPARSE", {"rigl-90": "rigl:weights=0.9"})
    monkeypatch.setattr(bench, "load_dataset", lambda source, split: images())
    for name, value in (("CALM", 1e9), ("SETTLE_BATCHES", 1), ("BATCHES", 2), ("FILTERED_BATCHES", 4)):
        monkeypatch.setattr(times, name, value)
    monkeypatch.setattr(bench, "contradictions", lambda *_: ["random-50"])
    with pytest.raises(SystemExit, match="leave out a part of: random-50; nothing is stored"):
        bench.measure("lenet5", 1, 2, "anywhere")
    assert not bench.seconds_file("lenet5").exists()
    monkeypatch.setattr(bench, "contradictions", lambda *_: [])
    bench.measure("lenet5", 1, 2, "anywhere")
    stored = json.loads(bench.seconds_file("lenet5").read_text())
    assert stored["machine"] == bench.machines.facts()
    assert stored["date"] == bench.machines.today()
    assert list(stored["seconds_per_batch"]) == ["dense-1", "rigl-90", "random-50", "eif-50-error-maps-70"]
    assert all(value > 0 for value in stored["seconds_per_batch"].values())


# ---- documents


def store(bench, name: str, *accuracies: float, done: float = 1.0, epochs: int = 20) -> None:
    for seed, accuracy in enumerate(accuracies):
        result = {"epochs": epochs, "accuracies": [accuracy / 100], "macs_done": done, "macs_dense": 1, "density": 0.1}
        (bench.RESULTS / f"lenet5-{name}-{seed}.json").write_text(json.dumps(result))


@pytest.fixture
def results(bench):
    for epochs, accuracy in ((1, 87.0), (10, 90.0), (20, 91.0)):
        store(bench, f"dense-{epochs}", accuracy, epochs=epochs)
    store(bench, "static-90", 89.9, 90.1, done=0.25)
    store(bench, "set-90", 90.4, 90.6, done=0.25)
    store(bench, "rigl-90", 90.3, 90.5, done=0.25)
    store(bench, "static-90-uniform", 88.0, done=0.01)
    store(bench, "random-50", 90.5, done=0.5)
    return bench


def seconds(bench, random: float, **others) -> None:
    table = {"dense-1": 1e-3, "rigl-90": 5e-3, "random-50": random}
    bench.seconds_file("lenet5").write_text(json.dumps({"threads": 2, "seconds_per_batch": table, **others}))


def test_the_documents_tell_seconds_machine_and_date(results):
    seconds(results, 0.5e-3, machine=MACHINE, date="2026-01-02")
    results.write_documents()
    text = (results.DOCUMENTS / "sparse_accuracy.md").read_text()
    assert "Time of a batch: 2 threads; machine: A Processor (x86_64, avx2), 2 processors, 2026-01-02." in text
    assert "| dense-1 | 1 | 1 | 87.00 | 0.00 | 0.100 | 1.000 | 1.00 | 1.9 | - | - |" in text
    assert "| rigl-90 | 2 | 20 | 90.40 | 0.14 | 0.100 | 0.250 | 5.00 | 188 |" in text
    assert "not to be trusted" not in text
    assert "random-50" not in text


@pytest.mark.parametrize("name", ["sparse", "learning"])
def test_the_documents_say_which_stored_times_cannot_be(results, name):
    seconds(results, 1.5e-3)
    results.write_documents()
    text = (results.DOCUMENTS / f"{name}_accuracy.md").read_text()
    assert "machine: not recorded." in text
    assert "**Times not to be trusted**: longer than dense training, which they leave out a part of: random-50." in text


def test_the_document_compares_with_what_was_published(results):
    results.write_documents()
    text = (results.DOCUMENTS / "sparse_accuracy.md").read_text()
    row = "| lenet5, ERK | 90.00 | 90.50 | 90.40 | +0.50 (0.14) | +0.40 (0.14) | -0.10 (0.14) |"
    assert row in text
    assert "- RigL and SET are equal within the seeds (twice the error): lenet5, ERK\n" in text
    assert "So here RigL is not ahead of SET" in text
    # Dense training has 89.10 after 5 epochs.
    assert "- reach it: rigl-90 (+1.30); set-90 (+1.40); static-90 (+0.90)\n" in text
    assert "- take less than the shortest dense training: static-90-uniform\n" in text
    store(results, "rigl-90", 91.3, 91.5, done=0.25)
    results.write_documents()
    text = (results.DOCUMENTS / "sparse_accuracy.md").read_text()
    assert "- RigL is ahead: lenet5, ERK\n" in text
    assert "So here RigL is not ahead" not in text


def test_the_best_dense_training_may_be_a_shorter_one(results):
    store(results, "dense-14", 91.0, epochs=14)
    store(results, "dense-20", 90.0)
    seconds(results, 0.5e-3, machine=MACHINE, date="2026-01-02")
    table = json.loads(results.seconds_file("lenet5").read_text())
    table["seconds_per_batch"] |= {"rigl-90": 1e-3, "set-90": 0.5e-3}
    results.seconds_file("lenet5").write_text(json.dumps(table))
    results.write_documents()
    text = (results.DOCUMENTS / "sparse_accuracy.md").read_text()
    by_time = text[text.index("dense training in the same time is the aim") :]
    assert "- reach it: rigl-90 (+0.40, -0.60 to the best shorter one); set-90 (+0.50)\n" in by_time
    assert results.Judge(results.stored("lenet5")).best(0.5) is None


def test_one_command_runs_times_and_documents(bench, monkeypatch):
    done = []
    for name in ("run", "measure", "write_documents"):
        monkeypatch.setattr(bench, name, lambda *given, name=name: done.append((name, *given)))
    monkeypatch.setattr(sys, "argv", ["method_accuracy.py", "all", "resnet8", "--threads", "1", "--data", "here"])
    bench.main()
    assert done == [("run", "resnet8", None, 2, 1, float("inf"), "here"), ("measure", "resnet8", 1, 20, "here"),
                    ("write_documents",)]  # fmt: skip
