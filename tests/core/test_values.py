"""Every value comes back equal in value and in type, or is refused when the run starts, by part and path."""

from __future__ import annotations

import datetime
import enum
import math
import struct
import subprocess
import sys
from collections import Counter, OrderedDict, defaultdict, deque
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from supervise_core import (
    Backend,
    CheckpointDirectory,
    DirectoryStore,
    Parts,
    Snapshot,
    Staging,
    Supervisor,
    UnsupportedStateError,
)
from supervise_core.checkpoint_files import read_checkpoint
from supervise_core.checkpoint_format import CheckpointId
from supervise_core.manifest import Manifest
from supervise_core.numpy_codec import NumpyCodec
from supervise_core.snapshot_files import write_snapshot
from supervise_core.tagged_json import decode, encode
from supervise_core.testing.disks import HastyDisk


class TreeBackend(Backend[dict[str, Any]]):
    """Its state is one tree of whatever a test puts in."""

    name = "tree"

    def __init__(self, tree: Any = None) -> None:
        self.state = {"tree": tree}

    def create_session(self, master: str = "", config: Any = None) -> dict[str, Any]:
        return self.state

    def init(self, session: dict[str, Any]) -> None:
        return None

    def global_step(self, session: dict[str, Any]) -> None:
        return None

    def snapshot(self, session: dict[str, Any], staging: Staging) -> Snapshot:
        staging.put("tree", session["tree"])
        return staging.snapshot()

    def load(self, session: dict[str, Any], parts: Parts) -> None:
        session["tree"] = parts["tree"].tree()


def through_a_checkpoint(tree: Any, path: Path) -> Any:
    """The tree after a commit to a directory and a restore into a fresh backend."""
    backend, fresh = TreeBackend(tree), TreeBackend()
    snapshot = backend.snapshot(backend.state, Staging())
    store = DirectoryStore(path, disk=HastyDisk())
    with store.writing():
        draft = store.begin(CheckpointId(0))
        files = write_snapshot(draft, snapshot, None).files
        draft.commit(Manifest(0, backend.name, 0.0, tuple(snapshot.parts), files))
    with store.open(CheckpointId(0)) as reader:
        fresh.load(fresh.state, read_checkpoint(reader).parts)
    return fresh.state["tree"]


def same(one: Any, other: Any) -> bool:
    """Equal in value and in type, all the way down; NaN is equal to the same NaN."""
    if isinstance(one, np.generic) and isinstance(other, np.generic):  # int64 and longlong are one dtype, two classes
        return bool(one.dtype == other.dtype and one.tobytes() == other.tobytes())
    if type(one) is not type(other):
        return False
    if isinstance(one, np.ndarray) and one.dtype.char in "gG":  # part of their bytes is padding
        return bool(one.dtype == other.dtype and one.shape == other.shape and np.array_equal(one, other))
    if isinstance(one, np.ndarray):
        return (one.dtype, one.shape, one.tobytes()) == (other.dtype, other.shape, other.tobytes())
    if isinstance(one, float):
        return struct.pack("d", one) == struct.pack("d", other) or (math.isnan(one) and math.isnan(other))
    if isinstance(one, complex):
        return same(one.real, other.real) and same(one.imag, other.imag)
    if isinstance(one, defaultdict) and one.default_factory is not other.default_factory:
        return False
    if isinstance(one, deque) and one.maxlen != other.maxlen:
        return False
    if isinstance(one, dict):
        return same(list(one), list(other)) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple, deque)):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, (set, frozenset)):
        return bool(one == other) and Counter(map(type, one)) == Counter(map(type, other))
    return bool(one == other)


# ---- plain values

