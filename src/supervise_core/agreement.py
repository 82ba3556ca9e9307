"""The step after which all members of a synchronous run do something together: stop, or take a checkpoint.

Members that train in step cannot be stopped one by one: whoever begins a step that another one never makes waits for
it for ever. So they agree, in rounds. The chief opens a round. Each member answers with the *earliest* step at whose
end it can act; the chief decides on the largest answer, and everybody acts at its first boundary at or after it.

* A member that is asked holds its training thread at its next boundary, *before* it looks where that thread is. If it
  is inside a step then, the answer is the end of that step: the thread cannot pass it. If it stands at a boundary
  already, the answer is that boundary.
* So nobody is beyond the step decided on, and everybody gets there: a thread that is held may be needed by one that is
  not (in a collective of its step), but answers come from another thread, and no decision waits for a step.
* Who has made its last step acts no more; its final save is all that is left. So no checkpoint is agreed on any more:
  the final one of all is what was asked for.
* Publishing where one is *without* holding would not do: a member could be two steps further when it is decided.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from supervise_core.clock import Clock


@dataclass(frozen=True, slots=True)
class StopWish:
    """A request to stop: who asked, on which rank, the number of the signal if it was one, and whether for an error."""

    text: str
    rank: int
    signal: int | None = None
    is_error: bool = False


@dataclass(frozen=True, slots=True)
class Answer:
    """The earliest step at whose end a member can act, and whether that is its last one, and made."""

    step: int
    is_last: bool = False


@dataclass(frozen=True, slots=True)
class Decision:
    """What was agreed on in one round: a stop, or only a checkpoint, at the first boundary at or after ``step``."""

    round: int
    step: int
    stop: StopWish | None = None
    is_void: bool = False
    """Nothing is done: somebody has made its last step, and the final save comes next."""

    @classmethod
    def of(cls, number: int, answers: Sequence[Answer], stop: StopWish | None) -> Decision:
        """What follows from all answers of a round."""
        is_void = stop is None and any(answer.is_last for answer in answers)
        return cls(number, max(answer.step for answer in answers), stop, is_void)


def _nothing(_: Decision) -> None:
    return None


class StepAgreement:
    """One member's side of it. ``question`` and ``decide`` come from the thread that hears the chief."""

    def __init__(
        self,
        steps: Callable[[], int],
        ring: Callable[[], None],
        clock: Clock,
        decided: Callable[[Decision], None] = _nothing,
    ) -> None:
        """
        :param steps: how many steps were made; asked while training runs.
        :param ring: has the training thread call ``pass_boundary`` at its next boundary.
        :param decided: told of each decision, before the training thread is.
        """
        self._steps = steps
        self._ring = ring
        self._clock = clock
        self._tell = decided
        self._lock = threading.Lock()
        self._free = threading.Event()
        self._free.set()
        self._asked = self._decided = 0
        self._due: list[Decision] = []
        self._resting: int | None = 0
        self._is_over = self._was_released = False

    def begin(self) -> None:
        """Training begins. Until now this member could act at any step: it has none behind it that others wait for."""
        with self._lock:
            self._resting = None

    def question(self, number: int) -> Answer:
        """A round has begun: the earliest step at whose end this member can act. Until it is decided on, the training
        thread does not pass its next boundary."""
        with self._lock:
            if number > max(self._asked, self._decided):
                self._asked = number
                self._free.clear()
            self._ring()  # before the steps are read: a thread that misses it has begun the step after those
            return Answer(self._steps() + 1 if self._resting is None else self._resting, self._is_over)

    def decide(self, decision: Decision) -> None:
        """The step of a round is known; also to a member that was never asked, as it came later."""
        self._tell(decision)
        with self._lock:
            if decision.round <= self._decided:
                return
            self._decided = decision.round
            if not decision.is_void:
                self._due.append(decision)
            self._ring()
            if self._asked <= self._decided:
                self._free.set()

    def is_pending(self) -> bool:
        """Whether the training thread is to come here at its next boundary, too."""
        with self._lock:
            return self._asked > self._decided or bool(self._due)

    def rest(self, step: int) -> None:
        """On the training thread: it stands at a boundary, and will come to ``pass_boundary`` there."""
        with self._lock:
            self._resting = step

    def pass_boundary(self, step: int, limit: float) -> list[Decision] | None:
        """On the training thread: what is to be done at this boundary, once no round is open any more.

        None if a round was still open after ``limit`` seconds.
        """
        deadline = self._clock.monotonic() + limit
        with self._lock:
            self._resting = step
        while True:
            self._clock.wait(self._free, max(0.0, deadline - self._clock.monotonic()))
            with self._lock:
                if self._was_released:
                    return []
                if self._asked <= self._decided:  # no other round was opened since: that thread may have answered
                    self._resting = None
                    due = [decision for decision in self._due if decision.step <= step]
                    self._due = [decision for decision in self._due if decision.step > step]
                    return due
            if self._clock.monotonic() >= deadline:
                return None

    def end(self, step: int) -> None:
        """No further step is made; every later question has this one for its answer."""
        with self._lock:
            self._resting = step
            self._is_over = True
            self._due.clear()

    def give_up(self) -> None:
        """The chief has ended: a round that is open will not be decided. What was agreed on before still holds."""
        with self._lock:
            self._decided = max(self._decided, self._asked)
            self._free.set()

    def release(self) -> None:
        """Nobody decides any more, as the run fails: hold the training thread no longer."""
        with self._lock:
            self._was_released = True
            self._free.set()
