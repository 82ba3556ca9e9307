"""Scenes about the standard services: what they write and when, what they survive, and what they share."""

from __future__ import annotations

import json
import resource
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import tensorflow as tf
from google.protobuf import text_format
from parity import outcome
from supervisor_stage import (
    Model,
    Stage,
    at,
    begun,
    checkpoints,
    event_files,
    events,
    files,
    in_thread,
    is_closed,
    kinds_of,
    logged,
    once,
    scene,
    step_of,
    steps,
    tensors,
    until,
    without_service_events,
)

v1: Final = tf.compat.v1


def train_until(sv: Any, sess: Any, model: Model, enough: Any, limit: float = 30.0) -> bool:
    """The usual loop, until something is so; whether it came to that."""
    deadline = time.monotonic() + limit
    while not sv.should_stop() and not enough():
        sess.run(model.train)
        if time.monotonic() > deadline:
            return False
    return bool(enough())


class Spy:
    """Hands everything on to a session manager, and notes what for."""

    def __init__(self, asked: list[Any]) -> None:
        self._asked = asked

    def prepare_session(self, master: str, **given: Any) -> Any:
        told = {name: given[name] for name in ("wait_for_checkpoint", "max_wait_secs")}
        self._asked.append(["prepare", told, given["config"] is not None])
        sess = v1.Session(master)
        sess.run(given["init_op"])
        return sess

    def wait_for_session(self, master: str, **given: Any) -> Any:
        self._asked.append(["wait", given["max_wait_secs"], given["config"] is not None])
        return v1.Session(master)


@scene
def prepared(stage: Stage) -> Any:
    """What has been done when a session is handed out, by a chief and by a worker."""
    with tf.device("/cpu:0"):
        model = stage.model()
    asked: list[Any] = []
    sv = stage.supervisor(session_manager=Spy(asked), recovery_wait_secs=0.1)
    sv.request_stop()
    before = sv.should_stop()
    sess = sv.prepare_or_wait_for_session("", v1.ConfigProto(), True, 5.0)
    begun(stage)
    seen = [before, sv.should_stop(), type(sess).__name__, files(stage.logdir), steps(sv, sess, model, 1)]
    sv.stop()
    sess.close()
    worker = stage.supervisor(is_chief=False, session_manager=Spy(asked))
    sess = worker.prepare_or_wait_for_session(max_wait_secs=7.0, wait_for_checkpoint=True)
    seen.append(worker.should_stop())
    worker.stop()
    seen.append(is_closed(sess))
    sess.close()
    return {"seen": seen, "asked": asked}


def runner(stage: Stage, number: int = 2) -> tuple[Any, Any]:
    """A queue of floats with a runner in the collection, and its dequeue op."""
    queue = tf.queue.FIFOQueue(5, [tf.float32], shapes=[()])
    v1.train.add_queue_runner(v1.train.QueueRunner(queue, [queue.enqueue(1.0)] * number))
    return queue, queue.dequeue()


@scene(core=True)
def without_services(stage: Stage) -> Any:
    """Neither services nor queue runners, but the graph file and the graph's events."""
    model = stage.model(summary=True)
    queue, _ = runner(stage)
    size = queue.size()
    sv = stage.supervisor(save_model_secs=0.01, save_summaries_secs=0.01)
    with sv.managed_session(start_standard_services=False) as sess:
        made = steps(sv, sess, model, 5)
        filled = int(sess.run(size))
    return {"made": made, "filled": filled, "files": files(stage.logdir), "events": kinds_of(events(stage.logdir))}


@scene
def graph_file(stage: Stage) -> Any:
    """The graph's file comes back at every prepare; the graph's events once for each time the writer is opened."""
    stage.model()
    sv = stage.supervisor()
    path = Path(stage.logdir) / "graph.pbtxt"
    seen = []
    for close in (False, True):
        sess = sv.prepare_or_wait_for_session(start_standard_services=False)
        seen.append(path.exists())
        text = path.read_text()
        path.unlink()
        sv.stop(close_summary_writer=close)
        sess.close()
    found = kinds_of(events(stage.logdir))
    with sv.managed_session():
        seen.append(path.exists())
    written = tf.compat.v1.GraphDef()
    text_format.Parse(text, written)
    return {
        "seen": seen,
        "nodes": len(written.node) == len(v1.get_default_graph().get_operations()),
        "shapes": any("_output_shapes" in node.attr for node in written.node),
        "graphs": found.count("graph_def"), "meta graphs": found.count("meta_graph_def"), "stops": found.count("STOP"),
        "opened anew": kinds_of(events(stage.logdir)).count("graph_def"),
    }  # fmt: skip


