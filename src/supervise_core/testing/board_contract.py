"""The contract of a board, as tests: subclass ``BoardContract`` and run the subclass with pytest."""

from __future__ import annotations

import itertools
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import pytest

from supervise_core.board import Board

LONG = 60.0
"""Seconds that no wait of these tests takes, unless what it waits for is missed."""

NO_NAMES = [
    "",
    "/",
    "/ready",
    "ready/",
    "beat//12",
    ".",
    "..",
    "../evil",
    "beat/../../evil",
    "beat/./12",
    ".hidden",
    "ready.json",
    "two words",
    "line\nbreak",
    "ready\n",
    "zero\0",
    "back\\slash",
    "under_score",
    "caf\N{LATIN SMALL LETTER E WITH ACUTE}",
    "\N{ARABIC-INDIC DIGIT ONE}",
    "%2e%2e",
    "a" * 101,
    "/".join("a" * 101),
]


class BoardContract(ABC):
    """What every board does::

        class TestFileBoard(BoardContract):
            def make_board(self) -> Board:
                return FileBoard(self.directory / "board")

    One object of the class is made for each test; ``directory`` is an empty directory for that test alone.
    """

    directory: Path

    wakes_within: ClassVar[float] = 10.0
    """Seconds after a change in which whoever waits for it goes on, on a machine that is busy with other tests."""

    @abstractmethod
    def make_board(self) -> Board:
        """A board. Each call of one test gives another client of the same place, as another process would have it."""

    @pytest.fixture(autouse=True)
    def _give_directory(self, tmp_path: Path) -> Iterator[None]:
        self.directory = tmp_path
        self._clients: list[Board] = []
        yield
        for client in self._clients:
            client.close()

    @pytest.fixture
    def board(self) -> Board:
        """A client of an empty place."""
        return self.client()

    def client(self) -> Board:
        """Another client of the place, closed after the test."""
        self._clients.append(self.make_board())
        return self._clients[-1]

    # ---- pages

    def test_it_says_where_it_is(self, board: Board) -> None:
        assert board.location

    def test_a_new_place_has_no_pages(self, board: Board) -> None:
        assert board.get(["ready", "beat/12"]) == [None, None]
        assert board.get([]) == []
        assert board.rung(0) == set()

    def test_others_see_what_is_put_up(self, board: Board) -> None:
        other = self.client()
        board.put("ready", b"step 12")
        assert other.get(["ready"]) == [b"step 12"]
        assert board.get(["ready"]) == [b"step 12"]
        assert self.client().get(["ready"]) == [b"step 12"]

    def test_pages_come_in_the_order_asked_for(self, board: Board) -> None:
        for number in range(5):
            board.put(f"beat/{number}", b"%d" % number)
        wanted = ["beat/3", "none", "beat/0", "beat/3", "beat/4/none", "beat/1"]
        assert self.client().get(wanted) == [b"3", None, b"0", b"3", None, b"1"]

    def test_a_page_says_what_it_was_last_made_to_say(self, board: Board) -> None:
        other = self.client()
        for content in (b"first", b"2nd", b"", b"the fourth is longer than those before it", b"first"):
            board.put("ready", content)
            assert other.get(["ready"]) == [content]

    def test_an_empty_page_is_there(self, board: Board) -> None:
        board.put("empty", b"")
        assert self.client().get(["empty", "absent"]) == [b"", None]

    @pytest.mark.parametrize("size", [1, 255, 256, 65_536, 1 << 20])
    def test_a_page_holds_any_bytes(self, board: Board, size: int) -> None:
        content = (bytes(range(256)) * (size // 256 + 1))[:size]
        board.put("page", content)
        assert self.client().get(["page"]) == [content]
        board.put("page", content[::-1])
        assert self.client().get(["page"]) == [content[::-1]]

    def test_remove(self, board: Board) -> None:
        other = self.client()
        board.remove("ready")
        board.put("ready", b"1")
        assert other.get(["ready"]) == [b"1"]
        board.remove("ready")
        board.remove("ready")
        assert other.get(["ready"]) == [None]
        assert board.get(["ready"]) == [None]
        board.put("ready", b"2")
        assert other.get(["ready"]) == [b"2"]

    def test_whoever_removes_a_page_need_not_have_written_it(self, board: Board) -> None:
        board.put("ready", b"1")
        self.client().remove("ready")
        assert board.get(["ready"]) == [None]
        board.put("ready", b"2")
        assert self.client().get(["ready"]) == [b"2"]

    @pytest.mark.parametrize("page", ["a", "Z", "0", "-", "state/of/12", "A-b-9/x", "a" * 100, "/".join("b" * 100)])
    def test_names(self, board: Board, page: str) -> None:
        board.put(page, page.encode())
        board.ring(page)
        assert self.client().get([page]) == [page.encode()]
        assert self.client().rung(LONG) == {page}
        board.remove(page)
        assert self.client().get([page]) == [None]

    def test_no_two_names_are_one_page(self, board: Board) -> None:
        pages = ["a", "a/b", "a/b/c", "a-b", "a/b-c", "a-b/c", "ab", "A", "A/b", "pages/a", "bell/a", "a/a"]
        for page in pages:
            board.put(page, page.encode())
            board.ring(page)
        assert self.client().get(pages) == [page.encode() for page in pages]
        assert self.rings_of(self.client(), set(pages)) == set(pages)
        board.remove("a")
        assert self.client().get(pages) == [None] + [page.encode() for page in pages[1:]]

    @pytest.mark.parametrize("page", NO_NAMES, ids=lambda page: ascii(page)[:20])
    def test_what_is_no_name_is_refused(self, board: Board, page: str) -> None:
        calls: list[Callable[[], Any]] = [
            lambda: board.put(page, b"evil"),
            lambda: board.get(["ready", page]),
            lambda: board.remove(page),
            lambda: board.await_change(page, None, 0),
            lambda: board.ring(page),
        ]
        for call in calls:
            with pytest.raises(ValueError, match="is not the name of a page"):
                call()
        assert board.rung(0) == set()

    # ---- many at a time

    def test_readers_see_whole_pages_while_they_are_replaced(self, board: Board) -> None:
        contents = [bytes([number]) * size for number, size in enumerate((1, 70_000, 300, 1 << 20, 4096))]
        board.put("page", contents[0])
        over = threading.Event()

        def read(reader: Board) -> int:
            seen = 0
            while not over.is_set():
                [content] = reader.get(["page"])
                assert content in contents
                seen += 1
            return seen

        with self.threads(over.set) as pool:
            readings = [pool.submit(read, reader) for reader in (self.client(), self.client(), board)]
            for turn in range(60):
                board.put("page", contents[turn % len(contents)])
            over.set()
            assert all(reading.result() for reading in readings)

    def test_threads_of_one_client_write_their_pages(self, board: Board) -> None:
        def write(writer: int) -> None:
            for turn in range(20):
                board.put(f"state/{writer}", b"%d of %d" % (turn, writer))
                assert board.get([f"state/{writer}"]) == [b"%d of %d" % (turn, writer)]

        with self.threads() as pool:
            for done in [pool.submit(write, writer) for writer in range(8)]:
                done.result()
        pages = [f"state/{writer}" for writer in range(8)]
        assert self.client().get(pages) == [b"19 of %d" % writer for writer in range(8)]

    def test_a_page_that_comes_and_goes_is_whole_or_not_there(self, board: Board) -> None:
        content = b"x" * 10_000
        over = threading.Event()

        def read(reader: Board) -> None:
            while not over.is_set():
                assert reader.get(["page", "other"]) in ([None, None], [content, None])

        with self.threads(over.set) as pool:
            readings = [pool.submit(read, self.client()) for _ in range(2)]
            for _ in range(40):
                board.put("page", content)
                board.remove("page")
            over.set()
            for reading in readings:
                reading.result()

    # ---- waiting for a change

    def test_a_page_that_differs_already_is_not_waited_for(self, board: Board) -> None:
        self.client().put("ready", b"now")
        assert board.await_change("ready", None, LONG) == b"now"
        assert board.await_change("ready", b"before", LONG) == b"now"
        assert board.await_change("ready", b"", LONG) == b"now"
        assert board.await_change("absent", b"before", LONG) is None
        assert board.await_change("absent", b"", LONG) is None

    @pytest.mark.parametrize("timeout", [-1.0, 0.0, 0.4])
    def test_a_wait_ends_with_its_timeout(self, board: Board, timeout: float) -> None:
        self.client().put("ready", b"now")
        for page, known in (("ready", b"now"), ("absent", None)):
            began = time.monotonic()
            assert board.await_change(page, known, timeout) == known
            assert timeout <= time.monotonic() - began < timeout + self.wakes_within

    @pytest.mark.parametrize(("before", "after"), list(itertools.permutations([None, b"", b"text"], 2)))
    def test_a_change_wakes_who_waits_for_it(self, board: Board, before: bytes | None, after: bytes | None) -> None:
        other = self.client()
        self.say(other, before)
        with self.threads(lambda: other.put("page", b"the test failed")) as pool:
            waiting = pool.submit(board.await_change, "page", before, LONG)
            time.sleep(0.2)
            assert not waiting.done()
            self.say(other, after)
            assert self.soon(waiting) == after

    def test_every_change_of_many_is_waited_for(self, board: Board) -> None:
        other = self.client()

        def follow() -> list[bytes]:
            seen: list[bytes] = []
            while not seen or seen[-1] != b"29":
                content = board.await_change("page", seen[-1] if seen else None, LONG)
                assert content is not None
                assert not seen or content != seen[-1], "nothing came"
                other.put("seen", content)
                seen.append(content)
            return seen

        with self.threads(lambda: other.put("page", b"29")) as pool:
            following = pool.submit(follow)
            for number in range(30):
                content = b"%d" % number
                other.put("page", content)
                if number % 3 == 0:  # else it hurries on, and the reader may or may not see this one
                    seen_so_far = other.await_change("seen", None, LONG)
                    while seen_so_far != content:
                        seen_so_far, before = other.await_change("seen", seen_so_far, LONG), seen_so_far
                        assert seen_so_far != before, "it was not seen"
            seen = [int(content) for content in self.soon(following)]
        assert seen == sorted(set(seen))
        assert set(range(0, 30, 3)) <= set(seen)

    def test_other_pages_do_not_end_a_wait(self, board: Board) -> None:
        other = self.client()
        other.put("page/1", b"same")
        with self.threads() as pool:
            began = time.monotonic()
            waiting = pool.submit(board.await_change, "page/1", b"same", 1.0)
            for number in range(8):
                other.put("page", b"%d" % number)
                other.put(f"page/1/{number}", b"new")
                other.put(f"page/1{number}", b"new")
                other.remove("page/2")
                other.ring("page/1")
            assert waiting.result() == b"same"
            assert time.monotonic() - began >= 1.0

    def test_the_same_content_again_does_not_end_a_wait(self, board: Board) -> None:
        other = self.client()
        other.put("page", b"same")
        with self.threads() as pool:
            began = time.monotonic()
            waiting = pool.submit(board.await_change, "page", b"same", 1.0)
            for _ in range(5):
                other.put("page", b"same")
            assert waiting.result() == b"same"
            assert time.monotonic() - began >= 1.0

    def test_all_who_wait_wake(self, board: Board) -> None:
        waiters = [board, board, board] + [self.client() for _ in range(5)]
        with self.threads(lambda: board.put("ready", b"the test failed")) as pool:
            waiting = [pool.submit(waiter.await_change, "ready", None, LONG) for waiter in waiters]
            time.sleep(0.2)
            self.client().put("ready", b"go")
            assert [self.soon(one) for one in waiting] == [b"go"] * len(waiters)

    def test_a_thread_that_waits_keeps_no_other_from_its_call(self, board: Board) -> None:
        with self.threads(board.close) as pool:
            waiting = [pool.submit(board.await_change, f"page/{number}", None, LONG) for number in range(4)]
            listening = pool.submit(board.rung, LONG)
            time.sleep(0.2)
            began = time.monotonic()
            for turn in range(10):
                board.put("other", b"%d" % turn)
                assert board.get(["other", "absent"]) == [b"%d" % turn, None]
                board.remove("other")
                assert board.await_change("other", None, 0) is None
            assert time.monotonic() - began < self.wakes_within
            assert not listening.done()
            assert not any(one.done() for one in waiting)
            board.ring("bell")
            assert self.soon(listening) == {"bell"}
            for number, one in enumerate(waiting):
                board.put(f"page/{number}", b"%d" % number)
                assert self.soon(one) == b"%d" % number

    # ---- rings

    def test_rings_before_anybody_listens_are_heard(self, board: Board) -> None:
        other = self.client()
        for page in ("state/1", "state/2", "state/1"):
            other.ring(page)
        assert self.rings_of(board, {"state/1", "state/2"}) == {"state/1", "state/2"}

    def test_a_ring_is_taken_once(self, board: Board) -> None:
        self.client().ring("state/1")
        assert board.rung(LONG) == {"state/1"}
        assert board.rung(0) == set()
        assert board.rung(0.3) == set()

    def test_one_can_ring_again(self, board: Board) -> None:
        other = self.client()
        for _ in range(20):
            other.ring("state/1")
            assert board.rung(LONG) == {"state/1"}

    @pytest.mark.parametrize("timeout", [-1.0, 0.0, 0.4])
    def test_listening_ends_with_its_timeout(self, board: Board, timeout: float) -> None:
        began = time.monotonic()
        assert board.rung(timeout) == set()
        assert timeout <= time.monotonic() - began < timeout + self.wakes_within

    def test_a_ring_wakes_the_listener(self, board: Board) -> None:
        other = self.client()
        with self.threads(board.close) as pool:
            for page in ("state/1", "state/2", "state/1"):
                listening = pool.submit(board.rung, LONG)
                time.sleep(0.1)
                other.ring(page)
                assert self.soon(listening) == {page}

    def test_changes_of_pages_ring_nothing(self, board: Board) -> None:
        self.client().put("page", b"1")
        self.client().remove("page")
        assert board.rung(0.3) == set()

    def test_a_ring_changes_no_page(self, board: Board) -> None:
        board.put("state/1", b"as it was")
        self.client().ring("state/1")
        self.client().ring("state/2")
        assert board.get(["state/1", "state/2"]) == [b"as it was", None]

    def test_one_who_listens_after_another_hears_what_is_new(self, board: Board) -> None:
        ringer = self.client()
        for number in range(5):
            listener = self.make_board()
            ringer.ring(f"state/{number}")
            assert listener.rung(LONG) == {f"state/{number}"}
            listener.close()
        ringer.ring("state/9")
        assert board.rung(LONG) == {"state/9"}

    def test_who_puts_and_rings_is_read_after_the_ring(self, board: Board) -> None:
        ringers, turns = 4, 30

        def write(client: Board, page: str) -> None:
            for turn in range(turns):
                client.put(page, b"%d" % turn)
                client.ring(page)

        last = dict.fromkeys((f"state/{ringer}" for ringer in range(ringers)), b"")
        with self.threads(board.close) as pool:
            writing = [pool.submit(write, self.client(), page) for page in last]
            deadline = time.monotonic() + LONG
            while set(last.values()) != {b"%d" % (turns - 1)} and time.monotonic() < deadline:
                for page in board.rung(LONG / 4):
                    [content] = board.get([page])
                    assert content is not None
                    last[page] = content
            assert set(last.values()) == {b"%d" % (turns - 1)}
            for one in writing:
                one.result()

    # ---- the end

    def test_close_wakes_who_waits(self, board: Board) -> None:
        self.client().put("page", b"same")
        with self.threads() as pool:
            waiting = pool.submit(board.await_change, "page", b"same", 1e9)
            absent = pool.submit(board.await_change, "absent", None, 1e9)
            listening = pool.submit(board.rung, 1e9)
            time.sleep(0.2)
            assert not any(one.done() for one in (waiting, absent, listening))
            began = time.monotonic()
            board.close()
            assert time.monotonic() - began < self.wakes_within
            assert self.soon(waiting) == b"same"
            assert self.soon(absent) is None
            assert self.soon(listening) == set()

    def test_pages_stay_when_their_writer_closes(self, board: Board) -> None:
        other = self.client()
        other.put("page", b"stays")
        other.ring("page")
        other.close()
        other.close()
        assert board.get(["page"]) == [b"stays"]
        assert board.rung(LONG) == {"page"}

    def test_no_call_after_close(self, board: Board) -> None:
        board.close()
        calls: list[Callable[[], Any]] = [
            lambda: board.put("page", b""),
            lambda: board.get(["page"]),
            lambda: board.remove("page"),
            lambda: board.await_change("page", None, LONG),
            lambda: board.ring("page"),
            lambda: board.rung(LONG),
        ]
        for call in calls:
            with pytest.raises(ConnectionError):
                call()

    def test_one_client_that_closes_leaves_the_others_alone(self, board: Board) -> None:
        other = self.client()
        with self.threads(lambda: board.put("page", b"the test failed")) as pool:
            waiting = pool.submit(other.await_change, "page", None, LONG)
            time.sleep(0.1)
            board.close()
            self.client().put("page", b"1")
            assert self.soon(waiting) == b"1"

    # ---- help

    def say(self, board: Board, content: bytes | None) -> None:
        """Have ``page`` say that."""
        if content is None:
            board.remove("page")
        else:
            board.put("page", content)

    def soon(self, future: Future[Any]) -> Any:
        """What a thread found that should have ended by now, or should do so soon."""
        return future.result(self.wakes_within)

    def rings_of(self, board: Board, expected: set[str]) -> set[str]:
        """What was rung, which may come in several portions; heard until all that is expected was, or none came."""
        heard: set[str] = set()
        while not expected <= heard and (more := board.rung(self.wakes_within)):
            heard |= more
        return heard | board.rung(0)

    @contextmanager
    def threads(self, *free: Callable[[], object]) -> Generator[ThreadPoolExecutor, None, None]:
        """Threads for a test, which is over when they are; ``free`` frees them if it fails."""
        pool = ThreadPoolExecutor(16)
        try:
            yield pool
        except BaseException:
            for action in free:
                action()
            raise
        finally:
            pool.shutdown()
