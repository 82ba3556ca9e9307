"""Scenes about making a Supervisor: what it takes, finds, makes, and refuses."""

from __future__ import annotations

import inspect
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import tensorflow as tf
from parity import outcome
from supervisor_stage import Stage, at, begun, event_files, events, files, in_thread, logged, once, scene, steps

v1: Final = tf.compat.v1
keys: Final = v1.GraphKeys

PROPERTIES: Final = (
    "is_chief", "session_manager", "coord", "init_op", "init_feed_dict", "ready_op", "ready_for_local_init_op",
    "summary_writer", "summary_op", "save_summaries_secs", "global_step", "saver", "save_model_secs", "save_path",
)  # fmt: skip


@once
def signatures(stage: Stage) -> Any:
    def of(name: str) -> Any:
        parameters = list(inspect.signature(getattr(stage.classes.Supervisor, name)).parameters.values())[1:]
        return [[parameter.name, repr(parameter.default)] for parameter in parameters]

    names = (
        "__init__", "managed_session", "prepare_or_wait_for_session", "start_standard_services", "start_queue_runners",
        "stop", "request_stop", "should_stop", "stop_on_exception", "wait_for_stop", "loop", "summary_computed",
    )  # fmt: skip
    return {name: of(name) for name in names}


@scene(theirs_in_v2=True, kinds=("resource",))
def eager(stage: Stage) -> Any:
    made = in_thread(lambda: outcome(lambda: type(stage.supervisor()).__name__))
    return {"eager": in_thread(tf.executing_eagerly), "made": made, "files": files(stage.logdir)}


@scene
def zero_is_default(stage: Stage) -> Any:
    stage.model(summary=True)
    kind = stage.classes.Supervisor
    zero = kind(ready_op=0, init_op=0, local_init_op=0, saver=0, summary_op=0, global_step=0, summary_writer=0)
    names = ("ready_op", "init_op", "saver", "summary_op", "global_step", "summary_writer")
    return {"constant": kind.USE_DEFAULT, "there": {name: getattr(zero, name) is not None for name in names}}


@scene
def none_is_none(stage: Stage) -> Any:
    stage.model(summary=True)
    names = ("ready_op", "init_op", "saver", "summary_op", "global_step", "summary_writer")
    given = dict.fromkeys((*names, "ready_for_local_init_op"))

    def prepare() -> None:
        with stage.classes.Supervisor(local_init_op=None, **given).managed_session():
            pass

    nothing = outcome(prepare)
    with stage.fresh():
        stage.model(summary=True)
        sv = stage.supervisor(local_init_op=tf.no_op(), **given)
        with sv.managed_session() as sess:
            uninitialised = outcome(lambda: sess.run(v1.global_variables()))
    return {
        "none": [getattr(sv, name) is None for name in (*names, "ready_for_local_init_op")],
        "nothing to initialise with": "RuntimeError" in nothing["bases"],
        "added": [len(v1.get_collection(key)) for key in (keys.READY_OP, keys.INIT_OP, keys.SAVERS)],
        "uninitialised": uninitialised["error"],
        "files": files(stage.logdir),
    }


_COLLECTED: Final = {
    "ready_op": keys.READY_OP, "init_op": keys.INIT_OP, "local_init_op": keys.LOCAL_INIT_OP, "saver": keys.SAVERS,
    "summary_op": keys.SUMMARY_OP, "ready_for_local_init_op": keys.READY_FOR_LOCAL_INIT_OP,
}  # fmt: skip
VISIBLE: Final = tuple(name for name in _COLLECTED if name in PROPERTIES)


@scene
def made_defaults(stage: Stage) -> Any:
    """Collections are empty, so the defaults are made and added."""
    stage.model(summary=True)
    sv = stage.supervisor()
    found = {name: v1.get_collection(key) for name, key in _COLLECTED.items()}
    return {
        "first": {name: bool(found[name]) and found[name][0] is getattr(sv, name) for name in VISIBLE},
        "number": {name: len(items) for name, items in found.items()},
        "keeps": sv.saver.as_saver_def().max_to_keep,
        "sharded": sv.saver.as_saver_def().sharded,
        "step": sv.global_step.op.name,
        "ready for local init": sv.ready_for_local_init_op is None,
    }


