"""``fit --stream``: rows, the last lines, standard input, and a kill in the middle that changes nothing."""

from __future__ import annotations

import fcntl
import io
import json
import math
import os
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from array import array
from pathlib import Path
from typing import IO, Any

import numpy as np
import pytest

import edgetrain as et
from edgetrain.checkpoint import load_checkpoint
from edgetrain.cli import main
from edgetrain.cli.normalizing import standing_out
from edgetrain.cli.progress import BarDisplay, PlainDisplay
from edgetrain.cli.stream_blocks import BlockLearner
from edgetrain.cli.streaming import StreamSession
from edgetrain.data.streaming import InstanceSource
from edgetrain.errors import DataError, UsageError
from edgetrain.history import Totals
from edgetrain.runs import Run, open_run
from tests.cli_support import FIT, ROOT, Terminal, assert_same_result, run, stored_data, write_data
from tests.test_cli_resume import wait_for_epochs

STREAM = ["fit", "--stream", "--data", "digits.npz", "--batch-size", "8", "--seed", "1", "--threads", "1", "--window",
          "400", "--save-every", "0.0003", "--filter", "eif:rate=0.4,start=100"]  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Make a folder with data and one uninterrupted stream."""
    folder = tmp_path_factory.mktemp("place")
    write_data(folder, 4000)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-m", "edgetrain", *STREAM, "--quiet"], cwd=folder, env=environment, check=True,
                   capture_output=True)  # fmt: skip
    return folder


@pytest.fixture
def inside(place, monkeypatch) -> Path:
    monkeypatch.chdir(place)
    return place


def started(folder: Path, out: Path) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "edgetrain", *STREAM, "--out", str(out)]
    return subprocess.Popen(
        command, cwd=folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def test_rows_are_windows_and_count_every_instance(inside):
    rows = open_run(inside / "runs/fit-1").read_metrics()
    assert [row["epoch"] for row in rows] == list(range(1, 11))
    assert sum(row["instances_seen"] for row in rows) == 4000
    assert 0 <= sum(row["instances_kept"] - row["instances_trained"] for row in rows) < 8
    for row in rows:
        saved = sum(row[f"saved_{name}"] for name in ("filter", "error_maps", "weights", "activations"))
        assert row["macs_dense"] - row["macs_done"] == saved
    assert rows[-1]["instances_kept"] == pytest.approx(160, abs=40)
    assert rows[-1]["accuracy"] > rows[0]["accuracy"]


@pytest.mark.parametrize("rows", [2, 6])
def test_a_killed_stream_goes_on_to_the_same_result(inside, capsys, tmp_path, rows):
    process = started(inside, tmp_path)
    wait_for_epochs(process, tmp_path / "fit-1/metrics.csv", rows)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    code, out, _ = run(capsys, "resume", tmp_path / "fit-1")
    assert code == 0
    assert "resuming" in out
    assert_same_result(tmp_path / "fit-1", inside / "runs/fit-1")


def test_a_signal_saves_the_stream(inside, capsys, tmp_path):
    process = started(inside, tmp_path)
    wait_for_epochs(process, tmp_path / "fit-1/metrics.csv", 3)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate()
    assert process.returncode == 5
    assert err.startswith("interrupted: stopped after ")
    code, _, _ = run(capsys, "resume", tmp_path / "fit-1", "--quiet")
    assert code == 0
    assert_same_result(tmp_path / "fit-1", inside / "runs/fit-1")


def test_a_stream_that_is_stopped_behind_its_last_block_has_all_rows(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    x, y = np.random.default_rng(0).integers(0, 256, (70, 1, 16, 16), np.uint8), np.arange(70) % 2
    np.savez("a.npz", x=x, y=y)
    flags = ["fit", "--stream", "--data", "a.npz", "--threads", "1", "--batch-size", "8", "--quiet"]
    assert run(capsys, *flags)[0] == 0
    after = StreamSession._after

    def struck(self, count):
        after(self, count)
        if self.learner.stream.position == 70:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(StreamSession, "_after", struck)
    assert run(capsys, *flags)[0] == 5
    monkeypatch.setattr(StreamSession, "_after", after)
    assert run(capsys, "resume", "runs/fit-2", "--quiet")[0] == 0
    assert_same_result(Path("runs/fit-2"), Path("runs/fit-1"))


def test_a_stream_that_has_shrunk_is_refused(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    x, y = np.random.default_rng(0).integers(0, 256, (64, 1, 16, 16), np.uint8), np.arange(64) % 2
    np.savez("a.npz", x=x, y=y)
    assert run(capsys, "fit", "--stream", "--data", "a.npz", "--threads", "1", "--quiet")[0] == 0
    np.savez("a.npz", x=x[:20], y=y[:20])
    code, _, told = run(capsys, "resume", "runs/fit-1")
    assert code == 3
    assert "stream 'a' has 20 instances, but 64 were learned from; bring the old data back" in told


def test_a_stream_of_a_trained_network_may_lack_classes(capsys, tmp_path, monkeypatch):
    """Also of one whose classes have no names, and in formats that are read whole."""
    monkeypatch.chdir(tmp_path)
    graph = et.models.lenet5()
    et.Learner(graph).export_onnx("model.onnx")
    images, labels = np.zeros((20, 28, 28), np.uint8), np.array([3, 7] * 10, np.uint8)
    Path("idx").mkdir()
    for name, numbers in (("images-idx3", images), ("labels-idx1", labels)):
        header = struct.pack(f">I{numbers.ndim}I", 0x800 + numbers.ndim, *numbers.shape)
        Path(f"idx/train-{name}-ubyte").write_bytes(header + numbers.tobytes())
    for flags in (["--stream"], ["--epochs", "1"]):
        assert run(capsys, "fit", *flags, "--data", "idx", "--model", "model.onnx", "--quiet")[0] == 0
    assert run(capsys, "fit", "--stream", "--data", "idx", "--quiet")[0] == 3


def test_class_names_of_a_stream_are_looked_at_before_it_begins(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.savez("a.npz", x=np.zeros((9, 8, 8), np.uint8), y=np.arange(9) % 3, class_names=["a", "b", "b"])
    code, _, told = run(capsys, "fit", "--stream", "--data", "a.npz")
    assert code == 3
    assert "class name 'b' appears twice" in told
    assert not Path("runs").exists()


def test_a_stream_whose_classes_have_other_names_than_the_network_is_refused(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    x, y = np.random.default_rng(0).integers(0, 256, (64, 1, 16, 16), np.uint8), np.arange(64) % 2
    np.savez("a.npz", x=x[:40], y=y[:40], class_names=["cat", "dog"])
    assert run(capsys, "fit", "--stream", "--data", "a.npz", "--threads", "1")[0] == 0
    shutil.copy("runs/fit-1/model.onnx", "model.onnx")
    np.savez("a.npz", x=x, y=1 - y, class_names=["dog", "cat"])
    for command in (["resume", "runs/fit-1"], ["fit", "--stream", "--data", "a.npz", "--model", "model.onnx"]):
        code, _, told = run(capsys, *command)
        assert code == 3
        assert "stream 'a' has the classes dog, cat, but the model was trained on cat, dog" in told
    assert [path.name for path in Path("runs").iterdir()] == ["fit-1"]


def test_test_data_of_a_stream_are_looked_at_before_it_begins(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    x, y = np.random.default_rng(0).integers(0, 256, (40, 1, 16, 16), np.uint8), np.arange(40) % 2
    np.savez("a.npz", x_train=x, y_train=y, x_test=x[:5, :, :8, :8], y_test=y[:5])
    code, _, told = run(capsys, "fit", "--stream", "--data", "a.npz", "--threads", "1")
    assert code == 3
    assert "has images of shape (1, 8, 8), but the network 'lenet5' expects (1, 16, 16)" in told
    assert not Path("runs").exists()


def test_a_stream_is_kept_though_its_test_data_were_damaged_meanwhile(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    x, y = np.random.default_rng(0).integers(0, 256, (40, 1, 16, 16), np.uint8), np.arange(40) % 2
    arrays = {"x_train": x, "y_train": y, "x_test": x[:5], "y_test": y[:5]}
    np.savez("a.npz", **arrays)
    train = StreamSession.train

    def and_damage(session: StreamSession) -> None:
        train(session)
        np.savez("a.npz", **arrays | {"y_test": y[:4]})

    monkeypatch.setattr(StreamSession, "train", and_damage)
    code, _, told = run(capsys, "fit", "--stream", "--data", "a.npz", "--threads", "1")
    assert code == 3
    assert "; all of the stream is learned, the model is " in told
    assert Path("runs/fit-1/model.onnx").exists()
    np.savez("a.npz", **arrays)  # mended
    monkeypatch.setattr(StreamSession, "train", train)
    code, told, _ = run(capsys, "resume", "runs/fit-1")
    assert code == 0
    assert "test accuracy" in told


def test_what_was_learned_is_kept_when_something_unforeseen_fails(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    x, y = np.random.default_rng(0).integers(0, 256, (400, 1, 16, 16), np.uint8), np.arange(400) % 2
    np.savez("a.npz", x=x, y=y)
    learn, blocks = BlockLearner.learn, []

    def and_fail(learner: BlockLearner, *block: Any) -> None:
        if len(blocks) == 3:
            raise ZeroDivisionError
        blocks.append(len(block[1]))
        learn(learner, *block)

    monkeypatch.setattr(BlockLearner, "learn", and_fail)
    code, _, told = run(capsys, "fit", "--stream", "--data", "a.npz", "--threads", "1", "--batch-size", "8")
    assert code == 70
    assert "ZeroDivisionError" in told
    assert load_checkpoint("runs/fit-1/last.safetensors").stream.position == sum(blocks) > 0
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    code, told, _ = run(capsys, "resume", "runs/fit-1")
    assert code == 0
    assert "400 instances" in told


def test_a_finished_stream_is_not_resumed(inside, capsys):
    code, _, err = run(capsys, "resume", "runs/fit-1")
    assert code == 2
    assert "all 4,000 instances of the stream are done" in err
    code, _, err = run(capsys, "resume", "runs/fit-1", "--epochs", "2")
    assert code == 2
    assert "a stream is learned from once" in err


def test_a_stream_whose_ending_was_cut_off_is_finished(inside, capsys, tmp_path):
    shutil.copytree(inside / "runs/fit-1", tmp_path / "fit-1")
    cut = open_run(tmp_path / "fit-1")
    wanted = cut.model.read_bytes()
    cut.model.unlink()
    assert run(capsys, "resume", cut.path, "--quiet")[0] == 0
    assert cut.model.read_bytes() == wanted
    assert run(capsys, "resume", cut.path)[0] == 2


def test_the_last_lines_tell_what_was_saved(inside, capsys, tmp_path):
    code, out, _ = run(capsys, *STREAM, "--out", tmp_path, "--quiet", "--baseline")
    assert code == 0
    assert "instances kept" in out
    assert "saved by the instance filter" in out
    assert "measured, the same data without the methods" in out
    assert "train only; test accuracy" in out
    rows = open_run(tmp_path / "fit-1/baseline").read_metrics()
    assert all(row["macs_done"] == row["macs_dense"] for row in rows)


def test_json_of_a_stream_that_predicts_first(inside, capsys, tmp_path):
    code, out, _ = run(capsys, *STREAM, "--predict-first", "--out", tmp_path, "--json")
    result = json.loads(out)
    assert code == 0
    assert result["mode"] == "predict and train"
    assert result["instances"] == result["savings"]["instances_seen"] == 4000
    assert 0.1 < result["running_accuracy"] < result["recent_accuracy"] <= 1
    assert result["accuracy"] > 0.5
    assert result["savings"]["dense"]["how"].startswith("estimated from")


def test_bar_of_a_stream_on_a_terminal(inside, monkeypatch, tmp_path):
    screen = Terminal()
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setenv("COLUMNS", "160")
    with pytest.raises(SystemExit) as stopped:
        main([*STREAM, "--window", "100000", "--out", str(tmp_path)])
    assert stopped.value.code in (0, None)
    bars = [part for part in screen.getvalue().split("\x1b[2K") if "━" in part and "/4,000" in part]
    assert len(bars) > 1
    for word in ("loss", "acc", "images/s", "memory", "MiB", "computed", "%", ":"):
        assert word in bars[-1]


def test_bar_of_a_stream_without_an_end_tells_no_share():
    screen = Terminal()
    bar = BarDisplay(screen, budget_mib=64)
    bar.instances(1280, None, Totals(judged=5, loss=10.0))
    bar.close()
    assert "1,280 instances" in screen.getvalue()
    assert "loss 2.000" in screen.getvalue()
    assert "0%" not in screen.getvalue()


def test_plain_lines_of_a_stream():
    lines = io.StringIO()
    PlainDisplay(lines, budget_mib=64).instances(50, 200, Totals())
    PlainDisplay(lines, budget_mib=64).instances(50, None, Totals(judged=5, loss=10.0))
    first, second = lines.getvalue().splitlines()
    assert first.startswith("50/200  25%  0 images/s  memory ")
    assert second.startswith("50  loss 2.000  acc 0.000  0 images/s")


def test_instances_that_wait_save_nothing(inside, capsys, tmp_path):
    images = stored_data()
    np.savez(tmp_path / "a.npz", x=images["x_train"][:60], y=images["y_train"][:60])
    flags = ["fit", "--stream", "--data", tmp_path / "a.npz", "--out", tmp_path, "--batch-size", "64",
             "--error-pruning", "channels:keep=0.7"]  # fmt: skip
    code, out, _ = run(capsys, *flags)
    assert code == 0
    assert "60/60  no step, 60 instances waiting for a full micro-batch  kept 100%" in out
    assert "what dense training takes is unknown (no instance was trained on or skipped yet)" in out
    assert (
        "train only; nothing was learned yet: 60 instances kept, a micro-batch takes 64; use a smaller --batch-size, "
        f"or when there are more instances go on with: edgetrain resume {tmp_path / 'fit-1'}; model"
    ) in out
    assert "loss" not in out
    code, out, _ = run(capsys, *flags, "--json", "--quiet")
    result = json.loads(out)
    assert (result["instances_waiting"], result["savings"]["share_done"], result["savings"]["time_saved"]) == (
        60, 1, None)  # fmt: skip
    assert math.isnan(open_run(tmp_path / "fit-1").read_metrics()[0]["loss"])


def test_dense_training_is_not_charged_for_instances_that_wait(inside, capsys, tmp_path, monkeypatch):
    timed = []
    monkeypatch.setattr("edgetrain.cli.sessions.time_dense", lambda _, work, *others: (
        timed.append(work.instances) or {"seconds": 1.0, "how": "not at all"}))  # fmt: skip
    images = stored_data()
    np.savez(tmp_path / "a.npz", x=images["x_train"][:70], y=images["y_train"][:70])
    code, _, _ = run(capsys, "fit", "--stream", "--data", tmp_path / "a.npz", "--out", tmp_path, "--batch-size", "64",
                     "--error-pruning", "channels:keep=0.7")  # fmt: skip
    assert (code, timed) == (0, [64])


def test_the_account_says_which_instances_its_operations_are_of(inside, capsys, tmp_path):
    images = stored_data()
    np.savez(tmp_path / "a.npz", x=images["x_train"][:256], y=images["y_train"][:256])
    flags = ["fit", "--stream", "--data", tmp_path / "a.npz", "--out", tmp_path, "--quiet", "--error-pruning",
             "channels:keep=0.7", "--batch-size"]  # fmt: skip
    code, out, _ = run(capsys, *flags, "48")
    assert code == 0
    assert "\noperations of training are those of 240 instances: 16 were kept, but wait for a full batch\n" in out
    assert "operations of training" not in run(capsys, *flags, "32")[1]
    some, whole = (json.loads(run(capsys, *flags, size, "--json")[1])["savings"] for size in ("48", "32"))
    assert some["macs_dense"] * 256 == whole["macs_dense"] * 240


def test_a_step_that_fails_is_resumed_behind_its_block_with_every_instance_counted_once(inside, capsys, tmp_path):
    images = stored_data()
    x = images["x_train"][:600, None] / np.float32(255)
    x[300:330] = 1e38
    np.savez(tmp_path / "a.npz", x=x, y=images["y_train"][:600])
    code, _, err = run(capsys, "fit", "--stream", "--data", tmp_path / "a.npz", "--out", tmp_path, "--batch-size", "8",
                       "--filter", "random:rate=0.25", "--window", "100", "--profile", "generic-x86_64")  # fmt: skip
    assert code == 3, err
    folder = open_run(tmp_path / "fit-1")
    total = counted(folder)
    assert 300 < total.instances_seen < 600
    while run(capsys, "resume", folder.path)[0] != 0:
        assert counted(folder).instances_seen > total.instances_seen
        total = counted(folder)
    assert counted(folder).instances_seen == 600


def with_glitches(folder: Path, *bad: int, count: int = 600) -> str:
    """Write instances of which some are beyond what a network can predict; return the file."""
    images = stored_data()
    x = images["x_train"][:count, None] / np.float32(255)
    x[list(bad)] = 1e38
    np.savez(folder / "a.npz", x=x, y=images["y_train"][:count])
    return str(folder / "a.npz")


@pytest.mark.parametrize("flags", [["--predict-first"], ["--filter", "selective:rate=0.5,start=64"]],
                         ids=["predict", "filter"])  # fmt: skip
def test_an_instance_that_cannot_be_predicted_is_named_and_may_be_left_out(inside, capsys, tmp_path, flags):
    path = with_glitches(tmp_path, 301, 303, 304, 500)
    command = ["fit", "--stream", "--data", path, "--out", tmp_path, "--batch-size", "8", "--window", "100", *flags]
    code, _, err = run(capsys, *command)
    folder = open_run(tmp_path / "fit-1")
    assert code == 3
    assert "instance 301 of a (counted from 0) cannot be predicted: its largest number is 1e+38" in err
    assert f"the state after 301 instances is saved in {folder.last}, go on with: edgetrain resume {folder.path}" in err
    assert f"(correct it in {path} first, else it is left out)" in err
    assert "learning rate" not in err
    total = load_checkpoint(folder.last).stream.totals["predict" if flags == ["--predict-first"] else "train"]
    assert total.instances_seen == 301
    code, out, err = run(capsys, "resume", folder.path)
    assert code == 3
    assert "left out: 1 instance from 301 on" in out
    assert "instance 303 of a" in err
    code, out, err = run(capsys, "resume", folder.path)
    assert "left out: 2 instances from 303 on" in out
    assert "instance 500 of a" in err
    with_glitches(tmp_path)  # corrected: nothing is left out
    code, out, _ = run(capsys, "resume", folder.path)
    assert code == 0
    assert "left out" not in out
    learner = load_checkpoint(folder.last)
    mode = "predict" if flags == ["--predict-first"] else "train"
    assert learner.stream.position == learner.stream.totals[mode].instances_seen == 600
    assert sum(row["instances_seen"] for row in folder.read_metrics()) == 600
    assert math.isfinite(learner.stream.totals[mode].loss)
    left_out = [(event["first"], event["number"]) for event in folder.read_events() if event["event"] == "left out"]
    assert left_out == [(301, 1), (303, 2)]


def test_of_a_pipe_all_that_can_be_predicted_is_learned_from(inside, tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    bad = json.dumps({"x": 784 * [1e38], "y": 3}) + "\n"
    lines = json_lines(0, 21) + bad + json_lines(21, 23) + bad + json_lines(23, 30)
    (tmp_path / "lines").write_text(lines + json_lines(30, 60))
    command = [*LIVE, "--batch-size", "8", "--predict-first", "--out", str(tmp_path)]
    with (tmp_path / "lines").open("rb") as pipe:
        done = subprocess.run(command, stdin=pipe, env=environment, text=True, capture_output=True, check=False)
        folder = open_run(tmp_path / "fit-1")
        assert done.returncode == 3
        assert "instance 21 of standard input (counted from 0) cannot be predicted" in done.stderr
        assert done.stderr.endswith(f"go on with: edgetrain resume {folder.path}\n")
        subprocess.run([*LIVE[:3], "resume", str(folder.path)], stdin=pipe, env=environment, check=True,
                       capture_output=True)  # fmt: skip
    learner = load_checkpoint(folder.last)
    assert learner.stream.position == learner.stream.totals["predict"].instances_seen == 60


def x_line(size: float) -> str:
    return json.dumps({"x": 784 * [size], "y": 3}) + "\n"


@pytest.mark.parametrize(("flags", "block"), [([], 8), (["--filter", "eif:rate=0.5,start=32"], 16),
                                              (["--predict-first"], 8)], ids=["all", "filter", "predict"])  # fmt: skip
def test_an_instance_beyond_all_others_does_not_spoil_the_normalisation_of_a_pipe(inside, tmp_path, flags, block):
    environment, command = os.environ | {"PYTHONPATH": str(ROOT)}, [*LIVE, "--batch-size", "8", *flags, "--out"]
    normal = stored_data()["x_train"][: block - 1] / np.float32(255)
    (tmp_path / "lines").write_text(json_lines(0, 5) + x_line(1e38) + json_lines(5, 60))
    with (tmp_path / "lines").open("rb") as pipe:
        done = subprocess.run([*command, str(tmp_path)], stdin=pipe, env=environment, text=True, capture_output=True,
                              check=False)  # fmt: skip
        assert done.returncode == 3
        subprocess.run([*LIVE[:3], "resume", str(tmp_path / "fit-1")], stdin=pipe, env=environment, check=True,
                       capture_output=True)  # fmt: skip
    said = f"the normalisation leaves out 1 of the first {block} instances: numbers up to 1e+38 are more than 100 times"
    assert said in done.stdout
    named = "instance 5 of standard input (counted from 0) cannot be predicted: its largest number is 1e+38"
    assert named in done.stderr
    learner = load_checkpoint(tmp_path / "fit-1/last.safetensors")
    assert learner.stream.position == 60  # all others are learned from
    assert learner.graph.normalization.mean == pytest.approx(normal.mean(), rel=1e-4)
    assert learner.graph.normalization.std == pytest.approx(normal.std(), rel=1e-4)


def test_an_instance_that_stands_out_but_can_be_predicted_is_learned_from(inside, tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    text = json_lines(0, 5) + x_line(-1e4) + json_lines(5, 60)
    done = subprocess.run([*LIVE, "--batch-size", "8", "--out", str(tmp_path)], input=text, env=environment, text=True,
                          capture_output=True, check=True)  # fmt: skip
    assert "leaves out 1 of the first 8 instances: numbers up to 1e+04 are" in done.stdout
    (event,) = [e for e in open_run(tmp_path / "fit-1").read_events() if e["event"] == "normalized without"]
    assert (event["number"], event["largest"]) == (1, "1e+04")
    learner = load_checkpoint(tmp_path / "fit-1/last.safetensors")
    assert learner.stream.position == 61
    assert learner.graph.normalization.std < 1


def test_an_instance_that_waits_already_does_not_spoil_the_normalisation_either(inside, capsys, tmp_path, monkeypatch):
    class Glitch(InBlocks):
        def blocks(self, *args):
            for number, (x, y) in enumerate(super().blocks(*args)):
                yield x * np.float32(1e5 if number == 1 else 1), y

    monkeypatch.setattr("edgetrain.cli.stream_sources.open_stream", lambda *_: Glitch([4, 1, 2, 9]))
    assert run(capsys, *LIVE[3:], "--batch-size", "8", "--out", tmp_path)[0] == 0
    learner = load_checkpoint(tmp_path / "fit-1/last.safetensors")
    assert learner.stream.position == 16
    assert learner.graph.normalization.std < 1


@pytest.mark.parametrize("begins", ["few", "dark", "many", "zeros"])
def test_what_is_no_glitch_is_part_of_the_normalisation(begins):
    x = np.ones((16, 1, 4, 4), np.float32)
    if begins == "many":
        x[:5] *= 1000
    elif begins != "few":
        x[:15] *= 0.002 if begins == "dark" else 0
    assert not standing_out(x[:1] if begins == "few" else x).any()


@pytest.mark.parametrize("stream", [["--stream"], []], ids=["stream", "epochs"])
def test_data_of_one_class_are_refused(inside, capsys, tmp_path, stream):
    np.savez(tmp_path / "a.npz", x=np.zeros((80, 1, 28, 28), np.uint8), y=np.zeros(80, int))
    code, _, err = run(capsys, "fit", *stream, "--data", tmp_path / "a.npz", "--out", tmp_path, "--batch-size", "8")
    assert code == DataError.exit_code
    assert "data set 'a' has one class (0), expected at least two to tell apart" in err
    assert not list(tmp_path.glob("fit-*"))


def test_a_network_that_predicts_nothing_blames_no_instance(inside, capsys, tmp_path, monkeypatch):
    path = with_glitches(tmp_path, 301)
    monkeypatch.setattr("edgetrain.cli.stream_blocks._can_predict", lambda _: False)
    command = ["fit", "--stream", "--data", path, "--out", tmp_path, "--batch-size", "8", "--predict-first"]
    code, _, err = run(capsys, *command)
    assert code == 3
    assert "Start a new run with a lower learning rate" in err
    assert "cannot be predicted" not in err


def test_after_a_step_that_was_not_finite_the_instance_with_the_largest_number_is_named(inside, capsys, tmp_path):
    path = with_glitches(tmp_path, 301, 309)
    command = ["fit", "--stream", "--data", path, "--out", tmp_path, "--batch-size", "8", "--quiet"]
    code, _, err = run(capsys, *command)
    assert code == 3
    assert "its batch, of instances before 304, is left out, and the state behind it is saved in" in err
    assert f"go on with: edgetrain resume {tmp_path / 'fit-1'}. The largest number of the latest block, 1e+38" in err
    assert f"is in instance 301 of a (counted from 0); if it is wrong, correct it in {path}. If that fails" in err
    for _ in range(2):  # the first step of a process: nothing is saved, and the message does not promise that it was
        code, _, err = run(capsys, "resume", tmp_path / "fit-1", "--quiet")
        assert code == 3
        assert "but the same step would fail again" in err
        assert "is in instance 309 of a" in err
    with_glitches(tmp_path)
    assert run(capsys, "resume", tmp_path / "fit-1", "--quiet")[0] == 0
    assert load_checkpoint(tmp_path / "fit-1/last.safetensors").stream.position == 600


def counted(folder: Run) -> Totals:
    """Return the sums of a stream's checkpoint, which must be those of its rows and of the begun one."""
    learner = load_checkpoint(folder.last)
    total, running = learner.stream.totals["train"], learner.history.running
    rows = folder.read_metrics()
    for name, count in total.counts().items():
        assert count == sum(row[name] for row in rows) + getattr(running, name), name
    assert total.instances_seen == learner.stream.position
    return total


