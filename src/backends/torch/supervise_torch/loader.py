"""A pass over a ``DataLoader`` that can be left at any batch and gone on with, in any number of worker processes.

For a dataset with indices, the order of a pass is drawn when the pass begins, under a seed of its own; to go on, it is
drawn again, and what was used is skipped without being loaded. Each batch is fetched and collated under a seed made of
the run's seed, the pass and the number of the batch, set around the fetch in whichever process does it. So random
augmentation does not depend on the number of workers nor on where a run was cut in two, and fetching leaves the random
state of the loop alone. Generators that a dataset keeps in its attributes are seeded in the same way. (Bare PyTorch
seeds each worker once instead, and hands it a copy of those.) Generators given to a loader or a sampler are drawn from
as usual, and their states at the beginning of the pass are saved; others that a sampler keeps are seeded for the pass.
A ``DistributedSampler`` has rules of its own (``shares``), and each of its ranks fetches under seeds of its own.

Other datasets and loaders are replayed: begun again, and drawn from up to the position.
"""

from __future__ import annotations

import atexit
import copy
import ctypes
import hashlib
import multiprocessing.process
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from supervise_core.data_source import BatchSource, length_of
from supervise_core.errors import DataPositionError
from supervise_torch.random_state import cpu_random_state, generators_within, isolated_random, reseed
from supervise_torch.shares import Share, share_going_on, share_of

_PR_SET_PDEATHSIG: Final = 1
_DRAWN_AT_ONCE: Final = (RandomSampler, SequentialSampler, SubsetRandomSampler, WeightedRandomSampler)
_SHARE: Final = "share"


def derived_seed(*numbers: int) -> int:
    """A seed of 63 bits, of which no two that are made of different numbers have anything in common."""
    digest = hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class LoaderSource(BatchSource):
    """One pass over a ``DataLoader``."""

    def __init__(self, loader: DataLoader[Any], run_seed: int) -> None:
        self._loader = loader
        self._run_seed = run_seed
        self._generators: dict[str, bytes] = {}
        self._batches: Iterator[Any] = iter(())
        self._replays = isinstance(loader.dataset, IterableDataset)
        self._share: Share | None = None

    def start(self, number: int, state: Any, consumed: int) -> None:
        seed = derived_seed(self._run_seed, number)
        if state is not None:
            self._set_generators(state)
        self._share = None if self._replays else _share_of(self._loader, number, state, consumed)
        self._generators = {name: _state_of(generator) for name, generator in _generators_of(self._loader).items()}
        if self._replays:
            reseed(generators_within(self._loader.dataset), seed)
            self._batches = _Isolated(_Watched(_fresh_clone(self._loader, seed)), seed)
            _skip(self._batches, consumed)
            return
        order = _Order(self._loader, seed) if self._share is None else _SharedOrder(self._loader, seed, self._share)
        order.skip(consumed)
        self._batches = _clone_for(self._loader).begin(order, seed)

    def draw(self) -> Any:
        return next(self._batches)

    def start_among(self, number: int, state: Any, consumed: int, ranks: tuple[int, int]) -> None:
        if _SHARE not in state:
            super().start_among(number, state, consumed, ranks)
        self.start(number, state, consumed)

    def state(self) -> Any:
        return self._generators if self._share is None else self._generators | {_SHARE: self._share.state()}

    def length(self) -> int | None:
        if self._share is not None and self._share.after:
            return self._share.after + len(_grouped(self._loader, self._share.indices()))
        return length_of(self._loader)

    def ends_with(self, error: BaseException) -> bool:
        return isinstance(error, RuntimeError) and "DataLoader worker" in str(error)

    def close(self) -> None:
        self._batches = iter(())

    def _set_generators(self, state: Mapping[str, Any]) -> None:
        for name, generator in _generators_of(self._loader).items():
            if name not in state:
                raise DataPositionError(f"the loader has a generator ({name}) that it did not have when it was saved")
            generator.set_state(torch.frombuffer(bytearray(state[name]), dtype=torch.uint8))


