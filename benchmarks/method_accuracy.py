"""Accuracy of every method on the full Fashion-MNIST, against dense training for fewer steps.

Usage:
    python benchmarks/method_accuracy.py all lenet5         run what is missing, time, document
    python benchmarks/method_accuracy.py run lenet5 [--only dense-20 rigl-90] [--seeds 3] [--limit 600]
    python benchmarks/method_accuracy.py run resnet8 --seeds 2
    python benchmarks/method_accuracy.py time lenet5        seconds of every setting, on a quiet machine
    python benchmarks/method_accuracy.py rates lenet5       learning rates, compared on held-out training images
    python benchmarks/method_accuracy.py document           two documents from what is stored

Every training is one file in benchmarks/results/method_accuracy/; what is there is not done again, so the work can
be interrupted and continued anywhere, also by several processes with different ``--only``. ``--limit``: start no
training after so many seconds. ``all`` takes hours where nothing is stored; accuracies are stored with the project, so
it takes minutes there and leaves the accuracies, the times of this machine, and the plots of accuracy over operations
and over seconds. ``--data``: a folder with the files of Fashion-MNIST, if they are not in ``/usr/share/datasets``.

The judge is dense training for fewer steps with a schedule fitted to that length: its accuracy over the number of
epochs, interpolated in log(epochs), is compared at the same operations and at the same seconds. Seconds are batches
offered times the time of a batch, measured side by side with dense training (``time``, see ``method_times.py``), as a
shared machine would make those of a training meaningless; changes of topology and the choice of instances are in it.

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

import machines
import numpy as np
from method_times import Feed, contradictions, seconds_per_batch

import edgetrain as et
from edgetrain.data import Dataset, load_dataset
from edgetrain.policies import describe_policy, parse_policy

RESULTS = Path(__file__).parent / "results" / "method_accuracy"
DOCUMENTS = Path(__file__).parent.parent / "docs"
DATA = "/usr/share/datasets/fashion-mnist"
BATCH = 32

# "fast": lengths of dense training that are tried with twice the rate too.
MODELS = {
    "lenet5": {"epochs": 20, "long": 100, "lr": 0.025, "dense": (1, 2, 3, 4, 5, 7, 10, 14, 20, 40, 70, 100, 120),
               "fast": (1, 2, 3, 4, 5), "seeds": 3},
    "resnet8": {"epochs": 8, "long": 32, "lr": 0.05, "dense": (1, 2, 3, 4, 6, 8),
                "fast": (1, 2, 3, 4, 6, 8, 14, 32), "seeds": 2},
}  # fmt: skip
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
    "swat-m-80": "swat:weights=0.8,activations=0.8,variant=momentum,group=element",
    "swat-m-80-lanes": "swat:weights=0.8,activations=0.8,variant=momentum,group=lanes",
    "swat-m-90": "swat:weights=0.9,activations=0.9,variant=momentum,group=element",
    "swat-m-90-long": "swat:weights=0.9,activations=0.9,variant=momentum,group=element",
    "swat-m-90-lanes": "swat:weights=0.9,activations=0.9,variant=momentum,group=lanes",
    "swat-structured-50": "swat:weights=0.5,activations=0.5,variant=structured,group=element",
    "swat-structured-50-lanes": "swat:weights=0.5,activations=0.5,variant=structured,group=lanes",
    "swat-structured-70": "swat:weights=0.7,activations=0.7,variant=structured,group=element",
    "swat-structured-70-lanes": "swat:weights=0.7,activations=0.7,variant=structured,group=lanes",
    "rigl-90": "rigl:weights=0.9",
    "rigl-90-refresh-500": "rigl:weights=0.9,refresh=500",
    "set-90": "set:weights=0.9",
    "set-90-refresh-500": "set:weights=0.9,refresh=500",
    "set-90-long": "set:weights=0.9",
    "set-90-refresh-500-long": "set:weights=0.9,refresh=500",
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


# How settings are named that train for as many epochs as "long" says.
LONG = "-long"
# Step at which batches are timed: SWAT chooses more often before the 3,200th.
LATER = 10_000
# Images that times are measured with, in turn: with few, networks would know them all and pass nothing on.
MEASURED = 12_800


RECIPE = """Full Fashion-MNIST (60,000 training, 10,000 test images), batch size 32, SGD with Nesterov momentum
0.9, weight decay 5e-4 (not on biases and normalisation), warm-up 10 % then cosine, no augmentation; accuracy after the
last epoch. Peak learning rates with sparse weights were chosen on 10,000 of the training images (command `rates`), of
0.025, 0.05 and 0.1 (LeNet-5, two seeds) or 0.05, 0.1 and 0.2 (ResNet-8, one seed): 0.05 for LeNet-5, 0.1 for ResNet-8,
0.2 for its SWAT at 90 %. Everything else has 0.025 and 0.05; dense training is tried with twice that too ("fast"), that
of LeNet-5 for up to 5 epochs, and the better of both means is the judge's.

