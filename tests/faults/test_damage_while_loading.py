"""Damage that is found when half of a checkpoint is in the live tensors already: the older one is restored, whole."""

from __future__ import annotations

import errno
import json
import random
import shutil
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from training import Program

from supervise_core import (
    AllCheckpointsDamagedError,
    Backend,
    CheckpointDirectory,
    DirectoryStore,
    EverySteps,
    KeepAll,
    Supervisor,
    tensor_files,
)
from supervise_core.disk import Disk, OpenDirectory
from supervise_core.errors import CheckpointDamagedError, IncompatibleCheckpointError, SessionStateError
from supervise_core.parts import Parts
from supervise_core.session_manager import SessionManager
from supervise_core.snapshot import Snapshot
from supervise_core.staging import Staging
from supervise_core.testing.clock import eventually
from supervise_core.testing.disks import FaultyDisk
from supervise_numpy import ArrayBackend

SHARD = "model-00001-of-00002.safetensors"
Arrays = dict[str, dict[str, NDArray[Any]]]


def value(step: int, number: int) -> NDArray[np.float64]:
    """What the arrays hold after a step: noise, the same each time."""
    return np.random.default_rng([step, number]).normal(size=(40, 30))


class Parted(Backend["Parted"]):
    """Three parts of two arrays each, read in place one after another; it notes what it is asked to do."""

    name = "parted"

    def __init__(self) -> None:
        self.arrays: Arrays = {
            part: {name: np.zeros((40, 30)) for name in ("u", "v")} for part in ("first", "second", "third")
        }
        self.step = 0
        self.log: list[str] = []
        self.while_loading: Callable[[str], object] = lambda part: None

    def create_session(self, master: str = "", config: Any = None) -> Parted:
        return self

    def init(self, session: Parted) -> None:
        self.log.append("init")
        self.fill(0)

    def fill(self, step: int) -> None:
        self.step = step
        for number, array in enumerate(self.all()):
            array[...] = value(step, number)

    def all(self) -> list[NDArray[Any]]:
        return [array for part in self.arrays.values() for array in part.values()]

    def holds(self, step: int) -> bool:
        return self.step == step and all(
            array.tobytes() == value(step, number).tobytes() for number, array in enumerate(self.all())
        )

    def global_step(self, session: Parted) -> int:
        return self.step

    def snapshot(self, session: Parted, staging: Staging) -> Snapshot:
        for name, part in self.arrays.items():
            staging.put(name, part)
        staging.put("own", {"step": self.step})
        return staging.snapshot()

    def load(self, session: Parted, parts: Parts) -> None:
        self.log.append("load")
        for name, part in self.arrays.items():
            self.while_loading(name)
            parts[name].restoration(into=part).read()
        self.step = parts["own"].tree()["step"]


