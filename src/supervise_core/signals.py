"""SIGTERM and SIGINT as requests to stop, and as an end at once when somebody insists.

A handler runs between two bytecodes of the main thread, whatever locks that thread holds. So it takes none: it hands
the signal to a thread through a queue whose ``put`` is reentrant, and that thread asks for the stop.
"""

from __future__ import annotations

import atexit
import logging
import os
import queue
import signal
import sys
import threading
from types import FrameType
from typing import Any, Final

from supervise_core.coordinator import Coordinator
from supervise_core.host import end_process

_log = logging.getLogger(__name__)

_ONE_REQUEST: Final = 2.0
"""Launchers send several signals; those within so many seconds of the first are one request."""

_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)


class StopSignals:
    """The handlers of one session."""

    def __init__(self, coordinator: Coordinator) -> None:
        self._coordinator = coordinator
        self._requests: queue.SimpleQueue[signal.Signals | None] = queue.SimpleQueue()
        self._before: dict[signal.Signals, Any] = {}
        self._thread: threading.Thread | None = None
        self._process = os.getpid()
        self._first_at = 0.0
        self._count = 0
        self.first: signal.Signals | None = None
        """The signal that asked for the stop; None while none did."""
        self.insisted = False
        """Whether an end at once was asked for."""
        self.saving = False
        """Set while the final save is in flight: a further SIGTERM is then the same request."""
        self._has_failed = False
        self.ignores_later = False
        """Whether a process that ends by SIGTERM ignores any further one: a launcher sends it to all as soon as the
        first one ends, and they are to end with the same status."""

    def install(self) -> None:
        """Take the signals over, if this is the main thread. One that is being ignored stays ignored."""
        if threading.current_thread() is not threading.main_thread():
            _log.info("the session is not in the main thread, so SIGTERM and SIGINT keep their present meaning")
            return
        atexit.register(self._end_at_once)  # now, as what is registered later is called before it
        self._thread = threading.Thread(target=self._forward, name="supervise-core signals", daemon=True)
        self._thread.start()
        for number in _SIGNALS:
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                self._before[number] = signal.signal(number, self._handle)

    def restore(self) -> None:
        """Put the handlers back that were there before; safe to call twice."""
        try:
            while self._before:
                number, handler = self._before.popitem()
                if signal.getsignal(number) == self._handle:
                    is_over = self.ignores_later and number is self.first is signal.SIGTERM
                    signal.signal(number, signal.SIG_IGN if is_over else handler)
        finally:
            if not self._is_to_end_at_once():  # now, as no further signal comes here
                atexit.unregister(self._end_at_once)
            if self._thread is not None:
                self._requests.put(None)
                self._thread.join()
                self._thread = None

    def hasten(self) -> None:
        """The run has failed: if a SIGTERM comes, too, this process ends as soon as its error was printed.

        Without handlers it would have ended when the signal came. What Python takes apart at its end can take a second
        with a large framework, and a launcher that starts all ranks again waits for the last one.
        """
        self._has_failed = True

    def _is_to_end_at_once(self) -> bool:
        return self._has_failed and self.first is signal.SIGTERM

    def _end_at_once(self) -> None:
        if self._is_to_end_at_once() and os.getpid() == self._process and getattr(sys, "last_value", None) is not None:
            end_process(1)

    def heed(self, number: signal.Signals) -> None:
        """Another process of the run got a signal, and this one is to end as if it had got it itself."""
        if self.first is None:
            self.first, self._first_at, self._count = number, self._coordinator.clock.monotonic(), 1

    def end_process_as_signalled(self) -> None:
        """Raise what the signal would have ended the process with, had it not been for the final save.

        :raises SystemExit: 143 after SIGTERM. :raises KeyboardInterrupt: after SIGINT.
        """
        if self.first is not None:
            raise exception_of(self.first)

    def exit_status(self, left_by: BaseException | None) -> int:
        """What Python ends a process with whose session was left by that."""
        match left_by:
            case KeyboardInterrupt():
                return exit_status_of(signal.SIGINT)
            case SystemExit(code=int(code)):
                return code
            case SystemExit(code=code) if code is not None:
                return 1
            case _:
                return 0 if self.first is None else exit_status_of(self.first)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            signal.signal(number, self._before.get(signal.Signals(number), signal.SIG_DFL))  # a forked child has
            os.kill(os.getpid(), number)  # a life of its own, and ends as it would have without this session
            return
        received = signal.Signals(number)
        now = self._coordinator.clock.monotonic()
        if self.first is None:
            self.first, self._first_at, self._count = received, now, 1
            self._requests.put(received)
            return
        if now - self._first_at < _ONE_REQUEST or (self.saving and received is signal.SIGTERM):
            return
        self._count += 1
        if received is signal.SIGINT or self._count >= 3:
            self.insisted = True
            raise exception_of(received)

    def _forward(self) -> None:
        while (received := self._requests.get()) is not None:
            _log.warning(
                "%s: stopping at the next step boundary, with a final save; SIGINT after %g more seconds ends at once",
                received.name,
                _ONE_REQUEST,
            )
            self._coordinator.request_stop(source=f"signal {received.name}")


def exit_status_of(number: signal.Signals) -> int:
    """What a process ends with that a signal ended: 128 and its number."""
    return 128 + number


def exception_of(number: signal.Signals) -> BaseException:
    """What a signal would have ended the process with."""
    return KeyboardInterrupt() if number is signal.SIGINT else SystemExit(exit_status_of(number))
