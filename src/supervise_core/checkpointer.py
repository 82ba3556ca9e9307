"""Saving: a snapshot at a boundary, written by a thread, committed, and what to do when the disk does not take it."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Final

from supervise_core.boundary import Appointment
from supervise_core.checkpoint_format import Base, CheckpointId, Written
from supervise_core.checkpoint_store import CheckpointStore
from supervise_core.clock import Clock
from supervise_core.coordinator import Coordinator
from supervise_core.errors import CheckpointDamagedError, LeaseError, SaveNotWantedError
from supervise_core.gathering import Gathering
from supervise_core.handover import Drafting, Handover, PendingSave
from supervise_core.manifest import Manifest
from supervise_core.report import RunReport
from supervise_core.retention import Kept, Retention
from supervise_core.staging import Arrived

_log = logging.getLogger(__name__)

RETRY_AFTER: Final = (5.0, 30.0)
"""Seconds until a save that failed is tried again, by how many failed in a row. One failure more ends the run."""


@dataclass(frozen=True, slots=True)
class CheckpointLabels:
    """What the manifests of one run have in common."""

    backend: str
    versions: Mapping[str, str]


class Checkpointer:
    """Takes snapshots on the training thread and commits them on a thread of its own, one at a time.

    ``capture(step, arrived)`` makes the ``PendingSave`` of this moment in the one staging memory there is, and calls
    ``arrived`` with each part that is in memory for good; so no snapshot is taken while another one is being written
    from there. The lock keeps the training thread and the one that saves
    beside the loop from taking two at once. A snapshot that only looks at the live tensors is written before whoever
    took it goes on, and so none of them is held for later.
    """

    def __init__(
        self,
        store: CheckpointStore,
        keep: Retention,
        labels: CheckpointLabels,
        capture: Callable[[int, Arrived | None], PendingSave],
        coordinator: Coordinator,
        report: RunReport,
        committed: Callable[[str, int], None],
        gathering: Gathering,
    ) -> None:
        self._store = store
        self._keep = keep
        self._labels = labels
        self._capture = capture
        self._coordinator = coordinator
        self._clock: Clock = coordinator.clock
        self._report = report
        self._committed = committed
        self._gathering = gathering
        self.agree: Callable[[], bool] | None = None
        """See ``Appointment``."""
        self._appointment: Appointment | None = None
        self._queue: queue.SimpleQueue[Handover | Callable[[], None] | None] = queue.SimpleQueue()
        self._left_to_do = 0
        self._counting = threading.Lock()
        self._idle = threading.Event()
        self._idle.set()
        self._wanted = False
        self._held: PendingSave | None = None
        self._failures = 0
        self._known: dict[CheckpointId, Kept] = {}
        self._branch: set[CheckpointId] = set()
        self._base: Base | None = None
        self._stall = self._beside_cost = 0.0
        self._thread: threading.Thread | None = None
        self._taking = threading.Lock()
        self._final_error: BaseException | None = None
        self._broken: BaseException | None = None
        """What the writer's thread has died of."""

    # ---- the training thread

    def start(self) -> None:
        """Start the writer."""
        self._branch = set(self._store.checkpoints())
        self._thread = threading.Thread(target=self._write_until_told, name="supervise-core checkpoints", daemon=True)
        self._thread.start()

    def serve(self, appointment: Appointment) -> None:
        """Take saves from the appointment on."""
        self._appointment = appointment
        appointment.agree = self.agree
        appointment.skip = None if self.agree is None else self._gathering.skip
        appointment.cost = self.cost
        appointment.plan_again()

    def cost(self) -> float:
        """Seconds of training that a save takes, by the last ones: what the loop waits, and what the writer computes.

        That is the most that it can be: where there are processors to spare, the writer costs less.
        """
        return self._stall + self._beside_cost

    def request(self) -> None:
        """Have a save taken at the next boundary; nothing where none are served."""
        if self._appointment is not None:
            self._appointment.request()

    def grant(self) -> None:
        """Have the save taken at this boundary that all processes agreed on; nothing where none are served."""
        if self._appointment is not None:
            self._appointment.grant()

    @property
    def is_serving(self) -> bool:
        """Whether saves are taken at all."""
        return self._thread is not None

    @property
    def is_busy(self) -> bool:
        return not self._idle.is_set()

    @property
    def metrics_ranked(self) -> frozenset[str]:
        """The metrics that decide which checkpoints are kept."""
        return self._keep.metrics()

    def prepare(self, make_memory: Callable[[], None]) -> None:
        """Have the writer make memory for snapshots to come. Saves wait for that as for one that is being written."""
        self._enqueue(make_memory)

    def check(self, step: int) -> None:
        """Take a snapshot for nothing: what cannot be kept is found now, and the staging memory is there.

        :raises UnsupportedStateError: for what cannot be kept.
        """
        began = self._clock.monotonic()
        pending = self._capture(step, None)
        self._stall = self._clock.monotonic() - began
        self._store.format.check(pending.snapshot, pending.run_state)

    def save(self, step: int, *, wait: bool) -> None:
        """Take a snapshot and have it written.

        While another one is being written: ``wait`` for it, if this very step is wanted; or else take it at the first
        boundary after that.
        """
        if not wait and self._is_put_off():
            return
        with self._taking:
            began = self._clock.monotonic()
            failures = self._failures
            self._await_idle()
            if self._failures > failures:
                return  # the one waited for failed; the next try has its time already
            self._held = None
            self._take_and_submit(step)
            self._stall = self._clock.monotonic() - began

    def save_beside(self, capture: Callable[[], PendingSave]) -> None:
        """Have a snapshot written that another thread than the training thread takes, if the memory is free for it."""
        if not self._taking.acquire(blocking=False):
            return
        try:
            if self.is_serving and not self.is_busy and self._held is None:
                self._submit(capture())
        finally:
            self._taking.release()

    def hold(self, step: int) -> None:
        """Take a snapshot and keep it in memory, in case it turns out to be the last one that may be saved."""
        with self._taking:
            if not self.is_busy:
                self._hold(self._capture(step, None))

    def hold_final(self, step: int) -> None:
        """As ``hold``, but wait for the save that is being written, for its memory."""
        with self._taking:
            self._await_idle()
            self._hold(replace(self._capture(step, None), final=True))

    def _hold(self, pending: PendingSave) -> None:
        failures = self._failures
        if pending.snapshot.is_live:
            self._submit(pending)
        self._held = pending if self._failures == failures else None

    @property
    def held_step(self) -> int | None:
        return None if self._held is None else self._held.step

    def drop(self) -> None:
        """Forget the snapshot held."""
        self._held = None

    def submit_final(self) -> bool:
        """Have the snapshot held written as the last one of the run; whether there was one."""
        held, self._held = self._held, None
        if held is not None and not held.snapshot.is_live:  # what is live was written when it was held
            self._submit(replace(held, final=True))
        return held is not None

    def drain(self) -> None:
        """Wait until what was submitted is written."""
        self._await_idle()

    def finish(self) -> BaseException | None:
        """Wait until what was submitted is written, and end the writer. The error of the final save, if it failed."""
        self._await_idle()
        thread, self._thread = self._thread, None
        if thread is not None:
            self._queue.put(None)
            thread.join()
        return self._final_error

    def _take_and_submit(self, step: int) -> None:
        """Take a snapshot, of which the writer has each part as soon as it is there."""
        handover = Handover(step)
        try:
            self._hand_over(handover)
            pending = self._capture(step, handover.add)
            handover.complete(pending)
        finally:
            handover.break_off()
        self._await_live(pending)

    def _submit(self, pending: PendingSave) -> None:
        self._hand_over(Handover.of(pending))
        self._await_live(pending)

    def _hand_over(self, handover: Handover) -> None:
        if not self._enqueue(handover):
            self._final_error = self._broken

    def _enqueue(self, job: Handover | Callable[[], None]) -> bool:
        """Whether somebody is there to do it."""
        with self._counting:
            if self._broken is not None:
                return False
            self._left_to_do += 1
            self._idle.clear()
            self._queue.put(job)
            return True

    def _is_put_off(self) -> bool:
        """Whether a save has to wait for its turn; then the writer, when it has nothing left to do, asks for it."""
        with self._counting:
            self._wanted = self._left_to_do > 0
            return self._wanted

    def _one_is_done(self) -> None:
        with self._counting:
            self._left_to_do -= 1
            if self._left_to_do:
                return
            is_wanted, self._wanted = self._wanted, False
            self._idle.set()
        if is_wanted and self._appointment is not None:
            self._appointment.request()

    def _await_live(self, pending: PendingSave) -> None:
        if pending.snapshot.is_live:
            self._await_idle()

    def _await_idle(self) -> None:
        """Bounded by the disk alone; says what it waits for."""
        began = self._clock.monotonic()
        while not self._clock.wait(self._idle, 10):
            waited = self._clock.monotonic() - began
            _log.warning("still waiting for the writer of checkpoints in %s, for %.0f s", self._store.location, waited)

    # ---- the writer's thread

    def _write_until_told(self) -> None:
        while (job := self._queue.get()) is not None:
            try:
                if isinstance(job, Handover):
                    self._write(job)
                else:
                    job()
            except BaseException as error:
                with self._counting:
                    self._broken = error
                self._coordinator.request_stop(error, source="service 'checkpoints'")
                with self._counting:  # only now, or the run could end before it knows why
                    self._left_to_do = 0
                    self._idle.set()
                return
            del job
            self._one_is_done()

    def _write(self, handover: Handover) -> None:
        with Drafting(self._store, self._base) as drafting:
            began = time.thread_time()
            drafting.write_early(handover)
            pending = handover.await_pending()
            if pending is not None:
                self._finish(pending, drafting, began)

    def _finish(self, pending: PendingSave, drafting: Drafting, began: float) -> None:
        try:
            helped = self._commit(pending, drafting)
        except SaveNotWantedError as error:
            if pending.final:
                self._final_error = error
            _log.log(logging.WARNING if pending.final else logging.INFO, "%s", error)  # the chief has said why
        except Exception as error:
            self._failed(pending, error)
        else:
            self._failures = 0
            self._beside_cost = 0.0 if pending.snapshot.is_live else time.thread_time() - began + helped
            if self._appointment is not None:
                self._appointment.plan_again()

    def _failed(self, pending: PendingSave, error: Exception) -> None:
        self._failures += 1
        lost = not isinstance(error, OSError) or isinstance(error, LeaseError)
        _log.error(
            "the checkpoint of step %d could not be saved in %s (failure %d in a row): %s",
            pending.step, self._store.location, self._failures, error, exc_info=lost,
        )  # fmt: skip
        if pending.final:
            self._final_error = error
        if lost or pending.final or self._failures > len(RETRY_AFTER):
            self._coordinator.request_stop(error, source="service 'checkpoints'")
        elif self._appointment is not None:
            self._wanted = False
            if self._gathering.decides:
                self._appointment.postpone(RETRY_AFTER[self._failures - 1])
        self._report.failed_saves += 1  # last: who sees it may count on the next try having its time

    def _commit(self, pending: PendingSave, drafting: Drafting) -> float:
        """Write and commit, prune, and tell; the processor time of other threads that this took, in seconds."""
        same_step = [checkpoint for checkpoint in self._store.checkpoints() if checkpoint.step == pending.step]
        older = same_step[-1] if same_step else None
        if older is not None and not pending.consistent:
            return 0.0  # what is there is as good or better
        checkpoint = CheckpointId(pending.step, 0 if older is None else older.revision + 1)
        draft, writer = drafting.begin(checkpoint, pending)
        try:
            self._gathering.begin(draft, pending.step, pending.final)
            written = writer.write(pending.snapshot, pending.run_state)
            written = self._gathering.complete(draft, written)
            manifest = self._manifest(pending, written)
            if older is not None and self._is_same(older, manifest):
                drafting.discard()
                self._gathering.end(self._store.name_of(older))
                return written.helped
            self._base = None  # should this fail, the name may be that of this checkpoint or of the older one
            committed = draft.commit(manifest, replaces=older)
            drafting.keep()
            self._base = Base(committed, written.placed)
        except Exception as error:
            drafting.discard()
            self._gathering.end(None, str(error))
            raise
        self._report.saves += 1
        self._report.last_saved = self._store.name_of(committed)
        self._gathering.end(self._report.last_saved)
        _log.info("saved %s in %s", self._report.last_saved, self._store.location)
        self._committed(self._report.last_saved, pending.step)
        self._known.pop(committed, None)
        self._retire_later(pending.step)
        self._branch.add(committed)
        prune(self._store, self._keep, self._known)
        return written.helped

    def _retire_later(self, step: int) -> None:
        """The program set its step back: what bears a higher one is of a branch that is gone on with no more.

        That is what was there before or is our own; the program itself may have saved a later step just now.
        """
        later = [there for there in self._store.checkpoints() if there.step > step and there in self._branch]
        for checkpoint in later:
            self._store.retire(checkpoint)
        if later:
            _log.warning(
                "the step was set back to %d: moved %d checkpoint(s) of later steps out of the way, into the folder "
                "'retired' of %s; delete them when you like", step, len(later), self._store.location,
            )  # fmt: skip

    def _manifest(self, pending: PendingSave, written: Written) -> Manifest:
        return Manifest(
            step=pending.step,
            backend=self._labels.backend,
            wall_time=self._clock.time(),
            parts=tuple(pending.snapshot.parts),
            files=written.files,
            metrics=pending.metrics,
            consistent=pending.consistent,
            run=written.run,
            versions=self._labels.versions,
        )

    def _is_same(self, checkpoint: CheckpointId, manifest: Manifest) -> bool:
        try:
            with self._store.open(checkpoint) as reader:
                there = reader.manifest()
        except (CheckpointDamagedError, FileNotFoundError):
            return False
        known, new = ((one.files, one.run, one.metrics, one.consistent) for one in (there, manifest))
        return known == new