@pytest.mark.parametrize("first", ["dark", "bright", "almost dark", "weak"])
def test_a_stream_may_begin_without_contrast(inside, capsys, tmp_path, first):
    images = stored_data()
    x = images["x_train"][:, None]
    if first == "weak":
        x = np.float32(1e-9) * x
    else:
        x[:64] = 255 if first == "bright" else 0
        x[5, 0, 3, 4] += first == "almost dark"
    np.savez(tmp_path / "a.npz", x=x, y=images["y_train"])
    code, _, _ = run(capsys, "fit", "--stream", "--data", tmp_path / "a.npz", "--out", tmp_path, "--batch-size", "64")
    assert code == 0
    std = load_checkpoint(tmp_path / "fit-1/last.safetensors").graph.normalization.std
    assert std == pytest.approx(x[:64].std(dtype=np.float64) if first == "weak" else 1)


def test_standard_input(inside, tmp_path):
    images = stored_data()
    lines = [json.dumps({"pixels": image.ravel().tolist(), "y": int(label)})
             for image, label in zip(images["x_train"][:300], images["y_train"][:300], strict=True)]  # fmt: skip
    command = [sys.executable, "-m", "edgetrain", "fit", "--stream", "--data", "-", "--batch-size", "8", "--json",
               "--quiet", "--filter", "random:rate=0.5", "--out", str(tmp_path)]  # fmt: skip
    done = subprocess.run(command, input="\n".join(lines), env=os.environ | {"PYTHONPATH": str(ROOT)}, text=True,
                          capture_output=True, check=True)  # fmt: skip
    result = json.loads(done.stdout)
    assert result["instances"] == 300
    assert result["accuracy"] is None
    assert 100 < result["savings"]["instances_trained"] < 200
    bad = subprocess.run(command, input="\n".join([*lines[:50], "oops"]), env=os.environ | {"PYTHONPATH": str(ROOT)},
                         text=True, capture_output=True, check=False)  # fmt: skip
    assert bad.returncode == 3
    assert "standard input, line 51: not JSON" in bad.stderr
    empty = subprocess.run(command, input="\n\n", env=os.environ | {"PYTHONPATH": str(ROOT)}, text=True,
                           capture_output=True, check=False)  # fmt: skip
    assert empty.returncode == 3
    assert "standard input: ended without an instance" in empty.stderr


