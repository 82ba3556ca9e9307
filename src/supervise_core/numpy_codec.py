"""NumPy arrays in checkpoints; the codec of every backend that does not bring its own. Imports NumPy when used."""

from __future__ import annotations

import functools
import sys
from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Any, Final

from supervise_core.tagged_json import Json
from supervise_core.tensors import Stored, StoredTensor, TensorCodec

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_DTYPES: Final = {
    "bool": "BOOL", "uint8": "U8", "int8": "I8", "uint16": "U16", "int16": "I16", "float16": "F16",
    "uint32": "U32", "int32": "I32", "float32": "F32", "uint64": "U64", "int64": "I64", "float64": "F64",
    "complex64": "C64", "bfloat16": "BF16", "float8_e5m2": "F8_E5M2", "float8_e4m3fn": "F8_E4M3",
}  # fmt: skip
_NAMES: Final = {code: name for name, code in _DTYPES.items()}
_EXTENDED: Final = "ml_dtypes."


class NumpyCodec(TensorCodec["NDArray[Any]"]):
    """Arrays of every dtype that is plain data: numbers, strings, dates, structures, ``ml_dtypes``; not objects."""

    def recognises(self, value: Any) -> bool:
        numpy = sys.modules.get("numpy")
        return numpy is not None and isinstance(value, numpy.ndarray)

    def describe(self, value: NDArray[Any]) -> Stored:
        import numpy

        if type(value) not in (numpy.ndarray, numpy.memmap):
            raise TypeError(f"it is a {type(value).__name__}, which would come back as a plain array")
        dtype = value.dtype
        code = _code_of(dtype)
        if code is not None:
            return Stored(code, value.shape, address=_address_of(value))
        if dtype.hasobject or dtype.kind in "OT":
            raise TypeError(f"arrays of dtype {dtype} hold references, not data")
        named: dict[str, Json] = {"dtype": _dtype_to_json(dtype), "shape": list(value.shape)}
        return Stored("U8", (value.nbytes,), named, _address_of(value))

    def copy_out(self, pairs: Sequence[tuple[NDArray[Any], memoryview]]) -> None:
        import numpy

        for array, memory in pairs:
            if array.nbytes:
                numpy.copyto(numpy.frombuffer(memory, array.dtype).reshape(array.shape), array)

    def empty(self, stored: StoredTensor) -> NDArray[Any]:
        import numpy

        dtype, shape = self.dtype_and_shape(stored)
        result = numpy.empty(shape, dtype)
        if result.nbytes != stored.spec.nbytes:
            raise ValueError(f"{stored.spec.nbytes} bytes are not an array of dtype {dtype} and shape {shape}")
        return result

    def copy_in(self, tensor: NDArray[Any], data: memoryview) -> None:
        import numpy

        numpy.copyto(tensor, numpy.frombuffer(data, tensor.dtype).reshape(tensor.shape))

    def is_writable(self, value: NDArray[Any]) -> bool:
        repeats = any(side > 1 and not stride for side, stride in zip(value.shape, value.strides, strict=True))
        return value.flags.writeable and not (repeats and value.size)

    def dtype_and_shape(self, stored: StoredTensor) -> tuple[np.dtype[Any], tuple[int, ...]]:
        """What the array was when it was saved."""
        if "dtype" in stored.extra:
            return _dtype_from_json(stored.extra["dtype"]), tuple(stored.extra["shape"])
        return _dtype_of(stored.spec.dtype), stored.spec.shape

    def identity(self, value: NDArray[Any]) -> Hashable | None:
        if not value.nbytes:
            return None
        address = value.__array_interface__["data"][0]
        return address, value.dtype.str, value.shape, value.strides


def _address_of(array: NDArray[Any]) -> int | None:
    flags = array.flags
    if not flags.c_contiguous or not flags.writeable:
        return None
    where: int = array.__array_interface__["data"][0]
    return where


@functools.lru_cache(maxsize=256)  # NumPy composes a dtype's name anew each time
def _code_of(dtype: np.dtype[Any]) -> str | None:
    """The code of safetensors for a dtype, if it has one."""
    if dtype.hasobject or dtype.names is not None or not dtype.isnative:
        return None
    return _DTYPES.get(dtype.name)


@functools.lru_cache(maxsize=256)
def _dtype_of(code: str) -> np.dtype[Any]:
    return _dtype_from_json(_plain_name(code))


def _plain_name(code: str) -> str:
    name = _NAMES[code]
    return name if name not in ("bfloat16", "float8_e5m2", "float8_e4m3fn") else _EXTENDED + name


def _dtype_to_json(dtype: np.dtype[Any]) -> Json:
    import numpy

    if dtype.names is None and dtype.isnative and dtype.type.__module__ == "ml_dtypes":
        return _EXTENDED + dtype.name
    if dtype.type.__module__ not in ("numpy", "numpy.dtypes"):
        raise TypeError(f"the dtype {dtype} is an extension that has no written form")
    described = numpy.lib.format.dtype_to_descr(dtype)
    if numpy.lib.format.descr_to_dtype(described) != dtype:
        raise TypeError(f"the dtype {dtype} has no written form that gives it back")
    return described if isinstance(described, str) else _listed(described)


def _dtype_from_json(described: Json) -> np.dtype[Any]:
    import numpy

    if isinstance(described, str) and described.startswith(_EXTENDED):
        try:
            import ml_dtypes
        except ImportError:
            raise ValueError(
                f"NumPy has no dtype {described.removeprefix(_EXTENDED)}; type: pip install ml_dtypes"
            ) from None
        kind = getattr(ml_dtypes, described.removeprefix(_EXTENDED), None)
        dtype: np.dtype[Any] = numpy.dtype("O" if kind is None else kind)
    else:
        dtype = numpy.lib.format.descr_to_dtype(_tupled(described))
    if dtype.hasobject:
        raise ValueError(f"{described!r} is not a dtype of plain data")
    return dtype


def _listed(described: Any) -> Json:
    if isinstance(described, (list, tuple)):
        return [_listed(item) for item in described]
    return described


def _tupled(described: Json) -> Any:
    """NumPy's description of a structured dtype again: a list of fields, each a tuple, shapes and titles tuples."""
    if not isinstance(described, list):
        return described
    return [
        tuple(
            _tupled(item) if position == 1 else tuple(item) if isinstance(item, list) else item
            for position, item in enumerate(field)
        )
        for field in described
    ]
