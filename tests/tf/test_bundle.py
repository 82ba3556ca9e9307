"""Bundles: arrays written as TensorFlow writes them, read by it and by us, and refused when they are damaged."""

from __future__ import annotations

import os
import random
import resource
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
tf = pytest.importorskip("tensorflow", reason="TensorFlow is not installed")

from supervise_core.errors import CheckpointDamagedError  # noqa: E402
from supervise_tf.bundle import BundleWriter, Key, as_array, check_bundle, dtype_of, read_bundle  # noqa: E402

NUMBERS = [
    tf.bfloat16, tf.bool, tf.complex128, tf.complex64, tf.float16, tf.float32, tf.float64, tf.int16, tf.int32,
    tf.int64, tf.int8, tf.uint16, tf.uint32, tf.uint64, tf.uint8,
]  # fmt: skip
STRINGS = [b"plain", b"", b"\x00\xff\n", "\N{SNOWMAN}".encode(), b"x" * 5000]


def strings(*values: bytes) -> np.ndarray[Any, Any]:
    array = np.empty(len(values), object)
    array[:] = values
    return array


def samples() -> dict[Key, np.ndarray[Any, Any]]:
    """Every dtype in every kind of shape; strings of all kinds; a tensor in four slices."""
    found: dict[Key, np.ndarray[Any, Any]] = {}
    for dtype in NUMBERS:
        kind = dtype.as_numpy_dtype
        found[f"{dtype.name}/matrix", ""] = np.arange(12).reshape(4, 3).astype(kind)
        found[f"{dtype.name}/scalar", ""] = np.array(1, kind)
        found[f"{dtype.name}/nothing", ""] = np.zeros((0, 3), kind)
    found["special", ""] = np.array([np.nan, -np.nan, np.inf, -0.0, 5e-324])
    found["strings", ""] = strings(*STRINGS)
    found["strings/matrix", ""] = strings(*STRINGS[:4]).reshape(2, 2)
    found["strings/scalar", ""] = strings(b"one\x00").reshape(())
    found["strings/scalar/empty", ""] = strings(b"").reshape(())
    found["strings/nothing", ""] = strings()
    found["a name/with, odd-characters.\N{SNOWMAN}", ""] = np.arange(3)
    for row in (0, 2):
        for column in (0, 3):
            found["sliced", f"4 5 {row},2:{column},{3 if column == 0 else 2}"] = np.arange(
                20, dtype=np.float32
            ).reshape(4, 5)[row : row + 2, column : column + 3 if column == 0 else 5]
    return found


def same(one: Any, other: Any) -> bool:
    one, other = as_array(one), as_array(other)
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return bool((one == other).all()) if one.dtype == object else one.tobytes() == other.tobytes()


def whole(samples: dict[Key, np.ndarray[Any, Any]]) -> dict[str, np.ndarray[Any, Any]]:
    """By name, the sliced one put together."""
    found = {name: array for (name, part), array in samples.items() if not part}
    if ("sliced", "4 5 0,2:0,3") in samples:
        found["sliced"] = np.arange(20, dtype=np.float32).reshape(4, 5)
    return found


def test_all_that_is_written_is_read(tmp_path: Path) -> None:
    BundleWriter().write(tmp_path / "all", samples())
    found, expected = read_bundle(tmp_path / "all"), whole(samples())
    assert found.keys() == expected.keys()
    assert [name for name in expected if not same(expected[name], found[name])] == []
    check_bundle(tmp_path / "all")


def test_tensorflow_reads_it(tmp_path: Path) -> None:
    BundleWriter().write(tmp_path / "all", samples())
    reader = tf.train.load_checkpoint(str(tmp_path / "all"))
    expected = whole(samples())
    assert reader.get_variable_to_shape_map() == {name: list(array.shape) for name, array in expected.items()}
    assert reader.get_variable_to_dtype_map() == {name: dtype_of(array) for name, array in expected.items()}
    assert [name for name in expected if not same(expected[name], reader.get_tensor(name))] == []
    slices = tf.raw_ops.RestoreV2(
        prefix=str(tmp_path / "all"), tensor_names=["sliced"], shape_and_slices=["4 5 1,2:2,2"], dtypes=[tf.float32]
    )
    assert same(slices[0].numpy(), expected["sliced"][1:3, 2:4])


