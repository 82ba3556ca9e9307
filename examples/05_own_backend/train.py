"""Train a linear classifier on handwritten digits. Kill it and start it again: it goes on, bit for bit."""

from __future__ import annotations

import argparse
import hashlib
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from sklearn.datasets import load_digits
from sklearn.linear_model import SGDClassifier
from supervise_sklearn.backend import SklearnBackend

from supervise_core import EverySteps, KeepLatest, Supervisor


class Shuffled:
    """Batches in an order that is drawn anew for each pass."""

    def __init__(self, inputs: Any, labels: Any, size: int) -> None:
        self.inputs, self.labels, self.size = inputs, labels, size

    def __len__(self) -> int:
        return math.ceil(len(self.inputs) / self.size)

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        order = np.random.permutation(len(self.inputs))
        for begin in range(0, len(order), self.size):
            chosen = order[begin : begin + self.size]
            yield self.inputs[chosen], self.labels[chosen]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("logdir", nargs="?", default="runs/sklearn-digits")
    parser.add_argument("--epochs", type=int, default=10)
    options = parser.parse_args()
    np.random.seed(0)
    inputs, labels = load_digits(return_X_y=True)
    inputs = inputs / 16
    batches = Shuffled(inputs[:1500], labels[:1500], 32)
    model = SGDClassifier(loss="log_loss", alpha=1e-4)
    sv = Supervisor(
        SklearnBackend(model, classes=range(10), features=64),
        options.logdir,
        save_every=EverySteps(20),
        keep=KeepLatest(3),
    )
    with sv.managed_session():
        print(f"begins at step {sv.global_step}", flush=True)
        for epoch in sv.epochs(options.epochs):
            for some_inputs, some_labels in sv.batches(batches):
                model.partial_fit(some_inputs, some_labels)
            print(f"epoch {epoch}: accuracy {model.score(inputs[1500:], labels[1500:]):.3f}", flush=True)
    digest = hashlib.sha256(model.coef_.tobytes() + model.intercept_.tobytes()).hexdigest()
    print(f"ends at step {sv.global_step}: {digest[:16]}")


if __name__ == "__main__":
    main()
