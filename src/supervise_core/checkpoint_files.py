"""A snapshot as the files of a checkpoint, and back: what goes into which file, and what is distrusted when read."""

from __future__ import annotations

import json
import re
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from dataclasses import replace
from functools import cache, partial
from typing import Any, Final, Self

from supervise_core.checkpoint_format import (
    Base,
    CheckpointContent,
    CheckpointFormat,
    CheckpointReader,
    Draft,
    PlacedPart,
    Shard,
    Written,
)
from supervise_core.errors import CheckpointDamagedError
from supervise_core.hashing import TensorFileHash, hash_of
from supervise_core.manifest import LARGEST_STATE, RANKS, STATE, FileRecord, Manifest, check_file_name
from supervise_core.memory import in_blocks, no_collection
from supervise_core.parts import Part, ReadTensors, Target
from supervise_core.safetensors_format import SUFFIX, Layout, parse_json_object
from supervise_core.sharing import place
from supervise_core.snapshot import FileImage, Snapshot
from supervise_core.tagged_json import Json, decode
from supervise_core.tensor_files import TensorFile
from supervise_core.tensors import TensorSpec

_RANK: Final = re.compile(r"[1-9]\d{0,8}")


def write_snapshot(draft: Draft, snapshot: Snapshot, run_state: Json, base: Base | None = None) -> Written:
    """Write the files of a snapshot into a draft: each part's tensors, and all else.

    What did not change since ``base``, the checkpoint before this one, is shared with it.
    ``run_state`` is what the core itself keeps (data positions and the like), as tagged JSON.
    """
    snapshot.finish()
    records: dict[str, FileRecord] = {}
    placed: dict[str, PlacedPart] = {}
    with _ImageWriter(draft) as writer:
        for part in snapshot.parts.values():
            placement = place(draft, part, base)
            digests = {} if snapshot.is_live else part.digests
            written = [Shard(file.name, writer.write(file, digests), _sizes(file)) for file in placement.files]
            shards = [*placement.linked, *written]
            records |= {shard.file: shard.record for shard in shards}
            placed[part.name] = PlacedPart(shards, part.number)
            if len(shards) > 1:
                _write_small(draft, index_name(part.name), _index_of(shards), records)
    _write_small(draft, STATE, _state_of(snapshot, run_state), records)
    return Written(records, placed=placed, helped=writer.helped)


class _ImageWriter:
    """Writes files of tensors; a thread of its own puts them together and hashes them meanwhile."""

    def __init__(self, draft: Draft) -> None:
        self._draft = draft
        self._helper = ThreadPoolExecutor(1, "supervise-core hashes")
        self.helped = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._helper.shutdown()

    def write(self, image: FileImage, digests: dict[str, bytes]) -> FileRecord:
        """Write one file; its size and hash."""
        hashing = _ImageHash(image.layout, digests)
        if image.blocks is None:
            self._draft.write_blocks(image.name, self._gathered(image, hashing), image.size)
            return FileRecord(image.size, hashing.hexdigest())
        hashed = self._helper.submit(self._feed, hashing, image.blocks)
        self._draft.write_blocks(image.name, [image.blocks], image.size)
        hashed.result()
        return FileRecord(image.size, hashing.hexdigest())

    def _gathered(self, image: FileImage, hashing: _ImageHash) -> Iterator[memoryview]:
        """The file in pieces, each put together and hashed while the one before it is written.

        What is hashed is what is written: where the program's own tensors are read, another thread may change them.
        """
        pieces = in_blocks(image.chunks(), image.size)
        ahead = self._helper.submit(self._next_of, pieces, hashing)
        while (piece := ahead.result()) is not None:
            ahead = self._helper.submit(self._next_of, pieces, hashing)
            yield piece

    def _next_of(self, pieces: Iterator[memoryview], hashing: _ImageHash) -> memoryview | None:
        began = time.thread_time()
        piece = next(pieces, None)
        self.helped += time.thread_time() - began
        if piece is not None:
            self._feed(hashing, piece)
        return piece

    def _feed(self, hashing: _ImageHash, piece: memoryview) -> None:
        began = time.thread_time()
        hashing.feed(piece)
        self.helped += time.thread_time() - began


class _ImageHash:
    """The hash of a file that is given piece by piece; ``digests`` are those of large tensors, as far as known."""

    def __init__(self, layout: Layout, digests: dict[str, bytes]) -> None:
        self._layout = layout
        self._digests = digests
        self._hash = TensorFileHash(layout.header)
        self._at = 0
        self._apart = deque(layout.apart)
        self._known: bytes | None = None

    def feed(self, piece: memoryview) -> None:
        """Take what follows; what is beyond the end of the file counts for nothing."""
        begin, end = self._at, min(self._at + len(piece), self._layout.size)
        self._at = max(begin, min(len(self._layout.header), end))
        while self._at < end:
            name, first, nbytes = self._apart[0] if self._apart else ("", self._layout.size, 0)
            upto = min(end, first + nbytes if self._at >= first else first)
            content = piece[self._at - begin : upto - begin]
            if self._at < first:
                self._hash.update(content)
            else:
                self._take_apart(name, content, is_first=self._at == first, is_last=upto == first + nbytes)
            self._at = upto

    def _take_apart(self, name: str, content: memoryview, *, is_first: bool, is_last: bool) -> None:
        if is_first:
            self._known = self._digests.get(name)
        if self._known is None:
            digest = self._hash.update_apart(content, is_last=is_last)
            if digest is not None:
                self._digests[name] = digest
        elif is_last:
            self._hash.add_apart(self._known)
        if is_last:
            self._apart.popleft()

    def hexdigest(self) -> str:
        """The hash of all that was taken, in hexadecimal."""
        return self._hash.hexdigest()


