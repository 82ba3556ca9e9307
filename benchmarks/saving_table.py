"""The figures of one run as a table in Markdown, and the machine that they are of."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from benchmarks.figures import Figures
from benchmarks.saving_peers import Peer

_HEAD = (
    "| seconds (× the limit) | the loop waits | lost per save | done | durable then | load, warm |",
    "|---|--:|--:|--:|---|--:|",
)


def table(figures: Figures, loop: str, peers: Sequence[Peer]) -> str:
    """Medians, and the median of the ratios to the limit of the same round. ``loop`` is the one that loses time."""
    sums = (("memcpy",), ("memcpy", "xxh3"), ("direct write",), ("warm read",))
    limits = [f"{sum(figures.median(limit) for limit in each):.2f}" for each in sums]
    names = "; ".join(" + ".join(each) for each in sums)
    mine = ("stall", f"lost, {loop}", "durable", "warm restore")
    rows = [
        f"| limit: {names} | {limits[0]} | {limits[1]} | {limits[2]} | yes | {limits[3]} |",
        _row("**supervise-core**, hashed and verified", figures, "", "yes", mine, sums),
    ]
    for peer in peers:
        subjects = ("stall", f"lost, {loop}", "done", "load")
        rows.append(_row(peer.name, figures, f"{peer.name} ", peer.synced, subjects, sums))
    return "\n".join([*_HEAD, *rows])


def machine(folder: Path) -> str:
    """One line about the machine, and the versions that matter."""
    models = {line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")}
    memory = next((int(line.split()[1]) >> 20 for line in _lines("/proc/meminfo") if line.startswith("MemTotal")), 0)
    return (
        f"{os.cpu_count()} processors ({', '.join(sorted(models)) or platform.machine()}), {memory} GiB of memory, "
        f"{_file_system(folder)}, Linux {platform.release().split('-')[0]}, "
        f"Python {platform.python_version()}, PyTorch {version('torch')}"
    )


def _row(
    name: str, figures: Figures, prefix: str, synced: str, subjects: Sequence[str], limits: Sequence[Sequence[str]]
) -> str:
    cells: list[str] = []
    for subject, against in zip(subjects, limits, strict=True):
        ratios = sorted(figures.ratios(prefix + subject, *against))
        ratio = ratios[len(ratios) // 2]
        cells.append(f"{figures.median(prefix + subject):.2f} ({ratio:.2f} ×)")
    return f"| {name} | {cells[0]} | {cells[1]} | {cells[2]} | {synced} | {cells[3]} |"


def _file_system(folder: Path) -> str:
    """Of which kind it is that a folder lies on."""
    where = str(folder.resolve())
    found = [line.split()[1:3] for line in _lines("/proc/mounts")]
    fitting = [(place, kind) for place, kind in found if where == place or where.startswith(place.rstrip("/") + "/")]
    return max(fitting, key=lambda each: len(each[0]), default=("", "a file system"))[1]


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []
