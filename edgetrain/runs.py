"""Run folders: one folder per run with its configuration, measurements and checkpoints.

A run folder holds

- ``config.toml``: the effective configuration, every value that the run really used
- ``environment.json``: the machine, the versions, and what the data looked like
- ``metrics.csv``: one row per epoch, or per window of a stream, columns as in ``METRICS``
- ``events.jsonl``: what happened when, one JSON object per line with ``time`` (UTC) and ``event``
- ``last.safetensors``, ``best.safetensors``: checkpoints; best by validation accuracy
- ``model.onnx``: the trained network
- ``baseline/``, ``accuracy.svg``: the run folder of the dense twin, and both in one plot, where that was asked for

Rows and lines are synced one by one; a reader skips a line that a crash cut off. Who writes a run holds a lock on
its ``events.jsonl``, the one file that is never replaced; the system takes the lock back when the process ends.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from datetime import UTC, datetime
from itertools import accumulate
from pathlib import Path
from typing import Any

from edgetrain.checkpoint import write_file
from edgetrain.errors import DataError, UsageError
from edgetrain.files import not_written
from edgetrain.history import EpochRecord

METRICS = tuple(item.name for item in fields(EpochRecord))
# Columns that tables of earlier versions have too, and those whose cells may be empty.
_REQUIRED = tuple(item.name for item in fields(EpochRecord) if item.default is MISSING)
_MAY_BE_EMPTY = ("validation_loss", "validation_accuracy")
# Events that say how a run stands, and what ``report`` calls that.
_STATUS = {"finished": "finished", "interrupted": "interrupted", "failed": "failed", "started": "unfinished",
           "resumed": "unfinished"}  # fmt: skip
# Events that tell how long the process has worked on the run.
_TIMED = ("saved", "epoch", "finished", "interrupted", "failed")
# Open files, each with the lock of a run that this process writes.
_locks: list[int] = []


@dataclass(frozen=True)
class Run:
    """A run folder; the properties name its files.

    Attributes:
        path: of the folder.
    """

    path: Path

    @property
    def config_file(self) -> Path:
        """The effective configuration."""
        return self.path / "config.toml"

    @property
    def environment_file(self) -> Path:
        """Machine, versions and data."""
        return self.path / "environment.json"

    @property
    def metrics_file(self) -> Path:
        """One row per epoch."""
        return self.path / "metrics.csv"

    @property
    def events_file(self) -> Path:
        """What happened when."""
        return self.path / "events.jsonl"

    @property
    def last(self) -> Path:
        """The newest checkpoint."""
        return self.path / "last.safetensors"

    @property
    def best(self) -> Path:
        """The checkpoint of the best epoch."""
        return self.path / "best.safetensors"

    @property
    def model(self) -> Path:
        """The trained network as ONNX."""
        return self.path / "model.onnx"

    @property
    def plot(self) -> Path:
        """Accuracy over operations and time, beside that of the dense twin."""
        return self.path / "accuracy.svg"

    @property
    def baseline(self) -> Run:
        """The dense twin of the run, in a folder of its own."""
        return Run(self.path / "baseline")

    def lock(self) -> None:
        """Keep other processes from writing this run, until ``runs_released`` ends or this process does.

        Raises:
            UsageError: another process writes it, or the folder cannot be written.
        """
        try:
            handle = os.open(self.events_file, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        except OSError as error:
            raise UsageError(not_written(self.events_file, error)) from error
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            message = f"{self.path}: another process is using it; wait until it ends or stop it, then try again"
            raise UsageError(message) from None
        except OSError:
            # A file system without locks is no reason not to train.
            os.close(handle)
        else:
            _locks.append(handle)

    def write_config(self, config: Mapping[str, Any]) -> None:
        """Write the effective configuration; ``None`` values are left out, as TOML has none."""
        write_file(self.config_file, to_toml(config).encode())

    def read_config(self) -> dict[str, Any]:
        """Return the effective configuration.

        Raises:
            UsageError: the file is missing, not TOML, or has more than tables.
        """
        return read_sections(self.config_file)

    def write_environment(self, facts: Mapping[str, Any]) -> None:
        """Write what the run should remember about machine and data."""
        write_file(self.environment_file, (json.dumps(facts, indent=2) + "\n").encode())

    def read_environment(self) -> dict[str, Any]:
        """Return what ``write_environment`` wrote; empty when it is missing or damaged."""
        try:
            table = json.loads(self.environment_file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return table if isinstance(table, dict) else {}

    def add_metrics(self, *records: EpochRecord) -> None:
        """Append the rows of epochs and sync them together."""
        if not self.metrics_file.exists():
            self.write_metrics(())
        if records:
            _append(self.metrics_file, "".join(_row(_cells(record)) for record in records))

    def write_metrics(self, records: Iterable[EpochRecord]) -> None:
        """Replace all rows: on resuming, the checkpoint knows which epochs count."""
        rows = [list(METRICS), *map(_cells, records)]
        write_file(self.metrics_file, "".join(map(_row, rows)).encode())

    def keep_metrics(self, instances: int) -> int:
        """Keep the rows about the first ``instances``: on resuming a stream, those that the checkpoint knows.

        Returns:
            How many rows these are; damaged ones are not among them.
        """
        rows = [line for line in _whole_lines(self.metrics_file)[1:] if _instances_of(line)]
        seen = accumulate(map(_instances_of, rows))
        known = [row + "\n" for row, number in zip(rows, seen, strict=True) if number <= instances]
        write_file(self.metrics_file, "".join([_row(list(METRICS)), *known]).encode())
        return len(known)

    def read_metrics(self) -> list[dict[str, float | None]]:
        """Return the rows as numbers, ``None`` for an empty cell; a row that a crash cut off is skipped.

        Raises:
            DataError: the header lacks a column, or a cell is not a number.
        """
        lines = _whole_lines(self.metrics_file)
        if not lines:
            return []
        names = lines[0].split(",")
        missing = [name for name in _REQUIRED if name not in names]
        if missing:
            raise DataError(
                f"{self.metrics_file}: the first line lacks the column '{missing[0]}'; expected {','.join(METRICS)}"
            )
        rows = [line.split(",") for line in lines[1:]]
        return [self._numbers(names, cells) for cells in rows if len(cells) == len(names)]

    def _numbers(self, names: list[str], cells: list[str]) -> dict[str, float | None]:
        row: dict[str, float | None] = {}
        for name, cell in zip(names, cells, strict=True):
            try:
                row[name] = None if name in _MAY_BE_EMPTY and not cell else float(cell)
            except ValueError:
                raise DataError(
                    f"{self.metrics_file}: '{name}' is {cell!r} in row {cells[0]!r}, expected a number; mend that row "
                    "or take it out"
                ) from None
        return row

    def log(self, event: str, **details: Any) -> None:
        """Append one event with the present time."""
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        _append(self.events_file, json.dumps({"time": now, "event": event, **details}) + "\n")

    def read_events(self) -> list[dict[str, Any]]:
        """Return all events, oldest first; a line that was cut off or damaged is skipped."""
        try:
            lines = self.events_file.read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            return []
        return [event for event in map(_parse_event, lines) if event is not None]

    def whole_seconds(self) -> float | None:
        """Return the wall time of all processes that worked on the run, ``None`` where earlier versions noted none.

        Of a process that was killed, that is up to its last checkpoint: what came after it is done again.
        """
        parts: list[list[float | None]] = [[]]
        for event in self.read_events():
            if event["event"] in ("started", "resumed"):
                parts.append([])
            elif event["event"] in _TIMED:
                parts[-1].append(event.get("whole_seconds"))
        known = [[seconds for seconds in part if seconds is not None] for part in parts]
        if any(part and not times for part, times in zip(parts, known, strict=True)):
            return None
        return sum(max(times, default=0.0) for times in known)

    def comparison(self) -> str:
        """Return "wanted" if the dense twin was asked for, "baseline" if this run is such a twin, else ""."""
        started = [event for event in self.read_events() if event["event"] == "started"]
        return str(started[0].get("comparison", "")) if started else ""

    def account(self) -> dict[str, Any]:
        """Return what a finished run did: ``savings``, perhaps ``layers`` and ``topology``; else empty."""
        found = [event for event in self._ending() if event["event"] == "account"]
        known = found[-1] if found else {}
        return {key: known[key] for key in ("savings", "layers", "topology") if key in known}

    def lacks_account(self) -> bool:
        """Tell whether a finished run was cut off before its account, which is written last of all.

        Runs of earlier versions may have none; their endings do not tell the time of the whole run either. Dense twins
        have none: they are a part of another run's.
        """
        ending = self._ending()
        if not ending or "whole_seconds" not in ending[0] or self.comparison() == "baseline":
            return False
        return not self.account()

    def is_done(self) -> bool:
        """Tell whether nothing is left to write: the run's own files, its dense twin if asked for, and its account."""
        return self.status() == "finished" and self.model.exists() and not self.lacks_account()

    def _ending(self) -> list[dict[str, Any]]:
        """Return the events from the last "finished" on; none of a run that was gone on with since."""
        events = self.read_events()
        ends = [index for index, event in enumerate(events) if event["event"] == "finished"]
        return events[ends[-1] :] if ends and self.status() == "finished" else []

    def status(self) -> str:
        """Return "finished", "interrupted", "failed", or "unfinished" for a run that was killed or is still going."""
        known = [event["event"] for event in self.read_events() if event["event"] in _STATUS]
        return _STATUS[known[-1]] if known else "unfinished"


