"""A run that was killed or stopped, and started again, ends bit for bit as one that never was."""

from __future__ import annotations

import functools
import random
import tempfile
from pathlib import Path
from typing import Final

import pytest

from .driving import Outcome, newest_step, run, started

TORCH: Final = "torch_training.py"
NUMPY: Final = "numpy_training.py"
PAUSE: Final = "--pause=0.01"


@pytest.fixture(autouse=True)
def _needs_torch(request: pytest.FixtureRequest) -> None:
    if "numpy" not in request.node.name:
        pytest.importorskip("torch")


@functools.cache
def uninterrupted(program: str, *arguments: str) -> Outcome:
    """What a run that nothing happens to says. Made once for each way to run a program."""
    with tempfile.TemporaryDirectory() as logdir:
        outcome = run(program, logdir, *arguments)
    assert outcome.status == 0, outcome.errors
    assert outcome.done is not None
    return outcome


def check_part(part: Outcome, whole: Outcome, newest: int) -> None:
    """Every step that a part of a run makes is one of the whole run, and its first one is the one that comes next."""
    assert part.begin["begin"] == newest, part.errors
    following = [step for step, _ in part.steps if step > newest]
    if following and len(set(whole.steps)) == len(whole.steps):
        assert following[0] == newest + 1
    assert set(part.steps) <= set(whole.steps)


def check_end(last: Outcome, whole: Outcome) -> None:
    assert last.status == 0, last.errors
    assert last.done == whole.done


def killed_again_and_again(
    program: str, arguments: tuple[str, ...], logdir: Path, kills: int, chance: random.Random, epochs: int = 4
) -> None:
    """Kill a program so many times, each time in one of three ways, let it come to its end, and compare."""
    whole = uninterrupted(program, *arguments)
    total = len(whole.said)
    inside_a_save = between_epoch_and_scheduler = 0
    again, kill, attempts = logdir, 0, 0
    while kill < kills and attempts < 3 * kills + 3:
        attempts += 1
        newest = newest_step(logdir)
        way = ("anywhere", "save", "scheduler", "anywhere")[kill % 4] if kill else "save"
        extra: list[str] = []
        if way == "save":
            extra = [f"--kill-at-disk-call={chance.randint(12, 60)}"]
        elif way == "scheduler":
            begun = min(epochs - 1, newest // max(1, whole.steps[-1][0] // epochs))
            extra = [f"--kill-before-scheduler={chance.randint(begun, min(begun + 1, epochs - 1))}"]
        with started(program, logdir, *arguments, PAUSE, *extra) as running:
            if way == "anywhere":
                left = total * (1 - newest / whole.steps[-1][0])
                running.wait_for(1 + chance.randrange(max(1, int(left / (kills - kill)))))
                running.process.kill()
            part = running.end()
        assert part.status in (-9, 0), part.errors
        if any("begin" in facts for facts in part.said):
            check_part(part, whole, newest)
        inside_a_save += way == "save" and part.status == -9
        between_epoch_and_scheduler += way == "scheduler" and part.status == -9
        kill += part.status == -9
        if part.status == 0:  # it came to its end before the kill did; the next one begins anew
            check_end(part, whole)
            logdir = again / f"after {kill} kills, {attempts}"
    assert kill == kills
    assert inside_a_save >= kills // 4
    newest = newest_step(logdir)
    last = run(program, logdir, *arguments)
    if newest < whole.steps[-1][0]:
        check_part(last, whole, newest)
        check_end(last, whole)


@pytest.mark.campaign(small=4, soak=20)
@pytest.mark.parametrize("data", ["shuffled", "cursor"])
@pytest.mark.parametrize("counting", ["counted", "uncounted"])
def test_numpy_killed_anywhere(tmp_path: Path, data: str, counting: str, count: int, seed: int) -> None:
    arguments = (f"--data={data}", *(["--uncounted"] if counting == "uncounted" else []))
    chance = random.Random(f"{seed} {data} {counting}")
    killed_again_and_again(NUMPY, arguments, tmp_path, count, chance)


@pytest.mark.campaign(small=3, soak=20)
@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param((), id="no workers"),
        pytest.param(("--workers=2",), id="two workers"),
        pytest.param(("--workers=2", "--persistent"), id="two persistent workers"),
        pytest.param(("--accumulate=4", "--samples=80"), id="groups of 4 in epochs of 10 batches"),
        pytest.param(("--skip",), id="skipped AMP steps"),
    ],
)
def test_torch_killed_anywhere(tmp_path: Path, arguments: tuple[str, ...], count: int, seed: int) -> None:
    killed_again_and_again(TORCH, arguments, tmp_path, count, random.Random(f"{seed} {arguments}"))


