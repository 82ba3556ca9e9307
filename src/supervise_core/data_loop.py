"""Where the training loop stands in its data: ``sv.epochs`` and ``sv.batches``, and when a position may be saved.

Rule 1. An item is *used* when the global step has moved since it was handed out; where nothing counts steps, when the
        next one is asked for. A position is saved only while every item handed out is used: it never holds half a step.
Rule 2. While a ``batches`` is open, the boundary is the ``next()`` of the outermost one. What is opened and exhausted
        inside its body (a validation pass) belongs to the step: a stop does not cut it short, and no position of it is
        saved. What is still open at the boundary (two passes in step, by ``zip``) is gone on with.
Rule 3. From the end of a training pass until the epoch ends (or steps are made again) there is no boundary: the program
        validates and steps its scheduler there, and a resumed run enters that stretch from its beginning.
Rule 4. "Epoch e is exhausted" is not "epoch e + 1 has begun". A resumed run is given epoch e again, its passes that are
        exhausted yield nothing, and what follows them in the epoch's body runs.
Rule 5. A resumed epoch is entered in the random state of its beginning, so that an order that the program draws in its
        body is the same one; where the saved pass is opened again, the random state of the checkpoint is put back.
Rule 6. On a stop, a pass goes on until the items in hand are used (an accumulation is completed), within bounds.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Any, Final, NamedTuple

from supervise_core.boundary import StepBoundary, StepCounter
from supervise_core.coordinator import Coordinator
from supervise_core.data_source import BatchSource
from supervise_core.data_stream import Stream
from supervise_core.errors import SessionStateError
from supervise_core.process_random import RandomState

_EXTRA_ITEMS_ON_STOP: Final = 8  # beyond the largest group seen: skipped AMP steps


class RandomPort(NamedTuple):
    """All random state that the program may draw from, as a whole."""

    get: Callable[[], RandomState]
    set: Callable[[RandomState], None]


def _keep_to_oneself(_name: str, _value: object) -> None:
    return None


SourceFactory = Callable[[Any, int], BatchSource]


class DataLoop:
    """The data positions of one run."""

    def __init__(
        self,
        source_of: SourceFactory,
        steps: StepCounter,
        boundary: StepBoundary,
        coordinator: Coordinator,
        mark: Callable[[], object],
        random: RandomPort,
        run_seed: int,
        saved: dict[str, Any] | None = None,
        declare: Callable[[str, Any], None] = _keep_to_oneself,
        ranks: int = 1,
    ) -> None:
        """``declare`` gets what must be the same in all processes that train in step, under a name.

        ``ranks`` is how many share the data; a pass that was begun among another number is gone on with as its source
        knows to.
        """
        state: dict[str, Any] = saved or {}
        self.steps = steps
        self.boundary = boundary
        self.coordinator = coordinator
        self.mark = mark
        self._random = random
        self._declare = declare
        self.exhausted: Callable[[], None] = lambda: None
        self.stopping: Callable[[], None] = lambda: None
        self.is_over = False
        """Set when the session ends: iterators that are forgotten later do nothing more."""
        self._source_of = source_of
        self._run_seed: int = state.get("run_seed", run_seed)
        self._epochs: dict[str, int] = dict(state.get("epochs", {}))
        self._resumed_epochs = set(self._epochs)
        self._ranks = ranks
        self._streams = {key: Stream(key, entry, ranks=ranks) for key, entry in state.get("streams", {}).items()}
        self.counting: str | None = state.get("counting")
        self._epoch_random: RandomState | None = state.get("epoch_random")
        self._random_after: RandomState | None = None
        self._random_is_due = self._epoch_random is not None
        if self._epochs:
            for stream in self._inside():  # the program enters the epoch's body from its beginning
                stream.seen = 0
        self._open: list[weakref.ref[Batches]] = []
        self._closed_at: int | None = None
        self._closed_by: Stream | None = None
        self._rounds_begun = False
        self._step_at_epoch: int | None = None

    # ---- what users iterate over

    def epochs(self, count: int, name: str) -> Iterator[int]:
        """What ``sv.epochs`` gives."""
        return Epochs(self, count, name)

    def batches(self, data: Any, name: str) -> Batches:
        """What ``sv.batches`` gives."""
        """A pass. In an epoch and outside of one a name means two streams: the end of an epoch is not the other's."""
        in_epochs = self._step_at_epoch is not None
        key = f"{name} in an epoch" if in_epochs else name
        return Batches(self, data, self._streams.setdefault(key, Stream(key, inside=in_epochs, ranks=self._ranks)))

    def close(self) -> None:
        """The session ends: let go of the data, and of the processes that load it."""
        self.is_over = True
        for stream in self._streams.values():
            if stream.source is not None:
                stream.source.close()

    # ---- positions

    def position(self) -> dict[str, Any] | None:
        """What to save now; None while the loop stands where no position can be saved."""
        if not self._settled() or not self.is_between_steps():
            return None
        return self._position({})

    def position_at_stop(self) -> dict[str, Any] | None:
        """As ``position``, but an item in hand that nothing was done with yet is to be handed out again."""
        if (position := self.position()) is not None:
            return position
        waiting = [stream for stream in self._streams.values() if self._waits(stream)]
        if len(waiting) != 1 or not self.is_between_steps():
            return None
        [stream] = waiting
        if stream.in_hand != 1 or stream.source is None or not stream.source.state_before_last_draw:
            return None
        if stream.mark_at_draw != self.mark():
            return None
        return self._position({stream.name: 1})

    def position_at_end(self, *, ended: bool) -> dict[str, Any]:
        """As ``position_at_stop``, but always one; ``ended``: the program has ended its loop of its own accord.

        A pass that it left by a ``break`` on its way out is then not over: a longer run would have gone on with it.
        """
        left = next((stream for stream in self._streams.values() if stream.left_at == self.steps.now()), None)
        if ended and left is not None and left.source is not None:
            again = left.in_hand == 1 and left.source.state_before_last_draw and left.mark_at_draw == self.mark()
            return self._position({left.name: int(again)}, left)
        return self.position_at_stop() or self._position({})

    def _position(self, unused: dict[str, int], going_on: Stream | None = None) -> dict[str, Any]:
        return {
            "run_seed": self._run_seed,
            "counted": self.steps.counted,
            "counting": self.counting,
            "epochs": dict(self._epochs),
            "epoch_random": self._epoch_random if any(stream.in_epoch for stream in self._inside()) else None,
            "streams": {
                name: stream.position(unused.get(name, 0), goes_on=stream is going_on)
                for name, stream in self._streams.items()
            },
        }

    def is_between_steps(self) -> bool:
        """Rules 3 and 5."""
        if self._random_after is not None:
            return False
        return self._closed_at is None or self.steps.now() != self._closed_at

    def is_mid_epoch(self) -> bool:
        """Whether a resumed run would repeat steps: they are made in an epoch whose items come from elsewhere."""
        if self._step_at_epoch is None or any(stream.in_epoch for stream in self._streams.values()):
            return False
        return self.steps.now() != self._step_at_epoch

    @property
    def was_stopped_in_pass(self) -> bool:
        """Whether a stop ended a pass: then what follows it in the program is not the end of an epoch."""
        return self.coordinator.should_stop() and any(stream.is_unfinished for stream in self._streams.values())

    def is_round_boundary(self) -> bool:
        """Whether ``should_stop()`` is a boundary: no pass is open, and rule 3 allows it."""
        return self._outermost() is None and self.is_between_steps()

    def count_round(self) -> None:
        """A round of ``while not sv.should_stop()`` begins, so the one before it has ended."""
        if self.counting is None and self.steps.is_own:
            self.steps.counted += self._rounds_begun
            self._rounds_begun = True

    def end_rounds(self) -> None:
        """The program was told to stop, so no round begins."""
        self._rounds_begun = False

    def _settled(self) -> bool:
        for stream in self._streams.values():
            stream.settle(self.steps, asked=False, counts=stream.name == self.counting)
        return not any(self._waits(stream) for stream in self._streams.values())

    def _waits(self, stream: Stream) -> bool:
        """Whether a stream has items in hand that steps are expected of."""
        return stream.in_hand > 0 and (stream.trains or stream.name == self.counting)

    def is_outermost(self, batches: Batches) -> bool:
        """Rule 2: whether the ``next()`` of this one is the boundary."""
        return self._outermost() is batches

    def length_of(self, data: Any) -> int | None:
        """How many items a whole pass over the data has; None if nobody knows."""
        return self._source_of(data, 0).length()

    def _outermost(self) -> Batches | None:
        """The pass that was opened first, of those in the epoch; or else of those that were opened before it."""
        self._open = [ref for ref in self._open if (batches := ref()) is not None and batches.is_open]
        opened = [batches for ref in self._open if (batches := ref()) is not None]
        inside = [batches for batches in opened if batches.stream.inside]
        return next(iter(inside or opened), None)

    def _inside(self) -> list[Stream]:
        return [stream for stream in self._streams.values() if stream.inside]

    # ---- for the iterators

    def reach(self) -> None:
        """A boundary, if the position allows one."""
        if self._settled() and self.is_between_steps():
            self.boundary.reach(self.steps.now())
            if self.coordinator.should_stop():
                self.stopping()
        elif self.coordinator.should_stop():
            self.stopping()

    def open_pass(self, batches: Batches, data: Any) -> bool:
        """Begin a pass of a stream, or go on with the one that a checkpoint holds; False if it is exhausted already."""
        stream = batches.stream
        if any((other := ref()) is not None and other.is_open and other.stream is stream for ref in self._open):
            raise SessionStateError(
                f"two sv.batches named {stream.name!r} are open at once; give one of them a name: "
                "sv.batches(data, name='validation')"
            )
        stream.seen += 1
        if stream.seen < stream.in_epoch:
            return False
        resuming, stream.resuming = (stream.resuming if stream.seen == stream.in_epoch else None), None
        stream.in_epoch = stream.seen
        if resuming is not None and resuming["finished"]:
            self._close_stretch(stream)
            self._put_random_back()
            return False
        if self.counting is None:
            self.counting = stream.name
        source = self._source_of(data, self._run_seed)
        if resuming is None:
            source.start(stream.passes, None, 0)
            stream.passes += 1
            stream.handed = 0
        else:
            going_on = stream.passes - 1, resuming["state"], resuming["consumed"]
            saved = resuming.get("ranks", stream.ranks)
            if saved == stream.ranks:
                source.start(*going_on)
            else:
                source.start_among(*going_on, (saved, stream.ranks))
            stream.handed = resuming["consumed"]
            self._put_random_back()
        stream.source, stream.finished = source, False
        if stream.name == self.counting and (length := source.length()) is not None:
            self._declare(f"the number of batches of {stream.name!r} in pass {stream.passes}", length)
        stream.settle(self.steps, asked=False, counts=stream.name == self.counting)  # steps made before are not its own
        stream.is_inner = self._outermost() is not None
        stream.left_at = None
        if self._closed_by is stream:
            self._closed_at = None
        if self._closed_by is stream and not self._epochs:  # a loop without sv.epochs begins a further round
            for earlier in self._streams.values():
                if earlier is not stream and not earlier.is_unfinished:
                    earlier.forget()
        self._open.append(weakref.ref(batches))
        return True

    def close_pass(self, stream: Stream, *, left: bool) -> None:
        """A pass is exhausted, or was left by a ``break``: rule 3 begins, if steps are made with this stream."""
        stream.finished = True
        if stream.source is not None:
            stream.source.close()
        stream.settle(self.steps, asked=False, counts=stream.name == self.counting)
        if not stream.trains:
            stream.in_hand = 0
        stream.left_at = self.steps.now() if left and stream.trains else None
        if stream.trains and self._outermost() is None:
            if self.is_settled_for_stop():
                self.exhausted()
            self._close_stretch(stream)

    def _close_stretch(self, stream: Stream) -> None:
        self._closed_at = self.steps.now()
        self._closed_by = stream

    def begin_epoch(self, name: str, first: int) -> int:
        """The epoch to begin with: the saved one, once, or the first."""
        self._step_at_epoch = self.steps.now()
        if name in self._resumed_epochs:
            self._resumed_epochs.discard(name)
            return self._epochs[name]
        if name in self._epochs:
            raise SessionStateError(
                f"sv.epochs named {name!r} was used before in this loop; give the second one a name of its own: "
                "sv.epochs(5, name='fine-tuning')"
            )
        self._epochs[name] = first
        self._epoch_random = self._random.get()
        return first

    def enter_epoch(self) -> None:
        """Rule 5, where the body of a resumed epoch begins. Until the state is put back, there is no boundary."""
        if self._random_is_due and not self._resumed_epochs and self._epoch_random is not None:
            self._random_after = self._random.get()
            self._random.set(self._epoch_random)
        self._random_is_due = self._random_is_due and bool(self._resumed_epochs)

    def _put_random_back(self) -> None:
        """Rule 5: the program has drawn again what it drew in the epoch before the saved pass."""
        if self._random_after is not None and not any(stream.resuming for stream in self._inside()):
            self._random.set(self._random_after)
            self._random_after = None

    def end_epoch(self, name: str, following: int) -> None:
        """The body of an epoch is through."""
        for ref in self._open:
            if (batches := ref()) is not None and batches.stream.inside:
                batches.leave()
        self._epochs[name] = following
        inside = list(self._epochs)[list(self._epochs).index(name) + 1 :]
        for other in inside:
            del self._epochs[other]
            self._resumed_epochs.discard(other)
        for stream in self._inside():
            stream.end_of_epoch()
        self._put_random_back()
        self._epoch_random = self._random.get()
        self._closed_at = None
        self._closed_by = None
        self._step_at_epoch = self.steps.now()

    def leave_epochs(self) -> None:
        """The epochs are over; what follows them is no part of one."""
        self._step_at_epoch = None

    def is_settled_for_stop(self) -> bool:
        """Whether a loop that is asked to stop may end here."""
        return self._settled() and self.is_between_steps()


