"""Coordinator and LooperThread beside TensorFlow's own, item by item (README.md lists the items and their tests)."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
tf = pytest.importorskip("tensorflow", reason="TensorFlow is not installed")

from parity import Classes, is_kind, ours, outcome, theirs  # noqa: E402

from supervise_core.errors import StragglersError  # noqa: E402
from supervise_core.testing.clock import FakeClock  # noqa: E402

THEIRS = theirs()
OURS = ours()
LONG = 60.0
"""A limit for what takes a moment."""


class ProgramError(Exception):
    """What a program raises."""


class LateError(Exception):
    """What it raises after that."""


def same(program: Callable[[Classes], Any]) -> Any:
    """What a program sees with our classes, which has to be what it sees with TensorFlow's."""
    seen_there, seen_here = outcome(lambda: program(THEIRS)), outcome(lambda: program(OURS))
    assert "message" not in seen_there, seen_there
    assert "message" not in seen_here, seen_here
    assert seen_here == seen_there
    return seen_here["value"]


def kind(call: Callable[[], Any]) -> str:
    """The class of what a call raises, or ``""``."""
    return str(outcome(call).get("error", ""))


@contextlib.contextmanager
def idle_thread(name: str | None = None) -> Iterator[threading.Thread]:
    """A thread that ends no sooner than the block."""
    end = threading.Event()
    thread = threading.Thread(target=end.wait, args=(LONG,), name=name, daemon=True)
    thread.start()
    try:
        yield thread
    finally:
        end.set()
        thread.join(LONG)


@contextlib.contextmanager
def logged(*names: str) -> Iterator[list[logging.LogRecord]]:
    """What was logged in the block, at every level."""
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign]
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(logging.DEBUG)
    try:
        yield records
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.removeHandler(handler)
            logger.setLevel(level)


def ended_thread() -> threading.Thread:
    thread = threading.Thread(target=lambda: None)
    thread.start()
    thread.join(LONG)
    return thread


def raised(error: BaseException) -> Any:
    """An exception that was raised and is handled no more, as an ``exc_info`` triple."""
    try:
        raise error
    except BaseException:
        return sys.exc_info()


# ---- 1. Coordinator


def test_1_01_which_exceptions_stop_without_being_errors() -> None:
    def joined_after(classes: Classes, kinds: Any, error: BaseException) -> str:
        coordinator = classes.Coordinator() if kinds is None else classes.Coordinator(kinds)
        with coordinator.stop_on_exception():
            raise error
        assert coordinator.should_stop()
        return kind(coordinator.join)

    def program(classes: Classes) -> list[str]:
        class OutOfData(tf.errors.OutOfRangeError):
            pass

        return [
            joined_after(classes, None, tf.errors.OutOfRangeError(None, None, "end")),
            joined_after(classes, None, OutOfData(None, None, "end")),
            joined_after(classes, None, StopIteration()),
            joined_after(classes, (), tf.errors.OutOfRangeError(None, None, "end")),
            joined_after(classes, iter([StopIteration, KeyError]), StopIteration()),
            joined_after(classes, {StopIteration, KeyError}, KeyError("a")),
            joined_after(classes, [LookupError], KeyError("a")),
            joined_after(classes, [StopIteration], tf.errors.OutOfRangeError(None, None, "end")),
        ]

    assert same(program) == ["", "", "StopIteration", "OutOfRangeError", "", "", "", "OutOfRangeError"]


def test_1_01_a_file_that_ends_while_it_is_restored_is_no_end_of_an_input() -> None:
    """Reading a damaged checkpoint raises the class that also ends an input."""
    with tf.Graph().as_default():
        reading = tf.raw_ops.RestoreV2(prefix="x", tensor_names=["a"], shape_and_slices=[""], dtypes=[tf.float32])
        error = tf.errors.OutOfRangeError(None, reading[0].op, "read less bytes than requested")
    for classes, seen in ((THEIRS, ""), (OURS, "OutOfRangeError")):
        coordinator = classes.Coordinator()
        coordinator.request_stop(raised(error))
        assert kind(coordinator.join) == seen


def test_1_02_the_attributes_that_tests_of_tensorflow_look_at() -> None:
    def program(classes: Classes) -> list[Any]:
        coordinator, thread = classes.Coordinator(), ended_thread()
        coordinator.register_thread(thread)
        with coordinator._lock:
            entered_twice = coordinator._lock.acquire(blocking=False)
        return [entered_twice, coordinator._registered_threads == {thread}, coordinator.should_stop()]

    assert same(program) == [False, True, False]


def test_1_03_should_stop_needs_no_lock() -> None:
    def program(classes: Classes) -> list[bool]:
        coordinator = classes.Coordinator()
        with coordinator._lock:
            before = coordinator.should_stop()
        with coordinator.stop_on_exception():
            raise ProgramError
        with coordinator._lock:
            return [before, coordinator.should_stop()]

    assert same(program) == [False, True]


