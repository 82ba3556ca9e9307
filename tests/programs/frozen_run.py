"""A run that saves at each step, and stops itself, as SIGSTOP would, right before one of its commits.

Arguments: the log directory, and the step whose commit it is.
"""

from __future__ import annotations

import sys

import numpy as np
from chief import StoppingDisk

from supervise_core import DirectoryStore, EverySteps, KeepAll, Supervisor
from supervise_numpy import ArrayBackend


def main() -> None:
    logdir, step = sys.argv[1:]
    arrays = {"a": np.zeros(3)}
    store = DirectoryStore(logdir, disk=(disk := StoppingDisk(logdir)))
    disk.freeze = ("rename", f"model.ckpt-{step}")
    sv = Supervisor(ArrayBackend(arrays), logdir, store=store, save_every=EverySteps(1), keep=KeepAll())
    with sv.managed_session() as sess:
        while not sv.should_stop():
            sess.global_step += 1
            arrays["a"].fill(sess.global_step)


if __name__ == "__main__":
    main()
