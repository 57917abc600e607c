"""``evaluate``, ``predict`` and ``export``: what trained models are for."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgetrain.cli.output import emit, table
from edgetrain.cli.sources import load_for, load_trained
from edgetrain.data import Dataset
from edgetrain.data.folder import IMAGE_SUFFIXES
from edgetrain.errors import DataError, UsageError
from edgetrain.fitting import evaluate_dataset

if TYPE_CHECKING:
    from edgetrain.graph import Graph
    from edgetrain.learner import Learner


def evaluate_command(model: str, data: str, split: str | None, threads: int | None, *, as_json: bool) -> None:
    """Print loss and accuracy."""
    learner, file = load_trained(model, threads)
    dataset = load_for(learner.graph, data, split)
    metrics = evaluate_dataset(learner, dataset)
    result = {"model": file, "data": data, "images": len(dataset), **metrics}
    text = f"accuracy {metrics['accuracy']:.4f}, loss {metrics['loss']:.4f} on {len(dataset)} images of {dataset.name}"
    emit(result, text, as_json)


def predict_command(model: str, data: str, split: str | None, threads: int | None, *, as_json: bool) -> None:
    """Print the class of every image."""
    learner, file = load_trained(model, threads)
    predictions = [
        {"index": index, "label": int(row.argmax()), "class": _name(learner.graph, int(row.argmax())),
         "probability": float(row.max())}
        for index, row in enumerate(_probabilities(learner, data, split))
    ]  # fmt: skip
    rows = [("image", "class", "probability")]
    rows += [(str(p["index"]), str(p["class"]), f"{p['probability']:.4f}") for p in predictions]
    emit({"model": file, "data": data, "predictions": predictions}, table(rows), as_json)


def export_command(model: str, output: Path, *, best: bool, as_json: bool) -> None:
    """Write an ONNX file."""
    if output.suffix.lower() != ".onnx":
        raise UsageError(f"--output is '{output}', expected a file name that ends in .onnx")
    learner, file = load_trained(model, best=best)
    learner.export_onnx(output)
    size = output.stat().st_size
    emit({"from": file, "model": str(output), "bytes": size}, f"{output}: {size:,} bytes, from {file}", as_json)


def _probabilities(learner: Learner, data: str, split: str | None) -> NDArray[np.float32]:
    """Return the class probabilities of all images of a source, float32 (N, classes)."""
    dataset = _unlabelled(learner.graph, data, split)
    pieces = []
    for first in range(0, len(dataset), learner.batch_size):
        x, _ = dataset.take(np.arange(first, min(first + learner.batch_size, len(dataset))))
        pieces.append(learner.predict_proba(x))
    return np.concatenate(pieces)


def _unlabelled(graph: Graph, data: str, split: str | None) -> Dataset:
    path = Path(data)
    if path.suffix.lower() in IMAGE_SUFFIXES:
        return _from_images(_one_image(path, graph), path.name)
    if path.suffix.lower() == ".npz" and path.is_file() and split is None:
        return _from_images(_images_of_npz(path), path.name)
    return load_for(graph, data, split)


def _from_images(images: Any, name: str) -> Dataset:
    return Dataset.from_arrays(images, np.zeros(len(images), np.int64), ("unknown",), name)


def _images_of_npz(path: Path) -> NDArray[Any]:
    from edgetrain.data.npz import read_npz

    with path.open("rb") as file:
        arrays = read_npz(path, file, {"x", "x_test"})
    if not arrays:
        raise DataError(f"{path}: has no array 'x'; expected images under that name")
    return arrays["x"] if "x" in arrays else arrays["x_test"]


def _one_image(path: Path, graph: Graph) -> NDArray[np.uint8]:
    """Return one image file as uint8 (1, C, H, W) in the size that the model takes."""
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError:
        raise UsageError("image files need Pillow, which is not installed; use pip install edgetrain[images]") from None
    if len(graph.input_shape) != 3 or graph.input_shape[0] not in (1, 3):
        raise DataError(f"{path}: an image, but the model takes inputs of shape {graph.input_shape}")
    channels, height, width = graph.input_shape
    try:
        with Image.open(path) as image:
            pixels = image.convert("L" if channels == 1 else "RGB")
            pixels = pixels.resize((width, height), Image.Resampling.BILINEAR)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; check the path") from None
    except (OSError, ValueError, SyntaxError, UnidentifiedImageError) as error:
        raise DataError(f"{path}: cannot be decoded ({error}), expected a whole image") from error
    return np.asarray(pixels, np.uint8).reshape(1, height, width, channels).transpose(0, 3, 1, 2)


def _name(graph: Graph, label: int) -> str:
    return graph.class_names[label] if label < len(graph.class_names) else str(label)
