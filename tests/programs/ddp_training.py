"""A PyTorch program that trains on several ranks in step, for campaigns; started by torchrun.

Each rank prints lines of JSON: when it begins, the samples of each step, and at its end the SHA-256 of its state.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import time
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler
from torch_training import Augmented, digest

from supervise_core import EverySeconds, EverySteps, KeepLatest, Patience, Supervisor
from supervise_torch import StoreMembership, TorchBackend, init_process_group, warm_up_ddp


class Numbered(Augmented):
    """Samples that know their number."""

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int, int]:  # type: ignore[override]
        image, label = super().__getitem__(index)
        return image, label, index


class Net(nn.Module):
    """Layers that are registered in another order than they are used in, so that the layout of gradients matters."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(64, 10)
        self.first = nn.Conv2d(1, 4, 3, padding=1)
        self.second = nn.Linear(256, 64)
        self.norm = nn.BatchNorm2d(4)
        self.dropout = nn.Dropout(0.2)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        hidden = torch.relu(self.norm(self.first(images))).flatten(1)
        return self.last(self.dropout(torch.relu(self.second(hidden))))


def say(**facts: Any) -> None:
    os.write(1, (json.dumps({"rank": dist.get_rank(), **facts}) + "\n").encode())  # whole lines, whoever else writes


def options_from(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("logdir")
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--samples", type=int, default=96)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--save-every", type=int, default=5)
    parser.add_argument("--pause", type=float, default=0.0)
    parser.add_argument("--grace", type=float, default=20.0)
    return parser.parse_args(arguments)


def main() -> None:
    options = options_from(sys.argv[1:])
    init_process_group("gloo")
    rank = dist.get_rank()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = Net()
    for source in (torch.manual_seed, random.seed, np.random.seed):
        source(rank)
    ddp = DistributedDataParallel(model, bucket_cap_mb=0.02)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones=[1, 3], gamma=0.5)
    data = Numbered(options.samples, seed=1)
    sampler = DistributedSampler[Any](data, shuffle=True, seed=3)
    loader = DataLoader(data, batch_size=2, sampler=sampler, num_workers=options.workers)
    held_out = DataLoader(Augmented(8, seed=2), batch_size=4)
    backend = TorchBackend(model=model, optimizer=optimizer, scheduler=scheduler)
    sv = Supervisor(
        backend,
        options.logdir,
        membership=StoreMembership.from_environment(patience=Patience(silence=8)),
        save_every=EverySteps(options.save_every) | EverySeconds(0.4),
        keep=KeepLatest(3),
        grace=options.grace,
    )
    say(joining=True)
    warm_up_ddp(ddp, lambda: ddp(torch.zeros(2, 1, 8, 8)).sum())
    with sv.managed_session():
        say(begin=sv.global_step, restored=sv.report.restored)
        for epoch in sv.epochs(options.epochs):
            sampler.set_epoch(epoch)
            for images, labels, indices in sv.batches(loader):
                loss = nn.functional.cross_entropy(ddp(images), labels)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                say(step=sv.global_step, epoch=epoch, loss=loss.item().hex(), samples=indices.tolist())
                time.sleep(options.pause)
            model.eval()
            with torch.no_grad():
                for images, _ in sv.batches(held_out, name="validation"):
                    ddp.module(images)
                    time.sleep(options.pause)
            model.train()
            scheduler.step()
        state = [model.state_dict(), optimizer.state_dict(), scheduler.state_dict(), torch.get_rng_state()]
        say(done=sv.global_step, digest=digest(state))


if __name__ == "__main__":
    main()
