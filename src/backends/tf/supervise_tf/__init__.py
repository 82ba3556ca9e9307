"""The TensorFlow backend for eager programs. Importing this package imports no TensorFlow; using a name of it does."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from supervise_tf.eager import EagerBackend, EagerSession

__all__ = ["EagerBackend", "EagerSession"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from supervise_tf import eager

    return getattr(eager, name)
