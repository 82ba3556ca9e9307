"""PyTorch state comes back in the tensors that are there, bit for bit, and training goes on as it would have."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

from supervise_core import CheckpointDirectory, EverySteps, IncompatibleCheckpointError, KeepAll, Supervisor  # noqa: E402
from supervise_torch import TorchBackend  # noqa: E402

nn = torch.nn
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA device")


def restore(logdir: Path, global_step: Any = None, **parts: Any) -> Any:
    """A session that begins and ends; its report."""
    backend = TorchBackend(global_step=global_step, **parts)
    supervisor = Supervisor(backend, logdir, summarize_every=None, signals=False)
    with supervisor.managed_session():
        supervisor.request_stop()
    return supervisor.report


save = restore  # a run that finds no checkpoint saves what it ends with


def bits(value: Any) -> Any:
    """A copy of a tree of state that compares bit by bit."""
    if isinstance(value, torch.Tensor):
        plain = value.detach().resolve_conj().resolve_neg().cpu().contiguous().clone()
        flat = plain.reshape(-1)
        raw = flat.view(torch.uint8) if flat.numel() else torch.empty(0, dtype=torch.uint8)
        return (str(value.dtype), tuple(value.shape), raw.numpy().tobytes())
    if isinstance(value, np.ndarray):
        return (str(value.dtype), value.shape, value.tobytes())
    if isinstance(value, dict):
        return {key: bits(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [bits(item) for item in value]
    return value


def tensors_of(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, torch.Tensor):
        yield path, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from tensors_of(item, f"{path}.{key}")
    elif isinstance(value, (list, tuple)):
        for number, item in enumerate(value):
            yield from tensors_of(item, f"{path}.{number}")


def places(model: Any, optimizer: Any = None) -> dict[str, tuple[int, int]]:
    """Each tensor's object and memory: the module's own, and those of the optimizer's state."""
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    if optimizer is not None:
        state = {
            f"optimizer {number}": entry
            for number, parameter in enumerate(p for group in optimizer.param_groups for p in group["params"])
            for entry in [optimizer.state.get(parameter, {})]
        }
        named += tensors_of(state)
    return {name: (id(tensor), tensor.data_ptr()) for name, tensor in named}


# ---- whole programs


@dataclass
class Program:
    model: Any
    optimizer: Any
    shape: tuple[int, ...] = (4, 3)
    dtype: Any = torch.float32
    device: str = "cpu"

    def step(self, number: int) -> None:
        chance = torch.Generator().manual_seed(number)
        item = torch.randn(self.shape, generator=chance).to(self.device, self.dtype)

        def loss() -> Any:
            self.optimizer.zero_grad()
            result = self.model(item).abs().square().sum()
            result.backward()
            return result

        self.optimizer.step(loss)

    def train(self, *numbers: int) -> None:
        for number in numbers:
            self.step(number)

    def bits(self) -> Any:
        return bits([self.model.state_dict(), self.optimizer.state_dict()])

    @property
    def parts(self) -> dict[str, Any]:
        return {"model": self.model, "optimizer": self.optimizer}


def linear(make: Callable[[Any], Any], **arguments: Any) -> Program:
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))
    return Program(model, make(model.parameters()), **arguments)


def adamw(model: Any, **arguments: Any) -> Any:
    return torch.optim.AdamW(model.parameters(), lr=0.01, **arguments)


def convolution(memory_format: Any) -> Program:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 2))
    model = model.to(memory_format=memory_format)
    return Program(model, adamw(model), (2, 3, 6, 6))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Linear(3, 5, bias=False), nn.Linear(3, 5, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, item: Any) -> Any:
        return self.head(torch.tanh(self.embedding(item))[:, :3])


def tied() -> Program:
    model = Tied()
    return Program(model, adamw(model))


def weight_norm() -> Program:
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 5)), nn.Linear(5, 2))
    return Program(model, adamw(model))


def spectral_norm() -> Program:
    model = nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(3, 5)), nn.Linear(5, 2))
    return Program(model, adamw(model))


class Complex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 4, dtype=torch.complex64))

    def forward(self, item: Any) -> Any:
        return item.to(torch.complex64) @ self.weight


