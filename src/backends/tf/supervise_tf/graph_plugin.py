"""What supervise-core is told of the backend for graphs without importing TensorFlow."""

from supervise_core.hookspecs import BackendInfo, hookimpl


@hookimpl
def supervise_backend() -> BackendInfo:
    """See ``supervise_core.hookspecs``."""
    return BackendInfo(
        "tf-graph",
        "supervise_tf.graph:GraphBackend",
        requires=("tensorflow | tensorflow-cpu",),
        install="pip install 'supervise-core[tf]'",
    )
