"""Freeing a thread that waits in a collective for a peer that will never come.

What PyTorch does by itself, seen with version 2.13 and gloo: when the process of a peer has ended, however it did, the
kernel closes its connections, and every collective with it raises a ``RuntimeError`` within some 10 ms. When the peer
only stands still (frozen, or in an endless loop), the thread waits as long as the ``timeout=`` of its process group
says, which is half an hour by default; ``abort``, ``shutdown`` and ``destroy_process_group`` return at once and free
nobody. NCCL's groups can be aborted.

A gloo group can be ended from below. Each has a thread ``gloo_tcp_loop`` that waits for its connections with ``epoll``,
and Linux tells which those are. Shut down, they read as those of a peer that has ended. No other connection of the
program is touched, the store's neither.
"""

from __future__ import annotations

import logging
import os
import re
import socket
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Final

import torch.distributed as dist

_log = logging.getLogger(__name__)

_TASKS: Final = Path("/proc/self/task")
_LOOP: Final = "gloo_tcp_loop"
_WATCHED: Final = re.compile(r"^tfd:\s*(\d+) .*\bino:([0-9a-f]+)", re.MULTILINE)
_PATIENCE: Final = 2.0
_PAUSE: Final = 0.002


def abort_process_groups() -> None:
    """End all process groups of this process: a collective that waits raises, and so does every further one.

    For a run that has lost a peer and is about to end. It may be called by any thread, and more than once, and returns
    within seconds; ``destroy_process_group`` may follow. A thread that is still setting up a group with a peer that is
    missing is not freed.
    """
    if not dist.is_available() or not dist.is_initialized():
        return
    for group in _groups():
        try:
            group.abort()
        except (RuntimeError, NotImplementedError) as error:
            _log.warning("a process group could not be aborted: %s", error)
    ended = sum(_shut_down(descriptor, inode) for descriptor, inode in _connections_of_gloo())
    _log.warning("the process groups were aborted, %d connections of gloo with them", ended)


def _groups() -> list[dist.ProcessGroup]:
    """All of them, the last one first, as PyTorch ends them; there is no public list."""
    return list(reversed(dist.distributed_c10d._world.pg_map))


def _connections_of_gloo() -> Iterator[tuple[int, int]]:
    """Descriptors, and the inodes by which to know them again."""
    deadline = time.monotonic() + _PATIENCE
    waiting = {task for task in _TASKS.iterdir() if _read(task / "comm").strip() == _LOOP}
    while waiting:
        for task in sorted(waiting):
            watcher = _watcher_of(task)
            if watcher is not None:
                waiting.discard(task)
                watched = _WATCHED.findall(_read(Path(f"/proc/self/fdinfo/{watcher}")))
                yield from ((int(descriptor), int(inode, 16)) for descriptor, inode in watched)
        if time.monotonic() > deadline:
            return
        time.sleep(_PAUSE if waiting else 0)


def _watcher_of(task: Path) -> int | None:
    """The descriptor that a thread waits on, the first argument of its system call; None while it is running."""
    call = _read(task / "syscall").split()
    if len(call) < 2 or not call[1].startswith("0x"):
        return None
    descriptor = int(call[1], 16)
    try:
        kind = os.readlink(f"/proc/self/fd/{descriptor}")
    except OSError:
        return None
    return descriptor if kind == "anon_inode:[eventpoll]" else None


def _shut_down(descriptor: int, inode: int) -> bool:
    """End one connection, if that is what the descriptor still is; gloo itself closes it."""
    try:
        copy = os.dup(descriptor)
    except OSError:
        return False
    try:
        with closing(socket.socket(fileno=copy)) as connection:
            if os.fstat(copy).st_ino != inode:
                return False
            connection.getpeername()  # not that by which it listens
            connection.shutdown(socket.SHUT_RDWR)
    except OSError:  # it is no connection, or none any more
        return False
    return True


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
