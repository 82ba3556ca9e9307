"""Scenes about ends: of blocks, of threads, of sessions and writers; and which error comes out."""

from __future__ import annotations

import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import tensorflow as tf
from parity import outcome
from scenes_services import runner
from supervisor_stage import (
    Stage,
    begun,
    checkpoints,
    events,
    is_closed,
    kinds_of,
    once,
    scene,
    step_of,
    steps,
    tensors,
    threads_that_stay,
    until,
)

v1: Final = tf.compat.v1
errors: Final = tf.errors


class _OwnEnd(errors.OutOfRangeError):  # type: ignore[misc]
    """A program's own end of its input."""


def _brief(seen: dict[str, Any]) -> Any:
    """Type, first line and notes of an ``outcome``, or its value."""
    if "value" in seen:
        return seen["value"]
    return [seen["error"], seen["message"].partition("\n")[0], [note.splitlines()[0] for note in seen["notes"]]]


@scene
def order_at_the_end(stage: Stage) -> Any:
    """While threads wind down, the session and the writer are still open."""
    model = stage.model(summary=True)
    sv = stage.supervisor(save_summaries_secs=0)
    did: list[Any] = []
    text = v1.Summary(value=[v1.Summary.Value(tag="last words", simple_value=1.0)])

    def wind_down(sess: Any) -> None:
        sv.wait_for_stop()
        did.append(outcome(lambda: int(sess.run(model.step))).get("value"))
        did.append(outcome(lambda: sv.summary_computed(sess, text, 3)).get("error"))

    with threads_that_stay() as left, sv.managed_session() as sess:
        begun(stage)
        thread = threading.Thread(target=wind_down, args=(sess,))
        sv.coord.register_thread(thread)
        thread.start()
        steps(sv, sess, model, 3)
    found = [kind for kind in kinds_of(events(stage.logdir)) if kind in ("last words", "STOP")]
    return {"did": did, "events": found, "closed": is_closed(sess), "left": left, "stopped": sv.should_stop()}


@scene
def blocked_thread(stage: Stage) -> Any:
    """A thread that waits for an element that never comes."""
    stage.model()
    queue = tf.queue.FIFOQueue(5, [tf.float32], shapes=[()])
    value = queue.dequeue()
    sv = stage.supervisor(stop_grace_secs=1)
    freed = []

    def wait(sess: Any) -> None:
        freed.append(outcome(lambda: sess.run(value)).get("error"))

    def run() -> None:
        with sv.managed_session() as sess:
            thread = threading.Thread(target=wait, args=(sess,), daemon=True)
            sv.coord.register_thread(thread)
            thread.start()
            begun(stage)

    ran = outcome(run)
    until(lambda: freed)
    return {"ran": ran.get("error"), "freed": freed}


@scene(core=True)
def last_step(stage: Stage) -> Any:
    """What a clean run of 20 steps leaves as its newest checkpoint; and one that asked for its stop."""
    found = []
    for number, asks in enumerate((False, True)):
        place = replace(stage, where=str(number))
        with stage.fresh():
            model = place.model()
            sv = place.supervisor()
            with sv.managed_session() as sess:
                begun(place)
                made = steps(sv, sess, model, 20)
                if asks:
                    sv.request_stop()
                    sv.should_stop()
        newest = checkpoints(place.logdir)[-1]
        found.append([made, step_of(newest), tensors(place.logdir, newest)["weights"]])
    return found


@scene(core=True)
def end_of_input(stage: Stage) -> Any:
    """OutOfRangeError of an iterator, of a queue, of the program, and of a restore."""
    model = stage.model()
    element = v1.data.make_one_shot_iterator(tf.data.Dataset.range(3)).get_next()
    queue = tf.queue.FIFOQueue(5, [tf.float32], shapes=[()])
    value, close = queue.dequeue(), queue.close()
    saver = v1.train.Saver()
    file = str(stage.directory / "short" / "model")
    Path(file).parent.mkdir()
    sv = stage.supervisor(saver=saver)
    found: dict[str, Any] = {}

    def run(name: str, body: Any) -> None:
        def block() -> str:
            with sv.managed_session() as sess:
                begun(stage)
                sess.run(model.train)
                body(sess)
            return "a clean end"

        ran = outcome(block)
        found[name] = [ran.get("value", ran.get("error")), sv.should_stop()]

    def iterate(sess: Any) -> None:
        while not sv.should_stop():
            sess.run([element, model.train])

    def dequeue(sess: Any) -> None:
        sess.run(close)
        sess.run(value)

    def own(sess: Any) -> None:
        raise _OwnEnd(None, None, "enough")

    def restore(sess: Any) -> None:
        saver.save(sess, file)
        data = next(Path(file).parent.glob("model.data*"))
        data.write_bytes(data.read_bytes()[:-4])
        saver.restore(sess, file)

    for name, body in {"iterator": iterate, "queue": dequeue, "own": own, "restore": restore}.items():
        run(name, body)
    return found


