"""A draft into which another process writes, too."""

from __future__ import annotations

import mmap
from pathlib import Path

import pytest

from supervise_core import DirectoryStore
from supervise_core.checkpoint_format import CheckpointId


def test_another_process_finds_the_draft_by_its_location(tmp_path: Path) -> None:
    chief, other = DirectoryStore(tmp_path), DirectoryStore(tmp_path)
    chief.acquire()
    draft = chief.begin(CheckpointId(3, 0))
    draft.write("a", [b"mine"])
    aligned = memoryview(mmap.mmap(-1, 4096))  # as direct writes need it
    other.write_into(draft.location, "rank-00001.a", [aligned], 5)
    there = {path.name: path.read_bytes() for path in (tmp_path / draft.location).iterdir()}
    draft.discard()
    chief.release()
    assert there == {"a": b"mine", "rank-00001.a": bytes(5)}


@pytest.mark.parametrize("location", ["", ".", "..", ".work", "model.ckpt-0", "../elsewhere/.work/lease/draft"])
def test_what_is_no_draft_is_refused(location: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is no draft"):
        DirectoryStore(tmp_path).write_into(location, "a", [], 0)
