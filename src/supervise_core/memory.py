"""Main memory by address: compared and copied without the interpreter's lock, so that other threads go on meanwhile."""

from __future__ import annotations

import ctypes
import gc
import mmap
import os
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, Final, NamedTuple

from supervise_core.disk import BLOCK

_NOTHING: Final = ctypes.c_char * 0
_WRITABLE: Final = 0x200  # PyBUF_WRITE

_memcmp: Any = ctypes.CDLL(None).memcmp
_memcmp.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
_memcmp.restype = ctypes.c_int

_madvise: Any = ctypes.CDLL(None, use_errno=True).madvise
_madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_WIPE_ON_FORK: Final = 18  # Linux 4.14
_POPULATE_WRITE: Final = 23  # Linux 5.14; see madvise(2)

_view_from_memory: Any = ctypes.pythonapi.PyMemoryView_FromMemory
_view_from_memory.argtypes = (ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int)
_view_from_memory.restype = ctypes.py_object

_STRIDE: Final = 1 << 20
"""How much is compared before it is copied: enough to be quick, and little enough to be in the cache still."""

_WORTH_A_THREAD: Final = 32 << 20

_GATHERED: Final = 16 << 20


class Move(NamedTuple):
    """So many bytes from one address to another; the ranges do not overlap, and whoever owns them keeps them alive."""

    target: int
    source: int
    nbytes: int


def own_memory(nbytes: int) -> memoryview:
    """New memory that begins at a page, every page of it there already; forked children find it empty.

    Memory that the kernel has to find first takes several times as long to write to as memory that is there, and huge
    pages are found quickest. Shared with children it would become copy-on-write with each fork; and what they did not
    have at all, they could give to somebody else, and take from him when they end.
    """
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    view = memoryview(memory)
    begin = address_of(view)
    for advice in (_WIPE_ON_FORK, mmap.MADV_HUGEPAGE):
        _madvise(begin, nbytes, advice)  # a kernel that cannot do it says so, and nothing is lost but speed
    if _madvise(begin, nbytes, _POPULATE_WRITE) != 0:
        ctypes.memset(begin, 0, nbytes)
    return view


def address_of(view: memoryview) -> int:
    """Where writable memory begins."""
    return ctypes.addressof(_NOTHING.from_buffer(view))


def view_at(address: int, nbytes: int) -> memoryview:
    """Writable memory at an address; the caller sees to it that its owner outlives the view."""
    view: memoryview = _view_from_memory(address, nbytes, _WRITABLE)
    return view


def copy(target: int, source: int, nbytes: int) -> None:
    """Copy between ranges that do not overlap."""
    ctypes.memmove(target, source, nbytes)


@contextmanager
def no_collection() -> Generator[None, None, None]:
    """Without the garbage collector while many small objects are made and no garbage is: it would go through all that
    the program has, more than once, and take longer than the work itself."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def in_blocks(chunks: Iterable[memoryview], size: int, seen: Callable[[memoryview], object]) -> Iterator[memoryview]:
    """The chunks one after another, ``size`` bytes, in whole blocks of memory that begins at a block.

    The same memory is given again and again. ``seen`` gets each piece first, without what only fills the last block.
    """
    buffer = own_memory(min(_GATHERED, _up_to_block(size)))
    begin, capacity, filled = address_of(buffer), len(buffer), 0
    for chunk in chunks:
        done, nbytes = 0, len(chunk)
        while done < nbytes:
            count = min(nbytes - done, capacity - filled)
            if chunk.readonly:
                buffer[filled : filled + count] = chunk[done : done + count]
            else:
                copy(begin + filled, address_of(chunk) + done, count)
            done += count
            filled += count
            if filled == capacity:
                seen(buffer)
                yield buffer
                filled = 0
    if filled:
        seen(buffer[:filled])
        yield buffer[: _up_to_block(filled)]


def _up_to_block(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def bring_up_to_date(moves: Sequence[Move]) -> list[bool]:
    """Copy what differs; of each move, whether anything did.

    What is the same is read and not written, which takes as long as copying it. Of what differs only the beginning is
    compared. Two threads share what is worth it: one alone does not use the whole of the memory's speed.
    """
    halves = _halves(moves)
    if halves is None or (os.cpu_count() or 1) < 2:
        return [_update(move) for move in moves]
    with ThreadPoolExecutor(1, "supervise-core copies") as other:
        second = other.submit(_update_all, halves[1])
        differed = [*_update_all(halves[0]), *second.result()]
    if len(differed) == len(moves):
        return differed
    middle = len(halves[0]) - 1  # of this one each half had a part
    return [*differed[:middle], differed[middle] or differed[middle + 1], *differed[middle + 2 :]]


def _update_all(moves: Sequence[Move]) -> list[bool]:
    return [_update(move) for move in moves]


def _update(move: Move) -> bool:
    target, source, nbytes = move
    done = 0
    while done < nbytes:
        if _memcmp(target + done, source + done, min(_STRIDE, nbytes - done)):
            ctypes.memmove(target + done, source + done, nbytes - done)
            return True
        done += _STRIDE
    return False


def _halves(moves: Sequence[Move]) -> tuple[list[Move], list[Move]] | None:
    """Two halves of the bytes, a move in the middle cut in two; None if it is not worth it."""
    half = sum(move.nbytes for move in moves) // 2
    if half < _WORTH_A_THREAD:
        return None
    before = 0
    for index, (target, source, nbytes) in enumerate(moves):
        if before + nbytes >= half:
            cut = half - before
            first, second = [*moves[:index], Move(target, source, cut)], list(moves[index + 1 :])
            return first, [Move(target + cut, source + cut, nbytes - cut), *second] if cut < nbytes else second
        before += nbytes
    return None
