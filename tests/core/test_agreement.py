"""One member's side of an agreement; what all sides together do is searched in properties/test_agreement_machine.py."""

from __future__ import annotations

import threading

import pytest

from supervise_core.agreement import Answer, Decision, StepAgreement, StopWish
from supervise_core.testing.clock import FakeClock, eventually

STOP = StopWish("request_stop", 2)


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


class Side:
    """An agreement, and the thread that trains."""

    def __init__(self, clock: FakeClock) -> None:
        self.clock = clock
        self.steps = 0
        self.rings = 0
        self.heard: list[Decision] = []
        self.agreement = StepAgreement(lambda: self.steps, self._ring, clock, self.heard.append)

    def _ring(self) -> None:
        self.rings += 1

    def passing(self, step: int, limit: float = 60) -> tuple[threading.Thread, list[list[Decision] | None]]:
        passed: list[list[Decision] | None] = []
        thread = threading.Thread(target=lambda: passed.append(self.agreement.pass_boundary(step, limit)))
        thread.start()
        return thread, passed


def test_before_training_it_can_act_anywhere(clock: FakeClock) -> None:
    side = Side(clock)
    side.steps = 40
    assert side.agreement.question(1) == Answer(0)


def test_within_a_step_it_can_act_at_its_end(clock: FakeClock) -> None:
    side = Side(clock)
    side.agreement.begin()
    side.steps = 4
    assert side.agreement.question(1) == Answer(5)
    assert side.rings == 1
    assert side.agreement.is_pending()


def test_at_a_boundary_it_can_act_there(clock: FakeClock) -> None:
    side = Side(clock)
    side.agreement.begin()
    side.agreement.rest(4)
    assert side.agreement.question(1) == Answer(4)


def test_no_round_no_wait(clock: FakeClock) -> None:
    side = Side(clock)
    assert side.agreement.pass_boundary(3, 60) == []


def test_it_holds_at_the_next_boundary_until_the_round_is_decided(clock: FakeClock) -> None:
    side = Side(clock)
    side.agreement.begin()
    side.agreement.question(1)
    thread, passed = side.passing(1)
    clock.wait_for_sleepers(1)
    assert not passed
    decision = Decision(1, 1, STOP)
    side.agreement.decide(decision)
    thread.join(10)
    assert passed == [[decision]]
    assert side.heard == [decision]


def test_what_is_decided_for_a_later_boundary_is_due_there(clock: FakeClock) -> None:
    side = Side(clock)
    side.agreement.begin()
    side.agreement.decide(Decision(1, 3))
    assert side.agreement.pass_boundary(2, 60) == []
    assert side.agreement.is_pending()
    assert side.agreement.pass_boundary(3, 60) == [Decision(1, 3)]
    assert not side.agreement.is_pending()
    assert side.agreement.pass_boundary(3, 60) == []


def test_a_decision_is_due_at_the_first_boundary_after_it_where_one_lies_in_between(clock: FakeClock) -> None:
    side = Side(clock)
    side.agreement.decide(Decision(1, 3))
    assert side.agreement.pass_boundary(8, 60) == [Decision(1, 3)]


def test_where_one_has_made_its_last_step_all_stop_together_but_save_only_at_their_end() -> None:
    answers = [Answer(7), Answer(6, is_last=True)]
    assert Decision.of(1, answers, STOP) == Decision(1, 7, STOP)
    assert Decision.of(1, answers, None).is_void
    assert not Decision.of(1, [Answer(7), Answer(6)], None).is_void


def test_a_decision_that_is_void_holds_nobody_and_has_nothing_done(clock: FakeClock) -> None:
    side = Side(clock)
    side.agreement.begin()
    side.agreement.question(1)
    side.agreement.decide(Decision(1, 3, is_void=True))
    assert side.agreement.pass_boundary(3, 60) == []
    assert not side.agreement.is_pending()


def test_a_decision_that_comes_twice_counts_once(clock: FakeClock) -> None:
    side = Side(clock)
    side.agreement.decide(Decision(1, 3))
    side.agreement.decide(Decision(1, 3))
    assert side.agreement.pass_boundary(3, 60) == [Decision(1, 3)]


def test_a_round_that_takes_too_long(clock: FakeClock) -> None:
    side = Side(clock)
    side.agreement.question(1)
    thread, passed = side.passing(1, limit=60)
    clock.wait_for_sleepers(1)
    clock.advance(59.5)
    assert thread.is_alive()
    clock.advance(0.5)
    thread.join(10)
    assert passed == [None]


def test_a_run_that_fails_holds_nobody(clock: FakeClock) -> None:
    side = Side(clock)
    side.agreement.question(1)
    thread, passed = side.passing(1)
    clock.wait_for_sleepers(1)
    side.agreement.release()
    thread.join(10)
    assert passed == [[]]


def test_a_chief_that_has_ended_holds_nobody_and_what_was_agreed_on_holds(clock: FakeClock) -> None:
    side = Side(clock)
    side.agreement.decide(Decision(1, 1, STOP))
    side.agreement.question(2)
    thread, passed = side.passing(1)
    clock.wait_for_sleepers(1)
    side.agreement.give_up()
    thread.join(10)
    assert passed == [[Decision(1, 1, STOP)]]


def test_after_the_last_step_every_answer_is_that_one(clock: FakeClock) -> None:
    side = Side(clock)
    side.agreement.begin()
    side.agreement.decide(Decision(1, 9, STOP))
    side.steps = 7
    side.agreement.end(7)
    assert side.agreement.question(2) == Answer(7, is_last=True)
    eventually(side.agreement.is_pending)
