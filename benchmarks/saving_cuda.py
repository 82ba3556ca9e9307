"""Line 9: the same for a state on a GPU, against copies between it and pinned memory; without one, a line says so."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from benchmarks.figures import Figures, Setting, in_random_order, steadily
from benchmarks.saving_limits import Limits
from benchmarks.saving_loops import Loop, time_lost
from benchmarks.saving_ours import Supervised
from benchmarks.saving_state import State

_STALL = _LOST = _DURABLE = 1.25
_WARM = 1.5


def cuda(setting: Setting) -> None:
    """Measure and print."""
    report = setting.report
    if not torch.cuda.is_available():
        report.title("9  CUDA: there is no GPU here, so nothing of it was measured")
        return
    report.title(f"CUDA ({torch.cuda.get_device_name()}), {setting.nbytes >> 20} MiB")
    figures = steadily(lambda: _measure(setting), report)
    for limit in ("device to host", "xxh3", "direct write", "warm read", "host to device"):
        report.seconds(figures, limit)
    report.ratio("9", "stall", figures, "stall", ["device to host"], _STALL)
    report.ratio("9", "lost, compute", figures, "lost", ["device to host", "xxh3"], _LOST)
    report.ratio("9", "durable, hashed and committed", figures, "durable", ["direct write"], _DURABLE)
    report.ratio("9", "restore, verified, warm", figures, "restore", ["warm read", "host to device"], _WARM)


def _measure(setting: Setting) -> Figures:
    figures = Figures()
    folder = setting.folder / "cuda"
    state = State.like_gpt(setting.nbytes, "cuda")
    state.flood()
    kept = state.twin()
    pinned = [torch.empty_like(tensor, device="cpu").pin_memory() for tensor in state.tensors]
    host = State.like_gpt(setting.nbytes)
    host.flood()
    limits = Limits(host, host.twin(), setting.folder)
    one, other, result = (torch.rand(2048, 2048, device="cuda") for _ in range(3))

    def work() -> None:
        torch.mm(one, other, out=result)
        torch.cuda.synchronize()

    loop = Loop("compute", state, work)
    with Supervised(state, folder) as run:

        def save() -> None:
            state.flood()
            torch.cuda.synchronize()
            os.sync()
            saved = run.save()
            run.settle()
            run.check(kept)
            figures.add("stall", saved.stall)
            figures.add("durable", saved.durable)

        def train() -> None:
            figures.add("lost", time_lost(loop, run.begin, run.is_done, run.sv.should_stop))
            run.settle()
            run.check(kept)

        save()
        figures = Figures()
        subjects: dict[str, Callable[[], None]] = {"save": save, "train": train}
        measures: dict[str, Callable[[], float]] = {
            "device to host": partial(_copy, pinned, state.tensors),
            "host to device": partial(_copy, kept.tensors, pinned),
            "xxh3": limits.xxh3,
            "direct write": limits.write,
            "warm read": limits.read_warm,
            "restore": partial(run.restore_warm, kept),
        }
        for name, measure in measures.items():
            subjects[name] = partial(_add, figures, name, measure)
        in_random_order(subjects, setting.rounds)
    shutil.rmtree(folder)
    return figures


def _copy(targets: list[Any], sources: list[Any]) -> float:
    torch.cuda.synchronize()
    began = time.perf_counter()
    with torch.no_grad():
        for target, source in zip(targets, sources, strict=True):
            target.copy_(source, non_blocking=True)
    torch.cuda.synchronize()
    return time.perf_counter() - began


def _add(figures: Figures, name: str, measure: Callable[[], float]) -> None:
    figures.add(name, measure())