def supervised(backend: Any, logdir: Path, **arguments: Any) -> Supervisor[Any]:
    defaults: dict[str, Any] = {
        "save_every": EverySteps(1), "summarize_every": None, "keep": KeepAll(), "signals": False,
    }  # fmt: skip
    return Supervisor(backend, logdir, **(defaults | arguments))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three checkpoints, of steps 0, 1 and 2."""
    logdir = tmp_path_factory.mktemp("parted") / "logs"
    backend = Parted()
    supervisor = supervised(backend, logdir)
    with supervisor.managed_session():
        while not supervisor.should_stop() and backend.step < 2:
            backend.fill(backend.step + 1)
    assert CheckpointDirectory(logdir).steps() == [0, 1, 2]
    return logdir


@pytest.fixture
def logdir(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "logs"))


def flip(logdir: Path, step: int, file: str, at: int = -1) -> None:
    path = logdir / f"model.ckpt-{step}" / file
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def names(logdir: Path) -> set[str]:
    """All that is there but what belongs to the lease and the drafts."""
    found = {str(path.relative_to(logdir)) for path in logdir.rglob("*")}
    return {name for name in found if name.startswith(("model.ckpt-", "set-aside", "retired"))}


def resumed(backend: Any, logdir: Path, **arguments: Any) -> Any:
    """One session that ends at once; its report."""
    supervisor = supervised(backend, logdir, **arguments)
    with supervisor.managed_session():
        supervisor.request_stop()
    return supervisor.report


# ---- the older one


@pytest.mark.parametrize("part", ["first", "second", "third"])
@pytest.mark.parametrize("at", [-1, 4096, -40 * 30 * 8 - 1], ids=["last byte", "first byte", "in the middle"])
def test_the_older_one_is_restored_whole(logdir: Path, part: str, at: int) -> None:
    flip(logdir, 2, f"{part}.safetensors", at)
    backend = Parted()
    arrays = backend.all()
    report = resumed(backend, logdir)
    assert backend.holds(1)
    assert all(one is other for one, other in zip(arrays, backend.all(), strict=True))
    assert backend.log == ["load", "load"]
    assert report.restored == "model.ckpt-1"
    assert report.set_aside == {"model.ckpt-2": f"the content of {part}.safetensors does not match its hash"}
    assert CheckpointDirectory(logdir).set_aside() == report.set_aside
    assert CheckpointDirectory(logdir).steps() == [0, 1]
    assert (logdir / "set-aside" / "model.ckpt-2" / "model.ckpt-2" / f"{part}.safetensors").is_file()


def test_before_it_is_found_parts_are_loaded_already(logdir: Path) -> None:
    """What the other tests rest on: at the time of the damage the live arrays are those of the damaged one."""
    flip(logdir, 2, "third.safetensors")
    backend = Parted()
    seen: list[tuple[str, bool]] = []
    backend.while_loading = lambda part: seen.append(
        (part, backend.arrays["first"]["u"].tobytes() == value(2, 0).tobytes())
    )
    resumed(backend, logdir)
    assert seen[:3] == [("first", False), ("second", True), ("third", True)]
    assert seen[3:] == [("first", True), ("second", False), ("third", False)]
    assert backend.holds(1)


def test_one_after_another_is_found_damaged(logdir: Path) -> None:
    flip(logdir, 2, "third.safetensors")
    flip(logdir, 1, "second.safetensors")
    backend = Parted()
    report = resumed(backend, logdir)
    assert backend.holds(0)
    assert backend.log == ["load"] * 3
    assert {name: reason.split()[3] for name, reason in report.set_aside.items()} == {
        "model.ckpt-2": "third.safetensors",
        "model.ckpt-1": "second.safetensors",
    }


@pytest.mark.parametrize("resume", ["auto", "must"])
def test_all_damaged_begins_nothing_anew(logdir: Path, resume: str) -> None:
    for step, part in enumerate(("first", "second", "third")):
        flip(logdir, step, f"{part}.safetensors")
    for _ in range(2):
        backend = Parted()
        with pytest.raises(AllCheckpointsDamagedError) as caught:
            resumed(backend, logdir, resume=resume, init_fn=lambda session: session.log.append("init_fn"))
        assert caught.value.damaged == {
            f"model.ckpt-{step}": f"the content of {part}.safetensors does not match its hash"
            for step, part in enumerate(("first", "second", "third"))
        }
        assert not {"init", "init_fn"} & set(backend.log)


def test_the_first_of_two_shards_is_in_the_arrays_already(tmp_path: Path) -> None:
    logdir = tmp_path / "digits"
    Program(logdir, staging=Staging(shard_bytes=100)).train(2)
    index = json.loads((logdir / "model.ckpt-2" / "model.safetensors.index.json").read_bytes())
    shards = sorted(set(index["weight_map"].values()))
    assert len(shards) == 2
    flip(logdir, 2, shards[1])
    program = Program(logdir)
    with program.supervisor.managed_session():
        assert program.holds(1)
        program.supervisor.request_stop()
    assert program.supervisor.report.set_aside == {
        "model.ckpt-2": f"the content of {shards[1]} does not match its hash"
    }


def test_damage_of_a_file_that_several_have_in_common(tmp_path: Path) -> None:
    """One flipped bit in frozen weights is in every checkpoint that links them, and found in each."""
    logdir = tmp_path / "frozen"

    def run(*steps: int) -> tuple[int, NDArray[Any]]:
        arrays = {"frozen": np.arange(5000.0), "trained": np.zeros(100)}
        supervisor = supervised(ArrayBackend(arrays), logdir)
        with supervisor.managed_session() as session:
            began = session.global_step, arrays["frozen"].copy()
            for number, _ in enumerate(steps):
                assert not supervisor.should_stop()
                arrays["trained"] += 1
                session.global_step += 1
                assert not supervisor.should_stop()
                eventually(lambda saves=number + 1: supervisor.report.saves >= saves)
            supervisor.request_stop()
        return began

    run(1)
    assert run(2, 3)[0] == 1
    older, newer = logdir / "model.ckpt-2" / "model.safetensors", logdir / "model.ckpt-3" / SHARD
    assert older.samefile(newer)
    flip(logdir, 3, SHARD, 5000)
    step, frozen = run()
    assert step == 1, "that one was written by an earlier run, and has nothing in common with them"
    assert np.array_equal(frozen, np.arange(5000.0))
    assert set(CheckpointDirectory(logdir).set_aside()) == {"model.ckpt-2", "model.ckpt-3"}


# ---- headers


def header_of(path: Path) -> tuple[int, bytes]:
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    return length, content[8 : 8 + length]


CHANGES: list[tuple[str, str]] = [
    ('"w":', '"v":'),
    ('"w":', '"b":'),
    ('"b":', '"w":'),
    ('"w":', '"é":'[:2] + '":'),
    ('"w":', '"":  '[:4]),
    ('"F64"', '"I64"'),
    ('"F64"', '"U64"'),
    ('"F64"', '"C64"'),
    ('"F64"', '"F32"'),
    ('"F64"', '"X64"'),
    ('"I32"', '"U32"'),
    ('"I32"', '"F32"'),
    ("[7,3]", "[3,7]"),
    ("[7,3]", "[21] "),
    ("[7,3]", "[7,2]"),
    ("[7,3]", "[7,4]"),
    ("[7,3]", "[7.3]"),
    ("[7,3]", "[-73]"),
    ("[5]", " 5 "),
    ('"shape"', '"shapf"'),
    ('"data_offsets"', '"data_offset_"'),
    ("[0,168]", "[8,176]"),
    ("[0,168]", "[0,160]"),
    ("[168,188]", "[160,180]"),
    ('"pt"', '"tp"'),
    ('{"__metadata__"', '["__metadata__"'),
    ("}} ", "}}x"),
    ("}} ", "}}\t"),
    ("}} ", "}  "),
]


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of steps 0, 1 and 2 of arrays ``w`` (7 by 3) and ``b`` (5)."""
    logdir = tmp_path_factory.mktemp("counted") / "digits"
    Program(logdir).train(2)
    return logdir


