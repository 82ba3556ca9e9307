"""Training once more after an error that is worth another try, such as a peer that was preempted."""

from __future__ import annotations

import gc
import logging
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable
from numbers import Integral, Real
from typing import Any, TypeVar

from supervise_core.backend import Backend
from supervise_core.clock import Clock, SystemClock

_log = logging.getLogger(__name__)

T = TypeVar("T")


def retry(
    train: Callable[[], T],
    recoverable: Backend[Any] | type[Backend[Any]] | tuple[type[BaseException], ...],
    *,
    restarts: int = 10,
    window: float = 3600.0,
    first_wait: float = 1.0,
    longest_wait: float = 60.0,
    clock: Clock | None = None,
) -> T:
    """Call ``train()`` again whenever it ends with a recoverable error; what it returns in the end::

        def train():
            with sv.managed_session() as sess:
                while not sv.should_stop():
                    step(sess)

        retry(train, sv.backend)

    What brings a try back to the last checkpoint is the session that it opens, so the Supervisor needs a ``logdir``.

    Waits and limit look at the same thing, the restarts that began within the last ``window`` seconds. The wait doubles
    with each of them, so it is the first one again once a try has lasted that long. When there are as many as allowed,
    the error is raised as it is, with a note. What is no ``Exception``, such as ``KeyboardInterrupt``, always passes.

    No try keeps the memory of the one before it: the local variables of the frames that the error came through are
    cleared, and garbage is collected.

    :param recoverable: a backend, the class of one, or a tuple of exception types.
    :param restarts: how many restarts may begin within ``window`` seconds.
    :param first_wait: seconds before the first restart.
    :param longest_wait: seconds that no wait exceeds.
    :param clock: what time it is.
    :raises TypeError: if an argument is not of its kind.
    :raises ValueError: if one has an impossible value, or nothing is recoverable.
    """
    if not callable(train):
        raise TypeError(f"train= takes a function without arguments, not {train!r}")
    kinds = _types_of(recoverable)
    _check_numbers(restarts, window=window, first_wait=first_wait, longest_wait=longest_wait)
    if clock is not None and not isinstance(clock, Clock):
        raise TypeError(f"clock= takes a Clock, not {clock!r}")
    clock = clock or SystemClock()
    handled = sys.exception()
    begun: deque[float] = deque()
    while True:
        try:
            return train()
        except kinds as error:
            if not isinstance(error, Exception):
                raise
            now = clock.monotonic()
            while begun and now - begun[0] >= window:
                begun.popleft()
            if len(begun) >= restarts:
                error.add_note(
                    f"Not tried again: {len(begun)} restarts in the last {now - begun[0]:.0f} s did not help, "
                    f"and {restarts} in {window:g} s are allowed."
                )
                raise
            wait = min(longest_wait, first_wait * 2.0 ** min(len(begun), 1000))
            said = f": {error}" if str(error) else ""
            _log.warning(
                "training ended with %s%s; restart %d of %d (in %g s) follows in %g s",
                type(error).__name__, said, len(begun) + 1, restarts, window, wait,
            )  # fmt: skip
            _let_go(error, handled)
        # Outside of the handler: there the next try would be one while an error is handled.
        gc.collect()  # a Supervisor that the try made is in cycles, and holds the model
        clock.wait(threading.Event(), wait)
        begun.append(clock.monotonic())


def _let_go(error: BaseException, handled: BaseException | None) -> None:
    """Clear the variables of the frames of an error and of those behind it, up to what the caller was handling.

    To forget the error would not do: the coordinator and log records keep it, too.
    """
    seen: set[int] = set()
    left: list[BaseException | None] = [error]
    while left:
        one = left.pop()
        if one is None or one is handled or id(one) in seen:
            continue
        seen.add(id(one))
        traceback.clear_frames(one.__traceback__)
        left += [one.__cause__, one.__context__]
        if isinstance(one, BaseExceptionGroup):
            left += one.exceptions


def _types_of(recoverable: Any) -> tuple[type[BaseException], ...]:
    hint = "pass the types of those that are worth another try, such as (ConnectionError,)"
    kinds, whose = recoverable, "an empty tuple"
    if isinstance(recoverable, Backend) or (isinstance(recoverable, type) and issubclass(recoverable, Backend)):
        owner = recoverable if isinstance(recoverable, type) else type(recoverable)
        kinds, whose = recoverable.recoverable, f"the backend {owner.__name__}"
    if kinds == ():
        raise ValueError(f"{whose} calls no error recoverable; {hint}")
    if isinstance(kinds, tuple) and all(isinstance(kind, type) and issubclass(kind, BaseException) for kind in kinds):
        return kinds
    raise TypeError(f"recoverable= takes a Backend or a tuple of exception types, not {kinds!r}; {hint}")


def _check_numbers(restarts: Any, **times: Any) -> None:
    if isinstance(restarts, bool) or not isinstance(restarts, Integral):
        raise TypeError(f"restarts= takes a whole number, not {restarts!r}")
    if not int(restarts) > 0:
        raise ValueError(f"restarts= takes a positive number, not {restarts!r}")
    for name, seconds in times.items():
        if isinstance(seconds, bool) or not isinstance(seconds, Real):
            raise TypeError(f"{name}= takes a number of seconds, not {seconds!r}")
        if not 0 < float(seconds) < float("inf"):
            raise ValueError(f"{name}= takes a positive number of seconds, not {seconds!r}")
    if times["first_wait"] > times["longest_wait"]:
        raise ValueError(f"first_wait={times['first_wait']!r} is more than longest_wait={times['longest_wait']!r}")
