"""Checkpoints that have files in common: damage, failing disks and kills hurt no more than they did without that."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scenarios import Series, open_store, state_of

from supervise_core import CheckpointDirectory, EverySteps, KeepAll, KeepLatest, Supervisor
from supervise_core.checkpoint_format import CheckpointId
from supervise_core.directory_store import DirectoryStore
from supervise_core.disk import Disk
from supervise_core.errors import AllCheckpointsDamagedError, CheckpointDamagedError
from supervise_core.manifest import Manifest
from supervise_core.numpy_codec import NumpyCodec
from supervise_core.snapshot_files import write_snapshot
from supervise_core.staging import NoStaging, Staging
from supervise_core.testing.clock import FakeClock, eventually
from supervise_core.testing.disks import CachedDisk, FaultyDisk, HastyDisk, LinklessDisk, WatchedDisk
from supervise_core.testing.hosts import FakeMachine
from supervise_numpy import ArrayBackend

OLD, NEW, INDEX = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"

Harm = Callable[[Path, random.Random], None]


class CountingDisk(WatchedDisk, HastyDisk):
    """Knows how many bytes were written."""

    written = 0

    def write(self, descriptor: int, data: bytes | bytearray | memoryview) -> None:
        super().write(descriptor, data)
        self.written += memoryview(data).nbytes


class HastyCachedDisk(CachedDisk, HastyDisk):
    pass


class HastyFaultyDisk(FaultyDisk, HastyDisk):
    pass


class HastyFaultyCachedDisk(FaultyDisk, CachedDisk, HastyDisk):
    pass


class HastyLinklessDisk(LinklessDisk, HastyDisk):
    pass


LAYERS = 12


class Lora:
    """Layers of which a tenth is trained; after step n, the trained arrays hold n and ``drift`` more than at first.

    ``melts`` is the step in which the frozen arrays are changed, once.
    """

    def __init__(self, logdir: Path, *, size: int = 100, melts: int = -1, **arguments: Any) -> None:
        self.arrays: dict[str, np.ndarray[Any, Any]] = {}
        for layer in range(LAYERS):
            self.arrays[f"layers.{layer}.w"] = np.zeros(18 * size)
            self.arrays[f"layers.{layer}.a"] = np.zeros(size)
            self.arrays[f"layers.{layer}.b"] = np.zeros(size)
        self.melts = melts
        defaults: dict[str, Any] = {
            "save_every": EverySteps(1), "summarize_every": None, "keep": KeepAll(), "signals": False,
        }  # fmt: skip
        store = arguments.setdefault("store", DirectoryStore(logdir, disk=HastyDisk()))
        assert isinstance(store, DirectoryStore)
        backend = ArrayBackend(self.arrays, init=self.initialise)
        self.supervisor = Supervisor(backend, logdir, **(defaults | arguments))
        self.began_at = -1

    def initialise(self, arrays: Any) -> None:
        for number, array in enumerate(arrays.values()):
            array[...] = np.arange(array.size) + number

    def expected(self, step: int) -> dict[str, bytes]:
        """What the arrays hold after that step."""
        found = {}
        for number, (name, array) in enumerate(self.arrays.items()):
            value = np.arange(float(array.size)) + number
            added = step if not name.endswith("w") else 1000 * (0 <= self.melts <= step)
            found[name] = (value + added).tobytes()
        return found

    def holds(self, step: int) -> bool:
        return {name: array.tobytes() for name, array in self.arrays.items()} == self.expected(step)

    def make_step(self, session: Any) -> None:
        step = session.global_step + 1
        for name, array in self.arrays.items():
            if not name.endswith("w"):
                array += 1
            elif step == self.melts:
                array += 1000
        session.global_step = step

    def train(self, until: int) -> Lora:
        with self.supervisor.managed_session() as session:
            self.began_at = session.global_step
            while not self.supervisor.should_stop() and session.global_step < until:
                self.make_step(session)
                self.settle(session.global_step)
        return self

    def settle(self, step: int) -> None:
        """Have the save of this step taken, and wait for its end."""
        report = self.supervisor.report
        before = report.saves + report.failed_saves
        self.supervisor.should_stop()
        eventually(lambda: report.saves + report.failed_saves > before or self.supervisor.should_stop())


def inodes(logdir: Path, file: str) -> list[int]:
    return [path.stat().st_ino for path in sorted(logdir.glob(f"model.ckpt-*/{file}"))]


# ---- bytes


@pytest.mark.parametrize("kept", [1, 3])
def test_a_tenth_is_written_when_nine_tenths_are_frozen(tmp_path: Path, kept: int) -> None:
    """Each checkpoint is whole by itself, whatever was pruned."""
    disk = CountingDisk()
    store = DirectoryStore(tmp_path / "digits", disk=disk)
    program = Lora(tmp_path / "digits", size=2000, keep=KeepLatest(kept), store=store)
    written: list[int] = []
    with program.supervisor.managed_session() as session:
        eventually(lambda: program.supervisor.report.saves == 1)
        written.append(disk.written)
        for _ in range(5):
            before = disk.written
            program.make_step(session)
            program.settle(session.global_step)
            written.append(disk.written - before)
            checkpoints = CheckpointDirectory(tmp_path / "digits")
            eventually(lambda: len(checkpoints.steps()) == min(kept, len(written)))  # noqa: B023
            for step in checkpoints.steps():
                with checkpoints.at(step) as checkpoint:
                    checkpoint.verify()
                    found = checkpoint.load("model")
                assert {name: array.tobytes() for name, array in found.items()} == program.expected(step)
        program.supervisor.request_stop()
    whole = sum(array.nbytes for array in program.arrays.values())
    assert whole < written[0] < 1.02 * whole
    for later in written[1:]:
        assert 0.09 * whole < later < 0.15 * written[0]
    assert len(set(inodes(tmp_path / "digits", OLD))) == 1
    resumed = Lora(tmp_path / "digits", size=2000).train(7)
    assert resumed.began_at == 5
    assert resumed.holds(7)


def test_the_first_save_of_a_resumed_run_is_whole_and_then_it_shares_again(tmp_path: Path) -> None:
    Lora(tmp_path / "digits").train(2)
    disk = CountingDisk()
    program = Lora(tmp_path / "digits", store=DirectoryStore(tmp_path / "digits", disk=disk)).train(4)
    assert program.began_at == 2
    assert not (tmp_path / "digits" / "model.ckpt-3" / INDEX).exists()
    assert (tmp_path / "digits" / "model.ckpt-4" / INDEX).exists()
    for step in range(5):
        CheckpointDirectory(tmp_path / "digits").at(step).verify()


def test_without_hard_links_a_run_goes_on_and_says_so_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = DirectoryStore(tmp_path / "digits", disk=HastyLinklessDisk())
    Lora(tmp_path / "digits", store=store).train(4)
    told = [record for record in caplog.records if "no file can have two names" in record.message]
    assert [record.levelname for record in told] == ["WARNING"]
    assert list((tmp_path / "digits").rglob(INDEX)) == []
    assert Lora(tmp_path / "digits").train(5).holds(5)


# ---- damage


def flip_bit(path: Path, chance: random.Random) -> None:
    """In place: whoever has this file in common sees it."""
    with path.open("r+b") as file:
        at = chance.randrange(path.stat().st_size)
        file.seek(at)
        (byte,) = file.read(1)
        file.seek(at)
        file.write(bytes([byte ^ 1 << chance.randrange(8)]))


def truncate(path: Path, chance: random.Random) -> None:
    os.truncate(path, chance.randrange(1, path.stat().st_size))


def append(path: Path, chance: random.Random) -> None:
    with path.open("ab") as file:
        file.write(chance.randbytes(chance.randrange(1, 50)))


def delete(path: Path, chance: random.Random) -> None:
    path.unlink()


HARMS: list[Harm] = [flip_bit, truncate, append, delete]

each_harm = pytest.mark.parametrize("harm", HARMS, ids=lambda harm: harm.__name__)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of steps 0 to 5; the first three have a file in common, and so have the last three."""
    logdir = tmp_path_factory.mktemp("trained") / "digits"
    Lora(logdir, melts=3).train(5)
    assert [len(list((logdir / f"model.ckpt-{step}").glob("*.safetensors"))) for step in range(6)] == [1, 2, 2, 1, 2, 2]
    assert len(set(inodes(logdir, OLD))) == 2
    return logdir


