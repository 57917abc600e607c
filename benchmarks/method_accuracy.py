"""Accuracy of every method on the full Fashion-MNIST, against dense training for fewer steps.

Usage:
    python benchmarks/method_accuracy.py run lenet5 [--only dense-20 rigl-90] [--seeds 3] [--limit 600]
    python benchmarks/method_accuracy.py run resnet8 --seeds 2
    python benchmarks/method_accuracy.py time lenet5        seconds of every setting, on a quiet machine
    python benchmarks/method_accuracy.py rates lenet5       learning rates, compared on held-out training images
    python benchmarks/method_accuracy.py document           two documents from what is stored

Every training is one file in benchmarks/results/method_accuracy/; what is there is not done again, so the work can
be interrupted and continued anywhere, also by several processes with different ``--only``. ``--limit``: start no
training after so many seconds.

The judge is dense training for fewer steps with a schedule fitted to that length: its accuracy over the number of
epochs, interpolated in log(epochs), is compared at the same operations and at the same seconds. Seconds are batches
offered times the median time of a batch, measured side by side (``time``), as a shared machine would make those of a
training meaningless; changes of topology and the choice of instances are in it.

docs/sparse_accuracy.md has the methods that thin out weights, docs/learning_accuracy.md those that choose instances or
thin out the backward pass.
"""

import argparse
import json
import math
import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

import edgetrain as et
from edgetrain.data import Dataset, batches, load_dataset
from edgetrain.policies import describe_policy, parse_policy

RESULTS = Path(__file__).parent / "results" / "method_accuracy"
DOCUMENTS = Path(__file__).parent.parent / "docs"
DATA = "/usr/share/datasets/fashion-mnist"
BATCH = 32

# "fast": lengths of dense training that are tried with twice the rate too.
MODELS = {
    "lenet5": {"epochs": 20, "lr": 0.025, "dense": (1, 2, 3, 4, 5, 7, 10, 14, 20), "fast": (1, 2, 3, 4, 5), "seeds": 3},
    "resnet8": {"epochs": 8, "lr": 0.05, "dense": (1, 2, 3, 4, 6, 8), "fast": (1, 2, 3, 4, 6, 8), "seeds": 2},
}
# SWAT's saved activations are pruned number by number, as published, or as vectors of lanes.
SPARSE = {
    "swat-u-80": "swat:weights=0.8,activations=0.8,group=element",
    "swat-u-80-lanes": "swat:weights=0.8,activations=0.8,group=lanes",
    "swat-u-90": "swat:weights=0.9,activations=0.9,group=element",
    "swat-u-90-lanes": "swat:weights=0.9,activations=0.9,group=lanes",
    "swat-erk-80": "swat:weights=0.8,activations=0.8,variant=erk,group=element",
    "swat-erk-80-lanes": "swat:weights=0.8,activations=0.8,variant=erk,group=lanes",
    "swat-erk-90": "swat:weights=0.9,activations=0.9,variant=erk,group=element",
    "swat-erk-90-lanes": "swat:weights=0.9,activations=0.9,variant=erk,group=lanes",
    "swat-m-80": "swat:weights=0.8,activations=0.8,variant=momentum,group=lanes",
    "swat-m-90": "swat:weights=0.9,activations=0.9,variant=momentum,group=lanes",
    "swat-structured-50": "swat:weights=0.5,activations=0.5,variant=structured,group=lanes",
    "swat-structured-70": "swat:weights=0.7,activations=0.7,variant=structured,group=lanes",
    "rigl-90": "rigl:weights=0.9",
    "set-90": "set:weights=0.9",
    "static-90": "static:weights=0.9",
    "rigl-90-uniform": "rigl:weights=0.9,distribution=uniform,dense_first=false,dense_last=true",
    "set-90-uniform": "set:weights=0.9,distribution=uniform,dense_first=false,dense_last=true",
    "static-90-uniform": "static:weights=0.9,distribution=uniform,dense_first=false,dense_last=true",
}
# Name -> filter, error pruning, sparsity.
LEARNING = {
    "random-50": ("random:rate=0.5", "none", "none"),
    "random-30": ("random:rate=0.3", "none", "none"),
    "eif-50": ("eif:rate=0.5", "none", "none"),
    "eif-30": ("eif:rate=0.3", "none", "none"),
    "selective-50": ("selective:rate=0.5", "none", "none"),
    "selective-30": ("selective:rate=0.3", "none", "none"),
    "error-maps-70": ("none", "channels:keep=0.7", "none"),
    "error-maps-50": ("none", "channels:keep=0.5", "none"),
    "random-channels-50": ("none", "channels:keep=0.5,importance=random", "none"),
    "gradients-50": ("none", "gradients:rate=0.5,group=lanes", "none"),
    "gradients-75": ("none", "gradients:rate=0.75,group=lanes", "none"),
    "gradients-80": ("none", "gradients:rate=0.8,group=lanes", "none"),
    "eif-50-error-maps-70": ("eif:rate=0.5", "channels:keep=0.7", "none"),
    "selective-50-gradients-50": ("selective:rate=0.5", "gradients:rate=0.5,group=lanes", "none"),
    "selective-50-rigl-80": ("selective:rate=0.5", "none", "rigl:weights=0.8"),
}


