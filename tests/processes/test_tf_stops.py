"""How runs of TensorFlow's drop-in end: signals, exhausted inputs, blocked threads, and errors that look like ends."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from .tf_driving import KINDS, run, started

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
tf = pytest.importorskip("tensorflow", reason="TensorFlow is not installed")

from supervise_tf import Supervisor  # noqa: E402

v1 = tf.compat.v1
PROGRAM = "tf_training.py"
A_WHILE = 60.0
"""Seconds; far less than a grace period, and far more than any machine needs."""


def newest(logdir: Path) -> int:
    return max(int(index.stem.rpartition("-")[2]) for index in logdir.glob("model.ckpt-*.index"))


def model(logdir: Path, **options: Any) -> tuple[Any, Any]:
    """A Supervisor over one variable that counts the steps, and the op that makes one; built in the default graph."""
    step = v1.train.get_or_create_global_step()
    w = v1.get_variable("w", (3,), initializer=v1.zeros_initializer())
    with tf.control_dependencies([v1.assign_add(w, tf.ones((3,)))]):
        train = v1.assign_add(step, 1).op
    return Supervisor(logdir=logdir, **options), train


# ---- processes


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, -signal.SIGINT)])
def test_a_signal_in_the_loop_saves_the_last_step(
    tmp_path: Path, kind: str, number: signal.Signals, status: int
) -> None:
    """A shell shows the end by SIGINT as 130."""
    mode = "v1" if kind == "ref" else "v2"
    arguments = (f"--kind={kind}", f"--mode={mode}", "--save-secs=600")
    with started(PROGRAM, tmp_path, *arguments, "--pause=0.01", "--steps=100000") as running:
        assert running.wait_for(8)
        running.signal(number)
        outcome = running.end()
    assert outcome.status == status, outcome.errors
    assert newest(tmp_path) == outcome.steps[-1][0] >= 7
    resumed = run(PROGRAM, tmp_path, *arguments, f"--steps={newest(tmp_path) + 2}")
    assert resumed.status == 0, resumed.errors
    assert resumed.begin["begin"] == outcome.steps[-1][0]


@pytest.mark.parametrize("mode", ["v2", "v1"])
def test_the_end_of_the_input_of_queue_runners_is_a_clean_end(tmp_path: Path, mode: str) -> None:
    outcome = run(PROGRAM, tmp_path, f"--mode={mode}", "--kind=ref", "--save-secs=600", "--input-ends=9")
    assert outcome.status == 0, outcome.errors
    assert len(outcome.steps) == 9
    assert newest(tmp_path) == 9


def test_a_process_with_a_thread_that_waits_for_ever_ends(tmp_path: Path) -> None:
    outcome = run(PROGRAM, tmp_path, "--blocked", "--steps=5", "--save-secs=600")
    assert outcome.status == 0, outcome.errors
    assert outcome.done is not None
    assert outcome.done["stragglers"] == []
    assert newest(tmp_path) == 5


# ---- in this process


@pytest.mark.parametrize(("number", "error"), [(signal.SIGTERM, SystemExit), (signal.SIGINT, KeyboardInterrupt)])
def test_the_report_of_a_run_that_was_signalled(
    tmp_path: Path, number: signal.Signals, error: type[BaseException]
) -> None:
    with tf.Graph().as_default():
        sv, train = model(tmp_path)
        with pytest.raises(error), sv.managed_session() as sess:  # noqa: PT012
            while not sv.should_stop():
                sess.run(train)
                os.kill(os.getpid(), number)
                sv.wait_for_stop()
    assert sv.report.exit_status == 128 + number
    assert str(sv.report.cause) == f"signal {number.name}"
    assert sv.report.final_save == "step 1"
    assert newest(tmp_path) == 1


def test_a_blocked_thread_costs_no_grace_period_and_is_no_error(tmp_path: Path) -> None:
    with tf.Graph().as_default():
        item = tf.queue.FIFOQueue(1, [tf.float32]).dequeue()
        sv, train = model(tmp_path, stop_grace_secs=1000)
        began = time.monotonic()
        with sv.managed_session() as sess:
            sess.run(train)
            looper = sv.loop(None, sess.run, (item,))
            waiting = threading.Thread(target=_run_until_cancelled, args=(sess, item), daemon=True)
            waiting.start()
            sv.coord.register_thread(waiting)
    assert time.monotonic() - began < A_WHILE
    assert not looper.is_alive()
    assert not waiting.is_alive()
    assert sv.report.errors == []
    assert sv.report.stragglers == {}
    assert (sv.report.exit_status, sv.report.final_save) == (0, "step 1")


def _run_until_cancelled(sess: Any, item: Any) -> None:
    with pytest.raises(tf.errors.CancelledError):
        sess.run(item)


@pytest.mark.parametrize("ask", [True, False])
def test_the_end_of_a_dataset_is_a_clean_end(tmp_path: Path, ask: bool) -> None:
    with tf.Graph().as_default():
        item = v1.data.make_one_shot_iterator(tf.data.Dataset.range(7)).get_next()
        sv, train = model(tmp_path)
        with sv.managed_session() as sess:
            while not (ask and sv.should_stop()):
                sess.run(item)
                sess.run(train)
    assert newest(tmp_path) == 7
    assert (sv.report.exit_status, sv.report.errors) == (0, [])


def damaged_copy(logdir: Path) -> str:
    """A checkpoint of one variable whose data is cut off."""
    with tf.Graph().as_default(), v1.Session() as sess:
        v1.get_variable("big", (1000,), initializer=v1.ones_initializer())
        sess.run(v1.global_variables_initializer())
        path = str(v1.train.Saver().save(sess, str(logdir / "other")))
    data = Path(f"{path}.data-00000-of-00001")
    data.write_bytes(data.read_bytes()[:100])
    return path


def test_a_truncated_checkpoint_restored_in_the_block_is_an_error(tmp_path: Path) -> None:
    tmp_path.joinpath("elsewhere").mkdir()
    path = damaged_copy(tmp_path / "elsewhere")
    with tf.Graph().as_default():
        v1.get_variable("big", (1000,), initializer=v1.ones_initializer())
        pretrained = v1.train.Saver([v1.global_variables()[0]])
        sv, train = model(tmp_path / "run")
        with pytest.raises(tf.errors.OpError) as raised, sv.managed_session() as sess:  # noqa: PT012
            sess.run(train)
            pretrained.restore(sess, path)
    assert isinstance(raised.value, tf.errors.OutOfRangeError | tf.errors.DataLossError)
    assert sv.report.exit_status == 1
    assert sv.report.final_save.startswith("withheld")
    assert newest(tmp_path / "run") == 0


def _raise_out_of_range(sess: Any) -> None:
    raise tf.errors.OutOfRangeError(None, None, "there is no pretrained model")


def _exhaust(sess: Any) -> None:
    iterator = sess.graph.get_tensor_by_name("item:0")
    sess.run(iterator)


@pytest.mark.parametrize("init_fn", [_raise_out_of_range, _exhaust])
def test_an_init_fn_without_data_shows_itself(tmp_path: Path, init_fn: Callable[[Any], None]) -> None:
    with tf.Graph().as_default():
        nothing = tf.data.Dataset.range(0)
        tf.identity(v1.data.make_one_shot_iterator(nothing).get_next(), name="item")
        sv, _ = model(tmp_path, init_fn=init_fn)
        with pytest.raises(tf.errors.OutOfRangeError) as raised, sv.managed_session():
            pass
    assert "yield" not in str(raised.value)
    assert sv.report.exit_status == 1
    assert not list(tmp_path.glob("model.ckpt-*"))


def test_an_error_of_a_loop_comes_out_as_itself(tmp_path: Path) -> None:
    error = ValueError("the loop failed")

    def fail() -> None:
        raise error

    with tf.Graph().as_default():
        sv, train = model(tmp_path)
        with pytest.raises(ValueError, match="the loop failed") as raised, sv.managed_session() as sess:  # noqa: PT012
            sv.loop(60, fail)
            while not sv.should_stop():
                sess.run(train)
    assert raised.value is error
    assert newest(tmp_path) == sv.report.last_step


def test_stop_leaves_the_session_usable(tmp_path: Path) -> None:
    with tf.Graph().as_default():
        sv, train = model(tmp_path)
        sess = sv.prepare_or_wait_for_session()
        for _ in range(3):
            assert not sv.should_stop()
            sess.run(train)
        sv.stop()
        assert sv.should_stop()
        assert newest(tmp_path) == 3
        sess.run(train)
        assert sess.run(sv.global_step) == 4
        sess.close()
        again = sv.prepare_or_wait_for_session()
        assert again.run(sv.global_step) == 3
        sv.stop()
        again.close()


def test_stop_in_the_block_and_the_session_until_its_end(tmp_path: Path) -> None:
    with tf.Graph().as_default():
        sv, train = model(tmp_path)
        with sv.managed_session() as sess:
            sess.run(train)
            sv.stop()
            assert sess.run(sv.global_step) == 1
        with pytest.raises(RuntimeError, match="closed"):
            sess.run(sv.global_step)
    assert sv.report.exit_status == 0
