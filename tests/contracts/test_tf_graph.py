"""The backend for TensorFlow graphs keeps the contract, in each of the three modes that TensorFlow has.

A mode is for a whole process: this file runs itself again in a process of its own for each of the two others.
"""

from __future__ import annotations

import functools
import os
import random
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
tf = pytest.importorskip("tensorflow", reason="TensorFlow is not installed")

from supervise_core.staging import Staging  # noqa: E402
from supervise_core.testing.backend_contract import (  # noqa: E402
    BackendContract,
    Program,
    _newest,
    _opened,
    _saved,
    _store,
)
from supervise_tf.graph import GraphBackend  # noqa: E402

v1 = tf.compat.v1
MODE_VARIABLE = "SUPERVISE_TEST_TF_MODE"
MODES = {"v1": v1.disable_v2_behavior, "no-eager": v1.disable_eager_execution}
MODE = os.environ.get(MODE_VARIABLE, "")
CHOSEN_FOR_MODES = "come_back or comes_back or put_back or resumed or missing or snapshot_is or mode"
if MODE:
    MODES[MODE]()


class Watched(GraphBackend):
    """A graph backend whose session can be looked into, and whose last look is kept when the session is closed.

    The state of a graph lives in its session, so a look past the backend needs the session, which ``raw`` is not given.
    """

    def __init__(self, graph: Any, look: Callable[[Any], dict[str, Any]]) -> None:
        super().__init__(graph)
        self.session: Any = None
        self.look = look
        self.last: dict[str, Any] = {}

    def create_session(self, master: str = "", config: Any = None) -> Any:
        self.session = super().create_session(master, config)
        return self.session

    def close_session(self, session: Any) -> None:
        if session is self.session:
            self.last, self.session = self.look(session), None
        super().close_session(session)

    def raw(self) -> dict[str, Any]:
        return self.last if self.session is None else self.look(self.session)


def look_at(variables: list[Any]) -> Callable[[Any], dict[str, Any]]:
    """The values of these variables; None for one that is not initialised."""
    there = [_is_there(variable) for variable in variables]
    values = [variable.value() for variable in variables]

    def look(session: Any) -> dict[str, Any]:
        known = session.run(there)
        found = dict(
            zip(
                [variable.op.name for variable, is_there in zip(variables, known, strict=True) if is_there],
                session.run([value for value, is_there in zip(values, known, strict=True) if is_there]),
                strict=True,
            )
        )
        return {variable.op.name: _plain(found.get(variable.op.name)) for variable in variables}

    return look


def _is_there(variable: Any) -> Any:
    if hasattr(variable, "handle"):
        return tf.raw_ops.VarIsInitializedOp(resource=variable.handle)
    return tf.raw_ops.IsVariableInitialized(ref=variable.op.outputs[0])


def _plain(value: Any) -> Any:
    """Strings, which TensorFlow gives as arrays of objects, as bytes that tell where each one ends."""
    if isinstance(value, np.ndarray) and value.dtype == object:
        return repr((value.shape, value.reshape(-1).tolist())).encode()
    return value


class Built(NamedTuple):
    """A graph that is complete, and what a program does in its sessions."""

    graph: Any
    train: Any
    drawn: Any
    look: Callable[[Any], dict[str, Any]]


def graph_program(use_resource: bool) -> Program:
    """A program over the one graph of its kind; what differs from program to program is the session."""
    random.seed(0)
    np.random.seed(0)
    built = build(use_resource)
    backend = Watched(built.graph, built.look)

    def train(session: Any) -> None:
        session.run(built.train, {built.drawn: np.random.normal(size=(2, 3)) + random.random()})

    return Program(backend, train, backend.raw)


