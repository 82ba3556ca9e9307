"""Whether a model can be trained, and if not, why not."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Ready:
    """The model is ready."""

    def __bool__(self) -> bool:
        return True


@dataclass(frozen=True, slots=True)
class NotReady:
    """The model is not ready; ``reason`` names what is missing."""

    reason: str

    def __bool__(self) -> bool:
        return False


Readiness = Ready | NotReady


def readiness_of(answer: object) -> Readiness:
    """The readiness that a user's callable meant: a ``Readiness``, a bool, or None for ready.

    :raises TypeError: for any other answer.
    """
    match answer:
        case Ready() | NotReady():
            return answer
        case None | True:
            return Ready()
        case False:
            return NotReady("the ready check answered False")
        case _:
            raise TypeError(f"a ready check answers Ready(), NotReady(reason), a bool or None, not {answer!r}")