@scene
def empty_graph_defaults(stage: Stage) -> Any:
    sv = stage.supervisor(logdir=None)
    found = {name: len(v1.get_collection(key)) for name, key in _COLLECTED.items()}
    return [found, sv.saver is None, sv.summary_op is None, sv.global_step is None, sv.ready_op is None]


@scene
def collected_defaults(stage: Stage) -> Any:
    """Two items in each collection: the first is taken, and that is said."""
    model = stage.model()
    local = stage.variable("local", (), tf.float32, [keys.LOCAL_VARIABLES])
    both: dict[str, list[Any]] = {}
    for name, key in _COLLECTED.items():
        if name == "saver":
            both[name] = [v1.train.Saver(max_to_keep=3), v1.train.Saver()]
        elif name in ("ready_op", "ready_for_local_init_op"):
            both[name] = [v1.report_uninitialized_variables(v1.global_variables()) for _ in range(2)]
        elif name == "summary_op":
            both[name] = [v1.summary.scalar(f"s{number}", 1.0) for number in range(2)]
        elif name == "local_init_op":
            both[name] = [v1.assign(local, 1.0), v1.assign(local, 2.0)]
        else:
            both[name] = [v1.global_variables_initializer(), tf.no_op()]
        for item in both[name]:
            v1.add_to_collection(key, item)
    with logged() as said:
        sv = stage.supervisor()
    with sv.managed_session() as sess:
        found = float(sess.run(local))
    return {
        "first": {name: getattr(sv, name) is both[name][0] for name in VISIBLE},
        "local init": found,
        "number": {name: len(v1.get_collection(key)) for name, key in _COLLECTED.items()},
        "step": sv.global_step is model.step,
        "said": sum("irst" in text for text in at("INFO", said)),
    }


@scene
def forgotten_saver(stage: Stage) -> Any:
    """A Saver that is not in the collection is not found."""
    stage.model()
    mine = v1.train.Saver(max_to_keep=2)
    return stage.supervisor(logdir=None).saver is mine


@scene
def fed_init_op(stage: Stage) -> Any:
    """The feed is for the init op, and init_fn comes after it."""
    fed = v1.placeholder(tf.float32, ())
    weights = v1.get_variable("weights", initializer=fed, use_resource=stage.is_resource, validate_shape=True)
    seen: list[float] = []
    sv = stage.supervisor(
        logdir=None, init_feed_dict={fed: 7.0}, init_fn=lambda sess: seen.append(float(sess.run(weights)))
    )
    with sv.managed_session() as sess:
        return {"value": float(sess.run(weights)), "seen by init_fn": seen, "feed": list(sv.init_feed_dict.values())}


@scene
def local_init_each_session(stage: Stage) -> Any:
    """Local variables and tables are initialised for every session, after a restore too."""
    model = stage.model()
    local = v1.get_variable("local", (), collections=[keys.LOCAL_VARIABLES], initializer=v1.ones_initializer(),
                            use_resource=stage.is_resource)  # fmt: skip
    table = tf.lookup.StaticHashTable(tf.lookup.KeyValueTensorInitializer(["a"], [5]), -1)
    found = table.lookup(tf.constant("a"))
    change = v1.assign(local, 9.0)
    sv = stage.supervisor()
    values = []
    for _ in range(2):
        with sv.managed_session() as sess:
            begun(stage)
            values.append([float(sess.run(local)), int(sess.run(found)), float(sess.run(change))])
            steps(sv, sess, model, 1)
    return values


