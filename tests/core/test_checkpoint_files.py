"""A snapshot as files and back, in a directory and in a store that is none."""

from __future__ import annotations

import json
from collections.abc import Generator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from supervise_core.checkpoint_files import read_checkpoint, verify_checkpoint
from supervise_core.checkpoint_format import CheckpointId
from supervise_core.checkpoint_store import CheckpointStore
from supervise_core.directory_store import DirectoryStore
from supervise_core.errors import CheckpointDamagedError
from supervise_core.manifest import Manifest
from supervise_core.snapshot import Snapshot
from supervise_core.snapshot_files import check_state_size, write_snapshot
from supervise_core.staging import Staging
from supervise_core.tagged_json import encode
from supervise_core.testing.stores import MemoryStore


@pytest.fixture(params=["directory", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Generator[CheckpointStore, None, None]:
    made: CheckpointStore = DirectoryStore(tmp_path / "logs") if request.param == "directory" else MemoryStore()
    with made.writing():
        yield made


STATE: dict[str, Any] = {
    "model": {f"w{number}": np.arange(100.0) + number for number in range(5)},
    "optimizer": {"lr": 0.1, "betas": (0.9, 0.999), 0: np.zeros(3, np.int8)},
    "scheduler": {"milestones": {30: 1}},
}


def snapshot_of(state: dict[str, Any], staging: Staging | None = None) -> Snapshot:
    memory = staging or Staging()
    for part, tree in state.items():
        memory.put(part, tree)
    return memory.snapshot()


def commit(store: CheckpointStore, snapshot: Snapshot, step: int = 1) -> CheckpointId:
    draft = store.begin(CheckpointId(step))
    files = write_snapshot(draft, snapshot, encode({"data": (1, 2)})).files
    return draft.commit(Manifest(step, "numpy", 1.0, tuple(snapshot.parts), files))


def test_round_trip(store: CheckpointStore) -> None:
    with store.open(commit(store, snapshot_of(STATE))) as reader:
        content = read_checkpoint(reader)
        assert list(content.parts) == ["model", "optimizer", "scheduler"]
        assert content.run_state == {"data": (1, 2)}
        assert content.parts["scheduler"].tree() == {"milestones": {30: 1}}
        assert content.parts["optimizer"].tree()["betas"] == (0.9, 0.999)
        for name, array in STATE["model"].items():
            assert np.array_equal(content.parts["model"].tree()[name], array)


def test_a_part_without_tensors_has_no_file_of_its_own(store: CheckpointStore) -> None:
    with store.open(commit(store, snapshot_of(STATE))) as reader:
        assert sorted(reader.manifest().files) == ["model.safetensors", "optimizer.safetensors", "state.json"]


def test_a_part_is_read_while_the_checkpoint_is_open(store: CheckpointStore) -> None:
    with store.open(commit(store, snapshot_of(STATE))) as reader:
        part = read_checkpoint(reader).parts["model"]
        held = part.held()
    assert np.array_equal(held.tree()["w4"], STATE["model"]["w4"])
    if isinstance(store, DirectoryStore):
        with pytest.raises(ValueError, match="closed"):
            part.tree()


def test_sharded(store: CheckpointStore) -> None:
    checkpoint = commit(store, snapshot_of(STATE, Staging(shard_bytes=1700)))
    with store.open(checkpoint) as reader:
        manifest = reader.manifest()
        assert sorted(manifest.files) == [
            "model-00001-of-00003.safetensors",
            "model-00002-of-00003.safetensors",
            "model-00003-of-00003.safetensors",
            "model.safetensors.index.json",
            "optimizer.safetensors",
            "state.json",
        ]
        index = json.loads(reader.content("model.safetensors.index.json"))
        model = read_checkpoint(reader).parts["model"].tree()
    assert index["metadata"] == {"total_size": 5 * 800}
    assert index["weight_map"]["w4"] == "model-00003-of-00003.safetensors"
    for name, array in STATE["model"].items():
        assert np.array_equal(model[name], array)


@pytest.mark.parametrize("shard_bytes", [10**9, 1700])
def test_safetensors_reads_our_files(tmp_path: Path, shard_bytes: int) -> None:
    safetensors = pytest.importorskip("safetensors")
    store = DirectoryStore(tmp_path)
    with store.writing():
        checkpoint = commit(store, snapshot_of(STATE, Staging(shard_bytes)))
    folder = tmp_path / store.name_of(checkpoint)
    index = folder / "model.safetensors.index.json"
    if index.exists():
        places = json.loads(index.read_bytes())["weight_map"]
    else:
        places = dict.fromkeys(STATE["model"], "model.safetensors")
    assert index.exists() == (shard_bytes == 1700)
    for name, array in STATE["model"].items():
        with safetensors.safe_open(folder / places[name], framework="np") as opened:
            assert np.array_equal(opened.get_tensor(name), array)


def test_a_shard_of_a_sharded_part_is_verified(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path)
    with store.writing():
        checkpoint = commit(store, snapshot_of(STATE, Staging(shard_bytes=1700)))
    path = tmp_path / store.name_of(checkpoint) / "model-00002-of-00003.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with store.open(checkpoint) as reader, pytest.raises(CheckpointDamagedError, match="00002-of-00003"):
        verify_checkpoint(reader)
    path.unlink()
    with (
        store.open(checkpoint) as reader,
        pytest.raises(CheckpointDamagedError, match=r"00002-of-00003\.safetensors is missing"),
    ):
        verify_checkpoint(reader)


def test_files_of_the_manifest_that_no_part_needs_are_verified_too(store: CheckpointStore) -> None:
    from supervise_core.manifest import FileRecord

    snapshot = snapshot_of(STATE)
    draft = store.begin(CheckpointId(1))
    files = write_snapshot(draft, snapshot, None).files
    draft.commit(Manifest(1, "numpy", 1.0, tuple(snapshot.parts), files | {"extra.bin": FileRecord(3, "0" * 32)}))
    with store.open(CheckpointId(1)) as reader, pytest.raises(CheckpointDamagedError, match=r"extra.bin is missing"):
        verify_checkpoint(reader)


def test_state_that_is_too_large_is_found_before_it_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("supervise_core.snapshot_files.LARGEST_STATE", 100)
    with pytest.raises(ValueError, match="use arrays"):
        check_state_size(snapshot_of({"model": ["x" * 200]}), None)
    check_state_size(snapshot_of({"model": np.zeros(1000)}), None)
