"""What a checkpoint is made of, and the two ports that its bytes go through: a draft and a reader. And the format."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Final, NamedTuple, Self

from supervise_core.durable_files import cut_off
from supervise_core.errors import CheckpointDamagedError
from supervise_core.hashing import hash_of
from supervise_core.manifest import LARGEST_MANIFEST, MANIFEST, FileRecord, Manifest
from supervise_core.parts import Part
from supervise_core.snapshot import PartImage, Snapshot
from supervise_core.tagged_json import Json

Chunk = bytes | bytearray | memoryview

_PIECE: Final = 16 << 20


@dataclass(frozen=True, slots=True, order=True)
class CheckpointId:
    """One checkpoint of a store. ``revision`` tells apart two of the same step: the higher one replaces the lower."""

    step: int
    revision: int = 0


class CheckpointReader(ABC):
    """A checkpoint held open: what was there when it was opened can be read to the end, whatever a writer removes."""

    name: str

    @abstractmethod
    def size(self, file: str) -> int | None:
        """The size of a file in bytes; None if the checkpoint has no such regular file."""

    @abstractmethod
    def read_into(self, file: str, at: int, buffers: Sequence[memoryview]) -> int:
        """Fill buffers with the content of a file that is there, from that byte on; how many bytes there were.

        Called by several threads at a time.

        :raises OSError: as the storage fails.
        """

    @abstractmethod
    def close(self) -> None:
        """Let go of it; safe to call twice."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def manifest_of(self, checkpoint: CheckpointId) -> Manifest:
        """As ``manifest``, of this very checkpoint.

        :raises CheckpointDamagedError: also if it holds another step than its name says.
        """
        manifest = self.manifest()
        if manifest.step != checkpoint.step:
            raise CheckpointDamagedError(self.name, f"it was renamed: it holds step {manifest.step}")
        return manifest

    def manifest(self) -> Manifest:
        """:raises CheckpointDamagedError: if there is no manifest, or not one of ours."""
        size = self.size(MANIFEST)
        if size is None:
            raise CheckpointDamagedError(self.name, f"{MANIFEST} is missing")
        if size > LARGEST_MANIFEST:
            raise CheckpointDamagedError(self.name, f"{MANIFEST} has {size} bytes, too many for a manifest")
        try:
            return Manifest.from_bytes(self.content(MANIFEST))
        except ValueError as error:
            raise CheckpointDamagedError(self.name, f"{MANIFEST}: {error}") from error

    def content(self, file: str, at: int = 0, nbytes: int | None = None) -> bytearray:
        """What a file holds, unverified; less if there is less.

        :raises OSError: as the storage fails.
        """
        content = bytearray((self.size(file) or 0) - at if nbytes is None else nbytes)
        with memoryview(content) as view:
            done = self.read_into(file, at, [view]) if content else 0
        del content[done:]
        return content

    def check_size(self, file: str, record: FileRecord) -> None:
        """:raises CheckpointDamagedError: if a file is missing, or has another size than is recorded."""
        size = self.size(file)
        if size is None:
            raise CheckpointDamagedError(self.name, f"{file} is missing")
        if size != record.size:
            raise CheckpointDamagedError(self.name, f"{file} has {size} bytes instead of {record.size}")

    def read(self, file: str, record: FileRecord) -> bytearray:
        """The content of a file, once its size and hash are found to be as recorded.

        :raises CheckpointDamagedError: if they are not.
        """
        self.check_size(file, record)
        content = self.content(file)
        if len(content) != record.size or hash_of([content]) != record.xxh3_128:
            raise CheckpointDamagedError(self.name, f"the content of {file} does not match its hash")
        return content

    def verify(self, file: str, record: FileRecord) -> None:
        """Read a file and keep nothing of it.

        :raises CheckpointDamagedError: if its size or its hash is not as recorded.
        """
        self.check_size(file, record)
        if hash_of(self._pieces(file, record.size)) != record.xxh3_128:
            raise CheckpointDamagedError(self.name, f"the content of {file} does not match its hash")

    def _pieces(self, file: str, size: int) -> Iterator[bytearray]:
        for begin in range(0, size, _PIECE):
            yield self.content(file, begin, min(_PIECE, size - begin))


class Link(NamedTuple):
    """One file that two checkpoints have in common: its name in the new one and in the old one, and its size."""

    file: str
    there: str
    size: int


