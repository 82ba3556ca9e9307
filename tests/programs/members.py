"""One of several NumPy processes that train together and meet in a directory; it can hurt itself in the midst of it.

In step, nobody completes a step before all have begun it, as in a collective: a peer that is gone is a
``ConnectionError`` there, and one that only stands still is waited for.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import json
import logging
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from supervise_core import EverySteps, FileMembership, KeepLatest, Ready, Supervisor
from supervise_core.member import Patience
from supervise_numpy import ArrayBackend


def say(**facts: Any) -> None:
    os.write(1, f"{json.dumps(facts)}\n".encode())  # one call: a thread of a service says things, too


def options_from(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("logdir", type=Path)
    parser.add_argument("rank", type=int)
    parser.add_argument("size", type=int)
    parser.add_argument("--apart", action="store_true", help="members that do not train in step")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--pause", type=float, default=0.02)
    parser.add_argument("--save-every", type=int, default=5)
    parser.add_argument("--grace", type=float, default=30.0)
    parser.add_argument("--silence", type=float, default=20.0)
    parser.add_argument("--comeback", type=float, default=30.0)
    parser.add_argument("--max-wait", type=float, default=60.0)
    parser.add_argument("--fault", choices=["exception", "sleep", "freeze", "kill", "hold"])
    parser.add_argument("--where", choices=["step", "service", "save", "barrier", "start"])
    parser.add_argument("--at", type=int, default=7, help="the step of the fault")
    return parser.parse_args(arguments)


class Fault:
    """What this process does to itself, once."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._kind = options.fault
        self._where = options.where
        self._at = options.at

    def strike(self, where: str, step: int) -> None:
        if where != self._where or (where != "start" and step < self._at):
            return
        self._where = None
        say(fault=self._kind, where=where)
        match self._kind:
            case "exception":
                raise ValueError("hurt on purpose")
            case "sleep":
                while True:
                    time.sleep(3600)
            case "freeze":
                os.kill(os.getpid(), signal.SIGSTOP)
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "hold":
                ctypes.PyDLL(None).sleep(3600)  # a call that does not let go of the interpreter's lock


class Collective:
    """Files that say who has begun which step."""

    def __init__(self, directory: Path, rank: int, size: int) -> None:
        self._directory = directory
        self._rank = rank
        self._size = size
        directory.mkdir(parents=True, exist_ok=True)

    def begin(self, step: int, fault: Fault) -> None:
        own = self._directory / str(self._rank)
        draft = own.with_suffix(".draft")
        draft.write_text(f"{os.getpid()} {step}", encoding="ascii")
        draft.rename(own)
        fault.strike("barrier", step)
        for rank in range(self._size):
            while (there := self._read(rank)) is None or there[1] < step:
                if there is not None and not _lives(there[0]):
                    raise ConnectionError("connection reset by peer")
                time.sleep(0.002)

    def _read(self, rank: int) -> tuple[int, int] | None:
        try:
            process, step = (self._directory / str(rank)).read_text(encoding="ascii").split()
        except FileNotFoundError:
            return None
        return int(process), int(step)


def _lives(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def main() -> None:
    options = options_from(sys.argv[1:])
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    fault = Fault(options)
    rng = np.random.default_rng(options.rank)
    arrays = {"w": np.zeros(4)}
    backend = ArrayBackend(arrays, rng=rng)

    def ready(session: Any) -> Ready:
        fault.strike("start", 0)
        return Ready()

    def saver(session: Any, staging: Any) -> Any:
        fault.strike("save", sv.global_step)
        return backend.snapshot(session, staging)

    membership = FileMembership(
        options.logdir, options.rank, None if options.apart else options.size,
        synchronous=not options.apart, patience=Patience(options.silence, options.comeback),
    )  # fmt: skip
    sv = Supervisor(
        backend, options.logdir, membership=membership, ready=ready, saver=saver, grace=options.grace,
        save_every=EverySteps(options.save_every), summarize_every=None, keep=KeepLatest(3),
    )  # fmt: skip
    began = time.monotonic()
    say(process=os.getpid())
    try:
        with sv.managed_session(max_wait_secs=options.max_wait) as sess:
            say(begin=sv.global_step, restored=sv.report.restored, waited=time.monotonic() - began)
            collective = Collective(options.logdir / "collective" / str(sv.global_step), options.rank, options.size)
            if options.where == "service":
                sv.loop(0.01, lambda: fault.strike("service", sv.global_step))
            while not sv.should_stop() and sv.global_step < options.steps:
                step = sv.global_step + 1
                fault.strike("step", step)
                if not options.apart:
                    collective.begin(step, fault)
                arrays["w"] += 1 + 0 * rng.random()
                sess.global_step = step
                say(step=step, loss="")
                time.sleep(options.pause)
    except BaseException as error:
        say(error=f"{type(error).__name__}: {error}", waited=time.monotonic() - began)
        raise
    finally:
        say(
            done=sv.report.last_step,
            final=sv.report.final_save,
            weights=hashlib.sha256(arrays["w"].tobytes()).hexdigest(),
            randomness=hashlib.sha256(repr(rng.bit_generator.state).encode()).hexdigest(),
        )


if __name__ == "__main__":
    main()
