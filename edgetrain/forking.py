"""Locks that a fork respects: it waits until no other thread holds one.

A forked child has one thread. A lock that another thread held at that moment would stay shut in the child for ever,
and what it guards would be half done: a training step, or a kernel in LLVM's hands.
"""

from __future__ import annotations

import itertools
import os
import threading
import time
import weakref
from typing import NoReturn

# Longest wait for running steps, all together. The fork happens then nevertheless, and only learners that were busy
# hang in the child: better than an application that never gets its child.
_SECONDS = 30.0
_NUMBERS = itertools.count()
_LOCKS: weakref.WeakValueDictionary[int, ForkLock] = weakref.WeakValueDictionary()
_HELD = threading.local()


class NotCopied:
    """What has threads and memory of its own, such as a learner.

    Raises:
        TypeError: it is copied or pickled.
    """

    def __reduce__(self) -> NoReturn:
        """Refuse, for ``copy`` and ``pickle`` both ask here."""
        raise TypeError(f"a {type(self).__name__} cannot be copied or pickled; save it, and load the file where it is "
                        "wanted (Learner.save, Learner.load), or take learner.state()")  # fmt: skip


class ForkLock:
    """A reentrant lock that no other thread holds when a process forks.

    Forks take locks from the newest to the oldest: what is inside of others must have been made before them.
    """

    def __init__(self) -> None:
        self._lock, self.number = threading.RLock(), next(_NUMBERS)
        _LOCKS[self.number] = self

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *error: object) -> None:
        self._lock.release()

    def wait(self, seconds: float) -> bool:
        """Take the lock within some seconds; return whether that went well."""
        return self._lock.acquire(timeout=max(0.0, seconds))


def _take_all() -> None:
    deadline = time.monotonic() + _SECONDS
    alive = [lock for reference in _LOCKS.valuerefs() if (lock := reference()) is not None]
    newest_first = sorted(alive, key=lambda lock: -lock.number)
    _HELD.locks = [lock for lock in newest_first if lock.wait(deadline - time.monotonic())]


def _give_back() -> None:
    for lock in reversed(_HELD.locks):
        lock.__exit__()
    _HELD.locks = []


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_take_all, after_in_parent=_give_back, after_in_child=_give_back)
