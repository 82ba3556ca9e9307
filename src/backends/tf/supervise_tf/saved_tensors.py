"""What a TensorFlow Saver would save, fetched without it: the tensors that its save ops are given.

A Saver has put one or more ``SaveV2`` ops into the graph. Their inputs are the very tensors that it saves, whatever
they come from: variables of either kind, slices of partitioned ones, contents of tables, any saveable object. Fetched
in one ``session.run`` they are a snapshot, which can be written later by an op of the same kind in another graph. And
its ``RestoreV2`` ops can be fed with them, so that its restore op puts them back without a file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from supervise_core.errors import IncompatibleCheckpointError, UnsupportedStateError
from supervise_tf.bundle import Key, as_array, dtype_of
from supervise_tf.inputs import ancestors

_SAVE: Final = ("SaveV2", "SaveSlices")
_RESTORE: Final = ("RestoreV2", "RestoreSlice")


@dataclass(frozen=True, slots=True)
class SavedTensors:
    """The tensors of one Saver, by name and slice, and those by which they are put back."""

    fetches: Mapping[Key, Any]
    feeds: Mapping[Key, Any]
    restore_op: Any

    @classmethod
    def of(cls, saver: Any, graph: Any) -> SavedTensors:
        """Those of a Saver that was built in that graph.

        :raises UnsupportedStateError: if it saves in a way that is not known here.
        """
        definition = saver.as_saver_def()
        if definition is None:
            raise UnsupportedStateError("saver", "it was made with defer_build=True and not built; call saver.build()")
        save = graph.as_graph_element(definition.save_tensor_name)
        restore = graph.as_graph_element(definition.restore_op_name)
        fetches = {
            key: tensor
            for operation in ancestors([save])
            if operation.type in _SAVE
            for key, tensor in zip(_keys_of(operation), list(operation.inputs)[3:], strict=True)
        }
        feeds: dict[Key, list[Any]] = {}
        for operation in ancestors([restore]):
            if operation.type in _RESTORE:
                for key, tensor in zip(_keys_of(operation), operation.outputs, strict=True):
                    feeds.setdefault(key, []).append(tensor)
        if not fetches or set(fetches) != set(feeds):
            raise UnsupportedStateError("saver", "its save and restore ops are not of a kind known here")
        return cls({key: fetches[key] for key in sorted(fetches)}, feeds, restore)

    def fetch(self, session: Any) -> dict[Key, NDArray[Any]]:
        """Their values at this moment, read in one run."""
        values = session.run(list(self.fetches.values()))
        return {key: as_array(value) for key, value in zip(self.fetches, values, strict=True)}

    def check_fit(self, part: str, saved: Mapping[Key, NDArray[Any]]) -> None:
        """:raises IncompatibleCheckpointError: naming every tensor that is missing, unexpected, or of another kind."""
        differences = [f"{_readable(key)} is missing" for key in self.fetches if key not in saved]
        differences += [f"{_readable(key)} is unexpected" for key in saved if key not in self.fetches]
        for key in self.fetches.keys() & saved.keys():
            here, there = self.fetches[key], saved[key]
            if not here.shape.is_compatible_with(there.shape):
                differences.append(f"{_readable(key)} has shape {there.shape} there and {here.shape} here")
            elif here.dtype.base_dtype != dtype_of(there):
                there_dtype = dtype_of(there).name
                differences.append(
                    f"{_readable(key)} has dtype {there_dtype} there and {here.dtype.base_dtype.name} here"
                )
        if differences:
            raise IncompatibleCheckpointError(part, sorted(differences))

    def put_back(self, session: Any, saved: Mapping[Key, NDArray[Any]]) -> None:
        """Have the Saver's own restore op assign them."""
        feed = {tensor: saved[key] for key, tensors in self.feeds.items() for tensor in tensors}
        session.run(self.restore_op, feed_dict=feed)


def _keys_of(operation: Any) -> list[Key]:
    """The names and slices that a save or restore op is built for; both are constants in every Saver's graph."""
    names, slices = (tf.get_static_value(tensor) for tensor in list(operation.inputs)[1:3])
    if names is None or slices is None:
        raise UnsupportedStateError("saver", f"the names in its op {operation.name!r} are computed, not constant")
    pairs = zip(np.atleast_1d(names).tolist(), np.atleast_1d(slices).tolist(), strict=True)
    return [(name.decode(), part.decode()) for name, part in pairs]


def _readable(key: Key) -> str:
    name, part = key
    return f"{name!r}" if not part else f"{name!r} in the slice {part!r}"
