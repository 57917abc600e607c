"""``fit``, ``resume`` and what works on their results, from flags to files, with real training."""

from __future__ import annotations

import csv
import io
import itertools
import json
import os
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import numpy as np
import pytest

import edgetrain
from edgetrain.checkpoint import read_checkpoint
from edgetrain.cli import main
from edgetrain.runs import METRICS, open_run

ROOT = Path(edgetrain.__file__).parents[1]
FILES = ["best.safetensors", "config.toml", "environment.json", "events.jsonl", "last.safetensors", "metrics.csv",
         "model.onnx"]  # fmt: skip
# Small enough to train in a second, large enough to be interrupted in the middle of an epoch.
FIT = ["fit", "--data", "digits.npz", "--epochs", "3", "--batch-size", "8", "--seed", "1", "--threads", "1",
       "--augment", "shift:2"]  # fmt: skip
TIMES = ("seconds", "images_per_second")


def run(capsys, *arguments) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return int(stopped.value.code or 0), out, err


def write_data(folder: Path, count: int = 640) -> None:
    rng = np.random.default_rng(0)
    y = np.arange(count) % 10
    x = rng.integers(0, 60, (count, 28, 28)).astype(np.uint8)
    for index, label in enumerate(y):
        x[index, 2 * label : 2 * label + 6, 4:24] += 150
    np.savez(folder / "digits.npz", x_train=x, y_train=y, x_test=x[:100], y_test=y[:100])


def rows_without_times(run_folder: Path) -> list[dict]:
    return [{k: v for k, v in row.items() if k not in TIMES} for row in open_run(run_folder).read_metrics()]


