"""A small data set, a short training command, and what the tests of the command line compare."""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
import pytest

import edgetrain
from edgetrain.checkpoint import read_checkpoint
from edgetrain.cli import main
from edgetrain.runs import open_run

ROOT = Path(edgetrain.__file__).parents[1]
# Small enough to train in a second, large enough to be interrupted in the middle of an epoch.
FIT = ["fit", "--data", "digits.npz", "--epochs", "3", "--batch-size", "8", "--seed", "1", "--threads", "1",
       "--augment", "shift:2"]  # fmt: skip
STREAM = ["fit", "--stream", "--data", "digits.npz", "--batch-size", "8", "--threads", "1"]
TIMES = ("seconds", "images_per_second")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


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


def stored_data() -> dict[str, np.ndarray]:
    """Return what ``write_data`` wrote here; the file is closed, whoever keeps a frame of the test."""
    with np.load("digits.npz") as arrays:
        return dict(arrays)


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


def trained(folder: Path) -> Path:
    """Write data and train one run to its end; return the folder."""
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
