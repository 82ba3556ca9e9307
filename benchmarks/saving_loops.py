"""Training loops, and the time that a save takes from them: what it stalls, and what it slows the steps down."""

from __future__ import annotations

import os
import random
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from benchmarks.saving_state import State

_STEP_SECONDS = 0.02
_AFTER = 3
_PLAIN_STEPS = 40


class Loop:
    """Repeats some work about fifty times a second, and changes every tensor of the state each time."""

    def __init__(self, name: str, state: State, work: Callable[[], object]) -> None:
        self.name = name
        self._state = state
        self._work = work
        work()
        began = time.perf_counter()
        work()
        self._repeat = max(1, round(_STEP_SECONDS / (time.perf_counter() - began)))

    def step(self) -> None:
        """One step."""
        for _ in range(self._repeat):
            self._work()
        self._state.touch()


def compute_bound(state: State) -> Loop:
    """Matrix products on all processors."""
    one, other, result = (torch.rand(768, 768) for _ in range(3))
    return Loop("compute", state, lambda: torch.mm(one, other, out=result))


def memory_bound(state: State) -> Loop:
    """Sums of arrays that no cache holds."""
    one, other, result = (torch.rand(16 << 20) for _ in range(3))
    return Loop("memory", state, lambda: torch.add(one, other, out=result))


def time_lost(
    loop: Loop, begin: Callable[[], object], is_done: Callable[[], bool], each: Callable[[], object], fork: bool = False
) -> float:
    """Seconds that the loop takes longer with a save than without.

    ``begin`` is what the loop waits for; then it goes on until the save is done, and a few steps more. Steps without a
    save are made before or after that, as chance has it. ``each`` is called in each step of both. ``fork``: a child is
    there all the while, as data workers are, and both are measured with one. The first step after a fork copies the
    memory that it changes, so it counts as what it is: once.
    """
    first = other = 0.0
    is_plain_first = random.random() < 0.5
    if is_plain_first:
        with _child(fork):
            first, other = _plain(loop, each)
    with _child(fork):
        began, steps = time.perf_counter(), 0
        begin()
        left = _AFTER
        while left:
            loop.step()
            each()
            steps += 1
            left -= is_done()
        taken = time.perf_counter() - began
    if not is_plain_first:
        with _child(fork):
            first, other = _plain(loop, each)
    return taken - first - (steps - 1) * other


def _plain(loop: Loop, each: Callable[[], object]) -> tuple[float, float]:
    """Seconds of the first step, and of each other one."""
    times: list[float] = []
    for _ in range(_PLAIN_STEPS):
        began = time.perf_counter()
        loop.step()
        each()
        times.append(time.perf_counter() - began)
    return times[0], sum(times[1:]) / (len(times) - 1)


@contextmanager
def _child(wanted: bool) -> Iterator[None]:
    """A forked process that waits meanwhile."""
    if not wanted:
        yield
        return
    ours, theirs = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Python warns of forks of a process with threads; this child does nothing
        child = os.fork()
    if not child:
        os.close(theirs)
        os.read(ours, 1)
        os._exit(0)
    os.close(ours)
    try:
        yield
    finally:
        os.close(theirs)
        os.waitpid(child, 0)
