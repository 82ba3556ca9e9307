"""The lease, model-checked: the real code on a real directory, each call to the disk a step, in every order of steps.

Two tests go about it in two ways. One tries every order of some short scenes in which the actors are interrupted once,
twice, or in a soak three times, so that no place where one could be frozen is left out. The other is a state machine
that draws long stories: acquisitions, saves, prunings, beats, deaths, and those that are taken for dead and are not.
"""

from __future__ import annotations

import functools
import os
import random
import re
import shutil
import tempfile
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import hypothesis
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

from supervise_core.checkpoint_format import CheckpointId, Link
from supervise_core.directory_store import DirectoryStore
from supervise_core.errors import LeaseHeldError, LeaseLostError
from supervise_core.lease import BEAT_EVERY
from supervise_core.testing.hosts import FakeHost, FakeMachine
from supervise_core.testing.interleaving import (
    Actor,
    Switches,
    Time,
    every_way,
    let_time_pass,
    on_one_processor,
    run_in_turns,
)
from supervise_core.testing.store_contract import FILE, manifest_of, write_checkpoint

PATIENCE = 4 * BEAT_EVERY
READING = frozenset({"names", "is_directory", "size", "look_up", "open_directory", "sync_directory", "wait"})


@dataclass(slots=True)
class Act:
    """Something that a chief does, and what it may change in the listing, once: names added, removed, exchanged."""

    name: str
    do: Callable[[], object]
    adds: frozenset[str] = frozenset()
    removes: frozenset[str] = frozenset()
    exchanges: frozenset[str] = frozenset()
    may_change_and_fail: bool = False
    """Whether it goes on after that, and may find that it was replaced only then."""

    @property
    def changes(self) -> bool:
        return bool(self.adds or self.removes or self.exchanges)


@dataclass(eq=False, slots=True)
class Chief:
    """One process that writes, or would like to."""

    actor: Actor
    host: FakeHost
    store: DirectoryStore
    act: Act | None = None
    changed: int = 0
    """How often its present act has changed the listing."""
    robbed: bool = False
    """Whether its lease was taken away from it."""
    presumed_dead: bool = False
    beaten: float = 0.0
    """When it last beat."""
    silence: float = 0.0
    """The longest time that it let pass between two beats."""

    @property
    def pid(self) -> int:
        return self.host.identity().pid

    @property
    def may_change(self) -> bool:
        """Whether it is the writer and nobody took that from it."""
        return self.store.is_writer and self.store._lease.directory.is_dir()

    # ---- what it can do

    def acquire(self) -> Act:
        return Act("acquire", self.store.acquire)

    def release(self) -> Act:
        return Act("release", self.store.release)

    def beat(self) -> Act:
        return Act("beat", self.store.beat)

    def commit(self, step: int = 7) -> Act:
        target = self._next_of(step)
        return Act("commit", lambda: write_checkpoint(self.store, target), adds=self._names(target))

    def commit_with_link(self, base: CheckpointId) -> Act:
        target = self._next_of(base.step + 1)
        content = Path(self.store.path, self.store.name_of(base), FILE).read_bytes()

        def do() -> None:
            draft = self.store.begin(target)
            assert draft.link(base, [Link(FILE, FILE, len(content))])
            draft.commit(manifest_of(target.step, content))

        return Act("commit_with_link", do, adds=self._names(target))

    def save_again(self, there: CheckpointId) -> Act:
        def do() -> None:
            draft = self.store.begin(CheckpointId(there.step, there.revision + 1))
            draft.write(FILE, [b"again"])
            assert draft.commit(manifest_of(there.step, b"again"), there) == there

        return Act("save_again", do, exchanges=self._names(there))

    def discard(self) -> Act:
        def do() -> None:
            draft = self.store.begin(CheckpointId(9))
            draft.write(FILE, [b"half"])
            draft.discard()

        return Act("discard", do)

    def remove(self, there: CheckpointId) -> Act:
        return Act("remove", lambda: self.store.remove(there), removes=self._names(there))

    def set_aside(self, there: CheckpointId) -> Act:
        return self._put_away("set_aside", there, "why")

    def retire(self, there: CheckpointId) -> Act:
        return self._put_away("retire", there)

    def retire_damaged(self) -> Act:
        return Act("retire_damaged", self.store.retire_damaged)

    def _put_away(self, name: str, there: CheckpointId, *why: str) -> Act:
        do = functools.partial(getattr(self.store, name), there, *why)
        return Act(name, do, removes=self._names(there), may_change_and_fail=True)

    def _names(self, *checkpoints: CheckpointId) -> frozenset[str]:
        return frozenset(self.store.name_of(checkpoint) for checkpoint in checkpoints)

    def _next_of(self, step: int) -> CheckpointId:
        revisions = [there.revision for there in self.store.checkpoints() if there.step == step]
        return CheckpointId(step, max(revisions) + 1 if revisions else 0)


