"""The TensorFlow backends, and the drop-in for TensorFlow's own Supervisor.

Importing this package imports no TensorFlow; using a name of it does.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from supervise_tf.bundle_store import BundleStore
    from supervise_tf.coordinator import Coordinator, LooperThread
    from supervise_tf.eager import EagerBackend, EagerSession
    from supervise_tf.graph import GraphBackend
    from supervise_tf.graph_operations import GraphOperations
    from supervise_tf.session_manager import SessionDeadlineError, SessionManager
    from supervise_tf.summary_writer import SummaryWriter
    from supervise_tf.supervisor import Supervisor

__all__ = [
    "BundleStore",
    "Coordinator",
    "EagerBackend",
    "EagerSession",
    "GraphBackend",
    "GraphOperations",
    "LooperThread",
    "SessionDeadlineError",
    "SessionManager",
    "SummaryWriter",
    "Supervisor",
]

_MODULES = {
    "bundle_store": ("BundleStore",),
    "coordinator": ("Coordinator", "LooperThread"),
    "eager": ("EagerBackend", "EagerSession"),
    "graph": ("GraphBackend",),
    "graph_operations": ("GraphOperations",),
    "session_manager": ("SessionDeadlineError", "SessionManager"),
    "summary_writer": ("SummaryWriter",),
    "supervisor": ("Supervisor",),
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