def test_1_04_wait_for_stop_says_whether_it_was_requested() -> None:
    def program(classes: Classes) -> list[bool]:
        coordinator = classes.Coordinator()
        seen = [coordinator.wait_for_stop(-3.0), coordinator.wait_for_stop(0), coordinator.wait_for_stop(timeout=0.01)]
        other = threading.Thread(target=coordinator.request_stop)
        other.start()
        seen += [coordinator.wait_for_stop(), coordinator.wait_for_stop(-1), coordinator.wait_for_stop(LONG)]
        other.join(LONG)
        return seen

    assert same(program) == [False, False, False, True, True, True]


def test_1_05_an_exception_or_a_triple_or_nothing() -> None:
    def program(classes: Classes) -> list[Any]:
        seen: list[Any] = []
        for give_triple in (True, False):
            for error in (ProgramError("p"), tf.errors.OutOfRangeError(None, None, "end")):
                coordinator = classes.Coordinator()
                try:
                    raise error
                except Exception as caught:
                    coordinator.request_stop(sys.exc_info() if give_triple else caught)
                seen.append([coordinator.should_stop(), kind(coordinator.join)])
        coordinator = classes.Coordinator()
        coordinator.request_stop()
        seen.append([coordinator.should_stop(), kind(coordinator.join)])
        return seen

    assert same(program) == [[True, "ProgramError"], [True, ""]] * 2 + [[True, ""]]


def test_1_05_an_end_of_input_is_logged_as_no_error() -> None:
    for classes in (THEIRS, OURS):
        with logged("tensorflow", "supervise_core") as records:
            classes.Coordinator().request_stop(raised(tf.errors.OutOfRangeError(None, None, "end")))
        assert not [record for record in records if record.levelno > logging.INFO], classes
        assert not [record for record in records if "Error reported" in record.getMessage()], classes


def test_1_06_the_first_error_is_the_one_that_is_raised() -> None:
    def program(classes: Classes) -> str:
        coordinator = classes.Coordinator()
        coordinator.request_stop(raised(ProgramError("first")))
        coordinator.request_stop(raised(LateError("second")))
        return kind(coordinator.join)

    assert same(program) == "ProgramError"


def test_1_06_an_error_after_the_stop_is_lost_there_and_kept_here() -> None:
    def program(classes: Classes) -> list[Any]:
        after_a_stop, after_an_error = classes.Coordinator(), classes.Coordinator()
        with logged("tensorflow", "supervise_core") as records:
            after_a_stop.request_stop()
            records.clear()
            after_a_stop.request_stop(raised(LateError("while winding down")))
            after_an_error.request_stop(raised(ProgramError("first")))
            after_an_error.request_stop(raised(LateError("while winding down")))
        said = any("while winding down" in record.getMessage() for record in records)
        noted = any("while winding down" in note for note in outcome(after_an_error.join)["notes"])
        return [kind(after_a_stop.join), said, noted]

    assert program(THEIRS) == ["", False, False]
    assert program(OURS) == ["LateError", True, True]


def test_1_07_the_exception_that_is_passed_counts_and_not_the_one_being_handled() -> None:
    def program(classes: Classes) -> str:
        coordinator = classes.Coordinator()
        try:
            raise LateError("being handled")
        except LateError:
            coordinator.request_stop(ProgramError("passed"))
        return kind(coordinator.join)

    assert program(THEIRS) == "LateError"
    assert program(OURS) == "ProgramError"


def test_1_08_an_exception_outside_of_a_handler_stops_too() -> None:
    def program(classes: Classes) -> list[Any]:
        coordinator = classes.Coordinator()
        return [
            kind(lambda: coordinator.request_stop(ProgramError("p"))),
            coordinator.should_stop(),
            kind(coordinator.join),
        ]

    assert program(THEIRS) == ["TypeError", False, "TypeError"]
    assert program(OURS) == ["", True, "ProgramError"]


def test_1_09_an_error_after_a_join_is_raised_at_the_caller() -> None:
    def program(classes: Classes) -> list[Any]:
        coordinator = classes.Coordinator()
        coordinator.request_stop()
        coordinator.join()
        error = ProgramError("after the join")
        seen: list[Any] = []
        for give_triple in (True, False):
            try:
                raise error
            except ProgramError as caught:
                given = sys.exc_info() if give_triple else caught
                try:
                    coordinator.request_stop(given)
                except ProgramError as again:
                    seen.append(again is error)
        coordinator.request_stop()
        coordinator.request_stop(raised(tf.errors.OutOfRangeError(None, None, "end")))
        return [*seen, coordinator.should_stop(), kind(coordinator.join)]

    assert same(program) == [True, True, True, ""]


def test_1_09_stop_on_exception_after_a_join_raises_too() -> None:
    def program(classes: Classes) -> str:
        coordinator = classes.Coordinator()
        coordinator.request_stop()
        coordinator.join()

        def fails() -> None:
            with coordinator.stop_on_exception():
                raise ProgramError

        return kind(fails)

    assert same(program) == "ProgramError"


def test_1_09_outside_of_a_handler_it_is_the_error_itself() -> None:
    def program(classes: Classes) -> str:
        coordinator = classes.Coordinator()
        coordinator.request_stop()
        coordinator.join()
        return kind(lambda: coordinator.request_stop(ProgramError("after the join")))

    assert program(THEIRS) == "TypeError"
    assert program(OURS) == "ProgramError"


