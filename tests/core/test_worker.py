"""Workers: how long they wait for whom, and what they say when nobody comes."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from supervise_core.agreement import StopWish
from supervise_core.errors import (
    ChiefFinishedError,
    ChiefLostError,
    ChiefNeverCameError,
    MemberFailedError,
    MembershipError,
    ReadinessTimeoutError,
    SessionStateError,
)
from supervise_core.pages import CHIEF, Announcement, OpenDraft

from .members import Hall, end

READY = Announcement("model.ckpt-7", 7)


def never() -> bool:
    return False


@pytest.fixture
def hall() -> Iterator[Hall]:
    hall = Hall()
    yield hall
    hall.close()


# ---- readiness


@pytest.mark.parametrize("synchronous", [True, False])
def test_it_goes_on_with_the_model_that_the_chief_announces(hall: Hall, synchronous: bool) -> None:
    chief, worker = hall.chief(synchronous=synchronous), hall.worker(synchronous=synchronous)
    waiting = hall.call(lambda: worker.member.await_ready(60, never))
    hall.pass_time(3)
    assert not waiting.is_done
    before = hall.clock.monotonic()
    chief.member.announce(READY)
    assert waiting.result() == READY
    assert hall.clock.monotonic() == before, "it goes on at once, and not with its next look"


def test_one_that_comes_late_finds_the_model_ready(hall: Hall) -> None:
    chief = hall.chief(synchronous=False)
    chief.member.announce(READY)
    hall.pass_time(30)
    before = hall.clock.monotonic()
    worker = hall.worker(synchronous=False)
    assert hall.call(lambda: worker.member.await_ready(60, never)).result() == READY
    assert hall.clock.monotonic() == before


@pytest.mark.parametrize("limit", [0.25, 2, 20, 60])
def test_the_limit_is_kept_exactly(hall: Hall, limit: float) -> None:
    worker = hall.worker()
    waiting = hall.call(lambda: worker.member.await_ready(limit, never))
    hall.settle()
    hall.pass_time(limit - 0.25)
    assert not waiting.is_done
    hall.pass_time(0.25)
    assert waiting.is_done
    with pytest.raises(ChiefNeverCameError) as raised:
        waiting.result()
    assert str(raised.value) == (
        f"waited {limit:g} s for the chief's model: rank 0, the chief, has not come to memory. "
        "Start it with the same place and rank 0."
    )
    assert isinstance(raised.value, TimeoutError)


def test_a_chief_that_is_never_ready_is_named(hall: Hall) -> None:
    hall.chief()
    worker = hall.worker()
    with pytest.raises(ReadinessTimeoutError, match=r"waited 4 s .*rank 0, the chief \(101 on machine\), is not ready"):
        hall.call(lambda: worker.member.await_ready(4, never)).result()


def test_it_says_for_whom_it_waits_and_why(hall: Hall, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "supervise_core.member")
    worker = hall.worker()
    waiting = hall.call(lambda: worker.member.await_ready(35, never))
    hall.pass_time(35)
    assert waiting.is_done
    said = [record.getMessage() for record in caplog.records if "waiting for" in record.getMessage()]
    assert said == [
        f"waiting for the chief's model, for {left} more seconds at most: rank 0, the chief, has not come to memory"
        for left in (25, 15, 5)
    ]


def test_a_stop_ends_the_wait(hall: Hall) -> None:
    worker = hall.worker()
    stopped: list[bool] = []
    waiting = hall.call(lambda: worker.member.await_ready(3600, lambda: bool(stopped)))
    hall.pass_time(1)
    stopped.append(True)
    with pytest.raises(SessionStateError, match="stopped while waiting for the chief's model: rank 0, the chief, has"):
        waiting.result(within=0.75)


def test_a_chief_that_died_before_it_was_ready(hall: Hall) -> None:
    chief, worker = hall.chief(), hall.worker()
    waiting = hall.call(lambda: worker.member.await_ready(3600, never))
    hall.pass_time(1)
    chief.die()
    hall.pass_time(29)
    assert not waiting.is_done, "it may be started again"
    with pytest.raises(ChiefLostError, match=r"rank 0, the chief, is lost: its process \(101 on machine\) is gone"):
        waiting.result()


def test_a_chief_that_died_and_came_back_is_the_one_that_counts(hall: Hall) -> None:
    chief, worker = hall.chief(), hall.worker()
    waiting = hall.call(lambda: worker.member.await_ready(3600, never))
    hall.pass_time(1)
    chief.die()
    hall.pass_time(10)
    hall.chief().member.announce(READY)
    assert waiting.result() == READY


def test_a_limit_shorter_than_that_says_that_the_chief_is_lost(hall: Hall) -> None:
    chief, worker = hall.chief(), hall.worker()
    waiting = hall.call(lambda: worker.member.await_ready(5, never))
    hall.pass_time(1)
    chief.die()
    with pytest.raises(ChiefLostError, match=r"waited 5 s for the chief's model: rank 0, the chief, is lost"):
        waiting.result()


def test_a_chief_that_has_finished(hall: Hall) -> None:
    chief = hall.chief(synchronous=False)
    chief.member.announce(READY)
    hall.call(lambda: chief.member.leave(end(step=90))).result()
    worker = hall.worker(synchronous=False)
    waiting = hall.call(lambda: worker.member.await_ready(3600, never))
    with pytest.raises(ChiefFinishedError, match=r"rank 0, the chief \(101 on machine\), has ended its run at step 90"):
        waiting.result(within=6)


def test_a_chief_that_has_failed(hall: Hall) -> None:
    chief, worker = hall.chief(), hall.worker()
    waiting = hall.call(lambda: worker.member.await_ready(3600, never))
    hall.settle()
    hall.call(lambda: chief.member.leave(end("failed", "service 'x': ValueError: no"))).result()
    with pytest.raises(MemberFailedError, match="rank 0 failed: service 'x': ValueError: no"):
        waiting.result(within=6)


def test_what_an_earlier_run_left_is_no_chief(hall: Hall) -> None:
    old = hall.chief()
    old.member.announce(READY)
    hall.settle()
    old.die()
    worker = hall.worker()
    waiting = hall.call(lambda: worker.member.await_ready(60, never))
    hall.pass_time(8)
    assert not waiting.is_done
    new = Announcement("model.ckpt-9", 9)
    hall.chief().member.announce(new)
    assert waiting.result() == new
    assert not worker.failures


def test_a_stop_of_an_earlier_run_stops_nobody(hall: Hall) -> None:
    old = hall.chief(synchronous=False)
    old.member.wish(StopWish("signal SIGTERM", 0, 15))
    hall.call(lambda: old.member.leave(end("stopped"))).result()
    old.host.die()
    worker = hall.worker(synchronous=False)
    hall.pass_time(4)
    assert not worker.stops


# ---- afterwards


def adopted(hall: Hall, *, synchronous: bool) -> tuple[object, object]:
    chief, worker = hall.chief(synchronous=synchronous), hall.worker(synchronous=synchronous)
    chief.member.announce(READY)
    hall.call(lambda: worker.member.await_ready(60, never)).result()
    return chief, worker


def test_in_step_a_lost_chief_ends_the_run_at_once(hall: Hall) -> None:
    chief, worker = adopted(hall, synchronous=True)
    hall.pass_time(30)
    assert not worker.failures
    chief.die()
    hall.pass_time(1)
    [error] = worker.failures
    assert str(error) == "rank 0, the chief, is lost: its process (101 on machine) is gone"


def test_in_step_a_silent_chief_ends_the_run(hall: Hall) -> None:
    chief, worker = adopted(hall, synchronous=True)
    hall.pass_time(30)
    chief.freeze()
    hall.pass_time(15)
    assert not worker.failures
    hall.pass_time(6)
    [error] = worker.failures
    assert isinstance(error, ChiefLostError)
    assert "has given no sign of life for 20 s" in str(error)


def test_in_step_a_chief_that_was_started_anew_ends_the_run(hall: Hall) -> None:
    chief, worker = adopted(hall, synchronous=True)
    chief.die()
    hall.chief()  # before anybody has seen that the other one is gone
    hall.until(lambda: worker.failures)
    assert "was started anew while this rank trained with the old one" in str(worker.failures[0])


def test_apart_it_waits_for_a_lost_chief_and_goes_on_with_the_new_one(
    hall: Hall, caplog: pytest.LogCaptureFixture
) -> None:
    chief, worker = adopted(hall, synchronous=False)
    chief.die()
    hall.pass_time(25)
    assert not worker.failures
    assert "rank 0, the chief, is lost: its process (101 on machine) is gone; waiting 30 s for it" in caplog.text
    hall.chief(synchronous=False).member.announce(READY)
    hall.pass_time(60)
    assert not worker.failures
    assert not worker.stops


def test_apart_a_chief_that_does_not_come_back_ends_the_run(hall: Hall) -> None:
    chief, worker = adopted(hall, synchronous=False)
    chief.die()
    hall.pass_time(32)
    [error] = worker.failures
    assert isinstance(error, ChiefLostError)


def test_apart_the_end_of_the_chief_is_that_of_all(hall: Hall) -> None:
    chief, worker = adopted(hall, synchronous=False)
    hall.call(lambda: chief.member.leave(end(text="request_stop"))).result()
    hall.until(lambda: worker.stops)
    assert worker.stops == [StopWish("the end of the chief's run (request_stop)", 0)]


@pytest.mark.parametrize("synchronous", [True, False])
def test_the_failure_of_the_chief_has_its_text(hall: Hall, synchronous: bool) -> None:
    chief, worker = adopted(hall, synchronous=synchronous)
    chief.member.tell_failure("the training block: ValueError: diverged")
    hall.until(lambda: worker.failures)
    assert str(worker.failures[0]) == "rank 0 failed: the training block: ValueError: diverged"


# ---- the board


def test_a_board_that_is_away_for_a_while_is_no_failure(hall: Hall) -> None:
    _, worker = adopted(hall, synchronous=True)
    worker.board.cut_off()
    hall.pass_time(15)
    worker.board.reconnect()
    hall.pass_time(60)
    assert not worker.failures


def test_a_board_that_stays_away_ends_the_run(hall: Hall) -> None:
    _, worker = adopted(hall, synchronous=True)
    worker.board.cut_off()
    hall.until(lambda: worker.failures, within=22)
    assert "the board of this run (memory) cannot be reached, for 2" in str(worker.failures[0])


def test_a_page_of_another_version_ends_the_run_and_says_so(hall: Hall) -> None:
    _, worker = adopted(hall, synchronous=True)
    with hall.place.changing():
        hall.place.pages[CHIEF] = b'{"a later": "version"}'
    hall.until(lambda: worker.failures)
    assert isinstance(worker.failures[0], MembershipError)
    assert "a page of the board was not written by this version of supervise-core" in str(worker.failures[0].__cause__)


# ---- checkpoints


def test_the_draft_of_a_step(hall: Hall) -> None:
    chief, worker = adopted(hall, synchronous=True)
    waiting = hall.call(lambda: worker.member.await_draft(5, 0, 600))
    hall.pass_time(20)
    opened = chief.member.open_draft(5, "/there")
    assert waiting.result() == opened == OpenDraft(1, 5, "/there")


def test_a_draft_of_a_later_step_passes_by(hall: Hall) -> None:
    chief, worker = adopted(hall, synchronous=True)
    waiting = hall.call(lambda: worker.member.await_draft(5, 0, 600))
    chief.member.open_draft(6, "/there")
    assert waiting.result() is None


def test_no_draft_comes_from_a_chief_that_has_ended(hall: Hall) -> None:
    chief, worker = adopted(hall, synchronous=True)
    waiting = hall.call(lambda: worker.member.await_draft(5, 0, 600))
    leaving = hall.call(lambda: chief.member.leave(end()))
    assert waiting.result() is None
    hall.call(lambda: worker.member.leave(end(rank=1))).result()
    leaving.result()


def test_no_draft_is_waited_for_from_a_chief_that_is_gone(hall: Hall) -> None:
    chief, worker = adopted(hall, synchronous=True)
    waiting = hall.call(lambda: worker.member.await_draft(5, 0, 600))
    chief.die()
    assert waiting.result(within=3) is None


def test_a_chief_that_fails_may_still_write_a_checkpoint_that_all_have_come_to(hall: Hall) -> None:
    chief, worker = adopted(hall, synchronous=True)
    waiting = hall.call(lambda: worker.member.await_draft(5, 0, 600))
    chief.member.tell_failure("no")
    hall.pass_time(2)
    opened = chief.member.open_draft(5, "/there")
    assert waiting.result() == opened
    gathered = hall.call(lambda: chief.member.gather(opened, 600))
    worker.member.add_share(opened, "{}", {})
    assert gathered.result().keys() == {1}


def test_but_not_for_long(hall: Hall) -> None:
    chief, worker = adopted(hall, synchronous=True)
    gathering = hall.call(lambda: chief.member.gather(chief.member.open_draft(4, "/there"), 600))
    waiting = hall.call(lambda: worker.member.await_draft(5, 1, 600))
    chief.member.tell_failure("no")
    assert waiting.result(within=6) is None
    with pytest.raises(MembershipError, match="lacks the share of rank 1"):
        gathering.result(within=6)


def test_who_has_left_a_step_behind_says_so(hall: Hall) -> None:
    chief, worker = adopted(hall, synchronous=True)
    gathering = hall.call(lambda: chief.member.gather(chief.member.open_draft(4, "/there"), 600))
    hall.call(lambda: worker.member.await_draft(5, 0, 600))
    with pytest.raises(
        OSError, match=r"rank 1 .* has no share for step 4: it has left that one behind, and is at step 5"
    ):
        gathering.result(within=5)


def test_a_draft_that_does_not_come_is_waited_for_no_longer_than_said(hall: Hall) -> None:
    _, worker = adopted(hall, synchronous=True)
    with pytest.raises(MembershipError, match="the chief did not begin the checkpoint of step 5 within 30 s"):
        hall.call(lambda: worker.member.await_draft(5, 0, 30)).result(within=30)


def test_the_outcome_of_a_draft(hall: Hall) -> None:
    chief, worker = adopted(hall, synchronous=True)
    draft = chief.member.open_draft(5, "/there")
    waiting = hall.call(lambda: worker.member.await_outcome(draft, 600))
    hall.pass_time(3)
    for number in range(2, 6):  # a few later ones, which the worker had no time to read
        chief.member.settle(OpenDraft(number, 5, ""), None, "another")
    chief.member.settle(draft, "model.ckpt-5")
    assert waiting.result().checkpoint == "model.ckpt-5"


def test_an_outcome_that_does_not_come(hall: Hall) -> None:
    chief, worker = adopted(hall, synchronous=True)
    draft = chief.member.open_draft(5, "/there")
    outcome = hall.call(lambda: worker.member.await_outcome(draft, 30)).result(within=30)
    assert (outcome.checkpoint, outcome.problem) == (None, "the chief did not say within 30 s what became of it")


def test_a_chief_that_dies_leaves_no_outcome_open(hall: Hall) -> None:
    chief, worker = adopted(hall, synchronous=True)
    draft = chief.member.open_draft(5, "/there")
    waiting = hall.call(lambda: worker.member.await_outcome(draft, 600))
    hall.settle()
    chief.die()
    assert waiting.result().checkpoint is None


# ---- the start


def test_a_board_that_is_slow_to_answer_when_all_come_is_asked_again(hall: Hall) -> None:
    hall.place.is_away = True
    joining = hall.call(lambda: hall.worker())
    hall.pass_time(10)
    hall.place.is_away = False
    assert joining.result(within=1).member.token


def test_but_not_for_ever(hall: Hall) -> None:
    hall.place.is_away = True
    with pytest.raises(ConnectionError):
        hall.call(lambda: hall.worker()).result(within=21)
    hall.lives.clear()


# ---- two processes for one rank


def test_a_rank_that_is_taken_is_refused_and_nothing_is_changed(hall: Hall) -> None:
    first = hall.worker()
    hall.settle()
    before = dict(hall.place.pages)
    second = hall.call(lambda: hall.worker())
    with pytest.raises(MembershipError, match=r"rank 1 at memory is process 101 on machine already, which lives"):
        second.result(within=6)
    assert hall.place.pages.keys() == before.keys()
    hall.call(lambda: first.member.leave(end(rank=1))).result()


def test_a_rank_whose_process_ends_meanwhile_is_taken_over(hall: Hall) -> None:
    first = hall.worker()
    second = hall.call(lambda: hall.worker())
    hall.pass_time(2)
    assert second.thread.is_alive()
    first.die()
    assert second.result(within=1).member.token != first.member.token
