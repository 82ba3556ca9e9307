"""One good backend, and mutants of it that each do one thing wrong. Run by ``test_mutants.py``, not by itself."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import numpy as np

from supervise_core import Backend, IncompatibleCheckpointError, NotReady, Parts, Readiness, Ready, Snapshot, Staging
from supervise_core.numpy_codec import NumpyCodec
from supervise_core.tensors import Stored
from supervise_core.testing.backend_contract import BackendContract, Program

Arrays = dict[str, Any]


class Session:
    """The arrays, the step, and whether they were given values."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.arrays: Arrays = {
            "weights": np.zeros((3, 3)),
            "momentum": np.zeros((3, 3)),
            "counts": np.arange(4),
            "none": np.zeros((0, 2)),
            "scalar": np.array(0.5),
        }
        self.rng = rng
        self.has_values = False
        self.step = 0
        self.open = True
        self.notify: Callable[[int], None] | None = None


class GoodBackend(Backend[Session]):
    """Keeps the contract."""

    name = "good"

    def __init__(self) -> None:
        random.seed(1)
        self.session = Session(np.random.default_rng(1))

    def create_session(self, master: str = "", config: Any = None) -> Session:
        return self.session

    def init(self, session: Session) -> None:
        session.arrays["weights"] += session.rng.normal(size=(3, 3))
        session.has_values = True

    def ready(self, session: Session) -> Readiness:
        return Ready() if session.has_values else NotReady("arrays: all of them")

    def global_step(self, session: Session) -> int | None:
        return session.step

    def snapshot(self, session: Session, staging: Staging) -> Snapshot:
        staging.put("model", self.to_save(session))
        staging.put("rest", {"step": session.step, "random": self.random_state(session)})
        return staging.snapshot()

    def to_save(self, session: Session) -> Any:
        return session.arrays

    def load(self, session: Session, parts: Parts) -> None:
        saved, rest = self.trees(parts)
        self.check(session, saved)
        for name, array in saved.items():
            self.put(session, name, array)
        session.has_values = True
        session.step = rest["step"]
        self.set_random_state(session, rest["random"])

    def trees(self, parts: Parts) -> tuple[Arrays, Any]:
        for name in ("model", "rest"):
            if name not in parts:
                raise IncompatibleCheckpointError(name, ["it is missing"])
        return parts["model"].tree(), parts["rest"].tree()

    def check(self, session: Session, saved: Arrays) -> None:
        differences = self.different_names(session, saved)
        for name in session.arrays.keys() & saved.keys():
            differences += self.different_kind(name, session.arrays[name], saved[name])
        if differences:
            raise IncompatibleCheckpointError("model", differences)

    def different_names(self, session: Session, saved: Arrays) -> list[str]:
        return [f"{name!r} is on one side alone" for name in session.arrays.keys() ^ saved.keys()]

    def different_kind(self, name: str, here: Any, there: Any) -> list[str]:
        if (here.shape, here.dtype) == (there.shape, there.dtype):
            return []
        return [f"{name!r} is {there.dtype}{there.shape} there and {here.dtype}{here.shape} here"]

    def put(self, session: Session, name: str, array: Any) -> None:
        session.arrays[name] = array

    def watch_steps(self, session: Session, notify: Callable[[int], None]) -> Callable[[], None]:
        def unwatch() -> None:
            session.notify = None

        session.notify = notify
        return unwatch

    def random_state(self, session: Session) -> Mapping[str, Any]:
        return {"process": super().random_state(session), "rng": session.rng.bit_generator.state}

    def set_random_state(self, session: Session, state: Mapping[str, Any]) -> None:
        super().set_random_state(session, state["process"])
        session.rng.bit_generator.state = state["rng"]

    def seed(self, session: Session, seed: int) -> None:
        super().seed(session, seed)
        session.rng.bit_generator.state = type(session.rng.bit_generator)(seed).state


class TestGood(BackendContract):
    """A mutant says by which test it is caught."""

    Mutant: ClassVar[type[GoodBackend]] = GoodBackend
    caught_by: ClassVar[str] = ""

    def program(self) -> Program:
        backend = self.Mutant()

        def train(session: Session) -> None:
            arrays = session.arrays
            arrays["momentum"] *= 0.9
            arrays["momentum"] += session.rng.normal(size=(3, 3)) + random.gauss(0, 1)
            arrays["weights"] -= arrays["momentum"]
            arrays["counts"] += 1
            arrays["scalar"] *= 1.25
            session.step += 1
            if session.notify is not None:
                session.notify(session.step)

        return Program(backend, train, lambda: backend.session.arrays)

    def program_that_is_not_ready(self) -> Program:
        return self.program()


