"""Checkpoints that somebody made to do harm: a clear error, nothing outside the directory touched, no pickle."""

from __future__ import annotations

import errno
import json
import os
import pickle
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from training import Program

from supervise_core import CheckpointDirectory
from supervise_core.errors import CheckpointDamagedError
from supervise_core.hashing import hash_of
from supervise_core.manifest import MANIFEST, FileRecord, Manifest
from supervise_core.safetensors_format import lay_out
from supervise_core.tensors import TensorSpec

Change = Callable[[Path], object]


def forge(checkpoint: Path, body: Callable[[dict[str, Any]], object] = lambda body: None) -> None:
    """Give a checkpoint a manifest whose hashes all fit what is there; ``body`` changes it before it is hashed."""
    old = Manifest.from_bytes((checkpoint / MANIFEST).read_bytes())
    files = {
        path.name: FileRecord(path.stat().st_size, hash_of([path.read_bytes()]))
        for path in checkpoint.iterdir()
        if path.name != MANIFEST and path.is_file()
    }
    made = Manifest(old.step, old.backend, old.wall_time, old.parts, files, run=old.run)
    content = json.loads(made.to_bytes())
    del content["xxh3_128"]
    body(content)
    (checkpoint / MANIFEST).write_bytes(canonical(content))


def canonical(body: dict[str, Any]) -> bytes:
    """A manifest with its own hash, as the core writes it."""

    def text(content: dict[str, Any]) -> bytes:
        return json.dumps(content, indent=1, sort_keys=True).encode("ascii") + b"\n"

    return text(body | {"xxh3_128": hash_of([text(body)])})


def edit_state(checkpoint: Path, change: Callable[[dict[str, Any]], object]) -> None:
    state = json.loads((checkpoint / "state.json").read_bytes())
    change(state)
    (checkpoint / "state.json").write_text(json.dumps(state))
    forge(checkpoint)


