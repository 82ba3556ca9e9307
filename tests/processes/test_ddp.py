"""Four ranks under torchrun: whatever ends them, they end together, and the next launch goes on as if nothing had been.

What is promised: a stop that is asked for anywhere makes all ranks stop after the same step, with one checkpoint of all
of them and the same exit status; a run that was stopped or killed ends bit-identical to one that was not; over all
launches each sample of an epoch is trained on once.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest

from supervise_core import CheckpointDirectory

from .driving import PROGRAMS

pytest.importorskip("torch", reason="PyTorch is not installed")
if not __import__("torch").distributed.is_available():
    pytest.skip("this PyTorch cannot train on several ranks", allow_module_level=True)

RANKS: Final = 4
SAMPLES: Final = 96
EPOCHS: Final = 4
GRACE: Final = 20.0
_LIMIT: Final = 150.0

Facts = dict[str, Any]


@dataclass(slots=True)
class Launch:
    """A running torchrun, and what its ranks say, line by line, into a file."""

    process: subprocess.Popen[bytes]
    output: Path

    def said(self) -> list[Facts]:
        lines = self.output.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}\n")]

    def wait_for(self, lines: int) -> None:
        deadline = time.monotonic() + _LIMIT
        while len(self.said()) < lines and self.process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)

    def workers(self) -> list[int]:
        return [pid for pid, parent in _processes().items() if parent == self.process.pid]

    def end(self, limit: float = _LIMIT) -> int:
        status = self.process.wait(limit)
        deadline = time.monotonic() + 20
        while any(_group_of(pid) == self.process.pid for pid in _processes()):
            assert time.monotonic() < deadline, "processes of the launch are left"
            time.sleep(0.05)
        return status

    def complaints(self) -> str:
        return self.output.with_suffix(".err").read_text(encoding="utf-8", errors="replace")


@contextmanager
def launched(logdir: Path, name: str, *arguments: object, restarts: int = 0) -> Iterator[Launch]:
    """The program on all ranks, killed at the end of the block at the latest."""
    output = logdir.parent / f"{name}.out"
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}",
        f"--max-restarts={restarts}", "--monitor-interval=0.1",
        str(PROGRAMS / "ddp_training.py"), str(logdir), *map(str, arguments),
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with open(output, "wb") as stdout, open(output.with_suffix(".err"), "wb") as stderr:
        process = subprocess.Popen(command, stdout=stdout, stderr=stderr, start_new_session=True, env=environment)
        with process:
            try:
                yield Launch(process, output)
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)


def digests(said: list[Facts]) -> dict[int, str]:
    """The final state of each rank that came to its end."""
    return {facts["rank"]: facts["digest"] for facts in said if "done" in facts}


def trained(said: list[Facts]) -> dict[tuple[int, int], tuple[int, list[int]]]:
    """By rank and step: the epoch, and which samples were trained on."""
    return {(facts["rank"], facts["step"]): (facts["epoch"], facts["samples"]) for facts in said if "step" in facts}


def samples_of_epochs(*launches: list[Facts]) -> dict[int, Counter[int]]:
    """What each epoch's weights have seen: of a step that was made again, the last time counts."""
    steps: dict[tuple[int, int], tuple[int, list[int]]] = {}
    for said in launches:
        begun = max((facts["begin"] for facts in said if "begin" in facts), default=None)
        if begun is not None:
            steps = {key: value for key, value in steps.items() if key[1] <= begun}
        steps |= trained(said)
    epochs: dict[int, Counter[int]] = {}
    for epoch, samples in steps.values():
        epochs.setdefault(epoch, Counter()).update(samples)
    return epochs


@pytest.fixture(scope="module", params=[0, 2], ids=["no data workers", "2 data workers"])
def reference(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, list[Facts]]:
    """How many data workers, and what the run says that nothing disturbs."""
    directory = tmp_path_factory.mktemp("reference")
    with launched(directory / "logs", "whole", "--workers", request.param) as launch:
        assert launch.end() == 0, launch.complaints()
        return request.param, launch.said()


