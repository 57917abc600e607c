"""The time as a row of a program: between two rows it tells what the first one took, threads' waiting included."""

from __future__ import annotations

from typing import Any

from numba import types

from edgetrain.kernels.registry import Body, kernel
from edgetrain.kernels.simd import load_i64

# clock_gettime answers seconds and nanoseconds as two int64 and takes about 0.03 us; the processor's own cycle
# counter may not be read by programs on ARM.
_MONOTONIC = 1
# Any: numba describes its types as things that are called without arguments.
_int32: Any = types.int32
_clock_gettime: Any = types.ExternalFunction("clock_gettime", _int32(_int32, types.int64))


@kernel("time")
def stamp() -> Body:
    """Write seconds and nanoseconds of the monotonic clock, two int64; one job."""

    def body(arguments: int, first: int, last: int) -> None:
        _clock_gettime(_MONOTONIC, load_i64(arguments))

    return body
