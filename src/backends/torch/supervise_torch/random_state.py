"""All random state that a PyTorch program draws from: Python's, NumPy's, PyTorch's, and that of every CUDA device."""

from __future__ import annotations

import random
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from supervise_core.process_random import RandomState, process_random_state, seed_process, set_process_random_state


def torch_random_state() -> dict[str, Any]:
    """The random states of this moment, as plain data. Devices that no program has touched yet have none."""
    state: dict[str, Any] = {"process": process_random_state(), "torch": _to_bytes(torch.get_rng_state())}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = [_to_bytes(device) for device in torch.cuda.get_rng_state_all()]
    return state


def set_torch_random_state(state: RandomState) -> None:
    """Put back what ``torch_random_state`` gave, on the devices that are here."""
    set_process_random_state(state["process"])
    torch.set_rng_state(_from_bytes(state["torch"]))
    if "cuda" in state and torch.cuda.is_available():
        for number, device in enumerate(state["cuda"][: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(_from_bytes(device), number)


def seed_everything(seed: int) -> None:
    """Seed all of them from one number of 64 bits."""
    seed_process(seed)
    torch.manual_seed(seed)


_GENERATORS = (random.Random, torch.Generator, np.random.Generator, np.random.RandomState)
_MOST_VISITED = 1000
_LONGEST_VISITED = 100  # a longer list holds data


@contextmanager
def isolated_random(seed: int | None = None, state: tuple[Any, ...] | None = None) -> Generator[None, None, None]:
    """A block that draws from other random states (of the CPU), and leaves those of the program as they were."""
    before = cpu_random_state()
    try:
        if state is not None:
            set_cpu_random_state(state)
        elif seed is not None:
            seed_process(seed)
            torch.default_generator.manual_seed(seed)
        yield
    finally:
        set_cpu_random_state(before)


def cpu_random_state() -> tuple[Any, ...]:
    """What fetching data draws from, in the quickest form; not meant to be saved."""
    return random.getstate(), np.random.get_state(legacy=False), torch.get_rng_state()


def set_cpu_random_state(state: tuple[Any, ...]) -> None:
    """Put back what ``cpu_random_state`` gave."""
    random.setstate(state[0])
    np.random.set_state(state[1])
    torch.set_rng_state(state[2])


def generators_within(root: object) -> list[Any]:
    """The random generators that an object keeps: in its attributes, in lists, and in objects that it keeps so."""
    found: list[Any] = []
    seen: set[int] = set()
    waiting = [root]
    while waiting and len(seen) < _MOST_VISITED:
        thing = waiting.pop()
        if id(thing) in seen:
            continue
        seen.add(id(thing))
        if isinstance(thing, _GENERATORS):
            found.append(thing)
        elif isinstance(thing, (list, tuple)):
            waiting.extend(thing if len(thing) <= _LONGEST_VISITED else ())
        elif not isinstance(thing, (type, torch.Tensor, torch.nn.Module)):
            waiting.extend(getattr(thing, "__dict__", {}).values())
    return found


def reseed(generators: list[Any], seed: int) -> None:
    """Seed each of the generators from one number of 63 bits and its own place in the list."""
    for number, generator in enumerate(generators):
        own = seed + number
        if isinstance(generator, random.Random):
            generator.seed(own)
        elif isinstance(generator, torch.Generator):
            generator.manual_seed(own)
        elif isinstance(generator, np.random.Generator):
            generator.bit_generator.state = type(generator.bit_generator)(own).state
        else:
            generator.seed([own & 0xFFFFFFFF, own >> 32])


def _to_bytes(state: torch.Tensor) -> bytes:
    return state.numpy().tobytes()


def _from_bytes(state: bytes) -> torch.Tensor:
    return torch.from_numpy(np.frombuffer(state, np.uint8).copy())
