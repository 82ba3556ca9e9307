"""What the README shows runs, in the order in which it stands there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def blocks(text: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def test_the_python_blocks_of_the_readme(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    found = blocks((ROOT / "README.md").read_text())
    assert len(found) >= 5
    program = tmp_path / "readme.py"
    program.write_text("\n\n".join(found))
    command = [sys.executable, "-W", "error", str(program)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert "model.ckpt-100" in done.stdout
    for command in (["checkpoints", "runs/readme", "--verify"], ["backends"]):
        subprocess.run([sys.executable, "-m", "supervise_core", *command], cwd=tmp_path, check=True, timeout=60)


def test_files_that_the_readme_names_are_there() -> None:
    named = re.findall(r"`((?:src|examples|tests)/[^`]+|[A-Z]+\.md)`", (ROOT / "README.md").read_text())
    assert len(named) >= 4
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_commands_that_the_readme_names_are_made() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"make ([a-z]+)", (ROOT / "README.md").read_text()))
    assert {"demo", "test"} <= named <= targets
