"""A checkpoint holds one step, the one in its name, however soon the loop changes its parameters after the boundary."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from supervise_core import CheckpointDirectory, EverySteps, KeepAll, Supervisor
from supervise_numpy import ArrayBackend


def check_every_checkpoint(logdir: Path, last: int) -> list[int]:
    """Load each, and compare all it holds with its name; the steps."""
    directory = CheckpointDirectory(logdir)
    steps = directory.steps()
    assert steps[-1] == last
    for step in steps:
        with directory.at(step) as checkpoint:
            assert checkpoint.step == step
            assert checkpoint.path.name == f"model.ckpt-{step}"
            for name, values in checkpoint.load("model").items():
                assert set(np.asarray(values).ravel().tolist()) == {float(step)}, (step, name)
    return steps


def set_all(arrays: dict[str, np.ndarray[Any, Any]], step: int) -> None:
    for array in arrays.values():
        array.fill(step)


@pytest.mark.campaign(small=200, soak=1000)
@pytest.mark.parametrize("way", ["every step", "asked for"])
def test_numpy_state_is_never_torn(tmp_path: Path, way: str, count: int) -> None:
    arrays = {name: np.zeros(shape) for name, shape in (("a", (300, 300)), ("b", (7,)), ("c", ()))}
    sv = Supervisor(
        ArrayBackend(arrays),
        tmp_path,
        save_every=EverySteps(1) if way == "every step" else None,
        summarize_every=None,
        keep=KeepAll(),
    )
    with sv.managed_session() as sess:
        while sess.global_step < count and not sv.should_stop():
            set_all(arrays, sess.global_step + 1)  # directly after the boundary
            sess.global_step += 1
            if way == "asked for":
                sv.save()
    steps = check_every_checkpoint(tmp_path, count)
    if way == "every step":
        assert steps == list(range(count + 1))
    assert len(steps) > 2


@pytest.mark.campaign(small=40, soak=200)
def test_torch_state_is_never_torn(tmp_path: Path, count: int) -> None:
    torch = pytest.importorskip("torch")
    from supervise_torch import TorchBackend

    model = torch.nn.Linear(64, 64)
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    sv = Supervisor(
        TorchBackend(model=model, optimizer=optimizer),
        tmp_path,
        save_every=EverySteps(1),
        summarize_every=None,
        keep=KeepAll(),
    )
    with sv.managed_session():
        for _ in sv.batches(range(count)):
            for parameter in model.parameters():
                parameter.grad = torch.full_like(parameter, -1.0)
            optimizer.step()
    assert check_every_checkpoint(tmp_path, count) == list(range(count + 1))
