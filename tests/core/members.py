"""Members of a run in one process: on a board in memory, on a clock that a test moves, on a machine of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from supervise_core.agreement import StepAgreement, StopWish
from supervise_core.chief import Chief
from supervise_core.errors import MembershipError
from supervise_core.member import Hearing, Patience, Roll
from supervise_core.pages import End
from supervise_core.testing.boards import MemoryBoard, MemoryPlace
from supervise_core.testing.clock import FakeClock, eventually
from supervise_core.testing.hosts import FakeHost, FakeMachine
from supervise_core.worker import Worker

T = TypeVar("T")
MemberT = TypeVar("MemberT", Chief, Worker)

SLICE = 0.25
"""Seconds by which time moves at once, so that everybody does what is due before it moves on."""


@dataclass
class Life(Generic[MemberT]):
    """One member, and what it told its process."""

    member: MemberT
    board: MemoryBoard
    host: FakeHost
    steps: list[int] = field(default_factory=lambda: [0])
    stops: list[StopWish] = field(default_factory=list[StopWish])
    failures: list[MembershipError] = field(default_factory=list[MembershipError])

    def die(self) -> None:
        """As kill -9: nothing more is said, and the machine knows no such process."""
        self.host.die()
        self.freeze()

    def freeze(self) -> None:
        """As SIGSTOP: nothing more is said."""
        self.board.cut_off()
        self.member._over.set()  # its threads would complain


class Hall:
    """Where the members of a test meet."""

    def __init__(self) -> None:
        self.clock = FakeClock()
        self.place = MemoryPlace()
        self.machine = FakeMachine()
        self.lives: list[Life[Any]] = []
        self.calls: list[Call[Any]] = []

    def chief(self, size: int | None = 2, *, synchronous: bool = True) -> Life[Chief]:
        return self._join(Chief, 0, size, synchronous)

    def worker(self, rank: int = 1, size: int | None = 2, *, synchronous: bool = True) -> Life[Worker]:
        return self._join(Worker, rank, size, synchronous)

    def _join(self, kind: type[MemberT], rank: int, size: int | None, synchronous: bool) -> Life[MemberT]:
        board, host = MemoryBoard(self.place, self.clock), self.machine.process()
        steps, stops, failures = [0], list[StopWish](), list[MembershipError]()
        agreement = StepAgreement(lambda: steps[0], lambda: None, self.clock)
        hearing = Hearing(stops.append, failures.append)
        roll = Roll(rank, size, synchronous)
        member = kind(roll, board, agreement, hearing, Patience(), self.clock, host)
        life = Life(member, board, host, steps, stops, failures)
        self.lives.append(life)
        member.join()
        return life

    def call(self, act: Callable[[], T]) -> Call[T]:
        """Have something done that takes its time."""
        call = Call(self, act)
        self.calls.append(call)
        return call

    def settle(self) -> None:
        """Let everybody do what there is to do at this moment: until all sleep, and have nothing to wake up for."""
        eventually(lambda: self.clock.at_rest() == len(self._threads()), 60)

    def _threads(self) -> list[threading.Thread]:
        own = [thread for life in self.lives for thread in life.member._threads]
        return [thread for thread in (*own, *(call.thread for call in self.calls)) if thread.is_alive()]

    def pass_time(self, seconds: float) -> None:
        """Let that much time pass, slice by slice."""
        for _ in range(round(seconds / SLICE)):
            self.settle()
            self.clock.advance(SLICE)
        self.settle()

    def until(self, condition: Callable[[], object], within: float = 5.0) -> None:
        """Let time pass until a condition holds."""
        end = self.clock.monotonic() + within
        self.settle()
        while not condition():
            assert self.clock.monotonic() < end, f"{condition} did not become true within {within:g} s"
            self.pass_time(SLICE)

    def close(self) -> None:
        """The end of a test: no thread is left."""
        for call in self.calls:
            self.until(lambda call=call: not call.thread.is_alive(), 700)
        for life in self.lives:
            life.member._over.set()
            life.member._to_say.set()
            life.board.close()
        for life in self.lives:
            eventually(lambda life=life: not any(thread.is_alive() for thread in life.member._threads))


class Call(Generic[T]):
    """A call on a thread of its own."""

    def __init__(self, hall: Hall, act: Callable[[], T]) -> None:
        self._hall = hall
        self._act = act
        self._value: T | None = None
        self.error: Exception | None = None
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            self._value = self._act()
        except Exception as error:
            self.error = error

    @property
    def is_done(self) -> bool:
        return not self.thread.is_alive()

    def result(self, within: float = 5.0) -> T:
        """What it returned.

        :raises Exception: what it raised.
        """
        self._hall.until(lambda: self.is_done, within)
        if self.error is not None:
            raise self.error
        return self._value  # type: ignore[return-value]


def end(kind: Any = "done", text: str = "the end of the training block", step: int = 0, rank: int = 0) -> End:
    return End(kind, text, step, rank)
