"""One writer for a log directory, fenced by a rename.

A lease is a directory ``.work/lease-<token>`` that holds a record of its owner. It appears, record and all, by one
rename; it is taken away from a dead owner by one rename; and every change that a writer makes to the log directory is
a rename into or out of its own lease directory. So the change of a writer that was frozen, replaced, and woke up again
fails: the directory that it names is not there. Tokens are random and never used twice.

Two that come at the same moment both appear and then look around; each sees the other, unless one looked before the
other appeared. Whoever sees another withdraws, except the one with the smallest token, who waits for them to do so.

What is left of earlier writers is swept by the next one, which first moves it into its own directory. Where it was,
others may still reach it: one that withdraws empties its directory itself, one that comes fills a draft, and a writer
that was replaced in the middle of its sweep would go on with it. Whoever finds its draft swept looks around anew.

Whether an owner lives is known at once on its own machine (boot, process namespace, pid, start time of the process).
From another machine it is known by its beat: the owner writes a counter every few seconds, and it counts as dead when
the counter stood still for ``patience`` seconds of the *watcher's* own monotonic clock. No two clocks are compared.
"""

from __future__ import annotations

import datetime
import errno
import json
import logging
import secrets
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from supervise_core.clock import Clock
from supervise_core.disk import Disk
from supervise_core.durable_files import ensure_directory, write_file
from supervise_core.errors import LeaseHeldError, LeaseLostError
from supervise_core.host import Host, Identity

_log = logging.getLogger(__name__)

_LEASE: Final = "lease-"
_FENCED: Final = "fenced-"
_DRAFT: Final = "new-"
_OWNER: Final = "owner.json"
_BEAT: Final = "beat-"
_ATTEMPTS: Final = 10
_WITHDRAWAL: Final = 2.0  # seconds; one that sees another withdraws at once
BEAT_EVERY: Final = 5.0
"""Seconds between two beats."""


