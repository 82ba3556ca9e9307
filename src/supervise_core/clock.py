"""Time as a part, so that ten minutes pass in a millisecond in a test."""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod


class Clock(ABC):
    """What the core knows of time. Ages inside a run use ``monotonic``; ``time`` only labels what people read."""

    @abstractmethod
    def monotonic(self) -> float:
        """Seconds since some fixed moment; never goes back."""

    @abstractmethod
    def time(self) -> float:
        """Seconds since the epoch."""

    @abstractmethod
    def wait(self, event: threading.Event, timeout: float | None) -> bool:
        """Wait until the event is set, at most ``timeout`` seconds; whether it is set."""

    @abstractmethod
    def join(self, thread: threading.Thread, timeout: float | None) -> bool:
        """Wait until the thread has ended, at most ``timeout`` seconds; whether it has."""


class SystemClock(Clock):
    """The clock of the machine."""

    def monotonic(self) -> float:
        return time.monotonic()

    def time(self) -> float:
        return time.time()

    def wait(self, event: threading.Event, timeout: float | None) -> bool:
        return event.wait(_within_limits(timeout))

    def join(self, thread: threading.Thread, timeout: float | None) -> bool:
        thread.join(_within_limits(timeout))
        return not thread.is_alive()


def _within_limits(timeout: float | None) -> float | None:
    """Python waits for 292 years at most, and refuses to try for longer."""
    return None if timeout is None else min(timeout, threading.TIMEOUT_MAX)
