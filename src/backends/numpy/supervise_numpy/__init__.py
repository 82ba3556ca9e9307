"""The NumPy backend: arrays and random generators that your own loop trains. Importing this imports no NumPy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from supervise_numpy.backend import ArrayBackend, ArraySession

__all__ = ["ArrayBackend", "ArraySession"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from supervise_numpy import backend

    return getattr(backend, name)