def complex_weights() -> Program:
    model = Complex()
    return Program(model, torch.optim.Adam(model.parameters(), lr=0.01, foreach=False))


def partly_frozen() -> Program:
    model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2))
    model[0].requires_grad_(False)
    return Program(model, torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01))


def several_groups() -> Program:
    model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2))
    groups = [{"params": list(model[0].parameters()), "lr": 0.1}, {"params": list(model[1].parameters())}]
    return Program(model, torch.optim.SGD(groups, lr=0.01, momentum=0.9))


def rate_in_a_tensor() -> Program:
    model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2))
    return Program(model, torch.optim.Adam(model.parameters(), lr=torch.tensor(0.01), foreach=False))


class Signs(torch.optim.Optimizer):
    """Keeps what torch's own do not: bytes, whole numbers, lists, arrays, and objects within objects."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.01})

    def step(self, closure: Any = None) -> None:
        if closure is not None:
            with torch.enable_grad():
                closure()
        with torch.no_grad():
            for group in self.param_groups:
                for parameter in group["params"]:
                    state = self.state[parameter]
                    if not state:
                        state["signs"] = torch.zeros_like(parameter, dtype=torch.int8)
                        state["nested"] = {"history": [torch.zeros(3), (torch.zeros(2, dtype=torch.int64),)]}
                        state["array"] = np.zeros(3)
                        state["count"] = 0
                    state["signs"].add_(parameter.grad.sign().to(state["signs"].dtype))
                    state["nested"]["history"][0].add_(parameter.grad.sum())
                    state["nested"]["history"][1][0].add_(1)
                    state["array"] += float(parameter.grad.sum())
                    state["count"] += 1
                    parameter.sub_(state["signs"].to(parameter.dtype), alpha=group["lr"])
                    parameter.sub_(float(state["array"][0]) * 1e-3 + float(state["nested"]["history"][0][0]) * 1e-3)

    def load_state_dict(self, state_dict: Any) -> None:
        """As those with states of eight bits do: torch's own makes numbers of the parameter's dtype of them."""
        super().load_state_dict({**state_dict, "state": {}})
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for number, parameter in zip(numbers, parameters, strict=True):
            self.state[parameter] = dict(state_dict["state"].get(number, {}))


PROGRAMS: dict[str, Callable[[], Program]] = {
    "Adam": lambda: linear(torch.optim.Adam),
    "AdamW, amsgrad": lambda: linear(lambda p: torch.optim.AdamW(p, amsgrad=True)),
    "AdamW, foreach": lambda: linear(lambda p: torch.optim.AdamW(p, foreach=True)),
    "AdamW, fused": lambda: linear(lambda p: torch.optim.AdamW(p, fused=True)),
    "SGD": lambda: linear(lambda p: torch.optim.SGD(p, lr=0.01)),
    "SGD, momentum": lambda: linear(lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, nesterov=True)),
    "SGD, momentum, fused": lambda: linear(lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, fused=True)),
    "RMSprop": lambda: linear(lambda p: torch.optim.RMSprop(p, centered=True, momentum=0.5)),
    "LBFGS": lambda: linear(lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=3, history_size=2)),
    "a state of many kinds": lambda: linear(Signs),
    "doubles": lambda: _as(linear(torch.optim.Adam), torch.float64),
    "bfloat16": lambda: _as(linear(torch.optim.AdamW), torch.bfloat16),
    "row-major convolutions": lambda: convolution(torch.contiguous_format),
    "channels_last": lambda: convolution(torch.channels_last),
    "tied": tied,
    "weight_norm": weight_norm,
    "spectral_norm": spectral_norm,
    "complex": complex_weights,
    "partly frozen": partly_frozen,
    "several groups": several_groups,
    "rate in a tensor": rate_in_a_tensor,
}  # fmt: skip


def _as(program: Program, dtype: Any) -> Program:
    program.model.to(dtype)
    program.dtype = dtype
    return program


@pytest.mark.parametrize("trained", [False, True], ids=["fresh", "trained otherwise"])
@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_goes_on_in_its_own_tensors(name: str, trained: bool, tmp_path: Path) -> None:
    torch.manual_seed(1)
    first = PROGRAMS[name]()
    first.train(1, 2, 3)
    save(tmp_path, **first.parts)
    saved = first.bits()

    torch.manual_seed(2)
    second = PROGRAMS[name]()
    if trained:
        second.train(7, 8, 9)
    assert second.bits() != saved
    plain = name != "a state of many kinds"  # whose load is its own
    before, needs = places(second.model, second.optimizer if plain else None), grads(second.model)
    restore(tmp_path, **second.parts)
    assert second.bits() == saved
    after = places(second.model, second.optimizer)
    assert {key: after[key] for key in before} == before
    assert grads(second.model) == needs == grads(first.model)
    assert all(parameter.is_leaf for parameter in second.model.parameters())

    first.train(4, 5, 6)
    second.train(4, 5, 6)
    assert second.bits() == first.bits() != saved


def grads(model: Any) -> dict[str, bool]:
    return {name: parameter.requires_grad for name, parameter in model.named_parameters()}


def test_layouts_stay(tmp_path: Path) -> None:
    first, second = (convolution(torch.channels_last) for _ in range(2))
    first.train(1)
    save(tmp_path, **first.parts)
    second.train(2)
    restore(tmp_path, **second.parts)
    for tensor in (second.model[0].weight, second.optimizer.state[second.model[0].weight]["exp_avg"]):
        assert tensor.is_contiguous(memory_format=torch.channels_last)
    row_major = convolution(torch.contiguous_format)
    pointer = row_major.model[0].weight.data_ptr()
    restore(tmp_path, **row_major.parts)
    assert row_major.model[0].weight.is_contiguous()
    assert row_major.model[0].weight.data_ptr() == pointer
    assert torch.equal(row_major.model[0].weight, first.model[0].weight)


@pytest.mark.parametrize("tied_there", [True, False])
def test_ties_are_those_of_the_program_here(tied_there: bool, tmp_path: Path) -> None:
    def untied() -> Any:
        model = Tied()
        model.head.weight = nn.Parameter(torch.randn(5, 3))
        return model

    first, second = (Tied(), untied()) if tied_there else (untied(), Tied())
    save(tmp_path, model=first)
    before = places(second)
    restore(tmp_path, model=second)
    assert places(second) == before
    assert torch.equal(second.head.weight, first.head.weight)
    if tied_there:
        assert torch.equal(second.embedding.weight, first.embedding.weight)
        assert second.embedding.weight.data_ptr() != second.head.weight.data_ptr()


@needs_cuda
@pytest.mark.parametrize("arguments", [{"capturable": True}, {"fused": True}, {"foreach": True}], ids=str)
def test_on_a_device(arguments: dict[str, Any], tmp_path: Path) -> None:
    def make() -> Program:
        model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2)).cuda()
        return Program(model, adamw(model, **arguments), device="cuda")

    first, second = make(), make()
    first.train(1, 2)
    save(tmp_path, **first.parts)
    second.train(5)
    before = places(second.model, second.optimizer)
    restore(tmp_path, **second.parts)
    assert second.bits() == first.bits()
    assert places(second.model, second.optimizer) == before
    first.train(3)
    second.train(3)
    assert second.bits() == first.bits()


def test_a_compiled_module(tmp_path: Path) -> None:
    def make() -> Program:
        model = torch.compile(nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2)), backend="eager")
        return Program(model, adamw(model))

    first, second = make(), make()
    save(tmp_path, **first.parts)
    before = places(second.model)
    restore(tmp_path, **second.parts)
    assert second.bits() == first.bits()
    assert places(second.model) == before


# ---- buffers of every kind


class Buffers(nn.Module):
    def __init__(self, **buffers: Any) -> None:
        super().__init__()
        for name, buffer in buffers.items():
            self.register_buffer(name, buffer)


def dtypes() -> list[Any]:
    found = {dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)}
    names = ("quint", "qint", "int1", "int2", "int3", "int4", "int5", "int6", "int7", "bits", "float4", "complex32")
    return sorted((d for d in found if not str(d)[6:].lstrip("u").startswith(names) or d in WIDE), key=str)


WIDE = (torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64)


def numbered(dtype: Any, *shape: int, begin: int = 1) -> Any:
    if dtype is torch.bool:
        return torch.arange(int(np.prod(shape))).reshape(shape) % 3 == begin % 2
    width = torch.empty((), dtype=dtype).element_size()
    count = int(np.prod(shape)) * width
    return (
        torch.frombuffer(bytearray((begin + at) % 60 for at in range(count)), dtype=torch.uint8).view(dtype).view(shape)
    )


@pytest.mark.parametrize("dtype", dtypes(), ids=str)
def test_buffers_of_every_dtype(dtype: Any, tmp_path: Path) -> None:
    def make(begin: int) -> Any:
        return Buffers(
            plain=numbered(dtype, 2, 3, begin=begin),
            transposed=numbered(dtype, 3, 2, begin=begin).t(),
            single=numbered(dtype, 1, begin=begin)[0],
            empty=numbered(dtype, 2, 3)[:0],
        )

    first, second = make(1), make(20)
    save(tmp_path, model=first)
    assert bits(second.state_dict()) != bits(first.state_dict())
    before = places(second)
    restore(tmp_path, model=second)
    assert bits(second.state_dict()) == bits(first.state_dict())
    assert places(second) == before


def test_views_that_are_conjugated_or_negated_stay_such_views(tmp_path: Path) -> None:
    def make(factor: float) -> Any:
        numbers = torch.tensor([1 + 2j, 3 - 4j]) * factor
        return Buffers(conjugated=numbers.conj(), negated=torch.conj(numbers.clone()).imag)

    first, second = make(1), make(5)
    assert second.conjugated.is_conj()
    assert second.negated.is_neg()
    save(tmp_path, model=first)
    before = places(second)
    restore(tmp_path, model=second)
    assert bits(second.state_dict()) == bits(first.state_dict())
    assert places(second) == before
    assert second.conjugated.is_conj()
    assert second.negated.is_neg()


def test_views_into_one_memory_are_filled_and_what_is_between_is_not(tmp_path: Path) -> None:
    ground = torch.full((6,), -1.0)
    save(tmp_path, model=Buffers(even=torch.arange(3.0), odd=torch.arange(2.0) + 10))
    second = Buffers(even=ground[::2], odd=ground[1:5:2])
    restore(tmp_path, model=second)
    assert ground.tolist() == [0, 10, 1, 11, 2, -1]


# ---- modules that have no values yet


def test_a_module_on_meta(tmp_path: Path) -> None:
    first = tied()
    first.train(1, 2)
    save(tmp_path, **first.parts)
    with torch.device("meta"):
        model = Tied()
    second = Program(model, adamw(model))
    objects = [id(parameter) for parameter in model.parameters()]
    restore(tmp_path, **second.parts)
    assert [id(parameter) for parameter in model.parameters()] == objects
    assert model.head.weight is model.embedding.weight is second.optimizer.param_groups[0]["params"][0]
    assert second.bits() == first.bits()
    first.train(3)
    second.train(3)
    assert second.bits() == first.bits()


def test_a_module_half_on_meta(tmp_path: Path) -> None:
    def make() -> Any:
        return nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2))

    first, second = make(), make()
    save(tmp_path, model=first)
    second[1].to("meta")
    pointer, objects = second[0].weight.data_ptr(), [id(parameter) for parameter in second.parameters()]
    restore(tmp_path, model=second)
    assert bits(second.state_dict()) == bits(first.state_dict())
    assert second[0].weight.data_ptr() == pointer
    assert [id(parameter) for parameter in second.parameters()] == objects


def test_a_lazy_module(tmp_path: Path) -> None:
    def make() -> Program:
        model = nn.Sequential(nn.LazyLinear(5), nn.Linear(5, 2))
        return Program(model, adamw(model))

    first = make()
    first.model(torch.ones(4, 3))
    first.train(1, 2)
    save(tmp_path, **first.parts)
    second = make()
    objects = [id(parameter) for parameter in second.model.parameters()]
    restore(tmp_path, **second.parts)
    assert [id(parameter) for parameter in second.model.parameters()] == objects
    assert second.bits() == first.bits()
    first.train(3)
    second.train(3)
    assert second.bits() == first.bits()


# ---- what a module or an optimizer does itself when it loads


class Backbone(nn.Module):
    """Two layers; its own table is made anew each time, whatever a checkpoint holds."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(3, 5), nn.Linear(5, 2)
        self.register_buffer("table", torch.arange(4.0))