class Lease:
    """The right of one writer to change one log directory."""

    def __init__(self, logdir: Path, disk: Disk, clock: Clock, host: Host, patience: float = 4 * BEAT_EVERY) -> None:
        self._work = logdir / ".work"
        self._logdir = logdir
        self._disk = disk
        self._clock = clock
        self._host = host
        self._patience = patience
        self._held: Path | None = None
        self._beats = 0

    @property
    def directory(self) -> Path:
        """Where this writer's drafts and trash live.

        :raises LeaseLostError: if the lease is not held.
        """
        if self._held is None:
            raise LeaseLostError(f"the lease of {self._logdir} is not held; acquire the store before writing to it")
        return self._held

    @property
    def held(self) -> bool:
        return self._held is not None

    def acquire(self) -> None:
        """Become the writer.

        :raises LeaseHeldError: if another one lives; says who and since when.
        :raises LeaseLostError: if this one was taken for dead meanwhile, and replaced.
        """
        if self._held is not None:
            raise LeaseHeldError(f"{self._logdir} is already being written by this very store")
        mine = self._publish_if_free()
        try:
            self._await_sole(mine)
        except BaseException:
            self._withdraw(mine)
            raise
        self._held = self._work / mine

    def release(self) -> None:
        """Stop being the writer; safe to call twice and after the lease was lost."""
        held, self._held = self._held, None
        if held is not None:
            self._withdraw(held.name)

    def check(self) -> None:
        """:raises LeaseLostError: if another writer has taken over."""
        if not self._disk.is_directory(self.directory):
            raise self.lost()

    def make_findable(self) -> None:
        """Have the lease directory and the names in it survive a power cut, before anything dear is moved into it.

        :raises LeaseLostError: if another writer has taken over.
        """
        try:
            self._disk.sync_directory(self.directory)
        except FileNotFoundError:
            raise self.lost() from None
        self._disk.sync_directory(self._work)

    def lost(self) -> LeaseLostError:
        """The error of a writer that finds itself replaced."""
        return LeaseLostError(
            f"another process took over {self._logdir} while this one did not answer; this one writes nothing more. "
            "Its own last checkpoint is the newest one in the listing that the new writer began from."
        )

    def beat(self) -> None:
        """Show watchers on other machines that this writer lives.

        :raises LeaseLostError: if another writer has taken over.
        """
        previous, self._beats = self._beats, self._beats + 1
        following = self.directory / f"{_BEAT}{self._beats}"
        try:
            try:
                self._disk.rename(self.directory / f"{_BEAT}{previous}", following)
            except FileNotFoundError:  # there is none after a beat that failed half way
                write_file(self._disk, following, [])
        except FileNotFoundError:
            raise self.lost() from None

    def leftovers(self) -> list[Path]:
        """Directories of writers that are no more, now inside this one's own directory, to be swept.

        :raises LeaseLostError: if another writer has taken over.
        """
        if found := self._abandoned(self._work):
            self.make_findable()
        for leftover in found:
            self._gather(leftover)
        return self._abandoned(self.directory)

    def _abandoned(self, place: Path) -> list[Path]:
        return [place / name for name in self._disk.names(place) if name.startswith((_FENCED, _DRAFT))]

    def _gather(self, leftover: Path) -> None:
        """Move it to where only this writer reaches it, and what its owner had gathered itself up beside it."""
        gathered = self.directory / leftover.name
        try:
            self._disk.rename(leftover, gathered)
        except FileNotFoundError:
            self.check()
            return  # its owner withdrew, or made a lease of its draft
        for inner in self._abandoned(gathered):
            self._gather(inner)

    def _leases(self) -> list[str]:
        return [name for name in self._disk.names(self._work) if name.startswith(_LEASE)]

    def _publish_if_free(self) -> str:
        for _ in range(_ATTEMPTS):
            ensure_directory(self._disk, self._work)
            for name in self._leases():
                self._take_away_if_dead(name)
            try:
                return self._publish()
            except FileNotFoundError:
                pass  # a writer that came first has swept the draft; its lease is there, unless it has gone already
        raise LeaseHeldError(f"{self._logdir} is written by others that come and go, or its '.work' is being removed")

    def _publish(self) -> str:
        token = secrets.token_hex(8)
        draft, name = self._work / f"{_DRAFT}{token}", f"{_LEASE}{token}"
        record = {"owner": self._host.identity().to_json(), "since": self._clock.time()}
        self._beats = 0
        self._disk.make_directory(draft)
        write_file(self._disk, draft / _OWNER, [json.dumps(record).encode()])
        write_file(self._disk, draft / f"{_BEAT}0", [])
        self._disk.rename(draft, self._work / name)
        return name

    def _await_sole(self, mine: str) -> None:
        deadline = self._clock.monotonic() + _WITHDRAWAL
        never = threading.Event()
        while others := [name for name in self._leases() if name != mine]:
            if mine > min(others) or self._clock.monotonic() > deadline:
                record = self._record(min(others))
                if record is not None:  # otherwise that one has gone meanwhile
                    raise LeaseHeldError(self._held_by(record))
            self._clock.wait(never, 0.01)
        if mine not in self._leases():
            raise self.lost()

    def _withdraw(self, name: str) -> None:
        gone = self._work / f"{_FENCED}{name.removeprefix(_LEASE)}"
        with suppress(FileNotFoundError):  # taken away, or a new writer is sweeping it
            self._disk.rename(self._work / name, gone)
            for entry in self._disk.names(gone):
                if entry.startswith((_OWNER, _BEAT)):
                    self._disk.remove_file(gone / entry)
            try:
                self._disk.remove_directory(gone)
            except OSError as error:  # what a failing disk left half done in it, may be evidence; the next start knows
                if error.errno != errno.ENOTEMPTY:
                    raise

    def _take_away_if_dead(self, name: str) -> None:
        record = self._record(name)
        if record is None:
            return
        try:
            owner = Identity.from_json(record["owner"])
            alive = self._host.is_alive(owner)
        except (KeyError, TypeError, ValueError):  # unreadable: only its beat can tell
            alive = None
        if alive is None:
            alive = self._beats_on(name, record)
        if alive:
            raise LeaseHeldError(self._held_by(record))
        try:
            self._disk.rename(self._work / name, self._work / f"{_FENCED}{name.removeprefix(_LEASE)}")
        except FileNotFoundError:
            return  # another one took it away
        _log.info("took %s over from a writer that is no more (%s)", self._logdir, _describe(record))

    def _beats_on(self, name: str, record: dict[str, Any]) -> bool:
        _log.warning(
            "%s; cannot see from here whether it lives, so watching its beat for %g s",
            self._held_by(record),
            self._patience,
        )
        first = self._beat_of(name)
        deadline = self._clock.monotonic() + self._patience
        never = threading.Event()
        while (left := deadline - self._clock.monotonic()) > 0:
            self._clock.wait(never, min(left, 0.5))
            if self._beat_of(name) != first:
                return self._disk.is_directory(self._work / name)
        return False

    def _beat_of(self, name: str) -> list[str]:
        return [entry for entry in self._disk.names(self._work / name) if entry.startswith(_BEAT)]

    def _record(self, name: str) -> dict[str, Any] | None:
        """The owner's record; an empty one if it cannot be understood; None if the lease is gone."""
        try:
            directory = self._disk.open_directory(self._work / name, lambda file: file == _OWNER)  # beats come and go
        except FileNotFoundError:
            return None
        try:
            record = json.loads(self._disk.read(directory, _OWNER)) if _OWNER in directory.files else {}
        except (ValueError, RecursionError):
            return {}
        finally:
            directory.close()
        return record if isinstance(record, dict) else {}

    def _held_by(self, record: dict[str, Any]) -> str:
        return (
            f"{self._logdir} is already being written by {_describe(record)}. "
            "Stop that one first, or use another logdir."
        )


def is_lost(error: OSError) -> bool:
    """Whether a call in, into or out of the lease directory may have failed because that directory is not there.

    ESTALE is what a network file system says whose client had it open.
    """
    return error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ESTALE)


def _describe(record: dict[str, Any]) -> str:
    try:
        owner = Identity.from_json(record["owner"])
        since = datetime.datetime.fromtimestamp(record["since"]).astimezone().isoformat(" ", "seconds")
    except (KeyError, TypeError, ValueError, OverflowError):
        return "an unknown process"
    return f"process {owner.pid} on {owner.host} since {since}"
