"""Tensors that several processes share out among them: any boxes come back from any other boxes of the same whole."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from supervise_core import Supervisor, UnsupportedStateError
from supervise_core.boxes import Box, Placed, boxed, overlaps, whole_of
from supervise_core.checkpoint_files import rank_prefix, read_checkpoint
from supervise_core.checkpoint_format import CheckpointContent, CheckpointId, CheckpointReader, Chunk, Draft
from supervise_core.errors import CheckpointDamagedError, IncompatibleCheckpointError
from supervise_core.hashing import hash_of
from supervise_core.manifest import RANKS, STATE, FileRecord, Manifest
from supervise_core.numpy_codec import NumpyCodec
from supervise_core.snapshot_files import write_snapshot
from supervise_core.staging import Staging
from supervise_core.tagged_json import encode
from supervise_core.tensor_files import TensorFile
from supervise_core.tensors import Stored, StoredTensor, TensorCodec, TensorSpec
from supervise_core.testing.stores import MemoryStore
from supervise_numpy import ArrayBackend

Array = NDArray[Any]


class Piece:
    """A box of a larger array."""

    def __init__(self, array: Array, of: Sequence[int], at: Sequence[int]) -> None:
        self.array, self.of, self.at = array, tuple(of), tuple(at)

    @classmethod
    def cut(cls, whole: Array, box: Box) -> Piece:
        everything = Box((0,) * whole.ndim, whole.shape)
        return cls(whole[(*box.within(everything), ...)].copy(), whole.shape, box.at)


class PieceCodec(TensorCodec[Any]):
    """Arrays, and pieces of them; with addresses or without."""

    def __init__(self, has_addresses: bool = True) -> None:
        self.arrays = NumpyCodec()
        self.has_addresses = has_addresses

    def recognises(self, value: Any) -> bool:
        return isinstance(value, (Piece, np.ndarray))

    def describe(self, value: Any) -> Stored:
        stored = self.arrays.describe(array_of(value))
        if not self.has_addresses:
            stored = stored._replace(address=None)
        if not isinstance(value, Piece) or value.array.shape == value.of:
            return stored
        return stored._replace(extra={**stored.extra, **boxed(value.of, value.at)})

    def copy_out(self, pairs: Sequence[tuple[Any, memoryview]]) -> None:
        self.arrays.copy_out([(array_of(value), memory) for value, memory in pairs])

    def copy_in(self, tensor: Any, data: memoryview) -> None:
        self.arrays.copy_in(array_of(tensor), data)

    def empty(self, stored: StoredTensor) -> Any:
        return self.arrays.empty(stored)

    def identity(self, value: Any) -> int:
        return id(array_of(value))


def array_of(value: Any) -> Array:
    return value.array if isinstance(value, Piece) else value


class Files(Draft):
    """Files in memory, as a worker writes them for the chief."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}

    def write(self, file: str, chunks: Iterable[Chunk]) -> None:
        self.files[file] = b"".join(bytes(chunk) for chunk in chunks)

    def commit(self, manifest: Manifest, replaces: CheckpointId | None = None) -> CheckpointId:
        raise NotImplementedError

    def discard(self) -> None:
        raise NotImplementedError


def saved_by(states: Sequence[Any], lost: Sequence[int] = (), shard_bytes: int = 10**9) -> CheckpointReader:
    """A checkpoint of several ranks, each with a state of its own; without what the lost ones had."""
    shares: list[dict[str, bytes]] = []
    for state in states:
        staging, files = Staging(shard_bytes), Files()
        staging.put("model", state, PieceCodec(), per_rank=True)
        write_snapshot(files, staging.snapshot(), encode({}))
        shares.append(files.files)
    ranks = {str(rank): json.loads(share[STATE]) for rank, share in enumerate(shares) if rank and rank not in lost}
    content = dict(shares[0])
    if len(states) > 1:
        content[RANKS] = json.dumps({"ranks": ranks}).encode()
        for rank in map(int, ranks):
            content |= {rank_prefix(rank) + name: data for name, data in shares[rank].items() if name != STATE}
    store = MemoryStore()
    with store.writing():
        draft = store.begin(CheckpointId(1))
        for name, data in content.items():
            draft.write(name, [data])
        records = {name: FileRecord(len(data), hash_of([data])) for name, data in content.items()}
        return store.open(draft.commit(Manifest(1, "numpy", 1.0, ("model",), records)))


def cuts(shape: Sequence[int], counts: Sequence[int]) -> list[Box]:
    """The boxes of a grid, some of which may be empty, as those that are cut into equal pieces, but for the last."""
    sides = [
        [(min(k * math.ceil(side / n), side), min((k + 1) * math.ceil(side / n), side)) for k in range(n)]
        for side, n in zip(shape, counts, strict=True)
    ]
    return [Box(tuple(a for a, _ in box), tuple(b - a for a, b in box)) for box in product(*sides)]


WHOLES = st.lists(st.integers(0, 6), max_size=3).flatmap(
    lambda shape: st.tuples(
        st.just(tuple(shape)),
        st.sampled_from(["u1", "f4", "f8", "c16", ">i4", "M8[us]"]),
        *(st.tuples(*(st.integers(1, 4) for _ in shape)) for _ in range(2)),
    )
)


