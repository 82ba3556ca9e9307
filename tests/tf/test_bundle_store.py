"""The store of TensorFlow's checkpoints: what every store promises, and what TensorFlow's own tools must find."""

from __future__ import annotations

import functools
import itertools
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
tf = pytest.importorskip("tensorflow", reason="TensorFlow is not installed")

from supervise_core import KeepLatest  # noqa: E402
from supervise_core.checkpoint_format import CheckpointContent, CheckpointId  # noqa: E402
from supervise_core.checkpointer import prune  # noqa: E402
from supervise_core.directory_store import DirectoryStore  # noqa: E402
from supervise_core.errors import (  # noqa: E402
    CheckpointDamagedError,
    CheckpointError,
    LeaseError,
    LeaseHeldError,
    LeaseLostError,
    UnsupportedStateError,
)
from supervise_core.manifest import MANIFEST, Manifest  # noqa: E402
from supervise_core.staging import Staging  # noqa: E402
from supervise_core.testing.hosts import FakeHost, FakeMachine  # noqa: E402
from supervise_core.testing.interleaving import Actor, Time  # noqa: E402
from supervise_tf.bundle import BundleWriter  # noqa: E402
from supervise_tf.bundle_files import BundleDraft, BundleReader  # noqa: E402
from supervise_tf.bundle_store import BundleStore  # noqa: E402

v1 = tf.compat.v1
DATA = "data-00000-of-00001"
ENDINGS = [DATA, "index", MANIFEST, "meta"]
_writer = BundleWriter()


class Place:
    """A log directory and the processes that write to it."""

    def __init__(self, logdir: Path) -> None:
        self.logdir = logdir
        self.machine = FakeMachine()
        self.processes: dict[BundleStore, FakeHost] = {}

    def store(self, **more: Any) -> BundleStore:
        """Another store, as another process would have it."""
        process = self.machine.process()
        store = BundleStore(self.logdir, host=process, **({"meta_graph": b"the graph"} | more))
        store.format._writer = _writer  # type: ignore[attr-defined]
        self.processes[store] = process
        return store

    @contextmanager
    def writing(self, **more: Any) -> Iterator[BundleStore]:
        store = self.store(**more)
        with store.writing():
            yield store

    def kill(self, store: BundleStore) -> None:
        self.processes[store].die()

    def contents(self) -> dict[str, bytes]:
        """The files that are there, but for those in the folder of writers."""
        return {path.name: path.read_bytes() for path in self.logdir.iterdir() if path.is_file()}

    def names(self) -> list[str]:
        """All that is there, but for the folder of writers."""
        return sorted(path.name for path in self.logdir.iterdir() if path.name != ".work")


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path / "runs" / "digits")


@pytest.fixture
def store(place: Place) -> BundleStore:
    """A store whose lease is held."""
    store = place.store()
    store.acquire()
    return store


def save(store: BundleStore, step: int, value: float | None = None, note: int = 0, revision: int | None = None) -> str:
    """Commit as the core does; the name of what was committed."""
    same_step = [checkpoint for checkpoint in store.checkpoints() if checkpoint.step == step]
    older = same_step[-1] if same_step and revision is None else None
    new = revision if revision is not None else 0 if older is None else older.revision + 1
    draft, manifest = begin(store, CheckpointId(step, new), value, note)
    return store.name_of(draft.commit(manifest, replaces=older))


def begin(store: BundleStore, checkpoint: CheckpointId, value: float | None = None, note: int = 0) -> Any:
    """A draft with all that a checkpoint has, and its manifest."""
    step = checkpoint.step
    staging = Staging()
    staging.put("variables", {"w": np.full(5, float(step if value is None else value))})
    staging.put("tf", {"note": note})
    draft = store.begin(checkpoint)
    snapshot = staging.snapshot()
    written = store.format.write(draft, snapshot, {"position": step})
    return draft, Manifest(step, "tf-graph", 1.7e9, tuple(snapshot.parts), written.files, run=written.run)