@functools.cache
def build(use_resource: bool) -> Built:
    """A graph with a variable of each kind that there is, finalized, as a backend adds nothing to a complete one."""
    with tf.Graph().as_default() as graph:
        step = v1.get_variable(
            "global_step", (), tf.int64, v1.zeros_initializer(), trainable=False, use_resource=use_resource,
            collections=[v1.GraphKeys.GLOBAL_VARIABLES, v1.GraphKeys.GLOBAL_STEP],
        )  # fmt: skip

        def variable(name: str, value: Any, **more: Any) -> Any:
            return v1.get_variable(name, initializer=tf.constant(value), use_resource=use_resource, **more)

        matrix = variable("matrix", np.arange(6, dtype=np.float32).reshape(2, 3))
        brief = variable("brief", np.arange(6).reshape(3, 2).astype(tf.bfloat16.as_numpy_dtype))
        scale = variable("scale", np.float64(1.5))
        counts = variable("counts", np.array([1, -(2**62)], np.int64))
        nothing = variable("nothing", np.zeros((0, 3), np.float32))
        flags = variable("flags", np.array([True, False]))
        sliced = v1.get_variable(
            "sliced", (5, 2), initializer=v1.ones_initializer(), partitioner=v1.fixed_size_partitioner(2),
            use_resource=use_resource,
        )  # fmt: skip
        drawn = v1.placeholder(tf.float32, (2, 3))
        changes = [
            v1.assign_add(matrix, drawn),
            v1.assign_add(brief, tf.ones_like(brief)),
            v1.assign_add(scale, tf.constant(0.25, tf.float64)),
            v1.assign_add(counts, tf.constant([3, 2**40], tf.int64)),
            v1.assign(flags, tf.logical_not(flags)),
            *[v1.assign_add(part, tf.fill(part.shape, float(number + 1))) for number, part in enumerate(sliced)],
        ]
        variables = [step, matrix, brief, scale, counts, nothing, flags, *sliced]
        if use_resource:
            words = variable("words", [b"one", b"\x00\xff", b""])
            changes.append(v1.assign(words, tf.strings.join([words, tf.constant("+")])))
            generator = tf.random.Generator.from_seed(3)
            noise = variable("noise", np.zeros(4, np.float32))
            changes.append(v1.assign_add(noise, generator.normal((4,))))
            variables += [words, noise, generator.state]
        with tf.control_dependencies(changes):
            train = v1.assign_add(step, tf.constant(1, tf.int64)).op
        look = look_at(variables)
        GraphBackend()
    graph.finalize()
    return Built(graph, train, drawn, look)


class TestGraphBackendWithReferenceVariables(BackendContract):
    model_part = "variables"

    def program(self) -> Program:
        return graph_program(use_resource=False)

    def program_that_is_not_ready(self) -> Program:
        return self.program()


class TestGraphBackendWithResourceVariables(BackendContract):
    model_part = "variables"

    def program(self) -> Program:
        return graph_program(use_resource=True)

    def program_that_is_not_ready(self) -> Program:
        return self.program()


# ---- tables


@contextmanager
def a_table() -> Iterator[tuple[Any, Any, Any]]:
    """A mutable table in a new graph; an op that changes it, and its content."""
    with tf.Graph().as_default():
        table = tf.lookup.experimental.MutableHashTable(tf.string, tf.int64, -1)
        step = v1.train.get_or_create_global_step()
        key = v1.placeholder(tf.string, ())
        insert = table.insert(key[tf.newaxis], table.lookup(key[tf.newaxis]) + 2 + tf.cast(step, tf.int64))
        yield (key, insert), table.export(), GraphBackend()


def test_a_table_that_changes_comes_back(tmp_path: Path) -> None:
    with a_table() as ((key, insert), content, backend):
        program = Program(backend, lambda session: None, dict)
        with _opened(program, 0) as (_, session):
            for word in ("a", "b", "a"):
                session.run(insert, {key: word})
            before = session.run(content)
            parts = _saved(program, session, _store(tmp_path))
            session.run(insert, {key: "later"})
    with a_table() as (_, content, backend), _opened(Program(backend, lambda s: None, dict), 0, parts) as (_, session):
        after = session.run(content)
    assert dict(zip(*before, strict=True)) == dict(zip(*after, strict=True)) == {b"a": 3, b"b": 1}


def test_a_table_without_entries_comes_back(tmp_path: Path) -> None:
    with a_table() as (_, content, backend), _opened(Program(backend, lambda s: None, dict), 0) as (program, session):
        _saved(program, session, _store(tmp_path))
    with a_table() as ((key, insert), content, backend):
        program = Program(backend, lambda session: None, dict)
        with _opened(program, 0, _newest(_store(tmp_path))) as (_, session):
            assert [values.size for values in session.run(content)] == [0, 0]
            session.run(insert, {key: "a"})
            assert backend.snapshot(session, Staging()).step == 0


# ---- modes


@pytest.mark.skipif(bool(MODE), reason="this is the process of a mode")
@pytest.mark.parametrize("mode", MODES)
def test_the_contract_is_kept_in_the_mode(mode: str, tmp_path: Path) -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", f"--basetemp={tmp_path}/in",
         "-k", CHOSEN_FOR_MODES, __file__],
        env=os.environ | {MODE_VARIABLE: mode},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout + ran.stderr
    passed = re.search("([0-9]+) passed", ran.stdout)
    assert passed is not None
    assert int(passed[1]) > 20


def test_the_process_is_in_its_mode() -> None:
    assert tf.executing_eagerly() == (not MODE)
    assert v1.resource_variables_enabled() == (MODE != "v1")
