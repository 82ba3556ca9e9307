"""The operations of one run: the backend's own, or what the user gave instead of one, or nothing at all."""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Generic, TypeVar

from supervise_core.backend import Backend
from supervise_core.parts import Parts
from supervise_core.readiness import Readiness, readiness_of
from supervise_core.snapshot import Snapshot
from supervise_core.staging import Staging

SessionT = TypeVar("SessionT")

Load = Callable[[SessionT, Parts], object]


class Default(enum.Enum):
    """Stands for "the backend's own operation", where None stands for "none"."""

    BACKEND = "the backend's own"

    def __repr__(self) -> str:
        return "USE_BACKEND"


USE_BACKEND: Final = Default.BACKEND


@dataclass(frozen=True, slots=True)
class Operations(Generic[SessionT]):
    """What is run to bring a model up, to watch it and to save it; None is "not done"."""

    init: Callable[[SessionT], object] | None
    init_fn: Callable[[SessionT], object] | None
    ready: Callable[[SessionT], Readiness] | None
    ready_for_local_init: Callable[[SessionT], Readiness] | None
    local_init: Callable[[SessionT], object] | None
    summary: Callable[[SessionT], Mapping[str, Any] | bytes] | None
    snapshot: Callable[[SessionT, Staging], Snapshot] | None
    load: Load[SessionT] | None

    @classmethod
    def of(
        cls,
        backend: Backend[SessionT],
        *,
        init: Callable[[SessionT], object] | None | Default = USE_BACKEND,
        init_fn: Callable[[SessionT], object] | None = None,
        ready: Callable[[SessionT], object] | None | Default = USE_BACKEND,
        ready_for_local_init: Callable[[SessionT], object] | None | Default = USE_BACKEND,
        local_init: Callable[[SessionT], object] | None | Default = USE_BACKEND,
        summary: Callable[[SessionT], Mapping[str, Any] | bytes] | None | Default = USE_BACKEND,
        saver: Callable[[SessionT, Staging], Snapshot] | None | Default = USE_BACKEND,
    ) -> Operations[SessionT]:
        """The backend's operations, with those replaced that were given.

        ``saver`` takes the snapshot instead of the backend; the backend's ``load`` gets what it put. None: nothing is
        saved and nothing is restored.

        :raises TypeError: if one is neither callable nor None.
        """
        given = {
            "init": init, "init_fn": init_fn, "ready": ready, "ready_for_local_init": ready_for_local_init,
            "local_init": local_init, "summary": summary, "saver": saver,
        }  # fmt: skip
        for name, operation in given.items():
            if operation is not None and operation is not USE_BACKEND and not callable(operation):
                raise TypeError(f"{name}= takes a callable or None, not {operation!r}")
        return cls(
            init=backend.init if isinstance(init, Default) else init,
            init_fn=init_fn,
            ready=_check(backend.ready if isinstance(ready, Default) else ready),
            ready_for_local_init=_check(
                backend.ready_for_local_init if isinstance(ready_for_local_init, Default) else ready_for_local_init
            ),
            local_init=backend.local_init if isinstance(local_init, Default) else local_init,
            summary=backend.summary if isinstance(summary, Default) else summary,
            snapshot=backend.snapshot if isinstance(saver, Default) else saver,
            load=None if saver is None else backend.load,
        )


def _check(check: Callable[[SessionT], object] | None) -> Callable[[SessionT], Readiness] | None:
    if check is None:
        return None
    asked = check
    return lambda session: readiness_of(asked(session))
