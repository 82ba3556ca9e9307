"""Bringing a model up: recover it from its newest good checkpoint, or initialise it, or wait until somebody has."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

from supervise_core.backend import Backend
from supervise_core.checkpoint_store import CheckpointStore
from supervise_core.clock import Clock
from supervise_core.coordinator import StopSignal
from supervise_core.errors import (
    NotReadyError,
    ReadinessTimeoutError,
    SessionStateError,
)
from supervise_core.operations import Operations
from supervise_core.readiness import NotReady, Readiness, Ready
from supervise_core.recovery import CheckpointRecovery, Recovery, Resume

_log = logging.getLogger(__name__)

SessionT = TypeVar("SessionT")

_FIRST_POLL: Final = 0.01
_SAY_EVERY: Final = 10.0
_CHIEFS_MODEL: Final = "the chief's model"


@dataclass(frozen=True, slots=True)
class _Patience:
    """How long is waited for something, since when, and what ends the wait early."""

    seconds: float
    stop: StopSignal
    began: float

    @classmethod
    def from_now(cls, seconds: float, stop: StopSignal) -> _Patience:
        return cls(seconds, stop, stop.clock.monotonic())

    @property
    def left(self) -> float:
        return self.began + self.seconds - self.stop.clock.monotonic()

    def pause(self, seconds: float, what: str, answer: NotReady) -> None:
        """Wait for a moment before the next look at ``what``.

        :raises ReadinessTimeoutError: if the time is up.
        :raises SessionStateError: when a stop is requested meanwhile.
        """
        if (left := self.left) <= 0:
            raise ReadinessTimeoutError(f"waited {self.seconds:g} s for {what}: {answer.reason}")
        if self.stop.wait_for_stop(min(seconds, left)):
            raise SessionStateError(f"stopped while waiting for {what}: {answer.reason}")


class SessionManager(Generic[SessionT]):
    """Makes sessions whose model is ready. Usable on its own::

        with store.writing():
            session = SessionManager(backend, store=store).prepare_session()

    Without the lease nothing in the store is changed: what is damaged is then passed over, and not set aside.
    """

    def __init__(
        self,
        backend: Backend[SessionT],
        operations: Operations[SessionT] | None = None,
        store: CheckpointStore | None = None,
        clock: Clock | None = None,
        longest_poll: float = 1.0,
    ) -> None:
        """``longest_poll``: seconds between two looks at what is waited for, which begin with a hundredth of one."""
        self._backend = backend
        self._operations = operations or Operations.of(backend)
        self._store = store
        self._stop = StopSignal(clock)
        self._longest_poll = longest_poll
        self.recovery = Recovery()
        """What the last call did."""

    def prepare_session(
        self,
        master: str = "",
        config: object = None,
        *,
        resume: Resume = "auto",
        wait_for_checkpoint: bool = False,
        max_wait_secs: float = 7200.0,
        stop: StopSignal | None = None,
    ) -> SessionT:
        """A session with a model that is ready: restored, or else initialised (``init``, then ``init_fn``).

        Then ``ready_for_local_init`` is asked, ``local_init`` run, and ``ready`` asked. With ``wait_for_checkpoint``
        somebody else puts the first checkpoint there, and it is waited for. A model that lives outside of this process,
        and which an earlier chief of this run has made ready, is taken as it is: newer than any checkpoint.

        :raises NotReadyError: if it is not ready after all that; says what is missing, by name.
        :raises ReadinessTimeoutError: if no checkpoint came within ``max_wait_secs``.
        :raises CheckpointError: if it cannot be restored and must not be begun anew.
        :raises OSError: as the storage fails.
        """
        self.recovery = Recovery()
        patience = _Patience.from_now(max_wait_secs, stop or self._stop)
        with ExitStack() as on_failure:
            session = self._create(master, config, on_failure, patience)
            if not self._finds_ready(session, resume):
                if wait_for_checkpoint:
                    self._await_checkpoint(patience)
                self._make_ready(session, resume)
            on_failure.pop_all()
            return session

    def recover_session(
        self,
        master: str = "",
        config: object = None,
        *,
        wait_for_checkpoint: bool = False,
        max_wait_secs: float = 7200.0,
    ) -> tuple[SessionT, bool]:
        """A session, and whether its model was restored and is ready. Nothing is initialised but locally.

        :raises ReadinessTimeoutError: if a checkpoint is waited for and none came within ``max_wait_secs``.
        :raises CheckpointError: if there are checkpoints, and none can be restored.
        """
        self.recovery = Recovery()
        patience = _Patience.from_now(max_wait_secs, self._stop)
        with ExitStack() as on_failure:
            session = self._create(master, config, on_failure, patience)
            if wait_for_checkpoint:
                self._await_checkpoint(patience)
            restored = self._recover(session, "auto")
            ready = isinstance(self._try_local_init(session), Ready) and restored
            if ready and isinstance(answer := self._readiness(session), NotReady):
                _log.info("restored, but not ready: %s", answer.reason)
                ready = False
            on_failure.pop_all()
            return session, ready

    def wait_for_session(
        self,
        master: str = "",
        config: object = None,
        max_wait_secs: float = 7200.0,
        stop: StopSignal | None = None,
    ) -> SessionT:
        """A session whose model somebody else makes ready; asked at first every 10 ms, later every second.

        A session whose peers are lost meanwhile is replaced by a new one.

        :raises ReadinessTimeoutError: when ``max_wait_secs`` have passed; says what is missing.
        :raises SessionStateError: when a stop is requested meanwhile.
        """
        self.recovery = Recovery()
        patience = _Patience.from_now(max_wait_secs, stop or self._stop)
        pause = _FIRST_POLL
        while True:
            try:
                return self._wait_in_one_session(master, config, patience)
            except self._backend.recoverable as error:
                lost = NotReady(f"{type(error).__name__}: {error}")
                _log.info("lost a peer while waiting for %s, so beginning again; %s", _CHIEFS_MODEL, lost.reason)
            patience.pause(pause, _CHIEFS_MODEL, lost)
            pause = min(pause * 1.5, self._longest_poll)

    def adopt_session(
        self,
        master: str,
        config: object,
        checkpoint: str | None,
        rank: int,
        max_wait_secs: float = 7200.0,
        stop: StopSignal | None = None,
    ) -> SessionT:
        """A session with the model that the chief of several processes has made ready: the same checkpoint, as this
        rank finds it; or initialised in the same way, where nothing is kept.

        :raises NotReadyError: if it is not ready after that; says what is missing, by name.
        :raises CheckpointError: if it cannot be restored.
        :raises OSError: as the storage fails.
        """
        self.recovery = Recovery()
        patience = _Patience.from_now(max_wait_secs, stop or self._stop)
        with ExitStack() as on_failure:
            session = self._create(master, config, on_failure, patience)
            if checkpoint is None:
                self._initialise(session)
            else:
                self._from_checkpoints().recover_as_announced(session, checkpoint, rank)
            self._run_local_init(session)
            if isinstance(answer := self._readiness(session), NotReady):
                raise NotReadyError(f"the model is not ready: {answer.reason}. Done so far: {self.recovery}.")
            on_failure.pop_all()
            return session

    # ---- steps

    def _wait_in_one_session(self, master: str, config: object, patience: _Patience) -> SessionT:
        with ExitStack() as on_failure:
            session = self._create(master, config, on_failure, patience)
            self._wait_until(lambda: self._adopt(session), _CHIEFS_MODEL, patience)
            on_failure.pop_all()
            return session

    def _create(self, master: str, config: object, on_failure: ExitStack, patience: _Patience) -> SessionT:
        """A session, once all whom its creation would wait for answer."""
        self._wait_until(lambda: self._backend.peers(master, config), "the tasks that the model needs", patience)
        session = self._backend.create_session(master, config)
        on_failure.callback(self._backend.close_session, session)
        return session

    def _finds_ready(self, session: SessionT, resume: Resume) -> bool:
        """Whether the model lives on as an earlier chief of this run made it, and is to be gone on with."""
        store = self._store
        if resume not in ("auto", "must") or (store is not None and store.preferred() is not None):
            return False
        if not self._backend.was_made_ready(session, self._identity) or isinstance(self._adopt(session), NotReady):
            self.recovery = Recovery()
            return False
        self.recovery.found_ready = True
        return True

    def _identity(self) -> str:
        return "" if self._store is None else self._store.identity()

    def _make_ready(self, session: SessionT, resume: Resume) -> None:
        self._backend.announce_ready(session, None)
        if not self._recover(session, resume):
            self._initialise(session)
        self._run_local_init(session)
        self._backend.announce_ready(session, self._identity)
        if isinstance(answer := self._readiness(session), NotReady):
            raise NotReadyError(f"the model is not ready: {answer.reason}. Done so far: {self.recovery}.")

    def _initialise(self, session: SessionT) -> None:
        operations = self._operations
        if operations.init is None and operations.init_fn is None and operations.local_init is None:
            raise NotReadyError(
                "no checkpoint was restored, and init, init_fn and local_init are all None, so nothing can make the "
                "model ready; pass init= or init_fn="
            )
        if operations.init is not None:
            operations.init(session)
            self.recovery.ran.append("init")
        if operations.init_fn is not None:
            operations.init_fn(session)
            self.recovery.ran.append("init_fn")

    def _run_local_init(self, session: SessionT) -> None:
        if isinstance(answer := self._try_local_init(session), NotReady):
            raise NotReadyError(
                f"the model is not ready for local_init: {answer.reason}. Done so far: {self.recovery}."
            )

    def _try_local_init(self, session: SessionT) -> Readiness:
        operations = self._operations
        if operations.local_init is None:
            return Ready()
        if operations.ready_for_local_init is not None:
            answer = operations.ready_for_local_init(session)
            self.recovery.ran.append("ready_for_local_init")
            if isinstance(answer, NotReady):
                return answer
        operations.local_init(session)
        self.recovery.ran.append("local_init")
        return Ready()

    def _readiness(self, session: SessionT) -> Readiness:
        if self._operations.ready is None:
            return Ready()
        answer = self._operations.ready(session)
        self.recovery.ran.append("ready")
        return answer

    def _adopt(self, session: SessionT) -> Readiness:
        self.recovery = Recovery()
        answer = self._try_local_init(session)
        return answer if isinstance(answer, NotReady) else self._readiness(session)

    def _wait_until(self, check: Callable[[], Readiness], what: str, patience: _Patience) -> None:
        """Ask again and again, soon at first, until the answer is ready.

        :raises ReadinessTimeoutError: if the time is up; says what is missing.
        :raises SessionStateError: when a stop is requested meanwhile.
        """
        clock = patience.stop.clock
        said = clock.monotonic()
        poll = min(_FIRST_POLL, self._longest_poll)
        while isinstance(answer := check(), NotReady):
            if (now := clock.monotonic()) - said >= _SAY_EVERY:
                said = now
                left = max(0.0, patience.left)
                _log.info("waiting for %s, for %.0f more seconds at most: %s", what, left, answer.reason)
            patience.pause(poll, what, answer)
            poll = min(poll * 1.5, self._longest_poll)

    # ---- recovery

    def _await_checkpoint(self, patience: _Patience) -> None:
        store = self._store
        if store is None or self._operations.load is None:
            raise NotReadyError("there is nothing to wait for: without a logdir and a saver no checkpoint is restored")
        missing = NotReady(f"there is no checkpoint in {store.location}")
        self._wait_until(lambda: Ready() if store.checkpoints() else missing, "a checkpoint", patience)

    def _recover(self, session: SessionT, resume: Resume) -> bool:
        return self._from_checkpoints().recover(session, resume)

    def _from_checkpoints(self) -> CheckpointRecovery[SessionT]:
        return CheckpointRecovery(self._store, self._operations.load, self.recovery)
