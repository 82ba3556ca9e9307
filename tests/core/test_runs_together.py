"""Whole runs that belong together, each in a thread: what one of them does and all must."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from supervise_core import CheckpointDirectory, EverySteps, KeepAll, KeepBest, KeepLatest, MemberFailedError, Supervisor
from supervise_core.board import Board
from supervise_core.clock import Clock
from supervise_core.membership import Membership
from supervise_core.testing.boards import MemoryBoard, MemoryPlace
from supervise_numpy import ArrayBackend

Training = Callable[[Supervisor[Any], Any, int], None]

SIZE = 3


class MemoryMembership(Membership):
    """Members that meet in memory."""

    def __init__(self, place: MemoryPlace, rank: int) -> None:
        super().__init__(rank, SIZE, synchronous=True)
        self._place = place

    def connect(self, clock: Clock) -> Board:
        return MemoryBoard(self._place, clock)


class Together:
    """Runs in step with each other: nobody completes a step before all have begun it, as in a collective."""

    def __init__(self, logdir: Path, **options: Any) -> None:
        self.logdir = logdir
        self.barrier = threading.Barrier(SIZE)
        place = MemoryPlace()
        self.supervisors: list[Supervisor[Any]] = [
            Supervisor(
                ArrayBackend({"w": np.zeros(4)}),
                logdir,
                membership=MemoryMembership(place, rank),
                signals=False,
                summarize_every=None,
                grace=20,
                **options,
            )
            for rank in range(SIZE)
        ]

    def train(self, body: Training) -> list[Future[None]]:
        """Have all train; each ends as its own run does."""
        with ThreadPoolExecutor(SIZE) as threads:
            return [threads.submit(self._run, rank, body) for rank in range(SIZE)]

    def step(self, session: Any) -> None:
        self.barrier.wait(30)
        session["w"][:] += 1
        session.global_step += 1

    def _run(self, rank: int, body: Training) -> None:
        sv = self.supervisors[rank]
        try:
            with sv.managed_session() as session:
                body(sv, session, rank)
        except BaseException:
            self.barrier.abort()
            raise


def saved_metrics(logdir: Path) -> dict[int, dict[str, float]]:
    directory = CheckpointDirectory(logdir)
    found: dict[int, dict[str, float]] = {}
    for step in directory.steps():
        with directory.at(step) as checkpoint:
            found[step] = dict(checkpoint.metrics)
    return found


@pytest.mark.parametrize("everybody_measures", [False, True])
def test_a_checkpoint_that_metrics_ask_for_carries_them(tmp_path: Path, everybody_measures: bool) -> None:
    runs = Together(tmp_path, save_every=EverySteps(1000), keep=KeepLatest(1) | KeepBest("accuracy", mode="max"))

    def body(sv: Supervisor[Any], session: Any, rank: int) -> None:
        for _ in sv.epochs(4):
            for _ in sv.batches(range(10)):
                runs.step(session)
            if rank == 0 or everybody_measures:
                sv.metrics(accuracy=1.0 if sv.global_step == 20 else 0.5)

    for run in runs.train(body):
        run.result()
    kept = {step: found for step, found in saved_metrics(tmp_path).items() if found}
    [best] = [step for step, found in kept.items() if found == {"accuracy": 1.0}]
    assert 20 <= best <= 22
    assert runs.supervisors[0].report.saves <= 6, "the first, the last, and one for each measurement"


def test_a_save_that_one_asks_for_is_one_of_all_at_one_step(tmp_path: Path) -> None:
    runs = Together(tmp_path, save_every=None, keep=KeepAll())

    def body(sv: Supervisor[Any], session: Any, rank: int) -> None:
        while session.global_step < 30 and not sv.should_stop():
            if rank == 2 and session.global_step == 10:
                sv.save()
            runs.step(session)

    for run in runs.train(body):
        run.result()
    steps = CheckpointDirectory(tmp_path).steps()
    assert [steps[0], steps[-1]] == [0, 30]
    assert len(steps) == 3
    assert 10 <= steps[1] <= 29
    assert {sv.report.last_step for sv in runs.supervisors} == {30}


@pytest.mark.parametrize("who", range(SIZE))
def test_a_stop_that_one_asks_for_is_one_of_all_at_one_step(tmp_path: Path, who: int) -> None:
    runs = Together(tmp_path, save_every=EverySteps(7))

    def body(sv: Supervisor[Any], session: Any, rank: int) -> None:
        while not sv.should_stop():
            if rank == who and session.global_step == 10:
                sv.request_stop()
            runs.step(session)

    for run in runs.train(body):
        run.result()
    [last] = {sv.report.last_step for sv in runs.supervisors}
    assert CheckpointDirectory(tmp_path).steps()[-1] == last
    assert {sv.report.exit_status for sv in runs.supervisors} == {0}


@pytest.mark.parametrize("who", range(SIZE))
def test_an_error_of_one_is_told_to_all_and_nothing_half_made_is_saved(tmp_path: Path, who: int) -> None:
    runs = Together(tmp_path, save_every=EverySteps(5))

    def body(sv: Supervisor[Any], session: Any, rank: int) -> None:
        while not sv.should_stop():
            if rank == who and session.global_step == 12:
                raise ValueError("the loss is not a number")
            runs.step(session)

    ends = [run.exception() for run in runs.train(body)]
    assert isinstance(ends[who], ValueError)
    for rank, (end, sv) in enumerate(zip(ends, runs.supervisors, strict=True)):
        if rank != who:
            assert end is not None
            told = [cause.error for cause in sv.report.errors if isinstance(cause.error, MemberFailedError)]
            assert [error.rank for error in told] == [who]
            assert "the loss is not a number" in str(told[0])
    assert CheckpointDirectory(tmp_path).steps() == [0, 5, 10]
