"""What the members of a run put up on the board: plain data, as JSON.

A reader may miss what a page said in between. So a page always says all that somebody may still have to know.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Final, Literal, Self

from supervise_core.agreement import Answer, Decision, StopWish
from supervise_core.errors import MembershipError
from supervise_core.host import Identity

CHIEF: Final = "chief"
_OUTCOMES_KEPT: Final = 8
FACTS_KEPT: Final = 16

EndKind = Literal["done", "stopped", "failed"]


def member_page(rank: int) -> str:
    """The name of the page of a worker."""
    return f"member/{rank}"


def beat_page(rank: int) -> str:
    """The name of the page on which a member counts, to show that it lives."""
    return f"beat/{rank}"


def share_page(rank: int) -> str:
    """The name of the page with a worker's share of a checkpoint."""
    return f"share/{rank}"


def fact_page(rank: int) -> str:
    """The name of the page with what a worker knows and all must have the same."""
    return f"fact/{rank}"


@dataclass(frozen=True, slots=True)
class End:
    """How a member's part in the run ended. ``rank`` is whose failure it was, if it was one."""

    kind: EndKind
    text: str
    step: int
    rank: int


@dataclass(frozen=True, slots=True)
class Announcement:
    """The model is ready: the checkpoint that holds it (None: there is none, or the model itself is shared)."""

    checkpoint: str | None
    step: int


@dataclass(frozen=True, slots=True)
class OpenDraft:
    """A checkpoint that the chief has begun, and the directory that shares go into."""

    number: int
    step: int
    directory: str
    is_final: bool = False
    """Whether it is the last one of the run."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a draft: the checkpoint, or why there is none."""

    number: int
    checkpoint: str | None
    problem: str = ""


@dataclass(frozen=True, slots=True)
class Facts:
    """What a member knows that all must have the same, under one name each: the last few."""

    token: str
    values: Mapping[str, Any]

    def to_bytes(self) -> bytes:
        """As the content of a page."""
        return _encode(self)

    @classmethod
    def from_bytes(cls, content: bytes) -> Self:
        """:raises MembershipError: if that is no such page."""
        data = _decode(content)
        try:
            return cls(data["token"], dict(data["values"]))
        except (KeyError, TypeError, ValueError) as error:
            raise _foreign(content) from error


@dataclass(frozen=True, slots=True)
class MemberPage:
    """What a worker says. ``token`` is another one each time it joins; ``chief`` is that of the chief it speaks to."""

    token: str
    owner: Identity
    chief: str = ""
    is_here: bool = False
    """Whether it has the chief's model."""
    round: int = 0
    answer: Answer | None = None
    """To the question of ``round``."""
    wishes: int = 0
    """How many times it asked for something."""
    stop: StopWish | None = None
    end: End | None = None
    has_left: bool = False
    """Whether it adds to no checkpoint any more; one that fails says so before."""

    def to_bytes(self) -> bytes:
        """As the content of a page."""
        return _encode(self)

    @classmethod
    def from_bytes(cls, content: bytes) -> Self:
        """:raises MembershipError: if that is no such page."""
        data = _decode(content)
        try:
            return cls(
                data["token"], Identity.from_json(data["owner"]), data["chief"], data["is_here"],
                data["round"], _optional(Answer, data["answer"]), data["wishes"],
                _optional(StopWish, data["stop"]), _optional(End, data["end"]), data["has_left"],
            )  # fmt: skip
        except (KeyError, TypeError, ValueError) as error:
            raise _foreign(content) from error


@dataclass(frozen=True, slots=True)
class ChiefPage:
    """What the chief says."""

    token: str
    owner: Identity
    ready: Announcement | None = None
    go: bool = False
    """Whether all have the model, and the first step may be made."""
    round: int = 0
    """The last question."""
    decision: Decision | None = None
    """The last one. The next is made only when all have answered a page that had this one."""
    stop: StopWish | None = None
    """Stop at once, without agreement."""
    draft: OpenDraft | None = None
    outcomes: tuple[Outcome, ...] = ()
    end: End | None = None
    has_left: bool = False
    """Whether it writes no checkpoint any more; one that fails says so before it has written what was begun."""

    def with_outcome(self, outcome: Outcome) -> ChiefPage:
        """The same page with the outcome of a draft, and of a few before it."""
        return replace(self, outcomes=(*self.outcomes, outcome)[-_OUTCOMES_KEPT:])

    def to_bytes(self) -> bytes:
        """As the content of a page."""
        return _encode(self)

    @classmethod
    def from_bytes(cls, content: bytes) -> Self:
        """:raises MembershipError: if that is no such page."""
        data = _decode(content)
        try:
            return cls(
                data["token"], Identity.from_json(data["owner"]), _optional(Announcement, data["ready"]), data["go"],
                data["round"], _decision(data["decision"]), _optional(StopWish, data["stop"]),
                _optional(OpenDraft, data["draft"]), tuple(Outcome(**outcome) for outcome in data["outcomes"]),
                _optional(End, data["end"]), data["has_left"],
            )  # fmt: skip
        except (KeyError, TypeError, ValueError) as error:
            raise _foreign(content) from error


@dataclass(frozen=True, slots=True)
class Share:
    """What one worker adds to a checkpoint: its own state, and the files it has put into the draft."""

    token: str
    draft: int
    state: str
    """The content of its ``state.json``."""
    files: Mapping[str, tuple[int, str]]
    """By their names there: size and hash."""
    problem: str = ""
    """Why there is no share, if there is none."""

    def to_bytes(self) -> bytes:
        """As the content of a page."""
        return _encode(self)

    @classmethod
    def from_bytes(cls, content: bytes) -> Self:
        """:raises MembershipError: if that is no such page."""
        data = _decode(content)
        try:
            files = {name: (size, digest) for name, (size, digest) in data["files"].items()}
            return cls(data["token"], data["draft"], data["state"], files, data["problem"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise _foreign(content) from error


def _encode(page: Any) -> bytes:
    return json.dumps(asdict(page), separators=(",", ":")).encode()


def _decode(content: bytes) -> dict[str, Any]:
    try:
        data = json.loads(content)
    except ValueError as error:
        raise _foreign(content) from error
    if not isinstance(data, dict):
        raise _foreign(content)
    return data


def _decision(data: Any) -> Decision | None:
    if data is None:
        return None
    return Decision(data["round"], data["step"], _optional(StopWish, data["stop"]), data["is_void"])


def _optional(kind: Any, data: Any) -> Any:
    return None if data is None else kind(**data)


def _foreign(content: bytes) -> MembershipError:
    return MembershipError(
        f"a page of the board was not written by this version of supervise-core ({content[:40]!r}); "
        "give this run a place of its own, and the same version on all its machines"
    )
