"""A snapshot is one copy of one moment, laid out as the files to be."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from supervise_core.errors import UnsupportedStateError
from supervise_core.parts import Part
from supervise_core.safetensors_format import parse
from supervise_core.snapshot import Snapshot, check_part_name
from supervise_core.staging import Staging


def image_of(state: Any, staging: Staging | None = None) -> Snapshot:
    memory = staging or Staging()
    memory.put("model", state)
    return memory.snapshot()


def part_of(snapshot: Snapshot) -> Part:
    image = snapshot.parts["model"]
    tensors = {name: tensor for file in image.files for name, tensor in parse(b"".join(file.chunks())).items()}
    return Part.of("model", image.state, tensors)


def back(state: Any) -> Any:
    return part_of(image_of(state)).tree()


def test_tree_comes_back() -> None:
    state = {
        "layers": [{"w": np.arange(6.0).reshape(2, 3), "b": np.zeros((), np.int16)}, (np.ones(0, np.float32), None)],
        "step": 3,
        7: "seven",
    }
    there = back(state)
    assert there["layers"][0]["w"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert there["layers"][0]["b"].shape == ()
    assert there["layers"][1][0].dtype == np.float32
    assert there["layers"][1][1] is None
    assert (there["step"], there[7]) == (3, "seven")


DTYPES = [
    "?", "u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f2", "f4", "f8", "c8", "c16", "g", "G", ">f8", ">i2",
    "M8[us]", "m8[s]", "S5", "U3", "V4", [("a", "<i4"), ("b", ">f8", (2,))],
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 0, 4), (2, 3)], ids=str)
def test_dtypes_and_shapes(dtype: Any, shape: tuple[int, ...]) -> None:
    array = np.zeros(shape, dtype)
    if array.nbytes:
        array.reshape(-1).view("u1")[:] = np.arange(array.nbytes) % 2
    there = back({"a": array})["a"]
    assert there.dtype == array.dtype
    assert there.shape == array.shape
    assert there.tobytes() == array.tobytes()
    assert there.flags.writeable
    assert there.flags.owndata


def test_extension_dtypes() -> None:
    extended = pytest.importorskip("ml_dtypes")
    for name in ("bfloat16", "float8_e5m2", "float8_e4m3fn", "float8_e8m0fnu", "int4"):
        array = np.ones(5, getattr(extended, name))
        there = back([array])[0]
        assert there.dtype == array.dtype
        assert there.tobytes() == array.tobytes()


@pytest.mark.parametrize("array", [np.arange(12.0).reshape(3, 4).T, np.arange(20.0)[::3], np.asfortranarray(np.eye(3))])
def test_strided_arrays(array: Any) -> None:
    assert np.array_equal(back([array])[0], array)


@pytest.mark.parametrize(
    "array",
    [np.array([object()]), np.array([(1, None)], "i4,O"), np.ma.masked_array([1]), np.arange(3).view(np.recarray)],
)
def test_arrays_that_are_not_data(array: Any) -> None:
    with pytest.raises(UnsupportedStateError) as caught:
        image_of({"deep": [array]})
    assert caught.value.path == "model['deep'][0]"


def test_later_changes_do_not_reach_it() -> None:
    array = np.arange(4.0)
    state = {"w": array, "list": [1]}
    snapshot = image_of(state)
    array[:] = -1
    state["list"].append(2)  # type: ignore[attr-defined]
    there = part_of(snapshot).tree()
    assert there["w"].tolist() == [0, 1, 2, 3]
    assert there["list"] == [1]


def test_one_array_in_two_places_is_stored_once_and_comes_back_as_one() -> None:
    tied = np.arange(1000.0)
    snapshot = image_of({"a": tied, "b": [tied], "other": tied.copy(), "part": tied[:500]})
    sizes = [tensor.spec.nbytes for file in snapshot.parts["model"].files for tensor in file.tensors]
    assert sum(sizes) == 2 * tied.nbytes + tied.nbytes // 2
    there = part_of(snapshot).tree()
    assert there["a"] is there["b"][0]
    assert there["a"] is not there["other"]


def test_names_are_readable_and_never_collide() -> None:
    state = {
        "a": {"b": np.zeros(1)},
        "a.b": np.ones(1),
        "__metadata__": np.full(1, 2.0),
        "": np.full(1, 3.0),
        5: np.zeros(2),
        "two\nlines": np.full(1, 4.0),
        "\ud800": np.full(1, 5.0),
    }
    snapshot = image_of(state)
    names = {tensor.spec.name for file in snapshot.parts["model"].files for tensor in file.tensors}
    assert len(names) == 7
    assert {"a.b", "a.b#2", "5", "two\\nlines", "\\ud800"} <= names, "other readers know no name that is not text"
    assert "__metadata__" not in names
    there = part_of(snapshot).tree()
    assert {key: float(np.sum(value)) for key, value in there.items() if key != "a"} == {
        "a.b": 1, "__metadata__": 2, "": 3, 5: 0, "two\nlines": 4, "\ud800": 5,
    }  # fmt: skip


def test_memory_is_kept_between_snapshots() -> None:
    staging = Staging()
    first = image_of([np.zeros(1000)], staging)
    second = image_of([np.ones(1000)], staging)
    addresses = {np.frombuffer(shot.parts["model"].files[0].blocks, "u1").ctypes.data for shot in (first, second)}
    assert len(addresses) == 1


def test_smaller_snapshot_after_a_larger_one() -> None:
    staging = Staging()
    image_of([np.zeros(5000)], staging)
    assert part_of(image_of([np.ones(3)], staging)).tree()[0].tolist() == [1, 1, 1]


def test_a_part_is_put_once() -> None:
    staging = Staging()
    staging.put("model", 1)
    with pytest.raises(ValueError, match="twice"):
        staging.put("model", 2)
    staging.discard()
    staging.put("model", 3)
    assert staging.snapshot().parts["model"].state == 3
    assert staging.snapshot().parts == {}


def test_a_part_that_was_refused_leaves_nothing() -> None:
    staging = Staging()
    with pytest.raises(UnsupportedStateError):
        staging.put("model", {"w": np.zeros(3), "bad": object()})
    staging.put("model", 1)


@pytest.mark.parametrize(
    "name", ["", "../x", "a/b", ".a", "a.b", "state", "manifest", "a b", "é", "x" * 101, "m-00001-of-00002"]
)
def test_names_that_no_part_can_bear(name: str) -> None:
    with pytest.raises(ValueError, match="cannot name a part"):
        check_part_name(name)


def test_shards() -> None:
    staging = Staging(shard_bytes=100)
    snapshot = image_of({f"w{number}": np.full(10, float(number)) for number in range(4)}, staging)
    names = [file.name for file in snapshot.parts["model"].files]
    assert names == [f"model-{number:05d}-of-00004.safetensors" for number in range(1, 5)]
    there = part_of(snapshot).tree()
    assert [float(there[f"w{number}"][0]) for number in range(4)] == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="shard_bytes"):
        Staging(shard_bytes=0)