@scene(core=True)
def errors_of_the_block(stage: Stage) -> Any:
    """They come out as the objects that they are, and everything is closed."""
    model = stage.model()
    sv = stage.supervisor()
    raised: list[BaseException] = [
        ValueError("mine"), StopIteration("mine"), errors.AbortedError(None, None, "mine"),
        errors.CancelledError(None, None, "mine"), errors.UnavailableError(None, None, "mine"),
        errors.FailedPreconditionError(None, None, "mine"), ZeroDivisionError(),
        KeyboardInterrupt("mine"), SystemExit(3), GeneratorExit("mine"),
    ]  # fmt: skip
    found = []
    with threads_that_stay() as left:
        for error in raised:
            caught: list[BaseException] = []
            sess: Any = None
            thread: Any = None
            try:
                with sv.managed_session() as sess:
                    begun(stage)
                    thread = sv.loop(60, lambda: None)
                    steps(sv, sess, model, 1)
                    raise error
            except BaseException as came:
                caught.append(came)
            same = bool(caught) and caught[0] is error
            found.append([type(error).__name__, same, sv.should_stop(), is_closed(sess), thread.is_alive()])
    return {"found": found, "left": left}


@scene
def error_of_a_service(stage: Stage) -> Any:
    """It stops the loop, and is raised at the end of a block that ended well."""
    model = stage.model()
    sv = stage.supervisor()
    error = LookupError("of the service")
    made: list[int] = []

    def fail() -> None:
        raise error

    def run() -> None:
        with sv.managed_session() as sess:
            sv.loop(60, fail)
            until(sv.should_stop)
            made.append(steps(sv, sess, model, 5))

    caught: list[BaseException] = []
    try:
        run()
    except LookupError as came:
        caught.append(came)
    again = [outcome(sv.stop).get("error") for _ in range(2)]
    return {"same": bool(caught) and caught[0] is error, "made": made, "again": again}


@scene
def error_of_both(stage: Stage) -> Any:
    """The service first, and then the block; and the other way round."""
    stage.model()
    sv = stage.supervisor()

    def fail() -> None:
        raise LookupError("of the service")

    def service_first() -> None:
        with sv.managed_session():
            sv.loop(60, fail)
            until(sv.coord.should_stop)
            raise ValueError("of the block")

    def block_first() -> None:
        with sv.managed_session():

            def late() -> None:
                with sv.stop_on_exception():
                    sv.wait_for_stop()
                    raise LookupError("of the service")

            thread = threading.Thread(target=late)
            sv.coord.register_thread(thread)
            thread.start()
            raise ValueError("of the block")

    return {"service first": _brief(outcome(service_first)), "block first": _brief(outcome(block_first))}


@scene
def failed_preparation(stage: Stage) -> Any:
    """Errors of ``init_fn``, and what becomes of the session."""
    stage.model()
    found = []
    for error in (ValueError("no data"), errors.OutOfRangeError(None, None, "no data"), KeyboardInterrupt("no data")):
        sessions: list[Any] = []

        def fail(sess: Any, error: BaseException = error, sessions: list[Any] = sessions) -> None:
            sessions.append(sess)
            raise error

        sv = stage.classes.Supervisor(init_fn=fail)

        def run(sv: Any = sv) -> None:
            with sv.managed_session():
                pass

        found.append([_brief(outcome(run)), is_closed(sessions[0])])
    return found


@scene(core=True)
def several_sessions(stage: Stage) -> Any:
    """A Supervisor without a logdir begins anew each time; with one it goes on."""
    model = stage.model()
    found = []
    for sv in (stage.classes.Supervisor(), stage.supervisor()):
        for _ in range(2):
            with sv.managed_session() as sess:
                if sv.save_path:
                    begun(stage)
                at_start = sv.should_stop()
                steps(sv, sess, model, 3)
                value = int(sess.run(model.step))
                if sv.save_path and not stage.classes.are_ours:
                    sv.saver.save(sess, sv.save_path, global_step=value)
            found.append([at_start, value, sv.should_stop(), is_closed(sess)])
    return found


