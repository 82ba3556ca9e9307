"""Pages say the same after they went over the board, and what is no page of this version is refused."""

from __future__ import annotations

import json

import pytest

from supervise_core.agreement import Answer, Decision, StopWish
from supervise_core.errors import MembershipError
from supervise_core.pages import Announcement, ChiefPage, End, Facts, MemberPage, OpenDraft, Outcome, Share
from supervise_core.testing.hosts import FakeMachine

OWNER = FakeMachine().process().identity()
STOP = StopWish("signal SIGTERM", 3, 15, True)
END = End("failed", "no \N{EURO SIGN}", 7, 3)

PAGES = [
    MemberPage("token", OWNER),
    MemberPage("token", OWNER, "chief", True, 3, Answer(17, is_last=True), 2, STOP, END, True),
    ChiefPage("token", OWNER),
    ChiefPage(
        "token", OWNER, Announcement("model.ckpt-7", 7), True, 4, Decision(3, 9, STOP), STOP, OpenDraft(2, 8, "/there"),
        (Outcome(1, None, "full"), Outcome(2, "model.ckpt-8")), END, True,
    ),
    ChiefPage("token", OWNER, Announcement(None, 0), decision=Decision(1, 2)),
    Share("token", 2, '{"parts": {}}', {"a.safetensors": (3, "hash")}, "problem"),
    Facts("token", {"the length of 'batches'": 100, "save_every=": "EverySteps(3)"}),
]  # fmt: skip


@pytest.mark.parametrize("page", PAGES, ids=lambda page: type(page).__name__)
def test_a_page_comes_back_as_it_was(page: MemberPage) -> None:
    assert type(page).from_bytes(page.to_bytes()) == page


@pytest.mark.parametrize("kind", [MemberPage, ChiefPage, Share, Facts])
@pytest.mark.parametrize("content", [b"", b"\xff", b"[]", b"{}", b"null", b'"text"', b'{"token": 1, "owner": {}}'])
def test_what_is_no_page_is_refused(kind: type[MemberPage], content: bytes) -> None:
    with pytest.raises(MembershipError, match="give this run a place of its own, and the same version"):
        kind.from_bytes(content)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: type(page).__name__)
def test_a_page_that_lacks_something_is_refused(page: MemberPage) -> None:
    whole = json.loads(page.to_bytes())
    for name in whole:
        content = json.dumps({other: value for other, value in whole.items() if other != name}).encode()
        with pytest.raises(MembershipError):
            type(page).from_bytes(content)


def test_the_last_outcomes_are_kept() -> None:
    page = ChiefPage("token", OWNER)
    for number in range(20):
        page = page.with_outcome(Outcome(number, None))
    assert [outcome.number for outcome in page.outcomes] == list(range(12, 20))