def test_1_10_the_cause_of_a_stop_can_be_seen_at_the_default_log_level() -> None:
    def levels(classes: Classes) -> list[int]:
        with logged("tensorflow", "supervise_core") as records:
            classes.Coordinator().request_stop(raised(ProgramError("the cause")))
        return [record.levelno for record in records if "the cause" in record.getMessage()]

    assert levels(THEIRS) == [logging.INFO]
    assert levels(OURS) == [logging.ERROR]


def test_1_11_clear_stop_resets_what_was_recorded() -> None:
    def program(classes: Classes) -> list[Any]:
        coordinator = classes.Coordinator()
        with coordinator.stop_on_exception():
            raise ProgramError
        seen = [kind(coordinator.join), coordinator.joined]
        coordinator.clear_stop()
        seen += [coordinator.should_stop(), coordinator.joined, kind(coordinator.raise_requested_exception)]
        seen += [kind(coordinator.join), coordinator.should_stop(), coordinator.joined]
        coordinator.clear_stop()
        return [*seen, coordinator.joined]

    assert same(program) == ["ProgramError", True, False, False, "", "", False, True, False]


def test_1_11_clear_stop_leaves_registered_threads_as_they_are() -> None:
    def program(classes: Classes) -> list[Any]:
        coordinator = classes.Coordinator()
        threads = [threading.Thread(target=coordinator.wait_for_stop, args=(LONG,), daemon=True) for _ in range(2)]
        coordinator.register_thread(threads[0])
        coordinator.clear_stop()
        coordinator.register_thread(threads[1])
        coordinator.request_stop()
        coordinator.clear_stop()
        kept = coordinator._registered_threads == set(threads)
        for thread in threads:
            thread.start()
        coordinator.request_stop()
        coordinator.join(stop_grace_period_secs=LONG)
        return [kept, *(thread.is_alive() for thread in threads)]

    assert same(program) == [True, False, False]


def test_1_11_an_error_that_nobody_joined_for_was_logged_when_it_is_dropped() -> None:
    for classes, level in ((THEIRS, logging.INFO), (OURS, logging.ERROR)):
        coordinator = classes.Coordinator()
        with logged("tensorflow", "supervise_core") as records:
            coordinator.request_stop(raised(ProgramError("nobody joined")))
            coordinator.clear_stop()
        assert kind(coordinator.join) == ""
        assert [record.levelno for record in records if "nobody joined" in record.getMessage()] == [level]


def test_1_11_threads_of_the_last_round_go_on_there_and_stay_stopped_here() -> None:
    def program(classes: Classes) -> list[bool]:
        coordinator, look, seen = classes.Coordinator(), threading.Event(), []

        def straggle() -> None:
            look.wait(LONG)
            seen.append(coordinator.should_stop())

        straggler = threading.Thread(target=straggle, daemon=True)
        coordinator.register_thread(straggler)
        straggler.start()
        coordinator.request_stop()
        coordinator.join(stop_grace_period_secs=0, ignore_live_threads=True)
        coordinator.clear_stop()
        look.set()
        straggler.join(LONG)
        return [*seen, coordinator.should_stop()]

    assert program(THEIRS) == [False, False]
    assert program(OURS) == [True, False]


def test_1_12_stop_on_exception_takes_everything_and_join_gives_it_back() -> None:
    def program(classes: Classes) -> list[Any]:
        seen = []
        for error in (ProgramError("p"), KeyboardInterrupt("k"), SystemExit(3), GeneratorExit()):
            coordinator = classes.Coordinator()
            with coordinator.stop_on_exception():
                raise error
            seen.append([coordinator.should_stop(), kind(coordinator.join)])
        coordinator = classes.Coordinator()
        with coordinator.stop_on_exception():
            pass
        return [*seen, [coordinator.should_stop(), kind(coordinator.join)]]

    names = ["ProgramError", "KeyboardInterrupt", "SystemExit", "GeneratorExit"]
    assert same(program) == [[True, name] for name in names] + [[False, ""]]


def test_1_12_what_it_took_can_be_seen_in_the_log_before_the_join() -> None:
    for classes, level in ((THEIRS, logging.INFO), (OURS, logging.ERROR)):
        with logged("tensorflow", "supervise_core") as records, classes.Coordinator().stop_on_exception():
            raise KeyboardInterrupt("pressed")
        assert [record.levelno for record in records if "pressed" in record.getMessage()] == [level]


def test_1_13_registering_twice_is_fine() -> None:
    def program(classes: Classes) -> list[Any]:
        coordinator = classes.Coordinator()
        with idle_thread() as thread:
            coordinator.register_thread(thread)
            coordinator.register_thread(thread)
            seen = [len(coordinator._registered_threads)]
            coordinator.request_stop()
            message = outcome(lambda: coordinator.join(stop_grace_period_secs=0))["message"]
        return [*seen, message.splitlines()[0].count(thread.name), hasattr(coordinator, "unregister_thread")]

    assert same(program) == [1, 1, False]


