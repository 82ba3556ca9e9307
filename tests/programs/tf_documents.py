"""The programs of TensorFlow's documentation of its Supervisor, over the drop-in: one after the other, each run twice.

The first run trains from the beginning, and the second one goes on from the newest checkpoint. Says a line of JSON for
each program that did what its document says.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
from tf_modes import enter, global_step, say, v1, variable

from supervise_tf import SessionManager, Supervisor

STEPS = 20


class Network:
    """A line fitted to points: loss, training op and summary, in the default graph."""

    def __init__(self, kind: str, points: tf.Tensor | None = None) -> None:
        if points is None:
            points = tf.constant(np.linspace(-1, 1, 32, dtype=np.float32))
        self.step = global_step(kind)
        self.w = variable("w", 0.0, kind)
        self.b = variable("b", 1.0, kind)
        self.loss = tf.reduce_mean(tf.square(self.w * points + self.b - (3.0 * points - 2.0)))
        optimizer = v1.train.MomentumOptimizer(0.05, 0.5)
        self.train = optimizer.minimize(self.loss, global_step=self.step)
        self.summary = v1.summary.scalar("loss", self.loss)


def events_in(logdir: str) -> dict[str, list[int]]:
    """The steps of all scalars, by tag, as TensorBoard sees them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(logdir)
    accumulator.Reload()
    return {tag: [event.step for event in accumulator.Scalars(tag)] for tag in accumulator.Tags()["scalars"]}


def session_logs_in(logdir: str) -> list[str]:
    """START, CHECKPOINT and STOP in the order in which they were written."""
    files = sorted(Path(logdir).glob("events.out.tfevents.*"), key=lambda path: path.stat().st_mtime_ns)
    names = v1.SessionLog.SessionStatus.Name
    return [
        names(event.session_log.status)
        for file in files
        for event in v1.train.summary_iterator(str(file))
        if event.WhichOneof("what") == "session_log"
    ]


def newest(logdir: str) -> int:
    path = tf.train.latest_checkpoint(logdir)
    assert path is not None
    assert tf.train.load_variable(path, "global_step") == int(path.rpartition("-")[2])
    return int(path.rpartition("-")[2])


# ---- the programs


def single_program(logdir: str, kind: str, begun: int) -> None:
    with tf.Graph().as_default():
        net = Network(kind)
        sv = Supervisor(logdir=logdir)
        with sv.managed_session("") as sess:
            assert sess.run(net.step) == begun
            first = sess.run(net.loss)
            while not sv.should_stop():
                sess.run(net.train)
                if sess.run(net.step) == begun + STEPS:
                    break
            assert sess.run(net.loss) < first
    assert newest(logdir) == begun + STEPS
    assert events_in(logdir)["loss"][0] == 0
    logs = session_logs_in(logdir)
    assert logs[0] == "START"
    assert logs[-1] == "STOP"
    assert "CHECKPOINT" in logs
    assert Path(logdir, "graph.pbtxt").exists()


def default_graph(logdir: str, kind: str, begun: int) -> None:
    """As programs of TensorFlow 1 are mostly written: in the graph that is there."""
    if tf.executing_eagerly():
        with np.testing.assert_raises_regex(RuntimeError, "eager"):
            Supervisor(logdir=logdir)
        return single_program(logdir, kind, begun)
    v1.reset_default_graph()
    net = Network(kind)
    sv = Supervisor(logdir=logdir)
    with sv.managed_session() as sess:
        for _ in range(STEPS):
            if sv.should_stop():
                break
            sess.run(net.train)
    v1.reset_default_graph()
    assert newest(logdir) == begun + STEPS
    return None


def free_address() -> str:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return f"localhost:{found.getsockname()[1]}"


_cluster: list[Any] = []


def cluster() -> tuple[Any, list[Any]]:
    """One parameter server and two workers, all in this process; started once."""
    if not _cluster:
        spec = tf.train.ClusterSpec({"ps": [free_address()], "worker": [free_address(), free_address()]})
        config = v1.ConfigProto(device_count={"GPU": 0})
        servers = [
            tf.distribute.Server(spec, job_name=job, task_index=task, config=config)
            for job, task in (("ps", 0), ("worker", 0), ("worker", 1))
        ]
        _cluster.extend([spec, servers])
    return _cluster[0], _cluster[1]


def chief_and_worker(logdir: str, kind: str, begun: int) -> None:
    spec, servers = cluster()
    trained = threading.Event()
    failed: list[BaseException] = []

    def replica(task_index: int) -> None:
        is_chief = task_index == 0
        server = servers[1 + task_index]
        with tf.Graph().as_default(), v1.device(v1.train.replica_device_setter(cluster=spec)):
            net = Network(kind)
            sv = Supervisor(logdir=logdir, is_chief=is_chief, recovery_wait_secs=1)
            with sv.managed_session(server.target) as sess:
                if is_chief:
                    while not sv.should_stop() and sess.run(net.step) < begun + STEPS:
                        sess.run(net.train)
                    assert trained.wait(60)
                else:
                    for _ in range(5):
                        assert not sv.should_stop()
                        sess.run(net.train)
                    trained.set()
            assert (sv.summary_writer is None) == (not is_chief)

    def worker() -> None:
        try:
            replica(1)
        except BaseException as error:
            failed.append(error)
            trained.set()

    thread = threading.Thread(target=worker)
    thread.start()
    replica(0)
    thread.join(60)
    assert not failed, failed
    assert newest(logdir) >= begun + STEPS


