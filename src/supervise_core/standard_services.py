"""The services of every run: checkpoints, summaries, steps per second. Built on the same port as a user's own."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

from supervise_core.boundary import Appointment
from supervise_core.checkpointer import Checkpointer
from supervise_core.services import Service, ServiceContext
from supervise_core.summaries import EventSink, read_value
from supervise_core.triggers import Trigger

_log = logging.getLogger(__name__)

Summary = Callable[[Any], Mapping[str, Any] | bytes]


class CheckpointService(Service):
    """Takes a checkpoint whenever the trigger says so, and writes it on a thread of its own."""

    name = "checkpoints"

    def __init__(
        self, checkpointer: Checkpointer, trigger: Trigger | None, beside: Callable[[], None] | None = None
    ) -> None:
        self._checkpointer = checkpointer
        self._trigger = trigger
        self._beside = beside
        self.appointment: Appointment | None = None

    def start(self, context: ServiceContext) -> None:
        self._checkpointer.start()
        self.appointment = context.at_boundary(self.name, self._trigger, self._save(context), last=True)
        self.appointment.beside = self._beside
        self._checkpointer.serve(self.appointment)

    def _save(self, context: ServiceContext) -> Callable[[int], None]:
        def save(step: int) -> None:
            if not context.stop_signal.should_stop():  # then the final save is taken instead
                put_off = self.appointment is not None and self.appointment.fired_by_time
                self._checkpointer.save(step, wait=not put_off)

        return save


class SummaryService(Service):
    """Writes the backend's summary, and the values that the loop gave for this step, whenever the trigger says so."""

    name = "summaries"

    def __init__(self, events: EventSink, trigger: Trigger, summary: Summary | None) -> None:
        self._events = events
        self._trigger = trigger
        self._summary = summary
        self._values: dict[str, Any] = {}
        self._owed = False
        self._used = False
        self.appointment: Appointment | None = None

    def start(self, context: ServiceContext) -> None:
        self.appointment = context.at_boundary(self.name, self._trigger, lambda step: self._write(context, step))

    def offer(self, values: Mapping[str, Any]) -> None:
        """Read values of the present step; called only while a summary is due or approaching."""
        self._values |= {tag: read_value(value) for tag, value in values.items()}
        self._used = True
        if self._owed and self.appointment is not None:
            self.appointment.request()

    def _write(self, context: ServiceContext, step: int) -> None:
        values, self._values = self._values, {}
        if not self._owed and self._summary is not None:
            summary = self._summary(context.session)
            if isinstance(summary, bytes):
                self._events.add_serialized(summary, step)
            else:
                values = {tag: read_value(value) for tag, value in summary.items()} | values
        assert self.appointment is not None
        self._owed = self._used and not self._owed and not values and self.appointment.fired_by_time
        self.appointment.approaching = self._owed
        if values:
            self._events.add(values, step)


class StepRateService(Service):
    """Writes ``<step>/sec``: the steps since the last time, over the seconds since then."""

    name = "step rate"

    def __init__(self, events: EventSink, trigger: Trigger, step_name: str) -> None:
        self._events = events
        self._trigger = trigger
        self._tag = f"{step_name}/sec"

    def start(self, context: ServiceContext) -> None:
        last = (context.global_step(), context.clock.monotonic())

        def write(step: int) -> None:
            nonlocal last
            now = context.clock.monotonic()
            steps, seconds = step - last[0], now - last[1]
            last = (step, now)
            if seconds > 0:
                rate = steps / seconds
                self._events.add({self._tag: rate}, step, repeat=False)
                _log.info("%s: %.5g", self._tag, rate)

        context.at_boundary(self.name, self._trigger, write)
