"""Models that live outside of the process that trains them, and the processes that keep them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from supervise_core import (
    DirectoryStore,
    NotReady,
    Readiness,
    ReadinessTimeoutError,
    Ready,
    SessionManager,
    SessionStateError,
    Supervisor,
)
from supervise_core.coordinator import StopSignal
from supervise_core.testing.clock import FakeClock
from supervise_numpy import ArrayBackend


class PeerLostError(Exception):
    pass


class Elsewhere(ArrayBackend):
    """Arrays that a server keeps; the server is the ``kept`` dictionary, which several backends may share."""

    recoverable = (PeerLostError,)

    def __init__(self, kept: dict[str, Any]) -> None:
        super().__init__({"w": np.zeros(3)})
        self.kept = kept
        self.done: list[str] = []
        self.missing: list[str] = []
        self.failures: list[BaseException] = []

    def peers(self, master: str = "", config: Any = None) -> Readiness:
        self.done.append("peers")
        return NotReady(f"no answer from {', '.join(self.missing)}") if self.missing else Ready()

    def create_session(self, master: str = "", config: Any = None) -> Any:
        self.done.append("create")
        return super().create_session(master, config)

    def close_session(self, session: Any) -> None:
        self.done.append("close")

    def init(self, session: Any) -> None:
        self.done.append("init")

    def local_init(self, session: Any) -> None:
        self.done.append("local_init")

    def load(self, session: Any, parts: Any) -> None:
        self.done.append("load")
        super().load(session, parts)

    def was_made_ready(self, session: Any, run: Callable[[], str]) -> bool:
        return "run" in self.kept and self.kept["run"] == run()

    def announce_ready(self, session: Any, run: Callable[[], str] | None) -> None:
        self.done.append("withdraw" if run is None else "announce")
        self.kept.pop("run", None)
        if run is not None:
            self.kept["run"] = run()

    def ready(self, session: Any) -> Readiness:
        if self.failures:
            raise self.failures.pop()
        return Ready() if "run" in self.kept else NotReady("the announcement")


def prepare(backend: Elsewhere, store: DirectoryStore, **options: Any) -> str:
    """Have a chief bring the model up; what it did."""
    manager = SessionManager(backend, store=store)
    with store.writing():
        manager.prepare_session(**options)
    return str(manager.recovery)


def test_the_announcement_is_the_last_thing_before_the_model_counts_as_ready(tmp_path: Path) -> None:
    backend = Elsewhere({})
    said = prepare(backend, DirectoryStore(tmp_path))
    assert backend.done == ["peers", "create", "withdraw", "init", "local_init", "announce"]
    assert said == "nothing was restored; run: init"


def test_a_chief_that_finds_the_model_ready_takes_it_as_it_is(tmp_path: Path) -> None:
    kept: dict[str, Any] = {}
    prepare(Elsewhere(kept), DirectoryStore(tmp_path))
    backend = Elsewhere(kept)
    said = prepare(backend, DirectoryStore(tmp_path))
    assert backend.done == ["peers", "create", "local_init"]
    assert said == "the model was found ready, as it was left; not run: restore, init, init_fn"


def test_it_is_restored_when_it_is_gone(tmp_path: Path) -> None:
    kept: dict[str, Any] = {}
    sv = Supervisor(Elsewhere(kept), tmp_path, summarize_every=None, signals=False)
    with sv.managed_session():
        pass
    kept.clear()
    backend = Elsewhere(kept)
    assert "restored step 0" in prepare(backend, DirectoryStore(tmp_path))
    assert backend.done == ["peers", "create", "withdraw", "load", "local_init", "announce"]


def test_it_is_made_ready_again_when_it_was_announced_and_is_not_ready(tmp_path: Path) -> None:
    kept: dict[str, Any] = {}
    prepare(Elsewhere(kept), DirectoryStore(tmp_path))
    backend = Elsewhere(kept)
    answers = iter([NotReady("a part was lost"), Ready()])
    backend.ready = lambda session: next(answers)  # type: ignore[method-assign]
    prepare(backend, DirectoryStore(tmp_path))
    assert backend.done == ["peers", "create", "local_init", "withdraw", "init", "local_init", "announce"]


@pytest.mark.parametrize("other", ["another directory", "the same, begun anew", "never"])
def test_a_model_of_another_run_is_not_gone_on_with(other: str, tmp_path: Path) -> None:
    kept: dict[str, Any] = {}
    prepare(Elsewhere(kept), DirectoryStore(tmp_path / "one"))
    if other == "the same, begun anew":
        (tmp_path / "one").rename(tmp_path / "away")
    backend = Elsewhere(kept)
    where = tmp_path / ("two" if other == "another directory" else "one")
    prepare(backend, DirectoryStore(where), **({"resume": "never"} if other == "never" else {}))
    assert "init" in backend.done


def test_a_run_in_one_process_draws_no_identity(tmp_path: Path) -> None:
    sv = Supervisor(ArrayBackend({"w": np.zeros(3)}), tmp_path, summarize_every=None, signals=False)
    with sv.managed_session():
        pass
    assert not (tmp_path / ".work" / "identity").exists()


def test_the_identity_of_a_directory_stays_and_moves_with_it(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path / "run")
    assert store.identity() == str((tmp_path / "run").resolve()), "a reader changes nothing"
    with store.writing():
        drawn = store.identity()
    (tmp_path / "run").rename(tmp_path / "moved")
    assert DirectoryStore(tmp_path / "moved").identity() == drawn
    with DirectoryStore(tmp_path / "run").writing():
        pass
    assert DirectoryStore(tmp_path / "run").identity() != drawn


@pytest.mark.parametrize("call", ["prepare_session", "wait_for_session"])
def test_a_peer_that_does_not_answer_is_named_when_the_time_is_up(call: str) -> None:
    backend = Elsewhere({})
    backend.missing = ["ps 0", "ps 3"]
    clock = FakeClock()
    errors: list[BaseException] = []

    def wait() -> None:
        try:
            getattr(SessionManager(backend), call)(max_wait_secs=3.0, stop=StopSignal(clock))
        except ReadinessTimeoutError as error:
            errors.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    began = clock.monotonic()
    while thread.is_alive():
        try:
            clock.wait_for_sleepers(1, timeout=0.05)
        except TimeoutError:
            continue
        clock.advance(0.05)
    assert clock.monotonic() - began == pytest.approx(3, abs=0.06)
    assert "waited 3 s for the tasks that the model needs: no answer from ps 0, ps 3" in str(errors[0])
    assert "create" not in backend.done


def test_a_worker_whose_peer_is_lost_while_it_waits_begins_again() -> None:
    backend = Elsewhere({"run": ""})
    backend.failures = [PeerLostError("gone")]
    SessionManager(backend).wait_for_session()
    assert backend.done == ["peers", "create", "local_init", "close", "peers", "create", "local_init"]


def test_it_does_so_no_longer_than_its_limit() -> None:
    backend = Elsewhere({"run": ""})
    backend.failures = [PeerLostError("gone")]
    with pytest.raises(ReadinessTimeoutError, match="for the chief's model: PeerLostError: gone"):
        SessionManager(backend).wait_for_session(max_wait_secs=0)


def test_a_stop_ends_that_too() -> None:
    backend = Elsewhere({"run": ""})
    backend.failures = [PeerLostError("gone")]
    stop = StopSignal()
    stop.wait_for_stop = lambda timeout=None: True  # type: ignore[method-assign]
    with pytest.raises(SessionStateError, match="PeerLostError"):
        SessionManager(backend).wait_for_session(stop=stop)


def test_another_error_while_it_waits_comes_out() -> None:
    backend = Elsewhere({"run": ""})
    backend.failures = [ValueError("a mistake")]
    with pytest.raises(ValueError, match="a mistake"):
        SessionManager(backend).wait_for_session()
    assert backend.done[-1] == "close"
