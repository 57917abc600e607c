"""What runs leave behind: whole files, rows that belong to checkpoints, the best epoch, the account."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from dataclasses import replace

import numpy as np
import pytest

from edgetrain import Learner
from edgetrain.checkpoint import _digest, _without_duplicates, load_checkpoint
from edgetrain.cli import sessions, streaming
from edgetrain.cli.config import from_run
from edgetrain.cli.progress import choose_display
from edgetrain.cli.savings import savings_of
from edgetrain.cli.sessions import taken_up
from edgetrain.cli.signals import StopOnSignal, interrupts_kept
from edgetrain.errors import CheckpointError, DataError, UsageError
from edgetrain.history import COUNTED, EpochRecord, History
from edgetrain.runs import Run, open_run
from tests.cli_support import FIT, STREAM, run, write_data


def test_events_are_on_the_disk_when_they_are_told(tmp_path, monkeypatch):
    synced, fsync = [], os.fsync

    def noted(handle):
        synced.append((os.readlink(f"/proc/self/fd/{handle}"), os.fstat(handle).st_size > 0))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", noted)
    Run(tmp_path).log("started")
    assert synced == [(str(tmp_path / "events.jsonl"), True)]


@pytest.mark.parametrize(
    "write",
    [
        lambda run: run.write_metrics(()),
        lambda run: run.write_config({"a": {"b": 1}}),
        lambda run: run.keep_metrics(0),
        lambda run: run.write_environment({"b": 1}),
    ],
    ids=["R3", "R4", "R11", "environment"],
)
def test_a_full_disk_leaves_the_old_files(tmp_path, monkeypatch, write):
    run = Run(tmp_path)
    files = (run.metrics_file, run.config_file, run.environment_file)
    for file in files:
        file.write_text("old\n")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(CheckpointError, match="No space left"):
        write(run)
    assert [file.read_text() for file in files] == ["old\n"] * 3


def test_the_best_checkpoint_outlives_worse_epochs_and_resume_notes_its_epochs(capsys, tmp_path, monkeypatch):
    """The best checkpoint stays when later epochs are worse; a changed number of epochs is remembered."""
    monkeypatch.chdir(tmp_path)
    write_data(tmp_path, 40)
    found = iter([0.5, 0.75, 0.25, 0.1])
    monkeypatch.setattr("edgetrain.fitting.evaluate_dataset", lambda *_: {"loss": 1.0, "accuracy": next(found)})
    code, out, _ = run(capsys, *FIT, "--epochs", "3", "--json")
    result = json.loads(out)
    assert (code, result["best_epoch"], result["best_accuracy"], result["accuracy"]) == (0, 2, 0.75, 0.25)
    made = open_run("runs/fit-1")
    assert (load_checkpoint(made.best).position.epoch, load_checkpoint(made.last).position.epoch) == (2, 3)
    assert run(capsys, "resume", "runs/fit-1", "--epochs", "4", "--quiet")[0] == 0
    assert made.read_config()["training"]["epochs"] == 4
    assert load_checkpoint(made.best).position.epoch == 2


def test_the_first_of_equal_epochs_is_the_best():
    one = EpochRecord(
        epoch=1,
        steps=1,
        loss=1.0,
        accuracy=0.5,
        validation_loss=1.0,
        validation_accuracy=0.75,
        lr=0.1,
        seconds=1.0,
        images_per_second=1.0,
        instances_seen=1,
        instances_trained=1,
        macs_dense=1,
        macs_done=1,
    )
    assert History([one, replace(one, epoch=2, accuracy=0.9)]).best() is one


def test_rows_without_their_checkpoint_are_taken_back(capsys, tmp_path, monkeypatch):
    """Rows that a checkpoint does not know are taken back, though they end where it stands."""
    monkeypatch.chdir(tmp_path)
    write_data(tmp_path, 80)
    kept, train = sessions.save_checkpoint, streaming.StreamSession.train

    def full(*_):
        raise CheckpointError("no space")

    def training(self):
        train(self)
        monkeypatch.setattr(sessions, "save_checkpoint", full)  # behind the row of the rest, whose checkpoint fails

    monkeypatch.setattr(streaming.StreamSession, "train", training)
    flags = [*STREAM, "--save-every", "0", "--quiet"]
    assert run(capsys, *flags)[0] == 3
    monkeypatch.setattr(sessions, "save_checkpoint", kept)
    monkeypatch.setattr(streaming.StreamSession, "train", train)
    assert len(open_run("runs/fit-1").read_metrics()) == 1
    assert run(capsys, "resume", "runs/fit-1", "--quiet")[0] == 0
    rows = open_run("runs/fit-1").read_metrics()
    assert [(row["epoch"], row["instances_seen"]) for row in rows] == [(1, 80)]


def test_instances_without_their_row_are_learned_again(capsys, tmp_path, monkeypatch):
    """Where rows cannot be written, no checkpoint knows their instances: resuming makes them again."""
    monkeypatch.chdir(tmp_path)
    write_data(tmp_path, 80)
    kept = Run.add_metrics

    def full(*_):
        raise CheckpointError("no space")

    monkeypatch.setattr(Run, "add_metrics", full)
    flags = [*STREAM, "--window", "20", "--quiet"]
    assert run(capsys, *flags)[0] == 3
    monkeypatch.setattr(Run, "add_metrics", kept)
    assert run(capsys, "resume", "runs/fit-1", "--quiet")[0] == 0
    assert sum(row["instances_seen"] for row in open_run("runs/fit-1").read_metrics()) == 80


def test_rows_of_predictions_are_about_all_instances(capsys, tmp_path, monkeypatch):
    """Rows of a stream that predicts first are about all its instances, whatever the filter keeps."""
    monkeypatch.chdir(tmp_path)
    write_data(tmp_path, 80)
    flags = [*STREAM, "--predict-first", "--filter", "random:rate=0.25", "--quiet"]
    assert run(capsys, *flags)[0] == 0
    (row,) = open_run("runs/fit-1").read_metrics()
    stream = load_checkpoint(open_run("runs/fit-1").last).stream
    assert row["accuracy"] == pytest.approx(stream.accuracy)
    assert row["loss"] == pytest.approx(stream.totals["predict"].mean_loss)


def test_what_is_saved_is_a_share_of_dense_training():

    counts = dict.fromkeys(COUNTED, 0) | {"macs_dense": 100, "macs_done": 40, "saved_filter": 50, "saved_weights": 10}
    told = savings_of(counts, 3.0, None, {"seconds": 12.0, "how": ""})
    assert (told["time_saved"], told["share_done"]) == (0.75, 0.4)
    assert (told["shares"]["saved_filter"], told["shares"]["saved_weights"]) == (0.5, 0.1)


def test_equal_bytes_of_other_types_and_shapes_are_no_duplicates():

    zeros = {"a": np.zeros(4), "b": np.zeros(4, np.int64), "c": np.zeros((2, 2)), "d": np.zeros(4)}
    assert _without_duplicates(zeros)[1] == {"d": "a"}
    assert _digest({"a": zeros["a"]}, {}) != _digest({"z": zeros["a"]}, {})
    assert len({_digest({"a": array}, {}) for array in zeros.values()}) == 3


def test_an_interrupt_that_a_callback_swallows_counts_all_the_same():
    with pytest.raises(KeyboardInterrupt), interrupts_kept(), contextlib.suppress(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_interrupt_that_asks_for_a_stop_goes_on_asking():
    with StopOnSignal(choose_display(True, False, 1)) as stop:
        with interrupts_kept():
            signal.raise_signal(signal.SIGINT)
        assert stop.requested()


def test_a_second_signal_that_is_no_interrupt_aborts_nothing():
    with StopOnSignal(choose_display(True, False, 1)) as stop:
        for _ in range(2):
            signal.raise_signal(signal.SIGTERM)
        assert stop.requested()


def test_behind_what_is_not_to_be_broken_a_second_interrupt_aborts_again():
    with StopOnSignal(choose_display(True, False, 1)) as stop:
        with stop.unbroken():
            for _ in range(2):
                signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_a_closed_terminal_that_is_ignored_asks_for_no_stop():
    """As ``nohup`` has it."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopOnSignal(choose_display(True, False, 1)) as stop:
            signal.raise_signal(signal.SIGHUP)
            assert not stop.requested()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_run_folder_has_its_configuration_last(capsys, tmp_path, monkeypatch):
    """A folder that has one is resumed: what is read then must be there."""

    def killed(*_):
        raise SystemExit(9)

    write_data(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Run, "write_metrics", killed)
    assert run(capsys, *FIT, "--quiet")[0] == 9
    assert (tmp_path / "runs/fit-1").is_dir()
    assert not (tmp_path / "runs/fit-1/config.toml").exists()


