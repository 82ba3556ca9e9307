"""The backend for PyTorch: whatever has a ``state_dict`` is a part, and optimizer steps are the global step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, Final

import torch
from torch.nn.parameter import is_lazy
from torch.utils.data import DataLoader

from supervise_core.backend import Backend
from supervise_core.data_source import BatchSource, is_stateful
from supervise_core.memory import no_collection
from supervise_core.parts import Part, Parts, Restoration, read_together
from supervise_core.process_random import RandomState
from supervise_core.readiness import NotReady, Readiness, Ready
from supervise_core.snapshot import Snapshot, check_part_name
from supervise_core.staging import Outline, Staging
from supervise_core.tensors import TensorCodec
from supervise_torch.codec import OutlineCodec, TorchCodec
from supervise_torch.compatibility import check_module, check_optimizer, check_parts
from supervise_torch.dtensors import are_dtensors_used, is_dtensor, is_shared_out, shards_of_state
from supervise_torch.foreseen import foreseen_state
from supervise_torch.in_place import is_all_there, load_into, parameters_of, present, tensors_in
from supervise_torch.loader import LoaderSource
from supervise_torch.random_state import seed_everything, set_torch_random_state, torch_random_state

_OWN_PART: Final = "torch"

GlobalStep = Callable[[], int] | str | None


class TorchSession:
    """The parts by name, as attributes and as items, and the global step. They are the program's own objects."""

    def __init__(self, parts: Mapping[str, Any], backend: TorchBackend) -> None:
        self._parts = parts
        self._backend = backend
        self.steps = 0
        self.forwards = 0
        self.notify: Callable[[int], None] | None = None
        self.hooks: list[torch.utils.hooks.RemovableHandle] = []

    def __getattr__(self, name: str) -> Any:
        try:
            return self._parts[name]
        except KeyError:
            raise AttributeError(f"the session has no part {name!r}; it has: {', '.join(self._parts)}") from None

    def __getitem__(self, name: str) -> Any:
        return self._parts[name]

    @property
    def global_step(self) -> int:
        """How many steps the counting optimizer has made; 0 where nothing counts."""
        return self._backend.global_step(self) or 0


class _Mark:
    """Forward passes in training mode so far, and the random state; compared once in a run, but made for every item."""

    __slots__ = ("_forwards", "_random")

    def __init__(self, forwards: int, random: torch.Tensor) -> None:
        self._forwards = forwards
        self._random = random

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, _Mark) and self._forwards == other._forwards and torch.equal(self._random, other._random)
        )

    __hash__ = None  # type: ignore[assignment]