def random_whole(shape: tuple[int, ...], dtype: str) -> Array:
    count = math.prod(shape)
    return np.random.default_rng(count).integers(1, 250, count).astype(dtype).reshape(shape)


@settings(max_examples=150, deadline=None)
@given(WHOLES, st.booleans(), st.integers(0, 5))
def test_any_boxes_come_back_from_any_others(
    drawn: tuple[tuple[int, ...], str, tuple[int, ...], tuple[int, ...]], has_addresses: bool, copies: int
) -> None:
    shape, dtype, there, here = drawn
    whole = random_whole(shape, dtype)
    boxes = cuts(shape, there)
    boxes += boxes[:copies]  # some are kept by more than one rank
    reader = saved_by([{"w": Piece.cut(whole, box), "step": rank} for rank, box in enumerate(boxes)])
    content = read_checkpoint(reader)
    codec = PieceCodec(has_addresses)
    for rank, box in enumerate(cuts(shape, here)):
        mine = Piece(np.zeros(box.shape, whole.dtype), shape, box.at)
        restoration = content.of_rank(rank).parts["model"].restoration(codec, {"w": mine})
        restoration.read()
        assert restoration.tree["w"] is mine
        assert restoration.is_in_place
        assert mine.array.tobytes() == Piece.cut(whole, box).array.tobytes()
    content.verify_the_rest()
    found = content.parts["model"].tree(codec)["w"]
    assert (found.dtype, found.shape, found.tobytes()) == (whole.dtype, whole.shape, whole.tobytes())
    held = content.parts["model"].held().tree(codec)["w"]
    assert held.tobytes() == whole.tobytes()


@settings(deadline=None)
@given(WHOLES)
def test_overlaps_fill_each_element_once(drawn: tuple[tuple[int, ...], str, tuple[int, ...], tuple[int, ...]]) -> None:
    shape, _, there, here = drawn
    boxes = cuts(shape, there)
    for wanted in cuts(shape, here):
        filled = np.zeros(shape, int)
        everything = Box((0,) * len(shape), tuple(shape))
        for number, common in overlaps(wanted, boxes):
            assert common.meet(boxes[number]) == common.meet(wanted) == common
            filled[common.within(everything)] += 1
        expected = np.zeros(shape, int)
        expected[wanted.within(everything)] = 1 if wanted.size else 0
        assert (filled == expected).all()


def test_what_is_not_complete_is_refused() -> None:
    whole = np.arange(8.0)
    boxes = cuts((8,), (4,))
    reader = saved_by([{"w": Piece.cut(whole, box)} for box in boxes], lost=[2])
    part = read_checkpoint(reader).parts["model"]
    with pytest.raises(IncompatibleCheckpointError, match="'w' is not complete: 6 elements are there for the 8"):
        part.tree(PieceCodec())
    mine = Piece.cut(np.zeros(8), boxes[3])
    read_checkpoint(reader).of_rank(3).parts["model"].restoration(PieceCodec(), {"w": mine}).read()
    assert mine.array.tolist() == [6, 7]