def check_state_size(snapshot: Snapshot, run_state: Json) -> None:
    """:raises ValueError: if what is no tensor is too much for a ``state.json``."""
    _state_bytes(_state_of(snapshot, run_state))


def _state_of(snapshot: Snapshot, run_state: Json) -> dict[str, Json]:
    state: dict[str, Json] = {"parts": {part.name: part.state for part in snapshot.parts.values()}, "run": run_state}
    per_rank: list[Json] = [part.name for part in snapshot.parts.values() if part.per_rank]
    return state | {"per_rank": per_rank} if per_rank else state


def read_checkpoint(reader: CheckpointReader) -> CheckpointContent:
    """What is in a checkpoint: everything but the tensors is read and verified, and of those, what is where.

    :raises CheckpointDamagedError: if a size, a hash or a format is wrong.
    :raises OSError: as the storage fails.
    """
    with no_collection():
        return _read_checkpoint(reader)


def _read_checkpoint(reader: CheckpointReader) -> CheckpointContent:
    manifest = reader.manifest()
    files = _Files(reader, manifest)
    state = files.state()
    parts, run_state = _read_state(files, STATE, state)
    per_rank = [name for name in state.get("per_rank", []) if name in parts]

    @cache
    def own_of(rank: int) -> tuple[dict[str, Part], Any] | None:
        own = files.ranks().get(str(rank))
        if own is None:
            return None
        own_parts, own_run_state = _read_state(files.of_rank(rank), RANKS, own)
        return {name: replace(part, ranks=partial(all_of, name)) for name, part in own_parts.items()}, own_run_state

    def all_of(name: str) -> list[Part]:
        with no_collection():
            others = [own_of(int(rank)) for rank in sorted(files.ranks(), key=int)]
        return [parts[name], *(own[0][name] for own in others if own is not None and name in own[0])]

    def of_rank(rank: int) -> CheckpointContent:
        with no_collection():
            own = own_of(rank)
        if own is not None:
            return CheckpointContent(manifest, parts | own[0], own[1], files.verify)
        others = {name: replace(parts[name], is_own=False) for name in per_rank}
        return CheckpointContent(manifest, parts | others, run_state, files.verify)

    parts |= {name: replace(parts[name], ranks=partial(all_of, name)) for name in per_rank}
    return CheckpointContent(manifest, parts, run_state, files.verify, of_rank)


def _read_state(files: _Files, file: str, state: Mapping[str, Any]) -> tuple[dict[str, Part], Any]:
    """The parts that a state describes, and what the core keeps besides."""
    parts: dict[str, Part] = {}
    for name in state["parts"]:
        tensors, read = files.tensors(name)
        parts[name] = Part(name, state["parts"][name], tensors, read)
    try:
        for part in parts.values():
            part.check()
        return parts, decode(state["run"])
    except (ValueError, TypeError, RecursionError) as error:
        raise files.damaged(file, str(error)) from error


def verify_checkpoint(reader: CheckpointReader) -> Manifest:
    """Read everything and check it, keeping nothing.

    :raises CheckpointDamagedError: if a size, a hash or a format is wrong.
    """
    content = read_checkpoint(reader)
    content.verify()
    return content.manifest


class SafetensorsFormat(CheckpointFormat):
    """The format of the core: safetensors for tensors, tagged JSON for all else."""

    def check(self, snapshot: Snapshot, run_state: Json) -> None:
        check_state_size(snapshot, run_state)

    def write(self, draft: Draft, snapshot: Snapshot, run_state: Json, base: Base | None = None) -> Written:
        return write_snapshot(draft, snapshot, run_state, base)

    def read(self, reader: CheckpointReader) -> CheckpointContent:
        return read_checkpoint(reader)


