"""What did not change is not written again: which files two checkpoints have in common, and that nobody notices."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from supervise_core.checkpoint_files import read_checkpoint, verify_checkpoint
from supervise_core.checkpoint_format import Base, CheckpointId
from supervise_core.checkpoint_store import CheckpointStore
from supervise_core.directory_store import DirectoryStore
from supervise_core.manifest import Manifest
from supervise_core.safetensors_format import parse
from supervise_core.sharing import MOST_DEAD, MOST_SHARDS
from supervise_core.snapshot import Snapshot
from supervise_core.snapshot_files import write_snapshot
from supervise_core.staging import NoStaging, Staging
from supervise_core.testing.disks import CachedDisk, FaultyDisk, HastyDisk, LinklessDisk
from supervise_core.testing.stores import MemoryStore

Tree = dict[str, Any]

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


class HastyCachedDisk(CachedDisk, HastyDisk):
    pass


class HastyFaultyDisk(FaultyDisk, HastyDisk):
    pass


class HastyLinklessDisk(LinklessDisk, HastyDisk):
    pass


class Saves:
    """The saves of one run, each with what the one before it left to share; and what they have to hold."""

    def __init__(self, store: CheckpointStore, staging: Staging | None = None) -> None:
        self.store = store
        self.staging = staging or Staging()
        self.base: Base | None = None
        self.held: dict[CheckpointId, dict[str, bytes]] = {}
        self.written: dict[CheckpointId, set[str]] = {}
        self._step = 0

    def take(self, state: Tree, **parts: Tree) -> Snapshot:
        """A snapshot of the part ``model``, and of others; it need not be written."""
        for name, tree in {"model": state, **parts}.items():
            self.staging.put(name, tree)
        return self.staging.snapshot()

    def save(self, state: Tree, **parts: Tree) -> CheckpointId:
        """Commit a checkpoint, and check it and those before it."""
        self._step += 1
        snapshot = self.take(state, **parts)
        draft = _Noting(self.store.begin(CheckpointId(self._step)))
        try:
            files = write_snapshot(draft, snapshot, None, self.base)
            committed = draft.commit(Manifest(self._step, "numpy", 1.0, tuple(snapshot.parts), files.files))
        except OSError:
            draft.discard()
            raise
        self.base = Base(committed, files.placed)
        self.held[committed] = bytes_of(state)
        self.written[committed] = draft.written
        self.check()
        return committed

    def check(self) -> None:
        """Everything that is there is whole and holds what it was given; also for readers that know less."""
        for checkpoint in self.store.checkpoints():
            if checkpoint not in self.held:
                continue
            with self.store.open(checkpoint) as reader:
                verify_checkpoint(reader)
                found = read_checkpoint(reader).parts["model"].tree()
            assert bytes_of(found) == self.held[checkpoint]
            assert self.as_read_by_the_naive(checkpoint) == self.held[checkpoint]
            self.check_index(checkpoint)

    def forget(self, checkpoint: CheckpointId) -> None:
        """Do not check this one any more."""
        self.held.pop(checkpoint)

    def files(self, checkpoint: CheckpointId, part: str = "model") -> dict[str, bytearray]:
        """The files with tensors of a part, by their names."""
        with self.store.open(checkpoint) as reader:
            names = sorted(name for name in reader.manifest().files if name.startswith(part) and "index" not in name)
            return {name: reader.content(name) for name in names}

    def as_read_by_the_naive(self, checkpoint: CheckpointId) -> dict[str, bytes]:
        """Who knows no index reads all the files in the order of their names, and takes what comes last."""
        found: dict[str, bytes] = {}
        for content in self.files(checkpoint).values():
            found |= {name: bytes(data) for name, (_, data) in parse(content).items()}
        return {name: found[name] for name in self.held[checkpoint]}

    def index(self, checkpoint: CheckpointId) -> dict[str, str] | None:
        """Which file holds which tensor; None without an index."""
        with self.store.open(checkpoint) as reader:
            if INDEX not in reader.manifest().files:
                return None
            found: dict[str, str] = json.loads(reader.content(INDEX))["weight_map"]
            return found

    def check_index(self, checkpoint: CheckpointId) -> None:
        files, index, held = self.files(checkpoint), self.index(checkpoint), self.held[checkpoint]
        assert (index is None) == (list(files) in ([SINGLE], []))
        if index is None:
            return
        numbers = range(1, len(files) + 1)
        assert list(files) == [f"model-{number:05d}-of-{len(files):05d}.safetensors" for number in numbers]
        assert set(index.values()) == set(files), "a file that nobody needs"
        assert set(index) == set(held)
        with self.store.open(checkpoint) as reader:
            assert json.loads(reader.content(INDEX))["metadata"] == {"total_size": sum(map(len, held.values()))}


class _Noting:
    """A draft that keeps a list of what is written into it, and not linked."""

    def __init__(self, draft: Any) -> None:
        self._draft = draft
        self.written: set[str] = set()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._draft, name)

    def write(self, file: str, chunks: Any) -> None:
        self.written.add(file)
        self._draft.write(file, chunks)

    def write_blocks(self, file: str, pieces: Any, size: int) -> None:
        self.written.add(file)
        self._draft.write_blocks(file, pieces, size)


def bytes_of(tree: Mapping[str, Any]) -> dict[str, bytes]:
    """The content of each tensor by its name; of those that are one, by the first name."""
    arrays = {name: array for name, array in tree.items() if isinstance(array, np.ndarray)}
    first = {id(array): name for name, array in reversed(arrays.items())}
    return {name: array.tobytes() for name, array in arrays.items() if first[id(array)] == name}


def shard(number: int, count: int) -> str:
    return f"model-{number:05d}-of-{count:05d}.safetensors"


def layers(**elements: int) -> Tree:
    """Tensors of so many elements each."""
    return {name: np.arange(float(count)) + number for number, (name, count) in enumerate(elements.items())}


def tensors_in(content: bytearray) -> set[str]:
    return set(parse(content))


@pytest.fixture(params=["directory", "without direct writes", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Generator[CheckpointStore, None, None]:
    made: CheckpointStore
    match request.param:
        case "directory":
            made = DirectoryStore(tmp_path / "logs", disk=HastyDisk())
        case "without direct writes":
            made = DirectoryStore(tmp_path / "logs", disk=HastyCachedDisk())
        case _:
            made = MemoryStore()
    with made.writing():
        yield made


@pytest.fixture
def directory(tmp_path: Path) -> Generator[DirectoryStore, None, None]:
    store = DirectoryStore(tmp_path / "logs", disk=HastyDisk())
    with store.writing():
        yield store


def inode(store: DirectoryStore, checkpoint: CheckpointId, file: str) -> int:
    return (store.path / store.name_of(checkpoint) / file).stat().st_ino


# ---- what is linked, and what is written


def test_nothing_changed(store: CheckpointStore) -> None:
    saves, state = Saves(store), layers(a=900, b=100)
    first, second, third = saves.save(state), saves.save(state), saves.save(state)
    assert saves.written[first] == {SINGLE, "state.json"}
    for later in (second, third):
        assert saves.written[later] == {"state.json"}
        assert list(saves.files(later)) == [SINGLE]
    if isinstance(store, DirectoryStore):
        assert len({inode(store, checkpoint, SINGLE) for checkpoint in (first, second, third)}) == 1


def test_nine_tenths_are_frozen(store: CheckpointStore) -> None:
    saves, state = Saves(store), layers(frozen=900, trained=100)
    checkpoints = []
    for _ in range(4):
        checkpoints.append(saves.save(state))
        state["trained"] += 1
    first, *later = checkpoints
    for checkpoint in later:
        assert saves.written[checkpoint] == {shard(2, 2), INDEX, "state.json"}
        old, new = saves.files(checkpoint).values()
        assert old == saves.files(first)[SINGLE]
        assert tensors_in(new) == {"trained"}
        assert saves.index(checkpoint) == {"frozen": shard(1, 2), "trained": shard(2, 2)}
        if isinstance(store, DirectoryStore):
            assert inode(store, checkpoint, shard(1, 2)) == inode(store, first, SINGLE)


def test_frozen_and_trained_side_by_side(store: CheckpointStore) -> None:
    """As in LoRA: of each layer the large tensor is frozen and the small ones are trained."""
    names = {
        f"layers.{number}.{kind}": count for number in range(20) for kind, count in (("w", 90), ("a", 5), ("b", 5))
    }
    saves, state = Saves(store), layers(**names)
    saves.save(state)
    for name in names:
        if not name.endswith("w"):
            state[name] += 1
    second = saves.save(state)
    assert tensors_in(saves.files(second)[shard(2, 2)]) == {name for name in names if not name.endswith("w")}


def test_a_shard_with_too_many_dead_bytes_is_written_anew_once(store: CheckpointStore) -> None:
    """Then what stays is in a file of its own, which is linked from then on."""
    saves, state = Saves(store), layers(frozen=60, trained=40)
    first = saves.save(state)
    checkpoints = []
    for _ in range(3):
        state["trained"] += 1
        checkpoints.append(saves.save(state))
    second, third, fourth = checkpoints
    assert saves.written[second] == {shard(1, 2), shard(2, 2), INDEX, "state.json"}
    for checkpoint in (second, third, fourth):
        assert [tensors_in(content) for content in saves.files(checkpoint).values()] == [{"frozen"}, {"trained"}]
    for checkpoint in (third, fourth):
        assert saves.written[checkpoint] == {shard(2, 2), INDEX, "state.json"}
    if isinstance(store, DirectoryStore):
        assert inode(store, second, shard(1, 2)) != inode(store, first, SINGLE)
        assert len({inode(store, checkpoint, shard(1, 2)) for checkpoint in checkpoints}) == 1


@pytest.mark.parametrize(("trained", "is_linked"), [(30, True), (31, False)])
def test_how_many_bytes_may_be_dead(store: CheckpointStore, trained: int, is_linked: bool) -> None:
    assert MOST_DEAD == 0.3
    saves, state = Saves(store), layers(frozen=100 - trained, trained=trained)
    saves.save(state)
    state["trained"] += 1
    assert (shard(1, 2) not in saves.written[saves.save(state)]) == is_linked


def test_dead_bytes_add_up(store: CheckpointStore) -> None:
    """Layers that freeze one after another: what is dead in the first file counts again and again."""
    saves, state = Saves(store), layers(**{f"w{number}": 100 for number in range(10)})
    first = saves.save(state)
    for number in range(3):
        state[f"w{number}"] += 1
        checkpoint = saves.save(state)
        count = number + 2
        assert list(saves.files(checkpoint)) == [shard(one, count) for one in range(1, count + 1)]
        assert saves.written[checkpoint] == {shard(count, count), INDEX, "state.json"}
    state["w3"] += 1
    last = saves.save(state)
    assert saves.files(first)[SINGLE] not in saves.files(last).values()
    assert [tensors_in(content) for content in saves.files(last).values()] == [
        {"w0"}, {"w1"}, {"w2"}, {f"w{number}" for number in range(4, 10)}, {"w3"},
    ]  # fmt: skip


@pytest.mark.parametrize(("frozen", "is_shared"), [(49, False), (50, True)])
def test_too_little_is_unchanged(store: CheckpointStore, frozen: int, is_shared: bool) -> None:
    """Then one file as ever: nobody gains by an index."""
    saves, state = Saves(store), layers(frozen=frozen, trained=1000 - frozen)
    for _ in range(3):
        checkpoint = saves.save(state)
        state["trained"] += 1
    assert list(saves.files(checkpoint)) == ([shard(1, 2), shard(2, 2)] if is_shared else [SINGLE])


@pytest.mark.parametrize(("frozen", "is_shared"), [(49, False), (50, True)])
def test_too_little_is_unchanged_though_it_has_a_file_of_its_own(
    store: CheckpointStore, frozen: int, is_shared: bool
) -> None:
    saves = Saves(store, Staging(shard_bytes=8 * (1000 - frozen)))
    state = layers(frozen=frozen, trained=1000 - frozen)
    first = saves.save(state)
    assert len(saves.files(first)) == 2
    state["trained"] += 1
    assert (shard(1, 2) not in saves.written[saves.save(state)]) == is_shared


def test_everything_changed(store: CheckpointStore) -> None:
    saves, state = Saves(store), layers(a=10, b=10)
    for _ in range(3):
        checkpoint = saves.save(state)
        assert saves.written[checkpoint] == {SINGLE, "state.json"}
        for array in state.values():
            array += 1


def test_nothing_changes_again_after_something_did(store: CheckpointStore) -> None:
    saves, state = Saves(store), layers(frozen=90, trained=10)
    saves.save(state)
    state["trained"] += 1
    second, third = saves.save(state), saves.save(state)
    assert saves.files(third) == saves.files(second)
    assert saves.written[third] == {INDEX, "state.json"}


def test_a_tensor_that_changes_back(store: CheckpointStore) -> None:
    """An old file has the right bytes, but the newer file, which does not, comes after it."""
    saves, state = Saves(store), layers(frozen=900, trained=100)
    for value in (1.0, 2.0, 1.0, 1.0, 2.0):
        state["trained"][:] = value
        saves.save(state)


def test_a_part_in_many_files_is_linked_as_it_is(store: CheckpointStore) -> None:
    saves = Saves(store, Staging(shard_bytes=1000))
    state = layers(**{f"w{number}": 100 for number in range(10)})
    first, second = saves.save(state), saves.save(state)
    assert len(saves.files(first)) == 10
    assert saves.written[second] == {INDEX, "state.json"}
    state["w4"] += 1
    third = saves.save(state)
    assert saves.written[third] == {shard(10, 10), INDEX, "state.json"}
    assert saves.index(third)["w4"] == shard(10, 10)  # type: ignore[index]


def test_files_that_are_written_anew_have_the_size_that_files_have(store: CheckpointStore) -> None:
    """Also those that are put together of what stays and of what changed."""
    saves = Saves(store, Staging(shard_bytes=2000))
    state = layers(**{f"w{number}": 100 for number in range(12)}, large=400)
    saves.save(state)
    for step in range(6):
        for number in range(step, 12, 3):
            state[f"w{number}"] += 1
        for content in saves.files(saves.save(state)).values():
            tensors = parse(content)
            assert sum(len(data) for _, data in tensors.values()) <= 2000 or set(tensors) == {"large"}


def test_there_are_never_too_many_files(store: CheckpointStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor that changes only once leaves a file behind; beyond some number all are made one again."""
    assert MOST_SHARDS > 8
    monkeypatch.setattr("supervise_core.sharing.MOST_SHARDS", 8)
    count = 16
    saves, state = Saves(store), layers(frozen=100 * count, **{f"w{number}": 1 for number in range(count)})
    saves.save(state)
    files = []
    for number in range(count):
        state[f"w{number}"] += 1
        files.append(len(saves.files(saves.save(state))))
        saves.store.remove(saves.store.checkpoints()[0])
    assert max(files) == 8 + 1
    assert 1 in files


