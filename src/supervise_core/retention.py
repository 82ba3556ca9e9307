"""Which checkpoints to keep: small frozen values, joined with ``|``. Pure; computed anew from the listing each time."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from supervise_core.errors import PolicyError


@dataclass(frozen=True, slots=True)
class Kept:
    """What a retention rule may know of a checkpoint. ``wall_time`` is in seconds since the epoch.

    ``consistent`` is False for one that was not taken at a step boundary.
    """

    step: int
    wall_time: float
    metrics: Mapping[str, float] = field(default_factory=dict[str, float])
    consistent: bool = True


class Retention(ABC):
    """Decides which checkpoints stay. The newest one stays whatever a rule says."""

    @abstractmethod
    def keep(self, checkpoints: Sequence[Kept]) -> set[int]:
        """The steps to keep, of checkpoints given from the oldest to the newest."""

    def metrics(self) -> frozenset[str]:
        """The metrics that it ranks by. Reporting one of them has the state saved that it was measured on."""
        return frozenset()

    def __or__(self, other: Retention) -> Retention:
        return AnyOf(self, other)


@dataclass(frozen=True, slots=True)
class KeepAll(Retention):
    """Keeps everything."""

    def keep(self, checkpoints: Sequence[Kept]) -> set[int]:
        return {checkpoint.step for checkpoint in checkpoints}


@dataclass(frozen=True, slots=True)
class KeepLatest(Retention):
    """Keeps the newest ``count``."""

    count: int

    def __post_init__(self) -> None:
        if self.count < 1:
            raise PolicyError(f"KeepLatest takes a count of at least 1, not {self.count!r}")

    def keep(self, checkpoints: Sequence[Kept]) -> set[int]:
        return {checkpoint.step for checkpoint in checkpoints[-self.count :]}


@dataclass(frozen=True, slots=True)
class KeepEverySteps(Retention):
    """Keeps those whose step is a multiple of ``steps``."""

    steps: int

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise PolicyError(f"KeepEverySteps takes a positive number of steps, not {self.steps!r}")

    def keep(self, checkpoints: Sequence[Kept]) -> set[int]:
        return {checkpoint.step for checkpoint in checkpoints if checkpoint.step % self.steps == 0}


@dataclass(frozen=True, slots=True)
class KeepEverySeconds(Retention):
    """Keeps the oldest one, and from there each that is ``seconds`` of wall time or more younger than the last kept."""

    seconds: float

    def __post_init__(self) -> None:
        if not 0 < self.seconds < math.inf:
            raise PolicyError(f"KeepEverySeconds takes a positive, finite number of seconds, not {self.seconds!r}")

    def keep(self, checkpoints: Sequence[Kept]) -> set[int]:
        kept: set[int] = set()
        last = -math.inf
        for checkpoint in checkpoints:
            if checkpoint.wall_time - last >= self.seconds:
                kept.add(checkpoint.step)
                last = checkpoint.wall_time
        return kept


@dataclass(frozen=True, slots=True)
class KeepBest(Retention):
    """Keeps the ``count`` best by a metric given to ``sv.metrics``; a NaN is never best, equals go to the newer one."""

    metric: str
    count: int = 1
    mode: Literal["min", "max"] = "min"

    def __post_init__(self) -> None:
        if self.count < 1:
            raise PolicyError(f"KeepBest takes a count of at least 1, not {self.count!r}")
        if self.mode not in ("min", "max"):
            raise PolicyError(f"KeepBest takes mode='min' or mode='max', not {self.mode!r}")

    def keep(self, checkpoints: Sequence[Kept]) -> set[int]:
        sign = 1 if self.mode == "min" else -1
        ranked = sorted(
            (sign * checkpoint.metrics[self.metric], -checkpoint.step)
            for checkpoint in checkpoints
            if not math.isnan(checkpoint.metrics.get(self.metric, math.nan))
        )
        return {-negated for _, negated in ranked[: self.count]}

    def metrics(self) -> frozenset[str]:
        return frozenset({self.metric})


@dataclass(frozen=True, slots=True)
class AnyOf(Retention):
    """Keeps what either keeps; what ``a | b`` makes."""

    first: Retention
    second: Retention

    def keep(self, checkpoints: Sequence[Kept]) -> set[int]:
        return self.first.keep(checkpoints) | self.second.keep(checkpoints)

    def metrics(self) -> frozenset[str]:
        return self.first.metrics() | self.second.metrics()
