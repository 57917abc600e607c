"""Built-in architectures: one file each, one builder function that returns a ``Graph``.

Every builder takes ``input_shape`` (without the batch dimension), ``num_classes``
and ``seed``; the output of the graph is the logits. Parameters are named as a
PyTorch ``state_dict`` of the same network would name them, and drawn from the same
families of distributions, so weights move between the two by name.

The files import each other relatively: the folder is ``models`` in the repository and
``edgetrain.models`` for Python.
"""

from __future__ import annotations

from .cnn1d import cnn1d
from .ds_cnn import ds_cnn
from .lenet5 import lenet5
from .mobilenet_v1 import mobilenet_v1
from .resnet import resnet

__all__ = ["cnn1d", "ds_cnn", "lenet5", "mobilenet_v1", "resnet"]
