"""Run folders: numbering, configuration files, rows and events that survive a crash."""

from __future__ import annotations

import math
import tomllib
from concurrent.futures import ThreadPoolExecutor

import pytest

from edgetrain.errors import UsageError
from edgetrain.history import EpochRecord
from edgetrain.runs import METRICS, create_run, open_run, to_toml


def record(epoch: int, **changes) -> EpochRecord:
    values = {
        "epoch": epoch, "steps": 10 * epoch, "loss": 1 / 3, "accuracy": 0.5, "validation_loss": 0.1 + 0.2,
        "validation_accuracy": 0.75, "lr": 0.05, "seconds": 1.5, "images_per_second": 100.0, "instances_seen": 150,
        "instances_trained": 150, "macs_dense": 1000, "macs_done": 1000,
    }  # fmt: skip
    return EpochRecord(**(values | changes))


def test_numbers_count_up_per_command(tmp_path):
    names = [create_run(tmp_path, command).path.name for command in ("fit", "fit", "bench", "fit")]
    assert names == ["fit-1", "fit-2", "bench-1", "fit-3"]


def test_number_follows_the_highest_and_ignores_other_names(tmp_path):
    for name in ("fit-7", "fit-old", "fit-8.bak", "fitter-9"):
        (tmp_path / name).mkdir()
    assert create_run(tmp_path, "fit").path.name == "fit-8"


def test_simultaneous_runs_get_different_folders(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        paths = list(pool.map(lambda _: create_run(tmp_path / "new" / "runs", "fit").path, range(24)))
    assert len(set(paths)) == 24


def test_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"file: no run folder can be made .*choose another folder"):
        create_run(tmp_path / "file", "fit")


def test_toml_round_trip():
    table = {
        "text": 'quote " backslash \\ tab \t newline \n umlaut ü bell \x07 delete \x7f',
        "numbers": [1, -2, 3], "ratio": 0.1, "tiny": 1e-08, "large": 1e22, "flag": True, "off": False, "empty": "",
        "section": {"key with space": 1, "deep.er": {"x": 1.5}}, "no_values": {"inner": {"a": "b"}},
    }  # fmt: skip
    assert tomllib.loads(to_toml(table)) == table


def test_toml_infinity_and_none():
    read = tomllib.loads(to_toml({"limit": math.inf, "absent": None}))
    assert read == {"limit": math.inf}


def test_toml_refuses_other_types():
    with pytest.raises(UsageError, match="'when' is of type complex, which a configuration file cannot hold"):
        to_toml({"when": 1j})


def test_config_and_environment_round_trip(tmp_path):
    run = create_run(tmp_path, "fit")
    run.write_config({"training": {"lr": 0.05, "clip_norm": None}})
    run.write_environment({"host": {"cores": 4}})
    again = open_run(run.path)
    assert again.read_config() == {"training": {"lr": 0.05}}
    assert again.read_environment() == {"host": {"cores": 4}}


def test_metrics_have_a_header_and_exact_numbers(tmp_path):
    run = create_run(tmp_path, "fit")
    run.add_metrics(record(1))
    run.add_metrics(record(2, validation_loss=None, validation_accuracy=None))
    assert run.metrics_file.read_text().splitlines()[0] == ",".join(METRICS)
    first, second = run.read_metrics()
    assert (first["loss"], first["validation_loss"]) == (1 / 3, 0.1 + 0.2)
    assert second["validation_accuracy"] is None


def test_row_that_was_cut_off_is_skipped_and_does_not_spoil_the_next(tmp_path):
    run = create_run(tmp_path, "fit")
    run.add_metrics(record(1))
    with run.metrics_file.open("a") as file:
        file.write("2,20,0.3")
    assert [row["epoch"] for row in run.read_metrics()] == [1]
    run.add_metrics(record(2))
    assert [row["epoch"] for row in run.read_metrics()] == [1, 2]
    run.write_metrics([record(1)])
    assert [row["epoch"] for row in run.read_metrics()] == [1]


def test_event_that_was_cut_off_is_skipped_and_does_not_spoil_the_next(tmp_path):
    run = create_run(tmp_path, "fit")
    run.log("started", seed=1)
    with run.events_file.open("a") as file:
        file.write('{"time": "2026-')
    run.log("epoch", epoch=1)
    events = run.read_events()
    assert [event["event"] for event in events] == ["started", "epoch"]
    assert events[0]["seed"] == 1
    assert events[0]["time"].endswith("+00:00")


def test_empty_run_reads_as_empty(tmp_path):
    run = create_run(tmp_path, "fit")
    assert (run.read_metrics(), run.read_events(), run.read_environment()) == ([], [], {})


def test_open_run_names_what_is_wrong(tmp_path):
    with pytest.raises(UsageError, match="no such run folder"):
        open_run(tmp_path / "missing")
    with pytest.raises(UsageError, match=r"not a run folder, config.toml is missing"):
        open_run(tmp_path)


def test_damaged_config_is_one_error(tmp_path):
    run = create_run(tmp_path, "fit")
    run.config_file.write_text("epochs = = 3")
    with pytest.raises(UsageError, match=r"config.toml: cannot be read as TOML"):
        run.read_config()
