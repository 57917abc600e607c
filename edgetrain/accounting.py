"""What a training step did, and what each method saved. Plain numbers.

Operations are multiply-accumulates of convolutions, fully connected layers and ``Mul``, forward and backward.
"""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(frozen=True)
class StepResult:
    """What one training step did, or one call of ``observe``.

    Attributes:
        loss: mean before the update, over the batch; NaN when nothing was trained or predicted.
        correct: samples whose largest output was the label's.
        instances_seen, instances_trained: samples handed in, and samples trained on.
        macs_dense, macs_done: multiply-accumulates that training on everything densely needs, and those executed.
        seconds: wall-clock time, without the wait for compilers.
        instances_kept: samples that the instance filter let pass; they are trained on when a micro-batch is full.
        instances_uncertain: rejected samples that got a forward pass of the network, for a label of the filter.
        macs_selection: the part of ``macs_done`` that choosing instances took: the filter's own network, its training,
            and forward passes for labels.
        saved_filter, saved_error_maps, saved_weights, saved_activations: multiply-accumulates saved by each method;
            ``macs_dense - macs_done`` is their sum. The filter's cost is taken off its share, which may be negative.
    """

    loss: float
    correct: int
    instances_seen: int
    instances_trained: int
    macs_dense: int
    macs_done: int
    seconds: float
    instances_kept: int = 0
    instances_uncertain: int = 0
    macs_selection: int = 0
    saved_filter: int = 0
    saved_error_maps: int = 0
    saved_weights: int = 0
    saved_activations: int = 0


# Where methods save operations; "saved_<name>" of every record tells how many.
SAVERS = tuple(item.name.removeprefix("saved_") for item in fields(StepResult) if item.name.startswith("saved_"))


def left_out(count: int) -> StepResult:
    """Return what is counted of so many instances that nothing can be made of: that they were seen."""
    return StepResult(float("nan"), 0, count, 0, macs_dense=0, macs_done=0, seconds=0.0, instances_kept=0)
