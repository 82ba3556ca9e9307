"""The contract of a membership, as tests: subclass ``MembershipContract`` and run the subclass with pytest."""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import pytest

from supervise_core.agreement import Decision, StepAgreement, StopWish
from supervise_core.chief import Chief
from supervise_core.clock import SystemClock
from supervise_core.errors import (
    ChiefNeverCameError,
    DisagreementError,
    MemberFailedError,
    MembershipError,
    ReadinessTimeoutError,
)
from supervise_core.member import Hearing, Member
from supervise_core.membership import Membership
from supervise_core.pages import Announcement, End
from supervise_core.testing.clock import eventually
from supervise_core.worker import Worker

T = TypeVar("T")

READY = Announcement("model.ckpt-7", 7)
SIGTERM = StopWish("signal SIGTERM", 1, 15)
LONG = 60.0
"""Seconds that no wait of these tests takes, unless what it waits for is missed."""


def _never() -> bool:
    return False


class Part:
    """One process's part in a run: a member, what it was told, and steps that a test makes."""

    def __init__(self, membership: Membership) -> None:
        self.steps = 0
        self.stops: list[StopWish] = []
        self.failures: list[MembershipError] = []
        clock = SystemClock()
        self.agreement = StepAgreement(lambda: self.steps, lambda: None, clock)
        joined = membership.join(self.agreement, Hearing(self.stops.append, self.failures.append), clock)
        assert joined is not None
        self.member: Member = joined
        self.rank = membership.rank

    @property
    def chief(self) -> Chief:
        assert isinstance(self.member, Chief)
        return self.member

    @property
    def worker(self) -> Worker:
        assert isinstance(self.member, Worker)
        return self.member

    def begin(self) -> Announcement:
        """As a run begins: the chief's model, for all; where all train in step, when all have it."""
        ready = READY
        if self.rank == 0:
            self.chief.announce(READY)
        else:
            ready = self.worker.await_ready(LONG, _never)
        if self.member.roll.is_synchronous:
            if self.rank == 0:
                self.chief.await_all(LONG, _never)
            else:
                self.worker.await_go(LONG, _never)
            self.agreement.begin()
        return ready

    def train(self, steps: int, pause: float, barrier: threading.Barrier) -> list[tuple[int, Decision]]:
        """Make steps together with the others until a stop is due; what was done at which boundary."""
        done: list[tuple[int, Decision]] = []
        while self.steps <= steps:
            if self.agreement.is_pending():
                decisions = self.agreement.pass_boundary(self.steps, LONG)
                assert decisions is not None
                done += [(self.steps, decision) for decision in decisions]
                if any(decision.stop for decision in decisions):
                    return done
            barrier.wait(LONG)
            time.sleep(pause)
            self.steps += 1
        return done

    def leave(self, kind: Any = "done", text: str = "the end") -> None:
        """As a run ends."""
        self.member.leave(End(kind, text, self.steps, self.rank))


