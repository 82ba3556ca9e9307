"""Trains with TensorFlow's own Supervisor: what it wrote is read by ours, and what ours wrote by it.

Says the step that it began from, the value of the variable then, and the step that it ended with.
"""

from __future__ import annotations

import sys

import tensorflow as tf
from tf_modes import enter, global_step, say, v1, variable


def main() -> None:
    logdir, mode, kind, steps = sys.argv[1:5]
    enter(mode)
    with tf.Graph().as_default():
        step = global_step(kind)
        w = variable("w", [[1.0, 2.0, 3.0]], kind)
        with tf.control_dependencies([v1.assign_add(w, tf.ones((1, 3)))]):
            train = v1.assign_add(step, 1).op
        saver = v1.train.Saver(max_to_keep=3)
        sv = v1.train.Supervisor(logdir=logdir, save_model_secs=0, saver=saver, global_step=tf.identity(step))
        with sv.managed_session() as sess:
            say(begin=int(sess.run(step)), w=sess.run(w).tolist())
            for _ in range(int(steps)):
                sess.run(train)
            if int(steps):
                sv.saver.save(sess, sv.save_path, global_step=step)
            say(done=int(sess.run(step)))


if __name__ == "__main__":
    main()