class _LateCodec(NumpyCodec):
    def copy_out(self, pairs: Any) -> Any:
        return lambda _: NumpyCodec.copy_out(self, pairs)

    def describe(self, value: Any) -> Stored:
        return super().describe(value)._replace(address=None)


class TestAliasing(TestGood):
    caught_by = "test_training_after_a_snapshot_does_not_change_it"

    class Mutant(GoodBackend):
        def snapshot(self, session: Session, staging: Staging) -> Snapshot:
            staging.put("model", session.arrays, _LateCodec())
            staging.put("rest", {"step": session.step, "random": self.random_state(session)})
            return staging.snapshot()


class TestLostDtype(TestGood):
    caught_by = "test_dtypes_come_back"

    class Mutant(GoodBackend):
        def to_save(self, session: Session) -> Any:
            return {name: array.astype(np.float32) for name, array in session.arrays.items()}

        def different_kind(self, name: str, here: Any, there: Any) -> list[str]:
            return [] if here.shape == there.shape else [f"{name!r} has another shape"]


class TestForgottenStep(TestGood):
    caught_by = "test_the_global_step_comes_back"

    class Mutant(GoodBackend):
        def load(self, session: Session, parts: Parts) -> None:
            step = session.step
            super().load(session, parts)
            session.step = step


class TestIgnoresMissingName(TestGood):
    caught_by = "test_restore_refuses_a_missing_tensor"

    class Mutant(GoodBackend):
        def different_names(self, session: Session, saved: Arrays) -> list[str]:
            return [f"{name!r} is unexpected" for name in saved.keys() - session.arrays.keys()]


class TestIgnoresUnexpectedName(TestGood):
    caught_by = "test_restore_refuses_an_unexpected_tensor"

    class Mutant(GoodBackend):
        def different_names(self, session: Session, saved: Arrays) -> list[str]:
            return [f"{name!r} is missing" for name in session.arrays.keys() - saved.keys()]


class TestIgnoresShape(TestGood):
    caught_by = "test_restore_refuses_a_tensor_of_another_shape"

    class Mutant(GoodBackend):
        def different_kind(self, name: str, here: Any, there: Any) -> list[str]:
            return [] if here.dtype == there.dtype else [f"{name!r} has another dtype"]


class TestIgnoresDtype(TestGood):
    caught_by = "test_restore_refuses_a_tensor_of_another_dtype"

    class Mutant(GoodBackend):
        def different_kind(self, name: str, here: Any, there: Any) -> list[str]:
            return [] if here.shape == there.shape else [f"{name!r} has another shape"]


class TestForgetsRandomState(TestGood):
    caught_by = "test_random_state_comes_back"

    class Mutant(GoodBackend):
        def load(self, session: Session, parts: Parts) -> None:
            before = self.random_state(session)
            super().load(session, parts)
            self.set_random_state(session, before)


class TestKnowsNotAllRandomState(TestGood):
    caught_by = "test_training_draws_the_same_numbers_after_a_restore"

    class Mutant(GoodBackend):
        def random_state(self, session: Session) -> Mapping[str, Any]:
            return {"process": Backend.random_state(self, session)}

        def set_random_state(self, session: Session, state: Mapping[str, Any]) -> None:
            Backend.set_random_state(self, session, state["process"])


class TestTransposes(TestGood):
    caught_by = "test_values_come_back_bit_for_bit"

    class Mutant(GoodBackend):
        def put(self, session: Session, name: str, array: Any) -> None:
            session.arrays[name] = array.T if name == "weights" else array


class TestDropsEmptyTensors(TestGood):
    caught_by = "test_tensors_without_elements_are_in_the_checkpoint"

    class Mutant(GoodBackend):
        def to_save(self, session: Session) -> Any:
            return {name: array for name, array in session.arrays.items() if array.size}

        def different_names(self, session: Session, saved: Arrays) -> list[str]:
            names = {name for name, array in session.arrays.items() if array.size}
            return [f"{name!r} is on one side alone" for name in names ^ saved.keys()]


class TestFlattensScalars(TestGood):
    caught_by = "test_tensors_without_dimensions_are_in_the_checkpoint"

    class Mutant(GoodBackend):
        def to_save(self, session: Session) -> Any:
            return {name: np.atleast_1d(array) for name, array in session.arrays.items()}

        def trees(self, parts: Parts) -> tuple[Arrays, Any]:
            saved, rest = super().trees(parts)
            return {name: array.reshape(()) if name == "scalar" else array for name, array in saved.items()}, rest


