"""Init, ready, local init: what brings a model up, in which order, and what is said when it does not come up."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from supervise_core import (
    Backend,
    CheckpointNotFoundError,
    Coordinator,
    DirectoryStore,
    NotReady,
    NotReadyError,
    Parts,
    Readiness,
    ReadinessTimeoutError,
    Ready,
    SessionManager,
    SessionStateError,
    Snapshot,
    Staging,
    Supervisor,
)
from supervise_core.checkpoint_format import CheckpointId, CheckpointReader
from supervise_core.manifest import Manifest
from supervise_core.operations import USE_BACKEND, Operations
from supervise_core.snapshot_files import write_snapshot
from supervise_core.tagged_json import encode
from supervise_core.testing.clock import FakeClock
from supervise_core.testing.stores import MemoryStore
from supervise_numpy import ArrayBackend

try:
    import torch

    from supervise_torch import TorchBackend
except ImportError:
    torch = None  # type: ignore[assignment]

FRAMEWORKS = ["numpy", pytest.param("torch", marks=pytest.mark.skipif(torch is None, reason="PyTorch is missing"))]


class Recorded(Backend[Any]):
    """Writes down what is asked of the backend behind it."""

    @property
    def log(self) -> list[str]:
        return self.__dict__.setdefault("_log", [])  # type: ignore[no-any-return]

    def init(self, session: Any) -> None:
        self.log.append("init")
        super().init(session)  # type: ignore[safe-super]

    def load(self, session: Any, parts: Parts) -> None:
        self.log.append("load")
        super().load(session, parts)  # type: ignore[safe-super]

    def ready(self, session: Any) -> Readiness:
        self.log.append("ready")
        return super().ready(session)

    def ready_for_local_init(self, session: Any) -> Readiness:
        self.log.append("ready_for_local_init")
        return super().ready_for_local_init(session)

    def local_init(self, session: Any) -> None:
        self.log.append("local_init")
        super().local_init(session)

    def snapshot(self, session: Any, staging: Staging) -> Snapshot:
        self.log.append("saver")
        return super().snapshot(session, staging)  # type: ignore[safe-super]

    def summary(self, session: Any) -> Mapping[str, Any]:
        self.log.append("summary")
        return {"of": "the backend"}

    def close_session(self, session: Any) -> None:
        self.log.append("close")
        super().close_session(session)


class RecordedArrays(Recorded, ArrayBackend):
    pass


def make(framework: str) -> Recorded:
    if framework == "numpy":
        return RecordedArrays({"w": np.arange(3.0)})

    class RecordedTorch(Recorded, TorchBackend):
        pass

    return RecordedTorch(model=torch.nn.Linear(2, 2))


def save_one(framework: str, logdir: Path) -> None:
    supervisor = Supervisor(make(framework), logdir, summarize_every=None, signals=False)
    with supervisor.managed_session():
        supervisor.request_stop()


def user_operation(name: str, backend: Recorded) -> Callable[..., Any]:
    """What a user passes instead of an operation; writes its name in capitals."""

    def act(session: Any, *more: Any) -> Any:
        backend.log.append(name.upper())
        match name:
            case "ready" | "ready_for_local_init":
                return Ready()
            case "summary":
                return {"of": "the user"}
            case "saver":
                return Backend.snapshot
            case _:
                return None

    return act


# Small letters: the backend's own operation. Capitals: the user's. may_local is ready_for_local_init, local local_init.
TABLE = """
operation             given     fresh                                restored

init                  default   init may_local local ready           load may_local local ready
init                  callable  INIT may_local local ready           load may_local local ready
init                  None      may_local local ready                load may_local local ready

init_fn               default   init may_local local ready           load may_local local ready
init_fn               callable  init INIT_FN may_local local ready   load may_local local ready
init_fn               None      init may_local local ready           load may_local local ready

ready                 default   init may_local local ready           load may_local local ready
ready                 callable  init may_local local READY           load may_local local READY
ready                 None      init may_local local                 load may_local local

ready_for_local_init  default   init may_local local ready           load may_local local ready
ready_for_local_init  callable  init MAY_LOCAL local ready           load MAY_LOCAL local ready
ready_for_local_init  None      init local ready                     load local ready

local_init            default   init may_local local ready           load may_local local ready
local_init            callable  init may_local LOCAL ready           load may_local LOCAL ready
local_init            None      init ready                           load ready

summary               default   init may_local local ready           load may_local local ready
summary               callable  init may_local local ready           load may_local local ready
summary               None      init may_local local ready           load may_local local ready

