"""A thread that does one thing at a fixed rate, on a clock that a test moves."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from supervise_core import Coordinator, Looper, PolicyError
from supervise_core.testing.clock import FakeClock, eventually


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def coordinator(clock: FakeClock) -> Iterator[Coordinator]:
    made = Coordinator(clock=clock)
    yield made
    made.request_stop()
    made.join_threads(grace=10)


def test_the_first_run_is_at_once_and_the_rate_is_fixed(clock: FakeClock, coordinator: Coordinator) -> None:
    moments: list[float] = []
    Looper.loop(coordinator, 10, lambda: moments.append(clock.monotonic() - 1000))
    for _ in range(3):
        clock.wait_for_sleepers(1)
        clock.advance(10)
    clock.wait_for_sleepers(1)
    assert moments == [0, 10, 20, 30]


def test_a_run_does_not_delay_the_next_one(clock: FakeClock, coordinator: Coordinator) -> None:
    moments: list[float] = []

    def slow() -> None:
        moments.append(clock.monotonic() - 1000)
        clock.advance(4)

    Looper.loop(coordinator, 10, slow)
    for _ in range(2):
        clock.wait_for_sleepers(1)
        clock.advance(6)
    clock.wait_for_sleepers(1)
    assert moments == [0, 10, 20]


def test_a_run_that_took_too_long_is_followed_by_one_and_no_burst(clock: FakeClock, coordinator: Coordinator) -> None:
    moments: list[float] = []

    def slow_once() -> None:
        moments.append(clock.monotonic() - 1000)
        if len(moments) == 1:
            clock.advance(37)

    Looper.loop(coordinator, 10, slow_once)
    clock.wait_for_sleepers(1)
    assert moments == [0]
    clock.advance(3)
    clock.wait_for_sleepers(1)
    clock.advance(10)
    clock.wait_for_sleepers(1)
    assert moments == [0, 40, 50]


def test_without_an_interval_it_runs_back_to_back_until_the_stop(coordinator: Coordinator) -> None:
    runs: list[int] = []

    def count() -> None:
        runs.append(1)
        if len(runs) == 50:
            coordinator.request_stop()

    looper = Looper.loop(coordinator, None, count)
    looper.join(10)
    assert len(runs) == 50


def test_a_stop_is_noticed_at_once(clock: FakeClock, coordinator: Coordinator) -> None:
    looper = Looper.loop(coordinator, 600, lambda: None)
    clock.wait_for_sleepers(1)
    coordinator.request_stop()
    looper.join(10)
    assert not looper.is_alive()


def test_an_error_stops_the_run(coordinator: Coordinator) -> None:
    def fail(number: int, *, word: str) -> None:
        raise ValueError(f"{word} {number}")

    Looper.loop(coordinator, 10, fail, (3,), {"word": "failed"}).join(10)
    assert str(coordinator.cause) == ("service 'loop test_an_error_stops_the_run.<locals>.fail': ValueError: failed 3")
    with pytest.raises(ValueError, match="failed 3"):
        coordinator.join()


@pytest.mark.parametrize("interval", [0, -1, float("nan"), float("inf")])
def test_an_interval_is_positive_and_finite(coordinator: Coordinator, interval: float) -> None:
    with pytest.raises(PolicyError, match="a positive number of seconds or None"):
        Looper(coordinator, interval, lambda: None)


def test_a_target_can_be_called(coordinator: Coordinator) -> None:
    with pytest.raises(TypeError, match="needs something to call"):
        Looper(coordinator, 1, "sv.save")  # type: ignore[arg-type]


def test_it_is_a_daemon_and_registered(coordinator: Coordinator) -> None:
    released = threading.Event()
    looper = Looper.loop(coordinator, None, lambda: released.wait(10))
    assert looper.daemon
    coordinator.request_stop()
    assert coordinator.join_threads(grace=0) == [looper]
    released.set()
    eventually(lambda: not looper.is_alive())
