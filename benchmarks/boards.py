"""How soon a waiting worker goes on, and what the chief pays for many who wait.

``python -m benchmarks.boards`` has 64 and then 1,000 clients wait for a page, in four processes, each client with its
own thread and connections, and puts the page up again and again. It prints the time from each put to each wake-up, and
what the put took, for boards on PyTorch's store and in files, beside how often TensorFlow's own workers look. It ends
with exit status 1 if a median is over its limit.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import inspect
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.timing import show
from supervise_core.board import Board
from supervise_core.file_board import FileBoard

LIMITS = {"store": 0.020, "files": 0.150}
_PROCESSES = 4
_PAGE = "ready"
_TOO_LONG = 120.0


@dataclass
class Figures:
    """Seconds: of each put, of the processor for it, and from each put to each wake-up."""

    puts: list[float]
    processor: list[float]
    wakes: list[float]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; 0 if the medians are within their limits."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=LIMITS, help="one kind of board")
    parser.add_argument("--waiting", type=int, default=64, help="clients for which the limits hold")
    parser.add_argument("--crowd", type=int, default=1000, help="clients of the second measurement; 0: none")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--wait", nargs=2, metavar=("KIND", "PLACE"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.wait:
        kind, place = options.wait
        return wait(kind, place, options.waiting, options.rounds)
    fine = [
        measured(kind, options.waiting, options.crowd, options.rounds)
        for kind in LIMITS
        if options.only in (None, kind)
    ]
    if (seconds := tensorflow_looks_every()) is not None:
        show("TensorFlow's workers look every", seconds, f"so a worker goes on after {seconds / 2:g} s on average")
    return 0 if all(fine) else 1


def measured(kind: str, waiting: int, crowd: int, rounds: int) -> bool:
    """Print the figures of one kind of board; whether they are within their limits."""
    if kind == "store" and importlib.util.find_spec("torch") is None:
        print("PyTorch is not installed, so there is no store")
        return True
    print(f"a board {'on a TCPStore' if kind == 'store' else 'in files'}")
    with place_of(kind) as place:
        board = open_board(kind, place)
        alone = put_often(board, rounds)
        show("a put, nobody waits", statistics.median(alone.puts))
        few = with_waiting(kind, place, board, waiting, rounds)
        fine = report(few, waiting, LIMITS[kind])
        if crowd:
            many = with_waiting(kind, place, board, crowd, max(3, rounds // 3))
            report(many, crowd, None)
            each, of_more = _per_client(few, alone, waiting), _per_client(many, few, crowd - waiting)
            show(f"    the chief's processor, for each of {waiting}", each)
            show(f"    for each further one up to {crowd}", of_more)
        board.close()
    return fine


def _per_client(figures: Figures, base: Figures, clients: int) -> float:
    return max(0.0, statistics.median(figures.processor) - statistics.median(base.processor)) / clients


def report(figures: Figures, waiting: int, limit: float | None) -> bool:
    """Print what was found with so many who wait."""
    median, wakes = statistics.median(figures.wakes), sorted(figures.wakes)
    beside = f"worst tenth {wakes[len(wakes) * 9 // 10] * 1e3:.1f} ms, worst {wakes[-1] * 1e3:.0f} ms"
    if limit is not None:
        beside += f", limit {limit * 1e3:g} ms"
    fine = show(f"from put to wake-up, {waiting} wait", median, beside, None if limit is None else median <= limit)
    show("    the put itself", statistics.median(figures.puts), f"worst {max(figures.puts) * 1e3:.1f} ms")
    return fine


def put_often(board: Board, rounds: int) -> Figures:
    """Puts that nobody waits for."""
    figures = Figures([], [], [])
    for number in range(rounds):
        put(board, b"alone %d" % number, figures)
    return figures


def put(board: Board, content: bytes, figures: Figures) -> float:
    """Put the page up; when it was begun."""
    began, processor = time.monotonic(), time.process_time()
    board.put(_PAGE, content)
    figures.puts.append(time.monotonic() - began)
    time.sleep(0.2)  # the server, if it is in this process, has woken everybody by then
    figures.processor.append(time.process_time() - processor)
    return began


def with_waiting(kind: str, place: str, board: Board, clients: int, rounds: int) -> Figures:
    """Puts that so many clients wait for."""
    board.put(_PAGE, b"begin")
    figures = Figures([], [], [])
    shares = [clients // _PROCESSES + (number < clients % _PROCESSES) for number in range(_PROCESSES)]
    with ExitStack() as stack:
        processes = [stack.enter_context(waiters(kind, place, share, rounds)) for share in shares if share]
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        began = []
        for number in range(rounds):
            time.sleep(random.uniform(0.6, 0.9))  # by then all look as seldom as they ever do
            began.append(put(board, b"%d" % number, figures))
        for process in processes:
            assert process.stdout is not None
            for seen in json.loads(process.stdout.readline()):
                figures.wakes += [at - since for at, since in zip(_first_seen(seen, rounds), began, strict=True)]
    return figures


def _first_seen(seen: list[tuple[int, float]], rounds: int) -> list[float]:
    """When one client first saw the content of each put, or of a later one, for a slow client misses some."""
    return [next(at for number, at in seen if number >= wanted) for wanted in range(rounds)]


@contextmanager
def waiters(kind: str, place: str, clients: int, rounds: int) -> Iterator[subprocess.Popen[str]]:
    """A process in which so many clients wait."""
    command = [sys.executable, "-m", "benchmarks.boards", "--wait", kind, place]
    command += ["--waiting", str(clients), "--rounds", str(rounds)]
    # the store looks up the name of each peer, and waits for that where there is nobody to answer
    environment = os.environ | {"RES_OPTIONS": "timeout:1 attempts:1", "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            yield process
        finally:
            process.kill()


def wait(kind: str, place: str, clients: int, rounds: int) -> int:
    """Wait for the page with so many clients, and print when each of them was woken by each put."""
    boards = [open_board(kind, place) for _ in range(clients)]
    seen: list[list[tuple[int, float]]] = [[] for _ in boards]

    def follow(board: Board, moments: list[tuple[int, float]]) -> None:
        known: bytes | None = b"begin"
        while known != b"%d" % (rounds - 1):
            content = board.await_change(_PAGE, known, _TOO_LONG)
            if content is None or content == known:
                raise AssertionError("no put was seen for too long")
            moments.append((int(content), time.monotonic()))
            known = content

    threads = [threading.Thread(target=follow, args=each) for each in zip(boards, seen, strict=True)]
    for board, thread in zip(boards, threads, strict=True):
        board.await_change(_PAGE, b"begin", 0.001)  # connected
        thread.start()
    print("ready", flush=True)
    for thread in threads:
        thread.join()
    print(json.dumps(seen), flush=True)
    os._exit(0)  # a thousand goodbyes would take their time


@contextmanager
def place_of(kind: str) -> Iterator[str]:
    """Where the boards meet: a directory, or the port of a server in this process."""
    if kind == "files":
        with tempfile.TemporaryDirectory(prefix="benchmark-", dir=Path.cwd()) as folder:
            yield folder
    else:
        store = _store(0, is_master=True)
        yield str(store.port)


def open_board(kind: str, place: str) -> Board:
    """A client of its own."""
    if kind == "files":
        return FileBoard(place)
    from supervise_torch.store_board import StoreBoard

    return StoreBoard(_store(int(place)), patience=60.0)


@functools.cache
def _store(port: int, *, is_master: bool = False) -> Any:
    import torch.distributed

    distributed: Any = torch.distributed
    return distributed.TCPStore("127.0.0.1", port, is_master=is_master, wait_for_workers=False)


def tensorflow_looks_every() -> float | None:
    """Seconds between two looks of a worker of TensorFlow's; None if it is not installed."""
    if importlib.util.find_spec("tensorflow") is None:
        return None
    os.environ |= {"TF_CPP_MIN_LOG_LEVEL": "3", "TF_ENABLE_ONEDNN_OPTS": "0"}
    import tensorflow as tf

    parameters = inspect.signature(tf.compat.v1.train.SessionManager.__init__).parameters
    return float(parameters["recovery_wait_secs"].default)


if __name__ == "__main__":
    sys.exit(main())