def stopped_and_resumed(
    program: str, arguments: tuple[str, ...], stops: tuple[str, ...], logdir: Path
) -> list[Outcome]:
    """Stop a program so, one time after another, let it come to its end, and compare."""
    whole = uninterrupted(program, *arguments)
    parts: list[Outcome] = []
    for stop in stops:
        newest = newest_step(logdir)
        part = run(program, logdir, *arguments, *stop.split())
        assert part.status == 143, part.errors
        check_part(part, whole, newest)
        assert part.done is None
        parts.append(part)
    newest = newest_step(logdir)
    last = run(program, logdir, *arguments)
    check_part(last, whole, newest)
    check_end(last, whole)
    return [*parts, last]


_LEAVE: Final = [
    pytest.param("--stop-at=13", id="the iterators end"),
    pytest.param("--stop-at=13 --leave=before", id="break before training"),
    pytest.param("--stop-at=13 --leave=after", id="break after training"),
    pytest.param("--stop-in-validation=1", id="in validation"),
    pytest.param("--stop-in-validation=1 --leave=unscheduled", id="in validation and break before the scheduler"),
    pytest.param("--stop-in-validation=1 --leave=scheduled", id="in validation and break after the scheduler"),
    pytest.param("--stop-at=10 --leave=scheduled", id="at the last item of an epoch"),
]


@pytest.mark.parametrize("stop", _LEAVE)
@pytest.mark.parametrize(
    "arguments", [(), ("--data=cursor",), ("--uncounted",)], ids=["counted", "cursor", "uncounted"]
)
def test_numpy_stopped_and_resumed(tmp_path: Path, arguments: tuple[str, ...], stop: str) -> None:
    stopped_and_resumed(NUMPY, arguments, (stop, "--stop-at=4", "--stop-in-validation=3"), tmp_path)


@pytest.mark.parametrize("stop", _LEAVE)
def test_torch_stopped_and_resumed(tmp_path: Path, stop: str) -> None:
    first, last = stopped_and_resumed(TORCH, (), (stop,), tmp_path)
    if "--stop-at=13" in stop:  # nothing was lost
        made = {"before": 12}.get(stop.rpartition("=")[2], 13)
        assert last.begin["begin"] == len(first.steps) >= made


@pytest.mark.parametrize("leave", ["", "--leave=before", "--leave=after"])
def test_torch_stopped_in_the_middle_of_an_accumulation(tmp_path: Path, leave: str) -> None:
    arguments = ("--accumulate=4", "--samples=80", "--workers=2")
    stopped_and_resumed(TORCH, arguments, (f"--stop-at=13 {leave}",), tmp_path)


def test_torch_accumulation_across_the_ends_of_epochs(tmp_path: Path) -> None:
    arguments = ("--accumulate=4", "--samples=80", "--carry")
    stopped_and_resumed(TORCH, arguments, ("--stop-at=11", "--stop-at=3"), tmp_path)


@pytest.mark.parametrize("leave", ["", "--leave=after"])
def test_torch_stopped_among_skipped_steps(tmp_path: Path, leave: str) -> None:
    stopped_and_resumed(TORCH, ("--skip",), (f"--stop-at=13 {leave}", f"--stop-at=4 {leave}"), tmp_path)
