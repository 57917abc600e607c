"""Commands and flags. Each command hands its flags to the file that does the work."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Optional

import typer

# Typer answers --help in about 0.1 s here (argparse 0.03 s) as long as rich stays unloaded: that is what
# rich_markup_mode=None is for. tests/test_cli.py guards the imports.
_OPTIONS: dict[str, Any] = {"no_args_is_help": True, "rich_markup_mode": None, "add_completion": False}
app = typer.Typer(help="Train small convolutional networks on the device where the data is.",
                  pretty_exceptions_enable=False, **_OPTIONS)  # fmt: skip
profiles = typer.Typer(help="List device profiles, or show one.", invoke_without_command=True,
                       **{**_OPTIONS, "no_args_is_help": False})  # fmt: skip
app.add_typer(profiles, name="profiles")

# Typer reads these annotations at run time, on Python 3.11 too, hence Optional instead of "| None".
# It hands out a list of its own where a default is one (B006).
Text = Optional[str]  # noqa: UP045
Number = Optional[float]  # noqa: UP045
Whole = Optional[int]  # noqa: UP045
Flag = Optional[bool]  # noqa: UP045
File = Optional[Path]  # noqa: UP045

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, only the result.")]
Profile = Annotated[Text, typer.Option(help="Device profile: a name, a TOML file, or 'host'.")]
BatchSize = Annotated[Whole, typer.Option(help="Instances per step.")]
Threads = Annotated[Whole, typer.Option(help="Threads to compute with.")]
MemoryBudget = Annotated[Text, typer.Option(help="Memory the run may use, such as 64MiB or 1GiB.")]
Source = Annotated[str, typer.Option("--data", help="'embedded', a folder, or an array file.")]
Split = Annotated[Text, typer.Option(help="Part of the data: train, validation or test.")]
Trained = Annotated[str, typer.Argument(help="A run folder, a checkpoint, or an .onnx file.")]
RunFolder = Annotated[Path, typer.Argument(help="A run folder such as runs/fit-1.")]
ModelName = Annotated[str, typer.Argument(help="A built-in model such as lenet5, or an .onnx file.")]
InputShape = Annotated[Text, typer.Option(help="Shape of one input, such as 1x28x28.")]
Classes = Annotated[Whole, typer.Option(help="Number of classes.")]

FIT_NOTES = (
    "What has no default above is the profile's (edgetrain profiles show NAME); lr is 0.001 with adam and adamw, in "
    "streams a fifth of the recipe's. Methods (--filter, --sparsity, --error-pruning) are written "
    "name:key=value,key=value; docs/methods.md lists all names, keys and defaults, and a wrong one is answered with "
    "those there are. With --stream --data -, every line of standard input is one instance: a JSON object with its "
    "label y and its pixels from 0 to 255, its numbers x, or the path of its image: "
    '{"pixels": [0, 17, 255], "y": 3} or {"image": "a/b.png", "y": "cat"}.'
)


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Train small convolutional networks on the device where the data is."""