class TorchBackend(Backend[TorchSession]):
    """PyTorch training state, part by part::

        TorchBackend(model=model, optimizer=optimizer, scheduler=scheduler, scaler=scaler)

    A part is anything with ``state_dict`` and ``load_state_dict``, or a ``torch.Generator``; its keyword is its name.
    The global step is the number of steps that the first optimizer made, steps skipped by a gradient scaler not
    counted. ``global_step=`` decides otherwise: the name of another optimizer, or a function of no arguments.
    Random states of Python, NumPy, PyTorch and every CUDA device belong to the state.
    """

    name = "torch"
    grows_at_first_step = True  # optimizers make their state then
    codec: ClassVar[TensorCodec[Any]] = TorchCodec()

    def __init__(self, *, global_step: GlobalStep = None, device: torch.device | str = "cpu", **parts: Any) -> None:
        """
        :param device: where ``init`` puts the parameters that are on the meta device.
        :raises TypeError: if a part has no state that could be saved.
        :raises ValueError: if a part cannot bear its name, or ``global_step`` names no optimizer.
        """
        if not parts:
            raise TypeError("TorchBackend needs its parts by name: TorchBackend(model=model, optimizer=optimizer)")
        for name, part in parts.items():
            check_part_name(name)
            if name == _OWN_PART:
                raise ValueError(f"the part name {name!r} is taken by the backend itself; choose another one")
            if not is_stateful(part) and not isinstance(part, torch.Generator):
                raise TypeError(
                    f"{name}= has no state_dict and load_state_dict; a {type(part).__name__} cannot be saved"
                )
        self._parts = parts
        self._device = torch.device(device)
        self._read_step = global_step if callable(global_step) else None
        self._optimizer = None if callable(global_step) else _counting_optimizer(parts, global_step)

    # ---- session

    def create_session(self, master: str = "", config: Any = None) -> TorchSession:
        session = TorchSession(self._parts, self)
        if self._optimizer is not None:
            session.hooks.append(self._optimizer.register_step_post_hook(_count_step(session)))
        for module in self._modules().values():
            session.hooks.append(module.register_forward_pre_hook(_count_forward(session)))
        return session

    def close_session(self, session: TorchSession) -> None:
        while session.hooks:
            session.hooks.pop().remove()

    def init(self, session: TorchSession) -> None:
        """Give values to parameters on the meta device, by the ``reset_parameters`` of the modules that own them."""
        with torch.no_grad():
            for module in self._modules().values():
                for child in module.modules():
                    reset = getattr(child, "reset_parameters", None)
                    lacking = [tensor for tensor in _own_tensors(child) if tensor.is_meta]
                    if callable(reset) and lacking and not any(map(is_dtensor, lacking)):
                        _materialise(child, self._device)
                        reset()

    def ready(self, session: TorchSession) -> Readiness:
        lacking = [
            f"{part}.{name} ({reason})"
            for part, module in self._modules().items()
            for name, tensor in _named_tensors(module)
            if (reason := _lacks_values(tensor))
        ]
        return NotReady(f"not initialised: {', '.join(lacking)}") if lacking else Ready()

    def global_step(self, session: TorchSession) -> int | None:
        if self._read_step is not None:
            return int(self._read_step())
        return None if self._optimizer is None else session.steps

    def watch_steps(self, session: TorchSession, notify: Callable[[int], None]) -> Callable[[], None] | None:
        if self._optimizer is None:
            return None

        def unwatch() -> None:
            session.notify = None

        session.notify = notify
        return unwatch

    # ---- state

    def snapshot(self, session: TorchSession, staging: Staging) -> Snapshot:
        metadata: dict[str, Any] = {}
        shared_out: set[str] = set()
        for name, part in self._parts.items():
            state = _state_of(part)
            if isinstance(part, torch.nn.Module):
                metadata[name] = {key: dict(entry) for key, entry in getattr(state, "_metadata", {}).items()}
            if are_dtensors_used() and any(is_shared_out(tensor) for tensor in tensors_in(state)):
                shared_out.add(name)
            staging.put(name, state, self.codec, per_rank=name in shared_out)
        own: dict[str, Any] = {
            "global_step": session.steps, "metadata": metadata, "random": self.random_state(session),
        }  # fmt: skip
        if not staging.keeps_shared_parts:  # what is counted in buffers, each rank has counted on its own batches
            own["buffers"] = {
                name: _saved_buffers(module) for name, module in self._modules().items() if name not in shared_out
            }
        staging.put(_OWN_PART, own, self.codec, per_rank=True)
        return staging.snapshot()

    def foresee(self, session: TorchSession, outline: Outline) -> None:
        for name, part in self._parts.items():
            if isinstance(part, torch.optim.Optimizer) and (state := foreseen_state(part)) is not None:
                outline.put(name, state, OutlineCodec())

    def load(self, session: TorchSession, parts: Parts) -> None:
        with no_collection():
            self._load(session, parts)

    def _load(self, session: TorchSession, parts: Parts) -> None:
        check_parts([*self._parts, _OWN_PART], parts)
        own = parts[_OWN_PART].tree(self.codec)
        with torch.no_grad():
            saved = {name: self._restoration(part, parts[name]) for name, part in self._parts.items()}
            there = {name for name, part in self._parts.items() if is_all_there(part, saved[name].tree)}
            for name, part in self._parts.items():
                if name in there:
                    continue
                if isinstance(part, torch.nn.Module):
                    check_module(name, part, saved[name].tree)
                elif isinstance(part, torch.optim.Optimizer):
                    check_optimizer(name, part, saved[name].tree)
            for name, part in self._parts.items():
                if isinstance(part, torch.nn.Module) and _materialise_all(part, self._device):
                    saved[name] = self._restoration(part, parts[name])
            at_once = [
                name
                for name, part in self._parts.items()
                if saved[name].is_in_place or isinstance(part, torch.optim.Optimizer)
            ]
            read_together([saved[name] for name in at_once])
            for name, part in self._parts.items():
                restoration = saved.pop(name)
                if name not in at_once:
                    restoration.read()  # only now: it has memory of its own, and only until it is loaded
                if metadata := own["metadata"].get(name):
                    restoration.tree._metadata = metadata
                load_into(part, restoration.tree, is_all_there=name in there)
                if isinstance(part, torch.optim.Optimizer) and own["global_step"]:
                    part._opt_called = True  # type: ignore[attr-defined]  # or a scheduler warns that it goes first
        session.steps = own["global_step"]
        for name, buffers in own.get("buffers", {}).items():
            _put_buffers(self._parts[name], buffers)
        if parts[_OWN_PART].is_own:  # else it is the chief's, and every rank would draw the same
            self.set_random_state(session, own["random"])

    def _restoration(self, part: Any, saved: Part) -> Restoration:
        here = present(part)
        if isinstance(part, torch.optim.Optimizer) and any(map(is_dtensor, parameters_of(part))):
            outline = saved.restoration(OutlineCodec(), here).tree
            check_optimizer(saved.name, part, outline)
            here = shards_of_state(part, outline, here)
        return saved.restoration(self.codec, here)

    # ---- random state

    def mark(self, session: TorchSession) -> object:
        return _Mark(session.forwards, torch.get_rng_state())

    def random_state(self, session: TorchSession) -> RandomState:
        return torch_random_state()

    def set_random_state(self, session: TorchSession, state: RandomState) -> None:
        set_torch_random_state(state)

    def seed(self, session: TorchSession, seed: int) -> None:
        seed_everything(seed)

    def run_seed(self, session: TorchSession) -> int:
        return torch.initial_seed() & 0x7FFF_FFFF_FFFF_FFFF

    def batch_source(self, session: TorchSession, data: Any, run_seed: int) -> BatchSource:
        # a loader with an iteration of its own is replayed: what it does with the batches is not known
        if isinstance(data, DataLoader) and type(data).__iter__ is DataLoader.__iter__ and not is_stateful(data):
            return LoaderSource(data, run_seed)
        return super().batch_source(session, data, run_seed)

    def _modules(self) -> dict[str, torch.nn.Module]:
        return {name: part for name, part in self._parts.items() if isinstance(part, torch.nn.Module)}


