"""Checkpoints in a directory of a file system.

``<logdir>/<basename>-<step>/`` is a checkpoint; the listing is the only index, and nothing in it is an absolute path.
Commit: the draft's files and then its manifest are written, and then fsynced one after another, and so is the draft
directory; the draft is renamed to its name, and the log directory fsynced. Removal goes the other way: renamed out of
the listing, the listing fsynced, and only then are files unlinked, so that no power cut brings half a checkpoint back.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Final, TypeVar

from supervise_core.checkpoint_format import CheckpointId, CheckpointReader, Chunk, Draft, Link
from supervise_core.checkpoint_store import CheckpointStore
from supervise_core.clock import Clock, SystemClock
from supervise_core.disk import Disk, OpenDirectory
from supervise_core.durable_files import Unsynced, ensure_directory, remove_tree, write_blocks, write_file
from supervise_core.errors import CheckpointDamagedError, CheckpointError
from supervise_core.host import Host
from supervise_core.lease import Lease, is_lost
from supervise_core.manifest import MANIFEST, Manifest, check_file_name

_log = logging.getLogger(__name__)

_SET_ASIDE: Final = "set-aside"
_RETIRED: Final = "retired"
_REASON: Final = "reason.json"
_IDENTITY: Final = "identity"
_NO_LINKS: Final = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EXDEV, errno.EACCES)
"""What file systems answer that have no hard links, or not for this file, or not that many."""

ResultT = TypeVar("ResultT")


class DirectoryStore(CheckpointStore):
    """Checkpoints below one directory, which need not exist yet."""

    def __init__(
        self,
        logdir: str | os.PathLike[str],
        basename: str = "model.ckpt",
        *,
        disk: Disk | None = None,
        clock: Clock | None = None,
        host: Host | None = None,
    ) -> None:
        """:raises ValueError: if the basename cannot begin the name of a directory."""
        if basename != os.path.basename(basename) or basename.startswith(".") or not basename:
            raise ValueError(f"{basename!r} cannot begin a directory name; use something like 'model.ckpt'")
        self.path = Path(logdir)
        self.location = str(self.path)
        self.basename = basename
        self._pattern = re.compile(re.escape(basename) + r"-(0|[1-9][0-9]*)(?:\.([1-9][0-9]*))?")
        self._disk = disk or Disk()
        self._lease = Lease(self.path, self._disk, clock or SystemClock(), host or Host())
        self._drafts = 0
        self._said_no_links = False
        self._is_direct = False

    # ---- the writer

    def acquire(self) -> None:
        try:
            ensure_directory(self._disk, self.path)
        except (FileExistsError, NotADirectoryError) as error:
            raise NotADirectoryError(
                errno.ENOTDIR, "the logdir, or what it should lie in, is a file; name a directory", str(self.path)
            ) from error
        self._refuse_other_layout(self._disk.names(self.path))
        self._lease.acquire()
        try:
            self._sweep()
        except BaseException:
            self._lease.release()
            raise

    def release(self) -> None:
        self._lease.release()

    @property
    def is_direct(self) -> bool:
        return self._is_direct

    @property
    def is_writer(self) -> bool:
        return self._lease.held

    def check_lease(self) -> None:
        self._lease.check()

    def beat(self) -> None:
        self._lease.beat()

    def begin(self, checkpoint: CheckpointId) -> Draft:
        self._drafts += 1
        draft = self._lease.directory / f"draft-{self._drafts}"
        self._change(self._disk.make_directory, draft)
        return _DirectoryDraft(self, checkpoint, draft, Unsynced(self._disk))

    def write_into(self, location: str, file: str, pieces: Iterable[memoryview], size: int) -> None:
        draft = self.path / location
        if draft.parent.parent != self.path / ".work":
            raise ValueError(f"{location!r} is no draft in {self.path}")
        write_blocks(self._disk, draft / check_file_name(file), pieces, size)

    def remove(self, checkpoint: CheckpointId) -> None:
        name = self.name_of(checkpoint)
        trash = self._lease.directory / f"trash-{name}"
        self._change(self._disk.rename, self.path / name, trash)
        self._disk.sync_directory(self.path)
        remove_tree(self._disk, trash)

    def set_aside(self, checkpoint: CheckpointId, reason: str) -> None:
        self._put_away(checkpoint, _SET_ASIDE, reason)

    def retire(self, checkpoint: CheckpointId) -> None:
        self._put_away(checkpoint, _RETIRED, "the user began anew")

    def retire_damaged(self) -> None:
        names = self._disk.names(self.path / _SET_ASIDE)
        if names:
            self._lease.make_findable()
        for name in names:
            parcel = self._lease.directory / f"{_RETIRED}-{name}"
            self._change(self._disk.rename, self.path / _SET_ASIDE / name, parcel)
            self._deliver(parcel)

    # ---- everybody

    def identity(self) -> str:
        """Drawn once by a writer, and gone with the directory; before that, its path."""
        work = self.path / ".work"
        if _IDENTITY in self._disk.names(work):
            with closing(self._disk.open_directory(work)) as directory:
                return self._disk.read(directory, _IDENTITY).decode()
        if not self.is_writer:
            return str(self.path.resolve())
        drawn = secrets.token_hex(8)
        draft = self._lease.directory / _IDENTITY
        self._change(write_file, self._disk, draft, [drawn.encode()])
        self._change(self._disk.rename, draft, work / _IDENTITY)
        return drawn

    def checkpoints(self) -> list[CheckpointId]:
        matches = (self._pattern.fullmatch(name) for name in self._disk.names(self.path))
        return sorted(CheckpointId(int(match[1]), int(match[2] or 0)) for match in matches if match)

    def name_of(self, checkpoint: CheckpointId) -> str:
        revision = f".{checkpoint.revision}" if checkpoint.revision else ""
        return f"{self.basename}-{checkpoint.step}{revision}"

    def open(self, checkpoint: CheckpointId) -> CheckpointReader:
        return open_checkpoint_directory(self.path / self.name_of(checkpoint), self._disk)

    def damaged(self) -> Mapping[str, str]:
        return {name: self._reason(name) for name in self._disk.names(self.path / _SET_ASIDE)}

    # ---- inside

    def _refuse_other_layout(self, names: list[str]) -> None:
        """:raises CheckpointError: if the directory holds checkpoints that this store would pass over in silence."""
        bundle = re.compile(re.escape(self.basename) + r"-[0-9]+\.index")
        if found := next((name for name in names if bundle.fullmatch(name)), None):
            raise CheckpointError(
                f"{self.path} holds checkpoints of TensorFlow ({found}), and this run keeps its own as directories. "
                "Use another logdir, or supervise_tf's store=BundleStore(logdir), which keeps them as TensorFlow does."
            )

    def _change(self, act: Callable[..., ResultT], *arguments: object) -> ResultT:
        """A call that works in, into or out of the lease directory; if it fails as that is gone, we were replaced."""
        try:
            return act(*arguments)
        except OSError as error:
            if is_lost(error) and not self._disk.is_directory(self._lease.directory):
                raise self._lease.lost() from error
            raise

    def _put_away(self, checkpoint: CheckpointId, where: str, reason: str) -> None:
        """Into a parcel inside the lease directory, with the reason beside it, and from there to its place."""
        name = self.name_of(checkpoint)
        self._drafts += 1
        parcel = self._lease.directory / f"{where}-{name}"
        self._change(self._disk.make_directory, parcel)
        record = {"checkpoint": name, "reason": reason}
        self._change(write_file, self._disk, parcel / _REASON, [json.dumps(record, indent=1).encode()])
        self._change(self._disk.sync_directory, parcel)
        self._lease.make_findable()
        self._take_out(checkpoint, parcel)
        self._change(self._disk.sync_directory, parcel)
        self._deliver(parcel)

    def _take_out(self, checkpoint: CheckpointId, into: Path) -> None:
        """Move a checkpoint out of the listing into a directory inside the lease directory."""
        name = self.name_of(checkpoint)
        self._change(self._disk.rename, self.path / name, into / name)

    def _deliver(self, parcel: Path) -> None:
        """Move ``<place>-<name>`` out of a lease directory to ``<place>/<name>`` (or ``<name>~2``, …)."""
        where = _RETIRED if parcel.name.startswith(_RETIRED) else _SET_ASIDE
        shelf = self.path / where
        ensure_directory(self._disk, shelf)
        if not self._disk.is_directory(shelf):
            raise NotADirectoryError(errno.ENOTDIR, "not a directory of its own", str(shelf))
        name = parcel.name.removeprefix(f"{where}-")
        taken = set(self._disk.names(shelf))
        target = next(
            candidate
            for number in range(1, len(taken) + 2)
            if (candidate := name if number == 1 else f"{name}~{number}") not in taken
        )
        self._change(self._disk.rename, parcel, shelf / target)
        self._disk.sync_directory(shelf)

    def _reason(self, name: str) -> str:
        try:
            directory = self._disk.open_directory(self.path / _SET_ASIDE / name)
        except OSError:
            return "no reason recorded"
        try:
            record = json.loads(self._disk.read(directory, _REASON)) if _REASON in directory.files else {}
        except (ValueError, RecursionError):
            record = {}
        finally:
            directory.close()
        return str(record.get("reason", "no reason recorded")) if isinstance(record, dict) else "no reason recorded"

    def _sweep(self) -> None:
        """Finish what writers that are no more left behind: evidence goes to its place, drafts and trash away."""
        leftovers = self._lease.leftovers()
        for leftover in leftovers:
            for name in self._disk.names(leftover):
                parcel = leftover / name
                if name.startswith((_SET_ASIDE, _RETIRED)) and {*self._disk.names(parcel)} - {_REASON}:
                    self._change(self._disk.sync_directory, parcel)
                    self._deliver(parcel)
        if leftovers:
            self._make_moves_durable()
        for leftover in leftovers:
            if any(name.startswith(("draft-", "trash-")) for name in self._disk.names(leftover)):
                _log.info("swept what a writer that is no more left half done in %s", self.path)
            remove_tree(self._disk, leftover)

    def _make_moves_durable(self) -> None:
        """What a dead writer moved out of its directory, or into it, must not be undone when that directory is gone."""
        for directory in (self.path, self.path / _SET_ASIDE, self.path / _RETIRED):
            if self._disk.is_directory(directory):
                self._disk.sync_directory(directory)

    def commit(self, draft: Path, checkpoint: CheckpointId, replaces: CheckpointId | None) -> CheckpointId:
        """Make a finished draft a checkpoint; for the draft alone."""
        self._change(self._disk.sync_directory, draft)
        if replaces is not None and self._exchange(draft, self.path / self.name_of(replaces)):
            self._disk.sync_directory(self.path)
            remove_tree(self._disk, draft)  # by this name it is now what was replaced
            return replaces
        self._change(self._disk.rename, draft, self.path / self.name_of(checkpoint))
        self._disk.sync_directory(self.path)
        return checkpoint

    def _exchange(self, draft: Path, place: Path) -> bool:
        try:
            self._change(self._disk.exchange, draft, place)
        except OSError as error:
            if error.errno == errno.ENOTSUP:
                return False
            raise
        return True

    def write(self, draft: Path, file: str, chunks: Iterable[Chunk], later: Unsynced | None = None) -> None:
        """Write one file of a draft, durable at once or ``later``; for the draft alone."""
        self._change(write_file, self._disk, draft / file, chunks, later)

    def write_blocks(self, draft: Path, file: str, pieces: Iterable[memoryview], size: int, later: Unsynced) -> None:
        """Write one file of a draft past the page cache, durable ``later``; for the draft alone."""
        self._is_direct = self._change(write_blocks, self._disk, draft / file, pieces, size, later)

    def link(self, draft: Path, checkpoint: CheckpointId, files: Sequence[Link]) -> bool:
        """Give files of a checkpoint further names in a draft, all of them or none; for the draft alone."""
        done: list[Path] = []
        try:
            for link in files:
                self._disk.link(self.path / self.name_of(checkpoint) / link.there, draft / link.file)
                done.append(draft / link.file)
                if self._disk.size(draft / link.file) != link.size:
                    raise FileNotFoundError(errno.ENOENT, "it has another size", link.there)
        except OSError as error:
            if not self._disk.is_directory(self._lease.directory):
                raise self._lease.lost() from error
            if error.errno not in (errno.ENOENT, *_NO_LINKS):
                raise
            for path in done:
                self._change(self._disk.remove_file, path)
            self._say_no_links(error)
            return False
        return True

    def _say_no_links(self, error: OSError) -> None:
        if error.errno in _NO_LINKS and not self._said_no_links:
            self._said_no_links = True
            _log.warning(
                "%s: what has not changed is written anew into each checkpoint, as no file can have two names there "
                "(%s)", self.path, error.strerror,
            )  # fmt: skip

    def discard(self, draft: Path) -> None:
        """Remove a draft; for the draft alone."""
        remove_tree(self._disk, draft)


class _DirectoryDraft(Draft):
    def __init__(self, store: DirectoryStore, checkpoint: CheckpointId, path: Path, unsynced: Unsynced) -> None:
        self._store = store
        self._checkpoint = checkpoint
        self._path = path
        self._unsynced = unsynced

    @property
    def location(self) -> str:
        return str(self._path.relative_to(self._store.path))

    def write(self, file: str, chunks: Iterable[Chunk]) -> None:
        self._store.write(self._path, check_file_name(file), chunks, self._unsynced)

    def write_blocks(self, file: str, pieces: Iterable[memoryview], size: int) -> None:
        self._store.write_blocks(self._path, check_file_name(file), pieces, size, self._unsynced)

    def link(self, checkpoint: CheckpointId, files: Sequence[Link]) -> bool:
        for link in files:
            check_file_name(link.file)
        return self._store.link(self._path, checkpoint, files)

    def commit(self, manifest: Manifest, replaces: CheckpointId | None = None) -> CheckpointId:
        self._store.write(self._path, MANIFEST, [manifest.to_bytes()], self._unsynced)
        self._unsynced.sync()
        return self._store.commit(self._path, self._checkpoint, replaces)

    def discard(self) -> None:
        self._unsynced.close()
        self._store.discard(self._path)


class _DirectoryReader(CheckpointReader):
    def __init__(self, directory: OpenDirectory, disk: Disk) -> None:
        self.name = directory.path.name
        self._directory = directory
        self._disk = disk

    def size(self, file: str) -> int | None:
        return self._directory.size(file) if file in self._directory.files else None

    def read_into(self, file: str, at: int, buffers: Sequence[memoryview]) -> int:
        return self._disk.read_into(self._directory, file, at, buffers)

    def close(self) -> None:
        self._directory.close()


def open_checkpoint_directory(path: Path, disk: Disk | None = None) -> CheckpointReader:
    """One checkpoint directory, wherever it lies, held open for reading.

    :raises FileNotFoundError: if it is not there.
    :raises CheckpointDamagedError: if what bears the name is no directory.
    """
    own = disk or Disk()
    try:
        return _DirectoryReader(own.open_directory(path), own)
    except OSError as error:
        if error.errno in (errno.ENOTDIR, errno.ELOOP):
            raise CheckpointDamagedError(path.name, "it is not a directory of its own") from error
        raise