class KeepsItsHead(Backbone):
    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        kept = {name: tensor for name, tensor in state_dict.items() if not name.startswith(("head", "table"))}
        return super().load_state_dict(kept, strict=False, assign=assign)


class KeepsItsHeadWithin(Backbone):
    def _load_from_state_dict(self, state_dict: Any, prefix: str, *more: Any) -> None:
        for name, tensor in self.state_dict().items():
            if name.startswith(("head", "table")):
                state_dict[prefix + name] = tensor
        super()._load_from_state_dict(state_dict, prefix, *more)


class KeepsItsHeadByAHook(Backbone):
    def __init__(self) -> None:
        super().__init__()
        self.register_load_state_dict_pre_hook(self.keep)

    @staticmethod
    def keep(module: Any, state_dict: Any, prefix: str, *more: Any) -> None:
        for name, tensor in module.state_dict().items():
            if name.startswith(("head", "table")):
                state_dict[prefix + name] = tensor


@pytest.mark.parametrize("within", [False, True], ids=["alone", "within another"])
@pytest.mark.parametrize("kind", [KeepsItsHead, KeepsItsHeadWithin, KeepsItsHeadByAHook])
def test_what_a_module_does_not_take_is_not_written(kind: type[Any], within: bool, tmp_path: Path) -> None:
    """A load of the module's own decides, as it does with ``load_state_dict`` alone."""
    if within and kind is KeepsItsHead:
        pytest.skip("PyTorch does not call load_state_dict of inner modules")
    first, second = kind(), kind()
    for module in (first, second):
        module.table += torch.rand(1)
    whole_first, whole_second = (nn.Sequential(m, nn.Linear(2, 1)) if within else m for m in (first, second))
    save(tmp_path, model=whole_first)
    head, table = bits(second.head.state_dict()), bits(second.table)
    expected = copy.deepcopy(whole_second)
    expected.load_state_dict(whole_first.state_dict())
    restore(tmp_path, model=whole_second)
    assert bits(whole_second.state_dict()) == bits(expected.state_dict())
    assert bits(second.body.state_dict()) == bits(first.body.state_dict())
    assert bits(second.head.state_dict()) == head != bits(first.head.state_dict())
    assert bits(second.table) == table != bits(first.table)


