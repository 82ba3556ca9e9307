"""One run: from the creation of its session to its end, and everything that is undone on the way home."""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final, Generic, TypeVar

from supervise_core.boundary import StepBoundary, StepCounter
from supervise_core.bringing_up import bring_up
from supervise_core.checkpoint_store import CheckpointStore
from supervise_core.coordinator import Coordinator, StopCause, stack_of
from supervise_core.data_loop import DataLoop, RandomPort
from supervise_core.errors import SessionStateError
from supervise_core.gathering import ShareStore
from supervise_core.lease_keeper import LeaseKeeper
from supervise_core.meeting import OTHERS, Meeting
from supervise_core.pages import Announcement
from supervise_core.plan import Opening, Plan
from supervise_core.report import RunReport
from supervise_core.saving import RunSaver
from supervise_core.services import Service, ServiceContext
from supervise_core.signals import StopSignals, exception_of, exit_status_of
from supervise_core.standard_services import CheckpointService, StepRateService, SummaryService
from supervise_core.summaries import EventSink, read_value
from supervise_core.triggers import StepsOnly, Trigger

_log = logging.getLogger(__name__)

SessionT = TypeVar("SessionT")

_GRACE_WHEN_INSISTED: Final = 1.0
_UNHEARD_AFTER: Final = 2.0
_UNHEARD_AT_MOST: Final = 60.0

TRAINING_BLOCK: Final = "the training block"
"""The source of errors of the user's own training code."""


