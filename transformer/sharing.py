"""Threads that share a compiled pass, stage by stage.

A stage is a number of items, which threads claim one by one; the next stage begins once all are done. Nobody waits for
a thread as such: if the helpers come late, or never, the caller does their items. So a busy machine slows a pass
down, and does not stop it. Who does an item makes no difference to its result.
"""

import ctypes
import os
import sys
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from transformer.compiled import compiled
from transformer.intrinsics import atomic_add, atomic_load, atomic_store, call_plain, pause

MAX_THREADS = 8  # more gain little with small models: each stage takes microseconds
MAX_SPINS = 2000  # pauses (some 50 microseconds) before a waiting thread lets others run
MAX_LINGER = 6000  # pauses (some milliseconds) before an idle helper sleeps; to wake it takes as long as a small pass
LINE = 8  # int64 in a cache line
GATE = 3 * LINE  # int64 before the stages: the pass that may be entered; the threads within; the latest pass


class Share(NamedTuple):
    """One thread's view of a pass."""

    state: NDArray[np.int64]  # the gate, then for each stage: items done, and items claimed of each thread's range
    stride: int  # int64 of a stage
    number: int  # of the pass
    thread: int  # 0: the caller
    num_threads: int
    yield_address: int  # of the C library's function that lets other threads run; 0 if there is none


@compiled
def enter(share: Any) -> bool:
    """Return whether the pass is still going on. If so, the thread must `leave` it. The caller opens it."""
    gate = share.state.ctypes.data
    atomic_add(gate + 8 * LINE, 1)
    if share.thread == 0:
        atomic_store(gate, share.number)
        atomic_store(gate + 16 * LINE, share.number)
        return True
    if atomic_load(gate) == share.number:
        return True
    atomic_add(gate + 8 * LINE, -1)
    linger(share)
    return False


@compiled
def leave(share: Any) -> None:
    """Leave the pass. The caller closes it, and waits until all have left: then its arrays may be used again."""
    gate = share.state.ctypes.data
    atomic_add(gate + 8 * LINE, -1)
    if share.thread > 0:
        linger(share)
        return
    atomic_store(gate, 0)
    spins = 0
    while atomic_load(gate + 8 * LINE) > 0:
        spins = rest(share, spins)


@compiled
def linger(share: Any) -> None:
    """Wait a moment for the next pass, awake and without the interpreter lock."""
    latest = share.state.ctypes.data + 16 * LINE
    spins = 0
    while atomic_load(latest) <= share.number and spins < MAX_LINGER:
        spins = rest(share, spins)


@compiled
def claim(share: Any, stage: int, num_items: int) -> Any:
    """Return an item of the stage that nobody has, or -1. A thread first takes those of its own range, in order."""
    counts = share.state.ctypes.data + 8 * (GATE + stage * share.stride)
    for turn in range(share.num_threads):
        owner = (share.thread + turn) % share.num_threads
        first = owner * num_items // share.num_threads
        size = (owner + 1) * num_items // share.num_threads - first
        claimed = counts + 8 * (1 + owner)
        if atomic_load(claimed) < size:
            index = atomic_add(claimed, 1)
            if index < size:
                return first + index
    return -1


@compiled
def finish(share: Any, stage: int) -> None:
    """Note that an item of the stage is done."""
    atomic_add(share.state.ctypes.data + 8 * (GATE + stage * share.stride), 1)


@compiled
def wait(share: Any, stage: int, num_items: int) -> None:
    """Wait until all items of the stage are done."""
    done = share.state.ctypes.data + 8 * (GATE + stage * share.stride)
    spins = 0
    while atomic_load(done) < num_items:
        spins = rest(share, spins)


@compiled
def rest(share: Any, spins: int) -> int:
    """Pause for a moment; return the number of pauses so far."""
    pause()
    if spins > MAX_SPINS and share.yield_address != 0:
        call_plain(share.yield_address)
    return spins + 1


class Helpers:
    """The threads of one model. Not thread-safe: one pass at a time."""

    def __init__(self, num_threads: int | None = None) -> None:
        """Start the helpers: one thread less than `num_threads`, by default as many as there are processors."""
        self.num_threads = num_threads or min(num_processors(), MAX_THREADS)
        self._stride = LINE * -(-(1 + self.num_threads) // LINE)
        self._number = 0
        self._state = np.zeros(0, np.int64)
        self._yield_address = yield_address()
        self._helpers = [_Helper() for _ in range(self.num_threads - 1)]

    def run(self, work: Callable[..., None], num_stages: int, *arguments: Any) -> None:
        """Call `work(share, *arguments)` in all threads. It must `enter` and `leave`, and go through all stages."""
        self._number += 1
        if len(self._state) < GATE + num_stages * self._stride:
            self._state = np.zeros(GATE + num_stages * self._stride, np.int64)
        self._state[GATE : GATE + num_stages * self._stride] = 0
        share = Share(self._state, self._stride, self._number, 0, self.num_threads, self._yield_address)
        for thread, helper in enumerate(self._helpers, start=1):
            helper.give(work, (share._replace(thread=thread), *arguments))
        work(share, *arguments)


class _Helper:
    """A thread that works whenever it is given something. It ends with its owner."""

    def __init__(self) -> None:
        self._inbox = _Inbox()
        threading.Thread(target=_serve, args=(self._inbox,), daemon=True, name="integer-pass").start()

    def give(self, work: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        """Set the next work. Work that was not begun is forgotten: its pass is over."""
        self._inbox.put((work, arguments))

    def __del__(self) -> None:
        self._inbox.put(None)


class _Inbox:
    """Holds the latest work. Its two threads look at each other's field after setting their own: no call is missed."""

    def __init__(self) -> None:
        self.work: tuple[Callable[..., None], tuple[Any, ...]] | None = None
        self.number = 0  # of works that were put in
        self.is_asleep = False
        self._bell = threading.Lock()
        self._bell.acquire()

    def put(self, work: tuple[Callable[..., None], tuple[Any, ...]] | None) -> None:
        self.work = work
        self.number += 1
        if self.is_asleep and self._bell.locked():
            self._bell.release()

    def sleep(self, seen: int) -> None:
        """Wait until there is more than `seen` works, or return for nothing."""
        self.is_asleep = True
        if self.number == seen:
            self._bell.acquire()
        self.is_asleep = False


def _serve(inbox: _Inbox) -> None:
    seen = 0
    while True:
        while inbox.number == seen:
            inbox.sleep(seen)
        seen, given = inbox.number, inbox.work
        if given is None:
            return
        given[0](*given[1])
        del given


def num_processors() -> int:
    """Return how many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def yield_address() -> int:
    """Return the address of sched_yield, or 0."""
    if sys.platform == "win32":
        return 0
    return ctypes.cast(ctypes.CDLL(None).sched_yield, ctypes.c_void_p).value or 0
