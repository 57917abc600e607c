"""Stopping, being killed, failing, and going on to the same result."""

from __future__ import annotations

import fcntl
import io
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from edgetrain import checkpoint
from edgetrain.checkpoint import read_checkpoint
from edgetrain.cli import sessions
from edgetrain.errors import CheckpointError, UsageError
from edgetrain.runs import open_run
from tests.cli_support import FIT, ROOT, assert_same_result, run, stored_data, trained, write_data


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Make a folder with data and one uninterrupted run."""
    return trained(tmp_path_factory.mktemp("place"))


@pytest.fixture
def inside(place, monkeypatch) -> Path:
    monkeypatch.chdir(place)
    return place


# ---- stopping and going on


def started(folder: Path, out: Path, *flags: str) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "edgetrain", *FIT, *flags, "--out", str(out)]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)

    def heed() -> None:  # what runs the tests may ignore it, as nohup does
        signal.signal(signal.SIGHUP, signal.SIG_DFL)

    return subprocess.Popen(command, cwd=folder, env=environment, text=True, preexec_fn=heed, **pipes)


def wait_for_epochs(process: subprocess.Popen, metrics: Path, count: int) -> None:
    """Wait until ``count`` epochs are in the table; the process is then in the middle of the next one."""
    deadline = time.monotonic() + 120
    while not metrics.exists() or metrics.read_bytes().count(b"\n") <= count:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.002)


@pytest.mark.parametrize("epochs", [0, 1], ids=["in_the_first_epoch", "in_the_second_epoch"])
def test_killed_run_resumes_to_the_same_result(inside, capsys, tmp_path, epochs):
    process = started(inside, tmp_path)
    wait_for_epochs(process, tmp_path / "fit-1/config.toml", 0)
    wait_for_epochs(process, tmp_path / "fit-1/metrics.csv", epochs)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    code, out, _ = run(capsys, "resume", tmp_path / "fit-1")
    assert code == 0
    assert "resuming" in out
    assert_same_result(tmp_path / "fit-1", inside / "runs/fit-1")


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP"])
def test_signal_saves_and_resumes_to_the_same_result(inside, capsys, tmp_path, name):
    process = started(inside, tmp_path)
    wait_for_epochs(process, tmp_path / "fit-1/metrics.csv", 1)
    process.send_signal(getattr(signal, name))
    _, err = process.communicate()
    assert process.returncode == 5
    assert err.startswith("interrupted: stopped in epoch ")
    assert f"go on with: edgetrain resume {tmp_path / 'fit-1'}" in err
    assert open_run(tmp_path / "fit-1").read_events()[-1]["event"] == "interrupted"
    code, _, _ = run(capsys, "report", tmp_path / "fit-1")
    assert code == 0
    code, _, _ = run(capsys, "resume", tmp_path / "fit-1", "--quiet")
    assert code == 0
    assert_same_result(tmp_path / "fit-1", inside / "runs/fit-1")


@pytest.mark.parametrize("flags", [[], ["--json"]], ids=["lines", "json"])
def test_a_run_whose_output_nobody_reads_any_more_goes_on(inside, tmp_path, flags):
    with started(inside, tmp_path, *flags) as process:
        closed, other = (process.stderr, process.stdout) if flags else (process.stdout, process.stderr)
        assert closed.readline()
        closed.close()
        text = other.read()
    assert process.returncode == 0
    if flags:
        assert json.loads(text)["epochs"] == 3
    else:
        assert text == "nobody reads standard output any more; going on without it\n"
    assert_same_result(tmp_path / "fit-1", inside / "runs/fit-1")


def test_a_run_whose_output_cannot_be_written_goes_on(inside, tmp_path):
    """A disk that is full of the log, or a terminal that is gone: the run folder may be elsewhere."""
    command = [sys.executable, "-m", "edgetrain", *FIT, "--out", str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, env=environment)
    assert done.returncode == 0
    assert done.stderr == "standard output cannot be written (No space left on device); going on without it\n"
    assert_same_result(tmp_path / "fit-1", inside / "runs/fit-1")


def test_an_error_that_cannot_be_told_has_its_exit_code():
    command = [sys.executable, "-m", "edgetrain", "evaluate", "nothing"]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, stderr=full, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 2


def test_what_the_output_cannot_encode_is_replaced(inside, tmp_path):
    command = [sys.executable, "-m", "edgetrain", *FIT, "--epochs", "1", "--out", str(tmp_path / "läuft")]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, env=environment, capture_output=True, encoding="ascii")
    assert (done.returncode, done.stderr) == (0, "")
    assert "l?uft/fit-1/model.onnx" in done.stdout


def test_a_run_without_standard_output_goes_on(inside, tmp_path):
    """Closed before the program began, as some services do."""
    shell = 'exec "$@" >&-'
    command = ["sh", "-c", shell, "sh", sys.executable, "-m", "edgetrain", *FIT, "--out", str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    assert_same_result(tmp_path / "fit-1", inside / "runs/fit-1")


def test_second_interrupt_aborts_at_once():
    from edgetrain.cli.progress import Display
    from edgetrain.cli.signals import StopOnSignal

    before = signal.getsignal(signal.SIGINT)
    with StopOnSignal(Display(io.StringIO())) as stop:
        assert not stop.requested()
        signal.raise_signal(signal.SIGINT)
        assert stop.requested()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("stream", [False, True])
def test_a_run_is_resumed_though_the_file_of_its_profile_is_gone(inside, capsys, tmp_path, stream):
    profile, data = tmp_path / "mine.toml", tmp_path / "some.npz"
    shutil.copy(Path(__file__).parents[1] / "device_profiles" / "raspberrypi4.toml", profile)
    arrays = {name: array[:100] for name, array in stored_data().items()}
    np.savez(data, **{name: array[:60] if stream else array for name, array in arrays.items()})
    flags = ["--stream"] if stream else ["--epochs", "1"]
    run(capsys, "fit", "--data", data, "--profile", profile, "--threads", "1", "--out", tmp_path, *flags)
    profile.unlink()
    np.savez(data, **arrays)
    code, _, err = run(capsys, "resume", tmp_path / "fit-1", *([] if stream else ["--epochs", "2"]))
    assert (code, err) == (0, "")


def test_a_path_that_no_settings_can_hold_is_refused(inside, capsys, tmp_path):
    code, _, err = run(capsys, "fit", "--data", os.fsdecode(b"p\xff.npz"), "--out", tmp_path)
    assert code == 2
    assert "expected a path in UTF-8" in err
    assert not any(tmp_path.iterdir())


def test_finished_run_has_nothing_to_resume(inside, capsys):
    code, _, err = run(capsys, "resume", "runs/fit-1")
    assert code == 2
    assert "3 of 3 epochs are done, nothing is left" in err
    assert "--epochs 4" in err


@pytest.mark.parametrize(
    "flags", [["--epochs", "200"], ["--epochs", "1", "--augment", "", "--stream", "--data", "-"]],
    ids=["fit", "stream"],
)
def test_a_run_that_another_process_writes_is_not_resumed(inside, capsys, tmp_path, flags):
    process = started(inside, tmp_path, *flags)
    wait_for_epochs(process, tmp_path / "fit-1/config.toml", 0)
    code, _, err = run(capsys, "resume", tmp_path / "fit-1")
    process.kill()
    process.communicate()
    assert code == 2
    assert "fit-1: another process is using it; wait until it ends or stop it, then try again" in err
    assert [event["event"] for event in open_run(tmp_path / "fit-1").read_events()].count("resumed") == 0


def test_a_run_is_locked_while_it_is_resumed_and_not_longer(inside, capsys, tmp_path):
    run(capsys, *FIT, "--epochs", "1", "--quiet", "--out", tmp_path)
    with (tmp_path / "fit-1/events.jsonl").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        code, _, err = run(capsys, "resume", tmp_path / "fit-1", "--epochs", "2")
        assert code == 2
        assert "another process is using it" in err
    assert run(capsys, "resume", tmp_path / "fit-1", "--epochs", "2", "--quiet")[0] == 0


def test_resume_with_more_epochs_says_what_changed(inside, capsys, tmp_path):
    run(capsys, *FIT, "--epochs", "1", "--quiet", "--out", tmp_path)
    code, out, _ = run(capsys, "resume", tmp_path / "fit-1", "--epochs", "2", "--threads", "2")
    assert code == 0
    assert "changed: training.epochs was 1, is now 2" in out
    assert "changed: device.threads was 1, is now 2" in out
    assert [row["epoch"] for row in open_run(tmp_path / "fit-1").read_metrics()] == [1, 2]


# ---- endings that were cut off


def without_ending(source: Path, folder: Path, missing: tuple[str, ...]) -> Path:
    """Copy a finished run, without its ONNX file or its last event."""
    found = shutil.copytree(source, folder)
    if "model" in missing:
        (found / "model.onnx").unlink()
    if "event" in missing:
        lines = (found / "events.jsonl").read_text().splitlines(keepends=True)
        (found / "events.jsonl").write_text("".join(line for line in lines if '"finished"' not in line))
    return found


@pytest.mark.parametrize("missing", [("model",), ("event",), ("model", "event")], ids="_and_".join)
def test_resume_writes_the_ending_of_a_run_whose_epochs_are_done(inside, capsys, tmp_path, missing):
    found = without_ending(inside / "runs/fit-1", tmp_path / "fit-1", missing)
    code, out, _ = run(capsys, "resume", found)
    assert code == 0
    assert "to write its last files" in out
    assert "test accuracy" in out
    assert_same_result(found, inside / "runs/fit-1")
    assert open_run(found).status() == "finished"
    assert run(capsys, "resume", found)[0] == 2


def test_a_run_whose_last_file_found_no_space_is_finished_later(inside, capsys, tmp_path, monkeypatch):
    def fail(*_):
        raise CheckpointError("model.onnx: cannot be written (No space left on device)")

    with monkeypatch.context() as full:
        full.setattr("edgetrain.learner.Learner.export_onnx", fail)
        assert run(capsys, *FIT, "--quiet", "--out", tmp_path)[0] == 3
    assert run(capsys, "resume", tmp_path / "fit-1")[0] == 0
    assert_same_result(tmp_path / "fit-1", inside / "runs/fit-1")


def test_a_stop_in_the_baseline_leaves_a_finished_run(inside, capsys, tmp_path, monkeypatch):
    found, twin = tmp_path / "fit-1", tmp_path / "fit-1/baseline"
    locked = []

    def stop(_) -> bool:
        if twin.is_dir():
            with pytest.raises(UsageError, match="another process is using it"):
                open_run(twin).lock()
            locked.append(twin)
        return twin.is_dir()

    with monkeypatch.context() as signals:
        signals.setattr("edgetrain.cli.signals.StopOnSignal.requested", stop)
        flags = ["--epochs", "1", "--baseline", "--filter", "random:rate=1", "--quiet", "--out", tmp_path]
        code, _, err = run(capsys, *FIT, *flags)
    assert code == 5
    assert err.endswith(f"go on with: edgetrain resume {found}\n")
    assert locked
    assert (found / "model.onnx").exists()
    assert open_run(found).status() == "finished"
    code, out, _ = run(capsys, "resume", found, "--json")
    assert code == 0
    assert json.loads(out)["savings"]["dense"]["how"] == "measured, the same data without the methods"
    assert open_run(twin).status() == "finished"
    assert "nothing is left" in run(capsys, "resume", found)[2]
    assert (twin / "model.onnx").read_bytes() == (found / "model.onnx").read_bytes()


def test_a_baseline_is_a_finished_run_of_its_own(inside, capsys, tmp_path):
    flags = ["--epochs", "1", "--baseline", "--filter", "random:rate=0.5", "--json", "--out", tmp_path]
    code, out, _ = run(capsys, *FIT, *flags)
    assert code == 0
    assert json.loads(out)["savings"]["dense"]["run"] == str(tmp_path / "fit-1/baseline")
    assert open_run(tmp_path / "fit-1/baseline").status() == "finished"
    events = [event["event"] for event in open_run(tmp_path / "fit-1").read_events()]
    assert events == ["started", "epoch", "finished", "account"]


def test_a_kill_between_last_and_best_leaves_no_old_best(inside, capsys, tmp_path, monkeypatch):
    _, table = read_checkpoint("runs/fit-1/best.safetensors")
    save = sessions.save_checkpoint

    def dying(learner, path) -> None:
        if path.name == "best.safetensors" and learner.position.epoch == table["position"]["epoch"]:
            sys.exit(9)
        save(learner, path)

    with monkeypatch.context() as death:
        death.setattr(sessions, "save_checkpoint", dying)
        assert run(capsys, *FIT, "--quiet", "--out", tmp_path)[0] == 9
    assert run(capsys, "resume", tmp_path / "fit-1", "--quiet")[0] == 0
    assert_same_result(tmp_path / "fit-1", inside / "runs/fit-1")


# ---- what is refused


def test_resume_refuses_other_data(inside, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_data(tmp_path, 320)
    run(capsys, *FIT, "--epochs", "1", "--quiet")
    write_data(tmp_path, 330)
    code, _, err = run(capsys, "resume", "runs/fit-1", "--epochs", "2")
    assert code == 3
    assert "the data changed since the run began (training_images was 320, is 330)" in err


def edit(config: Path, *changes: tuple[str, str]) -> None:
    text = config.read_text()
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    config.write_text(text)


EDITS = {
    "batch_size": ("batch_size = 8", "batch_size = 16", "device.batch_size was 8, is now 16"),
    "optimizer": ('optimizer = "sgd"', 'optimizer = "adam"', "training.optimizer was sgd, is now adam;"),
    "momentum": ("momentum = 0.9", "momentum = 0.5", "training.momentum was 0.9, is now 0.5"),
    "averaging": ("averaging = 0.0", "averaging = 0.9", "training.averaging was 0.0, is now 0.9"),
    "seed": ("seed = 1", "seed = 2", "training.seed was 1, is now 2"),
    "model": ('name = "lenet5"', 'name = "resnet8"', "model.name was lenet5, is now resnet8"),
    "method": ('filter = "none"', 'filter = "random:rate=0.5"', "methods.filter was none, is now random:rate=0.5"),
}


@pytest.mark.parametrize("name", EDITS)
def test_resume_refuses_settings_that_the_checkpoint_does_not_have(inside, capsys, tmp_path, name):
    old, new, message = EDITS[name]
    found = shutil.copytree(inside / "runs/fit-1", tmp_path / "fit-1")
    edit(found / "config.toml", (old, new))
    before = {file.name: file.read_bytes() for file in found.iterdir()}
    code, _, err = run(capsys, "resume", found, "--epochs", "4")
    assert code == 2
    assert f"config.toml: {message}" in err
    assert f"start a new run with: edgetrain fit --config {found / 'config.toml'}" in err
    assert {file.name: file.read_bytes() for file in found.iterdir()} == before


def test_resume_names_every_edited_setting_of_a_stream_too(inside, capsys, tmp_path):
    run(capsys, *FIT, "--epochs", "1", "--augment", "", "--stream", "--quiet", "--out", tmp_path)
    edit(tmp_path / "fit-1/config.toml", ("seed = 1", "seed = 2"), ("batch_size = 8", "batch_size = 9"))
    code, _, err = run(capsys, "resume", tmp_path / "fit-1")
    assert code == 2
    assert "device.batch_size was 8, is now 9; training.seed was 1, is now 2; a run goes on with what" in err


def test_epochs_may_be_edited(inside, capsys, tmp_path):
    found = shutil.copytree(inside / "runs/fit-1", tmp_path / "fit-1")
    edit(found / "config.toml", ("epochs = 3", "epochs = 4"))
    assert run(capsys, "resume", found, "--quiet")[0] == 0
    assert len(open_run(found).read_metrics()) == 4


OLDER = {
    "key_that_came_later": ("error_pruning", "channels:keep=0.7", ",distribution=uniform", ""),
    "pattern_by_default": ("sparsity", "rigl:weights=0.9", "initial_pattern=none", "initial_pattern=random"),
    "rescale_by_default": ("sparsity", "swat:weights=0.9,activations=0.9", "rescale=none", "rescale=true"),
}


@pytest.mark.parametrize("name", OLDER)
def test_resume_takes_methods_of_a_version_with_other_defaults(inside, capsys, tmp_path, name):
    kind, text, now, then = OLDER[name]
    flags = [f"--{kind.replace('_', '-')}", text]
    assert run(capsys, *FIT, "--epochs", "1", *flags, "--quiet", "--out", tmp_path)[0] == 0
    last = tmp_path / "fit-1/last.safetensors"
    tensors, table = read_checkpoint(last)
    assert now in table["settings"][kind]
    table["settings"][kind] = table["settings"][kind].replace(now, then)
    if kind == "sparsity":
        table["state"]["topology"]["policy"] = table["settings"][kind]
    checkpoint.write_file(last, *checkpoint._encode(tensors, table))
    code, _, err = run(capsys, "resume", tmp_path / "fit-1", "--epochs", "2", "--quiet")
    assert (code, err) == (0, "")
    edit(tmp_path / "fit-1/config.toml", (text, text.replace("0.", "0.3")))
    code, _, err = run(capsys, "resume", tmp_path / "fit-1", "--epochs", "3")
    assert code == 2
    assert f"config.toml: methods.{kind} was {text.partition(':')[0]}:" in err
    assert f"is now {text.replace('0.', '0.3')}; a run goes on with what it began with" in err


def test_resume_of_a_damaged_checkpoint(inside, capsys, tmp_path):
    run(capsys, *FIT, "--epochs", "1", "--quiet", "--out", tmp_path)
    last = tmp_path / "fit-1/last.safetensors"
    last.write_bytes(last.read_bytes()[:1000])
    code, _, err = run(capsys, "resume", tmp_path / "fit-1", "--epochs", "2")
    assert code == 3
    assert "not a whole checkpoint" in err
    assert "best.safetensors" in err


def told_commands(message: str) -> list[list[str]]:
    """Return the commands that a message tells, in words."""
    tail = message.strip().partition(": cp ")[2]
    return [command.split() for command in f"cp {tail}".split(", then edgetrain ")]


def test_a_run_without_its_last_checkpoint_says_what_to_do_with_the_best(inside, capsys, tmp_path):
    found = shutil.copytree(inside / "runs/fit-1", tmp_path / "fit-1")
    (found / "last.safetensors").unlink()
    code, _, err = run(capsys, "evaluate", found)
    assert code == 2
    assert f"no last.safetensors in it, but best.safetensors; evaluate, predict and export take {found}/best" in err
    assert run(capsys, "evaluate", found / "best.safetensors", "--data", "digits.npz")[0] == 0
    code, _, err = run(capsys, "resume", found, "--epochs", "4")
    assert code == 3
    copy, resume = told_commands(err)
    subprocess.run(copy, check=True)
    assert run(capsys, *resume, "--epochs", "4")[0] == 0


LEFT = {
    "last": (["export", "--best"], "but last.safetensors; ", "to train on: edgetrain resume "),
    "model": (["resume"], "but model.onnx; ", "--initial-weights "),
    "nothing": (["evaluate"], "and nothing else that was trained; ", "begin anew with: edgetrain fit --config "),
}


@pytest.mark.parametrize("name", LEFT)
def test_a_run_without_a_checkpoint_names_what_is_left(inside, capsys, tmp_path, name):
    command, lack, remedy = LEFT[name]
    found = shutil.copytree(inside / "runs/fit-1", tmp_path / "fit-1")
    for file in ("last.safetensors", "best.safetensors", "model.onnx"):
        if not file.startswith(name):
            (found / file).unlink()
    code, _, err = run(capsys, *command, found)
    assert code in (2, 3)
    assert lack in err
    assert f"{remedy}{found}" in err
    assert err.count("\n") == 1


def test_checkpoint_inside_an_epoch(inside, capsys, tmp_path, monkeypatch):
    saved = []
    seconds = itertools.count(time.monotonic())  # every look at the clock takes a second
    monkeypatch.setattr(sessions, "save_checkpoint", lambda learner, path: saved.append(learner.position.batch))
    monkeypatch.setattr(time, "monotonic", lambda: next(seconds))
    code, _, _ = run(capsys, *FIT, "--epochs", "1", "--quiet", "--save-every", "0.25", "--out", tmp_path)
    assert code == 0
    assert any(0 < batch < 80 for batch in saved)


def test_step_that_is_not_finite_keeps_the_last_good_state(inside, capsys, tmp_path):
    flags = ["--lr", "10", "--momentum", "0.99", "--schedule", "constant", "--warmup", "0", "--out", tmp_path]
    code, _, err = run(capsys, *FIT, *flags)
    assert code == 3
    assert "loss or gradients are not finite" in err
    assert f"the state before it is saved in {tmp_path / 'fit-1/last.safetensors'}" in err
    tensors, table = read_checkpoint(tmp_path / "fit-1/last.safetensors")
    assert all(np.isfinite(array).all() for array in tensors.values())
    assert table["state"]["step_count"] == table["position"]["batch"] > 0
    _, out, _ = run(capsys, "report", tmp_path / "fit-1", "--json")
    assert json.loads(out)["status"] == "failed"
