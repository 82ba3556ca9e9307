"""Parts of a snapshot go to the disk while others are still being copied; and are nothing until all are there."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from supervise_core import (
    CheckpointDirectory,
    DirectoryStore,
    KeepAll,
    Staging,
    Supervisor,
    UnsupportedStateError,
    handover,
)
from supervise_core.checkpoint_format import CheckpointId
from supervise_core.handover import Drafting, Handover, PendingSave
from supervise_core.manifest import Manifest
from supervise_core.snapshot import PartImage, Snapshot
from supervise_core.testing.clock import FakeClock, eventually
from supervise_core.testing.disks import CachedDisk, Crash, CrashingDisk, DirectDisk, FaultyDisk, HastyDisk, WatchedDisk
from supervise_core.testing.hosts import FakeMachine
from supervise_numpy import ArrayBackend

from .one_step_each import assert_one_step_each


@pytest.fixture(autouse=True)
def everything_is_worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handover, "EARLY_BYTES", 1)
    monkeypatch.setattr(handover, "EARLY_TENSOR_BYTES", 0)


class TwoParts(ArrayBackend):
    """A model in two parts, and what a test does when the first one is copied and the second is not."""

    def __init__(self, **generators: Any) -> None:
        self.first = {"frozen": np.arange(1000.0), "trained": np.zeros(100)}
        self.second = {"w": np.zeros(200)}
        super().__init__(self.second, **generators)
        self.between: Callable[[], object] = lambda: None

    def step(self, session: Any) -> None:
        self.first["trained"] += 1
        self.second["w"] += 1
        session.global_step += 1

    def snapshot(self, session: Any, staging: Staging) -> Snapshot:
        staging.put("first", self.first)
        self.between()
        return super().snapshot(session, staging)

    def load(self, session: Any, parts: Any) -> None:
        parts["first"].restoration(into=self.first).read()
        super().load(session, parts)


class Run:
    """A program with a model in two parts, on a disk that a test watches, lets fail, or lets crash."""

    def __init__(self, logdir: Path, disk: WatchedDisk, backend: TwoParts | None = None) -> None:
        self.logdir = logdir
        self.disk = disk
        self.backend = backend or TwoParts()
        self.clock = FakeClock()
        self.host = FakeMachine().process()
        self.sv = Supervisor(
            self.backend, logdir, store=DirectoryStore(logdir, disk=disk, clock=self.clock, host=self.host),
            clock=self.clock, keep=KeepAll(), save_every=None, summarize_every=None, signals=False,
        )  # fmt: skip

    def save(self, session: Any) -> None:
        """Make a step and have a save taken, as the loop does."""
        self.backend.step(session)
        saved = self.sv.report.saves + self.sv.report.failed_saves
        self.sv.save()
        self.sv.should_stop()
        eventually(lambda: self.sv.report.saves + self.sv.report.failed_saves > saved)

    def written(self, file: str) -> int:
        """How often something was written into a file of that name."""
        return sum(method == "write" and path.name == file for method, path in self.disk.calls)

    def at_the_first_part(self, then: Callable[[], object] = lambda: None) -> None:
        """Once the first part is copied, wait until it is being written, and go on with this."""

        def between() -> None:
            eventually(lambda: self.written("first.safetensors") > 1)
            then()

        self.backend.first["frozen"] += 1  # nothing to share: the part is one file, which lies ready
        self.backend.between = between


class HastyWatchedDisk(WatchedDisk, DirectDisk, HastyDisk):
    """One whose calls are watched, and that syncs nothing."""


class HastyFaultyDisk(FaultyDisk, DirectDisk, HastyDisk):
    """One that fails, and syncs nothing."""


class HastyCrashingDisk(CrashingDisk, DirectDisk, HastyDisk):
    """One whose process dies, and that syncs nothing."""


class HastyCachedDisk(CachedDisk, HastyDisk):
    """One on which all goes through the cache."""


def check(logdir: Path, steps: list[int]) -> None:
    assert_one_step_each(logdir, steps, first=["trained"], model=["w"])


def test_a_part_is_written_while_the_next_one_is_being_copied(tmp_path: Path) -> None:
    run = Run(tmp_path, HastyWatchedDisk())
    with run.sv.managed_session() as session:
        eventually(lambda: run.sv.report.saves)
        names: list[str] = []
        run.at_the_first_part(lambda: names.extend(path.name for method, path in run.disk.calls if method == "write"))
        run.save(session)
        run.backend.between = lambda: None
        assert names.count("model.safetensors") == 1, "the second part was not written before it was there"
    check(tmp_path, [0, 1])


def test_what_is_shared_is_linked_early_and_the_rest_is_put_together_later(tmp_path: Path) -> None:
    run = Run(tmp_path, HastyWatchedDisk())
    with run.sv.managed_session() as session:
        eventually(lambda: run.sv.report.saves)
        run.backend.between = lambda: eventually(lambda: run.disk.count("link"))
        run.save(session)
        run.backend.between = lambda: None
        assert run.written("first-00002-of-00002.safetensors") == 1
    newest = CheckpointDirectory(tmp_path).at(1).path
    assert (newest / "first-00001-of-00002.safetensors").stat().st_nlink == 2
    check(tmp_path, [0, 1])


class Early:
    """A writer that has one part of a snapshot early, in a thread of its own."""

    def __init__(self, store: DirectoryStore, step: int) -> None:
        self.staging = Staging()
        self.parts: list[PartImage] = []
        self.handover = Handover(step)
        self.drafting = Drafting(store, None)
        self._thread = threading.Thread(target=self.drafting.write_early, args=(self.handover,))

    @classmethod
    def on(cls, store: DirectoryStore, step: int) -> Early:
        """The same where the store is known to write past the cache."""
        store.begin(CheckpointId(0)).write_blocks("any", [], 0)
        assert store.is_direct
        return cls(store, step)

    def put(self, state: Any) -> None:
        with self.staging.taking(self.parts.append):
            self.staging.put("model", state)
            self.snapshot = self.staging.snapshot()
        self.handover.add(self.parts[0])
        self._thread.start()

    def complete(self) -> PendingSave:
        pending = PendingSave(self.handover.step, self.snapshot, None, {})
        self.handover.complete(pending)
        self._thread.join()
        return pending


def test_it_is_hashed_only_when_the_loop_goes_on(tmp_path: Path) -> None:
    """Until then the processors belong to the copying, which the loop waits for."""
    disk = HastyWatchedDisk()
    store = DirectoryStore(tmp_path, disk=disk)
    with store.writing(), (early := Early.on(store, 3)).drafting:
        before = disk.count("truncate")
        early.put({"w": np.zeros(1 << 18)})
        eventually(lambda: disk.count("truncate") > before)
        assert early.parts[0].digests == {}
        pending = early.complete()
        _, writer = early.drafting.begin(CheckpointId(3), pending)
        written = writer.write(pending.snapshot, None)
        assert disk.count("truncate") == before + 1
    assert early.parts[0].digests.keys() == {"w"}
    assert set(written.files) == {"model.safetensors", "state.json"}


def test_a_second_save_of_the_same_step_is_not_begun_early(tmp_path: Path) -> None:
    """It may turn out to be the same, or worth less."""
    disk = HastyWatchedDisk()
    store = DirectoryStore(tmp_path, disk=disk)
    with store.writing():
        first = Early.on(store, 3)
        with first.drafting:
            first.put({"w": np.zeros(10)})
            draft, writer = first.drafting.begin(CheckpointId(3), first.complete())
            files = writer.write(first.snapshot, None).files
            draft.commit(Manifest(3, "numpy", 1.0, ("model",), files))
            first.drafting.keep()
        made = disk.count("make_directory")
        second = Early(store, 3)
        with second.drafting:
            second.put({"w": np.zeros(10)})
            eventually(second.handover._parts.empty)
            second.complete()
        assert disk.count("make_directory") == made


def test_what_was_begun_and_is_not_kept_is_removed(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path, disk=HastyWatchedDisk())
    with store.writing():
        early = Early.on(store, 3)
        with early.drafting:
            early.put({"w": np.zeros(10)})
            early.drafting.begin(CheckpointId(3), early.complete())
            assert len(list(tmp_path.glob(".work/*/draft-2"))) == 1
        assert list(tmp_path.glob(".work/*/draft-2")) == []


@pytest.mark.parametrize("disk", [HastyWatchedDisk(), HastyCachedDisk()], ids=["not known yet", "through the cache"])
def test_where_a_write_may_be_one_more_copy_nothing_is_written_early(tmp_path: Path, disk: WatchedDisk) -> None:
    store = DirectoryStore(tmp_path, disk=disk)
    with store.writing():
        if isinstance(disk, HastyCachedDisk):
            store.begin(CheckpointId(0)).write_blocks("any", [], 0)
        made = disk.count("make_directory")
        early = Early(store, 3)
        with early.drafting:
            early.put({"w": np.zeros(10)})
            eventually(early.handover._parts.empty)
            early.complete()
        assert disk.count("make_directory") == made


def test_a_snapshot_that_cannot_be_taken_leaves_nothing(tmp_path: Path) -> None:
    run = Run(tmp_path, HastyWatchedDisk())

    def fail() -> None:
        raise UnsupportedStateError("model: w", "it is not there any more")

    def train() -> None:
        with run.sv.managed_session() as session:
            eventually(lambda: run.sv.report.saves)
            run.at_the_first_part(fail)
            run.backend.step(session)
            run.sv.save()
            assert run.sv.should_stop()

    with pytest.raises(UnsupportedStateError):
        train()
    check(tmp_path, [0])


def test_ctrl_c_while_a_part_is_copied_leaves_nothing_and_the_next_save_is_whole(tmp_path: Path) -> None:
    run = Run(tmp_path, HastyWatchedDisk())

    def interrupt() -> None:
        raise KeyboardInterrupt

    with run.sv.managed_session() as session:
        eventually(lambda: run.sv.report.saves)
        run.at_the_first_part(interrupt)
        run.backend.step(session)
        run.sv.save()
        with pytest.raises(KeyboardInterrupt):
            run.sv.should_stop()
        run.backend.between = lambda: None
        run.save(session)
    check(tmp_path, [0, 2])


@pytest.mark.parametrize("method", ["make_directory", "create", "allocate", "write", "truncate", "link"])
def test_a_disk_that_fails_early_costs_that_one_save(tmp_path: Path, method: str) -> None:
    run = Run(tmp_path, HastyFaultyDisk())
    assert isinstance(run.disk, FaultyDisk)
    disk = run.disk
    with run.sv.managed_session() as session:
        eventually(lambda: run.sv.report.saves)
        if method != "link":
            run.backend.first["frozen"] += 1

        def between() -> None:
            eventually(lambda: disk.failures)

        disk.fail(errno.EIO, method=method)
        run.backend.between = between
        run.save(session)
        run.backend.between = lambda: None
        assert (run.sv.report.failed_saves, run.sv.report.saves) == (1, 1)
        assert list((tmp_path / ".work").glob("*/draft-*")) == []
        run.clock.advance(6)
        run.save(session)
    check(tmp_path, [0, 2])


def test_dead_at_each_call_of_a_save_that_began_early(tmp_path: Path) -> None:
    """The disk dies in the writer's thread before each of its calls in turn; what is listed is whole."""
    found = set[tuple[int, ...]]()
    for at in range(1, 100):
        logdir = tmp_path / f"at-{at}"
        disk = HastyCrashingDisk()
        run = Run(logdir, disk)
        died = False
        try:
            with run.sv.managed_session() as session:
                eventually(lambda: run.sv.report.saves)  # noqa: B023
                run.backend.first["frozen"] += 1
                disk.crash_before = len(disk.calls) + at

                def between() -> None:
                    eventually(lambda: disk.crashed or run.written("first.safetensors") > 1)  # noqa: B023

                run.backend.between = between
                run.backend.step(session)
                run.sv.save()
                run.sv.should_stop()
                run.backend.between = lambda: None
                eventually(lambda: disk.crashed or run.sv.report.saves == 2)  # noqa: B023
                disk.crash_before = disk.crash_before if disk.crashed else None
                died = disk.crashed
        except Crash:
            assert died
        assert not died or run.sv.report.final_save.startswith("failed: "), "the writer's thread is dead"
        listed = CheckpointDirectory(logdir).steps()
        assert listed in ([0], [0, 1])
        found.add(tuple(listed))
        run.host.die()
        with DirectoryStore(logdir, disk=HastyDisk(), host=run.host.machine.process()).writing():
            check(logdir, listed)
        if not died:
            break
    assert not died, "no run came to its end"
    assert found == {(0,), (0, 1)}


