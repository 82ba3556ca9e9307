"""The hashes that checkpoints are verified by: XXH3 with 128 bits and seed 0, in its canonical order of bytes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import xxhash

HASHED_APART: Final = 1 << 20
"""From this size on, in bytes, a tensor has a hash of its own, which stands for it in the hash of its file."""


def hash_of(chunks: Iterable[bytes | bytearray | memoryview]) -> str:
    """The hash of the chunks one after another, in hexadecimal."""
    digest = xxhash.xxh3_128()
    for chunk in chunks:
        digest.update(chunk)
    return digest.hexdigest()


def digest_of(content: memoryview) -> bytes:
    """The hash of one tensor's bytes. Other threads go on meanwhile."""
    return xxhash.xxh3_128_digest(content)


class TensorFileHash:
    """The hash of a safetensors file: of its bytes as they come, but for each large tensor of that tensor's own hash.

    So a tensor that is known not to have changed need not be hashed again, and whether it has can be seen from its
    bytes alone, without those that were saved. Small tensors are taken as they are: there may be very many.
    """

    def __init__(self, header: bytes) -> None:
        self._whole = xxhash.xxh3_128(header)
        self._apart: xxhash.xxh3_128 | None = None

    def update(self, content: bytes | bytearray | memoryview) -> None:
        """Take bytes of tensors that are smaller than ``HASHED_APART``."""
        self._whole.update(content)

    def update_apart(self, content: memoryview, *, is_last: bool) -> bytes | None:
        """Take some bytes of a large tensor; with the last ones of it, its hash is known."""
        if self._apart is None:
            self._apart = xxhash.xxh3_128()
        self._apart.update(content)
        if not is_last:
            return None
        digest, self._apart = self._apart.digest(), None
        self.add_apart(digest)
        return digest

    def add_apart(self, digest: bytes) -> None:
        """Take a large tensor whose hash is known."""
        self._whole.update(digest)

    def hexdigest(self) -> str:
        """The hash of all that was taken, in hexadecimal."""
        return self._whole.hexdigest()
