"""A safetensors file is read straight to where its tensors belong, whatever its layout, and verified on the way."""

from __future__ import annotations

import ctypes
import json
import os
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from supervise_core import safetensors_format, tensor_files
from supervise_core.checkpoint_files import read_checkpoint
from supervise_core.checkpoint_format import CheckpointId, CheckpointReader
from supervise_core.directory_store import DirectoryStore
from supervise_core.errors import CheckpointDamagedError, SessionStateError
from supervise_core.hashing import digest_of, hash_of
from supervise_core.manifest import FileRecord, Manifest
from supervise_core.memory import address_of
from supervise_core.snapshot_files import write_snapshot
from supervise_core.staging import Staging
from supervise_core.tagged_json import encode
from supervise_core.tensor_files import TensorFile

FILE = "model.safetensors"
GUARD = 0xA5


@dataclass
class FileInMemory(CheckpointReader):
    """A checkpoint of one file. ``after`` is called when buffers were filled, by the thread that did it."""

    content_: bytes
    after: Callable[[int, Sequence[memoryview]], object] = lambda at, buffers: None
    calls: list[tuple[int, list[int], str]] = field(default_factory=list)
    cut_at: int | None = None
    name: str = "model.ckpt-7"

    def size(self, file: str) -> int | None:
        return len(self.content_) if file == FILE else None

    def read_into(self, file: str, at: int, buffers: Sequence[memoryview]) -> int:
        self.calls.append((at, [len(buffer) for buffer in buffers], threading.current_thread().name))
        content, done = self.content_[: self.cut_at], 0
        for buffer in buffers:
            piece = content[at + done : at + done + len(buffer)]
            buffer[: len(piece)] = piece
            done += len(piece)
        self.after(at, buffers)
        return done

    def close(self) -> None:
        return None

    @property
    def record(self) -> FileRecord:
        return FileRecord(len(self.content_), hash_of_file(self.content_))

    def opened(self) -> TensorFile:
        return TensorFile(self, FILE, self.record)


def contents_of(sizes: Sequence[int]) -> dict[str, bytes]:
    """Tensors of so many bytes, no two of which begin alike."""
    return {f"t{number}": bytes((number * 37 + at) % 251 for at in range(size)) for number, size in enumerate(sizes)}


def hash_of_file(content: bytes) -> str:
    """As the format has it; for what is no such file, something."""
    length = 8 + int.from_bytes(content[:8], "little")
    try:
        ranges = [entry["data_offsets"] for entry in json.loads(content[8:length]).values()]
    except (ValueError, AttributeError):
        return hash_of([content])
    tensors = [content[length + begin : length + end] for begin, end in sorted(ranges)]
    return hash_of([content[:length], *(
        tensor if len(tensor) < tensor_files.HASHED_APART else digest_of(memoryview(tensor)) for tensor in tensors
    )])  # fmt: skip


def file_of(contents: dict[str, bytes], padding: int = 0) -> bytes:
    """A safetensors file with these tensors in this order."""
    entries: dict[str, Any] = {}
    at = 0
    for name, content in contents.items():
        entries[name] = {"dtype": "U8", "shape": [len(content)], "data_offsets": [at, at + len(content)]}
        at += len(content)
    header = json.dumps(entries).encode() + b" " * padding
    return struct.pack("<Q", len(header)) + header + b"".join(contents.values())


class Targets:
    """Where tensors are to go: each to an address between guarding bytes, or to a function that takes it."""

    def __init__(self, contents: dict[str, bytes], kinds: Sequence[str]) -> None:
        self.wanted = {name: kind for name, kind in zip(contents, kinds, strict=True) if kind != "none"}
        self.contents = contents
        room = sum(len(content) + 8 for content in contents.values()) + 8
        self.arena = bytearray([GUARD]) * room
        self.taken: list[tuple[str, bytes]] = []
        self.threads: set[int] = set()
        self.places: dict[str, int] = {}
        self.targets: dict[str, Any] = {}
        begin, at = address_of(memoryview(self.arena)), 8
        for name, kind in self.wanted.items():
            if kind == "address":
                self.places[name] = at
                self.targets[name] = begin + at
                at += len(contents[name]) + 8
            else:
                self.targets[name] = self._taker(name)

    def _taker(self, name: str) -> Callable[[memoryview], None]:
        def take(data: memoryview) -> None:
            self.taken.append((name, bytes(data)))
            self.threads.add(threading.get_ident())

        return take

    def read(self, file: TensorFile) -> None:
        """Read a file; these are alive until it is read."""
        file.read(self.targets)

    def check(self) -> None:
        expected = bytearray([GUARD]) * len(self.arena)
        for name, place in self.places.items():
            expected[place : place + len(self.contents[name])] = self.contents[name]
        assert self.arena == expected
        taken = [
            (name, self.contents[name])
            for name in self.contents
            if self.wanted.get(name) == "function" and self.contents[name]
        ]
        assert self.taken == taken, "each once, complete, in the order of the file"
        assert self.threads <= {threading.get_ident()}