def copy(trained: Path, target: Path) -> Path:
    """A copy in which what is one file stays one file."""
    seen: dict[int, Path] = {}

    def copy_or_link(source: str, destination: str) -> str:
        number = os.stat(source).st_ino
        if number in seen:
            os.link(seen[number], destination)
        else:
            seen[number] = Path(shutil.copy2(source, destination))
        return destination

    return Path(shutil.copytree(trained, target, copy_function=copy_or_link))


@pytest.fixture
def logdir(trained: Path, tmp_path: Path) -> Path:
    return copy(trained, tmp_path / "digits")


def damaged_steps(logdir: Path) -> list[int]:
    found = []
    for step in CheckpointDirectory(logdir).steps():
        with CheckpointDirectory(logdir).at(step) as checkpoint:
            try:
                checkpoint.verify()
            except CheckpointDamagedError:
                found.append(step)
    return found


def check_goes_on_from(logdir: Path, step: int, set_aside: list[int]) -> None:
    """The newest good one is restored, and the run ends as if nothing had happened."""
    program = Lora(logdir, melts=3)
    with program.supervisor.managed_session() as session:
        assert session.global_step == step
        assert program.holds(step)
        program.supervisor.request_stop()
    assert sorted(program.supervisor.report.set_aside) == [f"model.ckpt-{one}" for one in set_aside]
    assert Lora(logdir, melts=3).train(7).holds(7)
    for there in CheckpointDirectory(logdir).steps():
        if there > step:
            CheckpointDirectory(logdir).at(there).verify()


