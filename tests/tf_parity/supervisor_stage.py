"""What the scenes of a Supervisor share: small models with variables of both kinds, and eyes for what a run leaves.

A scene is a scenario of the harness that is played with ref variables and with resource variables. In TensorFlow's
default mode only ours plays, since there TensorFlow's own ends at its first service; a scene about just that says so.
"""

from __future__ import annotations

import logging
import re
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from parity import MODES, Classes, scenario

_LIMIT: Final = 30.0
_EVENTS: Final = "events.out.tfevents."


@dataclass(frozen=True)
class Model:
    """A matrix that each step adds one to, and perhaps a global step."""

    weights: Any
    step: Any
    train: Any


@dataclass(frozen=True)
class Stage:
    """Where one scene is played: by whose classes, in which directory, with which kind of variables."""

    classes: Classes
    directory: Path
    kind: str
    where: str = "logdir"

    @property
    def logdir(self) -> str:
        return str(self.directory / self.where)

    @property
    def is_resource(self) -> bool:
        return self.kind == "resource"

    def supervisor(self, **given: Any) -> Any:
        """A Supervisor on the log directory."""
        return self.classes.Supervisor(**{"logdir": self.logdir, **given})

    def variable(self, name: str, shape: tuple[int, ...] = (), dtype: Any = None, collections: Any = None) -> Any:
        import tensorflow as tf

        v1 = tf.compat.v1
        return v1.get_variable(
            name, shape, dtype or tf.float32, initializer=v1.zeros_initializer(), trainable=False,
            collections=collections, use_resource=self.is_resource,
        )  # fmt: skip

    def model(self, step: str | None = "global_step", summary: bool = False, shape: tuple[int, ...] = (2,)) -> Model:
        """A model in the default graph."""
        import tensorflow as tf

        v1 = tf.compat.v1
        weights = self.variable("weights", shape)
        adding = [v1.assign_add(weights, tf.ones_like(weights))]
        global_step = None
        if step is not None:
            keys = v1.GraphKeys
            global_step = self.variable(step, (), tf.int64, [keys.GLOBAL_VARIABLES, keys.GLOBAL_STEP])
            adding.append(v1.assign_add(global_step, tf.constant(1, tf.int64)))
        if summary:
            v1.summary.scalar("total", tf.reduce_sum(weights))
        return Model(weights, global_step, tf.group(*adding))

    def fresh(self) -> Any:
        """A new graph as the default one."""
        import tensorflow as tf

        return tf.Graph().as_default()


Scene = Callable[[Stage], Any]


def scene(
    function: Scene | None = None,
    *,
    kinds: Iterable[str] = ("ref", "resource"),
    modes: Iterable[str] = MODES,
    theirs_in_v2: bool = False,
    core: bool = False,
) -> Callable[..., Any]:
    """Register a scene as one scenario for each kind of variables.

    By default a mode has the kind that is its own: ref variables with ``disable_v2_behavior()``, and resource variables
    in the others. The ``core`` scenes are played with both kinds in every mode.
    """

    def add(function: Scene) -> Scene:
        for kind in kinds:
            played = tuple(mode for mode in modes if core or (mode == "v1") == (kind == "ref"))
            _register(function, kind, played, theirs_in_v2)
        return function

    return add if function is None else add(function)


def once(function: Scene) -> Scene:
    """A scene that neither the mode nor the kind of variables can change, or that takes long."""
    return scene(kinds=("ref",), modes=("v1",))(function)  # type: ignore[no-any-return]


def _register(function: Scene, kind: str, modes: tuple[str, ...], theirs_in_v2: bool) -> None:
    def play(classes: Classes, directory: Path) -> Any:
        if sys.argv[1] == "v2" and not classes.are_ours and not theirs_in_v2:
            return None
        began = time.monotonic()
        try:
            return function(Stage(classes, directory, kind))
        finally:
            print(f"{time.monotonic() - began:6.2f} s {play.__name__} {classes}", file=sys.stderr)

    play.__name__ = f"{function.__name__}_{kind}"
    scenario(modes=modes)(play)


# ---- while a run goes on


def until(predicate: Callable[[], Any], limit: float = _LIMIT) -> bool:
    """Wait until something is so; whether it came to that."""
    deadline = time.monotonic() + limit
    while not predicate():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.002)
    return True


def steps(sv: Any, sess: Any, model: Model, number: int) -> int:
    """The usual loop, for so many steps; how many were made."""
    made = 0
    while not sv.should_stop() and made < number:
        sess.run(model.train)
        made += 1
    return made


