"""Members that train in step, in every order of events: they act on each decision at one step, and none waits for ever.

All of it is the real thing but training, the board and time: the meeting, the boundary, the agreement, chief and
workers. Then the same machine is shown agreements and members that are wrong, and finds each of them out.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any
from unittest import mock

import hypothesis
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from interleaving import Interleaving

from supervise_core import agreement, boundary, chief, coordinator, meeting, member, membership, signals, worker
from supervise_core.board import Board
from supervise_core.boundary import StepBoundary, StepCounter
from supervise_core.clock import Clock
from supervise_core.coordinator import Coordinator, StopCause
from supervise_core.errors import MembershipError, SessionStateError
from supervise_core.meeting import Meeting
from supervise_core.membership import Membership
from supervise_core.pages import CHIEF, Announcement
from supervise_core.signals import StopSignals
from supervise_core.testing.hosts import FakeMachine
from supervise_core.triggers import EverySteps

GRACE = 500.0
"""Longer than an interleaving may last: who waits for this to pass hangs."""

STEPS_TO_A_STOP = 40
"""Once a stop was asked for, it comes long before that many steps."""

STEPS_TO_A_SAVE = 400
"""Once a save was asked for, it comes long before that many steps, even where hardly any turn is the chief's."""


@dataclass(frozen=True)
class Wish:
    """Somebody asks for something, after so many turns of its own."""

    rank: int
    kind: str
    delay: int


@dataclass(frozen=True)
class Scene:
    """What happens, but for the order."""

    totals: tuple[int, ...]
    """How many steps each member makes."""
    coupled: bool
    """Nobody completes a step before all have begun it."""
    save_every: int | None = None
    late: tuple[int, ...] = ()
    """Turns that each member lets pass before it comes."""
    wishes: tuple[Wish, ...] = ()
    loses_rings: bool = False
    choices: tuple[int, ...] = ()
    seed: int = 0

    @property
    def size(self) -> int:
        return len(self.totals)


@dataclass
class Place:
    """What the members share."""

    pages: dict[str, bytes] = field(default_factory=dict[str, bytes])
    rings: set[str] = field(default_factory=set[str])
    begun: dict[int, int] = field(default_factory=dict[int, int])
    """The step that each is in, or was last."""
    ends: dict[int, bool] = field(default_factory=dict[int, bool])
    """By step: whether members that need each other make no further one. Who comes there first says so for all."""
    unheard: Callable[[], bool] = lambda: False
    """Whether a save was asked for that nobody has taken yet."""


class InterleavedBoard(Board):
    """Pages in memory; each page is read and written at a moment of its own."""

    location = "memory"

    def __init__(self, order: Interleaving, place: Place, loses_rings: bool) -> None:
        self._order = order
        self._place = place
        self._loses_rings = loses_rings
        self._closed = False

    def put(self, page: str, content: bytes) -> None:
        self._order.switch()
        self._place.pages[page] = content

    def get(self, pages: Sequence[str]) -> list[bytes | None]:
        return [self._get(page) for page in pages]

    def _get(self, page: str) -> bytes | None:
        self._order.switch()
        return self._place.pages.get(page)

    def remove(self, page: str) -> None:
        self._order.switch()
        self._place.pages.pop(page, None)

    def await_change(self, page: str, known: bytes | None, timeout: float) -> bytes | None:
        self._order.switch(lambda: self._closed or self._place.pages.get(page) != known, self._order.now + timeout)
        return self._place.pages.get(page)

    def ring(self, page: str) -> None:
        self._order.switch()
        if not self._loses_rings:
            self._place.rings.add(page)

    def rung(self, timeout: float) -> set[str]:
        self._order.switch(lambda: self._closed or bool(self._place.rings), self._order.now + timeout)
        rung, self._place.rings = self._place.rings, set()
        return rung

    def close(self) -> None:
        self._closed = True


class InterleavedMembership(Membership):
    def __init__(self, rank: int, size: int, connect: Callable[[], Board], machine: FakeMachine) -> None:
        super().__init__(rank, size, synchronous=True, host=machine.process())
        self._connect = connect

    def connect(self, clock: Clock) -> Board:
        return self._connect()


class InterleavedBoundary(StepBoundary):
    """A boundary whose flag is read and written at a moment of its own."""

    order: Interleaving

    @property
    def due(self) -> bool:  # type: ignore[override]
        self.order.switch()
        return self._due

    @due.setter
    def due(self, value: bool) -> None:
        self.order.switch()
        self._due = value