@scene
def services_by_hand(stage: Stage) -> Any:
    """``start_standard_services`` on a chief, on a worker, and without a logdir."""
    with tf.device("/cpu:0"):
        model = stage.model(summary=True)
    sv = stage.supervisor()
    sess = sv.prepare_or_wait_for_session(start_standard_services=False)
    threads = sv.start_standard_services(sess)
    steps(sv, sess, model, 1)
    begun(stage)
    alive = [thread.is_alive() and thread.daemon for thread in threads]
    sv.stop()
    ended = [thread.is_alive() for thread in threads]
    sess.close()
    worker = stage.supervisor(is_chief=False)
    nowhere = stage.classes.Supervisor()
    with v1.Session() as other, logged() as said:
        sv_worker = outcome(lambda: worker.start_standard_services(other))
        without = outcome(lambda: nowhere.start_standard_services(other))
    return {
        "are a list": isinstance(threads, list), "number": len(threads), "alive": all(alive), "ended": not any(ended),
        "worker": sv_worker.get("error"), "worker is": sv_worker.get("bases", []),
        "no logdir": without, "warned": len(at("WARNING", said)), "files": files(stage.logdir),
    }  # fmt: skip


@scene
def foreign_session(stage: Stage) -> Any:
    """Services for a session that the program made and initialised itself."""
    model = stage.model(summary=True)
    sv = stage.supervisor()
    with v1.Session() as sess:
        sess.run(sv.init_op)
        sv.start_standard_services(sess)
        made = steps(sv, sess, model, 3)
        came = begun(stage)
        sv.stop()
        closed = is_closed(sess)
    return {"made": made, "saved": came, "closed": closed, "stopped": sv.should_stop()}


@scene(core=True)
def start_event(stage: Stage) -> Any:
    """START with the present step, in a fresh and in a resumed run; and without a global step."""
    model = stage.model()
    for _ in range(2):
        sv = stage.supervisor()
        with sv.managed_session() as sess:
            begun(stage)
            steps(sv, sess, model, 4)
            sv.saver.save(sess, sv.save_path, global_step=4)
    with stage.fresh():
        plain = replace(stage, where="plain")
        other = plain.model(step=None)
        sv = plain.supervisor()
        with sv.managed_session() as sess:
            steps(sv, sess, other, 2)
    return {
        "starts": [event[1] for event in events(stage.logdir) if event[0] == "START"],
        "without a step": [event[1] for event in events(plain.logdir) if event[0] == "START"],
    }


@scene
def which_services(stage: Stage) -> Any:
    """Which files and tags come of which arguments."""
    found = {}
    cases: dict[str, dict[str, Any]] = {
        "all": {},
        "no summaries": {"save_summaries_secs": 0},
        "no summaries, None": {"save_summaries_secs": None},
        "no checkpoints": {"save_model_secs": 0},
        "no checkpoints, None": {"save_model_secs": None},
        "no summary op": {"summary_op": None},
        "no saver": {"saver": None},
        "no writer": {"summary_writer": None},
        "no step": {"global_step": None},
    }
    for number, (name, given) in enumerate(cases.items()):
        place = replace(stage, where=str(number))
        with stage.fresh():
            model = stage.model(summary=True)
            sv = place.supervisor(**{"save_summaries_secs": 0.05, "save_model_secs": 600, **given})
            with sv.managed_session() as sess:
                if not ("no checkpoints" in name or name == "no saver"):
                    begun(place)
                began = time.monotonic()
                train_until(sv, sess, model, lambda began=began: time.monotonic() > began + 0.12)
        seen = set(kinds_of(events(place.logdir)))
        found[name] = [sorted(seen & {"total", "global_step/sec", "CHECKPOINT"}), bool(checkpoints(place.logdir))]
    return found


@scene
def at_once(stage: Stage) -> Any:
    """The state at the start is saved before anything is trained; and a summary is written at the start."""
    model = stage.model(summary=True)
    sv = stage.supervisor()
    with sv.managed_session() as sess:
        came = begun(stage)
        first = tensors(stage.logdir, checkpoints(stage.logdir)[0]) if came else None
        steps(sv, sess, model, 2)
        until(lambda: "total" in kinds_of(events(stage.logdir)), 0.2)
    summaries = [event[1] for event in events(stage.logdir) if event[0] == "total"]
    return {"came": came, "first": first, "summary": summaries[:1]}


