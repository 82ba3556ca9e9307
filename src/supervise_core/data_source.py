"""One pass over a user's data, that can say where it is and go on from there."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any

from supervise_core.errors import DataPositionError
from supervise_core.process_random import RandomState


class BatchSource(ABC):
    """A pass over data. ``start`` is called once, then ``draw`` until it raises ``StopIteration``, then ``close``."""

    @abstractmethod
    def start(self, number: int, state: Any, consumed: int) -> None:
        """Begin the pass ``number`` of the run (counted from 0), or, with a saved ``state``, go on with it.

        ``consumed`` is how many items of the pass were used already; 0 in a new pass, where ``state`` is None.

        :raises DataPositionError: if the data does not fit the saved state.
        """

    def start_among(self, number: int, state: Any, consumed: int, ranks: tuple[int, int]) -> None:
        """As ``start``, with the ``state`` of a run on another number of ranks: ``(saved, now)``.

        What was used of the data is then known only where all ranks draw from one order.

        :raises DataPositionError: where that is not so, as for most sources.
        """
        saved, now = ranks
        raise DataPositionError(
            f"a pass over the data was begun on {saved} ranks, and there are {now} now; how to go on is only known "
            "where all ranks share one order (a DistributedSampler); go on with as many ranks as before"
        )

    @abstractmethod
    def draw(self) -> Any:
        """The next item.

        :raises StopIteration: at the end of the pass.
        """

    @abstractmethod
    def state(self) -> Any:
        """What ``start`` needs to go on after the items drawn so far; plain data."""

    @property
    def state_before_last_draw(self) -> bool:
        """Whether ``state`` serves for a position before the item drawn last, too."""
        return True

    def length(self) -> int | None:
        """How many items the whole pass has; None if nobody knows."""
        return None

    def ends_with(self, error: BaseException) -> bool:
        """Whether an error of ``draw``, after a stop was requested, only says that the data's workers stopped too."""
        return False

    def close(self) -> None:
        """Let go of the data; called once or more."""
        return None


def is_stateful(data: Any) -> bool:
    """Whether the data keeps its own position: it has ``state_dict`` and ``load_state_dict``."""
    return callable(getattr(data, "state_dict", None)) and callable(getattr(data, "load_state_dict", None))


def length_of(data: Any) -> int | None:
    """``len(data)``, or None where there is none."""
    try:
        return len(data)
    except TypeError:
        return None


class StatefulSource(BatchSource):
    """Data that keeps its own position."""

    def __init__(self, data: Any) -> None:
        self._data = data
        self._items: Iterator[Any] = iter(())

    def start(self, number: int, state: Any, consumed: int) -> None:
        if state is not None:
            self._data.load_state_dict(state)
        self._items = iter(self._data)

    def draw(self) -> Any:
        return next(self._items)

    def state(self) -> Any:
        return self._data.state_dict()

    @property
    def state_before_last_draw(self) -> bool:
        return False

    def length(self) -> int | None:
        return length_of(self._data)


class ReplayedSource(BatchSource):
    """Any iterable. To go on with a pass, it is begun again in the random state of its beginning, and the items that
    were used already are drawn and dropped; then the loop's own random state is put back.

    So an order that is drawn when the pass begins comes out the same, and what is drawn item by item goes on from the
    random state of the checkpoint.
    """

    def __init__(
        self, data: Any, random_state: Callable[[], RandomState], set_random_state: Callable[[RandomState], None]
    ) -> None:
        iter_method = getattr(type(data), "__iter__", None) or getattr(type(data), "__getitem__", None)
        if iter_method is None:
            raise TypeError(f"sv.batches takes something to iterate over, not {data!r}")
        self._data = data
        self._random_state = random_state
        self._set_random_state = set_random_state
        self._beginning: RandomState = {}
        self._items: Iterator[Any] = iter(())

    def start(self, number: int, state: Any, consumed: int) -> None:
        here = self._random_state()
        self._beginning = here if state is None else state
        if state is None:
            self._items = iter(self._data)
            return
        self._set_random_state(state)
        try:
            self._items = iter(self._data)
            skipped = sum(1 for _ in itertools.islice(self._items, consumed))
        finally:
            self._set_random_state(here)
        if skipped < consumed:
            raise DataPositionError(
                f"the data has {skipped} items where the checkpoint says that {consumed} of them were used; "
                "resume with the data that the run was saved with"
            )

    def draw(self) -> Any:
        return next(self._items)

    def state(self) -> Any:
        return self._beginning

    def length(self) -> int | None:
        return length_of(self._data)
