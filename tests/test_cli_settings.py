"""Settings of a run reach what they are for: flags, files and profiles, up to the library."""

from __future__ import annotations

import inspect
import os
import time
from dataclasses import replace

import numpy as np
import pytest

import edgetrain as et
import edgetrain.onnx_io
from edgetrain.checkpoint import load_checkpoint
from edgetrain.cli import app
from edgetrain.cli.config import FLAG_KEYS, effective, from_flags
from edgetrain.cli.sources import describe_data, load_splits, make_graph
from edgetrain.runs import open_run
from tests.cli_support import FIT, STREAM, run, write_data


def test_a_run_trains_what_the_library_trains_with_the_same_settings(capsys, tmp_path, monkeypatch):
    """What a run trains is what the library trains with the same settings, and every setting counts."""
    monkeypatch.chdir(tmp_path)
    write_data(tmp_path, 80)
    flags = ["--epochs", "1", "--lr", "0.02", "--schedule", "constant", "--warmup", "0", "--weight-decay", "0",
             "--momentum", "0.5", "--no-nesterov", "--label-smoothing", "0.1", "--quiet"]  # fmt: skip
    assert run(capsys, *FIT, *flags)[0] == 0
    data = et.load_dataset("digits.npz")
    graph = et.models.lenet5(num_classes=10, seed=1)
    some = et.Learner(
        graph, batch_size=8, seed=1, threads=1, label_smoothing=0.1, optimizer=et.SGD(lr=0.02, momentum=0.5)
    )
    some.fit(data, epochs=1, augmentation="shift:2")
    found = load_checkpoint(open_run("runs/fit-1").last).parameters()
    for name, array in some.parameters().items():
        assert np.array_equal(found[name], array), name


