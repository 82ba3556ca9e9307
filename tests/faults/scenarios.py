"""What a writer may be doing when it dies, and what must then be found. Shared by the tests of this folder."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from supervise_core.checkpoint_files import verify_checkpoint
from supervise_core.checkpoint_format import Base, CheckpointId
from supervise_core.checkpointer import prune
from supervise_core.directory_store import DirectoryStore
from supervise_core.disk import Disk
from supervise_core.host import Host
from supervise_core.manifest import Manifest
from supervise_core.retention import KeepLatest
from supervise_core.snapshot_files import write_snapshot
from supervise_core.staging import Staging
from supervise_core.testing.clock import FakeClock
from supervise_core.testing.disks import Crash, HastyDisk, WatchedDisk
from supervise_core.testing.hosts import FakeHost, FakeMachine

REASON = "the hash is wrong"

_FROZEN = ((1, "model.safetensors"), (2, "model-00001-of-00002.safetensors"), (3, "model-00001-of-00002.safetensors"))


class SkippingClock(FakeClock):
    """Whoever waits on it finds that the time has passed."""

    def wait(self, event: threading.Event, timeout: float | None) -> bool:
        if not event.is_set() and timeout is not None:
            self.advance(timeout)
        return event.is_set()


def open_store(logdir: Path, disk: Disk, host: Host) -> DirectoryStore:
    return DirectoryStore(logdir, disk=disk, host=host, clock=SkippingClock())


def save(store: DirectoryStore, step: int) -> None:
    """Commit a small but complete checkpoint, of two parts."""
    staging = Staging()
    staging.put("model", {"w": np.full(5, float(step)), "b": np.arange(3)})
    staging.put("plain", {"step": step})
    draft = store.begin(CheckpointId(step))
    snapshot = staging.snapshot()
    files = write_snapshot(draft, snapshot, {"data": None}).files
    draft.commit(Manifest(step, "numpy", 1.7e9 + step, tuple(snapshot.parts), files))


class Series:
    """Saves of one run, each of which shares with the one before it what did not change."""

    def __init__(self, store: DirectoryStore) -> None:
        self.store = store
        self.frozen = np.arange(100.0)
        self.trained = np.zeros(10)
        self._staging = Staging()
        self._base: Base | None = None

    def save(self, step: int, *, replaces: CheckpointId | None = None) -> CheckpointId:
        """Commit a checkpoint in which only ``trained`` is new."""
        self.trained += 1
        self._staging.put("model", {"frozen": self.frozen, "trained": self.trained})
        self._staging.put("plain", {"step": step})
        snapshot = self._staging.snapshot()
        draft = self.store.begin(CheckpointId(step, 0 if replaces is None else replaces.revision + 1))
        written = write_snapshot(draft, snapshot, {"data": None}, self._base)
        manifest = Manifest(step, "numpy", 1.7e9 + step, tuple(snapshot.parts), written.files)
        committed = draft.commit(manifest, replaces)
        self._base = Base(committed, written.placed)
        return committed


@dataclass(frozen=True)
class State:
    """What a log directory holds, as far as anybody may care."""

    listed: tuple[str, ...]
    damaged: tuple[tuple[str, str], ...] = ()
    retired: tuple[str, ...] = ()


def state_of(logdir: Path) -> State:
    """What is in a log directory; everything in the listing is verified, and so is what was put away."""
    store = DirectoryStore(logdir, disk=HastyDisk())
    for checkpoint in store.checkpoints():
        with store.open(checkpoint) as reader:
            assert verify_checkpoint(reader).step == checkpoint.step
    for shelf in ("set-aside", "retired"):
        for parcel in (logdir / shelf).glob("*"):
            kept = [path for path in parcel.iterdir() if path.is_dir()]
            assert len(kept) == 1, f"{parcel} holds {kept}"
            verify_checkpoint(_reader(kept[0]))
    retired = (logdir / "retired").glob("*")
    return State(
        tuple(store.name_of(checkpoint) for checkpoint in store.checkpoints()),
        tuple(sorted(store.damaged().items())),
        tuple(sorted(path.name for path in retired)),
    )


def _reader(path: Path):  # type: ignore[no-untyped-def]
    from supervise_core.directory_store import open_checkpoint_directory

    return open_checkpoint_directory(path)


@dataclass(frozen=True)
class Scenario:
    """``act`` is done by a writer that holds the lease of a directory that ``prepare`` made.

    It goes through ``states``. ``wear`` is what happened to the directory in between.
    """

    name: str
    prepare: Callable[[DirectoryStore], None] | None
    act: Callable[[DirectoryStore], None]
    states: tuple[State, ...]
    wear: Callable[[Path], None] = lambda logdir: None

    def __str__(self) -> str:
        return self.name

    def set_up(self, logdir: Path) -> None:
        if self.prepare is not None:
            store = open_store(logdir, HastyDisk(), FakeMachine("elsewhere").process())
            with store.writing():
                self.prepare(store)
        self.wear(logdir)

    def run(self, logdir: Path, disk: Disk, host: Host) -> None:
        store = open_store(logdir, disk, host)
        with store.writing():
            self.act(store)


def _two(store: DirectoryStore) -> None:
    save(store, 1)
    save(store, 2)


def _three(store: DirectoryStore) -> None:
    _two(store)
    save(store, 3)


def _three_linked(store: DirectoryStore) -> None:
    series = Series(store)
    for step in (1, 2, 3):
        series.save(step)
    inodes = {(store.path / f"model.ckpt-{step}" / name).stat().st_ino for step, name in _FROZEN}
    assert len(inodes) == 1, "they have nothing in common"


def _save_two_linked(store: DirectoryStore) -> None:
    series = Series(store)
    series.save(1)
    series.save(2)


def _save_linked_and_remove(store: DirectoryStore) -> None:
    """As every save does that prunes: the file has one name, two, and one again."""
    series = Series(store)
    series.save(1)
    series.save(2)
    prune(store, KeepLatest(1))
    series.save(3)
    prune(store, KeepLatest(1))


def _save_linked_in_place_of_another(store: DirectoryStore) -> None:
    series = Series(store)
    assert series.save(2, replaces=series.save(2)) == CheckpointId(2)


def _with_damaged(store: DirectoryStore) -> None:
    _three(store)
    store.set_aside(CheckpointId(3), REASON)


def _lose_work_folder(logdir: Path) -> None:
    """As when the checkpoints alone were copied."""
    (logdir / ".work").rmdir()


def _die(at: str, of: Callable[[DirectoryStore], None]) -> Callable[[Path], None]:
    """A writer that dies before its first rename to a path that contains ``at``."""

    class Dying(HastyDisk):
        def rename(self, source: Path, target: Path) -> None:
            if at in str(target):
                raise Crash(target)
            super().rename(source, target)

    def die(logdir: Path) -> None:
        store = open_store(logdir, Dying(), FakeMachine("gone").process())
        store.acquire()
        with contextlib.suppress(Crash):
            of(store)

    return die


def _nothing(store: DirectoryStore) -> None:
    return None


def _die_after_moving(store: DirectoryStore, name: str, act: Callable[[], None]) -> None:
    """The writer dies when it has renamed to this name and synced nothing; the next one finishes the work."""
    disk, process = store._disk, store._lease._host
    assert isinstance(disk, WatchedDisk)
    assert isinstance(process, FakeHost)
    moved: list[Path] = []

    def after_the_move(method: str, path: Path) -> bool:
        if method == "rename" and path.name == name:
            moved.append(path)
        return bool(moved) and method == "sync_directory"

    with disk.interrupted(after_the_move):
        act()
    process.die()
    following = open_store(store.path, disk, process.machine.process())
    with following.writing():
        pass


def _die_while_setting_aside(store: DirectoryStore) -> None:
    _die_after_moving(store, "model.ckpt-2", lambda: store.set_aside(CheckpointId(2), REASON))


def _die_while_removing(store: DirectoryStore) -> None:
    _die_after_moving(store, "trash-model.ckpt-1", lambda: store.remove(CheckpointId(1)))


def _set_aside(step: int) -> Callable[[DirectoryStore], None]:
    return lambda store: store.set_aside(CheckpointId(step), REASON)


def _c(*steps: int) -> tuple[str, ...]:
    return tuple(f"model.ckpt-{step}" for step in steps)


SCENARIOS = (
    Scenario("first save", None, lambda store: save(store, 0), (State(()), State(_c(0)))),
    Scenario("commit", _two, lambda store: save(store, 3), (State(_c(1, 2)), State(_c(1, 2, 3)))),
    Scenario(
        "prune",
        _three,
        lambda store: prune(store, KeepLatest(1)),
        (State(_c(1, 2, 3)), State(_c(2, 3)), State(_c(3))),
    ),
    Scenario(
        "set aside",
        _two,
        _set_aside(2),
        (State(_c(1, 2)), State(_c(1), ((*_c(2), REASON),))),
    ),
    Scenario(
        "set aside the only one",
        lambda store: save(store, 2),
        _set_aside(2),
        (State(_c(2)), State((), ((*_c(2), REASON),))),
    ),
    Scenario(
        "set aside another",
        _with_damaged,
        _set_aside(2),
        (State(_c(1, 2), ((*_c(3), REASON),)), State(_c(1), ((*_c(2), REASON), (*_c(3), REASON)))),
    ),
    Scenario(
        "set aside in a copy",
        _two,
        _set_aside(2),
        (State(_c(1, 2)), State(_c(1), ((*_c(2), REASON),))),
        _lose_work_folder,
    ),
    Scenario("sweep a draft", _two, _nothing, (State(_c(1, 2)),), _die("/model.ckpt-3", lambda store: save(store, 3))),
    Scenario(
        "sweep evidence",
        _with_damaged,
        _nothing,
        (State(_c(1), ((*_c(2), REASON), (*_c(3), REASON))),),
        _die("/set-aside/", _set_aside(2)),
    ),
    Scenario(
        "set aside by two",
        _with_damaged,
        _die_while_setting_aside,
        (State(_c(1, 2), ((*_c(3), REASON),)), State(_c(1), ((*_c(2), REASON), (*_c(3), REASON)))),
    ),
    Scenario("remove by two", _two, _die_while_removing, (State(_c(1, 2)), State(_c(2)))),
    Scenario(
        "retire",
        _two,
        lambda store: store.retire(CheckpointId(2)),
        (State(_c(1, 2)), State(_c(1), (), _c(2))),
    ),
    Scenario(
        "retire the damaged",
        _with_damaged,
        lambda store: store.retire_damaged(),
        (State(_c(1, 2), ((*_c(3), REASON),)), State(_c(1, 2), (), _c(3))),
    ),
    Scenario("linked commit", None, _save_two_linked, (State(()), State(_c(1)), State(_c(1, 2)))),
    Scenario(
        "linked commit and prune",
        None,
        _save_linked_and_remove,
        (State(()), State(_c(1)), State(_c(1, 2)), State(_c(2)), State(_c(2, 3)), State(_c(3))),
    ),
    Scenario(
        "prune linked",
        _three_linked,
        lambda store: prune(store, KeepLatest(1)),
        (State(_c(1, 2, 3)), State(_c(2, 3)), State(_c(3))),
    ),
    Scenario(
        "set aside linked",
        _three_linked,
        _set_aside(2),
        (State(_c(1, 2, 3)), State(_c(1, 3), ((*_c(2), REASON),))),
    ),
    Scenario(
        "retire linked",
        _three_linked,
        lambda store: store.retire(CheckpointId(1)),
        (State(_c(1, 2, 3)), State(_c(2, 3), (), _c(1))),
    ),
    Scenario(
        "exchange linked",
        None,
        _save_linked_in_place_of_another,
        (State(()), State(_c(2))),
    ),
)
