"""A chief of no framework: it does what it is told, a line of JSON each, and says by another line what came of it.

It can stop itself, as SIGSTOP from outside would, right before a chosen call to its disk, which a test outside it could
only hit by luck. Arguments: none. Commands::

    {"do": "open", "logdir": …}                 forget the last directory, and have a store of this one
    {"do": "acquire", "at": …}                  become the writer, at that moment of the system's monotonic clock
    {"do": "commit" or "again" or "link", "step": …}   "again": in place of that step; "link": with a file of "base"
    {"do": "remove" or "set_aside" or "retire", "step": …}
    {"do": "retire_damaged" or "beat" or "check_lease" or "release"}
    {"do": "half", "step": …}                   begin a draft, and leave it
    {"do": "keep_beating", "every": …}          beat in a thread from now on, until the lease is lost

Each may say ``"freeze": [method, pattern of the path below the log directory]``.
"""

from __future__ import annotations

import fnmatch
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

from supervise_core.checkpoint_format import CheckpointId, Link
from supervise_core.directory_store import DirectoryStore
from supervise_core.hashing import hash_of
from supervise_core.manifest import FileRecord, Manifest
from supervise_core.testing.disks import WatchedDisk

FILE = "model.safetensors"


class StoppingDisk(WatchedDisk):
    """Stops its own process, with SIGSTOP, right before a call that it is told of; the lease was held until then."""

    def __init__(self, root: str) -> None:
        super().__init__()
        self.root = Path(root)
        self.freeze: tuple[str, str] | None = None

    def about_to(self, method: str, path: Path) -> None:
        if self.freeze is None or method != self.freeze[0] or not path.is_relative_to(self.root):
            return
        if fnmatch.fnmatch(str(path.relative_to(self.root)), self.freeze[1]):
            self.freeze = None
            say(frozen=method, held=any((self.root / ".work").glob("lease-*")))
            # to this very thread: of a signal to the process, another thread may be the first to hear
            signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)


def say(**facts: Any) -> None:
    print(json.dumps(facts), flush=True)


def manifest_of(step: int, content: bytes) -> Manifest:
    return Manifest(step, "none", 1.7e9 + step, ("model",), {FILE: FileRecord(len(content), hash_of([content]))})


class Chief:
    """What the commands are done to."""

    def __init__(self, logdir: str) -> None:
        self.disk = StoppingDisk(logdir)
        self.store = DirectoryStore(logdir, disk=self.disk)

    def acquire(self, at: float = 0.0, **_: Any) -> None:
        time.sleep(max(0.0, at - time.monotonic() - 0.002))
        while time.monotonic() < at:
            pass
        self.store.acquire()

    def commit(self, step: int) -> None:
        draft = self.store.begin(CheckpointId(step))
        draft.write(FILE, [b"content"])
        draft.commit(manifest_of(step, b"content"))

    def again(self, step: int) -> None:
        draft = self.store.begin(CheckpointId(step, 1))
        draft.write(FILE, [b"again"])
        draft.commit(manifest_of(step, b"again"), CheckpointId(step))

    def link(self, step: int, base: int) -> None:
        draft = self.store.begin(CheckpointId(step))
        assert draft.link(CheckpointId(base), [Link(FILE, FILE, len(b"content"))])
        draft.commit(manifest_of(step, b"content"))

    def half(self, step: int) -> None:
        self.store.begin(CheckpointId(step)).write(FILE, [b"half"])

    def remove(self, step: int) -> None:
        self.store.remove(CheckpointId(step))

    def set_aside(self, step: int) -> None:
        self.store.set_aside(CheckpointId(step), "a reason")

    def retire(self, step: int) -> None:
        self.store.retire(CheckpointId(step))

    def retire_damaged(self) -> None:
        self.store.retire_damaged()

    def beat(self) -> None:
        self.store.beat()

    def check_lease(self) -> None:
        self.store.check_lease()

    def release(self) -> None:
        self.store.release()

    def keep_beating(self, every: float) -> None:
        def beat() -> None:
            while True:
                try:
                    self.store.beat()
                except Exception as error:
                    say(beat=type(error).__name__, message=str(error))
                    return
                time.sleep(every)

        threading.Thread(target=beat, daemon=True).start()


def main() -> None:
    chief: Chief | None = None
    say(begin=os.getpid())
    for line in sys.stdin:
        command = json.loads(line)
        what, freeze = command.pop("do"), command.pop("freeze", None)
        began = time.monotonic()
        try:
            if what == "open":
                chief = Chief(command["logdir"])
            else:
                assert chief is not None
                chief.disk.freeze = freeze
                getattr(chief, what)(**command)
        except Exception as error:
            say(did=what, error=type(error).__name__, message=str(error), began=began, ended=time.monotonic())
        else:
            say(did=what, error=None, began=began, ended=time.monotonic())


if __name__ == "__main__":
    main()
