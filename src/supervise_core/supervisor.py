"""The Supervisor: brings the model up, keeps it safe while you train, stops cleanly, and goes on after a crash."""

from __future__ import annotations

import atexit
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, TypeVar

from supervise_core.arguments import check_arguments, check_objects
from supervise_core.backend import Backend
from supervise_core.boundary import Appointment, StepBoundary
from supervise_core.checkpoint_store import CheckpointStore
from supervise_core.clock import Clock, SystemClock
from supervise_core.coordinator import Coordinator
from supervise_core.directory_store import DirectoryStore
from supervise_core.errors import SessionStateError, StragglersError
from supervise_core.looper import Looper
from supervise_core.operations import USE_BACKEND, Default, Operations
from supervise_core.plan import Plan
from supervise_core.plugins import hooks_of_run
from supervise_core.report import RunReport
from supervise_core.retention import KeepLatest, Retention
from supervise_core.run import TRAINING_BLOCK, Run
from supervise_core.services import Service
from supervise_core.session_manager import Resume, SessionManager
from supervise_core.snapshot import Snapshot, Staging
from supervise_core.summaries import EventLog, read_number, read_value
from supervise_core.triggers import EverySeconds, Trigger

_log = logging.getLogger(__name__)

SessionT = TypeVar("SessionT")


