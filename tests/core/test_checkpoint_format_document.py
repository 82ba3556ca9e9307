"""A second reader, written from docs/checkpoint-format.md alone: it imports nothing of the project."""

from __future__ import annotations

import base64
import json
import math
import multiprocessing
import os
import re
import struct
from collections import Counter, OrderedDict, defaultdict, deque
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash

from core.test_boxes import Piece, PieceCodec
from supervise_core import EverySteps, FileMembership, KeepAll, Supervisor
from supervise_core.staging import Staging
from supervise_numpy import ArrayBackend

NUMBERS = {"BOOL": "?", "U8": "u1", "I8": "i1", "I16": "i2", "U16": "u2", "F16": "f2", "I32": "i4", "U32": "u4",
           "F32": "f4", "I64": "i8", "U64": "u8", "F64": "f8", "C64": "c8"}  # fmt: skip
FACTORIES = {"list": list, "dict": dict, "set": set, "int": int, "float": float, "none": None}


def hash_of_file(name: str, content: bytes) -> str:
    if not name.endswith(".safetensors"):
        return xxhash.xxh3_128_hexdigest(content)
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    ranges = sorted(entry["data_offsets"] for name, entry in header.items() if name != "__metadata__")
    counted = content[: 8 + length]
    for begin, end in ranges:
        tensor = content[8 + length + begin : 8 + length + end]
        counted += tensor if len(tensor) < 1_048_576 else xxhash.xxh3_128_digest(tensor)
    return xxhash.xxh3_128_hexdigest(counted)


class Reader:
    """One checkpoint directory, verified and read as the document says."""

    def __init__(self, path: Path) -> None:
        self.path = path
        text = (path / "manifest.json").read_bytes()
        self.manifest = json.loads(text)
        own = self.manifest.pop("xxh3_128")
        without = json.dumps(self.manifest, indent=1, sort_keys=True).encode("ascii") + b"\n"
        assert xxhash.xxh3_128_hexdigest(without) == own
        assert self.manifest["format_version"] == 1
        match = re.fullmatch(r"model\.ckpt-(0|[1-9]\d*)(\.[1-9]\d*)?", path.name)
        assert match is not None
        assert int(match[1]) == self.manifest["step"]
        for name, record in self.manifest["files"].items():
            content = (path / name).read_bytes()
            assert len(content) == record["size"]
            assert hash_of_file(name, content) == record["xxh3_128"]
        self.state = json.loads((path / "state.json").read_bytes())
        assert sorted(self.state["parts"]) == sorted(self.manifest["parts"])
        self.ranks = {"0": self.state}
        if (path / "ranks.json").exists():
            self.ranks |= json.loads((path / "ranks.json").read_bytes())["ranks"]
            assert len(self.ranks) == self.run()["ranks"]

    def part(self, name: str, rank: int = 0) -> Any:
        if rank and name in self.state.get("per_rank", []):
            return self._tree(self.ranks[str(rank)]["parts"][name], self._tensors(name, f"rank-{rank:05d}."))
        return self._tree(self.state["parts"][name], self._tensors(name))

    def run(self, rank: int = 0) -> Any:
        return self._tree(self.ranks[str(rank)]["run"], {})

    def whole(self, part: str) -> Any:
        """A part with its tensors put together from those of all ranks."""
        assert part in self.state["per_rank"]
        pieces: dict[str, list[tuple[Any, Any]]] = {}
        for rank, state in self.ranks.items():
            tensors = self._tensors(part, "" if rank == "0" else f"rank-{int(rank):05d}.")
            for node in leaves(state["parts"][part]):
                tensor = tensors[node["$tensor"]]
                if "dtype" in node:
                    tensor = tensor.view(node["dtype"]).reshape(node["shape"])
                pieces.setdefault(node["$tensor"], []).append((node.get("box"), tensor))
        tensors = {name: assembled(found) for name, found in pieces.items()}
        return self._tree(without_boxes(self.state["parts"][part]), tensors)

    def _tensors(self, part: str, prefix: str = "") -> dict[str, Any]:
        index = self.path / f"{prefix}{part}.safetensors.index.json"
        if index.exists():
            document = json.loads(index.read_bytes())
            files = {file: self._file(prefix + file) for file in set(document["weight_map"].values())}
            tensors = {name: files[file][name] for name, file in document["weight_map"].items()}
            assert sum(tensor.nbytes for tensor in tensors.values()) == document["metadata"]["total_size"]
            self._check_order(document["weight_map"], files)
            return tensors
        single = f"{prefix}{part}.safetensors"
        return self._file(single) if (self.path / single).exists() else {}

    @staticmethod
    def _check_order(places: dict[str, str], files: dict[str, dict[str, Any]]) -> None:
        for name, place in places.items():
            assert place == max(file for file, tensors in files.items() if name in tensors)

    def _file(self, name: str) -> dict[str, Any]:
        content = (self.path / name).read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        assert (8 + length) % 4096 == 0
        header = json.loads(content[8 : 8 + length])
        assert header.pop("__metadata__") == {"format": "pt"}
        data = content[8 + length :]
        return {
            tensor: np.frombuffer(data[slice(*entry["data_offsets"])], NUMBERS[entry["dtype"]]).reshape(entry["shape"])
            for tensor, entry in header.items()
        }

    def _tree(self, node: Any, tensors: dict[str, Any]) -> Any:
        def tree(node: Any) -> Any:
            if isinstance(node, list):
                return [tree(item) for item in node]
            if not isinstance(node, dict):
                return node
            tag = next(iter(node), "")
            if not tag.startswith("$"):
                return {key: tree(value) for key, value in node.items()}
            content = node[tag]
            match tag:
                case "$tensor" | "$array":
                    tensor = tensors[content]
                    return tensor.view(node["dtype"]).reshape(node["shape"]) if "dtype" in node else tensor
                case "$int":
                    return int(content, 16)
                case "$float":
                    return float(content)
                case "$complex":
                    return complex(*(tree(part) for part in content))
                case "$tuple":
                    return tuple(tree(item) for item in content)
                case "$set":
                    return {tree(item) for item in content}
                case "$frozenset":
                    return frozenset(tree(item) for item in content)
                case "$bytes":
                    return base64.b64decode(content)
                case "$bytearray":
                    return bytearray(base64.b64decode(content))
                case "$dict":
                    return dict(pairs(content))
                case "$OrderedDict":
                    return OrderedDict(pairs(content))
                case "$Counter":
                    return Counter(dict(pairs(content)))
                case "$defaultdict":
                    return defaultdict(FACTORIES[content[0]], pairs(content[1]))
                case "$deque":
                    return deque((tree(item) for item in content[0]), content[1])
                case "$numpy":
                    return np.frombuffer(base64.b64decode(content[1]), content[0])[0]
            raise AssertionError(f"the document does not tell of {tag}")

        def pairs(listed: list[Any]) -> list[tuple[Any, Any]]:
            return [(tree(key), tree(value)) for key, value in listed]

        return tree(node)