@once
def eaten_inputs(stage: Stage) -> Any:
    """A summary op that needs an element of the input takes one that training never sees."""
    taken: list[float] = []

    def take(value: Any) -> Any:
        taken.append(float(value))
        return np.float32(value)

    data = v1.data.make_one_shot_iterator(tf.data.Dataset.range(20)).get_next()
    value = v1.py_func(take, [data], tf.float32)
    step = stage.variable("global_step", (), tf.int64, [v1.GraphKeys.GLOBAL_VARIABLES, v1.GraphKeys.GLOBAL_STEP])
    v1.summary.scalar("total", value)
    train = tf.group(v1.assign_add(step, tf.constant(1, tf.int64)), value.op)
    trained: list[int] = []
    with logged() as said:
        sv = stage.supervisor()
        with sv.managed_session() as sess:
            while not sv.should_stop():
                sess.run(train)
                trained.append(1)
                until(lambda: len(taken) > len(trained), 10)
    return {"trained": len(trained), "taken": len(taken), "warned": [t for t in at("WARNING", said) if "element" in t]}


@scene
def summary_with_placeholder(stage: Stage) -> Any:
    model = stage.model()
    fed = v1.placeholder(tf.float32, ())
    v1.summary.scalar("loss", fed)
    made = []

    def run() -> int:
        with logged() as said:
            sv = stage.supervisor()
            with sv.managed_session() as sess:
                begun(stage)
                while not sv.should_stop() and len(made) < 20:
                    sess.run([model.train, fed], {fed: 1.0})
                    made.append(1)
                    if len(made) == 10 and not stage.classes.are_ours:
                        until(sv.should_stop)
        return len([text for text in at("WARNING", said) if "has to be fed" in text])

    return {"run": outcome(run), "made": len(made)}


@scene
def step_rate(stage: Stage) -> Any:
    """The tag has the name of the step's op."""
    model = stage.model(step="steps_taken")
    sv = stage.supervisor(save_summaries_secs=0.05)
    with sv.managed_session() as sess:
        began = time.monotonic()
        train_until(sv, sess, model, lambda: time.monotonic() > began + 0.3)
    rates = [event for event in events(stage.logdir) if event[0] == "steps_taken/sec"]
    return {"there": bool(rates), "later are rates": all(rate > 0 for _, _, rate in rates[1:]), "first": rates[0][2]}


@scene(core=True)
def numbered(stage: Stage) -> Any:
    """Names of checkpoints, what they hold, and what CHECKPOINT events say of them."""
    model = stage.model()
    sv = stage.supervisor(save_model_secs=0.05, saver=v1.train.Saver(max_to_keep=None))
    with sv.managed_session() as sess:
        begun(stage)
        came = train_until(sv, sess, model, lambda: len(checkpoints(stage.logdir)) > 3)
    names = checkpoints(stage.logdir)
    held = {name: tensors(stage.logdir, name) for name in names}
    said = [event for event in events(stage.logdir) if event[0] == "CHECKPOINT"]
    return {
        "came": came,
        "first": names[0],
        "tensors": sorted(held[names[-1]]),
        "latest": Path(tf.train.latest_checkpoint(stage.logdir)).name == names[-1],
        "as named": all(content["global_step"] == step_of(name) for name, content in held.items()),
        "of one step": all(content["weights"] == [content["global_step"]] * 2 for content in held.values()),
        "events": len(said),
        "paths": [Path(path + ".index").exists() for _, _, path, _ in said],
        "steps are named": [path.endswith(f"-{step}") for _, step, path, _ in said],
    }


@scene(core=True)
def unnumbered(stage: Stage) -> Any:
    """Without a global step."""
    model = stage.model(step=None)
    sv = stage.supervisor(save_model_secs=0.05)
    with sv.managed_session() as sess:
        begun(stage)
        made = [0]

        def trained() -> bool:
            made[0] += 1
            return time.monotonic() > until_then

        until_then = time.monotonic() + 0.2
        train_until(sv, sess, model, trained)
        value = sess.run(model.weights).tolist()
    latest = tf.train.latest_checkpoint(stage.logdir)
    with stage.fresh(), v1.Session() as sess:
        other = stage.model(step=None)
        v1.train.Saver().restore(sess, latest)
        restored = sess.run(other.weights).tolist()
    return {
        "latest": Path(latest).name, "bare": Path(stage.logdir, "model.ckpt.index").exists(),
        "tensors": list(tensors(stage.logdir, "model.ckpt")), "names": checkpoints(stage.logdir)[:1],
        "number": len(checkpoints(stage.logdir)), "last step": restored == value, "meta":
        Path(stage.logdir, "model.ckpt.meta").exists(),
    }  # fmt: skip


