"""When something is due."""

from __future__ import annotations

import math
from typing import Any

import pytest

from supervise_core.errors import PolicyError
from supervise_core.triggers import AtSteps, Due, EitherOf, EverySeconds, EverySteps, Firing, Overhead, Trigger


def test_every_seconds_counts_from_the_last_firing() -> None:
    assert EverySeconds(600).next_due(Firing(7, 1000.0)) == Due(seconds=1600.0)


@pytest.mark.parametrize(("last", "due"), [(0, 100), (1, 100), (99, 100), (100, 200), (101, 200), (250, 300)])
def test_every_steps_is_due_at_multiples(last: int, due: int) -> None:
    assert EverySteps(100).next_due(Firing(last, 0.0)) == Due(step=due)


def test_at_steps_is_due_once_at_each() -> None:
    trigger = AtSteps(50, 10, 10, 0)
    assert trigger.steps == (0, 10, 50)
    assert trigger.next_due(Firing(0, 0.0)) == Due(step=10)
    assert trigger.next_due(Firing(10, 0.0)) == Due(step=50)
    assert trigger.next_due(Firing(30, 0.0)) == Due(step=50)
    assert trigger.next_due(Firing(50, 0.0)) == Due()


def test_either() -> None:
    trigger = EverySeconds(10) | EverySteps(100) | AtSteps(30)
    assert isinstance(trigger, EitherOf)
    assert trigger.next_due(Firing(5, 1.0)) == Due(step=30, seconds=11.0)
    assert trigger.next_due(Firing(30, 1.0)) == Due(step=100, seconds=11.0)


def test_earliest() -> None:
    assert Due().earliest(Due()) == Due()
    assert Due(step=3).earliest(Due(seconds=2.0)) == Due(3, 2.0)
    assert Due(3, 5.0).earliest(Due(4, 2.0)) == Due(3, 2.0)
    assert Due(0, 0.0).earliest(Due(4, 2.0)) == Due(0, 0.0)


@pytest.mark.parametrize(("cost", "pause"), [(0.0, 1), (0.1, 2), (0.5, 10), (60.0, 600), (1e9, 600)])
def test_overhead_waits_as_long_as_the_cost_demands_within_its_bounds(cost: float, pause: float) -> None:
    assert Overhead(0.05, longest=600).next_due(Firing(7, 100.0, cost)) == Due(seconds=pytest.approx(100 + pause))


def test_your_own_trigger() -> None:
    class Doubling(Trigger):
        def next_due(self, last: Firing) -> Due:
            return Due(step=max(1, 2 * last.step))

    assert (Doubling() | EverySteps(1000)).next_due(Firing(8, 0.0)) == Due(step=16)


def test_triggers_are_values() -> None:
    assert EverySteps(3) | EverySeconds(2) == EverySteps(3) | EverySeconds(2)
    assert len({AtSteps(1, 2), AtSteps(2, 1)}) == 1


@pytest.mark.parametrize(
    ("trigger", "arguments"),
    [
        (EverySeconds, (0,)),
        (EverySeconds, (-1,)),
        (EverySeconds, (math.inf,)),
        (EverySeconds, (math.nan,)),
        (EverySteps, (0,)),
        (EverySteps, (-5,)),
        (AtSteps, ()),
        (AtSteps, (5, -1)),
        (Overhead, (0,)),
        (Overhead, (1,)),
        (Overhead, (math.nan,)),
        (Overhead, (0.1, 0)),
        (Overhead, (0.1, math.inf)),
        (Overhead, (0.1, 5, 6)),
    ],
)
def test_triggers_that_could_never_work(trigger: Any, arguments: tuple[Any, ...]) -> None:
    with pytest.raises(PolicyError, match=trigger.__name__):
        trigger(*arguments)
