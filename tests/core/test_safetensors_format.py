"""Our safetensors files are everybody's safetensors files."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest

from supervise_core.safetensors_format import PAGE, lay_out, parse, parse_json_object
from supervise_core.tensors import BITS, TensorSpec

SPECS = [
    TensorSpec("small", "U8", (3,)),
    TensorSpec("wide", "F64", (2, 3)),
    TensorSpec("scalar", "F32", ()),
    TensorSpec("empty", "I64", (0, 5)),
    TensorSpec("snow\N{SNOWMAN}", "BF16", (7,)),
]


def image(specs: list[TensorSpec]) -> bytearray:
    layout = lay_out(specs)
    content = bytearray(layout.size)
    content[: len(layout.header)] = layout.header
    for number, spec in enumerate(specs, 1):
        at = layout.offsets[spec.name]
        content[at : at + spec.nbytes] = bytes([number % 256]) * spec.nbytes
    return content


def test_round_trip() -> None:
    parsed = parse(image(SPECS))
    assert {name: spec for name, (spec, _) in parsed.items()} == {spec.name: spec for spec in SPECS}
    for number, spec in enumerate(SPECS, 1):
        assert bytes(parsed[spec.name][1]) == bytes([number]) * spec.nbytes


def test_tensors_begin_on_a_page_each_aligned_to_its_width() -> None:
    layout = lay_out(SPECS)
    assert len(layout.header) % PAGE == 0
    for spec in SPECS:
        assert layout.offsets[spec.name] % (BITS[spec.dtype] // 8) == 0


def test_header_longer_than_a_page() -> None:
    specs = [TensorSpec(f"tensor number {number}", "F32", (1,)) for number in range(500)]
    layout = lay_out(specs)
    assert len(layout.header) > PAGE
    assert len(parse(image(specs))) == 500


def test_no_tensors_at_all() -> None:
    assert parse(image([])) == {}


def test_safetensors_reads_our_files(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors")
    (tmp_path / "model.safetensors").write_bytes(image(SPECS))
    with safetensors.safe_open(tmp_path / "model.safetensors", framework="np") as opened:
        assert set(opened.keys()) == {spec.name for spec in SPECS}
        for number, spec in enumerate(SPECS, 1):
            if spec.dtype != "BF16":
                array = opened.get_tensor(spec.name)
                assert array.shape == spec.shape
                assert array.tobytes() == bytes([number]) * spec.nbytes


def test_we_read_files_of_safetensors() -> None:
    numpy, written = pytest.importorskip("numpy"), pytest.importorskip("safetensors.numpy")
    content = written.save({"a": numpy.arange(6, dtype="<i4").reshape(2, 3), "b": numpy.array(2.5)})
    parsed = parse(content)
    assert parsed["a"][0] == TensorSpec("a", "I32", (2, 3))
    assert bytes(parsed["a"][1]) == numpy.arange(6, dtype="<i4").tobytes()
    assert parsed["b"][0] == TensorSpec("b", "F64", ())


def test_truncated_anywhere() -> None:
    content = image(SPECS[:2])
    for length in (0, 7, 8, 100, PAGE - 1, PAGE, len(content) - 1):
        with pytest.raises(ValueError):
            parse(content[:length])


def test_headers_that_lie_about_their_length() -> None:
    for claimed in (0, 1, 1 << 20, 100_000_001, (1 << 63) - 1, (1 << 64) - 1):
        with pytest.raises(ValueError):
            parse(struct.pack("<Q", claimed) + b'{"a":1}')


@pytest.mark.parametrize(
    "entry",
    [
        None,
        [],
        {},
        {"dtype": "U8", "shape": [1]},
        {"dtype": 8, "shape": [1], "data_offsets": [0, 1]},
        {"dtype": "O", "shape": [1], "data_offsets": [0, 1]},
        {"dtype": "U8", "shape": [-1], "data_offsets": [0, 1]},
        {"dtype": "U8", "shape": [1.0], "data_offsets": [0, 1]},
        {"dtype": "U8", "shape": [True], "data_offsets": [0, 1]},
        {"dtype": "U8", "shape": [1 << 63], "data_offsets": [0, 1]},
        {"dtype": "U8", "shape": [1] * 65, "data_offsets": [0, 1]},
        {"dtype": "U8", "shape": [1], "data_offsets": [0, 1, 2]},
        {"dtype": "U8", "shape": [1], "data_offsets": ["0", "1"]},
        {"dtype": "U8", "shape": [1], "data_offsets": [1, 0]},
    ],
)
def test_hostile_entries(entry: object) -> None:
    header = json.dumps({"w": entry}).encode()
    with pytest.raises(ValueError, match="'w'"):
        parse(struct.pack("<Q", len(header)) + header + b"x")


@pytest.mark.parametrize(
    "text", [b"", b"[]", b"1", b'"x"', b"{", b"\xff", b'{"a": NaN}', b'{"a": 1, "a": 2}', b"\xef\xbb\xbf{}"]
)
def test_what_is_no_json_object(text: bytes) -> None:
    with pytest.raises(ValueError):
        parse_json_object(text)


def test_deep_json() -> None:
    with pytest.raises(ValueError, match="nested too deeply"):
        parse_json_object(b'{"a":' * 200_000)
