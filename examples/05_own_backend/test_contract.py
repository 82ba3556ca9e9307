"""The backend keeps the contract of backends. Run with ``pytest``."""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.linear_model import SGDClassifier
from supervise_sklearn.backend import SklearnBackend

from supervise_core.testing.backend_contract import BackendContract, Program


class TestSklearnBackend(BackendContract):
    def program(self) -> Program:
        np.random.seed(0)
        model = SGDClassifier(alpha=1e-3)

        def train(session: SGDClassifier) -> None:
            inputs = np.random.normal(size=(16, 5))
            session.partial_fit(inputs, inputs[:, 1:4].argmax(axis=1))

        def raw() -> dict[str, Any]:
            return {name: getattr(model, name, None) for name in ("coef_", "intercept_", "classes_", "t_")}

        return Program(SklearnBackend(model, classes=[0, 1, 2], features=5), train, raw)

    def program_that_is_not_ready(self) -> Program:
        return self.program()