def test_the_same_content_gives_the_same_bytes(tmp_path: Path) -> None:
    """So that a checkpoint of the same variables has the same hashes."""
    writer = BundleWriter()
    for name, by in (("a/m", writer), ("b/m", writer), ("c/m", BundleWriter())):
        (tmp_path / name).parent.mkdir()
        by.write(tmp_path / name, samples())
    contents = [{path.name: path.read_bytes() for path in (tmp_path / folder).iterdir()} for folder in ("a", "b", "c")]
    assert contents[0] == contents[1] == contents[2]
    assert set(contents[0]) == {"m.index", "m.data-00000-of-00001"}


def test_one_writer_writes_one_set_of_names_after_another(tmp_path: Path) -> None:
    writer = BundleWriter()
    for number in range(3):
        for name, array in (("x", np.arange(number)), ("y", np.full((2,), float(number)))):
            writer.write(tmp_path / f"{name}{number}", {(name, ""): array})
            assert same(read_bundle(tmp_path / f"{name}{number}")[name], array)
    writer.write(tmp_path / "again", {("y", ""): strings(b"another dtype")})
    assert same(read_bundle(tmp_path / "again")["y"], strings(b"another dtype"))


def test_writing_from_several_threads(tmp_path: Path) -> None:
    writer = BundleWriter()
    arrays = {number: np.full((number + 1,), number) for number in range(8)}
    threads = [
        threading.Thread(target=writer.write, args=(tmp_path / str(number), {("x", ""): array}))
        for number, array in arrays.items()
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(same(read_bundle(tmp_path / str(number))["x"], array) for number, array in arrays.items())


# ---- errors of the storage


def test_writing_where_there_is_no_directory(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="absent") as caught:
        BundleWriter().write(tmp_path / "file" / "absent", _with_file(tmp_path))
    assert caught.value.errno is not None


def _with_file(path: Path) -> dict[Key, np.ndarray[Any, Any]]:
    (path / "file").write_bytes(b"")
    return {("x", ""): np.arange(3)}


def test_a_failed_write_does_not_spoil_the_next_one(tmp_path: Path) -> None:
    writer = BundleWriter()
    content = _with_file(tmp_path)
    with pytest.raises(OSError):
        writer.write(tmp_path / "file" / "absent", content)
    writer.write(tmp_path / "good", content)
    assert same(read_bundle(tmp_path / "good")["x"], np.arange(3))


def test_a_disk_that_takes_no_more_is_an_error_of_the_system(tmp_path: Path) -> None:
    writer = BundleWriter()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        with pytest.raises(OSError, match="could not be written"):
            writer.write(tmp_path / "large", {("x", ""): np.ones(1 << 20)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    writer.write(tmp_path / "large", {("x", ""): np.ones(1 << 20)})
    check_bundle(tmp_path / "large")


@contextmanager
def as_somebody() -> Iterator[None]:
    """As a user who is not root, since root may read everything."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.parametrize("file", ["m.index", "m.data-00000-of-00001", "."])
def test_missing_permission_is_no_damage(tmp_path: Path, file: str) -> None:
    directory = tmp_path / "bundle"
    directory.mkdir()
    BundleWriter().write(directory / "m", {("x", ""): np.arange(3)})
    with _open_to_all(directory):
        (directory / file).chmod(0)
        try:
            with as_somebody():
                for act in (read_bundle, check_bundle):
                    with pytest.raises(PermissionError):
                        act(directory / "m")
        finally:
            (directory / file).chmod(0o755)


@contextmanager
def _open_to_all(directory: Path) -> Iterator[None]:
    """Let everybody pass through the directories above, which pytest keeps to the user."""
    above = {path: path.stat().st_mode for path in directory.parents if path.stat().st_uid == os.geteuid()}
    closed = {path: mode for path, mode in above.items() if not mode & 0o001}
    for path, mode in closed.items():
        path.chmod(mode | 0o011)
    try:
        yield
    finally:
        for path, mode in closed.items():
            path.chmod(mode)


# ---- damage


def small() -> dict[Key, np.ndarray[Any, Any]]:
    return {
        ("matrix", ""): np.arange(6, dtype=np.float32).reshape(2, 3),
        ("strings", ""): strings(b"a", b"\x00\xff", b""),
        ("nothing", ""): np.zeros((0, 3), np.float32),
        ("step", ""): np.array(3),
        ("sliced", "4 5 0,2:-"): np.ones((2, 5), np.float32),
        ("sliced", "4 5 2,2:-"): np.zeros((2, 5), np.float32),
    }


@pytest.fixture
def bundle() -> Iterator[Path]:
    """A small bundle, in memory where there is one, since it is rewritten thousands of times."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as directory:
        BundleWriter().write(Path(directory, "m"), small())
        yield Path(directory, "m")


def reads_the_same(bundle: Path, good: dict[str, np.ndarray[Any, Any]]) -> bool:
    found = read_bundle(bundle)
    return found.keys() == good.keys() and all(same(found[name], good[name]) for name in good)


@pytest.mark.parametrize("ending", ["index", "data-00000-of-00001"])
def test_no_flipped_bit_changes_what_is_read(bundle: Path, ending: str) -> None:
    """Not every bit of an index has a meaning; what is read in spite of a flip must be what was written."""
    path, good = Path(f"{bundle}.{ending}"), read_bundle(bundle)
    content = path.read_bytes()
    refused = 0
    for position in range(len(content) * 8):
        flipped = bytearray(content)
        flipped[position // 8] ^= 1 << position % 8
        path.write_bytes(flipped)
        try:
            assert reads_the_same(bundle, good), f"bit {position}"
        except CheckpointDamagedError:
            refused += 1
    assert refused == len(content) * 8 if ending != "index" else refused > len(content) * 6


@pytest.mark.parametrize("ending", ["index", "data-00000-of-00001"])
def test_a_file_cut_off_anywhere_is_damage(bundle: Path, ending: str) -> None:
    path = Path(f"{bundle}.{ending}")
    content = path.read_bytes()
    for length in range(len(content)):
        path.write_bytes(content[:length])
        for act in (read_bundle, check_bundle):
            with pytest.raises(CheckpointDamagedError):
                act(bundle)


@pytest.mark.campaign(small=300, soak=20000)
def test_garbage_is_damage(bundle: Path, count: int, seed: int) -> None:
    """Pieces replaced, moved and doubled: an error that we know, and never the death of the process."""
    chance, good = random.Random(seed), read_bundle(bundle)
    paths = [Path(f"{bundle}.{ending}") for ending in ("index", "data-00000-of-00001")]
    contents = [path.read_bytes() for path in paths]
    for _ in range(count):
        number = chance.randrange(2)
        spoilt = bytearray(contents[number])
        for _ in range(chance.randint(1, 4)):
            begin, end = sorted(chance.randrange(len(spoilt) + 1) for _ in range(2))
            what = chance.randrange(3)
            spoilt[begin:end] = (
                chance.randbytes(end - begin), b"", contents[number][: chance.randrange(len(contents[number]))]
            )[what]  # fmt: skip
        paths[number].write_bytes(spoilt)
        try:
            assert reads_the_same(bundle, good)
        except CheckpointDamagedError:
            pass
        paths[number].write_bytes(contents[number])


@pytest.mark.parametrize("ending", ["index", "data-00000-of-00001"])
@pytest.mark.parametrize("instead", ["nothing", "a directory", "a link to nowhere"])
def test_a_missing_file_is_damage(bundle: Path, ending: str, instead: str) -> None:
    path = Path(f"{bundle}.{ending}")
    path.unlink()
    if instead == "a directory":
        path.mkdir()
    if instead == "a link to nowhere":
        path.symlink_to(bundle.parent / "nowhere")
    for act in (read_bundle, check_bundle):
        with pytest.raises(CheckpointDamagedError) as caught:
            act(bundle)
        assert caught.value.checkpoint == "m"
        assert "\n" not in caught.value.reason


def test_a_bundle_in_a_directory_that_is_not_there_is_damage(bundle: Path) -> None:
    moved = bundle.parent / "folder" / "m"
    with pytest.raises(CheckpointDamagedError):
        read_bundle(moved)