def check_older_restored(logdir: Path) -> None:
    program = Program(logdir)
    with program.supervisor.managed_session() as session:
        assert session.global_step == 1
        assert program.holds(1)
        program.supervisor.request_stop()
    report = program.supervisor.report
    assert report.restored == "model.ckpt-1"
    assert list(report.set_aside) == ["model.ckpt-2"]
    assert CheckpointDirectory(logdir).steps() == [0, 1]


@pytest.mark.parametrize(("old", "new"), CHANGES, ids=[f"{old} {new}" for old, new in CHANGES])
def test_a_header_that_says_something_else_is_damage(counted: Path, tmp_path: Path, old: str, new: str) -> None:
    """Also where it then describes a good file, of another model: nothing that is unverified is believed."""
    logdir = Path(shutil.copytree(counted, tmp_path / "digits"))
    path = logdir / "model.ckpt-2" / "model.safetensors"
    length, header = header_of(path)
    changed = header.replace(old.encode()[: len(old)], new.encode()[: len(old)], 1)
    assert changed != header
    assert len(changed) == length
    content = bytearray(path.read_bytes())
    content[8 : 8 + length] = changed
    path.write_bytes(content)
    with CheckpointDirectory(logdir).at(2) as damaged, pytest.raises(CheckpointDamagedError):
        damaged.verify()
    check_older_restored(logdir)


