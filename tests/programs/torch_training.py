"""A PyTorch training program for campaigns: shuffling, dropout, random augmentation, a scheduler, validation.

Prints a line of JSON for each step, and at its end the SHA-256 of weights, optimizer, scheduler and random state.
It can hurt itself at an exact place, which a test outside it could only hit by luck.
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
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from supervise_core import DirectoryStore, EverySteps, KeepLatest, Supervisor
from supervise_torch import TorchBackend


class Augmented(Dataset[tuple[torch.Tensor, int]]):
    """Noise from torch, NumPy and ``random``, drawn per sample."""

    def __init__(self, size: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.images = torch.randn(size, 1, 8, 8, generator=generator)
        self.labels = torch.randint(0, 10, (size,), generator=generator)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        image = self.images[index] + 0.1 * torch.randn(1, 8, 8) + float(np.random.normal(0, 0.1))
        if random.random() < 0.5:
            image = image.flip(-1)
        return image, int(self.labels[index])


def digest(value: object, into: hashlib._Hash | None = None) -> str:
    """The SHA-256 of nested state: every tensor's dtype, shape and bytes, and the text of everything else."""
    sha = into or hashlib.sha256()
    if isinstance(value, torch.Tensor):
        sha.update(str((value.dtype, tuple(value.shape))).encode())
        if value.numel():
            sha.update(value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    elif isinstance(value, dict):
        for key in value:
            sha.update(repr(key).encode())
            digest(value[key], sha)
    elif isinstance(value, (list, tuple)):
        for item in value:
            digest(item, sha)
    elif isinstance(value, np.ndarray):
        sha.update(value.tobytes())
    else:
        sha.update(repr(value).encode())
    return sha.hexdigest()


def say(**facts: Any) -> None:
    print(json.dumps(facts), flush=True)


def kill_myself() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def options_from(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("logdir")
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--persistent", action="store_true")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--accumulate", type=int, default=1)
    parser.add_argument("--carry", action="store_true", help="accumulate across the ends of epochs")
    parser.add_argument("--skip", action="store_true", help="let an AMP scaler skip some steps")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--save-every", type=int, default=3)
    parser.add_argument("--pause", type=float, default=0.0)
    parser.add_argument(
        "--leave", choices=["before", "after", "unscheduled", "scheduled"], help="where to ask and break"
    )
    parser.add_argument("--kill-at-disk-call", type=int, help="SIGKILL in the middle of a save")
    parser.add_argument("--kill-before-scheduler", type=int, help="SIGKILL at the end of that epoch")
    parser.add_argument("--stop-at", type=int, help="SIGTERM while that item is trained on, counted from 1")
    parser.add_argument("--stop-in-validation", type=int, help="SIGTERM within the validation of that epoch")
    return parser.parse_args(arguments)


def store_of(options: argparse.Namespace) -> DirectoryStore | None:
    if options.kill_at_disk_call is None:
        return None
    from supervise_core.testing.disks import KillingDisk

    return DirectoryStore(options.logdir, disk=KillingDisk(options.kill_at_disk_call))


def main() -> None:
    options = options_from(sys.argv[1:])
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    torch.set_num_threads(1)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.2), nn.Flatten(), nn.Linear(256, 10)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones=[1, 3], gamma=0.5)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=4, enabled=options.skip)
    workers: dict[str, Any] = {
        "num_workers": options.workers,
        "persistent_workers": options.persistent and options.workers > 0,
    }
    training = DataLoader(Augmented(options.samples, seed=1), batch_size=8, shuffle=True, **workers)
    held_out = DataLoader(Augmented(16, seed=2), batch_size=8)
    parts: dict[str, Any] = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
    if options.skip:
        parts["scaler"] = scaler
    sv = Supervisor(
        TorchBackend(**parts),
        options.logdir,
        store=store_of(options),
        save_every=EverySteps(options.save_every),
        summarize_every=EverySteps(2),
        keep=KeepLatest(3),
    )

    def stop_here() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        sv.wait_for_stop(30)

    items = 0
    accumulated = 0
    with sv.managed_session() as sess:
        say(begin=sess.global_step, restored=sv.report.restored)
        for epoch in sv.epochs(options.epochs):
            model.train()
            if not options.carry:
                accumulated = 0
                optimizer.zero_grad()
            for images, labels in sv.batches(training):
                if options.leave == "before" and sv.should_stop():
                    break
                items += 1
                if items == options.stop_at:
                    stop_here()
                loss = nn.functional.cross_entropy(model(images), labels) / options.accumulate
                if options.skip and random.random() < 0.2:
                    loss = loss * float("inf")
                scaler.scale(loss).backward()
                accumulated += 1
                if accumulated % options.accumulate == 0:
                    scaler.step(optimizer)
                    scaler.update()
                    optimizer.zero_grad()
                sv.scalars(loss=loss, lr=optimizer.param_groups[0]["lr"])
                say(step=sess.global_step, loss=float(loss.detach()).hex())
                if options.pause:
                    time.sleep(options.pause)
                if options.leave == "after" and sv.should_stop():
                    break
            if options.kill_before_scheduler == epoch:
                kill_myself()
            model.eval()
            total = 0.0
            with torch.no_grad():
                for number, (images, _) in enumerate(sv.batches(held_out, name="validation")):
                    if options.stop_in_validation == epoch and number == 0:
                        stop_here()
                    total += float(model(images + torch.randn_like(images)).sum()) + random.random()
            sv.metrics(validation=total)
            if options.leave == "unscheduled" and sv.should_stop():
                break
            if options.pause:
                time.sleep(2 * options.pause)
            scheduler.step()
            if options.leave == "scheduled" and sv.should_stop():
                break
    state = {name: part.state_dict() for name, part in parts.items()}
    say(
        done=sess.global_step,
        weights=digest(state),
        randomness=digest([torch.get_rng_state(), list(random.getstate()[1]), np.random.get_state()[1:3]]),
        rate=optimizer.param_groups[0]["lr"],
    )


if __name__ == "__main__":
    main()
