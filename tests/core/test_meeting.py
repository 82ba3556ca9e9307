"""What one process of a run makes of what it hears from the others, and what it tells them."""

from __future__ import annotations

import signal
from typing import Any

import pytest

from supervise_core.agreement import StepAgreement, StopWish
from supervise_core.board import Board
from supervise_core.clock import Clock
from supervise_core.coordinator import Coordinator, StopCause
from supervise_core.errors import MemberFailedError
from supervise_core.meeting import Meeting
from supervise_core.member import Hearing, Member
from supervise_core.membership import Membership
from supervise_core.signals import StopSignals
from supervise_core.testing.boards import MemoryBoard, MemoryPlace
from supervise_core.testing.clock import FakeClock


class StoppedWhileJoining(Membership):
    """A stop comes in the very moment in which a process has joined and is not back from it: of another, or its own."""

    def __init__(self, rank: int, come: Any) -> None:
        super().__init__(rank, 3, synchronous=True)
        self.wishes: list[StopWish | None] = []
        self._place = MemoryPlace()
        self._come = come

    def connect(self, clock: Clock) -> Board:
        return MemoryBoard(self._place, clock)

    def join(self, agreement: StepAgreement, hearing: Hearing, clock: Clock) -> Member | None:
        member: Any = super().join(agreement, hearing, clock)
        member.wish = self.wishes.append
        self._come(hearing)
        return member  # type: ignore[no-any-return]


def joined(rank: int, come: Any) -> tuple[StoppedWhileJoining, Coordinator, StopSignals]:
    coordinator = Coordinator(FakeClock())
    signals = StopSignals(coordinator)
    membership = StoppedWhileJoining(rank, lambda hearing: come(hearing, coordinator))
    meeting = Meeting(membership, coordinator, signals, 30.0)
    meeting.join()
    meeting.end(0)
    meeting.leave(None, coordinator.cause, 0)
    return membership, coordinator, signals


@pytest.mark.parametrize("rank", [0, 1])
def test_a_stop_that_is_heard_while_joining_is_not_told_to_the_others_as_ones_own(rank: int) -> None:
    """They would take it for a stop without the signal that it came from, and end with another status."""
    membership, coordinator, signals = joined(
        rank, lambda hearing, _: hearing.stop(StopWish("signal SIGTERM", 2, int(signal.SIGTERM)))
    )
    assert membership.wishes == []
    assert coordinator.cause is not None
    assert coordinator.cause.source == "signal SIGTERM, on rank 2"
    assert signals.first is signal.SIGTERM


@pytest.mark.parametrize("rank", [0, 1])
def test_ones_own_stop_that_came_while_joining_is_told_to_the_others(rank: int) -> None:
    membership, _, _ = joined(rank, lambda _, coordinator: coordinator.request_stop(source="the program"))
    assert membership.wishes == [StopWish("the program", rank, None, False)]


def test_an_error_of_this_process_says_who_was_gone_when_it_came() -> None:
    coordinator = Coordinator(FakeClock())
    membership = StoppedWhileJoining(1, lambda *_: None)
    meeting = Meeting(membership, coordinator, StopSignals(coordinator), 30.0)
    meeting.join()
    member: Any = meeting.member
    member.gone = lambda: ["rank 0 is gone (its process was 7 on here)", "rank 2 is gone (its process was 9 on here)"]
    error = ConnectionError("connection reset by peer")
    meeting.explain(error)
    meeting.end(0)
    meeting.leave(None, coordinator.cause, 0)
    assert error.__notes__ == [
        "rank 0 is gone (its process was 7 on here), rank 2 is gone (its process was 9 on here): that may be why."
    ]


@pytest.mark.parametrize("has_failed", [True, False])
def test_the_echo_of_ones_own_failure_is_no_error_of_another(has_failed: bool) -> None:
    """The chief says who failed to all; the first error here is the one that this process had."""
    coordinator = Coordinator(FakeClock())
    heard: list[Hearing] = []
    membership = StoppedWhileJoining(1, heard.append)
    meeting = Meeting(membership, coordinator, StopSignals(coordinator), 30.0)
    meeting.join()
    if has_failed:
        meeting.tell_failure(StopCause("the training block", ValueError("diverged")))
    heard[0].fail(MemberFailedError(1, "the training block: ValueError: diverged"))
    heard[0].fail(MemberFailedError(2, "the training block: ValueError: diverged"))
    ranks = [kept.error.rank for kept in coordinator.errors if isinstance(kept.error, MemberFailedError)]
    assert ranks == ([2] if has_failed else [1, 2]), "without having failed itself, it was an earlier life of this rank"
    meeting.end(0)
    meeting.leave(None, coordinator.cause, 0)