@pytest.mark.parametrize("file", ["model.safetensors", "state.json"])
def test_names_that_are_changed_everywhere_are_damage(counted: Path, tmp_path: Path, file: str) -> None:
    """Longer names, a whole model more: whatever it is, the hash of that file is not the manifest's."""
    logdir = Path(shutil.copytree(counted, tmp_path / "digits"))
    path = logdir / "model.ckpt-2" / file
    content = path.read_bytes()
    changed = content.replace(b'"w"', b'"x"')
    assert changed != content
    path.write_bytes(changed)
    check_older_restored(logdir)


@pytest.mark.campaign(small=60, soak=1500)
def test_any_bit_of_a_header(counted: Path, tmp_path: Path, count: int, seed: int) -> None:
    chance = random.Random(seed)
    for number in range(count):
        logdir = Path(shutil.copytree(counted, tmp_path / f"digits-{number}"))
        path = logdir / "model.ckpt-2" / "model.safetensors"
        length, header = header_of(path)
        said = len(header.rstrip()) + 8
        content = bytearray(path.read_bytes())
        content[chance.randrange(said if number % 8 else length + 8)] ^= 1 << chance.randrange(8)
        path.write_bytes(content)
        check_older_restored(logdir)
        shutil.rmtree(logdir)


def test_a_good_checkpoint_of_another_model_is_no_damage(counted: Path, tmp_path: Path) -> None:
    logdir = Path(shutil.copytree(counted, tmp_path / "digits"))
    before = names(logdir)
    live = np.full((7, 4), -3.0)
    with pytest.raises(IncompatibleCheckpointError, match=r"shape \(7, 3\) there and \(7, 4\) here"):
        resumed(ArrayBackend({"w": live, "b": np.zeros(5, np.int32)}), logdir)
    assert names(logdir) == before
    assert (live == -3).all()


# ---- loads of the user's


class Wrapping(Parted):
    """Says of every error that it is one of its own."""

    def load(self, session: Parted, parts: Parts) -> None:
        try:
            super().load(session, parts)
        except Exception as error:
            raise RuntimeError("the model could not be loaded") from error


class Reckoning(Parted):
    """Fails by a value in its own way before it has read what is damaged."""

    def load(self, session: Parted, parts: Parts) -> None:
        if parts["own"].tree()["step"] == 2:
            raise ZeroDivisionError
        super().load(session, parts)


@pytest.mark.parametrize("kind", [Wrapping, Reckoning])
@pytest.mark.parametrize("file", ["second.safetensors", "third.safetensors"])
def test_an_error_of_the_load_is_damage_if_there_is_any(logdir: Path, kind: type[Parted], file: str) -> None:
    flip(logdir, 2, file)
    backend = kind()
    report = resumed(backend, logdir)
    assert backend.holds(1)
    assert report.set_aside == {"model.ckpt-2": f"the content of {file} does not match its hash"}


def test_an_error_of_the_load_is_that_error_if_there_is_no_damage(logdir: Path) -> None:
    before = names(logdir)
    with pytest.raises(ZeroDivisionError):
        resumed(Reckoning(), logdir)
    assert names(logdir) == before


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
def test_an_interrupted_load_moves_nothing(logdir: Path, stop: type[BaseException]) -> None:
    flip(logdir, 2, "third.safetensors")
    before = names(logdir)
    backend = Parted()

    def interrupt(part: str) -> None:
        if part == "second":
            raise stop

    backend.while_loading = interrupt
    with pytest.raises(stop):
        resumed(backend, logdir)
    assert names(logdir) == before


