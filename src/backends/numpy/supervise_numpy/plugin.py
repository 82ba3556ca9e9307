"""What supervise-core is told of this backend without importing NumPy."""

from supervise_core.hookspecs import BackendInfo, hookimpl


@hookimpl
def supervise_backend() -> BackendInfo:
    """See ``supervise_core.hookspecs``."""
    return BackendInfo("numpy", "supervise_numpy:ArrayBackend", requires=("numpy",), install="pip install numpy")
