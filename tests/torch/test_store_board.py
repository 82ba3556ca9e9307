"""What the board on a store of PyTorch makes of servers that die or freeze, and of what launchers set."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

distributed = pytest.importorskip("torch.distributed")

from supervise_torch import store_board  # noqa: E402
from supervise_torch.store_board import StoreBoard, store_from_environment  # noqa: E402

LONG = 60.0
SERVER = """
import sys, time
from torch.distributed import TCPStore
store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
print(store.port, flush=True)
sys.stdin.read()
"""


class Server:
    """A store in a process of its own."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        self.port = int(self.process.stdout.readline())

    def store(self) -> Any:
        return distributed.TCPStore("127.0.0.1", self.port, is_master=False, wait_for_workers=False)


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    try:
        yield server
    finally:
        with server.process:
            server.process.kill()


@pytest.fixture
def store() -> Any:
    return distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def calls(board: StoreBoard) -> list[Callable[[], Any]]:
    return [
        lambda: board.put("page", b""),
        lambda: board.get(["page"]),
        lambda: board.remove("page"),
        lambda: board.await_change("page", None, LONG),
        lambda: board.ring("page"),
        lambda: board.rung(LONG),
    ]


# ---- servers that are lost


def test_a_server_that_dies_is_a_lost_connection_for_who_waits_and_who_calls(server: Server) -> None:
    store = server.store()
    board = StoreBoard(store)
    other = StoreBoard(store)
    board.put("page", b"same")
    with ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(board.await_change, "page", b"same", LONG), pool.submit(other.rung, LONG)]
        time.sleep(0.3)
        assert not any(one.done() for one in waiting)
        server.process.kill()
        for one in waiting:
            with pytest.raises(ConnectionError):
                one.result(20)
    for call in (*calls(board), *calls(StoreBoard(store))):
        began = time.monotonic()
        with pytest.raises(ConnectionError, match=f"127.0.0.1:{server.port}"):
            call()
        assert time.monotonic() - began < 20
    board.close()
    other.close()


def test_a_server_that_freezes_is_a_lost_connection_in_seconds(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_board, "_LOOK_ANYWAY", 0.5)
    board = StoreBoard(server.store(), patience=1.0)
    board.put("page", b"same")
    with ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(board.await_change, "page", b"same", LONG), pool.submit(board.rung, LONG)]
        time.sleep(0.3)
        server.process.send_signal(signal.SIGSTOP)
        for one in waiting:
            with pytest.raises(ConnectionError):
                one.result(20)
    for call in calls(board):
        began = time.monotonic()
        with pytest.raises(ConnectionError, match="cannot be reached"):
            call()
        assert time.monotonic() - began < 20
    began = time.monotonic()
    board.close()
    assert time.monotonic() - began < 20


def test_a_server_that_was_frozen_can_be_used_again(server: Server) -> None:
    board = StoreBoard(server.store(), patience=3.0)
    board.put("page", b"before")
    server.process.send_signal(signal.SIGSTOP)
    with pytest.raises(ConnectionError, match="no answer in 3 s"):
        board.get(["page"])
    server.process.send_signal(signal.SIGCONT)
    assert board.get(["page"]) == [b"before"]
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(board.await_change, "page", b"before", LONG)
        time.sleep(0.2)
        StoreBoard(server.store()).put("page", b"after")
        assert waiting.result(20) == b"after"
    board.close()


# ---- connections of its own


def test_what_others_do_with_the_store_holds_nothing_up(server: Server) -> None:
    store = server.store()
    began = time.monotonic()

    def hold() -> None:
        with pytest.raises(RuntimeError):  # the store is locked for as long as this waits
            store.wait(["never"], timedelta(seconds=10))

    holding = threading.Thread(target=hold)
    holding.start()
    time.sleep(0.2)
    board = StoreBoard(store)
    board.put("page", b"content")
    assert board.get(["page"]) == [b"content"]
    board.close()
    assert holding.is_alive() or time.monotonic() - began > 10
    server.process.kill()
    holding.join()


def test_nothing_is_written_into_the_log(server: Server, capfd: pytest.CaptureFixture[str]) -> None:
    store = server.store()
    capfd.readouterr()
    board = StoreBoard(store)
    assert board.await_change("page", None, 0.3) is None
    assert board.rung(0.3) == set()
    with ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(board.await_change, "page", None, LONG), pool.submit(board.rung, LONG)]
        time.sleep(0.3)
        board.close()
        assert [one.result(20) for one in waiting] == [None, set()]
    assert capfd.readouterr() == ("", "")


