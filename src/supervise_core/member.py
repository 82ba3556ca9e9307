"""One process's part in a run of several: what it says, what it hears, and how long it waits for whom.

Two threads serve a member. One listens: it is where the board's waiting is done. One speaks: it puts the member's own
pages up, so that nobody else (least of all the training thread) ever waits for the board. A member that neither speaks
nor has a living process is lost, and so is one whose beat stands still for the *watcher's* own patience; no two clocks
are compared.
"""

from __future__ import annotations

import logging
import secrets
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from supervise_core.agreement import StepAgreement, StopWish
from supervise_core.board import Board
from supervise_core.clock import Clock
from supervise_core.errors import MembershipError
from supervise_core.host import Host, Identity
from supervise_core.pages import CHIEF, Announcement, ChiefPage, End, MemberPage, beat_page, member_page

_log = logging.getLogger(__name__)

T = TypeVar("T")

LISTEN_FOR: Final = 0.5
"""Seconds of one wait at the board: so soon a lost process is seen."""

_LAST_SHARES_WITHIN: Final = 5.0
"""Seconds for which a run that has failed goes on with a checkpoint that was begun."""

_LEAVES_WITHIN: Final = 5.0
_LOOKS_EVERY: Final = 0.1

SAY_EVERY: Final = 10.0
"""Seconds between two lines about what is waited for."""


