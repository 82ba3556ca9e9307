"""Actors that take turns, one call to the disk at a time, in whatever order a test wants.

Each actor is a thread that stands still before every call by which it could see or change what others see. So a test
decides what happens between any two of them, and the code under test is the real one, on a real directory.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from supervise_core.clock import Clock
from supervise_core.disk import Disk
from supervise_core.testing.disks import Crash

CALLS: Final = frozenset({
    "make_directory", "create", "rename", "link", "exchange", "remove_file", "remove_directory", "sync_directory",
    "names", "is_directory", "size", "look_up", "open_directory",
})  # fmt: skip
"""The calls that an actor stands still before. What is done to a file held open, nobody else can see or prevent."""


class Time:
    """What the clocks of all actors show; it moves when a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def pass_on(self, seconds: float) -> None:
        """Let so many seconds pass."""
        self.now += seconds


class Actor:
    """A thread that does what it is given, one call at a time.

    ``result`` or ``error`` is what its last act came to, ``at`` the call that it stands before: the name of the method
    and its first argument, or ``("wait", None)`` while it sleeps.
    """

    def __init__(self, time: Time, name: str = "actor") -> None:
        self.name = name
        self.disk: Disk = _SteppingDisk(self)
        self.clock: Clock = _SteppingClock(self, time)
        self.at: tuple[str, Path | None] | None = None
        self.result: object = None
        self.error: BaseException | None = None
        self.calls = 0
        self._time = time
        self._wakes: float | None = None
        self._act: Callable[[], object] | None = None
        self._killed = False
        self._go = threading.Lock()
        self._stood = threading.Lock()
        self._go.acquire()
        self._stood.acquire()
        self._thread = threading.Thread(target=self._live, name=name, daemon=True)
        self._thread.start()

    def __repr__(self) -> str:
        return f"<{self.name}{f' before {self.at[0]} {self.at[1]}' if self.at else ''}>"

    @property
    def busy(self) -> bool:
        """Whether its act has not come to an end."""
        return self._act is not None

    @property
    def can_move(self) -> bool:
        """Whether it has something to do now: it is busy and does not sleep."""
        return self.busy and (self._wakes is None or self._time.now >= self._wakes)

    @property
    def wakes(self) -> float | None:
        """When it sleeps no longer; None if it does not sleep."""
        return self._wakes

    def begin(self, act: Callable[[], object]) -> None:
        """Give it something to do; it goes as far as the first call."""
        assert not self.busy, f"{self} is busy"
        self.result = self.error = None
        self.calls = 0
        self._act = act
        self._move()

    def step(self) -> None:
        """Have it make the call that it stands before, and go on to the next one, or to its end."""
        assert self.can_move, f"{self} cannot move"
        self.calls += 1
        self._move()

    def finish(self, at_most: int = 1000) -> None:
        """Step on while it can move."""
        for _ in range(at_most):
            if not self.can_move:
                return
            self.step()
        raise AssertionError(f"{self} has not come to an end within {at_most} calls")

    def kill(self) -> None:
        """End it where it stands, as kill -9 would: the call is not made, and nothing is cleaned up."""
        self._killed = True
        self._move()
        self._thread.join()
        self._act = None

    def stand(self, method: str, path: Path | None) -> None:
        """For its disk and its clock: stand still until it is told to go on. Others' calls pass through."""
        if threading.current_thread() is not self._thread:
            return
        self.at = (method, path)
        if not self._killed:
            self._hand_back()
        if self._killed:
            raise Crash(f"before {method} {path}")
        self.at = None

    def sleep_until(self, moment: float) -> None:
        """For its clock."""
        self._wakes = moment
        self.stand("wait", None)
        self._wakes = None

    def _move(self) -> None:
        self._go.release()
        if not self._stood.acquire(timeout=60):
            raise AssertionError(f"{self} waits for something that is neither its disk nor its clock")

    def _hand_back(self) -> None:
        self._stood.release()
        self._go.acquire()

    def _live(self) -> None:
        self._go.acquire()
        while not self._killed:
            assert self._act is not None
            try:
                self.result = self._act()
            except BaseException as error:
                self.error = error
            if not self._killed:
                self._act = None
                self._hand_back()
        self._stood.release()