def leaves(node: Any) -> list[dict[str, Any]]:
    if isinstance(node, dict):
        return [node] if "$tensor" in node else [leaf for value in node.values() for leaf in leaves(value)]
    return [leaf for item in node for leaf in leaves(item)] if isinstance(node, list) else []


def without_boxes(node: Any) -> Any:
    if isinstance(node, dict):
        return {"$tensor": node["$tensor"]} if "box" in node else {key: without_boxes(node[key]) for key in node}
    return [without_boxes(item) for item in node] if isinstance(node, list) else node


def assembled(pieces: list[tuple[Any, Any]]) -> Any:
    """The whole of which these are the pieces; each element must be there."""
    box, first = pieces[0]
    if box is None:
        return first
    whole, filled = np.zeros(box["of"], first.dtype), np.zeros(box["of"], bool)
    for box, piece in pieces:
        assert box["of"] == list(whole.shape)
        place = tuple(slice(at, at + side) for at, side in zip(box["at"], piece.shape, strict=True))
        whole[place], filled[place] = piece, True
    assert filled.all()
    return whole


class Anything(ArrayBackend):
    """Keeps values of every kind that a state may have, beside its arrays."""

    values: Any = None

    def snapshot(self, session: Any, staging: Staging) -> Any:
        staging.put("values", self.values)
        return super().snapshot(session, staging)


VALUES: dict[str, Any] = {
    "plain": [None, True, 1, -2.5, "text", {}, []],
    "large": 1 << 70, "infinite": [math.inf, -math.inf], "complex": 1 + 2j, "tuple": (1, (2,)), "set": {1, 2},
    "frozenset": frozenset({"a"}), "bytes": b"\0\xff", "bytearray": bytearray(b"x"), "keys": {1: "a", (2, 3): "b"},
    "tag-like": {"$tensor": "none"}, "ordered": OrderedDict([("b", 1), ("a", 2)]), "counter": Counter("aab"),
    "default": defaultdict(list, {"a": [1]}), "deque": deque([1, 2], maxlen=3), "scalar": np.float32(1.5),
    "array": np.arange(3, dtype=">f8"), "when": np.array(["2020-01-01"], "M8[us]"),
}  # fmt: skip


