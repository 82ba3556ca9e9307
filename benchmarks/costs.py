"""What supervision costs a training loop in which nothing is due, and what starting costs.

``python -m benchmarks.costs`` prints each figure beside what it is held against in the same run, and ends with exit
status 1 if one is over its limit.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

from benchmarks.timing import fresh_process, interleaved, per_call, show
from supervise_core import EverySeconds, Supervisor

SHOULD_STOP_PER_IS_SET = 4.0
WITH_OTHERS_PER_ALONE = 2.0
SCALARS_SECONDS = 1e-6
IMPORT_SECONDS = 0.1
BACKENDS_SECONDS = 0.3

_NEVER = EverySeconds(86_400)


def main() -> int:
    """Measure everything; 0 if all is within its limits."""
    results = [loop_costs(), membership_costs(), starting_costs()]
    if importlib.util.find_spec("torch") is not None:
        results.append(loader_costs())
    return 0 if all(results) else 1


def loop_costs() -> bool:
    """Questions and items of a loop, with NumPy."""
    import numpy as np

    from supervise_numpy import ArrayBackend

    print("the training loop, while nothing is due")
    items = list(range(20_000))
    event = threading.Event()
    x = np.float64(0.5)
    with tempfile.TemporaryDirectory() as logdir:
        sv = Supervisor(
            ArrayBackend({"w": np.zeros(10)}), logdir, save_every=_NEVER, summarize_every=_NEVER, signals=False
        )
        with sv.managed_session() as sess:
            sess.global_step += 1
            sv.should_stop()
            time.sleep(0.2)

            def step() -> None:
                sess.global_step += 1

            subjects: dict[str, Callable[[], float]] = {
                "is_set": per_call(event.is_set),
                "should_stop": per_call(sv.should_stop),
                "scalars": per_call(lambda: sv.scalars(loss=x)),
                "nothing": per_call(lambda: None),
                "bare": lambda: _per_item(items, step, len(items)),
                "batches": lambda: _per_item(sv.batches(items, name=f"{time.perf_counter_ns()}"), step, len(items)),
            }
            if (peer := _tensorflow_should_stop()) is not None:
                subjects["tensorflow"] = per_call(peer)
            found = interleaved(subjects)
    ratio = found["should_stop"] / found["is_set"]
    fine = [
        show("threading.Event.is_set()", found["is_set"]),
        show(
            "sv.should_stop()",
            found["should_stop"],
            f"{ratio:.1f} × is_set, limit {SHOULD_STOP_PER_IS_SET:g} ×",
            ratio <= SHOULD_STOP_PER_IS_SET,
        ),
    ]
    if "tensorflow" in found:
        fine.append(
            show(
                "tf.compat.v1.train.Supervisor.should_stop()",
                found["tensorflow"],
                f"ours takes {found['should_stop'] / found['tensorflow']:.2f} of it, limit 1",
                found["should_stop"] <= found["tensorflow"],
            )
        )
    scalars = found["scalars"] - found["nothing"]
    fine.append(show("sv.scalars(loss=x)", scalars, "limit 1 µs", scalars < SCALARS_SECONDS))
    show("a bare loop over a list, per item and step", found["bare"])
    show("sv.batches over the same list, per item and step", found["batches"])
    added = found["batches"] - found["bare"]
    show("    so an item of sv.batches costs", added, f"{added / found['is_set']:.0f} × is_set")
    return all(fine)


def membership_costs() -> bool:
    """``should_stop`` of a rank that trains in step with another one, beside that of a process alone."""
    import numpy as np

    from supervise_core import FileMembership
    from supervise_numpy import ArrayBackend

    print("the training loop of one rank of two, while nothing is due")
    with tempfile.TemporaryDirectory() as shared, tempfile.TemporaryDirectory() as logdir:

        def supervisor(directory: str, rank: int | None = None) -> Supervisor[Any]:
            place = None if rank is None else FileMembership(shared, rank, 2, synchronous=True)
            return Supervisor(
                ArrayBackend({"w": np.zeros(10)}), directory,
                membership=place, saver=None, summarize_every=_NEVER, signals=False,
            )  # fmt: skip

        is_measured = threading.Event()

        def train_elsewhere() -> None:
            with supervisor(shared, 1).managed_session():
                is_measured.wait()

        other = threading.Thread(target=train_elsewhere)
        other.start()
        alone, chief = supervisor(logdir), supervisor(shared, 0)
        try:
            with alone.managed_session() as first, chief.managed_session() as second:
                for session, sv in ((first, alone), (second, chief)):
                    session.global_step += 1
                    sv.should_stop()
                time.sleep(0.2)
                found = interleaved({"alone": per_call(alone.should_stop), "two": per_call(chief.should_stop)})
                is_measured.set()
        finally:
            is_measured.set()
            other.join()
    ratio = found["two"] / found["alone"]
    show("sv.should_stop(), alone", found["alone"])
    text = f"{ratio:.2f} × alone, limit {WITH_OTHERS_PER_ALONE:g} ×"
    return show("sv.should_stop(), with another rank", found["two"], text, ratio <= WITH_OTHERS_PER_ALONE)


def loader_costs() -> bool:
    """Batches of a PyTorch DataLoader in this process."""
    import torch
    from torch.utils.data import DataLoader, TensorDataset

    from supervise_torch import TorchBackend

    print("a DataLoader with num_workers=0, batches of 32 rows of 64 numbers")
    torch.set_num_threads(1)
    loader = DataLoader(TensorDataset(torch.randn(32 * 200, 64)), batch_size=32, shuffle=True)
    weight = torch.nn.Parameter(torch.zeros(64))
    weight.grad = torch.zeros(64)
    optimizer = torch.optim.SGD([weight], lr=0.1)
    with tempfile.TemporaryDirectory() as logdir:
        sv = Supervisor(
            TorchBackend(optimizer=optimizer), logdir, save_every=_NEVER, summarize_every=_NEVER, signals=False
        )
        with sv.managed_session():
            found = interleaved(
                {
                    "bare": lambda: _per_item(loader, optimizer.step, len(loader)),
                    "batches": lambda: _per_item(
                        sv.batches(loader, name=f"{time.perf_counter_ns()}"), optimizer.step, len(loader)
                    ),
                }
            )
    show("the bare loader, per batch and optimizer step", found["bare"])
    show("sv.batches over it, per batch and optimizer step", found["batches"])
    show("    so a batch of sv.batches costs", found["batches"] - found["bare"])
    return True


def starting_costs() -> bool:
    """Imports and commands in fresh processes."""
    print("starting")
    bare = fresh_process("-c", "pass")
    imported = fresh_process("-c", "import supervise_core; supervise_core.Supervisor") - bare
    package = fresh_process("-c", "import supervise_core") - bare
    backends = fresh_process("-m", "supervise_core", "backends")
    left_out = ["numpy", "torch", "tensorflow"]
    code = f"import json, sys, supervise_core; print(json.dumps([m for m in {left_out} if m in sys.modules]))"
    dragged_in = json.loads(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True).stdout)
    fine = [
        show("import supervise_core, over a bare Python", package, "limit 100 ms", package < IMPORT_SECONDS),
        show("supervise-core backends, the whole process", backends, "limit 300 ms", backends < BACKENDS_SECONDS),
        not dragged_in,
    ]
    show("from supervise_core import Supervisor, over a bare Python", imported)
    print(f"    imported with supervise_core, of {', '.join(left_out)}: {', '.join(dragged_in) or 'none'}")
    return all(fine)


def _per_item(items: Iterable[object], step: Callable[[], object], count: int) -> float:
    began = time.perf_counter()
    for _ in items:
        step()
    return (time.perf_counter() - began) / count


def _tensorflow_should_stop() -> Callable[[], object] | None:
    if importlib.util.find_spec("tensorflow") is None:
        return None
    os.environ |= {"TF_CPP_MIN_LOG_LEVEL": "3", "TF_ENABLE_ONEDNN_OPTS": "0"}
    import tensorflow as tf

    logging.getLogger("tensorflow").setLevel(logging.ERROR)
    with tf.Graph().as_default():
        tf.compat.v1.train.get_or_create_global_step()
        supervisor = tf.compat.v1.train.Supervisor(logdir="", summary_op=None, saver=None)
    should_stop: Callable[[], object] = supervisor.should_stop
    return should_stop


if __name__ == "__main__":
    sys.exit(main())
