"""The contracts that plugins can be tested against: subclass one, and run pytest."""

from __future__ import annotations

from supervise_core.testing.backend_contract import BackendContract, Program
from supervise_core.testing.board_contract import BoardContract
from supervise_core.testing.membership_contract import MembershipContract
from supervise_core.testing.store_contract import StoreContract

__all__ = ["BackendContract", "BoardContract", "MembershipContract", "Program", "StoreContract"]
