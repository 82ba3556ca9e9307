"""Tensors as the core sees them: name, dtype, shape and bytes. What they are in a framework is a codec's affair."""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final, Generic, NamedTuple, TypeVar

from supervise_core.memory import Move
from supervise_core.tagged_json import UNTOLD, Json, Untold

BITS: Final[Mapping[str, int]] = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32,
    "I64": 64, "U64": 64, "F64": 64, "C64": 64,
}  # fmt: skip
"""Bits per element of the safetensors dtypes that we write: those that every reader of the format knows."""

NOTHING_MORE: Final[Mapping[str, Json]] = MappingProxyType({})
"""The ``extra`` of nearly all tensors."""

T = TypeVar("T")

Arrival = Callable[[Callable[[Sequence[Move]], object]], None]
"""Waits until copies from a device have arrived in memory of the codec's own, has them moved from there, and only then
uses that memory again. Called once, by any thread."""


class TensorSpec(NamedTuple):
    """How one tensor lies in a file: its name there, a safetensors dtype, and its shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return _nbytes(self.dtype, self.shape)


@functools.lru_cache(maxsize=4096)  # a model has many tensors of few shapes, and each is asked for often
def _nbytes(dtype: str, shape: tuple[int, ...]) -> int:
    return math.prod(shape) * BITS[dtype] // 8


class Stored(NamedTuple):
    """What a codec says of one tensor: how its bytes are stored, and, where that is not all, what it really is.

    ``extra`` (JSON) goes into ``state.json``: the dtype and shape of a tensor that safetensors has no dtype for, its
    memory layout, and the like.

    ``address`` is where in main memory the tensor's own bytes lie, row-major and without a gap, free to be read and
    written. None if they do not, or if nobody knows: then ``copy_out`` and ``copy_in`` are called.
    """

    dtype: str
    shape: tuple[int, ...]
    extra: Mapping[str, Json] = NOTHING_MORE
    address: int | None = None


class StoredTensor(NamedTuple):
    """One tensor of a checkpoint: how it lies in its file, and the codec's ``extra``."""

    spec: TensorSpec
    extra: Mapping[str, Json] = NOTHING_MORE


class TensorCodec(ABC, Generic[T]):
    """How one framework's tensors become bytes and come back equal in value, dtype and shape."""

    @abstractmethod
    def recognises(self, value: Any) -> bool:
        """Whether the value is a tensor of this framework. The answer is the same for all values of its type."""

    @abstractmethod
    def describe(self, value: T) -> Stored:
        """How the tensor is stored, and where it lies. Asked of each tensor in every snapshot, so it must be quick.

        :raises TypeError: if it cannot be (object, sparse, quantized …); the message says why.
        """

    @abstractmethod
    def copy_out(self, pairs: Sequence[tuple[T, memoryview]]) -> Arrival | None:
        """Copy tensors that have no address into memory of exactly their size, as row-major bytes.

        What is copied is the value of this moment, whatever the program does next. Copies that end later (on a GPU's
        copy stream) go into memory of the codec's own first, and it is told how to wait for them.
        """

    @abstractmethod
    def empty(self, stored: StoredTensor) -> T:
        """A new tensor of the kind that was stored, in main memory of its own; its values do not matter yet.

        It costs nothing as long as no value is put into it: that is how shapes and dtypes are compared beforehand.

        :raises ValueError: if ``stored.extra`` was not made by ``describe``.
        """

    @abstractmethod
    def copy_in(self, tensor: T, data: memoryview) -> None:
        """Give a tensor the values whose row-major bytes these are; the inverse of ``copy_out``."""

    def is_writable(self, value: T) -> bool:
        """Whether each element of a tensor that has no address can be given a value of its own. If not, a restore makes
        a new tensor."""
        return True

    def identity(self, value: T) -> Hashable | None:
        """Equal for tensors that are one and the same memory seen in the same way (tied weights); stored once."""
        return None

    def encode_constant(self, value: Any) -> Json | Untold:
        """JSON for a value of the framework that is no tensor (a dtype, a device), or ``UNTOLD``."""
        return UNTOLD

    def decode_constant(self, tag: str, content: Json) -> Any | Untold:
        """The inverse of ``encode_constant``."""
        return UNTOLD
