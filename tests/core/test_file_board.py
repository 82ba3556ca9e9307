"""What the board in files makes of shared directories, faults, and processes that die."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random

import pytest

from supervise_core.clock import SystemClock
from supervise_core.disk import Disk
from supervise_core.file_board import FileBoard
from supervise_core.testing.clock import FakeClock
from supervise_core.testing.disks import FaultyDisk, WatchedDisk

WRITER = """
import sys
from supervise_core.file_board import FileBoard
board = FileBoard(sys.argv[1])
number = 0
while True:
    number += 1
    content = b"%d " % number * (1 + number * 7919 % 20_000)
    board.put("state/page", content)
    board.ring("state/page")
    if number == 3:
        print("begun", flush=True)
"""


class CountingDisk(WatchedDisk):
    """Counts what is read, too."""

    def __init__(self) -> None:
        super().__init__()
        self.looks = 0
        self.listings = 0

    def about_to_read(self, method: str, path: Path) -> None:
        self.looks += method == "look_up"

    def names(self, path: Path) -> list[str]:
        self.listings += 1
        return super().names(path)


class JumpingClock(SystemClock):
    """Waits take no time, and it is later after them."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def wait(self, event: threading.Event, timeout: float | None) -> bool:
        assert timeout is not None
        self.now += timeout
        return event.is_set()


class TwoStepDisk(Disk):
    """Renames as a network file system does when the old file is in use: until somebody misses it, the name is gone."""

    def __init__(self) -> None:
        self.missed = threading.Event()

    def rename(self, source: Path, target: Path) -> None:
        if target.exists():
            self.missed.clear()
            super().rename(target, target.with_name(".nfs0001"))
            assert self.missed.wait(10)
        super().rename(source, target)

    def look_up(self, name: str | Path, within: int | None = None, *, directory: bool = False) -> int:
        try:
            return super().look_up(name, within, directory=directory)
        except FileNotFoundError:
            self.missed.set()
            raise


class SweptDisk(Disk):
    """The first draft is swept while its writer is frozen."""

    def __init__(self) -> None:
        self.renames = 0

    def rename(self, source: Path, target: Path) -> None:
        self.renames += 1
        if self.renames == 1:
            source.unlink()
        super().rename(source, target)


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def is_whole(content: bytes) -> bool:
    words = content.split()
    return bool(words) and len(set(words)) == 1 and len(words) == 1 + int(words[0]) * 7919 % 20_000


@pytest.mark.campaign(small=5, soak=100)
def test_a_writer_that_is_killed_leaves_whole_pages(tmp_path: Path, count: int, seed: int) -> None:
    random = Random(seed)
    reader = FileBoard(tmp_path)
    seen = 0
    for _ in range(count):
        process = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE)
        assert process.stdout is not None
        with process:
            assert process.stdout.readline() == b"begun\n"
            end = time.monotonic() + random.uniform(0, 0.3)
            while time.monotonic() < end:
                [content] = reader.get(["state/page"])
                assert content is not None
                assert is_whole(content)
                reader.rung(0)
                seen += 1
            process.send_signal(signal.SIGKILL)
        [content] = FileBoard(tmp_path).get(["state/page"])
        assert content is not None
        assert is_whole(content)
    assert seen >= count
    assert len(list((tmp_path / "drafts").iterdir())) <= count


def test_drafts_of_the_dead_are_swept_by_the_listener(tmp_path: Path) -> None:
    clock = FakeClock()
    listener = FileBoard(tmp_path, clock=clock)
    listener.put("page", b"stays")
    old, new = tmp_path / "drafts" / "dead-1", tmp_path / "drafts" / "dead-2"
    old.write_bytes(b"half")
    listener.rung(0)
    clock.advance(30)
    new.write_bytes(b"half")
    listener.rung(0)
    assert old.exists()
    clock.advance(31)
    listener.rung(0)
    assert not old.exists()
    assert new.exists()
    clock.advance(61)
    listener.rung(0)
    assert not new.exists()
    assert listener.get(["page"]) == [b"stays"]


