"""The tensors of a Saver as a tree that a snapshot takes, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from supervise_tf.bundle import Key

VARIABLES: Final = "variables"
"""The part of a checkpoint that holds what the Saver saves."""

_BETWEEN: Final = "\x00"  # stands in no name of a variable


def to_tree(tensors: Mapping[Key, NDArray[Any]]) -> dict[str, Any]:
    """By name, and for slices by name and slice. Strings, for which no tensor format has a place, become lists."""
    return {_name_of(key): _value_of(array) for key, array in tensors.items()}


def from_tree(tree: Mapping[str, Any]) -> dict[Key, NDArray[Any]]:
    """The inverse."""
    return {_key_of(name): _array_of(value) for name, value in tree.items()}


def _name_of(key: Key) -> str:
    name, part = key
    return f"{name}{_BETWEEN}{part}" if part else name


def _key_of(name: str) -> Key:
    plain, _, part = name.partition(_BETWEEN)
    return plain, part


def _value_of(array: NDArray[Any]) -> Any:
    if array.dtype != object:
        return array
    return {"strings": array.reshape(-1).tolist(), "shape": list(array.shape)}


def _array_of(value: Any) -> NDArray[Any]:
    if not isinstance(value, dict):
        return np.asarray(value)
    strings = np.empty(len(value["strings"]), dtype=object)
    strings[:] = value["strings"]
    return strings.reshape(value["shape"])
