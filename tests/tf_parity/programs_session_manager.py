"""What SessionManager does, seen from a program; test_parity_session_manager.py compares."""

from __future__ import annotations

import contextlib
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import tensorflow as tf
from parity import Classes, main, outcome, scenario

v1 = tf.compat.v1


def variable(name: str, value: float = 0.0, local: bool = False) -> Any:
    collections = [v1.GraphKeys.LOCAL_VARIABLES] if local else None
    return v1.get_variable(name, initializer=tf.constant(value), collections=collections)


def values(session: Any, *fetched: Any) -> list[float]:
    return [float(value) for value in session.run(list(fetched))]


def initialise_all() -> Any:
    return v1.global_variables_initializer()


def save(directory: Path, weight: Any, *steps: int, saver: Any = None) -> Any:
    """Save the weight as 10 x step at each of these steps, as TensorFlow does."""
    saver = saver or v1.train.Saver([weight])
    with v1.Session() as session:
        session.run(weight.initializer)
        for step in steps:
            weight.load(10.0 * step, session)
            saver.save(session, str(directory / "model.ckpt"), global_step=step)
    return saver


@contextlib.contextmanager
def counted_sessions() -> Iterator[Callable[[], dict[str, int]]]:
    """How many sessions were made in the block, and how many of them were closed."""
    from tensorflow.python.client import session as module

    made: list[Any] = []
    closed: set[int] = set()
    make, close = module.BaseSession.__init__, module.BaseSession.close

    def counting_make(self: Any, *args: Any, **kwargs: Any) -> None:
        make(self, *args, **kwargs)
        made.append(self)

    def counting_close(self: Any) -> None:
        closed.add(id(self))
        close(self)

    with mock.patch.multiple(module.BaseSession, __init__=counting_make, close=counting_close):
        yield lambda: {"made": len(made), "closed": sum(id(session) in closed for session in made)}


def prepared(manager: Any, read: Any = (), **given: Any) -> dict[str, Any]:
    """What ``prepare_session`` comes to, and the sessions made and closed meanwhile."""
    with counted_sessions() as count:
        seen = outcome(lambda: manager.prepare_session("", **given))
        sessions = count()
    if "value" in seen:
        with seen["value"] as session:
            seen["value"] = values(session, *read) if read else True
    return {**seen, "sessions": sessions}


# ---- 3.1 to 3.4


@scenario
def constructor(classes: Classes, directory: Path) -> Any:
    ready = v1.report_uninitialized_variables()
    refused = outcome(lambda: classes.SessionManager(ready_for_local_init_op=ready))
    allowed = outcome(lambda: classes.SessionManager(tf.no_op(), ready, ready) and None)
    session = classes.SessionManager().prepare_session("", init_op=tf.no_op())
    of_default = session.graph is v1.get_default_graph()
    session.close()
    other = tf.Graph()
    with other.as_default():
        op = tf.no_op()
    session = classes.SessionManager(graph=other).prepare_session("", init_op=op)
    of_other = session.graph is other
    session.close()
    return [refused, allowed, of_default, of_other]


@scenario
def order_of_preparation(classes: Classes, directory: Path) -> Any:
    fed = v1.placeholder(tf.float32, [])
    weight = variable("weight")
    seen: list[str] = []

    def note(what: str) -> Any:
        return v1.py_func(lambda: (seen.append(what), 0.0)[1], [], tf.float64, stateful=True)

    init_op = tf.group(weight.assign(fed), note("init_op"))
    local_init_op, ready = note("local_init_op"), note("ready_op")
    with tf.control_dependencies([ready]):
        ready_op = tf.constant([], tf.string) + tf.constant([], tf.string)
    with tf.control_dependencies([note("ready_for_local_init_op")]):
        ready_for_local = tf.constant([], tf.string) + tf.constant([], tf.string)
    manager = classes.SessionManager(local_init_op, ready_op, ready_for_local)

    def init_fn(session: Any) -> None:
        seen.append(f"init_fn of {type(session).__name__} with {values(session, weight)}")

    result = prepared(manager, [weight], init_op=init_op, init_feed_dict={fed: 3.0}, init_fn=init_fn)
    return [seen, result]


