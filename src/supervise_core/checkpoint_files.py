"""The files of a checkpoint, read back: what is where, and what is distrusted until it is verified."""

from __future__ import annotations

import re
from collections.abc import Mapping
from copy import copy
from dataclasses import replace
from functools import cache, partial
from typing import Any, Final

from supervise_core.checkpoint_format import (
    Base,
    CheckpointContent,
    CheckpointFormat,
    CheckpointReader,
    Draft,
    SnapshotWriter,
)
from supervise_core.errors import CheckpointDamagedError
from supervise_core.manifest import LARGEST_STATE, RANKS, STATE, Manifest, check_file_name
from supervise_core.memory import no_collection
from supervise_core.parts import Part, ReadTensors, Target
from supervise_core.safetensors_format import SUFFIX, parse_json_object
from supervise_core.snapshot import Snapshot, index_name
from supervise_core.snapshot_files import SnapshotFiles, check_state_size
from supervise_core.tagged_json import Json, decode
from supervise_core.tensor_files import TensorFile
from supervise_core.tensors import TensorSpec

_RANK: Final = re.compile(r"[1-9]\d{0,8}")


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

    def writer(self, draft: Draft, base: Base | None = None) -> SnapshotWriter:
        return SnapshotFiles(draft, base)

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
        return file.tensors, partial(self._read_whole, file)

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
            self._read_whole(opened, wanted[file])

    def _read_whole(self, file: TensorFile, targets: Mapping[str, Target]) -> None:
        file.read(targets)
        self._verified.add(file.file)

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


def rank_prefix(rank: int) -> str:
    """What the names of the files begin with that one rank alone has, unless it is the chief."""
    return f"rank-{rank:05d}."
