"""What is saved of a run, and which moment the last checkpoint of it holds."""

from __future__ import annotations

import importlib.metadata
import logging
import math
import platform
import sys
from collections.abc import Callable, Mapping
from typing import Any, Final

from supervise_core.boundary import StepBoundary
from supervise_core.checkpoint_store import CheckpointStore
from supervise_core.checkpointer import Checkpointer, CheckpointLabels
from supervise_core.coordinator import Coordinator
from supervise_core.data_loop import DataLoop
from supervise_core.errors import SessionStateError, UnsupportedStateError
from supervise_core.gathering import AddingShares, Gathering, ShareGathering
from supervise_core.handover import PendingSave
from supervise_core.host import available_memory
from supervise_core.meeting import Meeting
from supervise_core.pages import Announcement
from supervise_core.plan import Plan
from supervise_core.report import RunReport
from supervise_core.snapshot import Snapshot
from supervise_core.staging import Arrived, Outline, Staging
from supervise_core.summaries import EventSink
from supervise_core.tagged_json import encode
from supervise_core.triggers import AtSteps

_log = logging.getLogger(__name__)

_WORTH_PREPARING: Final = 32 << 20
"""Bytes of memory: less than that is found within the first save."""

_VERSIONED: Final = ("supervise-core", "numpy", "torch", "tensorflow")


