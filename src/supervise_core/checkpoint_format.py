"""What a checkpoint is made of, and the two ports that its bytes go through: a draft and a reader. And the format."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

from supervise_core.errors import CheckpointDamagedError
from supervise_core.manifest import LARGEST_MANIFEST, MANIFEST, FileRecord, Manifest, hash_of
from supervise_core.snapshot import FileImage, Part, Snapshot
from supervise_core.tagged_json import Json

Chunk = bytes | bytearray | memoryview


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
    def read_unverified(self, file: str) -> bytearray:
        """The content of a file that is there.

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
            return Manifest.from_bytes(self.read_unverified(MANIFEST))
        except ValueError as error:
            raise CheckpointDamagedError(self.name, f"{MANIFEST}: {error}") from error

    def read(self, file: str, record: FileRecord) -> bytearray:
        """The content of a file, once its size and hash are found to be as recorded.

        :raises CheckpointDamagedError: if they are not.
        """
        size = self.size(file)
        if size is None:
            raise CheckpointDamagedError(self.name, f"{file} is missing")
        if size != record.size:
            raise CheckpointDamagedError(self.name, f"{file} has {size} bytes instead of {record.size}")
        content = self.read_unverified(file)
        if len(content) != record.size or hash_of([content]) != record.xxh3_128:
            raise CheckpointDamagedError(self.name, f"the content of {file} does not match its hash")
        return content


class Draft(ABC):
    """A checkpoint that is being written. Nobody sees it until ``commit``."""

    @abstractmethod
    def write(self, file: str, chunks: Iterable[Chunk]) -> None:
        """Write one file and make it durable.

        :raises OSError: as the storage fails; the draft is then only good for ``discard``.
        """

    def write_image(self, image: FileImage) -> None:
        """Write one file that is ready in memory and make it durable.

        :raises OSError: as the storage fails; the draft is then only good for ``discard``.
        """
        self.write(image.name, [image.content])

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
    """The verified content of one checkpoint. ``run_state`` is what the core itself keeps: data positions, say."""

    manifest: Manifest
    parts: Mapping[str, Part]
    run_state: Any


@dataclass(frozen=True, slots=True)
class Written:
    """What a format has written: sizes and hashes of the files, and what the manifest itself is to keep."""

    files: Mapping[str, FileRecord]
    run: Mapping[str, Any] = field(default_factory=dict[str, Any])


class CheckpointFormat(ABC):
    """How a snapshot becomes the files of a checkpoint, and is read back."""

    @abstractmethod
    def check(self, snapshot: Snapshot, run_state: Json) -> None:
        """:raises UnsupportedStateError, ValueError: if this cannot be written in this format."""

    @abstractmethod
    def write(self, draft: Draft, snapshot: Snapshot, run_state: Json) -> Written:
        """Write the files of a snapshot, all but the manifest, durably into a draft.

        :raises OSError: as the storage fails.
        """

    @abstractmethod
    def read(self, reader: CheckpointReader, only: str | None = None) -> CheckpointContent:
        """Read and verify a whole checkpoint, or of its parts only one.

        :raises CheckpointDamagedError: if a size, a hash or a format is wrong.
        :raises OSError: as the storage fails.
        """