def content_of(store: BundleStore, name: str) -> CheckpointContent:
    checkpoint = next(known for known in store.checkpoints() if store.name_of(known) == name)
    with store.open(checkpoint) as reader:
        reader.manifest_of(checkpoint)
        return store.format.read(reader)


def value_of(store: BundleStore, name: str) -> float:
    return float(content_of(store, name).parts["variables"].tree()["w"][0])


def listed(store: BundleStore) -> list[str]:
    return [store.name_of(checkpoint) for checkpoint in store.checkpoints()]


def files_of(name: str, *more: str) -> list[str]:
    return sorted([*(f"{name}.{ending}" for ending in ENDINGS), *more])


def save_as_tensorflow(logdir: Path, *steps: int, **saver: Any) -> None:
    """Checkpoints as TensorFlow's own Saver writes them."""
    logdir.mkdir(parents=True, exist_ok=True)
    with tf.Graph().as_default(), v1.Session() as session:
        w = v1.get_variable("w", (5,), tf.float64, v1.zeros_initializer())
        own = v1.train.Saver(**saver)
        for step in steps:
            session.run(v1.assign(w, tf.fill((5,), tf.constant(float(step), tf.float64))))
            own.save(session, str(logdir / "model.ckpt"), global_step=step if step >= 0 else None)


# ---- what every store promises


def test_a_new_place_is_empty(place: Place) -> None:
    store = place.store()
    assert store.checkpoints() == []
    assert dict(store.damaged()) == {}
    assert store.preferred() is None
    assert not place.logdir.exists()


def test_listing_goes_from_the_oldest_to_the_newest(store: BundleStore, place: Place) -> None:
    for step in (20, 3, 100, 0):
        save(store, step)
    assert listed(store) == listed(place.store()) == [f"model.ckpt-{step}" for step in (0, 3, 20, 100)]


def test_nothing_is_listed_before_the_commit(store: BundleStore, place: Place) -> None:
    draft, manifest = begin(store, CheckpointId(7))
    assert store.checkpoints() == []
    with pytest.raises(FileNotFoundError):
        store.open(CheckpointId(7))
    assert place.names() == []
    assert draft.commit(manifest) == CheckpointId(7)
    assert place.names() == files_of("model.ckpt-7", "checkpoint")
    assert [
        path.name for path in (place.logdir / ".work" / store._lease.directory.name).iterdir() if path.is_dir()
    ] == []


def test_all_comes_back_as_it_was_written(store: BundleStore, place: Place) -> None:
    save(store, 7, note=3)
    content = content_of(place.store(), "model.ckpt-7")
    assert sorted(content.parts) == ["tf", "variables"]
    assert content.parts["tf"].tree() == {"note": 3}
    assert content.run_state == {"position": 7}
    assert content.manifest.step == 7
    assert set(content.manifest.files) == {"index", DATA, "meta"}
    assert value_of(store, "model.ckpt-7") == 7.0
    assert (place.logdir / "model.ckpt-7.meta").read_bytes() == b"the graph"


def test_discard_leaves_nothing_and_after_a_commit_changes_nothing(store: BundleStore, place: Place) -> None:
    draft, _ = begin(store, CheckpointId(7))
    draft.discard()
    draft.discard()
    assert place.names() == []
    draft, manifest = begin(store, CheckpointId(7))
    draft.commit(manifest)
    draft.discard()
    assert value_of(store, "model.ckpt-7") == 7.0


def test_two_drafts_at_a_time(store: BundleStore) -> None:
    first, second = begin(store, CheckpointId(1)), begin(store, CheckpointId(2))
    second[0].commit(second[1])
    first[0].commit(first[1])
    assert [value_of(store, name) for name in listed(store)] == [1.0, 2.0]


def test_a_commit_never_replaces_one_that_is_there(store: BundleStore) -> None:
    save(store, 7)
    with pytest.raises(FileExistsError, match=r"model\.ckpt-7"):
        save(store, 7, value=8.0, revision=0)
    assert value_of(store, "model.ckpt-7") == 7.0


