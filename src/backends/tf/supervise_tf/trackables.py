"""The parts of an eager program, taken apart: variables, and what keeps its state elsewhere (iterators, tables).

TensorFlow saves and restores the latter only as a checkpoint on disk, so that is done in a scratch directory; here
they become arrays like all others.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import tensorflow as tf

from supervise_core.data_source import is_stateful
from supervise_core.errors import UnsupportedStateError

_GRAPH: Final = "_CHECKPOINTABLE_OBJECT_GRAPH"
_TENSOR: Final = re.compile(r"part/\.ATTRIBUTES/(.*)")
_OWN_STATE: Final = ("_serialize_to_tensors", "_gather_saveables_for_checkpoint")
_COUNTS_FILES: Final = "save_counter"  # how often tf.train.Checkpoint.save was called; no state of training


def leaves(name: str, part: Any) -> dict[str, Any]:
    """The objects in a part by path: of a list, a tuple, a dict or a ``tf.train.Checkpoint`` what is in it.

    :raises TypeError: if something in it has no state that can be kept; says which.
    """
    found: dict[str, Any] = {}
    _collect_leaves(name, part, "", found)
    return found


def is_container(part: Any) -> bool:
    """Whether ``leaves`` takes it apart."""
    return isinstance(part, (list, tuple, dict, tf.train.Checkpoint))


def is_variable(part: Any) -> bool:
    """Whether it is a variable, of TensorFlow or of Keras."""
    return isinstance(part, tf.Variable) or all(hasattr(part, name) for name in ("assign", "numpy", "shape", "dtype"))


def is_optimizer(part: Any) -> bool:
    """Whether it is an optimizer of Keras."""
    return hasattr(part, "iterations") and hasattr(part, "apply_gradients")


def uses_state_dict(part: Any) -> bool:
    """Whether it is kept by ``state_dict`` and ``load_state_dict``."""
    return not _has_variables(part) and is_stateful(part)


@dataclass(slots=True)
class Contents:
    """What has state in one object, by name. Both sorts share one set of names."""

    variables: dict[str, Any] = field(default_factory=dict[str, Any])
    others: dict[str, Any] = field(default_factory=dict[str, Any])


def contents_of(part: Any) -> Contents:
    """All in an object that has state: its variables, and whatever TensorFlow tracks in it.

    Variables are named by their number, and in a model by their own name besides. Not by their paths: Keras numbers
    the layers of one process, so a path tells which model was made first. What is found by tracking has attributes as
    its name: a layer's own ``tf.Variable`` and ``tf.random.Generator``, a module's table.
    """
    if is_variable(part):
        return Contents({"value": part})
    if _holds_random_state(part):
        return Contents({"state": part.state})
    if is_optimizer(part):
        return Contents(_variables_of_optimizer(part))
    numbered = enumerate(getattr(part, "variables", ()))
    contents = Contents({f"{number}.{variable.name.partition(':')[0]}": variable for number, variable in numbered})
    if _is_trackable(part):
        seen = {id(variable) for variable in contents.variables.values()}
        _collect_tracked(part, "", seen, contents)
    return contents


# ---- what has its state elsewhere


def take_state(path: str, part: Any) -> dict[str, Any]:
    """The state as a tree of arrays and plain values.

    :raises UnsupportedStateError: if it cannot be saved, as an iterator over a Python generator; says why.
    """
    return {_attribute(name): _value_of(tensor) for name, tensor in _written(path, part).items() if name != _GRAPH}


def kinds_of_state(path: str, part: Any) -> dict[str, tuple[Any, tuple[int | None, ...] | None]]:
    """The dtype and shape of each tensor of the state, as they are now; a None in a shape, or for it, is any."""
    return {
        _attribute(name): (tensor.dtype, None if tensor.dtype == tf.variant else (None, *tensor.shape[1:]))
        for name, tensor in _written(path, part).items()
        if name != _GRAPH
    }


def put_back(path: str, part: Any, state: Mapping[str, Any]) -> None:
    """The inverse of ``take_state``. If TensorFlow refuses the state, the part has its former one again.

    :raises ValueError: if TensorFlow refuses it; says why.
    """
    former = _written(path, part)
    tensors = {name: former[name] if name == _GRAPH else _tensor_of(state[_attribute(name)]) for name in former}
    try:
        _read(part, tensors)
    except (tf.errors.OpError, AssertionError) as error:
        _read(part, former)
        raise ValueError(_first_line(error)) from error


def _written(path: str, part: Any) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="supervise-") as scratch:
        prefix = f"{scratch}/part"
        try:
            tf.train.Checkpoint(part=part).write(prefix)
        except (tf.errors.FailedPreconditionError, tf.errors.UnimplementedError) as error:
            raise UnsupportedStateError(path, _first_line(error)) from error
        dtypes = tf.train.load_checkpoint(prefix).get_variable_to_dtype_map()
        names = sorted(dtypes)
        tensors = tf.raw_ops.RestoreV2(
            prefix=prefix,
            tensor_names=names,
            shape_and_slices=[""] * len(names),
            dtypes=[dtypes[name] for name in names],
        )
        return dict(zip(names, tensors, strict=True))


def _read(part: Any, tensors: Mapping[str, Any]) -> None:
    with tempfile.TemporaryDirectory(prefix="supervise-") as scratch:
        prefix = f"{scratch}/part"
        tf.raw_ops.SaveV2(
            prefix=prefix,
            tensor_names=list(tensors),
            shape_and_slices=[""] * len(tensors),
            tensors=list(tensors.values()),
        )
        tf.train.Checkpoint(part=part).read(prefix).assert_consumed()


def _attribute(name: str) -> str:
    matched = _TENSOR.fullmatch(name)
    return name if matched is None else matched[1]


def _first_line(error: Any) -> str:
    """What TensorFlow says, without the name of the function that it wrapped around the op."""
    said = str(getattr(error, "message", None) or error).splitlines()
    return re.sub(r"^\{\{function_node [^}]*\}\} ", "", said[0]) if said else type(error).__name__


# ---- tensors that NumPy has no dtype for


def value_of_variable(variable: Any) -> Any:
    """A variable's value as an array, or, for strings, as a list of them and its shape."""
    return _plain(np.asarray(variable.numpy()), variable.dtype)


