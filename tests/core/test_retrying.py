"""Training once more: which errors, how often, how long between, and what a failed try leaves behind (nothing)."""

from __future__ import annotations

import gc
import logging
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from supervise_core import CheckpointDirectory, EverySteps, Supervisor, retry
from supervise_core.testing.clock import FakeClock
from supervise_numpy import ArrayBackend

LOGGER = "supervise_core.retrying"


class PeerLostError(Exception):
    """A test's own recoverable error."""


class ClusterBackend(ArrayBackend):
    recoverable: ClassVar[tuple[type[BaseException], ...]] = (PeerLostError, ConnectionError)


class WaitingClock(FakeClock):
    """A clock on which each wait is over at once, and written down."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[float | None] = []

    def wait(self, event: threading.Event, timeout: float | None) -> bool:
        self.waits.append(timeout)
        self.advance(timeout or 0.0)
        return event.is_set()


@pytest.fixture
def clock() -> WaitingClock:
    return WaitingClock()


class Tries:
    """A training function that lasts and ends as told; what is told last holds for all further tries."""

    def __init__(self, clock: FakeClock, *ends: object, lasting: float = 0.0) -> None:
        self.clock = clock
        self.ends = list(ends)
        self.lasting = lasting
        self.count = 0

    def __call__(self) -> object:
        end = self.ends[min(self.count, len(self.ends) - 1)]
        self.count += 1
        self.clock.advance(self.lasting)
        if isinstance(end, BaseException):
            raise end
        return end


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == LOGGER]


# ---- which errors


def test_what_training_returns_is_returned(clock: WaitingClock) -> None:
    tries = Tries(clock, "trained")
    assert retry(tries, (PeerLostError,), clock=clock) == "trained"
    assert tries.count == 1
    assert clock.waits == []


def test_a_recoverable_error_is_followed_by_another_try(clock: WaitingClock) -> None:
    tries = Tries(clock, PeerLostError(), ConnectionResetError(), "trained")
    assert retry(tries, ClusterBackend({}), clock=clock) == "trained"
    assert tries.count == 3


@pytest.mark.parametrize("recoverable", [ClusterBackend({}), ClusterBackend, (PeerLostError,)])
def test_a_backend_its_class_and_exception_types_say_what_is_recoverable(recoverable: Any, clock: WaitingClock) -> None:
    tries = Tries(clock, PeerLostError(), "trained")
    assert retry(tries, recoverable, clock=clock) == "trained"


def test_another_error_passes_at_once_and_untouched(clock: WaitingClock) -> None:
    error = ValueError("broken")
    tries = Tries(clock, PeerLostError(), error)
    with pytest.raises(ValueError, match="broken") as caught:
        retry(tries, ClusterBackend, clock=clock)
    assert caught.value is error
    assert not hasattr(error, "__notes__")
    assert error.__context__ is None
    assert tries.count == 2


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(143), GeneratorExit()])
def test_what_is_no_exception_is_never_retried(error: BaseException, clock: WaitingClock) -> None:
    tries = Tries(clock, error)
    with pytest.raises(type(error)) as caught:
        retry(tries, (BaseException,), clock=clock)
    assert caught.value is error
    assert not hasattr(error, "__notes__")
    assert tries.count == 1


def test_an_interrupt_ends_the_wait(clock: WaitingClock) -> None:
    class Interrupted(WaitingClock):
        def wait(self, event: threading.Event, timeout: float | None) -> bool:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as caught:
        retry(Tries(clock, PeerLostError()), (PeerLostError,), clock=Interrupted())
    assert caught.value.__context__ is None


# ---- how long between


def test_the_wait_doubles_up_to_the_longest(clock: WaitingClock) -> None:
    with pytest.raises(PeerLostError):
        retry(Tries(clock, PeerLostError()), (PeerLostError,), clock=clock)
    assert clock.waits == [1, 2, 4, 8, 16, 32, 60, 60, 60, 60]


def test_the_waits_are_arguments(clock: WaitingClock) -> None:
    with pytest.raises(PeerLostError):
        retry(Tries(clock, PeerLostError()), (PeerLostError,), restarts=4, first_wait=3, longest_wait=10, clock=clock)
    assert clock.waits == [3, 6, 10, 10]


def test_after_a_try_as_long_as_the_window_the_wait_is_the_first_again(clock: WaitingClock) -> None:
    lost = PeerLostError()

    def train() -> str:
        clock.advance(100 if len(clock.waits) == 3 else 0)
        if len(clock.waits) == 5:
            return "trained"
        raise lost

    assert retry(train, (PeerLostError,), window=100, clock=clock) == "trained"
    assert clock.waits == [1, 2, 4, 1, 2]


def test_the_wait_is_of_the_restarts_in_the_window(clock: WaitingClock) -> None:
    tries = Tries(clock, *[PeerLostError()] * 6, "trained", lasting=40)
    assert retry(tries, (PeerLostError,), window=100, clock=clock) == "trained"
    assert clock.waits == [1, 2, 4, 4, 4, 4]


def test_very_many_restarts_are_no_overflow(clock: WaitingClock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("supervise_core.retrying.gc.collect", lambda: 0)
    tries = Tries(clock, *[PeerLostError()] * 1500, "trained")
    assert retry(tries, (PeerLostError,), restarts=2000, window=1e9, clock=clock) == "trained"
    assert clock.waits[-1] == 60


# ---- how often


def test_when_the_restarts_are_used_up_the_last_error_is_raised_as_itself_with_a_note(clock: WaitingClock) -> None:
    errors = [PeerLostError(str(number)) for number in range(4)]
    with pytest.raises(PeerLostError) as caught:
        retry(Tries(clock, *errors), (PeerLostError,), restarts=3, window=500, clock=clock)
    assert caught.value is errors[3]
    assert caught.value.__context__ is None
    # The restarts began 1, 3 and 7 seconds after the start.
    assert caught.value.__notes__ == [
        "Not tried again: 3 restarts in the last 6 s did not help, and 3 in 500 s are allowed."
    ]
    assert not any(hasattr(error, "__notes__") for error in errors[:3])


def test_the_error_that_is_raised_shows_where_it_came_from(clock: WaitingClock) -> None:
    def train() -> None:
        told = "the last try"
        raise PeerLostError(told)

    with pytest.raises(PeerLostError) as caught:
        retry(train, (PeerLostError,), restarts=1, clock=clock)
    assert caught.traceback[-1].frame.f_locals == {"told": "the last try"}


def test_restarts_that_left_the_window_do_not_count(clock: WaitingClock) -> None:
    tries = Tries(clock, *[PeerLostError()] * 20, "trained", lasting=40)
    assert retry(tries, (PeerLostError,), restarts=3, window=100, clock=clock) == "trained"
    assert tries.count == 21


def test_restarts_that_are_in_the_window_still_do(clock: WaitingClock) -> None:
    tries = Tries(clock, PeerLostError(), lasting=20)
    with pytest.raises(PeerLostError):
        retry(tries, (PeerLostError,), restarts=3, window=100, clock=clock)
    assert tries.count == 4


def test_ten_in_an_hour_are_the_default(clock: WaitingClock) -> None:
    tries = Tries(clock, *[PeerLostError()] * 20, "trained", lasting=330)
    assert retry(tries, (PeerLostError,), clock=clock) == "trained"
    tries = Tries(clock, PeerLostError(), lasting=320)
    with pytest.raises(PeerLostError):
        retry(tries, (PeerLostError,), clock=clock)
    assert tries.count == 11


# ---- what is logged


def test_one_warning_for_each_restart_says_what_happens(clock: WaitingClock, caplog: pytest.LogCaptureFixture) -> None:
    retry(Tries(clock, PeerLostError("worker 3"), ConnectionError(), "trained"), ClusterBackend, clock=clock)
    assert warnings_of(caplog) == [
        "training ended with PeerLostError: worker 3; restart 1 of 10 (in 3600 s) follows in 1 s",
        "training ended with ConnectionError; restart 2 of 10 (in 3600 s) follows in 2 s",
    ]
    assert {record.levelno for record in caplog.records} == {logging.WARNING}


def test_nothing_is_logged_when_it_gives_up(clock: WaitingClock, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(PeerLostError):
        retry(Tries(clock, PeerLostError()), (PeerLostError,), restarts=1, clock=clock)
    assert len(warnings_of(caplog)) == 1


# ---- what a failed try leaves behind


class Model:
    """Something large."""


@pytest.fixture
def no_collector() -> Iterator[None]:
    """No garbage collection comes by chance."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def plainly(deeper: Callable[[], None]) -> None:
    deeper()