@pytest.mark.parametrize("harm", [flip_bit, truncate, append], ids=lambda harm: harm.__name__)
def test_harm_to_a_file_that_several_share(logdir: Path, harm: Harm, seed: int) -> None:
    """It is found in each of them, and what does not share it is restored."""
    harm(logdir / "model.ckpt-5" / OLD, random.Random(seed))
    assert damaged_steps(logdir) == [3, 4, 5]
    check_goes_on_from(logdir, 2, [3, 4, 5])


@each_harm
@pytest.mark.parametrize("file", [NEW, INDEX])
def test_harm_to_what_it_has_for_itself(logdir: Path, harm: Harm, file: str, seed: int) -> None:
    harm(logdir / "model.ckpt-5" / file, random.Random(seed))
    assert damaged_steps(logdir) == [5]
    check_goes_on_from(logdir, 4, [5])


def test_a_shared_file_that_one_of_them_lost(logdir: Path, seed: int) -> None:
    delete(logdir / "model.ckpt-5" / OLD, random.Random(seed))
    assert damaged_steps(logdir) == [5]
    check_goes_on_from(logdir, 4, [5])


def test_the_index_of_another_checkpoint(logdir: Path) -> None:
    """A good one, but of other files."""
    index = json.loads((logdir / "model.ckpt-5" / INDEX).read_bytes())
    name = next(name for name in index["weight_map"] if name.endswith("a"))
    index["weight_map"][name] = OLD
    (logdir / "model.ckpt-5" / INDEX).write_text(json.dumps(index, separators=(",", ":")))
    assert damaged_steps(logdir) == [5]
    check_goes_on_from(logdir, 4, [5])


def test_the_new_file_of_another_checkpoint(logdir: Path) -> None:
    shutil.copy(logdir / "model.ckpt-4" / NEW, logdir / "model.ckpt-5" / NEW)
    check_goes_on_from(logdir, 4, [5])


