"""``warmup``: compile once what training will need, where a wait does not disturb."""

from __future__ import annotations

import time
from typing import Any

from edgetrain.catalog import build_model
from edgetrain.cli.output import count, duration, emit
from edgetrain.cli.progress import CompileNotice, choose_display
from edgetrain.devices import DeviceProfile, load_profile
from edgetrain.kernels.cache import describe
from edgetrain.kernels.registry import compile_kernels, interpreter
from edgetrain.learner import Learner
from edgetrain.optim import SGD, Adam
from edgetrain.plan import KernelKey

# One of each family and width: depth adds layers of the same kind, which need no other kernels (a test compares).
MODELS = ("lenet5", "resnet20", "mobilenet_v1", "mobilenet_v1_0.5", "mobilenet_v1_0.25", "ds_cnn", "cnn1d")


def warmup_command(profile_name: str | None, *, quiet: bool, as_json: bool) -> None:
    """Compile, and print how much there was to do."""
    start, compiled = time.perf_counter(), []
    profile = load_profile(profile_name or "host")
    display = choose_display(quiet, as_json, 0.0)
    try:
        with CompileNotice(display.compiling), CompileNotice(lambda name, *_: compiled.append(name)):
            interpreter()
            kernels = needed_kernels(profile)
            compile_kernels(kernels)
    finally:
        display.close()
    result = {"profile": profile.name, "kernels": len(kernels), "compiled": len(compiled),
              "seconds": time.perf_counter() - start, "cache": describe()}  # fmt: skip
    emit(result, _text(result), as_json)


def needed_kernels(profile: DeviceProfile) -> list[KernelKey]:
    """Return the kernels for the profile's batch size: all built-in models, training and inference, SGD and Adam."""
    kernels: dict[KernelKey, None] = {}
    for name, optimizer in [*((name, SGD(lr=0.1, momentum=0.9)) for name in MODELS), (MODELS[0], Adam())]:
        kernels |= dict.fromkeys(Learner(build_model(name), profile, optimizer=optimizer).kernels())
    return list(kernels)


def _text(result: dict[str, Any]) -> str:
    there = result["kernels"] - result["compiled"]
    cache = result["cache"]
    kept = f"kept in {cache['folder']}" if cache["writable"] else "NOT kept: no folder can be written, see doctor"
    return f"{count(result['compiled'], 'kernel')} compiled, {there} were there, {duration(result['seconds'])}; {kept}"
