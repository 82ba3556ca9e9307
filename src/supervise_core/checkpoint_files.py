"""A snapshot as the files of a checkpoint, and back: what goes into which file, and what is distrusted when read."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from supervise_core.checkpoint_format import (
    CheckpointContent,
    CheckpointFormat,
    CheckpointReader,
    Draft,
    Written,
)
from supervise_core.errors import CheckpointDamagedError
from supervise_core.manifest import LARGEST_STATE, STATE, FileRecord, Manifest, check_file_name, hash_of
from supervise_core.safetensors_format import parse, parse_json_object
from supervise_core.snapshot import Part, PartImage, Snapshot
from supervise_core.tagged_json import Json, decode
from supervise_core.tensors import TensorSpec


def write_snapshot(draft: Draft, snapshot: Snapshot, run_state: Json) -> dict[str, FileRecord]:
    """Write the files of a snapshot into a draft: each part's tensors, and all else. Their sizes and hashes.

    ``run_state`` is what the core itself keeps (data positions and the like), as tagged JSON.
    """
    snapshot.finish()
    records: dict[str, FileRecord] = {}
    with ThreadPoolExecutor(1, "supervise-core hashes") as hashing:  # while the disk writes, as both let go of the GIL
        for part in snapshot.parts.values():
            for image in part.files:
                hashed = hashing.submit(hash_of, [image.content])
                draft.write_image(image)
                records[image.name] = FileRecord(image.content.nbytes, hashed.result())
            if len(part.files) > 1:
                _write_small(draft, _index_name(part.name), _index_of(part), records)
    state = {"parts": {part.name: part.state for part in snapshot.parts.values()}, "run": run_state}
    _write_small(draft, STATE, state, records)
    return records


def check_state_size(snapshot: Snapshot, run_state: Json) -> None:
    """:raises ValueError: if what is no tensor is too much for a ``state.json``."""
    _state_bytes({"parts": {part.name: part.state for part in snapshot.parts.values()}, "run": run_state})


def read_checkpoint(reader: CheckpointReader, only: str | None = None) -> CheckpointContent:
    """Read and verify a whole checkpoint, or of its parts only one.

    :raises CheckpointDamagedError: if a size, a hash or a format is wrong.
    :raises OSError: as the storage fails.
    """
    manifest = reader.manifest()
    files = _Files(reader, manifest)
    state = files.state()
    parts: dict[str, Part] = {}
    for name in manifest.parts:
        if only is not None and name != only:
            continue
        parts[name] = Part(name, state["parts"][name], files.tensors(name))
    if only is None:
        files.read_the_rest()
    try:
        for part in parts.values():
            _exhaust(part.stored_tensors())
        run_state = decode(state["run"])
    except (ValueError, TypeError, RecursionError) as error:
        raise CheckpointDamagedError(reader.name, f"{STATE}: {error}") from error
    return CheckpointContent(manifest, parts, run_state)


def verify_checkpoint(reader: CheckpointReader) -> Manifest:
    """Read everything and check it, keeping nothing.

    :raises CheckpointDamagedError: if a size, a hash or a format is wrong.
    """
    return read_checkpoint(reader).manifest


class SafetensorsFormat(CheckpointFormat):
    """The format of the core: safetensors for tensors, tagged JSON for all else."""

    def check(self, snapshot: Snapshot, run_state: Json) -> None:
        check_state_size(snapshot, run_state)

    def write(self, draft: Draft, snapshot: Snapshot, run_state: Json) -> Written:
        return Written(write_snapshot(draft, snapshot, run_state))

    def read(self, reader: CheckpointReader, only: str | None = None) -> CheckpointContent:
        return read_checkpoint(reader, only)


class _Files:
    """The files of one checkpoint, each read once and verified when it is."""

    def __init__(self, reader: CheckpointReader, manifest: Manifest) -> None:
        self._reader = reader
        self._records = manifest.files
        self._parts = manifest.parts
        self._read: set[str] = set()

    def content(self, file: str) -> bytearray:
        if file not in self._records:
            raise self._damaged(file, "it is not in the manifest")
        self._read.add(file)
        return self._reader.read(file, self._records[file])

    def state(self) -> dict[str, Json]:
        record = self._records.get(STATE)
        if record is not None and record.size > LARGEST_STATE:
            raise self._damaged(STATE, f"{record.size} bytes are too many")
        state = self._json(STATE)
        match state:
            case {"parts": dict() as parts, "run": _} if sorted(parts) == sorted(self._parts):
                return state
            case _:
                raise self._damaged(STATE, "it does not hold the parts that the manifest names")

    def tensors(self, part: str) -> dict[str, tuple[TensorSpec, memoryview]]:
        """The tensors of a part: from its one file, from the shards that its index names, or none."""
        single, index = f"{part}.safetensors", _index_name(part)
        if index in self._records:
            return self._sharded(index)
        return self._safetensors(single) if single in self._records else {}

    def read_the_rest(self) -> None:
        for file in sorted(set(self._records) - self._read):
            self.content(file)

    def _sharded(self, index: str) -> dict[str, tuple[TensorSpec, memoryview]]:
        match self._json(index):
            case {"weight_map": dict() as weight_map} if all(isinstance(file, str) for file in weight_map.values()):
                shards = {file: self._safetensors(self._checked(index, file)) for file in set(weight_map.values())}
            case _:
                raise self._damaged(index, "it is not the index of a sharded file")
        missing = [name for name, file in weight_map.items() if name not in shards[file]]
        if missing:
            raise self._damaged(index, f"the shards lack {missing[0]!r}")
        return {name: shards[file][name] for name, file in weight_map.items()}

    def _checked(self, index: str, file: str) -> str:
        try:
            return check_file_name(file)
        except ValueError as error:
            raise self._damaged(index, str(error)) from error

    def _safetensors(self, file: str) -> dict[str, tuple[TensorSpec, memoryview]]:
        try:
            return parse(self.content(file))
        except ValueError as error:
            if isinstance(error, CheckpointDamagedError):
                raise
            raise self._damaged(file, str(error)) from error

    def _json(self, file: str) -> dict[str, Any]:
        try:
            return parse_json_object(self.content(file))
        except ValueError as error:
            if isinstance(error, CheckpointDamagedError):
                raise
            raise self._damaged(file, str(error)) from error

    def _damaged(self, file: str, reason: str) -> CheckpointDamagedError:
        return CheckpointDamagedError(self._reader.name, f"{file}: {reason}")


def _index_name(part: str) -> str:
    return f"{part}.safetensors.index.json"


def _index_of(part: PartImage) -> dict[str, Json]:
    weight_map = {tensor: image.name for image in part.files for tensor in image.tensors}
    return {"metadata": {"total_size": part.tensor_bytes}, "weight_map": weight_map}


def _write_small(draft: Draft, file: str, content: Json, records: dict[str, FileRecord]) -> None:
    data = _state_bytes(content)
    draft.write(file, [data])
    records[file] = FileRecord(len(data), hash_of([data]))


def _state_bytes(content: Json) -> bytes:
    data = json.dumps(content, separators=(",", ":"), allow_nan=False).encode("ascii")
    if len(data) > LARGEST_STATE:
        raise ValueError(f"what is no tensor takes {len(data)} bytes as JSON, more than {LARGEST_STATE}; use arrays")
    return data


def _exhaust(items: Iterator[object]) -> None:
    for _ in items:
        continue
