"""The classes have TensorFlow's constructors, methods and properties: names, order, kinds and defaults."""

from __future__ import annotations

import inspect
import os
from typing import Any

import pytest

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
pytest.importorskip("tensorflow", reason="TensorFlow is not installed")

from parity import ours, theirs

CLASSES = ["Supervisor", "Coordinator", "LooperThread", "SessionManager"]
OLD_NAMES = {
    "PrepareSession": "prepare_or_wait_for_session",
    "StartQueueRunners": "start_queue_runners",
    "StartStandardServices": "start_standard_services",
    "Stop": "stop",
    "RequestStop": "request_stop",
    "Loop": "loop",
    "ShouldStop": "should_stop",
    "StopOnException": "stop_on_exception",
    "WaitForStop": "wait_for_stop",
    "SummaryComputed": "summary_computed",
}


def parameters(function: Any) -> list[tuple[str, Any, Any]]:
    """Name, kind and default of each; annotations are left out, and 120 equals 120.0."""
    found = inspect.signature(function, follow_wrapped=True).parameters.values()
    return [(parameter.name, parameter.kind, parameter.default) for parameter in found]


def public(kind: Any) -> dict[str, Any]:
    """What TensorFlow's class has that ``threading.Thread`` has not, by name, as it stands in the class."""
    import threading

    inherited = set(dir(threading.Thread)) if issubclass(kind, threading.Thread) else set()
    names = [name for name in dir(kind) if not name.startswith("_") and name not in inherited]
    return {name: inspect.getattr_static(kind, name) for name in names}


def callable_names() -> list[tuple[str, str]]:
    return [
        (name, member)
        for name in CLASSES
        for member, value in {"__init__": None, **public(getattr(theirs(), name))}.items()
        if member == "__init__" or callable(getattr(getattr(theirs(), name), member))
    ]


@pytest.mark.parametrize(("name", "method"), callable_names())
def test_the_parameters_of_a_method(name: str, method: str) -> None:
    there, here = (getattr(getattr(classes, name), method) for classes in (theirs(), ours()))
    assert parameters(here) == parameters(there)


@pytest.mark.parametrize("name", CLASSES)
def test_properties_are_properties_and_static_methods_static(name: str) -> None:
    there, here = public(getattr(theirs(), name)), getattr(ours(), name)
    for member, value in there.items():
        assert hasattr(here, member), member
        found = inspect.getattr_static(here, member)
        assert isinstance(found, property) == isinstance(value, property), member
        assert isinstance(found, staticmethod) == isinstance(value, staticmethod), member
        if isinstance(value, property):
            assert (found.fset is None) == (value.fset is None), member


@pytest.mark.parametrize("name", CLASSES)
def test_nothing_is_missing_and_what_is_more_is_known(name: str) -> None:
    there, here = (set(public(getattr(classes, name))) for classes in (theirs(), ours()))
    assert there <= here
    assert (
        here - there
        <= {
            "Supervisor": {"report"},
            "Coordinator": {"begin", "has_earlier_rounds"},
            "LooperThread": set[str](),
            "SessionManager": set[str](),
        }[name]
    )


def test_the_default_is_zero_and_is_known_by_identity() -> None:
    for classes in (theirs(), ours()):
        assert classes.Supervisor.USE_DEFAULT == 0
        assert type(classes.Supervisor.USE_DEFAULT) is int
        defaults = inspect.signature(classes.Supervisor.__init__).parameters
        for name in ("ready_op", "init_op", "saver", "summary_op", "global_step", "summary_writer", "local_init_op"):
            assert defaults[name].default is classes.Supervisor.USE_DEFAULT


@pytest.mark.parametrize(("old", "name"), OLD_NAMES.items())
def test_the_old_names_of_methods(old: str, name: str) -> None:
    for classes in (theirs(), ours()):
        assert getattr(classes.Supervisor, old) is getattr(classes.Supervisor, name)


@pytest.mark.parametrize("name", CLASSES)
def test_there_are_no_other_old_names(name: str) -> None:
    for classes in (theirs(), ours()):
        found = {member for member in dir(getattr(classes, name)) if member[0].isupper() and not member.isupper()}
        assert found == (set(OLD_NAMES) if name == "Supervisor" else set())


def test_an_override_counts_for_the_old_name_too() -> None:
    """There the old name goes on calling the base class."""

    def asked(classes: Any) -> str:
        class Own(classes.Supervisor):  # type: ignore[misc, name-defined]
            def __init__(self) -> None:
                pass

            def should_stop(self) -> str:
                return "own"

        return str(Own.ShouldStop is Own.should_stop)

    assert asked(theirs()) == "False"
    assert asked(ours()) == "True"
