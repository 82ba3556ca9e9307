"""The step boundary: the timer asks, the boundary acts.

What has to happen between two steps (a snapshot, a summary) is an *appointment*. Whoever finds out that one is due (the
timer, the step hook, a signal, the writer that is free again) only sets ``due``; the training thread looks at that one
attribute at each boundary, and does the work there, where nothing else moves the model.

On the races: ``due`` is set by any thread and cleared by the training thread alone, *before* it looks at what is due.
So a ring that comes while it looks is seen at the next boundary, and none is lost.
"""

from __future__ import annotations

import logging
import math
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Final

from supervise_core.coordinator import Coordinator
from supervise_core.triggers import Due, Firing, Trigger

_log = logging.getLogger(__name__)

_NEVER: Final = 1 << 62
_STEPS_UNHEARD: Final = 20
_LOOK_EVERY: Final = 1.0
"""Seconds between two looks at something that is due and was not done."""


class StepCounter:
    """The global step: the backend's, or, where the backend has none, counted here."""

    def __init__(self, read: Callable[[], int | None], counted: int = 0) -> None:
        self.read = read
        self.counted = counted

    @property
    def is_own(self) -> bool:
        """Whether the backend counts nothing."""
        return self.read() is None

    def now(self) -> int:
        """The step of this moment."""
        step = self.read()
        return self.counted if step is None else step


class Appointment:
    """Something to be done at step boundaries, when its trigger says so or somebody asks for it."""

    def __init__(
        self, boundary: StepBoundary, name: str, trigger: Trigger | None, action: Callable[[int], None], begun: Firing
    ) -> None:
        self.name = name
        self.beside: Callable[[], None] | None = None
        """What can be done without a boundary, by the timer's thread, where the loop comes to none."""
        self.cost: Callable[[], float] | None = None
        """What doing it costs the training loop, in seconds, where that is more than the time that it takes here."""
        self.agree: Callable[[], bool] | None = None
        """Where several processes do it together: asks for that; whether there is anybody to agree with. What is due at
        a step is due for all of them at that step, and needs no agreement."""
        self.skip: Callable[[int], None] | None = None
        """Where several processes do it together: says that it is not done at a step at which all expect it."""
        self.approaching = False
        """Whether it is due at this boundary or the next one, so that values of this very step are wanted."""
        self.fired_by_time = False
        """Whether it fired because time had passed, and not for this very step."""
        self._boundary = boundary
        self._trigger = trigger
        self._action = action
        self._last = begun
        self._lock = threading.Lock()
        self._requested = False
        self._granted = self._asked = False
        self._resumes_at = 0.0
        self._acting = self._postponed = False
        self._warned = False
        self._rung: tuple[float | None, float] = None, 0.0
        self.due = self._next()

    def request(self) -> None:
        """Have it done at the next boundary. From any thread."""
        self._requested = True
        self._boundary.ring()

    def postpone(self, seconds: float) -> None:
        """Have it done in that many seconds, and not before, whatever the trigger says. From any thread."""
        with self._lock:
            self._requested = False
            self._postponed = True
            self._resumes_at = self._boundary.clock.monotonic() + seconds
            self.due = self._next()
        self._boundary.reschedule()

    def plan_again(self) -> None:
        """Ask the trigger once more, as the cost is known better now. From any thread."""
        with self._lock:
            if self._acting or self._postponed or self.cost is None:
                return
            self._last = Firing(self._last.step, self._last.seconds, self.cost())
            self.due = self._next()
        self._boundary.reschedule()

    def is_due(self, step: int, now: float) -> bool:
        """Whether it is to be done at this step, at this second."""
        due = self.due
        return (
            self._requested
            or (due.step is not None and step >= due.step)
            or (due.seconds is not None and now >= due.seconds)
        )

    def may_fire(self, step: int) -> bool:
        """Whether it is to be done here, being due: at this step for all, or by agreement."""
        return self.agree is None or self._granted or (self.due.step is not None and step >= self.due.step)

    def ask(self) -> None:
        """Ask once for the agreement that it needs."""
        if self.agree is not None and not self._asked:
            self._asked = self.agree()

    def grant(self) -> None:
        """It was agreed on for this boundary. On the training thread."""
        self._requested = self._granted = True

    def fire(self, step: int, now: float) -> None:
        """Do it if it is due, and plan the next time.

        Another thread may postpone it at any moment, the action being what makes it do so. Under the lock neither that
        nor what is planned here is lost.
        """
        with self._lock:
            if not self.is_due(step, now):
                return
            if self._postponed and not self._granted and now < self._resumes_at and self.skip is not None:
                self._last = Firing(step, self._last.seconds, self._last.cost)
                self.due = self._next()
                self.skip(step)
                return
            self.fired_by_time = not self._requested and (self.due.step is None or step < self.due.step)
            self._requested = self.approaching = self._postponed = False
            self._granted = self._asked = False
            self._acting = True
            self._last = Firing(step, now, self._last.cost)
            self.due = self._next()
        try:
            self._action(step)
        finally:
            with self._lock:
                self._acting = False
                if not self._postponed:
                    held = self._boundary.clock.monotonic() - now
                    self._last = Firing(step, now, held if self.cost is None else self.cost())
                    self.due = self._next()

    @property
    def was_overlooked(self) -> bool:
        """Whether it was said, since it was last done, that the loop comes to no boundary."""
        return self._warned

    def overlooked_at(self) -> float | None:
        """The second from which on the loop must be said to come to no boundary."""
        due = self.due.seconds
        if due is None:
            return None
        rung_for, rung_at = self._rung
        return (rung_at if rung_for == due else due) + (due - self._last.seconds)

    def look_if_overlooked(self, now: float) -> None:
        """When it has been due for a whole further interval and no boundary came: say so once, and do what can be done
        beside the loop."""
        due = self.due.seconds
        if due is not None and self._rung[0] != due:
            self._rung = due, now  # this thread may be late itself, and the loop heard of it only now
        overlooked = self.overlooked_at()
        if due is None or overlooked is None or now < overlooked:
            return
        if not self._warned:
            self._warned = True
            _log.warning(
                "%s have been due for %.1f s and the training loop has come to no step boundary; "
                "call sv.should_stop() in the loop, or take its items from sv.batches(...)%s",
                self.name,
                now - due,
                "" if self.beside is None else ". Until then they are taken beside the loop, and may mix two steps",
            )
        if self.beside is not None:
            with self._lock:
                self._last = Firing(self._last.step, now, self._last.cost)
                self.due = self._next()
            self.beside()

    def _next(self) -> Due:
        due = Due() if self._trigger is None else self._trigger.next_due(self._last)
        if not self._postponed:
            return due
        return Due(step=due.step if self.skip is not None else None, seconds=self._resumes_at)


