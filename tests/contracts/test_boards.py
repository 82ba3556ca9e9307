"""The contract of a board, kept by the one in memory and the one in files."""

from __future__ import annotations

from supervise_core.board import Board
from supervise_core.file_board import FileBoard
from supervise_core.testing.board_contract import BoardContract
from supervise_core.testing.boards import MemoryBoard, MemoryPlace


class TestMemoryBoard(BoardContract):
    def setup_method(self) -> None:
        self.place = MemoryPlace()

    def make_board(self) -> Board:
        return MemoryBoard(self.place)


class TestFileBoard(BoardContract):
    def make_board(self) -> Board:
        return FileBoard(self.directory / "runs" / "board")
