"""A TensorFlow training program for campaigns, over the drop-in: a small network, fed with data drawn from the step.

Prints a line of JSON for each step, and at its end the SHA-256 of all variables. It can hurt itself at an exact place,
which a test outside it could only hit by luck.
"""

from __future__ import annotations

import argparse
import functools
import sys
import threading
import time

import numpy as np
import tensorflow as tf
from tf_modes import enter, global_step, hash_of, say, v1, variable

import supervise_tf.supervisor_plan
from supervise_core.testing.disks import KillingDisk
from supervise_tf import BundleStore, Supervisor


def options_from(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("logdir")
    parser.add_argument("--mode", choices=["v2", "no eager", "v1"], default="v2")
    parser.add_argument("--kind", choices=["ref", "resource"], default="resource")
    parser.add_argument("--optimizer", choices=["momentum", "adam"], default="adam")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--save-secs", type=float, default=0.02)
    parser.add_argument("--pause", type=float, default=0.0)
    parser.add_argument("--kill-at-disk-call", type=int)
    parser.add_argument("--input-ends", type=int, help="take the items from queue runners, and so many of them")
    parser.add_argument("--blocked", action="store_true", help="have a thread wait at an empty queue")
    return parser.parse_args(arguments)


def build(kind: str, optimizer: str, inputs: tf.Tensor) -> tuple[tf.Tensor, tf.Operation]:
    """The loss and the training op of a network of two layers, with slots."""
    rng = np.random.default_rng(1)
    w1 = variable("w1", rng.normal(size=(4, 8)).astype(np.float32), kind)
    b1 = variable("b1", np.zeros(8, np.float32), kind)
    w2 = variable("w2", rng.normal(size=(8, 1)).astype(np.float32), kind)
    step = global_step(kind)
    guess = tf.tanh(inputs @ w1 + b1) @ w2
    loss = tf.reduce_mean(tf.square(guess - tf.reduce_sum(inputs, axis=1, keepdims=True)))
    choice = v1.train.AdamOptimizer(0.05) if optimizer == "adam" else v1.train.MomentumOptimizer(0.05, 0.9)
    return loss, choice.minimize(loss, global_step=step)


def items_of(step: int) -> np.ndarray:
    return np.random.default_rng(step).normal(size=(16, 4)).astype(np.float32)


def main() -> None:
    options = options_from(sys.argv[1:])
    enter(options.mode)
    if options.kill_at_disk_call is not None:
        killing = functools.partial(BundleStore, disk=KillingDisk(options.kill_at_disk_call))
        supervise_tf.supervisor_plan.BundleStore = killing
    with tf.Graph().as_default():
        if options.input_ends is None:
            inputs = v1.placeholder(tf.float32, (None, 4))
        else:
            numbers = v1.train.range_input_producer(options.input_ends, num_epochs=1, shuffle=False)
            inputs = tf.cast(tf.tile(v1.train.batch([numbers.dequeue()], 1)[:, None], (1, 4)), tf.float32)
        loss, train = build(options.kind, options.optimizer, inputs)
        never = tf.queue.FIFOQueue(1, [tf.float32]).dequeue() if options.blocked else None
        final = ""
        sv = Supervisor(logdir=options.logdir, save_model_secs=options.save_secs, summary_op=None)
        with sv.managed_session() as sess:
            step = int(sess.run(sv.global_step))
            say(begin=step, restored=sv.report.restored)
            if never is not None:
                threading.Thread(target=sess.run, args=(never,), daemon=True).start()
                waiting = threading.Thread(target=lambda: sess.run(never), name="waits for an item", daemon=True)
                waiting.start()
                sv.coord.register_thread(waiting)
            while not sv.should_stop() and step < options.steps:
                feed = {} if options.input_ends is not None else {inputs: items_of(step)}
                value, _ = sess.run([loss, train], feed)
                step += 1
                say(step=step, loss=float(value).hex())
                if options.pause:
                    time.sleep(options.pause)
            final = hash_of(sess, v1.global_variables())
    say(done=sv.report.last_step, weights=final, final_save=sv.report.final_save, stragglers=list(sv.report.stragglers))


if __name__ == "__main__":
    main()
