"""What every test of saving asks in the end: are the checkpoints whole, and is each of the one step that it says?"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from supervise_core import CheckpointDirectory


def assert_one_step_each(logdir: Path, steps: list[int], **arrays: Sequence[str]) -> None:
    """For programs that have the step in every element of these arrays, named by their parts, or of the whole model.
    Nothing is left lying about."""
    checkpoints = CheckpointDirectory(logdir)
    assert checkpoints.steps() == steps
    for step in steps:
        saved = checkpoints.at(step)
        saved.verify()
        for part, names in (arrays or {"model": ()}).items():
            loaded = saved.load(part)
            assert {float(value) for name in names or loaded for value in np.unique(loaded[name])} == {step}
    assert list((logdir / ".work").glob("*/draft-*")) == []