class _Files:
    """The files of one checkpoint, verified when they are read."""

    def __init__(self, reader: CheckpointReader, manifest: Manifest) -> None:
        self._reader = reader
        self._records = manifest.files
        self._parts = manifest.parts
        self._prefix = ""
        self._verified: set[str] = set()
        self._ranks: dict[str, dict[str, Any]] | None = None

    def state(self) -> dict[str, Json]:
        record = self._records.get(STATE)
        if record is not None and record.size > LARGEST_STATE:
            raise self.damaged(STATE, f"{record.size} bytes are too many")
        state = self._json(STATE)
        match state:
            case {"parts": dict() as parts, "run": _} if sorted(parts) == sorted(self._parts):
                return state
            case _:
                raise self.damaged(STATE, "it does not hold the parts that the manifest names")

    def ranks(self) -> dict[str, dict[str, Any]]:
        """What each of several processes but the chief kept of its own, by their ranks."""
        if self._ranks is None:
            self._ranks = {} if RANKS not in self._records else self._checked_ranks(self._json(RANKS))
        return self._ranks

    def _checked_ranks(self, content: dict[str, Any]) -> dict[str, dict[str, Any]]:
        states = content.get("ranks")
        if not isinstance(states, dict):
            raise self.damaged(RANKS, "it does not say what each rank keeps")
        for rank, state in states.items():
            match state:
                case {"parts": dict(), "run": _} if _RANK.fullmatch(rank):
                    pass
                case _:
                    raise self.damaged(RANKS, f"it does not say what rank {rank} keeps")
        return states

    def of_rank(self, rank: int) -> _Files:
        """The files that one rank alone has; what is verified of them is verified for all."""
        its_files = copy(self)
        its_files._prefix = rank_prefix(rank)
        return its_files

    def tensors(self, part: str) -> tuple[Mapping[str, TensorSpec], ReadTensors]:
        """The tensors of a part: from its one file, from the shards that its index names, or none."""
        single, index = f"{self._prefix}{part}{SUFFIX}", self._prefix + index_name(part)
        if index in self._records:
            return self._sharded(index)
        if single not in self._records:
            return {}, partial(self._read, {}, {})
        file = self._file(single)
        return file.tensors, partial(self._read, {single: file}, dict.fromkeys(file.tensors, single))

    def verify(self, again: bool) -> None:
        """Verify the files that were not read yet, or all of them."""
        for file in sorted(self._records if again else set(self._records) - self._verified):
            if file.endswith(SUFFIX):
                self._file(file).read({})
            else:
                self._reader.verify(file, self._records[file])

    def _sharded(self, index: str) -> tuple[Mapping[str, TensorSpec], ReadTensors]:
        match self._json(index):
            case {"weight_map": dict() as places} if all(isinstance(file, str) for file in places.values()):
                names = {file: self._prefix + self._checked(index, file) for file in sorted(set(places.values()))}
                files = {file: self._file(name) for file, name in names.items()}
            case _:
                raise self.damaged(index, "it is not the index of a sharded file")
        held = {file: opened.tensors for file, opened in files.items()}
        missing = [name for name, file in places.items() if name not in held[file]]
        if missing:
            raise self.damaged(index, f"the shards lack {missing[0]!r}")
        return {name: held[file][name] for name, file in places.items()}, partial(self._read, files, places)

    def _read(self, files: Mapping[str, TensorFile], places: Mapping[str, str], targets: Mapping[str, Target]) -> None:
        wanted: dict[str, dict[str, Target]] = {file: {} for file in files}
        for name, target in targets.items():
            wanted[places[name]][name] = target
        for file, opened in files.items():
            opened.read(wanted[file])
            self._verified.add(opened.file)

    def _file(self, file: str) -> TensorFile:
        if file not in self._records:
            raise self.damaged(file, "it is not in the manifest")
        return TensorFile(self._reader, file, self._records[file])

    def _checked(self, index: str, file: str) -> str:
        try:
            return check_file_name(file)
        except ValueError as error:
            raise self.damaged(index, str(error)) from error

    def _json(self, file: str) -> dict[str, Any]:
        if file not in self._records:
            raise self.damaged(file, "it is not in the manifest")
        content = self._reader.read(file, self._records[file])
        self._verified.add(file)
        try:
            return parse_json_object(content)
        except ValueError as error:
            raise self.damaged(file, str(error)) from error

    def damaged(self, file: str, reason: str) -> CheckpointDamagedError:
        """The error of a file that is not as it must be."""
        return CheckpointDamagedError(self._reader.name, f"{file}: {reason}")


def index_name(part: str) -> str:
    """The name of the file that says which shard holds which tensor of a part."""
    return f"{part}{SUFFIX}.index.json"


def rank_prefix(rank: int) -> str:
    """What the names of the files begin with that one rank alone has, unless it is the chief."""
    return f"rank-{rank:05d}."


def _sizes(image: FileImage) -> dict[str, int]:
    return {tensor.spec.name: tensor.spec.nbytes for tensor in image.tensors}


def _index_of(shards: Iterable[Shard]) -> dict[str, Json]:
    places = {tensor: shard.file for shard in shards for tensor in shard.tensors}
    size = sum(nbytes for shard in shards for nbytes in shard.tensors.values())
    return {"metadata": {"total_size": size}, "weight_map": places}


def _write_small(draft: Draft, file: str, content: Json, records: dict[str, FileRecord]) -> None:
    data = _state_bytes(content)
    draft.write(file, [data])
    records[file] = FileRecord(len(data), hash_of([data]))


def _state_bytes(content: Json) -> bytes:
    data = json.dumps(content, separators=(",", ":"), allow_nan=False).encode("ascii")
    if len(data) > LARGEST_STATE:
        raise ValueError(f"what is no tensor takes {len(data)} bytes as JSON, more than {LARGEST_STATE}; use arrays")
    return data
