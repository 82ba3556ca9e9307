"""A training supervisor for any framework.

The floors of this package, from what users call down to what knows nothing; imports go down only, never sideways::

    19   __main__, supervisor
    18   cli, lifecycle
    17   run
    16   bringing_up, saving
    15   meeting
    14   lease_keeper, plan, reading, standard_services
    13   checkpointer, session_manager
    12   recovery
    11   arguments, directory_store, gathering, handover, operations, plugins, retrying
    10   backend, checkpoint_store, membership
     9   checkpoint_files, chief, worker
     8   member, snapshot_files, tensor_files
     7   pages, sharing
     6   checkpoint_format
     5   parts, staging
     4   data_loop, flattening, manifest, snapshot
     3   boxes, data_stream, hookspecs, numpy_codec, safetensors_format, services
     2   boundary, lease, looper, report, retention, signals, tensors, watchdog
     1   agreement, coordinator, data_source, durable_files, file_board, memory, summaries, tagged_json, triggers
     0   board, clock, disk, errors, hashing, host, process_random, readiness

Floors 14 to 19 are the road of a run and its loop; 12 and 13 save and recover; 4 to 11 are state in memory, checkpoints
on disk, the other processes of a run and the port to a framework; 0 to 3 are values, time, threads, and formats. A
machine checks this, and that no module is left out (``[tool.importlinter]`` in ``pyproject.toml``). Nothing here
imports a framework; NumPy is imported when the first array is met. ``testing`` is for tests, and nothing imports it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from supervise_core.backend import Backend
    from supervise_core.checkpoint_store import CheckpointStore
    from supervise_core.clock import Clock, SystemClock
    from supervise_core.coordinator import Coordinator, StopCause, StopSignal
    from supervise_core.data_source import BatchSource
    from supervise_core.directory_store import DirectoryStore
    from supervise_core.errors import (
        AllCheckpointsDamagedError,
        BackendNotInstalledError,
        CheckpointDamagedError,
        CheckpointError,
        CheckpointNotFoundError,
        ChiefFinishedError,
        ChiefLostError,
        ChiefNeverCameError,
        DataPositionError,
        DisagreementError,
        IncompatibleCheckpointError,
        LeaseError,
        LeaseHeldError,
        LeaseLostError,
        MemberFailedError,
        MemberLostError,
        MembershipError,
        NotReadyError,
        PolicyError,
        ReadinessTimeoutError,
        SessionStateError,
        StragglersError,
        SuperviseError,
        UnknownBackendError,
        UnsupportedStateError,
    )
    from supervise_core.hookspecs import BackendInfo, hookimpl
    from supervise_core.looper import Looper
    from supervise_core.member import Patience
    from supervise_core.membership import FileMembership, LocalMembership, Membership
    from supervise_core.operations import USE_BACKEND
    from supervise_core.parts import Part, Parts
    from supervise_core.readiness import NotReady, Readiness, Ready
    from supervise_core.reading import CheckpointDirectory, SavedCheckpoint
    from supervise_core.report import RunReport
    from supervise_core.retention import KeepAll, KeepBest, KeepEverySeconds, KeepEverySteps, KeepLatest, Retention
    from supervise_core.retrying import retry
    from supervise_core.services import Service, ServiceContext
    from supervise_core.session_manager import SessionManager
    from supervise_core.snapshot import Snapshot
    from supervise_core.staging import Staging
    from supervise_core.summaries import Histogram, Image, Text
    from supervise_core.supervisor import Supervisor
    from supervise_core.tensors import TensorCodec
    from supervise_core.triggers import AtSteps, Due, EverySeconds, EverySteps, Firing, Overhead, Trigger

__version__ = "0.1.0"

__all__ = [
    "USE_BACKEND",
    "AllCheckpointsDamagedError",
    "AtSteps",
    "Backend",
    "BackendInfo",
    "BackendNotInstalledError",
    "BatchSource",
    "CheckpointDamagedError",
    "CheckpointDirectory",
    "CheckpointError",
    "CheckpointNotFoundError",
    "CheckpointStore",
    "ChiefFinishedError",
    "ChiefLostError",
    "ChiefNeverCameError",
    "Clock",
    "Coordinator",
    "DataPositionError",
    "DirectoryStore",
    "DisagreementError",
    "Due",
    "EverySeconds",
    "EverySteps",
    "FileMembership",
    "Firing",
    "Histogram",
    "Image",
    "IncompatibleCheckpointError",
    "KeepAll",
    "KeepBest",
    "KeepEverySeconds",
    "KeepEverySteps",
    "KeepLatest",
    "LeaseError",
    "LeaseHeldError",
    "LeaseLostError",
    "LocalMembership",
    "Looper",
    "MemberFailedError",
    "MemberLostError",
    "Membership",
    "MembershipError",
    "NotReady",
    "NotReadyError",
    "Overhead",
    "Part",
    "Parts",
    "Patience",
    "PolicyError",
    "Readiness",
    "ReadinessTimeoutError",
    "Ready",
    "Retention",
    "RunReport",
    "SavedCheckpoint",
    "Service",
    "ServiceContext",
    "SessionManager",
    "SessionStateError",
    "Snapshot",
    "Staging",
    "StopCause",
    "StopSignal",
    "StragglersError",
    "SuperviseError",
    "Supervisor",
    "SystemClock",
    "TensorCodec",
    "Text",
    "Trigger",
    "UnknownBackendError",
    "UnsupportedStateError",
    "__version__",
    "hookimpl",
    "retry",
]

_MODULES = {
    "backend": ("Backend",),
    "checkpoint_store": ("CheckpointStore",),
    "clock": ("Clock", "SystemClock"),
    "coordinator": ("Coordinator", "StopCause", "StopSignal"),
    "data_source": ("BatchSource",),
    "directory_store": ("DirectoryStore",),
    "errors": (
        "AllCheckpointsDamagedError",
        "BackendNotInstalledError",
        "CheckpointDamagedError",
        "CheckpointError",
        "CheckpointNotFoundError",
        "ChiefFinishedError",
        "ChiefLostError",
        "ChiefNeverCameError",
        "DataPositionError",
        "DisagreementError",
        "IncompatibleCheckpointError",
        "LeaseError",
        "LeaseHeldError",
        "LeaseLostError",
        "MemberFailedError",
        "MemberLostError",
        "MembershipError",
        "NotReadyError",
        "PolicyError",
        "ReadinessTimeoutError",
        "SessionStateError",
        "StragglersError",
        "SuperviseError",
        "UnknownBackendError",
        "UnsupportedStateError",
    ),
    "hookspecs": ("BackendInfo", "hookimpl"),
    "looper": ("Looper",),
    "member": ("Patience",),
    "membership": ("FileMembership", "LocalMembership", "Membership"),
    "operations": ("USE_BACKEND",),
    "parts": ("Part", "Parts"),
    "readiness": ("NotReady", "Readiness", "Ready"),
    "reading": ("CheckpointDirectory", "SavedCheckpoint"),
    "report": ("RunReport",),
    "retention": ("KeepAll", "KeepBest", "KeepEverySeconds", "KeepEverySteps", "KeepLatest", "Retention"),
    "retrying": ("retry",),
    "services": ("Service", "ServiceContext"),
    "session_manager": ("SessionManager",),
    "snapshot": ("Snapshot",),
    "staging": ("Staging",),
    "summaries": ("Histogram", "Image", "Text"),
    "supervisor": ("Supervisor",),
    "tensors": ("TensorCodec",),
    "triggers": ("AtSteps", "Due", "EverySeconds", "EverySteps", "Firing", "Overhead", "Trigger"),
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    """Import what is asked for when it is asked for: importing this package costs next to nothing."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
