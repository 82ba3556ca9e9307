"""Every PyTorch value comes back equal in value and in type, or is refused when the run starts, by part and path."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

from supervise_core import CheckpointDirectory, DirectoryStore, Supervisor, UnsupportedStateError  # noqa: E402
from supervise_core.numpy_codec import NumpyCodec  # noqa: E402
from supervise_torch import TorchBackend  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")


class Holder:
    """A part whose state is whatever a test puts in."""

    def __init__(self, state: Any = None) -> None:
        self.state = state

    def state_dict(self) -> Any:
        return self.state

    def load_state_dict(self, state: Any) -> None:
        self.state = state


def save(state: Any, logdir: Path) -> None:
    supervisor = Supervisor(TorchBackend(part=Holder(state)), logdir, summarize_every=None, signals=False)
    with supervisor.managed_session():
        supervisor.request_stop()


def through_a_checkpoint(state: Any, logdir: Path) -> Any:
    """The state after a run that saved it, restored by the run of a fresh backend."""
    save(state, logdir)
    fresh = Holder()
    supervisor = Supervisor(TorchBackend(part=fresh), logdir, summarize_every=None, signals=False, resume="must")
    with supervisor.managed_session():
        supervisor.request_stop()
    return fresh.state


def content(tensor: Any) -> bytes:
    """The elements in row-major order, whatever PyTorch can or cannot do with their dtype."""
    plain = tensor.detach().resolve_conj().resolve_neg()
    if plain.element_size() == 1:
        plain = plain.view(torch.uint8)
    plain = plain.contiguous()
    return plain.reshape(-1).view(torch.uint8).numpy().tobytes() if plain.numel() else b""


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return (
            isinstance(other, torch.Tensor)
            and (one.dtype, one.shape) == (other.dtype, other.shape)
            and content(one) == content(other)
        )
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


# ---- tensors


def all_dtypes() -> list[Any]:
    """Every dtype of this PyTorch but those of quantized tensors, which need a quantizer."""
    dtypes = {dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)}
    return sorted((dtype for dtype in dtypes if "q" not in str(dtype)[6:8]), key=str)


def filled(dtype: Any, count: int = 6) -> Any:
    """A tensor with a different content in each element, as far as the dtype can tell them apart."""
    if dtype is torch.bool:
        return torch.tensor([True, False] * (count // 2))
    width = torch.empty((), dtype=dtype).element_size()
    return torch.frombuffer(bytearray(range(1, count * width + 1)), dtype=torch.uint8).view(dtype)


def shapes_of(flat: Any) -> dict[str, Any]:
    matrix = flat.reshape(2, 3)
    return {
        "flat": flat,
        "matrix": matrix,
        "transposed": matrix.t(),
        "every other": matrix[:, ::2],
        "without dimensions": flat[3],
        "without elements": matrix[:0],
        "expanded": flat[:1].expand(4),
        "a view at an offset": flat[2:5],
    }


@pytest.mark.parametrize("dtype", all_dtypes(), ids=str)
def test_every_dtype_comes_back_in_every_shape(dtype: Any, tmp_path: Path) -> None:
    state = shapes_of(filled(dtype))
    found = through_a_checkpoint(state, tmp_path)
    assert [name for name in state if not same(state[name], found[name])] == []


LAYOUTS: dict[str, Any] = {
    "channels_last": torch.arange(120.0).reshape(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
    "channels_last_3d": torch.arange(48.0).reshape(1, 2, 2, 3, 4).contiguous(memory_format=torch.channels_last_3d),
    "transposed": torch.arange(6.0).reshape(2, 3).t(),
    "permuted": torch.arange(24.0).reshape(2, 3, 4).permute(1, 2, 0),
    "row-major": torch.arange(6.0).reshape(2, 3),
    "sides of one": torch.arange(4.0).reshape(1, 4, 1, 1).contiguous(memory_format=torch.channels_last),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_memory_layout_comes_back(name: str, tmp_path: Path) -> None:
    tensor = LAYOUTS[name]
    found = through_a_checkpoint({"tensor": tensor}, tmp_path)["tensor"]
    assert torch.equal(found, tensor)
    assert found.is_contiguous() == tensor.is_contiguous()
    if not tensor.is_contiguous():
        assert found.stride() == tensor.stride()


def test_conjugated_and_negated_views_come_back_as_their_values(tmp_path: Path) -> None:
    tensor = torch.tensor([1 + 2j, 3 - 4j])
    state = {"plain": tensor, "conjugated": tensor.conj(), "negated": torch.conj(tensor).imag}
    found = through_a_checkpoint(state, tmp_path)
    assert all(torch.equal(found[name], state[name]) for name in state)


def test_tied_tensors_stay_tied(tmp_path: Path) -> None:
    weight = torch.nn.Parameter(torch.arange(6.0).reshape(2, 3))
    found = through_a_checkpoint({"a": weight, "b": [weight], "c": weight.detach(), "t": weight.t()}, tmp_path)
    assert found["a"].data_ptr() == found["b"][0].data_ptr() == found["c"].data_ptr()
    assert torch.equal(found["t"], weight.t())


def test_a_shared_storage_comes_back_as_its_views(tmp_path: Path) -> None:
    storage = torch.arange(10.0)
    found = through_a_checkpoint({"head": storage[:4], "tail": storage[2:], "all": storage}, tmp_path)
    assert [found[name].tolist() for name in ("head", "tail", "all")] == [
        storage[:4].tolist(), storage[2:].tolist(), storage.tolist(),
    ]  # fmt: skip


def test_tied_weights_of_a_model_stay_tied(tmp_path: Path) -> None:
    def model() -> Any:
        embedding, head = torch.nn.Embedding(5, 3), torch.nn.Linear(3, 5, bias=False)
        head.weight = embedding.weight
        return torch.nn.ModuleDict({"embedding": embedding, "head": head})

    first, second = model(), model()
    for tied in (first, second):
        supervisor = Supervisor(TorchBackend(model=tied), tmp_path, summarize_every=None, signals=False)
        with supervisor.managed_session():
            supervisor.request_stop()
    assert second["head"].weight is second["embedding"].weight
    assert torch.equal(first["head"].weight, second["head"].weight)
    size = sum(file.stat().st_size for file in (tmp_path / "model.ckpt-0").glob("model*.safetensors"))
    assert size < 4096 + 2 * 15 * 4  # stored once


# ---- what is in state dicts beside tensors

PLAIN: dict[str, Any] = {
    "sizes, dtypes and devices": [torch.Size([2, 3]), torch.float16, torch.device("cpu"), torch.device("cuda:1")],
    "an empty size": torch.Size([]),
    "NumPy scalars": [np.float32(1.5), np.int64(-1)],
    "tensors in tuples": (torch.ones(2), [torch.zeros(())]),
    "integer keys": {0: {"step": torch.tensor(3.0), "exp_avg": torch.ones(2)}, 1: {}},
    "a parameter": {"parameter": torch.nn.Parameter(torch.ones(2))},
}


@pytest.mark.parametrize("name", PLAIN)
def test_what_is_beside_tensors_comes_back(name: str, tmp_path: Path) -> None:
    found = through_a_checkpoint({"value": PLAIN[name]}, tmp_path)["value"]
    assert same(PLAIN[name], found), found


def schedulers() -> Iterator[Any]:
    from torch.optim import lr_scheduler as lr

    yield "StepLR", lambda optimizer: lr.StepLR(optimizer, 2)
    yield "MultiStepLR", lambda optimizer: lr.MultiStepLR(optimizer, [2, 2, 3], gamma=0.5)
    yield "CosineAnnealingWarmRestarts", lambda optimizer: lr.CosineAnnealingWarmRestarts(optimizer, 3)
    yield "OneCycleLR", lambda optimizer: lr.OneCycleLR(optimizer, 0.1, total_steps=20)
    yield "CyclicLR", lambda optimizer: lr.CyclicLR(optimizer, 0.01, 0.1, step_size_up=2, cycle_momentum=False)
    yield (
        "SequentialLR",
        lambda optimizer: lr.SequentialLR(
            optimizer, [lr.ConstantLR(optimizer), lr.ExponentialLR(optimizer, 0.9)], milestones=[3]
        ),
    )
    yield "LambdaLR", lambda optimizer: lr.LambdaLR(optimizer, lambda epoch: 0.9**epoch)
    yield "ReduceLROnPlateau", lambda optimizer: lr.ReduceLROnPlateau(optimizer, patience=0)


@pytest.mark.parametrize("make", [pytest.param(make, id=name) for name, make in schedulers()])
def test_a_scheduler_goes_on_as_if_nothing_had_been(make: Any, tmp_path: Path) -> None:
    def parts() -> tuple[Any, Any]:
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)
        return optimizer, make(optimizer)

    def advance(optimizer: Any, scheduler: Any, count: int) -> list[float]:
        rates = []
        for number in range(count):
            optimizer.step()
            plateau = isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau)
            scheduler.step(*([float(number % 3)] if plateau else []))
            rates.append(optimizer.param_groups[0]["lr"])
        return rates

    optimizer, scheduler = parts()
    again_optimizer, again = parts()
    supervisor = Supervisor(
        TorchBackend(optimizer=optimizer, scheduler=scheduler), tmp_path, summarize_every=None, signals=False
    )
    with supervisor.managed_session():
        advance(optimizer, scheduler, 2)
        supervisor.request_stop()
    supervisor = Supervisor(
        TorchBackend(optimizer=again_optimizer, scheduler=again), tmp_path, summarize_every=None, signals=False
    )
    with supervisor.managed_session() as session:
        assert session.global_step == 2
        supervisor.request_stop()
    assert advance(again_optimizer, again, 6) == advance(optimizer, scheduler, 6)


def test_milestones_keep_their_type(tmp_path: Path) -> None:
    found = through_a_checkpoint({"milestones": Counter({30: 1, 80: 2})}, tmp_path)
    assert type(found["milestones"]) is Counter
    assert found["milestones"][80] == 2
    assert 30 in found["milestones"]


# ---- all of it, in another process


def everything() -> dict[str, Any]:
    tensors = {str(dtype): shapes_of(filled(dtype)) for dtype in all_dtypes()}
    return {"plain": PLAIN, "tensors": tensors, "layouts": LAYOUTS}


def test_another_process_reads_all_of_it(tmp_path: Path) -> None:
    save(everything(), tmp_path)
    code = f"""
