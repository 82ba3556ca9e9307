"""What a checkpoint costs: the loop while it is taken, the disk until it is durable, memory, and the way back.

``python -m benchmarks.saving [part ...] [--mib 1024] [--rounds 7]`` prints each figure as a ratio to what the machine
can do at best with the same bytes, and to other tools, measured in the same process, in turns and in random order, its
bound beside it. The state is changed in every step, and a figure counts only if what comes back is, bit by bit, the
state of the one step that the checkpoint names. The number before a line is that of the promise it belongs to.

It ends with exit status 0 if all is within bounds, 1 if something is over, 2 if a checkpoint was false, and 3 if the
disk was not steady, in which case nothing is known.
"""

from __future__ import annotations

import argparse
import gc
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

from benchmarks.figures import Report, Setting
from benchmarks.saving_cuda import cuda
from benchmarks.saving_frozen import frozen
from benchmarks.saving_growth import growth
from benchmarks.saving_memory import memory
from benchmarks.saving_speed import speed
from benchmarks.saving_state import FalseFigureError

FALSE: Final = 2

PARTS: Final[Mapping[str, Callable[[Setting], None]]] = {
    "speed": speed,
    "memory": memory,
    "growth": growth,
    "frozen": frozen,
    "cuda": cuda,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, check, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="part", help=f"of {', '.join(PARTS)}; without any, all of them")
    parser.add_argument("--mib", type=int, default=1024, help="size of the whole state")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--no-peers", action="store_true", help="leave out the other tools")
    parser.add_argument("--dir", type=Path, default=None, help="where to write; a disk, not a tmpfs")
    options = parser.parse_args(arguments)
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"there is no part {min(unknown)!r}; there are: {', '.join(PARTS)}")
    report = Report()
    scratch = Path(tempfile.mkdtemp(prefix="benchmark-", dir=options.dir or Path.cwd()))
    setting = Setting(options.mib << 20, options.rounds, not options.no_peers, scratch, report)
    report.say(f"{os.cpu_count()} processors; {options.rounds} rounds; median (smallest to largest)")
    try:
        for part in options.parts or PARTS:
            PARTS[part](setting)
            gc.collect()
    except FalseFigureError as error:
        print(f"FALSE: {error}", flush=True)
        return FALSE
    finally:
        shutil.rmtree(scratch)
    if not options.parts:
        report.say(
            "\n8  the share of a whole run: python -m benchmarks.overhead (make overhead), which takes five minutes"
        )
    return report.status


if __name__ == "__main__":
    sys.exit(main())
