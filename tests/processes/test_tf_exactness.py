"""A TensorFlow run that was killed and started again ends bit for bit as one that never was; what cannot is named."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from supervise_core.testing.clock import eventually

from .driving import Outcome
from .tf_driving import KINDS, MODES, run, started

PROGRAM = "tf_training.py"
STEPS = 60


@functools.cache
def uninterrupted(*arguments: str) -> Outcome:
    """What a run that nothing happens to says. Made once for each way to run the program."""
    with tempfile.TemporaryDirectory() as logdir:
        outcome = run(PROGRAM, logdir, *arguments)
    assert outcome.status == 0, outcome.errors
    assert len(outcome.steps) == STEPS
    return outcome


def step_to_come(logdir: Path) -> int:
    """The step that the next start restores: of the newest checkpoint that was taken at a boundary; 0 if none is."""
    found = [0]
    for index in logdir.glob("model.ckpt-*.index"):
        with contextlib.suppress(FileNotFoundError):  # removed meanwhile
            manifest = json.loads(index.with_name(f"{index.stem}.manifest.json").read_bytes())
            found += [int(manifest["step"])] * manifest["consistent"]
    return max(found)


def check_end(part: Outcome, whole: Outcome) -> None:
    assert part.status == 0, part.errors
    assert part.done is not None
    assert whole.done is not None
    assert (part.done["done"], part.done["weights"]) == (STEPS, whole.done["weights"])


def check_part(part: Outcome, whole: Outcome, begun: int) -> None:
    """It goes on from that step, and every step that it makes is one of the whole run."""
    assert part.begin["begin"] == begun, part.errors
    assert [step for step, _ in part.steps] == list(range(begun + 1, begun + 1 + len(part.steps)))
    assert set(part.steps) <= set(whole.steps)


@pytest.mark.campaign(small=3, soak=20)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", MODES)
def test_tf_killed_anywhere(tmp_path: Path, mode: str, kind: str, count: int, seed: int) -> None:
    """Kill a run at a random moment, or inside a save, so many times, let it come to its end, and compare."""
    chance = random.Random(f"{seed} {mode} {kind}")
    optimizer = ("adam", "momentum")[(MODES.index(mode) + KINDS.index(kind)) % 2]
    arguments = (f"--mode={mode}", f"--kind={kind}", f"--optimizer={optimizer}")
    whole = uninterrupted(*arguments)
    often = ("--save-secs=0.04", "--pause=0.01")
    kills = inside_a_save = attempts = resumed = 0
    logdir = tmp_path / "first"
    while kills < count and attempts < 3 * count + 3:
        attempts += 1
        begun = step_to_come(logdir)
        inside = kills % 2 == 0
        extra = [f"--kill-at-disk-call={chance.randint(39, 120)}"] if inside else []
        with started(PROGRAM, logdir, *arguments, *often, *extra) as running:
            if not inside:
                running.wait_for(1 + chance.randrange(max(1, (STEPS - begun) // 2)))
                eventually(lambda here=logdir: step_to_come(here) > 0 or running.process.poll() is not None)
                running.process.kill()
            part = running.end()
        assert part.status in (-9, 0), part.errors
        if part.said:
            check_part(part, whole, begun)
            resumed += begun > 0
        kills += part.status == -9
        inside_a_save += inside and part.status == -9
        if part.status == 0:  # it came to its end before the kill did; the next one begins anew
            check_end(part, whole)
            logdir = tmp_path / f"after {kills} kills, {attempts}"
    assert kills == count
    assert inside_a_save >= count // 3
    assert resumed or count < 3
    begun = step_to_come(logdir)
    last = run(PROGRAM, logdir, *arguments)
    check_part(last, whole, begun)
    check_end(last, whole)


# ---- what cannot be exact is named


def dropout(tf: Any, x: Any) -> Any:
    return tf.nn.dropout(x, 0.5, name="drop")


def uniform(tf: Any, x: Any) -> Any:
    return x + tf.random.uniform((3,), name="noise")


def shuffled(tf: Any, x: Any) -> Any:
    return x + tf.cast(tf.random.shuffle(tf.range(3), name="order"), tf.float32)


def stateless(tf: Any, x: Any) -> Any:
    step = tf.compat.v1.train.get_global_step()
    return x + tf.random.stateless_uniform((3,), seed=[7, tf.cast(tf.identity(step), tf.int32)])


def nothing(tf: Any, x: Any) -> Any:
    return x


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("noise", "named"),
    [(dropout, "drop"), (uniform, "noise"), (shuffled, "order"), (stateless, None), (nothing, None)],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_random_ops_in_training_are_named_once(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    kind: str,
    noise: Callable[[Any, Any], Any],
    named: str | None,
) -> None:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    tf = pytest.importorskip("tensorflow")
    from supervise_tf import Supervisor

    v1 = tf.compat.v1
    with tf.Graph().as_default():
        v1.train.get_or_create_global_step()
        initial = v1.random_uniform_initializer()  # draws, but only before the first step
        w = v1.get_variable("w", (3,), initializer=initial, use_resource=kind == "resource")
        v1.get_variable("v", (3, 3), initializer=v1.glorot_normal_initializer(), use_resource=kind == "resource")
        loss = tf.reduce_sum(tf.square(noise(tf, w + 1.0)))
        train = v1.train.GradientDescentOptimizer(0.1).minimize(loss, global_step=v1.train.get_global_step())
        sv = Supervisor(logdir=tmp_path, save_model_secs=0.01)
        with caplog.at_level(logging.WARNING), sv.managed_session() as sess:
            while not sv.should_stop() and sv.report.saves < 3:
                sess.run(train)
    warnings = [record.getMessage() for record in caplog.records if "random state inside" in record.getMessage()]
    assert len(warnings) == (named is not None)
    assert all(named in warning for warning in warnings if named is not None)
