"""What this machine tells about itself in ``/proc`` and ``/sys``.

Standard library only. Knows files, not device profiles; every reader takes the root folder, so tests
use a folder of their own. A file that is missing or unreadable is no error: its fact is then unknown.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Host", "host_facts", "processor", "read_host"]

Finding = tuple[Any, str]

# Best first: word in /proc/cpuinfo, name in a profile, float32 lanes of one register.
_SIMD = (
    ("avx512f", "avx512", 16),
    ("avx2", "avx2", 8),
    ("asimd", "neon", 4),
    ("neon", "neon", 4),
    ("sse2", "sse2", 4),
)
_BASELINE = {"aarch64": ("neon", 4), "x86_64": ("sse2", 4)}
_PACKAGES = ("edgetrain", "numpy", "numba", "llvmlite", "onnx", "onnxruntime")
_THROTTLE_BITS = {0: "under-voltage", 1: "frequency capped", 2: "throttled", 3: "soft temperature limit"}
_SYS_CPU = "sys/devices/system/cpu"


@dataclass(frozen=True, kw_only=True)
class Host:
    """The machine we run on. ``cpus`` are the usable fast cores, ``little_cpus`` the usable slower ones."""

    root: Path
    machine: str
    board: str
    cpu_name: str
    cpus: tuple[int, ...]
    little_cpus: tuple[int, ...]
    words: frozenset[str]

    def findings(self) -> dict[str, Finding]:
        """Return what could be detected: profile key -> (value, origin)."""
        simd, lanes, simd_origin = self._simd()
        found: dict[str, Finding] = {
            "cores": (len(self.cpus), "detected: CPU affinity of the process"),
            "little_cores": (len(self.little_cpus), f"detected: {_SYS_CPU}/cpu*/cpufreq/cpuinfo_max_freq"),
            "simd": (simd, simd_origin),
            "simd_float32_lanes": (lanes, simd_origin),
            "ram_mib": self._ram(),
            **dict(self._caches()),
        }
        clock = _clock_mhz(self.root, self.cpus[0])
        return found | ({"clock_mhz": clock} if clock else {})

    def _simd(self) -> tuple[str, int, str]:
        for word, name, lanes in _SIMD:
            if word in self.words:
                return name, lanes, f"detected: proc/cpuinfo, {word}"
        name, lanes = _BASELINE.get(self.machine, ("scalar", 1))
        return name, lanes, f"assumed: baseline of {self.machine}"

    def _ram(self) -> Finding:
        found = [(_meminfo_mib(self.root), "detected: proc/meminfo"), *_cgroup_limits(self.root)]
        return min(found, key=lambda finding: finding[0])

    def _caches(self) -> Iterator[tuple[str, Finding]]:
        for folder in sorted((self.root / _SYS_CPU / f"cpu{self.cpus[0]}/cache").glob("index*")):
            size, level = _kib(_read(folder / "size")), _read(folder / "level")
            key = {"1": "l1d_kib", "2": "l2_kib", "3": "l3_kib"}.get(level)
            if size is None or key is None or _read(folder / "type") == "Instruction":
                continue
            origin = f"detected: {folder.relative_to(self.root)}"
            yield key, (size, origin)
            if level == "2":
                yield "l2_shared_by_cores", (len(_cpu_list(_read(folder / "shared_cpu_list"))) or 1, origin)


def read_host(root: Path, cpus: Collection[int] | None = None, machine: str | None = None) -> Host:
    """Read the machine below ``root``; ``cpus`` and ``machine`` replace what the process itself sees."""
    usable = sorted(cpus if cpus is not None else _affinity())
    clocks = {cpu: (_clock_mhz(root, cpu) or (1.0, ""))[0] for cpu in usable}
    # Within 10 % of the fastest is fast: equal cores may differ by a speed bin, little ones by a quarter.
    fast = [cpu for cpu in usable if clocks[cpu] >= 0.9 * max(clocks.values())]
    cpuinfo = list(_cpuinfo(root))
    return Host(
        root=root,
        machine=_architecture(machine or _uname_machine()),
        board=_read(root / "proc/device-tree/model"),
        cpu_name=next((value for key, value in cpuinfo if key == "model name"), ""),
        cpus=tuple(sorted(fast, key=lambda cpu: -clocks[cpu])),
        little_cpus=tuple(cpu for cpu in usable if cpu not in fast),
        words=frozenset(
            word for key, value in cpuinfo if key in ("flags", "Features") for word in value.split()
        ),
    )


def processor(root: Path = Path("/")) -> list[str]:
    """Return what machine code depends on: architecture, and which kinds of processor there are, with their features.

    >>> processor() == sorted(processor())
    True
    """
    keys = ("model name", "cpu family", "model", "stepping", "flags", "CPU implementer", "CPU part", "CPU variant",
            "Features")  # fmt: skip
    return sorted({_uname_machine(), *(f"{key}: {value}" for key, value in _cpuinfo(root) if key in keys)})


def host_facts(root: str | os.PathLike[str] = "/") -> dict[str, Any]:
    """Return what a run should record about its machine: JSON-able, None for what cannot be read.

    Units are in the keys (``ram_mib``, ``temperature_c``, ...); ``packages`` maps names to versions, read
    from metadata without importing anything; ``throttled`` lists what slows the board down now. Nothing in
    it names the machine or its user.

    >>> host_facts()["cores"] >= 1
    True
    """
    host = read_host(Path(root))
    folder = host.root / _SYS_CPU / f"cpu{host.cpus[0]}/cpufreq"
    return {
        "architecture": host.machine,
        "board": host.board or None,
        "cpu": host.cpu_name or None,
        "cores": len(host.cpus) + len(host.little_cpus),
        "simd": host._simd()[0],
        "kernel": _read(host.root / "proc/sys/kernel/osrelease") or None,
        "python": sys.version.split()[0],
        "packages": {name: _package_version(name) for name in _PACKAGES},
        "ram_mib": host._ram()[0],
        "ram_available_mib": _meminfo_mib(host.root, "MemAvailable") or None,
        "clock_mhz": _scaled(_read(folder / "scaling_cur_freq"), 1000),
        "governor": _read(folder / "scaling_governor") or None,
        "temperature_c": _scaled(_read(host.root / "sys/class/thermal/thermal_zone0/temp"), 1000),
        "throttled": _throttled(host.root),
    }


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip("\0 \n\t")
    except OSError:
        return ""


def _scaled(text: str, divisor: float) -> float | None:
    try:
        return float(text) / divisor
    except ValueError:
        return None


def _affinity() -> Collection[int]:
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return range(os.cpu_count() or 1)


def _uname_machine() -> str:
    import platform

    return platform.machine()


def _architecture(machine: str) -> str:
    """Return the Linux name of an architecture that other systems spell differently."""
    return {"arm64": "aarch64", "amd64": "x86_64"}.get(machine.lower(), machine.lower())


def _cpuinfo(root: Path) -> Iterator[tuple[str, str]]:
    for line in _read(root / "proc/cpuinfo").splitlines():
        key, _, value = line.partition(":")
        yield key.strip(), value.strip()


def _clock_mhz(root: Path, cpu: int) -> tuple[float, str] | None:
    """Return the highest clock of one CPU; virtual machines only tell the present one."""
    path = f"{_SYS_CPU}/cpu{cpu}/cpufreq/cpuinfo_max_freq"
    highest = _scaled(_read(root / path), 1000)
    if highest is not None:
        return highest, f"detected: {path}"
    present = [_scaled(value, 1) for key, value in _cpuinfo(root) if key == "cpu MHz"]
    known = [clock for clock in present if clock is not None]
    return (max(known), "detected: proc/cpuinfo, cpu MHz now") if known else None


def _meminfo_mib(root: Path, key: str = "MemTotal") -> int:
    for line in _read(root / "proc/meminfo").splitlines():
        name, _, value = line.partition(":")
        if name == key:
            return int(value.split()[0]) // 1024
    # No /proc (other systems): ask the C library.
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 20 if key == "MemTotal" else 0


def _cgroup_limits(root: Path) -> Iterator[tuple[int, str]]:
    """Yield every memory limit on the way from this process' control group to the top (version 2, then 1)."""
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, group = line.split(":", 2)
        if controllers not in ("", "memory") and "memory" not in controllers.split(","):
            continue
        base = "sys/fs/cgroup/memory" if controllers else "sys/fs/cgroup"
        name = "memory.limit_in_bytes" if controllers else "memory.max"
        parts = [part for part in group.split("/") if part]
        for length in range(len(parts) + 1):
            path = "/".join([base, *parts[:length], name])
            limit = _read(root / path)
            if limit.isdigit():  # "max" means no limit
                yield max(1, int(limit) >> 20), f"detected: {path}"


def _cpu_list(text: str) -> list[int]:
    """Return the numbers of a kernel CPU list: ``0-2,5`` -> 0, 1, 2, 5."""
    ranges = [part.split("-") for part in text.split(",") if part]
    return [cpu for ends in ranges for cpu in range(int(ends[0]), int(ends[-1]) + 1)]


def _kib(text: str) -> int | None:
    factor = {"K": 1, "M": 1024}.get(text[-1:], 0)
    return int(text[:-1]) * factor if factor and text[:-1].isdigit() else None


def _package_version(name: str) -> str | None:
    from importlib import metadata

    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _throttled(root: Path) -> list[str] | None:
    """Return what the firmware says slows the CPU down now; None where no firmware tells."""
    for path in sorted((root / "sys/devices/platform").glob("soc*/*firmware/get_throttled")):
        try:
            bits = int(_read(path), 16)
        except ValueError:
            return None
        return [name for bit, name in _THROTTLE_BITS.items() if bits >> bit & 1]
    return None
