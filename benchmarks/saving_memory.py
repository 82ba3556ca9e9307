"""Line 4: the memory that saving takes beside the state, in a process of its own."""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.figures import Setting
from benchmarks.saving_ours import Supervised, loading, without_staging
from benchmarks.saving_state import FalseFigureError, State
from supervise_core.checkpoint_files import read_checkpoint
from supervise_core.directory_store import open_checkpoint_directory

_KEPT = 1.05
_BESIDES = _IN_ALL = 64.0
_GROWTH = 8.0
_SMALL = 64 << 20
_MIB = 1 << 20


def memory(setting: Setting) -> None:
    """Measure and print."""
    report = setting.report
    saves = 200 if setting.rounds >= 7 else 10 * setting.rounds
    command = [sys.executable, "-m", "benchmarks.saving_memory", str(setting.nbytes), str(saves), str(setting.folder)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise FalseFigureError(done.stdout.strip() or f"the process that measures memory ended with {done.returncode}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    report.title(f"memory, beside {found['state']:.0f} MiB of state")
    report.number(
        "4", "kept between saves", found["kept"] / found["state"], "× state", _KEPT, f"{found['kept']:.0f} MiB"
    )
    report.number("4", "besides, at the peak of a save", found["peak"], "MiB", _BESIDES)
    report.number("4", f"growth over {saves} saves", found["growth"], "MiB", _GROWTH)
    report.number("4", "at the peak of a restore", found["restore"], "MiB", _BESIDES)
    if "none" in found:
        report.number("4", "at the peak of a save, staging='none'", found["none"], "MiB", _IN_ALL)
    else:
        report.say("4  staging='none': this version has none")


def measure(nbytes: int, saves: int, folder: Path) -> dict[str, float]:
    """Megabytes, in a process that did nothing else."""
    small = State.like_gpt(min(nbytes, _SMALL))
    small.flood()
    found = {"growth": _growth(small, saves, folder / "small")}  # first: it loads and starts whatever there is
    state = State.like_gpt(nbytes)
    state.flood()
    found["state"] = state.nbytes / _MIB
    if (options := without_staging()) is not None:
        before = _resident()
        with Supervised(state, folder / "none", **options) as run:
            found["none"] = _peak_of_saves(state, run) - before
    gc.collect()
    before = _resident()
    with Supervised(state, folder / "run") as run:
        peak = _peak_of_saves(state, run)
        after = _resident()
        found["kept"] = after - before
        found["peak"] = peak - after
        path = run.path
        twin = state.twin()
        twin.scramble()
        _forget_peak()
        before = _resident()
        with loading(twin) as (backend, session), open_checkpoint_directory(path) as reader:
            content = read_checkpoint(reader)
            backend.load(session, content.parts)
            content.verify_the_rest()
        found["restore"] = _peak() - before
        state.check(twin.named(), state.steps)
    return found


def _peak_of_saves(state: State, run: Supervised) -> float:
    _forget_peak()
    for _ in range(3):
        state.flood()
        run.save()
        run.settle()
    return _peak()


def _growth(state: State, saves: int, folder: Path) -> float:
    with Supervised(state, folder) as run:
        resident = 0.0
        for number in range(20 + saves):
            state.flood()
            run.save()
            run.settle()
            if number == 19:
                resident = _resident()
        grown = _resident() - resident
        run.check(state.twin())
    return grown


def _status(key: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) / 1024
    raise LookupError(key)


def _resident() -> float:
    return _status("VmRSS")


def _peak() -> float:
    return _status("VmHWM")


def _forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def main() -> int:
    """In a process of its own: print what was found as JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("nbytes", type=int)
    parser.add_argument("saves", type=int)
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    try:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            print(json.dumps(measure(options.nbytes, options.saves, Path(folder))))
    except FalseFigureError as error:
        print(error)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
