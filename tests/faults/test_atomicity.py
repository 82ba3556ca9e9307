"""Whatever the instant of a crash or a power cut: the old checkpoints or the new ones, each of them whole."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import pytest
from scenarios import SCENARIOS, Scenario, State, open_store, save, state_of
from training import Program

from supervise_core import CheckpointDirectory
from supervise_core.errors import CheckpointDamagedError
from supervise_core.manifest import MANIFEST
from supervise_core.testing.disks import Crash, CrashingDisk, HastyDisk, WatchedDisk
from supervise_core.testing.hosts import FakeMachine
from supervise_core.testing.power_cuts import AnyOutcome, LossyDisk, NamesWithoutContent, Outcome

Drop = Callable[[int, str, Path], bool]

each_scenario = pytest.mark.parametrize("scenario", SCENARIOS, ids=str)


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
        states = self.scenario.states
        try:
            self.scenario.run(self.logdir, disk, machine.process())
            states = states[-1:]
        except Crash:
            pass
        disk.power_cut(outcome)
        machine.reboot()
        self.check_next_start(machine, states)

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
        replay.crash(before)


@each_scenario
@pytest.mark.campaign(small=10, soak=200)
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
            with contextlib.suppress(Crash), open_store(replay.logdir, disk, machine.process()).writing():
                pass
            machine.living.clear()
        if chance.random() < 0.5:
            disk.power_cut(AnyOutcome(chance.randrange(1 << 30)))
            machine.reboot()
        replay.check_next_start(machine, replay.scenario.states)


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


# ---- each fsync, removed, does harm


@dataclass(frozen=True)
class Sync:
    """One sync of one replay: its number, and how many changing calls came before it."""

    replay: Replay
    number: int
    calls: int

    def does_harm_when_dropped(self, outcomes: Iterable[Outcome]) -> bool:
        """Whether some power cut after it is noticed."""
        moments = (None, *range(self.calls + 2, self.replay.calls() + 1))
        for before, outcome in itertools.product(moments, outcomes):
            try:
                self.replay.cut_power(before, outcome, lambda number, *_: number == self.number)
            except (AssertionError, CheckpointDamagedError, OSError):
                return True
        return False


def syncs_by_place(replays: Iterable[Replay]) -> dict[str, list[Sync]]:
    """Every sync, by the place in the program that asks for it."""
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
        place = f"{method} of {frame.f_code.co_qualname}:{frame.f_lineno}"
        if method == "sync":  # the files of a draft are all synced in one place, and each kind of them is necessary
            place += f", {MANIFEST if path.name == MANIFEST else path.suffix}"
        found.setdefault(place, []).append(Sync(replay, number, len(disk.calls)))
        return False

    disk = LossyDisk(replay.fresh(), without=note)
    replay.scenario.run(replay.logdir, disk, FakeMachine().process())


def test_each_sync_is_necessary(quick_path: Path, seed: int) -> None:
    """Somewhere, for each place in the program that syncs. Not so for the lease's record: after a power cut its owner
    is dead anyhow, and a record that cannot be read is judged by its beat.
    """
    replays = []
    for scenario in SCENARIOS:
        (quick_path / scenario.name).mkdir()
        replays.append(Replay(scenario, quick_path / scenario.name))
    outcomes = [Outcome(), NamesWithoutContent(), *(AnyOutcome(seed + number) for number in range(8))]
    places = {place: syncs for place, syncs in syncs_by_place(replays).items() if "Lease._publish" not in place}
    needless = [
        place for place, syncs in places.items() if not any(sync.does_harm_when_dropped(outcomes) for sync in syncs)
    ]
    assert needless == []
    assert len(places) >= 10


# ---- processes that are really killed


_KILLED_AT_A_CALL = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from training import Program
from supervise_core import KeepLatest
from supervise_core.directory_store import DirectoryStore
from supervise_core.testing.disks import KillingDisk
logdir = Path(sys.argv[2])
Program(logdir, keep=KeepLatest(2), store=DirectoryStore(logdir, disk=KillingDisk(int(sys.argv[3])))).train(10**9)
"""

_TRAINS_UNTIL_KILLED = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from training import Program
from supervise_core import KeepLatest
program = Program(Path(sys.argv[2]), keep=KeepLatest(2))
print("ready", flush=True)
program.train(10**9)
"""


def start(program: str, logdir: Path, *arguments: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", program, str(Path(__file__).parent), str(logdir), *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)


def check_after_kill(logdir: Path, oldest: int) -> int:
    """All that is listed is whole; the next run goes on from the newest, with no litter left. Where it went on from."""
    checkpoints = CheckpointDirectory(logdir)
    for step in checkpoints.steps():
        checkpoints.at(step).verify()
    newest = max(checkpoints.steps(), default=0)
    assert newest >= oldest
    program = Program(logdir)
    with program.supervisor.managed_session() as session:
        assert session.global_step == newest
        assert program.holds(newest) or newest == 0
        program.supervisor.request_stop()
    assert program.supervisor.report.set_aside == {}
    assert list((logdir / ".work").iterdir()) == []
    return newest


@pytest.mark.campaign(small=8, soak=200)
def test_killed_before_a_random_call(tmp_path: Path, count: int, seed: int) -> None:
    chance = random.Random(seed)
    reached = 0
    for _ in range(count):
        with start(_KILLED_AT_A_CALL, tmp_path / "digits", str(chance.randrange(1, 120))) as process:
            assert process.wait(60) == -signal.SIGKILL
        reached = check_after_kill(tmp_path / "digits", reached)
    assert reached > 0


@pytest.mark.campaign(small=8, soak=200)
def test_killed_at_a_random_instant(tmp_path: Path, count: int, seed: int) -> None:
    """From the moment at which it begins to open its session until well into its training."""
    chance = random.Random(seed)
    reached = 0
    for _ in range(count):
        with start(_TRAINS_UNTIL_KILLED, tmp_path / "digits") as process:
            assert process.stdout is not None
            process.stdout.readline()
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(chance.random() * 0.4)
            process.kill()
        reached = check_after_kill(tmp_path / "digits", reached)
    assert reached > 0
