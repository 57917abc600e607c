"""What works on a trained model, and what one asks before training."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from edgetrain.runs import open_run
from tests.cli_support import FIT, run, trained


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Make a folder with data and one uninterrupted run."""
    return trained(tmp_path_factory.mktemp("place"))


@pytest.fixture
def inside(place, monkeypatch) -> Path:
    monkeypatch.chdir(place)
    return place


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
    wanted = {"run", "status", "config", "environment", "epochs", "operations", "best", "seconds", "files"}
    assert set(result) == wanted
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
