"""Independent searches in NumPy under one chief: processes that have no framework in common, only a directory.

Each worker draws settings for a small classifier, trains it, and leaves the result in the directory, trial after trial.
The chief reads the results, keeps the best model in its checkpoints, and ends when all trials were made, which ends the
workers, too. One command starts all of them on this machine. On several machines, start one process on each, with
``--rank`` (0 is the chief) and a directory that all of them see::

    pip install '.[examples]'
    python examples/12_searches.py --logdir runs/searches --workers 3 --trials 20

Kill any of them with ``kill -9``: the others go on, and it is started again. A worker begins with its first trial that
has no result, the chief with its newest checkpoint. Ctrl-C, or a SIGTERM to any of them, stops all. The next start goes
on with what there is, and finds the same best model as if nothing had happened.
"""

from __future__ import annotations

import argparse
import hashlib
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from sklearn.datasets import load_digits

from supervise_core import EverySeconds, FileMembership, KeepLatest, Supervisor
from supervise_numpy import ArrayBackend

Floats = NDArray[np.float64]

digits = load_digits()
mixed = np.random.default_rng(1).permutation(len(digits.target))  # the digits come ordered by who wrote them
labels: NDArray[np.intp] = digits.target[mixed]
images: Floats = digits.data[mixed] / 16
targets: Floats = np.eye(10)[labels]
train, test = slice(0, 1200), slice(1200, None)


def trial(rank: int, number: int) -> dict[str, Floats]:
    """Settings and weights by random numbers of this trial alone, a few passes of training, and a score."""
    rng = np.random.default_rng([rank, number])
    rate, batch, decay = 10 ** rng.uniform(-2, 0.5), int(rng.integers(8, 128)), 10 ** rng.uniform(-6, -2)
    weights, bias = rng.normal(0, 0.1, (64, 10)), np.zeros(10)
    for _ in range(5):
        order = rng.permutation(train.stop)
        for start in range(0, len(order), batch):
            rows = order[start : start + batch]
            scores = images[rows] @ weights + bias
            exponentials = np.exp(scores - scores.max(axis=1, keepdims=True))
            error = (exponentials / exponentials.sum(axis=1, keepdims=True) - targets[rows]) / len(rows)
            weights -= rate * (images[rows].T @ error + decay * weights)
            bias -= rate * error.sum(axis=0)
    right = (images[test] @ weights + bias).argmax(axis=1) == labels[test]
    settings = np.array([rate, batch, decay])
    return {"weights": weights, "bias": bias, "score": np.array(right.mean()), "settings": settings}


def result_path(logdir: str, rank: int, number: int) -> Path:
    """Where the result of a trial is; it appears whole, by a rename."""
    return Path(logdir, "results", f"{rank}-{number}.npz")


def new_results(logdir: str, seen: NDArray[np.int64]) -> Iterator[tuple[int, int, dict[str, Floats]]]:
    """Rank, number and result of each trial that was not seen yet."""
    for rank in range(1, len(seen)):
        while (path := result_path(logdir, rank, number := int(seen[rank]))).exists():
            with np.load(path) as file:
                yield rank, number, dict(file)


def make_state(workers: int) -> dict[str, NDArray[np.generic]]:
    """What the chief keeps: the best model, who found it, and how many trials of each rank were seen."""
    return {
        "weights": np.zeros((64, 10)), "bias": np.zeros(10), "score": np.array(-1.0), "settings": np.zeros(3),
        "found_by": np.zeros(2, np.int64), "seen": np.zeros(workers + 1, np.int64),
    }  # fmt: skip


def lead(logdir: str, workers: int, trials: int) -> None:
    """The chief: keep the best model until all trials were made."""
    state = make_state(workers)
    total = workers * trials
    sv = Supervisor(
        ArrayBackend(state),
        logdir,
        membership=FileMembership(logdir, 0),
        save_every=EverySeconds(2),
        keep=KeepLatest(2),
    )
    with sv.managed_session() as sess:
        print(f"step {sess.global_step}: {sv.report.restored or 'begun anew'}", flush=True)
        while not sv.should_stop() and sess.global_step < total:
            for rank, number, result in new_results(logdir, state["seen"]):
                score, best = float(result["score"]), float(state["score"])
                if score > best or (score == best and (rank, number) < tuple(state["found_by"])):  # in whatever order
                    state["found_by"][:] = rank, number
                    for name, array in result.items():
                        state[name][...] = array
                state["seen"][rank] += 1
                sess.global_step += 1
                sv.scalars(score=score, best=state["score"])
                print(f"trial {number} of rank {rank}: step {sess.global_step}, score {score:.3f}", flush=True)
            sv.wait_for_stop(0.05)
    digest = hashlib.sha256(state["weights"].tobytes() + state["bias"].tobytes()).hexdigest()
    rank, number = state["found_by"]
    best = float(state["score"])
    print(f"done: step {sess.global_step}, best {best:.3f} in trial {number} of rank {rank}, weights {digest}")


def search(logdir: str, workers: int, trials: int, rank: int) -> None:
    """A worker: one trial after the other until the chief says that it is enough."""
    state = make_state(workers)
    sv = Supervisor(ArrayBackend(state), logdir, membership=FileMembership(logdir, rank))
    with sv.managed_session():
        number = int(state["seen"][rank])  # it has begun with the state of the chief
        while not sv.should_stop():
            path = result_path(logdir, rank, number)
            if number == trials:
                sv.wait_for_stop(1)
            elif path.exists():
                number += 1
            else:
                result = trial(rank, number)
                path.parent.mkdir(exist_ok=True)
                draft = path.with_name(f"draft-{rank}.npz")
                np.savez(draft, **result)
                draft.replace(path)


def launch(logdir: str, workers: int, trials: int) -> int:
    """Start the chief and the workers; start again who was killed; hand on a request to stop."""

    def start(rank: int) -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, *sys.argv, "--rank", str(rank)])

    def is_needed(rank: int) -> bool:
        return rank == 0 or not result_path(logdir, rank, trials - 1).exists()

    asked: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: asked.append(number))
    programs = {rank: start(rank) for rank in range(workers + 1) if is_needed(rank)}
    try:
        while not asked and any(program.poll() is None for program in programs.values()):
            time.sleep(0.05)
            for rank, program in programs.items():
                if program.poll() == -signal.SIGKILL and is_needed(rank) and not asked:
                    print(f"rank {rank} was killed, and is started again", file=sys.stderr, flush=True)
                    programs[rank] = start(rank)
        if asked:
            programs[0].send_signal(asked[0])  # what stops the chief stops all
        statuses = [program.wait() for program in programs.values()]
        return next((abs(status) for status in statuses if status), 0)
    finally:
        for program in programs.values():
            program.kill()


def main() -> None:
    """Begin as the launcher, as the chief, or as a worker."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--logdir", default="runs/searches", help="a place that all processes see")
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--trials", type=int, default=20, help="of each worker")
    parser.add_argument("--rank", type=int, help="0: the chief; from 1 on: a worker; without: start all")
    options = parser.parse_args()
    if options.rank is None:
        sys.exit(launch(options.logdir, options.workers, options.trials))
    elif options.rank == 0:
        lead(options.logdir, options.workers, options.trials)
    else:
        search(options.logdir, options.workers, options.trials, options.rank)


if __name__ == "__main__":
    main()