def test_only_the_files_that_are_needed_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    files: list[str] = []
    read = TensorFile.read

    def noting(self: TensorFile, targets: Any) -> None:
        files.append(self.file)
        read(self, targets)

    monkeypatch.setattr(TensorFile, "read", noting)
    whole = np.arange(12.0)
    reader = saved_by([{"w": Piece.cut(whole, box), "own": np.zeros(1)} for box in cuts((12,), (4,))])

    def read_by(rank: int, ranks: int) -> list[str]:
        files.clear()
        mine = Piece(np.zeros(12 // ranks), (12,), (rank * 12 // ranks,))
        into = {"w": mine, "own": np.ones(1)}
        read_checkpoint(reader).of_rank(rank).parts["model"].restoration(PieceCodec(), into).read()
        return sorted(files)

    assert read_by(2, 4) == ["rank-00002.model.safetensors"]
    assert read_by(1, 2) == ["model.safetensors", "rank-00002.model.safetensors", "rank-00003.model.safetensors"]
    assert read_by(5, 6) == ["model.safetensors", "rank-00003.model.safetensors"]


def test_what_is_no_piece_comes_from_the_own_rank_or_from_the_chief() -> None:
    whole = np.arange(4.0)
    reader = saved_by(
        [{"w": Piece.cut(whole, box), "own": np.array([float(rank)])} for rank, box in enumerate(cuts((4,), (2,)))]
    )
    content = read_checkpoint(reader)

    part = content.of_rank(1).parts["model"]
    restoration = part.restoration(PieceCodec(), {"w": Piece.cut(whole, Box((2,), (2,)))})
    restoration.read()
    assert restoration.tree["own"].tolist() == [1.0]
    restoration = part.restoration(PieceCodec(), {"w": Piece.cut(whole, Box((1,), (2,)))})
    restoration.read()
    assert restoration.tree["own"].tolist() == [0.0]
    assert restoration.tree["w"].array.tolist() == [1.0, 2.0]


def test_damage_in_the_file_of_another_rank_is_noticed() -> None:
    whole = np.arange(2000.0)
    reader = saved_by([{"w": Piece.cut(whole, box)} for box in cuts((2000,), (2,))])
    good = read_checkpoint(reader)

    class Flipped(CheckpointReader):
        name = reader.name

        def size(self, file: str) -> int | None:
            return reader.size(file)

        def read_into(self, file: str, at: int, buffers: Sequence[memoryview]) -> int:
            count = reader.read_into(file, at, buffers)
            if file.startswith("rank-00001.model.saf") and at >= 4096:
                buffers[0][0] ^= 1
            return count

        def close(self) -> None:
            reader.close()

    good.parts["model"].tree(PieceCodec())
    with pytest.raises(CheckpointDamagedError, match="rank-00001"):
        read_checkpoint(Flipped()).parts["model"].tree(PieceCodec())


def test_ranks_that_differ_in_the_whole_are_refused() -> None:
    reader = saved_by([{"w": Piece(np.zeros(2), (4,), (0,))}, {"w": Piece(np.zeros(2), (5,), (2,))}])
    with pytest.raises(IncompatibleCheckpointError, match="differ in its shape or dtype"):
        read_checkpoint(reader).parts["model"].tree(PieceCodec())


def test_another_whole_here_is_left_alone_and_given_as_it_was() -> None:
    whole = np.arange(4.0)
    reader = saved_by([{"w": Piece.cut(whole, box)} for box in cuts((4,), (2,))])
    mine = Piece(np.zeros(3), (6,), (0,))
    restoration = read_checkpoint(reader).parts["model"].restoration(PieceCodec(), {"w": mine})
    restoration.read()
    assert restoration.tree["w"].tolist() == whole.tolist()
    assert not mine.array.any()


def test_several_files_of_a_rank() -> None:
    whole = {name: np.random.default_rng(n).normal(size=(6, 4)) for n, name in enumerate("abc")}
    reader = saved_by(
        [{name: Piece.cut(array, box) for name, array in whole.items()} for box in cuts((6, 4), (3, 1))], shard_bytes=80
    )
    assert reader.size("rank-00002.model-00003-of-00003.safetensors") is not None
    found = read_checkpoint(reader).parts["model"].tree(PieceCodec())
    assert all(found[name].tobytes() == array.tobytes() for name, array in whole.items())


@pytest.mark.parametrize(
    "extra",
    [
        {"box": 1}, {"box": {}}, {"box": {"of": [4], "at": [-1]}}, {"box": {"of": [4], "at": [3]}},
        {"box": {"of": [4, 4], "at": [0]}}, {"box": {"of": 4, "at": 0}}, {"box": {"of": [4], "at": [True]}},
        {"shape": [5]}, {"shape": "x"},
    ],
)  # fmt: skip
def test_a_box_that_makes_no_sense_is_refused(extra: Any) -> None:
    with pytest.raises(ValueError, match=r"box|shape"):
        Placed.of(StoredTensor(TensorSpec("w", "F32", (2,)), extra))


def test_the_whole_of_a_tensor_stored_as_bytes() -> None:
    piece = StoredTensor(
        TensorSpec("w", "U8", (32,)),
        {"dtype": "complex128", "shape": [2, 1], "strides": [1, 1], "box": {"of": [2, 3], "at": [0, 1]}},
    )
    assert Placed.of(piece).itemsize == 16
    assert whole_of(piece) == StoredTensor(TensorSpec("w", "U8", (96,)), {"dtype": "complex128", "shape": [2, 3]})


def test_pieces_must_be_put_as_each_ranks_own() -> None:
    with pytest.raises(UnsupportedStateError, match=r"model: w .*per_rank=True"):
        Staging().put("model", {"w": Piece(np.zeros(2), (4,), (0,))}, PieceCodec())


class Alone(ArrayBackend):
    """Keeps a piece of something, and knows of nobody who has the rest."""

    def snapshot(self, session: Any, staging: Staging) -> Any:
        staging.put("piece", {"w": Piece(np.zeros(2), (4,), (0,))}, PieceCodec(), per_rank=True)
        return super().snapshot(session, staging)


def test_a_run_that_has_only_pieces_does_not_begin(tmp_path: Any) -> None:
    sv = Supervisor(Alone({"w": np.zeros(1)}), tmp_path, signals=False)
    with pytest.raises(UnsupportedStateError, match=r"piece .*membership="), sv.managed_session():
        pass
    assert not list(tmp_path.glob("model.ckpt-*"))


def test_of_all_ranks() -> None:
    content: CheckpointContent = read_checkpoint(saved_by([{"n": rank} for rank in range(12)]))
    assert [part.tree()["n"] for part in content.parts["model"].of_all_ranks()] == list(range(12))
    assert [part.tree()["n"] for part in content.of_rank(30).parts["model"].of_all_ranks()] == list(range(12))
    alone = read_checkpoint(saved_by([{"n": 5}])).parts["model"]
    assert [part.tree() for part in alone.of_all_ranks()] == [{"n": 5}]