@scene
def stop_by_hand(stage: Stage) -> Any:
    """``stop`` leaves the session open, and the writer if that is asked for."""
    model = stage.model(summary=True)
    sv = stage.supervisor(save_model_secs=0)
    sess = sv.prepare_or_wait_for_session()
    steps(sv, sess, model, 2)
    sv.stop(close_summary_writer=False)
    usable = int(sess.run(model.step))
    after = outcome(lambda: sv.summary_computed(sess, sess.run(sv.summary_op), 9)).get("error")
    sess.close()
    before = kinds_of(events(stage.logdir)).count("STOP")
    second = sv.prepare_or_wait_for_session()
    steps(sv, second, model, 1)
    joined = sv.coord.joined
    sv.stop()
    try:
        raise ValueError("late")
    except ValueError:
        late = outcome(lambda: sv.request_stop(sys.exc_info())).get("error")
    second.close()
    found = kinds_of(events(stage.logdir))
    return {
        "usable": usable, "writing": after, "stops before": before, "stops": found.count("STOP"),
        "graphs": found.count("graph_def"), "joined": [joined, sv.coord.joined], "late": late,
        "twice": outcome(sv.stop),
    }  # fmt: skip


@scene
def stop_with_threads(stage: Stage) -> Any:
    """Threads given to ``stop`` are waited for; one that ignores it is an error, or not."""
    stage.model()
    sv = stage.classes.Supervisor(stop_grace_secs=0.3)
    found = []
    for ignore in (False, True):
        release = threading.Event()
        thread = threading.Thread(target=release.wait, name="deaf", daemon=True)
        thread.start()
        sess = sv.prepare_or_wait_for_session()
        seen = outcome(lambda: sv.stop([thread], ignore_live_threads=ignore))  # noqa: B023 - called at once
        found.append([seen.get("error"), "RuntimeError" in seen.get("bases", ()), "deaf" in seen.get("message", "")])
        release.set()
        thread.join()
        sess.close()
    obedient = threading.Thread(target=sv.wait_for_stop)
    sess = sv.prepare_or_wait_for_session()
    obedient.start()
    sv.stop([obedient])
    found.append([obedient.is_alive()])
    sess.close()
    return found


@scene
def own_writer_at_the_end(stage: Stage) -> Any:
    """Whether a writer of the program's own can still be written to."""
    model = stage.model(summary=True)
    own = v1.summary.FileWriter(stage.logdir)
    sv = stage.classes.Supervisor(summary_writer=own)
    with sv.managed_session() as sess:
        steps(sv, sess, model, 1)
        text = sess.run(sv.summary_op)
    before = kinds_of(events(stage.logdir))
    import warnings

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        own.add_summary(text, 5)
    own.close()
    return {"written": ["total", 5] in [event[:2] for event in events(stage.logdir)], "warned": len(said),
            "stops": before.count("STOP")}  # fmt: skip


@scene
def stop_events(stage: Stage) -> Any:
    """STOP of a clean run and of a failed one."""
    found = []
    for number, fails in enumerate((False, True)):
        place = replace(stage, where=str(number))
        with stage.fresh():
            model = place.model()
            sv = place.supervisor()

            def run(sv: Any = sv, model: Any = model, fails: bool = fails) -> None:
                with sv.managed_session() as sess:
                    steps(sv, sess, model, 2)
                    if fails:
                        raise ValueError("mine")

            ran = outcome(run)
            found.append([ran.get("error"), *[event[1:] for event in events(place.logdir) if event[0] == "STOP"]])
    return found


@scene
def straggler_in_the_next_session(stage: Stage) -> Any:
    """A thread that was left behind goes on in the next session, with the closed one of before."""
    model = stage.model()
    sv = stage.classes.Supervisor(stop_grace_secs=0.2)
    release = threading.Event()
    did: list[Any] = []

    def straggle(sess: Any) -> None:
        with sv.coord.stop_on_exception():
            release.wait()
            did.append(sv.coord.should_stop())
            if not did[0] or stage.classes.are_ours:
                sess.run(model.train)

    first = sv.prepare_or_wait_for_session()
    thread = threading.Thread(target=straggle, args=(first,), daemon=True)
    sv.coord.register_thread(thread)
    thread.start()
    sv.stop(ignore_live_threads=True)
    first.close()

    def second() -> int:
        with sv.managed_session() as sess:
            release.set()
            thread.join()
            return steps(sv, sess, model, 5)

    return {"second": _brief(outcome(second)), "told": did}


