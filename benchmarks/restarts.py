"""How soon training goes on after a rank was killed, beside what torchrun itself takes to start its ranks again.

``python -m benchmarks.restarts`` has ``torchrun --max-restarts`` start four ranks, one of which ends itself with
``kill -9``, and measures from there until the last rank has made a step. Three programs take turns: one that only
imports PyTorch and makes its steps alone; one that trains with ``DistributedDataParallel`` from new; and the same under
a ``Supervisor``, which goes on from its newest checkpoint. It ends with exit status 1 if supervision costs more than
half a second over the same program without it.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from benchmarks.timing import show

PROGRAMS: Final = ("torch imported", "DDP", "DDP, supervised")
LIMIT: Final = 0.5
_RANKS: Final = 4
_KILLED_AT: Final = 12
_STEPS_AFTER: Final = 5


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; 0 if the median is within its limit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--rank-of", choices=PROGRAMS, help=argparse.SUPPRESS)
    parser.add_argument("--victim", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--logdir", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.rank_of:
        rank = Rank(options.rank_of, options.victim)
        rank.import_torch() if options.rank_of == PROGRAMS[0] else rank.train(options.logdir)
        return 0
    seconds_to_go_on(PROGRAMS[2], 0)  # so that all of it is compiled, and in the page cache
    chances = random.Random(0)
    taken: dict[str, list[float]] = {name: [] for name in PROGRAMS}
    for _ in range(options.rounds):
        victim = chances.randrange(_RANKS)
        for name in chances.sample(PROGRAMS, len(PROGRAMS)):
            taken[name].append(seconds_to_go_on(name, victim))
    for name in PROGRAMS:
        show(name, statistics.median(taken[name]), f"{min(taken[name]):.2f} to {max(taken[name]):.2f} s")
    more = statistics.median(ours - bare for ours, bare in zip(taken[PROGRAMS[2]], taken[PROGRAMS[1]], strict=True))
    return 0 if show("supervision costs", more, f"at most {LIMIT:g} s", more <= LIMIT) else 1


def seconds_to_go_on(program: str, victim: int) -> float:
    """From the kill of a rank until the last of the ranks that were started again has made a step."""
    with tempfile.TemporaryDirectory() as directory:
        command = [
            sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={_RANKS}",
            "--max-restarts=1", "--monitor-interval=0.1", "-m", "benchmarks.restarts",
            "--rank-of", program, "--victim", str(victim), "--logdir", str(Path(directory) / "logs"),
        ]  # fmt: skip
        environ = os.environ | {"OMP_NUM_THREADS": "1"}
        environ.pop("PYTHONDONTWRITEBYTECODE", None)  # what is installed has been compiled, like PyTorch
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, env=environ)
    if done.returncode != 0:
        raise RuntimeError(f"{program}: torchrun ended with {done.returncode}\n{done.stderr}")
    said = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    [killed] = [fact["killed"] for fact in said if "killed" in fact]
    first_steps = [fact["first step"] for fact in said if "first step" in fact]
    if len(first_steps) != _RANKS:
        raise RuntimeError(f"{program}: {len(first_steps)} ranks went on\n{done.stderr}")
    return float(max(first_steps) - killed)


class Rank:
    """One rank of a program that is killed once."""

    def __init__(self, program: str, victim: int) -> None:
        self.is_supervised = program == PROGRAMS[2]
        self._attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
        self._is_victim = int(os.environ["RANK"]) == victim
        self._steps = 0

    def is_done(self) -> bool:
        """Whether what was to be seen was seen."""
        return self._attempt > 0 and self._steps == _STEPS_AFTER

    def make_step(self) -> None:
        """A step was made; say so if it is the first one of the second attempt, or die."""
        self._steps += 1
        if self._attempt > 0 and self._steps == 1:
            say({"first step": time.time()})
        if self._attempt == 0 and self._is_victim and self._steps == _KILLED_AT:
            say({"killed": time.time()})
            os.kill(os.getpid(), signal.SIGKILL)

    def import_torch(self) -> None:
        """No training at all."""
        import torch

        while not self.is_done():
            torch.zeros(1)
            self.make_step()
            time.sleep(0.1)

    def train(self, logdir: str) -> None:
        """A small model on all ranks."""
        import torch
        import torch.distributed as dist
        from torch.nn.parallel import DistributedDataParallel

        from supervise_torch import init_process_group

        init_process_group("gloo")  # PyTorch's own one finds dead peers when it is started again
        torch.set_num_threads(1)
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.ReLU(), torch.nn.Linear(256, 10))
        ddp = DistributedDataParallel(model)
        optimizer = torch.optim.AdamW(model.parameters())
        data = [torch.randn(16, 64) for _ in range(1000)]

        def step(batch: Any) -> None:
            optimizer.zero_grad()
            ddp(batch).square().mean().backward()
            optimizer.step()
            self.make_step()
            time.sleep(0.02)

        if self.is_supervised:
            self._supervise(logdir, model, ddp, optimizer, data, step)
        else:
            for batch in data:
                if self.is_done():
                    break
                step(batch)
        dist.destroy_process_group()

    def _supervise(self, logdir: str, model: Any, ddp: Any, optimizer: Any, data: Any, step: Any) -> None:
        from supervise_core import EverySteps, Supervisor
        from supervise_torch import StoreMembership, TorchBackend, warm_up_ddp

        warm_up_ddp(ddp, lambda: ddp(data[0]).sum())
        sv = Supervisor(
            TorchBackend(model=model, optimizer=optimizer),
            logdir,
            membership=StoreMembership.from_environment(),
            save_every=EverySteps(5),
        )
        with sv.managed_session():
            for batch in sv.batches(data):
                if self.is_done():
                    break
                step(batch)


def say(fact: dict[str, float]) -> None:
    """A line of its own, whoever else writes there."""
    os.write(1, (json.dumps(fact) + "\n").encode())


if __name__ == "__main__":
    sys.exit(main())
