"""A model that several processes share out among them comes back on as many, on fewer, on one, and from one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch.distributed.fsdp", reason="PyTorch is not installed")

from processes.driving import run

pytestmark = pytest.mark.timeout(600)  # some thirty processes, one after another

RUNS = [
    "four:4:4",
    "whole:4:8",
    "again:4:8:four",  # as many
    "two:2:4:four",
    "three:3:5:four",
    "one:1:5:four",
    "back:3:5:one",
    "more:4:5:three",
    "moved:2:5:@four",
]
GONE_ON_WITH = {
    "again": "four",
    "two": "four",
    "three": "four",
    "one": "four",
    "back": "one",
    "more": "three",
    "moved": "four",
}


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the ranks of all runs say, and what is read without a session."""
    outcome = run("torch_fsdp.py", tmp_path_factory.mktemp("runs"), *RUNS, limit=540)
    assert outcome.status == 0, outcome.errors
    runs = {facts["run"]: facts["ranks"] for facts in outcome.said if "run" in facts}
    return {**runs, "read": outcome.said[-1]["read"]}


@pytest.mark.parametrize(("name", "before"), GONE_ON_WITH.items())
def test_weights_and_optimizers_are_those_that_were_saved(said: dict[str, Any], name: str, before: str) -> None:
    saved = said[before][0]["end"]
    for rank in said[name]:
        assert Path(rank["restored"]).name == f"model.ckpt-{saved['step']}"
        assert rank["begin"]["step"] == saved["step"]
        assert rank["begin"]["together"] == saved["together"]


def test_all_ranks_agree_on_the_whole(said: dict[str, Any]) -> None:
    for name in (text.split(":")[0] for text in RUNS):
        for moment in ("begin", "end"):
            assert all(rank[moment]["together"] == said[name][0][moment]["together"] for rank in said[name])


def test_a_run_that_goes_on_ends_as_the_one_that_was_not_interrupted(said: dict[str, Any]) -> None:
    for first, second, whole in zip(said["four"], said["again"], said["whole"], strict=True):
        assert first["losses"] + second["losses"] == whole["losses"]
        assert second["end"] == whole["end"]  # together, and what each rank has alone
    alone = [rank["end"]["alone"] for rank in said["whole"]]
    assert len(set(alone)) == len(alone), "ranks have the same random state: the test tests less"


def test_each_rank_has_its_own_random_state_back(said: dict[str, Any]) -> None:
    for before, after in zip(said["four"], said["again"], strict=True):
        assert after["begin"]["alone"] == before["end"]["alone"]


def test_what_is_shared_out_is_read_in_one_piece_without_a_session(said: dict[str, Any]) -> None:
    together = said["four"][0]["end"]["together"]
    assert said["read"] == {name: together[name] for name in said["read"]}
