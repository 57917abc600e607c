"""What a stream is made of: the network for its source, its instances, its test data."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgetrain.cli.config import Config, is_onnx_file
from edgetrain.cli.sources import check_classes, check_several, image_size_of, load_unlabelled
from edgetrain.data import Dataset, available_splits
from edgetrain.data.streaming import STANDARD_INPUT, InstanceSource, open_stream
from edgetrain.errors import DataError

if TYPE_CHECKING:
    from edgetrain.graph import Graph


def stream_source(config: Config, graph: Graph) -> InstanceSource:
    """Return the instances of a run, after a look at whether they fit the network.

    Raises:
        DataError: they do not, or the source is bad.
    """
    source = open_stream(
        config.data.source, graph.input_shape, graph.num_classes, graph.class_names, image_size_of(config)
    )
    expected = graph.input_shape if len(graph.input_shape) == 3 else (graph.input_shape[0], 1, *graph.input_shape[1:])
    if source.input_shape not in (None, expected):
        raise DataError(
            f"stream '{source.name}' has instances of shape {source.input_shape}, but the network '{graph.name}' "
            f"expects {expected}"
        )
    if len(source.class_names) > graph.num_classes:
        raise DataError(
            f"stream '{source.name}' has {len(source.class_names)} classes, but the network '{graph.name}' has "
            f"{graph.num_classes} outputs"
        )
    check_classes(graph, source)
    return source


def stream_graph(config: Config) -> Graph:
    """Build the network: for the shape and the classes that the source tells, or in its own shape.

    Raises:
        UsageError, ModelError, DataError: unknown or unsuitable model, or a bad source.
    """
    from edgetrain.catalog import build_model

    name = config.model.name
    if is_onnx_file(name) or config.data.source == STANDARD_INPUT:
        return build_model(name, seed=config.training.seed)
    shape = build_model(name).input_shape
    source = open_stream(config.data.source, (), 2, image_size=image_size_of(config))
    check_several(source.class_names, source.name)
    told = source.input_shape or shape
    fitted = (told[0], told[2]) if len(told) == 3 and told[1] == 1 and len(shape) == 2 else told
    return build_model(name, fitted, len(source.class_names), config.training.seed)


def test_data(config: Config, graph: Graph) -> Dataset | None:
    """Return the test data of a stream's source, if it has any, with images in the size that the network takes.

    Raises:
        DataError: they are damaged.
    """
    source = config.data.source
    if source == STANDARD_INPUT or "test" not in available_splits(source):
        return None
    return load_unlabelled(graph, source, "test")  # the source's classes were compared with the network's before
