"""``warmup``: compile once what training will need, where a wait does not disturb."""

from __future__ import annotations

import itertools
import time
from contextlib import closing
from typing import Any

from edgetrain.catalog import build_model
from edgetrain.cli.config import ARGUMENTS, RECIPES
from edgetrain.cli.output import count, duration, emit
from edgetrain.cli.progress import CompileNotice, choose_display
from edgetrain.devices import DeviceProfile, load_profile
from edgetrain.kernels.cache import describe
from edgetrain.kernels.registry import KernelKey, compile_kernels, interpreter
from edgetrain.learner import Learner
from edgetrain.optim import SGD, Adam
from edgetrain.policies import NONE

# Methods that are not in a recipe: one of each family of kernels.
COMMON: tuple[dict[str, str], ...] = (
    {"sparsity": "rigl:weights=0.9"}, {"sparsity": "swat:weights=0.9,activations=0.9"},
    {"sparsity": "swat:weights=0.9,activations=0.9,group=lanes"},
    {"error_pruning": "gradients:group=element"}, {"error_pruning": "gradients:group=lanes"},
)  # fmt: skip
# One of each family and width: depth adds layers of the same kind, which need no other kernels (a test compares).
MODELS = ("lenet5", "resnet20", "mobilenet_v1", "mobilenet_v1_0.5", "mobilenet_v1_0.25", "ds_cnn", "cnn1d")


def warmup_command(profile_name: str | None, *, quiet: bool, as_json: bool) -> None:
    """Compile, and print how much there was to do."""
    start, compiled = time.perf_counter(), []
    profile = load_profile(profile_name or "host")
    with (
        closing(choose_display(quiet, as_json, 0.0)) as display,
        CompileNotice(display.compiling),
        CompileNotice(lambda name, *_: compiled.append(name)),
    ):
        interpreter()
        kernels = needed_kernels(profile)
        compile_kernels(kernels)
    result = {"profile": profile.name, "kernels": len(kernels), "compiled": len(compiled),
              "seconds": time.perf_counter() - start, "cache": describe()}  # fmt: skip
    emit(result, _text(result), as_json)


def needed_kernels(profile: DeviceProfile) -> list[KernelKey]:
    """Return the kernels for the profile's batch size: all built-in models, training and inference.

    Each trained densely, by every named recipe and with the methods of ``COMMON``; densely with Adam as well.
    """
    kernels: dict[KernelKey, None] = {}
    for name, methods in itertools.product(MODELS, (*RECIPES.values(), *COMMON)):
        arguments: dict[str, Any] = {ARGUMENTS[kind]: text for kind, text in methods.items() if text != NONE}
        optimizer = SGD(lr=0.1, averaging=0.99)
        kernels |= dict.fromkeys(Learner(build_model(name), profile, optimizer=optimizer, **arguments).kernels())
    return [*(kernels | dict.fromkeys(Learner(build_model(MODELS[0]), profile, optimizer=Adam()).kernels()))]


def _text(result: dict[str, Any]) -> str:
    there = result["kernels"] - result["compiled"]
    cache = result["cache"]
    kept = f"kept in {cache['folder']}" if cache["writable"] else "NOT kept: no folder can be written, see doctor"
    return f"{count(result['compiled'], 'kernel')} compiled, {there} were there, {duration(result['seconds'])}; {kept}"
