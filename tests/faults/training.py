"""A tiny training program over the public interface. Shared by the tests of this folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from supervise_core import EverySteps, KeepAll, Supervisor
from supervise_core.snapshot import Snapshot
from supervise_core.staging import Staging
from supervise_core.testing.clock import eventually
from supervise_numpy import ArrayBackend, ArraySession


def fill(arrays: Any) -> None:
    for array in arrays.values():
        array[...] = -1.0


class CountingBackend(ArrayBackend):
    """Counts its snapshots: all that the core asks for, written or not."""

    snapshots = 0

    def snapshot(self, session: ArraySession, staging: Staging) -> Snapshot:
        self.snapshots += 1
        return super().snapshot(session, staging)


class Program:
    """Arrays that hold, after step n, the number n; trained from wherever they are."""

    def __init__(self, logdir: Path, **arguments: Any) -> None:
        self.w: NDArray[np.float64] = np.zeros((7, 3))
        self.b: NDArray[np.int32] = np.zeros(5, np.int32)
        self.backend = CountingBackend({"w": self.w, "b": self.b}, init=fill)
        defaults: dict[str, Any] = {
            "save_every": EverySteps(1),
            "summarize_every": None,
            "keep": KeepAll(),
            "signals": False,
        }
        self.supervisor = Supervisor(self.backend, logdir, **(defaults | arguments))
        self.began_at = -1

    def settle(self) -> None:
        """Wait until what was captured is written, or has failed. The first snapshot is a rehearsal."""
        report = self.supervisor.report
        eventually(lambda: report.saves + report.failed_saves >= self.backend.snapshots - 1)

    def train(self, until: int) -> Program:
        with self.supervisor.managed_session() as session:
            self.began_at = session.global_step
            while not self.supervisor.should_stop() and session.global_step < until:
                self.w[...] = session.global_step + 1
                self.b[...] = session.global_step + 1
                session.global_step += 1
        return self

    def holds(self, step: int) -> bool:
        return bool((self.w == step).all() and (self.b == step).all())
