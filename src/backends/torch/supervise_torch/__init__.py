"""The PyTorch backend. Importing this package imports no PyTorch; using a name of it does."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from supervise_torch.backend import TorchBackend, TorchSession
    from supervise_torch.codec import TorchCodec
    from supervise_torch.distributed import warm_up_ddp
    from supervise_torch.process_groups import abort_process_groups
    from supervise_torch.store_membership import StoreMembership, init_process_group

__all__ = [
    "StoreMembership",
    "TorchBackend",
    "TorchCodec",
    "TorchSession",
    "abort_process_groups",
    "init_process_group",
    "warm_up_ddp",
]

_HOMES: Final = {
    "StoreMembership": "store_membership",
    "TorchBackend": "backend",
    "TorchCodec": "codec",
    "TorchSession": "backend",
    "abort_process_groups": "process_groups",
    "init_process_group": "store_membership",
    "warm_up_ddp": "distributed",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