class Partial(Parted):
    """Reads the first part and nothing else, as a load may that begins a new task."""

    def load(self, session: Parted, parts: Parts) -> None:
        self.log.append("load")
        parts["first"].restoration(into=self.arrays["first"]).read()
        self.step = parts["own"].tree()["step"]


class Careless(Parted):
    """Reads nothing."""

    def load(self, session: Parted, parts: Parts) -> None:
        self.log.append("load")


@pytest.mark.parametrize("kind", [Partial, Careless])
@pytest.mark.parametrize("file", ["first.safetensors", "second.safetensors", "third.safetensors"])
def test_what_a_load_does_not_read_is_verified_all_the_same(logdir: Path, kind: type[Parted], file: str) -> None:
    flip(logdir, 2, file)
    backend = kind()
    report = resumed(backend, logdir)
    assert list(report.set_aside) == ["model.ckpt-2"]
    assert file in report.set_aside["model.ckpt-2"]
    assert report.restored == "model.ckpt-1"
    assert backend.log == ["load", "load"]


def test_a_part_that_a_saver_of_the_users_added(tmp_path: Path) -> None:
    """The backend's own load knows nothing of it; the damage is found after that load has gone through."""
    logdir, arrays = tmp_path / "logs", {"w": np.zeros(4)}
    backend = ArrayBackend(arrays)

    def saver(session: Any, staging: Staging) -> Snapshot:
        staging.put("extra", {"average": np.full(100, float(session.global_step))})
        return backend.snapshot(session, staging)

    def run(until: int) -> tuple[Any, ...]:
        supervisor = supervised(backend, logdir, saver=saver)
        with supervisor.managed_session() as session:
            began = session.counted, arrays["w"].tolist()
            while not supervisor.should_stop() and session.global_step < until:
                arrays["w"] += 1
                session.global_step += 1
        return began

    run(2)
    flip(logdir, 2, "extra.safetensors")
    assert run(0) == (1, [1.0] * 4)
    flip(logdir, 1, "extra.safetensors")
    arrays["w"][:] = -9
    assert run(0) == (None, [0.0] * 4), "the first one was taken before the program had set a step"


# ---- who may not move anything


def test_a_reader_without_the_lease_passes_over(logdir: Path, caplog: pytest.LogCaptureFixture) -> None:
    flip(logdir, 2, "third.safetensors")
    before = names(logdir)
    backend = Parted()
    manager = SessionManager(backend, store=DirectoryStore(logdir))
    session, ready = manager.recover_session()
    assert ready
    assert session is backend
    assert backend.holds(1)
    assert names(logdir) == before
    assert list(manager.recovery.set_aside) == ["model.ckpt-2"]
    assert any("damaged and passed over" in record.message for record in caplog.records)


def test_a_reader_that_finds_only_damaged_ones_says_so(logdir: Path) -> None:
    for step in range(3):
        flip(logdir, step, "third.safetensors")
    before = names(logdir)
    backend = Parted()
    with pytest.raises(AllCheckpointsDamagedError) as caught:
        SessionManager(backend, store=DirectoryStore(logdir)).prepare_session()
    assert sorted(caught.value.damaged) == ["model.ckpt-0", "model.ckpt-1", "model.ckpt-2"]
    assert names(logdir) == before
    assert "init" not in backend.log


@pytest.mark.parametrize("step", [1, 2])
@pytest.mark.parametrize("file", ["first.safetensors", "third.safetensors", "state.json", "manifest.json"])
def test_the_one_that_was_asked_for_is_damaged(logdir: Path, step: int, file: str) -> None:
    flip(logdir, step, file)
    before = names(logdir)
    backend = Parted()
    with pytest.raises(CheckpointDamagedError, match=file.replace(".", r"\.")):
        resumed(backend, logdir, resume=logdir / f"model.ckpt-{step}")
    assert names(logdir) == before
    assert "init" not in backend.log


