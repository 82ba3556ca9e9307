"""One task of a TensorFlow cluster: a parameter server, the chief or a worker, over the drop-in.

All train one model asynchronously until its global step is at the limit. Prints lines of JSON; see ``main``. Told the
addresses of all tasks by ``--ps`` and ``--workers``; the worker of index 0 is the chief.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import sys
import time

import tensorflow as tf
from tf_modes import enter, say, v1

from supervise_core import retry
from supervise_tf import GraphBackend, Supervisor


def options_from(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("job", choices=["ps", "worker"])
    parser.add_argument("task", type=int)
    parser.add_argument("--ps", type=lambda text: text.split(","))
    parser.add_argument("--workers", type=lambda text: text.split(","))
    parser.add_argument("--logdir")
    parser.add_argument("--mode", choices=["v2", "no eager", "v1"], default="v2")
    parser.add_argument("--steps", type=int, default=10**9)
    parser.add_argument("--save-secs", type=float, default=0.3)
    parser.add_argument("--pause", type=float, default=0.01)
    parser.add_argument("--init-takes", type=float, default=0.0)
    parser.add_argument("--once", action="store_true", help="do not try again when a peer is lost")
    return parser.parse_args(arguments)


def build(options: argparse.Namespace) -> tuple[tf.Tensor, tf.Operation]:
    """The training op: one more step, and one more in each place of ``w``, which ``init_fn`` made -1000."""
    device = v1.train.replica_device_setter(ps_tasks=len(options.ps), worker_device=f"/job:worker/task:{options.task}")
    with v1.device(device):
        step = v1.train.get_or_create_global_step()
        w = v1.get_variable("w", (1000,), initializer=v1.zeros_initializer(), use_resource=options.mode != "v1")
        with tf.control_dependencies([v1.assign_add(w, tf.ones((1000,)))]):
            train = v1.assign_add(step, 1)
        return w, train


def main() -> None:
    """A worker says ``{"server": pid}`` when its server runs, ``{"begin": step, "first": ..., "restored": ...}`` when
    it has a session, ``{"step": ...}`` every 20 ms, ``{"lost": ...}`` when a peer is gone, ``{"done": step}`` last."""
    options = options_from(sys.argv[1:])
    enter(options.mode)
    logging.basicConfig(level=logging.INFO)
    cluster = {"ps": options.ps, "worker": options.workers}
    server = tf.distribute.Server(cluster, job_name=options.job, task_index=options.task)
    say(server=options.task)
    if options.job == "ps":
        server.join()
    chief = options.task == 0
    inits = itertools.count(1)

    def init_fn(sess: v1.Session) -> None:
        say(initialising=True)
        time.sleep(options.init_takes)
        sess.run(initial)
        say(init=next(inits))

    with tf.Graph().as_default():
        w, train = build(options)
        initial = v1.assign(w, tf.fill((1000,), -1000.0)).op
        sv = Supervisor(
            is_chief=chief, logdir=options.logdir, save_model_secs=options.save_secs, save_summaries_secs=0,
            summary_op=None, init_fn=init_fn,
        )  # fmt: skip

        def run() -> None:
            with sv.managed_session(server.target) as sess:
                first = sess.run(w)
                step = int(sess.run(sv.global_step))
                say(begin=step, least=float(first.min()), most=float(first.max()), restored=sv.report.restored)
                said = 0.0
                while not sv.should_stop() and step < options.steps:
                    step = int(sess.run(train))
                    if time.monotonic() - said > 0.02:
                        said = time.monotonic()
                        say(step=step)
                    time.sleep(options.pause)

        def watched() -> None:
            try:
                run()
            except Exception as error:
                say(lost=type(error).__name__, text=str(error)[:300])
                raise

        if options.once:
            watched()
        else:
            retry(watched, GraphBackend, restarts=50, first_wait=0.1, longest_wait=1.0)
    say(done=sv.report.last_step, final_save=sv.report.final_save, stragglers=list(sv.report.stragglers))


if __name__ == "__main__":
    main()
