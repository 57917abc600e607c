"""Train with one recipe in edgetrain and in PyTorch, several seeds, and compare the test accuracy.

Usage:
    python benchmarks/accuracy.py embedded  [--seeds 5]          the default recipe of raspberrypi4
    python benchmarks/accuracy.py /usr/share/datasets/fashion-mnist --epochs 15 --seeds 2

Both sides see the same batches in the same order; PyTorch initialises its own weights
(same families, its own random numbers) and uses its own layers, loss and optimizer.
Results are stored in benchmarks/results/ and docs/accuracy.md is generated from all of them.
"""

import argparse
import json
import statistics
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

import edgetrain as et
from edgetrain.bench_torch import torch_module
from edgetrain.data import Augmentation, Dataset, batch_count, batches, load_dataset
from edgetrain.optim import from_recipe

RESULTS = Path(__file__).parent / "results"
DOCUMENT = Path(__file__).parent.parent / "docs" / "accuracy.md"


def train_own(training: Dataset, test: Dataset, recipe, batch_size: int, seed: int, threads: int) -> float:
    """Return edgetrain's test accuracy."""
    graph = et.models.lenet5(training.input_shape, training.num_classes, seed=seed)
    learner = et.Learner(graph, batch_size=batch_size, seed=seed, threads=threads, optimizer=recipe.optimizer,
                         label_smoothing=recipe.label_smoothing)  # fmt: skip
    history = learner.fit(training, epochs=recipe.epochs, validation=test, augmentation=recipe.augmentation)
    return history.epochs[-1].validation_accuracy


def train_torch(training: Dataset, test: Dataset, recipe, batch_size: int, seed: int, threads: int) -> float:
    """Return PyTorch's test accuracy."""
    torch.manual_seed(seed)
    torch.set_num_threads(threads)
    module = torch_module(et.models.lenet5(training.input_shape, training.num_classes))
    for layer in module.layers:
        if hasattr(layer, "reset_parameters"):
            layer.reset_parameters()
    own = recipe.optimizer.with_total_steps(recipe.epochs * batch_count(len(training), batch_size))
    decayed = [p for p in module.parameters() if p.dim() > 1 or own.decay_bias_and_norm]
    other = [p for p in module.parameters() if p.dim() <= 1 and not own.decay_bias_and_norm]
    optimizer = torch.optim.SGD(
        [{"params": decayed, "weight_decay": own.weight_decay}, {"params": other, "weight_decay": 0.0}], lr=own.lr,
        momentum=own.momentum, nesterov=own.nesterov,
    )  # fmt: skip
    loss_of = torch.nn.CrossEntropyLoss(label_smoothing=recipe.label_smoothing)
    mean, std = (a.reshape(1, -1, 1, 1) for a in training.statistics())
    step = 0
    for epoch in range(recipe.epochs):
        for x, y in batches(training, batch_size, seed=seed, epoch=epoch, augmentation=recipe.augmentation):
            for group in optimizer.param_groups:
                group["lr"] = own.lr_at(step)
            optimizer.zero_grad()
            loss_of(module(torch.from_numpy((x - mean) / std)), torch.from_numpy(y)).backward()
            if own.clip_norm:
                torch.nn.utils.clip_grad_norm_(module.parameters(), own.clip_norm)
            optimizer.step()
            step += 1
    module.eval()
    x, y = test.take(np.arange(len(test)))
    with torch.no_grad():
        return float((module(torch.from_numpy((x - mean) / std)).argmax(1).numpy() == y).mean())


def run(arguments: argparse.Namespace) -> dict:
    """Train all seeds on both sides and return the result."""
    profile = et.load_profile(arguments.profile)
    recipe = replace_recipe(profile.recipe, arguments)
    training, test = (load_dataset(arguments.data, split=split) for split in ("train", "test"))
    batch_size = arguments.batch_size or profile.batch_size
    accuracies: dict[str, list[float]] = {"edgetrain": [], "PyTorch": []}
    for seed in range(arguments.seeds):
        for name, train in (("edgetrain", train_own), ("PyTorch", train_torch)):
            start = time.perf_counter()
            accuracies[name].append(train(training, test, recipe, batch_size, seed, arguments.threads))
            print(f"seed {seed} {name:9s} {accuracies[name][-1]:.4f} {time.perf_counter() - start:.1f} s", flush=True)
    return {
        "data": training.name, "images": [len(training), len(test)], "profile": profile.name, "batch_size": batch_size,
        "threads": arguments.threads, "recipe": recipe.text, "accuracies": accuracies,
    }  # fmt: skip


class Recipe:
    """A recipe as objects: optimizer with schedule, epochs, augmentation, label smoothing."""

    def __init__(self, recipe, epochs: int) -> None:
        self.epochs, self.label_smoothing = epochs, recipe.label_smoothing
        self.augmentation = Augmentation.parse(recipe.augmentation) if recipe.augmentation else None
        self.optimizer = from_recipe(recipe)
        self.text = (
            f"{recipe.optimizer}, lr {recipe.lr}, momentum {recipe.momentum}, nesterov {recipe.nesterov}, weight decay "
            f"{recipe.weight_decay}, {recipe.schedule} with warm-up {recipe.warmup_fraction}, {epochs} epochs, "
            f"augmentation {recipe.augmentation or 'none'}, label smoothing {recipe.label_smoothing}"
        )


def replace_recipe(recipe, arguments: argparse.Namespace) -> Recipe:
    """Return the profile's recipe with the command line's changes."""
    changes = {"augmentation": arguments.augment} if arguments.augment is not None else {}
    changes |= {"lr": arguments.lr} if arguments.lr else {}
    return Recipe(replace(recipe, **changes), arguments.epochs or recipe.epochs)


def write_document() -> None:
    """Generate docs/accuracy.md from all stored results."""
    lines = ["# Accuracy against PyTorch", "", "Generated by `benchmarks/accuracy.py`; do not edit.", ""]
    for path in sorted(RESULTS.glob("accuracy-*.json")):
        result = json.loads(path.read_text())
        training, test = result["images"]
        lines += [f"## LeNet-5 on {result['data']} ({training:,} training, {test:,} test images)",
                  "", f"Profile {result['profile']}, batch size {result['batch_size']}, {result['threads']} threads. "
                  f"Recipe: {result['recipe']}.", "", "| | mean | standard deviation | seeds |",
                  "|---|---|---|---|"]  # fmt: skip
        for name, values in result["accuracies"].items():
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            lines.append(f"| {name} | {100 * statistics.mean(values):.2f} % | {100 * spread:.2f} | {len(values)} |")
        own, other = (statistics.mean(result["accuracies"][name]) for name in ("edgetrain", "PyTorch"))
        lines += ["", f"Difference of the means: {100 * (own - other):+.2f} points.", ""]
    DOCUMENT.write_text("\n".join(lines))


def main() -> None:
    """Run and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("--profile", default="raspberrypi4")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--lr", type=float)
    parser.add_argument("--augment")
    arguments = parser.parse_args()
    result = run(arguments)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"accuracy-{result['data']}.json").write_text(json.dumps(result, indent=1) + "\n")
    write_document()


if __name__ == "__main__":
    main()