Operations are the multiply-accumulates executed in the forward pass and for both gradients, relative to dense training
for as many epochs. Exact zeros, which kernels skip in LeNet-5's second convolution, are credited to nobody's
operations, but to everybody's seconds. Seconds are batches offered times the time of a batch.
"Better than dense": in points, against dense training for fewer steps with a schedule fitted to that length,
interpolated in log(epochs)."""
INTRODUCTIONS = {
    "sparse": """Methods that thin out weights. Changes of topology are in the seconds, SWAT's choices of thresholds of
activations (one step in 100, some 2 % of ResNet-20's time) are not. Gradients of SWAT are clipped to norm 1, as on the
command line. The saved activations of convolutions are pruned number by number or ("lanes") as vectors of the samples
that lie in the lanes; those of fully connected layers stay whole. "long" is the same training for 100 epochs (LeNet-5)
or 32 (ResNet-8).""",
    "learning": """Methods that choose instances (filter: `eif`, `selective`, `random`) or thin out the backward pass
(`error-maps`, `random-channels`, `gradients` as vectors of lanes). All are offered the same instances; the
cost of choosing is in the operations and in the seconds. The number is the share that is kept in percent, for gradients
the paper's p.""",
}
PUBLISHED = """Evci et al. (RigL, ICML 2020) report static < SET <= RigL. Here, with 90 % zeros (accuracy in percent;
differences in points, in brackets their standard error over the seeds):"""
REASONS = """So here RigL is not ahead of SET: the gradient chooses no better than chance what grows. Nothing here tells
why. It may be that the networks and images are small, or that RigL's choice hangs on the gradient of one batch of 32
samples. That 100 steps between changes give new weights little time to show what they are worth (Liu et al., ITOP, ICML
2021, take 1,500 with SET, 4,000 with RigL) is not it: with 500 ("refresh-500") the order is the same."""
# Points above dense training with as many operations.
AIM = 0.3
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
    epochs, longer = MODELS[model]["epochs"], MODELS[model]["long"]
    sparse = {name: Setting(longer if name.endswith(LONG) else epochs, sparsity=policy, rate=sparse_rate(model, name))
              for name, policy in SPARSE.items()}  # fmt: skip
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


def run(model: str, only: list[str] | None, seeds: int, threads: int, limit: float, source: str) -> None:
    """Do what is missing."""
    data = tuple(load_dataset(source, split=split) for split in ("train", "test"))
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


def compare_rates(model: str, only: list[str] | None, seeds: int, threads: int, source: str) -> None:
    """Print the accuracy on 10,000 training images that were held out, at once, twice and four times the rate."""
    images = load_dataset(source, split="train")
    order = np.random.default_rng(123).permutation(len(images))
    data = images.subset(np.sort(order[10_000:])), images.subset(np.sort(order[:10_000]))
    for name in only or [f"dense-{MODELS[model]['epochs']}", "rigl-90", "swat-erk-80", "swat-erk-90"]:
        for rate in (1.0, 2.0, 4.0):
            found = [train(model, name, seed, threads, data, rate) for seed in range(seeds)]
            print(f"{model} {name} at {found[0]['lr']}: {mean_accuracy(found):.2f} %", flush=True)