def few_bytes_are_large(patch: pytest.MonkeyPatch) -> None:
    for module in (safetensors_format, tensor_files):
        patch.setattr(module, "HASHED_APART", 20)


def small_pieces(patch: pytest.MonkeyPatch, piece: int, buffers: int = 512, *, threads: bool = False) -> None:
    few_bytes_are_large(patch)
    patch.setattr(tensor_files, "_PIECE", piece)
    patch.setattr(tensor_files, "_MOST_BUFFERS", buffers)
    patch.setattr(tensor_files, "_WORTH_THREADS", 0 if threads else 1 << 60)


each_way = pytest.mark.parametrize("threads", [False, True], ids=["alone", "several threads"])

LAYOUTS: dict[str, list[int]] = {
    "one": [20],
    "one of a piece": [8],
    "a byte less than a piece": [7, 7, 7],
    "a byte more than a piece": [9, 9, 9],
    "each of a piece": [8, 8, 8],
    "tensors over several pieces": [33, 1, 40, 3],
    "many tiny ones": [1] * 50,
    "borders inside and between": [3, 5, 8, 16, 1, 2, 4, 9],
    "empty ones everywhere": [0, 8, 0, 0, 3, 0],
    "nothing but empty ones": [0, 0],
    "no tensors": [],
}


