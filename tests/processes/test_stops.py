"""Every way in which a run can end: what is raised, what is saved, what the report says, and that nothing is left."""

from __future__ import annotations

import gc
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from supervise_core import CheckpointDirectory, Service, ServiceContext, Supervisor
from supervise_core.testing.clock import FakeClock, eventually
from supervise_numpy import ArrayBackend

from .driving import newest_step, run, started


class EndOfInput(Exception):  # noqa: N818 - it is none
    """What a framework raises when its input is exhausted."""


class CleanlyStopping(ArrayBackend):
    """A framework whose input says by an exception that it is exhausted."""

    clean_stop = (EndOfInput,)


class Failing(Service):
    """Fails in a thread of its own, as soon as it is told to."""

    def __init__(self) -> None:
        self.now = threading.Event()

    def start(self, context: ServiceContext) -> None:
        def fail() -> None:
            self.now.wait(20)
            raise OSError("the service failed")

        context.thread("failing", fail)


class Deaf(Service):
    """Does not end when the run stops."""

    def __init__(self) -> None:
        self.released = threading.Event()

    def start(self, context: ServiceContext) -> None:
        context.thread("deaf", self.pay_no_attention)

    def pay_no_attention(self) -> None:
        self.released.wait(20)


def descriptors() -> set[str]:
    """What the process holds open, by number and target."""
    found: set[str] = set()
    for number in os.listdir("/proc/self/fd"):
        try:
            found.add(f"{number} {os.readlink(f'/proc/self/fd/{number}')}")
        except FileNotFoundError:
            continue
    return found


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    """Threads, descriptors and signal handlers are after each test as they were before it."""
    gc.collect()
    threads, files = set(threading.enumerate()), descriptors()
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    yield
    gc.collect()
    assert set(threading.enumerate()) <= threads
    assert descriptors() <= files
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == handlers


def supervisor(logdir: Path, **options: Any) -> Supervisor[Any]:
    return Supervisor(CleanlyStopping({"w": np.zeros(3)}), logdir, summarize_every=None, **options)


def train(sv: Supervisor[Any], ending: Callable[[Supervisor[Any]], object], at: int = 3) -> None:
    """Ten steps; ``ending`` is called after the step ``at``."""
    with sv.managed_session() as sess:
        for _ in sv.batches(range(10)):
            sess["w"][...] += 1
            sess.global_step += 1
            if sess.global_step == at:
                ending(sv)


def raising(error: BaseException) -> Callable[[Supervisor[Any]], None]:
    def ending(sv: Supervisor[Any]) -> None:
        raise error

    return ending


def saved(logdir: Path) -> list[int]:
    return CheckpointDirectory(logdir).steps()


def test_the_end_of_the_data(tmp_path: Path) -> None:
    sv = supervisor(tmp_path)
    train(sv, lambda sv: None)
    report = sv.report
    assert saved(tmp_path) == [0, 10]
    assert (report.exit_status, report.final_save, report.last_step) == (0, "step 10", 10)
    assert report.cause is not None
    assert report.cause.source == "the end of the training block"
    assert not report.errors


def test_a_stop_that_is_asked_for(tmp_path: Path) -> None:
    sv = supervisor(tmp_path)
    train(sv, lambda sv: sv.request_stop())
    assert saved(tmp_path) == [0, 3]
    assert (sv.report.exit_status, sv.report.final_save, sv.report.last_step) == (0, "step 3", 3)
    assert str(sv.report.cause) == "request_stop"


def test_a_stop_that_is_asked_for_with_an_error(tmp_path: Path) -> None:
    sv, error = supervisor(tmp_path), RuntimeError("diverged")
    with pytest.raises(RuntimeError) as raised:
        train(sv, lambda sv: sv.request_stop(error))
    assert raised.value is error
    assert saved(tmp_path) == [0, 3]
    assert (sv.report.exit_status, sv.report.final_save) == (1, "step 3")
    assert [cause.error for cause in sv.report.errors] == [error]


