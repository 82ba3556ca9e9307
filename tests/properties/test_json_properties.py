"""Whatever tagged JSON accepts comes back equal, in value and in type, through real JSON text."""

from __future__ import annotations

import json
import math
from collections import Counter, OrderedDict, defaultdict, deque
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from supervise_core.tagged_json import decode, encode

numpy_scalars = st.one_of(
    st.floats(width=32).map(np.float32),
    st.floats().map(np.float64),
    st.integers(-(2**63), 2**63 - 1).map(np.int64),
    st.integers(0, 255).map(np.uint8),
    st.booleans().map(np.bool_),
    st.complex_numbers().map(np.complex128),
    st.text(st.characters(codec="utf-8"), max_size=5).map(np.str_),
    st.binary(max_size=5).map(np.bytes_),
    st.integers(-(2**40), 2**40).map(lambda number: np.datetime64(number, "us")),
    st.integers(-(2**40), 2**40).map(lambda number: np.timedelta64(number, "s")),
)
hashable = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(), st.complex_numbers(), st.text(max_size=8),
        st.binary(max_size=8), numpy_scalars,
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=3).map(tuple), st.frozensets(inner, max_size=3)),
    max_leaves=6,
)  # fmt: skip
values = st.recursive(
    st.one_of(hashable, st.binary(max_size=8).map(bytearray), st.sets(hashable, max_size=4)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=4).map(tuple),
        st.dictionaries(hashable, inner, max_size=4),
        st.dictionaries(st.text(max_size=4), inner, max_size=4),
        st.dictionaries(st.sampled_from(["$tuple", "$int", "$", "$tensor", "plain"]), inner, max_size=3),
        st.dictionaries(hashable, inner, max_size=3).map(OrderedDict),
        st.dictionaries(hashable, st.integers(), max_size=3).map(Counter),
        st.dictionaries(hashable, inner, max_size=3).map(lambda made: defaultdict(list, made)),
        st.tuples(st.lists(inner, max_size=3), st.none() | st.integers(3, 9)).map(lambda made: deque(*made)),
    ),
    max_leaves=20,
)


def same(one: Any, other: Any) -> bool:
    """Equal in value and in type, all the way down; a NaN is like a NaN, and 0.0 is not like -0.0."""
    if type(one) is not type(other):
        return False
    if isinstance(one, np.generic):
        return one.dtype == other.dtype and one.tobytes() == other.tobytes()
    if isinstance(one, float):
        return (math.isnan(one) and math.isnan(other)) or one.hex() == other.hex()
    if isinstance(one, complex):
        return same(one.real, other.real) and same(one.imag, other.imag)
    if isinstance(one, (list, tuple, deque)):
        ends = getattr(one, "maxlen", None) == getattr(other, "maxlen", None)
        return ends and len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dict):
        factories = getattr(one, "default_factory", None) is getattr(other, "default_factory", None)
        return factories and same(list(one.items()), list(other.items()))
    if isinstance(one, (set, frozenset)):
        left = list(other)
        for item in one:
            match = next((at for at, candidate in enumerate(left) if same(item, candidate)), None)
            if match is None:
                return False
            del left[match]
        return not left
    return bool(one == other)


@given(values)
def test_everything_accepted_comes_back(value: Any) -> None:
    text = json.dumps(encode(value), allow_nan=False)
    assert same(decode(json.loads(text)), value)


@given(values)
def test_the_same_value_gives_the_same_text(value: Any) -> None:
    assert json.dumps(encode(value)) == json.dumps(encode(decode(encode(value))))


tags = st.sampled_from(["$tuple", "$set", "$int", "$numpy", "$deque", "$dict", "$bytes", "$complex", "$float"])
any_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner) | st.dictionaries(tags, inner, max_size=1),
    max_leaves=10,
)


@given(any_json)
def test_any_json_is_decoded_or_is_a_value_error(data: Any) -> None:
    """Or, at most, a TypeError: what cannot be hashed in a set."""
    try:
        decode(data)
    except (ValueError, TypeError):
        pass
