"""JSON that gives back what it was given, equal in value and in type.

Plain JSON turns tuples into lists, integer keys into strings and NaN into something no parser must accept. Here what
JSON lacks is an object with a single key that begins with ``$``; a dictionary that JSON would change: a list of pairs.
What cannot come back equal is refused with its path, so that a run learns it when it starts and not when it resumes.
"""

from __future__ import annotations

import base64
import json
import math
import sys
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable
from typing import Any, Final, TypeAlias

from supervise_core.errors import UnsupportedStateError

Json = Any
"""What ``json.loads`` gives: None, bool, int, float, str, and lists and dictionaries of them."""

_PLAIN: Final = frozenset({type(None), bool, str})
_AS_THEY_ARE: Final = _PLAIN | {int, float}
_JSON: Final = _AS_THEY_ARE | {list, dict}
_TEXT: Final = frozenset({str})
_LARGE_INTEGER: Final = 1 << 53  # beyond it, JSON readers in other languages round
_FACTORIES: Final = {"list": list, "dict": dict, "set": set, "int": int, "float": float, "none": None}
_DEEPEST: Final = 200
_OPEN_TAGS: Final = frozenset({"$tensor", "$array"})  # further keys stand beside them; the hook gets all


class Untold:
    """What a leaf hook answers for a value that is not its own. There is one of it."""


UNTOLD: Final = Untold()
Path: TypeAlias = "str | tuple[Path, Any]"
"""Where a value stands: the name of the whole, or what it is in and its key there. Made text only where it is read."""

LeafEncoder = Callable[[Path, Any], "Json | Untold"]
LeafDecoder = Callable[[str, Json], "Any | Untold"]


def text_of(path: Path) -> str:
    """A path as one would write it in Python: ``optimizer['state'][0]``."""
    if isinstance(path, str):
        return path
    within, key = path
    return f"{text_of(within)} key" if key is _KEY else f"{text_of(within)}[{key!r}]"


class _Key:
    """Stands in a path for a key itself, which has none."""

    def __repr__(self) -> str:
        return "key"


_KEY: Final = _Key()


def encode(value: Any, path: Path = "value", leaf: LeafEncoder | None = None) -> Json:
    """The JSON for a value. ``leaf(path, value)`` is asked first for all but plain values, lists and dictionaries of
    just these types; it answers JSON, or ``UNTOLD``.

    :raises UnsupportedStateError: for a value that would not come back equal in value and type.
    """
    return _Encoder(leaf).encode(value, path, 0)


def decode(data: Json, leaf: LeafDecoder | None = None) -> Any:
    """The value again. ``leaf(tag, content)`` is asked for tags that this module does not know.

    :raises ValueError: if the JSON was not made by ``encode``.
    """
    kind = type(data)
    if kind is dict:
        tag = next(iter(data), "")
        if tag in _OPEN_TAGS:
            return _told(tag, leaf, data)
        if not tag.startswith("$"):
            return {key: item if type(item) in _AS_THEY_ARE else decode(item, leaf) for key, item in data.items()}
        if len(data) != 1:
            raise ValueError(f"a tagged value has one key, not {sorted(data)}")
        return _decode_tagged(tag, data, leaf)
    if kind is list:
        return [item if type(item) in _AS_THEY_ARE else decode(item, leaf) for item in data]
    if kind in _AS_THEY_ARE:
        return data
    raise ValueError(f"{kind.__name__} is not JSON")