@dataclass(slots=True)
class View:
    """What there is at one moment, by the numbers of the inodes."""

    listing: dict[str, int]
    put_away: dict[str, int]
    leases: set[str]


class World:
    """A log directory, its chiefs, and what must hold of them after every single call."""

    def __init__(self) -> None:
        self.directory = Path(tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
        self.logdir = f"{self.directory}/logs"
        self.time = Time()
        self.here = FakeMachine("here")
        self.there = FakeMachine("there")
        self.chiefs: list[Chief] = []
        self.owners: dict[str, Chief] = {}
        self.gone: list[Chief] = []
        self.seen = self.look()

    def close(self) -> None:
        for chief in self.chiefs:
            chief.actor.kill()
        shutil.rmtree(self.directory)

    def chief(self, machine: FakeMachine | None = None) -> Chief:
        """A new process."""
        host = (machine or self.here).process()
        actor = Actor(self.time, f"process {host.identity().pid}")
        store = DirectoryStore(self.logdir, disk=actor.disk, clock=actor.clock, host=host)
        made = Chief(actor, host, store)
        self.chiefs.append(made)
        return made

    def presume_dead(self, chief: Chief) -> None:
        """As far as others on its machine can see, the process is no more; it goes on all the same."""
        chief.host.die()
        chief.presumed_dead = True

    def kill(self, chief: Chief) -> None:
        chief.actor.kill()
        self.presume_dead(chief)
        self.chiefs.remove(chief)
        self.gone.append(chief)

    def run_alone(self, chief: Chief, act: Act | None = None) -> None:
        """An act, or the rest of one, while everybody else stands still and time passes."""
        if act is not None:
            self.begin(chief, act)
        while let_time_pass(self.time, [chief.actor]):
            self.move(chief)

    def do(self, chief: Chief, act: Act) -> None:
        """An act that waits for nothing, all of it in this thread, which is quicker."""
        before = self.seen
        try:
            act.do()
        finally:
            self.seen = self.look()
            for lease in self.seen.leases - before.leases:
                self.owners[lease] = chief
            for lease in before.leases - self.seen.leases:
                self.owners[lease].robbed = self.owners[lease] is not chief

    def begin(self, chief: Chief, act: Act) -> None:
        """An act, as far as the first call."""
        chief.act, chief.changed = act, 0
        if act.name == "acquire":
            chief.robbed = False
        chief.actor.begin(act.do)
        if not chief.actor.busy:
            self.judge(chief)

    def move_actor(self, actor: Actor) -> None:
        self.move(next(chief for chief in self.chiefs if chief.actor is actor))

    # ---- what must hold

    def move(self, chief: Chief) -> None:
        """One call, and what may come of it."""
        before, might, at = self.seen, chief.may_change, chief.actor.at
        chief.actor.step()
        assert at is not None
        self.seen = after = before if at[0] in READING else self.look()
        if (after.listing, after.put_away) != (before.listing, before.put_away):
            assert might, "one that is not the writer, or is not any more, made a change"
            self.check_change(chief, before.listing, after.listing)
        assert sum(one.may_change for one in self.chiefs) <= 1, "two may change the listing"
        for lease in after.leases - before.leases:
            self.owners[lease] = chief
            chief.beaten, chief.silence = self.time.now, 0.0
        for lease in before.leases - after.leases:
            owner = self.owners[lease]
            if owner is not chief:
                self.check_taking(owner, by=chief)
                owner.robbed = True
        if not chief.actor.busy:
            self.judge(chief)

    def check_change(self, chief: Chief, before: dict[str, int], after: dict[str, int]) -> None:
        act = chief.act
        assert act is not None
        if before == after:
            return
        added, removed = after.keys() - before.keys(), before.keys() - after.keys()
        exchanged = {name for name in after.keys() & before.keys() if after[name] != before[name]}
        assert (added, removed, exchanged) == (act.adds, act.removes, act.exchanges), act.name
        chief.changed += 1
        self.check_content()

    def check_taking(self, owner: Chief, by: Chief) -> None:
        """A lease is taken away from one that is dead, or that was silent for as long as that takes."""
        if owner.presumed_dead:
            return
        assert owner.host.machine is not by.host.machine, "taken away from one that is seen to live"
        assert max(owner.silence, self.time.now - owner.beaten) >= PATIENCE, "taken away from one that beats"

    def judge(self, chief: Chief) -> None:
        """What an act came to, now that it has come to its end."""
        act, error = chief.act, chief.actor.error
        assert act is not None
        chief.act = None
        if act.name == "acquire" and isinstance(error, LeaseHeldError):
            self.check_message(chief, str(error))
        elif isinstance(error, LeaseLostError):
            assert chief.robbed, "lost to nobody"
            assert chief.changed == 0 or act.may_change_and_fail, "it says that nothing was changed"
            assert act.name == "acquire" or "another process took over" in str(error)
        elif error is not None:
            raise AssertionError(f"{act.name} failed with what is neither nor: {error!r}") from error
        else:
            assert chief.changed == act.changes
        if act.name == "acquire":
            assert chief.store.is_writer == (error is None)
        if act.name == "beat" and error is None:
            chief.silence = max(chief.silence, self.time.now - chief.beaten)
            chief.beaten = self.time.now

    def check_message(self, chief: Chief, message: str) -> None:
        """It names another one."""
        named = re.search(r"process (\d+) on", message)
        assert named, message
        assert int(named[1]) in {one.pid for one in (*self.chiefs, *self.gone) if one is not chief}, message

    def check_content(self) -> None:
        """Each checkpoint of the listing is whole."""
        store = DirectoryStore(self.logdir)
        for checkpoint in store.checkpoints():
            with store.open(checkpoint) as reader:
                manifest = reader.manifest()
                assert manifest.step == checkpoint.step
                assert reader.read(FILE, manifest.files[FILE]) in (b"content", b"again")

    def look(self) -> View:
        listing = entries(self.logdir, "model.ckpt")
        put_away = {
            f"{shelf}/{name}": inode
            for shelf in ("set-aside", "retired")
            for name, inode in entries(f"{self.logdir}/{shelf}").items()
        }
        return View(listing, put_away, {*entries(f"{self.logdir}/.work", "lease-")})

    def check_end(self) -> None:
        """Whatever happened, the next process becomes the writer, sweeps, and saves."""
        for chief in self.chiefs:
            self.presume_dead(chief)
        last = self.chief()
        there = self.look().listing
        if all(lease.host.machine is self.here for lease in self.owners.values()):
            self.do(last, last.acquire())
        else:  # it has to watch a beat
            self.run_alone(last, last.acquire())
        self.do(last, last.commit(step=90))
        assert self.seen.listing.items() >= there.items()
        (lease,) = Path(self.logdir, ".work").iterdir()
        assert sorted(path.name.partition("-")[0] for path in lease.iterdir()) == ["beat", "owner.json"]
        self.check_content()


def entries(path: str, beginning: str = "") -> dict[str, int]:
    """The names in a directory that begin so, with the numbers of their inodes."""
    try:
        return {one.name: one.inode() for one in os.scandir(path) if one.name.startswith(beginning)}
    except FileNotFoundError:
        return {}


@contextmanager
def world() -> Generator[World, None, None]:
    made = World()
    try:
        yield made
    finally:
        made.close()


# ---- every order of a few calls

FIRST, SECOND = CheckpointId(1), CheckpointId(2)

Scene = Callable[[World], Iterator[Chief]]
"""Sets up, yields the chiefs whose acts have begun, and says at its end what must have come of it."""


def prepare(world: World, *, damaged: bool = False) -> Chief:
    """A writer that has saved two checkpoints, and set aside a third."""
    chief = world.chief()
    world.do(chief, chief.acquire())
    for step in (1, 2, 3):
        world.do(chief, chief.commit(step))
    if damaged:
        world.do(chief, chief.set_aside(CheckpointId(3)))
    return chief


def newcomers(world: World, count: int) -> list[Chief]:
    them = [world.chief() for _ in range(count)]
    for chief in them:
        world.begin(chief, chief.acquire())
    return them


def check_one_writer(them: list[Chief]) -> None:
    (writer,) = [chief for chief in them if chief.may_change]
    for chief in them:
        if chief is not writer:
            assert isinstance(chief.actor.error, LeaseHeldError)
            assert len(them) > 2 or f"process {writer.pid} on here" in str(chief.actor.error)


def two_at_once(world: World) -> Iterator[Chief]:
    them = newcomers(world, 2)
    yield from them
    check_one_writer(them)


def three_at_once(world: World) -> Iterator[Chief]:
    them = newcomers(world, 3)
    yield from them
    check_one_writer(them)


def two_after_a_death(world: World) -> Iterator[Chief]:
    """It died while it set something aside, and left a draft."""
    dead = prepare(world)
    dead.store.begin(CheckpointId(8)).write(FILE, [b"half"])
    world.begin(dead, dead.set_aside(FIRST))
    while FIRST in dead.store.checkpoints():
        world.move(dead)
    world.kill(dead)
    them = newcomers(world, 2)
    yield from them
    check_one_writer(them)
    assert [*them[0].store.damaged().values()] == ["why"]


def two_after_a_death_while_it_swept(world: World) -> Iterator[Chief]:
    dead = prepare(world)
    world.begin(dead, dead.set_aside(FIRST))
    while FIRST in dead.store.checkpoints():
        world.move(dead)
    world.kill(dead)
    swept = world.chief()
    world.begin(swept, swept.acquire())
    while not swept.store.is_writer:
        world.move(swept)
    for _ in range(6):
        world.move(swept)
    world.kill(swept)
    them = newcomers(world, 2)
    yield from them
    check_one_writer(them)
    assert [*them[0].store.damaged().values()] == ["why"]


def one_leaves_as_another_comes(world: World) -> Iterator[Chief]:
    leaving = prepare(world)
    world.begin(leaving, leaving.release())
    coming = world.chief()
    world.begin(coming, coming.acquire())
    yield from (leaving, coming)
    assert not leaving.store.is_writer
    assert coming.may_change or isinstance(coming.actor.error, LeaseHeldError)


def one_leaves_as_two_come(world: World) -> Iterator[Chief]:
    leaving = prepare(world)
    world.begin(leaving, leaving.release())
    them = newcomers(world, 2)
    yield from (leaving, *them)
    assert sum(chief.may_change for chief in them) <= 1


def replaced_while_it_acquires(world: World) -> Iterator[Chief]:
    """Taken for dead before it begins, so that whoever finds its lease takes it away."""
    dead = prepare(world)
    world.begin(dead, dead.set_aside(FIRST))
    while FIRST in dead.store.checkpoints():
        world.move(dead)
    world.kill(dead)
    frozen, coming = world.chief(), world.chief()
    world.presume_dead(frozen)
    world.begin(frozen, frozen.acquire())
    world.begin(coming, coming.acquire())
    yield from (frozen, coming)
    assert sum(chief.may_change for chief in (frozen, coming)) == 1
    assert [*coming.store.damaged().values()] == ["why"]


def replaced_while(act: Callable[[Chief], Act]) -> Scene:
    """A writer that is taken for dead, and another that comes, and saves what that one may be saving, too."""

    def scene(world: World) -> Iterator[Chief]:
        frozen, coming = prepare(world, damaged=True), world.chief()
        world.presume_dead(frozen)
        world.begin(frozen, act(frozen))

        def come() -> list[CheckpointId]:
            coming.store.acquire()
            return coming.store.checkpoints()

        world.begin(coming, Act("acquire", come))
        yield from (frozen, coming)
        assert coming.actor.result == coming.store.checkpoints(), "it changed when the new writer had looked"
        world.do(coming, coming.commit(7))
        if not frozen.store.is_writer:
            return  # it has given the lease back
        for late in (frozen.commit(4), frozen.remove(SECOND), frozen.beat()):
            with pytest.raises(LeaseLostError):
                world.do(frozen, late)

    return scene


SCENES: dict[str, Scene] = {
    scene.__name__: scene
    for scene in (
        two_at_once,
        three_at_once,
        two_after_a_death,
        two_after_a_death_while_it_swept,
        one_leaves_as_another_comes,
        one_leaves_as_two_come,
        replaced_while_it_acquires,
    )
} | {
    f"replaced_while_it_does_{name}": replaced_while(act)
    for name, act in {
        "commit": Chief.commit,
        "commit_with_link": lambda chief: chief.commit_with_link(SECOND),
        "save_again": lambda chief: chief.save_again(SECOND),
        "discard": Chief.discard,
        "remove": lambda chief: chief.remove(SECOND),
        "set_aside": lambda chief: chief.set_aside(SECOND),
        "retire": lambda chief: chief.retire(SECOND),
        "retire_damaged": Chief.retire_damaged,
        "beat": Chief.beat,
        "release": Chief.release,
    }.items()
}


THOROUGH = (
    "two_at_once",
    "one_leaves_as_another_comes",
    "replaced_while_it_does_commit",
    "replaced_while_it_does_beat",
)


@pytest.mark.parametrize("name", SCENES)
def test_every_order_of_calls(name: str, request: pytest.FixtureRequest) -> None:
    """With one interruption, or two; in a soak with three, or two where there are three chiefs."""
    scene = SCENES[name]
    chiefs = 3 if name in ("three_at_once", "one_leaves_as_two_come") else 2
    interruptions = 5 - chiefs if request.config.getoption("--soak") else 1 + (name in THOROUGH)

    def run(switches: Switches) -> list[list[int]]:
        with world() as made:
            story = scene(made)
            them = [next(story).actor for _ in range(chiefs)]
            alternatives = run_in_turns(made.time, them, switches, made.move_actor)
            assert next(story, None) is None
            made.check_end()
            return alternatives

    with on_one_processor():
        count = every_way(run, chiefs, interruptions)
    request.node.user_properties.append(("campaign", f"{count} orders, interrupted at most {interruptions} times"))


def of_long_stories(count: int) -> settings:
    """To shrink them takes minutes, and they end soon after what is wrong."""
    return settings(
        max_examples=count,
        stateful_step_count=30,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=[HealthCheck.too_slow],
    )


@pytest.mark.campaign(small=200, soak=5000)
def test_of_those_that_come_at_once_one_wins_whoever_moves_when(count: int, seed: int) -> None:
    """Two or three, on what a dead writer has left, or on nothing; nobody is frozen for long."""

    @hypothesis.seed(seed)
    @of_long_stories(count)
    @hypothesis.given(st.integers(2, 3), st.booleans(), st.lists(st.integers(0, 2), min_size=30, max_size=60))
    def come(size: int, after_a_death: bool, turns: list[int]) -> None:
        with world() as made:
            if after_a_death:
                made.kill(prepare(made))
            them = newcomers(made, size)
            switches = [*enumerate(turns * 50)]
            run_in_turns(made.time, [one.actor for one in them], switches, made.move_actor)
            check_one_writer(them)

    with on_one_processor():
        come()


# ---- long stories


class LeaseMachine(RuleBasedStateMachine):
    """Three processes, two of them on one machine. Whoever is not moved on stands where it is: it is frozen there."""

    @initialize()
    def begin(self) -> None:
        self.world = World()
        self.places = [self.world.chief(self.world.there if place == 2 else None) for place in range(3)]

    def teardown(self) -> None:
        if hasattr(self, "world"):
            try:
                self.all_go_on()
                self.world.check_end()
            finally:
                self.world.close()

    @rule(place=st.integers(0, 2), choice=st.integers(0, 11), which=st.integers(0, 3), calls=st.integers(0, 30))
    def act(self, place: int, choice: int, which: int, calls: int) -> None:
        """Go on with what it does, or begin something that a process in its place may think it can do."""
        chief = self.places[place]
        if not chief.actor.busy:
            self.world.begin(chief, self.next_act(chief, choice, which))
        self.go_on(chief, calls)

    def next_act(self, chief: Chief, choice: int, which: int) -> Act:
        if not chief.store.is_writer:
            return chief.acquire()
        there = chief.store.checkpoints()
        if choice < 5 and there:
            target = there[which % len(there)]
            acts = (chief.remove, chief.set_aside, chief.retire, chief.save_again, chief.commit_with_link)
            return acts[choice](target)
        if choice < 8:
            return chief.commit(which)
        return [chief.beat, chief.beat, chief.release, chief.retire_damaged][choice - 8]()

    def go_on(self, chief: Chief, calls: int) -> None:
        for _ in range(calls):
            if chief.actor.can_move:
                self.world.move(chief)

    @rule(chances=st.integers(0, 2**32), calls=st.integers(1, 60))
    def all_at_once(self, chances: int, calls: int) -> None:
        """Everybody is busy, and each call may be anybody's."""
        chance = random.Random(chances)
        for _ in range(calls):
            chief = chance.choice(self.places)
            if not chief.actor.busy:
                self.world.begin(chief, self.next_act(chief, chance.randrange(12), chance.randrange(4)))
            let_time_pass(self.world.time, [chief.actor for chief in self.places])
            self.go_on(chief, chance.choice([1, 1, 1, 2, 5]))

    @rule()
    def all_go_on(self) -> None:
        """Nobody stays frozen, and all come to an end."""
        run_in_turns(self.world.time, [chief.actor for chief in self.places], (), self.world.move_actor)

    @rule(place=st.integers(0, 2), by=st.integers(0, 2))
    def replaced(self, place: int, by: int) -> None:
        """One is taken for dead in the middle of what it does, and another comes."""
        coming = self.places[by]
        if place == by or coming.actor.busy or coming.store.is_writer:
            return
        self.world.presume_dead(self.places[place])
        self.world.run_alone(coming, coming.acquire())

    @rule(place=st.integers(0, 2))
    def killed(self, place: int) -> None:
        chief = self.places[place]
        self.world.kill(chief)
        self.places[place] = self.world.chief(chief.host.machine)

    @rule(seconds=st.sampled_from([0.01, 1.0, 6.0, 25.0]))
    def time_passes(self, seconds: float) -> None:
        self.world.time.pass_on(seconds)


@pytest.mark.campaign(small=100, soak=5000)
def test_lease_machine(count: int, seed: int) -> None:
    with on_one_processor():
        run_state_machine_as_test(
            hypothesis.seed(seed)(LeaseMachine),
            settings=of_long_stories(count),
        )
