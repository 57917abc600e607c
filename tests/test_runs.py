"""Run folders: numbering, configuration files, rows and events that survive a crash."""

from __future__ import annotations

import fcntl
import math
import os
import subprocess
import sys
import tomllib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import MISSING, fields

import pytest

from edgetrain.errors import DataError, UsageError
from edgetrain.history import EpochRecord
from edgetrain.runs import METRICS, Run, create_run, open_run, runs_released, to_toml


@pytest.fixture(autouse=True)
def released():
    with runs_released():
        yield


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
    for name in ("fit-7", "fit-old", "fit-8.bak", "fit-²", "fitter-9"):
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
        "text": 'quote " backslash \\ tab \t newline \n umlaut ü camera 📷 bell \x07 delete \x7f',
        "numbers": [1, -2, 3], "ratio": 0.1, "tiny": 1e-08, "large": 1e22, "flag": True, "off": False, "empty": "",
        "section": {"key with space": 1, "deep.er": {"x": 1.5}, "größe 📷": 2, "größe": 3},
        "no_values": {"inner": {"a": "b"}},
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


def test_the_account_that_was_written_last_counts(tmp_path):
    run = Run(tmp_path)
    run.log("finished", whole_seconds=1.0)
    for number in (1, 2):
        run.log("account", savings=number, other=number)
    assert run.account() == {"savings": 2}
    run.log("resumed")
    assert run.account() == {}


@pytest.mark.parametrize(
    ("events", "status"),
    [("started", "unfinished"), ("started finished account", "finished"), ("started failed", "failed"),
     ("started interrupted saved", "interrupted"), ("started interrupted resumed epoch", "unfinished")],
)  # fmt: skip
def test_the_last_event_that_says_how_a_run_stands_counts(tmp_path, events, status):
    run = Run(tmp_path)
    for event in events.split():
        run.log(event)
    assert run.status() == status


@pytest.mark.parametrize(("comparison", "lacks"), [("", True), ("wanted", True), ("baseline", False)])
def test_a_dense_twin_has_no_account_of_its_own(tmp_path, comparison, lacks):
    run = Run(tmp_path)
    run.log("started", comparison=comparison)
    run.log("finished", whole_seconds=1.0)
    assert run.lacks_account() == lacks


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


def test_config_with_more_than_tables_is_one_error(tmp_path):
    run = create_run(tmp_path, "fit")
    run.config_file.write_text("training = 3")
    with pytest.raises(UsageError, match=r"config.toml: key 'training' is 3, expected a table such as"):
        run.read_config()


# ---- one process at a time

LOCK = "from edgetrain.runs import Run; from pathlib import Path; import sys; Run(Path(sys.argv[1])).lock()"
HOLD = LOCK + "; print(flush=True); sys.stdin.read()"


def locked_by_another(path) -> bool:
    done = subprocess.run([sys.executable, "-c", LOCK, str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0 or "another process is using it" in done.stderr, done.stderr
    return done.returncode != 0


def test_a_new_run_is_locked_until_it_is_released(tmp_path):
    with runs_released():
        run = create_run(tmp_path, "fit")
        assert locked_by_another(run.path)
    assert not locked_by_another(run.path)


def test_a_lock_goes_with_its_process_and_leaves_no_file(tmp_path):
    run = Run(tmp_path)
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        opened = len(os.listdir("/proc/self/fd"))
        with pytest.raises(UsageError, match=r"another process is using it; wait until it ends or stop it, then try"):
            run.lock()
        assert len(os.listdir("/proc/self/fd")) == opened
        other.kill()
    run.lock()
    assert [file.name for file in tmp_path.iterdir()] == ["events.jsonl"]


def test_a_run_that_is_locked_again_keeps_its_events(tmp_path):
    with runs_released():
        run = create_run(tmp_path, "fit")
        run.log("started")
    run.lock()
    assert [event["event"] for event in run.read_events()] == ["started"]


def test_a_folder_that_cannot_be_written_is_one_error(tmp_path):
    with pytest.raises(UsageError, match=r"events.jsonl: cannot be written .*choose another place"):
        Run(tmp_path / "gone").lock()


def test_a_file_system_without_locks_trains_all_the_same(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    assert create_run(tmp_path, "fit").path.name == "fit-1"


# ---- damage


def test_rows_and_events_of_zeros_are_skipped(tmp_path):
    run = create_run(tmp_path, "fit")
    run.add_metrics(record(1))
    run.log("started")
    for file in (run.metrics_file, run.events_file):
        with file.open("ab") as opened:
            opened.write(bytes(40) + b"\n")
    run.add_metrics(record(2))
    run.log("finished")
    assert [row["epoch"] for row in run.read_metrics()] == [1, 2]
    assert run.status() == "finished"
    assert run.keep_metrics(200) == 1
    assert [row["epoch"] for row in run.read_metrics()] == [1]


@pytest.mark.parametrize("damage", [b"\xff\xfe", b'{"event": "fin\xff"}', b'{"event": ["finished"]}', b"3"])
def test_damaged_events_are_skipped(tmp_path, damage):
    run = create_run(tmp_path, "fit")
    run.log("interrupted")
    with run.events_file.open("ab") as file:
        file.write(damage + b"\n")
    assert run.status() == "interrupted"


@pytest.mark.parametrize("text", ["[1]", "{", ""])
def test_facts_that_are_no_table_are_none(tmp_path, text):
    Run(tmp_path).environment_file.write_text(text)
    assert Run(tmp_path).read_environment() == {}


def test_a_table_of_an_earlier_version_lacks_the_columns_that_came_later(tmp_path):
    columns = [field.name for field in fields(EpochRecord) if field.default is MISSING]
    Run(tmp_path).metrics_file.write_text(f"{','.join(columns)}\n{','.join(['1'] * len(columns))}\n")
    assert Run(tmp_path).read_metrics() == [dict.fromkeys(columns, 1.0)]


@pytest.mark.parametrize("cell", ["abc", "", "\udcff"], ids=["text", "nothing", "no_utf8"])
def test_a_cell_that_is_no_number_is_one_error(tmp_path, cell):
    run = create_run(tmp_path, "fit")
    row = record(1)
    run.add_metrics(row)
    text = run.metrics_file.read_text().replace(repr(row.seconds), cell)
    run.metrics_file.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(DataError, match=r"metrics.csv: 'seconds' is '.*' in row '1', expected a number; mend that row"):
        run.read_metrics()


def test_a_table_without_its_header_is_one_error(tmp_path):
    run = create_run(tmp_path, "fit")
    run.metrics_file.write_text("1,2,3\n")
    with pytest.raises(DataError, match=r"metrics.csv: the first line lacks the column 'epoch'; expected epoch,steps"):
        run.read_metrics()


def test_rows_that_have_no_number_are_not_kept(tmp_path):
    run = create_run(tmp_path, "fit")
    run.add_metrics(record(1))
    with run.metrics_file.open("a") as file:
        file.write("oops,1\n")
    run.add_metrics(record(2))
    assert run.keep_metrics(1000) == 2
    assert [row["epoch"] for row in run.read_metrics()] == [1, 2]
