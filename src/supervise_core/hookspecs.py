"""The hooks that plugins implement: one that describes a backend, and four that are told what happens to a run.

Mark an implementation with ``hookimpl``; it may take any subset of the arguments. An error in a hook is logged with the
plugin's name, and the run goes on: no hook is given work that could be lost.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pluggy

if TYPE_CHECKING:
    from supervise_core.coordinator import StopCause
    from supervise_core.report import RunReport

PROJECT: Final = "supervise_core"

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@dataclass(frozen=True, slots=True)
class BackendInfo:
    """A backend, described without importing its framework.

    ``target`` is ``"module:Class"``. Each of ``requires`` names a distribution that must be installed, or several with
    `` | `` between them, one of which must. ``install`` is what to type when it is not.
    """

    name: str
    target: str
    requires: tuple[str, ...] = ()
    install: str = ""


@hookspec
def supervise_backend() -> BackendInfo:  # type: ignore[empty-body]
    """Describe the plugin's backend. The module with this hook must not import the framework."""


@hookspec
def supervise_session_ready(session: Any, logdir: Path | None, step: int, restored: str | None) -> None:
    """The model is ready and its services run; ``restored`` names the checkpoint, None in a fresh run."""


@hookspec
def supervise_checkpoint_committed(name: str, step: int, logdir: Path | None) -> None:
    """A checkpoint is durable. Called on the writer's thread."""


@hookspec
def supervise_stop_requested(cause: StopCause) -> None:
    """The run was asked to stop. Called once, on the thread that asked."""


@hookspec
def supervise_run_closed(report: RunReport) -> None:
    """The session is closed; the report is complete."""
