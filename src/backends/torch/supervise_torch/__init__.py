"""The PyTorch backend. Importing this package imports no PyTorch; using a name of it does."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from supervise_torch.backend import TorchBackend, TorchSession
    from supervise_torch.codec import TorchCodec
    from supervise_torch.distributed import warm_up_ddp
    from supervise_torch.store_membership import StoreMembership, init_process_group

__all__ = ["StoreMembership", "TorchBackend", "TorchCodec", "TorchSession", "init_process_group", "warm_up_ddp"]


def __getattr__(name: str) -> Any:
    if name == "TorchCodec":
        from supervise_torch.codec import TorchCodec

        return TorchCodec
    if name == "warm_up_ddp":
        from supervise_torch.distributed import warm_up_ddp

        return warm_up_ddp
    if name in ("StoreMembership", "init_process_group"):
        from supervise_torch import store_membership

        return getattr(store_membership, name)
    if name in ("TorchBackend", "TorchSession"):
        from supervise_torch import backend

        return getattr(backend, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
