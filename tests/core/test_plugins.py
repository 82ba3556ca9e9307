"""Plugins: found by name, described without their framework, and unable to harm one another or the run."""

from __future__ import annotations

import inspect
import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from supervise_core import (
    BackendNotInstalledError,
    EverySteps,
    RunReport,
    StopCause,
    Supervisor,
    UnknownBackendError,
    hookimpl,
    hookspecs,
)
from supervise_core.cli import main
from supervise_core.plugins import BACKENDS, PLUGINS, backend_class, hooks_of_run, list_backends
from supervise_numpy import ArrayBackend

Announce = Callable[..., None]

HOOKS = (
    "supervise_session_ready",
    "supervise_checkpoint_committed",
    "supervise_stop_requested",
    "supervise_run_closed",
)

DESCRIBES = """
from supervise_core import BackendInfo, hookimpl

@hookimpl
def supervise_backend():
    return BackendInfo({arguments})
"""

WATCHES = """
from supervise_core import hookimpl

told = []

@hookimpl
def supervise_run_closed(report):
    told.append(report)
"""


@pytest.fixture
def announce(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Announce:
    """Install a distribution with one module and one entry point, for the length of a test."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def install(name: str, source: str, group: str = BACKENDS) -> None:
        module = f"plugin_{name}_{tmp_path.name}".replace("-", "_")
        (tmp_path / f"{module}.py").write_text(source)
        info = tmp_path / f"their_{name}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: their-{name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[{group}]\n{name} = {module}\n")

    return install


# ---- which backends there are


def test_our_own_backends_are_listed() -> None:
    entries = {entry.name: entry for entry in list_backends()}
    assert {"numpy", "torch", "tf"} <= entries.keys()
    assert entries["numpy"].usable
    assert entries["numpy"].distribution == "supervise-core"


def test_listing_imports_no_framework() -> None:
    code = (
        "import sys; from supervise_core.cli import main; main(['backends']);"
        "print(sorted({'torch', 'tensorflow', 'numpy', 'sklearn'} & set(sys.modules)))"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert told.stdout.splitlines()[-1] == "[]"


def test_a_broken_plugin_is_named_and_takes_no_other_down(
    announce: Announce, capsys: pytest.CaptureFixture[str]
) -> None:
    announce("broken", "raise RuntimeError('half installed')")
    announce("whole", DESCRIBES.format(arguments="'whole', 'supervise_numpy:ArrayBackend'"))
    assert main(["backends"]) == 0
    listed = capsys.readouterr().out.splitlines()
    at = next(number for number, line in enumerate(listed) if line.startswith("broken"))
    assert "not usable" in listed[at]
    assert "their-broken" in listed[at]
    assert "RuntimeError: half installed" in listed[at + 1]
    for name in ("numpy", "whole"):
        assert any(line.startswith(name) and "not usable" not in line for line in listed)
    assert backend_class("numpy") is ArrayBackend
    assert backend_class("whole") is ArrayBackend


def test_asking_for_a_broken_backend_says_what_is_broken(announce: Announce) -> None:
    announce("broken", "import a_module_that_is_not_there")
    with pytest.raises(
        BackendNotInstalledError, match=r"'broken' cannot be used: its plugin in their-broken is broken"
    ):
        backend_class("broken")


def test_an_unknown_backend_lists_the_known_ones(announce: Announce) -> None:
    announce("whole", DESCRIBES.format(arguments="'whole', 'supervise_numpy:ArrayBackend'"))
    with pytest.raises(UnknownBackendError, match=r"no backend is called 'jax'; announced are: .*numpy.*whole"):
        backend_class("jax")


def test_a_backend_whose_framework_is_missing_says_what_to_type(
    announce: Announce, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = "'far', 'far:Backend', requires=('numpy', 'far-away | far-off'), install='pip install far-away'"
    announce("far", DESCRIBES.format(arguments=arguments))
    with pytest.raises(
        BackendNotInstalledError, match=r"far-away \| far-off is not installed; type: pip install far-a"
    ):
        backend_class("far")
    assert main(["backends"]) == 0
    assert "type: pip install far-away" in capsys.readouterr().out


def test_one_of_several_distributions_is_enough(announce: Announce) -> None:
    announce("either", DESCRIBES.format(arguments="'either', 'x:Y', requires=('nowhere | numpy',)"))
    assert next(entry for entry in list_backends() if entry.name == "either").usable


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("x = 1", "must answer with one BackendInfo"),
        (DESCRIBES.format(arguments="'odd'").replace("return BackendInfo", "return repr"), "must answer"),
        (DESCRIBES.format(arguments="'odd'"), "missing 1 required positional argument"),
    ],
    ids=["no hook", "another answer", "an error in the hook"],
)
def test_a_plugin_that_describes_nothing_is_broken(announce: Announce, source: str, problem: str) -> None:
    announce("odd", source)
    entry = next(entry for entry in list_backends() if entry.name == "odd")
    assert not entry.usable
    assert problem in entry.problem


def test_a_target_that_is_no_backend_is_refused(announce: Announce) -> None:
    announce("odd", DESCRIBES.format(arguments="'odd', 'collections:OrderedDict'"))
    with pytest.raises(
        UnknownBackendError, match=r"collections:OrderedDict, announced as backend 'odd', is no Backend"
    ):
        backend_class("odd")


# ---- the hooks of a run


class Recorder:
    """Implements every lifecycle hook and keeps what it was told."""

    def __init__(self) -> None:
        self.told: list[tuple[str, dict[str, Any]]] = []

    @hookimpl
    def supervise_session_ready(self, session: Any, logdir: Path | None, step: int, restored: str | None) -> None:
        self.told.append(("ready", {"session": session, "logdir": logdir, "step": step, "restored": restored}))

    @hookimpl
    def supervise_checkpoint_committed(self, name: str, step: int, logdir: Path | None) -> None:
        self.told.append(("committed", {"name": name, "step": step, "logdir": logdir}))

    @hookimpl
    def supervise_stop_requested(self, cause: StopCause) -> None:
        self.told.append(("stop", {"cause": cause}))

    @hookimpl
    def supervise_run_closed(self, report: RunReport) -> None:
        self.told.append(("closed", {"report": report, "saves": report.saves, "status": report.exit_status}))


class Failing:
    """Fails in every hook."""

    @hookimpl(tryfirst=True)
    def supervise_session_ready(self) -> None:
        raise RuntimeError("at ready")

    @hookimpl(tryfirst=True)
    def supervise_checkpoint_committed(self) -> None:
        raise RuntimeError("at committed")

    @hookimpl(tryfirst=True)
    def supervise_stop_requested(self) -> None:
        raise RuntimeError("at stop")

    @hookimpl(tryfirst=True)
    def supervise_run_closed(self) -> None:
        raise RuntimeError("at closed")


def train(logdir: Path, steps: int, *plugins: object) -> tuple[Any, RunReport]:
    sv = Supervisor(
        ArrayBackend({"w": np.zeros(2)}), logdir, save_every=EverySteps(2), summarize_every=None, plugins=plugins,
        signals=False,
    )  # fmt: skip
    with sv.managed_session() as sess:
        while not sv.should_stop():
            sess["w"][:] += 1
            sess.global_step += 1
            if sess.global_step >= steps:
                sv.request_stop()
    return sess, sv.report


def test_every_hook_is_told_of_a_run_in_order_with_its_facts(tmp_path: Path) -> None:
    recorder = Recorder()
    session, report = train(tmp_path, 3, recorder)
    names = [name for name, _ in recorder.told]
    assert sorted(set(names)) == ["closed", "committed", "ready", "stop"]
    assert names[-1] == "closed"
    facts = dict(recorder.told)  # of those told several times, the last
    assert [more["step"] for name, more in recorder.told if name == "committed"][-1] == 3
    assert facts["ready"] == {"session": session, "logdir": tmp_path, "step": 0, "restored": None}
    assert facts["committed"] == {"name": "model.ckpt-3", "step": 3, "logdir": tmp_path}
    assert facts["stop"]["cause"].source == "request_stop"
    assert facts["closed"]["report"] is report
    assert facts["closed"] == {"report": report, "saves": report.saves, "status": 0}
    assert names.count("stop") == names.count("ready") == names.count("closed") == 1


def test_a_resumed_run_is_told_what_was_restored(tmp_path: Path) -> None:
    train(tmp_path, 2)
    recorder = Recorder()
    train(tmp_path, 4, recorder)
    ready = next(facts for name, facts in recorder.told if name == "ready")
    assert (ready["step"], ready["restored"]) == (2, "model.ckpt-2")


def test_a_failing_hook_harms_neither_the_run_nor_other_hooks(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    recorder = Recorder()
    _, report = train(tmp_path, 3, Failing(), recorder)
    assert report.errors == []
    assert {name for name, _ in recorder.told} == {"ready", "committed", "stop", "closed"}
    complaints = [record.getMessage() for record in caplog.records if "failed in" in record.getMessage()]
    assert {complaint.split(" failed in ")[1].split(";")[0] for complaint in complaints} == set(HOOKS)


def test_an_announced_plugin_is_part_of_every_run(announce: Announce, tmp_path: Path) -> None:
    announce("watcher", WATCHES, PLUGINS)
    _, report = train(tmp_path / "run", 1)
    module = next(module for name, module in sys.modules.items() if name.startswith("plugin_watcher"))
    assert module.told == [report]


def test_an_announced_plugin_that_cannot_be_loaded_is_left_out(
    announce: Announce, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    announce("watcher", "raise ImportError('no such thing')", PLUGINS)
    with caplog.at_level(logging.ERROR):
        _, report = train(tmp_path / "run", 1)
    assert report.exit_status == 0
    assert "the plugin watcher (their-watcher) cannot be loaded and is left out" in caplog.text


def test_a_hook_with_an_argument_that_does_not_exist_is_refused_at_once() -> None:
    class Odd:
        @hookimpl
        def supervise_run_closed(self, reprot: RunReport) -> None:
            raise AssertionError("never called")

    with pytest.raises(Exception, match="reprot"):
        hooks_of_run([Odd()])


def test_every_hook_is_an_empty_documented_function() -> None:
    found = {name: made for name, made in vars(hookspecs).items() if name.startswith("supervise_")}
    assert set(found) == {"supervise_backend", *HOOKS}
    for made in found.values():
        assert inspect.getdoc(made), f"{made.__name__} is not documented"
