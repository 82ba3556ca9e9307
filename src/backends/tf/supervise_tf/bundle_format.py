"""Checkpoints as TensorFlow keeps them: a bundle with a meta graph, and beside it the manifest with the hashes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from supervise_core.checkpoint_format import (
    Base,
    CheckpointContent,
    CheckpointFormat,
    CheckpointReader,
    Draft,
    SnapshotWriter,
    Written,
)
from supervise_core.errors import CheckpointDamagedError, UnsupportedStateError
from supervise_core.hashing import hash_of
from supervise_core.manifest import FileRecord
from supervise_core.numpy_codec import NumpyCodec
from supervise_core.parts import Part, Target
from supervise_core.snapshot import PartImage, Snapshot
from supervise_core.tagged_json import Json, decode
from supervise_core.tensors import StoredTensor, TensorCodec
from supervise_tf.bundle import BundleWriter, check_bundle, read_bundle
from supervise_tf.bundle_files import BundleDraft, BundleReader
from supervise_tf.stored_tensors import VARIABLES, from_tree, to_tree

META: Final = "meta"


@dataclass(frozen=True, slots=True)
class BundlePart(Part):
    """The variables of a verified bundle, left where they are: TensorFlow reads them itself."""

    prefix: Path = Path()

    def tree(self, codec: TensorCodec[Any] | None = None) -> Any:
        return to_tree({(name, ""): array for name, array in read_bundle(self.prefix).items()})


class BundleFormat(CheckpointFormat):
    """What the files of a ``BundleStore`` look like. ``meta_graph`` is written beside each bundle, if there is one."""

    def __init__(self, meta_graph: bytes | None = None) -> None:
        self._meta_graph = meta_graph
        self._writer = BundleWriter()

    def check(self, snapshot: Snapshot, run_state: Json) -> None:
        if VARIABLES not in snapshot.parts:
            raise UnsupportedStateError(
                "the model", "TensorFlow's checkpoints hold variables of a graph, and it has none"
            )
        if others := [part.name for part in snapshot.parts.values() if part.files and part.name != VARIABLES]:
            raise UnsupportedStateError(
                others[0], "TensorFlow's checkpoints have no place for tensors outside the graph"
            )

    def writer(self, draft: Draft, base: Base | None = None) -> SnapshotWriter:
        assert isinstance(draft, BundleDraft), "a BundleFormat writes into the drafts of a BundleStore"
        return _BundleSnapshot(self, draft)

    def write(self, draft: BundleDraft, snapshot: Snapshot, run_state: Json) -> Written:
        """Write all of a snapshot into a draft.

        :raises OSError: as the storage fails.
        """
        self.check(snapshot, run_state)
        snapshot.finish()
        self._writer.write(draft.prefix, from_tree(_views_of(snapshot.parts[VARIABLES])))
        files = draft.seal()
        if self._meta_graph is not None:
            draft.write(META, [self._meta_graph])
            files[META] = FileRecord(len(self._meta_graph), hash_of([self._meta_graph]))
        states = {part.name: part.state for part in snapshot.parts.values() if part.name != VARIABLES}
        return Written(files, {"parts": states, "run": run_state})

    def read(self, reader: CheckpointReader) -> CheckpointContent:
        assert isinstance(reader, BundleReader), "a BundleFormat reads the checkpoints of a BundleStore"
        manifest = reader.manifest()
        for file, record in manifest.files.items():
            reader.verify(file, record)
        if not manifest.files:
            check_bundle(reader.prefix)
        parts: dict[str, Part] = {VARIABLES: BundlePart(VARIABLES, {}, {}, _nothing, prefix=reader.prefix)}
        match manifest.run:
            case {"parts": dict() as states, "run": run_state}:
                parts |= {name: Part(name, state, {}, _nothing) for name, state in states.items()}
            case {}:
                run_state = {}
            case _:
                raise CheckpointDamagedError(reader.name, "the manifest does not hold what a bundle's manifest holds")
        try:
            return CheckpointContent(manifest, parts, decode(run_state))
        except (ValueError, TypeError) as error:
            raise CheckpointDamagedError(reader.name, f"the manifest's state of the run: {error}") from error


def _nothing(_: Mapping[str, Target]) -> None:
    """TensorFlow reads the variables itself, and there are no other tensors."""


class _BundleSnapshot(SnapshotWriter):
    """Writes one bundle as a whole, as TensorFlow does."""

    def __init__(self, bundles: BundleFormat, draft: BundleDraft) -> None:
        self._bundles = bundles
        self._draft = draft

    def write(self, snapshot: Snapshot, run_state: Json) -> Written:
        return self._bundles.write(self._draft, snapshot, run_state)


class _Views(NumpyCodec):
    """Arrays that look at a snapshot instead of copying it."""

    def __init__(self, part: PartImage) -> None:
        self._images = {tensor.spec.name: tensor for file in part.files for tensor in file.tensors}

    def empty(self, stored: StoredTensor) -> NDArray[Any]:
        dtype, shape = self.dtype_and_shape(stored)
        if not stored.spec.nbytes:
            return np.empty(shape, dtype)
        return np.frombuffer(self._images[stored.spec.name].content(), dtype).reshape(shape)


def _views_of(part: PartImage) -> Any:
    specs = {tensor.spec.name: tensor.spec for file in part.files for tensor in file.tensors}
    return Part(part.name, part.state, specs, _nothing).restoration(_Views(part)).tree