def measure(model: str, threads: int, rounds: int, source: str) -> None:
    """Store the seconds that a batch of offered instances takes in every setting, changes of the topology included.

    Raises:
        SystemExit: the machine is not quiet, or a filter took longer than the dense training that it leaves out.
    """
    training = load_dataset(source, split="train")
    x, y = training.take(np.arange(min(len(training), MEASURED)))
    feeds = {}
    for name in ("dense-1", *(name for name in SPARSE if not name.endswith(LONG)), *LEARNING):
        learner = make_learner(model, training, settings_of(model)[name], 0, threads)
        learner.optimizer = learner.optimizer.with_total_steps(10**6)
        learner.topology.total_steps = 10**6
        learner.step_count = LATER
        if learner.instance_filter is not None:
            learner.observe(x[:4096], y[:4096])  # at the beginning everything passes
        feeds[name] = Feed(learner, x, y)
    table = seconds_per_batch(feeds, rounds)
    # A filter trains on a part of what it is offered, so its topology changes less often.
    changing = {name: feed.learner.topology.seconds / (feed.learner.step_count - LATER) * kept_share(name)
                for name, feed in feeds.items()}  # fmt: skip
    table = {name: seconds + changing[name] for name, seconds in table.items()}
    for name, value in table.items():
        print(f"{name:26s} {1e3 * value:7.3f} ms   dense / it = {table['dense-1'] / value:.2f}")
    dense_macs = feeds["dense-1"].macs / feeds["dense-1"].batches
    operations = {name: feed.macs / feed.batches / dense_macs for name, feed in feeds.items()}
    wrong = contradictions(table, operations, only_filters())
    if wrong:
        raise SystemExit(f"longer than dense training, which they leave out a part of: {', '.join(wrong)}; nothing is "
                         "stored, run this again")  # fmt: skip
    machines.write(seconds_file(model), {
        "machine": machines.facts(), "date": machines.today(), "threads": threads, "batch_size": BATCH,
        "seconds_per_batch": table, "of_which_topology": changing,
    })  # fmt: skip


def seconds_file(model: str) -> Path:
    """Return where the times of a model are stored."""
    return RESULTS / f"seconds-{model}.json"


def only_filters() -> list[str]:
    """Return the settings that are a filter and nothing else."""
    return [name for name, (_, error_pruning, sparsity) in LEARNING.items() if error_pruning == sparsity == "none"]


def kept_share(name: str) -> float:
    """Return the share of the instances that a setting trains on."""
    chosen = parse_policy("filter", LEARNING[name][0]) if name in LEARNING else None
    return 1.0 if chosen is None else chosen.rate


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

    def best(self, epochs: float) -> float | None:
        """Return the best dense accuracy for at most so many epochs: longer training may do worse."""
        return max((a for e, a in zip(self.epochs, self.accuracies, strict=True) if e <= epochs), default=None)


def write_documents() -> None:
    """Generate both documents and their plots from all stored results."""
    for kind, methods in METHODS.items():
        lines = [f"# {TITLES[kind]}", "", "Generated by `benchmarks/method_accuracy.py document`; do not edit.", "",
                 *INTRODUCTIONS[kind].splitlines(), "", *RECIPE.splitlines(), ""]  # fmt: skip
        names = {model: [*dense_settings(model), *methods] for model in MODELS}
        if kind == "sparse":
            lines += findings(names)
        for model in MODELS:
            lines += _model_lines(kind, model, names[model])
        (DOCUMENTS / f"{kind}_accuracy.md").write_text("\n".join(lines))


def _found(model: str, names: list[str]) -> dict[str, list[dict]]:
    return {name: results for name, results in stored(model).items() if name in names}