def test_inputs_stay_as_they_are_with_no_normalize(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_data(tmp_path, 40)
    assert run(capsys, *FIT, "--epochs", "1", "--no-normalize", "--quiet")[0] == 0
    assert load_checkpoint(open_run("runs/fit-1").last).graph.normalization is None


def test_epochs_are_saved_after_minutes_not_seconds(capsys, tmp_path, monkeypatch):
    """Minutes, not seconds."""
    monkeypatch.chdir(tmp_path)
    write_data(tmp_path, 80)
    begin, now = time.monotonic(), iter(range(0, 10**6, 8))
    monkeypatch.setattr("time.monotonic", lambda: begin + next(now))
    assert run(capsys, *FIT, "--epochs", "1", "--save-every", "5", "--quiet")[0] == 0
    assert "saved" not in {event["event"] for event in open_run("runs/fit-1").read_events()}


def test_streams_are_saved_after_minutes_not_seconds(capsys, tmp_path, monkeypatch):

    monkeypatch.chdir(tmp_path)
    write_data(tmp_path, 80)
    begin, now = time.monotonic(), iter(range(0, 10**6, 8))
    monkeypatch.setattr("time.monotonic", lambda: begin + next(now))
    flags = [*STREAM, "--save-every", "9", "--quiet"]
    assert run(capsys, *flags)[0] == 0
    assert "saved" not in {event["event"] for event in open_run("runs/fit-1").read_events()}


@pytest.mark.parametrize("stream", [False, True], ids=["epochs", "stream"])
def test_resume_takes_other_threads(capsys, tmp_path, monkeypatch, stream):
    monkeypatch.chdir(tmp_path)
    write_data(tmp_path, 80)
    assert run(capsys, *(STREAM if stream else [*FIT, "--epochs", "1"]), "--quiet")[0] == 0
    if stream:
        write_data(tmp_path, 160)
    more = [] if stream else ["--epochs", "2"]
    assert run(capsys, "resume", "runs/fit-1", "--threads", "2", "--quiet", *more)[0] == 0
    assert load_checkpoint(open_run("runs/fit-1").last).threads == 2


def test_test_data_are_preferred_to_validation_data(tmp_path):
    image = pytest.importorskip("PIL.Image")

    for split, grey in (("train", 10), ("validation", 20), ("test", 30)):
        for name in "ab":
            (tmp_path / split / name).mkdir(parents=True)
            image.fromarray(np.full((4, 4), grey, np.uint8)).save(tmp_path / split / name / "0.png")
    _, held_out, told = load_splits(effective({"data": {"source": str(tmp_path)}})[0], None)
    assert (told, set(held_out.images.ravel())) == ("test", {30})


def test_the_seed_makes_the_network():

    data = et.load_dataset("embedded", split="test")
    graphs = [make_graph(effective({"training": {"seed": seed}})[0], data) for seed in (1, 2)]
    assert any(not np.array_equal(array, graphs[1].arrays[name]) for name, array in graphs[0].arrays.items())


def test_the_seed_chooses_what_is_held_out(tmp_path, monkeypatch):
    """Which images are held out depends on the seed of the run."""
    monkeypatch.chdir(tmp_path)
    np.savez("only.npz", x=np.arange(40 * 16, dtype=np.float32).reshape(40, 1, 4, 4), y=np.arange(40) % 2)
    held = [
        load_splits(effective({"data": {"source": "only.npz"}, "training": {"seed": seed}})[0], None)[1]
        for seed in (1, 2)
    ]
    assert not np.array_equal(held[0].images, held[1].images)


@pytest.mark.parametrize("part", [0, 1], ids=["training", "validation"])
@pytest.mark.parametrize("what", ["images", "labels"])
def test_all_of_the_data_is_in_their_description(part, what):
    data = et.data.Dataset.from_arrays(np.zeros((6, 1, 4, 4), np.uint8), [0, 1, 2, 0, 1, 2])
    array = getattr(data, what).copy()
    array[[0, 1]] = 1
    other = [data, data]
    other[part] = replace(data, **{what: array}, allow_missing_classes=True)
    assert describe_data(data, data) != describe_data(*other)


def test_swat_clips_gradients_unless_told_otherwise():
    for text, clip in (("swat:weights=0.9", 1.0), ("rigl:weights=0.9", None)):
        assert effective({"methods": {"sparsity": text}})[0].training.clip_norm == clip
    assert (
        effective({"methods": {"sparsity": "swat:weights=0.9"}, "training": {"clip_norm": 3.0}})[0].training.clip_norm
        == 3.0
    )


def test_the_rate_of_a_file_outlives_another_optimizer():
    config, _, _ = effective({"training": {"optimizer": "adam"}}, file={"training": {"lr": 0.02}})
    assert config.training.lr == 0.02
    assert effective({"training": {"optimizer": "adam"}})[0].training.lr == 0.001


@pytest.mark.parametrize(("optimizer", "lr"), [("adam", 0.001), ("adamw", 0.001)])
def test_optimizers_with_moments_have_a_rate_of_their_own(optimizer, lr):
    assert effective({"training": {"optimizer": optimizer}})[0].training.lr == lr


def test_a_budget_is_counted_in_mebibytes():
    config, _, _ = from_flags({"memory_budget": "64MiB"})
    assert config.device.memory_budget_mib == 64


def test_threads_are_at_most_those_of_the_machine(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    assert effective({"device": {"profile": "raspberrypi4"}})[0].device.threads == 1


def test_every_flag_of_fit_is_a_setting():
    """Every flag of fit is a setting, or one of those that are told apart here."""
    known = {"context", "memory_budget", "recipe", "baseline", "config", "set_", "out", "quiet", "json"}
    flags = {name.rstrip("_") if name == "filter_" else name for name in inspect.signature(app.fit).parameters}
    assert flags - known == set(FLAG_KEYS)
    assert from_flags({"label_smoothing": 0.25})[0].training.label_smoothing == 0.25
    assert from_flags({"save_every": 3.0})[0].training.save_every_minutes == 3
    assert from_flags({"normalize": False})[0].data.normalize is False


def test_streams_average_unless_told_otherwise():
    stream = {"stream": {"enabled": True}}
    assert effective(stream, file={"training": {"averaging": 0.5}})[0].training.averaging == 0.5
    assert effective(stream)[0].training.averaging == 0.99
