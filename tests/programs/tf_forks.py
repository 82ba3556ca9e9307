"""Imports TensorFlow once, and forks a process for each program that it is told to run.

Importing TensorFlow takes seconds, and a campaign starts hundreds of processes. What is forked has TensorFlow imported
and nothing else done with it: no mode chosen, no graph, no session. It has its own session of processes, output and
random state, and ends as a Python process does.

Told over a socket: ``{"argv": [program, ...]}`` with two descriptors, for stdout and stderr. Says ``{"pid": ...}``, and
``{"ended": pid, "status": ...}`` when that one has ended. Ends when the socket is closed at the other side.
"""

from __future__ import annotations

import json
import os
import random
import runpy
import selectors
import socket
import sys
import warnings

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"

import numpy as np
import tensorflow  # noqa: F401

import supervise_tf

_LONGEST = 1 << 16


def serve(line: socket.socket) -> list[str] | None:
    """Fork as told. In each child, the arguments of its program; in the parent None, at the end."""
    with selectors.DefaultSelector() as selector:
        selector.register(line, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                if key.fileobj is line:
                    content, outputs, _, _ = socket.recv_fds(line, _LONGEST, 2)
                    if not content:
                        return None
                    pid = fork()
                    if pid == 0:
                        become(line, outputs)
                        return list(json.loads(content)["argv"])
                    selector.register(os.pidfd_open(pid), selectors.EVENT_READ, pid)
                    answer = {"pid": pid}
                    for descriptor in outputs:
                        os.close(descriptor)
                else:
                    selector.unregister(key.fileobj)
                    assert isinstance(key.fileobj, int)
                    os.close(key.fileobj)
                    _, status = os.waitpid(key.data, 0)
                    answer = {"ended": key.data, "status": os.waitstatus_to_exitcode(status)}
                line.send(json.dumps(answer).encode())


def fork() -> int:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12: there are threads, of libraries, all asleep
        return os.fork()


def become(line: socket.socket, outputs: list[int]) -> None:
    """Make the child a process of its own."""
    line.close()
    os.setsid()
    for target, descriptor in enumerate(outputs, start=1):
        os.dup2(descriptor, target)
        os.close(descriptor)
    random.seed()
    np.random.seed()


if __name__ == "__main__":
    for name in supervise_tf.__all__:
        getattr(supervise_tf, name)
    arguments = serve(socket.socket(fileno=int(sys.argv[1])))
    if arguments is not None:
        sys.argv = arguments
        sys.path[0] = os.path.dirname(arguments[0])
        runpy.run_path(arguments[0], run_name="__main__")
