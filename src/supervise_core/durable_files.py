"""Files and directories that are there after a power cut: what is made of several calls to a ``Disk``."""

from __future__ import annotations

import errno
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final
from weakref import finalize

from supervise_core.disk import BLOCK, Disk, close_all

_PIECE: Final = 16 << 20
_DIRECT_PIECE: Final = 64 << 20
"""What one direct write takes: as it ends, the disk has nothing to do until the next one begins."""


class Unsynced:
    """Files that are held open until they are made durable, all at once.

    A file system writes its journal for each file that is made durable after something has changed, and finding a place
    for the content of the next file is such a change. So all of them set off first, and one journal has them all.
    """

    def __init__(self, disk: Disk) -> None:
        self._disk = disk
        self._descriptors = list[int]()
        self._finalizer = finalize(self, close_all, self._descriptors)

    def add(self, descriptor: int) -> int:
        """Hold one more, which is still to be written."""
        self._descriptors.append(descriptor)
        return descriptor

    def sync(self) -> None:
        """Make them durable in the order in which they came, and let go of them."""
        for descriptor in self._descriptors[1:]:
            self._disk.begin_sync(descriptor)
        while self._descriptors:
            self._disk.sync(self._descriptors[0])
            self._disk.close(self._descriptors.pop(0))

    def close(self) -> None:
        """Let go of them as they are; safe to call twice."""
        while self._descriptors:
            self._disk.close(self._descriptors.pop())


def write_file(
    disk: Disk, path: Path, chunks: Iterable[bytes | bytearray | memoryview], later: Unsynced | None = None
) -> None:
    """Write a new file and make its content durable, or leave that for ``later``.

    Its name is durable once its directory is synced.
    """
    unsynced = Unsynced(disk) if later is None else later
    try:
        descriptor = unsynced.add(disk.create(path))
        for chunk in chunks:
            disk.write(descriptor, chunk)
        if later is None:
            unsynced.sync()
    finally:
        if later is None:
            unsynced.close()


def write_blocks(
    disk: Disk, path: Path, pieces: Iterable[memoryview], size: int, later: Unsynced | None = None
) -> bool:
    """As ``write_file``, but past the page cache; whether it was.

    The pieces begin and end at blocks of ``BLOCK`` bytes; of the last one, what is beyond ``size`` bytes is cut off.
    That is the quickest way to the disk, and the only steady one: what goes through the page cache waits for whatever
    else is in it. Where the file system has no direct writes, it goes through the cache all the same.
    """
    unsynced = Unsynced(disk) if later is None else later
    try:
        is_direct = _write_blocks(disk, path, pieces, size, unsynced)
        if later is None:
            unsynced.sync()
        return is_direct
    finally:
        if later is None:
            unsynced.close()


def _write_blocks(disk: Disk, path: Path, pieces: Iterable[memoryview], size: int, unsynced: Unsynced) -> bool:
    try:
        descriptor = unsynced.add(disk.create(path, direct=True))
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        write_file(disk, path, cut_off(pieces, size), unsynced)
        return False
    disk.allocate(descriptor, -(-size // BLOCK) * BLOCK)
    for piece in pieces:
        for begin in range(0, len(piece), _DIRECT_PIECE):
            disk.write(descriptor, piece[begin : begin + _DIRECT_PIECE])
    disk.truncate(descriptor, size)
    return True


def cut_off(pieces: Iterable[memoryview], size: int) -> Iterator[memoryview]:
    """The first ``size`` bytes, in pieces that are worth a call each."""
    left = size
    for piece in pieces:
        for begin in range(0, min(left, len(piece)), _PIECE):
            yield piece[begin : min(begin + _PIECE, left)]
        left -= min(left, len(piece))


def ensure_directory(disk: Disk, path: Path) -> None:
    """Make a directory and those above it, each one's name durable."""
    if path.is_dir():
        return
    ensure_directory(disk, path.parent)
    try:
        disk.make_directory(path)
    except FileExistsError:
        if not path.is_dir():
            raise
    disk.sync_directory(path.parent)


def remove_tree(disk: Disk, path: Path) -> None:
    """Remove a directory with all in it, or a file; links are removed, never followed. Gone already is fine."""
    try:
        if disk.is_directory(path):
            for name in disk.names(path):
                remove_tree(disk, path / name)
            disk.remove_directory(path)
        else:
            disk.remove_file(path)
    except FileNotFoundError:
        pass
