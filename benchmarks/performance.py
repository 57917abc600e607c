"""Time training steps of edgetrain and PyTorch on an idle machine, and write docs/performance.md.

Usage:
    python benchmarks/performance.py                                 everything that is still missing
    python benchmarks/performance.py --threads 2                     the half with two threads, start-up included
    python benchmarks/performance.py --threads 1                     the half with one thread, 1 to 2 threads included
    python benchmarks/performance.py --only resnet20 --batches 32    some cells
    python benchmarks/performance.py --parts decayed commands        some parts
    python benchmarks/performance.py --parts peers --peers tinygrad --threads 2 --batches 8 32
                                                                     a further peer, in the environment that has it
    python benchmarks/performance.py --again                         measure those cells anew
    python benchmarks/performance.py --document                      the document from the stored results alone

Every result is stored in benchmarks/results/*/performance.json as soon as it is known, so an interrupted run goes on
where it stopped. Cells during which something else kept the machine busy are marked and measured again by the next run.
Each half takes less than ten minutes on the machine of docs/performance.md.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parent))

import machines
from performance_document import KERNEL_KINDS, KERNEL_SIZES, document

from edgetrain import bench
from edgetrain.bench_load import Watch

RESULTS = machines.results_file("performance.json")
DOCUMENT = Path(__file__).parent.parent / "docs" / "performance.md"
_START_BATCH, _KERNEL_CASE, _SCALING = 32, bench.Case("resnet20", 32, 1), ("resnet20", 32)
_DECAYED = (bench.Case("lenet5", 32, 2), bench.Case("resnet20", 8, 2))
# What is measured when --threads has this number: the kernels have one thread, processes start as users start them.
_PARTS = {1: ("cases", "kernels", "scaling"), 2: ("cases", "start_up", "decayed", "commands")}
# Commands whose time a user notices; warmup with a kernel cache of its own, empty.
_COMMANDS = {
    "python": ("-c", ""), "import": ("-c", "import edgetrain"), "help": ("-m", "edgetrain", "--help"),
    "warmup": ("-m", "edgetrain", "warmup", "--quiet", "--json"),
}  # fmt: skip
_COMMAND_REPEATS = 7
_EVERY_PART = ("cases", "kernels", "scaling", "start_up", "decayed", "commands", "peers")


def main() -> None:
    """Measure what is missing and write the document."""
    arguments = _arguments()
    stored = load()
    if not arguments.document:
        contenders, parts = bench.available(), arguments.parts or parts_of(arguments.threads)
        if parts != ["peers"]:  # those have environments of their own, with other versions
            stored["machine"], stored["versions"] = machines.facts(), versions()
        measures = {
            "cases": lambda: measure_cases(stored, arguments, contenders),
            "start_up": lambda: measure_start_up(stored, arguments, contenders),
            "kernels": lambda: measure_kernels(stored, arguments),
            "scaling": lambda: measure_scaling(stored, arguments),
            "decayed": lambda: measure_decayed(stored, arguments),
            "commands": lambda: measure_commands(stored, arguments),
            "peers": lambda: measure_peers(stored, arguments),
        }
        for part in parts:
            measures[part]()
    DOCUMENT.write_text(document(machines.stored(RESULTS)), encoding="utf-8")
    print(f"written: {DOCUMENT}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=bench.MODELS, choices=bench.MODELS, metavar="MODEL")
    parser.add_argument("--batches", nargs="+", type=int, default=bench.BATCH_SIZES)
    parser.add_argument("--threads", nargs="+", type=int, default=bench.THREADS)
    parser.add_argument("--parts", nargs="+", choices=_EVERY_PART)
    parser.add_argument("--peers", nargs="+", choices=bench.PEERS, help="of the part peers [default: the installed]")
    parser.add_argument("--turns", type=int, default=bench.TURNS)
    parser.add_argument("--again", action="store_true", help="measure cells that have a result too")
    parser.add_argument("--document", action="store_true", help="write the document, measure nothing")
    return parser.parse_args()


def load() -> dict:
    """Return the stored results."""
    empty = {"machine": {}, "versions": {}, **{part: {} for part in _EVERY_PART}}
    return {**empty, **json.loads(RESULTS.read_text())} if RESULTS.exists() else empty


def parts_of(threads: Sequence[int]) -> list[str]:
    """Return what is measured for these numbers of threads, in order."""
    return list(dict.fromkeys(part for number in threads for part in _PARTS.get(number, ("cases",))))


def store(stored: dict, part: str, key: str, result: dict, shown: str) -> None:
    """Keep one result, in the file at once."""
    stored[part][key] = {**result, "date": machines.today()}
    machines.write(RESULTS, _rounded(stored))
    busy = " (machine busy)" * result.get("busy", False)
    print(f"{time.strftime('%H:%M:%S')} {part} {key}: {shown}{busy}", flush=True)


def versions() -> dict:
    """Return the versions of what takes part."""
    names = ("edgetrain", "numpy", "numba", "llvmlite", "torch")
    found = {distribution.metadata["Name"]: distribution.version for distribution in metadata.distributions()}
    python = ".".join(map(str, sys.version_info[:3]))
    return {"python": python} | {name: found[name] for name in names if name in found}


def measure_cases(stored: dict, arguments: argparse.Namespace, contenders: list[str]) -> None:
    """Time the cells of the matrix."""
    for model in arguments.only:
        for batch_size in arguments.batches:
            for threads in arguments.threads:
                case = bench.Case(model, batch_size, threads)
                key = f"{model}/{batch_size}/{threads}"
                if _needed(stored["cases"].get(key), arguments):
                    result = bench.measure(case, contenders, arguments.turns)
                    store(stored, "cases", key, result, f"ratio {result['ratio'] or 0:.2f}")


def measure_start_up(stored: dict, arguments: argparse.Namespace, contenders: list[str]) -> None:
    """Time the starts of processes, with as many threads as wanted at most."""
    for model in arguments.only:
        if _needed(stored["start_up"].get(model), arguments):
            case = bench.Case(model, _START_BATCH, max(arguments.threads))
            result = bench.start_up(case, contenders)
            shown = f"{result['edgetrain']['warm_seconds']:.2f} s, cold {result['edgetrain']['cold_seconds']:.2f} s"
            sizes = {"batch_size": _START_BATCH, "threads": case.threads}
            store(stored, "start_up", model, {**sizes, "contenders": result}, shown)


def measure_kernels(stored: dict, arguments: argparse.Namespace) -> None:
    """Time the convolutions of ResNet-20 inside its training step."""
    if "resnet20" in arguments.only and _needed(stored["kernels"].get("resnet20"), arguments):
        result = bench.time_ops(_KERNEL_CASE, arguments.turns)
        store(stored, "kernels", "resnet20", kernel_shares(result), "convolutions of ResNet-20")


def measure_scaling(stored: dict, arguments: argparse.Namespace) -> None:
    """Time a step with one and with two threads in one run."""
    model, batch_size = _SCALING
    key = f"{model}/{batch_size}"
    if model in arguments.only and _needed(stored["scaling"].get(key), arguments):
        result = bench.scaling(model, batch_size, arguments.turns)
        store(stored, "scaling", key, result, f"gain {result['gain']:.2f}, sgemm {result['sgemm_gain']:.2f}")


def measure_decayed(stored: dict, arguments: argparse.Namespace) -> None:
    """Time steps on weights that are subnormal numbers."""
    for case in _DECAYED:
        key = f"{case.model}/{case.batch_size}/{case.threads}"
        if case.model in arguments.only and _needed(stored["decayed"].get(key), arguments):
            result = bench.decayed(case, arguments.turns)
            store(stored, "decayed", key, result, f"ratio {result['ratio']:.2f}")


def measure_commands(stored: dict, arguments: argparse.Namespace) -> None:
    """Time commands from the start of the process to its end."""
    for name, words in _COMMANDS.items():
        if _needed(stored["commands"].get(name), arguments):
            repeats, watch = (1 if name == "warmup" else _COMMAND_REPEATS), Watch()
            runs = [run_command(words) for _ in range(repeats)]
            load = watch.load()
            result = {"seconds": median(seconds for seconds, _ in runs), "busy": bool(load and load.busy)}
            if name == "warmup":
                result["kernels"] = json.loads(runs[0][1])["compiled"]
            store(stored, "commands", name, result, f"{result['seconds']:.2f} s")


def measure_peers(stored: dict, arguments: argparse.Namespace) -> None:
    """Time further peers, each beside edgetrain alone."""
    for peer in arguments.peers or bench.available(bench.PEERS):
        for model in arguments.only:
            for batch_size in arguments.batches:
                for threads in arguments.threads:
                    key = f"{peer}/{model}/{batch_size}/{threads}"
                    if _needed(stored["peers"].get(key), arguments):
                        result = bench.against(peer, bench.Case(model, batch_size, threads), arguments.turns)
                        result["version"] = metadata.version(peer)
                        store(stored, "peers", key, result, result["left_out"] or f"ratio {result['ratio']:.2f}")


def run_command(words: Sequence[str]) -> tuple[float, str]:
    """Run Python with these arguments and an empty kernel cache; return the seconds and what it printed."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        done = subprocess.run(
            [sys.executable, *words], capture_output=True, text=True, check=True,
            env={**os.environ, "NUMBA_CACHE_DIR": folder},
        )  # fmt: skip
        return time.perf_counter() - start, done.stdout


def kernel_shares(result: dict) -> dict:
    """Return the median rate of each kind of convolution from ``bench.time_ops``, and the sgemm rate of that run."""
    rates = defaultdict(list)
    for op in result["ops"]:
        size = next((size for size in KERNEL_SIZES if op["shape"] == f"{size} -> {size}, 3x3"), None)
        if size and op["op_type"] in KERNEL_KINDS and op["gflops"]:
            rates[f"{size} {op['op_type']}"].append(op["gflops"])
    found = {name: {"gflops": median(values), "layers": len(values)} for name, values in rates.items()}
    return {"sgemm": result["sgemm"], "busy": result["busy"], "rates": found}


def _needed(result: dict | None, arguments: argparse.Namespace) -> bool:
    return arguments.again or result is None or result.get("busy", False)


def _rounded(value):
    """Return plain data with five digits per number: small files, readable differences."""
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(item) for item in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


if __name__ == "__main__":
    main()
