"""ONNX in and out: files of other tools become a ``Graph``, a ``Graph`` becomes a file for any runtime.

The ``onnx`` package is imported by the first call, not by ``import edgetrain``.
In the order of use: ``importer`` (the file as a whole), ``reading`` (names, constants
and errors while one file is read), ``readers`` and ``shapes`` (one function per
operator),
``folding`` (computing constants with the onnx package), ``exporter``, ``matching``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgetrain.onnx_io.exporter import save_onnx
    from edgetrain.onnx_io.importer import load_onnx
    from edgetrain.onnx_io.matching import MatchReport, match_parameters

_PUBLIC = {"load_onnx": "importer", "save_onnx": "exporter", "match_parameters": "matching", "MatchReport": "matching"}

__all__ = ["MatchReport", "load_onnx", "match_parameters", "save_onnx"]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(f"edgetrain.onnx_io.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module 'edgetrain.onnx_io' has no attribute '{name}'")