# ---- what counts as changed


@pytest.mark.parametrize(
    ("before", "after"),
    [
        pytest.param(0.0, -0.0, id="the sign of a zero"),
        pytest.param(
            np.uint64(0x7FF8000000000001).view(np.float64), np.uint64(0x7FF8000000000002).view(np.float64), id="NaN"
        ),
    ],
)
def test_bits_count_and_not_values(store: CheckpointStore, before: Any, after: Any) -> None:
    saves, state = Saves(store), layers(frozen=900, trained=100)
    for value in (before, after, after):
        state["trained"][50] = value
        checkpoint = saves.save(state)
    assert saves.written[checkpoint] == {INDEX, "state.json"}


def test_tensors_of_no_bytes_and_scalars(store: CheckpointStore) -> None:
    saves = Saves(store)
    state = {"empty": np.zeros((0, 3)), "scalar": np.array(1.0), "frozen": np.arange(100.0), "none": np.zeros(0, "i1")}
    saves.save(state)
    assert saves.written[saves.save(state)] == {"state.json"}
    state["scalar"] += 1
    assert saves.written[saves.save(state)] == {shard(2, 2), INDEX, "state.json"}
    saves.save(state)


def test_only_tensors_of_no_bytes(store: CheckpointStore) -> None:
    saves, state = Saves(store), {"empty": np.zeros((0, 3)), "other": np.zeros(0)}
    for _ in range(3):
        saves.save(state)


