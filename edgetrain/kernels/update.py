"""Optimizer updates and the check before them; all on dense float32 arrays padded to whole vectors.

``settings``: the optimizer's numbers of the step, float32, at the places that ``codes`` names.
"""

from __future__ import annotations

import math

from edgetrain.kernels.codes import (
    ADAM_CORRECTION,
    ADAM_LR,
    AVERAGING,
    BETA1,
    BETA2,
    CLIP_NORM,
    DECOUPLED,
    EPSILON,
    GRADIENT_SCALE,
    LR,
    MOMENTUM,
    NESTEROV,
    REST1,
    REST2,
    STATUS,
    WEIGHT_DECAY,
)
from edgetrain.kernels.codes import UPDATE_JOB as JOB
from edgetrain.kernels.registry import Body, kernel
from edgetrain.kernels.simd import (
    arguments,
    broadcast,
    fma,
    load,
    load_f32,
    load_f64,
    sqrt,
    store,
    store_f32,
    store_f64,
    store_i64,
    sum_lanes,
)

# Lanes of a vector here; parameters are padded to a multiple of it. LeNet-5's update takes 6.8 us with 16, took 10
# us with 8 (2 threads, AVX-512, ``edgetrain bench --per-op``); narrower processors get several vectors.
WIDTH = 16
HALF = WIDTH // 2


@kernel("grad", "count", "partial")
def sum_of_squares() -> Body:
    """Write the sum of squares of each job's gradients as float64. Job: ``JOB`` floats."""

    def body(args: int, first: int, last: int) -> None:
        grad, count, partial = arguments(args, 3)
        for job in range(first, last):
            total = 0.0
            for start in range(job * JOB, min(count, (job + 1) * JOB), WIDTH):
                a = load(grad + 4 * start, HALF)
                b = load(grad + 4 * start + 4 * HALF, HALF)
                total += sum_lanes(fma(a, a, b * b))
            store_f64(partial + 8 * job, total)

    return body


@kernel("partial", "parts", "result", "settings", "sync")
def check_step() -> Body:
    """Set the status word if loss or gradient norm is not finite, else the gradient scale of norm clipping. One job.

    ``result``: float64 loss (read), correct, gradient norm (written). Clipping as
    ``torch.nn.utils.clip_grad_norm_``; a clip norm of 0 means none.
    """

    def body(args: int, first: int, last: int) -> None:
        partial, parts, result, settings, sync = arguments(args, 5)
        total = 0.0
        for part in range(parts):
            total += load_f64(partial + 8 * part)
        norm = math.sqrt(total)
        store_f64(result + 16, norm)
        healthy = math.isfinite(norm) and math.isfinite(load_f64(result))
        store_i64(sync + STATUS, 0 if healthy else 1)
        limit = load_f32(settings + 4 * CLIP_NORM)
        scale = limit / (norm + 1e-6) if limit > 0.0 else 1.0
        store_f32(settings + 4 * GRADIENT_SCALE, min(1.0, scale))

    return body


@kernel("weight", "grad", "velocity", "count", "settings", "decay")
def sgd() -> Body:
    """SGD with momentum as in ``torch.optim.SGD`` (no dampening). Job: ``JOB`` floats.

    ``decay`` is 1 where weight decay applies, else 0; ``velocity`` is 0 (no address) without momentum.
    """

    def body(args: int, first: int, last: int) -> None:
        weight, grad, velocity, count, settings, decay = arguments(args, 6)
        scale = broadcast(load_f32(settings + 4 * GRADIENT_SCALE), WIDTH)
        lr = broadcast(-load_f32(settings + 4 * LR), WIDTH)
        shrink = broadcast(load_f32(settings + 4 * WEIGHT_DECAY) * decay, WIDTH)
        momentum = broadcast(load_f32(settings + 4 * MOMENTUM), WIDTH)
        nesterov = load_f32(settings + 4 * NESTEROV) != 0.0
        for job in range(first, last):
            for i in range(job * JOB, min(count, (job + 1) * JOB), WIDTH):
                w = load(weight + 4 * i, WIDTH)
                g = fma(shrink, w, load(grad + 4 * i, WIDTH) * scale)
                if velocity != 0:
                    v = fma(momentum, load(velocity + 4 * i, WIDTH), g)
                    store(velocity + 4 * i, v)
                    g = fma(momentum, v, g) if nesterov else v
                store(weight + 4 * i, fma(lr, g, w))

    return body


@kernel("weight", "average", "count", "settings")
def average() -> Body:
    """Move the exponential average of the parameters towards the present ones. Job: ``JOB`` floats."""

    def body(args: int, first: int, last: int) -> None:
        weight, average, count, settings = arguments(args, 4)
        share = broadcast(load_f32(settings + 4 * AVERAGING), WIDTH)
        # The first step begins the average exactly, whatever was there: a resumed run must not differ by a rounding.
        known = broadcast(0.0 if load_f32(settings + 4 * AVERAGING) >= 1.0 else 1.0, WIDTH)
        for job in range(first, last):
            for i in range(job * JOB, min(count, (job + 1) * JOB), WIDTH):
                before = load(average + 4 * i, WIDTH) * known
                store(average + 4 * i, fma(share, load(weight + 4 * i, WIDTH) - before, before))

    return body


@kernel("weight", "grad", "first_moment", "second_moment", "count", "settings", "decay")
def adam() -> Body:
    """Adam and AdamW as in PyTorch (Kingma and Ba 2015; Loshchilov and Hutter 2019). Job: ``JOB`` floats."""

    def body(args: int, first: int, last: int) -> None:
        weight, grad, first_moment, second_moment, count, settings, decay = arguments(args, 7)
        scale = broadcast(load_f32(settings + 4 * GRADIENT_SCALE), WIDTH)
        shrink = load_f32(settings + 4 * WEIGHT_DECAY) * decay
        decoupled = load_f32(settings + 4 * DECOUPLED)
        coupled = broadcast(shrink * (1.0 - decoupled), WIDTH)
        keep = broadcast(1.0 - decoupled * load_f32(settings + 4 * LR) * shrink, WIDTH)
        b1, b2 = broadcast(load_f32(settings + 4 * BETA1), WIDTH), broadcast(load_f32(settings + 4 * BETA2), WIDTH)
        c1, c2 = broadcast(load_f32(settings + 4 * REST1), WIDTH), broadcast(load_f32(settings + 4 * REST2), WIDTH)
        epsilon = broadcast(load_f32(settings + 4 * EPSILON), WIDTH)
        lr = broadcast(-load_f32(settings + 4 * ADAM_LR), WIDTH)
        correction = broadcast(load_f32(settings + 4 * ADAM_CORRECTION), WIDTH)
        for job in range(first, last):
            for i in range(job * JOB, min(count, (job + 1) * JOB), WIDTH):
                w = load(weight + 4 * i, WIDTH)
                g = fma(coupled, w, load(grad + 4 * i, WIDTH) * scale)
                m = fma(b1, load(first_moment + 4 * i, WIDTH), c1 * g)
                v = fma(b2, load(second_moment + 4 * i, WIDTH), c2 * (g * g))
                store(first_moment + 4 * i, m)
                store(second_moment + 4 * i, v)
                store(weight + 4 * i, fma(lr, m / fma(sqrt(v), correction, epsilon), w * keep))

    return body
