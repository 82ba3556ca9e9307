"""Threads of which one runs at a time, and a test chooses which: any order that real threads might take.

Code under test is given ``Interleaving.threading`` in place of the module ``threading``, and ``Interleaving.clock``.
Whatever takes a lock, sets an event or waits is then a point at which another thread may be chosen; ``switch`` is one,
too. Time stands still while anybody can run, and leaps to the next moment that somebody waits for. So a wait that
nothing but its time ends is seen at once: as time that passes.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, Final

from supervise_core.clock import Clock

_NEVER: Final = float("inf")
_MOST_TURNS: Final = 100_000


class Stopped(BaseException):
    """The interleaving is over; ends a thread that still runs."""


class _Strand:
    """One thread of an interleaving."""

    def __init__(self, owner: Interleaving, name: str, body: Callable[[], None], vital: bool) -> None:
        self.name = name
        self.vital = vital
        self.ready: Callable[[], bool] | None = None
        self.deadline = _NEVER
        self.done = False
        self.baton = threading.Lock()
        self.baton.acquire()
        self._owner = owner
        self._body = body
        self.thread = threading.Thread(target=self._run, name=name, daemon=True)

    def _run(self) -> None:
        self.baton.acquire()
        _here.strand = self
        try:
            if not self._owner.is_over:
                self._body()
        except Stopped:
            pass
        except BaseException as error:
            self._owner.give_up(f"{self.name}: {error!r}", error)
        self.done = True
        self._owner.end(self)


_here = threading.local()


class Interleaving:
    """One order of events, drawn from ``choices`` as long as they last, and then from the seed."""

    def __init__(self, choices: Sequence[int] = (), seed: int = 0, limit: float = 60.0) -> None:
        """``limit``: seconds that must not pass before all vital threads have ended."""
        self.now = 1000.0
        self.is_over = False
        self.problem: str | None = None
        self.error: BaseException | None = None
        self.clock = _Clock(self)
        self.threading = SimpleNamespace(
            Lock=lambda: _Lock(self, False), RLock=lambda: _Lock(self, True), Event=lambda: _Event(self),
            Thread=lambda **options: _Thread(self, **options),
            current_thread=lambda: getattr(_here, "strand", None), get_ident=lambda: id(getattr(_here, "strand", None)),
        )  # fmt: skip
        self._choices = iter(choices)
        self._random = random.Random(seed)
        self._stays = self._random.choice((0.0, 0.5, 0.8, 0.95))
        self._turns = 0
        self._last: _Strand | None = None
        self._end = self.now + limit
        self._strands: list[_Strand] = []
        self._finished = threading.Event()

    # ---- what a test does

    def spawn(self, name: str, body: Callable[[], None], *, vital: bool = True) -> _Strand:
        """Have a thread take part; the interleaving is over when all vital ones have ended."""
        strand = _Strand(self, name, body, vital)
        self._strands.append(strand)
        strand.thread.start()
        if self.is_over:
            strand.baton.release()
        return strand

    def run(self) -> None:
        """
        :raises AssertionError: if a thread failed, or waits for ever, or longer than it may.
        """
        self._choose().baton.release()
        if not self._finished.wait(60):
            self.give_up("a thread stands still outside of the interleaving")
        for strand in list(self._strands):
            strand.thread.join(60)
        if self.problem is not None:
            raise AssertionError(self.problem) from self.error

    # ---- what its threads do

    def switch(self, ready: Callable[[], bool] | None = None, deadline: float = _NEVER) -> None:
        """Perhaps another thread is chosen. This one goes on when ``ready``, or at that moment, if these are given."""
        me: _Strand | None = getattr(_here, "strand", None)
        if me is None or me.done:
            return
        if self.is_over:
            raise Stopped
        me.ready, me.deadline = ready, deadline
        chosen = self._choose()
        if chosen is not me:
            chosen.baton.release()
            me.baton.acquire()
        if self.is_over:
            raise Stopped

    def end(self, strand: _Strand) -> None:
        """A thread has ended."""
        if self.is_over:
            return
        if all(other.done for other in self._strands if other.vital):
            self._finish()
            return
        try:
            self._choose().baton.release()
        except Stopped:
            return

    def give_up(self, problem: str, error: BaseException | None = None) -> None:
        """Something is wrong: end all threads."""
        if not self.is_over:
            self.problem, self.error = problem, error
            self._finish()

    def _finish(self) -> None:
        self.is_over = True
        for strand in self._strands:
            if strand.baton.locked():
                strand.baton.release()
        self._finished.set()

    def _choose(self) -> _Strand:
        live = [strand for strand in self._strands if not strand.done]
        while True:
            able = [strand for strand in live if strand.ready is None or strand.deadline <= self.now or strand.ready()]
            self._turns += 1
            if self._turns > _MOST_TURNS:
                self.give_up("these turn round and round: " + ", ".join(strand.name for strand in able))
                raise Stopped
            if able:
                return self._draw(able)
            self._turns = 0
            self.now = min((strand.deadline for strand in live), default=_NEVER)
            if self.now > self._end:
                waiting = ", ".join(strand.name for strand in live if strand.vital)
                self.give_up(f"these wait too long, or for ever: {waiting}")
                raise Stopped

    def _draw(self, able: list[_Strand]) -> _Strand:
        """One of those that can go on; often the one that has gone on last, so that it comes far while others wait."""
        if len(able) > 1:
            drawn = next(self._choices, None)
            if drawn is not None:
                self._last = able[drawn % len(able)]
            elif self._last not in able or self._random.random() >= self._stays:
                self._last = self._random.choice(able)
        else:
            self._last = able[0]
        return self._last


class _Clock(Clock):
    def __init__(self, owner: Interleaving) -> None:
        self._owner = owner

    def monotonic(self) -> float:
        return self._owner.now

    def time(self) -> float:
        return self._owner.now

    def wait(self, event: Any, timeout: float | None) -> bool:
        self._owner.switch(lambda: event.flag, _NEVER if timeout is None else self._owner.now + timeout)
        return bool(event.flag)

    def join(self, thread: Any, timeout: float | None) -> bool:
        deadline = _NEVER if timeout is None else self._owner.now + timeout
        self._owner.switch(lambda: not thread.is_alive(), deadline)
        return not thread.is_alive()


class _Lock:
    def __init__(self, owner: Interleaving, reentrant: bool) -> None:
        self._owner = owner
        self._reentrant = reentrant
        self._holder: object = None
        self._depth = 0

    def __enter__(self) -> None:
        me = getattr(_here, "strand", self)
        if not (self._reentrant and self._holder is me):
            self._owner.switch()
            if self._holder is not None:
                self._owner.switch(lambda: self._holder is None)
            self._holder = me
        self._depth += 1

    def __exit__(self, *_: object) -> None:
        self._depth -= 1
        if self._depth == 0:
            self._holder = None


class _Event:
    def __init__(self, owner: Interleaving) -> None:
        self._owner = owner
        self.flag = False

    def is_set(self) -> bool:
        return self.flag

    def set(self) -> None:
        self._owner.switch()
        self.flag = True

    def clear(self) -> None:
        self._owner.switch()
        self.flag = False


class _Thread:
    def __init__(self, owner: Interleaving, *, target: Callable[[], None], name: str, daemon: bool = True) -> None:
        self.name = name
        self._owner = owner
        self._target = target
        self._strand: _Strand | None = None

    def start(self) -> None:
        self._strand = self._owner.spawn(self.name, self._target, vital=False)

    def is_alive(self) -> bool:
        return self._strand is not None and not self._strand.done
