"""A state machine over one run after another: whatever changes, fails or is pruned, each checkpoint is whole."""

from __future__ import annotations

import errno
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
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

from supervise_core import memory, safetensors_format, tensor_files
from supervise_core.checkpoint_files import read_checkpoint, verify_checkpoint
from supervise_core.checkpoint_format import Base, CheckpointId
from supervise_core.checkpointer import prune
from supervise_core.directory_store import DirectoryStore
from supervise_core.manifest import Manifest
from supervise_core.retention import KeepLatest
from supervise_core.safetensors_format import parse
from supervise_core.snapshot_files import write_snapshot
from supervise_core.staging import Staging
from supervise_core.testing.disks import CachedDisk, FaultyDisk, HastyDisk

try:
    import safetensors
except ImportError:
    safetensors = None


class HastyFaultyDisk(FaultyDisk, HastyDisk):
    """Syncs nothing, and fails when it is told to."""


class HastyFaultyCachedDisk(FaultyDisk, CachedDisk, HastyDisk):
    """The same without direct writes."""


SIZES = [1, 1, 3, 8, 30, 30, 120, 400, 0]
DTYPES = ["f8", "f4", "i2", "u1"]


class SharingMachine(RuleBasedStateMachine):
    """``expected`` is what each checkpoint must hold: of each part, tensors by name."""

    @initialize(
        direct=st.booleans(), shard_bytes=st.sampled_from([10**9, 10**9, 600]), large=st.sampled_from([30, 1 << 20]),
        chance=st.integers(0, 1000),
    )  # fmt: skip
    def begin(self, direct: bool, shard_bytes: int, large: int, chance: int) -> None:
        self.patch = pytest.MonkeyPatch()
        for module in (safetensors_format, tensor_files):
            self.patch.setattr(module, "HASHED_APART", large)
        self.patch.setattr(memory, "_SAMPLE", 8)
        self.directory = Path(tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
        self.disk: FaultyDisk = HastyFaultyDisk() if direct else HastyFaultyCachedDisk()
        self.shard_bytes = shard_bytes
        self.expected: dict[CheckpointId, dict[str, dict[str, Any]]] = {}
        self.checked: set[CheckpointId] = set()
        self.step = self.names = 0
        self.state: dict[str, dict[str, Any]] = {"model": {}, "optimizer": {}}
        for number, size in enumerate(SIZES):
            self.add("model" if number % 3 else "optimizer", size, DTYPES[(number + chance) % 4])
        self.start()

    def teardown(self) -> None:
        if hasattr(self, "patch"):
            self.patch.undo()
        if hasattr(self, "directory"):
            shutil.rmtree(self.directory)

    def start(self) -> None:
        self.staging = Staging(self.shard_bytes)
        self.base: Base | None = None
        self.store = DirectoryStore(self.directory / "logs", disk=self.disk)
        self.store.acquire()

    def add(self, part: str, size: int, dtype: str) -> None:
        self.names += 1
        self.state[part][f"t{self.names}"] = (np.arange(size) % 120 + self.names).astype(dtype)

    # ---- what the program does

    @rule(data=st.data(), back=st.booleans())
    def change_some(self, data: st.DataObject, back: bool) -> None:
        """A bit somewhere in some tensors; often the same bit again, so that old bytes come back."""
        there = sorted((part, name) for part, tree in self.state.items() for name in tree)
        for part, name in data.draw(st.lists(st.sampled_from(there), max_size=5, unique=True)):
            raw = self.state[part][name].reshape(-1).view(np.uint8)
            if raw.size:
                raw[0 if back else data.draw(st.integers(0, raw.size - 1))] ^= 1

    @rule(part=st.sampled_from(["model", "optimizer"]))
    def change_a_whole_part(self, part: str) -> None:
        for array in self.state[part].values():
            array += 1

    @rule(part=st.sampled_from(["model", "optimizer"]), size=st.sampled_from(SIZES), dtype=st.sampled_from(DTYPES))
    def add_a_tensor(self, part: str, size: int, dtype: str) -> None:
        self.add(part, size, dtype)

    @precondition(lambda self: len(self.state["model"]) > 1)
    @rule(data=st.data())
    def drop_a_tensor(self, data: st.DataObject) -> None:
        del self.state["model"][data.draw(st.sampled_from(sorted(self.state["model"])))]

    @rule(data=st.data())
    def reshape_a_tensor(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.state["model"])))
        self.state["model"][name] = self.state["model"][name].reshape(1, -1)

    @rule()
    def drop_the_optimizer(self) -> None:
        """And have it come back with nothing in it."""
        self.state["optimizer"] = {}

    # ---- saves

    def snapshot(self) -> Any:
        for part, tree in self.state.items():
            self.staging.put(part, tree)
        return self.staging.snapshot()

    def commit(self, step: int, replaces: CheckpointId | None = None) -> None:
        snapshot = self.snapshot()
        draft = self.store.begin(CheckpointId(step, 0 if replaces is None else replaces.revision + 1))
        try:
            written = write_snapshot(draft, snapshot, None, self.base)
            manifest = Manifest(step, "numpy", 1.7e9 + step, tuple(self.state), written.files)
            committed = draft.commit(manifest, replaces)
        except OSError:
            self.disk.heal()
            draft.discard()
            raise
        self.base = Base(committed, written.placed)
        self.expected[committed] = {
            part: {name: array.copy() for name, array in tree.items()} for part, tree in self.state.items()
        }
        self.checked.discard(committed)

    @rule()
    def save(self) -> None:
        self.step += 1
        self.commit(self.step)

    @precondition(lambda self: self.expected)
    @rule()
    def save_the_same_step_again(self) -> None:
        newest = max(self.expected)
        self.commit(newest.step, newest)

    @rule(at=st.integers(1, 12), number=st.sampled_from([errno.ENOSPC, errno.EIO]), method=st.sampled_from(
        ["write", "sync", "create", "link", None]))  # fmt: skip
    def fail_a_save(self, at: int, number: int, method: str | None) -> None:
        """It may come to its end, where there are not that many calls."""
        self.step += 1
        self.disk.fail(number, at, method=method)
        try:
            self.commit(self.step)
        except OSError as error:
            assert error.errno == number  # noqa: PT017
            there = CheckpointId(self.step)
            if there in self.store.checkpoints():  # the last call of all failed
                self.expected[there] = {
                    part: {name: array.copy() for name, array in tree.items()} for part, tree in self.state.items()
                }
                self.base = None
        self.disk.heal()

    @rule()
    def take_a_snapshot_for_nothing(self) -> None:
        self.snapshot()

    @rule()
    def fail_half_way(self) -> None:
        self.staging.put("model", self.state["model"])
        self.staging.discard()

    # ---- what happens to checkpoints

    @rule(count=st.integers(1, 4))
    def prune(self, count: int) -> None:
        prune(self.store, KeepLatest(count))
        self.expected = {one: self.expected[one] for one in sorted(self.expected)[-count:]}

    @precondition(lambda self: self.expected)
    @rule(data=st.data(), act=st.sampled_from(["remove", "retire", "set_aside"]))
    def put_away(self, data: st.DataObject, act: str) -> None:
        checkpoint = data.draw(st.sampled_from(sorted(self.expected)))
        getattr(self.store, act)(checkpoint, *(["for the test"] if act == "set_aside" else []))
        del self.expected[checkpoint]

    @precondition(lambda self: self.expected)
    @rule(data=st.data())
    def truncate_a_file(self, data: st.DataObject) -> None:
        """All that share it are lost, and found to be; nothing that comes later shares it."""
        checkpoint = data.draw(st.sampled_from(sorted(self.expected)))
        folder = self.store.path / self.store.name_of(checkpoint)
        path = data.draw(st.sampled_from(sorted(folder.glob("*.safetensors"))))
        inode = path.stat().st_ino
        with path.open("r+b") as file:
            file.truncate(path.stat().st_size - 1)
        for other in sorted(self.expected):
            folder = self.store.path / self.store.name_of(other)
            if any(one.stat().st_ino == inode for one in folder.glob("*.safetensors")):
                self.store.set_aside(other, "truncated")
                del self.expected[other]

    @rule()
    def begin_a_new_run(self) -> None:
        self.store.release()
        self.start()
        if self.expected:
            newest = max(self.expected)
            with self.store.open(newest) as reader:
                parts = read_checkpoint(reader).parts
                self.state = {name: part.tree() for name, part in parts.items()}

    # ---- what holds at any time

    @invariant()
    def everything_is_whole(self) -> None:
        if not hasattr(self, "directory"):
            return
        assert self.store.checkpoints() == sorted(self.expected)
        for checkpoint in sorted(self.expected):
            self.check(checkpoint)

    def check(self, checkpoint: CheckpointId) -> None:
        with self.store.open(checkpoint) as reader:
            manifest = verify_checkpoint(reader)
            parts = read_checkpoint(reader).parts
            for name, tree in self.expected[checkpoint].items():
                check_equal(parts[name].tree(), tree)
        if checkpoint in self.checked:
            return
        self.checked.add(checkpoint)  # files are never written to again, so that once is enough for this
        folder = self.store.path / self.store.name_of(checkpoint)
        assert {path.name for path in folder.iterdir()} == {*manifest.files, "manifest.json"}
        for name, tree in self.expected[checkpoint].items():
            check_other_readers(folder, name, tree)


