"""Whatever the instant of a crash or a power cut: the old checkpoints of a bundle store or the new ones, each whole."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import pytest

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
pytest.importorskip("tensorflow", reason="TensorFlow is not installed")

from bundle_scenarios import SCENARIOS, Scenario, State, litter, open_store, save, state_of, told

from supervise_core.errors import CheckpointDamagedError
from supervise_core.testing.disks import Crash, CrashingDisk, HastyDisk, WatchedDisk
from supervise_core.testing.hosts import FakeMachine
from supervise_core.testing.power_cuts import AnyOutcome, LossyDisk, NamesWithoutContent, Outcome
from supervise_tf.bundle import read_bundle

Drop = Callable[[int, str, Path], bool]

each_scenario = pytest.mark.parametrize("scenario", SCENARIOS, ids=str)


class ForgetfulDisk(HastyDisk):
    """A writer with this disk dies before it tells the state file."""

    def rename(self, source: Path, target: Path) -> None:
        if target.name.startswith("checkpoint"):
            raise Crash(target)
        super().rename(source, target)


class Replay:
    """One scenario, again and again from the same beginning."""

    def __init__(self, scenario: Scenario, directory: Path) -> None:
        self.scenario = scenario
        self._original = directory / "original"
        self._original.mkdir()
        scenario.set_up(self._original / "runs" / "digits")
        self._calls = 0
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
        if not self._calls:
            self.fresh()
            disk = WatchedDisk()
            self.scenario.run(self.logdir, disk, FakeMachine().process())
            self._calls = len(disk.calls)
        return self._calls

    def crash(self, before: int) -> None:
        """The death of the process, the machine going on; then what must hold."""
        self.fresh()
        machine = FakeMachine()
        with pytest.raises(Crash):
            self.scenario.run(self.logdir, CrashingDisk(before), machine.process())
        machine.living.clear()
        self.check_next_start(machine, self.scenario.states)

    def cut_power(self, before: int | None, outcome: Outcome, without: Drop | None = None) -> None:
        """A power cut before that call, or (None) when all was done; then what must hold."""
        disk = LossyDisk(self.fresh(), before, without=without)
        machine = FakeMachine()
        states, done = self.scenario.states, False
        try:
            self.scenario.run(self.logdir, disk, machine.process())
            states, done = states[-1:], True
        except Crash:
            pass
        disk.power_cut(outcome)
        machine.reboot()
        if done:
            self.check_told(states[-1])
        self.check_next_start(machine, states)

    def check_told(self, state: State) -> None:
        """TensorFlow's tools are told of the newest."""
        newest = state.listed[-1] if state.listed else None
        expected = "model.ckpt" if self.scenario.unnumbered and newest else newest
        assert told(self.logdir) == expected
        if newest and self.scenario.unnumbered:
            bare, numbered = read_bundle(self.logdir / "model.ckpt"), read_bundle(self.logdir / newest)
            assert {name: array.tolist() for name, array in bare.items()} == {
                name: array.tolist() for name, array in numbered.items()
            }

    def check_next_start(self, machine: FakeMachine, states: tuple[State, ...]) -> None:
        """Readers find nothing broken; the next writer finds one of the states, leaves no litter, and can go on."""
        state_of(self.logdir)
        store = open_store(self.logdir, HastyDisk(), machine.process(), self.scenario.unnumbered)
        with store.writing():
            found = state_of(self.logdir)
            assert found in states
            assert [path.name for path in (self.logdir / ".work").glob("*-*") if path.is_dir()] == [
                store._lease.directory.name
            ]
            assert litter(self.logdir) == []
            assert store.preferred() is None
            self.check_told(found)
        forgetful = open_store(self.logdir, ForgetfulDisk(), machine.process(), self.scenario.unnumbered)
        with contextlib.suppress(Crash):
            forgetful.acquire()
            save(forgetful, 98)
        machine.living.clear()
        store = open_store(self.logdir, HastyDisk(), machine.process(), self.scenario.unnumbered)
        with store.writing():
            assert store.preferred() is None, "what we wrote ourselves is taken for the user's wish"
            save(store, 99)
        after = state_of(self.logdir)
        assert after.listed == (*found.listed, "model.ckpt-98", "model.ckpt-99")
        self.check_told(after)
        assert [path.name for path in (self.logdir / ".work").iterdir()] == ["checkpoint-state.json"]


