"""Members that meet in the store of PyTorch's own launcher."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch.distributed as dist
from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]
from torch.distributed.elastic.multiprocessing.errors import ErrorHandler

from supervise_core.board import Board
from supervise_core.clock import Clock
from supervise_core.host import Host
from supervise_core.member import Patience
from supervise_core.membership import Membership
from supervise_torch.store_board import StoreBoard, store_from_environment

_ERROR_FILE = "TORCHELASTIC_ERROR_FILE"


class StoreMembership(Membership):
    """Members that meet in a ``TCPStore``; under torchrun, ``StoreMembership.from_environment()``."""

    def __init__(
        self,
        store: Store,
        rank: int,
        size: int,
        *,
        prefix: str = "supervise",
        synchronous: bool = True,
        patience: Patience | None = None,
        error_file: str | None = None,
        host: Host | None = None,
    ) -> None:
        """
        :param store: one that all of them are connected to; it is left to its owner.
        :param rank: this process's number; the chief's is 0.
        :param size: how many take part.
        :param prefix: what the keys in the store begin with; another one for each run.
        :param synchronous: whether they make every step together.
        :param error_file: where an error that ends this process is written for the launcher, as torchrun reads it.
        :raises ValueError: if there can be no such place, or the store cannot do what is needed.
        """
        super().__init__(rank, size, synchronous=synchronous, patience=patience, host=host)
        self._store = store
        self._prefix = prefix
        self._error_file = error_file

    @classmethod
    def from_environment(
        cls,
        environ: Mapping[str, str] | None = None,
        *,
        synchronous: bool = True,
        patience: Patience | None = None,
        timeout: float = 60.0,
    ) -> StoreMembership:
        """This process's place as torchrun tells it, in ``RANK`` and ``WORLD_SIZE``; see ``store_from_environment``.

        :param timeout: seconds in which the store must be there.
        :raises ValueError: if a variable is not set, or makes no sense.
        :raises ConnectionError: if the store is not there in time.
        """
        known = os.environ if environ is None else environ
        rank, size = (_number(known, name) for name in ("RANK", "WORLD_SIZE"))
        store, prefix = store_from_environment(known, timeout)
        return cls(
            store, rank, size,
            prefix=prefix, synchronous=synchronous, patience=patience, error_file=known.get(_ERROR_FILE),
        )  # fmt: skip

    def connect(self, clock: Clock) -> Board:
        return StoreBoard(self._store, self._prefix, clock=clock, patience=self.patience.silence / 2)

    def record_failure(self, error: BaseException) -> None:
        if self._error_file is not None and os.environ.get(_ERROR_FILE) == self._error_file:
            _record(error)


def _record(error: BaseException) -> None:
    """Have PyTorch write the error to the file that the variable names.

    With it goes the traceback of the error that is being handled at the time, so this one has to be that.
    """
    trace, context = error.__traceback__, error.__context__
    try:
        raise error
    except BaseException:
        ErrorHandler().record_exception(error)
    finally:
        error.__traceback__, error.__context__ = trace, context


def init_process_group(backend: str | None = None, **options: Any) -> None:
    """As PyTorch's own, with the rank, size and store that torchrun tells of; also when torchrun starts ranks again.

    torchrun keeps one store for all attempts, and PyTorch 2.13 looks there for its peers by the same names in each. So
    ranks that were started again find the addresses of dead ones, and fail, or wait until they do. Here each attempt
    has names of its own.

    :raises ValueError: if a variable is not set, or makes no sense.
    :raises ConnectionError: if the store is not there in time.
    """
    rank, size = (_number(os.environ, name) for name in ("RANK", "WORLD_SIZE"))
    store, prefix = store_from_environment()
    own = PrefixStore(f"{prefix}/process group", store)
    dist.init_process_group(backend, store=own, rank=rank, world_size=size, **options)


def _number(environ: Mapping[str, str], name: str) -> int:
    value = environ.get(name, "")
    if not value.isdigit():
        raise ValueError(f"{name} is {value!r} and should be a number. Start the program with torchrun.")
    return int(value)
