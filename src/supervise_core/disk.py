"""The only file that changes a file system: each create, write, fsync, rename and removal of the core is a method here.

Each method is one call to the operating system, so that a test can crash before any one of them, fail it, or forget
what was never fsynced.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import stat
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from operator import attrgetter
from pathlib import Path
from typing import Any, Final
from weakref import finalize

_READ_FLAGS: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC

BLOCK: Final = 4096
"""What memory and sizes of direct writes are multiples of; enough for every disk in use."""

_PIECE: Final = 16 << 20
_WORTH_DIRECT: Final = 1 << 20
_DIRECT_READ: Final = 2 << 20
"""What one direct read takes: a huge page, and little enough to be in the cache still when it is copied from there."""

_of_thread: Final = threading.local()
_CANNOT_PROMISE: Final = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)

_AT_FDCWD: Final = -100
_RENAME_EXCHANGE: Final = 2


_NBYTES: Final = attrgetter("nbytes")
_LOWEST_BIT: Final = bytes(value & 1 for value in range(256))
_NOTHING: Final = ctypes.c_char * 0
_libc: Any = ctypes.CDLL(None, use_errno=True)
_mmap, _munmap, _mincore = _libc.mmap, _libc.munmap, _libc.mincore
_mmap.restype = ctypes.c_void_p
_mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64)
_munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
_sync_file_range: Any = getattr(_libc, "sync_file_range", None)  # Linux alone has it
if _sync_file_range is not None:
    _sync_file_range.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
_SYNC_FILE_RANGE_WRITE: Final = 2
_MAP_FAILED: Final = ctypes.c_void_p(-1).value


class Disk:
    """A file system, one call at a time."""

    def make_directory(self, path: Path) -> None:
        """Make one directory; its parent must exist, and it must not."""
        os.mkdir(path)

    def create(self, path: Path, *, direct: bool = False) -> int:
        """Create a file that must not exist yet; an open descriptor for writing.

        ``direct``: past the page cache, in blocks of ``BLOCK`` bytes from memory that begins at such a block.

        :raises OSError: with EINVAL if it cannot be written like that; nothing was created then.
        """
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
        try:
            return os.open(path, flags | (os.O_DIRECT if direct else 0), 0o644)
        except OSError as error:
            if direct and error.errno == errno.EINVAL and os.path.lexists(path):
                os.unlink(path)  # Linux makes the name before it finds that there are no direct writes
            raise

    def allocate(self, descriptor: int, size: int) -> None:
        """Have room for so many bytes; nothing where the file system cannot promise it.

        :raises OSError: if there is no room.
        """
        try:
            os.posix_fallocate(descriptor, 0, size)
        except OSError as error:
            if error.errno not in _CANNOT_PROMISE:
                raise

    def write(self, descriptor: int, data: bytes | bytearray | memoryview) -> None:
        """Append all of the data."""
        view = memoryview(data).cast("B")
        while view:
            view = view[os.write(descriptor, view) :]

    def truncate(self, descriptor: int, size: int) -> None:
        """Cut off what is beyond so many bytes."""
        os.ftruncate(descriptor, size)

    def begin_sync(self, descriptor: int) -> None:
        """Have a file's content set off for the disk, and do not wait for it: nothing is promised.

        A file system that finds a place for new content as late as it can finds one now. No error is lost: whoever
        waits for the content is told.
        """
        if _sync_file_range is not None:
            _sync_file_range(descriptor, 0, 0, _SYNC_FILE_RANGE_WRITE)

    def sync(self, descriptor: int) -> None:
        """Make a file's content survive a power cut."""
        os.fsync(descriptor)

    def sync_file(self, path: Path) -> None:
        """Make the content of a file durable that something else wrote."""
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def close(self, descriptor: int) -> None:
        """Let go of a file that was created or looked up."""
        os.close(descriptor)

    def sync_directory(self, path: Path) -> None:
        """Make a directory's names survive a power cut."""
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        except OSError as error:
            if error.errno != errno.EINVAL:  # some file systems have no fsync for directories, and need none
                raise
        finally:
            os.close(descriptor)

    def rename(self, source: Path, target: Path) -> None:
        """Rename; the target must not exist as a non-empty directory."""
        os.rename(source, target)

    def link(self, source: Path, target: Path) -> None:
        """Give a file a further name."""
        os.link(source, target)

    def exchange(self, one: Path, other: Path) -> None:
        """Give each of two names what the other one names, in one instant.

        :raises OSError: with ``errno.ENOTSUP`` where the system or the file system cannot.
        """
        _exchange(os.fsencode(one), os.fsencode(other))

    def remove_file(self, path: Path) -> None:
        """Remove one file's name."""
        os.unlink(path)

    def remove_directory(self, path: Path) -> None:
        """Remove an empty directory."""
        os.rmdir(path)

    # ---- reading

    def names(self, path: Path) -> list[str]:
        """The names in a directory, sorted; none when it does not exist."""
        try:
            return sorted(os.listdir(path))
        except FileNotFoundError:
            return []

    def is_directory(self, path: Path) -> bool:
        """Whether it is a directory itself, not a link to one."""
        try:
            return stat.S_ISDIR(os.lstat(path).st_mode)
        except FileNotFoundError:
            return False

    def size(self, path: Path) -> int:
        """The size of a file in bytes."""
        return os.lstat(path).st_size

    def look_up(self, name: str | Path, within: int | None = None, *, directory: bool = False) -> int:
        """Open for reading what has that name in an open directory (None: a path); a descriptor.

        Links are not followed.
        """
        return os.open(name, _READ_FLAGS | (os.O_DIRECTORY if directory else 0), dir_fd=within)

    def open_directory(self, path: Path, wanted: Callable[[str], bool] | None = None) -> OpenDirectory:
        """Hold a directory and its files (those wanted) open, so that what is there now can be read to the end."""
        return OpenDirectory(path, wanted)

    def read(self, directory: OpenDirectory, name: str) -> bytearray:
        """The whole content of a file held open."""
        return directory.read(name)

    def read_into(self, directory: OpenDirectory, name: str, at: int, buffers: Sequence[memoryview]) -> int:
        """Fill buffers from a file held open, from that byte on; how many bytes there were. From any thread."""
        return directory.read_into(name, at, buffers)