def check_equal(found: dict[str, Any], tree: dict[str, Any]) -> None:
    assert list(found) == list(tree)
    for name, array in tree.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape)
        assert found[name].tobytes() == array.tobytes()


def check_other_readers(folder: Path, part: str, tree: dict[str, Any]) -> None:
    """One that goes by the index, and one that knows of none and reads file upon file in the order of their names."""
    files = sorted(path for path in folder.glob(f"{part}*.safetensors"))
    index = folder / f"{part}.safetensors.index.json"
    assert index.exists() == (len(files) > 1)
    places = (
        json.loads(index.read_bytes())["weight_map"] if index.exists() else dict.fromkeys(tree, f"{part}.safetensors")
    )
    assert set(places) == set(tree)
    naive: dict[str, bytes] = {}
    for path in files:
        naive |= {name: bytes(data) for name, (_, data) in parse(path.read_bytes()).items()}
    for name, array in tree.items():
        assert naive[name] == array.tobytes()
    if safetensors is None:
        return
    for path in files:
        with safetensors.safe_open(path, framework="np") as opened:
            held = set(opened.keys())
            for name in (name for name, file in places.items() if file == path.name):
                assert name in held
                found = opened.get_tensor(name)
                assert (found.dtype, found.shape) == (tree[name].dtype, tree[name].shape)
                assert found.tobytes() == tree[name].tobytes()


@pytest.mark.campaign(small=60, soak=2000)
def test_sharing_machine(count: int, seed: int) -> None:
    run_state_machine_as_test(
        hypothesis.seed(seed)(SharingMachine),
        settings=settings(max_examples=count, stateful_step_count=30, deadline=None, database=None),
    )
