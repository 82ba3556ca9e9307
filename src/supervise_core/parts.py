"""The parts of a checkpoint on their way back, straight into the tensors that are there already."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Final

from supervise_core.boxes import Box, Gathered, Placed, is_boxed, overlaps, whole_of
from supervise_core.errors import CheckpointDamagedError, IncompatibleCheckpointError, UnsupportedStateError
from supervise_core.flattening import ARRAY, TENSOR, Flattening, FlatTensor, codecs_of
from supervise_core.memory import address_of, copy, no_collection
from supervise_core.tagged_json import Json, Untold, decode
from supervise_core.tensors import NOTHING_MORE, StoredTensor, TensorCodec, TensorSpec

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
    ranks: Callable[[], Sequence[Part]] | None = None
    """See ``of_all_ranks``."""

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

        A tensor that was saved in boxes is put together from the files of all ranks: that box of it which the one in
        ``into`` is, or else all of it.

        :raises IncompatibleCheckpointError: if it holds what this version, or this framework, does not know.
        :raises CheckpointDamagedError: if what the other ranks have is needed, and damaged.
        """
        with no_collection():
            known = codecs_of(codec)
            here = {} if into is None else _reusable(self.name, into, known)
            try:
                making = _Making(known, here, self) if self._is_as(here) else _BoxMaking(known, here, self)
                tree = decode(making.part.state, making.leaf)
            except CheckpointDamagedError:
                raise
            except (ValueError, TypeError) as error:
                raise IncompatibleCheckpointError(self.name, [str(error)]) from error
            return Restoration(tree, making.reads(), is_in_place=not making.fresh)

    def of_all_ranks(self) -> Sequence[Part]:
        """This part as each of the processes saved it that each have their own, the chief's first; else only itself.

        :raises CheckpointDamagedError: if a size, a hash or a format is wrong.
        """
        return [self] if self.ranks is None else self.ranks()

    def _is_as(self, here: Mapping[str, FlatTensor]) -> bool:
        """Whether boxes of larger tensors were saved as exactly those that are here; so it is where there are none."""
        stored_here = [] if self.ranks is None else self.stored_tensors()
        saved = {stored.spec.name: stored for stored in stored_here if is_boxed(stored)}
        boxes_here = {name: tensor.stored for name, tensor in here.items() if tensor.extra and is_boxed(tensor.stored)}
        return saved == boxes_here if saved else not boxes_here

    def check(self) -> None:
        """:raises ValueError: if the state was not made by this format, or names tensors that are not there."""

        def leaf(tag: str, content: Json) -> None:
            if tag in _TAGS:
                self.spec_of(content[tag])

        decode(self.state, leaf)

    def stored_tensors(self) -> Iterator[StoredTensor]:
        """The tensors with what their codec noted of them, without reading any."""
        found: list[StoredTensor] = []

        def leaf(tag: str, content: Json) -> Any | Untold:
            if tag in _TAGS:
                found.append(StoredTensor(self.spec_of(content[tag]), _extra_of(tag, content)))
            return None

        decode(self.state, leaf)
        return iter(found)

    def held(self) -> Part:
        """The same part with its tensors in memory, to be read when the checkpoint is not open any more."""
        own = self._held()
        if self.ranks is None:
            return own
        ranks = [own if part.read is self.read else part._held() for part in self.ranks()]
        return replace(own, ranks=lambda: ranks)

    def _held(self) -> Part:
        contents: dict[str, tuple[TensorSpec, memoryview]] = {}

        def keeper(spec: TensorSpec) -> Callable[[memoryview], None]:
            def keep(data: memoryview) -> None:
                contents[spec.name] = spec, memoryview(bytearray(data))

            return keep

        self.read({name: keeper(spec) for name, spec in self.tensors.items() if spec.nbytes})
        empty = {name: (spec, memoryview(b"")) for name, spec in self.tensors.items() if not spec.nbytes}
        return Part.of(self.name, self.state, contents | empty)

    def spec_of(self, name: Json) -> TensorSpec:
        """The tensor that the state names.

        :raises ValueError: if it is not there.
        """
        spec = self.tensors.get(name) if type(name) is str else None
        if spec is None:
            raise ValueError(f"the state of part {self.name!r} names the tensor {name!r}, which is not there")
        return spec


def _extra_of(tag: str, leaf: dict[str, Json]) -> Mapping[str, Json]:
    """What a tagged object of the state says of its tensor besides its name."""
    return NOTHING_MORE if len(leaf) == 1 else {key: value for key, value in leaf.items() if key != tag}


