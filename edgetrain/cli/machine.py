"""``profiles`` and ``doctor``: what the target can do, and how this machine is."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import edgetrain
from edgetrain import calibration
from edgetrain.cli.output import emit
from edgetrain.devices import list_profiles, load_profile
from edgetrain.errors import UsageError
from edgetrain.hostinfo import host_facts
from edgetrain.kernels.cache import describe
from edgetrain.units import MIB

_HOT_C = 80.0
_NEEDED_DISK_MIB = 200
_NEEDED_RAM_MIB = 200


def list_profiles_command(*, as_json: bool) -> None:
    """Print names and descriptions."""
    profiles = [load_profile(name) for name in (*list_profiles(), "host")]
    rows = [f"{profile.name:<20} {profile.description}" for profile in profiles]
    result = {"profiles": [{"name": p.name, "description": p.description} for p in profiles]}
    emit(result, "\n".join(rows), as_json)


def show_profile_command(name: str, *, as_json: bool) -> None:
    """Print one profile."""
    profile = load_profile(name)
    origins = [f"  {key}: {origin}" for key, origin in profile.sources.items()]
    emit(profile.to_dict(), "\n".join([profile.summary(), "sources:", *origins]), as_json)


def doctor_command(
    models: Sequence[str], batch_size: int | None, profile: str | None, methods: Mapping[str, str | None], *,
    kernels: bool, calibrate: bool, quiet: bool, as_json: bool,
) -> None:  # fmt: skip
    """Examine the machine, or its kernels; ``methods``: policies as text by kind, ``None`` where not given.

    Raises:
        UsageError: flags that do not go together.
    """
    if kernels and calibrate:
        raise UsageError("--kernels and --calibrate are given, expected one of them; calibrate first, then look")
    if not kernels and any(methods.values()):
        raise UsageError("--sparsity and --error-pruning say which kernels: add --kernels; calibration goes without")
    if not kernels and not calibrate and (models or profile or batch_size is not None):
        raise UsageError("--model, --batch-size and --profile say which kernels: add --kernels or --calibrate")
    if not kernels and not calibrate:
        _examine(as_json)
        return
    # Here, not above: a doctor who needs the whole engine could not say that something of it is missing.
    from edgetrain.cli.kernels import calibrate_command, kernels_command

    if calibrate:
        calibrate_command(models, batch_size, profile, quiet=quiet, as_json=as_json)
    else:
        kernels_command(models, batch_size, profile, methods, as_json=as_json)


def _examine(as_json: bool) -> None:
    """Print what was found and what to do about it."""
    facts, cache, disk = host_facts(), describe(), _free_mib(Path.cwd())
    known = calibration.describe()
    advice = _advice(facts, cache, disk, known)
    result = {
        "edgetrain": edgetrain.__version__,
        "host": facts,
        "cache": cache,
        "calibration": known,
        "disk_free_mib": disk,
        "healthy": not advice,
        "advice": advice,
    }
    emit(result, _doctor_text(result), as_json)


def _free_mib(folder: Path) -> int | None:
    try:
        return shutil.disk_usage(folder).free // MIB
    except OSError:
        return None


def _advice(facts: dict[str, Any], cache: dict[str, Any], disk: int | None, known: dict[str, Any]) -> list[str]:
    """Return one sentence for everything that would spoil a run."""
    temperature, ram = facts["temperature_c"], facts["ram_available_mib"]
    missing = [name for name in ("numpy", "numba", "onnx") if facts["packages"].get(name) is None]
    checks = [
        (bool(missing), f"not installed: {', '.join(missing)}; use pip install edgetrain"),
        (not cache["writable"], "kernels cannot be cached and compile at every start; set NUMBA_CACHE_DIR to a "
                                "folder you may write"),
        (disk is not None and disk < _NEEDED_DISK_MIB, f"{disk} MiB of disk are free; runs need space for checkpoints"),
        (ram is not None and ram < _NEEDED_RAM_MIB, f"{ram} MiB of memory are available; close other programs"),
        (temperature is not None and temperature >= _HOT_C, f"the processor has {temperature} °C; add a heat sink or "
                                                            "a fan, or use fewer --threads"),
        (bool(facts["throttled"]), f"the board slows down: {', '.join(facts['throttled'] or ())}; check power supply "
                                   "and cooling"),
        (known["state"] == "damaged", f"{known['file']} is damaged and not used; make it again with edgetrain doctor "
                                      "--calibrate"),
        (facts["governor"] == "powersave", "the clock governor is 'powersave'; choose 'ondemand' or 'performance'"),
    ]  # fmt: skip
    return [sentence for wrong, sentence in checks if wrong]


def _doctor_text(result: dict[str, Any]) -> str:
    facts, cache, known = result["host"], result["cache"], result["calibration"]
    packages = ", ".join(f"{name} {found or 'missing'}" for name, found in facts["packages"].items())
    throttled = {None: "not known here", (): "no"}.get(
        None if facts["throttled"] is None else tuple(facts["throttled"]), "yes"
    )
    rows = [
        ("edgetrain", result["edgetrain"]),
        ("processor", f"{facts['cpu'] or facts['architecture']}, {facts['cores']} cores, {facts['simd']}"),
        ("board", facts["board"] or "not known"),
        ("memory", f"{facts['ram_available_mib']} of {facts['ram_mib']} MiB available"),
        ("temperature", "not known here" if facts["temperature_c"] is None else f"{facts['temperature_c']:.0f} °C"),
        ("throttled", throttled),
        ("python", facts["python"]),
        ("packages", packages),
        ("kernel cache", f"{cache['folder']}, {cache['kernels']} kernels, "
                         f"{'writable' if cache['writable'] else 'NOT writable'}"),
        ("calibration", {"none": "none", "damaged": "DAMAGED"}.get(
            known["state"], f"{known['replaced']} of {known['products']} tiles replaced")),
        ("disk", f"{result['disk_free_mib']} MiB free"),
    ]  # fmt: skip
    lines = [f"{name:<13} {value}" for name, value in rows]
    return "\n".join([*lines, *(f"do: {sentence}" for sentence in result["advice"])] + ["all well"] * result["healthy"])
