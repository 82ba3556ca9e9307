"""Boxes: tensors that several processes share out among them, each keeping a piece with straight sides.

A codec that is given such a piece describes it as the tensor that it is, and adds which box of the whole that is. What
was saved as boxes comes back as any others: each box that is wanted is put together from those that overlap with it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple

from supervise_core.memory import view_at
from supervise_core.tagged_json import Json
from supervise_core.tensors import StoredTensor, TensorSpec

_BOX: Final = "box"
_OF_THE_PIECE: Final = (_BOX, "strides", "shape")


class Box(NamedTuple):
    """Where a piece begins in the whole, and how long its sides are."""

    at: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """How many elements are in it."""
        return math.prod(self.shape)

    def meet(self, other: Box) -> Box | None:
        """What two boxes have in common; None if that is nothing."""
        at = tuple(map(max, self.at, other.at))
        ends = (min(a + m, b + n) for a, m, b, n in zip(self.at, self.shape, other.at, other.shape, strict=True))
        shape = tuple(end - begin for begin, end in zip(at, ends, strict=True))
        return Box(at, shape) if all(side > 0 for side in shape) else None

    def within(self, other: Box) -> tuple[slice, ...]:
        """Where it lies in another one that it is a part of."""
        begins = (mine - theirs for mine, theirs in zip(self.at, other.at, strict=True))
        return tuple(slice(begin, begin + side) for begin, side in zip(begins, self.shape, strict=True))


def boxed(whole: Sequence[int], at: Sequence[int]) -> dict[str, Json]:
    """What a codec adds to the description of a tensor that is a box of a larger one, beginning there."""
    return {_BOX: {"of": list(whole), "at": list(at)}}


def is_boxed(stored: StoredTensor) -> bool:
    """Whether a tensor is only a box of a larger one."""
    return _BOX in stored.extra


class Placed(NamedTuple):
    """A stored tensor as a box: of a whole of that shape, whose elements are of that kind and size in bytes."""

    whole: tuple[int, ...]
    box: Box
    kind: tuple[Any, ...]
    itemsize: int

    @classmethod
    def of(cls, stored: StoredTensor) -> Placed:
        """
        :raises ValueError: if what is noted of it makes no sense.
        """
        spec = stored.spec
        shape = _sides(stored.extra.get("shape", spec.shape))
        itemsize = spec.nbytes // max(1, math.prod(shape))
        if itemsize * math.prod(shape) != spec.nbytes:
            raise ValueError(f"{spec.nbytes} bytes are no tensor of shape {shape}")
        kind = (spec.dtype, stored.extra.get("dtype"))
        match stored.extra.get(_BOX):
            case None:
                return cls(shape, Box((0,) * len(shape), shape), kind, itemsize)
            case {"of": of, "at": at}:
                whole, begin = _sides(of), _sides(at)
                if len(whole) == len(begin) == len(shape) and all(
                    b + side <= end for b, side, end in zip(begin, shape, whole, strict=True)
                ):
                    return cls(whole, Box(begin, shape), kind, itemsize)
        raise ValueError(f"{stored.extra[_BOX]!r} is no place for a box of shape {shape}")

    def same_whole(self, other: Placed) -> bool:
        """Whether both are boxes of tensors of one kind and shape."""
        return (self.whole, self.kind) == (other.whole, other.kind)


def whole_of(stored: StoredTensor) -> StoredTensor:
    """The tensor that a stored one is a box of, as it would be stored if it were in one piece."""
    whole, _, _, itemsize = Placed.of(stored)
    extra = {key: value for key, value in stored.extra.items() if key not in _OF_THE_PIECE}
    name, dtype, _ = stored.spec
    if "shape" not in stored.extra:
        return StoredTensor(TensorSpec(name, dtype, whole), extra)
    return StoredTensor(TensorSpec(name, dtype, (math.prod(whole) * itemsize,)), {**extra, "shape": list(whole)})


def overlaps(wanted: Box, there: Sequence[Box]) -> list[tuple[int, Box]]:
    """Which of the boxes that are there have which part of the one that is wanted; of equal boxes the first.

    :raises ValueError: if they do not make up all of it, each element once.
    """
    found: list[tuple[int, Box]] = []
    seen: set[Box] = set()
    for number, box in enumerate(there):
        common = None if box in seen else wanted.meet(box)
        seen.add(box)
        if common is not None:
            found.append((number, common))
    filled = sum(common.size for _, common in found)
    if filled != wanted.size:
        raise ValueError(f"{filled} elements are there for the {wanted.size} of {wanted.shape} at {wanted.at}")
    return found


class Gathered:
    """The memory in which one box comes together, piece by piece: that at an address, or some of its own, which is
    handed over when the last piece is there."""

    def __init__(self, box: Box, itemsize: int, target: int | Callable[[memoryview], None], pieces: int) -> None:
        self._box = box
        self._itemsize = itemsize
        self._target = target
        self._left = pieces
        self._memory: memoryview | None = None

    def taker(self, common: Box, there: Box) -> Callable[[memoryview], None]:
        """Takes what is in common with the box that is there, from that one's bytes."""

        def take(content: memoryview) -> None:
            self._left -= 1
            memory = self._memory = self._memory or self._begin()
            _bytes(memory, self._box, self._itemsize)[common.within(self._box)] = _bytes(
                content, there, self._itemsize
            )[common.within(there)]
            if not self._left:
                self._memory = None
                if callable(self._target):
                    self._target(memory)

        return take

    def _begin(self) -> memoryview:
        nbytes = self._box.size * self._itemsize
        return memoryview(bytearray(nbytes)) if callable(self._target) else view_at(self._target, nbytes)


def _bytes(memory: memoryview, box: Box, itemsize: int) -> Any:
    import numpy

    return numpy.frombuffer(memory, numpy.uint8).reshape(*box.shape, itemsize)


def _sides(listed: Any) -> tuple[int, ...]:
    if isinstance(listed, (list, tuple)) and all(type(side) is int and side >= 0 for side in listed):
        return tuple(listed)
    raise ValueError(f"{listed!r} is not the shape of a tensor")