class Actor:
    """One member, with a training loop such as a user writes."""

    def __init__(self, rank: int, scene: Scene, order: Interleaving, place: Place, machine: FakeMachine) -> None:
        self.rank = rank
        self.scene = scene
        self.order = order
        self.place = place
        self.step = 0
        self.saves: list[int] = []
        self.requests: list[int] = []
        self.asked_to_stop_at: list[int] = []
        self.coordinator = Coordinator(order.clock)
        stop_signals = StopSignals(self.coordinator)
        place_of_mine = InterleavedMembership(
            rank, scene.size, lambda: InterleavedBoard(order, place, scene.loses_rings), machine
        )
        self.meeting = Meeting(place_of_mine, self.coordinator, stop_signals, GRACE)
        self.appointment: Any = None

    def live(self) -> None:
        for _ in range(self.scene.late[self.rank] if self.scene.late else 0):
            self.order.switch()
        self.meeting.join()
        try:
            if self.rank != 0:
                self.meeting.adopt(GRACE)
            boundary = self._begin()
        except (MembershipError, RuntimeError) as error:
            is_stopped = isinstance(error, SessionStateError) and self.coordinator.should_stop()
            self.meeting.end(0)
            failure = None if is_stopped else StopCause("the start of the session", error)
            self.meeting.leave(failure, self.coordinator.cause, 0)
            if not is_stopped:
                raise
            return
        self._train(boundary)
        self.meeting.end(self.step)
        errors = self.coordinator.errors
        self.meeting.leave(errors[0] if errors else None, self.coordinator.cause, self.step)

    def _begin(self) -> StepBoundary:
        steps = StepCounter(self._read_step)
        boundary = InterleavedBoundary(self.coordinator, steps, steps_are_watched=False)
        every = None if self.scene.save_every is None else EverySteps(self.scene.save_every)
        self.appointment = boundary.appoint("checkpoints", every, self._save, last=True)
        self.appointment.agree = self.meeting.wish_save
        self.meeting.save = self.appointment.grant
        self.meeting.begin(boundary, steps, Announcement(None, 0), GRACE)
        return boundary

    def _train(self, boundary: StepBoundary) -> None:
        while not self._should_stop(boundary) and not self._is_last_step():
            self.place.begun[self.rank] = self.step + 1
            if self.scene.coupled:
                self.order.switch(self._all_have_begun)
            if self.scene.loses_rings:  # what was not rung for is found in time
                self.order.switch(lambda: False, self.order.now + 0.2)
            self.order.switch()
            self.step += 1

    def _is_last_step(self) -> bool:
        """Members that need each other go on until each save that was asked for is taken, or is late beyond measure."""
        place, total = self.place, self.scene.totals[self.rank]
        if not self.scene.coupled or self.step < total:
            return self.step >= total
        return place.ends.setdefault(self.step, self.step >= total + STEPS_TO_A_SAVE or not place.unheard())

    def has_unheard_request(self) -> bool:
        return any(not self.is_heard(requested) for requested in self.requests)

    def is_heard(self, requested: int) -> bool:
        return any(save >= requested for save in self.saves)

    def _should_stop(self, boundary: StepBoundary) -> bool:
        if boundary.due:
            boundary.reach(self.step)
            return self.coordinator.should_stop()
        return False

    def _all_have_begun(self) -> bool:
        return all(self.place.begun.get(rank, 0) > self.step for rank in range(self.scene.size))

    def _read_step(self) -> int:
        self.order.switch()
        return self.step

    def _save(self, step: int) -> None:
        if not self.coordinator.should_stop():
            self.saves.append(step)

    def wish(self, wish: Wish) -> None:
        for _ in range(wish.delay):
            self.order.switch()
        if self.rank != 0 and CHIEF not in self.place.pages:
            return  # who ends before the chief comes may have been of an earlier run
        if wish.kind != "save":
            self.asked_to_stop_at.append(self.step)
        match wish.kind:
            case "stop":
                self.coordinator.request_stop(source="somebody")
            case "error":
                self.coordinator.request_stop(ValueError("diverged"), source="a service")
            case _ if self.appointment is not None:
                if not any(self.place.ends.values()):  # else it comes too late
                    self.requests.append(self.step)
                self.appointment.request()