class RunSaver:
    """Puts together what a checkpoint holds: the model's state, the data's position, metrics, and this step's events.

    On a stop the last checkpoint holds the boundary at which the loop was told so. What the program does from there to
    the end of its block (validating, stepping a scheduler as if an epoch had ended) is not training.
    """

    def __init__(
        self,
        plan: Plan[Any],
        store: CheckpointStore,
        snapshot: Callable[[Any, Staging], Snapshot],
        session: object,
        loop: DataLoop,
        boundary: StepBoundary,
        coordinator: Coordinator,
        events: EventSink | None,
        report: RunReport,
        metrics: Mapping[str, float],
        meeting: Meeting,
    ) -> None:
        self._plan = plan
        self._snapshot = snapshot
        self._session = session
        self._loop = loop
        self._boundary = boundary
        self._coordinator = coordinator
        self._events = events
        self._report = report
        self._meeting = meeting
        self._metrics: tuple[int, dict[str, float]] = (report.first_step, dict(metrics))
        self._has_asked_for_metrics = False
        """Whether the metrics asked for a checkpoint that all processes are still to agree on."""
        self._carries_metrics = False
        """Whether the snapshot of this boundary is that one, and has the metrics, whatever step it is of."""
        self._held_position: object = None
        self._told_at: int | None = None
        self._warned = self._warned_of_concurrency = self._ended = False
        labels = CheckpointLabels(plan.backend.name, _versions())
        gathering = Gathering()
        if meeting.is_synchronous:
            gathering = AddingShares() if meeting.chief is None else ShareGathering(meeting.chief)
        self.is_shared_out = False
        """Whether only the snapshots of all processes together are the state, by the last one that was taken."""
        self.checkpointer = Checkpointer(
            store, plan.keep, labels, self._capture, coordinator, report, self._committed, gathering
        )
        if meeting.is_synchronous:
            self.checkpointer.agree = meeting.wish_save
            meeting.save = self._grant

    def note_metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Keep metrics for the checkpoint of this step, and have it taken if they decide what is kept."""
        known = self._metrics[1] if self._metrics[0] == step else {}
        self._metrics = (step, known | dict(values))
        alone = not self._meeting.is_synchronous
        if not self.checkpointer.metrics_ranked & values.keys() or not (alone or self._meeting.chief is not None):
            return
        if alone and self.checkpointer.is_serving and self._loop.position_at_stop() is not None:
            self.checkpointer.save(step, wait=True)  # now: at the next boundary the model may be a step further
        else:
            self._has_asked_for_metrics = not alone
            self.checkpointer.request()

    def _grant(self) -> None:
        """All processes take a checkpoint at this boundary."""
        self._carries_metrics, self._has_asked_for_metrics = self._has_asked_for_metrics, False
        self.checkpointer.grant()

    def hold_at_stop(self) -> None:
        """On a stop, take the snapshot of this boundary, if it is one that may be saved and was not taken already."""
        if not self.checkpointer.is_serving or self._loop.is_over:
            return
        step = self._loop.steps.now()
        if step in (self._told_at, self._report.first_step):
            return
        self._told_at = step  # until a further step is made, what follows is not training
        position = self._loop.position_at_stop()
        if position is None:
            return
        if self.checkpointer.held_step != step or self._held_position != position:
            self._hold_final(step)

    def hold_at_exhaustion(self) -> None:
        """At the end of a pass: a stop may come before the next boundary, and this is the last exact state so far."""
        if self.checkpointer.is_serving:
            self.checkpointer.hold(self._loop.steps.now())

    def take_last(self, asked: bool, withheld: str) -> str:
        """Decide what the final save holds, and have it written. What became of it, in words.

        ``asked``: whether a stop was asked for before the block ended. ``withheld``: why there must be none, or "".
        """
        checkpointer, step = self.checkpointer, self._loop.steps.now()
        if not checkpointer.is_serving:
            return "switched off"
        if withheld:
            checkpointer.drop()
            return f"withheld: {withheld}"
        unseen = self._loop.steps.is_own and not self._boundary.was_reached
        known = self._report.restored is not None or self._meeting.is_synchronous
        if step == self._report.first_step and not unseen and (asked or known):
            return "nothing new: no step was made"
        self._ended = not asked
        if not asked or (step not in (checkpointer.held_step, self._told_at) and self._loop.position_at_stop()):
            if self._loop.position() is not None:
                self._boundary.reach(step)
            if not self._hold_final(step):
                return "failed: no snapshot could be taken"
        held = checkpointer.held_step
        if not checkpointer.submit_final():
            return "nothing new: the block was left in the middle of a step, after the newest checkpoint"
        if held != step:
            _log.warning("left at step %d in the middle of a step; the last exact state is of step %s", step, held)
        return f"step {held}"

    def _hold_final(self, step: int) -> bool:
        try:
            self.checkpointer.hold_final(step)
        except Exception as error:
            failure = SessionStateError(
                f"the last step could not be saved, as its state could not be read any more ({error}); "
                "let the session be closed after the end of the block, or after sv.stop()"
            )
            failure.__cause__ = error
            is_plain = self._coordinator.is_failure(error)  # not so when the session is closed already
            self._coordinator.request_stop(error if is_plain else failure, source="the final snapshot")
            return False
        return True

    def _capture(self, step: int, arrived: Arrived | None) -> PendingSave:
        self._warn_of_repetition()
        self._held_position = position = self._loop.position_at_end(ended=self._ended)
        events = [] if self._events is None else self._events.events_of(step)
        state = {"data": position, "events": events, "began": self._report.first_step}
        if self._meeting.is_synchronous:
            state["ranks"] = self._meeting.membership.size
        run_state = encode(state, "the data's position")
        with self._plan.staging.taking(arrived) as staging:
            snapshot = self._snapshot(self._session, staging)
        self._check_pieces(snapshot)
        metrics = self._metrics[1] if self._metrics[0] == step or self._carries_metrics else {}
        self._carries_metrics = False
        if not snapshot.consistent:
            self._warn_of_concurrency()
        taken_at = step if snapshot.step is None else snapshot.step
        return PendingSave(taken_at, snapshot, run_state, metrics, consistent=snapshot.consistent)

    def _check_pieces(self, snapshot: Snapshot) -> None:
        self.is_shared_out = bool(snapshot.pieces)
        if self.is_shared_out and not self._meeting.is_synchronous:
            raise UnsupportedStateError(
                snapshot.pieces[0],
                "it holds pieces of tensors that several processes share out among them, and this run knows nothing of "
                "the others; pass a membership= that is synchronous",
            )

    def prepare_for_first_step(self, step: int) -> None:
        """Have memory for what the first step adds to the state: as far as it is foreseen, and once it is there."""
        if self._snapshot == self._plan.backend.snapshot:
            self._prepare(self._plan.backend.foresee, most=available_memory() // 2)
        self._boundary.appoint("memory for checkpoints", AtSteps(step + 1), lambda _: self._prepare(self._snapshot))

    def _prepare(self, put: Callable[[Any, Outline], object], most: float = math.inf) -> None:
        """Have memory for the state as ``put`` says that it is, made by the writer: the next save finds it there."""
        staging = self._plan.staging
        outline = Outline()
        outline.keeps_shared_parts = staging.keeps_shared_parts
        put(self._session, outline)
        if _WORTH_PREPARING <= staging.lacks(outline) <= most:
            self.checkpointer.prepare(lambda: staging.reserve(outline))

    def save_beside(self) -> None:
        """Save without a boundary; on the timer's thread, while training runs."""
        try:
            self.checkpointer.save_beside(self._capture_beside)
        except Exception as error:
            _log.error("no checkpoint could be taken beside the training loop: %s", error, exc_info=error)
            self._report.failed_saves += 1

    def _capture_beside(self) -> PendingSave:
        with self._plan.staging.taking() as staging:
            snapshot = self._snapshot(self._session, staging)
        steps = self._loop.steps
        if steps.is_own:
            steps.counted += 1  # nothing else counts in a loop that comes to no boundary
        step = steps.now() if snapshot.step is None else snapshot.step
        run_state = encode({"data": None, "events": [], "began": self._report.first_step}, "the data's position")
        return PendingSave(step, snapshot, run_state, {}, consistent=False)

    def _warn_of_concurrency(self) -> None:
        if not self._warned_of_concurrency:
            self._warned_of_concurrency = True
            _log.warning(
                "another thread made a step while a checkpoint was taken, which may mix two steps and is marked so. "
                "Have the thread that opened the session train, or let the others pause while it asks should_stop()."
            )

    def _warn_of_repetition(self) -> None:
        if self._loop.is_mid_epoch() and not self._warned:
            self._warned = True
            _log.warning(
                "a checkpoint is taken inside an epoch of sv.epochs whose items do not come from sv.batches; a resumed "
                "run begins this epoch anew. Take the items from sv.batches(...) to go on with the next one."
            )

    def _committed(self, name: str, step: int) -> None:
        self._meeting.renew(Announcement(name, step))
        logdir = self._plan.logdir
        if self._events is not None:
            self._events.add_session_log("CHECKPOINT", step, "" if logdir is None else str(logdir / name))
        self._plan.hooks.call("supervise_checkpoint_committed", name=name, step=step, logdir=logdir)


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in _VERSIONED:
        if name in ("supervise-core", "numpy") or name in sys.modules:
            try:
                found[name] = importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:
                continue
    return found