LIVE = [sys.executable, "-m", "edgetrain", "fit", "--stream", "--data", "-", "--threads", "1"]


def json_lines(first: int, last: int) -> str:
    images = stored_data()
    pairs = zip(images["x_train"][first:last], images["y_train"][first:last], strict=True)
    return "".join(json.dumps({"pixels": x.ravel().tolist(), "y": int(y)}) + "\n" for x, y in pairs)


def test_a_bad_line_costs_no_other(inside, tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    (tmp_path / "lines").write_text(json_lines(0, 90) + "garbage\n" + json_lines(90, 400))
    with (tmp_path / "lines").open("rb") as lines:  # as with a pipe, each process goes on where the last one stopped
        done = subprocess.run([*LIVE, "--batch-size", "8", "--out", str(tmp_path)], stdin=lines, env=environment,
                              text=True, capture_output=True, check=False)  # fmt: skip
        folder = tmp_path / "fit-1"
        assert done.returncode == 3
        assert "line 91: not JSON" in done.stderr
        assert f"is saved in {folder / 'last.safetensors'}, go on with: edgetrain resume {folder}" in done.stderr
        learner = load_checkpoint(folder / "last.safetensors")
        position = learner.stream.position
        assert 90 <= position < 200
        assert (learner.step_count, learner.stream.waiting) == divmod(position, 8)
        last = open_run(folder).read_events()[-1]
        assert (last["event"], last["instances"]) == ("failed", position)
        command = [sys.executable, "-m", "edgetrain", "resume", str(folder)]
        subprocess.run(command, stdin=lines, env=environment, text=True, capture_output=True, check=True)
    assert load_checkpoint(folder / "last.safetensors").stream.position == 400


def wait_until_read(pipe: IO[str]) -> None:
    """Wait until the other side has taken everything; a pipe holds less than the lines of a test."""
    deadline, left = time.monotonic() + 120, array("i", [1])
    while left[0]:
        assert time.monotonic() < deadline
        time.sleep(0.01)
        fcntl.ioctl(pipe, termios.FIONREAD, left)


def test_a_signal_saves_a_part_of_a_block_from_standard_input(inside, tmp_path):
    command = [*LIVE, "--batch-size", "64", "--out", str(tmp_path)]
    process = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, text=True, stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip
    process.stdin.write(json_lines(0, 50))
    process.stdin.flush()
    wait_until_read(process.stdin)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate()
    assert process.returncode == 5
    assert "stopped after 50 instances" in err
    assert load_checkpoint(tmp_path / "fit-1/last.safetensors").stream.position == 50


def test_a_slow_pipe_is_learned_from_and_saved_before_a_block_is_full(inside, tmp_path):
    command = [*LIVE, "--profile", "raspberrypi4", "--batch-size", "8", "--save-every", "0.0003", "--quiet",
               "--set", "stream.block=256", "--out", str(tmp_path)]  # fmt: skip
    process = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, text=True, stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip
    process.stdin.write(json_lines(0, 20))
    process.stdin.flush()
    deadline, saved = time.monotonic() + 120, []
    while not saved:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
        saved = [event for event in Run(tmp_path / "fit-1").read_events() if event["event"] == "saved"]
    process.kill()
    process.communicate()
    learner = load_checkpoint(tmp_path / "fit-1/last.safetensors")
    assert learner.stream.position == saved[0]["instances"] == 20
    assert (learner.step_count, learner.stream.waiting) == (2, 4)


def test_a_file_that_grew_inside_a_block_gives_the_same_steps_without_a_filter(inside, capsys, tmp_path):
    command = ["fit", "--stream", "--data", with_glitches(tmp_path, count=301), "--out", tmp_path, "--batch-size", "8"]
    assert run(capsys, *command, "--quiet")[0] == 0
    with_glitches(tmp_path, count=600)
    assert run(capsys, "resume", tmp_path / "fit-1", "--quiet")[0] == 0
    assert run(capsys, *command, "--quiet")[0] == 0
    assert (tmp_path / "fit-1/model.onnx").read_bytes() == (tmp_path / "fit-2/model.onnx").read_bytes()


class InBlocks(InstanceSource):
    """The digits as a live source that gives blocks of these sizes, empty ones too."""

    def __init__(self, sizes: list[int]) -> None:
        super().__init__("digits", None, tuple(map(str, range(10))), None)
        self._sizes = sizes

    def blocks(self, size, start, should_stop, is_due=lambda: False):
        images = stored_data()
        first = 0
        for count in self._sizes:
            part = slice(first, first + count)
            yield images["x_train"][part, None] / np.float32(255), images["y_train"][part].astype(np.int64)
            first += count


def test_small_blocks_of_a_slow_pipe_change_no_step(inside, capsys, tmp_path, monkeypatch):
    for sizes in ([8] * 5, [1, 0, 3, 0, 0, 2, 2, 10, 22]):
        monkeypatch.setattr("edgetrain.cli.stream_sources.open_stream", lambda *_, sizes=sizes: InBlocks(sizes))
        assert run(capsys, *LIVE[3:], "--batch-size", "8", "--quiet", "--out", tmp_path)[0] == 0
    assert_same_result(tmp_path / "fit-1", tmp_path / "fit-2")
    normalization = load_checkpoint(tmp_path / "fit-2/last.safetensors").graph.normalization
    assert normalization.mean == pytest.approx(np.load("digits.npz")["x_train"][:8].mean() / 255)


def test_a_pipe_that_gives_nothing_is_not_saved_again_and_again(inside, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("edgetrain.cli.stream_sources.open_stream", lambda *_: InBlocks([8, 0, 0, 0, 8, 0]))
    assert run(capsys, *LIVE[3:], "--batch-size", "8", "--save-every", "0", "--quiet", "--out", tmp_path)[0] == 0
    events = open_run(tmp_path / "fit-1").read_events()
    assert [event["instances"] for event in events if event["event"] == "saved"] == [8, 16]


def test_standard_input_has_no_baseline(inside, capsys):
    code, _, err = run(capsys, "fit", "--stream", "--data", "-", "--baseline")
    assert code == 2
    assert "standard input comes once" in err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--filter", "eiff"], "did you mean 'eif'?"),
        (["--filter", "eif:rat=1"], "unknown key 'rat'"),
        (["--filter", "eif:rate=2"], "EarlyInstanceFilter: rate=2.0"),
        (["--filter", "eif:rate"], "is not KEY=VALUE"),
        (["--filter", "eif:rate=x"], "expected a number"),
        (["--filter", "eif:start=1.5"], "expected a whole number"),
        (["--filter", "none:rate=1"], "'none' takes no settings"),
        (["--recipe", "fast"], "--recipe 'fast', expected one of edge, dense"),
        (["--stream", "--epochs", "3"], "training.epochs is 3, but a stream is learned from once"),
        (["--stream", "--schedule", "cosine"], "training.schedule is 'cosine', but the end of a stream is unknown"),
        (["--stream", "--augment", "flip"], "data.augment is 'flip', but instances of a stream are learned from as"),
        (["--stream", "--image-size", "32x32"], "image_size and channels are for folders of images; leave them out"),
        (["--stream", "--data", "digits.npz", "--image-size", "32x32"], "image_size and channels are for folders"),
        (["--stream", "--data", "-", "--image-size", "32x32"], "standard input: image_size is for folders of images"),
        (["--stream", "--image-size", "32"], "--image-size is '32'"),
        (["--data", "-"], "standard input, which can be read only once; add --stream"),
        (["--predict-first"], "stream.predict is True, which only a stream heeds; add --stream"),
        (["--window", "5"], "stream.window is 5, which only a stream heeds; add --stream"),
    ],
)
def test_bad_methods_and_contradictions_start_nothing(inside, capsys, tmp_path, flags, message):
    code, _, err = run(capsys, "fit", *flags, "--out", tmp_path)
    assert code == 2
    assert message in err
    assert list(tmp_path.iterdir()) == []


