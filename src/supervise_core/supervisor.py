"""The Supervisor: brings the model up, keeps it safe while you train, stops cleanly, and goes on after a crash."""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

from supervise_core.arguments import check_arguments, check_objects
from supervise_core.backend import Backend
from supervise_core.checkpoint_store import CheckpointStore
from supervise_core.clock import Clock, SystemClock
from supervise_core.coordinator import Coordinator
from supervise_core.directory_store import DirectoryStore
from supervise_core.errors import SessionStateError
from supervise_core.lifecycle import Lifecycle
from supervise_core.looper import Looper
from supervise_core.membership import LocalMembership, Membership
from supervise_core.operations import USE_BACKEND, Default, Operations
from supervise_core.plan import Opening, Plan
from supervise_core.plugins import hooks_of_run
from supervise_core.recovery import Resume
from supervise_core.report import RunReport
from supervise_core.retention import KeepLatest, Retention
from supervise_core.services import Service
from supervise_core.session_manager import SessionManager
from supervise_core.snapshot import Snapshot
from supervise_core.staging import NoStaging, Staging
from supervise_core.summaries import EventLog, EventSink, read_number, read_value
from supervise_core.triggers import EverySeconds, Trigger

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
        membership: Membership | None = None,
        is_chief: bool | None = None,
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
        staging: Staging | Literal["none"] | None = None,
        clock: Clock | None = None,
    ) -> None:
        """
        :param backend: the framework.
        :param logdir: where checkpoints and event files go; made when the session opens. None: nothing is kept.
        :param membership: which of several processes this is, and where they meet.
        :param is_chief: instead of that, where the model itself is shared: whether this process initialises, restores
            and saves; others wait until the model is ready, and know nothing else of each other.
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
        :param staging: the memory that snapshots are copied into. ``"none"``: there is none; tensors are written from
            where they are, and the loop waits until they are on disk.
        :param clock: what time it is.
        :param plugins: objects with lifecycle hooks (see ``hookspecs``).
        :raises TypeError: if an argument is not of its kind.
        :raises ValueError: if one has an impossible value.
        """
        services, plugins = tuple(services), tuple(plugins)
        check_arguments(backend, save_every, summarize_every, keep, grace)
        check_objects("services", services, Service)
        check_objects("plugins", plugins, object)
        if staging not in (None, "none") and not isinstance(staging, Staging):
            raise TypeError(f"staging= takes a Staging, or 'none' to save without memory for it, not {staging!r}")
        if not isinstance(resume, (str, os.PathLike)):
            raise TypeError(f"resume= takes 'auto', 'must', 'never' or the path of a checkpoint, not {resume!r}")
        if membership is not None and not isinstance(membership, Membership):
            raise TypeError(
                f"membership= takes a Membership, such as FileMembership(directory, rank), not {membership!r}"
            )
        place = membership or LocalMembership()
        if membership is not None and is_chief not in (None, place.is_chief):
            raise ValueError(f"is_chief={is_chief} contradicts membership=, whose rank is {place.rank}; leave it out")
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
            membership=place,
            is_chief=place.is_chief if is_chief is None else is_chief,
            save_every=save_every,
            summarize_every=summarize_every,
            keep=keep,
            services=services,
            resume=resume,
            grace=grace,
            signals=signals,
            staging=NoStaging() if staging == "none" else staging or Staging(),
            clock=own_clock,
            hooks=hooks_of_run(plugins),
            new_coordinator=functools.partial(
                Coordinator, own_clock, is_clean_stop=backend.is_clean_stop, is_aftermath=backend.is_aftermath
            ),
            open_events=None if path is None else functools.partial(EventLog, path, own_clock),
        )
        self._lifecycle = Lifecycle(self._plan)

    # ---- the session

    def managed_session(
        self,
        master: str = "",
        config: object = None,
        *,
        start_standard_services: bool = True,
        close_summary_writer: bool = True,
        wait_for_checkpoint: bool = False,
        max_wait_secs: float = 7200.0,
    ) -> AbstractContextManager[SessionT]:
        """A context manager that brings the model up and hands out the session; at its end everything is stopped.

        The first error of the run comes out as itself: the block's own, or that of a service that failed before it.
        Later ones are its notes. A stop by SIGTERM ends in ``SystemExit(143)``, one by SIGINT in ``KeyboardInterrupt``,
        after the final save. Only an error in the block withholds the final save. A thread that does not end within the
        grace period is logged with its stack and named in ``report.stragglers``; that alone fails no run.
        """
        return self._lifecycle.managed(
            lambda: self.prepare_or_wait_for_session(
                master,
                config,
                wait_for_checkpoint=wait_for_checkpoint,
                max_wait_secs=max_wait_secs,
                start_standard_services=start_standard_services,
            ),
            close_summary_writer,
        )

    def prepare_or_wait_for_session(
        self,
        master: str = "",
        config: object = None,
        *,
        wait_for_checkpoint: bool = False,
        max_wait_secs: float = 7200.0,
        start_standard_services: bool = True,
    ) -> SessionT:
        """Bring the model up without a ``with`` block; ``stop()`` ends what begins here.

        :param wait_for_checkpoint: whether the chief waits until somebody else has put a checkpoint into the logdir.
        :param max_wait_secs: how long it waits for that, and how long another process waits for the chief.

        :raises SessionStateError: if a session of this Supervisor is open.
        :raises NotReadyError, CheckpointError, LeaseHeldError, UnsupportedStateError, OSError: as the start fails.
        :raises ValueError: if ``max_wait_secs`` is negative, or not a number.
        """
        if not max_wait_secs >= 0:
            raise ValueError(f"max_wait_secs= takes a number of seconds that is not negative, not {max_wait_secs!r}")
        opening = Opening(master, config, wait_for_checkpoint, max_wait_secs, start_standard_services)
        return self._lifecycle.open(opening)

    def start_standard_services(self, session: SessionT) -> list[threading.Thread]:
        """Start checkpoints, summaries and steps per second for a session opened without them; their threads.

        :raises SessionStateError: if this is not the chief, or they run already.
        :raises ValueError: if there is no logdir.
        """
        return self._lifecycle.start_standard_services()

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
        self._lifecycle.stop(
            threads, close_summary_writer=close_summary_writer, ignore_live_threads=ignore_live_threads
        )

    # ---- the loop

    def should_stop(self) -> bool:
        """Whether to stop; on the training thread, outside ``sv.batches``, also the boundary between two steps."""
        lifecycle = self._lifecycle
        return lifecycle.boundary.due and lifecycle.ask()

    def epochs(self, count: int, name: str = "epochs") -> Iterator[int]:
        """The epochs that are left, as numbers from 0; a resumed run begins with the saved one. Ends on a stop."""
        return self._lifecycle.open_run("epochs").loop.epochs(count, name)

    def batches(self, data: Any, name: str = "batches") -> Iterator[Any]:
        """The items of ``data`` that are left of this pass; a resumed run goes on with the next one. Ends on a stop.

        ``data`` may be a PyTorch ``DataLoader`` (with ``TorchBackend``), anything with ``state_dict`` and
        ``load_state_dict``, or any iterable, which is replayed up to its position. Two open at once need names.
        """
        return self._lifecycle.open_run("batches").loop.batches(data, name)

    def scalars(self, **values: Any) -> None:
        """Offer values of this step to the summaries. Nothing is read, copied or kept unless a summary is due."""
        if self._lifecycle.summaries.approaching:
            self._lifecycle.offer(values)

    def metrics(self, **values: Any) -> None:
        """Report metrics of the model as it is now: written as summaries, and kept with the checkpoint of this step.

        With ``KeepBest`` on one of them, a checkpoint is taken at the next boundary.
        """
        self._lifecycle.open_run("metrics").report_metrics(
            {name: read_number(name, value) for name, value in values.items()}
        )

    def save(self) -> None:
        """Have a checkpoint taken at the next step boundary.

        :raises SessionStateError: if nothing is being saved in this session.
        """
        saver = self._lifecycle.open_run("save").saver
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
        step = self._lifecycle.present_step() if global_step is None else global_step
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
        return Looper.loop(self._lifecycle.coordinator, timer_interval_secs, target, args, kwargs)

    def request_stop(self, error: BaseException | None = None) -> None:
        """Ask the run to stop; an error is raised at its end. From any thread."""
        self._lifecycle.coordinator.request_stop(error, source="request_stop")

    def wait_for_stop(self, timeout: float | None = None) -> bool:
        """Wait until a stop is requested, at most ``timeout`` seconds; whether it was."""
        return self._lifecycle.coordinator.wait_for_stop(timeout)

    def stop_on_exception(self) -> AbstractContextManager[None]:
        """A block whose exceptions stop the run, and are raised at its end.

        On the training thread such an error withholds the final save, as one that leaves the training block does.
        """
        return self._lifecycle.stop_on_exception()

    # ---- what it is made of

    @property
    def coord(self) -> Coordinator:
        """The coordinator of the present run, or of the last one, or of the one to come."""
        return self._lifecycle.coordinator

    @property
    def is_chief(self) -> bool:
        return self._plan.is_chief

    @property
    def global_step(self) -> int:
        """The present step; after the session, its last one."""
        return self._lifecycle.present_step()

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
    def summary_writer(self) -> EventSink | None:
        """The event file of the present session, or of the last one if it was left open; None if there is none."""
        return self._lifecycle.events

    @property
    def backend(self) -> Backend[SessionT]:
        return self._plan.backend

    @property
    def report(self) -> RunReport:
        """Why the run ended, its exit status, what was saved, and what was restored; complete once it has ended."""
        return self._lifecycle.report