# Step at which batches are timed: SWAT chooses more often before the 3,200th.
LATER = 10_000


RECIPE = """Full Fashion-MNIST (60,000 training, 10,000 test images), batch size 32, SGD with Nesterov momentum
0.9, weight decay 5e-4 (not on biases and normalisation), warm-up 10 % then cosine, no augmentation; accuracy after the
last epoch. Peak learning rates with sparse weights were chosen on 10,000 of the training images (command `rates`), of
0.025, 0.05 and 0.1 (LeNet-5, two seeds) or 0.05, 0.1 and 0.2 (ResNet-8, one seed): 0.05 for LeNet-5, 0.1 for ResNet-8,
0.2 for its SWAT at 90 %. Everything else has 0.025 and 0.05; dense training is tried with twice that too ("fast"), that
of LeNet-5 for up to 5 epochs, and the better of both means is the judge's.

Operations are the multiply-accumulates executed in the forward pass and for both gradients, relative to dense training
for as many epochs. Exact zeros, which kernels skip in LeNet-5's second convolution, are credited to nobody's
operations, but to everybody's seconds. Seconds are batches offered times the median time of a batch.
"Better than dense": in points, against dense training for fewer steps with a schedule fitted to that length,
interpolated in log(epochs)."""
INTRODUCTIONS = {
    "sparse": """Methods that thin out weights. Changes of topology are in the seconds, SWAT's choices of thresholds of
activations (one step in 100, some 2 % of ResNet-20's time) are not. Gradients of SWAT are clipped to norm 1, as on the
command line. The saved activations of convolutions are pruned number by number or ("lanes", and in the momentum and
structured variants) as vectors of the samples that lie in the lanes; those of fully connected layers stay whole.""",
    "learning": """Methods that choose instances (filter: `eif`, `selective`, `random`) or thin out the backward pass
(`error-maps`, `random-channels`, `gradients` as vectors of lanes). All are offered the same instances; the
cost of choosing is in the operations and in the seconds. The number is the share that is kept in percent, for gradients
the paper's p.""",
}
METHODS = {"sparse": SPARSE, "learning": LEARNING}
TITLES = {"sparse": "Accuracy of sparse training", "learning": "Accuracy of learning from less"}
COLUMNS = ("setting", "seeds", "epochs", "accuracy", "sd", "density", "operations", "ms per batch", "seconds",
           "better than dense with as many operations", "better than dense in the same time")  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """How long to train, and with which methods; ``rate`` times the model's learning rate."""

    epochs: int
    instance_filter: str = "none"
    error_pruning: str = "none"
    sparsity: str = "none"
    rate: float = 1.0


def dense_settings(model: str) -> dict[str, Setting]:
    """Return the judge's settings by name."""
    settings = {f"dense-{epochs}": Setting(epochs) for epochs in reversed(MODELS[model]["dense"])}
    return settings | {f"dense-{epochs}-fast": Setting(epochs, rate=2.0) for epochs in reversed(MODELS[model]["fast"])}


def sparse_rate(model: str, name: str) -> float:
    """Return the learning rate of a method that thins out weights, times the model's."""
    return 4.0 if model == "resnet8" and name.startswith("swat") and "-90" in name else 2.0


def settings_of(model: str) -> dict[str, Setting]:
    """Return all settings by name."""
    epochs = MODELS[model]["epochs"]
    sparse = {name: Setting(epochs, sparsity=policy, rate=sparse_rate(model, name)) for name, policy in SPARSE.items()}
    return dense_settings(model) | sparse | {name: Setting(epochs, *policies) for name, policies in LEARNING.items()}


