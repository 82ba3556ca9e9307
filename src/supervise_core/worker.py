"""A member that is not the chief: it waits for the model, answers the chief's questions, and adds to checkpoints."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Final

from supervise_core.agreement import StopWish
from supervise_core.errors import (
    ChiefFinishedError,
    ChiefLostError,
    ChiefNeverCameError,
    MemberFailedError,
    MembershipError,
    ReadinessTimeoutError,
    SessionStateError,
)
from supervise_core.host import Identity
from supervise_core.member import LISTEN_FOR, Member, describe
from supervise_core.pages import (
    CHIEF,
    FACTS_KEPT,
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

_SETTLES: Final = 5.0
"""Seconds for which the end of a chief that was there first may be that of an earlier run."""


class Worker(Member):
    """A life of a worker."""

    def __init__(self, *parts: Any) -> None:
        super().__init__(*parts)
        self._mine = MemberPage(self.token, self.identity)
        self._known: bytes | None = None
        self._chief: ChiefPage | None = None
        self._stale: tuple[ChiefPage, bytes | None] | None = None
        """A page that was there first, and may be of an earlier run; and the beat that was there with it."""
        self._lost: tuple[float, str] | None = None
        """Since when the chief is lost, and why."""
        self._facts: dict[str, Any] = {}
        self._declined: set[int] = set()
        """The numbers of drafts of which this worker has said that it adds nothing to them."""
        self._adopted: str | None = None
        """The token of the chief whose model this worker trains."""

    # ---- what it says

    def _incumbent(self) -> Identity | None:
        [content] = self._board.get([member_page(self.roll.rank)])
        page = None if content is None else MemberPage.from_bytes(content)
        return None if page is None or page.end is not None else page.owner

    def _first_words(self) -> None:
        self._tell()

    def _last_words(self, end: End) -> None:
        self._tell(end=end, has_left=True)

    def _say_end(self, end: End) -> None:
        self._tell(end=end)

    def _tell(self, **news: Any) -> None:
        with self._lock:
            end = self._mine.end
            if end is None or "has_left" in news:
                self._mine = replace(self._mine, **news)
            if end is not None:
                self._mine = replace(self._mine, end=end)  # the first one says why
            self._say(member_page(self.roll.rank), self._mine.to_bytes())

    def _put(self, page: str, content: bytes) -> None:
        self._board.put(page, content)
        self._board.ring(page)

    def wish(self, stop: StopWish | None = None) -> bool:
        with self._lock:
            chief = self._chief
            is_heard = chief is not None and chief.end is None and self._lost is None
            if is_heard or chief is None:  # one that comes yet finds it
                self._tell(wishes=self._mine.wishes + 1, stop=self._mine.stop or stop)
            return is_heard and (self._mine.is_here or not self.roll.is_synchronous)

    def state(self, name: str, value: Any) -> None:
        with self._lock:
            self._facts[name] = value
            recent = dict(list(self._facts.items())[-FACTS_KEPT:])
            self._say(fact_page(self.roll.rank), Facts(self.token, recent).to_bytes())

    @property
    def _chief_token(self) -> str | None:
        return None if self._chief is None else self._chief.token

    def lacking(self) -> str:
        chief, lost = self._chief, self._lost
        if chief is None:
            earlier = "" if self._stale is None else f" since rank 0 was process {describe(self._stale[0].owner)}"
            return f"rank 0, the chief, has not come to {self._board.location}{earlier}"
        if lost is not None:
            return f"rank 0, the chief, is lost: {lost[1]}"
        return f"rank 0, the chief ({describe(chief.owner)})" + ("" if chief.ready else ", is not ready yet")

    # ---- what it hears

    def _listen(self) -> None:
        before = self._known
        content = self._known = self._board.await_change(CHIEF, before, LISTEN_FOR)
        if content is not None and (content != before or self._stale is not None):
            page = ChiefPage.from_bytes(content)
            if self._is_of_this_run(page, before):
                self._stale = None
                if content != before or self._chief is None:
                    self._heed(page)
        self._look_after_chief()

    def _is_of_this_run(self, page: ChiefPage, before: bytes | None) -> bool:
        """Whether a chief was seen to live: another run may have left its pages in the same place."""
        if self._chief is not None or (before is not None and self._stale is None):
            return True
        if page.end is None and self._host.is_alive(page.owner):  # an earlier run may have been in the same process
            return True
        [beat] = self._board.get([beat_page(0)])
        if self._stale is None:
            self._stale = page, beat
            return False
        return self._stale[0] != page or self._stale[1] != beat

    def _heed(self, page: ChiefPage) -> None:
        with self._lock:
            before, self._chief = self._chief, page
            is_another = before is None or before.token != page.token
            if is_another:  # what was said to an earlier one counts no more
                self._tell(chief=page.token, round=0, is_here=False)
        if is_another:
            self._pulses.clear()
            if self._lost is not None:
                _log.info("the chief is back (%s)", describe(page.owner))
            self._lost = None
            if self._adopted not in (None, page.token) and self.roll.is_synchronous:
                self._fail(
                    ChiefLostError("rank 0, the chief, was started anew while this rank trained with the old one")
                )
                return
        if page.stop is not None:
            self._hearing.stop(page.stop)
        if page.decision is not None:
            self.agreement.decide(page.decision)
        if page.end is not None:
            self._heed_end(page.end)
        elif page.round > self._mine.round:
            self._tell(round=page.round, answer=self.agreement.question(page.round))

    def _heed_end(self, end: End) -> None:
        if self._adopted is None:
            return
        self.agreement.give_up()
        if end.kind == "failed":
            self._fail(MemberFailedError(end.rank, end.text))
        elif not self.roll.is_synchronous:
            self._hearing.stop(StopWish(f"the end of the chief's run ({end.text})", 0))

    def _look_after_chief(self) -> None:
        chief = self._chief
        if chief is None or chief.end is not None:
            return
        [beat] = self._board.get([beat_page(0)])
        why = self._why_lost(0, chief.owner, beat)
        now = self._clock.monotonic()
        if why is None:
            self._lost = None
            return
        if self._lost is None:
            self._lost = now, why
            if self._adopted is not None and not self.roll.is_synchronous:
                _log.warning("rank 0, the chief, is lost: %s; waiting %g s for it", why, self._patience.comeback)
        if self._adopted is None:
            return
        if self.roll.is_synchronous or now - self._lost[0] > self._patience.comeback:
            self._fail(ChiefLostError(f"rank 0, the chief, is lost: {why}"))

    # ---- the model

    def await_ready(self, max_wait_secs: float, stop: Callable[[], bool]) -> Announcement:
        began = self._clock.monotonic()

        def look() -> Announcement | None:
            if stop():
                raise SessionStateError(f"stopped while waiting for the chief's model: {self.lacking()}")
            with self._lock:
                stale = None if self._stale is None else self._stale[0]
                chief, lost = self._chief or stale, self._lost
                if chief is not None and chief.end is not None:
                    self._judge_end(chief, chief.end, began)
                    return None
                if chief is None or chief is stale:
                    return None
                if lost is not None:
                    if self._clock.monotonic() - lost[0] > self._patience.comeback:
                        raise ChiefLostError(f"rank 0, the chief, is lost: {lost[1]}")
                    return None
                if chief.ready is not None:
                    self._adopted = chief.token
                return chief.ready

        found = self.await_news(look, max_wait_secs, "the chief's model")
        if found is not None:
            return found
        waited = f"waited {max_wait_secs:g} s for the chief's model: {self.lacking()}"
        if self._chief is None:
            raise ChiefNeverCameError(f"{waited}. Start it with the same place and rank 0.")
        if self._lost is not None:
            raise ChiefLostError(waited)
        raise ReadinessTimeoutError(waited)

    def await_go(self, max_wait_secs: float, stop: Callable[[], bool]) -> None:
        """Say that this worker has the model, and wait until all have it, where they train in step.

        :raises ChiefLostError, ReadinessTimeoutError: as it says, within ``max_wait_secs``.
        :raises SessionStateError: when a stop is requested meanwhile.
        """
        stopped = "stopped while waiting until all ranks have the model"
        with self._lock:
            wish = self._mine.stop
            if wish is None:
                self._tell(is_here=True)  # from now on the others count on it, and a stop is that of all
        if wish is not None:
            self._hearing.stop(wish)

        def look() -> bool | None:
            if stop():
                raise SessionStateError(stopped)
            with self._lock:
                chief = self._chief
                if chief is not None and chief.go:
                    return True  # also if it has ended since: it may have had no step to make
                if chief is not None and chief.end is not None and chief.stop is None:  # a stop is heard as such
                    if chief.end.kind == "failed":
                        raise MemberFailedError(chief.end.rank, chief.end.text)
                    raise ChiefLostError(f"rank 0, the chief, ended before training began: {chief.end.text}")
                return None

        if self.await_news(look, max_wait_secs, "all ranks to have the model") is None:
            raise ReadinessTimeoutError(f"waited {max_wait_secs:g} s until all ranks have the model: {self.lacking()}")

    def _judge_end(self, chief: ChiefPage, end: End, began: float) -> None:
        """The end of a chief that was there before this worker may be that of an earlier run: another one may come."""
        if self._clock.monotonic() - began < min(self._patience.comeback, _SETTLES):
            return
        if end.kind == "failed":
            raise MemberFailedError(end.rank, end.text)
        if chief.stop is not None:  # all were to stop, and this one came too late to be told
            self._hearing.stop(chief.stop)
            return
        raise ChiefFinishedError(
            f"rank 0, the chief ({describe(chief.owner)}), has ended its run at step {end.step} "
            f"({end.text}), so nobody makes a model ready. Start the chief again, if there is more to be done."
        )

    # ---- checkpoints

    def await_draft(self, step: int, after: int, limit: float, *, is_final: bool = False) -> OpenDraft | None:
        """Wait until the chief has begun the checkpoint of a step, or its last one, later than the draft ``after``.

        None if it has gone on to another one, or to its end, without.

        :raises MembershipError: if that cannot be told within ``limit`` seconds.
        """
        wanted = step, is_final  # which is the order in which they come
        passed_by = OpenDraft(-1, -1, "")

        def look() -> OpenDraft | None:
            with self._lock:
                chief = self._chief
                if chief is None or self._lost is not None or self._has_given_up():
                    return passed_by
                draft = chief.draft
                if draft is not None and draft.number > after:
                    if (draft.step, draft.is_final) == wanted:
                        return draft
                    if (draft.step, draft.is_final) > wanted:
                        return passed_by
                    self._decline(draft, step)
                return passed_by if chief.has_left else None

        found = self.await_news(look, limit, f"the chief's checkpoint of step {step}")
        if found is None:
            raise MembershipError(f"the chief did not begin the checkpoint of step {step} within {limit:g} s")
        return None if found is passed_by else found

    def _decline(self, draft: OpenDraft, step: int) -> None:
        """Shares are added in the order of steps: there will be none of an earlier one."""
        if draft.number not in self._declined and draft.directory:
            self._declined.add(draft.number)
            self.add_share(draft, "{}", {}, f"it has left that one behind, and is at step {step}")

    def add_share(self, draft: OpenDraft, state: str, files: Mapping[str, tuple[int, str]], problem: str = "") -> None:
        """Say what this worker adds to a checkpoint, or why it cannot."""
        self._say(share_page(self.roll.rank), Share(self.token, draft.number, state, files, problem).to_bytes())

    def await_outcome(self, draft: OpenDraft, limit: float) -> Outcome:
        """Wait until a checkpoint is committed, or given up."""

        def look() -> Outcome | None:
            with self._lock:
                chief = self._chief
                for outcome in () if chief is None else chief.outcomes:
                    if outcome.number == draft.number:
                        return outcome
                if chief is None or chief.has_left or self._has_given_up() or self._lost is not None:
                    return Outcome(draft.number, None, f"the chief has ended ({self.lacking()})")
                return None

        found = self.await_news(look, limit, f"the commit of the checkpoint of step {draft.step}")
        return found or Outcome(draft.number, None, f"the chief did not say within {limit:g} s what became of it")
