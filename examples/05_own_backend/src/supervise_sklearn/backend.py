"""A backend for scikit-learn's ``SGDClassifier``, trained by ``partial_fit``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from sklearn.linear_model import SGDClassifier

from supervise_core import Backend, IncompatibleCheckpointError, NotReady, Parts, Readiness, Ready, Snapshot, Staging


class SklearnBackend(Backend[SGDClassifier]):
    """One classifier that draws from ``numpy.random`` (``random_state=None``); it is the session itself.

    The core counts the steps, which are the batches: scikit-learn does not.
    """

    name = "sklearn"

    def __init__(self, model: SGDClassifier, *, classes: Sequence[Any], features: int) -> None:
        self._model = model
        self._classes = np.asarray(classes)
        self._shape = (1 if len(classes) == 2 else len(classes), features)

    def create_session(self, master: str = "", config: Any = None) -> SGDClassifier:
        return self._model

    def init(self, session: SGDClassifier) -> None:
        vars(session).update(self._beginning())

    def ready(self, session: SGDClassifier) -> Readiness:
        return Ready() if hasattr(session, "coef_") else NotReady("coef_ has no values; init gives it zeros")

    def global_step(self, session: SGDClassifier) -> None:
        return None

    def snapshot(self, session: SGDClassifier, staging: Staging) -> Snapshot:
        staging.put("model", {name: getattr(session, name) for name in self._beginning()})
        staging.put("random", self.random_state(session))
        return staging.snapshot()

    def load(self, session: SGDClassifier, parts: Parts) -> None:
        if missing := [name for name in ("model", "random") if name not in parts]:
            raise IncompatibleCheckpointError(missing[0], ["it is missing"])
        here, saved = self._beginning(), parts["model"].tree()
        differences = [f"{name!r} is on one side alone" for name in here.keys() ^ saved.keys()]
        for name in here.keys() & saved.keys():
            mine, theirs = np.asarray(here[name]), np.asarray(saved[name])
            if (mine.shape, mine.dtype) != (theirs.shape, theirs.dtype):
                differences.append(f"{name!r} is {theirs.dtype}{theirs.shape} and not {mine.dtype}{mine.shape}")
        if differences:
            raise IncompatibleCheckpointError("model", differences)
        vars(session).update(saved)
        self.set_random_state(session, parts["random"].tree())

    def _beginning(self) -> dict[str, Any]:
        arrays = {"coef_": np.zeros(self._shape), "intercept_": np.zeros(self._shape[0]), "classes_": self._classes}
        return {**arrays, "t_": 1.0, "n_features_in_": self._shape[1]}
