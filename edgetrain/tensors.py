"""States as tensors by name and plain data: what checkpoints store, and how parts of a state share one table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from numpy.typing import NDArray

Tensors = dict[str, NDArray[Any]]
State = tuple[Tensors, dict[str, Any]]


def put_under(prefix: str, tensors: Mapping[str, NDArray[Any]]) -> Tensors:
    """Return tensors with a prefix before every name, as ``stream/`` for those of a stream.

    Example:
        >>> import numpy as np
        >>> sorted(put_under("stream/", {"x": np.zeros(1), "filter/recent": np.zeros(2)}))
        ['stream/filter/recent', 'stream/x']
    """
    return {prefix + name: array for name, array in tensors.items()}


def taken_from(prefix: str, tensors: Mapping[str, NDArray[Any]]) -> Tensors:
    """Return the tensors whose names begin with a prefix, without it: what ``put_under`` was given.

    Example:
        >>> import numpy as np
        >>> sorted(taken_from("stream/", {"stream/x": np.zeros(1), "weights/fc.bias": np.zeros(2)}))
        ['x']
    """
    return {name.removeprefix(prefix): array for name, array in tensors.items() if name.startswith(prefix)}
