"""Gradients are summed in the same order after a restart, on four ranks, once the model was warmed up."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import pytest

from .driving import Facts, Outcome, started

pytest.importorskip("torch", reason="PyTorch is not installed")

PROGRAM: Final = "torch_ddp.py"
LAYOUTS: Final = ["plain", "static graph", "gradients are views"]
CASES: Final = [*LAYOUTS, "unused parameters", "normalised", "normalised, buffers of its own", "accumulating"]


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ddp") / "state.pt"


@pytest.fixture(scope="module")
def launch(kept: Path) -> Outcome:
    """One launch of four ranks that goes through all cases."""
    with started(PROGRAM, kept) as running:
        outcome = running.end(240)
    assert outcome.status == 0, outcome.errors
    return outcome


def case(launch: Outcome, name: str) -> Facts:
    return next(facts for facts in launch.said if facts.get("case") == name)


@pytest.mark.parametrize("name", CASES)
def test_a_run_cut_in_two_ends_as_one_that_was_not(launch: Outcome, name: str) -> None:
    facts = case(launch, name)
    assert facts["cut"] == facts["whole"]


@pytest.mark.parametrize("name", ["plain", "static graph"])
def test_without_a_warm_up_it_does_not(launch: Outcome, name: str) -> None:
    facts = case(launch, f"{name}, not warmed up")
    assert all(cut != whole for cut, whole in zip(facts["cut"], facts["whole"], strict=True))


def test_where_unused_parameters_are_looked_for_a_warm_up_changes_nothing(launch: Outcome) -> None:
    bare = case(launch, "unused parameters, not warmed up")
    assert bare["cut"] == bare["whole"] == case(launch, "unused parameters")["whole"]


def test_all_layouts_sum_alike_once_they_are_warm(launch: Outcome) -> None:
    assert len({str(case(launch, name)["whole"]) for name in LAYOUTS}) == 1


def test_a_launch_of_its_own_goes_on_as_the_first_one_did(launch: Outcome, kept: Path) -> None:
    with started(PROGRAM, kept, "--resume") as running:
        again = running.end(240)
    assert again.status == 0, again.errors
    assert [facts["resumed"] for facts in again.said] == [case(launch, "plain")["whole"]]


def test_a_warm_up_leaves_nothing_behind(launch: Outcome) -> None:
    """Random states, statistics of each rank, parameters and gradients, one of which was there before."""
    [facts] = [facts for facts in launch.said if "looked" in facts]
    assert facts["looked"] == [[], [], [], []]
    assert len(set(facts["statistics"])) == 4