def make_learner(model: str, training: Dataset, setting: Setting, seed: int, threads: int) -> et.Learner:
    """Return a learner with the recipe that all settings share."""
    build = et.models.lenet5 if model == "lenet5" else lambda *a, **k: et.models.resnet(*a, depth=8, **k)
    schedule = et.Schedule("cosine", warmup=0.1, final=0.002)
    clip = 1.0 if setting.sparsity.startswith("swat") else None  # as on the command line; without it some diverge
    optimizer = et.SGD(lr=setting.rate * MODELS[model]["lr"], momentum=0.9, nesterov=True, weight_decay=5e-4,
                       decay_bias_and_norm=False, schedule=schedule, clip_norm=clip)  # fmt: skip
    return et.Learner(
        build(training.input_shape, training.num_classes, seed=seed), batch_size=BATCH, seed=seed, threads=threads,
        optimizer=optimizer, sparsity=parse_policy("sparsity", setting.sparsity),
        error_pruning=parse_policy("error_pruning", setting.error_pruning),
        instance_filter=parse_policy("filter", setting.instance_filter),
    )  # fmt: skip


def train(
    model: str, name: str, seed: int, threads: int, data: tuple[Dataset, Dataset], rate: float | None = None
) -> dict:
    """Train once and return what is stored; ``rate``: instead of the setting's own."""
    setting = settings_of(model)[name]
    setting = setting if rate is None else replace(setting, rate=rate)
    learner = make_learner(model, data[0], setting, seed, threads)
    history = learner.fit(data[0], epochs=setting.epochs, validation=data[1])
    total = {key: sum(history.column(key)) for key in ("macs_dense", "macs_done")}
    densities = {layer.weight: learner.topology.indices[layer.weight].density for layer in learner.topology.layers}
    arrays = [array for array in learner.parameters().values() if array.ndim > 1]
    density = sum(np.count_nonzero(array) for array in arrays) / sum(array.size for array in arrays)
    return {
        "model": model, "setting": name, "seed": seed, "epochs": setting.epochs, "batch_size": BATCH,
        "lr": learner.optimizer.lr,
        "sparsity": describe_policy("sparsity", learner.sparsity),
        "error_pruning": describe_policy("error_pruning", learner.error_pruning),
        "filter": describe_policy("filter", learner.instance_filter),
        "steps": learner.step_count, "batches": setting.epochs * math.ceil(len(data[0]) / BATCH),
        "accuracies": history.column("validation_accuracy"), "densities": densities, "density": density, **total,
        "topology_changes": learner.topology.changes, "topology_seconds": learner.topology.seconds,
        "seconds": sum(history.column("seconds")),
    }  # fmt: skip


def run(model: str, only: list[str] | None, seeds: int, threads: int, limit: float) -> None:
    """Do what is missing."""
    data = tuple(load_dataset(DATA, split=split) for split in ("train", "test"))
    RESULTS.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    for seed in range(seeds):
        for name in only or settings_of(model):
            path = RESULTS / f"{model}-{name}-{seed}.json"
            if path.exists():
                continue
            if time.monotonic() - start > limit:
                return
            result = train(model, name, seed, threads, data)
            path.write_text(json.dumps(result, indent=1) + "\n")
            print(f"{path.stem}: {100 * result['accuracies'][-1]:.2f} % in {result['seconds']:.0f} s", flush=True)


def compare_rates(model: str, only: list[str] | None, seeds: int, threads: int) -> None:
    """Print the accuracy on 10,000 training images that were held out, at once, twice and four times the rate."""
    images = load_dataset(DATA, split="train")
    order = np.random.default_rng(123).permutation(len(images))
    data = images.subset(np.sort(order[10_000:])), images.subset(np.sort(order[:10_000]))
    for name in only or [f"dense-{MODELS[model]['epochs']}", "rigl-90", "swat-erk-80", "swat-erk-90"]:
        for rate in (1.0, 2.0, 4.0):
            found = [train(model, name, seed, threads, data, rate) for seed in range(seeds)]
            print(f"{model} {name} at {found[0]['lr']}: {mean_accuracy(found):.2f} %", flush=True)


