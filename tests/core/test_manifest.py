"""A manifest is accepted byte for byte as it was written, or not at all."""

from __future__ import annotations

import json
import math

import pytest

from supervise_core.hashing import hash_of
from supervise_core.manifest import FileRecord, Manifest, check_file_name

FULL = Manifest(
    step=120,
    backend="numpy",
    wall_time=1.7e9 + 0.25,
    parts=("model", "random"),
    files={"model.safetensors": FileRecord(4096, hash_of([b"x"])), "state.json": FileRecord(2, hash_of([b"{}"]))},
    metrics={"loss": 0.1, "bad": math.inf, "worse": -math.inf, "snow\N{SNOWMAN}": 3.0},
    consistent=False,
    versions={"numpy": "2.0"},
    run={"id": [1, None]},
)


def test_round_trip() -> None:
    assert Manifest.from_bytes(FULL.to_bytes()) == FULL
    assert Manifest.from_bytes(bytearray(FULL.to_bytes())).to_bytes() == FULL.to_bytes()


def test_nan_metric() -> None:
    content = Manifest(1, "numpy", 1.0, (), {}, metrics={"loss": math.nan}).to_bytes()
    assert math.isnan(Manifest.from_bytes(content).metrics["loss"])


def test_every_single_bit_counts() -> None:
    content = FULL.to_bytes()
    for position in range(len(content)):
        for bit in range(8):
            flipped = bytearray(content)
            flipped[position] ^= 1 << bit
            with pytest.raises(ValueError):
                Manifest.from_bytes(flipped)


@pytest.mark.parametrize("length", [0, 1, 10, -1, -2])
def test_truncated(length: int) -> None:
    with pytest.raises(ValueError):
        Manifest.from_bytes(FULL.to_bytes()[:length])


@pytest.mark.parametrize("tail", [b" ", b"\n", b"\0", b"{}"])
def test_with_a_tail(tail: bytes) -> None:
    with pytest.raises(ValueError):
        Manifest.from_bytes(FULL.to_bytes() + tail)


def test_same_content_written_otherwise_is_refused() -> None:
    compact = json.dumps(json.loads(FULL.to_bytes())).encode()
    with pytest.raises(ValueError, match="does not match its own hash"):
        Manifest.from_bytes(compact)


def test_another_version_says_so() -> None:
    body = json.loads(FULL.to_bytes())
    del body["xxh3_128"]
    body["format_version"] = 2

    def text(content: object) -> bytes:
        return json.dumps(content, indent=1, sort_keys=True).encode("ascii") + b"\n"

    content = text(body | {"xxh3_128": hash_of([text(body)])})
    with pytest.raises(ValueError, match="the format version is 2; this release reads 1"):
        Manifest.from_bytes(content)


def test_hash_is_that_of_the_whole() -> None:
    assert hash_of([b"ab", b"", bytearray(b"c"), memoryview(b"d")]) == hash_of([b"abcd"])
    assert hash_of([]) == "99aa06d3014798d86001c324468d497f", "xxh3-128 of nothing"


@pytest.mark.parametrize("name", ["model.safetensors", "state.json", "a", "_x-1.y", "model-00001-of-00002.safetensors"])
def test_good_file_names(name: str) -> None:
    assert check_file_name(name) == name


@pytest.mark.parametrize(
    "name", ["", ".", "..", ".x", "a/b", "/a", "a\\b", "a\n", "a b", "manifest.json", "x" * 201, "é"]
)
def test_bad_file_names(name: str) -> None:
    with pytest.raises(ValueError, match="not the name of a file"):
        check_file_name(name)
