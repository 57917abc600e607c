"""Windows: the sizes of convolutions and pools, worked out once from attributes and shapes."""

from __future__ import annotations

from dataclasses import dataclass

from edgetrain.arrays import map_sizes
from edgetrain.errors import GraphError
from edgetrain.graph import Node, Shape, Value
from edgetrain.ops.registry import Border, describe

Pair = tuple[int, int]


@dataclass(frozen=True)
class Window:
    """A window sliding over maps; a 1-D window has one row. Sizes in pixels, ``pads`` top, left, bottom, right."""

    kernel: Pair
    strides: Pair
    dilations: Pair
    pads: Border
    size: Pair
    out: Pair

    @property
    def border(self) -> Border:
        """Zeros that the windows touch around the map."""
        far = [
            (o - 1) * s + (k - 1) * d - p - (n - 1)
            for o, s, k, d, p, n in zip(
                self.out, self.strides, self.kernel, self.dilations, self.pads[:2], self.size, strict=True
            )
        ]
        return (self.pads[0], self.pads[1], max(0, far[0]), max(0, far[1]))

    @property
    def taps(self) -> list[Pair]:
        """Kernel positions in ONNX order."""
        return [(i, j) for i in range(self.kernel[0]) for j in range(self.kernel[1])]


def window_of(node: Node, x: Value, kernel: Shape) -> Window:
    """Work out a node's window over its input ``x``; ``kernel`` has one or two sizes.

    Raises:
        GraphError: a missing or wrong attribute, or a window larger than the padded map.
    """
    rank = len(kernel)
    if len(x.shape) != rank + 1 or rank not in (1, 2):
        raise GraphError(f"{describe(node)}: the input must be (N, C, W) or (N, C, H, W) and fit the kernel {kernel}")
    strides = _sizes(node, "strides", rank, 1)
    dilations = _sizes(node, "dilations", rank, 1)
    size = x.shape[1:]
    begin, end = _pads(node, size, kernel, strides, dilations)
    out = []
    for axis in range(rank):
        reach = (kernel[axis] - 1) * dilations[axis] + 1
        room = size[axis] + begin[axis] + end[axis] - reach
        if room < 0:
            raise GraphError(
                f"{describe(node)}: a kernel of {kernel[axis]} (dilation {dilations[axis]}) does not fit into"
                f" {size[axis]} pixels padded by {begin[axis]} and {end[axis]}; use a larger input or more padding"
            )
        out.append(_steps(node, room, strides[axis], size[axis] + begin[axis]))
    return Window(
        _two(kernel, 1), _two(strides, 1), _two(dilations, 1), (*_two(begin, 0), *_two(end, 0)), _two(size, 1),
        _two(tuple(out), 1),
    )  # fmt: skip


def _steps(node: Node, room: int, stride: int, inside: int) -> int:
    """Number of window positions; with ceil_mode a last one that starts inside the map or its left padding counts."""
    if not node.get("ceil_mode", 0):
        return room // stride + 1
    steps = -(-room // stride) + 1
    return steps - 1 if (steps - 1) * stride >= inside else steps


def _two(sizes: Shape, default: int) -> Pair:
    return (default, sizes[0]) if len(sizes) == 1 else (sizes[0], sizes[1])


def _sizes(node: Node, attribute: str, rank: int, default: int) -> Shape:
    sizes = tuple(int(n) for n in node.get(attribute) or [default] * rank)
    if len(sizes) != rank or min(sizes) < 1:
        raise GraphError(f"{describe(node)}: {attribute}={list(sizes)}, expected {rank} numbers of at least 1")
    return sizes


def _pads(node: Node, size: Shape, kernel: Shape, strides: Shape, dilations: Shape) -> tuple[Shape, Shape]:
    rank, auto = len(kernel), node.get("auto_pad", "NOTSET")
    auto = auto.decode() if isinstance(auto, bytes) else auto
    if auto in ("NOTSET", ""):
        pads = tuple(int(n) for n in node.get("pads") or [0] * 2 * rank)
        if len(pads) != 2 * rank or min(pads) < 0:
            raise GraphError(f"{describe(node)}: pads={list(pads)}, expected {2 * rank} numbers of at least 0")
        return pads[:rank], pads[rank:]
    if auto == "VALID":
        return (0,) * rank, (0,) * rank
    if auto not in ("SAME_UPPER", "SAME_LOWER"):
        raise GraphError(f"{describe(node)}: auto_pad={auto}, expected NOTSET, VALID, SAME_UPPER or SAME_LOWER")
    steps = [-(-n // s) for n, s in zip(size, strides, strict=True)]
    total = [
        max(0, (o - 1) * s + (k - 1) * d + 1 - n)
        for o, s, k, d, n in zip(steps, strides, kernel, dilations, size, strict=True)
    ]
    small, large = tuple(t // 2 for t in total), tuple(t - t // 2 for t in total)
    return (small, large) if auto == "SAME_UPPER" else (large, small)


def out_shape(channels: int, window: Window, rank: int) -> Shape:
    """Return the per-sample output shape ``(channels, [rows,] columns)``."""
    return (channels, *window.out[2 - rank :])


def channels_of(value: Value) -> int:
    """Number of channels of a batched value."""
    return map_sizes(value.shape)[0]