def write_images(folder: Path, shape: tuple[int, ...]) -> None:
    image, rng = pytest.importorskip("PIL.Image"), np.random.default_rng(0)
    for number in range(40):
        file = folder / "ab"[number % 2] / f"{number:03d}.png"
        file.parent.mkdir(exist_ok=True, parents=True)
        image.fromarray(rng.integers(0, 255, shape, np.uint8)).save(file)


@pytest.mark.parametrize("flags", [[], ["--stream"]], ids=["epochs", "stream"])
def test_a_folder_of_images_gets_the_size_that_was_asked_for(capsys, tmp_path, flags):
    write_images(tmp_path / "images", (20, 20))
    command = ["fit", *flags, "--data", tmp_path / "images", "--image-size", "24x22", "--batch-size", "8",
               "--out", tmp_path, "--quiet"]  # fmt: skip
    assert run(capsys, *command, *([] if flags else ["--epochs", "1"]))[0] == 0
    assert load_checkpoint(tmp_path / "fit-1/last.safetensors").graph.input_shape == (1, 24, 22)


@pytest.mark.parametrize("flags", [[], ["--stream"]], ids=["epochs", "stream"])
def test_a_network_is_built_for_the_images_as_they_are(capsys, tmp_path, flags):
    write_images(tmp_path / "images", (20, 24, 3))
    command = ["fit", *flags, "--data", tmp_path / "images", "--batch-size", "8", "--out", tmp_path, "--quiet"]
    assert run(capsys, *command, *([] if flags else ["--epochs", "1"]))[0] == 0
    assert load_checkpoint(tmp_path / "fit-1/last.safetensors").graph.input_shape == (3, 20, 24)