class MembershipContract(ABC):
    """What every membership does::

        class TestFileMembership(MembershipContract):
            def make_membership(self, rank, size, *, synchronous) -> Membership:
                return FileMembership(self.directory, rank, size, synchronous=synchronous)

    One object of the class is made for each test; ``directory`` is an empty directory for that test alone.
    """

    directory: Path

    size_may_be_unknown: ClassVar[bool] = True
    """Whether members that do not train in step may come without knowing how many there are."""

    @abstractmethod
    def make_membership(self, rank: int, size: int | None, *, synchronous: bool) -> Membership:
        """That process's membership. Those of one test meet at the same place, as processes of one run do."""

    @pytest.fixture(autouse=True)
    def _give_directory(self, tmp_path: Path) -> Iterator[None]:
        self.directory = tmp_path
        self._parts: list[Part] = []
        before = set(threading.enumerate())
        with ThreadPoolExecutor(16) as self._pool:
            yield
            for part in self._parts:
                self._pool.submit(part.leave)
        eventually(lambda: not any("supervise-core" in thread.name for thread in set(threading.enumerate()) - before))

    def part(self, rank: int, size: int | None = 3, *, synchronous: bool = True) -> Part:
        """A process that takes part from now on."""
        part = Part(self.make_membership(rank, size, synchronous=synchronous))
        self._parts.append(part)
        return part

    def parts(self, size: int = 3, *, synchronous: bool = True) -> list[Part]:
        """Processes that have begun to train."""
        parts = [self.part(rank, size, synchronous=synchronous) for rank in range(size)]
        assert self.together(parts, Part.begin) == [READY] * size
        return parts

    def together(self, parts: list[Part], act: Callable[[Part], T]) -> list[T]:
        """Have all do something at the same time."""
        return [future.result(2 * LONG) for future in [self._pool.submit(act, part) for part in parts]]

    def soon(self, act: Callable[[], T]) -> Future[T]:
        """Have something done that may take its time."""
        return self._pool.submit(act)

    # ---- the place

    def test_it_knows_its_place(self) -> None:
        chief, worker = (self.make_membership(rank, 3, synchronous=True) for rank in (0, 2))
        assert (chief.rank, chief.size, chief.is_chief, chief.is_synchronous) == (0, 3, True, True)
        assert (worker.rank, worker.size, worker.is_chief) == (2, 3, False)

    @pytest.mark.parametrize(("rank", "size"), [(3, 3), (-1, 3), (0, 0)])
    def test_a_place_that_there_is_not(self, rank: int, size: int) -> None:
        with pytest.raises(ValueError, match="rank"):
            self.make_membership(rank, size, synchronous=True)

    def test_in_step_it_must_be_known_how_many_there_are(self) -> None:
        if self.size_may_be_unknown:
            with pytest.raises(ValueError, match="size"):
                self.make_membership(0, None, synchronous=True)

    def test_a_run_of_one_has_nobody_to_meet(self) -> None:
        membership = self.make_membership(0, 1, synchronous=True)
        stops, failures = list[StopWish](), list[MembershipError]()
        hearing = Hearing(stops.append, failures.append)
        agreement = StepAgreement(lambda: 0, lambda: None, SystemClock())
        assert membership.join(agreement, hearing, SystemClock()) is None

    # ---- readiness

    @pytest.mark.parametrize("synchronous", [True, False])
    def test_the_others_go_on_with_the_chiefs_model(self, synchronous: bool) -> None:
        workers = [self.part(rank, synchronous=synchronous) for rank in (1, 2)]
        waiting = [self.soon(worker.begin) for worker in workers]
        time.sleep(0.2)
        assert not any(future.done() for future in waiting)
        self.part(0, synchronous=synchronous).begin()
        assert [future.result(LONG) for future in waiting] == [READY] * 2

    def test_one_that_comes_late_finds_the_model_ready(self) -> None:
        self.part(0, synchronous=False).begin()
        self.part(1, synchronous=False).begin()
        time.sleep(0.2)
        assert self.part(2, synchronous=False).begin() == READY

    def test_a_worker_comes_without_knowing_how_many_there_are(self) -> None:
        if not self.size_may_be_unknown:
            pytest.skip("here it must be known")
        chief, worker = (self.part(rank, None, synchronous=False) for rank in (0, 41))
        chief.begin()
        assert worker.begin() == READY
        worker.member.wish(SIGTERM)
        eventually(lambda: chief.stops, LONG)

    @pytest.mark.parametrize("limit", [0.1, 0.7])
    def test_the_wait_ends_when_it_must(self, limit: float) -> None:
        worker = self.part(1)
        began = time.monotonic()
        with pytest.raises(ChiefNeverCameError, match=f"waited {limit:g} s for the chief's model: rank 0"):
            worker.worker.await_ready(limit, _never)
        assert limit <= time.monotonic() - began < limit + 5

    def test_who_does_not_come_is_named(self) -> None:
        chief, worker = self.part(0), self.part(1)
        waiting = self.soon(worker.begin)
        chief.chief.announce(READY)
        with pytest.raises(ReadinessTimeoutError, match="rank 2, which never came"):
            chief.chief.await_all(1.5, _never)
        chief.leave("failed", "the start of the session: rank 2")
        assert isinstance(waiting.exception(LONG), MembershipError)

    # ---- stops

    def test_a_stop_before_training_begins_stops_all(self) -> None:
        chief, one, two = (self.part(rank) for rank in range(3))

        def wait(part: Part) -> Announcement:
            return part.worker.await_ready(LONG, lambda: bool(part.stops))

        waiting = [self.soon(partial(wait, part)) for part in (one, two)]
        time.sleep(0.1)
        one.member.wish(SIGTERM)
        eventually(lambda: chief.stops and one.stops and two.stops, LONG)
        assert chief.stops[0] == one.stops[0] == two.stops[0] == SIGTERM
        assert all(future.exception(LONG) is not None for future in waiting)

    @pytest.mark.parametrize("asked", [0, 2])
    def test_in_step_all_stop_after_the_same_step(self, asked: int) -> None:
        parts = self.parts()
        barrier = threading.Barrier(3)
        trained = [self.soon(partial(part.train, 5000, 0.002, barrier)) for part in parts]
        time.sleep(0.1)
        assert parts[asked].member.wish(SIGTERM)
        ends = {(step, decision.stop) for future in trained for step, decision in future.result(LONG)}
        assert len(ends) == 1
        assert next(iter(ends))[1] == SIGTERM
        assert not any(part.failures for part in parts)

    def test_in_step_all_save_at_the_same_steps(self) -> None:
        parts = self.parts()
        barrier = threading.Barrier(3)
        trained = [self.soon(partial(part.train, 5000, 0.002, barrier)) for part in parts]
        for number in range(6):
            parts[number % 3].member.wish()
            time.sleep(0.02)
        parts[1].member.wish(SIGTERM)
        done = [future.result(LONG) for future in trained]
        assert done[0] == done[1] == done[2]
        assert len(done[0]) >= 2

    def test_apart_a_stop_reaches_all_at_once(self) -> None:
        chief, one, two = self.parts(synchronous=False)
        one.member.wish(SIGTERM)
        eventually(lambda: chief.stops and two.stops, LONG)
        assert chief.stops[0] == two.stops[0] == SIGTERM

    # ---- ends

    @pytest.mark.parametrize("failed", [0, 1])
    def test_in_step_the_failure_of_one_reaches_all_with_its_text(self, failed: int) -> None:
        parts = self.parts()
        parts[failed].leave("failed", "the training block: ValueError: diverged")
        others = [part for part in parts if part.rank != failed]
        eventually(lambda: all(part.failures for part in others), LONG)
        for part in others:
            error = part.failures[0]
            assert isinstance(error, MemberFailedError)
            assert str(error) == f"rank {failed} failed: the training block: ValueError: diverged"

    def test_the_end_of_all_leaves_no_failure(self) -> None:
        parts = self.parts()
        self.together(parts, Part.leave)
        assert not any(part.failures for part in parts)

    def test_apart_the_end_of_the_chief_stops_the_others(self) -> None:
        chief, one, two = self.parts(synchronous=False)
        chief.leave()
        eventually(lambda: one.stops and two.stops, LONG)
        assert not one.failures

    def test_another_run_at_the_same_place(self) -> None:
        """What an earlier run left says nothing to a later one."""
        parts = self.parts()
        parts[1].member.wish(SIGTERM)
        parts[2].member.wish()
        parts[2].leave("failed", "an old failure")
        self.together(parts, Part.leave)
        workers = [self.part(rank) for rank in (2, 1)]
        time.sleep(0.2)
        later = [self.part(0), *workers]
        assert self.together(later, Part.begin) == [READY] * 3
        time.sleep(0.2)
        assert not any(part.failures or part.stops or part.agreement.is_pending() for part in later)

    # ---- what all must have the same, and checkpoints

    def test_what_must_be_the_same_and_is_not(self) -> None:
        parts = self.parts()
        for part in parts:
            part.member.state("the length of 'batches'", 100 - (part.rank == 2))
        eventually(lambda: parts[0].failures, LONG)
        assert isinstance(parts[0].failures[0], DisagreementError)
        assert str(parts[0].failures[0]) == "the length of 'batches': 99 on rank 2, and 100 on rank 0"

    def test_a_checkpoint_of_all(self) -> None:
        chief, *workers = self.parts()

        def add(part: Part) -> str | None:
            draft = part.worker.await_draft(8, 0, LONG)
            assert draft is not None
            part.worker.add_share(draft, f'{{"rank": {part.rank}}}', {"model.safetensors": (part.rank, "hash")})
            return part.worker.await_outcome(draft, LONG).checkpoint

        added = [self.soon(partial(add, part)) for part in workers]
        draft = chief.chief.open_draft(8, "/there")
        shares = chief.chief.gather(draft, LONG)
        assert {rank: share.state for rank, share in shares.items()} == {1: '{"rank": 1}', 2: '{"rank": 2}'}
        assert shares[2].files == {"model.safetensors": (2, "hash")}
        chief.chief.settle(draft, "model.ckpt-8")
        assert [future.result(LONG) for future in added] == ["model.ckpt-8"] * 2

    def test_a_share_that_is_missing(self) -> None:
        chief, one, _ = self.parts()
        draft = chief.chief.open_draft(8, "/there")
        one.worker.add_share(draft, "{}", {})
        with pytest.raises(MembershipError, match="the checkpoint of step 8 lacks the share of rank 2"):
            chief.chief.gather(draft, 1)
