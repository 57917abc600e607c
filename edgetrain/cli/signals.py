"""Stopping in order: a signal asks, the loop ends between two steps."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from edgetrain.cli.progress import Display


@contextmanager
def interrupts_kept() -> Iterator[None]:
    """Let no SIGINT be lost while kernels are compiled: one that breaks into LLVM's calls back to Python is ignored.

    Whoever has taken over the signal, as ``StopOnSignal``, keeps it.

    Raises:
        KeyboardInterrupt: behind it, if one came.
    """
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    came = []

    def note(number: int, frame: object) -> None:
        came.append(number)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if came:
        raise KeyboardInterrupt


class StopOnSignal:
    """While open, SIGINT, SIGTERM and SIGHUP ask for a stop after the present step; a second SIGINT aborts at once.

    SIGHUP comes when a terminal or a connection is closed; ``nohup`` has it ignored, and it stays so.

    A command opens it before its run folder is made, and closes it behind its last line.
    """

    def __init__(self, display: Display) -> None:
        self._display = display
        self._asked = self._told = self._unbroken = False
        self._before: dict[int, Any] = {}

    def requested(self) -> bool:
        """Tell whether a signal came."""
        # Said here, between steps: a signal handler that writes may break into another write.
        if self._asked and not self._told:
            self._told = True
            self._display.say("stopping; press Ctrl-C to stop at once, without saving")
        return self._asked

    @contextmanager
    def unbroken(self) -> Iterator[None]:
        """Let no second SIGINT abort what takes a moment: onnx does not survive one while it is imported."""
        self._unbroken = True
        try:
            yield
        finally:
            self._unbroken = False

    def __enter__(self) -> StopOnSignal:
        """Take over the signals."""
        numbers = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
            numbers.append(signal.SIGHUP)
        self._before = {number: signal.signal(number, self._ask) for number in numbers}
        return self

    def __exit__(self, *error: object) -> None:
        """Give the signals back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: object) -> None:
        if self._asked and number == signal.SIGINT and not self._unbroken:
            raise KeyboardInterrupt
        self._asked = True
