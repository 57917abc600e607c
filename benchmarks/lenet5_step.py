"""Time LeNet-5 training steps of edgetrain and of PyTorch, taking turns, and print the ratio.

Usage: python benchmarks/lenet5_step.py [BATCH_SIZE [THREADS]]
"""

import sys

from edgetrain.bench import Case, compare, ratio


def main(batch_size: int = 32, threads: int = 2) -> None:
    """Print the median of every contender and the ratio to PyTorch's better memory format."""
    timings = compare(Case("lenet5", batch_size, threads)).timings
    for timing in timings:
        peak = timing.resident_bytes / 2**20
        print(f"{timing.contender:22s} {timing.median * 1e3:8.3f} ms/step, peak {peak:.0f} MiB")
    print(f"ratio {ratio(timings):.2f} (batch {batch_size}, {threads} threads, {len(timings[0].seconds)} steps)")


if __name__ == "__main__":
    main(*(int(argument) for argument in sys.argv[1:]))
