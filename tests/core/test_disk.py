"""One call at a time to the file system, and what is made of several."""

from __future__ import annotations

import errno
import gc
import os
import random
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from supervise_core.disk import BLOCK, Disk, OpenDirectory, _is_cached
from supervise_core.durable_files import Unsynced, ensure_directory, remove_tree, write_blocks, write_file
from supervise_core.memory import own_memory
from supervise_core.testing.disks import Crash, CrashingDisk, FaultyDisk, WatchedDisk
from supervise_core.testing.power_cuts import Everything, LossyDisk, NamesWithoutContent


@pytest.fixture
def disk() -> WatchedDisk:
    return WatchedDisk()


def test_write_file_syncs_once_at_its_end(disk: WatchedDisk, tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_file(disk, path, [b"ab", bytearray(b"cd"), memoryview(b"ef")])
    assert path.read_bytes() == b"abcdef"
    assert [method for method, _ in disk.calls] == ["create", "write", "write", "write", "sync"]


def test_write_file_never_overwrites(disk: WatchedDisk, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"there")
    with pytest.raises(FileExistsError):
        write_file(disk, path, [b"new"])
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FileExistsError):
        write_file(disk, tmp_path / "link", [b"new"])
    assert path.read_bytes() == b"there"
    assert not (tmp_path / "elsewhere").exists()


def test_write_takes_items_of_any_width(disk: WatchedDisk, tmp_path: Path) -> None:
    write_file(disk, tmp_path / "file", [memoryview(b"abcdefgh").cast("d")])
    assert (tmp_path / "file").read_bytes() == b"abcdefgh"


def test_ensure_directory_syncs_each_new_name(disk: WatchedDisk, tmp_path: Path) -> None:
    ensure_directory(disk, tmp_path / "a" / "b")
    ensure_directory(disk, tmp_path / "a" / "b")
    assert disk.calls == [
        ("make_directory", tmp_path / "a"),
        ("sync_directory", tmp_path),
        ("make_directory", tmp_path / "a" / "b"),
        ("sync_directory", tmp_path / "a"),
    ]


def test_ensure_directory_below_a_file_is_an_error(disk: WatchedDisk, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OSError, match="file"):
        ensure_directory(disk, tmp_path / "file")