class Run(Generic[SessionT]):
    """One session and everything that works for it.

    ``open`` is the road and ``close`` the way home. What was acquired on the road is on an ``ExitStack``, so that only
    that is released, in the opposite order, however far the run came. Nothing on the road calls back to its left.
    """

    session: SessionT

    def __init__(self, plan: Plan[SessionT], coordinator: Coordinator, report: RunReport) -> None:
        self.plan = plan
        self.coordinator = coordinator
        self.report = report
        self.manager = plan.manager
        self.summaries: SummaryService | None = None
        self.events: EventSink | None = None
        self.saver: RunSaver | None = None
        self._signals = StopSignals(coordinator)
        self.meeting = Meeting(plan.membership, coordinator, self._signals, plan.grace)
        self._homeward = threading.Event()
        self._services: list[Service] = []
        self._home = ExitStack()
        self._left_by: BaseException | None = None
        self._opened = self._closed = self._keep_session = False

    # ---- the road

    def open(self, opening: Opening) -> None:
        """Bring the model up and start what watches over it. What fails on the way leaves nothing behind."""
        plan = self.plan
        self._keep_session = opening.session is not None
        with ExitStack() as road:
            self.coordinator.on_stop(lambda cause: plan.hooks.call("supervise_stop_requested", cause=cause))
            if plan.signals:
                self._signals.install()
                road.callback(self._signals.restore)
            if not opening.wait_for_checkpoint:
                self._take_lease(road)  # before anybody is told: a chief that comes by mistake disturbs no run
            road.push(self._leave_after_failure)
            self.meeting.join()
            self.session = bring_up(plan, opening, self.meeting, self.coordinator, self.report)
            road.callback(self._close_session)
            if opening.wait_for_checkpoint:  # somebody else writes there until then
                self._take_lease(road)
            self._place_boundary(road)
            road.push(self._close_events_on_failure)
            self._open_events()
            self._prepare_saving()
            try:
                self._start_services(opening.start_standard_services)
                self._meet_the_others(opening.max_wait_secs)
            except BaseException as error:
                self._give_up(error)
                raise
            self._home = road.pop_all()
            self._opened = True
        plan.hooks.call(
            "supervise_session_ready",
            session=self.session, logdir=plan.logdir, step=self.report.first_step, restored=self.report.restored,
        )  # fmt: skip

    def _take_lease(self, road: ExitStack) -> None:
        """Become the writer of the log directory; who saves nothing there only reads."""
        plan = self.plan
        if plan.store is not None and plan.is_chief and plan.operations.snapshot is not None:
            road.enter_context(LeaseKeeper(plan.store, self.coordinator))

    def _meet_the_others(self, max_wait_secs: float) -> None:
        """The model is ready, and what it was begun with is on disk: the others may begin with the same."""
        if self.saver is not None:
            self.saver.checkpointer.drain()
        self.meeting.state("the first step", self.report.first_step)
        self.meeting.state("save_every=", repr(self.plan.save_every))
        self.meeting.state("the number of ranks", self.plan.membership.size)
        ready = Announcement(self._holds_the_model(), self.report.first_step)
        self.meeting.begin(self.boundary, self.steps, ready, max_wait_secs)

    def _holds_the_model(self) -> str | None:
        """The checkpoint that holds the model as it is begun with; None if there is none."""
        restored = self.report.restored
        if self.report.last_saved is not None or restored is None or restored in self._own_checkpoints():
            return self.report.last_saved or restored
        if self.saver is not None and self.saver.is_shared_out:  # it could not be saved by this process alone
            return str(Path(restored).absolute())
        return None

    def _leave_after_failure(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is not None:
            if self.meeting.is_synchronous:
                self._signals.hasten()
            is_stopped = isinstance(error, SessionStateError) and self.coordinator.should_stop()
            self.meeting.end(0)
            failure = None if is_stopped else StopCause("the start of the session", error)
            self.meeting.leave(failure, self.coordinator.cause, 0)

    def _place_boundary(self, road: ExitStack) -> None:
        backend, session = self.plan.backend, self.session
        content = self.manager.recovery.content
        saved: Mapping[str, Any] = {} if content is None else content.run_state
        position = saved.get("data")
        self.steps = StepCounter(functools.partial(backend.global_step, session), (position or {}).get("counted", 0))
        notify: list[Callable[[int], None]] = []
        unwatch = backend.watch_steps(session, lambda step: notify[0](step))  # noqa: PLW0108 - filled below
        if unwatch is not None:
            road.callback(unwatch)
        self.boundary = StepBoundary(self.coordinator, self.steps, unwatch is not None)
        notify.append(self.boundary.step_taken)
        self.loop = DataLoop(
            lambda data, seed: backend.batch_source(session, data, seed),
            self.steps,
            self.boundary,
            self.coordinator,
            functools.partial(backend.mark, session),
            RandomPort(
                functools.partial(backend.random_state, session), functools.partial(backend.set_random_state, session)
            ),
            backend.run_seed(session),
            position,
            self.meeting.state,
            (self.plan.membership.size or 1) if self.meeting.is_synchronous else 1,
        )
        self.report.first_step = self.report.last_step = self.steps.now()

    def _open_events(self) -> None:
        if self.plan.open_events is not None and self.plan.is_chief:
            self.events = self.plan.open_events()
            self.events.begin(self.plan.backend.opening_events(self.session))

    def _close_events_on_failure(self, kind: object, error: object, trace: object) -> None:
        if error is not None and self.events is not None:
            self.events.close()

    def _prepare_saving(self) -> None:
        """Put together what saves, if anything is to be saved."""
        plan = self.plan
        if plan.store is None or plan.operations.snapshot is None:
            return
        store: CheckpointStore = plan.store
        if self.meeting.is_synchronous and self.meeting.worker is not None:
            store = ShareStore(store, self.meeting.worker)
            plan.staging.keeps_shared_parts = False
        elif not plan.is_chief:
            return
        content = self.manager.recovery.content
        self.saver = RunSaver(
            plan, store, plan.operations.snapshot, self.session,
            self.loop, self.boundary, self.coordinator, self.events, self.report,
            {} if content is None else content.manifest.metrics,
            self.meeting,
        )  # fmt: skip
        self.loop.stopping = self.saver.hold_at_stop
        self.loop.exhausted = self.saver.hold_at_exhaustion

    def _start_services(self, standard: bool) -> None:
        timer = threading.Thread(target=self._keep_time, name="supervise-core timer", daemon=True)
        self.coordinator.register(timer)
        if standard and self.plan.logdir is not None and self.plan.is_chief:
            self.start_standard_services()
        elif standard and self.saver is not None:
            self._start_adding_shares(self.saver)
        for service in (*(self.plan.backend.services() if standard else ()), *self.plan.services):
            self._start(service)
        timer.start()

    def start_standard_services(self) -> list[threading.Thread]:
        """Checkpoints, summaries and steps per second, as far as the plan has them. The threads that run for them."""
        plan, events = self.plan, self.events
        if self.saver is not None:
            self.saver.checkpointer.check(self.steps.now())  # what could not be saved later is found now
        before = set(threading.enumerate())
        content = self.manager.recovery.content
        step = self.steps.now()
        if events is not None:
            events.add_session_log("START", step)
            if content is not None and step == self.report.first_step:
                events.repeat(content.run_state.get("events", []), step)
        if events is not None and plan.summarize_every is not None:
            self._start_summaries(events, plan.summarize_every)
        if self.saver is not None:
            beside = self.saver.save_beside if plan.backend.saves_beside_the_loop else None
            self._start(CheckpointService(self.saver.checkpointer, plan.save_every, beside))
            is_new = content is None or self.report.restored not in self._own_checkpoints()
            if self._opened or (is_new and self.saver.is_shared_out):
                self.saver.checkpointer.request()  # the loop may be within a step; or the others have no state yet
            elif is_new:
                self.saver.checkpointer.save(step, wait=True)
            if plan.backend.grows_at_first_step:
                self.saver.prepare_for_first_step(step)
        return [thread for thread in threading.enumerate() if thread not in before]

    def _start_adding_shares(self, saver: RunSaver) -> None:
        """A worker that trains in step with the chief takes its snapshots at the same steps."""
        saver.checkpointer.check(self.steps.now())
        trigger = None if self.plan.save_every is None else StepsOnly(self.plan.save_every)
        self._start(CheckpointService(saver.checkpointer, trigger))

    def _start_summaries(self, events: EventSink, trigger: Trigger) -> None:
        self.summaries = SummaryService(events, trigger, self.plan.operations.summary)
        self._start(self.summaries)
        self._start(StepRateService(events, trigger, self.plan.backend.step_name))
        if self.plan.summarize_at_start and self.summaries.appointment is not None:
            self.summaries.appointment.request()

    def _own_checkpoints(self) -> list[str]:
        store = self.plan.store
        return [] if store is None else [store.name_of(checkpoint) for checkpoint in store.checkpoints()]

    def _start(self, service: Service) -> None:
        self._services.append(service)
        service.start(self._context())

    def _context(self) -> ServiceContext:
        def write_summary(values: Mapping[str, Any], step: int) -> None:
            if self.events is not None:
                self.events.add({tag: read_value(value) for tag, value in values.items()}, step)

        return ServiceContext(
            self.session, self.plan.logdir, write_summary, self.coordinator, self.boundary, self.steps
        )

    def _keep_time(self) -> None:
        with self.coordinator.stop_on_exception("the timer"):
            self.boundary.keep_time()
            self._save_while_unheard()

    def _save_while_unheard(self) -> None:
        """The loop was told to stop and does not come: what it does until it is killed is saved beside it."""
        if self.saver is None or not self.plan.backend.saves_beside_the_loop:
            return
        pause = _UNHEARD_AFTER
        while not self.plan.clock.wait(self._homeward, pause):
            if not self.boundary.heard_the_stop:
                self.saver.save_beside()
            pause = min(2 * pause, _UNHEARD_AT_MOST)

    def _give_up(self, error: BaseException) -> None:
        """The start failed: tell the others why, and stop the services that were started."""
        if not (isinstance(error, SessionStateError) and self.coordinator.should_stop()):
            self.meeting.tell_failure(StopCause("the start of the session", error))
        self.coordinator.request_stop(source=f"a start that failed ({type(error).__name__})")
        self._stop_services(self.plan.grace, ())
        if self.saver is not None:
            self.saver.checkpointer.finish()

    # ---- while it runs

    def ask(self) -> bool:
        """``should_stop`` where something may be due."""
        if threading.get_ident() == self.boundary.training_thread and not self._closed:
            if self.loop.is_round_boundary():
                self.loop.count_round()
                self.loop.reach()
            if stopped := self.coordinator.should_stop():  # and the answer sends the program out of its loop
                self.loop.end_rounds()
                self.loop.stopping()
            return stopped
        return self.coordinator.should_stop()

    @property
    def is_saving(self) -> bool:
        """Whether checkpoints are taken."""
        return self.saver is not None and self.saver.checkpointer.is_serving

    def report_metrics(self, values: Mapping[str, float]) -> None:
        """Write metrics of the present step, and keep them for its checkpoint."""
        if self.events is not None:
            self.events.add(values, self.steps.now())
        if self.saver is not None:
            self.saver.note_metrics(self.steps.now(), values)

    # ---- the way home

    def expect_end_of_process(self) -> None:
        """What ``outcome`` raises for a signal will end this process, as those of the other ranks."""
        self._signals.ignores_later = self.meeting.is_synchronous

    def close(
        self,
        error: BaseException | None = None,
        threads: Iterable[threading.Thread] = (),
        close_summary_writer: bool = True,
        keep_session: bool = False,
    ) -> None:
        """The final save, the end of all services, and the release of what was acquired. Safe to call twice.

        ``error`` is what the training block ended with. Nothing is raised here but a signal that insists.
        ``keep_session``: the program goes on using the session, and has it closed by ``close_session`` later.
        """
        if self._closed:
            return
        self._keep_session = keep_session
        try:
            self._finish(error, threads, close_summary_writer)
        finally:
            self._closed = True
            self._guard(self.loop.close, "the end of the data")
            self._guard(self._leave, "the end of the session")
            self._guard(self._home.close, "the end of the session")
            if close_summary_writer:
                self.close_events()
            self._complete_report()

    def _leave(self) -> None:
        errors = self.coordinator.errors
        if errors and self.meeting.is_synchronous:
            self._signals.hasten()
        self.meeting.leave(errors[0] if errors else None, self.coordinator.cause, self.report.last_step)

    def close_session(self) -> None:
        """Close the session itself, after a ``close`` that kept it; safe to call twice."""
        self._keep_session = False
        self._guard(self._close_session, "the end of the session")

    def _close_session(self) -> None:
        if not self._keep_session:
            self.plan.backend.close_session(self.session)

    def close_events(self) -> None:
        """Close the event file; safe to call twice."""
        if self.events is not None:
            self._guard(self.events.close, "the summary writer")

    def _finish(
        self, error: BaseException | None, threads: Iterable[threading.Thread], close_summary_writer: bool
    ) -> None:
        self._signals.saving = True
        self._homeward.set()
        if self.steps.now() > self.report.first_step + 1:
            self.boundary.warn_of_no_boundary(self.steps.now())
        self._left_by = error
        step = self.steps.now()
        self.meeting.end(step)
        asked = self.coordinator.should_stop()
        withheld = self._judge(error)
        grace = _GRACE_WHEN_INSISTED if self._signals.insisted else self.plan.grace
        self.coordinator.request_stop(source="the end of the training block")
        self.report.final_save = "switched off" if self.saver is None else self.saver.take_last(asked, withheld)
        self.report.last_step = self.steps.now()  # now, as threads that do not end may cost the session
        self._stop_services(grace, threads)
        if self.saver is not None and (failed := self.saver.checkpointer.finish()) is not None:
            self.report.final_save = f"failed: {failed}"
        if self.events is not None and close_summary_writer and not self.events.is_closed:
            self._guard(self._write_stop_event, "the summary writer")

    def _judge(self, error: BaseException | None) -> str:
        """Report the block's end to the coordinator. Why the final save is withheld, or ""."""
        if self._signals.insisted:
            self.coordinator.request_stop(source="a further signal")
            return "a further signal asked for an end at once"
        if error is None or self.plan.backend.is_clean_stop(error):
            if error is not None:
                self.coordinator.request_stop(error, source=TRAINING_BLOCK)
            if any(cause.source == TRAINING_BLOCK for cause in self.coordinator.errors):
                return "an error in the training block was caught by stop_on_exception"
            lost = [cause for cause in self.coordinator.errors if cause.source == OTHERS]
            return str(lost[0]) if lost and self.meeting.is_synchronous else ""
        if isinstance(error, StopIteration):
            error.add_note(
                "StopIteration left the training block. To end a run at the end of its data, leave the loop, "
                "call sv.request_stop(), or iterate over sv.batches(...)."
            )
        if isinstance(error, Exception):
            self.meeting.tell_failure(StopCause(TRAINING_BLOCK, error))
            self.coordinator.request_stop(error, source=TRAINING_BLOCK)
            self.meeting.explain(error)
        else:
            if self.meeting.is_synchronous and not self.coordinator.should_stop():
                self.meeting.tell_failure(StopCause(TRAINING_BLOCK, error))
            self.coordinator.request_stop(source=f"{type(error).__name__} in the training block")
        return f"the training block ended with {type(error).__name__}"

    def _stop_services(self, grace: float, threads: Iterable[threading.Thread]) -> None:
        free = None if self._keep_session else functools.partial(self.plan.backend.free_threads, self.session)
        for thread in self.coordinator.join_threads(threads, grace, free, self.plan.backend.is_blocking):
            self.report.stragglers[thread.name] = stack_of(thread)
        for service in reversed(self._services):
            self._guard(service.stop, f"service {service.name!r}")
        self._services.clear()

    def _write_stop_event(self) -> None:
        assert self.events is not None
        self.events.add_session_log("STOP", self.report.last_step, message=str(self.coordinator.cause))

    def _guard(self, act: Callable[[], object], source: str) -> None:
        try:
            act()
        except Exception as failure:
            self.coordinator.request_stop(failure, source=source)

    def _complete_report(self) -> None:
        report = self.report
        report.cause = self.coordinator.cause
        report.errors = list(self.coordinator.errors)
        failed = bool(report.errors) and not self._was_ended_by_signal()
        report.exit_status = 1 if failed else self._signals.exit_status(self._left_by)
        _log.info("run ended: %s", report)
        self.plan.hooks.call("supervise_run_closed", report=report)

    def _was_ended_by_signal(self) -> bool:
        """Whether a signal came and at most peers were lost besides: they were told to end, too."""
        lost = self.plan.backend.recoverable
        return self._signals.first is not None and all(isinstance(kept.error, lost) for kept in self.coordinator.errors)

    def raise_signal_instead(self, error: BaseException) -> None:
        """After a start that was stopped: raise what the signal stands for that stopped it, if one did.

        :raises SystemExit, KeyboardInterrupt: for that signal.
        """
        if (number := self._signals.first) is not None:
            self.report.exit_status = exit_status_of(number)
            raise exception_of(number) from error

    def judge_late(self, error: BaseException | None) -> None:
        """Take note of what the block ended with, after a ``stop()`` inside it."""
        self._judge(error)

    def outcome(self, error: BaseException | None) -> bool:
        """End the ``with`` block: whether its own error, being a clean end, is swallowed.

        :raises BaseException: the first error of the run, if it is another one than the block's.
        :raises SystemExit, KeyboardInterrupt: for the signal that stopped a run without errors.
        """
        if isinstance(error, Exception) and self._signals.first is not None and self._was_ended_by_signal():
            raise exception_of(self._signals.first) from error
        first = self.coordinator.errors[0].error if self.coordinator.errors else None
        clean = error is None or self.plan.backend.is_clean_stop(error)
        if error is not None and not isinstance(error, Exception) and not clean:
            if first is not None:
                error.add_note(f"Before that, {self.coordinator.errors[0]}")
            return False
        if first is not None and first is not error:
            raise first
        if not clean:
            return False
        self._signals.end_process_as_signalled()
        return error is not None