def write_tensors(
    checkpoint: Path, header: dict[str, Any] | bytes, data: bytes = b"", length: int | None = None
) -> None:
    """A safetensors file with any header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    claimed = len(text) if length is None else length
    (checkpoint / "model.safetensors").write_bytes(struct.pack("<Q", claimed) + text + data)
    forge(checkpoint)


def entry(begin: int, end: int, dtype: str = "U8", shape: list[Any] | None = None) -> dict[str, Any]:
    return {"dtype": dtype, "shape": [end - begin] if shape is None else shape, "data_offsets": [begin, end]}


def foreign_file(body: dict[str, Any], name: str) -> None:
    body["files"][name] = {"size": 6, "xxh3_128": hash_of([b"secret"])}


def shard_index(checkpoint: Path, weight_map: Any) -> None:
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    forge(checkpoint)


def nested(depth: int) -> bytes:
    return b'{"a":' * depth + b"1" + b"}" * depth


def replace_dtype(description: Any) -> Change:
    """The tensor ``w``, said to be of another NumPy dtype."""

    def change(state: dict[str, Any]) -> None:
        state["parts"]["model"]["w"] = {"$tensor": "w", "dtype": description, "shape": [21]}

    return lambda checkpoint: edit_state(checkpoint, change)


def replace_state(value: Any) -> Change:
    def change(state: dict[str, Any]) -> None:
        state["parts"]["random"]["states"] = value

    return lambda checkpoint: edit_state(checkpoint, change)


def link_out(name: str) -> Change:
    def change(checkpoint: Path) -> None:
        (checkpoint / name).unlink()
        (checkpoint / name).symlink_to(checkpoint.parent.parent / "outside" / "secret")

    return change


def pipe(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").unlink()
    os.mkfifo(checkpoint / "model.safetensors")


def overflow(checkpoint: Path) -> None:
    """Shapes whose product is beyond every integer of C."""
    write_tensors(checkpoint, {"w": entry(0, 8, "F64", [1 << 62, 1 << 62])}, bytes(8))


# What is damaged when the checkpoint is read, and set aside with a reason in which this word stands.
DAMAGED: dict[str, tuple[Change, str]] = {
    "manifest: file above": (
        lambda at: forge(at, lambda body: foreign_file(body, "../../outside/secret")),
        "not the name",
    ),
    "manifest: absolute file": (lambda at: forge(at, lambda body: foreign_file(body, "/etc/passwd")), "not the name"),
    "manifest: file in a folder": (lambda at: forge(at, lambda body: foreign_file(body, "a/b")), "not the name"),
    "manifest: itself": (lambda at: forge(at, lambda body: foreign_file(body, MANIFEST)), "not the name"),
    "manifest: absent file": (lambda at: forge(at, lambda body: foreign_file(body, "absent")), "absent is missing"),
    "manifest: absent part": (
        lambda at: forge(at, lambda body: body["parts"].append("more")),
        "does not hold the parts",
    ),
    "manifest: negative size": (
        lambda at: forge(at, lambda body: body["files"]["state.json"].update(size=-1)),
        "not that of a file",
    ),
    "manifest: gigantic size": (
        lambda at: forge(at, lambda body: body["files"]["model.safetensors"].update(size=1 << 60)),
        "instead of",
    ),
    "manifest: gigantic state": (
        lambda at: forge(at, lambda body: body["files"]["state.json"].update(size=1 << 60)),
        "too many",
    ),
    "manifest: parts are numbers": (lambda at: forge(at, lambda body: body.update(parts=[1])), "wrong type"),
    "manifest: step is text": (lambda at: forge(at, lambda body: body.update(step="2")), "wrong type"),
    "manifest: another version": (lambda at: forge(at, lambda body: body.update(format_version=2)), "format version"),
    "manifest: no JSON": (lambda at: (at / MANIFEST).write_bytes(b"\x80\x04."), "manifest.json"),
    "manifest: deep JSON": (lambda at: (at / MANIFEST).write_bytes(nested(100_000)), "nested too deeply"),
    "manifest: a list": (lambda at: (at / MANIFEST).write_bytes(b"[]"), "not an object"),
    "manifest: a key twice": (lambda at: (at / MANIFEST).write_bytes(b'{"step": 1, "step": 2}'), "twice"),
    "manifest: gigantic": (lambda at: os.truncate(at / MANIFEST, (64 << 20) + 1), "too many"),
    "link: manifest": (link_out(MANIFEST), "manifest.json is missing"),
    "link: state": (link_out("state.json"), "state.json is missing"),
    "link: tensors": (link_out("model.safetensors"), "model.safetensors is missing"),
    "pipe": (pipe, "model.safetensors is missing"),
    "header: too short": (lambda at: ((at / "model.safetensors").write_bytes(b"abc"), forge(at)), "too few"),
    "header: longer than the file": (lambda at: write_tensors(at, {}, length=1 << 20), "claims"),
    "header: 2**63 bytes": (lambda at: write_tensors(at, {}, length=(1 << 63) - 1), "claims"),
    "header: no JSON": (lambda at: write_tensors(at, b"\xff\xfe"), "model.safetensors"),
    "header: deep JSON": (lambda at: write_tensors(at, nested(100_000)), "nested too deeply"),
    "header: tensor twice": (
        lambda at: write_tensors(at, b'{"w":' + json.dumps(entry(0, 1)).encode() + b',"w":{}}', b"1"),
        "twice",
    ),
    "header: overlap": (lambda at: write_tensors(at, {"w": entry(0, 4), "b": entry(2, 6)}, bytes(6)), "overlap"),
    "header: gap": (lambda at: write_tensors(at, {"w": entry(0, 4), "b": entry(5, 6)}, bytes(6)), "gap"),
    "header: does not begin at 0": (lambda at: write_tensors(at, {"w": entry(1, 4)}, bytes(4)), "gap"),
    "header: tail": (lambda at: write_tensors(at, {"w": entry(0, 4)}, bytes(5)), "of 5 bytes"),
    "header: beyond the end": (lambda at: write_tensors(at, {"w": entry(0, 400)}, bytes(4)), "of 4 bytes"),
    "header: negative range": (lambda at: write_tensors(at, {"w": entry(-4, 0)}, bytes(4)), "at byte -4"),
    "header: wrong size": (lambda at: write_tensors(at, {"w": entry(0, 4, "F32", [2])}, bytes(4)), "where its shape"),
    "header: negative side": (
        lambda at: write_tensors(at, {"w": entry(0, 4, "U8", [-4])}, bytes(4)),
        "impossible shape",
    ),
    "header: side is true": (
        lambda at: write_tensors(at, {"w": entry(0, 1, "U8", [True])}, bytes(1)),
        "impossible shape",
    ),
    "header: overflow": (overflow, "where its shape"),
    "header: unknown dtype": (lambda at: write_tensors(at, {"w": entry(0, 4, "PICKLE")}, bytes(4)), "does not read"),
    "header: no entry": (lambda at: write_tensors(at, {"w": 7}), "not that of a tensor"),
    "header: lacks what the state names": (lambda at: write_tensors(at, {}), "which is not there"),
    "index: file above": (lambda at: shard_index(at, {"w": "../../outside/secret"}), "not the name"),
    "index: absent shard": (lambda at: shard_index(at, {"w": "absent.safetensors"}), "not in the manifest"),
    "index: the manifest": (lambda at: shard_index(at, {"w": MANIFEST}), "not the name"),
    "index: tensor not in its shard": (lambda at: shard_index(at, {"x": "model.safetensors"}), "the shards lack 'x'"),
    "index: a list": (lambda at: shard_index(at, ["model.safetensors"]), "not the index"),
    "index: numbers": (lambda at: shard_index(at, {"w": 7}), "not the index"),
    "state: no parts": (lambda at: edit_state(at, lambda state: state.pop("parts")), "does not hold the parts"),
    "state: no JSON": (lambda at: ((at / "state.json").write_bytes(pickle.dumps(1)), forge(at)), "state.json"),
    "state: deep JSON": (lambda at: ((at / "state.json").write_bytes(nested(100_000)), forge(at)), "nested too deeply"),
    "state: NaN": (lambda at: ((at / "state.json").write_bytes(b'{"parts": NaN, "run": 1}'), forge(at)), "NaN"),
    "state: two tags": (replace_state({"$tuple": [], "$set": []}), "one key"),
    "state: set of lists": (replace_state({"$set": [[1]]}), "state.json"),
    "state: pairs of three": (replace_state({"$dict": [[1, 2, 3]]}), "state.json"),
    "state: pairs of none": (replace_state({"$dict": [7]}), "state.json"),
    "state: no number": (replace_state({"$int": "__import__('os')"}), "state.json"),
    "state: object scalar": (replace_state({"$numpy": ["|O", "AAAAAAAAAAA="]}), "state.json"),
    "state: empty scalar": (replace_state({"$numpy": ["<f8", ""]}), "state.json"),
    "state: structured scalar": (replace_state({"$numpy": ["O,i4", "AAAAAAAAAAAAAAAA"]}), "state.json"),
    "state: no dtype": (replace_state({"$numpy": ["__import__('os')", "AA=="]}), "state.json"),
    "state: negative deque": (replace_state({"$deque": [[], -1]}), "state.json"),
    "state: absent tensor": (
        lambda at: edit_state(at, lambda state: state["parts"]["model"].update(w={"$tensor": "absent"})),
        "'absent', which is not there",
    ),
    "state: tensor is no name": (
        lambda at: edit_state(at, lambda state: state["parts"]["model"].update(w={"$tensor": ["w"]})),
        "which is not there",
    ),
}

# What only the tensors' maker finds out: an error of a start that sets nothing aside, and does nothing else either.
REFUSED: dict[str, Change] = {
    "state: unknown tag": replace_state({"$pickle": "gASVCg=="}),
    "state: default factory": replace_state({"$defaultdict": ["os.system", []]}),
    "dtype: object": replace_dtype("|O"),
    "dtype: object in a structure": replace_dtype([["a", "|O"], ["b", "<i4"]]),
    "dtype: no dtype": replace_dtype("__import__('os').system('true')"),
    "dtype: a number": replace_dtype(7),
    "dtype: an attribute of ml_dtypes": replace_dtype("ml_dtypes.finfo"),
    "dtype: absent from ml_dtypes": replace_dtype("ml_dtypes.absent"),
    "dtype: a dictionary": replace_dtype({"names": ["a"], "formats": ["O"], "offsets": [0]}),
    "dtype: too large": replace_dtype("|V99999999999"),
    "dtype: fields": replace_dtype([["a"], 3]),
}


@pytest.fixture
def logdir(tmp_path: Path) -> Path:
    """Checkpoints of steps 0, 1 and 2, and a secret outside."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").write_bytes(b"secret")
    Program(tmp_path / "digits").train(2)
    return tmp_path / "digits"


