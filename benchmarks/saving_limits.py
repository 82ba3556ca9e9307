"""What the machine can do at best with the same bytes: copy, hash, write and read them, and nothing else."""

from __future__ import annotations

import ctypes
import mmap
import os
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import torch
import xxhash

from benchmarks.saving_state import State

_PIECE: Final = 16 << 20
_PAGE: Final = mmap.PAGESIZE
_LARGEST_IMAGE: Final = 1 << 30

_mincore: Any = ctypes.CDLL(None, use_errno=True).mincore
_mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)


class Limits:
    """The limits for one state. ``kept`` is another state like it, which is there to be copied and read into."""

    def __init__(self, state: State, kept: State, folder: Path) -> None:
        self._state = state
        self._kept = kept
        self._path = folder / "raw"
        self._size = -(-state.nbytes // _PAGE) * _PAGE
        self._other = ThreadPoolExecutor(1)
        largest = max(tensor.nbytes for tensor in state.tensors)
        nbytes = min(self._size, max(_LARGEST_IMAGE, -(-largest // _PAGE) * _PAGE))
        self._image = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._image.madvise(mmap.MADV_HUGEPAGE)
        for begin in range(0, len(self._image), 1 << 20):
            self._image[begin : begin + (1 << 20)] = os.urandom(min(1 << 20, len(self._image) - begin))
        self.write()

    def memcpy(self) -> float:
        """Seconds to copy every tensor into memory in huge pages that was written to before; one thread or two, as is
        quicker."""
        moves: list[tuple[int, int, int]] = []
        begin, at = ctypes.addressof(ctypes.c_char.from_buffer(self._image)), 0
        for tensor in self._state.tensors:
            if at + tensor.nbytes > len(self._image):
                at = 0
            moves.append((begin + at, tensor.data_ptr(), tensor.nbytes))
            at += tensor.nbytes
        middle = len(moves) // 2
        alone = seconds(lambda: _move(moves))
        began = time.perf_counter()
        other = self._other.submit(_move, moves[middle:])
        _move(moves[:middle])
        other.result()
        return min(alone, time.perf_counter() - began)

    def xxh3(self) -> float:
        """Seconds to hash every tensor."""
        views = [tensor.detach().reshape(-1).view(torch.uint8).numpy().data for tensor in self._state.tensors]
        digest = xxhash.xxh3_128()
        began = time.perf_counter()
        for view in views:
            digest.update(view)
        return time.perf_counter() - began

    def write(self) -> float:
        """Seconds to write so many bytes past the page cache in large pieces, and to have them durable."""
        self._path.unlink(missing_ok=True)
        os.sync()
        began = time.perf_counter()
        descriptor = open_direct(self._path, os.O_WRONLY | os.O_CREAT)
        for piece in self._pieces():
            os.write(descriptor, piece)
        os.fsync(descriptor)
        os.close(descriptor)
        return time.perf_counter() - began

    def read_warm(self) -> float:
        """Seconds to read a file of the same bytes from the page cache straight into tensors."""
        into = [tensor.detach().reshape(-1).view(torch.uint8).numpy().data for tensor in self._kept.tensors]
        with self._path.open("rb", buffering=0) as file:
            while file.read(_PIECE):
                pass
            file.seek(0)
            began = time.perf_counter()
            for view in into:
                done = 0
                while done < len(view):
                    done += file.readinto(view[done:]) or 0
            return time.perf_counter() - began

    def read_cold(self) -> float:
        """Seconds to read a file of the same bytes past the page cache, in large pieces."""
        forget([self._path])
        began = time.perf_counter()
        descriptor = open_direct(self._path, os.O_RDONLY)
        for piece in self._pieces():
            os.readv(descriptor, [piece])
        os.close(descriptor)
        return time.perf_counter() - began

    def _pieces(self) -> Iterable[memoryview]:
        view = memoryview(self._image)
        for begin in range(0, self._size, _PIECE):
            there = begin % len(view)
            yield view[there : there + min(_PIECE, self._size - begin)]


def _move(moves: Iterable[tuple[int, int, int]]) -> None:
    for target, source, nbytes in moves:
        ctypes.memmove(target, source, nbytes)


def open_direct(path: Path, flags: int) -> int:
    """A descriptor past the page cache; through it where the file system has no direct access."""
    try:
        return os.open(path, flags | os.O_DIRECT)
    except OSError:
        return os.open(path, flags)


def forget(paths: Iterable[Path]) -> None:
    """Have the page cache hold nothing of these files, which must be durable."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def cached_share(paths: Iterable[Path]) -> float:
    """The share of the pages of these files that the page cache holds."""
    there = pages = 0
    for path in paths:
        size = path.stat().st_size
        if not size:
            continue
        with (
            path.open("rb") as file,
            mmap.mmap(file.fileno(), size, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE) as mapped,
        ):
            count = -(-size // _PAGE)
            found = (ctypes.c_ubyte * count)()
            whole = (ctypes.c_char * size).from_buffer(mapped)
            if _mincore(ctypes.addressof(whole), size, found) != 0:
                raise OSError(ctypes.get_errno(), "mincore")
            del whole
            pages += count
            there += sum(page & 1 for page in found)
    return there / max(1, pages)


def seconds(call: Callable[[], object]) -> float:
    """How long it takes."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began
