"""The example of a backend of one's own: installed beside the core it is found, keeps the contract, and resumes."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

pytest.importorskip("sklearn", reason="scikit-learn is not installed")
pytest.importorskip("hatchling", reason="hatchling is not installed, so no wheel can be built")

REPOSITORY = Path(__file__).parents[2]
EXAMPLE = REPOSITORY / "examples" / "05_own_backend"


def run(*command: object, **more: object) -> str:
    told = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, timeout=200, check=False, **more
    )
    assert told.returncode == 0, f"{command} failed:\n{told.stdout}\n{told.stderr}"
    return told.stdout


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new virtual environment with the two wheels in it; the packages of others are those of this environment."""
    folder = tmp_path_factory.mktemp("installed")
    wheels = folder / "wheels"
    shutil.copytree(EXAMPLE, folder / "example")
    for source in (REPOSITORY, folder / "example"):
        run(sys.executable, "-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps", "-w", wheels, source)
    venv.create(folder / "venv", symlinks=True)
    python = folder / "venv" / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", "--no-index", *wheels.iterdir())
    own = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    # a path in a .pth file is searched, but no .pth file in it is obeyed: editable installs stay out
    (own / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "venv"


def test_the_backend_module_is_short() -> None:
    lines = (EXAMPLE / "src" / "supervise_sklearn" / "backend.py").read_text().splitlines()
    assert len(lines) <= 60


def test_the_core_lists_it_without_a_change(clean: Path) -> None:
    listed = run(clean / "bin" / "supervise-core", "backends")
    line = next(line for line in listed.splitlines() if line.startswith("sklearn"))
    assert "usable" in line.split()
    assert "supervise_sklearn.backend.SklearnBackend" in line
    assert "from supervise-sklearn" in line


def test_listing_it_imports_no_framework(clean: Path) -> None:
    code = (
        "import sys, supervise_core; from supervise_core.cli import main; main(['backends']);"
        "assert supervise_core.__file__.startswith(sys.prefix), supervise_core.__file__;"
        "assert not {'sklearn', 'torch', 'tensorflow', 'numpy'} & set(sys.modules), sorted(sys.modules)"
    )
    run(clean / "bin" / "python", "-c", code)


def test_its_class_is_found_by_name(clean: Path) -> None:
    code = "from supervise_core.plugins import backend_class; print(backend_class('sklearn').__module__)"
    assert run(clean / "bin" / "python", "-c", code).strip() == "supervise_sklearn.backend"


def test_it_keeps_the_contract_where_it_is_installed(clean: Path, tmp_path: Path) -> None:
    contract = shutil.copy(EXAMPLE / "test_contract.py", tmp_path)
    options = ["-q", "-c", os.devnull, "-p", "no:cacheprovider"]
    told = run(clean / "bin" / "python", "-m", "pytest", *options, contract, cwd=tmp_path)
    assert " passed" in told
    assert "failed" not in told


def test_killed_and_started_again_it_ends_with_the_same_weights(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(EXAMPLE / "src")}
    command = [sys.executable, str(EXAMPLE / "train.py"), "--epochs", "6"]
    whole = run(*command, tmp_path / "whole", env=environment)
    process = subprocess.Popen([*command, str(tmp_path / "killed")], stdout=subprocess.PIPE, text=True, env=environment)
    with process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("epoch 2"):
                process.send_signal(signal.SIGKILL)
                break
    resumed = run(*command, tmp_path / "killed", env=environment)
    assert whole.splitlines()[0] == "begins at step 0"
    assert resumed.splitlines()[0] != "begins at step 0"
    assert resumed.splitlines()[-1] == whole.splitlines()[-1]
