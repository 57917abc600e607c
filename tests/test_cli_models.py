"""What works on a trained model, and what one asks before training."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import edgetrain as et
from edgetrain.runs import open_run
from tests.cli_support import FIT, ROOT, run, trained


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
    code, own, _ = run(capsys, "evaluate", source, "--json")  # without --data: what the run was judged on
    assert (code, json.loads(own) | {"data": "digits.npz"}) == (0, result)
    assert Path(json.loads(own)["data"]).name == "digits.npz"


def test_evaluate_without_data_takes_what_a_run_held_out(inside, capsys, tmp_path):
    with np.load("digits.npz") as arrays:
        np.savez(tmp_path / "train.npz", x=arrays["x_train"], y=arrays["y_train"])
    code, out, _ = run(capsys, "fit", "--data", tmp_path / "train.npz", "--out", tmp_path, "--epochs", "1", "--json")
    assert (code, json.loads(out)["validated_on"]) == (0, "held-out")
    code, own, _ = run(capsys, "evaluate", tmp_path / "fit-1", "--json")
    assert (code, json.loads(own)["accuracy"]) == (0, json.loads(out)["accuracy"])


def test_a_model_beside_settings_belongs_to_no_run(inside, capsys, tmp_path, monkeypatch):
    shutil.copy("runs/fit-1/model.onnx", tmp_path)
    (tmp_path / "config.toml").write_text("[data]\nsource = 'nowhere'\n")
    monkeypatch.chdir(tmp_path)
    _, _, err = run(capsys, "evaluate", "model.onnx")
    assert "nowhere" not in err


def test_evaluate_cannot_repeat_a_pipe(inside, capsys, tmp_path):
    with np.load("digits.npz") as arrays:
        lines = [json.dumps({"x": x.ravel().tolist(), "y": 0}) for x in arrays["x_test"][:9]]
    flags = ["--stream", "--data", "-", "--model", "runs/fit-1/model.onnx", "--out", str(tmp_path), "--quiet"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "edgetrain", "fit", *flags]
    subprocess.run(command, input="\n".join(lines), text=True, env=environment, check=True)
    code, _, err = run(capsys, "evaluate", tmp_path / "fit-1")
    assert (code, "came from standard input and are gone; name others with --data" in err) == (2, True)


def test_evaluate_takes_data_that_lack_classes(inside, capsys, tmp_path):
    """Even a single image: the model tells what a label means."""
    with np.load("digits.npz") as arrays:
        x, y = arrays["x_test"], arrays["y_test"]
    learner = et.Learner(et.load_onnx("runs/fit-1/model.onnx"))
    for chosen in (y == y.max(), np.arange(len(y)) == np.flatnonzero(y)[0]):
        np.savez(tmp_path / "some.npz", x=x[chosen], y=y[chosen])
        code, out, _ = run(capsys, "evaluate", "runs/fit-1", "--data", tmp_path / "some.npz", "--json")
        assert code == 0
        assert json.loads(out)["accuracy"] == pytest.approx(learner.evaluate(x[chosen], y[chosen])["accuracy"])
    flags = ["--model", "runs/fit-1/model.onnx", "--epochs", "1", "--quiet", "--out", tmp_path]
    np.savez(tmp_path / "train.npz", x=x[y != 0], y=y[y != 0])
    assert run(capsys, "fit", "--data", tmp_path / "train.npz", *flags)[0] == 0


def test_folders_with_some_classes_of_a_model_have_its_labels(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for name, level in (("cat", 40), ("dog", 200), ("emu", 120)):
        for number in range(12):
            file = tmp_path / f"all/{name}/{number}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(level - 30, level + 30, (12, 12), np.uint8)).save(file)
    (tmp_path / "some").mkdir()
    for name in ("dog", "emu"):
        (tmp_path / "some" / name).symlink_to(tmp_path / "all" / name)
    flags = ["--epochs", "20", "--batch-size", "4", "--lr", "0.01", "--quiet", "--threads", "1"]
    assert run(capsys, "fit", "--data", "all", *flags)[0] == 0
    shutil.copy("runs/fit-1/model.onnx", "model.onnx")
    accuracies = [
        json.loads(run(capsys, "evaluate", "model.onnx", "--data", folder, "--json")[1])["accuracy"]
        for folder in ("all", "some")
    ]
    assert min(accuracies) > 0.9
    assert run(capsys, "fit", "--model", "model.onnx", "--data", "some", *flags)[0] == 0
    assert run(capsys, "fit", "--stream", "--model", "model.onnx", "--data", "some", "--quiet")[0] == 0
    for split, names in (("train", ("dog", "emu")), ("test", ("emu",))):
        for name in names:
            (tmp_path / "split" / split / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "split" / split / name).symlink_to(tmp_path / "all" / name)
    for split, labels in (("train", [1, 2]), ("test", [2])):
        data = et.load_dataset(tmp_path / "split", split=split, class_names=("cat", "dog", "emu"))
        assert sorted(set(data.labels.tolist())) == labels
        _, out, _ = run(capsys, "evaluate", "model.onnx", "--data", "split", "--split", split, "--json")
        assert json.loads(out)["accuracy"] > 0.9
    Path("model.onnx").unlink()  # a run has what it needs
    assert run(capsys, "resume", "runs/fit-2", "--epochs", "21", "--quiet")[0] == 0
    for folder in ("fit-2", "fit-3"):
        _, out, _ = run(capsys, "evaluate", f"runs/{folder}", "--data", "some", "--json")
        assert json.loads(out)["accuracy"] > 0.9


def test_folders_with_more_than_the_numbered_classes_of_a_model_are_refused(inside, capsys, tmp_path):
    """By their places in the folder "10" would be class 0."""
    given = ["2 7", "2 7 10", "10 7", "10 11", "cat dog"]
    for names, code in zip(map(str.split, given), (0, 3, 3, 3, 0), strict=True):
        folder = tmp_path / "-".join(names)
        for name in names:
            (folder / name).mkdir(parents=True)
            Image.fromarray(np.zeros((28, 28), np.uint8)).save(folder / name / "a.png")
        found, _, told = run(capsys, "evaluate", "runs/fit-1", "--data", folder)
        assert found == code
        assert ("use data with the same classes: '10' is none of them" in told) == (code == 3)


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_names_that_are_no_text_end_no_command(inside, encoding, tmp_path):
    name = b"\xff.png"
    Image.fromarray(np.zeros((28, 28), np.uint8)).save(tmp_path / "a.png")
    (tmp_path / "a.png").rename(Path(os.fsdecode(bytes(tmp_path) + b"/" + name)))
    command = [sys.executable, "-m", "edgetrain", "predict", "runs/fit-1", str(tmp_path)]
    environment = os.environ | {"PYTHONIOENCODING": encoding, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(command, capture_output=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert (name if encoding == "utf-8" else b"?.png") in done.stdout


def test_an_error_may_name_what_no_encoding_knows(inside, tmp_path):
    command = [sys.executable, "-m", "edgetrain", "fit", "--stream", "--data", "-", "--model", "runs/fit-1/model.onnx",
               "--quiet", "--out", str(tmp_path)]  # fmt: skip
    environment = os.environ | {"PYTHONIOENCODING": "utf-8", "PYTHONPATH": str(Path(__file__).parents[1])}
    line = b'{"image": "\\ud800.png", "y": 0}'
    done = subprocess.run(command, input=line, capture_output=True, env=environment, check=False)
    assert (done.returncode, done.stderr.count(b"\n")) == (3, 1)
    assert rb"\ud800.png" in done.stderr


def test_an_error_is_one_line_whatever_it_names(capsys, tmp_path):
    code, _, told = run(capsys, "evaluate", tmp_path / "a\nb.onnx")
    assert code == 3
    assert told.count("\n") == 1
    assert r"a\nb.onnx" in told


def test_predict_of_an_array_file(inside, capsys, tmp_path):
    np.savez(tmp_path / "some.npz", x=np.load("digits.npz")["x_test"][:3])
    code, out, _ = run(capsys, "predict", "runs/fit-1", tmp_path / "some.npz", "--json")
    result = json.loads(out)
    assert code == 0
    assert set(result) == {"model", "data", "predictions"}
    assert [set(row) for row in result["predictions"]] == [{"index", "label", "class", "probability"}] * 3
    code, out, _ = run(capsys, "predict", "runs/fit-1", tmp_path / "some.npz")
    assert [line.split()[0] for line in out.splitlines()] == ["image", "0", "1", "2"]


@pytest.mark.parametrize(("loss", "outputs"), [("mse", 1), ("mse", 3), ("cross_entropy", 1)])
def test_predict_of_a_network_without_classes_gives_its_outputs(capsys, tmp_path, loss, outputs):
    """A checkpoint knows its loss; an ONNX file does not, but a single output tells no classes apart."""
    graph = et.Graph("line", input_shape=(1, 4))
    weight = np.random.default_rng(0).normal(size=(outputs, 4)).astype(np.float32)
    x = np.random.default_rng(1).normal(size=(3, 1, 4)).astype(np.float32)
    flat = graph.add("Flatten", [graph.inputs[0]])
    graph.set_outputs([graph.add("Gemm", [flat, graph.parameter("weight", weight)], transB=1)])
    learner = et.Learner(graph, loss="mse")
    learner.save(tmp_path / "line.safetensors")
    learner.export_onnx(tmp_path / "line.onnx")
    np.savez(tmp_path / "some.npz", x=x)
    file = tmp_path / ("line.safetensors" if loss == "mse" else "line.onnx")
    code, out, _ = run(capsys, "predict", file, tmp_path / "some.npz", "--json")
    assert code == 0
    predictions = json.loads(out)["predictions"]
    assert [set(row) for row in predictions] == [{"index", "outputs"}] * 3
    np.testing.assert_allclose([row["outputs"] for row in predictions], x[:, 0] @ weight.T, rtol=1e-5)
    lines = run(capsys, "predict", file, tmp_path / "some.npz")[1].splitlines()
    assert [len(line.split()) for line in lines] == [2, *[1 + outputs] * 3]


def test_predict_refuses_an_array_without_samples(inside, capsys, tmp_path):
    np.savez(tmp_path / "one.npz", x=np.float32(3))
    code, _, err = run(capsys, "predict", "runs/fit-1", tmp_path / "one.npz")
    assert code == 3
    assert "images have shape ()" in err


def test_predict_of_an_image_equals_that_of_its_pixels(inside, capsys, tmp_path):
    image = pytest.importorskip("PIL.Image")
    pixels = np.load("digits.npz")["x_test"][4]
    image.fromarray(pixels).save(tmp_path / "four.png")
    np.savez(tmp_path / "four.npz", x=pixels[None])
    results = [json.loads(run(capsys, "predict", "runs/fit-1", tmp_path / name, "--json")[1])
               for name in ("four.png", "four.npz")]  # fmt: skip
    assert results[0]["predictions"] == [results[1]["predictions"][0] | {"file": str(tmp_path / "four.png")}]


@pytest.mark.parametrize(
    ("names", "flags", "wanted"),
    [
        (["b.png", "a.jpg", "notes.txt", "c.png"], [], ["a.jpg", "b.png", "c.png"]),
        (["plums/a.png", "pears/b.png", "pears/c.png"], [], ["pears/b.png", "pears/c.png", "plums/a.png"]),
        (["train/x/a.png", "test/x/c.png", "test/y/b.png"], [], ["test/x/c.png", "test/y/b.png"]),
        (["train/x/a.png", "train/y/b.png", "test/x/c.png"], ["--split", "train"], ["train/x/a.png", "train/y/b.png"]),
    ],
    ids=["plain", "other_classes", "test_split", "chosen_split"],
)
def test_predict_of_a_folder_names_its_images(inside, capsys, tmp_path, names, flags, wanted):
    image = pytest.importorskip("PIL.Image")
    pixels = np.load("digits.npz")["x_test"]
    for index, name in enumerate(names):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        if name.endswith("txt"):
            (tmp_path / name).write_text("no image")
        else:
            image.fromarray(pixels[index]).save(tmp_path / name)
    code, out, _ = run(capsys, "predict", "runs/fit-1", tmp_path, *flags, "--json")
    predictions = json.loads(out)["predictions"]
    assert code == 0
    assert [row["file"] for row in predictions] == [str(tmp_path / name) for name in wanted]
    alone = json.loads(run(capsys, "predict", "runs/fit-1", tmp_path / wanted[1], "--json")[1])["predictions"]
    assert alone == [predictions[1] | {"index": 0}]
    _, out, _ = run(capsys, "predict", "runs/fit-1", tmp_path, *flags)
    assert [line.split()[0] for line in out.splitlines()] == ["image", *(str(tmp_path / name) for name in wanted)]


def png_of(width: int, height: int) -> bytes:
    """Return a PNG file that says to be so large, and holds no pixels."""
    chunks = [b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0), b"IDAT", b"IEND"]
    framed = (struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(framed)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("bomb.png", png_of(30000, 30000), "cannot be decoded"),
        ("cut.png", png_of(28, 28), "cannot be decoded"),
        ("deep.png", np.zeros((28, 28), np.uint16), "expected 8 bits per channel"),
        ("gone.png", None, "no such file"),
        ("folder/cut.png", png_of(28, 28), "cannot be decoded"),
    ],
    ids=["bomb", "cut", "deep", "gone", "in_a_folder"],
)
def test_predict_refuses_what_training_refuses(inside, capsys, tmp_path, name, content, message):
    image = pytest.importorskip("PIL.Image")
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        image.fromarray(content).save(path)
    code, _, err = run(capsys, "predict", "runs/fit-1", path.parent if "/" in name else path)
    assert code == 3
    assert f"{path}: " in err
    assert message in err


def test_a_plain_folder_of_images_has_no_splits(inside, capsys, tmp_path):
    (tmp_path / "a.png").write_bytes(png_of(28, 28))
    code, _, err = run(capsys, "predict", "runs/fit-1", tmp_path, "--split", "test")
    assert code == 2
    assert "a plain folder of images; leave --split out" in err


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


def test_weights_that_were_trained_on_inputs_as_they_are_are_pointed_out(inside, capsys, tmp_path):
    learner = et.Learner(et.models.lenet5())
    learner.export_onnx(tmp_path / "raw.onnx")
    common = ["fit", "--data", "digits.npz", "--epochs", "1", "--out", tmp_path]
    for how in (["--model", tmp_path / "raw.onnx"], ["--initial-weights", tmp_path / "raw.onnx"]):
        code, out, _ = run(capsys, *common, *how)
        assert code == 0 and "if they were trained on inputs as they are: --no-normalize" in out
    for other in (["--model", "runs/fit-1/model.onnx"], [], ["--model", tmp_path / "raw.onnx", "--no-normalize"]):
        code, out, _ = run(capsys, *common, *other)
        assert code == 0 and "--no-normalize" not in out


def test_report(inside, capsys):
    code, out, _ = run(capsys, "report", "runs/fit-1", "--json")
    result = json.loads(out)
    assert code == 0
    wanted = {"run", "status", "config", "environment", "epochs", "operations", "best", "seconds", "files",
              "whole_seconds", "account", "lacks"}
    assert set(result) == wanted
    assert result["status"] == "finished"
    assert len(result["epochs"]) == 3
    assert result["best"] in result["epochs"]
    assert result["lacks"] is None
    code, out, _ = run(capsys, "report", "runs/fit-1")
    assert out.startswith("runs/fit-1: finished, lenet5 on ")


# ---- before training


def test_plan_adds_up_and_respects_the_budget(capsys):
    code, out, _ = run(capsys, "plan", "lenet5", "--batch-size", "32", "--json")
    result = json.loads(out)
    assert code == 0
    assert set(result) == {"model", "batch_size", "methods", "parts", "notes", "peak_bytes", "budget_bytes", "fits"}
    assert sum(result["parts"].values()) == result["peak_bytes"]
    assert result["notes"] == {}
    assert {"weights", "activations"} <= set(result["parts"])
    code, out, err = run(capsys, "plan", "lenet5", "--batch-size", "32", "--memory-budget", "100KiB")
    assert code == 4
    assert "peak" in out
    assert "the budget is 0.10 MiB; use a smaller --batch-size" in err


@pytest.mark.parametrize(("sparsity", "stored"), [("rigl", "non-zeros only"), ("set", "non-zeros only"),
                                                  ("static", "non-zeros only"), ("swat", "dense master")])  # fmt: skip
def test_plan_tells_what_sparse_training_stores(capsys, sparsity, stored):
    code, out, _ = run(capsys, "plan", "lenet5", "--batch-size", "8", "--sparsity", f"{sparsity}:weights=0.8")
    assert code == 0
    assert out.startswith(f"lenet5, batch size 8, {sparsity}:weights=0.8\n")
    for line in (f"weights ({stored})", "sparse index (the pattern)"):
        assert line in out
    assert ("activations (whole gradients at a refresh)" in out) == (sparsity == "rigl")
    assert ("activations (pruned ones as lists)" in out) == (sparsity == "swat")


def test_plan_with_methods_is_that_of_their_learner(capsys):
    methods = {"filter": "eif:rate=0.3", "sparsity": "swat:weights=0.9", "error_pruning": "channels:keep=0.7"}
    flags = [part for kind, text in methods.items() for part in (f"--{kind.replace('_', '-')}", text)]
    code, out, _ = run(capsys, "plan", "lenet5", "--batch-size", "8", "--threads", "1", *flags, "--json")
    result = json.loads(out)
    named = {"sparsity": methods["sparsity"], "instance_filter": methods["filter"],
             "error_pruning": methods["error_pruning"]}  # fmt: skip
    expected = et.Learner(et.models.lenet5(), batch_size=8, threads=1, **named).memory_plan()
    assert (code, result["methods"], result["notes"]) == (0, methods, expected.notes)
    # The recipe's weight decay is another row of the program than none.
    assert result["parts"] | {"tables": 0} == expected.parts | {"tables": 0}


def test_plan_refuses_bad_methods(capsys):
    code, out, err = run(capsys, "plan", "lenet5", "--sparsity", "riggl")
    assert (code, out) == (2, "")
    assert "did you mean 'rigl'?" in err


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
