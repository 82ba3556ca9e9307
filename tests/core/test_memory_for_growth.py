"""Memory for what the first step adds to the state is had beside the loop, which does not wait for it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from supervise_core import EverySeconds, KeepAll, Staging, Supervisor, saving
from supervise_core.checkpointer import Checkpointer
from supervise_core.memory import own_memory
from supervise_core.snapshot import Snapshot
from supervise_core.staging import Outline
from supervise_core.testing.clock import FakeClock, eventually
from supervise_numpy import ArrayBackend

from .one_step_each import assert_one_step_each

WRITER = "supervise-core checkpoints"
LARGE = 1 << 20


class Growing(ArrayBackend):
    """A model whose first step makes a second array, and that says so beforehand, or does not."""

    grows_at_first_step = True

    def __init__(self, *, foresees: bool = True) -> None:
        self.arrays: dict[str, Any] = {"w": np.zeros(10)}
        super().__init__(self.arrays)
        self.foresees = foresees
        self.asked = 0

    def step(self, session: Any) -> None:
        self.arrays.setdefault("moments", np.zeros(LARGE))
        for array in self.arrays.values():
            array += 1
        session.global_step += 1

    def foresee(self, session: Any, outline: Outline) -> None:
        self.asked += 1
        if self.foresees:
            outline.put("model", {"w": np.zeros(10), "moments": np.zeros(LARGE)})


class Memory:
    """Notes which thread asks for much memory, and can keep the writer waiting for it, or have none."""

    def __init__(self) -> None:
        self.asked_by: list[str] = []
        self.there = threading.Event()
        self.there.set()
        self.error: type[Exception] | None = None

    def __call__(self, nbytes: int) -> memoryview:
        if nbytes > LARGE:
            self.asked_by.append(threading.current_thread().name)
            if self.asked_by[-1] == WRITER:
                assert self.there.wait(20)
                if self.error is not None:
                    raise self.error("no memory today")
        return own_memory(nbytes)


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[Memory]:
    memory = Memory()
    monkeypatch.setattr("supervise_core.staging.own_memory", memory)
    monkeypatch.setattr(saving, "_WORTH_PREPARING", LARGE)
    yield memory
    memory.there.set()


@contextmanager
def session_of(backend: Growing, logdir: Path, **options: Any) -> Iterator[tuple[Supervisor[Any], Any]]:
    chosen: dict[str, Any] = {"save_every": None} | options
    sv = Supervisor(backend, logdir, summarize_every=None, keep=KeepAll(), signals=False, **chosen)
    with sv.managed_session() as session:
        yield sv, session


def boundary_of(sv: Supervisor[Any]) -> None:
    assert not sv.should_stop()


def is_saved_at_a_boundary(sv: Supervisor[Any]) -> bool:
    boundary_of(sv)
    return sv.report.saves == 2


def keep_the_writer_waiting(memory: Memory, sv: Supervisor[Any], backend: Growing, session: Any) -> None:
    """Make the first step, and leave the writer without the memory that it then asks for."""
    eventually(lambda: sv.report.saves == 1)
    memory.there.clear()
    backend.step(session)
    boundary_of(sv)
    eventually(lambda: memory.asked_by == [WRITER])


def test_what_is_foreseen_is_there_before_the_first_step(tmp_path: Path, memory: Memory) -> None:
    backend = Growing()
    with session_of(backend, tmp_path) as (sv, session):
        eventually(lambda: memory.asked_by == [WRITER])
        backend.step(session)
        boundary_of(sv)
        sv.save()
        boundary_of(sv)
        eventually(lambda: sv.report.saves == 2)
    assert memory.asked_by == [WRITER], "once, and not by the loop"
    assert backend.asked == 1
    assert_one_step_each(tmp_path, [0, 1])


def test_what_is_not_foreseen_is_there_after_the_first_step(tmp_path: Path, memory: Memory) -> None:
    backend = Growing(foresees=False)
    with session_of(backend, tmp_path) as (sv, session):
        backend.step(session)
        assert memory.asked_by == []
        boundary_of(sv)
        eventually(lambda: memory.asked_by == [WRITER])
        sv.save()
        boundary_of(sv)
        eventually(lambda: sv.report.saves == 2)
    assert memory.asked_by == [WRITER]
    assert_one_step_each(tmp_path, [0, 1])


def test_what_would_take_most_of_the_memory_is_not_had_on_a_guess(
    tmp_path: Path, memory: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saving, "available_memory", lambda: 12 * LARGE)
    backend = Growing()
    with session_of(backend, tmp_path) as (sv, session):
        eventually(lambda: sv.report.saves == 1)
        backend.step(session)
        assert memory.asked_by == []
        boundary_of(sv)
        eventually(lambda: memory.asked_by == [WRITER])
    assert_one_step_each(tmp_path, [0, 1])


def test_a_wrong_guess_is_given_back(tmp_path: Path, memory: Memory) -> None:
    class Mistaken(Growing):
        def foresee(self, session: Any, outline: Outline) -> None:
            outline.put("model", {"w": np.zeros(10), "other": np.zeros(2 * LARGE)})

    backend = Mistaken()
    with session_of(backend, tmp_path) as (sv, session):
        eventually(lambda: memory.asked_by == [WRITER])
        backend.step(session)
        boundary_of(sv)
        eventually(lambda: memory.asked_by == [WRITER] * 2)
        backend.step(session)
    assert memory.asked_by == [WRITER] * 2
    assert_one_step_each(tmp_path, [0, 2])


def test_a_save_that_is_due_by_time_waits_its_turn_and_the_loop_goes_on(tmp_path: Path, memory: Memory) -> None:
    clock = FakeClock()
    backend = Growing(foresees=False)
    with session_of(backend, tmp_path, save_every=EverySeconds(10), clock=clock) as (sv, session):
        keep_the_writer_waiting(memory, sv, backend, session)
        clock.advance(10)
        for _ in range(3):
            backend.step(session)
            boundary_of(sv)
        assert sv.report.saves == 1
        memory.there.set()
        eventually(lambda: is_saved_at_a_boundary(sv))
        assert_one_step_each(tmp_path, [0, 4])
    assert memory.asked_by == [WRITER]


def test_a_save_is_not_forgotten_if_the_writer_ends_just_as_it_is_put_off(
    tmp_path: Path, memory: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    def is_busy(checkpointer: Checkpointer) -> bool:
        """What was true when the training thread asked, after all has changed."""
        answer = not checkpointer._idle.is_set()
        if answer and threading.current_thread() is threading.main_thread():
            memory.there.set()
            eventually(checkpointer._idle.is_set)
            time.sleep(0.05)  # till the writer has seen that nobody waits for it
        return answer

    clock = FakeClock()
    backend = Growing(foresees=False)
    with session_of(backend, tmp_path, save_every=EverySeconds(10), clock=clock) as (sv, session):
        keep_the_writer_waiting(memory, sv, backend, session)
        saver = sv._lifecycle.open_run("look").saver
        assert saver is not None
        checkpointer = saver.checkpointer
        monkeypatch.setattr(Checkpointer, "is_busy", property(is_busy))
        clock.advance(10)

        def is_put_off() -> bool:
            boundary_of(sv)
            return checkpointer._wanted

        eventually(is_put_off)
        memory.there.set()
        eventually(lambda: is_saved_at_a_boundary(sv))


def test_the_last_save_waits_for_the_memory(tmp_path: Path, memory: Memory) -> None:
    backend = Growing(foresees=False)
    with session_of(backend, tmp_path) as (sv, session):
        keep_the_writer_waiting(memory, sv, backend, session)
        backend.step(session)
        threading.Timer(0.05, memory.there.set).start()
    assert sv.report.exit_status == 0
    assert_one_step_each(tmp_path, [0, 2])


def test_where_there_is_no_memory_the_run_ends_and_says_so(tmp_path: Path, memory: Memory) -> None:
    memory.error = MemoryError
    backend = Growing(foresees=False)

    def train() -> None:
        with session_of(backend, tmp_path) as (sv, session):
            eventually(lambda: sv.report.saves == 1)
            backend.step(session)
            boundary_of(sv)
            eventually(sv.should_stop)

    with pytest.raises(MemoryError, match="no memory today"):
        train()
    assert_one_step_each(tmp_path, [0])


def test_a_writer_that_dies_is_not_waited_for_whatever_else_it_had_to_do(
    tmp_path: Path, memory: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(checkpointer: Checkpointer, _: Any) -> None:
        eventually(lambda: not checkpointer._queue.empty())
        raise SystemError("the writer is no more")

    monkeypatch.setattr(Checkpointer, "_write", die)
    backend = Growing()

    def train() -> None:
        with session_of(backend, tmp_path) as (sv, session):
            eventually(sv.should_stop)
            backend.step(session)

    with pytest.raises(SystemError, match="the writer is no more"):
        train()
    assert WRITER not in memory.asked_by


def test_what_the_user_saves_instead_is_not_foreseen(tmp_path: Path, memory: Memory) -> None:
    def saver(session: Any, staging: Staging) -> Snapshot:
        staging.put("other", {"w": backend.arrays["w"]})
        return staging.snapshot()

    backend = Growing()
    with session_of(backend, tmp_path, saver=saver) as (sv, session):
        backend.step(session)
        boundary_of(sv)
    assert backend.asked == 0
    assert memory.asked_by == []


def test_where_nothing_is_copied_no_memory_is_had(tmp_path: Path, memory: Memory) -> None:
    backend = Growing()
    with session_of(backend, tmp_path, staging="none") as (sv, session):
        backend.step(session)
        boundary_of(sv)
    assert memory.asked_by == []
    assert_one_step_each(tmp_path, [0, 1])