def test_one_whose_draft_was_swept_writes_another(tmp_path: Path) -> None:
    board = FileBoard(tmp_path, disk=SweptDisk())
    board.put("page", b"content")
    assert board.get(["page"]) == [b"content"]


def test_a_page_whose_name_is_gone_while_it_is_replaced_is_there_all_the_time(tmp_path: Path) -> None:
    disk = TwoStepDisk()
    writer, reader = FileBoard(tmp_path, disk=disk), FileBoard(tmp_path, disk=disk)
    writer.put("page", b"0")
    known = reader.get(["page"])[0]
    assert known == b"0"
    with ThreadPoolExecutor(1) as pool:
        for number in range(1, 10):
            writing = pool.submit(writer.put, "page", b"%d" % number)
            while not writing.done():
                assert reader.get(["page"]) in ([known], [b"%d" % number])
            known = b"%d" % number


@pytest.mark.parametrize("harm", [b"", b"0123", b"x" * 40])
def test_a_page_that_a_power_cut_left_half_written_is_not_there(tmp_path: Path, harm: bytes) -> None:
    board = FileBoard(tmp_path)
    board.put("state/1", b"content")
    [file] = (tmp_path / "pages").rglob("*.page")
    file.write_bytes(harm)
    assert board.get(["state/1"]) == [None]
    assert FileBoard(tmp_path).get(["state/1"]) == [None]
    board.put("state/1", b"again")
    assert board.get(["state/1"]) == [b"again"]


def test_a_file_that_was_replaced_while_it_was_opened_is_opened_again(tmp_path: Path) -> None:
    disk = FaultyDisk()
    board = FileBoard(tmp_path, disk=disk)
    board.put("state/1", b"content")
    for at in (1, 2, 3):  # the directories, and the file
        disk.fail(errno.ESTALE, at, method="look_up")
        assert board.get(["state/1"]) == [b"content"]
    assert len(disk.failures) == 3
    disk.fail(errno.ESTALE, method="look_up")
    board.remove("state/1")
    assert board.get(["state/1"]) == [None]


@pytest.mark.parametrize("error", [errno.EIO, errno.ESTALE, errno.EACCES, errno.ETIMEDOUT])
def test_what_cannot_be_read_is_a_lost_connection(tmp_path: Path, error: int) -> None:
    disk = FaultyDisk()
    board = FileBoard(tmp_path, disk=disk)
    board.put("page", b"content")
    disk.fail(error, method="look_up", forever=True)
    with pytest.raises(ConnectionError, match=str(tmp_path)) as caught:
        board.await_change("page", b"content", 60)
    assert caught.value.errno == error
    disk.heal()
    assert board.get(["page"]) == [b"content"]


@pytest.mark.parametrize("method", ["create", "write", "rename"])
def test_what_cannot_be_written_is_a_lost_connection_and_leaves_no_draft(tmp_path: Path, method: str) -> None:
    disk = FaultyDisk()
    board = FileBoard(tmp_path, disk=disk)
    board.put("page", b"before")
    disk.fail(errno.ENOSPC, method=method)
    with pytest.raises(ConnectionError, match="No space left"):
        board.put("page", b"after")
    assert list((tmp_path / "drafts").iterdir()) == []
    assert board.get(["page"]) == [b"before"]
    board.put("page", b"after")
    assert board.get(["page"]) == [b"after"]


def test_rings_taken_before_an_error_are_not_lost(tmp_path: Path) -> None:
    disk = FaultyDisk()
    board = FileBoard(tmp_path, disk=disk)
    for page in ("a", "b", "c"):
        board.ring(page)
    disk.fail(errno.EIO, 2, method="remove_file")
    assert board.rung(0) == {"a"}
    disk.fail(errno.EIO, method="remove_file")
    with pytest.raises(ConnectionError):
        board.rung(0)
    assert board.rung(0) == {"b", "c"}


