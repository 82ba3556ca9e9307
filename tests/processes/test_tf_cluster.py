"""A TensorFlow cluster of real processes on loopback: what happens when a worker, the chief or a parameter server dies.

One parameter server keeps the model, a chief and two workers train it asynchronously through the drop-in, each under
``retry``. The model can tell whether it was begun anew: ``init_fn`` makes ``w`` -1000, and each step adds one to it.
"""

from __future__ import annotations

import random
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Final

import pytest

from .driving import Facts, Running
from .tf_driving import started

PROGRAM: Final = "tf_cluster.py"
LIMIT: Final = 60.0
"""Seconds for anything to happen; far more than it takes anywhere."""
WORKERS: Final = 2
TASKS: Final = ("ps", "chief", "worker 1", "worker 2")


class Task:
    """One task of the cluster, which is started again and again."""

    def __init__(self, name: str, command: list[str], stack: ExitStack) -> None:
        self.name = name
        self._command = command
        self._stack = stack
        self.lives: list[Running] = []

    def start(self, *further: str) -> None:
        self.lives.append(self._stack.enter_context(started(PROGRAM, *self._command, *further)))

    @property
    def now(self) -> Running:
        return self.lives[-1]

    def kill(self) -> None:
        self.now.signal(signal.SIGKILL, to_group=True)
        assert self.now.process.wait(LIMIT) == -signal.SIGKILL

    def hear(self, wanted: Callable[[Facts], bool], after: int = 0) -> Facts:
        """The first of what it said, from that line on, that is wanted; waits for it."""
        running = self.now

        def found() -> Facts | None:
            return next((facts for facts in running.said[after:] if wanted(facts)), None)

        with running._heard:
            running._heard.wait_for(lambda: found() or not running._listeners[0].is_alive(), LIMIT)
        facts = found()
        assert facts is not None, f"{self.name} said {running.said[-5:]}, and\n{''.join(running.errors[-60:])}"
        return facts

    def begin(self, after: int = 0) -> Facts:
        return self.hear(lambda facts: "begin" in facts, after)

    def steps_on(self) -> int:
        """Waits until it has trained on from here; the step."""
        said = len(self.now.said)
        return int(self.hear(lambda facts: "step" in facts, said + 1)["step"])

    def has_lost_peers(self) -> bool:
        return any("lost" in facts for facts in self.now.said)

    def end(self) -> Facts:
        """Its last word, after it ended well."""
        outcome = self.now.end(LIMIT)
        assert outcome.status == 0, f"{self.name} ended with {outcome.status}:\n{outcome.errors[-4000:]}"
        assert outcome.done is not None
        return outcome.done


@contextmanager
def cluster(logdir: Path, *options: str) -> Iterator[dict[str, Task]]:
    """The tasks by name, none of them started. All are killed in the end, whatever happens."""
    with ExitStack() as stack:
        addresses = [free_address() for _ in range(2 + WORKERS)]
        common = ["--ps", addresses[0], "--workers", ",".join(addresses[1:]), "--logdir", str(logdir), *options]
        yield {
            name: Task(name, ["ps" if name == "ps" else "worker", str(max(0, index - 1)), *common], stack)
            for index, name in enumerate(TASKS)
        }


