"""An end for a process whose training thread does not come home: it may hang in a call that a lost peer never answers.

Nothing in Python can end such a call. So when a stop was asked for and the grace period has passed, the process says
where the thread is, and leaves. If even that cannot be said, because something holds the interpreter's lock, a timer
of ``faulthandler`` that needs no lock writes the stacks of all threads and ends the process a second later.
"""

from __future__ import annotations

import faulthandler
import logging
import sys
import threading
from collections.abc import Callable
from typing import Final

from supervise_core.clock import Clock
from supervise_core.coordinator import stack_of
from supervise_core.host import end_process

_log = logging.getLogger(__name__)

_LAST_RESORT: Final = 1.0
"""Seconds after the grace period at which the lock-free timer strikes."""


class Watchdog:
    """Ends the process when its training thread is overdue."""

    def __init__(self, grace: float, clock: Clock, last_words: Callable[[str], object]) -> None:
        """``last_words`` gets the reason right before the end; it must not take long."""
        self._grace = grace
        self._clock = clock
        self._last_words = last_words
        self._watched = threading.current_thread()
        self._lock = threading.Lock()
        self._is_home = threading.Event()
        self._thread: threading.Thread | None = None
        self._has_timer = False

    def feed(self, seconds: float) -> None:
        """This process is alive, and is to be ended if it has not said so again within so many seconds: then something
        holds the interpreter's lock, and the others have given it up."""
        with self._lock:
            if self._thread is None and not self._is_home.is_set():
                self._set_timer(seconds)

    def arm(self, cause: object) -> None:
        """The grace period begins, unless it has already. From any thread."""
        with self._lock:
            if self._thread is not None or self._is_home.is_set():
                return
            self._thread = threading.Thread(
                target=self._watch, args=(str(cause),), name="supervise-core watchdog", daemon=True
            )
            self._set_timer(self._grace + _LAST_RESORT)
            self._thread.start()  # under the lock, as whoever disarms waits for its end

    def _set_timer(self, seconds: float) -> None:
        stream = sys.__stderr__
        if stream is None:
            return
        try:
            faulthandler.dump_traceback_later(seconds, exit=True, file=stream)
            self._has_timer = True
        except (OSError, ValueError, RuntimeError) as error:  # a stream without a file, as in some notebooks
            if not self._has_timer:
                _log.debug("no timer for an interpreter whose lock is held: %s", error)

    def disarm(self) -> None:
        """The thread is home; safe to call twice."""
        with self._lock:
            self._is_home.set()
            if self._has_timer:
                faulthandler.cancel_dump_traceback_later()
                self._has_timer = False
        if self._thread is not None and self._thread is not threading.current_thread():
            self._clock.join(self._thread, 1)

    def _watch(self, cause: str) -> None:
        if self._clock.wait(self._is_home, self._grace):
            return
        reason = (
            f"thread {self._watched.name!r} did not come to a step boundary within {self._grace:g} s after a stop "
            f"({cause}); it is at:\n{stack_of(self._watched)}"
        )
        _log.critical("%s\nthis process ends now, without a final save", reason)
        self._last_words(reason)
        end_process(1)
