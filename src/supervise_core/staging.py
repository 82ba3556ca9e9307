"""The memory that snapshots are copied into.

A part of the state is a tree of dictionaries, lists and plain values whose leaves are tensors. The tensors are copied,
at that moment, into memory that is already laid out as the safetensors files to be; everything else becomes tagged
JSON. So a snapshot is one memory copy, holds one step, and what the program does afterwards cannot reach it.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple, Self

from supervise_core.boxes import is_boxed
from supervise_core.disk import BLOCK
from supervise_core.errors import UnsupportedStateError
from supervise_core.flattening import Flattening, FlatTensor, codecs_of
from supervise_core.memory import Move, address_of, bring_up_to_date, no_collection, own_memory, view_at
from supervise_core.safetensors_format import Layout, lay_out
from supervise_core.snapshot import FileImage, PartImage, Snapshot, TensorImage, check_part_name, shard_name, shards_of
from supervise_core.tensors import Arrival, TensorCodec, TensorSpec

SHARD_BYTES: Final = 5 * 10**9

Arrived = Callable[[PartImage], None]
"""Told of each part that is in memory for good, while others may still have to be copied."""


class _Taken(NamedTuple):
    """What of a ``PartImage`` comes from its tensors."""

    files: tuple[FileImage, ...]
    changed_at: Mapping[str, int]
    digests: dict[str, bytes]


class Staging:
    """Memory for one snapshot at a time, kept between snapshots, and empty in forked children.

    What did not change since the snapshot before is compared and not copied, so that the writer knows what it need not
    write again. ``shard_bytes`` is the size from which a part is split into several files, as Hugging Face's tools do.
    """

    def __init__(self, shard_bytes: int = SHARD_BYTES) -> None:
        if shard_bytes < 1:
            raise ValueError(f"shard_bytes is a positive number of bytes, not {shard_bytes!r}")
        self._shard_bytes = shard_bytes
        self._kept: dict[str, _Kept] = {}
        self._parts: dict[str, PartImage] = {}
        self._pending: list[Callable[[], None]] = []
        self._arrived: Arrived | None = None
        self._number = 0
        self.keeps_shared_parts = True
        """Whether parts are taken that are the same on all ranks: one of them is enough."""
        self._begin_in_this_process()

    def put(self, part: str, state: Any, codec: TensorCodec[Any] | None = None, *, per_rank: bool = False) -> None:
        """Copy one part: a tree whose leaves are tensors that ``codec`` knows, NumPy arrays, or plain values.

        ``per_rank``: where several processes train together, each has its own; other parts are the same on all. So
        must a part be put that holds pieces of tensors (see ``boxes``), whether this process has one or not.

        :raises UnsupportedStateError: for a value that would not come back; names its path. Nothing is kept of it.
        :raises ValueError: if the part cannot bear this name, or was put already.
        """
        if self._process != os.getpid():
            self._begin_in_this_process()
        check_part_name(part)
        if part in self._parts:
            raise ValueError(f"the part {part!r} was put twice into one snapshot")
        if not per_rank and not self.keeps_shared_parts:
            return
        with no_collection():
            flat = Flattening(part, codecs_of(codec))
            skeleton = flat.encode(state)
            boxes = [name for name, tensor in flat.tensors.items() if tensor.extra and is_boxed(tensor.stored)]
            if boxes and not per_rank:
                raise UnsupportedStateError(
                    f"{part}: {boxes[0]}", "it is a piece of a larger tensor; put the part with per_rank=True"
                )
            number = self._next_number()
            taken = self._take(flat, number)
        image = self._parts[part] = PartImage(
            part, skeleton, taken.files, taken.changed_at, number, self._shard_bytes, taken.digests, per_rank,
            is_piece=bool(boxes),
        )  # fmt: skip
        if self._arrived is not None and not self._pending and not self._is_live:
            self._arrived(image)

    def snapshot(self, step: int | None = None, consistent: bool = True) -> Snapshot:
        """All that was put since the last call, as one snapshot; it is valid until the next ``put``."""
        parts, self._parts = self._parts, {}
        pending, self._pending = self._pending, []
        return Snapshot(parts, tuple(pending), step, consistent, self._is_live)

    @contextmanager
    def taking(self, arrived: Arrived | None = None) -> Generator[Self, None, None]:
        """A block in which one snapshot is taken. If it fails half way, what was put is forgotten.

        ``arrived`` is told of the parts, but for those of which a device still sends something.
        """
        self._arrived = arrived
        try:
            yield self
        finally:
            self._arrived = None
            self.discard()

    def discard(self) -> None:
        """Forget what was put since the last snapshot, after a failure half way."""
        self._parts, self._pending = {}, []

    _is_live = False

    def reserve(self, outline: Outline) -> None:
        """Have memory for state of this form, before it is needed. From any thread."""
        for part, specs in outline.forms.items():
            self._kept_for(part, specs)

    def lacks(self, outline: Outline) -> int:
        """How many bytes of memory are not there yet for state of this form."""
        return sum(
            sum(spec.nbytes for spec in specs)
            for part, specs in outline.forms.items()
            if part not in self._kept or self._kept[part].specs != specs
        )

    def _begin_in_this_process(self) -> None:
        """A forked child finds the memory empty, and the lock perhaps held by a thread that it does not have."""
        self._process = os.getpid()
        self._lock = threading.Lock()
        self._kept.clear()

    def _next_number(self) -> int:
        with self._lock:
            self._number += 1
            return self._number

    def _kept_for(self, part: str, specs: list[TensorSpec], number: int | None = None) -> _Kept:
        """The memory of a part, made for that snapshot; or, with no number, after all that were taken till now."""
        with self._lock:
            kept = self._kept.get(part)
            if kept is None or kept.specs != specs or kept.is_doubtful:
                if number is None:
                    number = self._number = self._number + 1
                self._kept.pop(part, None)  # the old memory goes before the new one comes
                kept = self._kept[part] = _Kept.of(part, specs, self._shard_bytes, number)
            return kept

    def _take(self, flat: Flattening, number: int) -> _Taken:
        """Copy the tensors of one part."""
        specs = [tensor.spec for tensor in flat.tensors.values()]
        kept = self._kept_for(flat.part, specs, number)
        moves: list[Move] = []
        handed: dict[str, list[tuple[Any, memoryview]]] = {}
        before: dict[str, _Before] = {}
        for (name, tensor), (place, nbytes) in zip(flat.tensors.items(), kept.places.values(), strict=True):
            if not nbytes:
                continue
            if tensor.address is not None:
                moves.append(Move(place, tensor.address, nbytes))
            else:
                handed.setdefault(tensor.tag, []).append((tensor.value, view_at(place, nbytes)))
                before[name] = kept.changed_at[name], kept.digests.pop(name, None)
                kept.changed_at[name] = number
        changed_at = kept.update(moves, number)
        for tag, tensors in handed.items():
            arrival = flat.codecs[tag].copy_out(tensors)
            if arrival is not None:
                self._pending.append(_finishing(arrival, kept, before, number, changed_at))
        return _Taken(kept.files, changed_at, kept.digests)


class Outline(Staging):
    """Notes of what form the parts are, and copies nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.forms: dict[str, list[TensorSpec]] = {}

    def _take(self, flat: Flattening, number: int) -> _Taken:
        self.forms[flat.part] = [tensor.spec for tensor in flat.tensors.values()]
        return _Taken((), {}, {})


