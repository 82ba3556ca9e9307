"""What a checkpoint costs: the training thread while it is taken, the disk until it is durable, and a restore.

``python -m benchmarks.saving [--mib 1024] [--rounds 7]`` trains nothing but changes every tensor of a PyTorch model and
its optimizer in each step, saves through a ``Supervisor``, and prints each figure as a ratio to the limit of the
machine, or to a peer, measured in the same rounds, in random order. A figure counts only if what was saved is, bit by
bit, what is restored.
"""

from __future__ import annotations

import argparse
import mmap
import os
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from supervise_core import CheckpointDirectory, KeepLatest, Supervisor
from supervise_core.checkpoint_files import read_checkpoint
from supervise_core.directory_store import open_checkpoint_directory
from supervise_torch import TorchBackend

_PIECE = 16 << 20
_STEADY = 1.5
"""The slowest direct write of a run may take this many times as long as the quickest; else the disk was not ours."""


def main() -> None:
    """Measure, check, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=1024, help="size of the whole state")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dir", type=Path, default=None, help="where to write; a disk, not a tmpfs")
    options = parser.parse_args()
    scratch = Path(tempfile.mkdtemp(dir=options.dir or Path.cwd()))
    try:
        report(Saving(scratch, options.mib << 20).measure(options.rounds))
    finally:
        shutil.rmtree(scratch)


class Saving:
    """A model of many layers with AdamW, and everything that is measured on it."""

    def __init__(self, scratch: Path, size: int) -> None:
        torch.manual_seed(0)
        width = max(16, int((size / 4 / 3 / 148) ** 0.5))
        self.scratch = scratch
        self.model = torch.nn.Sequential(*(torch.nn.Linear(width, width) for _ in range(148)))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), fused=True)
        for parameter in self.model.parameters():
            parameter.grad = torch.full_like(parameter, 0.01)
        self.optimizer.step()
        self.tensors = [*self.model.state_dict().values()] + [
            value for state in self.optimizer.state.values() for value in state.values()
        ]
        self.size = sum(tensor.nbytes for tensor in self.tensors)
        self.kept = [torch.empty_like(tensor).fill_(1) for tensor in self.tensors]
        self.image = mmap.mmap(-1, self.size // 4096 * 4096)
        self.image.write(os.urandom(1 << 20) * (len(self.image) >> 20))
        self.sv = Supervisor(
            TorchBackend(model=self.model, optimizer=self.optimizer), scratch / "run",
            save_every=None, summarize_every=None, keep=KeepLatest(1), signals=False,
        )  # fmt: skip

    def measure(self, rounds: int) -> dict[str, list[float]]:
        """Seconds of each subject in each round."""
        subjects: dict[str, Callable[[], dict[str, float]]] = {
            "memcpy": self.copy,
            "direct write": self.write_directly,
            "supervised": self.save,
            "torch.save": self.save_by_torch,
            "safetensors": self.save_by_safetensors,
            "read": self.read,
        }
        taken: dict[str, list[float]] = {}
        print(f"{self.size >> 20} MiB in {len(self.tensors)} tensors, {rounds} rounds", flush=True)
        with self.sv.managed_session():
            while self.sv.report.saves == 0:
                time.sleep(0.01)
            for _ in range(rounds):
                for name in random.sample(list(subjects), len(subjects)):
                    self.optimizer.step()
                    for figure, seconds in subjects[name]().items():
                        taken.setdefault(figure, []).append(seconds)
            self.optimizer.step()
        self.check()
        return taken

    def copy(self) -> dict[str, float]:
        began = time.perf_counter()
        for kept, tensor in zip(self.kept, self.tensors, strict=True):
            kept.copy_(tensor)
        return {"memcpy": time.perf_counter() - began}

    def write_directly(self) -> dict[str, float]:
        path, view = self.scratch / "raw", memoryview(self.image)
        began = time.perf_counter()
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_DIRECT)
        for begin in range(0, len(view), _PIECE):
            os.write(descriptor, view[begin : begin + _PIECE])
        os.fsync(descriptor)
        os.close(descriptor)
        seconds = time.perf_counter() - began
        path.unlink()
        return {"direct write": seconds}

    def save(self) -> dict[str, float]:
        before = self.sv.report.saves
        self.sv.save()
        began = time.perf_counter()
        self.sv.should_stop()
        stalled = time.perf_counter() - began
        while self.sv.report.saves == before:
            time.sleep(0.001)
        return {"stall": stalled, "durable": time.perf_counter() - began}

    def save_by_torch(self) -> dict[str, float]:
        path = self.scratch / "peer.pt"
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        return {"torch.save": _timed_and_synced(path, lambda: torch.save(state, path))}

    def save_by_safetensors(self) -> dict[str, float]:
        path = self.scratch / "peer.safetensors"
        named = {str(number): tensor for number, tensor in enumerate(self.tensors)}
        return {"safetensors": _timed_and_synced(path, lambda: safetensors.torch.save_file(named, path))}

    def read(self) -> dict[str, float]:
        """The newest checkpoint: read into kept memory, and restored with everything verified; both from warm files."""
        path = CheckpointDirectory(self.scratch / "run").newest().path
        files = sorted(path.glob("*.safetensors"))
        target = memoryview(self.image)
        for file in files:
            file.read_bytes()
        began = time.perf_counter()
        done = 0
        for file in files:
            with file.open("rb", buffering=0) as opened:
                while count := opened.readinto(target[done : done + _PIECE]):
                    done += count
        read = time.perf_counter() - began
        backend = TorchBackend(model=self.model, optimizer=self.optimizer)
        session = backend.create_session()
        began = time.perf_counter()
        with open_checkpoint_directory(path) as reader:
            backend.load(session, read_checkpoint(reader).parts)
        return {"read": read, "restore": time.perf_counter() - began}

    def check(self) -> None:
        """What is on disk is the state of the last step."""
        loaded = CheckpointDirectory(self.scratch / "run").newest().load("model")
        assert all(torch.equal(loaded[name], tensor) for name, tensor in self.model.state_dict().items())


def report(taken: dict[str, list[float]]) -> None:
    """Print medians, ranges and ratios of medians."""
    median = {name: statistics.median(values) for name, values in taken.items()}
    direct = taken["direct write"]
    for name, limit in (
        ("memcpy", ""), ("stall", "memcpy"), ("direct write", ""), ("durable", "direct write"),
        ("torch.save", "direct write"), ("safetensors", "direct write"), ("read", ""), ("restore", "read"),
    ):  # fmt: skip
        beside = f"{median[name] / median[limit]:5.2f} × {limit}" if limit else ""
        span = f"{min(taken[name]):.3f} to {max(taken[name]):.3f}"
        print(f"{name:14} {median[name]:7.3f} s   {span:18} {beside}")
    if max(direct) > _STEADY * min(direct):
        print("The disk was not steady (see the range of the direct write): these figures are to be discarded.")


def _timed_and_synced(path: Path, write: Callable[[], Any]) -> float:
    began = time.perf_counter()
    write()
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
    seconds = time.perf_counter() - began
    path.unlink()
    return seconds


if __name__ == "__main__":
    main()
