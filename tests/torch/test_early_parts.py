"""The model is on its way to the disk while the optimizer is still being copied."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from supervise_core import CheckpointDirectory, DirectoryStore, KeepAll, Supervisor, handover
from supervise_core.testing.clock import eventually
from supervise_core.testing.disks import DirectDisk, HastyDisk, WatchedDisk
from supervise_torch import TorchBackend


class HastyWatchedDisk(WatchedDisk, DirectDisk, HastyDisk):
    """One whose calls are watched, and that syncs nothing."""


def test_the_model_is_written_while_the_optimizer_is_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handover, "EARLY_BYTES", 1)
    monkeypatch.setattr(handover, "EARLY_TENSOR_BYTES", 0)
    disk = HastyWatchedDisk()
    model = torch.nn.Linear(30, 20)
    optimizer = torch.optim.AdamW(model.parameters())
    sv = Supervisor(
        TorchBackend(model=model, optimizer=optimizer), tmp_path, store=DirectoryStore(tmp_path, disk=disk),
        keep=KeepAll(), save_every=None, summarize_every=None, signals=False,
    )  # fmt: skip
    early: list[str] = []

    def when_the_optimizer_is_asked_for_its_state(_: Any) -> None:
        eventually(lambda: written("model.safetensors") == 2)
        early.append("model")
        assert written("optimizer.safetensors") == 0

    def written(file: str) -> int:
        return sum(method == "write" and path.name == file for method, path in disk.calls)

    def step() -> None:
        model(torch.ones(30)).sum().backward()
        optimizer.step()

    with sv.managed_session():
        step()
        eventually(lambda: sv.report.saves)
        assert not sv.should_stop()  # the optimizer's state is new: memory for it is had
        step()
        hook = optimizer.register_state_dict_pre_hook(when_the_optimizer_is_asked_for_its_state)
        sv.save()
        assert not sv.should_stop()
        hook.remove()
        eventually(lambda: sv.report.saves == 2)
    assert early == ["model"]
    saved = CheckpointDirectory(tmp_path).at(2)
    saved.verify()
    assert torch.equal(torch.as_tensor(saved.load("model")["weight"]), model.weight.detach())