class OpenDirectory:
    """A directory held open with its regular files: readable in full even when it is renamed or removed meanwhile.

    Links, devices and pipes in it are not followed and not opened; they count as not there.
    """

    def __init__(self, path: Path, wanted: Callable[[str], bool] | None = None) -> None:
        self.path = path
        self._opened = opened = list[int]()
        self._directs: dict[str, int | None] = {}
        self._opening = threading.Lock()
        self._finalizer = finalize(self, close_all, opened)
        try:
            here = os.open(path, _READ_FLAGS | os.O_DIRECTORY)
            opened.append(here)
            self.files: Mapping[str, int] = dict(_open_regular_files(here, opened, wanted))
        except BaseException:
            self.close()
            raise

    def size(self, name: str) -> int:
        """The size of a file in bytes."""
        return os.fstat(self.files[name]).st_size

    def read(self, name: str) -> bytearray:
        """The whole content of a file; shorter if the file was cut off meanwhile."""
        content = bytearray(self.size(name))
        with memoryview(content) as view:
            done = self.read_into(name, 0, [view])
        del content[done:]
        return content

    def read_into(self, name: str, at: int, buffers: Sequence[memoryview]) -> int:
        """Fill buffers from a file, from that byte on; how many bytes there were.

        What the page cache has is taken from there. What it has not, if it is much, is read past it: that is quicker,
        and leaves in the cache what others have there.

        :raises ValueError: if the directory was closed: its descriptors may be of other files by now.
        """
        if not self._finalizer.alive:
            raise ValueError(f"{self.path.name} was closed; what is wanted of it is read while it is open")
        left, done = list(buffers), 0
        wanted = sum(map(_NBYTES, left))
        while done < wanted and (count := self._read_some(name, at + done, left, wanted - done)):
            done += count
            if done < wanted:
                _take_off(left, count)
        return done

    def _read_some(self, name: str, at: int, buffers: Sequence[memoryview], wanted: int) -> int:
        descriptor = self.files[name]
        if wanted >= _WORTH_DIRECT and not _is_cached(descriptor, at, wanted):
            direct = self._direct(name)
            if direct is not None:
                return _read_direct(direct, at, buffers, wanted)
        return os.preadv(descriptor, buffers, at)

    def _direct(self, name: str) -> int | None:
        """A descriptor of the same file that reads past the page cache; None where there is none."""
        with self._opening:
            if name not in self._directs:
                try:
                    opened = os.open(f"/proc/self/fd/{self.files[name]}", os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
                except OSError:  # not on this file system, or there is no /proc: the usual way is always there
                    self._directs[name] = None
                else:
                    self._opened.append(opened)
                    self._directs[name] = opened
            return self._directs[name]

    def chunks(self, name: str) -> Iterator[bytes]:
        """The content of a file, piece by piece."""
        descriptor, done = self.files[name], 0
        while piece := os.pread(descriptor, _PIECE, done):
            done += len(piece)
            yield piece

    def close(self) -> None:
        """Let go of the files; safe to call twice, and done by the garbage collector at the latest."""
        self._finalizer()


def _exchange(one: bytes, other: bytes) -> None:
    """``renameat2`` with ``RENAME_EXCHANGE`` (Linux 3.15; see its manual page), which Python does not offer."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        raise OSError(errno.ENOTSUP, "this system cannot exchange two names") from None
    if renameat2(_AT_FDCWD, one, _AT_FDCWD, other, _RENAME_EXCHANGE) == 0:
        return
    number = ctypes.get_errno()
    if number in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
        raise OSError(errno.ENOTSUP, "this file system cannot exchange two names", os.fsdecode(other))
    raise OSError(number, os.strerror(number), os.fsdecode(other))


def _open_regular_files(
    directory: int, opened: list[int], wanted: Callable[[str], bool] | None
) -> Iterable[tuple[str, int]]:
    for name in filter(wanted, os.listdir(directory)) if wanted else os.listdir(directory):
        try:
            descriptor = os.open(name, _READ_FLAGS, dir_fd=directory)
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.ENXIO, errno.EISDIR):
                continue
            raise
        opened.append(descriptor)
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            yield name, descriptor


def _is_cached(descriptor: int, at: int, nbytes: int) -> bool:
    """Whether the page cache has most of a range; asked in a way that has nothing read."""
    begin = at // mmap.PAGESIZE * mmap.PAGESIZE
    length = at + nbytes - begin
    pages = -(-length // mmap.PAGESIZE)
    mapped = _mmap(None, length, mmap.PROT_READ, mmap.MAP_SHARED, descriptor, begin)
    if mapped in (None, _MAP_FAILED):
        return True
    resident = (ctypes.c_ubyte * pages)()
    known = _mincore(mapped, length, resident) == 0
    _munmap(mapped, length)
    return not known or 2 * bytes(resident).translate(_LOWEST_BIT).count(1) >= pages


def _take_off(buffers: list[memoryview], nbytes: int) -> None:
    """Leave of the buffers only what is not filled yet."""
    while buffers and nbytes >= buffers[0].nbytes:
        nbytes -= buffers.pop(0).nbytes
    if buffers:
        buffers[0] = buffers[0][nbytes:]


def _read_direct(descriptor: int, at: int, buffers: Sequence[memoryview], wanted: int) -> int:
    """Read whole blocks into memory of this thread that begins at a block, and copy from there."""
    blocks = _blocks_of_this_thread()
    left = deque((_address_of(buffer), buffer.nbytes) for buffer in buffers)
    done = 0
    while done < wanted:
        begin = (at + done) // BLOCK * BLOCK
        size = min(len(blocks), -(-(at + wanted - begin) // BLOCK) * BLOCK)
        passed_over = at + done - begin
        taken = min(wanted - done, os.preadv(descriptor, [blocks[:size]], begin) - passed_over)
        if taken <= 0:
            break
        _scatter(_address_of(blocks) + passed_over, taken, left)
        done += taken
    return done


def _scatter(source: int, nbytes: int, left: deque[tuple[int, int]]) -> None:
    """Copy to where there is room left, as addresses and sizes, and take that off."""
    while nbytes:
        target, room = left.popleft()
        count = min(nbytes, room)
        ctypes.memmove(target, source, count)  # unlike a slice, it lets other threads run
        source += count
        nbytes -= count
        if count < room:
            left.appendleft((target + count, room - count))


def _address_of(view: memoryview) -> int:
    return ctypes.addressof(_NOTHING.from_buffer(view))


def _blocks_of_this_thread() -> memoryview:
    blocks: memoryview | None = getattr(_of_thread, "blocks", None)
    if blocks is None:
        memory = mmap.mmap(-1, _DIRECT_READ, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with suppress(OSError):  # without huge pages the disk gets smaller requests, and that is all
            memory.madvise(mmap.MADV_HUGEPAGE)
        blocks = _of_thread.blocks = memoryview(memory)
    return blocks


def close_all(descriptors: list[int]) -> None:
    """Close them, and forget each one as it is closed."""
    while descriptors:
        os.close(descriptors.pop())
