"""What of a snapshot is in an older checkpoint already, and need not be written again.

Hard links are per file, so a part of which much stays as it is becomes several files, as Hugging Face's tools have it:
shards that are never changed, and an index that says which of them holds which tensor. A checkpoint links shards of the
one before it, and writes what changed into a new one. Shards are numbered by age: a tensor that an older shard holds,
too, is found again in a newer one, so that whoever reads them all in order has the right one at the end.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from supervise_core.checkpoint_format import Base, Draft, Link, PlacedPart, Shard
from supervise_core.snapshot import FileImage, PartImage, TensorImage, shard_name, shards_of

MOST_DEAD: Final = 0.3
"""The share of a shard that may be of tensors that have changed; beyond it, what is left of it is written anew."""

LEAST_SHARED: Final = 0.05
"""The share of a part that must have stayed as it is; below it, one file is worth more than the little saved."""

MOST_SHARDS: Final = 64


@dataclass(frozen=True, slots=True)
class Placement:
    """The files of one part: those that are linked already, and those to be written."""

    linked: Sequence[Shard]
    files: Sequence[FileImage]


def place(draft: Draft, part: PartImage, base: Base | None) -> Placement:
    """Link into the draft what the part shares with an older checkpoint; and what remains to be written.

    :raises OSError: as the storage fails.
    """
    known = None if base is None else base.placed.get(part.name)
    if base is None or known is None:
        return Placement([], part.files)
    kept, files = _plan(part, known)
    count = len(kept) + len(files)
    if not count:
        return Placement([], part.files)
    names = [shard_name(part.name, number, count) for number in range(1, count + 1)]
    linked = [replace(shard, file=name) for shard, name in zip(kept, names, strict=False)]
    links = [Link(new.file, old.file, old.record.size) for old, new in zip(kept, linked, strict=True)]
    if links and not draft.link(base.checkpoint, links):
        return Placement([], part.files)
    return Placement(linked, [replace(file, name=name) for file, name in zip(files, names[len(kept) :], strict=True)])


def _plan(part: PartImage, known: PlacedPart) -> tuple[list[Shard], list[FileImage]]:
    """The shards to be linked, and the files to be written besides; no shard if it is not worth it."""
    images = {tensor.spec.name: tensor for file in part.files for tensor in file.tensors}
    kept: list[Shard] = []
    settled: dict[str, TensorImage] = {}
    for shard in known.shards:
        alive = {
            name: size for name, size in shard.tensors.items() if part.changed_at.get(name, part.number) <= known.number
        }
        dead = shard.dead + sum(shard.tensors.values()) - sum(alive.values())
        if alive and dead <= MOST_DEAD * (dead + sum(alive.values())):
            kept.append(replace(shard, tensors=alive, dead=dead))
        else:
            settled |= {name: images[name] for name in alive}
    held = {name for shard in kept for name in shard.tensors}
    changed = {name: image for name, image in images.items() if name not in held and name not in settled}
    total = sum(image.spec.nbytes for image in images.values())
    unchanged = total - _nbytes(changed)
    if unchanged < LEAST_SHARED * total or len(kept) > MOST_SHARDS:
        return [], []
    if _nbytes(settled) < LEAST_SHARED * total:
        changed, settled = {**settled, **changed}, {}
    return kept, [
        FileImage.of("", [group[spec.name] for spec in shard])
        for group in (settled, changed)
        for shard in shards_of([image.spec for image in group.values()], part.shard_bytes)
    ]


def _nbytes(images: Mapping[str, TensorImage]) -> int:
    return sum(image.spec.nbytes for image in images.values())
