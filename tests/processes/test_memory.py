"""Memory, measured in processes of their own: a restore needs no second copy of the state, a save one, and none grows.

This file is also the program that is measured: ``python test_memory.py <what> <framework> <log directory>``.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest

from supervise_core import DirectoryStore, EverySteps, KeepLatest, Supervisor
from supervise_core.session_manager import SessionManager
from supervise_core.testing.disks import HastyDisk

FRAMEWORKS = ["numpy", "torch"]
MIB: Final = 1 << 20
STATE: Final = 256 * MIB
BESIDES: Final = 64 * MIB
"""What saving and restoring may take beside the state and its one copy."""


def measured(what: str, framework: str, logdir: Path) -> dict[str, Any]:
    """What the program says of itself, in bytes."""
    if framework == "torch":
        pytest.importorskip("torch", reason="PyTorch is not installed")
    command = [sys.executable, __file__, what, framework, str(logdir)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    if found.get("peak") is None and "peak" in found:
        pytest.skip("the kernel does not forget the peak of this process")
    print(
        what,
        framework,
        {name: value // MIB if isinstance(value, int) and value > MIB else value for name, value in found.items()},
    )
    return found


Saved = Callable[[str], tuple[Path, dict[str, Any]]]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """The log directory of a program that has saved, one for each framework, and what that took."""
    known: dict[str, tuple[Path, dict[str, Any]]] = {}

    def of(framework: str) -> tuple[Path, dict[str, Any]]:
        if framework not in known:
            logdir = tmp_path_factory.mktemp("saved") / framework
            known[framework] = logdir, measured("save", framework, logdir)
        return known[framework]

    return of


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_save_makes_one_copy(framework: str, saved: Saved) -> None:
    _, found = saved(framework)
    assert found["state"] > 0.9 * STATE
    assert found["saves"] == 3
    assert 0.9 * found["state"] <= found["peak"] <= 1.05 * found["state"] + BESIDES


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_restore_makes_no_second_copy(framework: str, saved: Saved) -> None:
    logdir, before = saved(framework)
    found = measured("restore", framework, logdir)
    assert found["hash"] == before["hash"]
    assert found["peak"] <= BESIDES


def test_an_optimizer_without_state_gets_its_state_and_no_more(saved: Saved) -> None:
    logdir, before = saved("torch")
    found = measured("restore fresh", "torch", logdir)
    assert found["hash"] == before["hash"]
    assert found["new"] > 0.6 * STATE
    assert 0.9 * found["new"] <= found["peak"] <= found["new"] + BESIDES


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_without_staging_a_save_makes_no_copy(framework: str, saved: Saved, tmp_path: Path) -> None:
    found = measured("save without staging", framework, tmp_path / "logs")
    assert found["saves"] == 3
    assert found["peak"] <= BESIDES
    assert found["restored"] == found["hash"] == saved(framework)[1]["hash"], "the same program saves the same"


@pytest.mark.parametrize(
    ("framework", "what"),
    [
        ("numpy", "many saves"),
        ("numpy", "many saves without staging"),
        ("numpy", "many restores"),
        ("torch", "many saves"),
        ("torch", "many restores"),
    ],
)
def test_nothing_grows(framework: str, what: str, tmp_path: Path) -> None:
    found = measured(what, framework, tmp_path / "logs")
    assert found["rounds"] == (60 if what == "many restores" else 200)
    assert found["growth"] <= 4 * MIB
    assert found["descriptors"] <= 0
    assert found["threads"] <= 0


# ---- the program


class State:
    """So many bytes of state in one framework's tensors."""

    def __init__(self, framework: str, nbytes: int, trained: bool = True) -> None:
        self.arrays: list[Any] = []
        self._round = 0
        if framework == "numpy":
            from supervise_numpy import ArrayBackend

            sizes = [nbytes // 2, nbytes // 4, *[nbytes // 64] * 16]
            arrays = {f"w{number}": np.ones(size // 8) for number, size in enumerate(sizes)}
            self.arrays = list(arrays.values())
            self.backend: Any = ArrayBackend(arrays)
        else:
            import torch

            from supervise_torch import TorchBackend

            side = 1024 if nbytes > 64 * MIB else 256
            layers = nbytes // 3 // (4 * side * side)
            self.model = torch.nn.Sequential(*[torch.nn.Linear(side, side, bias=False) for _ in range(layers)])
            self.optimizer = torch.optim.Adam(self.model.parameters(), foreach=False)
            if trained:
                for parameter in self.model.parameters():
                    self.optimizer.state[parameter] = {
                        "step": torch.tensor(1.0),
                        "exp_avg": torch.full_like(parameter, 0.5),
                        "exp_avg_sq": torch.full_like(parameter, 0.25),
                    }
            self.backend = TorchBackend(model=self.model, optimizer=self.optimizer, global_step=lambda: self._round)
            self.arrays = self._numpy_views()

    def _numpy_views(self) -> list[Any]:
        tensors = list(self.model.parameters())
        tensors += [entry[name] for entry in self.optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
        return [tensor.detach().numpy().reshape(-1) for tensor in tensors]

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.arrays)

    def change(self, session: Any) -> None:
        """All but a quarter of the arrays, in place and without further memory, the same in each program."""
        self._round += 1
        for number, array in enumerate(self.arrays):
            if (number + self._round) % 4:
                array *= 0.75
                array[:: array.size // 7] += number
        if not hasattr(self, "model"):
            session.global_step += 1

    def wipe(self) -> None:
        for number, array in enumerate(self.arrays):
            array.fill(number % 3)

    def hash(self) -> str:
        import xxhash

        digest = xxhash.xxh3_128()
        for array in self.arrays if not hasattr(self, "model") else self._numpy_views():
            digest.update(array)
        return digest.hexdigest()


def resident() -> int:
    return _status("VmRSS")


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"no {name}")


def peak_of(act: Callable[[], object]) -> int | None:
    """How far the resident memory rises above what it is now; None if the kernel cannot tell."""
    gc.collect()
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    before = resident()
    act()
    return _status("VmHWM") - before


def train(
    state: State, logdir: Path, saves: int, each: Callable[[int], object] = lambda save: None, **more: Any
) -> None:
    """A run in which each step is saved."""
    supervisor = Supervisor(
        state.backend, logdir, save_every=EverySteps(1), keep=KeepLatest(2), summarize_every=None, signals=False, **more
    )
    with supervisor.managed_session() as session:
        wait_for(supervisor, 1)
        for save in range(2, saves + 1):
            assert not supervisor.should_stop()
            state.change(session)
            assert not supervisor.should_stop()
            wait_for(supervisor, save)
            each(save)
        supervisor.request_stop()
    assert supervisor.report.failed_saves == 0


def wait_for(supervisor: Any, saves: int) -> None:
    deadline = time.monotonic() + 60
    while supervisor.report.saves < saves:
        assert time.monotonic() < deadline, f"{supervisor.report.saves} saves instead of {saves}"
        time.sleep(0.001)


def restore(state: State, logdir: Path) -> None:
    """As a reader does, without the memory that saves need."""
    manager = SessionManager(state.backend, store=DirectoryStore(logdir))
    session = manager.prepare_session()
    assert manager.recovery.restored is not None
    state.backend.close_session(session)


def warm_up(framework: str, logdir: Path, **more: Any) -> None:
    """Have everything imported and started that takes memory once."""
    small = State(framework, MIB)
    train(small, logdir, 3, **more)
    restore(small, logdir)


def measure(what: str, framework: str, logdir: Path) -> dict[str, Any]:
    more: dict[str, Any] = {"staging": "none"} if what.endswith("without staging") else {}
    warm_up(framework, logdir.parent / f"{logdir.name} before {what}", **more)
    if what.startswith("many"):
        return growth(what, framework, logdir, more)
    state = State(framework, STATE, trained=what != "restore fresh")
    if what.startswith("save"):
        state.wipe()
        peak = peak_of(lambda: train(state, logdir, 3, **more))
        found = {"state": state.nbytes, "peak": peak, "saves": 3, "hash": state.hash()}
        state.wipe()
        restore(state, logdir)
        return found | {"restored": state.hash()}
    before = state.nbytes
    peak = peak_of(lambda: restore(state, logdir))
    if framework == "torch":
        state.arrays = state._numpy_views()
    return {"state": state.nbytes, "new": state.nbytes - before, "peak": peak, "hash": state.hash()}


def least_in_use() -> tuple[int, int]:
    """Open files and threads, when the writer's thread has none open just then for what it removes."""
    found: list[tuple[int, int]] = []
    for _ in range(20):
        found.append((len(os.listdir("/proc/self/fd")), threading.active_count()))
        time.sleep(0.005)
    return min(files for files, _ in found), min(threads for _, threads in found)


def growth(what: str, framework: str, logdir: Path, more: dict[str, Any]) -> dict[str, Any]:
    """What there is at the end of many rounds that was not there after the first few."""
    state = State(framework, 16 * MIB if framework == "numpy" else 4 * MIB)  # so small a one is quick
    rounds = 60 if what == "many restores" else 200
    marks: list[tuple[int, int, int]] = []

    def note(number: int) -> None:
        if number in (20, rounds):
            gc.collect()
            marks.append((resident(), *least_in_use()))

    if what.startswith("many saves"):
        train(state, logdir, rounds, note, store=DirectoryStore(logdir, disk=HastyDisk()), **more)
    else:
        train(state, logdir, 2)
        for number in range(1, rounds + 1):
            state.wipe()
            restore(state, logdir)
            note(number)
    names = ("growth", "descriptors", "threads")
    return {name: after - before for name, before, after in zip(names, *marks, strict=True)} | {"rounds": rounds}


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1], sys.argv[2], Path(sys.argv[3]))))
