"""The writer's beat: it tells writers on other machines that this one lives, for as long as it holds the lease."""

from __future__ import annotations

import logging
import threading
from types import TracebackType
from typing import Final

from supervise_core.checkpoint_store import CheckpointStore
from supervise_core.coordinator import Coordinator
from supervise_core.lease import BEAT_EVERY

_log = logging.getLogger(__name__)

_LAST_BEAT: Final = BEAT_EVERY
"""Seconds that the end of a run waits for a beat that the disk does not take."""


class LeaseKeeper:
    """Holds the lease of a store for the length of a block, beating all the while, and stops the run if it is lost.

    The beat has a life of its own, and is no service of the run: bringing a large model up comes before the services,
    and the final save after they were stopped, and either may take longer than a silent writer is believed in.
    """

    def __init__(self, store: CheckpointStore, coordinator: Coordinator) -> None:
        self._store = store
        self._coordinator = coordinator
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._beat_until_over, name="supervise-core lease", daemon=True)

    def __enter__(self) -> None:
        """:raises LeaseHeldError: if there is another writer; says who."""
        self._store.acquire()
        self._thread.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._coordinator.clock.join(self._thread, _LAST_BEAT)
        self._store.release()

    def _beat_until_over(self) -> None:
        with self._coordinator.stop_on_exception("the lease"):
            while not self._coordinator.clock.wait(self._over, BEAT_EVERY):
                self._beat()

    def _beat(self) -> None:
        """A beat that the disk does not take is no reason to stop; a lease that is lost is.

        :raises LeaseLostError: if another writer has taken over.
        """
        try:
            self._store.beat()
        except OSError as error:
            _log.warning("the lease of %s could not be renewed (%s); trying again", self._store.location, error)