def play(scene: Scene, changed: Any = None) -> list[Actor]:
    """Let a scene happen, and say what is wrong with it. ``changed``: a module that takes the place of the real one."""
    order = Interleaving(scene.choices, scene.seed)
    place, machine = Place(), FakeMachine()
    with ExitStack() as patches:
        for module in (agreement, member, coordinator, boundary, signals):
            patches.enter_context(mock.patch.object(module, "threading", order.threading))
        if changed is not None:
            if hasattr(changed, "threading"):
                changed.threading = order.threading
            for holder, name in ((meeting, "StepAgreement"), (membership, "Chief"), (membership, "Worker")):
                if (other := getattr(changed, name, None)) is not None and other.__module__ == changed.__name__:
                    patches.enter_context(mock.patch.object(holder, name, other))
                    if holder is membership:
                        patches.enter_context(mock.patch.object(meeting, name, other))
        patches.enter_context(mock.patch.object(meeting, "Watchdog"))
        patches.enter_context(mock.patch.object(InterleavedBoundary, "order", order, create=True))
        actors = [Actor(rank, scene, order, place, machine) for rank in range(scene.size)]
        place.unheard = lambda: any(actor.has_unheard_request() for actor in actors)
        for actor in actors:
            order.spawn(f"rank {actor.rank}", actor.live)
        for wish in scene.wishes:
            order.spawn(f"{wish}", lambda wish=wish: actors[wish.rank].wish(wish), vital=False)
        order.run()
    check(scene, actors)
    return actors


def check(scene: Scene, actors: list[Actor]) -> None:
    kinds = {wish.kind for wish in scene.wishes}
    lasts = [actor.step for actor in actors]
    if scene.coupled:
        assert len(set(lasts)) == 1, f"stopped at {lasts}"
    for actor in actors:
        assert len(set(actor.saves)) == len(actor.saves)
        for other in actors:
            common = min(actor.step, other.step)
            saves, others = ([step for step in one.saves if step < common] for one in (actor, other))
            assert saves == others, f"rank {actor.rank} saved {saves}, rank {other.rank} {others}"
        asked_to_stop_at = [step for one in actors for step in one.asked_to_stop_at]
        for requested in actor.requests if scene.coupled and not asked_to_stop_at else ():
            assert actor.is_heard(requested), f"a save at {requested} was lost: {actor.saves}, {lasts}"
        if "error" not in kinds:
            assert not actor.coordinator.errors, f"rank {actor.rank}: {actor.coordinator.errors}"
        if scene.coupled and asked_to_stop_at:
            stopped_after = actor.step - min(asked_to_stop_at)
            assert stopped_after < STEPS_TO_A_STOP, f"rank {actor.rank} went on for {stopped_after} steps"


# ---- scenes


SEEDS = st.integers(0, 1 << 32)


def wishes_of(size: int, kinds: list[str]) -> st.SearchStrategy[tuple[Wish, ...]]:
    wish = st.builds(Wish, st.integers(0, size - 1), st.sampled_from(kinds), st.integers(0, 120))
    return st.lists(wish, max_size=5).map(tuple)


@st.composite
def busy_scenes(draw: st.DrawFn) -> Scene:
    """Members that need each other in each step, and one wish after another while they train."""
    size = draw(st.integers(2, 3))
    wish = st.builds(Wish, st.integers(0, size - 1), st.just("save"), st.integers(40, 400))
    return Scene((20,) * size, True, wishes=tuple(draw(st.lists(wish, min_size=3, max_size=9))), seed=draw(SEEDS))


CHOICES = st.lists(st.integers(0, 11), max_size=250).map(tuple)
SAVE_EVERY = st.sampled_from([None, None, 2, 3])


@st.composite
def scenes_in_step(draw: st.DrawFn) -> Scene:
    """Members that need each other in each step."""
    size = draw(st.integers(2, 4))
    wishes = draw(wishes_of(size, ["save", "save", "stop", "error"]))
    stops = {wish.kind for wish in wishes} & {"stop", "error"}
    total = 3 * STEPS_TO_A_STOP if stops else draw(st.integers(1, 9))
    late = tuple(draw(st.integers(0, 60)) for _ in range(size))
    return Scene((total,) * size, True, draw(SAVE_EVERY), late, wishes, draw(st.booleans()), draw(CHOICES), draw(SEEDS))


