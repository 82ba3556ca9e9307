"""One checkpoint of a ``BundleStore``: the draft that it is written into, and what it is read through."""

from __future__ import annotations

import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

from supervise_core.checkpoint_format import CheckpointId, CheckpointReader, Chunk, Draft
from supervise_core.disk import Disk, OpenDirectory
from supervise_core.errors import CheckpointDamagedError
from supervise_core.manifest import MANIFEST, FileRecord, Manifest
from supervise_tf.stored_tensors import VARIABLES

INDEX: Final = "index"
_ENDING: Final = re.compile(r"index|meta|manifest\.json|data-[0-9]{5}-of-[0-9]{5}")


def endings_of(name: str, listing: Iterable[str]) -> list[str]:
    """What the files of the checkpoint ``name`` end with, of those listed, and the index first."""
    endings = [file[len(name) + 1 :] for file in listing if file.startswith(f"{name}.")]
    return sorted((ending for ending in endings if _ENDING.fullmatch(ending)), key=lambda ending: ending != INDEX)


class DraftStore(ABC):
    """What a draft asks of the store that it is for."""

    @abstractmethod
    def write(self, draft: Path, file: str, chunks: Iterable[Chunk]) -> None:
        """Write one durable file into the draft's directory."""

    @abstractmethod
    def seal(self, path: Path) -> FileRecord:
        """Make a file durable that TensorFlow wrote; its size and hash."""

    @abstractmethod
    def commit_bundle(self, draft: BundleDraft, manifest: Manifest, replaces: CheckpointId | None) -> CheckpointId:
        """Make the draft a checkpoint."""

    @abstractmethod
    def discard(self, draft: Path) -> None:
        """Remove the draft's directory."""


class BundleDraft(Draft):
    """A directory in which the files bear their final names already: ``<name>.index`` and so on."""

    def __init__(self, store: DraftStore, checkpoint: CheckpointId, name: str, directory: Path) -> None:
        self.checkpoint = checkpoint
        self.name = name
        self.directory = directory
        self._store = store

    @property
    def prefix(self) -> Path:
        """What TensorFlow is told to write."""
        return self.directory / self.name

    def write(self, file: str, chunks: Iterable[Chunk]) -> None:
        self._store.write(self.directory, f"{self.name}.{file}", chunks)

    def seal(self) -> dict[str, FileRecord]:
        """Make durable what TensorFlow wrote at the prefix; sizes and hashes by the files' endings."""
        endings = endings_of(self.name, os.listdir(self.directory))
        return {ending: self._store.seal(self.directory / f"{self.name}.{ending}") for ending in endings}

    def commit(self, manifest: Manifest, replaces: CheckpointId | None = None) -> CheckpointId:
        self.write(MANIFEST, [manifest.to_bytes()])
        return self._store.commit_bundle(self, manifest, replaces)

    def discard(self) -> None:
        self._store.discard(self.directory)


class BundleReader(CheckpointReader):
    """The files of one checkpoint, held open, by their endings."""

    def __init__(self, logdir: Path, name: str, step: int, disk: Disk) -> None:
        """
        :raises FileNotFoundError: if there is no such checkpoint.
        :raises CheckpointDamagedError: if what bears the name of its index is no regular file.
        """
        self.name = name
        self.prefix = logdir / name
        self._step = step
        self._disk = disk
        self._directory: OpenDirectory = disk.open_directory(logdir, lambda file: bool(endings_of(name, [file])))
        if f"{name}.{INDEX}" not in self._directory.files:
            self._directory.close()
            if os.path.lexists(f"{self.prefix}.{INDEX}"):
                raise CheckpointDamagedError(name, "its index is not a file of its own")
            raise FileNotFoundError(f"there is no checkpoint {self.prefix}")

    def size(self, file: str) -> int | None:
        physical = f"{self.name}.{file}"
        return self._directory.size(physical) if physical in self._directory.files else None

    def read_into(self, file: str, at: int, buffers: Sequence[memoryview]) -> int:
        return self._disk.read_into(self._directory, f"{self.name}.{file}", at, buffers)

    def manifest(self) -> Manifest:
        """What our manifest says; of a checkpoint that TensorFlow wrote itself, what can be known."""
        if self.size(MANIFEST) is not None:
            return super().manifest()
        time = os.stat(f"{self.prefix}.{INDEX}").st_mtime
        return Manifest(step=self._step, backend="tf-graph", wall_time=time, parts=(VARIABLES,), files={})

    def close(self) -> None:
        self._directory.close()