def as_a_cause(deeper: Callable[[], None]) -> None:
    try:
        deeper()
    except PeerLostError as error:
        raise PeerLostError("again") from error


def as_a_context(deeper: Callable[[], None]) -> None:
    try:
        deeper()
    except PeerLostError:
        raise PeerLostError("again")  # noqa: B904


def in_a_group(deeper: Callable[[], None]) -> None:
    errors = []
    try:
        deeper()
    except PeerLostError as error:
        errors.append(error)
    raise PeerLostError("again") from ExceptionGroup("some", errors)


@pytest.mark.parametrize("fail", [plainly, as_a_cause, as_a_context, in_a_group])
@pytest.mark.usefixtures("no_collector")
def test_the_frames_of_a_failed_try_are_gone_though_its_error_is_kept(
    fail: Callable[[Callable[[], None]], None], clock: WaitingClock
) -> None:
    models: list[weakref.ref[Model]] = []
    kept: list[BaseException] = []

    def train() -> str:
        assert [model for model in models if model() is not None] == []
        if len(models) == 3:
            return "trained"

        def deeper() -> None:
            model = Model()
            models.append(weakref.ref(model))
            raise PeerLostError

        try:
            fail(deeper)
        except PeerLostError as error:
            kept.append(error)
            raise
        return "not reached"

    assert retry(train, (PeerLostError,), clock=clock) == "trained"
    assert len(models) == 3