class Renames(nn.Module):
    """Is saved under the names of an older version."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 2))

    def state_dict(self, *arguments: Any, **more: Any) -> Any:
        return {f"old_{name}": tensor for name, tensor in super().state_dict(*arguments, **more).items()}

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        state = {name.removeprefix("old_"): tensor for name, tensor in state_dict.items()}
        return super().load_state_dict(state, strict, assign)


class RenamesByHooks(nn.Module):
    """The same, transposed as well."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 2))
        self.register_state_dict_post_hook(self.to_old)
        self.register_load_state_dict_pre_hook(self.to_new)

    @staticmethod
    def to_old(module: Any, state_dict: Any, prefix: str, *more: Any) -> None:
        state_dict[f"{prefix}old"] = state_dict.pop(f"{prefix}weight").t() * 2

    @staticmethod
    def to_new(module: Any, state_dict: Any, prefix: str, *more: Any) -> None:
        state_dict[f"{prefix}weight"] = (state_dict.pop(f"{prefix}old") / 2).t()


@pytest.mark.parametrize("kind", [Renames, RenamesByHooks])
def test_a_module_with_a_form_of_its_own(kind: type[Any], tmp_path: Path) -> None:
    first, second = kind(), kind()
    save(tmp_path, model=first)
    before = places(second)
    restore(tmp_path, model=second)
    assert places(second) == before
    assert torch.equal(second.weight, first.weight)
    assert second.weight.requires_grad


