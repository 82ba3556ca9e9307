"""Sessions on a server: which tasks they see, how long they wait for those, and who makes a model that lives there."""

from __future__ import annotations

import os
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
tf = pytest.importorskip("tensorflow", reason="TensorFlow is not installed")

from supervise_core import SessionStateError, Supervisor  # noqa: E402
from supervise_core.staging import Staging  # noqa: E402
from supervise_core.testing.clock import eventually  # noqa: E402
from supervise_tf import BundleStore, GraphBackend  # noqa: E402
from supervise_tf import Supervisor as TFSupervisor  # noqa: E402
from supervise_tf.cluster import Call, tasks_named_in  # noqa: E402

v1 = tf.compat.v1
A_WHILE = 30.0
"""Seconds; what must not last for ever is over by then on any machine."""


@pytest.fixture(scope="module")
def unused() -> Iterator[str]:
    """An address where nobody listens."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{held.getsockname()[1]}"


@pytest.fixture(scope="module")
def server(unused: str) -> Any:
    """A parameter server in this process; the worker of its cluster is not there. Servers cannot be ended."""
    with socket.socket() as tried:
        tried.bind(("127.0.0.1", 0))
        own = f"127.0.0.1:{tried.getsockname()[1]}"
    return tf.distribute.Server({"ps": [own], "worker": [unused]}, job_name="ps", task_index=0)


@pytest.fixture
def master(server: Any) -> Iterator[str]:
    """Its target, with nothing left on it from before."""
    forget_all(server.target)
    yield server.target
    forget_all(server.target)


class Model:
    """A variable and a step on the parameter server, as one process sees them."""

    def __init__(self, worker_device: str = "/job:ps/task:0") -> None:
        with tf.Graph().as_default() as self.graph:
            setter = v1.train.replica_device_setter(ps_device="/job:ps/task:0", ps_tasks=1, worker_device=worker_device)
            with v1.device(setter):
                self.w = v1.get_variable("w", (), initializer=v1.zeros_initializer())
                self.step = v1.train.get_or_create_global_step()
                self.train = tf.group(v1.assign_add(self.w, 1.0), v1.assign_add(self.step, 1))
                self.broken = v1.assign(self.w, -1.0).op

    def supervisor(self, logdir: Path | None, **options: Any) -> TFSupervisor:
        with self.graph.as_default():
            return TFSupervisor(logdir=logdir, **{"summary_op": None, "save_summaries_secs": 0, **options})

    def run(self, master: str, logdir: Path | None, steps: int, unsaved: int = 0, **options: Any) -> int:
        """Train as the chief does, and further after its last checkpoint; the step that was begun with."""
        sv = self.supervisor(logdir, **options)
        with sv.managed_session(master) as sess:
            began = int(sess.run(self.step))
            for _ in range(steps):
                assert not sv.should_stop()
                sess.run(self.train)
        with v1.Session(master, graph=self.graph, config=only_local()) as sess:
            for _ in range(unsaved):
                sess.run(self.train)
        return began


def only_local() -> Any:
    return v1.ConfigProto(device_filters=["/job:ps"])


def forget(master: str, **variables: Any) -> None:
    """Have the parameter server lose these, by name and dtype, as if it had come back. ``Session.reset`` would wait for
    the worker that is not there."""
    with tf.Graph().as_default() as graph, tf.device("/job:ps/task:0"):
        for name, dtype in variables.items():
            handle = tf.raw_ops.VarHandleOp(dtype=dtype, shape=[], shared_name=name.replace("__", "/"))
            tf.raw_ops.DestroyResourceOp(resource=handle, ignore_lookup_error=True)
        gone = [op for op in graph.get_operations() if op.type == "DestroyResourceOp"]
    with v1.Session(master, graph=graph, config=only_local()) as sess:
        sess.run(gone)


def forget_all(master: str) -> None:
    forget(master, w=tf.float32, global_step=tf.int64, supervise_tf__announcement=tf.string)


def newest(logdir: Path) -> int:
    return max(int(index.stem.rpartition("-")[2]) for index in logdir.glob("model.ckpt-*.index"))


# ---- which tasks a session sees


def test_the_tasks_that_a_graph_names() -> None:
    @tf.function
    def inner(x: Any) -> Any:
        with tf.device("/job:ps/task:7"):
            return x + 1

    with tf.Graph().as_default() as graph:
        for device in ("/job:ps/task:0/device:CPU:0", "/job:worker", "/job:ps/replica:0/task:1", "/cpu:0", ""):
            with tf.device(device):
                tf.constant(0)
        inner(tf.constant(1))
    assert tasks_named_in(graph) == [("ps", 0), ("ps", 1), ("ps", 7), ("worker", None)]


def devices_of(backend: GraphBackend, master: str, config: Any = None) -> set[str]:
    assert backend.peers(master, config)
    session = backend.create_session(master, config)
    try:
        return {device.name.partition("/device")[0] for device in session.list_devices()}
    finally:
        backend.close_session(session)


def test_a_session_sees_the_masters_task_and_those_of_the_graph(master: str) -> None:
    """TensorFlow's own would wait for the worker, which is not there, for ever."""
    assert devices_of(GraphBackend(Model().graph), master) == {"/job:ps/replica:0/task:0"}


