"""The backend for plain NumPy, and the reference to copy for a new one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from supervise_core.backend import Backend
from supervise_core.errors import IncompatibleCheckpointError
from supervise_core.parts import Part, Parts
from supervise_core.process_random import RandomState, process_random_state, seed_process, set_process_random_state
from supervise_core.snapshot import Snapshot
from supervise_core.staging import Staging

_MASK: Final = (1 << 64) - 1


class ArraySession:
    """The arrays by name, and the global step: ``sess["w"]``, ``sess.global_step += 1``.

    The arrays are the program's own objects. A program that never sets ``global_step`` has its steps counted by
    ``sv.batches``, or by the rounds of its loop. One that makes its first step with several items of ``sv.batches``
    says ``sess.global_step += 0`` before it: until the step is set for the first time, each item counts as one.
    """

    __slots__ = ("_arrays", "_step", "notify")

    def __init__(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        self._arrays = arrays
        self._step: int | None = None
        self.notify: Callable[[int], None] | None = None

    def __getitem__(self, name: str) -> NDArray[Any]:
        return self._arrays[name]

    @property
    def counted(self) -> int | None:
        """The global step, or None if the program never set it."""
        return self._step

    @property
    def global_step(self) -> int:
        """How many steps were made."""
        return self._step or 0

    @global_step.setter
    def global_step(self, step: int) -> None:
        self._step = step
        if self.notify is not None:
            self.notify(step)

    def forget_step(self) -> None:
        """As if the program had never set it."""
        self._step = None


class _Mark:
    """The states of the generators; compared once in a run, but made for every item."""

    __slots__ = ("_states",)

    def __init__(self, states: list[Any]) -> None:
        self._states = states

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Mark) and _plain(self._states) == _plain(other._states)

    __hash__ = None  # type: ignore[assignment]


class ArrayBackend(Backend[ArraySession]):
    """A mapping of NumPy arrays, trained in place, and the random generators that the program draws from.

    ``ArrayBackend({"w": w, "b": b}, rng=rng)``. The arrays are the part ``model``. Random states kept: those of the
    generators given, of ``random`` and of ``numpy.random``. ``init`` is a function that fills the arrays.
    """

    name = "numpy"

    def __init__(
        self,
        arrays: Mapping[str, NDArray[Any]],
        *,
        init: Callable[[Mapping[str, NDArray[Any]]], object] | None = None,
        seed: int = 0,
        **generators: np.random.Generator | np.random.RandomState,
    ) -> None:
        """:raises TypeError: if something is neither an array nor a generator, as it should be."""
        for name, array in arrays.items():
            if not isinstance(array, np.ndarray):
                raise TypeError(f"arrays[{name!r}] is a {type(array).__name__}; pass NumPy arrays, trained in place")
        for name, generator in generators.items():
            if not isinstance(generator, (np.random.Generator, np.random.RandomState)):
                raise TypeError(f"{name}= is no random generator but a {type(generator).__name__}")
        self._arrays = arrays
        self._generators: MutableMapping[str, Any] = dict(generators)
        self._init = init
        self._seed = seed

    def create_session(self, master: str = "", config: Any = None) -> ArraySession:
        return ArraySession(self._arrays)

    def init(self, session: ArraySession) -> None:
        if self._init is not None:
            self._init(self._arrays)

    def global_step(self, session: ArraySession) -> int | None:
        return session.counted

    def watch_steps(self, session: ArraySession, notify: Callable[[int], None]) -> Callable[[], None]:
        def unwatch() -> None:
            session.notify = None

        session.notify = notify
        return unwatch

    def snapshot(self, session: ArraySession, staging: Staging) -> Snapshot:
        staging.put("model", dict(self._arrays))
        random = {"global_step": session.counted, "states": self.random_state(session)}
        staging.put("random", random, per_rank=True)
        return staging.snapshot()

    def load(self, session: ArraySession, parts: Parts) -> None:
        saved = _part(parts, "model").restoration(into=dict(self._arrays))
        _check_fit(self._arrays, saved.tree)
        random = _part(parts, "random").tree()
        if random["states"]["generators"].keys() != self._generators.keys():
            known = sorted(random["states"]["generators"])
            raise IncompatibleCheckpointError("random", [f"generators {known} saved, {sorted(self._generators)} here"])
        saved.read()
        for name, array in self._arrays.items():
            if saved.tree[name] is not array:
                np.copyto(array, saved.tree[name], casting="no")
        if _part(parts, "random").is_own:
            self.set_random_state(session, random["states"])
        session.forget_step()  # which a newer checkpoint had, that turned out to be damaged
        if random["global_step"] is not None:
            session.global_step = random["global_step"]

    # ---- random state

    def mark(self, session: ArraySession) -> object:
        return _Mark([_bits(generator).state for generator in self._generators.values()])

    def random_state(self, session: ArraySession) -> RandomState:
        states = {name: _plain(_bits(generator).state) for name, generator in self._generators.items()}
        return {"process": process_random_state(), "generators": states}

    def set_random_state(self, session: ArraySession, state: RandomState) -> None:
        set_process_random_state(state["process"])
        for name, saved in state["generators"].items():
            _bits(self._generators[name]).state = saved

    def seed(self, session: ArraySession, seed: int) -> None:
        seed_process(seed)
        for number, generator in enumerate(self._generators.values()):
            bits = _bits(generator)
            bits.state = type(bits)(seed + number & _MASK).state

    def run_seed(self, session: ArraySession) -> int:
        return self._seed


def _part(parts: Parts, name: str) -> Part:
    if name not in parts:
        raise IncompatibleCheckpointError(name, [f"it is missing; the checkpoint has {sorted(parts)}"])
    return parts[name]


def _check_fit(arrays: Mapping[str, NDArray[Any]], saved: Mapping[str, NDArray[Any]]) -> None:
    differences = [f"{name!r} is missing" for name in arrays if name not in saved]
    differences += [f"{name!r} is unexpected" for name in saved if name not in arrays]
    for name in arrays.keys() & saved.keys():
        here, there = arrays[name], saved[name]
        if here.shape != there.shape:
            differences.append(f"{name!r} has shape {there.shape} there and {here.shape} here")
        elif here.dtype != there.dtype:
            differences.append(f"{name!r} has dtype {there.dtype} there and {here.dtype} here")
    if differences:
        raise IncompatibleCheckpointError("model", sorted(differences))


def _bits(generator: np.random.Generator | np.random.RandomState) -> Any:
    return generator.bit_generator if isinstance(generator, np.random.Generator) else generator._bit_generator


def _plain(state: Any) -> Any:
    """A bit generator's state with its arrays as lists: it accepts both, and lists are plain data."""
    if isinstance(state, Mapping):
        return {key: _plain(value) for key, value in state.items()}
    if isinstance(state, list):
        return [_plain(item) for item in state]
    if isinstance(state, np.ndarray):
        return state.tolist()
    return state.item() if isinstance(state, np.generic) else state
