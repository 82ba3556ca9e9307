"""A network in NumPy on the digits that come with scikit-learn: your own loop, supervised.

Run it; end it at any moment with Ctrl-C, or with ``kill -9``; run it again. It goes on with the very next batch, and
ends with the same weights, to the last bit, as if nothing had happened::

    pip install '.[examples]'
    python examples/01_minimal.py --logdir runs/minimal
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from sklearn.datasets import load_digits

from supervise_core import EverySteps, KeepBest, KeepLatest, Supervisor
from supervise_numpy import ArrayBackend

Floats = NDArray[np.float64]
BATCH = 32
RATE = 0.3

digits = load_digits()
mixed = np.random.default_rng(1).permutation(len(digits.target))  # the digits come ordered by who wrote them
labels: NDArray[np.intp] = digits.target[mixed]
images: Floats = digits.data[mixed] / 16
targets: Floats = np.eye(10)[labels]
train, test = slice(0, 1500), slice(1500, None)

rng = np.random.default_rng(0)
weights: dict[str, Floats] = {
    "w1": rng.normal(0, 0.15, (64, 96)),
    "b1": np.zeros(96),
    "w2": rng.normal(0, 0.1, (96, 10)),
    "b2": np.zeros(10),
}


class Shuffled:
    """The training data in batches, in an order that is drawn anew for each pass."""

    def __iter__(self) -> Iterator[NDArray[np.intp]]:
        order = rng.permutation(train.stop)
        for start in range(0, len(order), BATCH):
            yield order[start : start + BATCH]


def forward(inputs: Floats) -> tuple[Floats, Floats]:
    """Hidden activations and class probabilities."""
    hidden = np.tanh(inputs @ weights["w1"] + weights["b1"])
    scores = hidden @ weights["w2"] + weights["b2"]
    exponentials = np.exp(scores - scores.max(axis=1, keepdims=True))
    return hidden, exponentials / exponentials.sum(axis=1, keepdims=True)


def train_step(batch: NDArray[np.intp]) -> float:
    """One step of gradient descent, in place; the loss before it."""
    inputs = images[batch] + rng.normal(0, 0.05, (len(batch), 64))
    hidden, probabilities = forward(inputs)
    loss = -np.log((probabilities * targets[batch]).sum(axis=1)).mean()
    at_scores = (probabilities - targets[batch]) / len(batch)
    at_hidden = (at_scores @ weights["w2"].T) * (1 - hidden**2)
    weights["w2"] -= RATE * hidden.T @ at_scores
    weights["b2"] -= RATE * at_scores.sum(axis=0)
    weights["w1"] -= RATE * inputs.T @ at_hidden
    weights["b1"] -= RATE * at_hidden.sum(axis=0)
    return float(loss)


def accuracy() -> float:
    """The share of test digits that are recognised."""
    return float((forward(images[test])[1].argmax(axis=1) == labels[test]).mean())


def main() -> None:
    """Train, and say what happened."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--logdir", default="runs/minimal")
    parser.add_argument("--epochs", type=int, default=40)
    options = parser.parse_args()

    sv = Supervisor(
        ArrayBackend(weights, rng=rng),
        options.logdir,
        save_every=EverySteps(100),
        summarize_every=EverySteps(20),
        keep=KeepLatest(3) | KeepBest("test_accuracy", mode="max"),
    )
    with sv.managed_session() as sess:
        print(f"step {sess.global_step}: {sv.report.restored or 'begun anew'}", flush=True)
        for epoch in sv.epochs(options.epochs):
            for batch in sv.batches(Shuffled()):
                loss = train_step(batch)
                sess.global_step += 1
                sv.scalars(loss=loss)
            sv.metrics(test_accuracy=accuracy())
            print(f"epoch {epoch}: step {sess.global_step}, test accuracy {accuracy():.3f}", flush=True)
    digest = hashlib.sha256(b"".join(array.tobytes() for array in weights.values())).hexdigest()
    print(f"done: step {sess.global_step}, test accuracy {accuracy():.3f}, weights {digest}")


if __name__ == "__main__":
    main()
