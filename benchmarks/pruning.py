"""What pruned backward passes save: operations and time, against the dense step, side by side in one process.

Error maps and saved activations: ResNet-20 with CIFAR-10's shapes, batch 32, on padded images of Fashion-MNIST, another
batch in every step, from the 60th on. Gradients by chance: the backward pass of
networks of convolutions and Relu without batch normalisation, LeNet-5 and a plain one of six 3x3 convolutions, trained
for 60 steps on Fashion-MNIST first so that the gradients are realistic. Two threads. Every figure is a median over
rounds in which all variants take turns; of a whole step each round takes the fastest of three. "Exact zeros" are those
that a max pool and a Relu leave in an error map: skipping them is no method, and no operations count as saved.

"In proportion" is what a step would save if everything that the backward products run, transforms included, took as
much less time as they have fewer operations, and nothing else changed: the forward pass, normalisations, updates.

Usage:
    python benchmarks/pruning.py              measure what is not stored yet, and write docs/pruning.md
    python benchmarks/pruning.py --again      measure everything anew
    python benchmarks/pruning.py --document   write docs/pruning.md from the stored results
    python benchmarks/pruning.py --accuracy   train LeNet-5 and the plain network with gradient pruning, and store
"""

import argparse
import json
import statistics
import time
from contextlib import contextmanager, nullcontext
from pathlib import Path
from unittest import mock

import machines
import numpy as np

import edgetrain as et
from edgetrain import lowering_winograd, plans
from edgetrain.data import load_dataset
from edgetrain.graph import Graph
from edgetrain.pruning import ErrorPruning
from edgetrain.saved_activations import compress_activations

RESULTS, ACCURACY = machines.results_file("pruning.json"), Path(__file__).parent / "results" / "pruning_accuracy.json"
DOCUMENT = Path(__file__).parent.parent / "docs" / "pruning.md"
FULL = Path("/usr/share/datasets/fashion-mnist")
ROUNDS, WARM_UP, BATCH, THREADS = 25, 60, 32, 2
KEEPS, RATES, DENSITIES = (0.7, 0.5, 0.3), (0.5, 0.75, 0.8, 0.9), (0.3, 0.2, 0.1)
# Images and seeds of the trained networks.
EPOCHS, TRAINED = 5, {"LeNet-5": (60_000, (0, 1, 2)), "plain": (15_000, (0,))}


class Compressed(ErrorPruning):
    """Weight gradients of all convolutions from the largest vectors of their inputs."""

    def __init__(self, density: float) -> None:
        self.density = density

    def rewrite(self, train):
        """Compress what all convolutions read."""
        forward = train.graph.nodes[: train.forward_count]
        names = [node.input(1).name for node in forward if node.op_type == "Conv"]
        compress_activations(train, dict.fromkeys(names, self.density))


def plain_network() -> Graph:
    """Six 3x3 convolutions with Relu, the third and fifth of stride 2, and a classifier: no batch normalisation."""
    graph, rng, channels, x = Graph("plain", (1, 28, 28)), np.random.default_rng(0), 1, "input"
    for number, (width, stride) in enumerate(((16, 1), (16, 1), (32, 2), (32, 1), (64, 2), (64, 1))):
        weight = rng.normal(0, (2 / (9 * channels)) ** 0.5, (width, channels, 3, 3))
        inputs = [x, graph.parameter(f"w{number}", weight), graph.parameter(f"b{number}", np.zeros(width))]
        x = graph.add("Relu", [graph.add("Conv", inputs, pads=[1, 1, 1, 1], strides=[stride, stride])])
        channels = width
    x = graph.add("Flatten", [graph.add("GlobalAveragePool", [x])])
    weight = graph.parameter("fc", rng.normal(0, 0.1, (10, channels)))
    graph.set_outputs([graph.add("Gemm", [x, weight, graph.parameter("fc.bias", np.zeros(10))], transB=1)])
    return graph


@contextmanager
def kernels(kind):
    """Plan with all kernels, or without Winograd's."""
    with mock.patch.object(lowering_winograd, "suits", return_value=False) if kind == "direct" else nullcontext():
        yield


# Instead of a policy: dense kernels where others skip exact zeros.
WITH_ZEROS = "with zeros"