def test_remove(store: BundleStore, place: Place) -> None:
    for step in (1, 2):
        save(store, step)
    store.remove(CheckpointId(1))
    assert place.names() == files_of("model.ckpt-2", "checkpoint")
    for act in (store.open, store.remove):
        with pytest.raises(FileNotFoundError):
            act(CheckpointId(1))
    store.remove(CheckpointId(2))
    assert place.names() == []


def test_what_is_open_can_be_read_while_it_is_removed(store: BundleStore, place: Place) -> None:
    save(store, 1)
    content = (place.logdir / f"model.ckpt-1.{DATA}").read_bytes()
    with place.store().open(CheckpointId(1)) as reader:
        store.remove(CheckpointId(1))
        records = reader.manifest().files
        assert bytes(reader.read(DATA, records[DATA])) == content
    reader.close()


def test_one_that_has_a_number_in_common_is_not_touched(store: BundleStore, place: Place) -> None:
    for step in (1, 10, 100):
        save(store, step)
    save(store, 1, value=1.5)
    (place.logdir / "model.ckpt-1.notes").write_bytes(b"of the user")
    store.remove(CheckpointId(1))
    store.set_aside(CheckpointId(10), "for the test")
    assert listed(store) == ["model.ckpt-1.1", "model.ckpt-100"]
    assert [value_of(store, name) for name in listed(store)] == [1.5, 100.0]
    assert (place.logdir / "model.ckpt-1.notes").exists()


def test_set_aside_keeps_all_of_it_with_the_reason(store: BundleStore, place: Place) -> None:
    for step in (1, 2):
        save(store, step)
    store.set_aside(CheckpointId(2), "a bit was flipped: \N{SNOWMAN}")
    assert listed(store) == ["model.ckpt-1"]
    assert dict(store.damaged()) == dict(place.store().damaged()) == {"model.ckpt-2": "a bit was flipped: \N{SNOWMAN}"}
    kept = sorted(path.name for path in (place.logdir / "set-aside" / "model.ckpt-2").iterdir())
    assert kept == files_of("model.ckpt-2", "reason.json")
    assert place.names() == files_of("model.ckpt-1", "checkpoint", "set-aside")


def test_the_same_step_can_be_set_aside_and_retired_again(store: BundleStore) -> None:
    for reason in ("first", "second"):
        save(store, 2)
        store.set_aside(CheckpointId(2), reason)
        save(store, 2)
        store.retire(CheckpointId(2))
    assert sorted(store.damaged().values()) == ["first", "second"]
    store.retire_damaged()
    assert dict(store.damaged()) == {}
    assert store.checkpoints() == []
    assert len(list((store.path / "retired").iterdir())) == 4


def test_retired_ones_can_be_read_by_tensorflow(store: BundleStore, place: Place) -> None:
    save(store, 2)
    store.retire(CheckpointId(2))
    retired = place.logdir / "retired" / "model.ckpt-2" / "model.ckpt-2"
    assert tf.train.load_checkpoint(str(retired)).get_tensor("w")[0] == 2.0


# ---- one writer


def test_a_second_writer_is_refused(store: BundleStore, place: Place) -> None:
    with pytest.raises(LeaseHeldError, match="is already being written by"):
        place.store().acquire()
    store.release()
    with place.writing():
        pass


@pytest.mark.parametrize("act", ["begin", "remove", "set_aside", "retire"])
def test_no_change_without_the_lease(place: Place, act: str) -> None:
    with place.writing() as first:
        save(first, 1)
    store, more = place.store(), {"set_aside": ["why"]}.get(act, [])
    with pytest.raises(LeaseError):
        getattr(store, act)(CheckpointId(1), *more)
    assert listed(store) == ["model.ckpt-1"]
    assert place.names() == files_of("model.ckpt-1", "checkpoint")


