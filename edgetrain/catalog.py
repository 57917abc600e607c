"""Names of models: what a user may write where a model is asked for."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from edgetrain.errors import ModelError, UsageError
from edgetrain.graph import Graph

Builder = Callable[..., Graph]

_NAMES = ("lenet5", "resnet8", "resnet20", "resnet32", "resnet56", "resnet110",
          "mobilenet_v1", "mobilenet_v1_0.5", "mobilenet_v1_0.25", "ds_cnn", "cnn1d")  # fmt: skip


def model_names() -> list[str]:
    """Return the names of built-in models that ``build_model`` knows.

    Any other depth ``resnet<6 n + 2>`` and any other width ``mobilenet_v1_<width>`` works too.

    Example:
        >>> model_names()[:3]
        ['lenet5', 'resnet8', 'resnet20']
    """
    return list(_NAMES)


def build_model(
    name_or_file: str | Path, input_shape: Sequence[int] | None = None, num_classes: int | None = None, seed: int = 0
) -> Graph:
    """Build a model by name, or read an ONNX file.

    Args:
        name_or_file: a built-in name such as ``"lenet5"``, ``"resnet20"`` or ``"mobilenet_v1_0.25"``, or a path
            that ends in ``.onnx``.
        input_shape: without the batch dimension; the model's own when ``None``. A file must have that shape.
        num_classes: length of the output; the model's own when ``None``. A file must have that many.
        seed: of the initial weights; a file has its own.

    Raises:
        UsageError: unknown name; the message has the nearest known one.
        ModelError: the model cannot be built for that shape, or the file is bad or does not fit.

    Example:
        >>> build_model("resnet8", num_classes=100).output_shape
        (100,)
    """
    if str(name_or_file).lower().endswith(".onnx"):
        return _from_file(Path(name_or_file), input_shape, num_classes)
    builder, options = _builder(str(name_or_file))
    if input_shape is not None:
        options["input_shape"] = tuple(input_shape)
    if num_classes is not None:
        options["num_classes"] = num_classes
    return builder(seed=seed, **options)


def _builder(name: str) -> tuple[Builder, dict[str, Any]]:
    from edgetrain import models  # imported late: naming the models must not load them

    if match := re.fullmatch(r"resnet(\d+)", name):
        return models.resnet, {"depth": int(match[1])}
    if match := re.fullmatch(r"mobilenet_v1_(\d+(?:\.\d+)?)", name):
        return models.mobilenet_v1, {"width": float(match[1])}
    if name in models.__all__:
        return getattr(models, name), {}
    raise _unknown(name)


def _unknown(name: str) -> UsageError:
    known = [*_NAMES, "resnet"]
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"did you mean '{nearest[0]}'? " if nearest else ""
    return UsageError(f"unknown model '{name}'; {hint}known: {', '.join(_NAMES)}, or the path of an .onnx file")


def _from_file(path: Path, input_shape: Sequence[int] | None, num_classes: int | None) -> Graph:
    from edgetrain.onnx_io import load_onnx  # imported late: built-in models do not need the onnx package

    graph = load_onnx(path)
    if input_shape is not None and graph.input_shape != tuple(input_shape):
        raise ModelError(f"{path}: the model takes inputs of shape {graph.input_shape}, not {tuple(input_shape)}")
    if num_classes is not None and graph.output_shape != (num_classes,):
        raise ModelError(f"{path}: the model's output has shape {graph.output_shape}, not {num_classes} classes")
    return graph
