"""A pass that was begun on one number of ranks, and is gone on with on another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from supervise_core import DataPositionError
from supervise_core.boundary import StepBoundary, StepCounter
from supervise_core.coordinator import Coordinator
from supervise_core.data_loop import DataLoop, RandomPort
from supervise_core.data_source import BatchSource


class Shared(BatchSource):
    """A source that writes down how it was begun."""

    def __init__(self, items: Sequence[int]) -> None:
        self._items = items
        self.begun: tuple[Any, ...] = ()

    def start(self, number: int, state: Any, consumed: int) -> None:
        self.begun = (number, state, consumed)
        self._left = iter(self._items[consumed:])

    def start_among(self, number: int, state: Any, consumed: int, ranks: tuple[int, int]) -> None:
        saved, now = ranks
        self.start(number, state, consumed * saved // now)
        self.begun = (number, state, consumed, ranks)

    def draw(self) -> Any:
        return next(self._left)

    def state(self) -> Any:
        return "state"

    def length(self) -> int | None:
        return len(self._items)


class Unshared(Shared):
    """One that goes on among as many ranks as before only."""

    start_among = BatchSource.start_among


def loop(source: BatchSource, ranks: int, saved: Any = None) -> DataLoop:
    coordinator, steps = Coordinator(), StepCounter(lambda: None)
    random = RandomPort(dict, lambda state: None)
    boundary = StepBoundary(coordinator, steps, False)
    return DataLoop(lambda data, seed: source, steps, boundary, coordinator, object, random, 0, saved, ranks=ranks)


def stopped_after(count: int, ranks: int, saved: Any = None, source: BatchSource | None = None) -> Any:
    """The position after so many items."""
    one = loop(source or Shared(range(12)), ranks, saved)
    batches = one.batches(None, "batches")
    for _ in range(count):
        next(batches)
    batches.stream.settle(one.steps, asked=True, counts=True)
    return one.position()


def test_the_source_is_told_among_how_many_the_pass_was_begun() -> None:
    saved = stopped_after(3, ranks=4)
    source = Shared(range(12))
    assert list(loop(source, 2, saved).batches(None, "batches")) == [6, 7, 8, 9, 10, 11]
    assert source.begun == (0, "state", 3, (4, 2))


def test_among_as_many_ranks_it_only_goes_on() -> None:
    source = Unshared(range(12))
    assert next(loop(source, 4, stopped_after(3, ranks=4)).batches(None, "batches")) == 3
    assert source.begun == (0, "state", 3)


def test_a_position_that_nobody_has_gone_on_with_keeps_its_number_of_ranks() -> None:
    saved = stopped_after(0, ranks=2, saved=stopped_after(3, ranks=4), source=Shared(range(12)))
    source = Shared(range(12))
    next(loop(source, 2, saved).batches(None, "batches"))
    assert source.begun == (0, "state", 3, (4, 2))


def test_once_gone_on_with_it_counts_among_the_ranks_of_now() -> None:
    saved = stopped_after(1, ranks=2, saved=stopped_after(3, ranks=4))
    source = Shared(range(12))
    next(loop(source, 3, saved).batches(None, "batches"))
    assert source.begun == (0, "state", 4, (2, 3))


def test_a_source_that_cannot_says_so() -> None:
    saved = stopped_after(3, ranks=4)
    with pytest.raises(DataPositionError, match="begun on 4 ranks, and there are 2 now"):
        next(loop(Unshared(range(12)), 2, saved).batches(None, "batches"))
