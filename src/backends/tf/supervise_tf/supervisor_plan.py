"""What the core is given by TensorFlow's Supervisor: each argument of the original becomes one part of the plan."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tensorflow as tf

import supervise_core
from supervise_core.clock import Clock
from supervise_core.coordinator import StopSignal
from supervise_core.hookspecs import hookimpl
from supervise_core.membership import LocalMembership
from supervise_core.operations import Operations
from supervise_core.plan import Plan
from supervise_core.plugins import hooks_of_run
from supervise_core.recovery import Recovery, Resume
from supervise_core.retention import KeepAll, KeepEverySeconds, KeepLatest, Retention
from supervise_core.services import Service, ServiceContext
from supervise_core.staging import Staging
from supervise_core.summaries import EventSink
from supervise_core.triggers import EverySeconds
from supervise_tf.bundle_store import BundleStore
from supervise_tf.coordinator import Coordinator
from supervise_tf.graph import GraphBackend, meta_graph_of
from supervise_tf.graph_operations import USE_DEFAULT, GraphOperations
from supervise_tf.session_manager import SessionManager
from supervise_tf.summary_writer import ForeignEvents, SummaryWriter

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class SupervisorPlan:
    """The plan, and the summary writer that the program sees."""

    plan: Plan[Any]
    writer: Any


def plan_of(
    graph_operations: GraphOperations,
    session_manager: Any,
    coord: Coordinator,
    clock: Clock,
    *,
    logdir: str | None,
    basename: str,
    is_chief: bool,
    init_fn: Callable[[Any], object] | None,
    summary_writer: Any,
    save_summaries_secs: float | None,
    save_model_secs: float | None,
    grace: float,
) -> SupervisorPlan:
    """:raises ValueError: if a number of seconds is negative."""
    backend = GraphBackend(operations=graph_operations)
    saver = graph_operations.saver
    store = None
    if logdir is not None and saver is not None:
        unnumbered = graph_operations.global_step is None
        store = BundleStore(
            logdir, basename, meta_graph=meta_graph_of(graph_operations), unnumbered=unnumbered, clock=clock
        )
    writer = _writer(summary_writer, logdir, clock) if is_chief else None
    if isinstance(session_manager, SessionManager) and store is not None:
        own = store
        session_manager.store_of = lambda _: own
    plan = Plan(
        backend=backend,
        operations=_operations(backend, init_fn, saves=bool(save_model_secs)),
        manager=_Manager(backend, session_manager, graph_operations, init_fn, logdir),
        store=store,
        logdir=None if logdir is None else Path(logdir),
        membership=LocalMembership(),
        is_chief=is_chief,
        save_every=EverySeconds(save_model_secs) if save_model_secs else None,
        summarize_every=EverySeconds(save_summaries_secs) if save_summaries_secs else None,
        keep=_retention(saver),
        services=() if logdir is None or not is_chief else (_GraphFile(graph_operations.graph),),
        resume="auto",
        grace=grace,
        signals=True,
        staging=Staging(),
        clock=clock,
        hooks=hooks_of_run(() if store is None else (_LastCheckpoints(saver, store),)),
        new_coordinator=functools.partial(_next_round, coord, backend, clock),
        open_events=_events(writer, clock),
        summarize_at_start=True,
    )
    return SupervisorPlan(plan, writer)


def _next_round(coord: Coordinator, backend: GraphBackend, clock: Clock) -> supervise_core.Coordinator:
    newest = supervise_core.Coordinator(clock, is_clean_stop=backend.is_clean_stop, is_aftermath=backend.is_aftermath)
    coord.begin(newest)
    return newest


def _operations(backend: GraphBackend, init_fn: Callable[[Any], object] | None, *, saves: bool) -> Operations[Any]:
    given = backend.operations
    return Operations.of(
        backend,
        init=None if given.init_op is None else backend.init,
        init_fn=init_fn,
        local_init=None if given.local_init_op is None else backend.local_init,
        saver=backend.snapshot if given.saver is not None and saves else None,
    )


def _writer(given: Any, logdir: str | None, clock: Clock) -> Any:
    if given is not USE_DEFAULT:
        return given
    return None if logdir is None else SummaryWriter(logdir, clock)


def _events(writer: Any, clock: Clock) -> Callable[[], EventSink] | None:
    if writer is None:
        return None
    if isinstance(writer, SummaryWriter):
        return writer.open_log
    sink = ForeignEvents(writer, clock)
    return lambda: sink


def _retention(saver: Any) -> Retention:
    """What the Saver would keep."""
    if saver is None:
        return KeepAll()
    definition = saver.as_saver_def()
    if definition.max_to_keep <= 0:
        return KeepAll()
    hours = definition.keep_checkpoint_every_n_hours
    newest = KeepLatest(definition.max_to_keep)
    return newest | KeepEverySeconds(hours * 3600) if 0 < hours < 10000 else newest


def local_path(logdir: str) -> str:
    """A log directory without ``file://``.

    :raises ValueError: if it is in another file system than the local one.
    """
    scheme, separator, path = logdir.partition("://")
    if not separator or scheme == "file":
        return path if separator else logdir
    raise ValueError(
        f"logdir={logdir!r} is in a file system ({scheme}) that cannot rename and sync as a checkpoint needs it; "
        "use a local or mounted directory, and copy from there"
    )


def verify_devices(graph: Any) -> None:
    """:raises ValueError: if a variable has no device: it would not be the one that the chief initialises."""
    for operation in graph.get_operations():
        if operation.type in ("Variable", "VariableV2", "VarHandleOp") and not operation.device:
            raise ValueError(
                f"the variable {operation.name!r} has no device, so every process would have its own; "
                "build the model with tf.compat.v1.device(tf.compat.v1.train.replica_device_setter(...))"
            )


def summary_bytes(summary: Any) -> bytes:
    """A summary as bytes.

    :raises TypeError: if it is neither a ``Summary`` nor the bytes of one.
    """
    content = summary if isinstance(summary, bytes) else getattr(summary, "SerializeToString", lambda: None)()
    try:
        tf.compat.v1.Summary.FromString(content)
    except Exception as error:
        raise TypeError(f"summary_computed takes a Summary or its bytes, not {summary!r}") from error
    assert isinstance(content, bytes)
    return content


class _Manager(supervise_core.SessionManager[Any]):
    """Has a session manager of TensorFlow's kind, ours or the program's own, bring sessions up."""

    def __init__(
        self,
        backend: GraphBackend,
        manager: Any,
        operations: GraphOperations,
        init_fn: Callable[[Any], object] | None,
        logdir: str | None,
    ) -> None:
        super().__init__(backend)
        self._given = manager
        self._graph_operations = operations
        self._init_fn = init_fn
        self._logdir = logdir

    def prepare_session(
        self,
        master: str = "",
        config: object = None,
        *,
        resume: Resume = "auto",
        wait_for_checkpoint: bool = False,
        max_wait_secs: float = 7200.0,
        stop: StopSignal | None = None,
    ) -> Any:
        operations = self._graph_operations
        self._have_it_hear(stop)
        session = self._given.prepare_session(
            master, init_op=operations.init_op, saver=operations.saver, checkpoint_dir=self._logdir,
            wait_for_checkpoint=wait_for_checkpoint, max_wait_secs=max_wait_secs, config=config,
            init_feed_dict=operations.init_feed_dict, init_fn=self._init_fn,
        )  # fmt: skip
        self.recovery = getattr(self._given, "recovery", Recovery())
        if not isinstance(self._given, SessionManager):
            self._backend.announce_ready(session, str)
        return session

    def wait_for_session(
        self, master: str = "", config: object = None, max_wait_secs: float = 7200.0, stop: StopSignal | None = None
    ) -> Any:
        self._have_it_hear(stop)
        return self._given.wait_for_session(master, config=config, max_wait_secs=max_wait_secs)

    def _have_it_hear(self, stop: StopSignal | None) -> None:
        """A manager of our own ends its waits when the run is stopped; one of TensorFlow's cannot."""
        if isinstance(self._given, SessionManager):
            self._given.stop_signal = stop


class _GraphFile(Service):
    """Writes ``graph.pbtxt``, as TensorFlow does for every session."""

    name = "graph file"

    def __init__(self, graph: Any) -> None:
        self._graph = graph

    def start(self, context: ServiceContext) -> None:
        tf.io.write_graph(self._graph.as_graph_def(add_shapes=True), str(context.logdir), "graph.pbtxt")


class _LastCheckpoints:
    """Keeps ``saver.last_checkpoints`` as it would be, had the Saver written and removed them itself."""

    def __init__(self, saver: Any, store: BundleStore) -> None:
        self._saver = saver
        self._store = store

    @hookimpl
    def supervise_session_ready(self) -> None:
        self._update()

    @hookimpl
    def supervise_checkpoint_committed(self) -> None:
        self._update()

    def _update(self) -> None:
        names = [self._store.name_of(checkpoint) for checkpoint in self._store.checkpoints()]
        self._saver.set_last_checkpoints([str(self._store.path / name) for name in names])