@scenario
def nothing_to_initialise_with(classes: Classes, directory: Path) -> Any:
    variable("weight")
    return [
        prepared(classes.SessionManager()),
        prepared(classes.SessionManager(local_init_op=tf.no_op())),
        prepared(classes.SessionManager(), init_fn=lambda session: None),
        prepared(classes.SessionManager(), init_op=tf.no_op()),
    ]


@scenario
def restored_is_not_initialised(classes: Classes, directory: Path) -> Any:
    weight = variable("weight")
    saver = save(directory, weight, 1, 2)
    called: list[int] = []
    result = prepared(
        classes.SessionManager(ready_op=v1.report_uninitialized_variables()), [weight],
        init_op=weight.initializer, init_fn=lambda session: called.append(1), saver=saver,
        checkpoint_dir=str(directory),
    )  # fmt: skip
    return [result, called]


@scenario
def variables_that_the_saver_does_not_cover(classes: Classes, directory: Path) -> Any:
    weight = variable("weight")
    variable("uncovered")
    manager = classes.SessionManager(ready_op=v1.report_uninitialized_variables())
    saver = save(directory, weight, 1)
    return prepared(manager, init_op=initialise_all(), saver=saver, checkpoint_dir=str(directory))


@scenario
def what_a_restore_needs(classes: Classes, directory: Path) -> Any:
    weight = variable("weight")
    saver = save(directory, weight, 1)
    manager, init = classes.SessionManager(), initialise_all()
    empty = directory / "empty"
    empty.mkdir()
    absent = directory / "absent"
    return [
        prepared(manager, [weight], init_op=init, checkpoint_dir=str(directory)),
        prepared(manager, [weight], init_op=init, saver=saver),
        prepared(manager, [weight], init_op=init, saver=saver, checkpoint_dir=str(empty)),
        prepared(manager, [weight], init_op=init, saver=saver, checkpoint_dir=str(absent)),
        prepared(manager, [weight], init_op=init, saver=saver, checkpoint_dir=str(directory)),
        absent.exists(),
        sorted(path.name for path in directory.iterdir()),
    ]


# ---- 3.5, 3.6


@scenario
def directory_and_file(classes: Classes, directory: Path) -> Any:
    weight = variable("weight")
    saver, manager = save(directory, weight, 1, 2), classes.SessionManager()
    both = {"checkpoint_dir": str(directory), "checkpoint_filename_with_path": str(directory / "model.ckpt-1")}
    with counted_sessions() as count:
        recovered = outcome(lambda: manager.recover_session("", saver=saver, **both))
        sessions = count()
    return [prepared(manager, saver=saver, **both), {**recovered, "sessions": sessions}]


@scenario
def one_file(classes: Classes, directory: Path) -> Any:
    weight = variable("weight")
    save(directory, weight, 1, 2)
    saver, manager = v1.train.Saver([weight]), classes.SessionManager()
    (directory / "checkpoint").unlink()
    given = str(directory / "model.ckpt-1")
    there = prepared(manager, [weight], saver=saver, checkpoint_filename_with_path=given)
    missing = prepared(manager, saver=saver, checkpoint_filename_with_path=str(directory / "model.ckpt-9"))
    session, ready = manager.recover_session("", saver=saver, checkpoint_filename_with_path=given)
    recovered = [values(session, weight), ready]
    session.close()
    return [there, missing, recovered, list(saver.last_checkpoints)]