@pytest.mark.parametrize("kind", [Parted, Wrapping, Partial])
def test_the_one_of_another_run_that_was_asked_for_is_damaged(logdir: Path, tmp_path: Path, kind: type[Parted]) -> None:
    flip(logdir, 2, "third.safetensors")
    before = names(logdir)
    backend = kind()
    with pytest.raises(CheckpointDamagedError, match=r"third\.safetensors does not match"):
        resumed(backend, tmp_path / "new", resume=logdir / "model.ckpt-2")
    assert names(logdir) == before
    assert "init" not in backend.log
    assert CheckpointDirectory(tmp_path / "new").steps() == []


# ---- disks that fail, and other threads


def in_small_pieces(patch: pytest.MonkeyPatch, threads: bool) -> None:
    patch.setattr(tensor_files, "_PIECE", 5000)
    patch.setattr(tensor_files, "_WORTH_THREADS", 0 if threads else 1 << 60)


@pytest.mark.parametrize("threads", [False, True], ids=["alone", "several threads"])
def test_no_failing_read_is_taken_for_damage(logdir: Path, threads: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    in_small_pieces(monkeypatch, threads)
    before = names(logdir)
    at = failed = 0
    while True:
        at += 1
        disk, backend = FaultyDisk(), Parted()
        manager = SessionManager(backend, store=(store := DirectoryStore(logdir, disk=disk)))
        with store.writing():
            disk.fail(errno.EIO, at, method="read", forever=True)
            try:
                manager.prepare_session()
            except OSError as error:
                failed += error.errno == errno.EIO
            disk.heal()
        assert names(logdir) == before
        assert "init" not in backend.log
        if not disk.failures:
            break
    assert failed == at - 1 >= 3 * 4, "every read of it failed once"
    assert backend.holds(2)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("supervise-core reads")]


class CrowdedDisk(Disk):
    """Beside each read of tensors another thread of the program writes to what was read."""

    def __init__(self, disturb: Callable[[], object]) -> None:
        self.disturb = disturb

    def read_into(self, directory: OpenDirectory, name: str, at: int, buffers: Sequence[memoryview]) -> int:
        done = super().read_into(directory, name, at, buffers)
        if name == "second.safetensors":
            other = threading.Thread(target=self.disturb)
            other.start()
            other.join()
        return done


@pytest.mark.parametrize("threads", [False, True], ids=["alone", "several threads"])
def test_another_thread_that_changes_the_arrays_is_told_of(
    logdir: Path, threads: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_small_pieces(monkeypatch, threads)
    before = names(logdir)
    backend = Parted()
    disk = CrowdedDisk(lambda: np.add(backend.arrays["second"]["u"], 1.0, out=backend.arrays["second"]["u"]))
    with pytest.raises(SessionStateError, match=r"second\.safetensors in model\.ckpt-2 were changed by another thread"):
        resumed(backend, logdir, store=DirectoryStore(logdir, disk=disk))
    assert names(logdir) == before
    assert "init" not in backend.log
    again = Parted()
    assert resumed(again, logdir).restored == "model.ckpt-2"
    assert again.holds(2)


def test_the_one_that_is_damaged_is_set_aside_whoever_disturbs(logdir: Path) -> None:
    flip(logdir, 2, "second.safetensors")
    backend = Parted()
    calls: list[int] = []

    def disturb() -> None:
        """Only while the newest is read: its header, its tensors, and those once more, in one piece each."""
        calls.append(1)
        if len(calls) <= 4:
            backend.arrays["second"]["u"] += 1

    report = resumed(backend, logdir, store=DirectoryStore(logdir, disk=CrowdedDisk(disturb)))
    assert list(report.set_aside) == ["model.ckpt-2"]
    assert backend.holds(1)
