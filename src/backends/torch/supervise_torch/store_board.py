"""A board on a ``torch.distributed`` store, such as the ``TCPStore`` that torchrun keeps for its workers.

Nobody polls. Each client that waits has a key of its own, ``wake/<client>``, and the server answers its ``store.wait``
when somebody sets that. Whoever changes a page sets the keys of those who asked to be woken for it, in one message: as
much work for each of them as the server's answer is, and none at all for a page that nobody waits for. One key for all
would do for waking, but then no client could leave its wait without waking every other one; and a wait that runs out by
itself is no way to leave it, since the store writes two lines into the log of the program each time.

Two more things about the stores of PyTorch shape what is here (all measured with PyTorch 2.13):

* A client of ``TCPStore`` is locked while it is in a call, and ``wait`` is a call: a ``set`` beside it takes as long as
  the wait does. So nothing is ever called on the store that was given; what waits and what calls have a connection
  each.
* ``timeout`` bounds the wait for a key, and not the wait for an answer. If the server's machine is gone or its process
  frozen, every call hangs for good. So each connection has a thread that speaks on it; a caller that has no answer
  within ``patience`` leaves it alone and raises.

Keys of pages are never deleted, because ``get`` of a key that is not there waits for it: a page that was taken down
says so by its first byte. Which pages there are stands in one growing list, so that it takes one question to know which
of a thousand have come. Rings are a list too, that ringers append to and the listener exchanges for an empty one.
"""

from __future__ import annotations

import atexit
import contextlib
import datetime
import os
import queue
import secrets
import socket
import threading
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any, Final, Protocol, TypeVar, cast
from weakref import WeakSet

from torch.distributed import DistStoreError, Store, TCPStore  # type: ignore[attr-defined]

from supervise_core.board import Board, check_page
from supervise_core.clock import Clock, SystemClock

_T = TypeVar("_T")
_PRESENT: Final = b"+"
_REMOVED: Final = b"-"
_FEW: Final = 8
_PAGES: Final = "pages"
_RINGS: Final = "rings"
_FOREVER: Final = datetime.timedelta(days=1)
_LOOK_ANYWAY: Final = 3.0
"""Seconds between two looks of one who waits: whoever should have woken it may have died just before."""
_GOODBYE: Final = 2.0
_RETRY: Final = 0.05
_ANSWER: Final = 10.0
"""Seconds in which a server that is there should answer."""


class _Connection(Protocol):
    """What is said to a store. The annotations of PyTorch know only a part of it, and not that contents are bytes."""

    def set(self, key: str, value: bytes, /) -> None: ...
    def append(self, key: str, value: str, /) -> None: ...
    def get(self, key: str, /) -> bytes: ...
    def multi_get(self, keys: list[str], /) -> list[bytes]: ...
    def multi_set(self, keys: list[str], values: list[str], /) -> None: ...
    def check(self, keys: list[str], /) -> bool: ...
    def compare_set(self, key: str, expected: str, value: str, /) -> bytes: ...
    def delete_key(self, key: str, /) -> bool: ...
    def wait(self, keys: list[str], timeout: datetime.timedelta, /) -> None: ...