class Extra(nn.Module):
    """Compares what was saved beside its parameters with what it has itself."""

    def __init__(self, version: Any, count: float = 0) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.version = version
        self.count = torch.tensor([count])
        self.found: Any = None

    def get_extra_state(self) -> Any:
        return {"version": self.version, "count": self.count, "text": "some"}

    def set_extra_state(self, state: Any) -> None:
        self.found = (state["version"].tolist(), self.version.tolist(), state["text"])
        self.count = state["count"]


@pytest.mark.parametrize("within", [False, True], ids=["alone", "within another"])
def test_what_a_module_keeps_beside_its_tensors(within: bool, tmp_path: Path) -> None:
    first, second = Extra(torch.tensor([1]), 5), Extra(torch.tensor([2]), 7)
    own = second.count
    save(tmp_path, model=nn.Sequential(first) if within else first)
    restore(tmp_path, model=nn.Sequential(second) if within else second)
    assert second.found == ([1], [2], "some"), "what is there and what was saved can be told apart"
    assert second.count.tolist() == [5]
    assert own.tolist() == [7]
    assert torch.equal(second.layer.weight, first.layer.weight)


class Anchored(torch.optim.Optimizer):
    """Begins with the parameter itself as its anchor, and goes on with one of its own."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.1})
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["anchor"] = parameter.detach()

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["anchor"] = self.state[parameter]["anchor"] + 1
                parameter.data.sub_(0.1)


def test_a_state_that_is_the_parameter_itself_is_not_written_over(tmp_path: Path) -> None:
    first, second = nn.Linear(3, 2), nn.Linear(3, 2)
    one, other = Anchored(first.parameters()), Anchored(second.parameters())
    one.step()
    save(tmp_path, model=first, optimizer=one)
    restore(tmp_path, model=second, optimizer=other)
    assert bits(second.state_dict()) == bits(first.state_dict())
    assert bits(other.state_dict()) == bits(one.state_dict())
    assert other.state[second.weight]["anchor"].data_ptr() != second.weight.data_ptr()


class Spread(torch.optim.Optimizer):
    """Keeps one number for all elements."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.1})

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                before = self.state[parameter].get("scale", torch.zeros(1))
                self.state[parameter]["scale"] = (before.reshape(-1)[:1] + 1).expand(parameter.numel())