class _SteppingDisk(Disk):
    """A real disk that its actor stands still before."""

    def __init__(self, actor: Actor) -> None:
        self._actor = actor

    def __getattribute__(self, name: str) -> Any:
        found = super().__getattribute__(name)
        if name not in CALLS:
            return found

        def call(path: Path, *arguments: Any, **options: Any) -> Any:
            self._actor.stand(name, path)
            return found(path, *arguments, **options)

        return call


class _SteppingClock(Clock):
    """A clock on which its actor sleeps until the time that all share has come."""

    def __init__(self, actor: Actor, time: Time) -> None:
        self._actor = actor
        self._time = time

    def monotonic(self) -> float:
        return self._time.now

    def time(self) -> float:
        return self._time.now + 1.7e9

    def wait(self, event: threading.Event, timeout: float | None) -> bool:
        assert timeout is not None, "nobody would ever wake it"
        if not event.is_set():
            self._actor.sleep_until(self._time.now + timeout)
        return event.is_set()

    def join(self, thread: threading.Thread, timeout: float | None) -> bool:
        raise NotImplementedError


@contextmanager
def on_one_processor() -> Generator[None, None, None]:
    """Have this thread and the actors made in the block share one processor: to take turns is ten times quicker so."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {sorted(before)[os.getpid() % len(before)]})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def let_time_pass(time: Time, them: Iterable[Actor]) -> bool:
    """When all that are busy sleep, have the first of them wake; whether one of them can move now.

    So long as nothing else moves the time, nobody is so slow that another one runs out of patience.
    """
    busy = [actor for actor in them if actor.busy]
    if busy and not any(actor.can_move for actor in busy):
        time.now = max(time.now, min(actor.wakes for actor in busy if actor.wakes is not None))
    return bool(busy)


Switches = Sequence[tuple[int, int]]
"""Before the call of which number, counted from 0 over all actors, the actor of which index goes on."""


def run_in_turns(
    time: Time, them: Sequence[Actor], switches: Switches = (), step: Callable[[Actor], object] = Actor.step
) -> list[list[int]]:
    """Run all to their ends, each as long as it can move, but for the switches; ``step`` has one make its next call.

    Of each call, which others could have moved instead.
    """
    wanted, index = dict(switches), 0
    alternatives: list[list[int]] = []
    while let_time_pass(time, them):
        able = [number for number, actor in enumerate(them) if actor.can_move]
        index = wanted.get(len(alternatives), index)
        if index not in able:
            index = min(able, key=lambda number: (number - index) % len(them))
        alternatives.append([number for number in able if number != index])
        step(them[index])
        if len(alternatives) > 5000:
            raise AssertionError(f"{list(them)} come to no end")
    return alternatives


def every_way(run: Callable[[Switches], Sequence[Sequence[int]]], count: int, at_most: int) -> int:
    """Try every order of the calls of so many actors with at most so many interruptions; how many orders there were.

    ``run`` runs all of them anew by ``run_in_turns`` and returns what that returned. What is wrong with a protocol
    mostly shows with one or two interruptions in the right places, and these are all the places there are. Which actor
    is the first is no interruption, nor that another one goes on when one sleeps or has ended.
    """
    done = 0
    waiting: list[tuple[tuple[int, int], ...]] = [((0, index),) for index in range(count)]
    while waiting:
        switches = waiting.pop()
        alternatives = run(switches)
        done += 1
        if len(switches) <= at_most:
            numbers = range(switches[-1][0] + 1, len(alternatives))
            waiting += [(*switches, (number, index)) for number in numbers for index in alternatives[number]]
    return done
