"""Reading checkpoints without a session: no lease, no renames, safe beside a writer that prunes."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from supervise_core.checkpoint_files import read_checkpoint, verify_checkpoint
from supervise_core.checkpoint_format import CheckpointReader
from supervise_core.directory_store import DirectoryStore
from supervise_core.errors import CheckpointNotFoundError, IncompatibleCheckpointError, UnknownBackendError
from supervise_core.manifest import Manifest
from supervise_core.parts import Part
from supervise_core.plugins import backend_class
from supervise_core.tensors import TensorCodec


class CheckpointDirectory:
    """The checkpoints of a log directory::

    CheckpointDirectory("runs/digits").newest().load("model")
    """

    def __init__(self, logdir: str | os.PathLike[str], basename: str = "model.ckpt") -> None:
        self.path = Path(logdir)
        self._store = DirectoryStore(logdir, basename)

    def steps(self) -> list[int]:
        """The steps of the checkpoints, from the oldest to the newest."""
        return sorted({checkpoint.step for checkpoint in self._store.checkpoints()})

    def newest(self) -> SavedCheckpoint:
        """The newest one, held open.

        :raises CheckpointNotFoundError: if there is none.
        """
        return self._open(None)

    def at(self, step: int) -> SavedCheckpoint:
        """The one of that step, held open.

        :raises CheckpointNotFoundError: if there is none; lists those that are there.
        """
        return self._open(step)

    def set_aside(self) -> Mapping[str, str]:
        """The damaged ones that were set aside, and why."""
        return self._store.damaged()

    def _open(self, step: int | None) -> SavedCheckpoint:
        """A writer may remove a checkpoint between our listing it and our opening it; then we list again."""
        while True:
            there = self._store.checkpoints()
            wanted = [checkpoint for checkpoint in there if step is None or checkpoint.step == step]
            if not wanted:
                steps = ", ".join(str(checkpoint.step) for checkpoint in there) or "none"
                asked = "no checkpoint" if step is None else f"no checkpoint of step {step}"
                raise CheckpointNotFoundError(f"there is {asked} in {self.path}; there are: {steps}")
            try:
                reader = self._store.open(wanted[-1])
            except FileNotFoundError:
                continue
            return SavedCheckpoint(self.path / self._store.name_of(wanted[-1]), reader)


class SavedCheckpoint(os.PathLike[str]):
    """One checkpoint, held open: it can be read in full even when a writer removes it meanwhile.

    Also a path, for ``Supervisor(resume=...)``. It lets go of its files when it is closed or forgotten.
    """

    def __init__(self, path: Path, reader: CheckpointReader) -> None:
        self.path = path
        self._reader = reader

    def manifest(self) -> Manifest:
        """What it says of itself.

        :raises CheckpointDamagedError: if it has no good manifest.
        """
        return self._reader.manifest()

    @property
    def step(self) -> int:
        return self.manifest().step

    @property
    def metrics(self) -> Mapping[str, float]:
        return self.manifest().metrics

    def load(self, part: str, codec: TensorCodec[Any] | None = None) -> Any:
        """The state of one part as it was saved, verified; what a model's ``load_state_dict`` takes, say.

        Tensors are those of the framework that saved it; ``codec=NumpyCodec()`` makes NumPy arrays of them. A backend
        that no installed distribution announces is read as NumPy.

        :raises CheckpointNotFoundError: if it has no such part; lists those that it has.
        :raises CheckpointDamagedError: if a size, a hash or a format is wrong.
        :raises IncompatibleCheckpointError: if it holds what this codec does not know.
        :raises BackendNotInstalledError: if its framework is not installed; says what to type.
        """
        content = self._part(part)
        try:
            return content.tree(codec or _codec_of(self.manifest().backend))
        except IncompatibleCheckpointError:
            self.verify()  # headers are believed before the hashes are known: it may be damage
            raise

    def verify(self) -> None:
        """Read all of it and check every size, hash and format.

        :raises CheckpointDamagedError: if one is wrong.
        """
        verify_checkpoint(self._reader)

    def close(self) -> None:
        """Let go of the files; safe to call twice."""
        self._reader.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __fspath__(self) -> str:
        return str(self.path)

    def __repr__(self) -> str:
        return f"SavedCheckpoint({str(self.path)!r})"

    def _part(self, name: str) -> Part:
        manifest = self.manifest()
        if name not in manifest.parts:
            raise CheckpointNotFoundError(f"{self.path} has no part {name!r}; it has: {', '.join(manifest.parts)}")
        return read_checkpoint(self._reader).parts[name]


def _codec_of(backend: str) -> TensorCodec[Any] | None:
    try:
        return backend_class(backend).codec
    except UnknownBackendError:
        return None
