"""Never a bad checkpoint: whatever happens to its files is found out, and nothing is silently begun anew."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from training import Program

from supervise_core import CheckpointDirectory
from supervise_core.directory_store import DirectoryStore
from supervise_core.errors import AllCheckpointsDamagedError, CheckpointDamagedError, CheckpointNotFoundError
from supervise_core.session_manager import SessionManager

Harm = Callable[[Path, random.Random], None]


def flip_bit(path: Path, chance: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    path.write_bytes(content)


def truncate(path: Path, chance: random.Random) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: chance.randrange(1, len(content))])


def empty(path: Path, chance: random.Random) -> None:
    path.write_bytes(b"")


def delete(path: Path, chance: random.Random) -> None:
    path.unlink()


def zero(path: Path, chance: random.Random) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def append(path: Path, chance: random.Random) -> None:
    path.write_bytes(path.read_bytes() + chance.randbytes(chance.randrange(1, 50)))


def append_a_space(path: Path, chance: random.Random) -> None:
    path.write_bytes(path.read_bytes() + b" ")


def swap_with_the_older(path: Path, chance: random.Random) -> None:
    """A good file, of another step."""
    path.write_bytes((path.parent.parent / "model.ckpt-1" / path.name).read_bytes())


def replace_by_directory(path: Path, chance: random.Random) -> None:
    path.unlink()
    path.mkdir()


HARMS: list[Harm] = [flip_bit, truncate, empty, delete, zero, append, append_a_space, replace_by_directory]
FILES = ["manifest.json", "model.safetensors", "state.json"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three checkpoints, of steps 0, 1 and 2."""
    logdir = tmp_path_factory.mktemp("trained") / "digits"
    Program(logdir).train(2)
    assert CheckpointDirectory(logdir).steps() == [0, 1, 2]
    return logdir


@pytest.fixture
def logdir(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "digits"))


def check_found_and_older_restored(logdir: Path) -> None:
    with pytest.raises(CheckpointDamagedError), CheckpointDirectory(logdir).at(2) as newest:
        newest.verify()
    program = Program(logdir)
    with program.supervisor.managed_session() as session:
        assert session.global_step == 1
        assert program.holds(1)
        program.supervisor.request_stop()
    report = program.supervisor.report
    assert report.restored == "model.ckpt-1"
    assert list(report.set_aside) == ["model.ckpt-2"]
    assert dict(CheckpointDirectory(logdir).set_aside()) == report.set_aside
    assert CheckpointDirectory(logdir).steps() == [0, 1]
    assert (logdir / "set-aside" / "model.ckpt-2" / "model.ckpt-2").is_dir()


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("harm", HARMS, ids=lambda harm: harm.__name__)
def test_damage_is_found_and_the_older_one_restored(logdir: Path, harm: Harm, file: str, seed: int) -> None:
    harm(logdir / "model.ckpt-2" / file, random.Random(seed))
    check_found_and_older_restored(logdir)
    assert file in CheckpointDirectory(logdir).set_aside()["model.ckpt-2"]


@pytest.mark.parametrize("file", ["model.safetensors", "state.json"])
def test_a_good_file_of_another_step_is_found(logdir: Path, file: str, seed: int) -> None:
    swap_with_the_older(logdir / "model.ckpt-2" / file, random.Random(seed))
    check_found_and_older_restored(logdir)


@pytest.mark.campaign(small=40, soak=500)
def test_one_bit_at_a_random_place(trained: Path, tmp_path: Path, count: int, seed: int) -> None:
    chance = random.Random(seed)
    for number in range(count):
        file = FILES[number % len(FILES)]
        logdir = Path(shutil.copytree(trained, tmp_path / f"digits-{number}"))
        flip_bit(logdir / "model.ckpt-2" / file, chance)
        check_found_and_older_restored(logdir)
        shutil.rmtree(logdir)


@pytest.mark.campaign(small=40, soak=500)
def test_any_harm_to_any_checkpoints(trained: Path, tmp_path: Path, count: int, seed: int) -> None:
    """The newest that was left alone is restored; with none left, the start fails."""
    chance = random.Random(seed)
    for number in range(count):
        logdir = Path(shutil.copytree(trained, tmp_path / f"digits-{number}"))
        harmed = [step for step in (0, 1, 2) if chance.random() < 0.7]
        for step in harmed:
            chance.choice(HARMS)(logdir / f"model.ckpt-{step}" / chance.choice(FILES), chance)
        good = max({0, 1, 2} - set(harmed), default=None)
        program = Program(logdir)
        if good is None:
            with pytest.raises(AllCheckpointsDamagedError):
                program.train(4)
            assert program.began_at == -1
        else:
            assert program.train(4).began_at == good
            assert program.holds(4)
        shutil.rmtree(logdir)


def test_all_damaged_is_an_error_at_every_start(logdir: Path, seed: int) -> None:
    for step, harm in zip((0, 1, 2), (truncate, flip_bit, delete), strict=True):
        harm(logdir / f"model.ckpt-{step}" / "model.safetensors", random.Random(seed))
    for resume in ("auto", "auto", "must"):
        program = Program(logdir, resume=resume)
        with pytest.raises(AllCheckpointsDamagedError) as caught:
            program.train(3)
        assert sorted(caught.value.damaged) == ["model.ckpt-0", "model.ckpt-1", "model.ckpt-2"]
        for name, reason in caught.value.damaged.items():
            assert f"{name}: {reason}" in str(caught.value)
        assert "is missing" in caught.value.damaged["model.ckpt-2"]
        assert "resume='never'" in str(caught.value)
        assert program.began_at == -1
        assert not (program.w == -1).any(), "init must not have run"
    assert Program(logdir, resume="never").train(1).began_at == 0
    assert CheckpointDirectory(logdir).steps() == [0, 1]
    assert Program(logdir).train(1).began_at == 1


def test_a_damaged_one_is_told_of_at_warning(logdir: Path, caplog: pytest.LogCaptureFixture, seed: int) -> None:
    empty(logdir / "model.ckpt-2" / "state.json", random.Random(seed))
    Program(logdir).train(1)
    (record,) = [record for record in caplog.records if "set aside" in record.message and record.levelname == "WARNING"]
    assert "model.ckpt-2" in record.message
    assert "state.json has 0 bytes" in record.message


def test_must_resume_needs_a_checkpoint(tmp_path: Path) -> None:
    program = Program(tmp_path / "nothing", resume="must")
    with pytest.raises(CheckpointNotFoundError, match="there is none in"):
        program.train(3)
    assert program.began_at == -1


def test_session_manager_alone_sets_aside_too(logdir: Path, seed: int) -> None:
    flip_bit(logdir / "model.ckpt-2" / "model.safetensors", random.Random(seed))
    program, store = Program(logdir), DirectoryStore(logdir)
    manager = SessionManager(program.backend, store=store)
    with store.writing():
        session, ready = manager.recover_session()
    assert ready
    assert session.global_step == 1
    assert list(manager.recovery.set_aside) == ["model.ckpt-2"]


def test_an_unread_extra_file_is_no_damage(logdir: Path) -> None:
    """What is not in the manifest is never read; somebody's notes do no harm."""
    (logdir / "model.ckpt-2" / "notes.txt").write_text("good one")
    assert Program(logdir).train(3).began_at == 2
