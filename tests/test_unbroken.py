"""Work that an interrupt does not break into."""

from __future__ import annotations

import _thread
import os
import signal
import threading

import pytest

from edgetrain.unbroken import unbroken


def test_an_interrupt_is_raised_behind_all_of_the_work():
    done = []

    def work() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        done.extend(range(1000))

    with pytest.raises(KeyboardInterrupt):
        unbroken(work)
    assert len(done) == 1000


def test_what_the_work_raises_comes_before_an_interrupt():
    def work() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        unbroken(work)


def test_where_no_handler_runs_the_work_needs_no_other_thread():
    threads = []
    other = threading.Thread(target=lambda: unbroken(lambda: threads.append(threading.get_ident())))
    other.start()
    other.join()
    assert threads == [other.ident]


def test_without_room_for_a_thread_the_work_is_done_all_the_same(monkeypatch):
    def full(*arguments):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(_thread, "start_new_thread", full)
    done = []
    unbroken(lambda: done.append(1))
    assert done == [1]
