"""Who takes part in a run: the port, the run of one process, and runs that meet on a board."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from numbers import Integral

from supervise_core.agreement import StepAgreement
from supervise_core.board import Board
from supervise_core.chief import Chief
from supervise_core.clock import Clock
from supervise_core.file_board import FileBoard
from supervise_core.host import Host
from supervise_core.member import Hearing, Member, Patience, Roll
from supervise_core.worker import Worker


class Membership(ABC):
    """This process's place among those of one run. Rank 0 is the chief.

    The chief makes the model ready, saves and writes summaries. The others go on as soon as it has announced that, with
    the same checkpoint. A stop that is asked for anywhere reaches all of them.

    *Synchronous* members make every step together, as ``DistributedDataParallel`` does: they stop after the same step,
    each adds its own state (random numbers, data position, shards) to the checkpoints of all, and the failure of one is
    that of all. Others train on their own: a worker that dies may be started again, and the rest goes on.
    """

    def __init__(
        self,
        rank: int,
        size: int | None,
        *,
        synchronous: bool,
        patience: Patience | None = None,
        host: Host | None = None,
    ) -> None:
        """
        :raises ValueError: if there can be no such place.
        """
        check_place(rank, size)
        if synchronous and size is None:
            raise ValueError("members that train in step must know how many they are; pass size=")
        self.roll = Roll(int(rank), None if size is None else int(size), synchronous)
        self.patience = patience or Patience()
        self._host = host or Host()

    @property
    def rank(self) -> int:
        return self.roll.rank

    @property
    def size(self) -> int | None:
        """How many take part; None if that is not known."""
        return self.roll.size

    @property
    def is_chief(self) -> bool:
        return self.roll.is_chief

    @property
    def is_synchronous(self) -> bool:
        return self.roll.is_synchronous

    @abstractmethod
    def connect(self, clock: Clock) -> Board:
        """The board on which the members of the run meet; closed by the one who asked for it.

        :raises ConnectionError: if it cannot be reached.
        """

    def record_failure(self, error: BaseException) -> None:
        """Leave the error that ended this process where its launcher looks for it, if there is such a place."""
        return None

    def join(self, agreement: StepAgreement, hearing: Hearing, clock: Clock) -> Member | None:
        """Take part in a run from now on; None where there is nobody else.

        :raises MembershipError: if another process that lives has this rank already.
        :raises ConnectionError: if the place where the members meet cannot be reached.
        """
        if self.roll.size == 1:
            return None
        kind = Chief if self.is_chief else Worker
        board = self.connect(clock)
        member = kind(self.roll, board, agreement, hearing, self.patience, clock, self._host)
        try:
            member.join()
        except BaseException:
            board.close()
            raise
        return member


class LocalMembership(Membership):
    """A run of one process."""

    def __init__(self) -> None:
        super().__init__(0, 1, synchronous=False)

    def connect(self, clock: Clock) -> Board:
        raise NotImplementedError("a run of one process has no board")


class FileMembership(Membership):
    """Members that meet in a directory which all of them see, by plain files; also on a network file system."""

    def __init__(
        self,
        directory: str | os.PathLike[str],
        rank: int,
        size: int | None = None,
        *,
        synchronous: bool = False,
        patience: Patience | None = None,
        host: Host | None = None,
    ) -> None:
        """
        :param directory: a place for this run alone; made if it is not there. The log directory will do.
        :param rank: this process's number; the chief's is 0.
        :param size: how many take part; needed only if they train in step.
        :param synchronous: whether they make every step together.
        :raises ValueError: if there can be no such place.
        """
        super().__init__(rank, size, synchronous=synchronous, patience=patience, host=host)
        self.directory = os.fspath(directory)

    def connect(self, clock: Clock) -> Board:
        return FileBoard(os.path.join(self.directory, ".members"), clock=clock)


def check_place(rank: object, size: object) -> None:
    """
    :raises TypeError: if these are no whole numbers.
    :raises ValueError: if there is no such rank among so many.
    """
    for name, value in (("rank", rank), ("size", size)):
        if isinstance(value, bool) or not isinstance(value, Integral | None):
            raise TypeError(f"{name}= takes a whole number, not {value!r}")
    if not isinstance(rank, Integral) or int(rank) < 0:
        raise ValueError(f"rank= is a number from 0 on, not {rank!r}")
    if isinstance(size, Integral) and not int(rank) < int(size):
        raise ValueError(f"there is no rank {rank} among {size}; ranks are 0 to {int(size) - 1}")