def test_no_tensors_at_all(store: CheckpointStore) -> None:
    saves = Saves(store)
    for step in range(3):
        checkpoint = saves.save({"step": step})
        assert saves.written[checkpoint] == {"state.json"}


def test_tied_tensors_are_one(store: CheckpointStore) -> None:
    saves, tied = Saves(store), np.arange(100.0)
    state = {"frozen": np.arange(900.0), "a": tied, "b": tied}
    for _ in range(3):
        checkpoint = saves.save(state)
        assert set().union(*map(tensors_in, saves.files(checkpoint).values())) == {"frozen", "a"}
        with store.open(checkpoint) as reader:
            found = read_checkpoint(reader).parts["model"].tree()
        assert found["a"] is found["b"]
        assert np.array_equal(found["a"], tied)
        tied += 1
    assert len(saves.files(checkpoint)) == 2


def test_arrays_with_strides(store: CheckpointStore) -> None:
    """They are copied and not compared: they count as changed, and what they hold is right."""
    saves, whole = Saves(store), np.arange(40.0)
    state = {"frozen": np.arange(900.0), "strided": whole[::2], "turned": np.arange(12.0).reshape(3, 4).T}
    saves.save(state)
    for _ in range(2):
        whole += 1
        second = saves.save(state)
        assert tensors_in(saves.files(second)[shard(2, 2)]) == {"strided", "turned"}


