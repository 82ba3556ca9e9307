"""How threads stop together: one flag, one kept cause, and a join that names who did not come."""

from __future__ import annotations

import logging
import sys
import threading
import traceback
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Final

from supervise_core.clock import Clock, SystemClock
from supervise_core.errors import StragglersError

_log = logging.getLogger(__name__)

_UNAIDED: Final = 0.5
"""Seconds that a thread may stand still in a call before what it is blocked in is taken away from it."""


def _never(_: object) -> bool:
    return False


@dataclass(frozen=True, slots=True)
class StopCause:
    """Why a run stops: who asked (``training block``, ``signal SIGTERM`` …), and the error if any."""

    source: str
    error: BaseException | None = None

    def __str__(self) -> str:
        if self.error is None:
            return self.source
        said = f": {self.error}" if str(self.error) else ""
        return f"{self.source}: {type(self.error).__name__}{said}"


class StopSignal:
    """The half of a coordinator that a service needs: whether to stop, and a wait that ends with the stop."""

    def __init__(self, clock: Clock | None = None) -> None:
        self.clock = clock or SystemClock()
        self._stopped = threading.Event()

    def should_stop(self) -> bool:
        """Whether a stop was requested. Takes no lock and never raises."""
        return self._stopped.is_set()

    def wait_for_stop(self, timeout: float | None = None) -> bool:
        """Wait for the stop, at most ``timeout`` seconds; whether it was requested."""
        return self.clock.wait(self._stopped, timeout)


