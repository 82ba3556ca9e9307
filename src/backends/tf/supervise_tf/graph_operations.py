"""The operations of a TensorFlow graph that a supervisor runs: those given, those in its collections, or new ones."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import tensorflow as tf

from supervise_core.readiness import NotReady, Readiness, Ready
from supervise_tf.announcement import Announcement

_log = logging.getLogger(__name__)

USE_DEFAULT: Final = 0
"""Stands for "what the graph's collections say, or a new one"; compared by identity, as TensorFlow does."""

_keys: Final = tf.compat.v1.GraphKeys


@dataclass(frozen=True, slots=True)
class GraphOperations:
    """What is run in the sessions of one graph; None is "not done"."""

    graph: Any
    init_op: Any
    init_feed_dict: Mapping[Any, Any] | None
    local_init_op: Any
    local_init_run_options: Any
    local_init_feed_dict: Mapping[Any, Any] | None
    ready_op: Any
    ready_for_local_init_op: Any
    summary_op: Any
    saver: Any
    global_step: Any
    announcement: Announcement | None = None
    """Where the chief says that the model is ready, if a task of a cluster keeps it."""

    @classmethod
    def of(
        cls,
        graph: Any = None,
        *,
        init_op: Any = USE_DEFAULT,
        init_feed_dict: Mapping[Any, Any] | None = None,
        local_init_op: Any = USE_DEFAULT,
        local_init_run_options: Any = None,
        local_init_feed_dict: Mapping[Any, Any] | None = None,
        ready_op: Any = USE_DEFAULT,
        ready_for_local_init_op: Any = USE_DEFAULT,
        summary_op: Any = USE_DEFAULT,
        saver: Any = USE_DEFAULT,
        global_step: Any = USE_DEFAULT,
    ) -> GraphOperations:
        """Those given; for the others, the first of its collection, or a new one, which is added to the collection.

        :raises RuntimeError: if something has to be added to a graph that is finalized.
        :raises TypeError, ValueError: if the global step is no single integer.
        """
        graph = graph or tf.compat.v1.get_default_graph()
        announcement = Announcement.of(graph)
        with graph.as_default():
            if ready_op is USE_DEFAULT:
                ready_op = _first(_keys.READY_OP, lambda: _new_ready_op(announcement))
            if ready_for_local_init_op is USE_DEFAULT:
                ready_for_local_init_op = _first(_keys.READY_FOR_LOCAL_INIT_OP)
            if init_op is USE_DEFAULT:
                init_op = _first(_keys.INIT_OP, tf.compat.v1.global_variables_initializer)
            if local_init_op is USE_DEFAULT:
                local_init_op = _first(_keys.LOCAL_INIT_OP, _new_local_init_op)
            if saver is USE_DEFAULT:
                saver = _first(_keys.SAVERS, _new_saver)
            if summary_op is USE_DEFAULT:
                summary_op = _first(_keys.SUMMARY_OP, tf.compat.v1.summary.merge_all)
            if global_step is USE_DEFAULT:
                global_step = _first(_keys.GLOBAL_STEP, _named_global_step)
        check_global_step(global_step)
        return cls(
            graph, init_op, init_feed_dict, local_init_op, local_init_run_options, local_init_feed_dict,
            ready_op, ready_for_local_init_op, summary_op, saver, global_step, announcement,
        )  # fmt: skip

    def replace(self, **changes: Any) -> GraphOperations:
        """The same, but for these."""
        return replace(self, **changes)

    # ---- what is done with them

    def init(self, session: Any) -> None:
        """Run the init op, if there is one."""
        if self.init_op is not None:
            session.run(self.init_op, feed_dict=self.init_feed_dict)

    def local_init(self, session: Any) -> None:
        """Run the local init op, if there is one."""
        if self.local_init_op is not None:
            session.run(self.local_init_op, feed_dict=self.local_init_feed_dict, options=self.local_init_run_options)

    def ready(self, session: Any) -> Readiness:
        """Whether the ready op names nothing."""
        return _readiness(self.ready_op, session)

    def ready_for_local_init(self, session: Any) -> Readiness:
        """Whether the op asked before local init names nothing."""
        return _readiness(self.ready_for_local_init_op, session)


def check_global_step(step: Any) -> None:
    """:raises TypeError, ValueError: if it is not a single integer; says what it is."""
    if step is None:
        return
    dtype = getattr(step, "dtype", None)
    if dtype is None or dtype.base_dtype not in (tf.int32, tf.int64):
        raise TypeError(f"global_step is an integer tensor or variable of TensorFlow, not {step!r}")
    if step.shape.is_fully_defined() and step.shape.num_elements() != 1:
        raise ValueError(f"global_step has one element, not the shape {step.shape}; pass the right tensor, or None")


def _first(key: str, make: Callable[[], Any] = lambda: None) -> Any:
    """The first item of a collection of the default graph; or else a new one, which is added to it."""
    found = tf.compat.v1.get_collection(key)
    if len(found) > 1:
        _log.info("the collection %s has %d items; the first one is taken", key, len(found))
    if found:
        return found[0]
    made = make()
    if made is not None:
        tf.compat.v1.add_to_collection(key, made)
    return made


def _new_ready_op(announcement: Announcement | None) -> Any:
    uninitialised = tf.compat.v1.report_uninitialized_variables()
    if announcement is None:
        return uninitialised
    return tf.concat([uninitialised, announcement.names_if_missing()], 0, name="not_ready")


def _new_local_init_op() -> Any:
    return tf.group(tf.compat.v1.local_variables_initializer(), tf.compat.v1.tables_initializer())


def _new_saver() -> Any:
    return tf.compat.v1.train.Saver() if tf.compat.v1.global_variables() else None


def _named_global_step() -> Any:
    """The variable ``global_step``, of either kind, or a tensor of that name, if it is an integer."""
    for variable in tf.compat.v1.global_variables():
        if variable.op.name == "global_step" and variable.dtype.base_dtype in (tf.int32, tf.int64):
            return variable
    try:
        tensor = tf.compat.v1.get_default_graph().get_tensor_by_name("global_step:0")
    except KeyError:
        return None
    return tensor if tensor.dtype.base_dtype in (tf.int32, tf.int64) else None


def _readiness(operation: Any, session: Any) -> Readiness:
    """As TensorFlow reads its ready ops: nothing, nothing in it, or an int32 (an old form) is ready.

    :raises TypeError: if it gives something else than the names of what is missing.
    """
    if operation is None:
        return Ready()
    try:
        value = session.run(operation)
    except tf.errors.FailedPreconditionError as error:
        if "uninitialized" not in str(error):
            _log.warning("the ready op failed: %s", error)
            raise
        return NotReady(str(error))
    if value is None or np.asarray(value).dtype == np.int32 or np.size(value) == 0:
        return Ready()
    names = np.asarray(value).reshape(-1).tolist()
    if not all(isinstance(name, bytes) for name in names):
        raise TypeError(f"a ready op gives the names of what is not ready, as strings, and not {value!r}")
    return NotReady("Variables not initialized: " + ", ".join(name.decode() for name in names))
