"""Loops that are cut short, by a limit of their own or by a stop, and started again, do what a longer run does."""

from __future__ import annotations

import contextlib
import itertools
from pathlib import Path

import numpy as np
import pytest

from supervise_core import EverySteps, KeepLatest, Supervisor
from supervise_numpy import ArrayBackend

PASS, VALIDATION, ROUNDS = 5, 2, 4
Seen = list[tuple[str, int]]


def train(logdir: Path, limit: int, *, stop_at: int = 0, epochs: bool) -> Seen:
    """Rounds of a training pass and a validation pass, until ``limit`` steps are made or a stop is asked for."""
    seen: Seen = []
    sv = Supervisor(ArrayBackend({"w": np.zeros(1)}), logdir, summarize_every=None, signals=False)
    with sv.managed_session() as session:
        session.global_step += 0
        rounds = sv.epochs(ROUNDS) if epochs else range(session.global_step // PASS, ROUNDS)
        for _ in rounds:
            for item in sv.batches(range(PASS)):
                seen.append(("train", item))
                session.global_step += 1
                if session.global_step == stop_at:
                    sv.request_stop()
                if session.global_step >= limit:
                    break
            if session.global_step >= limit or sv.should_stop():
                break
            seen += [("validate", item) for item in sv.batches(range(VALIDATION), name="validation")]
    return seen


@pytest.mark.parametrize("epochs", [True, False], ids=["sv.epochs", "a plain loop"])
@pytest.mark.parametrize("how", ["limit", "stop"])
@pytest.mark.parametrize("cut", [1, 3, 5, 7, 10, 12])
def test_a_loop_cut_short_goes_on_where_it_was(cut: int, how: str, epochs: bool, tmp_path: Path) -> None:
    whole = train(tmp_path / "whole", 13, epochs=epochs)
    assert len(whole) == 13 + 2 * VALIDATION
    if how == "limit":
        first = train(tmp_path / "cut", cut, epochs=epochs)
    else:
        first = train(tmp_path / "cut", 13, stop_at=cut, epochs=epochs)
    assert first + train(tmp_path / "cut", 13, epochs=epochs) == whole


def kill_at(logdir: Path, step: int) -> list[tuple[str, int, int]]:
    """A program that draws its orders itself, beside passes before and around its epochs; it dies after that step."""
    seen: list[tuple[str, int, int]] = []
    rng = np.random.default_rng(0)
    w = np.zeros(1)
    sv = Supervisor(
        ArrayBackend({"w": w}, rng=rng), logdir, save_every=EverySteps(1), keep=KeepLatest(2), signals=False
    )
    with contextlib.suppress(InterruptedError), sv.managed_session() as session:

        def train(kind: str, epoch: int, item: int) -> None:
            w[:] += item * rng.normal()
            session.global_step += 1
            seen.append((kind, epoch, item))
            if session.global_step == step:
                raise InterruptedError

        for item in sv.batches(range(3), "warm-up"):
            train("warm-up", -1, item)
        endless = sv.batches(itertools.count(), "endless")
        for epoch in sv.epochs(3):
            order = rng.permutation(4)
            for item, number in zip(sv.batches(order), endless, strict=False):
                train("pass", epoch, 10 * int(item) + number)
    return [*seen, ("w", 0, hash(w.tobytes()))]


@pytest.mark.parametrize("step", range(1, 15))
def test_orders_drawn_in_an_epoch_and_passes_outside_of_epochs_are_resumed(step: int, tmp_path: Path) -> None:
    whole = kill_at(tmp_path / "whole", 0)
    assert len(whole) == 3 + 3 * 4 + 1
    first = kill_at(tmp_path / "cut", step)[:-2]  # the step in which it died was not saved
    assert first + kill_at(tmp_path / "cut", 0) == whole
