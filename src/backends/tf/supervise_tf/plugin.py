"""What supervise-core is told of this backend without importing TensorFlow."""

from supervise_core.hookspecs import BackendInfo, hookimpl


@hookimpl
def supervise_backend() -> BackendInfo:
    """See ``supervise_core.hookspecs``."""
    return BackendInfo(
        "tf",
        "supervise_tf.eager:EagerBackend",
        requires=("tensorflow | tensorflow-cpu",),
        install="pip install 'supervise-core[tf]'",
    )
