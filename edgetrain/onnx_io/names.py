"""Names that edgetrain writes into ONNX files and recognises when it reads them back."""

from __future__ import annotations

PRODUCER = "edgetrain"
BATCH = "batch"
CLASS_NAMES = "class_names"
# Tells of a file that looks like one of Keras whether its input has the channels last.
CHANNELS_LAST = "channels_last"
PROBABILITIES = "probabilities"
NORMALIZATION = "edgetrain.normalization"
SUBTRACT_MEAN = f"{NORMALIZATION}.subtract_mean"
DIVIDE_BY_STD = f"{NORMALIZATION}.divide_by_std"
# Ends the name of the product with the slope of a PRelu.
SLOPING = "sloping"