def test_harm_to_what_all_share_is_an_error_at_every_start(tmp_path: Path, seed: int) -> None:
    Lora(tmp_path / "digits").train(3)
    flip_bit(tmp_path / "digits" / "model.ckpt-3" / OLD, random.Random(seed))
    for _ in range(2):
        program = Lora(tmp_path / "digits")
        with pytest.raises(AllCheckpointsDamagedError) as caught:
            program.train(5)
        assert program.began_at == -1
        assert sorted(caught.value.damaged) == [f"model.ckpt-{step}" for step in range(4)]


@pytest.mark.campaign(small=30, soak=500)
def test_any_harm_to_any_of_them(trained: Path, tmp_path: Path, count: int, seed: int) -> None:
    """What was harmed is never trained on; with nothing good left, the start fails."""
    chance = random.Random(seed)
    for number in range(count):
        logdir = copy(trained, tmp_path / f"digits-{number}")
        for _ in range(chance.randrange(1, 4)):
            files = [path for path in logdir.glob("model.ckpt-*/*") if path.exists()]
            chance.choice(HARMS)(chance.choice(files), chance)
        harmed = damaged_steps(logdir)
        good = max({*range(6)} - {*harmed}, default=None)
        program = Lora(logdir, melts=3)
        if good is None:
            with pytest.raises(AllCheckpointsDamagedError):
                program.train(7)
            assert program.began_at == -1
        else:
            assert program.train(7).began_at == good
            assert program.holds(7)
        shutil.rmtree(logdir)


# ---- disks that fail


ERRORS = [errno.ENOSPC, errno.EIO]

each_error = pytest.mark.parametrize("error", ERRORS, ids=lambda number: errno.errorcode[number])
each_disk = pytest.mark.parametrize("disk_class", [HastyFaultyDisk, HastyFaultyCachedDisk], ids=["direct", "cached"])


@each_error
@each_disk
def test_each_call_of_a_save_that_links(tmp_path: Path, error: int, disk_class: type[FaultyDisk]) -> None:
    """What shared the file before still has it, nothing is left, and the next save shares it again."""
    for at in range(1, 100):
        logdir, disk = tmp_path / f"at-{at}", disk_class()
        store = open_store(logdir, disk, FakeMachine().process())
        with store.writing():
            series = Series(store)
            series.save(1)
            series.save(2)
            disk.fail(error, at)
            drafts: list[Any] = []
            begin = store.begin
            store.begin = lambda checkpoint, begin=begin, drafts=drafts: drafts.append(begin(checkpoint)) or drafts[-1]  # type: ignore[method-assign]
            try:
                series.save(3)
            except OSError as caught:
                assert caught.errno == error  # noqa: PT017
                for draft in drafts:
                    draft.discard()
            reached = bool(disk.failures)
            disk.heal()
            assert state_of(logdir).listed[:2] == ("model.ckpt-1", "model.ckpt-2")
            series.save(4)
            names = state_of(logdir).listed
            assert names[-1] == "model.ckpt-4"
            assert len({(logdir / name / OLD).stat().st_ino for name in names[1:]}) == 1
            assert list(store._lease.directory.glob("draft-*")) == []
        if not reached:
            assert at > 10
            return


