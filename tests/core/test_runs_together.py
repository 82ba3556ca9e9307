"""Whole runs that belong together, each in a thread: what one of them does and all must."""

from __future__ import annotations

import errno
import re
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from supervise_core import (
    CheckpointDirectory,
    DisagreementError,
    EverySteps,
    KeepAll,
    KeepBest,
    KeepLatest,
    LeaseHeldError,
    MemberFailedError,
    MembershipError,
    Supervisor,
    checkpointer,
    watchdog,
)
from supervise_core.board import Board
from supervise_core.clock import Clock
from supervise_core.directory_store import DirectoryStore
from supervise_core.membership import Membership
from supervise_core.snapshot import Snapshot
from supervise_core.staging import Staging
from supervise_core.testing.boards import MemoryBoard, MemoryPlace
from supervise_core.testing.clock import eventually
from supervise_numpy import ArrayBackend

Training = Callable[[Supervisor[Any], Any, int], None]

SIZE = 3


class MemoryMembership(Membership):
    """Members that meet in memory."""

    def __init__(self, place: MemoryPlace, rank: int, size: int) -> None:
        super().__init__(rank, size, synchronous=True)
        self._place = place

    def connect(self, clock: Clock) -> Board:
        return MemoryBoard(self._place, clock)


class Together:
    """Runs in step with each other: nobody completes a step before all have begun it, as in a collective."""

    def __init__(self, logdir: Path, backend: type[ArrayBackend] = ArrayBackend, **options: Any) -> None:
        self.logdir = logdir
        self._backend = backend
        self.barrier = threading.Barrier(SIZE)
        self._place = MemoryPlace()
        self._options = options
        self.supervisors = [self.supervisor(rank) for rank in range(SIZE)]

    def supervisor(self, rank: int, size: int = SIZE, **options: Any) -> Supervisor[Any]:
        return Supervisor(
            self._backend({"w": np.zeros(4)}),
            self.logdir,
            membership=MemoryMembership(self._place, rank, size),
            signals=False,
            summarize_every=None,
            grace=20,
            **self._options | options,
        )

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
            if not sv.report.errors or not isinstance(sv.report.errors[0].error, MembershipError):
                eventually(lambda: all(other.should_stop() for other in self.supervisors))  # all are told
            self.barrier.abort()
            raise


class OwnTensors(ArrayBackend):
    """Each rank has an array that only it can save."""

    def snapshot(self, session: Any, staging: Staging) -> Snapshot:
        staging.put("own", {"noise": np.arange(5.0)}, per_rank=True)
        return super().snapshot(session, staging)


class FullDisk(DirectoryStore):
    """What goes into the draft of another process finds no room, so many times."""

    times = 1

    def write_into(self, location: str, file: str, pieces: Iterable[memoryview], size: int) -> None:
        if self.times > 0:
            self.times -= 1
            raise OSError(errno.ENOSPC, "No space left on device")
        super().write_into(location, file, pieces, size)


@pytest.fixture(autouse=True)
def strikes(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Watchdogs that strike, which would end this process; none should."""
    struck: list[int] = []
    monkeypatch.setattr(watchdog, "end_process", struck.append)
    monkeypatch.setattr(watchdog.Watchdog, "_set_timer", lambda *_: None)
    yield struck
    assert not struck


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


def test_a_chief_that_is_started_by_mistake_is_refused_and_disturbs_nobody(tmp_path: Path) -> None:
    runs = Together(tmp_path)

    def body(sv: Supervisor[Any], session: Any, rank: int) -> None:
        while session.global_step < 20:
            if rank == 0 and session.global_step == 10:
                with pytest.raises(LeaseHeldError):
                    runs.supervisor(0).prepare_or_wait_for_session()
            runs.step(session)

    for run in runs.train(body):
        run.result()
    assert {sv.report.last_step for sv in runs.supervisors} == {20}


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ({"size": SIZE + 1}, r"the number of ranks: 4 on rank 1, and 3 on rank 0"),
        ({"save_every": EverySteps(7)}, r"save_every=: 'EverySteps\(steps=7\)' on rank 1, and 'EverySteps\(steps=5\)'"),
    ],
)
def test_what_must_be_the_same_and_is_not_is_said_everywhere(tmp_path: Path, option: dict[str, Any], said: str) -> None:
    runs = Together(tmp_path, save_every=EverySteps(5))
    runs.supervisors[1] = runs.supervisor(1, **option)

    def body(sv: Supervisor[Any], session: Any, rank: int) -> None:
        while not sv.should_stop():
            runs.step(session)

    ends = [run.exception() for run in runs.train(body)]
    assert all(re.search(said, str(end)) for end in ends), ends
    assert [type(end) for end in ends] == [DisagreementError, MemberFailedError, MemberFailedError]


@pytest.mark.parametrize("leave", [lambda: sys.exit(3), lambda: _interrupt()])
@pytest.mark.parametrize("who", range(SIZE))
def test_one_that_leaves_its_block_by_other_means_than_its_end_tells_the_others(
    tmp_path: Path, who: int, leave: Callable[[], None]
) -> None:
    runs = Together(tmp_path, save_every=None)

    def body(sv: Supervisor[Any], session: Any, rank: int) -> None:
        while not sv.should_stop():
            if rank == who and session.global_step == 12:
                leave()
            runs.step(session)

    ends = [run.exception() for run in runs.train(body)]
    assert isinstance(ends[who], (SystemExit, KeyboardInterrupt))
    for rank, sv in enumerate(runs.supervisors):
        if rank != who:
            told = [cause.error for cause in sv.report.errors if isinstance(cause.error, MemberFailedError)]
            assert [error.rank for error in told] == [who]
            assert type(ends[who]).__name__ in str(told[0])


def _interrupt() -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("times", [1, 2])
def test_a_share_that_does_not_fit_on_the_disk_costs_that_checkpoint_and_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    monkeypatch.setattr(checkpointer, "RETRY_AFTER", (0.1, 0.2))
    runs = Together(tmp_path, OwnTensors, save_every=EverySteps(5), keep=KeepAll())
    full = FullDisk(tmp_path)
    full.times = times
    runs.supervisors[1] = runs.supervisor(1, store=full)

    def body(sv: Supervisor[Any], session: Any, rank: int) -> None:
        while session.global_step < 40 and not sv.should_stop():
            runs.step(session)
            time.sleep(0.02)

    for run in runs.train(body):
        run.result()
    steps = CheckpointDirectory(tmp_path).steps()
    assert steps[-1] == 40
    assert 5 not in steps
    assert len(steps) >= 4
    assert [sv.report.failed_saves for sv in runs.supervisors] == [times, times, 0]
    assert {sv.report.exit_status for sv in runs.supervisors} == {0}


def test_a_share_that_never_fits_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpointer, "RETRY_AFTER", (0.1, 0.2))
    runs = Together(tmp_path, OwnTensors, save_every=EverySteps(5))
    full = FullDisk(tmp_path)
    full.times = 1000
    runs.supervisors[1] = runs.supervisor(1, store=full)

    def body(sv: Supervisor[Any], session: Any, rank: int) -> None:
        while session.global_step < 1000 and not sv.should_stop():
            runs.step(session)
            time.sleep(0.02)

    ends = [run.exception() for run in runs.train(body)]
    assert all(ends)
    assert "No space left" in str(ends[1])
    assert CheckpointDirectory(tmp_path).steps() == [0]


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