def test_what_a_file_system_keeps_beside_the_rings_is_no_ring(tmp_path: Path) -> None:
    board = FileBoard(tmp_path)
    board.ring("state/1")
    (tmp_path / "bell" / ".nfs000000000001").touch()
    (tmp_path / "bell" / "some thing").touch()
    assert board.rung(0) == {"state/1"}
    assert board.rung(0) == set()


def test_a_board_whose_directory_is_removed_is_made_again(tmp_path: Path) -> None:
    board = FileBoard(tmp_path / "board")
    board.put("state/1", b"content")
    os.rename(tmp_path / "board", tmp_path / "gone")
    assert board.get(["state/1"]) == [None]
    board.put("state/1", b"again")
    board.ring("state/1")
    assert FileBoard(tmp_path / "board").get(["state/1"]) == [b"again"]
    assert board.rung(0) == {"state/1"}


def test_a_file_in_the_place_of_the_directory_is_a_lost_connection(tmp_path: Path) -> None:
    (tmp_path / "board").touch()
    with pytest.raises(ConnectionError):
        FileBoard(tmp_path / "board").put("page", b"")


def test_twins_do_not_write_each_others_drafts(tmp_path: Path) -> None:
    board, twin = FileBoard(tmp_path), FileBoard(tmp_path)
    twin._token = board._token
    (tmp_path / "drafts").mkdir()
    (tmp_path / "drafts" / f"{board._token}-0").write_bytes(b"of the twin, at this moment")
    board.put("page", b"1")
    twin.put("page", b"2")
    assert board.get(["page"]) == [b"2"]
    assert [path.name for path in (tmp_path / "drafts").iterdir()] == [f"{board._token}-0"]


def test_waiting_looks_often_at_first_and_ten_times_a_second_in_the_end(tmp_path: Path) -> None:
    clock, disk = JumpingClock(), CountingDisk()
    board = FileBoard(tmp_path, clock=clock, disk=disk)
    each = 2  # the directory of the pages, and the page
    assert board.await_change("ready", None, 0.3) is None
    assert 8 <= disk.looks / each <= 14
    disk.looks = 0
    assert board.await_change("ready", None, 60.0) is None
    assert 550 <= disk.looks / each <= 650
    assert clock.monotonic() == pytest.approx(60.3)
    assert disk.listings == 0


def test_looks_do_not_grow_with_the_number_of_pages(tmp_path: Path) -> None:
    disk = CountingDisk()
    board = FileBoard(tmp_path, disk=disk)
    for number in range(100):
        board.put(f"state/{number}", b"content")
    disk.looks = disk.listings = 0
    assert board.get(["state/1"]) == [b"content"]
    assert disk.looks == 3
    assert board.get([f"state/{number}" for number in range(100)]) == [b"content"] * 100
    assert disk.looks == 3 + 102
    assert disk.listings == 0
    assert board.rung(0) == set()
    assert disk.listings <= 2
    assert disk.looks == 3 + 102


def test_no_descriptor_is_left_open(tmp_path: Path) -> None:
    disk = FaultyDisk()
    board = FileBoard(tmp_path, disk=disk)
    board.put("state/1", b"content")
    before = descriptors()
    for _ in range(3):
        board.put("state/1", b"content")
        board.get(["state/1", "none/1", "state/none", "state/1/none"])
        board.remove("none/1")
        board.ring("state/1")
        board.rung(0)
        board.await_change("state/1", None, 0)
    for method in ("look_up", "create", "write", "rename"):
        for at in (1, 2, 3):
            disk.fail(errno.EIO, at, method=method)
            for action in (lambda: board.get(["state/1", "none/1"]), lambda: board.put("state/1", b"x")):
                try:
                    action()
                except ConnectionError:
                    continue
            disk.heal()
    assert descriptors() == before


def test_the_random_numbers_of_the_program_stay_as_they_were(tmp_path: Path) -> None:
    import random

    state = random.getstate()
    FileBoard(tmp_path).await_change("page", None, 0.1)
    assert random.getstate() == state
