"""Numbers that kernels and their callers agree on, apart from the kernels so that the callers need no Numba."""

RELU, LEAKY_RELU, CLIP, SIGMOID, TANH, HARD_SIGMOID, HARD_SWISH, AFFINE, ELU = range(9)
ADD, MUL = range(2)
# Which operands of a product are vectors of lanes. SAMPLES: lanes hold samples; the weight is one number. CHANNELS:
# lanes hold output channels; the input is one number. DEPTHWISE: lanes hold channels, both input's and output's.
# ROWS: as SAMPLES, but an output channel's weights are neighbours instead of a term's.
SAMPLES, CHANNELS, DEPTHWISE, ROWS = range(4)
# By what channels of an error map are chosen.
BY_ERROR, BY_ERROR_AND_WEIGHTS, BY_CHANCE = range(3)

ABSENT = -(2**31)  # in place of a byte offset: this column of a sparse weight takes no part
# Which part of a sparse weight only counts where its output channel is kept.
ALL_COUNT, FLAGGED_ROWS, FLAGGED_COLUMNS = range(3)
# What of a normalisation or of its gradient to compute. WHOLE: all. SUMS: the sums, and the input gradient of some
# channels. ERRORS: that of some channels, from sums that are there. By blocks of samples: PARTS: sums of each block;
# REST: what follows from them; KEPT: the input gradient of some channels.
WHOLE, SUMS, ERRORS, PARTS, REST, KEPT = range(6)
# What of a normalisation's output its gradient writes once more: nothing (0), all numbers, or the largest.
ALL, LARGEST = 1, 2

# A program: bytes of a row; sync words, one cache line each so that spinning threads do not disturb their neighbours.
ROW_BYTES = 32
ARRIVED, STATUS, TICKET, ORDER, SYNC_BYTES = 0, 64, 128, 192, 256

UPDATE_JOB = 4096  # floats per job of the kernels that go over all parameters
# Places of an optimizer's numbers in the float32 array ``settings``, which is filled before every step: ADAM_LR is
# lr / (1 - beta1^t), ADAM_CORRECTION 1 / sqrt(1 - beta2^t), REST1 and REST2 are 1 - beta1 and 1 - beta2, AVERAGING is 1
# minus the weight of the past. The last three are rounded once: 1 minus a float32 of 0.999 has an error of 1.3e-5.
(LR, WEIGHT_DECAY, MOMENTUM, NESTEROV, BETA1, BETA2, EPSILON, ADAM_LR, ADAM_CORRECTION, DECOUPLED, CLIP_NORM,
 GRADIENT_SCALE, REST1, REST2, AVERAGING, SETTINGS) = range(16)  # fmt: skip

STAMP_BYTES = 16  # what the kernel "stamp" writes: seconds and nanoseconds, int64

# What a layer that prunes remembers from step to step, a record of float32: share to keep, threshold (0: none yet), and
# the latest mean sizes of its gradients with their number.
DENSITY, THRESHOLD, MEANS, MEAN_COUNT, RECORD = 0, 1, 2, 7, 16
TALLY_BYTES = 16  # what a layer counted in a step: int64 kept, and all