def _step_of(stage: Stage) -> Any:
    """A run of three steps without anything given; what became of its steps."""
    step = v1.global_variables()[0]
    train = v1.assign_add(step, tf.ones_like(step))
    sv = stage.supervisor()
    found = None if sv.global_step is None else sv.global_step.op.name

    def run() -> None:
        with sv.managed_session() as sess:
            begun(stage)
            for _ in range(3):
                sess.run(train)
                sv.should_stop()

    ran = outcome(run)
    return {"found": found, "ran": ran.get("error"), "starts": [e[1] for e in events(stage.logdir) if e[0] == "START"]}


@scene
def step_by_name(stage: Stage) -> Any:
    """An int64 variable of the right name that is in no collection."""
    stage.variable("global_step", (), tf.int64)
    return _step_of(stage)


@scene
def step_of_floats(stage: Stage) -> Any:
    stage.variable("global_step", (), tf.float32)
    return {**_step_of(stage), "collected": len(v1.get_collection(keys.GLOBAL_STEP))}


@scene
def step_of_shape_one(stage: Stage) -> Any:
    stage.variable("global_step", (1,), tf.int64, [keys.GLOBAL_VARIABLES, keys.GLOBAL_STEP])
    numpy_is_strict = tuple(map(int, np.__version__.split(".")[:2])) >= (2, 4)
    return {**_step_of(stage), "numpy is strict": numpy_is_strict}


@scene
def finalised(stage: Stage) -> Any:
    """The graph is finalised, a second Supervisor fits on it, and the event file has the saver's definition."""
    model = stage.model(summary=True)
    sv = stage.supervisor()
    adding = outcome(lambda: tf.constant(1).name)
    with sv.managed_session() as sess:
        begun(stage)
        steps(sv, sess, model, 2)
    second = stage.classes.Supervisor(logdir=str(stage.directory / "second"))
    with second.managed_session() as sess:
        steps(second, sess, model, 2)
        weights = sess.run(model.weights).tolist()
    meta = v1.MetaGraphDef()
    for name in event_files(stage.logdir):
        for event in v1.train.summary_iterator(str(Path(stage.logdir) / name)):
            if event.WhichOneof("what") == "meta_graph_def":
                meta.ParseFromString(event.meta_graph_def)
    return {
        "finalised": v1.get_default_graph().finalized, "adding": adding["error"], "second": weights,
        "saver": meta.saver_def.max_to_keep, "collections": sorted(meta.collection_def),
        "nodes": len(meta.graph_def.node) == len(v1.get_default_graph().get_operations()),
    }  # fmt: skip


@scene
def chief_only(stage: Stage) -> Any:
    with tf.device("/cpu:0"):
        stage.model(summary=True)
    sv = stage.supervisor(is_chief=False, save_summaries_secs=1, save_model_secs=1)
    names = ("save_summaries_secs", "save_model_secs", "save_path", "summary_writer")
    chief = stage.supervisor(save_summaries_secs=1, save_model_secs=2, checkpoint_basename="basename")
    return {
        "worker": [getattr(sv, name) for name in names],
        "chief": [chief.save_summaries_secs, chief.save_model_secs, Path(chief.save_path).name],
        "no logdir": stage.classes.Supervisor().save_path,
    }


@scene
def writers(stage: Stage) -> Any:
    """The default writer, a given one without a logdir, and none at all."""
    model = stage.model(summary=True)
    stage.supervisor()
    after_construction = files(stage.logdir)
    own = v1.summary.FileWriter(str(stage.directory / "own"))
    given = stage.classes.Supervisor(summary_writer=own)
    with given.managed_session() as sess:
        given.summary_computed(sess, sess.run(given.summary_op))
    own.close()
    none = stage.classes.Supervisor(logdir=str(stage.directory / "none"), summary_writer=None)
    with none.managed_session() as sess:
        until_checkpoint = begun(replace(stage, where="none"))
        steps(none, sess, model, 1)
    return {
        "at construction": after_construction,
        "given": [given.summary_writer is own, "total" in [event[0] for event in events(str(stage.directory / "own"))]],
        "none": [none.summary_writer is None, until_checkpoint, event_files(str(stage.directory / "none"))],
    }


