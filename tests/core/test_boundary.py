"""Appointments at step boundaries: by steps, by the clock, on request, and what is said when no boundary comes."""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Callable, Iterator

import pytest

from supervise_core import AtSteps, Coordinator, EverySeconds, EverySteps, Overhead
from supervise_core.boundary import StepBoundary, StepCounter
from supervise_core.testing.clock import FakeClock, eventually


class Loop:
    """A training loop around a boundary, with steps that tell of themselves."""

    def __init__(self, watched: bool = True) -> None:
        self.clock = FakeClock()
        self.coordinator = Coordinator(clock=self.clock)
        self.step = 0
        self.watched = watched
        self.boundary = StepBoundary(self.coordinator, StepCounter(lambda: self.step), watched)
        self.looks = 0

    def look(self) -> None:
        """One boundary as the loop has it."""
        if self.boundary.due:
            self.looks += 1
            self.boundary.reach(self.step)

    def run(self, steps: int) -> None:
        for _ in range(steps):
            self.look()
            self.step += 1
            if self.watched:
                self.boundary.step_taken(self.step)
        self.look()


@pytest.fixture
def loop() -> Iterator[Loop]:
    made = Loop()
    yield made
    made.coordinator.request_stop()
    made.coordinator.join_threads(grace=10)


@pytest.fixture
def timed(loop: Loop) -> Loop:
    """With the timer's thread running."""
    timer = threading.Thread(target=loop.boundary.keep_time, name="timer", daemon=True)
    loop.coordinator.register(timer)
    timer.start()
    return loop


@pytest.mark.parametrize("watched", [True, False])
def test_a_step_trigger_fires_at_its_steps(watched: bool) -> None:
    loop = Loop(watched)
    fired: list[int] = []
    loop.boundary.appoint("saves", EverySteps(5), fired.append)
    loop.run(17)
    assert fired == [5, 10, 15]


def test_while_nothing_is_due_the_loop_looks_at_one_attribute(loop: Loop) -> None:
    loop.boundary.appoint("saves", EverySteps(100), lambda step: None)
    loop.run(1000)
    assert loop.looks <= 1 + 3 * 10


def test_a_step_that_was_jumped_over_fires_at_the_next_boundary(loop: Loop) -> None:
    fired: list[int] = []
    loop.boundary.appoint("saves", AtSteps(3, 8), fired.append)
    for step in (2, 4, 9, 10):
        loop.step = step
        loop.boundary.step_taken(step)
        loop.look()
    assert fired == [4, 9]


def test_values_of_the_very_step_are_wanted(loop: Loop) -> None:
    appointment = loop.boundary.appoint("summaries", EverySteps(5), lambda step: None)
    approaching: list[int] = []
    for _ in range(12):
        loop.look()
        loop.step += 1
        loop.boundary.step_taken(loop.step)
        if appointment.approaching:
            approaching.append(loop.step)
    assert {5, 10} <= set(approaching) <= {4, 5, 9, 10}


def test_a_request_is_done_once_at_the_next_boundary(loop: Loop) -> None:
    fired: list[int] = []
    appointment = loop.boundary.appoint("saves", None, fired.append)
    loop.run(3)
    thread = threading.Thread(target=appointment.request)
    thread.start()
    thread.join()
    loop.run(3)
    assert fired == [3]


def test_those_that_are_last_come_after_all_others(loop: Loop) -> None:
    order: list[str] = []
    loop.boundary.appoint("saves", EverySteps(1), lambda step: order.append("save"), last=True)
    loop.boundary.appoint("summaries", EverySteps(1), lambda step: order.append("summary"))
    loop.run(1)
    assert order == ["summary", "save"]


def test_an_error_of_one_stops_the_run_and_the_others_are_done(loop: Loop) -> None:
    fired: list[int] = []

    def fail(step: int) -> None:
        raise OSError("broken")

    loop.boundary.appoint("broken", EverySteps(1), fail)
    loop.boundary.appoint("whole", EverySteps(1), fired.append)
    loop.run(1)
    assert str(loop.coordinator.cause) == "service 'broken': OSError: broken"
    assert fired == [1]


