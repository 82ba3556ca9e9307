"""A board in a shared directory, for machines that have nothing else in common.

A page ``beat/12`` is the file ``pages/beat/12.page``: the hash of its content, and the content. It is written as a
draft in ``drafts/`` and renamed. A ring is a file in ``bell/``, named after its page, which the listener removes: while
nothing rings, listening is one look at an empty directory, however many processes there are.

Nothing here needs more than names and whole files, so that it works where little else does. On a network file system:

* Changes are found by looking, after 5 ms at first and every 100 ms in the long run. There is no inotify for what
  another machine does, clocks of machines differ, and locks may be missing.
* A machine remembers for up to a minute that a name was *not* there, or which file it was. What it remembers it checks
  against the directory's own change counter, and that one it asks the server for whenever a directory is *opened*. So
  every look opens the directories on the way to a page, each within the one above it, and then the page. That is one
  short question each, and no list of names, however many pages are there. The uppermost ones are made by everyone,
  since making a directory is never answered from memory.
* Opening a file asks the server, too; what was written is with the server when the writer has closed it, and that is
  before the rename. A page's file is never changed after that. ``ESTALE`` (replaced between the look-up of its name and
  the opening) is no more than a reason to look again.
* The rename is not quite one instant when somebody on the writer's machine has the old page open: that machine first
  renames the old file, to keep it for its reader. So a page that was there is looked for again, four times in
  a seventh of a second, before it counts as removed.
* What the server's clock is too coarse to tell apart (NFS 3: two changes of a directory within some milliseconds) may
  stay unseen until the next change in that directory. Pages that beat are such changes; a minute is the most.

Nothing is synced. All that a sync adds is that a page survives a power cut, and the run that it was written for does
not. A page that a power cut left half written is told by its hash, and counts as not there.

A writer that is killed leaves a draft behind. Whoever listens removes the drafts that it saw a minute ago already. It
need not know whether their writers live: one whose draft is gone writes another.
"""

from __future__ import annotations

import errno
import itertools
import os
import random
import secrets
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final, TypeVar

from supervise_core.board import Board, check_page
from supervise_core.clock import Clock, SystemClock
from supervise_core.disk import Disk
from supervise_core.hashing import hash_of

_SHORTEST: Final = 0.005
_LONGEST: Final = 0.1
_GROWTH: Final = 1.5
_SPREAD: Final = 0.1
_SWEEP_EVERY: Final = 60.0
_TRIES: Final = 8
_LOOKS: Final = (0.01, 0.02, 0.04, 0.08)
"""Seconds between two looks for a page that was there, or is not whole."""

_SUFFIX: Final = ".page"  # no part of a name, so that the page "beat" and the directory of "beat/12" can both be there
_HEAD: Final = 33
_PIECE: Final = 1 << 20
_T = TypeVar("_T")


