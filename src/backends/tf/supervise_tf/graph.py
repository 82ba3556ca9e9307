"""The backend for TensorFlow graphs and sessions: variables of a graph, initialised, checked, saved and restored."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, ClassVar, Final

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from supervise_core.backend import Backend
from supervise_core.errors import IncompatibleCheckpointError
from supervise_core.parts import Parts
from supervise_core.readiness import Readiness, Ready
from supervise_core.services import Service
from supervise_core.snapshot import Snapshot
from supervise_core.staging import Staging
from supervise_tf.bundle import Key, shapes_of
from supervise_tf.bundle_format import BundlePart
from supervise_tf.cluster import Cluster, close, is_remote
from supervise_tf.graph_operations import GraphOperations
from supervise_tf.inputs import drawing_ops, inputs_of, is_end_of_input, is_end_of_session, placeholders_of
from supervise_tf.queue_runners import QueueRunners
from supervise_tf.saved_tensors import SavedTensors
from supervise_tf.stored_tensors import VARIABLES, from_tree, to_tree

_log = logging.getLogger(__name__)

_OWN_PART: Final = "tf"
_SESSION_CODE: Final = tf.compat.v1.Session.run.__code__.co_filename
_NAMES_SHOWN: Final = 10


class OtherShapeError(IncompatibleCheckpointError, tf.errors.InvalidArgumentError):  # type: ignore[misc]
    """A variable has another shape in the checkpoint; also the ``InvalidArgumentError`` of TensorFlow."""

    def __init__(self, part: str, differences: Iterable[str]) -> None:
        IncompatibleCheckpointError.__init__(self, part, differences)
        tf.errors.InvalidArgumentError.__init__(self, None, None, self.args[0])


class GraphBackend(Backend[Any]):
    """A TensorFlow graph; its sessions are ``tf.compat.v1.Session`` objects, as they are.

    ``GraphBackend(graph)``, or inside ``with graph.as_default()`` just ``GraphBackend()``. What is run is in the
    ``GraphOperations``: the keywords of ``GraphOperations.of`` say it, or else the graph's collections. Make it when
    the graph is complete, as operations may be added to it; after that it adds none, so the graph may be finalized.

    What is saved is what the Saver saves, fetched in one ``session.run`` at the step boundary. A checkpoint keeps it as
    the part ``variables``. Random states kept are those in variables, and those of Python and NumPy.
    """

    name = "tf-graph"
    recoverable: ClassVar[tuple[type[BaseException], ...]] = (
        tf.errors.AbortedError,
        tf.errors.UnavailableError,
        tf.errors.CancelledError,  # what a step ends with at times when one of its tasks was restarted
    )
    saves_beside_the_loop = True

    def __init__(self, graph: Any = None, *, operations: GraphOperations | None = None, **given: Any) -> None:
        """
        :param operations: all that is run, ready made; or else ``given``, the keywords of ``GraphOperations.of``.
        :raises TypeError, ValueError: if the global step is no single integer.
        :raises UnsupportedStateError: if the Saver works in a way that is not known here.
        """
        if operations is not None and (graph is not None or given):
            raise TypeError("pass operations=, or a graph and what is run in it, not both")
        self.operations = operations or GraphOperations.of(graph, **given)
        self._saved = _saved_tensors(self.operations)
        self._cluster = Cluster(self.operations.graph)
        step = self.operations.global_step
        if step is not None:
            self.step_name = step.op.name
        self._last_step = 0
        self._warned = self._warned_of_step = False
        self._fetch_step: tuple[Any, Any] | None = None
        self._can_summarise = self._check_summary()

    # ---- sessions

    def shares_model(self, master: str) -> bool:
        return is_remote(master)

    def create_session(self, master: str = "", config: Any = None) -> Any:
        """A new session on that master: ``""`` in this process, ``"local"`` on a server in it, or a target.

        One on a target sees the master's own task and those that the graph names, unless ``config`` has filters.
        """
        if is_remote(master):
            return self._cluster.create(master, config)
        target = _local_server().target if master == "local" else master
        return tf.compat.v1.Session(target, graph=self.operations.graph, config=config)

    def peers(self, master: str = "", config: Any = None) -> Readiness:
        return self._cluster.answers(master, config) if is_remote(master) else Ready()

    def close_session(self, session: Any) -> None:
        close(session)

    def is_blocking(self, frame: FrameType) -> bool:
        return frame.f_code.co_filename == str(_SESSION_CODE)

    def free_threads(self, session: Any) -> None:
        """Close the session: whoever waits in ``session.run`` for a queue, say, is told that it was cancelled."""
        close(session)

    def is_clean_stop(self, error: BaseException) -> bool:
        return is_end_of_input(error)

    def is_aftermath(self, error: BaseException) -> bool:
        return is_end_of_session(error)

    def init(self, session: Any) -> None:
        self.operations.init(session)

    def local_init(self, session: Any) -> None:
        self.operations.local_init(session)

    def ready(self, session: Any) -> Readiness:
        return self.operations.ready(session)

    def ready_for_local_init(self, session: Any) -> Readiness:
        return self.operations.ready_for_local_init(session)

    # ---- a model that tasks of a cluster keep

    def was_made_ready(self, session: Any, run: Callable[[], str]) -> bool:
        announcement = self.operations.announcement
        return announcement is not None and announcement.was_made_by(session, run)

    def announce_ready(self, session: Any, run: Callable[[], str] | None) -> None:
        announcement = self.operations.announcement
        if announcement is None:
            return
        if run is None:
            announcement.withdraw(session)
        else:
            announcement.make(session, run())

    def services(self) -> Sequence[Service]:
        """The queue runners of the graph."""
        return (QueueRunners(self.operations.graph),)

    # ---- steps and summaries

    def global_step(self, session: Any) -> int | None:
        """The value of the global step; the last one known where the session cannot tell any more."""
        step = self.operations.global_step
        if step is None:
            return None
        if self._fetch_step is None or self._fetch_step[0] is not session:
            self._fetch_step = (session, session.make_callable(step))
        try:
            self._last_step = _integer(self._fetch_step[1]())
        except (tf.errors.OpError, RuntimeError) as error:
            if not self._warned_of_step:
                self._warned_of_step = True
                _log.warning(
                    "the global step cannot be read (%s); it was %d when it last could", error, self._last_step
                )
        return self._last_step

    def summary(self, session: Any) -> Mapping[str, Any] | bytes:
        if not self._can_summarise:
            return {}
        return bytes(session.run(self.operations.summary_op))

    def opening_events(self, session: Any) -> Iterable[bytes]:
        """The graph, and the graph as a meta graph."""
        graph_def = self.operations.graph.as_graph_def(add_shapes=True)
        yield tf.compat.v1.Event(graph_def=graph_def.SerializeToString()).SerializeToString()
        yield tf.compat.v1.Event(meta_graph_def=meta_graph_of(self.operations)).SerializeToString()

    def _check_summary(self) -> bool:
        """Whether the summary op can be run on its own; told once if it cannot, or takes what training then lacks."""
        summary = self.operations.summary_op
        if summary is None:
            return False
        if placeholders := placeholders_of(summary):
            _log.warning(
                "summaries are not written on their own: %s has to be fed. Pass summary_op=None, and the value of the "
                "summary op from your own step to sv.summary_computed(sess, summary).",
                _listed(placeholders),
            )
            return False
        if inputs := inputs_of(summary):
            _log.warning(
                "each summary takes an element of the input that training does not see (%s). To avoid it pass "
                "summary_op=None, and the value of the summary op from your own step to sv.summary_computed.",
                _listed(inputs),
            )
        return True

    # ---- state

    def snapshot(self, session: Any, staging: Staging) -> Snapshot:
        self._warn_of_random_state()
        before = step = self.global_step(session)
        if self._saved is not None:
            values = self._saved.fetch(session)
            step = self._step_in(values, step)
            staging.put(VARIABLES, to_tree(values))
        staging.put(_OWN_PART, {"random": self.random_state(session)}, per_rank=True)
        # where many processes train one model, there is no moment at which all of it is of one step
        shared = self.operations.announcement is not None
        return staging.snapshot(step, consistent=shared or self.global_step(session) == before)

    def load(self, session: Any, parts: Parts) -> None:
        wanted = {_OWN_PART} if self._saved is None else {VARIABLES, _OWN_PART}
        variables = parts.get(VARIABLES)
        run_saved_model_initialisers(session, self.operations.graph)
        if isinstance(variables, BundlePart):
            self._check_shapes(variables.prefix)
            with self.operations.graph.as_default():  # outside of the graph TensorFlow would restore eagerly
                self.operations.saver.restore(session, str(variables.prefix))
        elif wanted != set(parts):
            part = min(wanted ^ set(parts))
            where = "in the checkpoint" if part in wanted else "in the program"
            raise IncompatibleCheckpointError(part, [f"it is missing {where}"])
        elif self._saved is not None and variables is not None:
            saved = from_tree(variables.tree())
            self._saved.check_fit(VARIABLES, saved)
            self._saved.put_back(session, saved)
        if _OWN_PART in parts and parts[_OWN_PART].is_own:
            self.set_random_state(session, parts[_OWN_PART].tree()["random"])

    def _check_shapes(self, prefix: Path) -> None:
        """TensorFlow itself gives a resource variable whatever shape the checkpoint has, and trains on."""
        saved = {} if self._saved is None else self._saved.fetches
        there = shapes_of(prefix)
        if differences := [
            f"{name!r} has shape {there[name]} there and {tensor.shape} here"
            for (name, part), tensor in saved.items()
            if not part and name in there and not tensor.shape.is_compatible_with(there[name])
        ]:
            raise OtherShapeError(VARIABLES, differences)

    def _step_in(self, values: Mapping[Key, NDArray[Any]], step: int | None) -> int | None:
        """The step among the values fetched, which were all read in one run; or else the one read before them."""
        saved = values.get((self.step_name, ""))
        if step is None or saved is None or saved.size != 1 or saved.dtype.kind != "i":
            return step
        return _integer(saved)

    def _warn_of_random_state(self) -> None:
        if not self._warned and (names := drawing_ops(self.operations.graph)):
            _log.warning(
                "random state inside these ops is not kept in checkpoints, so a resumed run draws other numbers: %s. "
                "Draw with tf.random.stateless_* from a seed and the global step, or feed the numbers.",
                _listed(names),
            )
        self._warned = True


def run_saved_model_initialisers(session: Any, graph: Any) -> None:
    """Initialise what was loaded from SavedModels, before a restore: what the checkpoint holds counts more."""
    session.run(graph.get_collection("saved_model_initializers"))


def meta_graph_of(operations: GraphOperations) -> bytes:
    """The graph with its collections and the definition of its Saver, as a serialized ``MetaGraphDef``."""
    saver = operations.saver
    with operations.graph.as_default():
        meta_graph = tf.compat.v1.train.export_meta_graph(
            graph_def=operations.graph.as_graph_def(add_shapes=True),
            saver_def=None if saver is None else saver.as_saver_def(),
        )
    return bytes(meta_graph.SerializeToString(deterministic=True))  # so that a save of the same state is the same


def _saved_tensors(operations: GraphOperations) -> SavedTensors | None:
    return None if operations.saver is None else SavedTensors.of(operations.saver, operations.graph)


@functools.cache
def _local_server() -> Any:
    """A server in this process, started when it is first asked for and kept until the process ends."""
    return tf.distribute.Server.create_local_server()


def _integer(value: Any) -> int:
    return int(np.asarray(value).reshape(-1)[0])


def _listed(names: Sequence[str]) -> str:
    more = len(names) - _NAMES_SHOWN
    return ", ".join(names[:_NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")
