"""A program for TensorFlow's Supervisor as it was written in 2017, after the change of one import line.

It has what such programs had: input queues with their runners, a default summary, a service of its own in a thread, and
the loop that asks ``sv.should_stop()``. It runs under TensorFlow's present defaults. End it at any moment with Ctrl-C,
and run it again::

    pip install '.[tf,examples]'
    python examples/06_tf1_supervisor.py --logdir runs/tf1
"""

from __future__ import annotations

import argparse
import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import tensorflow.compat.v1 as tf
from sklearn.datasets import load_digits

from supervise_tf import Supervisor  # was: from tensorflow.train import Supervisor

BATCH = 64


def build_inputs() -> tuple[tf.Tensor, tf.Tensor]:
    """Batches of digits, prepared by threads that fill a queue."""
    digits = load_digits()
    image, label = tf.train.slice_input_producer(
        [tf.constant(digits.data / 16, tf.float32), tf.constant(digits.target, tf.int64)], shuffle=True, seed=1
    )
    images, labels = tf.train.batch([image, label], BATCH, num_threads=2, capacity=4 * BATCH)
    return images, labels


def build_model(images: tf.Tensor, labels: tf.Tensor) -> tuple[tf.Operation, tf.Tensor]:
    """A network with one hidden layer: its training op and its loss."""
    step = tf.train.get_or_create_global_step()
    w1 = tf.get_variable("w1", (64, 64), initializer=tf.glorot_normal_initializer(seed=1))
    w2 = tf.get_variable("w2", (64, 10), initializer=tf.glorot_normal_initializer(seed=2))
    bias = tf.get_variable("bias", (64,), initializer=tf.zeros_initializer())
    scores = tf.nn.relu(images @ w1 + bias) @ w2
    loss = tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(labels=labels, logits=scores))
    right = tf.reduce_mean(tf.cast(tf.equal(tf.argmax(scores, 1), labels), tf.float32))
    average = tf.get_variable("average_accuracy", (), initializer=tf.zeros_initializer(), trainable=False)
    with tf.control_dependencies([tf.assign(average, 0.95 * average + 0.05 * right)]):
        train = tf.train.MomentumOptimizer(0.05, 0.9).minimize(loss, global_step=step)
    tf.summary.scalar("accuracy", average)
    return train, average


def main() -> None:
    """Train, and say what happened."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--logdir", default="runs/tf1")
    parser.add_argument("--steps", type=int, default=2000)
    options = parser.parse_args()

    tf.logging.set_verbosity(tf.logging.ERROR)  # queues are deprecated, which this program says once and not ten times
    with tf.Graph().as_default():
        train, average = build_model(*build_inputs())
        sv = Supervisor(logdir=options.logdir, save_model_secs=5, save_summaries_secs=2)
        with sv.managed_session() as sess:
            step = int(sess.run(sv.global_step))
            print(f"step {step}: {sv.report.restored or 'begun anew'}", flush=True)

            def report() -> None:
                at, accuracy = sess.run([sv.global_step, average])
                print(f"step {at}: accuracy so far {accuracy:.3f}", flush=True)

            sv.loop(1, report)
            while not sv.should_stop() and step < options.steps:
                sess.run(train)
                step = int(sess.run(sv.global_step))
    print(f"done: step {step}, {sv.report.final_save}")


if __name__ == "__main__":
    main()
