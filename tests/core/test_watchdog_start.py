"""A watchdog that is armed and disarmed by two threads at the same moment."""

from __future__ import annotations

import threading

import pytest

from supervise_core import watchdog
from supervise_core.clock import SystemClock


def test_who_disarms_finds_a_watchdog_that_has_started(monkeypatch: pytest.MonkeyPatch) -> None:
    is_about_to_start, is_disarmed = threading.Event(), threading.Event()

    class Slow(threading.Thread):
        def start(self) -> None:
            is_about_to_start.set()
            is_disarmed.wait(0.2)  # long enough for the other thread to go wrong
            super().start()

    dog = watchdog.Watchdog(60.0, SystemClock(), lambda reason: None)
    monkeypatch.setattr(watchdog.threading, "Thread", Slow)
    arming = threading.Timer(0, dog.arm, ("a stop",))
    arming.start()
    assert is_about_to_start.wait(10)
    dog.disarm()
    is_disarmed.set()
    arming.join(10)
    assert dog._thread is not None
    dog._thread.join(10)
    assert not dog._thread.is_alive()