def test_parts_share_each_for_itself(store: CheckpointStore) -> None:
    saves = Saves(store)
    state, slots, rest = layers(frozen=100), layers(m=50, v=50), {"lr": 0.1, "x": np.zeros(3)}
    saves.save(state, optimizer=slots, other=rest)
    slots["m"] += 1
    rest["lr"] = 0.2
    second = saves.save(state, optimizer=slots, other=rest)
    assert saves.written[second] == {
        "optimizer-00001-of-00002.safetensors",
        "optimizer-00002-of-00002.safetensors",
        "optimizer.safetensors.index.json",
        "state.json",
    }
    third = saves.save(state, other=rest)
    assert saves.written[third] == {"state.json"}
    fourth = saves.save(state, optimizer=slots, other=rest)
    assert saves.written[fourth] == {"optimizer.safetensors", "state.json"}
    with store.open(fourth) as reader:
        assert read_checkpoint(reader).parts["other"].tree()["lr"] == 0.2


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda state: state.update(new=np.zeros(3)), id="one more"),
        pytest.param(lambda state: state.pop("b"), id="one less"),
        pytest.param(lambda state: state.update(b=state["b"].reshape(2, 5)), id="another shape"),
        pytest.param(lambda state: state.update(b=state["b"].view(np.int64)), id="another dtype"),
        pytest.param(lambda state: state.update(a=state.pop("a")), id="another order"),
    ],
)
def test_another_layout_is_written_in_full(store: CheckpointStore, change: Callable[[Tree], object]) -> None:
    saves, state = Saves(store), layers(a=100, b=10)
    saves.save(state)
    change(state)
    assert saves.written[saves.save(state)] == {SINGLE, "state.json"}
    assert saves.written[saves.save(state)] == {"state.json"}