def create_run(root: str | os.PathLike[str], command: str) -> Run:
    """Make the folder ``<root>/<command>-<n>`` with the number after the highest there is, and lock the run.

    Two processes at the same time get two folders.

    Raises:
        UsageError: the folder cannot be made.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     [create_run(folder, "fit").path.name for _ in range(2)]
        ['fit-1', 'fit-2']
    """
    folder = Path(root)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        number = _highest_number(folder, command) + 1
        while True:
            path = folder / f"{command}-{number}"
            try:
                path.mkdir()
            except FileExistsError:
                number += 1
            else:
                break
    except OSError as error:
        raise UsageError(f"{folder}: no run folder can be made ({error.strerror}); choose another folder") from error
    run = Run(path)
    run.lock()
    return run


def open_run(path: str | os.PathLike[str]) -> Run:
    """Return an existing run.

    Raises:
        UsageError: there is no such folder, or it is not a run folder.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such run folder; runs are folders such as runs/fit-1")
    run = Run(folder)
    if not run.config_file.exists():
        raise UsageError(f"{folder}: not a run folder, config.toml is missing; runs are folders such as runs/fit-1")
    return run


@contextlib.contextmanager
def runs_released() -> Iterator[None]:
    """At the end, give back the locks of all runs that this process writes."""
    try:
        yield
    finally:
        while _locks:
            os.close(_locks.pop())


def to_toml(table: Mapping[str, Any]) -> str:
    """Return TOML text of a table of strings, numbers, booleans, lists and nested tables.

    Raises:
        UsageError: a value of another type.

    Example:
        >>> print(to_toml({"epochs": 8, "data": {"source": "embedded"}}), end="")
        epochs = 8
        <BLANKLINE>
        [data]
        source = "embedded"
    """
    return "\n".join(_toml_sections(table, ""))


def read_toml(path: Path) -> dict[str, Any]:
    """Return the content of a TOML file.

    Raises:
        UsageError: the file is missing or not TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: cannot be read as TOML: {error}") from error