def measure(model: str, threads: int, rounds: int = 40, steps: int = 10) -> None:
    """Store the seconds that a batch of offered instances takes in every setting.

    All settings take turns of a few batches, as the machine's speed swings within seconds; the median over the turns,
    plus the time that changes of the topology took, per batch. With a filter a turn is eight times as long, as how many
    steps fall into one varies. Turns count in which dense training, at their beginning and at the next one's, took at
    most a quarter longer than in its fastest: for minutes at a time a virtual machine may get one of two processors.
    """
    training = load_dataset(DATA, split="train")
    names = ["dense-1", *SPARSE, *LEARNING]
    learners = {name: make_learner(model, training, settings_of(model)[name], 0, threads) for name in names}
    for learner in learners.values():
        learner.optimizer = learner.optimizer.with_total_steps(10**6)
        learner.topology.total_steps = 10**6
        learner.step_count = LATER
    work = [batch for _, batch in zip(range(steps), batches(training, BATCH, seed=0, epoch=0), strict=False)]
    for learner in learners.values():
        if learner.instance_filter is not None:
            learner.observe(*training.take(np.arange(4096)))  # at the beginning everything passes
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(rounds):
        for name, learner in learners.items():
            start = time.perf_counter()
            repeats = 1 if learner.instance_filter is None else 8
            for _ in range(repeats):
                if learner.instance_filter is not None:
                    learner.observe(*(np.concatenate(parts) for parts in zip(*work, strict=True)))
                    continue
                for x, y in work:
                    learner.partial_fit(x, y)
            seconds[name].append((time.perf_counter() - start) / (repeats * steps))
    # A filter trains on a part of what it is offered, so its topology changes less often.
    shares = {name: 1.0 if learner.instance_filter is None else learner.instance_filter.rate
              for name, learner in learners.items()}  # fmt: skip
    changing = {name: learner.topology.seconds / (learner.step_count - LATER) * shares[name]
                for name, learner in learners.items()}  # fmt: skip
    dense = seconds[names[0]]
    calm = [turn for turn in range(2, rounds - 1) if max(dense[turn : turn + 2]) <= 1.25 * min(dense[2:])]
    print(f"{len(calm)} of {rounds} turns count")
    if len(calm) < 8:
        raise SystemExit("too few: the machine is not quiet; nothing is stored, run this again")
    table = {name: statistics.median(values[turn] for turn in calm) + changing[name]
             for name, values in seconds.items()}  # fmt: skip
    result = {"threads": threads, "batch_size": BATCH, "seconds_per_batch": table, "of_which_topology": changing}
    (RESULTS / f"seconds-{model}.json").write_text(json.dumps(result, indent=1) + "\n")
    for name, value in table.items():
        print(f"{name:20s} {1e3 * value:7.3f} ms   dense / it = {table['dense-1'] / value:.2f}")


# --- the document ---


def stored(model: str) -> dict[str, list[dict]]:
    """Return the results of a model by setting, in the order of the settings."""
    found: dict[str, list[dict]] = {}
    for name in settings_of(model):
        paths = sorted(RESULTS.glob(f"{model}-{name}-[0-9].json"))
        if paths:
            found[name] = [json.loads(path.read_text()) for path in paths]
    return found


def mean_accuracy(results: list[dict]) -> float:
    """Return the mean of the last accuracies in percent."""
    return 100 * statistics.mean(result["accuracies"][-1] for result in results)


class Judge:
    """Dense training for fewer steps."""

    def __init__(self, found: dict[str, list[dict]]) -> None:
        points: dict[int, float] = {}
        for results in (results for name, results in found.items() if name.startswith("dense-")):
            epochs = results[0]["epochs"]
            points[epochs] = max(mean_accuracy(results), points.get(epochs, 0.0))
        self.epochs = sorted(points)
        self.accuracies = [points[epochs] for epochs in self.epochs]

    def at(self, epochs: float) -> float | None:
        """Return dense accuracy for a number of epochs, ``None`` outside what was measured."""
        if not self.epochs or not self.epochs[0] <= epochs <= self.epochs[-1]:
            return None
        return float(np.interp(math.log(epochs), np.log(self.epochs), self.accuracies))


def write_documents() -> None:
    """Generate both documents and their plots from all stored results."""
    for kind, methods in METHODS.items():
        lines = [f"# {TITLES[kind]}", "", "Generated by `benchmarks/method_accuracy.py document`; do not edit.", "",
                 *INTRODUCTIONS[kind].splitlines(), "", *RECIPE.splitlines(), ""]  # fmt: skip
        for model in MODELS:
            lines += _model_lines(kind, model, [*dense_settings(model), *methods])
        (DOCUMENTS / f"{kind}_accuracy.md").write_text("\n".join(lines))


