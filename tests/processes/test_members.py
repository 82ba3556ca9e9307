"""Several processes of one run: they stop together, name who is missing, and none is left when one is hurt."""

from __future__ import annotations

import itertools
import random
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from .driving import Outcome, Running, newest_step, started

GRACE = 2.0
SILENCE = 2.0
NOISE = 8.0
"""Seconds by which a machine that is busy with other tests may be late."""

FAULTS = ["exception", "sleep", "freeze", "kill", "hold"]
PLACES = ["step", "service", "save", "barrier", "start"]


@contextmanager
def members(
    logdir: Path, size: int, *options: object, of: dict[int, list[object]] | None = None
) -> Iterator[list[Running]]:
    """All members of a run, as processes; ``of``: options that one of them has besides."""
    with ExitStack() as stack:
        yield [
            stack.enter_context(started("members.py", logdir, rank, size, *options, *(of or {}).get(rank, [])))
            for rank in range(size)
        ]


def ended(running: list[Running], limit: float = 60.0) -> list[Outcome]:
    return [one.end(limit) for one in running]


# ---- waiting


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.campaign(small=2, soak=3)
def test_a_worker_waits_as_long_as_it_may_and_names_who_is_missing(tmp_path: Path, apart: bool, count: int) -> None:
    for limit in (0.1, 2.0, 20.0)[:count]:
        with started("members.py", tmp_path, 1, 2, "--max-wait", limit, *(["--apart"] if apart else [])) as worker:
            outcome = worker.end()
        [failed] = [facts for facts in outcome.said if "error" in facts]
        assert outcome.status == 1
        waited = f"waited {limit:g} s for the chief's model: rank 0, the chief, has not come to {tmp_path}"
        assert failed["error"].startswith(f"ChiefNeverCameError: {waited}")
        assert limit <= failed["waited"] < limit + 0.5 + 2.0, "half a second, and two for a machine that is busy"


def test_a_chief_names_the_worker_that_does_not_come(tmp_path: Path) -> None:
    with (
        started("members.py", tmp_path, 0, 3, "--max-wait", 2) as chief,
        started("members.py", tmp_path, 1, 3, "--max-wait", 30) as worker,
    ):
        first, second = chief.end(), worker.end()
    assert "waited 2 s until all ranks have the model: rank 2, which never came" in first.errors
    assert first.status == second.status == 1
    assert "rank 0" in second.errors


# ---- stops


@pytest.mark.campaign(small=3, soak=60)
def test_a_stop_of_one_stops_all_at_one_step_and_is_resumed_exactly(tmp_path: Path, count: int, seed: int) -> None:
    chance = random.Random(seed)
    with members(tmp_path / "whole", 3, "--steps", 30, "--pause", 0) as running:
        whole = [outcome.done for outcome in ended(running)]
    for number in range(count):
        logdir = tmp_path / str(number)
        with members(logdir, 3, "--steps", 30) as running:
            victim = running[chance.randrange(3)]
            victim.wait_for(chance.randrange(1, 25))
            victim.wait_until_it_heeds(signal.SIGTERM)
            victim.signal(signal.SIGTERM)
            outcomes = ended(running)
        assert [outcome.status for outcome in outcomes] == [143] * 3, [outcome.errors for outcome in outcomes]
        lasts = {outcome.done["done"] for outcome in outcomes if outcome.done}
        assert len(lasts) == 1
        if lasts != {0}:
            assert newest_step(logdir) == lasts.pop()
        with members(logdir, 3, "--steps", 30, "--pause", 0) as running:
            again = ended(running)
        assert [outcome.status for outcome in again] == [0] * 3, [outcome.errors for outcome in again]
        for outcome, expected in zip(again, whole, strict=True):
            assert outcome.done is not None
            assert expected is not None
            assert outcome.done["weights"] == expected["weights"]
            assert outcome.done["randomness"] == expected["randomness"]


def test_apart_a_worker_that_is_killed_comes_back_and_the_others_go_on(tmp_path: Path) -> None:
    with members(tmp_path, 3, "--apart", "--steps", 100_000) as [chief, one, two]:
        assert two.wait_for(5)
        one.signal(signal.SIGKILL)
        one.end()
        with started("members.py", tmp_path, 1, 3, "--apart", "--steps", 100_000) as back:
            assert back.wait_for(10)
            assert chief.process.poll() is None
            assert two.process.poll() is None
            chief.signal(signal.SIGTERM)
            outcomes = ended([chief, back, two])
    assert outcomes[0].status == 143, outcomes[0].errors
    assert [outcome.status for outcome in outcomes[1:]] == [143, 143], outcomes[1].errors