def test_the_filters_of_the_user_count_more(master: str) -> None:
    backend = GraphBackend(Model().graph)
    answer = backend.peers(master, v1.ConfigProto(device_filters=["/job:ps", "/job:worker/task:0"]))
    assert "no answer from /job:worker/task:0" in str(answer)
    backend = GraphBackend(Model("/job:worker/task:0").graph)
    assert devices_of(backend, master, only_local()) == {"/job:ps/replica:0/task:0"}
    config = v1.ConfigProto(operation_timeout_in_ms=12345)
    with pytest.raises(AssertionError):
        devices_of(backend, master, config)  # the graph names the worker
    assert config.device_filters == [], "the user's own is not changed"


def test_the_job_of_the_master_alone_means_its_own_task(master: str) -> None:
    with tf.Graph().as_default() as graph, tf.device("/job:ps"):
        tf.constant(0)
    assert devices_of(GraphBackend(graph), master) == {"/job:ps/replica:0/task:0"}


# ---- waiting


@pytest.mark.parametrize("is_chief", [True, False])
def test_a_task_that_does_not_answer_is_named_when_the_time_is_up(master: str, tmp_path: Path, is_chief: bool) -> None:
    sv = Model("/job:worker/task:0").supervisor(tmp_path, is_chief=is_chief)
    began = time.monotonic()
    with pytest.raises(tf.errors.DeadlineExceededError, match="no answer from /job:worker/task:0"):
        sv.prepare_or_wait_for_session(master, max_wait_secs=0.5)
    assert 0.5 <= time.monotonic() - began < A_WHILE


def test_a_master_that_does_not_answer_is_named(unused: str, tmp_path: Path) -> None:
    sv = Model().supervisor(tmp_path)
    with pytest.raises(tf.errors.OpError, match=f"no answer from the master grpc://{unused}"):
        sv.prepare_or_wait_for_session(f"grpc://{unused}", max_wait_secs=0.5)


def test_a_stop_ends_the_wait_for_a_task(master: str, tmp_path: Path) -> None:
    sv = Supervisor(GraphBackend(Model("/job:worker/task:0").graph), store=BundleStore(tmp_path), logdir=tmp_path)
    threading.Timer(0.3, sv.request_stop).start()
    with pytest.raises(SessionStateError, match="no answer from /job:worker/task:0"):
        sv.prepare_or_wait_for_session(master, max_wait_secs=A_WHILE)


def test_what_is_abandoned_is_discarded_when_it_comes() -> None:
    discarded: list[str] = []
    go = threading.Event()
    call = Call("test", lambda: go.wait(A_WHILE) and "late", discarded.append)
    assert not call.wait(0.01)
    call.abandon()
    go.set()
    eventually(lambda: discarded == ["late"])


# ---- a model that lives on a server


def test_a_chief_that_comes_back_goes_on_from_the_living_model(master: str, tmp_path: Path) -> None:
    assert Model().run(master, tmp_path, steps=3, unsaved=4) == 0
    assert newest(tmp_path) == 3
    assert Model().run(master, tmp_path, steps=2) == 7
    assert newest(tmp_path) == 9


def test_the_neutral_supervisor_does_so_too(master: str, tmp_path: Path) -> None:
    model = Model()
    for begins in (0, 5):
        sv = Supervisor(GraphBackend(model.graph), tmp_path)
        with sv.managed_session(master) as sess:
            assert sess.run(model.step) == begins
            for _ in range(5):
                assert not sv.should_stop()
                sess.run(model.train)
    assert sv.report.restored is None


def test_a_model_that_is_gone_is_restored(master: str, tmp_path: Path) -> None:
    Model().run(master, tmp_path, steps=3, unsaved=4)
    forget_all(master)
    assert Model().run(master, tmp_path, steps=1) == 3


def test_a_model_of_which_a_part_is_gone_is_restored(master: str, tmp_path: Path) -> None:
    Model().run(master, tmp_path, steps=3, unsaved=4)
    forget(master, w=tf.float32)
    assert Model().run(master, tmp_path, steps=1) == 3