@pytest.mark.parametrize(
    "error",
    [ValueError("no"), KeyboardInterrupt(), SystemExit(7), StopIteration()],
    ids=lambda error: type(error).__name__,
)
def test_an_error_in_the_block_withholds_the_final_save(tmp_path: Path, error: BaseException) -> None:
    sv = supervisor(tmp_path)
    with pytest.raises(type(error)) as raised:
        train(sv, raising(error))
    assert raised.value is error
    assert saved(tmp_path) == [0]
    assert sv.report.final_save == f"withheld: the training block ended with {type(error).__name__}"
    assert sv.report.last_step == 3
    assert any("request_stop()" in note for note in getattr(error, "__notes__", [])) == isinstance(error, StopIteration)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(7)], ids=lambda error: type(error).__name__)
def test_the_report_of_a_block_that_was_left_for_good_is_no_success(tmp_path: Path, error: BaseException) -> None:
    sv = supervisor(tmp_path)
    with pytest.raises(type(error)):
        train(sv, raising(error))
    assert sv.report.exit_status == (130 if isinstance(error, KeyboardInterrupt) else 7)


def test_exhausted_input_is_a_clean_end(tmp_path: Path) -> None:
    sv = supervisor(tmp_path)
    train(sv, raising(EndOfInput("no more")))
    assert saved(tmp_path) == [0, 3]
    assert (sv.report.exit_status, sv.report.errors) == (0, [])
    assert str(sv.report.cause) == "the training block: end of input (EndOfInput)"


def test_a_failed_service_stops_the_run_and_does_not_withhold_the_final_save(tmp_path: Path) -> None:
    service = Failing()
    sv = supervisor(tmp_path, services=[service])

    def ending(sv: Supervisor[Any]) -> None:
        service.now.set()
        assert sv.wait_for_stop(10)

    with pytest.raises(OSError, match="the service failed"):
        train(sv, ending)
    assert saved(tmp_path) == [0, 3]
    assert (sv.report.exit_status, sv.report.final_save) == (1, "step 3")


def test_of_two_errors_the_first_is_raised_and_the_other_is_its_note(tmp_path: Path) -> None:
    service = Failing()
    sv = supervisor(tmp_path, services=[service])

    def ending(sv: Supervisor[Any]) -> None:
        service.now.set()
        assert sv.wait_for_stop(10)
        raise ValueError("the block failed")

    with pytest.raises(OSError, match="the service failed") as raised:
        train(sv, ending)
    assert "the block failed" in "".join(raised.value.__notes__)
    assert saved(tmp_path) == [0]
    assert len(sv.report.errors) == 2


def test_an_error_of_a_service_after_one_of_the_block_is_its_note(tmp_path: Path) -> None:
    class FailingToStop(Service):
        def start(self, context: ServiceContext) -> None:
            return

        def stop(self) -> None:
            raise OSError("the service failed to stop")

    with pytest.raises(ValueError, match="the block failed") as raised:
        train(supervisor(tmp_path, services=[FailingToStop()]), raising(ValueError("the block failed")))
    assert "the service failed to stop" in "".join(raised.value.__notes__)


def test_a_service_that_ignores_the_stop_is_named_with_its_stack(tmp_path: Path) -> None:
    service = Deaf()
    sv = supervisor(tmp_path, services=[service], grace=0.05)
    train(sv, lambda sv: None)
    assert list(sv.report.stragglers) == ["deaf"]
    assert "pay_no_attention" in sv.report.stragglers["deaf"]
    assert sv.report.final_save == "step 10"
    assert saved(tmp_path) == [0, 10]
    service.released.set()
    eventually(lambda: all(thread.name != "deaf" for thread in threading.enumerate()))


# ---- signals


@pytest.mark.parametrize(
    ("number", "error", "status"),
    [(signal.SIGTERM, SystemExit, 143), (signal.SIGINT, KeyboardInterrupt, 130)],
)
def test_a_signal_saves_and_ends_as_the_signal_would(
    tmp_path: Path, number: signal.Signals, error: type[BaseException], status: int
) -> None:
    sv = supervisor(tmp_path)

    def ending(sv: Supervisor[Any]) -> None:
        os.kill(os.getpid(), number)
        assert sv.wait_for_stop(10)

    with pytest.raises(error) as raised:
        train(sv, ending)
    assert getattr(raised.value, "code", status) == status
    assert saved(tmp_path) == [0, 3]
    assert (sv.report.exit_status, sv.report.final_save) == (status, "step 3")
    assert str(sv.report.cause) == f"signal {number.name}"