def test_apart_a_chief_that_is_killed_comes_back_and_does_not_begin_anew(tmp_path: Path) -> None:
    with members(tmp_path, 2, "--apart", "--steps", 100_000) as [chief, worker]:
        assert chief.wait_for(30)
        chief.signal(signal.SIGKILL)
        chief.end()
        newest = newest_step(tmp_path)
        heard = len(worker.said)
        with started("members.py", tmp_path, 0, 2, "--apart", "--steps", 100_000) as back:
            assert back.wait_for(5)
            assert worker.wait_for(heard + 20)
            back.signal(signal.SIGTERM)
            outcomes = ended([back, worker])
    assert outcomes[0].begin["begin"] >= newest > 0
    assert [outcome.status for outcome in outcomes] == [143, 143], outcomes[1].errors


# ---- faults


def cases(seed: int) -> list[tuple[str, str, int]]:
    """Every fault at every place, of the chief and of a worker, in an order of chance."""
    found = list(itertools.product(FAULTS, PLACES, (0, 2)))
    random.Random(seed).shuffle(found)
    return found


@pytest.mark.campaign(small=6, soak=50)
def test_survivors_of_a_fault_end_in_time_and_say_whose_it_was(tmp_path: Path, count: int, seed: int) -> None:
    late = []
    for number, (fault, where, rank) in enumerate(cases(seed)[:count]):
        late += [
            f"{fault} in {where} on rank {rank}: {text}" for text in strike(tmp_path / str(number), fault, where, rank)
        ]
    assert not late, "\n".join(late)


def strike(logdir: Path, fault: str, where: str, rank: int) -> list[str]:
    """Have one of three processes hurt itself; what is wrong with what follows."""
    options = ["--grace", GRACE, "--silence", SILENCE, "--comeback", SILENCE, "--pause", 0.01]
    wrong = []
    if (fault, where, rank) == (
        "kill",
        "start",
        0,
    ):  # to who comes later it may be of an earlier run
        options += ["--max-wait", 2 * GRACE]
    with members(logdir, 3, *options, of={rank: ["--fault", fault, "--where", where]}) as running:
        victim, survivors = running[rank], [one for other, one in enumerate(running) if other != rank]
        if not heard_of_fault(victim):
            return [f"it never came: {victim.errors}"]
        struck = time.monotonic()
        if fault == "sleep":  # nobody can tell it from a long step, until a stop is asked for
            survivors[0].wait_until_it_heeds(signal.SIGTERM)
            survivors[0].signal(signal.SIGTERM)
        allowed = GRACE + 2 + NOISE + (SILENCE * 1.5 if fault in ("freeze", "hold") else 0)
        for one in survivors:
            try:
                one.end(max(0.1, struck + allowed - time.monotonic()))
            except Exception as error:
                wrong.append(f"a survivor is left ({type(error).__name__}): {''.join(one.errors)[-3000:]}")
        took = time.monotonic() - struck
        if fault == "freeze":
            victim.signal(signal.SIGKILL)  # its launcher does
        try:
            victim.end(max(0.1, struck + allowed + SILENCE - time.monotonic()))
        except Exception as error:
            wrong.append(f"the victim is left ({type(error).__name__}): {''.join(victim.errors)[-3000:]}")
        said = "".join(text for one in survivors for text in one.errors)
        if fault != "sleep" and f"rank {rank}" not in said:
            wrong.append(f"nobody names rank {rank}: {said[-3000:]}")
        if fault in ("sleep", "hold") and "members.py" not in "".join(victim.errors):
            wrong.append(f"the victim does not say where it was: {''.join(victim.errors)[-3000:]}")
    print(f"{fault} in {where} on rank {rank}: {took:.1f} s, {[one.process.returncode for one in running]}")
    return wrong


def heard_of_fault(victim: Running) -> bool:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if any("fault" in facts for facts in list(victim.said)):
            return True
        if victim.process.poll() is not None and not victim._listeners[0].is_alive():
            break
        time.sleep(0.01)
    return any("fault" in facts for facts in victim.said)