class Draft(ABC):
    """A checkpoint that is being written. Nobody sees it until ``commit``."""

    @property
    def location(self) -> str:
        """Where other processes can add files to it, by ``CheckpointStore.write_into``; "" if they cannot."""
        return ""

    @abstractmethod
    def write(self, file: str, chunks: Iterable[Chunk]) -> None:
        """Write one file. It is durable once ``commit`` has returned.

        :raises OSError: as the storage fails; the draft is then only good for ``discard``.
        """

    def write_blocks(self, file: str, pieces: Iterable[memoryview], size: int) -> None:
        """As ``write``, ``size`` bytes from memory that may be written from as it is.

        The pieces begin and end at blocks; the last one may go beyond ``size``.

        :raises OSError: as the storage fails; the draft is then only good for ``discard``.
        """
        self.write(file, cut_off(pieces, size))

    def link(self, checkpoint: CheckpointId, files: Sequence[Link]) -> bool:
        """Have files of a committed checkpoint in this one, too, without writing them again: all of them, or none.

        False if one is not there any more, or not with that size, or if the storage cannot do that; it says so once.

        :raises OSError: as the storage fails.
        """
        return False

    @abstractmethod
    def commit(self, manifest: Manifest, replaces: CheckpointId | None = None) -> CheckpointId:
        """Make it a checkpoint: afterwards it is durable and listed, before it is not there at all.

        It takes the place and the name of ``replaces``, an older one of the same step, in the same instant. A storage
        that cannot do that lists both, this one later; the other is then left to be removed. The id it is listed by.

        :raises LeaseLostError: if this writer was replaced meanwhile; nothing has changed.
        """

    @abstractmethod
    def discard(self) -> None:
        """Remove what was written; safe to call after ``commit`` and twice."""


@dataclass(frozen=True, slots=True)
class CheckpointContent:
    """The content of one checkpoint. Its tensors are read, and verified, when a part is asked for them.

    ``run_state`` is what the core itself keeps: data positions, say. What each of several processes keeps of its own is
    that of the chief, until another one asks for its own.
    """

    manifest: Manifest
    parts: Mapping[str, Part]
    run_state: Any
    _verify: Callable[[bool], None] = lambda _: None
    _of_rank: Callable[[int], CheckpointContent] | None = None

    def of_rank(self, rank: int) -> CheckpointContent:
        """The same checkpoint as one of several processes finds it; see ``Part.is_own``.

        :raises CheckpointDamagedError: if a size, a hash or a format is wrong.
        """
        return self if rank == 0 or self._of_rank is None else self._of_rank(rank)

    def verify_the_rest(self) -> None:
        """Verify what nobody has read yet.

        :raises CheckpointDamagedError: if a size, a hash or a format is wrong.
        """
        self._verify(False)

    def verify(self) -> None:
        """Verify everything, whatever was read before.

        :raises CheckpointDamagedError: if a size, a hash or a format is wrong.
        """
        self._verify(True)


@dataclass(frozen=True, slots=True)
class Shard:
    """A file with tensors of one part, as it was written once: also those that newer files have taken the place of."""

    file: str
    record: FileRecord
    tensors: Mapping[str, int]
    """The tensors in it that count, with their sizes in bytes."""
    dead: int = 0
    """How many bytes are of tensors that do not count any more."""


@dataclass(frozen=True, slots=True)
class PlacedPart:
    """Where a checkpoint has the tensors of a part, from the oldest file to the newest; and of which snapshot."""

    shards: Sequence[Shard]
    number: int


@dataclass(frozen=True, slots=True)
class Written:
    """What a format has written: sizes and hashes of the files, and what the manifest itself is to keep."""

    files: Mapping[str, FileRecord]
    run: Mapping[str, Any] = field(default_factory=dict[str, Any])
    placed: Mapping[str, PlacedPart] = field(default_factory=dict[str, PlacedPart])
    helped: float = 0.0
    """Processor time of other threads than the caller's, in seconds."""


@dataclass(frozen=True, slots=True)
class Base:
    """The checkpoint of this run that was committed last: what did not change since need not be written again."""

    checkpoint: CheckpointId
    placed: Mapping[str, PlacedPart]


class SnapshotWriter(ABC):
    """Writes the files of one snapshot, all but the manifest, into a draft. ``close`` it, come what may."""

    def write_early(self, part: PartImage, taken: threading.Event) -> None:
        """Write of one part what can be written while the training thread still copies the others.

        The loop waits for that copying, so nothing is done that takes a processor until ``taken`` is set. Writing
        nothing is fine.

        :raises OSError: as the storage fails.
        """

    @abstractmethod
    def write(self, snapshot: Snapshot, run_state: Json) -> Written:
        """Write all that is not written yet. The parts that were written early are those of this snapshot.

        ``run_state`` is what the core itself keeps (data positions and the like), as tagged JSON.

        :raises OSError: as the storage fails.
        """

    def close(self) -> None:
        """Let go of threads and memory; safe to call at any time, also after a failure."""


class CheckpointFormat(ABC):
    """How a snapshot becomes the files of a checkpoint, and is read back."""

    @abstractmethod
    def check(self, snapshot: Snapshot, run_state: Json) -> None:
        """:raises UnsupportedStateError, ValueError: if this cannot be written in this format."""

    @abstractmethod
    def writer(self, draft: Draft, base: Base | None = None) -> SnapshotWriter:
        """What writes one snapshot into a draft. What did not change since ``base`` it may share with that."""

    @abstractmethod
    def read(self, reader: CheckpointReader) -> CheckpointContent:
        """Read a checkpoint as far as it is needed to know what is in it; the reader stays open for the rest.

        :raises CheckpointDamagedError: if a size, a hash or a format is wrong.
        :raises OSError: as the storage fails.
        """
