"""What a Saver saves, fetched without it: the same names, values and slices as in the files that the Saver writes."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
tf = pytest.importorskip("tensorflow", reason="TensorFlow is not installed")

from supervise_core.errors import IncompatibleCheckpointError, UnsupportedStateError  # noqa: E402
from supervise_tf.bundle import BundleWriter, as_array, dtype_of, read_bundle  # noqa: E402
from supervise_tf.saved_tensors import SavedTensors  # noqa: E402
from supervise_tf.stored_tensors import from_tree, to_tree  # noqa: E402

v1 = tf.compat.v1


class Case(NamedTuple):
    """A graph with a Saver, and an op that changes what is saved."""

    saver: Any
    change: Any


def _variable(name: str, value: Any, use_resource: bool, **more: Any) -> Any:
    return v1.get_variable(name, initializer=tf.constant(value), use_resource=use_resource, **more)


def _variables(use_resource: bool) -> tuple[list[Any], Any]:
    """Variables of many kinds, and an op that changes them."""
    w = _variable("w", np.arange(6, dtype=np.float32).reshape(2, 3), use_resource)
    with v1.variable_scope("deep"):
        brief = _variable("brief", np.ones((2, 2), tf.bfloat16.as_numpy_dtype), use_resource)
    step = _variable("step", np.int64(7), use_resource)
    nothing = _variable("nothing", np.zeros((0, 3), np.float32), use_resource)
    flag = _variable("flag", np.array(True), use_resource)
    found = [w, brief, step, nothing, flag]
    change = [v1.assign_add(w, tf.ones_like(w)), v1.assign_add(step, tf.constant(1, tf.int64)),
              v1.assign(flag, tf.logical_not(flag))]  # fmt: skip
    if use_resource:
        words = _variable("words", [b"a", b"\x00b\x00", b""], True)
        word = _variable("word", b"trailing\x00", True)
        found += [words, word]
        change += [v1.assign(words, tf.strings.join([words, words])), v1.assign(word, tf.strings.join([word, word]))]
    return found, tf.group(*change)


def _default(use_resource: bool) -> Case:
    _, change = _variables(use_resource)
    return Case(v1.train.Saver(), change)


def _renamed(use_resource: bool) -> Case:
    (w, _, step, *_), change = _variables(use_resource)
    return Case(v1.train.Saver({"renamed/w": w, "number": step}), change)


def _some(use_resource: bool) -> Case:
    (w, *_), change = _variables(use_resource)
    return Case(v1.train.Saver([w]), change)


def _sharded(use_resource: bool) -> Case:
    with tf.device("/cpu:0"):
        _, change = _variables(use_resource)
    with tf.device("/job:localhost/replica:0/task:0/cpu:0"):
        _variable("elsewhere", np.arange(3.0), use_resource)
    return Case(v1.train.Saver(sharded=True), change)


def _one_by_one(use_resource: bool) -> Case:
    _, change = _variables(use_resource)
    return Case(v1.train.Saver(restore_sequentially=True), change)


def _reshaping(use_resource: bool) -> Case:
    _, change = _variables(use_resource)
    return Case(v1.train.Saver(reshape=True), change)


def _partitioned(use_resource: bool) -> Case:
    rows = v1.get_variable(
        "rows", (5, 3), initializer=v1.ones_initializer(), partitioner=v1.fixed_size_partitioner(2),
        use_resource=use_resource,
    )  # fmt: skip
    columns = v1.get_variable(
        "columns", (2, 4), tf.float64, v1.ones_initializer(), partitioner=v1.fixed_size_partitioner(3, axis=1),
        use_resource=use_resource,
    )  # fmt: skip
    change = [
        v1.assign_add(part, tf.fill(part.shape, tf.constant(number + 2, part.dtype.base_dtype)))
        for whole in (rows, columns)
        for number, part in enumerate(whole)
    ]
    return Case(v1.train.Saver(), tf.group(*change))


def _partitioned_renamed(use_resource: bool) -> Case:
    rows = v1.get_variable(
        "rows", (5, 3), initializer=v1.ones_initializer(), partitioner=v1.fixed_size_partitioner(2),
        use_resource=use_resource,
    )  # fmt: skip
    change = [v1.assign_add(part, tf.fill(part.shape, 2.0 + number)) for number, part in enumerate(rows)]
    return Case(v1.train.Saver({"other": list(rows)}), tf.group(*change))


def _tables(use_resource: bool) -> Case:
    _variable("w", np.arange(3.0), use_resource)
    words = tf.lookup.experimental.MutableHashTable(tf.string, tf.int64, -1, name="words")
    dense = tf.lookup.experimental.DenseHashTable(tf.int64, tf.float32, 0.0, empty_key=-1, deleted_key=-2, name="dense")
    empty = tf.lookup.experimental.MutableHashTable(tf.int64, tf.string, "", name="empty")
    assert empty is not None
    change = tf.group(
        words.insert(tf.constant(["a", "b"]), words.lookup(tf.constant(["a", "b"])) + 3),
        dense.insert(tf.constant([5], tf.int64), dense.lookup(tf.constant([5], tf.int64)) + 0.5),
    )
    return Case(v1.train.Saver(), change)


CASES = {
    case.__name__.strip("_"): case
    for case in (
        _default, _renamed, _some, _sharded, _one_by_one, _reshaping, _partitioned, _partitioned_renamed, _tables
    )
}  # fmt: skip
each_case = pytest.mark.parametrize("build", CASES.values(), ids=CASES)
each_kind = pytest.mark.parametrize("use_resource", [False, True], ids=["reference", "resource"])
Build = Callable[[bool], Case]


def same(one: Any, other: Any) -> bool:
    one, other = as_array(one), as_array(other)
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return bool((one == other).all()) if one.dtype == object else one.tobytes() == other.tobytes()


def files(prefix: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(prefix.parent.glob(f"{prefix.name}.*"))}


@each_case
@each_kind
def test_it_is_what_the_saver_writes(build: Build, use_resource: bool, tmp_path: Path) -> None:
    with tf.Graph().as_default() as graph:
        case = build(use_resource)
        saved = SavedTensors.of(case.saver, graph)
        with v1.Session() as session:
            session.run([v1.global_variables_initializer(), v1.tables_initializer()])
            for _ in range(2):
                session.run(case.change)
            case.saver.save(session, str(tmp_path / "theirs"), write_meta_graph=False)
            fetched = saved.fetch(session)
    BundleWriter().write(tmp_path / "ours", from_tree(to_tree(fetched)))
    theirs, ours = read_bundle(tmp_path / "theirs"), read_bundle(tmp_path / "ours")
    assert ours.keys() == theirs.keys()
    assert [name for name in theirs if not _same_content(name, theirs[name], ours[name])] == []
    for name in {name for name, part in fetched if part}:
        parts = [part for key, part in fetched if key == name]
        assert _slices_of(tmp_path / "theirs", name, parts) == _slices_of(tmp_path / "ours", name, parts)


def _same_content(name: str, theirs: Any, ours: Any) -> bool:
    """Of a table, each time it is read, the entries may come in another order."""
    if name.startswith(("words-", "dense-", "empty-")) and theirs.size:
        return sorted(theirs.tolist()) == sorted(ours.tolist()) and theirs.dtype == ours.dtype
    return same(theirs, ours)


def _slices_of(prefix: Path, name: str, parts: list[str]) -> list[list[float]]:
    dtype = dtype_of(read_bundle(prefix)[name])
    return [
        tf.raw_ops.RestoreV2(prefix=str(prefix), tensor_names=[name], shape_and_slices=[part], dtypes=[dtype])[0]
        .numpy()
        .tolist()
        for part in parts
    ]


@each_case
@each_kind
def test_it_can_be_put_back(build: Build, use_resource: bool) -> None:
    with tf.Graph().as_default() as graph:
        case = build(use_resource)
        saved = SavedTensors.of(case.saver, graph)
        graph.finalize() if not v1.get_collection("table_initializer") else None
        with v1.Session() as first:
            first.run(_initialisers(graph))
            first.run(case.change)
            fetched = saved.fetch(first)
        with v1.Session() as second:
            second.run(_initialisers(graph))
            for _ in range(3):
                second.run(case.change)
            saved.check_fit("variables", fetched)
            saved.put_back(second, fetched)
            after = saved.fetch(second)
    assert after.keys() == fetched.keys()
    assert [key for key in fetched if not _same_content(key[0], fetched[key], after[key])] == []


def _initialisers(graph: Any) -> list[Any]:
    with graph.as_default():
        return [variable.initializer for variable in v1.global_variables()]


@each_case
def test_the_saver_reads_what_we_write(build: Build, tmp_path: Path) -> None:
    with tf.Graph().as_default() as graph:
        case = build(True)
        saved = SavedTensors.of(case.saver, graph)
        with v1.Session() as session:
            session.run(_initialisers(graph))
            session.run(case.change)
            fetched = saved.fetch(session)
            BundleWriter().write(tmp_path / "ours", fetched)
            session.run(case.change)
            case.saver.restore(session, str(tmp_path / "ours"))
            after = saved.fetch(session)
    assert [key for key in fetched if not _same_content(key[0], fetched[key], after[key])] == []


def test_a_saver_of_the_old_format(tmp_path: Path) -> None:
    """Its tensors are kept in the new one, which its restore op reads as well."""
    with tf.Graph().as_default() as graph:
        w = v1.get_variable("w", initializer=tf.constant([1.0, 2.0]))
        rows = v1.get_variable(
            "rows", (4, 2), initializer=v1.ones_initializer(), partitioner=v1.fixed_size_partitioner(2)
        )
        saver = v1.train.Saver(write_version=v1.train.SaverDef.V1)
        saved = SavedTensors.of(saver, graph)
        with v1.Session() as session:
            session.run(v1.global_variables_initializer())
            saver.save(session, str(tmp_path / "theirs"), write_meta_graph=False)
            fetched = saved.fetch(session)
            BundleWriter().write(tmp_path / "ours", fetched)
            session.run([v1.assign_add(w, [5.0, 5.0]), *[v1.assign_add(row, tf.ones_like(row)) for row in rows]])
            saver.restore(session, str(tmp_path / "ours"))
            assert [key for key, value in saved.fetch(session).items() if not same(value, fetched[key])] == []
    reader = tf.train.load_checkpoint(str(tmp_path / "theirs"))
    assert reader.get_variable_to_shape_map() == {"w": [2], "rows": [4, 2]}
    assert {name for name, _ in fetched} == {"w", "rows"}
    assert same(fetched["w", ""], reader.get_tensor("w"))


def test_a_saver_that_is_not_built_is_told_of() -> None:
    with tf.Graph().as_default() as graph:
        v1.get_variable("w", (3,))
        saver = v1.train.Saver(defer_build=True)
        with pytest.raises(UnsupportedStateError, match=r"saver\.build\(\)"):
            SavedTensors.of(saver, graph)


def test_everything_is_read_in_one_run() -> None:
    """So that no step comes between two variables."""
    with tf.Graph().as_default() as graph:
        case = _default(True)
        saved = SavedTensors.of(case.saver, graph)
        runs = []
        with v1.Session() as session:
            session.run(_initialisers(graph))
            real = session.run
            session.run = lambda *given, **named: runs.append(1) or real(*given, **named)  # type: ignore[func-returns-value]
            fetched = saved.fetch(session)
            saved.put_back(session, fetched)
    assert len(runs) == 2


def test_what_does_not_fit_is_named() -> None:
    with tf.Graph().as_default() as graph:
        case = _partitioned(True)
        saved = SavedTensors.of(case.saver, graph)
        with v1.Session() as session:
            session.run(_initialisers(graph))
            fetched = saved.fetch(session)
    keys = sorted(fetched)
    altered = dict(fetched)
    del altered[keys[0]]
    altered["stranger", ""] = np.zeros(3)
    altered[keys[1]] = fetched[keys[1]][..., None]
    altered[keys[-1]] = fetched[keys[-1]].astype(np.float16)
    with pytest.raises(IncompatibleCheckpointError) as caught:
        saved.check_fit("variables", altered)
    said = "\n".join(caught.value.differences)
    assert len(caught.value.differences) == 4
    for word in ("is missing", "'stranger' is unexpected", "has shape", "has dtype float16", repr(keys[0][1])):
        assert word in said
