"""A TensorFlow checkpoint holds one step, the one in its name, however soon the loop goes on after the boundary."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from .tf_driving import KINDS

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
tf = pytest.importorskip("tensorflow", reason="TensorFlow is not installed")

from supervise_tf import Supervisor  # noqa: E402

Copy = Callable[[Path, Path], None]

v1 = tf.compat.v1


class Counting:
    """A model whose variables are all set to the number of the step, one after the other."""

    def __init__(self, logdir: Path, kind: str) -> None:
        self.graph = tf.Graph()
        with self.graph.as_default():
            resource = kind == "resource"
            step = v1.get_variable(
                "global_step", (), tf.int64, v1.zeros_initializer(), trainable=False, use_resource=resource
            )
            shapes = [(200, 50), (3,), (), (100, 100), (7, 1), (40, 40, 4)]
            self.variables = [
                v1.get_variable(f"v{number}", shape, tf.float64, v1.zeros_initializer(), use_resource=resource)
                for number, shape in enumerate(shapes)
            ]
            value = tf.cast(tf.identity(step) + 1, tf.float64)
            done: Any = value
            for variable in self.variables[:3]:
                with tf.control_dependencies([done]):
                    done = v1.assign(variable, tf.fill(variable.shape, value))
            with tf.control_dependencies([done]):
                done = v1.assign_add(step, 1)
            for variable in self.variables[3:]:
                with tf.control_dependencies([done]):
                    done = v1.assign(variable, tf.fill(variable.shape, value))
            self.train = done.op if hasattr(done, "op") else done
            saver = v1.train.Saver(max_to_keep=100_000)
            self.sv = Supervisor(logdir=logdir, save_model_secs=0.05, saver=saver)


def contents(logdir: Path) -> dict[str, tuple[bool, set[float]]]:
    """By the name of each checkpoint: whether it was taken at a boundary, and all numbers in it."""
    found: dict[str, tuple[bool, set[float]]] = {}
    for index in logdir.glob("model.ckpt-*.index"):
        prefix = index.with_suffix("")
        reader = tf.train.load_checkpoint(str(prefix))
        tensors = [np.asarray(reader.get_tensor(name)) for name in reader.get_variable_to_shape_map()]
        manifest = json.loads(Path(f"{prefix}.manifest.json").read_bytes())
        found[prefix.name] = manifest["consistent"], {float(number) for one in tensors for number in np.unique(one)}
    return found


def is_of_a_boundary(logdir: Path, name: str | None) -> bool:
    """Whether that checkpoint was taken at a boundary, later than at the start."""
    if name in (None, "model.ckpt-0"):
        return False
    try:
        return bool(json.loads((logdir / f"{name}.manifest.json").read_bytes())["consistent"])
    except FileNotFoundError:  # pruned meanwhile
        return False


def step_of(name: str) -> int:
    """The step in the name of a checkpoint, of which there may be a second revision."""
    return int(name.rpartition("-")[2].partition(".")[0])


def check_last(found: dict[str, tuple[bool, set[float]]], step: int) -> None:
    """The last step is there, and was taken at a boundary."""
    assert (True, {float(step)}) in [content for name, content in found.items() if step_of(name) == step]


def warnings_in(caplog: pytest.LogCaptureFixture, words: str) -> list[str]:
    found = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    return [message for message in found if words in message]


@pytest.mark.campaign(small=40, soak=200)
@pytest.mark.parametrize("kind", KINDS)
def test_tf_state_is_never_torn(tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str, count: int) -> None:
    model = Counting(tmp_path, kind)
    steps = 0
    with caplog.at_level(logging.WARNING), model.sv.managed_session() as sess:
        while not model.sv.should_stop() and model.sv.report.saves < count:
            sess.run(model.train)
            steps += 1
    found = contents(tmp_path)
    assert len(found) >= count // 2  # less than were saved: of a step that was saved twice, one is left
    check_last(found, steps)
    beside = [name for name, (consistent, _) in found.items() if not consistent]
    assert not beside or warnings_in(caplog, "no step boundary")  # a step that took longer than two intervals
    assert len(found) - len(beside) >= 3
    for name, (consistent, numbers) in found.items():
        if consistent:
            assert numbers == {float(step_of(name))}


@pytest.mark.parametrize("kind", KINDS)
def test_a_loop_that_never_asks_is_saved_beside(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str, copy_as_killed: Copy
) -> None:
    model, logdir = Counting(tmp_path / "run", kind), tmp_path / "run"
    steps = 0
    with caplog.at_level(logging.WARNING), model.sv.managed_session() as sess:
        while model.sv.report.saves < 5:
            sess.run(model.train)
            steps += 1
        copy_as_killed(tmp_path / "run", tmp_path / "killed")
    assert len(warnings_in(caplog, "no step boundary")) == 1
    found = contents(logdir)
    check_last(found, steps)
    beside = [name for name, (consistent, _) in found.items() if not consistent]
    assert len(beside) >= 3
    for name in beside:  # of the step in its name, or torn between neighbours, but no older
        assert max(found[name][1]) <= steps
    assert model.sv.report.exit_status == 0
    caplog.clear()
    resumed = Counting(tmp_path / "killed", kind)
    with resumed.sv.managed_session() as sess:
        resumed.sv.request_stop()
    newest = max(contents(tmp_path / "killed"), key=step_of)
    assert newest in beside, "the only one that was taken at a boundary is the one that the run began with"
    assert resumed.sv.report.restored == newest
    assert len(warnings_in(caplog, "may mix two steps")) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_one_that_was_taken_at_a_boundary_is_preferred(tmp_path: Path, kind: str, copy_as_killed: Copy) -> None:
    model = Counting(tmp_path / "run", kind)
    with model.sv.managed_session() as sess:
        while not is_of_a_boundary(tmp_path / "run", model.sv.report.last_saved):
            sess.run(model.train)
            model.sv.should_stop()
        saves = model.sv.report.saves
        while model.sv.report.saves < saves + 2:
            sess.run(model.train)
        copy_as_killed(tmp_path / "run", tmp_path / "killed")
    found = contents(tmp_path / "killed")
    consistent = [name for name, (taken_at_boundary, _) in found.items() if taken_at_boundary]
    newest = max(consistent, key=step_of)
    newer = [name for name in found if step_of(name) > step_of(newest)]
    assert newer
    resumed = Counting(tmp_path / "killed", kind)
    with resumed.sv.managed_session():
        resumed.sv.request_stop()
    assert newest != "model.ckpt-0"
    few = len(newer) <= 4  # a slow machine may have saved more beside than was waited for
    assert resumed.sv.report.restored == (newest if few else max(found, key=step_of))


@pytest.mark.parametrize("kind", KINDS)
def test_with_none_taken_at_a_boundary_the_newest_of_the_others_is_restored(
    tmp_path: Path, kind: str, copy_as_killed: Copy
) -> None:
    model = Counting(tmp_path / "run", kind)
    with model.sv.managed_session() as sess:
        while model.sv.report.saves < 5:
            sess.run(model.train)
        copy_as_killed(tmp_path / "run", tmp_path / "killed")
    (tmp_path / "killed" / "model.ckpt-0.index").unlink()
    names = sorted(contents(tmp_path / "killed"), key=step_of)
    resumed = Counting(tmp_path / "killed", kind)
    with resumed.sv.managed_session():
        resumed.sv.request_stop()
    assert resumed.sv.report.restored == names[-1]
