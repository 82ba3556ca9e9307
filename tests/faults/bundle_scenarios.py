"""What a writer of TensorFlow's checkpoints may be doing when it dies, and what must then be found."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from scenarios import REASON, SkippingClock

from supervise_core.checkpoint_format import CheckpointId
from supervise_core.checkpointer import prune
from supervise_core.disk import Disk
from supervise_core.host import Host
from supervise_core.manifest import MANIFEST, Manifest
from supervise_core.retention import KeepLatest
from supervise_core.staging import Staging
from supervise_core.testing.disks import Crash, HastyDisk, WatchedDisk
from supervise_core.testing.hosts import FakeHost, FakeMachine
from supervise_tf.bundle import BundleWriter, read_bundle
from supervise_tf.bundle_files import INDEX
from supervise_tf.bundle_store import BundleStore
from supervise_tf.state_file import StateFile

VARIABLES = "variables"
META_GRAPH = b"the graph"
_writer = BundleWriter()
"""One for all stores, so that its graph is made once."""


def open_store(logdir: Path, disk: Disk, host: Host, unnumbered: bool = False) -> BundleStore:
    store = BundleStore(
        logdir, disk=disk, host=host, clock=SkippingClock(), meta_graph=META_GRAPH, unnumbered=unnumbered
    )
    store.format._writer = _writer  # type: ignore[attr-defined]
    return store


def save(store: BundleStore, step: int, *, value: float | None = None, note: int = 0) -> None:
    """Commit a small but complete checkpoint, as the core does. ``value`` is that of a variable, or else the step's;
    ``note`` is in the manifest alone."""
    same_step = [checkpoint for checkpoint in store.checkpoints() if checkpoint.step == step]
    older = same_step[-1] if same_step else None
    staging = Staging()
    staging.put(VARIABLES, {"w": np.full(5, float(step if value is None else value)), "b": np.arange(3)})
    staging.put("tf", {"step": step, "note": note})
    draft = store.begin(CheckpointId(step, 0 if older is None else older.revision + 1))
    snapshot = staging.snapshot()
    written = store.format.write(draft, snapshot, {"data": None})
    draft.commit(
        Manifest(step, "tf-graph", 1.7e9 + step, tuple(snapshot.parts), written.files, run=written.run), replaces=older
    )


@dataclass(frozen=True)
class State:
    """What a log directory holds, as far as anybody may care.

    ``noted`` are the notes in the manifests; -1 is that of a checkpoint without manifest.
    """

    listed: tuple[str, ...]
    damaged: tuple[tuple[str, str], ...] = ()
    retired: tuple[str, ...] = ()
    noted: tuple[int, ...] = ()
    values: Mapping[str, float] = field(default_factory=dict, compare=False)


def state_of(logdir: Path) -> State:
    """What is in a log directory; everything in the listing is verified by hash and by value, and so is what was put
    away. What the state file says can be understood, and there is nothing that belongs to no checkpoint."""
    store = BundleStore(logdir, disk=HastyDisk())
    values: dict[str, float] = {}
    notes = []
    for checkpoint in store.checkpoints():
        values[store.name_of(checkpoint)], note = _verify(store, checkpoint)
        notes.append(note)
    for shelf in ("set-aside", "retired"):
        for parcel in (logdir / shelf).glob("*"):
            _verify_parcel(parcel)
    state = StateFile(logdir, store._disk)
    if (logdir / "checkpoint").exists():
        assert state.newest() is not None, "the state file is empty"
    return State(
        tuple(store.name_of(checkpoint) for checkpoint in store.checkpoints()),
        tuple(sorted(store.damaged().items())),
        tuple(sorted(path.name for path in (logdir / "retired").glob("*"))),
        tuple(notes) if any(notes) else (),
        values,
    )


def told(logdir: Path) -> str | None:
    """What the state file calls the newest."""
    return StateFile(logdir, HastyDisk()).newest()


def litter(logdir: Path) -> list[str]:
    """Files of checkpoints that are not in the listing."""
    names = {path.name for path in logdir.iterdir()}
    prefixes = {name.removesuffix(f".{INDEX}") for name in names if name.endswith(f".{INDEX}")}
    return sorted(
        name
        for name in names
        if name.startswith("model.ckpt") and not any(name.startswith(f"{prefix}.") for prefix in prefixes)
    )


def _verify(store: BundleStore, checkpoint: CheckpointId) -> tuple[float, int]:
    with store.open(checkpoint) as reader:
        has_manifest = reader.size(MANIFEST) is not None
        content = store.format.read(reader)
        prefix = reader.prefix  # type: ignore[attr-defined]
    tensors = read_bundle(prefix)
    assert content.manifest.step == checkpoint.step
    assert list(tensors["b"]) == [0, 1, 2]
    value = float(tensors["w"][0])
    assert int(value) == checkpoint.step
    note = content.parts["tf"].tree()["note"] if has_manifest else -1
    return value, note


def _verify_parcel(parcel: Path) -> None:
    """What was put away is complete."""
    indexes = [path.name.removesuffix(f".{INDEX}") for path in parcel.glob(f"*.{INDEX}")]
    assert len(indexes) == 1, f"{parcel} holds {sorted(path.name for path in parcel.iterdir())}"
    store = BundleStore(parcel, disk=HastyDisk())
    (checkpoint,) = store.checkpoints()
    _verify(store, checkpoint)
    with store.open(checkpoint) as reader:
        assert set(reader.manifest().files) == {INDEX, "meta", "data-00000-of-00001"}


@dataclass(frozen=True)
class Scenario:
    """``act`` is done by a writer that holds the lease of a directory that ``prepare`` made.

    It goes through ``states``. ``wear`` is what happened to the directory in between.
    """

    name: str
    prepare: Callable[[BundleStore], None] | None
    act: Callable[[BundleStore], None]
    states: tuple[State, ...]
    wear: Callable[[Path], None] = lambda logdir: None
    unnumbered: bool = False

    def __str__(self) -> str:
        return self.name

    def set_up(self, logdir: Path) -> None:
        if self.prepare is not None:
            store = open_store(logdir, HastyDisk(), FakeMachine("elsewhere").process(), self.unnumbered)
            with store.writing():
                self.prepare(store)
        self.wear(logdir)

    def run(self, logdir: Path, disk: Disk, host: Host) -> None:
        store = open_store(logdir, disk, host, self.unnumbered)
        with store.writing():
            self.act(store)


def _steps(*steps: int) -> Callable[[BundleStore], None]:
    def act(store: BundleStore) -> None:
        for step in steps:
            save(store, step)

    return act


def _with_damaged(store: BundleStore) -> None:
    _steps(1, 2, 3)(store)
    store.set_aside(CheckpointId(3), REASON)


def _die(at: str, of: Callable[[BundleStore], None]) -> Callable[[Path], None]:
    """A writer that dies before its first rename to a path that contains ``at``."""

    class Dying(HastyDisk):
        def rename(self, source: Path, target: Path) -> None:
            if at in str(target):
                raise Crash(target)
            super().rename(source, target)

    def die(logdir: Path) -> None:
        store = open_store(logdir, Dying(), FakeMachine("gone").process())
        store.acquire()
        with contextlib.suppress(Crash):
            of(store)

    return die


def _nothing(store: BundleStore) -> None:
    return None


def _by_two(act: Callable[[BundleStore], None], method: str, ending: str) -> Callable[[BundleStore], None]:
    """The writer dies when it has done this to a path that ends so, and synced nothing; the next one finishes."""

    def by_two(store: BundleStore) -> None:
        disk, process = store._disk, store._lease._host
        assert isinstance(disk, WatchedDisk)
        assert isinstance(process, FakeHost)
        done: list[Path] = []

        def after_it(called: str, path: Path) -> bool:
            if called == method and str(path).endswith(ending):
                done.append(path)
            return bool(done) and called == "sync_directory"

        with disk.interrupted(after_it):
            act(store)
        process.die()
        with open_store(store.path, disk, process.machine.process()).writing():
            pass

    return by_two


def _set_aside(step: int) -> Callable[[BundleStore], None]:
    return lambda store: store.set_aside(CheckpointId(step), REASON)


def _replace_and_remove(store: BundleStore) -> None:
    save(store, 2, value=2.5)
    prune(store, KeepLatest(5))


def _replace_state(store: BundleStore) -> None:
    save(store, 2, note=7)


def _lose_work_folder(logdir: Path) -> None:
    """As when the checkpoints alone were copied."""
    for path in (logdir / ".work").iterdir():
        path.unlink()
    (logdir / ".work").rmdir()


def _by_a_saver(logdir: Path) -> None:
    """As when the program's own Saver had written the newest, with another meta graph."""
    (logdir / f"model.ckpt-2.{MANIFEST}").unlink()
    (logdir / "model.ckpt-2.meta").write_bytes(b"another graph, of another length")