def test_a_model_that_another_run_left_behind_is_not_gone_on_with(master: str, tmp_path: Path) -> None:
    Model().run(master, tmp_path / "one", steps=3)
    assert Model().run(master, tmp_path / "two", steps=2) == 0
    assert Model().run(master, tmp_path / "one", steps=0) == 3


def test_a_log_directory_that_was_removed_is_another_run(master: str, tmp_path: Path) -> None:
    Model().run(master, tmp_path / "run", steps=3)
    shutil.rmtree(tmp_path / "run")
    assert Model().run(master, tmp_path / "run", steps=2) == 0


def test_without_a_log_directory_the_living_model_is_all_there_is(master: str) -> None:
    Model().run(master, None, steps=3)
    assert Model().run(master, None, steps=1) == 3


def test_a_checkpoint_that_the_user_wants_counts_more(master: str, tmp_path: Path) -> None:
    for steps in (2, 3):
        Model().run(master, tmp_path, steps=steps)
    state = (tmp_path / "checkpoint").read_text()
    (tmp_path / "checkpoint").write_text('model_checkpoint_path: "model.ckpt-2"\n')
    assert "model.ckpt-5" in state
    assert Model().run(master, tmp_path, steps=1) == 2


def test_no_worker_goes_on_before_init_fn_has_ended(master: str, tmp_path: Path) -> None:
    """All variables have values by then."""
    worker, reasons = Model(), list[str]()

    def init_fn(sess: Any) -> None:
        sv = worker.supervisor(None, is_chief=False)
        with pytest.raises(tf.errors.DeadlineExceededError) as raised:
            sv.prepare_or_wait_for_session(master, max_wait_secs=0.3)
        reasons.append(str(raised.value))

    assert Model().run(master, tmp_path, steps=1, init_fn=init_fn) == 0
    assert "Variables not initialized: the announcement of the chief" in reasons[0]
    sv = worker.supervisor(None, is_chief=False)
    with sv.managed_session(master) as sess:
        assert sess.run(worker.step) == 1


def test_a_chief_that_failed_while_it_initialised_begins_anew(master: str, tmp_path: Path) -> None:
    model, ran = Model(), list[str]()

    def failing(sess: Any) -> None:
        sess.run(model.broken)
        raise ValueError("no pretrained model")

    with pytest.raises(ValueError, match="no pretrained model"):
        model.run(master, tmp_path, steps=1, init_fn=failing)
    model = Model()
    sv = model.supervisor(tmp_path, init_fn=lambda sess: ran.append("init_fn"))
    with sv.managed_session(master) as sess:
        assert sess.run(model.w) == 0
    assert ran == ["init_fn"]


def test_a_session_manager_of_tensorflow_announces_too(master: str, tmp_path: Path) -> None:
    model = Model()
    with model.graph.as_default():
        manager = v1.train.SessionManager(graph=model.graph, ready_op=v1.report_uninitialized_variables())
    with model.supervisor(tmp_path, session_manager=manager).managed_session(master, config=only_local()) as sess:
        sess.run(model.train)
    worker = Model()
    with worker.supervisor(None, is_chief=False).managed_session(master) as sess:
        assert sess.run(worker.step) == 1


def test_a_graph_of_one_process_has_no_announcement(tmp_path: Path) -> None:
    with tf.Graph().as_default() as graph:
        v1.train.get_or_create_global_step()
        before = {op.name for op in graph.get_operations()}
        sv = TFSupervisor(logdir=tmp_path)
    assert not any("supervise_tf" in op.name for op in graph.get_operations() if op.name not in before)
    with sv.managed_session():
        pass
    assert not (tmp_path / ".work" / "identity").exists()


def test_a_checkpoint_of_a_shared_model_is_not_called_mixed(master: str, tmp_path: Path) -> None:
    """Others train while it is taken: a step that comes in between is no exception there, but the rule."""
    model = Model()
    backend = GraphBackend(model.graph)
    session = backend.create_session(master)
    backend.init(session)
    saved: Any = backend._saved

    def fetch_and_train(among: Any) -> Any:
        values = saved.fetch(among)
        among.run(model.train)
        return values

    backend.__dict__["_saved"] = _Moving(saved, fetch_and_train)
    try:
        snapshot = backend.snapshot(session, Staging())
        assert (snapshot.step, snapshot.consistent) == (0, True)
    finally:
        backend.close_session(session)


class _Moving:
    """What a Saver saves, while somebody trains on."""

    def __init__(self, saved: Any, fetch: Callable[[Any], Any]) -> None:
        self._saved = saved
        self.fetch = fetch

    def __getattr__(self, name: str) -> Any:
        return getattr(self._saved, name)