def test_remove_tree_removes_links_and_not_what_they_name(disk: WatchedDisk, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept").write_bytes(b"kept")
    tree = tmp_path / "tree"
    (tree / "inner").mkdir(parents=True)
    (tree / "inner" / "link").symlink_to(outside)
    (tree / "file").write_bytes(b"")
    remove_tree(disk, tree)
    remove_tree(disk, tree)
    assert not tree.exists()
    assert (outside / "kept").exists()
    (tmp_path / "link").symlink_to(outside)
    remove_tree(disk, tmp_path / "link")
    assert (outside / "kept").exists()


def test_names_of_what_is_not_there(disk: WatchedDisk, tmp_path: Path) -> None:
    assert disk.names(tmp_path / "absent") == []
    assert not disk.is_directory(tmp_path / "absent")


def test_a_link_to_a_directory_is_no_directory(disk: WatchedDisk, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    assert disk.is_directory(tmp_path)
    assert not disk.is_directory(tmp_path / "link")
    with pytest.raises(OSError, match="link"):
        disk.open_directory(tmp_path / "link")


def test_open_directory_outlives_its_removal(disk: WatchedDisk, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    path.mkdir()
    (path / "file").write_bytes(b"content")
    held = disk.open_directory(path)
    remove_tree(disk, path)
    assert held.size("file") == 7
    assert disk.read(held, "file") == b"content"
    held.close()
    held.close()


def test_open_directory_holds_regular_files_alone(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("file")
    os.mkfifo(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as listening:
        here = os.getcwd()
        os.chdir(tmp_path)  # the path of a socket must be short
        try:
            listening.bind("socket")
        finally:
            os.chdir(here)
        held = OpenDirectory(tmp_path)
    assert list(held.files) == ["file"]
    held.close()


def test_open_directory_leaves_nothing_open(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    before = os.listdir("/proc/self/fd") if os.path.isdir("/proc/self/fd") else []
    OpenDirectory(tmp_path).close()
    held = OpenDirectory(tmp_path)
    del held
    with pytest.raises(FileNotFoundError):
        OpenDirectory(tmp_path / "absent")
    assert not before or len(os.listdir("/proc/self/fd")) == len(before)


# ---- durable together


def open_files() -> int:
    """How many there are, less those that only garbage of other tests holds."""
    gc.collect()
    return len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0


def test_files_are_made_durable_together_in_their_order(tmp_path: Path) -> None:
    disk = LossyDisk(tmp_path)
    before = open_files()
    later = Unsynced(disk)
    write_file(disk, tmp_path / "small", [b"ab", b"c"], later)
    blocks = own_memory(2 * BLOCK)
    blocks[:] = b"x" * len(blocks)
    write_blocks(disk, tmp_path / "large", [blocks], BLOCK + 5, later)
    disk.sync_directory(tmp_path)
    assert disk.count("sync") == 0
    later.sync()
    assert [path.name for method, path in disk.calls if method == "sync"] == ["small", "large"]
    assert open_files() == before
    disk.power_cut()
    assert tree(tmp_path) == {"large": b"x" * (BLOCK + 5), "small": b"abc"}


class SettingOffDisk(Disk):
    """A real disk that notes which files set off, and which are waited for."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def begin_sync(self, descriptor: int) -> None:
        self.notes.append(f"{os.fstat(descriptor).st_size} set off")
        super().begin_sync(descriptor)

    def sync(self, descriptor: int) -> None:
        self.notes.append(f"{os.fstat(descriptor).st_size} is waited for")
        super().sync(descriptor)


def test_all_files_set_off_before_the_first_is_waited_for(tmp_path: Path) -> None:
    disk = SettingOffDisk()
    later = Unsynced(disk)
    for size in (1, 2, 3):
        write_file(disk, tmp_path / str(size), [bytes(size)], later)
    assert disk.notes == []
    later.sync()
    assert disk.notes == [
        "2 set off", "3 set off", "1 is waited for", "2 is waited for", "3 is waited for"
    ]  # fmt: skip


def test_what_is_not_left_for_later_is_durable_at_once(tmp_path: Path) -> None:
    disk = LossyDisk(tmp_path)
    write_file(disk, tmp_path / "small", [b"ab", b"c"])
    write_blocks(disk, tmp_path / "large", [own_memory(BLOCK)], 7)
    disk.sync_directory(tmp_path)
    disk.power_cut()
    assert tree(tmp_path) == {"large": bytes(7), "small": b"abc"}


@pytest.mark.parametrize("let_go", [Unsynced.close, lambda later: None], ids=["closed", "forgotten"])
def test_files_that_are_given_up_are_not_synced_and_not_held(
    tmp_path: Path, let_go: Callable[[Unsynced], None]
) -> None:
    disk = LossyDisk(tmp_path)
    before = open_files()
    later = Unsynced(disk)
    write_file(disk, tmp_path / "file", [b"content"], later)
    let_go(later)
    del later
    assert open_files() == before
    disk.sync_directory(tmp_path)
    disk.power_cut()
    assert tree(tmp_path) == {"file": b""}


def test_a_file_that_fails_is_not_held(tmp_path: Path) -> None:
    disk = FaultyDisk()
    before = open_files()
    later = Unsynced(disk)
    disk.fail(errno.ENOSPC, method="write")
    with pytest.raises(OSError, match="No space left"):
        write_file(disk, tmp_path / "file", [b"content"], later)
    disk.fail(errno.EIO, 2, method="sync")
    for name in "abc":
        write_file(disk, tmp_path / name, [b"content"], later)
    with pytest.raises(OSError, match="Input/output"):
        later.sync()
    later.close()
    assert open_files() == before


# ---- the doubles themselves


def test_crashing_disk_does_nothing_more(tmp_path: Path) -> None:
    disk = CrashingDisk(crash_before=3)
    with pytest.raises(Crash):
        write_file(disk, tmp_path / "file", [b"a", b"b", b"c"])
    assert (tmp_path / "file").read_bytes() == b"a"
    with pytest.raises(Crash):
        disk.make_directory(tmp_path / "more")
    assert not (tmp_path / "more").exists()


def test_faulty_disk_writes_half(tmp_path: Path) -> None:
    disk = FaultyDisk()
    disk.fail(28, 2, method="write")
    with pytest.raises(OSError, match="No space left"):
        write_file(disk, tmp_path / "file", [b"1234", b"5678"])
    assert (tmp_path / "file").read_bytes() == b"123456"
    write_file(disk, tmp_path / "other", [b"1234", b"5678"])
    assert disk.failures == [("write", tmp_path / "file")]


def lossy(tmp_path: Path) -> LossyDisk:
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "file").write_bytes(b"old")
    return LossyDisk(tmp_path)


def tree(path: Path) -> dict[str, bytes | None]:
    return {
        str(found.relative_to(path)): found.read_bytes() if found.is_file() else None
        for found in sorted(path.rglob("*"))
    }


def test_power_cut_forgets_names_that_were_not_synced(tmp_path: Path) -> None:
    disk = lossy(tmp_path)
    disk.make_directory(tmp_path / "new")
    write_file(disk, tmp_path / "new" / "file", [b"synced content, unsynced name"])
    disk.rename(tmp_path / "old", tmp_path / "renamed")
    disk.power_cut()
    assert tree(tmp_path) == {"old": None, "old/file": b"old"}


def test_power_cut_keeps_what_was_synced(tmp_path: Path) -> None:
    disk = lossy(tmp_path)
    disk.make_directory(tmp_path / "new")
    write_file(disk, tmp_path / "new" / "file", [b"new"])
    disk.sync_directory(tmp_path / "new")
    disk.rename(tmp_path / "old" / "file", tmp_path / "new" / "other")
    disk.sync_directory(tmp_path)
    disk.sync_directory(tmp_path / "old")  # either side of the rename will do
    disk.power_cut()
    assert tree(tmp_path) == {"new": None, "new/file": b"new", "new/other": b"old", "old": None}


def test_power_cut_brings_back_what_was_removed_without_a_sync(tmp_path: Path) -> None:
    disk = lossy(tmp_path)
    remove_tree(disk, tmp_path / "old")
    disk.power_cut()
    assert tree(tmp_path) == {"old": None, "old/file": b"old"}


def test_power_cut_empties_files_whose_names_survive(tmp_path: Path) -> None:
    disk = lossy(tmp_path)
    descriptor = disk.create(tmp_path / "file")
    disk.write(descriptor, b"never synced")
    disk.close(descriptor)
    disk.power_cut(NamesWithoutContent())
    assert tree(tmp_path) == {"file": b"", "old": None, "old/file": b"old"}


def test_power_cut_that_spares_everything(tmp_path: Path) -> None:
    disk = lossy(tmp_path)
    descriptor = disk.create(tmp_path / "file")
    disk.write(descriptor, b"lucky")
    disk.close(descriptor)
    disk.rename(tmp_path / "file", tmp_path / "old" / "moved")
    disk.power_cut(Everything())
    assert tree(tmp_path) == {"old": None, "old/file": b"old", "old/moved": b"lucky"}


def test_dropped_sync_is_silent(tmp_path: Path) -> None:
    disk = LossyDisk(tmp_path, without=lambda number, method, path: number == 1)
    write_file(disk, tmp_path / "first", [b"1"])
    write_file(disk, tmp_path / "second", [b"2"])
    disk.sync_directory(tmp_path)
    disk.power_cut()
    assert tree(tmp_path) == {"first": b"", "second": b"2"}


def test_a_file_that_something_else_wrote_is_durable_once_it_is_synced(tmp_path: Path) -> None:
    disk = lossy(tmp_path)
    for name in ("synced", "not synced", "named alone"):
        (tmp_path / "old" / name).write_bytes(b"by something else")
    disk.sync_file(tmp_path / "old" / "synced")
    disk.sync_directory(tmp_path / "old")
    disk.sync_file(tmp_path / "old" / "named alone")
    disk.power_cut()
    assert tree(tmp_path) == {"old": None, "old/file": b"old", "old/synced": b"by something else"}


def test_dropped_sync_of_a_file_that_something_else_wrote(tmp_path: Path) -> None:
    disk = LossyDisk(tmp_path, without=lambda number, method, path: method == "sync_file")
    (tmp_path / "file").write_bytes(b"by something else")
    disk.sync_file(tmp_path / "file")
    disk.sync_directory(tmp_path)
    disk.power_cut()
    assert tree(tmp_path) == {"file": b""}
    assert disk.calls[0] == ("sync_file", tmp_path / "file")


def test_sync_file_is_a_changing_call(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    Disk().sync_file(tmp_path / "file")
    with pytest.raises(FileNotFoundError):
        Disk().sync_file(tmp_path / "absent")
    with pytest.raises(Crash):
        CrashingDisk(crash_before=1).sync_file(tmp_path / "file")
    faulty = FaultyDisk()
    faulty.fail(5, method="sync_file")
    with pytest.raises(OSError, match="file"):
        faulty.sync_file(tmp_path / "file")


def test_real_syncs_are_calls_to_the_system(tmp_path: Path) -> None:
    write_file(Disk(), tmp_path / "file", [b"x"])
    Disk().sync_directory(tmp_path)
    with pytest.raises(FileNotFoundError):
        Disk().sync_directory(tmp_path / "absent")


# ---- reading past the page cache


@pytest.fixture
def file_of_blocks(tmp_path: Path) -> Path:
    """A file of five and a bit MiB, on disk and in no cache, if the file system lets go of it."""
    path = tmp_path / "content"
    path.write_bytes(random.Random(1).randbytes((5 << 20) + 1234))
    with path.open("rb") as opened:
        os.fsync(opened.fileno())
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return path


def descriptors_for_one_file(path: Path, cached: bool) -> int:
    """Of the directory, of the file, and of the file past the cache, where the file system has that."""
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_DIRECT))
    except OSError:
        return 2
    return 2 if cached else 3


@pytest.mark.parametrize("at", [0, 1, 4095, 4096, 70_001, (1 << 20) + 3])
@pytest.mark.parametrize("sizes", [(2 << 20,), (1, 1 << 20, 4096, 1 << 20), (1 << 20, 5 << 20), (5000,) * 900])
@pytest.mark.parametrize("cached", [True, False])
def test_what_is_read_is_the_same_from_the_cache_and_past_it(
    file_of_blocks: Path, at: int, sizes: tuple[int, ...], cached: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("supervise_core.disk._is_cached", lambda *_: cached)
    expected = file_of_blocks.read_bytes()[at : at + sum(sizes)]
    buffers = [memoryview(bytearray(size)) for size in sizes]
    with closing(Disk().open_directory(file_of_blocks.parent)) as directory:
        assert Disk().read_into(directory, "content", at, buffers) == len(expected)
        assert len(directory._opened) == descriptors_for_one_file(file_of_blocks, cached)
    assert b"".join(buffers)[: len(expected)] == expected


def test_reading_past_the_end_of_a_file(file_of_blocks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("supervise_core.disk._is_cached", lambda *_: False)
    size = file_of_blocks.stat().st_size
    with closing(Disk().open_directory(file_of_blocks.parent)) as directory:
        for at in (size, size + 1, size + 10_000):
            assert Disk().read_into(directory, "content", at, [memoryview(bytearray(2 << 20))]) == 0


def test_where_nothing_can_be_read_past_the_cache_the_cache_is_read_through(
    file_of_blocks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("supervise_core.disk._is_cached", lambda *_: False)
    buffer = memoryview(bytearray(2 << 20))
    with closing(Disk().open_directory(file_of_blocks.parent)) as directory:
        open_as_ever = os.open

        def refuse(path: Any, flags: int, *rest: Any, **others: Any) -> int:
            if flags & os.O_DIRECT:
                raise OSError(errno.EINVAL, "no direct reads here")
            return open_as_ever(path, flags, *rest, **others)

        monkeypatch.setattr(os, "open", refuse)
        assert Disk().read_into(directory, "content", 5, [buffer]) == len(buffer)
    assert buffer == file_of_blocks.read_bytes()[5 : 5 + len(buffer)]


def test_what_was_just_read_is_known_to_be_cached(file_of_blocks: Path) -> None:
    file_of_blocks.read_bytes()
    with file_of_blocks.open("rb") as opened:
        assert _is_cached(opened.fileno(), 100, 2 << 20)


def test_many_threads_read_one_file_past_the_cache(file_of_blocks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("supervise_core.disk._is_cached", lambda *_: False)
    content = file_of_blocks.read_bytes()
    with closing(Disk().open_directory(file_of_blocks.parent)) as directory, ThreadPoolExecutor(8) as threads:

        def read(at: int) -> bool:
            buffer = memoryview(bytearray(1 << 20))
            count = Disk().read_into(directory, "content", at, [buffer])
            return buffer[:count] == content[at : at + (1 << 20)]

        assert all(threads.map(read, range(0, len(content), 50_021)))
        assert len(directory._opened) == descriptors_for_one_file(file_of_blocks, cached=False)
