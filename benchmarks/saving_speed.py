"""Lines 1 to 3: what the loop loses, until when a save is durable, and how quickly it is back; beside other tools."""

from __future__ import annotations

import gc
import os
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from benchmarks.figures import Figures, Setting, in_random_order, steadily
from benchmarks.saving_limits import Limits, seconds
from benchmarks.saving_loops import Loop, compute_bound, memory_bound, time_lost
from benchmarks.saving_ours import Supervised
from benchmarks.saving_peers import Peer, available
from benchmarks.saving_state import FalseFigureError, State
from benchmarks.saving_table import machine, table

_STALL = _LOST = _DURABLE = _COLD = 1.25
_WARM = 1.5
_STEPS_BEFORE_FIRST = 25


def speed(setting: Setting) -> None:
    """Measure and print."""
    report = setting.report
    measurement = _Speed(setting)
    state = measurement.state
    report.title(f"{state.nbytes / 2**20:.0f} MiB in {len(state.tensors)} tensors, like GPT-2 with AdamW")
    try:
        figures = steadily(measurement.measure, report)
    finally:
        measurement.close()
    for limit in ("memcpy", "xxh3", "direct write", "warm read", "cold read"):
        report.seconds(figures, limit)
    report.ratio("1", "stall", figures, "stall", ["memcpy"], _STALL)
    report.ratio("1", "stall of the first save of a run", figures, "first stall", ["memcpy"], _STALL)
    for loop in measurement.loops:
        for fork in ("", ", forks"):
            name = f"lost, {loop.name}{fork}"
            report.ratio("1", name, figures, name, ["memcpy", "xxh3"], _LOST)
        report.seconds(figures, f"lost to a bare direct write, {loop.name}")
    report.ratio("2", "durable, hashed and committed", figures, "durable", ["direct write"], _DURABLE)
    report.ratio("3", "restore, verified, warm", figures, "warm restore", ["warm read"], _WARM)
    report.ratio("3", "restore, verified, cold", figures, "cold restore", ["cold read"], _COLD)
    for peer in measurement.peers:
        report.title(f"{peer.name}: durable when done: {peer.synced}; {measurement.verdict(peer)}")
        report.ratio("10", "stall", figures, f"{peer.name} stall", ["memcpy"])
        for loop in measurement.loops:
            name = f"lost, {loop.name}"
            report.ratio("10", name, figures, f"{peer.name} {name}", ["memcpy", "xxh3"])
        report.ratio("10", "done", figures, f"{peer.name} done", ["direct write"])
        report.ratio("10", "load, warm", figures, f"{peer.name} load", ["warm read"])
    report.title(machine(setting.folder))
    report.say(table(figures, measurement.loops[0].name, measurement.peers))