def test_one_whose_wakers_died_before_they_woke_it_looks_anyway(store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_board, "_LOOK_ANYWAY", 0.3)
    board = StoreBoard(store, "board")
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(board.await_change, "page", None, LONG)
        time.sleep(0.1)
        store.set("board/page/page", "+content")
        assert waiting.result(20) == b"content"
    board.close()


def test_boards_of_other_prefixes_are_other_boards(store: Any) -> None:
    one, two = StoreBoard(store, "run/0"), StoreBoard(store, "run/1")
    one.put("page", b"1")
    one.ring("page")
    assert two.get(["page"]) == [None]
    assert two.rung(0) == set()
    one.close()
    two.close()


def test_a_store_that_cannot_append_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="use a TCPStore"):
        StoreBoard(distributed.FileStore(str(tmp_path / "store"), 1))


# ---- what is asked of the server


class CountingStore:
    """A store in this process that counts what is said to it."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self._store = distributed.HashStore()

    def clone(self) -> CountingStore:
        return self

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._store, name)

        def call(*arguments: Any) -> Any:
            self.calls[name] += 1
            return method(*arguments)

        return call


def test_a_put_says_as_much_with_many_who_wait_as_with_one() -> None:
    store: Any = CountingStore()
    chief = StoreBoard(store)
    chief.put("ready", b"0")
    said: dict[int, Counter[str]] = {}
    boards: list[StoreBoard] = []
    with ThreadPoolExecutor(16) as pool:
        for count in (1, 16):
            boards += [StoreBoard(store) for _ in range(count - len(boards))]
            [before] = chief.get(["ready"])
            waiting = [pool.submit(board.await_change, "ready", before, LONG) for board in boards]
            time.sleep(0.5)
            store.calls.clear()
            chief.put("ready", b"for %d" % count)
            said[count] = Counter(store.calls)
            assert {one.result(20) for one in waiting} == {b"for %d" % count}
    assert said[1]["set"] == said[16]["set"] == 1
    assert said[1]["multi_set"] == said[16]["multi_set"] == 1
    for board in (*boards, chief):
        board.close()


def test_a_page_that_nobody_waits_for_takes_two_messages() -> None:
    store: Any = CountingStore()
    board = StoreBoard(store)
    board.put("beat/1", b"1")
    store.calls.clear()
    board.put("beat/1", b"2")
    assert store.calls == {"set": 1, "check": 1}
    board.close()


def test_which_of_a_thousand_pages_are_there_takes_a_few_questions() -> None:
    store: Any = CountingStore()
    writer, reader = StoreBoard(store), StoreBoard(store)
    pages = [f"state/{number}" for number in range(1000)]
    assert reader.get(pages) == [None] * 1000
    for number in range(0, 1000, 3):
        writer.put(pages[number], b"%d" % number)
    writer.remove(pages[3])
    store.calls.clear()
    expected = [b"%d" % number if number % 3 == 0 and number != 3 else None for number in range(1000)]
    assert reader.get(pages) == expected
    assert sum(store.calls.values()) <= 4
    writer.close()
    reader.close()


# ---- the end of the process


def test_a_process_that_ends_while_threads_wait_ends_well(server: Server) -> None:
    program = f"""
