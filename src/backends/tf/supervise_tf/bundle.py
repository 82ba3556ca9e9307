"""TensorFlow's checkpoint bundles as arrays: written and read in a private graph, in every mode of TensorFlow.

A bundle is ``<prefix>.index`` with one or more ``<prefix>.data-?????-of-?????``. Its tensors have names; each is
stored whole, or is a slice of a larger one and has a slice specification (``"10 4 0,5:0,4"``).
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from supervise_core.errors import CheckpointDamagedError

Key = tuple[str, str]
"""The name of a tensor, and its slice specification."""

_PIECE: Final = 16 << 20


class BundleWriter:
    """Writes bundles. The graph for a set of names and dtypes is made once and kept."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._signature: object = None
        self._session: Any = None
        self._placeholders: list[Any] = []
        self._prefix: Any = None
        self._save: Any = None

    def write(self, prefix: Path, tensors: Mapping[Key, NDArray[Any]]) -> None:
        """Write one bundle, not yet durable.

        :raises OSError: as the storage fails.
        """
        keys, arrays = list(tensors), list(tensors.values())
        with self._lock:
            self._prepare(keys, [dtype_of(array) for array in arrays])
            feed = dict(zip(self._placeholders, arrays, strict=True))
            try:
                self._session.run(self._save, {self._prefix: str(prefix), **feed})
            except tf.errors.OpError as error:
                raise _as_os_error(error, prefix) from error

    def _prepare(self, keys: Sequence[Key], dtypes: Sequence[Any]) -> None:
        signature = (tuple(keys), tuple(dtypes))
        if signature == self._signature:
            return
        with tf.Graph().as_default() as graph, tf.device("/cpu:0"):
            self._prefix = tf.compat.v1.placeholder(tf.string, ())
            self._placeholders = [tf.compat.v1.placeholder(dtype) for dtype in dtypes]
            self._save = tf.raw_ops.SaveV2(
                prefix=self._prefix,
                tensor_names=[name for name, _ in keys],
                shape_and_slices=[part for _, part in keys],
                tensors=self._placeholders,
            )
        if self._session is not None:
            self._session.close()
        self._session = tf.compat.v1.Session(graph=graph, config=tf.compat.v1.ConfigProto(device_count={"GPU": 0}))
        self._signature = signature


def as_array(value: Any) -> NDArray[Any]:
    """What TensorFlow gives as a value, as an array; it gives a single string as bytes, whose length must be kept."""
    return np.array(value, dtype=object) if isinstance(value, bytes) else np.asarray(value)


def dtype_of(array: NDArray[Any]) -> Any:
    """TensorFlow's dtype of an array; one of Python objects holds strings."""
    return tf.string if array.dtype == object else tf.as_dtype(array.dtype)


def read_bundle(prefix: Path) -> dict[str, NDArray[Any]]:
    """All tensors of a bundle by name; those stored in slices are put together. TensorFlow checks its own checksums.

    :raises CheckpointDamagedError: if something is missing or does not match its checksum.
    :raises OSError: as the storage fails.
    """
    reader, names = _open(prefix)
    return {name: as_array(_tensor(reader, prefix, name)) for name in names}


def shapes_of(prefix: Path) -> dict[str, list[int]]:
    """The shapes of the tensors of a bundle by name, of those in slices as a whole.

    :raises CheckpointDamagedError: if the index cannot be read.
    """
    reader, _ = _open(prefix)
    return dict(reader.get_variable_to_shape_map())


def check_bundle(prefix: Path) -> None:
    """Read a bundle against the checksums that TensorFlow keeps in it, one tensor after the other.

    :raises CheckpointDamagedError: if something is missing or does not match its checksum.
    :raises OSError: as the storage fails.
    """
    reader, names = _open(prefix)
    for name in names:
        _tensor(reader, prefix, name)


def _open(prefix: Path) -> tuple[Any, list[str]]:
    try:
        reader = tf.train.load_checkpoint(str(prefix))
        return reader, sorted(reader.get_variable_to_shape_map())
    except Exception as error:
        raise _damaged(prefix, "index", error) from error


def _tensor(reader: Any, prefix: Path, name: str) -> Any:
    try:
        return reader.get_tensor(name)
    except Exception as error:
        raise _damaged(prefix, f"tensor {name!r}", error) from error


def _damaged(prefix: Path, what: str, error: Exception) -> CheckpointDamagedError:
    _check_storage(prefix)
    said = getattr(error, "message", None) or str(error)
    return CheckpointDamagedError(
        prefix.name, f"{what}: {type(error).__name__}: {said.splitlines()[0] if said else ''}"
    )


def _check_storage(prefix: Path) -> None:
    """Read the files of a bundle as they are: TensorFlow's errors do not tell a failing storage from damage.

    :raises OSError: as the storage fails, or permissions are missing; but not for what is not there.
    """
    try:
        paths = [path for path in sorted(prefix.parent.iterdir()) if path.name.startswith(f"{prefix.name}.")]
        for path in paths:
            if path.is_file():
                with path.open("rb", buffering=0) as file:
                    while file.read(_PIECE):
                        pass
    except FileNotFoundError:
        return


def _as_os_error(error: Any, prefix: Path) -> OSError:
    numbers = {
        tf.errors.ResourceExhaustedError: errno.ENOSPC,
        tf.errors.PermissionDeniedError: errno.EACCES,
        tf.errors.NotFoundError: errno.ENOENT,
    }
    return OSError(
        numbers.get(type(error), errno.EIO), f"the bundle could not be written: {error.message}", str(prefix)
    )