@scenario
def the_saver_goes_on_counting(classes: Classes, directory: Path) -> Any:
    weight = variable("weight")
    save(directory, weight, 1, 2, 3, saver=v1.train.Saver([weight], max_to_keep=3))
    for gone in directory.glob("model.ckpt-1.*"):
        gone.unlink()
    seen = []
    for call in ("prepare_session", "recover_session"):
        saver = v1.train.Saver([weight], max_to_keep=3)
        result = getattr(classes.SessionManager(), call)("", saver=saver, checkpoint_dir=str(directory))
        session = result[0] if call == "recover_session" else result
        seen.append([Path(path).name for path in saver.last_checkpoints])
        for step in (4, 5):
            saver.save(session, str(directory / "model.ckpt"), global_step=step)
        session.close()
        seen.append(sorted(path.name for path in directory.glob("*.index")))
    return seen


# ---- 3.7, 3.8: waiting for a checkpoint


@scenario
def a_checkpoint_that_comes_later(classes: Classes, directory: Path) -> Any:
    weight = variable("weight")
    saver = v1.train.Saver([weight])
    manager, graph = classes.SessionManager(recovery_wait_secs=0.05), v1.get_default_graph()

    def save_later() -> None:
        time.sleep(0.2)
        with graph.as_default():
            save(directory, weight, 4, saver=later)

    later = v1.train.Saver([weight])
    chief = threading.Thread(target=save_later)
    init = initialise_all()
    chief.start()
    result = prepared(
        manager, [weight], init_op=init, saver=saver, checkpoint_dir=str(directory), wait_for_checkpoint=True,
        max_wait_secs=60,
    )  # fmt: skip
    chief.join()
    return [result.get("value"), result.get("error")]


@scenario
def a_wait_that_runs_out(classes: Classes, directory: Path) -> Any:
    weight = variable("weight")
    saver = v1.train.Saver([weight])
    given = {"saver": saver, "checkpoint_dir": str(directory), "wait_for_checkpoint": True, "max_wait_secs": 0.2}
    began = time.monotonic()
    result = prepared(classes.SessionManager(recovery_wait_secs=1.0), [weight], init_op=initialise_all(), **given)
    took = time.monotonic() - began
    with counted_sessions() as count:
        recovered = outcome(lambda: classes.SessionManager(recovery_wait_secs=0.1).recover_session("", **given)[1])
        sessions = count()
    return {"prepared": result, "took": took, "recovered": recovered, "sessions": sessions}


# ---- 3.9 to 3.11: state files and damage


def _garbage(directory: Path) -> None:
    (directory / "checkpoint").write_text("no state { at all")


def _binary_garbage(directory: Path) -> None:
    (directory / "checkpoint").write_bytes(b"\xff\xfe no state { at all")


def _empty_state(directory: Path) -> None:
    (directory / "checkpoint").write_bytes(b"")


def _no_state(directory: Path) -> None:
    (directory / "checkpoint").unlink()


def _newest_is_gone(directory: Path) -> None:
    for path in directory.glob("model.ckpt-2.*"):
        path.unlink()


def _newest_is_cut(directory: Path) -> None:
    (path,) = directory.glob("model.ckpt-2.data-*")
    path.write_bytes(path.read_bytes()[:-1])


@scenario
def damage(classes: Classes, directory: Path) -> Any:
    weight = variable("weight")
    init, seen = initialise_all(), {}
    for harm in (_garbage, _binary_garbage, _empty_state, _no_state, _newest_is_gone, _newest_is_cut):
        logdir = directory / harm.__name__
        saver = save(logdir, weight, 1, 2)
        harm(logdir)
        seen[harm.__name__.strip("_")] = prepared(
            classes.SessionManager(), [weight], init_op=init, saver=saver, checkpoint_dir=str(logdir)
        )
    return seen


@scenario
def all_are_damaged(classes: Classes, directory: Path) -> Any:
    weight = variable("weight")
    saver, init = save(directory, weight, 1, 2), initialise_all()
    for path in directory.glob("*.data-*"):
        path.write_bytes(path.read_bytes()[:-1])
    return prepared(classes.SessionManager(), [weight], init_op=init, saver=saver, checkpoint_dir=str(directory))


