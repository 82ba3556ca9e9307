"""The passes of one name over a user's data; ``data_loop`` has the rules."""

from __future__ import annotations

from typing import Any

from supervise_core.boundary import StepCounter
from supervise_core.data_source import BatchSource


class Stream:
    """All passes of one name: how many there were, and where the current one stands."""

    def __init__(self, name: str, saved: dict[str, Any] | None = None, *, inside: bool = False, ranks: int = 1) -> None:
        state: dict[str, Any] = saved or {}
        self.name = name
        self.ranks = ranks
        """Among how many its passes are shared now; what is saved of one that is not gone on with yet may differ."""
        self.inside: bool = state.get("inside", inside)
        """Whether its passes are those of an epoch of ``sv.epochs``."""
        self.passes: int = state.get("passes", 0)
        self.in_epoch: int = state.get("in_epoch", 0)
        self.resuming: dict[str, Any] | None = state.get("current")
        self.seen = max(0, self.in_epoch - 1)
        self.source: BatchSource | None = None
        self.is_inner = False
        self.handed = 0
        self.in_hand = 0
        self.finished = True
        self.left_at: int | None = None
        """The step at which the program left the pass by a ``break``; None if it did not."""
        self.step_at_draw: int | None = None
        self.mark_at_draw: object = None
        self.largest_group: int = state.get("largest_group", 0)

    @property
    def trains(self) -> bool:
        """Whether steps were ever made with the items of this stream."""
        return self.largest_group > 0

    def settle(self, steps: StepCounter, *, asked: bool, counts: bool) -> None:
        """Apply rule 1 to the items in hand; ``asked``: the next item is being asked for."""
        step = steps.read()
        if self.in_hand:
            if step is None:
                if not asked:
                    return
                steps.counted += self.in_hand if counts else 0
            elif step == self.step_at_draw:
                return
            if step is not None or counts:
                self.largest_group = max(self.largest_group, self.in_hand)
            self.in_hand = 0
        self.step_at_draw = step

    def position(self, unused: int = 0, *, goes_on: bool = False) -> dict[str, Any]:
        """What is saved of it.

        ``unused`` is how many of the items handed out last are to be handed out again; ``goes_on``: a pass that was
        left is gone on with.
        """
        finished = self.finished and not goes_on
        current: dict[str, Any] | None = self.resuming
        if self.source is not None:
            current = {
                "consumed": self.handed - unused,
                "finished": finished,
                "ranks": self.ranks,
                "state": None if finished else self.source.state(),
            }
        in_epoch = self.in_epoch
        if self.is_inner:
            in_epoch, current = (1, current) if self.is_unfinished else (0, None)
        return {
            "inside": self.inside,
            "passes": self.passes,
            "in_epoch": in_epoch,
            "largest_group": self.largest_group,
            "current": current,
        }

    @property
    def is_unfinished(self) -> bool:
        """Whether a pass was begun that is neither exhausted nor left for good."""
        return self.source is not None and not self.finished

    def end_of_epoch(self) -> None:
        """Forget the passes of the epoch that has ended."""
        self.in_epoch = self.seen = 0
        self.forget()

    def forget(self) -> None:
        """Forget the last pass: the next one is a new one, also after a resume."""
        self.resuming = self.left_at = None
        if self.source is not None:
            self.source.close()
        self.source = None
        self.finished = True