@pytest.fixture
def quick_path() -> Generator[Path, None, None]:
    """A directory in memory, where there is one: power cuts are modelled, so the disk itself does not matter."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as path:
        yield Path(path)


@pytest.fixture
def replay(scenario: Scenario, quick_path: Path) -> Replay:
    return Replay(scenario, quick_path)


@each_scenario
def test_whole_scenario_reaches_its_last_state(replay: Replay) -> None:
    assert replay.calls() > 10
    assert state_of(replay.logdir) == replay.scenario.states[-1]


@each_scenario
def test_crash_before_each_call(replay: Replay) -> None:
    for before in range(1, replay.calls() + 1):
        try:
            replay.crash(before)
        except AssertionError as error:
            error.add_note(f"the crash was before call {before}")
            raise


@each_scenario
@pytest.mark.campaign(small=4, soak=200)
def test_crash_and_then_crashes_of_those_who_sweep(replay: Replay, count: int, seed: int) -> None:
    """One dies at its work, the next ones at cleaning up after it, at random calls; then the power may go as well."""
    chance = random.Random(seed)
    calls = replay.calls()
    for _ in range(count):
        disk, machine = LossyDisk(replay.fresh()), FakeMachine()
        disk.crash_before = chance.randint(1, calls)
        with contextlib.suppress(Crash):
            replay.scenario.run(replay.logdir, disk, machine.process())
        machine.living.clear()
        for _ in range(chance.randrange(3)):
            disk.crash_before = len(disk.calls) + chance.randint(1, 25)
            store = open_store(replay.logdir, disk, machine.process(), replay.scenario.unnumbered)
            with contextlib.suppress(Crash), store.writing():
                pass
            machine.living.clear()
        if chance.random() < 0.5:
            disk.power_cut(AnyOutcome(chance.randrange(1 << 30)))
            machine.reboot()
        replay.check_next_start(machine, replay.scenario.states)


@each_scenario
@pytest.mark.campaign(small=1, soak=60)
def test_power_cut_before_each_call(replay: Replay, count: int, seed: int) -> None:
    """Each moment with ``count`` outcomes, which take turns."""
    for before in (*range(1, replay.calls() + 1), None):
        for number in range(count):
            turn = (before or 0) + number
            outcome = (Outcome(), NamesWithoutContent(), AnyOutcome(seed + turn))[turn % 3]
            try:
                replay.cut_power(before, outcome)
            except (AssertionError, CheckpointDamagedError) as error:
                error.add_note(f"the power was cut before call {before}, {type(outcome).__name__} {seed + turn}")
                raise


# ---- each fsync, removed, does harm


@dataclass(frozen=True)
class Sync:
    """One sync of one replay: its number, and how many changing calls came before it."""

    replay: Replay
    number: int
    calls: int

    def does_harm_when_dropped(self, seed: int, moments: int) -> bool:
        """Whether some power cut is noticed, at the end or before one of the calls that come next."""
        last = min(self.calls + 2 + moments, self.replay.calls() + 1)
        outcomes = [Outcome(), NamesWithoutContent(), *(AnyOutcome(seed + number) for number in range(3))]
        for before, outcome in itertools.product((None, *range(self.calls + 2, last)), outcomes):
            try:
                self.replay.cut_power(before, outcome, lambda number, *_: number == self.number)
            except (AssertionError, CheckpointDamagedError, OSError, ValueError):
                return True
        return False


def syncs_by_place(replays: Iterable[Replay]) -> dict[str, list[Sync]]:
    """Every sync that this store asks for itself, by its place in the program; those of others are judged elsewhere."""
    found: dict[str, list[Sync]] = {}
    for replay in replays:
        _note_syncs(replay, found)
    return found


def _note_syncs(replay: Replay, found: dict[str, list[Sync]]) -> None:
    def note(number: int, method: str, path: Path) -> bool:
        frame: FrameType | None = sys._getframe(2)
        while frame is not None and frame.f_code.co_filename.endswith(
            ("disk.py", "durable_files.py", "disks.py", "power_cuts.py")
        ):
            frame = frame.f_back
        assert frame is not None
        if "supervise_tf" in frame.f_code.co_filename:
            place = f"{method} of {frame.f_code.co_qualname}:{frame.f_lineno}"
            found.setdefault(place, []).append(Sync(replay, number, len(disk.calls)))
        return False

    disk = LossyDisk(replay.fresh(), without=note)
    replay.scenario.run(replay.logdir, disk, FakeMachine().process())


def test_each_sync_is_necessary(quick_path: Path, seed: int) -> None:
    """Somewhere, for each place in the program that syncs."""
    replays = []
    for scenario in SCENARIOS:
        (quick_path / scenario.name).mkdir()
        replays.append(Replay(scenario, quick_path / scenario.name))
    places = syncs_by_place(replays)
    needless = [
        place
        for place, syncs in places.items()
        if not any(sync.does_harm_when_dropped(seed, moments) for moments in (5, 1000) for sync in syncs)
    ]
    assert needless == []
    assert len(places) >= 8
