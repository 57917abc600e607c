"""From what a user names to objects: data sets, models, trained learners."""

from __future__ import annotations

import zlib
from collections.abc import Collection
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgetrain.checkpoint import load_checkpoint
from edgetrain.cli.advice import without_checkpoint
from edgetrain.cli.config import ARGUMENTS, Config, is_onnx_file
from edgetrain.cli.output import parse_sizes
from edgetrain.data import Dataset, available_splits, load_dataset
from edgetrain.data.readers import is_image_folder
from edgetrain.errors import DataError, UsageError
from edgetrain.policies import NONE, parse_policy
from edgetrain.runs import Run, open_run
from edgetrain.units import MIB

if TYPE_CHECKING:
    from edgetrain.data.streaming import InstanceSource
    from edgetrain.devices import DeviceProfile
    from edgetrain.graph import Graph, Shape
    from edgetrain.learner import Learner
    from edgetrain.onnx_io import MatchReport
    from edgetrain.optim import Optimizer

# Share of the training images kept for validation when the data have no part of their own for it.
HELD_OUT = 0.1


def load_splits(config: Config, class_names: tuple[str, ...] | None) -> tuple[Dataset, Dataset, str]:
    """Return training data, validation data, and what the latter is called: "test", "validation" or "held-out".

    Args:
        config: of the run.
        class_names: of the network that goes on; ``None`` where one is built for the classes of the data.

    Raises:
        DataError, UsageError: the source is bad.
    """
    source = config.data.source
    options: dict[str, Any] = {"image_size": image_size_of(config), "class_names": class_names}
    training = load_dataset(source, split="train", **options)
    judging = _judging_split(available_splits(source))
    if judging is None:
        return (*training.split(1 - HELD_OUT, config.training.seed), "held-out")
    return training, load_dataset(source, split=judging, **options), judging


def classes_of_file(config: Config) -> tuple[str, ...] | None:
    """Return the classes of the network that a new run begins with, for ``load_splits``.

    Raises:
        ModelError: the .onnx file is bad.
    """
    from edgetrain.catalog import build_model

    return build_model(config.model.name).class_names if is_onnx_file(config.model.name) else None


def image_size_of(config: Config) -> tuple[int, int] | None:
    """Return (H, W) that a folder of images is to be resized to, ``None`` where nothing is said.

    Raises:
        UsageError: the setting is no size.
    """
    if config.data.image_size is None:
        return None
    height, width = parse_sizes(config.data.image_size, "--image-size", (2,))
    return height, width


def describe_data(training: Dataset, validation: Dataset) -> dict[str, Any]:
    """Return what a resumed run compares: counts, classes, and a checksum of all pixels and labels."""
    checksum = 0
    for dataset in (training, validation):
        # Contiguous arrays have the buffer that crc32 reads without a copy; others are copied once.
        for array in (dataset.images, dataset.labels):
            checksum = zlib.crc32(array.data if array.flags.c_contiguous else array.tobytes(), checksum)
    return {
        "name": training.name,
        "training_images": len(training),
        "validation_images": len(validation),
        "class_names": list(training.class_names),
        "crc32": checksum,
    }


def make_graph(config: Config, data: Dataset) -> Graph:
    """Build the network for the data; an .onnx file brings its own shape, which ``fit`` checks.

    Raises:
        UsageError, ModelError: unknown or unsuitable model.
        DataError: the data have one class.
    """
    from edgetrain.catalog import build_model

    name = config.model.name
    if is_onnx_file(name):
        return build_model(name)
    check_several(data.class_names, data.name)
    channels, height, width = data.input_shape
    shape = (channels, width) if height == 1 else data.input_shape  # builders take signals without a height
    return build_model(name, shape, data.num_classes, config.training.seed)


def take_initial_weights(config: Config, graph: Graph) -> MatchReport | None:
    """Put the weights that a run begins with into its network; return what matched, ``None`` when there are none.

    Before the learner is made, so a sparse one can make room for every layer as those weights want it.

    Raises:
        ModelError: the file is bad, or its weights are those of another network.
    """
    from edgetrain.onnx_io import match_parameters

    if config.model.initial_weights is None:
        return None
    arrays, report = match_parameters(graph, config.model.initial_weights)
    graph.arrays |= arrays
    report.mark(graph)
    return report


def make_optimizer(config: Config) -> Optimizer:
    """Return the optimizer and schedule that the settings describe."""
    from edgetrain.optim import from_recipe

    return from_recipe(config.training)


def make_learner(config: Config, graph: Graph, profile: DeviceProfile) -> Learner:
    """Return a learner with the settings of a run.

    Raises:
        MemoryBudgetError: the plan needs more than the budget.
    """
    from edgetrain.learner import Learner

    device = config.device
    return Learner(
        graph, profile=profile, batch_size=device.batch_size, seed=config.training.seed, threads=device.threads,
        memory_budget=round(device.memory_budget_mib * MIB), optimizer=make_optimizer(config),
        label_smoothing=config.training.label_smoothing, instance_filter=config.methods.filter,
        sparsity=config.methods.sparsity, error_pruning=config.methods.error_pruning,
    )  # fmt: skip


