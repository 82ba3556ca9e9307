"""Where checkpoints are kept: the port that a directory implements, and that other storage can."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from supervise_core.errors import CheckpointDamagedError
from supervise_core.manifest import LARGEST_MANIFEST, MANIFEST, FileRecord, Manifest, hash_of

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


class CheckpointStore(ABC):
    """A place for checkpoints with one writer at a time and any number of readers.

    The listing is the only index. What changes the store (``begin``, ``remove``, ``set_aside``, ``retire``) needs the
    lease, and fails with ``LeaseLostError`` once another writer has taken it over.
    """

    location: str
    """Where it is, for messages."""

    basename: str = "model.ckpt"
    """What the names of checkpoints begin with."""

    @abstractmethod
    def acquire(self) -> None:
        """Become the writer, and sweep what a writer that died left half done.

        :raises LeaseHeldError: if there is another; says who.
        """

    @abstractmethod
    def release(self) -> None:
        """Stop being the writer; safe to call twice."""

    @abstractmethod
    def check_lease(self) -> None:
        """:raises LeaseLostError: if another writer has taken over."""

    @abstractmethod
    def beat(self) -> None:
        """Show writers on other machines that this one lives. Called every few seconds.

        :raises LeaseLostError: if another writer has taken over.
        """

    @abstractmethod
    def checkpoints(self) -> list[CheckpointId]:
        """What is committed, from the oldest to the newest."""

    @abstractmethod
    def name_of(self, checkpoint: CheckpointId) -> str:
        """What people call it."""

    @abstractmethod
    def open(self, checkpoint: CheckpointId) -> CheckpointReader:
        """:raises FileNotFoundError: if it is not there any more."""

    @abstractmethod
    def begin(self, checkpoint: CheckpointId) -> Draft:
        """A new draft of this checkpoint, which must not exist."""

    @abstractmethod
    def remove(self, checkpoint: CheckpointId) -> None:
        """Remove it for good. It is gone from the listing at once or not at all."""

    @abstractmethod
    def set_aside(self, checkpoint: CheckpointId, reason: str) -> None:
        """Take a damaged one out of the listing and keep it, with the reason, as evidence."""

    @abstractmethod
    def damaged(self) -> Mapping[str, str]:
        """What was set aside and why."""

    @abstractmethod
    def retire(self, checkpoint: CheckpointId) -> None:
        """Take one out of the listing that the user decided not to go on from, and keep it."""

    @abstractmethod
    def retire_damaged(self) -> None:
        """Stop counting what was set aside as evidence; keep it with the retired ones."""

    @contextmanager
    def writing(self) -> Generator[None, None, None]:
        """The lease for the length of a block."""
        self.acquire()
        try:
            yield
        finally:
            self.release()
