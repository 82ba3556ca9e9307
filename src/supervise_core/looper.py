"""A thread that does one thing again and again until the run stops."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from supervise_core.coordinator import Coordinator
from supervise_core.errors import PolicyError


class Looper(threading.Thread):
    """Calls ``target`` at once, and then every ``interval`` seconds, counted from the start; None is back to back.

    A run that took longer than the interval is followed by one run, not by those that were missed. The thread notices
    a stop at once; a run in progress is never interrupted. An exception of the target stops the run. It is registered
    with the coordinator when it is made, and a daemon: a target that never returns must not keep the process alive.
    """

    def __init__(
        self,
        coordinator: Coordinator,
        interval: float | None,
        target: Callable[..., object],
        args: Iterable[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        *,
        name: str | None = None,
    ) -> None:
        """:raises PolicyError: if the interval is not positive. :raises TypeError: if the target cannot be called."""
        if interval is not None and not 0 < interval < float("inf"):
            raise PolicyError(f"a loop's interval is a positive number of seconds or None, not {interval!r}")
        if not callable(target):
            raise TypeError(f"a loop needs something to call, not {target!r}")
        called = getattr(target, "__qualname__", type(target).__qualname__)
        super().__init__(name=name or f"loop {called}", daemon=True)
        self._coordinator = coordinator
        self._interval = interval
        self._call = functools.partial(target, *args, **(kwargs or {}))
        coordinator.register(self)

    @classmethod
    def loop(
        cls,
        coordinator: Coordinator,
        interval: float | None,
        target: Callable[..., object],
        args: Iterable[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Looper:
        """Make one and start it."""
        looper = cls(coordinator, interval, target, args, kwargs)
        looper.start()
        return looper

    def run(self) -> None:
        """The body of the thread."""
        with self._coordinator.stop_on_exception(f"service {self.name!r}"):
            self.start_loop()
            due = self._coordinator.clock.monotonic()
            while not self._coordinator.should_stop():
                self._call()
                if self._interval is not None:
                    due = self._wait_until_next(due, self._interval)
            self.stop_loop()

    def start_loop(self) -> None:
        """Called once, in this thread, before the first call."""
        return None

    def stop_loop(self) -> None:
        """Called once, in this thread, after the last call; not if a call failed."""
        return None

    def _wait_until_next(self, due: float, interval: float) -> float:
        now = self._coordinator.clock.monotonic()
        missed = max(0, int((now - due) / interval))
        following = due + (missed + 1) * interval
        self._coordinator.wait_for_stop(following - now)
        return following