def test_without_staging_everything_is_written(store: CheckpointStore) -> None:
    saves, state = Saves(store, NoStaging()), layers(a=100, b=10)
    for _ in range(3):
        assert saves.written[saves.save(state)] == {SINGLE, "state.json"}


# ---- snapshots that were not written


def test_a_snapshot_that_was_never_written(store: CheckpointStore) -> None:
    """What changed on its way into it must not look unchanged in the next one."""
    saves, state = Saves(store), layers(frozen=900, a=50, b=50)
    saves.save(state)
    state["a"] += 1
    saves.take(state)
    state["b"] += 1
    saves.take(state)
    checkpoint = saves.save(state)
    assert tensors_in(saves.files(checkpoint)[shard(2, 2)]) == {"a", "b"}
    assert saves.written[saves.save(state)] == {INDEX, "state.json"}


def test_a_tensor_that_changed_back_in_one_that_was_never_written(store: CheckpointStore) -> None:
    saves, state = Saves(store), layers(frozen=900, a=100)
    saves.save(state)
    state["a"] += 1
    saves.take(state)
    state["a"] -= 1
    saves.save(state)


def test_a_snapshot_that_failed_half_way(store: CheckpointStore) -> None:
    saves, state = Saves(store), layers(frozen=900, a=100)
    saves.save(state)
    state["a"] += 1
    saves.staging.put("model", state)
    with pytest.raises(ValueError, match="twice"):
        saves.staging.put("model", state)
    saves.staging.discard()
    saves.save(state)


