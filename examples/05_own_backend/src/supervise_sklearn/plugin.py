"""What supervise-core is told of this backend without importing scikit-learn."""

from supervise_core import BackendInfo, hookimpl


@hookimpl
def supervise_backend() -> BackendInfo:
    """See ``supervise_core.hookspecs``."""
    return BackendInfo(
        "sklearn",
        "supervise_sklearn.backend:SklearnBackend",
        requires=("scikit-learn",),
        install="pip install 'supervise-sklearn[sklearn]'",
    )