@scenario
def a_directory_that_was_copied(classes: Classes, directory: Path) -> Any:
    weight = variable("weight")
    original, copy = directory / "original", directory / "copy"
    saver = save(original, weight, 1)
    shutil.copytree(original, copy)
    save(original, weight, 1, saver=v1.train.Saver([weight]))
    with v1.Session() as session:
        session.run(weight.initializer)
        weight.load(77.0, session)
        v1.train.Saver([weight]).save(session, str(original / "model.ckpt"), global_step=1)
    manager, init = classes.SessionManager(), initialise_all()
    copied = prepared(manager, [weight], init_op=init, saver=saver, checkpoint_dir=str(copy))
    shutil.rmtree(original)
    renamed = prepared(manager, [weight], init_op=init, saver=saver, checkpoint_dir=str(copy))
    return [copied, renamed]


@scenario
def another_model(classes: Classes, directory: Path) -> Any:
    with tf.Graph().as_default():
        save(directory, variable("weight"), 1)
    seen = []
    for name, shape in (("other", []), ("weight", [3])):
        with tf.Graph().as_default():
            weight = v1.get_variable(name, shape, initializer=v1.zeros_initializer())
            given = {"init_op": weight.initializer, "saver": v1.train.Saver(), "checkpoint_dir": str(directory)}
            seen.append(prepared(classes.SessionManager(), **given))
    return [*seen, sorted(path.name for path in directory.iterdir())]


# ---- 3.12 to 3.16: readiness


@scenario
def local_initialisation(classes: Classes, directory: Path) -> Any:
    weight, fed = variable("weight", 5.0), v1.placeholder(tf.float32, [])
    local = variable("local", local=True)
    init, names = initialise_all(), v1.report_uninitialized_variables([weight])
    local_init = local.assign(fed + weight)
    options = v1.RunOptions(trace_level=v1.RunOptions.NO_TRACE)
    manager = classes.SessionManager(
        local_init, v1.report_uninitialized_variables(), names, local_init_run_options=options,
        local_init_feed_dict={fed: 2.0},
    )  # fmt: skip
    unready = classes.SessionManager(local_init, None, names, local_init_feed_dict={fed: 2.0})
    without = classes.SessionManager(None, v1.report_uninitialized_variables([weight]))

    def named_init_fn(session: Any) -> None:
        return None

    return [
        prepared(manager, [weight, local], init_op=init),
        prepared(unready, init_op=tf.no_op(name="an_init_op"), init_fn=named_init_fn),
        prepared(without, [weight], init_op=init),
    ]


@scenario
def what_counts_as_ready(classes: Classes, directory: Path) -> Any:
    tensors = {
        "nothing": tf.no_op(),
        "no names": tf.constant([], tf.string),
        "names": tf.constant(["a", "b"]),
        "int32": tf.constant([1, 2, 3]),
        "scalar int32": tf.constant(0),
        "empty floats": tf.constant([], tf.float32),
        "empty matrix": tf.constant([], tf.string, shape=[0, 4]),
        "unicode": tf.constant(["größe"]),
    }
    init = tf.no_op()
    return {name: prepared(classes.SessionManager(ready_op=op), init_op=init) for name, op in tensors.items()}


@scenario
def ready_ops_of_other_types(classes: Classes, directory: Path) -> Any:
    init = tf.no_op()
    ops = {"float": tf.constant([1.5]), "int64": tf.constant([1], tf.int64)}
    return {name: prepared(classes.SessionManager(ready_op=op), init_op=init) for name, op in ops.items()}


@scenario
def failed_preconditions(classes: Classes, directory: Path) -> Any:
    weight = variable("weight")
    init, nothing = weight.initializer, tf.no_op()
    of_weight, local = weight.read_value()[tf.newaxis][:0], variable("local", local=True)
    using_it = local.assign(weight.read_value())
    numbers = v1.data.make_initializable_iterator(tf.data.Dataset.from_tensors(tf.constant(["a"]))).get_next()
    return {
        "reads, initialised": prepared(classes.SessionManager(ready_op=of_weight), init_op=init),
        "reads, uninitialised": prepared(classes.SessionManager(ready_op=of_weight), init_op=nothing),
        "of another kind": prepared(classes.SessionManager(ready_op=numbers), init_op=nothing),
        "before local init": prepared(classes.SessionManager(nothing, None, of_weight), init_op=nothing),
        "in local init": prepared(classes.SessionManager(local_init_op=using_it), init_op=nothing),
    }


