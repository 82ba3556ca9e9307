"""torchrun tells its user why a rank has failed."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from .driving import PROGRAMS

pytest.importorskip("torch", reason="PyTorch is not installed")


def test_the_agent_shows_the_error_and_its_traceback() -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*launcher, str(PROGRAMS / "torch_failing_rank.py")],
        capture_output=True, text=True, timeout=200, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 1
    root_cause = done.stderr.partition("Root Cause")[2]
    assert "rank      : 1 (local_rank: 1)" in root_cause
    assert "in misread" in root_cause
    assert "ValueError: invalid literal for int() with base 10: 'seven'" in root_cause
    assert "while reading labels.csv" in root_cause
