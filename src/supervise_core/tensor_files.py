"""Reading a safetensors file into memory that is there already, verified while it is read, by several threads.

A file is read in pieces, each by one call straight to where its tensors belong. The reading threads run ahead; the
pieces are hashed in the order of the file, and what was only passed through is handed over and forgotten.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Final

from supervise_core.checkpoint_format import CheckpointReader
from supervise_core.errors import CheckpointDamagedError, SessionStateError
from supervise_core.hashing import HASHED_APART, TensorFileHash
from supervise_core.manifest import FileRecord
from supervise_core.memory import no_collection, view_at
from supervise_core.parts import Target
from supervise_core.safetensors_format import HEADER_LENGTH, header_length, parse_header
from supervise_core.tensors import TensorSpec

_PIECE: Final = 4 << 20
_MOST_BUFFERS: Final = 512  # of one call; Linux allows 1024
_READERS: Final = 2  # one copies while the other waits for the disk; more of them share the same caches, and are slower
_AHEAD: Final = _READERS + 2
_WORTH_THREADS: Final = 4 * _PIECE


class TensorFile:
    """One safetensors file of a checkpoint that is held open."""

    def __init__(self, reader: CheckpointReader, file: str, record: FileRecord) -> None:
        """Reads the header, which is believed only once the whole file was read.

        :raises CheckpointDamagedError: if the size is wrong, or this is no header of such a file.
        """
        self._reader = reader
        self._file = file
        self._record = record
        reader.check_size(file, record)
        try:
            length = header_length(reader.content(file, 0, min(HEADER_LENGTH, record.size)), record.size)
            self._header = bytes(reader.content(file, 0, length))
            self._ranges = parse_header(self._header, record.size - length)
        except CheckpointDamagedError:
            raise
        except ValueError as error:
            raise CheckpointDamagedError(reader.name, f"{file}: {error}") from error

        self.tensors: Mapping[str, TensorSpec] = {each.spec.name: each.spec for each in self._ranges}
        """What it says that it holds."""

    @property
    def file(self) -> str:
        """Its name."""
        return self._file

    def read(self, targets: Mapping[str, Target]) -> None:
        """Read the tensors that are wanted to where they belong, and verify the whole file.

        :raises CheckpointDamagedError: if its hash is wrong.
        :raises SessionStateError: if the memory was changed by somebody else meanwhile.
        """
        if self._digest(targets) == self._record.xxh3_128:
            return
        if targets and self._digest({}) == self._record.xxh3_128:
            raise SessionStateError(
                f"tensors of {self._file} in {self._reader.name} were changed by another thread while they were "
                "restored; begin such threads when the session is open"
            )
        raise CheckpointDamagedError(self._reader.name, f"the content of {self._file} does not match its hash")

    def _digest(self, targets: Mapping[str, Target]) -> str:
        with no_collection():
            digest = TensorFileHash(self._header)
            self._read(targets, digest)
            return digest.hexdigest()

    def _read(self, targets: Mapping[str, Target], digest: TensorFileHash) -> None:
        pieces = self._pieces(targets)
        if self._record.size < _WORTH_THREADS:
            for piece in pieces:
                self._fill(piece)
                piece.hash_into(digest)
            return
        waiting: deque[tuple[_Piece, Future[None]]] = deque()
        with ThreadPoolExecutor(_READERS, "supervise-core reads") as readers:
            try:
                for piece in pieces:
                    waiting.append((piece, readers.submit(self._fill, piece)))
                    if len(waiting) >= _AHEAD:
                        _take_first(waiting, digest)
                while waiting:
                    _take_first(waiting, digest)
            finally:
                for _, future in waiting:
                    future.cancel()

    def _pieces(self, targets: Mapping[str, Target]) -> Iterator[_Piece]:
        """In the order of the file. What is cut is only what does not fit: there may be very many small tensors."""
        piece = _Piece(len(self._header))
        for begin, end, spec in self._ranges:
            if piece.is_full():
                yield piece
                piece = piece.next()
            target, nbytes = targets.get(spec.name), end - begin
            if nbytes < HASHED_APART and nbytes <= _PIECE - piece.nbytes:
                if nbytes:
                    piece.add(_buffer_for(target, nbytes), nbytes)
                    piece.end(target, piece.buffers[-1])
                continue
            whole = None if target is None else _buffer_for(target, nbytes)
            done = 0
            while done < nbytes:
                if piece.is_full():
                    yield piece
                    piece = piece.next()
                count = min(nbytes - done, _PIECE - piece.nbytes)
                if nbytes >= HASHED_APART:
                    piece.apart[len(piece.buffers)] = done + count == nbytes
                piece.add(_buffer_for(None, count) if whole is None else whole[done : done + count], count)
                done += count
            piece.end(target, whole)
        if piece.buffers:
            yield piece

    def _fill(self, piece: _Piece) -> None:
        if self._reader.read_into(self._file, piece.at, piece.buffers) != piece.nbytes:
            raise CheckpointDamagedError(self._reader.name, f"{self._file} was cut off while it was read")


def _buffer_for(target: Target | None, nbytes: int) -> memoryview:
    """Where a tensor is read to; memory of its own if that is not known by an address."""
    return view_at(target, nbytes) if isinstance(target, int) else memoryview(bytearray(nbytes))


def _take_first(waiting: deque[tuple[_Piece, Future[None]]], digest: TensorFileHash) -> None:
    piece, future = waiting.popleft()
    future.result()
    piece.hash_into(digest)


@dataclass(slots=True)
class _Piece:
    """What one call reads."""

    at: int
    buffers: list[memoryview] = field(default_factory=list[memoryview])
    nbytes: int = 0
    apart: dict[int, bool] = field(default_factory=dict[int, bool])
    """The buffers of large tensors by their numbers, and whether they are the last ones of theirs."""
    ended: list[tuple[Callable[[memoryview], None], memoryview]] = field(
        default_factory=list[tuple[Callable[[memoryview], None], memoryview]]
    )

    def add(self, buffer: memoryview, nbytes: int) -> None:
        self.buffers.append(buffer)
        self.nbytes += nbytes

    def end(self, target: Target | None, content: memoryview | None) -> None:
        """A tensor ends in this piece; it is handed over once all of it is there and hashed."""
        if callable(target) and content is not None:
            self.ended.append((target, content))

    def is_full(self) -> bool:
        return self.nbytes >= _PIECE or len(self.buffers) >= _MOST_BUFFERS

    def next(self) -> _Piece:
        return _Piece(self.at + self.nbytes)

    def hash_into(self, digest: TensorFileHash) -> None:
        for number, buffer in enumerate(self.buffers):
            if number in self.apart:
                digest.update_apart(buffer, is_last=self.apart[number])
            else:
                digest.update(buffer)
        for take, content in self.ended:
            take(content)
        self.buffers.clear()
        self.ended.clear()
