"""Line 8: the share of a whole run that saving takes when ``Overhead`` says how often.

``python -m benchmarks.overhead [--seconds 300] [--mib 1024]`` trains one loop in turns under a ``Supervisor`` that
saves as often as ``Overhead(0.035)`` lets it, and without any saving. The supervised time stands still while the other
loop has its turn, which begins only when no save is in flight. It ends with exit status 1 if saving takes more than its
share, 2 if this version has no ``Overhead`` or the last checkpoint is false.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import supervise_core
from benchmarks.figures import Report
from benchmarks.saving_loops import Loop, compute_bound, memory_bound
from benchmarks.saving_ours import Supervised
from benchmarks.saving_state import FalseFigureError, State
from supervise_core.clock import SystemClock

SHARE = 0.035
_TURNS = 15


class PausedClock(SystemClock):
    """The clock of the machine, less the time for which it was paused."""

    def __init__(self) -> None:
        self._paused = 0.0
        self._since: float | None = None

    def monotonic(self) -> float:
        return (super().monotonic() if self._since is None else self._since) - self._paused

    def pause(self) -> None:
        """Stand still from now on."""
        self._since = super().monotonic()

    def go_on(self) -> None:
        """Go on from where it stood still."""
        assert self._since is not None
        self._paused += super().monotonic() - self._since
        self._since = None


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, check, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=300.0, help="of the supervised loop; the other has half of it")
    parser.add_argument("--mib", type=int, default=1024, help="size of the whole state")
    parser.add_argument("--loop", choices=("compute", "memory"), default="compute", help="what the loop is bound by")
    parser.add_argument("--dir", type=Path, default=None, help="where to write; a disk, not a tmpfs")
    options = parser.parse_args(arguments)
    if not hasattr(supervise_core, "Overhead"):
        print("8  this version has no Overhead trigger")
        return 2
    scratch = Path(tempfile.mkdtemp(prefix="benchmark-", dir=options.dir or Path.cwd()))
    try:
        return measure(options.seconds, options.mib << 20, options.loop, scratch)
    except FalseFigureError as error:
        print(f"FALSE: {error}")
        return 2
    finally:
        shutil.rmtree(scratch)


def measure(duration: float, nbytes: int, kind: str, folder: Path) -> int:
    """The exit status."""
    report = Report()
    state = State.like_gpt(nbytes)
    state.flood()
    loop = (compute_bound if kind == "compute" else memory_bound)(state)
    clock = PausedClock()
    trigger = supervise_core.Overhead(SHARE)
    taken, plain = _Turns(), _Turns()
    with Supervised(state, folder / "run", save_every=trigger, clock=clock) as run:
        saves = run.sv.report.saves
        turn = duration / _TURNS
        for _ in range(_TURNS):
            for supervised in random.sample((True, False), 2):
                if supervised:
                    taken.run(loop, turn, run.sv.should_stop, run.is_idle)
                else:
                    clock.pause()
                    plain.run(loop, turn / 2, lambda: None, lambda: True)
                    clock.go_on()
        saves = run.sv.report.saves - saves
        run.settle()
        run.check(state.twin())
    overhead = taken.per_step / plain.per_step - 1
    report.title(f"Overhead({SHARE}) with {nbytes >> 20} MiB, {kind}-bound loop, {taken.seconds:.0f} s, {saves} saves")
    report.say(f"   a step: {taken.per_step * 1e3:.2f} ms with saving, {plain.per_step * 1e3:.2f} ms without")
    report.number("8", "measured overhead", 100 * overhead, "%", 100 * SHARE, f"each turn: {taken.against(plain)}")
    return report.status


class _Turns:
    """Steps and seconds of one kind of loop."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._steps = 0
        self._each: list[float] = []

    def run(self, loop: Loop, duration: float, ask: Callable[[], object], may_end: Callable[[], bool]) -> None:
        """Train for so long, and on until it may end."""
        began, steps = time.perf_counter(), 0
        while time.perf_counter() - began < duration or not may_end():
            loop.step()
            ask()
            steps += 1
        taken = time.perf_counter() - began
        self.seconds += taken
        self._steps += steps
        self._each.append(taken / steps)

    @property
    def per_step(self) -> float:
        """Seconds."""
        return self.seconds / self._steps

    def against(self, other: _Turns) -> str:
        """The smallest and the largest overhead of a turn over the other's at the same time."""
        found = [100 * (mine / theirs - 1) for mine, theirs in zip(self._each, other._each, strict=True)]
        return f"{min(found):.1f} to {max(found):.1f} %"


if __name__ == "__main__":
    sys.exit(main())
