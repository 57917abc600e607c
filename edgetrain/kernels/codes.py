"""Compile-time codes of element-wise functions, apart from the kernels so that reading a graph needs no Numba."""

RELU, LEAKY_RELU, CLIP, SIGMOID, TANH, HARD_SIGMOID, HARD_SWISH, AFFINE = range(8)
ADD, MUL = range(2)
