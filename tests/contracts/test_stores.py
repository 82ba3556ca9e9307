"""The contract of a store, kept by the directory and by one in memory."""

from __future__ import annotations

from supervise_core.checkpoint_format import CheckpointId
from supervise_core.checkpoint_store import CheckpointStore
from supervise_core.directory_store import DirectoryStore
from supervise_core.disk import Disk
from supervise_core.testing.disks import CachedDisk, LinklessDisk
from supervise_core.testing.hosts import FakeHost, FakeMachine
from supervise_core.testing.store_contract import FILE, StoreContract
from supervise_core.testing.stores import MemoryPlace, MemoryStore


class TestDirectoryStore(StoreContract):
    disk: type[Disk] = Disk

    def setup_method(self) -> None:
        self.machine = FakeMachine()
        self.processes: dict[CheckpointStore, FakeHost] = {}

    def make_store(self) -> CheckpointStore:
        process = self.machine.process()
        store = DirectoryStore(self.directory / "runs" / "digits", disk=self.disk(), host=process)
        self.processes[store] = process
        return store

    def kill(self, store: CheckpointStore) -> None:
        self.processes[store].die()

    def damage(self, store: CheckpointStore, checkpoint: CheckpointId) -> None:
        path = self.directory / "runs" / "digits" / store.name_of(checkpoint) / FILE
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)


class TestDirectoryStoreWithoutLinks(TestDirectoryStore):
    disk = LinklessDisk
    can_link = False


class TestDirectoryStoreWithoutDirectWrites(TestDirectoryStore):
    disk = CachedDisk


class TestMemoryStore(StoreContract):
    def setup_method(self) -> None:
        self.place = MemoryPlace()

    def make_store(self) -> CheckpointStore:
        return MemoryStore(self.place)

    def kill(self, store: CheckpointStore) -> None:
        assert isinstance(store, MemoryStore)
        store.die()

    def damage(self, store: CheckpointStore, checkpoint: CheckpointId) -> None:
        files = self.place.committed[checkpoint]
        files[FILE] = files[FILE][:-1] + bytes([files[FILE][-1] ^ 1])