def test_1_14_join_waits_for_registered_threads_and_the_given_ones() -> None:
    def program(classes: Classes) -> list[Any]:
        coordinator = classes.Coordinator()
        threads = [threading.Thread(target=coordinator.wait_for_stop, args=(LONG,), daemon=True) for _ in range(4)]
        for thread in threads:
            thread.start()
        coordinator.register_thread(threads[0])
        coordinator.register_thread(threads[1])
        coordinator.request_stop()
        coordinator.join({*threads[1:], ended_thread()}, stop_grace_period_secs=LONG, ignore_live_threads=False)
        return [coordinator.joined, *(thread.is_alive() for thread in threads)]

    assert same(program) == [True, False, False, False, False]


@pytest.mark.parametrize("given", [(), None])
def test_1_14_threads_that_were_not_started_are_not_waited_for(given: Any) -> None:
    def program(classes: Classes) -> list[Any]:
        coordinator = classes.Coordinator()
        coordinator.register_thread(threading.Thread(target=lambda: None))
        return [kind(lambda: coordinator.join(given)), coordinator.joined, coordinator.should_stop()]

    assert same(program) == ["", True, False]


def test_1_14_threads_registered_during_the_join_are_waited_for_here() -> None:
    """One thread starts another before it ends: nobody joins the second one there."""

    def program(classes: Classes) -> bool:
        coordinator, joining = classes.Coordinator(), threading.Event()
        second = threading.Thread(target=lambda: time.sleep(1.5), daemon=True)

        def first() -> None:
            joining.wait(LONG)
            time.sleep(0.2)
            second.start()
            coordinator.register_thread(second)

        thread = threading.Thread(target=first, daemon=True)
        coordinator.register_thread(thread)
        thread.start()
        joining.set()
        coordinator.join()
        alive = second.is_alive()
        second.join(LONG)
        return alive

    assert program(THEIRS)
    assert not program(OURS)


def test_1_15_join_without_a_stop_waits_until_the_threads_have_ended() -> None:
    def program(classes: Classes) -> list[bool]:
        coordinator, end = classes.Coordinator(), threading.Event()
        working = threading.Thread(target=end.wait, args=(LONG,), daemon=True)
        joining = threading.Thread(target=coordinator.join, args=([working],), daemon=True)
        working.start()
        joining.start()
        joining.join(0.3)
        waits = joining.is_alive()
        end.set()
        joining.join(LONG)
        return [waits, joining.is_alive(), coordinator.should_stop(), coordinator.joined]

    assert same(program) == [True, False, False, True]


def test_1_15_join_returns_when_the_threads_have_ended_and_not_at_the_next_full_second() -> None:
    def seconds(classes: Classes) -> float:
        working = threading.Thread(target=lambda: time.sleep(0.05), daemon=True)
        working.start()
        began = time.monotonic()
        classes.Coordinator().join([working])
        return time.monotonic() - began

    assert seconds(THEIRS) > 0.9
    assert any(seconds(OURS) < 0.9 for _ in range(5))


def test_1_16_the_grace_begins_at_the_stop() -> None:
    """Threads that end within it are no stragglers, and none at all is still one look at them."""

    def program(classes: Classes) -> list[Any]:
        seen: list[Any] = []
        for grace in (0, 0.05, 0.05):
            coordinator = classes.Coordinator()
            coordinator.request_stop()
            with idle_thread() as thread:
                join = functools.partial(coordinator.join, [thread], grace)
                seen.append(is_kind(outcome(join), "RuntimeError"))
        coordinator, thread = classes.Coordinator(), threading.Thread(target=lambda: time.sleep(0.2), daemon=True)
        thread.start()
        coordinator.request_stop()
        return [*seen, kind(lambda: coordinator.join([thread], LONG)), kind(lambda: coordinator.join([thread], 0))]

    assert same(program) == [True, True, True, "", ""]


def test_1_16_grace_of_none_needs_no_number_while_there_is_nothing_to_wait_for() -> None:
    def program(classes: Classes) -> list[str]:
        coordinator = classes.Coordinator()
        coordinator.request_stop()
        with idle_thread() as thread:
            return [
                kind(lambda: coordinator.join([ended_thread()], stop_grace_period_secs=None)),
                kind(lambda: coordinator.join([thread], stop_grace_period_secs=None)),
            ]

    assert same(program) == ["", "TypeError"]


def test_1_16_a_grace_without_limit() -> None:
    def program(classes: Classes) -> str:
        coordinator, thread = classes.Coordinator(), threading.Thread(target=lambda: time.sleep(0.1), daemon=True)
        thread.start()
        coordinator.request_stop()
        return kind(lambda: coordinator.join([thread], float("inf")))

    assert same(program) == ""


def test_1_16_the_grace_is_counted_by_a_clock_here() -> None:
    """Sleeps that take longer than they should prolong the grace there."""

    def program(classes: Classes, monkeypatch: pytest.MonkeyPatch) -> float:
        from tensorflow.python.training import coordinator as module

        slow = types.SimpleNamespace(sleep=lambda seconds: time.sleep(seconds + 0.3), time=time.time)
        monkeypatch.setattr(module, "time", slow)
        coordinator = classes.Coordinator()
        coordinator.request_stop()
        with idle_thread() as thread:
            began = time.monotonic()
            coordinator.join([thread], 0.1, ignore_live_threads=True)
            return time.monotonic() - began

    with pytest.MonkeyPatch.context() as monkeypatch:
        assert program(THEIRS, monkeypatch) > 2.0
        assert any(program(OURS, monkeypatch) < 2.0 for _ in range(5))


