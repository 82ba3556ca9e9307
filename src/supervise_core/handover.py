"""A snapshot on its way from the thread that takes it to the one that writes it: part by part, or as a whole.

A part is in memory before the others are, so the disk can have it already while they are being copied; where writing
would be one more copy, into a cache, it can wait. Until the snapshot is whole, nobody knows whether there will be one:
what was written early is a draft, and thrown away if not.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Final, Self

from supervise_core.checkpoint_format import Base, CheckpointId, Draft, SnapshotWriter
from supervise_core.checkpoint_store import CheckpointStore
from supervise_core.snapshot import PartImage, Snapshot
from supervise_core.tagged_json import Json

_log = logging.getLogger(__name__)

EARLY_BYTES: Final = 32 << 20
"""The least of a part that is worth a draft before the snapshot is whole."""

EARLY_TENSOR_BYTES: Final = 128 << 10
"""The least that a tensor of such a part has on average: what is done in Python for each is waited for by the loop."""


@dataclass(frozen=True, slots=True)
class PendingSave:
    """A snapshot with all that goes into its checkpoint, not yet on disk."""

    step: int
    snapshot: Snapshot
    run_state: Json
    metrics: Mapping[str, float]
    final: bool = False
    consistent: bool = True


class Handover:
    """The snapshot of a step, from one thread to another."""

    def __init__(self, step: int) -> None:
        self.step = step
        self.taken = threading.Event()
        """Set once the snapshot is whole, or broken off."""
        self._pending: PendingSave | None = None
        self._parts: queue.SimpleQueue[PartImage | None] = queue.SimpleQueue()

    @classmethod
    def of(cls, pending: PendingSave) -> Self:
        """One that is whole already."""
        handover = cls(pending.step)
        handover.complete(pending)
        return handover

    # ---- the thread that takes it

    def add(self, part: PartImage) -> None:
        """A part is there, and others are to come."""
        nbytes = sum(file.size for file in part.files)
        if nbytes >= EARLY_BYTES and nbytes >= EARLY_TENSOR_BYTES * sum(len(file.tensors) for file in part.files):
            self._parts.put(part)

    def complete(self, pending: PendingSave) -> None:
        """It is whole."""
        self._pending = pending
        self.break_off()

    def break_off(self) -> None:
        """No more will come; without ``complete``, there is no snapshot."""
        self.taken.set()
        self._parts.put(None)

    # ---- the thread that writes it

    def early_parts(self) -> Iterator[PartImage]:
        """Parts that are there while others are not; ends when the snapshot is whole, or broken off."""
        while not self.taken.is_set() and (part := self._parts.get()) is not None:
            yield part

    def await_pending(self) -> PendingSave | None:
        """The whole snapshot; None if it was broken off."""
        self.taken.wait()
        return self._pending


class Drafting:
    """One draft and what writes into it, for the length of a block. Without ``keep`` it is thrown away at the end."""

    def __init__(self, store: CheckpointStore, base: Base | None) -> None:
        self._store = store
        self._base = base
        self._begun: tuple[CheckpointId, Draft, SnapshotWriter] | None = None
        self._early: list[PartImage] = []
        self._error: Exception | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None or isinstance(error, Exception):
            self.discard()
        else:
            self.keep()

    def write_early(self, handover: Handover) -> None:
        """Write the parts that are there before the snapshot is. What goes wrong is raised by ``begin``."""
        try:
            for part in handover.early_parts():
                if self._begun is None and (not self._store.is_direct or self._is_saved(handover.step)):
                    continue
                _, _, writer = self._begun or self._begin(CheckpointId(handover.step))
                self._early.append(part)
                writer.write_early(part, handover.taken)
        except Exception as error:
            self._error = error

    def begin(self, checkpoint: CheckpointId, pending: PendingSave) -> tuple[Draft, SnapshotWriter]:
        """The draft of this checkpoint, with what was written early if that belongs to it.

        :raises OSError: as the storage fails, or has failed.
        """
        if self._error is not None:
            self.discard()
            raise self._error
        if self._begun is not None and not self._belongs(self._begun[0], checkpoint, pending):
            self.discard()
        _, draft, writer = self._begun or self._begin(checkpoint)
        return draft, writer

    def keep(self) -> None:
        """Leave the draft as it is: it is a checkpoint now, or what a crash leaves behind."""
        if self._begun is not None:
            (_, _, writer), self._begun = self._begun, None
            writer.close()

    def discard(self) -> None:
        """Remove the draft, if there is one."""
        if self._begun is None:
            return
        _, draft, _ = self._begun
        self.keep()
        try:
            draft.discard()
        except OSError as error:
            _log.error("a draft could not be removed and is left for the next start: %s", error)

    def _begin(self, checkpoint: CheckpointId) -> tuple[CheckpointId, Draft, SnapshotWriter]:
        draft = self._store.begin(checkpoint)
        self._begun = checkpoint, draft, self._store.format.writer(draft, self._base)
        return self._begun

    def _is_saved(self, step: int) -> bool:
        return any(checkpoint.step == step for checkpoint in self._store.checkpoints())

    def _belongs(self, begun: CheckpointId, checkpoint: CheckpointId, pending: PendingSave) -> bool:
        return begun == checkpoint and all(pending.snapshot.parts.get(part.name) is part for part in self._early)
