"""The tables of what is kept name every item and every test, and no test that is not there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

_HERE = Path(__file__).parent
_ITEMS = {1: 23, 2: 11, 3: 23, 4: 20, 5: 27, 6: 21}
"""How many items each section of the list has."""
_OF_SUPERVISOR = _HERE / "README_supervisor.md"


def rows() -> list[list[str]]:
    """The cells of each row of the tables."""
    tables = [path.read_text() for path in (_HERE / "README.md", _OF_SUPERVISOR) if path.exists()]
    lines = [line for table in tables for line in table.splitlines() if re.match(r"\|\s*\d+\.\d+", line)]
    return [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in lines]


def named_in(row: list[str]) -> list[str]:
    """The tests that a row names; a name that is cut short ends with a dot-dot-dot."""
    names = re.findall(r"`(?:test_)?(\d+_\d+_\w*…?)`", " ".join(row))
    return [f"test_{name}" for name in names]


def is_meant(named: str, test: str) -> bool:
    return test.startswith(named[:-1]) if named.endswith("…") else test == named


def existing_tests(sections: str) -> set[str]:
    found = (
        re.findall(rf"^def (test_[{sections}]_\d\w*)", path.read_text(), re.MULTILINE)
        for path in _HERE.glob("test_*.py")
    )
    return {name for names in found for name in names}


@pytest.mark.parametrize("section", _ITEMS)
def test_every_item_has_its_row(section: int) -> None:
    if section > 3 and not _OF_SUPERVISOR.exists():
        pytest.skip("README_supervisor.md, the table of the Supervisor, is not there")
    listed = {item for row in rows() for item in re.findall(r"\d+\.\d+", row[0])}
    for row in rows():
        if match := re.fullmatch(r"(\d+)\.(\d+) to \1\.(\d+)", row[0]):
            listed |= {f"{match[1]}.{number}" for number in range(int(match[2]), int(match[3]) + 1)}
    expected = {f"{section}.{number}" for number in range(1, _ITEMS[section] + 1)}
    assert expected - listed == set()


def test_every_test_that_is_named_is_there() -> None:
    there = existing_tests("1-9")
    for row in rows():
        for named in named_in(row):
            assert any(is_meant(named, test) for test in there), named


def test_every_test_that_is_there_is_named() -> None:
    sections = "1-6" if _OF_SUPERVISOR.exists() else "1-3"
    named = [name for row in rows() for name in named_in(row)]
    assert [test for test in existing_tests(sections) if not any(is_meant(name, test) for name in named)] == []


def test_every_row_says_whether_it_is_kept_and_has_a_test_or_a_reason() -> None:
    for row in rows():
        assert re.search(r"\b(kept|better)\b", " ".join(row[1:])), row
        assert named_in(row) or re.search("not tested|none: ", " ".join(row)), row


@pytest.mark.parametrize("section", [1, 2, 3])
def test_a_row_names_tests_of_its_own_item(section: int) -> None:
    for row in rows():
        if row[0].startswith(f"{section}."):
            number = int(row[0].split(".")[1])
            for name in named_in(row):
                assert name.startswith(f"test_{section}_{number:02d}_"), row[0]