@st.composite
def scenes_apart(draw: st.DrawFn) -> Scene:
    """Members that agree, and need each other for nothing else; some end before others do."""
    size = draw(st.integers(2, 3))
    totals = tuple(draw(st.integers(0, 8)) for _ in range(size))
    wishes = draw(wishes_of(size, ["save", "save", "stop"]))
    late = tuple(draw(st.integers(0, 60)) for _ in range(size))
    return Scene(totals, False, draw(SAVE_EVERY), late, wishes, draw(st.booleans()), draw(CHOICES), draw(SEEDS))


def searching(examples: int, shrinks: bool = True) -> settings:
    quiet = list(HealthCheck)
    return settings(
        max_examples=examples,
        deadline=None,
        suppress_health_check=quiet,
        database=None,
        derandomize=True,
        phases=(Phase.generate, Phase.shrink) if shrinks else (Phase.generate,),
    )


@pytest.fixture(autouse=True)
def _quietly() -> Iterator[None]:
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.campaign(small=300, soak=20_000)
def test_members_in_step_act_at_one_step(count: int) -> None:
    @hypothesis.given(scenes_in_step() | busy_scenes())
    @searching(count)
    def search(scene: Scene) -> None:
        play(scene)

    search()


@pytest.mark.campaign(small=300, soak=20_000)
def test_members_apart_act_at_one_step(count: int) -> None:
    @hypothesis.given(scenes_apart())
    @searching(count)
    def search(scene: Scene) -> None:
        play(scene)

    search()


# ---- what is wrong, and found out


@dataclass(frozen=True)
class Mutant:
    """A module of which some lines say something else."""

    name: str
    module: ModuleType
    changes: tuple[tuple[str, str], ...]

    def applied(self) -> Any:
        """The module with those lines changed."""
        source = inspect.getsource(self.module)
        for line, instead in self.changes:
            assert source.count(line) == 1, f"{self.name}: {source.count(line)} times {line!r}"
            source = source.replace(line, instead)
        changed = ModuleType(self.module.__name__)
        exec(compile(source, f"<{self.name}>", "exec"), changed.__dict__)
        return changed


_OPEN_WHILE_UNANSWERED = "                if self._unanswered():\n                    return\n"
_RINGS_LATE = ("            self._ring()  # before", "            steps, _ = self._steps(), self._ring()  #")
_PASSES = "if self._asked <= self._decided:  # no other"
_DECIDES = "        if page.decision is not None:\n            self.agreement.decide(page.decision)\n"

_DECIDES_ON = "Decision.of(self._mine.round, answers, stop)"
_HOLDS = "                self._asked = number\n                self._free.clear()\n"

MUTANTS = [
    Mutant("publishes without holding", agreement, ((_HOLDS, "                pass\n"),)),
    Mutant("looks where it is and then rings", agreement, (_RINGS_LATE, ("self._steps() + 1 if", "steps + 1 if"))),
    Mutant("still rests when it trains", agreement, (("                    self._resting = None\n", ""),)),
    Mutant("passes while another round is open", agreement, ((_PASSES, "if True:  #"),)),
    Mutant("answers with the step before", agreement, (("Answer(self._steps() + 1 if", "Answer(self._steps() if"),)),
    Mutant("forgets what is due later", agreement, (("if decision.step > step]", "if decision.step > step + 1]"),)),
    Mutant("is not wanted for what is due later", agreement, (("or bool(self._due)", ""),)),
    Mutant(
        "the chief decides on the earliest",
        chief,
        ((_DECIDES_ON, _DECIDES_ON.replace("answers", "[min(answers, key=lambda one: one.step)]")),),
    ),
    Mutant("the chief decides before all have answered", chief, ((_OPEN_WHILE_UNANSWERED, ""),)),
    Mutant("the chief forgets a wish", chief, (("self._is_wished = True", "pass"),)),
    Mutant("a worker misses decisions", worker, ((_DECIDES, ""),)),
]


@pytest.mark.campaign(small=2000, soak=2000)
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_what_is_wrong_is_found_out(mutant: Mutant, count: int) -> None:
    changed = mutant.applied()

    @hypothesis.given(busy_scenes() | scenes_in_step())
    @searching(count, shrinks=False)
    def search(scene: Scene) -> None:
        play(scene, changed)

    with pytest.raises((AssertionError, BaseExceptionGroup)):
        search()