class NoStaging(Staging):
    """No memory at all: tensors are written from where they are, while the training thread waits."""

    _is_live = True

    def lacks(self, outline: Outline) -> int:
        return 0

    def reserve(self, outline: Outline) -> None:
        """There is nothing to be had."""

    def _take(self, flat: Flattening, number: int) -> _Taken:
        images = [
            TensorImage(tensor.spec, _reader_of(flat.codecs[tensor.tag], tensor)) for tensor in flat.tensors.values()
        ]
        sharded = shards_of([image.spec for image in images], self._shard_bytes)
        by_name = {image.spec.name: image for image in images}
        files = tuple(
            FileImage.of(name, [by_name[spec.name] for spec in shard])
            for name, shard in zip(_file_names(flat.part, len(sharded)), sharded, strict=True)
        )
        return _Taken(files, dict.fromkeys(by_name, number), {})


_Before = tuple[int, bytes | None]
"""When a tensor last changed, and its hash if that is known."""


@dataclass(slots=True)
class _Kept:
    """The memory of one part, laid out as its files."""

    specs: list[TensorSpec]
    files: tuple[FileImage, ...]
    places: dict[str, tuple[int, int]]
    """Where each tensor lies, and its size in bytes; in the order of ``specs``."""
    names: dict[int, str]
    """By their places, of the tensors that have any bytes."""
    changed_at: dict[str, int]
    digests: dict[str, bytes] = field(default_factory=dict[str, bytes])
    """The hashes of large tensors as they lie there, which the writer has computed."""
    is_doubtful: bool = False
    """Whether an update was broken off: what was copied and not noted would count as unchanged from then on."""

    def update(self, moves: Sequence[Move], number: int) -> dict[str, int]:
        """Bring the memory up to date; when each tensor last changed."""
        self.is_doubtful = True
        known = {self.places[name][0]: digest for name, digest in self.digests.items()}
        for move, differs in zip(moves, bring_up_to_date(moves, known), strict=True):
            if differs:
                name = self.names[move.target]
                self.changed_at[name] = number
                self.digests.pop(name, None)
        self.is_doubtful = False
        return dict(self.changed_at)

    @classmethod
    def of(cls, part: str, specs: list[TensorSpec], shard_bytes: int, number: int) -> _Kept:
        shards = shards_of(specs, shard_bytes)
        files: list[FileImage] = []
        places: dict[str, tuple[int, int]] = {}
        for name, shard in zip(_file_names(part, len(shards)), shards, strict=True):
            layout = lay_out(shard)
            blocks = _allocate(layout)
            begin = address_of(blocks)
            places |= {spec.name: (begin + layout.offsets[spec.name], spec.nbytes) for spec in shard}
            ordered = sorted(shard, key=lambda spec: layout.offsets[spec.name])
            tensors = [TensorImage(spec, _slice(blocks, layout.offsets[spec.name], spec.nbytes)) for spec in ordered]
            files.append(FileImage(name, layout, tensors, blocks))
        names = {place: name for name, (place, nbytes) in places.items() if nbytes}
        return cls(specs, tuple(files), places, names, {spec.name: number for spec in specs})


