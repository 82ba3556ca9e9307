"""A tree of state as tagged JSON and a flat list of tensors, each with a name of its own."""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from supervise_core.errors import UnsupportedStateError
from supervise_core.numpy_codec import NumpyCodec
from supervise_core.tagged_json import Json, Untold, encode
from supervise_core.tensors import StoredTensor, TensorCodec, TensorSpec

TENSOR: Final = "$tensor"
ARRAY: Final = "$array"
_KEY: Final = re.compile(r"\[(?:'((?:[^'\\]|\\.)*)'|\"((?:[^\"\\]|\\.)*)\"|([^\]]*))\]")


def codecs_of(codec: TensorCodec[Any] | None) -> dict[str, TensorCodec[Any]]:
    """By tag: the framework's own tensors, and NumPy arrays beside them, which every framework's programs keep."""
    if codec is None or isinstance(codec, NumpyCodec):
        return {TENSOR: codec or NumpyCodec()}
    return {TENSOR: codec, ARRAY: NumpyCodec()}


@dataclass(frozen=True, slots=True)
class FlatTensor:
    """One tensor of a tree, with the tag of the codec that knows it."""

    tag: str
    value: Any
    stored: StoredTensor


@dataclass(slots=True)
class Flattening:
    """The tensors of one tree, named by their paths: ``blocks.0.weight``, ``state.3.exp_avg``."""

    part: str
    codecs: Mapping[str, TensorCodec[Any]]
    tensors: dict[str, FlatTensor] = field(default_factory=dict[str, FlatTensor])
    _leaves: dict[Hashable, Json] = field(default_factory=dict[Hashable, Json])

    def encode(self, tree: Any) -> Json:
        """The tree as tagged JSON, which names the tensors.

        :raises UnsupportedStateError: for a value that would not come back; names its path.
        """
        return encode(tree, self.part, self._leaf)

    def _leaf(self, path: str, value: Any) -> Json | Untold:
        for tag, codec in self.codecs.items():
            if codec.recognises(value):
                return self._tensor(path, tag, codec, value)
        try:
            return self.codecs[TENSOR].encode_constant(value)
        except TypeError as error:
            raise UnsupportedStateError(path, str(error)) from error

    def _tensor(self, path: str, tag: str, codec: TensorCodec[Any], value: Any) -> Json:
        identity = codec.identity(value)
        if identity is not None and (tag, identity) in self._leaves:
            return self._leaves[tag, identity]
        try:
            described = codec.describe(value)
        except TypeError as error:
            raise UnsupportedStateError(path, str(error)) from error
        name = self._unique_name(path)
        stored = StoredTensor(TensorSpec(name, described.dtype, described.shape), described.extra)
        self.tensors[name] = FlatTensor(tag, value, stored)
        leaf = {tag: name, **described.extra}
        if identity is not None:
            self._leaves[tag, identity] = leaf
        return leaf

    def _unique_name(self, path: str) -> str:
        """``model['conv.weight']`` is stored as ``conv.weight``, ``optimizer['state'][0]['exp_avg']`` as it reads."""
        keys = _KEY.findall(path, len(self.part))
        plain = ".".join([one or other or bare for one, other, bare in keys]) or self.part
        name, number = plain, 2
        while name in self.tensors or name == "__metadata__":
            name, number = f"{plain}#{number}", number + 1
        return name
