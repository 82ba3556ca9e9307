"""The model of ``06_tf1_supervisor.py`` under the neutral Supervisor: a graph as one backend among others.

The graph is built as before; ``GraphBackend`` finds its operations in its collections. Everything else is as in every
program here: triggers, ``sv.epochs`` and ``sv.batches``, ``sv.scalars``, ``KeepBest``. As the data comes from
``sv.batches`` and not from queues, the run goes on with the very next batch, and ends with the same weights, to the
last bit, however often it was killed::

    pip install '.[tf,examples]'
    python examples/07_tf_graph_backend.py --logdir runs/graph
"""

from __future__ import annotations

import argparse
import hashlib
import os
from collections.abc import Iterator

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import tensorflow.compat.v1 as tf
from numpy.typing import NDArray
from sklearn.datasets import load_digits

from supervise_core import EverySteps, KeepBest, KeepLatest, Supervisor
from supervise_tf import GraphBackend

BATCH = 64

digits = load_digits()
mixed = np.random.default_rng(1).permutation(len(digits.target))  # the digits come ordered by who wrote them
features = (digits.data[mixed] / 16).astype(np.float32)
classes = digits.target[mixed].astype(np.int64)
train_part, test_part = slice(0, 1500), slice(1500, None)


class Shuffled:
    """The training data in batches, in an order that is drawn anew for each pass."""

    def __iter__(self) -> Iterator[NDArray[np.intp]]:
        order = np.random.permutation(train_part.stop)  # NumPy's own random state is part of every checkpoint
        for start in range(0, len(order), BATCH):
            yield order[start : start + BATCH]


def main() -> None:
    """Train, and say what happened."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--logdir", default="runs/graph")
    parser.add_argument("--epochs", type=int, default=20)
    options = parser.parse_args()
    np.random.seed(0)

    with tf.Graph().as_default():
        images = tf.placeholder(tf.float32, (None, 64))
        labels = tf.placeholder(tf.int64, (None,))
        step = tf.train.get_or_create_global_step()
        w1 = tf.get_variable("w1", (64, 64), initializer=tf.glorot_normal_initializer(seed=1))
        w2 = tf.get_variable("w2", (64, 10), initializer=tf.glorot_normal_initializer(seed=2))
        bias = tf.get_variable("bias", (64,), initializer=tf.zeros_initializer())
        scores = tf.nn.relu(images @ w1 + bias) @ w2
        loss = tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(labels=labels, logits=scores))
        accuracy = tf.reduce_mean(tf.cast(tf.equal(tf.argmax(scores, 1), labels), tf.float32))
        train = tf.train.MomentumOptimizer(0.05, 0.9).minimize(loss, global_step=step)

        sv = Supervisor(
            GraphBackend(),
            options.logdir,
            save_every=EverySteps(100),
            summarize_every=EverySteps(20),
            keep=KeepLatest(3) | KeepBest("test_accuracy", mode="max"),
        )
        with sv.managed_session() as sess:
            print(f"step {sv.global_step}: {sv.report.restored or 'begun anew'}", flush=True)
            for epoch in sv.epochs(options.epochs):
                for batch in sv.batches(Shuffled()):
                    fed = {images: features[batch], labels: classes[batch]}
                    _, now = sess.run([train, loss], fed)
                    sv.scalars(loss=now)
                right = sess.run(accuracy, {images: features[test_part], labels: classes[test_part]})
                sv.metrics(test_accuracy=right)
                print(f"epoch {epoch}: step {sv.global_step}, test accuracy {right:.3f}", flush=True)
            values = sess.run(tf.global_variables())
    digest = hashlib.sha256(b"".join(value.tobytes() for value in values)).hexdigest()
    print(f"done: step {sv.global_step}, weights {digest}")


if __name__ == "__main__":
    main()