def test_a_state_of_which_one_element_stands_for_all(tmp_path: Path) -> None:
    first, second = nn.Linear(3, 2), nn.Linear(3, 2)
    one, other = Spread(first.parameters()), Spread(second.parameters())
    one.step()
    one.step()
    other.step()
    save(tmp_path, model=first, optimizer=one)
    restore(tmp_path, model=second, optimizer=other)
    assert bits(other.state_dict()) == bits(one.state_dict())


def test_a_rate_that_two_optimizers_have_in_common(tmp_path: Path) -> None:
    def make() -> tuple[Any, Any, Any, Any]:
        rate = torch.tensor(0.5)
        models = nn.Linear(3, 2), nn.Linear(3, 2)
        return *models, *(torch.optim.Adam(model.parameters(), lr=rate, foreach=False) for model in models)

    one, two, first, second = make()
    first.param_groups[0]["lr"] = torch.tensor(0.1)
    second.param_groups[0]["lr"] = torch.tensor(0.2)
    save(tmp_path, one=one, two=two, first=first, second=second)
    one, two, first, second = make()
    restore(tmp_path, one=one, two=two, first=first, second=second)
    assert [float(o.param_groups[0]["lr"]) for o in (first, second)] == [pytest.approx(0.1), pytest.approx(0.2)]
    assert [float(o.defaults["lr"]) for o in (first, second)] == [0.5, 0.5], "what a new group would begin with"


class Deep:
    """An object of the program with modules, arrays and tensors in it."""

    def __init__(self, begin: float) -> None:
        self.average = nn.Linear(2, 2)
        self.values = {"history": [torch.full((3,), begin)], "array": np.full(4, begin), "rate": begin}

    def state_dict(self) -> Any:
        return {"average": self.average.state_dict(), "values": self.values}

    def load_state_dict(self, state: Any) -> None:
        self.average.load_state_dict(state["average"])
        self.values = state["values"]


