"""TensorFlow's SessionManager over the core's."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from typing import Any, Final

import tensorflow as tf

import supervise_core
from supervise_core.coordinator import StopSignal
from supervise_core.errors import NotReadyError, ReadinessTimeoutError
from supervise_core.operations import Operations
from supervise_core.recovery import Recovery, Resume
from supervise_tf.announcement import Announcement
from supervise_tf.bundle_store import BundleStore
from supervise_tf.graph import GraphBackend, run_saved_model_initialisers
from supervise_tf.graph_operations import GraphOperations

_log = logging.getLogger(__name__)

_POLL_AT_MOST: Final = 1.0


class SessionDeadlineError(ReadinessTimeoutError, tf.errors.DeadlineExceededError):  # type: ignore[misc]
    """The model did not become ready in time; also the ``DeadlineExceededError`` that TensorFlow raises then."""

    def __init__(self, message: str) -> None:
        tf.errors.DeadlineExceededError.__init__(self, None, None, message)

    def __str__(self) -> str:
        return str(self.message)  # the other base would look for an errno


class SessionManager:
    """Makes sessions whose model is ready; the interface is that of ``tf.train.SessionManager``.

    What is waited for is looked at soon and often: after ``recovery_wait_secs`` at the latest, and each second at the
    latest. A damaged checkpoint is passed over for the one before it; who saves there, the Supervisor, sets it aside.
    """

    def __init__(
        self,
        local_init_op: Any = None,
        ready_op: Any = None,
        ready_for_local_init_op: Any = None,
        graph: Any = None,
        recovery_wait_secs: float = 30,
        local_init_run_options: Any = None,
        local_init_feed_dict: Mapping[Any, Any] | None = None,
    ) -> None:
        """``graph`` None is the default graph; the other arguments are as in ``Supervisor``; None is "not done".

        :raises ValueError: if ``ready_for_local_init_op`` is given and ``local_init_op`` is not.
        """
        if ready_for_local_init_op is not None and local_init_op is None:
            raise ValueError("ready_for_local_init_op is asked before local_init_op runs; pass local_init_op, too")
        self._operations = GraphOperations(
            graph=tf.compat.v1.get_default_graph() if graph is None else graph,
            init_op=None, init_feed_dict=None,
            local_init_op=local_init_op, local_init_run_options=local_init_run_options,
            local_init_feed_dict=local_init_feed_dict,
            ready_op=ready_op, ready_for_local_init_op=ready_for_local_init_op,
            summary_op=None, saver=None, global_step=None,
        )  # fmt: skip
        self._longest_poll = max(0.001, min(_POLL_AT_MOST, recovery_wait_secs))
        self.store_of: Callable[[str], BundleStore] = BundleStore
        """The store of a checkpoint directory; a Supervisor puts its own there, which may also set aside."""
        self.stop_signal: StopSignal | None = None
        """What ends a wait early; that of a Supervisor, while it has a session brought up."""
        self.recovery = Recovery()
        """What the last call did."""

    def prepare_session(
        self,
        master: str,
        init_op: Any = None,
        saver: Any = None,
        checkpoint_dir: str | None = None,
        checkpoint_filename_with_path: str | None = None,
        wait_for_checkpoint: bool = False,
        max_wait_secs: float | None = 7200,
        config: Any = None,
        init_feed_dict: Mapping[Any, Any] | None = None,
        init_fn: Callable[[Any], object] | None = None,
    ) -> Any:
        """A session whose model is ready: restored, or else initialised by ``init_op`` and then ``init_fn``.

        :raises ValueError: if both a directory and a file are given.
        :raises RuntimeError: if the model is not ready after all that; says what is missing.
        :raises SessionDeadlineError: if a checkpoint is waited for and none came in time.
        """
        manager = self._manager(saver, checkpoint_dir, checkpoint_filename_with_path, init_op, init_feed_dict, init_fn)
        given = {"init_op": init_op, "init_fn": init_fn, "local_init_op": self._operations.local_init_op}
        with self._noting(manager, given):
            return manager.prepare_session(
                master, config, wait_for_checkpoint=wait_for_checkpoint, max_wait_secs=_limit(max_wait_secs),
                stop=self.stop_signal,
            )  # fmt: skip

    def recover_session(
        self,
        master: str,
        saver: Any = None,
        checkpoint_dir: str | None = None,
        checkpoint_filename_with_path: str | None = None,
        wait_for_checkpoint: bool = False,
        max_wait_secs: float | None = 7200,
        config: Any = None,
    ) -> tuple[Any, bool]:
        """A session, and whether its model was restored and is ready.

        :raises ValueError: if both a directory and a file are given.
        """
        manager = self._manager(saver, checkpoint_dir, checkpoint_filename_with_path)
        with self._noting(manager):
            return manager.recover_session(
                master, config, wait_for_checkpoint=wait_for_checkpoint, max_wait_secs=_limit(max_wait_secs)
            )

    def wait_for_session(self, master: str, config: Any = None, max_wait_secs: float | None = float("inf")) -> Any:
        """A session whose model somebody else makes ready.

        :raises SessionDeadlineError: if it does not become ready in time; says what is missing.
        """
        manager = self._manager(None, None, None)
        with self._noting(manager):
            return manager.wait_for_session(master, config, _limit(max_wait_secs), self.stop_signal)

    def _manager(
        self,
        saver: Any,
        checkpoint_dir: str | None,
        checkpoint_file: str | None,
        init_op: Any = None,
        init_feed_dict: Mapping[Any, Any] | None = None,
        init_fn: Callable[[Any], object] | None = None,
    ) -> supervise_core.SessionManager[Any]:
        if checkpoint_dir and checkpoint_file:
            raise ValueError("pass checkpoint_dir or checkpoint_filename_with_path, not both")
        own = self._operations
        backend = GraphBackend(
            operations=own.replace(
                init_op=init_op, init_feed_dict=init_feed_dict, saver=saver,
                announcement=Announcement.found_in(own.graph),
            )
        )  # fmt: skip
        operations = Operations.of(
            backend,
            init=backend.init if init_op is not None else None,
            init_fn=init_fn,
            local_init=backend.local_init if own.local_init_op is not None else None,
            saver=None if saver is None else backend.snapshot,
        )
        if saver is not None and checkpoint_file:
            return _OneFile(backend, operations, saver, checkpoint_file)
        if saver is None or not checkpoint_dir:
            return supervise_core.SessionManager(backend, operations, longest_poll=self._longest_poll)
        store = self.store_of(os.fspath(checkpoint_dir))
        if not store.checkpoints() and (named := store.named_elsewhere()) is not None:
            _log.warning("%s has no checkpoint of its own; going on from %s, as its state file says", store.path, named)
            return _OneFile(backend, operations, saver, str(named))
        return _OneDirectory(backend, operations, store, saver, longest_poll=self._longest_poll)

    @contextmanager
    def _noting(
        self, manager: supervise_core.SessionManager[Any], given: Mapping[str, Any] | None = None
    ) -> Generator[None, None, None]:
        """Keep what the manager did, give an error of time its name in TensorFlow, and say by what was initialised."""
        try:
            yield
        except ReadinessTimeoutError as error:
            raise SessionDeadlineError(str(error)) from error
        except NotReadyError as error:
            if given is None:
                raise
            listed = ", ".join(f"{name} {_name_of(value)}" for name, value in given.items())
            raise NotReadyError(f"{error} Given were {listed}.") from error
        finally:
            self.recovery = manager.recovery


class _OneDirectory(supervise_core.SessionManager[Any]):
    """Restores from a directory, and tells the Saver what is there, so that it goes on removing the oldest."""

    def __init__(
        self, backend: GraphBackend, operations: Operations[Any], store: BundleStore, saver: Any, longest_poll: float
    ) -> None:
        super().__init__(backend, operations, store, longest_poll=longest_poll)
        self._bundles = store
        self._saver = saver

    def _recover(self, session: Any, resume: Resume) -> bool:
        restored = super()._recover(session, resume)
        if restored:
            there = [str(self._bundles.path / self._bundles.name_of(known)) for known in self._bundles.checkpoints()]
            self._saver.recover_last_checkpoints(there)
        return restored


class _OneFile(supervise_core.SessionManager[Any]):
    """Restores one file, as it is, and never initialises."""

    def __init__(self, backend: GraphBackend, operations: Operations[Any], saver: Any, file: str) -> None:
        super().__init__(backend, operations)
        self._graph = backend.operations.graph
        self._saver = saver
        self._file = file

    def _recover(self, session: Any, resume: Resume) -> bool:
        run_saved_model_initialisers(session, self._graph)
        with session.graph.as_default():  # outside of the graph TensorFlow would restore eagerly
            self._saver.restore(session, self._file)
        self.recovery.restored = self._file
        return True


def _limit(max_wait_secs: float | None) -> float:
    return float("inf") if max_wait_secs is None else max_wait_secs


def _name_of(given: Any) -> str:
    """The name of an op or a function, as it is best found again."""
    return str(getattr(given, "name", None) or getattr(given, "__qualname__", None) or given)
