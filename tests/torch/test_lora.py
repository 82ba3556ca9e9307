"""Frozen and trained tensors side by side, as in LoRA: the frozen ones are written once, whatever is pruned."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

from supervise_core import (  # noqa: E402
    AllCheckpointsDamagedError,
    CheckpointDirectory,
    DirectoryStore,
    EverySteps,
    KeepAll,
    KeepLatest,
    Supervisor,
)
from supervise_core.numpy_codec import NumpyCodec  # noqa: E402
from supervise_core.testing.clock import eventually  # noqa: E402
from supervise_core.testing.disks import HastyDisk, LinklessDisk, WatchedDisk  # noqa: E402
from supervise_torch import TorchBackend  # noqa: E402

nn = torch.nn


class CountingDisk(WatchedDisk, HastyDisk):
    """Knows how many bytes were written."""

    written = 0

    def write(self, descriptor: int, data: bytes | bytearray | memoryview) -> None:
        super().write(descriptor, data)
        self.written += memoryview(data).nbytes


class HastyLinklessDisk(LinklessDisk, HastyDisk):
    pass


class Adapted(nn.Module):  # type: ignore[name-defined,misc]
    """A frozen layer with a trained product of two narrow matrices beside it."""

    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.frozen = nn.Linear(width, width)
        self.down = nn.Linear(width, rank, bias=False)
        self.up = nn.Linear(rank, width, bias=False)
        self.frozen.requires_grad_(False)

    def forward(self, x: Any) -> Any:
        return torch.tanh(self.frozen(x) + self.up(self.down(x)))


class Training:
    """A model of which a tenth of the state, its optimizer's included, is trained."""

    def __init__(self, logdir: Path, *, momentum: float = 0.0, **arguments: Any) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(*[Adapted(256, 14) for _ in range(6)])
        trained = [one for one in self.model.parameters() if one.requires_grad]
        self.optimizer = torch.optim.SGD(trained, lr=0.1, momentum=momentum)
        defaults: dict[str, Any] = {
            "save_every": EverySteps(1), "summarize_every": None, "keep": KeepAll(), "signals": False,
        }  # fmt: skip
        arguments.setdefault("store", DirectoryStore(logdir, disk=HastyDisk()))
        backend = TorchBackend(model=self.model, optimizer=self.optimizer)
        self.supervisor = Supervisor(backend, logdir, **(defaults | arguments))
        self.states: dict[int, dict[str, bytes]] = {0: self.state()}
        self.began_at = -1

    def state(self) -> dict[str, bytes]:
        return {name: tensor.numpy().tobytes() for name, tensor in self.model.state_dict().items()}

    def make_step(self) -> None:
        self.optimizer.zero_grad()
        self.model(torch.randn(8, 256)).square().sum().backward()
        self.optimizer.step()

    def train(self, until: int) -> Training:
        with self.supervisor.managed_session() as session:
            self.began_at = session.global_step
            self.states[session.global_step] = self.state()
            self.settle(1)
            while not self.supervisor.should_stop() and session.global_step < until:
                self.make_step()
                self.states[session.global_step] = self.state()
                self.supervisor.should_stop()
                self.settle(1 + session.global_step - self.began_at)
        return self

    def settle(self, saves: int) -> None:
        """The restored step need not be saved again."""
        if self.supervisor.report.restored:
            saves -= 1
        eventually(lambda: self.supervisor.report.saves >= saves)


def check_each(logdir: Path, states: dict[int, dict[str, bytes]]) -> None:
    """Each checkpoint that is there is whole and holds what the model was."""
    checkpoints = CheckpointDirectory(logdir)
    for step in checkpoints.steps():
        with checkpoints.at(step) as checkpoint:
            checkpoint.verify()
            found = checkpoint.load("model", NumpyCodec())
        assert {name: array.tobytes() for name, array in found.items()} == states[step]


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("kept", [1, 3])
def test_a_tenth_is_written(tmp_path: Path, kept: int, momentum: float) -> None:
    disk = CountingDisk()
    store = DirectoryStore(tmp_path / "lora", disk=disk)
    training = Training(tmp_path / "lora", momentum=momentum, keep=KeepLatest(kept), store=store)
    written: list[int] = []
    with training.supervisor.managed_session() as session:
        training.settle(1)
        written.append(disk.written)
        for step in range(1, 6):
            before = disk.written
            training.make_step()
            training.states[step] = training.state()
            training.supervisor.should_stop()
            training.settle(step + 1)
            written.append(disk.written - before)
            assert session.global_step == step
            checkpoints = CheckpointDirectory(tmp_path / "lora")
            eventually(lambda: len(checkpoints.steps()) == min(kept, len(written)))  # noqa: B023 - pruned after the save
            check_each(tmp_path / "lora", training.states)
        training.supervisor.request_stop()
    total = sum(len(content) for content in training.states[5].values())
    trained = sum(one.nbytes for one in training.model.parameters() if one.requires_grad)
    assert 0.08 * total < trained < 0.1 * total
    changed = trained * (2 if momentum else 1)
    assert total < written[0] < 1.05 * total
    for later in written[1:]:
        assert changed < later < changed + 0.05 * total
        assert momentum or later < 0.15 * written[0]
    assert CheckpointDirectory(tmp_path / "lora").steps() == list(range(6 - kept, 6))
    resumed = Training(tmp_path / "lora", momentum=momentum).train(6)
    assert resumed.began_at == 5
    assert resumed.states[5] == training.states[5]