class ElsewhereBackend(TwoParts):
    """Its step is counted by other threads: a snapshot says itself of which one it is."""

    def snapshot(self, session: Any, staging: Staging) -> Snapshot:
        taken = super().snapshot(session, staging)
        return Snapshot(taken.parts, step=session.global_step + 5)


def test_a_snapshot_of_another_step_than_was_thought_is_written_as_that(tmp_path: Path) -> None:
    run = Run(tmp_path, HastyWatchedDisk(), ElsewhereBackend())
    with run.sv.managed_session() as session:
        eventually(lambda: run.sv.report.saves)
        run.backend.first["frozen"] += 1
        run.backend.between = lambda: eventually(lambda: run.written("first.safetensors") > 1)
        run.save(session)
        run.backend.between = lambda: None
        run.backend.step(session)
    checkpoints = CheckpointDirectory(tmp_path)
    assert 6 in checkpoints.steps()
    for step in checkpoints.steps():
        checkpoints.at(step).verify()
    assert checkpoints.at(6).load("first")["trained"][0] == 1
    assert list((tmp_path / ".work").glob("*/draft-*")) == []


@pytest.mark.parametrize(
    ("count", "nbytes", "is_worth_it"),
    [(40, 1 << 20, True), (1, 32 << 20, True), (30, 1 << 20, False), (20_000, 2 << 10, False)],
)
def test_small_parts_and_small_tensors_are_not_worth_it(
    monkeypatch: pytest.MonkeyPatch, count: int, nbytes: int, is_worth_it: bool
) -> None:
    monkeypatch.undo()
    staging, early = Staging(), Handover(1)
    with staging.taking(early.add):
        staging.put("model", {str(number): np.zeros(nbytes, np.uint8) for number in range(count)})
    assert early._parts.empty() != is_worth_it