class Coordinator(StopSignal):
    """Coordinates the end of a set of threads. One coordinator is for one run.

    The first request to stop is the *cause*, and it is kept. The first *error* is what ``join`` raises, even when a
    stop without an error came before it; every later error is attached to the first one as a note.
    """

    def __init__(
        self,
        clock: Clock | None = None,
        *,
        is_clean_stop: Callable[[BaseException], bool] = _never,
        is_aftermath: Callable[[BaseException], bool] = _never,
    ) -> None:
        """
        :param is_clean_stop: whether an exception means "the input is exhausted": it stops a run and is no error.
        :param is_aftermath: whether an exception only says that what its thread was using is being shut down. Once a
            stop was requested that is no error either.
        """
        super().__init__(clock)
        self._is_clean_stop = is_clean_stop
        self._is_aftermath = is_aftermath
        self._lock = threading.Lock()
        self._cause: StopCause | None = None
        self._errors: list[StopCause] = []
        self._threads: list[threading.Thread] = []
        self._left_behind: list[threading.Thread] = []
        self._joined = False
        self._listeners: list[Callable[[StopCause], None]] = []
        self.defer: Callable[[StopCause], bool] = _never
        """Asked for each request whether somebody else will see to it that the stop comes, at the right moment."""

    @property
    def cause(self) -> StopCause | None:
        """The first request to stop; None while there was none."""
        return self._cause

    @property
    def errors(self) -> tuple[StopCause, ...]:
        """Every error that was reported, in order. The first is the one that is raised."""
        with self._lock:
            return tuple(self._errors)

    @property
    def joined(self) -> bool:
        """Whether a join has ended; what fails after it has nobody any more who would raise it."""
        return self._joined

    @property
    def registered_threads(self) -> frozenset[threading.Thread]:
        """The threads that the next ``join`` waits for."""
        with self._lock:
            return frozenset(self._threads)

    def is_failure(self, error: BaseException) -> bool:
        """Whether an exception is an error now: no clean stop, and nothing that the stop itself caused."""
        return not self._is_clean_stop(error) and not (self.should_stop() and self._is_aftermath(error))

    def request_stop(
        self, error: BaseException | None = None, *, source: str = "request_stop", at_once: bool = False
    ) -> None:
        """Ask all threads to stop. An error is kept whenever it comes; nothing is raised here.

        ``at_once``: also where stops are agreed on with other processes.

        :raises TypeError: if ``error`` is no exception.
        """
        if error is not None and not isinstance(error, BaseException):
            raise TypeError(f"request_stop takes an exception object or None, not {error!r}")
        if error is not None and self._is_clean_stop(error):
            source, error = f"{source}: end of input ({type(error).__name__})", None
        elif error is not None and self.should_stop() and self._is_aftermath(error):
            _log.info("%s ended by the stop: %s", source, error)
            return
        cause = StopCause(source, error)
        with self._lock:
            is_first = self._cause is None
            if is_first:
                self._cause = cause
            new_error = error is not None and self._keep_error(cause)
        if new_error:
            _log.error("%s: %s", source, error, exc_info=error)
        elif is_first:
            _log.info("stop requested by %s", source)
        if at_once or self.should_stop() or not self.defer(cause):
            self._stop()

    def _stop(self) -> None:
        with self._lock:
            listeners = [] if self._stopped.is_set() else list(self._listeners)
            cause = self._cause
            self._stopped.set()
        assert cause is not None
        for listener in listeners:
            listener(cause)

    def _keep_error(self, cause: StopCause) -> bool:
        """Keep an error unless it is one that came before, seen again further up; whether it was new."""
        if any(cause.error is kept.error for kept in self._errors):
            return False
        if self._errors and cause.error is not None:
            first = self._errors[0].error
            assert first is not None
            text = "".join(traceback.format_exception(cause.error)).rstrip()
            first.add_note(f"After this error, {cause.source} failed too:\n{text}")
        self._errors.append(cause)
        return True

    def on_stop(self, listener: Callable[[StopCause], None]) -> None:
        """Call the listener once, with the cause, in the thread that requests the stop; at once if one has."""
        with self._lock:
            cause = self._cause
            if cause is None or not self._stopped.is_set():
                self._listeners.append(listener)
                return
        listener(cause)

    def register(self, thread: threading.Thread) -> None:
        """Add a thread to those that ``join`` waits for."""
        with self._lock:
            if thread not in self._threads:
                self._threads.append(thread)

    @contextmanager
    def stop_on_exception(self, source: str | None = None) -> Generator[None, None, None]:
        """Report any exception of the block as the error of ``source`` and end the block; ``join`` raises it."""
        try:
            yield
        except BaseException as error:
            self.request_stop(error, source=source or f"thread {threading.current_thread().name!r}")

    def join(
        self,
        threads: Iterable[threading.Thread] = (),
        grace: float = 120.0,
        ignore_live_threads: bool = False,
    ) -> None:
        """Wait for the registered threads and the given ones, then raise the first error that was reported.

        Without a stop request it waits until all have ended on their own. From the request on, they have ``grace``
        seconds, all together, on the clock.

        :raises BaseException: the first error reported, as the object that it is, on the first and every further call.
        :raises StragglersError: if there is no such error, threads are left, and they are not to be ignored.
        """
        stragglers = self.join_threads(threads, grace)
        self.raise_requested_exception()
        if stragglers and not ignore_live_threads:
            raise StragglersError(grace, {thread.name: stack_of(thread) for thread in stragglers})

    def join_threads(
        self,
        threads: Iterable[threading.Thread] = (),
        grace: float = 120.0,
        free: Callable[[], object] | None = None,
        is_blocked: Callable[[FrameType], bool] = _never,
    ) -> list[threading.Thread]:
        """Wait as ``join`` does, and raise nothing: the threads that are left. Those registered meanwhile count.

        ``free`` is called once if a thread stands still for a while at a frame where it ``is_blocked``. Registered
        threads are forgotten then, also those that are left: a second join does not wait for them again.
        """
        given = list(threads)
        while not self._stopped.is_set() and (alive := self._alive(given)):
            self.clock.join(alive[0], 0.05)
        began = self.clock.monotonic()
        if free is not None and self._await_standstill(given, began, grace, is_blocked):
            free()
        alive = self._await_end(given, began, grace)
        for thread in alive:
            _log.error("thread %r did not stop within %g s; it is at:\n%s", thread.name, grace, stack_of(thread))
        with self._lock:
            self._joined = True
            self._left_behind += (thread for thread in {*self._threads, *given} if thread.is_alive())
            self._threads = []
        return alive

    def _await_standstill(
        self, given: list[threading.Thread], began: float, grace: float, is_blocked: Callable[[FrameType], bool]
    ) -> bool:
        """Wait until all have ended, or one is blocked where it was a while ago; whether one is."""
        since: dict[tuple[threading.Thread, int, int], float] = {}
        while (alive := self._alive(given)) and (left := began + grace - self.clock.monotonic()) > 0:
            now = self.clock.monotonic()
            frames = sys._current_frames()
            places = [
                (thread, id(frame), frame.f_lasti)
                for thread in alive
                if (frame := frames.get(thread.ident or 0)) is not None and is_blocked(frame)
            ]
            since = {place: since.get(place, now) for place in places}
            if any(now - first >= _UNAIDED for first in since.values()):
                return True
            self.clock.join(alive[0], min(left, _UNAIDED / 5))
        return False

    def _await_end(self, given: list[threading.Thread], began: float, grace: float) -> list[threading.Thread]:
        while (alive := self._alive(given)) and (left := began + grace - self.clock.monotonic()) > 0:
            self.clock.join(alive[0], left)
        return alive

    def raise_requested_exception(self) -> None:
        """Raise the first error that was reported, if there is one."""
        if self._errors and (error := self._errors[0].error) is not None:
            raise error

    def live_threads(self) -> list[threading.Thread]:
        """The threads that were registered and have not ended, without the calling one."""
        return self._alive(self._left_behind)

    def reopen(self) -> None:
        """After a join that came without a stop: go on as if it had not been."""
        self._joined = False

    def _alive(self, given: list[threading.Thread]) -> list[threading.Thread]:
        with self._lock:
            known = [*self._threads, *(thread for thread in given if thread not in self._threads)]
        return [thread for thread in known if thread.is_alive() and thread is not threading.current_thread()]


def stack_of(thread: threading.Thread) -> str:
    """Where a thread is now, as text."""
    frame = sys._current_frames().get(thread.ident or 0)
    return "".join(traceback.format_stack(frame)).rstrip() if frame is not None else "(it has ended)"
