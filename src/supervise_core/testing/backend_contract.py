"""The contract of a backend, as tests. Describe one small program, and run pytest::

    class TestMyBackend(BackendContract):
        def program(self) -> Program:
            model = MyModel(seed=0)
            return Program(MyBackend(model), train=lambda session: model.step(), raw=lambda: {"w": model.w})

The name of each test says what the backend does; if it fails, the backend does not.
"""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import itertools
import json
import os
import shutil
import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Final, NamedTuple

import numpy as np
import pytest

from supervise_core.backend import Backend
from supervise_core.checkpoint_files import read_checkpoint
from supervise_core.checkpoint_format import CheckpointId
from supervise_core.directory_store import DirectoryStore
from supervise_core.errors import IncompatibleCheckpointError
from supervise_core.manifest import Manifest
from supervise_core.parts import Part, Parts
from supervise_core.process_random import process_random_state, set_process_random_state
from supervise_core.readiness import NotReady, Ready
from supervise_core.snapshot import Snapshot
from supervise_core.snapshot_files import write_snapshot
from supervise_core.staging import Staging
from supervise_core.supervisor import Supervisor
from supervise_core.tagged_json import Json, encode
from supervise_core.tensors import TensorSpec
from supervise_core.testing.disks import Crash, CrashingDisk, HastyDisk
from supervise_core.triggers import EverySteps

CAPABILITIES: Final = frozenset({"strict restore", "fresh process", "random state", "run"})
"""What a backend may declare as unsupported: refusing what does not fit, being made in another process from the test
file alone, drawing the same numbers after a restore, and being run by a ``Supervisor`` in this process."""

_OTHER_DTYPE: Final = {
    "F64": "I64", "F32": "I32", "F16": "I16", "BF16": "I16", "I64": "F64", "I32": "F32", "I16": "F16",
    "U64": "I64", "U32": "I32", "U16": "I16", "U8": "I8", "I8": "U8", "BOOL": "U8", "C64": "F64",
    "F8_E5M2": "U8", "F8_E4M3": "U8",
}  # fmt: skip
_PAIR_TAGS: Final = ("$dict", "$OrderedDict", "$Counter")


@dataclass(frozen=True, slots=True)
class Program:
    """A small training program: a backend over its own objects, one training step, and a look past the backend.

    ``train(session)`` makes one step; it changes every tensor that training changes, and draws from every random
    generator that is part of the state. ``raw()`` gives everything that training changes, by name, as arrays (or what
    ``numpy.asarray`` takes), plain values or bytes, read from the program's own objects and never through the backend.
    It is also asked before ``init``.
    """

    backend: Backend[Any]
    train: Callable[[Any], object]
    raw: Callable[[], Mapping[str, Any]]


class RawTensor(NamedTuple):
    """One value of a program, frozen."""

    dtype: str
    shape: tuple[int, ...]
    content: bytes


