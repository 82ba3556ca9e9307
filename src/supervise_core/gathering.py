"""One checkpoint of several processes: the chief writes it, and the others add what only they have.

A worker takes its snapshot at the same step, of those parts that differ from rank to rank. Its tensors it writes into
the chief's draft itself, so a log directory that all see is needed where there are any; the rest travels with the word
that they are there, and becomes part of one file, ``ranks.json``. The chief commits when it has the word of all.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, Final

from supervise_core.checkpoint_files import rank_prefix
from supervise_core.checkpoint_format import CheckpointId, CheckpointReader, Chunk, Draft, Written
from supervise_core.checkpoint_store import CheckpointStore
from supervise_core.chief import Chief
from supervise_core.errors import MembershipError, SaveNotWantedError
from supervise_core.hashing import hash_of
from supervise_core.manifest import RANKS, STATE, FileRecord, Manifest
from supervise_core.memory import in_blocks
from supervise_core.pages import OpenDraft
from supervise_core.worker import Worker

_log = logging.getLogger(__name__)

SHARES_WITHIN: Final = 600.0
"""Seconds that a rank may take to come to the step of a checkpoint: it may be validating. One that dies is seen."""


class Gathering:
    """What is added to a checkpoint besides the writer's own: here, nothing."""

    decides = True
    """Whether this process is the one that says when a save that failed is tried again."""

    def begin(self, draft: Draft, step: int, is_final: bool) -> None:
        """A checkpoint is begun; ``is_final``: the last one of the run."""

    def complete(self, draft: Draft, written: Written) -> Written:
        """Wait for what the others add; all that was written."""
        return written

    def end(self, checkpoint: str | None, problem: str = "") -> None:
        """It is committed, or there will be none; safe to call more than once."""

    def skip(self, step: int) -> None:
        """No checkpoint is taken at a step at which it was due, as one has failed just now."""


class AddingShares(Gathering):
    """A worker's side: it adds, and has nothing to gather."""

    decides = False

    def begin(self, draft: Draft, step: int, is_final: bool) -> None:
        assert isinstance(draft, _ShareDraft)
        draft.is_final = is_final


class ShareGathering(Gathering):
    """The chief's side."""

    def __init__(self, chief: Chief, limit: float = SHARES_WITHIN) -> None:
        self._chief = chief
        self._limit = limit
        self._open: OpenDraft | None = None

    def begin(self, draft: Draft, step: int, is_final: bool) -> None:
        if self._chief.has_begun:
            self._open = self._chief.open_draft(step, draft.location, is_final=is_final)

    def complete(self, draft: Draft, written: Written) -> Written:
        if self._open is None:
            return written
        shares = self._chief.gather(self._open, self._limit)
        files = dict(written.files)
        states: dict[str, Any] = {}
        for rank, share in shares.items():
            states[str(rank)] = json.loads(share.state)
            files |= {rank_prefix(rank) + file: FileRecord(*record) for file, record in share.files.items()}
        content = json.dumps({"ranks": states}, separators=(",", ":")).encode("ascii")
        draft.write(RANKS, [content])
        files[RANKS] = FileRecord(len(content), hash_of([content]))
        return replace(written, files=files)

    def end(self, checkpoint: str | None, problem: str = "") -> None:
        draft, self._open = self._open, None
        if draft is not None:
            self._chief.settle(draft, checkpoint, problem)

    def skip(self, step: int) -> None:
        self._chief.skip(step, "it is put off, after one that failed")