def begun(stage: Stage) -> bool:
    """Wait for the checkpoint that every fresh run begins with, with all of its files."""
    logdir = Path(stage.logdir)
    return until(lambda: (logdir / "checkpoint").exists() and list(logdir.glob("model.ckpt*.meta")))


def is_closed(sess: Any) -> bool:
    """Whether a session was closed."""
    try:
        sess.run(sess.graph.get_operations()[0])
    except RuntimeError as error:
        return "closed" in str(error)
    return False


def in_thread(call: Callable[[], Any]) -> Any:
    """What a call in a thread of its own gives, where no graph is the default one."""
    gave: list[Any] = []
    thread = threading.Thread(target=lambda: gave.append(call()))
    thread.start()
    thread.join()
    return gave[0]


@contextmanager
def threads_that_stay() -> Generator[list[str], None, None]:
    """Filled at the end with the names of threads that began in the block and have not ended soon after it."""
    before = set(threading.enumerate())
    left: list[str] = []
    try:
        yield left
    finally:
        until(lambda: not set(threading.enumerate()) - before, 2.0)
        left.extend(thread.name for thread in set(threading.enumerate()) - before)


@contextmanager
def logged() -> Generator[list[list[str]], None, None]:
    """Filled with level and text of what TensorFlow and we log in the block, from INFO on."""
    said: list[list[str]] = []
    handler = logging.Handler(logging.INFO)
    handler.emit = lambda record: said.append([record.levelname, record.getMessage()])  # type: ignore[method-assign]
    loggers = [logging.getLogger(name) for name in ("tensorflow", "supervise_tf", "supervise_core")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
    try:
        yield said
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.removeHandler(handler)
            logger.setLevel(level)


def at(level: str, said: list[list[str]]) -> list[str]:
    """The texts of one level."""
    return [text for name, text in said if name == level]


# ---- what it leaves


def files(logdir: str) -> list[str]:
    """The files in a log directory that TensorFlow knows, sorted; event files without what differs each time."""
    path = Path(logdir)
    known = re.compile(r"checkpoint|graph\.pbtxt|model\.ckpt(-[\d.]+)?\.(index|meta|data-\d+-of-\d+)")
    names = [entry.name for entry in path.iterdir()] if path.is_dir() else []
    return sorted(
        [_EVENTS] * any(name.startswith(_EVENTS) for name in names) + [n for n in names if known.fullmatch(n)]
    )


def event_files(logdir: str) -> list[str]:
    """The names of the event files."""
    return sorted(path.name for path in Path(logdir).glob(_EVENTS + "*"))


def checkpoints(logdir: str) -> list[str]:
    """The names of the checkpoints, from the oldest to the newest."""
    found = [path.name.removesuffix(".index") for path in Path(logdir).glob("model.ckpt*.index")]
    return sorted(found, key=lambda name: float(name.partition("-")[2] or -1))


def step_of(name: str) -> int:
    """The step in the name of a checkpoint."""
    return int(float(name.partition("-")[2]))


def tensors(logdir: str, name: str) -> dict[str, Any]:
    """What a checkpoint holds, read by TensorFlow."""
    import tensorflow as tf

    reader = tf.train.load_checkpoint(str(Path(logdir) / name))
    return {key: reader.get_tensor(key).tolist() for key in sorted(reader.get_variable_to_shape_map())}


def events(logdir: str) -> list[list[Any]]:
    """What the event files hold, in order: kind, step, and the status of a session log or the tags of a summary."""
    import tensorflow as tf

    status = tf.compat.v1.SessionLog.SessionStatus
    found: list[list[Any]] = []
    for name in event_files(logdir):
        for event in _readable(str(Path(logdir) / name)):
            kind = event.WhichOneof("what")
            if kind == "session_log":
                log = event.session_log
                found.append([status.Name(log.status), event.step, log.checkpoint_path, log.msg])
            elif kind == "summary":
                found.extend([value.tag, event.step, value.simple_value] for value in event.summary.value)
            else:
                found.append([kind, event.step])
    return found


def _readable(path: str) -> Generator[Any, None, None]:
    """The events of a file up to where a writer that buffers has come."""
    import tensorflow as tf

    try:
        yield from tf.compat.v1.train.summary_iterator(path)
    except tf.errors.DataLossError:
        return


def kinds_of(found: list[list[Any]]) -> list[str]:
    """Only what they are."""
    return [event[0] for event in found]


def without_service_events(found: list[list[Any]]) -> list[list[Any]]:
    """Kind and step of all events but those whose number depends on how fast the machine is."""
    return [event[:2] for event in found if not event[0].endswith("/sec") and event[0] != "CHECKPOINT"]
