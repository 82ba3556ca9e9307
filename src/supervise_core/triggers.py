"""When something is due: small frozen values, joined with ``|``. Pure; no clock is read here.

A trigger is asked once, after each firing, for the next moment at which it is due. So a timer can sleep until then,
a step hook compares two integers, and nothing is evaluated while nothing is due. Your own trigger is a subclass with
one method.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TypeVar

from supervise_core.errors import PolicyError

Number = TypeVar("Number", int, float)


@dataclass(frozen=True, slots=True)
class Firing:
    """The last time a trigger fired; at first, the moment at which the session began.

    ``seconds`` is on the clock's monotonic scale; ``cost`` is what it cost the training loop, in seconds: how long the
    training thread was held, and, for a checkpoint, the processor time of the threads that write it.
    """

    step: int
    seconds: float
    cost: float = 0.0


@dataclass(frozen=True, slots=True)
class Due:
    """The next moment: from that step on, or from that second on, whichever comes first. None is never."""

    step: int | None = None
    seconds: float | None = None

    def earliest(self, other: Due) -> Due:
        """Whichever of the two comes first, in steps and in seconds."""
        return Due(_earlier(self.step, other.step), _earlier(self.seconds, other.seconds))


class Trigger(ABC):
    """Decides when something is due."""

    @abstractmethod
    def next_due(self, last: Firing) -> Due:
        """The next moment after ``last``."""

    def __or__(self, other: Trigger) -> Trigger:
        return EitherOf(self, other)


@dataclass(frozen=True, slots=True)
class EverySeconds(Trigger):
    """Due when that many seconds have passed since it last fired."""

    seconds: float

    def __post_init__(self) -> None:
        if not 0 < self.seconds < float("inf"):
            raise PolicyError(f"EverySeconds takes a positive, finite number of seconds, not {self.seconds!r}")

    def next_due(self, last: Firing) -> Due:
        return Due(seconds=last.seconds + self.seconds)


@dataclass(frozen=True, slots=True)
class EverySteps(Trigger):
    """Due at the multiples of ``steps``, so that a resumed run fires at the same steps as an uninterrupted one."""

    steps: int

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise PolicyError(f"EverySteps takes a positive number of steps, not {self.steps!r}")

    def next_due(self, last: Firing) -> Due:
        return Due(step=(last.step // self.steps + 1) * self.steps)


@dataclass(frozen=True, slots=True)
class AtSteps(Trigger):
    """Due once at each of the given steps."""

    steps: tuple[int, ...]

    def __init__(self, *steps: int) -> None:
        if not steps or any(step < 0 for step in steps):
            raise PolicyError(f"AtSteps takes one or more steps that are not negative, not {steps!r}")
        object.__setattr__(self, "steps", tuple(sorted(set(steps))))

    def next_due(self, last: Firing) -> Due:
        return Due(step=next((step for step in self.steps if step > last.step), None))


@dataclass(frozen=True, slots=True)
class Overhead(Trigger):
    """Due as often as may be if saving is to take at most that share of the time: ``Overhead(0.03)``.

    The interval follows the cost that was measured last; it is never shorter than ``shortest`` seconds, for the disk's
    sake, and never longer than ``longest``.
    """

    share: float
    longest: float = 3600.0
    shortest: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise PolicyError(f"Overhead takes a share of the time between 0 and 1, such as 0.03, not {self.share!r}")
        if not 0 < self.shortest <= self.longest < float("inf"):
            raise PolicyError(
                f"Overhead takes positive, finite seconds with shortest= no longer than longest=, "
                f"not shortest={self.shortest!r} and longest={self.longest!r}"
            )

    def next_due(self, last: Firing) -> Due:
        return Due(seconds=last.seconds + min(max(last.cost / self.share, self.shortest), self.longest))


@dataclass(frozen=True, slots=True)
class EitherOf(Trigger):
    """Due when either is; what ``a | b`` makes."""

    first: Trigger
    second: Trigger

    def next_due(self, last: Firing) -> Due:
        return self.first.next_due(last).earliest(self.second.next_due(last))


@dataclass(frozen=True, slots=True)
class StepsOnly(Trigger):
    """What another trigger says of steps: what several processes that train in step do without asking each other."""

    whole: Trigger

    def next_due(self, last: Firing) -> Due:
        return Due(step=self.whole.next_due(last).step)


def _earlier(one: Number | None, other: Number | None) -> Number | None:
    if one is None or other is None:
        return other if one is None else one
    return min(one, other)