def _counting_optimizer(parts: Mapping[str, Any], name: str | None) -> torch.optim.Optimizer | None:
    if name is None:
        return next((part for part in parts.values() if isinstance(part, torch.optim.Optimizer)), None)
    optimizer = parts.get(name)
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ValueError(f"global_step={name!r} names no optimizer; the parts are: {', '.join(parts)}")
    return optimizer


def _count_step(session: TorchSession) -> Callable[[torch.optim.Optimizer, Any, Any], None]:
    def count(optimizer: torch.optim.Optimizer, _args: Any, _kwargs: Any) -> None:
        skipped = getattr(optimizer, "found_inf", None)  # a fused optimizer skips inside its kernel
        if skipped is None or not skipped.item():
            session.steps += 1
            if session.notify is not None:
                session.notify(session.steps)

    return count


def _count_forward(session: TorchSession) -> Callable[[torch.nn.Module, Any], None]:
    def count(module: torch.nn.Module, _args: Any) -> None:
        if module.training:
            session.forwards += 1

    return count


def _state_of(part: Any) -> Any:
    return {"state": part.get_state()} if isinstance(part, torch.Generator) else part.state_dict()


def _own_tensors(module: torch.nn.Module) -> Iterator[torch.Tensor]:
    yield from module.parameters(recurse=False)
    yield from module.buffers(recurse=False)


def _named_tensors(module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


def _saved_buffers(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    state = module.state_dict()
    return {name: buffer for name, buffer in module.named_buffers() if name in state}


def _put_buffers(module: torch.nn.Module, saved: Mapping[str, torch.Tensor]) -> None:
    with torch.no_grad():
        for name, buffer in module.named_buffers():
            if name in saved:
                buffer.copy_(saved[name])


def _lacks_values(tensor: torch.Tensor) -> str:
    if is_lazy(tensor):
        return "a lazy parameter; run the model once, in init_fn="
    if tensor.is_meta and is_dtensor(tensor):
        return "on the meta device and shared out; give it values on all ranks before the session"
    return "on the meta device; give it values in init_fn=" if tensor.is_meta else ""


def _materialise_all(module: torch.nn.Module, device: torch.device) -> bool:
    """The same for all that is in a module; whether there was anything on the meta device."""
    found = [child for child in module.modules() if any(tensor.is_meta for tensor in _own_tensors(child))]
    for child in found:
        _materialise(child, device)
    return bool(found)


def _materialise(module: torch.nn.Module, device: torch.device) -> None:
    """Put what is on the meta device on a real one, in place: an optimizer and tied modules go on holding it."""
    for tensor in _own_tensors(module):
        if tensor.is_meta and not is_lazy(tensor):
            real = torch.empty_like(tensor, device=device)
            if isinstance(tensor, torch.nn.Parameter):
                real = torch.nn.Parameter(real, tensor.requires_grad)
            torch.utils.swap_tensors(tensor, real)