def test_a_network_of_another_size_is_refused(capsys, tmp_path):
    image = pytest.importorskip("PIL.Image")
    et.Learner(et.models.lenet5(num_classes=2), threads=1).export_onnx(tmp_path / "a.onnx")
    for name in "ab":
        (tmp_path / "images" / name).mkdir(parents=True)
        image.fromarray(np.zeros((20, 20), np.uint8)).save(tmp_path / "images" / name / "0.png")
    code, _, err = run(capsys, "fit", "--stream", "--data", tmp_path / "images", "--image-size", "24x24", "--model",
                       tmp_path / "a.onnx", "--out", tmp_path / "runs")  # fmt: skip
    assert code == 3
    assert "has instances of shape (1, 24, 24), but the network" in err
    assert not (tmp_path / "runs").exists()


def test_the_augmentation_of_a_recipe_is_not_for_streams(tmp_path):
    from edgetrain.cli.config import effective

    text = (Path(__file__).parents[1] / "device_profiles/raspberrypi4.toml").read_text()
    path = tmp_path / "board.toml"
    path.write_text(text.replace('augmentation = ""', 'augmentation = "flip"'))
    device = {"device": {"profile": str(path)}}
    epochs = effective(device)[0]
    assert epochs.data.augment == "flip"
    assert effective({**device, "stream": {"enabled": True}})[0].data.augment == ""
    assert effective({"stream": {"enabled": True}}, None, epochs.to_dict())[0].data.augment == ""
    with pytest.raises(UsageError, match=r"data\.augment is 'flip'"):
        effective({}, None, {"stream": {"enabled": True}, "data": {"augment": "flip"}})