def read_sections(path: Path) -> dict[str, Any]:
    """Return the content of a TOML file that has tables alone, as ``config.toml`` has.

    Raises:
        UsageError: the file is missing, not TOML, or has something outside of tables.
    """
    table = read_toml(path)
    for key, value in table.items():
        if not isinstance(value, dict):
            raise UsageError(f"{path}: key '{key}' is {value!r}, expected a table such as [training] with keys in it")
    return table


def _toml_sections(table: Mapping[str, Any], prefix: str) -> list[str]:
    plain = {key: value for key, value in table.items() if value is not None and not isinstance(value, Mapping)}
    lines = "".join(f"{_toml_key(key)} = {_toml_value(key, value)}\n" for key, value in plain.items())
    header = f"[{prefix}]\n" if prefix and lines else ""
    sections = [header + lines] if lines else []
    for key, value in table.items():
        if isinstance(value, Mapping):
            sections += _toml_sections(value, f"{prefix}.{_toml_key(key)}" if prefix else _toml_key(key))
    return sections


def _toml_key(key: str) -> str:
    bare = key.isascii() and key.replace("_", "a").replace("-", "a").isalnum()
    return key if bare else json.dumps(key, ensure_ascii=False)


def _toml_value(key: str, value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        # TOML wants a point or an exponent with digits around it; repr of a float always has one of them.
        return repr(value)
    if isinstance(value, int):
        return str(value)
    if isinstance(value, str):
        # A JSON string is a TOML basic string, save for the delete character.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_toml_value(key, item) for item in value) + "]"
    raise UsageError(f"'{key}' is of type {type(value).__name__}, which a configuration file cannot hold")


def _highest_number(folder: Path, command: str) -> int:
    endings = [path.name[len(command) + 1 :] for path in folder.glob(f"{command}-*")]
    return max((int(ending) for ending in endings if ending.isdecimal()), default=0)


def _append(path: Path, line: str) -> None:
    """Append one line and sync it; a line that a crash cut off before is ended first."""
    try:
        with path.open("a+b", buffering=0) as file:
            end = file.tell()
            content = (b"\n" if end and _last_byte(file) != b"\n" else b"") + line.encode()
            try:
                while content:
                    content = content[file.write(content) :]
                os.fsync(file.fileno())
            except OSError:  # no half of a line stays
                with contextlib.suppress(OSError):
                    file.truncate(end)
                raise
    except OSError as error:
        raise UsageError(not_written(path, error)) from error


def _whole_lines(path: Path) -> list[str]:
    """Return the lines of a file without what a crash left: a last line without its end, and zeros."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    return [line for line in text.split("\n")[:-1] if "\0" not in line]


def _instances_of(line: str) -> int:
    """Return the instances that a row is about, 0 if it is damaged."""
    cells = line.split(",")
    try:
        return int(cells[METRICS.index("instances_seen")]) if len(cells) == len(METRICS) else 0
    except ValueError:
        return 0


def _last_byte(file: io.FileIO) -> bytes:
    file.seek(-1, os.SEEK_END)
    return file.read(1)


def _cells(record: EpochRecord) -> list[str]:
    return ["" if value is None else repr(value) for value in asdict(record).values()]


def _row(cells: list[str]) -> str:
    return ",".join(cells) + "\n"


def _parse_event(line: str) -> dict[str, Any] | None:
    try:
        event = json.loads(line)
    except ValueError:
        return None
    return event if isinstance(event, dict) and isinstance(event.get("event"), str) else None
