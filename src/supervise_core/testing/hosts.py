"""Processes that live and die by a test's word, all of them in this one."""

from __future__ import annotations

from supervise_core.host import Host, Identity


class FakeMachine:
    """A machine whose processes are made by ``process``."""

    def __init__(self, name: str = "machine") -> None:
        self.name = name
        self.boot = f"{name}/boot-1"
        self.living: set[Identity] = set()
        self._pids = 100
        self._boots = 1

    def process(self) -> FakeHost:
        """A new process that lives."""
        self._pids += 1
        identity = Identity(self.name, self.boot, self._pids, started=self._pids * 10)
        self.living.add(identity)
        return FakeHost(self, identity)

    def reboot(self) -> None:
        """All processes end, and nobody remembers them."""
        self._boots += 1
        self.boot = f"{self.name}/boot-{self._boots}"
        self.living.clear()


class FakeHost(Host):
    """The machine as one of its processes sees it; ``die`` ends the process."""

    def __init__(self, machine: FakeMachine, identity: Identity) -> None:
        self.machine = machine
        self._identity = identity

    def die(self) -> None:
        """The process is no more; its leases may be taken away."""
        self.machine.living.discard(self._identity)

    def identity(self) -> Identity:
        return self._identity

    def is_alive(self, other: Identity) -> bool | None:
        if other.boot != self.machine.boot:
            return None
        return other in self.machine.living
