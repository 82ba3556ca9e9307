"""The port between the core and one framework. A new framework is one subclass of ``Backend``."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import FrameType
from typing import Any, ClassVar, Generic, TypeVar

from supervise_core.data_source import BatchSource, ReplayedSource, StatefulSource, is_stateful
from supervise_core.numpy_codec import NumpyCodec
from supervise_core.parts import Parts
from supervise_core.process_random import RandomState, process_random_state, seed_process, set_process_random_state
from supervise_core.readiness import Readiness, Ready
from supervise_core.services import Service
from supervise_core.snapshot import Snapshot
from supervise_core.staging import Outline, Staging
from supervise_core.tensors import TensorCodec

SessionT = TypeVar("SessionT")


class Backend(ABC, Generic[SessionT]):
    """What the core asks of a framework. Five methods must be written; the others have a sensible answer.

    Methods are called on the training thread (the one that entered the session). ``snapshot`` returns when the state
    is safe from what the program does next; nothing else may be slow while training runs.
    """

    name: ClassVar[str]
    """What the backend is called in manifests, messages and entry points."""

    clean_stop: ClassVar[tuple[type[BaseException], ...]] = ()
    """Exceptions that mean "the input is exhausted": out of the training block, they end the run well."""

    recoverable: ClassVar[tuple[type[BaseException], ...]] = ()
    """Exceptions that mean "lost a peer": worth another try."""

    step_name: str = "global_step"
    """What the steps are called in summaries."""

    saves_beside_the_loop: ClassVar[bool] = False
    """Whether ``snapshot`` may be called by another thread while training runs. Then a program that never comes to a
    step boundary is saved all the same, and the checkpoint is marked as one that may mix two steps."""

    grows_at_first_step: ClassVar[bool] = False
    """Whether the state has more tensors after the first step than before it. Then memory for them is had beside the
    loop, before that step as far as ``foresee`` knows of them, or right after it, and the first save of them is as
    quick as the later ones. ``snapshot`` is called once more for it, without copying anything."""

    codec: ClassVar[TensorCodec[Any]] = NumpyCodec()
    """How this framework's tensors become bytes; also makes the tensors that ``CheckpointDirectory`` hands out."""

    # ---- a new backend writes these

    @abstractmethod
    def create_session(self, master: str = "", config: Any = None) -> SessionT:
        """What ``managed_session`` hands out: the framework's own object where there is one."""

    @abstractmethod
    def init(self, session: SessionT) -> None:
        """Give the model its first values. Not called when a checkpoint is restored."""

    @abstractmethod
    def global_step(self, session: SessionT) -> int | None:
        """How many training steps the model has made; None where nothing counts them.

        Then the core counts: the items that ``sv.batches`` handed out, or else the rounds of the loop. It is asked
        for every item, so it must be quick and must never run the model.
        """

    @abstractmethod
    def snapshot(self, session: SessionT, staging: Staging) -> Snapshot:
        """The training state of this moment: ``staging.put(part, tree)`` for each part, and ``staging.snapshot()``.

        :raises UnsupportedStateError: for a value that no checkpoint can keep.
        """

    @abstractmethod
    def load(self, session: SessionT, parts: Parts) -> None:
        """The inverse of ``snapshot``. Everything is checked before anything is changed.

        :raises IncompatibleCheckpointError: if names, shapes or dtypes are not those of the model; says which.
        """

    # ---- a backend may answer these in its own way

    def peers(self, master: str = "", config: Any = None) -> Readiness:
        """Whether all processes answer that a new session would wait for; if not, which do not. Asked repeatedly."""
        return Ready()

    def was_made_ready(self, session: SessionT, run: Callable[[], str]) -> bool:
        """Whether the model lives on outside of this process, and a chief of this run has announced that it is ready.

        ``run`` gives what tells this run from others.
        """
        return False

    def announce_ready(self, session: SessionT, run: Callable[[], str] | None) -> None:
        """Keep beside a model that lives outside of this process that a chief of this run has made it ready.

        None takes that back, while it is initialised or restored. What is asked by ``ready`` looks at it.
        """
        return None

    def ready(self, session: SessionT) -> Readiness:
        """Whether the model can be trained; if not, what is missing, by name."""
        return Ready()

    def shares_model(self, master: str) -> bool:
        """Whether the processes of one run train one and the same model (on parameter servers, say).

        Then workers load nothing, and wait until the model is ready. Otherwise each has a model of its own, and
        restores the same checkpoint as the chief.
        """
        return False

    def ready_for_local_init(self, session: SessionT) -> Readiness:
        """Whether ``local_init`` may run."""
        return Ready()

    def local_init(self, session: SessionT) -> None:
        """What every session needs anew, restored or not, and no checkpoint holds."""
        return None

    def summary(self, session: SessionT) -> Mapping[str, Any] | bytes:
        """What to write whenever a summary is due: numbers, strings, ``Histogram``, ``Image``, ``Text`` by their tags,
        or a serialized ``Summary`` message."""
        return {}

    def close_session(self, session: SessionT) -> None:
        """Let go of what the session holds; called once or more."""
        return None

    def is_blocking(self, frame: FrameType) -> bool:
        """Whether a thread whose innermost Python frame this is waits in a call that ``free_threads`` would end."""
        return False

    def free_threads(self, session: SessionT) -> None:
        """End the calls of the framework that other threads are blocked in, after a stop."""
        return None

    def is_clean_stop(self, error: BaseException) -> bool:
        """Whether an exception means that the input is exhausted; by default, whether it is one of ``clean_stop``."""
        return isinstance(error, self.clean_stop)

    def is_aftermath(self, error: BaseException) -> bool:
        """Whether an exception only says that a call was ended because the session is being closed."""
        return False

    def services(self) -> Sequence[Service]:
        """What the framework itself needs to have running beside training; started with the standard services."""
        return ()

    def opening_events(self, session: SessionT) -> Iterable[bytes]:
        """Serialized ``Event`` messages that each event file begins with; a graph, say."""
        return ()

    def foresee(self, session: SessionT, outline: Outline) -> None:
        """Put into ``outline`` the parts that the first step will make larger, as they will be then; see
        ``grows_at_first_step``. Only names, shapes and dtypes count. Wrong guesses cost memory until that step."""
        return None

    def watch_steps(self, session: SessionT, notify: Callable[[int], None]) -> Callable[[], None] | None:
        """Call ``notify(step)`` on the training thread after each step, until the function returned here is called.

        None if the framework has no hook for it; then the core asks for the step at each boundary.
        """
        return None

    def mark(self, session: SessionT) -> object:
        """Something cheap that differs (by ``==``) once the state changed without a step: by a forward pass, a draw.

        Tells an item that nothing was done with from one in the middle of an accumulation. Asked for every item.
        """
        return None

    def random_state(self, session: SessionT) -> RandomState:
        """All random state that the loop or its data may draw from, as plain data (no tensors)."""
        return process_random_state()

    def set_random_state(self, session: SessionT, state: RandomState) -> None:
        """Put back what ``random_state`` gave."""
        set_process_random_state(state)

    def seed(self, session: SessionT, seed: int) -> None:
        """Seed all of that from one number of 64 bits."""
        seed_process(seed)

    def run_seed(self, session: SessionT) -> int:
        """The seed from which a fresh run derives those of its data; a restored run goes on with the saved one."""
        return 0

    def batch_source(self, session: SessionT, data: Any, run_seed: int) -> BatchSource:
        """How one pass over what the user gave to ``sv.batches`` is read, saved and resumed.

        :raises TypeError: if the data cannot be iterated over.
        """
        if is_stateful(data):
            return StatefulSource(data)
        return ReplayedSource(
            data,
            lambda: self.random_state(session),
            lambda state: self.set_random_state(session, state),
        )
