"""What ``make demo`` runs: a training run that is killed half way, started again, and compared with one that was not.

Ends with exit status 0 only if both ended with the same weights, to the last bit.
"""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from pathlib import Path

EPOCHS = 40
PROGRAM = Path(__file__).with_name("01_minimal.py")
RUNS = Path("runs/demo")


def run(logdir: Path, kill_at_epoch: int | None = None) -> list[str]:
    """Run the program to its end, or kill it when it has printed that epoch. What it printed."""
    command = [sys.executable, str(PROGRAM), "--logdir", str(logdir), "--epochs", str(EPOCHS)]
    lines: list[str] = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as program:
        assert program.stdout is not None
        for line in program.stdout:
            lines.append(line.rstrip())
            if kill_at_epoch is not None and line.startswith(f"epoch {kill_at_epoch}:"):
                program.send_signal(signal.SIGKILL)
                break
    expected = 0 if kill_at_epoch is None else -signal.SIGKILL
    if program.returncode != expected:
        sys.exit(f"{PROGRAM.name} ended with {program.returncode} instead of {expected}")
    return lines


def main() -> None:
    """Three runs of one program, and a comparison."""
    shutil.rmtree(RUNS, ignore_errors=True)

    print(f"1. {PROGRAM.name}, {EPOCHS} epochs, left alone")
    whole = run(RUNS / "whole")
    print(f"   {whole[-1]}")

    print("2. the same program, killed with SIGKILL half way")
    print(f"   killed after '{run(RUNS / 'killed', kill_at_epoch=EPOCHS // 2)[-1]}'")

    print("3. the same command once more")
    resumed = run(RUNS / "killed")
    print(f"   {resumed[0]}")
    print(f"   {resumed[-1]}")

    same = whole[-1] == resumed[-1]
    print()
    print("weights left alone:  ", whole[-1].split()[-1])
    print("weights killed:      ", resumed[-1].split()[-1])
    print("the same, bit by bit:", "yes" if same else "NO")
    print()
    print(f"$ supervise-core checkpoints {RUNS / 'killed'}", flush=True)
    subprocess.run([sys.executable, "-m", "supervise_core", "checkpoints", str(RUNS / "killed")], check=True)
    print()
    print(f"Both runs in TensorBoard: pip install tensorboard && tensorboard --logdir {RUNS}")
    sys.exit(0 if same else 1)


if __name__ == "__main__":
    main()
