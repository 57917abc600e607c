"""Compile-time codes of kernels, apart from the kernels so that reading a graph needs no Numba."""

RELU, LEAKY_RELU, CLIP, SIGMOID, TANH, HARD_SIGMOID, HARD_SWISH, AFFINE = range(8)
ADD, MUL = range(2)
# Which operands of a product are vectors of lanes. SAMPLES: lanes hold samples; the weight is one number. CHANNELS:
# lanes hold output channels; the input is one number. DEPTHWISE: lanes hold channels, both input's and output's.
SAMPLES, CHANNELS, DEPTHWISE = range(3)