import threading, time
from torch.distributed import TCPStore
from supervise_torch.store_board import StoreBoard
store = TCPStore("127.0.0.1", {server.port}, is_master=False, wait_for_workers=False)
board = StoreBoard(store)
threading.Thread(target=board.await_change, args=("page", None, 3600), daemon=True).start()
threading.Thread(target=board.rung, args=(3600,), daemon=True).start()
time.sleep(0.5)
print("end", flush=True)
"""
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "end\n"
        assert server.process.stdin is not None
        server.process.stdin.close()  # so that the server goes while the interpreter is on its way out
        _, errors = process.communicate(timeout=60)
        assert (process.returncode, errors) == (0, "")


# ---- the environment


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"MASTER_ADDR": None}, "MASTER_ADDR is not set"),
        ({"MASTER_PORT": None}, "MASTER_PORT is not set"),
        ({"MASTER_PORT": ""}, "MASTER_PORT is not set"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT='http' is not a number"),
        ({"MASTER_PORT": "65536"}, "MASTER_PORT='65536' is not a number from 0 to 65535"),
        ({"MASTER_PORT": "-1"}, "MASTER_PORT='-1' is not a number"),
        ({"RANK": None}, "RANK is not set"),
        ({"RANK": "first"}, "RANK='first' is not a number"),
    ],
)
def test_an_environment_without_a_store_says_what_is_missing(change: dict[str, str | None], said: str) -> None:
    environ = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500", "RANK": "1"} | change
    with pytest.raises(ValueError, match=said):
        store_from_environment({name: value for name, value in environ.items() if value is not None}, 0)


def test_a_server_that_is_not_there_in_time_is_named() -> None:
    port = free_port()
    environ = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": "1"}
    began = time.monotonic()
    with pytest.raises(ConnectionError, match=f"nobody keeps a store at 127.0.0.1:{port}") as caught:
        store_from_environment(environ, 0.5)
    assert time.monotonic() - began >= 0.5
    assert "rank 0" in str(caught.value)


def test_rank_0_keeps_the_server_and_the_others_wait_for_it() -> None:
    environ = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(store_from_environment, environ | {"RANK": "1"}, LONG)
        time.sleep(0.3)
        assert not other.done()
        store, prefix = store_from_environment(environ | {"RANK": "0"}, LONG)
        board, theirs = StoreBoard(store, prefix), StoreBoard(*other.result(LONG))
    board.put("ready", b"go")
    assert theirs.get(["ready"]) == [b"go"]
    again, _ = store_from_environment(environ | {"RANK": "0"}, LONG)  # the same server, as init_process_group has it
    assert StoreBoard(again, prefix).get(["ready"]) == [b"go"]
    board.close()
    theirs.close()


def test_the_server_of_the_agent_is_used_if_there_is_one(server: Server) -> None:
    environ = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(server.port),
        "RANK": "0",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RUN_ID": "some id",
    }
    store, prefix = store_from_environment(environ, LONG)
    assert prefix == "supervise/some id/all"
    board = StoreBoard(store, prefix)
    board.put("page", b"content")
    assert server.store().get("supervise/some id/all/page/page") == b"+content"
    board.close()


def test_each_attempt_of_one_agent_has_a_board_of_its_own(server: Server) -> None:
    environ = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(server.port),
        "RANK": "1",
        "TORCHELASTIC_RUN_ID": "id",
        "TORCHELASTIC_RESTART_COUNT": "3",
    }
    assert store_from_environment(environ | {"GROUP_WORLD_SIZE": "1"})[1] == "supervise/id/3"
    assert store_from_environment(environ | {"GROUP_WORLD_SIZE": "2"})[1] == "supervise/id/all"


def test_a_port_that_another_program_has_is_named() -> None:
    with socket.socket() as listener:
        listener.bind(("0.0.0.0", 0))
        listener.listen()
        port = listener.getsockname()[1]
        environ = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": "0"}
        with pytest.raises(ConnectionError, match=f"rank 0 cannot open the store of the run at 127.0.0.1:{port}"):
            store_from_environment(environ, 1)


RANK = """
import os, sys
from torch.distributed import init_process_group
from supervise_torch.store_board import StoreBoard, store_from_environment
rank, attempt, order = int(os.environ["RANK"]), int(os.environ["TORCHELASTIC_RESTART_COUNT"]), sys.argv[1]
if order == "after the group":
    init_process_group("gloo")
board = StoreBoard(*store_from_environment())
if order == "before the group":
    init_process_group("gloo")
if rank == 0:
    assert board.get(["ready", "beat/1"]) == [None, None], "the board of the attempt before"
    assert board.rung(60) == {"state/1"}
    board.put("ready", b"go %d" % attempt)
    assert board.await_change("beat/1", None, 60) == b"gone"
else:
    board.ring("state/1")
    assert board.await_change("ready", None, 60) == b"go %d" % attempt
    board.put("beat/1", b"gone")
if attempt == 0:
    sys.exit(7)
seen = f"done {rank} {attempt} {os.environ['TORCHELASTIC_USE_AGENT_STORE']}\\n"
os.write(1, seen.encode())  # in one piece, as the other rank writes there, too
board.close()
"""


@pytest.mark.parametrize(
    ("order", "agent_keeps_it"), [("alone", True), ("before the group", False), ("after the group", False)]
)
def test_under_torchrun(tmp_path: Path, order: str, agent_keeps_it: bool) -> None:
    program = tmp_path / "rank.py"
    program.write_text(RANK)
    command = [
        sys.executable, "-m", "torch.distributed.run",
        "--nproc-per-node=2", "--max-restarts=1", "--monitor-interval=0.1",
        "--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "--rdzv-id=some-run", str(program), order,
    ]  # fmt: skip
    environ = os.environ | {
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "0" if agent_keeps_it else "1",
    }
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False, env=environ)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == [f"done {rank} 1 {agent_keeps_it}" for rank in (0, 1)]