@scene
def own_save(stage: Stage) -> Any:
    """The program saves its last step itself, and reads what it saved after the session; then it runs once more."""
    model = stage.model()
    sv = stage.supervisor()
    with sv.managed_session() as sess:
        begun(stage)
        steps(sv, sess, model, 4)
        path = sv.saver.save(sess, sv.save_path, global_step=model.step)
    seen = [Path(path).name, checkpoints(stage.logdir), Path(tf.train.latest_checkpoint(stage.logdir)).name]
    held = outcome(lambda: tensors(stage.logdir, Path(path).name)).get("value")
    second = stage.supervisor()
    with second.managed_session() as sess:
        found = int(sess.run(model.step))
    return {"seen": seen, "held": held, "found": found, "names": [checkpoints(stage.logdir)[-1], files(stage.logdir)]}


@once
def torn(stage: Stage) -> Any:
    """A step of two halves, 20 ms apart, saved every 200 ms: in which checkpoints do the halves differ?"""
    first, second = stage.variable("first"), stage.variable("second")
    step = stage.variable("global_step", (), tf.int64, [v1.GraphKeys.GLOBAL_VARIABLES, v1.GraphKeys.GLOBAL_STEP])
    halves = [v1.assign_add(first, 1.0), v1.assign_add(second, 1.0)]
    count = v1.assign_add(step, tf.constant(1, tf.int64))
    sv = stage.supervisor(save_model_secs=0.2, saver=v1.train.Saver(max_to_keep=None))
    with sv.managed_session() as sess:
        began = time.monotonic()
        while not sv.should_stop() and time.monotonic() < began + 1.5:
            sess.run(halves[0])
            time.sleep(0.02)  # what other work of a step takes
            sess.run([halves[1], count])
    found = []
    for name in checkpoints(stage.logdir):
        manifest = Path(stage.logdir, f"{name}.manifest.json")
        consistent = not manifest.exists() or json.loads(manifest.read_text()).get("consistent", True)
        held = tensors(stage.logdir, name)
        whole = held["first"] == held["second"] == held["global_step"] == step_of(name)
        found.append([whole, consistent])
    return found


@scene
def restore_without_saving(stage: Stage) -> Any:
    """``save_model_secs=0`` still restores, and saves nothing."""
    model = stage.model()
    sv = stage.supervisor()
    with sv.managed_session() as sess:
        begun(stage)
        steps(sv, sess, model, 3)
        sv.saver.save(sess, sv.save_path, global_step=3)
    before = checkpoints(stage.logdir)
    second = stage.supervisor(save_model_secs=0)
    with second.managed_session() as sess:
        found = int(sess.run(model.step))
        steps(second, sess, model, 3)
    return {"found": found, "added": sorted(set(checkpoints(stage.logdir)) - set(before))}


@once
def failing_save(stage: Stage) -> Any:
    """The disk takes no large files for a while."""
    model = stage.model(shape=(300_000,))
    sv = stage.supervisor(save_model_secs=0.05)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    made = []

    def run() -> None:
        with sv.managed_session() as sess:
            begun(stage)
            resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
            try:
                limit = time.monotonic() + 20
                while not sv.should_stop() and time.monotonic() < limit:
                    sess.run(model.train)
                    if stage.classes.are_ours and sv.report.failed_saves:
                        break
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            made.append(steps(sv, sess, model, 5))

    ran = outcome(run)
    newest = checkpoints(stage.logdir)[-1]
    held = tensors(stage.logdir, newest)
    return {
        "ran": ran.get("error"), "after": made, "stopped": sv.should_stop(),
        "newest is whole": held["global_step"] == step_of(newest) and set(held["weights"]) == {held["global_step"]},
        "first only": step_of(newest) == 0,
    }  # fmt: skip