@each_error
@each_disk
@pytest.mark.parametrize("gathered", [False, True], ids=["kept", "gathered"])
def test_in_the_middle_of_a_large_file(
    tmp_path: Path, error: int, disk_class: type[FaultyDisk], gathered: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file of more than one piece, from the memory it was copied into or gathered from where it lies."""
    monkeypatch.setattr("supervise_core.durable_files._DIRECT_PIECE", 16 << 20)
    state = {"a": np.arange(3e6), "b": np.arange(2e6)}
    staging = NoStaging() if gathered else Staging()
    staging.put("model", state)
    snapshot = staging.snapshot()
    disk = disk_class()
    store = open_store(tmp_path / "digits", disk, FakeMachine().process())
    with store.writing():
        for at in (1, 2, 3):
            draft = store.begin(CheckpointId(1))
            disk.fail(error, at, method="write")
            with pytest.raises(OSError) as caught:
                write_snapshot(draft, snapshot, None)
            assert caught.value.errno == error
            assert disk.failures.pop()[1].name == "model.safetensors"
            draft.discard()
            assert list(store._lease.directory.glob("draft-*")) == []
        disk.heal()
        draft = store.begin(CheckpointId(1))
        written = write_snapshot(draft, snapshot, None)
        draft.commit(Manifest(1, "numpy", 1.0, ("model",), written.files))
    with CheckpointDirectory(tmp_path / "digits").newest() as newest:
        newest.verify()
        found = newest.load("model", NumpyCodec())
    assert all(np.array_equal(found[name], array) for name, array in state.items())


@each_error
def test_a_failed_save_hides_no_change_from_the_next_one(tmp_path: Path, error: int) -> None:
    """The arrays that changed only while a save failed are in the next checkpoint."""
    disk, clock = HastyFaultyDisk(), FakeClock()
    store = DirectoryStore(tmp_path / "digits", disk=disk, clock=clock)
    program = Lora(tmp_path / "digits", store=store, clock=clock)
    with program.supervisor.managed_session() as session:
        eventually(lambda: program.supervisor.report.saves == 1)
        for step in range(1, 9):
            if step % 2:
                disk.fail(error, method="write")
                program.arrays["layers.3.w"] += 1
            program.make_step(session)
            program.settle(step)
            disk.heal()
            clock.advance(31)
            if step % 2 == 0:
                with CheckpointDirectory(tmp_path / "digits").newest() as newest:
                    newest.verify()
                    found = newest.load("model")
                if newest.path.name == f"model.ckpt-{step}":
                    assert {name: array.tobytes() for name, array in found.items()} == {
                        name: array.tobytes() for name, array in program.arrays.items()
                    }
        program.supervisor.request_stop()
    assert program.supervisor.report.failed_saves >= 3
    assert (tmp_path / "digits" / "model.ckpt-8").is_dir()


def test_a_commit_that_failed_after_it_had_taken_place(tmp_path: Path) -> None:
    """Two checkpoints of one step were exchanged: what now bears the name has other files, of the same names and sizes.

    So nothing of what the older one had may be looked for there.
    """
    disk, clock = HastyFaultyDisk(), FakeClock()
    store = DirectoryStore(tmp_path / "digits", disk=disk, clock=clock)
    arrays = {name: np.arange(1000.0) for name in "abc"}
    supervisor = Supervisor(
        ArrayBackend(arrays), tmp_path / "digits", store=store, clock=clock, save_every=EverySteps(1),
        summarize_every=None, keep=KeepAll(), signals=False,
    )  # fmt: skip

    def save(attempts: int) -> None:
        supervisor.save()
        supervisor.should_stop()
        eventually(lambda: supervisor.report.saves + supervisor.report.failed_saves == attempts)

    def after_the_exchange(method: str, path: Path) -> bool:
        if method == "exchange":
            disk.fail(errno.EIO, method="sync_directory")
        return False

    with supervisor.managed_session() as session:
        eventually(lambda: supervisor.report.saves == 1)
        for step, name in enumerate("ab", 1):
            arrays[name] += 1
            session.global_step = step
            save(step + 1)
        arrays["a"] += 1
        with disk.interrupted(after_the_exchange):
            save(4)
        assert supervisor.report.failed_saves == 1
        clock.advance(31)
        arrays["a"] += 1
        session.global_step = 3
        save(5)
        supervisor.request_stop()
    assert CheckpointDirectory(tmp_path / "digits").steps() == [0, 1, 2, 3]
    assert damaged_steps(tmp_path / "digits") == []


# ---- a real file system without direct writes


@pytest.fixture
def cached_file_system(tmp_path: Path) -> Generator[Path, None, None]:
    """One in memory, all of it cache."""
    path = tmp_path / "cached"
    path.mkdir()
    try:
        done = subprocess.run(["mount", "-t", "ramfs", "ramfs", str(path)], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no mount command")
    if done.returncode:
        pytest.skip(f"no file system may be mounted here: {done.stderr.strip()}")
    try:
        yield path
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)


def test_a_file_system_without_direct_writes(cached_file_system: Path) -> None:
    with pytest.raises(OSError, match="Invalid argument"):
        Disk().create(cached_file_system / "direct", direct=True)
    assert list(cached_file_system.iterdir()) == []
    program = Lora(cached_file_system / "digits").train(3)
    assert program.supervisor.report.failed_saves == 0
    assert damaged_steps(cached_file_system / "digits") == []
    assert Lora(cached_file_system / "digits").train(5).holds(5)


# ---- processes that are really killed


_TRAINS = """
import hashlib, sys, time
from pathlib import Path
import numpy as np
from supervise_core import DirectoryStore, EverySteps, KeepLatest, Supervisor
from supervise_core.testing.disks import KillingDisk
from supervise_numpy import ArrayBackend
logdir, until, pause, kill_before = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4])
store = DirectoryStore(logdir, disk=KillingDisk(kill_before)) if kill_before else None
rng = np.random.default_rng(1)
arrays = {}
for layer in range(8):
    arrays[f"layers.{layer}.w"] = np.arange(9000.0) + layer
    arrays[f"layers.{layer}.a"] = np.zeros(500)
    arrays[f"layers.{layer}.b"] = np.zeros(500)