PLAIN: dict[str, Any] = {
    "none": None,
    "bools": [True, False],
    "integers": [0, -1, 2**53 - 1, 2**53, -(2**53), 2**63, -(10**40)],
    "floats": [0.0, -0.0, 0.1, 5e-324, 1.7976931348623157e308, math.inf, -math.inf, math.nan],
    "complex numbers": [1 + 2j, complex(math.nan, -math.inf), complex(-0.0, 0.0)],
    "strings": ["", "ä", "\U0001f600", "\x00", "\ud800", '"\\'],
    "bytes": [b"", bytes(range(256)), bytearray(b"\x00\xff")],
    "tuples": [(), (1,), ((1, 2), [3, (4,)])],
    "sets": [set(), {1, 2.5, "x"}, frozenset({(1, 2), b"y"}), {None, True}],
    "integer keys": {1: "a", -2: {3: "b"}, 10**30: "c"},
    "keys of many types": {None: 1, True: 2, 2.5: 3, (1, "x"): 4, b"z": 5, "1": 6, 1.5j: 7, frozenset({1}): 8},
    "a key that is not finite": {math.inf: 1},
    "keys that look like tags": {"$tensor": "x", "$tuple": [1]},
    "a tag that is not the first key": {"a": 1, "$tuple": [1]},
    "an order of keys": {"z": 1, "a": 2, "m": 3},
    "empty containers": [[], {}, (), deque(), Counter(), OrderedDict(), defaultdict(int)],
    "Counter": Counter({"a": 3, 2: -1}),
    "milestones of MultiStepLR": {"milestones": Counter([30, 80, 80]), "gamma": 0.1, "_last_lr": [0.1]},
    "OrderedDict": OrderedDict([("b", 1), (2, "x")]),
    "defaultdicts": [defaultdict(list, {1: [2]}), defaultdict(dict), defaultdict(None, {"x": 1}), defaultdict(float)],
    "deques": [deque([1, 2]), deque([(3,)], maxlen=5), deque(maxlen=0)],
    "NumPy scalars": [np.float32(1.5), np.int8(-3), np.bool_(True), np.complex128(1j), np.float64("nan")],
    "NumPy strings": [np.str_("abc"), np.bytes_(b"xy"), np.str_(""), np.bytes_(b"")],
    "NumPy dates": [np.datetime64("2020-01-01T00:00", "ns"), np.timedelta64(5, "D"), np.datetime64("NaT")],
    "deep": [[[[[[[[[[{"x": ((1,),)}]]]]]]]]]],
}


@pytest.mark.parametrize("name", PLAIN)
def test_a_plain_value_comes_back(name: str, tmp_path: Path) -> None:
    found = through_a_checkpoint({"value": PLAIN[name]}, tmp_path)
    assert same(found, {"value": PLAIN[name]}), found


LEAVES = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary() | st.complex_numbers(width=64)
)
KEYS = st.none() | st.booleans() | st.integers() | st.text() | st.tuples(st.integers(), st.text())
VALUES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner)
        | st.lists(inner).map(tuple)
        | st.dictionaries(KEYS, inner)
        | st.frozensets(KEYS)
        | st.lists(inner).map(deque)
        | st.dictionaries(KEYS, inner).map(OrderedDict)
    ),
    max_leaves=12,
)


@given(VALUES)
@settings(max_examples=150, deadline=None)
def test_any_tree_of_plain_values_comes_back(value: Any) -> None:
    assert same(decode(encode(value)), value)


# ---- arrays


def all_numpy_dtypes() -> list[np.dtype[Any]]:
    """Every dtype of this NumPy that is data, sized where it has no size of its own, in both byte orders."""
    sized = {"S": "S5", "U": "U3", "V": "V7", "M": "M8[us]", "m": "m8[3h]"}
    kinds = {kind for kind in np.sctypeDict.values() if kind is not np.object_ and kind.__module__ == "numpy"}
    native = {np.dtype(sized.get(np.dtype(kind).kind, kind)) for kind in kinds}
    return sorted(native | {dtype.newbyteorder() for dtype in native}, key=lambda dtype: (dtype.char, dtype.str))


def all_ml_dtypes() -> list[np.dtype[Any]]:
    kinds = [kind for kind in vars(ml_dtypes).values() if isinstance(kind, type) and issubclass(kind, np.generic)]
    return sorted({np.dtype(kind) for kind in kinds}, key=lambda dtype: dtype.name)