@scene
def failing_loop(stage: Stage) -> Any:
    """A loop that never asks learns of a failure at its end, and can train until then."""
    model = stage.model()
    sv = stage.supervisor()

    def fail() -> None:
        raise ArithmeticError("of the service")

    made = []

    def run() -> None:
        with sv.managed_session() as sess:
            sv.loop(60, fail)
            noticed = until(sv.coord.should_stop)
            for _ in range(5):
                sess.run(model.train)
            made.extend([noticed, int(sess.run(model.step))])

    ran = outcome(run)
    return {"ran": [ran["error"], ran["message"]], "made": made}


@scene
def prepared_twice(stage: Stage) -> Any:
    stage.model()
    sv = stage.supervisor()
    first = sv.prepare_or_wait_for_session()

    def prepare() -> bool:
        sv.prepare_or_wait_for_session().close()
        return True

    second = outcome(prepare)
    usable = outcome(lambda: first.run(v1.get_default_graph().get_tensor_by_name("Const:0")) is not None)
    outcome(sv.stop)  # with TensorFlow's the services of the second session have failed
    first.close()
    return {"second": second, "first is usable": "closed" not in usable.get("message", "")}


@scene(theirs_in_v2=True, core=True)
def services_in_this_mode(stage: Stage) -> Any:
    """With a logdir and a global step: how far training comes."""
    model = stage.model()
    sv = stage.supervisor()

    def run() -> int:
        with sv.managed_session() as sess:
            until(lambda: sv.coord.should_stop() or checkpoints(stage.logdir))
            return steps(sv, sess, model, 20)

    return {"ran": outcome(run), "saved": bool(checkpoints(stage.logdir))}


@scene(theirs_in_v2=True, kinds=("resource",))
def eager_queue_runners(stage: Stage) -> Any:
    """Where TensorFlow executes eagerly."""
    stage.model()
    sv = stage.classes.Supervisor()
    return {"eager": in_thread(tf.executing_eagerly), "error": in_thread(
        lambda: outcome(lambda: len(sv.start_queue_runners(None)))).get("error")}  # fmt: skip


@scene(core=True)
def queue_runner_threads(stage: Stage) -> Any:
    stage.model()
    _, value = runner(stage)
    sv = stage.classes.Supervisor()
    sess = sv.prepare_or_wait_for_session(start_standard_services=False)
    threads = sv.start_queue_runners(sess)
    got = [float(sess.run(value)) for _ in range(20)]
    second = sv.start_queue_runners(sess)
    seen = [len(threads), all(thread.daemon for thread in threads), all(thread.is_alive() for thread in threads)]
    none = sv.start_queue_runners(sess, queue_runners=[])
    sv.stop()
    sess.close()
    return {"seen": seen, "got": sum(got), "second": len(second), "none": none,
            "ended": [thread.is_alive() for thread in threads]}  # fmt: skip


@scene
def user_loop(stage: Stage) -> Any:
    model = stage.model()
    calls: list[Any] = []
    sv = stage.supervisor()
    with sv.managed_session() as sess:
        thread = sv.loop(0.01, lambda *args, **kwargs: calls.append([list(args), kwargs]), (1,), {"x": 2})
        until(lambda: len(calls) > 3)
        alive = [thread.is_alive(), thread.daemon]
        steps(sv, sess, model, 1)
    return {"calls": calls[0], "alive": alive, "ended": not thread.is_alive(), "type": type(thread).__name__}


@scene
def summaries_by_hand(stage: Stage) -> Any:
    with tf.device("/cpu:0"):
        model = stage.model(summary=True)
    worker = stage.supervisor(is_chief=False)
    nowhere = stage.classes.Supervisor()
    sv = stage.supervisor(save_summaries_secs=0)
    with sv.managed_session() as sess:
        refused = [outcome(lambda sv=sv: sv.summary_computed(sess, b"")).get("error") for sv in (worker, nowhere)]
        steps(sv, sess, model, 2)
        text = sess.run(sv.summary_op)
        sv.summary_computed(sess, text)
        sv.summary_computed(sess, text, 17)
        own = v1.Summary(value=[v1.Summary.Value(tag="own", simple_value=4.0)])
        sv.summary_computed(sess, own, global_step=18)
        wrong = {
            repr(thing): outcome(lambda thing=thing: sv.summary_computed(sess, thing)).get("error")
            for thing in ("text", 1, None, [1], b"no summary")
        }
    after = outcome(lambda: sv.summary_computed(sess, text, 19))
    written = [event for event in events(stage.logdir) if event[0] in ("total", "own")]
    return {"refused": refused, "written": written, "wrong": wrong, "after": after.get("error")}


