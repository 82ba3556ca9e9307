"""PyTorch tensors in checkpoints: every dense dtype, on the CPU or a CUDA device, with their memory layout."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Final

import torch

from supervise_core.memory import Move, address_of
from supervise_core.tagged_json import UNTOLD, Json, Untold
from supervise_core.tensors import NOTHING_MORE, Arrival, Stored, StoredTensor, TensorCodec
from supervise_torch.dtensors import PLAIN_TYPES, describe_piece, is_dtensor, layout_of, own_of

_DTYPES: Final = {
    torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8", torch.uint16: "U16", torch.int16: "I16",
    torch.uint32: "U32", torch.int32: "I32", torch.uint64: "U64", torch.int64: "I64",
    torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32", torch.float64: "F64",
    torch.complex64: "C64", torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip
_TORCH_DTYPES: Final = {code: dtype for dtype, code in _DTYPES.items()}
_NARROW: Final = frozenset(
    getattr(torch, name) for bits in range(1, 8) for name in (f"int{bits}", f"uint{bits}") if hasattr(torch, name)
)  # PyTorch has no copy for these, which take a byte each; their bytes can be copied


class TorchCodec(TensorCodec[torch.Tensor]):
    """Dense tensors. Strides that only permute the dimensions (``channels_last``, transposed) are kept.

    Of a ``DTensor`` it is this process's own piece, with its place in the whole.
    """

    def __init__(self) -> None:
        self._free: dict[int, list[torch.Tensor]] = {}  # pinned buffers by their size in bytes
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def recognises(self, value: Any) -> bool:
        return isinstance(value, torch.Tensor)

    def describe(self, value: torch.Tensor) -> Stored:
        dtype = _DTYPES.get(value.dtype)
        if dtype is not None and type(value) in PLAIN_TYPES and (address := _address_of(value)) is not None:
            return Stored(dtype, tuple(value.shape), NOTHING_MORE, address)  # nearly all of them
        if is_dtensor(value):
            stored = self.describe(own_of(value))
            return stored._replace(extra={**stored.extra, **describe_piece(value)})
        _check_dense(value)
        address = _address_of(value)
        extra: dict[str, Json] = {}
        if value.numel() and not value.is_contiguous() and _is_permuted(value):
            extra["strides"] = list(value.stride())
        if dtype is not None:
            return Stored(dtype, tuple(value.shape), extra, address)
        nbytes = value.numel() * value.element_size()
        named = {"dtype": str(value.dtype).removeprefix("torch."), "shape": list(value.shape)}
        return Stored("U8", (nbytes,), named | extra, address)

    def copy_out(self, pairs: Sequence[tuple[torch.Tensor, memoryview]]) -> Arrival | None:
        on_cuda: dict[torch.device, list[tuple[torch.Tensor, memoryview]]] = {}
        with torch.no_grad():
            for tensor, memory in pairs:
                plain = own_of(tensor).detach().resolve_conj().resolve_neg()
                if plain.device.type == "cuda":
                    on_cuda.setdefault(plain.device, []).append((plain, memory))
                else:
                    _copy_into(memory, plain)
            arrivals = [self._copy_from_device(device, items) for device, items in on_cuda.items()]
        if not arrivals:
            return None

        def await_all(move: Callable[[Sequence[Move]], object]) -> None:
            for arrive in arrivals:
                arrive(move)

        return await_all

    def empty(self, stored: StoredTensor) -> torch.Tensor:
        dtype, shape = self.dtype_and_shape(stored)
        if any(not isinstance(side, int) or side < 0 for side in shape):
            raise ValueError(f"{shape!r} is not the shape of a tensor")
        if math.prod(shape) * dtype.itemsize != stored.spec.nbytes:
            raise ValueError(f"{stored.spec.nbytes} bytes are not a tensor of dtype {dtype} and shape {shape}")
        return _empty(shape, dtype, stored.extra.get("strides"))

    def copy_in(self, tensor: torch.Tensor, data: memoryview) -> None:
        tensor = own_of(tensor)
        plain = torch.frombuffer(data, dtype=torch.uint8)
        if plain.data_ptr() % tensor.dtype.itemsize:
            plain = plain.clone()  # PyTorch crashes on wide elements that are not aligned
        values = plain.view(tensor.dtype).reshape(tensor.shape)
        with torch.no_grad():
            _copyable(tensor).copy_(_copyable(values))

    def is_writable(self, value: torch.Tensor) -> bool:
        value = own_of(value)
        return all(stride for stride, side in zip(value.stride(), value.shape, strict=True) if side > 1)

    def dtype_and_shape(self, stored: StoredTensor) -> tuple[torch.dtype, tuple[int, ...]]:
        """What the tensor was when it was saved."""
        if "dtype" not in stored.extra:
            return _TORCH_DTYPES[stored.spec.dtype], stored.spec.shape
        dtype = getattr(torch, str(stored.extra["dtype"]), None)
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"PyTorch {torch.__version__} has no dtype {stored.extra['dtype']!r}")
        return dtype, tuple(stored.extra["shape"])

    def identity(self, value: torch.Tensor) -> Hashable | None:
        if is_dtensor(value):
            own = self.identity(own_of(value))
            return None if own is None else (own, layout_of(value))
        if type(value) not in PLAIN_TYPES or value.layout is not torch.strided or not value.numel():
            return None
        if value.is_nested or value.is_meta or value.is_conj() or value.is_neg():
            return None
        return value.data_ptr(), value.shape, value.stride(), value.dtype, value.device

    def encode_constant(self, value: Any) -> Json | Untold:
        if isinstance(value, torch.dtype):
            return {"$torch.dtype": str(value).removeprefix("torch.")}
        if isinstance(value, torch.device):
            return {"$torch.device": str(value)}
        if isinstance(value, torch.Size):
            return {"$torch.Size": list(value)}
        return UNTOLD

    def decode_constant(self, tag: str, content: Json) -> Any | Untold:
        match tag, content:
            case "$torch.dtype", str() if isinstance(dtype := getattr(torch, content, None), torch.dtype):
                return dtype
            case "$torch.device", str():
                return torch.device(content)
            case "$torch.Size", list():
                return torch.Size(content)
            case _:
                return UNTOLD

    def _copy_from_device(self, device: torch.device, items: list[tuple[torch.Tensor, memoryview]]) -> Arrival:
        """Copy on a stream of its own into pinned memory that is kept; the program's stream waits, the CPU does not."""
        current = torch.cuda.current_stream(device)
        side = self._streams.setdefault(device, torch.cuda.Stream(device))
        side.wait_stream(current)
        copies: list[tuple[torch.Tensor, memoryview]] = []
        with torch.cuda.stream(side):
            for tensor, memory in items:
                pinned = self._take_pinned(tensor)
                pinned.copy_(tensor, non_blocking=True)
                tensor.record_stream(side)
                copies.append((pinned, memory))
        copied = torch.cuda.Event()
        copied.record(side)
        current.wait_event(copied)

        def arrive(move: Callable[[Sequence[Move]], object]) -> None:
            copied.synchronize()
            move([Move(address_of(memory), pinned.data_ptr(), memory.nbytes) for pinned, memory in copies])
            for pinned, _ in copies:
                buffer = pinned.reshape(-1).view(torch.uint8)
                self._free.setdefault(buffer.numel(), []).append(buffer)

        return arrive

    def _take_pinned(self, tensor: torch.Tensor) -> torch.Tensor:
        """A pinned buffer, nobody else's until its copy was fetched from it: several parts share one snapshot."""
        nbytes = tensor.numel() * tensor.element_size()
        free = self._free.get(nbytes)
        buffer = free.pop() if free else torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
        return buffer.view(tensor.dtype).reshape(tensor.shape)


