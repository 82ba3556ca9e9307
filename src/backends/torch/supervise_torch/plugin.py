"""What supervise-core is told of this backend without importing PyTorch."""

from supervise_core.hookspecs import BackendInfo, hookimpl


@hookimpl
def supervise_backend() -> BackendInfo:
    """See ``supervise_core.hookspecs``."""
    return BackendInfo(
        "torch",
        "supervise_torch.backend:TorchBackend",
        requires=("torch",),
        install="pip install 'supervise-core[torch]'",
    )
