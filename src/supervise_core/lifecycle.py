"""The sessions of one program, one after the other: each is opened, watched and closed, by whatever way it ends."""

from __future__ import annotations

import atexit
import logging
import sys
import threading
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any, Generic, TypeVar

from supervise_core.boundary import Appointment, StepBoundary
from supervise_core.errors import SessionStateError, StragglersError
from supervise_core.plan import Opening, Plan
from supervise_core.report import RunReport
from supervise_core.run import TRAINING_BLOCK, Run
from supervise_core.summaries import EventSink

_log = logging.getLogger(__name__)

SessionT = TypeVar("SessionT")


class Lifecycle(Generic[SessionT]):
    """What a supervisor of any shape does with sessions. At most one is open at a time."""

    def __init__(self, plan: Plan[SessionT]) -> None:
        self.plan = plan
        self.coordinator = plan.new_coordinator()
        """That of the present run, or of the last one, or of the one to come."""
        self.report = RunReport()
        self.run: Run[SessionT] | None = None
        self.boundary: StepBoundary | _NoBoundary = _NoBoundary()
        self.summaries: Appointment | _NoSummaries = _NoSummaries()
        self._left_open: EventSink | None = None
        self._handled_at_open: BaseException | None = None

    # ---- opening

    def open(self, opening: Opening) -> SessionT:
        """Bring the model up; ``stop`` ends what begins here.

        :raises SessionStateError: if a session is open.
        :raises NotReadyError, CheckpointError, LeaseHeldError, UnsupportedStateError, OSError: as the start fails.
        """
        if self.run is not None:
            raise SessionStateError("this Supervisor has an open session; call sv.stop() first, or make another one")
        if self.coordinator.should_stop():
            self.coordinator = self.plan.new_coordinator()
        self.report = RunReport()
        run = Run(self.plan, self.coordinator, self.report)
        try:
            run.open(opening)
        except BaseException as error:
            self.report.exit_status = 1
            if isinstance(error, SessionStateError) and self.coordinator.should_stop():
                self.report.cause = self.coordinator.cause
                run.raise_signal_instead(error)
                if self.coordinator.errors and (first := self.coordinator.errors[0].error) is not None:
                    raise first from None  # what stopped the start is what there is to say
            self.coordinator.request_stop(error, source="the start of the session")
            self.report.cause = self.coordinator.cause
            raise
        self._handled_at_open = sys.exception()
        self.run = run
        self._attach(run)
        atexit.register(self._stop_at_exit)
        return run.session

    def managed(
        self, open_: Callable[[], SessionT], close_summary_writer: bool = True
    ) -> AbstractContextManager[SessionT]:
        """A ``with`` block around a session that ``open_`` opens."""
        return _ManagedSession(self, open_, close_summary_writer)

    def start_standard_services(self) -> list[threading.Thread]:
        """Start checkpoints, summaries and steps per second for a session opened without them; their threads.

        :raises SessionStateError: if this is not the chief, or they run already.
        :raises ValueError: if there is no logdir.
        """
        run = self.open_run("start_standard_services")
        if not self.plan.is_chief:
            raise SessionStateError("only the chief has the standard services; this Supervisor has is_chief=False")
        if self.plan.logdir is None:
            raise ValueError("the standard services need a place for their files; pass logdir= to the Supervisor")
        if run.is_saving or run.summaries is not None:
            raise SessionStateError("the standard services run already; open with start_standard_services=False")
        threads = run.start_standard_services()
        self._attach(run)
        return threads

    def _attach(self, run: Run[SessionT]) -> None:
        """Have the two attributes that the loop reads again and again at hand."""
        if self._left_open is not None and self._left_open is not run.events:
            self._left_open.close()
        self._left_open = None
        self.boundary = run.boundary
        if run.summaries is not None and run.summaries.appointment is not None:
            self.summaries = run.summaries.appointment

    # ---- while one is open

    def open_run(self, method: str) -> Run[SessionT]:
        """The run of the open session, for a method that needs one.

        :raises SessionStateError: if there is none.
        """
        if self.run is None:
            raise SessionStateError(f"sv.{method} needs an open session; use it inside 'with sv.managed_session():'")
        return self.run

    def ask(self) -> bool:
        """``should_stop`` where something may be due."""
        return self.coordinator.should_stop() if self.run is None else self.run.ask()

    def offer(self, values: Mapping[str, Any]) -> None:
        """Hand values of this step to the summaries; called while they are wanted."""
        if self.run is not None and self.run.summaries is not None:
            self.run.summaries.offer(values)

    def present_step(self) -> int:
        """The present step; after the session, its last one."""
        return self.report.last_step if self.run is None else self.run.steps.now()

    @property
    def events(self) -> EventSink | None:
        """The event file of the present session, or of the last one if it was left open; None if there is none."""
        return self._left_open if self.run is None else self.run.events

    def stop_on_exception(self) -> AbstractContextManager[None]:
        """A block whose exceptions stop the run, and are raised at its end.

        On the training thread such an error withholds the final save, as one that leaves the training block does.
        """
        run = self.run
        training = run is not None and threading.get_ident() == run.boundary.training_thread
        return self.coordinator.stop_on_exception(TRAINING_BLOCK if training else None)

    # ---- closing

    def stop(
        self,
        threads: Iterable[threading.Thread] = (),
        *,
        close_summary_writer: bool = True,
        ignore_live_threads: bool = False,
        keep_session: bool = False,
    ) -> None:
        """End the session: final save, services and ``threads`` joined, files closed. Safe to call twice.

        Called while an error is being handled (``finally: sv.stop()``), it withholds the final save as a ``with`` block
        would. It raises nothing for a signal; see the report's ``exit_status``.

        :raises BaseException: the first error of the run, as itself.
        :raises StragglersError: if threads are left after the grace period and are not to be ignored.
        """
        run = self.run
        if run is None:
            self.coordinator.request_stop(source="sv.stop()")
            self.coordinator.join(threads, self.plan.grace, ignore_live_threads)
            return
        if threading.get_ident() != run.boundary.training_thread:
            raise SessionStateError(
                "sv.stop() closes the session, on the thread that opened it; from another thread call sv.request_stop()"
            )
        handled = sys.exception()
        error = None if handled is self._handled_at_open else handled
        self.close(run, error, threads, close_summary_writer, keep_session)
        self.coordinator.raise_requested_exception()
        if self.report.stragglers and not ignore_live_threads:
            raise StragglersError(self.plan.grace, self.report.stragglers)

    def close(
        self,
        run: Run[SessionT],
        error: BaseException | None,
        threads: Iterable[threading.Thread] = (),
        close_summary_writer: bool = True,
        keep_session: bool = False,
    ) -> None:
        """End a run and forget it; raises nothing but a signal that insists."""
        try:
            run.close(error, threads, close_summary_writer, keep_session)
        finally:
            if not close_summary_writer:
                self._left_open = run.events
            self.run = None
            self.boundary = _NoBoundary()
            self.summaries = _NoSummaries()
            atexit.unregister(self._stop_at_exit)

    def _stop_at_exit(self) -> None:
        """The program ends and nobody called ``stop``."""
        failed = getattr(sys, "last_value", None)
        run = self.run
        if run is not None:
            _log.warning("the program ends with its session open; call sv.stop(), or use 'with sv.managed_session():'")
            self.close(run, failed)


class _ManagedSession(AbstractContextManager[SessionT]):
    """The ``with`` block. A class and no generator, so that a ``StopIteration`` of the block comes out as itself."""

    def __init__(self, lifecycle: Lifecycle[SessionT], open_: Callable[[], SessionT], close_writer: bool) -> None:
        self._lifecycle = lifecycle
        self._open = open_
        self._close_writer = close_writer
        self._run: Run[SessionT] | None = None

    def __enter__(self) -> SessionT:
        session = self._open()
        self._run = self._lifecycle.run
        return session

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        run, lifecycle = self._run, self._lifecycle
        assert run is not None
        if lifecycle.run is run:
            run.expect_end_of_process()
            lifecycle.close(run, error, (), self._close_writer)
        else:
            run.judge_late(error)
            run.close_session()
        return run.outcome(error)


class _NoBoundary:
    """Before and after a session: every question goes to the coordinator."""

    due = True


class _NoSummaries:
    approaching = False
