"""A PyTorch training program for campaigns: shuffling, dropout, random augmentation, a scheduler, validation.

Prints a line for each step, and at its end the SHA-256 of weights, optimizer, scheduler and random state.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import time

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from supervise_core import EverySteps, KeepLatest, Supervisor
from supervise_torch import TorchBackend


class Augmented(Dataset[tuple[torch.Tensor, int]]):
    """Noise from torch, NumPy and ``random``, drawn per sample."""

    def __init__(self, size: int) -> None:
        generator = torch.Generator().manual_seed(1)
        self.images = torch.randn(size, 1, 8, 8, generator=generator)
        self.labels = torch.randint(0, 10, (size,), generator=generator)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        image = self.images[index] + 0.1 * torch.randn(1, 8, 8) + float(np.random.normal(0, 0.1))
        if random.random() < 0.5:
            image = image.flip(-1)
        return image, int(self.labels[index])


def digest(value: object, into: "hashlib._Hash | None" = None) -> str:
    sha = into or hashlib.sha256()
    if isinstance(value, torch.Tensor):
        sha.update(str((value.dtype, tuple(value.shape))).encode())
        sha.update(value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b"")
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


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("logdir")
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--persistent", action="store_true")
    parser.add_argument("--accumulate", type=int, default=1)
    parser.add_argument("--skip", action="store_true", help="let an AMP scaler skip some steps")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--save-every", type=int, default=3)
    parser.add_argument("--pause", type=float, default=0.0)
    parser.add_argument("--leave", choices=["before", "after"], help="ask in the loop and break, before or after training")
    options = parser.parse_args()
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    torch.set_num_threads(1)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.2), nn.Flatten(), nn.Linear(256, 10)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones=[1, 3], gamma=0.5)
    data = Augmented(64)
    loader = DataLoader(
        data, batch_size=8, shuffle=True, num_workers=options.workers,
        persistent_workers=options.persistent and options.workers > 0,
    )
    parts: dict[str, object] = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=4, enabled=options.skip)
    if options.skip:
        parts["scaler"] = scaler
    sv = Supervisor(
        TorchBackend(**parts),
        options.logdir,
        save_every=EverySteps(options.save_every),
        summarize_every=EverySteps(2),
        keep=KeepLatest(3),
    )
    pending = 0
    with sv.managed_session() as sess:
        print(json.dumps({"begin": sess.global_step, "restored": sv.report.restored}), flush=True)
        for epoch in sv.epochs(options.epochs):
            model.train()
            for images, labels in sv.batches(loader):
                if options.leave == "before" and sv.should_stop():
                    break
                loss = nn.functional.cross_entropy(model(images), labels) / options.accumulate
                if options.skip and random.random() < 0.2:
                    loss = loss * float("inf")
                scaler.scale(loss).backward()
                pending += 1
                if pending % options.accumulate == 0:
                    scaler.step(optimizer)
                    scaler.update()
                    optimizer.zero_grad()
                sv.scalars(loss=loss, lr=optimizer.param_groups[0]["lr"])
                print(json.dumps({"step": sess.global_step, "loss": float(loss).hex()}), flush=True)
                if options.pause:
                    time.sleep(options.pause)
                if options.leave == "after" and sv.should_stop():
                    break
            model.eval()
            with torch.no_grad():  # an evaluation that draws random numbers
                noise = torch.randn(4, 1, 8, 8) + float(np.random.normal()) + random.random()
                value = float(model(noise).sum())
            sv.metrics(validation=value)
            if options.pause:
                time.sleep(2 * options.pause)
            scheduler.step()
    state = {name: part.state_dict() for name, part in parts.items()}
    rng = [torch.get_rng_state(), list(random.getstate()[1]), np.random.get_state()[1]]
    print(json.dumps({"done": sess.global_step, "sha256": digest([state, rng])}), flush=True)
    del data
    os._exit(0) if os.environ.get("FAST_EXIT") else None


if __name__ == "__main__":
    main()
