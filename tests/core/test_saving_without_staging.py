"""Saves without memory for them: written from the live tensors while the loop waits; and all the rest as ever."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from supervise_core import CheckpointDirectory, DirectoryStore, EverySteps, KeepAll, Staging, Supervisor, memory
from supervise_core.hashing import HASHED_APART
from supervise_core.testing.clock import FakeClock
from supervise_core.testing.disks import FaultyDisk, WatchedDisk
from supervise_numpy import ArrayBackend

from .one_step_each import assert_one_step_each


class Model:
    """Arrays whose every element is the step; some of them strided, so that they have no address."""

    def __init__(self, logdir: Path, **options: Any) -> None:
        wide = np.zeros((40, 60))
        self.arrays = {"w": np.zeros(5000), "strided": wide[::2, ::3], "empty": np.zeros(0), "scalar": np.zeros(())}
        options.setdefault("keep", KeepAll())
        self.sv = Supervisor(
            ArrayBackend(self.arrays), logdir, summarize_every=None, signals=False, staging="none", **options
        )

    def step(self, session: Any) -> None:
        for array in self.arrays.values():
            array += 1
        session.global_step += 1


class RacingDisk(WatchedDisk):
    """A disk during whose writes some other thread of the program changes an array."""

    def __init__(self) -> None:
        super().__init__()
        self.array = np.zeros(0)

    def about_to(self, method: str, path: Path) -> None:
        if method == "write":
            self.array += 1


def test_each_save_is_on_disk_before_the_loop_goes_on(tmp_path: Path) -> None:
    model = Model(tmp_path, save_every=EverySteps(2))
    with model.sv.managed_session() as session:
        while not model.sv.should_stop() and session.global_step < 7:
            assert model.sv.report.saves == 1 + session.global_step // 2
            model.step(session)
    assert_one_step_each(tmp_path, [0, 2, 4, 6, 7])
    again = Model(tmp_path)
    with again.sv.managed_session() as session:
        assert session.global_step == 7
        assert again.arrays["strided"][3, 4] == 7


def test_the_last_step_is_that_at_which_the_loop_was_told_to_stop(tmp_path: Path) -> None:
    model = Model(tmp_path, save_every=None)
    with model.sv.managed_session() as session:
        while not model.sv.should_stop():
            model.step(session)
            if session.global_step == 3:
                model.sv.request_stop()
        model.arrays["w"] += 100  # not training any more
    assert_one_step_each(tmp_path, [0, 3])
    assert model.sv.report.final_save == "step 3"


def test_the_end_of_a_pass_is_written_at_once(tmp_path: Path) -> None:
    model = Model(tmp_path, save_every=None)
    with model.sv.managed_session() as session:
        for _ in model.sv.epochs(1):
            for _ in model.sv.batches(range(4)):
                model.step(session)
            assert model.sv.report.saves == 2
    assert_one_step_each(tmp_path, [0, 4])


def test_a_final_save_that_fails_is_told_of(tmp_path: Path) -> None:
    disk = FaultyDisk()
    model = Model(tmp_path, save_every=None, store=DirectoryStore(tmp_path, disk=disk), clock=FakeClock())

    def run() -> None:
        with model.sv.managed_session() as session:
            model.step(session)
            disk.fail(errno.ENOSPC, method="create", forever=True)

    with pytest.raises(OSError, match="space"):
        run()
    assert model.sv.report.exit_status != 0
    assert_one_step_each(tmp_path, [0])


def test_at_the_end_of_a_pass_a_save_that_fails_is_tried_again_at_the_end(tmp_path: Path) -> None:
    disk = FaultyDisk()
    model = Model(tmp_path, save_every=None, store=DirectoryStore(tmp_path, disk=disk), clock=FakeClock())
    with model.sv.managed_session() as session:
        for _ in model.sv.epochs(1):
            for _ in model.sv.batches(range(4)):
                model.step(session)
                if session.global_step == 4:
                    disk.fail(errno.ENOSPC, method="create")
        assert model.sv.report.failed_saves == 1
    assert_one_step_each(tmp_path, [0, 4])


def test_what_another_thread_changes_meanwhile_is_hashed_as_it_was_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "_GATHERED", 1 << 16)
    disk = RacingDisk()
    disk.array = array = np.zeros((6, HASHED_APART // 8))
    sv = Supervisor(
        ArrayBackend({"w": array}), tmp_path, store=DirectoryStore(tmp_path, disk=disk),
        save_every=None, summarize_every=None, signals=False, staging="none",
    )  # fmt: skip
    with sv.managed_session() as session:
        session.global_step += 1
    disk.array = np.zeros(0)
    checkpoints = CheckpointDirectory(tmp_path)
    saved = checkpoints.at(1)
    saved.verify()
    written = np.unique(saved.load("model")["w"])
    assert written.size > 1, "no write changed what was not written yet"


def test_staging_is_an_object_or_none(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="staging="):
        Supervisor(ArrayBackend({"w": np.zeros(1)}), tmp_path, staging="some")  # type: ignore[arg-type]
    Supervisor(ArrayBackend({"w": np.zeros(1)}), tmp_path, staging=Staging(shard_bytes=1000))
