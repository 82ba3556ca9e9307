"""What every source file keeps to, and that hooks are documented."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from supervise_core import hookspecs

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "src").rglob("*.py"))
LONGEST_FILE = 480
LONGEST_CONTRACT = 720  # a contract is a list of cases


def documented(node: ast.FunctionDef | ast.ClassDef) -> bool:
    return ast.get_docstring(node) is not None


def classes(tree: ast.AST) -> Iterator[ast.ClassDef]:
    yield from (node for node in ast.walk(tree) if isinstance(node, ast.ClassDef))


def methods(node: ast.ClassDef) -> Iterator[ast.FunctionDef]:
    yield from (item for item in node.body if isinstance(item, ast.FunctionDef))


def ported() -> set[str]:
    """Methods that some class of the core documents, so that one that implements them need not do it again."""
    trees = [ast.parse(path.read_text()) for path in SOURCES if "supervise_core" in path.parts]
    return {item.name for tree in trees for node in classes(tree) for item in methods(node) if documented(item)}


def public(tree: ast.Module) -> Iterator[tuple[str, ast.FunctionDef | ast.ClassDef, bool]]:
    """Public classes, functions and methods; and whether it is a method of a class with bases."""
    for node in tree.body:
        if not isinstance(node, (ast.ClassDef, ast.FunctionDef)) or node.name.startswith("_"):
            continue
        yield node.name, node, False
        if isinstance(node, ast.ClassDef):
            for item in methods(node):
                if not item.name.startswith("_"):
                    yield f"{node.name}.{item.name}", item, bool(node.bases)


def is_self_explaining(node: ast.FunctionDef | ast.ClassDef) -> bool:
    """A property whose name says it all, and a test, whose name is the sentence."""
    decorators = [ast.unparse(decorator) for decorator in getattr(node, "decorator_list", [])]
    return "property" in decorators or any("setter" in text for text in decorators) or node.name.startswith("test_")


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT / "src")))
def test_a_file_is_short_and_says_what_it_is(path: Path) -> None:
    text = path.read_text()
    longest = LONGEST_CONTRACT if path.name.endswith("_contract.py") else LONGEST_FILE
    assert text.count("\n") <= longest, "split it"
    assert ast.get_docstring(ast.parse(text)), "a module begins with a sentence about it"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT / "src")))
def test_what_is_public_is_documented(path: Path) -> None:
    known = ported()
    bare = [
        name
        for name, node, has_bases in public(ast.parse(path.read_text()))
        if not documented(node) and not is_self_explaining(node) and not (has_bases and node.name in known)
    ]
    assert bare == []


def hooks() -> list[str]:
    return sorted(name for name in vars(hookspecs) if name.startswith("supervise_"))


@pytest.mark.parametrize("hook", hooks())
def test_a_hook_is_documented(hook: str) -> None:
    assert getattr(hookspecs, hook).__doc__
    assert hook in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("hook", hooks())
def test_a_hook_is_tested(hook: str) -> None:
    here = Path(__file__)
    assert any(hook in path.read_text() for path in (ROOT / "tests").rglob("*.py") if path != here)


def test_no_path_of_a_machine_is_left_in_the_project() -> None:
    kinds = {".py", ".md", ".toml", ".txt"}
    own = [path for path in ROOT.iterdir() if path.suffix in kinds or path.name == "Makefile"]
    for folder in ("src", "examples", "benchmarks", "docs", "tests"):
        own += [path for path in (ROOT / folder).rglob("*") if path.suffix in kinds]
    pattern = re.compile(r"/(?:work|root|tmp/w)/")
    found = [str(path.relative_to(ROOT)) for path in own if path != Path(__file__) and pattern.search(path.read_text())]
    assert found == []
