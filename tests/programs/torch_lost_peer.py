"""Two ranks over gloo, forked from one process, of which one fails the other in one way after another.

The other is in a collective then. It says what came out of that and when, and whether what else is connected still is.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Final

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from supervise_torch import abort_process_groups

RANKS: Final = 2
A_MOMENT: Final = 1.0
PATIENCE: Final = 20.0


def stand_still() -> None:
    """It goes on living, and does nothing."""
    time.sleep(600)


def freeze() -> None:
    """The kernel holds it."""
    os.kill(os.getpid(), signal.SIGSTOP)


def leave() -> None:
    """It ends without a word to the other."""
    os._exit(0)


WAYS: Final[dict[str, Callable[[], object]]] = {
    "killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "left": leave,
    "frozen": freeze,
    "standing still": stand_still,
    "standing still, in a second group": stand_still,
    "standing still, in a backward pass": stand_still,
}


def collective(way: str) -> Callable[[], object]:
    """What the other rank is caught in; it works once."""
    if "backward" in way:
        model = DistributedDataParallel(torch.nn.Linear(8, 1))

        def step() -> None:
            model(torch.ones(2, 8)).sum().backward()

        step()
        return step
    group = dist.new_group(list(range(RANKS))) if "second" in way else None
    dist.all_reduce(torch.ones(8), group=group)
    return lambda: dist.all_reduce(torch.ones(1000), group=group)


def error_of(call: Callable[[], object]) -> str:
    try:
        call()
    except RuntimeError as error:
        return str(error).partition("\n")[0]
    return ""


def survive(way: str, call: Callable[[], object], store: dist.TCPStore) -> None:
    errors: list[str] = []
    thread = threading.Thread(target=lambda: errors.append(error_of(call)), daemon=True)
    begun = time.monotonic()
    thread.start()
    thread.join(A_MOMENT if WAYS[way] in (freeze, stand_still) else PATIENCE)
    by_itself = not thread.is_alive()
    if not by_itself:
        begun = time.monotonic()
        abort_process_groups()
        thread.join(10)
    seconds = time.monotonic() - begun
    store.set("still", "here")
    facts = {
        "way": way,
        "by_itself": by_itself,
        "error": errors[0] if errors else None,
        "seconds": seconds,
        "again": error_of(lambda: dist.all_reduce(torch.ones(8))),
        "store": store.get("still").decode(),
    }
    abort_process_groups()
    dist.destroy_process_group()
    abort_process_groups()
    print(json.dumps(facts), flush=True)


def main(rank: int, way: str, port: int) -> None:
    logging.disable()
    store = dist.TCPStore("127.0.0.1", port, RANKS, is_master=rank == 0, timeout=timedelta(seconds=20))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS)
    call = collective(way)
    if rank > 0:
        WAYS[way]()
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_connection(listener.getsockname()) as own:
        other, _ = listener.accept()
        with other:
            survive(way, call, store)
            own.sendall(b"as before")
            assert other.recv(9) == b"as before"


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


if __name__ == "__main__":
    torch.set_num_threads(1)
    fork = multiprocessing.get_context("fork")
    for way in WAYS:
        port = free_port()
        survivor, lost = (fork.Process(target=main, args=(rank, way, port)) for rank in range(RANKS))
        survivor.start()
        lost.start()
        survivor.join(60)
        for process in (survivor, lost):
            process.kill()
            process.join()
        print(json.dumps({"ended": way, "status": survivor.exitcode}), flush=True)
