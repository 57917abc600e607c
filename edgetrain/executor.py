"""Running a program: compiled kernels, one call per thread, threads that persist between steps."""

from __future__ import annotations

import math
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import starmap
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgetrain.arrays import aligned
from edgetrain.graph import Value
from edgetrain.kernels.codes import ARRIVED, ROW_BYTES, STAMP_BYTES, SYNC_BYTES, TICKET
from edgetrain.kernels.registry import KernelKey, compile_kernels, interpreter
from edgetrain.parameters import Parameters
from edgetrain.plan import STAGES, Plan

_STAMP: KernelKey = ("stamp", ())
# Seconds from which all threads always run a program; runs between two trials of the other number; runs of a trial.
# While a machine's two processors shared a core, steps of ResNet-20 at batch 4 and 8 took 5.0 and 6.4 ms on two threads
# and 4.0 and 5.8 on one; at batch 32 17.1 and 20.4.
_LONG, _PAUSE, _TRIAL = 8e-3, 200, 4
# Looks for another run before a thread sleeps, some 500 us: to wake it takes 50 us and more. What Python does between
# two steps takes 30 us for LeNet-5 and 250 for ResNet-20, after whose steps it finds its own memory in no cache: with
# 1,300 looks, 100 us, a step of ResNet-20 with a tenth of its weights took 4.81 ms, so it takes 4.68 (2 threads).
_PATIENCE = 2500
# The address of the sync words of the team that runs or ran last: the threads of all others sleep after 100 us. While
# they waited longer they kept the processors from those of the team that came next: some of its steps took 1.6 ms more.
_ACTIVE = aligned(1, np.int64)


class _Order:
    """What the waiting threads need; shared with them instead of the team, so that a team can be freed."""

    def __init__(self, sync: NDArray[np.int64]) -> None:
        self.sync = sync  # held here because a thread may still look at it when the team is gone
        self.dismissed = False
        self.wanted = 0  # ticket of the latest run, or of the one that is about to begin
        self.starts: list[threading.Lock] = []

    def wake(self) -> None:
        """Let all threads look for a run; harmless when one is awake already, or when no run follows."""
        for start in self.starts:
            if start.locked():
                start.release()

    def dismiss(self) -> None:
        """End all threads."""
        self.dismissed = True
        self.wake()


def _serve(order: _Order, start: threading.Lock, number: int, ticket: int) -> None:
    """Take part in all runs; sleep when none follows soon."""
    _, follow = interpreter()
    active = _ACTIVE.ctypes.data
    while True:
        start.acquire()
        if order.dismissed:
            return
        ticket = follow(order.sync.ctypes.data, number, ticket, _PATIENCE, active)
        while ticket < order.wanted and not order.dismissed:  # woken for a run that has not begun yet
            ticket = follow(order.sync.ctypes.data, number, ticket, _PATIENCE, active)


class Pace:
    """Decides how many threads run a short program: all, or one where that is measured to be faster.

    Programs with little between two barriers are slower on two threads than on one when the threads
    share a core's units or wait for other processes: a step of LeNet-5 at batch 8 took 201 us on two threads then and
    147 on one, and 102 on two when both had a core of their own. Results do not depend on it. Now and then a few runs
    of the other kind are timed; long programs always have all threads.
    """

    def __init__(self, threads: int) -> None:
        self.threads = self._all = threads
        self._runs, self._pause, self._long = 0, _PAUSE, 0
        self._seconds: dict[int, float] = {}

    def took(self, seconds: float) -> None:
        """Take note of the seconds of a run with ``threads`` threads, and set ``threads`` for the next one."""
        if self._all == 1:
            return
        # What is long on the fewer threads of a trial alone is no long program: the trial decides, and rarely returns.
        self._long = self._long + 1 if seconds > _LONG and self._runs <= self._pause else 0
        if self._long >= _TRIAL:  # not a run of a short program that another process interrupted
            self.threads, self._runs, self._seconds = self._all, 0, {}
        if self._long:
            return
        self._runs += 1
        if self._runs <= self._pause:
            return
        trial = self._runs - self._pause
        if trial % _TRIAL != 1:  # the first run of a trial wakes threads, or lets them sleep
            self._seconds[self.threads] = min(seconds, self._seconds.get(self.threads, seconds))
        if trial == _TRIAL:
            self.threads = self._all + 1 - self.threads
        elif trial == 2 * _TRIAL:
            self._decide()

    def _decide(self) -> None:
        """Keep the faster, and leave it alone the longer, the clearer it was."""
        other = self.threads
        usual = self._all + 1 - other
        better = self._seconds[other] < 0.95 * self._seconds[usual]
        clear = self._seconds[other] > 1.3 * self._seconds[usual]
        self.threads = other if better else usual
        self._pause = min(8 * _PAUSE, 2 * self._pause) if clear else _PAUSE
        self._runs, self._seconds = 0, {}


