"""What becomes of a rank that waits in a collective of gloo for one that does not come."""

from __future__ import annotations

from typing import Final

import pytest

from .driving import Facts, Outcome, started

pytest.importorskip("torch", reason="PyTorch is not installed")

STANDING_STILL: Final = [
    "frozen",
    "standing still",
    "standing still, in a second group",
    "standing still, in a backward pass",
]


@pytest.fixture(scope="module")
def launch() -> Outcome:
    with started("torch_lost_peer.py") as running:
        outcome = running.end(240)
    assert outcome.status == 0, outcome.errors
    return outcome


def survivor(launch: Outcome, way: str) -> Facts:
    assert {"ended": way, "status": 0} in launch.said, launch.errors
    return next(facts for facts in launch.said if facts.get("way") == way)


@pytest.mark.parametrize("way", ["killed", "left"])
def test_a_peer_whose_process_has_ended_is_missed_at_once(launch: Outcome, way: str) -> None:
    facts = survivor(launch, way)
    assert facts["by_itself"]
    assert "onnection" in facts["error"]


@pytest.mark.parametrize("way", STANDING_STILL)
def test_a_thread_that_waits_for_one_that_stands_still_can_be_freed(launch: Outcome, way: str) -> None:
    facts = survivor(launch, way)
    assert not facts["by_itself"]
    assert "Connection closed by peer" in facts["error"]


@pytest.mark.parametrize("way", ["killed", *STANDING_STILL])
def test_every_further_collective_fails_and_nothing_else_does(launch: Outcome, way: str) -> None:
    facts = survivor(launch, way)
    assert "onnection" in facts["again"]
    assert facts["store"] == "here"