def test_a_writer_that_was_replaced_changes_nothing_more(store: BundleStore, place: Place) -> None:
    save(store, 1)
    late, manifest = begin(store, CheckpointId(3))
    place.kill(store)
    other = place.store()
    other.acquire()
    for change in (
        lambda: late.write("meta", [b"x"]),
        lambda: late.commit(manifest),
        lambda: save(store, 4),
        lambda: save(store, 1, note=5),
        lambda: store.remove(CheckpointId(1)),
        lambda: store.set_aside(CheckpointId(1), "a zombie's reason"),
        lambda: store.retire(CheckpointId(1)),
        store.beat,
        store.check_lease,
    ):
        with pytest.raises(LeaseLostError):
            change()
    late.discard()
    store.release()
    assert listed(other) == ["model.ckpt-1"]
    assert value_of(other, "model.ckpt-1") == 1.0
    save(other, 2)


@pytest.mark.parametrize("act", ["a new step", "state alone"])
def test_a_writer_that_is_frozen_at_any_call_of_a_commit_does_it_or_says_why_not(tmp_path: Path, act: str) -> None:
    for calls in itertools.count():
        place = Place(tmp_path / str(calls))
        actor = Actor(Time())
        store = place.store(disk=actor.disk)
        store.acquire()
        save(store, 1)
        if act == "a new step":
            draft, manifest = begin(store, CheckpointId(3))
            actor.begin(functools.partial(draft.commit, manifest))
        else:
            draft, manifest = begin(store, CheckpointId(1, 1), note=5)
            actor.begin(functools.partial(draft.commit, manifest, CheckpointId(1)))
        for _ in range(calls):
            if actor.busy:
                actor.step()
        ended = not actor.busy
        place.kill(store)
        other = place.store()
        other.acquire()
        there = place.contents()
        actor.finish()
        assert place.contents() == there
        if act == "a new step":
            done = "model.ckpt-3" in listed(other)
        else:
            done = content_of(other, "model.ckpt-1").parts["tf"].tree() == {"note": 5}
        assert isinstance(actor.error, LeaseLostError) or (actor.error is None and done), calls
        actor.kill()
        if ended:
            break


# ---- other layouts


def test_it_refuses_a_directory_with_checkpoints_of_the_core(tmp_path: Path) -> None:
    (tmp_path / "model.ckpt-7").mkdir()
    with pytest.raises(CheckpointError, match="as directories") as caught:
        BundleStore(tmp_path).acquire()
    assert "model.ckpt-7" in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["model.ckpt-7"]
    with BundleStore(tmp_path, "other").writing():
        pass


@pytest.mark.parametrize("by", ["us", "tensorflow"])
def test_the_store_of_the_core_refuses_checkpoints_of_tensorflow(place: Place, by: str) -> None:
    if by == "us":
        with place.writing() as store:
            save(store, 7)
    else:
        save_as_tensorflow(place.logdir, 7)
    before = place.names()
    with pytest.raises(CheckpointError, match="supervise_tf's store=BundleStore"):
        DirectoryStore(place.logdir).acquire()
    assert place.names() == before


def test_snapshots_that_have_no_place_in_a_bundle_are_refused(store: BundleStore) -> None:
    staging = Staging()
    staging.put("tf", {"note": 1})
    with pytest.raises(UnsupportedStateError, match="has none"):
        store.format.check(staging.snapshot(), None)
    staging.put("variables", {"w": np.zeros(3)})
    staging.put("extra", {"x": np.zeros(3)})
    with pytest.raises(UnsupportedStateError, match="extra"):
        store.format.check(staging.snapshot(), None)


# ---- a second save of one step


def test_state_alone_replaces_the_manifest(store: BundleStore, place: Place) -> None:
    save(store, 5)
    data = (place.logdir / f"model.ckpt-5.{DATA}").stat()
    assert save(store, 5, note=9) == "model.ckpt-5"
    assert content_of(store, "model.ckpt-5").parts["tf"].tree() == {"note": 9}
    assert (place.logdir / f"model.ckpt-5.{DATA}").stat().st_ino == data.st_ino
    assert place.names() == files_of("model.ckpt-5", "checkpoint")