def test_1_17_a_join_forgets_all_threads_stragglers_too() -> None:
    def program(classes: Classes) -> list[Any]:
        coordinator = classes.Coordinator()
        with idle_thread() as thread:
            coordinator.register_thread(thread)
            coordinator.request_stop()
            first = is_kind(outcome(lambda: coordinator.join(stop_grace_period_secs=0)), "RuntimeError")
            left = len(coordinator._registered_threads)
            second = kind(lambda: coordinator.join(stop_grace_period_secs=0))
            given = is_kind(outcome(lambda: coordinator.join([thread], stop_grace_period_secs=0)), "RuntimeError")
            return [first, left, second, given, coordinator.joined]

    assert same(program) == [True, 0, "", True, True]


def test_1_17_a_straggler_that_was_forgotten_stays_stopped_in_the_next_round() -> None:
    coordinator, look, seen = OURS.Coordinator(), threading.Event(), []
    straggler = threading.Thread(target=lambda: (look.wait(LONG), seen.append(coordinator.should_stop())), daemon=True)
    straggler.start()
    coordinator.register_thread(straggler)
    coordinator.request_stop()
    coordinator.join(stop_grace_period_secs=0, ignore_live_threads=True)
    coordinator.join(stop_grace_period_secs=0)
    coordinator.clear_stop()
    look.set()
    straggler.join(LONG)
    assert seen == [True]


def test_1_17_live_threads_that_are_ignored() -> None:
    def program(classes: Classes) -> list[Any]:
        coordinator = classes.Coordinator()
        with idle_thread("the-straggler") as thread, logged("tensorflow", "supervise_core") as records:
            coordinator.request_stop()
            coordinator.join([thread], stop_grace_period_secs=0, ignore_live_threads=True)
        return [coordinator.joined, any("the-straggler" in record.getMessage() for record in records)]

    assert same(program) == [True, True]


def test_1_18_the_recorded_error_wins_and_comes_again_until_it_is_cleared() -> None:
    def program(classes: Classes) -> list[Any]:
        coordinator, error = classes.Coordinator(), ProgramError("recorded")

        def fail() -> None:
            raise error

        with coordinator.stop_on_exception():
            fail()
        seen: list[Any] = []
        with idle_thread() as thread:
            for again in (lambda: coordinator.join([thread], stop_grace_period_secs=0), coordinator.join):
                try:
                    again()
                except ProgramError as caught:
                    frames, trace = [], caught.__traceback__
                    while trace is not None:
                        frames.append(trace.tb_frame.f_code.co_name)
                        trace = trace.tb_next
                    seen.append([caught is error, frames[-1]])
        seen.append(kind(coordinator.raise_requested_exception))
        coordinator.clear_stop()
        return [*seen, kind(coordinator.join)]

    assert same(program) == [[True, "fail"], [True, "fail"], "ProgramError", ""]


def test_1_19_stragglers_are_named_and_here_also_located() -> None:
    def program(classes: Classes) -> tuple[BaseException, str]:
        coordinator = classes.Coordinator()
        entered, end = threading.Event(), threading.Event()

        def slow_reader() -> None:
            entered.set()
            end.wait(LONG)

        looper = classes.LooperThread(coordinator, 100.0, slow_reader)
        looper.start()
        entered.wait(LONG)
        coordinator.request_stop()
        try:
            with pytest.raises(RuntimeError) as caught:
                coordinator.join(stop_grace_period_secs=0)
        finally:
            end.set()
            looper.join(LONG)
        return caught.value, looper.name

    error, name = program(THEIRS)
    assert name in str(error)
    assert "slow_reader" not in str(error)
    error, name = program(OURS)
    assert isinstance(error, StragglersError)
    assert "slow_reader" in name
    assert name in str(error).splitlines()[0]
    assert "end.wait(LONG)" in str(error)


def test_1_20_a_thread_that_joins_itself_is_no_straggler() -> None:
    def program(classes: Classes) -> list[Any]:
        coordinator, seen = classes.Coordinator(), []

        def join_all() -> None:
            seen.append(outcome(lambda: coordinator.join(stop_grace_period_secs=0.05)))

        thread = threading.Thread(target=join_all, daemon=True)
        coordinator.register_thread(thread)
        coordinator.request_stop()
        thread.start()
        thread.join(LONG)
        return [is_kind(seen[0], "RuntimeError"), coordinator.joined]

    assert program(THEIRS) == [True, True]
    assert program(OURS) == [False, True]


def test_1_21_a_plain_thread_that_dies_is_told_by_python_and_stops_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []
    monkeypatch.setattr(threading, "excepthook", lambda unhandled: told.append(unhandled.exc_type))

    def program(classes: Classes) -> list[Any]:
        def die() -> None:
            raise ProgramError

        coordinator, thread = classes.Coordinator(), threading.Thread(target=die)
        coordinator.register_thread(thread)
        thread.start()
        return [kind(coordinator.join), coordinator.should_stop()]

    assert same(program) == ["", False]
    assert told == [ProgramError, ProgramError]


