"""Triggers and retention rules, for all there are of them."""

from __future__ import annotations

import math
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from supervise_core.retention import KeepAll, KeepBest, KeepEverySeconds, KeepEverySteps, KeepLatest, Kept, Retention
from supervise_core.triggers import AtSteps, Due, EverySeconds, EverySteps, Firing, Trigger

seconds = st.floats(0.001, 1e6)
steps = st.integers(0, 10**9)
triggers = st.recursive(
    st.one_of(
        seconds.map(EverySeconds),
        st.integers(1, 10**6).map(EverySteps),
        st.lists(steps, min_size=1, max_size=5).map(lambda chosen: AtSteps(*chosen)),
    ),
    lambda inner: st.tuples(inner, inner).map(lambda pair: pair[0] | pair[1]),
    max_leaves=4,
)
firings = st.builds(Firing, step=steps, seconds=st.floats(0, 1e9), cost=st.floats(0, 1e3))


@given(triggers, firings)
def test_what_is_due_lies_ahead(trigger: Trigger, last: Firing) -> None:
    due = trigger.next_due(last)
    assert due.step is None or due.step > last.step
    assert due.seconds is None or due.seconds > last.seconds


@given(triggers, triggers, firings)
def test_either_is_the_earlier_of_both_in_any_order(one: Trigger, other: Trigger, last: Firing) -> None:
    together = (one | other).next_due(last)
    assert together == (other | one).next_due(last)
    assert together == one.next_due(last).earliest(other.next_due(last))
    for single in (one.next_due(last), other.next_due(last)):
        assert is_no_later(together.step, single.step)
        assert is_no_later(together.seconds, single.seconds)


def is_no_later(one: float | None, other: float | None) -> bool:
    return other is None or (one is not None and one <= other)


@given(st.integers(1, 50), st.integers(0, 500), st.integers(0, 500))
def test_every_steps_fires_at_the_same_steps_after_a_resume(every: int, begin: int, resumed: int) -> None:
    def fired(start: int) -> list[int]:
        found, last = [], Firing(start, 0.0)
        while (due := EverySteps(every).next_due(last).step) is not None and due < 1200:
            found.append(due)
            last = Firing(due, 0.0)
        return found

    late = max(begin, resumed)
    assert fired(late) == [step for step in fired(min(begin, resumed)) if step > late]


@given(st.lists(steps, min_size=1, max_size=8), steps)
def test_at_steps_fires_once_at_each(chosen: list[int], start: int) -> None:
    found, last = [], Firing(start, 0.0)
    while (due := AtSteps(*chosen).next_due(last)) != Due():
        assert due.step is not None
        found.append(due.step)
        last = Firing(due.step, 0.0)
    assert found == sorted({step for step in chosen if step > start})


# ---- retention

metrics = st.dictionaries(st.sampled_from(["loss", "accuracy"]), st.floats(), max_size=2)


@st.composite
def listings(draw: st.DrawFn) -> list[Kept]:
    chosen = sorted(draw(st.sets(st.integers(0, 300), max_size=12)))
    clock = draw(st.lists(st.floats(-10, 1000), min_size=len(chosen), max_size=len(chosen)))
    return [Kept(step, 1.7e9 + wall, draw(metrics)) for step, wall in zip(chosen, clock, strict=True)]


rules = st.recursive(
    st.one_of(
        st.just(KeepAll()),
        st.integers(1, 6).map(KeepLatest),
        st.integers(1, 50).map(KeepEverySteps),
        st.floats(0.1, 500).map(KeepEverySeconds),
        st.builds(KeepBest, st.sampled_from(["loss", "accuracy"]), st.integers(1, 3), st.sampled_from(["min", "max"])),
    ),
    lambda inner: st.tuples(inner, inner).map(lambda pair: pair[0] | pair[1]),
    max_leaves=3,
)


@given(rules, listings())
def test_only_what_is_there_is_kept(rule: Retention, there: list[Kept]) -> None:
    assert rule.keep(there) <= {one.step for one in there}


@given(rules, rules, listings())
def test_together_they_keep_what_either_keeps(one: Retention, other: Retention, there: list[Kept]) -> None:
    assert (one | other).keep(there) == one.keep(there) | other.keep(there)
    assert (one | other).metrics() == one.metrics() | other.metrics()


@given(rules, listings())
def test_pruning_twice_is_pruning_once(rule: Retention, there: list[Kept]) -> None:
    """What a rule keeps does not hang on what it removed before (the newest stays in any case)."""
    kept = [one for one in there if one.step in rule.keep(there)]
    assert rule.keep(kept) == {one.step for one in kept}


@given(st.integers(1, 6), listings())
def test_keep_latest(count: int, there: list[Kept]) -> None:
    kept = KeepLatest(count).keep(there)
    assert len(kept) == min(count, len(there))
    assert kept == {one.step for one in there[len(there) - len(kept) :]}


@given(st.floats(0.1, 500), listings())
def test_keep_every_seconds_keeps_its_distance(distance: float, there: list[Kept]) -> None:
    kept = [one.wall_time for one in there if one.step in KeepEverySeconds(distance).keep(there)]
    assert all(later - earlier >= distance for earlier, later in pairwise(kept))
    assert bool(kept) == bool(there)


@given(st.integers(1, 4), st.sampled_from(["min", "max"]), listings())
def test_keep_best_keeps_none_worse_than_what_it_drops(count: int, mode: str, there: list[Kept]) -> None:
    kept = KeepBest("loss", count, mode).keep(there)  # type: ignore[arg-type]
    losses = {one.step: one.metrics["loss"] for one in there if not math.isnan(one.metrics.get("loss", math.nan))}
    assert kept <= losses.keys()
    assert len(kept) == min(count, len(losses))
    sign = 1 if mode == "min" else -1
    for good in kept:
        assert all(sign * losses[good] <= sign * losses[other] for other in losses.keys() - kept)
