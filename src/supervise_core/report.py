"""Why a run ended, and what it leaves."""

from __future__ import annotations

from dataclasses import dataclass, field

from supervise_core.coordinator import StopCause


@dataclass(slots=True)
class RunReport:
    """What a run did, filled in while it goes on; complete when the session is closed.

    ``exit_status`` is what a process should end with: 0, 1 after an error, 143 and 130 after SIGTERM and SIGINT.
    """

    cause: StopCause | None = None
    exit_status: int = 0
    restored: str | None = None
    first_step: int = 0
    last_step: int = 0
    saves: int = 0
    last_saved: str | None = None
    failed_saves: int = 0
    set_aside: dict[str, str] = field(default_factory=dict[str, str])
    errors: list[StopCause] = field(default_factory=list[StopCause])
    stragglers: dict[str, str] = field(default_factory=dict[str, str])
    final_save: str = "not reached"

    def __str__(self) -> str:
        restored = f"restored from {self.restored}" if self.restored else "begun anew"
        saved = f"{self.saves} saved, the last {self.last_saved}" if self.saves else "none saved"
        failed = f", {self.failed_saves} saves failed" if self.failed_saves else ""
        return (
            f"{self.cause or 'still running'}; {restored}, steps {self.first_step} to {self.last_step}; "
            f"checkpoints: {saved}{failed}; final save: {self.final_save}"
        )
