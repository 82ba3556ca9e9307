"""The state of one step in memory, on its way to a checkpoint, and on its way back.

A backend puts each part of its state (``model``, ``optimizer`` …) into the ``Staging``: a tree of dictionaries, lists
and plain values whose leaves are tensors. The tensors are copied, at that moment, into staging memory that is already
laid out as the safetensors files to be; everything else becomes tagged JSON. So a snapshot is one memory copy, holds
one step, and what the program does afterwards cannot reach it.
"""

from __future__ import annotations

import mmap
import re
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from supervise_core.disk import BLOCK
from supervise_core.errors import IncompatibleCheckpointError, UnsupportedStateError
from supervise_core.numpy_codec import NumpyCodec
from supervise_core.safetensors_format import Layout, lay_out
from supervise_core.tagged_json import UNTOLD, Json, Untold, decode, encode
from supervise_core.tensors import TensorCodec, TensorData, TensorSpec

_PART_NAME: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,99}")
_TENSOR: Final = "$tensor"
_ARRAY: Final = "$array"
_RESERVED_PARTS: Final = frozenset({"manifest", "state"})


def check_part_name(name: str) -> None:
    """:raises ValueError: if the name cannot be the name of a part, which is also the name of its file."""
    if not _PART_NAME.fullmatch(name) or name in _RESERVED_PARTS:
        raise ValueError(
            f"{name!r} cannot name a part: it becomes a file name; use letters, digits, '_' and '-', "
            f"and none of {sorted(_RESERVED_PARTS)}"
        )


@dataclass(frozen=True, slots=True)
class FileImage:
    """One safetensors file, ready in memory."""

    name: str
    content: memoryview
    tensors: tuple[str, ...]
    blocks: memoryview
    """The same memory up to the end of its last block, for a direct write."""


