"""The manifest of a checkpoint: what is in it, and the size and hash of every file. Written last; it makes the commit.

The file carries its own hash and is accepted only byte for byte as this module writes it, so that no flipped bit in it
goes unnoticed either.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from supervise_core.hashing import hash_of
from supervise_core.safetensors_format import parse_json_object

MANIFEST: Final = "manifest.json"
STATE: Final = "state.json"
RANKS: Final = "ranks.json"
FORMAT_VERSION: Final = 1
LARGEST_MANIFEST: Final = 64 << 20
LARGEST_STATE: Final = 512 << 20

_FILE_NAME: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,199}")


@dataclass(frozen=True, slots=True)
class FileRecord:
    """Size in bytes and xxh3-128 (hexadecimal) of one file; of a safetensors file, see ``hashing.TensorFileHash``."""

    size: int
    xxh3_128: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a checkpoint says of itself. ``wall_time`` is in seconds since the epoch.

    ``consistent`` is False for a checkpoint that was not taken at a step boundary.
    """

    step: int
    backend: str
    wall_time: float
    parts: tuple[str, ...]
    files: Mapping[str, FileRecord]
    metrics: Mapping[str, float] = field(default_factory=dict[str, float])
    consistent: bool = True
    versions: Mapping[str, str] = field(default_factory=dict[str, str])
    run: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def to_bytes(self) -> bytes:
        """As the content of the manifest's file."""
        body = {
            "format_version": FORMAT_VERSION,
            "step": self.step,
            "backend": self.backend,
            "wall_time": self.wall_time,
            "parts": list(self.parts),
            "files": {name: {"size": file.size, "xxh3_128": file.xxh3_128} for name, file in self.files.items()},
            "metrics": {name: _number_to_json(value) for name, value in self.metrics.items()},
            "consistent": self.consistent,
            "versions": dict(self.versions),
            "run": dict(self.run),
        }
        return _canonical(body | {"xxh3_128": hash_of([_canonical(body)])})

    @classmethod
    def from_bytes(cls, content: bytes | bytearray) -> Manifest:
        """:raises ValueError: if these are not the bytes of a manifest; the message says what is wrong."""
        body = parse_json_object(content)
        version = body.get("format_version")
        own = body.pop("xxh3_128", None)
        if own != hash_of([_canonical(body)]) or content != _canonical(body | {"xxh3_128": own}):
            raise ValueError("the manifest does not match its own hash")
        if version != FORMAT_VERSION:
            raise ValueError(f"the format version is {version!r}; this release reads {FORMAT_VERSION}")
        return cls._from_body(body)

    @classmethod
    def _from_body(cls, body: Mapping[str, Any]) -> Manifest:
        match body:
            case {
                "step": int() as step,
                "backend": str() as backend,
                "wall_time": int() | float() as wall_time,
                "parts": list() as parts,
                "files": dict() as files,
                "metrics": dict() as metrics,
                "consistent": bool() as consistent,
                "versions": dict() as versions,
                "run": dict() as run,
            } if all(isinstance(part, str) for part in parts):
                return cls(
                    step=step,
                    backend=backend,
                    wall_time=float(wall_time),
                    parts=tuple(parts),
                    files={check_file_name(name): _file_record(name, entry) for name, entry in files.items()},
                    metrics={name: _number_from_json(value) for name, value in metrics.items()},
                    consistent=consistent,
                    versions=versions,
                    run=run,
                )
            case _:
                raise ValueError("the manifest lacks a field, or one is of the wrong type")


def check_file_name(name: str) -> str:
    """The name, if it can only be a file in the checkpoint's own directory.

    :raises ValueError: otherwise.
    """
    if not _FILE_NAME.fullmatch(name) or name == MANIFEST:
        raise ValueError(f"{name!r} is not the name of a file that a checkpoint may have")
    return name


def _file_record(name: str, entry: Any) -> FileRecord:
    match entry:
        case {"size": int() as size, "xxh3_128": str() as digest} if size >= 0:
            return FileRecord(size, digest)
        case _:
            raise ValueError(f"the manifest's entry for {name!r} is not that of a file")


def _canonical(body: Mapping[str, Any]) -> bytes:
    return json.dumps(body, indent=1, sort_keys=True, allow_nan=False).encode("ascii") + b"\n"


def _number_to_json(value: float) -> float | str:
    return value if math.isfinite(value) else repr(value)


def _number_from_json(value: Any) -> float:
    if isinstance(value, (int, float, str)):
        return float(value)
    raise ValueError(f"{value!r} is not a number")