@scene
def stop_methods(stage: Stage) -> Any:
    """What ``wait_for_stop`` takes and gives, and which errors ``stop_on_exception`` keeps for the end."""
    stage.model()
    sv = stage.classes.Supervisor()
    with sv.managed_session():
        sv.request_stop()
        gave = [sv.wait_for_stop(), sv.coord.wait_for_stop(0.01)]
        timeout = outcome(lambda: sv.wait_for_stop(1)).get("error")

    def swallow(error: BaseException) -> Any:
        def run() -> str:
            with sv.managed_session():
                with sv.stop_on_exception():
                    raise error
                after.append(sv.should_stop())
            return "a clean end"

        after: list[bool] = []
        return [_brief(outcome(run)), after]

    kept = [swallow(e) for e in (ValueError("mine"), errors.OutOfRangeError(None, None, "end"), SystemExit(4))]

    def asked() -> None:
        with sv.managed_session():
            try:
                raise ArithmeticError("mine")
            except ArithmeticError as error:
                sv.request_stop(error)

    return {"gave": gave, "timeout": timeout, "kept": kept, "asked": _brief(outcome(asked))}


@scene
def stop_of_the_chief(stage: Stage) -> Any:
    """A worker does not hear that the chief has stopped; and one that starts later waits, up to its limit."""
    with tf.device("/cpu:0"):
        model = stage.model()
    server = _server()
    chief = stage.supervisor()
    worker = stage.supervisor(is_chief=False, recovery_wait_secs=0.1)
    lead = chief.prepare_or_wait_for_session(server.target)
    begun(stage)
    other = worker.prepare_or_wait_for_session(server.target, max_wait_secs=20)
    chief.stop()
    lead.close()
    heard = worker.should_stop()
    made = steps(worker, other, model, 2)
    worker.stop()
    other.close()
    late = stage.supervisor(is_chief=False, recovery_wait_secs=0.1)
    waited = outcome(lambda: late.prepare_or_wait_for_session("", max_wait_secs=0.5))
    return {"heard": heard, "made": made, "waited": waited.get("error"), "is": waited.get("bases", [])}


_servers: list[Any] = []


def _server() -> Any:
    """One server for all scenes of this process."""
    if not _servers:
        _servers.append(tf.distribute.Server.create_local_server())
    return _servers[0]


@once
def old_names(stage: Stage) -> Any:
    stage.model()
    old = {
        "PrepareSession": "prepare_or_wait_for_session", "StartQueueRunners": "start_queue_runners",
        "StartStandardServices": "start_standard_services", "Stop": "stop", "RequestStop": "request_stop",
        "Loop": "loop", "ShouldStop": "should_stop", "StopOnException": "stop_on_exception",
        "WaitForStop": "wait_for_stop", "SummaryComputed": "summary_computed",
    }  # fmt: skip
    stops: list[str] = []

    class Own(stage.classes.Supervisor):  # type: ignore[name-defined, misc]
        def stop(self, *args: Any, **kwargs: Any) -> None:
            stops.append("own")
            super().stop(*args, **kwargs)

    sv = Own()
    sess = sv.PrepareSession()
    seen = [sv.ShouldStop(), sv.RequestStop(), sv.ShouldStop(), sv.WaitForStop()]
    sv.Stop()
    sess.close()
    kind = stage.classes.Supervisor
    return {
        "same": {name: getattr(kind, name) == getattr(kind, method) for name, method in old.items()},
        "seen": seen, "managed": hasattr(kind, "ManagedSession"), "own": stops,
    }  # fmt: skip


@scene
def basic_train_loop(stage: Stage) -> Any:
    """TensorFlow's own function around a Supervisor: AbortedError begins anew, UnavailableError comes out."""
    model = stage.model()
    found: dict[str, Any] = {}
    for kind in (errors.AbortedError, errors.UnavailableError):
        sv = stage.classes.Supervisor()
        calls: list[int] = []

        def train(sess: Any, limit: int, sv: Any = sv, calls: list[int] = calls, kind: Any = kind) -> None:
            sess.run(model.train)
            calls.append(int(sess.run(model.step)))
            if len(calls) == 2:
                raise kind(None, None, "lost")
            if len(calls) == limit:
                sv.request_stop()

        def run(sv: Any = sv, train: Any = train) -> None:
            v1.train.basic_train_loop(sv, train, args=(5,))

        ran = outcome(run)
        found[kind.__name__] = [ran.get("error"), list(calls)]
    return found