def check_outside(logdir: Path) -> None:
    outside = logdir.parent / "outside"
    assert [path.name for path in outside.iterdir()] == ["secret"]
    assert (outside / "secret").read_bytes() == b"secret"
    assert sorted(path.name for path in logdir.parent.iterdir()) == ["digits", "outside"]


def test_what_is_forged_well_is_accepted(logdir: Path) -> None:
    """Or else the tests below would prove nothing."""
    edit_state(logdir / "model.ckpt-2", lambda state: state)
    assert Program(logdir).train(2).began_at == 2


@pytest.mark.parametrize(("change", "reason"), DAMAGED.values(), ids=DAMAGED)
def test_hostile_checkpoint_is_set_aside(logdir: Path, change: Change, reason: str) -> None:
    change(logdir / "model.ckpt-2")
    with pytest.raises(CheckpointDamagedError), CheckpointDirectory(logdir).at(2) as newest:
        newest.verify()
    program = Program(logdir).train(1)
    assert program.began_at == 1
    assert program.holds(1)
    assert reason in program.supervisor.report.set_aside["model.ckpt-2"]
    check_outside(logdir)


@pytest.mark.parametrize("change", REFUSED.values(), ids=REFUSED)
def test_hostile_dtype_is_refused(logdir: Path, change: Change) -> None:
    change(logdir / "model.ckpt-2")
    program = Program(logdir)
    with pytest.raises((ValueError, TypeError)):
        program.train(3)
    assert program.began_at == -1
    assert (program.w == 0).all()
    assert CheckpointDirectory(logdir).steps() == [0, 1, 2]
    check_outside(logdir)