def test_a_second_reader_reads_what_was_written(tmp_path: Path) -> None:
    arrays = {"frozen": np.random.default_rng(1).normal(size=5000), "w": np.zeros(50), "none": np.zeros((0, 2))}
    backend = Anything(arrays)
    backend.values = VALUES
    seen: dict[int, Any] = {}
    sv = Supervisor(backend, tmp_path, save_every=EverySteps(1), keep=KeepAll(), signals=False)
    with sv.managed_session() as session:
        while not sv.should_stop() and session.global_step < 4:
            arrays["w"] += 1.5
            session.global_step += 1
            seen[session.global_step] = {name: array.copy() for name, array in arrays.items()}
    for step, state in seen.items():
        reader = Reader(tmp_path / f"model.ckpt-{step}")
        model = reader.part("model")
        assert {name: array.tobytes() for name, array in model.items()} == {
            name: array.tobytes() for name, array in state.items()
        }
        assert model["none"].shape == (0, 2)
        assert reader.run()["began"] == 0
        values = reader.part("values")
        assert {name: type(value) for name, value in values.items()} == {
            name: type(value) for name, value in VALUES.items()
        }
        for name, value in VALUES.items():
            assert np.array_equal(values[name], value) if isinstance(value, np.ndarray) else values[name] == value
    last = tmp_path / "model.ckpt-4"
    assert os.stat(last / "model-00001-of-00002.safetensors").st_nlink > 1, "nothing was shared: the test tests less"


class Shares(ArrayBackend):
    """One process's rows of tensors, and a number of its own."""

    def __init__(self, rank: int) -> None:
        super().__init__({"w": np.arange(3.0)})
        rows = slice(3 * rank, min(3 * rank + 3, 8))
        self.state = {
            "layers": [Piece(whole[rows].copy(), whole.shape, (rows.start, 0)) for whole in (WIDE, LONG)],
            "again": (piece := Piece(np.float32(WIDE[rows]), WIDE.shape, (rows.start, 0))), "rank": rank, "tied": piece,
        }  # fmt: skip

    def snapshot(self, session: Any, staging: Staging) -> Any:
        staging.put("pieces", self.state, PieceCodec(), per_rank=True)
        return super().snapshot(session, staging)


WIDE = np.random.default_rng(2).normal(size=(8, 70))
LONG = np.arange(8 * 1000).reshape(8, 1000).astype("M8[s]")


def train_together(rank: int, logdir: str) -> None:
    backend = Shares(rank)
    membership = FileMembership(logdir, rank, 3, synchronous=True)
    sv = Supervisor(
        backend, logdir, membership=membership, save_every=EverySteps(1), keep=KeepAll(), signals=False,
        staging=Staging(10_000),
    )  # fmt: skip
    with sv.managed_session() as session:
        while not sv.should_stop() and session.global_step < 2:
            session.global_step += 1


def test_a_second_reader_puts_together_what_several_processes_saved(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=train_together, args=(rank, str(tmp_path))) for rank in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    reader = Reader(tmp_path / "model.ckpt-2")
    assert any(name.startswith("rank-00002.pieces-00001-of") for name in reader.manifest["files"])
    for rank in range(3):
        assert reader.part("pieces", rank)["rank"] == rank
        assert reader.part("model", rank)["w"].tolist() == [0, 1, 2]
        assert reader.run(rank)["began"] == 0
    whole = reader.whole("pieces")
    assert whole["rank"] == 0
    assert whole["tied"] is whole["again"]
    assert whole["again"].tobytes() == np.float32(WIDE).tobytes()
    assert [layer.tobytes() for layer in whole["layers"]] == [WIDE.tobytes(), LONG.tobytes()]


def test_the_second_reader_notices_damage(tmp_path: Path) -> None:
    sv = Supervisor(ArrayBackend({"w": np.ones(100)}), tmp_path, signals=False)
    with sv.managed_session() as session:
        session.global_step += 1
    Reader(tmp_path / "model.ckpt-1")
    for name in ("model.safetensors", "state.json", "manifest.json"):
        path = tmp_path / "model.ckpt-1" / name
        content = path.read_bytes()
        damaged = bytearray(content)
        damaged[len(content) // 2] ^= 1
        path.write_bytes(damaged)
        with pytest.raises((AssertionError, ValueError, KeyError)):
            Reader(tmp_path / "model.ckpt-1")
        path.write_bytes(content)
