"""A tree of state as tagged JSON and a flat list of tensors, each with a name of its own."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any, Final, NamedTuple

from supervise_core.errors import UnsupportedStateError
from supervise_core.numpy_codec import NumpyCodec
from supervise_core.tagged_json import Json, Path, Untold, encode, text_of
from supervise_core.tensors import StoredTensor, TensorCodec, TensorSpec

TENSOR: Final = "$tensor"
ARRAY: Final = "$array"


def codecs_of(codec: TensorCodec[Any] | None) -> dict[str, TensorCodec[Any]]:
    """By tag: the framework's own tensors, and NumPy arrays beside them, which every framework's programs keep."""
    if codec is None or isinstance(codec, NumpyCodec):
        return {TENSOR: codec or NumpyCodec()}
    return {TENSOR: codec, ARRAY: NumpyCodec()}


class FlatTensor(NamedTuple):
    """One tensor of a tree, with the tag of the codec that knows it, and its address if it has one."""

    tag: str
    value: Any
    spec: TensorSpec
    extra: Mapping[str, Json]
    address: int | None

    @property
    def stored(self) -> StoredTensor:
        """As it is stored."""
        return StoredTensor(self.spec, self.extra)

    @property
    def leaf(self) -> Json:
        """What stands for it in the tree."""
        return {self.tag: self.spec.name, **self.extra}


class _Kind(NamedTuple):
    """What is known of the values of one type: which codec they are of, and its tensors so far by their addresses."""

    tag: str
    codec: TensorCodec[Any]
    at: dict[int | None, FlatTensor]


class Flattening:
    """The tensors of one tree, named by their paths: ``blocks.0.weight``, ``state.3.exp_avg``."""

    def __init__(self, part: str, codecs: Mapping[str, TensorCodec[Any]]) -> None:
        self.part = part
        self.codecs = codecs
        self.tensors: dict[str, FlatTensor] = {}
        self._by_tag = {tag: _Kind(tag, codec, {}) for tag, codec in codecs.items()}
        self._by_type: dict[type[Any], _Kind | None] = {}
        self._by_identity: dict[tuple[str, Hashable], FlatTensor] = {}

    def encode(self, tree: Any) -> Json:
        """The tree as tagged JSON, which names the tensors.

        :raises UnsupportedStateError: for a value that would not come back; names its path.
        """
        return encode(tree, self.part, self._leaf)

    def _leaf(self, path: Path, value: Any) -> Json | Untold:
        """Done for each tensor while the training thread waits, so it is one piece, and asks nothing twice."""
        try:
            kind = self._by_type[type(value)]
        except KeyError:
            kind = self._by_type[type(value)] = self._kind_of(value)
        try:
            if kind is None:
                return self.codecs[TENSOR].encode_constant(value)
            tag, codec, at = kind
            dtype, shape, extra, address = codec.describe(value)
        except TypeError as error:
            raise UnsupportedStateError(text_of(path), str(error)) from error
        identity = None
        if address is None or address in at:  # two tensors seldom begin at one address, and to ask is not cheap
            identity = codec.identity(value)
            if (same := self._same(kind, identity, at.get(address))) is not None:
                return same.leaf
        name = self._unique_name(path)
        flat = self.tensors[name] = FlatTensor(tag, value, TensorSpec(name, dtype, shape), extra, address)
        if address is not None:
            at[address] = flat
        if identity is not None:
            self._by_identity[tag, identity] = flat
        return {tag: name, **extra} if extra else {tag: name}

    def _kind_of(self, value: Any) -> _Kind | None:
        return next((kind for kind in self._by_tag.values() if kind.codec.recognises(value)), None)

    def _same(self, kind: _Kind, identity: Hashable | None, other: FlatTensor | None) -> FlatTensor | None:
        """The tensor that came before and is the same as the one with this identity; ``other`` begins where it does."""
        if identity is None:
            return None
        if other is not None and (others := kind.codec.identity(other.value)) is not None:
            self._by_identity.setdefault((kind.tag, others), other)
        return self._by_identity.get((kind.tag, identity))

    def _unique_name(self, path: Path) -> str:
        """``model['conv.weight']`` is stored as ``conv.weight``, ``optimizer['state'][0]['exp_avg']`` as it reads."""
        keys: list[str] = []
        while type(path) is tuple:
            path, key = path
            keys.append(key if type(key) is str and key.isprintable() else repr(key).strip("'"))
        keys.reverse()
        name = plain = ".".join(keys) or self.part
        number = 2
        while name in self.tensors or name == "__metadata__":
            name, number = f"{plain}#{number}", number + 1
        return name
