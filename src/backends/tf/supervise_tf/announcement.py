"""The chief's word that the model is ready, kept beside the variables, where it lasts as long as they do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import tensorflow as tf

_WHERE: Final = "supervise_tf/announcement"
_IN_WORDS: Final = "the announcement of the chief"


@dataclass(frozen=True, slots=True)
class Announcement:
    """Ops over one string on the task that keeps the global step.

    It is set once a chief has restored or initialised the model, ``init_fn`` included, to the identity of the run. It
    is gone when that task is. As it is no variable of the graph, nothing initialises, saves or restores it.
    """

    is_made: Any
    value: Any
    missing: Any
    """The names of the global variables that are not initialised."""
    identity: Any
    """What ``making`` is fed with."""
    making: Any
    withdrawal: Any

    @classmethod
    def of(cls, graph: Any) -> Announcement | None:
        """That of a graph, whose ops are added unless it is finalized; None if no cluster keeps its variables."""
        variables = graph.get_collection(tf.compat.v1.GraphKeys.GLOBAL_VARIABLES)
        device = _device_of_shared_state(graph, variables)
        if device is not None and not graph.finalized and not _is_in(graph):
            _build(graph, _task_of(device), variables)
        return cls.found_in(graph)

    @classmethod
    def found_in(cls, graph: Any) -> Announcement | None:
        """That of a graph which has one already."""
        if not _is_in(graph):
            return None

        def output(name: str) -> Any:
            return graph.get_tensor_by_name(f"{_WHERE}/{name}:0")

        def operation(name: str) -> Any:
            return graph.get_operation_by_name(f"{_WHERE}/{name}")

        return cls(
            is_made=output("is_made"), value=output("value"), missing=output("missing"), identity=output("identity"),
            making=operation("making"), withdrawal=operation("withdrawal"),
        )  # fmt: skip

    def names_if_missing(self) -> Any:
        """A tensor that names the announcement if it was not made, for a ready op."""
        return tf.boolean_mask([_IN_WORDS], tf.reshape(tf.logical_not(self.is_made), [1]))

    def was_made_by(self, session: Any, identity: Callable[[], str]) -> bool:
        """Whether a chief of this run has made it, and nothing of the model was lost since."""
        if not session.run(self.is_made) or session.run(self.value).decode() != identity():
            return False
        return len(session.run(self.missing)) == 0

    def make(self, session: Any, identity: str) -> None:
        """Say that the model is ready."""
        session.run(self.making, {self.identity: identity})

    def withdraw(self, session: Any) -> None:
        """Say that it is not, for now."""
        session.run(self.withdrawal)


def _is_in(graph: Any) -> bool:
    try:
        graph.get_operation_by_name(f"{_WHERE}/handle")
    except KeyError:
        return False
    return True


def _device_of_shared_state(graph: Any, variables: list[Any]) -> str | None:
    """That of the global step, or else of the most variables: it has to be the same in the graphs of all tasks, and one
    of them may have a variable that the others have not."""
    steps = graph.get_collection(tf.compat.v1.GraphKeys.GLOBAL_STEP)
    steps = steps or [variable for variable in variables if variable.op.name == "global_step"]
    devices = _devices_with_job(steps)[:1] or _devices_with_job(variables)
    return max(sorted(set(devices)), key=devices.count, default=None)


def _devices_with_job(variables: list[Any]) -> list[str]:
    devices = [variable.device or "" for variable in variables]
    return [device for device in devices if "/job:" in device and "/job:localhost" not in device]


def _build(graph: Any, device: str, variables: Any) -> None:
    ops = tf.raw_ops
    with graph.as_default(), graph.name_scope(_WHERE + "/"), graph.control_dependencies(None):
        tf.identity(tf.compat.v1.report_uninitialized_variables(variables), name="missing")
        with graph.device(device):
            handle = ops.VarHandleOp(dtype=tf.string, shape=[], shared_name=_WHERE, name="handle")
            identity = tf.compat.v1.placeholder(tf.string, [], name="identity")
            ops.VarIsInitializedOp(resource=handle, name="is_made")
            ops.ReadVariableOp(resource=handle, dtype=tf.string, name="value")
            ops.AssignVariableOp(resource=handle, value=identity, name="making")
            ops.DestroyResourceOp(resource=handle, ignore_lookup_error=True, name="withdrawal")


def _task_of(device: str) -> str:
    """The task in the name of a device, on its CPU."""
    spec = tf.DeviceSpec.from_string(device)
    task = tf.DeviceSpec(job=spec.job, replica=spec.replica, task=spec.task, device_type="CPU", device_index=0)
    return str(task.to_string())
