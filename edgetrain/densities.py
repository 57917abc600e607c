"""How layers share a density: of their weights, or of their channels."""

from __future__ import annotations

import math
from collections.abc import Mapping

Shapes = Mapping[str, tuple[int, ...]]


def uniform(shapes: Shapes, density: float) -> dict[str, float]:
    """Return the same density for all layers.

    Args:
        shapes: of the weights, by name.
        density: share of the weights of all layers together.
    """
    return dict.fromkeys(shapes, density)


def erdos_renyi_kernel(shapes: Shapes, density: float) -> dict[str, float]:
    """Return densities proportional to (sum of a weight's sizes) / (product of its sizes), by name.

    A layer that this would make denser than dense is dense, and the factor is solved again for the others, so that
    all layers together have the share ``density`` of their weights.

    Source: Evci, Gale, Menick, Castro, Elsen, "Rigging the Lottery", ICML 2020, section 3 (1), and the reference
    code's ``sparse_utils.get_mask_random`` and ``get_sparsities_erdos_renyi``.

    Args:
        shapes, density: as for ``uniform``.

    Example:
        >>> found = erdos_renyi_kernel({"a": (16, 16, 3, 3), "b": (64, 64, 3, 3)}, 0.1)
        >>> {name: round(share, 3) for name, share in found.items()}
        {'a': 0.376, 'b': 0.083}
    """
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    raw = {name: sum(shape) / sizes[name] for name, shape in shapes.items()}
    open_layers, wanted = set(shapes), density * sum(sizes.values())
    factor = 0.0
    while open_layers:
        factor = wanted / sum(raw[name] * sizes[name] for name in shapes if name in open_layers)
        largest = max(raw[name] for name in open_layers)
        if factor * largest < 1 - 1e-9:  # one that is rounded to almost 1 is dense, too
            break
        full = {name for name in open_layers if raw[name] == largest}
        wanted -= sum(sizes[name] for name in full)
        open_layers -= full
    return {name: factor * share if name in open_layers else 1.0 for name, share in raw.items()}


DISTRIBUTIONS = {"uniform": uniform, "erk": erdos_renyi_kernel}
