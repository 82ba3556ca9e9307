"""What a run does with the others: how its stops become those of all, and how those of others become its own."""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable
from typing import Any, Final

from supervise_core.agreement import Decision, StepAgreement, StopWish
from supervise_core.boundary import BoundaryMeeting, StepBoundary, StepCounter
from supervise_core.chief import Chief
from supervise_core.coordinator import Coordinator, StopCause
from supervise_core.errors import MemberFailedError, MemberLostError, MembershipError, StragglersError
from supervise_core.member import Hearing, Member
from supervise_core.membership import Membership
from supervise_core.pages import Announcement, End
from supervise_core.signals import StopSignals
from supervise_core.watchdog import Watchdog
from supervise_core.worker import Worker

_log = logging.getLogger(__name__)

OTHERS: Final = "the other processes of the run"
"""The source of an end that came from them in the midst of a step, and not by agreement."""

_AGREED: Final = "an agreed stop"
_MERCY: Final = 2.0
"""Seconds after which a process that the others have given up is ended by its own timer."""

_OVERDUE: Final = "the watchdog"


def _never(_: StopCause) -> bool:
    return False


class Meeting(BoundaryMeeting):
    """One run among the processes that it belongs to. Alone, nothing of it does anything."""

    def __init__(self, membership: Membership, coordinator: Coordinator, signals: StopSignals, grace: float) -> None:
        self.membership = membership
        self.member: Member | None = None
        self.save: Callable[[], None] = lambda: None
        """Has a checkpoint taken at this very boundary."""
        self._coordinator = coordinator
        self._signals = signals
        self._grace = grace
        self._boundary: StepBoundary | None = None
        self._steps: StepCounter | None = None
        self._has_told_failure = False
        self._has_heard_stop = False
        """Whether it was another process that asked for a stop: to be told so again, as of this one, would mislead."""
        self._watchdog = Watchdog(grace, coordinator.clock, self._say_last_words)
        self._agreement = StepAgreement(self._present_step, self._ring, coordinator.clock, self._hear_decision)

    # ---- the way of a run

    def join(self) -> None:
        """Take part from now on.

        :raises ConnectionError: if the place where the members meet cannot be reached.
        """
        hearing = Hearing(self._stop_as, self._fail)
        if self.membership.is_synchronous:
            hearing.beat = lambda: self._watchdog.feed(self.membership.patience.silence + _MERCY)
        self.member = self.membership.join(self._agreement, hearing, self._coordinator.clock)
        if self.member is not None:
            self._coordinator.defer = self._hand_on
            self._coordinator.on_stop(self._watchdog.arm)
            cause = self._coordinator.cause
            if cause is not None and not self._has_heard_stop:  # it came before there was anybody to tell
                self._hand_on(cause)

    @property
    def is_synchronous(self) -> bool:
        """Whether stops and checkpoints are those of all processes."""
        return self.member is not None and self.membership.is_synchronous

    @property
    def chief(self) -> Chief | None:
        """This process as the chief of others."""
        return self.member if isinstance(self.member, Chief) else None

    @property
    def worker(self) -> Worker | None:
        """This process as one of others that have a chief."""
        return self.member if isinstance(self.member, Worker) else None

    def adopt(self, max_wait_secs: float) -> Announcement:
        """Wait for the chief's model; from then on this process trains with the others.

        :raises NotReadyError, MembershipError, SessionStateError: as nothing comes of it.
        """
        assert self.member is not None
        return self.member.await_ready(max_wait_secs, self._coordinator.should_stop)

    def begin(
        self, boundary: StepBoundary, steps: StepCounter, announcement: Announcement, max_wait_secs: float
    ) -> None:
        """The model is here: tell the others, and begin; where all train in step, when all have it.

        :raises NotReadyError, MembershipError, SessionStateError: as nothing comes of it.
        """
        if self.member is None:
            return
        self._steps, self._boundary = steps, boundary
        if self.chief is not None:
            self.chief.announce(announcement)
        if self.is_synchronous:
            boundary.meeting = self
            if self.chief is not None:
                self.chief.await_all(max_wait_secs, self._coordinator.should_stop)
            if self.worker is not None:
                self.worker.await_go(max_wait_secs, self._coordinator.should_stop)
            self._agreement.begin()

    def renew(self, announcement: Announcement) -> None:
        """A later checkpoint is there: where each trains on its own, who comes from now on takes that one."""
        if self.chief is not None and self._steps is not None and not self.is_synchronous:
            self.chief.announce(announcement)

    def tell_failure(self, cause: StopCause) -> None:
        """This process fails, in the midst of a step or before all have begun: the others are not to wait for it."""
        if self.member is not None:
            self._has_told_failure = True
            self.member.tell_failure(str(cause))

    def explain(self, error: BaseException) -> None:
        """Note whose process was gone when a step failed here. It takes a while: the run is to know of it before."""
        if self.member is not None and self.is_synchronous and (gone := self.member.gone()):
            error.add_note(f"{', '.join(gone)}: that may be why.")

    def end(self, step: int) -> None:
        """No further step is made here, and whatever is asked for from now on is for this process alone."""
        self._watchdog.disarm()
        self._agreement.end(step)
        self._coordinator.defer = _never
        if self._boundary is not None:
            self._boundary.meeting = None

    def leave(self, failure: StopCause | None, cause: StopCause | None, step: int) -> None:
        """Say how it ended; safe to call twice."""
        member, self.member = self.member, None
        if member is None:
            return
        if failure is not None or self._has_told_failure:
            member.leave(End("failed", str(failure or cause), step, self.membership.rank))
            if failure is not None and failure.error is not None and not isinstance(failure.error, MemberFailedError):
                self.membership.record_failure(failure.error)
        else:
            member.leave(End("done", str(cause), step, self.membership.rank))

    def state(self, name: str, value: Any) -> None:
        """Say what must be the same for all that train in step."""
        if self.member is not None and self.is_synchronous:
            self.member.state(name, value)

    # ---- at a boundary, on the training thread

    def wish_save(self) -> bool:
        """Have all take a checkpoint; whether there is anybody to agree with."""
        return self.member is not None and self.member.wish()

    def arrive(self, step: int) -> None:
        """The training thread stands at a boundary."""
        self._agreement.rest(step)

    def meet(self, step: int) -> None:
        """Wait while the members agree, and do what they agreed on for this boundary."""
        decisions = self._agreement.pass_boundary(step, self._grace)
        if decisions is None:
            lacking = "" if self.member is None else self.member.lacking()
            self._fail(MemberLostError(f"no step could be agreed on within {self._grace:g} s; waiting for {lacking}"))
        for decision in decisions or ():
            if decision.stop is None:
                self.save()
            else:
                self._stop_as(decision.stop)

    def is_pending(self) -> bool:
        """Whether the training thread is wanted at its next boundary."""
        return self._agreement.is_pending()

    def _present_step(self) -> int:
        return 0 if self._steps is None else self._steps.now()

    def _ring(self) -> None:
        if self._boundary is not None:
            self._boundary.ring()

    # ---- stops

    def _hear_decision(self, decision: Decision) -> None:
        if decision.stop is not None:
            self._watchdog.arm(decision.stop.text)

    def _hand_on(self, cause: StopCause) -> bool:
        """A stop is asked for here: have all stop. Whether they will, at a step that is agreed on."""
        member = self.member
        if member is None or self._has_told_failure or isinstance(cause.error, MembershipError):
            return False
        first = self._signals.first
        number = int(first) if first is not None and cause.source == f"signal {first.name}" else None
        heard = member.wish(StopWish(str(cause), self.membership.rank, number, cause.error is not None))
        deferred = heard and self.is_synchronous
        if deferred:
            self._watchdog.arm(cause)
        return deferred

    def _stop_as(self, wish: StopWish) -> None:
        self._has_heard_stop = self._has_heard_stop or wish.rank != self.membership.rank
        if wish.signal is not None:
            self._signals.heed(signal.Signals(wish.signal))
        if wish.rank == self.membership.rank:
            self._coordinator.request_stop(source=wish.text, at_once=True)
        elif wish.is_error:
            self._coordinator.request_stop(MemberFailedError(wish.rank, wish.text), source=_AGREED, at_once=True)
        else:
            self._coordinator.request_stop(source=f"{wish.text}, on rank {wish.rank}", at_once=True)

    def _say_last_words(self, reason: str) -> None:
        failure = StopCause(_OVERDUE, StragglersError(self._grace, {"the training thread": reason}))
        self.leave(failure, None, self._present_step())

    def _fail(self, error: MembershipError) -> None:
        if self._has_told_failure and isinstance(error, MemberFailedError) and error.rank == self.membership.rank:
            return  # what this process said itself, and knows better; it may also be of an earlier life of this rank
        self._coordinator.request_stop(error, source=OTHERS, at_once=True)
        self._ring()