def _model_lines(kind: str, model: str, names: list[str]) -> list[str]:
    found = {name: results for name, results in stored(model).items() if name in names}
    judge = Judge(found)
    path = RESULTS / f"seconds-{model}.json"
    timing = json.loads(path.read_text()) if path.exists() else {"seconds_per_batch": {}, "threads": None}
    lines = [f"## {model}", ""]
    if timing["threads"]:
        lines += [f"Time of a batch: {timing['threads']} threads, median over turns of a few batches.", ""]
    lines += [f"| {' | '.join(COLUMNS)} |", "|" + "---|" * len(COLUMNS)]
    rows = {name: _row(name, results, judge, timing["seconds_per_batch"]) for name, results in found.items()}
    lines += [row["text"] for row in rows.values()]
    seeds = MODELS[model]["seeds"]
    missing = [f"{name} ({seeds - len(found.get(name, []))} seeds)" for name in names
               if len(found.get(name, [])) < seeds]  # fmt: skip
    lines += ["", f"Not run: {', '.join(missing)}." if missing else "All settings were run.", ""]
    plot = f"{kind}_accuracy_{model}.svg"
    return lines + ([f"![accuracy over operations and seconds]({plot})", ""] if _plot(plot, model, rows) else [])


def _row(name: str, results: list[dict], judge: Judge, seconds_per_batch: dict[str, float]) -> dict:
    epochs = results[0]["epochs"]
    count = epochs * math.ceil(60_000 / BATCH)
    accuracy, spread = mean_accuracy(results), 0.0
    if len(results) > 1:
        spread = 100 * statistics.stdev(r["accuracies"][-1] for r in results)
    operations = statistics.mean(r["macs_done"] / r["macs_dense"] for r in results)
    dense = seconds_per_batch.get("dense-1")
    batch = dense if name.startswith("dense-") else seconds_per_batch.get(name)
    by_operations = judge.at(operations * epochs)
    by_time = judge.at(epochs * batch / dense) if batch and dense else None
    density = statistics.mean(r["density"] for r in results)
    cells = [name, len(results), epochs, f"{accuracy:.2f}", f"{spread:.2f}", f"{density:.3f}", f"{operations:.3f}",
             *("-" if batch is None else text for text in (f"{1e3 * (batch or 0):.2f}", f"{count * (batch or 0):.0f}")),
             *("-" if name.startswith("dense-") or j is None else f"{accuracy - j:+.2f}"
               for j in (by_operations, by_time))]  # fmt: skip
    return {"text": f"| {' | '.join(map(str, cells))} |", "accuracy": accuracy, "operations": operations * epochs,
            "seconds": None if batch is None else count * batch}  # fmt: skip


def _plot(file: str, model: str, rows: dict[str, dict]) -> bool:
    """Draw accuracy over operations and over seconds; False without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "edgetrain"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(12, 5))
    for axis, key in zip(axes, ("operations", "seconds"), strict=True):
        dense: dict[float, float] = {}
        for row in (row for name, row in rows.items() if name.startswith("dense-") and row[key] is not None):
            dense[row[key]] = max(row["accuracy"], dense.get(row[key], 0.0))
        if dense:
            axis.plot(*zip(*sorted(dense.items()), strict=True), "k.-", label="dense, schedule fitted to its length")
        for name, row in rows.items():
            if not name.startswith("dense-") and row[key] is not None:
                axis.plot(row[key], row["accuracy"], "o")
                axis.annotate(name, (row[key], row["accuracy"]), textcoords="offset points", xytext=(4, 4), fontsize=7)
        axis.set(xscale="log", xlabel={"operations": "operations (dense epochs)", "seconds": "seconds"}[key],
                 ylabel="test accuracy in %", title=model)  # fmt: skip
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(DOCUMENTS / file, metadata={"Date": None})
    return True


def main() -> None:
    """Run, measure or write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "time", "rates", "document"))
    parser.add_argument("model", nargs="?", choices=tuple(MODELS), default="lenet5")
    parser.add_argument("--only", nargs="*")
    parser.add_argument("--seeds", type=int)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--limit", type=float, default=math.inf)
    arguments = parser.parse_args()
    if arguments.what == "run":
        seeds = arguments.seeds or MODELS[arguments.model]["seeds"]
        run(arguments.model, arguments.only, seeds, arguments.threads, arguments.limit)
    elif arguments.what == "rates":
        compare_rates(arguments.model, arguments.only, arguments.seeds or 1, arguments.threads)
    elif arguments.what == "time":
        measure(arguments.model, arguments.threads)
    write_documents()


if __name__ == "__main__":
    main()
