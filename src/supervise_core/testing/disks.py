"""Disks that crash, fail, forget, or kill their process: at any one call, chosen by its number.

A *changing* call is one that makes, writes, syncs, renames or removes. They are numbered from 1. Closing a descriptor
is none of them: the kernel does it for the dead.
"""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from supervise_core.disk import BLOCK, Disk, OpenDirectory

Data = bytes | bytearray | memoryview


class Crash(BaseException):
    """The process is dead from here on. Not an ``Exception``, so that no cleanup of the living catches it."""


class WatchedDisk(Disk):
    """A real disk that keeps a list of its changing calls; ``about_to`` is asked before each."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Path]] = []
        self._paths: dict[int, Path] = {}
        self._interruption: Callable[[str, Path], bool] = lambda *_: False

    @contextmanager
    def interrupted(self, when: Callable[[str, Path], bool]) -> Generator[None, None, None]:
        """The first of two writers on this disk dies in this block, before the call that ``when`` says yes to."""
        self._interruption = when
        try:
            yield
        except Crash:
            pass
        finally:
            self._interruption = lambda *_: False

    def about_to(self, method: str, path: Path) -> None:
        """Called before each changing call; whatever it raises, the call does not happen."""

    def about_to_read(self, method: str, path: Path) -> None:
        """Called before ``look_up`` and ``open_directory``, and ``read`` and ``read_into``, both called "read"."""

    def count(self, method: str) -> int:
        """How many changing calls of this kind there were."""
        return sum(name == method for name, _ in self.calls)

    def _before(self, method: str, path: Path) -> None:
        self.calls.append((method, path))
        if self._interruption(method, path):
            raise Crash(f"before {method} {path}")
        self.about_to(method, path)

    def make_directory(self, path: Path) -> None:
        self._before("make_directory", path)
        super().make_directory(path)

    def create(self, path: Path, *, direct: bool = False) -> int:
        self._before("create", path)
        descriptor = super().create(path, direct=direct)
        self._paths[descriptor] = path
        return descriptor

    def allocate(self, descriptor: int, size: int) -> None:
        self._before("allocate", self._paths[descriptor])
        super().allocate(descriptor, size)

    def truncate(self, descriptor: int, size: int) -> None:
        self._before("truncate", self._paths[descriptor])
        super().truncate(descriptor, size)

    def write(self, descriptor: int, data: Data) -> None:
        self._before("write", self._paths[descriptor])
        super().write(descriptor, data)

    def sync(self, descriptor: int) -> None:
        self._before("sync", self._paths[descriptor])
        super().sync(descriptor)

    def sync_file(self, path: Path) -> None:
        self._before("sync_file", path)
        super().sync_file(path)

    def close(self, descriptor: int) -> None:
        self._paths.pop(descriptor, None)
        super().close(descriptor)

    def sync_directory(self, path: Path) -> None:
        self._before("sync_directory", path)
        super().sync_directory(path)

    def rename(self, source: Path, target: Path) -> None:
        self._before("rename", target)
        super().rename(source, target)

    def link(self, source: Path, target: Path) -> None:
        self._before("link", target)
        super().link(source, target)

    def exchange(self, one: Path, other: Path) -> None:
        self._before("exchange", other)
        super().exchange(one, other)

    def remove_file(self, path: Path) -> None:
        self._before("remove_file", path)
        super().remove_file(path)

    def remove_directory(self, path: Path) -> None:
        self._before("remove_directory", path)
        super().remove_directory(path)

    def look_up(self, name: str | Path, within: int | None = None, *, directory: bool = False) -> int:
        self.about_to_read("look_up", Path(name))
        return super().look_up(name, within, directory=directory)

    def open_directory(self, path: Path, wanted: Callable[[str], bool] | None = None) -> OpenDirectory:
        self.about_to_read("open_directory", path)
        return super().open_directory(path, wanted)

    def read(self, directory: OpenDirectory, name: str) -> bytearray:
        self.about_to_read("read", directory.path / name)
        return super().read(directory, name)

    def read_into(self, directory: OpenDirectory, name: str, at: int, buffers: Sequence[memoryview]) -> int:
        self.about_to_read("read", directory.path / name)
        return super().read_into(directory, name, at, buffers)


class HastyDisk(Disk):
    """A real disk that syncs nothing: for tests in which no power is cut, many times faster."""

    def sync(self, descriptor: int) -> None:
        return None

    def sync_file(self, path: Path) -> None:
        return None

    def sync_directory(self, path: Path) -> None:
        return None


class LinklessDisk(WatchedDisk):
    """A real disk on which no file can have two names."""

    def link(self, source: Path, target: Path) -> None:
        self._before("link", target)
        raise OSError(errno.EPERM, os.strerror(errno.EPERM), str(target))


class DirectDisk(Disk):
    """A real disk that seems to write past the page cache whatever the file system."""

    def create(self, path: Path, *, direct: bool = False) -> int:
        return super().create(path)


class CachedDisk(WatchedDisk):
    """A real disk that everything goes to through the page cache: it has no direct writes."""

    def create(self, path: Path, *, direct: bool = False) -> int:
        if direct:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), str(path))
        return super().create(path)


class CrashingDisk(WatchedDisk):
    """Raises ``Crash`` before the changing call of that number, and before every one after it.

    ``crash_before`` may be set later, counted from the first call of all; None: it does not crash.
    """

    def __init__(self, crash_before: int | None = None) -> None:
        super().__init__()
        self.crash_before = crash_before

    @property
    def crashed(self) -> bool:
        return self.crash_before is not None and len(self.calls) >= self.crash_before

    def about_to(self, method: str, path: Path) -> None:
        if self.crashed:
            raise Crash(f"before call {self.crash_before}: {method} {path}")


class KillingDisk(WatchedDisk):
    """Kills its own process, with SIGKILL, before the changing call of that number."""

    def __init__(self, kill_before: int) -> None:
        super().__init__()
        self._kill_before = kill_before

    def about_to(self, method: str, path: Path) -> None:
        if len(self.calls) >= self._kill_before:
            os.kill(os.getpid(), signal.SIGKILL)


class FaultyDisk(WatchedDisk):
    """Fails chosen calls with an error of the operating system; whole until ``fail`` is called.

    A ``write`` that fails has written half of the data.
    """

    def __init__(self) -> None:
        super().__init__()
        self.failures: list[tuple[str, Path]] = []
        self._error = 0
        self._method: str | None = None
        self._countdown = 0
        self._forever = False

    def fail(self, error: int, at: int = 1, *, method: str | None = None, forever: bool = False) -> None:
        """From now on fail with this errno: the ``at``-th call of ``method`` (None: the ``at``-th changing call).

        ``forever`` fails every later call of the kind as well. ``method`` may be ``"read"``, ``"look_up"`` or
        ``"open_directory"``.
        """
        self._error, self._method, self._countdown, self._forever = error, method, at, forever

    def heal(self) -> None:
        """Fail no more."""
        self._countdown = 0

    def about_to(self, method: str, path: Path) -> None:
        if self._method in (None, method):
            self._count_down(method, path)

    def about_to_read(self, method: str, path: Path) -> None:
        if self._method == method:
            self._count_down(method, path)

    def write(self, descriptor: int, data: Data) -> None:
        try:
            super().write(descriptor, data)
        except OSError:
            view = memoryview(data).cast("B")
            half = len(view) // 2
            Disk.write(self, descriptor, view[: half // BLOCK * BLOCK if half >= BLOCK else half])
            raise

    def _count_down(self, method: str, path: Path) -> None:
        if not self._countdown:
            return
        self._countdown -= 1
        if not self._countdown:
            self._countdown = 1 if self._forever else 0
            self.failures.append((method, path))
            self._raise(path)

    def _raise(self, path: Path) -> NoReturn:
        raise OSError(self._error, os.strerror(self._error), str(path))