@dataclass(frozen=True, slots=True)
class Patience:
    """How long members wait for each other, in seconds."""

    silence: float = 20.0
    """A member whose beat stands still for so long is lost. A process of the same machine that died is lost at once."""
    comeback: float = 30.0
    """So long a chief that died may take to be started again, where workers can go on without it."""

    def __post_init__(self) -> None:
        for name in ("silence", "comeback"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or not 0 < value < float("inf"):
                raise ValueError(f"{name}= is a positive number of seconds, not {value!r}")


@dataclass(frozen=True, slots=True)
class Roll:
    """Who takes part: this process's place, and how many there are (None: not known, and not needed)."""

    rank: int
    size: int | None
    is_synchronous: bool

    @property
    def is_chief(self) -> bool:
        return self.rank == 0


@dataclass(slots=True)
class Hearing:
    """Whom a member tells what it hears. All of it is called by the listening thread."""

    stop: Callable[[StopWish], None]
    """Stop now."""
    fail: Callable[[MembershipError], None]
    """Another one failed, or is lost: the run cannot go on."""
    beat: Callable[[], None] = lambda: None
    """This process shows that it lives."""


class Member(ABC):
    """One life of a process in a run."""

    def __init__(
        self, roll: Roll, board: Board, agreement: StepAgreement, hearing: Hearing,
        patience: Patience, clock: Clock, host: Host,
    ) -> None:  # fmt: skip
        self.roll = roll
        self.agreement = agreement
        self.token = secrets.token_hex(8)
        self.identity: Identity = host.identity()
        self._board = board
        self._hearing = hearing
        self._patience = patience
        self._clock = clock
        self._host = host
        self._lock = threading.RLock()
        self._waiting: set[threading.Event] = set()
        self._to_say = threading.Event()
        self._has_spoken = threading.Event()
        self._unsaid: dict[str, bytes] = {}
        self._over = threading.Event()
        self._beats = 0
        self._pulses: dict[int, tuple[bytes | None, float]] = {}
        self._silent_since: float | None = None
        self._has_failed = False
        self._failed_at: float | None = None
        self._threads = [
            threading.Thread(target=self._guarded(act), name=f"supervise-core membership ({name})", daemon=True)
            for name, act in (("listens", self._listen_until_over), ("speaks", self._speak_until_over))
        ]

    # ---- a life

    def join(self) -> None:
        """Take part from now on.

        :raises MembershipError: if another process that lives is this member already; nothing was changed then.
        """
        self._await_vacancy()
        self._first_words()
        for thread in self._threads:
            thread.start()
        # what comes next may hold the interpreter's lock for long: by then the others are to know of this member
        self._clock.wait(self._has_spoken, self._patience.silence)

    def _await_vacancy(self) -> None:
        """One that the same launcher ended may be on its way out still."""
        began = self._clock.monotonic()
        while (
            (other := self._insist(self._incumbent)) is not None
            and other != self.identity
            and self._host.is_alive(other)
        ):
            if self._clock.monotonic() - began >= _LEAVES_WITHIN:
                raise MembershipError(
                    f"rank {self.roll.rank} at {self._board.location} is process {describe(other)} already, which "
                    "lives; give each process a rank of its own, and each run a place of its own, or end that one"
                )
            self._clock.wait(self._over, _LOOKS_EVERY)

    def _insist(self, ask: Callable[[], T]) -> T:
        """What the board says, which may be slow to answer when all come at once.

        :raises ConnectionError: if it cannot be reached for too long.
        """
        began = self._clock.monotonic()
        while True:
            try:
                return ask()
            except ConnectionError:
                if self._clock.monotonic() - began > self._patience.silence:
                    raise
            self._clock.wait(self._over, LISTEN_FOR)

    @abstractmethod
    def _incumbent(self) -> Identity | None:
        """Whose page there is in the place of this member's own, if it has not ended."""

    def leave(self, end: End) -> None:
        """Say how it ended, and take part no longer; safe to call twice."""
        if self._over.is_set():
            return
        self._last_words(end)
        self._over.set()
        self._to_say.set()
        listens, speaks = self._threads
        self._await_end(speaks)
        self._board.close()  # which ends the wait of the one that listens
        self._await_end(listens)

    def _await_end(self, thread: threading.Thread) -> None:
        if thread.is_alive() and thread is not threading.current_thread():
            self._clock.join(thread, self._patience.silence)

    @abstractmethod
    def _first_words(self) -> None: ...

    @abstractmethod
    def _last_words(self, end: End) -> None: ...

    @abstractmethod
    def _say_end(self, end: End) -> None: ...

    # ---- what it asks for

    @abstractmethod
    def wish(self, stop: StopWish | None = None) -> bool:
        """Have all members take a checkpoint together, or stop together. From any thread.

        False if there is nobody (any more) to agree with.
        """

    @abstractmethod
    def await_ready(self, max_wait_secs: float, stop: Callable[[], bool]) -> Announcement:
        """Wait until the chief has a model.

        :raises ChiefNeverCameError, ChiefLostError, ChiefFinishedError: as it says, within ``max_wait_secs``.
        :raises SessionStateError: when a stop is requested meanwhile.
        """

    def tell_failure(self, text: str) -> None:
        """Let the others know at once that this one fails."""
        with self._lock:
            self._failed_at = self._failed_at or self._clock.monotonic()
        self._say_end(End("failed", text, 0, self.roll.rank))

    def gone(self) -> list[str]:
        """The other members whose processes have ended without a word, as far as can be told here, for people.

        A step that fails may be the first sign of it: a collective breaks before anybody has looked.
        """
        ranks = [rank for rank in range(self.roll.size or 1) if rank != self.roll.rank]
        try:
            contents = self._board.get([CHIEF if rank == 0 else member_page(rank) for rank in ranks])
            owners = {
                rank: owner
                for rank, content in zip(ranks, contents, strict=True)
                if content is not None and (owner := self._trains_with_us(rank, content)) is not None
            }
        except (ConnectionError, MembershipError):
            return []  # there is an error already, which this is only to explain
        return [
            f"rank {rank} is gone (its process was {describe(owner)})"
            for rank, owner in owners.items()
            if self._host.is_alive(owner) is False
        ]

    def _trains_with_us(self, rank: int, content: bytes) -> Identity | None:
        """Whose page that is, if it is one of this run and has not ended."""
        page = ChiefPage.from_bytes(content) if rank == 0 else MemberPage.from_bytes(content)
        chief = page.token if isinstance(page, ChiefPage) else page.chief
        return page.owner if chief == self._chief_token and page.end is None else None

    @property
    @abstractmethod
    def _chief_token(self) -> str | None:
        """That of the chief of this run, if it is known."""

    def _has_given_up(self) -> bool:
        """Whether the run has failed, and a checkpoint of which all had snapshots had time to be written since."""
        return self._failed_at is not None and self._clock.monotonic() - self._failed_at > _LAST_SHARES_WITHIN

    @abstractmethod
    def state(self, name: str, value: Any) -> None:
        """Say what must be the same for all; where it is not, the run fails, everywhere. ``value`` is plain data."""

    @abstractmethod
    def lacking(self) -> str:
        """Whom everybody else is waiting for, in words."""

    # ---- speaking

    def _say(self, page: str, content: bytes) -> None:
        """Have a page put up, after those said before it. From any thread."""
        with self._lock:
            self._unsaid.pop(page, None)
            self._unsaid[page] = content
        self._to_say.set()

    def _speak_until_over(self) -> None:
        beat_every = self._patience.silence / 5
        beat_due = self._clock.monotonic()
        while True:
            is_over = self._over.is_set()
            self._to_say.clear()
            if self._clock.monotonic() >= beat_due:
                self._beats += 1
                self._hearing.beat()
                beat_due = self._clock.monotonic() + beat_every
                self._try(lambda: self._board.put(beat_page(self.roll.rank), b"%d" % self._beats))
            while (following := self._next_unsaid()) is not None:
                page, content = following
                self._try(lambda: self._put(page, content))  # noqa: B023 - called at once
            self._has_spoken.set()
            if is_over:
                return
            self._clock.wait(self._to_say, max(0.0, beat_due - self._clock.monotonic()))

    def _next_unsaid(self) -> tuple[str, bytes] | None:
        with self._lock:
            if not self._unsaid:
                return None
            page = next(iter(self._unsaid))
            return page, self._unsaid.pop(page)

    @abstractmethod
    def _put(self, page: str, content: bytes) -> None: ...

    # ---- listening

    def _listen_until_over(self) -> None:
        while not self._over.is_set():
            if not self._try(self._listen):
                self._clock.wait(self._over, LISTEN_FOR)
            self._wake()

    @abstractmethod
    def _listen(self) -> None:
        """One wait at the board, ``LISTEN_FOR`` seconds at most, and what follows from what it brought."""

    def _try(self, act: Callable[[], object]) -> bool:
        """Whether the board could be reached. One that cannot be reached for too long ends the run."""
        try:
            act()
        except ConnectionError as error:
            now = self._clock.monotonic()
            self._silent_since = now if self._silent_since is None else self._silent_since
            if now - self._silent_since > self._patience.silence and not self._over.is_set():
                where = f"the board of this run ({self._board.location}) cannot be reached"
                self._fail(MembershipError(f"{where}, for {now - self._silent_since:.0f} s: {error}"))
            return False
        self._silent_since = None
        return True

    def _fail(self, error: MembershipError) -> None:
        """The run cannot go on; said once."""
        with self._lock:
            if self._has_failed or self._over.is_set():
                return
            self._has_failed = True
            self._failed_at = self._failed_at or self._clock.monotonic()
        self.agreement.release()
        self._hearing.fail(error)

    def _guarded(self, act: Callable[[], None]) -> Callable[[], None]:
        def body() -> None:
            try:
                act()
            except BaseException as error:  # a thread of ours that dies must not leave the others waiting
                failure = MembershipError(f"{threading.current_thread().name} failed: {error!r}")
                failure.__cause__ = error
                self._fail(failure)

        return body

    # ---- waiting

    def await_news(self, find: Callable[[], T | None], limit: float, what: str) -> T | None:
        """Wait until ``find`` finds something, which is asked whenever there is news; None after ``limit`` seconds.

        ``what``, in words, is logged now and then.
        """
        bell = threading.Event()
        with self._lock:
            self._waiting.add(bell)
        try:
            began = said = self._clock.monotonic()
            while True:
                bell.clear()
                if (found := find()) is not None:
                    return found
                now = self._clock.monotonic()
                if (left := began + limit - now) <= 0:
                    return None
                if now - said >= SAY_EVERY:
                    said = now
                    _log.info("waiting for %s, for %.0f more seconds at most: %s", what, left, self.lacking())
                self._clock.wait(bell, min(left, SAY_EVERY))
        finally:
            with self._lock:
                self._waiting.discard(bell)

    def _wake(self) -> None:
        with self._lock:
            for bell in self._waiting:
                bell.set()

    # ---- who lives

    def _why_lost(self, rank: int, owner: Identity, beat: bytes | None) -> str | None:
        """Why a member must be taken for lost; None if it lives, as far as can be told."""
        now = self._clock.monotonic()
        known = self._pulses.get(rank)
        if known is None or known[0] != beat:
            self._pulses[rank] = known = (beat, now)
        if self._host.is_alive(owner) is False:
            return f"its process ({describe(owner)}) is gone"
        if now - known[1] > self._patience.silence:
            return f"its process ({describe(owner)}) has given no sign of life for {now - known[1]:.0f} s"
        return None


def describe(owner: Identity) -> str:
    """A process, for people."""
    return f"{owner.pid} on {owner.host}"
