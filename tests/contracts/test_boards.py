"""The contract of a board, kept by those in memory, in files, and on a store of PyTorch."""

from __future__ import annotations

from typing import Any

import pytest

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


class TestStoreBoard(BoardContract):
    def setup_method(self) -> None:
        distributed = pytest.importorskip("torch.distributed")
        self.store: Any = distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)

    def make_board(self) -> Board:
        from supervise_torch.store_board import StoreBoard

        return StoreBoard(self.store, "board")


class TestStoreBoardOnTheStoreOfAProcessGroup(TestStoreBoard):
    def setup_method(self) -> None:
        super().setup_method()
        from torch.distributed import PrefixStore

        self.store = PrefixStore("group", PrefixStore("default", self.store))


class TestStoreBoardInOneProcess(TestStoreBoard):
    def setup_method(self) -> None:
        self.store = pytest.importorskip("torch.distributed").HashStore()
