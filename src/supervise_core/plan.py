"""What a run is made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from supervise_core.backend import Backend
from supervise_core.checkpoint_store import CheckpointStore
from supervise_core.clock import Clock
from supervise_core.coordinator import Coordinator
from supervise_core.membership import Membership
from supervise_core.operations import Operations
from supervise_core.plugins import RunHooks
from supervise_core.recovery import Resume
from supervise_core.retention import Retention
from supervise_core.services import Service
from supervise_core.session_manager import SessionManager
from supervise_core.staging import Staging
from supervise_core.summaries import EventSink
from supervise_core.triggers import Trigger

SessionT = TypeVar("SessionT")


@dataclass(frozen=True, slots=True)
class Plan(Generic[SessionT]):
    """What a run is made of; the parts that its Supervisor was given."""

    backend: Backend[SessionT]
    operations: Operations[SessionT]
    manager: SessionManager[SessionT]
    store: CheckpointStore | None
    logdir: Path | None
    membership: Membership
    is_chief: bool
    save_every: Trigger | None
    summarize_every: Trigger | None
    keep: Retention
    services: Sequence[Service]
    resume: Resume
    grace: float
    signals: bool
    staging: Staging
    clock: Clock
    hooks: RunHooks
    new_coordinator: Callable[[], Coordinator]
    open_events: Callable[[], EventSink] | None
    summarize_at_start: bool = False


@dataclass(frozen=True, slots=True)
class Opening:
    """How one session is to be opened."""

    master: str = ""
    config: object = None
    wait_for_checkpoint: bool = False
    max_wait_secs: float = 7200.0
    start_standard_services: bool = True
    session: object = None
    """One that was brought up already, and is only to be watched over."""