def test_a_second_signal_within_two_seconds_is_the_same_request(tmp_path: Path) -> None:
    sv = supervisor(tmp_path, clock=FakeClock())

    def ending(sv: Supervisor[Any]) -> None:
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
            os.kill(os.getpid(), number)
        assert sv.wait_for_stop(1)

    with pytest.raises(SystemExit):
        train(sv, ending)
    assert saved(tmp_path) == [0, 3]


@pytest.mark.parametrize(
    "signals", [[signal.SIGINT], [signal.SIGTERM, signal.SIGTERM]], ids=["SIGINT", "third SIGTERM"]
)
def test_a_signal_that_insists_ends_the_block_at_once(tmp_path: Path, signals: list[signal.Signals]) -> None:
    clock = FakeClock()
    sv = supervisor(tmp_path, clock=clock)

    def ending(sv: Supervisor[Any]) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        clock.advance(2.5)
        for number in signals:
            os.kill(os.getpid(), number)
        raise AssertionError("the block goes on")

    with pytest.raises((KeyboardInterrupt, SystemExit)):
        train(sv, ending)
    assert saved(tmp_path) == [0]
    assert sv.report.final_save == "withheld: a further signal asked for an end at once"


def test_signals_can_be_left_alone(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)

    def ending(sv: Supervisor[Any]) -> None:
        assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before

    train(supervisor(tmp_path, signals=False), ending)


def test_a_session_in_another_thread_leaves_the_signals_alone(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    seen: list[object] = []
    sv = supervisor(tmp_path)
    thread = threading.Thread(
        target=train,
        args=(sv, lambda sv: seen.append((signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)))),
    )
    thread.start()
    thread.join(20)
    assert seen == [before]
    assert saved(tmp_path) == [0, 10]


def test_before_the_first_step_a_signal_saves_nothing_new(tmp_path: Path) -> None:
    train(supervisor(tmp_path), lambda sv: sv.request_stop())
    sv = supervisor(tmp_path)
    with pytest.raises(SystemExit), sv.managed_session():  # noqa: PT012
        os.kill(os.getpid(), signal.SIGTERM)
        sv.wait_for_stop(10)
    assert saved(tmp_path) == [0, 3]
    assert sv.report.final_save == "nothing new: no step was made"


# ---- many


@pytest.mark.campaign(small=200, soak=2000)
def test_many_sessions_leave_no_thread_and_no_descriptor(tmp_path: Path, count: int, seed: int) -> None:
    chance = np.random.default_rng(seed)
    train(supervisor(tmp_path / "first"), lambda sv: None)
    gc.collect()
    threads, files = threading.active_count(), len(descriptors())
    endings: list[Callable[[Supervisor[Any]], object]] = [
        lambda sv: None,
        lambda sv: sv.request_stop(),
        raising(ValueError("in the block")),
        raising(KeyboardInterrupt()),
        lambda sv: sv.request_stop(OSError("asked for")),
        lambda sv: sv.stop(),
    ]
    for number in range(count):
        sv = supervisor(tmp_path / str(number % 7), resume="never" if number % 3 else "auto")
        try:
            train(sv, endings[chance.integers(len(endings))])
        except (ValueError, OSError, KeyboardInterrupt):
            assert sv.report.final_save.startswith(("withheld", "step"))
    del sv
    gc.collect()
    assert threading.active_count() <= threads
    assert len(descriptors()) <= files


# ---- processes that are ended by a signal


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, -signal.SIGINT)])
def test_a_process_ends_as_its_signal_would_have_it(tmp_path: Path, number: signal.Signals, status: int) -> None:
    with started("numpy_training.py", tmp_path, "--pause=0.02") as running:
        assert running.wait_for(5)
        running.signal(number)
        outcome = running.end()
    assert outcome.status == status, outcome.errors
    assert newest_step(tmp_path) == outcome.steps[-1][0]
    assert run("numpy_training.py", tmp_path).status == 0


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, -signal.SIGINT)])
def test_a_whole_process_group_with_data_workers_is_signalled(
    tmp_path: Path, number: signal.Signals, status: int
) -> None:
    pytest.importorskip("torch")
    with started("torch_training.py", tmp_path, "--pause=0.02", "--workers=2", "--persistent") as running:
        assert running.wait_for(5)
        running.signal(number, to_group=True)
        running.signal(number, to_group=True)
        outcome = running.end()
    assert outcome.status == status, outcome.errors
    assert newest_step(tmp_path) == outcome.steps[-1][0]