def with_usable_methods(config: Config, by_recipe: Collection[str]) -> tuple[Config, list[str]]:
    """Leave out the methods of a recipe that have nothing to do in the network of a run.

    A recipe is for most networks; a method that somebody named is refused when the learner is made.

    Args:
        config: the settings.
        by_recipe: the kinds of methods that a recipe chose.

    Returns:
        The settings, and what was left out and why, a sentence each.
    """
    from edgetrain.catalog import build_model

    texts = {kind: text for kind, text in asdict(config.methods).items() if kind in by_recipe and text != NONE}
    left_out: list[str] = []
    if not texts:
        return config, left_out
    graph = build_model(config.model.name)  # the shape of the data does not change the kinds of layers
    for kind, text in texts.items():
        try:
            _check_suits(kind, text, graph)
        except UsageError as error:
            reason = str(error).split("; expected", 1)[0]  # the rest is advice to somebody who asked for it
            left_out.append(f"{ARGUMENTS[kind].replace('_', ' ')} {text} of the recipe is left out: {reason}")
            config = replace(config, methods=replace(config.methods, **{kind: NONE}))
    return config, left_out


def _check_suits(kind: str, text: str, graph: Graph) -> None:
    """Refuse a method that has nothing to do in a network.

    Raises:
        UsageError: it has not.
    """
    from edgetrain.autodiff import training_graph
    from edgetrain.pruning import check_error_maps
    from edgetrain.sparsity.topology import check_layers

    policy = parse_policy(kind, text)
    if kind == "filter":
        policy.check_network(graph)
    elif kind == "sparsity":
        check_layers(policy, graph)
    else:
        check_error_maps(policy, training_graph(graph))


def load_trained(source: str, threads: int | None = None, best: bool = False) -> tuple[Learner, str]:
    """Return a learner from a run folder, a checkpoint or an .onnx file, and the name of the file it came from.

    Raises:
        UsageError: nothing of the kind is there.
        ModelError: the file is damaged or not supported.
    """
    path = Path(source)
    if path.is_dir():
        path = _checkpoint_of(open_run(path), best)
    if path.suffix.lower() == ".onnx":
        return _inference_only(path, threads), str(path)
    if path.suffix != ".safetensors":
        expected = "expected a run folder (runs/fit-1), a checkpoint (.safetensors) or an .onnx file"
        raise UsageError(f"{path}: {'of unknown kind' if path.exists() else 'no such file'}; {expected}")
    learner = load_checkpoint(path)
    if threads is not None:
        learner.threads = threads
    return learner, str(path)


def load_for(graph: Graph, source: str, split: str | None) -> Dataset:
    """Return labelled data in the shape that a model takes; images in folders are resized to it.

    They may lack classes of the model; folders with the names of its classes have its labels.

    Raises:
        DataError, UsageError: the source is bad, or its classes are not those of the model.
    """
    dataset = load_unlabelled(graph, source, split)
    check_classes(graph, dataset)
    return dataset


def load_unlabelled(graph: Graph, source: str, split: str | None) -> Dataset:
    """Return the same for a use that does not read the labels: any classes will do.

    Raises:
        DataError, UsageError: the source is bad.
    """
    chosen = split or default_split(source)
    options = image_options(source, graph.input_shape)
    return load_dataset(source, split=chosen, class_names=graph.class_names, **options)


def default_split(source: str) -> str:
    """Return the split to judge a trained model on: "test", "validation", or the only one there is.

    Raises:
        DataError: the source is missing or of no known format.
    """
    splits = available_splits(source)
    return _judging_split(splits) or splits[0]


def _judging_split(splits: Collection[str]) -> str | None:
    """Return which of the splits models are judged on, ``None`` where there is but one for training."""
    return next((name for name in ("test", "validation") if name in splits), None)


def check_several(class_names: tuple[str, ...], source: str) -> None:
    """Refuse data of one class: there is nothing to tell apart, and no loss for a network with one output.

    Raises:
        DataError: there are not two classes.
    """
    if len(class_names) < 2:
        raise DataError(
            f"data set '{source}' has one class ({', '.join(class_names)}), expected at least two to tell apart; add "
            "instances of another"
        )


def check_classes(graph: Graph, dataset: Dataset | InstanceSource) -> None:
    """Refuse data whose classes are named differently: label 3 would mean something else.

    Numbers are no names: labels without any mean the model's classes in their order, and any names but numbers will do
    for a model that has none.

    Raises:
        DataError: the names differ.
    """
    known, found = graph.class_names, dataset.class_names
    numbers = tuple(str(label) for label in range(len(found)))
    unnamed = known == tuple(map(str, range(len(known)))) and not any(name.isdecimal() for name in found)
    if known and found not in (known, numbers) and not unnamed:
        kind = "data set" if isinstance(dataset, Dataset) else "stream"
        more = [name for name in found if name not in known]
        differs = f": {more[0]!r} is none of them" if more else " in the same order"
        raise DataError(
            f"{kind} '{dataset.name}' has the classes {', '.join(found)}, but the model was trained on "
            f"{', '.join(known)}; use data with the same classes{differs}"
        )


def image_options(source: str, shape: Shape) -> dict[str, Any]:
    """Return how to bring a folder of images to the model's shape; other formats are taken as they are.

    Raises:
        DataError: a folder of no known format.
    """
    if len(shape) != 3 or not (Path(source).is_dir() and is_image_folder(Path(source))):
        return {}
    return {"image_size": (shape[1], shape[2]), "channels": shape[0]}


def _inference_only(path: Path, threads: int | None) -> Learner:
    from edgetrain.learner import Learner
    from edgetrain.onnx_io import load_onnx

    return Learner(load_onnx(path), profile="host", threads=threads)


def _checkpoint_of(run: Run, best: bool) -> Path:
    path = run.best if best else run.last
    if not path.exists():
        raise UsageError(without_checkpoint(run, path))
    return path
