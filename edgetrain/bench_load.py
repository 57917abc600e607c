"""Who else computes on this machine while we time: a busy machine makes timings worthless, so results say so."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

_BUSY_CORES = 0.2  # of one core, as a mean over the time watched


@dataclass(frozen=True)
class Load:
    """What others took of the processors, in cores, as means over the time watched.

    Attributes:
        others: processes that are neither this one nor its ended children.
        stolen: what a virtual machine wanted and its host gave to somebody else.
        names: of processes that took more than a fifth of a core, largest first.
    """

    others: float
    stolen: float
    names: tuple[str, ...] = ()

    @property
    def busy(self) -> bool:
        """Whether timings taken meanwhile cannot be trusted."""
        return self.others > _BUSY_CORES or self.stolen > _BUSY_CORES


@dataclass(frozen=True)
class _Ticks:
    """Seconds of processor time used so far."""

    clock: float
    everybody: float
    stolen: float
    own: float
    processes: dict[int, tuple[str, float]]


class Watch:
    """Watches from its construction on.

    Args:
        proc: the folder ``/proc``.
    """

    def __init__(self, proc: Path = Path("/proc")) -> None:
        self._proc = proc
        self._start = _read(proc)

    def load(self) -> Load | None:
        """Return the load since the start, or ``None`` where the system does not tell.

        Children count as our own only when they have ended and were waited for.
        """
        end = _read(self._proc)
        if self._start is None or end is None:
            return None
        seconds = max(end.clock - self._start.clock, 1e-9)
        everybody, own = end.everybody - self._start.everybody, end.own - self._start.own
        stolen = (end.stolen - self._start.stolen) / seconds
        return Load(round(max(0.0, everybody - own) / seconds, 3), round(stolen, 3), self._names(end, seconds))

    def _names(self, end: _Ticks, seconds: float) -> tuple[str, ...]:
        before = self._start.processes if self._start else {}
        used = {
            name: spent - before.get(number, ("", 0.0))[1]
            for number, (name, spent) in end.processes.items()
            if number != os.getpid()
        }
        loud = {name: share for name, share in used.items() if share > _BUSY_CORES * seconds}
        return tuple(sorted(loud, key=lambda name: -loud[name]))


def _read(proc: Path) -> _Ticks | None:
    per_second = os.sysconf("SC_CLK_TCK")
    try:
        numbers = [int(word) / per_second for word in (proc / "stat").read_text().splitlines()[0].split()[1:]]
    except (OSError, ValueError, IndexError):
        return None
    user, nice, system, _, _, irq, softirq, stolen = (numbers + [0.0] * 8)[:8]
    return _Ticks(
        time.perf_counter(), user + nice + system + irq + softirq, stolen, sum(os.times()[:4]),
        _processes(proc, per_second),
    )  # fmt: skip


def _processes(proc: Path, per_second: int) -> dict[int, tuple[str, float]]:
    found = {}
    for folder in proc.glob("[0-9]*"):
        try:
            head, _, tail = (folder / "stat").read_text().rpartition(")")
            fields = tail.split()
            found[int(folder.name)] = (head.partition("(")[2], (int(fields[11]) + int(fields[12])) / per_second)
        except (OSError, ValueError, IndexError):
            continue  # it ended meanwhile
    return found