class BoundaryMeeting(ABC):
    """Where the training threads of several processes meet."""

    @abstractmethod
    def arrive(self, step: int) -> None:
        """This one stands at a boundary."""

    @abstractmethod
    def meet(self, step: int) -> None:
        """Wait while they agree, and do what was agreed on for this boundary."""

    @abstractmethod
    def is_pending(self) -> bool:
        """Whether this one is wanted at its next boundary."""


class StepBoundary:
    """The appointments of one run, and the flag that the training thread looks at."""

    def __init__(self, coordinator: Coordinator, steps: StepCounter, steps_are_watched: bool) -> None:
        self.due = True
        self.clock = coordinator.clock
        self.training_thread = threading.get_ident()
        self.meeting: BoundaryMeeting | None = None
        self._coordinator = coordinator
        self._steps = steps
        self._watched = steps_are_watched
        self._appointments: list[Appointment] = []
        self._last_appointments: list[Appointment] = []
        self._alarm_step = _NEVER
        self._reached = self._heard = False
        self._rescheduled = threading.Event()
        coordinator.on_stop(lambda _: self._stop())

    def appoint(
        self, name: str, trigger: Trigger | None, action: Callable[[int], None], *, last: bool = False
    ) -> Appointment:
        """Have ``action(step)`` called at a boundary when the trigger says so; ``last``: after all the others there."""
        begun = Firing(self._steps.now(), self.clock.monotonic())
        appointment = Appointment(self, name, trigger, action, begun)
        (self._last_appointments if last else self._appointments).append(appointment)
        self.reschedule()
        return appointment

    @property
    def heard_the_stop(self) -> bool:
        """Whether the loop came to a boundary since a stop was requested, and so was told of it."""
        return self._heard

    @property
    def was_reached(self) -> bool:
        """Whether the loop ever came to one."""
        return self._reached

    def ring(self) -> None:
        """Have the training thread look at its next boundary. From any thread."""
        self.due = True

    def reschedule(self) -> None:
        """Tell the training thread and the timer that a due moment has changed. From any thread."""
        self.due = True
        self._rescheduled.set()

    def step_taken(self, step: int) -> None:
        """The backend's step hook."""
        if step >= self._alarm_step:
            self.due = True
            if step == self._alarm_step + _STEPS_UNHEARD:
                self.warn_of_no_boundary(step)

    def warn_of_no_boundary(self, step: int) -> None:
        """Say that the loop runs without supervision, if it never came to a boundary and nothing said so yet."""
        said = any(appointment.was_overlooked for appointment in (*self._appointments, *self._last_appointments))
        if not self._reached and not said:
            _log.warning(
                "step %d, and the training loop has come to no step boundary: nothing is saved or summarised while it "
                "runs, and no stop is heard. Call sv.should_stop() in each round, or iterate over sv.batches(...).",
                step,
            )

    def reach(self, step: int) -> None:
        """Do what is due; on the training thread, between two steps."""
        self._reached = True
        if self.meeting is not None:
            self._meet(self.meeting, step)
        self._heard = self._coordinator.should_stop()
        self.due = False
        now = self.clock.monotonic()
        fired = False
        for appointment in (*self._appointments, *self._last_appointments):
            if not appointment.is_due(step, now):
                continue
            if not appointment.may_fire(step):
                self.due = True  # it may have become due only after the others could be asked here
                continue
            fired = True
            self._fire(appointment, step, now)
        self._set_alarm(step)
        if fired:
            self._rescheduled.set()

    def _meet(self, meeting: BoundaryMeeting, step: int) -> None:
        """What is due and needs agreement is asked for once this thread is known to stand here."""
        meeting.arrive(step)
        now = self.clock.monotonic()
        for appointment in (*self._appointments, *self._last_appointments):
            if appointment.is_due(step, now) and not appointment.may_fire(step):
                appointment.ask()
        meeting.meet(step)

    def _fire(self, appointment: Appointment, step: int, now: float) -> None:
        try:
            appointment.fire(step, now)
        except Exception as error:
            self._coordinator.request_stop(error, source=f"service {appointment.name!r}")

    def _set_alarm(self, step: int) -> None:
        """Ring again one step before the next appointment (it may want values of that very step), and at it."""
        due_steps: list[int] = []
        for appointment in (*self._appointments, *self._last_appointments):
            if (due := appointment.due.step) is not None:
                appointment.approaching = step + 1 >= due
                due_steps.append(due)
        nearest = min(due_steps, default=_NEVER)
        self._alarm_step = nearest - 1 if step < nearest - 1 else nearest
        polling = nearest != _NEVER and not self._watched
        wanted = self.meeting is not None and self.meeting.is_pending()  # also if it was rung for just now
        if polling or wanted or self._steps.is_own or self._coordinator.should_stop():
            self.due = True

    def _stop(self) -> None:
        self.due = True
        self._rescheduled.set()

    # ---- the timer's thread

    def keep_time(self) -> None:
        """Ring whenever an appointment becomes due by the clock, until the run stops."""
        while True:
            self._rescheduled.clear()
            if self._coordinator.should_stop():  # only now, or the ring of a stop between the two were lost
                return
            now = self.clock.monotonic()
            self.clock.wait(self._rescheduled, self._sleep(now))

    def _sleep(self, now: float) -> float | None:
        moments: list[float] = []
        for appointment in (*self._appointments, *self._last_appointments):
            due = appointment.due.seconds
            if due is None:
                continue
            if due > now:
                moments.append(due)
                continue
            appointment.approaching = True
            self.due = True
            appointment.look_if_overlooked(now)
            overlooked = appointment.overlooked_at()
            if overlooked is not None:
                moments.append(overlooked if overlooked > now else now + _LOOK_EVERY)
        nearest = min(moments, default=math.inf)
        return None if nearest == math.inf else nearest - now
