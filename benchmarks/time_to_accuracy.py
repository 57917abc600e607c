"""Seconds until LeNet-5 first reaches an accuracy on the full Fashion-MNIST: edgetrain against PyTorch.

Usage:
    python benchmarks/time_to_accuracy.py run own      every recipe with one seed, the fastest with three
    python benchmarks/time_to_accuracy.py run torch
    python benchmarks/time_to_accuracy.py time own     seconds of a step, alone on the machine
    python benchmarks/time_to_accuracy.py time torch
    python benchmarks/time_to_accuracy.py document

Both sides are tuned alike: on the same grid of recipes (batch size, peak learning rate, length of the one-cycle
schedule), and each is represented by the recipe with the shortest median time among those whose every seed gets there.
Time is the number of training steps until then times the median time of a step: so it does not depend on what else
the machine did, nor on how often accuracy was looked at (four times in an epoch, on the whole test set). PyTorch gets
whole batches as arrays, and the better of its memory formats. Every training is one file in
benchmarks/results/time_to_accuracy/; what is there is not done again.
"""

import argparse
import itertools
import json
import math
import statistics
import time
from pathlib import Path

import numpy as np
import torch

import edgetrain as et
from edgetrain.bench_torch import torch_module
from edgetrain.data import Dataset, batches, load_dataset

RESULTS = Path(__file__).parent / "results" / "time_to_accuracy"
DOCUMENT = Path(__file__).parent.parent / "docs" / "time_to_accuracy.md"
DATA = "/usr/share/datasets/fashion-mnist"
TARGET = 0.90
EVALUATIONS = 4  # per epoch
FINALISTS = 5  # recipes that are trained with more than one seed
BATCH_SIZES, RATES, EPOCHS = (16, 32, 64), (0.025, 0.05, 0.1), (2, 3, 4)


def recipes() -> list[dict]:
    """Return the grid that both sides are tuned on."""
    return [{"batch_size": b, "lr": r, "epochs": e} for b, r, e in itertools.product(BATCH_SIZES, RATES, EPOCHS)]


COLUMNS = ("", "recipes tried", "best recipe", "seeds", "threads", "ms per step", "median seconds", "all")


class Own:
    """edgetrain."""

    def __init__(self, recipe: dict, training: Dataset, seed: int, threads: int) -> None:
        self.learner = et.Learner(et.models.lenet5(seed=seed), batch_size=recipe["batch_size"], seed=seed,
                                  threads=threads, optimizer=optimizer_of(recipe, training))  # fmt: skip
        self.learner.graph.normalization = et.Normalization(*training.statistics())
        x, y = training.take(np.arange(recipe["batch_size"]))
        self.learner.gradients(x, y)  # compiles

    def step(self, x: np.ndarray, y: np.ndarray) -> None:
        """Train on a batch."""
        self.learner.partial_fit(x, y)

    def accuracy(self, x: np.ndarray, y: np.ndarray) -> float:
        """Return the accuracy."""
        return self.learner.score(x, y)


