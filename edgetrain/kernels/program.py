"""The interpreter: one compiled call per thread runs a whole program.

A program is a table of int64 rows ``[kernel address, arguments address, jobs,
guard]``. Every thread runs its share of every row's jobs; between two rows all
threads meet at a barrier. A row whose ``guard`` is 1 writes the status word; all
threads stop after it if that is not 0 (a step that is not finite must not be applied).

One thread leads: it writes what is to be run into the sync words and counts the ticket up. The others follow: they
look at the ticket for a while after every run, without Python, before they sleep.

Compiled threads flush subnormal numbers to zero (a convolution on decayed weights
is up to 40 times slower otherwise) and restore the caller's floating-point state.
"""

from __future__ import annotations

from numba import types
from numba.extending import register_jitable

from edgetrain.kernels.codes import ARRIVED, ORDER, ROW_BYTES, STATUS, TICKET
from edgetrain.kernels.simd import (
    atomic_add,
    atomic_load,
    call_kernel,
    float_state,
    flush_bits,
    load_i64,
    pause,
    set_float_state,
    store_i64,
)

# Looks before a waiting thread offers its core to others: some 20 us where a pause takes 60 cycles (AMD's Zen 5), more
# or less elsewhere; longer than any gap between equal shares.
_SPINS = 1000
# Looks for another run in any case, some 100 us: a step of LeNet-5 at batch 8 took 442 us when a sleeping thread had to
# be woken, and takes 310 so (2 threads).
_BRIEF = 1300

_yield_core = types.ExternalFunction("sched_yield", types.int32())


def lead(program: int, rows: int, threads: int, sync: int, arrived: int) -> int:
    """Run the rows of a program as the first of ``threads`` threads; return 0, or 1 if a guard stopped it.

    Args:
        program: address of the rows.
        rows: number of rows.
        threads: how many take part; all others are to be inside ``follow`` or on their way there.
        sync: address of ``SYNC_BYTES`` bytes.
        arrived: the arrival counter before this run. It only ever grows: a thread may still be leaving
            the last barrier of the previous run, so it must not be set back.
    """
    if threads > 1:
        store_i64(sync + ORDER, program)
        store_i64(sync + ORDER + 8, rows)
        store_i64(sync + ORDER + 16, threads)
        store_i64(sync + ORDER + 24, arrived)
        atomic_add(sync + TICKET, 1)
    return _take_part(program, rows, 0, threads, sync, arrived)


def follow(sync: int, number: int, ticket: int, patience: int, active: int) -> int:
    """Take part in every run after ``ticket`` as thread ``number``; return the last one's ticket when none follows.

    Args:
        sync, number, ticket: as above.
        patience: looks for another run before that, few of them where another team runs.
        active: address of a word that is ``sync`` until another team of this process begins a run.
    """
    looks = 0
    while looks < _BRIEF or (looks < patience and atomic_load(active) == sync):
        if atomic_load(sync + TICKET) != ticket:
            ticket += 1
            order = sync + ORDER
            _take_part(load_i64(order), load_i64(order + 8), number, load_i64(order + 16), sync, load_i64(order + 24))
            looks = 0
        else:
            looks += 1
            pause()
            if looks > _SPINS:
                _yield_core()
    return ticket


@register_jitable
def _meet(sync: int, wanted: int) -> None:
    """Wait until the threads have arrived ``wanted`` times in all."""
    atomic_add(sync + ARRIVED, 1)
    spins = 0
    while atomic_load(sync + ARRIVED) < wanted:
        spins += 1
        pause()
        if spins > _SPINS:
            _yield_core()


@register_jitable
def _take_part(program: int, rows: int, thread: int, threads: int, sync: int, arrived: int) -> int:
    """Run this thread's share of all rows."""
    state = float_state()
    set_float_state(state | flush_bits())
    stopped = 0
    for row in range(rows):
        entry = program + ROW_BYTES * row
        # The guard is read before the barrier: after the last one the caller may free the program at once.
        jobs, guard = load_i64(entry + 16), load_i64(entry + 24)
        first, last = jobs * thread // threads, jobs * (thread + 1) // threads
        if first < last:
            call_kernel(load_i64(entry), load_i64(entry + 8), first, last)
        if threads > 1:
            _meet(sync, arrived + (row + 1) * threads)
        # Only the guarded row writes the status. A thread must have read it before the next run writes it again, which
        # may have one thread and so no barrier that waits: all meet once more before they leave.
        if guard != 0 and atomic_load(sync + STATUS) != 0:
            stopped = 1
            if threads > 1:
                _meet(sync, arrived + (row + 2) * threads)
            break
    set_float_state(state)
    return stopped
