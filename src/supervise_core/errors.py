"""Every error that supervise-core raises on its own account.

* SuperviseError
    * SessionStateError (RuntimeError): a call at the wrong moment (no session open, one open already)
    * NotReadyError (RuntimeError): the model is not ready; says what is not ready
        * ReadinessTimeoutError (TimeoutError): the wait for a ready model ran out
            * ChiefNeverCameError: no chief was ever seen; says where it was looked for
    * PolicyError (ValueError): a trigger or a retention rule that could never work
    * UnsupportedStateError (TypeError): a value that no checkpoint can keep; names part and path
    * DataPositionError (ValueError): the data does not fit the position saved for it
    * CheckpointError
        * CheckpointNotFoundError (FileNotFoundError): no checkpoint where one was required
        * CheckpointDamagedError (ValueError): wrong size, hash or format; names checkpoint and reason
        * AllCheckpointsDamagedError: none is good, one or more were set aside; names each
        * IncompatibleCheckpointError (ValueError): good, but made by another model
    * LeaseError
        * LeaseHeldError (BlockingIOError): another writer holds the log directory; says which
        * LeaseLostError: this writer was replaced and may not write any more
    * MembershipError: what goes wrong between the processes of one run
        * ChiefLostError (ConnectionError): the chief died, or does not answer any more
        * ChiefFinishedError: the chief has ended its run, so nobody makes a model ready
        * MemberLostError (ConnectionError): another process of the run died, or does not answer; says which
        * MemberFailedError: another process of the run failed; says which, and with what
        * SaveNotWantedError: the chief takes no checkpoint of a step, or gave it up; says why
        * DisagreementError (ValueError): processes that train together have different data, or counts; says which
    * StragglersError (RuntimeError): threads that did not stop within the grace period
    * UnknownBackendError (LookupError): no backend of that name; lists the known ones
    * BackendNotInstalledError (ImportError): known, but its framework is missing; says what to type

An I/O error of a save or a restore is raised as the operating system's own ``OSError``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping


class SuperviseError(Exception):
    """Base of all errors of supervise-core."""


class SessionStateError(SuperviseError, RuntimeError):
    """A call that does not fit the state of the session."""


class NotReadyError(SuperviseError, RuntimeError):
    """The model is not ready to be trained."""


class ReadinessTimeoutError(NotReadyError, TimeoutError):
    """The model did not become ready within the time allowed."""


class ChiefNeverCameError(ReadinessTimeoutError):
    """No chief was seen within the time allowed."""


class PolicyError(SuperviseError, ValueError):
    """A trigger or a retention rule that could never work."""


class UnsupportedStateError(SuperviseError, TypeError):
    """A value in the training state that no checkpoint can keep."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(f"{path} cannot be kept in a checkpoint: {reason}")
        self.path = path
        self.reason = reason


class DataPositionError(SuperviseError, ValueError):
    """The data does not fit the position that the checkpoint holds for it."""


class CheckpointError(SuperviseError):
    """Base of the errors about checkpoints."""


class CheckpointNotFoundError(CheckpointError, FileNotFoundError):
    """There is no checkpoint where one was asked for."""


class CheckpointDamagedError(CheckpointError, ValueError):
    """A checkpoint whose size, hash or format is wrong."""

    def __init__(self, checkpoint: str, reason: str) -> None:
        super().__init__(f"checkpoint {checkpoint} is damaged: {reason}")
        self.checkpoint = checkpoint
        self.reason = reason


class AllCheckpointsDamagedError(CheckpointError):
    """There are only damaged checkpoints, so the run cannot go on from any of them."""

    def __init__(self, location: str, damaged: Mapping[str, str]) -> None:
        listing = "; ".join(f"{name}: {reason}" for name, reason in damaged.items())
        super().__init__(
            f"no good checkpoint is left in {location}, and {len(damaged)} were set aside ({listing}). "
            "Put a good copy back. To start from nothing, say resume='never', or move the folder 'set-aside' away."
        )
        self.damaged = dict(damaged)


class IncompatibleCheckpointError(CheckpointError, ValueError):
    """A good checkpoint that does not fit the program's model."""

    def __init__(self, part: str, differences: Iterable[str]) -> None:
        self.part = part
        self.differences = tuple(differences)
        super().__init__(
            f"the checkpoint's part {part!r} does not fit the program: {'; '.join(self.differences)}. "
            "Restore with the model that was saved, or begin in another logdir."
        )


class LeaseError(SuperviseError):
    """Base of the errors about the single writer of a log directory."""


class LeaseHeldError(LeaseError, BlockingIOError):
    """Another writer holds the log directory."""


class LeaseLostError(LeaseError):
    """This writer was replaced by another one and may not change the log directory any more."""


class MembershipError(SuperviseError):
    """Base of the errors between the processes of one run."""


class ChiefLostError(MembershipError, ConnectionError):
    """The chief died, or does not answer any more."""


class ChiefFinishedError(MembershipError):
    """The chief has ended its run."""


class MemberLostError(MembershipError, ConnectionError):
    """Another process of the run died, or does not answer any more."""


class MemberFailedError(MembershipError):
    """Another process of the run failed, and this one stops with it."""

    def __init__(self, rank: int, text: str) -> None:
        super().__init__(f"rank {rank} failed: {text}")
        self.rank = rank
        self.text = text


class SaveNotWantedError(MembershipError):
    """The chief does not commit the checkpoint that this process added its share to."""


class DisagreementError(MembershipError, ValueError):
    """Processes that train together do not have the same of what must be the same for all."""


class StragglersError(SuperviseError, RuntimeError):
    """Threads that did not stop within the grace period."""

    def __init__(self, grace: float, stacks: Mapping[str, str]) -> None:
        listing = "\n".join(f"thread {name!r} is at:\n{stack}" for name, stack in stacks.items())
        super().__init__(f"{len(stacks)} thread(s) did not stop within {grace:g} s: {', '.join(stacks)}\n{listing}")
        self.stacks = dict(stacks)


class UnknownBackendError(SuperviseError, LookupError):
    """There is no backend of that name."""


class BackendNotInstalledError(SuperviseError, ImportError):
    """The backend is known, but what it needs is not installed."""
