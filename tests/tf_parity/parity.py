"""One small program with TensorFlow's own classes and with ours: the same text, run twice, and what was seen twice.

A program that has to be in a mode of TensorFlow (modes are per process, and for ever) is a file of scenarios::

    from parity import Classes, main, scenario

    @scenario
    def what_it_shows(classes: Classes, directory: Path) -> Any:
        sv = classes.Supervisor(logdir=str(directory))
        return {"step": ...}                            # anything JSON can hold; tuples come back as lists

    if __name__ == "__main__":
        main()

and its tests ask ``observed("programs_x.py", "v1", "what_it_shows")`` for the pair of what was seen. A process runs all
scenarios of a file in one mode, each with TensorFlow's classes and then with ours, so TensorFlow is imported once for
each mode. Where both may not share a process, ``scenario(alone=True)`` gives each of the two runs one of its own.

Programs that need no graph (coordinators, threads) take ``theirs()`` and ``ours()`` in the process of the tests.
"""

from __future__ import annotations

import faulthandler
import fcntl
import functools
import json
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

MODES: Final = ("v1", "v2", "noeager")
"""``disable_v2_behavior()``, what ``import tensorflow`` gives, and ``disable_eager_execution()`` alone."""

SHARED: Path | None = None
"""Where the workers of one test run share what they saw; conftest.py sets it."""

_LIMIT: Final = 200.0
"""Seconds for all scenarios of one file in one mode; a machine that is busy needs 30."""
_ALONE: Final = "alone"
_HERE: Final = Path(__file__).parent


@dataclass(frozen=True)
class Classes:
    """The four classes, by TensorFlow or by us."""

    name: str
    """``theirs`` or ``ours``."""
    Supervisor: Any
    Coordinator: Any
    LooperThread: Any
    SessionManager: Any

    @property
    def are_ours(self) -> bool:
        return self.name == "ours"

    def __str__(self) -> str:
        return self.name


@functools.cache
def theirs() -> Classes:
    """TensorFlow's own."""
    import tensorflow as tf
    from tensorflow.python.training import coordinator

    train = tf.compat.v1.train
    return Classes("theirs", train.Supervisor, train.Coordinator, coordinator.LooperThread, train.SessionManager)


@functools.cache
def ours() -> Classes:
    """The drop-in."""
    import supervise_tf

    return Classes(
        "ours", supervise_tf.Supervisor, supervise_tf.Coordinator, supervise_tf.LooperThread,
        supervise_tf.SessionManager,
    )  # fmt: skip


def outcome(call: Callable[[], Any]) -> dict[str, Any]:
    """What a call gave or raised, so that it can be compared and sent: ``value``, or ``error`` and its bases' names."""
    try:
        return {"value": call()}
    except BaseException as error:
        bases = [kind.__name__ for kind in type(error).__mro__]
        return {"error": bases[0], "bases": bases, "message": str(error), "notes": getattr(error, "__notes__", [])}


def is_kind(seen: dict[str, Any], name: str) -> bool:
    """Whether an ``outcome`` is an exception of that class or a class derived from it."""
    return name in seen.get("bases", ())


# ---- the side of the tests


@dataclass(frozen=True, slots=True)
class Pair:
    """What was seen with TensorFlow's classes and with ours."""

    theirs: Any
    ours: Any


def observed(program: str, mode: str, name: str) -> Pair:
    """What a scenario of a program saw, in that mode.

    :raises AssertionError: if the scenario failed, or the process did before it; with all that is known of it.
    """
    found = _run(program, mode, "")
    if any(found.get(f"{name} {whose}") == _ALONE for whose in ("theirs", "ours")):
        found = {**_run(program, mode, f"{name} theirs"), **_run(program, mode, f"{name} ours")}
    return Pair(_seen(found, f"{name} theirs"), _seen(found, f"{name} ours"))


def _seen(found: dict[str, Any], key: str) -> Any:
    if key not in found:
        raise AssertionError(f"{key}: never came to it\n{found['']}")
    if (failed := found[key].get("failed")) is not None:
        raise AssertionError(f"{key}: {failed}\n{found['']}")
    return found[key]["seen"]


@functools.cache
def _run(program: str, mode: str, only: str) -> dict[str, Any]:
    """What a process said, by scenario; and under the empty name how it ended, and what it had to complain of.

    Of several workers of one test run the first one starts it, and the others wait for what it saw.
    """
    if SHARED is None:
        return _started(program, mode, only)
    kept = SHARED / f"parity {program} {mode} {only}".replace(" ", "-")
    with kept.with_name(f"{kept.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not kept.exists():
            kept.write_text(json.dumps(_started(program, mode, only)))
        found: dict[str, Any] = json.loads(kept.read_text())
        return found


def _started(program: str, mode: str, only: str) -> dict[str, Any]:
    command = [sys.executable, str(_HERE / program), mode, only]
    environment = os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": "-1"}
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment)
        try:
            said, _ = process.communicate(timeout=_LIMIT + 10)
        except subprocess.TimeoutExpired:
            process.kill()
            said, _ = process.communicate()
        errors.seek(0)
        found: dict[str, Any] = {"": f"{program} {mode}: exit status {process.returncode}\n{errors.read()[-6000:]}"}
    for line in said.splitlines():
        if line.startswith("{") and line.endswith("}"):
            found.update(json.loads(line))
    return found


# ---- the side of the programs


Scenario = Callable[[Classes, Path], Any]

_scenarios: Final[dict[str, tuple[Scenario, tuple[str, ...], bool]]] = {}


def scenario(
    function: Scenario | None = None, *, modes: Iterable[str] = MODES, alone: bool = False
) -> Callable[..., Any]:
    """Make this function one of its file's scenarios, in those modes; ``alone``: in processes of its own."""

    def add(function: Scenario) -> Scenario:
        _scenarios[function.__name__] = function, tuple(modes), alone
        return function

    return add if function is None else add(function)


def main() -> None:
    """Run all scenarios of this file in the mode of the first argument; the second chooses one, of ours or theirs."""
    mode, only = sys.argv[1:]
    faulthandler.dump_traceback_later(_LIMIT, exit=True)
    import tensorflow as tf

    if mode == "v1":
        tf.compat.v1.disable_v2_behavior()
    elif mode == "noeager":
        tf.compat.v1.disable_eager_execution()
    for name, (function, modes, alone) in _scenarios.items():
        for classes in (theirs(), ours()):
            key = f"{name} {classes}"
            if mode not in modes or (only and key != only):
                continue
            _say({key: _ALONE if alone and not only else _watched(function, classes)})
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # a scenario may leave threads behind that never end, and TensorFlow waits for some of them


def _watched(function: Scenario, classes: Classes) -> dict[str, Any]:
    import tensorflow as tf

    with tempfile.TemporaryDirectory() as directory:
        try:
            with tf.Graph().as_default():
                seen = function(classes, Path(directory))
            json.dumps(seen)
        except BaseException:
            return {"failed": traceback.format_exc()}
        return {"seen": seen}


def _say(facts: dict[str, Any]) -> None:
    print(json.dumps(facts), flush=True)
