"""The examples of several processes come back from what ends one of them, and end with the same weights."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest

EXAMPLES: Final = Path(__file__).parents[2] / "examples"
TORCHRUN: Final = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--monitor-interval=0.1"]
_LIMIT: Final = 120.0


@dataclass(slots=True)
class Launch:
    """A launcher and its processes, and the file with what they print."""

    process: subprocess.Popen[bytes]
    output: Path

    def lines(self) -> list[str]:
        return self.output.read_text(encoding="utf-8").splitlines()

    def wait_for(self, beginning: str) -> None:
        """Wait until a line begins so."""
        deadline = time.monotonic() + _LIMIT
        while not any(line.startswith(beginning) for line in self.lines()):
            assert self.process.poll() is None, self.output.read_text(encoding="utf-8")
            assert time.monotonic() < deadline, self.output.read_text(encoding="utf-8")
            time.sleep(0.02)

    def rank(self, rank: int) -> int:
        """The process of a rank that the launcher has started."""
        for pid in children_of(self.process.pid):
            arguments = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
            variables = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
            if f"RANK={rank}" in variables or ("--rank" in arguments and f"{rank}" == arguments[-2]):
                return pid
        raise AssertionError(f"there is no rank {rank}")

    def end(self) -> str:
        """Wait for the end; what was said last."""
        status = self.process.wait(_LIMIT)
        assert status == 0, self.output.read_text(encoding="utf-8")
        return next(line for line in reversed(self.lines()) if line.startswith("done:"))


@contextmanager
def launched(logdir: Path, launcher: list[str], *arguments: str) -> Iterator[Launch]:
    """A launcher that runs while the block does; it and its processes are killed at the end at the latest."""
    logdir.parent.mkdir(parents=True, exist_ok=True)
    output = logdir.with_suffix(".out")
    with open(output, "ab") as file:
        process = subprocess.Popen(
            [sys.executable, *launcher, "--logdir", str(logdir), *arguments],
            stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
            env=os.environ | {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"},
        )  # fmt: skip
        try:
            yield Launch(process, output)
        finally:
            kill_session(process)


def kill_session(process: subprocess.Popen[bytes]) -> None:
    """torchrun gives each rank a group of its own, but no session."""
    for pid in [process.pid, *(pid for pid in processes() if session_of(pid) == process.pid)]:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    process.wait(_LIMIT)


def processes() -> list[int]:
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]


def stat_of(pid: int) -> list[str]:
    """State, parent, group, session of a process; nothing of one that is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:4]
    except OSError:
        return []


def session_of(pid: int) -> int | None:
    stat = stat_of(pid)
    return int(stat[3]) if stat else None


def children_of(parent: int) -> list[int]:
    return [pid for pid in processes() if (stat := stat_of(pid)) and int(stat[1]) == parent and stat[0] != "Z"]


def test_ddp_ends_with_the_same_weights_when_a_rank_is_killed(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("sklearn")
    program = [str(EXAMPLES / "09_ddp.py")]
    with launched(tmp_path / "whole", TORCHRUN + program, "--epochs", "2") as launch:
        whole = launch.end()
    with launched(tmp_path / "killed", [*TORCHRUN, "--max-restarts=1", *program], "--epochs", "2") as launch:
        launch.wait_for("epoch 0:")
        os.kill(launch.rank(1), signal.SIGKILL)
        assert launch.end() == whole
        assert any(line.startswith(("step 20: model.ckpt-20", "step 40: model.ckpt-40")) for line in launch.lines())


def test_searches_find_the_same_model_when_some_are_killed_and_all_are_stopped(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    program = [str(EXAMPLES / "12_searches.py"), "--workers", "2", "--trials", "20"]
    with launched(tmp_path / "killed", program) as launch:
        launch.wait_for("trial 1 of rank 2:")
        for rank in (1, 0):
            os.kill(launch.rank(rank), signal.SIGKILL)
            launch.wait_for(f"rank {rank} was killed")
        found = launch.end()
    assert found.startswith("done: step 40")
    with launched(tmp_path / "stopped", program) as launch:
        launch.wait_for("trial 1 of rank 1:")
        launch.process.send_signal(signal.SIGTERM)
        assert launch.process.wait(_LIMIT) == 143, launch.output.read_text(encoding="utf-8")
    with launched(tmp_path / "stopped", program) as launch:
        assert launch.end() == found