class _Speed:
    """The state, all that saves it, and what each has its turn with."""

    def __init__(self, setting: Setting) -> None:
        self._setting = setting
        self.state = State.like_gpt(setting.nbytes)
        self.state.flood()
        self._kept = self.state.twin()
        self._limits = Limits(self.state, self._kept, setting.folder)
        self.loops = [compute_bound(self.state), memory_bound(self.state)]
        say = setting.report.say
        self.peers = available(self.state, setting.folder, say) if setting.peers else []
        self._false: dict[str, FalseFigureError] = {}
        self._runs = 0

    def close(self) -> None:
        for peer in self.peers:
            peer.close()

    def verdict(self, peer: Peer) -> str:
        """Whether what it saved came back."""
        false = self._false.get(peer.name)
        return "comes back bit by bit" if false is None else f"FALSE: {false}"

    def measure(self) -> Figures:
        """All rounds."""
        figures = Figures()
        limits = self._limits
        with Supervised(self.state, self._setting.folder / "run") as run:
            self._turn(lambda: self._save(run, Figures()))
            subjects: dict[str, Callable[[], None]] = {
                "memcpy": lambda: figures.add("memcpy", limits.memcpy()),
                "xxh3": lambda: figures.add("xxh3", limits.xxh3()),
                "direct write": lambda: figures.add("direct write", limits.write()),
                "warm read": lambda: figures.add("warm read", limits.read_warm()),
                "cold read": lambda: figures.add("cold read", limits.read_cold()),
                "save": lambda: self._save(run, figures),
                "warm restore": lambda: figures.add("warm restore", run.restore_warm(self._kept)),
                "cold restore": lambda: figures.add("cold restore", run.restore_cold(self._kept)),
                "first": lambda: self._first_save(figures),
            }
            for loop in self.loops:
                subjects[f"{loop.name}, bare write"] = partial(self._write_beside, loop, figures)
                for fork in (False, True):
                    subjects[f"{loop.name} {fork}"] = partial(self._train, run, loop, fork, figures)
            for peer in self.peers:
                subjects[peer.name] = partial(self._save_by, peer, figures)
                for loop in self.loops:
                    subjects[f"{peer.name} {loop.name}"] = partial(self._train_by, peer, loop, figures)
            in_random_order(
                {name: partial(self._turn, subject) for name, subject in subjects.items()}, self._setting.rounds
            )
        shutil.rmtree(self._setting.folder / "run")
        return figures

    def _turn(self, subject: Callable[[], None]) -> None:
        """The state is another one each time, and nothing is left to be written of what was before."""
        self.state.flood()
        gc.collect()
        os.sync()
        subject()

    # ---- ours

    def _save(self, run: Supervised, figures: Figures) -> None:
        saved = run.save()
        run.settle()
        run.check(self._kept)
        figures.add("stall", saved.stall)
        figures.add("durable", saved.durable)

    def _train(self, run: Supervised, loop: Loop, fork: bool, figures: Figures) -> None:
        lost = time_lost(loop, run.begin, run.is_done, run.sv.should_stop, fork)
        run.settle()
        run.check(self._kept)
        figures.add(f"lost, {loop.name}{', forks' if fork else ''}", lost)

    def _write_beside(self, loop: Loop, figures: Figures) -> None:
        """What of a save no tool can keep from the loop, where the disk takes from the memory that the loop needs."""
        thread = threading.Thread(target=self._limits.write)
        lost = time_lost(loop, thread.start, lambda: not thread.is_alive(), lambda: None)
        thread.join()
        figures.add(f"lost to a bare direct write, {loop.name}", lost)

    def _first_save(self, figures: Figures) -> None:
        """All that a new loop waits for, from its first step through its first save, half a second later."""
        self._runs += 1
        folder = self._setting.folder / f"first-{self._runs}"
        fresh = State.like_gpt(self._setting.nbytes)
        with Supervised(fresh, folder) as run:
            fresh.flood()
            waited = 0.0
            for _ in range(_STEPS_BEFORE_FIRST):
                waited += seconds(run.sv.should_stop)
                time.sleep(0.02)
                fresh.touch()
            waited += seconds(run.begin)
            while not run.is_done():
                time.sleep(0.001)
            run.settle()
            run.check(self._kept)
        shutil.rmtree(folder)
        figures.add("first stall", waited)

    # ---- others

    def _save_by(self, peer: Peer, figures: Figures) -> None:
        peer.prepare()
        step = peer.step
        began = time.perf_counter()
        peer.begin()
        figures.add(f"{peer.name} stall", time.perf_counter() - began)
        peer.finish()
        figures.add(f"{peer.name} done", time.perf_counter() - began)
        began = time.perf_counter()
        loaded = peer.load()
        figures.add(f"{peer.name} load", time.perf_counter() - began)
        self._judge(peer, loaded, step)

    def _train_by(self, peer: Peer, loop: Loop, figures: Figures) -> None:
        peer.prepare()
        step = 0

        def begin() -> None:
            nonlocal step
            step = peer.step
            peer.begin()

        lost = time_lost(loop, begin, peer.is_done, peer.each_step)
        peer.finish()
        figures.add(f"{peer.name} lost, {loop.name}", lost)
        self._judge(peer, peer.load(), step)

    def _judge(self, peer: Peer, loaded: Mapping[str, Any], step: int) -> None:
        try:
            self.state.check(loaded, step)
        except FalseFigureError as error:
            self._false[peer.name] = error
        del loaded
        peer.clear()
