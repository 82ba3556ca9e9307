"""Starting training programs of TensorFlow as processes of their own, without importing it anew for each.

They are forked from one process that has imported it; see ``programs/tf_forks.py``. Otherwise as in ``driving.py``.
"""

from __future__ import annotations

import atexit
import functools
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import pytest

from .driving import PROGRAMS, Outcome, Running

MODES: Final = ("v2", "no eager", "v1")
"""What TensorFlow 2 is by default, with eager execution disabled, and with all behaviour of version 2 disabled."""
KINDS: Final = ("ref", "resource")
"""The kinds of variables."""
_START: Final = 120.0


class Forked:
    """A forked process, as ``subprocess.Popen`` would have it."""

    def __init__(self, pid: int, stdout: io.TextIOWrapper, stderr: io.TextIOWrapper) -> None:
        self.pid = pid
        self.stdout = stdout
        self.stderr = stderr
        self.status: int | None = None
        self.ended = threading.Event()

    def poll(self) -> int | None:
        return self.status

    def wait(self, timeout: float | None = None) -> int:
        if not self.ended.wait(timeout):
            assert timeout is not None
            raise subprocess.TimeoutExpired(str(self.pid), timeout)
        assert self.status is not None
        return self.status

    def kill(self) -> None:
        if not self.ended.is_set():
            os.kill(self.pid, signal.SIGKILL)


class Forks:
    """The process that forks, and what it says."""

    def __init__(self) -> None:
        self._line, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            command = [sys.executable, "-X", "faulthandler", str(PROGRAMS / "tf_forks.py"), str(theirs.fileno())]
            environment = os.environ | {"PYTHONWARNINGS": "error", "OMP_NUM_THREADS": "1"}
            self._process = subprocess.Popen(
                command, pass_fds=[theirs.fileno()], start_new_session=True, env=environment,
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            )  # fmt: skip
        self._forked: dict[int, Forked] = {}
        self._newest: list[int] = []
        self._heard = threading.Condition()
        self._listener = threading.Thread(target=self._listen, name="forks", daemon=True)
        self._listener.start()
        atexit.register(self.close)

    def start(self, program: str, *arguments: object) -> Forked:
        readers: list[io.TextIOWrapper] = []
        writers: list[int] = []
        for _ in range(2):
            reader, writer = os.pipe()
            readers.append(open(reader, encoding="utf-8", errors="replace"))  # noqa: SIM115 - closed by started()
            writers.append(writer)
        argv = [str(PROGRAMS / program), *map(str, arguments)]
        with self._heard:
            socket.send_fds(self._line, [json.dumps({"argv": argv}).encode()], writers)
            for writer in writers:
                os.close(writer)
            assert self._heard.wait_for(lambda: self._newest or not self._listener.is_alive(), _START)
            forked = Forked(self._newest.pop(), *readers)
            self._forked[forked.pid] = forked
        return forked

    def _listen(self) -> None:
        while content := self._line.recv(1 << 16):
            said = json.loads(content)
            with self._heard:
                if "pid" in said:
                    self._newest.append(said["pid"])
                else:
                    self._heard.wait_for(lambda pid=said["ended"]: pid in self._forked, _START)
                    forked = self._forked.pop(said["ended"])
                    forked.status = said["status"]
                    forked.ended.set()
                self._heard.notify_all()

    def close(self) -> None:
        self._line.shutdown(socket.SHUT_RDWR)
        self._listener.join(10)
        self._line.close()
        self._process.wait(20)


@functools.cache
def forks() -> Forks:
    """The one of this process; started when it is first asked for."""
    pytest.importorskip("tensorflow")
    return Forks()


@contextmanager
def started(program: str, *arguments: object) -> Iterator[Running]:
    """A program that runs while the block does, killed at its end at the latest."""
    process: Any = forks().start(program, *arguments)
    running = Running(process)
    running.listen()
    try:
        yield running
    finally:
        if process.poll() is None:
            process.kill()
            process.wait(60)
        for listener in running._listeners:
            listener.join(10)
        process.stdout.close()
        process.stderr.close()


def run(program: str, *arguments: object) -> Outcome:
    """A program from its beginning to its end."""
    with started(program, *arguments) as running:
        return running.end()
