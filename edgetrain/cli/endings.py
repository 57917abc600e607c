"""How runs over epochs and streams end alike: their beginning noted, the dense twin told, the plot drawn, advice."""

from __future__ import annotations

from typing import Any

from edgetrain._version import __version__
from edgetrain.cli.config import Config
from edgetrain.cli.progress import Display
from edgetrain.devices import DeviceProfile
from edgetrain.errors import EdgetrainError, UsageError
from edgetrain.runs import Run


def begin(run: Run, config: Config, *, comparison: str = "") -> None:
    """Write the files of a run that has its first checkpoint.

    The configuration comes last: a folder that has one can be resumed, even if the power fails right now.

    Args:
        run: whose folder it is.
        config: of the run.
        comparison: as ``Run.comparison`` returns it.
    """
    run.log("started", edgetrain=__version__, comparison=comparison)
    run.write_metrics(())
    run.write_config(config.to_dict())


def tell_profile(display: Display, profile: DeviceProfile) -> None:
    """Say what is taken from the profile of another machine, and what is not."""
    if profile.name != "host":
        display.say(
            f"profile {profile.name}: its batch size, memory budget and recipe are used; all times are this machine's, "
            "not the device's"
        )


def begin_baseline(run: Run) -> Run:
    """Make the folder of the dense twin inside the run's folder, and lock it."""
    twin = run.baseline
    twin.path.mkdir(exist_ok=True)
    twin.lock()
    return twin


def is_done(run: Run) -> bool:
    """Tell whether a run has nothing left to write: its own files, its dense twin if asked for, and its account."""
    return run.status() == "finished" and run.model.exists() and not run.lacks_account()


def baseline_facts(run: Run) -> dict[str, Any]:
    """Return times and accuracy of the finished dense twin in this folder, for ``savings.savings_of``."""
    finished = [event for event in run.read_events() if event["event"] == "finished"]
    return {
        "seconds": sum(row["seconds"] or 0.0 for row in run.read_metrics()), "whole_seconds": run.whole_seconds(),
        "accuracy": finished[-1]["accuracy"] if finished else None, "run": str(run.path),
        "how": "measured, the same data without the methods",
    }  # fmt: skip


def draw(run: Run, display: Display) -> None:
    """Draw a run beside its baseline into its folder; where that fails, say so: the run is done all the same."""
    from edgetrain.cli.plotting import plot_runs

    try:
        display.say(f"plot: {plot_runs(run, [run.baseline])}")
    except UsageError as error:
        display.say(f"no plot: {error}")
    except Exception as error:  # whatever a drawing library raises
        display.say(f"no plot: {type(error).__name__}: {error}; try again with: edgetrain report {run.path} --plot")


def resuming(run: Run) -> str:
    """Return the command that goes on with a run; of a dense twin, that of the run that wants it."""
    return f"edgetrain resume {run.path.parent if run.comparison() == 'baseline' else run.path}"


def how_to_go_on(error: EdgetrainError, run: Run, config: Config) -> str:
    """Return what to do after a step that was not finite: the same step again would fail again."""
    weights = run.path / "start.onnx"
    return (
        f"{error}; the state before it is saved in {run.last}, but the same step would fail again. Start a new run "
        f"with a lower learning rate: edgetrain fit --config {run.config_file} --lr {config.training.lr / 10:g} (or "
        f"with --clip-norm 1); where the saved weights are good (edgetrain evaluate {run.path}), go on from them: "
        f"edgetrain export {run.path} -o {weights}, and fit with --initial-weights {weights}"
    )
