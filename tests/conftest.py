"""Options of all tests: a campaign repeats one scenario with chances drawn from a seed.

``--count`` says how often and ``--seed`` from where; without ``--count`` a test takes the small number of its marker::

    @pytest.mark.campaign(small=40, soak=500)
    def test_something(count: int, seed: int) -> None: ...

``--soak`` takes the soak number of each marker. What was run is listed at the end of the report.
"""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Final

import pytest

_DEFAULT_SEED: Final = 20240501


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("campaigns")
    group.addoption("--count", type=int, default=None, help="how often each campaign repeats its scenario")
    group.addoption("--seed", type=int, default=_DEFAULT_SEED, help="where the chances of campaigns are drawn from")
    group.addoption("--soak", action="store_true", help="repeat each campaign by its soak number")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "campaign(small, soak): repeats a scenario --count times, from --seed")
    # A shell starts what runs in its background with SIGINT ignored, and every process of the tests would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """Where the chances of a campaign are drawn from."""
    return int(request.config.getoption("--seed"))


@pytest.fixture
def count(request: pytest.FixtureRequest, seed: int) -> int:
    """How often a campaign repeats its scenario."""
    marker = request.node.get_closest_marker("campaign")
    if marker is None:
        raise pytest.UsageError(f"{request.node.nodeid} uses 'count' without @pytest.mark.campaign(small=, soak=)")
    given = request.config.getoption("--count")
    number = given if given is not None else marker.kwargs["soak" if request.config.getoption("--soak") else "small"]
    request.node.user_properties.append(("campaign", f"count={number} seed={seed}"))
    return int(number)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call":
        for name, value in report.user_properties:
            if name == "campaign":
                _campaigns.append((report.nodeid, report.outcome, str(value), report.duration))


_campaigns: Final[list[tuple[str, str, str, float]]] = []


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _campaigns:
        terminalreporter.section("campaigns")
        for name, outcome, figures, seconds in _campaigns:
            terminalreporter.write_line(f"{outcome} {name}: {figures}, {seconds:.1f} s")


@pytest.fixture
def copy_as_killed() -> Callable[[Path, Path], None]:
    """Copies of a log directory that is written to, as a process would leave it that is killed at that moment."""

    def copy(running: Path, killed: Path) -> None:
        for _ in range(50):  # a file may be pruned while it is copied; then all is copied anew
            try:
                shutil.copytree(running, killed, ignore=shutil.ignore_patterns(".work", "checkpoint"))
            except (shutil.Error, FileNotFoundError):
                shutil.rmtree(killed, ignore_errors=True)
            else:
                return
        raise AssertionError("something was pruned during each of 50 copies")

    return copy