class StoreBoard(Board):
    """Pages in a store, each under a key that begins with ``prefix``. The store itself is left to its owner."""

    def __init__(
        self, store: Store, prefix: str = "board", *, clock: Clock | None = None, patience: float = _ANSWER
    ) -> None:
        """
        :param patience: seconds that the server may take for an answer before it counts as lost.
        :raises ValueError: if the store cannot do what is needed; a ``TCPStore`` can.
        """
        anything: Any = store
        if not anything.has_extended_api():
            raise ValueError(
                f"a board needs a store that can append, and {type(store).__name__} cannot; use a TCPStore, or a "
                "FileMembership for a shared directory"
            )
        self._connect, self.location = _connections_to(store, patience)
        self._store = store  # which may be the server
        self._prefix = prefix
        self._patience = patience
        self._clock = clock or SystemClock()
        self._me = secrets.token_hex(4)
        self._lock = threading.Lock()
        self._line: _Line | None = None
        self._watch: _Watch | None = None
        self._closed = False
        self._waiting: set[threading.Event] = set()
        self._there: set[str] = set()
        self._told: set[str] = set()
        _open_boards.add(self)

    # ---- the port

    def put(self, page: str, content: bytes) -> None:
        check_page(page)
        self._call(lambda store: self._change(store, page, _PRESENT + content))

    def get(self, pages: Sequence[str]) -> list[bytes | None]:
        for page in pages:
            check_page(page)
        return self._call(lambda store: self._read(store, pages))

    def remove(self, page: str) -> None:
        check_page(page)

        def remove(store: _Connection) -> None:
            if self._find(store, [page]):
                self._change(store, page, _REMOVED)

        self._call(remove)

    def await_change(self, page: str, known: bytes | None, timeout: float) -> bytes | None:
        check_page(page)

        def look(store: _Connection) -> bytes | None:
            self._ask_to_be_woken(store, f"page/{page}", timeout)
            return self._read(store, [page])[0]

        return self._look_until(lambda content: content != known, look, timeout, known)

    def ring(self, page: str) -> None:
        check_page(page)

        def ring(store: _Connection) -> None:
            store.append(self._key(_RINGS), f"{page}\n")
            self._wake(store, _RINGS)

        self._call(ring)

    def rung(self, timeout: float) -> set[str]:
        def look(store: _Connection) -> set[str]:
            self._ask_to_be_woken(store, _RINGS, timeout)
            return self._take_rings(store)

        return self._look_until(bool, look, timeout, set())

    def close(self) -> None:
        with self._lock:
            self._closed = True
            line, watch = self._line, self._watch
            self._line = self._watch = None
        self._wake_threads()
        if watch is not None and watch.is_alive():
            watch.end()
            with contextlib.suppress(ConnectionError):
                line = line or _Line(self._connect)
                line.call(lambda store: self._say(store, self._key("wake", self._me)), min(_GOODBYE, self._patience))
            watch.join(_GOODBYE)
        if line is not None:
            line.close()

    # ---- what a call says to the store; all of it on one connection, so that it is done in this order

    def _key(self, *words: str) -> str:
        return "/".join((self._prefix, *words))

    def _change(self, store: _Connection, page: str, content: bytes) -> None:
        store.set(self._key("page", page), content)
        if page not in self._there:
            store.append(self._key(_PAGES), f"{page}\n")
            self._there.add(page)
        self._wake(store, f"page/{page}")

    def _wake(self, store: _Connection, what: str) -> None:
        """Wake whoever wants to know of it. That the store has answered means that it has done what came before."""
        waiting = self._key("waiting", what)
        if store.check([waiting]):
            clients = sorted(set(_lines(store.get(waiting))))
            keys = [self._key("wake", client) for client in clients]
            store.multi_set(keys, ["1"] * len(keys))

    def _say(self, store: _Connection, key: str) -> None:
        store.set(key, b"1")
        store.check([key])

    def _find(self, store: _Connection, pages: Iterable[str]) -> list[str]:
        """Those of the pages that are there or were once: only such keys can be asked for without waiting for them."""
        unknown = [page for page in pages if page not in self._there]
        if len(unknown) <= _FEW:
            self._there.update(page for page in unknown if store.check([self._key("page", page)]))
        elif store.check([self._key(_PAGES)]):
            self._there.update(_lines(store.get(self._key(_PAGES))))
        return [page for page in pages if page in self._there]

    def _read(self, store: _Connection, pages: Sequence[str]) -> list[bytes | None]:
        there = self._find(store, dict.fromkeys(pages))
        contents = store.multi_get([self._key("page", page) for page in there]) if there else []
        found = {
            page: content[1:] if content[:1] == _PRESENT else None
            for page, content in zip(there, contents, strict=True)
        }
        return [found.get(page) for page in pages]

    def _take_rings(self, store: _Connection) -> set[str]:
        rings = self._key(_RINGS)
        if not store.check([rings]):
            return set()
        said = store.get(rings)
        while said:
            now = store.compare_set(rings, said.decode("ascii"), "")
            if not now:
                break
            said = now  # somebody rang in between
        return set(_lines(said))

    def _ask_to_be_woken(self, store: _Connection, what: str, timeout: float) -> None:
        if timeout > 0 and what not in self._told:
            store.append(self._key("waiting", what), f"{self._me}\n")
            self._told.add(what)

    # ---- waiting

    def _look_until(
        self, is_enough: Callable[[_T], object], look: Callable[[_Connection], _T], timeout: float, otherwise: _T
    ) -> _T:
        deadline = self._clock.monotonic() + timeout
        with self._wakeable() as woken:
            self._check_open()
            while True:
                woken.clear()
                try:
                    watch = self._watching() if timeout > 0 else None
                    found = self._call(look)
                    if is_enough(found):
                        return found
                    left = deadline - self._clock.monotonic()
                    if watch is None or left <= 0:
                        return otherwise
                    self._clock.wait(woken, min(left, _LOOK_ANYWAY))
                    watch.check()
                except ConnectionError:
                    if not self._closed:
                        raise
                if self._closed:
                    return otherwise

    @contextmanager
    def _wakeable(self) -> Generator[threading.Event, None, None]:
        woken = threading.Event()
        with self._lock:
            self._waiting.add(woken)
        try:
            yield woken
        finally:
            with self._lock:
                self._waiting.discard(woken)

    def _wake_threads(self) -> None:
        with self._lock:
            for woken in self._waiting:
                woken.set()

    # ---- connections

    def _check_open(self) -> None:
        if self._closed:
            raise ConnectionError(f"the board in the {self.location} was closed")

    def _call(self, action: Callable[[_Connection], _T]) -> _T:
        with self._lock:
            self._check_open()
            if self._line is None or self._line.is_broken:
                self._line = _Line(self._connect)
                self._there.clear()
                self._told.clear()
            line = self._line
        try:
            return line.call(action, self._patience)
        except ConnectionError as error:
            raise ConnectionError(f"the {self.location} cannot be reached: {error}") from error

    def _watching(self) -> _Watch:
        with self._lock:
            self._check_open()
            if self._watch is None or not self._watch.is_alive():
                self._watch = _Watch(self._connect, self._key("wake", self._me), self._wake_threads)
                self._watch.start()
            return self._watch


