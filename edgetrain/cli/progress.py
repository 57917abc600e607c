"""What a person sees while training: a bar on a terminal, plain lines in a file, nothing when quiet."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, cast

from edgetrain.cli.output import duration, silence, write_line
from edgetrain.fitting import StepEvent
from edgetrain.history import EpochRecord, Totals
from edgetrain.units import MIB

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

# Seconds between plain lines inside an epoch: rare enough for a log, often enough to see that it lives.
_LINE_SECONDS = 10.0
_COMPILE_LINE_SECONDS = 2.0
_BAR_SECONDS = 0.1


class Display:
    """Shows nothing: the quiet display, and what the others have in common.

    Args:
        stream: where text goes.
        budget_mib: memory budget of the run.
    """

    def __init__(self, stream: TextIO, budget_mib: float = 0.0) -> None:
        """Prepare; nothing is shown yet."""
        self.stream, self.budget_mib = stream, budget_mib
        self._epochs, self._held_out = 0, "validation"

    def begin(self, epochs: int, held_out: str) -> None:
        """Learn how long the run is, and what the validation data are called."""
        self._epochs, self._held_out = epochs, held_out

    def say(self, text: str) -> None:
        """Show a message."""

    def compiling(self, kernel: str, number: int, total: int) -> None:
        """Show that a kernel is being compiled."""

    def step(self, event: StepEvent) -> None:
        """Show how the epoch is going."""

    def instances(self, position: int, length: int | None, total: Totals) -> None:
        """Show how a stream is going: instances done, of how many if that is known, sums since the last line."""

    def epoch(self, record: EpochRecord) -> None:
        """Show the result of an epoch."""
        self.say(self._epoch_line(record))

    def close(self) -> None:
        """Leave the terminal tidy."""

    def _epoch_line(self, record: EpochRecord) -> str:
        parts = [f"epoch {record.epoch}/{self._epochs}", f"loss {record.loss:.4f}", f"accuracy {record.accuracy:.4f}"]
        if record.validation_accuracy is not None:
            parts.append(f"{self._held_out} accuracy {record.validation_accuracy:.4f}")
        return "  ".join([*parts, f"{record.images_per_second:,.0f} images/s", duration(record.seconds)])

    def _facts(self, total: Totals) -> list[str]:
        # Of a stream whose first micro-batch fills, nothing is known yet.
        facts = [f"loss {total.mean_loss:.3f}", f"acc {total.accuracy:.3f}"] if total.judged else []
        facts += [
            f"{total.images_per_second:,.0f} images/s",
            f"memory {resident_mib():.0f}/{self.budget_mib:.0f} MiB",
        ]
        if total.macs_dense:
            facts.append(f"computed {total.macs_done / total.macs_dense:.0%}")
        return facts


class PlainDisplay(Display):
    """One line per epoch, and every few seconds inside a long one."""

    _next_line = _next_kernel = 0.0

    def say(self, text: str) -> None:
        """Write one line."""
        write_line(text, self.stream)
        self._next_line = time.monotonic() + _LINE_SECONDS

    def compiling(self, kernel: str, number: int, total: int) -> None:
        """Write the first kernel at once, the others every few seconds."""
        if time.monotonic() >= self._next_kernel:
            self.say(f"compiling kernels (once) {number}/{total}: {kernel}")
            self._next_kernel = time.monotonic() + _COMPILE_LINE_SECONDS

    def step(self, event: StepEvent) -> None:
        """Write a line every few seconds."""
        if time.monotonic() >= self._next_line:
            head = f"epoch {event.epoch}/{self._epochs}  {event.batch / event.batches:.0%}"
            self.say("  ".join([head, *self._facts(event.total)]))

    def instances(self, position: int, length: int | None, total: Totals) -> None:
        """Write a line every few seconds."""
        if time.monotonic() >= self._next_line:
            head = f"{position:,}" if length is None else f"{position:,}/{length:,}  {position / length:.0%}"
            self.say("  ".join([head, *self._facts(total)]))

    def begin(self, epochs: int, held_out: str) -> None:
        """Wait one interval before the first line inside an epoch."""
        super().begin(epochs, held_out)
        self._next_line = time.monotonic() + _LINE_SECONDS


class BarDisplay(Display):
    """A progress bar with the time left; finished epochs scroll away above it."""

    def __init__(self, stream: TextIO, budget_mib: float = 0.0) -> None:
        """Prepare the bar; it appears with the first step or kernel."""
        super().__init__(stream, budget_mib)
        self._bar = _progress(stream)
        self._task: TaskID | None = None
        self._next_update = 0.0

    def say(self, text: str) -> None:
        """Write a line above the bar."""
        self._bar.console.print(text, highlight=False, markup=False)

    def compiling(self, kernel: str, number: int, total: int) -> None:
        """Use the bar for the kernels."""
        self._show(f"compiling kernels (once) {number}/{total}", number - 1, total, kernel)

    def step(self, event: StepEvent) -> None:
        """Move the bar, a few times per second at most: redrawing costs time on a small board."""
        done = (event.epoch - 1) * event.batches + event.batch
        head = f"epoch {event.epoch}/{self._epochs}"
        self._move(head, done, self._epochs * event.batches, event.total, event.batch == event.batches)

    def instances(self, position: int, length: int | None, total: Totals) -> None:
        """Move the bar; of unknown length, it moves without a share and a time left."""
        head = f"{position:,} instances" if length is None else f"{position:,}/{length:,}"
        self._move(head, position, length, total, position == length)

    def _move(self, head: str, done: int, whole: int | None, total: Totals, at_once: bool) -> None:
        now = time.monotonic()
        if at_once or now >= self._next_update:
            self._next_update = now + _BAR_SECONDS
            self._show(head, done, whole, "  ".join(self._facts(total)))

    def begin(self, epochs: int, held_out: str) -> None:
        """Take the bar of the kernels away."""
        super().begin(epochs, held_out)
        self._remove()

    def close(self) -> None:
        """Take the bar away."""
        self._remove()
        self._bar.stop()

    def _show(self, head: str, done: int, total: int | None, facts: str) -> None:
        if self._task is None:
            self._bar.start()
            # A resumed run begins in the middle: counted as progress, that would spoil the time left.
            self._task = self._bar.add_task(head, total=total, completed=done, facts=facts)
        self._bar.update(self._task, description=head, completed=done, total=total, facts=facts)

    def _remove(self) -> None:
        if self._task is not None:
            self._bar.remove_task(self._task)
            self._task = None


def choose_display(quiet: bool, as_json: bool, budget_mib: float) -> Display:
    """Return the display for this process: with ``--json``, standard output belongs to the result."""
    stream = sys.stderr if as_json else sys.stdout
    if quiet or stream is None:  # which it is where standard output was closed before the program began
        return Display(stream, budget_mib)
    return (BarDisplay if stream.isatty() else PlainDisplay)(cast(TextIO, Unfailing(stream)), budget_mib)


class Unfailing:
    """A stream that loses what it cannot write: hours of training are worth more than what they print.

    Args:
        stream: whose pipe may end, whose disk may be full, whose terminal may be gone.
    """

    def __init__(self, stream: TextIO) -> None:
        """Begin with a stream that can be written."""
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        """Be the stream but for ``write`` and ``flush``."""
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write a text, or lose it."""
        self._try(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        """Write what waits, or lose it."""
        self._try(self._stream.flush)

    def _try(self, write: Callable[[], object]) -> None:
        try:
            write()
        except OSError as error:
            silence(self._stream)
            reason = f"standard output cannot be written ({error.strerror})"
            if isinstance(error, BrokenPipeError):
                reason = "nobody reads standard output any more"
            with contextlib.suppress(OSError):  # it may be the same terminal
                write_line(f"{reason}; going on without it", sys.stderr)


class CompileNotice:
    """While open, tells a display about every kernel that has to be compiled."""

    def __init__(self, show: Callable[[str, int, int], None]) -> None:
        """Take the function that shows (kernel name, number, number of kernels)."""
        self._show = show

    def __enter__(self) -> None:
        """Register with the kernel table."""
        from edgetrain.kernels.registry import on_compile

        on_compile.append(self._show)

    def __exit__(self, *error: object) -> None:
        """Take the registration back."""
        from edgetrain.kernels.registry import on_compile

        on_compile.remove(self._show)


def resident_mib() -> float:
    """Return the memory that this process occupies, MiB; 0 where the system does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except (OSError, ValueError, IndexError):
        return 0.0
    return pages * _page_size() / MIB


def _page_size() -> int:
    import resource

    return resource.getpagesize()


def _progress(stream: TextIO) -> Progress:
    # Here, not above: rich takes 0.1 s to import on this machine, and only terminals need it.
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
    from rich.table import Column

    # On a narrow terminal the facts at the end are cut; nothing wraps.
    cut = Column(no_wrap=True, overflow="ellipsis", ratio=1)
    columns: tuple[Any, ...] = (
        TextColumn("{task.description}"), BarColumn(bar_width=12), TaskProgressColumn("{task.percentage:3.0f}%"),
        TimeRemainingColumn(), TextColumn("{task.fields[facts]}", table_column=cut),
    )  # fmt: skip
    return Progress(*columns, console=Console(file=stream), transient=True, refresh_per_second=4, expand=True)