def test_a_postponed_one_waits_whatever_its_trigger_says(loop: Loop) -> None:
    fired: list[int] = []
    appointment = loop.boundary.appoint("saves", EverySteps(1), fired.append)
    loop.run(1)
    appointment.postpone(5)
    loop.run(3)
    loop.clock.advance(5)
    loop.boundary.ring()
    loop.run(1)
    assert fired == [1, 4, 5]


def test_the_interval_follows_the_cost_that_is_told(loop: Loop) -> None:
    costs = [1.0]
    fired: list[float] = []

    def save(step: int) -> None:
        fired.append(loop.clock.monotonic())
        loop.clock.advance(0.5)  # the cost told is more than the time that it takes here

    appointment = loop.boundary.appoint("saves", Overhead(0.1), save)
    appointment.cost = lambda: costs[0]
    appointment.plan_again()
    for _ in range(100):
        loop.clock.advance(1)
        loop.boundary.ring()
        loop.look()
    assert len(fired) > 5
    assert all(10 <= after - before <= 11 for before, after in itertools.pairwise(fired))
    costs[0] = 3.0
    appointment.plan_again()
    assert appointment.due.seconds == pytest.approx(fired[-1] + 30)


def test_planning_again_changes_neither_what_is_postponed_nor_what_is_being_done(loop: Loop) -> None:
    appointment = loop.boundary.appoint("saves", Overhead(0.1), lambda step: appointment.plan_again())
    appointment.cost = lambda: 1.0
    appointment.plan_again()
    loop.clock.advance(10)
    loop.boundary.ring()
    loop.look()
    due = loop.clock.monotonic() + 10
    assert appointment.due.seconds == pytest.approx(due)
    appointment.postpone(3)
    appointment.plan_again()
    assert appointment.due.seconds == pytest.approx(due - 7)


def test_a_time_trigger_rings_when_its_moment_comes(timed: Loop) -> None:
    fired: list[int] = []
    timed.boundary.appoint("saves", EverySeconds(600), fired.append)
    timed.run(2)
    for expected in ([2], [2, 4]):
        timed.clock.wait_for_sleepers(1)
        timed.clock.advance(599)
        timed.clock.wait_for_sleepers(1)
        assert not timed.boundary.due
        timed.clock.advance(1)
        eventually(lambda: timed.boundary.due)
        timed.look()
        assert fired == expected
        timed.run(2)


def test_after_a_late_boundary_there_is_no_burst(timed: Loop) -> None:
    fired: list[int] = []
    timed.boundary.appoint("saves", EverySeconds(10), fired.append)
    timed.run(1)
    timed.clock.wait_for_sleepers(1)
    timed.clock.advance(95)
    eventually(lambda: timed.boundary.due)
    timed.run(5)
    assert fired == [1]


def test_an_overlooked_boundary_is_told_of_once(timed: Loop, caplog: pytest.LogCaptureFixture) -> None:
    timed.boundary.appoint("checkpoints", EverySeconds(10), lambda step: None)
    timed.run(1)

    def told() -> list[str]:
        return [record.getMessage() for record in caplog.records if "no step boundary" in record.getMessage()]

    with caplog.at_level(logging.WARNING):
        timed.clock.wait_for_sleepers(1)
        timed.clock.advance(19.5)
        eventually(lambda: timed.boundary.due)  # the loop hears of it here, and has ten seconds from now on
        timed.clock.wait_for_sleepers(1)
        assert told() == []
        timed.clock.advance(9.5)
        timed.clock.wait_for_sleepers(1)
        assert told() == []
        for _ in range(40):
            timed.clock.advance(1)
            timed.clock.wait_for_sleepers(1)
        eventually(told)
    assert len(told()) == 1
    assert "call sv.should_stop() in the loop, or take its items from sv.batches(...)" in told()[0]


@pytest.mark.parametrize("stop", [True, False])
def test_a_stop_rings(loop: Loop, stop: bool) -> None:
    loop.run(1)
    loop.boundary.due = False
    if stop:
        loop.coordinator.request_stop()
    assert loop.boundary.due is stop


def test_a_ring_during_the_look_is_seen_at_the_next_boundary(loop: Loop) -> None:
    rings: list[Callable[[], None]] = [loop.boundary.ring]
    loop.boundary.appoint("rings", EverySteps(1), lambda step: rings.pop()() if rings else None)
    loop.run(1)
    assert loop.boundary.due
