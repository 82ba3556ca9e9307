"""Checkpoints in a log directory as TensorFlow keeps them, so that all of its tools go on working, and ours beside.

``<logdir>/model.ckpt-120.{index,data-00000-of-00001,meta}`` are TensorFlow's own, and ``.manifest.json`` holds their
hashes and what else the run keeps. A checkpoint is there once its ``.index`` is. Commit: all files are written and
fsynced in a draft; the manifest is renamed into the log directory, then the data and the meta graph, then the index,
with an fsync of the directory after each; then the state file ``checkpoint`` is written anew, as a courtesy. Removal
begins with the index and ends with the manifest. So a manifest without an index is a commit, or a removal, that was not
completed, and nothing is left over without a manifest.

Checkpoints without a manifest are TensorFlow's own; they are read against the checksums in the bundle.
"""

from __future__ import annotations

import errno
import logging
import os
import re
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Final

import tensorflow as tf

from supervise_core.checkpoint_format import CheckpointId, CheckpointReader, Draft
from supervise_core.clock import Clock
from supervise_core.directory_store import DirectoryStore
from supervise_core.disk import Disk
from supervise_core.durable_files import remove_tree
from supervise_core.errors import CheckpointDamagedError, CheckpointError
from supervise_core.hashing import hash_of
from supervise_core.host import Host
from supervise_core.manifest import MANIFEST, FileRecord, Manifest
from supervise_tf.bundle import check_bundle
from supervise_tf.bundle_files import INDEX, BundleDraft, BundleReader, DraftStore, endings_of
from supervise_tf.bundle_format import META, BundleFormat
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
        if found := sorted({*"*?["} & {*str(self.path), *basename}):
            raise ValueError(
                f"{self.path / basename}: TensorFlow takes {' '.join(found)} in a name for a pattern, and would not "
                "find a checkpoint there again; use another logdir"
            )
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
        if wanted is None and there and name not in (None, self.basename):
            newest = self.name_of(there[-1])
            _log.warning("the state file in %s names %s, which is not there; going on from %s", self.path, name, newest)
        if wanted is None or wanted == there[-1]:
            return None
        _log.warning(
            "the state file in %s names %s, although %s is newer; going on from it", self.path, name,
            self.name_of(there[-1]),
        )  # fmt: skip
        return wanted

    def named_elsewhere(self) -> Path | None:
        """A checkpoint that the state file names and the listing has not: of another basename, or in another place."""
        try:
            named = self._state.named_paths()
        except ValueError:
            return None
        return next((path for path in named if tf.compat.v1.train.checkpoint_exists(str(path))), None)

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
        if draft.checkpoint in self.checkpoints():
            raise FileExistsError(errno.EEXIST, "this checkpoint is there already", str(self.path / draft.name))
        if replaces is not None and self._holds(replaces, manifest):
            name = self.name_of(replaces)
            adopted = MANIFEST not in endings_of(name, self._disk.names(self.path))
            for ending in (META, MANIFEST) if adopted else (MANIFEST,):
                if f"{draft.name}.{ending}" in self._names_in(draft):
                    target = self.path / f"{name}.{ending}"
                    self._change(self._disk.rename, draft.directory / f"{draft.name}.{ending}", target)
                    self._disk.sync_directory(self.path)
            remove_tree(self._disk, draft.directory)
            if adopted:
                self._tell()
            return replaces
        endings = endings_of(draft.name, self._names_in(draft))
        for group in reversed(_in_order(endings)):
            for ending in group:
                self._move(draft.directory, draft.name, ending)
            self._disk.sync_directory(self.path)
        remove_tree(self._disk, draft.directory)
        self._tell()
        return draft.checkpoint

    def remove(self, checkpoint: CheckpointId) -> None:
        trash = self._lease.directory / f"trash-{self.name_of(checkpoint)}"
        self._change(self._disk.make_directory, trash)
        self._take_out(checkpoint, trash)
        remove_tree(self._disk, trash)  # if that outlives a power cut and the last rename does not, it is swept
        self._tell()

    def set_aside(self, checkpoint: CheckpointId, reason: str) -> None:
        super().set_aside(checkpoint, reason)
        self._tell()

    def retire(self, checkpoint: CheckpointId) -> None:
        if self._unnumbered and checkpoint != _UNNUMBERED and self._is_copy(self.name_of(checkpoint)):
            self._remove_bare()
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

    def _names_in(self, draft: BundleDraft) -> list[str]:
        """What a draft holds. To a writer that was replaced it would seem to hold nothing, which is soon moved."""
        names = self._disk.names(draft.directory)
        self._lease.check()
        return names

    def _move(self, directory: Path, name: str, ending: str) -> None:
        self._change(self._disk.rename, directory / f"{name}.{ending}", self.path / f"{name}.{ending}")

    def _take_out(self, checkpoint: CheckpointId, into: Path) -> None:
        name = self.name_of(checkpoint)
        if not {INDEX, MANIFEST} & {*endings_of(name, self._disk.names(self.path))}:
            raise FileNotFoundError(errno.ENOENT, "there is no such checkpoint", str(self.path / name))
        self._move_out(name, into)

    def _move_out(self, name: str, into: Path) -> None:
        """The index first, and the manifest last, each step when the one before it is durable."""
        endings = endings_of(name, self._disk.names(self.path))
        for group in _in_order(endings):
            for ending in group:
                self._change(self._disk.rename, self.path / f"{name}.{ending}", into / f"{name}.{ending}")
            if MANIFEST not in group:
                self._disk.sync_directory(self.path)

    def _holds(self, checkpoint: CheckpointId, manifest: Manifest) -> bool:
        """Whether a checkpoint has those files. One that a Saver of the program wrote is known by its content."""
        try:
            with self.open(checkpoint) as reader:
                if known := reader.manifest().files:
                    return known == manifest.files
                assert isinstance(reader, BundleReader)
                for file, record in manifest.files.items():
                    if file != META:  # nobody has hashed the meta graph there, so it can be replaced
                        reader.verify(file, record)
                return True
        except (CheckpointDamagedError, FileNotFoundError):
            return False

    def _disown_rewritten(self) -> None:
        """A Saver of the program may have written a checkpoint of ours anew, and our hashes are of the old content."""
        try:
            name = None if self._state.is_ours() else self._state.newest()
        except ValueError:
            return
        if name is None or not {INDEX, MANIFEST} <= {*endings_of(name, self._disk.names(self.path))}:
            return
        try:
            with closing(BundleReader(self.path, name, 0, self._disk)) as reader:
                for file, record in reader.manifest().files.items():
                    reader.verify(file, record)
        except CheckpointDamagedError as error:
            try:
                check_bundle(self.path / name)
            except CheckpointDamagedError:
                return  # it is damaged indeed
            _log.info("%s in %s was written anew by a Saver (%s)", name, self.path, error.reason)
            trash = self._lease.directory / f"trash-{name}.{MANIFEST}"
            self._change(self._disk.rename, self.path / f"{name}.{MANIFEST}", trash)  # fails if we were replaced
            self._disk.sync_directory(self.path)
            self._change(self._disk.remove_file, trash)

    def _sweep(self) -> None:
        self._disown_rewritten()
        for leftover in self._lease.leftovers():
            for name in self._disk.names(leftover):
                self._complete(leftover / name)
        super()._sweep()
        for name in self._disk.names(self.path):
            if (match := self._orphan.fullmatch(name)) and not (self.path / f"{match[1]}.{INDEX}").exists():
                self._sweep_orphan(match[1])
        if not self._is_told():
            self._tell()

    def _complete(self, parcel: Path) -> None:
        """Move into a parcel, or into the trash, what its writer did not come to move after the index."""
        there = self._disk.names(parcel) if self._disk.is_directory(parcel) else []
        for name in (file.removesuffix(f".{INDEX}") for file in there if file.endswith(f".{INDEX}")):
            endings = endings_of(name, self._disk.names(self.path))
            if parcel.name.endswith(f"-{name}") and endings and INDEX not in endings:
                self._move_out(name, parcel)

    def _sweep_orphan(self, name: str) -> None:
        """Files of a checkpoint without an index: of a commit that was not completed, or somebody removed the index."""
        if not self._state.says(name):
            _log.info("swept %s in %s, which was not completed", name, self.path)
            for group in _in_order(endings_of(name, self._disk.names(self.path))):
                for ending in group:
                    self._disk.remove_file(self.path / f"{name}.{ending}")
                self._disk.sync_directory(self.path)
            return
        _log.warning("%s in %s is damaged and set aside: its index is missing", name, self.path)
        step, _, revision = name.removeprefix(f"{self.basename}-").partition(".")
        super().set_aside(CheckpointId(int(step), int(revision or 0)), "its index is missing")

    def _tell(self) -> None:
        """Bring the state file up to date. Nothing depends on it here, so a failure is said and no more."""
        names = [self.name_of(checkpoint) for checkpoint in self.checkpoints()]
        try:
            self._disown_rewritten()
            if not names:
                self._state.remove()
                return
            if self._unnumbered and names[-1] != self.basename:
                self._link_bare(names[-1])
            newest = self.basename if self._unnumbered else names[-1]
            self._state.write(names, newest, self._lease.directory)
        except OSError as error:
            _log.error(
                "the state file of %s could not be written; TensorFlow's tools see an old one: %s", self.path, error
            )

    def _is_told(self) -> bool:
        """Whether the state file can stay as it is: it is right, or somebody else wrote it and means something by it.

        One of somebody else's that names the newest is made ours, or it would seem to be a wish when there is a newer.
        """
        there = self.checkpoints()
        newest = self.name_of(there[-1]) if there else None
        if self._state.exists() and not self._state.is_ours():
            return newest is None or not self._state.says(newest)
        if newest is None or not self._unnumbered:
            return self._state.says(newest)
        return self._state.says(self.basename) and self._is_copy(newest)

    def _is_copy(self, name: str) -> bool:
        """Whether what is there under the bare basename is this checkpoint, by the checksums in the indexes."""
        indexes = (f"{name}.{INDEX}", f"{self.basename}.{INDEX}")
        with closing(self._disk.open_directory(self.path, lambda file: file in indexes)) as held:
            contents = [self._disk.read(held, file) for file in indexes if file in held.files]
        return len(contents) == len(indexes) and contents[0] == contents[1]

    def _remove_bare(self) -> None:
        """What is retired must not be gone on from by its other name."""
        trash = self._lease.directory / f"trash-{self.basename}"
        self._change(self._disk.make_directory, trash)
        self._move_out(self.basename, trash)
        remove_tree(self._disk, trash)

    def _link_bare(self, name: str) -> None:
        """Have the files of a checkpoint under the bare basename, too; the index when the others are durable."""
        endings = [ending for ending in endings_of(name, self._disk.names(self.path)) if ending != MANIFEST]
        for ending in reversed(endings):
            if ending == INDEX:
                self._disk.sync_directory(self.path)
            scratch = self._lease.directory / f"bare.{ending}"
            if scratch.exists():  # a rename between two names of one file does nothing, and leaves both
                self._disk.remove_file(scratch)
            self._disk.link(self.path / f"{name}.{ending}", scratch)
            self._disk.rename(scratch, self.path / f"{self.basename}.{ending}")


def _in_order(endings: Sequence[str]) -> list[list[str]]:
    """The endings of a checkpoint's files in the order in which they are taken away; they come in the reverse one."""
    content = [ending for ending in endings if ending not in (INDEX, MANIFEST)]
    return [[ending for ending in endings if ending == INDEX], content, [MANIFEST] if MANIFEST in endings else []]