@pytest.mark.timeout(7200)
@pytest.mark.campaign(small=1, soak=25)
def test_a_stop_anywhere_is_one_for_all(
    reference: tuple[int, list[Facts]], tmp_path: Path, count: int, seed: int
) -> None:
    workers, whole = reference
    chances = random.Random(f"{seed} {workers}")
    for number in range(count):
        logdir = tmp_path / f"run{number}" / "logs"
        logdir.parent.mkdir()
        after = chances.randint(RANKS, len(whole))  # lines: from the moment when all have joined
        how = chances.choice(["rank", "group", "launcher"])
        with launched(logdir, "stopped", "--workers", workers, "--pause", 0.01) as launch:
            launch.wait_for(after)
            time.sleep(chances.random() * 0.2)
            victim = chances.choice(launch.workers() or [launch.process.pid])
            began = time.monotonic()
            if how == "group":
                os.killpg(launch.process.pid, signal.SIGTERM)
            else:
                os.kill(victim if how == "rank" else launch.process.pid, signal.SIGTERM)
            launch.end(GRACE + 30)
            took = time.monotonic() - began
            first, complaints = launch.said(), launch.complaints()
        where = f"{how} after {after} lines (round {number})"
        assert took < GRACE + 10, f"{where}: {took:.1f} s"
        assert "Traceback" not in _of_ranks(complaints), f"{where}\n{complaints}"
        last = {facts["rank"]: facts["step"] for facts in first if "step" in facts}
        if sum("begin" in facts for facts in first) == RANKS:
            assert len(set(last.values())) <= 1, f"{where}: ended at different steps {last}"
            newest = CheckpointDirectory(logdir).steps()[-1]
            assert newest == max(last.values(), default=0), f"{where}: {newest} saved, {last} made"
        exits = re.findall(r"exitcode\s*:\s*(-?\d+)", complaints)
        assert "1" not in exits, f"{where}: {exits}\n{complaints}"
        with launched(logdir, "resumed", "--workers", workers) as launch:
            assert launch.end() == 0, f"{where}\n{launch.complaints()}"
            second = launch.said()
        assert digests(second) == digests(whole), where
        assert samples_of_epochs(first, second) == samples_of_epochs(whole), where
        shutil.rmtree(logdir.parent)


@pytest.mark.timeout(7200)
@pytest.mark.campaign(small=1, soak=20)
@pytest.mark.parametrize("reference", [0], indirect=True)  # a kill finds the ranks in the same way with data workers
def test_killed_ranks_are_started_again_by_torchrun(
    reference: tuple[int, list[Facts]], tmp_path: Path, count: int, seed: int
) -> None:
    _, whole = reference
    chances = random.Random(seed)
    for number in range(count):
        logdir = tmp_path / f"run{number}" / "logs"
        logdir.parent.mkdir()
        after = chances.randint(2 * RANKS, len(whole) - RANKS)
        with launched(logdir, "killed", "--pause", 0.01, restarts=1) as launch:
            launch.wait_for(after)
            os.kill(chances.choice(launch.workers()), signal.SIGKILL)
            assert launch.end() == 0, f"round {number} after {after} lines\n{launch.complaints()}"
            said = launch.said()
        assert digests(said) == digests(whole), f"round {number} after {after} lines"
        for epoch, seen in samples_of_epochs(said).items():
            assert seen == samples_of_epochs(whole)[epoch], f"round {number}: epoch {epoch}"
        shutil.rmtree(logdir.parent)


def test_each_epoch_trains_each_sample_once(reference: tuple[int, list[Facts]]) -> None:
    for seen in samples_of_epochs(reference[1]).values():
        assert seen == Counter(range(SAMPLES))


def _of_ranks(complaints: str) -> str:
    """Without what torchrun says of its own end."""
    return complaints.partition('Traceback (most recent call last):\n  File "<frozen runpy>"')[0]


def _processes() -> dict[int, int]:
    """Every process that is no remains, and its parent."""
    found: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
            except OSError:
                continue
            if state != "Z":
                found[int(entry.name)] = int(parent)
    return found


def _group_of(pid: int) -> int | None:
    try:
        return int((Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[2])
    except OSError:
        return None
