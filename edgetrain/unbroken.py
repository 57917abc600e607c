"""Work that an interrupt must not break into: Ctrl-C, or whatever else the handler of a signal raises."""

from __future__ import annotations

import _thread
import threading
from collections.abc import Callable
from itertools import starmap


def unbroken(work: Callable[[], None]) -> None:
    """Do all of some work, and raise an interrupt that came meanwhile only then.

    Handlers of signals run in the main thread. So another one works, and the main thread waits; to start it takes
    some 50 us.

    Raises:
        BaseException: what ``work`` raises, or the interrupt.

    Example:
        >>> done = []
        >>> unbroken(lambda: done.append("all"))
        >>> done
        ['all']
    """
    if threading.current_thread() is not threading.main_thread():
        work()
        return
    over = threading.Lock()
    over.acquire()
    failed: list[BaseException] = []
    started: list[int] = []
    ended: list[bool] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            failed.append(error)
        ended.append(True)
        over.release()

    struck: BaseException | None = None
    while not ended:
        try:
            if not started:
                # One call of C: an interrupt is raised before it, or when it is known that the thread runs.
                started += starmap(_thread.start_new_thread, ((run, ()),))
            over.acquire()
        except BaseException as interrupt:
            struck = interrupt
            if not started and isinstance(interrupt, RuntimeError):  # there is no room for another thread
                struck = None
                run()
    if failed:
        raise failed[0]
    if struck is not None:
        raise struck