def test_1_22_joined_and_raise_requested_exception() -> None:
    def program(classes: Classes) -> list[Any]:
        coordinator, error = classes.Coordinator(), ProgramError("requested")
        seen: list[Any] = [coordinator.joined, outcome(coordinator.raise_requested_exception)]
        coordinator.request_stop(raised(error))
        try:
            coordinator.raise_requested_exception()
        except ProgramError as caught:
            seen.append(caught is error)
        return [*seen, coordinator.joined, kind(coordinator.join), coordinator.joined]

    assert same(program) == [False, {"value": None}, True, False, "ProgramError", True]


def test_1_23_there_are_no_camel_case_names() -> None:
    def program(classes: Classes) -> list[str]:
        names = [name for name in dir(classes.Coordinator) if not name.startswith("_")]
        return [name for name in names if name != name.lower()]

    assert same(program) == []


# ---- 2. LooperThread


@contextlib.contextmanager
def stopping(classes: Classes) -> Iterator[Any]:
    """A coordinator that is stopped at the end of the block, and whose threads then end."""
    coordinator = classes.Coordinator()
    try:
        yield coordinator
    finally:
        coordinator.request_stop()
        coordinator.join(stop_grace_period_secs=LONG)


def test_2_01_what_its_constructor_takes() -> None:
    def program(classes: Classes) -> list[Any]:
        coordinator = classes.Coordinator()

        def made(*args: Any, **kwargs: Any) -> bool:
            return is_kind(outcome(lambda: classes.LooperThread(*args, **kwargs)), "ValueError")

        class OfItsOwn(classes.Coordinator):  # type: ignore[misc, name-defined]
            pass

        look_alike = types.SimpleNamespace(**{name: getattr(coordinator, name) for name in dir(coordinator)[::-1]})
        seen = [
            made(None, 1), made(look_alike, 1), made(OfItsOwn(), 1),
            made(coordinator, 1, args=(3,)), made(coordinator, 1, kwargs={"a": 3}), made(coordinator, 1, args=()),
        ]  # fmt: skip
        looper = classes.LooperThread(coordinator, 1.0, print, (1,), {"end": ""})
        return [*seen, looper.daemon, looper.is_alive(), looper in coordinator._registered_threads]

    assert same(program) == [True, True, False, True, True, False, True, False, True]


def test_2_01_the_class_of_one_does_not_take_the_coordinator_of_the_other() -> None:
    for looper, coordinator in ((THEIRS, OURS), (OURS, THEIRS)):
        with pytest.raises(ValueError, match="oordinator"):
            looper.LooperThread(coordinator.Coordinator(), 1.0)


def test_2_01_a_target_that_cannot_be_called_is_an_error_at_the_call_that_gives_it() -> None:
    def program(classes: Classes) -> list[str]:
        coordinator = classes.Coordinator()
        seen = outcome(lambda: classes.LooperThread.loop(coordinator, None, "not a function"))
        return [seen.get("error", ""), kind(lambda: coordinator.join(stop_grace_period_secs=LONG))]

    assert program(THEIRS) == ["", "TypeError"]
    assert program(OURS) == ["TypeError", ""]


def test_2_02_loop_makes_and_starts_one() -> None:
    def program(classes: Classes) -> list[Any]:
        seen: list[Any] = []
        with stopping(classes) as coordinator:
            called = threading.Event()
            looper = classes.LooperThread.loop(
                coordinator, 0.01, target=lambda *args, **kwargs: (seen.append([args, kwargs]), called.set()),
                args=[1, 2], kwargs={"three": 3},
            )  # fmt: skip
            called.wait(LONG)
            kinds = [isinstance(looper, classes.LooperThread), looper.is_alive(), looper.daemon]
        return [kinds, [list(seen[0][0]), seen[0][1]], looper.is_alive()]

    assert same(program) == [[True, True, True], [[1, 2], {"three": 3}], False]


class Counting:
    """Overrides for a looper that say what was called."""

    def __init__(self, coordinator: Any, interval: float | None, fails_in: str = "", rounds: int = 3) -> None:
        super().__init__(coordinator, interval)  # type: ignore[call-arg]
        self.seen: list[str] = []
        self._ask_to_stop = coordinator.request_stop
        self._fails_in = fails_in
        self._rounds = rounds

    def _saw(self, what: str) -> None:
        self.seen.append(what)
        if what == self._fails_in:
            raise ProgramError(what)

    def start_loop(self) -> None:
        self._saw("start")

    def run_loop(self) -> None:
        if self.seen.count("run") + 1 == self._rounds:
            self._ask_to_stop()
        self._saw("run")

    def stop_loop(self) -> None:
        self._saw("stop")


@pytest.mark.parametrize("interval", [None, 0.001])
def test_2_03_the_order_of_what_is_called(interval: float | None) -> None:
    def program(classes: Classes) -> list[Any]:
        seen = []
        for fails_in in ("", "start", "stop"):
            coordinator = classes.Coordinator()
            looper = type("Looper", (Counting, classes.LooperThread), {})(coordinator, interval, fails_in)
            looper.start()
            looper.join(LONG)
            seen.append([looper.seen, coordinator.should_stop()])
        return seen

    runs = ["start", "run", "run", "run", "stop"]
    assert same(program) == [[runs, True], [["start"], True], [runs, True]]


