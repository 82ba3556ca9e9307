"""A disk that loses, at a power cut, what was never made durable."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from supervise_core.testing.disks import CrashingDisk, Data


@dataclass(eq=False, slots=True)
class _File:
    content: bytearray = field(default_factory=bytearray)
    durable: bytes = b""


@dataclass(eq=False, slots=True)
class _Directory:
    entries: dict[str, _File | _Directory] = field(default_factory=dict)
    durable: dict[str, _File | _Directory] = field(default_factory=dict)


_Node = _File | _Directory
_Slot = tuple[int, str]


@dataclass(eq=False, slots=True)
class _Change:
    """Entries that change together: one for a creation or a removal, two for a rename."""

    edits: tuple[tuple[_Directory, str, _Node | None], ...]

    def names(self) -> set[_Slot]:
        return {(id(directory), name) for directory, name, _ in self.edits}

    def touches(self, directory: _Directory) -> bool:
        return any(edited is directory for edited, _, _ in self.edits)

    def make_durable(self) -> None:
        for directory, name, node in self.edits:
            if node is None:
                directory.durable.pop(name, None)
            else:
                directory.durable[name] = node


class Outcome:
    """What a power cut does with all that was not synced. This one, the worst for creations, forgets everything."""

    def survives(self) -> bool:
        """Whether a change of names that was not synced survives."""
        return False

    def content(self, durable: bytes, written: bytes) -> bytes:
        """What is found in a file whose last writes were not synced."""
        return durable


class NamesWithoutContent(Outcome):
    """All names survive, and no content that was not synced: files of no bytes under their new names."""

    def survives(self) -> bool:
        return True


class Everything(Outcome):
    """All survives, as after the death of a process alone."""

    def survives(self) -> bool:
        return True

    def content(self, durable: bytes, written: bytes) -> bytes:
        return written


class AnyOutcome(Outcome):
    """Drawn from a seed: each change of names survives or not, each file holds a part of what was written, or zeros."""

    def __init__(self, seed: int) -> None:
        self._random: Final = random.Random(seed)

    def survives(self) -> bool:
        return self._random.random() < 0.5

    def content(self, durable: bytes, written: bytes) -> bytes:
        end = self._random.randint(len(durable), max(len(durable), len(written)))
        return self._random.choice([durable, written[:end], written, bytes(len(written))])


class LossyDisk(CrashingDisk):
    """A real directory, with a model of what of it is durable; ``power_cut`` turns the directory into what survives.

    A file's content is durable once the file is synced. An entry of a directory (made, renamed, removed) is durable
    once that directory is synced, a rename once either of its two directories is; changes of one and the same name
    survive only in their order. Nothing else is promised, and so nothing else is assumed: not that what is below a new
    directory waits for its name, nor that changes of different names keep their order.

    ``without(number, method, path)`` drops a sync that it says yes to, silently; syncs are numbered from 1. None of
    them reaches the real disk. All changes below ``root`` must go through this one, but for the content of files that
    are then given to ``sync_file``.
    """

    def __init__(
        self,
        root: Path,
        crash_before: int | None = None,
        *,
        without: Callable[[int, str, Path], bool] | None = None,
    ) -> None:
        super().__init__(crash_before)
        self.syncs: list[tuple[str, Path]] = []
        self._root = root
        self._without = without or (lambda *_: False)
        self._tree = _read_tree(root)
        self._pending: list[_Change] = []
        self._open: dict[int, _File] = {}

    def power_cut(self, outcome: Outcome | None = None) -> None:
        """Leave on the real disk what survives; this disk itself is of no further use."""
        fate = outcome or Outcome()
        lost: set[_Slot] = set()
        for change in self._pending:
            if change.names() & lost or not fate.survives():
                lost |= change.names()
            else:
                change.make_durable()
        self._pending.clear()
        for entry in list(self._root.iterdir()):
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
        _write_tree(self._tree, self._root, fate)
        self.crash_before = 0

    # ---- the changing calls

    def make_directory(self, path: Path) -> None:
        super().make_directory(path)
        self._change((path, _Directory()))

    def create(self, path: Path, *, direct: bool = False) -> int:
        descriptor = super().create(path, direct=direct)
        self._open[descriptor] = file = _File()
        self._change((path, file))
        return descriptor

    def write(self, descriptor: int, data: Data) -> None:
        super().write(descriptor, data)
        self._open[descriptor].content += memoryview(data).cast("B")

    def truncate(self, descriptor: int, size: int) -> None:
        super().truncate(descriptor, size)
        del self._open[descriptor].content[size:]

    def sync(self, descriptor: int) -> None:
        path = self._paths[descriptor]
        if self._is_dropped("sync", path):
            return
        self._before("sync", path)
        file = self._open[descriptor]
        file.durable = bytes(file.content)

    def sync_file(self, path: Path) -> None:
        """The file is new to this disk: what else wrote it did not ask."""
        file = _File(bytearray(path.read_bytes()))
        self._change((path, file))
        if not self._is_dropped("sync_file", path):
            self._before("sync_file", path)
            file.durable = bytes(file.content)

    def close(self, descriptor: int) -> None:
        super().close(descriptor)
        self._open.pop(descriptor, None)

    def sync_directory(self, path: Path) -> None:
        if self._is_dropped("sync_directory", path):
            return
        self._before("sync_directory", path)
        if path.is_relative_to(self._root):
            self._settle(self._directory(path))

    def rename(self, source: Path, target: Path) -> None:
        super().rename(source, target)
        self._change((source, None), (target, self._node(source)))

    def link(self, source: Path, target: Path) -> None:
        super().link(source, target)
        self._change((target, self._node(source)))

    def exchange(self, one: Path, other: Path) -> None:
        super().exchange(one, other)
        self._change((one, self._node(other)), (other, self._node(one)))

    def remove_file(self, path: Path) -> None:
        super().remove_file(path)
        self._change((path, None))

    def remove_directory(self, path: Path) -> None:
        super().remove_directory(path)
        self._change((path, None))

    # ---- the model

    def _is_dropped(self, method: str, path: Path) -> bool:
        self.syncs.append((method, path))
        if not self._without(len(self.syncs), method, path):
            return False
        self._before(method, path)  # it still counts as a call, and crashes as one
        return True

    def _node(self, path: Path) -> _Node:
        node: _Node = self._tree
        for name in path.relative_to(self._root).parts:
            assert isinstance(node, _Directory), f"{path} is below a file"
            node = node.entries[name]
        return node

    def _directory(self, path: Path) -> _Directory:
        node = self._node(path)
        assert isinstance(node, _Directory)
        return node

    def _change(self, *edits: tuple[Path, _Node | None]) -> None:
        change = _Change(tuple((self._directory(path.parent), path.name, node) for path, node in edits))
        for directory, name, node in change.edits:
            if node is None:
                directory.entries.pop(name, None)
            else:
                directory.entries[name] = node
        self._pending.append(change)

    def _settle(self, directory: _Directory) -> None:
        """Make durable what touches the directory, and what came earlier for the same names."""
        wanted: set[_Slot] = set()
        settled: list[_Change] = []
        for change in reversed(self._pending):
            if change.touches(directory) or change.names() & wanted:
                wanted |= change.names()
                settled.append(change)
        for change in reversed(settled):
            change.make_durable()
        self._pending = [change for change in self._pending if change not in settled]


def _read_tree(path: Path) -> _Directory:
    directory = _Directory()
    for entry in path.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            node: _Node = _read_tree(entry)
        else:
            content = entry.read_bytes()
            node = _File(bytearray(content), content)
        directory.entries[entry.name] = directory.durable[entry.name] = node
    return directory


def _write_tree(directory: _Directory, path: Path, fate: Outcome) -> None:
    for name, node in sorted(_items(directory.durable)):
        if isinstance(node, _Directory):
            (path / name).mkdir()
            _write_tree(node, path / name, fate)
        else:
            unsynced = bytes(node.content) != node.durable
            content = fate.content(node.durable, bytes(node.content)) if unsynced else node.durable
            (path / name).write_bytes(content)


def _items(entries: Mapping[str, _Node]) -> Iterable[tuple[str, _Node]]:
    return ((name, entries[name]) for name in sorted(entries))
