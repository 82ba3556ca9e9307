"""Checkpoints in a log directory as TensorFlow keeps them, so that all of its tools go on working, and ours beside.

``<logdir>/model.ckpt-120.{index,data-00000-of-00001,meta}`` are TensorFlow's own, and ``.manifest.json`` holds their
hashes and what else the run keeps. A checkpoint is there once its ``.index`` is. Commit: all files are written and
fsynced in a draft; the manifest, the data and the meta graph are renamed into the log directory, which is fsynced; then
the index is, and it is fsynced again; then the state file ``checkpoint`` is written anew, as a courtesy. Removal begins
with the index. So a manifest without an index is a commit, or a removal, that was not completed.

Checkpoints without a manifest are TensorFlow's own; they are read against the checksums in the bundle.
"""

from __future__ import annotations

import logging
import os
import re
from contextlib import closing
from pathlib import Path
from typing import Final

from supervise_core.checkpoint_format import CheckpointId, CheckpointReader, Draft
from supervise_core.clock import Clock
from supervise_core.directory_store import DirectoryStore
from supervise_core.disk import Disk, remove_tree
from supervise_core.errors import CheckpointDamagedError, CheckpointError
from supervise_core.host import Host
from supervise_core.manifest import MANIFEST, FileRecord, Manifest, hash_of
from supervise_tf.bundle_files import INDEX, BundleDraft, BundleReader, DraftStore, endings_of
from supervise_tf.bundle_format import BundleFormat
from supervise_tf.state_file import StateFile

_log = logging.getLogger(__name__)

_UNNUMBERED: Final = CheckpointId(0, -1)
"""``model.ckpt`` itself, as TensorFlow writes it where there is no global step; older than any that has a number."""


