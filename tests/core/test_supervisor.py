"""The Supervisor's own promises: one session at a time, one writer, times on the clock, and use without ``with``."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from supervise_core import (
    CheckpointDirectory,
    CheckpointNotFoundError,
    EverySeconds,
    EverySteps,
    KeepAll,
    LeaseHeldError,
    SessionStateError,
    StragglersError,
    Supervisor,
)
from supervise_core.testing.clock import FakeClock, eventually
from supervise_numpy import ArrayBackend


def supervisor(logdir: Path | None = None, **options: Any) -> Supervisor[Any]:
    return Supervisor(ArrayBackend({"w": np.zeros(1)}), logdir, summarize_every=None, **options)


def steps_of(logdir: Path) -> list[int]:
    return CheckpointDirectory(logdir).steps()


# ---- one session at a time


def test_a_second_session_at_the_same_time_is_refused(tmp_path: Path) -> None:
    sv = supervisor(tmp_path)
    with sv.managed_session(), pytest.raises(SessionStateError, match=r"has an open session; call sv\.stop"):
        sv.prepare_or_wait_for_session()


def test_another_session_can_follow(tmp_path: Path) -> None:
    sv = supervisor(tmp_path)
    for expected in (1, 2, 3):
        with sv.managed_session() as sess:
            assert not sv.should_stop()
            sess.global_step += 1
        assert sv.should_stop()
        assert sv.report.last_step == sv.global_step == expected
    assert steps_of(tmp_path) == [0, 1, 2, 3]


def test_a_session_can_follow_one_that_failed(tmp_path: Path) -> None:
    sv = supervisor(tmp_path)
    with pytest.raises(ValueError, match="broken"), sv.managed_session():
        raise ValueError("broken")
    with sv.managed_session() as sess:
        sess.global_step += 1
    assert sv.report.exit_status == 0
    assert sv.report.errors == []


def test_a_logdir_has_one_writer_in_one_process_too(tmp_path: Path) -> None:
    with supervisor(tmp_path).managed_session():
        with pytest.raises(LeaseHeldError, match=str(os.getpid())):
            supervisor(tmp_path).prepare_or_wait_for_session()
        eventually(lambda: steps_of(tmp_path) == [0])
    with supervisor(tmp_path).managed_session():
        pass


def test_a_start_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    def fail(session: object) -> None:
        raise OSError("no data")

    before = threading.active_count()
    with pytest.raises(OSError, match="no data"):
        supervisor(tmp_path, init_fn=fail).prepare_or_wait_for_session()
    assert threading.active_count() == before
    with supervisor(tmp_path).managed_session():
        pass


def test_a_checkpoint_that_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFoundError, match="resume='must' needs a checkpoint"):
        supervisor(tmp_path, resume="must").prepare_or_wait_for_session()


@pytest.mark.parametrize("method", ["epochs", "batches", "save", "metrics"])
def test_what_needs_a_session_says_so(method: str) -> None:
    sv = supervisor()
    arguments: dict[str, tuple[Any, ...]] = {"epochs": (3,), "batches": ([],)}
    with pytest.raises(SessionStateError, match=rf"sv.{method} needs an open session"):
        getattr(sv, method)(*arguments.get(method, ()))


def test_without_a_logdir_nothing_is_saved() -> None:
    sv = supervisor()
    with sv.managed_session() as sess:
        sess.global_step += 1
        with pytest.raises(SessionStateError, match="saves nothing"):
            sv.save()
    assert sv.report.final_save == "switched off"


# ---- without ``with``


def test_a_session_without_a_with_block(tmp_path: Path) -> None:
    sv = supervisor(tmp_path)
    sess = sv.prepare_or_wait_for_session()
    while not sv.should_stop():
        sess.global_step += 1
        if sess.global_step == 4:
            sv.request_stop()
    sv.stop()
    sv.stop()
    assert steps_of(tmp_path) == [0, 4]
    assert sv.report.final_save == "step 4"


def test_stop_raises_the_first_error(tmp_path: Path) -> None:
    sv = supervisor(tmp_path)
    sv.prepare_or_wait_for_session()
    sv.request_stop(ValueError("broken"))
    with pytest.raises(ValueError, match="broken"):
        sv.stop()


def test_stop_while_an_error_is_handled_withholds_the_final_save(tmp_path: Path) -> None:
    sv = supervisor(tmp_path)
    sess = sv.prepare_or_wait_for_session()

    def train() -> None:
        try:
            sess.global_step += 1
            raise ValueError("broken")
        finally:
            sv.stop()

    with pytest.raises(ValueError, match="broken"):
        train()
    assert steps_of(tmp_path) == [0]
    assert sv.report.final_save == "withheld: the training block ended with ValueError"


def test_stop_names_threads_that_do_not_stop(tmp_path: Path) -> None:
    released = threading.Event()
    thread = threading.Thread(target=released.wait, args=(10,), name="deaf")
    thread.start()
    sv = supervisor(tmp_path, grace=0.01)
    sv.prepare_or_wait_for_session()
    with pytest.raises(StragglersError, match="deaf"):
        sv.stop([thread])
    released.set()
    thread.join(10)


def test_stop_within_the_block_ends_it(tmp_path: Path) -> None:
    sv = supervisor(tmp_path)
    with sv.managed_session() as sess:
        sess.global_step += 1
        sv.stop()
        assert sv.should_stop()
    assert steps_of(tmp_path) == [0, 1]


def test_the_standard_services_can_be_started_later(tmp_path: Path) -> None:
    sv = supervisor(tmp_path)
    sess = sv.prepare_or_wait_for_session(start_standard_services=False)
    assert steps_of(tmp_path) == []
    assert [thread.name for thread in sv.start_standard_services(sess)] == ["supervise-core checkpoints"]
    with pytest.raises(SessionStateError, match="run already"):
        sv.start_standard_services(sess)
    sess.global_step += 1
    assert not sv.should_stop()  # a boundary: the first save waits for one, as the loop may be within a step
    sess.global_step += 1
    sv.stop()
    assert steps_of(tmp_path) == [1, 2]


# ---- stops and loops


def test_a_stop_asked_for_before_the_session_is_none_of_its_own(tmp_path: Path) -> None:
    sv = supervisor(tmp_path)
    sv.request_stop()
    assert sv.should_stop()
    with sv.managed_session():
        assert not sv.should_stop()


def test_a_stop_can_be_waited_for(tmp_path: Path) -> None:
    sv = supervisor(tmp_path)
    with sv.managed_session():
        assert not sv.wait_for_stop(0.0)
        threading.Thread(target=sv.request_stop).start()
        assert sv.wait_for_stop(10)


def test_a_loop_of_ones_own_runs_until_the_end(tmp_path: Path) -> None:
    clock = FakeClock()
    sv = supervisor(tmp_path, clock=clock)
    runs: list[int] = []
    with sv.managed_session():
        looper = sv.loop(60, runs.append, (1,))
        eventually(lambda: len(runs) == 1)
        clock.advance(60)
        eventually(lambda: len(runs) == 2)
    assert not looper.is_alive()


def test_an_error_of_a_loop_of_ones_own_stops_the_run(tmp_path: Path) -> None:
    def fail() -> None:
        raise OSError("broken")

    sv = supervisor(tmp_path)
    with pytest.raises(OSError, match="broken"), sv.managed_session() as sess:  # noqa: PT012
        sess.global_step += 1
        sv.loop(60, fail)
        while not sv.should_stop():
            sess.global_step += 1
    assert steps_of(tmp_path)[-1] == sv.report.last_step


def test_exceptions_of_a_guarded_block_are_raised_at_the_end(tmp_path: Path) -> None:
    sv = supervisor(tmp_path)
    with pytest.raises(ValueError, match="guarded"), sv.managed_session():  # noqa: PT012
        with sv.stop_on_exception():
            raise ValueError("guarded")
        assert sv.should_stop()


def test_asking_from_another_thread_is_only_a_question(tmp_path: Path) -> None:
    sv = supervisor(tmp_path, save_every=EverySteps(1), keep=KeepAll())
    answers: list[bool] = []
    with sv.managed_session() as sess:
        sess.global_step += 1
        asking = threading.Thread(target=lambda: answers.append(sv.should_stop()))
        asking.start()
        asking.join(10)
        assert sv.report.saves <= 1
    assert answers == [False]


# ---- time


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


def test_ten_minutes_pass_in_a_millisecond(tmp_path: Path, clock: FakeClock) -> None:
    sv = supervisor(tmp_path, save_every=EverySeconds(600), keep=KeepAll(), clock=clock)

    def saved_at_next_boundary() -> bool:
        sv.should_stop()
        return steps_of(tmp_path)[-1] == sess.global_step

    with sv.managed_session() as sess:
        eventually(lambda: steps_of(tmp_path) == [0])
        sess.global_step = 1
        clock.advance(599)
        for _ in range(50):
            assert not saved_at_next_boundary()
        clock.advance(1)
        eventually(saved_at_next_boundary)
        sess.global_step = 2
        clock.advance(300)
        assert not saved_at_next_boundary()
    assert steps_of(tmp_path) == [0, 1, 2]


# ---- arguments


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"save_every": 600}, "save_every= takes a trigger"),
        ({"summarize_every": 120}, "summarize_every= takes a trigger"),
        ({"keep": 5}, "keep= takes a retention rule"),
        ({"init": 5}, "init= takes a callable or None"),
    ],
)
def test_arguments_of_another_kind_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        Supervisor(ArrayBackend({"w": np.zeros(1)}), **options)


def test_a_class_is_no_backend() -> None:
    with pytest.raises(TypeError, match="pass an object of the class, not the class"):
        Supervisor(ArrayBackend)  # type: ignore[arg-type]


@pytest.mark.parametrize("grace", [-1, float("nan")])
def test_the_grace_period_is_not_negative(grace: float) -> None:
    with pytest.raises(ValueError, match="grace= takes a number of seconds"):
        Supervisor(ArrayBackend({"w": np.zeros(1)}), grace=grace)


# ---- peers that are lost while a signal stops the run


class PeerLostError(Exception):
    """What a framework raises when another process of the job is gone."""


class LonelyBackend(ArrayBackend):
    """A backend that may lose a peer."""

    recoverable = (PeerLostError,)


def fail_after_a_signal(sv: Supervisor[Any], error: Exception) -> None:
    with sv.managed_session():
        signal.raise_signal(signal.SIGTERM)
        eventually(sv.coord.should_stop)
        raise error


def test_a_peer_lost_after_a_signal_is_part_of_that_stop(tmp_path: Path) -> None:
    sv = Supervisor(LonelyBackend({"w": np.zeros(1)}), tmp_path, summarize_every=None)
    with pytest.raises(SystemExit) as caught:
        fail_after_a_signal(sv, PeerLostError("the others were told to end, too"))
    assert caught.value.code == sv.report.exit_status == 143
    assert isinstance(caught.value.__cause__, PeerLostError)


def test_another_error_after_a_signal_is_an_error(tmp_path: Path) -> None:
    sv = Supervisor(LonelyBackend({"w": np.zeros(1)}), tmp_path, summarize_every=None)
    with pytest.raises(ValueError, match="broken"):
        fail_after_a_signal(sv, ValueError("broken"))
    assert sv.report.exit_status == 1


# ---- runs that save nothing


def test_a_run_that_saves_nothing_writes_summaries_and_takes_no_lease(tmp_path: Path) -> None:
    writer = supervisor(tmp_path / "new" / "run")
    with writer.managed_session() as sess:
        reader = Supervisor(ArrayBackend({"w": np.zeros(1)}), tmp_path / "new" / "run", saver=None)
        with reader.managed_session():
            assert reader.report.restored is None
        sess.global_step += 1
    alone = Supervisor(ArrayBackend({"w": np.zeros(1)}), tmp_path / "other" / "run", saver=None)
    with alone.managed_session() as sess:
        sess.global_step += 1
    assert len(list((tmp_path / "other" / "run").iterdir())) == 1


def test_a_chief_may_wait_for_a_checkpoint_of_somebody_else(tmp_path: Path) -> None:
    with supervisor(tmp_path / "first").managed_session() as sess:
        sess.global_step += 7
    waiting = supervisor(tmp_path / "second")

    def bring() -> None:
        (tmp_path / "second").mkdir()
        (tmp_path / "first" / "model.ckpt-7").rename(tmp_path / "second" / "model.ckpt-7")

    messenger = threading.Timer(0.2, bring)
    messenger.start()
    with waiting.managed_session(wait_for_checkpoint=True, max_wait_secs=60) as sess:
        assert sess.global_step == 7
    messenger.join()
    assert waiting.report.restored == "model.ckpt-7"
