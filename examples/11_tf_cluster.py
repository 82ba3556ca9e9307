"""Asynchronous training on a TensorFlow cluster: a parameter server, a chief and two workers, each a process.

The program of each task is that of the original guide, after the change of one import line, and inside ``retry``. Kill
any of the processes and start it again (``--job`` and ``--task`` say which one it is; all of them are printed): a
worker, and the chief too, finds the model ready on the parameter server and goes on; after the death of the parameter
server the chief restores the newest checkpoint, and the workers wait for that. Without ``--job`` all are started here::

    pip install '.[tf,examples]'
    python examples/11_tf_cluster.py --logdir runs/cluster
"""

from __future__ import annotations

import argparse
import os
import shlex
import socket
import subprocess
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

BATCH = 64
WORKERS = 3
"""The first of them is the chief."""


def train(job: str, task: int, addresses: list[str], logdir: str, steps: int) -> None:
    """What one task of the cluster does."""
    import numpy as np
    import tensorflow.compat.v1 as tf
    from sklearn.datasets import load_digits

    from supervise_core import retry
    from supervise_tf import GraphBackend, Supervisor  # was: from tensorflow.train import Supervisor

    cluster = {"ps": addresses[:1], "worker": addresses[1:]}
    server = tf.distribute.Server(cluster, job_name=job, task_index=task)
    if job == "ps":
        server.join()  # for ever

    digits = load_digits()
    rng = np.random.default_rng()
    with tf.Graph().as_default():
        with tf.device(tf.train.replica_device_setter(ps_tasks=1, worker_device=f"/job:worker/task:{task}")):
            images = tf.placeholder(tf.float32, (None, 64))
            labels = tf.placeholder(tf.int64, (None,))
            step = tf.train.get_or_create_global_step()
            w1 = tf.get_variable("w1", (64, 64), initializer=tf.glorot_normal_initializer(seed=1))
            w2 = tf.get_variable("w2", (64, 10), initializer=tf.glorot_normal_initializer(seed=2))
            scores = tf.nn.relu(images @ w1) @ w2
            loss = tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(labels=labels, logits=scores))
            train_op = tf.train.GradientDescentOptimizer(0.05).minimize(loss, global_step=step)
        sv = Supervisor(is_chief=task == 0, logdir=logdir, save_model_secs=2, summary_op=None)

        def run() -> None:
            with sv.managed_session(server.target) as sess:
                now = int(sess.run(step))
                print(f"step {now}: {sv.report.restored or ('begun anew' if now == 0 else 'joined')}", flush=True)
                while not sv.should_stop() and now < steps:
                    batch = rng.integers(len(digits.target), size=BATCH)
                    fed = {images: digits.data[batch] / 16, labels: digits.target[batch]}
                    value, now, _ = sess.run([loss, step, train_op], fed)
                    if now % 500 == 0:
                        print(f"{job} {task}: step {now}, loss {value:.3f}", flush=True)

        retry(run, GraphBackend)  # a parameter server that was lost comes back, or is started again
    print(f"done: step {sv.report.last_step}, {sv.report.final_save}", flush=True)


def start_all(logdir: str, steps: int) -> None:
    """Start the whole cluster on this machine, and end the parameter server when all others have ended."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(1 + WORKERS)]
    addresses = ",".join(f"127.0.0.1:{held.getsockname()[1]}" for held in sockets)
    for held in sockets:
        held.close()

    def start(job: str, task: int, output: int | None = None) -> subprocess.Popen[str]:
        command = [sys.executable, __file__, "--job", job, "--task", str(task), "--addresses", addresses]
        command += ["--logdir", logdir, "--steps", str(steps)]
        print(shlex.join(command), file=sys.stderr, flush=True)
        return subprocess.Popen(command, stdout=output, text=True)

    with start("ps", 0) as server:
        try:
            with start("worker", 0, subprocess.PIPE) as chief:
                assert chief.stdout is not None
                print(chief.stdout.readline(), end="", flush=True)
                workers = [start("worker", task, subprocess.DEVNULL) for task in range(1, WORKERS)]
                for line in chief.stdout:
                    print(line, end="", flush=True)
            statuses = [process.wait() for process in (chief, *workers)]
        finally:
            server.kill()
    sys.exit(max(map(abs, statuses)))


def main() -> None:
    """Be one task, or start them all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--logdir", default="runs/cluster")
    parser.add_argument("--steps", type=int, default=20000)
    parser.add_argument("--job", choices=["ps", "worker"])
    parser.add_argument("--task", type=int, default=0)
    parser.add_argument("--addresses", help="of the parameter server and the workers, as host:port,host:port")
    options = parser.parse_args()
    if options.job is None:
        start_all(options.logdir, options.steps)
    else:
        train(options.job, options.task, options.addresses.split(","), options.logdir, options.steps)


if __name__ == "__main__":
    main()