class FileBoard(Board):
    """Pages as files below a directory that all processes see. It is made if it is not there."""

    def __init__(
        self, directory: str | os.PathLike[str], *, clock: Clock | None = None, disk: Disk | None = None
    ) -> None:
        self._directory = Path(directory).absolute()
        self.location = str(self._directory)
        self._clock = clock or SystemClock()
        self._disk = disk or Disk()
        self._pages, self._bell, self._drafts = (self._directory / name for name in ("pages", "bell", "drafts"))
        self._token = secrets.token_hex(8)
        self._numbers = itertools.count()
        self._random = random.Random(self._token)  # not the one that the training program may have seeded
        self._closed = threading.Event()
        self._made = False
        self._seen: set[str] = set()
        self._left_over: set[str] = set()
        self._next_sweep = self._clock.monotonic()

    def put(self, page: str, content: bytes) -> None:
        check_page(page)
        with self._connected():
            self._publish(self._path(page), [_head(content), content])

    def get(self, pages: Sequence[str]) -> list[bytes | None]:
        for page in pages:
            check_page(page)
        with self._connected():
            return self._find(pages)

    def remove(self, page: str) -> None:
        check_page(page)

        def remove(directories: _Directories) -> None:
            directories.of(page)  # so that what this machine remembers of it is not believed
            self._disk.remove_file(self._path(page))

        with self._connected(), suppress(FileNotFoundError):
            self._within_directories(remove)

    def await_change(self, page: str, known: bytes | None, timeout: float) -> bytes | None:
        check_page(page)
        with self._connected():
            for _ in self._looks(timeout):
                [content] = self._find([page])
                if content != known:
                    return content
        return known

    def ring(self, page: str) -> None:
        check_page(page)
        with self._connected():
            self._publish(self._bell / page.replace("/", "."), [])

    def rung(self, timeout: float) -> set[str]:
        with self._connected():
            for _ in self._looks(timeout):
                if pages := self._take_rings():
                    return pages
                self._sweep_now_and_then()
        return set()

    def close(self) -> None:
        self._closed.set()

    @contextmanager
    def _connected(self) -> Generator[None, None, None]:
        if self._closed.is_set():
            raise ConnectionError(f"the board {self.location} was closed")
        try:
            if not self._made:
                for directory in (self._pages, self._bell, self._drafts):
                    self._make(directory)
                self._made = True
            yield
        except ConnectionError:
            raise
        except OSError as error:
            raise ConnectionError(error.errno, f"the board {self.location} cannot be reached: {error}") from error

    def _looks(self, timeout: float) -> Iterator[None]:
        """Now, again and again while the time lasts, and a last time at its end; none any more after ``close``."""
        deadline = self._clock.monotonic() + timeout
        delay = _SHORTEST
        while True:
            yield
            left = deadline - self._clock.monotonic()
            if left <= 0 or self._clock.wait(self._closed, min(delay, left)):
                return
            # who began at the same moment does not go on looking at the same moments
            delay = min(_GROWTH * delay, _LONGEST) * self._random.uniform(1 - _SPREAD, 1 + _SPREAD)

    # ---- reading

    def _path(self, page: str) -> Path:
        return self._pages / f"{page}{_SUFFIX}"

    def _find(self, pages: Sequence[str]) -> list[bytes | None]:
        found = self._look(pages)
        for delay in _LOOKS:
            doubtful = [page for page, content in found.items() if content is None and page in self._seen]
            if not doubtful or self._closed.wait(delay):
                break
            found |= self._look(doubtful)
        for page, content in found.items():
            (self._seen.discard if content is None else self._seen.add)(page)
        return [found[page] for page in pages]

    def _look(self, pages: Sequence[str]) -> dict[str, bytes | None]:
        return self._within_directories(lambda directories: {page: self._read(directories, page) for page in pages})

    def _within_directories(self, action: Callable[[_Directories], _T]) -> _T:
        for left in reversed(range(_TRIES)):
            directories = _Directories(self._disk, self._pages)
            try:
                return action(directories)
            except OSError as error:
                if error.errno != errno.ESTALE or not left:
                    raise
            finally:
                directories.close()
        raise AssertionError

    def _read(self, directories: _Directories, page: str) -> bytes | None:
        try:
            descriptor = self._disk.look_up(f"{page.rpartition('/')[2]}{_SUFFIX}", directories.of(page))
        except FileNotFoundError:
            return None
        try:
            file = b"".join(iter(lambda: os.read(descriptor, _PIECE), b""))
        finally:
            self._disk.close(descriptor)
        head, content = file[:_HEAD], file[_HEAD:]
        return content if head == _head(content) else None

    # ---- writing

    def _publish(self, path: Path, content: list[bytes]) -> None:
        for _ in range(_TRIES):
            draft = self._drafts / f"{self._token}-{next(self._numbers)}"
            try:
                self._write(draft, content)
                self._disk.rename(draft, path)
                return
            except FileExistsError:  # of a twin of this process, forked from it with the same token
                continue
            except OSError as error:
                with suppress(OSError):
                    self._disk.remove_file(draft)
                if error.errno not in (errno.ENOENT, errno.ESTALE):
                    raise
            # there is no such directory yet, or the draft was swept while this process was frozen
            self._make(self._drafts)
            self._make(path.parent)
        raise OSError(errno.EAGAIN, f"{path} could not be written in {_TRIES} attempts")

    def _write(self, draft: Path, content: list[bytes]) -> None:
        descriptor = self._disk.create(draft)
        try:
            for piece in content:
                self._disk.write(descriptor, piece)
        finally:
            self._disk.close(descriptor)

    def _make(self, directory: Path) -> None:
        try:
            self._disk.make_directory(directory)
        except FileExistsError:
            pass
        except FileNotFoundError:
            if not self._disk.is_directory(directory.parent):
                self._make(directory.parent)
            with suppress(FileExistsError):
                self._disk.make_directory(directory)

    # ---- rings

    def _take_rings(self) -> set[str]:
        taken = set[str]()
        for name in self._disk.names(self._bell):
            if (page := _rung_page(name)) is None:
                continue
            try:
                self._disk.remove_file(self._bell / name)
            except FileNotFoundError:
                pass  # a server that answers late is asked twice, and the second time it is not there any more
            except OSError:
                if taken:
                    break  # the rest is still there when it is listed again
                raise
            taken.add(page)
        return taken

    def _sweep_now_and_then(self) -> None:
        if self._clock.monotonic() < self._next_sweep:
            return
        self._next_sweep = self._clock.monotonic() + _SWEEP_EVERY
        drafts = set(self._disk.names(self._drafts))
        for name in drafts & self._left_over:
            with suppress(FileNotFoundError):
                self._disk.remove_file(self._drafts / name)
        self._left_over = drafts


class _Directories:
    """The directories on the way to pages, opened for one look, each within the one above it."""

    def __init__(self, disk: Disk, pages: Path) -> None:
        self._disk = disk
        self._pages = pages
        self._opened: dict[str, int] = {}

    def of(self, page: str) -> int:
        """The directory that a page's file is in.

        :raises FileNotFoundError: if there is none.
        """
        return self._open(page.rpartition("/")[0])

    def _open(self, words: str) -> int:
        if words not in self._opened:
            above, _, name = words.rpartition("/")
            within = self._open(above) if words else None
            self._opened[words] = self._disk.look_up(name if words else self._pages, within, directory=True)
        return self._opened[words]

    def close(self) -> None:
        for descriptor in self._opened.values():
            self._disk.close(descriptor)


def _head(content: bytes) -> bytes:
    return hash_of([content]).encode() + b"\n"


def _rung_page(name: str) -> str | None:
    """The page that a file in ``bell/`` is of; None if a file system keeps something of its own there."""
    try:
        return check_page(name.replace(".", "/"))
    except ValueError:
        return None