def _finishing(
    arrival: Arrival,
    kept: _Kept,
    before: Mapping[str, _Before],
    number: int,
    changed_at: dict[str, int],
) -> Callable[[], None]:
    """Wait for copies from a device, and compare only then: till now they counted as changed."""
    left = [arrival]

    def update(moves: Sequence[Move]) -> None:
        for name in (kept.names[move.target] for move in moves):
            kept.changed_at[name], digest = before[name]
            if digest is not None:
                kept.digests[name] = digest
        changed_at.update(kept.update(moves, number))

    def finish() -> None:
        while left:
            left.pop()(update)

    return finish


def _allocate(layout: Layout) -> memoryview:
    """Whole blocks of memory, with the header in place."""
    view = own_memory(-(-layout.size // BLOCK) * BLOCK)
    view[: len(layout.header)] = layout.header
    return view


def _slice(blocks: memoryview, begin: int, nbytes: int) -> Callable[[], memoryview]:
    return lambda: blocks[begin : begin + nbytes]


def _reader_of(codec: TensorCodec[Any], tensor: FlatTensor) -> Callable[[], memoryview]:
    nbytes = tensor.spec.nbytes

    def read() -> memoryview:
        address = codec.describe(tensor.value).address
        if address is not None:
            return view_at(address, nbytes)
        copied = memoryview(bytearray(nbytes))
        arrival = codec.copy_out([(tensor.value, copied)])
        if arrival is not None:
            arrival(bring_up_to_date)
        return copied

    return read


def _file_names(part: str, count: int) -> list[str]:
    return [shard_name(part, number, count) for number in range(1, count + 1)]