class Supervisor(Generic[SessionT]):
    """Supervises one training program::

        sv = Supervisor(TorchBackend(model=model, optimizer=optimizer), logdir="runs/digits")
        with sv.managed_session() as sess:
            for epoch in sv.epochs(10):
                for batch in sv.batches(loader):
                    train_step(batch)

    or, in the form of the original, ``while not sv.should_stop(): train_step()``. Killed at any instant and started
    again, the program goes on from its newest good checkpoint.

    One session is open at a time. The same Supervisor can open another one after it.
    """

    def __init__(
        self,
        backend: Backend[SessionT],
        logdir: str | os.PathLike[str] | None = None,
        *,
        is_chief: bool = True,
        init: Callable[[SessionT], object] | None | Default = USE_BACKEND,
        init_fn: Callable[[SessionT], object] | None = None,
        ready: Callable[[SessionT], object] | None | Default = USE_BACKEND,
        ready_for_local_init: Callable[[SessionT], object] | None | Default = USE_BACKEND,
        local_init: Callable[[SessionT], object] | None | Default = USE_BACKEND,
        summary: Callable[[SessionT], Mapping[str, Any]] | None | Default = USE_BACKEND,
        saver: Callable[[SessionT, Staging], Snapshot] | None | Default = USE_BACKEND,
        save_every: Trigger | None = EverySeconds(600),
        summarize_every: Trigger | None = EverySeconds(120),
        keep: Retention = KeepLatest(5),
        resume: Resume = "auto",
        grace: float = 120.0,
        signals: bool = True,
        store: CheckpointStore | None = None,
        services: Iterable[Service] = (),
        plugins: Iterable[object] = (),
        staging: Staging | None = None,
        clock: Clock | None = None,
    ) -> None:
        """
        :param backend: the framework.
        :param logdir: where checkpoints and event files go; made when the session opens. None: nothing is kept.
        :param is_chief: whether this process initialises, restores and saves; others wait until the model is ready.
        :param init, ready, ready_for_local_init, local_init, summary: the backend's operation, a callable of the
            session instead of it, or None for none. ``ready`` answers ``Ready()``, ``NotReady(reason)`` or a bool.
        :param init_fn: called after ``init``; neither is called when a checkpoint is restored.
        :param saver: takes the snapshot instead of the backend; None: nothing is saved, and nothing restored.
        :param save_every: when to take a checkpoint beside those at the start of a fresh run and at its end.
        :param keep: which checkpoints stay; the newest always does.
        :param resume: ``"auto"``, ``"must"`` (be there), ``"never"``, or the path of a checkpoint.
        :param grace: seconds that services have to end once a stop is requested.
        :param signals: whether SIGTERM and SIGINT ask for a stop with a final save.
        :param store: where checkpoints go instead of ``logdir``, or by another name than ``model.ckpt-<step>``.
        :param services: your own services, started with the standard ones.
        :param staging: the memory that snapshots are copied into.
        :param clock: what time it is.
        :param plugins: objects with lifecycle hooks (see ``hookspecs``).
        :raises TypeError: if an argument is not of its kind.
        :raises ValueError: if one has an impossible value.
        """
        services, plugins = tuple(services), tuple(plugins)
        check_arguments(backend, save_every, summarize_every, keep, grace)
        check_objects("services", services, Service)
        check_objects("plugins", plugins, object)
        if not isinstance(resume, (str, os.PathLike)):
            raise TypeError(f"resume= takes 'auto', 'must', 'never' or the path of a checkpoint, not {resume!r}")
        own_clock = clock or SystemClock()
        path = None if logdir is None else Path(logdir)
        own_store = DirectoryStore(path, clock=own_clock) if store is None and path is not None else store
        operations = Operations.of(
            backend,
            init=init, init_fn=init_fn, ready=ready, ready_for_local_init=ready_for_local_init,
            local_init=local_init, summary=summary, saver=saver,
        )  # fmt: skip
        self._plan = Plan(
            backend=backend,
            operations=operations,
            manager=SessionManager(backend, operations, own_store, own_clock),
            store=own_store,
            logdir=path,
            is_chief=is_chief,
            save_every=save_every,
            summarize_every=summarize_every,
            keep=keep,
            services=services,
            resume=resume,
            grace=grace,
            signals=signals,
            staging=staging or Staging(),
            clock=own_clock,
            hooks=hooks_of_run(plugins),
        )
        self._coordinator = self._new_coordinator()
        self._report = RunReport()
        self._run: Run[SessionT] | None = None
        self._boundary: StepBoundary | _NoBoundary = _NoBoundary()
        self._summaries: Appointment | _NoSummaries = _NoSummaries()

    # ---- the session

    def managed_session(
        self,
        master: str = "",
        config: object = None,
        *,
        start_standard_services: bool = True,
        close_summary_writer: bool = True,
        max_wait_secs: float = 7200.0,
    ) -> AbstractContextManager[SessionT]:
        """A context manager that brings the model up and hands out the session; at its end everything is stopped.

        The first error of the run comes out as itself: the block's own, or that of a service that failed before it.
        Later ones are its notes. A stop by SIGTERM ends in ``SystemExit(143)``, one by SIGINT in ``KeyboardInterrupt``,
        after the final save. Only an error in the block withholds the final save. A thread that does not end within the
        grace period is logged with its stack and named in ``report.stragglers``; that alone fails no run.
        """
        return _ManagedSession(
            self,
            lambda: self.prepare_or_wait_for_session(
                master, config, max_wait_secs=max_wait_secs, start_standard_services=start_standard_services
            ),
            close_summary_writer,
        )

    def prepare_or_wait_for_session(
        self,
        master: str = "",
        config: object = None,
        *,
        max_wait_secs: float = 7200.0,
        start_standard_services: bool = True,
    ) -> SessionT:
        """Bring the model up without a ``with`` block; ``stop()`` ends what begins here.

        :raises SessionStateError: if a session of this Supervisor is open.
        :raises NotReadyError, CheckpointError, LeaseHeldError, UnsupportedStateError, OSError: as the start fails.
        """
        if self._run is not None:
            raise SessionStateError("this Supervisor has an open session; call sv.stop() first, or make another one")
        if self._coordinator.should_stop():
            self._coordinator = self._new_coordinator()
        self._report = RunReport()
        run = Run(self._plan, self._coordinator, self._report)
        try:
            run.open(master, config, max_wait_secs, start_standard_services)
        except BaseException as error:
            self._coordinator.request_stop(error, source="the start of the session")
            self._report.cause, self._report.exit_status = self._coordinator.cause, 1
            if isinstance(error, SessionStateError):
                run.raise_signal_instead(error)
            raise
        self._handled_at_open = sys.exception()
        self._run = run
        self._attach(run)
        atexit.register(self._stop_at_exit)
        return run.session

    def start_standard_services(self, session: SessionT) -> list[threading.Thread]:
        """Start checkpoints, summaries and steps per second for a session opened without them; their threads.

        :raises SessionStateError: if this is not the chief, or they run already.
        :raises ValueError: if there is no logdir.
        """
        run = self._open_run("start_standard_services")
        if not self.is_chief:
            raise SessionStateError("only the chief has the standard services; this Supervisor has is_chief=False")
        if self._plan.logdir is None:
            raise ValueError("the standard services need a place for their files; pass logdir= to the Supervisor")
        if run.is_saving or run.summaries is not None:
            raise SessionStateError("the standard services run already; open with start_standard_services=False")
        threads = run.start_standard_services()
        self._attach(run)
        return threads

    def stop(
        self,
        threads: Iterable[threading.Thread] = (),
        *,
        close_summary_writer: bool = True,
        ignore_live_threads: bool = False,
    ) -> None:
        """End the session: final save, services and ``threads`` joined, files closed. Safe to call twice.

        Called while an error is being handled (``finally: sv.stop()``), it withholds the final save as a ``with`` block
        would. It raises nothing for a signal; see ``report.exit_status``.

        :raises BaseException: the first error of the run, as itself.
        :raises StragglersError: if threads are left after the grace period and are not to be ignored.
        """
        run = self._run
        if run is None:
            self._coordinator.request_stop(source="sv.stop()")
            self._coordinator.join(threads, self._plan.grace, ignore_live_threads)
            return
        if threading.get_ident() != run.boundary.training_thread:
            raise SessionStateError(
                "sv.stop() closes the session, on the thread that opened it; from another thread call sv.request_stop()"
            )
        handled = sys.exception()
        error = None if handled is self._handled_at_open else handled
        self._close(run, error, threads, close_summary_writer)
        self._coordinator.raise_requested_exception()
        if self._report.stragglers and not ignore_live_threads:
            raise StragglersError(self._plan.grace, self._report.stragglers)

    # ---- the loop

    def should_stop(self) -> bool:
        """Whether to stop; on the training thread, outside ``sv.batches``, also the boundary between two steps."""
        if not self._boundary.due:
            return False
        return self._coordinator.should_stop() if self._run is None else self._run.ask()

    def epochs(self, count: int, name: str = "epochs") -> Iterator[int]:
        """The epochs that are left, as numbers from 0; a resumed run begins with the saved one. Ends on a stop."""
        return self._open_run("epochs").loop.epochs(count, name)

    def batches(self, data: Any, name: str = "batches") -> Iterator[Any]:
        """The items of ``data`` that are left of this pass; a resumed run goes on with the next one. Ends on a stop.

        ``data`` may be a PyTorch ``DataLoader`` (with ``TorchBackend``), anything with ``state_dict`` and
        ``load_state_dict``, or any iterable, which is replayed up to its position. Two open at once need names.
        """
        return self._open_run("batches").loop.batches(data, name)

    def scalars(self, **values: Any) -> None:
        """Offer values of this step to the summaries. Nothing is read, copied or kept unless a summary is due."""
        if self._summaries.approaching:
            self._offer(values)

    def metrics(self, **values: Any) -> None:
        """Report metrics of the model as it is now: written as summaries, and kept with the checkpoint of this step.

        With ``KeepBest`` on one of them, a checkpoint is taken at the next boundary.
        """
        self._open_run("metrics").report_metrics({name: read_number(name, value) for name, value in values.items()})

    def save(self) -> None:
        """Have a checkpoint taken at the next step boundary.

        :raises SessionStateError: if nothing is being saved in this session.
        """
        saver = self._open_run("save").saver
        if saver is None or not saver.checkpointer.is_serving:
            raise SessionStateError("this session saves nothing; it needs a logdir, a saver and the standard services")
        saver.checkpointer.request()

    def summary_computed(
        self, session: SessionT, summary: Mapping[str, Any] | bytes | Any, global_step: int | None = None
    ) -> None:
        """Write a summary now: a mapping of values, or a ``Summary`` message or its bytes. Step None: the present one.

        :raises SessionStateError: if this Supervisor writes no summaries.
        :raises TypeError: if it is no summary.
        """
        events = self.summary_writer
        if events is None:
            raise SessionStateError("no summaries are written; this needs the chief, a logdir and an open session")
        step = self._present_step() if global_step is None else global_step
        if isinstance(summary, Mapping):
            events.add({tag: read_value(value) for tag, value in summary.items()}, step)
        else:
            events.add_serialized(summary, step)

    def loop(
        self,
        timer_interval_secs: float | None,
        target: Callable[..., object],
        args: Iterable[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Looper:
        """Call ``target`` every so many seconds (None: again and again) in a thread that ends with the run."""
        return Looper.loop(self._coordinator, timer_interval_secs, target, args, kwargs)

    def request_stop(self, error: BaseException | None = None) -> None:
        """Ask the run to stop; an error is raised at its end. From any thread."""
        self._coordinator.request_stop(error, source="request_stop")

    def wait_for_stop(self, timeout: float | None = None) -> bool:
        """Wait until a stop is requested, at most ``timeout`` seconds; whether it was."""
        return self._coordinator.wait_for_stop(timeout)

    def stop_on_exception(self) -> AbstractContextManager[None]:
        """A block whose exceptions stop the run, and are raised at its end.

        On the training thread such an error withholds the final save, as one that leaves the training block does.
        """
        run = self._run
        training = run is not None and threading.get_ident() == run.boundary.training_thread
        return self._coordinator.stop_on_exception(TRAINING_BLOCK if training else None)

    # ---- what it is made of

    @property
    def coord(self) -> Coordinator:
        """The coordinator of the present run, or of the last one, or of the one to come."""
        return self._coordinator

    @property
    def is_chief(self) -> bool:
        return self._plan.is_chief

    @property
    def global_step(self) -> int:
        """The present step; after the session, its last one."""
        return self._present_step()

    @property
    def logdir(self) -> Path | None:
        return self._plan.logdir

    @property
    def save_path(self) -> str | None:
        """What the names of checkpoints begin with; None without a logdir or on a non-chief."""
        store = self._plan.store
        return None if store is None or not self.is_chief else os.path.join(store.location, store.basename)

    @property
    def save_every(self) -> Trigger | None:
        return self._plan.save_every

    @property
    def summarize_every(self) -> Trigger | None:
        return self._plan.summarize_every

    @property
    def session_manager(self) -> SessionManager[SessionT]:
        return self._plan.manager

    @property
    def summary_writer(self) -> EventLog | None:
        """The event file of the present session, or of the last one if it was left open; None if there is none."""
        return self._open_events if self._run is None else self._run.events

    @property
    def backend(self) -> Backend[SessionT]:
        return self._plan.backend

    @property
    def report(self) -> RunReport:
        """Why the run ended, its exit status, what was saved, and what was restored; complete once it has ended."""
        return self._report

    # ---- inside

    _open_events: EventLog | None = None
    _handled_at_open: BaseException | None = None

    def _new_coordinator(self) -> Coordinator:
        return Coordinator(self._plan.backend.clean_stop, self._plan.clock)

    def _attach(self, run: Run[SessionT]) -> None:
        """Have the two attributes that the loop reads again and again at hand."""
        if self._open_events is not None:
            self._open_events.close()
        self._open_events = None
        self._boundary = run.boundary
        if run.summaries is not None and run.summaries.appointment is not None:
            self._summaries = run.summaries.appointment

    def _offer(self, values: Mapping[str, Any]) -> None:
        if self._run is not None and self._run.summaries is not None:
            self._run.summaries.offer(values)

    def _present_step(self) -> int:
        return self._report.last_step if self._run is None else self._run.steps.now()

    def _open_run(self, method: str) -> Run[SessionT]:
        if self._run is None:
            raise SessionStateError(f"sv.{method} needs an open session; use it inside 'with sv.managed_session():'")
        return self._run

    def _close(
        self,
        run: Run[SessionT],
        error: BaseException | None,
        threads: Iterable[threading.Thread],
        close_summary_writer: bool,
    ) -> None:
        try:
            run.close(error, threads, close_summary_writer)
        finally:
            if not close_summary_writer:
                self._open_events = run.events
            self._run = None
            self._boundary = _NoBoundary()
            self._summaries = _NoSummaries()
            atexit.unregister(self._stop_at_exit)

    def _stop_at_exit(self) -> None:
        """The program ends and nobody called ``stop``."""
        failed = getattr(sys, "last_value", None)
        run = self._run
        if run is not None:
            _log.warning("the program ends with its session open; call sv.stop(), or use 'with sv.managed_session():'")
            self._close(run, failed, (), True)


class _ManagedSession(AbstractContextManager[SessionT]):
    """The ``with`` block. A class and no generator, so that a ``StopIteration`` of the block comes out as itself."""

    def __init__(self, supervisor: Supervisor[SessionT], open_: Callable[[], SessionT], close_writer: bool) -> None:
        self._supervisor = supervisor
        self._open = open_
        self._close_writer = close_writer
        self._run: Run[SessionT] | None = None

    def __enter__(self) -> SessionT:
        session = self._open()
        self._run = self._supervisor._run
        return session

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        run, supervisor = self._run, self._supervisor
        assert run is not None
        if supervisor._run is run:
            supervisor._close(run, error, (), self._close_writer)
        else:
            run.judge_late(error)
        return run.outcome(error)


class _NoBoundary:
    """Before and after a session: every question goes to the coordinator."""

    due = True


class _NoSummaries:
    approaching = False