class _Line:
    """A connection, and the thread that speaks on it, since what it says may never be answered."""

    def __init__(self, connect: Callable[[], _Connection]) -> None:
        self.is_broken = False
        self._connect = connect
        self._lock = threading.Lock()
        self._jobs: queue.SimpleQueue[tuple[Callable[[_Connection], Any], Future[Any]] | None] = queue.SimpleQueue()
        threading.Thread(target=self._run, name="supervise-store-calls", daemon=True).start()

    def call(self, action: Callable[[_Connection], _T], patience: float) -> _T:
        """What an action on this connection comes to.

        :raises ConnectionError: if it fails, or has not ended when ``patience`` has. The connection is given up then.
        """
        answer: Future[_T] = Future()
        with self._lock:
            if self.is_broken:
                raise ConnectionError("the connection was given up")
            self._jobs.put((action, answer))
        try:
            return answer.result(patience)
        except (RuntimeError, OSError) as error:
            self.close()
            reason = f"no answer in {patience:g} s" if isinstance(error, TimeoutError) else _first_line(error)
            raise ConnectionError(reason) from error

    def close(self) -> None:
        """Let go of the connection as soon as nobody speaks on it."""
        with self._lock:
            self.is_broken = True
            self._jobs.put(None)

    def _run(self) -> None:
        store = None
        while (job := self._jobs.get()) is not None:
            action, answer = job
            try:
                store = store or self._connect()
                result = action(store)
            except BaseException as error:
                answer.set_exception(error)
            else:
                answer.set_result(result)


class _Watch(threading.Thread):
    """A connection that waits for its key, again and again, and tells when somebody has set it."""

    def __init__(self, connect: Callable[[], _Connection], key: str, tell: Callable[[], None]) -> None:
        super().__init__(name="supervise-store-watch", daemon=True)
        self._connect = connect
        self._key = key
        self._tell = tell
        self._over = False
        self._error: Exception | None = None

    def end(self) -> None:
        """Be the last time that the key was waited for; somebody still has to set it."""
        self._over = True

    def check(self) -> None:
        """:raises ConnectionError: if the connection was lost."""
        if self._error is not None:
            raise ConnectionError(f"the connection on which it waits was lost: {_first_line(self._error)}")

    def run(self) -> None:
        """Wait, take the key away, tell. Whoever sets it after that has changed its page before the threads look."""
        try:
            store = self._connect()
            while not self._over:
                try:
                    store.wait([self._key], _FOREVER)
                except DistStoreError:
                    continue  # that was one day
                store.delete_key(self._key)
                self._tell()
        except (RuntimeError, OSError) as error:
            self._error = error
            self._tell()


_open_boards: WeakSet[StoreBoard] = WeakSet()


