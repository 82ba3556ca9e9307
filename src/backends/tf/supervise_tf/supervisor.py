"""TensorFlow's Supervisor over the core: one changed import line, and what the original promised."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any, Final

import tensorflow as tf

from supervise_core.clock import SystemClock
from supervise_core.lifecycle import Lifecycle
from supervise_core.plan import Opening
from supervise_core.report import RunReport
from supervise_tf.coordinator import Coordinator, LooperThread
from supervise_tf.graph_operations import USE_DEFAULT, GraphOperations
from supervise_tf.queue_runners import start_queue_runners
from supervise_tf.session_manager import SessionManager
from supervise_tf.summary_writer import SummaryWriter
from supervise_tf.supervisor_plan import local_path, plan_of, summary_bytes, verify_devices

_SECONDS_OF_SUMMARIES: Final = 120
_SECONDS_OF_CHECKPOINTS: Final = 600


class Supervisor:
    """Supervises a training program over a graph; the interface is that of ``tf.train.Supervisor``::

        with tf.Graph().as_default():
            ...
            sv = Supervisor(logdir="/tmp/mydir")
            with sv.managed_session() as sess:
                while not sv.should_stop():
                    sess.run(train_op)

    Works in every mode of TensorFlow, with variables of both kinds. What it does better than the original, and the few
    places where a program can see it, are listed in ``docs/porting-from-tf1.md``.
    """

    USE_DEFAULT = USE_DEFAULT

    def __init__(
        self,
        graph: Any = None,
        ready_op: Any = USE_DEFAULT,
        ready_for_local_init_op: Any = USE_DEFAULT,
        is_chief: bool = True,
        init_op: Any = USE_DEFAULT,
        init_feed_dict: Mapping[Any, Any] | None = None,
        local_init_op: Any = USE_DEFAULT,
        logdir: str | os.PathLike[str] | None = None,
        summary_op: Any = USE_DEFAULT,
        saver: Any = USE_DEFAULT,
        global_step: Any = USE_DEFAULT,
        save_summaries_secs: float | None = _SECONDS_OF_SUMMARIES,
        save_model_secs: float | None = _SECONDS_OF_CHECKPOINTS,
        recovery_wait_secs: float = 30,
        stop_grace_secs: float = 120,
        checkpoint_basename: str = "model.ckpt",
        session_manager: Any = None,
        summary_writer: Any = USE_DEFAULT,
        init_fn: Callable[[Any], object] | None = None,
        local_init_run_options: Any = None,
    ) -> None:
        """``USE_DEFAULT`` takes what is in the graph's collection of that name, or makes it; None does without.

        :param graph: the default graph if None. It is finalized here: build it before.
        :param ready_op, ready_for_local_init_op: tensors of the names of variables that are not initialised.
        :param is_chief: whether this process initialises, restores, saves and summarises.
        :param init_op, init_feed_dict, init_fn: initialise a model that cannot be restored; the last after the first.
        :param local_init_op, local_init_run_options: run for every session.
        :param logdir: where checkpoints and events go, as a string or a path.
        :param save_summaries_secs, save_model_secs: seconds between two; 0 or None switches them off.
        :param recovery_wait_secs: the longest time between two looks at what is waited for.
        :param stop_grace_secs: how long threads have to end after a stop.
        :param summary_writer: a writer of your own, which stays yours to close; None: no events.
        :raises RuntimeError: if TensorFlow executes eagerly here; build the model ``with tf.Graph().as_default():``.
        :raises ValueError: if the logdir is in no local file system, a number of seconds is negative, or, on a
            non-chief, a variable has no device.
        """
        if tf.executing_eagerly():
            raise RuntimeError(
                "a Supervisor needs a graph, and TensorFlow executes eagerly here; build the model and the Supervisor "
                "inside 'with tf.Graph().as_default():', or use supervise_core.Supervisor with an EagerBackend"
            )
        self._operations = GraphOperations.of(
            graph,
            ready_op=ready_op, ready_for_local_init_op=ready_for_local_init_op, init_op=init_op,
            init_feed_dict=init_feed_dict, local_init_op=local_init_op, local_init_run_options=local_init_run_options,
            summary_op=summary_op, saver=saver, global_step=global_step,
        )  # fmt: skip
        if not is_chief:
            verify_devices(self._operations.graph)
        self._is_chief = is_chief
        self._logdir = local_path(os.fspath(logdir)) if is_chief and logdir else None
        self._save_summaries_secs = save_summaries_secs if is_chief else None
        self._save_model_secs = save_model_secs if is_chief else None
        self._save_path = os.path.join(self._logdir, checkpoint_basename) if self._logdir else None
        self._coord = Coordinator()
        clock = SystemClock()
        self._session_manager = (
            session_manager
            if session_manager is not None
            else SessionManager(
                local_init_op=self._operations.local_init_op,
                ready_op=self._operations.ready_op,
                ready_for_local_init_op=self._operations.ready_for_local_init_op,
                graph=self._operations.graph,
                recovery_wait_secs=recovery_wait_secs,
                local_init_run_options=local_init_run_options,
            )
        )
        self._plan = plan_of(
            self._operations, self._session_manager, self._coord, clock,
            logdir=self._logdir, basename=checkpoint_basename, is_chief=is_chief, init_fn=init_fn,
            summary_writer=summary_writer, save_summaries_secs=self._save_summaries_secs,
            save_model_secs=self._save_model_secs, grace=stop_grace_secs,
        )  # fmt: skip
        self._summary_writer = self._plan.writer
        self._lifecycle: Lifecycle[Any] = Lifecycle(self._plan.plan)
        self._operations.graph.finalize()

    # ---- the session

    def managed_session(
        self,
        master: str = "",
        config: Any = None,
        start_standard_services: bool = True,
        close_summary_writer: bool = True,
    ) -> AbstractContextManager[Any]:
        """A context manager that brings the model up, hands out the raw session, and stops everything at its end.

        Errors of the block and of services come out as themselves. The end of the input is a clean end. After SIGTERM
        the last step is saved and ``SystemExit(143)`` follows, after SIGINT ``KeyboardInterrupt``.
        """
        return self._lifecycle.managed(
            lambda: self.prepare_or_wait_for_session(
                master=master, config=config, start_standard_services=start_standard_services
            ),
            close_summary_writer,
        )

    def prepare_or_wait_for_session(
        self,
        master: str = "",
        config: Any = None,
        wait_for_checkpoint: bool = False,
        max_wait_secs: float | None = 7200,
        start_standard_services: bool = True,
    ) -> Any:
        """Bring the model up, or wait until the chief has; ``stop`` ends what begins here.

        :raises RuntimeError: if a session of this Supervisor is open, or the model is not ready after initialisation.
        :raises tf.errors.DeadlineExceededError: if it did not become ready, or no checkpoint came, in time.
        """
        limit = float("inf") if max_wait_secs is None else max_wait_secs
        return self._lifecycle.open(Opening(master, config, wait_for_checkpoint, limit, start_standard_services))

    def start_standard_services(self, sess: Any) -> list[threading.Thread]:
        """Start checkpoints, summaries and steps per second for a session that was opened without them; their threads.

        A session that did not come from this Supervisor is watched over from here on.

        :raises RuntimeError: if this is not the chief, or they run already.
        :raises ValueError: if there is no logdir.
        """
        if not self._is_chief:
            raise RuntimeError("only the chief has the standard services; this Supervisor has is_chief=False")
        if not self._logdir:
            raise ValueError("the standard services need a place for their files; pass logdir= to the Supervisor")
        if self._lifecycle.run is None:
            self._lifecycle.open(Opening(start_standard_services=False, session=sess))
        return self._lifecycle.start_standard_services()

    def start_queue_runners(self, sess: Any, queue_runners: Iterable[Any] | None = None) -> list[threading.Thread]:
        """Start those queue runners, or those of the graph; their threads. Those that run already are left alone.

        :raises RuntimeError: if TensorFlow executes eagerly here.
        """
        if tf.executing_eagerly():
            raise RuntimeError("queues need a graph; call this inside 'with tf.Graph().as_default():'")
        return start_queue_runners(sess, self._operations.graph, self._coord, queue_runners)

    def stop(
        self,
        threads: Iterable[threading.Thread] | None = None,
        close_summary_writer: bool = True,
        ignore_live_threads: bool = False,
    ) -> None:
        """Save the last step, and stop the services and the coordinator; the session stays open.

        :raises BaseException: the first error of the run, as itself, whenever this is called again.
        :raises RuntimeError: if threads are left after the grace period and are not to be ignored; says where they are.
        """
        self._lifecycle.stop(
            threads or (), close_summary_writer=close_summary_writer, ignore_live_threads=ignore_live_threads,
            keep_session=True,
        )  # fmt: skip

    # ---- the loop

    def should_stop(self) -> bool:
        """Whether to stop; on the training thread also the boundary between two steps, where checkpoints are taken."""
        lifecycle = self._lifecycle
        if self._coord.has_earlier_rounds and self._coord.should_stop():
            return True
        return lifecycle.boundary.due and lifecycle.ask()

    def request_stop(self, ex: Any = None) -> None:
        """See ``Coordinator.request_stop``."""
        self._coord.request_stop(ex)

    def stop_on_exception(self) -> AbstractContextManager[None]:
        """A block whose exceptions stop the run, and are raised at its end."""
        return self._lifecycle.stop_on_exception()

    def wait_for_stop(self) -> None:
        """Wait until a stop is requested."""
        self._coord.wait_for_stop()

    def loop(
        self,
        timer_interval_secs: float | None,
        target: Callable[..., object],
        args: Iterable[Any] | None = None,
        kwargs: Mapping[str, Any] | None = None,
    ) -> LooperThread:
        """Call ``target`` every so many seconds (None: again and again) in a thread that ends with the run."""
        looper = LooperThread(self._coord, timer_interval_secs, target=target, args=args, kwargs=kwargs)
        looper.start()
        return looper

    def summary_computed(self, sess: Any, summary: Any, global_step: int | None = None) -> None:
        """Write a summary, given as a ``Summary`` or its bytes. Step None: the present one.

        :raises RuntimeError: if there is no summary writer, as on every non-chief, or it is closed.
        :raises TypeError: if it is no summary.
        """
        writer = self._summary_writer
        if writer is None:
            raise RuntimeError("there is no summary writer: it needs the chief, and a logdir or a summary_writer")
        if isinstance(writer, SummaryWriter) and writer.is_closed:
            raise RuntimeError("the summary writer is closed; write summaries before the session ends")
        step = global_step
        if step is None and self._operations.global_step is not None:
            step = int(sess.run(self._operations.global_step))
        writer.add_summary(summary_bytes(summary), step)

    # ---- what it is made of

    @property
    def is_chief(self) -> bool:
        """Whether this process initialises, restores, saves and summarises."""
        return self._is_chief

    @property
    def session_manager(self) -> Any:
        """What brings sessions up."""
        return self._session_manager

    @property
    def coord(self) -> Coordinator:
        """The coordinator; the same one for all sessions."""
        return self._coord

    @property
    def init_op(self) -> Any:
        """The op that initialises the model, or None."""
        return self._operations.init_op

    @property
    def init_feed_dict(self) -> Mapping[Any, Any] | None:
        """What is fed to it."""
        return self._operations.init_feed_dict

    @property
    def ready_op(self) -> Any:
        """The tensor that names what is not ready, or None."""
        return self._operations.ready_op

    @property
    def ready_for_local_init_op(self) -> Any:
        """The tensor that names what is not ready for the local init op, or None."""
        return self._operations.ready_for_local_init_op

    @property
    def summary_writer(self) -> Any:
        """The summary writer of a chief, or None."""
        return self._summary_writer

    @property
    def summary_op(self) -> Any:
        """The tensor of the summary, or None."""
        return self._operations.summary_op

    @property
    def save_summaries_secs(self) -> float | None:
        """Seconds between two summaries; None on a non-chief."""
        return self._save_summaries_secs

    @property
    def global_step(self) -> Any:
        """The tensor or variable of the global step, or None."""
        return self._operations.global_step

    @property
    def saver(self) -> Any:
        """The Saver, or None."""
        return self._operations.saver

    @property
    def save_model_secs(self) -> float | None:
        """Seconds between two checkpoints; None on a non-chief."""
        return self._save_model_secs

    @property
    def save_path(self) -> str | None:
        """What the names of checkpoints begin with, or None."""
        return self._save_path

    @property
    def report(self) -> RunReport:
        """Why the run ended, its exit status, what was saved, and what was restored."""
        return self._lifecycle.report


class _Alias:
    """A method by its old name; an override of the method counts for both."""

    def __init__(self, method: str) -> None:
        self._method = method

    def __get__(self, instance: Any, owner: type) -> Any:
        return getattr(owner if instance is None else instance, self._method)


for _old, _method in {
    "PrepareSession": "prepare_or_wait_for_session",
    "StartQueueRunners": "start_queue_runners",
    "StartStandardServices": "start_standard_services",
    "Stop": "stop",
    "RequestStop": "request_stop",
    "Loop": "loop",
    "ShouldStop": "should_stop",
    "StopOnException": "stop_on_exception",
    "WaitForStop": "wait_for_stop",
    "SummaryComputed": "summary_computed",
}.items():
    setattr(Supervisor, _old, _Alias(_method))