class Watched(nn.Linear):
    """Counts loads without changing how they are done."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.loads = 0
        self.register_load_state_dict_post_hook(lambda module, _: setattr(module, "loads", module.loads + 1))


@pytest.mark.parametrize("within", [False, True], ids=["alone", "within another"])
def test_what_is_to_be_done_after_a_load_is_done(within: bool, tmp_path: Path) -> None:
    def make() -> tuple[Any, Any]:
        watched = Watched(3, 2)
        model = nn.Sequential(nn.Linear(3, 3), watched) if within else watched
        return model, watched

    save(tmp_path, model=make()[0])
    model, watched = make()
    restore(tmp_path, model=model)
    assert watched.loads == 1


def test_what_is_to_be_done_after_an_optimizer_is_loaded_sees_its_state(tmp_path: Path) -> None:
    first, second = linear(torch.optim.AdamW), linear(torch.optim.AdamW)
    first.train(1, 2)
    save(tmp_path, **first.parts)
    second.train(5)
    seen: list[Any] = []
    second.optimizer.register_load_state_dict_post_hook(lambda optimizer: seen.append(bits(optimizer.state_dict())))
    restore(tmp_path, **second.parts)
    assert seen == [bits(first.optimizer.state_dict())]


class CountsInState(torch.optim.SGD):
    """Keeps numbers beside tensors."""

    def step(self, closure: Any = None) -> Any:
        result = super().step(closure)
        for parameter in (parameter for group in self.param_groups for parameter in group["params"]):
            entry = self.state[parameter]
            entry["count"], entry["none"] = entry.get("count", 0) + 1, None
        return result


def test_all_but_the_tensors_is_loaded_too_where_those_are_read_in_place(tmp_path: Path) -> None:
    def make() -> Program:
        return linear(lambda given: CountsInState(given, lr=0.1, momentum=0.9))

    first, second = make(), make()
    first.train(1, 2, 3)
    first.optimizer.param_groups[0]["lr"] = 0.05
    save(tmp_path, **first.parts)
    second.train(5)
    before = places(second.model, second.optimizer)
    restore(tmp_path, **second.parts)
    assert second.bits() == first.bits()
    assert places(second.model, second.optimizer) == before
    assert second.optimizer.param_groups[0]["lr"] == 0.05
    assert [entry["count"] for entry in second.optimizer.state.values()] == [3] * 4
    first.train(4)
    second.train(4)
    assert second.bits() == first.bits()


def test_what_is_read_in_place_is_not_copied_onto_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a model with very many tensors that would take longer than the reading."""
    first, second = linear(torch.optim.AdamW), linear(torch.optim.AdamW)
    first.train(1, 2)
    save(tmp_path, **first.parts)
    second.train(5)
    loaded: list[Any] = []
    monkeypatch.setattr(
        torch.optim.Optimizer, "_process_value_according_to_param_policy", lambda *given, **_: loaded.append(given)
    )
    monkeypatch.setattr(nn.Linear, "_load_from_state_dict", lambda *given: loaded.append(given))
    nn.Linear._load_from_state_dict.__module__ = "torch.nn.modules.linear"
    restore(tmp_path, **second.parts)
    assert loaded == []
    assert second.bits() == first.bits()


def test_objects_of_the_program_get_tensors_of_their_own(tmp_path: Path) -> None:
    first, second = Deep(1), Deep(2)
    save(tmp_path, deep=first)
    values, before = second.values, places(second.average)
    restore(tmp_path, deep=second)
    assert bits(second.state_dict()) == bits(first.state_dict())
    assert places(second.average) == before
    assert values["history"][0].tolist() == [2, 2, 2], "what it let go of is not changed"


# ---- nothing is read into what does not fit


MISFITS: dict[str, Callable[[], Any]] = {
    "a shape": lambda: nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 3)),
    "a dtype": lambda: nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2).double()),
    "a name": lambda: nn.Sequential(nn.Linear(3, 5), nn.Identity(), nn.Linear(5, 2)),
    "one more": lambda: nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2), nn.Linear(2, 2)),
    "one less": lambda: nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2, bias=False)),
}