def learner(graph, policy, rate=1e-3, size=BATCH):
    """Return a learner with this policy."""
    optimizer, chosen = et.SGD(lr=rate, momentum=0.9), None if policy == WITH_ZEROS else policy
    made = et.Learner(graph, batch_size=size, threads=THREADS, memory_budget="1GiB", optimizer=optimizer,
                      error_pruning=chosen)  # fmt: skip
    with mock.patch.object(plans, "list_pooled_errors") if policy == WITH_ZEROS else nullcontext():
        made.training_plan()
    return made


def images(count, split="train"):
    """Return the first images, float32 from 0 to 1, and labels."""
    data = load_dataset(str(FULL) if FULL.exists() else "embedded", split=split)
    return data.images[:count].astype(np.float32) / 255, data.labels[:count]


def whole_steps(graph, policies, x, y):
    """Return (name, milliseconds of a step, share of operations saved) of every policy, taking turns.

    Every step has another batch, as in training: what is kept changes from step to step.
    """
    learners = {name: learner(graph, policy, 0.01) for name, policy in policies.items()}
    parts = [(x[i : i + BATCH], y[i : i + BATCH]) for i in range(0, len(x), BATCH)]
    steps = {name: [made.partial_fit(*part) for part in parts][-1] for name, made in learners.items()}
    seconds = {name: [] for name in learners}
    for number in range(ROUNDS):
        for name, made in learners.items():
            time.sleep(0.02)
            first, *others = (parts[(4 * number + i) % len(parts)] for i in range(4))
            made.partial_fit(*first)
            seconds[name].append(min(made.partial_fit(*part).seconds for part in others))
    backward = backward_products(learners["dense"], parts)
    results = {}
    for name, step in steps.items():
        saved = 1 - step.macs_done / step.macs_dense
        results[name] = {"ms": 1e3 * statistics.median(seconds[name]), "saved": saved}
        results[name]["proportion"] = saved * backward
    return results


def backward_products(made, parts):
    """Return the backward products' share of a step's time over their share of its operations."""
    seconds = np.median([made.time_rows(*part) for part in parts[:ROUNDS]], 0)
    plan, own = made.training_plan(), seconds[:-1] - seconds[-1]
    products = ("ProductInputGrad", "ProductWeightGrad", "ProductGrads")
    chosen = [row.stage == "backward" and plan.graph.nodes[row.node].op_type in products for row in plan.rows]
    return own[chosen].sum() / own.sum() / (1 - made.plans.forward_macs / made.plans.dense_macs)


def backward_passes(graph, policies, x, y, size=BATCH):
    """Return milliseconds of step and backward pass, and the share of operations saved, after some training."""
    learners = {name: learner(graph, policy, 0.01, size) for name, policy in policies.items()}
    parts = [(x[i : i + size], y[i : i + size]) for i in range(0, size * WARM_UP, size)]
    for made in learners.values():
        for part in parts:
            made.partial_fit(*part)
    rows = {name: made.training_plan().rows for name, made in learners.items()}
    seconds = {name: [] for name in learners}
    for number in range(ROUNDS):
        for name, made in learners.items():
            for part in parts[3 * number % WARM_UP :][:3]:
                seconds[name].append(made.time_rows(*part))
    results = {}
    for name, made in learners.items():
        median = np.median(np.array(seconds[name]), 0)
        own = median[:-1] - median[-1]
        step = made.partial_fit(*parts[0])
        backward = sum(s for s, row in zip(own, rows[name], strict=True) if row.stage == "backward")
        saved = 1 - step.macs_done / step.macs_dense
        results[name] = {"ms": 1e3 * own.sum(), "backward": 1e3 * backward, "saved": saved}
    return results


