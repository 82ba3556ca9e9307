"""The port for what runs beside training: your own service is one subclass, given to ``Supervisor(services=[...])``."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from supervise_core.boundary import Appointment, StepBoundary, StepCounter
from supervise_core.clock import Clock
from supervise_core.coordinator import Coordinator, StopSignal
from supervise_core.looper import Looper
from supervise_core.triggers import Trigger


class Service(ABC):
    """Something that runs while a session is open. An error of a service stops the run, and is raised at its end."""

    name: str
    """What messages and threads call it; the name of the class unless that says otherwise."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if not hasattr(cls, "name"):
            cls.name = cls.__name__

    @abstractmethod
    def start(self, context: ServiceContext) -> None:
        """Called on the training thread when the model is ready: make appointments, start loops and threads."""

    def stop(self) -> None:
        """Called on the training thread at the end, after the service's threads have been joined; also after errors."""
        return None


@dataclass(frozen=True, slots=True)
class ServiceContext:
    """What a service may know and do. ``logdir`` is None in a run that keeps nothing."""

    session: Any
    logdir: Path | None
    write_summary: Callable[[Mapping[str, Any], int], None]
    _coordinator: Coordinator
    _boundary: StepBoundary
    _steps: StepCounter

    @property
    def clock(self) -> Clock:
        return self._coordinator.clock

    @property
    def stop_signal(self) -> StopSignal:
        """Whether the run stops, and a wait for it."""
        return self._coordinator

    def global_step(self) -> int:
        """The step of this moment."""
        return self._steps.now()

    def request_stop(self, error: BaseException | None = None, source: str = "a service") -> None:
        """Ask the run to stop; with an error, which is raised at its end."""
        self._coordinator.request_stop(error, source=source)

    def at_boundary(
        self, name: str, trigger: Trigger | None, action: Callable[[int], None], *, last: bool = False
    ) -> Appointment:
        """Have ``action(step)`` called on the training thread, between two steps, whenever the trigger says so."""
        return self._boundary.appoint(name, trigger, action, last=last)

    def loop(
        self,
        interval: float | None,
        target: Callable[..., object],
        args: Iterable[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Looper:
        """Call ``target`` every ``interval`` seconds in a thread of its own."""
        return Looper.loop(self._coordinator, interval, target, args, kwargs)

    def join_at_end(self, thread: threading.Thread) -> None:
        """Have a thread that the service made itself joined when the run stops."""
        self._coordinator.register(thread)

    def thread(self, name: str, target: Callable[[], object]) -> threading.Thread:
        """Run ``target`` in a thread that is joined when the run stops."""

        def body() -> None:
            with self._coordinator.stop_on_exception(f"service {name!r}"):
                target()

        thread = threading.Thread(target=body, name=name, daemon=True)
        self._coordinator.register(thread)
        thread.start()
        return thread
