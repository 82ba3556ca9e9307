"""How a run comes by its session: it makes the model ready itself, or waits until the chief has."""

from __future__ import annotations

import logging
from typing import Any

from supervise_core.coordinator import StopSignal
from supervise_core.meeting import Meeting
from supervise_core.pages import Announcement
from supervise_core.plan import Opening, Plan
from supervise_core.report import RunReport

_log = logging.getLogger(__name__)


def bring_up(plan: Plan[Any], opening: Opening, meeting: Meeting, stop: StopSignal, report: RunReport) -> Any:
    """A session whose model is ready; what was done for that is in the report.

    :raises NotReadyError, CheckpointError, MembershipError, SessionStateError, OSError: as nothing comes of it.
    """
    if opening.session is not None:
        return opening.session
    if meeting.worker is not None:
        announced = meeting.adopt(opening.max_wait_secs)
        if not plan.backend.shares_model(opening.master):
            session = _adopt(plan, opening, meeting, announced)
            _note_recovery(plan, report)
            return session
    if not plan.is_chief:
        return plan.manager.wait_for_session(opening.master, opening.config, opening.max_wait_secs, stop)
    session = plan.manager.prepare_session(
        opening.master, opening.config,
        resume=plan.resume, wait_for_checkpoint=opening.wait_for_checkpoint,
        max_wait_secs=opening.max_wait_secs, stop=stop,
    )  # fmt: skip
    _note_recovery(plan, report)
    return session


def _adopt(plan: Plan[Any], opening: Opening, meeting: Meeting, announced: Announcement) -> Any:
    rank = plan.membership.rank
    while True:
        try:
            return plan.manager.adopt_session(opening.master, opening.config, announced.checkpoint, rank)
        except FileNotFoundError:
            # it may be pruned by now, and the chief has announced a later one
            earlier, announced = announced, meeting.adopt(opening.max_wait_secs)
            if announced == earlier:
                raise


def _note_recovery(plan: Plan[Any], report: RunReport) -> None:
    recovery = plan.manager.recovery
    _log.info("%s", recovery)
    report.restored = recovery.restored
    report.set_aside = recovery.set_aside