class OutlineCodec(TorchCodec):
    """Knows and makes tensors that have no memory, to learn what was saved, or what will be."""

    def describe(self, value: torch.Tensor) -> Stored:
        if not value.is_meta:
            return super().describe(value)
        dtype = _DTYPES.get(value.dtype)
        return Stored("U8", (value.nbytes,)) if dtype is None else Stored(dtype, tuple(value.shape))

    def empty(self, stored: StoredTensor) -> torch.Tensor:
        return torch.empty(self.dtype_and_shape(stored)[1], dtype=self.dtype_and_shape(stored)[0], device="meta")


def _check_dense(value: torch.Tensor) -> None:
    """:raises TypeError: if the tensor is not plain dense data; says what it is."""
    if torch.nn.parameter.is_lazy(value):
        raise TypeError("it is a lazy parameter that has no shape yet; run the model once, in init_fn=, say")
    if type(value) not in PLAIN_TYPES:
        raise TypeError(f"tensors of type {type(value).__name__} are not plain; save what they are made of")
    if value.layout is not torch.strided:
        raise TypeError(f"tensors of layout {value.layout} are not dense; save their indices and values")
    if value.is_quantized:
        raise TypeError("quantized tensors are not kept; save int_repr(), the scales and the zero points")
    if value.is_nested:
        raise TypeError("nested tensors are not kept; save their values and offsets")
    if value.is_meta:
        raise TypeError("it is on the meta device, so it has no values yet; init materialises it")
    if value.device.type not in ("cpu", "cuda"):
        raise TypeError(f"tensors on {value.device} are not kept; move them to the CPU")


def _address_of(value: torch.Tensor) -> int | None:
    """Where the elements of a tensor lie, row-major and as they are, in main memory."""
    if not value.is_cpu or value.layout is not torch.strided or value.is_nested or not value.is_contiguous():
        return None
    return None if value.is_neg() or value.is_conj() else value.data_ptr()


def _is_permuted(value: torch.Tensor) -> bool:
    """Whether the elements fill their memory without gap or overlap, in some order of the dimensions."""
    expected = 1
    sides = zip(value.stride(), value.shape, strict=True)
    for stride, size in sorted((stride, size) for stride, size in sides if size > 1):
        if stride != expected:
            return False
        expected *= size
    return True


def _copyable(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.uint8) if tensor.dtype in _NARROW else tensor


def _copy_into(memory: memoryview, tensor: torch.Tensor) -> None:
    """Copy the elements as row-major bytes."""
    target = torch.frombuffer(memory, dtype=torch.uint8)
    if tensor.dtype in _DTYPES:
        target.view(tensor.dtype).view(tensor.shape).copy_(tensor)
    else:  # stored as bytes, and so at any address: PyTorch crashes on wide elements that are not aligned
        target.copy_(_copyable(tensor).contiguous().reshape(-1).view(torch.uint8))


def _empty(shape: tuple[int, ...], dtype: torch.dtype, strides: Any) -> torch.Tensor:
    if strides is None:
        return torch.empty(shape, dtype=dtype)
    result = torch.empty_strided(shape, tuple(strides), dtype=dtype)
    if not _is_permuted(result):
        raise ValueError(f"strides {strides!r} do not lay a tensor of shape {shape} out without gap or overlap")
    return result