@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_failed_save_in_between(tmp_path: Path, at: int) -> None:
    disk = HastyFaultyDisk()
    store = DirectoryStore(tmp_path / "logs", disk=disk)
    with store.writing():
        saves, state = Saves(store), layers(frozen=900, a=50, b=50)
        saves.save(state)
        state["a"] += 1
        disk.fail(errno.ENOSPC, at, method="write")
        with pytest.raises(OSError, match="No space"):
            saves.save(state)
        disk.heal()
        state["b"] += 1
        checkpoint = saves.save(state)
        assert tensors_in(saves.files(checkpoint)[shard(2, 2)]) == {"a", "b"}
        saves.save(state)


# ---- the older checkpoint is not what it was


def test_it_may_be_removed_at_any_time(store: CheckpointStore) -> None:
    saves, state = Saves(store), layers(frozen=900, trained=100)
    for _ in range(4):
        checkpoint = saves.save(state)
        state["trained"] += 1
        for older in store.checkpoints()[:-1]:
            store.remove(older)
        saves.check()
    assert store.checkpoints() == [checkpoint]
    assert len(saves.files(checkpoint)) == 2


@pytest.mark.parametrize("act", ["remove", "retire", "set_aside"])
def test_gone_before_the_next_save(store: CheckpointStore, act: str, caplog: pytest.LogCaptureFixture) -> None:
    saves, state = Saves(store), layers(frozen=900, trained=100)
    for _ in range(2):
        last = saves.save(state)
        state["trained"] += 1
    getattr(store, act)(last, *(["a reason"] if act == "set_aside" else []))
    assert saves.written[saves.save(state)] == {SINGLE, "state.json"}
    state["trained"] += 1
    assert saves.written[saves.save(state)] == {shard(2, 2), INDEX, "state.json"}
    assert caplog.records == []


def rename_away(path: Path) -> None:
    path.rename(path.with_name("moved by hand"))


def cut_off(path: Path) -> None:
    os.truncate(path / SINGLE, 100)


def delete_file(path: Path) -> None:
    (path / SINGLE).unlink()


def lengthen(path: Path) -> None:
    with (path / SINGLE).open("ab") as file:
        file.write(b"x")