@each_way
@pytest.mark.parametrize("kinds", ["address", "function", "none", "address none", "none function address"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_placing_of_the_borders(layout: str, kinds: str, threads: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    contents = contents_of(LAYOUTS[layout])
    cycle = kinds.split()
    chosen = [cycle[number % len(cycle)] for number in range(len(contents))]
    for piece in (1, 2, 3, 7, 8, 9, 1000):
        for buffers in (1, 2, 512):
            small_pieces(monkeypatch, piece, buffers, threads=threads)
            reader, targets = FileInMemory(file_of(contents)), Targets(contents, chosen)
            file = reader.opened()
            assert {name: spec.nbytes for name, spec in file.tensors.items()} == {
                name: len(content) for name, content in contents.items()
            }
            reader.calls.clear()
            targets.read(file)
            targets.check()
            asked = sorted(reader.calls)
            assert all(sum(sizes) <= piece and len(sizes) <= buffers for _, sizes, _ in asked)
            assert sum(sum(sizes) for _, sizes, _ in asked) == sum(map(len, contents.values())), "each byte once"
            assert all((thread != threading.current_thread().name) == threads for _, _, thread in asked)


@given(
    sizes=st.lists(st.integers(0, 40), max_size=12),
    kinds=st.lists(st.sampled_from(["address", "function", "none"]), min_size=12, max_size=12),
    piece=st.integers(1, 50),
    buffers=st.integers(1, 5),
    padding=st.integers(0, 9),
    threads=st.booleans(),
    harm=st.none() | st.integers(0, 10**6),
)
def test_any_layout(
    sizes: list[int], kinds: list[str], piece: int, buffers: int, padding: int, threads: bool, harm: int | None
) -> None:
    contents = contents_of(sizes)
    whole = file_of(contents, padding)
    reader, targets = FileInMemory(whole), Targets(contents, kinds[: len(sizes)])
    with pytest.MonkeyPatch.context() as patch:
        small_pieces(patch, piece, buffers, threads=threads)
        file = reader.opened()
        data = sum(sizes)
        if harm is None or not data:
            targets.read(file)
            targets.check()
            return
        at = len(whole) - data + harm % data
        reader.content_ = whole[:at] + bytes([whole[at] ^ 1 << harm % 8]) + whole[at + 1 :]
        with pytest.raises(CheckpointDamagedError, match="does not match its hash"):
            targets.read(file)


@each_way
def test_tensors_between_that_nobody_wants_are_hashed_too(threads: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    contents = contents_of([20, 20, 20])
    small_pieces(monkeypatch, 16, threads=threads)
    whole = bytearray(file_of(contents))
    file = (reader := FileInMemory(bytes(whole))).opened()
    whole[-30] ^= 4  # in the middle one
    reader.content_ = bytes(whole)
    with pytest.raises(CheckpointDamagedError, match=r"the content of model\.safetensors does not match its hash"):
        Targets(contents, ["address", "none", "address"]).read(file)
    with pytest.raises(CheckpointDamagedError):
        file.read({})


@each_way
def test_a_file_that_is_cut_off_while_it_is_read(threads: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    contents = contents_of([20, 20, 20])
    small_pieces(monkeypatch, 16, threads=threads)
    file = (reader := FileInMemory(file_of(contents))).opened()
    for missing in (1, 16, 59, 60):
        reader.cut_at = len(reader.content_) - missing
        with pytest.raises(CheckpointDamagedError, match="was cut off while it was read"):
            Targets(contents, ["address", "function", "none"]).read(file)


@each_way
def test_an_error_of_the_disk_is_that_error(threads: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    contents = contents_of([20, 20, 20])
    small_pieces(monkeypatch, 8, threads=threads)
    file = (reader := FileInMemory(file_of(contents))).opened()
    first = len(reader.content_) - 60

    for piece in range(8):

        def fail(at: int, buffers: Sequence[memoryview], wanted: int = first + 8 * piece) -> None:
            if at == wanted:
                raise OSError(5, "Input/output error")

        reader.after = fail
        with pytest.raises(OSError, match="Input/output error"):
            Targets(contents, ["address", "function", "none"]).read(file)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("supervise-core reads")]


@each_way
def test_an_error_of_who_takes_a_tensor_is_that_error(threads: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(data: memoryview) -> None:
        raise ZeroDivisionError

    small_pieces(monkeypatch, 8, threads=threads)
    with pytest.raises(ZeroDivisionError):
        FileInMemory(file_of(contents_of([5, 20]))).opened().read({"t0": refuse})
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("supervise-core reads")]


# ---- the memory is somebody else's, too


def scribbling(targets: Targets) -> Callable[[int, Sequence[memoryview]], None]:
    """Changes a byte of the memory that was just read into, as another thread would do."""
    begin = address_of(memoryview(targets.arena))
    end = begin + len(targets.arena)

    def scribble(at: int, buffers: Sequence[memoryview]) -> None:
        for buffer in buffers:
            if begin <= address_of(buffer) < end:
                buffer[0] ^= 0xFF

    return scribble


@each_way
def test_memory_that_others_change_meanwhile_is_no_damage(threads: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    contents = contents_of([20, 20, 20])
    small_pieces(monkeypatch, 16, threads=threads)
    file = (reader := FileInMemory(file_of(contents))).opened()
    targets = Targets(contents, ["none", "address", "function"])
    reader.after = scribbling(targets)
    with pytest.raises(SessionStateError, match=r"tensors of model\.safetensors in model\.ckpt-7 were changed by"):
        targets.read(file)


def test_damage_is_damage_whatever_others_do(monkeypatch: pytest.MonkeyPatch) -> None:
    contents = contents_of([20, 20, 20])
    file = (reader := FileInMemory(file_of(contents))).opened()
    targets = Targets(contents, ["none", "address", "function"])
    reader.after = scribbling(targets)
    reader.content_ = reader.content_[:-1] + b"!"
    with pytest.raises(CheckpointDamagedError):
        targets.read(file)


def test_who_takes_a_tensor_may_do_with_it_what_he_likes() -> None:
    contents = contents_of([20, 20])

    def wipe(data: memoryview) -> None:
        ctypes.memset(address_of(data), 0, len(data))

    FileInMemory(file_of(contents)).opened().read({"t0": wipe, "t1": wipe})


# ---- headers that are not to be believed


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "too few for a safetensors header"),
        (b"1234567", "too few for a safetensors header"),
        (struct.pack("<Q", 1 << 62) + b"{}", "the header claims"),
        (struct.pack("<Q", 3) + b"{}", "the header claims 3 bytes"),
        (struct.pack("<Q", 2) + b"[]", "not an object"),
        (struct.pack("<Q", 2) + b"\xff\xff", "utf-8"),
        (struct.pack("<Q", 2) + b"{}" + b"more", "the tensors end at byte 0 of 4"),
    ],
)
def test_a_header_that_cannot_be(content: bytes, reason: str) -> None:
    with pytest.raises(CheckpointDamagedError, match=reason):
        FileInMemory(content).opened()


def test_a_file_of_another_size_is_not_even_opened() -> None:
    reader = FileInMemory(file_of(contents_of([4])))
    for size in (0, len(reader.content_) - 1, len(reader.content_) + 1):
        with pytest.raises(CheckpointDamagedError, match=f"instead of {size}"):
            TensorFile(reader, FILE, FileRecord(size, reader.record.xxh3_128))
    with pytest.raises(CheckpointDamagedError, match="is missing"):
        TensorFile(reader, "other.safetensors", reader.record)
    assert reader.calls == []


def test_a_header_that_is_swapped_for_another_good_one_is_found() -> None:
    """Two tensors of the same size that change their names are a good file, but not the one that was written."""
    contents = contents_of([6, 6])
    whole, swapped = file_of(contents), file_of(dict(zip(("t1", "t0"), contents.values(), strict=True)))
    assert len(whole) == len(swapped)
    record = FileInMemory(whole).record
    file = TensorFile(FileInMemory(swapped), FILE, record)
    with pytest.raises(CheckpointDamagedError, match="does not match its hash"):
        Targets(contents, ["address", "address"]).read(file)


# ---- a real directory


@pytest.fixture
def saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[CheckpointReader, dict[str, Any]]]:
    few_bytes_are_large(monkeypatch)
    state = {f"w{number}": np.arange(float(number * 10)) for number in range(12)}
    staging = Staging()
    staging.put("model", state)
    store = DirectoryStore(tmp_path)
    with store.writing():
        draft = store.begin(CheckpointId(1))
        files = write_snapshot(draft, staging.snapshot(), encode({})).files
        committed = draft.commit(Manifest(1, "numpy", 1.0, ("model",), files))
        with store.open(committed) as reader:
            yield reader, state


@each_way
def test_reads_that_the_system_cuts_short_are_gone_on_with(
    threads: bool, saved: tuple[CheckpointReader, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    reader, state = saved
    preadv, calls = os.preadv, []

    def short(descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        """One byte, or the first buffer and a half of the next."""
        calls.append(offset)
        first = buffers[0]
        if len(calls) % 2 or len(buffers) == 1:
            return preadv(descriptor, [first[: max(1, len(first) // 2)]], offset)
        return preadv(descriptor, [first, buffers[1][: max(1, len(buffers[1]) // 2)]], offset)

    monkeypatch.setattr(os, "preadv", short)
    small_pieces(monkeypatch, 300, threads=threads)
    live = {name: np.full_like(array, -1) for name, array in state.items()}
    restoration = read_checkpoint(reader).parts["model"].restoration(into=live)
    restoration.read()
    assert all(np.array_equal(live[name], array) for name, array in state.items())
    assert len(calls) > 50


def test_a_large_file_is_read_by_several_threads_at_once(tmp_path: Path) -> None:
    """Unpatched: two readers are in their calls at the same time."""
    content = np.arange(1 << 22, dtype=np.uint64).tobytes()  # 32 MiB
    reader = FileInMemory(file_of({"large": content}))
    together = threading.Barrier(2)
    meet = iter([True, True])

    def wait(at: int, buffers: Sequence[memoryview]) -> None:
        if next(meet, False):
            together.wait(60)

    file = reader.opened()
    reader.calls.clear()
    reader.after = wait
    found = np.zeros(1 << 22, np.uint64)
    file.read({"large": found.ctypes.data})
    assert found.tobytes() == content
    assert len({thread for *_, thread in reader.calls}) > 1 or tensor_files._READERS == 1
