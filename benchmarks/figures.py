"""What was measured, and how it is printed: each figure as a ratio to its limit in the same round, its bound beside it.

A ratio is taken within each round, and the median of those is what counts: what disturbs a whole round disturbs both
sides of it. Medians are printed with the smallest and the largest.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

STEADY = 1.5
"""The slowest direct write of a run may take this many times as long as the quickest; else the disk was not ours."""

FINE, OVER, DISCARDED = 0, 1, 3
"""What a process ends with: all within bounds; something over; the machine was disturbed, so nothing is known."""


class Figures:
    """By subject, one number of each round; seconds, unless the name says otherwise."""

    def __init__(self) -> None:
        self._taken: dict[str, list[float]] = {}

    def add(self, subject: str, number: float) -> None:
        """Note the number of one round."""
        self._taken.setdefault(subject, []).append(number)

    def __contains__(self, subject: str) -> bool:
        return subject in self._taken

    def __getitem__(self, subject: str) -> Sequence[float]:
        return self._taken[subject]

    def median(self, subject: str) -> float:
        """Of the rounds."""
        return statistics.median(self._taken[subject])

    def ratios(self, subject: str, *limits: str) -> list[float]:
        """In each round, the subject over the sum of its limits. Other numbers of rounds: over the limits' medians."""
        taken = self._taken[subject]
        if all(len(self._taken[limit]) == len(taken) for limit in limits):
            sums = [sum(round_) for round_ in zip(*(self._taken[limit] for limit in limits), strict=True)]
        else:
            sums = [sum(self.median(limit) for limit in limits)] * len(taken)
        return [number / limit for number, limit in zip(taken, sums, strict=True)]

    def is_steady(self, reference: str = "direct write") -> bool:
        """Whether the disk took the same bytes in about the same time in every round."""
        taken = self._taken.get(reference, [1.0])
        return max(taken) <= STEADY * min(taken)


class Report:
    """Prints lines as they come, and remembers whether one was over its bound."""

    def __init__(self) -> None:
        self._over = self._discarded = False

    def discard(self) -> None:
        """What follows counts for nothing."""
        self._discarded = True

    @property
    def status(self) -> int:
        """What the process ends with."""
        return DISCARDED if self._discarded else OVER if self._over else FINE

    def title(self, text: str) -> None:
        """Begin a group of lines."""
        print(f"\n{text}", flush=True)

    def say(self, text: str) -> None:
        """A line that is no figure."""
        print(text, flush=True)

    def seconds(self, figures: Figures, subject: str, line: str = "") -> None:
        """A figure that is held against nothing: a limit."""
        self._print(line, subject, _seconds(figures[subject]))

    def ratio(
        self,
        line: str,
        label: str,
        figures: Figures,
        subject: str,
        limits: Sequence[str],
        bound: float | None = None,
        beside: str = "",
    ) -> None:
        """A figure as a ratio to what it is held against; without a bound, only for comparison."""
        ratios = figures.ratios(subject, *limits)
        median = statistics.median(ratios)
        against = f"{median:6.2f} × {' + '.join(limits)} ({min(ratios):.2f} to {max(ratios):.2f})"
        self._print(line, label, _seconds(figures[subject]), against + beside, bound, median)

    def number(self, line: str, label: str, number: float, unit: str, bound: float, beside: str = "") -> None:
        """One number and its bound."""
        self._print(line, label, f"{number:8.3f} {unit}", beside, bound, number)

    def _print(
        self, line: str, label: str, figure: str, beside: str = "", bound: float | None = None, number: float = 0.0
    ) -> None:
        verdict = ""
        if bound is not None:
            verdict = f"at most {bound:g}: {'ok' if number <= bound else 'OVER'}"
            if number > bound:
                self._over = True
        print(f"{line:2} {label:40} {figure:34} {beside:58} {verdict}".rstrip(), flush=True)


@dataclass(frozen=True, slots=True)
class Setting:
    """What is to be measured, and where."""

    nbytes: int
    rounds: int
    peers: bool
    folder: Path
    report: Report


def in_random_order(subjects: Mapping[str, Callable[[], None]], rounds: int) -> None:
    """Give each subject its turn in each round."""
    for _ in range(rounds):
        for name in random.sample(list(subjects), len(subjects)):
            subjects[name]()


def steadily(measure: Callable[[], Figures], report: Report) -> Figures:
    """What was measured on a steady disk, at the second attempt if need be. If it never was, that is said."""
    for last in (False, True):
        figures = measure()
        if figures.is_steady():
            break
        taken = figures["direct write"]
        report.say(
            f"   discarded: the direct write of the same bytes took {min(taken):.3f} to {max(taken):.3f} s, more than "
            f"{STEADY:g} times as long in one round as in another; the disk was not ours"
            + ("" if last else "; once more")
        )
        if last:
            report.discard()
    return figures


def _seconds(taken: Sequence[float]) -> str:
    median = statistics.median(taken)
    scale, unit = (1.0, "s") if median >= 1 else (1e3, "ms")
    return f"{median * scale:8.1f} {unit} ({min(taken) * scale:.1f} to {max(taken) * scale:.1f})"
