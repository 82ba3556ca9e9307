"""The contract of backends notices what it must: each mutant fails a test whose name says what is wrong."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from xml.etree import ElementTree

import pytest
from mutants import MUTANTS
from mutants import TestGood as Good

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def failures(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, set[str]]:
    """Which tests failed: of all tests for the good backend, and for each mutant of the one that should catch it."""
    report = tmp_path_factory.mktemp("mutants") / "report.xml"
    options = ["-q", "-c", os.devnull, "--noconftest", "-p", "no:cacheprovider", f"--junitxml={report}"]
    file = str(HERE / "mutants.py")
    chosen = [f"{file}::{mutant.__name__}::{mutant.caught_by}" for mutant in MUTANTS]
    told = subprocess.run(
        [sys.executable, "-m", "pytest", *options, f"{file}::{Good.__name__}", *chosen],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert told.returncode == 1, told.stdout + told.stderr
    failed: dict[str, set[str]] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        names = failed.setdefault(case.attrib["classname"].rpartition(".")[2], set())
        if case.find("failure") is not None or case.find("error") is not None:
            names.add(case.attrib["name"])
    return failed


def test_there_are_mutants() -> None:
    assert len(MUTANTS) >= 12
    assert len({mutant.caught_by for mutant in MUTANTS}) == len(MUTANTS)


def test_the_good_backend_keeps_the_contract(failures: Mapping[str, set[str]]) -> None:
    assert failures[Good.__name__] == set()


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__.removeprefix("Test"))
def test_a_mutant_is_caught_by_the_test_that_names_its_fault(
    mutant: type[Good], failures: Mapping[str, set[str]]
) -> None:
    assert mutant.caught_by in failures[mutant.__name__]


def test_what_the_contract_promises_is_a_test(failures: Mapping[str, set[str]]) -> None:
    unknown = {mutant.caught_by for mutant in MUTANTS} - set(dir(Good))
    assert not unknown
