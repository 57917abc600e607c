"""Operators: one file per family, from simple to tricky; importing the package registers them all."""

from edgetrain.ops import (
    activation,
    arithmetic,
    conv,
    gradient_pruning,
    loss,
    normalization,
    pooled_gradient,
    pooling,
    product_grads,
    pruning,
    shape,
)
from edgetrain.ops.registry import NO_BORDER, Border, Op, describe, get_op, known_ops, register

__all__ = [
    "NO_BORDER",
    "Border",
    "Op",
    "activation",
    "arithmetic",
    "conv",
    "describe",
    "get_op",
    "gradient_pruning",
    "known_ops",
    "loss",
    "normalization",
    "pooled_gradient",
    "pooling",
    "product_grads",
    "pruning",
    "register",
    "shape",
]