def filled(dtype: np.dtype[Any], count: int = 6) -> Any:
    """An array with a different value in each element, as far as the dtype can tell them apart."""
    if dtype.kind in "SU":
        return np.array([chr(97 + number) * (number % 4) for number in range(count)]).astype(dtype)
    if dtype.kind == "V" and dtype.type is np.void:
        return np.frombuffer(bytes(range(dtype.itemsize * count)), dtype)
    if dtype.kind in "Mm":
        return np.arange(count, dtype="i8").astype(dtype.newbyteorder("="), casting="unsafe").astype(dtype)
    return np.array([number % 2 for number in range(count)]).astype(dtype)


@pytest.mark.parametrize(
    "dtype", [*all_numpy_dtypes(), *all_ml_dtypes()], ids=lambda dtype: f"{dtype.name}{dtype.byteorder}"
)
def test_every_dtype_comes_back_in_every_shape(dtype: np.dtype[Any], tmp_path: Path) -> None:
    flat = filled(dtype)
    state = {
        "flat": flat,
        "matrix": flat.reshape(2, 3),
        "fortran": np.asfortranarray(flat.reshape(2, 3)),
        "every other": flat[::2],
        "backwards": flat[::-1],
        "without dimensions": flat[3].reshape(()) if isinstance(flat[3], np.ndarray) else flat[3:4].reshape(()),
        "without elements": flat[:0].reshape(0, 4),
        "broadcast": np.broadcast_to(flat[:1], (3,)),
    }
    found = through_a_checkpoint(state, tmp_path)
    assert [name for name in state if not same(state[name], found[name])] == []


@pytest.mark.parametrize(
    "dtype", [*all_numpy_dtypes(), *all_ml_dtypes()], ids=lambda dtype: f"{dtype.name}{dtype.byteorder}"
)
def test_a_scalar_of_every_dtype_comes_back_or_is_refused(dtype: np.dtype[Any], tmp_path: Path) -> None:
    scalar = filled(dtype)[3]
    if dtype.kind == "V" or scalar.dtype.type.__module__ == "ml_dtypes":
        with pytest.raises(UnsupportedStateError, match=r"tree\['scalar'\] cannot be kept .*use an array"):
            through_a_checkpoint({"scalar": scalar}, tmp_path)
    else:
        assert same(through_a_checkpoint({"scalar": scalar}, tmp_path), {"scalar": scalar})


STRUCTURED = {
    "fields": np.dtype([("a", "i4"), ("b", ">f8")]),
    "aligned": np.dtype([("a", "i1"), ("b", "f8")], align=True),
    "with gaps": np.dtype({"names": ["a", "b"], "formats": ["i2", "f4"], "offsets": [2, 8], "itemsize": 16}),
    "nested": np.dtype([("p", [("x", "f4"), ("y", "f4", (2, 2))]), ("name", "U4")]),
    "one field": np.dtype([("only", "f4")]),
}


@pytest.mark.parametrize("name", STRUCTURED)
def test_structured_arrays_come_back(name: str, tmp_path: Path) -> None:
    dtype = STRUCTURED[name]
    array = np.zeros(3, dtype)
    first = dtype.names[0]  # type: ignore[index]
    if dtype[first].names is None:
        array[first] = [1, 2, 3]
    found = through_a_checkpoint({"array": array}, tmp_path)["array"]
    assert found.dtype == dtype
    assert str(found) == str(array)


def test_tied_arrays_stay_tied(tmp_path: Path) -> None:
    weight = np.arange(6.0).reshape(2, 3)
    found = through_a_checkpoint({"in": weight, "out": [weight], "transposed": weight.T}, tmp_path)
    assert found["in"] is found["out"][0]
    assert same(found["transposed"], weight.T.copy())


def test_a_mapped_array_comes_back_as_an_array(tmp_path: Path) -> None:
    mapped = np.memmap(tmp_path / "file", np.float32, "w+", shape=(4,))
    mapped[:] = 3
    found = through_a_checkpoint({"array": mapped}, tmp_path / "log")["array"]
    assert same(found, np.full(4, 3, np.float32))