def prune(store: CheckpointStore, keep: Retention, read_before: dict[CheckpointId, Kept] | None = None) -> None:
    """Remove what retention does not keep; never the newest, and nothing whose manifest cannot be read.

    A failure to remove is logged and left for the next time: the new checkpoint is safe. ``read_before`` remembers what
    manifests say between calls; what is there is listed anew each time.

    :raises LeaseLostError: if another writer has taken over.
    """
    remembered = {} if read_before is None else read_before
    known: dict[CheckpointId, Kept] = {}
    for checkpoint in store.checkpoints():
        facts = remembered.get(checkpoint) or _facts_of(store, checkpoint)
        if facts is not None:
            known[checkpoint] = remembered[checkpoint] = facts
    current = {checkpoint.step: checkpoint for checkpoint in known}  # of each step, the last revision
    kept = keep.keep([known[checkpoint] for checkpoint in current.values()]) | {max(current, default=0)}
    for checkpoint in known:
        if checkpoint is current[checkpoint.step] and checkpoint.step in kept:
            continue
        try:
            store.remove(checkpoint)
        except LeaseError:
            raise
        except OSError as error:
            _log.error("%s could not be removed from %s: %s", store.name_of(checkpoint), store.location, error)


def _facts_of(store: CheckpointStore, checkpoint: CheckpointId) -> Kept | None:
    try:
        with store.open(checkpoint) as reader:
            manifest = reader.manifest()
    except (CheckpointDamagedError, OSError):
        return None
    return Kept(checkpoint.step, manifest.wall_time, manifest.metrics, manifest.consistent)