def test_other_variables_make_a_revision(store: BundleStore, place: Place) -> None:
    save(store, 5)
    assert save(store, 5, value=5.5) == "model.ckpt-5.1"
    assert save(store, 5, value=5.75) == "model.ckpt-5.2"
    assert listed(store) == ["model.ckpt-5", "model.ckpt-5.1", "model.ckpt-5.2"]
    assert tf.train.latest_checkpoint(place.logdir) == str(place.logdir / "model.ckpt-5.2")
    assert tf.train.load_variable(str(place.logdir), "w")[0] == 5.75
    prune(store, KeepLatest(3))
    assert listed(store) == ["model.ckpt-5.2"]
    assert place.names() == files_of("model.ckpt-5.2", "checkpoint")


def test_one_whose_manifest_is_broken_is_not_replaced_but_followed(store: BundleStore, place: Place) -> None:
    save(store, 5)
    (place.logdir / f"model.ckpt-5.{MANIFEST}").write_bytes(b"{}")
    assert save(store, 5) == "model.ckpt-5.1"


# ---- damage


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("how", [_flip, Path.unlink, lambda path: os.truncate(path, 3)], ids=["flip", "unlink", "cut"])
def test_damage_is_found(store: BundleStore, place: Place, ending: str, how: Callable[[Path], object]) -> None:
    save(store, 1)
    how(place.logdir / f"model.ckpt-1.{ending}")
    if (ending, how) == ("index", Path.unlink):
        assert listed(store) == []
    elif (ending, how) == (MANIFEST, Path.unlink):
        assert content_of(store, "model.ckpt-1").manifest.files == {}  # TensorFlow's own checksums still hold
    else:
        with pytest.raises(CheckpointDamagedError) as caught:
            content_of(store, "model.ckpt-1")
        assert caught.value.checkpoint == "model.ckpt-1"


def test_a_renamed_checkpoint_is_damage(store: BundleStore, place: Place) -> None:
    save(store, 1)
    for ending in ENDINGS:
        (place.logdir / f"model.ckpt-1.{ending}").rename(place.logdir / f"model.ckpt-9.{ending}")
    with pytest.raises(CheckpointDamagedError, match="it holds step 1"):
        content_of(store, "model.ckpt-9")


@pytest.mark.parametrize("instead", ["a link", "a directory"])
def test_an_index_that_is_no_file_is_damage(store: BundleStore, place: Place, instead: str) -> None:
    save(store, 1)
    index = place.logdir / "model.ckpt-1.index"
    index.rename(place.logdir / "kept")
    index.symlink_to(place.logdir / "kept") if instead == "a link" else index.mkdir()
    with pytest.raises(CheckpointDamagedError):
        content_of(store, "model.ckpt-1")
    store.set_aside(CheckpointId(1), "for the test")
    assert listed(store) == []


# ---- checkpoints that TensorFlow wrote


@pytest.mark.parametrize("saver", [{}, {"sharded": True}], ids=["plain", "sharded"])
def test_checkpoints_of_tensorflow_are_listed_and_read(place: Place, saver: dict[str, Any]) -> None:
    save_as_tensorflow(place.logdir, 10, 20, 30, max_to_keep=2, **saver)
    with place.writing() as store:
        assert listed(store) == ["model.ckpt-20", "model.ckpt-30"]
        assert store.preferred() is None
        content = content_of(store, "model.ckpt-30")
        assert list(content.parts) == ["variables"]
        assert value_of(store, "model.ckpt-30") == 30.0
        assert content.manifest.wall_time == (place.logdir / "model.ckpt-30.index").stat().st_mtime
        save(store, 40)
        prune(store, KeepLatest(1))
        assert listed(store) == ["model.ckpt-40"]
        assert place.names() == files_of("model.ckpt-40", "checkpoint")


