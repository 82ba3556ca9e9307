"""Saves arrays full of the step's number at each step, keeps the newest checkpoint alone, and goes on until stopped."""

from __future__ import annotations

import json
import sys

import numpy as np

from supervise_core import EverySteps, KeepLatest, Supervisor
from supervise_numpy import ArrayBackend


def main() -> None:
    arrays = {"a": np.zeros((200, 200)), "b": np.zeros(3)}
    backend = ArrayBackend(arrays)
    sv = Supervisor(backend, sys.argv[1], save_every=EverySteps(1), summarize_every=None, keep=KeepLatest(1))
    with sv.managed_session() as sess:
        while not sv.should_stop():
            sess.global_step += 1
            for array in arrays.values():
                array.fill(sess.global_step)
            if sess.global_step == 3:
                print(json.dumps({"begin": sess.global_step}), flush=True)


if __name__ == "__main__":
    main()
