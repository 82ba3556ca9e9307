"""Runs of several numbers of processes, one after another, on a model that ``fully_shard`` shares out among them.

PyTorch is imported once; the processes of each run are forked from this one. Prints a line of JSON for each run: the
hashes of everything that the ranks have together when it begins and when it ends, and of what each has alone.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from supervise_core import CheckpointDirectory, EverySteps, FileMembership, KeepLatest, LocalMembership, Supervisor
from supervise_torch import TorchBackend

MESHES = {2: (2, 1), 3: (3, 1), 4: (2, 2)}
LIMIT = 120.0


class Model(nn.Module):
    """Sides that no number of ranks divides, fewer rows than ranks, tied weights, frozen ones, buffers, dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(3, 10)
        self.frozen = nn.Linear(10, 10)
        self.hidden = nn.Sequential(nn.Linear(10, 13), nn.BatchNorm1d(13), nn.Dropout(0.2), nn.Linear(13, 10))
        self.head = nn.Linear(10, 3, bias=False)
        self.head.weight = self.embedding.weight
        self.frozen.requires_grad_(False)

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        return self.head(self.hidden(self.frozen(self.embedding(words)).relu()))


class Layouts(nn.Module):
    """Parameters in every way of sharing out that is not that of ``fully_shard`` on one row of processes."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.columns, self.both, self.copied = (nn.Parameter(torch.randn(7, 9)) for _ in range(3))
        self.strided = nn.Linear(9, 8)
        self.narrow = nn.Parameter(torch.randn(5, 3).to(torch.bfloat16))
        self.wide = nn.Parameter(torch.randn(5, 3, dtype=torch.complex128))
        self.register_buffer("counted", torch.arange(11.0))
        if size > 1:
            row = init_device_mesh("cpu", (size,))
            mesh = init_device_mesh("cpu", MESHES[size], mesh_dim_names=("data", "tensor"))
            self._share("columns", row, Shard(1))
            self._share("narrow", row, Shard(1))
            self._share("wide", row, Shard(0))
            self._share("both", mesh, Shard(0), Shard(1))
            self._share("copied", mesh, Replicate(), Shard(0))
            self.counted = distribute_tensor(self.counted, row, [Shard(0)])
            parallelize_module(self.strided, mesh["tensor"], ColwiseParallel())
            fully_shard(self.strided, mesh=mesh["data"])

    def _share(self, name: str, mesh: Any, *placements: Any) -> None:
        self.register_parameter(name, nn.Parameter(distribute_tensor(getattr(self, name).detach(), mesh, placements)))


def whole(value: Any) -> Any:
    """A tree of state with whole tensors in place of those that are shared out."""
    if isinstance(value, DTensor):
        return value.full_tensor()
    if isinstance(value, dict):
        return {key: whole(item) for key, item in value.items()}
    return [whole(item) for item in value] if isinstance(value, (list, tuple)) else value


def digest(value: Any) -> str:
    """The SHA-256 of a tree of state."""
    sha = hashlib.sha256()

    def add(item: Any) -> None:
        if isinstance(item, torch.Tensor):
            sha.update(repr((item.dtype, tuple(item.shape))).encode())
            flat = item.detach().contiguous().reshape(-1)
            sha.update(flat.view(torch.uint8).numpy().tobytes() if item.numel() else b"")
        elif isinstance(item, dict):
            for key in sorted(item, key=repr):
                sha.update(repr(key).encode())
                add(item[key])
        elif isinstance(item, list):
            for one in item:
                add(one)
        else:
            sha.update(repr(item).encode())

    add(value)
    return sha.hexdigest()


def train(rank: int, size: int, logdir: Path, steps: int, seed: int, resume: Any = "auto") -> dict[str, Any]:
    """One rank of one run; what it has to say."""
    torch.set_num_threads(1)
    if size > 1:
        store = dist.FileStore(str(logdir / f"store-{seed}"), size)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    torch.manual_seed(seed)
    model, layouts = Model(), Layouts(size)
    if size > 1:
        row = init_device_mesh("cpu", (size,))
        fully_shard(model.hidden, mesh=row)
        fully_shard(model, mesh=row)
    torch.manual_seed(seed + rank)
    decayed = [parameter for parameter in model.parameters() if parameter.requires_grad and parameter.ndim > 1]
    others = [parameter for parameter in model.parameters() if parameter.requires_grad and parameter.ndim == 1]
    optimizer = torch.optim.AdamW([{"params": decayed}, {"params": others, "weight_decay": 0.0}], lr=1e-2)
    other = torch.optim.SGD(layouts.parameters(), lr=0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3)
    parts = {"model": model, "optimizer": optimizer, "layouts": layouts, "other": other, "scheduler": scheduler}
    sv = Supervisor(
        TorchBackend(**parts),
        logdir,
        membership=FileMembership(logdir, rank, size, synchronous=True) if size > 1 else LocalMembership(),
        save_every=EverySteps(3),
        summarize_every=None,
        resume=resume,
        keep=KeepLatest(3),
    )

    def state() -> dict[str, Any]:
        found = {name: whole(part.state_dict()) for name, part in parts.items()}
        return {
            "step": sv.global_step,
            "together": {
                name: digest({key: item for key, item in entry.items() if "running" not in str(key)})
                for name, entry in found.items()
            },
            "alone": digest([torch.get_rng_state(), list(model.buffers())]),
        }

    losses: list[str] = []
    with sv.managed_session():
        said: dict[str, Any] = {"restored": sv.report.restored, "begin": state()}
        while not sv.should_stop() and sv.global_step < steps:
            generator = torch.Generator().manual_seed(1000 * sv.global_step + rank)
            words = torch.randint(0, 3, (8,), generator=generator)
            loss = nn.functional.cross_entropy(model(words), words)
            optimizer.zero_grad()
            loss.backward()
            for parameter in layouts.parameters():
                parameter.grad = torch.full_like(parameter, loss.item() if size == 1 else 0.1)
            other.step()
            optimizer.step()
            scheduler.step()
            losses.append(loss.item().hex())
    said |= {"losses": losses, "end": state(), "final": sv.report.final_save}
    if size > 1:
        dist.barrier()
        dist.destroy_process_group()
    return said


def forked(size: int, act: Callable[[int], dict[str, Any]], place: Path) -> list[dict[str, Any]]:
    """What so many processes say, forked from this one."""
    place.mkdir(parents=True)
    children: dict[int, int] = {}
    for rank in range(size):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                (place / f"{rank}.json").write_text(json.dumps(act(rank)))
                status = 0
            except BaseException:
                print(f"rank {rank} of {place}", file=sys.stderr)
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(status)
        children[child] = rank
    deadline = time.monotonic() + LIMIT
    failed: list[int] = []
    while children and time.monotonic() < deadline:
        child, status = os.waitpid(-1, os.WNOHANG)
        if child == 0:
            time.sleep(0.01)
        elif status and children.pop(child) is not None:
            failed.append(child)
        else:
            children.pop(child, None)
    for child in children:
        os.kill(child, 6)
    if failed or children:
        raise SystemExit(f"{place.name}: failed {failed}, hanging {children}")
    return [json.loads((place / f"{rank}.json").read_text()) for rank in range(size)]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "runs", nargs="+", help="name:size:steps[:name of the run that is gone on with, or with @, begun from]"
    )
    options = parser.parse_args()
    for number, text in enumerate(options.runs):
        name, size, steps, *before = text.split(":")
        logdir = options.folder / name
        resume: Any = "auto"
        if before and not before[0].startswith("@"):
            shutil.copytree(options.folder / before[0], logdir, ignore=shutil.ignore_patterns(".members", "store-*"))
        else:
            logdir.mkdir()
            if before:
                resume = CheckpointDirectory(options.folder / before[0][1:]).newest().path
        seed = 0 if not before else 1000 * (number + 1)  # so that what is not restored differs
        act = partial(train, size=int(size), logdir=logdir, steps=int(steps), seed=seed, resume=resume)
        ranks = forked(int(size), act, options.folder / f"said-{name}")
        print(json.dumps({"run": name, "ranks": ranks}), flush=True)
    print(json.dumps({"read": read(options.folder, options.runs[0].split(":")[0])}), flush=True)


def read(folder: Path, run: str) -> dict[str, Any]:
    """The hashes of whole tensors, read without a session."""
    with CheckpointDirectory(folder / run).newest() as checkpoint:
        found = {name: whole(dict(checkpoint.load(name))) for name in ("model", "optimizer", "layouts", "other")}
    return {name: digest({k: v for k, v in entry.items() if "running" not in str(k)}) for name, entry in found.items()}


if __name__ == "__main__":
    main()