def test_a_run_that_goes_on_has_the_threads_of_its_configuration(capsys, tmp_path, monkeypatch):
    write_data(tmp_path, 40)
    monkeypatch.chdir(tmp_path)
    assert run(capsys, *FIT, "--quiet")[0] == 0
    some = open_run("runs/fit-1")
    table = some.read_config()
    for threads in (1, 3):
        config = from_run(table | {"device": table["device"] | {"threads": threads}}, some.config_file)
        assert taken_up(some, config, choose_display(True, False, 1)).threads == threads


def test_a_line_that_cannot_be_written_whole_leaves_no_half(tmp_path, monkeypatch):
    some = Run(tmp_path)
    some.log("started")
    before = some.events_file.read_bytes()

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UsageError, match="No space left on device"):
        some.log("saved")
    assert some.events_file.read_bytes() == before


def failing(times, real):
    """Return a function that fails so many times as on a full disk, behind the first call."""
    calls = []

    def write(*arguments):
        calls.append(arguments)
        if 1 < len(calls) <= 1 + times:
            raise CheckpointError("no space")
        return real(*arguments)

    return write


@pytest.mark.parametrize("flags", [FIT, [*STREAM, "--window", "20", "--save-every", "0"]], ids=["epochs", "stream"])
def test_a_checkpoint_on_the_way_that_cannot_be_written_ends_nothing(flags, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_data(tmp_path, 80)
    monkeypatch.setattr(sessions, "save_checkpoint", failing(2, sessions.save_checkpoint))
    code, out, err = run(capsys, *flags)
    assert code == 0
    assert out.count("no space; training goes on, and the next checkpoint is tried as usual") >= 1, err
    finished = open_run("runs/fit-1")
    assert load_checkpoint(finished.last).step_count
    assert len(finished.read_metrics()) == (4 if "--stream" in flags else 3)


def test_a_run_that_ends_early_and_cannot_be_saved_tells_both(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_data(tmp_path, 80)
    monkeypatch.setattr(sessions, "save_checkpoint", failing(9, sessions.save_checkpoint))
    monkeypatch.setattr(Learner, "observe", lambda *_, **__: (_ for _ in ()).throw(DataError("a bad instance")))
    code, _, err = run(capsys, *STREAM)
    assert code == 3
    assert "a bad instance; no space; runs/fit-1/last.safetensors holds an earlier state, go on with" in err
