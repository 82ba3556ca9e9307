"""Exports, floors, and which imports drag in what."""

from __future__ import annotations

import ast
import importlib.util
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import supervise_core

ROOT = Path(__file__).parents[2]
CORE = ROOT / "src" / "supervise_core"
FRAMEWORKS = {"jax", "keras", "sklearn", "supervise_numpy", "supervise_tf", "supervise_torch", "tensorflow", "torch"}


def imported_in_a_fresh_process(code: str, wanted: set[str]) -> set[str]:
    program = f"{code}\nimport sys\nprint(*({wanted!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    return set(done.stdout.split())


def lint_imports(directory: Path) -> subprocess.CompletedProcess[str]:
    command = shutil.which("lint-imports", path=str(Path(sys.executable).parent))
    if command is None:
        pytest.skip("import-linter is not installed")
    return subprocess.run(
        [command, "--no-cache", "--no-logo"], cwd=directory, capture_output=True, text=True, timeout=120, check=False
    )


def test_exports_are_sorted_and_there() -> None:
    names = supervise_core.__all__
    assert names == sorted(names, key=lambda name: (not name.isupper(), not name[0].isupper(), name))
    assert [name for name in names if not hasattr(supervise_core, name)] == []


def test_the_lazy_table_is_what_is_exported() -> None:
    assert set(supervise_core._HOMES) | {"__version__"} == set(supervise_core.__all__)


def test_type_checkers_see_what_is_exported() -> None:
    tree = ast.parse((CORE / "__init__.py").read_text())
    [guarded] = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {
        alias.name: str(node.module).removeprefix("supervise_core.")
        for node in guarded.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert seen == supervise_core._HOMES


def test_every_name_lives_where_the_table_says() -> None:
    for name, module in supervise_core._HOMES.items():
        tree = ast.parse((CORE / f"{module}.py").read_text())
        defined = {node.name for node in tree.body if isinstance(node, (ast.ClassDef, ast.FunctionDef))}
        for node in tree.body:
            targets = node.targets if isinstance(node, ast.Assign) else []
            targets = [node.target] if isinstance(node, ast.AnnAssign) else targets
            defined |= {target.id for target in targets if isinstance(target, ast.Name)}
        assert name in defined, f"{name} is not defined in {module}"


def test_the_core_imports_no_framework_anywhere() -> None:
    found = []
    for path in CORE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            found += [(path.name, module) for module in modules if module.split(".")[0] in FRAMEWORKS]
    assert found == []


def test_importing_the_core_imports_no_framework_and_no_numpy() -> None:
    assert imported_in_a_fresh_process("import supervise_core", {"numpy", "torch", "tensorflow"}) == set()
    using = "from supervise_core import CheckpointDirectory, Supervisor"
    assert imported_in_a_fresh_process(using, {"numpy", "torch", "tensorflow"}) == set()


@pytest.mark.parametrize("backend", ["numpy", "torch", "tf"])
def test_importing_a_backend_package_imports_no_framework(backend: str) -> None:
    loaded = imported_in_a_fresh_process(f"import supervise_{backend}", {"numpy", "torch", "tensorflow"})
    assert loaded == set()


def test_using_torch_does_not_import_tensorflow() -> None:
    pytest.importorskip("torch")
    assert imported_in_a_fresh_process("from supervise_torch import TorchBackend", {"tensorflow"}) == set()


def test_using_tensorflow_does_not_import_torch() -> None:
    if importlib.util.find_spec("tensorflow") is None:
        pytest.skip("tensorflow is not installed")
    code = "import supervise_tf\n[getattr(supervise_tf, name) for name in supervise_tf.__all__]"
    assert imported_in_a_fresh_process(code, {"torch"}) == set()


def test_the_package_tells_its_floors() -> None:
    configuration = tomllib.loads((ROOT / "pyproject.toml").read_text())
    [contract] = [one for one in configuration["tool"]["importlinter"]["contracts"] if one["type"] == "layers"]
    checked = [set(layer.replace(" ", "").split("|")) for layer in contract["layers"] if layer != "testing"]
    told = re.findall(r"^ +\d+   (.*)$", supervise_core.__doc__ or "", re.MULTILINE)
    assert [set(line.replace(" ", "").split(",")) for line in told] == checked


def test_floors() -> None:
    done = lint_imports(ROOT)
    assert done.returncode == 0, done.stdout


def test_an_import_that_goes_up_is_found(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "src", tmp_path / "src", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    errors = tmp_path / "src" / "supervise_core" / "errors.py"
    errors.write_text(errors.read_text() + "\nfrom supervise_core import supervisor  # noqa\n")
    (tmp_path / "src" / "supervise_core" / "stowaway.py").write_text('"""A module without a floor."""\n')
    sources = [tmp_path / "src", *(path.parent for path in (tmp_path / "src" / "backends").glob("*/supervise_*"))]
    program = (
        f"import sys; sys.path[:0] = {[str(source) for source in sources]!r}\n"
        "from importlinter.cli import lint_imports\n"
        "sys.exit(lint_imports(no_cache=True))"
    )
    pytest.importorskip("importlinter")
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "stowaway" in done.stdout