def _model_lines(kind: str, model: str, names: list[str]) -> list[str]:
    found = _found(model, names)
    judge, path = Judge(found), seconds_file(model)
    timing = json.loads(path.read_text()) if path.exists() else {"seconds_per_batch": {}}
    rows = {name: _row(name, results, judge, timing["seconds_per_batch"]) for name, results in found.items()}
    lines = [f"## {model}", "", *_timing_lines(model, timing)]
    lines += [f"| {' | '.join(COLUMNS)} |", "|" + "---|" * len(COLUMNS), *(row["text"] for row in rows.values())]
    seeds = MODELS[model]["seeds"]
    missing = [f"{name} ({seeds - len(found.get(name, []))} seeds)" for name in names
               if len(found.get(name, [])) < seeds]  # fmt: skip
    lines += ["", f"Not run: {', '.join(missing)}." if missing else "All settings were run.", ""]
    plot = f"{kind}_accuracy_{model}.svg"
    return lines + ([f"![accuracy over operations and seconds]({plot})", ""] if _plot(plot, model, rows) else [])


def _timing_lines(model: str, timing: dict) -> list[str]:
    """Return on what machine times were measured, and whether they can be."""
    seconds = timing["seconds_per_batch"]
    if not seconds:
        return []
    where = f"{machines.described(timing['machine'])}, {timing['date']}" if "machine" in timing else "not recorded"
    lines = [f"Time of a batch: {timing['threads']} threads; machine: {where}."]
    operations = {name: operations_of(results) for name, results in stored(model).items()}
    wrong = contradictions(seconds, operations, only_filters())
    if wrong:
        lines += ["", f"**Times not to be trusted**: longer than dense training, which they leave out a part of: "
                      f"{', '.join(wrong)}. Others may be as wrong."]  # fmt: skip
    return [*lines, ""]


def _row(name: str, results: list[dict], judge: Judge, seconds_per_batch: dict[str, float]) -> dict:
    epochs = results[0]["epochs"]
    count = epochs * math.ceil(60_000 / BATCH)
    accuracy, operations = mean_accuracy(results), operations_of(results)
    dense = seconds_per_batch.get("dense-1")
    batch = dense if name.startswith("dense-") else seconds_per_batch.get(name.removesuffix(LONG))
    by_operations = judge.at(operations * epochs)
    by_time = judge.at(epochs * batch / dense) if batch and dense else None
    density = statistics.mean(r["density"] for r in results)
    cells = [name, len(results), epochs, f"{accuracy:.2f}", f"{spread(results):.2f}", f"{density:.3f}",
             f"{operations:.3f}", *(["-", "-"] if batch is None else [f"{1e3 * batch:.2f}", _seconds(count * batch)]),
             *("-" if name.startswith("dense-") or j is None else f"{accuracy - j:+.2f}"
               for j in (by_operations, by_time))]  # fmt: skip
    return {"text": f"| {' | '.join(map(str, cells))} |", "accuracy": accuracy, "operations": operations * epochs,
            "seconds": None if batch is None else count * batch}  # fmt: skip


def _seconds(value: float) -> str:
    return f"{value:.1f}" if value < 100 else f"{value:.0f}"


def spread(results: list[dict]) -> float:
    """Return the standard deviation of the last accuracies in points; 0 of one."""
    return 100 * statistics.stdev(r["accuracies"][-1] for r in results) if len(results) > 1 else 0.0


def operations_of(results: list[dict]) -> float:
    """Return the mean share of dense training's operations that were executed."""
    return statistics.mean(r["macs_done"] / r["macs_dense"] for r in results)


def findings(names: dict[str, list[str]]) -> list[str]:
    """Return what the sparse results say about published ones, and about the aim; ``names``: settings by model."""
    lines = ["## What was published, and the aim", "", *PUBLISHED.splitlines(), ""]
    lines += ["| network, densities | static | SET | RigL | SET less static | RigL less static | RigL less SET |",
              "|" + "---|" * 7]  # fmt: skip
    verdicts: dict[str, list[str]] = {}
    for model in MODELS:
        for kind, ending in (("ERK", "-90"), ("uniform", "-90-uniform")):
            found = [stored(model).get(f"{policy}{ending}", []) for policy in ("static", "set", "rigl")]
            if all(found):
                static, by_set, rigl = found
                cells = [f"{mean_accuracy(results):.2f}" for results in found]
                cells += [_gap(by_set, static), _gap(rigl, static), _gap(rigl, by_set)]
                lines.append(f"| {model}, {kind} | {' | '.join(cells)} |")
                verdicts.setdefault(_verdict(by_set, rigl), []).append(f"{model}, {kind}")
    lines.append("")
    if verdicts:
        lines += [*(f"- {verdict}: {'; '.join(where)}" for verdict, where in verdicts.items()), ""]
    if verdicts and "RigL is ahead" not in verdicts:
        lines += [*REASONS.splitlines(), ""]
    return lines + [line for model in MODELS for line in _aim(model, names[model])]


