"""The contract of a checkpoint store, as tests: subclass ``StoreContract`` and run the subclass with pytest."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from pathlib import Path
from typing import ClassVar

import pytest

from supervise_core.checkpoint_format import CheckpointId, Link
from supervise_core.checkpoint_store import CheckpointStore
from supervise_core.errors import CheckpointDamagedError, LeaseError, LeaseHeldError, LeaseLostError
from supervise_core.hashing import hash_of
from supervise_core.manifest import FileRecord, Manifest
from supervise_core.memory import own_memory

FILE = "model.safetensors"
SHARD = "model-00001-of-00002.safetensors"


def write_checkpoint(store: CheckpointStore, checkpoint: CheckpointId, content: bytes = b"content") -> CheckpointId:
    """Commit a checkpoint of one file, which need not be a safetensors file: a store does not look into files."""
    draft = store.begin(checkpoint)
    draft.write(FILE, [content[:3], memoryview(content)[3:]])
    return draft.commit(manifest_of(checkpoint.step, content))


def manifest_of(step: int, content: bytes, file: str = FILE) -> Manifest:
    """The manifest of a checkpoint of one file."""
    files = {file: FileRecord(len(content), hash_of([content]))}
    return Manifest(step=step, backend="none", wall_time=1.7e9 + step, parts=("model",), files=files)


class StoreContract(ABC):
    """What every store does::

        class TestDirectoryStore(StoreContract):
            def make_store(self) -> CheckpointStore:
                return DirectoryStore(self.directory / "logs", host=self.machine.process())

            def kill(self, store) -> None: ...
            def damage(self, checkpoint) -> None: ...

    One object of the class is made for each test; ``directory`` is an empty directory for that test alone.
    """

    directory: Path

    can_link: ClassVar[bool] = True
    """Whether its checkpoints can have a file in common; without it, ``Draft.link`` says False and does nothing."""

    @abstractmethod
    def make_store(self) -> CheckpointStore:
        """A store. Each call of one test gives another one of the same place, as another process would have it."""

    @abstractmethod
    def kill(self, store: CheckpointStore) -> None:
        """Have the process of this store die as far as others can see. What it then does is what a zombie does."""

    @abstractmethod
    def damage(self, store: CheckpointStore, checkpoint: CheckpointId) -> None:
        """Change a byte of ``model.safetensors`` in this checkpoint, behind the store's back."""

    @pytest.fixture(autouse=True)
    def _give_directory(self, tmp_path: Path) -> None:
        self.directory = tmp_path

    @pytest.fixture
    def store(self) -> CheckpointStore:
        """A store whose lease is held."""
        store = self.make_store()
        store.acquire()
        return store

    # ---- listing

    def test_new_place_is_empty(self) -> None:
        store = self.make_store()
        assert store.checkpoints() == []
        assert dict(store.damaged()) == {}

    def test_listing_goes_from_the_oldest_to_the_newest(self, store: CheckpointStore) -> None:
        for step in (20, 3, 100, 0):
            write_checkpoint(store, CheckpointId(step))
        assert [checkpoint.step for checkpoint in store.checkpoints()] == [0, 3, 20, 100]

    def test_others_see_what_is_committed(self, store: CheckpointStore) -> None:
        write_checkpoint(store, CheckpointId(7))
        other = self.make_store()
        assert other.checkpoints() == [CheckpointId(7)]
        with other.open(CheckpointId(7)) as reader:
            assert reader.manifest() == manifest_of(7, b"content")

    def test_a_revision_is_newer_than_what_it_replaces(self, store: CheckpointStore) -> None:
        write_checkpoint(store, CheckpointId(7), b"first")
        write_checkpoint(store, CheckpointId(7, 1), b"second")
        assert store.checkpoints() == [CheckpointId(7), CheckpointId(7, 1)]
        assert self.content(store, CheckpointId(7)) == b"first"
        assert self.content(store, CheckpointId(7, 1)) == b"second"

    def test_names_are_distinct_and_say_the_step(self, store: CheckpointStore) -> None:
        checkpoints = [CheckpointId(7), CheckpointId(7, 1), CheckpointId(71), CheckpointId(0)]
        names = [store.name_of(checkpoint) for checkpoint in checkpoints]
        assert len(set(names)) == len(names)
        assert all(str(checkpoint.step) in name for checkpoint, name in zip(checkpoints, names, strict=True))

    # ---- writing

    def test_nothing_is_listed_before_the_commit(self, store: CheckpointStore) -> None:
        draft = store.begin(CheckpointId(7))
        assert store.checkpoints() == []
        draft.write(FILE, [b"content"])
        assert store.checkpoints() == []
        with pytest.raises(FileNotFoundError):
            store.open(CheckpointId(7))
        assert draft.commit(manifest_of(7, b"content")) == CheckpointId(7)
        assert store.checkpoints() == [CheckpointId(7)]

    def test_files_come_back_as_written(self, store: CheckpointStore) -> None:
        draft = store.begin(CheckpointId(1))
        draft.write(FILE, [b"abc", bytearray(b"de"), memoryview(b"f"), b""])
        draft.write("empty.safetensors", [])
        files = {FILE: FileRecord(6, hash_of([b"abcdef"])), "empty.safetensors": FileRecord(0, hash_of([]))}
        draft.commit(Manifest(step=1, backend="none", wall_time=1.0, parts=(), files=files))
        with store.open(CheckpointId(1)) as reader:
            assert reader.size(FILE) == 6
            assert reader.size("absent.safetensors") is None
            assert bytes(reader.read(FILE, files[FILE])) == b"abcdef"
            assert bytes(reader.read("empty.safetensors", files["empty.safetensors"])) == b""

    @pytest.mark.parametrize("name", ["../evil", "/etc/evil", "a/b", "", ".", "..", ".hidden", "manifest.json", "a\0b"])
    def test_file_names_cannot_leave_the_checkpoint(self, store: CheckpointStore, name: str) -> None:
        draft = store.begin(CheckpointId(1))
        with pytest.raises(ValueError, match="is not the name of a file that a checkpoint may have"):
            draft.write(name, [b"evil"])
        draft.discard()

    def test_discard_leaves_nothing(self, store: CheckpointStore) -> None:
        draft = store.begin(CheckpointId(7))
        draft.write(FILE, [b"content"])
        draft.discard()
        draft.discard()
        assert store.checkpoints() == []
        write_checkpoint(store, CheckpointId(7))

    def test_discard_after_commit_changes_nothing(self, store: CheckpointStore) -> None:
        draft = store.begin(CheckpointId(7))
        draft.write(FILE, [b"content"])
        draft.commit(manifest_of(7, b"content"))
        draft.discard()
        assert self.content(store, CheckpointId(7)) == b"content"

    def test_two_drafts_at_a_time(self, store: CheckpointStore) -> None:
        first, second = store.begin(CheckpointId(1)), store.begin(CheckpointId(2))
        first.write(FILE, [b"one"])
        second.write(FILE, [b"two"])
        second.commit(manifest_of(2, b"two"))
        first.commit(manifest_of(1, b"one"))
        assert [self.content(store, checkpoint) for checkpoint in store.checkpoints()] == [b"one", b"two"]

    def test_a_commit_never_replaces_one_that_is_there(self, store: CheckpointStore) -> None:
        write_checkpoint(store, CheckpointId(7), b"first")
        with pytest.raises(OSError, match=re.escape(store.name_of(CheckpointId(7)))):
            write_checkpoint(store, CheckpointId(7), b"second")
        assert self.content(store, CheckpointId(7)) == b"first"

    def test_blocks_come_back_without_what_only_fills_the_last_one(self, store: CheckpointStore) -> None:
        content = bytes(range(256)) * 40
        blocks = own_memory(3 * 4096)
        blocks[: len(content)] = content
        blocks[len(content) :] = b"x" * (len(blocks) - len(content))
        draft = store.begin(CheckpointId(1))
        draft.write_blocks(FILE, [blocks[:4096], blocks[4096:]], len(content))
        draft.commit(manifest_of(1, content))
        assert self.content(store, CheckpointId(1)) == content

    # ---- sharing

    def test_a_linked_file_is_there_under_its_new_name(self, store: CheckpointStore) -> None:
        write_checkpoint(store, CheckpointId(1), b"frozen")
        self.commit_linked(store, CheckpointId(2), CheckpointId(1), b"frozen")
        assert self.content(store, CheckpointId(1)) == b"frozen"
        assert self.content(store, CheckpointId(2), SHARD) == b"frozen"

    def test_a_linked_file_survives_the_removal_of_every_older_checkpoint(self, store: CheckpointStore) -> None:
        write_checkpoint(store, CheckpointId(1), b"frozen")
        self.commit_linked(store, CheckpointId(2), CheckpointId(1), b"frozen")
        store.remove(CheckpointId(1))
        self.commit_linked(store, CheckpointId(3), CheckpointId(2), b"frozen", there=SHARD)
        store.remove(CheckpointId(2))
        assert store.checkpoints() == [CheckpointId(3)]
        assert self.content(store, CheckpointId(3), SHARD) == b"frozen"

    def test_links_are_made_all_or_none(self, store: CheckpointStore) -> None:
        write_checkpoint(store, CheckpointId(1), b"frozen")
        for there, size in (("absent.safetensors", 6), (FILE, 5), (FILE, 7)):
            draft = store.begin(CheckpointId(2))
            assert not draft.link(CheckpointId(1), [Link(FILE, FILE, 6), Link("other.safetensors", there, size)])
            draft.write(FILE, [b"content"])
            draft.write("other.safetensors", [b"free, too"])
            draft.commit(manifest_of(2, b"content"))
            assert self.content(store, CheckpointId(2)) == b"content"
            store.remove(CheckpointId(2))
        assert self.content(store, CheckpointId(1)) == b"frozen"

    def test_no_links_to_a_checkpoint_that_is_gone(self, store: CheckpointStore) -> None:
        write_checkpoint(store, CheckpointId(1))
        store.retire(CheckpointId(1))
        draft = store.begin(CheckpointId(2))
        for gone in (CheckpointId(1), CheckpointId(3)):
            assert not draft.link(gone, [Link(FILE, FILE, len(b"content"))])
        draft.write(FILE, [b"content"])
        draft.commit(manifest_of(2, b"content"))
        assert self.content(store, CheckpointId(2)) == b"content"

    def test_a_draft_that_is_discarded_takes_no_linked_file_with_it(self, store: CheckpointStore) -> None:
        write_checkpoint(store, CheckpointId(1), b"frozen")
        draft = store.begin(CheckpointId(2))
        assert draft.link(CheckpointId(1), [Link(SHARD, FILE, 6)]) is self.can_link
        draft.discard()
        assert store.checkpoints() == [CheckpointId(1)]
        assert self.content(store, CheckpointId(1)) == b"frozen"

    def test_a_draft_can_link_what_it_takes_the_place_of(self, store: CheckpointStore) -> None:
        write_checkpoint(store, CheckpointId(1), b"frozen")
        draft = store.begin(CheckpointId(1, 1))
        if not draft.link(CheckpointId(1), [Link(SHARD, FILE, 6)]):
            draft.write(SHARD, [b"frozen"])
        committed = draft.commit(manifest_of(1, b"frozen", SHARD), replaces=CheckpointId(1))
        assert self.content(store, committed, SHARD) == b"frozen"

    @pytest.mark.parametrize("name", ["../evil", "/etc/evil", "", ".hidden", "manifest.json"])
    def test_a_linked_file_cannot_leave_the_checkpoint(self, store: CheckpointStore, name: str) -> None:
        if not self.can_link:
            pytest.skip("this store does not link")
        write_checkpoint(store, CheckpointId(1))
        draft = store.begin(CheckpointId(2))
        with pytest.raises(ValueError, match="is not the name of a file that a checkpoint may have"):
            draft.link(CheckpointId(1), [Link(name, FILE, len(b"content"))])
        draft.discard()

    def commit_linked(
        self, store: CheckpointStore, checkpoint: CheckpointId, older: CheckpointId, content: bytes, there: str = FILE
    ) -> None:
        """Commit a checkpoint that has the one file of an older one, under another name; or a copy of it."""
        draft = store.begin(checkpoint)
        assert draft.link(older, [Link(SHARD, there, len(content))]) is self.can_link
        if not self.can_link:
            draft.write(SHARD, [content])
        draft.commit(manifest_of(checkpoint.step, content, SHARD))

    # ---- removing

    def test_remove(self, store: CheckpointStore) -> None:
        for step in (1, 2):
            write_checkpoint(store, CheckpointId(step))
        store.remove(CheckpointId(1))
        assert store.checkpoints() == [CheckpointId(2)]
        with pytest.raises(FileNotFoundError):
            store.open(CheckpointId(1))
        with pytest.raises(FileNotFoundError):
            store.remove(CheckpointId(1))

    def test_what_is_open_can_be_read_while_it_is_removed(self, store: CheckpointStore) -> None:
        write_checkpoint(store, CheckpointId(1), b"precious")
        with self.make_store().open(CheckpointId(1)) as reader:
            store.remove(CheckpointId(1))
            record = reader.manifest().files[FILE]
            assert bytes(reader.read(FILE, record)) == b"precious"
        reader.close()

    # ---- damage

    def test_damage_is_found(self, store: CheckpointStore) -> None:
        write_checkpoint(store, CheckpointId(1))
        self.damage(store, CheckpointId(1))
        with store.open(CheckpointId(1)) as reader, pytest.raises(CheckpointDamagedError, match="hash") as caught:
            reader.read(FILE, reader.manifest().files[FILE])
        assert caught.value.checkpoint == store.name_of(CheckpointId(1))

    def test_a_checkpoint_without_the_file_it_should_have_is_damaged(self, store: CheckpointStore) -> None:
        store.begin(CheckpointId(1)).commit(manifest_of(1, b"content"))
        with store.open(CheckpointId(1)) as reader, pytest.raises(CheckpointDamagedError, match=f"{FILE} is missing"):
            reader.read(FILE, reader.manifest().files[FILE])

    def test_set_aside_keeps_it_with_the_reason(self, store: CheckpointStore) -> None:
        for step in (1, 2):
            write_checkpoint(store, CheckpointId(step))
        store.set_aside(CheckpointId(2), "a bit was flipped: \N{SNOWMAN}")
        assert store.checkpoints() == [CheckpointId(1)]
        assert dict(store.damaged()) == {store.name_of(CheckpointId(2)): "a bit was flipped: \N{SNOWMAN}"}
        assert dict(self.make_store().damaged()) == dict(store.damaged())

    def test_the_same_step_can_be_set_aside_again(self, store: CheckpointStore) -> None:
        for reason in ("first", "second", "third"):
            write_checkpoint(store, CheckpointId(2))
            store.set_aside(CheckpointId(2), reason)
        assert sorted(store.damaged().values()) == ["first", "second", "third"]
        assert store.checkpoints() == []

    def test_retire(self, store: CheckpointStore) -> None:
        for _ in range(2):
            write_checkpoint(store, CheckpointId(2))
            store.retire(CheckpointId(2))
        assert store.checkpoints() == []
        assert dict(store.damaged()) == {}

    def test_retire_damaged(self, store: CheckpointStore) -> None:
        for step in (1, 2, 2):
            write_checkpoint(store, CheckpointId(step))
            store.set_aside(CheckpointId(step), "for the test")
        store.retire_damaged()
        assert dict(store.damaged()) == {}
        store.retire_damaged()
        assert store.checkpoints() == []

    # ---- one writer

    def test_second_writer_is_refused_and_told_who_the_first_is(self, store: CheckpointStore) -> None:
        other = self.make_store()
        with pytest.raises(LeaseHeldError, match="is already being written by") as caught:
            other.acquire()
        assert store.location in str(caught.value)
        store.check_lease()
        write_checkpoint(store, CheckpointId(1))

    def test_the_same_store_cannot_acquire_twice(self, store: CheckpointStore) -> None:
        with pytest.raises(LeaseHeldError):
            store.acquire()
        store.check_lease()

    def test_release_lets_the_next_one_in(self, store: CheckpointStore) -> None:
        store.release()
        store.release()
        other = self.make_store()
        with other.writing():
            write_checkpoint(other, CheckpointId(1))
        store.acquire()
        assert store.checkpoints() == [CheckpointId(1)]

    @pytest.mark.parametrize("act", ["begin", "remove", "set_aside", "retire", "beat", "check_lease"])
    def test_no_change_without_the_lease(self, act: str) -> None:
        store = self.make_store()
        with store.writing():
            write_checkpoint(store, CheckpointId(1))
        arguments: dict[str, tuple[object, ...]] = {
            "set_aside": (CheckpointId(1), "why"),
            "beat": (),
            "check_lease": (),
        }
        with pytest.raises(LeaseError):
            getattr(store, act)(*arguments.get(act, (CheckpointId(1),)))
        assert store.checkpoints() == [CheckpointId(1)]

    def test_a_dead_writer_is_replaced_and_its_drafts_swept(self, store: CheckpointStore) -> None:
        write_checkpoint(store, CheckpointId(1))
        store.begin(CheckpointId(2)).write(FILE, [b"half"])
        self.kill(store)
        other = self.make_store()
        other.acquire()
        assert other.checkpoints() == [CheckpointId(1)]
        write_checkpoint(other, CheckpointId(2))

    def test_a_writer_that_was_replaced_changes_nothing_more(self, store: CheckpointStore) -> None:
        write_checkpoint(store, CheckpointId(1))
        draft, late = store.begin(CheckpointId(2)), store.begin(CheckpointId(3))
        late.write(FILE, [b"content"])
        self.kill(store)
        other = self.make_store()
        other.acquire()
        for change in (
            lambda: draft.write(FILE, [b"content"]),
            lambda: late.commit(manifest_of(3, b"content")),
            *([lambda: draft.link(CheckpointId(1), [Link(FILE, FILE, len(b"content"))])] if self.can_link else []),
            lambda: store.begin(CheckpointId(4)),
            lambda: store.remove(CheckpointId(1)),
            lambda: store.set_aside(CheckpointId(1), "a zombie's reason"),
            lambda: store.retire(CheckpointId(1)),
            store.beat,
            store.check_lease,
        ):
            with pytest.raises(LeaseLostError):
                change()
        draft.discard()
        store.release()
        assert other.checkpoints() == [CheckpointId(1)]
        other.check_lease()
        write_checkpoint(other, CheckpointId(2))

    def test_beats(self, store: CheckpointStore) -> None:
        for _ in range(3):
            store.beat()
        store.check_lease()

    def content(self, store: CheckpointStore, checkpoint: CheckpointId, file: str = FILE) -> bytes:
        """The verified content of the one file of a checkpoint."""
        with store.open(checkpoint) as reader:
            return bytes(reader.read(file, reader.manifest().files[file]))
