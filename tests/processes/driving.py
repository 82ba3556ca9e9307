"""Starting training programs as processes of their own, listening to them, and ending them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from supervise_core import CheckpointDirectory

PROGRAMS: Final = Path(__file__).parent.parent / "programs"
_LIMIT: Final = 60.0

Facts = dict[str, Any]


@dataclass(slots=True)
class Outcome:
    """What a process said line by line, and how it ended."""

    said: list[Facts]
    status: int
    errors: str

    @property
    def begin(self) -> Facts:
        return next(facts for facts in self.said if "begin" in facts)

    @property
    def done(self) -> Facts | None:
        return next((facts for facts in self.said if "done" in facts), None)

    @property
    def steps(self) -> list[tuple[int, str]]:
        return [(facts["step"], facts["loss"]) for facts in self.said if "step" in facts]


@dataclass(slots=True)
class Running:
    """A process that is running, in a process group of its own."""

    process: subprocess.Popen[str]
    said: list[Facts] = field(default_factory=list[Facts])
    errors: list[str] = field(default_factory=list[str])
    _listeners: list[threading.Thread] = field(default_factory=list[threading.Thread])
    _heard: threading.Condition = field(default_factory=threading.Condition)

    def listen(self) -> None:
        for target in (self._listen, self._listen_to_errors):
            self._listeners.append(threading.Thread(target=target, daemon=True))
            self._listeners[-1].start()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with self._heard:
                if line.startswith("{") and line.endswith("}\n"):  # a kill may cut the last line
                    self.said.append(json.loads(line))
                self._heard.notify_all()
        with self._heard:
            self._heard.notify_all()

    def _listen_to_errors(self) -> None:
        assert self.process.stderr is not None
        self.errors.extend(self.process.stderr)

    def wait_for(self, lines: int) -> bool:
        """Wait until it has said so many lines; whether it came to that before it ended."""
        with self._heard:
            self._heard.wait_for(lambda: len(self.said) >= lines or not self._listeners[0].is_alive(), _LIMIT)
            return len(self.said) >= lines

    def wait_until_it_heeds(self, number: signal.Signals) -> None:
        """Wait until the signal would not simply end it: from then on it is the session's."""
        status = Path(f"/proc/{self.process.pid}/status")
        end = time.monotonic() + _LIMIT
        while self.process.poll() is None and time.monotonic() < end:
            caught = next((line for line in status.read_text().splitlines() if line.startswith("SigCgt:")), "SigCgt: 0")
            if int(caught.split()[1], 16) >> number - 1 & 1:
                return
            time.sleep(0.0005)
        raise AssertionError(f"it did not come to heed {number.name}: {self.said[-3:]}, {self.errors[-20:]}")

    def signal(self, number: signal.Signals, *, to_group: bool = False) -> None:
        (os.killpg if to_group else os.kill)(self.process.pid, number)

    def end(self, limit: float = _LIMIT) -> Outcome:
        """Wait for its end, however it comes, and check that it left no process behind.

        :raises TimeoutExpired: if it hangs; its threads' stacks are then in the errors.
        """
        try:
            status = self.process.wait(limit)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGABRT)
            raise
        for listener in self._listeners:
            listener.join(10)
        _await_end_of_group(self.process.pid)
        return Outcome(self.said, status, "".join(self.errors))


@contextmanager
def started(program: str, *arguments: object) -> Iterator[Running]:
    """A program that runs while the block does, killed at its end at the latest."""
    command = [sys.executable, "-X", "faulthandler", str(PROGRAMS / program), *map(str, arguments)]
    # PyTorch warns of a scheduler that steps before the optimizer has, as in an epoch that is resumed at its end
    environment = os.environ | {"PYTHONWARNINGS": "error,ignore:Detected call of", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True, env=environment
    )
    with process:
        running = Running(process)
        running.listen()
        try:
            yield running
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


def run(program: str, *arguments: object, limit: float = _LIMIT) -> Outcome:
    """A program from its beginning to its end."""
    with started(program, *arguments) as running:
        return running.end(limit)


def newest_step(logdir: Path) -> int:
    """The step of the newest checkpoint that is committed; 0 if there is none."""
    steps = CheckpointDirectory(logdir).steps()
    return steps[-1] if steps else 0


def _await_end_of_group(group: int) -> None:
    """Data workers end with their parent, which the kernel may take a moment for."""
    deadline = time.monotonic() + 20
    while _lives(group):
        if time.monotonic() > deadline:
            raise AssertionError(f"processes of group {group} are left")
        time.sleep(0.01)


def _lives(group: int) -> bool:
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            state, _, found = (entry / "stat").read_text().rpartition(")")[2].split()[:3]
        except OSError:
            continue
        if int(found) == group and state != "Z":
            return True
    return False
