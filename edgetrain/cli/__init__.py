"""The command line: flags to calls, results to text.

Floor 8. ``app`` declares commands and flags and imports nothing heavy; every command imports its own file when it
runs, so ``edgetrain --help`` needs neither NumPy nor Numba nor onnx. Exit codes: 0 done, 1 a verification
disagreed, 2 usage, 3 bad model or data, 4 over the memory budget, 5 interrupted with the state saved; 70 is a
defect of edgetrain itself.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

__all__ = ["main"]

DEFECT = 70


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command and leave the process with its exit code.

    Args:
        arguments: without the program's name; those of the process by default.

    Raises:
        SystemExit: always; with ``--debug`` an error is raised as it is.
    """
    from edgetrain.cli.app import app

    given = list(sys.argv[1:] if arguments is None else arguments)
    # The flag is global, but people add it at the end of the line that just failed.
    debug = "--debug" in given
    given = [argument for argument in given if argument != "--debug"]
    try:
        app(given, prog_name="edgetrain")
    except Exception as error:
        if debug:
            raise
        sys.exit(_report(error))


def _report(error: Exception) -> int:
    """Write one message about an error; return the exit code."""
    from edgetrain.errors import EdgetrainError, InterruptedRunError

    if isinstance(error, InterruptedRunError):
        return _say(f"interrupted: {error}", error.exit_code)
    if isinstance(error, EdgetrainError):
        return _say(f"error: {error}", error.exit_code)
    if isinstance(error, MemoryError):
        return _say("error: out of memory; use a smaller --batch-size, or close other programs", 4)
    if isinstance(error, OSError):
        return _say(f"error: {error.filename or 'system'}: {error.strerror or error}; check path, rights and space", 2)
    message = f"{type(error).__name__}: {error}; this is a defect of edgetrain: repeat with --debug and report it"
    return _say(f"error: {message}", DEFECT)


def _say(message: str, exit_code: int) -> int:
    import typer

    typer.echo(message, err=True)
    return exit_code
