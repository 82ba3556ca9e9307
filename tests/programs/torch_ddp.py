"""Four ranks of DistributedDataParallel over gloo, forked from one process so that PyTorch is imported once.

``torch_ddp.py STATE`` trains every case twice, whole and cut in two with the model wrapped anew, and says the hashes
of the final states; it also leaves the state at the cut of the first case in the file STATE. With ``--resume`` it goes
on from that file only, in new processes.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import multiprocessing
import random
import sys
import tempfile
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from supervise_torch import warm_up_ddp
from supervise_torch.random_state import torch_random_state

RANKS = 4
STEPS, CUT = 6, 3


class Net(nn.Module):
    """Layers that are used in another order than they are registered in, and fill several buckets."""

    def __init__(self, *, normalised: bool) -> None:
        super().__init__()
        self.last = nn.Linear(64, 10)
        self.first = nn.Linear(32, 64)
        self.third = nn.Linear(64, 64)
        self.second = nn.Linear(64, 64)
        self.between = nn.Sequential(nn.BatchNorm1d(64), nn.Dropout(0.3)) if normalised else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.first(x))
        x = self.between(torch.tanh(self.second(x)))
        return self.last(torch.tanh(self.third(x)))


@dataclass
class Case:
    """A way to wrap a model, and to train it."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    warm: bool = True
    normalised: bool = False
    accumulates: bool = False
    adam: bool = False


CASES = [
    Case("plain"),
    Case("plain, not warmed up", warm=False),
    Case("static graph", {"static_graph": True}),
    Case("static graph, not warmed up", {"static_graph": True}, warm=False),
    Case("gradients are views", {"gradient_as_bucket_view": True}),
    Case("unused parameters", {"find_unused_parameters": True}),
    Case("unused parameters, not warmed up", {"find_unused_parameters": True}, warm=False),
    Case("normalised", normalised=True, adam=True),
    Case("normalised, buffers of its own", {"broadcast_buffers": False}, normalised=True),
    Case("accumulating", accumulates=True),
]


def digest(state: object) -> str:
    """The SHA-256 of nested state."""
    sha = hashlib.sha256()

    def add(value: object) -> None:
        if isinstance(value, torch.Tensor):
            sha.update(f"{value.dtype} {tuple(value.shape)}".encode() + value.contiguous().numpy().tobytes())
        elif isinstance(value, dict):
            for key, item in value.items():
                sha.update(repr(key).encode())
                add(item)
        elif isinstance(value, (list, tuple)):
            for item in value:
                add(item)
        else:
            sha.update(repr(value).encode())

    add(state)
    return sha.hexdigest()


class Training:
    """One start: a model that is wrapped, warmed up, and perhaps given a state that was saved."""

    def __init__(self, case: Case, rank: int, seed: int) -> None:
        self._case = case
        self._rank = rank
        torch.manual_seed(seed)
        self.model = DistributedDataParallel(Net(normalised=case.normalised), bucket_cap_mb=0.01, **case.options)
        if case.warm:
            warm_up_ddp(self.model, lambda: self.model(torch.randn(2, 32)).sum())
        kind = torch.optim.Adam if case.adam else torch.optim.SGD
        self._optimizer = kind(self.model.parameters(), lr=0.05)
        torch.manual_seed(rank)

    def state(self) -> Any:
        return copy.deepcopy([self.model.state_dict(), self._optimizer.state_dict(), torch.get_rng_state()])

    def load(self, state: Any) -> None:
        self.model.load_state_dict(state[0])
        self._optimizer.load_state_dict(state[1])
        torch.set_rng_state(state[2])

    def train(self, begin: int, end: int) -> None:
        for step in range(begin, end):
            self._optimizer.zero_grad()
            if self._case.accumulates:
                with self.model.no_sync():
                    self._backward(step + 1000)
            self._backward(step)
            self._optimizer.step()

    def _backward(self, number: int) -> None:
        generator = torch.Generator().manual_seed(1_000_000 * self._rank + number)
        inputs, targets = (torch.randn(8, size, generator=generator) for size in (32, 10))
        (self.model(inputs) - targets).square().mean().backward()


def gathered(value: object) -> list[Any]:
    values: list[Any] = [None] * RANKS
    dist.all_gather_object(values, value)
    return values


def say(rank: int, **facts: object) -> None:
    if rank == 0:
        print(json.dumps(facts), flush=True)


def compare(case: Case, rank: int, keep: Path | None) -> None:
    training = Training(case, rank, seed=0)
    training.train(0, CUT)
    states = gathered(training.state())
    training.train(CUT, STEPS)
    whole = gathered(digest(training.state()))
    again = Training(case, rank, seed=1)
    again.load(states[rank])
    again.train(CUT, STEPS)
    say(rank, case=case.name, warm=case.warm, whole=whole, cut=gathered(digest(again.state())))
    if keep is not None and rank == 0:
        torch.save(states, keep)


def resume(case: Case, rank: int, kept: Path) -> None:
    training = Training(case, rank, seed=2)
    training.load(torch.load(kept, weights_only=True)[rank])
    training.train(CUT, STEPS)
    say(rank, resumed=gathered(digest(training.state())))


def look(rank: int) -> None:
    """What a warm-up in which everything draws and normalises leaves behind."""
    net = Net(normalised=True)
    for parameter in net.parameters():
        parameter.data.add_(rank)  # DDP gives all ranks those of the first
    model = DistributedDataParallel(net, bucket_cap_mb=0.01, broadcast_buffers=False)
    given = torch.full_like(net.last.bias, 7.0 + rank)
    net.last.bias.grad = given
    net.between[0].running_mean.fill_(rank)

    def facts() -> dict[str, Any]:
        return {
            "random": digest(torch_random_state()),
            "buffers": digest(dict(net.named_buffers())),
            "parameters": digest({name: parameter.detach() for name, parameter in net.named_parameters()}),
            "gradients": digest({name: parameter.grad for name, parameter in net.named_parameters()}),
        }

    def loss() -> torch.Tensor:
        noise = torch.randn(2, 32) + float(np.random.normal()) + random.random()
        return model(noise).square().sum()

    before = facts()
    warm_up_ddp(model, loss)
    after = facts()
    changed = [key for key in before if before[key] != after[key]]
    differ = gathered(changed + ["the gradient itself"] * (net.last.bias.grad is not given))
    say(rank, looked=differ, statistics=gathered(before["buffers"]))


def main(rank: int, meeting: str, arguments: argparse.Namespace) -> None:
    warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated")
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=RANKS)
    if arguments.resume:
        resume(CASES[0], rank, arguments.state)
    else:
        for number, case in enumerate(CASES):
            compare(case, rank, None if number else arguments.state)
        look(rank)
    dist.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("state", type=Path)
    parser.add_argument("--resume", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    fork = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        ranks = [fork.Process(target=main, args=(rank, f"{folder}/meeting", arguments)) for rank in range(RANKS)]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
    sys.exit(max(abs(process.exitcode or 0) for process in ranks))
