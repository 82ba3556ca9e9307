"""The chief: whom it waits for, how it hears of those who fail, and how a stop of one becomes that of all."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator

import pytest

from supervise_core.agreement import StopWish
from supervise_core.errors import (
    DisagreementError,
    MemberFailedError,
    MemberLostError,
    MembershipError,
    ReadinessTimeoutError,
    SessionStateError,
)
from supervise_core.pages import Announcement, MemberPage, Share, member_page, share_page

from .members import Hall, Life, end

READY = Announcement("model.ckpt-7", 7)
SIGTERM = StopWish("signal SIGTERM", 1, 15)


def never() -> bool:
    return False


@pytest.fixture
def hall() -> Iterator[Hall]:
    hall = Hall()
    yield hall
    hall.close()


def training(hall: Hall, size: int = 3) -> list[Life]:
    """A chief and its workers, who all train in step and stand at no boundary."""
    chief, workers = hall.chief(size), [hall.worker(rank, size) for rank in range(1, size)]
    chief.member.announce(READY)
    calls = [hall.call(lambda: chief.member.await_all(60, never))]
    for worker in workers:
        hall.call(lambda worker=worker: worker.member.await_ready(60, never)).result()
        calls.append(hall.call(lambda worker=worker: worker.member.await_go(60, never)))
    for call in calls:
        call.result()
    for life in (chief, *workers):
        life.member.agreement.begin()
    return [chief, *workers]


# ---- the beginning


def test_all_begin_when_all_have_the_model(hall: Hall) -> None:
    chief, one, two = hall.chief(3), hall.worker(1, 3), hall.worker(2, 3)
    chief.member.announce(READY)
    begins = hall.call(lambda: chief.member.await_all(600, never))
    hall.call(lambda: one.member.await_ready(60, never)).result()
    goes = hall.call(lambda: one.member.await_go(600, never))
    hall.pass_time(30)
    assert not begins.is_done
    assert not goes.is_done
    hall.call(lambda: two.member.await_ready(60, never)).result()
    other = hall.call(lambda: two.member.await_go(600, never))
    begins.result()
    goes.result()
    other.result()


def test_who_does_not_come_is_named(hall: Hall, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "supervise_core.member")
    chief, one = hall.chief(3), hall.worker(1, 3)
    chief.member.announce(READY)
    waiting = hall.call(lambda: chief.member.await_all(20, never))
    hall.settle()
    hall.pass_time(19.75)
    assert not waiting.is_done
    hall.pass_time(0.25)
    names = "rank 1 (102 on machine), rank 2, which never came"
    with pytest.raises(ReadinessTimeoutError) as raised:
        waiting.result()
    assert str(raised.value) == f"waited 20 s until all ranks have the model: {names}"
    assert f"waiting for all ranks to have the model, for 10 more seconds at most: {names}" in caplog.text
    assert not one.failures


def test_who_ends_before_training_begins_is_named(hall: Hall) -> None:
    chief, one = hall.chief(2), hall.worker(1, 2)
    chief.member.announce(READY)
    waiting = hall.call(lambda: chief.member.await_all(600, never))
    hall.pass_time(1)
    hall.call(lambda: one.member.leave(end(rank=1))).result()
    with pytest.raises(MemberLostError, match=r"rank 1 \(102 on machine\) ended before training began"):
        waiting.result()


def test_a_stop_before_the_announcement_stops_all_that_wait(hall: Hall) -> None:
    chief, one, two = hall.chief(3), hall.worker(1, 3), hall.worker(2, 3)
    hall.pass_time(3)
    assert not one.member.wish(SIGTERM), "there is no step to agree on yet"
    hall.until(lambda: chief.stops and one.stops and two.stops, within=0.25)
    assert chief.stops[0] == one.stops[0] == two.stops[0] == SIGTERM


def test_a_stop_of_the_chief_before_the_announcement_too(hall: Hall) -> None:
    chief, one = hall.chief(2), hall.worker(1, 2)
    hall.settle()
    wish = StopWish("signal SIGINT", 0, 2)
    assert not chief.member.wish(wish)
    hall.until(lambda: one.stops, within=0.25)
    assert one.stops == [wish]
    with pytest.raises(SessionStateError, match="stopped"):
        hall.call(lambda: one.member.await_ready(60, lambda: bool(one.stops))).result()


# ---- rounds


def test_the_largest_answer_is_decided_on(hall: Hall) -> None:
    chief, one, two = training(hall)
    chief.steps[0], one.steps[0], two.steps[0] = 6, 7, 6
    assert one.member.wish(SIGTERM)
    lives = (chief, one, two)
    hall.until(lambda: all(life.member.agreement.is_pending() for life in lives))
    passed = [hall.call(lambda life=life: life.member.agreement.pass_boundary(8, 60)) for life in lives]
    decisions = [decision for call in passed for decision in call.result() or ()]
    assert [(decision.step, decision.stop) for decision in decisions] == [(8, SIGTERM)] * 3


def test_a_ring_that_is_lost_is_made_good(hall: Hall) -> None:
    chief, one, _ = training(hall)
    hall.place.loses_rings = True
    assert one.member.wish()
    hall.until(lambda: chief.member.agreement.is_pending(), within=2.5)
    hall.until(lambda: chief.member._decided == 1, within=2.5)


def test_whom_a_round_waits_for(hall: Hall) -> None:
    chief, _, two = training(hall)
    two.freeze()
    chief.member.wish(SIGTERM)
    hall.pass_time(3)
    assert chief.member.lacking() == "rank 2 (103 on machine)"


def test_who_has_ended_answers_with_its_last_step(hall: Hall) -> None:
    chief, _, two = training(hall)
    two.member.agreement.end(11)
    hall.call(lambda: two.member.leave(end(step=11, rank=2))).result()
    chief.member.wish(SIGTERM)
    hall.until(lambda: chief.member._decided == 1)
    [decision] = hall.call(lambda: chief.member.agreement.pass_boundary(11, 60)).result() or []
    assert decision.step == 11


# ---- who fails, and who is lost


def test_in_step_the_failure_of_one_is_that_of_all_with_its_text(hall: Hall) -> None:
    chief, one, two = training(hall)
    one.member.tell_failure("the training block: ValueError: diverged")
    hall.until(lambda: chief.failures and two.failures, within=0.5)
    for life in (chief, two):
        [error] = life.failures
        assert isinstance(error, MemberFailedError)
        assert (error.rank, str(error)) == (1, "rank 1 failed: the training block: ValueError: diverged")


def test_in_step_a_member_that_died_ends_the_run_for_all_and_is_named(hall: Hall) -> None:
    chief, one, two = training(hall)
    hall.pass_time(10)
    one.die()
    hall.until(lambda: chief.failures and two.failures, within=3)
    assert str(chief.failures[0]) == "rank 1 is lost: its process (102 on machine) is gone"
    assert "rank 1 is lost: its process (102 on machine) is gone" in str(two.failures[0])


def test_whoever_fails_can_tell_who_is_gone_before_anybody_has_looked(hall: Hall) -> None:
    """A collective breaks at once; that a process has no sign of life is found seconds later."""
    chief, one, two = training(hall)
    assert chief.member.gone() == two.member.gone() == []
    one.die()
    assert [text.split(" (")[0] for text in chief.member.gone()] == ["rank 1 is gone"]
    assert [text.split(" (")[0] for text in two.member.gone()] == ["rank 1 is gone"]
    chief.die()
    assert [text.split(" (")[0] for text in two.member.gone()] == ["rank 0 is gone", "rank 1 is gone"]


def test_who_has_ended_or_is_of_another_run_is_not_called_gone(hall: Hall) -> None:
    chief, one, two = training(hall)
    one.member.leave(end(rank=1))
    one.host.die()
    hall.settle()
    assert chief.member.gone() == two.member.gone() == []
    two.die()
    hall.worker(2, 3)
    hall.settle()
    assert chief.member.gone() == [], "its successor is there"


def test_in_step_a_silent_member_is_lost_after_a_while(hall: Hall) -> None:
    chief, one, _ = training(hall)
    hall.pass_time(10)
    one.freeze()
    hall.pass_time(15)
    assert not chief.failures
    hall.until(lambda: chief.failures, within=10)
    assert "rank 1 is lost: its process (102 on machine) has given no sign of life" in str(chief.failures[0])


def test_apart_the_others_go_on_without_one_that_died(hall: Hall, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "supervise_core")
    chief, one = hall.chief(None, synchronous=False), hall.worker(1, None, synchronous=False)
    chief.member.announce(READY)
    hall.pass_time(5)
    one.die()
    hall.pass_time(10)
    assert not chief.failures
    assert "rank 1 is lost: its process (102 on machine) is gone; the others go on" in caplog.text
    back = hall.worker(1, None, synchronous=False)
    assert hall.call(lambda: back.member.await_ready(60, never)).result() == READY
    hall.until(lambda: "rank 1 is back (103 on machine)" in caplog.text)


def test_apart_a_stop_reaches_all_at_once(hall: Hall) -> None:
    chief = hall.chief(None, synchronous=False)
    one, two = (hall.worker(rank, None, synchronous=False) for rank in (1, 7))
    chief.member.announce(READY)
    hall.pass_time(3)
    one.member.wish(SIGTERM)
    hall.until(lambda: chief.stops and two.stops, within=0.25)
    assert chief.stops[0] == two.stops[0] == SIGTERM


def test_what_an_earlier_run_left_concerns_nobody(hall: Hall) -> None:
    chief, one, two = training(hall)
    one.member.wish(SIGTERM)
    hall.settle()
    two.member.tell_failure("an old failure")
    hall.settle()
    for life in (chief, one, two):
        life.die()
    chief, one, two = training(hall)
    hall.pass_time(10)
    for life in (chief, one, two):
        assert not life.failures
        assert not life.stops
        assert not life.member.agreement.is_pending()


def test_what_must_be_the_same_and_is_not(hall: Hall) -> None:
    chief, one, two = training(hall)
    chief.member.state("the length of 'batches'", 100)
    one.member.state("the length of 'batches'", 100)
    two.member.state("the length of 'batches'", 99)
    hall.until(lambda: chief.failures and one.failures)
    assert isinstance(chief.failures[0], DisagreementError)
    assert str(chief.failures[0]) == "the length of 'batches': 99 on rank 2, and 100 on rank 0"


# ---- shares


def test_shares_of_all(hall: Hall) -> None:
    chief, one, two = training(hall)
    draft = chief.member.open_draft(5, "/there")
    waiting = hall.call(lambda: chief.member.gather(draft, 600))
    one.member.add_share(draft, '{"one": 1}', {"a": (3, "hash")})
    hall.pass_time(20)
    assert not waiting.is_done
    two.member.add_share(draft, "{}", {})
    shares = waiting.result()
    assert {rank: share.state for rank, share in shares.items()} == {1: '{"one": 1}', 2: "{}"}
    assert shares[1].files == {"a": (3, "hash")}


def test_the_share_of_an_earlier_draft_does_not_count(hall: Hall) -> None:
    chief, one = training(hall, 2)
    old, new = chief.member.open_draft(5, "/there"), chief.member.open_draft(6, "/here")
    one.member.add_share(old, "{}", {})
    with pytest.raises(MembershipError, match=r"the checkpoint of step 6 lacks the share of rank 1 \(102 on machine\)"):
        hall.call(lambda: chief.member.gather(new, 30)).result(within=30)


def test_the_share_of_an_earlier_life_does_not_count(hall: Hall) -> None:
    chief, _ = training(hall, 2)
    draft = chief.member.open_draft(5, "/there")
    with hall.place.changing():
        hall.place.pages[share_page(1)] = Share("another token", draft.number, "{}", {}).to_bytes()
    with pytest.raises(MembershipError, match="lacks the share of rank 1"):
        hall.call(lambda: chief.member.gather(draft, 10)).result(within=10)


def test_a_share_that_could_not_be_written(hall: Hall) -> None:
    chief, one = training(hall, 2)
    draft = chief.member.open_draft(5, "/there")
    one.member.add_share(draft, "{}", {}, "no space left")
    with pytest.raises(OSError, match=r"rank 1 \(102 on machine\) has no share for step 5: no space left"):
        hall.call(lambda: chief.member.gather(draft, 600)).result()


def test_a_worker_that_ends_is_waited_for_no_longer(hall: Hall) -> None:
    chief, one = training(hall, 2)
    draft = chief.member.open_draft(5, "/there")
    waiting = hall.call(lambda: chief.member.gather(draft, 600))
    hall.settle()
    hall.call(lambda: one.member.leave(end(step=4, rank=1))).result()
    with pytest.raises(MembershipError, match="the checkpoint of step 5 lacks the share of rank 1"):
        waiting.result()


def test_a_share_right_before_the_end_of_its_worker_counts(hall: Hall) -> None:
    chief, one = training(hall, 2)
    draft = chief.member.open_draft(5, "/there")
    one.member.add_share(draft, "{}", {})
    hall.call(lambda: one.member.leave(end(step=5, rank=1))).result()
    assert set(hall.call(lambda: chief.member.gather(draft, 600)).result()) == {1}


def test_a_worker_that_died_is_waited_for_no_longer(hall: Hall) -> None:
    chief, one, _ = training(hall)
    draft = chief.member.open_draft(5, "/there")
    waiting = hall.call(lambda: chief.member.gather(draft, 600))
    hall.settle()
    one.die()
    with pytest.raises(MembershipError, match=r"lacks the share of rank 1 \(102 on machine\);"):
        waiting.result()


# ---- the end


def test_in_step_the_chief_stays_until_the_others_have_ended(hall: Hall) -> None:
    chief, one = training(hall, 2)
    leaving = hall.call(lambda: chief.member.leave(end(step=9)))
    hall.pass_time(5)
    assert not leaving.is_done
    hall.call(lambda: one.member.leave(end(step=9, rank=1))).result()
    leaving.result()


def test_but_not_for_ever(hall: Hall) -> None:
    chief, _ = training(hall, 2)
    hall.call(lambda: chief.member.leave(end(step=9))).result(within=41)


# ---- two processes for one rank


def test_a_rank_that_is_taken_is_refused_and_nothing_is_changed(hall: Hall) -> None:
    first = hall.chief(2)
    hall.settle()
    before = dict(hall.place.pages)
    second = hall.call(lambda: hall.chief(2))
    with pytest.raises(MembershipError, match=r"rank 0 at memory is process 101 on machine already, which lives"):
        second.result(within=6)
    assert hall.place.pages.keys() == before.keys()
    hall.call(lambda: first.member.leave(end())).result()


def test_a_rank_whose_process_ends_meanwhile_is_taken_over(hall: Hall) -> None:
    first = hall.chief(2)
    second = hall.call(lambda: hall.chief(2))
    hall.pass_time(2)
    assert second.thread.is_alive()
    first.die()
    assert second.result(within=1).member.token != first.member.token


@pytest.mark.parametrize("synchronous", [True, False])
def test_two_that_came_as_one_rank_at_the_same_moment(
    hall: Hall, caplog: pytest.LogCaptureFixture, synchronous: bool
) -> None:
    chief, one = hall.chief(3, synchronous=synchronous), hall.worker(1, 3, synchronous=synchronous)
    hall.pass_time(1)
    twin = MemberPage("another token", hall.machine.process().identity(), chief.member.token)
    one.board.put(member_page(1), twin.to_bytes())
    one.board.ring(member_page(1))
    said = r"processes 102 on machine and 103 on machine both say that they are rank 1; give each process a rank"
    if synchronous:
        hall.until(lambda: chief.failures)
        assert re.search(said, str(chief.failures[0]))
    else:
        hall.until(lambda: re.search(said, caplog.text))
        assert not chief.failures
