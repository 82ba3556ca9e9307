"""The saving benchmark prints every promise, and a checkpoint that is torn or not what was saved makes it fail."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NOT_MEASURED = 2

TEAR = """
import torch
from supervise_core.staging import Staging
put = Staging.put
def torn(self, part, state, codec=None, **options):
    put(self, part, state, codec, **options)
    if part == "model":
        torch._foreach_add_(measured.optimizer._everything[:5], saving_state.UNIT)  # these would be of the next step
Staging.put = torn
"""

RESTORE_NOTHING = """
from supervise_torch import TorchBackend
TorchBackend.load = lambda self, session, parts: None
"""

LEAVE_OUT_A_TENSOR = """
from supervise_core.tensor_files import TensorFile
read = TensorFile.read
def less(self, targets):
    read(self, dict(list(targets.items())[1:]))
TensorFile.read = less
"""


def run(folder: Path, *command: str) -> tuple[int, str]:
    """A benchmark in a process of its own, on one processor, since others are at work beside it."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *command, "--mib", "4", "--dir", str(folder)],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


def promises(output: str) -> set[str]:
    return set(re.findall(r"^(\d+) .*(?:ok|OVER|there is no GPU here.*)$", output, re.MULTILINE))


@pytest.fixture(autouse=True)
def torch_is_there() -> None:
    pytest.importorskip("torch")
    pytest.importorskip("safetensors")


def test_every_promise_is_printed_with_its_bound(tmp_path: Path) -> None:
    status, output = run(tmp_path, "-m", "benchmarks.saving", "--rounds", "1", "--no-peers")
    assert status in (0, 1, 3), output  # over its bound it may well be here, or disturbed, but not false
    assert promises(output) >= {"1", "2", "3", "4", "5", "6", "9"}, output
    assert "make overhead" in output
    assert list(tmp_path.iterdir()) == []


def test_the_share_of_a_run(tmp_path: Path) -> None:
    status, output = run(tmp_path, "-m", "benchmarks.overhead", "--seconds", "2")
    assert status in (0, 1), output
    assert promises(output) == {"8"}, output


@pytest.mark.parametrize(
    ("fault", "said"),
    [(TEAR, "it is torn"), (RESTORE_NOTHING, "tensors are not as they were"), (LEAVE_OUT_A_TENSOR, "it is torn")],
    ids=["torn", "nothing restored", "a tensor left out"],
)
def test_a_false_checkpoint_makes_it_fail(tmp_path: Path, fault: str, said: str) -> None:
    program = (
        "import sys\n"
        "from benchmarks import saving, saving_state\n"
        "step = saving_state.Adding.step\n"
        "class measured: optimizer = None\n"
        "def remember(self, closure=None):\n"
        "    measured.optimizer = self\n"
        "    step(self)\n"
        "saving_state.Adding.step = remember\n"
        f"{fault}\n"
        "sys.exit(saving.main())\n"
    )
    status, output = run(tmp_path, "-c", program, "frozen", "--rounds", "1")
    assert status == NOT_MEASURED, output
    assert "FALSE" in output
    assert said in output
