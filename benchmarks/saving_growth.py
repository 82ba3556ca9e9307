"""Line 5: how stall, save and restore grow with the bytes and with the number of tensors."""

from __future__ import annotations

import gc
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

from benchmarks.figures import Figures, Setting, in_random_order, steadily
from benchmarks.saving_limits import Limits
from benchmarks.saving_ours import Supervised
from benchmarks.saving_state import State
from supervise_core.host import available_memory

_PER_BYTE = 1.25
_PER_TENSOR_MICROSECONDS = 20.0
_FEW, _MANY = 20, 20_000
_AGAINST = (("stall", "memcpy"), ("durable", "direct write"), ("restore", "warm read"))
_COPIES = 3.5
"""So many times its own size a state needs to be measured: itself, the one beside it, the staging, and files."""


def growth(setting: Setting) -> None:
    """Measure and print."""
    _by_bytes(setting)
    gc.collect()
    _by_tensors(setting)


def _by_bytes(setting: Setting) -> None:
    report = setting.report
    report.title("growth with the bytes")
    found: dict[int, Figures] = {}
    for mib in sorted({max(1, round(setting.nbytes * times) >> 20) for times in (1 / 16, 1 / 4, 1, 4)}):
        nbytes = mib << 20
        if _COPIES * nbytes > available_memory():
            report.say(f"   {mib} MiB left out: there is no memory for {_COPIES:g} times that")
            continue
        measure = partial(_measure, setting, {"": partial(State.like_gpt, nbytes)})
        found[mib] = steadily(measure, report)
        gc.collect()
        for ours, limit in _AGAINST:
            report.ratio("", f"{ours}, {mib} MiB", found[mib], ours, [limit])
    smallest, largest = min(found), max(found)
    for ours, limit in _AGAINST:
        grown, machine = (
            found[largest].median(subject) / largest / (found[smallest].median(subject) / smallest)
            for subject in (ours, limit)
        )
        beside = f"{grown:.2f} × per byte, where {limit} has {machine:.2f} ×"
        report.number("5", f"{ours}, {largest} against {smallest} MiB", grown / machine, "×", _PER_BYTE, beside)


def _by_tensors(setting: Setting) -> None:
    report = setting.report
    many = min(_MANY, setting.nbytes // 4096)
    report.title(f"growth with the tensors: {setting.nbytes >> 20} MiB in {many} tensors against {_FEW}")
    kinds = {
        f", {_FEW} tensors": lambda: State.of_tensors(_FEW, setting.nbytes),
        f", {many} tensors": lambda: State.of_tensors(many, setting.nbytes),
    }
    figures = steadily(partial(_measure, setting, kinds), report)
    for ours, _ in _AGAINST:
        few, more = (f"{ours}, {count} tensors" for count in (_FEW, many))
        report.seconds(figures, few)
        report.seconds(figures, more)
        each = (figures.median(more) - figures.median(few)) / (many - _FEW) * 1e6
        report.number("5", f"{ours}, per tensor", each, "µs", _PER_TENSOR_MICROSECONDS)


def _measure(setting: Setting, kinds: dict[str, Callable[[], State]]) -> Figures:
    """Each kind of state with its own limits, in turns."""
    figures = Figures()
    subjects: dict[str, Callable[[], None]] = {}
    runs: list[Supervised] = []
    folders: list[Path] = []
    try:
        for kind, make in kinds.items():
            folder = setting.folder / f"growth{len(folders)}"
            folder.mkdir()
            folders.append(folder)
            state = make()
            state.flood()
            kept = state.twin()
            run = Supervised(state, folder / "run").__enter__()
            runs.append(run)
            _save(state, kept, run, "", Figures())
            limits = Limits(state, kept, folder)
            subjects |= {
                f"memcpy{kind}": partial(_add, figures, f"memcpy{kind}", limits.memcpy),
                f"direct write{kind}": partial(_add, figures, f"direct write{kind}", limits.write),
                f"warm read{kind}": partial(_add, figures, f"warm read{kind}", limits.read_warm),
                f"save{kind}": partial(_save, state, kept, run, kind, figures),
                f"restore{kind}": partial(_add, figures, f"restore{kind}", partial(run.restore_warm, kept)),
            }
        in_random_order(subjects, setting.rounds)
    finally:
        for run in runs:
            run.__exit__(None, None, None)
        for folder in folders:
            shutil.rmtree(folder)
    return figures


def _add(figures: Figures, subject: str, measure: Callable[[], float]) -> None:
    os.sync()
    figures.add(subject, measure())


def _save(state: State, kept: State, run: Supervised, kind: str, figures: Figures) -> None:
    state.flood()
    os.sync()
    saved = run.save()
    run.settle()
    run.check(kept)
    figures.add(f"stall{kind}", saved.stall)
    figures.add(f"durable{kind}", saved.durable)