def free_address() -> str:
    """One that the system gives to nobody who asks for any port: a server that ends there can come back."""
    lowest_given = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    while True:
        port = random.SystemRandom().randrange(lowest_given // 2, lowest_given)
        with socket.socket() as tried:
            try:
                tried.bind(("127.0.0.1", port))
            except OSError:
                continue
            return f"127.0.0.1:{port}"


def saved_steps(logdir: Path) -> list[int]:
    return sorted(int(index.stem.rpartition("-")[2]) for index in logdir.glob("model.ckpt-*.index"))


def is_of_its_step(begin: Facts) -> bool:
    """Whether the model was initialised once and never again: but for what others do meanwhile, ``w`` is step - 1000.

    A worker reads ``w`` first and the step after it, and others go on between; so the step may be ahead.
    """
    return begin["least"] <= begin["begin"] - 1000 + WORKERS + 1 and begin["least"] > begin["begin"] - 1000 - 200


@pytest.mark.campaign(small=1, soak=10)
@pytest.mark.timeout(1200)
def test_a_cluster_goes_on_after_the_death_of_any_task(tmp_path: Path, count: int, seed: int) -> None:
    """A worker, the chief and the parameter server are killed in turn, each at a random moment while all train."""
    chance = random.Random(seed)
    with cluster(tmp_path) as tasks:
        for name in chance.sample(TASKS, len(TASKS)):
            tasks[name].start()
        trainers = [tasks[name] for name in TASKS[1:]]
        for task in trainers:
            assert task.begin()["least"] >= -1000
        for round_ in range(count):
            time.sleep(chance.uniform(0, 0.7))
            kill_a_worker(tasks, f"worker {1 + round_ % WORKERS}")
            time.sleep(chance.uniform(0, 0.7))
            kill_the_chief(tasks, tmp_path, wait=chance.uniform(0, 1.0))
            time.sleep(chance.uniform(0, 0.7))
            kill_the_parameter_server(tasks, tmp_path, wait=chance.uniform(0, 1.0))


def kill_a_worker(tasks: dict[str, Task], name: str) -> None:
    """It comes back, finds the model ready, and goes on; the others never stop."""
    others = [task for task in tasks.values() if task.name not in (name, "ps")]
    lives = [(len(task.lives), len(task.now.said)) for task in others]
    step = tasks[name].steps_on()
    tasks[name].kill()
    for task in others:
        assert task.steps_on() >= step - WORKERS - 1
    tasks[name].start()
    begin = tasks[name].begin()
    assert begin["begin"] >= step
    assert is_of_its_step(begin)
    tasks[name].steps_on()
    for task, (life, said) in zip(others, lives, strict=True):
        assert len(task.lives) == life
        assert not any("lost" in facts or "begin" in facts for facts in task.now.said[said:]), task.now.said[said:]


def kill_the_chief(tasks: dict[str, Task], logdir: Path, wait: float) -> None:
    """The workers go on without it; it comes back, takes its log directory over, and goes on from where they are."""
    chief, workers = tasks["chief"], [tasks["worker 1"], tasks["worker 2"]]
    said = [len(task.now.said) for task in workers]
    chief.steps_on()
    chief.kill()
    saved = saved_steps(logdir)[-1]
    time.sleep(wait)
    step = max(task.steps_on() for task in workers)
    chief.start()
    begin = chief.begin()
    assert begin["begin"] >= step > saved
    assert begin["restored"] is None
    assert is_of_its_step(begin)
    assert not any("init" in facts for facts in chief.now.said)
    assert chief.steps_on() >= step
    for task, before in zip(workers, said, strict=True):
        task.steps_on()
        assert not any("lost" in facts or "begin" in facts for facts in task.now.said[before:]), task.now.said[before:]
    wait_until(lambda: saved_steps(logdir)[-1] > step, "a checkpoint of the new chief")


def kill_the_parameter_server(tasks: dict[str, Task], logdir: Path, wait: float) -> None:
    """The model is gone. The chief restores the newest checkpoint, and the workers go on when it has."""
    trainers = [tasks[name] for name in TASKS[1:]]
    said = [len(task.now.said) for task in trainers]
    pids = [task.now.process.pid for task in trainers]
    tasks["ps"].kill()
    for task, before in zip(trainers, said, strict=True):
        task.hear(lambda facts: "lost" in facts, before)
    newest = saved_steps(logdir)[-1]
    time.sleep(wait)
    tasks["ps"].start()
    chief = tasks["chief"]
    begin = chief.hear(lambda facts: "begin" in facts, said[0])
    assert begin["restored"] == f"model.ckpt-{newest}"
    assert begin["begin"] >= newest
    for task, before in zip(trainers, said, strict=True):
        begin = task.hear(lambda facts: "begin" in facts, before)
        assert begin["begin"] >= newest
        assert is_of_its_step(begin)
        task.steps_on()
    assert [task.now.process.pid for task in trainers] == pids
    wait_until(lambda: saved_steps(logdir)[-1] > newest, "a checkpoint after the recovery")


def catches(pid: int, number: signal.Signals) -> bool:
    """Whether that process has a handler for that signal."""
    status = Path(f"/proc/{pid}/status").read_text()
    caught = next(line.split()[1] for line in status.splitlines() if line.startswith("SigCgt"))
    return bool(int(caught, 16) >> (number - 1) & 1)


def wait_until(happened: Callable[[], Any], what: str) -> None:
    deadline = time.monotonic() + LIMIT
    while not happened():
        assert time.monotonic() < deadline, f"waited {LIMIT:g} s for {what}"
        time.sleep(0.02)


@pytest.mark.campaign(small=1, soak=10)
@pytest.mark.timeout(1200)
def test_the_chief_finishes_first(tmp_path: Path, count: int, seed: int) -> None:
    """The workers stand still while it comes to the last step and ends; then they end, too, and the last is saved."""
    chance = random.Random(seed)
    for round_ in range(count):
        logdir = tmp_path / str(round_)
        last = chance.randint(60, 200)
        with cluster(logdir, f"--steps={last}") as tasks:
            for name in chance.sample(TASKS, len(TASKS)):
                tasks[name].start()
            for task in list(tasks.values())[1:]:
                task.begin()
            stopped = chance.sample(["worker 1", "worker 2"], chance.randint(1, 2))
            for name in stopped:
                tasks[name].now.signal(signal.SIGSTOP)
            done = tasks["chief"].end()
            assert done["done"] >= last
            assert done["final_save"] == f"step {done['done']}"
            assert saved_steps(logdir)[-1] == done["done"]
            for name in stopped:
                tasks[name].now.signal(signal.SIGCONT)
            late = tasks["worker 1"]
            late_steps = late.end()["done"], tasks["worker 2"].end()["done"]
            assert min(late_steps) >= last
            late.start()  # one that comes when the chief has gone
            assert late.begin()["begin"] >= last
            late.end()


@pytest.mark.campaign(small=1, soak=10)
@pytest.mark.timeout(1200)
def test_a_chief_that_dies_while_it_initialises(tmp_path: Path, count: int, seed: int) -> None:
    """All variables have values by then, but ``init_fn`` has not ended: no worker goes on, and the next chief begins
    anew."""
    chance = random.Random(seed)
    for round_ in range(count):
        with cluster(tmp_path / str(round_)) as tasks:
            for name in ("ps", "worker 1", "chief"):
                tasks[name].start(*(["--init-takes=600"] if name == "chief" else []))
            tasks["chief"].hear(lambda facts: "initialising" in facts)
            time.sleep(chance.uniform(0, 1.0))
            assert not any("begin" in facts for facts in tasks["worker 1"].now.said)
            tasks["chief"].kill()
            tasks["chief"].start()
            assert tasks["chief"].hear(lambda facts: "init" in facts)["init"] == 1
            for name in ("chief", "worker 1"):
                assert is_of_its_step(tasks[name].begin())
                tasks[name].steps_on()


def test_a_signal_ends_the_wait_for_a_parameter_server(tmp_path: Path) -> None:
    with cluster(tmp_path) as tasks:
        waiting = [tasks["chief"], tasks["worker 1"]]
        for task in waiting:
            task.start()
        for task in waiting:
            wait_until(lambda pid=task.now.process.pid: catches(pid, signal.SIGTERM), "the opening of a session")
            time.sleep(0.5)
            task.now.signal(signal.SIGTERM)
        for task in waiting:
            outcome = task.now.end(LIMIT)
            assert outcome.status == 128 + signal.SIGTERM, outcome.errors
    assert saved_steps(tmp_path) == []


def test_processes_end_when_their_parameter_server_is_gone_for_good(tmp_path: Path) -> None:
    """TensorFlow would wait for it when their sessions are closed."""
    with cluster(tmp_path, "--once") as tasks:
        for name in TASKS:
            tasks[name].start()
        trainers = [tasks[name] for name in TASKS[1:]]
        for task in trainers:
            task.begin()
            task.steps_on()
        tasks["ps"].kill()
        for task in trainers:
            outcome = task.now.end(LIMIT)
            assert outcome.status == 1
            assert any("lost" in facts for facts in outcome.said), outcome.errors
