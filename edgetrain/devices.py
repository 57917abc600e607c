"""Device profiles: what a board can do, and how to train on it.

A profile is one TOML file of ``edgetrain.device_profiles``; no board is named in code. The records
below are its schema (see ``edgetrain.schema``). ``host`` is detected instead of read.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from edgetrain.errors import ProfileError
from edgetrain.hostinfo import Host, read_host
from edgetrain.schema import OneOf, Within, build, nearest

Table = dict[str, Any]


Kib = Annotated[int, Within(1, 1 << 20)]
Mib = Annotated[int, Within(1, 1 << 24)]
Watts = Annotated[float, Within(0, 1000)]
Bandwidth = Annotated[float, Within(0.01, 10_000)]
Gflops = Annotated[float, Within(0.01, 1e6)]
Count = Annotated[int, Within(1, 4096)]

_PEAK_ORIGIN = "derived: cores x clock x lanes x 2 flops x FMA per cycle"


@dataclass(frozen=True, kw_only=True)
class Hyperparameters:
    """Optimizer, schedule and loss of a training run; ``lr`` is the peak of the schedule."""

    epochs: Annotated[int, Within(1, 100_000)]
    optimizer: Annotated[str, OneOf(("sgd", "adam", "adamw"))]
    lr: Annotated[float, Within(1e-8, 10)]
    momentum: Annotated[float, Within(0, 0.9999)]
    nesterov: bool
    weight_decay: Annotated[float, Within(0, 1)]
    decay_bias_and_norm: bool
    clip_norm: Annotated[float, Within(1e-6, 1e6)] | None = None
    averaging: Annotated[float, Within(0, 0.999999)] = 0.0
    schedule: Annotated[str, OneOf(("constant", "cosine"))]
    warmup_fraction: Annotated[float, Within(0, 0.99)]
    label_smoothing: Annotated[float, Within(0, 0.9)]


@dataclass(frozen=True, kw_only=True)
class Recipe(Hyperparameters):
    """How to train on this device unless the user says otherwise.

    ``filter``, ``sparsity`` and ``error_pruning`` say what to skip, as ``policies.parse_policy`` reads it. Where they
    skip nothing, ``stream_recipe`` names the recipe of ``edgetrain fit --recipe`` that a stream is learned with.
    """

    augmentation: str
    filter: str = "none"
    sparsity: str = "none"
    error_pruning: str = "none"
    stream_recipe: Annotated[str, OneOf(("edge", "dense"))] = "dense"


@dataclass(frozen=True, kw_only=True)
class Defaults:
    """Run settings: threads, images per step, memory budget of a run in MiB, training recipe."""

    threads: Count
    batch_size: Annotated[int, Within(1, 65_536)]
    memory_budget_mib: Mib
    recipe: Recipe


@dataclass(frozen=True, kw_only=True)
class DeviceProfile:
    """What a device can do; every number has its unit in its name and its origin in ``sources``. None means unknown.

    Attributes:
        name, description, cpu: for people; ``name`` is the file's.
        architecture: as ``uname -m`` tells it, such as ``aarch64``.
        cores, little_cores: the fast cores, which training uses, and the slower rest; peak figures count ``cores``.
        clock_mhz, simd, simd_float32_lanes, simd_fma_per_cycle: of a core: name of the vector instructions, float32
            numbers in a vector, fused multiply-adds of vectors in a cycle.
        l1d_kib, l2_kib, l3_kib, l2_shared_by_cores: caches that one core reaches, and how many cores share an L2.
        ram_mib, memory_bandwidth_peak_gb_per_s, memory_copy_gb_per_s: memory; a copied byte counts once.
        float32_peak_gflops, float32_measured_gflops: of all ``cores``.
        power_idle_w, power_load_w: of the whole board.
        defaults: threads, batch size, memory budget and recipe of a run.
        generic: whether it stands for a class of machines instead of a board.
        device_tree_match: what the board's device tree says, to recognise it.
    """

    name: str
    description: str
    architecture: str
    cpu: str
    cores: Count
    clock_mhz: Annotated[float, Within(1, 20_000)] | None
    simd: str
    simd_float32_lanes: Annotated[int, OneOf((1, 4, 8, 16))]
    simd_fma_per_cycle: Annotated[float, Within(0.25, 8)] | None
    l1d_kib: Kib | None
    l2_kib: Kib | None
    ram_mib: Mib
    float32_peak_gflops: Gflops | None
    memory_bandwidth_peak_gb_per_s: Bandwidth | None
    defaults: Defaults
    sources: Mapping[str, str]
    little_cores: Annotated[int, Within(0, 4096)] = 0
    l2_shared_by_cores: Count | None = None
    l3_kib: Kib | None = None
    float32_measured_gflops: Gflops | None = None
    memory_copy_gb_per_s: Bandwidth | None = None
    power_idle_w: Watts | None = None
    power_load_w: Watts | None = None
    generic: bool = False
    device_tree_match: tuple[str, ...] = ()

    @property
    def threads(self) -> int:
        """Default number of threads."""
        return self.defaults.threads

    @property
    def batch_size(self) -> int:
        """Default number of instances per step."""
        return self.defaults.batch_size

    @property
    def memory_budget_mib(self) -> int:
        """Default memory budget of a run, MiB."""
        return self.defaults.memory_budget_mib

    @property
    def recipe(self) -> Recipe:
        """Default training recipe."""
        return self.defaults.recipe

    def to_dict(self) -> Table:
        """Return nested plain dicts and lists, ready for ``json.dumps``."""
        return asdict(self) | {
            "device_tree_match": list(self.device_tree_match),
            "sources": dict(self.sources),
        }

    def summary(self) -> str:
        """Return a readable description of several lines, with units; unknown numbers say so."""
        d, r = self.defaults, self.recipe
        little = f" and {self.little_cores} slower ones" if self.little_cores else ""
        shared = f" shared by {self.l2_shared_by_cores} cores" if (self.l2_shared_by_cores or 1) > 1 else ""
        rows = {
            "cpu": f"{self.cpu} ({self.architecture}), "
            f"{self.cores} cores at {_say(self.clock_mhz, 'MHz')}{little}",
            "simd": f"{self.simd}, {self.simd_float32_lanes} float32 lanes",
            "caches": f"L1d {_say(self.l1d_kib, 'KiB')}, L2 {_say(self.l2_kib, 'KiB')}{shared}, "
            f"L3 {_say(self.l3_kib, 'KiB', 'none or unknown')}",
            "memory": f"{self.ram_mib} MiB, {_say(self.memory_bandwidth_peak_gb_per_s, 'GB/s peak')}, "
            f"{_say(self.memory_copy_gb_per_s, 'GB/s copied')}",
            "float32": f"{_say(self.float32_peak_gflops, 'GFLOPS peak (derived)')}, "
            f"{_say(self.float32_measured_gflops, 'GFLOPS measured')}",
            "power": f"{_say(self.power_idle_w, 'W idle')}, {_say(self.power_load_w, 'W under load')}",
            "defaults": f"{d.threads} threads, batch size {d.batch_size}, "
            f"memory budget {d.memory_budget_mib} MiB",
            "recipe": f"{r.optimizer}, peak lr {r.lr:g}, "
            f"momentum {r.momentum:g}{' (Nesterov)' * r.nesterov}, weight decay {r.weight_decay:g}, "
            f"{r.schedule} after {r.warmup_fraction:.0%} warm-up, {r.epochs} epochs",
            "skips": f"instance filter {r.filter}, sparsity {r.sparsity}, error pruning {r.error_pruning}; "
            f"of streams: recipe {r.stream_recipe}",
        }
        return "\n".join(
            [f"{self.name}: {self.description}", *(f"  {key:<9} {text}" for key, text in rows.items())]
        )


def list_profiles() -> tuple[str, ...]:
    """Return the names of the profiles that are installed, sorted (``host`` is not among them).

    >>> "generic-aarch64" in list_profiles()
    True
    """
    return tuple(sorted(path.stem for path in _profile_folder().glob("*.toml")))


def load_profile(name_or_path: str | os.PathLike[str]) -> DeviceProfile:
    """Return a profile by name, from a path to a TOML file, or of this machine for ``"host"``.

    Raises:
        ProfileError: no such profile or file, or the file breaks the schema; the message names file, key,
            value and what was expected.

    >>> load_profile("generic-aarch64").simd_float32_lanes
    4
    """
    text = os.fspath(name_or_path)
    if text == "host":
        return detect_host()
    if isinstance(name_or_path, os.PathLike) or text.endswith(".toml") or os.sep in text:
        return _load_file(Path(text))
    names = list_profiles()
    if text not in names:
        closest = nearest(text, [*names, "host"])
        raise ProfileError(
            f"unknown device profile {text!r}; did you mean {closest!r}? There are: "
            f"{', '.join(names)}, host, or a path to a TOML file"
        )
    return _load_file(_profile_folder() / f"{text}.toml")


def detect_host(
    root: str | os.PathLike[str] = "/", *, cpus: Collection[int] | None = None, machine: str | None = None
) -> DeviceProfile:
    """Return the profile of this machine; the origin of each number is in ``sources``.

    A board whose device tree matches a profile keeps that profile's published numbers; on other machines what
    cannot be detected is None, and the recipe is that of the generic profile of the architecture.

    Args:
        root: where ``proc`` and ``sys`` are found; another folder in tests.
        cpus: numbers of the usable CPUs; by default those this process may run on.
        machine: architecture as ``uname -m`` gives it.

    Raises:
        ProfileError: a profile file is damaged.

    >>> detect_host().name
    'host'
    """
    host = read_host(Path(root), cpus, machine)
    profiles = [load_profile(name) for name in list_profiles()]
    base = _matching_profile(host, profiles)
    return _with_defaults(_overlay(base, host), base)


# Detecting the host

# Numbers of a generic profile are guesses: on a machine one can look at, a guess is worse than "unknown".
_GUESSED_IN_GENERIC = (
    "clock_mhz", "simd_fma_per_cycle", "l1d_kib", "l2_kib", "l2_shared_by_cores", "l3_kib",
    "memory_bandwidth_peak_gb_per_s", "memory_copy_gb_per_s", "power_idle_w", "power_load_w",
)  # fmt: skip


def _matching_profile(host: Host, profiles: list[DeviceProfile]) -> DeviceProfile:
    """Return the profile with the longest match of the device tree, else a generic one."""
    lengths = {
        p.name: max((len(m) for m in p.device_tree_match if m in host.board), default=0) for p in profiles
    }
    best = max(profiles, key=lambda p: lengths[p.name])
    if lengths[best.name]:
        return best
    generic = [p for p in profiles if p.generic]
    return next((p for p in generic if p.architecture == host.machine), generic[0])


def _overlay(base: DeviceProfile, host: Host) -> DeviceProfile:
    """Put what the machine tells over what the profile says."""
    found = host.findings()
    values: Table = dict.fromkeys(_GUESSED_IN_GENERIC) if base.generic else {}
    values |= {key: value for key, (value, _) in found.items()}
    origins = {key: f"profile {base.name}: {origin}" for key, origin in base.sources.items()}
    origins |= {key: origin for key, (_, origin) in found.items()}
    if base.generic:
        values["cpu"] = host.cpu_name or "unknown"
    profile = replace(
        base,
        **values,
        name="host",
        generic=False,
        device_tree_match=(),
        architecture=host.machine,
        description=host.board or f"this {host.machine} machine",
    )
    peak = _peak_gflops(profile)
    if not _close(peak, base.float32_peak_gflops):
        # Another clock or core count than the profile's: its measured rate is not this machine's.
        profile = replace(profile, float32_peak_gflops=peak, float32_measured_gflops=None)
        origins["float32_peak_gflops"] = _PEAK_ORIGIN
    known = {key: origin for key, origin in origins.items() if getattr(profile, key, "") is not None}
    return replace(profile, sources=known)


def _with_defaults(profile: DeviceProfile, base: DeviceProfile) -> DeviceProfile:
    """Fit threads and memory budget to the machine; batch size and recipe stay those of the profile."""
    defaults = replace(base.defaults, threads=profile.cores, memory_budget_mib=max(1, profile.ram_mib // 2))
    sources = {
        **profile.sources,
        "defaults.threads": "derived: one thread per fast core",
        "defaults.memory_budget_mib": "derived: half of ram_mib",
    }
    return replace(profile, defaults=defaults, sources=sources)


# Reading and checking a file


def _profile_folder() -> Path:
    """Find the TOML files: inside the installed package, or beside it in a source checkout."""
    here = Path(__file__).resolve().parent
    for folder in (here / "device_profiles", here.parent / "device_profiles"):
        if any(folder.glob("*.toml")):
            return folder
    raise ProfileError(f"no device profiles in {here / 'device_profiles'}: reinstall edgetrain")


def _load_file(path: Path) -> DeviceProfile:
    import tomllib

    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ProfileError(f"{path}: cannot be read as a TOML file: {error}") from error
    profile = build(DeviceProfile, table, path)
    _check_sources(table, path)
    _check_consistency(profile, path)
    return profile


def _leaves(table: Table, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield dotted key and value of every entry and every table except ``sources``."""
    for key, value in table.items():
        if prefix + key != "sources":
            yield prefix + key, value
        if isinstance(value, dict) and prefix + key != "sources":
            yield from _leaves(value, f"{prefix}{key}.")


