"""The PyTorch backend keeps the contract."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

from supervise_core.testing.backend_contract import BackendContract, Program  # noqa: E402
from supervise_torch import TorchBackend, TorchSession  # noqa: E402


class _Odd(torch.nn.Module):
    """Parameters and buffers of every sort beside a usual network."""

    def __init__(self) -> None:
        super().__init__()
        self.network = torch.nn.Sequential(
            torch.nn.Linear(4, 6), torch.nn.BatchNorm1d(6), torch.nn.Dropout(0.5), torch.nn.Linear(6, 4)
        )
        self.scale = torch.nn.Parameter(torch.tensor(1.5))
        self.nothing = torch.nn.Parameter(torch.zeros(0, 3))
        self.register_buffer("brief", torch.arange(6, dtype=torch.bfloat16).reshape(2, 3).t())
        self.register_buffer("wide", torch.randn(2, 2, dtype=torch.complex128))

    def forward(self, inputs: Any) -> Any:
        return self.network(inputs) * self.scale + self.nothing.sum()


def _tensors(tree: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Everything in a tree of dictionaries and lists; tensors as integers of their width, which NumPy always has."""
    if isinstance(tree, torch.Tensor):
        same_width = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}
        yield f"{path} {tree.dtype}", tree.detach().view(same_width[tree.element_size()]).numpy()
    elif isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from _tensors(value, f"{path}.{key}")
    elif isinstance(tree, (list, tuple)):
        for number, value in enumerate(tree):
            yield from _tensors(value, f"{path}[{number}]")
    else:
        yield path, repr(tree).encode()


class TestTorchBackend(BackendContract):
    def program(self) -> Program:
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)
        model = _Odd()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
        scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones=[2, 4])
        generator = torch.Generator().manual_seed(3)
        parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler}

        def train(session: TorchSession) -> None:
            inputs = torch.randn(8, 4) + torch.rand(8, 4, generator=generator) + random.random() + np.random.normal()
            optimizer.zero_grad()
            model(inputs).square().mean().backward()
            model.brief += 1
            model.wide *= 1.5
            optimizer.step()
            scheduler.step()

        def raw() -> dict[str, Any]:
            state = {name: part.state_dict() for name, part in parts.items()}
            return dict(_tensors(state | {"generator": generator.get_state()}, "state"))

        return Program(TorchBackend(**parts, generator=generator), train, raw)

    def program_that_is_not_ready(self) -> Program:
        with torch.device("meta"):
            model = torch.nn.Linear(2, 3)
        return Program(TorchBackend(model=model), lambda session: None, dict)
