"""A backend in plain Python keeps the contract: no framework, no arrays but those that the core makes."""

from __future__ import annotations

import random
from typing import Any

import numpy as np

from supervise_core import Backend, IncompatibleCheckpointError, NotReady, Parts, Readiness, Ready, Snapshot, Staging
from supervise_core.testing.backend_contract import BackendContract, Program


class Walk:
    """A random walk: the state is a list of numbers and how many steps were made."""

    def __init__(self) -> None:
        self.places: list[float] | None = None
        self.steps = 0


class ToyBackend(Backend[Walk]):
    """Trains a random walk."""

    name = "toy"

    def __init__(self, walk: Walk) -> None:
        self._walk = walk

    def create_session(self, master: str = "", config: Any = None) -> Walk:
        return self._walk

    def init(self, session: Walk) -> None:
        session.places = [0.0, 1.0, 2.0]

    def ready(self, session: Walk) -> Readiness:
        return NotReady("the walk has no places") if session.places is None else Ready()

    def global_step(self, session: Walk) -> int:
        return session.steps

    def snapshot(self, session: Walk, staging: Staging) -> Snapshot:
        staging.put("model", {"places": np.array(session.places), "steps": session.steps})
        staging.put("random", self.random_state(session))
        return staging.snapshot()

    def load(self, session: Walk, parts: Parts) -> None:
        if missing := {"model", "random"} - parts.keys():
            raise IncompatibleCheckpointError(min(missing), ["it is missing"])
        model = parts["model"].tree()
        places = model.get("places")
        if model.keys() != {"places", "steps"} or places.ndim != 1 or places.dtype != np.float64:
            raise IncompatibleCheckpointError("model", [f"{sorted(model)} are not the places of a walk"])
        session.places, session.steps = places.tolist(), model["steps"]
        self.set_random_state(session, parts["random"].tree())


class TestToyBackend(BackendContract):
    def program(self) -> Program:
        random.seed(4)
        walk = Walk()

        def train(session: Walk) -> None:
            assert session.places is not None
            session.places = [place + random.gauss(0, 1) for place in session.places]
            session.steps += 1

        return Program(ToyBackend(walk), train, lambda: {"places": np.array(walk.places), "steps": walk.steps})

    def program_that_is_not_ready(self) -> Program:
        return self.program()