@pytest.mark.parametrize("fails_in", ["start", "run"])
def test_2_03_after_a_failure_stop_loop_is_not_called(fails_in: str) -> None:
    def program(classes: Classes) -> list[Any]:
        coordinator = classes.Coordinator()
        looper = type("Looper", (Counting, classes.LooperThread), {})(coordinator, 0.001, fails_in)
        looper.start()
        looper.join(LONG)
        return [looper.seen, kind(coordinator.join)]

    assert same(program) == [["start", "run"][: 1 + (fails_in == "run")], "ProgramError"]


def test_2_03_a_failure_of_stop_loop_is_lost_there_and_raised_here() -> None:
    """It comes after the stop, so the coordinator there hears it no more (1.6)."""

    def program(classes: Classes) -> str:
        coordinator = classes.Coordinator()
        looper = type("Looper", (Counting, classes.LooperThread), {})(coordinator, 0.001, "stop")
        looper.start()
        looper.join(LONG)
        return kind(coordinator.join)

    assert program(THEIRS) == ""
    assert program(OURS) == "ProgramError"


class Timeline:
    """One looper in a time of its own: when it runs, and how long it means to wait before the next run."""

    def __init__(self, classes: Classes, monkeypatch: pytest.MonkeyPatch) -> None:
        self.runs: list[float] = []
        self.clock = FakeClock()
        self._classes = classes
        self._patch = monkeypatch
        self._shift = 0.0

    def shift_wall_clock(self, seconds: float) -> None:
        self._shift += seconds

    def run(self, interval: float | None, last: float, during: Callable[[int], None] = lambda _: None) -> list[float]:
        """The times at which it runs, until it would run after ``last``."""
        line, began = self, self.clock.monotonic()

        def target() -> None:
            line.runs.append(line.clock.monotonic() - began)
            during(len(line.runs))

        if self._classes.are_ours:
            coordinator = self._classes.Coordinator()
            coordinator._newest.clock = _StoppingClock(self.clock, coordinator, began + last)
        else:
            coordinator = _timed(self._classes.Coordinator, self.clock, began + last)()
            from tensorflow.python.training import coordinator as module

            wall = types.SimpleNamespace(time=lambda: line.clock.monotonic() + line._shift, sleep=time.sleep)
            self._patch.setattr(module, "time", wall)
        looper = self._classes.LooperThread(coordinator, interval, target)
        looper.start()
        looper.join(LONG)
        assert not looper.is_alive()
        coordinator.join(stop_grace_period_secs=0)
        return self.runs


class _StoppingClock(FakeClock):
    """Waits by moving another clock on; a wait that goes beyond the end requests the stop."""

    def __init__(self, clock: FakeClock, coordinator: Any, end: float) -> None:
        super().__init__()
        self._clock = clock
        self._coordinator = coordinator
        self._end = end

    def monotonic(self) -> float:
        return self._clock.monotonic()

    def wait(self, event: threading.Event, timeout: float | None) -> bool:
        if self._clock.monotonic() + (timeout or 0.0) > self._end:
            self._coordinator.request_stop()
        elif timeout is not None and timeout > 0:
            self._clock.advance(timeout)
        return event.is_set()


def _timed(base: Any, clock: FakeClock, end: float) -> Any:
    """A coordinator of TensorFlow's, subclassed, that waits as above."""

    class Timed(base):  # type: ignore[misc]
        def wait_for_stop(self, timeout: float | None = None) -> bool:
            if clock.monotonic() + max(0.0, timeout or 0.0) > end:
                self.request_stop()
            elif timeout is not None and timeout > 0:
                clock.advance(timeout)
            return bool(self.should_stop())

    return Timed


def test_2_04_the_first_run_comes_at_once_and_then_at_a_fixed_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    def program(classes: Classes) -> list[float]:
        line = Timeline(classes, monkeypatch)
        times = line.run(10.0, 45.0, lambda number: line.clock.advance(3.0 if number == 2 else 0.5))
        return [round(moment, 6) for moment in times]

    assert same(program) == [0.0, 10.0, 20.0, 30.0, 40.0]


def test_2_04_without_an_interval_it_is_back_to_back() -> None:
    def program(classes: Classes) -> list[str]:
        coordinator = classes.Coordinator()
        looper = type("Looper", (Counting, classes.LooperThread), {})(coordinator, None, rounds=50)
        looper.start()
        looper.join(LONG)
        return looper.seen

    assert same(program) == ["start", *["run"] * 50, "stop"]


def test_2_05_a_stop_ends_the_wait_and_no_run() -> None:
    def program(classes: Classes) -> list[Any]:
        coordinator = classes.Coordinator()
        ran, end, order = threading.Event(), threading.Event(), []

        def target() -> None:
            ran.set()
            end.wait(LONG)
            order.append("run ended")

        looper = classes.LooperThread.loop(coordinator, 3600.0, target)
        ran.wait(LONG)
        coordinator.request_stop()
        looper.join(0.05)
        interrupted = not looper.is_alive()
        end.set()
        looper.join(LONG)
        second, called = classes.Coordinator(), threading.Event()
        waiting = classes.LooperThread.loop(second, 3600.0, called.set)
        called.wait(LONG)
        second.request_stop()
        waiting.join(LONG)
        return [interrupted, order, looper.is_alive(), waiting.is_alive()]

    assert same(program) == [False, ["run ended"], False, False]


