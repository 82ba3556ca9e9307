"""What is shipped: four packages, each typed, and nothing that shadows a framework."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ["supervise_core", "supervise_numpy", "supervise_tf", "supervise_torch"]


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The names of the files in the wheel."""
    pytest.importorskip("build")
    pytest.importorskip("hatchling")
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    [wheel] = out.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


def test_top_level_names(names: list[str]) -> None:
    top = {name.split("/")[0] for name in names}
    [metadata] = [name for name in top if name.endswith(".dist-info")]
    assert sorted(top - {metadata}) == PACKAGES


def test_every_package_says_that_it_is_typed(names: list[str]) -> None:
    assert [f"{package}/py.typed" for package in PACKAGES if f"{package}/py.typed" not in names] == []


def test_every_module_of_the_source_is_there(names: list[str]) -> None:
    sources = [ROOT / "src" / "supervise_core", *(ROOT / "src" / "backends").glob("*/supervise_*")]
    modules = {f"{source.name}/{path.relative_to(source)}" for source in sources for path in source.rglob("*.py")}
    assert modules == {name for name in names if name.endswith(".py")}


def test_license_and_entry_points(names: list[str]) -> None:
    metadata = [name.split("/", 1)[1] for name in names if ".dist-info/" in name]
    assert "licenses/LICENSE" in metadata
    assert "entry_points.txt" in metadata
