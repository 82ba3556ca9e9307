"""Boards in memory: several clients of one place, as several processes have it, in one process and with any clock."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager

from supervise_core.board import Board, check_page
from supervise_core.clock import Clock, SystemClock


class MemoryPlace:
    """What several boards share, as several processes share a directory or a server."""

    def __init__(self) -> None:
        self.pages: dict[str, bytes] = {}
        self.rings: set[str] = set()
        self.loses_rings = False
        """A fault: from now on nobody hears a ring."""
        self.is_away = False
        """A fault: nobody can reach it."""
        self._lock = threading.Lock()
        self._waiting: set[threading.Event] = set()

    @contextmanager
    def held(self) -> Generator[None, None, None]:
        """Nothing changes while the block runs."""
        with self._lock:
            yield

    @contextmanager
    def changing(self) -> Generator[None, None, None]:
        """Whoever waits looks again after the block."""
        with self._lock:
            yield
            for event in self._waiting:
                event.set()

    @contextmanager
    def watched(self) -> Generator[threading.Event, None, None]:
        """An event that every change from now on sets."""
        event = threading.Event()
        with self._lock:
            self._waiting.add(event)
        try:
            yield event
        finally:
            with self._lock:
                self._waiting.discard(event)


class MemoryBoard(Board):
    """A board in memory. Those of one ``place`` see the same pages; a wait takes its time from the clock."""

    def __init__(self, place: MemoryPlace | None = None, clock: Clock | None = None) -> None:
        self.place = place or MemoryPlace()
        self.location = "memory"
        self.calls: Counter[str] = Counter()
        """How often each method was called, and how many pages were asked for (``pages``)."""
        self._clock = clock or SystemClock()
        self._closed = False
        self._cut_off = False

    # ---- faults

    def cut_off(self) -> None:
        """A fault: as if the way to the place was lost. Calls, and waits that are under way, raise."""
        with self.place.changing():
            self._cut_off = True

    def reconnect(self) -> None:
        """The way to the place is there again."""
        self._cut_off = False

    # ---- the port

    def put(self, page: str, content: bytes) -> None:
        self._call("put", page)
        with self.place.changing():
            self.place.pages[page] = bytes(content)

    def get(self, pages: Sequence[str]) -> list[bytes | None]:
        self._call("get", *pages)
        with self.place.held():
            return [self.place.pages.get(page) for page in pages]

    def remove(self, page: str) -> None:
        self._call("remove", page)
        with self.place.changing():
            self.place.pages.pop(page, None)

    def await_change(self, page: str, known: bytes | None, timeout: float) -> bytes | None:
        self._call("await_change", page)
        self._wait_until(lambda: self.place.pages.get(page) != known, timeout)
        return known if self._closed else self.place.pages.get(page)

    def ring(self, page: str) -> None:
        self._call("ring", page)
        with self.place.changing():
            if not self.place.loses_rings:
                self.place.rings.add(page)

    def rung(self, timeout: float) -> set[str]:
        self._call("rung")
        self._wait_until(lambda: bool(self.place.rings), timeout)
        with self.place.held():
            rung = set() if self._closed else set(self.place.rings)
            self.place.rings -= rung
            return rung

    def close(self) -> None:
        with self.place.changing():
            self._closed = True

    def _call(self, method: str, *pages: str) -> None:
        for page in pages:
            check_page(page)
        self.calls[method] += 1
        self.calls["pages"] += len(pages)
        if self._closed:
            raise ConnectionError("this board was closed")
        self._check()

    def _check(self) -> None:
        if self._cut_off or self.place.is_away:
            raise ConnectionError("this board was cut off from its place")

    def _wait_until(self, happened: Callable[[], bool], timeout: float) -> None:
        deadline = self._clock.monotonic() + timeout
        while True:
            with self.place.watched() as event:
                with self.place.held():
                    over = self._closed or happened()
                self._check()
                left = deadline - self._clock.monotonic()
                if over or left <= 0:
                    return
                self._clock.wait(event, left)
