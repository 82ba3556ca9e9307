"""One writer at a time: who it is, whether it lives, and that a replaced one changes nothing."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from supervise_core.clock import SystemClock
from supervise_core.disk import Disk, OpenDirectory
from supervise_core.errors import LeaseHeldError, LeaseLostError
from supervise_core.host import Host, Identity
from supervise_core.lease import BEAT_EVERY, Lease
from supervise_core.testing.clock import FakeClock, eventually
from supervise_core.testing.disks import HastyDisk
from supervise_core.testing.hosts import FakeHost, FakeMachine


class World:
    """A log directory and the machines that see it."""

    def __init__(self, logdir: Path) -> None:
        self.logdir = logdir
        self.clock = FakeClock()
        self.here = FakeMachine("here")
        self.there = FakeMachine("there")

    def lease(self, host: Host | None = None, disk: Disk | None = None) -> Lease:
        return Lease(self.logdir, disk or HastyDisk(), self.clock, host or self.here.process())

    def work(self) -> list[str]:
        return sorted(path.name for path in (self.logdir / ".work").iterdir())


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def test_acquire_and_release_leave_nothing(world: World) -> None:
    lease = world.lease()
    assert not lease.held
    lease.acquire()
    assert lease.held
    assert lease.directory.is_dir()
    lease.release()
    lease.release()
    assert world.work() == []
    lease.acquire()
    lease.release()


def test_second_writer_is_told_who_the_first_is(world: World) -> None:
    host = world.here.process()
    world.lease(host).acquire()
    with pytest.raises(LeaseHeldError) as caught:
        world.lease().acquire()
    message = str(caught.value)
    assert f"process {host.identity().pid} on here since 2023-11-1" in message
    assert str(world.logdir) in message
    assert len(world.work()) == 1


def test_the_same_process_is_refused_as_another_is(world: World) -> None:
    host = world.here.process()
    world.lease(host).acquire()
    with pytest.raises(LeaseHeldError):
        world.lease(host).acquire()


def test_dead_writer_on_this_machine_is_replaced_at_once(world: World) -> None:
    host = world.here.process()
    first = world.lease(host)
    first.acquire()
    host.die()
    second = world.lease()
    second.acquire()
    assert world.clock.monotonic() == 1000.0
    assert len(second.leftovers()) == 1
    for act in (first.check, first.beat):
        with pytest.raises(LeaseLostError, match="took over"):
            act()
    first.release()
    second.check()


def test_writer_elsewhere_that_beats_is_alive(world: World) -> None:
    first = world.lease(world.there.process())
    first.acquire()
    outcome: list[BaseException] = []
    watcher = threading.Thread(target=_note, args=(world.lease().acquire, outcome))
    watcher.start()
    world.clock.wait_for_sleepers(1)
    first.beat()
    world.clock.advance(1.0)
    eventually(lambda: outcome)
    watcher.join()
    assert isinstance(outcome[0], LeaseHeldError)
    first.check()


def test_writer_elsewhere_whose_beat_stands_still_is_replaced(world: World, caplog: pytest.LogCaptureFixture) -> None:
    first = world.lease(world.there.process())
    first.acquire()
    outcome: list[BaseException] = []
    second = world.lease()
    with caplog.at_level(logging.INFO):
        watcher = threading.Thread(target=_note, args=(second.acquire, outcome))
        watcher.start()
        waited = 0.0
        while watcher.is_alive() and waited < 100:
            world.clock.wait_for_sleepers(1)
            assert waited < 4 * BEAT_EVERY or not watcher.is_alive()
            world.clock.advance(0.5)
            waited += 0.5
            eventually(lambda: not watcher.is_alive() or world.clock._deadlines)
    assert outcome == []
    assert waited == 4 * BEAT_EVERY
    second.check()
    with pytest.raises(LeaseLostError):
        first.beat()
    assert "cannot see from here whether it lives" in caplog.text
    assert "from a writer that is no more" in caplog.text


def test_writer_of_a_former_boot_is_dead_after_its_patience(world: World) -> None:
    world.lease().acquire()
    world.here.reboot()
    second = Lease(world.logdir, HastyDisk(), _Skipping(), world.here.process())
    second.acquire()
    second.check()


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b"\xff", b'{"owner": {"host": 1}}'])
def test_unreadable_record_is_judged_by_its_beat(world: World, content: bytes) -> None:
    lease = world.logdir / ".work" / "lease-00"
    lease.mkdir(parents=True)
    (lease / "owner.json").write_bytes(content)
    Lease(world.logdir, HastyDisk(), _Skipping(), world.here.process()).acquire()
    assert not lease.exists()


def test_many_at_once_and_one_of_them_wins(world: World) -> None:
    for _ in range(20):
        barrier = threading.Barrier(4)
        leases = [Lease(world.logdir, HastyDisk(), SystemClock(), world.here.process()) for _ in range(4)]
        outcomes: list[BaseException] = []

        def compete(lease: Lease, barrier: threading.Barrier = barrier, seen: list[BaseException] = outcomes) -> None:
            barrier.wait()
            _note(lease.acquire, seen)

        threads = [threading.Thread(target=compete, args=(lease,)) for lease in leases]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert all(isinstance(outcome, LeaseHeldError) for outcome in outcomes)
        (winner,) = [lease for lease in leases if lease.held]
        winner.check()
        winner.release()
        assert not [name for name in world.work() if name.startswith("lease-")]


def test_a_writer_that_beats_while_it_is_looked_at_is_named(world: World) -> None:
    host = world.here.process()
    first = world.lease(host)
    first.acquire()

    class Slow(HastyDisk):
        """Each name in a directory is looked at when another one has just changed."""

        def open_directory(self, path: Path, wanted: Callable[[str], bool] | None = None) -> OpenDirectory:
            def beat_and_ask(name: str) -> bool:
                first.beat()
                return wanted is None or wanted(name)

            return super().open_directory(path, beat_and_ask)

    with pytest.raises(LeaseHeldError, match=f"process {host.identity().pid} on here"):
        world.lease(disk=Slow()).acquire()


def test_a_beat_that_got_lost_is_made_anew(world: World) -> None:
    lease = world.lease()
    lease.acquire()
    lease.beat()
    next(lease.directory.glob("beat-*")).unlink()
    lease.beat()
    lease.beat()
    assert [path.name for path in lease.directory.glob("beat-*")] == ["beat-3"]


def test_a_directory_that_is_swept_all_the_time_is_given_up(world: World) -> None:
    class Swept(HastyDisk):
        """Somebody is quicker than every draft."""

        def make_directory(self, path: Path) -> None:
            super().make_directory(path)
            if path.name.startswith("new-"):
                path.rmdir()

    with pytest.raises(LeaseHeldError, match="come and go"):
        world.lease(disk=Swept()).acquire()
    assert world.work() == []


def test_nothing_is_written_without_the_lease(world: World) -> None:
    with pytest.raises(LeaseLostError, match="is not held"):
        _ = world.lease().directory


def test_identity_of_this_process() -> None:
    host = Host()
    me = host.identity()
    assert host.is_alive(me) is True
    assert Identity.from_json(me.to_json()) == me
    assert host.is_alive(Identity(me.host, me.boot, me.pid, me.started + 1)) is False, "the pid was used again"
    assert host.is_alive(Identity("elsewhere", "another boot", me.pid, me.started)) is None


@pytest.mark.parametrize("data", [{}, {"host": "h", "boot": "b", "pid": "1", "started": 1}])
def test_what_is_no_identity(data: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="not the identity"):
        Identity.from_json(data)


def test_fake_hosts_are_distinct() -> None:
    machine = FakeMachine()
    one, other = machine.process(), machine.process()
    assert isinstance(one, FakeHost)
    assert one.is_alive(other.identity())
    other.die()
    assert one.is_alive(other.identity()) is False


class _Skipping(FakeClock):
    def wait(self, event: threading.Event, timeout: float | None) -> bool:
        if not event.is_set() and timeout is not None:
            self.advance(timeout)
        return event.is_set()


def _note(act: object, outcomes: list[BaseException]) -> None:
    assert callable(act)
    try:
        act()
    except BaseException as error:
        outcomes.append(error)
