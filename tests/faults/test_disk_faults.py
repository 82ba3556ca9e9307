"""A disk that fails: older checkpoints are untouched, nothing is left lying about, training goes on while it may."""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
from collections.abc import Generator
from pathlib import Path

import pytest
from scenarios import open_store, save, state_of
from training import Program

from supervise_core import AtSteps, CheckpointDirectory, EverySeconds, EverySteps, KeepLatest
from supervise_core.checkpoint_format import CheckpointId
from supervise_core.directory_store import DirectoryStore
from supervise_core.testing.clock import FakeClock, eventually
from supervise_core.testing.disks import FaultyDisk, HastyDisk, WatchedDisk
from supervise_core.testing.hosts import FakeMachine

ERRORS = [errno.ENOSPC, errno.EIO, errno.EACCES]

each_error = pytest.mark.parametrize("error", ERRORS, ids=lambda number: errno.errorcode[number])


class HastyFaultyDisk(FaultyDisk):
    """One that syncs nothing, but still fails to."""

    def sync(self, descriptor: int) -> None:
        self._before("sync", self._paths[descriptor])

    def sync_directory(self, path: Path) -> None:
        self._before("sync_directory", path)


# ---- at every call of a save, in the store


def calls_of_a_save(logdir: Path) -> int:
    disk = WatchedDisk()
    store = open_store(logdir, disk, FakeMachine().process())
    with store.writing():
        before = len(disk.calls)
        save(store, 1)
        return len(disk.calls) - before


@each_error
def test_each_call_of_a_save(tmp_path: Path, error: int) -> None:
    for at in range(1, calls_of_a_save(tmp_path / "count") + 1):
        logdir, disk = tmp_path / f"at-{at}", HastyFaultyDisk()
        store = open_store(logdir, disk, FakeMachine().process())
        with store.writing():
            save(store, 1)
            disk.fail(error, at)
            draft_failed(store, error)
            assert disk.failures, f"call {at} was not reached"
            found = state_of(logdir).listed
            assert found in (("model.ckpt-1",), ("model.ckpt-1", "model.ckpt-2"))
            assert (len(found) == 2) == (disk.failures[0] == ("sync_directory", logdir)), (
                "only the last call comes late"
            )
            save(store, 3)
        assert list((logdir / ".work").iterdir()) == []


def draft_failed(store: DirectoryStore, error: int) -> None:
    """A save whose failure is handled as the core handles it."""
    begin, drafts = store.begin, []

    def noting(checkpoint: object) -> object:
        drafts.append(begin(checkpoint))  # type: ignore[arg-type]
        return drafts[-1]

    store.begin = noting  # type: ignore[method-assign, assignment]
    try:
        with pytest.raises(OSError) as caught:
            save(store, 2)
        assert caught.value.errno == error
        for draft in drafts:
            draft.discard()
    finally:
        store.begin = begin  # type: ignore[method-assign]


# ---- while a program trains


class FaultyRun:
    """A program that trains on a disk that a test lets fail."""

    def __init__(self, logdir: Path, **arguments: object) -> None:
        self.disk = HastyFaultyDisk()
        self.clock = FakeClock()
        self.logdir = logdir
        store = DirectoryStore(logdir, disk=self.disk, clock=self.clock)
        self.program = Program(logdir, store=store, clock=self.clock, **arguments)
        self.supervisor = self.program.supervisor

    def steps(self) -> list[int]:
        return CheckpointDirectory(self.logdir).steps()


@each_error
@pytest.mark.parametrize("method", ["make_directory", "create", "write", "sync", "sync_directory", "rename"])
def test_training_goes_on_after_one_failed_save(tmp_path: Path, error: int, method: str) -> None:
    run = FaultyRun(tmp_path / "digits", save_every=AtSteps(2, 4))
    with run.supervisor.managed_session() as session:
        run.program.settle()
        while not run.supervisor.should_stop() and session.global_step < 6:
            if session.global_step == 1:
                run.disk.fail(error, method=method)
            if session.global_step == 3:
                eventually(lambda: run.supervisor.report.failed_saves == 1)
                assert run.steps()[0] == 0
            session.global_step += 1
    assert run.supervisor.report.failed_saves == 1
    assert run.supervisor.report.exit_status == 0
    assert {0, 6} <= set(run.steps())
    assert list((run.logdir / ".work").iterdir()) == []
    for step in run.steps():
        CheckpointDirectory(run.logdir).at(step).verify()


def test_a_failed_save_is_tried_again_after_5_and_30_seconds_and_the_third_ends_the_run(tmp_path: Path) -> None:
    run = FaultyRun(tmp_path / "digits", save_every=EverySeconds(600))
    with pytest.raises(OSError, match="No space left") as caught, run.supervisor.managed_session() as session:  # noqa: PT012
        run.program.settle()
        run.disk.fail(errno.ENOSPC, method="write", forever=True)
        began = run.clock.monotonic()
        for failures, moment in enumerate((600, 605, 635), 1):
            for early in (1.0, 0.0):
                run.clock.advance(began + moment - early - run.clock.monotonic())
                run.clock.wait_for_sleepers(2)  # the timer and the lease's beat have looked at the clock
                session.global_step += 1
                if early:
                    run.supervisor.should_stop()
                    run.program.settle()
                    assert run.supervisor.report.failed_saves == failures - 1
            eventually(lambda: run.supervisor.should_stop() or run.supervisor.report.failed_saves == failures)  # noqa: B023
        eventually(run.supervisor.should_stop)
    assert caught.value.errno == errno.ENOSPC
    assert run.steps() == [0]
    assert run.supervisor.report.exit_status == 1
    assert list((run.logdir / ".work").iterdir()) == []


