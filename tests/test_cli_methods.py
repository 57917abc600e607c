"""Methods that have nothing to do in a network: refused where somebody named them, left out where a recipe did."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import edgetrain as et
from edgetrain.runs import open_run
from tests.cli_support import run, write_data

PROFILE = Path(__file__).parents[1] / "device_profiles/raspberrypi4.toml"


@pytest.fixture
def inside(tmp_path, monkeypatch) -> Path:
    """Return a folder with 640 training instances and a network of one layer, as the working directory."""
    write_data(tmp_path)
    monkeypatch.chdir(tmp_path)
    perceptron(28 * 28, 64, 10).export_onnx("mlp.onnx")
    return tmp_path


def perceptron(inputs: int, *widths: int) -> et.Learner:
    graph, rng = et.Graph("mlp", input_shape=(1, 1, inputs) if inputs != 784 else (1, 28, 28)), np.random.default_rng(0)
    x = graph.add("Flatten", [graph.inputs[0]], axis=1)
    for number, width in enumerate(widths):
        weight = rng.normal(0, inputs**-0.5, (width, inputs)).astype(np.float32)
        x = graph.add("Gemm", [x, graph.parameter(f"w{number}", weight)], transB=1)
        inputs = width
    graph.set_outputs([x])
    return et.Learner(graph)


STREAM = ["fit", "--stream", "--data", "digits.npz", "--model", "mlp.onnx", "--batch-size", "32"]
REFUSAL = "no error map of 'mlp' can be pruned (w0: fully connected; w1: fully connected)"


def test_a_method_of_a_recipe_without_a_layer_is_left_out_and_the_run_says_so_first(inside, capsys):
    code, out, _ = run(capsys, *STREAM, "--profile", "raspberrypi4")
    assert code == 0
    first, *others = out.splitlines()
    assert first.startswith("error pruning channels:keep=0.7 of the recipe is left out: ErrorMapPruning: ")
    assert REFUSAL in first
    assert "eif:rate=0.33,power=1.5" in "".join(others)
    assert "channels" not in "".join(others)
    assert open_run("runs/fit-1").read_config()["methods"]["error_pruning"] == "none"
    assert et.Learner.load("runs/fit-1/last.safetensors").error_pruning is None


def test_the_plan_of_a_recipe_leaves_it_out_too(inside, capsys):
    plan = ["plan", "mlp.onnx", "--stream", "--profile", "raspberrypi4"]
    code, out, _ = run(capsys, *plan)
    assert code == 0
    assert REFUSAL in out.splitlines()[0]
    methods = json.loads(run(capsys, *plan, "--json")[1])["methods"]
    assert methods == {"filter": "eif:rate=0.33,power=1.5", "sparsity": "none", "error_pruning": "none"}


@pytest.mark.parametrize("command", [
    [*STREAM, "--error-pruning", "channels:keep=0.5"],
    ["fit", "--data", "digits.npz", "--model", "mlp.onnx", "--error-pruning", "gradients:rate=0.9"],
    ["plan", "mlp.onnx", "--error-pruning", "channels:keep=0.5"],
], ids=["stream", "epochs", "plan"])  # fmt: skip
def test_a_method_that_was_named_is_refused(inside, capsys, command):
    code, _, err = run(capsys, *command)
    assert code == 2
    assert REFUSAL in err
    assert not Path("runs").exists()


def test_sparsity_of_a_profile_without_a_layer_is_left_out_too(inside, capsys):
    own = 'augmentation = ""\nsparsity = "rigl:weights=0.9,dense_first=true,dense_last=true"'
    Path("board.toml").write_text(PROFILE.read_text().replace('augmentation = ""', own))
    code, out, _ = run(capsys, "plan", "mlp.onnx", "--profile", "board.toml")
    assert code == 0
    assert "sparsity rigl:weights=0.9,dense_first=true,dense_last=true of the recipe is left out: rigl: no layer" in out
    code, out, _ = run(capsys, "plan", "lenet5", "--profile", "board.toml")
    assert "left out" not in out
    assert "rigl:weights=0.9" in out


def test_a_filter_of_a_recipe_that_is_too_large_is_left_out(inside, capsys):
    perceptron(4, 2).export_onnx("tiny.onnx")
    code, out, _ = run(capsys, "plan", "tiny.onnx", "--stream", "--profile", "raspberrypi4")
    assert code == 0
    first, second, third = out.splitlines()[:3]
    assert first.startswith("instance filter eif:rate=0.33,power=1.5 of the recipe is left out: EarlyInstanceFilter")
    assert second.startswith("error pruning")
    assert third == "tiny.onnx, batch size 64"  # and no method


def test_a_baseline_of_a_run_whose_methods_were_all_left_out_is_refused(inside, capsys):
    Path("board.toml").write_text(
        PROFILE.read_text().replace('augmentation = ""', 'augmentation = ""\nerror_pruning = "channels:keep=0.5"')
    )
    code, _, err = run(capsys, "fit", "--data", "digits.npz", "--model", "mlp.onnx", "--profile", "board.toml",
                       "--baseline")  # fmt: skip
    assert code == 2
    assert "nothing is skipped" in err