class ShareStore(CheckpointStore):
    """A worker's side: what it "saves" here becomes part of the chief's checkpoint. It lists nothing."""

    def __init__(self, store: CheckpointStore, worker: Worker, limit: float = SHARES_WITHIN) -> None:
        self._store = store
        self._worker = worker
        self._limit = limit
        self._last_draft = 0
        self.location = store.location
        self.basename = store.basename
        self.format = store.format

    def begin(self, checkpoint: CheckpointId) -> Draft:
        return _ShareDraft(self, checkpoint)

    def open_draft(self, step: int, is_final: bool) -> OpenDraft:
        """The chief's draft for a step, or its last one.

        :raises SaveNotWantedError: if it went on without.
        """
        draft = self._worker.await_draft(step, self._last_draft, self._limit, is_final=is_final)
        if draft is None:
            raise SaveNotWantedError(f"the chief takes no checkpoint of step {step}")
        self._last_draft = draft.number
        if not draft.directory and (outcome := self._worker.await_outcome(draft, self._limit)).checkpoint is None:
            raise SaveNotWantedError(f"the chief takes no checkpoint of step {step}: {outcome.problem}")
        return draft

    def write_into(self, location: str, file: str, pieces: Iterable[memoryview], size: int) -> None:
        """Write a file into the chief's draft."""
        own_name = rank_prefix(self._worker.roll.rank) + file
        try:
            self._store.write_into(location, own_name, pieces, size)
        except FileNotFoundError as error:
            raise MembershipError(
                f"rank {self._worker.roll.rank} does not see {location} in {self.location}, where the chief writes; "
                "processes that keep tensors of their own need a log directory on a file system that all of them share"
            ) from error

    def hand_in(self, draft: OpenDraft, state: str, files: Mapping[str, FileRecord]) -> None:
        """Have the chief know, and wait until it has committed.

        :raises MembershipError: if it does not.
        """
        self._worker.add_share(draft, state, {name: (file.size, file.xxh3_128) for name, file in files.items()})
        outcome = self._worker.await_outcome(draft, self._limit)
        if outcome.checkpoint is None:
            raise SaveNotWantedError(f"the chief has not saved step {draft.step}: {outcome.problem}")

    def give_up(self, draft: OpenDraft) -> None:
        """Have the chief know that there will be no share."""
        self._worker.add_share(draft, "{}", {}, "it could not be written; see the log of that rank")

    # ---- reading, which needs no share

    @property
    def is_writer(self) -> bool:
        return False

    def checkpoints(self) -> list[CheckpointId]:
        return []

    def name_of(self, checkpoint: CheckpointId) -> str:
        return self._store.name_of(checkpoint)

    def open(self, checkpoint: CheckpointId) -> CheckpointReader:
        return self._store.open(checkpoint)

    # ---- what only the chief does

    def acquire(self) -> None:
        raise self._not_here()

    def release(self) -> None:
        return None

    def check_lease(self) -> None:
        return None

    def beat(self) -> None:
        return None

    def remove(self, checkpoint: CheckpointId) -> None:
        raise self._not_here()

    def set_aside(self, checkpoint: CheckpointId, reason: str) -> None:
        raise self._not_here()

    def damaged(self) -> Mapping[str, str]:
        return self._store.damaged()

    def retire(self, checkpoint: CheckpointId) -> None:
        raise self._not_here()

    def retire_damaged(self) -> None:
        raise self._not_here()

    def _not_here(self) -> MembershipError:
        return MembershipError(f"{self.location} is written by the chief alone")


class _ShareDraft(Draft):
    def __init__(self, store: ShareStore, checkpoint: CheckpointId) -> None:
        self._store = store
        self._checkpoint = checkpoint
        self.is_final = False
        self._opened: OpenDraft | None = None
        self._state = ""
        self._is_handed_in = False

    @property
    def location(self) -> str:
        return self._draft().directory

    def write(self, file: str, chunks: Iterable[Chunk]) -> None:
        if file == STATE:
            self._state = b"".join(chunks).decode("ascii")
            return
        pieces = [memoryview(chunk) for chunk in chunks]
        size = sum(piece.nbytes for piece in pieces)
        self._store.write_into(self.location, file, in_blocks(pieces, size), size)

    def write_blocks(self, file: str, pieces: Iterable[memoryview], size: int) -> None:
        self._store.write_into(self.location, file, pieces, size)

    def commit(self, manifest: Manifest, replaces: CheckpointId | None = None) -> CheckpointId:
        files = {name: record for name, record in manifest.files.items() if name != STATE}
        draft, self._is_handed_in = self._draft(), True
        self._store.hand_in(draft, self._state, files)
        return self._checkpoint

    def discard(self) -> None:
        if self._opened is not None and not self._is_handed_in:
            self._store.give_up(self._opened)

    def _draft(self) -> OpenDraft:
        if self._opened is None:
            self._opened = self._store.open_draft(self._checkpoint.step, self.is_final)
        return self._opened
