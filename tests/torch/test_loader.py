"""Passes over a DataLoader, cut in two at any batch, are the passes of a run that was not."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler, Sampler  # noqa: E402

from supervise_core import DataPositionError, Supervisor  # noqa: E402
from supervise_torch import TorchBackend  # noqa: E402

SIZE = 24
EPOCHS = 3


class Jitter:
    """A transform with generators of its own."""

    def __init__(self) -> None:
        self.python = random.Random(3)
        self.torch = torch.Generator().manual_seed(1)

    def __call__(self, value: Any) -> Any:
        return value + self.python.random() + torch.rand(1, generator=self.torch)


class Items(Dataset[Any]):
    """Draws from every generator there is: the process's, its own, and those of its transforms."""

    def __init__(self) -> None:
        self.numpy = np.random.default_rng(0)
        self.legacy = np.random.RandomState(1)
        self.transforms = [Jitter()]
        self.loads = 0

    def __len__(self) -> int:
        return SIZE

    def __getitem__(self, index: int) -> Any:
        self.loads += 1
        own = self.numpy.normal() + self.legacy.rand()
        common = random.random() + np.random.rand() + float(torch.rand(1))
        return self.transforms[0](torch.tensor(float(index)) + own + common)


class Stream(IterableDataset[Any]):
    """A stream that can only be read from its beginning."""

    def __init__(self, size: int = SIZE) -> None:
        self.size = size
        self.numpy = np.random.default_rng(0)

    def __iter__(self) -> Iterator[Any]:
        for number in range(self.size):
            yield torch.tensor([number + self.numpy.normal() + random.random() + float(torch.rand(1))])


class Lazy(Sampler[int]):
    """Draws each index when it is asked for it."""

    def __init__(self) -> None:
        self.order = random.Random(5)

    def __iter__(self) -> Iterator[int]:
        return (self.order.randrange(SIZE) for _ in range(SIZE))

    def __len__(self) -> int:
        return SIZE


def noisy_collate(items: list[Any]) -> Any:
    """Collates with a mixing weight that is drawn."""
    return torch.stack(items) * random.random()


LOADERS: dict[str, Callable[[int], DataLoader[Any]]] = {
    "shuffled": lambda workers: DataLoader(Items(), batch_size=4, shuffle=True, num_workers=workers),
    "generator": lambda workers: DataLoader(
        Items(), batch_size=4, shuffle=True, num_workers=workers, generator=torch.Generator().manual_seed(7)
    ),
    "sampler": lambda workers: DataLoader(
        Items(), batch_size=5, num_workers=workers, sampler=RandomSampler(range(SIZE), replacement=True)
    ),
    "lazy sampler": lambda workers: DataLoader(Items(), batch_size=4, num_workers=workers, sampler=Lazy()),
    "no batches": lambda workers: DataLoader(Items(), batch_size=None, num_workers=workers, shuffle=True),
    "collate": lambda workers: DataLoader(Items(), batch_size=4, num_workers=workers, collate_fn=noisy_collate),
    "stream": lambda workers: DataLoader(Stream(), batch_size=4, num_workers=workers),
}


def train(logdir: Path, loader: DataLoader[Any], stop_at: int = 0) -> list[Any]:
    """The batches that a run trains on; it asks to stop after ``stop_at`` steps."""
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.Dropout(0.5))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    sv = Supervisor(TorchBackend(model=model, optimizer=optimizer), logdir, summarize_every=None)
    seen: list[Any] = []
    with sv.managed_session() as session:
        for _ in sv.epochs(EPOCHS):
            for batch in sv.batches(loader):
                loss = model(batch.float().reshape(-1, 1)).sum()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                seen.append((batch.tolist(), loss.item()))
                if session.global_step == stop_at:
                    sv.request_stop()
    return seen


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", LOADERS)
def test_a_run_cut_in_two_sees_the_batches_of_one_that_was_not(kind: str, workers: int, tmp_path: Path) -> None:
    whole = train(tmp_path / "whole", LOADERS[kind](workers))
    cut = len(whole) // 2 + 1
    first = train(tmp_path / "cut", LOADERS[kind](workers), cut)
    second = train(tmp_path / "cut", LOADERS[kind](workers))
    assert len(first) == cut
    assert first + second == whole
    assert len({str(batch) for batch, _ in whole}) == len(whole)  # epochs differ, so an order repeated would be seen


@pytest.mark.parametrize("kind", [kind for kind in LOADERS if kind != "stream"])
def test_the_number_of_workers_makes_no_difference(kind: str, tmp_path: Path) -> None:
    assert train(tmp_path / "none", LOADERS[kind](0)) == train(tmp_path / "two", LOADERS[kind](2))


def test_skipping_loads_nothing(tmp_path: Path) -> None:
    train(tmp_path, LOADERS["shuffled"](0), 10)
    loader = LOADERS["shuffled"](0)
    rest = train(tmp_path, loader)
    assert isinstance(loader.dataset, Items)
    assert loader.dataset.loads == 4 * len(rest)


def test_a_draw_leaves_the_random_state_of_the_loop_alone(tmp_path: Path) -> None:
    model = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sv = Supervisor(TorchBackend(model=model, optimizer=optimizer), tmp_path, summarize_every=None)

    def states() -> tuple[Any, ...]:
        return random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()

    with sv.managed_session():
        before = states()
        for _ in sv.batches(LOADERS["shuffled"](0)):
            assert states() == before


def test_a_shorter_stream_is_an_error_that_says_so(tmp_path: Path) -> None:
    train(tmp_path, DataLoader(Stream(), batch_size=4), 5)
    with pytest.raises(DataPositionError, match="has 2 batches where the checkpoint says that 5"):
        train(tmp_path, DataLoader(Stream(8), batch_size=4))


_ORPHAN = """
import subprocess, sys
from supervise_torch.loader import _die_with_parent
ended = subprocess.Popen([sys.executable, "-c", ""])
ended.wait()
print("waiting", flush=True)
_die_with_parent(ended.pid)
print("lives on", flush=True)
"""


def test_a_worker_whose_parent_was_killed_before_it_began_ends(tmp_path: Path) -> None:
    """Nothing else would end it: PyTorch's watchdog only notices a parent that is lost later."""
    done = subprocess.run([sys.executable, "-c", _ORPHAN], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (1, "waiting\n")