@scenario
def not_ready_at_the_end(classes: Classes, directory: Path) -> Any:
    weight = variable("weight")
    variable("forgotten")
    manager = classes.SessionManager(tf.no_op(name="a_local_init_op"), v1.report_uninitialized_variables())
    init_op = weight.assign(1.0, name="an_init_op").op

    def named_init_fn(session: Any) -> None:
        return None

    return prepared(manager, init_op=init_op, init_fn=named_init_fn)


@scenario
def recovering(classes: Classes, directory: Path) -> Any:
    weight = variable("weight")
    local = variable("local", 4.0, local=True)
    saver = save(directory / "full", weight, 1)
    (directory / "empty").mkdir()
    ready, init_local, unready = v1.report_uninitialized_variables(), local.initializer, tf.constant(["never"])
    managers = {
        "ready": classes.SessionManager(init_local, ready),
        "not ready for local init": classes.SessionManager(init_local, ready, unready),
        "not ready": classes.SessionManager(None, ready),
    }
    seen: dict[str, Any] = {}
    for name, manager in managers.items():
        for logdir in ("full", "empty"):
            session, is_ready = manager.recover_session("", saver=saver, checkpoint_dir=str(directory / logdir))
            read = [outcome(lambda: values(session, what)) for what in (weight, local)]  # noqa: B023 - called at once
            session.close()
            seen[f"{name}, {logdir}"] = [is_ready, *(what.get("value", what.get("error")) for what in read)]
    with manager.recover_session("")[0] as session:
        seen["without saver"] = type(session).__name__
    return seen


# ---- 3.17 to 3.23: waiting for somebody else, and what is left


@contextlib.contextmanager
def server() -> Iterator[str]:
    """A server in this process; sessions on it share their variables."""
    yield tf.distribute.Server.create_local_server().target


def noted(ready: Any, note: Callable[[], object]) -> Any:
    """A ready op that calls something whenever it has been computed."""
    with tf.control_dependencies([ready]):
        told = v1.py_func(lambda: (note(), 0.0)[1], [], tf.float64, stateful=True)
    with tf.control_dependencies([told]):
        return tf.identity(ready)


@scenario
def waiting_for_the_chief(classes: Classes, directory: Path) -> Any:
    weight = variable("weight")
    local = variable("local", 4.0, local=True)
    ready, init = v1.report_uninitialized_variables([weight, local]), weight.assign(6.0)
    looks = threading.Semaphore(0)
    ready_for_local = noted(v1.report_uninitialized_variables([weight]), looks.release)
    manager = classes.SessionManager(local.initializer, ready, ready_for_local, None, 0.05)
    with server() as target, counted_sessions() as count:
        got: list[Any] = []

        def wait() -> None:
            got.append(outcome(lambda: manager.wait_for_session(target, max_wait_secs=None)))

        worker = threading.Thread(target=wait)
        worker.start()
        waits = looks.acquire(timeout=60)
        at_first = count()
        waits &= all(looks.acquire(timeout=60) for _ in range(3))
        before = count()
        with v1.Session(target) as chief:
            chief.run(init)
            worker.join(60)
            session = got[0]["value"]
            seen = [waits, values(session, weight, local), type(session).__name__]
            session.close()
    made = before["made"] - at_first["made"]
    return {"seen": seen, "made while waiting": made, "left open": before["made"] - before["closed"]}


