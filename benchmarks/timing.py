"""How the figures are taken: what is compared runs in turns, and medians are compared."""

from __future__ import annotations

import gc
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping

ROUNDS = 15


def interleaved(subjects: Mapping[str, Callable[[], float]], rounds: int = ROUNDS) -> dict[str, float]:
    """The median of each subject's own measure, over rounds in which each has its turn."""
    taken: dict[str, list[float]] = {name: [] for name in subjects}
    gc.disable()
    try:
        for _ in range(rounds):
            for name, measure in subjects.items():
                taken[name].append(measure())
    finally:
        gc.enable()
    return {name: statistics.median(values) for name, values in taken.items()}


def per_call(call: Callable[[], object], count: int = 20_000) -> Callable[[], float]:
    """A measure of seconds per call."""

    def measure() -> float:
        turns = range(count)
        began = time.perf_counter()
        for _ in turns:
            call()
        called = time.perf_counter()
        for _ in turns:
            pass
        return max(0.0, (called - began) - (time.perf_counter() - called)) / count

    return measure


def fresh_process(*arguments: str, rounds: int = 9) -> float:
    """The median of the seconds that a new Python takes for something."""
    taken = []
    for _ in range(rounds):
        began = time.perf_counter()
        subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def show(name: str, seconds: float, beside: str = "", within: bool | None = None) -> bool:
    """Print one figure, and whether it is within its limit; that again."""
    units = (("s", 1.0), ("ms", 1e3), ("µs", 1e6), ("ns", 1e9))
    unit, scale = next((each for each in units if seconds * each[1] >= 1), units[-1])
    figure = f"{seconds * scale:.4g} {unit}"
    verdict = "" if within is None else "ok" if within else "OVER THE LIMIT"
    print(f"{name:58} {figure:>10}  {beside:44} {verdict}".rstrip(), flush=True)
    return within is not False
