"""``doctor --kernels`` and ``--calibrate``: which kernel and tile every product has, and measuring better ones."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from typing import Any

from edgetrain import bench, calibration
from edgetrain.bench_load import Watch
from edgetrain.bench_tiles import find_tiles
from edgetrain.catalog import build_model
from edgetrain.cli.output import count, duration, emit, table
from edgetrain.cli.progress import CompileNotice, Display, choose_display
from edgetrain.cli.warming import MODELS
from edgetrain.devices import DeviceProfile, load_profile
from edgetrain.errors import UsageError
from edgetrain.kernel_table import KernelUse, kernel_table
from edgetrain.policies import NONE, parse_policy


def kernels_command(
    models: Sequence[str], batch_size: int | None, profile_name: str | None, methods: Mapping[str, str | None], *,
    as_json: bool,
) -> None:  # fmt: skip
    """Print the table of a model, or of all built-in ones; ``methods``: policies as text, by kind."""
    profile = load_profile(profile_name or "host")
    size = profile.batch_size if batch_size is None else batch_size
    policies = {kind: parse_policy(kind, NONE if text is None else text) for kind, text in methods.items()}
    tables = {name: kernel_table(build_model(name), profile, size, **policies) for name in models or MODELS}
    state = calibration.describe()
    result = {
        "profile": profile.name, "batch_size": size, "calibration": state, "methods": dict(methods),
        "models": {name: [use.to_dict() for use in uses] for name, uses in tables.items()},
    }  # fmt: skip
    head = f"profile {profile.name}, batch size {size}; calibration: {state['state']}"
    parts = [f"{name}\n{_table_text(uses)}" for name, uses in tables.items()]
    emit(result, "\n\n".join([head, *parts]), as_json)


def _table_text(uses: Sequence[KernelUse]) -> str:
    head = ("sizes", "product", "layers", "method", "kernel", "lanes", "tile", "jobs", "why")
    rows = [
        (use.sizes, use.product, str(len(use.nodes)), use.method, use.kernel, f"{use.lanes} {use.lanes_hold}",
         "x".join(map(str, use.tile or ())), str(use.jobs), use.reason)
        for use in uses
    ]  # fmt: skip
    return table([head, *rows])


def calibrate_command(
    models: Sequence[str], batch_size: int | None, profile_name: str | None, *, quiet: bool, as_json: bool
) -> None:
    """Measure, store, and print which tiles replace the rule's from now on."""
    start, watch, profile = time.perf_counter(), Watch(), load_profile(profile_name or "host")
    size = profile.batch_size if batch_size is None else batch_size
    # One of each family: the wide MobileNets take as long as all others together, who has one names it.
    models = models or bench.MODELS
    with closing(choose_display(quiet, as_json, 0.0)) as display, CompileNotice(display.compiling):
        measured = _measure(models, size, profile, display)
    load = watch.load()
    replaced = [{"product": label, "rule": found.rule, "tile": found.tile, "gain": found.gain}
                for label, found in measured.items() if found.tile != found.rule]  # fmt: skip
    result = {
        "profile": profile.name, "batch_size": size, "models": list(models), "products": len(measured),
        "replaced": replaced, "seconds": time.perf_counter() - start, "file": str(calibration.path()),
        "busy": bool(load and load.busy),
    }  # fmt: skip
    emit(result, _calibration_text(result), as_json)


def _measure(
    models: Sequence[str], batch_size: int, profile: DeviceProfile, display: Display
) -> dict[str, calibration.Finding]:
    """Measure model by model and keep what is known at once, so that an interrupted calibration is not lost."""
    measured: dict[str, calibration.Finding] = {}
    for number, name in enumerate(models, 1):
        display.say(f"[{number}/{len(models)}] {name}, batch size {batch_size}")
        measured |= find_tiles(build_model(name), profile, batch_size, known=measured, say=display.say)
        try:
            calibration.keep(measured)
        except OSError as error:
            raise UsageError(
                f"{calibration.path()}: the calibration cannot be written ({error.strerror}); set NUMBA_CACHE_DIR to "
                "a folder you may write"
            ) from error
    return measured


def _calibration_text(result: dict[str, Any]) -> str:
    rows = [("product", "rule", "tile", "gain")]
    rows += [(entry["product"], "x".join(map(str, entry["rule"])), "x".join(map(str, entry["tile"])),
              f"{entry['gain']:.2f}") for entry in result["replaced"]]  # fmt: skip
    summary = (
        f"{count(result['products'], 'product')} measured in {duration(result['seconds'])}, "
        f"{count(len(result['replaced']), 'tile')} replaced; kept in {result['file']}"
    )
    busy = ["something else used this machine meanwhile: better do it again on an idle one"] * result["busy"]
    return "\n".join([*([table(rows)] if result["replaced"] else []), summary, *busy])
