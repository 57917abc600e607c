"""``evaluate``, ``predict`` and ``export``: what trained models are for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgetrain.cli.config import from_run
from edgetrain.cli.output import emit, table
from edgetrain.cli.sources import (
    check_classes,
    default_split,
    load_for,
    load_splits,
    load_trained,
    load_unlabelled,
)
from edgetrain.data import Dataset
from edgetrain.data.folder import IMAGE_SUFFIXES, class_folders, image_files, read_image
from edgetrain.data.readers import available_splits, is_image_folder
from edgetrain.data.streaming import STANDARD_INPUT
from edgetrain.errors import DataError, UsageError
from edgetrain.fitting import evaluate_dataset
from edgetrain.losses import probabilities_of
from edgetrain.runs import Run

if TYPE_CHECKING:
    from edgetrain.graph import Graph
    from edgetrain.learner import Learner


def evaluate_command(model: str, data: str | None, split: str | None, threads: int | None, *, as_json: bool) -> None:
    """Print loss and accuracy.

    Raises:
        UsageError, ModelError: ``model`` is nothing that can be evaluated.
        DataError: the data are bad, or not for this network.
    """
    learner, file = load_trained(model, threads)
    if data is None:
        data, dataset = _own_data(model, learner.graph, split)
    else:
        dataset = load_for(learner.graph, data, split)
    metrics = evaluate_dataset(learner, dataset)
    result = {"model": file, "data": data, "images": len(dataset), **metrics}
    text = f"accuracy {metrics['accuracy']:.4f}, loss {metrics['loss']:.4f} on {len(dataset)} images of {dataset.name}"
    emit(result, text, as_json)


def predict_command(model: str, data: str, split: str | None, threads: int | None, *, as_json: bool) -> None:
    """Print the class of every image, or the numbers that a network without classes gives.

    Raises:
        UsageError, ModelError: ``model`` is nothing that can predict.
        DataError: the data are bad, or not for this network.
        NumericalError: an output is not finite.
    """
    learner, loaded = load_trained(model, threads)
    files = _image_files(Path(data), split)
    dataset = _from_images(_decoded(files, learner.graph), data) if files else _arrays(learner.graph, data, split)
    logits = _logits(learner, dataset)
    has_classes = learner.loss != "mse" and logits.ndim == 2 and logits.shape[1] > 1
    told = [_most_probable(learner.graph, row) if has_classes else {"outputs": row.tolist()} for row in logits]
    predictions = [{"index": index} | one for index, one in enumerate(told)]
    for prediction, file in zip(predictions, files, strict=bool(files)):
        prediction["file"] = str(file)
    rows: list[tuple[str, ...]] = [("image", "class", "probability") if has_classes else ("image", "outputs")]
    rows += [(str(p.get("file", p["index"])), *_columns(p)) for p in predictions]
    emit({"model": loaded, "data": data, "predictions": predictions}, table(rows), as_json)


def export_command(model: str, output: Path, *, best: bool, as_json: bool) -> None:
    """Write an ONNX file.

    Raises:
        UsageError: the file has another ending than .onnx, or cannot be written.
        UsageError, ModelError: ``model`` is nothing that can be exported.
    """
    if output.suffix.lower() != ".onnx":
        raise UsageError(f"--output is '{output}', expected a file name that ends in .onnx")
    learner, file = load_trained(model, best=best)
    learner.export_onnx(output)
    size = output.stat().st_size
    emit({"from": file, "model": str(output), "bytes": size}, f"{output}: {size:,} bytes, from {file}", as_json)


def _own_data(model: str, graph: Graph, split: str | None) -> tuple[str, Dataset]:
    """Return the name of the data that a model's run took, and those it was judged on; the embedded data without a run.

    Raises:
        UsageError: the run learned from standard input.
    """
    path = Path(model)
    run = Run(path if path.is_dir() else path.parent)
    if not (run.config_file.is_file() and run.events_file.is_file()):
        return "embedded", load_for(graph, "embedded", split)
    config = from_run(run.read_config(), run.config_file)
    source = config.data.source
    if source == STANDARD_INPUT:
        raise UsageError(f"{run.path}: its data came from standard input and are gone; name others with --data")
    if config.stream.enabled or split is not None:
        return source, load_for(graph, source, split)
    dataset = load_splits(config, graph.class_names)[1]
    check_classes(graph, dataset)
    return source, dataset


def _logits(learner: Learner, dataset: Dataset) -> NDArray[np.float32]:
    """Return what the network gives for all images, float32 (N, outputs)."""
    pieces = []
    for first in range(0, len(dataset), learner.batch_size):
        x, _ = dataset.take(np.arange(first, min(first + learner.batch_size, len(dataset))))
        pieces.append(learner.logits(x))
    return np.concatenate(pieces)


def _most_probable(graph: Graph, logits: NDArray[np.float32]) -> dict[str, Any]:
    probabilities = probabilities_of(logits[None])[0]
    label = int(probabilities.argmax())
    name = graph.class_names[label] if label < len(graph.class_names) else str(label)
    return {"label": label, "class": name, "probability": float(probabilities[label])}


def _columns(prediction: dict[str, Any]) -> tuple[str, ...]:
    if "outputs" in prediction:
        return (" ".join(f"{value:.6g}" for value in np.ravel(prediction["outputs"])),)
    return prediction["class"], f"{prediction['probability']:.4f}"


def _image_files(path: Path, split: str | None) -> list[Path]:
    """Return the image files that a path stands for: itself, those in the folder, or else those of its classes.

    Raises:
        DataError: the path is missing, or a folder without data.
        UsageError: a split of a folder that has none.
    """
    if path.suffix.lower() in IMAGE_SUFFIXES and not path.is_dir():
        if not path.is_file():
            raise DataError(f"{path}: no such file; check the path")
        return [path]
    if not path.is_dir():
        return []
    if files := image_files(path):
        if split is not None:
            raise UsageError(f"--split is '{split}', but {path} is a plain folder of images; leave --split out")
        return files
    chosen = split or default_split(str(path))
    if not is_image_folder(path) or chosen not in available_splits(path):
        return []
    place = path / chosen
    folders = (place.is_dir() and class_folders(place)) or class_folders(path)
    return [file for folder in folders.values() for file in image_files(folder)]


def _arrays(graph: Graph, data: str, split: str | None) -> Dataset:
    path = Path(data)
    if path.suffix.lower() == ".npz" and path.is_file() and split is None:
        return _from_images(_images_of_npz(path), path.name)
    return load_unlabelled(graph, data, split)


def _from_images(images: Any, name: str) -> Dataset:
    labels = np.zeros(len(images) if np.ndim(images) else 0, np.int64)
    return Dataset.from_arrays(images, labels, ("unknown",), name)


def _images_of_npz(path: Path) -> NDArray[Any]:
    from edgetrain.data.npz import read_npz

    with path.open("rb") as file:
        arrays = read_npz(path, file, {"x", "x_test"})
    if not arrays:
        raise DataError(f"{path}: has no array 'x'; expected images under that name")
    return arrays["x"] if "x" in arrays else arrays["x_test"]


def _decoded(files: Sequence[Path], graph: Graph) -> NDArray[np.uint8]:
    """Return image files as uint8 (N, C, H, W) in the size that the model takes."""
    if len(graph.input_shape) != 3 or graph.input_shape[0] not in (1, 3):
        raise DataError(f"{files[0]}: an image, but the model takes inputs of shape {graph.input_shape}")
    channels, height, width = graph.input_shape
    return np.stack([read_image(file, (height, width), channels) for file in files])
