"""What TensorBoard's own reader shows of a run that was killed again and again is what it shows of one that was not."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Final

import pytest

from .driving import newest_step, run, started

event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")

RATES: Final = {"global_step/sec"}
EVERYTHING: Final = {"scalars": 0, "tensors": 0, "histograms": 0, "images": 0}

Curves = dict[str, list[tuple[int, float]]]


def curves(logdir: Path) -> Curves:
    """The points of every tag but rates, as TensorBoard reads them."""
    accumulator = event_accumulator.EventAccumulator(str(logdir), size_guidance=EVERYTHING)
    accumulator.Reload()
    tags = set(accumulator.Tags()["scalars"]) - RATES
    return {tag: [(event.step, event.value) for event in accumulator.Scalars(tag)] for tag in tags}


def killed_and_resumed(program: str, logdir: Path, count: int, chance: random.Random, *arguments: str) -> None:
    """Let it be killed so many times, anywhere and inside saves, and then come to its end."""
    for cycle in range(count):
        extra = [f"--kill-at-disk-call={chance.randint(12, 80)}"] if cycle % 3 == 2 else []
        with started(program, logdir, *arguments, "--pause=0.005", *extra) as running:
            if not extra:
                running.wait_for(2 + chance.randrange(25))
                running.process.kill()
            running.end()
    last = run(program, logdir, *arguments)
    assert last.status == 0, last.errors


@pytest.mark.campaign(small=4, soak=20)
def test_curves_of_a_run_that_was_killed_are_those_of_one_that_was_not(tmp_path: Path, count: int, seed: int) -> None:
    arguments = ("--epochs=6", "--save-every=4")
    whole = run("numpy_training.py", tmp_path / "whole", *arguments)
    assert whole.status == 0, whole.errors
    expected = curves(tmp_path / "whole")
    assert expected.keys() == {"loss", "validation"}
    assert [step for step, _ in expected["loss"]] == list(range(2, 61, 2))
    assert [step for step, _ in expected["validation"]] == list(range(10, 61, 10))
    killed_and_resumed("numpy_training.py", tmp_path / "killed", count, random.Random(seed), *arguments)
    assert curves(tmp_path / "killed") == expected


@pytest.mark.parametrize("stop", ["--stop-at=13", "--stop-at=20", "--stop-in-validation=1"])
def test_curves_of_a_run_that_was_stopped_are_those_of_one_that_was_not(tmp_path: Path, stop: str) -> None:
    assert run("numpy_training.py", tmp_path / "whole").status == 0
    assert run("numpy_training.py", tmp_path / "stopped", *stop.split()).status == 143
    assert newest_step(tmp_path / "stopped") > 0
    assert run("numpy_training.py", tmp_path / "stopped").status == 0
    assert curves(tmp_path / "stopped") == curves(tmp_path / "whole")
