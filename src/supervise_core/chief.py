"""The member that is the chief: it makes the model ready, opens and closes rounds, and gathers checkpoints."""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any, Final

from supervise_core.agreement import Answer, Decision, StopWish
from supervise_core.errors import (
    DisagreementError,
    MemberFailedError,
    MemberLostError,
    MembershipError,
    ReadinessTimeoutError,
    SessionStateError,
)
from supervise_core.host import Identity
from supervise_core.member import LISTEN_FOR, Member, describe
from supervise_core.pages import (
    CHIEF,
    Announcement,
    ChiefPage,
    End,
    Facts,
    MemberPage,
    OpenDraft,
    Outcome,
    Share,
    beat_page,
    fact_page,
    member_page,
    share_page,
)

_log = logging.getLogger(__name__)

_LOOK_AT_ALL_EVERY: Final = 2.0
"""Seconds between two looks at all members: at their beats, and for rings that were lost."""


class Chief(Member):
    """A life of the chief."""

    def __init__(self, *parts: Any) -> None:
        super().__init__(*parts)
        self._mine = ChiefPage(self.token, self.identity)
        self._members: dict[int, MemberPage] = {}
        self._wishes_seen: dict[int, int] = {}
        self._is_wished = False
        self._stop_wish: StopWish | None = None
        self._own_answer = Answer(0)
        self._old_tokens: set[str] = set()
        """Of workers that had ended before this chief came: in an earlier run, as far as can be told."""
        self._lost: set[int] = set()
        self._facts: dict[str, Any] = {}
        self._facts_of: dict[int, Facts] = {}
        self._looked_at = 0.0
        self._drafts = 0
        self._is_training = False
        self._missing: Callable[[], list[int]] = list
        """Whose shares of a checkpoint are waited for."""

    # ---- what it says

    def _incumbent(self) -> Identity | None:
        [content] = self._board.get([CHIEF])
        page = None if content is None else ChiefPage.from_bytes(content)
        return None if page is None or page.end is not None else page.owner

    def _first_words(self) -> None:
        contents = self._insist(lambda: self._board.get([member_page(rank) for rank in self._others()]))
        pages = [MemberPage.from_bytes(content) for content in contents if content is not None]
        self._old_tokens = {page.token for page in pages if page.end is not None}
        self._looked_at = self._clock.monotonic() - _LOOK_AT_ALL_EVERY
        self._tell()

    def _last_words(self, end: End) -> None:
        self._tell(end=end, has_left=True)

    def _say_end(self, end: End) -> None:
        self._tell(end=end)

    def leave(self, end: End) -> None:
        """As before; where all train in step, it stays until the others have heard it, for the board may go with it."""
        if self.roll.is_synchronous and end.kind == "done" and not self._over.is_set():
            self._last_words(end)
            self.await_news(lambda: self._are_all_gone() or None, self._patience.silence, "the others to end")
        super().leave(end)

    def _are_all_gone(self) -> bool:
        with self._lock:
            return all(rank in self._lost or page.end is not None for rank, page in self._members.items())

    def _tell(self, **news: Any) -> None:
        with self._lock:
            end = self._mine.end
            self._mine = replace(self._mine, **news)
            if end is not None:
                self._mine = replace(self._mine, end=end)  # the first one says why
            self._say(CHIEF, self._mine.to_bytes())

    def _put(self, page: str, content: bytes) -> None:
        self._board.put(page, content)

    def announce(self, ready: Announcement) -> None:
        """The model is ready: have the workers take it."""
        self._tell(ready=ready)

    def await_all(self, max_wait_secs: float, stop: Callable[[], bool]) -> None:
        """Wait until all workers have the model, and begin; from then on stops and checkpoints are those of all.

        :raises ReadinessTimeoutError: if one has not within ``max_wait_secs``; says which.
        :raises MemberLostError: if one ended before.
        :raises SessionStateError: when a stop is requested meanwhile.
        """

        def look() -> bool | None:
            if stop():
                raise SessionStateError(f"stopped while waiting for {self._names(self._absent())}")
            with self._lock:
                absent = self._absent()
                pages = {rank: page for rank in absent if (page := self._members.get(rank)) is not None}
                gone = [rank for rank, page in pages.items() if page.end and not page.stop]  # a stop is heard as such
                if gone:
                    raise MemberLostError(f"{self._names(gone)} ended before training began")
                return None if absent else True

        if self.await_news(look, max_wait_secs, "all ranks to have the model") is None:
            raise ReadinessTimeoutError(
                f"waited {max_wait_secs:g} s until all ranks have the model: {self._names(self._absent())}"
            )
        with self._lock:
            wish = self._mine.stop
            if wish is None:
                self._is_training = True
                self._tell(go=True)
        if wish is not None:
            self._hearing.stop(wish)
            raise SessionStateError("stopped when all ranks had the model")

    def _absent(self) -> list[int]:
        return [rank for rank in self._others() if (page := self._members.get(rank)) is None or not page.is_here]

    @property
    def has_begun(self) -> bool:
        """Whether all train."""
        return self._is_training

    def await_ready(self, max_wait_secs: float, stop: Callable[[], bool]) -> Announcement:
        raise NotImplementedError("the chief makes the model ready itself")

    def _fail(self, error: MembershipError) -> None:
        rank, text = (error.rank, error.text) if isinstance(error, MemberFailedError) else (0, str(error))
        self._tell(end=End("failed", text, 0, rank))  # the workers know only the chief
        super()._fail(error)

    def state(self, name: str, value: Any) -> None:
        with self._lock:
            self._facts[name] = value
            known = list(self._facts_of.items())
        for rank, facts in known:
            self._compare(rank, facts)

    def _compare(self, rank: int, facts: Facts) -> None:
        for name, value in facts.values.items():
            if name in self._facts and self._facts[name] != value:
                self._fail(DisagreementError(f"{name}: {value!r} on rank {rank}, and {self._facts[name]!r} on rank 0"))

    @property
    def _chief_token(self) -> str | None:
        return self.token

    def lacking(self) -> str:
        with self._lock:
            if self._mine.round > self._decided:
                return self._names(self._unanswered())
            return self._names(self._missing() or self._absent())

    # ---- rounds

    def wish(self, stop: StopWish | None = None) -> bool:
        with self._lock:
            if not self._is_training or self._mine.end is not None:
                if stop is not None:
                    self._tell(stop=stop)  # nobody trains yet: all that wait are to stop at once
                return False
            self._note_wish(stop)
            self._advance()
            return True

    def _note_wish(self, stop: StopWish | None) -> None:
        self._is_wished = True
        self._stop_wish = self._stop_wish or stop

    @property
    def _decided(self) -> int:
        return 0 if self._mine.decision is None else self._mine.decision.round

    def _advance(self) -> None:
        """Open a round if one is wished, and close the one that is open if all have answered."""
        with self._lock:
            if self._mine.round > self._decided:
                if self._unanswered():
                    return
                answers = [self._own_answer, *(self._answer_of(page) for page in self._members.values())]
                stop, self._stop_wish = self._stop_wish, None
                self._is_wished = False
                decision = Decision.of(self._mine.round, answers, stop)
                _log.debug("agreed on %s", decision)
                self._tell(decision=decision)
                self.agreement.decide(decision)
            elif self._is_wished:
                number = self._decided + 1
                self._own_answer = self.agreement.question(number)
                self._tell(round=number)
                self._advance()

    def _unanswered(self) -> list[int]:
        return [
            rank
            for rank in self._others()
            if (page := self._members.get(rank)) is None or (page.end is None and page.round < self._mine.round)
        ]

    def _answer_of(self, page: MemberPage) -> Answer:
        if page.end is not None:
            return Answer(page.end.step, is_last=True)
        assert page.answer is not None, "it has answered this round"
        return page.answer

    def _others(self) -> Iterable[int]:
        return range(1, self.roll.size or 1)

    # ---- what it hears

    def _listen(self) -> None:
        rung = self._board.rung(LISTEN_FOR)
        ranks = {int(page.rpartition("/")[2]) for page in rung if page.startswith("member/")}
        now = self._clock.monotonic()
        if is_time := now - self._looked_at >= _LOOK_AT_ALL_EVERY:
            self._looked_at = now
            ranks |= set(self._others()) | set(self._members)
        self._read(sorted(ranks))
        self._read_facts(sorted({int(page.rpartition("/")[2]) for page in rung if not page.startswith("share/")}))
        if is_time:
            self._look_after_all()

    def _read(self, ranks: list[int]) -> None:
        for rank, content in zip(ranks, self._board.get([member_page(rank) for rank in ranks]), strict=True):
            if content is not None:
                self._heed(rank, MemberPage.from_bytes(content))
        self._advance()

    def _read_facts(self, ranks: list[int]) -> None:
        for rank, content in zip(ranks, self._board.get([fact_page(rank) for rank in ranks]), strict=True):
            page = self._members.get(rank)
            if content is not None and page is not None and (facts := Facts.from_bytes(content)).token == page.token:
                self._facts_of[rank] = facts
                self._compare(rank, facts)

    def _heed(self, rank: int, page: MemberPage) -> None:
        has_ended_unheard = page.end is not None and not page.chief and page.token not in self._old_tokens
        if page.chief != self.token and not has_ended_unheard:
            return  # of an earlier run, or not yet aware of this one
        twin: MemberPage | None = None
        with self._lock:
            before = self._members.get(rank)
            if before is None or before.token != page.token:
                twin = before if before is not None and self._is_at_work(before, page) else None
                self._pulses.pop(rank, None)
                self._wishes_seen[rank] = 0
                if before is not None and rank in self._lost:
                    _log.info("rank %d is back (%s)", rank, describe(page.owner))
                self._lost.discard(rank)
            self._members[rank] = page
            has_wished = page.wishes > self._wishes_seen[rank]
            self._wishes_seen[rank] = page.wishes
        if twin is not None:
            self._refuse_twin(rank, twin, page)
        elif page.end is not None and page.end.kind == "failed":
            if before is None or before.end is None:
                self._fail(MemberFailedError(page.end.rank, page.end.text))
        elif has_wished:
            self._grant(page.stop)

    def _is_at_work(self, before: MemberPage, page: MemberPage) -> bool:
        """Whether the process that was this rank until now is another one than the new one, and lives."""
        return before.end is None and before.owner != page.owner and self._host.is_alive(before.owner) is True

    def _refuse_twin(self, rank: int, one: MemberPage, other: MemberPage) -> None:
        both = f"processes {describe(one.owner)} and {describe(other.owner)} both say that they are rank {rank}"
        if self.roll.is_synchronous:
            self._fail(MembershipError(f"{both}; give each process a rank of its own"))
        else:
            _log.error("%s; give each process a rank of its own", both)

    def _grant(self, wish: StopWish | None) -> None:
        with self._lock:
            if self.roll.is_synchronous and self._is_training:
                self._note_wish(wish)
                return
            if wish is not None:
                self._tell(stop=wish)
        if wish is not None:
            self._hearing.stop(wish)

    def _look_after_all(self) -> None:
        with self._lock:
            alive = {rank: page for rank, page in self._members.items() if not page.has_left}
        beats = self._board.get([beat_page(rank) for rank in alive])
        for (rank, page), beat in zip(alive.items(), beats, strict=True):
            why = self._why_lost(rank, page.owner, beat)
            if why is None or rank in self._lost:
                continue
            self._lost.add(rank)
            if self.roll.is_synchronous:
                self._fail(MemberLostError(f"rank {rank} is lost: {why}"))
            else:
                _log.warning("rank %d is lost: %s; the others go on, and so may it when it is started again", rank, why)

    def _names(self, ranks: Iterable[int]) -> str:
        def name(rank: int) -> str:
            page = self._members.get(rank)
            return f"rank {rank} ({describe(page.owner)})" if page is not None else f"rank {rank}, which never came"

        return ", ".join(name(rank) for rank in ranks) or "nobody"

    # ---- checkpoints

    def open_draft(self, step: int, directory: str, *, is_final: bool = False) -> OpenDraft:
        """Have the workers add their shares to a checkpoint."""
        with self._lock:
            self._drafts += 1
            draft = OpenDraft(self._drafts, step, directory, is_final)
            self._tell(draft=draft)
            return draft

    def gather(self, draft: OpenDraft, limit: float) -> Mapping[int, Share]:
        """Wait until all workers have added their shares.

        :raises OSError: if one could not.
        :raises MembershipError: if one has not within ``limit`` seconds, has ended without, or is lost; says which.
        """
        shares: dict[int, Share] = {}

        def missing() -> list[int]:
            return [rank for rank in self._others() if rank not in shares]

        def look() -> bool | None:
            ranks = missing()
            gone = {rank for rank in ranks if self._is_gone(rank)}  # first: who has left put up its share before that
            for rank, content in zip(ranks, self._board.get([share_page(rank) for rank in ranks]), strict=True):
                page = self._members.get(rank)
                share = None if content is None else Share.from_bytes(content)
                if share is not None and page is not None and (share.token, share.draft) == (page.token, draft.number):
                    shares[rank] = share
            return True if not missing() or gone & set(missing()) or self._has_given_up() else None

        self._missing = missing
        try:
            self.await_news(look, limit, f"all shares of the checkpoint of step {draft.step}")
        finally:
            self._missing = list
        if ranks := missing():
            guilty = [rank for rank in ranks if self._is_gone(rank)] or ranks
            pages = [self._members.get(rank) for rank in guilty]
            ends = {f" (it ended: {page.end.text})" for page in pages if page is not None and page.end is not None}
            raise MembershipError(
                f"the checkpoint of step {draft.step} lacks the share of {self._names(guilty)}{''.join(sorted(ends))}; "
                "all ranks must come to a step boundary at that step"
            )
        for rank, share in shares.items():
            if share.problem:
                raise OSError(errno.EIO, f"{self._names([rank])} has no share for step {draft.step}: {share.problem}")
        return shares

    def _is_gone(self, rank: int) -> bool:
        with self._lock:
            page = self._members.get(rank)
            return rank in self._lost or (page is not None and page.has_left)

    def skip(self, step: int, problem: str) -> None:
        """Say that there is no checkpoint of a step at which all expect one, all at once, so that nobody begins it."""
        with self._lock:
            self._drafts += 1
            self._mine = self._mine.with_outcome(Outcome(self._drafts, None, problem))
            self._tell(draft=OpenDraft(self._drafts, step, ""))

    def settle(self, draft: OpenDraft, checkpoint: str | None, problem: str = "") -> None:
        """Say what became of a draft."""
        with self._lock:
            self._mine = self._mine.with_outcome(Outcome(draft.number, checkpoint, problem))
            self._tell()