def _difference(high: list[dict], low: list[dict]) -> tuple[float, float]:
    """Return the difference of two means in points, and its standard error over the seeds."""
    error = math.hypot(*(spread(results) / math.sqrt(len(results)) for results in (high, low)))
    return mean_accuracy(high) - mean_accuracy(low), error


def _gap(high: list[dict], low: list[dict]) -> str:
    return "{:+.2f} ({:.2f})".format(*_difference(high, low))


def _verdict(by_set: list[dict], rigl: list[dict]) -> str:
    difference, error = _difference(rigl, by_set)
    if abs(difference) <= 2 * error:
        return "RigL and SET are equal within the seeds (twice the error)"
    return f"{'RigL' if difference > 0 else 'SET'} is ahead"


def _aim(model: str, names: list[str]) -> list[str]:
    """Return which settings with 90 % zeros are above dense training of the same cost by the aim."""
    found, path = _found(model, names), seconds_file(model)
    judge, sparse = Judge(found), {name: results for name, results in found.items() if "-90" in name}
    costs = {"with as many operations": {name: operations_of(results) for name, results in sparse.items()}}
    if path.exists():
        seconds = json.loads(path.read_text())["seconds_per_batch"]
        timed = {name: seconds.get(name.removesuffix(LONG)) for name in sparse}
        costs["in the same time"] = {name: each / seconds["dense-1"] for name, each in timed.items() if each}
    lines = []
    for cost, shares in costs.items():
        parts: dict[str, list[str]] = {"reach it": [], "do not": [], "take less than the shortest dense training": []}
        for name, share in shares.items():
            epochs, accuracy = share * sparse[name][0]["epochs"], mean_accuracy(sparse[name])
            dense, best = judge.at(epochs), judge.best(epochs)
            if dense is None or best is None:
                parts["take less than the shortest dense training"].append(name)
                continue
            gain = round(accuracy - dense, 2)
            more = f", {accuracy - best:+.2f} to the best shorter one" if best > dense else ""
            parts["reach it" if gain >= AIM else "do not"].append(f"{name} ({gain:+.2f}{more})")
        lines += [f"With 90 % zeros of {model}, {AIM} points above dense training {cost} is the aim:", "",
                  *(f"- {text}: {'; '.join(those)}" for text, those in parts.items() if those), ""]  # fmt: skip
    return lines if sparse else []


def _plot(file: str, model: str, rows: dict[str, dict]) -> bool:
    """Draw accuracy over operations and over seconds; False without matplotlib, or with nothing to compare with."""
    if not any(name.startswith("dense-") for name in rows):
        return False
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
    pyplot.close(figure)
    return True


def main() -> None:
    """Run, measure or write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("all", "run", "time", "rates", "document"))
    parser.add_argument("model", nargs="?", choices=tuple(MODELS), default="lenet5")
    parser.add_argument("--only", nargs="*")
    parser.add_argument("--seeds", type=int)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--limit", type=float, default=math.inf)
    parser.add_argument("--rounds", type=int, default=20, help="turns of every setting that is timed")
    parser.add_argument("--data", default=DATA)
    given = parser.parse_args()
    if given.what in ("all", "run"):
        seeds = given.seeds or MODELS[given.model]["seeds"]
        run(given.model, given.only, seeds, given.threads, given.limit, given.data)
    if given.what == "rates":
        compare_rates(given.model, given.only, given.seeds or 1, given.threads, given.data)
    if given.what in ("all", "time"):
        measure(given.model, given.threads, given.rounds, given.data)
    write_documents()


if __name__ == "__main__":
    main()