class Epochs(Iterator[int]):
    """The numbers of the epochs that are left, from 0 (or the saved one) up to ``count``; ends on a stop."""

    def __init__(self, loop: DataLoop, count: int, name: str) -> None:
        self._loop = loop
        self._count = count
        self._name = name
        self._epoch: int | None = None
        self._ended = False

    def __next__(self) -> int:
        if self._ended:
            raise StopIteration
        loop = self._loop
        if loop.was_stopped_in_pass:
            self._ended = True
            raise StopIteration
        if self._epoch is None:
            self._epoch = loop.begin_epoch(self._name, 0)
        else:
            self._epoch += 1
            loop.end_epoch(self._name, self._epoch)
        if loop.boundary.due:
            loop.reach()
        stopped = loop.coordinator.should_stop() and loop.is_settled_for_stop()
        if stopped:
            loop.stopping()  # the stop may have come after the boundary above
        if stopped or self._epoch >= self._count:
            self._ended = True
            loop.leave_epochs()
            raise StopIteration
        loop.enter_epoch()
        return self._epoch


class Batches(Iterator[Any]):
    """The items of one pass that are left; ends with the data, or on a stop."""

    def __init__(self, loop: DataLoop, data: Any, stream: Stream) -> None:
        self.stream = stream
        self.is_open = False
        self._loop = loop
        self._data = data
        self._begun = False

    def __iter__(self) -> Batches:
        return self

    def __next__(self) -> Any:
        loop, stream = self._loop, self.stream
        if not self.is_open:
            self._begin()
        else:
            stream.settle(loop.steps, asked=True, counts=stream.name == loop.counting)
        if loop.boundary.due and loop.is_outermost(self):
            loop.reach()
        if loop.coordinator.should_stop() and loop.is_outermost(self) and self._may_end():
            loop.stopping()  # the stop may have come after the boundary above
            self.is_open = False
            raise StopIteration
        source = stream.source
        assert source is not None
        try:
            item = source.draw()
        except StopIteration:
            self.leave()
            raise
        except Exception as error:
            if loop.coordinator.should_stop() and source.ends_with(error):
                self.is_open = False
                raise StopIteration from None
            raise
        stream.handed += 1
        stream.in_hand += 1
        if stream.in_hand == 1:
            stream.mark_at_draw = loop.mark()
        return item

    def __len__(self) -> int:
        """How many items are left.

        :raises TypeError: if the data does not know.
        """
        source = self.stream.source
        length = source.length() if self.is_open and source is not None else self._loop.length_of(self._data)
        if length is None:
            raise TypeError("the data given to sv.batches has no len()")
        return max(0, length - (self.stream.handed if self.is_open else 0))

    def leave(self, *, left: bool = False) -> None:
        """End the pass; ``left``: by a ``break`` of the program, and not with the data or the epoch."""
        if self.is_open:
            self.is_open = False
            self._loop.close_pass(self.stream, left=left)

    def __del__(self) -> None:
        if self.is_open and not (self._loop.is_over or self._loop.coordinator.should_stop()):
            self.leave(left=True)

    def _begin(self) -> None:
        if self._begun:
            raise StopIteration
        self._begun = True
        if not self._loop.open_pass(self, self._data):
            raise StopIteration
        self.is_open = True

    def _may_end(self) -> bool:
        """Rule 6."""
        stream = self.stream
        if not stream.in_hand or not stream.trains:
            return True
        return stream.in_hand >= stream.largest_group + _EXTRA_ITEMS_ON_STOP