saver                 default   init may_local local ready           load may_local local ready
saver                 callable  init may_local local ready           load may_local local ready
saver                 None      init may_local local ready           init may_local local ready
"""


LONG = {
    "may_local": "ready_for_local_init",
    "MAY_LOCAL": "READY_FOR_LOCAL_INIT",
    "local": "local_init",
    "LOCAL": "LOCAL_INIT",
}


def rows() -> Iterator[Any]:
    for line in TABLE.strip().splitlines()[1:]:
        if line:
            operation, given, *columns = [cell.strip() for cell in line.split("  ") if cell]
            for start, ran in zip(("fresh", "restored"), columns, strict=True):
                yield pytest.param(
                    operation,
                    given,
                    start,
                    [LONG.get(word, word) for word in ran.split()],
                    id=f"{operation}-{given}-{start}",
                )


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize(("operation", "given", "start", "ran"), list(rows()))
def test_what_is_run_and_in_which_order(
    framework: str, operation: str, given: str, start: str, ran: list[str], tmp_path: Path
) -> None:
    if start == "restored":
        save_one(framework, tmp_path)
    backend = make(framework)
    asked: dict[str, Any] = {"callable": {operation: user_operation(operation, backend)}, "None": {operation: None}}
    manager = SessionManager(backend, Operations.of(backend, **asked.get(given, {})), DirectoryStore(tmp_path))
    manager.prepare_session()
    assert backend.log == ran
    assert manager.recovery.ran == [name.lower() for name in ran if name != "load"]
    assert manager.recovery.restored == ("model.ckpt-0" if "load" in ran else None)


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("given", ["default", "callable", "None"])
def test_the_summary_is_the_backends_or_the_users_or_none(framework: str, given: str) -> None:
    backend = make(framework)
    asked: dict[str, Any] = {"default": USE_BACKEND, "callable": user_operation("summary", backend), "None": None}
    operations = Operations.of(backend, summary=asked[given])
    if given == "None":
        assert operations.summary is None
        return
    assert operations.summary is not None
    found = operations.summary(backend.create_session())
    assert found == {"of": "the backend" if given == "default" else "the user"}


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_saver_of_the_user_takes_the_snapshot_and_the_backend_loads_it(framework: str, tmp_path: Path) -> None:
    backend = make(framework)

    def saver(session: Any, staging: Staging) -> Snapshot:
        backend.log.append("SAVER")
        return type(backend).__mro__[2].snapshot(backend, session, staging)  # type: ignore[attr-defined, no-any-return]

    supervisor = Supervisor(backend, tmp_path, saver=saver, summarize_every=None, signals=False)
    with supervisor.managed_session():
        supervisor.request_stop()
    assert "SAVER" in backend.log
    assert "saver" not in backend.log
    again = make(framework)
    SessionManager(again, store=DirectoryStore(tmp_path)).prepare_session()
    assert again.log[0] == "load"


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_without_a_saver_nothing_is_saved(framework: str, tmp_path: Path) -> None:
    supervisor = Supervisor(make(framework), tmp_path, saver=None, summarize_every=None, signals=False)
    with supervisor.managed_session(), pytest.raises(SessionStateError, match="saves nothing"):
        supervisor.save()
    assert DirectoryStore(tmp_path).checkpoints() == []
    assert supervisor.report.final_save == "switched off"


def test_an_operation_that_cannot_be_called_is_refused() -> None:
    backend = make("numpy")
    for name in ("init", "init_fn", "ready", "ready_for_local_init", "local_init", "summary", "saver"):
        with pytest.raises(TypeError, match=f"{name}= takes a callable or None, not 3"):
            Operations.of(backend, **{name: 3})  # type: ignore[arg-type]


# ---- what is not ready, and why


def test_init_init_fn_and_local_init_all_none_can_make_nothing_ready() -> None:
    backend = make("numpy")
    operations = Operations.of(backend, init=None, init_fn=None, local_init=None)
    with pytest.raises(NotReadyError, match="init, init_fn and local_init are all None"):
        SessionManager(backend, operations).prepare_session()
    assert backend.log == ["close"]


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (NotReady("w: no values"), "the model is not ready: w: no values"),
        (False, "the model is not ready: the ready check answered False"),
    ],
)
def test_a_model_that_is_not_ready_is_an_error_that_says_why(answer: object, reason: str) -> None:
    backend = make("numpy")
    operations = Operations.of(backend, ready=lambda session: answer, init_fn=lambda session: None)
    with pytest.raises(NotReadyError, match=reason) as caught:
        SessionManager(backend, operations).prepare_session()
    assert "nothing was restored; run: init, init_fn" in str(caught.value)
    assert backend.log[-1] == "close"


@pytest.mark.parametrize("answer", [True, None, Ready()])
def test_true_none_and_ready_are_ready(answer: object) -> None:
    backend = make("numpy")
    SessionManager(backend, Operations.of(backend, ready=lambda session: answer)).prepare_session()
    assert "close" not in backend.log


def test_another_answer_of_a_ready_check_is_an_error() -> None:
    backend = make("numpy")
    with pytest.raises(
        TypeError, match=r"a ready check answers Ready\(\), NotReady\(reason\), a bool or None, not 'yes'"
    ):
        SessionManager(backend, Operations.of(backend, ready=lambda session: "yes")).prepare_session()


def test_what_is_not_ready_for_local_init_gets_none() -> None:
    backend = make("numpy")
    operations = Operations.of(backend, ready_for_local_init=lambda session: NotReady("tables: empty"))
    with pytest.raises(NotReadyError, match="not ready for local_init: tables: empty"):
        SessionManager(backend, operations).prepare_session()
    assert backend.log == ["init", "close"]


def test_an_error_of_an_operation_comes_out_as_itself_and_closes_the_session() -> None:
    backend = make("numpy")

    def fail(session: object) -> None:
        raise ZeroDivisionError("of the user")

    with pytest.raises(ZeroDivisionError, match="of the user"):
        SessionManager(backend, Operations.of(backend, init_fn=fail)).prepare_session()
    assert backend.log == ["init", "close"]


@pytest.mark.skipif(torch is None, reason="PyTorch is missing")
class TestTorchReadiness:
    def lazy(self) -> Any:
        return torch.nn.Sequential(torch.nn.LazyLinear(3), torch.nn.Linear(3, 1))

    def test_lazy_parameters_are_named(self) -> None:
        backend = TorchBackend(network=self.lazy())
        with pytest.raises(NotReadyError, match=r"network\.0\.weight \(a lazy parameter; run the model once") as caught:
            SessionManager(backend).prepare_session()
        assert "network.0.bias" in str(caught.value)
        assert "network.1" not in str(caught.value)

    def test_lazy_parameters_become_ready_in_init_fn(self) -> None:
        network = self.lazy()
        backend = TorchBackend(network=network)
        operations = Operations.of(backend, init_fn=lambda session: network(torch.zeros(1, 2)))
        SessionManager(backend, operations).prepare_session()
        assert network[0].weight.shape == (3, 2)

    def test_parameters_on_meta_are_named_when_init_is_switched_off(self) -> None:
        backend = TorchBackend(model=torch.nn.Linear(2, 2, device="meta"))
        operations = Operations.of(backend, init=None)
        with pytest.raises(NotReadyError, match=r"model\.weight \(on the meta device; .*\), model\.bias \(on the meta"):
            SessionManager(backend, operations).prepare_session()

    def test_buffers_on_meta_are_named(self) -> None:
        model = torch.nn.BatchNorm1d(2)
        model.running_mean = torch.zeros(2, device="meta")
        backend = TorchBackend(model=model)
        answer = backend.ready(backend.create_session())
        assert answer == NotReady(
            "not initialised: model.running_mean (on the meta device; give it values in init_fn=)"
        )

    def test_init_gives_parameters_on_meta_their_values(self) -> None:
        model = torch.nn.Sequential(torch.nn.Linear(2, 2, device="meta"), torch.nn.Linear(2, 2))
        kept = model[1].weight.clone()
        backend = TorchBackend(model=model)
        SessionManager(backend).prepare_session()
        assert model[0].weight.device.type == "cpu"
        assert bool(model[0].weight.abs().sum() > 0)
        assert torch.equal(model[1].weight, kept)

    def test_without_the_ready_check_nothing_is_asked(self) -> None:
        backend = TorchBackend(model=torch.nn.Linear(2, 2, device="meta"))
        SessionManager(backend, Operations.of(backend, init=None, ready=None)).prepare_session()


# ---- resume


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_must_without_a_checkpoint_is_an_error(framework: str, tmp_path: Path) -> None:
    backend = make(framework)
    with pytest.raises(CheckpointNotFoundError, match="resume='must' needs a checkpoint, and there is none in"):
        SessionManager(backend, store=DirectoryStore(tmp_path)).prepare_session(resume="must")
    assert backend.log == ["close"]


def test_never_does_not_restore(tmp_path: Path) -> None:
    save_one("numpy", tmp_path)
    backend = make("numpy")
    store = DirectoryStore(tmp_path)
    with store.writing():
        SessionManager(backend, store=store).prepare_session(resume="never")
    assert backend.log[0] == "init"
    assert store.checkpoints() == []
    assert (tmp_path / "retired").is_dir()


# ---- recover_session


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_recover_without_a_checkpoint_hands_out_a_session_that_is_not_ready(framework: str, tmp_path: Path) -> None:
    backend = make(framework)
    _, ready = SessionManager(backend, store=DirectoryStore(tmp_path)).recover_session()
    assert ready is False
    assert backend.log == ["ready_for_local_init", "local_init"]


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_recover_restores_and_asks(framework: str, tmp_path: Path) -> None:
    save_one(framework, tmp_path)
    backend = make(framework)
    _, ready = SessionManager(backend, store=DirectoryStore(tmp_path)).recover_session()
    assert ready is True
    assert backend.log == ["load", "ready_for_local_init", "local_init", "ready"]


@pytest.mark.parametrize("operation", ["ready", "ready_for_local_init"])
def test_recover_says_in_the_log_or_the_answer_what_is_not_ready(operation: str, tmp_path: Path) -> None:
    save_one("numpy", tmp_path)
    backend = make("numpy")
    operations = Operations.of(backend, **{operation: lambda session: NotReady("not yet")})  # type: ignore[arg-type]
    _, ready = SessionManager(backend, operations, DirectoryStore(tmp_path)).recover_session()
    assert ready is False
    assert ("local_init" in backend.log) == (operation == "ready")


# ---- wait_for_session


class Waiting:
    """A worker that waits, in a thread and on a clock that stands still, for a model that somebody makes ready."""

    def __init__(self, limit: float, operation: str = "ready") -> None:
        self.backend = make("numpy")
        self.clock = FakeClock()
        self.began = self.clock.monotonic()
        self.stop = Coordinator(clock=self.clock)
        self.reason: str | None = "w: no values"
        operations = Operations.of(self.backend, **{operation: self._answer})  # type: ignore[arg-type]
        self.manager = SessionManager(self.backend, operations)
        pool = ThreadPoolExecutor(1)
        self.future: Future[Any] = pool.submit(self.manager.wait_for_session, "", None, limit, self.stop)
        pool.shutdown(wait=False)

    def _answer(self, session: object) -> Readiness:
        return Ready() if self.reason is None else NotReady(self.reason)

    def advance(self, until: float = float("inf"), step: float = 0.05) -> None:
        """Let time pass in small steps until the wait is over, or that much has passed."""
        while not self.future.done() and self.clock.monotonic() - self.began < until:
            try:
                self.clock.wait_for_sleepers(1, timeout=0.05)
            except TimeoutError:
                continue
            self.clock.advance(step)

    @property
    def waited(self) -> float:
        return self.clock.monotonic() - self.began


@pytest.mark.parametrize("operation", ["ready", "ready_for_local_init"])
def test_a_worker_goes_on_once_the_model_is_ready(operation: str) -> None:
    waiting = Waiting(60, operation)
    waiting.advance(until=5)
    assert not waiting.future.done()
    waiting.reason = None
    waiting.advance()
    assert waiting.future.result(10) is not None
    assert waiting.waited < 5 + 1.5
    assert "init" not in waiting.backend.log
    assert "load" not in waiting.backend.log
    assert "close" not in waiting.backend.log


def test_a_worker_notices_within_milliseconds_at_first() -> None:
    waiting = Waiting(60)
    waiting.clock.wait_for_sleepers(1)
    waiting.reason = None
    waiting.clock.advance(0.01)
    assert waiting.future.result(10) is not None


def test_a_worker_waits_no_longer_than_its_limit_and_says_for_what() -> None:
    waiting = Waiting(3)
    waiting.advance()
    with pytest.raises(ReadinessTimeoutError, match="waited 3 s for the chief's model: w: no values") as caught:
        waiting.future.result(10)
    assert isinstance(caught.value, TimeoutError)
    assert waiting.waited == pytest.approx(3, abs=0.06)
    assert waiting.backend.log[-1] == "close"


def test_a_worker_that_waits_says_so_now_and_then(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        waiting = Waiting(25)
        waiting.advance()
        assert waiting.future.exception(10) is not None
    said = [record.getMessage() for record in caplog.records if "waiting for the chief" in record.getMessage()]
    assert len(said) == 2
    assert "more seconds at most: w: no values" in said[0]


def test_a_stop_ends_the_wait() -> None:
    waiting = Waiting(7200)
    waiting.advance(until=2)
    waiting.stop.request_stop()
    with pytest.raises(SessionStateError, match="stopped while waiting for the chief's model: w: no values"):
        waiting.future.result(10)
    assert waiting.waited < 2.5
    assert waiting.backend.log[-1] == "close"


def test_a_wait_of_no_seconds_asks_once() -> None:
    waiting = Waiting(0)
    with pytest.raises(ReadinessTimeoutError, match="waited 0 s"):
        waiting.future.result(10)


# ---- which of several checkpoints is gone on from


@pytest.mark.parametrize(
    ("there", "expected"),
    [
        ("10+ 11- 12-", 10),
        ("10+ 11- 12- 13- 14-", 10),
        ("10+ 11- 12- 13- 14- 15-", 15),
        ("10+ 11-/10 12-/10", 10),
        ("10+ 11-/10 12-/10 13-/10", 13),
        ("10+ 11+ 12-/10 13-/10 14-/10", 11),
        ("11- 12-", 12),
        ("10+ 11- 12+", 12),
    ],
)
def test_one_that_may_mix_two_steps_is_passed_over_unless_too_much_were_lost(
    there: str, expected: int, tmp_path: Path
) -> None:
    """``12-/10`` is of step 12, was not taken at a boundary, and its run began at step 10."""
    store = DirectoryStore(tmp_path)
    with store.writing():
        for word in there.split():
            name, _, began = word.partition("/")
            step = int(name[:-1])
            session = (backend := ArrayBackend({"w": np.full(1, float(step))})).create_session()
            session.global_step = step
            draft = store.begin(CheckpointId(step))
            state = encode({"data": None, "events": [], "began": int(began or 0)}, "the run")
            files = write_snapshot(draft, backend.snapshot(session, Staging()), state).files
            draft.commit(
                Manifest(
                    step=step, backend="numpy", wall_time=0.0, parts=("model", "random"), files=files,
                    consistent=name.endswith("+"),
                )
            )  # fmt: skip
        w = np.zeros(1)
        manager = SessionManager(ArrayBackend({"w": w}), store=store)
        manager.prepare_session()
    assert w[0] == expected
    assert manager.recovery.restored == f"model.ckpt-{expected}"
    assert store.checkpoints()[-1].step == expected, "what was passed over is out of the way"


class PrunedMeanwhile(MemoryStore):
    """Between the listing and the opening of a checkpoint its writer commits the next one and removes this one."""

    def __init__(self, writer: MemoryStore, ahead: int) -> None:
        super().__init__(writer.place)
        self._writer = writer
        self._ahead = ahead

    def open(self, checkpoint: CheckpointId) -> CheckpointReader:
        if self._ahead:
            self._ahead -= 1
            commit_step(self._writer, checkpoint.step + 10)
            self._writer.remove(checkpoint)
        return super().open(checkpoint)


class Unopenable(MemoryStore):
    """Lists what it cannot open."""

    def open(self, checkpoint: CheckpointId) -> CheckpointReader:
        raise FileNotFoundError(f"no such file in {self.name_of(checkpoint)}")


def commit_step(store: MemoryStore, step: int) -> None:
    session = (backend := ArrayBackend({"w": np.full(1, float(step))})).create_session()
    session.global_step = step
    draft = store.begin(CheckpointId(step))
    state = encode({"data": None, "events": [], "began": 0}, "the run")
    files = write_snapshot(draft, backend.snapshot(session, Staging()), state).files
    draft.commit(Manifest(step=step, backend="numpy", wall_time=0.0, parts=("model", "random"), files=files))


@pytest.mark.parametrize("ahead", [1, 2, 3, 7])
def test_what_is_pruned_between_listing_and_opening_is_no_reason_to_begin_anew(ahead: int) -> None:
    writer = MemoryStore()
    w = np.zeros(1)
    with writer.writing():
        commit_step(writer, 10)
        manager = SessionManager(ArrayBackend({"w": w}), store=PrunedMeanwhile(writer, ahead))
        manager.prepare_session()
    assert w[0] == 10 + 10 * ahead
    assert "init" not in manager.recovery.ran


def test_what_is_listed_and_cannot_be_opened_is_an_error() -> None:
    writer = MemoryStore()
    with writer.writing():
        commit_step(writer, 10)
    manager = SessionManager(ArrayBackend({"w": np.zeros(1)}), store=Unopenable(writer.place))
    with pytest.raises(FileNotFoundError, match="no such file in step 10"):
        manager.prepare_session()
    assert "init" not in manager.recovery.ran