def test_the_second_restores_when_the_first_is_pruned(tmp_path: Path) -> None:
    logdir = tmp_path / "lora"
    training = Training(logdir, keep=KeepLatest(1)).train(1)
    assert CheckpointDirectory(logdir).steps() == [1]
    CheckpointDirectory(logdir).newest().verify()
    assert sorted(path.name for path in (logdir / "model.ckpt-1").glob("model*.safetensors")) == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]
    resumed = Training(logdir)
    for parameter in resumed.model.parameters():
        parameter.data.fill_(7.0)
    resumed.train(1)
    assert resumed.states[1] == training.states[1]


def test_a_layer_that_thaws(tmp_path: Path) -> None:
    logdir = tmp_path / "lora"
    training = Training(logdir)
    with training.supervisor.managed_session() as session:
        training.settle(1)
        for step in range(1, 7):
            if step == 3:
                layer = training.model[2].frozen
                layer.requires_grad_(True)
                training.optimizer.add_param_group({"params": list(layer.parameters())})
            training.make_step()
            training.states[step] = training.state()
            training.supervisor.should_stop()
            training.settle(step + 1)
            assert session.global_step == step
        training.supervisor.request_stop()
    check_each(logdir, training.states)


def test_hugging_face_reads_it(tmp_path: Path) -> None:
    """By the index, as its tools do."""
    safetensors_torch = pytest.importorskip("safetensors.torch")
    training = Training(tmp_path / "lora").train(2)
    folder = tmp_path / "lora" / "model.ckpt-2"
    places = json.loads((folder / "model.safetensors.index.json").read_bytes())["weight_map"]
    opened = {file: safetensors_torch.load_file(folder / file) for file in set(places.values())}
    assert {name: opened[file][name].numpy().tobytes() for name, file in places.items()} == training.states[2]
    everything: dict[str, Any] = {}
    for file in sorted(opened):
        everything |= opened[file]
    assert {name: tensor.numpy().tobytes() for name, tensor in everything.items()} == training.states[2]


def test_without_hard_links(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = DirectoryStore(tmp_path / "lora", disk=HastyLinklessDisk())
    training = Training(tmp_path / "lora", store=store).train(3)
    check_each(tmp_path / "lora", training.states)
    assert len([record for record in caplog.records if "no file can have two names" in record.message]) == 1


def test_a_bit_flipped_in_the_frozen_tensors(tmp_path: Path, seed: int) -> None:
    """All of them share it, and none is trained on."""
    Training(tmp_path / "lora").train(2)
    path = tmp_path / "lora" / "model.ckpt-2" / "model-00001-of-00002.safetensors"
    with path.open("r+b") as file:
        at = random.Random(seed).randrange(path.stat().st_size)
        file.seek(at)
        (byte,) = file.read(1)
        file.seek(at)
        file.write(bytes([byte ^ 16]))
    training = Training(tmp_path / "lora")
    with pytest.raises(AllCheckpointsDamagedError):
        training.train(3)
    assert training.began_at == -1


# ---- processes that are really killed

_TRAINS = """
import hashlib, random, sys, time
from pathlib import Path
import torch
from torch import nn
from supervise_core import EverySteps, KeepLatest, Supervisor
from supervise_torch import TorchBackend
torch.set_num_threads(1)
torch.manual_seed(0)
logdir, until, pause = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
class Adapted(nn.Module):
    def __init__(self):
        super().__init__()
        self.frozen, self.down, self.up = nn.Linear(64, 64), nn.Linear(64, 3, bias=False), nn.Linear(3, 64, bias=False)
        self.frozen.requires_grad_(False)
    def forward(self, x):
        return torch.tanh(self.frozen(x) + self.up(self.down(x)))
model = nn.Sequential(*[Adapted() for _ in range(4)])
optimizer = torch.optim.Adam([one for one in model.parameters() if one.requires_grad], lr=0.01)
sv = Supervisor(TorchBackend(model=model, optimizer=optimizer), logdir, save_every=EverySteps(1),
                summarize_every=None, keep=KeepLatest(2))
with sv.managed_session() as session:
    print(session.global_step, flush=True)
    while not sv.should_stop() and session.global_step < until:
        optimizer.zero_grad()
        model(torch.randn(8, 64)).square().sum().backward()
        optimizer.step()
        time.sleep(pause)
sha = hashlib.sha256(torch.get_rng_state().numpy().tobytes())
for tensor in model.state_dict().values():
    sha.update(tensor.numpy().tobytes())
for state in optimizer.state_dict()["state"].values():
    for tensor in state.values():
        sha.update(tensor.numpy().tobytes())
print(sha.hexdigest(), flush=True)
"""


def start(logdir: Path, until: int, pause: float = 0.0) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", _TRAINS, str(logdir), str(until), str(pause)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def ends_with(logdir: Path, until: int) -> str:
    with start(logdir, until) as process:
        said, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    return said.split()[-1]


@pytest.mark.campaign(small=1, soak=20)
def test_killed_and_resumed_ends_as_if_it_never_was(tmp_path: Path, count: int, seed: int) -> None:
    chance = random.Random(seed)
    reached = 0
    for _ in range(count):
        with start(tmp_path / "killed", 10**9, 0.002) as process:
            assert process.stdout is not None
            assert int(process.stdout.readline()) >= reached
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(0.2 + chance.random() * 0.6)
            process.kill()
            process.wait(60)
        checkpoints = CheckpointDirectory(tmp_path / "killed")
        for step in checkpoints.steps():
            checkpoints.at(step).verify()
        assert max(checkpoints.steps()) > reached
        reached = max(checkpoints.steps())
    assert list((tmp_path / "killed").glob("model.ckpt-*/model-00001-of-*.safetensors")), "nothing was shared"
    until = reached + 8
    assert ends_with(tmp_path / "killed", until) == ends_with(tmp_path / "whole", until)
