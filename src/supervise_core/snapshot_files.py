"""A snapshot as the files of a checkpoint: what goes into which file, hashed while it is written."""

from __future__ import annotations

import json
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

from supervise_core.checkpoint_format import Base, Draft, PlacedPart, Shard, SnapshotWriter, Written
from supervise_core.hashing import TensorFileHash, hash_of
from supervise_core.manifest import LARGEST_STATE, STATE, FileRecord
from supervise_core.memory import in_blocks
from supervise_core.safetensors_format import Layout
from supervise_core.sharing import Placement, place
from supervise_core.snapshot import FileImage, PartImage, Snapshot, index_name
from supervise_core.tagged_json import Json


class SnapshotFiles(SnapshotWriter):
    """Writes each part's tensors as safetensors, and all else as tagged JSON.

    What did not change since ``base``, the checkpoint before this one, is shared with it. A thread of its own puts
    files together and hashes them meanwhile.
    """

    def __init__(self, draft: Draft, base: Base | None = None) -> None:
        self._draft = draft
        self._base = base
        self._helper = ThreadPoolExecutor(1, "supervise-core hashes")
        self._helped = 0.0
        self._placements: dict[str, Placement] = {}
        self._records: dict[str, Callable[[], FileRecord]] = {}
        """Of the tensor files that are written, by their names: each waits for the hash."""

    def close(self) -> None:
        self._helper.shutdown(cancel_futures=True)

    def write_early(self, part: PartImage, taken: threading.Event) -> None:
        for file in self._place(part).files:
            if file.blocks is not None:  # others have to be put together first, which takes a processor
                self._write_whole(file, file.blocks, part.digests, taken)

    def write(self, snapshot: Snapshot, run_state: Json) -> Written:
        snapshot.finish()
        for part in snapshot.parts.values():
            digests = {} if snapshot.is_live else part.digests
            for file in self._place(part).files:
                if file.name in self._records:
                    continue
                if file.blocks is not None:
                    self._write_whole(file, file.blocks, digests)
                else:
                    self._write_gathered(file, digests)
        records: dict[str, FileRecord] = {}
        placed: dict[str, PlacedPart] = {}
        for part in snapshot.parts.values():
            placement = self._placements[part.name]
            written = [Shard(file.name, self._records[file.name](), _sizes(file)) for file in placement.files]
            shards = [*placement.linked, *written]
            records |= {shard.file: shard.record for shard in shards}
            placed[part.name] = PlacedPart(shards, part.number)
            if len(shards) > 1:
                self._write_small(index_name(part.name), _index_of(shards), records)
        self._write_small(STATE, _state_of(snapshot, run_state), records)
        return Written(records, placed=placed, helped=self._helped)

    def _place(self, part: PartImage) -> Placement:
        if part.name not in self._placements:
            self._placements[part.name] = place(self._draft, part, self._base)
        return self._placements[part.name]

    def _write_whole(
        self, image: FileImage, blocks: memoryview, digests: dict[str, bytes], taken: threading.Event | None = None
    ) -> None:
        """Write a file that lies ready. It is hashed meanwhile, or once the snapshot is taken."""
        hashing = _ImageHash(image.layout, digests)

        def hashed() -> None:
            if taken is not None:
                taken.wait()
            self._feed(hashing, blocks)

        done = self._helper.submit(hashed)

        def record() -> FileRecord:
            done.result()
            return FileRecord(image.size, hashing.hexdigest())

        self._draft.write_blocks(image.name, [blocks], image.size)
        self._records[image.name] = record

    def _write_gathered(self, image: FileImage, digests: dict[str, bytes]) -> None:
        """Write a file whose tensors lie anywhere."""
        hashing = _ImageHash(image.layout, digests)
        self._draft.write_blocks(image.name, self._gathered(image, hashing), image.size)
        record = FileRecord(image.size, hashing.hexdigest())
        self._records[image.name] = lambda: record

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
        self._helped += time.thread_time() - began
        if piece is not None:
            self._feed(hashing, piece)
        return piece

    def _feed(self, hashing: _ImageHash, piece: memoryview) -> None:
        began = time.thread_time()
        hashing.feed(piece)
        self._helped += time.thread_time() - began

    def _write_small(self, file: str, content: Json, records: dict[str, FileRecord]) -> None:
        data = _state_bytes(content)
        self._draft.write(file, [data])
        records[file] = FileRecord(len(data), hash_of([data]))


def write_snapshot(draft: Draft, snapshot: Snapshot, run_state: Json, base: Base | None = None) -> Written:
    """Write the files of a snapshot into a draft; see ``SnapshotFiles``.

    ``run_state`` is what the core itself keeps (data positions and the like), as tagged JSON.
    """
    files = SnapshotFiles(draft, base)
    try:
        return files.write(snapshot, run_state)
    finally:
        files.close()


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


def _sizes(image: FileImage) -> dict[str, int]:
    return {tensor.spec.name: tensor.spec.nbytes for tensor in image.tensors}


def _index_of(shards: Iterable[Shard]) -> dict[str, Json]:
    places = {tensor: shard.file for shard in shards for tensor in shard.tensors}
    size = sum(nbytes for shard in shards for nbytes in shard.tensors.values())
    return {"metadata": {"total_size": size}, "weight_map": places}


def _state_bytes(content: Json) -> bytes:
    data = json.dumps(content, separators=(",", ":"), allow_nan=False).encode("ascii")
    if len(data) > LARGEST_STATE:
        raise ValueError(f"what is no tensor takes {len(data)} bytes as JSON, more than {LARGEST_STATE}; use arrays")
    return data