@atexit.register
def _close_all() -> None:
    """A thread that comes back from the store while the interpreter is on its way out would abort the process."""
    for board in list(_open_boards):
        board.close()


def store_from_environment(environ: Mapping[str, str] | None = None, timeout: float = 60.0) -> tuple[TCPStore, str]:
    """The store that the processes of this run have in common, and the prefix that they agree on.

    What torchrun sets is read: ``MASTER_ADDR`` and ``MASTER_PORT``; with ``TORCHELASTIC_USE_AGENT_STORE=True`` its
    agent keeps the server, for all attempts of the run, else the process of ``RANK`` 0 does, and shares it with
    ``init_process_group``. The prefix has ``TORCHELASTIC_RUN_ID`` in it, and where one agent started everybody
    (``GROUP_WORLD_SIZE=1``) ``TORCHELASTIC_RESTART_COUNT`` as well, so that each attempt begins on an empty board. The
    agents of several nodes count on their own, and do not agree (pytorch/pytorch#108158), so that there the pages of an
    earlier attempt are met again.

    :param timeout: seconds in which the server must be there.
    :raises ValueError: if a variable is not set, or makes no sense.
    :raises ConnectionError: if the server is not there in time.
    """
    environ = os.environ if environ is None else environ
    host, port = _variable(environ, "MASTER_ADDR"), _number(environ, "MASTER_PORT", 65_535)
    attempt = environ.get("TORCHELASTIC_RESTART_COUNT", "0") if environ.get("GROUP_WORLD_SIZE") == "1" else "all"
    prefix = "/".join(("supervise", environ.get("TORCHELASTIC_RUN_ID", "none"), attempt))
    if environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" and _number(environ, "RANK") == 0:
        try:
            server = TCPStore(host, port, is_master=True, wait_for_workers=False, multi_tenant=True)
        except RuntimeError as error:
            raise ConnectionError(
                f"rank 0 cannot open the store of the run at {host}:{port} (MASTER_ADDR, MASTER_PORT): "
                f"{_first_line(error)}"
            ) from error
        return server, prefix
    try:
        return _client(host, port, _ANSWER, timeout), prefix
    except (RuntimeError, OSError) as error:
        raise ConnectionError(
            f"nobody keeps a store at {host}:{port} (MASTER_ADDR, MASTER_PORT), or not within {timeout:g} s: "
            f"{_first_line(error)}. Start the program with torchrun, or see that rank 0 is running."
        ) from error


def _variable(environ: Mapping[str, str], name: str) -> str:
    if not (value := environ.get(name)):
        raise ValueError(f"{name} is not set, so there is no store to meet at. Start the program with torchrun.")
    return value


def _number(environ: Mapping[str, str], name: str, most: int | None = None) -> int:
    value = _variable(environ, name)
    if not value.isascii() or not value.isdigit() or (most is not None and int(value) > most):
        raise ValueError(f"{name}={value!r} is not a number" + ("" if most is None else f" from 0 to {most}"))
    return int(value)


def _connections_to(store: Store, patience: float) -> tuple[Callable[[], _Connection], str]:
    """What makes further connections to the same store, and what people call it."""
    if isinstance(store, TCPStore):
        host, port = store.host, store.port
        return lambda: cast(_Connection, _client(host, port, patience)), f"store at {host}:{port}"
    anything: Any = store
    if not hasattr(anything, "clone"):
        raise ValueError(
            f"this version of PyTorch has no second connection to a {type(store).__name__}; use a TCPStore"
        )
    return anything.clone, type(store).__name__


def _client(host: str, port: int, timeout: float, wait: float = 0.0) -> TCPStore:
    """A connection to a server that is there now, or within ``wait`` seconds.

    ``TCPStore`` would wait for it, too, but it fills the log with stacks while it does.
    """
    deadline = time.monotonic() + wait
    while True:
        left = deadline - time.monotonic()
        try:
            socket.create_connection((host, port), timeout=max(left, timeout)).close()
            break
        except ConnectionRefusedError:
            if left <= 0:
                raise
            time.sleep(min(_RETRY, left))
    return TCPStore(
        host, port, is_master=False, wait_for_workers=False, timeout=datetime.timedelta(seconds=max(1.0, timeout))
    )


def _lines(listing: bytes) -> list[str]:
    return listing.decode("ascii").split()


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0] or type(error).__name__