def assert_same_result(found: Path, expected: Path) -> None:
    """Compare rows, tensors (weights and optimizer state), and the ONNX file."""
    assert rows_without_times(found) == rows_without_times(expected)
    for name in ("last.safetensors", "best.safetensors"):
        left, right = read_checkpoint(found / name)[0], read_checkpoint(expected / name)[0]
        assert left.keys() == right.keys()
        for key, array in right.items():
            assert np.array_equal(left[key], array), f"{name}: {key}"
    assert (found / "model.onnx").read_bytes() == (expected / "model.onnx").read_bytes()


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Make a folder with data and one uninterrupted run."""
    folder = tmp_path_factory.mktemp("place")
    write_data(folder)
    before = Path.cwd()
    os.chdir(folder)
    try:
        with pytest.raises(SystemExit) as stopped:
            main([*FIT, "--quiet"])
    finally:
        os.chdir(before)
    assert not stopped.value.code
    return folder


@pytest.fixture
def inside(place, monkeypatch) -> Path:
    monkeypatch.chdir(place)
    return place


def test_run_folder_is_complete(inside):
    folder = inside / "runs" / "fit-1"
    assert sorted(file.name for file in folder.iterdir()) == FILES
    table = list(csv.DictReader((folder / "metrics.csv").read_text().splitlines()))
    assert tuple(table[0]) == METRICS
    assert [row["epoch"] for row in table] == ["1", "2", "3"]
    events = [event["event"] for event in open_run(folder).read_events()]
    assert events == ["started", "epoch", "epoch", "epoch", "finished"]
    facts = json.loads((folder / "environment.json").read_text())
    assert set(facts) == {"edgetrain", "host", "data"}


def test_effective_config_names_every_setting(inside):
    config = tomllib.loads((inside / "runs/fit-1/config.toml").read_text())
    assert config["model"] == {"name": "lenet5"}
    assert config["data"] == {"source": str(inside / "digits.npz"), "augment": "shift:2", "normalize": True}
    assert config["device"]["threads"] == 1
    assert config["device"]["profile"] == "host"
    assert config["training"]["epochs"] == 3
    assert {"optimizer", "lr", "momentum", "weight_decay", "schedule", "seed"} <= set(config["training"])


def test_config_of_a_run_gives_the_same_run(inside, capsys, tmp_path):
    code, _, _ = run(capsys, "fit", "--config", "runs/fit-1/config.toml", "--out", tmp_path)
    assert code == 0
    assert_same_result(tmp_path / "fit-1", inside / "runs/fit-1")


def test_plain_lines_without_a_terminal(inside, capsys, tmp_path):
    code, out, err = run(capsys, *FIT, "--epochs", "1", "--profile", "raspberrypi4", "--out", tmp_path)
    assert code == 0
    lines = out.splitlines()
    assert any(line.startswith("epoch 1/1  loss ") and "test accuracy" in line for line in lines)
    assert any("all times are this machine's" in line for line in lines)
    assert "model.onnx" in lines[-1]
    assert "accuracy" in lines[-1]
    assert err == ""


def test_quiet_prints_the_result_alone(inside, capsys, tmp_path):
    code, out, _ = run(capsys, *FIT, "--epochs", "1", "--quiet", "--out", tmp_path)
    assert code == 0
    assert len(out.splitlines()) == 1


def test_json_of_fit(inside, capsys, tmp_path):
    code, out, err = run(capsys, *FIT, "--epochs", "1", "--json", "--out", tmp_path)
    result = json.loads(out)
    assert code == 0
    assert set(result) == {
        "run", "model", "data", "profile", "epochs", "validated_on", "loss", "accuracy", "best_epoch", "best_accuracy",
        "seconds", "images_per_second", "memory_mib", "files",
    }  # fmt: skip
    assert set(result["files"]) == {"model", "last", "best"}
    assert result["validated_on"] == "test"
    assert "epoch 1/1" in err


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_bar_on_a_terminal(inside, monkeypatch, tmp_path):
    screen = Terminal()
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setenv("COLUMNS", "160")
    with pytest.raises(SystemExit):
        main([*FIT, "--epochs", "1", "--out", str(tmp_path)])
    shown = screen.getvalue()
    assert "━" in shown
    for word in ("epoch 1/1", "loss", "acc", "images/s", "memory", "MiB"):
        assert word in shown


def test_compiling_is_shown():
    from edgetrain.cli.progress import CompileNotice, PlainDisplay
    from edgetrain.kernels.registry import on_compile

    before, stream = list(on_compile), io.StringIO()
    with CompileNotice(PlainDisplay(stream).compiling):
        for callback in on_compile[len(before) :]:
            callback("multiply", 7, 23)
    assert stream.getvalue() == "compiling kernels (once) 7/23: multiply\n"
    assert on_compile == before


# ---- stopping and going on


def started(folder: Path, out: Path) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "edgetrain", *FIT, "--out", str(out)]
    return subprocess.Popen(
        command, cwd=folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


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


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
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


def test_second_interrupt_aborts_at_once():
    from edgetrain.cli.progress import Display
    from edgetrain.cli.training import _StopOnSignal

    before = signal.getsignal(signal.SIGINT)
    with _StopOnSignal(Display(io.StringIO())) as stop:
        assert not stop.requested()
        signal.raise_signal(signal.SIGINT)
        assert stop.requested()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_finished_run_has_nothing_to_resume(inside, capsys):
    code, _, err = run(capsys, "resume", "runs/fit-1")
    assert code == 2
    assert "3 of 3 epochs are done, nothing is left" in err
    assert "--epochs 4" in err


def test_resume_with_more_epochs_says_what_changed(inside, capsys, tmp_path):
    run(capsys, *FIT, "--epochs", "1", "--quiet", "--out", tmp_path)
    code, out, _ = run(capsys, "resume", tmp_path / "fit-1", "--epochs", "2", "--threads", "2")
    assert code == 0
    assert "changed: training.epochs was 1, is now 2" in out
    assert "changed: device.threads was 1, is now 2" in out
    assert [row["epoch"] for row in open_run(tmp_path / "fit-1").read_metrics()] == [1, 2]


def test_resume_refuses_other_data(inside, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_data(tmp_path, 320)
    run(capsys, *FIT, "--epochs", "1", "--quiet")
    write_data(tmp_path, 330)
    code, _, err = run(capsys, "resume", "runs/fit-1", "--epochs", "2")
    assert code == 3
    assert "the data changed since the run began (training_images was 320, is 330)" in err


def test_resume_of_a_damaged_checkpoint(inside, capsys, tmp_path):
    run(capsys, *FIT, "--epochs", "1", "--quiet", "--out", tmp_path)
    last = tmp_path / "fit-1/last.safetensors"
    last.write_bytes(last.read_bytes()[:1000])
    code, _, err = run(capsys, "resume", tmp_path / "fit-1", "--epochs", "2")
    assert code == 3
    assert "not a whole checkpoint" in err
    assert "best.safetensors" in err


def test_checkpoint_inside_an_epoch(inside, capsys, tmp_path, monkeypatch):
    from edgetrain.cli import training

    saved = []
    seconds = itertools.count(time.monotonic())  # every look at the clock takes a second
    monkeypatch.setattr(training, "save_checkpoint", lambda learner, path: saved.append(learner.position.batch))
    monkeypatch.setattr(training.time, "monotonic", lambda: next(seconds))
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


# ---- other data


def test_part_is_held_out_when_there_is_no_test_split(inside, capsys, tmp_path):
    arrays = np.load("digits.npz")
    np.savez(tmp_path / "plain.npz", x=arrays["x_train"], y=arrays["y_train"])
    flags = ["--data", tmp_path / "plain.npz", "--epochs", "1", "--json", "-q", "--out", tmp_path]
    code, out, _ = run(capsys, "fit", *flags)
    assert code == 0
    assert json.loads(out)["validated_on"] == "held-out"
    data = open_run(tmp_path / "fit-1").read_environment()["data"]
    assert (data["training_images"], data["validation_images"]) == (580, 60)


def test_folder_of_images(inside, capsys, tmp_path):
    image = pytest.importorskip("PIL.Image")
    pixels = np.load("digits.npz")["x_test"]
    for index in range(20):
        folder = tmp_path / "photos" / ("even", "odd")[index % 2]
        folder.mkdir(parents=True, exist_ok=True)
        image.fromarray(pixels[index]).resize((30 + index, 40)).save(folder / f"{index}.png")
    code, _, err = run(capsys, "fit", "--data", tmp_path / "photos", "--epochs", "1", "--out", tmp_path)
    assert code == 3
    assert "images differ in size" in err
    flags = ["--image-size", "28x28", "--epochs", "1", "-q", "--out", tmp_path]
    code, _, _ = run(capsys, "fit", "--data", tmp_path / "photos", *flags)
    assert code == 0
    code, out, _ = run(capsys, "evaluate", tmp_path / "fit-1", "--data", tmp_path / "photos", "--json")
    assert code == 0
    assert json.loads(out)["images"] == 20
    code, _, err = run(capsys, "evaluate", tmp_path / "fit-1", "--data", "embedded")
    assert code == 3
    assert "the model was trained on even, odd; use data with the same classes" in err


def test_model_of_another_shape_starts_nothing(inside, capsys, tmp_path):
    np.savez(tmp_path / "big.npz", x=np.zeros((20, 32, 32), np.uint8), y=np.arange(20) % 10)
    flags = ["--model", "runs/fit-1/model.onnx", "--data", tmp_path / "big.npz", "--out", tmp_path / "runs"]
    code, _, err = run(capsys, "fit", *flags)
    assert code == 3
    assert "expects (1, 28, 28)" in err
    assert not (tmp_path / "runs").exists()


# ---- what works on a trained model


@pytest.mark.parametrize("source", ["runs/fit-1", "runs/fit-1/last.safetensors", "runs/fit-1/model.onnx"])
def test_evaluate_agrees_with_the_run(inside, capsys, source):
    code, out, _ = run(capsys, "evaluate", source, "--data", "digits.npz", "--json")
    result = json.loads(out)
    assert code == 0
    assert set(result) == {"model", "data", "images", "loss", "accuracy"}
    assert result["accuracy"] == open_run("runs/fit-1").read_metrics()[-1]["validation_accuracy"]


def test_predict_of_an_array_file(inside, capsys, tmp_path):
    np.savez(tmp_path / "some.npz", x=np.load("digits.npz")["x_test"][:3])
    code, out, _ = run(capsys, "predict", "runs/fit-1", tmp_path / "some.npz", "--json")
    result = json.loads(out)
    assert code == 0
    assert set(result) == {"model", "data", "predictions"}
    assert [set(row) for row in result["predictions"]] == [{"index", "label", "class", "probability"}] * 3
    code, out, _ = run(capsys, "predict", "runs/fit-1", tmp_path / "some.npz")
    assert [line.split()[0] for line in out.splitlines()] == ["image", "0", "1", "2"]


def test_predict_of_an_image_equals_that_of_its_pixels(inside, capsys, tmp_path):
    image = pytest.importorskip("PIL.Image")
    pixels = np.load("digits.npz")["x_test"][4]
    image.fromarray(pixels).save(tmp_path / "four.png")
    np.savez(tmp_path / "four.npz", x=pixels[None])
    results = [json.loads(run(capsys, "predict", "runs/fit-1", tmp_path / name, "--json")[1])
               for name in ("four.png", "four.npz")]  # fmt: skip
    assert results[0]["predictions"] == results[1]["predictions"]


def test_export_is_the_model_of_the_run(inside, capsys, tmp_path):
    code, out, _ = run(capsys, "export", "runs/fit-1", "-o", tmp_path / "m.onnx", "--json")
    assert code == 0
    assert set(json.loads(out)) == {"from", "model", "bytes"}
    assert (tmp_path / "m.onnx").read_bytes() == Path("runs/fit-1/model.onnx").read_bytes()
    code, _, _ = run(capsys, "export", "runs/fit-1", "--best", "-o", tmp_path / "best.onnx")
    assert code == 0


def test_training_goes_on_from_an_onnx_file(inside, capsys, tmp_path):
    common = ["--data", "digits.npz", "--epochs", "1", "--quiet", "--json", "--out", tmp_path]
    for how in (["--model", "runs/fit-1/model.onnx"], ["--initial-weights", "runs/fit-1/model.onnx"]):
        code, out, _ = run(capsys, "fit", *how, *common)
        assert code == 0
        assert json.loads(out)["accuracy"] > 0.5


def test_report(inside, capsys):
    code, out, _ = run(capsys, "report", "runs/fit-1", "--json")
    result = json.loads(out)
    assert code == 0
    assert set(result) == {"run", "status", "config", "environment", "epochs", "best", "seconds", "files"}
    assert result["status"] == "finished"
    assert len(result["epochs"]) == 3
    code, out, _ = run(capsys, "report", "runs/fit-1")
    assert out.startswith("runs/fit-1: finished, lenet5 on ")


# ---- before training


def test_plan_adds_up_and_respects_the_budget(capsys):
    code, out, _ = run(capsys, "plan", "lenet5", "--batch-size", "32", "--json")
    result = json.loads(out)
    assert code == 0
    assert set(result) == {"model", "batch_size", "parts", "peak_bytes", "budget_bytes", "fits"}
    assert {"weights", "activations"} <= set(result["parts"])
    code, out, err = run(capsys, "plan", "lenet5", "--batch-size", "32", "--memory-budget", "100KiB")
    assert code == 4
    assert "peak" in out
    assert "the budget is 0.10 MiB; use a smaller --batch-size" in err


def test_fit_over_the_budget_starts_nothing(inside, capsys, tmp_path):
    code, _, err = run(capsys, *FIT, "--memory-budget", "100KiB", "--out", tmp_path / "runs")
    assert code == 4
    assert err.startswith("error: ")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("passed", [True, False], ids=["agrees", "disagrees"])
def test_verify(capsys, monkeypatch, passed):
    from edgetrain.verify import VerifyReport, VerifyRow

    def verify(graph, *, steps, batch_size, seed):
        row = VerifyRow("gradient conv1.weight", 0.5 if not passed else 1e-7, 1e-4, passed)
        return VerifyReport(graph.name, (row,), steps, batch_size, seed, 1.0)

    monkeypatch.setattr("edgetrain.verify.verify", verify)
    code, out, err = run(capsys, "verify", "lenet5", "--steps", "2", "--json")
    result = json.loads(out)
    assert code == (0 if passed else 1)
    assert set(result) == {"model", "passed", "steps", "batch_size", "seed", "notes", "rows"}
    assert (result["passed"], result["steps"], result["batch_size"]) == (passed, 2, 8)
    assert ("error: lenet5 disagrees with PyTorch: gradient conv1.weight differs by 5.0e-01" in err) is not passed
    _, out, _ = run(capsys, "verify", "lenet5")
    assert ("DISAGREE" in out) is not passed