@pytest.mark.parametrize("ending", ["index", DATA])
@pytest.mark.parametrize("how", [_flip, lambda path: os.truncate(path, 3)], ids=["flip", "cut"])
def test_they_are_read_by_tensorflows_own_checksums(place: Place, ending: str, how: Callable[[Path], object]) -> None:
    save_as_tensorflow(place.logdir, 10)
    how(place.logdir / f"model.ckpt-10.{ending}")
    store = place.store()
    with pytest.raises(CheckpointDamagedError):
        content_of(store, "model.ckpt-10")


def test_tensorflow_goes_on_from_ours(store: BundleStore, place: Place) -> None:
    for step in (1, 2):
        save(store, step)
    with tf.Graph().as_default(), v1.Session() as session:
        w = v1.get_variable("w", (5,), tf.float64)
        saver = v1.train.Saver()
        saver.restore(session, tf.train.latest_checkpoint(place.logdir))
        assert session.run(w)[0] == 2.0
        saver.recover_last_checkpoints(tf.train.get_checkpoint_state(place.logdir).all_model_checkpoint_paths)
        assert saver.last_checkpoints == [str(place.logdir / name) for name in listed(store)]


def test_tensorflows_tools_read_it(store: BundleStore, place: Place) -> None:
    for step in (1, 2, 3):
        save(store, step)
    prune(store, KeepLatest(2))
    state = tf.train.get_checkpoint_state(place.logdir)
    assert state.model_checkpoint_path == str(place.logdir / "model.ckpt-3")
    assert list(state.all_model_checkpoint_paths) == [str(place.logdir / f"model.ckpt-{step}") for step in (2, 3)]
    assert tf.train.latest_checkpoint(place.logdir) == str(place.logdir / "model.ckpt-3")
    assert tf.train.load_checkpoint(str(place.logdir)).get_tensor("w")[0] == 3.0
    assert tf.train.list_variables(str(place.logdir)) == [("w", [5])]
    assert "/" not in (place.logdir / "checkpoint").read_text()


# ---- the state file as a wish


def write_state(place: Place, newest: str, *names: str) -> None:
    """As an editor leaves it."""
    lines = [f'model_checkpoint_path: "{newest}"', *(f'all_model_checkpoint_paths: "{name}"' for name in names)]
    (place.logdir / "checkpoint").write_text("\n".join(lines))


@pytest.fixture
def three(place: Place) -> Place:
    """A place with the steps 1, 2 and 3, and no writer."""
    with place.writing() as store:
        for step in (1, 2, 3):
            save(store, step)
    return place


@pytest.mark.parametrize(
    ("newest", "wanted"),
    [
        ("model.ckpt-1", 1),
        ("model.ckpt-2", 2),
        ("/another/machine/runs/model.ckpt-2", 2),
        ("../elsewhere/model.ckpt-1", 1),
        ("model.ckpt-3", None),
        ("/another/machine/runs/model.ckpt-3", None),
        ("model.ckpt-77", None),
        ("", None),
        ("other-1", None),
        ("/", None),
    ],
)
def test_a_state_file_that_somebody_edited(
    three: Place, newest: str, wanted: int | None, caplog: pytest.LogCaptureFixture
) -> None:
    write_state(three, newest, "model.ckpt-1", "model.ckpt-2")
    with three.writing() as store:
        assert store.preferred() == (None if wanted is None else CheckpointId(wanted))
        said = [record.message for record in caplog.records if record.levelno == logging.WARNING]
        is_gone = newest in ("model.ckpt-77", "other-1")
        assert len(said) == (wanted is not None or is_gone)
        told = "which is not there; going on from model.ckpt-3" if is_gone else "model.ckpt-3 is newer"
        assert all(told in message for message in said)


