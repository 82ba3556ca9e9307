"""The contract of a membership, kept by those that meet in memory, in files, and in a store of PyTorch."""

from __future__ import annotations

from typing import Any

import pytest

from supervise_core import FileMembership
from supervise_core.board import Board
from supervise_core.clock import Clock
from supervise_core.membership import Membership
from supervise_core.testing.boards import MemoryBoard, MemoryPlace
from supervise_core.testing.membership_contract import MembershipContract


class MemoryMembership(Membership):
    def __init__(self, place: MemoryPlace, rank: int, size: int | None, *, synchronous: bool) -> None:
        super().__init__(rank, size, synchronous=synchronous)
        self.place = place

    def connect(self, clock: Clock) -> Board:
        return MemoryBoard(self.place, clock)


class TestMembershipInMemory(MembershipContract):
    def setup_method(self) -> None:
        self.place = MemoryPlace()

    def make_membership(self, rank: int, size: int | None, *, synchronous: bool) -> Membership:
        return MemoryMembership(self.place, rank, size, synchronous=synchronous)


class TestFileMembership(MembershipContract):
    def make_membership(self, rank: int, size: int | None, *, synchronous: bool) -> Membership:
        return FileMembership(self.directory / "logs", rank, size, synchronous=synchronous)


class TestStoreMembership(MembershipContract):
    size_may_be_unknown = False

    def setup_method(self) -> None:
        distributed = pytest.importorskip("torch.distributed")
        self.store: Any = distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)

    def make_membership(self, rank: int, size: int | None, *, synchronous: bool) -> Membership:
        from supervise_torch import StoreMembership

        assert size is not None
        return StoreMembership(self.store, rank, size, synchronous=synchronous)
