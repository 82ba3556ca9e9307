"""Sessions on the master of a cluster, whose other tasks may be dead, or not there yet.

TensorFlow asks every task of the cluster when a session is created, and waits for ever for one that does not answer. No
timeout of a session or of a run ends that, and meanwhile the graph is locked for every other session of the process;
the end of a session waits for a dead task, too. So a session is given filters, by which it sees only those tasks that
its graph names; those are asked first, each by a small session of its own in a thread that may be left waiting; and
sessions are made and closed in such threads as well.
"""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import Any, Final

import tensorflow as tf

from supervise_core.readiness import NotReady, Readiness, Ready

_log = logging.getLogger(__name__)

_JOB: Final = re.compile(r"/job:([^/]+)(?:/replica:\d+)?(?:/task:(\d+))?")
_NOBODY: Final = "/job:nobody"
_AT_ONCE: Final = 0.2
"""Seconds that a task which lives needs at most, as a rule."""
_FRESH: Final = 5.0
"""Seconds for which an answer counts."""
_CREATION: Final = 60.0
"""Seconds that the creation of a session has once all of its tasks have answered; a large graph takes its time."""
_CLOSING: Final = 1.0


def is_remote(master: str) -> bool:
    """Whether sessions on this master may need other processes."""
    return master not in {"", "local"}


def tasks_named_in(graph: Any) -> list[tuple[str, int | None]]:
    """The jobs and tasks that the devices of a graph name, sorted; the task is None where only the job is named."""
    found = {(match[1], match[2]) for device in set(_devices_of(graph)) if (match := _JOB.search(device))}
    return sorted(((job, None if task is None else int(task)) for job, task in found), key=str)


def _devices_of(graph: Any) -> Iterator[str]:
    yield from (operation.device for operation in graph.get_operations())
    for function in graph.as_graph_def().library.function:
        yield from (node.device for node in function.node_def)


class Cluster:
    """The tasks that one graph needs, and whether they answer."""

    def __init__(self, graph: Any) -> None:
        self._graph = graph
        self._asked: dict[tuple[str, str], Call] = {}

    def answers(self, master: str, config: Any) -> Readiness:
        """Whether the master and all tasks that a session on it would wait for answer; if not, which ones do not.

        Each is asked once at a time, in a thread that waits until it answers.
        """
        if (local := self._tasks_of_master(master, _AT_ONCE)) is None:
            return NotReady(f"no answer from the master {master}")
        needed = self._filters(config, local)
        asked = [self._asking(master, task) for task in needed]
        until = time.monotonic() + _AT_ONCE
        missing = [
            task
            for task, call in zip(needed, asked, strict=True)
            if self._answer(master, task, call, until - time.monotonic()) is None
        ]
        return NotReady(f"no answer from {', '.join(missing)}") if missing else Ready()

    def create(self, master: str, config: Any) -> Any:
        """A session on that master, with filters unless ``config`` has some.

        :raises UnavailableError: if a task that answered just now does not any more.
        """
        local = self._tasks_of_master(master, _CREATION)
        if local is None:
            raise tf.errors.UnavailableError(None, None, f"no answer from the master {master}")
        self._asked.clear()
        filled = tf.compat.v1.ConfigProto()
        if config is not None:
            filled.CopyFrom(config)
        filters = self._filters(filled, local)
        filled.ClearField("device_filters")
        filled.device_filters.extend(filters)
        call = Call("creation of a session", lambda: self._open(master, filled), close)
        if not call.wait(_CREATION):
            call.abandon()
            raise tf.errors.UnavailableError(None, None, f"one of {', '.join(filters)} stopped answering")
        return call.result()

    def _open(self, master: str, config: Any) -> Any:
        session = tf.compat.v1.Session(master, graph=self._graph, config=config)
        try:
            if (harmless := _harmless_op(self._graph)) is not None:
                with suppress(tf.errors.InvalidArgumentError):  # it is on a task that the user does not want to see
                    session.run(harmless)  # only now the tasks are asked
        except BaseException:
            close(session)
            raise
        return session

    def _filters(self, config: Any, local: Iterable[str]) -> list[str]:
        """What the user says, or the master's own task and those that the graph names."""
        if config is not None and config.device_filters:
            return list(config.device_filters)
        own = sorted(local)
        own_jobs = {match[1] for task in own if (match := _JOB.search(task))}
        named = [
            f"/job:{job}" if task is None else f"/job:{job}/task:{task}"
            for job, task in tasks_named_in(self._graph)
            if task is not None or job not in own_jobs  # of its own job, the master's own task is meant
        ]
        return list(dict.fromkeys([*own, *named]))

    def _tasks_of_master(self, master: str, seconds: float) -> list[str] | None:
        return self._answer(master, _NOBODY, self._asking(master, _NOBODY), seconds)

    def _asking(self, master: str, task: str) -> Call:
        """The question to that task, asked now unless it is."""
        call = self._asked.get((master, task))
        if call is None or call.is_older_than(_FRESH):
            call = self._asked[master, task] = Call(f"question to {task}", lambda: _tasks_seen(master, task))
        return call

    def _answer(self, master: str, task: str, call: Call, seconds: float) -> list[str] | None:
        """The tasks that a session sees which waits for this one; None if there is no answer so soon."""
        if not call.wait(max(0.0, seconds)):
            return None
        try:
            seen: list[str] = call.result()
        except (tf.errors.UnavailableError, tf.errors.AbortedError) as error:
            _log.debug("%s: %s", task, error)
            del self._asked[master, task]
            return None
        return seen


