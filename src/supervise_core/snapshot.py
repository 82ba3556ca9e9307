"""The state of one step in memory, on its way to a checkpoint.

A backend puts each part of its state (``model``, ``optimizer`` …) into the ``Staging``, which makes these images of it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from supervise_core.safetensors_format import SUFFIX, Layout, lay_out
from supervise_core.tagged_json import Json
from supervise_core.tensors import TensorSpec

_PART_NAME: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,99}")
_SHARD_NAME: Final = re.compile(r"-\d{5}-of-\d{5}$")
_RESERVED_PARTS: Final = frozenset({"manifest", "state"})


def check_part_name(name: str) -> None:
    """:raises ValueError: if the name cannot be the name of a part, which is also the name of its file."""
    if not _PART_NAME.fullmatch(name) or name in _RESERVED_PARTS or _SHARD_NAME.search(name):
        raise ValueError(
            f"{name!r} cannot name a part: it becomes a file name; use letters, digits, '_' and '-', "
            f"none of {sorted(_RESERVED_PARTS)}, and nothing that ends like the name of a shard"
        )


def shard_name(part: str, number: int, count: int) -> str:
    """The name of one file of a part's tensors, as Hugging Face's tools name them."""
    return f"{part}{SUFFIX}" if count == 1 else f"{part}-{number:05d}-of-{count:05d}{SUFFIX}"


def index_name(part: str) -> str:
    """The name of the file that says which shard holds which tensor of a part."""
    return f"{part}{SUFFIX}.index.json"


def shards_of(specs: Sequence[TensorSpec], limit: int) -> list[list[TensorSpec]]:
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
class TensorImage:
    """One tensor of a snapshot. ``content`` gives its row-major bytes."""

    spec: TensorSpec
    content: Callable[[], memoryview]


@dataclass(frozen=True, slots=True)
class FileImage:
    """One safetensors file to be written: what it holds and how, and its bytes if they lie ready in one piece."""

    name: str
    layout: Layout
    tensors: Sequence[TensorImage]
    blocks: memoryview | None = None
    """The whole file, up to the end of its last block, for a direct write."""

    @classmethod
    def of(cls, name: str, tensors: Sequence[TensorImage]) -> FileImage:
        """A file with these tensors, which lie anywhere."""
        layout = lay_out([tensor.spec for tensor in tensors])
        return cls(name, layout, sorted(tensors, key=lambda tensor: layout.offsets[tensor.spec.name]))

    @property
    def size(self) -> int:
        return self.layout.size

    def chunks(self) -> Iterator[memoryview]:
        """The content piece by piece, in the order of the file."""
        yield memoryview(self.layout.header)
        for tensor in self.tensors:
            if tensor.spec.nbytes:
                yield tensor.content()


@dataclass(frozen=True, slots=True)
class PartImage:
    """One part of the state: its tagged JSON, and the files with its tensors (none, one, or several shards).

    ``digests`` are the hashes of large tensors by name, as far as they are known; whoever hashes one adds to them.
    ``changed_at`` says of each tensor in which snapshot of the same ``Staging`` its bytes were last others than in the
    one before. ``number`` is that of this snapshot. No file is to be larger than ``shard_bytes``. ``per_rank``: where
    several processes train together, each has its own; ``is_piece``: only all of them together are the state.
    """

    name: str
    state: Json
    files: tuple[FileImage, ...]
    changed_at: Mapping[str, int]
    number: int
    shard_bytes: int
    digests: dict[str, bytes] = field(default_factory=dict[str, bytes])
    per_rank: bool = False
    is_piece: bool = False


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The parts of one moment. Call ``finish`` before the memory is read: copies may still be under way."""

    parts: Mapping[str, PartImage]
    _pending: tuple[Callable[[], None], ...] = ()
    step: int | None = None
    """The global step that was read in the very same moment; None where it cannot have moved since it was asked for."""
    consistent: bool = True
    """Whether no step was made while it was taken, as far as can be told."""
    is_live: bool = False
    """Whether it only looks at the program's own tensors, which must not change until it is written."""

    @property
    def pieces(self) -> list[str]:
        """The parts of which this process has only a piece."""
        return [part.name for part in self.parts.values() if part.is_piece]

    def finish(self) -> None:
        """Wait until every copy has ended."""
        for wait in self._pending:
            wait()
