"""The file ``checkpoint``, from which TensorFlow's tools learn which checkpoint is the newest.

For us it is a courtesy: the listing is the index. But where somebody edited it to go back to an older checkpoint, that
is a wish to be obeyed. What we wrote ourselves is known by its hash, so that an old state file that a crash left behind
is not taken for a wish.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import tensorflow as tf
from google.protobuf import text_format

from supervise_core.disk import Disk
from supervise_core.durable_files import write_file
from supervise_core.hashing import hash_of

STATE_FILE: Final = "checkpoint"
_RECORD: Final = "checkpoint-state.json"


class StateFile:
    """The state file of one log directory; all names in it are relative."""

    def __init__(self, logdir: Path, disk: Disk) -> None:
        self._path = logdir / STATE_FILE
        self._record = logdir / ".work" / _RECORD
        self._disk = disk

    def newest(self) -> str | None:
        """The name that it calls the newest, without any directory; None if it is not there.

        :raises ValueError: if it cannot be understood.
        """
        content = self._content()
        if content is None:
            return None
        state = _empty_state()
        try:
            text_format.Parse(content.decode(), state)
        except (text_format.ParseError, UnicodeDecodeError) as error:
            raise ValueError(f"{self._path} is no checkpoint state: {error}") from error
        return os.path.basename(state.model_checkpoint_path) or None

    def named_paths(self) -> list[Path]:
        """Where what it calls the newest may be: beside it, or where it says."""
        name = self.newest()
        if name is None:
            return []
        state = _empty_state()
        text_format.Parse((self._content() or b"").decode(), state)
        return [self._path.parent / name, self._path.parent / state.model_checkpoint_path]

    def exists(self) -> bool:
        """Whether there is one."""
        return os.path.lexists(self._path)

    def says(self, name: str | None) -> bool:
        """Whether it can be understood, and calls this one the newest; None: whether it names none."""
        try:
            return self.newest() == name
        except ValueError:
            return False

    def is_ours(self) -> bool:
        """Whether it is as we wrote it, and so says nothing that the listing does not."""
        content = self._content()
        return content is not None and hash_of([content]) in self._known()

    def write(self, names: Sequence[str], newest: str, scratch: Path) -> None:
        """Write it anew, by way of the directory ``scratch``; ``names`` from the oldest to the newest."""
        state = _empty_state()
        state.model_checkpoint_path = newest
        state.all_model_checkpoint_paths.extend(names)
        content = text_format.MessageToString(state).encode()
        before = self._content()
        known = [hash_of([content]), *([] if before is None or not self.is_ours() else [hash_of([before])])]
        self._replace(self._record, json.dumps(known).encode(), scratch / _RECORD)
        self._replace(self._path, content, scratch / STATE_FILE)

    def remove(self) -> None:
        """Remove it: there is nothing left that it could name."""
        if os.path.lexists(self._path):
            self._disk.remove_file(self._path)
            self._disk.sync_directory(self._path.parent)

    def _replace(self, path: Path, content: bytes, scratch: Path) -> None:
        write_file(self._disk, scratch, [content])
        self._disk.rename(scratch, path)
        self._disk.sync_directory(path.parent)

    def _content(self) -> bytes | None:
        try:
            return self._path.read_bytes()
        except FileNotFoundError:
            return None

    def _known(self) -> list[str]:
        try:
            known = json.loads(self._record.read_bytes())
        except (OSError, ValueError):
            return []
        return known if isinstance(known, list) else []


def _empty_state() -> Any:
    """TensorFlow has no public name for the class of its checkpoint states."""
    state = tf.compat.v1.train.generate_checkpoint_state_proto("/", "/", ["/"])
    state.Clear()
    return state