class Torch:
    """PyTorch, with its own layers, loss and optimizer."""

    def __init__(self, recipe: dict, training: Dataset, seed: int, threads: int) -> None:
        torch.set_num_threads(threads)
        torch.manual_seed(seed)
        self.module = torch_module(et.models.lenet5(seed=seed)).to(memory_format=torch.channels_last)
        for layer in self.module.layers:
            if hasattr(layer, "reset_parameters"):
                layer.reset_parameters()
        self.own, self.count = optimizer_of(recipe, training), 0
        decayed = [p for p in self.module.parameters() if p.dim() > 1]
        other = [p for p in self.module.parameters() if p.dim() <= 1]
        self.optimizer = torch.optim.SGD(
            [{"params": decayed, "weight_decay": self.own.weight_decay}, {"params": other, "weight_decay": 0.0}],
            lr=self.own.lr, momentum=self.own.momentum, nesterov=self.own.nesterov,
        )  # fmt: skip
        self.mean, self.std = (torch.from_numpy(a.reshape(1, -1, 1, 1)) for a in training.statistics())

    def step(self, x: np.ndarray, y: np.ndarray) -> None:
        """Train on a batch."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.own.lr_at(self.count)
        self.count += 1
        self.optimizer.zero_grad()
        out = self.module((torch.from_numpy(x) - self.mean) / self.std)
        torch.nn.functional.cross_entropy(out, torch.from_numpy(y)).backward()
        self.optimizer.step()

    def accuracy(self, x: np.ndarray, y: np.ndarray) -> float:
        """Return the accuracy."""
        with torch.no_grad():
            parts = np.array_split(np.arange(len(x)), 20)
            found = [self.module((torch.from_numpy(x[i]) - self.mean) / self.std).argmax(1).numpy() for i in parts]
        return float((np.concatenate(found) == y).mean())


def optimizer_of(recipe: dict, training: Dataset) -> et.SGD:
    """Return the optimizer that both sides use."""
    steps = recipe["epochs"] * math.ceil(len(training) / recipe["batch_size"])
    schedule = et.Schedule("one_cycle", total_steps=steps)
    return et.SGD(lr=recipe["lr"], momentum=0.9, nesterov=True, weight_decay=5e-4, decay_bias_and_norm=False,
                  schedule=schedule)  # fmt: skip


def train(side: str, recipe: dict, seed: int, training: Dataset, test: tuple) -> dict:
    """Train until the target is reached; return the steps (``None`` if it never was) and all evaluations."""
    contender = SIDES[side](recipe, training, seed, 1)
    every = math.ceil(math.ceil(len(training) / recipe["batch_size"]) / EVALUATIONS)
    evaluations, number = [], 0
    for epoch in range(recipe["epochs"]):
        made = batches(training, recipe["batch_size"], seed=seed, epoch=epoch)
        while part := list(itertools.islice(made, every)):
            for x, y in part:
                contender.step(x, y)
            number += len(part)
            evaluations.append((number, contender.accuracy(*test)))
            if evaluations[-1][1] >= TARGET:
                return {"steps": number, "evaluations": evaluations}
    return {"steps": None, "evaluations": evaluations}


def run(side: str, seeds: int) -> None:
    """Do what is missing: all recipes with seed 0, then the fastest with the other seeds."""
    training, held_out = (load_dataset(DATA, split=split) for split in ("train", "test"))
    test = held_out.take(np.arange(len(held_out)))
    RESULTS.mkdir(parents=True, exist_ok=True)
    for recipe in recipes():
        _run_one(side, recipe, 0, training, test)
    found = {key: results[0]["steps"] for key, results in stored(side).items() if results[0]["steps"]}
    step = seconds_per_step(side)
    fastest = sorted(found, key=lambda key: found[key] * step.get(key[0], 1.0))[:FINALISTS]
    for seed, key in itertools.product(range(1, seeds), fastest):
        _run_one(side, dict(zip(("batch_size", "lr", "epochs"), key, strict=True)), seed, training, test)


def _run_one(side: str, recipe: dict, seed: int, training: Dataset, test: tuple) -> None:
    path = RESULTS / f"{side}-b{recipe['batch_size']}-lr{recipe['lr']}-e{recipe['epochs']}-{seed}.json"
    if path.exists():
        return
    result = train(side, recipe, seed, training, test)
    path.write_text(json.dumps({"side": side, "seed": seed, "target": TARGET, **recipe, **result}, indent=1) + "\n")
    print(path.stem, result["steps"], flush=True)


def measure(side: str, threads: int, rounds: int = 7, steps: int = 60) -> None:
    """Store the median seconds of a step for every batch size."""
    training = load_dataset(DATA, split="train")
    RESULTS.mkdir(parents=True, exist_ok=True)
    table = {}
    for size in BATCH_SIZES:
        contender = SIDES[side]({"batch_size": size, "lr": 0.01, "epochs": 100}, training, 0, threads)
        part = list(itertools.islice(batches(training, size, seed=0, epoch=0), steps))
        seconds = []
        for _ in range(rounds):
            start = time.perf_counter()
            for x, y in part:
                contender.step(x, y)
            seconds.append((time.perf_counter() - start) / steps)
        table[str(size)] = statistics.median(seconds[1:])
        print(f"{side} batch {size}: {1e3 * table[str(size)]:.3f} ms per step, {threads} threads", flush=True)
    path = RESULTS / f"seconds-{side}.json"
    path.write_text(json.dumps({"threads": threads, "seconds_per_step": table}, indent=1) + "\n")


def seconds_per_step(side: str) -> dict[int, float]:
    """Return the measured seconds by batch size."""
    path = RESULTS / f"seconds-{side}.json"
    table = json.loads(path.read_text())["seconds_per_step"] if path.exists() else {}
    return {int(size): seconds for size, seconds in table.items()}


def stored(side: str) -> dict[tuple, list[dict]]:
    """Return the results of a side by recipe, seed 0 first."""
    found: dict[tuple, list[dict]] = {}
    for path in sorted(RESULTS.glob(f"{side}-b*.json")):
        result = json.loads(path.read_text())
        found.setdefault((result["batch_size"], result["lr"], result["epochs"]), []).append(result)
    return {key: sorted(results, key=lambda r: r["seed"]) for key, results in found.items()}


SIDES = {"own": Own, "torch": Torch}


def write_document() -> None:
    """Generate the document from what is stored."""
    lines = ["# Time to accuracy", "", "Generated by `benchmarks/time_to_accuracy.py document`; do not edit.", "",
             f"Training time until LeNet-5 first reaches {100 * TARGET:.1f} % on the test set of Fashion-MNIST: steps "
             f"until then (looked at {EVALUATIONS} times in an epoch) times the median time of a step. One grid of "
             f"recipes for both sides: batch size {BATCH_SIZES}, peak learning rate {RATES}, length of a one-cycle "
             f"schedule {EPOCHS} epochs. A side is represented by the recipe with the shortest median.", "",
             f"| {' | '.join(COLUMNS)} |", "|" + "---|" * len(COLUMNS)]  # fmt: skip
    best = {}
    for side, name in (("own", "edgetrain"), ("torch", "PyTorch")):
        row, best[side] = _row(side, name)
        lines.append(row)
    if all(best.values()):
        lines += ["", f"edgetrain gets there {best['torch'] / best['own']:.1f} times sooner."]
    DOCUMENT.write_text("\n".join([*lines, ""]))


def _row(side: str, name: str) -> tuple[str, float | None]:
    """Return a side's row and its median seconds, ``None`` when something is missing."""
    found, step = stored(side), seconds_per_step(side)
    seeds = max(map(len, found.values()), default=0)
    steps = {key: [r["steps"] for r in results] for key, results in found.items() if len(results) == seeds}
    times = {key: [n * step[key[0]] for n in numbers] for key, numbers in steps.items() if None not in numbers and step}
    if not times:
        return f"| {name} | not measured: {len(found)} of {len(recipes())} recipes were trained | | | | | | |", None
    key = min(times, key=lambda k: statistics.median(times[k]))
    threads = json.loads((RESULTS / f"seconds-{side}.json").read_text())["threads"]
    listed = ", ".join(f"{t:.2f}" for t in times[key])
    median = statistics.median(times[key])
    cells = [name, f"{len(found)} of {len(recipes())}",
             f"batch {key[0]}, lr {key[1]}, {key[2]} epochs", seeds, threads, f"{1e3 * step[key[0]]:.2f}",
             f"{median:.2f}", listed]  # fmt: skip
    return f"| {' | '.join(map(str, cells))} |", median


def main() -> None:
    """Run, measure or write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "time", "document"))
    parser.add_argument("side", nargs="?", choices=("own", "torch"), default="own")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    if arguments.what == "run":
        run(arguments.side, arguments.seeds)
    elif arguments.what == "time":
        measure(arguments.side, arguments.threads)
    write_document()


if __name__ == "__main__":
    main()