def test_checkpoint_that_is_a_link(logdir: Path) -> None:
    """To a good checkpoint even: it is not this directory's own."""
    os.rename(logdir / "model.ckpt-2", logdir.parent / "elsewhere")
    (logdir / "model.ckpt-2").symlink_to(logdir.parent / "elsewhere")
    program = Program(logdir).train(1)
    assert program.began_at == 1
    assert "not a directory of its own" in program.supervisor.report.set_aside["model.ckpt-2"]
    assert (logdir.parent / "elsewhere" / MANIFEST).exists()


def test_a_linked_shelf_is_not_followed(logdir: Path) -> None:
    (logdir / "set-aside").symlink_to(logdir.parent / "outside")
    (logdir / "model.ckpt-2" / "state.json").write_bytes(b"")
    with pytest.raises(NotADirectoryError):
        Program(logdir).train(3)
    check_outside(logdir)


def test_removing_a_checkpoint_follows_no_links(logdir: Path) -> None:
    from supervise_core import KeepLatest

    (logdir / "model.ckpt-1" / "folder").symlink_to(logdir.parent / "outside")
    (logdir / "model.ckpt-1" / "file").symlink_to(logdir.parent / "outside" / "secret")
    os.mkfifo(logdir / "model.ckpt-1" / "pipe")
    Program(logdir, keep=KeepLatest(1)).train(3)
    assert CheckpointDirectory(logdir).steps() == [3]
    check_outside(logdir)