def test_a_good_save_between_failures_starts_the_count_anew(tmp_path: Path) -> None:
    run = FaultyRun(tmp_path / "digits", save_every=EverySteps(1))
    with run.supervisor.managed_session() as session:
        for step in range(1, 13):
            if step % 3:
                run.disk.fail(errno.EIO, method="create")
            session.global_step = step
            run.supervisor.should_stop()
            run.program.settle()
            run.clock.advance(31)
            run.disk.heal()
    assert run.supervisor.report.failed_saves >= 4
    assert run.supervisor.report.exit_status == 0
    assert max(run.steps()) == 12


@each_error
def test_a_failing_final_save_fails_the_run(tmp_path: Path, error: int) -> None:
    run = FaultyRun(tmp_path / "digits", save_every=None)
    with pytest.raises(OSError) as caught, run.supervisor.managed_session() as session:  # noqa: PT012
        run.program.settle()
        session.global_step = 5
        run.disk.fail(error, method="sync")
    assert caught.value.errno == error
    assert run.steps() == [0]
    assert run.supervisor.report.final_save.startswith("failed: ")
    assert list((run.logdir / ".work").iterdir()) == []


@each_error
@pytest.mark.parametrize("method", ["open_directory", "read"])
def test_a_disk_that_cannot_be_read_is_an_error_and_sets_nothing_aside(tmp_path: Path, error: int, method: str) -> None:
    Program(tmp_path / "digits").train(2)
    run = FaultyRun(tmp_path / "digits")
    run.disk.fail(error, method=method, forever=True)
    with pytest.raises(OSError) as caught:
        run.program.train(3)
    assert caught.value.errno == error
    assert run.steps() == [0, 1, 2]
    assert not (run.logdir / "set-aside").exists()
    run.disk.heal()
    assert run.program.train(3).began_at == 2


@each_error
def test_a_checkpoint_that_cannot_be_removed_is_left_for_the_next_time(tmp_path: Path, error: int) -> None:
    run = FaultyRun(tmp_path / "digits", keep=KeepLatest(1), save_every=EverySteps(1))
    with run.supervisor.managed_session() as session:
        run.program.settle()
        run.disk.fail(error, method="remove_file")
        for step in range(1, 4):
            session.global_step = step
            run.supervisor.should_stop()
            run.program.settle()
    assert run.disk.failures
    assert run.steps() == [3]
    assert run.supervisor.report.exit_status == 0
    Program(run.logdir).train(3)
    assert list((run.logdir / ".work").iterdir()) == []


# ---- a real one


@pytest.fixture
def small_disk(tmp_path: Path) -> Generator[Path, None, None]:
    """A file system of 256 KiB, in memory."""
    path = tmp_path / "small"
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(path)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no mount command")
    if done.returncode:
        pytest.skip(f"no file system may be mounted here: {done.stderr.strip()}")
    try:
        yield path
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)  # whoever still looks at it may


def test_a_disk_that_fills_up_during_200_saves(small_disk: Path) -> None:
    """Somebody else's file comes and goes; all that is ever listed is whole, and the run ends well."""
    clock = FakeClock()
    program = Program(small_disk / "digits", keep=KeepLatest(3), clock=clock)
    checkpoints, hog = CheckpointDirectory(small_disk / "digits"), small_disk / "hog"
    with program.supervisor.managed_session() as session:
        for step in range(1, 201):
            if step % 20 == 10:
                fill_up(hog)
            if step % 20 == 12:
                hog.unlink()
            program.w[...] = program.b[...] = step
            session.global_step = step
            program.supervisor.should_stop()
            program.settle()
            clock.advance(31)
            newest = checkpoints.newest()
            newest.verify()
            assert (newest.load("model")["w"] == newest.manifest().step).all()
            assert newest.manifest().step >= step - 3
    assert program.supervisor.report.failed_saves >= 10
    assert program.supervisor.report.exit_status == 0
    assert checkpoints.steps()[-1] == 200
    assert list((small_disk / "digits" / ".work").iterdir()) == []


def fill_up(path: Path) -> None:
    with path.open("wb", buffering=0) as file:
        while True:
            try:
                file.write(bytes(os.sysconf("SC_PAGE_SIZE")))
            except OSError as error:
                assert error.errno == errno.ENOSPC  # noqa: PT017
                return


# ---- while a damaged one is put away


@each_error
@pytest.mark.parametrize("act", ["set_aside", "retire", "remove"])
def test_each_call_of_putting_one_away(tmp_path: Path, error: int, act: str) -> None:
    """The evidence is never lost: it is in the listing, or on the shelf once the next writer has cleaned up."""
    arguments = {"set_aside": [CheckpointId(1), "damaged"]}.get(act, [CheckpointId(1)])
    for at in range(1, 100):
        logdir, disk, machine = tmp_path / f"at-{at}", HastyFaultyDisk(), FakeMachine()
        store = open_store(logdir, disk, machine.process())
        with store.writing():
            save(store, 1)
            save(store, 2)
            disk.fail(error, at)
            with contextlib.suppress(OSError):
                getattr(store, act)(*arguments)
            reached = bool(disk.failures)
            disk.heal()
        following = open_store(logdir, HastyDisk(), machine.process())
        with following.writing():
            found = state_of(logdir)
        assert "model.ckpt-2" in found.listed
        if act != "remove":
            assert ("model.ckpt-1" in found.listed) + len(found.damaged) + len(found.retired) == 1
        assert list((logdir / ".work").iterdir()) == []
        if not reached:
            assert at > 4
            return