class _Encoder:
    def __init__(self, leaf: LeafEncoder | None) -> None:
        self._leaf = leaf

    def encode(self, value: Any, path: Path, depth: int) -> Json:
        if depth > _DEEPEST:
            raise UnsupportedStateError(text_of(path), f"it is nested more than {_DEEPEST} deep (or contains itself)")
        kind: type[Any] = type(value)
        if kind in _PLAIN:
            return value
        if self._leaf is not None and kind not in _JSON:
            told = self._leaf(path, value)
            return self._tagged(kind, value, path, depth) if told is UNTOLD else told
        if kind is int:
            return value if abs(value) < _LARGE_INTEGER else {"$int": hex(value)}
        if kind is float:
            return value if math.isfinite(value) else {"$float": repr(value)}
        if kind is list:
            return self._items(value, path, depth)
        if kind is dict:
            return self._dictionary(value, path, depth)
        return self._tagged(kind, value, path, depth)

    def _tagged(self, kind: type[Any], value: Any, path: Path, depth: int) -> Json:
        if kind is tuple:
            return {"$tuple": self._items(value, path, depth)}
        if kind in (set, frozenset):
            items = self._items(value, path, depth)
            return {f"${kind.__name__}": sorted(items, key=lambda item: json.dumps(item, sort_keys=True))}
        if kind in (bytes, bytearray):
            return {f"${kind.__name__}": base64.b64encode(value).decode("ascii")}
        if kind is complex:
            return {"$complex": [self.encode(part, path, depth) for part in (value.real, value.imag)]}
        if kind is deque:
            return {"$deque": [self._items(value, path, depth), value.maxlen]}
        if kind in (OrderedDict, Counter):
            return {f"${kind.__name__}": self._pairs(value, path, depth)}
        if kind is defaultdict:
            factory = next((name for name, made in _FACTORIES.items() if made is value.default_factory), None)
            if factory is None:
                raise UnsupportedStateError(
                    text_of(path), f"the default factory {value.default_factory!r} cannot be written down"
                )
            return {"$defaultdict": [factory, self._pairs(value, path, depth)]}
        numpy = sys.modules.get("numpy")
        if numpy is not None and isinstance(value, numpy.generic):
            return _encode_numpy_scalar(value, path)
        raise UnsupportedStateError(text_of(path), f"values of type {_full_name(kind)} cannot be written as data")

    def _items(self, values: Iterable[Any], path: Path, depth: int) -> list[Json]:
        return [self.encode(item, (path, index), depth + 1) for index, item in enumerate(values)]

    def _dictionary(self, value: dict[Any, Any], path: Path, depth: int) -> Json:
        if _TEXT.issuperset(map(type, value)) and not next(iter(value), "").startswith("$"):
            return {key: self.encode(item, (path, key), depth + 1) for key, item in value.items()}
        return {"$dict": self._pairs(value, path, depth)}

    def _pairs(self, value: dict[Any, Any], path: Path, depth: int) -> list[Json]:
        return [
            [self.encode(key, (path, _KEY), depth + 1), self.encode(item, (path, key), depth + 1)]
            for key, item in value.items()
        ]


def _encode_numpy_scalar(value: Any, path: Path) -> Json:
    dtype = value.dtype
    if dtype.hasobject or dtype.names or dtype.kind == "V" or dtype.type.__module__ != "numpy":
        raise UnsupportedStateError(
            text_of(path), f"NumPy scalars of dtype {dtype} cannot be written as data; use an array"
        )
    return {"$numpy": [dtype.str, base64.b64encode(value.tobytes()).decode("ascii")]}


def _decode_numpy_scalar(dtype: str, content: str) -> Any:
    import numpy

    kind = numpy.dtype(dtype)
    if kind.hasobject:
        raise ValueError(f"a scalar of dtype {dtype} is not data")
    data = base64.b64decode(content)
    if kind.kind == "S":  # NumPy takes zeros at the end of a text for padding, where these are the text
        return numpy.bytes_(data[: kind.itemsize])
    if kind.kind == "U":
        order = "be" if kind.str.startswith(">") else "le"
        return numpy.str_(data[: kind.itemsize].decode(f"utf-32-{order}", "surrogatepass"))
    if len(data) != kind.itemsize or not data:
        raise ValueError(f"{len(data)} bytes are not a scalar of dtype {dtype}")
    return numpy.frombuffer(data, kind)[0]


def _decode_tagged(tag: str, data: dict[str, Json], leaf: LeafDecoder | None) -> Any:
    content = data[tag]
    match tag, content:
        case "$int", str():
            return int(content, 16)
        case "$float", str():
            return float(content)
        case "$tuple", list():
            return tuple(decode(item, leaf) for item in content)
        case "$set", list():
            return {decode(item, leaf) for item in content}
        case "$frozenset", list():
            return frozenset(decode(item, leaf) for item in content)
        case "$bytes", str():
            return base64.b64decode(content)
        case "$bytearray", str():
            return bytearray(base64.b64decode(content))
        case "$complex", [real, imaginary]:
            return complex(decode(real), decode(imaginary))
        case "$deque", [list() as items, int() | None as maxlen]:
            return deque((decode(item, leaf) for item in items), maxlen)
        case "$dict", list():
            return dict(_decode_pairs(content, leaf))
        case "$OrderedDict", list():
            return OrderedDict(_decode_pairs(content, leaf))
        case "$Counter", list():
            return Counter(dict(_decode_pairs(content, leaf)))
        case "$defaultdict", [str() as factory, list() as pairs] if factory in _FACTORIES:
            return defaultdict(_FACTORIES[factory], _decode_pairs(pairs, leaf))
        case "$numpy", [str() as dtype, str() as scalar]:
            return _decode_numpy_scalar(dtype, scalar)
        case _:
            return _told(tag, leaf, content)


def _told(tag: str, leaf: LeafDecoder | None, content: Json) -> Any:
    told = UNTOLD if leaf is None else leaf(tag, content)
    if told is UNTOLD:
        raise ValueError(f"{tag} is not a tag that this version knows")
    return told


def _decode_pairs(pairs: list[Json], leaf: LeafDecoder | None) -> list[tuple[Any, Any]]:
    return [(decode(key, leaf), decode(item, leaf)) for key, item in pairs]


def _full_name(kind: type[Any]) -> str:
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
