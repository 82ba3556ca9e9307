"""TensorFlow's Coordinator and LooperThread, for programs that use them on their own."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any
from weakref import WeakKeyDictionary

import supervise_core
from supervise_core.coordinator import stack_of
from supervise_core.errors import StragglersError
from supervise_core.looper import Looper
from supervise_tf.inputs import is_end_of_input

ExcInfo = tuple[type[BaseException] | None, BaseException | None, TracebackType | None]


class Coordinator:
    """Coordinates the end of a set of threads; the interface is that of ``tf.train.Coordinator``.

    ``clear_stop`` begins a new round, with a coordinator of the core of its own. A thread of an earlier round that is
    still alive belongs to that round for ever: it goes on being told to stop, and what becomes of it stops nobody else.
    """

    def __init__(self, clean_stop_exception_types: Iterable[type[BaseException]] | None = None) -> None:
        """``clean_stop_exception_types`` stop a round without being errors; None is the end of an input."""
        if clean_stop_exception_types is None:
            self._is_clean_stop: Callable[[BaseException], bool] = is_end_of_input
        else:
            kinds = tuple(clean_stop_exception_types)
            self._is_clean_stop = lambda error: isinstance(error, kinds)
        self._lock = threading.Lock()
        self._newest = self._new_round()
        self._earlier: WeakKeyDictionary[threading.Thread, supervise_core.Coordinator] = WeakKeyDictionary()

    def request_stop(self, ex: BaseException | ExcInfo | None = None) -> None:
        """Ask the threads to stop; ``join`` raises the first error ``ex``, an exception or an ``exc_info`` triple.

        Later errors are kept as its notes. After a ``join`` there is nobody who could raise it, so it is raised here.

        :raises TypeError: if ``ex`` is something else.
        """
        error = ex[1] if isinstance(ex, tuple) else ex
        round_ = self._round
        if error is not None and round_ is self._newest and round_.joined and round_.is_failure(error):
            raise error
        round_.request_stop(error, source=f"thread {threading.current_thread().name!r}")

    def clear_stop(self) -> None:
        """Begin a new round, if a stop was requested: then nobody has asked for it, and nothing has failed."""
        if self._newest.should_stop():
            self.begin(self._new_round())
        else:
            self._newest.reopen()

    def should_stop(self) -> bool:
        """Whether a stop was requested."""
        return self._round.should_stop()

    @contextmanager
    def stop_on_exception(self) -> Generator[None, None, None]:
        """Hand any exception of the block to ``request_stop``, and end the block."""
        try:
            yield
        except BaseException as error:
            self.request_stop(error)

    def wait_for_stop(self, timeout: float | None = None) -> bool:
        """Wait for the stop, at most ``timeout`` seconds; whether it was requested."""
        return self._round.wait_for_stop(timeout)

    def register_thread(self, thread: threading.Thread) -> None:
        """Add a thread to those that ``join`` waits for."""
        self._round.register(thread)

    def join(
        self,
        threads: Iterable[threading.Thread] | None = None,
        stop_grace_period_secs: float = 120,
        ignore_live_threads: bool = False,
    ) -> None:
        """Wait for the registered threads and the given ones; from the stop on they have ``stop_grace_period_secs``.

        :raises BaseException: the first error that was reported, now and whenever it is called again.
        :raises StragglersError: (a ``RuntimeError``) if threads are left and not to be ignored; says where they are.
        """
        round_ = self._round
        stragglers = round_.join_threads(threads or (), stop_grace_period_secs)
        round_.raise_requested_exception()
        if stragglers and not ignore_live_threads:
            raise StragglersError(stop_grace_period_secs, {thread.name: stack_of(thread) for thread in stragglers})

    @property
    def joined(self) -> bool:
        """Whether ``join`` has ended in this round."""
        return self._round.joined

    def raise_requested_exception(self) -> None:
        """Raise the first error that was reported, if there is one."""
        self._round.raise_requested_exception()

    # ---- inside

    @property
    def _registered_threads(self) -> set[threading.Thread]:
        """Programs look at it by this name, which it has in TensorFlow."""
        return set(self._newest.registered_threads)

    @property
    def has_earlier_rounds(self) -> bool:
        """Whether a thread of an earlier round may still be alive."""
        return bool(self._earlier)

    @property
    def _round(self) -> supervise_core.Coordinator:
        """That of the calling thread."""
        if not self._earlier:
            return self._newest
        return self._earlier.get(threading.current_thread(), self._newest)

    def _new_round(self) -> supervise_core.Coordinator:
        return supervise_core.Coordinator(is_clean_stop=self._is_clean_stop)

    def begin(self, newest: supervise_core.Coordinator) -> None:
        """Make this the round of all threads but those that are left of earlier ones."""
        with self._lock:
            kept = {thread: round_ for thread, round_ in self._earlier.items() if thread.is_alive()}
            if self._newest.should_stop():
                kept = dict.fromkeys(self._newest.live_threads(), self._newest) | kept
            self._earlier = WeakKeyDictionary(kept)
            for thread in self._newest.registered_threads:  # nobody has joined for them
                newest.register(thread)
            self._newest = newest


class LooperThread(Looper):
    """A thread that calls something again and again; the interface is that of ``tf.train.LooperThread``.

    A subclass overrides ``run_loop``, and, if it likes, ``start_loop`` and ``stop_loop``.
    """

    def __init__(
        self,
        coord: Coordinator,
        timer_interval_secs: float | None,
        target: Callable[..., object] | None = None,
        args: Iterable[Any] | None = None,
        kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        """``timer_interval_secs`` None is back to back; the first call comes at once.

        :raises ValueError: if ``coord`` is no ``Coordinator``, the interval is not positive, or there are arguments and
            no target.
        """
        if not isinstance(coord, Coordinator):
            raise ValueError(f"coord is a Coordinator of supervise_tf, not {coord!r}")
        if target is None and (args or kwargs):
            raise ValueError("args and kwargs are for a target, and there is none")
        if target is not None and not callable(target):
            raise TypeError(f"a loop needs something to call, not {target!r}")
        self._target_of_loop = target
        self._arguments = tuple(args or ()), dict(kwargs or {})
        called = "LooperThread" if target is None else getattr(target, "__qualname__", type(target).__qualname__)
        name = f"loop {called}" if type(self) is LooperThread else f"loop {type(self).__qualname__}"
        super().__init__(coord._round, timer_interval_secs, self.run_loop, name=name)
        self._coord = coord

    @staticmethod
    def loop(  # type: ignore[override]
        coord: Coordinator,
        timer_interval_secs: float | None,
        target: Callable[..., object],
        args: Iterable[Any] | None = None,
        kwargs: Mapping[str, Any] | None = None,
    ) -> LooperThread:
        """Make one and start it."""
        looper = LooperThread(coord, timer_interval_secs, target, args, kwargs)
        looper.start()
        return looper

    def run(self) -> None:
        """The body of the thread, which belongs to the round that it is started in."""
        self._coordinator = self._coord._round
        super().run()

    def run_loop(self) -> None:
        """One run: call the target."""
        if self._target_of_loop is not None:
            args, kwargs = self._arguments
            self._target_of_loop(*args, **kwargs)
