"""What programs do that nobody expects: threads that train, steps set back, other names, calls that block."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
tf = pytest.importorskip("tensorflow", reason="TensorFlow is not installed")

from supervise_core import EverySteps, LeaseHeldError, SessionStateError, Supervisor  # noqa: E402
from supervise_core.clock import SystemClock  # noqa: E402
from supervise_core.manifest import Manifest  # noqa: E402
from supervise_core.testing.clock import eventually  # noqa: E402
from supervise_tf import BundleStore, Coordinator, GraphBackend, SessionManager  # noqa: E402
from supervise_tf import Supervisor as TFSupervisor  # noqa: E402

v1 = tf.compat.v1


class Model:
    """A variable that is moved by one with each step, and its drop-in Supervisor."""

    def __init__(self, logdir: Path | str, *, counted: bool = True, **options: Any) -> None:
        with tf.Graph().as_default() as self.graph:
            self.w = v1.get_variable("w", (), initializer=v1.zeros_initializer())
            moves = [v1.assign_add(self.w, 1.0)]
            if counted:
                self.step = v1.train.get_or_create_global_step()
                moves.append(v1.assign_add(self.step, 1))
                self.set_back = v1.assign(self.step, 0)
            self.train = tf.group(*moves)
            self.queue = tf.queue.FIFOQueue(1, [tf.float32])
            self.blocked = self.queue.dequeue()
            self.loose = v1.train.Saver()
            self.sv = TFSupervisor(logdir=logdir, **{"summary_op": None, "save_summaries_secs": 0, **options})

    def run(self, steps: int) -> float:
        """Train, and the value at the end."""
        with self.sv.managed_session() as sess:
            for _ in range(steps):
                if self.sv.should_stop():
                    break
                sess.run(self.train)
            return float(sess.run(self.w))


def manifests(logdir: Path) -> dict[str, Manifest]:
    return {
        path.name.removesuffix(".manifest.json"): Manifest.from_bytes(path.read_bytes())
        for path in logdir.glob("*.manifest.json")
    }


def saved_after(logdir: Path, step: int) -> list[int]:
    """The steps of later checkpoints; the first save of a run may be of the very step that it began with."""
    steps = [int(path.stem.rpartition("-")[2].partition(".")[0]) for path in logdir.glob("model.ckpt-*.index")]
    return [found for found in steps if found > step]


def warnings_in(caplog: pytest.LogCaptureFixture, text: str) -> int:
    return sum(text in record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING)


def test_what_other_threads_trained_is_gone_on_from(
    tmp_path: Path, copy_as_killed: Callable[[Path, Path], None]
) -> None:
    """All that such a run saves may mix two steps; the only one that does not is what the run began with."""
    Model(tmp_path / "run").run(10)
    model = Model(tmp_path / "run", save_model_secs=0.02)
    with model.sv.managed_session() as sess:

        def train() -> None:
            while not model.sv.coord.should_stop():
                sess.run(model.train)

        trainer = threading.Thread(target=train)
        model.sv.coord.register_thread(trainer)
        trainer.start()
        eventually(lambda: not model.sv.should_stop() and len(saved_after(tmp_path / "run", 10)) >= 3)
        copy_as_killed(tmp_path / "run", tmp_path / "killed")
        model.sv.request_stop()
    resumed = Model(tmp_path / "killed")
    resumed.run(0)
    assert resumed.sv.report.first_step > 10, "all that the second run did is lost"


def test_a_step_that_is_set_back_begins_a_branch(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    Model(tmp_path, save_model_secs=600).run(20)
    model = Model(tmp_path, save_model_secs=600)
    with model.sv.managed_session() as sess:
        sess.run(model.set_back)
        for _ in range(4):
            model.sv.should_stop()
            sess.run(model.train)
    assert model.sv.report.last_saved == "model.ckpt-4"
    assert tf.train.latest_checkpoint(tmp_path) == str(tmp_path / "model.ckpt-4")
    assert warnings_in(caplog, "the step was set back to 4") == 1
    assert (tmp_path / "retired" / "model.ckpt-20").is_dir()
    assert Model(tmp_path).run(1) == 25.0


def test_a_checkpoint_of_another_name_is_gone_on_from(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = Model(tmp_path, save_model_secs=0)
    with model.sv.managed_session() as sess:
        sess.run([model.train])
        with model.graph.as_default():
            model.loose.save(sess, str(tmp_path / "my_model"), global_step=1)
    again = Model(tmp_path)
    assert again.run(1) == 2.0
    assert warnings_in(caplog, "going on from") == 1
    with again.graph.as_default():
        assert SessionManager(graph=again.graph).recover_session("", again.sv.saver, str(tmp_path))[1]


def test_a_loop_that_neither_counts_nor_asks_is_saved_in_every_run(tmp_path: Path) -> None:
    for expected in (5.0, 10.0):
        model = Model(tmp_path, counted=False)
        with model.sv.managed_session() as sess:
            for _ in range(5):
                sess.run(model.train)
            assert sess.run(model.w) == expected


def test_a_loop_that_does_not_hear_the_stop_is_saved_beside_until_it_ends(tmp_path: Path) -> None:
    model = Model(tmp_path, save_model_secs=600)
    with model.sv.managed_session() as sess:
        sess.run(model.train)
        eventually(lambda: model.sv.report.saves == 1)
        model.sv.request_stop()
        eventually(lambda: model.sv.report.saves == 2, timeout=30)
        assert not manifests(tmp_path)["model.ckpt-1"].consistent
        sess.run(model.train)
    found = manifests(tmp_path)
    assert found["model.ckpt-2"].consistent
    assert model.sv.report.exit_status == 0


@pytest.mark.parametrize("logdir", ["gs://bucket/run", "s3://bucket/run", "hdfs:///run"])
def test_a_logdir_that_is_not_local_is_refused(logdir: str) -> None:
    with pytest.raises(ValueError, match="use a local or mounted directory"):
        Model(logdir)


def test_a_file_url_is_local(tmp_path: Path) -> None:
    Model(f"file://{tmp_path}/run").run(1)
    assert (tmp_path / "run" / "model.ckpt-1.index").exists()


@pytest.mark.parametrize("name", ["run[lr=0.1]", "what?", "all*"])
def test_a_logdir_that_tensorflow_takes_for_a_pattern_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="for a pattern"):
        Model(tmp_path / name)


def test_a_session_that_was_closed_first_is_an_error_that_says_so(tmp_path: Path) -> None:
    model = Model(tmp_path)
    sess = model.sv.prepare_or_wait_for_session()
    sess.run(model.train)
    sess.close()
    with pytest.raises(SessionStateError, match="the last step could not be saved"):
        model.sv.stop()


def test_a_thread_that_works_has_its_grace_period(tmp_path: Path) -> None:
    model, done = Model(tmp_path), []

    def evaluate(sess: Any) -> None:
        model.sv.coord.wait_for_stop()
        time.sleep(1.0)  # longer than what a blocked thread is given
        done.append(float(sess.run(model.w)))

    with model.sv.managed_session() as sess:
        model.sv.loop(None, evaluate, (sess,))
        sess.run(model.train)
    assert done == [1.0]
    assert model.sv.report.errors == []


def test_a_thread_that_is_blocked_costs_no_grace_period(tmp_path: Path) -> None:
    model = Model(tmp_path, stop_grace_secs=100)
    clock = SystemClock()
    with model.sv.managed_session() as sess:
        model.sv.loop(None, lambda: sess.run(model.blocked))
        sess.run(model.train)
        began = clock.monotonic()
    assert clock.monotonic() - began < 50
    assert model.sv.report.errors == []
    assert model.sv.report.stragglers == {}


def test_an_evaluator_needs_no_lease(tmp_path: Path) -> None:
    trainer = Model(tmp_path)
    with trainer.sv.managed_session() as sess:
        sess.run(trainer.train)
        eventually(lambda: trainer.sv.report.saves == 1)
        reader = Model(tmp_path, save_model_secs=0)
        with reader.sv.managed_session(start_standard_services=False) as other:
            assert other.run(reader.w) == 0.0
        with pytest.raises(LeaseHeldError):
            Model(tmp_path).run(1)


def test_a_program_may_initialise_inside_of_the_block(tmp_path: Path) -> None:
    model = Model(tmp_path, init_op=None, ready_op=None, init_fn=lambda sess: None, local_init_op=None)
    with model.sv.managed_session(start_standard_services=False) as sess:
        with model.graph.as_default():
            sess.run([model.w.initializer, model.step.initializer])
        sess.run(model.train)


def left_over(coord: Coordinator, release: threading.Event) -> threading.Thread:
    thread = threading.Thread(target=release.wait)
    thread.start()
    coord.register_thread(thread)
    return thread


def test_threads_of_an_earlier_round_are_known_by_themselves() -> None:
    """Not by their number, which the system gives to another thread when one has ended."""
    coord, release = Coordinator(), threading.Event()
    old = left_over(coord, release)
    coord.request_stop()
    coord.clear_stop()
    assert coord.has_earlier_rounds
    release.set()
    old.join()
    told: list[bool] = []
    for _ in range(20):
        thread = threading.Thread(target=lambda: told.append(coord.should_stop()))
        thread.start()
        thread.join()
    assert told == [False] * 20


def test_a_graph_under_the_neutral_supervisor_goes_on_by_steps(tmp_path: Path) -> None:
    with tf.Graph().as_default():
        step = v1.train.get_or_create_global_step()
        train = v1.assign_add(step, 1)
        sv = Supervisor(GraphBackend(), tmp_path, store=BundleStore(tmp_path), save_every=EverySteps(2))
        with sv.managed_session() as sess:
            while not sv.should_stop() and sv.global_step < 5:
                sess.run(train)
    assert [checkpoint.step for checkpoint in BundleStore(tmp_path).checkpoints()] == [0, 2, 4, 5]