@pytest.mark.parametrize("misfit", MISFITS)
@pytest.mark.parametrize("where", ["first", "last"])
def test_what_does_not_fit_leaves_everything_as_it_was(misfit: str, where: str, tmp_path: Path) -> None:
    def parts(odd: Any) -> dict[str, Any]:
        fitting = linear(torch.optim.Adam)
        fitting.train(1)
        models = {"odd": odd} if where == "first" else {}
        models |= fitting.parts
        return models if where == "first" else models | {"odd": odd}

    save(tmp_path, **parts(nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2))))
    second = parts(MISFITS[misfit]())
    before = [bits({name: part.state_dict() for name, part in second.items()}), torch.get_rng_state().tolist()]
    listed = sorted(str(path) for path in tmp_path.rglob("*") if ".work" not in path.parts)
    with pytest.raises(IncompatibleCheckpointError) as caught:
        restore(tmp_path, **second)
    assert caught.value.part == "odd"
    assert [bits({n: part.state_dict() for n, part in second.items()}), torch.get_rng_state().tolist()] == before
    after = sorted(str(path) for path in tmp_path.rglob("*") if ".work" not in path.parts)
    assert [path for path in after if "model.ckpt" in path] == [path for path in listed if "model.ckpt" in path]


def test_an_optimizer_that_does_not_fit_leaves_everything_as_it_was(tmp_path: Path) -> None:
    first, second = linear(torch.optim.Adam), linear(torch.optim.Adam)
    first.train(1)
    second.train(2)
    save(tmp_path, **first.parts)
    second.optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    before = second.bits()
    with pytest.raises(IncompatibleCheckpointError, match="its groups have"):
        restore(tmp_path, **second.parts)
    assert second.bits() == before


# ---- damage


@pytest.fixture
def two_saved(tmp_path: Path) -> tuple[Path, Any]:
    """Checkpoints of steps 1 and 2, and the bits of step 1."""
    program = linear(torch.optim.Adam)
    supervisor = Supervisor(
        TorchBackend(**program.parts),
        tmp_path,
        save_every=EverySteps(1),
        keep=KeepAll(),
        summarize_every=None,
        signals=False,
    )
    program.step(1)  # before the session: the first checkpoint holds a state of the optimizer, too
    with supervisor.managed_session():
        older = program.bits()
        while not supervisor.should_stop():
            program.step(2)
            supervisor.request_stop()
    assert CheckpointDirectory(tmp_path).steps() == [0, 1]
    assert program.bits() != older
    return tmp_path, older


HARMS: dict[str, tuple[str, Callable[[bytes], bytes]]] = {
    "a bit of the last tensor": ("optimizer.safetensors", lambda content: content[:-1] + bytes([content[-1] ^ 1])),
    "a dtype": ("optimizer.safetensors", lambda content: content.replace(b'"F32"', b'"I32"', 1)),
    "a shape": ("optimizer.safetensors", lambda content: content.replace(b"[5,3]", b"[3,5]", 1)),
    "a name": ("optimizer.safetensors", lambda content: content.replace(b"exp_avg_sq", b"exp_avg_sk", 1)),
    "a dtype of the model": ("model.safetensors", lambda content: content.replace(b'"F32"', b'"I32"', 1)),
    "a shape of the model": ("model.safetensors", lambda content: content.replace(b"[5,3]", b"[3,5]", 1)),
    "a name of the model": ("model.safetensors", lambda content: content.replace(b"0.weight", b"0.weighs", 1)),
    "a size of the state": ("state.json", lambda content: content[:-1]),
}


@pytest.mark.parametrize("trained", [False, True], ids=["fresh", "trained otherwise"])
@pytest.mark.parametrize("harm", HARMS)
def test_the_older_one_is_restored_whole(harm: str, trained: bool, two_saved: tuple[Path, Any]) -> None:
    logdir, older = two_saved
    name, change = HARMS[harm]
    file = logdir / "model.ckpt-1" / name
    content = file.read_bytes()
    assert change(content) != content
    file.write_bytes(change(content))
    program = linear(torch.optim.Adam)
    if trained:
        program.train(8)
    before = places(program.model, program.optimizer)
    report = restore(logdir, **program.parts)
    assert program.bits() == older
    after = places(program.model, program.optimizer)
    assert {key: after[key] for key in before} == before
    assert report.restored == "model.ckpt-0"
    assert list(report.set_aside) == ["model.ckpt-1"]
    assert name.partition(".")[0] in report.set_aside["model.ckpt-1"]
