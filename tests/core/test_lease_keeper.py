"""The writer beats from the moment that it has the lease until it lets go of it, whatever the run does meanwhile."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from supervise_core import LeaseLostError, Supervisor
from supervise_core.checkpoint_format import CheckpointId, Draft
from supervise_core.coordinator import Coordinator
from supervise_core.lease import BEAT_EVERY
from supervise_core.lease_keeper import LeaseKeeper
from supervise_core.testing.clock import FakeClock, eventually
from supervise_core.testing.stores import MemoryStore
from supervise_numpy import ArrayBackend


class BeatingStore(MemoryStore):
    """Counts its beats; each of them, and each draft, may be made to fail or to wait."""

    def __init__(self) -> None:
        super().__init__()
        self.beats = 0
        self.on_beat: Callable[[], object] = lambda: None
        self.on_draft: Callable[[CheckpointId], object] = lambda _: None

    def beat(self) -> None:
        self.beats += 1
        self.on_beat()
        super().beat()

    def begin(self, checkpoint: CheckpointId) -> Draft:
        self.on_draft(checkpoint)
        return super().begin(checkpoint)


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def store() -> BeatingStore:
    return BeatingStore()


def a_long_time(clock: FakeClock, store: BeatingStore) -> None:
    """Longer than a silent writer is believed in; each beat of it has to come."""
    for _ in range(6):
        before = store.beats
        clock.advance(BEAT_EVERY)
        eventually(lambda before=before: store.beats == before + 1)
        clock.wait_for_sleepers(1)


def supervisor(store: BeatingStore, clock: FakeClock, **options: Any) -> Supervisor[Any]:
    return Supervisor(ArrayBackend({"w": np.zeros(1)}), store=store, clock=clock, summarize_every=None, **options)


def test_while_the_model_is_brought_up(store: BeatingStore, clock: FakeClock) -> None:
    sv = supervisor(store, clock, init_fn=lambda _: a_long_time(clock, store))
    with sv.managed_session():
        assert store.is_writer


def test_while_the_last_save_is_written(store: BeatingStore, clock: FakeClock) -> None:
    def slowly(checkpoint: CheckpointId) -> None:
        if checkpoint.step == 1:
            a_long_time(clock, store)

    store.on_draft = slowly
    sv = supervisor(store, clock, save_every=None)
    with sv.managed_session() as session:
        session.global_step += 1
    assert sv.report.final_save == "step 1"
    assert store.beats == 6
    assert not store.is_writer


def test_a_lease_that_is_lost_stops_the_run(store: BeatingStore, clock: FakeClock) -> None:
    def be_replaced() -> None:
        with sv.managed_session():
            store.die()
            clock.wait_for_sleepers(1)
            clock.advance(BEAT_EVERY)
            eventually(sv.should_stop)

    sv = supervisor(store, clock)
    with pytest.raises(LeaseLostError):
        be_replaced()
    assert "the lease" in str(sv.report.cause)


def test_a_beat_that_the_disk_does_not_take_is_tried_again(
    store: BeatingStore, clock: FakeClock, caplog: pytest.LogCaptureFixture
) -> None:
    def fail_once() -> None:
        if store.beats == 1:
            raise OSError("no space left")

    store.on_beat = fail_once
    sv = supervisor(store, clock)
    with sv.managed_session():
        a_long_time(clock, store)
        assert not sv.should_stop()
    assert "could not be renewed (no space left); trying again" in caplog.text


def test_a_start_that_fails_lets_go(store: BeatingStore, clock: FakeClock) -> None:
    def fail() -> None:
        with LeaseKeeper(store, coordinator):
            assert store.is_writer
            raise ValueError("a start")

    before = threading.active_count()
    coordinator = Coordinator(clock)
    with pytest.raises(ValueError, match="a start"):
        fail()
    assert not store.is_writer
    assert not coordinator.should_stop()
    assert threading.active_count() == before


def test_a_beat_that_never_returns_does_not_hold_up_the_end(store: BeatingStore, clock: FakeClock) -> None:
    returns = threading.Event()
    store.on_beat = lambda: returns.wait(60)

    def live() -> None:
        with LeaseKeeper(store, Coordinator(clock)):
            clock.wait_for_sleepers(1)
            clock.advance(BEAT_EVERY)
            eventually(lambda: store.beats == 1)

    life = threading.Thread(target=live)
    life.start()
    eventually(lambda: store.beats == 1)
    clock.wait_for_sleepers(1)  # the end of the block waits for the beat
    clock.advance(BEAT_EVERY)
    life.join(10)
    assert not life.is_alive()
    assert not store.is_writer
    returns.set()
