"""Main memory by address: compared and copied without the interpreter's lock, so that other threads go on meanwhile."""

from __future__ import annotations

import ctypes
import gc
import mmap
import os
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, Final, NamedTuple

from supervise_core.disk import BLOCK
from supervise_core.hashing import digest_of

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

_SAMPLE: Final = 4096
"""How much is compared in each of three places before all of a large tensor is read."""

_WORTH_A_THREAD: Final = 32 << 20

_TASK: Final = 16 << 20
"""The most that one of two threads takes on at a time."""

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


def in_blocks(chunks: Iterable[memoryview], size: int) -> Iterator[memoryview]:
    """The chunks one after another, ``size`` bytes, in whole blocks of memory that begins at a block.

    Two pieces of memory are given in turns, so that one can be written from while the other is filled.
    """
    nbytes = min(_GATHERED, _up_to_block(size))
    buffers = [own_memory(nbytes)]
    filled = 0
    for chunk in chunks:
        done = 0
        while done < len(chunk):
            buffer = buffers[0]
            count = min(len(chunk) - done, nbytes - filled)
            if chunk.readonly:
                buffer[filled : filled + count] = chunk[done : done + count]
            else:
                copy(address_of(buffer) + filled, address_of(chunk) + done, count)
            done += count
            filled += count
            if filled == nbytes:
                yield buffer
                buffers = [own_memory(nbytes) if len(buffers) == 1 else buffers[1], buffer]
                filled = 0
    if filled:
        yield buffers[0][: _up_to_block(filled)]


def _up_to_block(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def bring_up_to_date(moves: Sequence[Move], digests: Mapping[int, bytes] | None = None) -> list[bool]:
    """Copy what differs; of each move, whether anything did.

    ``digests`` are the hashes (see ``hashing``) of what lies at some of the targets: there only the source is read to
    see that it is the same, which is a third less to read and write. Of what differs only the beginning is compared.
    Two threads share what is worth it: one alone does not use the whole of the memory's speed.
    """
    known = digests or {}
    differed = [False] * len(moves)
    if sum(move.nbytes for move in moves) < _WORTH_A_THREAD or (os.cpu_count() or 1) < 2:
        for number, move in enumerate(moves):
            differed[number] = _update(move, known.get(move.target))
        return differed
    waiting = deque(_tasks(moves, known))

    def work() -> None:
        while True:
            try:
                number, move = waiting.popleft()
            except IndexError:
                return
            if _update(move, known.get(move.target)):
                differed[number] = True

    with ThreadPoolExecutor(1, "supervise-core copies") as other:
        second = other.submit(work)
        work()
        second.result()
    return differed


def _tasks(moves: Sequence[Move], digests: Mapping[int, bytes]) -> Iterator[tuple[int, Move]]:
    """The moves with their numbers, large ones cut unless they are compared as a whole."""
    for number, move in enumerate(moves):
        if move.nbytes <= _TASK or move.target in digests:
            yield number, move
            continue
        for begin in range(0, move.nbytes, _TASK):
            yield number, Move(move.target + begin, move.source + begin, min(_TASK, move.nbytes - begin))


def _update(move: Move, digest: bytes | None) -> bool:
    target, source, nbytes = move
    if digest is not None and _looks_the_same(move) and digest_of(view_at(source, nbytes)) == digest:
        return False
    done = 0
    while done < nbytes:
        if _memcmp(target + done, source + done, min(_STRIDE, nbytes - done)):
            ctypes.memmove(target + done, source + done, nbytes - done)
            return True
        done += _STRIDE
    return False


def _looks_the_same(move: Move) -> bool:
    """Whether it is worth reading all of it: what is trained differs nearly everywhere."""
    target, source, nbytes = move
    size = min(_SAMPLE, nbytes)
    places = (0, (nbytes - size) // 2, nbytes - size)
    return not any(_memcmp(target + at, source + at, size) for at in places)
