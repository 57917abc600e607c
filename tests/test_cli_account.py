"""What a run tells at its end: times that agree everywhere, checkpoints by the clock, the dense twin, the plot."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
import weakref
from importlib import import_module
from pathlib import Path
from pkgutil import resolve_name

import numpy as np
import pytest

import edgetrain as et
from edgetrain.cli import output, sessions, streaming
from edgetrain.cli.stream_blocks import BlockLearner
from edgetrain.errors import NumericalError, UsageError
from edgetrain.runs import open_run
from tests.cli_support import ROOT, rows_without_times, run, stored_data, write_data

STREAM = ["fit", "--stream", "--data", "digits.npz", "--batch-size", "8", "--threads", "1", "--window", "100",
          "--filter", "random:rate=0.5"]  # fmt: skip
EPOCHS = ["fit", "--data", "digits.npz", "--batch-size", "8", "--threads", "1", "--epochs", "2"]
CHANNELS = [*EPOCHS, "--error-pruning", "channels:keep=0.7"]


@pytest.fixture
def inside(tmp_path, monkeypatch) -> Path:
    """Return a folder with 640 training instances and test data, as the working directory."""
    write_data(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def stopped_after(monkeypatch, count: int, folder: str) -> None:
    """Let a signal seem to come while the run of ``folder`` goes on, after ``count`` questions."""
    asked = []

    def requested(_) -> bool:
        if Path(folder).is_dir():
            asked.append(1)
        return len(asked) > count

    monkeypatch.setattr("edgetrain.cli.signals.StopOnSignal.requested", requested)


# ---- memory, times and checkpoints


@pytest.mark.parametrize("flags", [STREAM, CHANNELS], ids=["stream", "epochs"])
def test_a_run_lets_the_graph_go_that_its_learner_was_made_from(inside, capsys, monkeypatch, flags):
    made, left = [], []
    real = sessions.make_learner

    def make_learner(config, graph, profile):
        made.append(weakref.ref(graph))
        return real(config, graph, profile)

    monkeypatch.setattr(sessions, "make_learner", make_learner)
    monkeypatch.setattr("edgetrain.learner.Learner.prepare", lambda _: left.append(made[-1]()) or sys.exit(9))
    assert run(capsys, *flags, "--quiet")[0] == 9
    assert left == [None]


def test_a_stream_is_saved_by_the_clock_not_by_its_rows(inside, capsys, monkeypatch):
    saved = []
    real = sessions.save_checkpoint
    monkeypatch.setattr(sessions, "save_checkpoint", lambda made, path: saved.append(path.name) or real(made, path))
    assert run(capsys, *STREAM, "--quiet")[0] == 0
    assert saved == ["last.safetensors", "last.safetensors", "best.safetensors"]  # the beginning and the end
    assert len(open_run("runs/fit-1").read_metrics()) == 7
    saved.clear()
    assert run(capsys, *STREAM, "--quiet", "--save-every", "0")[0] == 0
    assert len(saved) > 30
    assert rows_without_times(Path("runs/fit-2")) == rows_without_times(Path("runs/fit-1"))


def test_rows_in_memory_are_bounded(inside, capsys, monkeypatch):
    monkeypatch.setattr(streaming, "_MOST_UNWRITTEN", 2)
    monkeypatch.setattr(streaming.StreamSession, "_save", lambda self: None)
    assert run(capsys, *STREAM, "--quiet")[0] == 0
    assert len(open_run("runs/fit-1").read_metrics()) == 6


@pytest.mark.parametrize("flags", [STREAM, EPOCHS], ids=["stream", "epochs"])
def test_training_time_is_one_figure_and_leaves_out_what_is_not_training(inside, capsys, monkeypatch, flags):
    kept = et.data.Dataset.take
    monkeypatch.setattr("edgetrain.data.Dataset.take", lambda self, which: time.sleep(0.01) or kept(self, which))
    real = BlockLearner._normalize
    monkeypatch.setattr(BlockLearner, "_normalize", lambda *given: time.sleep(0.01) or real(*given))
    code, out, _ = run(capsys, *flags, "--json")
    result = json.loads(out)
    assert code == 0
    assert 0 < result["seconds"] < 0.3 < result["whole_seconds"]
    assert result["seconds"] == pytest.approx(sum(row["seconds"] for row in open_run("runs/fit-1").read_metrics()))
    assert (result["savings"]["seconds"], result["savings"]["whole_seconds"]) == (
        result["seconds"], result["whole_seconds"])  # fmt: skip
    code, out, _ = run(capsys, "report", "runs/fit-1", "--json")
    told = json.loads(out)
    assert told["seconds"] == pytest.approx(result["seconds"])
    assert told["whole_seconds"] == result["whole_seconds"]
    _, out, _ = run(capsys, "report", "runs/fit-1")
    assert re.search(r"training time \d\.\d s \(whole run \d\.\d s\)", out)


def test_the_whole_run_is_the_sum_of_its_parts(tmp_path):
    made = et.runs.create_run(tmp_path, "fit")
    for event, seconds in (("started", None), ("saved", 60.0), ("saved", 120.0), ("resumed", None),
                           ("interrupted", 7.0), ("resumed", None), ("finished", 3.0)):  # fmt: skip
        made.log(event, **({} if seconds is None else {"whole_seconds": seconds}))
    assert made.whole_seconds() == 130.0


@pytest.mark.parametrize("event", ["saved", "epoch", "finished", "interrupted"])
def test_the_whole_time_is_unknown_where_an_earlier_version_noted_none(inside, capsys, event):
    assert run(capsys, *EPOCHS, "--epochs", "1", "--quiet")[0] == 0
    made = open_run("runs/fit-1")
    made.events_file.write_text("")
    for name, details in (("started", {}), (event, {}), ("resumed", {}), ("finished", {"whole_seconds": 3.0})):
        made.log(name, **details)
    assert made.whole_seconds() is None
    assert json.loads(run(capsys, "report", "runs/fit-1", "--json")[1])["whole_seconds"] is None
    out = run(capsys, "report", "runs/fit-1")[1]
    assert "training time" in out
    assert "whole run" not in out
    code, out, _ = run(capsys, "resume", "runs/fit-1", "--epochs", "2")
    assert code == 0
    assert "training time" in out
    assert "whole run" not in out


def test_a_stream_that_grew_goes_on_with_its_rows(inside, capsys, tmp_path):
    images = stored_data()
    for count in (250, 400):
        np.savez("grows.npz", x=images["x_train"][:count], y=images["y_train"][:count])
        command = ["resume", "runs/fit-1"] if count == 400 else [*STREAM, "--data", "grows.npz"]
        assert run(capsys, *command, "--quiet")[0] == 0
    rows = open_run("runs/fit-1").read_metrics()
    assert [row["epoch"] for row in rows] == list(range(1, len(rows) + 1))
    assert sum(row["instances_seen"] for row in rows) == 400


# ---- the dense twin


@pytest.mark.parametrize("flags", [STREAM, CHANNELS], ids=["stream", "epochs"])
@pytest.mark.parametrize("folder", ["runs/fit-1", "runs/fit-1/baseline"])
def test_a_baseline_is_remembered_when_a_run_is_resumed(inside, capsys, monkeypatch, flags, folder):
    with monkeypatch.context() as signals:
        stopped_after(signals, 12, folder)
        code, _, err = run(capsys, *flags, "--baseline", "--quiet")
    assert code == 5
    assert err.endswith("go on with: edgetrain resume runs/fit-1\n")
    code, out, _ = run(capsys, "resume", "runs/fit-1", "--json")
    assert code == 0
    dense = json.loads(out)["savings"]["dense"]
    assert dense["how"] == "measured, the same data without the methods"
    assert dense["accuracy"] > 0
    assert open_run("runs/fit-1/baseline").status() == "finished"
    assert "nothing is left" in run(capsys, "resume", "runs/fit-1")[2]
    assert run(capsys, *flags, "--baseline", "--quiet")[0] == 0
    for name in ("", "baseline"):
        assert rows_without_times(Path("runs/fit-1") / name) == rows_without_times(Path("runs/fit-2") / name)


@pytest.mark.parametrize("flags", [STREAM[:-2], EPOCHS], ids=["stream", "epochs"])
def test_a_baseline_of_a_run_that_skips_nothing_is_refused(inside, capsys, flags):
    code, _, err = run(capsys, *flags, "--recipe", "dense", "--baseline")
    assert code == 2
    assert "--baseline: nothing is skipped, so the baseline would be the same run; name a method" in err
    assert not (inside / "runs").exists()


@pytest.mark.parametrize("flags", [STREAM, CHANNELS], ids=["stream", "epochs"])
def test_a_baseline_that_diverges_leaves_the_run_its_account(inside, capsys, monkeypatch, flags):
    real = et.Learner.partial_fit

    def step(self, x, y):
        if self.instance_filter is self.error_pruning is None and self.step_count == 10:
            raise NumericalError("step 11: loss or gradients are not finite")
        return real(self, x, y)

    monkeypatch.setattr(et.Learner, "partial_fit", step)
    code, out, err = run(capsys, *flags, "--baseline", "--json")
    assert code == 0, err
    assert "runs/fit-1/baseline: the dense run was not finite at step 11\n" in err
    savings = json.loads(out)["savings"]
    assert savings["dense"] == {"seconds": None, "how": "the dense run was not finite at step 11"}
    assert savings["time_saved"] is None
    assert open_run("runs/fit-1").account()["savings"] == savings
    assert "dense training takes is unknown (the dense run was not finite at step 11)" in run(
        capsys, "report", "runs/fit-1")[1]  # fmt: skip
    assert (open_run("runs/fit-1").status(), open_run("runs/fit-1/baseline").status()) == ("finished", "failed")
    assert "nothing is left" in run(capsys, "resume", "runs/fit-1")[2]


# ---- a signal after the last step


def signalled(monkeypatch, where: str, *numbers: int) -> None:
    """Let signals come when a function of edgetrain is called."""
    real = resolve_name(f"edgetrain.{where}")

    def call(*given, **named):
        for number in numbers:
            signal.raise_signal(number)
        return real(*given, **named)

    monkeypatch.setattr(f"edgetrain.{where}", call)


@pytest.mark.parametrize("numbers", [[signal.SIGTERM], [signal.SIGINT], 2 * [signal.SIGINT]],
                         ids=["SIGTERM", "SIGINT", "SIGINT-twice"])  # fmt: skip
@pytest.mark.parametrize("flags", [STREAM, CHANNELS], ids=["stream", "epochs"])
def test_a_signal_while_the_last_files_are_written_leaves_them_whole(inside, capsys, monkeypatch, flags, numbers):
    with monkeypatch.context() as signals:
        signalled(signals, "learner.Learner.export_onnx", *numbers)
        code, out, err = run(capsys, *flags, "--quiet")
    assert (code, out) == (5, "")
    assert err == (
        "interrupted: stopped after the last step; runs/fit-1/model.onnx is written, what the run tells at its end is "
        "not; go on with: edgetrain resume runs/fit-1\n"
    )
    model = Path("runs/fit-1/model.onnx").read_bytes()
    code, out, _ = run(capsys, "resume", "runs/fit-1", "--json")
    assert code == 0
    assert open_run("runs/fit-1").account()["savings"] == json.loads(out)["savings"]
    assert Path("runs/fit-1/model.onnx").read_bytes() == model
    assert "nothing is left" in run(capsys, "resume", "runs/fit-1")[2]


@pytest.mark.parametrize("flags", [STREAM, CHANNELS], ids=["stream", "epochs"])
def test_a_signal_during_the_estimate_of_dense_time_ends_it(inside, capsys, monkeypatch, flags):
    with monkeypatch.context() as signals:
        signalled(signals, "cli.estimate._dense_twin", signal.SIGTERM)
        code, _, err = run(capsys, *flags, "--quiet")
    assert code == 5
    assert err.endswith("go on with: edgetrain resume runs/fit-1\n")
    assert open_run("runs/fit-1").status() == "finished"
    with monkeypatch.context() as signals:
        signalled(signals, "cli.estimate._dense_twin", signal.SIGINT)
        assert run(capsys, "resume", "runs/fit-1", "--quiet")[0] == 5
    assert run(capsys, "resume", "runs/fit-1", "--quiet")[0] == 0
    assert open_run("runs/fit-1").account()


# ---- an account that was cut off


def killed(monkeypatch, capsys, where: str, *command: str) -> None:
    """Run a command whose process ends in a function of ``edgetrain.cli``."""

    def die(*_, **__):
        raise SystemExit(9)

    import_module("edgetrain.cli.training")  # first: what it imports is not to be patched for ever
    with monkeypatch.context() as death:
        death.setattr(f"edgetrain.cli.{where}", die)
        assert run(capsys, *command, "--quiet")[0] == 9


@pytest.mark.parametrize("where", ["epochs.layers_of", "plotting.plot_runs"], ids=["in_the_account", "in_the_plot"])
@pytest.mark.parametrize("flags", [STREAM, CHANNELS], ids=["stream", "epochs"])
def test_a_run_that_was_killed_before_its_account_ends_when_it_is_resumed(inside, capsys, monkeypatch, flags, where):
    pytest.importorskip("matplotlib")
    baseline = ["--baseline"] if where == "plotting.plot_runs" else []
    if flags is STREAM:
        where = where.replace("epochs", "streaming")
    killed(monkeypatch, capsys, where, *flags, *baseline)
    made = open_run("runs/fit-1")
    assert (made.status(), made.account()) == ("finished", {})
    rows = rows_without_times(made.path)
    code, out, _ = run(capsys, "resume", "runs/fit-1", "--json")
    assert code == 0
    assert made.account()["savings"] == json.loads(out)["savings"]
    assert (made.path / "accuracy.svg").exists() == bool(baseline)
    assert rows_without_times(made.path) == rows
    assert "nothing is left" in run(capsys, "resume", "runs/fit-1")[2]


@pytest.mark.parametrize("flags", [STREAM, EPOCHS], ids=["stream", "epochs"])
def test_a_finished_run_of_an_earlier_version_stays_finished(inside, capsys, flags):
    assert run(capsys, *flags, "--quiet")[0] == 0
    made = open_run("runs/fit-1")
    events = [event for event in made.read_events() if event["event"] != "account"]
    lines = [json.dumps({k: v for k, v in event.items() if k != "whole_seconds"}) + "\n" for event in events]
    made.events_file.write_text("".join(lines))
    code, _, err = run(capsys, "resume", "runs/fit-1")
    assert code == 2
    assert "nothing is left" in err


def test_the_account_of_a_run_that_went_on_is_not_that_of_its_beginning(inside, capsys, monkeypatch):
    assert run(capsys, *CHANNELS, "--quiet")[0] == 0
    made = open_run("runs/fit-1")
    assert made.account()
    killed(monkeypatch, capsys, "epochs.layers_of", "resume", "runs/fit-1", "--epochs", "3")
    assert made.status() == "finished"
    assert json.loads(run(capsys, "report", "runs/fit-1", "--json")[1])["account"] == {}
    assert run(capsys, "resume", "runs/fit-1", "--quiet")[0] == 0
    assert made.account()["savings"]["instances_seen"] == 3 * 640


# ---- the plot


def test_the_plot_is_in_the_folder_of_a_run_with_a_baseline(inside, capsys):
    pytest.importorskip("matplotlib")
    code, out, _ = run(capsys, *STREAM, "--baseline")
    assert code == 0
    assert "plot: runs/fit-1/accuracy.svg" in out
    assert (inside / "runs/fit-1/accuracy.svg").exists()


@pytest.mark.parametrize(("error", "message"), [
    (UsageError("plots need matplotlib, which is not installed; use pip install edgetrain[plots]"),
     "no plot: plots need matplotlib, which is not installed; use pip install edgetrain[plots]\n"),
    (RuntimeError("no fonts"), "no plot: RuntimeError: no fonts; try again with: edgetrain report runs/fit-1 --plot\n"),
])  # fmt: skip
def test_no_plot_fails_no_run(inside, capsys, monkeypatch, error, message):
    def plot_runs(*_):
        raise error

    monkeypatch.setattr("edgetrain.cli.plotting.plot_runs", plot_runs)
    code, out, _ = run(capsys, *STREAM, "--baseline")
    assert code == 0
    assert message in out


def test_a_plot_that_cannot_be_written_is_told_in_one_line(inside, capsys):
    pytest.importorskip("matplotlib")
    assert run(capsys, *STREAM, "--quiet")[0] == 0
    (inside / "runs/fit-1/accuracy.svg").mkdir()
    code, _, err = run(capsys, "report", "runs/fit-1", "--plot")
    assert code == 2
    assert err.startswith("error: runs/fit-1/accuracy.svg: cannot be written")


def test_a_kill_while_the_plot_is_written_leaves_the_old_one(inside, capsys, monkeypatch):
    figure = pytest.importorskip("matplotlib.figure")
    assert run(capsys, *STREAM, "--quiet")[0] == 0
    assert run(capsys, "report", "runs/fit-1", "--plot")[0] == 0
    before = Path("runs/fit-1/accuracy.svg").read_bytes()

    def dying(self, target, **_):
        with open(target, "wb") if isinstance(target, Path) else target as file:
            file.write(b"half")
        raise SystemExit(9)

    monkeypatch.setattr(figure.Figure, "savefig", dying)
    assert run(capsys, "report", "runs/fit-1", "--plot")[0] == 9
    assert Path("runs/fit-1/accuracy.svg").read_bytes() == before


def drawn(monkeypatch, capsys, *flags) -> tuple[str, list]:
    """Return the label of the vertical axis and the curves (operations, accuracies) of ``report --plot``."""
    from edgetrain.cli import plotting

    figure, axes = plotting._axes()
    monkeypatch.setattr(plotting, "_axes", lambda: (figure, axes))
    code, _, err = run(capsys, "report", *flags)
    assert (code, err) == (0, "")
    return axes[0].get_ylabel(), [line.get_data() for line in axes[0].lines]


def test_a_run_whose_baseline_is_only_begun_is_drawn_alone_and_the_report_says_how_to_go_on(
    inside, capsys, monkeypatch
):
    pytest.importorskip("matplotlib")
    killed(monkeypatch, capsys, "baseline.begin", *STREAM, "--baseline")
    assert (inside / "runs/fit-1/baseline").is_dir()
    assert len(drawn(monkeypatch, capsys, "runs/fit-1", "--plot")[1]) == 1
    told = run(capsys, "report", "runs/fit-1")[1]
    assert "\nthe baseline is unfinished; go on with: edgetrain resume runs/fit-1\n" in told
    assert json.loads(run(capsys, "report", "runs/fit-1", "--json")[1])["lacks"] == "baseline"
    assert run(capsys, "resume", "runs/fit-1", "--quiet")[0] == 0
    assert json.loads(run(capsys, "report", "runs/fit-1", "--json")[1])["lacks"] is None


def test_the_best_of_a_stream_that_is_compared_is_no_row_of_it(inside, capsys):
    assert run(capsys, *STREAM, "--baseline", "--quiet")[0] == 0
    found = json.loads(run(capsys, "report", "runs/fit-1", "--json")[1])
    assert found["epochs"][-1]["validation_accuracy"] is not None
    assert found["best"] is None


def test_runs_with_test_data_are_compared_on_these(inside, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    assert run(capsys, *STREAM, "--baseline", "--quiet")[0] == 0
    title, curves = drawn(monkeypatch, capsys, "runs/fit-1", "--plot")
    assert title == "accuracy on test or validation data"
    last = [open_run(f"runs/fit-1/{name}").read_metrics()[-1]["validation_accuracy"] for name in ("", "baseline")]
    assert [list(accuracy)[-1] for _, accuracy in curves] == last
    assert all(len(accuracy) > 3 for _, accuracy in curves)


def test_a_stream_is_not_drawn_against_a_run_over_epochs(inside, capsys):
    pytest.importorskip("matplotlib")
    for flags in ([*STREAM, "--predict-first"], STREAM, EPOCHS):
        assert run(capsys, *flags, "--quiet")[0] == 0
    for stream, other in (("fit-1", "fit-3"), ("fit-2", "fit-3")):
        code, _, err = run(capsys, "report", f"runs/{stream}", "--plot", "--against", f"runs/{other}")
        assert code == 2
        assert f"runs/{stream} ran on a stream, others over epochs, and not all have figures on test data" in err


def test_the_report_of_a_stream_has_windows_and_no_empty_columns(inside, capsys):
    for flags in (STREAM, [*STREAM, "--baseline"], EPOCHS):
        assert run(capsys, *flags, "--quiet")[0] == 0
    heads = [run(capsys, "report", f"runs/fit-{number}")[1].splitlines()[1].split() for number in (1, 2, 3)]
    assert heads[0] == ["window", "loss", "accuracy", "lr", "images/s"]
    assert heads[1] == ["window", "loss", "accuracy", "val.", "loss", "val.", "acc.", "lr", "images/s"]
    assert heads[2] == ["epoch", *heads[1][1:]]


@pytest.mark.parametrize(("flags", "title"), [
    ([], "accuracy of the instances trained on"), (["--predict-first"], "accuracy before learning"),
])  # fmt: skip
def test_the_axis_says_whose_accuracy_it_is_and_gaps_are_left_out(inside, capsys, monkeypatch, flags, title):
    pytest.importorskip("matplotlib")
    images = stored_data()
    np.savez("plain.npz", x=images["x_train"], y=images["y_train"])
    assert run(capsys, *STREAM, "--data", "plain.npz", "--window", "8", "--quiet", *flags)[0] == 0
    rows = open_run("runs/fit-1").read_metrics()
    without = sum(math.isnan(row["accuracy"]) for row in rows)
    assert (without > 0) == (not flags)
    label, curves = drawn(monkeypatch, capsys, "runs/fit-1", "--plot")
    assert label == title
    assert len(curves[0][1]) == len(rows) - without
    assert not np.isnan(curves[0][1]).any()


def test_accuracies_of_other_instances_are_not_compared(inside, capsys):
    pytest.importorskip("matplotlib")
    images = stored_data()
    np.savez("plain.npz", x=images["x_train"], y=images["y_train"])
    for flags in ([], ["--predict-first"]):
        assert run(capsys, *STREAM, "--data", "plain.npz", "--quiet", *flags)[0] == 0
    code, _, err = run(capsys, "report", "runs/fit-1", "--against", "runs/fit-2")
    assert code == 2
    assert "compare runs that all have --predict-first, or none" in err


# ---- what the last lines and the report tell


@pytest.mark.parametrize("flags", [STREAM[:-2], EPOCHS], ids=["stream", "epochs"])
def test_every_run_ends_with_accuracy_operations_and_time(inside, capsys, flags):
    code, out, _ = run(capsys, *flags, "--profile", "raspberrypi4", "--recipe", "dense", "--quiet")
    assert code == 0
    assert re.search(r"^operations done 100.0 % .*training time .*this is the dense run\n.*test accuracy", out, re.M)
    assert "more time" not in out


@pytest.mark.parametrize("flags", [STREAM[:-2], EPOCHS], ids=["stream", "epochs"])
def test_layers_of_a_sparse_run_are_told_at_its_end_and_in_the_report(inside, capsys, flags):
    code, out, _ = run(capsys, *flags, "--sparsity", "rigl:weights=0.9", "--quiet")
    assert code == 0
    report = run(capsys, "report", "runs/fit-1")[1]
    for text in (out, report):
        assert "layer " in text
        assert "conv1" in text
        assert "saved by sparse weights" in text
    table = out[out.index("layer ") : out.index("training time")]
    assert table in report


@pytest.mark.parametrize("flags", [STREAM, CHANNELS], ids=["stream", "epochs"])
def test_a_very_short_run_is_not_compared(inside, capsys, flags):
    images = stored_data()
    np.savez("few.npz", x=images["x_train"][:90], y=images["y_train"][:90])
    code, out, _ = run(capsys, *flags, "--data", "few.npz", "--epochs", "1", "--quiet")
    assert code == 0
    assert re.search(r"what dense training takes is unknown \(too few steps to compare: \d+ steps, a comp", out)
    assert "more time" not in out


@pytest.mark.parametrize(("entry", "command"), [
    ("fit, resume", [*EPOCHS, "--sparsity", "rigl:weights=0.9", "--baseline"]),
    ("fit --stream", [*STREAM, "--sparsity", "rigl:weights=0.9", "--baseline"]),
    ("savings", [*STREAM, "--baseline"]), ("savings", EPOCHS), ("report", ["report", "runs/fit-1"]),
    ("plan", ["plan", "lenet5"]),
], ids=["fit", "stream", "compared", "dense", "report", "plan"])  # fmt: skip
def test_all_keys_of_the_json_documents_are_listed(inside, capsys, entry, command):
    if command[0] == "report":
        assert run(capsys, *STREAM, "--quiet")[0] == 0
    found = json.loads(run(capsys, *command, "--json")[1])
    texts = dict(re.findall(r"^- ([^:]+): (.*(?:\n  .*)*)", output.__doc__, re.M))
    words = set(re.findall(r"\w+", texts[entry]))
    wanted = found["savings"].keys() | found["savings"]["dense"].keys() if entry == "savings" else found.keys()
    assert {key for key in wanted if not re.match("instances_|macs_|saved_", key)} <= words


# ---- after a step that was not finite


@pytest.mark.parametrize("flags", [STREAM, [*EPOCHS, "--schedule", "constant"]], ids=["stream", "epochs"])
def test_the_advice_after_a_failed_step_works(inside, capsys, flags):
    code, _, err = run(capsys, *flags, "--lr", "10", "--momentum", "0.99", "--quiet")
    assert code == 3
    assert ("go on with: edgetrain resume runs/fit-1. If that fails too: Start" in err) == ("--stream" in flags)
    anew, export = re.findall(r"edgetrain ((?:fit|export) [^,(]*)", err)
    assert anew == "fit --config runs/fit-1/config.toml --lr 1 "
    assert run(capsys, *anew.replace("--lr 1", "--lr 0.01").split(), "--quiet")[0] == 0
    assert run(capsys, *export.split())[0] == 0
    assert "and fit with --initial-weights runs/fit-1/start.onnx" in err
    assert (inside / "runs/fit-1/start.onnx").exists()


@pytest.mark.parametrize("flags", [STREAM, [*EPOCHS, "--schedule", "constant", "--filter", "random:rate=0.5"]],
                         ids=["stream", "epochs"])  # fmt: skip
def test_vain_attempts_to_go_on_lose_no_instances(inside, capsys, flags):
    assert run(capsys, *flags, "--lr", "10", "--momentum", "0.99", "--quiet")[0] == 3
    saved = Path("runs/fit-1/last.safetensors").read_bytes()
    for _ in range(2):
        code, _, err = run(capsys, "resume", "runs/fit-1", "--quiet")
        assert code == 3
        assert "Start a new run with a lower learning rate" in err
        assert re.search(r"edgetrain evaluate runs/fit-1 --data \S+\.npz\)", err)
        assert Path("runs/fit-1/last.safetensors").read_bytes() == saved


# ---- standard input, as the README explains it


def test_the_lines_of_the_readme_are_learned_from(inside, capsys, monkeypatch):
    text = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    lines = re.search(r"```json\n(.*?)```", text, re.S).group(1)
    graph = et.Graph("tiny", input_shape=(1, 2, 2))
    weight = graph.parameter("w", np.ones((2, 4), np.float32))
    flat = graph.add("Flatten", [graph.inputs[0]], axis=1)
    graph.set_outputs([graph.add("Gemm", [flat, weight, graph.parameter("b", np.zeros(2, np.float32))], transB=1)])
    et.Learner(graph).export_onnx("tiny.onnx")
    command = [sys.executable, "-m", "edgetrain", "fit", "--stream", "--data", "-", "--model", "tiny.onnx", "--json",
               "--batch-size", "2"]  # fmt: skip
    done = subprocess.run(command, input=lines, env=os.environ | {"PYTHONPATH": str(ROOT)}, text=True,
                          capture_output=True, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert (result["instances"], result["steps"]) == (2, 1)


def test_the_help_of_fit_explains_standard_input_and_methods(capsys):
    out = " ".join(run(capsys, "fit", "--help")[1].split())
    assert '{"pixels": [0, 17, 255], "y": 3}' in out
    assert "name:key=value,key=value" in out
    assert "docs/methods.md" in out