class _Making:
    """Finds or makes a tensor for each one of a part, and notes where its bytes go."""

    def __init__(self, codecs: Mapping[str, TensorCodec[Any]], here: Mapping[str, FlatTensor], part: Part) -> None:
        self.part = part
        self.fresh: list[str] = []
        self._codecs = codecs
        self._here = here
        self._made: dict[str, Any] = {}
        self._targets: dict[str, Target] = {}

    def reads(self) -> list[Read]:
        """What is to be read, once the tree is complete."""
        return [(self.part.read, self._targets)]

    def leaf(self, tag: str, content: Json) -> Any | Untold:
        """What stands in the tree for a tagged object."""
        if tag not in _TAGS:
            return self._codecs[TENSOR].decode_constant(tag, content)
        name = content[tag]
        if name not in self._made:
            spec, extra = self.part.spec_of(name), _extra_of(tag, content)
            self._made[name] = self._make(tag if tag in self._codecs else TENSOR, spec, extra)
        return self._made[name]

    def _make(self, tag: str, spec: TensorSpec, extra: Mapping[str, Json]) -> Any:
        name = spec.name
        present = self._here.get(name)
        if present is not None and present.tag == tag and present.spec == spec and present.extra == extra:
            value, address = present.value, present.address
        else:
            value = self._codecs[tag].empty(StoredTensor(spec, extra))
            address = self._codecs[tag].describe(value).address
            self.fresh.append(name)
        if 0 not in spec.shape:
            self._targets[name] = _taker(self._codecs[tag], value) if address is None else address
        return value


class _BoxMaking(_Making):
    """The same where what is here are other boxes of the tensors than those that were saved.

    The chief's tree is that of all. Who has a box of its own in a saved file finds most of what it needs there, so that
    file comes first.
    """

    def __init__(self, codecs: Mapping[str, TensorCodec[Any]], here: Mapping[str, FlatTensor], own: Part) -> None:
        ranks = own.of_all_ranks()
        super().__init__(codecs, here, ranks[0])
        self._sources = sorted(ranks, key=lambda part: part.read is not own.read)
        self._stored = [{stored.spec.name: stored for stored in part.stored_tensors()} for part in self._sources]
        self._pieces: list[dict[str, Target]] = [{} for _ in self._sources]

    def reads(self) -> list[Read]:
        chief = next(index for index, source in enumerate(self._sources) if source is self.part)
        self._pieces[chief] |= self._targets
        return [(source.read, wanted) for source, wanted in zip(self._sources, self._pieces, strict=True) if wanted]

    def _make(self, tag: str, spec: TensorSpec, extra: Mapping[str, Json]) -> Any:
        name, codec, stored = spec.name, self._codecs[tag], StoredTensor(spec, extra)
        present = self._here.get(name)
        if not is_boxed(stored) and not (present is not None and is_boxed(present.stored)):
            return super()._make(tag, spec, extra)
        placed = Placed.of(stored)
        if present is not None and present.tag == tag and Placed.of(present.stored).same_whole(placed):
            value, address, box = present.value, present.address, Placed.of(present.stored).box
        else:
            value = codec.empty(whole := whole_of(stored))
            address, box = codec.describe(value).address, Placed.of(whole).box
            self.fresh.append(name)
        self._gather(name, placed, box, _taker(codec, value) if address is None else address)
        return value

    def _gather(self, name: str, like: Placed, wanted: Box, target: Target) -> None:
        holders = [(number, Placed.of(there[name])) for number, there in enumerate(self._stored) if name in there]
        if not all(placed.same_whole(like) for _, placed in holders):
            raise ValueError(f"the ranks that saved {name!r} differ in its shape or dtype")
        try:
            pieces = overlaps(wanted, [placed.box for _, placed in holders])
        except ValueError as error:
            raise ValueError(f"{name!r} is not complete: {error}") from error
        gathered = Gathered(wanted, like.itemsize, target, len(pieces))
        for index, common in pieces:
            number, placed = holders[index]
            self._pieces[number][name] = gathered.taker(common, placed.box)


Read = tuple[ReadTensors, Mapping[str, Target]]


@dataclass(slots=True)
class Restoration:
    """The state of a part whose tensors are still to be read; ``tree`` is complete once ``read`` has returned."""

    tree: Any
    _reads: Sequence[Read]
    is_in_place: bool
    """Whether all of it goes into tensors that are there already."""

    def read(self) -> None:
        """Read and verify.

        :raises CheckpointDamagedError: if a size or a hash is wrong; the values of all the tensors are undefined then.
        """
        for read, targets in self._reads:
            read(targets)


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
        (tensor.address, tensor.address + tensor.spec.nbytes, name)
        for name, tensor in flat.tensors.items()
        if tensor.address is not None and 0 not in tensor.spec.shape
    )
    shared: set[str] = set()
    end, owner = 0, ""
    for begin, upto, name in extents:
        if begin < end:
            shared |= {owner, name}
        if upto > end:
            end, owner = upto, name
    numbered = {name for name in flat.tensors if "#" in name}
    repeated = {name.partition("#")[0] for name in numbered}
    fixed = {
        name
        for name, tensor in flat.tensors.items()
        if tensor.address is None and not codecs[tensor.tag].is_writable(tensor.value)
    }
    for name in shared | numbered | repeated | fixed:
        flat.tensors.pop(name, None)
    return flat.tensors