def _check_sources(table: Table, path: Path) -> None:
    sources, leaves = table["sources"], dict(_leaves(table))
    for key in sources:
        if key not in leaves:
            raise ProfileError(
                f"{path}: [sources] names {key!r}, which the file lacks; "
                f"did you mean {nearest(key, leaves)!r}?"
            )
    for key, value in leaves.items():
        parts = key.split(".")
        sourced = any(".".join(parts[:n]) in sources for n in range(1, len(parts) + 1))
        if type(value) in (int, float) and not sourced:
            raise ProfileError(f"{path}: key {key!r} is {value!r} without a source; add {key!r} to [sources]")


def _check_consistency(profile: DeviceProfile, path: Path) -> None:
    """Refuse numbers that contradict each other."""
    p, peak = profile, _peak_gflops(profile)
    limits = (
        ("defaults.threads", p.threads, p.cores + p.little_cores, "cores + little_cores"),
        ("defaults.memory_budget_mib", p.memory_budget_mib, p.ram_mib, "ram_mib"),
        ("power_idle_w", p.power_idle_w, p.power_load_w, "power_load_w"),
        ("float32_measured_gflops", p.float32_measured_gflops, p.float32_peak_gflops, "float32_peak_gflops"),
        ("memory_copy_gb_per_s", p.memory_copy_gb_per_s, p.memory_bandwidth_peak_gb_per_s, "the peak"),
    )
    for key, value, limit, what in limits:
        if value is not None and limit is not None and value > limit:
            raise ProfileError(f"{path}: key {key!r} is {value!r}, expected at most {what} = {limit!r}")
    if not _close(peak, p.float32_peak_gflops):
        raise ProfileError(
            f"{path}: key 'float32_peak_gflops' is {p.float32_peak_gflops!r}, expected cores x "
            f"clock x lanes x 2 x FMA per cycle = {peak}"
        )


def _peak_gflops(p: DeviceProfile) -> float | None:
    if p.clock_mhz is None or p.simd_fma_per_cycle is None:
        return None
    return p.cores * p.clock_mhz / 1000 * p.simd_float32_lanes * 2 * p.simd_fma_per_cycle


def _close(a: float | None, b: float | None) -> bool:
    """Tell whether two rates agree within 1 % (clocks are given in whole MHz), or both are unknown."""
    return a == b or (a is not None and b is not None and abs(a - b) <= 0.01 * abs(a))


def _say(value: float | None, unit: str, otherwise: str = "") -> str:
    return f"{value:g} {unit}" if value is not None else otherwise or f"unknown {unit}"
