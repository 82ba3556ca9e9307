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
    stored: StoredTensor
    address: int | None


class Flattening:
    """The tensors of one tree, named by their paths: ``blocks.0.weight``, ``state.3.exp_avg``."""

    def __init__(self, part: str, codecs: Mapping[str, TensorCodec[Any]]) -> None:
        self.part = part
        self.codecs = codecs
        self.tensors: dict[str, FlatTensor] = {}
        self._at: dict[tuple[str, int], FlatTensor] = {}
        self._leaves: dict[Hashable, Json] = {}

    def encode(self, tree: Any) -> Json:
        """The tree as tagged JSON, which names the tensors.

        :raises UnsupportedStateError: for a value that would not come back; names its path.
        """
        return encode(tree, self.part, self._leaf)

    def _leaf(self, path: Path, value: Any) -> Json | Untold:
        for tag, codec in self.codecs.items():
            if codec.recognises(value):
                return self._tensor(path, tag, codec, value)
        try:
            return self.codecs[TENSOR].encode_constant(value)
        except TypeError as error:
            raise UnsupportedStateError(text_of(path), str(error)) from error

    def _tensor(self, path: Path, tag: str, codec: TensorCodec[Any], value: Any) -> Json:
        try:
            described = codec.describe(value)
        except TypeError as error:
            raise UnsupportedStateError(text_of(path), str(error)) from error
        address = codec.address(value)
        if (known := self._tied(tag, codec, value, address)) is not None:
            return known
        name = self._unique_name(path)
        spec = TensorSpec(name, described.dtype, described.shape)
        flat = self.tensors[name] = FlatTensor(tag, value, StoredTensor(spec, described.extra), address)
        if address is not None:
            self._at[tag, address] = flat
        elif (identity := codec.identity(value)) is not None:
            self._leaves[tag, identity] = _leaf_of(flat)
        return _leaf_of(flat)

    def _tied(self, tag: str, codec: TensorCodec[Any], value: Any, address: int | None) -> Json | None:
        """The leaf of the tensor that this one is, too, if it came before. Identities are asked for only where two
        tensors begin at one address: that is rare, and to ask is not cheap."""
        if address is None:
            identity = codec.identity(value)
            return None if identity is None else self._leaves.get((tag, identity))
        other = self._at.get((tag, address))
        if other is None:
            return None
        identity = codec.identity(value)
        if identity is not None and (tag, identity) not in self._leaves:
            self._leaves[tag, codec.identity(other.value)] = _leaf_of(other)
        return None if identity is None else self._leaves.get((tag, identity))

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


def _leaf_of(tensor: FlatTensor) -> Json:
    return {tensor.tag: tensor.stored.spec.name, **tensor.stored.extra}
