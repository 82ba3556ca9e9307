"""Where checkpoints are kept: the port that a directory implements, and that other storage can."""

from __future__ import annotations

import errno
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager

from supervise_core.checkpoint_files import SafetensorsFormat
from supervise_core.checkpoint_format import CheckpointFormat, CheckpointId, CheckpointReader, Draft


class CheckpointStore(ABC):
    """A place for checkpoints with one writer at a time and any number of readers.

    The listing is the only index. What changes the store (``begin``, ``remove``, ``set_aside``, ``retire``) needs the
    lease, and fails with ``LeaseLostError`` once another writer has taken it over.
    """

    location: str
    """Where it is, for messages."""

    basename: str = "model.ckpt"
    """What the names of checkpoints begin with."""

    format: CheckpointFormat = SafetensorsFormat()
    """What the files of its checkpoints look like."""

    def identity(self) -> str:
        """What tells this store from all others, also from one that was at the same place before."""
        return self.location

    @property
    def is_direct(self) -> bool:
        """Whether blocks go straight to the storage, as far as is known.

        Then writing them hardly takes a processor, and is begun while the training thread still copies.
        """
        return False

    @property
    @abstractmethod
    def is_writer(self) -> bool:
        """Whether the lease is held."""

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

    def preferred(self) -> CheckpointId | None:
        """One that the user wants to go on from although there are newer ones; None if nothing says so."""
        return None

    @abstractmethod
    def name_of(self, checkpoint: CheckpointId) -> str:
        """What people call it."""

    @abstractmethod
    def open(self, checkpoint: CheckpointId) -> CheckpointReader:
        """:raises FileNotFoundError: if it is not there any more."""

    @abstractmethod
    def begin(self, checkpoint: CheckpointId) -> Draft:
        """A new draft of this checkpoint, which must not exist."""

    def write_into(self, location: str, file: str, pieces: Iterable[memoryview], size: int) -> None:
        """Write one durable file into the draft of another process; see ``Draft.write_blocks`` for the pieces.

        :raises FileNotFoundError: if the draft is not there (any more), or cannot be seen from here.
        """
        raise FileNotFoundError(errno.ENOENT, "only one process can write the checkpoints of this store", self.location)

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
        """The lease for the length of a block; one that may take longer than ten seconds calls ``beat`` meanwhile."""
        self.acquire()
        try:
            yield
        finally:
            self.release()
