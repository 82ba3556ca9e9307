"""Each framework stays out of programs that do not use it, and all of them can be used in one."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

TOGETHER = """
import os, sys
import numpy as np
import torch
from supervise_core import Supervisor
from supervise_numpy import ArrayBackend
from supervise_torch import TorchBackend

base = sys.argv[1]

arrays = {"w": np.zeros(3)}
sv = Supervisor(ArrayBackend(arrays), os.path.join(base, "numpy"))
with sv.managed_session() as sess:
    for _ in sv.batches(range(5)):
        arrays["w"] += 1
        sess.global_step += 1
assert arrays["w"].tolist() == [5] * 3, arrays

torch.manual_seed(0)
model = torch.nn.Linear(2, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
sv = Supervisor(TorchBackend(model=model, optimizer=optimizer), os.path.join(base, "torch"))
with sv.managed_session():
    for _ in sv.batches(range(5)):
        optimizer.zero_grad()
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
assert sv.report.last_step == 5, sv.report
assert "tensorflow" not in sys.modules

import tensorflow as tf
import supervise_tf

with tf.Graph().as_default():
    step = tf.compat.v1.train.get_or_create_global_step()
    w = tf.compat.v1.get_variable("w", (3,), initializer=tf.compat.v1.zeros_initializer())
    train = tf.group(w.assign_add(tf.ones((3,))), step.assign_add(1))
    sv = supervise_tf.Supervisor(logdir=os.path.join(base, "graph"))
    with sv.managed_session() as sess:
        for _ in range(5):
            assert not sv.should_stop()
            sess.run(train)
        assert sess.run(w).tolist() == [5] * 3

counter = tf.Variable(0, dtype=tf.int64)
values = tf.Variable(tf.zeros((3,)))
module = tf.Module()
module.values, module.counter = values, counter
backend = supervise_tf.EagerBackend(module=module, global_step=counter)
sv = Supervisor(backend, os.path.join(base, "eager"))
with sv.managed_session():
    for _ in sv.batches(range(5)):
        values.assign_add(tf.ones((3,)))
        counter.assign_add(1)
assert values.numpy().tolist() == [5] * 3, values

assert arrays["w"].tolist() == [5] * 3
sv = Supervisor(ArrayBackend(arrays), os.path.join(base, "numpy again"))
with sv.managed_session() as sess:
    sess.global_step += 1
print("all trained")
"""


def python(code: str, *arguments: object) -> str:
    """What a program says, in a fresh process in which every warning is an error."""
    environment = os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3"}
    command = [sys.executable, "-W", "error", "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def loaded_after(code: str, *modules: str) -> set[str]:
    return set(python(f"{code}\nimport sys\nprint(*({set(modules)!r} & set(sys.modules)))").split())


def needs(*modules: str) -> None:
    for module in modules:
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed")


def test_core_and_torch_do_without_tensorflow() -> None:
    needs("torch")
    code = "import supervise_core, supervise_torch\nsupervise_torch.TorchBackend, supervise_core.Supervisor"
    assert loaded_after(code, "tensorflow", "keras", "supervise_tf", "jax") == set()


def test_training_eagerly_with_tensorflow_does_without_torch(tmp_path: Path) -> None:
    needs("tensorflow")
    code = """
import sys
import supervise_tf
assert "tensorflow" not in sys.modules
import tensorflow as tf
from supervise_core import Supervisor
counter = tf.Variable(0, dtype=tf.int64)
module = tf.Module()
module.counter = counter
sv = Supervisor(supervise_tf.EagerBackend(module=module, global_step=counter), sys.argv.pop())
with sv.managed_session():
    for _ in sv.batches(range(3)):
        counter.assign_add(1)
assert sv.report.last_step == 3
print(*({"torch", "supervise_torch", "jax"} & set(sys.modules)))
"""
    assert python(code, tmp_path).split() == []


def test_all_backends_in_one_process(tmp_path: Path) -> None:
    needs("torch", "tensorflow")
    assert python(TOGETHER, tmp_path).strip() == "all trained"
    newest = {path.parent.name for path in tmp_path.glob("*/model.ckpt-5*")}
    assert newest == {"numpy", "torch", "graph", "eager"}
