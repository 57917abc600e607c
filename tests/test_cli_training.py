"""``fit`` from flags to files: run folder, settings, progress, other data."""

from __future__ import annotations

import csv
import io
import json
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest

from edgetrain.cli import main
from edgetrain.cli.config import effective
from edgetrain.runs import METRICS, open_run
from tests.cli_support import FIT, Terminal, assert_same_result, run, stored_data, trained

FILES = ["best.safetensors", "config.toml", "environment.json", "events.jsonl", "last.safetensors", "metrics.csv",
         "model.onnx"]  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Make a folder with data and one uninterrupted run."""
    return trained(tmp_path_factory.mktemp("place"))


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
    assert events == ["started", "epoch", "epoch", "epoch", "finished", "account"]
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


def test_paths_in_settings_and_files_are_kept_whole(inside, capsys, tmp_path, monkeypatch):
    (tmp_path / "short.toml").write_text('[data]\nsource = "digits.npz"\n[training]\nepochs = 1\n')
    for number, flags in enumerate((["--set", "data.source=digits.npz"], ["--config", tmp_path / "short.toml"]), 1):
        code, _, _ = run(capsys, "fit", *flags, "--epochs", "1", "--quiet", "--out", tmp_path)
        assert code == 0
        config = open_run(tmp_path / f"fit-{number}").read_config()
        assert config["data"]["source"] == str(inside / "digits.npz")
    monkeypatch.chdir(tmp_path)
    assert run(capsys, "resume", tmp_path / "fit-1", "--epochs", "2", "--quiet")[0] == 0


BAD_FILES = {
    "number for a table": ("training = 3", "key 'training' is 3, expected a table such as [training]"),
    "truth value for a table": ("stream = true", "key 'stream' is True, expected a table"),
    "text for a table": ('methods = "x"', "key 'methods' is 'x', expected a table"),
    "list for a text": ('[training]\noptimizer = ["a"]', "key 'training.optimizer' is ['a'], expected one of 'sgd'"),
    "text for a rate": ('[training]\nlr = "a"\n[stream]\nenabled = true', "'training.lr' is 'a', expected a number"),
    "number for a method": ("[methods]\nsparsity = 3", "key 'methods.sparsity' is 3, expected a text"),
    "number for a path": ("[data]\nsource = 3", "key 'data.source' is 3, expected a text"),
    "no UTF-8": ("[data]\nsource = '\udcff'", "cannot be read as TOML"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_file_of_wrong_types_is_one_message(capsys, tmp_path, name):
    text, message = BAD_FILES[name]
    (tmp_path / "bad.toml").write_bytes(text.encode(errors="surrogateescape"))
    code, _, err = run(capsys, "fit", "--config", tmp_path / "bad.toml", "--out", tmp_path / "runs")
    assert code == 2
    assert message in err
    assert err.count("\n") == 1
    assert not (tmp_path / "runs").exists()


ADAM = '[training]\noptimizer = "adam"\n'
ONLY_SGD = {
    "momentum flag": (["--optimizer", "adam", "--momentum", "0.5"], "", "training.momentum is 0.5"),
    "nesterov flag": (["--optimizer", "adamw", "--nesterov"], "", "training.nesterov is True"),
    "setting": (["--set", "training.momentum=0.5"], ADAM, "training.momentum is 0.5"),
    "file": ([], f"{ADAM}momentum = 0.5\n", "training.momentum is 0.5"),
    "file without optimizer": (["--optimizer", "adam"], "[training]\nmomentum = 0.5\n", "training.momentum is 0.5"),
}  # fmt: skip


@pytest.mark.parametrize("name", ONLY_SGD)
def test_what_only_sgd_heeds_is_refused_of_another_optimizer(capsys, tmp_path, name):
    flags, text, message = ONLY_SGD[name]
    (tmp_path / "settings.toml").write_text(text)
    code, _, err = run(capsys, "fit", "--config", tmp_path / "settings.toml", *flags, "--out", tmp_path / "runs")
    assert code == 2
    assert f"{message}, which only sgd heeds, but the optimizer is adam" in err
    assert err.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_momentum_of_a_profile_or_of_a_run_is_no_hindrance_to_another_optimizer():
    momentum = {"training": {"momentum": 0.5}}
    adam = {"training": {"optimizer": "adam"}}
    of_adam, of_sgd = (effective(given)[0].to_dict() for given in (adam, momentum))
    assert of_adam["training"]["nesterov"]
    assert effective({}, None, of_adam)[0].to_dict() == of_adam
    assert effective(adam, None, of_sgd)[0].training.optimizer == "adam"
    assert effective({"training": {"optimizer": "adam", "nesterov": False}})[0].training.momentum == 0.9


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
    assert len(out.splitlines()) == 2


def test_json_of_fit(inside, capsys, tmp_path):
    code, out, err = run(capsys, *FIT, "--epochs", "1", "--json", "--out", tmp_path)
    result = json.loads(out)
    assert code == 0
    assert set(result) == {
        "run", "model", "data", "profile", "timed_on", "epochs", "validated_on", "loss", "accuracy", "best_epoch",
        "best_accuracy", "seconds", "whole_seconds", "images_per_second", "memory_mib", "files", "savings",
    }  # fmt: skip
    assert set(result["files"]) == {"model", "last", "best"}
    assert result["validated_on"] == "test"
    assert "epoch 1/1" in err


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


# ---- other data


def test_part_is_held_out_when_there_is_no_test_split(inside, capsys, tmp_path):
    arrays = stored_data()
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
    assert "pass image_size=(height, width) (--image-size HEIGHTxWIDTH) to resize" in err
    flags = ["--image-size", "28x28", "--epochs", "1", "-q", "--out", tmp_path]
    code, _, _ = run(capsys, "fit", "--data", tmp_path / "photos", *flags)
    assert code == 0
    code, out, _ = run(capsys, "evaluate", tmp_path / "fit-1", "--data", tmp_path / "photos", "--json")
    assert code == 0
    assert json.loads(out)["images"] == 20
    code, _, err = run(capsys, "evaluate", tmp_path / "fit-1", "--data", "embedded")
    assert code == 3
    assert "the model was trained on even, odd; use data with the same classes" in err


def test_signals(inside, capsys, tmp_path):
    x = np.random.default_rng(0).normal(size=(60, 3, 64)).astype(np.float32)
    np.savez(tmp_path / "signals.npz", x=x, y=np.arange(60) % 4)
    flags = ["--model", "cnn1d", "--data", tmp_path / "signals.npz", "--epochs", "1", "-q", "--out", tmp_path]
    assert run(capsys, "fit", *flags)[0] == 0
    for source in ("fit-1", "fit-1/model.onnx"):
        code, out, _ = run(capsys, "evaluate", tmp_path / source, "--data", tmp_path / "signals.npz", "--json")
        assert code == 0
        assert json.loads(out)["images"] == 60


def test_model_of_another_shape_starts_nothing(inside, capsys, tmp_path):
    np.savez(tmp_path / "big.npz", x=np.zeros((20, 32, 32), np.uint8), y=np.arange(20) % 10)
    flags = ["--model", "runs/fit-1/model.onnx", "--data", tmp_path / "big.npz", "--out", tmp_path / "runs"]
    code, _, err = run(capsys, "fit", *flags)
    assert code == 3
    assert "expects (1, 28, 28)" in err
    assert not (tmp_path / "runs").exists()
