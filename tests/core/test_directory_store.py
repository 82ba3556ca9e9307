"""What the directory store does beyond the contract: names, copies, and what it leaves alone."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from supervise_core.checkpoint_format import CheckpointId
from supervise_core.directory_store import DirectoryStore, open_checkpoint_directory
from supervise_core.errors import CheckpointDamagedError, LeaseHeldError, LeaseLostError
from supervise_core.testing.disks import HastyDisk, WatchedDisk
from supervise_core.testing.hosts import FakeMachine
from supervise_core.testing.store_contract import FILE, write_checkpoint


@pytest.fixture
def machine() -> FakeMachine:
    return FakeMachine()


@pytest.fixture
def store(tmp_path: Path, machine: FakeMachine) -> DirectoryStore:
    made = DirectoryStore(tmp_path / "logs", disk=HastyDisk(), host=machine.process())
    made.acquire()
    return made


def test_layout(store: DirectoryStore) -> None:
    write_checkpoint(store, CheckpointId(120))
    write_checkpoint(store, CheckpointId(120, 1))
    names = sorted(path.name for path in store.path.iterdir())
    assert names == [".work", "model.ckpt-120", "model.ckpt-120.1"]
    assert sorted(path.name for path in (store.path / "model.ckpt-120").iterdir()) == ["manifest.json", FILE]


def test_order_of_a_commit(tmp_path: Path) -> None:
    """Files, the manifest last; each of them synced; the draft; its name; the directory."""
    disk = WatchedDisk()
    store = DirectoryStore(tmp_path, disk=disk)
    with store.writing():
        disk.calls.clear()
        write_checkpoint(store, CheckpointId(1))
        calls = [(method, path.name) for method, path in disk.calls if method != "write"]
    assert calls == [
        ("make_directory", "draft-1"),
        ("create", FILE),
        ("create", "manifest.json"),
        ("sync", FILE),
        ("sync", "manifest.json"),
        ("sync_directory", "draft-1"),
        ("rename", "model.ckpt-1"),
        ("sync_directory", tmp_path.name),
    ]


def test_order_of_a_removal(tmp_path: Path) -> None:
    disk = WatchedDisk()
    store = DirectoryStore(tmp_path, disk=disk)
    with store.writing():
        write_checkpoint(store, CheckpointId(1))
        disk.calls.clear()
        store.remove(CheckpointId(1))
        methods = [method for method, _ in disk.calls]
    assert methods == ["rename", "sync_directory", "remove_file", "remove_file", "remove_directory"]


def test_names_of_two_basenames_do_not_mix(tmp_path: Path) -> None:
    one = DirectoryStore(tmp_path, "model.ckpt")
    with one.writing():
        write_checkpoint(one, CheckpointId(1))
    other = DirectoryStore(tmp_path, "modelxckpt")
    assert other.checkpoints() == []
    with other.writing():
        write_checkpoint(other, CheckpointId(2))
    assert one.checkpoints() == [CheckpointId(1)]
    assert other.checkpoints() == [CheckpointId(2)]


def test_two_basenames_have_one_writer(tmp_path: Path) -> None:
    one = DirectoryStore(tmp_path, "one")
    with one.writing(), pytest.raises(LeaseHeldError):
        DirectoryStore(tmp_path, "other").acquire()


@pytest.mark.parametrize("basename", ["", ".hidden", "a/b", "/abs", ".."])
def test_basenames_that_are_no_names(tmp_path: Path, basename: str) -> None:
    with pytest.raises(ValueError, match="cannot begin a directory name"):
        DirectoryStore(tmp_path, basename)


def test_what_is_not_ours_is_left_alone(store: DirectoryStore) -> None:
    for name in ("notes.txt", "model.ckpt-x", "events.out.tfevents.1", "model.ckpt-007"):
        (store.path / name).write_text("mine")
    write_checkpoint(store, CheckpointId(7))
    store.remove(CheckpointId(7))
    store.retire_damaged()
    store.release()
    store.acquire()
    assert len([path for path in store.path.iterdir() if path.is_file()]) == 4


def test_copied_and_moved_directories_work(store: DirectoryStore, tmp_path: Path) -> None:
    write_checkpoint(store, CheckpointId(1))
    store.set_aside(CheckpointId(1), "for the test")
    write_checkpoint(store, CheckpointId(2))
    store.release()
    shutil.copytree(store.path, tmp_path / "copy")
    os.rename(store.path, tmp_path / "moved")
    for place in ("copy", "moved"):
        there = DirectoryStore(tmp_path / place)
        assert there.checkpoints() == [CheckpointId(2)]
        assert dict(there.damaged()) == {"model.ckpt-1": "for the test"}
        with there.writing():
            write_checkpoint(there, CheckpointId(3))


def test_set_aside_lies_with_its_reason(store: DirectoryStore) -> None:
    write_checkpoint(store, CheckpointId(1))
    store.set_aside(CheckpointId(1), "a bit was flipped")
    parcel = store.path / "set-aside" / "model.ckpt-1"
    assert sorted(path.name for path in parcel.iterdir()) == ["model.ckpt-1", "reason.json"]
    assert json.loads((parcel / "reason.json").read_text())["reason"] == "a bit was flipped"
    assert (parcel / "model.ckpt-1" / FILE).read_bytes() == b"content"


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b"\xff", b'{"a":' * 100_000])
def test_evidence_counts_though_its_reason_cannot_be_read(store: DirectoryStore, content: bytes) -> None:
    write_checkpoint(store, CheckpointId(1))
    store.set_aside(CheckpointId(1), "lost")
    (store.path / "set-aside" / "model.ckpt-1" / "reason.json").write_bytes(content)
    assert dict(store.damaged()) == {"model.ckpt-1": "no reason recorded"}


def test_what_somebody_put_on_the_shelf_counts_too(store: DirectoryStore) -> None:
    (store.path / "set-aside").mkdir()
    (store.path / "set-aside" / "something").write_text("?")
    assert dict(store.damaged()) == {"something": "no reason recorded"}


def test_logdir_that_vanished_is_a_lost_lease(store: DirectoryStore) -> None:
    shutil.rmtree(store.path)
    with pytest.raises(LeaseLostError):
        store.begin(CheckpointId(1))


def test_full_sweep(store: DirectoryStore, machine: FakeMachine, tmp_path: Path) -> None:
    write_checkpoint(store, CheckpointId(1))
    store.begin(CheckpointId(2)).write(FILE, [b"half"])
    dead = store._lease.directory
    (dead / "trash-model.ckpt-0").mkdir()
    (dead / "trash-model.ckpt-0" / "rest").write_bytes(b"")
    (dead / "link").symlink_to(tmp_path)
    (store.path / ".work" / "new-0123").mkdir()
    (store.path / ".work" / "fenced-0123").mkdir()
    machine.living.clear()
    following = DirectoryStore(store.path, disk=HastyDisk(), host=machine.process())
    following.acquire()
    assert [path.name for path in (store.path / ".work").iterdir()] == [following._lease.directory.name]
    assert following.checkpoints() == [CheckpointId(1)]
    assert tmp_path.is_dir()


@pytest.mark.parametrize("kind", ["file", "link"])
def test_what_is_no_directory_of_its_own(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "model.ckpt-1"
    if kind == "file":
        path.write_bytes(b"")
    else:
        (tmp_path / "real").mkdir()
        path.symlink_to("real")
    with pytest.raises(CheckpointDamagedError, match="not a directory of its own"):
        open_checkpoint_directory(path)
    with pytest.raises(FileNotFoundError):
        open_checkpoint_directory(tmp_path / "absent")