def additional_services(logdir: str, kind: str, begun: int) -> None:
    printed: list[float] = []
    enough = threading.Event()
    with tf.Graph().as_default():
        net = Network(kind)

        def print_loss(sess: Any) -> None:
            printed.append(float(sess.run(net.loss)))
            enough.set()

        sv = Supervisor(logdir=logdir)
        with sv.managed_session() as sess:
            thread = sv.loop(60, print_loss, (sess,))
            while not sv.should_stop():
                if sess.run(net.step) == begun + STEPS:
                    assert enough.wait(60)
                    sv.request_stop()
                else:
                    sess.run(net.train)
    assert len(printed) == 1
    assert not thread.is_alive()


def summaries_by_hand(logdir: str, kind: str, begun: int) -> None:
    is_chief = True
    with tf.Graph().as_default():
        net = Network(kind)
        sv = Supervisor(logdir=logdir, is_chief=is_chief, summary_op=None)
        with sv.managed_session() as sess:
            for step in range(1000000):
                if sv.should_stop() or sess.run(net.step) == begun + STEPS:
                    break
                if is_chief and step % 10 == 0:
                    sv.summary_computed(sess, sess.run(net.summary))
                else:
                    sess.run(net.train)
    steps = events_in(logdir)["loss"]
    assert steps[-3:] == [begun, begun + 9, begun + 18]


def fewer_services(logdir: str, kind: str, begun: int) -> None:
    """Neither a Saver nor summaries; the program saves on its own."""
    with tf.Graph().as_default():
        net = Network(kind)
        own = v1.train.Saver()
        sv = Supervisor(logdir=logdir, summary_op=None, saver=None)
        with sv.managed_session() as sess:
            assert sess.run(net.step) == 0
            if path := tf.train.latest_checkpoint(logdir):
                own.restore(sess, path)
            while not sv.should_stop() and sess.run(net.step) < begun + STEPS:
                sess.run(net.train)
            own.save(sess, os.path.join(logdir, "model.ckpt"), global_step=net.step)
    assert "loss" not in events_in(logdir)


def initialised_by_a_function(logdir: str, kind: str, begun: int) -> None:
    called: list[int] = []
    with tf.Graph().as_default():
        net = Network(kind)
        value = v1.placeholder(tf.float32, ())
        load = v1.assign(net.w, value)

        def init_fn(sess: Any) -> None:
            called.append(1)
            sess.run(load.op if hasattr(load, "op") else load, {value: 7.0})

        sv = Supervisor(logdir=logdir, init_fn=init_fn)
        with sv.managed_session() as sess:
            assert (sess.run(net.w) == 7.0) == (begun == 0)
            while not sv.should_stop() and sess.run(net.step) < begun + STEPS:
                sess.run(net.train)
    assert len(called) == (begun == 0)  # what is restored is not initialised


def initialised_locally(logdir: str, kind: str, begun: int) -> None:
    with tf.Graph().as_default():
        net = Network(kind)
        collections = [v1.GraphKeys.LOCAL_VARIABLES]
        local = v1.get_variable("mine", initializer=tf.constant(5), collections=collections, trainable=False)
        with tf.control_dependencies([local.initializer]):
            local_init_op = tf.group(v1.assign_add(local, 1))
        sv = Supervisor(logdir=logdir, local_init_op=local_init_op)
        with sv.managed_session() as sess:
            assert sess.run(local) == 6  # for every session, restored or not
            while not sv.should_stop() and sess.run(net.step) < begun + STEPS:
                sess.run(net.train)


def session_manager_alone(logdir: str, kind: str, begun: int) -> None:
    with tf.Graph().as_default():
        net = Network(kind)
        saver = v1.train.Saver()
        init = v1.global_variables_initializer()
        manager = SessionManager(ready_op=v1.report_uninitialized_variables())
        sess, initialised = manager.recover_session("", saver=saver, checkpoint_dir=logdir)
        assert initialised == (begun > 0)
        if not initialised:
            sess.run(init)
        assert sess.run(net.step) == begun
        for _ in range(STEPS - 5):
            sess.run(net.train)
        saver.save(sess, os.path.join(logdir, "model.ckpt"), global_step=net.step)
        sess.close()
        sess = manager.prepare_session("", init_op=init, saver=saver, checkpoint_dir=logdir)
        assert sess.run(net.step) == begun + STEPS - 5
        sess.close()
        given = SessionManager(ready_op=v1.report_uninitialized_variables())
        sv = Supervisor(logdir=logdir, session_manager=given, saver=saver)
        with sv.managed_session() as sess:
            for _ in range(5):
                assert not sv.should_stop()
                sess.run(net.train)


def queue_runners(logdir: str, kind: str, begun: int) -> None:
    with tf.Graph().as_default():
        items = v1.train.range_input_producer(STEPS * 4, num_epochs=1, shuffle=False)
        points = tf.cast(v1.train.batch([items.dequeue()], 4), tf.float32) / (STEPS * 4)
        net = Network(kind, points)
        sv = Supervisor(logdir=logdir, summary_op=None)
        with sv.managed_session() as sess:
            while not sv.should_stop():
                sess.run(net.train)
    assert sv.report.errors == []


PROGRAMS: list[Callable[[str, str, int], None]] = [
    single_program, default_graph, additional_services, summaries_by_hand, fewer_services, initialised_by_a_function,
    initialised_locally, session_manager_alone, queue_runners, chief_and_worker,
]  # fmt: skip


def main() -> None:
    base, mode, kind = sys.argv[1:4]
    enter(mode)
    for program in PROGRAMS:
        logdir = os.path.join(base, program.__name__)
        os.mkdir(logdir)
        program(logdir, kind, 0)
        reached = newest(logdir)
        assert reached >= STEPS, reached
        program(logdir, kind, reached)
        assert newest(logdir) >= reached + STEPS
        say(program=program.__name__, step=newest(logdir))
    say(done=True)


if __name__ == "__main__":
    main()
