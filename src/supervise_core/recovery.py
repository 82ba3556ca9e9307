"""Restoring a model: which checkpoint is gone on from, and what becomes of those that are damaged or passed over."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Generic, TypeVar

from supervise_core.checkpoint_files import read_checkpoint
from supervise_core.checkpoint_format import CheckpointContent, CheckpointId, CheckpointReader
from supervise_core.checkpoint_store import CheckpointStore
from supervise_core.directory_store import open_checkpoint_directory
from supervise_core.errors import (
    AllCheckpointsDamagedError,
    CheckpointDamagedError,
    CheckpointNotFoundError,
    NotReadyError,
)
from supervise_core.manifest import MANIFEST, STATE
from supervise_core.operations import Load

_log = logging.getLogger(__name__)

SessionT = TypeVar("SessionT")

Resume = str | os.PathLike[str]
"""``"auto"``, ``"must"``, ``"never"``, or a checkpoint: its path, or one that ``CheckpointDirectory`` gave."""

_MOST_OF_ONE_RUN: Final = 2
"""As the next, where the older one is what their run began with; a few come of a first step that takes long."""
_MOST_PASSED_OVER: Final = 4
"""So many checkpoints that may mix two steps are passed over for one that does not; of more, the newest is taken."""


@dataclass(slots=True)
class Recovery:
    """What was done to bring a model up, in order."""

    ran: list[str] = field(default_factory=list[str])
    restored: str | None = None
    found_ready: bool = False
    content: CheckpointContent | None = None
    set_aside: dict[str, str] = field(default_factory=dict[str, str])

    def __str__(self) -> str:
        skipped = [name for name in ("init", "init_fn") if name not in self.ran]
        if self.found_ready:
            return f"the model was found ready, as it was left; not run: restore, {', '.join(skipped)}"
        if self.restored is not None:
            damaged = f" (set aside as damaged: {', '.join(self.set_aside)})" if self.set_aside else ""
            step = "" if self.content is None else f"step {self.content.manifest.step} from "
            return f"restored {step}{self.restored}{damaged}; not run: {', '.join(skipped)}"
        ran = [name for name in self.ran if name in ("init", "init_fn")]
        return f"nothing was restored; run: {', '.join(ran) or 'no initialisation'}"


class CheckpointRecovery(Generic[SessionT]):
    """Restores the model of a session from the checkpoints of a store, and notes in ``done`` what it did."""

    def __init__(self, store: CheckpointStore | None, load: Load[SessionT] | None, done: Recovery) -> None:
        self._store = store
        self._load_parts = load
        self._done = done

    def recover(self, session: SessionT, resume: Resume) -> bool:
        """Restore what is to be restored; whether there was anything.

        What turns out to be damaged while it is loaded is put aside like the rest, and the next one is tried.

        :raises CheckpointError: if it cannot be restored and must not be begun anew.
        :raises OSError: as the storage fails.
        """
        load = self._load_parts
        if load is None:
            found = False
        elif resume in ("auto", "must", "never"):
            found = self._recover_from_store(session, load, resume)
        else:
            found = self._recover_chosen(session, load, Path(resume))
        if not found and resume == "must":
            raise CheckpointNotFoundError(self._nothing_to_resume())
        return found

    def _nothing_to_resume(self) -> str:
        where = "the Supervisor has no logdir" if self._store is None else f"there is none in {self._store.location}"
        return f"resume='must' needs a checkpoint, and {where}. Begin with resume='auto', or name the right logdir."

    def recover_as_announced(self, session: SessionT, name: str, rank: int) -> None:
        """Restore the checkpoint that the chief of several processes has restored, as this rank finds it.

        :raises NotReadyError, CheckpointError: if that cannot be done here.
        """
        store, load = self._store, self._load_parts
        if store is None or load is None:
            raise NotReadyError(
                f"the chief has restored {name}, and this process has no logdir or no saver; give it the same arguments"
            )
        with self._open_announced(store, name) as reader:
            content = store.format.read(reader).of_rank(rank)
            load(session, content.parts)  # the chief has verified what this one does not read
        self._done.restored = name
        self._done.content = content

    def _open_announced(self, store: CheckpointStore, name: str) -> CheckpointReader:
        """One of the log directory; or one of another that the chief was told to begin with, by its path."""
        known = {store.name_of(checkpoint): checkpoint for checkpoint in store.checkpoints()}
        if name in known:
            return store.open(known[name])
        if os.sep in name:
            return self._open_chosen(Path(name))
        raise CheckpointNotFoundError(
            f"the chief has restored {name}, and this process sees no such checkpoint in {store.location}; "
            "a log directory must be on a file system that all processes share, and the same one"
        )

    def _recover_from_store(self, session: SessionT, load: Load[SessionT], resume: Resume) -> bool:
        store = self._store
        if store is None:
            return False
        if resume == "never":
            self._retire(store, store.checkpoints(), "resume='never'")
            store.retire_damaged()
            return False
        damaged: set[CheckpointId] = set()
        while (chosen := self._choose(store, damaged)) is not None:
            try:
                with store.open(chosen) as reader:
                    self._load(session, load, store.format.read(reader), store.name_of(chosen))
            except CheckpointDamagedError as error:
                self._put_aside(store, chosen, error.reason)
                damaged.add(chosen)
                continue
            except FileNotFoundError:
                if chosen in store.checkpoints():
                    raise
                continue  # its writer removed it just now, and keeps a newer one
            if store.is_writer:  # only now, when the older one is known to fit
                passed_over = [known for known in store.checkpoints() if known > chosen]
                self._retire(store, passed_over, f"resume={self._done.restored}")
            return True
        if evidence := {**store.damaged(), **self._done.set_aside}:
            raise AllCheckpointsDamagedError(store.location, evidence)
        return False

    def _load(self, session: SessionT, load: Load[SessionT], content: CheckpointContent, name: str) -> None:
        """
        :raises CheckpointDamagedError: if it is damaged, even if that seemed to be another error at first.
        """
        try:
            load(session, content.parts)
            content.verify_the_rest()
        except CheckpointDamagedError:
            raise
        except Exception:
            content.verify()
            raise
        self._done.restored = name
        self._done.content = content

    def _choose(self, store: CheckpointStore, damaged: set[CheckpointId]) -> CheckpointId | None:
        """The newest that was taken at a step boundary; but the newest of all, if too many came after that one.

        A program that never comes to a boundary, or whose other threads train, would else lose too much. Those whose
        description is damaged are put aside, and added to those that are known to be.
        """
        second_best: tuple[CheckpointId, int] | None = None
        passed_over = 0
        preferred = store.preferred()
        good = [checkpoint for checkpoint in store.checkpoints() if checkpoint not in damaged]
        for checkpoint in sorted(good, key=lambda known: (known == preferred, known), reverse=True):
            try:
                with store.open(checkpoint) as reader:
                    manifest = reader.manifest_of(checkpoint)
                    began = 0 if manifest.consistent else store.format.read(reader).run_state.get("began", 0)
            except CheckpointDamagedError as error:
                self._put_aside(store, checkpoint, error.reason)
                damaged.add(checkpoint)
                continue
            except FileNotFoundError:
                if checkpoint in store.checkpoints():
                    raise
                return self._choose(store, damaged)  # its writer removed it just now: the listing is another one
            if second_best is not None:
                limit = _MOST_OF_ONE_RUN if second_best[1] >= checkpoint.step else _MOST_PASSED_OVER
                if passed_over > limit:
                    _log.warning(
                        "going on from %s, which may mix two steps: %s is too old",
                        store.name_of(second_best[0]), store.name_of(checkpoint),
                    )  # fmt: skip
                    break
            if manifest.consistent or checkpoint == preferred:
                return checkpoint
            second_best = second_best or (checkpoint, began)
            passed_over += 1
        return None if second_best is None else second_best[0]

    def _put_aside(self, store: CheckpointStore, checkpoint: CheckpointId, reason: str) -> None:
        name = store.name_of(checkpoint)
        self._done.set_aside[name] = reason
        if store.is_writer:
            _log.warning("%s in %s is damaged and set aside: %s", name, store.location, reason)
            store.set_aside(checkpoint, reason)
        else:
            _log.warning("%s in %s is damaged and passed over: %s", name, store.location, reason)

    def _recover_chosen(self, session: SessionT, load: Load[SessionT], path: Path) -> bool:
        """The checkpoint that the user named. One of this log directory is gone back to; one of another is a beginning,
        from which the directory's own newest checkpoint leads on when the program is started again."""
        store = self._store
        own = None if store is None else self._own(store, path)
        if store is not None and own is None and store.checkpoints():
            _log.info("%s has checkpoints of its own; going on from there and not from %s", store.location, path)
            return self._recover_from_store(session, load, "auto")
        if own is None and not any((path / name).exists() for name in (MANIFEST, STATE)) and path.is_dir():
            raise CheckpointNotFoundError(
                f"{path} is no checkpoint but another directory; name one, such as {path / 'model.ckpt-100'}, "
                "or go on with a log directory by logdir="
            )
        if store is not None and own is not None:
            with store.open(own) as reader:
                self._load(session, load, store.format.read(reader), path.name)
            if store.is_writer:
                newer = [checkpoint for checkpoint in store.checkpoints() if checkpoint > own]
                self._retire(store, newer, f"resume={path.name}")
        else:
            with self._open_chosen(path) as reader:
                self._load(session, load, read_checkpoint(reader), str(path))
        return True

    def _open_chosen(self, path: Path) -> CheckpointReader:
        try:
            return open_checkpoint_directory(path)
        except FileNotFoundError as error:
            raise CheckpointNotFoundError(
                f"there is no checkpoint {path}; resume= takes 'auto', 'must', 'never' or the path of a checkpoint"
            ) from error

    def _own(self, store: CheckpointStore, path: Path) -> CheckpointId | None:
        if path.resolve().parent != Path(store.location).resolve():
            return None
        return next((checkpoint for checkpoint in store.checkpoints() if store.name_of(checkpoint) == path.name), None)

    def _retire(self, store: CheckpointStore, checkpoints: list[CheckpointId], why: str) -> None:
        for checkpoint in checkpoints:
            store.retire(checkpoint)
        if checkpoints:
            _log.warning(
                "%s: moved %d checkpoint(s) of %s out of the way, into its folder 'retired'; delete them when you like",
                why,
                len(checkpoints),
                store.location,
            )