@pytest.mark.parametrize("content", [b"", b"\x00\xff garbage {{{", b"model_checkpoint_path: 7", b"\x00" * 40])
def test_a_state_file_that_says_nothing(three: Place, content: bytes, caplog: pytest.LogCaptureFixture) -> None:
    (three.logdir / "checkpoint").write_bytes(content)
    with three.writing() as store:
        assert store.preferred() is None
        assert [record.levelno for record in caplog.records].count(logging.WARNING) == (content != b"")
        save(store, 4)
    assert tf.train.latest_checkpoint(three.logdir) == str(three.logdir / "model.ckpt-4")


def test_a_state_file_that_is_missing(three: Place) -> None:
    (three.logdir / "checkpoint").unlink()
    with three.writing() as store:
        assert store.preferred() is None
    assert tf.train.latest_checkpoint(three.logdir) == str(three.logdir / "model.ckpt-3")


@pytest.mark.parametrize("by", ["us", "tensorflow"])
def test_a_state_file_left_old_by_a_crash_is_no_wish(place: Place, by: str) -> None:
    if by == "us":
        with place.writing() as store:
            save(store, 1)
    else:
        save_as_tensorflow(place.logdir, 1)
    store = place.store()
    store.acquire()
    old = (place.logdir / "checkpoint").read_bytes()
    save(store, 2)
    place.kill(store)
    (place.logdir / "checkpoint").write_bytes(old)
    with place.writing() as store:
        assert store.preferred() is None
    assert tf.train.latest_checkpoint(place.logdir) == str(place.logdir / "model.ckpt-2")


def test_a_wish_lasts_until_it_is_obeyed(three: Place) -> None:
    write_state(three, "model.ckpt-1")
    for _ in range(2):
        with three.writing() as store:
            assert store.preferred() == CheckpointId(1)
    with three.writing() as store:
        for step in (2, 3):
            store.retire(CheckpointId(step))
        assert store.preferred() is None
    assert tf.train.latest_checkpoint(three.logdir) == str(three.logdir / "model.ckpt-1")


