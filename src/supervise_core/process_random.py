"""The random state that belongs to the process and not to any framework: Python's, and NumPy's global one."""

from __future__ import annotations

import random
import sys
from collections.abc import Mapping
from typing import Any

RandomState = Mapping[str, Any]
"""Random states by owner, as plain data."""


def process_random_state() -> dict[str, Any]:
    """The state of ``random`` and, once NumPy is imported, of ``numpy.random``'s global generator."""
    state: dict[str, Any] = {"python": random.getstate()}
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        name, keys, position, has_gauss, gauss = numpy.random.get_state(legacy=True)
        state["numpy"] = (str(name), keys.tobytes(), int(position), int(has_gauss), float(gauss))
    return state


def set_process_random_state(state: RandomState) -> None:
    """Put back what ``process_random_state`` gave."""
    random.setstate(state["python"])
    if "numpy" in state:
        import numpy

        name, keys, position, has_gauss, gauss = state["numpy"]
        numpy.random.set_state((name, numpy.frombuffer(keys, numpy.uint32), position, has_gauss, gauss))


def seed_process(seed: int) -> None:
    """Seed both from one number of 64 bits."""
    random.seed(seed)
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed([seed & 0xFFFFFFFF, seed >> 32])