@scene
def path_as_logdir(stage: Stage) -> Any:
    model = stage.model()

    def run() -> list[str]:
        sv = stage.classes.Supervisor(logdir=Path(stage.logdir))
        with sv.managed_session() as sess:
            steps(sv, sess, model, 2)
        return files(stage.logdir)

    return outcome(run)


@scene
def file_as_logdir(stage: Stage) -> Any:
    stage.model()
    Path(stage.logdir).write_text("a file")
    return outcome(lambda: type(stage.supervisor()).__name__)


@scene
def two_chiefs(stage: Stage) -> Any:
    stage.model()
    first, second = stage.supervisor(), stage.supervisor()
    with first.managed_session():
        begun(stage)

        def prepare() -> bool:
            sess = second.prepare_or_wait_for_session()
            second.stop()
            sess.close()
            return True

        return outcome(prepare)


class _Manager:
    """A session manager of the program's own, which notes what it is asked for."""

    def __init__(self, asked: list[Any]) -> None:
        self._asked = asked

    def prepare_session(self, master: str, **given: Any) -> Any:
        self._asked.append(["prepare", master, {name: _said(value) for name, value in given.items()}])
        sess = v1.Session(master)
        sess.run(given["init_op"])
        if given["init_fn"] is not None:
            given["init_fn"](sess)
        return sess

    def wait_for_session(self, master: str, **given: Any) -> Any:
        self._asked.append(["wait", master, {name: _said(value) for name, value in given.items()}])
        return v1.Session(master)


def _said(value: Any) -> Any:
    return value if value is None or isinstance(value, (bool, int, float)) else type(value).__name__


@scene
def own_session_manager(stage: Stage) -> Any:
    """Its answers are taken as they are: a ready op that is never ready changes nothing."""
    with tf.device("/cpu:0"):
        model = stage.model()
    asked: list[Any] = []
    manager = _Manager(asked)
    initialised: list[bool] = []
    given = {
        "session_manager": manager,
        "ready_op": tf.constant(["never"]),
        "local_init_op": tf.no_op(),
        "init_fn": lambda _: initialised.append(True),
    }
    sv = stage.supervisor(**given)
    sess = sv.prepare_or_wait_for_session("", None, True, 12.0)
    begun(stage)
    made = steps(sv, sess, model, 2)
    sv.stop()
    sess.close()
    worker = stage.supervisor(is_chief=False, **given)
    worker.prepare_or_wait_for_session(max_wait_secs=34.0).close()
    worker.stop()
    return {"asked": asked, "made": made, "init_fn": initialised, "same": sv.session_manager is manager}


@scene
def worker_without_device(stage: Stage) -> Any:
    stage.model()
    return outcome(lambda: type(stage.supervisor(is_chief=False)).__name__)


@once
def properties(stage: Stage) -> Any:
    stage.model()
    sv = stage.supervisor()
    kind = type(sv)
    return {
        "properties": {name: isinstance(inspect.getattr_static(kind, name), property) for name in PROPERTIES},
        "settable": [outcome(lambda name=name: setattr(sv, name, 1)).get("error") for name in PROPERTIES],
        "absent": [hasattr(sv, name) for name in ("graph", "logdir", "stop_grace_secs")],
    }


@scene
def again(stage: Stage) -> Any:
    """Prepared again after a stop: the coordinator is cleared, the writer open again."""
    model = stage.model(summary=True)
    sv = stage.supervisor()
    seen = []
    for _ in range(2):
        sess = sv.prepare_or_wait_for_session()
        begun(stage)
        seen.append([sv.should_stop(), sv.coord.joined, steps(sv, sess, model, 3), int(sess.run(model.step))])
        sv.summary_computed(sess, sess.run(sv.summary_op))
        sv.stop()
        seen.append([sv.should_stop(), sv.coord.joined])
        sess.close()
    counted = [event[:2] for event in events(stage.logdir) if event[0] in ("START", "STOP")]
    return {"seen": seen, "events": counted, "summaries": [e[1] for e in events(stage.logdir) if e[0] == "total"][-1]}