@scenario
def waiting_in_vain(classes: Classes, directory: Path) -> Any:
    variable("weight")
    ready = v1.report_uninitialized_variables()
    seen: dict[str, Any] = {}
    for name, poll, limit in (("polls", 0.05, 0.3), ("one poll is longer than the limit", 5.0, 0.5)):
        manager = classes.SessionManager(ready_op=ready, recovery_wait_secs=poll)
        began = time.monotonic()
        with counted_sessions() as count:
            result = outcome(lambda: manager.wait_for_session("", max_wait_secs=limit))  # noqa: B023 - called at once
            sessions = count()
        seen[name] = {**result, "took": time.monotonic() - began, "open": sessions["made"] - sessions["closed"]}
    return seen


@scenario
def ready_soon_after_a_poll(classes: Classes, directory: Path) -> Any:
    weight = variable("weight")
    looked = threading.Event()
    ready, init = noted(v1.report_uninitialized_variables(), looked.set), weight.initializer
    manager = classes.SessionManager(ready_op=ready, recovery_wait_secs=1.5)
    became: list[float] = []
    with server() as target, v1.Session(target) as chief:

        def initialise() -> None:
            looked.wait(60)
            became.append(time.monotonic())
            chief.run(init)

        later = threading.Thread(target=initialise)
        later.start()
        session = manager.wait_for_session(target, max_wait_secs=60)
        took = time.monotonic() - became[0]
        later.join()
        session.close()
    return took


@scenario
def errors_while_bringing_up(classes: Classes, directory: Path) -> Any:
    def fail() -> float:
        raise ValueError("of the program")

    op = v1.py_func(fail, [], tf.float64, stateful=True)
    nothing = tf.no_op()

    def failing_init_fn(session: Any) -> None:
        raise KeyError("init_fn")

    seen = {
        "init_op": prepared(classes.SessionManager(), init_op=op),
        "init_fn": prepared(classes.SessionManager(), init_op=nothing, init_fn=failing_init_fn),
        "local_init_op": prepared(classes.SessionManager(op), init_op=nothing),
        "ready_op": prepared(classes.SessionManager(ready_op=op), init_op=nothing),
        "not ready": prepared(classes.SessionManager(ready_op=tf.constant(["a"])), init_op=nothing),
    }
    with counted_sessions() as count:
        waited = outcome(lambda: classes.SessionManager(ready_op=op).wait_for_session("", max_wait_secs=60))
        seen["waiting"] = {**waited, "sessions": count()}
    return seen


@scenario
def workers_during_init_fn(classes: Classes, directory: Path) -> Any:
    """The chief's ``init_fn`` has not ended when the worker gets its session."""
    weight = variable("weight")
    ready, init, pretrained = v1.report_uninitialized_variables(), weight.initializer, weight.assign(9.0)
    chief_manager, worker_manager = (classes.SessionManager(ready_op=ready, recovery_wait_secs=0.05) for _ in range(2))
    in_init_fn, go_on = threading.Event(), threading.Event()

    def init_fn(session: Any) -> None:
        in_init_fn.set()
        go_on.wait(60)
        session.run(pretrained)

    with server() as target:
        sessions: list[Any] = []
        chief = threading.Thread(
            target=lambda: sessions.append(chief_manager.prepare_session(target, init_op=init, init_fn=init_fn))
        )
        chief.start()
        in_init_fn.wait(60)
        with worker_manager.wait_for_session(target, max_wait_secs=60) as worker:
            early = values(worker, weight)
            go_on.set()
            chief.join(60)
            seen = [early, values(worker, weight)]
        sessions[0].close()
    return seen


@scenario
def saved_model_initialisers(classes: Classes, directory: Path) -> Any:
    weight, table = variable("weight"), variable("table")
    saver = save(directory, weight, 1)
    for initialiser in (weight.assign(100.0), table.assign(200.0)):
        v1.add_to_collection("saved_model_initializers", initialiser)
    manager = classes.SessionManager(ready_op=v1.report_uninitialized_variables())
    return [
        prepared(manager, [weight, table], saver=saver, checkpoint_dir=str(directory)),
        prepared(manager, [weight, table], saver=saver, checkpoint_filename_with_path=str(directory / "model.ckpt-1")),
    ]


if __name__ == "__main__":
    main()