class BackendContract(ABC):
    """Subclass it with a name that begins with ``Test``, and write ``program``.

    The program's model should hold what the framework has: a matrix that is not symmetric, a tensor without elements,
    one without dimensions, integers beside floats.
    """

    unsupported: ClassVar[Mapping[str, str]] = {}
    """Capabilities (see ``CAPABILITIES``) that the backend lacks, each with the reason; their tests are skipped."""

    model_part: ClassVar[str] = "model"
    """The part that holds the model's tensors, which a restore must check one by one."""

    @abstractmethod
    def program(self) -> Program:
        """A new program, with new objects, the same one every time: seed whatever it draws from."""

    def program_that_is_not_ready(self) -> Program | None:
        """A program whose model is not ready before ``init``, if the framework has such models."""
        return None

    @pytest.fixture(autouse=True)
    def _leave_random_state_alone(self) -> Generator[None, None, None]:
        before = process_random_state()
        yield
        set_process_random_state(before)

    # ---- what it declares

    def test_its_name_is_set(self) -> None:
        name = getattr(type(self.program().backend), "name", None)
        assert isinstance(name, str), f"the class attribute name is {name!r}; manifests need a name"
        assert name, "the class attribute name is empty; manifests need a name"

    def test_clean_stop_and_recoverable_are_exception_types(self) -> None:
        backend = self.program().backend
        for attribute in ("clean_stop", "recoverable"):
            kinds = getattr(backend, attribute)
            good = isinstance(kinds, tuple) and all(
                isinstance(kind, type) and issubclass(kind, BaseException) for kind in kinds
            )
            assert good, f"{attribute} is {kinds!r} and not a tuple of exception types"

    def test_what_it_declares_as_unsupported_is_known(self) -> None:
        unknown = set(self.unsupported) - CAPABILITIES
        assert not unknown, f"unsupported names {sorted(unknown)}; known are {sorted(CAPABILITIES)}"

    # ---- sessions

    def test_the_program_of_this_test_trains(self) -> None:
        with self._begun() as (program, session):
            before = _raw(program)
            program.train(session)
            assert _raw(program) != before, "train() changed nothing that raw() shows: these tests would prove nothing"

    def test_a_model_is_ready_after_init(self) -> None:
        with self._begun() as (program, session):
            answer = program.backend.ready(session)
            assert isinstance(answer, Ready), f"after init and local_init, ready() answers {answer!r}"

    def test_readiness_answers_are_ready_or_not_ready(self) -> None:
        program = self.program()
        session = program.backend.create_session()
        for answer in (program.backend.ready_for_local_init(session), program.backend.ready(session)):
            assert isinstance(answer, (Ready, NotReady)), f"a readiness question was answered with {answer!r}"
        program.backend.close_session(session)

    def test_a_model_that_is_not_ready_says_what_is_missing(self) -> None:
        program = self.program_that_is_not_ready()
        if program is None:
            pytest.skip("program_that_is_not_ready() gives none")
        session = program.backend.create_session()
        answer = program.backend.ready(session)
        assert isinstance(answer, NotReady), f"ready() answers {answer!r} before init"
        assert answer.reason.strip(), "ready() answers NotReady without a reason"
        program.backend.close_session(session)

    def test_closing_a_session_twice_is_harmless(self) -> None:
        program = self.program()
        session = program.backend.create_session()
        program.backend.close_session(session)
        program.backend.close_session(session)

    def test_a_session_can_follow_another_one(self) -> None:
        with self._begun() as (program, session):
            program.train(session)
        second = program.backend.create_session()
        program.backend.close_session(second)

    # ---- snapshots

    def test_training_after_a_snapshot_does_not_change_it(self) -> None:
        with self._begun(steps=1) as (program, session):
            expected = self._image(program, session)
            snapshot = program.backend.snapshot(session, Staging())
            program.train(session)
            program.train(session)
            assert _image_of(snapshot) == expected, "what was trained after the snapshot is in it"

    def test_a_snapshot_is_of_the_present_step(self, tmp_path: Path) -> None:
        with self._begun(steps=1) as (program, session):
            program.backend.snapshot(session, Staging())
            program.train(session)
            expected = _raw(program)
            parts = _saved(program, session, _store(tmp_path))
            with self._restored(parts) as (other, _):
                _check_same(expected, _raw(other), "the second of two snapshots restores another state")

    def test_two_snapshots_of_one_state_are_equal(self) -> None:
        with self._begun(steps=1) as (program, session):
            first, second = self._image(program, session), self._image(program, session)
            different = [name for name in first if first[name] != second.get(name)]
            assert first == second, f"two snapshots without a step between them differ in {different}"

    def test_taking_a_snapshot_does_not_change_training(self) -> None:
        undisturbed = self._trained(3)
        with self._begun(steps=1) as (program, session):
            program.backend.snapshot(session, Staging())
            program.train(session)
            program.backend.snapshot(session, Staging())
            program.train(session)
            _check_same(undisturbed, _raw(program), "training with snapshots differs from training without")

    def test_a_snapshot_holds_its_parts_under_names_that_can_be_files(self) -> None:
        with self._begun() as (program, session):
            snapshot = program.backend.snapshot(session, Staging())
            assert self.model_part in snapshot.parts, (
                f"there is no part {self.model_part!r} among {sorted(snapshot.parts)}; set model_part"
            )

    # ---- round trip, through a real directory

    def test_names_come_back(self, tmp_path: Path) -> None:
        before, after = self._round_trip(tmp_path)
        assert before.keys() == after.keys(), f"saved {sorted(before)}, restored {sorted(after)}"

    def test_dtypes_come_back(self, tmp_path: Path) -> None:
        before, after = self._round_trip(tmp_path)
        changed = {
            name: (value.dtype, after[name].dtype)
            for name, value in before.items()
            if name in after and after[name].dtype != value.dtype
        }
        assert not changed, f"dtypes before and after: {changed}"

    def test_shapes_come_back(self, tmp_path: Path) -> None:
        before, after = self._round_trip(tmp_path)
        changed = {
            name: (value.shape, after[name].shape)
            for name, value in before.items()
            if name in after and after[name].shape != value.shape
        }
        assert not changed, f"shapes before and after: {changed}"

    def test_values_come_back_bit_for_bit(self, tmp_path: Path) -> None:
        before, after = self._round_trip(tmp_path)
        _check_same(before, after, "the restored values are others")

    def test_tensors_without_elements_are_in_the_checkpoint(self, tmp_path: Path) -> None:
        self._check_stored(tmp_path, lambda value: 0 in value.shape, "without elements")

    def test_tensors_without_dimensions_are_in_the_checkpoint(self, tmp_path: Path) -> None:
        self._check_stored(tmp_path, lambda value: value.shape == (), "without dimensions")

    def test_the_global_step_comes_back(self, tmp_path: Path) -> None:
        with self._begun(steps=3) as (program, session):
            step = program.backend.global_step(session)
            if step is None:
                pytest.skip("the backend leaves the counting of steps to the core")
            parts = _saved(program, session, _store(tmp_path))
            with self._restored(parts) as (other, restored):
                found = other.backend.global_step(restored)
                assert found == step, f"saved at step {step}, restored at step {found}"

    def test_the_global_step_counts_steps(self) -> None:
        with self._begun() as (program, session):
            steps = [program.backend.global_step(session)]
            for _ in range(3):
                program.train(session)
                steps.append(program.backend.global_step(session))
        if None in steps:
            pytest.skip("the backend leaves the counting of steps to the core")
        assert steps == [0, 1, 2, 3], f"around three steps, the global step was {steps}"

    def test_a_fresh_process_restores_the_same_state(self, tmp_path: Path) -> None:
        self._need("fresh process")
        name = type(self).__qualname__
        if "<locals>" in name:
            pytest.skip(f"another process cannot import {name}")
        with self._begun(steps=2) as (program, session):
            _saved(program, session, _store(tmp_path))
            expected = [_digests(_raw(program))]
            program.train(session)
            expected.append(_digests(_raw(program)))
        told = subprocess.run(
            [sys.executable, "-c", _CHILD, str(inspect.getfile(type(self))), name, str(tmp_path)],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert told.returncode == 0, f"the other process failed:\n{told.stderr}"
        restored, trained = json.loads(told.stdout.splitlines()[-1])
        assert restored == expected[0], "another process restores another state"
        if "random state" not in self.unsupported:
            assert trained == expected[1], "another process restores the state, and then trains differently"

    # ---- random state

    def test_random_state_comes_back(self, tmp_path: Path) -> None:
        self._need("random state")
        with self._begun(steps=2) as (program, session):
            saved = encode(program.backend.random_state(session), "random state")
            parts = _saved(program, session, _store(tmp_path))
            with self._restored(parts) as (other, restored):
                found = encode(other.backend.random_state(restored), "random state")
                assert found == saved, "after a restore, random_state() is not what it was when the snapshot was taken"

    def test_training_draws_the_same_numbers_after_a_restore(self, tmp_path: Path) -> None:
        self._need("random state")
        expected = self._trained(4)
        with self._begun(steps=2) as (program, session):
            parts = _saved(program, session, _store(tmp_path))
        with self._restored(parts) as (other, restored):
            other.train(restored)
            other.train(restored)
            _check_same(expected, _raw(other), "two steps after a restore differ from the same two without it")

    def test_random_state_can_be_put_back(self) -> None:
        with self._begun(steps=1) as (program, session):
            before = program.backend.random_state(session)
            program.backend.seed(session, 12345)
            program.backend.set_random_state(session, before)
            after = program.backend.random_state(session)
            assert encode(after, "random state") == encode(before, "random state"), "it is another one now"

    def test_seeding_gives_the_same_random_state_every_time(self) -> None:
        with self._begun() as (program, session):
            states: list[Json] = []
            for seed in (7, 2**63 + 11, 7):
                program.backend.seed(session, seed)
                states.append(encode(program.backend.random_state(session), "random state"))
            assert states[0] == states[2], "one seed gives two random states"
            assert states[0] != states[1], "two seeds give one random state"

    def test_asking_for_the_mark_twice_gives_the_same_one(self) -> None:
        with self._begun(steps=1) as (program, session):
            assert program.backend.mark(session) == program.backend.mark(session), "mark() differs without a change"

    # ---- what does not fit

    def test_restore_refuses_a_missing_part(self, tmp_path: Path) -> None:
        parts = self._parts(tmp_path)
        without = {name: part for name, part in parts.items() if name != self.model_part}
        self._check_refused(without, f"a checkpoint without the part {self.model_part!r}")

    def test_restore_refuses_a_missing_tensor(self, tmp_path: Path) -> None:
        for name, parts in self._altered(tmp_path, _without):
            self._check_refused(parts, f"a checkpoint without the tensor {name!r}")

    def test_restore_refuses_an_unexpected_tensor(self, tmp_path: Path) -> None:
        for name, parts in self._altered(tmp_path, _with_another):
            self._check_refused(parts, f"a checkpoint with one tensor more, beside {name!r}")

    def test_restore_refuses_a_tensor_of_another_shape(self, tmp_path: Path) -> None:
        for name, parts in self._altered(tmp_path, _of_another_shape):
            self._check_refused(parts, f"a checkpoint whose tensor {name!r} has one dimension more")

    def test_restore_refuses_a_tensor_of_another_dtype(self, tmp_path: Path) -> None:
        for name, parts in self._altered(tmp_path, _of_another_dtype):
            self._check_refused(parts, f"a checkpoint whose tensor {name!r} is of another dtype")

    def test_a_refused_restore_changes_nothing(self, tmp_path: Path) -> None:
        for alter in (_without, _with_another, _of_another_shape, _of_another_dtype):
            for name, parts in self._altered(tmp_path, alter):
                with self._not_begun() as (program, session):
                    before, step = _raw(program), program.backend.global_step(session)
                    try:
                        program.backend.load(session, parts)
                    except Exception:
                        _check_same(before, _raw(program), f"refusing the tensor {name!r} left a half restored model")
                        found = program.backend.global_step(session)
                        assert found == step, f"a refused restore moved the global step from {step} to {found}"

    # ---- runs

    def test_a_resumed_run_equals_an_uninterrupted_one(self, tmp_path: Path) -> None:
        self._need("run")
        self._need("random state")
        uninterrupted = self._run(tmp_path / "whole", 6)
        self._run(tmp_path / "halves", 3)
        resumed = self._run(tmp_path / "halves", 6)
        _check_same(uninterrupted, resumed, "three steps, a restart and three more differ from six steps")

    def test_steps_that_are_watched_are_told_one_by_one(self) -> None:
        with self._begun() as (program, session):
            told: list[int] = []
            unwatch = program.backend.watch_steps(session, told.append)
            if unwatch is None:
                pytest.skip("the framework has no hook for steps")
            program.train(session)
            program.train(session)
            if program.backend.global_step(session) is None:
                pytest.skip("this program counts no steps")
            assert told == [1, 2], f"two steps were told as {told}"
            unwatch()
            program.train(session)
            assert told == [1, 2], "steps are told after the watching has ended"

    def test_a_crash_at_any_disk_call_of_a_save_leaves_a_good_checkpoint(self, tmp_path: Path) -> None:
        with self._begun(steps=1) as (program, session):
            before = _raw(program)
            _saved(program, session, _store(tmp_path / "good"))
            program.train(session)
            after = _raw(program)
            calls, crashed = 0, True
            while crashed:
                calls += 1
                logdir = shutil.copytree(tmp_path / "good", tmp_path / f"crash-{calls}")
                crashed = _crashes(program, session, logdir, calls)
                with self._restored(_newest(DirectoryStore(logdir))) as (other, _):
                    assert _raw(other) in (before, after), f"a crash before disk call {calls} left neither state"
                    assert crashed or _raw(other) == after, "a save that ended well is not the newest"
            assert calls > 5, f"only {calls} disk calls were seen"

    # ---- inside

    def _need(self, capability: str) -> None:
        if capability in self.unsupported:
            pytest.skip(f"{capability}: {self.unsupported[capability]}")

    def _begun(self, steps: int = 0) -> AbstractContextManager[tuple[Program, Any]]:
        return _opened(self.program(), steps)

    def _restored(self, parts: Parts) -> AbstractContextManager[tuple[Program, Any]]:
        """Another program, in another random state, restored from the parts; its ``init`` is not called."""
        return _opened(self.program(), 0, parts)

    def _not_begun(self) -> AbstractContextManager[tuple[Program, Any]]:
        """A program as it is when a restore begins."""
        return _opened(self.program(), 0, init=False)

    def _trained(self, steps: int) -> Mapping[str, RawTensor]:
        with self._begun(steps) as (program, _):
            return _raw(program)

    def _image(self, program: Program, session: Any) -> dict[str, Any]:
        return _image_of(program.backend.snapshot(session, Staging()))

    def _round_trip(self, path: Path) -> tuple[Mapping[str, RawTensor], Mapping[str, RawTensor]]:
        with self._begun(steps=2) as (program, session):
            parts = _saved(program, session, _store(path))
            before = _raw(program)
        with self._restored(parts) as (other, _):
            return before, _raw(other)

    def _parts(self, path: Path) -> Parts:
        self._need("strict restore")
        with self._begun(steps=2) as (program, session):
            return _saved(program, session, _store(path))

    def _altered(self, path: Path, alter: Alteration) -> Iterator[tuple[str, Parts]]:
        """The checkpoint altered at one tensor of the model, for each of them that can be altered so."""
        parts = self._parts(path / alter.__name__)
        assert self.model_part in parts, f"there is no part {self.model_part!r} among {sorted(parts)}; set model_part"
        part = parts[self.model_part]
        altered = [(name, found) for name in part.tensors if (found := alter(part, name)) is not None]
        if not altered:
            pytest.skip(f"no tensor of the part {self.model_part!r} can be altered so")
        for name, replaced in altered:
            yield name, {**parts, self.model_part: replaced}

    def _check_refused(self, parts: Parts, what: str) -> None:
        with self._not_begun() as (program, session):
            try:
                program.backend.load(session, parts)
            except IncompatibleCheckpointError as error:
                if not error.differences:
                    raise AssertionError(f"{what} is refused without saying why") from error
            except Exception as error:
                raise AssertionError(f"{what} is refused with {error!r}, not IncompatibleCheckpointError") from error
            else:
                raise AssertionError(f"{what} is restored as if it fitted")

    def _check_stored(self, path: Path, wanted: Callable[[RawTensor], bool], kind: str) -> None:
        with self._begun(steps=1) as (program, session):
            shapes = sorted(value.shape for value in _raw(program).values() if wanted(value))
            parts = _saved(program, session, _store(path))
        if not shapes:
            pytest.skip(f"the program has no tensor {kind}")
        stored = [
            tuple(tensor.extra.get("shape", tensor.spec.shape))
            for part in parts.values()
            for tensor in part.stored_tensors()
        ]
        missing = [shape for shape in set(shapes) if stored.count(shape) < shapes.count(shape)]
        assert not missing, f"tensors {kind} of shape {missing} are not in the checkpoint"

    def _run(self, logdir: Path, steps: int) -> Mapping[str, RawTensor]:
        program = self.program()
        supervisor = Supervisor(program.backend, logdir, save_every=EverySteps(2), summarize_every=None, signals=False)
        with supervisor.managed_session() as session:
            while not supervisor.should_stop() and supervisor.global_step < steps:
                program.train(session)
        return _raw(program)


def restore_in_this_process(file: str, contract: str, logdir: str) -> None:
    """What the other process does: restore, train one step, and print digests of both states."""
    spec = importlib.util.spec_from_file_location("contract_under_test", file)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["contract_under_test"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    kind: Any = module
    for name in contract.split("."):
        kind = getattr(kind, name)
    program: Program = kind().program()
    with _opened(program, 0, _newest(DirectoryStore(logdir))) as (_, session):
        restored = _digests(_raw(program))
        program.train(session)
        print(json.dumps([restored, _digests(_raw(program))]))


_CHILD: Final = (
    "import sys; from supervise_core.testing.backend_contract import restore_in_this_process as restore; "
    "restore(*sys.argv[1:])"
)


@contextmanager
def _opened(
    program: Program, steps: int, parts: Parts | None = None, init: bool = True
) -> Generator[tuple[Program, Any], None, None]:
    """A program with a session, brought up as a run does it: restored, or else initialised and trained."""
    backend = program.backend
    session = backend.create_session()
    try:
        if parts is not None:
            backend.seed(session, 987654321)
            backend.load(session, parts)
        elif init:
            backend.init(session)
        if parts is not None or init:
            backend.local_init(session)
        for _ in range(steps):
            program.train(session)
        yield program, session
    finally:
        backend.close_session(session)


# ---- checkpoints


def _store(path: Path) -> DirectoryStore:
    """A directory of which nothing is demanded at a power cut."""
    return DirectoryStore(path, disk=HastyDisk())


def _saved(program: Program, session: Any, store: DirectoryStore) -> Parts:
    """Commit the present state to the store; what is read from there."""
    backend = program.backend
    step = backend.global_step(session) or 0
    snapshot = backend.snapshot(session, Staging())
    with store.writing():
        draft = store.begin(CheckpointId(step, len(store.checkpoints())))
        written = write_snapshot(draft, snapshot, None)
        parts = tuple(snapshot.parts)
        draft.commit(Manifest(step=step, backend=backend.name, wall_time=0.0, parts=parts, files=written.files))
    return _newest(store)


def _newest(store: DirectoryStore) -> Parts:
    with store.open(store.checkpoints()[-1]) as reader:
        return {name: part.held() for name, part in read_checkpoint(reader).parts.items()}


def _image_of(snapshot: Snapshot) -> dict[str, Any]:
    """All bytes of a snapshot."""
    snapshot.finish()
    image: dict[str, Any] = {}
    for part in snapshot.parts.values():
        image[f"the state of {part.name}"] = json.dumps(part.state, sort_keys=True)
        image |= {file.name: b"".join(file.chunks()) for file in part.files}
    return image


def _crashes(program: Program, session: Any, logdir: Path, calls: int) -> bool:
    """Save, dying before the disk call of that number; whether there was one."""
    try:
        _saved(program, session, DirectoryStore(logdir, disk=CrashingDisk(crash_before=calls)))
    except Crash:
        return True
    return False


# ---- raw state


def _raw(program: Program) -> dict[str, RawTensor]:
    """A copy of what the program shows, that nothing can change any more."""
    return {name: _frozen(value) for name, value in program.raw().items()}


def _frozen(value: Any) -> RawTensor:
    if isinstance(value, (bytes, bytearray, memoryview)):
        return RawTensor("bytes", (len(value),), bytes(value))
    if value is None or type(value) in (bool, int, float, complex, str):
        return RawTensor(type(value).__name__, (1,), repr(value).encode())
    array = np.asarray(value)
    return RawTensor(array.dtype.str if array.dtype.kind != "V" else str(array.dtype), array.shape, array.tobytes())


def _digests(raw: Mapping[str, RawTensor]) -> dict[str, list[Any]]:
    return {
        name: [value.dtype, list(value.shape), hashlib.sha256(value.content).hexdigest()] for name, value in raw.items()
    }


def _check_same(expected: Mapping[str, RawTensor], found: Mapping[str, RawTensor], what: str) -> None:
    names = sorted(expected.keys() | found.keys())
    different = [name for name in names if expected.get(name) != found.get(name)]
    assert not different, f"{what}, in {different}"


# ---- alterations of a checkpoint: of the part that is read, since no good checkpoint can be edited on disk

Alteration = Callable[[Part, str], Part | None]


def _without(part: Part, name: str) -> Part | None:
    rest = {other: spec for other, spec in part.tensors.items() if other != name}
    return _replaced(part, name, lambda _: [], rest)


def _with_another(part: Part, name: str) -> Part | None:
    return _replaced(part, name, lambda leaf: [leaf, leaf], part.tensors)


def _of_another_shape(part: Part, name: str) -> Part | None:
    """One dimension more, in front: the bytes are the same, and frameworks broadcast it without a word."""
    spec = part.tensors[name]

    def alter(leaf: dict[str, Json]) -> list[Json]:
        altered = {key: value for key, value in leaf.items() if key in ("$tensor", "dtype", "shape")}
        if "shape" in altered:
            altered["shape"] = [1, *altered["shape"]]
        return [altered]

    is_plain = not any("shape" in stored.extra for stored in part.stored_tensors() if stored.spec.name == name)
    shape = (1, *spec.shape) if is_plain else spec.shape
    return _replaced(part, name, alter, {**part.tensors, name: TensorSpec(name, spec.dtype, shape)})


def _of_another_dtype(part: Part, name: str) -> Part | None:
    """The same bytes as another dtype of that width, where the dtype is one of safetensors' own."""
    spec = part.tensors[name]
    if any("dtype" in stored.extra for stored in part.stored_tensors() if stored.spec.name == name):
        return None
    altered = TensorSpec(name, _OTHER_DTYPE[spec.dtype], spec.shape)
    return Part(part.name, part.state, {**part.tensors, name: altered}, part.read)


def _replaced(
    part: Part,
    name: str,
    replace: Callable[[dict[str, Json]], list[Json]],
    tensors: Mapping[str, TensorSpec],
) -> Part | None:
    """The part with other leaves in the place of a tensor's; None if the tensor is the whole part."""
    state = _rebuilt(part.state, name, replace)
    return None if state is None else Part(part.name, state, tensors, part.read)


def _rebuilt(node: Json, name: str, replace: Callable[[dict[str, Json]], list[Json]]) -> Json:
    match node:
        case {"$tensor": found} if found == name:
            return None
        case {"$tensor": _}:
            return node
        case {"$defaultdict": [factory, pairs]}:
            return {"$defaultdict": [factory, _rebuilt_pairs(pairs, name, replace)]}
        case dict() if next(iter(node), "") in _PAIR_TAGS:
            return {tag: _rebuilt_pairs(pairs, name, replace) for tag, pairs in node.items()}
        case dict():
            return dict(_rebuilt_pairs([[key, value] for key, value in node.items()], name, replace))
        case list():
            return [value for _, value in _rebuilt_pairs([["", item] for item in node], name, replace)]
        case _:
            return node


def _rebuilt_pairs(pairs: list[Json], name: str, replace: Callable[[dict[str, Json]], list[Json]]) -> list[Json]:
    rebuilt: list[Json] = []
    for key, value in pairs:
        if isinstance(value, dict) and value.get("$tensor") == name:
            keys = itertools.chain([key], (f"{key} {number}" for number in itertools.count(2)))
            rebuilt += [list(pair) for pair in zip(keys, replace(value), strict=False)]
        else:
            rebuilt.append([key, _rebuilt(value, name, replace)])
    return rebuilt