@dataclass(frozen=True, slots=True)
class PartImage:
    """One part of the state: its tagged JSON, and the files with its tensors (none, one, or several shards)."""

    name: str
    state: Json
    files: tuple[FileImage, ...]
    tensor_bytes: int


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The parts of one moment. Call ``finish`` before the memory is read: copies may still be under way."""

    parts: Mapping[str, PartImage]
    _pending: tuple[Callable[[], None], ...] = ()
    step: int | None = None
    """The global step that was read in the very same moment; None where it cannot have moved since it was asked for."""
    consistent: bool = True
    """Whether no step was made while it was taken, as far as can be told."""

    def finish(self) -> None:
        """Wait until every copy has ended."""
        for wait in self._pending:
            wait()


class Staging:
    """The memory that snapshots are copied into: kept between snapshots, and shared with forked children.

    A shared mapping, so that data workers that fork do not turn the next snapshot into page faults. ``shard_bytes`` is
    the size from which a part is split into several files, as Hugging Face's tools do.
    """

    def __init__(self, shard_bytes: int = 5 * 10**9) -> None:
        if shard_bytes < 1:
            raise ValueError(f"shard_bytes is a positive number of bytes, not {shard_bytes!r}")
        self._shard_bytes = shard_bytes
        self._memory: dict[str, mmap.mmap] = {}
        self._parts: dict[str, PartImage] = {}
        self._pending: list[Callable[[], None]] = []

    def put(self, part: str, state: Any, codec: TensorCodec[Any] | None = None) -> None:
        """Copy one part: a tree whose leaves are tensors that ``codec`` knows, NumPy arrays, or plain values.

        :raises UnsupportedStateError: for a value that would not come back; names its path. Nothing is kept of it.
        :raises ValueError: if the part cannot bear this name, or was put already.
        """
        check_part_name(part)
        if part in self._parts:
            raise ValueError(f"the part {part!r} was put twice into one snapshot")
        flat = _Flattened(part, _codecs(codec))
        skeleton = encode(state, part, flat.leaf)
        files: list[FileImage] = []
        pairs: dict[str, list[tuple[Any, memoryview]]] = {tag: [] for tag in flat.codecs}
        shards = _shards(flat.specs, self._shard_bytes)
        for number, shard in enumerate(shards, 1):
            suffix = "" if len(shards) == 1 else f"-{number:05d}-of-{len(shards):05d}"
            name = f"{part}{suffix}.safetensors"
            layout = lay_out(shard)
            blocks = self._image(name, layout)
            image = blocks[: layout.size]
            for spec in shard:
                at = layout.offsets[spec.name]
                tag, tensor = flat.tensors[spec.name]
                pairs[tag].append((tensor, image[at : at + spec.nbytes]))
            files.append(FileImage(name, image, tuple(spec.name for spec in shard), blocks))
        for tag, tensors in pairs.items():
            waiting = flat.codecs[tag].copy_out(tensors)
            if waiting is not None:
                self._pending.append(waiting)
        self._parts[part] = PartImage(part, skeleton, tuple(files), sum(spec.nbytes for spec in flat.specs))

    def snapshot(self, step: int | None = None, consistent: bool = True) -> Snapshot:
        """All that was put since the last call, as one snapshot; it is valid until the next ``put``."""
        parts, self._parts = self._parts, {}
        pending, self._pending = self._pending, []
        return Snapshot(parts, tuple(pending), step, consistent)

    def discard(self) -> None:
        """Forget what was put since the last snapshot, after a failure half way."""
        self._parts, self._pending = {}, []

    def _image(self, name: str, layout: Layout) -> memoryview:
        memory = self._memory.get(name)
        capacity = -(-layout.size // BLOCK) * BLOCK
        if memory is None or len(memory) < capacity:
            memory = self._memory[name] = mmap.mmap(-1, capacity)
        view = memoryview(memory)[:capacity]
        view[: len(layout.header)] = layout.header
        return view


@dataclass(slots=True)
class _Flattened:
    """The tensors of one tree, named by their paths: ``blocks.0.weight``, ``state.3.exp_avg``."""

    part: str
    codecs: Mapping[str, TensorCodec[Any]]
    specs: list[TensorSpec] = field(default_factory=list[TensorSpec])
    tensors: dict[str, tuple[str, Any]] = field(default_factory=dict[str, tuple[str, Any]])
    _leaves: dict[Hashable, Json] = field(default_factory=dict[Hashable, Json])

    def leaf(self, path: str, value: Any) -> Json | Untold:
        tag = next((tag for tag, codec in self.codecs.items() if codec.recognises(value)), None)
        if tag is None:
            return self._constant(path, value)
        codec = self.codecs[tag]
        identity = codec.identity(value)
        if identity is not None and (tag, identity) in self._leaves:
            return self._leaves[tag, identity]
        try:
            stored = codec.describe(value)
        except TypeError as error:
            raise UnsupportedStateError(path, str(error)) from error
        spec = TensorSpec(self._unique_name(path), stored.dtype, stored.shape)
        self.specs.append(spec)
        self.tensors[spec.name] = tag, value
        leaf = {tag: spec.name, **stored.extra}
        if identity is not None:
            self._leaves[tag, identity] = leaf
        return leaf

    def _constant(self, path: str, value: Any) -> Json | Untold:
        try:
            return self.codecs[_TENSOR].encode_constant(value)
        except TypeError as error:
            raise UnsupportedStateError(path, str(error)) from error

    def _unique_name(self, path: str) -> str:
        """``model['conv.weight']`` is stored as ``conv.weight``, ``optimizer['state'][0]['exp_avg']`` as it reads."""
        keys = re.findall(r"\[(?:'((?:[^'\\]|\\.)*)'|\"((?:[^\"\\]|\\.)*)\"|([^\]]*))\]", path[len(self.part) :])
        plain = ".".join(next((group for group in key if group), "") for key in keys) or self.part
        name, number = plain, 2
        while name in self.tensors or name == "__metadata__":
            name, number = f"{plain}#{number}", number + 1
        return name


def _shards(specs: list[TensorSpec], limit: int) -> list[list[TensorSpec]]:
    """The tensors in their order, in groups of at most ``limit`` bytes (a larger tensor is a group of its own)."""
    shards: list[list[TensorSpec]] = []
    size = 0
    for spec in specs:
        if not shards or (size and size + spec.nbytes > limit):
            shards.append([])
            size = 0
        shards[-1].append(spec)
        size += spec.nbytes
    return shards


@dataclass(frozen=True, slots=True)
class Part:
    """One part read from a checkpoint."""

    name: str
    state: Json
    tensors: Mapping[str, tuple[TensorSpec, memoryview]]

    def tree(self, codec: TensorCodec[Any] | None = None) -> Any:
        """The state as it was put, its tensors made new by ``codec`` (NumPy arrays without one). Ties are kept.

        :raises IncompatibleCheckpointError: if it holds what this version, or this framework, does not know.
        """
        readers = _codecs(codec)
        made: dict[str, Any] = {}

        def leaf(tag: str, content: Json) -> Any | Untold:
            if tag not in (_TENSOR, _ARRAY):
                return readers[_TENSOR].decode_constant(tag, content)
            stored = self._stored(tag, content)
            if stored.spec.name not in made:
                made[stored.spec.name] = readers.get(tag, readers[_TENSOR]).read(stored)
            return made[stored.spec.name]

        try:
            return decode(self.state, leaf)
        except (ValueError, TypeError) as error:
            raise IncompatibleCheckpointError(self.name, [str(error)]) from error

    def stored_tensors(self) -> Iterator[TensorData]:
        """The tensors with what their codec noted of them, without making any."""
        found: list[TensorData] = []

        def leaf(tag: str, content: Json) -> Any | Untold:
            if tag in (_TENSOR, _ARRAY):
                found.append(self._stored(tag, content))
            return None

        decode(self.state, leaf)
        return iter(found)

    def _stored(self, tag: str, leaf: dict[str, Json]) -> TensorData:
        extra = dict(leaf)
        name = extra.pop(tag)
        if not isinstance(name, str) or name not in self.tensors:
            raise ValueError(f"the state of part {self.name!r} names the tensor {name!r}, which is not there")
        spec, data = self.tensors[name]
        return TensorData(spec, data, extra)


def _codecs(codec: TensorCodec[Any] | None) -> dict[str, TensorCodec[Any]]:
    """By tag: the framework's own tensors, and NumPy arrays beside them, which every framework's programs keep."""
    if codec is None or isinstance(codec, NumpyCodec):
        return {_TENSOR: codec or NumpyCodec()}
    return {_TENSOR: codec, _ARRAY: NumpyCodec()}


Parts = Mapping[str, Part]
"""The parts of a checkpoint by name."""

__all__ = ["UNTOLD", "FileImage", "Part", "PartImage", "Parts", "Snapshot", "Staging", "check_part_name"]
