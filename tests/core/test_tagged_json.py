"""JSON that gives back what it was given; what it cannot, it refuses by path."""

from __future__ import annotations

import enum
import json
import math
from collections import Counter, OrderedDict, defaultdict, deque
from datetime import date
from typing import Any, NamedTuple

import numpy as np
import pytest

from supervise_core.errors import UnsupportedStateError
from supervise_core.tagged_json import UNTOLD, Path, decode, encode, text_of


class Pair(NamedTuple):
    a: int
    b: int


class Colour(enum.IntEnum):
    RED = 1


class Text(str):
    __slots__ = ()


def round_trip(value: Any) -> Any:
    return decode(json.loads(json.dumps(encode(value), allow_nan=False)))


@pytest.mark.parametrize(
    "value",
    [
        None, True, False, 0, 1, -1, 1 << 53, (1 << 53) - 1, -(1 << 200), 0.1, -0.0, math.inf, -math.inf, 1e308, 5e-324,
        "", "a", "\N{SNOWMAN}", "\ud800", "\0", b"", b"\x00\xff", bytearray(b"x"), 1j, complex(math.inf, -0.0),
        [], [1, [2, [3]]], (), (1,), ((1,), [2]), set(), {1, 2}, frozenset({(1, 2)}), {}, {"a": 1}, {1: "a", "1": "b"},
        {(1, 2): 3}, {None: 1, True: 2}, {"$tuple": [1]}, {"$": 1, "a": 2}, {"a": 1, "$x": 2}, {2.5: 1}, {b"k": 1},
        deque([1, 2]), deque([1], maxlen=3), OrderedDict([("b", 1), ("a", 2)]), Counter("aab"), Counter({3: 2}),
        np.float32(0.1), np.int64(-5), np.bool_(True), np.complex64(1j), np.str_("x"), np.str_(""), np.str_("a\0"),
        np.bytes_(b""), np.bytes_(b"a\0"), np.datetime64("2020-01-01"), np.timedelta64(3, "s"), np.float16(2),
        np.longdouble("1.1"), np.dtype(">i4").type(3),
    ],
    ids=repr,
)  # fmt: skip
def test_round_trip(value: Any) -> None:
    back = round_trip(value)
    assert type(back) is type(value)
    assert back == value
    assert repr(back) == repr(value)


def test_order_of_keys_is_kept() -> None:
    assert list(round_trip({"b": 1, "a": 2})) == ["b", "a"]
    assert list(round_trip({2: 1, 1: 2})) == [2, 1]


def test_nan() -> None:
    assert math.isnan(round_trip(math.nan))
    assert np.isnan(round_trip(np.float32("nan")))


@pytest.mark.parametrize("factory", [list, dict, set, int, float, None])
def test_defaultdict(factory: Any) -> None:
    made = defaultdict(factory, {1: 2})
    back = round_trip(made)
    assert type(back) is defaultdict
    assert back == made
    assert back.default_factory is factory


def test_milestones_stay_integers() -> None:
    """A scheduler whose milestones come back as texts never fires, and nobody notices."""
    assert round_trip({"milestones": Counter({30: 1, 80: 1})})["milestones"][30] == 1


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (object(), "object"),
        (date(2020, 1, 1), "datetime.date"),
        (Pair(1, 2), "Pair"),
        (Colour.RED, "Colour"),
        (Text("x"), "Text"),
        (len, "builtin_function_or_method"),
        (int, "type"),
        (range(3), "range"),
        (np.arange(3), "numpy.ndarray"),
        (np.void(b"x"), "V1"),
        (defaultdict(lambda: 3), "default factory"),
    ],
)
def test_refused_by_path(value: Any, kind: str) -> None:
    with pytest.raises(UnsupportedStateError) as caught:
        encode({"a": [0, {7: value}]}, "scheduler")
    assert caught.value.path == "scheduler['a'][1][7]"
    assert kind in str(caught.value)


def test_refused_as_a_key() -> None:
    with pytest.raises(UnsupportedStateError, match="key"):
        encode({date(2020, 1, 1): 1}, "part")


def test_what_contains_itself_is_refused() -> None:
    loop: list[Any] = []
    loop.append(loop)
    with pytest.raises(UnsupportedStateError, match="contains itself"):
        encode(loop)


def test_paths_are_told_as_python_has_them() -> None:
    def path_of(value: Any) -> str:
        with pytest.raises(UnsupportedStateError) as caught:
            encode(value, "part")
        return caught.value.path

    assert path_of(object()) == "part"
    assert path_of({"a b": [1, (2, object())]}) == "part['a b'][1][1]"
    assert path_of({1: {"it's": object()}}) == """part[1]["it's"]"""
    assert path_of({(1, "x"): object()}) == "part[(1, 'x')]"
    assert path_of({"a": {date(2020, 1, 1): 1}}) == "part['a'] key"


def test_leaves() -> None:
    def write(path: Path, value: Any) -> Any:
        return {"$mine": [text_of(path), value.tolist()]} if isinstance(value, np.ndarray) else UNTOLD

    def read(tag: str, content: Any) -> Any:
        return np.array(content[1]) if tag == "$mine" else UNTOLD

    data = encode({"w": np.arange(2), "n": (1,)}, "model", write)
    assert data == {"w": {"$mine": ["model['w']", [0, 1]]}, "n": {"$tuple": [1]}}
    assert decode(data, read)["w"].tolist() == [0, 1]
    with pytest.raises(ValueError, match=r"\$mine is not a tag"):
        decode(data)


@pytest.mark.parametrize(
    "data",
    [
        {"$unknown": 1}, {"$int": 5}, {"$int": "zz"}, {"$float": "x"}, {"$tuple": 1}, {"$set": [[1]]}, {"$bytes": "A"},
        {"$complex": [1]}, {"$dict": [1]}, {"$dict": [[1, 2, 3]]}, {"$deque": [[], -1]}, {"$numpy": ["O", "AA=="]},
        {"$numpy": ["<f8", ""]}, {"$numpy": ["<f8", "AAAA"]}, {"$numpy": ["nonsense", "AA=="]}, {"$numpy": []},
        {"$tuple": [], "$set": []}, {"$defaultdict": ["os.system", []]}, {"$frozenset": "ab"},
    ],
    ids=lambda value: repr(value).partition(" at 0x")[0],  # the same in each worker of pytest-xdist
)  # fmt: skip
def test_json_that_encode_never_made(data: Any) -> None:
    with pytest.raises((ValueError, TypeError)):
        decode(data)
