"""Whatever the instant of a crash or a power cut: the old checkpoints or the new ones, each of them whole."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from scenarios import SCENARIOS, Scenario, State, open_store, save, state_of

from supervise_core.testing.disks import (
    AnyOutcome,
    Crash,
    CrashingDisk,
    HastyDisk,
    LossyDisk,
    NamesWithoutContent,
    Outcome,
    WatchedDisk,
)
from supervise_core.testing.hosts import FakeMachine

Drop = Callable[[int, str, Path], bool]

each_scenario = pytest.mark.parametrize("scenario", SCENARIOS, ids=str)


class Replay:
    """One scenario, again and again from the same beginning."""

    def __init__(self, scenario: Scenario, directory: Path) -> None:
        self.scenario = scenario
        self._original = directory / "original"
        self._original.mkdir()
        scenario.set_up(self._original / "runs" / "digits")
        self._root = directory / "replay"
        self.logdir = self._root / "runs" / "digits"

    def fresh(self) -> Path:
        """The root of a fresh copy, in the same place each time."""
        if self._root.exists():
            shutil.rmtree(self._root)
        shutil.copytree(self._original, self._root)
        return self._root

    def calls(self) -> int:
        """How many changing calls the whole scenario makes."""
        self.fresh()
        disk = WatchedDisk()
        self.scenario.run(self.logdir, disk, FakeMachine().process())
        return len(disk.calls)

    def crash(self, before: int) -> None:
        """The death of the process, the machine going on; then what must hold."""
        self.fresh()
        machine = FakeMachine()
        victim = machine.process()
        with pytest.raises(Crash):
            self.scenario.run(self.logdir, CrashingDisk(before), victim)
        victim.die()
        self.check_next_start(machine, self.scenario.states)

    def cut_power(self, before: int | None, outcome: Outcome, without: Drop | None = None) -> None:
        """A power cut before that call, or (None) when all was done; then what must hold."""
        disk = LossyDisk(self.fresh(), before, without=without)
        machine = FakeMachine()
        states = self.scenario.states
        try:
            self.scenario.run(self.logdir, disk, machine.process())
            states = states[-1:]
        except Crash:
            pass
        disk.power_cut(outcome)
        machine.reboot()
        self.check_next_start(machine, states)

    def syncs(self) -> list[tuple[str, Path]]:
        disk = LossyDisk(self.fresh())
        self.scenario.run(self.logdir, disk, FakeMachine().process())
        return disk.syncs

    def check_next_start(self, machine: FakeMachine, states: tuple[State, ...]) -> None:
        """Readers find nothing broken; the next writer finds one of the states, leaves no litter, and can go on."""
        state_of(self.logdir)
        store = open_store(self.logdir, HastyDisk(), machine.process())
        with store.writing():
            found = state_of(self.logdir)
            assert found in states
            assert [path.name for path in (self.logdir / ".work").iterdir()] == [store._lease.directory.name]
            save(store, 99)
        assert state_of(self.logdir).listed == (*found.listed, "model.ckpt-99")
        assert list((self.logdir / ".work").iterdir()) == []


@pytest.fixture
def replay(scenario: Scenario, tmp_path: Path) -> Replay:
    return Replay(scenario, tmp_path)


@each_scenario
def test_whole_scenario_reaches_its_last_state(replay: Replay) -> None:
    assert replay.calls() > 10
    assert state_of(replay.logdir) == replay.scenario.states[-1]


@each_scenario
def test_crash_before_each_call(replay: Replay) -> None:
    for before in range(1, replay.calls() + 1):
        replay.crash(before)


@each_scenario
@pytest.mark.campaign(small=3, soak=60)
def test_power_cut_before_each_call(replay: Replay, count: int, seed: int) -> None:
    outcomes: list[Callable[[], Outcome]] = [Outcome, NamesWithoutContent]
    outcomes += [lambda number=number: AnyOutcome(seed + number) for number in range(count)]  # type: ignore[misc]
    for before in (*range(1, replay.calls() + 1), None):
        for number, outcome in enumerate(outcomes):
            try:
                replay.cut_power(before, outcome())
            except AssertionError as error:
                error.add_note(f"the power was cut before call {before}, outcome {number}")
                raise
