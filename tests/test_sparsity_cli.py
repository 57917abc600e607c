"""Sparse training from the command line: the flag, the settings file, going on, the last lines."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

import edgetrain as et
from edgetrain.runs import open_run
from tests.cli_support import FIT, run, write_data

POLICY = "rigl:weights=0.95,refresh=20"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    write_data(tmp_path, 320)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_fit_trains_sparse_and_tells_what_every_layer_did(folder, capsys):
    code, out, _ = run(capsys, *FIT, "--sparsity", POLICY, "--json", "--quiet")
    assert code == 0
    result = json.loads(out)
    layers = {layer["name"]: layer for layer in result["layers"]}
    assert list(layers) == [f"{name}.weight" for name in ("conv1", "conv2", "fc1", "fc2", "fc3")]
    weights = et.Learner.load(result["files"]["last"]).parameters()
    for name, layer in layers.items():
        assert np.count_nonzero(weights[name]) <= round(layer["density"] * weights[name].size)
    assert layers["fc1.weight"]["kernels"] == ["lists of weights"] * 3
    assert layers["fc1.weight"]["macs_done"] < 0.1 * layers["fc1.weight"]["macs_dense"]
    assert result["savings"]["shares"]["saved_weights"] > 0.5
    settings = open_run(result["run"]).read_config()
    assert settings["methods"]["sparsity"] == POLICY
    finished = open_run(result["run"]).read_events()[-1]
    assert [layer["name"] for layer in finished["layers"]] == list(layers)
    # 120 steps, no change after 90: after 20, 40, 60 and 80. Those of the report do not count.
    assert result["topology"]["changes"] == 4
    assert result["topology"]["seconds"] > 0
    assert finished["topology"] == result["topology"]


def test_the_table_of_layers_and_both_savings_are_printed(folder, capsys):
    code, out, _ = run(capsys, *FIT, "--sparsity", POLICY, "--quiet")
    assert code == 0
    assert "lists of weights" in out
    assert re.search(r"the topology changed 4 times, in \d\.\d{3} s: \d+\.\d\d ms per change", out)
    assert re.search(r"fc3.weight .* 0\.\d*[1-9]\d* MMAC", out), "small layers are not 0"
    assert "saved by sparse weights" in out
    assert "dense training" in out
    assert "of the time saved" in out or "more time" in out


def test_a_sparse_run_goes_on(folder, capsys):
    assert run(capsys, *FIT, "--sparsity", POLICY, "--quiet")[0] == 0
    code, out, _ = run(capsys, "resume", "runs/fit-1", "--epochs", "5", "--json", "--quiet")
    assert code == 0
    assert json.loads(out)["epochs"] == 5
    learner = et.Learner.load("runs/fit-1/last.safetensors")
    assert learner.sparsity == et.RigL(weights=0.95, refresh=20)
    assert learner.topology.total_steps == 5 * 40
    assert learner.topology.changes == 4 + 1  # those of the first process, and after 140
    assert learner.topology.indices["fc1.weight"].count == learner.topology.indices["fc1.weight"].capacity


def test_a_run_tells_which_weights_it_begins_with(folder, capsys):
    code, first, _ = run(capsys, *FIT, "--sparsity", POLICY)
    assert code == 0
    assert f"sparsity {POLICY}: begins with a random pattern" in first
    for source in (("--model", "runs/fit-1/model.onnx"), ("--initial-weights", "runs/fit-1/model.onnx")):
        code, out, _ = run(capsys, *FIT, "--sparsity", "rigl:weights=0.95", *source)
        assert code == 0
        assert "sparsity rigl:weights=0.95: begins with the largest of the given weights" in out
    once = ["--epochs", "1", "--augment", "", "--stream"]
    stream = [*FIT, *once, "--sparsity", "swat", "--model", "runs/fit-1/model.onnx"]
    code, out, _ = run(capsys, *stream)
    assert code == 0
    assert "sparsity swat: begins with the largest of the given weights as they are" in out


@pytest.mark.parametrize("more", [[], ["--augment", "", "--stream"]], ids=["epochs", "stream"])
def test_initial_weights_keep_a_pattern_of_other_densities_as_a_model_does(folder, capsys, more):
    short = [*FIT, "--epochs", "1", *more, "--quiet"]
    assert run(capsys, *short, "--sparsity", "static:weights=0.9,distribution=uniform,dense_first=false")[0] == 0
    given = et.Learner.load("runs/fit-1/last.safetensors").parameters()
    for number, how in ((2, "--model"), (3, "--initial-weights")):
        assert run(capsys, *short, "--sparsity", "static:weights=0.9", how, "runs/fit-1/model.onnx")[0] == 0
        made = et.Learner.load(f"runs/fit-{number}/last.safetensors")
        for name, index in made.topology.indices.items():
            np.testing.assert_array_equal(index.mask(), given[name] != 0, err_msg=name)


def test_a_wrong_policy_is_one_message(folder, capsys):
    code, _, err = run(capsys, *FIT, "--sparsity", "rigl:weight=0.9")
    assert code == 2
    assert "unknown key 'weight'" in err
    assert not (folder / "runs").exists()


def test_a_bad_recipe_is_told_with_file_and_key(folder, capsys):
    good = (Path(__file__).parents[1] / "device_profiles" / "raspberrypi4.toml").read_text()
    key = "[defaults.recipe]"
    (folder / "mine.toml").write_text(good.replace(key, f'{key}\nsparsity = "swat:weights=90"'))
    code, _, err = run(capsys, *FIT, "--profile", "mine.toml")
    assert code == 2
    assert "mine.toml: key 'defaults.recipe.sparsity' is 'swat:weights=90': swat: weights=90" in err
    code, _, err = run(capsys, *FIT, "--profile", "mine.toml", "--sparsity", "")
    assert code == 2
    assert "sparsity '': unknown name ''" in err