@pytest.mark.usefixtures("no_collector")
def test_the_model_of_a_failed_session_is_gone(
    tmp_path: Path, clock: WaitingClock, caplog: pytest.LogCaptureFixture
) -> None:
    models: list[weakref.ref[Any]] = []
    supervisors = []

    def train() -> str:
        assert [model for model in models if model() is not None] == []
        if len(models) == 2:
            return "trained"
        sv = Supervisor(ClusterBackend({"w": np.zeros(1)}), tmp_path, summarize_every=None)
        supervisors.append(sv.coord)
        with sv.managed_session() as sess:
            model = np.zeros(1000)
            models.append(weakref.ref(model))
            sess.global_step += 1
            raise PeerLostError
        return "not reached"

    assert retry(train, ClusterBackend, clock=clock) == "trained"
    assert all(record.exc_info for record in caplog.records if record.levelno == logging.ERROR)
    assert len(models) == 2


@pytest.mark.usefixtures("no_collector")
def test_a_supervisor_that_the_try_made_is_gone_with_its_model(tmp_path: Path, clock: WaitingClock) -> None:
    models: list[weakref.ref[Any]] = []

    def train() -> str:
        assert [model for model in models if model() is not None] == []
        if len(models) == 2:
            return "trained"
        model = np.zeros(1000)
        models.append(weakref.ref(model))
        with Supervisor(ClusterBackend({"w": model}), tmp_path, summarize_every=None).managed_session() as sess:
            sess.global_step += 1
            raise PeerLostError
        return "not reached"

    assert retry(train, ClusterBackend, clock=clock) == "trained"
    assert len(models) == 2


def test_a_try_is_not_one_while_an_error_is_handled(clock: WaitingClock) -> None:
    handled: list[BaseException | None] = []

    def train() -> str:
        handled.append(sys.exception())
        if len(handled) == 3:
            return "trained"
        raise PeerLostError

    assert retry(train, (PeerLostError,), clock=clock) == "trained"
    assert handled == [None, None, None]


def test_the_error_that_the_caller_handles_keeps_its_frames(clock: WaitingClock) -> None:
    def fail() -> None:
        told = "still there"
        raise ValueError(told)

    def recover() -> None:
        try:
            fail()
        finally:
            retry(Tries(clock, PeerLostError(), "trained"), (PeerLostError,), clock=clock)

    with pytest.raises(ValueError, match="still there") as caught:
        recover()
    assert caught.traceback[-1].frame.f_locals == {"told": "still there"}


# ---- with a Supervisor


