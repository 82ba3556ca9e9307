"""TensorFlow reads what the drop-in wrote, and the drop-in what TensorFlow wrote; both can write side by side."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from processes.tf_driving import KINDS, run

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
tf = pytest.importorskip("tensorflow", reason="TensorFlow is not installed")

from supervise_tf import Supervisor  # noqa: E402

v1 = tf.compat.v1


class Model:
    """A variable that begins at 1, 2, 3 and grows by one each step; in a graph of its own."""

    def __init__(self, logdir: Path, kind: str, **options: Any) -> None:
        resource = kind == "resource"
        self.graph = tf.Graph()
        with self.graph.as_default():
            zero = v1.zeros_initializer()
            self.step = v1.get_variable("global_step", (), tf.int64, zero, trainable=False, use_resource=resource)
            self.w = v1.get_variable("w", initializer=[[1.0, 2.0, 3.0]], use_resource=resource)
            with tf.control_dependencies([v1.assign_add(self.w, tf.ones((1, 3)))]):
                self.train = v1.assign_add(self.step, 1).op
            saver = v1.train.Saver(max_to_keep=9)
            self.sv = Supervisor(logdir=logdir, summary_op=None, saver=saver, **options)

    def run(self, steps: int) -> int:
        """Train, and check that the values are those of the steps. The step that was begun from."""
        with self.sv.managed_session() as sess:
            begun = int(sess.run(self.step))
            assert sess.run(self.w).tolist() == value_of(begun)
            for _ in range(steps):
                sess.run(self.train)
                assert not self.sv.should_stop()
        return begun


def value_of(step: int) -> list[list[float]]:
    return [[1.0 + step, 2.0 + step, 3.0 + step]]


def original(logdir: Path, kind: str, steps: int, mode: str = "v1") -> tuple[int, int]:
    """Train with TensorFlow's own Supervisor. The steps that it began from and ended with."""
    outcome = run("tf_original.py", logdir, mode, kind, steps)
    assert outcome.status == 0, outcome.errors
    assert outcome.done is not None
    assert outcome.begin["w"] == value_of(outcome.begin["begin"])
    return outcome.begin["begin"], outcome.done["done"]


def steps_in(logdir: Path) -> list[int]:
    return sorted(int(index.stem.rpartition("-")[2].partition(".")[0]) for index in logdir.glob("model.ckpt-*.index"))


@pytest.mark.parametrize("kind", KINDS)
def test_ours_are_read_by_tensorflow(tmp_path: Path, kind: str) -> None:
    Model(tmp_path, kind).run(4)
    newest = str(tmp_path / "model.ckpt-4")
    assert tf.train.latest_checkpoint(str(tmp_path)) == newest
    state = tf.train.get_checkpoint_state(str(tmp_path))
    assert list(state.all_model_checkpoint_paths) == [str(tmp_path / "model.ckpt-0"), newest]
    assert all(v1.train.checkpoint_exists(path) for path in state.all_model_checkpoint_paths)
    reader = tf.train.load_checkpoint(str(tmp_path))
    assert dict(reader.get_variable_to_shape_map()) == {"global_step": [], "w": [1, 3]}
    assert reader.get_tensor("w").tolist() == value_of(4)
    assert tf.train.load_variable(newest, "global_step") == 4
    with tf.Graph().as_default(), v1.Session() as sess:
        saver = v1.train.import_meta_graph(f"{newest}.meta")
        saver.restore(sess, newest)
        assert sess.run("w:0" if kind == "ref" else "w/Read/ReadVariableOp:0").tolist() == value_of(4)
    values = tf.train.load_checkpoint(newest)
    assert np.asarray(values.get_tensor("global_step")).dtype == np.int64