def test_recipes_and_flags_decide_what_is_skipped(tmp_path):
    from dataclasses import asdict

    from edgetrain.cli.config import RECIPES, effective

    def methods(given=None, recipe=None) -> dict:
        return asdict(effective(given or {}, recipe)[0].methods)

    assert methods({}, "edge") == RECIPES["edge"]
    assert methods({}, "dense") == {"filter": "none", "sparsity": "none", "error_pruning": "none"}
    assert methods({"methods": {"filter": "random:rate=0.5"}}, "dense")["filter"] == "random:rate=0.5"
    assert methods() == {key: methods()[key] for key in ("filter", "sparsity", "error_pruning")}


def test_a_recipe_takes_the_place_of_methods_in_a_file():
    from edgetrain.cli.config import RECIPES, effective

    file = effective({"methods": {"sparsity": "swat:weights=0.9"}})[0].to_dict()
    assert effective({}, None, file)[0].to_dict()["methods"] == file["methods"]
    assert effective({}, "edge", file)[0].to_dict()["methods"] == RECIPES["edge"]
    chosen = effective({"methods": {"filter": "random:rate=0.5"}}, "dense", file)[0].methods
    assert (chosen.filter, chosen.sparsity) == ("random:rate=0.5", "none")


def test_a_stream_takes_from_a_run_over_epochs_what_it_can_use():
    from edgetrain.cli.config import effective

    stream = {"stream": {"enabled": True}}
    file = effective({"training": {"epochs": 7, "schedule": "one_cycle", "lr": 0.1, "momentum": 0.5}})[0].to_dict()
    found = effective(stream, None, file)[0].training
    assert (found.epochs, found.schedule, found.warmup_fraction, found.momentum) == (1, "constant", 0.0, 0.5)
    assert found.lr == pytest.approx(0.02)  # a fifth of the peak
    assert effective({**stream, "training": {"lr": 0.3}}, None, file)[0].training.lr == 0.3
    assert effective(stream, None, {"training": {"lr": 0.1}})[0].training.lr == 0.1
    of_a_stream = effective({**stream, "training": {"lr": 0.3}})[0].to_dict()
    assert effective({}, None, of_a_stream)[0].to_dict() == of_a_stream


