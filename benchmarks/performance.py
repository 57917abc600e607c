"""Time training steps of edgetrain and PyTorch on an idle machine, and write docs/performance.md.

Usage:
    python benchmarks/performance.py                                 everything that is still missing
    python benchmarks/performance.py --only resnet20 --batches 32    some cells
    python benchmarks/performance.py --again                         measure those cells anew
    python benchmarks/performance.py --document                      the document from the stored results alone

Every result is stored in benchmarks/results/performance.json as soon as it is known, so an interrupted run goes on
where it stopped. Cells during which something else kept the machine busy are marked and measured again by the next run.
"""

import argparse
import datetime
import json
import os
import sys
import time
from collections import defaultdict
from importlib import metadata
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parent))

from performance_document import KERNEL_KINDS, KERNEL_SIZES, document

from edgetrain import bench
from edgetrain.hostinfo import host_facts

RESULTS = Path(__file__).parent / "results" / "performance.json"
DOCUMENT = Path(__file__).parent.parent / "docs" / "performance.md"
_MACHINE = ("architecture", "cpu", "cores", "simd", "ram_mib")
_START_BATCH, _KERNEL_CASE = 32, bench.Case("resnet20", 32, 1)


def main() -> None:
    """Measure what is missing and write the document."""
    arguments = _arguments()
    stored = load()
    if not arguments.document:
        contenders = bench.available((*bench.DEFAULT_CONTENDERS, *arguments.peers))
        stored["machine"], stored["versions"] = machine(), versions()
        measure_cases(stored, arguments, contenders)
        measure_start_up(stored, arguments, contenders)
        measure_kernels(stored, arguments)
    DOCUMENT.write_text(document(stored), encoding="utf-8")
    print(f"written: {DOCUMENT}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=bench.MODELS, choices=bench.MODELS, metavar="MODEL")
    parser.add_argument("--batches", nargs="+", type=int, default=bench.BATCH_SIZES)
    parser.add_argument("--threads", nargs="+", type=int, default=bench.THREADS)
    parser.add_argument("--peers", nargs="+", default=(), choices=["jax"], help="contenders besides PyTorch")
    parser.add_argument("--turns", type=int, default=bench.TURNS)
    parser.add_argument("--again", action="store_true", help="measure cells that have a result too")
    parser.add_argument("--document", action="store_true", help="write the document, measure nothing")
    return parser.parse_args()


def load() -> dict:
    """Return the stored results."""
    empty = {"machine": {}, "versions": {}, "cases": {}, "start_up": {}, "kernels": {}}
    return {**empty, **json.loads(RESULTS.read_text())} if RESULTS.exists() else empty


def store(stored: dict, part: str, key: str, result: dict, shown: str) -> None:
    """Keep one result, in the file at once."""
    stored[part][key] = {**result, "date": datetime.datetime.now(datetime.UTC).date().isoformat()}
    RESULTS.parent.mkdir(exist_ok=True)
    draft = RESULTS.with_suffix(".tmp")
    draft.write_text(json.dumps(_rounded(stored), indent=1) + "\n")
    os.replace(draft, RESULTS)
    busy = " (machine busy)" * result.get("busy", False)
    print(f"{time.strftime('%H:%M:%S')} {part} {key}: {shown}{busy}", flush=True)


def machine() -> dict:
    """Return what kind of machine this is; nothing that names it."""
    facts = host_facts()
    return {key: facts[key] for key in _MACHINE}


def versions() -> dict:
    """Return the versions of what takes part."""
    names = ("edgetrain", "numpy", "numba", "llvmlite", "torch", "jax")
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
