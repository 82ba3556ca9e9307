"""A service and a summary of your own: a table of the slowest steps, and the memory that the process takes.

``start`` is given all that a service may know and do: appointments at step boundaries (on the training thread, where
nothing else moves the model), loops in threads of their own, the step, the stop. An error in it stops the run and is
raised at its end::

    python examples/04_own_service.py --logdir runs/service --steps 300
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections.abc import Mapping

import numpy as np

from supervise_core import EverySteps, Histogram, KeepLatest, Service, ServiceContext, Supervisor
from supervise_numpy import ArrayBackend, ArraySession


class SlowestSteps(Service):
    """Notes how long each stretch of steps took, and leaves the slowest in ``slowest.json`` at the end."""

    name = "slowest steps"

    def __init__(self, every: int) -> None:
        self._every = every
        self._stretches: list[tuple[float, int]] = []

    def start(self, context: ServiceContext) -> None:
        """Make the appointments."""
        self._context = context
        self._last = (context.global_step(), context.clock.monotonic())
        context.at_boundary(self.name, EverySteps(self._every), self._note)
        context.loop(0.5, self._watch_memory)

    def stop(self) -> None:
        """Called when the threads of the run have ended."""
        slowest = [{"step": step, "seconds": seconds} for seconds, step in sorted(self._stretches, reverse=True)[:3]]
        if self._context.logdir is not None:
            (self._context.logdir / "slowest.json").write_text(json.dumps(slowest))

    def _note(self, step: int) -> None:
        now = self._context.clock.monotonic()
        self._stretches.append(((now - self._last[1]) / (step - self._last[0]), step))
        self._last = (step, now)

    def _watch_memory(self) -> None:
        kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        self._context.write_summary({"memory/megabytes": kilobytes / 1024}, self._context.global_step())


def describe(session: ArraySession) -> Mapping[str, object]:
    """The summary: what is written of the model whenever ``summarize_every`` says so."""
    return {"weights": Histogram(session["w"]), "norm": float(np.linalg.norm(session["w"]))}


def main() -> None:
    """Fit a line, and say what happened."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--logdir", default="runs/service")
    parser.add_argument("--steps", type=int, default=300)
    options = parser.parse_args()

    rng = np.random.default_rng(0)
    w = np.zeros(8)
    truth = np.arange(8.0)
    sv = Supervisor(
        ArrayBackend({"w": w}, rng=rng),
        options.logdir,
        summary=describe,
        summarize_every=EverySteps(50),
        save_every=EverySteps(100),
        keep=KeepLatest(2),
        services=[SlowestSteps(every=10)],
    )
    with sv.managed_session() as sess:
        print(f"step {sess.global_step}: {sv.report.restored or 'begun anew'}", flush=True)
        while not sv.should_stop() and sess.global_step < options.steps:
            x = rng.normal(size=(16, 8))
            w += 0.05 * x.T @ (x @ (truth - w)) / 16
            sess.global_step += 1
            time.sleep(0.002)
    assert sv.logdir is not None
    slowest = json.loads((sv.logdir / "slowest.json").read_text())
    print(f"done: step {sv.global_step}, error {np.abs(w - truth).max():.1e}; slowest before steps", end=" ")
    print(", ".join(str(entry["step"]) for entry in slowest) or "(none)")


if __name__ == "__main__":
    main()
