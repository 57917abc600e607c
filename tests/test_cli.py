"""The command line: exit codes, texts, JSON keys, and what it must not import."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import edgetrain
from tests.cli_support import ROOT, run

CHECKOUT = Path(__file__).parents[1]


def environment(**more) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "100"} | more


def start(*command, cwd, **options) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *map(str, command)], cwd=cwd, env=environment(), text=True, capture_output=True, **options
    )  # fmt: skip


def imported_by(code: str) -> set[str]:
    """Return the top-level modules that a fresh interpreter has after some code."""
    tail = "; import sys; print(*sorted({m.partition('.')[0] for m in sys.modules}), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code + tail], env=environment(), text=True, capture_output=True)
    return set(done.stderr.split())


HEAVY = {"numba", "numpy", "onnx", "onnxruntime", "torch", "rich", "safetensors", "msgspec"}


def test_help_imports_nothing_heavy():
    modules = imported_by("from edgetrain.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\n0")
    assert "typer" in modules
    assert not modules & HEAVY


def test_import_of_the_package_imports_nothing_heavy():
    modules = imported_by("import edgetrain")
    assert "edgetrain" in modules
    assert not modules & HEAVY


def test_three_ways_to_start_say_the_same(tmp_path):
    launcher = CHECKOUT / "cli.py"
    module = start("-m", "edgetrain", "--help", cwd=tmp_path)
    script = start(launcher, "--help", cwd=tmp_path)
    entry = start("-c", "import sys; sys.argv[0] = 'edgetrain'; from edgetrain.cli import main; main()", "--help",
                  cwd=tmp_path)  # fmt: skip
    assert module.returncode == 0
    assert module.stdout.startswith("Usage: edgetrain [OPTIONS] COMMAND")
    assert module.stdout == script.stdout == entry.stdout


COMMANDS = ("fit", "resume", "evaluate", "predict", "export", "plan", "verify", "bench", "report", "doctor", "warmup",
            "version", "profiles")  # fmt: skip


def test_help_lists_all_commands(capsys):
    _, out, _ = run(capsys, "--help")
    listed = [line.split()[0] for line in out.partition("Commands:")[2].splitlines() if line.strip()]
    assert sorted(listed) == sorted(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(capsys, command):
    code, out, _ = run(capsys, command, "--help")
    assert code == 0
    assert out.startswith(f"Usage: edgetrain {command}")


def test_version(capsys):
    assert run(capsys, "version") == (0, f"edgetrain {edgetrain.__version__}\n", "")
    _, out, _ = run(capsys, "version", "--json")
    assert json.loads(out) == {"version": edgetrain.__version__}


def test_profiles_list_and_show(capsys):
    code, out, _ = run(capsys, "profiles", "list", "--json")
    names = [profile["name"] for profile in json.loads(out)["profiles"]]
    assert code == 0
    assert {"raspberrypi4", "generic-aarch64", "host"} <= set(names)
    assert run(capsys, "profiles", "--json") == (0, out, "")
    assert "raspberrypi4" in run(capsys, "profiles")[1]
    code, _, err = run(capsys, "profiles", "--json", "list")
    assert code == 2
    assert "expected behind 'list'" in err
    code, out, _ = run(capsys, "profiles", "show", "raspberrypi4")
    assert code == 0
    assert "Raspberry Pi 4" in out
    assert "sources:" in out
    _, out, _ = run(capsys, "profiles", "show", "raspberrypi4", "--json")
    assert json.loads(out)["defaults"]["recipe"]["epochs"] >= 1


def test_doctor(capsys):
    code, out, _ = run(capsys, "doctor", "--json")
    result = json.loads(out)
    assert code == 0
    assert set(result) == {"edgetrain", "host", "cache", "calibration", "disk_free_mib", "healthy", "advice"}
    assert set(result["cache"]) == {"folder", "writable", "kernels"}
    code, out, _ = run(capsys, "doctor")
    assert code == 0
    assert "kernel cache" in out


def test_doctor_says_what_to_do(capsys, monkeypatch, tmp_path):
    from edgetrain.cli import machine

    facts = machine.host_facts() | {"temperature_c": 85.0, "throttled": ["under-voltage"], "ram_available_mib": 50}
    monkeypatch.setattr(machine, "host_facts", lambda: facts)
    monkeypatch.setattr("edgetrain.kernels.cache._writable", lambda folder: False)
    code, out, _ = run(capsys, "doctor")
    advice = [line for line in out.splitlines() if line.startswith("do: ")]
    assert code == 0
    assert len(advice) == 4
    assert "NUMBA_CACHE_DIR" in advice[0]
    assert "under-voltage" in advice[3]


# Errors: arguments, exit code, and what the one message must name.
ERRORS = {
    "unknown command": (["fitt"], 2, "fitt"),
    "unknown flag": (["fit", "--epoch-count", "3"], 2, "--epoch-count"),
    "not a number": (["fit", "--epochs", "many"], 2, "Invalid value for '--epochs'"),
    "unknown profile": (["fit", "--profile", "raspberrypi9"], 2, "unknown device profile 'raspberrypi9'; did you mean"),
    "value out of range": (["fit", "--lr", "99"], 2, "'training.lr' is 99.0, expected a number from"),
    "unknown optimizer": (["fit", "--optimizer", "sdg"], 2, "'training.optimizer' is 'sdg', expected one of 'sgd'"),
    "nesterov of a profile without momentum": (["fit", "--momentum", "0"], 2, "or nesterov=False (--no-nesterov)"),
    "unknown setting": (["fit", "--set", "training.lrr=1"], 2, "did you mean 'training.lr'?"),
    "setting without section": (["fit", "--set", "lr=1"], 2, "'lr' is not a setting; expected SECTION.KEY"),
    "setting without value": (["fit", "--set", "training.lr"], 2, "expected KEY=VALUE"),
    "budget without unit": (["fit", "--memory-budget", "64"], 2, "memory '64': expected a number and a unit"),
    "unknown model": (["fit", "--model", "lenet6"], 2, "unknown model 'lenet6'; did you mean 'lenet5'?"),
    "bad augmentation": (["fit", "--augment", "flop"], 2, "cannot read 'flop'"),
    "augmentation too large": (["fit", "--augment", "crop:40"], 2, "moves by up to 40, expected less than 28"),
    "missing data": (["fit", "--data", "/no/such/folder"], 3, "/no/such/folder: no such file or folder"),
    "missing model file": (["fit", "--model", "/no/such.onnx"], 3, "/no/such.onnx"),
    "missing config": (["fit", "--config", "/no/such.toml"], 2, "/no/such.toml: cannot be read as TOML"),
    "resume nothing": (["resume", "/no/such/run"], 2, "/no/such/run: no such run folder"),
    "report nothing": (["report", "/no/such/run"], 2, "/no/such/run: no such run folder"),
    "no data": (["fit", "--data", ""], 2, "data.source is ''; expected 'embedded', a folder or a file"),
    "evaluate nothing": (["evaluate", "/no/such/file"], 2, "/no/such/file: no such file; expected a run folder"),
    "missing checkpoint": (["evaluate", "/no/such.safetensors"], 3, "/no/such.safetensors: no such checkpoint"),
    "export to another format": (["export", "x.safetensors", "-o", "x.pt"], 2, "--output is 'x.pt', expected"),
    "bad shape": (["plan", "lenet5", "--input-shape", "28by28"], 2, "--input-shape is '28by28', expected"),
    "no steps": (["verify", "lenet5", "--steps", "0"], 2, "--steps"),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_error_is_one_message_with_its_exit_code(capsys, monkeypatch, tmp_path, name):
    monkeypatch.chdir(tmp_path)
    arguments, expected, text = ERRORS[name]
    code, out, err = run(capsys, *arguments)
    assert code == expected
    assert text in err
    assert "Traceback" not in err
    assert out == ""
    assert not (tmp_path / "runs").exists(), "a run that cannot start must leave no folder"


@pytest.mark.parametrize("place", ["before", "after"])
def test_debug_shows_the_traceback(capsys, place):
    command = ["profiles", "show", "nothing"]
    code, _, err = run(capsys, *(["--debug", *command] if place == "before" else [*command, "--debug"]))
    assert code == 2
    assert err.startswith("Traceback (most recent call last):")
    assert "unknown device profile" in err.splitlines()[-1]


@pytest.mark.parametrize(
    "command",
    [["fit", "--epochs", "0"], ["evaluate", "nosuch.onnx"], ["fit", "--memory-budget", "1MiB"], ["doctor"]],
    ids=["usage", "model", "budget", "defect"],
)
def test_debug_leaves_the_exit_code_as_it_is(capsys, monkeypatch, tmp_path, command):
    from edgetrain.cli import machine

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(machine, "doctor_command", lambda *_, **__: 1 // 0)
    plain, _, message = run(capsys, *command)
    code, _, err = run(capsys, *command, "--debug")
    assert code == plain > 1
    assert "Traceback" in err
    assert "Traceback" not in message


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (MemoryError(), 4, "out of memory"),
        (PermissionError(13, "Permission denied", "runs"), 2, "runs: Permission denied"),
        (ZeroDivisionError("oops"), 70, "ZeroDivisionError: oops; this is a defect of edgetrain"),
    ],
    ids=["memory", "system", "defect"],
)
def test_other_exceptions_are_one_message_too(capsys, monkeypatch, error, code, text):
    from edgetrain.cli import machine

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(machine, "doctor_command", fail)
    found, _, err = run(capsys, "doctor")
    assert found == code
    assert text in err
    assert err.count("\n") == 1


def test_numbers_that_json_lacks_become_null(capsys):
    from edgetrain.cli.output import emit

    emit({"loss": float("nan"), "rows": [float("inf"), 1.5, np.float64(2.0)]}, "", as_json=True)
    assert json.loads(capsys.readouterr().out) == {"loss": None, "rows": [None, 1.5, 2.0]}


@pytest.mark.parametrize(
    ("text", "expected"), [("64MiB", 64 << 20), ("1.5 GiB", 3 << 29), ("512kb", 512_000), ("7B", 7), (77, 77)], ids=str
)
def test_memory_sizes(text, expected):
    from edgetrain.units import parse_bytes

    assert parse_bytes(text) == expected