# ---- queue runners


@scene
def blocked_enqueues(stage: Stage) -> Any:
    """Enqueues into a full queue end at the stop, without an error."""
    model = stage.model()
    queue, value = runner(stage)
    full = queue.size()
    sv = stage.supervisor(stop_grace_secs=20)
    with threads_that_stay() as left, sv.managed_session() as sess:
        begun(stage)
        until(lambda: int(sess.run(full)) == 5)
        made = steps(sv, sess, model, 2)
        sess.run(value)
    return {"made": made, "left": left, "stopped": sv.should_stop()}


@scene(core=True)
def input_queue_ends(stage: Stage) -> Any:
    """Three elements go in, the runner closes the queue, and training ends with them."""
    model = stage.model()
    source = tf.queue.FIFOQueue(5, [tf.float32], shapes=[()])
    fill, close = source.enqueue_many([[1.0, 2.0, 3.0]]), source.close()
    queue = tf.queue.FIFOQueue(5, [tf.float32], shapes=[()])
    own = v1.train.QueueRunner(queue, [queue.enqueue(source.dequeue())])
    v1.train.add_queue_runner(own)
    value = queue.dequeue()
    got: list[float] = []
    sv = stage.supervisor()

    def run() -> str:
        with sv.managed_session() as sess:
            sess.run(fill)
            sess.run(close)
            while not sv.should_stop():
                got.append(float(sess.run([value, model.train])[0]))
        return "a clean end"

    return {"ran": outcome(run).get("value"), "got": got, "kept": len(own.exceptions_raised)}


@scene
def failing_enqueue(stage: Stage) -> Any:
    """An error in an enqueue stops the run, and is raised at its end."""
    model = stage.model()
    queue = tf.queue.FIFOQueue(5, [tf.float32], shapes=[()])
    fails = v1.py_func(_fail, [], tf.float32)
    fails.set_shape(())
    own = v1.train.QueueRunner(queue, [queue.enqueue(fails)])
    v1.train.add_queue_runner(own)
    sv = stage.supervisor()

    def run() -> None:
        with sv.managed_session() as sess:
            until(sv.should_stop)
            steps(sv, sess, model, 3)

    ran = outcome(run)
    return {"error": ran.get("error"), "about": "of the input" in ran.get("message", ""),
            "kept": len(own.exceptions_raised)}  # fmt: skip


def _fail() -> Any:
    raise LookupError("of the input")


@scene
def cancelled_dequeue(stage: Stage) -> Any:
    """A thread of the program that dequeues, and is cancelled by the stop, which it reports."""
    stage.model()
    queue = tf.queue.FIFOQueue(5, [tf.float32], shapes=[()])
    put, take = queue.enqueue(1.0), queue.dequeue()
    v1.train.add_queue_runner(v1.train.QueueRunner(queue, [put]))
    other = tf.queue.FIFOQueue(5, [tf.float32], shapes=[()])
    v1.train.add_queue_runner(v1.train.QueueRunner(other, [other.enqueue(take)]))
    sv = stage.supervisor()

    def run() -> str:
        with sv.managed_session():
            begun(stage)
        return "a clean end"

    with threads_that_stay() as left:
        ran = outcome(run)
    return {"ran": ran.get("value", ran.get("error")), "left": left}


@scene
def module_function(stage: Stage) -> Any:
    """``tf.compat.v1.train.start_queue_runners`` with the Supervisor's coordinator."""
    stage.model()
    _, value = runner(stage)
    sv = stage.classes.Supervisor()
    sess = sv.prepare_or_wait_for_session(start_standard_services=False)
    with sess.as_default():
        threads = v1.train.start_queue_runners(coord=sv.coord)
    got = sum(float(sess.run(value)) for _ in range(10))
    again = len(sv.start_queue_runners(sess))
    sv.stop()
    alive = [thread.is_alive() for thread in threads]
    sess.close()
    return {"number": len(threads), "got": got, "again": again, "alive": alive}