def accuracy(graph, policy, seed, count):
    """Return the test accuracy after a few epochs of so many images, with a one-cycle schedule."""
    schedule = et.Schedule("one_cycle", total_steps=EPOCHS * -(-count // BATCH))
    optimizer = et.SGD(lr=0.05, momentum=0.9, weight_decay=5e-4, clip_norm=1.0, schedule=schedule)
    made = et.Learner(graph, batch_size=BATCH, threads=THREADS, seed=seed, memory_budget="1GiB", optimizer=optimizer,
                      error_pruning=policy)  # fmt: skip
    made.fit(images(count), epochs=EPOCHS)
    return made.score(*images(None, "test"))


def gradient_policies():
    """Return what is compared, by name."""
    policies = {"dense": None}
    policies |= {f"lanes {rate}": et.GradientPruning(rate=rate, group="lanes") for rate in RATES}
    return policies | {"element 0.9": et.GradientPruning(rate=0.9)}


def cases():
    """Yield title and measurement of every table."""
    x, y = images(BATCH * WARM_UP)
    x = np.repeat(np.pad(x.reshape(-1, 1, 28, 28), ((0, 0), (0, 0), (2, 2), (2, 2))), 3, axis=1)
    resnet, lenet = et.models.resnet(depth=20, input_shape=(3, 32, 32)), et.models.lenet5()
    keeps = {"dense": None} | {f"keep {keep}": et.ErrorMapPruning(keep=keep) for keep in KEEPS}
    densities = {"dense": None} | {f"density {d}": Compressed(d) for d in DENSITIES}
    for kind in ("direct", "all"):
        yield f"error maps, {kind} kernels", kind, lambda: whole_steps(resnet, keeps, x, y)
    yield "activations", "all", lambda: whole_steps(resnet, densities, x, y)
    for name, graph in (("LeNet-5", lenet), ("plain", plain_network())):
        yield (f"gradients, {name}", "all",
               lambda graph=graph: backward_passes(graph, gradient_policies(), *images(BATCH * WARM_UP)))  # fmt: skip
    for size in (8, 32, 128):
        yield (f"exact zeros, LeNet-5, batch {size}", "all", lambda size=size: backward_passes(
            lenet, {"dense": WITH_ZEROS, "lists": None}, *images(size * WARM_UP), size))  # fmt: skip


def measure(again):
    """Measure operations and time of everything that is not stored, or of everything, and store it."""
    tables = {} if again or not RESULTS.exists() else json.loads(RESULTS.read_text())["tables"]
    for title, kind, run in cases():
        if title not in tables:
            with kernels(kind):
                tables[title] = {"date": machines.today(), "rows": run()}
            machines.write(RESULTS, {"machine": machines.facts(), "tables": tables})


def train():
    """Train with and without gradient pruning, storing each result; runs that are stored are not repeated."""
    for name, graph in (("LeNet-5", et.models.lenet5()), ("plain", plain_network())):
        count, seeds = TRAINED[name]
        for label, policy in gradient_policies().items():
            for seed in seeds:
                table = accuracies()
                if (key := f"{name}, {label}, seed {seed}") not in table:
                    table[key] = accuracy(graph, policy, seed, count)
                    machines.write(ACCURACY, table)


def accuracies():
    """Return the accuracies so far."""
    return json.loads(ACCURACY.read_text()) if ACCURACY.exists() else {}


def document():
    """Write the tables."""
    lines = ["# Pruned backward passes", "", *__doc__.split("Usage:")[0].strip().splitlines(), "",
             "Written by `benchmarks/pruning.py`; do not edit.", ""]  # fmt: skip
    for stored in machines.stored(RESULTS):
        text = "\n".join(line for title, table in stored["tables"].items() for line in _table(title, table["rows"]))
        lines.append(machines.chapter(stored["machine"], {table["date"] for table in stored["tables"].values()}, text))
    if table := accuracies():
        lines += [f"## Accuracy after {EPOCHS} epochs of 60,000 (LeNet-5) and 15,000 (plain) images", ""]
        lines += ["| run | test accuracy % |", "|---|---|"]
        lines += [f"| {run} | {100 * value:.2f} |" for run, value in table.items()] + [""]
    DOCUMENT.write_text("\n".join(lines))


def _table(title, table):
    """Return the lines of a table: of whole steps, or with the backward passes."""
    dense, part = table["dense"], "backward" if "backward" in table["dense"] else "ms"
    inner = "backward ms" if part == "backward" else "in proportion"
    head = ["variant", "step ms", "times faster", "operations saved", "time of the step saved", inner]
    lines = [f"## {title[0].upper()}{title[1:]}", "", f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for name, row in table.items():
        last = f"{row['backward']:.2f}" if part == "backward" else _percent(row.get("proportion"))
        lines.append(
            f"| {name} | {row['ms']:.2f} | {dense[part] / row[part]:.2f} | {_percent(row['saved'])} "
            f"| {_percent(1 - row['ms'] / dense['ms'])} | {last} |"
        )
    return [*lines, ""]


def _percent(share):
    return "-" if share is None else f"{100 * share:.1f} %"


def main():
    """Measure or train, store, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--again", action="store_true", help="measure what is stored already, too")
    parser.add_argument("--document", action="store_true", help="write the document only")
    parser.add_argument("--accuracy", action="store_true", help="train instead of measuring")
    arguments = parser.parse_args()
    if arguments.accuracy:
        train()
    elif not arguments.document:
        measure(arguments.again)
    document()


if __name__ == "__main__":
    main()
