"""What the board in memory offers to tests: time from a clock, faults, and a count of calls."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from supervise_core.testing.boards import MemoryBoard, MemoryPlace
from supervise_core.testing.clock import FakeClock


@pytest.fixture
def place() -> MemoryPlace:
    return MemoryPlace()


def test_waits_take_their_time_from_the_clock(place: MemoryPlace) -> None:
    clock = FakeClock()
    board = MemoryBoard(place, clock)
    with ThreadPoolExecutor(2) as pool:
        waiting = pool.submit(board.await_change, "ready", None, 600.0)
        listening = pool.submit(board.rung, 700.0)
        clock.wait_for_sleepers(2)
        board.put("other", b"1")
        clock.advance(599.0)
        clock.wait_for_sleepers(2)
        assert not waiting.done()
        clock.advance(1.0)
        assert waiting.result(10) is None
        assert not listening.done()
        board.ring("ready")
        assert listening.result(10) == {"ready"}


def test_one_that_is_cut_off_raises_and_the_others_go_on(place: MemoryPlace) -> None:
    board, other = MemoryBoard(place), MemoryBoard(place)
    with ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(board.await_change, "ready", None, 60.0), pool.submit(board.rung, 60.0)]
        threading.Event().wait(0.05)
        board.cut_off()
        for one in waiting:
            with pytest.raises(ConnectionError, match="cut off"):
                one.result(10)
    with pytest.raises(ConnectionError, match="cut off"):
        board.get(["ready"])
    other.put("ready", b"1")
    board.reconnect()
    assert board.get(["ready"]) == [b"1"]


def test_rings_that_are_lost(place: MemoryPlace) -> None:
    board = MemoryBoard(place)
    place.loses_rings = True
    board.ring("ready")
    assert board.rung(0) == set()
    place.loses_rings = False
    board.ring("ready")
    assert board.rung(0) == {"ready"}


def test_calls_are_counted() -> None:
    board = MemoryBoard()
    board.get(["a", "b", "c"])
    board.put("a", b"")
    board.rung(0)
    assert board.calls == {"get": 1, "put": 1, "rung": 1, "pages": 4}
