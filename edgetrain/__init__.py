"""edgetrain: train small convolutional networks on the device where the data is.

Public names are loaded on first use, so that ``import edgetrain`` stays fast and
imports neither numba nor onnx.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from edgetrain._version import __version__

_ROOT = Path(__file__).parent
if not (_ROOT / "models").is_dir():
    # In a source checkout the folders models/ and device_profiles/ stand beside the package.
    __path__.append(str(_ROOT.parent))

_PUBLIC = {
    "Graph": "edgetrain.graph",
    "Normalization": "edgetrain.graph",
    "Learner": "edgetrain.learner",
    "StepResult": "edgetrain.accounting",
    "SGD": "edgetrain.optim",
    "Adam": "edgetrain.optim",
    "AdamW": "edgetrain.optim",
    "Schedule": "edgetrain.optim",
    "SWAT": "edgetrain.sparsity",
    "RigL": "edgetrain.sparsity",
    "SET": "edgetrain.sparsity",
    "StaticSparse": "edgetrain.sparsity",
    "EarlyInstanceFilter": "edgetrain.filters",
    "SelectiveBackprop": "edgetrain.filters",
    "RandomFilter": "edgetrain.filters",
    "ErrorMapPruning": "edgetrain.pruning",
    "GradientPruning": "edgetrain.pruning",
    "Dataset": "edgetrain.data",
    "Augmentation": "edgetrain.data",
    "load_dataset": "edgetrain.data",
    "DeviceProfile": "edgetrain.devices",
    "load_profile": "edgetrain.devices",
    "load_onnx": "edgetrain.onnx_io",
    "EdgetrainError": "edgetrain.errors",
}
_MODULES = ("models", "errors", "data", "optim", "ops")

__all__ = ["__version__", *_PUBLIC, *_MODULES]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    if name in _MODULES:
        return importlib.import_module(f"edgetrain.{name}")
    raise AttributeError(f"module 'edgetrain' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted(__all__)