import importlib.util, sys
spec = importlib.util.spec_from_file_location("values", {str(Path(__file__))!r})
values = sys.modules["values"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(values)
found = values.CheckpointDirectory({str(tmp_path)!r}).newest().load("part")
for group, expected in values.everything().items():
    for name in expected:
        assert values.same(expected[name], found[group][name]), (group, name)
"""
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=200)
    assert told.returncode == 0, told.stderr


def test_tensors_can_be_read_without_pytorch(tmp_path: Path) -> None:
    save({"w": torch.arange(6.0).reshape(2, 3).t(), "b": torch.ones(2, dtype=torch.bfloat16)}, tmp_path)
    found = CheckpointDirectory(tmp_path).newest().load("part", NumpyCodec())
    assert found["w"].tolist() == [[0, 3], [1, 4], [2, 5]]
    assert found["b"].astype(float).tolist() == [1, 1]


def test_the_files_are_plain_safetensors(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    model = torch.nn.Linear(2, 3)
    supervisor = Supervisor(TorchBackend(model=model), tmp_path, summarize_every=None, signals=False)
    with supervisor.managed_session():
        supervisor.request_stop()
    found = safetensors.load_file(tmp_path / "model.ckpt-0" / "model.safetensors")
    assert found.keys() == model.state_dict().keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in model.state_dict().items())


# ---- what cannot be kept


class Odd(torch.Tensor):
    pass


def quantized() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)


def nested() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])


def compressed() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.eye(2).to_sparse_csr()


REFUSED: dict[str, Any] = {
    "a sparse tensor": (lambda: torch.eye(2).to_sparse(), "not dense"),
    "a compressed tensor": (compressed, "not dense"),
    "a quantized tensor": (quantized, "quantized"),
    "a nested tensor": (nested, "nested|NestedTensor|not plain"),
    "a tensor on the meta device": (lambda: torch.empty(2, device="meta"), "meta device"),
    "a tensor of a subclass": (lambda: torch.ones(2).as_subclass(Odd), "Odd are not plain"),
    "a lazy parameter": (lambda: torch.nn.LazyLinear(2).weight, "no shape yet"),
    "a generator": (torch.Generator, "Generator cannot be written"),
    "a function": (lambda: len, "cannot be written"),
    "a storage": (lambda: torch.ones(2).untyped_storage(), "cannot be written"),
    "a module": (lambda: torch.nn.Linear(1, 1), "cannot be written"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_kept_is_refused_when_the_run_starts_by_part_and_path(name: str, tmp_path: Path) -> None:
    make, why = REFUSED[name]
    backend = TorchBackend(part=Holder({"layers": [0, {"odd": make()}]}))
    supervisor = Supervisor(backend, tmp_path, summarize_every=None, signals=False)
    with pytest.raises(UnsupportedStateError, match=why) as caught, supervisor.managed_session():
        raise AssertionError("the block was entered")
    assert caught.value.path == "part['layers'][1]['odd']"
    assert DirectoryStore(tmp_path).checkpoints() == []


def test_numpy_arrays_in_a_part_stay_numpy_arrays(tmp_path: Path) -> None:
    array = np.arange(6, dtype=">f8").reshape(2, 3)
    held = {"array": array, "same": array, "tensor": torch.arange(3.0), "complex": np.array([1j]), "n": np.float32(2)}
    back = through_a_checkpoint(held, tmp_path)
    assert isinstance(back["array"], np.ndarray)
    assert back["array"].dtype == array.dtype
    assert np.array_equal(back["array"], array)
    assert back["same"] is back["array"]
    assert isinstance(back["tensor"], torch.Tensor)
    assert np.array_equal(back["complex"], held["complex"])
    assert type(back["n"]) is np.float32