class _Order:
    """What a pass over a dataset with indices asks for, batch by batch: a seed, and an index or indices."""

    def __init__(self, loader: DataLoader[Any], seed: int) -> None:
        sampler: Any = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
        self._seed = seed
        self._number = 0
        if _is_drawn_at_once(sampler):
            with isolated_random(seed):
                self._indices = iter(list(sampler))
        else:
            given = _generators_of(loader).values()
            kept = [one for one in generators_within(sampler) if all(one is not other for other in given)]
            reseed(kept, seed)
            self._indices = _Isolated(sampler, seed)

    def skip(self, count: int) -> None:
        _skip(self._indices, count)
        self._number = count

    def __iter__(self) -> Iterator[_Request]:
        return self

    def __next__(self) -> _Request:
        indices = next(self._indices)
        seed = derived_seed(self._seed, self._number)
        self._number += 1
        return _Request(seed, indices)


class _SharedOrder(_Order):
    """What one rank asks for of an order that it shares with others."""

    def __init__(self, loader: DataLoader[Any], seed: int, share: Share) -> None:
        self._seed = derived_seed(seed, share.rank)
        self._number = 0
        self._before = share.after
        self._indices = iter(_grouped(loader, share.indices()))

    def skip(self, count: int) -> None:
        super().skip(count - self._before)
        self._number = count


class _Request:
    """The indices of one batch and the seed to fetch them under. Picklable, for worker processes that are spawned."""

    def __init__(self, seed: int, indices: Any) -> None:
        self.seed = seed
        self.indices = indices


class _Isolated(Iterator[Any]):
    """Draws from an iterable in random states of its own, and leaves those of the program alone."""

    def __init__(self, iterable: Any, seed: int) -> None:
        with isolated_random(seed):
            self._items = iter(iterable)
            self._state = cpu_random_state()

    def __next__(self) -> Any:
        with isolated_random(state=self._state):
            try:
                return next(self._items)
            finally:
                self._state = cpu_random_state()


class _SeededDataset(Dataset[Any]):
    """Fetches and collates the items of a request under its seed."""

    def __init__(self, dataset: Any, collate: Callable[[Any], Any]) -> None:
        self._dataset = dataset
        self._collate = collate
        self._generators: list[Any] | None = None

    def __getitem__(self, request: _Request) -> Any:
        with isolated_random(request.seed):
            if self._generators is None:  # only now, in the process that fetches, after its worker_init_fn
                self._generators = generators_within(self._dataset)
            reseed(self._generators, request.seed)
            return self._collate(self._fetch(request.indices))

    def _fetch(self, indices: Any) -> Any:
        if not isinstance(indices, list):
            return self._dataset[indices]
        fetch_many = getattr(self._dataset, "__getitems__", None)
        return fetch_many(indices) if callable(fetch_many) else [self._dataset[index] for index in indices]


def _as_collated(batch: Any) -> Any:
    return batch


class _Requests:
    """The sampler of a clone; what it hands out is set anew for each pass."""

    def __init__(self) -> None:
        self.order: Iterator[_Request] = iter(())

    def __iter__(self) -> Iterator[_Request]:
        return self.order


class _Clone:
    """A loader like the user's, over the same dataset, that fetches requests; kept, so that workers can persist."""

    def __init__(self, loader: DataLoader[Any]) -> None:
        self._requests = _Requests()
        self._generator = torch.Generator()
        options = _options_of(loader, self._generator)
        self._loader: DataLoader[Any] = DataLoader(
            _SeededDataset(loader.dataset, loader.collate_fn),
            batch_size=None,
            sampler=self._requests,
            collate_fn=_as_collated,
            **options,
        )

    def begin(self, order: Iterator[_Request], seed: int) -> Iterator[Any]:
        self._requests.order = order
        self._generator.manual_seed(seed)
        return iter(_Watched(self._loader))


_clones: WeakKeyDictionary[DataLoader[Any], _Clone] = WeakKeyDictionary()


def _clone_for(loader: DataLoader[Any]) -> _Clone:
    clone = _clones.get(loader)
    if clone is None:
        clone = _clones[loader] = _Clone(loader)
    return clone


def _fresh_clone(loader: DataLoader[Any], seed: int) -> DataLoader[Any]:
    """The user's loader again, its workers seeded from the pass."""
    clone = copy.copy(loader)
    object.__setattr__(clone, "generator", torch.Generator().manual_seed(seed))
    object.__setattr__(clone, "worker_init_fn", _WorkerInit(loader.worker_init_fn))
    object.__setattr__(clone, "_iterator", None)
    return clone