class Call:
    """One call in a thread of its own, which is left alone if it never ends."""

    def __init__(self, name: str, function: Callable[[], Any], discard: Callable[[Any], object] | None = None) -> None:
        """``discard`` is given the result if it comes after ``abandon``."""
        self._function = function
        self._discard = discard
        self._lock = threading.Lock()
        self._done = threading.Event()
        self._abandoned = False
        self._result: Any = None
        self._error: BaseException | None = None
        self._ended = float("inf")
        threading.Thread(target=self._run, name=f"supervise-tf {name}", daemon=True).start()

    def _run(self) -> None:
        try:
            self._result = self._function()
        except BaseException as error:
            self._error = error
        with self._lock:
            self._ended = time.monotonic()
            self._done.set()
            late = self._abandoned and self._error is None
        if late and self._discard is not None:
            self._discard(self._result)

    def wait(self, seconds: float) -> bool:
        """Wait for its end; whether it ended."""
        return self._done.wait(seconds)

    def is_older_than(self, seconds: float) -> bool:
        """Whether it ended longer ago."""
        return time.monotonic() - self._ended > seconds

    def abandon(self) -> None:
        """Nobody waits for it any more."""
        with self._lock:
            self._abandoned = True
            ended_just_now = self._done.is_set() and self._error is None
        if ended_just_now and self._discard is not None:
            self._discard(self._result)

    def result(self) -> Any:
        """What it returned; only after it ended.

        :raises BaseException: what it raised.
        """
        if self._error is not None:
            raise self._error
        return self._result


def close(session: Any) -> None:
    """Close a session, and leave it alone if a task that it ran on does not answer.

    :raises BaseException: as the session fails to be closed.
    """
    if not is_remote(_master_of(session)):
        session.close()
        return
    call = Call("end of a session", session.close)
    if call.wait(_CLOSING):
        call.result()
    else:
        _log.info("a task of a session does not answer, so it was left to be closed when that one is there again")


def _master_of(session: Any) -> str:
    master = session.sess_str
    return str(master.decode() if isinstance(master, bytes) else master)


def _tasks_seen(master: str, task: str) -> list[str]:
    graph = tf.Graph()
    with graph.as_default():
        anything = tf.constant(0).op
    config = tf.compat.v1.ConfigProto(device_filters=[task])
    with tf.compat.v1.Session(master, graph=graph, config=config) as session:
        session.run(anything)
        names = [_JOB.search(device.name) for device in session.list_devices()]
    return sorted({f"/job:{name[1]}/task:{name[2]}" for name in names if name})


def _harmless_op(graph: Any) -> Any:
    """One that does nothing when it is run; None if there is none."""
    constants = (op for op in graph.get_operations() if op.type == "Const" and not op.control_inputs)
    return next(constants, None)
