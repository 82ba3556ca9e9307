"""A training program that goes on until it is told to stop: ``programs_sigterm.py theirs|ours LOGDIR``."""

import os
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import tensorflow as tf
from parity import ours, theirs
from supervisor_stage import Stage, begun

tf.compat.v1.disable_v2_behavior()


def main() -> None:
    """Say when 20 steps are made, and go on."""
    whose, logdir = sys.argv[1:]
    from pathlib import Path

    stage = Stage(theirs() if whose == "theirs" else ours(), Path(logdir), "resource", where=".")
    with tf.Graph().as_default():
        model = stage.model(summary=True)
        sv = stage.supervisor(save_summaries_secs=0)
        with sv.managed_session() as sess:
            begun(stage)
            made = 0
            while not sv.should_stop():
                sess.run(model.train)
                made += 1
                if made <= 20:
                    sv.summary_computed(sess, sess.run(sv.summary_op))
                if made == 20:
                    print("ready", flush=True)


if __name__ == "__main__":
    main()