def test_flags_turn_the_file_of_a_run_into_a_stream(inside, capsys, tmp_path):
    assert run(capsys, *FIT, "--epochs", "1", "--filter", "random:rate=0.5", "--quiet", "--out", tmp_path)[0] == 0
    flags = ["--config", tmp_path / "fit-1/config.toml", "--stream", "--recipe", "dense", "--json", "--out", tmp_path]
    code, out, _ = run(capsys, "fit", *flags)
    assert code == 0
    assert json.loads(out)["instances"] == 4000
    config = open_run(tmp_path / "fit-2").read_config()
    assert config["methods"] == {"filter": "none", "sparsity": "none", "error_pruning": "none"}


def test_a_profile_may_name_methods(tmp_path):
    from edgetrain.cli.config import RECIPES, effective

    text = (Path(__file__).parents[1] / "device_profiles/raspberrypi4.toml").read_text()
    path = tmp_path / "board.toml"
    path.write_text(text.replace('augmentation = ""', 'augmentation = ""\nfilter = "random:rate=0.5"'))
    device = {"device": {"profile": str(path)}}
    assert effective(device)[0].methods.filter == "random:rate=0.5"
    assert effective(device, "edge")[0].methods.filter == RECIPES["edge"]["filter"]
    assert effective(device, "dense")[0].methods.filter == "none"