class Team:
    """Threads that run programs together.

    The calling thread is number 0; the others are started on first use and sleep between programs, unless one follows
    soon (``_serve``). Not Numba's thread pool: that one aborts the process when it is
    entered twice. After a fork the child starts threads of its own.

    Attributes:
        threads: how many there are, the calling one included.
        sync: the words int64 that threads meet at; kernels write the status word.
        ended: what the latest run returned.
    """

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.sync: NDArray[np.int64] = aligned(SYNC_BYTES // 8, np.int64)
        self._sync_address = int(self.sync.ctypes.data)
        self._pid, self._order = 0, _Order(self.sync)
        self._lock = threading.Lock()
        self.ended: list[int] = []

    def run(self, program: int, rows: int, threads: int | None = None) -> bool:
        """Run ``rows`` rows of the program at address ``program``; return whether no guard stopped it.

        ``threads``: one or all of them; ``None`` for all.
        """
        with self._lock:
            if self.threads == 1 or threads == 1 or rows == 0:
                return self._lead(program, rows, 1)
            self._start()
            _ACTIVE[0] = self._sync_address
            self._order.wanted = int(self.sync[TICKET // 8]) + 1
            try:
                self._order.wake()
                # An interrupt strikes before or after this call, so either all threads take part or none does.
                return self._lead(program, rows, self.threads)
            finally:
                self._order.wanted = int(self.sync[TICKET // 8])

    def _lead(self, program: int, rows: int, threads: int) -> bool:
        """Run a program as its first thread, see ``kernels.program.lead``."""
        lead, _ = interpreter()
        arrived = int(self.sync[ARRIVED // 8])
        # One call of C: an interrupt that strikes while it runs is raised behind it, and its result is not lost then.
        ended: list[int] = []
        self.ended = ended
        ended += starmap(lead, ((program, rows, threads, self._sync_address, arrived),))
        return ended[0] == 0

    def _start(self) -> None:
        if self._pid == os.getpid():
            return
        order, ticket = _Order(self.sync), int(self.sync[TICKET // 8])
        weakref.finalize(self, order.dismiss)
        try:
            for number in range(1, self.threads):
                start, name = threading.Lock(), "edgetrain"
                start.acquire()
                order.starts.append(start)
                threading.Thread(target=_serve, args=(order, start, number, ticket), daemon=True, name=name).start()
            self._order, self._pid = order, os.getpid()
        except BaseException:  # an interrupt: the next run starts others
            order.dismiss()
            raise


class Arena:
    """One block of memory for everything that lives within a step; it grows and tells its users."""

    def __init__(self) -> None:
        self.memory: NDArray[np.uint8] = aligned(0, np.uint8)
        self.address = 0  # of the first byte

    def reserve(self, nbytes: int) -> None:
        """Make the arena at least this large; its content is lost when it grows."""
        if nbytes > self.memory.size or not self.address:
            self.address = 0  # first: an interrupt on the way must leave no address of memory that is gone
            self.memory = aligned(0, np.uint8)  # free the old one first
            self.memory = aligned(nbytes, np.uint8)
            self.address = int(self.memory.ctypes.data)


class Executor:
    """A plan bound to memory, ready to run.

    ``parameters`` tell how often the topology of sparse weights has changed; the lists of these are made anew then.
    """

    def __init__(self, plan: Plan, parameters: Parameters, arena: Arena, team: Team) -> None:
        self.plan, self._parameters, self._arena, self._team = plan, parameters, arena, team
        self._listed_patterns = -1  # the topology that the lists are made of
        self._addresses = compile_kernels(plan.kernels)
        self._bound = -1
        self._list_address = self._step_address = 0  # of the program's rows of either kind
        self._paces: dict[int, Pace] = {}  # by how many rows of the program are run
        self._masked = -1  # samples that the plan's mask tells apart at present
        self._sources: dict[str, list[int]] = {}
        self._program = self._arguments = aligned(0, np.int64)
        # Rows are sorted by stage: those up to a stage are the first so many.
        self._rows_until = {stage: sum(STAGES.index(r.stage) <= i for r in plan.rows) for i, stage in enumerate(STAGES)}

    def mask(self, count: int) -> None:
        """Tell the kernels how many of the samples that the plan has room for are there, in all runs from now on."""
        if self._masked != count:
            self.plan.fixed["mask"][:count] = 1
            self.plan.fixed["mask"][count:] = 0
            self._masked = count

    def run(self, sources: Mapping[str, NDArray[Any]], until: str = "update") -> bool:
        """Run the rows up to the end of a stage.

        Args:
            sources: dense float32 arrays ``(N, ...)`` by buffer name, see ``Lowering.input``.
            until: ``forward``, ``backward``, ``check`` or ``update``.

        Returns:
            False if the step was stopped because it was not finite.
        """
        self._prepare(sources)
        return self._run(until)

    def _run(self, until: str = "update") -> bool:
        """Run the rows up to the end of a stage; return whether no guard stopped them."""
        rows = self._rows_until[until]
        pace = self._paces.setdefault(rows, Pace(self._team.threads))
        start = time.perf_counter()
        finished = self._team.run(self._step_address, rows, pace.threads)
        pace.took(time.perf_counter() - start)
        return finished

    def step(self, sources: Mapping[str, NDArray[Any]], taken: Callable[[Executor], None]) -> bool:
        """Run a whole training step; return whether it was taken, or stopped because it was not finite.

        ``taken`` is called if it was, also where an interrupt (Ctrl-C) strikes: that is raised behind the step.
        """
        self._prepare(sources)
        team = self._team
        team.ended = []  # only now: lists of weights are made by a run, too
        try:
            return self._run()
        finally:
            if team.ended and team.ended[0] == 0:
                taken(self)

    def time_rows(self, sources: Mapping[str, NDArray[Any]]) -> NDArray[np.float64] | None:
        """Run a whole step as ``run`` does, with a look at the clock between all rows.

        Args:
            sources: as for ``run``.

        Returns:
            Seconds of every row float64 ``(rows + 1,)``, the last being what a look at the clock takes; ``None`` if
            the step was stopped because it was not finite.
        """
        self._prepare(sources)
        rows, clock = len(self.plan.rows), compile_kernels([_STAMP])[_STAMP]
        stamps = aligned(2 * (rows + 2), np.int64).reshape(-1, 2)
        targets = aligned(rows + 2, np.int64)
        targets[:] = stamps.ctypes.data + STAMP_BYTES * np.arange(rows + 2)
        looks = [(clock, targets.ctypes.data + 8 * number, 1, 0) for number in range(rows + 2)]
        program = aligned(4 * (2 * rows + 2), np.int64).reshape(-1, 4)
        program[0::2], program[1:-1:2], program[-1] = looks[:-1], self._program[-rows:], looks[-1]
        pace = self._paces.get(rows)
        if not self._team.run(program.ctypes.data, len(program), pace.threads if pace else None):
            return None
        seconds: NDArray[np.float64] = np.diff(stamps[:, 0]) + 1e-9 * np.diff(stamps[:, 1])
        return seconds

    def _prepare(self, sources: Mapping[str, NDArray[Any]]) -> None:
        """Put all addresses in their places, and make the lists that are not up to date."""
        self._bind()
        self._place(sources)
        self._list()

    def _list(self) -> None:
        """Make the lists of sparse weights anew if the topology has changed."""
        patterns = self._parameters.patterns
        if self._listed_patterns != patterns:
            self._team.run(self._list_address, len(self.plan.list_rows))
            self._listed_patterns = patterns

    def _place(self, sources: Mapping[str, NDArray[Any]]) -> None:
        """Put the addresses of the inputs into the program."""
        for name, array in sources.items():
            for place in self._sources[name]:
                self._arguments[place] = array.ctypes.data

    def step_through(self) -> Iterator[int]:
        """Yield the position of every node after running its rows on this thread alone, for diagnosis."""
        self._bind()
        self._list()
        rows = self.plan.rows[: self._rows_until["backward"]]
        for number, row in enumerate(rows):
            self._team.run(self._step_address + ROW_BYTES * number, 1, threads=1)
            if number + 1 == len(rows) or rows[number + 1].node != row.node:
                yield row.node

    def value(self, value: Value, count: int) -> NDArray[np.float32]:
        """Return a copy of a value as float32 ``(count, *shape)``, or ``shape`` when it is not batched.

        Only values that the plan keeps (the outputs) are still there after a run.
        """
        start = self.plan.offsets[self.plan.buffer(value.name)]
        if not value.batched:
            return self._arena.memory[start : start + 4 * value.size].view(np.float32).reshape(value.shape).copy()
        layout = self.plan.layouts[value.name]
        top, left, bottom, right = layout.border
        height, width = top + layout.rows + bottom, left + layout.columns + right
        lanes = self._arena.memory[start : start + layout.nbytes].view(np.float32)
        lanes = lanes.reshape(layout.blocks, layout.maps, height, width, layout.lanes)
        inside = lanes[:, :, top : top + layout.rows, left : left + layout.columns]
        if layout.by_channel:
            maps = inside.transpose(0, 1, 4, 2, 3).reshape(layout.blocks, -1, layout.rows, layout.columns)
            return maps[:count, : layout.channels].reshape(-1, *value.shape).copy()
        return inside.transpose(0, 4, 1, 2, 3).reshape(-1, *value.shape)[:count].copy()

    def kept(self, name: str, shape: Sequence[int]) -> NDArray[np.float32]:
        """Return memory that the plan keeps to the end of a step (``LoweringCore.kept``), as a float32 view."""
        start = self.plan.offsets[name]
        return self._arena.memory[start : start + 4 * math.prod(shape)].view(np.float32).reshape(shape)

    def _bind(self) -> None:
        """Resolve addresses again if the arena moved."""
        self._arena.reserve(self.plan.arena_bytes)
        if self._bound != self._arena.address:
            address = self._arena.address
            self._program, self._arguments, self._sources = self.plan.bind(address, self._addresses)
            self._list_address = int(self._program.ctypes.data)
            self._step_address = self._list_address + ROW_BYTES * len(self.plan.list_rows)
            self._bound = address  # last: an interrupt on the way leaves it to the next run