def test_what_comes_back_can_be_written_to(tmp_path: Path) -> None:
    frozen = np.arange(3)
    frozen.flags.writeable = False
    found = through_a_checkpoint({"array": frozen}, tmp_path)["array"]
    found += 1
    assert found.tolist() == [1, 2, 3]


# ---- all of it, in another process


def everything() -> dict[str, Any]:
    arrays = {dtype.str + dtype.name: filled(dtype) for dtype in (*all_numpy_dtypes(), *all_ml_dtypes())}
    return {"plain": PLAIN, "arrays": arrays}


def test_another_process_reads_all_of_it(tmp_path: Path) -> None:
    supervisor = Supervisor(TreeBackend(everything()), tmp_path, summarize_every=None, signals=False)
    with supervisor.managed_session():
        supervisor.request_stop()
    code = f"""
import importlib.util, sys
spec = importlib.util.spec_from_file_location("values", {str(Path(__file__))!r})
values = sys.modules["values"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(values)
backend = values.TreeBackend()
supervisor = values.Supervisor(backend, {str(tmp_path)!r}, resume="must", summarize_every=None)
with supervisor.managed_session() as session:
    found, expected = session["tree"], values.everything()
    for group in expected:
        for name in expected[group]:
            assert values.same(found[group][name], expected[group][name]), (group, name)
"""
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=100)
    assert told.returncode == 0, told.stderr
    assert same(CheckpointDirectory(tmp_path).newest().load("tree", NumpyCodec()), everything())


# ---- what cannot be kept


class Colour(enum.IntEnum):
    RED = 1


class Pair(NamedTuple):
    left: int
    right: int


class Words(dict[str, int]):
    pass


def contains_itself() -> list[Any]:
    cycle: list[Any] = [1]
    cycle.append({"again": cycle})
    return cycle


REFUSED: dict[str, Any] = {
    "an object": object(),
    "a function": lambda: None,
    "a class": int,
    "a module": math,
    "a generator": (number for number in range(3)),
    "a range": range(3),
    "an enumeration": Colour.RED,
    "a named tuple": Pair(1, 2),
    "a subclass of dict": Words(a=1),
    "a path": Path("x"),
    "a date": datetime.date(2020, 1, 1),
    "a decimal": Decimal("1.5"),
    "a factory of its own": defaultdict(lambda: 3),
    "references": np.array([None, "x"], dtype=object),
    "references in a field": np.zeros(2, [("a", "i4"), ("b", "O")]),
    "strings of any length": np.array(["a", "b"], dtype=np.dtypes.StringDType()),
    "a masked array": np.ma.masked_array([1, 2], mask=[True, False]),
    "a record array": np.zeros(2, [("a", "i4")]).view(np.recarray),
    "a structured scalar": np.zeros(2, [("a", "i4")])[0],
    "a set of objects": {object()},
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_kept_is_refused_when_the_run_starts_by_part_and_path(name: str, tmp_path: Path) -> None:
    backend = TreeBackend({"good": 1, "layers": [0, {"odd": REFUSED[name]}]})
    supervisor = Supervisor(backend, tmp_path, summarize_every=None, signals=False)
    with pytest.raises(UnsupportedStateError) as caught, supervisor.managed_session():
        raise AssertionError("the block was entered")
    assert caught.value.path.startswith("tree['layers'][1]['odd']")
    assert str(caught.value).startswith(caught.value.path)
    assert caught.value.reason
    assert DirectoryStore(tmp_path).checkpoints() == []
    backend.state["tree"] = {"good": 1}
    with supervisor.managed_session():
        supervisor.request_stop()


@pytest.mark.parametrize("make", [contains_itself, lambda: _nested(300)], ids=["cyclic", "too deep"])
def test_what_has_no_end_is_refused_when_the_run_starts(make: Any, tmp_path: Path) -> None:
    supervisor = Supervisor(TreeBackend({"x": make()}), tmp_path, summarize_every=None, signals=False)
    with (
        pytest.raises(UnsupportedStateError, match=r"tree\['x'\].*nested more than 200 deep \(or contains itself\)"),
        supervisor.managed_session(),
    ):
        raise AssertionError("the block was entered")


def _nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value
