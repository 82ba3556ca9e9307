"""One writer for a log directory, with real processes: races for it, and chiefs that were frozen and replaced."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from supervise_core.checkpoint_format import CheckpointId
from supervise_core.clock import SystemClock
from supervise_core.directory_store import DirectoryStore
from supervise_core.errors import LeaseHeldError
from supervise_core.host import Host, Identity
from supervise_core.testing.store_contract import write_checkpoint

from .driving import PROGRAMS, Facts, started


@dataclass(slots=True)
class Chief:
    """A process that does what it is told; see ``chief.py``."""

    process: subprocess.Popen[str]

    @property
    def pid(self) -> int:
        return self.process.pid

    def tell(self, do: str, **how: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"do": do} | how) + "\n")
        self.process.stdin.flush()

    def hear(self) -> Facts:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, f"it ended with {self.process.wait()}"
        facts: Facts = json.loads(line)
        return facts

    def do(self, do: str, **how: Any) -> Facts:
        """Have it do something, and wait for what comes of that."""
        self.tell(do, **how)
        return self.hear()

    def succeed(self, do: str, **how: Any) -> None:
        facts = self.do(do, **how)
        assert facts["error"] is None, facts

    def wait_until_stopped(self) -> None:
        """Until the kernel says that it is stopped; the wait does not end it."""
        _, status = os.waitpid(self.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status), f"it ended with {status}"

    def wake(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@contextmanager
def a_chief() -> Generator[Chief, None, None]:
    command = [sys.executable, str(PROGRAMS / "chief.py")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            chief = Chief(process)
            assert chief.hear() == {"begin": process.pid}
            yield chief
        finally:
            process.kill()
            if process.stdin is not None:
                process.stdin.close()


# ---- races


class Field:
    """Chiefs that race for one log directory; one that was killed is replaced by a new one."""

    def __init__(self, stack: ExitStack, logdir: Path, size: int) -> None:
        self._stack = stack
        self._logdir = logdir
        self.chiefs = [self._enter() for _ in range(size)]

    def _enter(self) -> Chief:
        chief = self._stack.enter_context(a_chief())
        chief.succeed("open", logdir=str(self._logdir))
        return chief

    def race(self, chance: random.Random) -> tuple[Chief, dict[int, Facts]]:
        """All of them at one moment, give or take a millisecond; the writer, and what the others were told."""
        moment = time.monotonic() + 0.03
        for chief in self.chiefs:
            chief.tell("acquire", at=moment + chance.choice([0.0, chance.uniform(0, 0.001)]))
        facts = {chief.pid: chief.hear() for chief in self.chiefs}
        writers = [chief for chief in self.chiefs if facts[chief.pid]["error"] is None]
        assert len(writers) == 1, facts
        del facts[writers[0].pid]
        return writers[0], facts

    def replace(self, chief: Chief) -> None:
        chief.kill()
        self.chiefs[self.chiefs.index(chief)] = self._enter()


@pytest.mark.campaign(small=10, soak=100)
@pytest.mark.parametrize("size", [2, 3])
def test_one_of_those_that_come_at_once_becomes_the_writer(tmp_path: Path, size: int, count: int, seed: int) -> None:
    """Each race but the first is for what a killed writer has left, with a draft of its own half written."""
    chance = random.Random(seed)
    pids: set[int] = set()
    with ExitStack() as stack:
        field = Field(stack, tmp_path / "logs", size)
        for number in range(count):
            pids.update(chief.pid for chief in field.chiefs)
            writer, others = field.race(chance)
            for pid, facts in others.items():
                assert facts["error"] == "LeaseHeldError"
                named = [one for one in pids if f"already being written by process {one} on " in facts["message"]]
                assert named != [pid]
                assert len(named) == 1, facts
                assert size > 2 or named == [writer.pid], facts  # of three, it may be another one that gave up, too
            writer.succeed("commit", step=number)
            writer.succeed("half", step=number + 1)
            field.replace(writer)
    left = DirectoryStore(tmp_path / "logs")
    assert [checkpoint.step for checkpoint in left.checkpoints()] == [*range(count)]
    with left.writing():
        (lease,) = (left.path / ".work").iterdir()
        assert sorted(path.name.partition("-")[0] for path in lease.iterdir()) == ["beat", "owner.json"]


# ---- frozen ones


class SeesDead(Host):
    """A machine on which every process but this one is dead, whatever it may be doing."""

    def is_alive(self, other: Identity) -> bool | None:
        return other == self.identity()


class Elsewhere(Host):
    """Another machine, on which nothing is known of the processes of this one."""

    def is_alive(self, other: Identity) -> bool | None:
        return None


class HurriedClock(SystemClock):
    """A clock on which patience runs out sooner."""

    def __init__(self, times: float) -> None:
        self._times = times

    def monotonic(self) -> float:
        return super().monotonic() * self._times

    def wait(self, event: threading.Event, timeout: float | None) -> bool:
        return super().wait(event, None if timeout is None else timeout / self._times)


def successor(logdir: Path, sight: str) -> DirectoryStore:
    host = SeesDead() if sight == "dead" else Elsewhere()
    return DirectoryStore(logdir, host=host, clock=HurriedClock(100))


def all_below(logdir: Path) -> dict[str, bytes]:
    """Everything that is there, but for the folder of the writers themselves; and of event files each has its own."""
    return {
        str(path.relative_to(logdir)): path.read_bytes() if path.is_file() else b""
        for path in sorted(logdir.rglob("*"))
        if ".work" not in path.parts and not path.name.startswith("events.")
    }


FREEZES: dict[str, tuple[str, dict[str, Any], tuple[str, str]]] = {
    "commit": ("commit", {"step": 4}, ("rename", "model.ckpt-4")),
    "begin": ("commit", {"step": 4}, ("make_directory", ".work/lease-*/draft-*")),
    "write": ("commit", {"step": 4}, ("create", ".work/lease-*/model.safetensors")),
    "manifest": ("commit", {"step": 4}, ("create", ".work/lease-*/manifest.json")),
    "sync": ("commit", {"step": 4}, ("sync_directory", ".work/lease-*/draft-*")),
    "exchange": ("again", {"step": 3}, ("exchange", "model.ckpt-3")),
    "link": ("link", {"step": 4, "base": 3}, ("link", ".work/lease-*/model.safetensors")),
    "commit with a link": ("link", {"step": 4, "base": 3}, ("rename", "model.ckpt-4")),
    "prune": ("remove", {"step": 1}, ("rename", ".work/lease-*/trash-model.ckpt-1")),
    "set aside": ("set_aside", {"step": 3}, ("rename", ".work/lease-*/set-aside-model.ckpt-3/model.ckpt-3")),
    "parcel": ("set_aside", {"step": 3}, ("make_directory", ".work/lease-*/set-aside-model.ckpt-3")),
    "reason": ("set_aside", {"step": 3}, ("create", ".work/lease-*/set-aside-model.ckpt-3/reason.json")),
    "deliver": ("set_aside", {"step": 3}, ("rename", "set-aside/model.ckpt-3")),
    "retire": ("retire", {"step": 3}, ("rename", ".work/lease-*/retired-model.ckpt-3/model.ckpt-3")),
    "retire damaged": ("retire_damaged", {}, ("rename", ".work/lease-*/retired-model.ckpt-9")),
    "beat": ("beat", {}, ("rename", ".work/lease-*/beat-*")),
}


def prepared(chief: Chief, logdir: Path) -> None:
    chief.succeed("open", logdir=str(logdir))
    chief.succeed("acquire")
    for step in (1, 2, 3, 9):
        chief.succeed("commit", step=step)
    chief.succeed("set_aside", step=9)


@pytest.mark.parametrize("sight", ["dead", "elsewhere"])
def test_a_chief_that_was_frozen_and_replaced_changes_nothing_and_says_why(tmp_path: Path, sight: str) -> None:
    """Stopped between its last look at the lease and its next change, whichever that is."""
    with a_chief() as chief:
        for name, (act, how, freeze) in FREEZES.items():
            logdir = tmp_path / name
            prepared(chief, logdir)
            chief.tell(act, **how, freeze=freeze)
            assert chief.hear() == {"frozen": freeze[0], "held": True}, name
            chief.wait_until_stopped()

            other = successor(logdir, sight)
            other.acquire()
            assert other.checkpoints() == [CheckpointId(1), CheckpointId(2), *[CheckpointId(3)] * (name != "deliver")]
            assert len(other.damaged()) == 1 + (name == "deliver"), "what was begun is completed"
            write_checkpoint(other, CheckpointId(4), b"of the new chief")
            there = all_below(logdir)
            chief.wake()
            said = chief.hear()

            assert said["error"] == "LeaseLostError", (name, said)
            assert f"another process took over {logdir} while this one did not answer" in said["message"]
            for late in (
                {"do": "commit", "step": 5},
                {"do": "remove", "step": 1},
                {"do": "beat"},
                {"do": "check_lease"},
            ):
                assert chief.do(**late)["error"] == "LeaseLostError", (name, late)
            chief.succeed("release")
            assert all_below(logdir) == there, name
            other.check_lease()
            write_checkpoint(other, CheckpointId(5))
            other.release()
            assert list((logdir / ".work").iterdir()) == [], name


def test_a_chief_that_was_frozen_among_its_beats_is_replaced_and_one_that_beats_is_not(tmp_path: Path) -> None:
    with a_chief() as chief:
        prepared(chief, tmp_path)
        chief.succeed("keep_beating", every=0.02)
        watching = DirectoryStore(tmp_path, host=Elsewhere(), clock=HurriedClock(5))  # for 4 seconds
        with pytest.raises(LeaseHeldError, match=f"written by process {chief.pid} on"):
            watching.acquire()
        os.kill(chief.pid, signal.SIGSTOP)
        chief.wait_until_stopped()
        watching.acquire()
        write_checkpoint(watching, CheckpointId(4))
        chief.wake()
        said = chief.hear()
        assert said["beat"] == "LeaseLostError"
        assert f"another process took over {tmp_path}" in said["message"]
        assert chief.do("commit", step=5)["error"] == "LeaseLostError"
        assert watching.checkpoints()[-1] == CheckpointId(4)
        watching.release()


def test_a_run_whose_chief_was_replaced_ends_and_says_why(tmp_path: Path) -> None:
    """Frozen in the middle of a commit, a whole Supervisor writes nothing more, and does not train on."""
    with started("frozen_run.py", tmp_path, 5) as running:
        assert running.wait_for(1)
        _wait_until_stopped(running.process.pid)
        other = successor(tmp_path, "dead")
        other.acquire()
        assert other.checkpoints() == [CheckpointId(step) for step in range(5)]
        write_checkpoint(other, CheckpointId(5), b"of the new chief")
        there = all_below(tmp_path)
        running.signal(signal.SIGCONT)
        outcome = running.end()
    assert outcome.status == 1
    assert f"LeaseLostError: another process took over {tmp_path}" in outcome.errors
    assert all_below(tmp_path) == there
    assert other.checkpoints()[-1] == CheckpointId(5)
    other.release()


def _wait_until_stopped(pid: int) -> None:
    os.waitpid(pid, os.WUNTRACED)
