"""Built-in architectures: one file each, one builder function that returns a ``Graph``.

Every builder takes ``input_shape`` (without the batch dimension), ``num_classes``
and ``seed``; the output of the graph is the logits. Parameters are named as a
PyTorch ``state_dict`` of the same network would name them, and drawn from the same
families of distributions, so weights move between the two by name.
"""

from __future__ import annotations

from edgetrain.models.cnn1d import cnn1d
from edgetrain.models.ds_cnn import ds_cnn
from edgetrain.models.lenet5 import lenet5
from edgetrain.models.mobilenet_v1 import mobilenet_v1
from edgetrain.models.resnet import resnet

__all__ = ["cnn1d", "ds_cnn", "lenet5", "mobilenet_v1", "resnet"]
