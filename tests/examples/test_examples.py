"""Every example runs, goes on where it was ended, and says so."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
SHORT = {
    "01_minimal.py": ["--epochs", "3"],
    "02_torch_digits.py": ["--epochs", "1"],
    "03_char_transformer.py": ["--steps", "6"],
    "04_own_service.py": ["--steps", "60"],
    "06_tf1_supervisor.py": ["--steps", "60"],
    "07_tf_graph_backend.py": ["--epochs", "1"],
    "08_keras_custom_loop.py": ["--epochs", "1"],
    "09_ddp.py": ["--epochs", "1"],
    "10_fsdp2.py": ["--epochs", "1"],
    "11_tf_cluster.py": ["--steps", "60"],
    "12_searches.py": ["--workers", "2", "--trials", "3"],
}
LONGER = {
    "01_minimal.py": ["--epochs", "4"],
    "02_torch_digits.py": ["--epochs", "2"],
    "03_char_transformer.py": ["--steps", "9"],
    "04_own_service.py": ["--steps", "90"],
    "06_tf1_supervisor.py": ["--steps", "90"],
    "07_tf_graph_backend.py": ["--epochs", "2"],
    "08_keras_custom_loop.py": ["--epochs", "2"],
    "09_ddp.py": ["--epochs", "2"],
    "10_fsdp2.py": ["--epochs", "2"],
    "11_tf_cluster.py": ["--steps", "90"],
    "12_searches.py": ["--workers", "2", "--trials", "5"],
}
NEEDS = {
    "01_minimal.py": "sklearn",
    "02_torch_digits.py": "torch",
    "03_char_transformer.py": "torch",
    "06_tf1_supervisor.py": "tensorflow",
    "07_tf_graph_backend.py": "tensorflow",
    "08_keras_custom_loop.py": "tensorflow",
    "09_ddp.py": "torch",
    "10_fsdp2.py": "torch",
    "11_tf_cluster.py": "tensorflow",
    "12_searches.py": "sklearn",
}
TORCHRUN = {"09_ddp.py": 2, "10_fsdp2.py": 2}


def command(name: str, logdir: Path, *arguments: str) -> list[str]:
    launch = ["-W", "error"]
    if name in TORCHRUN:
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={TORCHRUN[name]}"]
    return [sys.executable, *launch, str(EXAMPLES / name), "--logdir", str(logdir), *arguments]


def run(name: str, logdir: Path, *arguments: str) -> list[str]:
    """What the example printed."""
    done = subprocess.run(command(name, logdir, *arguments), capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def step_of(line: str) -> int:
    found = re.search(r"step (\d+)", line)
    assert found is not None, line
    return int(found[1])


def last(lines: list[str]) -> str:
    return next(line for line in reversed(lines) if line.startswith("done:"))


def test_no_example_is_forgotten() -> None:
    assert sorted(SHORT) == sorted(path.name for path in EXAMPLES.glob("[0-9]*.py"))


@pytest.mark.parametrize("name", sorted(SHORT))
def test_it_runs_and_goes_on_from_its_end(name: str, tmp_path: Path) -> None:
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])
    fresh = run(name, tmp_path, *SHORT[name])
    assert fresh[0] == "step 0: begun anew"
    again = run(name, tmp_path, *SHORT[name])
    assert step_of(last(again)) == step_of(last(fresh)), "a run that has ended only ends again"
    resumed = run(name, tmp_path, *LONGER[name])
    assert resumed[0].startswith(f"step {step_of(last(fresh))}: model.ckpt-{step_of(last(fresh))}")
    assert step_of(last(resumed)) > step_of(last(fresh))


@pytest.mark.parametrize(
    ("name", "needs", "epochs", "killed_after"),
    [("01_minimal.py", "sklearn", 12, 5), ("08_keras_custom_loop.py", "tensorflow", 6, 1)],
)
def test_it_ends_with_the_same_weights_when_killed_half_way(
    name: str, needs: str, epochs: int, killed_after: int, tmp_path: Path
) -> None:
    pytest.importorskip(needs)
    whole = run(name, tmp_path / "whole", "--epochs", str(epochs))
    with subprocess.Popen(
        command(name, tmp_path / "killed", "--epochs", str(epochs)), stdout=subprocess.PIPE, text=True
    ) as program:
        assert program.stdout is not None
        for line in program.stdout:
            if line.startswith(f"epoch {killed_after}:"):
                program.send_signal(signal.SIGKILL)
                break
    assert program.returncode == -signal.SIGKILL
    resumed = run(name, tmp_path / "killed", "--epochs", str(epochs))
    assert 0 < step_of(resumed[0]) < step_of(last(whole))
    assert last(resumed) == last(whole)