@pytest.mark.parametrize("interval", [None, 0.001, 100.0])
def test_2_06_after_a_stop_it_never_runs(interval: float | None) -> None:
    def program(classes: Classes) -> list[str]:
        coordinator = classes.Coordinator()
        looper = type("Looper", (Counting, classes.LooperThread), {})(coordinator, interval)
        coordinator.request_stop()
        looper.start()
        looper.join(LONG)
        return looper.seen

    assert same(program) == ["start", "stop"]


def test_2_06_one_that_is_started_after_clear_stop_belongs_to_the_new_round() -> None:
    def program(classes: Classes) -> list[Any]:
        coordinator = classes.Coordinator()
        looper = type("Looper", (Counting, classes.LooperThread), {})(coordinator, None)
        coordinator.request_stop()
        coordinator.clear_stop()
        looper.start()
        looper.join(LONG)
        return [looper.seen, coordinator.should_stop()]

    assert same(program) == [["start", "run", "run", "run", "stop"], True]


def test_2_07_after_a_long_run_there_is_no_burst(monkeypatch: pytest.MonkeyPatch) -> None:
    def program(classes: Classes) -> list[float]:
        line = Timeline(classes, monkeypatch)
        times = line.run(10.0, 95.0, lambda number: line.clock.advance(75.0 if number == 1 else 0.0))
        return [round(moment, 6) for moment in times]

    assert program(THEIRS) == [0.0, *[75.0] * 7, 80.0, 90.0]
    assert program(OURS) == [0.0, 80.0, 90.0]


def test_2_08_a_wall_clock_that_is_set_moves_no_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def program(classes: Classes, seconds: float) -> list[float]:
        line = Timeline(classes, monkeypatch)

        def during(number: int) -> None:
            line.clock.advance(1.0)
            if number == 2:
                line.shift_wall_clock(seconds)

        if classes.are_ours:
            monkeypatch.setattr(time, "time", lambda: line.clock.monotonic() + line._shift)
        times = line.run(10.0, 45.0, during)
        monkeypatch.undo()
        return [round(moment, 6) for moment in times]

    assert program(THEIRS, -3600.0) == [0.0, 10.0]
    assert len(program(THEIRS, 3600.0)) > 20
    assert program(OURS, -3600.0) == [0.0, 10.0, 20.0, 30.0, 40.0]
    assert program(OURS, 3600.0) == [0.0, 10.0, 20.0, 30.0, 40.0]


@pytest.mark.parametrize("interval", [0, -1, -0.5])
def test_2_09_an_interval_that_would_never_wait_is_refused(interval: float) -> None:
    coordinator = THEIRS.Coordinator()
    runs: list[float] = []

    def target() -> None:
        runs.append(time.monotonic())
        if len(runs) == 1000:
            coordinator.request_stop()

    THEIRS.LooperThread.loop(coordinator, interval, target).join(LONG)
    assert len(runs) == 1000
    with pytest.raises(ValueError, match="interval"):
        OURS.LooperThread(OURS.Coordinator(), interval, print)


def test_2_10_an_exception_stops_all_and_nothing_is_started_again() -> None:
    def program(classes: Classes) -> list[Any]:
        coordinator, calls = classes.Coordinator(), []

        def fail() -> None:
            calls.append("failing")
            raise ProgramError("in a loop")

        other = classes.LooperThread.loop(coordinator, 3600.0, lambda: None)
        failing = classes.LooperThread.loop(coordinator, 0.001, fail)
        failing.join(LONG)
        other.join(LONG)
        return [calls, failing.is_alive(), other.is_alive(), coordinator.should_stop(), kind(coordinator.join)]

    assert same(program) == [["failing"], False, False, True, "ProgramError"]


def test_2_10_an_end_of_input_in_a_loop_is_a_clean_stop() -> None:
    def program(classes: Classes) -> list[Any]:
        coordinator = classes.Coordinator()

        def at_the_end() -> None:
            raise tf.errors.OutOfRangeError(None, None, "end")

        classes.LooperThread.loop(coordinator, 0.001, at_the_end).join(LONG)
        return [coordinator.should_stop(), kind(coordinator.join)]

    assert same(program) == [True, ""]


def test_2_11_without_a_target_a_run_does_nothing() -> None:
    def program(classes: Classes) -> list[Any]:
        coordinator = classes.Coordinator()
        looper = classes.LooperThread(coordinator, 0.001)
        seen = [looper.start_loop(), looper.run_loop(), looper.stop_loop()]
        looper.start()
        coordinator.wait_for_stop(0.02)
        coordinator.request_stop()
        looper.join(LONG)
        return [*seen, looper.is_alive(), kind(coordinator.join)]

    assert same(program) == [None, None, None, False, ""]


def test_2_11_run_loop_calls_the_target() -> None:
    def program(classes: Classes) -> list[Any]:
        seen: list[Any] = []
        looper = classes.LooperThread(classes.Coordinator(), 1.0, seen.append, ["called"])
        return [looper.run_loop(), seen]

    assert same(program) == [None, ["called"]]
