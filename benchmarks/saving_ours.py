"""A run under a ``Supervisor``, and what is timed of it: a save as the loop feels it, until it is durable, and back."""

from __future__ import annotations

import inspect
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

from benchmarks.saving_limits import cached_share, forget
from benchmarks.saving_state import FalseFigureError, State
from supervise_core import CheckpointDirectory, KeepLatest, Supervisor
from supervise_core.checkpoint_files import read_checkpoint
from supervise_core.directory_store import open_checkpoint_directory
from supervise_torch import TorchBackend

_PATIENCE = 300.0


class Saved(NamedTuple):
    """Seconds: what the loop waited, and from the same beginning until the checkpoint was committed."""

    stall: float
    durable: float


class Supervised:
    """One session over a state. Saves are taken when asked for."""

    def __init__(self, state: State, folder: Path, **options: Any) -> None:
        self._state = state
        self._folder = folder
        chosen: dict[str, Any] = {"save_every": None, "summarize_every": None, "keep": KeepLatest(1)} | options
        self.sv = Supervisor(
            TorchBackend(model=state.model, optimizer=state.optimizer), folder, signals=False, **chosen
        )
        self._context: Any = None
        self._saves = 0
        self._patient_until = 0.0

    def __enter__(self) -> Self:
        self._context = self.sv.managed_session()
        self._context.__enter__()
        self._offset = self._state.steps - self.sv.global_step
        while not self.sv.report.saves:
            time.sleep(0.001)
        self.settle()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._context.__exit__(kind, error, trace)

    # ---- saving

    def begin(self) -> None:
        """Have a save taken, on this thread, as ``should_stop`` does when one is due; that is the stall."""
        self._expect_save()
        self.sv.save()
        self.sv.should_stop()

    def is_done(self) -> bool:
        """Whether the save is committed."""
        if self.sv.report.failed_saves or time.monotonic() > self._patient_until:
            raise FalseFigureError(f"a save was not committed: {self.sv.report}")
        return self.sv.report.saves > self._saves

    def save(self) -> Saved:
        """Save, and wait."""
        self._expect_save()
        self.sv.save()
        began = time.perf_counter()
        self.sv.should_stop()
        stall = time.perf_counter() - began
        while not self.is_done():
            time.sleep(0.0002)
        return Saved(stall, time.perf_counter() - began)

    def _expect_save(self) -> None:
        self._saves = self.sv.report.saves
        self._patient_until = time.monotonic() + _PATIENCE

    def settle(self) -> None:
        """Wait until the writer is idle: what is not kept any more is gone."""
        end = time.monotonic() + _PATIENCE
        while not self.is_idle():
            if time.monotonic() > end:
                raise FalseFigureError(f"there is more than one checkpoint in {self._folder}")
            time.sleep(0.002)
        time.sleep(0.01)

    @property
    def path(self) -> Path:
        """The newest checkpoint."""
        return CheckpointDirectory(self._folder).newest().path

    @property
    def files(self) -> list[Path]:
        """With the tensors."""
        return sorted(self.path.glob("*.safetensors"))

    def is_idle(self) -> bool:
        """Whether there is one checkpoint and no other on its way or on its way out."""
        return len(self._directories()) == 1 and not self._drafts()

    def _drafts(self) -> bool:
        try:
            return any(
                path.parent.name.startswith(("draft-", "trash-")) for path in self._folder.rglob("*.safetensors")
            )
        except FileNotFoundError:
            return True

    def _directories(self) -> set[Path]:
        try:
            return {path.parent for path in self._folder.rglob("state.json")}
        except FileNotFoundError:
            return set()

    # ---- restoring

    def restore_warm(self, into: State) -> float:
        """Seconds to restore and verify the newest checkpoint from the page cache; checked against the state."""
        for file in self.files:
            file.read_bytes()
        return self._restore(into)

    def restore_cold(self, into: State) -> float:
        """The same while the page cache holds nothing of it."""
        files = sorted(self.path.iterdir())
        forget(files)
        if (share := cached_share(files)) > 0.01:
            raise FalseFigureError(f"{share:.0%} of the checkpoint are in the page cache still")
        return self._restore(into)

    def check(self, into: State) -> None:
        """Restore the newest checkpoint and see that it holds the one step that it says."""
        self._restore(into)

    def _restore(self, into: State) -> float:
        into.scramble()
        path = self.path
        with loading(into) as (backend, session):
            began = time.perf_counter()
            with open_checkpoint_directory(path) as reader:
                content = read_checkpoint(reader)
                backend.load(session, content.parts)
                content.verify_the_rest()
            taken = time.perf_counter() - began
        self._state.check(into.named(), content.manifest.step + self._offset)
        return taken


@contextmanager
def loading(into: State) -> Iterator[tuple[TorchBackend, Any]]:
    """A session to load a checkpoint into."""
    backend = TorchBackend(model=into.model, optimizer=into.optimizer)
    session = backend.create_session()
    try:
        yield backend, session
    finally:
        backend.close_session(session)


def without_staging() -> dict[str, Any] | None:
    """The argument of a Supervisor that saves without memory of its own; None where this version has none."""
    annotation = str(inspect.signature(Supervisor.__init__).parameters["staging"].annotation)
    return {"staging": "none"} if "str" in annotation or "Literal" in annotation else None
