"""What a Supervisor is given, checked at the earliest moment."""

from __future__ import annotations

from supervise_core.backend import Backend
from supervise_core.retention import Retention
from supervise_core.triggers import Trigger


def check_objects(argument: str, given: tuple[object, ...], kind: type) -> None:
    """:raises TypeError: if one of them is a class, a string, or not of that kind."""
    for item in given:
        if isinstance(item, (type, str)) or not isinstance(item, kind):
            raise TypeError(f"{argument}= takes objects ({kind.__name__}s), such as {argument}=[Mine()], not {item!r}")


def check_arguments(backend: object, save_every: object, summarize_every: object, keep: object, grace: float) -> None:
    """:raises TypeError, ValueError: for a part that is not of its kind, with what to pass instead."""
    if not isinstance(backend, Backend):
        hint = "; pass an object of the class, not the class" if isinstance(backend, type) else ""
        raise TypeError(f"backend= takes a Backend, such as TorchBackend(model=model), not {backend!r}{hint}")
    for name, trigger in (("save_every", save_every), ("summarize_every", summarize_every)):
        if trigger is not None and not isinstance(trigger, Trigger):
            raise TypeError(f"{name}= takes a trigger, such as EverySeconds(600) or EverySteps(100), not {trigger!r}")
    if not isinstance(keep, Retention):
        raise TypeError(f"keep= takes a retention rule, such as KeepLatest(5) or KeepAll(), not {keep!r}")
    if not grace >= 0:
        raise ValueError(f"grace= takes a number of seconds that is not negative, not {grace!r}")
