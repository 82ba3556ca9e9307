"""The parts of a checkpoint on their way back, straight into the tensors that are there already."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final

from supervise_core.errors import IncompatibleCheckpointError, UnsupportedStateError
from supervise_core.flattening import ARRAY, TENSOR, Flattening, FlatTensor, codecs_of
from supervise_core.memory import address_of, copy, no_collection
from supervise_core.tagged_json import Json, Untold, decode
from supervise_core.tensors import StoredTensor, TensorCodec, TensorSpec

Target = int | Callable[[memoryview], None]
"""Where the bytes of a tensor go: to an address, or to whoever takes them from memory that is not theirs to keep."""

ReadTensors = Callable[[Mapping[str, Target]], None]
"""Reads the tensors of one part, those wanted by their names, and verifies all that was read on the way.

:raises CheckpointDamagedError: if a size or a hash is wrong; what was filled in is then worth nothing.
"""

_TAGS: Final = (TENSOR, ARRAY)
_TOGETHER: Final = 2


@dataclass(frozen=True, slots=True)
class Part:
    """One part of a checkpoint. Its tensors are read when they are asked for, while the checkpoint is held open.

    ``is_own`` is False where each of several processes had a part like this and this process's own was not saved: this
    is the chief's then. What must differ between processes, such as random state, is not to be taken from it.
    """

    name: str
    state: Json
    tensors: Mapping[str, TensorSpec]
    read: ReadTensors
    is_own: bool = True

    @classmethod
    def of(cls, name: str, state: Json, contents: Mapping[str, tuple[TensorSpec, memoryview]]) -> Part:
        """A part whose tensors are in memory."""

        def read(targets: Mapping[str, Target]) -> None:
            for tensor, target in targets.items():
                content = contents[tensor][1]
                if callable(target):
                    target(content)
                else:
                    held = content if not content.readonly else memoryview(bytearray(content))
                    copy(target, address_of(held), held.nbytes)

        return cls(name, state, {tensor: spec for tensor, (spec, _) in contents.items()}, read)

    def tree(self, codec: TensorCodec[Any] | None = None) -> Any:
        """The state as it was put, its tensors made new by ``codec`` (NumPy arrays without one). Ties are kept.

        :raises IncompatibleCheckpointError: if it holds what this version, or this framework, does not know.
        :raises CheckpointDamagedError: if a size or a hash is wrong.
        """
        restoration = self.restoration(codec)
        restoration.read()
        return restoration.tree

    def restoration(self, codec: TensorCodec[Any] | None = None, into: Any = None) -> Restoration:
        """As ``tree``, but nothing is read yet, so that shapes and dtypes can be compared before anything is changed.

        ``into`` is a tree of the state that is there now: where it has a tensor of the same kind in the same place,
        that very tensor is in the result, and is overwritten when it is read.

        :raises IncompatibleCheckpointError: if it holds what this version, or this framework, does not know.
        """
        with no_collection():
            return self._restoration(codecs_of(codec), into)

    def _restoration(self, codecs: Mapping[str, TensorCodec[Any]], into: Any) -> Restoration:
        here = {} if into is None else _reusable(self.name, into, codecs)
        made: dict[str, Any] = {}
        targets: dict[str, Target] = {}
        fresh: list[str] = []

        def leaf(tag: str, content: Json) -> Any | Untold:
            if tag not in _TAGS:
                return codecs[TENSOR].decode_constant(tag, content)
            name = content[tag]
            if name not in made:
                stored = self._stored(tag, content)
                known = tag if tag in codecs else TENSOR
                present = here.get(name)
                fits = present is not None and present.tag == known and present.stored == stored
                if present is not None and fits:
                    made[name], address = present.value, present.address
                else:
                    made[name] = codecs[known].empty(stored)
                    address = codecs[known].address(made[name])
                    fresh.append(name)
                if stored.spec.nbytes:
                    targets[name] = _taker(codecs[known], made[name]) if address is None else address
            return made[name]

        try:
            tree = decode(self.state, leaf)
        except (ValueError, TypeError) as error:
            raise IncompatibleCheckpointError(self.name, [str(error)]) from error
        return Restoration(tree, targets, self.read, is_in_place=not fresh)

    def check(self) -> None:
        """:raises ValueError: if the state was not made by this format, or names tensors that are not there."""
        tensors = self.tensors

        def leaf(tag: str, content: Json) -> None:
            if tag in _TAGS and (type(content[tag]) is not str or content[tag] not in tensors):
                self._stored(tag, content)  # says what is wrong

        decode(self.state, leaf)

    def stored_tensors(self) -> Iterator[StoredTensor]:
        """The tensors with what their codec noted of them, without reading any."""
        found: list[StoredTensor] = []

        def leaf(tag: str, content: Json) -> Any | Untold:
            if tag in _TAGS:
                found.append(self._stored(tag, content))
            return None

        decode(self.state, leaf)
        return iter(found)

    def held(self) -> Part:
        """The same part with its tensors in memory, to be read when the checkpoint is not open any more."""
        contents: dict[str, tuple[TensorSpec, memoryview]] = {}

        def keeper(spec: TensorSpec) -> Callable[[memoryview], None]:
            def keep(data: memoryview) -> None:
                contents[spec.name] = spec, memoryview(bytearray(data))

            return keep

        self.read({name: keeper(spec) for name, spec in self.tensors.items() if spec.nbytes})
        empty = {name: (spec, memoryview(b"")) for name, spec in self.tensors.items() if not spec.nbytes}
        return Part.of(self.name, self.state, contents | empty)

    def _stored(self, tag: str, leaf: dict[str, Json]) -> StoredTensor:
        name = leaf[tag]
        spec = self.tensors.get(name) if type(name) is str else None
        if spec is None:
            raise ValueError(f"the state of part {self.name!r} names the tensor {name!r}, which is not there")
        if len(leaf) == 1:
            return StoredTensor(spec)
        return StoredTensor(spec, {key: value for key, value in leaf.items() if key != tag})


@dataclass(slots=True)
class Restoration:
    """The state of a part whose tensors are still to be read; ``tree`` is complete once ``read`` has returned."""

    tree: Any
    _targets: Mapping[str, Target]
    _read: ReadTensors
    is_in_place: bool
    """Whether all of it goes into tensors that are there already."""

    def read(self) -> None:
        """Read and verify.

        :raises CheckpointDamagedError: if a size or a hash is wrong; the values of all the tensors are undefined then.
        """
        self._read(self._targets)


def read_together(restorations: Sequence[Restoration]) -> None:
    """Read and verify several parts at the same time: each is hashed by a thread of its own.

    :raises CheckpointDamagedError: if a size or a hash is wrong; the values of all the tensors are undefined then.
    """
    if len(restorations) < 2:
        for restoration in restorations:
            restoration.read()
        return
    with ThreadPoolExecutor(min(len(restorations), _TOGETHER), "supervise-core parts") as threads:
        reads = [threads.submit(restoration.read) for restoration in restorations]
    for read in reads:
        read.result()


Parts = Mapping[str, Part]
"""The parts of a checkpoint by name."""


def _taker(codec: TensorCodec[Any], tensor: Any) -> Target:
    return lambda data: codec.copy_in(tensor, data)


def _reusable(part: str, tree: Any, codecs: Mapping[str, TensorCodec[Any]]) -> Mapping[str, FlatTensor]:
    """The tensors of a tree by the names under which they would be saved, as far as they can be told apart.

    Those that share memory without being the same are left out: what is read into one would change the other.
    """
    flat = Flattening(part, codecs)
    try:
        flat.encode(tree)
    except UnsupportedStateError:
        return {}  # what could not be saved as it is now is not written over, but given back as it was
    extents = sorted(
        (address, address + tensor.stored.spec.nbytes, name)
        for name, tensor in flat.tensors.items()
        if tensor.stored.spec.nbytes and (address := tensor.address) is not None
    )
    shared: set[str] = set()
    end, owner = 0, ""
    for begin, upto, name in extents:
        if begin < end:
            shared |= {owner, name}
        if upto > end:
            end, owner = upto, name
    repeated = {name.partition("#")[0] for name in flat.tensors if "#" in name}
    return {
        name: tensor
        for name, tensor in flat.tensors.items()
        if name not in shared and name not in repeated and "#" not in name
        if codecs[tensor.tag].is_writable(tensor.value)
    }
