"""Line 6: what a save writes of a state of which nine tenths stay as they are."""

from __future__ import annotations

import os
import shutil

from benchmarks.figures import Figures, Setting, in_random_order, steadily
from benchmarks.saving_limits import Limits
from benchmarks.saving_ours import Supervised
from benchmarks.saving_state import State
from supervise_core import CheckpointDirectory

_TENSORS = 200
_TRAINED = 10
"""Every so-manieth tensor is trained, so that frozen and trained ones lie among each other, as in LoRA."""

_BYTES = 0.15
_TIME = 0.25


def frozen(setting: Setting) -> None:
    """Measure and print."""
    report = setting.report
    report.title(f"{setting.nbytes >> 20} MiB, of which 90 % are frozen between a first and a second save")
    figures = steadily(lambda: _measure(setting), report)
    report.seconds(figures, "direct write")
    report.seconds(figures, "all of it")
    report.ratio("6", "time of the second save", figures, "a tenth of it", ["all of it"], _TIME)
    written = figures.ratios("bytes of the second", "bytes of the first")
    report.number("6", "bytes that the second save writes", max(written), "× the first's", _BYTES)
    report.say("6  the second restores and verifies after the first is pruned: ok")


def _measure(setting: Setting) -> Figures:
    figures = Figures()
    state = State.of_tensors(_TENSORS, setting.nbytes)
    state.flood()
    kept = state.twin()
    limits = Limits(state, kept, setting.folder)
    folder = setting.folder / "frozen"
    untrained = frozenset(number for number in range(_TENSORS) if number % _TRAINED)
    with Supervised(state, folder) as run:

        def both() -> None:
            state.optimizer.freeze(frozenset())
            state.flood()
            os.sync()
            first = run.save()
            run.settle()
            before = _inodes(run)
            run.check(kept)
            state.optimizer.freeze(untrained)
            state.flood()
            os.sync()
            second = run.save()
            run.settle()  # the first is pruned: one is kept
            after = _inodes(run)
            run.check(kept)
            with CheckpointDirectory(folder).newest() as checkpoint:
                checkpoint.verify()
            figures.add("all of it", first.durable)
            figures.add("a tenth of it", second.durable)
            figures.add("bytes of the first", sum(before.values()))
            figures.add("bytes of the second", sum(size for inode, size in after.items() if inode not in before))

        in_random_order({"both": both, "write": lambda: figures.add("direct write", limits.write())}, setting.rounds)
    shutil.rmtree(folder)
    return figures


def _inodes(run: Supervised) -> dict[int, int]:
    """The sizes of the files of the newest checkpoint."""
    found = [path.stat() for path in run.path.iterdir()]
    return {status.st_ino: status.st_size for status in found}
