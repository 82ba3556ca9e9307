"""Checkpoints in memory: the port is no directory in disguise, and a test needs no disk."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from supervise_core.checkpoint_format import CheckpointId, CheckpointReader, Chunk, Draft, Link
from supervise_core.checkpoint_store import CheckpointStore
from supervise_core.errors import LeaseHeldError, LeaseLostError
from supervise_core.manifest import MANIFEST, Manifest, check_file_name

Files = dict[str, bytes]


@dataclass
class MemoryPlace:
    """What several stores share, as several processes share a directory."""

    committed: dict[CheckpointId, Files] = field(default_factory=dict)
    damaged: dict[str, tuple[str, Files]] = field(default_factory=dict)
    retired: dict[str, Files] = field(default_factory=dict)
    writer: MemoryStore | None = None


class MemoryStore(CheckpointStore):
    """Checkpoints in memory. Stores of one ``place`` see the same ones, and one of them writes."""

    _numbers = itertools.count(1)

    def __init__(self, place: MemoryPlace | None = None) -> None:
        self.place = place or MemoryPlace()
        self.location = "memory"
        self._number = next(self._numbers)

    def die(self) -> None:
        """As if the process of this store had died: the next one may write."""
        if self.place.writer is self:
            self.place.writer = None

    def acquire(self) -> None:
        if self.place.writer is not None:
            raise LeaseHeldError(f"{self.location} is already being written by store {self.place.writer._number}")
        self.place.writer = self

    def release(self) -> None:
        self.die()

    @property
    def is_writer(self) -> bool:
        return self.place.writer is self

    def check_lease(self) -> None:
        if self.place.writer is not self:
            raise LeaseLostError(f"{self.location} is not being written by this store any more, or not yet")

    def beat(self) -> None:
        self.check_lease()

    def checkpoints(self) -> list[CheckpointId]:
        return sorted(self.place.committed)

    def name_of(self, checkpoint: CheckpointId) -> str:
        return f"step {checkpoint.step}" + (f" again {checkpoint.revision}" if checkpoint.revision else "")

    def open(self, checkpoint: CheckpointId) -> CheckpointReader:
        return _MemoryReader(self.name_of(checkpoint), self._files(checkpoint))

    def begin(self, checkpoint: CheckpointId) -> Draft:
        self.check_lease()
        return _MemoryDraft(self, checkpoint)

    def remove(self, checkpoint: CheckpointId) -> None:
        self._take(checkpoint)

    def set_aside(self, checkpoint: CheckpointId, reason: str) -> None:
        name = _free(self.name_of(checkpoint), self.place.damaged)
        self.place.damaged[name] = (reason, self._take(checkpoint))

    def damaged(self) -> Mapping[str, str]:
        return {name: reason for name, (reason, _) in self.place.damaged.items()}

    def retire(self, checkpoint: CheckpointId) -> None:
        self.place.retired[_free(self.name_of(checkpoint), self.place.retired)] = self._take(checkpoint)

    def retire_damaged(self) -> None:
        self.check_lease()
        while self.place.damaged:
            name, (_, files) = self.place.damaged.popitem()
            self.place.retired[_free(name, self.place.retired)] = files

    def _files(self, checkpoint: CheckpointId) -> Files:
        if checkpoint not in self.place.committed:
            raise FileNotFoundError(f"{self.location} has no checkpoint {self.name_of(checkpoint)}")
        return self.place.committed[checkpoint]

    def _take(self, checkpoint: CheckpointId) -> Files:
        self.check_lease()
        files = self._files(checkpoint)
        del self.place.committed[checkpoint]
        return files


class _MemoryDraft(Draft):
    def __init__(self, store: MemoryStore, checkpoint: CheckpointId) -> None:
        self._store = store
        self._checkpoint = checkpoint
        self._files: Files = {}

    def write(self, file: str, chunks: Iterable[Chunk]) -> None:
        self._store.check_lease()
        if check_file_name(file) in self._files:
            raise FileExistsError(f"{file} was written already")
        self._files[file] = b"".join(bytes(chunk) for chunk in chunks)

    def link(self, checkpoint: CheckpointId, files: Sequence[Link]) -> bool:
        self._store.check_lease()
        there = self._store.place.committed.get(checkpoint, {})
        if any(len(there.get(link.there, b"")) != link.size for link in files):
            return False
        self._files |= {check_file_name(link.file): there[link.there] for link in files}
        return True

    def commit(self, manifest: Manifest, replaces: CheckpointId | None = None) -> CheckpointId:
        self._store.check_lease()
        committed = self._store.place.committed
        if replaces is not None:
            committed[replaces] = self._files | {MANIFEST: manifest.to_bytes()}
            return replaces
        if self._checkpoint in committed:
            raise FileExistsError(f"there is a checkpoint {self._store.name_of(self._checkpoint)} already")
        committed[self._checkpoint] = self._files | {MANIFEST: manifest.to_bytes()}
        return self._checkpoint

    def discard(self) -> None:
        self._files = {}


class _MemoryReader(CheckpointReader):
    def __init__(self, name: str, files: Files) -> None:
        self.name = name
        self._files = files

    def size(self, file: str) -> int | None:
        return len(self._files[file]) if file in self._files else None

    def read_into(self, file: str, at: int, buffers: Sequence[memoryview]) -> int:
        content, done = self._files[file], 0
        for buffer in buffers:
            piece = content[at + done : at + done + len(buffer)]
            buffer[: len(piece)] = piece
            done += len(piece)
        return done

    def close(self) -> None:
        return None


def _free(name: str, taken: Iterable[str]) -> str:
    return next(
        one for number in itertools.count(1) if (one := name if number == 1 else f"{name}~{number}") not in taken
    )