@pytest.mark.parametrize("harm", [rename_away, cut_off, delete_file, lengthen])
def test_harmed_before_the_next_save(
    directory: DirectoryStore, harm: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    saves, state = Saves(directory), layers(frozen=900, trained=100)
    first = saves.save(state)
    state["trained"] += 1
    harm(directory.path / directory.name_of(first))
    saves.forget(first)
    second = saves.save(state)
    assert saves.written[second] == {SINGLE, "state.json"}
    assert caplog.records == []


def test_one_of_two_files_is_gone(directory: DirectoryStore) -> None:
    """No link is left of those that were made already."""
    saves, state = Saves(directory), layers(frozen=900, trained=100)
    saves.save(state)
    state["trained"] += 1
    second = saves.save(state)
    (directory.path / directory.name_of(second) / shard(2, 2)).unlink()
    saves.forget(second)
    third = saves.save(state)
    assert saves.written[third] == {SINGLE, "state.json"}
    assert sorted(os.listdir(directory.path / directory.name_of(third))) == ["manifest.json", SINGLE, "state.json"]


# ---- file systems that cannot do it


def test_no_hard_links_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    disk = HastyLinklessDisk()
    store = DirectoryStore(tmp_path / "logs", disk=disk)
    with store.writing():
        saves, state = Saves(store), layers(frozen=900, trained=100)
        for _ in range(4):
            checkpoint = saves.save(state)
            assert saves.written[checkpoint] == {SINGLE, "state.json"}
            state["trained"] += 1
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "no file can have two names there" in record.message
    assert str(tmp_path / "logs") in record.message
    assert list((tmp_path / "logs" / ".work").iterdir()) == []


def test_too_many_links_of_one_file(tmp_path: Path) -> None:
    """The file is written anew, and has names left again."""
    disk = HastyFaultyDisk()
    store = DirectoryStore(tmp_path / "logs", disk=disk)
    with store.writing():
        saves, state = Saves(store), layers(frozen=900, trained=100)
        saves.save(state)
        disk.fail(errno.EMLINK, method="link")
        assert saves.written[saves.save(state)] == {SINGLE, "state.json"}
        assert saves.written[saves.save(state)] == {"state.json"}


def test_a_disk_error_while_linking_fails_the_save(tmp_path: Path) -> None:
    disk = HastyFaultyDisk()
    store = DirectoryStore(tmp_path / "logs", disk=disk)
    with store.writing():
        saves, state = Saves(store), layers(frozen=900, trained=100)
        saves.save(state)
        disk.fail(errno.EIO, method="link")
        with pytest.raises(OSError, match="Input/output error"):
            saves.save(state)
        assert saves.written[saves.save(state)] == {"state.json"}


def contents(logdir: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(logdir)): path.read_bytes()
        for path in logdir.rglob("*")
        if path.is_file() and path.name != "manifest.json" and ".work" not in path.parts
    }


def test_the_same_bytes_with_and_without_direct_writes(tmp_path: Path) -> None:
    found = []
    for name, disk in (("direct", HastyDisk()), ("cached", HastyCachedDisk())):
        store = DirectoryStore(tmp_path / name, disk=disk)
        with store.writing():
            saves, state = Saves(store), layers(frozen=60_000, a=3000, b=4001, scalar=1)
            for number in range(4):
                saves.save(state)
                state["a" if number % 2 else "b"] += 1
        found.append(contents(tmp_path / name))
    assert found[0] == found[1]
    assert len(found[0]) > 8


# ---- other readers


def test_safetensors_opens_every_file(directory: DirectoryStore) -> None:
    safetensors = pytest.importorskip("safetensors")
    saves, state = Saves(directory), layers(frozen=900, a=50, b=50, empty=0)
    for name in ("a", "b", "a", "frozen"):
        checkpoint = saves.save(state)
        state[name] += 1
        index = saves.index(checkpoint)
        for tensor, content in saves.held[checkpoint].items():
            file = SINGLE if index is None else index[tensor]
            path = directory.path / directory.name_of(checkpoint) / file
            with safetensors.safe_open(path, framework="np") as opened:
                assert opened.get_tensor(tensor).tobytes() == content


def test_files_are_never_written_to_again(directory: DirectoryStore) -> None:
    """What is linked is another checkpoint's, too."""
    saves, state = Saves(directory), layers(frozen=900, a=50, b=50)
    seen: dict[int, tuple[int, int]] = {}
    names: Sequence[str] = ("a", "b", "a", "b", "frozen", "a")
    for name in names:
        checkpoint = saves.save(state)
        state[name] += 1
        for path in (directory.path / directory.name_of(checkpoint)).iterdir():
            facts = path.stat()
            assert seen.setdefault(facts.st_ino, (facts.st_size, facts.st_mtime_ns)) == (
                facts.st_size,
                facts.st_mtime_ns,
            )
