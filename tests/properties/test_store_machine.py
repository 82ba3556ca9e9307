"""A state machine over the directory store: commits, prunings, damage, crashes, zombies and restarts in any order."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from pathlib import Path

import hypothesis
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from supervise_core.checkpoint_format import CheckpointId
from supervise_core.checkpointer import prune
from supervise_core.directory_store import DirectoryStore
from supervise_core.errors import LeaseHeldError, LeaseLostError
from supervise_core.retention import KeepLatest
from supervise_core.testing.disks import Crash, CrashingDisk
from supervise_core.testing.hosts import FakeHost, FakeMachine
from supervise_core.testing.store_contract import FILE, manifest_of, write_checkpoint


class HastyCrashingDisk(CrashingDisk):
    """Crashes at any call, and syncs nothing."""

    def sync(self, descriptor: int) -> None:
        self._before("sync", self._paths[descriptor])

    def sync_directory(self, path: Path) -> None:
        self._before("sync_directory", path)


class StoreMachine(RuleBasedStateMachine):
    """``listed`` and ``evidence`` are what must be there; what a crash left undecided is in ``maybe``."""

    @initialize()
    def begin(self) -> None:
        self.directory = Path(tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
        self.machine = FakeMachine()
        self.listed: dict[CheckpointId, bytes] = {}
        self.evidence: list[str] = []
        self.zombies: list[DirectoryStore] = []
        self.start()

    def teardown(self) -> None:
        if hasattr(self, "directory"):
            shutil.rmtree(self.directory)

    def start(self) -> None:
        self.process: FakeHost = self.machine.process()
        self.disk = HastyCrashingDisk()
        self.store = DirectoryStore(self.directory / "logs", disk=self.disk, host=self.process)
        self.store.acquire()

    # ---- a writer that lives

    @rule(step=st.integers(0, 20), content=st.binary(max_size=20))
    def commit(self, step: int, content: bytes) -> None:
        target = self.next_revision(step)
        write_checkpoint(self.store, target, content)
        self.listed[target] = content

    @rule(step=st.integers(0, 20))
    def give_up_a_draft(self, step: int) -> None:
        draft = self.store.begin(self.next_revision(step))
        draft.write(FILE, [b"half"])
        draft.discard()

    @rule(count=st.integers(1, 4))
    def prune(self, count: int) -> None:
        prune(self.store, KeepLatest(count))
        newest = {checkpoint.step: checkpoint for checkpoint in sorted(self.listed)}
        kept = sorted(newest)[-count:]
        self.listed = {newest[step]: self.listed[newest[step]] for step in kept}

    @precondition(lambda self: self.listed)
    @rule(data=st.data())
    def set_aside(self, data: st.DataObject) -> None:
        checkpoint = data.draw(st.sampled_from(sorted(self.listed)))
        self.store.set_aside(checkpoint, f"reason {checkpoint}")
        del self.listed[checkpoint]
        self.evidence.append(f"reason {checkpoint}")

    @precondition(lambda self: self.listed)
    @rule(data=st.data())
    def retire(self, data: st.DataObject) -> None:
        checkpoint = data.draw(st.sampled_from(sorted(self.listed)))
        self.store.retire(checkpoint)
        del self.listed[checkpoint]

    @rule()
    def retire_damaged(self) -> None:
        self.store.retire_damaged()
        self.evidence.clear()

    @rule()
    def beat(self) -> None:
        self.store.beat()

    @rule()
    def second_writer_is_refused(self) -> None:
        other = DirectoryStore(self.directory / "logs", host=self.machine.process())
        with pytest.raises(LeaseHeldError):
            other.acquire()

    @rule()
    def restart(self) -> None:
        self.store.release()
        self.start()

    # ---- deaths

    @rule()
    def replaced_while_frozen(self) -> None:
        self.zombies.append(self.store)
        self.process.die()
        self.start()

    @precondition(lambda self: self.zombies)
    @rule(data=st.data())
    def zombie_wakes(self, data: st.DataObject) -> None:
        zombie = data.draw(st.sampled_from(self.zombies))
        victim = max(self.listed, default=CheckpointId(0))
        acts = [
            lambda: write_checkpoint(zombie, CheckpointId(50), b"zombie"),
            lambda: zombie.remove(victim),
            lambda: zombie.set_aside(victim, "zombie"),
            zombie.beat,
        ]
        with pytest.raises(LeaseLostError):
            data.draw(st.sampled_from(acts))()
        zombie.release() if data.draw(st.booleans()) else None
        self.zombies = [one for one in self.zombies if one is not zombie]

    @rule(data=st.data(), after=st.integers(1, 14), step=st.integers(0, 20))
    def crash(self, data: st.DataObject, after: int, step: int) -> None:
        target = self.next_revision(step)
        victim = data.draw(st.sampled_from([*sorted(self.listed), None]))
        act = data.draw(st.sampled_from(["commit", "remove", "set_aside", "retire"]))
        self.disk.crash_before = len(self.disk.calls) + after
        done = False
        with contextlib.suppress(Crash):
            if act == "commit":
                write_checkpoint(self.store, target, b"late")
            elif victim is not None:
                getattr(self.store, act)(victim, *(["reason late"] if act == "set_aside" else []))
            done = True
        self.process.die()
        self.start()
        self.settle(act, target, victim, done)

    def settle(self, act: str, target: CheckpointId, victim: CheckpointId | None, done: bool) -> None:
        """Find out on which side of the change the crash fell; it must be one of the two."""
        there = set(self.store.checkpoints())
        if act == "commit":
            if target in there:
                self.listed[target] = b"late"
            assert not done or target in there
        elif victim is not None:
            if victim not in there:
                del self.listed[victim]
                if act == "set_aside":
                    self.evidence.append("reason late")
            assert not done or victim not in there

    # ---- what holds at any time

    @invariant()
    def listing_is_as_it_must_be(self) -> None:
        if not hasattr(self, "directory"):
            return
        assert self.store.checkpoints() == sorted(self.listed)
        for checkpoint, content in self.listed.items():
            with self.store.open(checkpoint) as reader:
                manifest = reader.manifest()
                assert manifest == manifest_of(checkpoint.step, content)
                assert reader.read(FILE, manifest.files[FILE]) == content

    @invariant()
    def evidence_is_kept(self) -> None:
        if hasattr(self, "directory"):
            assert sorted(self.store.damaged().values()) == sorted(self.evidence)

    @invariant()
    def work_folder_holds_the_lease_alone(self) -> None:
        if hasattr(self, "directory"):
            work = self.directory / "logs" / ".work"
            (lease,) = work.iterdir()
            assert sorted(path.name.partition("-")[0] for path in lease.iterdir()) == ["beat", "owner.json"]

    def next_revision(self, step: int) -> CheckpointId:
        there = [checkpoint.revision for checkpoint in self.listed if checkpoint.step == step]
        return CheckpointId(step, max(there) + 1 if there else 0)


@pytest.mark.campaign(small=100, soak=2000)
def test_store_machine(count: int, seed: int) -> None:
    run_state_machine_as_test(
        hypothesis.seed(seed)(StoreMachine),
        settings=settings(max_examples=count, stateful_step_count=25, deadline=None, database=None),
    )