class BundleStore(DirectoryStore, DraftStore):
    """TensorFlow's checkpoints below one directory, for a ``GraphBackend``: ``store=BundleStore(logdir)``.

    ``meta_graph`` is written beside each. With ``unnumbered`` the newest is also there under the bare basename.
    """

    def __init__(
        self,
        logdir: str | os.PathLike[str],
        basename: str = "model.ckpt",
        *,
        meta_graph: bytes | None = None,
        unnumbered: bool = False,
        disk: Disk | None = None,
        clock: Clock | None = None,
        host: Host | None = None,
    ) -> None:
        super().__init__(logdir, basename, disk=disk, clock=clock, host=host)
        self.format = BundleFormat(meta_graph)
        self._unnumbered = unnumbered
        self._index = re.compile(re.escape(basename) + r"-(0|[1-9][0-9]*)(?:\.([1-9][0-9]*))?\.index")
        self._orphan = re.compile(f"({re.escape(basename)}-[0-9.]+)" + re.escape(f".{MANIFEST}"))
        self._state = StateFile(self.path, self._disk)

    # ---- the listing

    def checkpoints(self) -> list[CheckpointId]:
        names = self._disk.names(self.path)
        matches = (self._index.fullmatch(name) for name in names)
        numbered = sorted(CheckpointId(int(match[1]), int(match[2] or 0)) for match in matches if match)
        bare = f"{self.basename}.{INDEX}" in names
        return numbered or ([_UNNUMBERED] if bare else [])

    def name_of(self, checkpoint: CheckpointId) -> str:
        return self.basename if checkpoint == _UNNUMBERED else super().name_of(checkpoint)

    def open(self, checkpoint: CheckpointId) -> CheckpointReader:
        return BundleReader(self.path, self.name_of(checkpoint), checkpoint.step, self._disk)

    def preferred(self) -> CheckpointId | None:
        """What the state file calls the newest, if it is not as we wrote it and names an older one that is there."""
        try:
            name = None if self._state.is_ours() else self._state.newest()
        except ValueError as error:
            _log.warning("%s; going by the checkpoints that are there", error)
            return None
        there = self.checkpoints()
        wanted = next((checkpoint for checkpoint in there if self.name_of(checkpoint) == name), None)
        if wanted is None or wanted == there[-1]:
            return None
        _log.warning(
            "the state file in %s names %s, although %s is newer; going on from it", self.path, name,
            self.name_of(there[-1]),
        )  # fmt: skip
        return wanted

    # ---- the writer

    def begin(self, checkpoint: CheckpointId) -> Draft:
        self._drafts += 1
        directory = self._lease.directory / f"draft-{self._drafts}"
        self._change(self._disk.make_directory, directory)
        return BundleDraft(self, checkpoint, self.name_of(checkpoint), directory)

    def seal(self, path: Path) -> FileRecord:
        """See ``DraftStore``."""
        self._disk.sync_file(path)
        with closing(self._disk.open_directory(path.parent, lambda name: name == path.name)) as held:
            return FileRecord(held.size(path.name), hash_of(held.chunks(path.name)))

    def commit_bundle(self, draft: BundleDraft, manifest: Manifest, replaces: CheckpointId | None) -> CheckpointId:
        """See ``DraftStore``."""
        self._disk.sync_directory(draft.directory)
        if replaces is not None and self._holds(replaces, manifest):
            target = self.path / f"{self.name_of(replaces)}.{MANIFEST}"
            self._change(self._disk.rename, draft.directory / f"{draft.name}.{MANIFEST}", target)
            self._disk.sync_directory(self.path)
            remove_tree(self._disk, draft.directory)
            return replaces
        endings = endings_of(draft.name, self._disk.names(draft.directory))
        for ending in [MANIFEST, *(ending for ending in endings if ending not in (MANIFEST, INDEX))]:
            self._move(draft.directory, draft.name, ending)
        self._disk.sync_directory(self.path)
        self._move(draft.directory, draft.name, INDEX)
        self._disk.sync_directory(self.path)
        remove_tree(self._disk, draft.directory)
        self._tell()
        return draft.checkpoint

    def remove(self, checkpoint: CheckpointId) -> None:
        super().remove(checkpoint)
        self._tell()

    def set_aside(self, checkpoint: CheckpointId, reason: str) -> None:
        super().set_aside(checkpoint, reason)
        self._tell()

    def retire(self, checkpoint: CheckpointId) -> None:
        super().retire(checkpoint)
        self._tell()

    # ---- inside

    def _refuse_other_layout(self, names: list[str]) -> None:
        found = next((name for name in names if self._pattern.fullmatch(name)), None)
        if found is not None and self._disk.is_directory(self.path / found):
            raise CheckpointError(
                f"{self.path} holds checkpoints as directories ({found}), and this run keeps them as TensorFlow does. "
                "Use another logdir."
            )

    def _move(self, directory: Path, name: str, ending: str) -> None:
        self._change(self._disk.rename, directory / f"{name}.{ending}", self.path / f"{name}.{ending}")

    def _take_out(self, checkpoint: CheckpointId, into: Path) -> None:
        name = self.name_of(checkpoint)
        for ending in endings_of(name, self._disk.names(self.path)):
            self._change(self._disk.rename, self.path / f"{name}.{ending}", into / f"{name}.{ending}")
            if ending == INDEX:
                self._disk.sync_directory(self.path)

    def _holds(self, checkpoint: CheckpointId, manifest: Manifest) -> bool:
        try:
            with self.open(checkpoint) as reader:
                return reader.manifest().files == manifest.files
        except (CheckpointDamagedError, FileNotFoundError):
            return False

    def _sweep(self) -> None:
        super()._sweep()
        for name in self._disk.names(self.path):
            if (match := self._orphan.fullmatch(name)) and not (self.path / f"{match[1]}.{INDEX}").exists():
                self._sweep_orphan(match[1])

    def _sweep_orphan(self, name: str) -> None:
        """Files of a checkpoint without an index: of a commit that was not completed, or somebody removed the index."""
        try:
            was_newest = self._state.newest() == name
        except ValueError:
            was_newest = False
        if not was_newest:
            _log.info("swept %s in %s, which was not completed", name, self.path)
            for ending in endings_of(name, self._disk.names(self.path)):
                self._disk.remove_file(self.path / f"{name}.{ending}")
            return
        _log.warning("%s in %s is damaged and set aside: its index is missing", name, self.path)
        step, _, revision = name.removeprefix(f"{self.basename}-").partition(".")
        super().set_aside(CheckpointId(int(step), int(revision or 0)), "its index is missing")

    def _tell(self) -> None:
        """Bring the state file up to date. Nothing depends on it here, so a failure is said and no more."""
        names = [self.name_of(checkpoint) for checkpoint in self.checkpoints()]
        try:
            if not names:
                self._state.remove()
                return
            newest = names[-1]
            if self._unnumbered and newest != self.basename:
                self._link_bare(newest)
                newest = self.basename
            self._state.write(names, newest, self._lease.directory)
        except OSError as error:
            _log.error(
                "the state file of %s could not be written; TensorFlow's tools see an old one: %s", self.path, error
            )

    def _link_bare(self, name: str) -> None:
        """Have the files of a checkpoint under the bare basename, too."""
        endings = [ending for ending in endings_of(name, self._disk.names(self.path)) if ending != MANIFEST]
        for ending in reversed(endings):
            scratch = self._lease.directory / f"bare.{ending}"
            self._disk.link(self.path / f"{name}.{ending}", scratch)
            self._disk.rename(scratch, self.path / f"{self.basename}.{ending}")
        self._disk.sync_directory(self.path)