def _options_of(loader: DataLoader[Any], generator: torch.Generator) -> dict[str, Any]:
    options: dict[str, Any] = {
        "num_workers": loader.num_workers,
        "pin_memory": loader.pin_memory,
        "timeout": loader.timeout,
        "worker_init_fn": _WorkerInit(loader.worker_init_fn),
        "multiprocessing_context": loader.multiprocessing_context,
        "generator": generator,
    }
    if loader.num_workers > 0:
        options |= {"prefetch_factor": loader.prefetch_factor, "persistent_workers": loader.persistent_workers}
    return options


class _Watched:
    """A loader whose workers do not outlive the program."""

    def __init__(self, loader: DataLoader[Any]) -> None:
        self._loader = loader

    def __iter__(self) -> Iterator[Any]:
        items = iter(self._loader)
        _workers.update(getattr(items, "_workers", ()))
        atexit.unregister(_end_workers)
        atexit.register(_end_workers)  # before what PyTorch has registered for them, which waits
        return items


_workers: WeakSet[multiprocessing.process.BaseProcess] = WeakSet()


def _end_workers() -> None:
    """``multiprocessing`` sends them a SIGTERM at the end of the program and waits for them; but they ignore it."""
    alive = [worker for worker in _workers if worker.is_alive()]
    if alive:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's handler takes it for an accident
    for worker in alive:
        worker.kill()


class _WorkerInit:
    """Makes a data worker leave stops to its parent: launchers signal the whole group, and a worker that dies of that
    takes the batch with it that the parent waits for. A worker whose parent is gone ends."""

    def __init__(self, inner: Callable[[int], object] | None) -> None:
        self._inner = inner
        self._parent = os.getpid()

    def __call__(self, worker: int) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        _die_with_parent(self._parent)
        if self._inner is not None:
            self._inner(worker)


def _die_with_parent(parent: int) -> None:
    """Ask the kernel to end this process with its parent; elsewhere PyTorch's own watchdog does, within seconds.

    A parent killed before that is missed by nobody: PyTorch takes the process that adopted this one for the parent.
    """
    if sys.platform != "linux":
        return
    if os.getppid() == parent:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent and not _is_running(parent):
        os._exit(1)


def _is_running(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"


def _share_of(loader: DataLoader[Any], number: int, state: Any, consumed: int) -> Share | None:
    share = share_of(loader, number)
    if share is None or state is None or _SHARE not in state:
        return share
    return share_going_on(share, state[_SHARE], consumed)


def _grouped(loader: DataLoader[Any], indices: list[int]) -> list[Any]:
    """The samples of each batch, as the loader's own batch sampler makes them up."""
    batches: Any = loader.batch_sampler
    return indices if batches is None else list(BatchSampler(indices, batches.batch_size, batches.drop_last))


def _is_drawn_at_once(sampler: Any) -> bool:
    inner = sampler.sampler if type(sampler) is BatchSampler else sampler
    return type(inner) in _DRAWN_AT_ONCE


def _generators_of(loader: DataLoader[Any]) -> dict[str, torch.Generator]:
    """Generators that the user gave, by where they are; one in two places once."""
    batch_sampler: Any = loader.batch_sampler
    holders = {"loader": loader, "sampler": loader.sampler, "batch_sampler": batch_sampler}
    holders["batch_sampler.sampler"] = getattr(batch_sampler, "sampler", None)
    found: dict[str, torch.Generator] = {}
    for name, holder in holders.items():
        generator = getattr(holder, "generator", None)
        if isinstance(generator, torch.Generator) and all(generator is not other for other in found.values()):
            found[name] = generator
    return found


def _state_of(generator: torch.Generator) -> bytes:
    return generator.get_state().numpy().tobytes()


def _skip(items: Iterator[Any], count: int) -> None:
    for number in range(count):
        try:
            next(items)
        except StopIteration:
            raise DataPositionError(
                f"the data has {number} batches where the checkpoint says that {count} of them were used; "
                "resume with the loader that the run was saved with"
            ) from None
