"""A Keras model in a loop of your own, with ``tf.GradientTape``: dropout, Adam, metrics, and the best checkpoint kept.

Run it, end it at any moment, run it again: it goes on with the very next batch, and ends with the same weights::

    pip install '.[tf,examples]'
    python examples/08_keras_custom_loop.py --logdir runs/keras --epochs 5
"""

from __future__ import annotations

import argparse
import hashlib
import os
from collections.abc import Iterator
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf
from sklearn.datasets import load_digits

from supervise_core import EverySteps, KeepBest, KeepLatest, Supervisor
from supervise_tf import EagerBackend

BATCH = 50


class Shuffled:
    """Batches in an order that is drawn anew for each pass, from NumPy's random state, which a checkpoint keeps."""

    def __init__(self, images: Any, labels: Any) -> None:
        self.images, self.labels = images, labels

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        order = np.random.permutation(len(self.labels))
        for start in range(0, len(order), BATCH):
            chosen = order[start : start + BATCH]
            yield tf.constant(self.images[chosen]), tf.constant(self.labels[chosen])


def make_model() -> Any:
    """A small convolutional network."""
    layers = keras.layers
    return keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            layers.Conv2D(16, 3, activation="relu"),
            layers.BatchNormalization(),
            layers.Flatten(),
            layers.Dropout(0.3),
            layers.Dense(10),
        ]
    )


def main() -> None:
    """Train, and say what happened."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--logdir", default="runs/keras")
    parser.add_argument("--epochs", type=int, default=5)
    options = parser.parse_args()

    keras.utils.set_random_seed(0)
    digits = load_digits()
    images, labels = digits.images[..., None].astype("float32") / 16, digits.target
    train = Shuffled(images[:1500], labels[:1500])

    model = make_model()
    optimizer = keras.optimizers.Adam(2e-3)
    cross_entropy = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    accuracy = keras.metrics.SparseCategoricalAccuracy()

    @tf.function
    def train_step(inputs: Any, targets: Any) -> Any:
        with tf.GradientTape() as tape:
            scores = model(inputs, training=True)
            loss = cross_entropy(targets, scores)
        gradients = tape.gradient(loss, model.trainable_variables)
        optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))
        accuracy.update_state(targets, scores)
        return loss

    sv = Supervisor(
        EagerBackend(model=model, optimizer=optimizer, accuracy=accuracy),
        options.logdir,
        save_every=EverySteps(20),
        summarize_every=EverySteps(10),
        keep=KeepLatest(2) | KeepBest("test_accuracy", mode="max"),
    )
    with sv.managed_session() as sess:
        print(f"step {sess.global_step}: {sv.report.restored or 'begun anew'}", flush=True)
        for epoch in sv.epochs(options.epochs):
            for inputs, targets in sv.batches(train):
                loss = train_step(inputs, targets)
                sv.scalars(loss=loss, accuracy=accuracy.result())
            scores = model(images[1500:], training=False)
            test_accuracy = float(keras.ops.mean(keras.ops.argmax(scores, axis=-1) == labels[1500:]))
            sv.metrics(test_accuracy=test_accuracy)
            seen = float(accuracy.result())
            print(f"epoch {epoch}: step {sess.global_step}, accuracy {seen:.3f}, then {test_accuracy:.3f}", flush=True)
            accuracy.reset_state()
    digest = hashlib.sha256(b"".join(variable.numpy().tobytes() for variable in model.variables)).hexdigest()
    print(f"done: step {sv.global_step}, weights {digest}")


if __name__ == "__main__":
    main()