sv = Supervisor(ArrayBackend(arrays, rng=rng), logdir, save_every=EverySteps(1), summarize_every=None,
                keep=KeepLatest(3), store=store)
with sv.managed_session() as session:
    print(session.global_step, flush=True)
    while not sv.should_stop() and session.global_step < until:
        layer = int(rng.integers(8))
        arrays[f"layers.{layer}.a"] += rng.normal(size=500)
        arrays[f"layers.{7 - layer}.b"] *= 0.5
        arrays[f"layers.{7 - layer}.b"] += rng.normal(size=500)
        if session.global_step % 10 == 7:
            arrays[f"layers.{layer}.w"] += arrays[f"layers.{layer}.a"].sum()
        session.global_step += 1
        time.sleep(pause)
sha = hashlib.sha256(repr(rng.bit_generator.state).encode())
for array in arrays.values():
    sha.update(array.tobytes())
print(sha.hexdigest(), flush=True)
"""


def start(logdir: Path, until: int, pause: float, kill_before: int = 0) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", _TRAINS, str(logdir), str(until), str(pause), str(kill_before)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def ends_with(logdir: Path, until: int) -> str:
    with start(logdir, until, 0.0) as process:
        said, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    return said.split()[-1]


@pytest.mark.campaign(small=4, soak=20)
def test_killed_and_resumed_ends_as_if_it_never_was(tmp_path: Path, count: int, seed: int) -> None:
    """At any instant, or before any change to the disk while files are linked and pruned."""
    chance = random.Random(seed)
    linked = reached = 0
    for number in range(count):
        kill_before = chance.randrange(80, 200) if number % 2 else 0
        with start(tmp_path / "killed", 10**9, 0.002, kill_before) as process:
            assert process.stdout is not None
            assert int(process.stdout.readline()) >= reached
            if not kill_before:
                with pytest.raises(subprocess.TimeoutExpired):
                    process.wait(0.1 + chance.random() * 0.6)
                process.kill()
            assert process.wait(60) == -signal.SIGKILL
        checkpoints = CheckpointDirectory(tmp_path / "killed")
        for step in checkpoints.steps():
            checkpoints.at(step).verify()
        linked += any(path.stat().st_nlink > 1 for path in (tmp_path / "killed").glob("model.ckpt-*/*.safetensors"))
        reached = max(checkpoints.steps())
    assert linked >= count // 2, "they had nothing in common"
    until = reached + 12
    assert ends_with(tmp_path / "killed", until) == ends_with(tmp_path / "whole", until)


def test_digests_tell_apart(tmp_path: Path) -> None:
    """What the campaign compares is sensitive to a step more."""
    assert ends_with(tmp_path / "one", 3) != ends_with(tmp_path / "two", 4)
    assert len(ends_with(tmp_path / "one", 3)) == len(hashlib.sha256().hexdigest())
