"""A clock that stands still until a test moves it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from supervise_core.clock import Clock


class FakeClock(Clock):
    """Time moves only by ``advance``. Threads that wait on it wake when their moment comes, or what they wait for does.

    A sleeper is forgotten at the moment its time comes, not when the operating system has run it, so that
    ``wait_for_sleepers`` cannot count one that is already on its way.
    """

    def __init__(self, start: float = 1000.0, wall: float = 1_700_000_000.0) -> None:
        self._now = start
        self._offset = wall - start
        self._changed = threading.Condition()
        self._deadlines: dict[object, float] = {}
        self._awaited: dict[object, Callable[[], bool]] = {}

    def monotonic(self) -> float:
        with self._changed:
            return self._now

    def time(self) -> float:
        return self.monotonic() + self._offset

    def wait(self, event: threading.Event, timeout: float | None) -> bool:
        return self._sleep(event.is_set, timeout)

    def join(self, thread: threading.Thread, timeout: float | None) -> bool:
        return self._sleep(lambda: not thread.is_alive(), timeout)

    def advance(self, seconds: float) -> None:
        """Let that much time pass, and wake whoever's time has come."""
        with self._changed:
            self._now += seconds
            for sleeper, deadline in list(self._deadlines.items()):
                if deadline <= self._now:
                    del self._deadlines[sleeper]
            self._changed.notify_all()

    def wait_for_sleepers(self, count: int, timeout: float = 10.0) -> None:
        """Wait, in real time, until that many threads sleep on this clock.

        :raises TimeoutError: if they do not.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: len(self._deadlines) >= count, timeout):
                raise TimeoutError(f"{len(self._deadlines)} threads sleep on the clock, not {count}")

    def at_rest(self) -> int:
        """How many threads sleep on this clock, and have nothing to wake up for at this moment."""
        with self._changed:
            return sum(not self._awaited[sleeper]() for sleeper in self._deadlines)

    def _sleep(self, happened: Callable[[], bool], timeout: float | None) -> bool:
        me = object()
        with self._changed:
            deadline = float("inf") if timeout is None else self._now + timeout
            if happened() or deadline <= self._now:
                return bool(happened())
            self._deadlines[me] = deadline
            self._awaited[me] = happened
            self._changed.notify_all()
            while me in self._deadlines and not happened():
                self._changed.wait(0.001)  # what is waited for may be anything, and tells nobody
            self._deadlines.pop(me, None)
            del self._awaited[me]
            return bool(happened())


def eventually(condition: Callable[[], object], timeout: float = 10.0) -> None:
    """Wait, in real time, until a condition that other threads bring about holds.

    :raises AssertionError: if it does not.
    """
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"{condition} did not become true within {timeout:g} s")
        time.sleep(0.001)
