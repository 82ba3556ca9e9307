"""Which checkpoints stay."""

from __future__ import annotations

import math
from typing import Any

import pytest

from supervise_core.errors import PolicyError
from supervise_core.retention import AnyOf, KeepAll, KeepBest, KeepEverySeconds, KeepEverySteps, KeepLatest, Kept


def listing(*steps: int, **losses: float) -> list[Kept]:
    """A checkpoint a minute; the losses by step: ``s10=0.5``."""
    return [
        Kept(step, 60.0 * number, {"loss": losses[f"s{step}"]} if f"s{step}" in losses else {})
        for number, step in enumerate(steps)
    ]


def test_keep_all() -> None:
    assert KeepAll().keep(listing(1, 2, 3)) == {1, 2, 3}


def test_keep_latest() -> None:
    assert KeepLatest(2).keep(listing(1, 2, 3)) == {2, 3}
    assert KeepLatest(5).keep(listing(1, 2, 3)) == {1, 2, 3}
    assert KeepLatest(1).keep([]) == set()


def test_keep_every_steps() -> None:
    assert KeepEverySteps(10).keep(listing(0, 5, 10, 15, 20)) == {0, 10, 20}


def test_keep_every_seconds_counts_from_the_last_kept() -> None:
    assert KeepEverySeconds(120).keep(listing(0, 1, 2, 3, 4, 5)) == {0, 2, 4}
    assert KeepEverySeconds(90).keep(listing(0, 1, 2, 3, 4, 5)) == {0, 2, 4}


def test_keep_best() -> None:
    there = listing(1, 2, 3, 4, s1=0.5, s2=0.1, s3=math.nan, s4=0.3)
    assert KeepBest("loss").keep(there) == {2}
    assert KeepBest("loss", 2).keep(there) == {2, 4}
    assert KeepBest("loss", 1, "max").keep(there) == {1}
    assert KeepBest("loss", 9).keep(there) == {1, 2, 4}
    assert KeepBest("accuracy").keep(there) == set()


def test_equals_go_to_the_newer_one() -> None:
    there = listing(1, 2, 3, s1=0.5, s2=0.5, s3=0.7)
    assert KeepBest("loss").keep(there) == {2}
    assert KeepBest("loss", mode="max").keep(listing(1, 2, s1=0.5, s2=0.5)) == {2}


def test_infinite_metrics_are_ranked() -> None:
    assert KeepBest("loss").keep(listing(1, 2, s1=math.inf, s2=-math.inf)) == {2}


def test_joined() -> None:
    both = KeepLatest(1) | KeepBest("loss") | KeepEverySteps(5)
    assert isinstance(both, AnyOf)
    assert both.keep(listing(1, 5, 7, 8, s1=0.1, s7=0.2)) == {1, 5, 8}
    assert both.metrics() == {"loss"}
    assert KeepLatest(1).metrics() == frozenset()


def test_rules_are_values() -> None:
    assert KeepLatest(3) == KeepLatest(3)
    assert KeepLatest(3) | KeepBest("loss") == KeepLatest(3) | KeepBest("loss")
    assert len({KeepLatest(3), KeepLatest(3), KeepLatest(4)}) == 2


@pytest.mark.parametrize(
    ("rule", "arguments"),
    [
        (KeepLatest, (0,)),
        (KeepLatest, (-1,)),
        (KeepEverySteps, (0,)),
        (KeepEverySeconds, (0,)),
        (KeepEverySeconds, (math.inf,)),
        (KeepEverySeconds, (math.nan,)),
        (KeepBest, ("loss", 0)),
        (KeepBest, ("loss", 1, "best")),
    ],
)
def test_rules_that_could_never_work(rule: Any, arguments: tuple[Any, ...]) -> None:
    with pytest.raises(PolicyError, match=rule.__name__):
        rule(*arguments)