@app.command(epilog=FIT_NOTES)
def fit(
    context: typer.Context,
    model: Annotated[Text, typer.Option(help="Built-in model or .onnx file. [default: lenet5]")] = None,
    data: Annotated[Text, typer.Option(help="'embedded', a folder, or an array file. [default: embedded]")] = None,
    profile: Profile = None,
    epochs: Annotated[Whole, typer.Option(help="Passes over the training data.")] = None,
    batch_size: BatchSize = None,
    lr: Annotated[Number, typer.Option(help="Learning rate; the peak of the schedule.")] = None,
    optimizer: Annotated[Text, typer.Option(help="sgd, adam or adamw.")] = None,
    momentum: Annotated[Number, typer.Option(help="Momentum of sgd.")] = None,
    nesterov: Annotated[Flag, typer.Option(help="Nesterov's form of momentum.")] = None,
    weight_decay: Annotated[Number, typer.Option(help="Weight decay.")] = None,
    clip_norm: Annotated[Number, typer.Option(help="Largest norm of the gradient. [with swat: 1]")] = None,
    averaging: Annotated[Number, typer.Option(help="Average parameters: weight of the past. [streams: 0.99]")] = None,
    schedule: Annotated[Text, typer.Option(help="constant, step, cosine or one_cycle.")] = None,
    warmup: Annotated[Number, typer.Option(help="Share of the steps in which the learning rate rises.")] = None,
    label_smoothing: Annotated[Number, typer.Option(help="Share of a label spread over all classes.")] = None,
    augment: Annotated[Text, typer.Option(help="Random changes, such as 'flip,crop:4,shift:2'.")] = None,
    normalize: Annotated[Flag, typer.Option(help="Normalise inputs with statistics of the training data.")] = None,
    image_size: Annotated[Text, typer.Option(help="Resize a folder of images, such as 32x32.")] = None,
    seed: Annotated[Whole, typer.Option(help="Of weights, order and augmentation. [default: 0]")] = None,
    threads: Threads = None,
    memory_budget: MemoryBudget = None,
    initial_weights: Annotated[Text, typer.Option(help="An .onnx file to start from.")] = None,
    recipe: Annotated[Text, typer.Option(help="edge or dense. [streams of trained networks on boards: edge]")] = None,
    filter_: Annotated[Text, typer.Option("--filter", help="Instance filter, such as eif:rate=0.3; or none.")] = None,
    sparsity: Annotated[Text, typer.Option(help="Weight sparsity, such as swat:weights=0.9; or none.")] = None,
    error_pruning: Annotated[Text, typer.Option(help="Error pruning, such as channels:keep=0.7; or none.")] = None,
    baseline: Annotated[bool, typer.Option(help="Train densely as well afterwards, and compare.")] = False,
    stream: Annotated[Flag, typer.Option(help="Learn from the data once, in order; --data - reads stdin.")] = None,
    predict_first: Annotated[Flag, typer.Option(help="In a stream: predict every instance before learning.")] = None,
    window: Annotated[Whole, typer.Option(help="In a stream: about so many instances a row. [default: 1000]")] = None,
    save_every: Annotated[Number, typer.Option(help="Minutes between checkpoints on the way. [default: 10]")] = None,
    config: Annotated[File, typer.Option(help="A config.toml of another run to start from.")] = None,
    set_: Annotated[list[str], typer.Option("--set", metavar="KEY=VALUE", help="Any key of config.toml.")] = [],  # noqa: B006
    out: Annotated[Path, typer.Option(help="Folder that gets the run folder.")] = Path("runs"),
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Train a model; by default lenet5 on embedded images."""
    from edgetrain.cli.training import fit_command

    fit_command(context.params | {"filter": filter_})


@app.command()
def resume(
    run: RunFolder,
    epochs: Annotated[Whole, typer.Option(help="Change the number of epochs.")] = None,
    threads: Threads = None,
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Go on exactly where an interrupted run stopped."""
    from edgetrain.cli.training import resume_command

    resume_command(run, epochs=epochs, threads=threads, quiet=quiet, as_json=json)


@app.command()
def evaluate(
    model: Trained,
    data: Annotated[
        Text, typer.Option(help="'embedded', a folder, or an array file; by default what a run was judged on.")
    ] = None,
    split: Split = None,
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Print loss and accuracy of a trained model."""
    from edgetrain.cli.inference import evaluate_command

    evaluate_command(model, data, split, threads, as_json=json)


@app.command()
def predict(
    model: Trained,
    data: Annotated[str, typer.Argument(help="An image, a folder of images, an .npz file with x, or a data source.")],
    split: Split = None,
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Print the class of every image."""
    from edgetrain.cli.inference import predict_command

    predict_command(model, data, split, threads, as_json=json)


@app.command()
def export(
    model: Annotated[str, typer.Argument(help="A run folder or a checkpoint.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The file to write.")] = Path("model.onnx"),
    best: Annotated[bool, typer.Option("--best", help="The best epoch of a run, not the last.")] = False,
    json: Json = False,
) -> None:
    """Write a trained model as an ONNX file."""
    from edgetrain.cli.inference import export_command

    export_command(model, output, best=best, as_json=json)


@app.command()
def plan(
    model: ModelName = "lenet5",
    batch_size: BatchSize = None,
    profile: Profile = None,
    memory_budget: MemoryBudget = None,
    optimizer: Annotated[str, typer.Option(help="sgd, adam or adamw.")] = "sgd",
    input_shape: InputShape = None,
    classes: Classes = None,
    threads: Threads = None,
    filter_: Annotated[Text, typer.Option("--filter", help="Instance filter, as for fit.")] = None,
    sparsity: Annotated[Text, typer.Option(help="Weight sparsity, as for fit.")] = None,
    error_pruning: Annotated[Text, typer.Option(help="Error pruning, as for fit.")] = None,
    averaging: Annotated[Number, typer.Option(help="Averaged parameters, as for fit.")] = None,
    stream: Annotated[bool, typer.Option("--stream", help="With what fit --stream does by default.")] = False,
    json: Json = False,
) -> None:
    """Print the memory that training will need."""
    from edgetrain.cli.planning import plan_command

    methods = {"filter": filter_, "sparsity": sparsity, "error_pruning": error_pruning}
    training = {"optimizer": optimizer} | ({} if averaging is None else {"averaging": averaging})
    plan_command(model, batch_size, profile, memory_budget, training, input_shape, classes, threads, methods,
                 stream=stream, as_json=json)  # fmt: skip


@app.command()
def verify(
    model: ModelName,
    steps: Annotated[int, typer.Option(min=1, help="Training steps to compare.")] = 20,
    batch_size: Annotated[int, typer.Option(min=1, help="Instances per step.")] = 8,
    input_shape: InputShape = None,
    classes: Classes = None,
    seed: Annotated[int, typer.Option(help="Of weights and batches.")] = 0,
    json: Json = False,
) -> None:
    """Compare gradients and training with PyTorch."""
    from edgetrain.cli.planning import verify_command

    verify_command(model, steps, batch_size, input_shape, classes, seed, as_json=json)


@app.command()
def bench(
    model: Annotated[list[str], typer.Option(help="A built-in model or an .onnx file. [default: five models]")] = [],  # noqa: B006
    batch_size: Annotated[list[int], typer.Option(min=1, help="Instances per step. [default: 1, 8, 32, 128]")] = [],  # noqa: B006
    threads: Annotated[list[int], typer.Option(min=1, help="Threads of every contender. [default: 1, 2]")] = [],  # noqa: B006
    contenders: Annotated[
        list[str],
        typer.Option(
            help="torch, torch-channels-last, jax, tinygrad, mnn, onert or onnxruntime-training. [default: PyTorch]"
        ),
    ] = [],  # noqa: B006
    turns: Annotated[int, typer.Option(min=1, help="Turns of every contender.")] = 15,
    per_op: Annotated[bool, typer.Option("--per-op", help="Time every node of the step instead.")] = False,
    start_up: Annotated[bool, typer.Option(help="Time the start with and without compiled kernels.")] = True,
    json: Json = False,
    out: Annotated[File, typer.Option(help="A file that gets the JSON document too.")] = None,
) -> None:
    """Time training steps against PyTorch or further peers.

    Options with several values may be repeated. Leave the machine alone meanwhile. Every contender but PyTorch is an
    extra of its own: pip install "edgetrain[tinygrad]".
    """
    from edgetrain.cli.benchmarking import bench_command

    bench_command(model, batch_size, threads, contenders, turns=turns, per_op=per_op, start_up=start_up, as_json=json,
                  out=out)  # fmt: skip


@app.command()
def report(
    run: RunFolder,
    plot: Annotated[
        bool, typer.Option("--plot", help="Draw accuracy.svg into the run folder.")
    ] = False,
    against: Annotated[list[Path], typer.Option(help="Another run in the plot; may be repeated.")] = [],  # noqa: B006
    json: Json = False,
) -> None:
    """Summarise a run: settings, epochs, what was saved, files."""
    from edgetrain.cli.reporting import report_command

    report_command(run, plot=plot, against=against, as_json=json)


@app.command()
def doctor(
    kernels: Annotated[bool, typer.Option("--kernels", help="Print kernel and tile of every product.")] = False,
    calibrate: Annotated[bool, typer.Option("--calibrate", help="Measure which tiles are best here.")] = False,
    model: Annotated[list[str], typer.Option(help="For these models only. [default: built-in ones]")] = [],  # noqa: B006
    batch_size: BatchSize = None,
    profile: Profile = None,
    sparsity: Annotated[Text, typer.Option(help="With --kernels: weight sparsity, as for fit.")] = None,
    error_pruning: Annotated[Text, typer.Option(help="With --kernels: error pruning, as for fit.")] = None,
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Look at this machine and say what to improve.

    With --kernels or --calibrate: the kernels of training steps.
    """
    from edgetrain.cli.machine import doctor_command

    methods = {"sparsity": sparsity, "error_pruning": error_pruning}
    doctor_command(model, batch_size, profile, methods, kernels=kernels, calibrate=calibrate, quiet=quiet, as_json=json)


@app.command()
def warmup(profile: Profile = None, quiet: Quiet = False, json: Json = False) -> None:
    """Compile the built-in models' kernels for the profile's batch size, so that training starts at once."""
    from edgetrain.cli.warming import warmup_command

    warmup_command(profile, quiet=quiet, as_json=json)


@profiles.callback()
def list_by_default(context: typer.Context, json: Json = False) -> None:
    """List device profiles, or show one."""
    if context.invoked_subcommand is None:
        list_command(json)
    elif json:
        raise typer.BadParameter(f"expected behind '{context.invoked_subcommand}'", param_hint="--json")


@profiles.command("list")
def list_command(json: Json = False) -> None:
    """List the device profiles."""
    from edgetrain.cli.machine import list_profiles_command

    list_profiles_command(as_json=json)


@profiles.command("show")
def show(
    name: Annotated[str, typer.Argument(help="A name, a TOML file, or 'host'.")],
    json: Json = False,
) -> None:
    """Show one device profile with units and sources."""
    from edgetrain.cli.machine import show_profile_command

    show_profile_command(name, as_json=json)


@app.command()
def version(json: Json = False) -> None:
    """Print the version."""
    from edgetrain._version import __version__
    from edgetrain.cli.output import emit

    emit({"version": __version__}, f"edgetrain {__version__}", json)