def kind_of(value: Any) -> tuple[Any, tuple[int, ...]] | None:
    """The dtype and shape of what a checkpoint holds (``tf.variant`` has no shape); None if it is no tensor."""
    match value:
        case {"variant": np.ndarray(dtype=np.uint8, ndim=1), **rest} if not rest:
            return tf.variant, ()
        case {"strings": list(), "shape": list() as shape, **rest} if not rest:
            return tf.string, tuple(shape)
        case dict() | list() | None:
            return None
        case _:
            return tf.as_dtype(value.dtype), tuple(value.shape)


def array_of(value: Any) -> Any:
    """The inverse of ``value_of_variable``."""
    if not isinstance(value, dict):
        return value
    strings = np.empty(len(value["strings"]), dtype=object)
    strings[:] = value["strings"]
    return strings.reshape(value["shape"])


def _plain(array: Any, dtype: Any) -> Any:
    if dtype != tf.string:
        return array
    return {"strings": array.astype(object).reshape(-1).tolist(), "shape": list(array.shape)}


def _value_of(tensor: Any) -> Any:
    if tensor.dtype == tf.variant:
        return {"variant": np.frombuffer(tf.io.serialize_tensor(tensor).numpy(), np.uint8)}
    return _plain(np.asarray(tensor.numpy()), tensor.dtype)


def _tensor_of(value: Any) -> Any:
    if isinstance(value, dict) and "variant" in value:
        return tf.io.parse_tensor(value["variant"].tobytes(), tf.variant)
    return tf.constant(array_of(value))


# ---- looking into objects


def _collect_leaves(name: str, part: Any, path: str, found: dict[str, Any]) -> None:
    if is_container(part):
        for key, child in _children(part):
            _collect_leaves(f"{name}[{key!r}]", child, f"{path}/{key}" if path else str(key), found)
        return
    if not (_has_variables(part) or is_stateful(part) or _is_worth_tracking(part)):
        kind = type(part).__name__
        hint = "; pass its iterator, iter(dataset), which has a position" if isinstance(part, tf.data.Dataset) else ""
        raise TypeError(f"{name}= has neither variables nor a state_dict; a {kind} cannot be saved{hint}")
    if path in found:
        raise TypeError(f"{name}= stands at the same path as another one, {path!r}; use other keys")
    found[path] = part


def _children(part: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(part, tf.train.Checkpoint):
        children = tf.train.TrackableView.children(part)
        for name in sorted(children):
            if not name.startswith("_") and name != _COUNTS_FILES:
                yield name, children[name]
    else:
        yield from part.items() if isinstance(part, dict) else enumerate(part)


def _has_variables(part: Any) -> bool:
    return is_variable(part) or _holds_random_state(part) or hasattr(part, "variables")


def _holds_random_state(part: Any) -> bool:
    """Whether it is a ``tf.random.Generator`` or a Keras ``SeedGenerator``."""
    return is_variable(getattr(part, "state", None)) and not hasattr(part, "variables")


def _is_trackable(part: Any) -> bool:
    return isinstance(part, tf.__internal__.tracking.Trackable)


def _is_worth_tracking(part: Any) -> bool:
    if not _is_trackable(part):
        return False
    contents = contents_of(part)
    return bool(contents.variables or contents.others)


def _has_own_state(part: Any) -> bool:
    """Whether TensorFlow saves something of this very object, besides what is tracked in it."""
    base = tf.__internal__.tracking.Trackable
    return any(getattr(type(part), name, None) is not getattr(base, name, None) for name in _OWN_STATE)


def _collect_tracked(part: Any, path: str, seen: set[int], contents: Contents) -> None:
    if id(part) in seen:
        return
    seen.add(id(part))
    if is_variable(part):
        contents.variables[path] = part
    elif _has_own_state(part):
        contents.others[path] = part
    elif path and is_optimizer(part):  # of a compiled model; it may not be built yet, and is a part of its own
        return
    else:
        for name, child in tf.train.TrackableView.children(part).items():
            _collect_tracked(child, f"{path}.{name}" if path else name, seen, contents)


def _variables_of_optimizer(optimizer: Any) -> dict[str, Any]:
    """By number; those of an optimizer inside it apart, since its own ones grow in number when it is built."""
    inner = getattr(optimizer, "inner_optimizer", None)
    if inner is None:
        return {str(number): variable for number, variable in enumerate(optimizer.variables)}
    inside = _variables_of_optimizer(inner)
    known = {id(variable) for variable in inside.values()}
    own = [variable for variable in optimizer.variables if id(variable) not in known]
    return {
        **{str(number): variable for number, variable in enumerate(own)},
        **{f"inner.{name}": variable for name, variable in inside.items()},
    }