class TestRenames(TestGood):
    caught_by = "test_names_come_back"

    class Mutant(GoodBackend):
        def put(self, session: Session, name: str, array: Any) -> None:
            session.arrays[name.upper() if name == "weights" else name] = array
            if name == "weights":
                del session.arrays[name]


class TestLoadsBeforeChecking(TestGood):
    caught_by = "test_a_refused_restore_changes_nothing"

    class Mutant(GoodBackend):
        def load(self, session: Session, parts: Parts) -> None:
            saved, _ = self.trees(parts)
            here = dict(session.arrays)
            session.arrays.update(saved)
            checked = Session(session.rng)
            checked.arrays = here
            self.check(checked, saved)
            super().load(session, parts)


class TestSnapshotOfAnotherStep(TestGood):
    caught_by = "test_a_snapshot_is_of_the_present_step"

    class Mutant(GoodBackend):
        cached: Arrays | None = None

        def to_save(self, session: Session) -> Any:
            saved, self.cached = self.cached, {name: array.copy() for name, array in session.arrays.items()}
            return saved or self.cached


class TestNotReadyWithoutReason(TestGood):
    caught_by = "test_a_model_that_is_not_ready_says_what_is_missing"

    class Mutant(GoodBackend):
        def ready(self, session: Session) -> Readiness:
            return Ready() if session.has_values else NotReady("")


class TestReadyIsABool(TestGood):
    caught_by = "test_readiness_answers_are_ready_or_not_ready"

    class Mutant(GoodBackend):
        def ready(self, session: Session) -> Any:
            return session.has_values


class TestClosesOnce(TestGood):
    caught_by = "test_closing_a_session_twice_is_harmless"

    class Mutant(GoodBackend):
        def close_session(self, session: Session) -> None:
            if not session.open:
                raise RuntimeError("closed already")
            session.open = False


class TestSnapshotWithTheTime(TestGood):
    caught_by = "test_two_snapshots_of_one_state_are_equal"

    class Mutant(GoodBackend):
        taken = 0

        def snapshot(self, session: Session, staging: Staging) -> Snapshot:
            self.taken += 1
            staging.put("taken", {"number": self.taken})
            return super().snapshot(session, staging)


class TestSnapshotThatDraws(TestGood):
    caught_by = "test_taking_a_snapshot_does_not_change_training"

    class Mutant(GoodBackend):
        def snapshot(self, session: Session, staging: Staging) -> Snapshot:
            taken = super().snapshot(session, staging)
            session.rng.normal()
            return taken


class TestNoName(TestGood):
    caught_by = "test_its_name_is_set"

    class Mutant(GoodBackend):
        name = ""


class TestCleanStopIsNoTuple(TestGood):
    caught_by = "test_clean_stop_and_recoverable_are_exception_types"

    class Mutant(GoodBackend):
        clean_stop = StopIteration  # type: ignore[assignment]


class TestForgetsMomentum(TestGood):
    caught_by = "test_a_resumed_run_equals_an_uninterrupted_one"

    class Mutant(GoodBackend):
        def to_save(self, session: Session) -> Any:
            return {name: array for name, array in session.arrays.items() if name != "momentum"}

        def different_names(self, session: Session, saved: Arrays) -> list[str]:
            return [f"{name!r} differs" for name in (session.arrays.keys() - {"momentum"}) ^ saved.keys()]


class TestTellsEachStepTwice(TestGood):
    caught_by = "test_steps_that_are_watched_are_told_one_by_one"

    class Mutant(GoodBackend):
        def watch_steps(self, session: Session, notify: Callable[[int], None]) -> Callable[[], None]:
            def twice(step: int) -> None:
                notify(step)
                notify(step)

            return super().watch_steps(session, twice)


class TestStateOfThisProcessAlone(TestGood):
    caught_by = "test_a_fresh_process_restores_the_same_state"
    kept: ClassVar[list[Arrays]] = []

    class Mutant(GoodBackend):
        def to_save(self, session: Session) -> Any:
            TestStateOfThisProcessAlone.kept.append({name: array.copy() for name, array in session.arrays.items()})
            return {**session.arrays, "scalar": np.array(len(TestStateOfThisProcessAlone.kept) - 1.0)}

        def trees(self, parts: Parts) -> tuple[Arrays, Any]:
            saved, rest = super().trees(parts)
            kept = TestStateOfThisProcessAlone.kept
            if kept:
                saved = {**saved, "scalar": kept[int(saved["scalar"])]["scalar"].copy()}
            return saved, rest


MUTANTS: list[type[TestGood]] = sorted(TestGood.__subclasses__(), key=lambda mutant: mutant.__name__)
