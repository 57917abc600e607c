"""The command line: flags to calls, results to text.

``app`` declares commands and flags and imports nothing heavy; every command imports its own file when it
runs, so ``edgetrain --help`` needs neither NumPy nor Numba nor onnx. Exit codes: 0 done, 1 a verification
disagreed, 2 usage, 3 bad model or data or numbers that are not finite, 4 over the memory budget, 5 interrupted with
the state saved; 70 is a defect of edgetrain itself, 130 Ctrl-C in other commands than fit and resume.
"""

from __future__ import annotations

import io
import re
import sys
import traceback
from collections.abc import Sequence

__all__ = ["main"]

DEFECT = 70


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command and leave the process with its exit code.

    Args:
        arguments: without the program's name; those of the process by default.

    Raises:
        SystemExit: always; ``--debug`` prints the traceback of an error in place of its message.
    """
    from edgetrain.cli.app import app
    from edgetrain.cli.output import silence, write_line

    given = list(sys.argv[1:] if arguments is None else arguments)
    # The flag is global, but people add it at the end of the line that just failed.
    debug = "--debug" in given
    given = [argument for argument in given if argument != "--debug"]
    for stream in (sys.stdout, sys.stderr):
        # A name that the terminal cannot show, or that is no UTF-8, must not end a training.
        if isinstance(stream, io.TextIOWrapper):
            if stream.encoding.lower().replace("-", "") != "utf8":
                stream.reconfigure(errors="replace")
            elif stream is sys.stdout:  # errors are escaped anyway
                stream.reconfigure(errors="surrogateescape")
    try:
        app(given, prog_name="edgetrain")
    except Exception as error:
        message, exit_code = _described(error)
        message = re.sub(r"[\x00-\x1f\x7f]", lambda found: repr(found[0])[1:-1], message)  # one line, whatever it names
        try:
            write_line("".join(traceback.format_exception(error)).rstrip() if debug else message, sys.stderr)
        except OSError:  # a closed terminal, a full disk: the exit code tells
            silence(sys.stderr)
        sys.exit(exit_code)


def _described(error: Exception) -> tuple[str, int]:
    """Return one message about an error, and the exit code."""
    from edgetrain.errors import EdgetrainError, InterruptedRunError

    if isinstance(error, InterruptedRunError):
        return f"interrupted: {error}", error.exit_code
    if isinstance(error, EdgetrainError):
        return f"error: {error}", error.exit_code
    if isinstance(error, MemoryError):
        return "error: out of memory; use a smaller --batch-size, or close other programs", 4
    if isinstance(error, OSError):
        return f"error: {error.filename or 'system'}: {error.strerror or error}; check path, rights and space", 2
    message = f"{type(error).__name__}: {error}; this is a defect of edgetrain: repeat with --debug and report it"
    return f"error: {message}", DEFECT
