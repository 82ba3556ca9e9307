"""The safetensors file format: eight bytes of header length, a JSON header, and the tensors' bytes without a gap.

Files are written as one image whose header is padded with spaces to a whole page, so that the tensors begin on a page
boundary. Headers that are read are distrusted: every size and range is checked before it is used.
Format: https://huggingface.co/docs/safetensors (the specification in its README).
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from supervise_core.hashing import HASHED_APART
from supervise_core.tensors import BITS, TensorSpec

SUFFIX: Final = ".safetensors"
PAGE: Final = 4096
_LENGTH: Final = struct.Struct("<Q")
HEADER_LENGTH: Final = _LENGTH.size
_LARGEST_HEADER: Final = 100_000_000  # the limit of the reference implementation


@dataclass(frozen=True, slots=True)
class Layout:
    """Where each tensor of one file lies: offsets from the beginning of the file, in file order."""

    header: bytes
    offsets: Mapping[str, int]
    size: int
    apart: Sequence[tuple[str, int, int]] = ()
    """The large tensors, which are hashed apart: name, offset and size."""


def lay_out(specs: Iterable[TensorSpec]) -> Layout:
    """The layout of a file with these tensors: widest elements first, so that each one is aligned to its own width."""
    ordered = sorted(specs, key=lambda spec: (-BITS[spec.dtype], spec.name))
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    large: list[tuple[str, int, int]] = []
    begin = 0
    for spec in ordered:
        nbytes = spec.nbytes
        end = begin + nbytes
        if nbytes >= HASHED_APART:
            large.append((spec.name, begin, nbytes))
        entries[spec.name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(entries, separators=(",", ":")).encode("ascii")
    padded = -(-(_LENGTH.size + len(text)) // PAGE) * PAGE
    if padded > _LARGEST_HEADER:
        raise ValueError(f"{len(ordered)} tensors need a header of {len(text)} bytes, more than safetensors allows")
    header = _LENGTH.pack(padded - _LENGTH.size) + text.ljust(padded - _LENGTH.size)
    offsets = {spec.name: padded + entries[spec.name]["data_offsets"][0] for spec in ordered}
    apart = tuple((name, padded + at, nbytes) for name, at, nbytes in large)
    return Layout(header, offsets, padded + begin, apart)


class TensorRange(NamedTuple):
    """One tensor of a file, and the bytes of the data that are its own."""

    begin: int
    end: int
    spec: TensorSpec


def header_length(beginning: bytes | bytearray, size: int) -> int:
    """How many bytes of a file of that size come before the tensors, by its first ``HEADER_LENGTH`` bytes.

    :raises ValueError: if that cannot be.
    """
    if size < HEADER_LENGTH or len(beginning) < HEADER_LENGTH:
        raise ValueError(f"the file has {size} bytes, too few for a safetensors header")
    (length,) = _LENGTH.unpack(beginning[:HEADER_LENGTH])
    if length > _LARGEST_HEADER or HEADER_LENGTH + length > size:
        raise ValueError(f"the header claims {length} bytes in a file of {size}")
    return HEADER_LENGTH + int(length)


def parse_header(header: bytes | bytearray, data_size: int) -> list[TensorRange]:
    """The tensors of a file in the order of their bytes, which lie one after another and fill ``data_size`` bytes.

    :raises ValueError: if anything is not as the format demands; the message says what.
    """
    entries = parse_json_object(header[HEADER_LENGTH:])
    entries.pop("__metadata__", None)
    ranges = sorted(_parse_entry(name, entry) for name, entry in entries.items())
    at = 0
    for begin, end, _ in ranges:
        if begin != at:
            raise ValueError(f"the tensors overlap or leave a gap at byte {min(begin, at)} of the data")
        at = end
    if at != data_size:
        raise ValueError(f"the tensors end at byte {at} of {data_size} bytes of data")
    return ranges


def parse(content: bytes | bytearray | memoryview) -> dict[str, tuple[TensorSpec, memoryview]]:
    """The tensors of a file's content: name → (spec, its bytes).

    :raises ValueError: if anything in the file is not as the format demands; the message says what.
    """
    view = memoryview(content).cast("B")
    length = header_length(bytes(view[:HEADER_LENGTH]), len(view))
    data = view[length:]
    ranges = parse_header(bytes(view[:length]), len(data))
    return {each.spec.name: (each.spec, data[each.begin : each.end]) for each in ranges}


def parse_json_object(text: bytes | bytearray) -> dict[str, Any]:
    """A JSON object from bytes that are not trusted.

    :raises ValueError: if it is not one, names a key twice, holds NaN, or is nested too deeply.
    """

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    def unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            raise ValueError("a key stands twice in one object")
        return result

    try:
        parsed = json.loads(text.decode("utf-8"), object_pairs_hook=unique, parse_constant=refuse)
    except RecursionError:
        raise ValueError("the JSON is nested too deeply") from None
    if not isinstance(parsed, dict):
        raise ValueError("the JSON is not an object")
    return parsed


def _parse_entry(name: str, entry: Any) -> TensorRange:
    if type(entry) is not dict:
        raise ValueError(f"the header's entry for {name!r} is not that of a tensor")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if type(dtype) is not str or type(shape) is not list or type(offsets) is not list or len(offsets) != 2:
        raise ValueError(f"the header's entry for {name!r} is not that of a tensor")
    begin, end = offsets
    if type(begin) is not int or type(end) is not int:
        raise ValueError(f"the header's entry for {name!r} is not that of a tensor")
    if dtype not in BITS:
        raise ValueError(f"tensor {name!r} has the dtype {dtype!r}, which this version does not read")
    for side in shape:  # of each of many tensors: a generator would take longer than all the rest
        if type(side) is not int or not 0 <= side < 1 << 63 or len(shape) > 64:
            raise ValueError(f"tensor {name!r} has an impossible shape")
    spec = TensorSpec(name, dtype, tuple(shape))
    if end - begin != spec.nbytes:
        raise ValueError(f"tensor {name!r} has {end - begin} bytes where its shape needs {spec.nbytes}")
    return TensorRange(begin, end, spec)
