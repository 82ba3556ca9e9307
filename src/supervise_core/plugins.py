"""Plugins: which backends there are, without importing their frameworks, and the hooks of one run.

Entry points are loaded one by one and by name. A plugin that cannot be loaded takes nobody else down and is named.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata
from typing import TYPE_CHECKING, Any, Final

import pluggy

from supervise_core import hookspecs
from supervise_core.errors import BackendNotInstalledError, UnknownBackendError
from supervise_core.hookspecs import PROJECT, BackendInfo

if TYPE_CHECKING:
    from supervise_core.backend import Backend

_log = logging.getLogger(__name__)

BACKENDS: Final = "supervise_core.backends"
"""Entry points of modules that implement ``supervise_backend``."""

PLUGINS: Final = "supervise_core.plugins"
"""Entry points of modules that implement lifecycle hooks; loaded in every run."""


@dataclass(frozen=True, slots=True)
class BackendEntry:
    """One backend that an installed distribution announces. ``problem`` is "" for one that can be used."""

    name: str
    distribution: str
    info: BackendInfo | None
    problem: str

    @property
    def usable(self) -> bool:
        return not self.problem


def list_backends() -> list[BackendEntry]:
    """Every backend that is announced, usable or not, by name."""
    return sorted((_describe(point) for point in metadata.entry_points(group=BACKENDS)), key=lambda entry: entry.name)


def backend_class(name: str) -> type[Backend[Any]]:
    """The class of the backend of that name; imports its framework.

    :raises UnknownBackendError: if nothing announces it; lists what is announced.
    :raises BackendNotInstalledError: if it cannot be used; says what to type.
    """
    from supervise_core.backend import Backend  # listing the backends must not cost its import

    points = metadata.entry_points(group=BACKENDS, name=name)
    for point in points:
        entry = _describe(point)
        if entry.info is None or entry.problem:
            raise BackendNotInstalledError(f"the backend {name!r} cannot be used: {entry.problem}")
        module, _, attribute = entry.info.target.partition(":")
        found = getattr(importlib.import_module(module), attribute)
        if not (isinstance(found, type) and issubclass(found, Backend)):
            raise UnknownBackendError(f"{entry.info.target}, announced as backend {name!r}, is no Backend")
        return found
    known = ", ".join(sorted({point.name for point in metadata.entry_points(group=BACKENDS)})) or "none"
    raise UnknownBackendError(f"no backend is called {name!r}; announced are: {known}")


def hooks_of_run(plugins: Iterable[object]) -> RunHooks:
    """The lifecycle hooks of one run: the plugins given, and those that are announced."""
    manager = pluggy.PluginManager(PROJECT)
    manager.add_hookspecs(hookspecs)
    for plugin in plugins:
        manager.register(plugin)
    for point in metadata.entry_points(group=PLUGINS):
        try:
            manager.register(point.load(), name=point.name)
        except Exception:
            _log.exception("the plugin %s (%s) cannot be loaded and is left out", point.name, _distribution(point))
    return RunHooks(manager)


class RunHooks:
    """Calls lifecycle hooks, and keeps their errors away from the run."""

    def __init__(self, manager: pluggy.PluginManager) -> None:
        self._manager = manager

    def call(self, hook: str, **facts: Any) -> None:
        """Call every implementation of a hook, each on its own."""
        for implementation in getattr(self._manager.hook, hook).get_hookimpls():
            wanted = {name: facts[name] for name in implementation.argnames}
            try:
                implementation.function(**wanted)
            except Exception:
                _log.exception("the plugin %s failed in %s; the run goes on", implementation.plugin_name, hook)


def _describe(point: metadata.EntryPoint) -> BackendEntry:
    distribution = _distribution(point)
    try:
        info = _info_of(point.load(), point.name)
    except Exception as error:
        problem = f"its plugin in {distribution} is broken ({type(error).__name__}: {error})"
        return BackendEntry(point.name, distribution, None, problem)
    missing = [requirement for requirement in info.requires if not _is_installed(requirement)]
    problem = f"{', '.join(missing)} is not installed; type: {info.install}" if missing else ""
    return BackendEntry(point.name, distribution, info, problem)


def _info_of(plugin: object, name: str) -> BackendInfo:
    manager = pluggy.PluginManager(PROJECT)
    manager.add_hookspecs(hookspecs)
    manager.register(plugin, name=name)
    answers = manager.hook.supervise_backend()
    if len(answers) != 1 or not isinstance(answers[0], BackendInfo):
        raise TypeError("supervise_backend() must answer with one BackendInfo")
    return answers[0]


def _is_installed(requirement: str) -> bool:
    for distribution in requirement.split("|"):
        try:
            metadata.distribution(distribution.strip())
        except metadata.PackageNotFoundError:
            continue
        return True
    return False


def _distribution(point: metadata.EntryPoint) -> str:
    return point.dist.name if point.dist is not None else "an unknown distribution"