@scene
def summary_metadata(stage: Stage) -> Any:
    """What ``sv.summary_writer`` does beside summaries of the Supervisor's own."""
    stage.model(summary=True)
    sv = stage.supervisor(save_summaries_secs=0)
    writer = sv.summary_writer
    with sv.managed_session() as sess:
        options, metadata = v1.RunOptions(trace_level=v1.RunOptions.FULL_TRACE), v1.RunMetadata()
        text = sess.run(sv.summary_op, options=options, run_metadata=metadata)
        writer.add_run_metadata(metadata, "run", 3)
        again = outcome(lambda: writer.add_run_metadata(metadata, "run", 3))
        writer.add_summary(text, 5)
        writer.add_summary(text, 6)
        writer.add_session_log(v1.SessionLog(status=v1.SessionLog.START), 7)
        writer.flush()
    seen = [event[:2] for event in events(stage.logdir) if event[0] in ("tagged_run_metadata", "total", "START")]
    return {"seen": seen, "again": again.get("error"), "where": Path(writer.get_logdir()).name}


@scene
def events_while_open(stage: Stage) -> Any:
    """What is on disk while the session is open, which is what a process that is killed then leaves."""
    stage.model(summary=True)
    sv = stage.supervisor(save_summaries_secs=0)
    with sv.managed_session() as sess:
        begun(stage)
        for step in range(30):
            sv.summary_computed(sess, sess.run(sv.summary_op), step)
        until(lambda: len([event for event in events(stage.logdir) if event[0] == "total"]) == 30, 0.3)
        on_disk = len([event for event in events(stage.logdir) if event[0] == "total"])
    return {"on disk": on_disk, "at the end": len([event for event in events(stage.logdir) if event[0] == "total"])}


@scene
def events_of_quick_runs(stage: Stage) -> Any:
    """Runs that begin within one second, up to the first whose events replace those of another."""
    model = stage.model()
    runs = 0
    for _ in range(6):
        sv = stage.supervisor(save_model_secs=0)
        with sv.managed_session() as sess:
            steps(sv, sess, model, 1)
        runs += 1
    return {"runs": runs, "starts": kinds_of(events(stage.logdir)).count("START")}


@scene(core=True)
def clean_run(stage: Stage) -> Any:
    """Files and events of one clean run, and of the run that resumes it."""
    model = stage.model(summary=True)
    sv = stage.supervisor()
    with sv.managed_session() as sess:
        begun(stage)
        made = steps(sv, sess, model, 3)
        sv.summary_computed(sess, sess.run(sv.summary_op), 3)
        began = files(stage.logdir)
    found = events(stage.logdir)
    return {
        "made": made, "while it ran": began, "opening": kinds_of(found)[:4], "closing": kinds_of(found)[-1],
        "rest": sorted(set(kinds_of(found)[4:-1])), "stop": found[-1][1:],
        "files": files(stage.logdir), "events": without_service_events(found)[:5],
    }  # fmt: skip


@scene
def removal(stage: Stage) -> Any:
    """``max_to_keep`` goes on across restarts, and a lower number."""
    counts = []
    for keep in (3, 3, 1):
        with stage.fresh():
            model = stage.model()
            sv = stage.supervisor(save_model_secs=0.03, saver=v1.train.Saver(max_to_keep=keep))
            with sv.managed_session() as sess:
                before = checkpoints(stage.logdir)
                begun(stage)
                own: set[str] = set()

                def enough(own: set[str] = own, before: list[str] = before) -> bool:
                    own.update(set(checkpoints(stage.logdir)) - set(before))
                    return len(own) > 4

                train_until(sv, sess, model, enough)
            until(lambda: len(list(Path(stage.logdir).glob("model.ckpt*.index"))) >= 1)
            state = tf.train.get_checkpoint_state(stage.logdir)
            counts.append([len(checkpoints(stage.logdir)), len(state.all_model_checkpoint_paths)])
    return counts


@scene
def same_second_files(stage: Stage) -> Any:
    """How many event files two sessions of one Supervisor leave."""
    model = stage.model()
    sv = stage.supervisor(save_model_secs=0)
    for _ in range(2):
        with sv.managed_session() as sess:
            steps(sv, sess, model, 1)
    return len(event_files(stage.logdir))
