"""The modes and kinds of variables in which the scenes of a Supervisor are seen, each once for a whole test run."""

from __future__ import annotations

import os
from collections.abc import Callable

import parity
import pytest
from parity import MODES, Pair, observed

Seen = Callable[[str], Pair]
"""What a scene of the given name saw with TensorFlow's classes and with ours."""


@pytest.fixture(scope="session", autouse=True)
def _shared_by_workers(tmp_path_factory: pytest.TempPathFactory) -> None:
    if "PYTEST_XDIST_WORKER" in os.environ:
        parity.SHARED = tmp_path_factory.getbasetemp().parent


def _seen(mode: str, kind: str) -> Seen:
    """Where TensorFlow's own cannot play, as its services die in the default mode, ours is held to the other modes."""

    def look(name: str) -> Pair:
        pair = observed("programs_supervisor.py", mode, f"{name}_{kind}")
        if mode != "v2" or pair.theirs is not None:
            return pair
        return Pair(observed("programs_supervisor.py", "noeager", f"{name}_{kind}").theirs, pair.ours)

    return look


@pytest.fixture(params=["v1-ref", "noeager-resource", "v2-resource"])
def seen(request: pytest.FixtureRequest) -> Seen:
    """In every mode, with the kind of variables that is its default."""
    return _seen(*request.param.split("-"))


@pytest.fixture(params=[f"{mode}-{kind}" for mode in MODES for kind in ("ref", "resource")])
def seen_in_all(request: pytest.FixtureRequest) -> Seen:
    """In every mode with variables of both kinds."""
    return _seen(*request.param.split("-"))


@pytest.fixture(params=["v2-ref", "v2-resource"])
def seen_in_v2(request: pytest.FixtureRequest) -> Seen:
    """In TensorFlow's default mode."""
    return _seen(*request.param.split("-"))


@pytest.fixture
def seen_once() -> Seen:
    """In one mode, where it makes no difference."""
    return _seen("v1", "ref")