@pytest.mark.parametrize("mode", ["v1", "no eager"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_changes_hands_again_and_again(tmp_path: Path, kind: str, mode: str) -> None:
    assert original(tmp_path, kind, 3, mode) == (0, 3)
    assert Model(tmp_path, kind).run(2) == 3
    assert original(tmp_path, kind, 2, mode) == (5, 7)
    assert Model(tmp_path, "ref" if kind == "resource" else "resource").run(1) == 7  # the kind may change
    assert original(tmp_path, kind, 0, mode)[0] == 8
    assert tf.train.latest_checkpoint(str(tmp_path)) == str(tmp_path / "model.ckpt-8")


@pytest.mark.parametrize("kind", KINDS)
def test_without_manifests_and_without_a_state_file(tmp_path: Path, kind: str) -> None:
    Model(tmp_path, kind).run(3)
    for manifest in tmp_path.glob("*.manifest.json"):
        manifest.unlink()
    (tmp_path / "checkpoint").unlink()
    model = Model(tmp_path, kind)
    assert model.run(2) == 3
    assert model.sv.report.restored == "model.ckpt-3"
    assert tf.train.latest_checkpoint(str(tmp_path)) == str(tmp_path / "model.ckpt-5")


@pytest.mark.parametrize("kind", KINDS)
def test_the_programs_own_saves_beside_ours(tmp_path: Path, kind: str) -> None:
    model = Model(tmp_path, kind, save_model_secs=600)
    with model.graph.as_default(), model.sv.managed_session() as sess:
        for step in range(1, 6):
            assert not model.sv.should_stop()
            sess.run(model.train)
            if step in (2, 4):
                saved = model.sv.saver.save(sess, model.sv.save_path, global_step=model.sv.global_step)
                assert saved == str(tmp_path / f"model.ckpt-{step}")
    assert steps_in(tmp_path) == [0, 2, 4, 5]
    assert tf.train.latest_checkpoint(str(tmp_path)) == str(tmp_path / "model.ckpt-5")
    assert Model(tmp_path, kind).run(0) == 5
    (tmp_path / "model.ckpt-5.index").unlink()
    (tmp_path / "model.ckpt-5.manifest.json").unlink()
    again = Model(tmp_path, kind)
    assert again.run(0) == 4
    assert again.sv.report.restored == "model.ckpt-4"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("when", ["before ours", "after ours"])
def test_the_program_saves_the_very_step_that_we_save(tmp_path: Path, kind: str, when: str) -> None:
    """The same values under the same name; whoever writes last, they are there and whole."""
    model = Model(tmp_path, kind)
    with model.graph.as_default(), model.sv.managed_session() as sess:
        if when == "after ours":
            model.sv.saver.save(sess, model.sv.save_path, global_step=model.sv.global_step)
        else:
            for _ in range(3):
                assert not model.sv.should_stop()
                sess.run(model.train)
            model.sv.saver.save(sess, model.sv.save_path, global_step=model.sv.global_step)
    expected = 0 if when == "after ours" else 3
    again = Model(tmp_path, kind)
    assert again.run(0) == expected
    assert again.sv.report.set_aside == {}
    assert max(steps_in(tmp_path)) == expected
    assert original(tmp_path, kind, 0)[0] == expected


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("path", ["relative", "absolute"])
def test_a_state_file_that_the_user_edited_is_obeyed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str, path: str
) -> None:
    for _ in range(3):
        Model(tmp_path, kind).run(2)
    assert steps_in(tmp_path) == [0, 2, 4, 6]
    name = "model.ckpt-2" if path == "relative" else str(tmp_path / "model.ckpt-2")
    (tmp_path / "checkpoint").write_text(f'model_checkpoint_path: "{name}"\n')
    model = Model(tmp_path, kind)
    with caplog.at_level(logging.WARNING):
        assert model.run(1) == 2
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert any("model.ckpt-2" in message for message in said)
    assert steps_in(tmp_path) == [0, 2, 3]
    assert {directory.name for directory in (tmp_path / "retired").iterdir()} == {"model.ckpt-4", "model.ckpt-6"}
    assert tf.train.latest_checkpoint(str(tmp_path)) == str(tmp_path / "model.ckpt-3")
    assert Model(tmp_path, kind).run(0) == 3  # and is a wish no more
