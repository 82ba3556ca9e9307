"""Causes, errors and joins of threads that stop together."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from supervise_core import Coordinator, StragglersError
from supervise_core.coordinator import StopCause
from supervise_core.testing.clock import FakeClock, eventually


class EndOfInput(Exception):  # noqa: N818 - it is none
    pass


def running(coordinator: Coordinator, body: Callable[[], object], name: str = "worker") -> threading.Thread:
    thread = threading.Thread(target=body, name=name, daemon=True)
    coordinator.register(thread)
    thread.start()
    return thread


def test_the_first_cause_is_kept() -> None:
    coordinator = Coordinator()
    assert coordinator.cause is None
    coordinator.request_stop(source="first")
    coordinator.request_stop(source="second")
    assert coordinator.cause == StopCause("first")
    assert coordinator.should_stop()


def test_the_first_error_is_raised_as_itself_each_time() -> None:
    coordinator, error = Coordinator(), ValueError("broken")
    coordinator.request_stop(error, source="a service")
    for _ in range(2):
        with pytest.raises(ValueError, match="broken") as raised:
            coordinator.join()
        assert raised.value is error
    assert str(coordinator.cause) == "a service: ValueError: broken"


def test_later_errors_are_notes_of_the_first() -> None:
    coordinator = Coordinator()
    coordinator.request_stop(ValueError("one"), source="a")
    coordinator.request_stop(OSError("two"), source="b")
    coordinator.request_stop(KeyError("three"), source="c")
    with pytest.raises(ValueError, match="one") as raised:
        coordinator.join()
    assert ["OSError: two" in note or "KeyError: 'three'" in note for note in raised.value.__notes__] == [True, True]
    assert raised.value.__notes__[0].startswith("After this error, b failed too:")


def test_the_same_error_reported_twice_is_one() -> None:
    coordinator, error = Coordinator(), ValueError("one")
    coordinator.request_stop(error, source="inside")
    coordinator.request_stop(error, source="outside")
    assert [cause.source for cause in coordinator.errors] == ["inside"]
    assert not hasattr(error, "__notes__")


def test_an_error_after_a_clean_stop_is_still_raised() -> None:
    coordinator = Coordinator()
    coordinator.request_stop()
    coordinator.request_stop(OSError("late"))
    assert coordinator.cause == StopCause("request_stop")
    with pytest.raises(OSError, match="late"):
        coordinator.join()


def test_the_end_of_input_is_a_clean_stop() -> None:
    coordinator = Coordinator(is_clean_stop=lambda error: isinstance(error, EndOfInput))
    with coordinator.stop_on_exception("the reader"):
        raise EndOfInput
    coordinator.join()
    assert coordinator.errors == ()
    assert str(coordinator.cause) == "the reader: end of input (EndOfInput)"


def test_what_is_no_exception_is_refused() -> None:
    with pytest.raises(TypeError, match="takes an exception object or None"):
        Coordinator().request_stop("broken")  # type: ignore[arg-type]


def test_a_thread_that_fails_stops_the_others() -> None:
    coordinator = Coordinator()

    def fail() -> None:
        with coordinator.stop_on_exception():
            raise ValueError("in a thread")

    running(coordinator, coordinator.wait_for_stop, "patient")
    running(coordinator, fail, "failing")
    with pytest.raises(ValueError, match="in a thread"):
        coordinator.join()
    assert coordinator.cause is not None
    assert coordinator.cause.source == "thread 'failing'"


def test_listeners_hear_the_first_cause_once_and_latecomers_at_once() -> None:
    coordinator = Coordinator()
    heard: list[str] = []
    coordinator.on_stop(lambda cause: heard.append(cause.source))
    coordinator.request_stop(source="a")
    coordinator.request_stop(source="b")
    coordinator.on_stop(lambda cause: heard.append(f"late {cause.source}"))
    assert heard == ["a", "late a"]


def test_join_waits_without_a_stop_until_all_have_ended() -> None:
    coordinator = Coordinator()
    ended = threading.Event()
    running(coordinator, lambda: ended.wait(10))
    joining = threading.Thread(target=coordinator.join)
    joining.start()
    ended.set()
    joining.join(10)
    assert not joining.is_alive()
    assert not coordinator.should_stop()


def test_the_grace_period_is_on_the_clock_and_stragglers_are_named_with_their_stack() -> None:
    clock = FakeClock()
    coordinator = Coordinator(clock=clock)
    released = threading.Event()

    def pay_no_attention() -> None:
        released.wait(10)

    threads = [running(coordinator, pay_no_attention, name) for name in ("deaf", "numb")]
    coordinator.request_stop()
    raised: list[StragglersError] = []

    def join() -> None:
        try:
            coordinator.join(grace=120)
        except StragglersError as error:
            raised.append(error)

    joining = threading.Thread(target=join)
    joining.start()
    clock.wait_for_sleepers(1)
    clock.advance(119.9)
    clock.wait_for_sleepers(1)
    assert not raised
    clock.advance(0.2)
    joining.join(10)
    assert list(raised[0].stacks) == ["deaf", "numb"]
    assert "pay_no_attention" in raised[0].stacks["deaf"]
    assert "2 thread(s) did not stop within 120 s: deaf, numb" in str(raised[0])
    released.set()
    for thread in threads:
        thread.join(10)


def test_stragglers_can_be_ignored_and_never_hide_an_error() -> None:
    coordinator = Coordinator()
    released = threading.Event()
    straggler = running(coordinator, lambda: released.wait(10))
    coordinator.request_stop()
    coordinator.join(grace=0.0, ignore_live_threads=True)
    coordinator.request_stop(ValueError("the cause"))
    with pytest.raises(ValueError, match="the cause"):
        coordinator.join(grace=0.0)
    released.set()
    straggler.join(10)


def test_a_thread_that_joins_does_not_wait_for_itself() -> None:
    coordinator = Coordinator()
    joined = threading.Event()

    def body() -> None:
        coordinator.request_stop()
        coordinator.join(grace=10)
        joined.set()

    running(coordinator, body)
    eventually(joined.is_set)


def test_a_wait_ends_with_the_stop_or_the_clock() -> None:
    clock = FakeClock()
    coordinator = Coordinator(clock=clock)
    answers: list[bool] = []
    waiting = threading.Thread(target=lambda: answers.append(coordinator.wait_for_stop(600)))
    waiting.start()
    clock.wait_for_sleepers(1)
    clock.advance(600)
    waiting.join(10)
    coordinator.request_stop()
    assert answers == [False]
    assert coordinator.wait_for_stop(600)
