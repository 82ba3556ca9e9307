"""Reading checkpoints beside a process that writes them, and prunes them."""

from __future__ import annotations

import signal
from pathlib import Path

import numpy as np
import pytest

from supervise_core import CheckpointDirectory, KeepBest, KeepLatest, Supervisor
from supervise_numpy import ArrayBackend

from .driving import newest_step, started


@pytest.mark.campaign(small=30, soak=200)
def test_the_newest_checkpoint_is_readable_at_any_time(tmp_path: Path, count: int) -> None:
    seen: set[int] = set()
    with started("pruning_writer.py", tmp_path) as running:
        assert running.wait_for(1)
        for _ in range(count):
            checkpoint = CheckpointDirectory(tmp_path).newest()
            model = checkpoint.load("model")
            assert {*model["a"].ravel(), *model["b"]} == {checkpoint.step}
            checkpoint.verify()
            seen.add(checkpoint.step)
        running.signal(signal.SIGTERM)
        outcome = running.end()
    assert outcome.status == 143, outcome.errors
    assert len(seen) > 1
    assert CheckpointDirectory(tmp_path).steps() == [newest_step(tmp_path)]


def test_a_checkpoint_that_is_held_open_outlives_its_removal(tmp_path: Path) -> None:
    with started("pruning_writer.py", tmp_path) as running:
        assert running.wait_for(1)
        held = CheckpointDirectory(tmp_path).newest()
        while held.path.exists():
            assert CheckpointDirectory(tmp_path).newest().step >= held.step
        assert set(held.load("model")["b"]) == {held.step}
        held.verify()


def test_the_best_checkpoint_is_kept_with_its_metrics(tmp_path: Path) -> None:
    arrays = {"w": np.zeros(2)}
    accuracies = [0.1, 0.7, 0.4, 0.9, float("nan"), 0.9, 0.2]
    sv = Supervisor(
        ArrayBackend(arrays),
        tmp_path,
        save_every=None,
        summarize_every=None,
        keep=KeepBest("accuracy", mode="max") | KeepLatest(1),
    )
    with sv.managed_session() as sess:
        for epoch in sv.epochs(len(accuracies)):
            for _ in sv.batches(range(3)):
                sess.global_step += 1
                arrays["w"].fill(sess.global_step)
            sv.metrics(accuracy=accuracies[epoch], loss=1.0)
    directory = CheckpointDirectory(tmp_path)
    assert directory.steps() == [18, 21]
    assert directory.at(18).metrics == {"accuracy": 0.9, "loss": 1.0}
    assert set(directory.at(18).load("model")["w"]) == {18.0}