@pytest.mark.parametrize("kind", ["file", "pipe", "dangling link"])
def test_what_bears_the_name_of_a_checkpoint(logdir: Path, kind: str) -> None:
    path = logdir / "model.ckpt-9"
    if kind == "file":
        path.write_bytes(b"not a directory")
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("nowhere")
    program = Program(logdir).train(3)
    assert program.began_at == 2
    assert "not a directory of its own" in program.supervisor.report.set_aside["model.ckpt-9"]


@pytest.mark.parametrize(
    "name", ["model.ckpt-02", "model.ckpt-", "model.ckpt-2.0", "model.ckpt--1", "model.ckpt-2 ", "model.ckpt-٣"]
)
def test_names_that_are_no_checkpoints(logdir: Path, name: str) -> None:
    (logdir / name).mkdir()
    assert CheckpointDirectory(logdir).steps() == [0, 1, 2]
    assert Program(logdir).train(3).began_at == 2
    assert (logdir / name).is_dir()


@pytest.mark.parametrize("content", [b"", b"[]", b"\x80\x04.", b'{"owner": 7, "since": "x"}', nested(100_000)])
def test_hostile_lease_record(logdir: Path, content: bytes) -> None:
    """It names nobody who lives, and its beat stands still."""
    from scenarios import SkippingClock

    from supervise_core.directory_store import DirectoryStore

    lease = logdir / ".work" / "lease-0123456789abcdef"
    lease.mkdir()
    (lease / "owner.json").write_bytes(content)
    store = DirectoryStore(logdir, clock=SkippingClock())
    with store.writing():
        assert len(store.checkpoints()) == 3
    assert list((logdir / ".work").iterdir()) == []


_WATCHED = """
import sys, pickle, _pickle

def refuse(event, arguments):
    if event == "pickle.find_class":
        raise SystemExit("pickle ran: " + repr(arguments))

def never(*_, **__):
    raise SystemExit("pickle ran")

sys.addaudithook(refuse)
for module in (pickle, _pickle):
    module.load = module.loads = never
    module.Unpickler = never

sys.path.insert(0, sys.argv[1])
from training import Program
from pathlib import Path
program = Program(Path(sys.argv[2])).train(int(sys.argv[3]))
print(program.began_at)
"""


def run_watched(logdir: Path, until: int) -> subprocess.CompletedProcess[str]:
    """Train in a process in which any use of pickle is the end."""
    command = [sys.executable, "-c", _WATCHED, str(Path(__file__).parent), str(logdir), str(until)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_no_pickle_on_the_path(tmp_path: Path) -> None:
    logdir = tmp_path / "digits"
    assert run_watched(logdir, 2).stdout.strip() == "0"
    assert run_watched(logdir, 4).stdout.strip() == "2"


def test_no_pickle_for_hostile_dtypes(logdir: Path) -> None:
    bomb = pickle.dumps({"a": print})
    specs = [TensorSpec("w", "U8", (len(bomb),))]
    layout = lay_out(specs)
    (logdir / "model.ckpt-2" / "model.safetensors").write_bytes(layout.header + bomb)
    edit_state(
        logdir / "model.ckpt-2",
        lambda state: state["parts"].update(model={"w": {"$tensor": "w", "dtype": "|O", "shape": [1]}}),
    )
    done = run_watched(logdir, 3)
    assert done.returncode == 1
    assert "pickle ran" not in done.stderr
    assert "ValueError" in done.stderr


def test_the_watch_for_pickle_sees_one(logdir: Path) -> None:
    """Or else the two tests above would prove nothing."""
    command = [sys.executable, "-c", _WATCHED.replace("print(", "pickle.loads(b'I1\\n.'); print("), *["x"] * 0]
    done = subprocess.run(
        [*command, str(Path(__file__).parent), str(logdir), "2"], capture_output=True, text=True, check=False
    )
    assert "pickle ran" in done.stderr


def test_errno_of_a_missing_name_is_no_damage(logdir: Path) -> None:
    """A listing that is older than a removal is looked at anew, not taken for damage."""
    with pytest.raises(FileNotFoundError) as caught:
        CheckpointDirectory(logdir).at(7)
    assert caught.value.errno in (None, errno.ENOENT)