def test_a_state_file_that_cannot_be_written_is_no_failure_of_a_save(
    store: BundleStore, place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    (place.logdir / "checkpoint").mkdir()
    save(store, 1)
    assert "the state file" in caplog.text
    assert value_of(store, "model.ckpt-1") == 1.0


# ---- what is left over


def test_a_commit_that_was_not_completed_is_swept(three: Place, caplog: pytest.LogCaptureFixture) -> None:
    for ending in (MANIFEST, DATA, "meta"):
        shutil.copy(three.logdir / f"model.ckpt-2.{ending}", three.logdir / f"model.ckpt-9.{ending}")
    caplog.set_level(logging.INFO)
    with three.writing() as store:
        assert listed(store) == [f"model.ckpt-{step}" for step in (1, 2, 3)]
    assert [name for name in three.names() if "ckpt-9" in name] == []
    said = [record for record in caplog.records if "model.ckpt-9" in record.message]
    assert [record.levelno for record in said] == [logging.INFO]


def test_a_newest_one_whose_index_somebody_deleted_is_set_aside(three: Place, caplog: pytest.LogCaptureFixture) -> None:
    (three.logdir / "model.ckpt-3.index").unlink()
    with three.writing() as store:
        assert listed(store) == ["model.ckpt-1", "model.ckpt-2"]
        assert dict(store.damaged()) == {"model.ckpt-3": "its index is missing"}
        assert store.preferred() is None
    assert [record.levelno for record in caplog.records if "model.ckpt-3" in record.message] == [logging.WARNING]
    kept = sorted(path.name for path in (three.logdir / "set-aside" / "model.ckpt-3").iterdir())
    assert kept == sorted([*(f"model.ckpt-3.{ending}" for ending in ENDINGS if ending != "index"), "reason.json"])
    assert tf.train.latest_checkpoint(three.logdir) == str(three.logdir / "model.ckpt-2")


def test_files_that_are_nobodys_business_are_left_alone(three: Place) -> None:
    others = ["model.ckpt-x.index", "model.ckpt-9.meta", "graph.pbtxt", "model.ckpt.notes", "model.ckpt-01.index"]
    for name in others:
        (three.logdir / name).write_bytes(b"of the user")
    with three.writing() as store:
        assert listed(store) == [f"model.ckpt-{step}" for step in (1, 2, 3)]
        prune(store, KeepLatest(1))
    assert set(others) <= set(three.names())


# ---- programs without a global step


def test_the_newest_is_also_there_under_the_bare_name(place: Place) -> None:
    with place.writing(unnumbered=True) as store:
        for step in (1, 2, 3):
            save(store, step)
        prune(store, KeepLatest(2))
        assert listed(store) == ["model.ckpt-2", "model.ckpt-3"]
    assert tf.train.latest_checkpoint(place.logdir) == str(place.logdir / "model.ckpt")
    assert tf.train.load_checkpoint(str(place.logdir / "model.ckpt")).get_tensor("w")[0] == 3.0
    with place.writing(unnumbered=True) as store:
        assert store.preferred() is None
        store.set_aside(CheckpointId(3), "for the test")
        assert tf.train.load_variable(str(place.logdir), "w")[0] == 2.0


def test_a_bare_checkpoint_of_tensorflow_is_gone_on_from(place: Place) -> None:
    save_as_tensorflow(place.logdir, -1)
    with place.writing(unnumbered=True) as store:
        assert listed(store) == ["model.ckpt"]
        assert value_of(store, "model.ckpt") == -1.0
        save(store, 1)
        assert listed(store) == ["model.ckpt-1"]
    assert tf.train.load_variable(str(place.logdir / "model.ckpt"), "w")[0] == 1.0


def test_what_was_retired_is_not_gone_on_from_by_its_bare_name(place: Place) -> None:
    with place.writing(unnumbered=True) as store:
        save(store, 1)
        for checkpoint in store.checkpoints():
            store.retire(checkpoint)
        assert listed(store) == []
    with place.writing(unnumbered=True) as store:
        assert listed(store) == []
        save(store, 1, value=7.0)
    assert tf.train.load_variable(str(place.logdir), "w")[0] == 7.0


# ---- copies


@pytest.mark.parametrize("with_work", [True, False])
@pytest.mark.parametrize("how", ["copied", "renamed"])
@pytest.mark.parametrize("by", ["us", "tensorflow"])
def test_a_copied_or_renamed_directory_touches_itself_alone(place: Place, how: str, with_work: bool, by: str) -> None:
    if by == "us":
        with place.writing() as store:
            for step in (1, 2, 3):
                save(store, step)
    else:
        save_as_tensorflow(place.logdir, 1, 2, 3)
    other = Place(place.logdir.parent / "other")
    if how == "copied":
        shutil.copytree(place.logdir, other.logdir)
    else:
        place.logdir.rename(other.logdir)
    if not with_work:
        shutil.rmtree(other.logdir / ".work", ignore_errors=True)
    before = place.names() if how == "copied" else []
    with other.writing() as store:
        assert store.preferred() is None
        assert value_of(store, "model.ckpt-3") == 3.0
        save(store, 4)
        prune(store, KeepLatest(1))
        assert listed(store) == ["model.ckpt-4"]
    assert tf.train.latest_checkpoint(other.logdir) == str(other.logdir / "model.ckpt-4")
    assert (place.names() if how == "copied" else []) == before
    assert how == "copied" or not place.logdir.exists()


# ---- drafts and readers of the wrong kind are mistakes of the program


def test_it_works_with_its_own_drafts_and_readers(store: BundleStore) -> None:
    draft, manifest = begin(store, CheckpointId(1))
    assert isinstance(draft, BundleDraft)
    assert draft.prefix.name == "model.ckpt-1"
    draft.commit(manifest)
    with store.open(CheckpointId(1)) as reader:
        assert isinstance(reader, BundleReader)
        assert reader.size("meta") == len(b"the graph")
        assert reader.size("absent") is None
