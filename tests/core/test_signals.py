"""The handlers of one session, without a session."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from supervise_core import Coordinator
from supervise_core.signals import StopSignals, exit_status_of
from supervise_core.testing.clock import FakeClock


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def coordinator(clock: FakeClock) -> Coordinator:
    return Coordinator(clock=clock)


@pytest.fixture
def signals(coordinator: Coordinator) -> Iterator[StopSignals]:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    made = StopSignals(coordinator)
    made.install()
    yield made
    made.restore()
    made.restore()
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    assert all(thread.name != "supervise-core signals" for thread in threading.enumerate())


def send(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize(
    ("number", "error", "status"), [(signal.SIGTERM, SystemExit, 143), (signal.SIGINT, KeyboardInterrupt, 130)]
)
def test_a_signal_asks_for_a_stop(
    signals: StopSignals, coordinator: Coordinator, number: signal.Signals, error: type[BaseException], status: int
) -> None:
    send(number)
    assert coordinator.wait_for_stop(1)
    assert str(coordinator.cause) == f"signal {number.name}"
    assert not signals.insisted
    assert exit_status_of(number) == status
    with pytest.raises(error):
        signals.end_process_as_signalled()


def test_without_a_signal_nothing_is_raised(signals: StopSignals) -> None:
    signals.end_process_as_signalled()


def test_signals_within_two_seconds_are_one(signals: StopSignals, clock: FakeClock) -> None:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGTERM, signal.SIGINT):
        send(number)
        clock.advance(0.4)
    assert not signals.insisted


def test_a_later_sigint_insists(signals: StopSignals, clock: FakeClock) -> None:
    send(signal.SIGTERM)
    clock.advance(2)
    with pytest.raises(KeyboardInterrupt):
        send(signal.SIGINT)
    assert signals.insisted


def test_a_later_sigterm_insists_the_second_time(signals: StopSignals, clock: FakeClock) -> None:
    send(signal.SIGTERM)
    clock.advance(2)
    send(signal.SIGTERM)
    assert not signals.insisted
    with pytest.raises(SystemExit):
        send(signal.SIGTERM)
    assert signals.insisted


def test_during_the_final_save_only_sigint_insists(signals: StopSignals, clock: FakeClock) -> None:
    send(signal.SIGTERM)
    clock.advance(2)
    signals.saving = True
    for _ in range(3):
        send(signal.SIGTERM)
    assert not signals.insisted
    with pytest.raises(KeyboardInterrupt):
        send(signal.SIGINT)


def test_a_signal_that_is_ignored_stays_so(coordinator: Coordinator) -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    made = StopSignals(coordinator)
    try:
        made.install()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        made.restore()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_outside_the_main_thread_nothing_is_taken_over(coordinator: Coordinator) -> None:
    before = signal.getsignal(signal.SIGTERM)
    made = StopSignals(coordinator)
    thread = threading.Thread(target=made.install)
    thread.start()
    thread.join()
    assert signal.getsignal(signal.SIGTERM) is before
    made.restore()


def test_a_forked_child_ends_as_it_would_without_a_session(signals: StopSignals, coordinator: Coordinator) -> None:
    context = multiprocessing.get_context("fork")
    lives = context.Event()

    def live() -> None:
        lives.set()
        time.sleep(60)

    child = context.Process(target=live)
    child.start()
    assert lives.wait(30)  # Python forgets signals that come while it forks
    child.terminate()
    child.join(30)
    assert child.exitcode == -signal.SIGTERM
    assert signals.first is None
    assert not coordinator.should_stop()


PROGRAM = """
import atexit, os, signal, sys, time
atexit.register(lambda: time.sleep(120))  # as what Python takes apart at its end
from supervise_core.coordinator import Coordinator
from supervise_core.signals import StopSignals
stop_signals = StopSignals(Coordinator())
stop_signals.install()
atexit.register(lambda: print("a handler of the program"))
os.kill(os.getpid(), getattr(signal, sys.argv[1]))
print("some output", end="")
stop_signals.hasten()
stop_signals.restore()
raise ValueError("a peer is gone")
"""


def test_a_failed_run_that_was_told_to_end_does_so_once_its_error_is_printed() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM, "SIGTERM"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stdout == "some outputa handler of the program\n"
    assert done.stderr.endswith("ValueError: a peer is gone\n")


def test_one_that_was_not_told_takes_its_time() -> None:
    with pytest.raises(subprocess.TimeoutExpired):
        subprocess.run([sys.executable, "-c", PROGRAM, "SIGCONT"], capture_output=True, timeout=3)
