"""A NumPy training program for campaigns: shuffled items, noise from three sources, decay at the end of each epoch.

Prints a line of JSON for each step, and at its end the SHA-256 of arrays and random state. It can hurt itself at an
exact place, which a test outside it could only hit by luck.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import sys
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from supervise_core import DirectoryStore, EverySteps, KeepLatest, Supervisor
from supervise_numpy import ArrayBackend


class Shuffled:
    """Items in an order drawn when a pass begins, each with noise drawn when it is handed out."""

    def __init__(self, items: int, rng: np.random.Generator) -> None:
        self.items = items
        self.rng = rng

    def __iter__(self) -> Iterator[np.ndarray[Any, Any]]:
        order = self.rng.permutation(self.items)
        return (np.full(4, number) + self.rng.normal(size=4) + random.random() for number in order)


class Cursor:
    """The same with a position of its own, which it is asked for."""

    def __init__(self, items: int, rng: np.random.Generator) -> None:
        self.items = items
        self.rng = rng
        self.order: list[int] | None = None

    def __iter__(self) -> Iterator[np.ndarray[Any, Any]]:
        if self.order is None:
            self.order = self.rng.permutation(self.items).tolist()
        while self.order:
            yield np.full(4, self.order.pop()) + self.rng.normal(size=4) + random.random()
        self.order = None

    def state_dict(self) -> dict[str, Any]:
        return {"order": None if self.order is None else list(self.order)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.order = state["order"]


def say(**facts: Any) -> None:
    print(json.dumps(facts), flush=True)


def options_from(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("logdir")
    parser.add_argument("--data", choices=["shuffled", "cursor"], default="shuffled")
    parser.add_argument("--uncounted", action="store_true", help="never set the global step")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--items", type=int, default=10)
    parser.add_argument("--save-every", type=int, default=3)
    parser.add_argument("--pause", type=float, default=0.0)
    parser.add_argument("--leave", choices=["before", "after", "unscheduled", "scheduled"])
    parser.add_argument("--kill-at-disk-call", type=int)
    parser.add_argument("--kill-before-scheduler", type=int)
    parser.add_argument("--stop-at", type=int, help="SIGTERM while that item is trained on, counted from 1")
    parser.add_argument("--stop-in-validation", type=int)
    return parser.parse_args(arguments)


def store_of(options: argparse.Namespace) -> DirectoryStore | None:
    if options.kill_at_disk_call is None:
        return None
    from supervise_core.testing.disks import KillingDisk

    return DirectoryStore(options.logdir, disk=KillingDisk(options.kill_at_disk_call))


def main() -> None:
    options = options_from(sys.argv[1:])
    random.seed(0)
    np.random.seed(0)
    rng, of_data = np.random.default_rng(1), np.random.default_rng(2)
    arrays = {"w": np.zeros(4), "rate": np.array(0.1)}
    sv = Supervisor(
        ArrayBackend(arrays, rng=rng, of_data=of_data),
        options.logdir,
        store=store_of(options),
        save_every=EverySteps(options.save_every),
        summarize_every=EverySteps(2),
        keep=KeepLatest(3),
    )
    data = (Shuffled if options.data == "shuffled" else Cursor)(options.items, of_data)

    def stop_here() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        sv.wait_for_stop(30)

    items = 0
    with sv.managed_session() as sess:
        say(begin=sv.global_step, restored=sv.report.restored)
        for epoch in sv.epochs(options.epochs):
            for item in sv.batches(data):
                if options.leave == "before" and sv.should_stop():
                    break
                items += 1
                if items == options.stop_at:
                    stop_here()
                loss = float(np.sum((item - arrays["w"]) ** 2))
                arrays["w"] += arrays["rate"] * (item - arrays["w"]) + 0.01 * rng.normal(size=4) + np.random.normal()
                if not options.uncounted:
                    sess.global_step += 1
                sv.scalars(loss=loss)
                say(step=sv.global_step, loss=loss.hex())
                if options.pause:
                    time.sleep(options.pause)
                if options.leave == "after" and sv.should_stop():
                    break
            if options.kill_before_scheduler == epoch:
                os.kill(os.getpid(), signal.SIGKILL)
            total = 0.0
            for number in sv.batches(range(4), name="validation"):
                if options.stop_in_validation == epoch and number == 0:
                    stop_here()
                total += number * rng.normal() * random.random()
            sv.metrics(validation=total)
            if options.leave == "unscheduled" and sv.should_stop():
                break
            if options.pause:
                time.sleep(2 * options.pause)
            arrays["rate"] *= 0.5 + 0.01 * rng.random()
            if options.leave == "scheduled" and sv.should_stop():
                break
    sha = hashlib.sha256(arrays["w"].tobytes() + arrays["rate"].tobytes())
    states = [rng.bit_generator.state, of_data.bit_generator.state, random.getstate(), np.random.get_state()[1:3]]
    say(
        done=sv.report.last_step,
        weights=sha.hexdigest(),
        randomness=hashlib.sha256(repr([str(state) for state in states]).encode()).hexdigest(),
    )


if __name__ == "__main__":
    main()