def train_with(logdir: Path, clock: FakeClock, failing_at: tuple[int, ...]) -> tuple[bytes, list[str | None], int]:
    """The end state, what each session was restored from, and how many steps were made in all."""
    to_fail = list(failing_at)
    rng = np.random.default_rng(3)
    arrays = {"w": np.zeros(4)}
    backend = ClusterBackend(arrays, rng=rng)
    sv = Supervisor(backend, logdir, save_every=EverySteps(5), summarize_every=None)
    restored: list[str | None] = []
    made = 0

    def train() -> bytes:
        nonlocal made
        with sv.managed_session() as sess:
            restored.append(sv.report.restored)
            for _ in sv.epochs(3):
                for item in sv.batches(rng.permutation(10)):
                    arrays["w"] += item * rng.normal(size=4)
                    sess.global_step += 1
                    made += 1
                    if to_fail and sess.global_step == to_fail[0]:
                        raise PeerLostError(f"at step {to_fail.pop(0)}")
        return arrays["w"].tobytes() + repr(rng.bit_generator.state).encode()

    return retry(train, sv.backend, clock=clock), restored, made


def test_training_goes_on_from_the_checkpoint_and_ends_in_the_same_state(tmp_path: Path, clock: WaitingClock) -> None:
    undisturbed, restored, made = train_with(tmp_path / "undisturbed", clock, ())
    assert restored == [None]
    assert made == 30
    state, restored, made = train_with(tmp_path / "disturbed", clock, (13, 27))
    assert [name is not None for name in restored] == [False, True, True]
    assert 30 < made <= 30 + 13 + 27
    assert clock.waits == [1, 2]
    assert state == undisturbed
    assert CheckpointDirectory(tmp_path / "disturbed").steps()[-1] == 30


# ---- arguments


@pytest.mark.parametrize("train", [None, "train", ArrayBackend({})])
def test_training_can_be_called(train: Any) -> None:
    with pytest.raises(TypeError, match="train= takes a function without arguments"):
        retry(train, (PeerLostError,))


@pytest.mark.parametrize(
    ("recoverable", "who"),
    [
        (ArrayBackend({}), "the backend ArrayBackend"),
        (ArrayBackend, "the backend ArrayBackend"),
        ((), "an empty tuple"),
    ],
)
def test_nothing_recoverable_is_an_error(recoverable: Any, who: str) -> None:
    with pytest.raises(ValueError, match=rf"{who} calls no error recoverable; pass the types"):
        retry(lambda: None, recoverable)


class Odd(ArrayBackend):
    recoverable: Any = "ConnectionError"


@pytest.mark.parametrize(
    "recoverable", [None, PeerLostError, [PeerLostError], (PeerLostError(),), (int,), Odd, Odd({})]
)
def test_recoverable_is_a_backend_or_exception_types(recoverable: Any) -> None:
    with pytest.raises(TypeError, match="recoverable= takes a Backend or a tuple of exception types"):
        retry(lambda: None, recoverable)


@pytest.mark.parametrize("name", ["restarts", "window", "first_wait", "longest_wait"])
@pytest.mark.parametrize("value", [0, -1])
def test_a_number_is_positive(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"{name}= takes a positive number"):
        retry(lambda: None, (PeerLostError,), **{name: value})


@pytest.mark.parametrize("name", ["window", "first_wait", "longest_wait"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_time_is_finite(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"{name}= takes a positive number of seconds"):
        retry(lambda: None, (PeerLostError,), **{name: value})


@pytest.mark.parametrize("name", ["restarts", "window", "first_wait", "longest_wait"])
@pytest.mark.parametrize("value", ["10", None, True])
def test_a_number_is_a_number(name: str, value: Any) -> None:
    with pytest.raises(TypeError, match=rf"{name}= takes a (whole )?number"):
        retry(lambda: None, (PeerLostError,), **{name: value})


def test_restarts_are_whole() -> None:
    with pytest.raises(TypeError, match=r"restarts= takes a whole number, not 2\.5"):
        retry(lambda: None, (PeerLostError,), restarts=2.5)  # type: ignore[arg-type]


def test_the_first_wait_is_not_above_the_longest() -> None:
    with pytest.raises(ValueError, match="first_wait=61 is more than longest_wait=60"):
        retry(lambda: None, (PeerLostError,), first_wait=61)


def test_a_clock_is_a_clock() -> None:
    with pytest.raises(TypeError, match="clock= takes a Clock"):
        retry(lambda: None, (PeerLostError,), clock=3.0)  # type: ignore[arg-type]