def test_boards_learn_streams_with_edge_where_the_network_knows_its_data(tmp_path):
    from dataclasses import asdict

    from edgetrain.cli.config import RECIPES, effective

    def methods(given=None, recipe=None, profile="raspberrypi4", enabled=True) -> dict:
        known = {"model": {"initial_weights": "model.onnx"}}
        given = known | {"device": {"profile": profile}, "stream": {"enabled": enabled}} | (given or {})
        return asdict(effective(given, recipe)[0].methods)

    assert methods() == methods({"model": {"name": "Mine.ONNX"}}) == RECIPES["edge"]
    assert methods({"model": {"name": "lenet5"}}) == RECIPES["dense"]
    assert methods({"model": {"name": "lenet5"}}, "edge") == RECIPES["edge"]
    assert methods(recipe="dense") == methods(enabled=False) == methods(profile="generic-x86_64") == RECIPES["dense"]
    assert methods({"methods": {"sparsity": "rigl"}}) == RECIPES["dense"] | {"sparsity": "rigl"}
    assert methods({"methods": {"filter": "none"}}) == RECIPES["dense"]
    text = (Path(__file__).parents[1] / "device_profiles/raspberrypi4.toml").read_text()
    path = tmp_path / "board.toml"
    for recipe in ("edge", "dense"):
        own = f'stream_recipe = "{recipe}"\nfilter = "random:rate=0.5"'
        path.write_text(text.replace('stream_recipe = "edge"', own))
        assert methods(profile=str(path)) == RECIPES["dense"] | {"filter": "random:rate=0.5"}
        for asked in ("edge", "dense"):
            assert methods(recipe=asked, profile=str(path)) == RECIPES[asked]


@pytest.mark.parametrize(("model", "recipe", "methods", "told"), [
    ({}, None, {}, True), ({"initial_weights": "a.onnx"}, None, {}, False), ({}, "dense", {}, False),
    ({}, None, {"filter": "none"}, False),
])  # fmt: skip
def test_a_run_says_why_nothing_is_skipped_where_a_board_would(model, recipe, methods, told):
    from edgetrain.cli.config import effective, why_dense

    given = {"device": {"profile": "raspberrypi4"}, "stream": {"enabled": True}, "model": model, "methods": methods}
    config, profile, by_recipe = effective(given, recipe)
    sentences = why_dense(config, profile, recipe, by_recipe)
    assert [("begins untrained" in text and "--recipe edge" in text) for text in sentences] == [True] * told


def test_a_stream_has_a_constant_and_smaller_learning_rate():
    from edgetrain.cli.config import effective

    plain, stream = (effective({"stream": {"enabled": enabled}})[0].training for enabled in (False, True))
    assert (stream.schedule, stream.lr, stream.epochs) == ("constant", plain.lr / 5, 1)
    given = effective({"stream": {"enabled": True}, "training": {"lr": 0.3}})[0].training
    assert given.lr == 0.3


def test_a_stream_predicts_with_averaged_parameters_unless_told_otherwise():
    from edgetrain.cli.config import effective, from_flags
    from edgetrain.cli.sources import make_optimizer

    plain, stream = (effective({"stream": {"enabled": enabled}})[0] for enabled in (False, True))
    assert (make_optimizer(plain).averaging, make_optimizer(stream).averaging) == (0, 0.99)
    for averaging in (0.0, 0.9):
        config, *_ = from_flags({"stream": True, "averaging": averaging})
        assert make_optimizer(config).averaging == averaging


def test_the_plot_shows_the_run_beside_its_baseline(inside, capsys, tmp_path):
    pytest.importorskip("matplotlib")
    code, _, _ = run(capsys, *STREAM, "--out", tmp_path, "--quiet", "--baseline")
    assert code == 0
    code, out, _ = run(capsys, "report", tmp_path / "fit-1", "--plot")
    assert code == 0
    assert "accuracy.svg" in out
    assert "operations of dense training" in out
    picture = (tmp_path / "fit-1/accuracy.svg").read_text()
    assert picture.startswith("<?xml")
    assert picture.count("<!-- baseline: dense -->") + picture.count("<!-- fit-1: eif") >= 2


def test_a_folder_may_grow_behind_what_was_learned_only(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "images", (20, 20))
    assert run(capsys, "fit", "--stream", "--data", "images", "--batch-size", "4", "--quiet")[0] == 0
    folder = open_run("runs/fit-1")
    count = counted(folder).instances_seen
    some = sorted(path for path in (tmp_path / "images").rglob("*.png"))
    shutil.copy(some[0], some[0].with_name("zz.png"))
    assert run(capsys, "resume", folder.path, "--quiet")[0] == 0
    assert counted(folder).instances_seen == count + 1
    shutil.copy(some[0], some[0].with_name("00.png"))
    code, _, err = run(capsys, "resume", folder.path, "--quiet")
    assert code == 3
    assert f"instance {count + 1} was {some[0].parent.name}/zz.png, is now " in err
    assert "give new ones names behind it" in err