def _c(*steps: int) -> tuple[str, ...]:
    return tuple(f"model.ckpt-{step}" for step in steps)


SCENARIOS = (
    Scenario("first save", None, _steps(0), (State(()), State(_c(0)))),
    Scenario("commit", _steps(1, 2), _steps(3), (State(_c(1, 2)), State(_c(1, 2, 3)))),
    Scenario("two commits", _steps(1), _steps(2, 3), (State(_c(1)), State(_c(1, 2)), State(_c(1, 2, 3)))),
    Scenario(
        "commit of a revision",
        _steps(1, 2),
        _replace_and_remove,
        (State(_c(1, 2)), State((*_c(1, 2), "model.ckpt-2.1")), State((*_c(1), "model.ckpt-2.1"))),
    ),
    Scenario("replace the manifest", _steps(1, 2), _replace_state, (State(_c(1, 2)), State(_c(1, 2), noted=(0, 7)))),
    Scenario(
        "adopt what a Saver wrote",
        _steps(1, 2),
        _steps(2),
        (State(_c(1, 2), noted=(0, -1)), State(_c(1, 2))),
        _by_a_saver,
    ),
    Scenario(
        "prune",
        _steps(1, 2, 3),
        lambda store: prune(store, KeepLatest(1)),
        (State(_c(1, 2, 3)), State(_c(2, 3)), State(_c(3))),
    ),
    Scenario("set aside", _steps(1, 2), _set_aside(2), (State(_c(1, 2)), State(_c(1), ((*_c(2), REASON),)))),
    Scenario("set aside the only one", _steps(2), _set_aside(2), (State(_c(2)), State((), ((*_c(2), REASON),)))),
    Scenario(
        "set aside another",
        _with_damaged,
        _set_aside(2),
        (State(_c(1, 2), ((*_c(3), REASON),)), State(_c(1), ((*_c(2), REASON), (*_c(3), REASON)))),
    ),
    Scenario(
        "set aside in a copy",
        _steps(1, 2),
        _set_aside(2),
        (State(_c(1, 2)), State(_c(1), ((*_c(2), REASON),))),
        _lose_work_folder,
    ),
    Scenario(
        "set aside by two",
        _with_damaged,
        _by_two(_set_aside(2), "rename", "model.ckpt-2.index"),
        (State(_c(1, 2), ((*_c(3), REASON),)), State(_c(1), ((*_c(2), REASON), (*_c(3), REASON)))),
    ),
    Scenario(
        "set aside by two, later",
        _steps(1, 2),
        _by_two(_set_aside(2), "rename", "model.ckpt-2.data-00000-of-00001"),
        (State(_c(1, 2)), State(_c(1), ((*_c(2), REASON),))),
    ),
    Scenario(
        "remove by two",
        _steps(1, 2),
        _by_two(lambda store: store.remove(CheckpointId(1)), "rename", "trash-model.ckpt-1/model.ckpt-1.meta"),
        (State(_c(1, 2)), State(_c(2))),
    ),
    Scenario(
        "commit by two",
        _steps(1),
        _by_two(_steps(2), "rename", "digits/model.ckpt-2.index"),
        (State(_c(1)), State(_c(1, 2))),
    ),
    Scenario("sweep a draft", _steps(1, 2), _nothing, (State(_c(1, 2)),), _die("/model.ckpt-3.", _steps(3))),
    Scenario(
        "sweep half a commit", _steps(1, 2), _nothing, (State(_c(1, 2)),), _die("digits/model.ckpt-3.index", _steps(3))
    ),
    Scenario(
        "sweep half a removal",
        _steps(1, 2),
        _nothing,
        (State(_c(2)),),
        _die("model.ckpt-1.data", lambda store: store.remove(CheckpointId(1))),
    ),
    Scenario(
        "sweep evidence",
        _with_damaged,
        _nothing,
        (State(_c(1), ((*_c(2), REASON), (*_c(3), REASON))),),
        _die("/set-aside/", _set_aside(2)),
    ),
    Scenario(
        "sweep half the evidence",
        _steps(1, 2),
        _nothing,
        (State(_c(1), ((*_c(2), REASON),)),),
        _die("model.ckpt-2.data", _set_aside(2)),
    ),
    Scenario(
        "retire",
        _steps(1, 2),
        lambda store: store.retire(CheckpointId(2)),
        (State(_c(1, 2)), State(_c(1), (), _c(2))),
    ),
    Scenario(
        "retire the damaged",
        _with_damaged,
        lambda store: store.retire_damaged(),
        (State(_c(1, 2), ((*_c(3), REASON),)), State(_c(1, 2), (), _c(3))),
    ),
    Scenario(
        "commit without numbers",
        _steps(1, 2),
        _steps(3),
        (State(_c(1, 2)), State(_c(1, 2, 3))),
        unnumbered=True,
    ),
    Scenario(
        "retire without numbers",
        _steps(2),
        lambda store: store.retire(CheckpointId(2)),
        (State(_c(2)), State((), (), _c(2))),
        unnumbered=True,
    ),
)
