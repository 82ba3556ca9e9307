"""A part comes back in the very tensors that are there already, where they fit, and else in new ones."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from supervise_core.checkpoint_files import read_checkpoint
from supervise_core.checkpoint_format import CheckpointId, CheckpointReader
from supervise_core.directory_store import DirectoryStore
from supervise_core.errors import CheckpointDamagedError, IncompatibleCheckpointError
from supervise_core.manifest import Manifest
from supervise_core.parts import Part
from supervise_core.snapshot_files import write_snapshot
from supervise_core.staging import Staging
from supervise_core.tagged_json import encode
from supervise_core.tensors import TensorSpec
from supervise_core.testing.stores import MemoryStore

Array = NDArray[Any]


def part_of(tree: Any, name: str = "model", shard_bytes: int = 10**9) -> Part:
    """A part as it comes out of a checkpoint in memory."""
    return read_checkpoint(reader_of(tree, name, shard_bytes)).parts[name]


def reader_of(tree: Any, name: str = "model", shard_bytes: int = 10**9, store: Any = None) -> CheckpointReader:
    staging = Staging(shard_bytes)
    staging.put(name, tree)
    store = store or MemoryStore()
    with store.writing():
        draft = store.begin(CheckpointId(1))
        files = write_snapshot(draft, staging.snapshot(), encode({})).files
        return store.open(draft.commit(Manifest(1, "numpy", 1.0, (name,), files)))


def same(one: Any, other: Any) -> bool:
    if isinstance(one, np.ndarray):
        return (
            isinstance(other, np.ndarray)
            and (one.dtype, one.shape) == (other.dtype, other.shape)
            and one.tobytes() == other.tobytes()
        )
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def filled(like: Any) -> Any:
    """The same tree, each of its arrays another one with other values."""
    if isinstance(like, np.ndarray):
        other = np.empty_like(like)
        other.view(np.uint8).fill(0x5A) if other.flags.c_contiguous and other.ndim else other.fill(0)
        return other
    if isinstance(like, dict):
        return {key: filled(item) for key, item in like.items()}
    if isinstance(like, (list, tuple)):
        return type(like)(map(filled, like))
    return like


TREE: dict[str, Any] = {
    "w": np.arange(12.0).reshape(3, 4),
    "half": np.arange(7, dtype=np.float16),
    "flags": np.array([True, False, True]),
    "nested": [{"deep": np.arange(5)}, (np.array(2.5), np.array([1 + 2j], np.complex64))],
    "big-endian": np.arange(5, dtype=">f4"),
    "text": np.array(["one", "three"]),
    "dates": np.array(["2024-01-01", "2024-05-06"], "datetime64[D]"),
    "record": np.array([(1, 2.5), (3, 4.5)], dtype=[("a", "<i4"), ("b", "<f8")]),
    "double complex": np.array([1 + 2j, 3 - 4j]),
    "empty": np.zeros((0, 3)),
    "plain": [1, "two", None, 3.5],
}


def arrays_of(tree: Any) -> Iterator[Array]:
    if isinstance(tree, np.ndarray):
        yield tree
    elif isinstance(tree, (dict, list, tuple)):
        for item in tree.values() if isinstance(tree, dict) else tree:
            yield from arrays_of(item)


# ---- the same objects


@pytest.mark.parametrize("shard_bytes", [10**9, 100])
def test_every_tensor_comes_back_in_the_one_that_is_there(shard_bytes: int) -> None:
    live = filled(TREE)
    restoration = part_of(TREE, shard_bytes=shard_bytes).restoration(into=live)
    there, back = list(arrays_of(live)), list(arrays_of(restoration.tree))
    assert len(there) == len(back) == 12
    assert all(one is other for one, other in zip(there, back, strict=True))
    restoration.read()
    assert same(restoration.tree, TREE)
    assert same(live, TREE)


def test_nothing_is_changed_before_it_is_read() -> None:
    live = filled(TREE)
    before = [array.tobytes() for array in arrays_of(live)]
    part = part_of(TREE)
    part.restoration(into=live)
    list(part.stored_tensors())
    assert [array.tobytes() for array in arrays_of(live)] == before
    part.tree()
    part.held()
    assert [array.tobytes() for array in arrays_of(live)] == before


def test_what_is_read_again_is_there_again() -> None:
    live = filled(TREE)
    restoration = part_of(TREE).restoration(into=live)
    restoration.read()
    live["w"].fill(7)
    restoration.read()
    assert same(live, TREE)


def test_without_anything_there_all_is_new() -> None:
    assert same(part_of(TREE).tree(), TREE)
    one, other = part_of(TREE).tree(), part_of(TREE).tree()
    assert not any(np.shares_memory(a, b) for a, b in zip(arrays_of(one), arrays_of(other), strict=True))


@pytest.mark.parametrize("stepped", [slice(None, None, 2), slice(None, None, -1), slice(1, 9)])
def test_a_view_is_filled_and_what_lies_between_is_not(stepped: slice) -> None:
    ground = np.full(10, -1.0)
    view = ground[stepped]
    saved = np.arange(float(len(view))) + 100
    restoration = part_of({"w": saved}).restoration(into={"w": view})
    restoration.read()
    assert restoration.tree["w"] is view
    expected = np.full(10, -1.0)
    expected[stepped] = saved
    assert np.array_equal(ground, expected)


def test_arrays_of_another_memory_order_are_filled_by_their_values() -> None:
    saved = np.arange(24.0).reshape(2, 3, 4)
    for live in (np.zeros((2, 3, 4), order="F"), np.zeros((4, 3, 2)).T, np.zeros((2, 4, 3)).transpose(0, 2, 1)):
        for one, other in (
            (saved, live),
            (np.asfortranarray(saved), live),
            (saved.copy(order="F"), np.zeros((2, 3, 4))),
        ):
            restoration = part_of({"w": one}).restoration(into={"w": other})
            restoration.read()
            assert restoration.tree["w"] is other
            assert np.array_equal(other, saved)


# ---- new ones


@pytest.mark.parametrize(
    "live",
    [
        np.zeros(12),
        np.zeros((4, 3)),
        np.zeros((3, 4), np.float32),
        np.zeros((3, 4), np.int64),
        np.zeros((3, 4), ">f8"),
        np.zeros((3, 4, 1)),
        np.zeros((3, 5)),
        np.zeros((0, 4)),
        12.0,
        None,
        [[0.0] * 4] * 3,
        {"w": np.zeros((3, 4))},
    ],
    ids=lambda live: f"{live.dtype}{live.shape}" if isinstance(live, np.ndarray) else type(live).__name__,
)
def test_what_does_not_fit_is_new_and_the_live_one_is_left_alone(live: Any) -> None:
    saved = {"w": np.arange(12.0).reshape(3, 4), "b": np.arange(3.0)}
    here = {"w": live, "b": np.zeros(3)}
    before = [array.tobytes() for array in arrays_of(live)]
    restoration = part_of(saved).restoration(into=here)
    restoration.read()
    assert restoration.tree["w"] is not live
    assert restoration.tree["b"] is here["b"], "that one fits"
    assert same(restoration.tree, saved)
    assert [array.tobytes() for array in arrays_of(live)] == before


def test_the_live_state_may_lack_some_and_have_more() -> None:
    saved = {"a": np.arange(3.0), "b": np.arange(4.0)}
    here = {"c": np.zeros(2), "b": np.zeros(4)}
    restoration = part_of(saved).restoration(into=here)
    restoration.read()
    assert same(restoration.tree, saved)
    assert restoration.tree["b"] is here["b"]
    assert np.array_equal(here["c"], np.zeros(2))
    assert list(restoration.tree) == ["a", "b"]


def test_arrays_that_cannot_be_written_are_left_alone() -> None:
    fixed = np.zeros(3)
    fixed.flags.writeable = False
    restoration = part_of({"w": np.arange(3.0)}).restoration(into={"w": fixed})
    restoration.read()
    assert restoration.tree["w"] is not fixed
    assert np.array_equal(restoration.tree["w"], np.arange(3.0))
    assert np.array_equal(fixed, np.zeros(3))


def test_one_element_seen_many_times_is_left_alone() -> None:
    spread = np.broadcast_to(np.zeros(1), (4,))
    restoration = part_of({"w": np.arange(4.0)}).restoration(into={"w": spread})
    restoration.read()
    assert np.array_equal(restoration.tree["w"], np.arange(4.0))


class Odd:
    pass


@pytest.mark.parametrize("odd", [Odd(), np.array([None]), np.zeros(2).view(np.recarray), lambda: None])
def test_of_a_state_that_could_not_be_saved_nothing_is_reused(odd: Any) -> None:
    saved = {"w": np.arange(3.0), "odd": 1}
    here = {"w": np.zeros(3), "odd": odd}
    restoration = part_of(saved).restoration(into=here)
    restoration.read()
    assert same(restoration.tree, saved)
    assert restoration.tree["w"] is not here["w"]
    assert np.array_equal(here["w"], np.zeros(3))


def test_arrays_that_overlap_are_not_written_over() -> None:
    saved = {"head": np.arange(4.0), "tail": np.arange(4.0) + 10, "apart": np.arange(2.0)}
    ground, apart = np.full(6, -1.0), np.zeros(2)
    here = {"head": ground[:4], "tail": ground[2:], "apart": apart}
    restoration = part_of(saved).restoration(into=here)
    restoration.read()
    assert same(restoration.tree, saved)
    assert restoration.tree["apart"] is apart
    assert np.array_equal(ground, np.full(6, -1.0))


@pytest.mark.parametrize("order", [["all", "head", "middle", "after"], ["after", "middle", "head", "all"]])
def test_one_that_holds_several_others(order: list[str]) -> None:
    ground = np.zeros(10)
    views = {"all": ground[:8], "head": ground[:2], "middle": ground[4:6], "after": ground[8:]}
    saved = {name: np.arange(float(len(views[name]))) + number for number, name in enumerate(order)}
    restoration = part_of(saved).restoration(into={name: views[name] for name in order})
    restoration.read()
    assert same(restoration.tree, saved)
    assert restoration.tree["after"] is views["after"], "it only touches the others"
    assert np.array_equal(ground[:8], np.zeros(8))


def test_neighbours_in_one_memory_are_reused() -> None:
    ground = np.zeros(6)
    here = {"head": ground[:3], "tail": ground[3:]}
    saved = {"head": np.arange(3.0), "tail": np.arange(3.0) + 5}
    restoration = part_of(saved).restoration(into=here)
    restoration.read()
    assert ground.tolist() == [0, 1, 2, 5, 6, 7]


@pytest.mark.parametrize("dtype", [np.int64, np.uint8])
def test_one_memory_seen_as_two_dtypes_is_not_written_over(dtype: Any) -> None:
    ground = np.zeros(4)
    here = {"numbers": ground, "bits": ground.view(dtype)}
    saved = {"numbers": np.arange(4.0), "bits": np.ones(len(here["bits"]), dtype)}
    restoration = part_of(saved).restoration(into=here)
    restoration.read()
    assert same(restoration.tree, saved)
    assert np.array_equal(ground, np.zeros(4))


# ---- ties


def test_tied_there_and_here() -> None:
    shared, live = np.arange(5.0), np.zeros(5)
    restoration = part_of({"a": shared, "b": [shared], "c": shared[:]}).restoration(
        into={"a": live, "b": [live], "c": live}
    )
    restoration.read()
    assert restoration.tree["a"] is live
    assert restoration.tree["b"][0] is live
    assert restoration.tree["c"] is live
    assert np.array_equal(live, shared)


def test_tied_there_and_not_here() -> None:
    shared, here = np.arange(5.0), {"a": np.zeros(5), "b": np.full(5, -1.0)}
    restoration = part_of({"a": shared, "b": shared}).restoration(into=here)
    restoration.read()
    assert restoration.tree["a"] is restoration.tree["b"] is here["a"]
    assert np.array_equal(here["a"], shared)
    assert np.array_equal(here["b"], np.full(5, -1.0)), "the backend copies it, if it is to be untied"


def test_tied_here_and_not_there() -> None:
    live = np.zeros(5)
    saved = {"a": np.arange(5.0), "b": np.arange(5.0) + 10}
    restoration = part_of(saved).restoration(into={"a": live, "b": live})
    restoration.read()
    assert same(restoration.tree, saved)


# ---- names


DUPLICATES: dict[str, Any] = {"x": {"y": np.arange(3.0)}, "x.y": np.arange(3.0) + 10, "z": np.arange(2.0)}


def test_of_names_that_stand_for_several_nothing_is_reused() -> None:
    names = {stored.spec.name for stored in part_of(DUPLICATES).stored_tensors()}
    assert names == {"x.y", "x.y#2", "z"}
    for here in (filled(DUPLICATES), dict(reversed(filled(DUPLICATES).items()))):
        before = {name: array.tobytes() for name, array in (("x.y", here["x.y"]), ("x", here["x"]["y"]))}
        restoration = part_of(DUPLICATES).restoration(into=here)
        restoration.read()
        assert same(restoration.tree, DUPLICATES)
        assert restoration.tree["z"] is here["z"]
        assert {"x.y": here["x.y"].tobytes(), "x": here["x"]["y"].tobytes()} == before


def test_names_that_look_like_those_of_a_second_one() -> None:
    saved = {"a": np.arange(3.0), "a#2": np.arange(3.0) + 10, "__metadata__": np.arange(2.0)}
    here = filled(saved)
    restoration = part_of(saved).restoration(into=here)
    restoration.read()
    assert same(restoration.tree, saved)


def test_a_part_that_is_one_tensor_is_called_as_the_part() -> None:
    live = np.zeros(3)
    part = part_of(np.arange(3.0), "weights")
    assert [stored.spec.name for stored in part.stored_tensors()] == ["weights"]
    restoration = part.restoration(into=live)
    restoration.read()
    assert restoration.tree is live
    assert live.tolist() == [0, 1, 2]


def test_the_stored_tensors_are_told_without_reading(tmp_path: Path) -> None:
    part = part_of(TREE)
    told = {stored.spec.name: stored for stored in part.stored_tensors()}
    assert told.keys() == part.tensors.keys()
    assert told["w"].spec == TensorSpec("w", "F64", (3, 4))
    assert told["big-endian"].extra["shape"] == [5]


# ---- parts in memory, and checkpoints that are closed


def test_a_part_of_memory() -> None:
    arrays = {"a": np.arange(3.0), "b": np.zeros(0), "c": np.arange(4, dtype=np.int8)}
    contents = {
        name: (TensorSpec(name, {"f": "F64", "i": "I8"}[array.dtype.kind], array.shape), memoryview(array.tobytes()))
        for name, array in arrays.items()
    }
    part = Part.of("model", {name: {"$tensor": name} for name in arrays}, contents)
    assert same(part.tree(), arrays)
    live = filled(arrays)
    strided = live | {"a": np.zeros(6)[::2]}
    for here in (live, strided):
        restoration = part.restoration(into=here)
        restoration.read()
        assert all(restoration.tree[name] is here[name] for name in here)
        assert same(restoration.tree, arrays)
    assert same(part.held().tree(), arrays)


def test_what_is_held_is_there_when_the_checkpoint_is_closed(tmp_path: Path) -> None:
    reader = reader_of(TREE, store=DirectoryStore(tmp_path))
    part = read_checkpoint(reader).parts["model"]
    restoration = part.restoration(into=filled(TREE))
    held = part.held()
    reader.close()
    assert same(held.tree(), TREE)
    live = filled(TREE)
    held.restoration(into=live).read()
    assert same(live, TREE)
    assert same(held.held().tree(), TREE)
    for late in (part.tree, part.held, restoration.read):
        with pytest.raises(
            ValueError, match=r"model\.ckpt-1 was closed; what is wanted of it is read while it is open"
        ):
            late()


def test_one_that_is_held_is_not_changed_by_who_gets_it() -> None:
    held = part_of({"w": np.arange(3.0)}).held()
    held.tree()["w"].fill(9)
    assert held.tree()["w"].tolist() == [0, 1, 2]


# ---- what is wrong with the state itself


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        ({"w": {"$tensor": "absent"}}, "names the tensor 'absent', which is not there"),
        ({"w": {"$tensor": 3}}, "names the tensor 3"),
        ({"w": {"$unheard": 3}}, "unheard"),
        ({"w": {"$tensor": "w", "dtype": "float99", "shape": [3]}}, "float99"),
        ({"w": {"$tensor": "w", "dtype": "<f8", "shape": [2]}}, "24 bytes are not an array"),
    ],
)
def test_a_state_that_means_nothing_here_changes_nothing(state: Any, reason: str) -> None:
    content = memoryview(np.arange(3.0).tobytes())
    part = Part.of("model", state, {"w": (TensorSpec("w", "F64", (3,)), content)})
    live = np.full(3, -1.0)
    with pytest.raises(IncompatibleCheckpointError, match=reason):
        part.restoration(into={"w": live})
    with pytest.raises(IncompatibleCheckpointError, match=reason):
        part.tree()
    assert live.tolist() == [-1] * 3


def test_damage_comes_out_of_the_read_and_not_before(tmp_path: Path) -> None:
    reader = reader_of({"w": np.arange(3.0)}, store=DirectoryStore(tmp_path))
    file = tmp_path / "model.ckpt-1" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    live = np.full(3, -1.0)
    restoration = read_checkpoint(reader).parts["model"].restoration(into={"w": live})
    assert live.tolist() == [-1] * 3
    with pytest.raises(CheckpointDamagedError, match="does not match its hash"):
        restoration.read()
