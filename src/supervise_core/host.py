"""Who a process is, and whether another one still lives."""

from __future__ import annotations

import logging
import os
import platform
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Identity:
    """One process, told apart from every other: ``started`` is its start time in the kernel's clock ticks since boot.

    ``boot`` is the boot of the machine together with the process namespace, so that processes of two containers on
    one machine are not mistaken for one another.
    """

    host: str
    boot: str
    pid: int
    started: int

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Identity:
        """:raises ValueError: if the data is not an identity."""
        match data:
            case {"host": str() as host, "boot": str() as boot, "pid": int() as pid, "started": int() as started}:
                return cls(host, boot, pid, started)
            case _:
                raise ValueError("not the identity of a process")


class Host:
    """The machine this process runs on."""

    def identity(self) -> Identity:
        """Of this process."""
        pid = os.getpid()
        return Identity(platform.node(), _boot(), pid, _start_time(pid) or 0)

    def is_alive(self, other: Identity) -> bool | None:
        """Whether a process lives; None where this machine cannot tell (another host, another container)."""
        if other.boot != _boot():
            return None
        return _start_time(other.pid) == other.started


def _boot() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:  # not Linux: only the beat of the lease can tell
        return f"unknown/{os.urandom(8).hex()}"


def _start_time(pid: int) -> int | None:
    """The kernel's start time of a process that runs; None if there is none, or only its remains."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    state, started = fields[0], int(fields[19])
    return None if state in ("Z", "X") else started


def end_process(status: int) -> None:
    """End this process without waiting for any thread, and without taking apart what there is in memory."""
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()
    os._exit(status)


def available_memory() -> int:
    """Bytes of main memory that programs can still have; 0 where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:")), 0)
